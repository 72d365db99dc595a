package turn

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pion/stun"

	"pthost/ptipc"
)

// listenUDP opens a socket on the loopback that is closed with the test.
func listenUDP(t testing.TB, host string) *net.UDPConn {
	t.Helper()
	c, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.ParseIP(host)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c
}

// directPackets is the simplest transport: a UDP socket on the loopback.
func directPackets(context.Context) (net.PacketConn, error) {
	return net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
}

// startServer serves on sockets of its own and makes sure that the server ends.
func startServer(t testing.TB, s *Server, conns ...net.PacketConn) netip.AddrPort {
	t.Helper()
	if s.Credentials == (Credentials{}) {
		s.Credentials = NewCredentials()
	}
	if s.Packets == nil {
		s.Packets = directPackets
	}
	if len(conns) == 0 {
		conns = []net.PacketConn{listenUDP(t, "127.0.0.1")}
	}
	addr := conns[0].LocalAddr().(*net.UDPAddr).AddrPort()
	served := make(chan error, 1)
	go func() { served <- s.Serve(conns...) }()
	t.Cleanup(func() {
		_ = s.Close()
		if err := <-served; err != nil && !errors.Is(err, net.ErrClosed) {
			t.Errorf("Serve: %v", err)
		}
		if n := s.Stats().Allocations; n != 0 {
			t.Errorf("%d allocations are left", n)
		}
	})
	return addr
}

func mustDial(t testing.TB, addr netip.AddrPort, c Credentials, options ...Option) *Conn {
	t.Helper()
	conn, err := Dial(t.Context(), addr, c, options...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return conn
}

// patient gives up only when something must be wrong.
func patient(t testing.TB, c net.PacketConn) {
	t.Helper()
	if err := c.SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
		t.Fatal(err)
	}
}

func TestRoundTrip(t *testing.T) {
	s := &Server{}
	addr := startServer(t, s)
	conn := mustDial(t, addr, s.Credentials)
	peer := listenUDP(t, "127.0.0.1")
	patient(t, peer)
	patient(t, conn)
	buf := make([]byte, 4096)
	for range 3 {
		if _, err := conn.WriteTo([]byte("there"), peer.LocalAddr()); err != nil {
			t.Fatal(err)
		}
		n, from, err := peer.ReadFrom(buf)
		if err != nil || string(buf[:n]) != "there" {
			t.Fatalf("%q %v", buf[:n], err)
		}
		if from.String() != conn.LocalAddr().String() {
			t.Errorf("from %v, want %v", from, conn.LocalAddr())
		}
		if _, err := peer.WriteTo([]byte("back"), from); err != nil {
			t.Fatal(err)
		}
		n, from, err = conn.ReadFrom(buf)
		if err != nil || string(buf[:n]) != "back" || from.String() != peer.LocalAddr().String() {
			t.Fatalf("%q from %v: %v", buf[:n], from, err)
		}
	}
	want := Stats{Allocated: 1, SentPackets: 3, SentBytes: 15, ReceivedPackets: 3, ReceivedBytes: 12}
	eventually(t, "the Conn counts", func() bool { return conn.Stats() == want }) // behind the sending
	want.Allocations = 1
	eventually(t, "the server counts", func() bool { return s.Stats() == want })
}

// TURN-12: what fits passes whole, both ways; what does not is dropped, counted and never cut.
func TestPayloadSizes(t *testing.T) {
	s := &Server{}
	addr := startServer(t, s)
	for _, host := range []string{"127.0.0.1", "::1"} {
		t.Run(host, func(t *testing.T) {
			if host == "::1" {
				s := &Server{Packets: func(context.Context) (net.PacketConn, error) { return net.ListenPacket("udp", "[::1]:0") }}
				testPayloadSizes(t, s, startServer(t, s), host)
			} else {
				testPayloadSizes(t, s, addr, host)
			}
		})
	}
}

