package relay

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

const (
	namespaceEnv = "RELAY_TEST_IN_NETNS"
	ccFile       = "/proc/sys/net/ipv4/tcp_congestion_control"
)

func init() {
	roles["echo-blocking"] = serveEach(echoBlocking)
	beforeBenchmarks = rerunInNamespace
}

// rerunInNamespace runs the binary again in a network namespace of its own, with
// cubic or else reno in force, because bbr paces loopback. Where that is not allowed the
// benchmarks run with what there is, and say so.
func rerunInNamespace() (code int, done bool) {
	if os.Getenv(namespaceEnv) != "" {
		if err := setUpNamespace(); err != nil {
			fmt.Fprintln(os.Stderr, "network namespace:", err)
			return 1, true
		}
		return 0, false
	}
	cmd := exec.Command(os.Args[0], os.Args[1:]...)
	cmd.Env = append(os.Environ(), namespaceEnv+"=1")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET}
	if err := cmd.Start(); err != nil {
		return 0, false
	}
	err := cmd.Wait()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return exit.ExitCode(), true
	}
	return 0, true
}

func setUpNamespace() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	lo, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	lo.SetUint16(unix.IFF_UP | unix.IFF_RUNNING)
	if err := unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, lo); err != nil {
		return err
	}
	// A namespace may only use what the host allows to everybody.
	err = os.WriteFile(ccFile, []byte("cubic"), 0)
	if errors.Is(err, os.ErrPermission) {
		err = os.WriteFile(ccFile, []byte("reno"), 0)
	}
	return err
}

func logCongestionControl(b *testing.B) {
	cc, err := os.ReadFile(ccFile)
	if err != nil {
		b.Fatal(err)
	}
	b.Logf("congestion control: %s, %d CPUs", bytes.TrimSpace(cc), runtime.NumCPU())
}

// cpu is the CPU time that the process has used so far.
func (p *process) cpu(b *testing.B) time.Duration {
	var ts unix.Timespec
	if err := unix.ClockGettime(int32(^p.cmd.Process.Pid)<<3|2, &ts); err != nil {
		b.Fatal(err)
	}
	return time.Duration(ts.Nano())
}

func (p *process) dial(b *testing.B) net.Conn {
	c, err := net.Dial(p.network, p.addr)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { c.Close() })
	return c
}

func median[T float64 | time.Duration](s []T) T {
	s = slices.Clone(s)
	slices.Sort(s)
	return s[len(s)/2]
}

// compare measures ours and theirs in turns and returns the medians of ours/theirs.
func compare(turns int, ours, theirs func() (value float64, cpu time.Duration)) (value, cpu float64) {
	var values, cpus []float64
	for range turns {
		v1, c1 := ours()
		v2, c2 := theirs()
		values = append(values, v1/v2)
		cpus = append(cpus, float64(c1)/float64(c2))
	}
	return median(values), median(cpus)
}

// BenchmarkBulk moves bytes in one direction through Join and through io.Copy,
// which splices, each in a process of its own. The ratios are Join/io.Copy.
func BenchmarkBulk(b *testing.B) {
	logCongestionControl(b)
	const size = 1 << 30
	for _, networks := range []string{"tcp-tcp", "unix-tcp", "tcp-unix", "unix-unix"} {
		for _, streams := range []int{1, 4} {
			b.Run(fmt.Sprintf("%s/streams=%d", networks, streams), func(b *testing.B) {
				near, far, _ := strings.Cut(networks, "-")
				sink := startRole(b, "sink", far)
				measure := func(role string) func() (float64, time.Duration) {
					p := startRole(b, role, near, far, sink.addr)
					return func() (float64, time.Duration) {
						before, start := p.cpu(b), time.Now()
						done := make(chan error, streams)
						for range streams {
							c := p.dial(b)
							go func() { done <- blast(c, size/streams) }()
						}
						for range streams {
							if err := <-done; err != nil {
								b.Fatal(err)
							}
						}
						return size / time.Since(start).Seconds(), p.cpu(b) - before
					}
				}
				ours, theirs := measure("join"), measure("iocopy")
				for b.Loop() {
					rate, cpu := compare(15, ours, theirs)
					b.ReportMetric(rate, "throughput-ratio")
					b.ReportMetric(cpu, "cpu/GB-ratio")
				}
				b.ReportMetric(0, "ns/op")
			})
		}
	}
}

// blast writes size bytes and waits for the other side to close.
func blast(c net.Conn, size int) error {
	buf := make([]byte, 128<<10)
	for size > 0 {
		n, err := c.Write(buf[:min(len(buf), size)])
		if err != nil {
			return err
		}
		size -= n
	}
	if err := c.(closeWriter).CloseWrite(); err != nil {
		return err
	}
	_, err := c.Read(buf)
	if errors.Is(err, io.EOF) {
		return nil
	}
	return err
}

