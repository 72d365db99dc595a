package socks

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"syscall"
	"time"

	"pthost/ptipc"
	"pthost/ptipc/relay"
)

// The limits of a [Server] that does not set its own.
const (
	DefaultHandshakeTimeout = 10 * time.Second // SOCKS-9
	DefaultMaxHandshakes    = 1024
	DefaultMaxConns         = 16384
)

const (
	lingerTime  = time.Second // how long a refused client's bytes are read and dropped,
	lingerBytes = 256 << 10   // and how many of them
	cutTime     = time.Second // how long Shutdown waits for what it has cut

	// A timer for each connection would cost more than its handshake does, since
	// setting one can wake a thread. So one timer looks after all connections that
	// have a time limit, this often while there are any.
	sweepInterval = 5 * time.Millisecond
)

// A Request is what a client asked for.
type Request struct {
	// Settings is one valid JSON object, nil if there is none or if it is empty.
	Settings ptipc.Opaque

	// Dest is "host:port", where host is an address, or a name that nobody has
	// looked up (SOCKS-13). It is "" if the server is bound (SOCKS-11).
	Dest string

	// Client is the connection of the client, for its addresses only.
	Client net.Conn

	associate bool // UDP ASSOCIATE; Dest is what the client says of its own address
}

// An Association carries a client's datagrams (PKT-10).
type Association interface {
	// Addr is where the client sends its datagrams.
	Addr() netip.AddrPort
	// Done is closed when the association has ended, also by itself: the client's
	// connection is ended then, so that it knows.
	Done() <-chan struct{}
	// Close ends the association.
	Close() error
}

// A Server serves the modified SOCKS5. Dial or Take must be set; the zero value
// of the other fields works. Fields must not change once Serve has been called,
// and a Server must not be copied.
type Server struct {
	// Bound says that there is one destination, which clients do not choose: they
	// must ask for [::]:0 (SOCKS-11). Otherwise they must name one (SOCKS-12).
	Bound bool

	// Plain makes an ordinary SOCKS5 proxy without authentication: no settings,
	// and no reply codes but those of RFC 1928.
	Plain bool

	// Login, if set, makes the server one for programs that put settings into username
	// and password (RFC 1929), as tor does: a client that offers method 0x02 logs in
	// with it, and gets the settings that Login returns. An error refuses the client.
	// Reply codes are those of RFC 1928 then.
	Login func(username, password string) (ptipc.Opaque, error)

	// Dial connects to the wire. ctx ends when the client hangs up (SOCKS-14), when
	// a shutdown cuts connections and when Dial has returned. The class of an error
	// is the reply (ERR-1). The conn should have CloseWrite: without it the end of
	// the client's stream cannot be passed on, and a client that has left is noticed
	// only when the wire sends something or ends.
	Dial func(ctx context.Context, r *Request) (net.Conn, error)

	// Take, if set, is used in place of Dial by a listener that wants the connections
	// for itself (SRV-3). A connection whose request Take does not refuse is answered
	// with success and then given to the function that Take has returned, which owns
	// it: MaxConns and Shutdown no longer concern it.
	Take func(ctx context.Context, r *Request) (func(conn net.Conn), error)

	// Associate, if set, serves UDP ASSOCIATE on a plain server (RFC 1928, section 7).
	// Request.Dest is what the client says of the address that it is going to send
	// from, 0.0.0.0:0 if nothing. The association is closed when the client's
	// connection ends. ctx bounds the call.
	Associate func(ctx context.Context, r *Request) (Association, error)

	// Granted, if set, is given the connection of a client that was answered with
	// success, and returns the one that is relayed in its place, which owns it.
	Granted func(client net.Conn) net.Conn

	// HandshakeTimeout bounds the time from accept to the end of the request
	// (SOCKS-9). 0 means DefaultHandshakeTimeout.
	HandshakeTimeout time.Duration

	// MaxHandshakes bounds the handshakes at any one time. Above it new connections
	// wait to be accepted. 0 means DefaultMaxHandshakes (SOCKS-10).
	MaxHandshakes int

	// MaxConns bounds the connections that dial or relay at any one time. Above it
	// requests are answered with reply 1. 0 means DefaultMaxConns (SOCKS-10).
	MaxConns int

	// Log receives a warning when descriptors run out, and at debug level what
	// clients are refused for, which can name destinations. nil discards.
	Log *slog.Logger

	once   sync.Once
	log    *slog.Logger
	slots  chan struct{} // one for each handshake
	ctx    context.Context
	cut    context.CancelCauseFunc
	ending chan struct{} // closed when Shutdown has been called

	mu        sync.Mutex
	closing   bool
	listeners map[*net.Listener]struct{}
	early     map[*session]struct{} // those that do not relay yet
	timed     map[*session]struct{} // those of them that have a time limit now
	sweeper   *time.Timer           // nil before the first session
	sweeping  bool                  // the sweeper is set
	open      int                   // sessions
	admitted  int                   // sessions that dial or relay
	empty     chan struct{}         // closed when closing and open is 0
}

