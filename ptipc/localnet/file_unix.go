//go:build unix

package localnet

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// errRefused is what connecting to a socket that nobody listens on gives.
const errRefused = unix.ECONNREFUSED

// temporaryErrors are what accepting gives when the one connection is gone or
// something has run out.
var temporaryErrors = []error{
	unix.ECONNABORTED, unix.EMFILE, unix.ENFILE, unix.ENOBUFS, unix.ENOMEM, unix.EPROTO, unix.EINTR,
}

func ownerOf(info fs.FileInfo) (uint32, bool) {
	stat, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		return 0, false
	}
	return stat.Uid, true
}

// linked reports whether a file has a second name, perhaps in another directory.
func linked(info fs.FileInfo) bool {
	stat, ok := info.Sys().(*syscall.Stat_t)
	return !ok || stat.Nlink != 1
}

// tryLock takes an exclusive lock that ends with the open file. It does not wait.
func tryLock(f *os.File) (bool, error) {
	raw, err := f.SyscallConn()
	if err != nil {
		return false, err
	}
	if closed := raw.Control(func(fd uintptr) { err = unix.Flock(int(fd), unix.LOCK_EX|unix.LOCK_NB) }); closed != nil {
		return false, closed
	}
	if errors.Is(err, unix.EWOULDBLOCK) {
		return false, nil
	}
	return err == nil, err
}

// unlock ends a lock at once. Closing alone would leave it to a process that is
// being started just now, until that executes its program.
func unlock(f *os.File) error {
	raw, err := f.SyscallConn()
	if err != nil {
		return err
	}
	if closed := raw.Control(func(fd uintptr) { err = unix.Flock(int(fd), unix.LOCK_UN) }); closed != nil {
		return closed
	}
	return err
}

// exclusively runs f while nobody else makes a socket in the directory, so that
// a socket that is bound but does not listen yet is not taken for a dead one.
// The wait is bounded: whoever may open the directory may lock it for ever.
func (d *Dir) exclusively(f func() error) error {
	dir, err := d.root.Open(".")
	if err != nil {
		return err
	}
	defer dir.Close()
	for deadline := time.Now().Add(5 * time.Second); ; time.Sleep(time.Millisecond) {
		taken, err := tryLock(dir)
		if err != nil {
			return err
		}
		if taken {
			defer unlock(dir) //nolint:errcheck // closing it ends the lock, too
			return f()
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("another process keeps the directory locked: %w", os.ErrDeadlineExceeded)
		}
	}
}