func testPayloadSizes(t *testing.T, s *Server, addr netip.AddrPort, host string) {
	conn, peer := mustDial(t, addr, s.Credentials), listenUDP(t, host)
	// One port has a channel, the other gets Data indications.
	other := listenUDP(t, host)
	patient(t, peer)
	patient(t, conn)
	buf := make([]byte, 4096)
	for _, size := range []int{0, 1, 2, 3, 4, 5, 548, 1199, 1200, 1472, 1499, 1500, 1501, 1600, 1601, MaxPayload - 1, MaxPayload} {
		payload := bytes.Repeat([]byte{byte(size), byte(size >> 8), 7}, size/3+1)[:size]
		if n, err := conn.WriteTo(payload, peer.LocalAddr()); n != size || err != nil {
			t.Fatalf("%d bytes: %d %v", size, n, err)
		}
		n, from, err := peer.ReadFrom(buf)
		if err != nil || !bytes.Equal(buf[:n], payload) {
			t.Fatalf("%d bytes arrived as %d: %v", size, n, err)
		}
		for _, sender := range []*net.UDPConn{peer, other} {
			if _, err := sender.WriteTo(payload, from); err != nil {
				t.Fatal(err)
			}
			n, back, err := conn.ReadFrom(buf)
			if err != nil || !bytes.Equal(buf[:n], payload) || back.String() != sender.LocalAddr().String() {
				t.Fatalf("%d bytes came back as %d from %v: %v", size, n, back, err)
			}
		}
	}
	_, err := conn.WriteTo(make([]byte, MaxPayload+1), peer.LocalAddr())
	if !errors.Is(err, syscall.EMSGSIZE) {
		t.Errorf("a payload that is too large: %v", err)
	}
	before := s.Stats().Dropped.TooLarge
	for _, size := range []int{MaxPayload + 1, maxDatagram, 9000} {
		if _, err := peer.WriteTo(make([]byte, size), conn.LocalAddr()); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := peer.WriteTo([]byte("end"), conn.LocalAddr()); err != nil {
		t.Fatal(err)
	}
	if n, _, err := conn.ReadFrom(buf); err != nil || string(buf[:n]) != "end" {
		t.Errorf("behind what was too large came %d bytes: %v", n, err)
	}
	if got := s.Stats().Dropped.TooLarge - before; got != 3 {
		t.Errorf("%d payloads were counted as too large, want 3", got)
	}
	if got := conn.Stats().Dropped.TooLarge; got != 1 {
		t.Errorf("the Conn counted %d payloads as too large, want 1", got)
	}
	// What does not fit into the reader's buffer is cut there, as with any UDP socket.
	if _, err := peer.WriteTo([]byte("abcdef"), conn.LocalAddr()); err != nil {
		t.Fatal(err)
	}
	if n, _, err := conn.ReadFrom(buf[:3]); n != 3 || err != nil {
		t.Errorf("%d %v", n, err)
	}
}

// TURN-13: a peer is an address.
func TestNamesAreRefused(t *testing.T) {
	s := &Server{}
	conn := mustDial(t, startServer(t, s), s.Credentials)
	for _, addr := range []net.Addr{
		nil, (*net.UDPAddr)(nil), &net.UnixAddr{Name: "example.com:53", Net: "unixgram"}, &net.TCPAddr{IP: net.IPv4(192, 0, 2, 1), Port: 1},
		&net.UDPAddr{IP: net.IPv4(192, 0, 2, 1)}, &net.UDPAddr{Port: 1}, &net.UDPAddr{IP: net.IPv6zero, Port: 1},
		&net.UDPAddr{IP: net.ParseIP("fe80::1"), Zone: "eth0", Port: 1},
	} {
		if _, err := conn.WriteTo([]byte("x"), addr); !errors.Is(err, ptipc.ErrAddressType) {
			t.Errorf("%v: %v is of class %v", addr, err, ptipc.ClassOf(err))
		}
	}
	if got := s.Stats().SentPackets; got != 0 {
		t.Errorf("%d packets were sent", got)
	}
}

// TURN-14: what is written before there is a channel waits for it, in its order.
func TestQueueBeforeChannel(t *testing.T) {
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
		var cut atomic.Bool
		cut.Store(true)
		n.fate = func(_, to netip.AddrPort) []time.Duration {
			if cut.Load() && to == addr {
				return nil
			}
			return []time.Duration{0}
		}
		for i := range maxQueued + 10 {
			if _, err := conn.WriteTo(fmt.Append(nil, i), peer.LocalAddr()); err != nil {
				t.Fatal(err)
			}
		}
		peer.want(t, "")
		cut.Store(false)
		for i := range maxQueued {
			for got := peer.receive(); string(got) != fmt.Sprint(i); got = peer.receive() {
				if got != nil {
					t.Fatalf("%q instead of %d", got, i)
				}
			}
		}
		if got := conn.Stats().Dropped.Full; got != 10 {
			t.Errorf("%d packets were counted that did not fit, want 10", got)
		}
		if _, err := conn.WriteTo([]byte("later"), peer.LocalAddr()); err != nil {
			t.Fatal(err)
		}
		peer.want(t, "later")
	})
}

