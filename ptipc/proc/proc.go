package proc

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

const (
	defaultMaxLine    = 64 << 10
	defaultFinishWait = 5 * time.Second
	defaultTermWait   = 2 * time.Second
	// killWait bounds how long Stop waits for a process that was killed: one in
	// uninterruptible sleep stays.
	killWait = 5 * time.Second
	// drainWait is how long outputs are read after the process has ended. It matters
	// only when something that has escaped from the process group holds them open.
	drainWait = time.Second
)

// A Spec says what to run and how. Path is the only field that must be set.
type Spec struct {
	// Path is the executable. Without a separator it is looked for in PATH; a
	// relative one is relative to this process's directory, not to Dir.
	Path string
	// Args are the arguments after the program's name.
	Args []string
	// Dir is the working directory, an absolute path. "" is this process's own.
	Dir string
	// Env is the environment as "key=value". nil is this process's own.
	Env []string
	// Credential runs the child as another user. It needs the privilege to do so,
	// and is refused on Windows.
	Credential *Credential
	// Launcher is a command that calls [Launch] with the arguments that follow it,
	// such as {"/proc/self/exe", "launch"}. On Linux it takes the place of the
	// watchdog and also gets hold of descendants that leave the process group; on
	// other systems it is not used.
	Launcher []string
	// Sandbox, if set, restricts which files the child may use.
	Sandbox *Sandbox
	// Limits bound what it may use of the machine.
	Limits Limits
	// Files are inherited by the child as the descriptors from 3 on, beside the standard
	// streams. They may be closed once Start has returned. Windows refuses them.
	Files []*os.File

	// OnLine is given each line of standard output without its LF or CR LF. A line
	// longer than MaxLine is given once, truncated to its first bytes, and so is a
	// last line without an LF. line is valid until OnLine returns.
	//
	// OnLine and OnStderr are each called from one goroutine, one call after the
	// other, and the two may run at the same time. While one runs, that output is
	// not read and a child that floods it waits: a callback that takes long slows
	// the child down. It must not wait for the process to end.
	OnLine func(line []byte, truncated bool)
	// OnStderr is given each line of standard error, cut at 1 KiB, with everything
	// that is not printable escaped.
	OnStderr func(line string)
	// MaxLine bounds a line of standard output in bytes, its LF included. 0 is
	// 65,536 (LINE-1).
	MaxLine int

	// FinishWait is how long Stop waits after it has closed standard input. 0 is 5
	// seconds, less than 0 does not wait.
	FinishWait time.Duration
	// TermWait is how long Stop waits after SIGTERM. 0 is 2 seconds, less than 0
	// does not wait.
	TermWait time.Duration

	// Log is told about starts, stops and trouble. nil discards. Arguments,
	// environment and lines are never logged.
	Log *slog.Logger
}

// A Credential is the user that a child runs as. Supplementary groups that are not
// in Groups are dropped.
type Credential struct {
	UID    uint32   `json:"uid"`
	GID    uint32   `json:"gid"`
	Groups []uint32 `json:"groups,omitempty"`
}

// A Process is one child process with everything that it has started. Its methods
// may be called from several goroutines.
type Process struct {
	spec     Spec
	tree     tree
	started  time.Time
	stdin    *input
	tail     tail
	outputs  sync.WaitGroup // the readers of the two outputs
	stopped  atomic.Bool
	termOnce sync.Once

	done chan struct{}
	exit *ExitError // set before done is closed
}

// tree is a child process and what keeps its descendants together, as the system
// provides it.
type tree interface {
	// pid is the process id of the child itself.
	pid() int
	// pids are the living processes, the child and its descendants.
	pids() ([]int, error)
	// wait returns when the child itself has ended.
	wait() outcome
	// terminate asks the processes to end. It does nothing after release.
	terminate() error
	// kill ends all of them at once. It does nothing after release.
	kill()
	// release reaps what is left after wait and kill, and closes everything.
	release()
}

// outcome is how a child ended.
type outcome struct {
	code   int
	signal syscall.Signal
	cause  error // set if it was this package that ended it, and why
}

