package free

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"pthost/ptipc"
	"pthost/ptipc/relay"
)

// muxed opens a client of many streams over carriers that f makes, and says how many
// it has made.
func muxed(t testing.TB, f func(settings ptipc.Opaque) (net.Conn, error)) (transport *ptipc.Transport, carriers *atomic.Int32) {
	t.Helper()
	carriers = new(atomic.Int32)
	meter := new(relay.Meter)
	inner := meter.Transport(map[string]ptipc.ConnectionFactory{
		"plain": meter.Factory(true, func(_ context.Context, settings ptipc.Opaque, _ string) (net.Conn, error) {
			carriers.Add(1)
			return f(settings)
		}),
	}, nil)
	transport, err := Mux(func(context.Context, ptipc.Opaque, ptipc.Env) (*ptipc.Transport, error) { return inner, nil })(t.Context(), nil, ptipc.Env{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { transport.Close() })
	return transport, carriers
}

// served is muxed with a server at the other end of the carriers, whose ends the
// client has are in dialled.
func served(t testing.TB, network string, dial dialFunc) (transport *ptipc.Transport, s *server, dialled chan net.Conn, carriers *atomic.Int32) {
	t.Helper()
	s, open := startServer(t, network, drainTimeout, dial)
	dialled = make(chan net.Conn, 2*manyCarriers)
	transport, carriers = muxed(t, func(ptipc.Opaque) (net.Conn, error) {
		c := open()
		if c == nil {
			return nil, errors.New("no carrier")
		}
		_ = c.SetDeadline(time.Time{})
		dialled <- c
		return c, nil
	})
	return transport, s, dialled, carriers
}

// anywhere dials what is not looked at: the far ends are in ends.
func anywhere(t testing.TB, network string) (dial dialFunc, ends chan net.Conn) {
	ends = make(chan net.Conn, 2*maxPerCarrier)
	return func(context.Context, string, string) (net.Conn, error) {
		near, far := connected(t, network)
		ends <- far
		return near, nil
	}, ends
}

// FREE-15, FREE-23: streams with the same settings share carriers, others do not.
func TestMuxShares(t *testing.T) {
	dial, ends := anywhere(t, "tcp")
	transport, s, _, carriers := served(t, "tcp", dial)
	open := func(settings string, n int) {
		for range n {
			conn, err := transport.Connections["plain"].Dial(t.Context(), ptipc.Opaque(settings), "a.example:1")
			if err != nil {
				t.Fatal(err)
			}
			far := <-ends
			mustWrite(t, conn, []byte("x"))
			readExactly(t, far, 1)
			t.Cleanup(func() { conn.Close(); far.Close() })
		}
	}
	open(`{"a":1}`, fewStreams)
	if n := carriers.Load(); n != 1 {
		t.Errorf("%d streams have %d carriers, want 1", fewStreams, n)
	}
	open(`{"a":2}`, 1)
	open("", 1)
	if n := carriers.Load(); n != 3 {
		t.Errorf("three kinds of settings have %d carriers, want 3", n)
	}
	open(`{"a":1}`, 1)
	if n := carriers.Load(); n != 4 {
		t.Errorf("one stream more than %d left %d carriers, want 4", fewStreams, n)
	}
	open(`{"a":1}`, (manyCarriers+2)*fewStreams)
	if n := carriers.Load(); n != manyCarriers+2 {
		t.Errorf("there are %d carriers, want %d", n, manyCarriers+2)
	}
	if got, want := s.Stats().Active, must(transport.Stats(t.Context())).Active; got != want || want < manyCarriers*fewStreams {
		t.Errorf("%d streams at the server, %d at the client", got, want)
	}
}

// A carrier that moves bulk gets no further streams.
func TestMuxAvoidsBulk(t *testing.T) {
	dial, ends := anywhere(t, "tcp")
	transport, _, _, carriers := served(t, "tcp", dial)
	bulk := dialPlain(t, transport, "a.example:1")
	far := <-ends
	go func() {
		b := make([]byte, 64<<10)
		for {
			if _, err := bulk.Write(b); err != nil {
				return
			}
		}
	}()
	readExactly(t, far, 2*bulkBytes)
	other := dialPlain(t, transport, "a.example:1")
	defer other.Close()
	defer (<-ends).Close()
	if n := carriers.Load(); n != 2 {
		t.Errorf("there are %d carriers, want 2", n)
	}
	far.Close()
	bulk.Close()
}

// FREE-16: a far end that knows version 1 alone is asked once, and then served its way.
func TestMuxOldServer(t *testing.T) {
	var greetings atomic.Int32
	transport, carriers := muxed(t, func(ptipc.Opaque) (net.Conn, error) {
		near, far := connected(t, "tcp")
		go func() {
			var first [prefixSize]byte
			if _, err := io.ReadFull(far, first[:]); err != nil {
				return
			}
			if first[0] != version {
				greetings.Add(1)
				_, _ = far.Write([]byte{version, byte(ptipc.ErrCommand)})
				_ = far.(*net.TCPConn).CloseWrite()
				_, _ = io.Copy(io.Discard, far)
				far.Close()
				return
			}
			_, _ = io.CopyN(io.Discard, far, int64(first[2]))
			_, _ = far.Write([]byte{version, 0, 'x'})
		}()
		return near, nil
	})
	for range 3 {
		readExactly(t, dialPlain(t, transport, "a.example:1"), 1)
	}
	if greetings.Load() != 1 || carriers.Load() != 4 {
		t.Errorf("%d greetings on %d carriers, want 1 on 4", greetings.Load(), carriers.Load())
	}
}

// FREE-16: what else a far end can answer is the error of the streams.
func TestMuxRefused(t *testing.T) {
	for _, c := range []struct {
		answer []byte
		class  ptipc.Class
	}{
		{[]byte{versionMany, 2}, ptipc.ErrNotAllowed},
		{[]byte{version, 2}, ptipc.ErrNotAllowed},
		{[]byte{versionMany, 0x99}, ptipc.ErrGeneral},
		{[]byte{version, 0}, ptipc.ErrGeneral},
		{[]byte{5, 0}, ptipc.ErrGeneral},
		{nil, ptipc.ErrGeneral},
		{[]byte{versionMany}, ptipc.ErrGeneral},
	} {
		transport, _ := muxed(t, func(ptipc.Opaque) (net.Conn, error) {
			near, far := connected(t, "tcp")
			go func() {
				_, _ = far.Write(c.answer)
				_ = far.(*net.TCPConn).CloseWrite()
				_, _ = io.Copy(io.Discard, far)
				far.Close()
			}()
			return near, nil
		})
		if _, err := transport.Connections["plain"].Dial(t.Context(), nil, "a.example:1"); !errors.Is(err, c.class) {
			t.Errorf("% x: %v, want class %v", c.answer, err, c.class)
		}
	}
	failed := ptipc.WithClass(ptipc.ErrRefused, errors.New("no way"))
	transport, _ := muxed(t, func(ptipc.Opaque) (net.Conn, error) { return nil, failed })
	if _, err := transport.Connections["plain"].Dial(t.Context(), nil, "a.example:1"); !errors.Is(err, failed) {
		t.Errorf("%v, want %v", err, failed)
	}
}

// FREE-18, SOCKS-15: what is cut short does not look complete, whichever side cuts and
// however.
func TestMuxBroken(t *testing.T) {
	for _, how := range []string{"client aborts", "destination resets", "carrier ends", "carrier is reset"} {
		t.Run(how, func(t *testing.T) {
			dial, ends := anywhere(t, "tcp")
			transport, _, dialled, carriers := served(t, "tcp", dial)
			near, far := dialPlain(t, transport, "a.example:1"), <-ends
			mustWrite(t, near, []byte("question"))
			readExactly(t, far, 8)
			mustWrite(t, far, []byte("answ"))
			readExactly(t, near, 4)
			carrier := <-dialled
			watched := []net.Conn{near, far}
			switch how {
			case "client aborts":
				_ = relay.Abort(near)
				watched = watched[1:]
			case "destination resets":
				_ = far.(*net.TCPConn).SetLinger(0)
				far.Close()
				watched = watched[:1]
			case "carrier ends":
				_ = carrier.(*net.TCPConn).CloseWrite()
				_ = carrier.(*net.TCPConn).CloseRead()
			default:
				_ = carrier.(*net.TCPConn).SetLinger(0)
				carrier.Close()
			}
			for _, c := range watched {
				if n, err := c.Read(make([]byte, 1)); n > 0 || err == nil || errors.Is(err, io.EOF) {
					t.Errorf("the stream ends with %d bytes and %v, want an error", n, err)
				}
			}
			if _, err := near.Write([]byte("x")); err == nil {
				t.Error("a write on a broken stream succeeded")
			}
			again := dialPlain(t, transport, "a.example:1") // on another carrier, where that is gone
			(<-ends).Close()
			mustEnd(t, again)
			if n, lost := carriers.Load(), strings.HasPrefix(how, "carrier"); (n == 2) != lost {
				t.Errorf("%d carriers were opened", n)
			}
		})
	}
}

// FREE-18: closing leaves what was written whole, and tells the other that nobody
// reads.
func TestMuxClose(t *testing.T) {
	dial, ends := anywhere(t, "tcp")
	transport, s, _, _ := served(t, "tcp", dial)
	near, far := dialPlain(t, transport, "a.example:1"), <-ends
	mustWrite(t, near, []byte("last"))
	near.Close()
	if got := string(readExactly(t, far, 4)); got != "last" {
		t.Errorf("got %q", got)
	}
	mustEnd(t, far)
	for { // the server's relay stops reading
		if _, err := far.Write(make([]byte, 1<<10)); err != nil {
			break
		}
	}
	far.Close()
	for s.Stats().Active > 0 {
		runtime.Gosched()
	}
}

// FREE-19: a stream that nobody reads takes its window and no more, and holds up no
// other one on the carrier, in either direction.
func TestMuxSlowReader(t *testing.T) {
	const size = 32 << 20
	for _, direction := range []string{"to the client", "to the destination"} {
		t.Run(direction, func(t *testing.T) {
			dial, ends := anywhere(t, "tcp")
			transport, _, _, carriers := served(t, "tcp", dial)
			var slow, fast [2]net.Conn // writer, reader
			for _, pair := range []*[2]net.Conn{&slow, &fast} {
				near := dialPlain(t, transport, "a.example:1")
				far := <-ends
				*pair = [2]net.Conn{near, far}
				if direction == "to the client" {
					*pair = [2]net.Conn{far, near}
				}
			}
			var flows sync.WaitGroup
			stuckAt := make(chan int64, 1)
			flows.Go(func() { // until it is closed
				n, _ := io.Copy(slow[0], zeros{})
				stuckAt <- n
			})
			flows.Go(func() {
				if _, err := io.CopyN(fast[0], zeros{}, size); err != nil {
					t.Error(err)
				}
			})
			if _, err := io.CopyN(io.Discard, fast[1], size); err != nil {
				t.Error(err)
			}
			if n := carriers.Load(); n != 1 {
				t.Fatalf("there are %d carriers: nothing was shown", n)
			}
			_ = slow[0].SetWriteDeadline(past)
			// What the window and the sockets of the destination hold.
			if n := <-stuckAt; n > size {
				t.Errorf("a stream that nobody reads has taken %d bytes", n)
			}
			flows.Wait()
			for _, c := range []net.Conn{slow[0], slow[1], fast[0], fast[1]} {
				_ = relay.Abort(c)
			}
		})
	}
}

type zeros struct{}

func (zeros) Read(b []byte) (int, error) { return len(b), nil }

// FREE-19: windows grow for readers who keep up, and all of them together no further
// than their budget. What a stream had of it comes back.
func TestMuxWindowBudget(t *testing.T) {
	near, far := net.Pipe()
	defer far.Close()
	windows := newBudget(3 * firstWindow)
	c := newSession(near, windows, nil)
	c.accept = func(*muxStream, []byte) {}
	c.start()
	go func() { _, _ = io.Copy(io.Discard, far) }()
	s := newStream(c, 1)
	c.mu.Lock()
	c.streams[1], c.last = s, 1
	for range 16 { // it reads all there is, again and again
		n := s.window
		s.window = 0
		s.grant(n)
	}
	if s.size != 4*firstWindow || windows.left.Load() != 0 {
		t.Errorf("the window has %d bytes and the budget %d left, want %d and 0", s.size, windows.left.Load(), 4*firstWindow)
	}
	c.mu.Unlock()
	_ = s.Abort()
	if left := windows.left.Load(); left != 3*firstWindow {
		t.Errorf("the budget has %d left, want all of it", left)
	}
	c.abort(errClosed)
	c.work.Wait()
}

// FREE-19: what a stream has taken beyond its first window stays in the budget until
// its reader has it, also when nothing more can come.
func TestMuxUnreadStaysInTheBudget(t *testing.T) {
	for _, how := range []string{"read", "closed", "carrier ends"} {
		t.Run(how, func(t *testing.T) {
			near, far := net.Pipe()
			defer far.Close()
			windows := newBudget(extraWindow)
			c := newSession(near, windows, nil)
			c.accept = func(*muxStream, []byte) {}
			c.start()
			go func() { _, _ = io.Copy(io.Discard, far) }()
			s := newStream(c, 1)
			c.mu.Lock()
			s.answered = true
			c.streams[1], c.last = s, 1
			s.grant(firstWindow / 2) // the reader keeps up, and then no longer
			unread := s.window
			s.deliver(make([]byte, unread))
			s.peerEnd()
			s.end() // and with that it is over
			if _, ok := c.streams[1]; ok {
				t.Error("the stream is not over")
			}
			held := extraWindow - windows.left.Load()
			c.mu.Unlock()
			if held != firstWindow {
				t.Errorf("a stream with %d bytes that were not read has %d bytes of the budget, want %d", unread, held, firstWindow)
			}
			switch how {
			case "read":
				if n, err := io.Copy(io.Discard, s); n != int64(unread) || err != nil {
					t.Errorf("%d bytes, %v", n, err)
				}
			case "closed":
				_ = s.Close()
			default:
				c.abort(errClosed)
				_ = s.Close()
			}
			if left := windows.left.Load(); left != extraWindow {
				t.Errorf("the budget has %d left, want all of it", left)
			}
			_ = s.Close()
			c.abort(errClosed)
			c.work.Wait()
			if left := windows.left.Load(); left != extraWindow {
				t.Errorf("in the end the budget has %d left, want all of it", left)
			}
		})
	}
}

// FREE-20: a Write that waits for a peer that does not read is counted once, however often
// that peer wakes it.
func TestMuxBlockedOnce(t *testing.T) {
	near, far := net.Pipe()
	c := newSession(near, newBudget(0), nil)
	c.accept = func(*muxStream, []byte) {}
	c.start()
	s := newStream(c, 1)
	c.mu.Lock()
	s.answered, s.credit = true, 4*outSize
	c.streams[1], c.last = s, 1
	c.mu.Unlock()
	wrote := make(chan error, 1)
	go func() {
		_, err := s.Write(make([]byte, 4*outSize))
		wrote <- err
	}()
	waits := func() (n int) {
		c.mu.Lock()
		defer c.mu.Unlock()
		return len(c.blocked)
	}
	for waits() == 0 {
		runtime.Gosched()
	}
	for range 1000 {
		_ = c.take(appendFrame(nil, frameWindow, 1, make([]byte, 4)), nil)
		runtime.Gosched() // the Write may look again
	}
	if n := waits(); n > 1 { // none while it goes on
		t.Errorf("one Write waits %d times", n)
	}
	far.Close()
	if err := <-wrote; err == nil {
		t.Error("the Write succeeded")
	}
	c.work.Wait()
}

// Settings that nobody uses any more do not keep carriers when there are many.
func TestMuxManySettings(t *testing.T) {
	open := new(atomic.Int32)
	transport, carriers := muxed(t, func(ptipc.Opaque) (net.Conn, error) {
		near, far := connected(t, "tcp")
		open.Add(1)
		go func() {
			defer open.Add(-1)
			defer far.Close()
			first := make([]byte, prefixSize+frameHeader)
			if _, err := io.ReadFull(far, first); err != nil {
				return
			}
			_, _ = far.Write(appendFrame([]byte{versionMany, 0}, frameAnswer, 1, []byte{0}))
			_, _ = io.Copy(io.Discard, far)
		}()
		return near, nil
	})
	const many = maxPools + 50
	for i := range many {
		conn, err := transport.Connections["plain"].Dial(t.Context(), fmt.Appendf(nil, `{"user":%d}`, i), "a.example:1")
		if err != nil {
			t.Fatal(err)
		}
		_ = relay.Abort(conn)
	}
	if n := carriers.Load(); n != many {
		t.Fatalf("%d settings had %d carriers", many, n)
	}
	for deadline := time.Now().Add(time.Minute); open.Load() > maxPools; runtime.Gosched() {
		if time.Now().After(deadline) {
			t.Fatalf("%d carriers of settings that nobody uses are open, want at most %d", open.Load(), maxPools)
		}
	}
}

// FREE-20: more streams than a carrier may have are refused, those that are there
// go on.
func TestMuxTooManyStreams(t *testing.T) {
	began := make(chan struct{}, maxPerCarrier)
	_, open := startServer(t, "tcp", drainTimeout, func(ctx context.Context, network, addr string) (net.Conn, error) {
		began <- struct{}{}
		<-ctx.Done()
		return nil, ctx.Err()
	})
	c := open()
	defer c.Close()
	body := header(t, "a.example:1")[prefixSize:]
	b := []byte{versionMany, 0, 0}
	for id := range uint32(maxPerCarrier) {
		b = appendFrame(b, frameOpen, id+1, body)
	}
	mustWrite(t, c, b)
	for range maxPerCarrier {
		<-began
	}
	mustWrite(t, c, appendFrame(nil, frameOpen, maxPerCarrier+1, body))
	want := appendFrame([]byte{versionMany, 0}, frameAnswer, maxPerCarrier+1, []byte{byte(ptipc.ErrGeneral)})
	if got := readExactly(t, c, len(want)); !bytes.Equal(got, want) {
		t.Errorf("answered % x, want % x", got, want)
	}
}

// FREE-20: answers do not pile up for a client that does not read them.
func TestMuxAnswersPileUp(t *testing.T) {
	_, open := startServer(t, "pipe", drainTimeout, func(context.Context, string, string) (net.Conn, error) {
		return nil, ptipc.WithClass(ptipc.ErrRefused, errors.New("no"))
	})
	c := open()
	defer c.Close()
	body := header(t, "a.example:1")[prefixSize:]
	mustWrite(t, c, []byte{versionMany, 0, 0})
	for id := range uint32(maxControl) {
		if _, err := c.Write(appendFrame(nil, frameOpen, id+1, body)); err != nil {
			return // the server had enough of it
		}
	}
	t.Error("the server keeps answers without end")
}

// FREE-21: a peer that vanishes is missed, at either end, and its streams break with
// class 6. One that answers is not.
func TestMuxSilence(t *testing.T) {
	for _, who := range []string{"server", "client"} {
		t.Run(who+" vanishes", func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				near, far := net.Pipe()
				c := newSession(near, newBudget(0), nil)
				if who == "client" {
					c.accept = func(*muxStream, []byte) {}
				}
				c.greeted = true
				c.start()
				defer c.work.Wait()
				defer c.abort(errClosed)
				c.mu.Lock()
				s := newStream(c, 1)
				s.answered = true
				c.streams[1], c.last = s, 1
				c.mu.Unlock()
				alive := make(chan struct{})
				pings := 0
				go func() {
					defer close(alive)
					b := make([]byte, frameHeader)
					for pings < 10 {
						if _, err := io.ReadFull(far, b); err != nil {
							t.Error(err)
							return
						}
						if b[0] != framePing {
							t.Errorf("got a frame of type %d", b[0])
						}
						pings++
						mustWrite(t, far, appendFrame(nil, framePong, 0, nil))
					}
				}()
				<-alive
				go func() { _, _ = io.Copy(io.Discard, far) }()
				if _, err := s.Read(make([]byte, 1)); !errors.Is(err, ptipc.ErrTimedOut) {
					t.Errorf("the stream ends with %v, want class %v", err, ptipc.ErrTimedOut)
				}
				far.Close()
			})
		})
	}
}

