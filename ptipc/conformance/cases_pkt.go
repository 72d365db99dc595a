package conformance

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"time"

	"pthost/turn"
)

// packetCases are about packet factories, which are reached over TURN.
var packetCases = []Case{
	must("PKT-3/form", func(t *trial) {
		m := t.packetMethod(t.child())
		const expected = "CMETHOD NAME turn and a loopback ip:port, with username, password and realm in ARGS"
		addr, err := netip.ParseAddrPort(m.addr)
		if err != nil || !addr.Addr().IsLoopback() || addr.Port() == 0 {
			t.fell(expected, "%s", m.addr)
		}
		for _, key := range []string{"username", "password", "realm"} {
			if m.arg(key) == "" {
				t.fell(expected, "no %s", key) // ARGS are secrets
			}
		}
	}),
	must("PKT-4/without-credentials", func(t *trial) {
		t.refusesAllocation(t.packetServer(t.packetMethod(t.child())), nil)
	}),
	must("PKT-4/wrong-password", func(t *trial) {
		m := t.packetMethod(t.child())
		server := t.packetServer(m)
		challenge := t.refusesAllocation(server, nil)
		if challenge[attrRealm] == nil || challenge[attrNonce] == nil {
			t.fell("realm and nonce in the answer to an Allocate without credentials", "%q, %q", challenge[attrRealm], challenge[attrNonce])
		}
		var integrity [20]byte // of whoever has to guess
		_, _ = rand.Read(integrity[:])
		var credentials []byte
		credentials = appendAttr(credentials, attrUsername, []byte(m.arg("username")))
		credentials = appendAttr(credentials, attrRealm, challenge[attrRealm])
		credentials = appendAttr(credentials, attrNonce, challenge[attrNonce])
		t.refusesAllocation(server, appendAttr(credentials, attrIntegrity, integrity[:]))
	}),
	must("PKT-4/fresh", func(t *trial) {
		first, second := t.packetMethod(t.ready(launch{})), t.packetMethod(t.ready(launch{}))
		if first.arg("password") == second.arg("password") {
			t.fell("other credentials at another start", "the same password twice")
		}
	}),
	must("PKT-5/other-user", func(t *trial) {
		m := t.packetMethod(t.child())
		own := t.packetServer(m)
		t.refusesAllocation(own, nil) // it answers its own user
		var other net.Conn
		t.need(asUser(nobodyUID, func() (err error) { other, err = t.dialUDP(m.addr); return err }))
		t.onEnd(func() { other.Close() })
		if _, err := other.Write(allocate(nil)); err != nil {
			t.cannot("%v", err)
		}
		// What this user is answered afterwards is behind whatever the other would be.
		t.refusesAllocation(own, nil)
		_ = other.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
		buf := make([]byte, 2048)
		if n, err := other.Read(buf); err == nil {
			t.show("child >", buf[:n])
			t.fell("nothing for another user of the machine", "an answer of %d bytes", n)
		}
	}),
	must("PKT-6/whole", func(t *trial) {
		c := t.child()
		far := t.packetEcho()
		conn := t.allocation(t.packetMethod(c))
		for _, size := range []int{0, 1, 1200, 1500} {
			t.echoPacket(conn, far, bytes.Repeat([]byte{byte(size) + 1}, size))
		}
	}),
	must("PKT-2/unasked", func(t *trial) {
		c := t.child()
		if t.suite.far != nil {
			t.cannot("the far end is the child's own server: nobody else can say what the transport would understand")
		}
		far := t.packetFar()
		conn := t.allocation(t.packetMethod(c))
		t.echoPacket(conn, far, []byte("asked"))
		stranger, err := net.ListenPacket("udp", "127.0.0.2:0") //nolint:forbidigo // the suite is a peer of its own
		t.need(err)
		t.onEnd(func() { stranger.Close() })
		far.mu.Lock()
		wire := far.from
		far.mu.Unlock()
		t.showText("127.0.0.2 sends to the socket of the allocation")
		if _, err := stranger.WriteTo([]byte("unasked"), wire); err != nil {
			t.cannot("%v", err)
		}
		if got := t.echoPacket(conn, far, []byte("asked again")); got > 0 {
			t.fell("nothing from an address that nothing was sent to", "%d datagrams", got)
		}
	}),
	must("PKT-7/given-back", func(t *trial) {
		if runtime.GOOS != "linux" {
			t.cannot("descriptors can be counted on Linux alone")
		}
		const allocations = 20
		c := t.ready(launch{})
		m := t.packetMethod(c)
		t.allocation(m).Close()
		before := 0
		t.until(func() bool { // until it has come to rest
			last := before
			before = descriptors(c.proc.Pid())
			return before == last
		})
		var conns []net.PacketConn
		for range allocations {
			conns = append(conns, t.allocation(m))
		}
		for _, conn := range conns {
			conn.Close()
		}
		if !t.until(func() bool { return descriptors(c.proc.Pid()) < before+allocations/2 }) {
			t.fell(fmt.Sprintf("about %d descriptors after %d allocations have ended", before, allocations), "%d", descriptors(c.proc.Pid()))
		}
	}),
	must("PROXY-4/not-around", func(t *trial) {
		t.extended()
		t.packetMethod(t.child()) // it has one when there is no proxy
		far := t.packetFar()
		proxy := t.upstream("", "", dialer)
		c := t.start(launch{host: map[string]any{"proxy": "socks5://" + proxy.addr()}})
		if !t.settled(c) {
			t.exit(c, "for a child of datagrams alone under a proxy for streams", 69)
			return
		}
		for _, m := range c.methods() {
			if m.protocol != turnProtocol {
				continue
			}
			conn := t.allocation(m)
			for range packetTries {
				if _, err := conn.WriteTo([]byte("around"), far.addr()); err != nil {
					return
				}
				t.pause()
			}
			if t.until(func() bool { return far.count() > 0 }) {
				t.fell("no datagram around a proxy for streams", "%d of them", far.count())
			}
		}
	}),
}

