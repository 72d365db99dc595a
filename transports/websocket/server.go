package websocket

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log"
	"log/slog"
	"net"
	"net/http"
	"net/http/httputil"
	"net/netip"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/gorilla/websocket"

	"pthost/ptipc"
	"pthost/ptipc/relay"
	"pthost/transports/endpoint"
)

const (
	// maxOpening is how many connections may be in a handshake or in Accept's queue at a
	// time (WS-4), and maxVisitors how many with the web site: who keeps that busy is in
	// nobody's way here.
	maxOpening  = 1024
	maxVisitors = 1024

	// siteIdle is how long a connection to the web site may wait for a request, and
	// the site for its backend's answer.
	siteIdle = time.Minute
)

// Server is the server side of the transport.
var Server = &ptipc.ServerFactory{GenerateConfig: generate, Listen: listen}

type serverConfig struct {
	Listen         endpoint.Address `json:"listen"`
	Path           sitePath         `json:"path"`
	Certificate    string           `json:"certificate,omitempty"`
	Key            string           `json:"key,omitempty"`
	Backend        backendURL       `json:"backend,omitempty"`
	TrustForwarded bool             `json:"trust_forwarded,omitempty"`
	Ping           interval         `json:"ping,omitempty"`
}

// Validate implements [ptipc.Validator].
func (c *serverConfig) Validate() error {
	switch {
	case c.Certificate == "" && c.Key != "":
		return &ptipc.ConfigError{Pointer: "/certificate", Problem: "is missing beside a key", Remedy: "add it, or remove the key to serve ws://"}
	case c.Certificate != "" && c.Key == "":
		return &ptipc.ConfigError{Pointer: "/key", Problem: "is missing beside a certificate", Remedy: "add it, or remove the certificate to serve ws://"}
	}
	return nil
}

// A sitePath is the path of a URL, decoded.
type sitePath string

// Validate implements [ptipc.Validator].
func (p sitePath) Validate() error {
	if !strings.HasPrefix(string(p), "/") || strings.ContainsAny(string(p), "?#") {
		return errors.New("is not a path: write / and what follows the port in the clients' URL, without ? and #")
	}
	return nil
}

// A backendURL is where a web site is.
type backendURL struct{ url *url.URL }

// UnmarshalText implements [encoding.TextUnmarshaler].
func (b *backendURL) UnmarshalText(text []byte) error {
	u, err := url.Parse(string(text))
	if err != nil || u.Scheme != "http" || u.Hostname() == "" || u.User != nil || u.Fragment != "" || u.RawQuery != "" {
		return errors.New("is not a backend: write http://HOST:PORT")
	}
	b.url = u
	return nil
}

// A server is a [ptipc.Listener].
type server struct {
	config   serverConfig
	log      *slog.Logger
	socket   net.Listener
	http     *http.Server
	site     http.Handler
	upgrader websocket.Upgrader
	meter    relay.Meter
	group    group

	conns    chan *conn
	opening  chan struct{} // a place for each connection that is not a stream yet
	visitors chan struct{} // in its place, for one that has gone to the web site

	stop  func()        // ends the server, once
	done  chan struct{} // closed when stop begins
	ended chan struct{} // closed when nothing runs any more
	err   error         // why it ended by itself; read after ended
}

func listen(ctx context.Context, opaque ptipc.Opaque, env ptipc.Env) (ptipc.Listener, error) {
	config := serverConfig{Ping: defaultPing}
	if err := opaque.Decode(&config); err != nil {
		return nil, err
	}
	var secure *tls.Config
	if config.Certificate != "" {
		var err error
		if secure, err = (endpoint.Server{Certificate: config.Certificate, Key: config.Key}).TLS(alpn); err != nil {
			return nil, err
		}
	}
	socket, err := config.Listen.Open(ctx)
	if err != nil {
		return nil, ptipc.Classify(err)
	}
	s := &server{
		config:   config,
		log:      env.Logger(),
		socket:   socket,
		conns:    make(chan *conn),
		opening:  make(chan struct{}, maxOpening),
		visitors: make(chan struct{}, maxVisitors),
		done:     make(chan struct{}),
		ended:    make(chan struct{}),
	}
	s.start(secure, env)
	return s, nil
}