// FREE-21: one PONG for a PING.
func TestMuxPong(t *testing.T) {
	_, open := startServer(t, "tcp", drainTimeout, nil)
	c := open()
	defer c.Close()
	mustWrite(t, c, append([]byte{versionMany, 0, 0}, appendFrame(nil, framePing, 0, nil)...))
	want := appendFrame([]byte{versionMany, 0}, framePong, 0, nil)
	if got := readExactly(t, c, len(want)); !bytes.Equal(got, want) {
		t.Errorf("answered % x, want % x", got, want)
	}
}

// FREE-21: a carrier without streams is closed, and the next stream opens another.
func TestMuxIdle(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dial, ends := anywhere(t, "pipe")
		transport, s, dialled, carriers := served(t, "pipe", dial)
		for n := range int32(2) {
			near, far := dialPlain(t, transport, "a.example:1"), <-ends
			<-dialled
			time.Sleep(2 * idleTime) // in a bubble; a stream keeps it
			mustWrite(t, near, []byte("x"))
			readExactly(t, far, 1)
			near.Close()
			far.Close()
			time.Sleep(2 * idleTime)
			synctest.Wait()
			if got := carriers.Load(); got != n+1 {
				t.Errorf("%d carriers were opened, want %d", got, n+1)
			}
			if got := len(s.slots); got != 1 { // the one that accept has for the next
				t.Errorf("the server has %d carriers and streams left", got-1)
			}
		}
	})
}