// Start starts a process. ctx bounds the start, not the process's life. An error
// names the file and the remedy, and wraps the system's error; nothing is left
// running then. After a start without error, Stop must be called or Done waited for.
func Start(ctx context.Context, spec Spec) (*Process, error) {
	if err := spec.complete(); err != nil {
		return nil, err
	}
	var pipes pipes
	defer pipes.closeAll()
	childIn, in := pipes.make()
	out, childOut := pipes.make()
	errs, childErr := pipes.make()
	if pipes.err != nil {
		return nil, fmt.Errorf("start %s: %w", spec.Path, pipes.err)
	}
	began := time.Now()
	t, err := startTree(ctx, &spec, [3]*os.File{childIn, childOut, childErr})
	if err != nil {
		return nil, err
	}
	pipes.keep(in, out, errs)
	p := &Process{spec: spec, tree: t, started: began, stdin: newInput(in, writeTimeout), done: make(chan struct{})}
	spec.Log.Debug("process started", "path", spec.Path, "pid", t.pid())
	lines := &splitter{max: spec.MaxLine, emit: p.line}
	stderr := &splitter{max: stderrLine + 1, emit: p.stderrLine}
	p.outputs.Go(func() { drain(out, lines) })
	p.outputs.Go(func() { drain(errs, stderr) })
	go p.stdin.run()
	go p.supervise(out, errs)
	return p, nil
}

// complete checks the fields and fills in the defaults.
func (s *Spec) complete() error {
	if s.Path == "" {
		return errors.New("start: no executable is named: set Path")
	}
	if s.Dir != "" && !filepath.IsAbs(s.Dir) {
		return fmt.Errorf("start %s: the working directory %q is not an absolute path", s.Path, s.Dir)
	}
	path, err := resolve(s.Path)
	if err != nil {
		return err
	}
	s.Path = path
	if s.MaxLine <= 0 {
		s.MaxLine = defaultMaxLine
	}
	if s.FinishWait == 0 {
		s.FinishWait = defaultFinishWait
	}
	if s.TermWait == 0 {
		s.TermWait = defaultTermWait
	}
	if s.Log == nil {
		s.Log = slog.New(slog.DiscardHandler)
	}
	return s.checkRestrictions()
}

// resolve makes a path absolute: the child's directory is another one, and a
// relative path would be looked for there.
func resolve(path string) (string, error) {
	if filepath.Base(path) == path {
		found, err := exec.LookPath(path)
		if err != nil {
			return "", fmt.Errorf("start %s: it is not in PATH: install it or give its full path: %w", path, err)
		}
		path = found
	}
	path, err := filepath.Abs(path)
	if err != nil {
		return "", fmt.Errorf("start %s: %w", path, err)
	}
	return path, nil
}

// drain reads an output until its end: whether anybody wants the lines or not, the
// child never waits for a reader that has gone (LIFE-10).
func drain(f *os.File, s *splitter) {
	defer f.Close()
	buf := make([]byte, 16<<10)
	for {
		n, err := f.Read(buf)
		s.write(buf[:n])
		if err != nil {
			s.finish()
			return
		}
	}
}

func (p *Process) line(line []byte, truncated bool) {
	if truncated {
		p.spec.Log.Debug("a line of standard output is too long or has no end",
			"path", p.spec.Path, "pid", p.Pid(), "limit", p.spec.MaxLine)
	}
	if p.spec.OnLine != nil {
		p.spec.OnLine(line, truncated)
	}
}

func (p *Process) stderrLine(line []byte, _ bool) {
	p.tail.add(line)
	if p.spec.OnStderr != nil {
		p.spec.OnStderr(safe(line))
	}
}

// supervise waits for the end of the process and clears up after it: on every
// path, asked for or not, everything is killed, reaped and closed (LIFE-4).
func (p *Process) supervise(outputs ...*os.File) {
	end := p.tree.wait()
	lived := time.Since(p.started)
	stopped := p.stopped.Load()
	p.tree.kill()
	p.stdin.abort()
	for _, f := range outputs {
		stopReading(f, drainWait)
	}
	p.outputs.Wait()
	p.tree.release()
	p.exit = &ExitError{
		Path: p.spec.Path, Code: end.code, Signal: end.signal, Stopped: stopped,
		Duration: lived, Stderr: p.tail.lines(), sandbox: p.spec.Sandbox, cause: end.cause,
	}
	p.spec.Log.Debug("process ended", "path", p.spec.Path, "pid", p.Pid(), "code", end.code, "signal", end.signal)
	close(p.done)
}

