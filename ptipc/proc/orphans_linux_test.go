package proc

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// heldFD is inherited by every descendant of a host under test: when the other end
// of the pipe reads its end, all of them are gone.
const heldFD = 100

func playSystem(role string, args []string) int {
	switch role {
	case "host":
		return playHost(args[0], args[1])
	case "descriptors":
		fmt.Println(strings.Join(append(inheritable(), "end"), "\n"))
		return 0
	}
	fmt.Fprintln(os.Stderr, "no such role:", role)
	return 64
}

// playHost starts a child, says so when everything it has started is up, and waits
// to be killed; or it kills itself while it is starting the child.
func playHost(mode, family string) int {
	if err := unix.Dup3(3, heldFD, 0); err != nil {
		return 1
	}
	unix.CloseOnExec(3)
	stubborn := self("stubborn")
	spec := Spec{Path: stubborn[0], Args: stubborn[1:]}
	up := 1
	switch family {
	case "wrapper": // a script that does not exec, and its child
		spec.Path = "/bin/sh"
		spec.Args = []string{"-c", `"$0" "$1" "$2"; echo done`, stubborn[0], stubborn[1], stubborn[2]}
	case "sessions":
		spec.Args = self("family")[1:]
		up = 2
	case "starting":
		time.AfterFunc(rand.N(10*time.Millisecond), func() { _ = syscall.Kill(os.Getpid(), syscall.SIGKILL) })
	}
	if mode == "launcher" {
		spec.Launcher = self("launcher")
	}
	ready := make(chan struct{}, up)
	spec.OnLine = func([]byte, bool) { ready <- struct{}{} }
	if _, err := Start(context.Background(), spec); err != nil {
		fmt.Println(err)
		return 1
	}
	for range up {
		<-ready
	}
	fmt.Println("up")
	return block()
}

// LIFE-5: whatever a host has started dies with it, 105 times.
func TestNoOrphans(t *testing.T) {
	const rounds = 15
	for _, c := range []struct{ mode, family string }{
		{"watchdog", "wrapper"},
		{"watchdog", "stubborn"},
		{"watchdog", "starting"},
		{"launcher", "wrapper"},
		{"launcher", "stubborn"},
		{"launcher", "starting"},
		{"launcher", "sessions"},
	} {
		t.Run(c.mode+" "+c.family, func(t *testing.T) {
			for range rounds {
				killHost(t, c.mode, c.family)
			}
		})
	}
}

func killHost(t *testing.T, mode, family string) {
	t.Helper()
	gone, held, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer gone.Close()
	command := self("host", mode, family)
	host := exec.CommandContext(t.Context(), command[0], command[1:]...)
	host.ExtraFiles = []*os.File{held}
	out, err := host.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	err = host.Start()
	held.Close()
	if err != nil {
		t.Fatal(err)
	}
	said, _ := bufio.NewReader(out).ReadString('\n')
	if family != "starting" && said != "up\n" {
		t.Errorf("the host said %q, want up", said)
	}
	_ = host.Process.Kill()
	_ = host.Wait()
	if err := gone.SetReadDeadline(time.Now().Add(30 * time.Second)); err != nil {
		t.Fatal(err)
	}
	if _, err := gone.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		t.Fatalf("survivors: %q", killHolders(t, gone))
	}
}

// killHolders finds the processes that hold a pipe, kills them and says what they are.
func killHolders(t *testing.T, pipe *os.File) []string {
	t.Helper()
	want, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", pipe.Fd()))
	if err != nil {
		t.Fatal(err)
	}
	var found []string
	links, _ := filepath.Glob("/proc/[0-9]*/fd/*")
	for _, link := range links {
		pid, _ := strconv.Atoi(strings.Split(link, "/")[2])
		if target, err := os.Readlink(link); err == nil && target == want && pid != os.Getpid() {
			cmdline, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
			found = append(found, strings.ReplaceAll(string(cmdline), "\x00", " "))
			_ = syscall.Kill(pid, syscall.SIGKILL)
		}
	}
	return found
}

