package main

import (
	"io"
	"net"
	"os"
	"strings"
	"testing"
	"time"
)

// startWire runs a TCP relay that can be cut in the middle.
func startWire(t *testing.T, to string) (addr string, cut func()) {
	t.Helper()
	both := make(chan *net.TCPConn, 2)
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
		_ = near.CloseWrite()
	})
	return addr, func() {
		for range 2 {
			reset(<-both)
		}
	}
}

func killPid(t *testing.T, pid int) {
	t.Helper()
	process, err := os.FindProcess(pid)
	if err != nil {
		t.Fatal(err)
	}
	if err := process.Kill(); err != nil {
		t.Error(err)
	}
}

func reset(c *net.TCPConn) {
	_ = c.SetLinger(0) // fails only on a closed conn
	_ = c.Close()
}

// startBreakable is a chain with one connection through it. near is the program's end,
// far the destination's. So many bytes have gone each way, at least four.
func startBreakable(t *testing.T, via string, bulk int) (c *chain, near, far *net.TCPConn, cut func()) {
	t.Helper()
	accepted, release := make(chan *net.TCPConn, 1), make(chan struct{})
	dest := serve(t, func(conn *net.TCPConn) {
		accepted <- conn
		<-release
	})
	client, server := generateWebSocket(t, `{"listen":"127.0.0.1:0","host":"127.0.0.1"}`)
	wire, cut := startWire(t, server["listen"].(string))
	client["url"] = strings.Replace(client["url"].(string), server["listen"].(string), wire, 1)
	c = &chain{
		server: startServer(t, server, map[string]any{"via": []string{"free"}, "egress": map[string]any{"allow": []string{dest}}}),
		client: startClient(t, client, map[string]any{"serve": "socks5", "via": []string{via, "client"}}),
	}
	t.Cleanup(func() { close(release) }) // before the tools are stopped, which wait for open connections
	near, err := c.dial(t.Context(), dest)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = near.Close() })
	far = within(t, "the destination is connected", accepted)
	for _, conn := range []*net.TCPConn{near, far} {
		_ = conn.SetDeadline(time.Now().Add(patience)) // fails only on a closed conn
	}
	for _, size := range []int{4, bulk, bulk} {
		for _, way := range [][2]*net.TCPConn{{near, far}, {far, near}} {
			sent := make(chan error, 1)
			go func() {
				_, err := way[0].Write(make([]byte, size))
				sent <- err
			}()
			if _, err := io.ReadFull(way[1], make([]byte, size)); err != nil {
				t.Fatal(err)
			}
			if err := <-sent; err != nil {
				t.Fatal(err)
			}
		}
	}
	return c, near, far, cut
}

// A stream that breaks is never taken for one that has ended, wherever along the chain
// and however it breaks, in both directions, and also when the other direction has
// ended before (SOCKS-15, SOCKS-20), or both sockets were handed to the children (SOCKS-25).
func TestChainBreaks(t *testing.T) {
	eachVia(t, func(t *testing.T, via string) { breaksOf(t, via, 0) })
	t.Run("bulk", func(t *testing.T) { breaksOf(t, "free", 600<<10) })
}

func breaksOf(t *testing.T, via string, bulk int) {
	{
		type ends struct {
			*chain
			near, far *net.TCPConn
			cut       func()
		}
		for name, breaks := range map[string]func(e ends){
			"server child killed": func(e ends) { killPid(t, lastPid(e.server.out.String())) },
			"client child killed": func(e ends) { killPid(t, lastPid(e.client.out.String())) },
			"server host killed":  func(e ends) { _ = e.server.cmd.Process.Kill() },
			"client host killed":  func(e ends) { _ = e.client.cmd.Process.Kill() },
			"wire cut":            func(e ends) { e.cut() },
			"program resets":      func(e ends) { reset(e.near) },
			"destination resets":  func(e ends) { reset(e.far) },
		} {
			for _, ended := range []string{"", "after the program's end", "after the destination's end"} {
				t.Run(name+" "+ended, func(t *testing.T) {
					c, near, far, cut := startBreakable(t, via, bulk)
					end := func(of, at *net.TCPConn) {
						if err := of.CloseWrite(); err != nil {
							t.Fatal(err)
						}
						if _, err := io.Copy(io.Discard, at); err != nil {
							t.Fatal(err)
						}
					}
					switch ended {
					case "after the program's end":
						end(near, far)
					case "after the destination's end":
						end(far, near)
					}
					breaks(ends{c, near, far, cut})
					if name != "program resets" && ended != "after the destination's end" {
						if _, err := io.Copy(io.Discard, near); err == nil {
							t.Error("the program takes what came for the whole")
						}
					}
					if name != "destination resets" && ended != "after the program's end" {
						if _, err := io.Copy(io.Discard, far); err == nil {
							t.Error("the destination takes what came for the whole")
						}
					}
					if t.Failed() {
						t.Log(c.logs())
					}
				})
			}
		}
	}
}
