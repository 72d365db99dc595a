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
	ended  sync.WaitGroup

	// While the watch runs, these belong to it.
	method byte   // the answer to the greeting
	owed   bool   // the client has not been told the method
	early  []byte // what came behind the request
	gone   bool
}

// dial calls s.Dial if the session is admitted, and watches the client if the
// dial takes long.
func (s *Server) dial(session *session, r *Request, w *watch) (wire net.Conn, admitted bool, err error) {
	ctx, cancel := context.WithCancel(s.ctx)
	defer cancel()
	w.cancel = cancel
	w.ended.Add(1)
	if err := s.admit(session, w); err != nil {
		return nil, false, err
	}
	wire, err = s.wire(ctx, r)
	if s.dialled(session) {
		_ = w.conn.SetReadDeadline(past) // wakes the watch
		w.ended.Wait()
		_ = w.conn.SetReadDeadline(time.Time{})
	}
	if w.gone {
		if err == nil {
			wire.Close()
		}
		return nil, true, fmt.Errorf("socks: %w, the client hung up during the dial", errSilent)
	}
	return wire, true, err
}

func (s *Server) wire(ctx context.Context, r *Request) (net.Conn, error) {
	if s.Take == nil {
		return s.Dial(ctx, r)
	}
	by, err := s.Take(ctx, r)
	if err != nil {
		return nil, err
	}
	return &taken{by: by}, nil
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
