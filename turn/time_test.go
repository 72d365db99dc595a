package turn

import (
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pion/stun"
)

// A memClient is a rawClient in memory.
type memClient struct {
	*memConn
	server      netip.AddrPort
	credentials Credentials
	nonce       []byte
}

func (c *memClient) request(t testing.TB, method stun.Method, setters ...stun.Setter) *message {
	t.Helper()
	for {
		raw := rawClient{credentials: c.credentials, nonce: c.nonce}
		c.put(t, raw.build(method, setters...).Raw)
		m := c.next(t)
		if m == nil {
			t.Fatalf("%s was not answered", method)
		}
		if code := m.code(); (code == 401 && c.nonce == nil || code == 438) && m.nonce != nil {
			c.nonce = m.nonce
			continue
		}
		return m
	}
}

func (c *memClient) put(t testing.TB, b []byte) {
	t.Helper()
	if _, err := c.WriteTo(b, net.UDPAddrFromAddrPort(c.server)); err != nil {
		t.Fatal(err)
	}
}

// next is the next message, or nil if there is none for a second.
func (c *memClient) next(t testing.TB) *message {
	t.Helper()
	b := c.receive()
	if b == nil {
		return nil
	}
	m := new(message)
	if err := m.parse(b); err != nil {
		t.Fatalf("the server sent % x", b)
	}
	return m
}

// receive is the next datagram, or nil if there is none for a second.
func (c *memConn) receive() []byte {
	b := make([]byte, 4096)
	c.deadline.set(time.Now().Add(time.Second))
	n, _, err := c.ReadFrom(b)
	if err != nil {
		return nil
	}
	return b[:n]
}

func (c *memClient) must(t testing.TB, method stun.Method, setters ...stun.Setter) *message {
	t.Helper()
	m := c.request(t, method, setters...)
	if m.class != stun.ClassSuccessResponse {
		t.Fatalf("%s: %d", method, m.code())
	}
	return m
}

func (c *memClient) refused(t testing.TB, code stun.ErrorCode, method stun.Method, setters ...stun.Setter) {
	t.Helper()
	m := c.request(t, method, setters...)
	if m.class != stun.ClassErrorResponse || m.code() != code {
		t.Errorf("%s: %s %d, want %d", method, m.class, m.code(), code)
	}
}

func inBubble(t *testing.T, s *Server, f func(t *testing.T, n *memNet, c *memClient)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		n := newMemNet()
		addr, stop := n.serve(t, s)
		c := &memClient{memConn: n.listen("127.0.0.1"), server: addr, credentials: s.Credentials}
		f(t, n, c)
		_ = c.Close()
		stop()
		synctest.Wait()
		if open := s.Stats().Allocations; open != 0 {
			t.Errorf("%d allocations are left", open)
		}
	})
}

func channelData(number uint16, payload string) []byte {
	b := append(make([]byte, channelHeader), payload...)
	putChannel(b, number)
	return b
}

func sendIndication(peer netip.AddrPort, payload string) []byte {
	b := make([]byte, indicationHeader(peer)+len(payload)+3)
	copy(b[indicationHeader(peer):], payload)
	return putIndication(b, stun.MethodSend, peer, len(payload), stun.NewTransactionID())
}

func (c *memConn) want(t testing.TB, payload string) {
	t.Helper()
	if got := c.receive(); string(got) != payload || (got == nil) != (payload == "") {
		t.Errorf("%v received %q, want %q", c.addr, got, payload)
	}
}

// TURN-7: without a refresh an allocation ends with its lifetime, and the transport's
// packet connection with it.
func TestAllocationExpires(t *testing.T) {
	inBubble(t, &Server{}, func(t *testing.T, n *memNet, c *memClient) {
		for _, test := range []struct {
			ask  uint32
			want time.Duration
		}{{0, 600 * time.Second}, {60, 600 * time.Second}, {601, 601 * time.Second}, {7200, 3599 * time.Second}} {
			var setters []stun.Setter
			if test.ask != 0 {
				setters = append(setters, uint32Attribute(stun.AttrLifetime, test.ask))
			}
			m := c.must(t, stun.MethodAllocate, append(setters, requestUDP)...)
			if got := time.Duration(m.lifetime) * time.Second; got != test.want {
				t.Errorf("asked for %d s: %v, want %v", test.ask, got, test.want)
			}
			time.Sleep(test.want - time.Second)
			if open := n.count(); open != 3 {
				t.Errorf("%v before the end there are %d sockets", time.Second, open)
			}
			time.Sleep(2 * time.Second)
			if open := n.count(); open != 2 {
				t.Errorf("behind the end there are %d sockets", open)
			}
			c.refused(t, 437, stun.MethodRefresh)
		}
	})
}