// A carrier that was given up as idle, and cannot say its last, is cut with the others.
func TestMuxCloseCutsIdle(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		near, far := net.Pipe()
		factory := new(relay.Meter).Factory(true, func(context.Context, ptipc.Opaque, string) (net.Conn, error) { return near, nil })
		m := newMux(factory)
		go func() {
			_, _ = io.ReadFull(far, make([]byte, prefixSize+frameHeader)) // and then no more
			_, _ = far.Write(appendFrame([]byte{versionMany, 0}, frameAnswer, 1, []byte{0}))
		}()
		conn, err := m.dial(t.Context(), nil, "a.example:1")
		if err != nil {
			t.Fatal(err)
		}
		mustWrite(t, conn, make([]byte, 1<<10))
		_ = relay.Abort(conn)
		time.Sleep(idleTime) // in a bubble
		synctest.Wait()
		began := time.Now()
		if err := m.close(func() error { return nil }); err != nil {
			t.Error(err)
		}
		if time.Since(began) > 0 {
			t.Error("closing has waited for a peer that does not read")
		}
		far.Close()
	})
}

// A carrier that has ended while it was idle costs the next stream nothing.
func TestMuxDialsAgain(t *testing.T) {
	dial, ends := anywhere(t, "tcp")
	transport, _, dialled, carriers := served(t, "tcp", dial)
	for range 20 {
		near, far := dialPlain(t, transport, "a.example:1"), <-ends
		near.Close()
		far.Close()
		_ = (<-dialled).Close() // as the child does that has ended, or the network
	}
	if n := carriers.Load(); n != 20 {
		t.Errorf("%d carriers were opened, want 20", n)
	}
}