// A session is one accepted connection until both of its sides are closed. It
// holds a handshake slot until it is admitted or ends.
type session struct {
	conn net.Conn

	// Under the server's mutex:
	due   time.Time // while it is timed
	watch *watch    // begins when due; without one conn fails then
	late  bool      // conn was made to fail
}

var (
	errCut  = errors.New("socks: the server was shut down")
	errFull = errors.New("socks: the server holds as many connections as it may (MaxConns)")
	errLate = fmt.Errorf("socks: the handshake took too long (HandshakeTimeout): %w", ptipc.ErrTimedOut)
)

func (s *Server) init() {
	s.once.Do(func() {
		s.log = s.Log
		if s.log == nil {
			s.log = slog.New(slog.DiscardHandler)
		}
		s.slots = make(chan struct{}, orDefault(s.MaxHandshakes, DefaultMaxHandshakes))
		s.ctx, s.cut = context.WithCancelCause(context.Background())
		s.ending = make(chan struct{})
		s.empty = make(chan struct{})
		s.listeners = make(map[*net.Listener]struct{})
		s.early = make(map[*session]struct{})
		s.timed = make(map[*session]struct{})
	})
}

func orDefault[T int | time.Duration](value, fallback T) T {
	if value > 0 {
		return value
	}
	return fallback
}

// Serve accepts connections on l until Shutdown, and then returns nil, or until
// l fails. It closes l. A shortage of descriptors or memory does not end it
// (SOCKS-10). It may be called for several listeners at once.
func (s *Server) Serve(l net.Listener) error {
	s.init()
	defer l.Close()
	if !s.addListener(&l) {
		return nil
	}
	defer s.removeListener(&l)

	var pause time.Duration
	for {
		conn, err := l.Accept()
		if err != nil {
			if s.isClosing() {
				return nil
			}
			if !passing(err) {
				return fmt.Errorf("socks: accept on %s: %w", l.Addr(), err)
			}
			if pause == 0 {
				s.log.Warn("cannot accept connections for now", "listener", l.Addr(), "error", err)
			}
			pause = min(max(2*pause, 5*time.Millisecond), time.Second)
			select {
			case <-time.After(pause):
			case <-s.ending:
			}
			continue
		}
		pause = 0
		select {
		case s.slots <- struct{}{}:
		case <-s.ending:
			conn.Close()
			return nil
		}
		session := &session{conn: conn}
		if !s.add(session) {
			<-s.slots
			conn.Close()
			return nil
		}
		go s.serve(session)
	}
}

// passing reports whether an error of accept can go away by itself. What the
// system reports for one connection, or for lack of means, can; what is wrong
// with the listener cannot.
func passing(err error) bool {
	var errno syscall.Errno
	if !errors.As(err, &errno) {
		return false
	}
	return errno != syscall.EBADF && errno != syscall.EINVAL && errno != syscall.ENOTSOCK
}

// Shutdown stops accepting, and waits until the connections that are open have
// ended. When ctx ends first it cuts them, so that their peers do not take the
// end for a clean one, and returns the cause. It may be called more than once;
// the first ctx to end counts.
func (s *Server) Shutdown(ctx context.Context) error {
	s.init()
	s.mu.Lock()
	if !s.closing {
		s.closing = true
		close(s.ending)
		for l := range s.listeners {
			(*l).Close()
		}
		if s.open == 0 {
			close(s.empty)
		}
	}
	s.mu.Unlock()

	select {
	case <-s.empty:
		return nil
	case <-ctx.Done():
	}
	s.mu.Lock()
	left := s.open
	s.cut(errCut) // ends dials, and relays with a reset (SOCKS-15)
	for session := range s.early {
		// One of them may have been told of success already.
		if socket, ok := session.conn.(interface{ SetLinger(sec int) error }); ok {
			_ = socket.SetLinger(0) // fails only if it is closed
		}
		session.conn.Close()
	}
	s.mu.Unlock()
	select {
	case <-s.empty:
	case <-time.After(cutTime): // for a Dial that does not heed its ctx there is nothing more to do
	}
	return fmt.Errorf("socks: %d connections were cut: %w", left, context.Cause(ctx))
}

func (s *Server) isClosing() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.closing
}

func (s *Server) addListener(l *net.Listener) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closing {
		return false
	}
	s.listeners[l] = struct{}{}
	return true
}

func (s *Server) removeListener(l *net.Listener) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.listeners, l)
}

