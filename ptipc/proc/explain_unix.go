//go:build unix

package proc

import (
	"bufio"
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"syscall"
)

// explain says why a program could not be started and what to do. The system gives
// the same error for a missing program, a missing interpreter and a missing
// directory, so it looks at the files; err stays in the chain.
func explain(s *Spec, err error) error {
	var errno syscall.Errno
	if !errors.As(err, &errno) {
		return fmt.Errorf("start %s: %w", s.Path, err)
	}
	return fmt.Errorf("start %s: %s: %w", s.Path, remedy(s, errno), errno)
}

func remedy(s *Spec, errno syscall.Errno) string {
	switch errno {
	case syscall.ENOENT, syscall.EACCES, syscall.ENOTDIR, syscall.ELOOP, syscall.ENAMETOOLONG:
	case syscall.ENOEXEC:
		return "it is neither a program for this machine nor a script: a script begins with #! and its interpreter"
	case syscall.E2BIG:
		return "its arguments and environment are too long: hand the configuration over on standard input"
	case syscall.ETXTBSY:
		return "the file is being written: start it again when it is complete"
	case syscall.EAGAIN, syscall.ENOMEM:
		return "the system has no room for another process: raise the limit on processes or memory"
	case syscall.EPERM:
		if s.Credential != nil {
			return fmt.Sprintf("this process may not start programs as user %d: that takes root", s.Credential.UID)
		}
		return "the system does not allow it"
	default:
		return "the system refuses"
	}
	if s.Dir != "" {
		switch info, err := os.Stat(s.Dir); {
		case err != nil:
			return fmt.Sprintf("its working directory %s cannot be used (%v): create it", s.Dir, err)
		case !info.IsDir():
			return fmt.Sprintf("its working directory %s is not a directory", s.Dir)
		}
	}
	info, err := os.Stat(s.Path)
	switch {
	case errors.Is(err, os.ErrNotExist):
		return "there is no such file: correct the path or install it"
	case err != nil:
		return fmt.Sprintf("the file cannot be looked at (%v)", err)
	case info.IsDir():
		return "it is a directory: name the executable in it"
	case info.Mode()&0o111 == 0:
		return "the file is not executable: chmod +x it"
	}
	interpreter := interpreterOf(s.Path)
	switch {
	case interpreter != "" && errno == syscall.ENOENT:
		return fmt.Sprintf("the file is there, its interpreter %q is not: install that or correct the first line", interpreter)
	case interpreter != "" && errno == syscall.EACCES && !runnable(interpreter):
		return fmt.Sprintf("its interpreter %q is not executable", interpreter)
	case errno == syscall.EACCES && s.Credential != nil:
		return fmt.Sprintf("user %d may not run it, or may not reach it or its working directory %q", s.Credential.UID, s.Dir)
	case errno == syscall.EACCES:
		return fmt.Sprintf("this user may not run it, or may not enter its working directory %q, or its file system is mounted noexec", s.Dir)
	}
	return "the system refuses"
}

func runnable(path string) bool {
	info, err := os.Stat(path)
	return err == nil && info.Mode().IsRegular() && info.Mode()&0o111 != 0
}

// interpreterOf finds what the system runs to run a file: the one that a script
// names, or the dynamic loader of an ELF program.
func interpreterOf(path string) string {
	f, err := os.Open(path)
	if err != nil {
		return ""
	}
	defer f.Close()
	first, _ := bufio.NewReader(io.LimitReader(f, 256)).ReadString('\n')
	if script, ok := strings.CutPrefix(first, "#!"); ok {
		name, _, _ := strings.Cut(strings.Trim(script, " \t\n"), " ")
		return name
	}
	program, err := elf.NewFile(f)
	if err != nil {
		return ""
	}
	for _, p := range program.Progs {
		if p.Type == elf.PT_INTERP {
			name, _ := io.ReadAll(io.LimitReader(p.Open(), 4096))
			return strings.TrimRight(string(name), "\x00")
		}
	}
	return ""
}
