package host

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"pthost/ptipc"
	"pthost/ptipc/localnet"
	"pthost/ptipc/proc"
	"pthost/ptipc/relay"
	"pthost/ptipc/stdio"
	"pthost/socks"
)

// The roles of a child that a [Dialect] starts.
const (
	RoleClient = roleClient
	RoleServer = roleServer
)

// A Dialect is how a host speaks with children that know another protocol than that
// of this project: how they are told what to do, what they say, and how a connection
// is opened through them. Supervision, state, stopping, restarts, the way out,
// statistics, deliveries and logs are the host's own for all of them.
//
// Its methods may be called from several goroutines.
type Dialect interface {
	// Start says how a child is started. It is called for each child anew. What is
	// wrong with the configuration is a [*ptipc.ConfigError].
	Start(l Launch) (*Session, error)

	// Deliveries says how a server brings connections: one function for each
	// loopback address that the host is to listen at, in the order of
	// [Launch.Deliver]. It is called once for a server, before its first child; of l
	// Deliver is not set.
	Deliveries(l Launch) ([]TakeFunc, error)
}

// A TakeFunc runs the handshake of one connection that a server has brought, and
// returns the client's address as the wire saw it, "" when the server does not say.
// It must read nothing of the client's stream. conn has a deadline.
type TakeFunc func(conn net.Conn) (remote string, err error)

// A Generator is a Dialect that can make configurations (SRV-6).
type Generator interface {
	// Generate makes the configuration of a server from options. The host runs that
	// server once, and finish makes the two configurations of what it has announced.
	Generate(options ptipc.Opaque) (config ptipc.Opaque, finish func([]stdio.SMethod) (client, server ptipc.Opaque, err error), err error)
}

// A Launch is what a host knows about a child that is to be started.
type Launch struct {
	Role       string           // RoleClient or RoleServer
	Config     ptipc.Opaque     // one JSON object
	Dir        string           // the state directory, which is the child's working directory
	Proxy      string           // URL of the upstream proxy, a secret; "" for none
	Deliver    []string         // of a server: where it brings connections, each a loopback ip:port
	Credential *proc.Credential // who the child runs as; nil for the host's own user
}

// A Session is how one child is run. The zero value is a child that is told nothing,
// and whose control lines are those of PT 1.0.
type Session struct {
	Args    []string // behind those of Command.Args
	Environ []string // "key=value", on top of the child's environment
	Unset   string   // variables whose names begin with it are taken away before; "" takes none
	Stdin   []byte   // the first line of standard input, without its LF; nil for none

	// SignalOnly says that the end of standard input tells the child nothing, so that
	// stopping begins with SIGTERM.
	SignalOnly bool

	// Line reads a line of standard output. nil is [stdio.Parse].
	Line func(line []byte) (stdio.Message, error)
	// Stderr reads a line of standard error, and returns nil when it is for people.
	// nil takes all of them as such.
	Stderr func(line string) stdio.Message
	// Announce, if set, speaks for a child that says nothing itself: it waits until
	// the child is ready and returns what the child would announce, with the end of
	// the announcements. ctx ends with the start, or with the child.
	Announce func(ctx context.Context) ([]stdio.Message, error)

	// Versions are the words of VERSION that are taken. Empty takes any.
	Versions []string
	// Protocols are the words of CMETHOD that Connect knows. Empty is socks5 alone.
	Protocols []string
	// Names are the connection factories or servers that were asked for: what else a
	// child announces is passed over. Empty takes any.
	Names []string

	// Connect opens a stream over conn, a connection to the announced socket. settings
	// may be nil; dest is "" for factories that are bound, which all of a dialect are
	// unless Command.Bound says otherwise. When it returns nil, conn is the stream.
	// ctx, and the errors, are as with [socks.Connect]. nil says that conn is the
	// stream as it is.
	Connect func(ctx context.Context, conn net.Conn, m stdio.CMethod, settings ptipc.Opaque, dest string) error

	own bool // the protocol of spec/ptipc.md, with what it has beyond this
}

