package sip003_test

import (
	"fmt"

	"pthost/adapters/sip003"
)

func ExampleParseOptions() {
	options, err := sip003.ParseOptions(`server;transport=websocket;path=/a\;b`)
	if err != nil {
		fmt.Println(err)
		return
	}
	_, server := options.Cut("server")
	fmt.Println(server)
	for _, o := range options {
		fmt.Println(o.Key, "=", o.Value)
	}
	// Output:
	// true
	// transport = websocket
	// path = /a;b
}
