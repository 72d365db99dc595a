package bench

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"pthost/ptipc"
)

// Groups are the names that [Config].Only takes, in the order of the report.
var Groups = []string{"bulk", "dial", "rtt", "idle", "spawn", "packets"}

// A Config says what is measured and for how long.
type Config struct {
	Transport string // its name, for the report
	// Open starts the child and waits until it is ready. It is called again and
	// again, and never twice at a time.
	Open func(ctx context.Context) (*Child, error)
	// Settings are those that every connection is opened with.
	Settings ptipc.Opaque
	// Peer is a command that calls RunPeer with the arguments that follow it.
	Peer []string
	// Listen is where the far end listens, which a bound transport has to lead to.
	// "" is a port of the loopback.
	Listen string
	// PacketsTo is where the child sends datagrams, "" for the far end itself. A transport
	// whose datagrams another one has to understand leads to the far end from there.
	PacketsTo string
	// Duration is how long each figure is measured in each round, Rounds how often.
	Duration time.Duration
	Rounds   int
	// Conns is the number of idle connections.
	Conns int
	// Only names the groups that are measured; none means all.
	Only []string
	// Network is where this process runs, for the report.
	Network Network
	// Progress is told what comes next. It must be set.
	Progress func(what string)
}

// bench is one run.
type bench struct {
	config     Config
	report     Report
	far        string // address of the far end, as free transports dial it
	microsocks string // its path, or ""
	packetName string // of the packet factory; "" for none
	dir        string // of the relay's unix socket; "" if the child has none either
}

// Run measures. It needs descriptors for some more than Config.Conns connections,
// and leaves nothing behind.
func Run(ctx context.Context, c Config) (_ *Report, err error) {
	b := &bench{config: c, report: Report{
		Transport: c.Transport, Network: c.Network, Machine: machine(),
		Rounds: c.Rounds, Seconds: c.Duration.Seconds(), IdleConns: c.Conns,
	}}
	if b.microsocks, err = exec.LookPath("microsocks"); err != nil {
		b.note("microsocks is not installed and not measured; on Debian: apt-get install microsocks")
	}
	listen := c.Listen
	if listen == "" {
		listen = "127.0.0.1:0"
	}
	far, addr, err := b.startPeer(ctx, roleFar, listen)
	if err != nil {
		return nil, fmt.Errorf("the far end: %w", err)
	}
	defer func() { err = errors.Join(err, far.stop()) }()
	b.far = addr
	addr, err = b.tryOut(ctx)
	if err != nil {
		return nil, err
	}
	if strings.HasPrefix(addr, "unix:") {
		if b.dir, err = os.MkdirTemp("", "ptipc-bench-"); err != nil {
			return nil, err
		}
		defer os.RemoveAll(b.dir)
	}
	busyBefore, ownBefore, start := busy(), CPUTime(os.Getpid()), time.Now()
	for _, group := range []struct {
		name    string
		measure func(ctx context.Context) error
	}{{"bulk", b.bulk}, {"dial", b.dials}, {"rtt", b.roundTrips}, {"idle", b.idle}, {"spawn", b.spawns}, {"packets", b.packets}} {
		if b.report.ConnectionFactory == "" && group.name != "packets" {
			b.note("the transport carries no streams, and packets alone are measured")
			continue
		}
		if len(c.Only) > 0 && !slices.Contains(c.Only, group.name) {
			continue
		}
		if err := group.measure(ctx); err != nil {
			return nil, fmt.Errorf("%s: %w", group.name, err)
		}
	}
	others := (busy() - busyBefore) - (CPUTime(os.Getpid()) - ownBefore)
	b.noteOthers(others / time.Since(start).Seconds() / float64(runtime.NumCPU()))
	b.report.finish()
	return &b.report, nil
}

// noteOthers warns of a machine that was not idle. Some work of the kernel counts
// for nobody, and that is little.
func (b *bench) noteOthers(share float64) {
	if share > 0.1 {
		b.note(fmt.Sprintf("others used %.0f%% of the CPUs meanwhile: rates and times vary a lot, CPU times less", share*100))
	}
}

func machine() Machine {
	return Machine{OS: runtime.GOOS, Arch: runtime.GOARCH, Kernel: kernel(), CPUs: runtime.NumCPU(), Go: runtime.Version()}
}

