package host

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"os"
	"runtime"
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

// The roles of ARG-1.
const (
	roleClient   = "client"
	roleServer   = "server"
	roleGenerate = "generate"
)

// backlog is how many delivered connections wait for Accept.
const backlog = 1024

// Server is the server side of the executable. Whether its child hands connections
// over (Listen) or connects them itself (Proxy) is known once it runs: the other of
// the two fails then, and says so.
func (c *Command) Server() *ptipc.ServerFactory {
	return &ptipc.ServerFactory{
		Name:           c.name(),
		GenerateConfig: c.generate,
		Listen:         c.listen,
		Proxy:          c.proxyServer,
	}
}

// generate runs the executable in the role generate (SRV-6).
func (c *Command) generate(ctx context.Context, options ptipc.Opaque, env ptipc.Env) (client, server ptipc.Opaque, err error) {
	fail := func(err error) (ptipc.Opaque, ptipc.Opaque, error) {
		return nil, nil, fmt.Errorf("transport %s: generate: %w", c.name(), err)
	}
	if err := c.check(env); err != nil {
		return fail(err)
	}
	if c.Dialect != nil {
		if client, server, err = c.generateByServer(ctx, options, env); err != nil {
			return fail(err)
		}
		return client, server, nil
	}
	s, err := newSupervisor(c, roleGenerate, options, env)
	if err != nil {
		return fail(err)
	}
	defer s.release()
	args, firstLine, err := s.arguments(false)
	if err != nil {
		return fail(err)
	}
	var first []byte
	whole := false
	p, err := proc.Start(ctx, proc.Spec{
		Path: c.Path, Args: append(slices.Clone(c.Args), args...), Dir: s.path, Env: c.Environ, Launcher: c.Launcher, Credential: c.Credential,
		Sandbox: s.sandbox(), Limits: c.Limits, Log: s.log,
		MaxLine: stdio.MaxGenerated,
		OnLine: func(line []byte, truncated bool) {
			if first == nil {
				first, whole = slices.Clone(line), !truncated
			}
		},
	})
	if err != nil {
		return fail(err)
	}
	if firstLine != nil {
		if err := p.WriteLine(firstLine); err != nil {
			s.log.Debug("the options could not be handed over", "err", err)
		}
	}
	timeout := c.StartTimeout
	if timeout == 0 {
		timeout = defaultStartTimeout
	}
	ctx, cancel := context.WithTimeoutCause(ctx, timeout, fmt.Errorf("not done after %v: %w", timeout, context.DeadlineExceeded))
	defer cancel()
	select {
	case <-p.Done():
	case <-ctx.Done():
		at, cancel := context.WithTimeout(context.Background(), abandonWait)
		defer cancel()
		return fail(errors.Join(context.Cause(ctx), p.Stop(at)))
	}
	if err := p.Err(); ptipc.ExitCodeOf(err) != ptipc.ExitOK {
		return fail(err)
	}
	if !whole {
		return fail(fmt.Errorf("%w: it wrote no line on standard output (SRV-6)", errAnnounced))
	}
	generated, err := stdio.ParseGenerated(first)
	if err != nil {
		return fail(fmt.Errorf("%w: %w", errAnnounced, err))
	}
	return generated.Client, generated.Server, nil
}

// served is a child in the role server, through its restarts.
type served struct {
	s       *supervisor
	addr    net.Addr
	proxies bool
	methods map[string]method // of the first child

	// For a server that hands connections over:
	delivery *socks.Server
	ports    *ports        // in its place in a dialect
	slots    chan struct{} // one for each connection that waits for Accept
	accepted chan *relay.Conn

	mu   sync.Mutex
	from *child // the child that pids belong to
	pids []int  // as last looked up
}

var _ ptipc.Listener = (*served)(nil)

func (c *Command) listen(ctx context.Context, config ptipc.Opaque, env ptipc.Env) (ptipc.Listener, error) {
	if c.Plain {
		return nil, fmt.Errorf("transport %s: a plain child cannot be told where to deliver connections (ARG-6): %w", c.name(), ptipc.ExitUsage)
	}
	s, err := c.startServer(ctx, config, env, true)
	if err != nil {
		return nil, fmt.Errorf("transport %s: %w", c.name(), err)
	}
	return s, nil
}

