package host

import (
	"context"
	"errors"
	"io"
	"net"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"pthost/ptipc"
)

func kill(t *testing.T, pid int) {
	t.Helper()
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
}

// LIFE-6, LIFE-7: a child that was killed comes back, and what the application
// holds goes on working; so do the totals (STAT-2).
func TestRestart(t *testing.T) {
	c := self("direct")
	events := record(c)
	transport := open(t, c, `{}`, ptipc.Env{})
	factory, echo := transport.Connections["direct"], server(t)
	talk(t, dial(t, factory, "", echo), "before")
	pid := last(events.until(t, Ready)).Pid
	for range 3 {
		kill(t, pid)
		round := events.until(t, Ready)
		if got := kinds(round); got != "exited, restarting, started, ready" {
			t.Error("events:", got)
		}
		if round[0].Pid != pid || !strings.Contains(round[0].Err.Error(), "signal 9") || round[1].Delay <= 0 || last(round).Pid == pid {
			t.Error("events:", round)
		}
		pid = last(round).Pid
		talk(t, dial(t, factory, "", echo), "after")
	}
	stats, err := transport.Stats(t.Context())
	if err != nil || stats.Opened != 4 || stats.Sent != uint64(len("before")+3*len("after")) || stats.Received != stats.Sent {
		t.Error("totals:", stats, err)
	}
}

// A dial between two children waits for the second one, as long as its caller does.
func TestDialDuringRestart(t *testing.T) {
	c := self("direct")
	events := record(c)
	events.hold, events.held = Exited, make(chan struct{})
	transport := open(t, c, `{}`, ptipc.Env{})
	factory, echo := transport.Connections["direct"], server(t)
	kill(t, last(events.until(t, Ready)).Pid)
	events.until(t, Exited) // and there it stays
	cause := errors.New("enough")
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(cause)
	if _, err := factory.Dial(ctx, nil, echo); !errors.Is(err, cause) {
		t.Error("a dial that was given up:", err)
	}
	late, cancelLate := context.WithTimeout(t.Context(), time.Millisecond)
	defer cancelLate()
	_, err := factory.Dial(late, nil, echo)
	onlyClass(t, err, ptipc.ErrTimedOut)
	wants(t, err, "being restarted")

	conns := make(chan ptipc.Conn, 1)
	go func() {
		conn, err := factory.Dial(within(t), nil, echo)
		if err != nil {
			t.Error(err)
		}
		conns <- conn
	}()
	close(events.held)
	if conn := <-conns; conn != nil {
		talk(t, conn, "late")
		conn.Close()
	}
}

// A child that hangs up during the handshake, or has stopped listening, and then ends
// is as good as gone: the dial waits for the one that comes after it.
func TestDialWhileChildLeaves(t *testing.T) {
	transport := open(t, self("steps", "leave", "streams"), `{}`, ptipc.Env{})
	factory, echo := transport.Connections["direct"], server(t)
	talk(t, dial(t, factory, "", echo), "first")
	talk(t, dial(t, factory, "", echo), "next")
}

// SOCKS-15: what a killed child was relaying breaks, and does not look complete. Here
// it had bytes of ours that it had not read, which the socket tells by itself.
func TestKillBreaksConnections(t *testing.T) {
	far, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer far.Close()
	c := self("direct")
	events := record(c)
	transport := open(t, c, `{}`, ptipc.Env{})
	conn := dial(t, transport.Connections["direct"], "", far.Addr().String())
	wire, err := far.Accept() // and never reads
	if err != nil {
		t.Fatal(err)
	}
	defer wire.Close()
	// It writes until nothing goes any more, so that something is on its way always.
	wrote := make(chan error, 1)
	full := make(chan struct{})
	go func() {
		chunk := make([]byte, 1<<20)
		for {
			_ = conn.SetWriteDeadline(time.Now().Add(200 * time.Millisecond))
			if _, err := conn.Write(chunk); err != nil {
				wrote <- err
				close(full)
				return
			}
		}
	}()
	<-full
	if err := <-wrote; !errors.Is(err, context.DeadlineExceeded) && !isTimeout(err) {
		t.Fatal(err)
	}
	kill(t, last(events.until(t, Ready)).Pid)
	events.until(t, Exited)
	_ = conn.SetReadDeadline(time.Now().Add(patience))
	if _, err := io.ReadAll(conn); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("reading ended with %v", err)
	}
}

func isTimeout(err error) bool {
	var timeout net.Error
	return errors.As(err, &timeout) && timeout.Timeout()
}

