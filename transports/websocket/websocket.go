// Package websocket carries a byte stream in a WebSocket: a bound client, and a
// server that can share its port with a web site. The wire is specified in
// spec/websocket.md; names such as WS-6 in comments are clauses of that document.
//
// A pair is made by generating both configurations, listening with one and
// dialling with the other:
//
//	client, server, err := websocket.Server.GenerateConfig(ctx, ptipc.Opaque(`{"listen":"0.0.0.0:8443","host":"192.0.2.1"}`), ptipc.Env{})
//	if err != nil {
//		return err
//	}
//	listener, err := websocket.Server.Listen(ctx, server, ptipc.Env{})
//	if err != nil {
//		return err
//	}
//	defer listener.Close()
//
//	transport, err := websocket.Open(ctx, client, ptipc.Env{}) // on another machine
//	if err != nil {
//		return err
//	}
//	defer transport.Close()
//	conn, err := transport.Connections["websocket"].Dial(ctx, nil, "")
//
// The client's configuration has these keys:
//
//	url          wss://HOST[:PORT]/PATH, or ws:// where something else encrypts;
//	             wss:///PATH leaves the server to the settings
//	pin          sha256: and the SHA-256 of the server's public key in base64
//	ca           authorities instead of the system's: PEM, or the name of a file
//	server_name  the name that the certificate is for, where it is not HOST
//	ping         interval of the pings, 30s; or off
//
// Its settings can name the server of one connection (WS-17): host and port take
// the place of those of the URL, and url, pin and server_name that of all that the
// configuration says. A configuration without url leaves it to them.
//
// The server's:
//
//	listen           IP:PORT
//	path             /PATH; whoever knows it may connect
//	certificate, key PEM, or names of files; without them the server speaks ws://
//	backend          http://HOST:PORT of the web site that gets all other requests;
//	                 without it they are answered 404
//	trust_forwarded  true behind a reverse proxy: X-Forwarded-For or X-Real-IP say
//	                 who the client is
//	ping             as above
//
// Those of GenerateConfig: listen (":443"; port 0 is a port that is free now), host
// (the server's name or address for its clients; needed if listen is every
// address; "" leaves it to the settings of each connection), and backend.
package websocket

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/gorilla/websocket"

	"pthost/ptipc"
	"pthost/ptipc/relay"
	"pthost/transports/endpoint"
)

const (
	// handshakeTime bounds the opening handshake, that of TLS included (WS-4).
	handshakeTime = 10 * time.Second

	// maxHeaders bounds the header of a request or a response (WS-4).
	maxHeaders = 16 << 10

	// alpn is the protocol below the WebSocket, as browsers name it.
	alpn = "http/1.1"
)

// An interval is the time between pings: "off", or a duration such as "30s".
type interval time.Duration

const defaultPing = interval(30 * time.Second)

// UnmarshalText implements [encoding.TextUnmarshaler].
func (i *interval) UnmarshalText(text []byte) error {
	if string(text) == "off" {
		*i = 0
		return nil
	}
	d, err := time.ParseDuration(string(text))
	if err != nil || d < time.Second || d > time.Hour {
		return errors.New("is not an interval: write 30s, anything from 1s to 1h, or off")
	}
	*i = interval(d)
	return nil
}

type clientConfig struct {
	URL        wsURL    `json:"url,omitempty"`
	Pin        string   `json:"pin,omitempty"`
	CA         string   `json:"ca,omitempty"`
	ServerName string   `json:"server_name,omitempty"`
	Ping       interval `json:"ping,omitempty"`
}

// Validate implements [ptipc.Validator].
func (c *clientConfig) Validate() error {
	return onlyWithTLS(c.URL, map[string]string{"/pin": c.Pin, "/ca": c.CA, "/server_name": c.ServerName})
}

// onlyWithTLS refuses what says how to know a server that is not asked who it is.
func onlyWithTLS(u wsURL, keys map[string]string) error {
	if u.Scheme == "wss" {
		return nil
	}
	for pointer, value := range keys {
		if value != "" {
			return &ptipc.ConfigError{Pointer: pointer, Problem: "does nothing without a URL of wss:// beside it", Remedy: "remove it, or use wss://"}
		}
	}
	return nil
}

// A wsURL is the address of a server.
type wsURL struct{ url.URL }