func (s *Server) handshakeTimeout() time.Duration {
	return orDefault(s.HandshakeTimeout, DefaultHandshakeTimeout)
}

func (s *Server) add(session *session) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closing {
		return false
	}
	s.early[session] = struct{}{}
	s.open++
	s.limit(session, s.handshakeTimeout()) // SOCKS-9
	return true
}

// admit lets a session dial, and relay after that, and frees its handshake slot.
func (s *Server) admit(session *session, w *watch) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case session.late:
		return errLate
	case s.admitted >= orDefault(s.MaxConns, DefaultMaxConns):
		return errFull
	}
	s.admitted++
	<-s.slots
	session.watch = w
	s.limit(session, watchAfter)
	return nil
}

// dialled is called when the dial has returned. It reports whether the client
// has been watched meanwhile, and still is.
func (s *Server) dialled(session *session) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	watched := session.watch == nil
	session.watch = nil
	s.limit(session, s.handshakeTimeout()) // for the reply
	return watched
}

// relays takes a session out of those that Shutdown closes itself: a relay has
// the socket now, and resets both of its sides when it is cut.
func (s *Server) relays(session *session) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.early, session)
	delete(s.timed, session)
	if session.late {
		return errLate
	}
	return nil
}

// remove gives back what a session that has ended took (SOCKS-22).
func (s *Server) remove(session *session, admitted bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.early, session)
	delete(s.timed, session)
	if admitted {
		s.admitted--
	}
	s.open--
	if s.closing && s.open == 0 {
		close(s.empty)
	}
}

// limit gives a session d from now. s.mu is held.
func (s *Server) limit(session *session, d time.Duration) {
	session.due = time.Now().Add(d)
	s.timed[session] = struct{}{}
	if s.sweeping {
		return
	}
	s.sweeping = true
	if s.sweeper == nil {
		s.sweeper = time.AfterFunc(sweepInterval, s.sweep)
	} else {
		s.sweeper.Reset(sweepInterval)
	}
}

// unlimit takes the time limit away. A limit that has passed stays so.
func (s *Server) unlimit(session *session) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.timed, session)
}

func (s *Server) sweep() {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := time.Now()
	for session := range s.timed {
		if now.Before(session.due) {
			continue
		}
		delete(s.timed, session)
		if w := session.watch; w != nil {
			session.watch = nil
			go w.run()
		} else {
			session.late = true
			_ = session.conn.SetDeadline(past) // wakes whoever reads or writes
		}
	}
	s.sweeping = len(s.timed) > 0
	if s.sweeping {
		s.sweeper.Reset(sweepInterval)
	}
}

var past = time.Unix(1, 0) // a deadline that ends what is going on

// serve runs one session. Handshake and dial are functions of their own so that
// an idle connection does not hold their stack.
func (s *Server) serve(session *session) {
	client, wire, admitted := s.connect(session)
	if t, ok := wire.(*taken); ok {
		t.by(client)
	} else if wire != nil {
		if err := relay.Join(s.ctx, client, wire); err != nil {
			s.log.Debug("a connection broke", "error", err)
		}
	} else {
		session.conn.Close()
	}
	if !admitted {
		<-s.slots
	}
	s.remove(session, admitted)
}

// connect runs handshake and dial, and answers. wire is nil if the client was
// refused or is gone. client is the session's conn, with early data before it if
// there is any.
func (s *Server) connect(session *session) (client, wire net.Conn, admitted bool) {
	h := newHandshake(session.conn)
	request, err := h.read(s)
	w := &watch{conn: session.conn, method: h.method, owed: h.owed, early: h.rest()}
	h.release()

	switch {
	case err == nil && request.associate:
		admitted, err = s.associate(session, &request, w)
		if err == nil {
			return nil, nil, admitted
		}
	case err == nil:
		wire, admitted, err = s.dial(session, &request, w)
	}
	if err != nil {
		s.unlimit(session)
		s.refuse(session.conn, w.method, w.owed, err)
		return nil, nil, admitted
	}
	_, err = session.conn.Write(reply(w.method, w.owed, 0))
	if err == nil {
		err = s.relays(session)
	}
	if err != nil {
		wire.Close()
		return nil, nil, admitted
	}
	client = session.conn
	if s.Granted != nil {
		client = s.Granted(client)
	}
	if len(w.early) > 0 {
		client = &earlyConn{Conn: client, early: w.early}
	}
	return client, wire, admitted
}

