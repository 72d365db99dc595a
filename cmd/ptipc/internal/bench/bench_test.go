package bench

import (
	"bytes"
	"context"
	"errors"
	"io"
	"maps"
	"math"
	"net"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"pthost/ptipc"
	"pthost/ptipc/relay"
)

// asPeer makes the test binary a peer.
const asPeer = "PTIPC_TEST_AS_PEER"

func TestMain(m *testing.M) {
	if os.Getenv(asPeer) != "" {
		if err := RunPeer(context.Background(), os.Args[1:], os.Stdin, os.Stdout); err != nil {
			os.Exit(int(ptipc.ExitCodeOf(err)))
		}
		os.Exit(0)
	}
	os.Setenv(asPeer, "1") // of the processes that are started from here
	goleak.VerifyTestMain(m)
}

func TestMedian(t *testing.T) {
	for _, test := range []struct {
		values []float64
		want   float64
	}{
		{[]float64{3}, 3},
		{[]float64{9, 1, 2}, 2},
		{[]float64{4, 1, 9, 2}, 3},
	} {
		given := slices.Clone(test.values)
		if got := Median(test.values); got != test.want {
			t.Errorf("the median of %v is %v, want %v", test.values, got, test.want)
		}
		if !slices.Equal(given, test.values) {
			t.Errorf("median has changed the order of %v to %v", given, test.values)
		}
	}
	if got := Median(nil); !math.IsNaN(got) {
		t.Errorf("the median of nothing is %v", got)
	}
}

func TestPercentile(t *testing.T) {
	hundred := make([]time.Duration, 100)
	for i := range hundred {
		hundred[i] = time.Duration(i + 1)
	}
	for _, test := range []struct {
		values []time.Duration
		p      int
		want   time.Duration
	}{
		{hundred, 50, 50},
		{hundred, 99, 99},
		{hundred, 100, 100},
		{hundred, 0, 1},
		{hundred[:1], 50, 1},
		{hundred[:1], 99, 1},
		{hundred[:3], 50, 2},
		{hundred[:10], 99, 10},
	} {
		if got := percentile(test.values, test.p); got != test.want {
			t.Errorf("p%d of 1 to %d is %d, want %d", test.p, len(test.values), got, test.want)
		}
	}
}

// The rounds are compared one by one: when the machine is slow for one of them,
// both are.
func TestRatio(t *testing.T) {
	if got := Ratio([]float64{10, 2, 30}, []float64{5, 1, 10}); got != 2 {
		t.Errorf("got %v, want 2", got)
	}
	if got := Ratio([]float64{1, 8}, []float64{0, 2}); got != 4 {
		t.Errorf("got %v, want that of the second round, 4", got)
	}
	if got := Ratio([]float64{1}, []float64{0}); !math.IsNaN(got) {
		t.Errorf("got %v of a division by nothing", got)
	}
}

func TestNumber(t *testing.T) {
	for v, want := range map[float64]string{
		0: "0.00", 0.0412: "0.041", 0.9996: "1.00", 1.234: "1.23", 9.996: "10.0", 45.67: "45.7",
		99.96: "100", 123.4: "123", 12345: "12345", -4.5: "-4.50",
	} {
		if got := number(v); got != want {
			t.Errorf("%v is written %s, want %s", v, got, want)
		}
	}
}