// TURN-14: a Conn does not grow with the number of its peers.
func TestManyPeers(t *testing.T) {
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
		write := func(i int) error {
			_, err := conn.WriteTo([]byte("x"), &net.UDPAddr{IP: net.IPv4(192, 0, byte(i>>8), byte(i)), Port: 9})
			time.Sleep(time.Millisecond)
			return err
		}
		const numbers, most = 64, 16
		conn.last, conn.most = firstNumber+numbers-1, most
		for i := range numbers {
			if err := write(i); err != nil {
				t.Fatal(i, err)
			}
		}
		if len(conn.peers) != most || len(conn.numbers) != most || len(conn.ips) != most {
			t.Errorf("%d peers, %d channels, %d addresses", len(conn.peers), len(conn.numbers), len(conn.ips))
		}
		if err := write(numbers); !errors.Is(err, syscall.ENOBUFS) {
			t.Errorf("more peers than channels: %v", err)
		}
		time.Sleep(numberPause)
		if err := write(numbers); err != nil {
			t.Errorf("after a pause: %v", err)
		}
		if got := s.Stats().SentPackets; got != numbers+1 {
			t.Errorf("%d packets arrived, want %d", got, numbers+1)
		}
	})
}

// TURN-9, TURN-17: there are only so many allocations, and one that is closed makes room.
func TestQuota(t *testing.T) {
	s := &Server{MaxAllocations: 2}
	addr := startServer(t, s)
	first := mustDial(t, addr, s.Credentials)
	mustDial(t, addr, s.Credentials)
	_, err := Dial(t.Context(), addr, s.Credentials)
	var refused *RefusedError
	if !errors.As(err, &refused) || refused.Code != 486 {
		t.Errorf("the third: %v", err)
	}
	_ = first.Close()
	eventually(t, "one allocation is left", func() bool { return s.Stats().Allocations == 1 })
	mustDial(t, addr, s.Credentials)
}

// eventually waits for what other goroutines are about to do.
func eventually(t testing.TB, what string, f func() bool) {
	t.Helper()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for end := time.Now().Add(20 * time.Second); !f(); <-tick.C {
		if time.Now().After(end) {
			buf := make([]byte, 1<<20)
			t.Fatalf("this does not come: %s\n%s", what, buf[:runtime.Stack(buf, true)])
		}
	}
}

// TURN-1: nobody is served without the credentials.
func TestWrongCredentials(t *testing.T) {
	s := &Server{}
	addr := startServer(t, s)
	for _, change := range []func(*Credentials){
		func(c *Credentials) { c.Username += "x" },
		func(c *Credentials) { c.Password += "x" },
		func(c *Credentials) { c.Realm += "x" },
	} {
		c := s.Credentials
		change(&c)
		_, err := Dial(t.Context(), addr, c)
		var refused *RefusedError
		if !errors.As(err, &refused) || refused.Code != 401 || !errors.Is(err, ptipc.ErrNotAllowed) {
			t.Errorf("%v", err)
		}
		if strings.Contains(fmt.Sprint(err), c.Password) {
			t.Errorf("%v tells the password", err)
		}
	}
	if c := NewCredentials(); c == NewCredentials() || c.check() != nil || len(c.Password) < 32 {
		t.Errorf("%+v", c)
	}
	for _, c := range []Credentials{{}, {Username: "u", Password: "p"}, {Username: strings.Repeat("u", 513), Password: "p", Realm: "r"}} {
		if _, err := Dial(t.Context(), addr, c); err == nil {
			t.Errorf("%+v were taken", c)
		}
		if err := (&Server{Credentials: c, Packets: directPackets}).Serve(listenUDP(t, "127.0.0.1")); err == nil {
			t.Errorf("a server took %+v", c)
		}
	}
}

