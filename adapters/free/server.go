package free

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"pthost/ptipc"
	"pthost/ptipc/egress"
	"pthost/ptipc/relay"
)

const (
	headerTimeout = 10 * time.Second // from accept to the end of the header (FREE-4)
	drainTimeout  = 5 * time.Second  // what streams have left when the server closes (FREE-14)

	answerWriteTimeout = drainTimeout // an answer is two bytes on an empty carrier

	maxStreams = 16384 // at any one time, those included whose header is to come (FREE-4)

	// maxEarly bounds what is read of a stream before its destination is connected,
	// in bytes (FREE-9). It is no more than any socket takes in one write, so that
	// passing it on does not wait for the destination to read.
	maxEarly = 16 << 10

	lingerTime  = time.Second // how long a refused client's bytes are read and dropped,
	lingerBytes = 64 << 10    // and how many of them
)

var (
	errClosed = errors.New("it was closed")
	errHungUp = errors.New("the client hung up during the dial")
)

// ServerConfig is the configuration of a free server, and the form of the
// options that GenerateConfig takes (FREE-13).
type ServerConfig struct {
	// Egress says where the server may dial.
	Egress egress.Policy `json:"egress,omitzero"`
	// Carrier is the configuration of the transport underneath; in the options of
	// GenerateConfig, its options.
	Carrier ptipc.Opaque `json:"carrier,omitempty"`
}

// Server makes a server that connects each client to where it wants to go of one
// that hands its connections over. carrier must have Listen.
//
// Destinations are dialled by Env.DialOut, within the policy. The server's
// statistics count streams that reached their destination. Failed adds to the
// carrier's own failures those that did not.
//
// Close stops listening and gives streams five seconds before it cuts them (FREE-14).
func Server(carrier ptipc.ServerFactory) ptipc.ServerFactory {
	return ptipc.ServerFactory{
		GenerateConfig: func(ctx context.Context, options ptipc.Opaque, env ptipc.Env) (client, server ptipc.Opaque, err error) {
			return generate(ctx, carrier, options, env)
		},
		Proxy: func(ctx context.Context, config ptipc.Opaque, env ptipc.Env) (ptipc.ServerManager, error) {
			return proxy(ctx, carrier, config, env)
		},
	}
}

func generate(ctx context.Context, carrier ptipc.ServerFactory, options ptipc.Opaque, env ptipc.Env) (client, server ptipc.Opaque, err error) {
	if carrier.GenerateConfig == nil {
		return nil, nil, fmt.Errorf("free: the carrier's server cannot generate a configuration: write it: %w", ptipc.ExitUsage)
	}
	var config ServerConfig
	if err := options.Decode(&config); err != nil {
		return nil, nil, err
	}
	client, config.Carrier, err = carrier.GenerateConfig(ctx, config.Carrier, env)
	if err != nil {
		return nil, nil, ofCarrier(err)
	}
	if server, err = json.Marshal(config); err != nil {
		return nil, nil, fmt.Errorf("free: the carrier generated what is not JSON: %w", err)
	}
	return client, server, nil // FREE-13
}

// ofCarrier puts the pointer of a configuration error where the carrier's
// configuration is in the whole (ERR-3).
func ofCarrier(err error) error {
	var config *ptipc.ConfigError
	if !errors.As(err, &config) {
		return err
	}
	whole := *config
	whole.Pointer = "/carrier" + config.Pointer
	return &whole
}

func proxy(ctx context.Context, carrier ptipc.ServerFactory, config ptipc.Opaque, env ptipc.Env) (ptipc.ServerManager, error) {
	if carrier.Listen == nil {
		return nil, fmt.Errorf("free: the carrier's server hands no connections over, it is free already: leave the adapter out: %w", ptipc.ExitConfig)
	}
	var c ServerConfig
	if err := config.Decode(&c); err != nil {
		return nil, err
	}
	listener, err := carrier.Listen(ctx, c.Carrier, env)
	if err != nil {
		return nil, ofCarrier(err)
	}
	// FREE-12
	return serve(listener, c.Egress.Dialer(env.DialOut), env.Logger(), drainTimeout), nil
}

// serve starts a server that dials by dial and gives streams the time drain when
// it is closed.
func serve(listener ptipc.Listener, dial dialFunc, log *slog.Logger, drain time.Duration) *server {
	s := &server{
		listener: listener,
		unlisten: sync.OnceValue(listener.Close),
		dial:     dial,
		log:      log,
		drain:    drain,
		slots:    make(chan struct{}, maxStreams),
		ended:    make(chan struct{}),
		windows:  newBudget(extraWindow),
	}
	s.closing, s.stop = context.WithCancelCause(context.Background())
	s.relays, s.cut = context.WithCancelCause(context.Background())
	go s.run()
	return s
}

type dialFunc = func(ctx context.Context, network, addr string) (net.Conn, error)

