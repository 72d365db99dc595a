package child_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"pthost/ptipc"
	"pthost/ptipc/child"
	"pthost/ptipc/relay"
	"pthost/ptipc/stdio"
	"pthost/transports/direct"
	"pthost/turn"
)

// PKT-3, PKT-4, PKT-7: a child announces its packet factory with credentials of its own,
// refuses others, relays, counts, and ends with everything that it holds.
func TestPackets(t *testing.T) {
	r := run(t, child.Transport{Client: direct.Open}, stateDir(t), "{}")
	var m stdio.CMethod
	for _, line := range r.until("CMETHODS") {
		message, err := stdio.Parse([]byte(line))
		if found, ok := message.(stdio.CMethod); err == nil && ok && found.Protocol == stdio.ProtocolTURN {
			m = found
		}
	}
	username, password, realm, ok := m.Args.TURN()
	if !ok || m.Name != "direct" {
		t.Fatalf("announced as %+v", m)
	}
	addr, err := netip.ParseAddrPort(m.Addr)
	if err != nil {
		t.Fatal(err)
	}
	var refused *turn.RefusedError
	if _, err := turn.Dial(t.Context(), addr, turn.Credentials{Username: username, Password: password + "x", Realm: realm}); !errors.As(err, &refused) {
		t.Errorf("with another password: %v", err)
	}
	conn, err := turn.Dial(t.Context(), addr, turn.Credentials{Username: username, Password: password, Realm: realm})
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	peer, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer peer.Close()
	_ = peer.SetReadDeadline(time.Now().Add(20 * time.Second))
	_ = conn.SetReadDeadline(time.Now().Add(20 * time.Second))
	if _, err := conn.WriteTo([]byte("question"), peer.LocalAddr()); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 100)
	n, from, err := peer.ReadFrom(buf)
	if err != nil || string(buf[:n]) != "question" {
		t.Fatalf("%q, %v", buf[:n], err)
	}
	if _, err := peer.WriteTo([]byte("answer"), from); err != nil {
		t.Fatal(err)
	}
	if n, _, err := conn.ReadFrom(buf); err != nil || string(buf[:n]) != "answer" {
		t.Fatalf("%q, %v", buf[:n], err)
	}
	// A datagram can be there before it is counted.
	const want = `{"active":1,"opened":1,"failed":0,"received":6,"sent":8}`
	for id := 1; ; id++ {
		r.say(fmt.Sprintf("STATS %d\n", id))
		lines := r.until("STATS")
		got := lines[len(lines)-1]
		if strings.HasSuffix(got, want) {
			break
		}
		if id == 100 {
			t.Errorf("%s, want %s", got, want)
			break
		}
	}
	r.stdin.Close()
	r.exits(ptipc.ExitOK)
	if _, err := peer.WriteTo([]byte("is anybody there"), from); err != nil {
		t.Fatal(err)
	}
	again, err := net.ListenUDP("udp", &net.UDPAddr{Port: from.(*net.UDPAddr).Port})
	if err != nil {
		t.Error("the socket of the allocation is still open:", err)
	} else {
		again.Close()
	}
}

// PROXY-4: under a proxy for streams a child announces no packet factory, and none that
// has nothing else gets ready.
func TestPacketsUnderProxy(t *testing.T) {
	const host = `{"proxy":"socks5://127.0.0.1:9"}`
	r := run(t, child.Transport{Client: direct.Open}, stateDir(t), "{}", host)
	if lines := strings.Join(r.until("CMETHODS"), "\n"); strings.Contains(lines, " turn ") || !strings.Contains(lines, "CMETHOD direct socks5 ") {
		t.Errorf("it said\n%s", lines)
	}
	r.stdin.Close()
	r.exits(ptipc.ExitOK)
	r = run(t, child.Transport{Client: packetsAlone}, stateDir(t), "{}", host)
	lines, code := r.exit()
	if code != int(ptipc.ExitUnavailable) || !strings.Contains(fmt.Sprint(lines), "CMETHOD-ERROR _") {
		t.Errorf("exit code %d: %q", code, lines)
	}
}

// packetsAlone is a transport of datagrams.
func packetsAlone(_ context.Context, _ ptipc.Opaque, env ptipc.Env) (*ptipc.Transport, error) {
	if err := env.CheckPackets(); err != nil {
		return nil, err
	}
	var meter relay.Meter
	transport := meter.Transport(nil, nil)
	transport.Packets = map[string]ptipc.PacketFactory{
		"packets": meter.Packets(func(ctx context.Context) (net.PacketConn, error) { return env.ListenPacket(ctx, "") }),
	}
	return transport, nil
}
