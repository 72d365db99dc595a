package localnet

import (
	"errors"
	"io/fs"
	"os"

	"golang.org/x/sys/windows"
)

// errRefused is what connecting to a socket that nobody listens on gives.
const errRefused = windows.WSAECONNREFUSED

// temporaryErrors are what accepting gives when the one connection is gone or
// something has run out.
var temporaryErrors = []error{
	windows.WSAECONNABORTED, windows.WSAECONNRESET, windows.WSAEMFILE, windows.WSAENOBUFS, windows.WSAEINTR,
}

func ownerOf(fs.FileInfo) (uint32, bool) { return 0, false }

func linked(fs.FileInfo) bool { return false }

// tryLock takes an exclusive lock that ends with the open file. It does not wait.
func tryLock(f *os.File) (bool, error) {
	raw, err := f.SyscallConn()
	if err != nil {
		return false, err
	}
	// Locked bytes cannot be read by others, so a byte beyond the number is locked.
	beyond := &windows.Overlapped{Offset: 1 << 30}
	if closed := raw.Control(func(fd uintptr) {
		err = windows.LockFileEx(windows.Handle(fd), windows.LOCKFILE_EXCLUSIVE_LOCK|windows.LOCKFILE_FAIL_IMMEDIATELY, 0, 1, 0, beyond)
	}); closed != nil {
		return false, closed
	}
	if errors.Is(err, windows.ERROR_LOCK_VIOLATION) || errors.Is(err, windows.ERROR_IO_PENDING) {
		return false, nil
	}
	return err == nil, err
}

// unlock leaves it to Close: a process that is being started inherits no handle.
func unlock(*os.File) error { return nil }

// exclusively runs f. Directories cannot be locked here: two processes that make
// the same socket in the same instant are not kept apart.
func (d *Dir) exclusively(f func() error) error { return f() }
