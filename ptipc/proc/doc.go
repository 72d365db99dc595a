// Package proc runs one child process, talks lines with it, and leaves nothing
// behind. It knows processes and lines, not what the lines mean.
//
//	child, err := proc.Start(ctx, proc.Spec{
//		Path: "/usr/lib/pt/pt-example",
//		Args: []string{`{"server":"192.0.2.1:443"}`},
//		Dir:  "/var/lib/pt/example",
//		OnLine: func(line []byte, truncated bool) {
//			if !truncated {
//				announcements <- string(line)
//			}
//		},
//	})
//	if err != nil {
//		return err // names the file and the remedy
//	}
//	defer child.Stop(context.WithoutCancel(ctx))
//	select {
//	case a := <-announcements:
//		return use(a)
//	case <-child.Done():
//		return child.Err() // exit code or signal, and its last words
//	}
//
// # What is killed, and when
//
// When the child ends, by itself or by [Process.Stop], what it has started is killed
// too, and when this process ends, even by SIGKILL, all of them are. The system
// decides how far that reaches:
//
//   - POSIX: a small shell leads the child's process group and holds the read end of
//     a pipe, the lifeline; at its end it kills the group. A descendant that makes a
//     group or a session of its own gets away.
//   - Linux with [Spec.Launcher]: a launcher, this program run again, adopts orphans
//     and kills every descendant, whatever its group or session. It also sets
//     no_new_privs: set-user-ID programs give the child no privileges.
//   - Windows: a job object. A descendant cannot leave it.
//
// A child that runs as the same user can always kill its watchdog or launcher. It
// is killed then, with its group. A program that is process 1 of a container does
// well to use a launcher, because orphans become its own children otherwise and
// nobody reaps them.
//
// The package is tested on Linux. On macOS and Windows it has been compiled and
// vetted, and never run; on Windows the deadlines of WriteLine do not work, since
// pipes have none there, and SIGTERM is a CTRL_BREAK event. On other POSIX systems
// [Process.Pids] is not supported.
package proc