// LIFE-6: the wait doubles, with jitter, up to a bound.
func TestBackoff(t *testing.T) {
	defaults := Restart{}.withDefaults()
	if defaults != (Restart{Min: 250 * time.Millisecond, Max: 30 * time.Second, GiveUpAfter: 8}) {
		t.Error("defaults:", defaults)
	}
	for _, r := range []Restart{defaults, {Min: time.Nanosecond, Max: time.Hour}, {Min: time.Hour, Max: 24 * time.Hour}, {Min: time.Hour, Max: time.Second}, {Min: 1, Max: 1 << 62}} {
		middle := min(r.Min, r.Max)
		for failures := 1; failures < 200; failures++ {
			seen := map[time.Duration]bool{}
			for range 50 {
				wait := r.backoff(failures)
				seen[wait] = true
				if wait < middle/2 || wait-middle/2 >= middle {
					t.Fatalf("%+v after %d failures: %v, want %v and half of it either way", r, failures, wait, middle)
				}
			}
			if middle > time.Second && len(seen) < 10 {
				t.Fatalf("%+v after %d failures: no jitter", r, failures)
			}
			if middle < r.Max/2 {
				middle *= 2
			} else {
				middle = r.Max
			}
		}
	}
	if given := (Restart{Min: time.Hour}).withDefaults(); given.Max != time.Hour {
		t.Error("Max is less than Min:", given)
	}
}

// LIFE-6: a crash loop ends, with the last error.
func TestCrashLoop(t *testing.T) {
	c := self("steps", "direct", "exit 1 once", "exit 75 twice")
	c.Restart.GiveUpAfter = 4
	events := record(c)
	transport := open(t, c, `{}`, ptipc.Env{})
	kill(t, last(events.until(t, Ready)).Pid)
	loop := events.until(t, GaveUp)
	if got := kinds(loop); got != "exited, "+strings.Repeat("restarting, started, exited, ", 3)+"gave up" {
		t.Error("events:", got)
	}
	err := transport.Wait()
	if !errors.Is(err, ptipc.ExitTempFail) || !errors.Is(last(loop).Err, ptipc.ExitTempFail) {
		t.Error(err, last(loop).Err)
	}
	wants(t, err, "failed 4 times in a row", "twice")
	if _, err := transport.Connections["direct"].Dial(t.Context(), nil, "example.com:80"); !errors.Is(err, ptipc.ExitTempFail) {
		t.Error("a dial afterwards:", err)
	}
	if err := transport.Close(); !errors.Is(err, ptipc.ExitTempFail) {
		t.Error("Close afterwards:", err)
	}
}

// LIFE-6: exit codes that another start cannot mend end the transport at once.
func TestFinalExitCodes(t *testing.T) {
	for _, code := range []string{"64", "65", "77", "78"} {
		for _, when := range []string{"while it serves", "when it is started again"} {
			t.Run(code+" "+when, func(t *testing.T) {
				c := self("data", code, "no use")
				want := "exited, gave up"
				if when != "while it serves" {
					c = self("steps", "data 1", "exit "+code+" no use")
					want = "exited, restarting, started, exited, gave up"
				}
				events := record(c)
				transport := open(t, c, `{}`, ptipc.Env{})
				events.until(t, Ready)
				_, _ = transport.Connections["direct"].Dial(within(t), nil, "example.com:80") // ends it
				if got := kinds(events.until(t, GaveUp)); got != want {
					t.Error("events:", got)
				}
				wants(t, transport.Wait(), "ended for good", "exit code "+code)
			})
		}
	}
}

// LIFE-7: a child that comes back as something else is an error.
func TestRestartWithOtherFactories(t *testing.T) {
	for name, step := range map[string]string{"another name": "data-as-other", "bound": "data-bound"} {
		t.Run(name, func(t *testing.T) {
			c := self("steps", "data 1", step)
			events := record(c)
			transport := open(t, c, `{}`, ptipc.Env{})
			kill(t, last(events.until(t, Ready)).Pid)
			if got := kinds(events.until(t, GaveUp)); got != "exited, restarting, started, exited, gave up" {
				t.Error("events:", got)
			}
			wants(t, transport.Wait(), "LIFE-7", "before it was direct", map[string]string{"bound": "direct (bound)", "another name": "other"}[name])
		})
	}
}

