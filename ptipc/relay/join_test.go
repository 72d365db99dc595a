package relay

import (
	"context"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"pthost/ptipc"
)

// connPair returns both ends of a connection and closes them after the test.
// "plain" is TCP behind a type of which Join knows nothing, "pipe" is a net.Pipe,
// "conn" and "conn-unix" are a *Conn at the first end, "stack" two of them.
func connPair(tb testing.TB, kind string) (near, far net.Conn) {
	tb.Helper()
	var m Meter
	switch kind {
	case "pipe":
		near, far = net.Pipe()
	case "tcp", "unix":
		near, far = socketPair(tb, kind)
	case "plain":
		near, far = socketPair(tb, "tcp")
		near = plain{near.(*net.TCPConn)}
	case "conn":
		near, far = socketPair(tb, "tcp")
		near = m.Conn(near, Options{})
	case "conn-unix":
		near, far = socketPair(tb, "unix")
		near = m.Conn(near, Options{})
	case "stack":
		near, far = socketPair(tb, "tcp")
		near = m.Conn(m.Conn(near, Options{}), Options{})
	default:
		tb.Fatalf("no such kind of connection: %s", kind)
	}
	tb.Cleanup(func() {
		near.Close()
		far.Close()
	})
	return near, far
}

type plain struct{ tcp *net.TCPConn }

func (p plain) Read(b []byte) (int, error)         { return p.tcp.Read(b) }
func (p plain) Write(b []byte) (int, error)        { return p.tcp.Write(b) }
func (p plain) Close() error                       { return p.tcp.Close() }
func (p plain) CloseWrite() error                  { return p.tcp.CloseWrite() }
func (p plain) Abort() error                       { return Abort(p.tcp) }
func (p plain) LocalAddr() net.Addr                { return p.tcp.LocalAddr() }
func (p plain) RemoteAddr() net.Addr               { return p.tcp.RemoteAddr() }
func (p plain) SetDeadline(t time.Time) error      { return p.tcp.SetDeadline(t) }
func (p plain) SetReadDeadline(t time.Time) error  { return p.tcp.SetReadDeadline(t) }
func (p plain) SetWriteDeadline(t time.Time) error { return p.tcp.SetWriteDeadline(t) }

func socketPair(tb testing.TB, network string) (near, far net.Conn) {
	tb.Helper()
	dir := ""
	if network == "unix" {
		dir = shortDir(tb)
	}
	l, err := listen(network, dir)
	if err != nil {
		tb.Fatal(err)
	}
	defer l.Close()
	near, err = net.Dial(network, l.Addr().String())
	if err != nil {
		tb.Fatal(err)
	}
	far, err = l.Accept()
	if err != nil {
		tb.Fatal(err)
	}
	return near, far
}

// shortDir is not t.TempDir, whose name may be too long for a socket.
func shortDir(tb testing.TB) string {
	dir, err := os.MkdirTemp("", "relay") //nolint:usetesting // see above
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// A joined is a running Join with the two outer ends in hand.
type joined struct {
	left, right net.Conn // the outer ends
	a, b        net.Conn // what Join was given
	cancel      context.CancelCauseFunc
	done        chan struct{}
	err         error // valid after done
}

// startJoin relays between a connection of each kind: left <-> Join <-> right.
func startJoin(tb testing.TB, leftKind, rightKind string) *joined {
	tb.Helper()
	a, left := connPair(tb, leftKind)
	b, right := connPair(tb, rightKind)
	ctx, cancel := context.WithCancelCause(tb.Context())
	j := &joined{left: left, right: right, a: a, b: b, cancel: cancel, done: make(chan struct{})}
	go func() {
		defer close(j.done)
		j.err = Join(ctx, a, b)
	}()
	tb.Cleanup(func() {
		cancel(nil)
		<-j.done
	})
	return j
}

func (j *joined) wait() error {
	<-j.done
	return j.err
}

func mustWrite(tb testing.TB, c net.Conn, s string) {
	tb.Helper()
	if _, err := io.WriteString(c, s); err != nil {
		tb.Fatal(err)
	}
}

func mustRead(tb testing.TB, c net.Conn, want string) {
	tb.Helper()
	got := make([]byte, len(want))
	if _, err := io.ReadFull(c, got); err != nil || string(got) != want {
		tb.Fatalf("read %q, %v, want %q", got, err, want)
	}
}

func mustEnd(tb testing.TB, c net.Conn) {
	tb.Helper()
	if n, err := c.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		tb.Fatalf("read %d bytes, %v, want the end of the stream", n, err)
	}
}

