package conformance

import (
	"encoding/json"
	"errors"
	"io"
	"net"
	"slices"
	"time"

	ptwire "pthost/adapters/pt1/wire"
	"pthost/ptipc/localnet"
)

// A server is a child in that role, with the suite as its host.
type server struct {
	*child
	t      *trial
	method method
	client *child // through which the wire is reached; nil if it is plain TCP
	// datagrams says that the wire carries them: its client has packet factories alone.
	datagrams bool
	post      *post
	conns     chan net.Conn
	over      chan struct{} // closed when the case ends
	cookie    ptwire.Cookie // of the Extended ORPort, if the server is a managed transport
	plain     bool          // it has a plain ORPort alone
}

// serve starts a server that delivers to the suite.
func (t *trial) serve() *server { return t.serveWith(launch{}) }

func (t *trial) serveWith(l launch) *server {
	if t.suite.managed() {
		return t.serveManaged(l)
	}
	usual := l.usual()
	if usual && t.suite.unready {
		t.cannot("the child did not get ready before")
	}
	var s *server
	var pair configPair
	for tries := 1; ; tries++ {
		pair = t.pair()
		if s = t.serveOnce(l, pair); t.settled(s.child) {
			break
		}
		if !t.again(s.child, tries) {
			t.suite.unready = t.suite.unready || usual
			t.fellUnready(s.child)
		}
	}
	s.method = t.method(s.child)
	if pair.client != "" {
		s.client = t.start(launch{role: Client, config: pair.client, post: s.post})
		t.getsReady(s.client)
		s.datagrams = s.client.datagrams()
	}
	return s
}

// again reports whether a server that has not got ready may be generated anew: the port
// that was free then (SRV-6) may have been taken by somebody else.
func (t *trial) again(c *child, tries int) bool {
	return c.role == Server && len(t.suite.subject.Generate) > 0 && c.ended() && tries < 3
}

// serveOnce starts a server, and accepts what it delivers.
func (t *trial) serveOnce(l launch, pair configPair) *server {
	s := &server{t: t, post: newPost(), conns: make(chan net.Conn), over: make(chan struct{})}
	var listener *localnet.Listener
	accepting := make(chan struct{})
	l.role, l.config, l.post = Server, pair.server, s.post
	l.prepare = func(dir *localnet.Dir) (err error) {
		listener, err = dir.Listen(deliverName)
		return err
	}
	s.child = t.start(l)
	t.onEnd(func() { close(s.over); listener.Close(); <-accepting })
	go func() {
		defer close(accepting)
		for {
			conn, err := listener.Accept()
			if err != nil {
				return // closed
			}
			select {
			case s.conns <- conn:
			case <-s.over:
				conn.Close()
				return
			}
		}
	}()
	return s
}

func (s *server) plainWire() bool { return s.client == nil }

// proxying ends the case for a server that hands its connections over.
func (s *server) proxying() {
	if !s.method.proxies() {
		s.t.cannot("the server hands its connections over: it does not announce proxy=1")
	}
}

// dial connects to the wire as a client.
func (s *server) dial() *wire {
	t := s.t
	s.streams()
	if !s.plainWire() {
		// The wire's handshake may end at once or with the delivery: the reply comes later.
		return t.open(s.client, t.dest(s.client))
	}
	conn, err := (&net.Dialer{}).DialContext(t.ctx, "tcp", s.method.addr)
	if err != nil {
		t.fell("a connection to the wire at "+s.method.addr, "%v", err)
	}
	return t.wire("wire's client", conn, nil)
}

// refuseAll refuses what is still delivered.
func (s *server) refuseAll() {
	for {
		select {
		case conn := <-s.conns:
			conn.Close()
		case <-s.over:
			return
		}
	}
}

// streams ends the case for a wire of datagrams, which have no connections.
func (s *server) streams() {
	if s.datagrams {
		s.t.cannot("the wire carries datagrams")
	}
}

// closed waits until the wire accepts no more.
func (s *server) closed() bool {
	go s.refuseAll() // what comes of looking
	return s.t.until(func() bool {
		conn, err := (&net.Dialer{}).DialContext(s.t.ctx, "tcp", s.method.addr)
		if err == nil {
			conn.Close()
		}
		return err != nil
	})
}

// A delivery is a connection that the server hands to the suite.
type delivery struct {
	*wire
	server *server
}

// accepted waits for a delivery.
func (s *server) accepted() *delivery {
	t := s.t
	if s.method.proxies() {
		t.cannot("the server connects its clients itself")
	}
	select {
	case conn := <-s.conns:
		if s.t.suite.managed() {
			t.onEnd(func() { conn.Close() })
			return s.delivered(conn)
		}
		return &delivery{t.wire("host", conn, s.ends.Accepted(conn.RemoteAddr())), s}
	case <-time.After(t.suite.patience):
	case <-t.ctx.Done():
	}
	t.fell("a connection to deliver", "none in %v", t.suite.patience)
	return nil
}

// A passage is a connection through a server.
type passage struct {
	server *server
	client *wire
	host   *delivery // nil if the server has connected it to an echo server,
	spent  int       // to which so many bytes have gone and come back

	packets net.PacketConn // in place of client, on a wire of datagrams,
	far     *packetFar     // and its other end
}

