package soak

import (
	"context"
	"net"
	"sync"

	"pthost/ptipc/localnet"
	"pthost/ptipc/relay"
)

// A Wire stands between a transport's client and its server, and can be cut.
type Wire struct {
	listener net.Listener
	serving  sync.WaitGroup

	mu    sync.Mutex
	cut   context.CancelFunc
	whole context.Context
}

// NewWire listens on the loopback for connections to server.
func NewWire(server string) (*Wire, error) {
	l, err := localnet.ListenTCP("127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	w := &Wire{listener: l}
	w.whole, w.cut = context.WithCancel(context.Background())
	w.serving.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return // Close
			}
			w.mu.Lock()
			whole := w.whole
			w.mu.Unlock()
			w.serving.Go(func() {
				var d net.Dialer
				onward, err := d.DialContext(whole, "tcp", server)
				if err != nil {
					conn.Close()
					return
				}
				_ = relay.Join(whole, conn, onward) // that it breaks is what it is for
			})
		}
	})
	return w, nil
}

// Addr is where the client is to connect.
func (w *Wire) Addr() string { return w.listener.Addr().String() }

// Cut resets everything that is open.
func (w *Wire) Cut(context.Context) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.cut()
	w.whole, w.cut = context.WithCancel(context.Background())
	return nil
}

// Close ends the wire.
func (w *Wire) Close() error {
	err := w.listener.Close()
	w.mu.Lock()
	w.cut()
	w.mu.Unlock()
	w.serving.Wait()
	return err
}
