package host

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"
	"time"

	"pthost/ptipc"
	"pthost/ptipc/internal/tally"
	"pthost/ptipc/localnet"
	"pthost/ptipc/proc"
	"pthost/ptipc/stdio"
	"pthost/turn"
)

const (
	// maxMethods bounds what one child may announce.
	maxMethods = 64
	// maxLogLines is how many lines of a child are passed on to the log in a second.
	maxLogLines = 100
	// statsTimeout bounds the wait for an answer to STATS (STAT-3).
	statsTimeout = time.Second
)

// errAnnounced: the child announced what it must not. Another start cannot help.
var errAnnounced = errors.New("the child broke the protocol")

// method is one connection factory that a child has announced.
type method struct {
	announced stdio.CMethod // a client's factory, for the dialect
	args      stdio.Args    // of a server, for its clients

	addr  localnet.Addr // of a client's factory
	wire  string        // ip:port of a server's wire
	bound bool
	proxy bool // a server that connects its clients itself (SRV-2)
	stats bool
	ends  bool              // the child marks ends of streams (SOCKS-20)
	turn  *turn.Credentials // of a packet factory; nil for streams
}

// child is one process, from its start to its end.
type child struct {
	role    string
	session *Session
	proc    *proc.Process
	signals chan<- ptipc.Message // to be carried; nil if nobody does
	dropped *tally.Warning       // of these
	dir     *localnet.Dir
	ends    *localnet.Ends // nil if the child was not given any
	hands   bool           // it may be handed sockets
	env     ptipc.Env
	log     *slog.Logger
	trace   func(fromChild bool, line []byte)

	lines    lineLimit // of LOG, standard error and what is not understood
	statuses lineLimit // of STATUS, which a flood of the others must not hide

	mu        sync.Mutex
	methods   map[string]method
	errs      []error
	proxyDone bool
	settled   chan struct{} // closed when it is known whether the start succeeded
	isSettled bool
	asked     map[uint64]chan stdio.StatsReply
	lastID    uint64
}

// startChild starts the process and waits until it is ready. On an error nothing
// of it is left (LIFE-1).
func (s *supervisor) startChild(ctx context.Context) (*child, error) {
	timeout := s.command.StartTimeout
	if timeout == 0 {
		timeout = defaultStartTimeout
	}
	ctx, cancel := context.WithTimeoutCause(ctx, timeout, fmt.Errorf("not ready after %v: %w", timeout, context.DeadlineExceeded))
	defer cancel()

	ends, files, err := s.makeEnds()
	if err != nil {
		return nil, err
	}
	defer func() {
		for _, f := range files {
			_ = f.Close() // the child has it, and the memory stays
		}
	}()
	session, err := s.session(len(files) > 0)
	if err != nil {
		return nil, err
	}
	c := &child{
		role: s.role, session: session, signals: s.signals, dropped: s.dropped, dir: s.dir, ends: ends, env: s.env, log: s.log, trace: s.command.Trace,
		methods: map[string]method{}, settled: make(chan struct{}), asked: map[uint64]chan stdio.StatsReply{},
	}
	sandbox := s.sandbox()
	c.proc, err = proc.Start(ctx, proc.Spec{
		Path: s.command.Path, Args: append(slices.Clone(s.command.Args), session.Args...), Dir: s.path, Env: s.command.environ(session),
		Launcher: s.command.Launcher, Credential: s.command.Credential, Sandbox: sandbox, Limits: s.command.Limits, Files: files,
		FinishWait: s.command.finishWait(session), TermWait: s.command.termWait(session), Log: s.log,
		OnLine: func(line []byte, truncated bool) {
			if c.trace != nil {
				c.trace(true, stdio.Mask(line))
			}
			c.line(line, truncated)
		},
		OnStderr: c.stderr,
	})
	if err != nil {
		return nil, err
	}
	s.event(Event{Kind: Started, Pid: c.proc.Pid()})
	if session.Stdin != nil {
		if c.trace != nil {
			c.trace(false, []byte(`{"config":"***","host":"***"}`))
		}
		// ARG-7: WriteLine queues and never waits for the child.
		// A child that has ended already tells more by its end.
		if err := c.proc.WriteLine(session.Stdin); err != nil && !errors.Is(err, proc.ErrStdinClosed) {
			c.fail(err)
		}
	}
	if session.Announce != nil {
		go c.announceFor(ctx)
	}
	if err := c.awaitReady(ctx, s); err != nil {
		s.abandon(c)
		err = startError(err, c.proc.Err())
		if hint := sandbox.Explain(err.Error()); hint != "" && !strings.Contains(err.Error(), hint) {
			err = fmt.Errorf("%w\n%s", err, hint) // a child may say on its control lines what it was refused
		}
		return nil, err
	}
	return c, nil
}

