package bench

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// startTied starts a process that the system kills when this one ends. The calling
// goroutine has to live until it is waited for: what the system watches is the
// thread.
func startTied(cmd *exec.Cmd) error {
	runtime.LockOSThread()
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	cmd.SysProcAttr.Pdeathsig = syscall.SIGKILL
	return cmd.Start()
}

func kernel() string {
	var name unix.Utsname
	if err := unix.Uname(&name); err != nil {
		return ""
	}
	return unix.ByteSliceToString(name.Release[:])
}

const ticks = 100 // in a second, wherever /proc counts in them

// tree returns a process and its descendants, and the CPU seconds of those that
// have ended and were waited for, which the system counts in ticks.
func tree(root int) (pids []int, ended float64) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, 0
	}
	parents, waited := map[int]int{}, map[int]float64{}
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		stat, err := os.ReadFile("/proc/" + e.Name() + "/stat")
		if err != nil {
			continue // it has just ended
		}
		// The name in parentheses may hold anything.
		fields := bytes.Fields(stat[bytes.LastIndexByte(stat, ')')+1:])
		if len(fields) < 15 {
			continue
		}
		number := func(i int) int { n, _ := strconv.Atoi(string(fields[i])); return n } // the kernel writes numbers
		parents[pid] = number(1)
		waited[pid] = float64(number(13)+number(14)) / ticks
	}
	for pid := range parents {
		for p := pid; p != 0; p = parents[p] {
			if p == root {
				pids = append(pids, pid)
				ended += waited[pid]
				break
			}
		}
	}
	return pids, ended
}

// CPUTime is what a process and its descendants have used so far, in seconds, and
// NaN for no process.
func CPUTime(pid int) float64 {
	if pid == 0 {
		return math.NaN()
	}
	pids, sum := tree(pid)
	for _, pid := range pids {
		sum += clock(int32(^pid<<3 | 2)) // as clock_getcpuclockid(3) makes it
	}
	return sum
}

// callerCPU is what this process alone has used so far, in seconds.
func callerCPU() float64 { return clock(unix.CLOCK_PROCESS_CPUTIME_ID) }

// clock reads a clock; that of a process that has just ended is 0.
func clock(id int32) float64 {
	var ts unix.Timespec
	if err := unix.ClockGettime(id, &ts); err != nil {
		return 0
	}
	return float64(ts.Nano()) / 1e9
}

// busy is what all processors together have worked so far, in seconds.
func busy() float64 {
	text, err := os.ReadFile("/proc/stat")
	if err != nil {
		return math.NaN()
	}
	line, _, _ := strings.Cut(string(text), "\n")
	fields := strings.Fields(line)
	if len(fields) < 9 || fields[0] != "cpu" {
		return math.NaN()
	}
	sum := 0.0
	for i, field := range fields[1:9] { // user nice system idle iowait irq softirq steal
		v, err := strconv.ParseFloat(field, 64)
		if err != nil {
			return math.NaN()
		}
		if i != 3 && i != 4 {
			sum += v
		}
	}
	return sum / ticks
}

// memory is in bytes.
type memory struct {
	user   float64 // anonymous pages of a process and its descendants
	fds    float64 // their open descriptors
	kernel float64 // slabs of the whole system: sockets, files, epoll, pipes
}

func memoryOf(pid int) memory {
	m := memory{kernel: kilobytes("/proc/meminfo", "Slab:")}
	if pid == 0 {
		return m
	}
	pids, _ := tree(pid)
	for _, pid := range pids {
		dir := fmt.Sprintf("/proc/%d/", pid)
		m.user += kilobytes(dir+"smaps_rollup", "Anonymous:")
		if entries, err := os.ReadDir(dir + "fd"); err == nil {
			m.fds += float64(len(entries))
		}
	}
	return m
}

// kilobytes returns a line of a file in /proc in bytes.
func kilobytes(file, key string) float64 {
	text, err := os.ReadFile(file)
	if err != nil {
		return math.NaN()
	}
	for line := range strings.Lines(string(text)) {
		if rest, ok := strings.CutPrefix(line, key); ok {
			kb, err := strconv.ParseFloat(strings.TrimSuffix(strings.TrimSpace(rest), " kB"), 64)
			if err != nil {
				return math.NaN()
			}
			return kb * 1024
		}
	}
	return math.NaN()
}

const canBlock = true

// blocking takes the socket of a connection away from the Go runtime: what blocks
// in the system call itself is woken without a detour, and adds the least of its
// own to a round trip.
func blocking(conn net.Conn) (io.ReadWriteCloser, error) {
	file, ok := conn.(interface{ File() (*os.File, error) })
	if !ok {
		return nil, fmt.Errorf("%T has no socket", conn)
	}
	f, err := file.File()
	if err != nil {
		return nil, err
	}
	if err := unix.SetNonblock(int(f.Fd()), false); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return &socket{conn: conn, file: f}, nil
}

type socket struct {
	conn net.Conn
	file *os.File
}

func (s *socket) Read(p []byte) (int, error) {
	n, err := unix.Read(int(s.file.Fd()), p)
	if n == 0 && err == nil {
		return 0, io.EOF
	}
	return max(n, 0), err
}