// session says how the next child is run.
func (s *supervisor) session(ends bool) (*Session, error) {
	if s.command.Dialect != nil {
		return s.command.Dialect.Start(s.launch())
	}
	args, firstLine, err := s.arguments(ends)
	return &Session{
		own: true, Args: args, Stdin: firstLine, Versions: []string{fmt.Sprint(stdio.ProtocolVersion)},
		Connect: func(ctx context.Context, conn net.Conn, _ stdio.CMethod, settings ptipc.Opaque, dest string) error {
			return socks.Connect(ctx, conn, settings, dest)
		},
	}, err
}

func (s *supervisor) launch() Launch {
	return Launch{
		Role: s.role, Config: s.config, Dir: s.path, Proxy: s.proxy, Deliver: s.ports, Credential: s.command.Credential,
	}
}

// environ is the child's environment; nil is this process's own.
func (c *Command) environ(session *Session) []string {
	if len(session.Environ) == 0 && session.Unset == "" {
		return c.Environ
	}
	environ := c.Environ
	if environ == nil {
		environ = os.Environ()
	}
	environ = slices.DeleteFunc(slices.Clone(environ), func(variable string) bool {
		return session.Unset != "" && strings.HasPrefix(variable, session.Unset)
	})
	return append(environ, session.Environ...)
}

// finishWait is how long a child may take after its standard input was closed.
func (c *Command) finishWait(session *Session) time.Duration {
	if session.SignalOnly {
		return -1
	}
	return c.StopTimeout
}

func (s *Session) parse(line []byte) (stdio.Message, error) {
	if s.Line != nil {
		return s.Line(line)
	}
	return stdio.Parse(line)
}

// announceFor has the dialect speak for a child that says nothing.
func (c *child) announceFor(ctx context.Context) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	ended := make(chan struct{})
	defer close(ended)
	go func() {
		select {
		case <-c.proc.Done():
			cancel()
		case <-ended:
		}
	}()
	messages, err := c.session.Announce(ctx)
	if err != nil {
		if ctx.Err() == nil { // otherwise the end of the child, or of the start, says more
			c.fail(err)
		}
		return
	}
	for _, m := range messages {
		c.announcement(m)
	}
}

// stderr takes one line of the child's standard error.
func (c *child) stderr(line string) {
	if c.session.Stderr != nil {
		if m := c.session.Stderr(line); m != nil {
			if c.trace != nil {
				c.trace(true, stdio.Mask([]byte(line)))
			}
			c.announcement(m)
		}
	}
	c.say(slog.LevelInfo, "child wrote to standard error", "line", line)
}

// wanted reports whether an announced name was asked for.
func (c *child) wanted(name string) bool {
	if len(c.session.Names) == 0 || slices.Contains(c.session.Names, name) {
		return true
	}
	c.say(slog.LevelWarn, "the child announced what it was not asked for; it was passed over", "name", name)
	return false
}

// connect opens a stream over a connection to the child's socket.
func (c *child) connect(ctx context.Context, conn net.Conn, m method, settings ptipc.Opaque, dest string) error {
	if c.session.Connect == nil {
		return nil
	}
	return c.session.Connect(ctx, conn, m.announced, settings, dest)
}

// generateByServer makes configurations by running a server once, for a dialect whose children
// have no role of their own for it.
func (c *Command) generateByServer(ctx context.Context, options ptipc.Opaque, env ptipc.Env) (client, server ptipc.Opaque, err error) {
	generator, ok := c.Dialect.(Generator)
	if !ok {
		return nil, nil, fmt.Errorf("children of this dialect make no configurations; write them by hand: %w", ptipc.ExitUsage)
	}
	if env.Local == "" {
		return nil, nil, fmt.Errorf("the keys of a server of this dialect are in its state directory, and none is named: %w", ptipc.ExitUsage)
	}
	config, finish, err := generator.Generate(options)
	if err != nil {
		return nil, nil, err
	}
	s, err := c.startServer(ctx, config, env, true)
	if err != nil {
		return nil, nil, err
	}
	var announced []stdio.SMethod
	for _, name := range slices.Sorted(maps.Keys(s.methods)) {
		m := s.methods[name]
		announced = append(announced, stdio.SMethod{Name: name, Addr: m.wire, Args: m.args})
	}
	if err := s.Close(); err != nil {
		return nil, nil, err
	}
	return finish(announced)
}

