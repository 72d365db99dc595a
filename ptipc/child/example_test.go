package child_test

import (
	"context"
	"fmt"
	"net"
	"os"
	"strings"

	"pthost/ptipc"
	"pthost/ptipc/child"
	"pthost/ptipc/relay"
)

// open is all that the author of a transport writes: here one that takes its
// connections to the server of its configuration, whatever the application sends.
func open(_ context.Context, config ptipc.Opaque, env ptipc.Env) (*ptipc.Transport, error) {
	var c struct {
		Server string `json:"server"`
	}
	if err := config.Decode(&c); err != nil {
		return nil, err
	}
	var meter relay.Meter
	return meter.Transport(map[string]ptipc.ConnectionFactory{
		"plain": meter.Factory(true, func(ctx context.Context, _ ptipc.Opaque, _ string) (net.Conn, error) {
			return env.Dial(ctx, "tcp", c.Server)
		}),
	}, nil), nil
}

// The main function of an executable. Its host says the rest on the command line.
func ExampleMain() {
	child.Main(child.Transport{Client: open})
}

// What the executable says when its configuration is wrong: one line for the host,
// one for people, and an exit code.
func ExampleRun() {
	stdin := strings.NewReader("")
	code := child.Run(context.Background(), []string{"client", `{"sever":"192.0.2.1:443"}`}, ".",
		stdin, os.Stdout, os.Stdout, child.Transport{Client: open})
	fmt.Println("exit code", code)
	// Output:
	// VERSION 1
	// CMETHOD-ERROR _ {"class":19,"message":"/sever: is not a key here; remove it; the keys known here are server","pointer":"/sever","problem":"is not a key here","remedy":"remove it; the keys known here are server"}
	// /sever: is not a key here; remove it; the keys known here are server
	// exit code 78
}
