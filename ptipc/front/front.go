// Package front is where programs connect that know nothing of transports: an
// ordinary SOCKS5 proxy, or a port that is forwarded.
//
//	listener, err := front.Listen("tcp://127.0.0.1:1080", logger)
//	if err != nil {
//		return err
//	}
//	server := front.SOCKS5(transport.Connections["example"], nil, logger)
//	go server.Serve(listener)
//	defer server.Shutdown(ctx)
//
// Names go on as names (SOCKS-13), and other users of the machine are refused.
// [ForwardPackets] and [SOCKS5WithPackets] are for datagrams, which go to addresses
// alone.
package front

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"pthost/ptipc"
	"pthost/ptipc/localnet"
	"pthost/ptipc/relay"
	"pthost/socks"
)

// dialTimeout bounds the dial of a forwarded connection, whose client cannot be
// told that it takes long.
const dialTimeout = time.Minute

// maxForwards bounds the connections of one forward.
const maxForwards = socks.DefaultMaxConns

// A Server serves what a front listens on.
type Server interface {
	// Serve accepts connections until Shutdown, and then returns nil, or until the
	// listener fails.
	Serve(l net.Listener) error
	// Shutdown stops accepting and waits for open connections; when ctx ends first,
	// it cuts them and says so.
	Shutdown(ctx context.Context) error
}

// Listen opens tcp://IP:PORT on the loopback, or unix:///PATH in a directory that
// belongs to this user alone. Only this user's programs get in.
func Listen(url string, log *slog.Logger) (net.Listener, error) {
	scheme, rest, _ := strings.Cut(url, "://")
	switch scheme {
	case "tcp":
		if !localnet.Supported("tcp") {
			return nil, fmt.Errorf("%s: other users of this machine could not be kept out: %w; listen on a unix socket", url, localnet.ErrUnsupported)
		}
		l, err := localnet.ListenTCP(rest)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", url, err)
		}
		return localnet.Guard(l, log), nil
	case "unix":
		dir, err := localnet.OpenDir(filepath.Dir(rest))
		if err != nil {
			return nil, fmt.Errorf("%s: %w", url, err)
		}
		l, err := dir.Listen(filepath.Base(rest))
		if err != nil {
			return nil, errors.Join(fmt.Errorf("%s: %w", url, err), dir.Close())
		}
		return &inDir{localnet.Guard(l, log), dir}, nil
	}
	return nil, fmt.Errorf("%q is not an address to listen on: write tcp://127.0.0.1:PORT or unix:///PATH", url)
}

// inDir keeps the directory of a unix socket open for as long as the socket.
type inDir struct {
	*localnet.GuardedListener
	dir *localnet.Dir
}

func (l *inDir) Close() error { return errors.Join(l.GuardedListener.Close(), l.dir.Close()) }

// SOCKS5 serves an ordinary SOCKS5 proxy, CONNECT without authentication, through
// a free factory. Every connection gets the same settings.
func SOCKS5(factory ptipc.ConnectionFactory, settings ptipc.Opaque, log *slog.Logger) Server {
	return &socks.Server{
		Plain: true,
		Dial: func(ctx context.Context, r *socks.Request) (net.Conn, error) {
			return factory.Dial(ctx, settings, r.Dest)
		},
		Log: log,
	}
}

// Forward passes every connection on to dest, which is "" for a bound factory. A
// connection that cannot be made is reset: the client has no other way to know.
func Forward(factory ptipc.ConnectionFactory, settings ptipc.Opaque, dest string, log *slog.Logger) Server {
	return newForward(log, func(ctx context.Context, _ net.Conn) (net.Conn, error) {
		return factory.Dial(ctx, settings, dest)
	})
}

// Bring passes every connection on to what dial connects it with. client is for its
// addresses only. A connection whose dial fails is reset.
func Bring(dial func(ctx context.Context, client net.Conn) (net.Conn, error), log *slog.Logger) Server {
	return newForward(log, dial)
}

// forward passes each connection on to what dial connects it with.
type forward struct {
	dial  func(ctx context.Context, client net.Conn) (net.Conn, error)
	log   *slog.Logger
	ctx   context.Context
	cut   context.CancelFunc
	slots chan struct{}
	open  sync.WaitGroup

	mu        sync.Mutex
	closing   bool
	listeners map[net.Listener]bool
}

func newForward(log *slog.Logger, dial func(ctx context.Context, client net.Conn) (net.Conn, error)) *forward {
	ctx, cut := context.WithCancel(context.Background())
	return &forward{
		dial: dial, log: log, ctx: ctx, cut: cut,
		slots: make(chan struct{}, maxForwards), listeners: map[net.Listener]bool{},
	}
}

func (f *forward) Serve(l net.Listener) error {
	defer l.Close()
	if !f.enter(func() { f.listeners[l] = true }) {
		return nil
	}
	for {
		f.slots <- struct{}{}
		conn, err := l.Accept()
		if err != nil {
			<-f.slots
			if !f.enter(func() { delete(f.listeners, l) }) {
				return nil
			}
			return fmt.Errorf("forward: accept on %s: %w", l.Addr(), err)
		}
		if !f.enter(func() { f.open.Add(1) }) {
			<-f.slots
			return conn.Close()
		}
		go func() {
			defer f.open.Done()
			defer func() { <-f.slots }()
			f.serve(conn)
		}()
	}
}

// enter runs step unless Shutdown has begun.
func (f *forward) enter(step func()) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	if !f.closing {
		step()
	}
	return !f.closing
}

func (f *forward) serve(conn net.Conn) {
	ctx, cancel := context.WithTimeout(f.ctx, dialTimeout)
	wire, err := f.dial(ctx, conn)
	cancel()
	if err != nil {
		f.log.Warn("a connection could not be forwarded", "err", err)
		_ = relay.Abort(conn)
		return
	}
	if err := relay.Join(f.ctx, conn, wire); err != nil {
		f.log.Debug("a forwarded connection broke", "err", err)
	}
}

func (f *forward) Shutdown(ctx context.Context) error {
	f.mu.Lock()
	f.closing = true
	for l := range f.listeners {
		_ = l.Close()
	}
	f.mu.Unlock()
	done := make(chan struct{})
	go func() { f.open.Wait(); close(done) }()
	select {
	case <-done:
		return nil
	case <-ctx.Done():
	}
	f.cut()
	<-done
	return fmt.Errorf("forward: connections were cut: %w", context.Cause(ctx))
}