// FREE-14, FREE-24: streams finish, new ones are refused, and what does not finish is
// cut.
func TestMuxServerCloses(t *testing.T) {
	for _, how := range []string{"finishes", "cuts"} {
		t.Run(how, func(t *testing.T) {
			drain := time.Hour
			if how == "cuts" {
				drain = time.Millisecond
			}
			dial, ends := anywhere(t, "tcp")
			s, open := startServer(t, "tcp", drain, dial)
			transport, _ := muxed(t, func(ptipc.Opaque) (net.Conn, error) { return open(), nil })
			near, far := dialPlain(t, transport, "a.example:1"), <-ends
			closed := make(chan error)
			go func() { closed <- s.Close() }()
			<-s.closing.Done()
			if how == "cuts" {
				for _, c := range []net.Conn{near, far} {
					if _, err := c.Read(make([]byte, 1)); err == nil || errors.Is(err, io.EOF) {
						t.Errorf("a stream that was cut ends with %v", err)
					}
				}
			} else {
				if _, err := transport.Connections["plain"].Dial(t.Context(), nil, "a.example:1"); !errors.Is(err, ptipc.ErrGeneral) {
					t.Errorf("refused with %v, want class %v", err, ptipc.ErrGeneral)
				}
				mustWrite(t, near, []byte("last"))
				near.Close()
				if got := string(readExactly(t, far, 4)); got != "last" {
					t.Errorf("got %q", got)
				}
				far.Close()
			}
			if err := <-closed; err != nil {
				t.Error(err)
			}
			for len(ends) > 0 {
				(<-ends).Close()
			}
		})
	}
}

