package localnet

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func listenTCP(t *testing.T, addr string) *net.TCPListener {
	t.Helper()
	l, err := ListenTCP(addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

// LIFE-11: what other machines can reach is not listened on.
func TestListenTCPRefuses(t *testing.T) {
	for _, addr := range []string{"", ":0", "0.0.0.0:0", "[::]:0", "localhost:0", "192.0.2.1:0", "[::ffff:127.0.0.1]:0", "unix:a"} {
		if l, err := ListenTCP(addr); !errors.Is(err, ErrAddr) {
			t.Errorf("ListenTCP(%q) = %v, %v", addr, l, err)
		}
	}
	l := listenTCP(t, "127.0.0.1:0")
	if _, err := ListenTCP(l.Addr().String()); !errors.Is(err, unix.EADDRINUSE) {
		t.Errorf("an address in use: %v", err)
	}
	if _, err := ParseAddr(l.Addr().String()); err != nil {
		t.Errorf("a listener's address cannot be announced: %v", err)
	}
}

func TestDialTCP(t *testing.T) {
	l := listenTCP(t, "127.0.0.1:0")
	addr, err := ParseAddr(l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	client, server := pair(t, l, func() (net.Conn, error) { return DialTCP(t.Context(), addr) })
	if c, s := ClientName(client.LocalAddr()), ClientName(server.RemoteAddr()); c == "" || c != s { // STAT-3
		t.Errorf("the client's end is named %q by itself and %q by the server", c, s)
	}
	for _, a := range []Addr{{}, {name: "a"}} {
		if _, err := DialTCP(t.Context(), a); !errors.Is(err, ErrAddr) {
			t.Errorf("DialTCP(%q): %v", a, err)
		}
	}
	l.Close()
	if _, err := DialTCP(t.Context(), addr); !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("nobody listens: %v", err)
	}
}

// listeners are the ways a child can be reached, made by uid 0 or whoever runs the tests.
func listeners(t *testing.T) map[string]net.Listener {
	t.Helper()
	path := filepath.Join(publicDir(t), "s")
	socket, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { socket.Close() })
	if err := os.Chmod(path, 0o777); err != nil { // everybody may connect
		t.Fatal(err)
	}
	dual, err := net.Listen("tcp", "[::]:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { dual.Close() })
	// The net package's listeners are MPTCP ones where the kernel has it.
	multipath, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { multipath.Close() })
	return map[string]net.Listener{
		"unix":      socket,
		"tcp4":      listenTCP(t, "127.0.0.1:0"),
		"tcp4 far":  listenTCP(t, "127.3.2.1:0"),
		"tcp6":      listenTCP(t, "[::1]:0"),
		"multipath": multipath,
		"dual":      dual,
	}
}

// dialable is an address that a client on this machine would use.
func dialable(a net.Addr) string {
	if tcp, ok := a.(*net.TCPAddr); ok && tcp.IP.IsUnspecified() {
		return fmt.Sprintf("127.0.0.1:%d", tcp.Port)
	}
	return a.String()
}

func TestPeerIsUs(t *testing.T) {
	t.Parallel()
	want := uint32(os.Geteuid())
	for name, l := range listeners(t) {
		_, server := pair(t, l, func() (net.Conn, error) { return net.Dial(l.Addr().Network(), dialable(l.Addr())) })
		cred, err := Peer(server)
		if err != nil || cred.UID != want {
			t.Errorf("%s: %+v, %v; want uid %d", name, cred, err, want)
		}
		if name == "unix" && cred.PID != os.Getpid() {
			t.Errorf("unix: process %d, want %d", cred.PID, os.Getpid())
		}
		if !Supported(l.Addr().Network()) {
			t.Errorf("%s is not supported", name)
		}
	}
}

// SOCKS-17, over every kind of socket.
func TestOtherUserIsRefused(t *testing.T) {
	needRoot(t)
	t.Parallel()
	for name, l := range listeners(t) {
		t.Run(name, func(t *testing.T) {
			log := &lines{}
			g := Guard(l, log.logger())
			other := start(t, otherUID, "dial", l.Addr().Network(), dialable(l.Addr()))
			if other.line != "ok" {
				t.Fatal(other.line)
			}
			// Accept passes the other user by and returns the one who follows.
			client, server := pair(t, g, func() (net.Conn, error) { return net.Dial(l.Addr().Network(), dialable(l.Addr())) })
			if server.RemoteAddr().String() != client.LocalAddr().String() {
				t.Errorf("accepted %s, want %s", server.RemoteAddr(), client.LocalAddr())
			}
			if g.Refused() != 1 {
				t.Errorf("%d refused, want 1", g.Refused())
			}
			if got := log.String(); !strings.Contains(got, fmt.Sprintf("uid %d", otherUID)) || !strings.Contains(got, "count=1") {
				t.Errorf("the log says %q", got)
			}
			// Asked for, the other user is let in.
			both := Guard(l, nil, uint32(os.Geteuid()), otherUID)
			second := start(t, otherUID, "dial", l.Addr().Network(), dialable(l.Addr()))
			if second.line != "ok" {
				t.Fatal(second.line)
			}
			c, err := both.Accept()
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			if cred, err := Peer(c); err != nil || cred.UID != otherUID {
				t.Errorf("the peer is %+v, %v", cred, err)
			}
		})
	}
}

// A closed TCP socket has no owner any more; the kernel says uid 0 of some.
func TestPeerThatLeftIsNotRoot(t *testing.T) {
	uid := uint32(0)
	if os.Getuid() == 0 {
		uid = otherUID // as root, the mistake would let in another user
	}
	for _, addr := range []string{"127.0.0.1:0", "[::1]:0"} {
		l := listenTCP(t, addr)
		other := start(t, uid, "dial-and-leave", "tcp", l.Addr().String())
		if other.line != "ok" {
			t.Fatal(other.line)
		}
		c, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		conn := c.(*net.TCPConn)
		gone := func(state string) {
			t.Helper()
			if cred, err := Peer(conn); !errors.Is(err, ErrPeerGone) {
				t.Errorf("%s, %s: %+v, %v; want ErrPeerGone", addr, state, cred, err)
			}
		}
		ends := func() (netip.AddrPort, netip.AddrPort) {
			local, remote, err := loopbackEnds(conn)
			if err != nil {
				t.Fatal(err)
			}
			return remote, local
		}

		gone("orphaned")
		if sock, err := diag.lookup(ends()); err != nil || sock.inode != 0 {
			t.Errorf("an orphaned socket is shown as %+v, %v: the trap is another one by now", sock, err)
		}
		// What was sent is there to be read: it must not be taken for root's.
		if b, err := io.ReadAll(conn); err != nil || string(b) != "secrets" {
			t.Errorf("%q, %v", b, err)
		}
		if err := conn.CloseWrite(); err != nil {
			t.Fatal(err)
		}
		gone("in TIME_WAIT")
		if sock, err := diag.lookup(ends()); err != nil || sock.inode != 0 || sock.uid != 0 {
			t.Errorf("a socket in TIME_WAIT is shown as %+v, %v: the trap is another one by now", sock, err)
		}

		// The same through the guard: nobody is let in.
		g := Guard(l, nil)
		other = start(t, uid, "dial-and-leave", "tcp", l.Addr().String())
		if other.line != "ok" {
			t.Fatal(other.line)
		}
		client, server := pair(t, g, func() (net.Conn, error) { return net.Dial("tcp", l.Addr().String()) })
		if server.RemoteAddr().String() != client.LocalAddr().String() || g.Refused() != 1 {
			t.Errorf("accepted %s, want %s; %d refused, want 1", server.RemoteAddr(), client.LocalAddr(), g.Refused())
		}
	}
}

// After a reset, whoever takes the client's port is not the client.
func TestPeerAfterReset(t *testing.T) {
	l := listenTCP(t, "127.0.0.1:0")
	// From an address of its own, so that no other program takes the port meanwhile.
	dialer := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 66, 0, 1)}}
	client, server := pair(t, l, func() (net.Conn, error) { return dialer.Dial("tcp", l.Addr().String()) })
	if err := client.(*net.TCPConn).SetLinger(0); err != nil {
		t.Fatal(err)
	}
	port := client.LocalAddr().String()
	client.Close()
	if cred, err := Peer(server); !errors.Is(err, ErrPeerGone) {
		t.Errorf("after a reset: %+v, %v", cred, err)
	}
	// A listener on that port is what the kernel falls back to.
	l2 := listenTCP(t, port)
	if cred, err := Peer(server); !errors.Is(err, ErrPeerGone) {
		t.Errorf("a listener on the client's port: %+v, %v", cred, err)
	}
	l2.Close()
	// And here is a whole new connection with the same two addresses.
	dialer.LocalAddr = client.LocalAddr()
	_, second := pair(t, l, func() (net.Conn, error) { return dialer.Dial("tcp", l.Addr().String()) })
	if second.RemoteAddr().String() != server.RemoteAddr().String() {
		t.Fatalf("the new connection comes from %s, not from %s", second.RemoteAddr(), server.RemoteAddr())
	}
	if cred, err := Peer(server); !errors.Is(err, ErrPeerGone) {
		t.Errorf("the old connection, under the new one's addresses: %+v, %v", cred, err)
	}
	if cred, err := Peer(second); err != nil || cred.UID != uint32(os.Geteuid()) {
		t.Errorf("the new connection: %+v, %v", cred, err)
	}
}

