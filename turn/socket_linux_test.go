package turn

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"os/exec"
	"runtime"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"pthost/ptipc/testpeer"
)

// burst sends packets of these sizes with one call, and checks that they arrive whole and
// in order.
func burst(t *testing.T, from, to socket, addr *endpoint, sizes []int) {
	t.Helper()
	b := newBatch(len(sizes) + 1)
	for i, size := range sizes {
		p := &b.packets[i]
		out := p.storage[headroom : headroom+size]
		for k := range out {
			out[k] = byte(i + k)
		}
		b.queue(p, out, size, addr)
	}
	if failed, _, err := from.send(b); failed != 0 || len(b.sends) != 0 {
		t.Fatalf("%d failed: %v", failed, err)
	}
	for next := 0; next < len(sizes); {
		got, err := to.receive()
		if err != nil {
			t.Fatal(err)
		}
		for i := range got.packets {
			p := &got.packets[i]
			if len(p.data) != sizes[next] || p.cut != (len(p.data) > maxDatagram) {
				t.Fatalf("packet %d has %d bytes, want %d", next, len(p.data), sizes[next])
			}
			for k, c := range p.data {
				if c != byte(next+k) {
					t.Fatalf("packet %d differs at %d", next, k)
				}
			}
			next++
		}
		got.release()
	}
}

func repeat(size, count int, more ...int) []int {
	sizes := make([]int, 0, count+len(more))
	for range count {
		sizes = append(sizes, size)
	}
	return append(sizes, more...)
}

var bursts = [][]int{
	{1},
	{0},
	{0, 0, 1},
	{5, 0, 5},
	repeat(1200, 10), repeat(1200, 10, 7), repeat(1200, 10, 7, 1200, 1200, 1201), repeat(1, 63),
	repeat(MaxPayload, 60),
	{3, 3, 2, 2, 1, 1, 2, 3, 3},
	repeat(1400, 5, 1399, 1399),
}

// Datagrams that are sent many at a time, and received many at a time, are the same as
// one by one.
func TestBursts(t *testing.T) {
	for _, host := range []string{"127.0.0.1", "::1"} {
		for _, connected := range []bool{true, false} {
			t.Run(fmt.Sprint(host, connected), func(t *testing.T) {
				from := listenUDP(t, host)
				var to *net.UDPConn
				if connected {
					c, err := net.DialUDP("udp", nil, from.LocalAddr().(*net.UDPAddr))
					if err != nil {
						t.Fatal(err)
					}
					defer c.Close()
					to = c
				} else {
					to = listenUDP(t, host)
				}
				growBuffers(to)
				patient(t, to)
				receiver := newSocket(to, connected)
				if connected && !receiver.(*udpSocket).wide {
					t.Error("the kernel puts no datagrams together")
				}
				addr := newEndpoint(to.LocalAddr().(*net.UDPAddr).AddrPort())
				for _, sizes := range bursts {
					burst(t, newSocket(from, false), receiver, addr, sizes)
				}
			})
		}
	}
}

// A dual-stack socket takes IPv4, and an IPv4 socket refuses IPv6.
func TestFamilies(t *testing.T) {
	both, err := net.ListenUDP("udp", nil)
	if err != nil {
		t.Fatal(err)
	}
	defer both.Close()
	to := listenUDP(t, "127.0.0.1")
	patient(t, to)
	burst(t, newSocket(both, false), newSocket(to, false), newEndpoint(to.LocalAddr().(*net.UDPAddr).AddrPort()), repeat(100, 3))
	b := newBatch(2)
	six := newEndpoint(netip.MustParseAddrPort("[::1]:9"))
	for i := range b.packets {
		b.queue(&b.packets[i], make([]byte, 10), 10, six)
	}
	if failed, lost, err := newSocket(listenUDP(t, "127.0.0.1"), false).send(b); failed != 2 || lost != 20 || err == nil {
		t.Errorf("%d failed with %d bytes: %v", failed, lost, err)
	}
}

// ownNetwork moves the test to a network of its own. Only what the test's own goroutine
// opens is there.
func ownNetwork(t *testing.T, mtu int) {
	t.Helper()
	ip := testpeer.Need(t, "ip")
	runtime.LockOSThread() // the namespace is the thread's, and the thread ends with this test
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		testpeer.Skip(t, "there can be no network of our own: "+err.Error())
	}
	if out, err := exec.Command(ip, "link", "set", "lo", "up", "mtu", fmt.Sprint(mtu)).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
}

// What the network takes only in fragments, and the kernel does not segment, is sent all the same.
func TestSmallNetwork(t *testing.T) {
	ownNetwork(t, 1300)
	from, to := listenUDP(t, "127.0.0.1"), listenUDP(t, "127.0.0.1")
	patient(t, to)
	sender := newSocket(from, false).(*udpSocket)
	for _, sizes := range [][]int{repeat(1200, 5), repeat(1400, 5), repeat(1400, 5), repeat(1200, 5)} {
		burst(t, sender, newSocket(to, false), newEndpoint(to.LocalAddr().(*net.UDPAddr).AddrPort()), sizes)
	}
	if got := sender.segment.Load(); got != 1399 {
		t.Errorf("datagrams up to %d bytes are segmented, want 1399", got)
	}
}

// TURN-15: the kernel loses a fifth of all datagrams between the client and the server,
// each way, and QUIC gets everything all the same.
func TestDownloadWithLoss(t *testing.T) {
	nft := testpeer.Need(t, "nft")
	ownNetwork(t, 1500)
	relay, err := directPackets(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	s := &Server{Packets: func(context.Context) (net.PacketConn, error) { return relay, nil }}
	addr := startServer(t, s)
	rules := fmt.Sprintf(`table ip lossy {
		chain in {
			type filter hook input priority 0
			udp dport %[1]d numgen random mod 100 < 20 counter drop
			udp sport %[1]d numgen random mod 100 < 20 counter drop
		}
	}`, addr.Port())
	cmd := exec.Command(nft, "-f", "-")
	cmd.Stdin = strings.NewReader(rules)
	if out, err := cmd.CombinedOutput(); err != nil {
		testpeer.Skip(t, fmt.Sprintf("nftables cannot lose datagrams here: %v: %s", err, out))
	}
	conn := mustDial(t, addr, s.Credentials)
	download(t, conn, 3e5)
	out, err := exec.Command(nft, "list", "table", "ip", "lossy").CombinedOutput()
	if err != nil || strings.Count(string(out), "counter packets 0 ") == 2 {
		t.Errorf("nothing was lost: %v\n%s", err, out)
	}
}