// FREE-11, FREE-17: what counts as hanging up during the dial.
func TestMuxHangUp(t *testing.T) {
	for _, c := range []struct {
		kind   byte
		data   string
		cancel bool
	}{{frameReset, "", true}, {frameStop, "", true}, {frameEnd, "", true}, {frameReset, "data", true}, {frameStop, "data", true}, {frameEnd, "data", false}} {
		t.Run(fmt.Sprintf("%d behind %q", c.kind, c.data), func(t *testing.T) {
			near, far := connected(t, "tcp")
			proceed, cancelled := make(chan struct{}), make(chan struct{})
			_, open := startServer(t, "tcp", drainTimeout, func(ctx context.Context, _, _ string) (net.Conn, error) {
				select {
				case <-ctx.Done():
					close(cancelled)
					return nil, ctx.Err()
				case <-proceed:
					return near, nil
				}
			})
			carrier := open()
			defer carrier.Close()
			b := appendFrame([]byte{versionMany, 0, 0}, frameOpen, 1, header(t, "a.example:1")[prefixSize:])
			if c.data != "" {
				b = appendFrame(b, frameData, 1, []byte(c.data))
			}
			mustWrite(t, carrier, appendFrame(b, c.kind, 1, nil))
			if c.cancel {
				<-cancelled
				return
			}
			close(proceed)
			readExactly(t, far, len(c.data))
			mustEnd(t, far)
		})
	}
}

