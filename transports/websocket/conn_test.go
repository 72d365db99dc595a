package websocket

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"runtime"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/net/nettest"

	"github.com/gorilla/websocket"

	"pthost/ptipc"
)

var schemes = []string{"ws", "wss"}

func TestConnIsANetConn(t *testing.T) {
	for _, scheme := range schemes {
		t.Run(scheme, func(t *testing.T) {
			p := newPair(t, scheme)
			for _, first := range []string{"client", "server"} {
				t.Run(first, func(t *testing.T) {
					nettest.TestConn(t, func() (c1, c2 net.Conn, stop func(), err error) {
						a, b := p.connect(t)
						if first == "server" {
							a, b = b, a
						}
						return a, b, func() { a.Close(); b.Close() }, nil
					})
				})
			}
		})
	}
}

// bothEnds runs a test with the client first and with the server first, on both schemes.
func bothEnds(t *testing.T, test func(t *testing.T, p *pair, a, b ptipc.Conn)) {
	t.Helper()
	for _, scheme := range schemes {
		for _, first := range []string{"client", "server"} {
			t.Run(scheme+"/"+first+" first", func(t *testing.T) {
				p := newPair(t, scheme)
				a, b := p.connect(t)
				if first == "server" {
					a, b = b, a
				}
				defer b.Close()
				defer a.Close()
				test(t, p, a, b)
			})
		}
	}
}

// One direction ends, the other goes on (WS-6), until it ends too (WS-8).
func TestHalfClose(t *testing.T) {
	bothEnds(t, func(t *testing.T, _ *pair, a, b ptipc.Conn) {
		mustWrite(t, a, "a question")
		mustCloseWrite(t, a)
		mustCloseWrite(t, a) // again, which does nothing
		if got, err := io.ReadAll(b); string(got) != "a question" || err != nil {
			t.Errorf("read %q, %v", got, err)
		}
		if _, err := a.Write([]byte("x")); !errors.Is(err, io.ErrClosedPipe) {
			t.Errorf("a Write after CloseWrite has the error %v, want ErrClosedPipe", err)
		}
		mustWrite(t, b, "an answer")
		buf := make([]byte, 9)
		if _, err := io.ReadFull(a, buf); err != nil || string(buf) != "an answer" {
			t.Errorf("read %q, %v", buf, err)
		}
		mustWrite(t, b, ", and more")
		mustCloseWrite(t, b)
		if got, err := io.ReadAll(a); string(got) != ", and more" || err != nil {
			t.Errorf("read %q, %v", got, err)
		}
		for _, c := range []ptipc.Conn{a, b} {
			if n, err := c.Read(buf); n != 0 || !errors.Is(err, io.EOF) {
				t.Errorf("after the end: %d, %v", n, err)
			}
		}
	})
}

// What was written before Close arrives, and then the end (WS-10, WS-11), also
// when the peer writes on.
func TestCloseDelivers(t *testing.T) {
	bothEnds(t, func(t *testing.T, _ *pair, a, b ptipc.Conn) {
		data := make([]byte, 3<<20)
		written := make(chan error, 1)
		go func() {
			_, err := a.Write(data)
			written <- err
			a.Close()
		}()
		mustWrite(t, b, "still here")
		if got, err := io.ReadAll(b); len(got) != len(data) || err != nil {
			t.Errorf("read %d bytes of %d, %v", len(got), len(data), err)
		}
		if err := <-written; err != nil {
			t.Error(err)
		}
	})
}

// An aborted connection does not look like one that ended (WS-10).
func TestAbort(t *testing.T) {
	bothEnds(t, func(t *testing.T, _ *pair, a, b ptipc.Conn) {
		mustWrite(t, a, "x")
		buf := make([]byte, 2)
		if n, err := b.Read(buf); n != 1 || err != nil {
			t.Fatal(n, err)
		}
		if err := a.(interface{ Abort() error }).Abort(); err != nil {
			t.Error(err)
		}
		if _, err := b.Read(buf); err == nil || errors.Is(err, io.EOF) {
			t.Errorf("the peer of an aborted connection reads %v", err)
		}
		if _, err := a.Read(buf); !errors.Is(err, net.ErrClosed) {
			t.Errorf("an aborted connection reads %v, want ErrClosed", err)
		}
	})
}

