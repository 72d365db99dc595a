package proc

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"runtime"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"pthost/ptipc"
)

// The descriptors that a launcher inherits beside the standard streams.
const (
	lifelineFD = 3 // the read end of the lifeline: its end means kill everything
	reportsFD  = 4 // where launchReports go
	filesFD    = 5 // the first of the command's Files
)

// killAgain is how often what does not end is killed again.
const killAgain = 100 * time.Millisecond

// launchOrders is the first argument of Launch, a JSON object: what is done to the
// command before it is started.
type launchOrders struct {
	Credential *Credential `json:"credential,omitempty"`
	Sandbox    *Sandbox    `json:"sandbox,omitempty"`
	Limits     Limits      `json:"limits,omitzero"`
	Files      int         `json:"files,omitempty"` // how many the command inherits
}

// errRestrict: the command was not started, because it could not be restricted.
var errRestrict = errors.New("not started without its restrictions")

// launchReport is what a launcher tells, once when the command has started or has
// not, and once when it has ended.
type launchReport struct {
	Pid     int                 `json:"pid,omitempty"`
	Errno   syscall.Errno       `json:"errno,omitempty"`   // why it could not be started, or
	Problem string              `json:"problem,omitempty"` // what could not be done to it
	Status  *syscall.WaitStatus `json:"status,omitempty"`
}

// Launch is the main function of a launcher, which Start runs when Spec.Launcher
// names it: args are what follows Spec.Launcher on its command line. It makes
// itself the parent of all orphans among its descendants, starts the command with
// the standard streams that it was given, with no_new_privs set, and hands on
// SIGTERM. When the command ends, and when the process that called Start is gone or
// wants an end, it kills all descendants, those that have left the process group or
// the session too (LIFE-5), and returns the exit code for os.Exit: the command's
// own, or 128 and the number of the signal that ended it. It must be called from
// the main function, early, before the process has started any other.
func Launch(args []string) int {
	// First of all: nothing that is started may hold the lifeline or write reports.
	syscall.CloseOnExec(lifelineFD)
	syscall.CloseOnExec(reportsFD)
	if len(args) < 2 || !isPipe(lifelineFD) || !isPipe(reportsFD) {
		fmt.Fprintln(os.Stderr, "a launcher is started by a host, with a lifeline, and not by hand")
		return int(ptipc.ExitUsage)
	}
	l := &launch{reports: json.NewEncoder(os.NewFile(reportsFD, "reports"))}
	if err := l.start(args); err != nil {
		report := launchReport{Errno: syscall.EINVAL}
		if !errors.As(err, &report.Errno) || errors.Is(err, errRestrict) {
			report.Problem = err.Error()
		}
		_ = l.reports.Encode(report)
		return int(ptipc.ExitOSErr)
	}
	go func() {
		_, _ = io.Copy(io.Discard, os.NewFile(lifelineFD, "lifeline"))
		l.killAll()
	}()
	return l.reap()
}

func isPipe(fd int) bool {
	var st unix.Stat_t
	return unix.Fstat(fd, &st) == nil && st.Mode&unix.S_IFMT == unix.S_IFIFO
}

// launch is the state of a launcher.
type launch struct {
	reports *json.Encoder
	pid     int

	// mu is held to reap and to signal: a child that has not been reaped keeps its
	// id, so no other process is ever hit.
	mu     sync.Mutex
	ended  bool // the command has been reaped
	ending bool // everything is to be killed
}

