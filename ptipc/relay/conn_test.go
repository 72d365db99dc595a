package relay

import (
	"context"
	"errors"
	"io"
	"net"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/net/nettest"

	"pthost/ptipc"
)

func TestConnIsANetConn(t *testing.T) {
	for _, network := range []string{"tcp", "unix", "pipe"} {
		t.Run(network, func(t *testing.T) {
			nettest.TestConn(t, func() (c1, c2 net.Conn, stop func(), err error) {
				var m Meter
				a, b := connPair(t, network)
				a, b = m.Conn(a, Options{}), m.Conn(b, Options{})
				return a, b, func() { a.Close(); b.Close() }, nil
			})
		})
	}
}

func TestConnCounts(t *testing.T) {
	var m Meter
	near, far := connPair(t, "tcp")
	before := time.Now()
	c := m.Conn(near, Options{})
	if _, err := c.Write([]byte("hello")); err != nil {
		t.Fatal(err)
	}
	mustRead(t, far, "hello")
	mustWrite(t, far, "you")
	mustRead(t, c, "you")

	s := c.Stats()
	if s.Sent != 5 || s.Received != 3 {
		t.Errorf("Stats() = %+v, want 5 sent and 3 received", s)
	}
	if s.Opened.Before(before) || s.Opened.After(time.Now()) {
		t.Errorf("Opened = %v, not between %v and now", s.Opened, before)
	}
	want := ptipc.TransportStats{Active: 1, Opened: 1, Received: 3, Sent: 5}
	if got := m.Stats(); got != want {
		t.Errorf("while open: %+v, want %+v", got, want)
	}
	c.Close()
	m.Failed()
	want.Active, want.Failed = 0, 1
	if got := m.Stats(); got != want {
		t.Errorf("after Close and Failed: %+v, want %+v", got, want)
	}
}

func TestConnAsksFirst(t *testing.T) {
	var m Meter
	near, _ := connPair(t, "pipe")
	known := false
	better := ptipc.Stats{Received: 7, Sent: 8}
	c := m.Conn(near, Options{Ask: func() (ptipc.Stats, bool) { return better, known }})
	if got := c.Stats(); got.Received != 0 || got.Sent != 0 || got.Opened.IsZero() {
		t.Errorf("nobody knows better: %+v, want the own counts", got)
	}
	known = true
	if got := c.Stats(); got != better {
		t.Errorf("Stats() = %+v, want %+v", got, better)
	}
}

func TestConnCloseOnce(t *testing.T) {
	var m Meter
	near, _ := connPair(t, "tcp")
	var hooks atomic.Int32
	c := m.Conn(near, Options{OnClose: func() { hooks.Add(1) }})
	for range 3 {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	}
	if err := c.Abort(); err != nil {
		t.Error(err)
	}
	if n := hooks.Load(); n != 1 {
		t.Errorf("OnClose ran %d times, want 1", n)
	}
	if s := m.Stats(); s.Active != 0 || s.Opened != 1 {
		t.Errorf("%+v, want one that was opened and none active", s)
	}
}

func TestConnCloseWrite(t *testing.T) {
	var m Meter
	near, far := connPair(t, "unix")
	c := m.Conn(near, Options{})
	if err := c.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	mustEnd(t, far)
	mustWrite(t, far, "still open")
	mustRead(t, c, "still open")

	near, _ = connPair(t, "pipe")
	if err := m.Conn(near, Options{}).CloseWrite(); !errors.Is(err, errors.ErrUnsupported) {
		t.Errorf("CloseWrite of a pipe: %v, want ErrUnsupported", err)
	}
}

func TestConnAbortResets(t *testing.T) {
	var m Meter
	near, far := connPair(t, "tcp")
	inner := m.Conn(near, Options{})
	if err := m.Conn(inner, Options{}).Abort(); err != nil {
		t.Fatal(err)
	}
	if _, err := far.Read(make([]byte, 1)); !isReset(err) {
		t.Errorf("the peer of an aborted connection reads %v, want a reset", err)
	}
	if n := m.Stats().Active; n != 0 {
		t.Errorf("%d connections are open, want none", n)
	}
}

func TestMeterDrain(t *testing.T) {
	t.Run("nothing to do", func(t *testing.T) {
		var m Meter
		if err := m.Drain(t.Context()); err != nil {
			t.Error(err)
		}
	})
	t.Run("waits for the last", func(t *testing.T) {
		var m Meter
		var conns []*Conn
		for range 3 {
			near, _ := connPair(t, "pipe")
			conns = append(conns, m.Conn(near, Options{}))
		}
		const waiters = 2
		drained := make(chan error, waiters)
		for range waiters {
			go func() { drained <- m.Drain(t.Context()) }()
		}
		for _, c := range conns {
			if len(drained) > 0 {
				t.Error("drained while a connection is open")
			}
			c.Close()
		}
		for range waiters {
			if err := <-drained; err != nil {
				t.Error(err)
			}
		}
	})
	t.Run("cuts those that are left", func(t *testing.T) {
		var m Meter
		const conns = 9000
		ends := make([]net.Conn, conns)
		for i := range ends {
			near, far := net.Pipe()
			ends[i] = far
			m.Conn(near, Options{})
		}
		if n := m.Stats().Active; n != conns {
			t.Fatalf("Active = %d, want %d", n, conns)
		}
		late := errors.New("too late")
		ctx, cancel := context.WithCancelCause(t.Context())
		cancel(late)
		if err := m.Drain(ctx); !errors.Is(err, late) {
			t.Errorf("Drain: %v, want %v", err, late)
		}
		for _, c := range ends {
			if _, err := c.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
				t.Fatalf("read after the cut: %v", err)
			}
			c.Close()
		}
		if s := m.Stats(); s.Active != 0 || s.Opened != conns {
			t.Errorf("%+v, want %d opened and none active", s, conns)
		}
	})
}