// FREE-15 to FREE-22: the server's side of each vector, in one piece and byte by byte.
func TestManyVectors(t *testing.T) {
	for _, v := range readVectors(t, "many") {
		for _, size := range []int{1, len(v.sent())} {
			t.Run(fmt.Sprintf("%s/%d", v.name, size), func(t *testing.T) { runManyVector(t, v, size) })
		}
	}
}

// joined is what a server sends, with DATA of a stream in one frame that came in several: what
// comes back byte by byte may.
func joined(b []byte) []byte {
	if len(b) < answerSize {
		return b
	}
	out, last := bytes.Clone(b[:answerSize]), -1 // where the last frame begins, if it is DATA
	for b = b[answerSize:]; len(b) >= frameHeader; {
		length := int(binary.BigEndian.Uint16(b[5:]))
		if len(b) < frameHeader+length {
			break
		}
		frame := b[:frameHeader+length]
		b = b[len(frame):]
		if frame[0] == frameData && last >= 0 && bytes.Equal(out[last:last+5], frame[:5]) {
			out = append(out, frame[frameHeader:]...)
			binary.BigEndian.PutUint16(out[last+5:], uint16(len(out)-last-frameHeader))
			continue
		}
		if last = -1; frame[0] == frameData {
			last = len(out)
		}
		out = append(out, frame...)
	}
	return append(out, b...)
}

