//go:build unix

package proc

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"pthost/ptipc"
)

// The test binary is also the child: "@child ROLE [ARGS…]".
func TestMain(m *testing.M) {
	if len(os.Args) > 2 && os.Args[1] == "@child" {
		os.Exit(play(os.Args[2], os.Args[3:]))
	}
	goleak.VerifyTestMain(m)
}

func self(role string, args ...string) []string {
	path, err := os.Executable()
	if err != nil {
		panic(err)
	}
	return append([]string{path, "@child", role}, args...)
}

func play(role string, args []string) int {
	switch role {
	case "launcher":
		return Launch(args)
	case "echo":
		_, _ = io.Copy(os.Stdout, os.Stdin)
		return 0
	case "stubborn":
		signal.Ignore(syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP)
		fmt.Println("ready", os.Getpid())
		return block()
	case "family": // two more generations, the last of them in a session of its own
		cmd := exec.Command(self("parent-of-session")[0], self("parent-of-session")[1:]...)
		cmd.Stdout = os.Stdout
		_ = cmd.Run()
		return play("stubborn", nil)
	case "parent-of-session": // the second half of a daemon's double fork
		cmd := exec.Command(self("stubborn")[0], self("stubborn")[1:]...)
		cmd.Stdout = os.Stdout
		cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
		_ = cmd.Start()
		return 0
	case "flood":
		return flood()
	case "kill-leader":
		_ = syscall.Kill(syscall.Getpgrp(), syscall.SIGKILL)
		return block()
	case "kill-parent":
		_ = syscall.Kill(os.Getppid(), syscall.SIGKILL)
		return block()
	}
	return playSystem(role, args)
}

// block never returns. It cannot be select{}: the runtime would call it a deadlock.
func block() int {
	r, w, _ := os.Pipe()
	_, _ = r.Read(make([]byte, 1))
	return runtime.NumGoroutine() + int(w.Fd())
}

const (
	floodBytes = 100 << 20
	lastWord   = "and this is the last line"
)

// flood writes lines of every length on both outputs at once, then one more.
func flood() int {
	var wg sync.WaitGroup
	for _, f := range []*os.File{os.Stdout, os.Stderr} {
		wg.Go(func() {
			w := bufio.NewWriterSize(f, 256<<10)
			line := bytes.Repeat([]byte{'x'}, 1<<20)
			for n, size := 0, 1; n < floodBytes; n, size = n+size, size*3%len(line) {
				_, _ = w.Write(line[:size])
				_ = w.WriteByte('\n')
			}
			_, _ = w.WriteString(lastWord + "\n")
			_ = w.Flush()
		})
	}
	wg.Wait()
	return play("echo", nil)
}

// modes are the ways of keeping a child's descendants together.
func modes(t *testing.T, test func(t *testing.T, launcher []string)) {
	t.Run("watchdog", func(t *testing.T) { test(t, nil) })
	if launcherWorks {
		t.Run("launcher", func(t *testing.T) { test(t, self("launcher")) })
	}
}

// child is a process under test with its lines.
type child struct {
	*Process
	t     *testing.T
	lines chan string
}

func start(t *testing.T, spec Spec, command ...string) *child {
	t.Helper()
	c := &child{t: t, lines: make(chan string, 100)}
	spec.Path, spec.Args = command[0], command[1:]
	if spec.OnLine == nil {
		spec.OnLine = func(line []byte, truncated bool) {
			c.lines <- fmt.Sprintf("%s%s", line, map[bool]string{true: " (truncated)"}[truncated])
		}
	}
	var err error
	if c.Process, err = Start(t.Context(), spec); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.killNow)
	return c
}

// killNow is a Stop without patience.
func (c *child) killNow() {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := c.Stop(ctx); err != nil {
		c.t.Error(err)
	}
}

func (c *child) expect(want string) {
	c.t.Helper()
	if got := c.line(); got != want {
		c.t.Fatalf("the child wrote %q, want %q", got, want)
	}
}

func (c *child) line() string {
	c.t.Helper()
	select {
	case line := <-c.lines:
		return line
	case <-c.Done():
	}
	select {
	case line := <-c.lines:
		return line
	default:
		c.t.Fatalf("the child ended: %v", c.Err())
		return ""
	}
}

