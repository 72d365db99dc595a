package proc

import (
	"fmt"
	"strings"
	"syscall"
	"time"

	"pthost/ptipc"
)

// An ExitError says how a process ended and what it said last. It is an error even
// for exit code 0, because a process that ends is one that no longer serves;
// whether that was wanted, the caller knows (see Stopped). errors.As finds the
// [ptipc.ExitCode] of a process that exited by itself (ERR-4).
type ExitError struct {
	Path     string         // the executable
	Code     int            // the exit code; -1 when a signal ended the process
	Signal   syscall.Signal // the signal that ended the process, or 0
	Stopped  bool           // Stop had been called before the process ended
	Duration time.Duration  // how long it lived
	Stderr   []string       // the last lines of standard error, at most 20, safe to print

	sandbox *Sandbox
	cause   error // what made this package kill it, other than Stop
}

func (e *ExitError) Error() string {
	var b strings.Builder
	b.WriteString(e.Path + ": ")
	switch {
	case e.cause != nil:
		b.WriteString(e.cause.Error())
	case e.Signal != 0:
		fmt.Fprintf(&b, "killed by signal %d (%v)", int(e.Signal), e.Signal)
	default:
		b.WriteString(ptipc.ExitCode(e.Code).Error())
	}
	fmt.Fprintf(&b, " after %v", e.Duration.Round(time.Millisecond))
	if len(e.Stderr) > 0 {
		b.WriteString("; its last words on standard error:")
		for _, line := range e.Stderr {
			b.WriteString("\n\t" + line)
		}
		if hint := e.sandbox.Explain(strings.Join(e.Stderr, "\n")); hint != "" {
			b.WriteString("\n" + hint)
		}
	}
	return b.String()
}

// Unwrap returns the exit code, or what made this package kill the process.
func (e *ExitError) Unwrap() []error {
	switch {
	case e.cause != nil:
		return []error{e.cause}
	case e.Signal != 0:
		return nil
	}
	return []error{ptipc.ExitCode(e.Code)}
}