func (b *bench) note(text string) {
	if !slices.Contains(b.report.Notes, text) {
		b.report.Notes = append(b.report.Notes, text)
	}
}

// tryOut finds out what kind of transport it is, and where it listens.
func (b *bench) tryOut(ctx context.Context) (addr string, err error) {
	c, err := b.config.Open(ctx)
	if err != nil {
		return "", err
	}
	defer func() { err = errors.Join(err, c.Transport.Close()) }()
	b.packetName = c.Packets
	if c.Name == "" {
		return "", nil
	}
	factory := c.Transport.Connections[c.Name]
	b.report.ConnectionFactory, b.report.Bound = c.Name, factory.Bound
	if factory.Bound && b.config.Listen == "" {
		return "", fmt.Errorf("%s is bound, and its server has to deliver to the bench; say with --listen where: %w", c.Name, ptipc.ExitUsage)
	}
	return c.Addr, nil
}

// each runs f with every program started, and stops them.
func (b *bench) each(ctx context.Context, f func(all []*instance) error) (err error) {
	var all []*instance
	defer func() {
		for _, i := range all {
			err = errors.Join(err, i.stop())
		}
	}()
	for _, p := range b.programs() {
		i, err := p.start(ctx)
		if err != nil {
			return err
		}
		all = append(all, i)
		if err := b.keepWorking(ctx, i); err != nil {
			return err
		}
	}
	return f(all)
}

// keepWorking tries every way once, which also warms it up. The way of the wire is
// left out if it does not work: a child need not know method 0x80.
func (b *bench) keepWorking(ctx context.Context, i *instance) error {
	for n, w := range i.ways {
		err := bounded(ctx, 0, func(ctx context.Context) error {
			_, err := hello(ctx, w)
			return err
		})
		if err != nil && n > 0 && w.column == ChildWire {
			b.note(fmt.Sprintf("dials at the wire are not measured: %v", err))
			i.ways = i.ways[:n]
			return nil
		}
		if err != nil {
			return fmt.Errorf("%s: %w", short(w.column), err)
		}
	}
	return nil
}

// stuckAfter bounds what a figure may take beyond its duration.
const stuckAfter = 30 * time.Second

// bounded runs f, and says so if it is stuck or if ctx has ended.
func bounded(ctx context.Context, d time.Duration, f func(ctx context.Context) error) error {
	ctx, cancel := context.WithTimeoutCause(ctx, d+stuckAfter, fmt.Errorf("it is stuck: %w", context.DeadlineExceeded))
	defer cancel()
	err := f(ctx)
	if err != nil && ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return err
}

// inTurns takes one figure of each way, several rounds of it.
func (b *bench) inTurns(ctx context.Context, what string, ways []turn, take func(ctx context.Context, i *instance, w way) error) error {
	for round := range b.config.Rounds {
		b.config.Progress(fmt.Sprintf("%s, round %d of %d", what, round+1, b.config.Rounds))
		for _, t := range ways {
			err := bounded(ctx, b.config.Duration, func(ctx context.Context) error { return take(ctx, t.instance, t.way) })
			if err != nil {
				return fmt.Errorf("%s: %s: %w", what, short(t.way.column), err)
			}
		}
	}
	return nil
}

// A turn is a way whose turn comes in every round.
type turn struct {
	instance *instance
	way      way
}

// firstWays are those of real use; leaveOut names programs that have no place in a figure.
func firstWays(all []*instance, leaveOut ...string) []turn {
	var turns []turn
	for _, i := range all {
		if !slices.Contains(leaveOut, i.column()) {
			turns = append(turns, turn{i, i.ways[0]})
		}
	}
	return turns
}

func allWays(all []*instance) []turn {
	var turns []turn
	for _, i := range all {
		for _, w := range i.ways {
			turns = append(turns, turn{i, w})
		}
	}
	return turns
}