// watch returns a function that waits until a process has ended.
func watch(t *testing.T, pid int) func() {
	t.Helper()
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		t.Fatalf("process %d: %v", pid, err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	return func() {
		t.Helper()
		poll := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		for {
			n, err := unix.Poll(poll, 30_000)
			if errors.Is(err, unix.EINTR) {
				continue
			}
			if n != 1 || err != nil {
				t.Errorf("process %d lives (%v)", pid, err)
			}
			return
		}
	}
}

// state counts what a process could leave behind.
type state struct{ goroutines, descriptors, children int }

func measure(t *testing.T) state {
	t.Helper()
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	all, err := processes()
	if err != nil {
		t.Fatal(err)
	}
	s := state{goroutines: runtime.NumGoroutine(), descriptors: len(fds)}
	for _, p := range all { // zombies are in the table too
		if p.parent == os.Getpid() {
			s.children++
		}
	}
	return s
}

func TestNothingIsLeft(t *testing.T) {
	modes(t, func(t *testing.T, launcher []string) {
		cycle := func(i int) {
			family := []string{"echo", "stubborn", "family"}[i%3]
			spec := Spec{Launcher: launcher, FinishWait: -1, TermWait: -1, OnLine: func([]byte, bool) {}}
			if family == "family" && launcher == nil {
				family = "stubborn" // a watchdog does not reach other sessions
			}
			if i%5 == 4 {
				spec.Path = "/no/such/file"
				if _, err := Start(t.Context(), spec); err == nil {
					t.Error("a file that does not exist was started")
				}
				return
			}
			command := self(family)
			spec.Path, spec.Args = command[0], command[1:]
			p, err := Start(t.Context(), spec)
			if err != nil {
				t.Fatal(err)
			}
			if err := p.Stop(t.Context()); err != nil {
				t.Error(err)
			}
		}
		cycle(0) // opens what stays open, such as the runtime's poller
		before := measure(t)
		for i := range 50 {
			cycle(i)
		}
		// Done is closed by a goroutine that then still has to end.
		after := measure(t)
		for range 1000 {
			if after == before {
				break
			}
			runtime.Gosched()
			after = measure(t)
		}
		if after != before {
			t.Errorf("before %+v, after %+v", before, after)
		}
	})
}

// What has left the process group and holds the outputs open does not hang the host.
// A launcher gets hold of it, a watchdog does not.
func TestEscapeToAnotherSession(t *testing.T) {
	modes(t, func(t *testing.T, launcher []string) {
		c := start(t, Spec{Launcher: launcher}, self("family")...)
		first, second := c.ready(), c.ready()
		escaped := first + second - c.Pid()
		ended := watch(t, escaped)
		pids, err := c.Pids()
		if err != nil || !slices.Contains(pids, c.Pid()) {
			t.Errorf("the processes of %d are %v, %v", c.Pid(), pids, err)
		}
		if slices.Contains(pids, escaped) != (launcher != nil) {
			t.Errorf("the processes are %v; with launcher %q, %d should be there or not", pids, launcher, escaped)
		}
		c.killNow()
		if launcher == nil {
			if err := syscall.Kill(escaped, syscall.SIGKILL); err != nil {
				t.Errorf("the escaped process was killed by a watchdog: the package doc is wrong (%v)", err)
			}
		}
		ended()
	})
}

func TestPids(t *testing.T) {
	modes(t, func(t *testing.T, launcher []string) {
		c := start(t, Spec{Launcher: launcher}, "/bin/sh", "-c", `"$0" "$1" "$2"; exit 0`, self("")[0], "@child", "stubborn")
		grandchild := c.ready()
		pids, err := c.Pids()
		slices.Sort(pids)
		want := []int{c.Pid(), grandchild}
		slices.Sort(want)
		if err != nil || !slices.Equal(pids, want) {
			t.Errorf("the processes are %v, %v; want %v", pids, err, want)
		}
	})
}

func TestParseStat(t *testing.T) {
	p, ok := parseStat(7, []byte("7 (a) R 1 1 (b) S 42 43 44 0 -1"))
	if want := (process{pid: 7, parent: 42, group: 43}); !ok || p != want {
		t.Errorf("got %+v, want %+v", p, want)
	}
	for _, bad := range []string{"", "7", "7 (a)", "7 (a) Z", "7 (a) Z x 1", "7 (a) Z 1 x"} {
		if p, ok := parseStat(7, []byte(bad)); ok {
			t.Errorf("%q gave %+v", bad, p)
		}
	}
}

// inheritable lists the descriptors that programs which are started get, and whether
// they are in non-blocking mode.
func inheritable() []string {
	var list []string
	for fd := range 200 {
		flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFL, 0)
		if err != nil {
			continue
		}
		if own, _ := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); own&unix.FD_CLOEXEC == 0 {
			list = append(list, fmt.Sprintf("%d non-blocking=%t", fd, flags&unix.O_NONBLOCK != 0))
		}
	}
	return list
}

