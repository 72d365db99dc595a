package turn

import (
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pion/stun"

	"pthost/ptipc/testvector"
)

// A vector is a file of testdata/turn, described in the README there.
type vector struct {
	name, clause, state, result string
	datagram                    []byte
	method                      uint64
	setters                     []stun.Setter
	omit, wrong                 string
	stranger                    bool
}

func readVectors(t testing.TB, kind string) []*vector {
	t.Helper()
	var vectors []*vector
	testvector.Files(t, "../testdata/turn/"+kind+"-*.txt", func(name string) func(string) error {
		v := &vector{name: name}
		vectors = append(vectors, v)
		return func(line string) error { return v.parse(kind, line) }
	})
	return vectors
}

func (v *vector) parse(kind, line string) (err error) {
	word, rest, _ := strings.Cut(line, " ")
	switch word {
	case "#":
	case kind:
	case "clause":
		v.clause = rest
	case "state":
		v.state = rest
	case ">":
		v.datagram, err = testvector.Bytes(rest)
	case "request":
		v.method, err = strconv.ParseUint(rest, 16, 12)
	case "attribute":
		kind, value, _ := strings.Cut(rest, " ")
		var n uint64
		var b []byte
		if n, err = strconv.ParseUint(kind, 16, 16); err == nil {
			b, err = testvector.Bytes(value)
		}
		v.setters = append(v.setters, attribute(stun.AttrType(n), b...))
	case "peer-address":
		var a netip.AddrPort
		a, err = netip.ParseAddrPort(rest)
		v.setters = append(v.setters, peerAddress(a))
	case "omit":
		v.omit = rest
	case "wrong":
		v.wrong = rest
	case "stranger":
		v.stranger = true
	case "result":
		v.result = rest
	default:
		err = fmt.Errorf("unknown line %q", line)
	}
	return err
}

// checkDropped says whether just one datagram was dropped, for this reason.
func checkDropped(t *testing.T, v *vector, before, after Dropped) {
	t.Helper()
	want := before
	switch v.result {
	case "dropped malformed":
		want.Malformed++
	case "dropped unexpected":
		want.Unexpected++
	case "dropped stranger":
		want.Stranger++
	}
	if after != want {
		t.Errorf("%s: %+v, want %+v", v.clause, after, want)
	}
}

var vectorPeer = netip.MustParseAddrPort("192.0.2.7:7")

// TURN-1 to TURN-8: what a server does with one datagram.
func TestServerVectors(t *testing.T) {
	for _, v := range readVectors(t, "server") {
		t.Run(v.name, func(t *testing.T) {
			s := &Server{}
			inBubble(t, s, func(t *testing.T, n *memNet, c *memClient) { runServerVector(t, v, s, n, c) })
		})
	}
}