// endsFD is what makeEnds's file is for the child.
const endsFD = 3

// makeEnds makes the memory in which both ends mark what has ended (SOCKS-20), and the
// file that hands it to the child. Both are nil for a child that would not know what
// to do with it (ARG-6), and on systems that have no such thing.
func (s *supervisor) makeEnds() (*localnet.Ends, []*os.File, error) {
	if s.command.Plain || s.command.Dialect != nil {
		return nil, nil, nil
	}
	ends, file, err := localnet.NewEnds()
	if errors.Is(err, errors.ErrUnsupported) {
		return nil, nil, nil
	}
	if err != nil {
		return nil, nil, err
	}
	return ends, []*os.File{file}, nil
}

// arguments builds [ROLE] CONFIG [HOST] (ARG-1) and the first line of standard
// input, if the configuration goes there (ARG-4).
func (s *supervisor) arguments(ends bool) (args []string, firstLine []byte, err error) {
	config, err := s.config.MarshalJSON()
	if err != nil {
		return nil, nil, err
	}
	if s.command.Plain { // ARG-6
		if s.role != roleClient {
			args = append(args, s.role)
		}
		return append(args, string(config)), nil, nil
	}
	info := stdio.Host{Version: []int{stdio.ProtocolVersion}, Proxy: s.proxy, Listen: stdio.ListenUnix, Deliver: s.deliver}
	if runtime.GOOS == "windows" {
		info.Listen = stdio.ListenTCP
	}
	if uid := os.Geteuid(); uid >= 0 {
		u := uint32(uid)
		info.UID = &u
	}
	if ends {
		info.Ends = endsFD
	}
	if s.command.ConfigArgv {
		text, err := json.Marshal(info)
		return append(args, s.role, string(config), string(text)), nil, err
	}
	firstLine, err = stdio.Launch{Config: config, Host: info}.Append(nil)
	return append(args, s.role, "-"), bytes.TrimSuffix(firstLine, []byte("\n")), err
}

// awaitReady waits for CMETHODS DONE, an error, the child's end or ctx, and then
// checks what was announced.
func (c *child) awaitReady(ctx context.Context, s *supervisor) error {
	select {
	case <-c.settled:
	case <-c.proc.Done():
	case <-ctx.Done():
		if c.session.Announce == nil {
			return context.Cause(ctx)
		}
		select { // who has waited in its place says what for
		case <-c.settled:
		case <-c.proc.Done():
		}
	}
	c.mu.Lock()
	settled, err := c.isSettled, errors.Join(c.errs...)
	c.mu.Unlock()
	switch {
	case !settled || err != nil && len(c.methods) == 0:
		if !settled {
			err = errors.Join(err, errors.New("the child ended before it was ready"))
		}
		if !errors.Is(err, errAnnounced) {
			c.gone(ctx) // it gave up: how it goes belongs to the error
		}
		return err
	case len(c.methods) == 0:
		return fmt.Errorf("%w: the end of the announcements came without a CMETHOD or SMETHOD (LINE-7)", errAnnounced)
	case s.proxy != "" && !c.proxyDone:
		return fmt.Errorf("%w: no PROXY DONE; its traffic would go around the proxy (PROXY-2)", errAnnounced)
	}
	if err != nil {
		s.log.Warn("a connection factory of the child did not start", "err", err)
	}
	for name, bound := range s.command.Bound {
		if m, ok := c.methods[name]; ok {
			m.bound = bound
			c.methods[name] = m
		}
	}
	pids, err := c.proc.Pids()
	// SOCKS-26: a socket is a way out of a network of the child's own, and around rules for its user.
	c.hands = err == nil && c.ends != nil && s.command.Credential == nil && localnet.SameNetwork(pids)
	if c.role == roleServer {
		return nil // its sockets are for others
	}
	if errors.Is(err, errors.ErrUnsupported) {
		return nil
	}
	if err != nil {
		return err
	}
	return c.checkSockets(ctx, pids)
}