// Closing the transport cuts its connections; closing the server leaves accepted ones
// alone (LIFE-2). Nothing is left when they have ended (goleak looks after all tests).
func TestCloseCuts(t *testing.T) {
	p := newPair(t, "wss")
	a, b := p.connect(t)
	p.transport.Close()
	for side, c := range map[string]ptipc.Conn{"client": a, "server": b} {
		if _, err := c.Read(make([]byte, 1)); err == nil || errors.Is(err, io.EOF) {
			t.Errorf("the %s reads %v", side, err)
		}
		c.Close()
	}
}

func TestCloseOfServerLeavesConnections(t *testing.T) {
	p := newPair(t, "wss")
	a, b := p.connect(t)
	p.listener.Close()
	if _, err := p.listener.Accept(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("Accept after Close: %v", err)
	}
	for _, way := range [][2]ptipc.Conn{{a, b}, {b, a}} {
		if _, err := io.WriteString(way[0], "word"); err != nil {
			t.Fatal(err)
		}
		if err := way[0].CloseWrite(); err != nil {
			t.Fatal(err)
		}
		if got, err := io.ReadAll(way[1]); err != nil || string(got) != "word" {
			t.Errorf("%q %v", got, err)
		}
	}
	a.Close()
	b.Close()
}

func TestBothWaysAtOnce(t *testing.T) {
	size := 100 << 20
	if testing.Short() {
		size = 10 << 20
	}
	for _, scheme := range schemes {
		t.Run(scheme, func(t *testing.T) {
			p := newPair(t, scheme)
			a, b := p.connect(t)
			var work sync.WaitGroup
			for i, ends := range [][2]ptipc.Conn{{a, b}, {b, a}} {
				sent, received := sha256.New(), sha256.New()
				work.Go(func() {
					r := rand.NewChaCha8([32]byte{byte(i)})
					sizes := rand.New(rand.NewPCG(1, uint64(i)))
					buf := make([]byte, 200<<10)
					for left := size; left > 0; {
						n := min(left, 1+sizes.IntN(len(buf)))
						_, _ = r.Read(buf[:n]) // never fails
						sent.Write(buf[:n])
						if _, err := ends[0].Write(buf[:n]); err != nil {
							t.Error(err)
							return
						}
						left -= n
					}
					mustCloseWrite(t, ends[0])
				})
				work.Go(func() {
					if n, err := io.Copy(received, ends[1]); err != nil || n != int64(size) {
						t.Errorf("%d bytes of %d, %v", n, size, err)
					}
				})
				defer func() {
					if !bytes.Equal(sent.Sum(nil), received.Sum(nil)) {
						t.Error("other bytes came than were sent")
					}
				}()
			}
			work.Wait()
			want := ptipc.Stats{Received: uint64(size), Sent: uint64(size)}
			for _, c := range []ptipc.Conn{a, b} {
				if s := c.Stats(); s.Received != want.Received || s.Sent != want.Sent {
					t.Errorf("Stats() = %+v", s)
				}
				c.Close()
			}
		})
	}
}