// report tells the operator what the clients of a server need to know (SRV-2): a
// dialect's servers make it up themselves.
func (c *child) report(ctx context.Context) {
	for _, name := range slices.Sorted(maps.Keys(c.methods)) {
		m := c.methods[name]
		attrs := []slog.Attr{slog.String("transport", name), slog.String("listens", m.wire)}
		for _, arg := range m.args {
			attrs = append(attrs, slog.String(arg.Key, arg.Value))
		}
		c.env.Report(ctx, attrs...)
	}
}

// takeTimeout bounds the handshake of a delivery, as SOCKS-9 does.
const takeTimeout = socks.DefaultHandshakeTimeout

// ports are the loopback sockets to which a dialect's server brings connections.
type ports struct {
	listeners []*localnet.GuardedListener
	work      sync.WaitGroup

	mu     sync.Mutex
	early  map[net.Conn]struct{} // those in their handshake
	closed bool
}

// openPorts makes the sockets to which a dialect's child brings connections. They
// are for its user and ours (SRV-4).
func (s *served) openPorts(uids []uint32) error {
	takes, err := s.s.command.Dialect.Deliveries(s.s.launch())
	if err != nil {
		return err
	}
	if !localnet.Supported("tcp") {
		return fmt.Errorf("a server of this dialect brings its connections to a port, which would be open to other users: %w", localnet.ErrUnsupported)
	}
	s.ports = &ports{early: map[net.Conn]struct{}{}}
	for _, take := range takes {
		listener, err := localnet.ListenTCP("127.0.0.1:0")
		if err != nil {
			s.ports.close()
			return err
		}
		guarded := localnet.Guard(listener, s.s.log, uids...)
		s.ports.listeners = append(s.ports.listeners, guarded)
		s.s.ports = append(s.s.ports, listener.Addr().String())
		s.ports.work.Go(func() { s.acceptAt(guarded, take) })
	}
	return nil
}

func (s *served) acceptAt(listener net.Listener, take TakeFunc) {
	for {
		conn, err := listener.Accept()
		if err != nil {
			if !errors.Is(err, net.ErrClosed) {
				s.s.log.Error("connections cannot be delivered any more", "err", err)
			}
			return
		}
		select {
		case s.slots <- struct{}{}:
		default:
			s.s.log.Warn("a delivered connection was refused", "err", fmt.Errorf("%d wait to be accepted already", backlog))
			_ = relay.Abort(conn) // the child is not to take it for one that ended
			continue
		}
		// One silent delivery must not hold up the others (SOCKS-9).
		if !s.ports.begin(conn) {
			_ = conn.Close()
			return
		}
		s.ports.work.Go(func() {
			remote, err := s.takeAt(conn, take)
			s.ports.end(conn)
			if err != nil {
				<-s.slots
				s.s.log.Debug("a delivered connection was refused", "err", err)
				_ = relay.Abort(conn)
				return
			}
			s.accepted <- s.s.meter.Conn(conn, relay.Options{Remote: remote})
		})
	}
}

func (s *served) takeAt(conn net.Conn, take TakeFunc) (net.Addr, error) {
	if err := conn.SetDeadline(time.Now().Add(takeTimeout)); err != nil {
		return nil, err
	}
	remote, err := take(conn)
	if err != nil {
		return nil, err
	}
	if remote == "" {
		remote = "unknown" // the child's socket is not who is at the other end
	}
	return remoteAddr(remote), conn.SetDeadline(time.Time{})
}

func (p *ports) begin(conn net.Conn) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.closed {
		p.early[conn] = struct{}{}
	}
	return !p.closed
}

func (p *ports) end(conn net.Conn) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.early, conn)
}

// close stops listening and cuts what is in its handshake.
func (p *ports) close() {
	for _, l := range p.listeners {
		_ = l.Close() // nothing was written through it
	}
	p.mu.Lock()
	p.closed = true
	for conn := range p.early {
		_ = conn.SetDeadline(time.Unix(1, 0)) // wakes the handshake, which closes it
	}
	p.mu.Unlock()
	p.work.Wait()
}