// ready waits for the line of a stubborn process and returns its id.
func (c *child) ready() int {
	c.t.Helper()
	word, number, _ := strings.Cut(c.line(), " ")
	pid, err := strconv.Atoi(number)
	if word != "ready" || err != nil {
		c.t.Fatalf("the child wrote %q %q, want ready and a process id", word, number)
	}
	return pid
}

// exit waits for the end.
func (c *child) exit() *ExitError {
	c.t.Helper()
	<-c.Done()
	var e *ExitError
	if !errors.As(c.Err(), &e) {
		c.t.Fatalf("Err is %v, want an ExitError", c.Err())
	}
	return e
}

func (c *child) write(line string) {
	c.t.Helper()
	if err := c.WriteLine([]byte(line)); err != nil {
		c.t.Fatal(err)
	}
}

func TestLinesBothWays(t *testing.T) {
	modes(t, func(t *testing.T, launcher []string) {
		c := start(t, Spec{Launcher: launcher}, self("echo")...)
		if err := c.Err(); err != nil {
			t.Errorf("Err is %v while the process lives", err)
		}
		for _, line := range []string{"VERSION 1", "", "NUL \x00 and \xff\xfe", strings.Repeat("y", 60<<10)} {
			c.write(line)
			c.expect(line)
		}
		if err := c.WriteLine([]byte("two\nlines")); err == nil {
			t.Error("a line with an LF in it was taken")
		}
		if err := c.Stop(t.Context()); err != nil {
			t.Fatal(err)
		}
		e := c.exit()
		if e.Code != 0 || e.Signal != 0 || !e.Stopped {
			t.Errorf("a child that finishes at the end of its standard input ended with %+v", e)
		}
		if err := c.WriteLine([]byte("x")); !errors.Is(err, ErrStdinClosed) {
			t.Errorf("a write after the end gave %v, want ErrStdinClosed", err)
		}
		if pids, err := c.Pids(); len(pids) != 0 || err != nil {
			t.Errorf("after the end the processes are %v, %v", pids, err)
		}
	})
}

// What was queued before CloseStdin reaches the child.
func TestCloseStdinFlushes(t *testing.T) {
	c := start(t, Spec{OnLine: func([]byte, bool) {}}, "/bin/sh", "-c", "exit $(wc -l)")
	for range 99 {
		c.write(strings.Repeat("z", 10<<10))
	}
	c.CloseStdin()
	if e := c.exit(); e.Code != 99 {
		t.Errorf("the child read %d lines of 99", e.Code)
	}
}

func TestLongLines(t *testing.T) {
	for _, limit := range []int{0, 1000} {
		size := limit
		if size == 0 {
			size = 65536
		}
		c := start(t, Spec{MaxLine: limit}, self("echo")...)
		fits := strings.Repeat("a", size-1)
		c.write(fits)
		c.write(fits + "b")
		c.write(strings.Repeat(fits, 10))
		c.write("intact")
		c.expect(fits)
		c.expect(fits + " (truncated)")
		c.expect(fits + " (truncated)")
		c.expect("intact")
	}
}

func TestExitIsDecoded(t *testing.T) {
	modes(t, func(t *testing.T, launcher []string) {
		for _, c := range []struct {
			script string
			code   int
			signal syscall.Signal
			text   string
		}{
			{"exit 0", 0, 0, "success (exit code 0)"},
			{"exit 78", 78, 0, "configuration error (exit code 78)"},
			{"exit 200", 200, 0, "exit code 200"},
			{"kill -SEGV $$", -1, syscall.SIGSEGV, "killed by signal 11 (segmentation fault)"},
			{"kill -KILL $$", -1, syscall.SIGKILL, "killed by signal 9 (killed)"},
			{"echo 'so \033[31mbad' >&2; echo worse >&2; exit 64", 64, 0, "standard error:\n\tso \\x1b[31mbad\n\tworse"},
		} {
			e := start(t, Spec{Launcher: launcher}, "/bin/sh", "-c", c.script).exit()
			if e.Code != c.code || e.Signal != c.signal || e.Stopped {
				t.Errorf("%q: got %+v, want code %d, signal %d", c.script, e, c.code, c.signal)
			}
			if !strings.Contains(e.Error(), c.text) || !strings.Contains(e.Error(), "/bin/sh") {
				t.Errorf("%q: the error is %q, want %q in it", c.script, e, c.text)
			}
			var code ptipc.ExitCode
			if errors.As(e, &code) != (c.signal == 0) || int(code) != max(c.code, 0) {
				t.Errorf("%q: the exit code in the chain is %d", c.script, code)
			}
		}
	})
}

