package child_test

import (
	"bufio"
	"context"
	"errors"
	"io"
	"net"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"pthost/ptipc"
	"pthost/ptipc/child"
	"pthost/ptipc/relay"
	"pthost/socks"
)

// The test binary is also a child: "@child [ROLE] CONFIG [HOST]".
func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == "@child" {
		child.MainArgs(os.Args[2:], child.Transport{Client: openTest})
	}
	goleak.VerifyTestMain(m)
}

// patience bounds every wait of these tests: none of them measures time.
const patience = time.Minute

// openTest is a transport with a factory of each kind, both to the network.
func openTest(_ context.Context, config ptipc.Opaque, env ptipc.Env) (*ptipc.Transport, error) {
	var c struct {
		Server string `json:"server,omitempty"`
	}
	if err := config.Decode(&c); err != nil {
		return nil, err
	}
	var meter relay.Meter
	return meter.Transport(map[string]ptipc.ConnectionFactory{
		"free": meter.Factory(false, func(ctx context.Context, _ ptipc.Opaque, dest string) (net.Conn, error) {
			return env.Dial(ctx, "tcp", dest)
		}),
		"bound": meter.Factory(true, func(ctx context.Context, settings ptipc.Opaque, _ string) (net.Conn, error) {
			if err := settings.Decode(&struct{}{}); err != nil {
				return nil, err
			}
			return env.Dial(ctx, "tcp", c.Server)
		}),
	}, nil), nil
}

// a running is a child in this process, and the host's ends of its streams.
type running struct {
	t      *testing.T
	stdin  *io.PipeWriter
	lines  chan string      // closed at their end
	stderr *strings.Builder // once it has ended
	term   context.CancelFunc
	ended  chan struct{}
	code   int // once it has ended
}

// run starts a child. Whatever the test does not end, ends with it.
func run(t *testing.T, transport child.Transport, dir string, args ...string) *running {
	stdin, in := io.Pipe()
	out, stdout := io.Pipe()
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	r := &running{
		t: t, stdin: in, lines: make(chan string, 10000), stderr: new(strings.Builder),
		term: cancel, ended: make(chan struct{}),
	}
	go func() { // LIFE-10: whether the test wants them or not
		defer close(r.lines)
		lines := bufio.NewScanner(out)
		lines.Buffer(nil, 1<<20)
		for lines.Scan() {
			r.lines <- lines.Text()
		}
	}()
	go func() {
		defer close(r.ended)
		r.code = child.Run(ctx, args, dir, stdin, stdout, r.stderr, transport)
		stdout.Close()
	}()
	t.Cleanup(func() {
		in.Close()
		cancel()
		<-r.ended
	})
	return r
}

// say writes lines to the child's standard input.
func (r *running) say(lines string) {
	r.t.Helper()
	if _, err := io.WriteString(r.stdin, lines); err != nil {
		r.t.Fatal(err)
	}
}

// line is the child's next control line.
func (r *running) line() string {
	r.t.Helper()
	line, ok := <-r.lines
	if !ok {
		<-r.ended
		r.t.Fatalf("the child wrote no more lines; exit code %d, %s", r.code, r.stderr)
	}
	return line
}

// until returns the lines up to one that begins with a word, this one included.
func (r *running) until(word string) []string {
	r.t.Helper()
	for lines := []string{}; ; {
		line := r.line()
		lines = append(lines, line)
		if strings.HasPrefix(line, word) {
			return lines
		}
	}
}

// ready returns the announced addresses by name.
func (r *running) ready() map[string]string {
	r.t.Helper()
	addrs := map[string]string{}
	for _, line := range r.until("CMETHODS DONE") {
		if words := strings.Fields(line); words[0] == "CMETHOD" {
			addrs[words[1]] = words[3]
		}
	}
	return addrs
}

// exit waits for the end and returns what was still written, and the code.
func (r *running) exit() (lines []string, code int) {
	for line := range r.lines {
		lines = append(lines, line)
	}
	<-r.ended
	return lines, r.code
}

func (r *running) exits(want ptipc.ExitCode) {
	r.t.Helper()
	if lines, code := r.exit(); code != int(want) {
		r.t.Errorf("exit code %d, want %d; %q, %s", code, want, lines, r.stderr)
	}
}

// connect opens a connection as a host does.
func connect(t *testing.T, network, addr, settings, dest string) (net.Conn, error) {
	t.Helper()
	conn, err := net.Dial(network, addr)
	if err != nil {
		return nil, err
	}
	t.Cleanup(func() { conn.Close() })
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	return conn, socks.Connect(ctx, conn, ptipc.Opaque(settings), dest)
}

func talk(t *testing.T, conn net.Conn, word string) {
	t.Helper()
	if err := conn.SetDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(conn, word); err != nil {
		t.Fatal(err)
	}
	answer := make([]byte, len(word))
	if _, err := io.ReadFull(conn, answer); err != nil || string(answer) != word {
		t.Fatalf("the echo of %q is %q, %v", word, answer, err)
	}
}

// server echoes on a loopback port.
func server(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var open sync.WaitGroup
	t.Cleanup(open.Wait)
	t.Cleanup(func() { l.Close() })
	open.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			open.Go(func() {
				defer conn.Close()
				if _, err := io.Copy(conn, conn); err != nil && !errors.Is(err, net.ErrClosed) {
					t.Log("echo:", err)
				}
			})
		}
	})
	return l.Addr().String()
}
