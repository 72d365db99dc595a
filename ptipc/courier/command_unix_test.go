//go:build unix

package courier

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"pthost/ptipc"
	"pthost/ptipc/stdio"
)

// brisk limits make a test wait less for what takes its time.
var brisk = commandLimits{
	timeout: patience, parallel: 2, waiting: 8, minPause: time.Millisecond, maxPause: 10 * time.Millisecond,
}

func startTest(t *testing.T, send, receive []string, o Options, limits commandLimits) *Command {
	t.Helper()
	c, err := startCommand(send, receive, o, limits)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	})
	return c
}

func sh(script string, args ...string) []string {
	return append([]string{"sh", "-c", script, "sh"}, args...)
}

// The command gets the message on its standard input, which ends, and nowhere else;
// what it writes comes in.
func TestCommandCarries(t *testing.T) {
	for _, c := range []struct {
		name   string
		server bool
		send   []string
		want   string
	}{
		{"a client's echo", false, []string{"cat"}, `{"body":{"n":1}}`},
		{"a server's echo", true, []string{"cat"}, `{"body":{"n":1},"peer":"p1"}`},
		{"the peer of the message", true, sh(`cat >/dev/null; printf '{"body":{"reply":1}}'`), `{"body":{"reply":1},"peer":"p1"}`},
		{"a peer of its own", true, sh(`echo; echo '{"body":{},"peer":"p2"}'; cat >/dev/null`), `{"body":{},"peer":"p2"}`},
		{"arguments", false, sh(`printf '{"body":{"args":"%s"}}\r\n' "$*"`, "a", "b"), `{"body":{"args":"a b"}}`},
	} {
		t.Run(c.name, func(t *testing.T) {
			carrier := startTest(t, c.send, nil, Options{Server: c.server}, brisk)
			send(t, carrier, ptipc.Message{Peer: "p1", Body: ptipc.Opaque(`{"n":1}`)})
			got, err := stdio.AppendSignal(nil, receive(t, carrier))
			if err != nil {
				t.Fatal(err)
			}
			want, err := stdio.ParseSignal([]byte(c.want))
			if err != nil {
				t.Fatal(err)
			}
			if want, _ := stdio.AppendSignal(nil, want); string(got) != string(want) {
				t.Errorf("got %s, want %s", got, want)
			}
		})
	}
}

// The largest message goes through (SIG-4).
func TestCommandLargest(t *testing.T) {
	c := startTest(t, []string{"cat"}, nil, Options{}, brisk)
	m := ptipc.Message{Body: ptipc.Opaque(`{"a":"` + strings.Repeat("x", stdio.MaxSignal-len(`{"body":{"a":""}}`)) + `"}`)}
	send(t, c, m)
	if got := receive(t, c); string(got.Body) != string(m.Body) {
		t.Errorf("%d bytes of %d", len(got.Body), len(m.Body))
	}
	m.Body = ptipc.Opaque(strings.Replace(string(m.Body), "x", "xx", 1))
	if err := c.Send(t.Context(), m); err == nil || !strings.Contains(err.Error(), "SIG-4") {
		t.Error(err)
	}
}

// A command that fails says why, and its fault is not the next one's.
func TestCommandFails(t *testing.T) {
	logged, log := newRecords()
	c := startTest(t, sh(`cat >/dev/null; echo first >&2; echo no route >&2; exit 3`), nil, Options{Log: log}, brisk)
	for range 2 {
		send(t, c, message(1))
		line := logged.await(t, "WARN", "ended", "code=3", "stderr=no route")
		if strings.Contains(line, "first") {
			t.Error(line)
		}
	}
}

// Nothing of a message gets into the log, whatever the command makes of it.
func TestCommandLogsNoBody(t *testing.T) {
	logged, log := newRecords()
	c := startTest(t, sh(`read -r m; echo "x$m"; echo "$m$m"; exit 1`), nil, Options{Log: log}, brisk)
	send(t, c, ptipc.Message{Body: ptipc.Opaque(`{"a":"hunter2"}`)})
	logged.await(t, "not a message")
	if line := logged.await(t, "ended", "code=1", "refused=2"); strings.Contains(line, "hunter2") {
		t.Error(line)
	}
}

// A command that hangs is ended, with what it has started.
func TestCommandHangs(t *testing.T) {
	logged, log := newRecords()
	limits := brisk
	limits.timeout, limits.parallel = time.Second, 1
	c := startTest(t, sh(`sleep 1000 & wait`), nil, Options{Log: log}, limits)
	for range 2 {
		send(t, c, message(1))
		logged.await(t, "WARN", "ended", "did not end in 1s")
	}
}

// What it keeps is bounded (SIG-4).
func TestCommandFull(t *testing.T) {
	limits := brisk
	limits.parallel, limits.waiting = 1, 3
	c := startTest(t, sh(`echo '{"body":{}}'; sleep 1000 & wait`), nil, Options{}, limits)
	send(t, c, message(0))
	receive(t, c) // so it has been taken from the queue
	for range limits.waiting {
		send(t, c, message(1))
	}
	if err := c.Send(t.Context(), message(2)); !errors.Is(err, ErrFull) {
		t.Error(err)
	}
}

