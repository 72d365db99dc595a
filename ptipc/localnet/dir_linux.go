package localnet

import (
	"context"
	"fmt"
	"io/fs"
	"net"
	"os"
	"runtime"
	"strconv"
	"syscall"

	"golang.org/x/sys/unix"
)

// fdPath leads to what an open descriptor refers to. A socket's path is limited
// to 108 bytes; this one is short however long the directory's own is.
const fdPath = "/proc/self/fd/"

type socketDir struct {
	file  *os.File
	raw   syscall.RawConn // keeps the descriptor open, and its number ours, while it is in use
	owner uint32
}

func openSocketDir(d *Dir) (socketDir, error) {
	f, err := d.root.Open(".")
	if err != nil {
		return socketDir{}, fmt.Errorf("localnet: open directory %s: %w", d.path, err)
	}
	raw, err := f.SyscallConn()
	if err == nil {
		_, err = os.Stat(fdPath)
	}
	if err != nil {
		f.Close()
		return socketDir{}, fmt.Errorf("localnet: open directory %s: sockets in it need /proc; mount it: %w", d.path, err)
	}
	return socketDir{file: f, raw: raw, owner: d.owner}, nil
}

func (s socketDir) close() error { return s.file.Close() }

// use runs f with the descriptor of the directory.
func (s socketDir) use(f func(fd int) error) (err error) {
	if closed := s.raw.Control(func(fd uintptr) { err = f(int(fd)) }); closed != nil {
		return os.ErrClosed
	}
	return err
}

func (s socketDir) listen(name string) (l *net.UnixListener, err error) {
	err = s.use(func(fd int) error {
		if int(s.owner) != os.Geteuid() {
			// The owner, who will connect, must own the socket. A chown afterwards
			// could be made to hit another file, so it is born with its owner.
			runtime.LockOSThread()
			defer runtime.UnlockOSThread()
			if err := unix.Setfsuid(int(s.owner)); err != nil {
				return err
			}
			defer unix.Setfsuid(os.Geteuid()) //nolint:errcheck // a thread may always return to its effective uid
		}
		// The mode set before bind is the file's from its first moment.
		config := net.ListenConfig{Control: onSocket(func(fd int) error { return unix.Fchmod(fd, 0o600) })}
		listener, err := config.Listen(context.Background(), "unix", fdPath+strconv.Itoa(fd)+"/"+name)
		if err != nil {
			return err
		}
		l = listener.(*net.UnixListener)
		return nil
	})
	return l, err
}

// sendBuffer is the size in bytes, before the kernel doubles it, of what may be on its
// way to the server. With the default a relay at the other end gets some 100 KB at a
// time at most, and needs half again as much CPU for each byte.
const sendBuffer = 1 << 20

// prepare gives the client's socket a name, by which the server can speak of the
// connection, and room for bulk. "" is a name of the kernel's choice.
func prepare(name string) func(network, address string, c syscall.RawConn) error {
	var sa unix.SockaddrUnix
	if name != "" {
		sa.Name = "@" + name // in the abstract space
	}
	return onSocket(func(fd int) error {
		_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUF, sendBuffer) // without it bulk is only slower
		return unix.Bind(fd, &sa)
	})
}

func (s socketDir) dial(ctx context.Context, name, as string) (c *net.UnixConn, err error) {
	err = s.use(func(fd int) error {
		// Connecting through a descriptor of the socket itself: what was looked at
		// is what is connected to, and a link to a socket elsewhere is not followed.
		socket, err := unix.Openat(fd, name, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(socket)
		var stat unix.Stat_t
		if err := unix.Fstat(socket, &stat); err != nil {
			return err
		}
		if stat.Mode&unix.S_IFMT != unix.S_IFSOCK {
			return fmt.Errorf("the file is not a socket: %w", fs.ErrInvalid)
		}
		dialer := net.Dialer{Control: prepare(as)}
		conn, err := dialer.DialContext(ctx, "unix", fdPath+strconv.Itoa(socket))
		if err != nil {
			return err
		}
		c = conn.(*net.UnixConn)
		return nil
	})
	return c, err
}

// onSocket is f in the form of the net package's Control hooks.
func onSocket(f func(fd int) error) func(network, address string, c syscall.RawConn) error {
	return func(_, _ string, c syscall.RawConn) (err error) {
		if closed := c.Control(func(fd uintptr) { err = f(int(fd)) }); closed != nil {
			return closed
		}
		return err
	}
}
