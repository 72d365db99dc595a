package localnet

import (
	"context"
	"errors"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// LIFE-8: the state directory keeps other users out.
func TestOpenDirRefuses(t *testing.T) {
	t.Parallel()
	base := t.TempDir()
	for _, mode := range []fs.FileMode{0o755, 0o750, 0o701, 0o710, 0o704, 0o777} {
		path := filepath.Join(base, mode.String())
		if err := os.Mkdir(path, 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(path, mode); err != nil { // whatever the umask is
			t.Fatal(err)
		}
		_, err := OpenDir(path)
		if !errors.Is(err, fs.ErrPermission) || !strings.Contains(err.Error(), "chmod 700") {
			t.Errorf("mode %v: %v; want a refusal with a remedy", mode, err)
		}
	}
	file := filepath.Join(base, "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := OpenDir(file); err == nil {
		t.Error("a regular file was opened as a directory")
	}
	if _, err := OpenDir(filepath.Join(base, "none")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a missing directory: %v", err)
	}
	path := privateDir(t)
	if _, err := OpenDir(path, otherUID); !errors.Is(err, fs.ErrPermission) || !strings.Contains(err.Error(), "chown") {
		t.Errorf("a directory of another user than asked for: %v", err)
	}
}

// A socket's path may have 108 bytes; the directory's may have more.
func TestLongPath(t *testing.T) {
	t.Parallel()
	path := privateDir(t)
	for range 4 {
		path = filepath.Join(path, strings.Repeat("long", 20))
		if err := os.Mkdir(path, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	d := openDir(t, path)
	name := strings.Repeat("n", maxName)
	l, err := d.Listen(name)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if got := l.Addr().String(); got != "unix:"+name {
		t.Errorf("the listener's address is %q", got)
	}
	info, err := os.Lstat(filepath.Join(path, name))
	if err != nil || info.Mode() != fs.ModeSocket|0o600 {
		t.Errorf("the socket is %v, %v; want mode 0600", info.Mode(), err)
	}

	client, server := pair(t, l, func() (net.Conn, error) { return d.Dial(t.Context(), name) })
	c, s := ClientName(client.LocalAddr()), ClientName(server.RemoteAddr())
	if c == "" || c != s { // STAT-3
		t.Errorf("the client's end is named %q by itself and %q by the server", c, s)
	}
	if n := ClientName(client.RemoteAddr()); n != "" {
		t.Errorf("the server's end is named %q", n)
	}

	// Renaming the directory changes nothing.
	if err := os.Rename(path, path+"2"); err != nil {
		t.Fatal(err)
	}
	pair(t, l, func() (net.Conn, error) { return d.Dial(t.Context(), name) })
	if err := l.Close(); err != nil {
		t.Error(err)
	}
	if _, err := os.Lstat(filepath.Join(path+"2", name)); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("after Close the socket is still there: %v", err)
	}
}

func TestListenLeavesOthersAlone(t *testing.T) {
	t.Parallel()
	path := privateDir(t)
	d := openDir(t, path)

	live, err := d.Listen("live")
	if err != nil {
		t.Fatal(err)
	}
	defer live.Close()
	full, err := d.Listen("full")
	if err != nil {
		t.Fatal(err)
	}
	defer full.Close()
	fillBacklog(t, d, full)

	for name, make := range map[string]func(path string) error{
		"file":      func(p string) error { return os.WriteFile(p, []byte("x"), 0o600) },
		"directory": func(p string) error { return os.Mkdir(p, 0o700) },
		"link":      func(p string) error { return os.Symlink("live", p) },
		"dangling":  func(p string) error { return os.Symlink("nowhere", p) },
		"outside":   func(p string) error { return os.Symlink("/etc/passwd", p) },
		"fifo":      func(p string) error { return unix.Mkfifo(p, 0o600) },
		"datagrams": func(p string) error {
			c, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: p, Net: "unixgram"})
			if err == nil {
				t.Cleanup(func() { c.Close() })
			}
			return err
		},
	} {
		if err := make(filepath.Join(path, name)); err != nil {
			t.Fatal(err)
		}
	}
	for name, want := range map[string]error{
		"live": syscall.EADDRINUSE, "full": syscall.EADDRINUSE,
		"file": fs.ErrExist, "directory": fs.ErrExist, "link": fs.ErrExist, "dangling": fs.ErrExist,
		"outside": fs.ErrExist, "fifo": fs.ErrExist, "datagrams": syscall.EPROTOTYPE,
	} {
		before, err := os.Lstat(filepath.Join(path, name))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := d.Listen(name); !errors.Is(err, want) {
			t.Errorf("Listen(%q): %v; want %v", name, err, want)
		}
		after, err := os.Lstat(filepath.Join(path, name))
		if err != nil || !os.SameFile(before, after) {
			t.Errorf("%q is not what it was: %v", name, err)
		}
	}
	for _, name := range []string{"", ".", "..", "a/b", "../a", "\x00", strings.Repeat("a", 65)} {
		if _, err := d.Listen(name); !errors.Is(err, ErrAddr) {
			t.Errorf("Listen(%q): %v", name, err)
		}
		if _, err := d.Dial(t.Context(), name); !errors.Is(err, ErrAddr) {
			t.Errorf("Dial(%q): %v", name, err)
		}
	}
	for name, want := range map[string]error{
		"link": fs.ErrInvalid, "outside": fs.ErrInvalid, "file": fs.ErrInvalid, "none": fs.ErrNotExist,
	} {
		if _, err := d.Dial(t.Context(), name); !errors.Is(err, want) {
			t.Errorf("Dial(%q): %v; want %v", name, err, want)
		}
	}
}

// fillBacklog makes the next connect to the listener fail with EAGAIN.
func fillBacklog(t *testing.T, d *Dir, l *Listener) {
	t.Helper()
	raw, err := l.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	if closed := raw.Control(func(fd uintptr) { err = unix.Listen(int(fd), 1) }); closed != nil || err != nil {
		t.Fatal(closed, err)
	}
	for {
		c, err := d.at.dial(t.Context(), l.name, "")
		if errors.Is(err, syscall.EAGAIN) {
			return
		}
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
	}
}

func TestStaleSocketIsReplaced(t *testing.T) {
	path := privateDir(t)
	d := openDir(t, path)
	dead, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(path, "s"), Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	dead.SetUnlinkOnClose(false)
	dead.Close()
	if _, err := d.Dial(t.Context(), "s"); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Fatalf("dialing a dead socket: %v", err)
	}
	l, err := d.Listen("s")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	pair(t, l, func() (net.Conn, error) { return d.Dial(t.Context(), "s") })
}

