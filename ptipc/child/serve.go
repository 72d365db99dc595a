package child

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"

	"pthost/ptipc"
	"pthost/ptipc/localnet"
	"pthost/ptipc/relay"
	"pthost/ptipc/stdio"
	"pthost/socks"
)

// child is one run of a transport.
type child struct {
	dir       string
	host      stdio.Host
	out       *stdio.Writer
	transport *ptipc.Transport
	servers   []*socks.Server
	dirs      []*localnet.Dir
	serving   sync.WaitGroup

	open  relay.Meter // what is relayed now
	mu    sync.Mutex
	conns map[string]ptipc.Conn // by the client's name, for STATS (STAT-3)
}

// announce serves one connection factory and writes its CMETHOD line (LINE-4).
func (c *child) announce(i int, name string, factory ptipc.ConnectionFactory) error {
	listener, addr, err := c.listen(i)
	if err != nil {
		return err
	}
	server := &socks.Server{
		Bound: factory.Bound,
		Dial: func(ctx context.Context, r *socks.Request) (net.Conn, error) {
			conn, err := factory.Dial(ctx, r.Settings, r.Dest)
			if err != nil {
				return nil, err
			}
			return c.track(localnet.ClientName(r.Client.RemoteAddr()), conn), nil
		},
		Log: c.logger(),
	}
	c.servers = append(c.servers, server)
	c.serving.Go(func() {
		if err := server.Serve(listener); err != nil {
			c.logger().Error("a listener has failed", "factory", name, "err", err)
		}
	})
	args := stdio.Args{{Key: stdio.ArgStats, Value: "1"}}
	if factory.Bound {
		args = append(args, stdio.KV{Key: stdio.ArgBound, Value: "1"})
	}
	return c.out.Send(stdio.CMethod{Name: name, Protocol: stdio.ProtocolSOCKS5, Addr: addr, Args: args})
}

// track keeps a connection under its client's name until it is closed.
func (c *child) track(client string, conn ptipc.Conn) net.Conn {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.conns[client] = conn
	return c.open.Conn(conn, relay.Options{OnClose: func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		if c.conns[client] == conn {
			delete(c.conns, client)
		}
	}})
}

// serve runs until the host wants the end, or the transport has ended by itself.
func (c *child) serve(ctx context.Context, in *stdio.Reader) error {
	lines := make(chan error, 1)
	go func() { lines <- c.readLines(in) }()
	ended := make(chan error, 1)
	go func() { ended <- c.transport.Wait() }()

	select {
	case err := <-ended:
		if err == nil {
			err = errors.New("the transport has ended by itself")
		}
		return err
	case <-lines: // LIFE-2
		// When SIGTERM comes after the end of input, it means at once (LIFE-3).
		c.drain(ctx)
	case <-ctx.Done(): // LIFE-3
		c.drain(context.WithoutCancel(ctx))
	}
	return nil
}

// drain stops accepting and lets open connections finish, for a while.
func (c *child) drain(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, drainTimeout)
	defer cancel()
	var shut sync.WaitGroup
	for _, server := range c.servers {
		shut.Go(func() {
			if err := server.Shutdown(ctx); err != nil {
				c.logger().Info("connections were cut", "err", err)
			}
		})
	}
	shut.Wait()
}

// close ends everything at once.
func (c *child) close() {
	cut, cancel := context.WithCancel(context.Background())
	cancel()
	for _, server := range c.servers {
		_ = server.Shutdown(cut) // what is left is to be cut
	}
	c.serving.Wait()
	if err := c.transport.Close(); err != nil {
		c.logger().Error("the transport did not close", "err", err)
	}
	for _, dir := range c.dirs {
		_ = dir.Close() // nothing was written through it
	}
}

// readLines answers the host until its end of the pipe closes.
func (c *child) readLines(in *stdio.Reader) error {
	for {
		line, err := in.ReadLine()
		if errors.Is(err, stdio.ErrTooLong) {
			continue // LINE-1: nothing after it is lost
		}
		if err != nil {
			return err
		}
		message, err := stdio.ParseHost(line)
		if err != nil {
			c.logger().Debug("the host wrote a line that is not a control line", "err", err)
			continue
		}
		if request, ok := message.(stdio.StatsRequest); ok {
			if err := c.out.Send(stdio.StatsReply{ID: request.ID, JSON: c.stats(request.Client)}); err != nil {
				return err
			}
		}
	}
}

// stats answers STATS: of one connection, or the totals (STAT-1 to STAT-3).
func (c *child) stats(client string) json.RawMessage {
	var stats any
	if client == "" {
		totals, err := c.transport.Stats(context.Background())
		if err != nil {
			return nil
		}
		stats = totals
	} else {
		c.mu.Lock()
		conn, ok := c.conns[client]
		c.mu.Unlock()
		if !ok {
			return nil
		}
		stats = conn.Stats()
	}
	text, err := json.Marshal(stats)
	if err != nil {
		return nil
	}
	return text
}

// status passes bootstrap progress to the host (LINE-10, LIFE-1).
func (c *child) status(_ context.Context, attrs ...slog.Attr) {
	message := stdio.Status{}
	for _, a := range attrs {
		if a.Key == "transport" {
			message.Transport = a.Value.String()
			continue
		}
		message.Attrs = append(message.Attrs, stdio.KV{Key: a.Key, Value: a.Value.String()})
	}
	if err := c.out.Send(message); err != nil {
		c.logger().Debug("a status could not be told", "err", err)
	}
}

func (c *child) logger() *slog.Logger { return slog.New(&logHandler{out: c.out}) }

// logHandler writes records as LOG lines (LINE-9).
type logHandler struct {
	out *stdio.Writer
	// with is what WithAttrs and WithGroup have added, to be done again for each
	// record's own text handler.
	with []func(slog.Handler) slog.Handler
}

func (h *logHandler) Enabled(context.Context, slog.Level) bool { return true }

func (h *logHandler) Handle(ctx context.Context, r slog.Record) error {
	var attrs bytes.Buffer
	var text slog.Handler = slog.NewTextHandler(&attrs, &slog.HandlerOptions{
		Level: r.Level,
		ReplaceAttr: func(groups []string, a slog.Attr) slog.Attr {
			if len(groups) == 0 && (a.Key == slog.TimeKey || a.Key == slog.LevelKey || a.Key == slog.MessageKey) {
				return slog.Attr{} // the line has places of its own for these
			}
			return a
		},
	})
	for _, add := range h.with {
		text = add(text)
	}
	if err := text.Handle(ctx, r); err != nil {
		return err
	}
	message := r.Message
	if rest := bytes.TrimSpace(attrs.Bytes()); len(rest) > 0 {
		message = fmt.Sprintf("%s %s", message, rest)
	}
	return h.out.Send(stdio.Log{Level: r.Level, Message: message})
}

func (h *logHandler) WithAttrs(attrs []slog.Attr) slog.Handler {
	return h.plus(func(t slog.Handler) slog.Handler { return t.WithAttrs(attrs) })
}

func (h *logHandler) WithGroup(name string) slog.Handler {
	return h.plus(func(t slog.Handler) slog.Handler { return t.WithGroup(name) })
}

func (h *logHandler) plus(add func(slog.Handler) slog.Handler) slog.Handler {
	return &logHandler{out: h.out, with: append(h.with[:len(h.with):len(h.with)], add)}
}
