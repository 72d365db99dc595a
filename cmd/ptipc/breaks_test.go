package main

import (
	"io"
	"net"
	"strings"
	"syscall"
	"testing"
	"time"
)

// startWire runs a TCP relay that can be cut in the middle.
func startWire(t *testing.T, to string) (addr string, cut func()) {
	t.Helper()
	both := make(chan *net.TCPConn, 16)
	addr = serve(t, func(near *net.TCPConn) {
		conn, err := net.Dial("tcp", to)
		if err != nil {
			return
		}
		far := conn.(*net.TCPConn)
		defer far.Close()
		both <- near
		both <- far
		go func() { _, _ = io.Copy(far, near); _ = far.CloseWrite() }()
		_, _ = io.Copy(near, far)
	})
	return addr, func() {
		for range 2 {
			c := <-both
			_ = c.SetLinger(0)
			_ = c.Close()
		}
	}
}

// A stream that breaks is never taken for one that has ended, wherever and however it
// breaks, and in both directions (SOCKS-15).
func TestChainBreaks(t *testing.T) {
	accepted := make(chan *net.TCPConn, 1)
	release := make(chan struct{})
	addr := serve(t, func(conn *net.TCPConn) {
		accepted <- conn
		<-release
	})
	for _, half := range []bool{false, true} {
		for name, breaks := range map[string]func(c *chain, near, far *net.TCPConn, cut func()){
			"server killed": func(c *chain, _, _ *net.TCPConn, _ func()) {
				_ = syscall.Kill(lastPid(c.server.out.String()), syscall.SIGKILL)
			},
			"client killed": func(c *chain, _, _ *net.TCPConn, _ func()) {
				_ = syscall.Kill(lastPid(c.client.out.String()), syscall.SIGKILL)
			},
			"wire cut":          func(_ *chain, _, _ *net.TCPConn, cut func()) { cut() },
			"program resets":     func(_ *chain, near, _ *net.TCPConn, _ func()) { _ = near.SetLinger(0); _ = near.Close() },
			"destination resets": func(_ *chain, _, far *net.TCPConn, _ func()) { _ = far.SetLinger(0); _ = far.Close() },
		} {
			if half {
				name += " after half-close"
			}
			t.Run(name, func(t *testing.T) {
				client, server := generateWebSocket(t, `{"listen":"127.0.0.1:0","host":"127.0.0.1"}`)
				wire, cut := startWire(t, server["listen"].(string))
				client["url"] = strings.Replace(client["url"].(string), server["listen"].(string), wire, 1)
				c := &chain{
					server: startServer(t, server, map[string]any{"via": []string{"free"}, "egress": map[string]any{"allow": []string{addr}}}),
					client: startClient(t, client, map[string]any{"serve": "socks5", "via": []string{"free", "client"}}),
				}
				near, err := c.dial(t.Context(), addr)
				if err != nil {
					t.Fatal(err)
				}
				defer near.Close()
				far := within(t, "the destination is connected", accepted)
				defer func() { release <- struct{}{} }()
				for _, conn := range []*net.TCPConn{near, far} {
					_ = conn.SetDeadline(time.Now().Add(patience))
				}
				for _, way := range [][2]*net.TCPConn{{near, far}, {far, near}} {
					if _, err := way[0].Write([]byte("part")); err != nil {
						t.Fatal(err)
					}
					if _, err := io.ReadFull(way[1], make([]byte, 4)); err != nil {
						t.Fatal(err)
					}
				}
				if half {
					_ = near.CloseWrite()
					if _, err := io.Copy(io.Discard, far); err != nil {
						t.Fatal(err)
					}
				}
				breaks(c, near, far, cut)
				if !strings.HasPrefix(name, "program") {
					if _, err := io.Copy(io.Discard, near); err == nil {
						t.Error("the program takes what came for the whole")
					}
				}
				if !strings.HasPrefix(name, "destination") && !half {
					if _, err := io.Copy(io.Discard, far); err == nil {
						t.Error("the destination takes what came for the whole")
					}
				}
			})
		}
	}
}
