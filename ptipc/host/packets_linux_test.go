package host

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"pthost/ptipc"
)

// udpServer answers each datagram with what it was.
func udpServer(t *testing.T, addr string) *net.UDPAddr {
	t.Helper()
	conn, err := net.ListenPacket("udp", addr)
	if err != nil {
		t.Fatal(err)
	}
	var serving sync.WaitGroup
	serving.Go(func() {
		buf := make([]byte, 1<<16)
		for {
			n, from, err := conn.ReadFrom(buf)
			if err != nil {
				return
			}
			_, _ = conn.WriteTo(buf[:n], from)
		}
	})
	t.Cleanup(func() { conn.Close(); serving.Wait() })
	return conn.LocalAddr().(*net.UDPAddr)
}

func openPackets(t *testing.T, transport *ptipc.Transport) net.PacketConn {
	t.Helper()
	conn, err := transport.Packets["direct"](within(t))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

// talkPackets sends a word until it comes back: datagrams may be lost.
func talkPackets(t *testing.T, conn net.PacketConn, to *net.UDPAddr, word []byte) {
	t.Helper()
	ctx := within(t)
	buf := make([]byte, 1<<16)
	for ctx.Err() == nil {
		if _, err := conn.WriteTo(word, to); err != nil {
			t.Fatal(err)
		}
		_ = conn.SetReadDeadline(time.Now().Add(300 * time.Millisecond))
		for {
			n, from, err := conn.ReadFrom(buf)
			var timeout net.Error
			if errors.As(err, &timeout) && timeout.Timeout() {
				break
			}
			if err != nil {
				t.Fatal(err)
			}
			if bytes.Equal(buf[:n], word) && from.String() == to.String() {
				return
			}
		}
	}
	t.Fatalf("%d bytes did not come back from %v", len(word), to)
}

// An application's socket is one of the transport in the child: datagrams of up to 1,500
// bytes pass whole (PKT-6), over IPv4 and IPv6; names are refused (PKT-1); what was
// not asked for does not come in (PKT-2); and no secret is told (PKT-4).
func TestPackets(t *testing.T) {
	log := new(capture)
	c := self("direct")
	var mu sync.Mutex
	var traced []string
	c.Trace = func(_ bool, line []byte) {
		mu.Lock()
		defer mu.Unlock()
		traced = append(traced, string(line))
	}
	transport := open(t, c, `{}`, ptipc.Env{Log: log.logger()})
	conn := openPackets(t, transport)
	for _, addr := range []string{"127.0.0.1:0", "[::1]:0"} {
		to := udpServer(t, addr)
		for _, size := range []int{0, 1, 1200, 1500} {
			talkPackets(t, conn, to, bytes.Repeat([]byte{byte(size)}, size))
		}
	}
	if _, err := conn.WriteTo([]byte("x"), &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 1}); !errors.Is(err, ptipc.ErrAddressType) {
		t.Errorf("to an address that is not of UDP: %v", err)
	}
	stranger, err := net.ListenPacket("udp", "127.0.0.3:0")
	if err != nil {
		t.Fatal(err)
	}
	defer stranger.Close()
	port := conn.LocalAddr().(*net.UDPAddr).Port
	if _, err := stranger.WriteTo([]byte("unasked"), &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1), Port: port}); err != nil {
		t.Fatal(err)
	}
	to := udpServer(t, "127.0.0.1:0")
	if _, err := conn.WriteTo([]byte("asked"), to); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 100)
	_ = conn.SetReadDeadline(time.Now().Add(20 * time.Second))
	if n, from, err := conn.ReadFrom(buf); err != nil || string(buf[:n]) != "asked" {
		t.Errorf("%q from %v, %v", buf[:n], from, err)
	}
	stats, err := transport.Stats(t.Context())
	if err != nil || stats.Active != 1 || stats.Opened != 1 || stats.Sent < 2*2701 || stats.Received < 2*2701 {
		t.Errorf("%+v, %v", stats, err)
	}
	if err := transport.Close(); err != nil {
		t.Error(err)
	}
	if _, _, err := conn.ReadFrom(buf); !errors.Is(err, net.ErrClosed) {
		t.Errorf("after Close: %v", err)
	}
	mu.Lock()
	defer mu.Unlock()
	announced := false
	for _, line := range traced {
		if strings.Contains(line, " turn ") {
			announced = true
			if !strings.HasSuffix(line, "ARGS:username=***,password=***,realm=***") {
				t.Errorf("the trace tells %q", line)
			}
		}
	}
	if !announced {
		t.Errorf("no packet factory in the trace: %q", traced)
	}
}

