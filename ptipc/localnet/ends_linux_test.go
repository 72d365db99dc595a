package localnet

import (
	"net"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// endsOf makes the memory, for a host and, mapped a second time, for its child.
func endsOf(t *testing.T) (host, child *Ends) {
	t.Helper()
	host, file, err := NewEnds()
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	fd, err := unix.FcntlInt(file.Fd(), unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		t.Fatal(err)
	}
	if child, err = InheritEnds(fd); err != nil {
		t.Fatal(err)
	}
	if _, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); err == nil {
		t.Error("the inherited descriptor is still open")
	}
	return host, child
}

// Both ends of a connection see what the other one marks, and nothing else (SOCKS-20).
func TestEnds(t *testing.T) {
	host, child := endsOf(t)
	dir := openDir(t, privateDir(t))
	l, err := dir.Listen("s")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	var ours, theirs []*End
	for range 3 {
		conn, end, err := dir.DialEnd(t.Context(), "s", host)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		accepted, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		defer accepted.Close()
		if c, s := ClientName(conn.LocalAddr()), ClientName(accepted.RemoteAddr()); c == "" || c != s { // STAT-3
			t.Errorf("the client's end is named %q by itself and %q by the server", c, s)
		}
		ours, theirs = append(ours, end), append(theirs, child.Accepted(accepted.RemoteAddr()))
	}
	look := func(when string, want [3][2]bool) {
		t.Helper()
		for i, w := range want {
			if got := [2]bool{theirs[i].Marked(), ours[i].Marked()}; got != w {
				t.Errorf("%s: connection %d: the host's end is marked: %t, the child's: %t", when, i, got[0], got[1])
			}
		}
	}
	look("at first", [3][2]bool{})
	ours[0].Mark()
	theirs[1].Mark()
	look("after one mark each", [3][2]bool{{true, false}, {false, true}, {}})
	theirs[0].Mark()
	theirs[0].Mark()
	look("after a second", [3][2]bool{{true, true}, {false, true}, {}})

	// The slot is taken by another connection, and an end of the first comes late.
	ours[2].Release()
	next := host.dialing()
	if next.slot != ours[2].slot {
		t.Fatalf("slot %d is not used again, but %d", ours[2].slot, next.slot)
	}
	theirs[2].Mark()
	ours[2].Mark()
	if next.Marked() || child.Accepted(&net.UnixAddr{Name: "@" + next.name(), Net: "unix"}).Marked() {
		t.Error("a late end has marked another connection")
	}
	next.Mark()
	if theirs[2].Marked() {
		t.Error("a connection takes the mark of another for its own")
	}
}

// Without a free slot, and without memory, a connection has no ends.
func TestEndsAreFull(t *testing.T) {
	host, child := endsOf(t)
	dir := openDir(t, privateDir(t))
	l, err := dir.Listen("s")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	var last *End
	for range maxEnds {
		if last = host.dialing(); last == nil {
			t.Fatal("there is less room than there should be")
		}
	}
	for _, ends := range []*Ends{host, nil} {
		conn, end, err := dir.DialEnd(t.Context(), "s", ends)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		accepted, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		defer accepted.Close()
		if end != nil || child.Accepted(accepted.RemoteAddr()) != nil {
			t.Error("a connection without a slot has ends")
		}
		end.Release()
	}
	last.Release()
	if _, _, err := dir.DialEnd(t.Context(), "nobody", host); err == nil {
		t.Error("somebody listens where nobody does")
	}
	if host.dialing() == nil {
		t.Error("the slot of a dial that failed is lost")
	}
}

// Whatever a client has bound, nothing outside of the memory is touched.
func TestEndsOfStrangers(t *testing.T) {
	_, child := endsOf(t)
	for _, addr := range []net.Addr{
		nil, &net.TCPAddr{}, &net.UnixAddr{}, &net.UnixAddr{Name: "@0a1b2", Net: "unix"},
		&net.UnixAddr{Name: "@00000000000000000000g", Net: "unix"}, &net.UnixAddr{Name: "@0000000000000000000g", Net: "unix"},
		&net.UnixAddr{Name: "/0000000000000000000a", Net: "unix"}, &net.UnixAddr{Name: "@-000000000000000000a", Net: "unix"},
	} {
		if end := child.Accepted(addr); end != nil {
			t.Errorf("%v has an end", addr)
		}
	}
	last := child.Accepted(&net.UnixAddr{Name: "@ffffffffffffffffffff", Net: "unix"})
	last.Mark()
	last.Release() // it is not ours to give
	if last.Marked() || child.dialing().slot != 0 {
		t.Error("a name that nobody gave has an effect")
	}
}

// A child cannot take the memory away from under the host, and takes no other
// descriptor for it.
func TestEndsAreSealed(t *testing.T) {
	_, file, err := NewEnds()
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	for _, size := range []int64{0, endsSize - 1, endsSize + 1} {
		if err := file.Truncate(size); err == nil {
			t.Errorf("truncated to %d", size)
		}
	}
	path := filepath.Join(t.TempDir(), "file")
	other, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	if err := other.Truncate(endsSize); err != nil {
		t.Fatal(err)
	}
	unsealed, err := unix.MemfdCreate("unsealed", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(unsealed)
	for what, fd := range map[string]int{"a file": int(other.Fd()), "unsealed memory": unsealed, "nothing": 1 << 20} {
		if _, err := InheritEnds(fd); err == nil {
			t.Errorf("%s is taken for the host's memory", what)
		}
	}
	if _, err := other.Stat(); err != nil {
		t.Errorf("a descriptor that was refused is closed: %v", err)
	}
}

// What the marks cost for each connection, in both processes together, beside its
// system calls.
func BenchmarkEnds(b *testing.B) {
	host, file, err := NewEnds()
	if err != nil {
		b.Fatal(err)
	}
	defer file.Close()
	for b.Loop() {
		ours := host.dialing()
		theirs := host.Accepted(&net.UnixAddr{Name: "@" + ours.name(), Net: "unix"})
		ours.Mark()
		theirs.Mark()
		if !ours.Marked() || !theirs.Marked() {
			b.Fatal("a mark is missing")
		}
		ours.Release()
	}
}
