package courier

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"pthost/ptipc"
	"pthost/ptipc/internal/tally"
	"pthost/ptipc/stdio"
)

// SIG-2: the way back to a client belongs to the server's side alone.
func TestQueuePeers(t *testing.T) {
	for _, c := range []struct {
		server bool
		want   string
	}{{true, "p1"}, {false, ""}} {
		q := NewQueue(Options{Server: c.server})
		m := message(1)
		m.Peer = "p1"
		send(t, q, m)
		if err := q.Add(m); err != nil {
			t.Fatal(err)
		}
		if got := receive(t, q).Peer; got != c.want {
			t.Errorf("server %t: received from %q, want %q", c.server, got, c.want)
		}
		if got := q.Pending()[0].Message.Peer; got != c.want {
			t.Errorf("server %t: sent to %q, want %q", c.server, got, c.want)
		}
		if err := q.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

// SIG-4: what is kept is bounded in both directions, and in size.
func TestQueueBounds(t *testing.T) {
	logged, log := newRecords()
	q := NewQueue(Options{Log: log})
	for i := range maxQueue + 5 {
		send(t, q, message(i))
	}
	pending := q.Pending()
	if len(pending) != maxQueue || pending[0].ID != 6 || string(pending[maxQueue-1].Message.Body) != fmt.Sprintf(`{"n":%d}`, maxQueue+4) {
		t.Errorf("%d messages from %d", len(pending), pending[0].ID)
	}
	if n := logged.count("dropped"); n != 1 {
		t.Errorf("%d lines about losses were logged, want that about the first", n)
	}
	for i := range maxQueue {
		if err := q.Add(message(i)); err != nil {
			t.Fatal(err)
		}
	}
	if err := q.Add(message(0)); !errors.Is(err, ErrFull) {
		t.Error(err)
	}
	for i := range maxQueue {
		if got := string(receive(t, q).Body); got != fmt.Sprintf(`{"n":%d}`, i) {
			t.Fatalf("message %d is %s", i, got)
		}
	}
	large := ptipc.Message{Body: ptipc.Opaque(`{"a":"` + strings.Repeat("x", stdio.MaxSignal) + `"}`)}
	if err := q.Send(t.Context(), large); err == nil || !strings.Contains(err.Error(), "SIG-4") {
		t.Error(err)
	}
	if err := q.Add(large); err == nil || !strings.Contains(err.Error(), "SIG-4") {
		t.Error(err)
	}
	if err := q.Add(ptipc.Message{Body: ptipc.Opaque(`[]`)}); err == nil {
		t.Error("a body that is a list was taken")
	}
}

// A flood is in the log as one line for each interval, which says how much was lost.
func TestQueueLogsFloods(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		logged, log := newRecords()
		q := NewQueue(Options{Log: log})
		for i := range maxQueue + 1000 {
			send(t, q, message(i))
		}
		logged.await(t, "WARN", "dropped", "count=1", "last=1")
		if n := logged.count(""); n != 0 {
			t.Errorf("%d more lines at once", n)
		}
		time.Sleep(tally.Interval)
		synctest.Wait()
		logged.await(t, "WARN", "dropped", "count=999", "last=1000")
		send(t, q, message(0))
		if err := q.Close(); err != nil {
			t.Fatal(err)
		}
		logged.await(t, "WARN", "dropped", "count=1", "last=1001")
	})
}

// The end of a courier or of a context ends what waits, and what comes later.
func TestEnds(t *testing.T) {
	for name, open := range map[string]func(t *testing.T) courier{
		"queue": func(*testing.T) courier { return NewQueue(Options{}) },
		"directory": func(t *testing.T) courier {
			d, err := OpenDir(t.TempDir(), Options{})
			if err != nil {
				t.Fatal(err)
			}
			return d
		},
		"command": func(t *testing.T) courier {
			c, err := StartCommand([]string{"cat"}, nil, Options{})
			if err != nil {
				t.Skip("install cat:", err)
			}
			return c
		},
	} {
		t.Run(name, func(t *testing.T) {
			c := open(t)
			ended, cancel := context.WithCancel(t.Context())
			cancel()
			if _, err := c.Receive(ended); !errors.Is(err, context.Canceled) {
				t.Error("receive:", err)
			}
			if err := c.Send(ended, message(1)); !errors.Is(err, context.Canceled) {
				t.Error("send:", err)
			}
			waiting := make(chan error)
			go func() {
				_, err := c.Receive(context.Background())
				waiting <- err
			}()
			var closers sync.WaitGroup
			for range 3 {
				closers.Go(func() {
					if err := c.Close(); err != nil {
						t.Error(err)
					}
				})
			}
			closers.Wait()
			if err := <-waiting; !errors.Is(err, net.ErrClosed) {
				t.Error("a waiting receive:", err)
			}
			if _, err := c.Receive(t.Context()); !errors.Is(err, net.ErrClosed) {
				t.Error("receive:", err)
			}
			if err := c.Send(t.Context(), message(1)); !errors.Is(err, net.ErrClosed) {
				t.Error("send:", err)
			}
			if q, ok := c.(*Queue); ok {
				if err := q.Add(message(1)); !errors.Is(err, net.ErrClosed) {
					t.Error("add:", err)
				}
			}
		})
	}
}

type courier interface {
	ptipc.Signals
	Close() error
}

// What keeping a signal costs beside reading it: both happen to each of a flood.
func BenchmarkQueueSend(b *testing.B) {
	m := ptipc.Message{Body: ptipc.Opaque(`{"sdp":"` + strings.Repeat("x", 16<<10) + `"}`)}
	text, err := stdio.AppendSignal(nil, m)
	if err != nil {
		b.Fatal(err)
	}
	b.Run("Send", func(b *testing.B) {
		q := NewQueue(Options{})
		defer q.Close()
		b.SetBytes(int64(len(text)))
		for b.Loop() {
			if err := q.Send(b.Context(), m); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("ParseSignal", func(b *testing.B) {
		b.SetBytes(int64(len(text)))
		for b.Loop() {
			if _, err := stdio.ParseSignal(text); err != nil {
				b.Fatal(err)
			}
		}
	})
}
