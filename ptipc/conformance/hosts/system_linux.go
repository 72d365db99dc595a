package hosts

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
)

// A process is a line of the process table.
type process struct {
	pid, parent int
	cmdline     string // words, each with a NUL behind
}

// processes are those of this machine. Zombies are not among them.
func processes() ([]process, error) {
	paths, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		return nil, err
	}
	if len(paths) == 0 {
		return nil, fmt.Errorf("there are no processes in /proc")
	}
	var found []process
	for _, path := range paths {
		cmdline, err := os.ReadFile(filepath.Join(path, "cmdline"))
		if err != nil || len(cmdline) == 0 {
			continue // gone meanwhile, a zombie, or the kernel's own
		}
		pid, _ := strconv.Atoi(filepath.Base(path))
		fields := stat(pid)
		if len(fields) < 2 {
			continue
		}
		parent, _ := strconv.Atoi(fields[1])
		found = append(found, process{pid, parent, string(cmdline)})
	}
	return found, nil
}

// stat are the fields of /proc/PID/stat from the state on.
func stat(pid int) []string {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return nil
	}
	return strings.Fields(string(text[bytes.LastIndexByte(text, ')')+1:]))
}

// stateOf is the letter of a process's state, and "" for one that is gone.
func stateOf(pid int) string {
	if fields := stat(pid); len(fields) > 0 {
		return fields[0]
	}
	return ""
}

// resident is the memory that a process has of its own, in bytes.
func resident(pid int) int64 {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0
	}
	for line := range strings.Lines(string(text)) {
		if rest, ok := strings.CutPrefix(line, "RssAnon:"); ok {
			kib, _ := strconv.ParseInt(strings.TrimSuffix(strings.TrimSpace(rest), " kB"), 10, 64)
			return kib << 10
		}
	}
	return 0
}

func ownGroup(cmd *exec.Cmd) { cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} }

func ownSession(cmd *exec.Cmd) { cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true} }

// kill and killGroup end processes; those that have ended already are no fault.
func kill(pid int)      { _ = syscall.Kill(pid, syscall.SIGKILL) }
func killGroup(pid int) { _ = syscall.Kill(-pid, syscall.SIGKILL) }
