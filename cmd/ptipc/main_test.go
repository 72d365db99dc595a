package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
)

// asTool makes the test binary the tool, for itself and for the children that it
// starts by executing itself again.
const asTool = "PTIPC_TEST_AS_TOOL"

func TestMain(m *testing.M) {
	if os.Getenv(asTool) != "" {
		main()
		return
	}
	testscript.Main(withRuntimeDir{m}, map[string]func(){"ptipc": main, echoCommand: echoMain})
}

// withRuntimeDir keeps tests off the control socket of a host of the developer's.
type withRuntimeDir struct{ *testing.M }

func (m withRuntimeDir) Run() int {
	dir, err := os.MkdirTemp("", "ptipc-test-")
	if err != nil {
		panic(err)
	}
	defer os.RemoveAll(dir)
	if err := os.Setenv("XDG_RUNTIME_DIR", dir); err != nil {
		panic(err)
	}
	return m.M.Run()
}

// The tool as people use it, in testdata/script. "exits N COMMAND…" demands an exit
// code; $ECHO is a server that answers with what it was sent, once it has ended.
func TestScripts(t *testing.T) {
	echo := serve(t, func(conn *net.TCPConn) {
		all, _ := io.ReadAll(conn)
		_, _ = fmt.Fprintf(conn, "you said %q", all)
	})
	testscript.Run(t, testscript.Params{
		Dir: "testdata/script",
		Setup: func(env *testscript.Env) error {
			env.Setenv("ECHO", echo)
			env.Setenv("XDG_RUNTIME_DIR", env.WorkDir)
			return nil
		},
		Cmds: map[string]func(ts *testscript.TestScript, neg bool, args []string){
			"exits": func(ts *testscript.TestScript, neg bool, args []string) {
				if neg || len(args) < 2 {
					ts.Fatalf("usage: exits CODE COMMAND [ARG…]")
				}
				err := ts.Exec(args[1], args[2:]...)
				code := 0
				if exit, ok := err.(*exec.ExitError); ok { //nolint:errorlint // testscript hands it over as it is
					code = exit.ExitCode()
				} else if err != nil {
					ts.Fatalf("%v", err)
				}
				if strconv.Itoa(code) != args[0] {
					ts.Fatalf("exit code %d, want %s", code, args[0])
				}
			},
		},
	})
}

// serve runs a TCP server on the loopback until the test ends.
func serve(t testing.TB, handle func(conn *net.TCPConn)) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var open sync.WaitGroup
	open.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			open.Go(func() {
				defer conn.Close()
				handle(conn.(*net.TCPConn))
			})
		}
	})
	t.Cleanup(func() {
		_ = l.Close()
		open.Wait()
	})
	return l.Addr().String()
}

// tool is a running ptipc run.
type tool struct {
	cmd   *exec.Cmd
	front string // the address of its first front
	out   *lockedBuffer
	up    chan struct{} // closed when everything has started
	ended chan error
}

type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

func toolCommand(ctx context.Context, t testing.TB, args ...string) *exec.Cmd {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(ctx, self, args...)
	// What the race detector is built into would sleep for a second before it exits.
	cmd.Env = append(os.Environ(), asTool+"=1", "GORACE=atexit_sleep_ms=0 "+os.Getenv("GORACE"))
	return cmd
}

// startTool runs ptipc run until it says that it is up.
func startTool(t testing.TB, args ...string) *tool {
	t.Helper()
	return startToolBy(t, nil, args...)
}

// startToolBy runs it by a command that executes another.
func startToolBy(t testing.TB, by []string, args ...string) *tool {
	t.Helper()
	r := beginTool(t, by, args...)
	r.awaitUp(t)
	return r
}