// PKT-8: the child is killed in mid-flow; the same socket goes on through the next one.
// Another child has other credentials, or the host could not have got in: the old
// server's are gone with it.
func TestPacketsThroughRestart(t *testing.T) {
	c := self("direct")
	events := record(c)
	transport := open(t, c, `{}`, ptipc.Env{})
	conn, to := openPackets(t, transport), udpServer(t, "127.0.0.1:0")
	talkPackets(t, conn, to, []byte("before"))
	flow, cancel := context.WithCancel(t.Context())
	var flowing sync.WaitGroup
	flowing.Go(func() {
		for flow.Err() == nil {
			if _, err := conn.WriteTo([]byte("flow"), to); err != nil {
				t.Error("a write in mid-flow:", err)
				return
			}
			select {
			case <-flow.Done():
			case <-time.After(time.Millisecond):
			}
		}
	})
	defer flowing.Wait()
	defer cancel()
	for i := range 2 {
		kill(t, last(events.until(t, Ready)).Pid)
		talkPackets(t, conn, to, fmt.Appendf(nil, "after %d", i))
	}
	talkPackets(t, openPackets(t, transport), to, []byte("a new one"))

	// One that only listens has a new address soon, without having sent anything.
	quiet := openPackets(t, transport)
	before := quiet.LocalAddr().String()
	kill(t, last(events.until(t, Ready)).Pid)
	eventually(t, "a socket that only listens has another allocation", func() bool { return quiet.LocalAddr().String() != before })
}

// What ends with the child for good says so.
func TestPacketsWithoutRestart(t *testing.T) {
	c := self("direct")
	c.Restart.Never = true
	events := record(c)
	transport := open(t, c, `{}`, ptipc.Env{})
	conn, to := openPackets(t, transport), udpServer(t, "127.0.0.1:0")
	talkPackets(t, conn, to, []byte("before"))
	kill(t, last(events.until(t, Ready)).Pid)
	_ = conn.SetReadDeadline(time.Now().Add(20 * time.Second))
	if _, _, err := conn.ReadFrom(make([]byte, 10)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("a socket without a child: %v", err)
	}
	if _, err := transport.Packets["direct"](within(t)); err == nil {
		t.Error("a socket was opened without a child")
	}
}

// PKT-7: five hundred sockets at once, each of which works, and gone again: neither
// side keeps a descriptor, nor the host a goroutine.
func TestManyPackets(t *testing.T) {
	const sockets = 500
	c := self("direct")
	events := record(c)
	transport := open(t, c, `{}`, ptipc.Env{})
	pid := fmt.Sprint(last(events.until(t, Ready)).Pid)
	to := udpServer(t, "127.0.0.1:0")
	talkPackets(t, openPackets(t, transport), to, []byte("first"))
	inChild, inHost, goroutines := descriptors(t, pid), descriptors(t, "self"), runtime.NumGoroutine()
	for range 2 {
		conns := make([]net.PacketConn, sockets)
		var opening sync.WaitGroup
		for i := range conns {
			opening.Go(func() {
				conn, err := transport.Packets["direct"](within(t))
				if err != nil {
					t.Error(err)
					return
				}
				conns[i] = conn
			})
		}
		opening.Wait()
		if t.Failed() {
			t.FailNow()
		}
		if n := descriptors(t, pid); n < inChild+sockets {
			t.Errorf("the child has %d descriptors, and had %d before", n, inChild)
		}
		for i, conn := range conns {
			talkPackets(t, conn, to, fmt.Append(nil, i))
		}
		for _, conn := range conns {
			if err := conn.Close(); err != nil {
				t.Error(err)
			}
		}
		eventually(t, "the child gives the sockets back", func() bool { return descriptors(t, pid) <= inChild })
		eventually(t, "the host gives the sockets back", func() bool { return descriptors(t, "self") <= inHost })
		eventually(t, "the host's goroutines are gone", func() bool { return runtime.NumGoroutine() <= goroutines })
	}
	if s, err := transport.Stats(t.Context()); err != nil || s.Active != 1 || s.Opened != 1+2*sockets {
		t.Errorf("%+v, %v", s, err)
	}
}