func TestCloseRemovesOnlyItsOwn(t *testing.T) {
	path := privateDir(t)
	d := openDir(t, path)
	l, err := d.Listen("s")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(filepath.Join(path, "s")); err != nil {
		t.Fatal(err)
	}
	second, err := d.Listen("s")
	if err != nil {
		t.Fatal(err)
	}
	if err := l.Close(); err != nil {
		t.Error(err)
	}
	if err := l.Close(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("a second Close: %v", err)
	}
	pair(t, second, func() (net.Conn, error) { return d.Dial(t.Context(), "s") })
	// A listener outlives its Dir, and still cleans up.
	if err := d.Close(); err != nil {
		t.Error(err)
	}
	if err := second.Close(); err != nil {
		t.Error(err)
	}
	if entries, err := os.ReadDir(path); err != nil || len(entries) != 0 {
		t.Errorf("left behind: %v, %v", entries, err)
	}
	if _, err := d.Listen("s"); !errors.Is(err, os.ErrClosed) {
		t.Errorf("Listen in a closed Dir: %v", err)
	}
	if _, err := d.Dial(t.Context(), "s"); !errors.Is(err, os.ErrClosed) {
		t.Errorf("Dial in a closed Dir: %v", err)
	}
}

// Of many who want one name at once, over a dead socket, one gets it, and keeps it.
func TestListenRace(t *testing.T) {
	path := privateDir(t)
	for range 20 {
		dead, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(path, "s"), Net: "unix"})
		if err != nil {
			t.Fatal(err)
		}
		dead.SetUnlinkOnClose(false)
		dead.Close()
		var group sync.WaitGroup
		won := make(chan *Listener, 8)
		for range cap(won) {
			group.Go(func() {
				d, err := OpenDir(path)
				if err != nil {
					t.Error(err)
					return
				}
				defer d.Close()
				l, err := d.Listen("s")
				if err == nil {
					won <- l
				} else if !errors.Is(err, syscall.EADDRINUSE) {
					t.Error(err)
				}
			})
		}
		group.Wait()
		close(won)
		if len(won) != 1 {
			t.Errorf("%d listeners have the name", len(won))
		}
		for l := range won {
			c, err := net.Dial("unix", filepath.Join(path, "s"))
			if err != nil {
				t.Error(err)
			} else {
				c.Close()
			}
			l.Close()
		}
	}
}

// A full backlog gives EAGAIN at once on a unix socket.
func TestDialWaitsForBacklog(t *testing.T) {
	t.Parallel()
	d := openDir(t, privateDir(t))
	l, err := d.Listen("s")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	fillBacklog(t, d, l)

	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(errors.New("enough"))
	if _, err := d.Dial(ctx, "s"); !errors.Is(err, context.Canceled) {
		t.Errorf("Dial with an ended context: %v", err)
	}

	ctx, stop := context.WithTimeout(t.Context(), 1)
	defer stop()
	if _, err := d.Dial(ctx, "s"); err == nil {
		t.Error("Dial got through a full backlog")
	}

	dialed := make(chan error, 1)
	go func() {
		c, err := d.Dial(t.Context(), "s")
		if err == nil {
			c.Close()
		}
		dialed <- err
	}()
	accepted := make(chan struct{})
	go func() {
		defer close(accepted)
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			c.Close()
		}
	}()
	if err := <-dialed; err != nil {
		t.Error(err)
	}
	l.Close()
	<-accepted
}

