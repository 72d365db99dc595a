package host

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"pthost/ptipc"
)

// patience bounds every wait of these tests: none of them measures time.
const patience = time.Minute

func within(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	t.Cleanup(cancel)
	return ctx
}

// self is a command that plays a role. It stops quickly.
func self(role string, args ...string) *Command {
	return &Command{
		Path: os.Args[0], Name: "pt", Args: append([]string{"@child", role}, args...),
		StopTimeout: 100 * time.Millisecond,
		Restart:     Restart{Min: time.Millisecond, Max: 10 * time.Millisecond},
	}
}

// open opens a command, and closes it when the test ends.
func open(t *testing.T, c *Command, config string, env ptipc.Env) *ptipc.Transport {
	t.Helper()
	transport, err := c.Open(within(t), ptipc.Opaque(config), env)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { transport.Close() })
	return transport
}

// refused opens a command that is to fail, and makes sure that nothing of it is left.
func refused(t *testing.T, c *Command, config string, env ptipc.Env) error {
	t.Helper()
	before, running := children(t), goleak.IgnoreCurrent()
	transport, err := c.Open(within(t), ptipc.Opaque(config), env)
	if err == nil {
		transport.Close()
		t.Fatal("it opened")
	}
	if after := children(t); len(after) > len(before) {
		t.Errorf("processes are left: %v", after)
	}
	goleak.VerifyNone(t, running)
	return err
}

// recorder holds the events of a command.
type recorder struct {
	events chan Event
	held   chan struct{} // closed when the supervision may go on
	hold   EventKind     // where it waits
}

func record(c *Command) *recorder {
	r := &recorder{events: make(chan Event, 1000)}
	c.Events = func(e Event) {
		r.events <- e
		if e.Kind == r.hold {
			<-r.held
		}
	}
	return r
}

func (r *recorder) next(t *testing.T) Event {
	t.Helper()
	select {
	case e := <-r.events:
		return e
	case <-time.After(patience):
		t.Fatal("no event came")
	}
	return Event{}
}

// until returns the events up to the first of a kind.
func (r *recorder) until(t *testing.T, kind EventKind) []Event {
	t.Helper()
	var events []Event
	for {
		e := r.next(t)
		events = append(events, e)
		if e.Kind == kind {
			return events
		}
		if e.Kind == GaveUp {
			t.Fatalf("it gave up before it was %s: %v", kind, e.Err)
		}
	}
}

func kinds(events []Event) string {
	var names []string
	for _, e := range events {
		names = append(names, string(e.Kind))
	}
	return strings.Join(names, ", ")
}

func last(events []Event) Event { return events[len(events)-1] }

// server echoes on a loopback port.
func server(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go echo(l)
	return l.Addr().String()
}

// unused is a loopback port where nobody listens.
func unused(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

func dial(t *testing.T, f ptipc.ConnectionFactory, settings, dest string) ptipc.Conn {
	t.Helper()
	conn, err := f.Dial(within(t), ptipc.Opaque(settings), dest)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

// talk sends a word through an echo and waits for it.
func talk(t *testing.T, conn net.Conn, word string) {
	t.Helper()
	if err := exchange(conn, word); err != nil {
		t.Fatal(err)
	}
}

func exchange(conn net.Conn, word string) error {
	if err := conn.SetDeadline(time.Now().Add(patience)); err != nil {
		return err
	}
	if _, err := io.WriteString(conn, word); err != nil {
		return err
	}
	answer := make([]byte, len(word))
	if _, err := io.ReadFull(conn, answer); err != nil {
		return err
	}
	if string(answer) != word {
		return fmt.Errorf("the echo of %q is %q", word, answer)
	}
	return nil
}

// eventually waits for something that no event tells of.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for end := time.Now().Add(patience); !ok(); <-tick.C {
		if time.Now().After(end) {
			t.Fatal("it did not come about:", what)
		}
	}
}

// stateDir is a directory that a child may have.
func stateDir(t *testing.T) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "state")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	return dir
}

// children are the processes that this one has started and not reaped, threads of
// the Go runtime taken together.
func children(t *testing.T) []string {
	t.Helper()
	files, err := filepath.Glob("/proc/self/task/*/children")
	if err != nil || len(files) == 0 {
		t.Fatal("the children of this process cannot be listed: ", err)
	}
	var pids []string
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			continue // that thread has ended
		}
		pids = append(pids, strings.Fields(string(text))...)
	}
	return pids
}

func descriptors(t *testing.T, pid string) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/" + pid + "/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}

// a capture collects what is logged, at every level.
type capture struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (c *capture) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.text.Write(p)
}

func (c *capture) String() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.text.String()
}

func (c *capture) logger() *slog.Logger {
	return slog.New(slog.NewTextHandler(c, &slog.HandlerOptions{Level: slog.LevelDebug}))
}

// wants fails the test for each text that an error does not hold.
func wants(t *testing.T, err error, texts ...string) {
	t.Helper()
	for _, text := range texts {
		if !strings.Contains(fmt.Sprint(err), text) {
			t.Errorf("the error %q does not say %q", err, text)
		}
	}
}

// onlyClass fails the test unless err is of one class and no other (ERR-2).
func onlyClass(t *testing.T, err error, want ptipc.Class) {
	t.Helper()
	for c := range 0x100 {
		class := ptipc.Class(c)
		if class.Known() && errors.Is(err, class) != (class == want) {
			t.Errorf("the error %q: is it %v? %v; want %v", err, class, errors.Is(err, class), want)
		}
	}
}