func (c *Command) proxyServer(ctx context.Context, config ptipc.Opaque, env ptipc.Env) (ptipc.ServerManager, error) {
	if c.Dialect != nil {
		return nil, fmt.Errorf("transport %s: the servers of this dialect hand their connections over, and do not connect their clients themselves: %w", c.name(), ptipc.ExitUsage)
	}
	s, err := c.startServer(ctx, config, env, false)
	if err != nil {
		return nil, fmt.Errorf("transport %s: %w", c.name(), err)
	}
	return s, nil
}

func (c *Command) startServer(ctx context.Context, config ptipc.Opaque, env ptipc.Env, deliver bool) (*served, error) {
	if err := c.check(env); err != nil {
		return nil, err
	}
	s, err := newSupervisor(c, roleServer, config, env)
	if err != nil {
		return nil, err
	}
	srv := &served{s: s, slots: make(chan struct{}, backlog), accepted: make(chan *relay.Conn, backlog)}
	if deliver {
		if err := srv.openDelivery(); err != nil {
			s.release()
			return nil, err
		}
	}
	first, err := s.run(ctx)
	if err != nil {
		srv.closeDelivery()
		return nil, err
	}
	if err := srv.adopt(first.methods, deliver); err != nil {
		return nil, errors.Join(err, srv.Close())
	}
	return srv, nil
}

// adopt takes over what the first child has announced.
func (s *served) adopt(methods map[string]method, deliver bool) error {
	s.methods = methods
	if s.s.command.Dialect != nil {
		// Each has a wire of its own, and all bring their connections here.
		first := slices.Min(slices.Collect(maps.Keys(methods)))
		addr, err := netip.ParseAddrPort(methods[first].wire)
		s.addr = net.TCPAddrFromAddrPort(addr)
		return err
	}
	if len(methods) != 1 {
		return fmt.Errorf("%w: a server announces one SMETHOD, and there are %d", errAnnounced, len(methods))
	}
	for name, m := range methods {
		s.proxies = m.proxy
		addr, err := netip.ParseAddrPort(m.wire)
		if err != nil {
			return fmt.Errorf("%w: SMETHOD %s: %w", errAnnounced, name, err)
		}
		s.addr = net.TCPAddrFromAddrPort(addr)
	}
	switch {
	case deliver && s.proxies:
		return fmt.Errorf("the server connects its clients itself, and has no connections to hand over: %w", ptipc.ExitUsage)
	case !deliver && !s.proxies:
		return fmt.Errorf("the server hands its connections over, and does not connect its clients itself: %w", ptipc.ExitUsage)
	}
	return nil
}

// openDelivery makes the socket to which the child brings connections: in its own
// directory, or on the loopback, for its user and ours.
func (s *served) openDelivery() error {
	var uids []uint32
	if uid := os.Geteuid(); uid >= 0 {
		uids = append(uids, uint32(uid))
	}
	if cred := s.s.command.Credential; cred != nil {
		uids = append(uids, cred.UID)
	}
	if s.s.command.Dialect != nil {
		return s.openPorts(uids)
	}
	s.delivery = &socks.Server{Bound: true, Take: s.take, Log: s.s.log}
	var listener net.Listener
	if runtime.GOOS == "windows" {
		l, err := localnet.ListenTCP("127.0.0.1:0")
		if err != nil {
			return err
		}
		listener, s.s.deliver = l, l.Addr().String()
	} else {
		l, err := s.s.dir.Listen("deliver.sock")
		if err != nil {
			return err
		}
		listener, s.s.deliver = localnet.Guard(l, s.s.log, uids...), l.Addr().String()
	}
	go func() {
		if err := s.delivery.Serve(listener); err != nil {
			s.s.log.Error("connections cannot be delivered any more", "err", err)
		}
	}()
	return nil
}

func (s *served) closeDelivery() {
	if s.ports != nil {
		s.ports.close()
	}
	if s.delivery == nil {
		return
	}
	cut, cancel := context.WithCancel(context.Background())
	cancel()
	_ = s.delivery.Shutdown(cut) // what is left is to be cut
}

