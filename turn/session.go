package turn

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/pion/stun"
	transport "github.com/pion/transport/v2"
	pion "github.com/pion/turn/v2"

	"pthost/ptipc"
)

// ErrLost is in the chain of the errors of a [Conn] whose server, or whose allocation
// there, has gone (TURN-16).
var ErrLost = errors.New("turn: the TURN server has gone, or has ended the allocation")

// A RefusedError is a TURN server's refusal, as RFC 5389 and RFC 5766 number them.
type RefusedError struct {
	Request string // for example "Allocate"
	Code    int    // for example 486
}

func (e *RefusedError) Error() string {
	text := map[int]string{
		400: "bad request", 401: "the credentials are wrong", 403: "forbidden", 420: "unknown attribute",
		437: "no such allocation", 438: "stale nonce", 440: "address family not supported", 441: "wrong credentials",
		442: "transport protocol not supported", 443: "address family mismatch", 486: "the server's quota of allocations is used up",
		508: "the server has no capacity, or its transport opened no packet connection",
	}[e.Code]
	if text == "" {
		text = "refused"
	}
	return fmt.Sprintf("turn: %s: %d: %s", e.Request, e.Code, text)
}

// A session is a client's one allocation on one server. pion carries its transactions.
// It is the guard of the client's end: what pion and the application get has been
// looked at here (TURN-2, TURN-3, TURN-4).
type session struct {
	sock    socket
	server  netip.AddrPort
	to      *endpoint // nil: the socket is connected to the server
	pion    *pion.Client
	creds   Credentials
	key     stun.MessageIntegrity
	count   *counters
	relayed netip.AddrPort
	life    time.Duration // of the allocation, as the server said last; for one goroutine
	over    chan struct{} // closed with reason set

	releasing atomic.Bool

	mu     sync.Mutex
	nonce  []byte
	reason error
}

// noNet makes sure that pion opens and looks up nothing.
type noNet struct{ transport.Net }

// sessionConn is what pion sends requests by.
type sessionConn struct{ *session }

func (c sessionConn) WriteTo(b []byte, _ net.Addr) (int, error) {
	select {
	case <-c.over:
		return 0, c.err()
	default:
		c.send(b)
		return len(b), nil // a datagram that is lost is sent again
	}
}

func (c sessionConn) ReadFrom([]byte) (int, net.Addr, error) { return 0, nil, errors.ErrUnsupported }
func (c sessionConn) Close() error                           { return nil }
func (c sessionConn) LocalAddr() net.Addr                    { return c.sock.LocalAddr() }
func (c sessionConn) SetDeadline(time.Time) error            { return errors.ErrUnsupported }
func (c sessionConn) SetReadDeadline(time.Time) error        { return errors.ErrUnsupported }
func (c sessionConn) SetWriteDeadline(time.Time) error       { return errors.ErrUnsupported }

// A deliverFunc gets each payload of a peer, with its channel, or with its address if the
// channel is 0. It is called from one goroutine, and must not keep the payload.
type deliverFunc func(channel uint16, peer netip.AddrPort, payload []byte)

// newSession gets an allocation.
func newSession(ctx context.Context, sock socket, server netip.AddrPort, to *endpoint, creds Credentials, count *counters, log *slog.Logger, deliver deliverFunc) (*session, error) {
	s := &session{sock: sock, server: server, to: to, creds: creds, key: creds.key(), count: count, over: make(chan struct{})}
	client, err := pion.NewClient(&pion.ClientConfig{Conn: sessionConn{s}, Net: noNet{}, LoggerFactory: pionLog{log}})
	if err != nil {
		_ = sock.Close()
		return nil, fmt.Errorf("turn: %w", err)
	}
	s.pion = client
	stop := context.AfterFunc(ctx, func() { s.end(fmt.Errorf("turn: %w", context.Cause(ctx))) })
	go s.receive(deliver)
	err = s.allocate()
	if !stop() {
		err = s.err()
	}
	if err != nil {
		s.end(err)
		return nil, err
	}
	return s, nil
}

