package host

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"

	"pthost/ptipc"
	"pthost/ptipc/testpeer"
)

// farAway is an echo in a process of its own: it has descriptors of its own.
func farAway(t *testing.T) string {
	t.Helper()
	cmd := exec.CommandContext(context.WithoutCancel(t.Context()), os.Args[0], "@child", "far")
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		stdin.Close()
		if err := cmd.Wait(); err != nil {
			t.Error("the far end:", err)
		}
	})
	line, err := bufio.NewReader(stdout).ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(line)
}

// at runs f n times, width at once, and fails the test with the first error.
func at(t *testing.T, width, n int, f func(i int) error) {
	t.Helper()
	next := make(chan int)
	failed := make(chan error, n)
	var all sync.WaitGroup
	for range width {
		all.Go(func() {
			for i := range next {
				if err := f(i); err != nil {
					failed <- err
				}
			}
		})
	}
	for i := range n {
		next <- i
	}
	close(next)
	all.Wait()
	close(failed)
	if err := <-failed; err != nil {
		t.Fatalf("%d failed, the first with: %v", len(failed)+1, err)
	}
}

// A thousand connections at once, twenty times: everything is back where it was.
func TestChurn(t *testing.T) {
	if testing.Short() {
		t.Skip("heavy")
	}
	const width, rounds = 1000, 20
	far := farAway(t)
	c := self("direct")
	events := record(c)
	transport := open(t, c, `{}`, ptipc.Env{})
	pid := strconv.Itoa(last(events.until(t, Ready)).Pid)
	factory := transport.Connections["direct"]
	round := func() {
		at(t, width, width, func(i int) error {
			conn, err := factory.Dial(within(t), nil, far)
			if err != nil {
				return err
			}
			defer conn.Close()
			return exchange(conn, strconv.Itoa(i))
		})
		eventually(t, "all connections are closed", func() bool {
			stats, err := transport.Stats(t.Context())
			return err == nil && stats.Active == 0
		})
	}
	round() // the first one opens what is kept for good: pollers, pipes
	type count struct{ goroutines, ours, its, processes int }
	now := func() count {
		return count{runtime.NumGoroutine(), descriptors(t, "self"), descriptors(t, pid), len(children(t))}
	}
	var base count
	eventually(t, "the child has closed what it had", func() bool { base = now(); return base.its < 100 })
	for range rounds {
		round()
		eventually(t, fmt.Sprintf("%+v", base), func() bool {
			n := now()
			return n.goroutines <= base.goroutines && n.ours <= base.ours && n.its <= base.its && n.processes <= base.processes
		})
	}
	if stats, err := transport.Stats(t.Context()); err != nil || stats.Opened != width*(rounds+1) || stats.Failed != 0 {
		t.Error(stats, err)
	}
}

// Nine thousand idle connections through one child. The limit is 20,000 descriptors
// for each process, and the child needs two for each connection.
func TestIdleConnections(t *testing.T) {
	if testing.Short() {
		t.Skip("heavy")
	}
	n := 9000
	if raced {
		n = 3000
	}
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil || limit.Cur < uint64(2*n+100) {
		testpeer.Skip(t, fmt.Sprintf("a process may have %d descriptors here, and this takes %d; raise ulimit -n", limit.Cur, 2*n+100))
	}
	far := farAway(t)
	c := self("direct")
	c.StopTimeout = 0
	events := record(c)
	transport := open(t, c, `{}`, ptipc.Env{})
	pid := last(events.until(t, Ready)).Pid
	factory := transport.Connections["direct"]
	talk(t, dial(t, factory, "", far), "warm")
	before := memory(t, pid)
	conns := make([]ptipc.Conn, n)
	defer func() {
		for _, conn := range conns {
			if conn != nil {
				conn.Close()
			}
		}
	}()
	at(t, 64, n, func(i int) (err error) {
		conns[i], err = factory.Dial(within(t), nil, far)
		return err
	})
	if stats, err := transport.Stats(t.Context()); err != nil || stats.Active != uint64(n+1) {
		t.Error(stats, err)
	}
	after := memory(t, pid)
	t.Logf("%d idle connections: %.1f KiB of the child's memory and %.2f of its descriptors each",
		n, float64(after-before)/float64(n), float64(descriptors(t, strconv.Itoa(pid)))/float64(n))
	at(t, 64, n, func(i int) error { return exchange(conns[i], "x") })
	if stats, err := transport.Stats(t.Context()); err != nil || stats.Received != uint64(n+4) {
		t.Error(stats, err)
	}
}

// memory is what a process holds of its own, in KiB.
func memory(t *testing.T, pid int) int {
	t.Helper()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(status), "RssAnon:")
	kib, err := strconv.Atoi(strings.Fields(rest)[0])
	if err != nil {
		t.Fatal(err)
	}
	return kib
}
