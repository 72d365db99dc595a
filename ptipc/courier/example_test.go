package courier_test

import (
	"context"
	"fmt"
	"os"
	"path/filepath"

	"pthost/ptipc"
	"pthost/ptipc/courier"
)

// A person looks at what goes out, and adds what came.
func ExampleQueue() {
	ctx := context.Background()
	queue := courier.NewQueue(courier.Options{Server: true})
	defer queue.Close()

	// The person:
	err := queue.Add(ptipc.Message{Peer: "alice", Body: ptipc.Opaque(`{"offer":"x"}`)})
	if err != nil {
		fmt.Println(err)
	}
	// The transport:
	m, err := queue.Receive(ctx)
	if err != nil {
		fmt.Println(err)
	}
	if err := queue.Send(ctx, ptipc.Message{Peer: m.Peer, Body: ptipc.Opaque(`{"answer":"y"}`)}); err != nil {
		fmt.Println(err)
	}
	// The person again:
	for _, p := range queue.Pending() {
		fmt.Printf("%d for %s: %s\n", p.ID, p.Message.Peer, p.Message.Body)
	}
	// Output: 1 for alice: {"answer":"y"}
}

// Two applications on one machine, between which files are moved.
func ExampleDir() {
	ctx := context.Background()
	path, err := os.MkdirTemp("", "")
	if err != nil {
		fmt.Println(err)
		return
	}
	defer os.RemoveAll(path)
	client, err := courier.OpenDir(filepath.Join(path, "client"), courier.Options{})
	if err != nil {
		fmt.Println(err)
		return
	}
	defer client.Close()
	server, err := courier.OpenDir(filepath.Join(path, "server"), courier.Options{Server: true})
	if err != nil {
		fmt.Println(err)
		return
	}
	defer server.Close()

	if err := client.Send(ctx, ptipc.Message{Body: ptipc.Opaque(`{"offer":"x"}`)}); err != nil {
		fmt.Println(err)
	}
	files, _ := filepath.Glob(filepath.Join(path, "client", "out", "*.json"))
	for _, file := range files {
		if err := os.Rename(file, filepath.Join(path, "server", "in", "alice.json")); err != nil {
			fmt.Println(err)
		}
	}
	m, err := server.Receive(ctx)
	fmt.Printf("%s says %s, error %v\n", m.Peer, m.Body, err)
	// Output: alice says {"offer":"x"}, error <nil>
}
