package host

import (
	"encoding/json"
	"errors"
	"io"
	"net"
	"syscall"
	"testing"
	"time"

	"pthost/ptipc"
	author "pthost/ptipc/child"
	"pthost/ptipc/relay"
	"pthost/transports/direct"
)

func init() {
	roles["unmarked"] = func(args []string) int { // HOST is the last argument
		var host map[string]any
		if err := json.Unmarshal([]byte(args[len(args)-1]), &host); err != nil {
			return 1
		}
		delete(host, "ends")
		text, _ := json.Marshal(host)
		args[len(args)-1] = string(text)
		author.MainArgs(args, author.Transport{Client: direct.Open})
		return 0 // not reached
	}
}

// far is where connections lead to.
func far(t *testing.T) *net.TCPListener {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l.(*net.TCPListener)
}

// through is a connection through the child with both of its ends.
func through(t *testing.T, factory ptipc.ConnectionFactory, l *net.TCPListener) (ptipc.Conn, *net.TCPConn) {
	t.Helper()
	conn := dial(t, factory, "", l.Addr().String())
	wire, err := l.AcceptTCP()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { wire.Close() })
	for _, c := range []net.Conn{conn, wire} {
		_ = c.SetDeadline(time.Now().Add(patience)) // fails only on a closed conn
	}
	return conn, wire
}

// A stream that a child was killed over, or that broke behind it, does not look like one
// that has ended, whether the other direction has ended before or not (SOCKS-20, SOCKS-21).
func TestBrokenStream(t *testing.T) {
	l := far(t)
	for name, breaks := range map[string]func(pid int, wire *net.TCPConn){
		"killed": func(pid int, _ *net.TCPConn) { kill(t, pid) },
		"reset":  func(_ int, wire *net.TCPConn) { _ = wire.SetLinger(0); wire.Close() },
	} {
		for _, half := range []bool{false, true} {
			c := self("direct")
			events := record(c)
			conn, wire := through(t, open(t, c, `{}`, ptipc.Env{}).Connections["direct"], l)
			if half {
				if err := conn.CloseWrite(); err != nil {
					t.Fatal(err)
				}
				if _, err := io.ReadAll(wire); err != nil {
					t.Fatal(err)
				}
			}
			if _, err := wire.Write([]byte("part")); err != nil {
				t.Fatal(err)
			}
			if _, err := io.ReadFull(conn, make([]byte, 4)); err != nil {
				t.Fatal(err)
			}
			breaks(last(events.until(t, Ready)).Pid, wire)
			if _, err := io.ReadAll(conn); !errors.Is(err, io.ErrUnexpectedEOF) {
				t.Errorf("%s, half-closed before: %t: reading ended with %v", name, half, err)
			}
		}
	}
}

// What the application does comes out at the far end: Close ends the stream, Abort breaks it.
func TestCloseAndAbort(t *testing.T) {
	l := far(t)
	factory := open(t, self("direct"), `{}`, ptipc.Env{}).Connections["direct"]
	for _, half := range []bool{false, true} {
		for _, abort := range []bool{false, true} {
			conn, wire := through(t, factory, l)
			if half {
				if err := wire.CloseWrite(); err != nil {
					t.Fatal(err)
				}
				if _, err := io.ReadAll(conn); err != nil {
					t.Fatal(err)
				}
			}
			if _, err := conn.Write([]byte("words")); err != nil {
				t.Fatal(err)
			}
			end := conn.Close
			if abort {
				if _, err := io.ReadFull(wire, make([]byte, 5)); err != nil { // a reset may overtake them
					t.Fatal(err)
				}
				end = conn.(*relay.Conn).Abort
			}
			if err := end(); err != nil {
				t.Fatal(err)
			}
			if _, err := io.ReadAll(wire); errors.Is(err, syscall.ECONNRESET) != abort {
				t.Errorf("half-closed before: %t, aborted: %t: the far end reads %v", half, abort, err)
			}
		}
	}
}

// A server's child that is killed breaks what it has delivered.
func TestBrokenDelivery(t *testing.T) {
	c := self("wire")
	events := record(c)
	l := listenOn(t, c, `{"listen":"127.0.0.1:0"}`, ptipc.Env{})
	client, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	conn, err := accept(l)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if _, err := client.Write([]byte("part")); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(conn, make([]byte, 4)); err != nil {
		t.Fatal(err)
	}
	kill(t, last(events.until(t, Ready)).Pid)
	for end, c := range map[string]net.Conn{"host": conn, "client": client} {
		_ = c.SetReadDeadline(time.Now().Add(patience)) // fails only on a closed conn
		if _, err := io.ReadAll(c); !errors.Is(err, io.ErrUnexpectedEOF) && !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("the %s reads %v", end, err)
		}
	}
}

// A child that does not mark ends, and closes its socket as soon as it is done, is
// not taken for broken (SOCKS-21).
func TestUnmarkedChild(t *testing.T) {
	l := far(t)
	c := self("unmarked")
	c.ConfigArgv = true
	factory := open(t, c, `{}`, ptipc.Env{}).Connections["direct"]
	conn, wire := through(t, factory, l)
	if _, err := wire.Write([]byte("whole")); err != nil {
		t.Fatal(err)
	}
	if err := conn.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	wire.Close()
	if got, err := io.ReadAll(conn); err != nil || string(got) != "whole" {
		t.Errorf("%q, %v", got, err)
	}
}

// Many connections, one after the other, and restarts of the child leave no slot and no
// memory behind.
func TestEndsAreGivenBack(t *testing.T) {
	l := far(t)
	c := self("direct")
	events := record(c)
	transport := open(t, c, `{}`, ptipc.Env{})
	for range 3 {
		var first string
		for range 20 {
			conn, _ := through(t, transport.Connections["direct"], l)
			slot := conn.LocalAddr().String()[1:5]
			if first == "" {
				first = slot
			}
			if slot != first {
				t.Fatalf("a connection has slot %s, and %s is free", slot, first)
			}
			conn.Close()
		}
		kill(t, last(events.until(t, Ready)).Pid)
		events.until(t, Exited)
	}
}
