package proc

import (
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
)

// A Sandbox says which files a child may use beside its working directory, in which
// it may do anything, and what every program needs: the system's programs,
// libraries, certificates and time zones, /proc, and devices such as /dev/null. All
// else is refused by the kernel, with EACCES, to the child and to everything that it
// starts (LIFE-12). The network is not restricted. It needs [Spec.Launcher] and Linux
// with Landlock; where the kernel has none, the child is started without it and the
// log says so.
type Sandbox struct {
	// Read are absolute paths of files and directories that may be read and executed.
	// What does not exist is passed over.
	Read []string `json:"read,omitempty"`
	// Write are those that may be changed as well.
	Write []string `json:"write,omitempty"`
}

// Limits bound what a child may use of the machine (LIFE-13). 0 leaves a limit as it
// is for this process. They need [Spec.Launcher] and Linux.
type Limits struct {
	// Descriptors is how many files and sockets each process may have open.
	Descriptors uint64 `json:"descriptors,omitempty"`
	// Memory is how many bytes of writable memory each process may have.
	Memory uint64 `json:"memory,omitempty"`
	// Processes is how many processes and threads the child's user may have in all,
	// those that are not the child's included. The kernel does not hold root to it.
	Processes uint64 `json:"processes,omitempty"`
}

func (s *Spec) checkRestrictions() error {
	if s.Sandbox == nil && s.Limits == (Limits{}) {
		return nil
	}
	if len(s.Launcher) == 0 {
		return fmt.Errorf("start %s: a sandbox and limits are put on by a launcher: set Launcher", s.Path)
	}
	if !canRestrict {
		return fmt.Errorf("start %s: this system has no sandbox and limits for children: %w", s.Path, errors.ErrUnsupported)
	}
	if s.Sandbox == nil {
		return nil
	}
	if !sandboxWorks() {
		s.Log.Warn("this kernel has no Landlock: the child is started without a sandbox", "path", s.Path)
	}
	for _, path := range slices.Concat(s.Sandbox.Read, s.Sandbox.Write) {
		if !filepath.IsAbs(path) {
			return fmt.Errorf("start %s: the sandbox allows %q, which is not an absolute path", s.Path, path)
		}
	}
	return nil
}

// Explain says what a sandboxed child was allowed, if what it said sounds like a
// program that was refused something. It is "" otherwise, and for a nil Sandbox.
func (s *Sandbox) Explain(said string) string {
	said = strings.ToLower(said)
	if s == nil || !strings.Contains(said, "permission denied") && !strings.Contains(said, "eacces") && !strings.Contains(said, "permissionerror") {
		return ""
	}
	paths := func(paths []string) string {
		if len(paths) == 0 {
			return "nothing"
		}
		return strings.Join(paths, ", ")
	}
	return fmt.Sprintf("it ran in a sandbox: beside its working directory and the system's programs and libraries it may read %s, and write %s; allow what it needs",
		paths(s.Read), paths(s.Write))
}