// bulk moves bytes in one direction over one connection.
func (b *bench) bulk(ctx context.Context) error {
	return b.each(ctx, func(all []*instance) error {
		for _, direction := range []struct {
			name string
			mode byte
			move func(conn net.Conn, buf []byte) (int, error)
		}{
			{"down", modeSource, net.Conn.Read},
			{"up", modeSink, net.Conn.Write},
		} {
			name, title := "bulk."+direction.name, "bulk "+direction.name
			rate := Metric{Name: name, Title: title, Unit: "Gbit/s", HigherIsBetter: true}
			cpu := Metric{Name: name + ".cpu", Title: title + ", CPU", Unit: "s/GB"}
			// The relay of the SOCKS5 server is the bare one.
			err := b.inTurns(ctx, title, firstWays(all, SOCKS5), func(ctx context.Context, i *instance, w way) error {
				m, err := b.stream(ctx, i, w, direction.mode, direction.move)
				if err != nil {
					return err
				}
				b.report.add(rate, w.column, float64(m.count)*8/1e9/m.elapsed.Seconds())
				b.report.add(cpu, w.column, m.cpu/(float64(m.count)/1e9))
				return nil
			})
			if err != nil {
				return err
			}
		}
		return nil
	})
}

// A measurement is what happened within the time of one figure.
type measurement struct {
	count   uint64
	elapsed time.Duration
	cpu     float64 // seconds of the program's CPU; NaN if there is no way to tell, or no program
	caller  float64 // those of this process
}

// measure counts what goes on for the time of one figure, and longer if it takes
// longer for anything to happen at all.
func (b *bench) measure(ctx context.Context, i *instance, count *atomic.Uint64) (measurement, error) {
	cpu, caller := CPUTime(i.pid), callerCPU()
	start, before := time.Now(), count.Load()
	var m measurement
	for m.count == 0 {
		if err := pause(ctx, b.config.Duration); err != nil {
			return m, err
		}
		m.elapsed, m.count = time.Since(start), count.Load()-before
	}
	m.caller = callerCPU() - caller
	m.cpu = CPUTime(i.pid) - cpu
	return m, nil
}

func (b *bench) stream(ctx context.Context, i *instance, w way, mode byte, move func(net.Conn, []byte) (int, error)) (measurement, error) {
	conn, err := open(ctx, w, mode)
	if err != nil {
		return measurement{}, err
	}
	moving, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	defer context.AfterFunc(moving, func() { _ = conn.Close() })()
	var count atomic.Uint64
	var over atomic.Bool
	var worker sync.WaitGroup
	worker.Go(func() {
		buf := make([]byte, bulkBuffer)
		for {
			n, err := move(conn, buf)
			count.Add(uint64(n))
			if err != nil {
				if !over.Load() {
					cancel(fmt.Errorf("the connection broke: %w", err))
				}
				return
			}
		}
	})
	// Windows and buffers grow at first.
	err = pause(moving, min(b.config.Duration/4, 250*time.Millisecond))
	var m measurement
	if err == nil {
		m, err = b.measure(moving, i, &count)
	}
	over.Store(true)
	_ = conn.Close() // with bytes on their way
	worker.Wait()
	if err != nil {
		return m, err
	}
	// What is still on its way is to be gone when the next one has its turn.
	return m, pause(ctx, min(b.config.Duration/10, 100*time.Millisecond))
}

// open opens a connection and tells the far end what to do with it.
func open(ctx context.Context, w way, mode byte) (net.Conn, error) {
	conn, err := w.dial(ctx)
	if err != nil {
		return nil, err
	}
	if _, err := conn.Write([]byte{mode}); err != nil {
		return nil, errors.Join(err, conn.Close())
	}
	return conn, nil
}

// hello opens a connection and waits for a byte of the far end.
func hello(ctx context.Context, w way) (took time.Duration, err error) {
	start := time.Now()
	conn, err := openHello(ctx, w)
	took = time.Since(start)
	if err != nil {
		return took, err
	}
	return took, conn.Close()
}

func openHello(ctx context.Context, w way) (net.Conn, error) {
	conn, err := open(ctx, w, modeHello)
	if err != nil {
		return nil, err
	}
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	var answer [1]byte
	if _, err := io.ReadFull(conn, answer[:]); err != nil {
		return nil, errors.Join(fmt.Errorf("no byte of the far end came back: %w", err), conn.Close())
	}
	return conn, nil
}