// A socket that has shut down its sending side still has its owner.
func TestPeerAfterHalfClose(t *testing.T) {
	t.Parallel()
	l := listenTCP(t, "127.0.0.1:0")
	client, server := pair(t, l, func() (net.Conn, error) { return net.Dial("tcp", l.Addr().String()) })
	if err := client.(*net.TCPConn).CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if cred, err := Peer(server); err != nil || cred.UID != uint32(os.Geteuid()) {
		t.Errorf("%+v, %v", cred, err)
	}
}

// A client with an IPv6 socket that talks IPv4 is one and the same connection.
func TestPeerMapped(t *testing.T) {
	t.Parallel()
	l := listenTCP(t, "127.0.0.1:0")
	fd, err := unix.Socket(unix.AF_INET6, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	mapped := netip.MustParseAddr("::ffff:127.0.0.1").As16()
	if err := unix.Connect(fd, &unix.SockaddrInet6{Port: l.Addr().(*net.TCPAddr).Port, Addr: mapped}); err != nil {
		t.Fatal(err)
	}
	c, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if cred, err := Peer(c); err != nil || cred.UID != uint32(os.Geteuid()) {
		t.Errorf("%+v, %v", cred, err)
	}
}

func TestPeerRefusesOtherTypes(t *testing.T) {
	t.Parallel()
	a, b := net.Pipe()
	defer a.Close()
	defer b.Close()
	l := listenTCP(t, "127.0.0.1:0")
	_, server := pair(t, l, func() (net.Conn, error) { return net.Dial("tcp", l.Addr().String()) })
	for _, c := range []net.Conn{a, struct{ *net.TCPConn }{server.(*net.TCPConn)}, nil} {
		if _, err := Peer(c); !errors.Is(err, ErrUnsupported) || !errors.Is(err, errors.ErrUnsupported) {
			t.Errorf("Peer(%T): %v", c, err)
		}
		if err := ListenerOwnedBy(c, []int{os.Getpid()}); !errors.Is(err, ErrUnsupported) {
			t.Errorf("ListenerOwnedBy(%T): %v", c, err)
		}
	}
	server.Close()
	if _, err := Peer(server); err == nil {
		t.Error("a closed connection has a peer")
	}
	packets, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer packets.Close()
	if cred, err := Peer(packets); !errors.Is(err, ErrPeerGone) {
		t.Errorf("a unix socket without a peer: %+v, %v", cred, err)
	}
}

// SOCKS-18: an announced socket must be the child's own.
func TestListenerOwnedBy(t *testing.T) {
	t.Parallel()
	const bystander = 1 // some process that has nothing to do with it
	unixPath := filepath.Join(publicDir(t), "s")
	if os.Getuid() == 0 {
		if err := os.Chown(filepath.Dir(unixPath), otherUID, otherUID); err != nil {
			t.Fatal(err)
		}
	}
	uids := []uint32{0}
	if os.Getuid() == 0 {
		uids = append(uids, otherUID)
	}
	for _, uid := range uids {
		for _, c := range []struct {
			network, listen, dial string
			want                  error
		}{
			{"tcp", "127.0.0.1:0", "", nil},
			{"tcp", "[::1]:0", "", nil},
			{"tcp", "127.9.9.9:0", "", nil},
			{"tcp", "0.0.0.0:0", "127.0.0.1", ErrWildcard},
			{"tcp", "[::]:0", "127.0.0.1", ErrWildcard},
			{"tcp", "[::]:0", "::1", ErrWildcard},
			{"unix", unixPath, "", nil},
		} {
			t.Run(fmt.Sprintf("%s %s uid %d", c.listen, c.dial, uid), func(t *testing.T) {
				child := start(t, uid, "listen", c.network, c.listen)
				addr := child.line
				if c.dial != "" {
					addr = net.JoinHostPort(c.dial, addr[strings.LastIndexByte(addr, ':')+1:])
				}
				conn, err := net.Dial(c.network, addr)
				if err != nil {
					t.Fatal(err)
				}
				defer conn.Close()
				pid := child.cmd.Process.Pid
				if err := ListenerOwnedBy(conn, []int{os.Getpid(), pid}); !errors.Is(err, c.want) {
					t.Errorf("the child's own: %v; want %v", err, c.want)
				}
				wrong := c.want
				if wrong == nil {
					wrong = ErrForeignListener
				}
				if err := ListenerOwnedBy(conn, []int{os.Getpid()}); !errors.Is(err, wrong) {
					t.Errorf("somebody else's: %v; want %v", err, wrong)
				}
				if err := ListenerOwnedBy(conn, nil); !errors.Is(err, wrong) {
					t.Errorf("of no process: %v; want %v", err, wrong)
				}
				// A process that has ended owns nothing.
				if err := ListenerOwnedBy(conn, []int{1 << 30}); !errors.Is(err, wrong) {
					t.Errorf("a process that is not there: %v; want %v", err, wrong)
				}
				if os.Getuid() == 0 && uid != 0 {
					if err := ListenerOwnedBy(conn, []int{bystander}); !errors.Is(err, wrong) {
						t.Errorf("a bystander's: %v; want %v", err, wrong)
					}
				}
				if c.network == "tcp" && c.want == nil {
					child.stop()
					if err := ListenerOwnedBy(conn, []int{pid}); !errors.Is(err, ErrForeignListener) {
						t.Errorf("the child has ended: %v", err)
					}
				}
			})
		}
	}
}

// Where a process's descriptors may not be read, its user is compared.
func TestListenerOwnedByUser(t *testing.T) {
	needRoot(t)
	t.Parallel()
	for _, c := range []struct {
		listener, asker uint32
		want            string
	}{
		{otherUID, otherUID - 1, "ok"},  // cannot look into the process, but its user is right
		{otherUID, otherUID, "ok"},      // looks
		{0, otherUID, "error: foreign"}, // the socket is root's, the process (see below) is not
	} {
		child := start(t, c.listener, "listen", "tcp", "127.0.0.1:0")
		pid := child.cmd.Process.Pid
		if c.want != "ok" {
			pid = start(t, otherUID-1, "listen", "tcp", "127.0.0.1:0").cmd.Process.Pid
		}
		asker := start(t, c.asker, "ask", child.line, fmt.Sprint(pid))
		if asker.line != c.want {
			t.Errorf("listener of uid %d, asked by uid %d: %q, want %q", c.listener, c.asker, asker.line, c.want)
		}
	}
}

// A kernel's own answers, among them those that mean no.
func TestDiagNotFound(t *testing.T) {
	t.Parallel()
	a, b := netip.MustParseAddrPort("127.0.0.1:1"), netip.MustParseAddrPort("127.0.0.1:2")
	if sock, err := diag.lookup(a, b); !errors.Is(err, unix.ENOENT) {
		t.Errorf("a connection that does not exist: %+v, %v", sock, err)
	}
}

// A netlink socket that has gone bad is replaced.
func TestDiagRecovers(t *testing.T) {
	l := listenTCP(t, "127.0.0.1:0")
	_, server := pair(t, l, func() (net.Conn, error) { return net.Dial("tcp", l.Addr().String()) })
	if _, err := Peer(server); err != nil {
		t.Fatal(err)
	}
	before := descriptors(t)
	diag.mu.Lock()
	// An answer to a question of somebody before us is waiting in the socket.
	request := diagRequest(unix.IPPROTO_TCP, diag.seq+100, netip.MustParseAddrPort("127.0.0.1:1"), netip.MustParseAddrPort("127.0.0.1:2"))
	_, err := unix.Write(diag.fd, request[:])
	diag.mu.Unlock()
	if err != nil {
		t.Fatal(err)
	}
	if cred, err := Peer(server); err == nil {
		t.Errorf("another question's answer was taken: %+v", cred)
	}
	if cred, err := Peer(server); err != nil || cred.UID != uint32(os.Geteuid()) {
		t.Errorf("afterwards: %+v, %v", cred, err)
	}
	if after := descriptors(t); after != before {
		t.Errorf("%d descriptors before, %d after", before, after)
	}
}

func FuzzParseDiag(f *testing.F) {
	f.Fuzz(func(t *testing.T, b []byte) {
		const seq, port = 7, 9
		sock, err := parseDiag(b, seq, port)
		if err != nil {
			return
		}
		if !sock.local.Addr().IsValid() || !sock.remote.Addr().IsValid() || sock.local.Addr().Is4In6() || sock.remote.Addr().Is4In6() {
			t.Fatalf("%x gives %+v", b, sock)
		}
		if _, err := parseDiag(b, seq+1, port); err == nil {
			t.Fatal("the reply to another request was taken")
		}
		if _, err := parseDiag(b, seq, port+1); err == nil {
			t.Fatal("the reply to another socket was taken")
		}
		for n := range min(len(b), headerLen+messageLen) {
			if _, err := parseDiag(b[:n], seq, port); err == nil {
				t.Fatalf("the first %d bytes of a reply were taken", n)
			}
		}
	})
}
