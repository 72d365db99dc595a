package host

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"sync"
	"syscall"
	"time"

	"pthost/ptipc"
	"pthost/ptipc/internal/tally"
	"pthost/ptipc/localnet"
	"pthost/ptipc/relay"
	"pthost/socks"
)

// supervisor keeps one child running: it owns the state directory, the way out
// that the child is given, and the connections made through it.
type supervisor struct {
	command  *Command
	role     string
	config   ptipc.Opaque
	env      ptipc.Env
	log      *slog.Logger
	path     string // of the state directory
	dir      *localnet.Dir
	locked   *localnet.Dir // the same, or what it was before it got another owner
	temp     bool          // the state directory is removed in the end
	proxy    string        // URL of the child's way out; "" is direct
	deliver  string        // where a server brings connections (SRV-3); "" for other roles
	ports    []string      // the same in a dialect
	out      *socks.Server
	meter    relay.Meter
	signals  chan ptipc.Message // of the child, to be carried; nil if nobody does
	dropped  *tally.Warning     // those that nobody carried in time
	carrying sync.WaitGroup

	stop     context.CancelFunc // asks supervise to end
	stopping context.Context
	done     chan struct{} // closed when supervise has ended

	mu      sync.Mutex
	current *child        // nil between two children
	changed chan struct{} // closed when current changes or the supervision ends
	sockets map[*packetSocket]struct{}
	ended   bool
	err     error // why it ended; nil after Close
}

func newSupervisor(c *Command, role string, config ptipc.Opaque, env ptipc.Env) (*supervisor, error) {
	var object map[string]json.RawMessage
	if err := config.Decode(&object); err != nil { // ARG-3
		return nil, err
	}
	s := &supervisor{
		command: c, role: role, config: config, env: env, log: env.Logger(), proxy: c.Proxy,
		changed: make(chan struct{}), done: make(chan struct{}),
	}
	s.stopping, s.stop = context.WithCancel(context.Background())
	s.dropped = tally.New(s.log, "signals of the child were dropped: those before them were not carried yet")
	if env.Signals != nil && c.Dialect == nil {
		s.signals = make(chan ptipc.Message, maxSignals)
	}
	err := s.openState()
	if err == nil && env.DialOut != nil {
		err = s.serveProxy()
	}
	if err != nil {
		s.release()
		return nil, err
	}
	return s, nil
}

// openState makes the state directory and keeps others out of it (LIFE-8).
func (s *supervisor) openState() error {
	s.path = s.env.Local
	if s.path == "" {
		path, err := os.MkdirTemp("", "ptipc-")
		if err != nil {
			return err
		}
		s.path, s.temp = path, true
	} else if err := os.MkdirAll(s.path, 0o700); err != nil {
		return err
	}
	dir, err := localnet.OpenDir(s.path)
	cred := s.command.Credential
	if cred != nil && errors.Is(err, fs.ErrPermission) {
		// An earlier run has given it away already.
		if given, e := localnet.OpenDir(s.path, cred.UID); e == nil {
			dir, err = given, nil
		}
	}
	if err != nil {
		return err
	}
	s.dir, s.locked, s.path = dir, dir, dir.Path()
	if err := dir.Lock(); err != nil || cred == nil {
		return err
	}
	// Not before it is known to be private and ours alone: chown changes whatever it
	// is pointed at.
	if err := os.Chown(s.path, int(cred.UID), int(cred.GID)); err != nil {
		return fmt.Errorf("giving the state directory to user %d: %w", cred.UID, err)
	}
	// Opened anew, it makes sockets that belong to its new owner.
	if dir, err = localnet.OpenDir(s.path, cred.UID); err != nil {
		return err
	}
	s.dir = dir
	return nil
}

