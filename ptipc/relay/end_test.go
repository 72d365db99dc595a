package relay

import (
	"context"
	"errors"
	"io"
	"net"
	"sync/atomic"
	"testing"
)

// marks are both ends of one connection: [0] is that of the Conn, [1] its peer's.
type marks [2]atomic.Bool

func (m *marks) Mark()        { m[0].Store(true) }
func (m *marks) Marked() bool { return m[1].Load() }
func (*marks) Take()          {}
func (*marks) Takes() bool    { return false }
func (*marks) Finish()        {}
func (*marks) Finished() bool { return false }

// markedJoin relays between left, and a unix socket whose ends are marked.
func markedJoin(t *testing.T, leftKind string) (*joined, *marks) {
	t.Helper()
	a, left := connPair(t, leftKind)
	raw, right := connPair(t, "unix")
	var m Meter
	ends := new(marks)
	b := m.Conn(raw, Options{End: ends})
	ctx, cancel := context.WithCancelCause(t.Context())
	j := &joined{left: left, right: right, a: a, b: b, cancel: cancel, done: make(chan struct{})}
	go func() {
		defer close(j.done)
		j.err = Join(ctx, a, b)
	}()
	t.Cleanup(func() {
		cancel(nil)
		<-j.done
	})
	return j, ends
}

// forEngines runs f with what is relayed by a loop, where there is one, and with what is copied.
func forEngines(t *testing.T, f func(t *testing.T, left string)) {
	for name, left := range map[string]string{"loop": "tcp", "copy": "plain"} {
		t.Run(name, func(t *testing.T) { f(t, left) })
	}
}

// A unix socket whose peer has gone without a mark has broken, whatever has ended
// before (SOCKS-20).
func TestJoinUnmarkedEnd(t *testing.T) {
	forEngines(t, func(t *testing.T, left string) {
		for _, ended := range []bool{false, true} {
			j, ends := markedJoin(t, left)
			mustWrite(t, j.right, "part")
			mustRead(t, j.left, "part")
			if ended {
				mustCloseWrite(t, j.left)
				mustEnd(t, j.right)
				if !ends[0].Load() {
					t.Error("the end is not marked when the peer sees it")
				}
			}
			j.right.Close()
			if _, err := io.Copy(io.Discard, j.left); !isReset(err) {
				t.Errorf("ended before: %t: the other side reads %v, want a reset", ended, err)
			}
			if err := j.wait(); !errors.Is(err, io.ErrUnexpectedEOF) {
				t.Errorf("ended before: %t: Join: %v", ended, err)
			}
			if ends[0].Load() != ended {
				t.Errorf("ended before: %t: the broken connection is marked as ended", ended)
			}
		}
	})
}

// A marked end is clean, also when the peer closes the socket with it.
func TestJoinMarkedEnd(t *testing.T) {
	forEngines(t, func(t *testing.T, left string) {
		j, ends := markedJoin(t, left)
		mustWrite(t, j.left, "question")
		mustCloseWrite(t, j.left)
		mustRead(t, j.right, "question")
		mustEnd(t, j.right)
		if !ends[0].Load() {
			t.Error("the end is not marked when the peer sees it")
		}
		mustWrite(t, j.right, "answer")
		ends[1].Store(true)
		j.right.Close()
		mustRead(t, j.left, "answer")
		mustEnd(t, j.left)
		if err := j.wait(); err != nil {
			t.Errorf("Join: %v", err)
		}
	})
}

// What breaks on the other side, or is cut, is not marked.
func TestJoinBreaksUnmarked(t *testing.T) {
	forEngines(t, func(t *testing.T, left string) {
		for name, breaks := range map[string]func(j *joined){
			"reset":  func(j *joined) { _ = j.left.(*net.TCPConn).SetLinger(0); j.left.Close() },
			"cut":    func(j *joined) { j.cancel(nil) },
			"abort":  func(j *joined) { _ = j.b.(*Conn).Abort() },
			"before": nil,
		} {
			j, ends := markedJoin(t, left)
			if breaks == nil { // the peer has ended its direction already
				ends[1].Store(true)
				mustCloseWrite(t, j.right)
				mustEnd(t, j.left)
				breaks = func(j *joined) { j.cancel(nil) }
			}
			breaks(j)
			if _, err := io.Copy(io.Discard, j.right); err != nil && !isReset(err) {
				t.Errorf("%s: %v", name, err)
			}
			if ends[0].Load() {
				t.Errorf("%s: marked as ended", name)
			}
			if err := j.wait(); err == nil {
				t.Errorf("%s: Join says that all was well", name)
			}
		}
	})
}

// A Conn that is not joined tells and marks the same.
func TestConnEnd(t *testing.T) {
	open := func() (*Conn, net.Conn, *marks) {
		raw, peer := connPair(t, "unix")
		var m Meter
		ends := new(marks)
		return m.Conn(raw, Options{End: ends}), peer, ends
	}
	c, peer, ends := open()
	peer.Close()
	if _, err := c.Read(make([]byte, 1)); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("the peer was killed: %v", err)
	}
	ends[1].Store(true)
	if _, err := c.Read(make([]byte, 1)); err != io.EOF { //nolint:errorlint // Read returns itself
		t.Errorf("the peer has ended: %v", err)
	}
	for name, end := range map[string]func(*Conn) error{"CloseWrite": (*Conn).CloseWrite, "Close": (*Conn).Close} {
		c, peer, ends := open()
		if err := end(c); err != nil {
			t.Fatal(err)
		}
		mustEnd(t, peer)
		if !ends[0].Load() {
			t.Errorf("%s has not marked the end", name)
		}
	}
	c, peer, ends = open()
	if err := c.Abort(); err != nil {
		t.Fatal(err)
	}
	mustEnd(t, peer)
	_ = c.Close() // does nothing any more
	if ends[0].Load() {
		t.Error("Abort has marked the end")
	}
}

// Whoever kills a relay resets what it relays: the kernel would end the streams of TCP
// cleanly (SOCKS-15).
func TestJoinIsKilled(t *testing.T) {
	for _, role := range []string{"join", "copy"} {
		t.Run(role, func(t *testing.T) {
			l, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			relay := startRole(t, role, "tcp", "tcp", l.Addr().String())
			near, err := net.Dial("tcp", relay.addr)
			if err != nil {
				t.Fatal(err)
			}
			defer near.Close()
			far, err := l.Accept()
			if err != nil {
				t.Fatal(err)
			}
			defer far.Close()
			mustWrite(t, near, "part")
			mustRead(t, far, "part")
			if err := relay.cmd.Process.Kill(); err != nil {
				t.Fatal(err)
			}
			for name, c := range map[string]net.Conn{"near": near, "far": far} {
				if _, err := io.Copy(io.Discard, c); !isReset(err) {
					t.Errorf("the %s end reads %v, want a reset", name, err)
				}
			}
		})
	}
}