func TestReportText(t *testing.T) {
	r := &Report{
		Transport: "pt-x", ConnectionFactory: "x", Bound: true, Rounds: 2, Seconds: 0.5,
		Machine: Machine{OS: "linux", Arch: "amd64", Kernel: "6", CPUs: 2, Go: "go1"},
		Network: Network{Why: "it is raining", CongestionControl: "cubic"},
		Notes:   []string{"a note"},
	}
	rate := Metric{Name: "rate", Title: "rate", Unit: "/s", HigherIsBetter: true}
	for _, v := range []float64{30, 40} {
		r.add(rate, ChildDial, v)
		r.add(rate, Relay, v/2)
	}
	r.add(rate, ChildWire, math.NaN())
	r.add(Metric{Name: "memory", Title: "a longer title", Unit: "KB"}, ChildDial, 7)
	r.finish()
	if _, ok := r.Metrics[0].Values[ChildWire]; ok {
		t.Error("a figure that could not be taken is in the report")
	}
	var b strings.Builder
	if err := r.WriteText(&b); err != nil {
		t.Fatal(err)
	}
	var got []string
	for line := range strings.Lines(b.String()) {
		got = append(got, strings.Join(strings.Fields(line), " "))
	}
	want := []string{
		"pt-x, connection factory x, bound",
		"linux 6 amd64, 2 CPUs, go1",
		"no network namespace of its own: it is raining; TCP congestion control cubic",
		"2 rounds of 0.5s for each figure, in turns; what counts are the ratios",
		"note: a note",
		"",
		"Medians",
		"child relay",
		"rate /s 35.0 17.5",
		"a longer title KB 7.00 -",
		"",
		"Ratios: the transport's figure divided by a peer's",
		"relay better is",
		"rate child 2.00 more",
		"",
		"child the transport, through ConnectionFactory.Dial",
		"relay bare Go relay: io.Copy, which splices; for packets one at a time",
	}
	if !slices.Equal(got, want) {
		t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

// bound is a transport of this process that leads to addr, and pretends to be a child.
func bound(addr string) func(context.Context) (*Child, error) {
	return func(context.Context) (*Child, error) {
		var meter relay.Meter
		c := &Child{Name: "b", Packets: "p", Pid: os.Getpid(), Transport: meter.Transport(map[string]ptipc.ConnectionFactory{
			"b": meter.Factory(true, func(ctx context.Context, _ ptipc.Opaque, dest string) (net.Conn, error) {
				if dest != "" {
					return nil, errors.New("a destination was given")
				}
				return ptipc.Env{}.Dial(ctx, "tcp", addr)
			}),
		}, nil)}
		c.Transport.Packets = map[string]ptipc.PacketFactory{"p": meter.Packets(func(ctx context.Context) (net.PacketConn, error) {
			return ptipc.Env{}.ListenPacket(ctx, "")
		})}
		return c, nil
	}
}

func testConfig(t *testing.T, open func(context.Context) (*Child, error), only ...string) Config {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	return Config{
		Open: open, Peer: []string{self}, Duration: 5 * time.Millisecond, Rounds: 1, Conns: 5, Only: only,
		Progress: func(string) {},
	}
}

func TestBound(t *testing.T) {
	port, err := freePort(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	c := testConfig(t, bound("127.0.0.1:"+port), "bulk", "dial")
	c.Listen = "0.0.0.0:" + port
	report, err := Run(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	if !report.Bound || report.ConnectionFactory != "b" {
		t.Errorf("the report is of %q, bound: %v", report.ConnectionFactory, report.Bound)
	}
	names := map[string]bool{}
	for _, m := range report.Metrics {
		group, _, _ := strings.Cut(m.Name, ".")
		names[group] = true
		if s := m.Values[ChildDial]; s == nil {
			t.Errorf("%s was not measured", m.Name)
		}
		if m.Values[ChildWire] != nil {
			t.Errorf("%s was measured at a wire that nobody knows", m.Name)
		}
	}
	if got := slices.Sorted(maps.Keys(names)); !slices.Equal(got, []string{"bulk", "dial"}) {
		t.Errorf("measured were %v", got)
	}
}

func TestBoundNeedsListen(t *testing.T) {
	_, err := Run(t.Context(), testConfig(t, bound("127.0.0.1:1")))
	if !errors.Is(err, ptipc.ExitUsage) || !strings.Contains(err.Error(), "--listen") {
		t.Errorf("the error is %v", err)
	}
}

// A transport that does not lead to the far end ends the run, and names itself.
func TestBroken(t *testing.T) {
	c := testConfig(t, bound("127.0.0.1:1"))
	c.Listen = "127.0.0.1:0"
	_, err := Run(t.Context(), c)
	if !errors.Is(err, ptipc.ErrRefused) || !strings.Contains(err.Error(), "bulk: child: ") {
		t.Errorf("the error is %v", err)
	}
}

// An end that comes in the middle is heeded wherever it hits.
func TestCancelled(t *testing.T) {
	for _, group := range Groups {
		t.Run(group, func(t *testing.T) {
			port, err := freePort(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			ctx, cancel := context.WithCancel(t.Context())
			c := testConfig(t, bound("127.0.0.1:"+port), group)
			c.Listen, c.Duration, c.Rounds = "127.0.0.1:"+port, time.Hour, math.MaxInt
			c.Progress = func(string) { time.AfterFunc(time.Millisecond, cancel) }
			if _, err := Run(ctx, c); !errors.Is(err, context.Canceled) {
				t.Errorf("the error is %v", err)
			}
		})
	}
}

func TestNoteOthers(t *testing.T) {
	for share, want := range map[float64]int{math.NaN(): 0, -0.2: 0, 0.05: 0, 0.63: 1} {
		var b bench
		b.noteOthers(share)
		if len(b.report.Notes) != want {
			t.Errorf("of a share of %v it says %q", share, b.report.Notes)
		}
	}
}

// startRole runs a peer in this process.
func startRole(t *testing.T, args ...string) string {
	t.Helper()
	stdinEnd, stdin := io.Pipe()
	stdout, stdoutEnd := io.Pipe()
	ended := make(chan error, 1)
	go func() { ended <- RunPeer(t.Context(), args, stdinEnd, stdoutEnd) }()
	t.Cleanup(func() {
		stdin.Close() // its end ends the peer
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
	line := make([]byte, 64)
	n, err := stdout.Read(line)
	if err != nil {
		t.Fatal(err)
	}
	addr, err := peerAddr(string(line[:n]))
	if err != nil {
		t.Fatal(err)
	}
	return addr
}

func dial(t *testing.T, addr string) net.Conn {
	t.Helper()
	conn, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

// What goes to the SOCKS5 server may come in pieces of any size, and data may come
// right behind it.
func TestSOCKS5Peer(t *testing.T) {
	far := startRole(t, roleFar, "127.0.0.1:0")
	proxy := startRole(t, roleSOCKS5)
	request, err := appendRequest(nil, far)
	if err != nil {
		t.Fatal(err)
	}
	byName := append([]byte{5, 1, 0, 3, 9}, "127.0.0.1"...)
	byName = append(byName, request[len(request)-2:]...)
	for name, handshake := range map[string][]byte{
		"address": append([]byte{5, 1, 0}, request...),
		"name":    append([]byte{5, 2, 1, 0}, byName...),
	} {
		t.Run(name, func(t *testing.T) {
			sent := append(slices.Clone(handshake), modeHello)
			for size := 1; size <= len(sent); size++ {
				conn := dial(t, proxy)
				for piece := range slices.Chunk(sent, size) {
					if _, err := conn.Write(piece); err != nil {
						t.Fatal(err)
					}
				}
				got := make([]byte, 2+10+1)
				if _, err := io.ReadFull(conn, got); err != nil {
					t.Fatalf("pieces of %d bytes: %v", size, err)
				}
				want := []byte{5, 0, 5, 0, 0, 1, 0, 0, 0, 0, 0, 0, modeHello}
				if !bytes.Equal(got, want) {
					t.Fatalf("pieces of %d bytes: got % x, want % x", size, got, want)
				}
			}
		})
	}
}

func TestRelayPeer(t *testing.T) {
	far := startRole(t, roleFar, "127.0.0.1:0")
	conn := dial(t, startRole(t, roleRelay, far))
	if _, err := conn.Write([]byte{modeEcho, 'x'}); err != nil {
		t.Fatal(err)
	}
	var b [1]byte
	if _, err := io.ReadFull(conn, b[:]); err != nil || b[0] != 'x' {
		t.Errorf("got %q, %v", b, err)
	}
	if err := conn.(*net.TCPConn).CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if _, err := conn.Read(b[:]); !errors.Is(err, io.EOF) {
		t.Errorf("after the end of the stream: %v, want %v", err, io.EOF)
	}
}

func TestConnectSOCKS5(t *testing.T) {
	success := []byte{5, 0, 0, 1, 0, 0, 0, 0, 0, 0}
	for name, test := range map[string]struct {
		settings []byte
		dest     string
		sent     []byte
		answer   []byte
		says     string // "" is success
	}{
		"plain": {
			dest: "127.0.0.1:258", sent: []byte{5, 1, 0, 5, 1, 0, 1, 127, 0, 0, 1, 1, 2},
			answer: append([]byte{5, 0}, success...),
		},
		"settings, IPv6": {
			settings: []byte("{}"), dest: "[::1]:258",
			sent:   append(append([]byte{5, 1, 0x80, '{', '}', 5, 1, 0, 4}, make([]byte, 15)...), 1, 1, 2),
			answer: append([]byte{5, 0x80}, success...),
		},
		"bound": {
			settings: []byte("{}"), sent: append([]byte{5, 1, 0x80, '{', '}', 5, 1, 0, 4}, make([]byte, 18)...),
			answer: append([]byte{5, 0x80}, success...),
		},
		"method refused": {
			settings: []byte("{}"), dest: "127.0.0.1:258", sent: []byte{5, 1, 0x80, '{', '}', 5, 1, 0, 1, 127, 0, 0, 1, 1, 2},
			answer: []byte{5, 0xff}, says: "the server answers 05 ff to a greeting with method 0x80",
		},
		"refused": {
			dest: "127.0.0.1:258", sent: []byte{5, 1, 0, 5, 1, 0, 1, 127, 0, 0, 1, 1, 2},
			answer: []byte{5, 0, 5, 5, 0, 1, 0, 0, 0, 0, 0, 0}, says: "the server replies 05 05",
		},
		"cut": {
			dest: "127.0.0.1:258", sent: []byte{5, 1, 0, 5, 1, 0, 1, 127, 0, 0, 1, 1, 2},
			answer: []byte{5, 0, 5}, says: "no whole answer",
		},
	} {
		t.Run(name, func(t *testing.T) {
			client, server := net.Pipe()
			defer client.Close()
			served := make(chan []byte, 1)
			go func() {
				defer server.Close()
				got := make([]byte, len(test.sent))
				n, _ := io.ReadFull(server, got)
				served <- got[:n]
				_, _ = server.Write(test.answer)
			}()
			err := connectSOCKS5(client, test.settings, test.dest, true)
			if got := <-served; !bytes.Equal(got, test.sent) {
				t.Errorf("sent % x, want % x", got, test.sent)
			}
			if test.says == "" && err != nil || test.says != "" && (err == nil || !strings.Contains(err.Error(), test.says)) {
				t.Errorf("the error is %v, want %q", err, test.says)
			}
		})
	}
}

func TestPeerAddr(t *testing.T) {
	for line, want := range map[string]string{
		"127.0.0.1:7\n": "127.0.0.1:7", "[::]:7\n": "127.0.0.1:7", "0.0.0.0:7": "127.0.0.1:7", "[::1]:7": "[::1]:7",
		"": "", "nonsense": "",
	} {
		got, err := peerAddr(line)
		if got != want || (err == nil) != (want != "") {
			t.Errorf("%q is %q, %v", line, got, err)
		}
	}
}

func TestRunPeerUsage(t *testing.T) {
	for _, args := range [][]string{nil, {"nobody"}, {roleFar}, {roleRelay}, {roleSOCKS5, "more"}} {
		if err := RunPeer(t.Context(), args, strings.NewReader(""), io.Discard); !errors.Is(err, ptipc.ExitUsage) {
			t.Errorf("%q: %v", args, err)
		}
	}
}

func TestCheckGroups(t *testing.T) {
	if err := CheckGroups(Groups); err != nil {
		t.Error(err)
	}
	if err := CheckGroups([]string{"bulk", "luck"}); !errors.Is(err, ptipc.ExitUsage) {
		t.Errorf("the error is %v", err)
	}
}
