package front

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"pthost/ptipc"
	"pthost/transports/direct"
)

func udpSocket(t *testing.T, addr string) *net.UDPConn {
	t.Helper()
	conn, err := net.ListenPacket("udp", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	_ = conn.SetDeadline(time.Now().Add(patience))
	return conn.(*net.UDPConn)
}

// echoUDP answers each datagram with what it was.
func echoUDP(t *testing.T, addr string) netip.AddrPort {
	t.Helper()
	conn := udpSocket(t, addr)
	_ = conn.SetDeadline(time.Time{})
	var serving sync.WaitGroup
	serving.Go(func() {
		buf := make([]byte, 1<<16)
		for {
			n, from, err := conn.ReadFrom(buf)
			if err != nil {
				return
			}
			_, _ = conn.WriteTo(buf[:n], from)
		}
	})
	t.Cleanup(func() { conn.Close(); serving.Wait() })
	return conn.LocalAddr().(*net.UDPAddr).AddrPort()
}

func freePackets(t *testing.T) *ptipc.Transport {
	t.Helper()
	transport, err := direct.Open(t.Context(), nil, ptipc.Env{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { transport.Close() })
	return transport
}

// PKT-9: a forward for datagrams keeps its sources apart.
func TestForwardPackets(t *testing.T) {
	conn, err := ListenPacket("udp://127.0.0.1:0", quiet())
	if err != nil {
		t.Fatal(err)
	}
	f := ForwardPackets(freePackets(t).Packets["direct"], echoUDP(t, "127.0.0.1:0"), quiet())
	served := make(chan error, 1)
	go func() { served <- f.Serve(conn) }()
	a, b := udpSocket(t, "127.0.0.1:0"), udpSocket(t, "127.0.0.1:0")
	for i, from := range []*net.UDPConn{a, b, a} {
		word := bytes.Repeat([]byte{byte(i)}, 1500)
		if _, err := from.WriteTo(word, conn.LocalAddr()); err != nil {
			t.Fatal(err)
		}
		buf := make([]byte, 1<<16)
		if n, _, err := from.ReadFrom(buf); err != nil || !bytes.Equal(buf[:n], word) {
			t.Errorf("%d bytes, %v", n, err)
		}
	}
	if s := f.Stats(); s.Opened != 2 || s.Active != 2 {
		t.Errorf("%+v", s)
	}
	_ = f.Shutdown(t.Context())
	if err := <-served; err != nil {
		t.Error(err)
	}
	for url, want := range map[string]string{
		"tcp://127.0.0.1:0": "write udp://", "udp://0.0.0.0:0": "not a local address", "udp://localhost:1": "not a local address", "udp://" + a.LocalAddr().String(): "in use",
	} {
		if conn, err := ListenPacket(url, quiet()); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, %v", url, conn, err)
		}
	}
}

// request sends one SOCKS5 request and returns the reply.
func request(t *testing.T, conn net.Conn, command byte, addr ...byte) []byte {
	t.Helper()
	_ = conn.SetDeadline(time.Now().Add(patience))
	if _, err := conn.Write(append([]byte{5, 1, 0, 5, command, 0}, addr...)); err != nil {
		t.Fatal(err)
	}
	reply := make([]byte, 2+4)
	if _, err := io.ReadFull(conn, reply); err != nil {
		t.Fatal(err)
	}
	rest := make([]byte, map[byte]int{1: 6, 4: 18}[reply[5]])
	if _, err := io.ReadFull(conn, rest); err != nil {
		t.Fatal(err)
	}
	return append(reply[2:], rest...)
}

// associated asks for an association and returns where datagrams go.
func associated(t *testing.T, proxy string, addr ...byte) (net.Conn, *net.UDPAddr) {
	t.Helper()
	conn, err := net.Dial("tcp", proxy)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	reply := request(t, conn, 3, addr...)
	if reply[1] != 0 {
		t.Fatalf("% x", reply)
	}
	at, _ := netip.AddrFromSlice(reply[4 : len(reply)-2])
	return conn, &net.UDPAddr{IP: at.AsSlice(), Port: int(reply[len(reply)-2])<<8 | int(reply[len(reply)-1])}
}

// PKT-10: datagrams of a client of the SOCKS5 proxy go out and come back, to IPv4 and
// IPv6; fragments, names, what is malformed and what others send are dropped; the
// association ends with its connection.
func TestAssociate(t *testing.T) {
	transport := freePackets(t)
	for _, listenAt := range []string{"tcp://127.0.0.1:0", "tcp://[::1]:0"} {
		l := listen(t, listenAt)
		serve(t, SOCKS5WithPackets(transport.Connections["direct"], transport.Packets["direct"], nil, quiet()), l)
		conn, at := associated(t, l.Addr().String(), 1, 0, 0, 0, 0, 0, 0)
		if tcp := l.Addr().(*net.TCPAddr); !tcp.IP.Equal(at.IP) {
			t.Errorf("the relay's address is %v", at)
		}
		client := udpSocket(t, net.JoinHostPort(at.IP.String(), "0"))
		buf := make([]byte, 1<<16)
		ask := func(from *net.UDPConn, packet []byte) {
			t.Helper()
			if _, err := from.WriteTo(packet, at); err != nil {
				t.Fatal(err)
			}
		}
		var last []byte
		for _, addr := range []string{"127.0.0.1:0", "[::1]:0"} {
			header := appendHeader(nil, echoUDP(t, addr))
			for _, size := range []int{0, 1500} {
				last = append(bytes.Clone(header), bytes.Repeat([]byte{7}, size)...)
				ask(client, last)
				if n, from, err := client.ReadFrom(buf); err != nil || !bytes.Equal(buf[:n], last) || from.String() != at.String() {
					t.Errorf("%s: % x from %v, %v", addr, buf[:min(n, 40)], from, err)
				}
			}
		}
		fragment, reserved, port0 := bytes.Clone(last), bytes.Clone(last), bytes.Clone(last)
		fragment[2], reserved[0], port0[20], port0[21] = 1, 1, 0, 0
		for _, bad := range [][]byte{
			fragment, reserved, port0,
			{},
			{0},
			{0, 0, 0},
			{0, 0, 0, 1},
			{0, 0, 0, 4, 1, 2, 3},
			{0, 0, 0, 9, 1, 2, 3, 4, 5, 6},
			append([]byte{0, 0, 0, 3, 9}, "localhost\x00\x35word"...), append([]byte{0, 0, 0, 1, 0, 0, 0, 0, 0, 53}, "word"...),
		} {
			ask(client, bad)
		}
		ask(udpSocket(t, net.JoinHostPort(at.IP.String(), "0")), last) // another socket
		end := append(bytes.Clone(last[:22]), "end"...)
		ask(client, end)
		if n, _, err := client.ReadFrom(buf); err != nil || !bytes.Equal(buf[:n], end) {
			t.Errorf("% x, %v", buf[:min(n, 40)], err)
		}
		if s, err := transport.Stats(t.Context()); err != nil || s.Active != 1 {
			t.Errorf("%+v, %v", s, err)
		}
		conn.Close()
		waitFor(t, func() bool { s, _ := transport.Stats(context.Background()); return s.Active == 0 })
	}
}

// When the transport ends, the client's connection does too.
func TestAssociateWithoutTransport(t *testing.T) {
	transport := freePackets(t)
	l := listen(t, "tcp://127.0.0.1:0")
	serve(t, SOCKS5WithPackets(transport.Connections["direct"], transport.Packets["direct"], nil, quiet()), l)
	conn, _ := associated(t, l.Addr().String(), 1, 0, 0, 0, 0, 0, 0)
	if err := transport.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := conn.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		t.Errorf("the connection of an association that has ended: %v", err)
	}
}

