package localnet_test

import (
	"context"
	"fmt"
	"os"
	"path/filepath"

	"pthost/ptipc/localnet"
)

func ExampleParseAddr() {
	for _, s := range []string{"127.0.0.1:1080", "unix:socks", "0.0.0.0:1080", "unix:/run/socks"} {
		addr, err := localnet.ParseAddr(s)
		if err != nil {
			fmt.Println(err)
			continue
		}
		fmt.Println(addr.Network(), addr)
	}
	// Output:
	// tcp 127.0.0.1:1080
	// unix unix:socks
	// localnet: not a local address: "0.0.0.0:1080" is not on the loopback; use 127.0.0.1 or [::1]
	// localnet: not a local address: "/run/socks" has the byte '/'; use a bare file name of letters, digits, '.', '_' and '-'
}

func ExampleGuard() {
	base, err := os.MkdirTemp("", "example")
	if err != nil {
		fmt.Println(err)
		return
	}
	defer os.RemoveAll(base)
	path := filepath.Join(base, "state")
	if err := os.Mkdir(path, 0o700); err != nil {
		fmt.Println(err)
		return
	}
	dir, err := localnet.OpenDir(path)
	if err != nil {
		fmt.Println(err)
		return
	}
	defer dir.Close()
	listener, err := dir.Listen("socks")
	if err != nil {
		fmt.Println(err)
		return
	}
	guarded := localnet.Guard(listener, nil)
	defer guarded.Close()
	fmt.Println("listening on", guarded.Addr())

	client, err := dir.Dial(context.Background(), "socks")
	if err != nil {
		fmt.Println(err)
		return
	}
	defer client.Close()
	server, err := guarded.Accept()
	if err != nil {
		fmt.Println(err)
		return
	}
	defer server.Close()
	cred, err := localnet.Peer(server)
	fmt.Println("from us:", cred.PID == os.Getpid(), err)
	fmt.Println("one name:", localnet.ClientName(client.LocalAddr()) == localnet.ClientName(server.RemoteAddr()))
	// Output:
	// listening on unix:socks
	// from us: true <nil>
	// one name: true
}
