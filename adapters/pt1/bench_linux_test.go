package pt1_test

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"pthost/adapters/pt1"
	"pthost/adapters/pt1/wire"
	"pthost/ptipc"
	"pthost/ptipc/front"
	"pthost/ptipc/host"
	"pthost/ptipc/testpeer"
	"pthost/socks"
)

const (
	benchRounds = 9
	benchBytes  = 64 << 20
)

// BenchmarkObfs4 compares obfs4proxy under this host, with a front before it and a
// delivery behind it, with obfs4proxy alone, in turns and in one run: throughput of one
// download, and the CPU time of all processes together, this one with the ends of
// the stream included.
//
//	go test -run '^$' -bench Obfs4 -benchtime 1x ./adapters/pt1
func BenchmarkObfs4(b *testing.B) {
	source, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { source.Close() })
	go send(source)
	hosted, alone := hostedObfs4(b, source.Addr().String()), aloneObfs4(b, source.Addr().String())
	download(b, hosted)
	download(b, alone)
	for b.Loop() {
		var throughput, cpu, rate []float64
		for round := range benchRounds {
			paths := []*path{hosted, alone}
			if round%2 == 1 { // what the machine does in between hits both
				slices.Reverse(paths)
			}
			for _, p := range paths {
				p.took, p.used = download(b, p)
			}
			throughput = append(throughput, alone.took.Seconds()/hosted.took.Seconds())
			cpu = append(cpu, hosted.used.Seconds()/alone.used.Seconds())
			rate = append(rate, benchBytes/1e6/alone.took.Seconds())
		}
		b.ReportMetric(median(throughput), "throughput/alone")
		b.ReportMetric(median(cpu), "cpu/alone")
		b.ReportMetric(median(rate), "alone-MB/s")
		b.ReportMetric(0, "ns/op")
	}
}

func median(s []float64) float64 {
	slices.Sort(s)
	return s[len(s)/2]
}

// send gives every connection the same number of bytes.
func send(l net.Listener) {
	buf := make([]byte, 64<<10)
	for {
		conn, err := l.Accept()
		if err != nil {
			return
		}
		go func() {
			defer conn.Close()
			for range benchBytes / len(buf) {
				if _, err := conn.Write(buf); err != nil {
					return
				}
			}
		}()
	}
}

// A path is one way to the source.
type path struct {
	dial func() (net.Conn, error)
	pids []int // of obfs4proxy, client and server

	took, used time.Duration
}

func download(b *testing.B, p *path) (took, used time.Duration) {
	before, began := cpuTime(b, p.pids), time.Now()
	conn, err := p.dial()
	if err != nil {
		b.Fatal(err)
	}
	defer conn.Close()
	buf := make([]byte, 64<<10)
	n, err := io.CopyBuffer(struct{ io.Writer }{io.Discard}, struct{ io.Reader }{conn}, buf)
	if err != nil || n != benchBytes {
		b.Fatalf("%d bytes arrived: %v", n, err)
	}
	return time.Since(began), cpuTime(b, p.pids) - before
}

// cpuTime is that of this process and of others.
func cpuTime(b *testing.B, pids []int) time.Duration {
	var self syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &self); err != nil {
		b.Fatal(err)
	}
	total := self.Utime.Nano() + self.Stime.Nano()
	for _, pid := range pids {
		var ts unix.Timespec
		if err := unix.ClockGettime(int32(^pid)<<3|2, &ts); err != nil {
			b.Fatal(err)
		}
		total += ts.Nano()
	}
	return time.Duration(total)
}

func hostedObfs4(b *testing.B, source string) *path {
	p := &path{}
	command := &host.Command{
		Path: testpeer.Need(b, "obfs4proxy"), Dialect: pt1.Dialect{}, StopTimeout: time.Second,
		Events: func(e host.Event) {
			if e.Kind == host.Ready {
				p.pids = append(p.pids, e.Pid)
			}
		},
	}
	env := ptipc.Env{Local: stateDir(b)}
	client, server, err := command.Server().GenerateConfig(b.Context(), ptipc.Opaque(`{"transport":"obfs4","listen":"127.0.0.1:0"}`), env)
	if err != nil {
		b.Fatal(err)
	}
	p.pids = nil // that one has ended
	listener, err := command.Server().Listen(b.Context(), server, env)
	if err != nil {
		b.Fatal(err)
	}
	deliver, err := front.Deliver("tcp://"+source, false, slog.New(slog.DiscardHandler))
	if err != nil {
		b.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- deliver.Serve(listener) }()
	b.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		_ = deliver.Shutdown(ctx)
		listener.Close()
		<-served
	})
	transport, err := command.Open(b.Context(), client, ptipc.Env{})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { transport.Close() })
	addr := forward(b, transport.Connections["obfs4"])
	p.dial = func() (net.Conn, error) { return net.Dial("tcp", addr) }
	return p
}

// aloneObfs4 starts obfs4proxy as tor would, and speaks to its port.
func aloneObfs4(b *testing.B, source string) *path {
	p := &path{}
	start := func(e wire.Environment, keyword string) (words []string) {
		e.State, e.ExitOnStdinClose = stateDir(b), true
		environ, err := e.Environ()
		if err != nil {
			b.Fatal(err)
		}
		cmd := exec.Command(testpeer.Need(b, "obfs4proxy"))
		cmd.Env = append(os.Environ(), environ...)
		stdin, err := cmd.StdinPipe()
		if err != nil {
			b.Fatal(err)
		}
		stdout, err := cmd.StdoutPipe()
		if err != nil {
			b.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			b.Fatal(err)
		}
		b.Cleanup(func() { _, _ = stdin.Close(), cmd.Wait() })
		p.pids = append(p.pids, cmd.Process.Pid)
		lines := bufio.NewScanner(stdout)
		for lines.Scan() && !strings.HasSuffix(lines.Text(), "METHODS DONE") {
			if strings.HasPrefix(lines.Text(), keyword+" ") {
				words = strings.Fields(lines.Text())
			}
		}
		if words == nil {
			b.Fatalf("obfs4proxy announced no %s", keyword)
		}
		return words
	}
	server := start(wire.Environment{Port: source, Servers: []wire.Server{{Name: "obfs4", Bind: netip.MustParseAddrPort("127.0.0.1:0")}}}, "SMETHOD")
	client := start(wire.Environment{Clients: []string{"obfs4"}}, "CMETHOD")
	args := strings.ReplaceAll(strings.TrimPrefix(server[3], "ARGS:"), ",", ";")
	username, password, err := wire.Credentials(args)
	if err != nil {
		b.Fatal(err)
	}
	p.dial = func() (net.Conn, error) {
		conn, err := net.Dial("tcp", client[3])
		if err != nil {
			return nil, err
		}
		if err := socks.ConnectPassword(context.Background(), conn, username, password, server[2]); err != nil {
			conn.Close()
			return nil, fmt.Errorf("obfs4proxy: %w", err)
		}
		return conn, nil
	}
	return p
}
