package main

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"runtime"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"pthost/ptipc/testpeer"
)

// inNamespace runs f on a thread in a network namespace.
func inNamespace(t *testing.T, name string, f func()) {
	t.Helper()
	enter := func(path string) error {
		ns, err := os.Open(path)
		if err != nil {
			return err
		}
		defer ns.Close()
		return unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET)
	}
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // for good: the thread ends with the goroutine
		err := enter("/run/netns/" + name)
		if err == nil {
			f()
		}
		done <- err
	}()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}

// A peer that vanishes, as one whose cable is cut does, is missed by its pings: both
// ends of the stream break.
func TestChainPeerVanishes(t *testing.T) {
	eachVia(t, func(t *testing.T, via string) {
		ip := testpeer.Need(t, "ip")
		if os.Getuid() != 0 {
			testpeer.Skip(t, "network namespaces need root; run the tests as root")
		}
		name := func(end string) string { return fmt.Sprintf("ptipc%d%s", os.Getpid(), end) }
		near, far := name("n"), name("f")
		for _, ns := range []string{near, far} {
			if out, err := exec.CommandContext(t.Context(), ip, "netns", "add", ns).CombinedOutput(); err != nil {
				testpeer.Skip(t, fmt.Sprintf("no network namespace can be made: %v: %s", err, out))
			}
			t.Cleanup(func() { run(t, exec.Command(ip, "netns", "del", ns)) })
		}
		for _, args := range [][]string{
			{"-n", near, "link", "add", "wire", "type", "veth", "peer", "name", "wire", "netns", far},
			{"-n", near, "addr", "add", "192.0.2.1/24", "dev", "wire"},
			{"-n", far, "addr", "add", "192.0.2.2/24", "dev", "wire"},
			{"-n", near, "link", "set", "wire", "up"},
			{"-n", far, "link", "set", "wire", "up"},
			{"-n", near, "link", "set", "lo", "up"},
			{"-n", far, "link", "set", "lo", "up"},
		} {
			run(t, exec.CommandContext(t.Context(), ip, args...))
		}
		var service net.Listener
		var err error
		inNamespace(t, far, func() { service, err = net.Listen("tcp", "127.0.0.1:0") })
		if err != nil {
			t.Fatal(err)
		}
		defer service.Close()
		client, server := generateWebSocket(t, `{"listen":"192.0.2.2:8443","host":"192.0.2.2"}`)
		client["ping"], server["ping"] = "1s", "1s"
		start := func(ns string, document any) *tool {
			return startToolBy(t, []string{ip, "netns", "exec", ns}, "--log-level", "info", writeConfig(t, document))
		}
		start(far, map[string]any{"transports": map[string]any{"server": map[string]any{
			"exec": "builtin:websocket", "role": "server", "config": server, "via": []string{"free"},
			"egress": map[string]any{"allow": []string{service.Addr().String()}},
		}}})
		front := start(near, map[string]any{
			"transports": map[string]any{"client": map[string]any{"exec": "builtin:websocket", "config": client}},
			"fronts":     []any{map[string]any{"listen": "tcp://127.0.0.1:0", "serve": "forward", "dest": service.Addr().String(), "via": []string{via, "client"}}},
		}).front
		var conn net.Conn
		inNamespace(t, near, func() { conn, err = net.Dial("tcp", front) })
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		if _, err := conn.Write([]byte("x")); err != nil {
			t.Fatal(err)
		}
		peer, err := service.Accept()
		if err != nil {
			t.Fatal(err)
		}
		defer peer.Close()
		for _, c := range []net.Conn{conn, peer} {
			_ = c.SetDeadline(time.Now().Add(patience)) // fails only on a closed conn
		}
		if _, err := io.CopyN(conn, peer, 1); err != nil {
			t.Fatal(err)
		}
		run(t, exec.CommandContext(t.Context(), ip, "-n", near, "link", "set", "wire", "down"))
		for end, c := range map[string]net.Conn{"near": conn, "far": peer} {
			if _, err := io.Copy(io.Discard, c); !errors.Is(err, syscall.ECONNRESET) {
				t.Errorf("the %s end reads %v, want a reset", end, err)
			}
		}
	})
}