// UnmarshalText implements [encoding.TextUnmarshaler]. The path is a secret, so
// errors do not repeat it.
func (u *wsURL) UnmarshalText(text []byte) error {
	parsed, err := url.Parse(string(text))
	if err != nil || parsed.Scheme != "ws" && parsed.Scheme != "wss" || parsed.Opaque != "" || parsed.User != nil || parsed.Fragment != "" {
		return errors.New("is not a URL of a WebSocket: write wss://HOST[:PORT]/PATH")
	}
	if err := hostName(parsed.Hostname()).Validate(); err != nil {
		return errors.New("has a host that is neither a name nor an address")
	}
	if parsed.Hostname() == "" && parsed.Host != "" {
		return errors.New("has a port without a host: write both, or wss:///PATH to leave both to the settings")
	}
	if port := parsed.Port(); port != "" {
		if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 {
			return errors.New("has a port that is not one: write 1 to 65535")
		}
	}
	u.URL = *parsed
	return nil
}

// A hostName is a name or an address without a port.
type hostName string

// Validate implements [ptipc.Validator].
func (h hostName) Validate() error {
	if _, err := netip.ParseAddr(string(h)); err == nil {
		return nil
	}
	if len(h) > 253 || strings.ContainsAny(string(h), ":/?#[]@%") || strings.ContainsFunc(string(h), func(r rune) bool { return r <= ' ' || r == 0x7f }) {
		return errors.New("is neither a name nor an address: write it without a port and without brackets")
	}
	return nil
}

// settings name the server of one connection (WS-17).
type settings struct {
	Host       hostName `json:"host,omitempty"`
	Port       uint16   `json:"port,omitempty"`
	URL        wsURL    `json:"url,omitempty"`
	Pin        string   `json:"pin,omitempty"`
	ServerName string   `json:"server_name,omitempty"`
}

// Validate implements [ptipc.Validator].
func (s *settings) Validate() error {
	return onlyWithTLS(s.URL, map[string]string{"/pin": s.Pin, "/server_name": s.ServerName})
}

// A target is the server of one connection, and how to know it.
type target struct {
	url *url.URL
	tls *tls.Config // nil for ws://
}

// target is the server that the settings name, or else the configuration.
func (c *client) target(s settings) (target, error) {
	to, known := c.config.URL.URL, endpoint.Client{Pin: c.config.Pin, CA: c.config.CA, ServerName: c.config.ServerName}
	if s.URL.Scheme != "" {
		// What vouches for the configuration's server says nothing about this one.
		to, known = s.URL.URL, endpoint.Client{Pin: s.Pin, ServerName: s.ServerName}
	}
	if to.Scheme == "" {
		return target{}, &ptipc.ConfigError{Pointer: "/url", Problem: "is missing in the configuration and in the settings", Remedy: "write wss://HOST[:PORT]/PATH into one of them"}
	}
	host, port := to.Hostname(), to.Port()
	if host == "" || s.URL.Scheme == "" {
		if s.Host != "" {
			host = string(s.Host)
		}
		if s.Port != 0 {
			port = strconv.Itoa(int(s.Port))
		}
	}
	if host == "" {
		return target{}, &ptipc.ConfigError{Pointer: "/host", Problem: "is missing: the URL leaves it to the settings", Remedy: "give the name or address of the server"}
	}
	if port == "" {
		port = map[string]string{"ws": "80", "wss": "443"}[to.Scheme]
	}
	to.Host = net.JoinHostPort(host, port)
	t := target{url: &to}
	switch {
	case to.Scheme == "ws":
	case s.URL.Scheme == "":
		t.tls = c.tls
		if known.ServerName == "" && c.tls.ServerName != host {
			t.tls = c.tls.Clone()
			t.tls.ServerName = host
		}
	default:
		var err error
		if t.tls, err = known.TLS(host, alpn); err != nil {
			return target{}, err
		}
	}
	return t, nil
}

// Open is a [ptipc.TransportFactory]. The connection factory is "websocket", and
// bound.
func Open(_ context.Context, config ptipc.Opaque, env ptipc.Env) (*ptipc.Transport, error) {
	c := &client{config: clientConfig{Ping: defaultPing}, env: env}
	if err := config.Decode(&c.config); err != nil {
		return nil, err
	}
	var err error
	if c.tls, err = (endpoint.Client{Pin: c.config.Pin, CA: c.config.CA, ServerName: c.config.ServerName}).TLS(c.config.URL.Hostname(), alpn); err != nil {
		return nil, err
	}
	meter := new(relay.Meter)
	return meter.Transport(map[string]ptipc.ConnectionFactory{
		"websocket": meter.Factory(true, c.dial),
	}, func() error {
		c.group.close()
		return nil
	}), nil
}

