package socks

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"time"
)

const (
	// Most dials end within watchAfter, and cost no goroutine and no system call
	// for watching the client.
	watchAfter = 5 * time.Millisecond

	// maxEarly bounds the early data that is kept in memory during a dial, in bytes.
	// What comes after it stays where it is and holds the client back.
	maxEarly = 64 << 10
)

// A watch cancels a dial when the client hangs up (SOCKS-14).
type watch struct {
	conn   net.Conn
	cancel context.CancelFunc
	timer  *time.Timer
	ended  sync.WaitGroup

	// Until the watch has ended these belong to it.
	early  []byte
	method byte
	owed   bool
	gone   bool
}

// dial calls s.Dial and watches the client meanwhile. It returns the early data
// that has come, and whether the answer to the greeting is still owed.
func (s *Server) dial(r *Request, early []byte, method byte, owed bool, timeout time.Duration) (net.Conn, []byte, bool, error) {
	ctx, cancel := context.WithCancel(s.ctx)
	defer cancel()
	w := &watch{conn: r.Client, cancel: cancel, early: early, method: method, owed: owed}
	_ = w.conn.SetReadDeadline(time.Time{})
	_ = w.conn.SetWriteDeadline(time.Now().Add(timeout))
	w.ended.Add(1)
	w.timer = time.AfterFunc(watchAfter, w.run)

	wire, err := s.Dial(ctx, r)

	if !w.timer.Stop() {
		_ = w.conn.SetReadDeadline(time.Unix(1, 0)) // wakes the watch
		w.ended.Wait()
	}
	if w.gone {
		if err == nil {
			wire.Close()
		}
		err = fmt.Errorf("socks: %w, the client hung up during the dial", errSilent)
	}
	return wire, w.early, w.owed, err
}

func (w *watch) run() {
	defer w.ended.Done()
	if w.owed {
		// The dial takes long: the client should know that it was understood.
		if _, err := w.conn.Write([]byte{version, w.method}); err != nil {
			w.hungUp()
			return
		}
		w.owed = false
	}
	if gone, ok := watchSocket(w.conn, len(w.early) > 0); ok {
		if gone {
			w.hungUp()
		}
		return
	}
	w.read()
}

func (w *watch) hungUp() {
	w.gone = true
	w.cancel()
}

// read watches a conn of which nothing is known: reading is the only way to see
// its end, so early data is kept.
func (w *watch) read() {
	buf := make([]byte, 4096)
	for len(w.early) < maxEarly {
		n, err := w.conn.Read(buf[:min(len(buf), maxEarly-len(w.early))])
		w.early = append(w.early, buf[:n]...)
		switch {
		case err == nil:
		case errors.Is(err, os.ErrDeadlineExceeded): // the dial has ended
			return
		case errors.Is(err, io.EOF) && len(w.early) > 0: // a half-close; the relay will see it again
			return
		default:
			w.hungUp()
			return
		}
	}
}