func TestStderrLines(t *testing.T) {
	var got []string
	c := start(t, Spec{OnStderr: func(line string) { got = append(got, line) }},
		"/bin/sh", "-c", `i=0; while [ $i -lt 30 ]; do echo "line $i" >&2; i=$((i+1)); done; printf 'no end\033' >&2; exit 1`)
	e := c.exit()
	if len(got) != 31 || got[0] != "line 0" || got[30] != `no end\x1b` {
		t.Errorf("OnStderr was given %q", got)
	}
	if len(e.Stderr) != 20 || e.Stderr[0] != "line 11" || e.Stderr[19] != `no end\x1b` {
		t.Errorf("the error has the lines %q", e.Stderr)
	}
}

func TestStopLadder(t *testing.T) {
	const forever = time.Hour
	modes(t, func(t *testing.T, launcher []string) {
		t.Run("end of stdin", func(t *testing.T) {
			c := start(t, Spec{Launcher: launcher, FinishWait: forever}, "/bin/sh", "-c", "read x; exit 7")
			if err := c.Stop(t.Context()); err != nil || c.exit().Code != 7 {
				t.Errorf("Stop gave %v, the process %v", err, c.Err())
			}
		})
		t.Run("SIGTERM", func(t *testing.T) {
			c := start(t, Spec{Launcher: launcher, FinishWait: -1, TermWait: forever},
				"/bin/sh", "-c", `trap 'exit 8' TERM; echo up; while :; do wait; "$0" "$1" "$2" & wait; done`, self("")[0], "@child", "stubborn")
			c.expect("up")
			c.ready() // the shell now waits for a child that ignores the signal
			if err := c.Stop(t.Context()); err != nil || c.exit().Code != 8 {
				t.Errorf("Stop gave %v, the process %v", err, c.Err())
			}
		})
		t.Run("SIGKILL", func(t *testing.T) {
			c := start(t, Spec{Launcher: launcher, FinishWait: -1, TermWait: -1}, self("stubborn")...)
			c.ready()
			if err := c.Stop(t.Context()); err != nil || c.exit().Signal != syscall.SIGKILL {
				t.Errorf("Stop gave %v, the process %v", err, c.Err())
			}
		})
		t.Run("end of the context, many callers", func(t *testing.T) {
			c := start(t, Spec{Launcher: launcher, FinishWait: forever}, self("stubborn")...)
			c.ready()
			var wg sync.WaitGroup
			ctx, cancel := context.WithCancel(t.Context())
			for range 5 {
				wg.Go(func() {
					if err := c.Stop(ctx); err != nil {
						t.Error(err)
					}
				})
			}
			cancel()
			wg.Wait()
			if e := c.exit(); e.Signal != syscall.SIGKILL || !e.Stopped {
				t.Errorf("the process ended with %v", e)
			}
		})
	})
}

// Nobody waits for a child that says nothing, and it can be stopped.
func TestSilentChild(t *testing.T) {
	c := start(t, Spec{FinishWait: time.Hour}, "/bin/sh", "-c", "read x")
	select {
	case <-c.Done():
		t.Fatalf("a silent child ended: %v", c.Err())
	default:
	}
	if err := c.Stop(t.Context()); err != nil {
		t.Error(err)
	}
}

// A child that floods both outputs neither blocks nor fills the memory, and the
// lines after the flood are intact (LIFE-10).
func TestFlood(t *testing.T) {
	modes(t, func(t *testing.T, launcher []string) {
		var before, after runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&before)
		last := make(chan string, 2)
		lines := 0
		c := start(t, Spec{
			Launcher: launcher,
			OnLine: func(line []byte, _ bool) {
				if lines++; string(line) == lastWord {
					last <- "stdout"
				}
			},
			OnStderr: func(line string) {
				if line == lastWord {
					last <- "stderr"
				}
			},
		}, self("flood")...)
		for range 2 {
			select {
			case <-last:
			case <-c.Done():
				t.Fatalf("the child ended before the last line: %v", c.Err())
			}
		}
		runtime.ReadMemStats(&after)
		if grown := int64(after.HeapSys) - int64(before.HeapSys); grown > floodBytes/4 {
			t.Errorf("the heap grew by %d bytes in a flood of %d", grown, 2*floodBytes)
		}
		if lines < 100 {
			t.Errorf("only %d lines of the flood came", lines)
		}
		if err := c.Stop(t.Context()); err != nil || c.exit().Code != 0 {
			t.Errorf("Stop gave %v, the process %v", err, c.Err())
		}
	})
}

