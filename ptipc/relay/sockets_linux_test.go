package relay

import (
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"runtime"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

func descriptors(tb testing.TB) int {
	tb.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		tb.Fatal(err)
	}
	return len(entries)
}

// openLoops makes what loops keep for good, so that it is not taken for left behind.
func openLoops(tb testing.TB) {
	tb.Helper()
	for i := range loops {
		l := &loops[i]
		l.mu.Lock()
		ok := l.epfd != 0 || l.open()
		l.mu.Unlock()
		if !ok {
			tb.Fatal("the system is short of something")
		}
	}
}

func TestJoinLeavesNothingBehind(t *testing.T) {
	const pairs = 300
	openLoops(t)
	for _, k := range [][2]string{{"tcp", "tcp"}, {"unix", "tcp"}, {"plain", "unix"}} {
		t.Run(k[0]+" to "+k[1], func(t *testing.T) {
			fds, goroutines := descriptors(t), runtime.NumGoroutine()
			t.Run("", func(t *testing.T) { // its clean-up closes the outer ends
				all := make([]*joined, pairs)
				for i := range all {
					all[i] = startJoin(t, k[0], k[1])
				}
				for _, j := range all {
					mustWrite(t, j.left, "ping")
					mustRead(t, j.right, "ping")
				}
				if n := descriptors(t) - fds; k[0] != "plain" && n > 4*pairs+100 {
					t.Errorf("%d descriptors for %d idle pairs, want four for each", n, pairs)
				}
				for i, j := range all {
					if i%2 == 0 {
						j.cancel(nil)
						continue
					}
					mustCloseWrite(t, j.left)
					mustCloseWrite(t, j.right)
				}
				for i, j := range all {
					if err := j.wait(); (err == nil) != (i%2 == 1) {
						t.Fatalf("Join: %v", err)
					}
				}
			})
			eventually(t, "the goroutines end", func() bool { return runtime.NumGoroutine() <= goroutines })
			eventually(t, "the descriptors are closed", func() bool { return descriptors(t) <= fds })
		})
	}
}

// noMoreDescriptors makes every call that needs a descriptor fail until undo.
func noMoreDescriptors(tb testing.TB) (undo func()) {
	tb.Helper()
	var old unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &old); err != nil {
		tb.Fatal(err)
	}
	fd, err := unix.Dup(0) // the lowest that is free
	if err != nil {
		tb.Fatal(err)
	}
	unix.Close(fd)
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: uint64(fd), Max: old.Max}); err != nil {
		tb.Fatal(err)
	}
	undo = sync.OnceFunc(func() {
		if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &old); err != nil {
			tb.Error(err)
		}
	})
	tb.Cleanup(undo)
	if fd, err := unix.Dup(0); !errors.Is(err, unix.EMFILE) {
		tb.Fatalf("dup = %d, %v, want EMFILE", fd, err)
	}
	return undo
}

func TestJoinShortOfDescriptors(t *testing.T) {
	const size = 8 << 20
	check := func(t *testing.T, left, right net.Conn, undo func()) {
		go func() {
			_, _ = io.Copy(struct{ io.Writer }{left}, source(6, size)) // io.Copy itself would take a pipe
			_ = left.(closeWriter).CloseWrite()
		}()
		got, err := io.ReadAll(right)
		undo()
		if err != nil || len(got) != size {
			t.Errorf("%d bytes came, %v, want %d", len(got), err, size)
		}
	}
	t.Run("for a pipe", func(t *testing.T) {
		j := startJoin(t, "tcp", "unix")
		mustWrite(t, j.left, "the relay runs")
		mustRead(t, j.right, "the relay runs")
		check(t, j.left, j.right, noMoreDescriptors(t))
		mustCloseWrite(t, j.right)
		if err := j.wait(); err != nil {
			t.Errorf("Join: %v", err)
		}
	})
	t.Run("for the sockets", func(t *testing.T) {
		a, left := connPair(t, "tcp")
		b, right := connPair(t, "unix")
		undo := noMoreDescriptors(t)
		done := make(chan error, 1)
		go func() { done <- Join(context.Background(), a, b) }()
		check(t, left, right, undo)
		mustCloseWrite(t, right)
		if err := <-done; err != nil {
			t.Errorf("Join: %v", err)
		}
	})
}

// Peers that stall in the middle of bulk cannot use up the descriptors.
func TestJoinBoundsPipes(t *testing.T) {
	stalled := 2*maxPipes*len(loops) + 10
	openLoops(t)
	fds := descriptors(t)
	var wg sync.WaitGroup
	all := make([]*joined, stalled)
	for i := range all {
		j := startJoin(t, "unix", "unix")
		all[i] = j
		wg.Go(func() { _, _ = io.Copy(struct{ io.Writer }{j.left}, source(7, 2<<20)) })
	}
	// Bytes that have arrived at the last show that the loop has had its turn.
	for _, j := range all {
		if _, err := io.CopyN(io.Discard, j.right, 1<<20); err != nil {
			t.Fatal(err)
		}
	}
	if n := descriptors(t) - fds - 4*stalled; n > (2*(maxPipes+idlePipes)+2)*len(loops) {
		t.Errorf("%d descriptors beyond the sockets of %d stalled pairs", n, stalled)
	}
	for _, j := range all {
		if _, err := io.CopyN(io.Discard, j.right, 1<<20); err != nil {
			t.Fatal(err)
		}
	}
	wg.Wait()
}