// serveProxy makes the host the child's upstream proxy, so that the child's wire
// goes the way that the application's Env says.
func (s *supervisor) serveProxy() error {
	if !localnet.Supported("tcp") {
		return fmt.Errorf("Env.DialOut for a child process: a port of its own would be open to other users: %w", localnet.ErrUnsupported)
	}
	listener, err := localnet.ListenTCP("127.0.0.1:0")
	if err != nil {
		return err
	}
	uids := []uint32{uint32(os.Geteuid())}
	if cred := s.command.Credential; cred != nil {
		uids = append(uids, cred.UID)
	}
	s.out = &socks.Server{
		Plain: true,
		Dial: func(ctx context.Context, r *socks.Request) (net.Conn, error) {
			return s.env.DialOut(ctx, "tcp", r.Dest)
		},
		Log: s.log,
	}
	s.proxy = "socks5://" + listener.Addr().String()
	guarded := localnet.Guard(listener, s.log, uids...)
	go func() {
		if err := s.out.Serve(guarded); err != nil && s.stopping.Err() == nil {
			s.log.Error("the child's way out has ended", "err", err)
		}
	}()
	return nil
}

// release gives everything back but the child.
func (s *supervisor) release() {
	s.stop()
	s.carrying.Wait()
	s.dropped.Close()
	if s.out != nil {
		cut, cancel := context.WithCancel(context.Background())
		cancel()
		_ = s.out.Shutdown(cut) // what is left is to be cut
	}
	if s.dir != nil {
		_, _ = s.dir.Close(), s.locked.Close() // nothing was written through them
	}
	if s.temp {
		if err := os.RemoveAll(s.path); err != nil {
			s.log.Warn("the temporary state directory is left behind", "err", err)
		}
	}
}

func (s *supervisor) event(e Event) {
	s.log.Debug("child "+string(e.Kind), "path", s.command.Path, "pid", e.Pid, "err", e.Err, "delay", e.Delay)
	if s.command.Events != nil {
		s.command.Events(e)
	}
}

// start starts a child and tells of it. methods are what it has to announce, nil
// for the first one.
func (s *supervisor) start(ctx context.Context, methods map[string]method) (*child, error) {
	c, err := s.startChild(ctx)
	if err != nil {
		return nil, err
	}
	if methods != nil && !c.sameAs(methods) {
		s.abandon(c)
		return nil, fmt.Errorf("%w: after a restart it announces %s, and before it was %s (LIFE-7)",
			errAnnounced, describe(c.methods), describe(methods))
	}
	s.event(Event{Kind: Ready, Pid: c.proc.Pid()})
	if !c.session.own && c.role == roleServer {
		c.report(ctx)
	}
	return c, nil
}

// abandonWait is how long a child that was never used may take to end: it has
// nothing to finish, and whoever waits for its start wants to go on.
const abandonWait = 2 * time.Second

// abandon stops a child whose start has failed.
func (s *supervisor) abandon(c *child) {
	ctx, cancel := context.WithTimeout(context.Background(), abandonWait)
	defer cancel()
	s.reap(ctx, c)
}

// reap stops a child for good, whatever it does (LIFE-4).
func (s *supervisor) reap(ctx context.Context, c *child) {
	if err := c.proc.Stop(ctx); err != nil {
		s.log.Error("the child cannot be stopped", "err", err)
		return
	}
	s.event(Event{Kind: Exited, Pid: c.proc.Pid(), Err: c.proc.Err()})
}

// run starts the first child and its supervision. After an error nothing is left.
func (s *supervisor) run(ctx context.Context) (*child, error) {
	first, err := s.start(ctx, nil)
	if err != nil {
		s.release()
		return nil, err
	}
	s.publish(first)
	if s.signals != nil {
		s.carrySignals()
	}
	go s.supervise(first)
	return first, nil
}

// publish makes c the child that Dial uses.
func (s *supervisor) publish(c *child) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.current = c
	close(s.changed)
	s.changed = make(chan struct{})
	if c == nil {
		for socket := range s.sockets {
			socket.Lost() // one that only listens would not notice for a while (PKT-8)
		}
	}
}

