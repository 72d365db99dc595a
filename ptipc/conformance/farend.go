package conformance

import (
	"context"
	"encoding/binary"
	"io"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"sync"
	"time"

	"pthost/ptipc/localnet"
)

// A farEnd is a server on this machine's loopback that a child can be led to.
type farEnd struct {
	listener *net.TCPListener
	serving  sync.WaitGroup

	mu    sync.Mutex
	serve func(*net.TCPConn)
	conns map[net.Conn]struct{} // nil once it is closed
	count int                   // connections ever accepted
}

// newFarEnd serves connections with serve, each in its own goroutine, until close.
func newFarEnd(serve func(*net.TCPConn)) (*farEnd, error) {
	listener, err := localnet.ListenTCP("127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	f := &farEnd{listener: listener, serve: serve, conns: map[net.Conn]struct{}{}}
	f.serving.Go(func() {
		for {
			conn, err := listener.AcceptTCP()
			if err != nil {
				return // closed
			}
			if !f.add(conn) {
				conn.Close()
				return
			}
			f.serving.Go(func() {
				defer f.remove(conn)
				f.handler()(conn)
			})
		}
	})
	return f, nil
}

// agreeing takes deliveries (SRV-3) and serves what comes on them.
func agreeing(serve func(*net.TCPConn)) func(*net.TCPConn) {
	return func(conn *net.TCPConn) {
		_ = conn.SetDeadline(time.Now().Add(limit))
		if _, err := takeDelivery(conn, conn); err != nil {
			return // what is wrong with it, the cases for servers say
		}
		if _, err := conn.Write(replyOf(granted)); err != nil {
			return
		}
		_ = conn.SetDeadline(time.Time{})
		serve(conn)
	}
}

// taking takes what servers of the subject's dialect bring: a managed transport's on a
// plain ORPort (PT1-28).
func (s *suite) taking(serve func(*net.TCPConn)) func(*net.TCPConn) {
	if s.managed() {
		return serve
	}
	return agreeing(serve)
}

func (f *farEnd) handler() func(*net.TCPConn) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.serve
}

// handle serves with another function from now on.
func (f *farEnd) handle(serve func(*net.TCPConn)) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.serve = serve
}

func (f *farEnd) add(conn net.Conn) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.conns == nil {
		return false
	}
	f.count++
	f.conns[conn] = struct{}{}
	return true
}

func (f *farEnd) remove(conn net.Conn) {
	f.mu.Lock()
	defer f.mu.Unlock()
	conn.Close()
	delete(f.conns, conn)
}

func (f *farEnd) accepted() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.count
}

// open counts the connections that have not ended.
func (f *farEnd) open() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return len(f.conns)
}

func (f *farEnd) addr() string { return f.listener.Addr().String() }

func (f *farEnd) close() {
	f.listener.Close()
	f.mu.Lock()
	for conn := range f.conns {
		conn.Close()
	}
	f.conns = nil
	f.mu.Unlock()
	f.serving.Wait()
}

// echo is RFC 862 with half-close: the end of the stream goes back after the last byte.
func echo(conn *net.TCPConn) {
	_, _ = io.Copy(conn, conn) // a stream that breaks is for the child to tell
	_ = conn.CloseWrite()
	_, _ = io.Copy(io.Discard, conn)
}

// destination gives the case the far end's side of its connections.
func (t *trial) destination(c *child) (addr string, accept func() *wire) {
	conns := make(chan *net.TCPConn)
	ended := make(chan struct{})
	hand := func(conn *net.TCPConn) {
		select {
		case conns <- conn:
			<-ended
		case <-ended:
		}
	}
	if bound := t.method(c).bound(); bound && t.suite.far != nil {
		addr = t.dest(c)
		// What cases before have dialled may be on its way still.
		ends := t.suite.far.ends
		w := t.open(c, addr)
		w.echo("the last one")
		w.close()
		t.until(func() bool { return ends.open() == 0 })
		ends.handle(t.suite.taking(hand))
		t.onEnd(func() { close(ended); ends.handle(t.suite.taking(echo)) })
	} else {
		t.free(c)
		if t.suite.subject.Dest != "" {
			t.cannot("the far end cannot be looked at: the child does not reach this machine's loopback (Subject.Dest)")
		}
		far, err := newFarEnd(hand)
		t.need(err)
		addr = far.addr()
		t.onEnd(func() { close(ended); far.close() })
	}
	return addr, func() *wire {
		select {
		case conn := <-conns:
			return &wire{t: t, who: "far end", conn: conn}
		case <-time.After(t.suite.patience):
			t.fell("a connection at the destination", "none in %v", t.suite.patience)
		case <-t.ctx.Done():
			t.fell("a connection at the destination", "none")
		}
		return nil
	}
}

