package soak

import (
	"bytes"
	"context"
	"encoding/json"
	"net"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"

	"pthost/ptipc/localnet"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// tamper stands where a transport would, and does something to each connection once it
// is told to.
func soaked(t *testing.T, patience time.Duration, spoil func(client, far *net.TCPConn)) (*Report, error) {
	t.Helper()
	far, err := localnet.ListenTCP("127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var bad atomic.Bool
	return Run(t.Context(), Config{
		Duration: time.Second, Streams: 4, Every: 100 * time.Millisecond, Patience: patience, Listener: far,
		Dial: func(ctx context.Context) (Conn, error) {
			var d net.Dialer
			conn, err := d.DialContext(ctx, "tcp", far.Addr().String())
			if err != nil || !bad.Load() {
				return asConn(conn), err
			}
			client, server := pair(t)
			go spoil(server, conn.(*net.TCPConn))
			return client, nil
		},
		Faults: []Fault{{Name: "spoilt", Do: func(ctx context.Context) error {
			bad.Store(true)
			Pause(ctx, 200*time.Millisecond)
			bad.Store(false)
			return nil
		}}},
		Sample:   func() Usage { return Usage{Processes: 1} },
		Progress: func(string) {},
	})
}

func asConn(c net.Conn) Conn {
	if c == nil {
		return nil
	}
	return c.(*net.TCPConn)
}

func pair(t *testing.T) (client, server *net.TCPConn) {
	t.Helper()
	l, err := localnet.ListenTCP("127.0.0.1:0")
	if err != nil {
		t.Error(err)
		return nil, nil
	}
	defer l.Close()
	c, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Error(err)
		return nil, nil
	}
	s, err := l.Accept()
	if err != nil {
		t.Error(err)
		return nil, nil
	}
	return c.(*net.TCPConn), s.(*net.TCPConn)
}

// The counts tell one end from another.
func TestRun(t *testing.T) {
	for _, test := range []struct {
		name     string
		patience time.Duration
		spoil    func(client, far *net.TCPConn)
		check    func(r *Report) bool
	}{
		{"clean ends that come too early", 10 * time.Second, func(client, far *net.TCPConn) {
			buf := make([]byte, 4<<10)
			_, _ = client.Read(buf) // the header, and what is behind it: unread bytes would make a reset
			_ = client.CloseWrite()
			for {
				if _, err := client.Read(buf); err != nil {
					break
				}
			}
			client.Close()
			far.Close()
		}, func(r *Report) bool { return r.Lost > 0 && r.Stalled == 0 && !r.OK() && len(r.Lines) > 0 }},
		{"resets", 10 * time.Second, func(client, far *net.TCPConn) {
			_ = client.SetLinger(0)
			_ = far.SetLinger(0)
			client.Close()
			far.Close()
		}, func(r *Report) bool { return r.Failed > 0 && r.Lost == 0 && r.Stalled == 0 && r.OK() }},
		{"silence", time.Second, func(client, far *net.TCPConn) {
			_, _ = far.Read(make([]byte, 1)) // until the far end has had enough of it
			client.Close()
			far.Close()
		}, func(r *Report) bool { return r.Stalled > 0 && !r.OK() }},
	} {
		t.Run(test.name, func(t *testing.T) {
			r, err := soaked(t, test.patience, test.spoil)
			if err != nil {
				t.Fatal(err)
			}
			if !test.check(r) || r.Faults["spoilt"] == 0 || r.Finished == 0 || r.Tried != r.Finished+r.Failed+r.Lost+r.Stalled && test.name != "clean ends that come too early" {
				t.Errorf("%+v", r)
			}
			var text bytes.Buffer
			if err := r.WriteText(&text); err != nil || !strings.Contains(text.String(), "lost silently") {
				t.Errorf("%v\n%s", err, &text)
			}
			if _, err := json.Marshal(r); err != nil {
				t.Error(err)
			}
		})
	}
}

// Ctrl-C ends the run with a report of what was until then.
func TestEndedEarly(t *testing.T) {
	far, err := localnet.ListenTCP("127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	r, err := Run(ctx, Config{
		Duration: time.Hour, Streams: 2, Every: time.Millisecond, Patience: 10 * time.Second, Listener: far,
		Dial: func(ctx context.Context) (Conn, error) {
			var d net.Dialer
			conn, err := d.DialContext(ctx, "tcp", far.Addr().String())
			return asConn(conn), err
		},
		Faults: []Fault{{Name: "Ctrl-C", Do: func(context.Context) error {
			cancel()
			return nil
		}}},
		Sample:   func() Usage { return Usage{} },
		Progress: func(string) {},
	})
	if err != nil || r.Finished < warmUp || r.Faults["Ctrl-C"] != 1 {
		t.Errorf("%+v, %v", r, err)
	}
}

// A load that cannot even begin is no report.
func TestNothingWorks(t *testing.T) {
	far, err := localnet.ListenTCP("127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	_, err = Run(t.Context(), Config{
		Duration: time.Second, Streams: 1, Every: time.Second, Patience: time.Second, Listener: far,
		Dial:   func(context.Context) (Conn, error) { return nil, context.Canceled },
		Sample: func() Usage { return Usage{} }, Progress: func(string) {},
	})
	if err == nil || !strings.Contains(err.Error(), "100 of 100") {
		t.Errorf("%v", err)
	}
}

// A wire carries until it is cut, and carries new connections after that.
func TestWire(t *testing.T) {
	server, err := localnet.ListenTCP("127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer server.Close()
	w, err := NewWire(server.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		c, err := net.Dial("tcp", w.Addr())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		s, err := server.Accept()
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		b := make([]byte, 1)
		if _, err := c.Write([]byte("x")); err != nil {
			t.Fatal(err)
		}
		if _, err := s.Read(b); err != nil || b[0] != 'x' {
			t.Fatalf("%q, %v", b, err)
		}
		if err := w.Cut(t.Context()); err != nil {
			t.Fatal(err)
		}
		for _, end := range []net.Conn{c, s} {
			if _, err := end.Read(b); err == nil || strings.Contains(err.Error(), "EOF") {
				t.Errorf("a wire that was cut reads %v, want a reset", err)
			}
		}
	}
	if err := w.Close(); err != nil {
		t.Error(err)
	}
}