func TestJoinGivesFullPipesBack(t *testing.T) {
	idle := make([]*joined, len(loops)) // keep the loops running
	for i := range idle {
		idle[i] = startJoin(t, "unix", "unix")
		mustWrite(t, idle[i].left, "the relay runs")
		mustRead(t, idle[i].right, "the relay runs")
	}
	openLoops(t)
	fds := descriptors(t)
	t.Run("", func(t *testing.T) {
		for range 2 * idlePipes * len(loops) {
			j := startJoin(t, "unix", "unix")
			fill(t, j.left)
			j.cancel(nil)
			_ = j.wait() // it is cut
		}
	})
	if n := descriptors(t) - fds; n > 2*idlePipes*len(loops) {
		t.Errorf("%d descriptors are left, want at most the %d idle pipes of each loop", n, idlePipes)
	}
}

// A flow that never runs dry gives way after some rounds.
func TestLoopBudget(t *testing.T) {
	var l loop
	if !l.open() {
		t.Fatal("the system is short of something")
	}
	l.scratch = new([chunk]byte)
	defer func() { unix.Close(l.epfd); unix.Close(l.wake) }()
	p := new(pair)
	var outer [2]int
	for i := range outer {
		fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Close(fds[0])
		defer unix.Close(fds[1])
		outer[i], p.legs[i].fd = fds[0], fds[1]
	}
	f := &p.flows[0]
	f.readable, f.copies = true, true
	const size = (rounds + 1) * chunk
	if n, err := unix.Write(outer[0], make([]byte, size)); n != size || err != nil {
		t.Fatalf("write = %d, %v", n, err)
	}
	for turn, want := range []int{rounds * chunk, chunk} {
		if more := l.pump(p); more != (turn == 0) || p.failed != nil {
			t.Errorf("turn %d: pump = %v, %v", turn, more, p.failed)
		}
		if n, err := unix.Read(outer[1], make([]byte, size)); n != want || err != nil {
			t.Errorf("turn %d moved %d bytes, %v, want %d", turn, n, err, want)
		}
	}
}

// A unix socket says that its peer has gone before anything is written: the
// other side need not wait for its own next byte to learn of it.
func TestJoinUnixHangUp(t *testing.T) {
	j := startJoin(t, "tcp", "unix")
	mustWrite(t, j.right, "last words")
	j.right.Close()
	mustRead(t, j.left, "last words")
	mustEnd(t, j.left)
	if err := j.wait(); err != nil {
		t.Errorf("Join: %v", err)
	}
}

// Ends from every side at once.
func TestJoinRaces(t *testing.T) {
	for i := range 300 {
		var m Meter
		kind := []string{"tcp", "unix"}[i%2]
		a, left := connPair(t, kind)
		b, right := connPair(t, "tcp")
		c := m.Conn(a, Options{})
		ctx, cancel := context.WithCancel(t.Context())
		ends := []func(){
			cancel,
			func() { c.Close() },
			func() { _ = c.Abort() },
			func() { left.Close() },
			func() { right.Close() },
			func() { _, _ = left.Write(make([]byte, 100_000)) },
			func() { _, _ = right.Write(make([]byte, 100_000)) },
		}
		rand.Shuffle(len(ends), func(i, j int) { ends[i], ends[j] = ends[j], ends[i] })
		var wg sync.WaitGroup
		wg.Go(func() { _ = Join(ctx, c, b) })
		for _, end := range ends {
			wg.Go(end)
		}
		wg.Wait()
		if s := m.Stats(); s.Active != 0 {
			t.Fatalf("round %d: %+v, want none active", i, s)
		}
		if total, own := m.Stats(), c.Stats(); total.Received != own.Received || total.Sent != own.Sent {
			t.Fatalf("round %d: the total is %+v, the connection has counted %+v", i, total, own)
		}
	}
}

// A loop begins in the Join of its first pair, and must outlive it.
func TestLoopOutlivesItsFirstPair(t *testing.T) {
	all := make([]*joined, 2*len(loops))
	for i := range all {
		all[i] = startJoin(t, "unix", "tcp")
		mustWrite(t, all[i].left, "ping") // one after the other, so that the first is known
		mustRead(t, all[i].right, "ping")
	}
	for i, j := range all {
		mustCloseWrite(t, j.left)
		mustCloseWrite(t, j.right)
		if err := j.wait(); err != nil {
			t.Fatalf("Join: %v", err)
		}
		for _, other := range all[i+1:] {
			mustWrite(t, other.right, "pong")
			mustRead(t, other.left, "pong")
		}
	}
}

// A loop learns of every cut, however many there have been in its life: one pair keeps
// it alive while others come and are cut one after the other, with no other event.
func TestLoopNeverLosesACut(t *testing.T) {
	const cuts = 600
	anchors := make([]*joined, len(loops))
	for i := range anchors {
		anchors[i] = startJoin(t, "unix", "unix")
	}
	for range cuts {
		j := startJoin(t, "unix", "unix")
		mustWrite(t, j.left, "ping")
		mustRead(t, j.right, "ping")
		j.cancel(nil)
		if err := j.wait(); err == nil {
			t.Fatal("a cut Join ended as if it were whole")
		}
	}
	for _, anchor := range anchors {
		mustWrite(t, anchor.left, "ping")
		mustRead(t, anchor.right, "ping")
	}
}