// TURN-3: whom Allow refuses gets no answer, even with the credentials.
func TestStranger(t *testing.T) {
	var allowed atomic.Pointer[string]
	s := &Server{Allow: func(client net.Addr) error {
		if a := allowed.Load(); a != nil && client.String() == *a {
			return nil
		}
		return errors.New("not of this user")
	}}
	addr := startServer(t, s)
	friend, stranger := newRawClient(t, addr, s.Credentials), newRawClient(t, addr, s.Credentials)
	name := friend.LocalAddr().String()
	allowed.Store(&name)
	peer := listenUDP(t, "127.0.0.1")
	if err := friend.open(peer.LocalAddr().(*net.UDPAddr).AddrPort()); err != nil {
		t.Fatal(err)
	}
	stranger.nonce = friend.nonce
	for _, b := range [][]byte{
		stranger.build(stun.MethodAllocate, requestUDP).Raw, stranger.build(stun.MethodBinding).Raw,
		stranger.build(stun.MethodRefresh).Raw, channelData(minChannel, "guessed"),
		sendIndication(peer.LocalAddr().(*net.UDPAddr).AddrPort(), "guessed"),
	} {
		if _, err := stranger.Write(b); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, "everything was dropped", func() bool { return s.Stats().Dropped.Total() == 5 })
	if d := s.Stats().Dropped; d.Stranger != 3 || d.Unexpected != 2 {
		t.Errorf("%+v", d)
	}
	// The server has had its chance to answer before it answered this.
	if err := friend.succeed(stun.MethodRefresh); err != nil {
		t.Fatal(err)
	}
	_ = stranger.SetReadDeadline(time.Now())
	if n, err := stranger.Read(make([]byte, 100)); err == nil {
		t.Errorf("the stranger got %d bytes", n)
	}
	// A stranger who guesses the port of a relayed address gets nothing through either.
	if _, err := friend.Write(channelData(minChannel, "out")); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 100)
	patient(t, peer)
	n, relayed, err := peer.ReadFrom(buf)
	if err != nil || string(buf[:n]) != "out" {
		t.Fatalf("%q %v", buf[:n], err)
	}
	far, err := net.DialUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 2)}, relayed.(*net.UDPAddr))
	if err != nil {
		t.Fatal(err)
	}
	defer far.Close()
	if _, err := far.Write([]byte("guessed")); err != nil {
		t.Fatal(err)
	}
	if _, err := peer.WriteTo([]byte("in"), relayed); err != nil {
		t.Fatal(err)
	}
	if n, err := friend.Read(buf); err != nil || !bytes.Equal(buf[:n], channelData(minChannel, "in")) {
		t.Errorf("% x %v", buf[:n], err)
	}
	if d := s.Stats().Dropped; d.Unexpected != 3 {
		t.Errorf("%+v", d)
	}
}