// startError is why a child did not start: what is known from its control lines,
// and how it ended, with its last words unless they say the same again.
func startError(why, ended error) error {
	var exit *proc.ExitError
	if !errors.As(ended, &exit) {
		return why // it could not be stopped
	}
	silent := true
	for _, line := range exit.Stderr {
		silent = silent && strings.Contains(why.Error(), line)
	}
	switch {
	case exit.Stopped || exit.Code == int(ptipc.ExitOK):
		// How it ended is not the reason, and its exit code must not become that of
		// whoever reports the error.
		if silent {
			return why
		}
		return fmt.Errorf("%w\n%s", why, ended.Error())
	case silent && exit.Code > 0:
		return fmt.Errorf("%w: %w", why, ptipc.ExitCode(exit.Code))
	}
	return errors.Join(why, ended)
}

// deathWait is how long the end of a child that has stopped listening, or has given
// up, is waited for.
const deathWait = time.Second

// gone waits a moment for the end of a child that seems to be gone.
func (c *child) gone(ctx context.Context) bool {
	timer := time.NewTimer(deathWait)
	defer timer.Stop()
	select {
	case <-c.proc.Done():
		return true
	case <-timer.C:
	case <-ctx.Done():
	}
	return false
}

// checkSockets makes sure that the announced sockets are the child's own (SOCKS-18).
func (c *child) checkSockets(ctx context.Context, pids []int) error {
	// Its sockets go with it, and that is no lie.
	ended := errors.New("the child ended as soon as it was ready")
	if len(pids) == 0 {
		c.gone(ctx) // by itself: how it ended belongs to the error
		return ended
	}
	for name, m := range c.methods {
		if m.turn != nil {
			if err := checkPackets(m, pids); err != nil {
				if c.gone(ctx) {
					return ended
				}
				return fmt.Errorf("%w: %s was announced at %s: %w (PKT-5)", errAnnounced, name, m.addr, err)
			}
			continue
		}
		listens, err := c.owned(ctx, m.addr, pids)
		switch {
		case err == nil || listens && errors.Is(err, errors.ErrUnsupported):
		case ctx.Err() != nil:
			return context.Cause(ctx)
		case listens:
			return fmt.Errorf("%w: %s was announced at %s: %w (SOCKS-18)", errAnnounced, name, m.addr, err)
		case c.gone(ctx):
			return ended
		default:
			return fmt.Errorf("%w: %s was announced at %s, where nothing listens: %w (LINE-7)", errAnnounced, name, m.addr, err)
		}
	}
	return nil
}

// owned says whether somebody listens on an announced address, and whether that is one
// of the child's processes. It connects only where there is no other way to find out: a
// child may begin something for a connection (SIP-11).
func (c *child) owned(ctx context.Context, addr localnet.Addr, pids []int) (listens bool, err error) {
	if !addr.Unix() {
		err := localnet.ListenerAt("tcp", addr.AddrPort(), pids)
		if !errors.Is(err, errors.ErrUnsupported) {
			return !errors.Is(err, localnet.ErrNoListener), err
		}
	}
	conn, err := connect(ctx, c.dir, addr)
	if err != nil {
		return false, err
	}
	err = localnet.ListenerOwnedBy(conn, pids)
	_ = conn.Close() // nothing was sent on it
	return true, err
}

// fail ends the start with an error.
func (c *child) fail(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.addErr(err)
	c.settle()
}

// addErr keeps the errors of a start, in bounded number.
func (c *child) addErr(err error) {
	if len(c.errs) < maxMethods {
		c.errs = append(c.errs, err)
	}
}