// 1,000 connects before the first accept, and everything is given back.
func TestBurst(t *testing.T) {
	path := privateDir(t)
	// The first socket of a process opens the runtime's poller, which stays.
	listenTCP(t, "127.0.0.1:0").Close()
	before := descriptors(t)
	d, err := OpenDir(path)
	if err != nil {
		t.Fatal(err)
	}
	l, err := d.Listen("s")
	if err != nil {
		t.Fatal(err)
	}
	const n = 1000
	clients := make([]net.Conn, n)
	var group sync.WaitGroup
	for i := range clients {
		group.Go(func() {
			c, err := d.Dial(t.Context(), "s")
			if err != nil {
				t.Error(err)
				return
			}
			clients[i] = c
		})
	}
	group.Wait()
	names := map[string]bool{}
	for _, c := range clients {
		if c == nil {
			continue
		}
		s, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		names[ClientName(s.RemoteAddr())] = true
		s.Close()
		c.Close()
	}
	if len(names) != n {
		t.Errorf("%d connections have %d names", n, len(names))
	}
	l.Close()
	d.Close()
	if after := descriptors(t); after != before {
		t.Errorf("%d descriptors before, %d after", before, after)
	}
}

// LIFE-8: one user of a state directory at a time.
func TestLock(t *testing.T) {
	t.Parallel()
	path := privateDir(t)
	d := openDir(t, path)
	holder := start(t, 0, "lock", path, "")
	if holder.line != "ok" {
		t.Fatal(holder.line)
	}
	var locked *LockedError
	err := d.Lock()
	if !errors.As(err, &locked) || locked.PID != holder.cmd.Process.Pid || locked.Path != path {
		t.Fatalf("a lock held by process %d: %v", holder.cmd.Process.Pid, err)
	}
	// A process that dies without a word releases its lock.
	if err := holder.cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_, _ = holder.cmd.Process.Wait()
	if err := d.Lock(); err != nil {
		t.Fatal(err)
	}
	if err := d.Lock(); err != nil {
		t.Errorf("a second Lock of the same Dir: %v", err)
	}
	// A second Dir of the same process is a second user, too.
	second := openDir(t, path)
	if err := second.Lock(); !errors.As(err, &locked) || locked.PID != os.Getpid() {
		t.Errorf("a lock of our own: %v", err)
	}
	// A process started meanwhile does not inherit it.
	child := start(t, 0, "listen", "tcp", "127.0.0.1:0")
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	if err := second.Lock(); err != nil {
		t.Errorf("after Close, with a child running: %v", err)
	}
	child.stop()
}

func TestLockFileIsNotOurs(t *testing.T) {
	t.Parallel()
	victim := filepath.Join(t.TempDir(), "victim")
	if err := os.WriteFile(victim, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, plant := range map[string]func(path string) error{
		"symlink outside": func(p string) error { return os.Symlink(victim, p) },
		"symlink inside":  func(p string) error { return os.Symlink("other", p) },
		"hard link":       func(p string) error { return os.Link(victim, p) },
		"fifo":            func(p string) error { return unix.Mkfifo(p, 0o600) },
		"directory":       func(p string) error { return os.Mkdir(p, 0o700) },
	} {
		path := privateDir(t)
		if err := plant(filepath.Join(path, lockName)); err != nil {
			t.Fatal(err)
		}
		d := openDir(t, path)
		if err := d.Lock(); err == nil {
			t.Errorf("%s: locked", name)
		}
	}
	if b, err := os.ReadFile(victim); err != nil || string(b) != "precious" {
		t.Errorf("the file that was linked to has %q, %v", b, err)
	}
}

// A host that runs as root makes sockets for a child of another user.
func TestListenForAnotherOwner(t *testing.T) {
	needRoot(t)
	t.Parallel()
	path := filepath.Join(publicDir(t), "d")
	if err := os.Mkdir(path, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Chown(path, otherUID, otherUID); err != nil {
		t.Fatal(err)
	}
	if _, err := OpenDir(path); !errors.Is(err, fs.ErrPermission) {
		t.Fatalf("another user's directory, not asked for: %v", err)
	}
	d, err := OpenDir(path, otherUID)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	l, err := d.Listen("s")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	info, err := os.Lstat(filepath.Join(path, "s"))
	if err != nil || info.Sys().(*syscall.Stat_t).Uid != otherUID || info.Mode().Perm() != 0o600 {
		t.Errorf("the socket is %+v, %v", info, err)
	}
	g := Guard(l, nil, otherUID)
	child := start(t, otherUID, "dir-dial", path, "s")
	if child.line != "ok" {
		t.Fatal(child.line)
	}
	c, err := g.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	cred, err := Peer(c)
	if err != nil || cred != (Cred{UID: otherUID, PID: child.cmd.Process.Pid}) {
		t.Errorf("the peer is %+v, %v", cred, err)
	}
	// The thread is root again: a new file is root's.
	file := filepath.Join(t.TempDir(), "f")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(file); err != nil || info.Sys().(*syscall.Stat_t).Uid != 0 {
		t.Errorf("a file made later is %+v, %v", info, err)
	}
}