// A client pings about every 30 seconds and answers pings with their payload,
// also while nobody reads from it after the end of the stream (WS-13).
func TestPing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, far := newPipe(t, true, 30*time.Second)
		peer, err := gorillaServer(&opened{Conn: far})
		if err != nil {
			t.Fatal(err)
		}
		reading := make(chan error, 1)
		go func() {
			_, err := c.Read(make([]byte, 1))
			reading <- err
		}()
		pings := make(chan time.Time)
		pongs := make(chan string)
		peer.SetPingHandler(func(string) error {
			pings <- time.Now()
			return peer.WriteControl(websocket.PongMessage, nil, time.Time{})
		})
		peer.SetPongHandler(func(s string) error { pongs <- s; return nil })
		closed := make(chan error, 1)
		go func() {
			_, _, err := peer.NextReader()
			closed <- err
		}()
		last := time.Now()
		for range 5 {
			now := <-pings
			if d := now.Sub(last); d < 27*time.Second || d > 33*time.Second {
				t.Errorf("a ping after %v", d)
			}
			last = now
		}
		ask := func(s string) {
			if err := peer.WriteControl(websocket.PingMessage, []byte(s), time.Time{}); err != nil {
				t.Fatal(err)
			}
			if got := <-pongs; got != s {
				t.Errorf("answered with %q, want %q", got, s)
			}
		}
		ask("one")
		if err := peer.WriteMessage(websocket.BinaryMessage, nil); err != nil {
			t.Fatal(err)
		}
		if err := <-reading; !errors.Is(err, io.EOF) {
			t.Errorf("read %v", err)
		}
		ask("two")
		<-pings
		go c.CloseWrite()
		// Its last message is empty; then comes the close frame (WS-8).
		if err := <-closed; err != nil {
			t.Fatal(err)
		}
		if _, _, err := peer.NextReader(); !websocket.IsCloseError(err, websocket.CloseNormalClosure) {
			t.Errorf("the peer reads %v, want code 1000", err)
		}
		c.Close()
	})
}

// A peer from which nothing comes for two intervals is gone (WS-14).
func TestSilentPeer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, far := newPipe(t, false, 10*time.Second)
		go io.Copy(io.Discard, far) // it lives, and says nothing
		start := time.Now()
		_, err := c.Read(make([]byte, 1))
		if !errors.Is(err, ptipc.ErrTimedOut) || ptipc.ClassOf(err) != ptipc.ErrTimedOut {
			t.Errorf("reads %v, want class timed out", err)
		}
		if errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("%v looks like a deadline", err)
		}
		if d := time.Since(start); d < 18*time.Second || d > 33*time.Second {
			t.Errorf("noticed after %v", d)
		}
		if _, err := c.Write([]byte("x")); !errors.Is(err, ptipc.ErrTimedOut) {
			t.Errorf("a Write has the error %v", err)
		}
		c.Close()
	})
}

// Nothing is concluded while the application does not read, nor about a peer
// that does not read but pings (WS-14).
func TestSlowReader(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, far := newPipe(t, false, 10*time.Second)
		discarded := make(chan struct{})
		go func() {
			io.Copy(io.Discard, far)
			close(discarded)
		}()
		time.Sleep(time.Hour) // nobody reads
		go io.WriteString(far, frame(finBit|opBinary, "x"))
		buf := make([]byte, 1)
		if _, err := c.Read(buf); err != nil {
			t.Fatal(err)
		}
		// Now somebody reads, and the peer says that it is there, now and then.
		read := make(chan error, 1)
		go func() {
			_, err := c.Read(buf)
			read <- err
		}()
		for range 100 {
			time.Sleep(15 * time.Second)
			if _, err := io.WriteString(far, frame(finBit|opPing, "")); err != nil {
				t.Fatal(err)
			}
		}
		if len(read) > 0 {
			t.Errorf("reads %v", <-read)
		}
		c.Close()
		if err := <-read; !errors.Is(err, net.ErrClosed) {
			t.Errorf("reads %v after Close", err)
		}
		far.Close()
		<-discarded
	})
}

// A peer that does not answer the close frame is waited for, but not for ever
// (WS-11).
func TestCloseGivesUp(t *testing.T) {
	for name, takes := range map[string]bool{"it takes what comes": true, "it takes nothing": false} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				c, far := newPipe(t, true, 30*time.Second)
				start := time.Now()
				if takes {
					go io.Copy(io.Discard, far)
				}
				write := make(chan error, 1)
				go func() {
					_, err := c.Write(make([]byte, 2*maxPayload))
					write <- err
				}()
				synctest.Wait()
				c.Close()
				if d := time.Since(start); d != 0 {
					t.Errorf("Close took %v", d)
				}
				if err := <-write; takes != (err == nil) || !takes && !errors.Is(err, net.ErrClosed) {
					t.Errorf("the Write ends with %v", err)
				}
				for !c.wire.closed.Load() {
					time.Sleep(time.Second)
				}
				if d := time.Since(start); d < lingerTime || d > lingerTime+answerTime {
					t.Errorf("given up after %v", d)
				}
			})
		})
	}
}