func mustCloseWrite(tb testing.TB, c net.Conn) {
	tb.Helper()
	if err := c.(closeWriter).CloseWrite(); err != nil {
		tb.Fatal(err)
	}
}

func isReset(err error) bool { return errors.Is(err, syscall.ECONNRESET) }

// eventually waits for something that happens on another goroutine or thread.
func eventually(tb testing.TB, what string, cond func() bool) {
	tb.Helper()
	for start := time.Now(); !cond(); runtime.Gosched() {
		if time.Since(start) > 30*time.Second {
			tb.Fatalf("never: %s", what)
		}
	}
}

// kinds are the pairs of connections that Join is tried with.
var kinds = [][2]string{
	{"tcp", "tcp"},
	{"tcp", "unix"},
	{"unix", "tcp"},
	{"unix", "unix"},
	{"conn", "conn-unix"},
	{"stack", "tcp"},
	{"plain", "tcp"},
	{"unix", "plain"},
	{"plain", "conn"},
}

func forKinds(t *testing.T, f func(t *testing.T, left, right string)) {
	for _, k := range kinds {
		t.Run(k[0]+" to "+k[1], func(t *testing.T) { f(t, k[0], k[1]) })
	}
}

// A source is a stream of random bytes that are the same for the same seed.
func source(seed uint64, size int64) io.Reader {
	return io.LimitReader(rand.NewChaCha8([32]byte{byte(seed)}), size)
}

func TestJoinBothDirectionsAtOnce(t *testing.T) {
	const size = 100 << 20
	forKinds(t, func(t *testing.T, left, right string) {
		j := startJoin(t, left, right)
		var wg sync.WaitGroup
		for i, c := range []net.Conn{j.left, j.right} {
			sum := crc32.NewIEEE()
			wg.Go(func() {
				if _, err := io.Copy(struct{ io.Writer }{c}, io.TeeReader(source(uint64(i), size), sum)); err != nil {
					t.Errorf("write: %v", err)
				}
				mustCloseWrite(t, c)
			})
			other := j.right
			if i == 1 {
				other = j.left
			}
			wg.Go(func() {
				got := crc32.NewIEEE()
				n, err := io.Copy(got, other)
				if n != size || err != nil {
					t.Errorf("read %d bytes, %v, want %d", n, err, size)
				}
				if want := crcOf(source(uint64(i), size)); got.Sum32() != want {
					t.Errorf("checksum %08x, want %08x", got.Sum32(), want)
				}
			})
		}
		wg.Wait()
		if err := j.wait(); err != nil {
			t.Errorf("Join: %v", err)
		}
		for _, c := range []net.Conn{j.a, j.b} {
			if c, ok := c.(*Conn); ok {
				if s := c.Stats(); s.Received != size || s.Sent != size {
					t.Errorf("%+v, want %d in each direction", s, size)
				}
			}
		}
	})
}

func crcOf(r io.Reader) uint32 {
	sum := crc32.NewIEEE()
	_, _ = io.Copy(sum, r)
	return sum.Sum32()
}

// All sizes of writes, among them those around the sizes of the buffers.
func TestJoinEverySize(t *testing.T) {
	forKinds(t, func(t *testing.T, left, right string) {
		j := startJoin(t, left, right)
		for _, size := range []int{1, 2, idleSize - 1, idleSize, idleSize + 1, someSize + idleSize, 16<<10 - 1, 16 << 10, 16<<10 + 1, bulkSize, bulkSize + 1, 100_000, 1, 1 << 20, 3} {
			go func() { _, _ = io.Copy(j.left, source(1, int64(size))) }()
			got := crc32.NewIEEE()
			if n, err := io.CopyN(got, j.right, int64(size)); err != nil {
				t.Fatalf("of %d bytes came %d: %v", size, n, err)
			}
			if got.Sum32() != crcOf(source(1, int64(size))) {
				t.Fatalf("%d bytes were changed on the way", size)
			}
			mustWrite(t, j.right, "next")
			mustRead(t, j.left, "next")
		}
	})
}