func (l *launch) start(args []string) error {
	var orders launchOrders
	if err := json.Unmarshal([]byte(args[0]), &orders); err != nil {
		return err
	}
	if _, err := processes(); err != nil {
		return err // without /proc it could not find what it has to kill
	}
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		return err
	}
	// Caught and not ignored: the command would inherit what is ignored.
	signals := make(chan os.Signal, 8)
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP, syscall.SIGQUIT)
	// no_new_privs belongs to the thread, and the command inherits that of the thread
	// which forks it.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return err
	}
	attr := &syscall.ProcAttr{
		Env: os.Environ(), Files: []uintptr{0, 1, 2},
		Dir: ".", // entered once more as the command's user, who may not be allowed to
		// In a group of its own the command cannot hit the launcher with kill(0).
		Sys: &syscall.SysProcAttr{Setpgid: true},
	}
	for i := range orders.Files {
		syscall.CloseOnExec(filesFD + i)
		attr.Files = append(attr.Files, uintptr(filesFD+i))
	}
	if c := orders.Credential; c != nil {
		attr.Sys.Credential = &syscall.Credential{Uid: c.UID, Gid: c.GID, Groups: c.Groups}
	}
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer null.Close()
	if s := orders.Sandbox; s != nil { // LIFE-12: from here on this process is in it too
		if err := s.enforce(args[1]); err != nil {
			return fmt.Errorf("%w: %w", errRestrict, err)
		}
	}
	// A limited command is traced until its limits are set: it stops before its first
	// instruction, and cannot start anything without them (LIFE-13).
	attr.Sys.Ptrace = orders.Limits != (Limits{})
	l.pid, err = syscall.ForkExec(args[1], args[1:], attr)
	switch {
	case err == nil && attr.Sys.Ptrace:
		if err := orders.Limits.enforce(l.pid, orders.Credential); err != nil {
			_ = syscall.Kill(l.pid, syscall.SIGKILL)
			_, _ = syscall.Wait4(l.pid, nil, 0, nil)
			return fmt.Errorf("%w: %w", errRestrict, err)
		}
	case attr.Sys.Ptrace && errors.Is(err, syscall.EPERM):
		return fmt.Errorf("%w: to set its limits it has to be traced for a moment (ptrace): allow that, or remove the limits: %w", errRestrict, err)
	case err != nil:
		return err
	}
	// The command's own end of a pipe must be the only one, or the host would not see
	// it close.
	for fd := range 3 {
		_ = unix.Dup3(int(null.Fd()), fd, 0)
	}
	if err := l.reports.Encode(launchReport{Pid: l.pid}); err != nil {
		l.killAll() // the host has gone already
	}
	go func() {
		for s := range signals {
			l.forward(s.(syscall.Signal))
		}
	}()
	return nil
}

func (l *launch) forward(sig syscall.Signal) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.ended {
		_ = syscall.Kill(-l.pid, sig)
	}
}

// killAll kills the children, again and again until reap has buried the last one:
// their own children become this process's when they die, and a system that is out
// of descriptors or memory may not show all of them at once. no_new_privs sees to it
// that none has become another user's and cannot be killed.
func (l *launch) killAll() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.ending = true
	l.killChildren()
	time.AfterFunc(killAgain, l.killAll)
}

func (l *launch) killChildren() {
	all, err := processes()
	if err != nil {
		return // until the next time
	}
	self := os.Getpid()
	for _, p := range all {
		if p.parent == self && !p.dead {
			_ = syscall.Kill(p.pid, syscall.SIGKILL)
		}
	}
}

// reap buries children, the command and orphans that have come here, until none is
// left, and returns the exit code.
func (l *launch) reap() int {
	code := int(ptipc.ExitOSErr)
	for {
		// Wait without reaping, so that the lock is not held while waiting.
		err := unix.Waitid(unix.P_ALL, 0, nil, unix.WEXITED|unix.WNOWAIT, nil)
		if errors.Is(err, syscall.EINTR) {
			continue
		}
		if err != nil {
			return code // ECHILD: there are no descendants any more
		}
		l.mu.Lock()
		var status syscall.WaitStatus
		pid, err := syscall.Wait4(-1, &status, syscall.WNOHANG, nil)
		if err == nil && pid == l.pid {
			l.ended, l.ending = true, true
			time.AfterFunc(killAgain, l.killAll)
			_ = l.reports.Encode(launchReport{Status: &status})
			code = status.ExitStatus()
			if status.Signaled() {
				code = 128 + int(status.Signal())
			}
		}
		if l.ending {
			l.killChildren()
		}
		l.mu.Unlock()
	}
}