// A child gets its three streams, in blocking mode, and nothing else: not the
// lifeline, which it could hold open, and not the pipes of other children.
func TestInheritedDescriptors(t *testing.T) {
	want := []string{"0 non-blocking=false", "1 non-blocking=false", "2 non-blocking=false"}
	// What this process was given without close-on-exec is not this package's.
	want = append(want, inheritable()[3:]...)
	modes(t, func(t *testing.T, launcher []string) {
		other := start(t, Spec{Launcher: launcher}, self("stubborn")...)
		other.ready()
		c := start(t, Spec{Launcher: launcher}, self("descriptors")...)
		for _, want := range append(want, "end") {
			c.expect(want)
		}
	})
}

// Files come first, and each once.
func TestInheritedFiles(t *testing.T) {
	dir := t.TempDir()
	var files []*os.File
	want := []string{"0 non-blocking=false", "1 non-blocking=false", "2 non-blocking=false"}
	for i := range 3 {
		f, err := os.Create(filepath.Join(dir, strconv.Itoa(i)))
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if _, err := f.WriteString(f.Name()); err != nil {
			t.Fatal(err)
		}
		files = append(files, f)
		want = append(want, strconv.Itoa(3+i)+" non-blocking=false")
	}
	if inherited := inheritable()[3:]; len(inherited) > 0 {
		t.Skip("this process was given descriptors of its own:", inherited)
	}
	modes(t, func(t *testing.T, launcher []string) {
		c := start(t, Spec{Launcher: launcher, Files: files}, self("descriptors")...)
		for _, want := range append(want, "end") {
			c.expect(want)
		}
		c = start(t, Spec{Launcher: launcher, Files: files}, "/bin/sh", "-c", "for n in 3 4 5; do cat /proc/self/fd/$n; echo; done")
		for _, f := range files {
			c.expect(f.Name())
		}
	})
}

func TestNoNewPrivileges(t *testing.T) {
	c := start(t, Spec{Launcher: self("launcher")}, "/bin/sh", "-c", "grep NoNewPrivs /proc/self/status")
	c.expect("NoNewPrivs:\t1")
}

func TestCredential(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("changing the user needs root")
	}
	modes(t, func(t *testing.T, launcher []string) {
		c := start(t, Spec{Launcher: launcher, Dir: "/", Credential: &Credential{UID: 65534, GID: 65533, Groups: []uint32{65532}}},
			"/bin/sh", "-c", "id -u; id -g; id -G; exec cat")
		c.expect("65534")
		c.expect("65533")
		c.expect("65533 65532")
		if err := c.Stop(t.Context()); err != nil {
			t.Error(err)
		}
		dir := t.TempDir()
		if err := os.Chmod(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		_, err := Start(t.Context(), Spec{Launcher: launcher, Path: "/bin/sh", Dir: dir, Credential: &Credential{UID: 65534, GID: 65534}})
		if !errors.Is(err, os.ErrPermission) || !strings.Contains(err.Error(), "user 65534") {
			t.Errorf("a working directory out of reach gave %v", err)
		}
	})
}

// A child that kills its launcher goes down with it.
func TestLauncherIsKilled(t *testing.T) {
	e := start(t, Spec{Launcher: self("launcher")}, self("kill-parent")...).exit()
	if !errors.Is(e, errLauncher) {
		t.Errorf("a child without launcher ended with %v", e)
	}
}

func TestNotALauncher(t *testing.T) {
	for _, launcher := range [][]string{{"/bin/true"}, {"/no/such/launcher"}, {"no-such-launcher"}, {"/bin/echo", "hello"}} {
		if _, err := Start(t.Context(), Spec{Path: "/bin/sh", Launcher: launcher}); err == nil ||
			!strings.Contains(err.Error(), launcher[0]) {
			t.Errorf("launcher %q: %v", launcher, err)
		}
	}
	// One that neither reports nor ends is given up when the context ends.
	ctx, cancel := context.WithCancel(t.Context())
	time.AfterFunc(50*time.Millisecond, cancel)
	if _, err := Start(ctx, Spec{Path: "/bin/sh", Launcher: self("stubborn")}); !errors.Is(err, context.Canceled) {
		t.Errorf("a launcher that hangs gave %v", err)
	}
	// By hand it only says what it is for.
	command := self("launcher", "{}", "/bin/true")
	out, err := exec.CommandContext(t.Context(), command[0], command[1:]...).CombinedOutput()
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != 64 || len(out) == 0 {
		t.Errorf("a launcher by hand: %v, %q", err, out)
	}
}
