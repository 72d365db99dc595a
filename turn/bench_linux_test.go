package turn

import (
	"bufio"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"pthost/ptipc/testpeer"
)

// A relayer is a process that relays between a client and a peer.
type relayer struct {
	name    string
	process *os.Process
	addr    netip.AddrPort
	turn    bool
}

// cpu is what the process has used.
func (r *relayer) cpu(tb testing.TB) time.Duration {
	var t unix.Timespec
	if err := unix.ClockGettime(int32(^r.process.Pid<<3|2), &t); err != nil { // its CPU clock
		tb.Fatal(err)
	}
	return time.Duration(t.Nano())
}

func startRole(tb testing.TB, role string) *relayer {
	tb.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), roleVariable+"="+role)
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		tb.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		tb.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { _ = in.Close(); _ = cmd.Wait() })
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		tb.Fatal(err)
	}
	go func() { _, _ = io.Copy(io.Discard, out) }()
	return &relayer{name: role, process: cmd.Process, addr: netip.MustParseAddrPort(line[:len(line)-1]), turn: role == "turn"}
}

// startCoturn starts coturn's server on a port that was free a moment ago.
func startCoturn(tb testing.TB) *relayer {
	tb.Helper()
	program := testpeer.Need(tb, "turnserver")
	free := listenUDP(tb, "127.0.0.1")
	addr := free.LocalAddr().(*net.UDPAddr).AddrPort()
	_ = free.Close()
	cmd := exec.Command(program, "-n", "--no-tls", "--no-dtls", "--no-cli", "--no-tcp", "--no-tcp-relay", "--allow-loopback-peers",
		"--listening-ip=127.0.0.1", "--relay-ip=127.0.0.1", "--listening-port="+strconv.Itoa(int(addr.Port())),
		"--lt-cred-mech", "--user="+roleCredentials.Username+":"+roleCredentials.Password, "--realm="+roleCredentials.Realm,
		"--log-file=/dev/null", "--simple-log", "--pidfile=", "--userdb="+tb.TempDir()+"/db")
	cmd.Dir = tb.TempDir()
	if err := cmd.Start(); err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	c := newRawClient(tb, addr, roleCredentials)
	for end := time.Now().Add(20 * time.Second); ; { // until it listens
		_ = c.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
		_, _ = c.Write(c.build(1).Raw)
		if _, err := c.next(); err == nil {
			break
		}
		if time.Now().After(end) {
			tb.Fatal("turnserver does not answer")
		}
	}
	return &relayer{name: "coturn", process: cmd.Process, addr: addr, turn: true}
}

// oneByOne is a socket that sends as most programs do: a datagram is a datagram.
func oneByOne(c *net.UDPConn) socket {
	s := newSocket(c, false)
	s.(*udpSocket).segment.Store(0)
	return s
}

type load struct {
	rate    float64       // round trips a second
	cpu     time.Duration // of the relayer, for a round trip
	latency time.Duration // median
}

// run keeps window datagrams of 1,200 bytes on their way, for a time.
func (r *relayer) run(tb testing.TB, window int, d time.Duration) load {
	tb.Helper()
	peer := listenUDP(tb, "127.0.0.1")
	done := make(chan struct{})
	go func() { defer close(done); echo(oneByOne(peer)) }()
	defer func() { _ = peer.Close(); <-done }()
	peerAddr := peer.LocalAddr().(*net.UDPAddr).AddrPort()
	c := newRawClient(tb, r.addr, roleCredentials)
	defer c.Close()
	header := 0
	if r.turn {
		if err := c.open(peerAddr); err != nil {
			tb.Fatal(r.name, err)
		}
		header = channelHeader
	} else if _, err := c.Write([]byte(peerAddr.String())); err != nil {
		tb.Fatal(err)
	}
	datagram := make([]byte, header+1200)
	if r.turn {
		putChannel(datagram, minChannel)
	}
	sock := oneByOne(c.UDPConn)
	_ = c.SetDeadline(time.Time{})
	var times []time.Duration
	began, cpu, count := time.Now(), r.cpu(tb), 0
	for range window {
		_, _ = c.Write(datagram)
	}
	lost := 0
	for last := began; ; {
		_ = c.SetReadDeadline(last.Add(200 * time.Millisecond))
		b, err := sock.receive()
		now := time.Now()
		if err != nil { // all were lost
			if lost++; lost > 5 {
				tb.Fatal(r.name, err)
			}
			for range window {
				_, _ = c.Write(datagram)
			}
			last = now
			continue
		}
		if window == 1 {
			times = append(times, now.Sub(last))
		}
		last = now
		n := len(b.packets)
		count += n
		for i := range b.packets {
			b.queue(&b.packets[i], datagram, 1200, nil)
		}
		if now.Sub(began) > d {
			b.release()
			took := now.Sub(began)
			result := load{rate: float64(count) / took.Seconds(), cpu: (r.cpu(tb) - cpu) / time.Duration(count)}
			if window == 1 {
				slices.Sort(times)
				result.latency = times[len(times)/2]
			}
			if r.turn { // the next run has another socket, and this one's port may come again
				_ = c.SetDeadline(time.Now().Add(time.Second))
				_, _ = c.Write(c.build(4, uint32Attribute(0x000D, 0)).Raw)
			}
			return result
		}
		_, _, _ = sock.send(b)
		b.release()
	}
}

func median(v []float64) float64 {
	slices.Sort(v)
	return v[len(v)/2]
}

// BenchmarkRelay compares with coturn and with a bare relay in Go, in turns, at 1,200
// bytes. Ratios are medians over the turns. rate and cpu are for a window of 64, latency for one.
//
//	go test -run - -bench Relay -benchtime 1x ./turn
func BenchmarkRelay(b *testing.B) {
	rounds, each := 7, 700*time.Millisecond
	relayers := []*relayer{startRole(b, "turn"), startCoturn(b), {name: "relay"}}
	for range b.N {
		results := make([][]load, len(relayers))
		for range rounds {
			for i, r := range relayers {
				next := func() *relayer {
					if r.process == nil { // it has one client in its life
						return startRole(b, r.name)
					}
					return r
				}
				l, one := next().run(b, 64, each), next().run(b, 1, each)
				l.latency = one.latency
				results[i] = append(results[i], l)
				b.Logf("%-7s %8.0f round trips/s  %5.2f us CPU  latency %v, %5.2f us CPU", r.name, l.rate, float64(l.cpu)/1000, l.latency, float64(one.cpu)/1000)
			}
		}
		for i, other := range relayers[1:] {
			var rate, cpu, latency []float64
			for n := range rounds {
				ours, theirs := results[0][n], results[i+1][n]
				rate = append(rate, ours.rate/theirs.rate)
				cpu = append(cpu, float64(theirs.cpu)/float64(ours.cpu))
				latency = append(latency, float64(ours.latency)/float64(theirs.latency))
			}
			b.ReportMetric(median(rate), "rate/"+other.name)
			b.ReportMetric(median(cpu), "packets-per-CPU/"+other.name)
			b.ReportMetric(median(latency), "latency/"+other.name)
		}
	}
	b.ReportMetric(0, "ns/op")
}