// The destination sends back what it is sent, and its end. b.example refuses, c.example
// does not answer.
func runManyVector(t *testing.T, v *vector, size int) {
	dialled := make(chan string, 16)
	_, open := startServer(t, "tcp", drainTimeout, func(ctx context.Context, _, dest string) (net.Conn, error) {
		dialled <- dest
		if strings.HasPrefix(dest, "c.example") {
			<-ctx.Done()
			return nil, ctx.Err()
		}
		if strings.HasPrefix(dest, "b.example") {
			return nil, ptipc.WithClass(ptipc.ErrRefused, errors.New("as the vector says"))
		}
		near, far := connected(t, "tcp")
		go func() {
			_, _ = io.Copy(far, far)
			_ = far.(*net.TCPConn).CloseWrite()
		}()
		return near, nil
	})
	c := open()
	defer c.Close()
	written := make(chan struct{})
	go func() {
		defer close(written)
		for b := v.sent(); len(b) > 0; b = b[min(size, len(b)):] {
			if _, err := c.Write(b[:min(size, len(b))]); err != nil {
				return
			}
		}
	}()
	// What a fault destroys on its way back cannot be waited for.
	if !v.broken {
		var got []byte
		for !bytes.Equal(joined(got), v.receives) {
			if len(joined(got)) > len(v.receives)+frameHeader { // more than a frame that is to be joined
				t.Fatalf("the server sent % x, want % x", got, v.receives)
			}
			got = append(got, readExactly(t, c, 1)...)
		}
		<-written
		mustWrite(t, c, appendFrame(nil, framePing, 0, nil))
		if got, want := readExactly(t, c, frameHeader), appendFrame(nil, framePong, 0, nil); !bytes.Equal(got, want) {
			t.Errorf("behind that the server sent % x, want a PONG", got)
		}
	} else if _, err := io.Copy(io.Discard, c); errors.Is(err, os.ErrDeadlineExceeded) {
		t.Error("the carrier was not ended") // FREE-22
	}
	for _, want := range v.dials {
		if got := <-dialled; got != want {
			t.Errorf("dialled %q, want %q", got, want)
		}
	}
	if len(dialled) > 0 {
		t.Errorf("dialled %q as well", <-dialled)
	}
}