func TestJoinHalfClose(t *testing.T) {
	forKinds(t, func(t *testing.T, left, right string) {
		for _, first := range []string{"left", "right"} {
			t.Run(first+" ends first", func(t *testing.T) {
				j := startJoin(t, left, right)
				asks, answers := j.left, j.right
				if first == "right" {
					asks, answers = answers, asks
				}
				mustWrite(t, asks, "question")
				mustCloseWrite(t, asks)
				mustRead(t, answers, "question")
				mustEnd(t, answers)
				const size = 3 << 20
				go func() {
					_, _ = io.Copy(answers, source(2, size))
					_ = answers.(closeWriter).CloseWrite()
				}()
				got := crc32.NewIEEE()
				n, err := io.Copy(got, asks)
				if n != size || err != nil || got.Sum32() != crcOf(source(2, size)) {
					t.Errorf("the answer has %d bytes, %v; want %d unchanged", n, err, size)
				}
				if err := j.wait(); err != nil {
					t.Errorf("Join: %v", err)
				}
			})
		}
	})
}

// A side without CloseWrite is closed last: its answer is still on the way.
func TestJoinWithoutCloseWrite(t *testing.T) {
	for _, wrap := range []bool{false, true} {
		t.Run(fmt.Sprintf("in a Conn: %v", wrap), func(t *testing.T) {
			a, left := connPair(t, "tcp")
			b, right := connPair(t, "pipe")
			if wrap {
				var m Meter
				b = m.Conn(b, Options{})
			}
			done := make(chan error, 1)
			go func() { done <- Join(t.Context(), a, b) }()
			mustWrite(t, left, "question")
			mustCloseWrite(t, left)
			mustRead(t, right, "question")
			mustWrite(t, right, "answer")
			mustRead(t, left, "answer")
			right.Close()
			mustEnd(t, left)
			if err := <-done; err != nil {
				t.Errorf("Join: %v", err)
			}
		})
	}
}

// A stream that was cut must not look like one that has ended.
func TestJoinPassesResetOn(t *testing.T) {
	for _, k := range kinds {
		near, far := k[0], k[1]
		if strings.Contains(near, "unix") || strings.Contains(far, "unix") {
			continue // knows no reset: see TestJoinUnixHangUp
		}
		for _, idle := range []bool{true, false} {
			t.Run(fmt.Sprintf("%s to %s, idle: %v", near, far, idle), func(t *testing.T) {
				j := startJoin(t, near, far)
				mustWrite(t, j.right, "part")
				mustRead(t, j.left, "part")
				if !idle { // the other direction is full of bytes that nobody takes
					fill(t, j.left)
				}
				if err := j.right.(*net.TCPConn).SetLinger(0); err != nil {
					t.Fatal(err)
				}
				j.right.Close()
				if _, err := io.Copy(io.Discard, j.left); !isReset(err) {
					t.Errorf("the other side reads %v, want a reset", err)
				}
				if err := j.wait(); !isReset(err) {
					t.Errorf("Join: %v, want a reset", err)
				}
			})
		}
	}
}

// fill writes until the other side has taken nothing for a while.
func fill(tb testing.TB, c net.Conn) (n int64) {
	tb.Helper()
	buf := make([]byte, 64<<10)
	for {
		if err := c.SetWriteDeadline(time.Now().Add(200 * time.Millisecond)); err != nil {
			tb.Fatal(err)
		}
		m, err := c.Write(buf)
		n += int64(m)
		if errors.Is(err, os.ErrDeadlineExceeded) {
			break
		}
		if err != nil {
			tb.Fatal(err)
		}
		if n > 1<<30 {
			tb.Fatal("a gigabyte went into a relay whose other side does not read")
		}
	}
	if err := c.SetWriteDeadline(time.Time{}); err != nil {
		tb.Fatal(err)
	}
	return n
}