// end ends the session; the first reason is kept.
func (s *session) end(reason error) {
	s.mu.Lock()
	first := s.reason == nil
	if first {
		s.reason = reason
		close(s.over)
	}
	s.mu.Unlock()
	if first {
		_ = s.sock.Close()
		s.pion.Close() // whoever waits for an answer is told
	}
}

func (s *session) err() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.reason
}

func (s *session) ended() bool {
	select {
	case <-s.over:
		return true
	default:
		return false
	}
}

// send sends one datagram. When the system says that nobody is there any more, the
// session has ended.
func (s *session) send(b []byte) bool {
	err := s.sock.write(b, s.to)
	switch {
	case err == nil:
		return true
	case errors.Is(err, syscall.ECONNREFUSED):
		s.end(fmt.Errorf("%w: nobody is at %s: %w", ErrLost, s.server, err))
	default:
		s.count.failed.Add(1)
	}
	return false
}

// receive reads until the session has ended.
func (s *session) receive(deliver deliverFunc) {
	var m message
	for failures := 0; ; {
		b, err := s.sock.receive()
		switch {
		case err == nil:
		case s.ended():
			return
		case errors.Is(err, syscall.ECONNREFUSED):
			s.end(fmt.Errorf("%w: nobody is at %s: %w", ErrLost, s.server, err))
			return
		case closed(err) || failures == maxFailures:
			s.end(fmt.Errorf("%w: %w", ErrLost, err))
			return
		default:
			failures++
			s.count.failed.Add(1)
			continue
		}
		failures = 0
		for i := range b.packets {
			s.take(&b.packets[i], &m, deliver)
		}
		b.release()
	}
}

// take looks at one datagram (TURN-2 to TURN-4).
func (s *session) take(p *packet, m *message, deliver deliverFunc) {
	switch {
	case p.from.IsValid() && p.from != s.server:
		s.count.stranger.Add(1)
	case p.cut:
		s.count.tooLarge.Add(1)
	case len(p.data) > 0 && p.data[0]&0xC0 == 0x40:
		if channel, payload, ok := parseChannelData(p.data); ok {
			deliver(channel, netip.AddrPort{}, payload)
		} else {
			s.count.malformed.Add(1)
		}
	case m.parse(p.data) != nil:
		s.count.malformed.Add(1)
	case m.class == stun.ClassIndication:
		switch {
		case m.method != stun.MethodData:
			s.count.unexpected.Add(1)
		case m.invalid || len(m.unknown) > 0 || m.has&hasData == 0 || len(m.peers) != 1:
			s.count.malformed.Add(1)
		default:
			deliver(0, m.peers[0], m.data)
		}
	case m.class == stun.ClassRequest:
		s.count.unexpected.Add(1)
	case m.invalid || m.class == stun.ClassSuccessResponse && !m.intact(s.key) || m.class == stun.ClassErrorResponse && m.errorCode == nil:
		s.count.malformed.Add(1)
	default:
		_, _ = s.pion.HandleInbound(p.data, nil)
	}
}

// allocate gets the allocation.
func (s *session) allocate() error {
	m, err := s.ask(stun.MethodAllocate, uint32Attribute(stun.AttrLifetime, uint32(defaultLifetime/time.Second)),
		attribute(stun.AttrRequestedTransport, 17, 0, 0, 0))
	if err != nil {
		return err
	}
	v, err := m.raw(stun.AttrXORRelayedAddress)
	if err != nil {
		return err
	}
	s.relayed, _ = m.address(v)
	return s.lives(m)
}

// lives remembers for how long the allocation lives.
func (s *session) lives(m *answer) error {
	if m.has&hasLifetime == 0 || m.lifetime == 0 {
		return errors.New("turn: the server said nothing of the allocation's lifetime")
	}
	s.life = time.Duration(m.lifetime) * time.Second
	return nil
}

// refresh makes the allocation live on.
func (s *session) refresh() error {
	m, err := s.ask(stun.MethodRefresh, uint32Attribute(stun.AttrLifetime, uint32(defaultLifetime/time.Second)))
	if err != nil {
		return err
	}
	return s.lives(m)
}