// dials opens connections, one at a time and many at once.
func (b *bench) dials(ctx context.Context) error {
	return b.each(ctx, func(all []*instance) error {
		for _, atOnce := range []int{1, 16} {
			name := fmt.Sprintf("dial.%d", atOnce)
			title := fmt.Sprintf("dials, %d at once", atOnce)
			err := b.inTurns(ctx, title, allWays(all), func(ctx context.Context, i *instance, w way) error {
				m, times, err := b.dialMany(ctx, i, w, atOnce)
				if err != nil {
					return err
				}
				b.report.add(Metric{Name: name, Title: title, Unit: "/s", HigherIsBetter: true}, w.column, float64(m.count)/m.elapsed.Seconds())
				b.addTimes(name, title, w.column, times)
				b.report.add(Metric{Name: name + ".cpu", Title: title + ", CPU", Unit: "µs"}, w.column, m.cpu*1e6/float64(m.count))
				b.report.add(Metric{Name: name + ".caller_cpu", Title: title + ", CPU of the caller", Unit: "µs"}, w.column, m.caller*1e6/float64(m.count))
				return nil
			})
			if err != nil {
				return err
			}
		}
		return nil
	})
}

func (b *bench) addTimes(name, title, column string, times []time.Duration) {
	slices.Sort(times)
	for _, p := range []int{50, 99} {
		m := Metric{Name: fmt.Sprintf("%s.p%d", name, p), Title: fmt.Sprintf("%s, p%d", title, p), Unit: "µs"}
		b.report.add(m, column, float64(percentile(times, p).Nanoseconds())/1e3)
	}
}

func (b *bench) dialMany(ctx context.Context, i *instance, w way, atOnce int) (measurement, []time.Duration, error) {
	dialing, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var count atomic.Uint64
	var over atomic.Bool
	var workers sync.WaitGroup
	times := make([][]time.Duration, atOnce)
	for n := range atOnce {
		workers.Go(func() {
			for !over.Load() {
				took, err := hello(dialing, w)
				if err != nil {
					cancel(err)
					return
				}
				times[n] = append(times[n], took)
				count.Add(1)
			}
		})
	}
	m, err := b.measure(dialing, i, &count)
	over.Store(true)
	workers.Wait()
	return m, slices.Concat(times...), err
}

// roundTrips sends single bytes to and fro.
func (b *bench) roundTrips(ctx context.Context) error {
	return b.each(ctx, func(all []*instance) error {
		err := b.roundTripsOf(ctx, "rtt", "round trip", firstWays(all), func(conn net.Conn) (io.ReadWriteCloser, error) { return conn, nil })
		if err != nil || !canBlock {
			return err
		}
		turns := firstWays(all)
		turns = slices.DeleteFunc(turns, func(t turn) bool { return t.way.column == ChildDial })
		for _, t := range allWays(all) {
			if t.way.column == ChildWire {
				turns = append([]turn{t}, turns...)
			}
		}
		return b.roundTripsOf(ctx, "rtt.blocking", "round trip, blocking", turns, blocking)
	})
}

func (b *bench) roundTripsOf(ctx context.Context, name, title string, turns []turn, prepare func(net.Conn) (io.ReadWriteCloser, error)) error {
	return b.inTurns(ctx, title, turns, func(ctx context.Context, i *instance, w way) error {
		m, times, err := b.trips(ctx, i, w, prepare)
		if err != nil {
			return err
		}
		b.addTimes(name, title, w.column, times)
		b.report.add(Metric{Name: name + ".cpu", Title: title + ", CPU", Unit: "µs"}, w.column, m.cpu*1e6/float64(m.count))
		return nil
	})
}

func (b *bench) trips(ctx context.Context, i *instance, w way, prepare func(net.Conn) (io.ReadWriteCloser, error)) (measurement, []time.Duration, error) {
	opened, err := open(ctx, w, modeEcho)
	if err != nil {
		return measurement{}, nil, err
	}
	conn, err := prepare(opened)
	if err != nil {
		return measurement{}, nil, errors.Join(err, opened.Close())
	}
	going, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	// A connection that is stuck must not hold the worker for ever. The deadline does
	// not wake one that waits in the system call itself.
	defer context.AfterFunc(going, func() {
		_ = opened.SetDeadline(time.Unix(1, 0))
		if half, ok := opened.(interface{ CloseRead() error }); ok {
			_ = half.CloseRead()
		}
	})()
	var count atomic.Uint64
	var over atomic.Bool
	var times []time.Duration
	var worker sync.WaitGroup
	worker.Go(func() {
		var buf [1]byte
		for !over.Load() {
			start := time.Now()
			_, err := conn.Write(buf[:])
			if err == nil {
				_, err = io.ReadFull(conn, buf[:])
			}
			if err != nil {
				cancel(fmt.Errorf("the connection broke: %w", err))
				return
			}
			times = append(times, time.Since(start))
			count.Add(1)
		}
	})
	m, err := b.measure(going, i, &count)
	over.Store(true)
	if err != nil {
		cancel(err)
	}
	worker.Wait()
	return m, times, errors.Join(err, conn.Close())
}