// take decides about one delivery (SRV-3, SRV-4).
func (s *served) take(ctx context.Context, r *socks.Request) (func(net.Conn), error) {
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	c, err := s.s.child(ctx)
	if err != nil {
		return nil, ptipc.WithClass(ptipc.ErrNotAllowed, err)
	}
	if err := s.fromChild(c, r.Client); err != nil {
		return nil, err
	}
	var d socks.Delivery
	if err := r.Settings.Decode(&d); err != nil {
		return nil, err
	}
	select {
	case s.slots <- struct{}{}:
	default:
		return nil, fmt.Errorf("%d connections wait to be accepted already: %w", backlog, ptipc.ErrGeneral)
	}
	options := relay.Options{Remote: remoteAddr(d.Remote)}
	if c.marks() {
		if end := c.ends.Accepted(r.Client.RemoteAddr()); end != nil {
			options.End, options.HandOver = end, c.hands
		}
	}
	return func(conn net.Conn) { s.accepted <- s.s.meter.Conn(conn, options) }, nil
}

// marks reports whether a server marks the ends of streams (SOCKS-20).
func (c *child) marks() bool {
	for _, m := range c.methods { // a server has one
		return m.ends
	}
	return false
}

// fromChild refuses a delivery that another process forges, even one of our own
// user, where the system can tell (SRV-4).
func (s *served) fromChild(c *child, conn net.Conn) error {
	peer, err := localnet.Peer(conn)
	if errors.Is(err, errors.ErrUnsupported) || err == nil && peer.PID == 0 {
		return nil
	}
	if err != nil {
		return ptipc.WithClass(ptipc.ErrNotAllowed, err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.from == c && slices.Contains(s.pids, peer.PID) {
		return nil
	}
	pids, err := c.proc.Pids()
	if errors.Is(err, errors.ErrUnsupported) {
		return nil
	}
	if err != nil {
		return ptipc.WithClass(ptipc.ErrNotAllowed, err)
	}
	s.from, s.pids = c, pids
	if !slices.Contains(pids, peer.PID) {
		return fmt.Errorf("process %d is not the child's: %w", peer.PID, ptipc.ErrNotAllowed)
	}
	return nil
}

// remoteAddr is the client's address as the child has told it.
func remoteAddr(text string) net.Addr {
	if addr, err := netip.ParseAddrPort(text); err == nil {
		return net.TCPAddrFromAddrPort(addr)
	}
	return otherAddr(strings.ToValidUTF8(text, "?"))
}

// otherAddr is an address that is no ip:port.
type otherAddr string

func (otherAddr) Network() string  { return "wire" }
func (a otherAddr) String() string { return string(a) }

// Accept returns the next connection, with the client's address as the wire saw it.
func (s *served) Accept() (net.Conn, error) {
	select {
	case conn := <-s.accepted:
		<-s.slots
		return conn, nil
	case <-s.s.done:
		if err := s.s.wait(); err != nil {
			return nil, err
		}
		return nil, net.ErrClosed
	}
}

// Addr is where the wire listens.
func (s *served) Addr() net.Addr { return s.addr }

// Stats are the host's own counts of what was delivered, or the child's of what it
// connects itself.
func (s *served) Stats() ptipc.TransportStats {
	if !s.proxies {
		return s.s.meter.Stats()
	}
	var stats ptipc.TransportStats
	ctx, cancel := context.WithTimeout(context.Background(), statsTimeout)
	defer cancel()
	c, err := s.s.child(ctx)
	if err != nil {
		return stats
	}
	if text, err := c.ask(ctx, ""); err == nil {
		_ = json.Unmarshal(text, &stats) // what the child does not say stays 0
	}
	return stats
}

// Wait blocks until the child has ended for good.
func (s *served) Wait() error { return s.s.wait() }

// Close stops the child, which lets open connections finish for a while.
func (s *served) Close() error {
	s.s.stop()
	err := s.s.wait()
	s.closeDelivery()
	for {
		select {
		case conn := <-s.accepted:
			_ = conn.Abort() // nobody will
		default:
			return err
		}
	}
}
