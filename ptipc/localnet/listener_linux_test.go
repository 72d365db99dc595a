package localnet

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// SOCKS-18, SIP-11: who listens is known without a connection.
func TestListenerAt(t *testing.T) {
	uids := []uint32{0}
	if os.Getuid() == 0 {
		uids = append(uids, otherUID)
	}
	for _, uid := range uids {
		for _, c := range []struct {
			listen, at string
			want       error
		}{
			{"127.0.0.1:0", "127.0.0.1", nil},
			{"[::1]:0", "::1", nil},
			{"0.0.0.0:0", "127.0.0.1", ErrWildcard},
			{"[::]:0", "127.0.0.1", ErrWildcard},
			{"[::]:0", "::1", ErrWildcard},
			{"0.0.0.0:0", "0.0.0.0", nil}, // of a server's wire
			{"[::]:0", "::", nil},
			{"[::]:0", "0.0.0.0", nil},
			{"127.0.0.2:0", "127.0.0.1", ErrNoListener},
			{"127.0.0.1:0", "::1", ErrNoListener},
			{"127.0.0.1:0", "0.0.0.0", ErrNoListener},
		} {
			t.Run(fmt.Sprintf("%s at %s, uid %d", c.listen, c.at, uid), func(t *testing.T) {
				child := start(t, uid, "listen", "tcp", c.listen)
				addr := netip.MustParseAddrPort(net.JoinHostPort(c.at, child.line[strings.LastIndexByte(child.line, ':')+1:]))
				pid := child.cmd.Process.Pid
				if err := ListenerAt("tcp", addr, []int{os.Getpid(), pid}); !errors.Is(err, c.want) {
					t.Errorf("the child's own: %v; want %v", err, c.want)
				}
				wrong := c.want
				if wrong == nil {
					wrong = ErrForeignListener
				}
				if err := ListenerAt("tcp", addr, []int{os.Getpid()}); !errors.Is(err, wrong) {
					t.Errorf("somebody else's: %v; want %v", err, wrong)
				}
				child.stop()
				if err := ListenerAt("tcp", addr, []int{pid}); !errors.Is(err, ErrNoListener) {
					t.Errorf("the child has ended: %v", err)
				}
			})
		}
	}
}

// The same for sockets of UDP, which a server's wire may have.
func TestListenerAtUDP(t *testing.T) {
	for _, c := range []struct {
		listen, at string
		want       error
	}{
		{"127.0.0.1:0", "127.0.0.1", nil},
		{"[::1]:0", "::1", nil},
		{"0.0.0.0:0", "127.0.0.1", ErrWildcard},
		{"0.0.0.0:0", "0.0.0.0", nil},
		{"[::]:0", "0.0.0.0", nil},
		{"127.0.0.2:0", "127.0.0.1", ErrNoListener},
	} {
		conn, err := net.ListenPacket("udp", c.listen)
		if err != nil {
			t.Fatal(err)
		}
		at := netip.AddrPortFrom(netip.MustParseAddr(c.at), conn.LocalAddr().(*net.UDPAddr).AddrPort().Port())
		if err := ListenerAt("udp", at, []int{os.Getpid()}); !errors.Is(err, c.want) {
			t.Errorf("%s at %s: %v; want %v", c.listen, c.at, err, c.want)
		}
		wrong := c.want
		if wrong == nil {
			wrong = ErrForeignListener
		}
		if err := ListenerAt("udp", at, []int{1 << 30}); !errors.Is(err, wrong) {
			t.Errorf("%s at %s, somebody else's: %v; want %v", c.listen, c.at, err, wrong)
		}
		if err := ListenerAt("tcp", at, []int{os.Getpid()}); !errors.Is(err, ErrNoListener) {
			t.Errorf("%s is there over TCP too: %v", c.listen, err)
		}
		_ = conn.Close()
		if err := ListenerAt("udp", at, []int{os.Getpid()}); !errors.Is(err, ErrNoListener) {
			t.Errorf("%s, closed: %v", c.listen, err)
		}
	}
	if err := ListenerAt("unix", netip.AddrPort{}, nil); err == nil {
		t.Error("unix is a network of ports")
	}
}

// Whoever asks leaves no trace with who listens.
func TestListenerAtConnectsNothing(t *testing.T) {
	l := listenTCP(t, "127.0.0.1:0")
	addr := l.Addr().(*net.TCPAddr).AddrPort()
	if err := ListenerAt("tcp", addr, []int{os.Getpid()}); err != nil {
		t.Fatal(err)
	}
	client, server := pair(t, l, func() (net.Conn, error) { return net.Dial("tcp", addr.String()) })
	if server.RemoteAddr().String() != client.LocalAddr().String() {
		t.Errorf("%s has connected before %s", server.RemoteAddr(), client.LocalAddr())
	}
	// A connection is no listener.
	at := client.LocalAddr().(*net.TCPAddr).AddrPort()
	if err := ListenerAt("tcp", at, []int{os.Getpid()}); !errors.Is(err, ErrNoListener) {
		t.Errorf("the client's end: %v", err)
	}
}

// SOCKS-17: who is let in may change while the listener lives.
func TestGuardFunc(t *testing.T) {
	let := false
	l := listenTCP(t, "127.0.0.1:0")
	g := GuardFunc(l, nil, func(peer Cred) bool {
		if !RunsAs(os.Getpid(), peer.UID) || RunsAs(os.Getpid(), peer.UID+1) {
			t.Errorf("this process does not run as %d alone", peer.UID)
		}
		defer func() { let = true }()
		return let
	})
	refused, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer refused.Close()
	client, server := pair(t, g, func() (net.Conn, error) { return net.Dial("tcp", l.Addr().String()) })
	if server.RemoteAddr().String() != client.LocalAddr().String() || g.Refused() != 1 {
		t.Errorf("accepted %s, want %s; %d refused, want 1", server.RemoteAddr(), client.LocalAddr(), g.Refused())
	}
	if _, err := refused.Read(make([]byte, 1)); err == nil || errors.Is(err, unix.EAGAIN) {
		t.Errorf("the refused connection is open: %v", err)
	}
	if RunsAs(1<<30, 0) {
		t.Error("a process that is not there runs as root")
	}
}