// A command that writes faster than the transport reads waits, and loses nothing.
func TestCommandWaitsForReader(t *testing.T) {
	const lines = 500
	limits := brisk
	limits.waiting = 2
	c := startTest(t, []string{"cat"}, sh(fmt.Sprintf(`i=0; while [ $i -lt %d ]; do echo '{"body":{"n":'$i'}}'; i=$((i+1)); done; read -r end`, lines)), Options{}, limits)
	for i := range lines {
		if got := string(receive(t, c).Body); got != fmt.Sprintf(`{"n":%d}`, i) {
			t.Fatalf("message %d is %s", i, got)
		}
	}
}

// Floods fill neither memory nor log.
func TestCommandFloods(t *testing.T) {
	for _, line := range []string{`{"body":{}}`, "garbage", strings.Repeat("x", 100_000)} {
		t.Run(line[:7], func(t *testing.T) {
			logged, log := newRecords()
			c, err := startCommand([]string{"cat"}, sh(`yes "$1"`, line), Options{Log: log}, brisk)
			if err != nil {
				t.Fatal(err)
			}
			if line[0] == '{' {
				for range 1000 {
					receive(t, c)
				}
			} else {
				logged.await(t, "WARN", "not a message")
			}
			if err := c.Close(); err != nil {
				t.Fatal(err)
			}
			if n := len(c.in.messages); n > brisk.waiting {
				t.Errorf("%d messages wait", n)
			}
			if n := logged.count("not a message"); n > 0 {
				t.Errorf("%d more lines were logged", n)
			}
		})
	}
}

// The receiving command is started again when it ends, however it ends.
func TestCommandReceives(t *testing.T) {
	logged, log := newRecords()
	c := startTest(t, []string{"cat"}, sh(`echo '{"body":{"pid":'$$'},"peer":"p1"}'; kill -9 $$`), Options{Log: log, Server: true}, brisk)
	seen := map[string]bool{}
	for range 3 {
		m := receive(t, c)
		if m.Peer != "p1" || seen[string(m.Body)] {
			t.Errorf("%q %s", m.Peer, m.Body)
		}
		seen[string(m.Body)] = true
	}
	logged.await(t, "WARN", "ended", "messages=1", "signal=killed")
}

// A command that has gone is missed, and found when it is back.
func TestCommandVanishes(t *testing.T) {
	logged, log := newRecords()
	script := filepath.Join(t.TempDir(), "carry")
	install := func() {
		t.Helper()
		if err := os.WriteFile(script+".new", []byte("#!/bin/sh\nexec cat\n"), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(script+".new", script); err != nil {
			t.Fatal(err)
		}
	}
	install()
	c := startTest(t, []string{script}, nil, Options{Log: log}, brisk)
	if err := os.Remove(script); err != nil {
		t.Fatal(err)
	}
	send(t, c, message(1))
	logged.await(t, "WARN", "cannot start", script)
	install()
	send(t, c, message(2))
	if got := string(receive(t, c).Body); got != `{"n":2}` {
		t.Error(got)
	}
}

// Close ends all processes, also those that do not want to.
func TestCommandClose(t *testing.T) {
	held := filepath.Join(t.TempDir(), "held")
	if err := makePipe(held); err != nil {
		t.Fatal(err)
	}
	before := descriptors()
	// All of them hold the pipe, so it ends when the last of them has.
	pipe, err := os.OpenFile(held, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	stubborn := sh(`exec 9>"$1"; trap '' TERM INT HUP; sleep 1000 & echo '{"body":{}}'; while :; do wait; done`, held)
	c, err := startCommand(stubborn, stubborn, Options{}, brisk)
	if err != nil {
		t.Fatal(err)
	}
	send(t, c, message(1))
	receive(t, c)
	receive(t, c)
	for range brisk.waiting {
		_ = c.Send(t.Context(), message(2)) // and with messages that wait
	}
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	if err := pipe.SetReadDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	if _, err := pipe.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		t.Errorf("processes live: %v", err)
	}
	pipe.Close()
	if after := descriptors(); after > before {
		t.Errorf("%d descriptors before, %d after", before, after)
	}
}

func TestStartCommandRefuses(t *testing.T) {
	for _, c := range []struct{ send, receive []string }{
		{nil, []string{"cat"}},
		{[]string{"no-such-command-here"}, nil},
		{[]string{"cat"}, []string{"/nowhere/command"}},
		{[]string{t.TempDir()}, nil},
	} {
		courier, err := StartCommand(c.send, c.receive, Options{})
		if err == nil {
			t.Errorf("%q, %q was taken", c.send, c.receive)
			_ = courier.Close()
		}
	}
}
