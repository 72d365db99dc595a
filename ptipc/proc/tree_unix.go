//go:build unix

package proc

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"sync"
	"syscall"
	"time"
)

// watchdogScript leads the child's process group. It says that it is deaf to
// signals, then waits for the end of its standard input, the lifeline: the write end
// is this process's alone, so its end is the end of this process, however it came
// about, or of the child. Then it kills the group, itself included (LIFE-5).
const watchdogScript = `trap '' TERM INT HUP QUIT USR1 USR2 ALRM PIPE TSTP TTIN TTOU
echo
read _
kill -KILL 0`

const shell = "/bin/sh"

var errWatchdog = errors.New("the watchdog of its process group was killed, and the process with it")

// group is a child in a process group that a watchdog leads.
type group struct {
	child    *exec.Cmd
	watchdog *exec.Cmd
	lifeline *os.File
	gone     chan struct{} // the watchdog has ended

	// The watchdog is not reaped before release: while it is there, at least as a
	// zombie, the kernel gives its id, which is the group's, to nobody else.
	mu       sync.Mutex
	ending   bool // the child has ended or is being killed: the watchdog may go
	lost     bool // the watchdog has gone before that
	released bool
}

func startTree(ctx context.Context, s *Spec, stdio [3]*os.File) (tree, error) {
	if launcherWorks && len(s.Launcher) > 0 {
		return startLaunched(ctx, s, stdio)
	}
	return startGroup(ctx, s, stdio)
}

func startGroup(ctx context.Context, s *Spec, stdio [3]*os.File) (_ tree, err error) {
	var pipes pipes
	defer pipes.closeAll()
	lifelineEnd, lifeline := pipes.make()
	alive, aliveEnd := pipes.make()
	if pipes.err != nil {
		return nil, fmt.Errorf("start %s: %w", s.Path, pipes.err)
	}
	g := &group{
		watchdog: &exec.Cmd{
			Path: shell, Args: []string{"sh", "-c", watchdogScript}, Env: []string{}, Dir: "/",
			Stdin: lifelineEnd, Stdout: aliveEnd,
			SysProcAttr: &syscall.SysProcAttr{Setpgid: true},
		},
		lifeline: lifeline, gone: make(chan struct{}),
	}
	if err := g.watchdog.Start(); err != nil {
		return nil, fmt.Errorf("start %s: its watchdog needs %s: %w", s.Path, shell, err)
	}
	aliveEnd.Close()
	ready := make([]byte, 1)
	if err := untilDone(ctx, alive, func() error { _, err := alive.Read(ready); return err }); err != nil {
		g.kill()
		g.watchdog.Wait()
		return nil, fmt.Errorf("start %s: the watchdog did not come up: %w", s.Path, err)
	}
	// The child joins the group between fork and exec, and until exec it holds a copy
	// of the lifeline. So if this process is killed in between, the watchdog does not
	// see the end before the child is in the group.
	g.child = command(s, stdio)
	g.child.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pgid: g.watchdog.Process.Pid, Credential: credential(s)}
	if err := g.child.Start(); err != nil {
		g.kill()
		g.watchdog.Wait()
		return nil, explain(s, err)
	}
	pipes.keep(lifeline, alive)
	go g.watch(alive)
	return g, nil
}

// command is the child with its standard streams, Files and nothing else open.
func command(s *Spec, stdio [3]*os.File) *exec.Cmd {
	return &exec.Cmd{
		Path: s.Path, Args: append([]string{s.Path}, s.Args...), Dir: s.Dir, Env: s.Env,
		Stdin: stdio[0], Stdout: stdio[1], Stderr: stdio[2], ExtraFiles: s.Files,
	}
}

func credential(s *Spec) *syscall.Credential {
	if s.Credential == nil {
		return nil
	}
	return &syscall.Credential{Uid: s.Credential.UID, Gid: s.Credential.GID, Groups: s.Credential.Groups}
}

// untilDone runs read, which reads f, and makes it fail when ctx ends. Without an
// error f has no deadline afterwards.
func untilDone(ctx context.Context, f *os.File, read func() error) error {
	stop := context.AfterFunc(ctx, func() { _ = f.SetReadDeadline(time.Unix(1, 0)) })
	err := read()
	if !stop() {
		return context.Cause(ctx)
	}
	return err
}

// watch waits for the end of the watchdog: it holds the other end of alive and
// writes nothing more. Without it nothing would kill the group when this process
// dies, so a child that has killed its watchdog does not live on.
func (g *group) watch(alive *os.File) {
	defer close(g.gone)
	defer alive.Close()
	_, _ = alive.Read(make([]byte, 1))
	g.mu.Lock()
	g.lost = !g.ending
	g.mu.Unlock()
	g.kill()
}

func (g *group) pid() int { return g.child.Process.Pid }

func (g *group) pids() ([]int, error) { return groupPids(g.watchdog.Process.Pid) }

func (g *group) wait() outcome {
	_ = g.child.Wait() // the state says it all
	end := outcomeOf(g.child.ProcessState.Sys())
	g.mu.Lock()
	defer g.mu.Unlock()
	g.ending = true
	if g.lost {
		end.cause = errWatchdog
	}
	return end
}

func (g *group) signal(sig syscall.Signal) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.released {
		return nil
	}
	return syscall.Kill(-g.watchdog.Process.Pid, sig)
}

func (g *group) terminate() error { return g.signal(syscall.SIGTERM) }

func (g *group) kill() {
	g.mu.Lock()
	g.ending = true
	g.mu.Unlock()
	_ = g.signal(syscall.SIGKILL) // the group is there at least as a zombie
	g.lifeline.Close()
}

func (g *group) release() {
	<-g.gone
	g.mu.Lock()
	g.released = true
	g.mu.Unlock()
	_ = g.watchdog.Wait() // it was killed: there is nothing to learn
}

// outcomeOf decodes what wait(2) says of a process that has ended.
func outcomeOf(status any) outcome {
	ws, ok := status.(syscall.WaitStatus)
	if !ok {
		return outcome{code: -1, cause: errors.New("the system does not say how it ended")}
	}
	if ws.Signaled() {
		return outcome{code: -1, signal: ws.Signal()}
	}
	return outcome{code: ws.ExitStatus()}
}