func TestJoinBackpressure(t *testing.T) {
	// The kernel's socket buffers take most of it, two on each side. They grow to
	// some 10 MB each; the relay adds a pipe or a buffer.
	const limit = 100 << 20
	forKinds(t, func(t *testing.T, left, right string) {
		j := startJoin(t, left, right)
		n := fill(t, j.left)
		if n > limit {
			t.Errorf("%d bytes went in while nobody read, want at most %d", n, limit)
		}
		mustWrite(t, j.right, "the other direction is free")
		mustRead(t, j.left, "the other direction is free")
		mustCloseWrite(t, j.left)
		mustCloseWrite(t, j.right)
		if got, err := io.Copy(io.Discard, j.right); got != n || err != nil {
			t.Errorf("%d bytes came out, %v, want %d", got, err, n)
		}
		if err := j.wait(); err != nil {
			t.Errorf("Join: %v", err)
		}
	})
}

func TestJoinContext(t *testing.T) {
	forKinds(t, func(t *testing.T, left, right string) {
		t.Run("in mid-transfer", func(t *testing.T) {
			j := startJoin(t, left, right)
			fill(t, j.left)
			why := errors.New("enough")
			j.cancel(why)
			if err := j.wait(); !errors.Is(err, why) {
				t.Errorf("Join: %v, want %v", err, why)
			}
			for _, c := range []net.Conn{j.left, j.right} {
				_, err := io.Copy(io.Discard, c)
				if _, tcp := c.(*net.TCPConn); tcp && !isReset(err) {
					t.Errorf("an outer end reads %v, want a reset", err)
				}
			}
		})
		t.Run("before", func(t *testing.T) {
			a, l := connPair(t, left)
			b, _ := connPair(t, right)
			ctx, cancel := context.WithCancel(t.Context())
			cancel()
			if err := Join(ctx, a, b); !errors.Is(err, context.Canceled) {
				t.Errorf("Join: %v, want %v", err, context.Canceled)
			}
			if _, err := l.Read(make([]byte, 1)); err == nil {
				t.Error("the connection is still open")
			}
		})
	})
}

// The answer comes early and the upload is cut off: the answer gets through.
func TestJoinEarlyClose(t *testing.T) {
	forKinds(t, func(t *testing.T, left, right string) {
		j := startJoin(t, left, right)
		mustWrite(t, j.left, "a long upload begins")
		mustRead(t, j.right, "a long upload begins")
		mustWrite(t, j.right, "too large")
		j.right.Close()
		mustRead(t, j.left, "too large")
		// Sooner or later a write fails, and neither side waits for ever.
		buf := make([]byte, 64<<10)
		for {
			if _, err := j.left.Write(buf); err != nil {
				break
			}
		}
		<-j.done
	})
}

func TestJoinCountsLive(t *testing.T) {
	for _, kind := range []string{"tcp", "unix", "plain", "pipe"} {
		t.Run(kind, func(t *testing.T) {
			var outer, inner Meter
			raw, left := connPair(t, kind)
			in := inner.Conn(raw, Options{})
			c := outer.Conn(in, Options{})
			b, right := connPair(t, "tcp")
			ctx, cancel := context.WithCancel(t.Context())
			done := make(chan error, 1)
			go func() { done <- Join(ctx, c, b) }()
			const size = 300_000
			go func() { _, _ = io.Copy(left, source(3, size)) }()
			if _, err := io.CopyN(io.Discard, right, size); err != nil {
				t.Fatal(err)
			}
			mustWrite(t, right, "answer")
			mustRead(t, left, "answer")
			want := ptipc.TransportStats{Active: 1, Opened: 1, Received: size, Sent: 6}
			for _, m := range []*Meter{&outer, &inner} {
				eventually(t, "the counts of an open connection are right", func() bool { return m.Stats() == want })
			}
			if in.RemoteAddr() == nil || c.LocalAddr() == nil {
				t.Error("a connection that is joined has lost its addresses")
			}
			cancel()
			<-done
			want.Active = 0
			for _, m := range []*Meter{&outer, &inner} {
				if got := m.Stats(); got != want {
					t.Errorf("afterwards: %+v, want %+v", got, want)
				}
			}
		})
	}
}