// TURN-5: many allocations at once, each with a packet connection of its own, and gone again.
func TestManyAllocations(t *testing.T) {
	many := 500
	if testing.Short() {
		many = 100
	}
	var open, opened atomic.Int64
	s := &Server{Packets: func(ctx context.Context) (net.PacketConn, error) {
		c, err := directPackets(ctx)
		if err == nil {
			open.Add(1)
			opened.Add(1)
			c = countedClose{c, &open}
		}
		return c, err
	}}
	addr := startServer(t, s, listenUDP(t, "127.0.0.1"), listenUDP(t, "127.0.0.1"))
	peer := listenUDP(t, "127.0.0.1")
	done := make(chan struct{})
	go func() { defer close(done); echo(newSocket(peer, false)) }()
	before := runtime.NumGoroutine()
	var all sync.WaitGroup
	conns := make([]*Conn, many)
	for i := range conns {
		all.Go(func() {
			c, err := Dial(t.Context(), addr, s.Credentials)
			if err != nil {
				t.Error(err)
				return
			}
			conns[i] = c
			want := fmt.Sprint("number ", i)
			buf := make([]byte, 100)
			for got := ""; got != want; { // so many at once overflow the peer's socket
				if _, err := c.WriteTo([]byte(want), peer.LocalAddr()); err != nil {
					t.Error(err)
					return
				}
				_ = c.SetReadDeadline(time.Now().Add(time.Second))
				n, _, err := c.ReadFrom(buf)
				if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
					t.Error(err)
					return
				}
				got = string(buf[:n])
			}
		})
	}
	all.Wait()
	if got := s.Stats().Allocations; got != many || open.Load() != int64(many) {
		t.Errorf("%d allocations, %d packet connections, want %d", got, open.Load(), many)
	}
	for _, c := range conns {
		if c != nil {
			_ = c.Close()
		}
	}
	// A Close is one datagram, and can be lost: the lifetime ends what is left.
	eventually(t, "the allocations are gone", func() bool { return s.Stats().Allocations == 0 })
	if open.Load() != 0 || opened.Load() != int64(many) {
		t.Errorf("%d packet connections were opened, %d are left", opened.Load(), open.Load())
	}
	eventually(t, "the goroutines are gone", func() bool { return runtime.NumGoroutine() <= before+8 }) // the server's and the peer's
	_ = peer.Close()
	<-done
}

type countedClose struct {
	net.PacketConn
	open *atomic.Int64
}

func (c countedClose) Close() error {
	err := c.PacketConn.Close()
	if err == nil {
		c.open.Add(-1)
	}
	return err
}

// TURN-10: a transport that opens no packet connection is a refusal, and one that takes
// its time is waited for.
func TestPacketsFails(t *testing.T) {
	type outcome struct {
		conn net.PacketConn
		err  error
	}
	next := make(chan outcome)
	ended := make(chan struct{}, 1)
	s := &Server{Packets: func(ctx context.Context) (net.PacketConn, error) {
		select {
		case o := <-next:
			return o.conn, o.err
		case <-ctx.Done():
			ended <- struct{}{}
			return nil, ctx.Err()
		}
	}}
	addr := startServer(t, s)
	for _, test := range []struct {
		err  error
		code int
	}{{errors.New("no way"), 508}, {ptipc.ErrNotAllowed, 403}, {nil, 508}} {
		go func() { next <- outcome{nil, test.err} }()
		_, err := Dial(t.Context(), addr, s.Credentials)
		var refused *RefusedError
		if !errors.As(err, &refused) || refused.Code != test.code {
			t.Errorf("%v: %v, want %d", test.err, err, test.code)
		}
	}
	eventually(t, "nothing is left", func() bool { return s.Stats().Allocations == 0 })

	// While one waits, others are served.
	result := make(chan error, 1)
	slow, cancel := context.WithCancel(t.Context())
	go func() {
		_, err := Dial(slow, addr, s.Credentials)
		result <- err
	}()
	eventually(t, "one is opening", func() bool { return s.Stats().Allocations == 1 })
	c := newRawClient(t, addr, s.Credentials)
	if m, err := c.exchange(c.build(stun.MethodBinding).Raw); err != nil || m.class != stun.ClassSuccessResponse {
		t.Errorf("%v %v", m, err)
	}
	cancel()
	if err := <-result; !errors.Is(err, context.Canceled) {
		t.Errorf("a dial that was given up: %v", err)
	}
	_ = s.Close()
	<-ended // the opening is given up with the server
}

// TURN-5: an allocation ends with its packet connection, and not with the first
// failure of one.
func TestPacketConnEnds(t *testing.T) {
	n := newMemNet()
	broken := make(chan *failingConn, 1)
	s := &Server{Packets: func(context.Context) (net.PacketConn, error) {
		c := &failingConn{memConn: n.listen("192.0.2.1")}
		c.failures.Store(10)
		broken <- c
		return c, nil
	}}
	conn := mustDial(t, startServer(t, s), s.Credentials)
	c := <-broken
	peer := n.listen("192.0.2.7")
	if _, err := conn.WriteTo([]byte("x"), peer.LocalAddr()); err != nil {
		t.Fatal(err)
	}
	peer.want(t, "x")
	if got := s.Stats(); got.Allocations != 1 || got.Dropped.Failed != 9 || got.Dropped.TooLarge != 1 {
		t.Errorf("%+v", got)
	}
	_ = c.Close()
	eventually(t, "the allocation has ended", func() bool { return s.Stats().Allocations == 0 })
	// The client notices when it asks for anything.
	_, _ = conn.WriteTo([]byte("x"), &net.UDPAddr{IP: net.IPv4(192, 0, 2, 9), Port: 9})
	if _, _, err := conn.ReadFrom(make([]byte, 10)); !errors.Is(err, ErrLost) {
		t.Errorf("%v does not wrap ErrLost", err)
	}
}