func (s *server) start(secure *tls.Config, env ptipc.Env) {
	quiet := slog.NewLogLogger(s.log.Handler(), slog.LevelDebug) // what strangers do wrong
	leaveSite := func() {}
	s.site = http.NotFoundHandler()
	if to := s.config.Backend.url; to != nil {
		s.site, leaveSite = s.proxy(to, quiet, env)
	}
	s.upgrader = websocket.Upgrader{
		CheckOrigin: func(*http.Request) bool { return true }, // WS-15
		Error:       func(w http.ResponseWriter, r *http.Request, _ int, _ error) { s.serveSite(w, r) },
	}
	base, cancel := context.WithCancel(context.Background())
	http1 := new(http.Protocols)
	http1.SetHTTP1(true)
	s.http = &http.Server{
		Handler:                      http.HandlerFunc(s.serve),
		DisableGeneralOptionsHandler: true,
		ReadHeaderTimeout:            handshakeTime,
		IdleTimeout:                  siteIdle,
		MaxHeaderBytes:               maxHeaders,
		ErrorLog:                     quiet,
		Protocols:                    http1,
		BaseContext:                  func(net.Listener) context.Context { return base },
		ConnContext: func(ctx context.Context, c net.Conn) context.Context {
			return context.WithValue(ctx, accepted{}, openConnOf(c))
		},
	}
	s.stop = sync.OnceFunc(func() {
		close(s.done)
		_ = s.http.Close() // what it closes may be closed already
	})
	var l net.Listener = (*wires)(s)
	if secure != nil {
		l = tls.NewListener(l, secure)
	}
	go func() {
		err := s.http.Serve(l)
		select {
		case <-s.done: // Close has ended it
		default:
			s.err = fmt.Errorf("websocket: the listening socket failed: %w", err)
		}
		s.stop()
		cancel()
		close(s.ended)
		// What was handed over lives on (LIFE-2), with what it does in the background.
		_ = s.meter.Drain(context.Background())
		s.group.close()
		leaveSite()
	}()
}

// accepted is the key of a connection in its requests' contexts.
type accepted struct{}

// wires is the server as the listener of http.Server.
type wires server

// Accept makes what the socket accepts a wire that holds one of the places.
func (l *wires) Accept() (net.Conn, error) {
	select {
	case l.opening <- struct{}{}:
	case <-l.done:
		return nil, net.ErrClosed
	}
	raw, err := l.socket.Accept()
	if err != nil {
		<-l.opening
		return nil, err
	}
	o := &openConn{server: (*server)(l), place: l.opening}
	o.wire = l.group.add(raw, o.leave)
	return o, nil
}

func (l *wires) Close() error   { return l.socket.Close() }
func (l *wires) Addr() net.Addr { return l.socket.Addr() }

// An openConn is a wire that is not a stream yet.
type openConn struct {
	*wire
	server *server
	once   sync.Once
	served atomic.Bool // it got past the handshake, or to the web site

	mu    sync.Mutex
	place chan struct{} // where it has one: server.opening, or server.visitors; nil when it has left
}

// visit takes a place with the web site in exchange, if there is one.
func (o *openConn) visit() bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.place != o.server.opening {
		return true // it is there, or it is gone and nobody minds
	}
	select {
	case o.server.visitors <- struct{}{}:
		<-o.place
		o.place = o.server.visitors
		return true
	default:
		return false
	}
}

// leave gives the place back, and counts a failure if nothing came of it.
func (o *openConn) leave() {
	o.once.Do(func() {
		o.mu.Lock()
		<-o.place
		o.place = nil
		o.mu.Unlock()
		if !o.served.Load() {
			o.server.meter.Failed()
		}
	})
}

// openConnOf finds the wire under a connection of http.Server.
func openConnOf(c net.Conn) *openConn {
	if secure, ok := c.(*tls.Conn); ok {
		c = secure.NetConn()
	}
	return c.(*openConn) // wires.Accept makes no other
}

// serve takes the requests that are for the transport and passes on all others (WS-15).
func (s *server) serve(w http.ResponseWriter, r *http.Request) {
	if !s.group.enter() {
		return
	}
	defer s.group.work.Done()
	if r.URL.Path != string(s.config.Path) || !websocket.IsWebSocketUpgrade(r) {
		s.serveSite(w, r)
		return
	}
	upgraded, err := s.upgrader.Upgrade(w, r, nil)
	if err != nil {
		return // the site has answered, or there was nobody to answer to
	}
	stream := upgraded.NetConn()
	o := openConnOf(stream)
	if stream == net.Conn(o) {
		stream = o.wire
	}
	c := newConn(stream, o.wire, false, nil, s.remote(r, stream), time.Duration(s.config.Ping))
	wait := time.NewTimer(handshakeTime)
	defer wait.Stop()
	o.served.Store(true) // before somebody has it and may close it
	select {
	case s.conns <- c:
		o.leave()
	case <-wait.C:
		o.served.Store(false)
		s.log.Warn("a connection was not accepted in time", "remote", c.RemoteAddr())
		c.refuse()
	case <-s.done:
		_ = relay.Abort(c) // nobody will accept it
	}
}