// associate serves one association for as long as its client's connection lives.
func (s *Server) associate(session *session, r *Request, w *watch) (admitted bool, err error) {
	s.mu.Lock()
	switch {
	case session.late:
		err = errLate
	case s.admitted >= orDefault(s.MaxConns, DefaultMaxConns):
		err = errFull
	default:
		s.admitted++
		<-s.slots
		s.limit(session, s.handshakeTimeout())
	}
	s.mu.Unlock()
	if err != nil {
		return false, err
	}
	ctx, cancel := context.WithTimeout(s.ctx, s.handshakeTimeout())
	association, err := s.Associate(ctx, r)
	cancel()
	if err != nil {
		return true, err
	}
	defer association.Close()
	s.unlimit(session)
	left := make(chan struct{})
	defer close(left)
	go func() {
		select {
		case <-association.Done():
			_ = session.conn.SetReadDeadline(past)
		case <-left:
		}
	}()
	_ = session.conn.SetDeadline(time.Time{}) // the sweeper's, if it has just come
	_ = session.conn.SetWriteDeadline(time.Now().Add(s.handshakeTimeout()))
	if _, err := session.conn.Write(associateReply(w.method, w.owed, association.Addr())); err != nil {
		return true, nil
	}
	// Nothing more is to come on this connection but its end.
	h := newHandshake(session.conn)
	defer h.release()
	for {
		if _, err := session.conn.Read(h.small[:]); err != nil {
			return true, nil
		}
	}
}

// associateReply is reply with the address that the client needs: the one exception
// from SOCKS-8, on the loopback (PKT-10).
func associateReply(method byte, owed bool, addr netip.AddrPort) []byte {
	b := []byte{version, 0, 0, addressIPv4}
	if addr.Addr().Is6() {
		b[3] = addressIPv6
	}
	b = append(b, addr.Addr().AsSlice()...)
	b = binary.BigEndian.AppendUint16(b, addr.Port())
	if owed {
		b = append([]byte{version, method}, b...)
	}
	return b
}

// refuse tells the client why, if it is there to be told. Bytes that it goes on
// sending are read and dropped for a while: closing a socket over unread bytes
// makes a reset, which can destroy the answer on its way.
func (s *Server) refuse(conn net.Conn, method byte, owed bool, err error) {
	s.log.Debug("refused a connection", "client", conn.RemoteAddr(), "error", err)
	if errors.Is(err, errSilent) {
		return
	}
	_ = conn.SetDeadline(time.Now().Add(lingerTime))
	answer := []byte{version, methodRefused}
	switch {
	case errors.Is(err, errLogin):
		answer = []byte{version, method, passwordVersion, loginRefused}
		if !owed {
			answer = answer[2:]
		}
	case method != methodRefused:
		class := ptipc.ClassOf(err)
		if (s.Plain || s.Login != nil) && class > ptipc.ErrAddressType {
			class = ptipc.ErrGeneral // an ordinary client does not know the others
		}
		answer = reply(method, owed, class)
	}
	if _, err := conn.Write(answer); err != nil {
		return
	}
	half, ok := conn.(interface{ CloseWrite() error })
	if !ok || half.CloseWrite() != nil {
		return
	}
	h := newHandshake(conn)
	defer h.release()
	for n := 0; n < lingerBytes; {
		m, err := conn.Read(h.small[:])
		if err != nil {
			return
		}
		n += m
	}
}

// reply makes the reply of the given class, 0 for success, behind the answer to
// the greeting if that is owed. The bound address is 0.0.0.0:0 always (SOCKS-8).
func reply(method byte, owed bool, class ptipc.Class) []byte {
	b := []byte{version, method, version, byte(class), 0, addressIPv4, 0, 0, 0, 0, 0, 0}
	if !owed {
		b = b[2:]
	}
	return b
}

// A taken stands for the wire of a connection that Take wants.
type taken struct {
	net.Conn // nil: nothing is sent or received here
	by       func(conn net.Conn)
}

func (*taken) Close() error { return nil }

// An earlyConn gives what came with the handshake before what is still to come.
type earlyConn struct {
	net.Conn
	early []byte
}

func (c *earlyConn) Read(p []byte) (int, error) {
	if len(c.early) == 0 {
		return c.Conn.Read(p)
	}
	n := copy(p, c.early)
	if c.early = c.early[n:]; len(c.early) == 0 {
		c.early = nil // an idle connection need not hold it
	}
	return n, nil
}

// CloseWrite ends the direction to the client, if the conn can.
func (c *earlyConn) CloseWrite() error {
	if half, ok := c.Conn.(interface{ CloseWrite() error }); ok {
		return half.CloseWrite()
	}
	return errors.ErrUnsupported
}

// Abort lets a relay break the connection.
func (c *earlyConn) Abort() error { return relay.Abort(c.Conn) }

// SetLinger lets a relay have the connection reset when this process is killed.
func (c *earlyConn) SetLinger(sec int) error {
	if socket, ok := c.Conn.(interface{ SetLinger(sec int) error }); ok {
		return socket.SetLinger(sec)
	}
	return errors.ErrUnsupported
}