type failingConn struct {
	*memConn
	failures atomic.Int64
}

func (c *failingConn) ReadFrom(b []byte) (int, net.Addr, error) {
	switch n := c.failures.Add(-1); {
	case n > 0:
		return 0, nil, syscall.ECONNREFUSED
	case n == 0:
		return 0, net.UDPAddrFromAddrPort(vectorPeer), errTooLong
	}
	return c.memConn.ReadFrom(b)
}

// TURN-16: when the server is lost, the Conn ends with a clear error, at once.
func TestServerLost(t *testing.T) {
	s := &Server{}
	conn := mustDial(t, startServer(t, s), s.Credentials)
	read := make(chan error, 1)
	go func() {
		_, _, err := conn.ReadFrom(make([]byte, 10))
		read <- err
	}()
	_ = s.Close()
	peer := listenUDP(t, "127.0.0.1")
	eventually(t, "writing fails", func() bool {
		_, err := conn.WriteTo([]byte("x"), peer.LocalAddr())
		return errors.Is(err, ErrLost) && errors.Is(err, ptipc.ErrRefused)
	})
	if err := <-read; !errors.Is(err, ErrLost) {
		t.Errorf("%v does not wrap ErrLost", err)
	}
	if _, err := Dial(t.Context(), conn.session.server, s.Credentials); !errors.Is(err, ErrLost) || !errors.Is(err, ptipc.ErrRefused) {
		t.Errorf("dial: %v", err)
	}
}

// TURN-16: with WithRedial the same Conn goes on with another server.
func TestRedial(t *testing.T) {
	servers := make([]*Server, 3)
	addrs := make([]netip.AddrPort, 3)
	for i := range servers {
		servers[i] = &Server{}
		addrs[i] = startServer(t, servers[i])
	}
	calls := 0
	over := errors.New("no more servers")
	conn := mustDial(t, addrs[0], servers[0].Credentials, WithRedial(func(context.Context) (netip.AddrPort, Credentials, error) {
		calls++
		switch calls {
		case 1: // one that is not there
			return addrs[0], servers[0].Credentials, nil
		case 2, 3:
			return addrs[calls-1], servers[calls-1].Credentials, nil
		default:
			return netip.AddrPort{}, Credentials{}, over
		}
	}))
	peer := listenUDP(t, "127.0.0.1")
	done := make(chan struct{})
	go func() { defer close(done); echo(newSocket(peer, false)) }()
	buf := make([]byte, 100)
	for i, s := range servers {
		for got := ""; got != fmt.Sprint("round ", i); {
			if _, err := conn.WriteTo(fmt.Append(nil, "round ", i), peer.LocalAddr()); err != nil {
				t.Fatal(err)
			}
			_ = conn.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
			n, from, err := conn.ReadFrom(buf)
			if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
				t.Fatal(err)
			}
			if err == nil && from.String() != peer.LocalAddr().String() {
				t.Fatalf("from %v", from)
			}
			got = string(buf[:n])
		}
		_ = s.Close()
	}
	_ = conn.SetReadDeadline(time.Time{})
	for err := error(nil); err == nil; {
		_, err = conn.WriteTo([]byte("x"), peer.LocalAddr())
		if err != nil && (!errors.Is(err, over) || !errors.Is(err, ErrLost)) {
			t.Errorf("%v", err)
		}
	}
	if got := conn.Stats().Allocated; got != 3 {
		t.Errorf("%d allocations, want 3", got)
	}
	_ = peer.Close()
	<-done
}