// supervise watches the child and starts another one when it ends (LIFE-6).
func (s *supervisor) supervise(c *child) {
	err := s.watch(c)
	s.mu.Lock()
	s.ended, s.err, s.current = true, err, nil
	close(s.changed)
	s.mu.Unlock()
	cut, cancel := context.WithCancel(context.Background())
	cancel()
	_ = s.meter.Drain(cut) // nothing is behind these connections any more
	s.release()
	close(s.done)
}

func (s *supervisor) watch(c *child) error {
	restart := s.command.Restart.withDefaults()
	methods := c.methods
	failures := 0
	for {
		since := time.Now()
		select {
		case <-s.stopping.Done():
			s.reap(context.Background(), c)
			return nil
		case <-c.proc.Done():
		}
		s.publish(nil)
		err := c.proc.Err()
		s.event(Event{Kind: Exited, Pid: c.proc.Pid(), Err: err})
		if s.stopping.Err() != nil {
			return nil // it ended while Close was called
		}
		if time.Since(since) > restart.Max {
			failures = 0
		}
		for {
			failures++
			if restart.Never || final(err) || failures >= restart.GiveUpAfter {
				return s.giveUp(err, failures)
			}
			delay := restart.backoff(failures)
			s.event(Event{Kind: Restarting, Delay: delay})
			select {
			case <-s.stopping.Done():
				return nil
			case <-time.After(delay):
			}
			if c, err = s.start(s.stopping, methods); err == nil {
				break // Close is seen above
			}
			if s.stopping.Err() != nil {
				return nil
			}
			s.log.Warn("the child did not come back", "err", err)
		}
		s.publish(c)
	}
}

func (s *supervisor) giveUp(err error, failures int) error {
	switch {
	case s.command.Restart.Never:
		err = fmt.Errorf("transport %s ended: %w", s.command.name(), err)
	case final(err):
		err = fmt.Errorf("transport %s ended for good: %w", s.command.name(), err)
	default:
		err = fmt.Errorf("transport %s failed %d times in a row: %w", s.command.name(), failures, err)
	}
	if ptipc.ExitCodeOf(err) == ptipc.ExitOK {
		err = fmt.Errorf("%w: %w", ptipc.ExitUnavailable, err) // the child's success is nobody else's
	}
	s.event(Event{Kind: GaveUp, Err: err})
	return err
}

// transport is what the application holds.
func (s *supervisor) transport(methods map[string]method) *ptipc.Transport {
	t := &ptipc.Transport{
		Connections: make(map[string]ptipc.ConnectionFactory, len(methods)),
		Stats:       s.stats,
		Wait:        s.wait,
		Close: func() error {
			s.stop()
			return s.wait()
		},
	}
	for name, m := range methods {
		if m.turn != nil {
			if t.Packets == nil {
				t.Packets = map[string]ptipc.PacketFactory{}
			}
			name = packetName(name)
			t.Packets[name] = s.meter.Packets(func(ctx context.Context) (net.PacketConn, error) {
				conn, err := s.openPackets(ctx, name)
				if err != nil {
					return nil, fmt.Errorf("transport %s: %s: %w", s.command.name(), name, err)
				}
				return conn, nil
			})
			continue
		}
		t.Connections[name] = s.meter.Factory(m.bound, func(ctx context.Context, settings ptipc.Opaque, dest string) (net.Conn, error) {
			conn, err := s.dial(ctx, name, settings, dest)
			if err != nil {
				return nil, fmt.Errorf("transport %s: %s: %w", s.command.name(), name, err)
			}
			return conn, nil
		})
	}
	return t
}

func (s *supervisor) wait() error {
	<-s.done
	return s.err // written before done was closed
}