// nobody is a loopback address at which nothing listens, and will not while the case
// runs: the port is in use by a client.
func (t *trial) nobody() string {
	addr, err := localnet.ParseAddr(t.suite.echo.addr())
	t.need(err)
	conn, err := localnet.DialTCP(t.ctx, addr)
	t.need(err)
	t.onEnd(func() { conn.Close() })
	return conn.LocalAddr().String()
}

// An asked is a request that an upstream proxy has got.
type asked struct {
	user, password string
	name           bool   // the destination came as a name
	dest           string // host:port
}

// An upstream is an ordinary SOCKS5 proxy that writes down what it is asked for.
type upstream struct {
	*farEnd
	route func(ctx context.Context, a asked) (conn net.Conn, code byte)

	mu   sync.Mutex
	asks []asked
}

// upstream starts a proxy. It asks for user and password if there is a user.
func (t *trial) upstream(user, password string, route func(context.Context, asked) (net.Conn, byte)) *upstream {
	u, err := t.newUpstream(user, password, route)
	t.need(err)
	t.onEnd(u.close)
	return u
}

// newUpstream starts one where it is called: the thread may have a network of its own.
func (t *trial) newUpstream(user, password string, route func(context.Context, asked) (net.Conn, byte)) (*upstream, error) {
	u := &upstream{route: route}
	far, err := newFarEnd(func(conn *net.TCPConn) { u.serve(t.ctx, conn, user, password) })
	u.farEnd = far
	return u, err
}

func (u *upstream) requests() []asked {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.asks[:len(u.asks):len(u.asks)]
}

func (u *upstream) serve(ctx context.Context, conn *net.TCPConn, user, password string) {
	_ = conn.SetDeadline(time.Now().Add(limit))
	a, ok := u.handshake(conn, user, password)
	if !ok {
		return
	}
	u.mu.Lock()
	u.asks = append(u.asks, a)
	u.mu.Unlock()
	far, code := u.route(ctx, a)
	if _, err := conn.Write(replyOf(code)); err != nil || far == nil {
		return
	}
	_ = conn.SetDeadline(time.Time{})
	defer far.Close()
	back := make(chan struct{})
	go func() {
		defer close(back)
		_, _ = io.Copy(conn, far) // what breaks here is for the client to notice
		_ = conn.CloseWrite()
	}()
	_, _ = io.Copy(far, conn)
	_ = far.(*net.TCPConn).CloseWrite()
	_ = far.SetReadDeadline(time.Now().Add(time.Second)) // the client has what it wanted
	<-back
}

// handshake reads greeting, login and request step by step.
func (u *upstream) handshake(conn net.Conn, user, password string) (a asked, ok bool) {
	ok = true
	get := func(n int) []byte {
		b := make([]byte, n)
		_, err := io.ReadFull(conn, b)
		ok = ok && err == nil
		return b
	}
	text := func() string { return string(get(int(get(1)[0]))) }
	put := func(b ...byte) {
		_, err := conn.Write(b)
		ok = ok && err == nil
	}
	method := none
	if user != "" {
		method = 2 // RFC 1929
	}
	get(1)
	if offered := text(); !ok || !strings.Contains(offered, string([]byte{method})) {
		put(5, refused)
		return a, false
	}
	put(5, method)
	if user != "" {
		get(1)
		a.user, a.password = text(), text()
		if a.user != user || a.password != password {
			put(1, 1)
			return a, false
		}
		put(1, 0)
	}
	switch get(4)[3] {
	case 1:
		a.dest = netip.AddrFrom4([4]byte(get(4))).String()
	case 4:
		a.dest = netip.AddrFrom16([16]byte(get(16))).String()
	default:
		a.name, a.dest = true, text()
	}
	a.dest = net.JoinHostPort(a.dest, strconv.Itoa(int(binary.BigEndian.Uint16(get(2)))))
	return a, ok
}

// dialer is the route of an honest proxy.
func dialer(ctx context.Context, a asked) (net.Conn, byte) {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "tcp", a.dest)
	if err != nil {
		return nil, 1
	}
	return conn, granted
}