// idle holds connections that have carried a byte. Each round has a process of its
// own: memory that earlier connections have left behind would hide what new ones need.
func (b *bench) idle(ctx context.Context) error {
	user := Metric{Name: "idle.user", Title: "idle connection, user memory", Unit: "KB"}
	kern := Metric{Name: "idle.kernel", Title: "idle connection, kernel memory, whole path", Unit: "KB"}
	fds := Metric{Name: "idle.fds", Title: "idle connection, descriptors", Unit: ""}
	for round := range b.config.Rounds {
		b.config.Progress(fmt.Sprintf("%d idle connections, round %d of %d", b.config.Conns, round+1, b.config.Rounds))
		for _, p := range b.programs() {
			i, err := p.start(ctx)
			if err != nil {
				return err
			}
			before, after, err := b.hold(ctx, i)
			if err == nil {
				n := float64(b.config.Conns)
				if i.pid != 0 {
					b.report.add(user, i.column(), (after.user-before.user)/1024/n)
					b.report.add(fds, i.column(), (after.fds-before.fds)/n)
				}
				b.report.add(kern, i.column(), (after.kernel-before.kernel)/1024/n)
			}
			if err = errors.Join(err, i.stop()); err != nil {
				return fmt.Errorf("%s: %w", short(i.column()), err)
			}
		}
	}
	return nil
}

// hold opens the idle connections and closes them again.
func (b *bench) hold(ctx context.Context, i *instance) (before, after memory, err error) {
	conns := make([]net.Conn, 0, b.config.Conns)
	defer func() {
		for _, conn := range conns {
			err = errors.Join(err, conn.Close())
		}
	}()
	err = bounded(ctx, time.Duration(b.config.Conns)*10*time.Millisecond, func(ctx context.Context) error {
		for range 16 {
			if _, err := hello(ctx, i.ways[0]); err != nil {
				return err
			}
		}
		if before, err = settled(ctx, i.pid); err != nil {
			return err
		}
		for len(conns) < b.config.Conns {
			conn, err := openHello(ctx, i.ways[0])
			if err != nil {
				return fmt.Errorf("connection %d: %w", len(conns)+1, err)
			}
			conns = append(conns, conn)
		}
		after, err = settled(ctx, i.pid)
		return err
	})
	return before, after, err
}

// settled waits until a program has come to rest, and measures its memory.
func settled(ctx context.Context, pid int) (memory, error) {
	last := memoryOf(pid)
	for range 20 {
		if err := pause(ctx, 50*time.Millisecond); err != nil {
			return memory{}, err
		}
		now := memoryOf(pid)
		if now.user == last.user && now.fds == last.fds {
			return now, nil
		}
		last = now
	}
	return last, nil
}

// spawnsPerRound is more than one because a start is short.
const spawnsPerRound = 5

// spawns starts programs and stops them again.
func (b *bench) spawns(ctx context.Context) error {
	ready := Metric{Name: "spawn", Title: "spawn to ready", Unit: "ms"}
	for round := range b.config.Rounds {
		b.config.Progress(fmt.Sprintf("spawn to ready, round %d of %d", round+1, b.config.Rounds))
		for range spawnsPerRound {
			for _, p := range b.programs() {
				start := time.Now()
				i, err := p.start(ctx)
				took := time.Since(start)
				if err != nil {
					return err
				}
				if err := i.stop(); err != nil {
					return fmt.Errorf("%s: %w", short(i.column()), err)
				}
				if i.pid != 0 {
					b.report.add(ready, i.column(), took.Seconds()*1e3)
				}
			}
		}
	}
	return nil
}

// CheckGroups says what is wrong with the value of Config.Only.
func CheckGroups(only []string) error {
	for _, name := range only {
		if !slices.Contains(Groups, name) {
			return fmt.Errorf("%q is no measurement; there are %s: %w", name, strings.Join(Groups, ", "), ptipc.ExitUsage)
		}
	}
	return nil
}