// waitFor waits for what another goroutine is about to do.
func waitFor(t *testing.T, ok func() bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for !ok() {
		select {
		case <-tick.C:
		case <-ctx.Done():
			t.Fatal("it did not come about")
		}
	}
}

// PKT-10: a client that has told its port is heard from there alone. Names are answered
// with reply 8, other commands with 7, and what cannot be opened with its class.
func TestAssociateReplies(t *testing.T) {
	transport := freePackets(t)
	fail := false
	packets := func(ctx context.Context) (net.PacketConn, error) {
		if fail {
			return nil, ptipc.WithClass(ptipc.ErrNotAllowed, errors.New("no"))
		}
		return transport.Packets["direct"](ctx)
	}
	l := listen(t, "tcp://127.0.0.1:0")
	serve(t, SOCKS5WithPackets(transport.Connections["direct"], packets, nil, quiet()), l)
	client, other := udpSocket(t, "127.0.0.1:0"), udpSocket(t, "127.0.0.1:0")
	port := client.LocalAddr().(*net.UDPAddr).Port
	_, at := associated(t, l.Addr().String(), 1, 10, 1, 2, 3, byte(port>>8), byte(port))
	packet := append(appendHeader(nil, echoUDP(t, "127.0.0.1:0")), "mine"...)
	for _, from := range []*net.UDPConn{other, client} {
		if _, err := from.WriteTo(packet, at); err != nil {
			t.Fatal(err)
		}
	}
	buf := make([]byte, 100)
	if n, _, err := client.ReadFrom(buf); err != nil || !bytes.Equal(buf[:n], packet) {
		t.Errorf("% x, %v", buf[:n], err)
	}
	dial := func(addr string) net.Conn {
		conn, err := net.Dial("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close() })
		return conn
	}
	if reply := request(t, dial(l.Addr().String()), 3, append([]byte{3, 9}, "localhost\x00\x35"...)...); reply[1] != byte(ptipc.ErrAddressType) {
		t.Errorf("a name: % x", reply)
	}
	if reply := request(t, dial(l.Addr().String()), 2, 1, 0, 0, 0, 0, 0, 0); reply[1] != byte(ptipc.ErrCommand) {
		t.Errorf("BIND: % x", reply)
	}
	fail = true
	if reply := request(t, dial(l.Addr().String()), 3, 1, 0, 0, 0, 0, 0, 0); reply[1] != byte(ptipc.ErrNotAllowed) {
		t.Errorf("a factory that fails: % x", reply)
	}
	streams := listen(t, "tcp://127.0.0.1:0")
	serve(t, SOCKS5(transport.Connections["direct"], nil, quiet()), streams)
	if reply := request(t, dial(streams.Addr().String()), 3, 1, 0, 0, 0, 0, 0, 0); reply[1] != byte(ptipc.ErrCommand) {
		t.Errorf("a proxy for streams alone: % x", reply)
	}
}

// Whatever comes as a datagram, taking its header away does not fail in another way than it may,
// and what was taken away can be put back.
func FuzzParsePacket(f *testing.F) {
	for _, seed := range [][]byte{
		{0, 0, 0, 1, 192, 0, 2, 1, 0, 53, 'x'},
		{0, 0, 0, 3, 1, 'a', 0, 53},
		{0, 0, 1, 1, 192, 0, 2, 1, 0, 53},
		{},
		{0, 0, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 192, 0, 2, 1, 0, 53},
		{0, 0, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 0, 0, 0, 0, 0, 53}, // nowhere, mapped
		{0, 0, 0, 4, 0x20, 1, 0xd, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 53, 'x'},
	} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		to, payload, err := parsePacket(b)
		if err != nil {
			return
		}
		again, same, err := parsePacket(append(appendHeader(nil, to), payload...))
		if err != nil || again != to || !bytes.Equal(same, payload) || to.Port() == 0 || !to.Addr().IsValid() {
			t.Fatalf("% x: %v, % x, %v", b, to, payload, err)
		}
	})
}