// Restart.Never: the end of the child is the end of the transport.
func TestNeverRestart(t *testing.T) {
	c := self("direct")
	c.Restart.Never = true
	events := record(c)
	transport := open(t, c, `{}`, ptipc.Env{})
	kill(t, last(events.until(t, Ready)).Pid)
	if got := kinds(events.until(t, GaveUp)); got != "exited, gave up" {
		t.Error("events:", got)
	}
	wants(t, transport.Wait(), "transport pt ended", "signal 9")
}

// Close ends whatever is going on, from however many goroutines it is called.
func TestClose(t *testing.T) {
	closeAll := func(t *testing.T, transport *ptipc.Transport) {
		t.Helper()
		var all sync.WaitGroup
		for range 10 {
			all.Go(func() {
				if err := transport.Close(); err != nil {
					t.Error(err)
				}
			})
		}
		all.Wait()
		if err := transport.Wait(); err != nil {
			t.Error(err)
		}
		if left := children(t); len(left) > 0 {
			t.Error("processes are left:", left)
		}
		goleak.VerifyNone(t)
	}
	t.Run("while it serves", func(t *testing.T) {
		before := -1
		for range 3 { // the first one opens what is kept for good
			transport := open(t, self("direct"), `{}`, ptipc.Env{DialOut: (&net.Dialer{}).DialContext})
			closeAll(t, transport)
			now := descriptors(t, "self")
			if before >= 0 && now > before {
				t.Errorf("%d descriptors, and before %d", now, before)
			}
			before = now
		}
	})
	t.Run("with connections", func(t *testing.T) {
		far, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer far.Close()
		transport := open(t, self("direct"), `{}`, ptipc.Env{})
		conn := dial(t, transport.Connections["direct"], "", far.Addr().String())
		closeAll(t, transport)
		if _, err := conn.Write([]byte("x")); err == nil {
			t.Error("the connection goes on")
		}
		wire, err := far.Accept()
		if err != nil {
			t.Fatal(err)
		}
		wire.Close()
	})
	t.Run("during the wait for a restart", func(t *testing.T) {
		c := self("direct")
		c.Restart = Restart{Min: time.Hour}
		events := record(c)
		transport := open(t, c, `{}`, ptipc.Env{})
		kill(t, last(events.until(t, Ready)).Pid)
		events.until(t, Restarting)
		closeAll(t, transport)
		if len(events.events) > 0 {
			t.Error("events:", events.next(t))
		}
	})
	t.Run("during a start", func(t *testing.T) {
		c := self("steps", "direct", "silent")
		events := record(c)
		transport := open(t, c, `{}`, ptipc.Env{})
		kill(t, last(events.until(t, Ready)).Pid)
		events.until(t, Started)
		closeAll(t, transport)
		if got := kinds(events.until(t, Exited)); got != "exited" {
			t.Error("events:", got)
		}
	})
	t.Run("when the child has just ended", func(t *testing.T) {
		c := self("direct")
		c.Restart.Never = true // which would be an error, but for Close
		events := record(c)
		events.hold, events.held = Exited, make(chan struct{})
		s, err := newSupervisor(c, roleClient, ptipc.Opaque(`{}`), ptipc.Env{})
		if err != nil {
			t.Fatal(err)
		}
		first, err := s.run(within(t))
		if err != nil {
			t.Fatal(err)
		}
		transport := s.transport(first.methods)
		kill(t, last(events.until(t, Ready)).Pid)
		events.until(t, Exited)
		dialled := make(chan error, 1)
		go func() {
			_, err := transport.Connections["direct"].Dial(t.Context(), nil, "example.com:80")
			dialled <- err
		}()
		s.stop() // what Close does first
		close(events.held)
		closeAll(t, transport)
		if err := <-dialled; !errors.Is(err, net.ErrClosed) {
			t.Error("a dial that waited:", err)
		}
	})
}

// LIFE-4: a child that heeds nothing is killed, and one that does is asked first.
func TestStopLadder(t *testing.T) {
	c := self("direct")
	events := record(c)
	open(t, c, `{}`, ptipc.Env{}).Close()
	if e := last(events.until(t, Exited)); !errors.Is(e.Err, ptipc.ExitOK) { // LIFE-2
		t.Error("the end of standard input:", e.Err)
	}
	c = self("deaf")
	events = record(c)
	open(t, c, `{}`, ptipc.Env{}).Close()
	if e := last(events.until(t, Exited)); !strings.Contains(e.Err.Error(), "signal 15") {
		t.Error("SIGTERM:", e.Err)
	}
}