// BenchmarkRoundTrip sends one byte to and fro. The peers are Go programs, or
// programs that block in their system calls and so add less of their own.
func BenchmarkRoundTrip(b *testing.B) {
	logCongestionControl(b)
	microsocks, _ := exec.LookPath("microsocks")
	for _, peers := range []string{"go", "blocking"} {
		role, trips := "echo", tripsGo
		if peers == "blocking" {
			role, trips = "echo-blocking", tripsBlocking
		}
		echo := startRole(b, role, "tcp")
		measure := func(p *process, c net.Conn) func() (float64, time.Duration) {
			return func() (float64, time.Duration) {
				before := p.cpu(b)
				p50, err := trips(c, 10_000)
				if err != nil {
					b.Fatal(err)
				}
				return float64(p50), p.cpu(b) - before
			}
		}
		ours := startRole(b, "join", "tcp", "tcp", echo.addr)
		bare := startRole(b, "iocopy", "tcp", "tcp", echo.addr)
		report := func(name string, theirs *process, c net.Conn) {
			b.Run("peers="+peers+"/than="+name, func(b *testing.B) {
				for b.Loop() {
					p50, cpu := compare(9, measure(ours, ours.dial(b)), measure(theirs, c))
					b.ReportMetric(p50, "p50-ratio")
					b.ReportMetric(cpu, "cpu-ratio")
				}
				b.ReportMetric(0, "ns/op")
			})
		}
		report("io.Copy", bare, bare.dial(b))
		if microsocks == "" {
			b.Log("microsocks is not installed: apt-get install microsocks")
			continue
		}
		socks, c := startMicrosocks(b, microsocks, echo.addr)
		report("microsocks", socks, c)
	}
}

func startMicrosocks(b *testing.B, path, dest string) (*process, net.Conn) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	addr := l.Addr().(*net.TCPAddr)
	l.Close()
	cmd := exec.Command(path, "-i", "127.0.0.1", "-p", strconv.Itoa(addr.Port))
	if err := cmd.Start(); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	p := &process{network: "tcp", addr: addr.String(), cmd: cmd}
	var c net.Conn
	for start := time.Now(); ; runtime.Gosched() {
		if c, err = net.Dial("tcp", p.addr); err == nil {
			break
		}
		if time.Since(start) > 10*time.Second {
			b.Fatal(err)
		}
	}
	b.Cleanup(func() { c.Close() })
	to, err := net.ResolveTCPAddr("tcp", dest)
	if err != nil {
		b.Fatal(err)
	}
	answer := make([]byte, 12)
	for _, step := range []struct {
		send   []byte
		answer int
	}{
		{[]byte{5, 1, 0}, 2},
		{append(append([]byte{5, 1, 0, 1}, to.IP.To4()...), byte(to.Port>>8), byte(to.Port)), 10},
	} {
		if _, err := c.Write(step.send); err != nil {
			b.Fatal(err)
		}
		if _, err := io.ReadFull(c, answer[:step.answer]); err != nil {
			b.Fatal(err)
		}
	}
	return p, c
}

func tripsGo(c net.Conn, n int) (p50 time.Duration, err error) {
	var buf [1]byte
	times := make([]time.Duration, n)
	for i := range times {
		start := time.Now()
		if _, err := c.Write(buf[:]); err != nil {
			return 0, err
		}
		if _, err := c.Read(buf[:]); err != nil {
			return 0, err
		}
		times[i] = time.Since(start)
	}
	return median(times), nil
}

func tripsBlocking(c net.Conn, n int) (p50 time.Duration, err error) {
	f, err := c.(*net.TCPConn).File()
	if err != nil {
		return 0, err
	}
	defer f.Close()
	fd := int(f.Fd()) // makes it blocking
	defer func() { _ = unix.SetNonblock(fd, true) }()
	var buf [1]byte
	times := make([]time.Duration, n)
	for i := range times {
		start := time.Now()
		if _, err := unix.Write(fd, buf[:]); err != nil {
			return 0, err
		}
		if _, err := unix.Read(fd, buf[:]); err != nil {
			return 0, err
		}
		times[i] = time.Since(start)
	}
	return median(times), nil
}

func echoBlocking(c net.Conn) {
	f, err := c.(*net.TCPConn).File()
	if err != nil {
		return
	}
	defer f.Close()
	fd := int(f.Fd())
	c.Close()
	var b [1]byte
	for {
		if n, err := unix.Read(fd, b[:]); err != nil || n == 0 {
			return
		}
		if _, err := unix.Write(fd, b[:]); err != nil {
			return
		}
	}
}

// BenchmarkIdle holds 1,000 relayed connections that have carried a byte.
func BenchmarkIdle(b *testing.B) {
	const conns = 1000
	for b.Loop() {
		echo := startRole(b, "echo", "tcp")
		for _, role := range []string{"join", "iocopy"} {
			p := startRole(b, role, "tcp", "tcp", echo.addr)
			kb, fds := p.userKB(b), p.fds(b)
			for range conns {
				if _, err := tripsGo(p.dial(b), 1); err != nil {
					b.Fatal(err)
				}
			}
			b.ReportMetric(float64(p.userKB(b)-kb)/conns, role+"-KB/conn")
			b.ReportMetric(float64(p.fds(b)-fds)/conns, role+"-fds/conn")
		}
	}
	b.ReportMetric(0, "ns/op")
}

func (p *process) userKB(b *testing.B) int {
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.cmd.Process.Pid))
	if err != nil {
		b.Fatal(err)
	}
	for line := range strings.Lines(string(status)) {
		if f := strings.Fields(line); f[0] == "RssAnon:" {
			kb, err := strconv.Atoi(f[1])
			if err != nil {
				b.Fatal(err)
			}
			return kb
		}
	}
	b.Fatal("no RssAnon in /proc/PID/status")
	return 0
}

func (p *process) fds(b *testing.B) int {
	entries, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", p.cmd.Process.Pid))
	if err != nil {
		b.Fatal(err)
	}
	return len(entries)
}