func TestJoinEndsWhenAConnIsClosed(t *testing.T) {
	for _, kind := range []string{"tcp", "unix", "plain", "pipe"} {
		for _, position := range []int{0, 1} {
			t.Run(fmt.Sprintf("%s, position %d", kind, position), func(t *testing.T) {
				var m Meter
				raw, outer := connPair(t, kind)
				conns := []net.Conn{nil, nil}
				b, other := connPair(t, "tcp")
				conns[position], conns[1-position] = m.Conn(m.Conn(raw, Options{}), Options{}), b
				done := make(chan error, 1)
				go func() { done <- Join(t.Context(), conns[0], conns[1]) }()
				go func() { _, _ = io.WriteString(outer, "hello") }()
				mustRead(t, other, "hello")
				ctx, cancel := context.WithCancel(t.Context())
				cancel()
				_ = m.Drain(ctx)
				if err := <-done; err == nil {
					t.Error("Join: nil, want an error")
				}
				if _, err := other.Read(make([]byte, 1)); !isReset(err) {
					t.Errorf("the other side reads %v, want a reset", err)
				}
				if _, err := outer.Read(make([]byte, 1)); err == nil {
					t.Error("the closed side is still open")
				}
			})
		}
	}
}

// The flip types stand for conns that encrypt: the bytes on the wire are not
// those of Read and Write. What they embed brings ReadFrom, WriteTo, SyscallConn
// and the like along.
type (
	flipTCP  struct{ *net.TCPConn }
	flipUnix struct{ *net.UnixConn }
	flipConn struct{ *Conn }
)

func (f flipTCP) Read(p []byte) (int, error)   { return flipRead(f.TCPConn, p) }
func (f flipTCP) Write(p []byte) (int, error)  { return flipWrite(f.TCPConn, p) }
func (f flipUnix) Read(p []byte) (int, error)  { return flipRead(f.UnixConn, p) }
func (f flipUnix) Write(p []byte) (int, error) { return flipWrite(f.UnixConn, p) }
func (f flipConn) Read(p []byte) (int, error)  { return flipRead(f.Conn, p) }
func (f flipConn) Write(p []byte) (int, error) { return flipWrite(f.Conn, p) }

func flipRead(c net.Conn, p []byte) (int, error) {
	n, err := c.Read(p)
	for i := range p[:n] {
		p[i] ^= 0xff
	}
	return n, err
}

func flipWrite(c net.Conn, p []byte) (int, error) {
	flipped := make([]byte, len(p))
	for i := range p {
		flipped[i] = p[i] ^ 0xff
	}
	return c.Write(flipped)
}