// A client makes connections to one server, or to one for each connection.
type client struct {
	config clientConfig
	tls    *tls.Config // for the configuration's server
	env    ptipc.Env
	group  group
}

func (c *client) dial(ctx context.Context, opaque ptipc.Opaque, _ string) (net.Conn, error) {
	var s settings
	if err := opaque.Decode(&s); err != nil {
		return nil, err
	}
	to, err := c.target(s)
	if err != nil {
		return nil, err
	}
	raw, err := c.env.Dial(ctx, "tcp", to.url.Host) // a name stays a name (WS-2)
	if err != nil {
		return nil, err
	}
	w := c.group.add(raw, nil)
	conn, err := c.handshake(ctx, w, to)
	if err != nil {
		_ = w.Close() // the handshake's error says more
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		return nil, fmt.Errorf("websocket: cannot connect to %s: %w", to.url.Host, err)
	}
	return conn, nil
}

// handshake makes a connection of a wire.
func (c *client) handshake(ctx context.Context, w *wire, to target) (*conn, error) {
	ctx, cancel := context.WithTimeout(ctx, handshakeTime)
	defer cancel()
	stop := context.AfterFunc(ctx, func() { _ = w.Close() }) // ends what waits for the wire
	defer stop()

	var stream net.Conn = w // the TLS on it is WS-3's
	if to.tls != nil {
		secure := tls.Client(w, to.tls)
		if err := secure.HandshakeContext(ctx); err != nil {
			return nil, orTimeout(ctx, err)
		}
		stream = secure
	}
	opening := &opening{Conn: stream}
	dialer := websocket.Dialer{ // Proxy is nil: the environment has no say (WS-2)
		NetDialContext:    func(context.Context, string, string) (net.Conn, error) { return opening, nil },
		NetDialTLSContext: func(context.Context, string, string) (net.Conn, error) { return opening, nil },
		ReadBufferSize:    256,
		WriteBufferPool:   &unused,
	}
	_, response, err := dialer.DialContext(ctx, to.url.String(), nil)
	switch {
	case errors.Is(err, websocket.ErrBadHandshake):
		return nil, fmt.Errorf("the server answers %q instead of opening a WebSocket: is the path right?", response.Status)
	case err != nil:
		return nil, orTimeout(ctx, err)
	case len(response.Header["Sec-Websocket-Extensions"])+len(response.Header["Sec-Websocket-Protocol"]) > 0: // WS-1
		return nil, errors.New("the server chose an extension or a subprotocol that nobody asked for")
	case !stop():
		return nil, orTimeout(ctx, net.ErrClosed)
	}
	return newConn(stream, w, true, opening.buffered, w.RemoteAddr(), time.Duration(c.config.Ping)), nil
}

// unused is for gorilla's write buffers: it writes nothing after the handshake.
var unused sync.Pool

func orTimeout(ctx context.Context, err error) error {
	if errors.Is(context.Cause(ctx), context.DeadlineExceeded) {
		return ptipc.WithClass(ptipc.ErrTimedOut, fmt.Errorf("the handshake took longer than %v: %w", handshakeTime, err))
	}
	return err
}

// An opening gives gorilla the response a byte at a time, so that its buffer does
// not take frames that come right behind; and no more than a header's worth.
type opening struct {
	net.Conn
	buffered []byte
	given    int
}

var errLongHeader = fmt.Errorf("the header of the response is longer than %d bytes", maxHeaders)

func (o *opening) Read(p []byte) (int, error) {
	if o.given == maxHeaders {
		return 0, errLongHeader
	}
	if len(o.buffered) == 0 {
		buf := make([]byte, smallRead)
		n, err := o.Conn.Read(buf)
		if n == 0 {
			return 0, err
		}
		o.buffered = buf[:n] // an error comes again
	}
	if len(p) == 0 {
		return 0, nil
	}
	p[0] = o.buffered[0]
	o.buffered = o.buffered[1:]
	o.given++
	return 1, nil
}