// The host sees a child close its outputs, and stays with it.
func TestChildClosesOutputs(t *testing.T) {
	modes(t, func(t *testing.T, launcher []string) {
		c := start(t, Spec{Launcher: launcher}, "/bin/sh", "-c", "echo bye; exec >&- 2>&-; read x; exit 5")
		c.expect("bye")
		c.outputs.Wait() // only returns when both readers have seen the end
		c.write("go")
		if e := c.exit(); e.Code != 5 {
			t.Errorf("the process ended with %v", e)
		}
	})
}

// A child that never reads its standard input holds nobody up (ARG-7).
func TestChildNeverReads(t *testing.T) {
	modes(t, func(t *testing.T, launcher []string) {
		c := start(t, Spec{Launcher: launcher, FinishWait: -1, TermWait: -1}, self("stubborn")...)
		c.ready()
		var err error
		written := 0
		for line := make([]byte, 50<<10); err == nil; written += len(line) {
			err = c.WriteLine(line)
		}
		if !errors.Is(err, ErrStdinFull) {
			t.Errorf("after %d bytes the error is %v, want ErrStdinFull", written, err)
		}
		if written > 2*maxQueued {
			t.Errorf("%d bytes were queued for a child that does not read", written)
		}
		if err := c.Stop(t.Context()); err != nil {
			t.Error(err)
		}
	})
}

// A child that closes its standard input is noticed.
func TestChildClosesStdin(t *testing.T) {
	modes(t, func(t *testing.T, launcher []string) {
		c := start(t, Spec{Launcher: launcher}, "/bin/sh", "-c", "exec 0<&-; echo closed; kill -STOP $$")
		c.expect("closed")
		c.write("into the void")
		<-c.stdin.done
		if err := c.WriteLine([]byte("x")); !errors.Is(err, ErrStdinClosed) || !errors.Is(err, syscall.EPIPE) {
			t.Errorf("a write to a child without standard input gave %v", err)
		}
	})
}

func TestInputDeadline(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	in := newInput(w, time.Millisecond)
	go in.run()
	if err := in.put(make([]byte, 1<<20)); err != nil { // no pipe takes so much
		t.Fatal(err)
	}
	<-in.done
	if err := in.put(nil); !errors.Is(err, os.ErrDeadlineExceeded) || !errors.Is(err, ErrStdinClosed) {
		t.Errorf("after a write that timed out the error is %v", err)
	}
}

func TestStartErrors(t *testing.T) {
	dir := t.TempDir()
	file := func(name, content string, mode fs.FileMode) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(content), mode); err != nil {
			t.Fatal(err)
		}
		return path
	}
	plain := file("plain", "#!/bin/sh\n", 0o600)
	cases := []struct {
		name string
		spec Spec
		is   error
		text string
	}{
		{"no path", Spec{}, nil, "set Path"},
		{"not in PATH", Spec{Path: "no-such-program-anywhere"}, exec.ErrNotFound, "not in PATH"},
		{"no file", Spec{Path: filepath.Join(dir, "absent")}, fs.ErrNotExist, "no such file: correct the path or install it"},
		{"no directory on the way", Spec{Path: plain + "/x"}, syscall.ENOTDIR, plain},
		{"directory", Spec{Path: dir}, fs.ErrPermission, "it is a directory"},
		{"not executable", Spec{Path: plain}, fs.ErrPermission, "chmod +x"},
		{"no interpreter", Spec{Path: file("script", "#!/no/such/interp -x\nrun\n", 0o700)}, fs.ErrNotExist, `interpreter "/no/such/interp"`},
		{"CR after the interpreter", Spec{Path: file("dos", "#!/bin/sh\r\nexit\r\n", 0o700)}, fs.ErrNotExist, `interpreter "/bin/sh\r"`},
		{"interpreter not executable", Spec{Path: file("bad", "#!"+plain+"\n", 0o700)}, fs.ErrPermission, "is not executable"},
		{"not a program", Spec{Path: file("text", "hello\n", 0o700)}, syscall.ENOEXEC, "neither a program"},
		{"no working directory", Spec{Path: "/bin/sh", Dir: dir + "/absent"}, fs.ErrNotExist, "working directory " + dir + "/absent"},
		{"working directory is a file", Spec{Path: "/bin/sh", Dir: plain}, syscall.ENOTDIR, "is not a directory"},
		{"relative working directory", Spec{Path: "/bin/sh", Dir: "x"}, nil, "absolute"},
		{"too many arguments", Spec{Path: "/bin/sh", Args: []string{strings.Repeat("x", 4<<20)}}, syscall.E2BIG, "standard input"},
	}
	modes(t, func(t *testing.T, launcher []string) {
		for _, c := range cases {
			c.spec.Launcher = launcher
			p, err := Start(t.Context(), c.spec)
			if err == nil {
				_ = p.Stop(t.Context())
				t.Errorf("%s: started", c.name)
				continue
			}
			if c.is != nil && !errors.Is(err, c.is) {
				t.Errorf("%s: %v is not %v", c.name, err, c.is)
			}
			if !strings.Contains(err.Error(), c.text) || !strings.Contains(err.Error(), c.spec.Path) {
				t.Errorf("%s: the error is %q, want %q in it", c.name, err, c.text)
			}
		}
	})
}