func runServerVector(t *testing.T, v *vector, s *Server, n *memNet, c *memClient) {
	n.port = vectorPeer.Port() - 1
	peer := n.listen(vectorPeer.Addr().String())
	if v.state == "allocated" {
		c.must(t, stun.MethodAllocate, requestUDP)
		c.must(t, stun.MethodChannelBind, channelNumber(minChannel), peerAddress(vectorPeer))
	} else {
		c.refused(t, 400, stun.MethodAllocate) // which gives a nonce
	}
	before := s.Stats().Dropped
	datagram := v.datagram
	if v.method != 0 {
		datagram = v.request(c)
	}
	c.put(t, datagram)
	answer := c.receive()
	checkDropped(t, v, before, s.Stats().Dropped)
	if payload, ok := strings.CutPrefix(v.result, "peer"); ok {
		want, err := testvector.Bytes(strings.TrimPrefix(payload, " "))
		if err != nil {
			t.Fatal(err)
		}
		if got := peer.receive(); got == nil || string(got) != string(want) {
			t.Errorf("%s: the peer got %q", v.clause, got)
		}
	} else if got := peer.receive(); got != nil {
		t.Errorf("%s: the peer got %q", v.clause, got)
	}
	want := v.result
	if strings.HasPrefix(want, "dropped") || strings.HasPrefix(want, "peer") || want == "silent" {
		if answer != nil {
			t.Errorf("%s: the server answered % x", v.clause, answer)
		}
		return
	}
	var asked, m message
	if err := asked.parse(datagram); err != nil {
		t.Fatal(err)
	}
	if err := m.parse(answer); err != nil {
		t.Fatalf("%s: the server answered % x", v.clause, answer)
	}
	got := "ok"
	if m.class == stun.ClassErrorResponse {
		got = strconv.Itoa(int(m.code()))
	}
	if got != want || m.id != asked.id || m.method != asked.method {
		t.Errorf("%s: the answer was %s to %s %x, want %s to %s %x", v.clause, got, m.method, m.id, want, asked.method, asked.id)
	}
	switch got {
	case "401", "438":
		if m.nonce == nil || string(m.realm) != s.Credentials.Realm {
			t.Errorf("%s: there was no nonce, or another realm", v.clause)
		}
	case "420":
		d := stun.Message{Raw: answer}
		var unknown stun.UnknownAttributes
		if err := d.Decode(); err != nil || unknown.GetFrom(&d) != nil || len(unknown) != 1 {
			t.Errorf("%s: the unknown attributes were %v", v.clause, unknown)
		}
	case "ok":
		if asked.method != stun.MethodBinding && !m.intact(s.Credentials.key()) {
			t.Errorf("%s: nobody signed the answer", v.clause)
		}
	}
}

// request is the request that a vector describes.
func (v *vector) request(c *memClient) []byte {
	credentials, nonce := c.credentials, c.nonce
	switch v.wrong {
	case "username":
		credentials.Username += "x"
	case "realm":
		credentials.Realm += "x"
	case "password":
		credentials.Password += "x"
	case "nonce":
		nonce = []byte("0123456789")
	}
	all := append([]stun.Setter{stun.TransactionID, stun.NewType(stun.Method(v.method), stun.ClassRequest)}, v.setters...)
	for _, part := range []struct {
		name   string
		setter stun.Setter
	}{
		{"username", stun.NewUsername(credentials.Username)},
		{"realm", stun.NewRealm(credentials.Realm)},
		{"nonce", attribute(stun.AttrNonce, nonce...)},
	} {
		if v.omit != part.name {
			all = append(all, part.setter)
		}
	}
	return stun.MustBuild(append(all, credentials.key(), stun.Fingerprint)...).Raw
}

// TURN-2 to TURN-4: what a client does with one datagram.
func TestClientVectors(t *testing.T) {
	for _, v := range readVectors(t, "client") {
		t.Run(v.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) { runClientVector(t, v) })
		})
	}
}

func runClientVector(t *testing.T, v *vector) {
	n := newMemNet()
	s := &Server{}
	addr, stop := n.serve(t, s)
	defer stop()
	conn, err := dial(t.Context(), addr, s.Credentials, n.open)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if _, err := conn.WriteTo([]byte("out"), net.UDPAddrFromAddrPort(vectorPeer)); err != nil {
		t.Fatal(err)
	}
	synctest.Wait()
	before := conn.Stats().Dropped
	from := addr
	if v.stranger {
		from = netip.AddrPortFrom(addr.Addr(), addr.Port()+1)
	}
	n.arrive(conn.session.sock.LocalAddr().(*net.UDPAddr).AddrPort(), memPacket{v.datagram, from})
	_ = conn.SetReadDeadline(time.Now().Add(time.Second))
	buf := make([]byte, 100)
	k, _, err := conn.ReadFrom(buf)
	checkDropped(t, v, before, conn.Stats().Dropped)
	if payload, ok := strings.CutPrefix(v.result, "payload"); ok {
		want, perr := testvector.Bytes(strings.TrimPrefix(payload, " "))
		if perr != nil {
			t.Fatal(perr)
		}
		if err != nil || string(buf[:k]) != string(want) {
			t.Errorf("%s: %q %v", v.clause, buf[:k], err)
		}
	} else if err == nil {
		t.Errorf("%s: the application got %q", v.clause, buf[:k])
	}
}
