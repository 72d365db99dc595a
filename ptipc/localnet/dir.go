package localnet

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

// lockName is the file that [Dir.Lock] locks. It is left in place: removing a
// lock file lets two processes hold locks on two files of one name.
const lockName = ".lock"

// A Dir is an open private directory in which unix sockets are made and found.
// It is bound to the directory itself, not to its path, where the system allows
// that: on Linux the directory may be renamed, and its path be of any length.
// Its methods may be called at once by several goroutines.
type Dir struct {
	path  string
	root  *os.Root
	owner uint32
	at    socketDir // how the system names a socket in this directory

	mu   sync.Mutex
	lock *os.File
}

// OpenDir opens the directory at path. It is an error if it is not a directory,
// belongs to somebody else than owner (by default the effective user), or gives
// any permission to group or others (LIFE-8). On windows neither is checked: the
// directory's access control list is up to who made it.
func OpenDir(path string, owner ...uint32) (*Dir, error) {
	want := uint32(os.Geteuid())
	switch len(owner) {
	case 0:
	case 1:
		want = owner[0]
	default:
		return nil, fmt.Errorf("localnet: open %s: %d owners given, a directory has one", path, len(owner))
	}
	abs, err := filepath.Abs(path)
	if err != nil {
		return nil, fmt.Errorf("localnet: open directory: %w", err)
	}
	root, err := os.OpenRoot(abs)
	if err != nil {
		return nil, fmt.Errorf("localnet: open directory: %w", err)
	}
	d := &Dir{path: abs, root: root, owner: want}
	if err := d.check(); err != nil {
		root.Close()
		return nil, err
	}
	if d.at, err = openSocketDir(d); err != nil {
		root.Close()
		return nil, err
	}
	return d, nil
}

// check looks at what was opened, not at the path, which may change.
func (d *Dir) check() error {
	info, err := d.root.Stat(".")
	if err != nil {
		return fmt.Errorf("localnet: open directory %s: %w", d.path, err)
	}
	owner, ok := ownerOf(info)
	if !ok {
		return nil // the system has no such owners and modes
	}
	if owner != d.owner {
		return fmt.Errorf("localnet: directory %s belongs to uid %d, not to uid %d; chown it or use another: %w",
			d.path, owner, d.owner, fs.ErrPermission)
	}
	if mode := info.Mode().Perm(); mode&0o077 != 0 {
		return fmt.Errorf("localnet: directory %s has mode %04o, which lets other users in; run chmod 700 on it: %w",
			d.path, mode, fs.ErrPermission)
	}
	return nil
}

// Path is the absolute path that the directory was opened by.
func (d *Dir) Path() string { return d.path }

// Close releases the lock, if it is held, and the directory. Listeners and
// connections live on.
func (d *Dir) Close() error {
	d.mu.Lock()
	lock := d.lock
	d.lock = nil
	d.mu.Unlock()
	var err error
	if lock != nil {
		err = errors.Join(unlock(lock), lock.Close())
	}
	return errors.Join(err, d.at.close(), d.root.Close())
}

// A Listener is a listening unix socket in a [Dir]. Accept returns exactly
// [*net.UnixConn].
type Listener struct {
	*net.UnixListener
	name string
	root *os.Root    // its own: the Dir may be closed first
	file fs.FileInfo // the socket that was made
	once sync.Once
}

// Addr is the address as a control line carries it, an [Addr].
func (l *Listener) Addr() net.Addr { return Addr{name: l.name} }

// Close stops listening and removes the socket, unless something else has taken
// its name.
func (l *Listener) Close() error {
	err := l.UnixListener.Close()
	l.once.Do(func() {
		if info, e := l.root.Lstat(l.name); e == nil && os.SameFile(info, l.file) {
			err = errors.Join(err, l.root.Remove(l.name))
		}
		err = errors.Join(err, l.root.Close())
	})
	return err
}

