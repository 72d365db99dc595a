package free

import (
	"context"
	"errors"
	"fmt"
	"net"
	"time"

	"pthost/ptipc"
	"pthost/ptipc/relay"
)

// answerTimeout bounds a dial from its carrier's opening to the answer, for
// callers whose context does not. It is longer than a server takes to dial.
const answerTimeout = time.Minute

// Client makes a bound transport free. Its configuration and settings are those
// of open, unchanged (FREE-13); each of its connection factories keeps its name,
// and takes a destination. Dial returns once the far end has answered, with the
// class of the failure there if there was one. Statistics count the bytes of
// streams, without headers and answers.
//
// A transport with a factory that is free already is refused.
func Client(open ptipc.TransportFactory) ptipc.TransportFactory { return client(open, false) }

// Mux is [Client] with many streams on one carrier (FREE-15): a stream costs one
// round trip and no handshake of the carrier's. A few carriers are kept for streams
// with the same settings, and closed a minute after the last; streams that move bulk
// have others moved out of their way. Where the far end takes one stream for each
// carrier, so does Mux.
func Mux(open ptipc.TransportFactory) ptipc.TransportFactory { return client(open, true) }

func client(open ptipc.TransportFactory, many bool) ptipc.TransportFactory {
	return func(ctx context.Context, config ptipc.Opaque, env ptipc.Env) (*ptipc.Transport, error) {
		inner, err := open(ctx, config, env)
		if err != nil {
			return nil, err
		}
		meter := new(relay.Meter)
		closeAll := inner.Close
		connections := make(map[string]ptipc.ConnectionFactory, len(inner.Connections))
		for name, factory := range inner.Connections {
			if !factory.Bound {
				err := fmt.Errorf("free: connection factory %q is free already: leave the adapter out: %w", name, ptipc.ExitConfig)
				return nil, errors.Join(err, inner.Close())
			}
			dialStream := func(ctx context.Context, settings ptipc.Opaque, dest string) (net.Conn, error) {
				return dial(ctx, factory, settings, dest)
			}
			if many {
				m := newMux(factory)
				dialStream = m.dial
				below := closeAll
				closeAll = func() error { return m.close(below) }
			}
			connections[name] = meter.Factory(false, dialStream)
		}
		return &ptipc.Transport{
			Connections: connections,
			Stats:       func(context.Context) (ptipc.TransportStats, error) { return meter.Stats(), nil },
			Wait:        inner.Wait,
			Close:       closeAll,
		}, nil
	}
}

func dial(ctx context.Context, carrier ptipc.ConnectionFactory, settings ptipc.Opaque, dest string) (net.Conn, error) {
	header, err := appendHeader(nil, dest)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, answerTimeout)
	defer cancel()
	conn, err := carrier.Dial(ctx, settings, "")
	if err != nil {
		return nil, err
	}
	if err := exchange(ctx, conn, header); err != nil {
		_ = conn.Close() // closed for the second time, if ctx has ended
		return nil, err
	}
	return conn, nil
}

// exchange sends the header and reads the answer. When ctx ends it closes conn,
// which the far end takes as a hang-up (FREE-11).
func exchange(ctx context.Context, conn net.Conn, header []byte) error {
	closed := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(closed)
		_ = conn.Close() // the error that counts is the context's
	})
	_, werr := conn.Write(header)
	// The answer counts, also when the write fails: a server that refuses stops
	// reading (FREE-8).
	err := readAnswer(conn)
	var refused ptipc.Class
	if werr != nil && !errors.As(err, &refused) {
		err = fmt.Errorf("free: cannot send the header: %w", werr)
	}
	if !stop() {
		<-closed
		err = fmt.Errorf("free: the far end has not answered: %w", context.Cause(ctx))
	}
	return err
}