const (
	turnProtocol = "turn"
	// packetTries is how often a datagram is sent, since it may be lost.
	packetTries = 10
)

// arg is the value of a key of ARGS.
func (m method) arg(key string) string {
	for _, kv := range strings.Split(m.args, ",") {
		if k, v, _ := strings.Cut(kv, "="); k == key {
			return v
		}
	}
	return ""
}

// packetMethod is the packet factory of the child.
func (t *trial) packetMethod(c *child) method {
	var found []method
	for _, m := range c.methods() {
		if m.protocol == turnProtocol {
			found = append(found, m)
		}
	}
	for _, m := range found {
		if m.name == t.suite.subject.Factory || len(found) == 1 {
			return m
		}
	}
	if len(found) == 0 {
		t.cannot("the child announces no packet factory")
	}
	t.cannot("the child announces %d packet factories; name one of them in Subject.Factory", len(found))
	return method{}
}

func (t *trial) dialUDP(addr string) (net.Conn, error) {
	var d net.Dialer
	return d.DialContext(t.ctx, "udp", addr)
}

// packetServer is a socket that is connected to the TURN server of a packet factory.
func (t *trial) packetServer(m method) net.Conn {
	conn, err := t.dialUDP(m.addr)
	t.need(err)
	t.onEnd(func() { conn.Close() })
	return conn
}

// What is needed of STUN (RFC 5389) and TURN (RFC 5766).
const (
	stunHeader    = 20
	stunCookie    = 0x2112A442
	allocateAsk   = 0x0003
	allocateError = 0x0113

	attrUsername  = 0x0006
	attrIntegrity = 0x0008
	attrErrorCode = 0x0009
	attrRealm     = 0x0014
	attrNonce     = 0x0015
	attrTransport = 0x0019
)

func appendAttr(b []byte, kind uint16, value []byte) []byte {
	b = binary.BigEndian.AppendUint16(b, kind)
	b = binary.BigEndian.AppendUint16(b, uint16(len(value)))
	b = append(b, value...)
	return append(b, make([]byte, -len(value)&3)...)
}

// allocate is a request for an allocation, with the attributes of credentials at its end.
func allocate(credentials []byte) []byte {
	attrs := append(appendAttr(nil, attrTransport, []byte{17, 0, 0, 0}), credentials...)
	b := binary.BigEndian.AppendUint16(nil, allocateAsk)
	b = binary.BigEndian.AppendUint16(b, uint16(len(attrs)))
	b = binary.BigEndian.AppendUint32(b, stunCookie)
	var transaction [12]byte
	_, _ = rand.Read(transaction[:]) // never fails
	return append(append(b, transaction[:]...), attrs...)
}

// attributes are those of a message that is the answer to a request, the first of each
// kind; nil if it is not an answer to it.
func attributes(b, request []byte) map[uint16][]byte {
	if len(b) < stunHeader || int(binary.BigEndian.Uint16(b[2:])) != len(b)-stunHeader || !bytes.Equal(b[4:stunHeader], request[4:stunHeader]) {
		return nil
	}
	found := map[uint16][]byte{}
	for b = b[stunHeader:]; len(b) >= 4; {
		kind, size := binary.BigEndian.Uint16(b), int(binary.BigEndian.Uint16(b[2:]))
		if padded := size + -size&3; len(b) >= 4+padded {
			if found[kind] == nil {
				found[kind] = b[4 : 4+size]
			}
			b = b[4+padded:]
			continue
		}
		return nil
	}
	return found
}

// refusesAllocation demands error 401 to a request for an allocation, and returns the
// attributes of the answer.
func (t *trial) refusesAllocation(conn net.Conn, credentials []byte) map[uint16][]byte {
	const expected = "error 401 to an Allocate without the right credentials"
	request := allocate(credentials)
	buf := make([]byte, 2048)
	for range packetTries {
		t.show("client >", request)
		if _, err := conn.Write(request); err != nil {
			t.fell(expected, "%v", err)
		}
		_ = conn.SetReadDeadline(time.Now().Add(t.suite.patience / packetTries))
		n, err := conn.Read(buf)
		if err != nil {
			continue // it may be lost
		}
		t.show("child >", buf[:n])
		attrs := attributes(buf[:n], request)
		code := attrs[attrErrorCode]
		if attrs == nil || binary.BigEndian.Uint16(buf) != allocateError || len(code) < 4 || code[2] != 4 || code[3] != 1 {
			t.fell(expected, "% x", buf[:n])
		}
		return attrs
	}
	t.fell(expected, "no answer")
	return nil
}