// A relative path means the one that the caller sees, not the child's.
func TestRelativePath(t *testing.T) {
	t.Chdir(filepath.Dir(self("")[0]))
	c := start(t, Spec{Dir: "/"}, "./"+filepath.Base(self("")[0]), "@child", "stubborn")
	c.ready()
}

func TestDirEnvArgs(t *testing.T) {
	dir, err := filepath.EvalSymlinks(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	modes(t, func(t *testing.T, launcher []string) {
		c := start(t, Spec{Launcher: launcher, Dir: dir, Env: []string{"A=b c"}},
			"sh", "-c", `pwd; echo "$A"; echo "$1"; echo "$HOME"`, "sh", "a 'quoted' argument")
		c.expect(dir)
		c.expect("b c")
		c.expect("a 'quoted' argument")
		c.expect("")
	})
}

func TestStartIsCancelled(t *testing.T) {
	ctx, cancel := context.WithCancelCause(t.Context())
	reason := errors.New("a reason")
	cancel(reason)
	modes(t, func(t *testing.T, launcher []string) {
		if _, err := Start(ctx, Spec{Path: "/bin/sh", Launcher: launcher}); !errors.Is(err, reason) {
			t.Errorf("Start with a context that has ended gave %v", err)
		}
	})
}

// A child that ends leaves nothing of its group behind.
func TestLeftoversAreKilled(t *testing.T) {
	modes(t, func(t *testing.T, launcher []string) {
		c := start(t, Spec{Launcher: launcher}, "/bin/sh", "-c", `"$0" "$1" "$2" & read x; exit 3`, self("")[0], "@child", "stubborn")
		left := c.ready()
		ended := watch(t, left)
		c.write("go")
		if e := c.exit(); e.Code != 3 {
			t.Errorf("the process ended with %v", e)
		}
		ended()
	})
}

// A child that kills its watchdog goes down with it.
func TestWatchdogIsKilled(t *testing.T) {
	e := start(t, Spec{}, self("kill-leader")...).exit()
	if !errors.Is(e, errWatchdog) || e.Signal != syscall.SIGKILL {
		t.Errorf("a child without watchdog ended with %v", e)
	}
}

// SIGTERM is for the child: the watchdog, which is in the same group, stays.
func TestWatchdogIsDeaf(t *testing.T) {
	c := start(t, Spec{}, "/bin/sh", "-c", `trap 'echo heard' TERM; echo up; while :; do read x && exit 5; done`)
	c.expect("up")
	for range 50 {
		if err := c.tree.terminate(); err != nil {
			t.Fatal(err)
		}
		c.expect("heard")
	}
	c.write("go")
	if e := c.exit(); e.Code != 5 {
		t.Errorf("the process ended with %v", e)
	}
}

// BenchmarkStart compares a start and a wait for the end with those of os/exec alone.
func BenchmarkStart(b *testing.B) {
	run := func(launcher []string) func(b *testing.B) {
		return func(b *testing.B) {
			for b.Loop() {
				p, err := Start(b.Context(), Spec{Path: "/bin/true", Launcher: launcher})
				if err != nil {
					b.Fatal(err)
				}
				<-p.Done()
			}
		}
	}
	b.Run("os-exec", func(b *testing.B) {
		for b.Loop() {
			if err := exec.CommandContext(b.Context(), "/bin/true").Run(); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("watchdog", run(nil))
	b.Run("launcher", run(self("launcher")))
}
