package scramble

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"math/bits"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"pgregory.net/rapid"

	"pthost/ptipc"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var testKey = Key{1, 2, 3}

func testKeys(t testing.TB, side Side) *keys {
	t.Helper()
	k, err := newKeys(testKey, side)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func udp(t testing.TB) *net.UDPConn {
	t.Helper()
	conn, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

// open opens the transport and a socket of it.
func open(t testing.TB, config string) net.PacketConn {
	t.Helper()
	transport, err := Open(t.Context(), ptipc.Opaque(config), ptipc.Env{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { transport.Close() })
	conn, err := transport.Packets[Name](t.Context())
	if err != nil {
		t.Fatal(err)
	}
	_ = conn.SetDeadline(time.Now().Add(20 * time.Second))
	return conn
}

const keyText = "AQIDAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="

// Client, server and service: datagrams go there and back whole, up to the longest.
func TestThroughServer(t *testing.T) {
	service := udp(t)
	var serving sync.WaitGroup
	serving.Go(func() {
		buf := make([]byte, 1<<16)
		for {
			n, from, err := service.ReadFrom(buf)
			if err != nil {
				return
			}
			_, _ = service.WriteTo(buf[:n], from)
		}
	})
	t.Cleanup(func() { service.Close(); serving.Wait() })
	options := fmt.Sprintf(`{"listen":"127.0.0.1:0","to":%q}`, service.LocalAddr())
	client, server, err := Server.GenerateConfig(t.Context(), ptipc.Opaque(options), ptipc.Env{})
	if err != nil {
		t.Fatal(err)
	}
	manager, err := Server.Proxy(t.Context(), server, ptipc.Env{})
	if err != nil {
		t.Fatal(err)
	}
	for range 2 { // two clients at once
		conn := open(t, string(client))
		buf := make([]byte, MaxPayload)
		for _, size := range []int{0, 1, 1200, 1500, MaxPayload} {
			sent := bytes.Repeat([]byte{byte(size), 7}, size)[:size]
			if _, err := conn.WriteTo(sent, manager.Addr()); err != nil {
				t.Fatal(err)
			}
			if n, from, err := conn.ReadFrom(buf); err != nil || !bytes.Equal(buf[:n], sent) || from.String() != manager.Addr().String() {
				t.Errorf("%d bytes: %d from %v, %v", size, n, from, err)
			}
		}
	}
	if s := manager.Stats(); s.Active != 2 || s.Opened != 2 || s.Received == 0 || s.Sent != s.Received {
		t.Errorf("%+v", s)
	}
	waited := make(chan error, 1)
	go func() { waited <- manager.Wait() }()
	if err := manager.Close(); err != nil {
		t.Error(err)
	}
	if err := <-waited; err != nil {
		t.Error(err)
	}
}

// Two peers in the role client talk to each other when they are of two sides.
func TestPeers(t *testing.T) {
	a := open(t, `{"key":"`+keyText+`","listen":"127.0.0.1:0"}`)
	b := open(t, `{"key":"`+keyText+`","listen":"127.0.0.1:0","side":"server"}`)
	buf := make([]byte, 100)
	// Each has to have sent something before it hears the other (PKT-2).
	if _, err := b.WriteTo([]byte("hello"), a.LocalAddr()); err != nil {
		t.Fatal(err)
	}
	if _, err := a.WriteTo([]byte("from a"), b.LocalAddr()); err != nil {
		t.Fatal(err)
	}
	if n, from, err := b.ReadFrom(buf); err != nil || string(buf[:n]) != "from a" || from.String() != a.LocalAddr().String() {
		t.Errorf("%q from %v, %v", buf[:n], from, err)
	}
	if n, _, err := a.ReadFrom(buf); err != nil || string(buf[:n]) != "hello" {
		t.Errorf("%q, %v", buf[:n], err)
	}
}

// SCRAM-1, SCRAM-2, SCRAM-4: nothing on the wire can be recognised. Of many datagrams with one
// payload no byte and no length stands out, each bit is set about half of the time,
// and what was sent is nowhere to be found.
func TestNothingToRecognise(t *testing.T) {
	const datagrams = 4000
	conn := open(t, `{"key":"`+keyText+`"}`)
	for _, size := range []int{0, 40, 1200, 1350, 1500} {
		wire := udp(t)
		_ = wire.SetReadDeadline(time.Now().Add(20 * time.Second))
		payload := bytes.Repeat([]byte("GET / "), 1000)[:size]
		lengths := map[int]int{}
		var set [(overhead + 1500) * 8]int
		seen := map[string]bool{}
		buf := make([]byte, 1<<16)
		for range datagrams {
			if _, err := conn.WriteTo(payload, wire.LocalAddr()); err != nil {
				t.Fatal(err)
			}
			n, _, err := wire.ReadFrom(buf)
			if err != nil {
				t.Fatal(err)
			}
			lengths[n]++
			if size >= 40 && bytes.Contains(buf[:n], payload[:16]) {
				t.Fatal("the payload stands on the wire")
			}
			// Also no piece of the key stream comes twice.
			if piece := string(buf[nonceSize : nonceSize+16]); seen[piece] {
				t.Fatalf("% x came twice", piece)
			} else {
				seen[piece] = true
			}
			for i, b := range buf[:overhead+size] {
				for ; b != 0; b &= b - 1 {
					set[i*8+bits.TrailingZeros8(b)]++
				}
			}
		}
		least, most := 1<<20, 0
		for n, times := range lengths {
			least, most = min(least, n), max(most, n)
			if times > datagrams/10 {
				t.Errorf("%d of %d datagrams have %d bytes", times, datagrams, n)
			}
		}
		if len(lengths) <= minPadding || least < overhead+size || most > max(fitting, overhead+size+minPadding) {
			t.Errorf("payload %d: %d lengths, from %d to %d", size, len(lengths), least, most)
		}
		// The deviation is 32; 7 of them come in one of 4e11 bits.
		for i, n := range set[:(overhead+size)*8] {
			if n < datagrams/2-7*32 || n > datagrams/2+7*32 {
				t.Errorf("payload %d: bit %d of byte %d is set in %d of %d datagrams", size, i%8, i/8, n, datagrams)
			}
		}
	}
}

// SCRAM-3, SCRAM-5, SCRAM-7: what is forged, turned back, cut, sealed for others, or sent
// again, at any socket of the transport, is dropped without an answer.
func TestDropped(t *testing.T) {
	transport, err := Open(t.Context(), ptipc.Opaque(`{"key":"`+keyText+`"}`), ptipc.Env{})
	if err != nil {
		t.Fatal(err)
	}
	defer transport.Close()
	attacker := udp(t)
	var socks []net.PacketConn
	for range 2 {
		conn, err := transport.Packets[Name](t.Context())
		if err != nil {
			t.Fatal(err)
		}
		_ = conn.SetDeadline(time.Now().Add(20 * time.Second))
		if _, err := conn.WriteTo([]byte("turned back"), attacker.LocalAddr()); err != nil {
			t.Fatal(err)
		}
		socks = append(socks, conn)
	}
	buf := make([]byte, 1<<16)
	n, _, err := attacker.ReadFrom(buf)
	if err != nil {
		t.Fatal(err)
	}
	_, _, _ = attacker.ReadFrom(make([]byte, 1<<16)) // that of the other
	turnedBack := slices.Clone(buf[:n])

	far := testKeys(t, ServerSide)
	now := uint32(time.Now().Unix())
	seal := func(h header, payload string) []byte {
		var nonce [nonceSize]byte
		nonce[0], nonce[1] = byte(h.counter), byte(h.sent)
		return far.sealed(nil, &nonce, h, []byte(payload), 3)
	}
	good := seal(header{7, 0, now}, "good")
	flipped := slices.Clone(good)
	flipped[len(flipped)-1] ^= 1
	other, err := newKeys(Key{9}, ServerSide)
	if err != nil {
		t.Fatal(err)
	}
	foreign := other.sealed(nil, new([nonceSize]byte), header{8, 0, now}, []byte("foreign"), 0)
	toPort := func(conn net.PacketConn) net.Addr {
		return &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1), Port: conn.LocalAddr().(*net.UDPAddr).Port}
	}
	send := func(conn net.PacketConn, wire []byte) {
		t.Helper()
		if _, err := attacker.WriteTo(wire, toPort(conn)); err != nil {
			t.Fatal(err)
		}
	}
	heard := func(conn net.PacketConn, want string) {
		t.Helper()
		if n, _, err := conn.ReadFrom(buf); err != nil || string(buf[:n]) != want {
			t.Fatalf("%q, %v; want %q", buf[:n], err, want)
		}
	}
	for _, wire := range [][]byte{
		turnedBack, flipped, foreign,
		{},
		{0},
		make([]byte, overhead-1), make([]byte, overhead), make([]byte, maxWire+1), make([]byte, 60_000),
		good[:len(good)-1], append(slices.Clone(good), 0),
		seal(header{7, 1, now - 3600}, "old"), seal(header{7, 2, now + 3600}, "early"),
	} {
		send(socks[0], wire)
	}
	send(socks[0], good)
	heard(socks[0], "good")
	send(socks[0], good)
	send(socks[1], good) // the same key, another socket
	for i, conn := range socks {
		send(conn, seal(header{7, uint64(10 + i), now}, "next"))
		heard(conn, "next")
	}
	_ = attacker.SetReadDeadline(time.Unix(1, 0))
	if n, _, err := attacker.ReadFrom(buf); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("it was answered: % x, %v", buf[:n], err)
	}
}