func (c *child) settle() {
	if !c.isSettled {
		c.isSettled = true
		close(c.settled)
	}
}

// line takes one line of the child's standard output. It is called from one
// goroutine. Whatever it does not understand, it passes over (LINE-1, LINE-2).
func (c *child) line(line []byte, truncated bool) {
	if truncated {
		c.say(slog.LevelWarn, "child wrote a line that is too long; it was passed over", "begins", string(stdio.Mask(line[:min(len(line), 64)])))
		return
	}
	message, err := c.session.parse(line)
	if err != nil {
		c.say(slog.LevelDebug, "child wrote a line that is not a control line", "err", err)
		c.badAnnouncement(err)
		return
	}
	switch m := message.(type) {
	case stdio.Log:
		c.say(m.Level, m.Message)
	case stdio.Status:
		if c.statuses.allow(time.Now()) {
			attrs := make([]slog.Attr, 0, len(m.Attrs)+1)
			if m.Transport != "" {
				attrs = append(attrs, slog.String("transport", m.Transport))
			}
			for _, kv := range m.Attrs {
				attrs = append(attrs, slog.String(kv.Key, kv.Value))
			}
			c.env.Report(context.Background(), attrs...)
		}
	case stdio.StatsReply:
		c.answer(m)
	case stdio.CMessage:
		if c.role == roleClient {
			c.signalled(m.Message)
		}
	case stdio.SMessage:
		if c.role == roleServer {
			c.signalled(m.Message)
		}
	default:
		c.announcement(message)
	}
}

// badAnnouncement makes a malformed CMETHOD an error of the start: leaving it out
// silently would hide a transport.
func (c *child) badAnnouncement(err error) {
	var parse *stdio.ParseError
	if errors.As(err, &parse) && (parse.Keyword == "CMETHOD" || parse.Keyword == "SMETHOD") {
		c.mu.Lock()
		defer c.mu.Unlock()
		if !c.isSettled {
			c.addErr(fmt.Errorf("%w: %w", errAnnounced, err))
		}
	}
}

// announcement takes the lines of the start. After CMETHODS DONE they mean nothing.
func (c *child) announcement(message stdio.Message) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.isSettled {
		return
	}
	switch m := message.(type) {
	case stdio.Version:
		if len(c.session.Versions) > 0 && !slices.Contains(c.session.Versions, m.Version) {
			c.addErr(fmt.Errorf("%w: it speaks version %q, which was not offered (LINE-3)", errAnnounced, m.Version))
			c.settle()
		}
	case stdio.VersionError:
		c.addErr(fmt.Errorf("the child speaks none of our versions: %s: %w", m.Text, ptipc.ExitConfig))
		c.settle()
	case stdio.EnvError: // LINE-11
		c.addErr(fmt.Errorf("the child cannot use its environment: %s: %w", m.Text, ptipc.ExitConfig))
		c.settle()
	case stdio.ProxyDone:
		c.proxyDone = true
	case stdio.ProxyError:
		c.addErr(fmt.Errorf("the child cannot use the upstream proxy: %s: %w", m.Text, ptipc.ExitUnavailable))
		c.settle()
	case stdio.CMethod:
		switch {
		case c.role != roleClient || !c.wanted(m.Name):
		case c.session.own && m.Protocol == stdio.ProtocolTURN:
			c.add("CMETHOD "+m.Name, packetKey(m.Name), func() (method, error) { return packetsOf(m) })
		default:
			c.add("CMETHOD "+m.Name, m.Name, func() (method, error) { return c.factoryOf(m) })
		}
	case stdio.SMethod:
		if c.role == roleServer && c.wanted(m.Name) {
			c.add("SMETHOD "+m.Name, m.Name, func() (method, error) {
				if !c.session.own { // ARGS are for the clients alone
					return method{wire: m.Addr, args: m.Args}, nil
				}
				return method{wire: m.Addr, args: m.Args, proxy: m.Args.Proxy(), stats: m.Args.Stats(), ends: m.Args.Ends()}, nil
			})
		}
	case stdio.CMethodError:
		c.addErr(m)
	case stdio.SMethodError:
		c.addErr(m)
	case stdio.CMethodsDone:
		if c.role == roleClient {
			c.settle()
		}
	case stdio.SMethodsDone:
		if c.role == roleServer {
			c.settle()
		}
	}
}