// beginTool runs it and does not wait.
func beginTool(t testing.TB, by []string, args ...string) *tool {
	t.Helper()
	cmd := toolCommand(context.Background(), t, append([]string{"run"}, args...)...)
	if len(by) > 0 {
		cmd.Path, cmd.Args = by[0], append(by, cmd.Args...)
	}
	r := &tool{cmd: cmd, out: new(lockedBuffer), up: make(chan struct{}), ended: make(chan error, 1)}
	stdout, err := r.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	r.cmd.Stderr = r.out
	if err := r.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		address := regexp.MustCompile(`^front .* on (\S+), through`)
		for lines := bufio.NewScanner(stdout); lines.Scan(); {
			line := lines.Text()
			fmt.Fprintln(r.out, line)
			if m := address.FindStringSubmatch(line); m != nil && r.front == "" {
				r.front = m[1]
			}
			if strings.HasPrefix(line, "press Ctrl-C") {
				close(r.up)
			}
		}
		r.ended <- r.cmd.Wait()
	}()
	t.Cleanup(func() { r.stop(t) })
	return r
}

// awaitUp waits until it says that everything has started.
func (r *tool) awaitUp(t testing.TB) {
	t.Helper()
	select {
	case <-r.up:
	case err := <-r.ended:
		r.ended <- err
		t.Fatalf("ptipc run has ended: %v\n%s", err, r.out)
	case <-time.After(30 * time.Second):
		t.Fatalf("ptipc run is not up after 30 s\n%s", r.out)
	}
}

// stop ends the tool as Ctrl-C does and reports how it ended.
func (r *tool) stop(t testing.TB) error {
	t.Helper()
	_ = r.cmd.Process.Signal(os.Interrupt) // it may have ended already
	select {
	case err := <-r.ended:
		r.ended <- err
		return err
	case <-time.After(30 * time.Second):
		_ = r.cmd.Process.Kill()
		t.Fatalf("ptipc run does not end\n%s", r.out)
		return nil
	}
}

func writeConfig(t testing.TB, document any) string {
	t.Helper()
	text, err := json.Marshal(document)
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "host.json")
	if err := os.WriteFile(path, text, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// descendants lists the living processes that carry mark in their environment.
func descendants(t *testing.T, mark string) []string {
	t.Helper()
	environs, err := filepath.Glob("/proc/[0-9]*/environ")
	if err != nil {
		t.Fatal(err)
	}
	var found []string
	for _, path := range environs {
		environ, err := os.ReadFile(path)
		if err != nil || !bytes.Contains(environ, []byte(mark)) {
			continue // gone meanwhile, or another user's
		}
		found = append(found, filepath.Dir(path))
	}
	return found
}

// Ctrl-C, and a kill that the tool never hears of, leave no process behind (LIFE-5).
func TestNothingIsLeftBehind(t *testing.T) {
	for _, signal := range []syscall.Signal{syscall.SIGINT, syscall.SIGTERM, syscall.SIGKILL} {
		t.Run(signal.String(), func(t *testing.T) {
			mark := fmt.Sprintf("PTIPC_TEST_MARK=%d-%d", os.Getpid(), time.Now().UnixNano())
			name, value, _ := strings.Cut(mark, "=")
			t.Setenv(name, value)
			// Every process of the family holds the write end; its end says that all are gone.
			family, held, err := os.Pipe()
			if err != nil {
				t.Fatal(err)
			}
			defer family.Close()
			r := toolCommand(t.Context(), t, "run", "--listen", "127.0.0.1:0")
			r.ExtraFiles = []*os.File{held}
			out, err := r.StdoutPipe()
			if err != nil {
				t.Fatal(err)
			}
			if err := r.Start(); err != nil {
				t.Fatal(err)
			}
			_ = held.Close()
			lines := bufio.NewReader(out)
			for {
				line, err := lines.ReadString('\n')
				if err != nil {
					t.Fatal(err)
				}
				if strings.HasPrefix(line, "press") {
					break
				}
			}
			if n := len(descendants(t, mark)); n < 3 {
				t.Fatalf("%d processes run; the tool, its launcher and a child were expected", n)
			}
			if err := r.Process.Signal(signal); err != nil {
				t.Fatal(err)
			}
			_, _ = io.Copy(io.Discard, lines)
			err = r.Wait()
			if signal != syscall.SIGKILL && err != nil {
				t.Errorf("the tool ended with %v", err)
			}
			for deadline := time.Now().Add(20 * time.Second); len(descendants(t, mark)) > 0; {
				if time.Now().After(deadline) {
					t.Fatalf("left behind: %v", descendants(t, mark))
				}
			}
		})
	}
}
