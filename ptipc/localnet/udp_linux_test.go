package localnet

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"
)

func listenUDP(t *testing.T, addr string) *net.UDPConn {
	t.Helper()
	conn, err := ListenUDP(addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	_ = conn.SetDeadline(time.Now().Add(20 * time.Second))
	return conn
}

func udpAddr(conn net.PacketConn) netip.AddrPort { return conn.LocalAddr().(*net.UDPAddr).AddrPort() }

// PKT-5: a socket on the loopback hears its own user, and who else was asked for; what
// another user sends is dropped, from connected sockets and from bound ones.
func TestGuardPackets(t *testing.T) {
	t.Parallel()
	for _, addr := range []string{"127.0.0.1:0", "[::1]:0"} {
		log := &lines{}
		conn := listenUDP(t, addr)
		g := GuardPackets(conn, log.logger())
		if os.Getuid() == 0 {
			start(t, otherUID, "datagrams", addr, conn.LocalAddr().String())
			start(t, otherUID, "datagrams", ":0", conn.LocalAddr().String())
		}
		connected, err := net.Dial("udp", conn.LocalAddr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer connected.Close()
		wildcard, err := net.ListenPacket("udp", ":0")
		if err != nil {
			t.Fatal(err)
		}
		defer wildcard.Close()
		for range 2 {
			if _, err := connected.Write([]byte("connected")); err != nil {
				t.Fatal(err)
			}
			if _, err := wildcard.WriteTo([]byte("wildcard"), conn.LocalAddr()); err != nil {
				t.Fatal(err)
			}
		}
		buf := make([]byte, 100)
		for _, want := range []string{"connected", "wildcard", "connected", "wildcard"} {
			n, from, err := g.ReadFrom(buf)
			if err != nil || string(buf[:n]) != want {
				t.Fatalf("%q from %v, %v; want %q", buf[:n], from, err, want)
			}
		}
		if os.Getuid() != 0 {
			continue
		}
		if g.Refused() != 4 || !strings.Contains(log.String(), fmt.Sprintf("uid %d", otherUID)) {
			t.Errorf("%s: %d refused; the log says %q", addr, g.Refused(), log)
		}
		start(t, otherUID, "datagrams", addr, conn.LocalAddr().String())
		both := GuardPackets(conn, nil, uint32(os.Geteuid()), otherUID)
		if n, _, err := both.ReadFrom(buf); err != nil || string(buf[:n]) != "connected" {
			t.Errorf("%s: %q, %v", addr, buf[:n], err)
		}
	}
}

// A socket that is closed has no owner any more, and off the loopback there is none to ask for.
func TestUDPPeer(t *testing.T) {
	conn := listenUDP(t, "127.0.0.1:0")
	client := listenUDP(t, "127.0.0.1:0")
	from := udpAddr(client)
	if cred, err := UDPPeer(udpAddr(conn), from); err != nil || cred.UID != uint32(os.Geteuid()) {
		t.Errorf("%+v, %v", cred, err)
	}
	client.Close()
	if cred, err := UDPPeer(udpAddr(conn), from); !errors.Is(err, ErrPeerGone) {
		t.Errorf("after it was closed: %+v, %v", cred, err)
	}
	if _, err := UDPPeer(udpAddr(conn), netip.MustParseAddrPort("192.0.2.1:7")); !errors.Is(err, ErrAddr) {
		t.Errorf("off the loopback: %v", err)
	}
	if _, err := ListenUDP("0.0.0.0:0"); !errors.Is(err, ErrAddr) {
		t.Errorf("on all addresses: %v", err)
	}
}

// PKT-5: whose socket an address is, a socket of all addresses told apart.
func TestUDPOwnedBy(t *testing.T) {
	own := []int{os.Getpid()}
	for _, addr := range []string{"127.0.0.1:0", "[::1]:0"} {
		if err := UDPOwnedBy(udpAddr(listenUDP(t, addr)), own); err != nil {
			t.Errorf("%s: %v", addr, err)
		}
		other := start(t, 0, "datagrams", addr, listenUDP(t, addr).LocalAddr().String())
		held := netip.MustParseAddrPort(other.line)
		if err := UDPOwnedBy(held, own); !errors.Is(err, ErrForeignListener) {
			t.Errorf("%s: that of another process: %v", addr, err)
		}
		if err := UDPOwnedBy(held, append(own, other.cmd.Process.Pid)); err != nil {
			t.Errorf("%s: that of one of them: %v", addr, err)
		}
		wildcard, err := net.ListenPacket("udp", ":0")
		if err != nil {
			t.Fatal(err)
		}
		defer wildcard.Close()
		on := netip.AddrPortFrom(held.Addr(), udpAddr(wildcard).Port())
		if err := UDPOwnedBy(on, own); !errors.Is(err, ErrWildcard) {
			t.Errorf("%s: one of all addresses: %v", addr, err)
		}
		wildcard.Close()
		if err := UDPOwnedBy(on, own); !errors.Is(err, ErrForeignListener) {
			t.Errorf("%s: nobody's: %v", addr, err)
		}
	}
}