// add keeps what was announced; what must not be announced ends the start.
func (c *child) add(what, name string, read func() (method, error)) {
	m, err := read()
	switch _, twice := c.methods[name]; {
	case err != nil:
	case twice:
		err = errors.New("was announced twice")
	case len(c.methods) == maxMethods:
		err = fmt.Errorf("makes more than %d", maxMethods)
	default:
		c.methods[name] = m
		return
	}
	c.addErr(fmt.Errorf("%w: %s %w", errAnnounced, what, err))
	clear(c.methods)
	c.settle()
}

// factoryOf checks the announcement of a connection factory.
func (c *child) factoryOf(m stdio.CMethod) (method, error) {
	known := c.session.Protocols
	if len(known) == 0 {
		known = []string{stdio.ProtocolSOCKS5}
	}
	if !slices.Contains(known, m.Protocol) {
		return method{}, fmt.Errorf("has the protocol %q; %s is what is known (LINE-4)", m.Protocol, strings.Join(known, " or "))
	}
	addr, err := localnet.ParseAddr(m.Addr)
	if err != nil {
		return method{}, fmt.Errorf("names an address that it must not: %w (LINE-5)", err)
	}
	if !c.session.own {
		return method{announced: m, addr: addr, bound: true}, nil
	}
	return method{addr: addr, bound: m.Args.Bound(), stats: m.Args.Stats(), ends: m.Args.Ends()}, nil
}

// sameAs reports whether two children announced the same (LIFE-7). Addresses and
// extras may differ.
func (c *child) sameAs(methods map[string]method) bool {
	return maps.EqualFunc(c.methods, methods, func(a, b method) bool { return a.bound == b.bound && a.proxy == b.proxy })
}

// ask sends STATS and waits for the answer, but not long (STAT-3). client is ""
// for the totals.
func (c *child) ask(ctx context.Context, client string) ([]byte, error) {
	c.mu.Lock()
	c.lastID++
	id, reply := c.lastID, make(chan stdio.StatsReply, 1)
	c.asked[id] = reply
	c.mu.Unlock()
	defer func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		delete(c.asked, id)
	}()
	line, err := stdio.Append(nil, stdio.StatsRequest{ID: id, Client: client})
	if err != nil {
		return nil, err
	}
	if err := c.proc.WriteLine(bytes.TrimSuffix(line, []byte("\n"))); err != nil {
		return nil, err
	}
	if c.trace != nil {
		c.trace(false, bytes.TrimSuffix(line, []byte("\n")))
	}
	ctx, cancel := context.WithTimeout(ctx, statsTimeout)
	defer cancel()
	select {
	case m := <-reply:
		return m.JSON, nil
	case <-c.proc.Done():
		return nil, c.proc.Err()
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

func (c *child) answer(m stdio.StatsReply) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if reply, ok := c.asked[m.ID]; ok {
		delete(c.asked, m.ID) // a second answer finds nobody
		reply <- m
	}
}

// say logs what the child has said, unless it says too much. What nobody wants to
// read does not count.
func (c *child) say(level slog.Level, message string, args ...any) {
	ctx := context.Background()
	if c.log.Enabled(ctx, level) && c.lines.allow(time.Now()) {
		c.log.Log(ctx, level, message, args...)
	}
}

// lineLimit keeps a child that floods its outputs from flooding the log.
type lineLimit struct {
	mu     sync.Mutex
	second int64
	lines  int
}

func (l *lineLimit) allow(now time.Time) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if s := now.Unix(); s != l.second {
		l.second, l.lines = s, 0
	}
	l.lines++
	return l.lines <= maxLogLines
}

// describe names connection factories in an error.
func describe(methods map[string]method) string {
	names := slices.Sorted(maps.Keys(methods))
	for i, name := range names {
		if methods[name].bound {
			names[i] += " (bound)"
		}
	}
	return strings.Join(names, ", ")
}