// TURN-7: a refresh moves the end, and one of lifetime 0 is the end.
func TestRefresh(t *testing.T) {
	inBubble(t, &Server{}, func(t *testing.T, n *memNet, c *memClient) {
		c.must(t, stun.MethodAllocate, requestUDP)
		for range 8 { // a nonce lives for an hour
			time.Sleep(9 * time.Minute)
			c.must(t, stun.MethodRefresh)
		}
		if m := c.must(t, stun.MethodRefresh, uint32Attribute(stun.AttrLifetime, 0)); m.lifetime != 0 {
			t.Errorf("lifetime %d", m.lifetime)
		}
		synctest.Wait()
		if open := n.count(); open != 2 {
			t.Errorf("there are %d sockets", open)
		}
		c.refused(t, 437, stun.MethodRefresh)
		c.must(t, stun.MethodAllocate, requestUDP)
	})
}

// TURN-8: permissions are for an address with all its ports, and for five minutes;
// channels for ten.
func TestPermissionsAndChannels(t *testing.T) {
	inBubble(t, &Server{}, func(t *testing.T, n *memNet, c *memClient) {
		c.must(t, stun.MethodAllocate, requestUDP)
		var relay *memConn
		for _, conn := range n.conns {
			if conn.addr.Addr() == netip.MustParseAddr("192.0.2.1") {
				relay = conn
			}
		}
		one, two := n.listen("192.0.2.7"), n.listen("192.0.2.7")
		other := n.listen("192.0.2.8")
		six := n.listen("2001:db8::7")

		// Nobody has permission.
		c.put(t, sendIndication(one.addr, "no"))
		one.want(t, "")
		if _, err := one.WriteTo([]byte("no"), relay.LocalAddr()); err != nil {
			t.Fatal(err)
		}
		c.want(t, "")

		c.must(t, stun.MethodCreatePermission, peerAddress(one.addr), peerAddress(six.addr))
		for _, peer := range []*memConn{one, two, six} {
			c.put(t, sendIndication(peer.addr, "out"))
			peer.want(t, "out")
			if _, err := peer.WriteTo([]byte("in"), relay.LocalAddr()); err != nil {
				t.Fatal(err)
			}
			if m := c.next(t); m == nil || m.class != stun.ClassIndication || m.method != stun.MethodData || string(m.data) != "in" || m.peers[0] != peer.addr {
				t.Errorf("%v: %+v", peer.addr, m)
			}
		}

		c.must(t, stun.MethodChannelBind, channelNumber(0x4000), peerAddress(one.addr))
		c.must(t, stun.MethodChannelBind, channelNumber(0x7FFE), peerAddress(six.addr))
		c.must(t, stun.MethodChannelBind, channelNumber(0x4000), peerAddress(one.addr)) // again
		c.refused(t, 400, stun.MethodChannelBind, channelNumber(0x4000), peerAddress(two.addr))
		c.refused(t, 400, stun.MethodChannelBind, channelNumber(0x4001), peerAddress(one.addr))
		both := func(number uint16, peer *memConn, ok bool) {
			t.Helper()
			out, in := "", ""
			if ok {
				out, in = "out", string(channelData(number, "in"))
			}
			c.put(t, channelData(number, "out"))
			peer.want(t, out)
			if _, err := peer.WriteTo([]byte("in"), relay.LocalAddr()); err != nil {
				t.Fatal(err)
			}
			c.want(t, in)
		}
		both(0x4000, one, true)
		both(0x7FFE, six, true)
		both(0x4001, other, false)

		time.Sleep(4*time.Minute + 30*time.Second)
		c.put(t, sendIndication(two.addr, "out")) // the permission that the channel renewed
		two.want(t, "out")
		time.Sleep(time.Minute)
		c.put(t, sendIndication(two.addr, "out"))
		two.want(t, "")
		both(0x4000, one, true)
		c.must(t, stun.MethodRefresh)
		time.Sleep(5 * time.Minute)
		both(0x4000, one, false)
		c.must(t, stun.MethodChannelBind, channelNumber(0x4001), peerAddress(one.addr)) // it is free again
		both(0x4001, one, true)
	})
}

// TURN-15: a Conn that nobody uses lives on, with its channels.
func TestConnKeepsAlive(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newMemNet()
		s := &Server{}
		addr, stop := n.serve(t, s)
		defer stop()
		conn, err := dial(t.Context(), addr, s.Credentials, n.open)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		peer := n.listen("192.0.2.7")
		n.fate = accidents(20, 5, 20, 100*time.Millisecond)
		buf := make([]byte, 100)
		for i := range 12 {
			for received := false; !received; {
				if _, err := conn.WriteTo(fmt.Append(nil, "out", i), peer.LocalAddr()); err != nil {
					t.Fatal(err)
				}
				received = peer.receive() != nil
			}
			time.Sleep(50 * time.Minute) // ten times the lifetime of a permission
			for received := false; !received; {
				if _, err := peer.WriteTo(fmt.Append(nil, "in", i), conn.LocalAddr()); err != nil {
					t.Fatal(err)
				}
				_ = conn.SetReadDeadline(time.Now().Add(time.Second))
				_, from, err := conn.ReadFrom(buf)
				received = err == nil
				if received && from.String() != peer.addr.String() {
					t.Fatalf("from %v", from)
				}
			}
			for peer.receive() != nil {
			}
		}
		if got := conn.Stats().Allocated; got != 1 {
			t.Errorf("%d allocations for one Conn", got)
		}
	})
}