func TestJoinNeverBypassesReadAndWrite(t *testing.T) {
	wraps := map[string]func(t *testing.T) (c, outer net.Conn){
		"embedded TCP": func(t *testing.T) (net.Conn, net.Conn) {
			near, far := connPair(t, "tcp")
			return flipTCP{near.(*net.TCPConn)}, far
		},
		"embedded unix": func(t *testing.T) (net.Conn, net.Conn) {
			near, far := connPair(t, "unix")
			return flipUnix{near.(*net.UnixConn)}, far
		},
		"embedded Conn": func(t *testing.T) (net.Conn, net.Conn) {
			near, far := connPair(t, "conn")
			return flipConn{near.(*Conn)}, far
		},
		"Conn around embedded TCP": func(t *testing.T) (net.Conn, net.Conn) {
			var m Meter
			near, far := connPair(t, "tcp")
			return m.Conn(flipTCP{near.(*net.TCPConn)}, Options{}), far
		},
		"Conn around embedded Conn": func(t *testing.T) (net.Conn, net.Conn) {
			var m Meter
			near, far := connPair(t, "conn")
			return m.Conn(flipConn{near.(*Conn)}, Options{}), far
		},
	}
	for name, wrap := range wraps {
		for _, position := range []int{0, 1} {
			t.Run(fmt.Sprintf("%s, position %d", name, position), func(t *testing.T) {
				a, secret := wrap(t)
				b, clear := connPair(t, "tcp")
				conns := [2]net.Conn{}
				conns[position], conns[1-position] = a, b
				done := make(chan error, 1)
				go func() { done <- Join(t.Context(), conns[0], conns[1]) }()
				const size = 200_000 // splicing would have begun
				go func() {
					_, _ = io.Copy(clear, source(4, size))
					_ = clear.(closeWriter).CloseWrite()
				}()
				got, err := io.ReadAll(flipTo{secret})
				if err != nil || len(got) != size || crc32.ChecksumIEEE(got) != crcOf(source(4, size)) {
					t.Errorf("to the wrapped side: %d bytes, %v: not what its Write makes of them", len(got), err)
				}
				go func() {
					_, _ = io.Copy(flipTo{secret}, source(5, size))
					_ = secret.(closeWriter).CloseWrite()
				}()
				got, err = io.ReadAll(clear)
				if err != nil || len(got) != size || crc32.ChecksumIEEE(got) != crcOf(source(5, size)) {
					t.Errorf("from the wrapped side: %d bytes, %v: not what its Read makes of them", len(got), err)
				}
				if err := <-done; err != nil {
					t.Errorf("Join: %v", err)
				}
			})
		}
	}
}

// flipTo is the peer that decrypts.
type flipTo struct{ net.Conn }

func (f flipTo) Read(p []byte) (int, error)  { return flipRead(f.Conn, p) }
func (f flipTo) Write(p []byte) (int, error) { return flipWrite(f.Conn, p) }

func TestJoinRefusesMessages(t *testing.T) {
	dir := shortDir(t)
	l, err := net.Listen("unixpacket", dir+"/s")
	if err != nil {
		t.Skipf("this system has no unixpacket: %v", err)
	}
	defer l.Close()
	a, err := net.Dial("unixpacket", dir+"/s")
	if err != nil {
		t.Fatal(err)
	}
	b, right := connPair(t, "tcp")
	if err := Join(t.Context(), a, b); !errors.Is(err, errors.ErrUnsupported) {
		t.Errorf("Join: %v, want ErrUnsupported", err)
	}
	if _, err := right.Read(make([]byte, 1)); err == nil {
		t.Error("the other side is still open")
	}
}

// A failing conn must not look like one that has ended, whatever its error.
func TestJoinReadError(t *testing.T) {
	broken := errors.New("bad record")
	near, _ := connPair(t, "tcp")
	b, right := connPair(t, "tcp")
	if err := Join(t.Context(), failing{near, broken}, b); !errors.Is(err, broken) {
		t.Errorf("Join: %v, want %v", err, broken)
	}
	if _, err := right.Read(make([]byte, 1)); !isReset(err) {
		t.Errorf("the other side reads %v, want a reset", err)
	}
}

type failing struct {
	net.Conn
	err error
}

func (f failing) Read([]byte) (int, error) { return 0, f.err }

// One flow that is always ready must not keep others waiting.
func TestJoinIsFair(t *testing.T) {
	bulk := startJoin(t, "tcp", "tcp")
	stop := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		buf := make([]byte, 1<<20)
		for {
			select {
			case <-stop:
				mustCloseWrite(t, bulk.left)
				return
			default:
				if _, err := bulk.left.Write(buf); err != nil {
					t.Errorf("bulk: %v", err)
					return
				}
			}
		}
	})
	wg.Go(func() { _, _ = io.Copy(io.Discard, bulk.right) })
	for range 4 { // some of them share a thread with the bulk
		small := startJoin(t, "tcp", "unix")
		for range 100 {
			mustWrite(t, small.left, "ping")
			mustRead(t, small.right, "ping")
			mustWrite(t, small.right, "pong")
			mustRead(t, small.left, "pong")
		}
	}
	close(stop)
	wg.Wait()
}