// FuzzFrames feeds both ends any bytes: nothing but an end of the carrier may come of
// it, and however the bytes are cut it is the same.
func FuzzFrames(f *testing.F) {
	for _, v := range readVectors(f, "many") {
		for _, b := range v.sends {
			f.Add(b, byte(1))
		}
	}
	f.Fuzz(func(t *testing.T, b []byte, cut byte) {
		for _, client := range []bool{false, true} {
			var results [2]string
			for i, size := range []int{max(len(b), 1), int(cut)%16 + 1} {
				c := newSession(dead{}, newBudget(extraWindow), nil)
				c.timer = time.NewTimer(time.Hour)
				if !client {
					c.handlers = make(chan struct{}) // none: each stream is refused
					c.accept, c.refused = func(*muxStream, []byte) {}, func() {}
				} else {
					c.greeted = true
					for id := range uint32(4) {
						s := newStream(c, id+1)
						s.answered = id > 0
						c.streams[s.id], c.last = s, s.id
					}
				}
				var err error
				for rest := b; len(rest) > 0 && err == nil; rest = rest[min(size, len(rest)):] {
					err = c.take(rest[:min(size, len(rest))], nil)
				}
				unread := 0
				for _, s := range c.streams {
					if s.unread > firstWindow {
						t.Errorf("stream %d holds %d bytes", s.id, s.unread)
					}
					unread += s.unread
				}
				results[i] = fmt.Sprint(err, len(c.streams), c.last, len(c.out)+len(c.control))
				if err == nil {
					results[i] += fmt.Sprint(" ", unread)
				}
				c.abort(errClosed)
				c.work.Wait()
			}
			if results[0] != results[1] {
				t.Errorf("client %v: in one piece %q, in others %q", client, results[0], results[1])
			}
		}
	})
}

// dead is a carrier on which nothing happens.
type dead struct{ net.Conn }

func (dead) Close() error { return nil }

// FREE-18: after a stream is closed, writing fails at once, and what its peer goes on
// sending does no harm.
func TestMuxWritesFail(t *testing.T) {
	dial, ends := anywhere(t, "tcp")
	transport, _, _, _ := served(t, "tcp", dial)
	near, far := dialPlain(t, transport, "a.example:1"), <-ends
	if err := near.CloseWrite(); err != nil {
		t.Error(err)
	}
	if err := near.CloseWrite(); err != nil {
		t.Error("the second time:", err)
	}
	if _, err := near.Write([]byte("x")); !errors.Is(err, io.ErrClosedPipe) {
		t.Errorf("write after CloseWrite: %v", err)
	}
	mustEnd(t, far)
	near.Close()
	if _, err := near.Write([]byte("x")); !errors.Is(err, net.ErrClosed) {
		t.Errorf("write after Close: %v", err)
	}
	if _, err := near.Read(make([]byte, 1)); !errors.Is(err, net.ErrClosed) {
		t.Errorf("read after Close: %v", err)
	}
	far.Close()
	// The destination reads no more, and the client learns it from the write.
	near, far = dialPlain(t, transport, "a.example:1"), <-ends
	_ = far.(*net.TCPConn).SetLinger(0)
	far.Close()
	for {
		if _, err := near.Write(make([]byte, 1<<10)); err != nil {
			if !errors.Is(err, syscall.ECONNRESET) && !errors.Is(err, syscall.EPIPE) {
				t.Errorf("write to one who has gone: %v", err)
			}
			break
		}
	}
}