func (s *socket) Write(p []byte) (int, error) {
	n, err := unix.Write(int(s.file.Fd()), p)
	return max(n, 0), err
}

func (s *socket) Close() error { return errors.Join(s.file.Close(), s.conn.Close()) }

// echo sends everything back.
func echo(conn net.Conn) {
	s, err := blocking(conn)
	if err != nil {
		return
	}
	defer s.Close()
	var buf [1]byte
	for {
		n, err := s.Read(buf[:])
		if err != nil {
			return
		}
		if _, err := s.Write(buf[:n]); err != nil {
			return
		}
	}
}

const (
	// inNamespace is the environment variable of a process in a namespace of its own.
	inNamespace = "PTIPC_BENCH_NAMESPACE"
	// lifelineFD is a descriptor of that process: its end means the end of the one
	// that runs it. Signals would not do: the system sends one for each of the
	// threads that die with it, and a second one means at once.
	lifelineFD = 3
	sysctls    = "/proc/sys/net/ipv4/"
)

// EnterNamespace runs this process again in a network namespace of its own, with
// the same arguments and streams, and returns its exit code. The end of ctx ends
// it. done is false if this process is to go on itself, with the context that is
// returned: it is the one that was run again, or it may not make namespaces.
func EnterNamespace(ctx context.Context) (going context.Context, n Network, code int, done bool, err error) {
	if os.Getenv(inNamespace) != "" {
		going, err = enter(ctx)
		return going, Network{Namespace: true}, 0, false, err
	}
	self, err := os.Executable()
	if err != nil {
		return ctx, n, 0, false, err
	}
	lifelineEnd, lifeline, err := os.Pipe()
	if err != nil {
		return ctx, n, 0, false, err
	}
	defer lifelineEnd.Close()
	defer lifeline.Close()
	cmd := &exec.Cmd{
		Path: self, Args: os.Args, Env: append(os.Environ(), inNamespace+"=1"),
		Stdin: os.Stdin, Stdout: os.Stdout, Stderr: os.Stderr, ExtraFiles: []*os.File{lifelineEnd},
		SysProcAttr: &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET | syscall.CLONE_NEWNS},
	}
	if err := cmd.Start(); err != nil {
		return ctx, Network{Why: fmt.Sprintf("it needs the privileges of root (%v)", err)}, 0, false, nil
	}
	defer context.AfterFunc(ctx, func() { _ = lifeline.Close() })()
	err = cmd.Wait()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return ctx, n, max(exit.ExitCode(), 1), true, nil
	}
	return ctx, n, 0, true, err
}

// enter makes this process, which is in the namespace, ready.
func enter(ctx context.Context) (context.Context, error) {
	// Nothing that is started may hold the lifeline, or believe itself here.
	syscall.CloseOnExec(lifelineFD)
	if err := os.Unsetenv(inNamespace); err != nil {
		return ctx, err
	}
	going, cancel := context.WithCancel(ctx)
	go func() {
		_, _ = io.Copy(io.Discard, os.NewFile(lifelineFD, "lifeline"))
		cancel()
	}()
	return going, setUpNamespace()
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
		return fmt.Errorf("bringing up the loopback of the namespace: %w", err)
	}
	// Every dial leaves a port in TIME_WAIT for a minute. They would run out, and those
	// who come last would have to search for one.
	if err := setSysctl("ip_local_port_range", "1024 65535"); err != nil {
		return err
	}
	if err := setSysctl("tcp_max_tw_buckets", "1024"); err != nil {
		return err
	}
	// bbr paces the loopback too, where there is nothing to pace for. A namespace may
	// only use what the system allows to everybody; reno always is.
	return setSysctl("tcp_congestion_control", "cubic", "reno")
}

// setSysctl sets the first of the values that the system takes. It is no error if
// it takes none: what is in force in the end is told.
func setSysctl(name string, values ...string) error {
	for _, value := range values {
		err := os.WriteFile(sysctls+name, []byte(value), 0)
		if err == nil {
			return nil
		}
		if !errors.Is(err, os.ErrPermission) && !errors.Is(err, os.ErrNotExist) && !errors.Is(err, unix.EROFS) {
			return err
		}
	}
	return nil
}

// MountSmall mounts a file system of so many bytes on dir. Nobody outside of the
// namespace that EnterNamespace made sees it.
func MountSmall(dir string, size int) (unmount func() error, err error) {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return nil, fmt.Errorf("keeping mounts to this namespace: %w", err)
	}
	err = unix.Mount("tmpfs", dir, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, fmt.Sprintf("size=%d,nr_inodes=1000,mode=0700", size))
	if err != nil {
		return nil, fmt.Errorf("mounting a small file system on %s: %w", dir, err)
	}
	return func() error { return unix.Unmount(dir, unix.MNT_DETACH) }, nil
}

// Processes says what a process and its descendants use: how many there are, their
// open descriptors, and the bytes of their anonymous pages.
func Processes(pid int) (n, descriptors int, memory uint64) {
	pids, _ := tree(pid)
	m := memoryOf(pid)
	return len(pids), int(m.fds), uint64(m.user)
}

// CongestionControl is what TCP connections of this process use, "" if the system
// does not tell.
func CongestionControl() string {
	text, err := os.ReadFile(sysctls + "tcp_congestion_control")
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(text))
}
