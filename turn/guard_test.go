package turn

import (
	"bytes"
	"crypto/rand"
	"errors"
	"net"
	"net/netip"
	"runtime"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pion/stun"
)

// crashes are indications of 20 bytes and an empty peer address: one of them ended any
// process that read it with pion (GO-2026-6163).
func crashes() map[stun.Method][]byte {
	all := map[stun.Method][]byte{}
	for _, method := range []stun.Method{stun.MethodSend, stun.MethodData} {
		all[method] = stun.MustBuild(stun.TransactionID, stun.NewType(method, stun.ClassIndication),
			stun.RawAttribute{Type: stun.AttrXORPeerAddress}).Raw
	}
	return all
}

// TURN-2: neither end is crashed by the published datagram, nor does it get to pion.
func TestPublishedCrash(t *testing.T) {
	s := &Server{}
	addr := startServer(t, s)
	peer := listenUDP(t, "127.0.0.1")
	for method, datagram := range crashes() {
		if len(datagram) != 24 {
			t.Fatalf("% x", datagram)
		}
		if !crashesPion(datagram) {
			t.Errorf("%s: pion takes it; the test shows nothing", method)
		}
		c := newRawClient(t, addr, s.Credentials)
		for _, open := range []bool{false, true} {
			if open {
				if err := c.open(peer.LocalAddr().(*net.UDPAddr).AddrPort()); err != nil {
					t.Fatal(err)
				}
			}
			if _, err := c.Write(datagram); err != nil {
				t.Fatal(err)
			}
			if _, err := c.exchange(c.build(stun.MethodBinding).Raw); err != nil {
				t.Errorf("%s: the server does not answer any more: %v", method, err)
			}
		}
	}

	// The client's end: a server that sends them.
	server := listenUDP(t, "127.0.0.1")
	go func() {
		b := make([]byte, maxDatagram)
		for {
			n, from, err := server.ReadFromUDPAddrPort(b)
			if err != nil {
				return
			}
			for _, datagram := range crashes() {
				_, _ = server.WriteToUDPAddrPort(datagram, from)
			}
			var m message
			if m.parse(b[:n]) != nil {
				continue
			}
			all := []stun.Setter{transaction(m.id), stun.NewType(m.method, stun.ClassSuccessResponse)}
			if m.method == stun.MethodAllocate {
				all = append(all, addressAttribute{stun.AttrXORRelayedAddress, from})
			}
			answer := stun.MustBuild(append(all, uint32Attribute(stun.AttrLifetime, 600), s.Credentials.key())...)
			_, _ = server.WriteToUDPAddrPort(answer.Raw, from)
			if m.method == stun.MethodChannelBind {
				_, _ = server.WriteToUDPAddrPort(channelData(m.channel, "alive"), from)
			}
		}
	}()
	conn := mustDial(t, server.LocalAddr().(*net.UDPAddr).AddrPort(), s.Credentials)
	if _, err := conn.WriteTo([]byte("x"), peer.LocalAddr()); err != nil {
		t.Fatal(err)
	}
	patient(t, conn)
	buf := make([]byte, 100)
	if n, _, err := conn.ReadFrom(buf); err != nil || string(buf[:n]) != "alive" {
		t.Errorf("%q %v", buf[:n], err)
	}
	if got := conn.Stats().Dropped.Malformed; got < 2 {
		t.Errorf("%d datagrams were counted as malformed", got)
	}
}

// crashesPion says whether pion's decoder panics.
func crashesPion(datagram []byte) (crashed bool) {
	defer func() { crashed = recover() != nil }()
	m := stun.Message{Raw: bytes.Clone(datagram)}
	if err := m.Decode(); err != nil {
		return false
	}
	var peer stun.XORMappedAddress
	_ = peer.GetFromAs(&m, stun.AttrXORPeerAddress)
	return false
}