// child returns the child that runs, and waits for the next one when there is none.
func (s *supervisor) child(ctx context.Context) (*child, error) {
	for {
		s.mu.Lock()
		c, changed, ended, err := s.current, s.changed, s.ended, s.err
		s.mu.Unlock()
		switch {
		case ended && err != nil:
			return nil, err
		case ended:
			return nil, net.ErrClosed
		case c != nil:
			return c, nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return nil, fmt.Errorf("the child is being restarted: %w", context.Cause(ctx))
		}
	}
}

// dial opens one stream through whatever child runs. A child that has died but was
// not yet missed is the only reason to try again: the application's bytes come after
// the handshake. A child that dies of the handshake gets no third one.
func (s *supervisor) dial(ctx context.Context, name string, settings ptipc.Opaque, dest string) (*relay.Conn, error) {
	for again := false; ; again = true {
		c, err := s.child(ctx)
		if err != nil {
			return nil, err
		}
		m := c.methods[name]
		if err := checkDest(m.bound, dest); err != nil {
			return nil, err
		}
		raw, end, err := c.reach(ctx, m)
		if err != nil {
			if ctx.Err() == nil && c.gone(ctx) {
				continue
			}
			return nil, fmt.Errorf("the child does not take connections: %w", unreached(ctx, err))
		}
		if err := c.connect(ctx, raw, m, settings, dest); err != nil {
			_ = raw.Close()
			end.Release()
			if unanswered(err) && !again && ctx.Err() == nil && c.gone(ctx) {
				continue
			}
			return nil, err
		}
		options := relay.Options{Ask: c.asker(m, raw)}
		if end != nil {
			options.End, options.HandOver, options.OnClose = end, c.hands, end.Release
		}
		conn := s.meter.Conn(raw, options)
		s.mu.Lock()
		ended := s.ended
		s.mu.Unlock()
		if ended { // perhaps after what was open has been cut
			_ = conn.Abort()
			return nil, net.ErrClosed
		}
		return conn, nil
	}
}

// reach connects to a factory's socket. The end is nil if the child marks none, or
// if its socket is one that knows of resets.
func (c *child) reach(ctx context.Context, m method) (net.Conn, *localnet.End, error) {
	if m.ends && m.addr.Unix() {
		return c.dir.DialEnd(ctx, m.addr.Name(), c.ends)
	}
	conn, err := connect(ctx, c.dir, m.addr)
	return conn, nil, err
}

// unanswered reports whether a handshake ended without a word from the child.
func unanswered(err error) bool {
	return errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) ||
		errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE)
}

// unreached is the error of a connection to a child. It says nothing about the
// wire, so a refusal is not that of ERR-1; the end of ctx is.
func unreached(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return fmt.Errorf("%w: %w", context.Cause(ctx), err)
	}
	return ptipc.WithClass(ptipc.ErrGeneral, err)
}

// checkDest holds the application to SOCKS-11 and SOCKS-12 before anything is sent.
func checkDest(bound bool, dest string) error {
	switch {
	case bound && dest != "":
		return fmt.Errorf("a bound transport takes no destination, and %q was given: %w", dest, ptipc.ErrNotAllowed)
	case !bound && dest == "":
		return fmt.Errorf("a free transport needs a destination: %w", ptipc.ErrNotAllowed)
	}
	return nil
}

// asker asks the child for the statistics of one connection, where it can tell
// which one is meant. Elsewhere the host's own counts serve (STAT-3).
func (c *child) asker(m method, raw net.Conn) func() (ptipc.Stats, bool) {
	client := localnet.ClientName(raw.LocalAddr())
	if !m.stats || client == "" {
		return nil
	}
	return func() (stats ptipc.Stats, ok bool) {
		answer, err := c.ask(context.Background(), client)
		if err != nil || json.Unmarshal(answer, &stats) != nil {
			return ptipc.Stats{}, false
		}
		return stats, !stats.Opened.IsZero() // it is after null, and after what STAT-1 does not know
	}
}

// stats returns the host's own counts, which live through restarts (STAT-2).
func (s *supervisor) stats(context.Context) (ptipc.TransportStats, error) {
	return s.meter.Stats(), nil
}