// The operator is told of what may be a wrong clock, and not for each datagram.
func TestWarnsOfClock(t *testing.T) {
	var said bytes.Buffer
	raw := udp(t)
	c := newConn(raw, testKeys(t, ClientSide), slog.New(slog.NewTextHandler(&said, nil)))
	far := testKeys(t, ServerSide)
	for i := range 3 {
		wire := far.sealed(nil, &[nonceSize]byte{byte(i)}, header{1, uint64(i), uint32(time.Now().Unix()) - 1000}, nil, 0)
		if _, err := raw.WriteTo(wire, raw.LocalAddr()); err != nil {
			t.Fatal(err)
		}
	}
	wire := far.sealed(nil, &[nonceSize]byte{9}, header{1, 9, uint32(time.Now().Unix())}, nil, 0)
	if _, err := raw.WriteTo(wire, raw.LocalAddr()); err != nil {
		t.Fatal(err)
	}
	if _, _, err := c.ReadFrom(nil); err != nil {
		t.Fatal(err)
	}
	if n := strings.Count(said.String(), "a clock is wrong"); n != 1 || c.dropped.Load() != 3 {
		t.Errorf("%d warnings, %d dropped: %s", n, c.dropped.Load(), &said)
	}
}

// SCRAM-6: what is too long is refused; what has no room in the buffer is dropped, not cut.
func TestNeverCut(t *testing.T) {
	a := open(t, `{"key":"`+keyText+`","listen":"127.0.0.1:0"}`)
	b := open(t, `{"key":"`+keyText+`","listen":"127.0.0.1:0","side":"server"}`)
	if _, err := b.WriteTo(nil, a.LocalAddr()); err != nil {
		t.Fatal(err)
	}
	if n, err := a.WriteTo(make([]byte, MaxPayload+1), b.LocalAddr()); err == nil || n != 0 {
		t.Errorf("%d, %v", n, err)
	}
	for _, size := range []int{11, 10} {
		if _, err := a.WriteTo(make([]byte, size), b.LocalAddr()); err != nil {
			t.Fatal(err)
		}
	}
	if n, _, err := b.ReadFrom(make([]byte, 10)); err != nil || n != 10 {
		t.Errorf("%d, %v", n, err)
	}
}