// TURN-2: a flood of garbage on every port neither crashes nor fills anything, and
// those who are served go on being served.
func TestGarbageFlood(t *testing.T) {
	s := &Server{}
	sockets := []net.PacketConn{listenUDP(t, "127.0.0.1"), listenUDP(t, "127.0.0.1")}
	addr := startServer(t, s, sockets...)
	conn := mustDial(t, addr, s.Credentials)
	peer := listenUDP(t, "127.0.0.1")
	done := make(chan struct{})
	go func() { defer close(done); echo(newSocket(peer, false)) }()
	roundTrip := func() {
		t.Helper()
		buf := make([]byte, 100)
		for {
			if _, err := conn.WriteTo([]byte("alive"), peer.LocalAddr()); err != nil {
				t.Fatal(err)
			}
			_ = conn.SetReadDeadline(time.Now().Add(200 * time.Millisecond))
			n, _, err := conn.ReadFrom(buf)
			for err == nil && string(buf[:n]) != "alive" { // garbage from a port of an address that has permission
				n, _, err = conn.ReadFrom(buf)
			}
			if err == nil {
				return
			} else if ne := net.Error(nil); !errors.As(err, &ne) || !ne.Timeout() {
				t.Fatal(err)
			}
		}
	}
	roundTrip()
	ports := []net.Addr{sockets[0].LocalAddr(), sockets[1].LocalAddr(), conn.LocalAddr(), conn.session.sock.LocalAddr()}
	flood := func(count int) {
		var all sync.WaitGroup
		for _, port := range ports {
			all.Go(func() {
				from, err := net.DialUDP("udp4", nil, port.(*net.UDPAddr))
				if err != nil {
					t.Error(err)
					return
				}
				defer from.Close()
				b := make([]byte, 2*maxDatagram)
				for i := range count {
					_, _ = rand.Read(b)
					b := b[:i*37%len(b)]
					switch {
					case len(b) < stunHeader:
					case i%3 == 0: // nearly STUN
						copy(b, []byte{0, byte(i), byte((len(b) - stunHeader) >> 8), byte(len(b) - stunHeader), 0x21, 0x12, 0xA4, 0x42})
					case i%3 == 1:
						b[0] = 0x40
					}
					_, _ = from.Write(b) // refused where the socket is connected to another
				}
			})
		}
		all.Wait()
	}
	flood(2000)
	roundTrip()
	goroutines, memory := runtime.NumGoroutine(), heap()
	flood(10000)
	roundTrip()
	eventually(t, "the flood was dropped", func() bool { return s.Stats().Dropped.Total() > 1000 })
	if got := s.Stats().Allocations; got != 1 {
		t.Errorf("%d allocations", got)
	}
	eventually(t, "there are no more goroutines", func() bool { return runtime.NumGoroutine() <= goroutines })
	if got := heap(); got > memory+4<<20 {
		t.Errorf("the heap grew from %d to %d bytes", memory, got)
	}
	_ = peer.Close()
	<-done
}

func heap() uint64 {
	var m runtime.MemStats
	runtime.GC()
	runtime.GC() // what pools kept is gone after the second
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}

// FuzzServer throws a datagram at a server, from a client that has an allocation and
// from one that has none; with any number of pion's decoders behind the guard. Valid
// messages are signed, so that the fuzzer gets past the credentials.
func FuzzServer(f *testing.F) {
	for _, v := range readVectors(f, "server") {
		if v.method == 0 {
			f.Add(v.datagram, false)
		} else {
			m := stun.MustBuild(append([]stun.Setter{stun.TransactionID, stun.NewType(stun.Method(v.method), stun.ClassRequest)}, v.setters...)...)
			f.Add(m.Raw, true)
		}
	}
	f.Fuzz(func(t *testing.T, datagram []byte, sign bool) {
		s := &Server{Credentials: roleCredentials}
		inBubble(t, s, func(t *testing.T, n *memNet, c *memClient) {
			stranger := n.listen("127.0.0.1")
			c.must(t, stun.MethodAllocate, requestUDP)
			c.must(t, stun.MethodChannelBind, channelNumber(minChannel), peerAddress(vectorPeer))
			var m message
			if sign && m.parse(datagram) == nil {
				d := stun.Message{Raw: bytes.Clone(datagram)}
				if err := d.Decode(); err != nil {
					t.Fatalf("the guard takes what pion does not: %v: % x", err, datagram)
				}
				setters := []stun.Setter{transaction(m.id), d.Type}
				for _, a := range d.Attributes {
					if a.Type != stun.AttrFingerprint && a.Type != stun.AttrMessageIntegrity {
						setters = append(setters, a)
					}
				}
				datagram = stun.MustBuild(append(setters, stun.NewUsername(roleCredentials.Username), stun.NewRealm(roleCredentials.Realm),
					attribute(stun.AttrNonce, c.nonce...), roleCredentials.key())...).Raw
			}
			c.put(t, datagram)
			if _, err := stranger.WriteTo(datagram, net.UDPAddrFromAddrPort(c.server)); err != nil {
				t.Fatal(err)
			}
			for answer := c.receive(); answer != nil; answer = c.receive() {
				if m.parse(answer) != nil || m.class == stun.ClassRequest {
					t.Errorf("the server answered % x", answer)
				}
			}
			// Whatever it was, the server lives.
			c.request(t, stun.MethodRefresh)
			if got := n.count(); got < 3 || got > 5 {
				t.Errorf("%d sockets", got)
			}
		})
	})
}