// TURN-16: channels are bound at the next server before the application writes again.
func TestRedialRestoresChannels(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newMemNet()
		first, second := &Server{}, &Server{}
		addr1, stop1 := n.serve(t, first)
		addr2, stop2 := n.serve(t, second)
		defer stop2()
		conn, err := dial(t.Context(), addr1, first.Credentials, n.open, WithRedial(func(context.Context) (netip.AddrPort, Credentials, error) {
			return addr2, second.Credentials, nil
		}))
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		peer := n.listen("192.0.2.7")
		if _, err := conn.WriteTo([]byte("hello"), peer.LocalAddr()); err != nil {
			t.Fatal(err)
		}
		peer.want(t, "hello")
		stop1()
		time.Sleep(2 * time.Minute) // the refresh, and its retransmissions
		if _, err := peer.WriteTo([]byte("back"), conn.LocalAddr()); err != nil {
			t.Fatal(err)
		}
		buf := make([]byte, 10)
		if k, _, err := conn.ReadFrom(buf); err != nil || string(buf[:k]) != "back" {
			t.Errorf("%q %v", buf[:k], err)
		}
	})
}

// TURN-5: a packet connection that blocks keeps nobody else waiting.
func TestSlowPacketConn(t *testing.T) {
	release := make(chan struct{})
	first := true
	s := &Server{Packets: func(ctx context.Context) (net.PacketConn, error) {
		c, err := directPackets(ctx)
		if err == nil && first {
			first, c = false, blockedConn{c, release}
		}
		return c, err
	}}
	addr := startServer(t, s)
	slow, fast := mustDial(t, addr, s.Credentials), mustDial(t, addr, s.Credentials)
	peer := listenUDP(t, "127.0.0.1")
	if _, err := slow.WriteTo([]byte("slow 0"), peer.LocalAddr()); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the channel is bound", func() bool { return slow.Stats().SentPackets == 1 })
	for i := range 2 * relayQueue {
		if _, err := slow.WriteTo(fmt.Append(nil, "slow ", i+1), peer.LocalAddr()); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := fast.WriteTo([]byte("fast"), peer.LocalAddr()); err != nil {
		t.Fatal(err)
	}
	patient(t, peer)
	buf := make([]byte, 100)
	if n, _, err := peer.ReadFrom(buf); err != nil || string(buf[:n]) != "fast" {
		t.Errorf("%q %v", buf[:n], err)
	}
	eventually(t, "what did not fit was counted", func() bool { return s.Stats().Dropped.Full >= relayQueue })
	close(release)
	if n, _, err := peer.ReadFrom(buf); err != nil || string(buf[:n]) != "slow 0" {
		t.Errorf("%q %v", buf[:n], err)
	}
}

type blockedConn struct {
	net.PacketConn
	release chan struct{}
}

func (c blockedConn) WriteTo(b []byte, addr net.Addr) (int, error) {
	<-c.release
	return c.PacketConn.WriteTo(b, addr)
}

// TURN-11: what a client is told of the packet connection's address.
func TestRelayedAddress(t *testing.T) {
	for _, test := range []struct {
		addr net.Addr
		want string
	}{
		{&net.UDPAddr{IP: net.IPv4(192, 0, 2, 1), Port: 7}, "192.0.2.1:7"},
		{&net.UDPAddr{IP: net.ParseIP("2001:db8::1"), Port: 7}, "[2001:db8::1]:7"},
		{&net.UDPAddr{IP: net.ParseIP("fe80::1"), Zone: "eth0", Port: 7}, "[fe80::1]:7"},
		{&net.UDPAddr{IP: net.IPv6zero, Port: 7}, "0.0.0.0:7"},
		{&net.UDPAddr{Port: 7}, "0.0.0.0:0"},
		{(*net.UDPAddr)(nil), "0.0.0.0:0"},
		{&net.TCPAddr{IP: net.IPv4(192, 0, 2, 1), Port: 7}, "0.0.0.0:0"},
		{nil, "0.0.0.0:0"},
	} {
		if got := relayedAddr(test.addr).String(); got != test.want {
			t.Errorf("%v: %s, want %s", test.addr, got, test.want)
		}
	}
}

// TURN-3: when a client has gone, and its port has become a stranger's, its allocation is not theirs.
func TestPortOfAnother(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newMemNet()
		var gone atomic.Bool
		s := &Server{Allow: func(net.Addr) error {
			if gone.Load() {
				return errors.New("of another user")
			}
			return nil
		}}
		addr, stop := n.serve(t, s)
		defer stop()
		c := &memClient{memConn: n.listen("127.0.0.1"), server: addr, credentials: s.Credentials}
		peer := n.listen("192.0.2.7")
		c.must(t, stun.MethodAllocate, requestUDP)
		c.must(t, stun.MethodChannelBind, channelNumber(minChannel), peerAddress(peer.addr))
		time.Sleep(allowInterval)
		c.put(t, channelData(minChannel, "mine"))
		peer.want(t, "mine")
		gone.Store(true)
		time.Sleep(allowInterval)
		c.put(t, channelData(minChannel, "theirs"))
		peer.want(t, "")
		if stats := s.Stats(); stats.Allocations != 0 || stats.Dropped.Stranger != 1 {
			t.Errorf("%+v", stats)
		}
	})
}