// A server takes carriers from a listener and joins them to their destinations.
type server struct {
	listener ptipc.Listener
	unlisten func() error
	dial     dialFunc
	log      *slog.Logger
	drain    time.Duration

	out     relay.Meter // the connections to destinations
	failed  atomic.Uint64
	slots   chan struct{} // one for each stream
	streams sync.WaitGroup
	windows *budget

	closing context.Context // ends with Close, and with it what does not relay yet
	stop    context.CancelCauseFunc
	relays  context.Context // ends when what relays is to be cut
	cut     context.CancelCauseFunc

	ended chan struct{}
	err   error // valid once ended is closed
}

func (s *server) Addr() net.Addr { return s.listener.Addr() }

func (s *server) Stats() ptipc.TransportStats {
	out := s.out.Stats()
	return ptipc.TransportStats{
		Active: out.Active,
		Opened: out.Opened,
		Failed: s.listener.Stats().Failed + s.failed.Load(),
		// What a destination was sent has been received from the wire.
		Received: out.Sent,
		Sent:     out.Received,
	}
}

func (s *server) Wait() error {
	<-s.ended
	return s.err
}

func (s *server) Close() error {
	s.stop(errClosed)
	err := s.unlisten()
	<-s.ended
	return err
}

// run serves until Close, or until the listener fails.
func (s *server) run() {
	s.err = s.accept()
	s.stop(errClosed)
	_ = s.unlisten()                                              // Close reports it; after a failed accept that one counts
	timer := time.AfterFunc(s.drain, func() { s.cut(errClosed) }) // FREE-14
	s.streams.Wait()
	timer.Stop()
	s.cut(errClosed)
	close(s.ended)
}

// accept takes carriers. It waits for none of them, except when there are as
// many as there may be (FREE-4).
func (s *server) accept() error {
	var pause time.Duration
	for {
		select {
		case s.slots <- struct{}{}:
		case <-s.closing.Done():
			return nil
		}
		carrier, err := s.listener.Accept()
		if err == nil {
			pause = 0
			s.streams.Go(func() {
				defer func() { <-s.slots }()
				s.carry(carrier)
			})
			continue
		}
		<-s.slots
		if s.closing.Err() != nil {
			return nil
		}
		if !passing(err) {
			return fmt.Errorf("free: accept on %s: %w", s.listener.Addr(), err)
		}
		if pause == 0 {
			s.log.Warn("cannot accept carriers for now", "listener", s.listener.Addr(), "err", err)
		}
		pause = min(max(2*pause, 5*time.Millisecond), time.Second)
		select {
		case <-time.After(pause):
		case <-s.closing.Done():
		}
	}
}

// passing reports whether an error of accept can go away by itself: what the
// system reports for one connection, or for lack of means, can; what is wrong
// with the listener cannot.
func passing(err error) bool {
	var errno syscall.Errno
	return errors.As(err, &errno) && errno != syscall.EBADF && errno != syscall.EINVAL && errno != syscall.ENOTSOCK
}

func (s *server) carry(carrier net.Conn) {
	// Closing the server ends whatever waits for the carrier, until there is a
	// destination to join it to.
	stop := context.AfterFunc(s.closing, func() { _ = carrier.Close() })
	defer stop()
	wire, early, err := s.connect(carrier)
	if errors.Is(err, errMany) && stop() {
		s.carryMany(carrier)
		return
	}
	if err == nil && !stop() {
		_ = wire.Close()
		err = errClosed
	}
	if err == nil {
		err = answer(carrier, 0) // FREE-7
		if err != nil {
			_ = wire.Close()
			err = fmt.Errorf("%w: %w", errHungUp, err)
		}
	}
	if err != nil {
		s.failed.Add(1)
		s.refuse(carrier, err)
		return
	}
	_ = carrier.SetDeadline(time.Time{})
	ctx := s.relays
	out := s.out.Conn(wire, relay.Options{})
	if len(early) > 0 { // FREE-9
		if _, err := out.Write(early); err != nil {
			broken, cancel := context.WithCancelCause(ctx)
			cancel(err) // so that Join resets both
			ctx = broken
		}
	}
	// The carrier is handed over as it was accepted, so that the kernel can relay it.
	if err := relay.Join(ctx, carrier, out); err != nil {
		s.log.Debug("a stream broke", "client", carrier.RemoteAddr(), "err", err)
	}
}

// carryMany serves a carrier of many streams (FREE-15).
func (s *server) carryMany(carrier net.Conn) {
	_ = carrier.SetDeadline(time.Time{})
	c := newSession(carrier, s.windows, []byte{versionMany, 0})
	c.handlers = make(chan struct{}, maxPerCarrier)
	c.accept = s.carryStream
	c.refused = func() { s.failed.Add(1) }
	c.start()
	stopClose := context.AfterFunc(s.closing, c.close)
	stopCut := context.AfterFunc(s.relays, func() { c.abort(errClosed) })
	c.work.Wait()
	stopClose()
	stopCut()
	s.log.Debug("a carrier of many streams has ended", "client", carrier.RemoteAddr(), "err", c.err)
}