// open makes a connection through the server.
func (s *server) open() passage {
	if s.method.proxies() {
		if s.plainWire() && !s.t.suite.subject.Echoes {
			s.t.cannot("nothing is known about where the server leads; give it an echo server and set Subject.Echoes")
		}
		const hello = "hello" // that it comes back says that the server has its client
		if s.datagrams {
			p := passage{server: s, packets: s.t.allocation(s.t.packetMethod(s.client)), far: s.t.packetWire(s.method), spent: len(hello)}
			p.up(hello)
			return p
		}
		if !s.plainWire() {
			s.t.echoing(s.client)
		}
		client := s.dial()
		client.echo(hello)
		return passage{server: s, client: client, spent: len(hello)}
	}
	client := s.dial()
	host := s.accepted()
	host.handshake()
	host.answer(granted)
	return passage{server: s, client: client, host: host}
}

// up sends text from the client, and returns how many bytes have come back from
// where it went.
func (p passage) up(text string) (back int) {
	if p.packets != nil {
		p.server.t.echoPacket(p.packets, p.far, []byte(text))
		return len(text)
	}
	if p.host == nil {
		p.client.echo(text)
		return len(text)
	}
	p.client.send([]byte(text))
	p.host.bytes([]byte(text), "what the wire's client has sent")
	return 0
}

// exchange demands that bytes go both ways.
func (p passage) exchange() {
	p.up("question")
	if p.host != nil {
		p.host.send([]byte("answer"))
		p.client.bytes([]byte("answer"), "what the host has sent, at the client")
	}
}

// close hangs up at both ends.
func (p passage) close() {
	if p.packets != nil {
		p.packets.Close()
		return
	}
	p.client.close()
	if p.host != nil {
		p.host.close()
	}
}

// handshake reads it up to the reply, and returns the settings.
func (d *delivery) handshake() map[string]any {
	if d.t.suite.managed() {
		return d.identify()
	}
	_ = d.conn.SetReadDeadline(time.Now().Add(d.t.suite.patience))
	_ = d.conn.SetWriteDeadline(time.Now().Add(d.t.suite.patience))
	told, err := takeDelivery(io.TeeReader(d.conn, shower{d.wire}), d.conn)
	if err != nil {
		d.t.fell(`greeting with method 80, the settings {"transport":NAME,"remote":ADDR}, and CONNECT to [::]:0`, "%v", err)
	}
	return told
}

// shower shows what it is given.
type shower struct{ *wire }

func (s shower) Write(b []byte) (int, error) {
	s.t.show(s.who+" <", b)
	return len(b), nil
}

func (d *delivery) answer(code byte) {
	if d.t.suite.managed() {
		d.agree(code == granted)
		return
	}
	d.send(replyOf(code))
}

func replyOf(code byte) []byte { return []byte{5, code, 0, 1, 0, 0, 0, 0, 0, 0} }

// takeDelivery reads the handshake of a delivery up to the reply (SRV-3), and not a
// byte more. It returns the settings.
func takeDelivery(from io.Reader, to io.Writer) (told map[string]any, err error) {
	read := func(n int) []byte {
		b := make([]byte, n)
		if err == nil {
			_, err = io.ReadFull(from, b)
		}
		return b
	}
	head := read(2)
	if offered := read(int(head[1])); err == nil && (head[0] != 5 || !slices.Contains(offered, settings)) {
		return nil, errors.New("the greeting is another one")
	}
	if _, werr := to.Write([]byte{5, settings}); err == nil {
		err = werr
	}
	var text []byte
	if first := read(1); first[0] == 0 {
		size := read(3)
		text = read(int(size[0])<<16 | int(size[1])<<8 | int(size[2]))
	} else {
		for text = first; err == nil && !json.Valid(text) && len(text) < 4096; {
			text = append(text, read(1)...)
		}
	}
	want := request(anywhere)
	got := read(len(want))
	switch {
	case err != nil:
		return nil, err
	case json.Unmarshal(text, &told) != nil || told == nil:
		return nil, errors.New("the settings are no JSON object")
	case !slices.Equal(got, want):
		return nil, errors.New("the request is another one")
	}
	return told, nil
}

// A farServer is the server of a generated pair: what its clients' connections lead to
// is the suite's.
type farServer struct {
	child  *child
	post   *post
	client string // the configuration of its clients
	ends   *farEnd
}

// farServer starts it for the first case that needs it, and the whole run.
func (t *trial) farServer() *farServer {
	s := t.suite
	if s.far != nil {
		return s.far
	}
	if s.unready {
		t.cannot("the child did not get ready before")
	}
	for tries := 1; ; tries++ {
		var pair configPair
		var err error
		if s.managed() {
			pair.server, err = s.managedServer()
			t.need(err)
		} else {
			pair = t.pair()
		}
		far := &farServer{post: newPost(), client: pair.client}
		far.ends, err = newFarEnd(s.taking(echo))
		t.need(err)
		l := launch{role: Server, config: pair.server, post: far.post}
		if s.managed() {
			l.tell = func(o order) { o[varORPort] = far.ends.addr() }
		} else {
			l.args = s.words(Server, pair.server, map[string]any{"deliver": far.ends.addr()})
		}
		far.child, err = s.start(t.ctx, l)
		if err != nil {
			far.ends.close()
			t.cannot("%v", err)
		}
		t.children = append(t.children, far.child)
		if t.settled(far.child) {
			if s.managed() {
				far.client = t.clientOf(far.child)
			}
			s.far = far
			return far
		}
		t.onEnd(far.close)
		if !t.again(far.child, tries) {
			s.unready = true
			t.fellUnready(far.child)
		}
	}
}

func (f *farServer) close() {
	f.child.stop()
	f.ends.close()
}