// A write deadline in the middle of a frame loses nothing: what is kept goes out
// when the peer takes it.
func TestWriteDeadlineKeepsTheFrame(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, far := newPipe(t, true, 0)
		c.SetWriteDeadline(time.Now().Add(time.Second))
		data := bytes.Repeat([]byte("0123456789"), maxPayload/5)
		n, err := c.Write(data)
		if n != maxPayload || !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Fatalf("wrote %d, %v; want one frame that is kept", n, err)
		}
		if n, err := c.Write(data); n != 0 || !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Fatalf("wrote %d, %v behind it", n, err)
		}
		c.SetWriteDeadline(time.Time{})
		peer, peerFar := net.Pipe()
		go io.Copy(peerFar, far) // the peer takes it
		go func() {
			c.Write(data[n:])
			c.CloseWrite()
		}()
		var d decoder
		d.masked = true
		var got []byte
		for buf := make([]byte, 1000); !d.ended; {
			n, err := peer.Read(buf)
			if err != nil {
				t.Fatal(err)
			}
			m, _, _, err := d.decode(buf, buf[:n])
			if err != nil {
				t.Fatal(err)
			}
			got = append(got, buf[:m]...)
		}
		if !bytes.Equal(got, data) {
			t.Errorf("got %d bytes, want the %d that were written", len(got), len(data))
		}
		c.Abort()
		peer.Close()
	})
}

func mustWrite(t *testing.T, c io.Writer, s string) {
	t.Helper()
	if _, err := io.WriteString(c, s); err != nil {
		t.Error(err)
	}
}

func mustCloseWrite(t *testing.T, c ptipc.Conn) {
	t.Helper()
	if err := c.CloseWrite(); err != nil {
		t.Error(err)
	}
}

// A connection that nobody takes is closed with a code that says so (WS-12).
func TestRefuse(t *testing.T) {
	c, far := newPipe(t, false, 0)
	go c.refuse()
	if _, code := readFrames(far); code != websocket.CloseTryAgainLater {
		t.Errorf("closed with code %d, want 1013", code)
	}
}

// What waits behind a frame that was kept is bounded.
func TestRestIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, _ := newPipe(t, false, 0)
		c.SetWriteDeadline(time.Now().Add(time.Second))
		if n, err := c.wire.Write(make([]byte, maxPayload)); n != maxPayload || err != nil {
			t.Fatal(n, err)
		}
		synctest.Wait() // it is on its way again
		total, piece := 0, make([]byte, 1000)
		for {
			n, err := c.wire.Write(piece)
			if total += n; err != nil {
				break
			}
			if total > maxRest {
				t.Fatalf("%d bytes wait", total)
			}
		}
	})
}

// Thousands of idle connections take little memory each.
func TestManyIdle(t *testing.T) {
	count := 3000
	if testing.Short() {
		count = 300
	}
	for _, scheme := range schemes {
		t.Run(scheme, func(t *testing.T) {
			p := newPair(t, scheme)
			var before, after runtime.MemStats
			runtime.GC()
			runtime.ReadMemStats(&before)
			var clients, servers []net.Conn
			var readers sync.WaitGroup
			for range count {
				a, b := p.connect(t)
				clients, servers = append(clients, a), append(servers, b)
				for _, c := range []net.Conn{a, b} {
					readers.Go(func() {
						buf := make([]byte, 1<<10)
						if n, err := c.Read(buf); n != 5 || err != nil {
							t.Errorf("read %d, %v", n, err)
						}
					})
				}
			}
			runtime.GC()
			runtime.ReadMemStats(&after)
			used := int64(after.HeapInuse+after.StackInuse) - int64(before.HeapInuse+before.StackInuse)
			t.Logf("%d bytes for each of %d connections, both ends and their readers", used/int64(count), count)
			if each := used / int64(count); each > 100<<10 {
				t.Errorf("%d bytes for each connection", each)
			}
			for i := range clients { // all of them live
				mustWrite(t, clients[i], "hello")
				mustWrite(t, servers[i], "hello")
			}
			readers.Wait()
			for _, c := range append(clients, servers...) {
				c.Close()
			}
		})
	}
}