// carryStream connects one of many streams.
func (s *server) carryStream(stream *muxStream, open []byte) {
	var wire net.Conn
	err := fmt.Errorf("there are %d streams already: %w", maxStreams, ptipc.ErrGeneral)
	select {
	case s.slots <- struct{}{}: // FREE-4
		defer func() { <-s.slots }()
		wire, err = s.connectStream(stream, open)
	default:
	}
	if err != nil {
		s.failed.Add(1)
		s.log.Debug("refused a stream", "client", stream.RemoteAddr(), "err", err)
		stream.respond(ptipc.ClassOf(err))
		return
	}
	if !stream.respond(0) { // FREE-7
		s.failed.Add(1)
		_ = wire.Close()
		return
	}
	if err := relay.Join(s.relays, stream, s.out.Conn(wire, relay.Options{})); err != nil {
		s.log.Debug("a stream broke", "client", stream.RemoteAddr(), "err", err)
	}
}

func (s *server) connectStream(stream *muxStream, open []byte) (net.Conn, error) {
	dest, err := parseOpen(open)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancelCause(s.closing)
	defer cancel(nil)
	stream.watch(cancel)
	wire, err := s.dial(ctx, "tcp", dest)
	if err == nil && ctx.Err() != nil { // the client hung up, or the server was closed (FREE-24)
		_ = wire.Close()
		return nil, context.Cause(ctx)
	}
	return wire, err
}

// answer writes the answer, and gives up before a server that closes would cut.
func answer(carrier net.Conn, class ptipc.Class) error {
	_ = carrier.SetWriteDeadline(time.Now().Add(answerWriteTimeout))
	_, err := carrier.Write([]byte{version, byte(class)})
	return err
}

// connect reads the header and dials. early is what the client has sent behind
// its header by then.
func (s *server) connect(carrier net.Conn) (wire net.Conn, early []byte, err error) {
	_ = carrier.SetReadDeadline(time.Now().Add(headerTimeout)) // FREE-4; fails on a closed conn alone, as what follows does
	dest, err := readHeader(carrier)
	if err != nil {
		return nil, nil, err
	}
	return s.dialWatched(carrier, dest)
}

// dialWatched dials, and gives up when the client hangs up meanwhile (FREE-11).
func (s *server) dialWatched(carrier net.Conn, dest string) (wire net.Conn, early []byte, err error) {
	ctx, cancel := context.WithCancelCause(s.closing)
	defer cancel(nil)
	_ = carrier.SetReadDeadline(time.Time{})
	gone := false
	watched := make(chan struct{})
	go func() {
		defer close(watched)
		if early, gone = readEarly(carrier); gone {
			cancel(errHungUp)
		}
	}()
	wire, err = s.dial(ctx, "tcp", dest)
	_ = carrier.SetReadDeadline(time.Unix(1, 0)) // wakes the reader
	<-watched
	if gone {
		if err == nil {
			_ = wire.Close()
		}
		return nil, nil, errHungUp
	}
	return wire, early, err
}

// readEarly reads until its deadline, and returns what it has read and whether
// the client has hung up: the end of the stream behind nothing is a hang-up,
// behind early data it is a half-close, which whoever reads on sees again.
func readEarly(carrier net.Conn) (early []byte, gone bool) {
	buf := make([]byte, 2<<10)
	for len(early) < maxEarly {
		n, err := carrier.Read(buf[:min(len(buf), maxEarly-len(early))])
		early = append(early, buf[:n]...)
		switch {
		case err == nil:
		case errors.Is(err, os.ErrDeadlineExceeded): // the dial has ended
			return early, false
		case errors.Is(err, io.EOF) && len(early) > 0:
			return early, false
		default:
			return nil, true
		}
	}
	return early, false
}

// refuse tells the client why, in one byte, if it is there to be told (FREE-8).
// Bytes that it goes on sending are read and dropped for a while: closing over
// unread bytes can destroy the answer on its way.
func (s *server) refuse(carrier net.Conn, err error) {
	defer carrier.Close()
	// Only at debug level: the text can name destinations.
	s.log.Debug("refused a stream", "client", carrier.RemoteAddr(), "err", err)
	if s.closing.Err() != nil || errors.Is(err, errSilent) || errors.Is(err, errHungUp) {
		return
	}
	if answer(carrier, ptipc.ClassOf(err)) != nil {
		return
	}
	_ = carrier.SetReadDeadline(time.Now().Add(lingerTime))
	if half, ok := carrier.(interface{ CloseWrite() error }); !ok || half.CloseWrite() != nil {
		return
	}
	_, _ = io.CopyN(io.Discard, carrier, lingerBytes) // until it ends, however it does
}
