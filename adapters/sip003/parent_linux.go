package sip003

import (
	"context"
	"errors"
	"os"

	"golang.org/x/sys/unix"
)

// parentGone returns a channel that is closed when the process with this id has ended,
// or ctx has. A pidfd tells at once, without polling, and cannot mean another process;
// the parent's death signal (prctl) would come when merely the thread ends that
// started us.
func parentGone(ctx context.Context, parent int) <-chan struct{} {
	fd, err := unix.PidfdOpen(parent, unix.PIDFD_NONBLOCK)
	if err != nil { // it is gone, or the kernel is older than 5.10, or a sandbox forbids it
		return pollParent(ctx, parent)
	}
	gone := make(chan struct{})
	file := os.NewFile(uintptr(fd), "pidfd")
	stop := context.AfterFunc(ctx, func() { _ = file.Close() }) // ends the wait
	go func() {
		defer close(gone)
		if raw, err := file.SyscallConn(); err == nil {
			_ = raw.Read(ended) // an error is the end of ctx
		}
		if stop() {
			_ = file.Close() // nothing was written
		}
	}()
	if os.Getppid() != parent { // it ended before it could be watched, and its id may be another's
		_ = file.Close()
	}
	return gone
}

// ended reports whether the process of a pidfd has ended.
func ended(pidfd uintptr) bool {
	for {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}, 0)
		if !errors.Is(err, unix.EINTR) {
			return n > 0 || err != nil
		}
	}
}