// serveSite answers what is not for the transport.
func (s *server) serveSite(w http.ResponseWriter, r *http.Request) {
	if s.config.Backend.url != nil {
		o := r.Context().Value(accepted{}).(*openConn)
		if !o.visit() {
			w.Header().Set("Connection", "close")
			http.Error(w, http.StatusText(http.StatusServiceUnavailable), http.StatusServiceUnavailable)
			return
		}
		o.served.Store(true)
	}
	s.site.ServeHTTP(w, r)
}

// proxy is the way to the web site, and what ends it.
func (s *server) proxy(to *url.URL, log *log.Logger, env ptipc.Env) (http.Handler, func()) {
	transport := &http.Transport{ // Proxy is nil: the environment has no say (WS-2)
		DialContext:           env.Dial,
		DisableCompression:    true, // what the site sends is passed on as it is
		MaxIdleConnsPerHost:   16,
		IdleConnTimeout:       siteIdle,
		ResponseHeaderTimeout: siteIdle,
	}
	site := &httputil.ReverseProxy{
		Transport: transport,
		ErrorLog:  log,
		Rewrite: func(r *httputil.ProxyRequest) {
			r.SetURL(to)
			r.Out.Host = r.In.Host
			if s.config.TrustForwarded {
				r.Out.Header["X-Forwarded-For"] = r.In.Header["X-Forwarded-For"]
			}
			r.SetXForwarded()
		},
	}
	return site, transport.CloseIdleConnections
}

// remote is who the client is (WS-16).
func (s *server) remote(r *http.Request, stream net.Conn) net.Addr {
	if !s.config.TrustForwarded {
		return stream.RemoteAddr()
	}
	addr, err := forwarded(r.Header)
	if err != nil {
		s.log.Warn("the proxy does not say who the client is", "err", err)
		return stream.RemoteAddr()
	}
	return net.TCPAddrFromAddrPort(netip.AddrPortFrom(addr, 0))
}

var errForwarded = errors.New("X-Forwarded-For and X-Real-IP are missing, not addresses, or differ")

// forwarded is the address that the nearest proxy has seen. It has added it at
// the end of X-Forwarded-For, or put it into X-Real-IP. A client may have sent the
// one that the proxy does not set; then the two differ, and neither is believed.
func forwarded(header http.Header) (netip.Addr, error) {
	var seen []string
	if values := header.Values("X-Forwarded-For"); len(values) > 0 {
		last := values[len(values)-1]
		seen = append(seen, last[strings.LastIndexByte(last, ',')+1:])
	}
	seen = append(seen, header.Values("X-Real-Ip")...)
	var found netip.Addr
	for _, text := range seen {
		addr, err := netip.ParseAddr(strings.TrimSpace(text))
		if err != nil || found.IsValid() && addr != found {
			return netip.Addr{}, errForwarded
		}
		found = addr
	}
	if !found.IsValid() {
		return netip.Addr{}, errForwarded
	}
	return found, nil
}

// Accept implements [net.Listener]. What it returns is a [ptipc.Conn].
func (s *server) Accept() (net.Conn, error) {
	select {
	case c := <-s.conns:
		return s.meter.Conn(c, relay.Options{}), nil
	case <-s.done:
		return nil, fmt.Errorf("websocket: %w", net.ErrClosed)
	}
}

// Addr is where the wire listens.
func (s *server) Addr() net.Addr { return s.socket.Addr() }

// Stats returns the totals (STAT-2).
func (s *server) Stats() ptipc.TransportStats { return s.meter.Stats() }

// Wait blocks until the server has ended: nil after Close.
func (s *server) Wait() error {
	<-s.ended
	return s.err
}

// Close stops listening. Connections that were accepted live on.
func (s *server) Close() error {
	s.stop()
	<-s.ended
	return nil
}
