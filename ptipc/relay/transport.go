package relay

import (
	"context"
	"net"
	"sync"

	"pthost/ptipc"
)

// A DialFunc opens the wire of one stream: what an author of a transport writes.
// It has the arguments of [ptipc.ConnectionFactory].Dial.
type DialFunc func(ctx context.Context, settings ptipc.Opaque, dest string) (net.Conn, error)

// Factory makes a connection factory of dial: its connections and failures are
// counted here, and its errors answer errors.Is for their [ptipc.Class] (ERR-2).
func (m *Meter) Factory(bound bool, dial DialFunc) ptipc.ConnectionFactory {
	return ptipc.ConnectionFactory{
		Bound: bound,
		Dial: func(ctx context.Context, settings ptipc.Opaque, dest string) (ptipc.Conn, error) {
			if m.hasEnded() {
				return nil, net.ErrClosed
			}
			raw, err := dial(ctx, settings, dest)
			if err != nil {
				m.Failed()
				return nil, ptipc.Classify(err)
			}
			conn, ok := raw.(*Conn)
			if !ok || conn.meter != m {
				conn = m.Conn(raw, Options{})
			}
			if m.hasEnded() { // perhaps after what was open has been cut
				_ = conn.Abort()
				return nil, net.ErrClosed
			}
			return conn, nil
		},
	}
}

// Transport makes a transport of connection factories of this meter. Its Close lets no
// more connections be dialled, cuts those that are open and then runs end, which may
// be nil.
func (m *Meter) Transport(connections map[string]ptipc.ConnectionFactory, end func() error) *ptipc.Transport {
	closed := make(chan struct{})
	shut := sync.OnceValue(func() error {
		defer close(closed)
		m.end()
		cut, cancel := context.WithCancel(context.Background())
		cancel()
		_ = m.Drain(cut) // it reports that it cut what it was to cut
		if end != nil {
			return end()
		}
		return nil
	})
	return &ptipc.Transport{
		Connections: connections,
		Stats:       func(context.Context) (ptipc.TransportStats, error) { return m.Stats(), nil },
		Wait:        func() error { <-closed; return nil },
		Close:       shut,
	}
}

// Listener makes a server of a listener whose connections are those of its wire: they
// and the totals are counted here. Closing it leaves accepted connections alone.
func (m *Meter) Listener(l net.Listener) ptipc.Listener {
	return &listener{Listener: l, meter: m, closed: make(chan struct{})}
}

type listener struct {
	net.Listener
	meter  *Meter
	once   sync.Once
	closed chan struct{}
	err    error
}

// Accept returns a [*Conn].
func (l *listener) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return l.meter.Conn(conn, Options{}), nil
}

func (l *listener) Stats() ptipc.TransportStats { return l.meter.Stats() }

func (l *listener) Wait() error { <-l.closed; return nil }

func (l *listener) Close() error {
	l.once.Do(func() {
		l.err = l.Listener.Close()
		close(l.closed)
	})
	return l.err
}