// bind binds a channel to a peer, or keeps it bound, which also is permission.
func (s *session) bind(number uint16, peer netip.AddrPort) error {
	_, err := s.ask(stun.MethodChannelBind, addressAttribute{stun.AttrXORPeerAddress, peer},
		uint32Attribute(stun.AttrChannelNumber, uint32(number)<<16))
	return err
}

// release gives the allocation back (TURN-17) and ends the session. Like any request it is sent
// again if it is lost, but not for long.
func (s *session) release() {
	if s.releasing.Swap(true) {
		<-s.over
		return
	}
	timer := time.AfterFunc(releaseTimeout, func() { s.end(net.ErrClosed) })
	defer timer.Stop()
	_, _ = s.ask(stun.MethodRefresh, uint32Attribute(stun.AttrLifetime, 0))
	s.end(net.ErrClosed)
}

func (s *session) lastNonce() []byte {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.nonce
}

func (s *session) build(method stun.Method, nonce []byte, setters ...stun.Setter) (*stun.Message, error) {
	all := append([]stun.Setter{stun.TransactionID, stun.NewType(method, stun.ClassRequest)}, setters...)
	if nonce != nil {
		all = append(all, stun.NewUsername(s.creds.Username), stun.NewRealm(s.creds.Realm),
			attribute(stun.AttrNonce, nonce...), s.key)
	}
	return stun.Build(append(all, stun.Fingerprint)...)
}

// An answer is a message of the server that outlives its datagram.
type answer struct{ message }

// raw is an attribute that has to be there.
func (a *answer) raw(kind stun.AttrType) ([]byte, error) {
	m := stun.Message{Raw: a.message.raw}
	if err := m.Decode(); err != nil {
		return nil, fmt.Errorf("turn: %w", err)
	}
	v, err := m.Get(kind)
	if err != nil {
		return nil, fmt.Errorf("turn: the server's answer has no %s: %w", kind, err)
	}
	return v, nil
}

// ask makes a request until it is answered, with credentials once the server has given
// a nonce for them. What is lost is sent again, as the same request.
func (s *session) ask(method stun.Method, setters ...stun.Setter) (*answer, error) {
	for range 4 { // without a nonce, with one, and with a new one when that was stale
		nonce := s.lastNonce()
		request, err := s.build(method, nonce, setters...)
		if err != nil {
			return nil, fmt.Errorf("turn: %w", err)
		}
		m, err := s.transact(request)
		if err != nil {
			return nil, err
		}
		if m.class == stun.ClassSuccessResponse {
			if m.method != method {
				return nil, fmt.Errorf("turn: the server answered %s with %s", method, m.method)
			}
			return m, nil
		}
		refused := &RefusedError{Request: method.String(), Code: int(m.code())}
		again := refused.Code == int(stun.CodeStaleNonce) || refused.Code == int(stun.CodeUnauthorized) && nonce == nil
		if !again || m.nonce == nil {
			return nil, ptipc.WithClass(classOf(refused.Code), refused)
		}
		s.mu.Lock()
		s.nonce = m.nonce
		s.mu.Unlock()
	}
	return nil, ptipc.WithClass(ptipc.ErrGeneral, &RefusedError{Request: method.String(), Code: int(stun.CodeStaleNonce)})
}

func classOf(code int) ptipc.Class {
	if code == int(stun.CodeForbidden) || code == int(stun.CodeUnauthorized) {
		return ptipc.ErrNotAllowed
	}
	return ptipc.ErrGeneral
}

// releaseTimeout is how long a Close can take when the server does not answer.
const releaseTimeout = time.Second

// patience is how many times pion sends a request seven times, 8 seconds in all. An
// allocation can take its transport a while.
const patience = 4

func (s *session) transact(request *stun.Message) (*answer, error) {
	var err error
	for range patience {
		result, e := s.pion.PerformTransaction(request, net.UDPAddrFromAddrPort(s.server), false)
		switch {
		case s.ended():
			return nil, s.err()
		case e == nil:
			m := &answer{}
			if err := m.parse(result.Msg.Raw); err != nil {
				return nil, err
			}
			return m, nil
		}
		err = e
	}
	return nil, ptipc.WithClass(ptipc.ErrTimedOut, fmt.Errorf("%w: no answer from %s: %w", ErrLost, s.server, err))
}