// SCRAM-5: against a list of all that has come, in any order, the window accepts nothing
// twice, everything new that is not very late, and only that.
func TestWindow(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var w window
		seen := map[uint64]bool{}
		highest, any := uint64(0), false
		at := rapid.Uint64Range(0, 1<<40).Draw(t, "start")
		for range rapid.IntRange(1, 200).Draw(t, "datagrams") {
			counter := uint64(max(0, int64(at)+rapid.Int64Range(-2*windowSize, 2*windowSize).Draw(t, "step")))
			late := any && highest >= counter && highest-counter >= windowSize
			if got, want := w.take(counter), !seen[counter] && !late; got != want {
				t.Fatalf("counter %d, highest %d: %v", counter, highest, got)
			}
			if !late {
				seen[counter], any = true, true
				highest = max(highest, counter)
			}
			at = highest
		}
	})
}

// SCRAM-5: sessions are bounded; those that nothing could be accepted of any more make room.
func TestSessions(t *testing.T) {
	var w windows
	now := time.Unix(1_800_000_000, 0)
	at := func() uint32 { return uint32(now.Unix()) }
	for i := range uint64(maxSessions) {
		if err := w.accept(header{i, 0, at()}, now); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.accept(header{maxSessions, 0, at()}, now); !errors.Is(err, errSessions) {
		t.Errorf("one more: %v", err)
	}
	now = now.Add(maxSkew)
	if err := w.accept(header{3, 0, at() - uint32(maxSkew/time.Second)}, now); !errors.Is(err, errReplay) {
		t.Errorf("a replay at the last moment: %v", err)
	}
	if err := w.accept(header{3, 1, at()}, now); err != nil {
		t.Error(err)
	}
	now = now.Add(time.Second)
	if err := w.accept(header{4, 0, at() - 1 - uint32(maxSkew/time.Second)}, now); !errors.Is(err, errTime) {
		t.Errorf("a replay after it: %v", err)
	}
	if err := w.accept(header{maxSessions, 0, at()}, now); err != nil || len(w.sessions) != 2 {
		t.Errorf("%v, %d sessions are kept", err, len(w.sessions))
	}
	if w.sessions[3].take(^uint64(0)) {
		t.Error("the last counter was accepted, and nothing could come after it")
	}
}

// SCRAM-8, PKT-1: what is wrong in a configuration is named, and a key never repeated.
func TestConfig(t *testing.T) {
	for _, tt := range []struct{ config, pointer string }{
		{`{}`, "/key"},
		{`{"key":"c2VjcmV0"}`, "/key"},
		{`{"key":"` + keyText + `","side":"left"}`, "/side"},
		{`{"key":"` + keyText + `","listen":"localhost:1"}`, "/listen"},
	} {
		_, err := Open(t.Context(), ptipc.Opaque(tt.config), ptipc.Env{})
		var config *ptipc.ConfigError
		if !errors.As(err, &config) || config.Pointer != tt.pointer || strings.Contains(err.Error(), "c2VjcmV0") {
			t.Errorf("%s: %v", tt.config, err)
		}
	}
	for _, to := range []string{"localhost:53", "127.0.0.1", "127.0.0.1:0", "0.0.0.0:53", ""} {
		_, err := Server.Proxy(t.Context(), ptipc.Opaque(fmt.Sprintf(`{"key":%q,"listen":"127.0.0.1:0","to":%q}`, keyText, to)), ptipc.Env{})
		var config *ptipc.ConfigError
		if !errors.As(err, &config) || config.Pointer != "/to" {
			t.Errorf("to %q: %v", to, err)
		}
	}
	// PROXY-4
	proxied := ptipc.Env{DialOut: func(context.Context, string, string) (net.Conn, error) { return nil, errors.New("no") }}
	if _, err := Open(t.Context(), ptipc.Opaque(`{"key":"`+keyText+`"}`), proxied); ptipc.ExitCodeOf(err) != ptipc.ExitUnavailable || !strings.Contains(err.Error(), "remove the proxy") {
		t.Errorf("under a proxy for streams: %v", err)
	}
	if _, err := Server.Proxy(t.Context(), ptipc.Opaque(`{"key":"`+keyText+`","listen":"127.0.0.1:0","to":"127.0.0.1:53"}`), proxied); ptipc.ExitCodeOf(err) != ptipc.ExitUnavailable {
		t.Errorf("a server under a proxy for streams: %v", err)
	}
}

// A vector is one datagram, or one fault.
type vector struct {
	name, fault   string
	key           Key
	side          Side // of who has sealed it
	nonce         [nonceSize]byte
	header        header
	padding       int
	payload, wire []byte
}

func vectors(t testing.TB) []vector {
	t.Helper()
	files, err := filepath.Glob("../../testdata/scramble/*.txt")
	if err != nil || len(files) == 0 {
		t.Fatalf("%v %v", files, err)
	}
	var all []vector
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		v := vector{name: filepath.Base(file)}
		bin := func(value string) []byte {
			b, err := hex.DecodeString(value)
			if err != nil {
				t.Fatal(file, err)
			}
			return b
		}
		number := func(value string) uint64 {
			n, err := strconv.ParseUint(value, 0, 64)
			if err != nil {
				t.Fatal(file, err)
			}
			return n
		}
		for line := range strings.Lines(string(text)) {
			key, value, ok := strings.Cut(strings.TrimSpace(line), ":")
			if value = strings.TrimSpace(value); !ok || strings.HasPrefix(key, "#") {
				continue
			}
			switch key {
			case "clause":
			case "key":
				copy(v.key[:], bin(value))
			case "side":
				v.side = Side(value)
			case "nonce":
				copy(v.nonce[:], bin(value))
			case "session":
				v.header.session = number(value)
			case "counter":
				v.header.counter = number(value)
			case "time":
				v.header.sent = uint32(number(value))
			case "padding":
				v.padding = int(number(value))
			case "payload":
				v.payload = bin(value)
			case "wire":
				v.wire = bin(value)
			case "fault":
				v.fault = value
			default:
				t.Fatalf("%s: %q", file, line)
			}
		}
		all = append(all, v)
	}
	return all
}