// Listen makes the socket NAME of unix:NAME, for the directory's owner alone. A
// socket of this name that nobody listens on any more is replaced; one that
// somebody does listen on ([syscall.EADDRINUSE]) and a file of any other kind
// ([fs.ErrExist]) are errors and are left alone.
func (d *Dir) Listen(name string) (*Listener, error) {
	if err := checkName(name); err != nil {
		return nil, err
	}
	var l *Listener
	err := d.exclusively(func() error {
		if err := d.removeStale(name); err != nil {
			return err
		}
		var err error
		l, err = d.bind(name)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("localnet: listen on unix:%s in %s: %w", name, d.path, err)
	}
	return l, nil
}

// bind makes the socket; nothing else in the directory has its name.
func (d *Dir) bind(name string) (*Listener, error) {
	root, err := d.root.OpenRoot(".")
	if err != nil {
		return nil, err
	}
	listener, err := d.at.listen(name)
	if err != nil {
		root.Close()
		return nil, reason(err)
	}
	// The net package would remove whatever has the path by then.
	listener.SetUnlinkOnClose(false)
	l := &Listener{UnixListener: listener, name: name, root: root}
	if l.file, err = root.Lstat(name); err != nil {
		listener.Close()
		root.Close()
		return nil, err
	}
	return l, nil
}

// removeStale removes a socket that nobody listens on.
func (d *Dir) removeStale(name string) error {
	info, err := d.root.Lstat(name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if info.Mode().Type() != fs.ModeSocket {
		return fmt.Errorf("a file of another kind (%s) has this name; remove it or use another name: %w", info.Mode().Type(), fs.ErrExist)
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	c, err := d.at.dial(ctx, name, "")
	if err == nil {
		c.Close()
	}
	if err == nil || errors.Is(err, syscall.EAGAIN) { // EAGAIN: its backlog is full
		return fmt.Errorf("another process listens there; stop it or use another name: %w", syscall.EADDRINUSE)
	}
	if !errors.Is(err, errRefused) {
		return fmt.Errorf("cannot tell whether the socket there is in use; remove it if it is not: %w", reason(err))
	}
	if err := d.root.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// Dial connects to the socket NAME of unix:NAME. A symbolic link is not
// followed. While the listener's backlog is full, Dial tries again until ctx
// ends. On Linux the connection has a [ClientName].
func (d *Dir) Dial(ctx context.Context, name string) (*net.UnixConn, error) {
	return d.dial(ctx, name, "")
}

// DialEnd is Dial with an end for the connection, which is to be released when the
// connection is closed. The end is nil if ends is, or if it has no more room.
func (d *Dir) DialEnd(ctx context.Context, name string, ends *Ends) (*net.UnixConn, *End, error) {
	var end *End
	if ends != nil {
		end = ends.dialing()
	}
	if end == nil {
		c, err := d.dial(ctx, name, "")
		return c, nil, err
	}
	c, err := d.dial(ctx, name, end.name())
	if err != nil {
		end.Release()
		return nil, nil, err
	}
	return c, end, nil
}

// dial gives the client's socket the abstract name as, or one of the kernel's choice.
func (d *Dir) dial(ctx context.Context, name, as string) (*net.UnixConn, error) {
	if err := checkName(name); err != nil {
		return nil, err
	}
	c, err := d.at.dial(ctx, name, as)
	// A full backlog is EAGAIN at once on a unix socket, never a wait.
	for pause := time.Millisecond; errors.Is(err, syscall.EAGAIN); pause = min(2*pause, 64*time.Millisecond) {
		timer := time.NewTimer(pause)
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return nil, fmt.Errorf("localnet: dial unix:%s in %s: the listener accepts too slowly and its backlog is full: %w", name, d.path, ctx.Err())
		}
		c, err = d.at.dial(ctx, name, as)
	}
	if err != nil {
		return nil, fmt.Errorf("localnet: dial unix:%s in %s: %w", name, d.path, reason(err))
	}
	return c, nil
}

// reason drops the address from an error of the net package: it names a
// descriptor of this process, which tells a reader nothing.
func reason(err error) error {
	var op *net.OpError
	if errors.As(err, &op) {
		return op.Err
	}
	return err
}

// A LockedError says that another process uses the directory.
type LockedError struct {
	Path string // the directory
	PID  int    // who holds the lock; 0 if it is not known
}

func (e *LockedError) Error() string {
	who := "another process"
	if e.PID != 0 {
		who = fmt.Sprintf("process %d", e.PID)
	}
	return fmt.Sprintf("localnet: directory %s is in use by %s; stop that or use another directory", e.Path, who)
}

// Lock takes the directory for this Dir alone until Close or the end of the
// process. If another has it, the error is a [*LockedError]. Only those who call
// Lock are kept out. Children do not inherit the lock. A second call does nothing. (LIFE-8)
func (d *Dir) Lock() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.lock != nil {
		return nil
	}
	f, err := d.openLock()
	if err != nil {
		return fmt.Errorf("localnet: lock directory %s: %w", d.path, err)
	}
	taken, err := tryLock(f)
	if err != nil {
		f.Close()
		return fmt.Errorf("localnet: lock directory %s: %w", d.path, err)
	}
	if !taken {
		defer f.Close()
		return &LockedError{Path: d.path, PID: readPID(f)}
	}
	// The number is for people only: the lock is what counts.
	if err = f.Truncate(0); err == nil {
		_, err = f.WriteAt([]byte(strconv.Itoa(os.Getpid())+"\n"), 0)
	}
	if err != nil {
		f.Close()
		return fmt.Errorf("localnet: lock directory %s: %w", d.path, err)
	}
	d.lock = f
	return nil
}

// openLock opens the lock file, making it if need be. The directory may belong
// to a less trusted user than ours, who could have put a link there to make us
// write into a file of ours.
func (d *Dir) openLock() (*os.File, error) {
	f, err := d.root.OpenFile(lockName, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	opened, err := f.Stat()
	if err != nil {
		f.Close()
		return nil, err
	}
	named, err := d.root.Lstat(lockName)
	if err != nil {
		f.Close()
		return nil, err
	}
	if !named.Mode().IsRegular() || !os.SameFile(opened, named) || linked(opened) {
		f.Close()
		return nil, fmt.Errorf("%s is not a plain file of its own; remove it: %w", lockName, fs.ErrExist)
	}
	return f, nil
}

func readPID(f *os.File) int {
	var b [16]byte
	n, _ := f.ReadAt(b[:], 0)
	pid, err := strconv.Atoi(strings.TrimSpace(string(b[:n])))
	if err != nil || pid < 0 {
		return 0
	}
	return pid
}