// FuzzClient throws a datagram at a Conn, from its server.
func FuzzClient(f *testing.F) {
	for _, v := range readVectors(f, "client") {
		f.Add(v.datagram)
	}
	f.Fuzz(func(t *testing.T, datagram []byte) {
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
			peer := n.listen(vectorPeer.Addr().String())
			if _, err := conn.WriteTo([]byte("out"), peer.LocalAddr()); err != nil {
				t.Fatal(err)
			}
			synctest.Wait()
			n.arrive(conn.session.sock.LocalAddr().(*net.UDPAddr).AddrPort(), memPacket{datagram, addr})
			n.arrive(conn.session.relayed, memPacket{[]byte("in"), peer.addr})
			_ = conn.SetReadDeadline(time.Now().Add(time.Second))
			buf := make([]byte, 4096)
			for got := ""; got != "in"; {
				n, _, err := conn.ReadFrom(buf)
				if err != nil {
					t.Fatal(err)
				}
				got = string(buf[:n])
			}
		})
	})
}

// FuzzParse: what the guard takes, pion takes, and reads as the guard does.
func FuzzParse(f *testing.F) {
	for _, kind := range []string{"server", "client"} {
		for _, v := range readVectors(f, kind) {
			f.Add(v.datagram)
		}
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		if channel, payload, ok := parseChannelData(b); ok {
			again := make([]byte, channelHeader+len(payload))
			copy(again[channelHeader:], payload)
			putChannel(again, channel)
			if !bytes.HasPrefix(b, again) || len(b)-len(again) > 3 {
				t.Errorf("% x is read as % x", b, again)
			}
		}
		var m message
		if m.parse(b) != nil {
			return
		}
		d := stun.Message{Raw: bytes.Clone(b)}
		if err := d.Decode(); err != nil {
			t.Fatalf("pion: %v", err)
		}
		if d.Type.Method != m.method || d.Type.Class != m.class || d.TransactionID != m.id {
			t.Errorf("%v, pion %v", m, d)
		}
		// The first byte of an address is to be ignored (RFC 5389, section 15.2). pion does not.
		if v, err := d.Get(stun.AttrXORPeerAddress); err == nil && len(m.peers) > 0 && !m.invalid && v[0] == 0 {
			var peer stun.XORMappedAddress
			if err := peer.GetFromAs(&d, stun.AttrXORPeerAddress); err != nil {
				t.Fatalf("pion: %v", err)
			}
			ip, _ := netip.AddrFromSlice(peer.IP)
			if got := netip.AddrPortFrom(ip.Unmap(), uint16(peer.Port)); got != m.peers[0] {
				t.Errorf("%v, pion %v", m.peers[0], got)
			}
		}
		key := roleCredentials.key()
		if m.integrity != 0 && m.intact(key) != (key.Check(&d) == nil) {
			t.Errorf("MESSAGE-INTEGRITY: %v, pion %v", m.intact(key), key.Check(&d))
		}
	})
}
