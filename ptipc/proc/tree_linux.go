package proc

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"syscall"
	"time"
)

const launcherWorks = true

// leaveWait bounds how long a launcher may take to kill and reap what is left.
const leaveWait = 2 * time.Second

var errLauncher = errors.New("its launcher was killed, and the process with it")

// launched is a child under a launcher: see Launch.
type launched struct {
	launcher *exec.Cmd
	childPid int
	lifeline *os.File
	reports  *os.File
	decoder  *json.Decoder
}

func startLaunched(ctx context.Context, s *Spec, stdio [3]*os.File) (tree, error) {
	var pipes pipes
	defer pipes.closeAll()
	lifelineEnd, lifeline := pipes.make()
	reports, reportsEnd := pipes.make()
	if pipes.err != nil {
		return nil, fmt.Errorf("start %s: %w", s.Path, pipes.err)
	}
	orders, err := json.Marshal(launchOrders{Credential: s.Credential, Sandbox: s.Sandbox, Limits: s.Limits, Files: len(s.Files)})
	if err != nil {
		return nil, fmt.Errorf("start %s: %w", s.Path, err)
	}
	path, err := resolve(s.Launcher[0])
	if err != nil {
		return nil, err
	}
	args := append([]string{}, s.Launcher...)
	args = append(args, string(orders), s.Path)
	args = append(args, s.Args...)
	cmd := command(s, stdio)
	cmd.Path, cmd.Args = path, args
	cmd.ExtraFiles = append([]*os.File{lifelineEnd, reportsEnd}, s.Files...) // descriptors 3, 4 and on
	// In a session of its own it does not get the signals of a terminal.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	l := &launched{launcher: cmd, lifeline: lifeline, reports: reports, decoder: json.NewDecoder(reports)}
	if err := cmd.Start(); err != nil {
		asked := *s
		asked.Path, asked.Credential = path, nil
		return nil, fmt.Errorf("start %s: its launcher: %w", s.Path, explain(&asked, err))
	}
	reportsEnd.Close()
	lifelineEnd.Close()
	var first launchReport
	err = untilDone(ctx, reports, func() error { return l.decoder.Decode(&first) })
	if err != nil || first.Pid <= 0 {
		lifeline.Close()
		l.reap()
	}
	switch {
	case err != nil && ctx.Err() != nil:
		return nil, fmt.Errorf("start %s: %w", s.Path, err)
	case err != nil:
		return nil, fmt.Errorf("start %s: its launcher %s must be a command that calls proc.Launch, and ended with %v: %w",
			s.Path, path, cmd.ProcessState, err)
	case first.Problem != "":
		return nil, fmt.Errorf("start %s: %s", s.Path, first.Problem)
	case first.Pid <= 0:
		return nil, explain(s, first.Errno)
	}
	l.childPid = first.Pid
	pipes.keep(lifeline, reports)
	return l, nil
}

func (l *launched) pid() int { return l.childPid }

func (l *launched) pids() ([]int, error) {
	all, err := processes()
	if err != nil {
		return nil, err
	}
	launcher := l.launcher.Process.Pid
	return living(all, func(p process) bool { return p.pid == launcher }, launcher), nil
}

func (l *launched) wait() outcome {
	var last launchReport
	if err := l.decoder.Decode(&last); err != nil || last.Status == nil {
		// Whoever killed the launcher has set free what it held. The child's group is
		// what can still be found.
		_ = syscall.Kill(-l.childPid, syscall.SIGKILL)
		return outcome{code: -1, cause: errLauncher}
	}
	return outcomeOf(*last.Status)
}

func (l *launched) terminate() error { return l.launcher.Process.Signal(syscall.SIGTERM) }

func (l *launched) kill() { l.lifeline.Close() }

func (l *launched) release() {
	l.reap()
	l.reports.Close()
}

// reap waits for the launcher, which leaves when nothing of the child is left, and
// kills it if that takes too long.
func (l *launched) reap() {
	timer := time.AfterFunc(leaveWait, func() { _ = l.launcher.Process.Kill() })
	defer timer.Stop()
	_ = l.launcher.Wait() // the child's end has been reported
}

// groupPids are the living processes of the group that watchdog leads, without
// itself, and their descendants.
func groupPids(watchdog int) ([]int, error) {
	all, err := processes()
	if err != nil {
		return nil, err
	}
	return living(all, func(p process) bool { return p.group == watchdog }, watchdog), nil
}

// process is what /proc tells of a process.
type process struct {
	pid, parent, group int
	dead               bool
}

// living returns the processes that are members, and all their descendants; it
// leaves out the dead and the one that guards them.
func living(all []process, member func(process) bool, guard int) []int {
	children := make(map[int][]process)
	var queue []process
	for _, p := range all {
		children[p.parent] = append(children[p.parent], p)
		if member(p) {
			queue = append(queue, p)
		}
	}
	seen := make(map[int]bool)
	var pids []int
	for len(queue) > 0 {
		p := queue[0]
		queue = queue[1:]
		if seen[p.pid] {
			continue
		}
		seen[p.pid] = true
		if !p.dead && p.pid != guard {
			pids = append(pids, p.pid)
		}
		queue = append(queue, children[p.pid]...)
	}
	return pids
}

// processes reads the process table.
func processes() ([]process, error) {
	dir, err := os.Open("/proc")
	if err != nil {
		return nil, fmt.Errorf("list processes: %w", err)
	}
	defer dir.Close()
	names, err := dir.Readdirnames(-1)
	if err != nil {
		return nil, fmt.Errorf("list processes: %w", err)
	}
	var all []process
	for _, name := range names {
		pid, err := strconv.Atoi(name)
		if err != nil {
			continue
		}
		stat, err := os.ReadFile("/proc/" + name + "/stat")
		if err != nil {
			continue // it has just ended
		}
		if p, ok := parseStat(pid, stat); ok {
			all = append(all, p)
		}
	}
	return all, nil
}

// parseStat reads a line of /proc/PID/stat: "PID (NAME) STATE PARENT GROUP …". The
// name is the process's own choice and may hold anything, parentheses too, so the
// fields are counted from the last one.
func parseStat(pid int, stat []byte) (process, bool) {
	fields := bytes.Fields(stat[bytes.LastIndexByte(stat, ')')+1:])
	if len(fields) < 3 {
		return process{}, false
	}
	parent, err := strconv.Atoi(string(fields[1]))
	if err != nil {
		return process{}, false
	}
	group, err := strconv.Atoi(string(fields[2]))
	if err != nil {
		return process{}, false
	}
	return process{pid: pid, parent: parent, group: group, dead: bytes.ContainsAny(fields[0], "ZX")}, true
}