// SCRAM-1, SCRAM-3: the vectors are sealed and opened as they say.
func TestVectors(t *testing.T) {
	for _, v := range vectors(t) {
		t.Run(v.name, func(t *testing.T) {
			near, err := newKeys(v.key, v.side)
			if err != nil {
				t.Fatal(err)
			}
			far, err := newKeys(v.key, map[Side]Side{ClientSide: ServerSide, ServerSide: ClientSide}[v.side])
			if err != nil {
				t.Fatal(err)
			}
			if v.fault == "" {
				if got := near.sealed(nil, &v.nonce, v.header, v.payload, v.padding); !bytes.Equal(got, v.wire) {
					t.Errorf("sealed as %x", got)
				}
			}
			h, payload, err := far.opened(slices.Clone(v.wire))
			switch {
			case v.fault == "" && (err != nil || h != v.header || !bytes.Equal(payload, v.payload)):
				t.Errorf("opened as %+v, %x, %v", h, payload, err)
			case v.fault != "" && (err == nil || err.Error() != v.fault):
				t.Errorf("opened with %v", err)
			}
		})
	}
}

// Whatever comes, opening it does not fail in another way than it may; and what was
// made with the key and lies is found out.
func FuzzOpen(f *testing.F) {
	for _, v := range vectors(f) {
		f.Add(v.wire, false)
		f.Add(v.payload, true)
	}
	near, err := newKeys(Key{4}, ServerSide) // not that of the vectors
	if err != nil {
		f.Fatal(err)
	}
	far, err := newKeys(Key{4}, ClientSide)
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, wire []byte, sealed bool) {
		if sealed {
			// A sender with the key: what is inside of the seal is the fuzzer's.
			nonce := make([]byte, nonceSize, nonceSize+len(wire)+tagSize)
			wire = near.seal.Seal(nonce, nonce, wire, nil)
		}
		h, payload, err := far.opened(wire)
		if err != nil {
			if !errors.Is(err, errForged) && !errors.Is(err, errForm) {
				t.Fatal(err)
			}
			return
		}
		if !sealed {
			t.Fatal("a seal was forged")
		}
		if len(payload) > MaxPayload || len(payload) > len(wire)-overhead {
			t.Fatalf("%d bytes of payload in %d", len(payload), len(wire))
		}
		var w windows
		if err := w.accept(h, time.Unix(int64(h.sent), 0)); err != nil && h.counter != ^uint64(0) {
			t.Fatal(err)
		}
		if err := w.accept(h, time.Unix(int64(h.sent), 0)); err == nil {
			t.Fatal("accepted twice")
		}
	})
}

// BenchmarkSeal is the cost of sealing and opening one datagram, of 1,200 bytes.
func BenchmarkSeal(b *testing.B) {
	near, far := testKeys(b, ClientSide), testKeys(b, ServerSide)
	payload, buf := make([]byte, 1200), make([]byte, 0, maxWire)
	s := newSender()
	var nonce [nonceSize]byte
	b.SetBytes(1200)
	b.ReportAllocs()
	for b.Loop() {
		wire := near.sealed(buf, &nonce, s.next(), payload, 100)
		h, _, err := far.opened(wire)
		if err != nil {
			b.Fatal(err)
		}
		if err := far.windows.accept(h, time.Now()); err != nil {
			b.Fatal(err)
		}
	}
}
