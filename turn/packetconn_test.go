package turn

import (
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"testing"
	"time"
)

var past = time.Unix(1, 0)

// What any net.PacketConn does, in the spirit of nettest.TestConn, which is for streams.
func TestPacketConn(t *testing.T) {
	s := &Server{}
	addr := startServer(t, s)
	pair := func(t *testing.T) (*Conn, *net.UDPConn) {
		peer := listenUDP(t, "127.0.0.1")
		patient(t, peer)
		return mustDial(t, addr, s.Credentials), peer
	}
	isTimeout := func(t *testing.T, err error) {
		t.Helper()
		var ne net.Error
		if !errors.Is(err, os.ErrDeadlineExceeded) || !errors.As(err, &ne) || !ne.Timeout() {
			t.Errorf("%v is no timeout", err)
		}
	}
	buf := func() []byte { return make([]byte, 100) }

	t.Run("PastDeadline", func(t *testing.T) {
		conn, peer := pair(t)
		_ = conn.SetDeadline(past)
		_, _, err := conn.ReadFrom(buf())
		isTimeout(t, err)
		_, err = conn.WriteTo([]byte("x"), peer.LocalAddr())
		isTimeout(t, err)
		// It goes on when there is a deadline in the future, or none.
		for _, when := range []time.Time{time.Now().Add(20 * time.Second), {}} {
			_ = conn.SetDeadline(past)
			_ = conn.SetDeadline(when)
			if _, err := conn.WriteTo([]byte("there"), peer.LocalAddr()); err != nil {
				t.Fatal(err)
			}
			if n, from, err := peer.ReadFrom(buf()); err != nil || n != 5 {
				t.Fatal(n, err)
			} else if _, err := peer.WriteTo([]byte("back"), from); err != nil {
				t.Fatal(err)
			}
			if n, _, err := conn.ReadFrom(buf()); err != nil || n != 4 {
				t.Fatal(n, err)
			}
		}
	})
	t.Run("DeadlineOfOneSide", func(t *testing.T) {
		conn, peer := pair(t)
		_ = conn.SetReadDeadline(past)
		if _, err := conn.WriteTo([]byte("x"), peer.LocalAddr()); err != nil {
			t.Error(err)
		}
		_ = conn.SetReadDeadline(time.Time{})
		_ = conn.SetWriteDeadline(past)
		if _, from, err := peer.ReadFrom(buf()); err != nil {
			t.Fatal(err)
		} else if _, err := peer.WriteTo([]byte("x"), from); err != nil {
			t.Fatal(err)
		}
		if _, _, err := conn.ReadFrom(buf()); err != nil {
			t.Error(err)
		}
	})
	t.Run("DeadlineDuringRead", func(t *testing.T) {
		conn, _ := pair(t)
		done := make(chan error, 1)
		read := func() {
			_, _, err := conn.ReadFrom(buf())
			done <- err
		}
		go read()
		_ = conn.SetReadDeadline(past)
		isTimeout(t, <-done)
		_ = conn.SetReadDeadline(time.Time{})
		go read()
		_ = conn.SetReadDeadline(time.Now().Add(time.Millisecond))
		isTimeout(t, <-done)
	})
	t.Run("Close", func(t *testing.T) {
		conn, peer := pair(t)
		done := make(chan error, 8)
		for range cap(done) {
			go func() {
				_, _, err := conn.ReadFrom(buf())
				done <- err
			}()
		}
		if err := conn.Close(); err != nil {
			t.Error(err)
		}
		for range cap(done) {
			if err := <-done; !errors.Is(err, net.ErrClosed) {
				t.Errorf("a pending read: %v", err)
			}
		}
		_, _, readErr := conn.ReadFrom(buf())
		_, writeErr := conn.WriteTo([]byte("x"), peer.LocalAddr())
		for i, err := range []error{readErr, writeErr, conn.Close(), conn.SetDeadline(past), conn.SetReadDeadline(past), conn.SetWriteDeadline(past)} {
			var op *net.OpError
			if !errors.Is(err, net.ErrClosed) || !errors.As(err, &op) {
				t.Errorf("%d: %v", i, err)
			}
		}
		if conn.LocalAddr() == nil {
			t.Error("there is no address any more")
		}
	})
	t.Run("CloseWithDeadline", func(t *testing.T) {
		conn, _ := pair(t)
		_ = conn.SetDeadline(time.Now().Add(time.Hour)) // no timer may stay behind
		if err := conn.Close(); err != nil {
			t.Error(err)
		}
	})
	t.Run("Concurrently", func(t *testing.T) {
		conn, peer := pair(t)
		done := make(chan struct{})
		go func() { defer close(done); echo(newSocket(peer, false)) }()
		_ = conn.SetReadDeadline(time.Now().Add(20 * time.Second))
		const each = 50
		var all sync.WaitGroup
		for i := range 4 {
			all.Go(func() {
				for n := range each {
					if _, err := conn.WriteTo(fmt.Append(nil, i, n), peer.LocalAddr()); err != nil {
						t.Error(err)
					}
				}
			})
			all.Go(func() {
				for range each {
					if _, _, err := conn.ReadFrom(buf()); err != nil {
						t.Error(err)
						return
					}
				}
			})
			all.Go(func() {
				for range each {
					_ = conn.SetWriteDeadline(time.Now().Add(time.Hour))
					_ = conn.LocalAddr()
					_ = conn.Stats()
				}
			})
		}
		all.Wait()
		_ = peer.Close()
		<-done
	})
}