// TURN-15: a channel that the server would not keep is bound anew when something is sent.
func TestChannelNotKept(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newMemNet()
		s := &Server{}
		addr, stop := n.serve(t, s)
		defer stop()
		conn, err := dial(t.Context(), addr, s.Credentials, n.open)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		peer := n.listen("192.0.2.7")
		if _, err := conn.WriteTo([]byte("before"), peer.LocalAddr()); err != nil {
			t.Fatal(err)
		}
		peer.want(t, "before")

		g := s.guards[0]
		g.mu.RLock()
		a := slices.Collect(maps.Values(g.clients))[0]
		g.mu.RUnlock()
		kept := map[netip.Addr]time.Time{}
		a.mu.Lock()
		kept, a.permissions = a.permissions, kept
		for i := range maxPermissions {
			a.permissions[netip.AddrFrom4([4]byte{10, 0, byte(i >> 8), byte(i)})] = time.Now().Add(time.Hour)
		}
		a.mu.Unlock()
		time.Sleep(channelLifetime + time.Minute)
		a.mu.Lock()
		a.permissions = kept
		a.mu.Unlock()
		time.Sleep(refusalPause)
		if _, err := conn.WriteTo([]byte("after"), peer.LocalAddr()); err != nil {
			t.Error(err)
		}
		peer.want(t, "after")
	})
}

// TURN-16: a server that is silent is a lost one.
func TestSilentServer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newMemNet()
		s := &Server{}
		addr, stop := n.serve(t, s)
		conn, err := dial(t.Context(), addr, s.Credentials, n.open)
		if err != nil {
			t.Fatal(err)
		}
		stop()
		_, _, err = conn.ReadFrom(make([]byte, 10))
		if !errors.Is(err, ErrLost) {
			t.Errorf("%v does not wrap ErrLost", err)
		}
		if _, err = conn.WriteTo([]byte("x"), &net.UDPAddr{IP: net.IPv4(192, 0, 2, 7), Port: 9}); !errors.Is(err, ErrLost) {
			t.Errorf("%v does not wrap ErrLost", err)
		}
		_ = conn.Close()
		if _, err := dial(t.Context(), addr, s.Credentials, n.open); !errors.Is(err, ErrLost) {
			t.Errorf("dial: %v does not wrap ErrLost", err)
		}
	})
}

// TURN-9: one client does not fill the server's memory. What has expired makes room.
func TestRoom(t *testing.T) {
	s := &Server{}
	inBubble(t, s, func(t *testing.T, n *memNet, c *memClient) {
		c.must(t, stun.MethodAllocate, requestUDP, uint32Attribute(stun.AttrLifetime, 3000))
		a := s.guards[0].client(c.addr)
		one, two := netip.MustParseAddrPort("192.0.2.1:7"), netip.MustParseAddrPort("192.0.2.2:7")
		fill := func(i int) netip.AddrPort {
			return netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 0, byte(i >> 8), byte(i)}), 7)
		}
		for i := range maxPermissions - 1 {
			a.permit([]netip.AddrPort{fill(i)}, time.Now())
		}
		c.refused(t, 508, stun.MethodCreatePermission, peerAddress(one), peerAddress(two))
		c.must(t, stun.MethodCreatePermission, peerAddress(one))
		c.must(t, stun.MethodCreatePermission, peerAddress(one), peerAddress(fill(0))) // which there are already
		c.refused(t, 508, stun.MethodCreatePermission, peerAddress(two))
		c.refused(t, 508, stun.MethodChannelBind, channelNumber(minChannel), peerAddress(two))
		time.Sleep(permissionLifetime)
		c.must(t, stun.MethodCreatePermission, peerAddress(two))

		for i := range maxChannels {
			a.bind(uint16(minChannel+i), netip.AddrPortFrom(one.Addr(), uint16(i+1)), time.Now())
		}
		c.refused(t, 508, stun.MethodChannelBind, channelNumber(maxChannel), peerAddress(two))
		time.Sleep(channelLifetime)
		c.must(t, stun.MethodChannelBind, channelNumber(maxChannel), peerAddress(two))
	})
}