// TURN-6: an Allocate request that comes again is answered as before.
func TestAllocateAgain(t *testing.T) {
	var opened atomic.Int64
	s := &Server{Packets: func(ctx context.Context) (net.PacketConn, error) { opened.Add(1); return directPackets(ctx) }}
	c := newRawClient(t, startServer(t, s), s.Credentials)
	if _, err := c.request(stun.MethodAllocate); err != nil { // for a nonce
		t.Fatal(err)
	}
	request := c.build(stun.MethodAllocate, requestUDP).Raw
	first, err := c.exchange(request)
	if err != nil || first.class != stun.ClassSuccessResponse {
		t.Fatal(first, err)
	}
	again, err := c.exchange(request)
	if err != nil || !bytes.Equal(first.raw, again.raw) || opened.Load() != 1 {
		t.Errorf("% x, then % x: %v; %d packet connections", first.raw, again.raw, err, opened.Load())
	}
}

// TURN-5: many flows through one socket do not get into each other's way.
func TestInterleavedFlows(t *testing.T) {
	s := &Server{}
	addr := startServer(t, s)
	const flows, packets = 8, 50
	peers, conns := make([]*net.UDPConn, flows), make([]*Conn, flows)
	for i := range flows {
		peers[i], conns[i] = listenUDP(t, "127.0.0.1"), mustDial(t, addr, s.Credentials)
		if _, err := conns[i].WriteTo([]byte("first"), peers[i].LocalAddr()); err != nil {
			t.Fatal(err)
		}
	}
	buf := make([]byte, 100)
	for i, peer := range peers {
		patient(t, peer)
		if n, _, err := peer.ReadFrom(buf); err != nil || string(buf[:n]) != "first" {
			t.Fatalf("%d: %q %v", i, buf[:n], err)
		}
	}
	for n := range packets {
		for i, conn := range conns {
			if _, err := conn.WriteTo(fmt.Append(nil, i, n), peers[i].LocalAddr()); err != nil {
				t.Fatal(err)
			}
		}
	}
	for i, peer := range peers {
		for n := range packets {
			k, _, err := peer.ReadFrom(buf)
			if want := fmt.Sprint(i, n); err != nil || string(buf[:k]) != want {
				t.Fatalf("%q, want %q: %v", buf[:k], want, err)
			}
		}
	}
}

// A Conn's server is on the loopback: nothing goes anywhere else in clear.
func TestDialElsewhere(t *testing.T) {
	for _, addr := range []string{"192.0.2.1:3478", "0.0.0.0:3478", "127.0.0.1:0", "[2001:db8::1]:3478"} {
		if _, err := Dial(t.Context(), netip.MustParseAddrPort(addr), NewCredentials()); !errors.Is(err, ptipc.ErrAddressType) {
			t.Errorf("%s: %v", addr, err)
		}
	}
	if _, err := Dial(t.Context(), netip.AddrPort{}, NewCredentials()); !errors.Is(err, ptipc.ErrAddressType) {
		t.Errorf("no address: %v", err)
	}
}