// allocation opens one socket of the packet factory.
func (t *trial) allocation(m method) net.PacketConn {
	addr, err := netip.ParseAddrPort(m.addr)
	t.need(err)
	ctx, cancel := context.WithTimeout(t.ctx, t.suite.patience)
	defer cancel()
	conn, err := turn.Dial(ctx, addr, turn.Credentials{Username: m.arg("username"), Password: m.arg("password"), Realm: m.arg("realm")})
	if err != nil {
		t.fell("an allocation for the announced credentials", "%v", err)
	}
	t.onEnd(func() { conn.Close() })
	return conn
}

// echoPacket sends a payload until it comes back, and says how much else came.
func (t *trial) echoPacket(conn net.PacketConn, far *packetFar, payload []byte) (others int) {
	expected := fmt.Sprintf("a datagram of %d bytes, and its echo, whole", len(payload))
	buf := make([]byte, 4096)
	far.expect(payload)
	for range packetTries {
		t.show("client >", payload)
		if _, err := conn.WriteTo(payload, far.addr()); err != nil {
			t.fell(expected, "%v", err)
		}
		_ = conn.SetReadDeadline(time.Now().Add(t.suite.patience / packetTries))
		for {
			n, _, err := conn.ReadFrom(buf)
			if err != nil {
				break // it may be lost
			}
			if bytes.Equal(buf[:n], payload) {
				return others
			}
			others++
		}
	}
	switch other := far.other(); {
	case other == nil:
		t.fell(expected, "nothing came back")
	case bytes.HasPrefix(payload, other):
		t.fell(expected, "%d bytes at the far end", len(other))
	}
	t.cannot("the far end gets other bytes than were sent: only such a transport itself could answer")
	return 0
}

// exchangePackets demands that a datagram comes back.
func (t *trial) exchangePackets(c *child) {
	t.echoPacket(t.allocation(t.packetMethod(c)), t.packetEcho(), []byte("question"))
}

// packetEcho is what sends datagrams back: the suite's own, or what the server of a
// generated client leads to.
func (t *trial) packetEcho() *packetFar {
	if t.suite.far == nil {
		return t.packetFar()
	}
	if !t.suite.subject.Echoes {
		t.cannot("nothing is known about where the server leads; give it an echo server and set Subject.Echoes")
	}
	return t.packetWire(t.method(t.suite.far.child))
}

// packetWire is the wire of a server that leads to an echo server.
func (t *trial) packetWire(m method) *packetFar {
	addr, err := netip.ParseAddrPort(m.addr)
	t.need(err)
	return &packetFar{wire: net.UDPAddrFromAddrPort(addr)}
}

// probeUDP is an error if no socket is at an address: the system says so.
func (t *trial) probeUDP(addr string) error {
	conn, err := t.dialUDP(addr)
	if err != nil {
		return err
	}
	defer conn.Close()
	if _, err := conn.Write([]byte("probe")); err != nil {
		return err
	}
	_ = conn.SetReadDeadline(time.Now().Add(quiet))
	if _, err := conn.Read(make([]byte, 1)); errors.Is(err, syscall.ECONNREFUSED) {
		return err
	}
	return nil
}

// A packetFar sends back what comes as it should.
type packetFar struct {
	conn net.PacketConn
	wire *net.UDPAddr // of a server, in place of conn
	done chan struct{}

	mu      sync.Mutex
	want    []byte
	unlike  []byte   // what came otherwise; nil if nothing did
	from    net.Addr // of the last datagram
	arrived int
}

func (t *trial) packetFar() *packetFar {
	conn, err := net.ListenPacket("udp", "127.0.0.1:0") //nolint:forbidigo // the suite is a peer of its own
	t.need(err)
	f := &packetFar{conn: conn, done: make(chan struct{})}
	go f.serve()
	t.onEnd(func() { conn.Close(); <-f.done })
	return f
}

func (f *packetFar) serve() {
	defer close(f.done)
	buf := make([]byte, 1<<16)
	for {
		n, from, err := f.conn.ReadFrom(buf)
		if err != nil {
			return
		}
		f.mu.Lock()
		f.arrived++
		f.from = from
		same := bytes.Equal(buf[:n], f.want)
		if !same {
			f.unlike = append([]byte{}, buf[:n]...)
		}
		f.mu.Unlock()
		if same {
			_, _ = f.conn.WriteTo(buf[:n], from)
		}
	}
}

func (f *packetFar) addr() *net.UDPAddr {
	if f.wire != nil {
		return f.wire
	}
	return f.conn.LocalAddr().(*net.UDPAddr)
}

func (f *packetFar) expect(payload []byte) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.want, f.unlike = payload, nil
}

func (f *packetFar) other() []byte {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.unlike
}

func (f *packetFar) count() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.arrived
}