// stopReading makes the reader of f end after d, if it has not by then.
func stopReading(f *os.File, d time.Duration) {
	if err := f.SetReadDeadline(time.Now().Add(d)); errors.Is(err, os.ErrNoDeadline) {
		time.AfterFunc(d, func() { f.Close() })
	}
}

// Pid is the process id of the child itself, not that of a watchdog or launcher.
func (p *Process) Pid() int { return p.tree.pid() }

// Pids returns the ids of the living processes that belong to the child: itself,
// its process group and its descendants. It answers the question whether a socket
// belongs to the child. The error wraps errors.ErrUnsupported where the system
// cannot tell.
func (p *Process) Pids() ([]int, error) {
	select {
	case <-p.done:
		return nil, nil
	default:
		return p.tree.pids()
	}
}

// WriteLine queues one line for the child's standard input; LF is added. It never
// blocks (ARG-7): up to 2 MiB wait for a child that is slow to read, then the error
// is [ErrStdinFull]. Each line has 10 seconds to get into the pipe; after one that
// has not, standard input is closed, and the error of later calls, which wraps
// [ErrStdinClosed], says so.
func (p *Process) WriteLine(line []byte) error {
	if err := p.stdin.put(line); err != nil {
		return fmt.Errorf("%s: %w", p.spec.Path, err)
	}
	return nil
}

// CloseStdin closes the child's standard input once the lines that are queued have
// been written, which asks the child to finish and exit (LIFE-2).
func (p *Process) CloseStdin() { p.stdin.close() }

// Done is closed when the process has ended, everything that it had started has
// been killed and reaped, and the last line has been passed on.
func (p *Process) Done() <-chan struct{} { return p.done }

// Err is nil until Done is closed, then an [*ExitError].
func (p *Process) Err() error {
	select {
	case <-p.done:
		return p.exit
	default:
		return nil
	}
}

// Stop ends the process in steps (LIFE-4): it closes standard input and waits for
// Spec.FinishWait, sends SIGTERM to the process group and waits for Spec.TermWait,
// then kills. The end of ctx cuts the waiting short and kills at once. When Stop
// returns nil, Done is closed and nothing is left. The error says which process
// could not be killed; Stop does not return how the process ended, Err does.
func (p *Process) Stop(ctx context.Context) error {
	p.stopped.Store(true)
	p.stdin.close()
	if p.await(ctx, p.spec.FinishWait) {
		return nil
	}
	if ctx.Err() == nil {
		// Once, however many callers there are: a second SIGTERM means at once (LIFE-3).
		p.termOnce.Do(func() {
			p.spec.Log.Debug("process does not end, sending SIGTERM", "path", p.spec.Path, "pid", p.Pid())
			if err := p.tree.terminate(); err != nil {
				p.spec.Log.Warn("cannot ask the process to end", "path", p.spec.Path, "pid", p.Pid(), "err", err)
			}
		})
		if p.await(ctx, p.spec.TermWait) {
			return nil
		}
	}
	p.spec.Log.Debug("killing process", "path", p.spec.Path, "pid", p.Pid())
	p.tree.kill()
	if p.await(context.WithoutCancel(ctx), killWait) {
		return nil
	}
	return fmt.Errorf("%s: process %d is still there %v after it was killed", p.spec.Path, p.Pid(), killWait)
}

// await waits until the process has ended (true), d has passed or ctx has ended.
func (p *Process) await(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-p.done:
		return true
	case <-timer.C:
	case <-ctx.Done():
	}
	select {
	case <-p.done:
		return true
	default:
		return false
	}
}

// pipes makes pipes and closes, at the end of a start, the ends that are not kept.
type pipes struct {
	open []*os.File
	err  error
}

func (p *pipes) make() (r, w *os.File) {
	if p.err != nil {
		return nil, nil
	}
	// Both ends are close-on-exec: no other child that is started at the same time
	// gets them.
	if r, w, p.err = os.Pipe(); p.err == nil {
		p.open = append(p.open, r, w)
	}
	return r, w
}

func (p *pipes) keep(files ...*os.File) {
	for _, f := range files {
		for i := range p.open {
			if p.open[i] == f {
				p.open[i] = nil
			}
		}
	}
}

func (p *pipes) closeAll() {
	for _, f := range p.open {
		if f != nil {
			f.Close()
		}
	}
}
