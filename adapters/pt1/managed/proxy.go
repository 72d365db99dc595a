package managed

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"time"

	"pthost/adapters/pt1/wire"
	"pthost/ptipc"
	"pthost/ptipc/child"
	"pthost/ptipc/front"
	"pthost/ptipc/localnet"
	"pthost/ptipc/stdio"
	"pthost/socks"
)

const (
	// drainTime is how long open connections may go on when tor wants the end (PT1-29).
	drainTime = 5 * time.Second
	// bringTime bounds the way of one connection to tor (PT1-28).
	bringTime = 10 * time.Second
)

// A Proxy is a managed proxy: what tor starts to have its connections carried by
// transports. It is tor's client proxy or its server proxy, as the environment says.
type Proxy struct {
	// Clients and Servers are the transports by the names that torrc has for them.
	Clients map[string]ptipc.TransportFactory
	Servers map[string]*ptipc.ServerFactory

	// Configurations are those of some transports by name. Without one the
	// configuration of a client is empty, and that of a server is made and kept (PT1-25).
	Configurations map[string]Configuration
}

// Run does what the environment asks for until the end of ctx, which stands for
// SIGTERM, or of stdin, if that is to end the proxy (PT1-29), and returns nil then.
// stdout gets control lines and nothing else. An error that was told to tor has an
// [ptipc.ExitCode]: 78 for the version, 64 for the environment, 69 for the upstream
// proxy and when no transport could be started. stdin is read until it ends, also
// after Run has returned.
func (p *Proxy) Run(ctx context.Context, lookup func(string) (string, bool), stdin io.Reader, stdout io.Writer) error {
	out := stdio.NewWriter(asciiWriter{stdout})
	environment, err := wire.ParseEnvironment(lookup)
	var refusal *wire.EnvironmentError
	if errors.As(err, &refusal) {
		return refuse(out, refusal)
	}
	if err != nil {
		return err
	}
	r := &running{proxy: p, environment: environment, out: out, log: slog.New(child.NewLogHandler(out))}
	if err := out.Send(stdio.Version{Version: wire.Version}); err != nil {
		return err
	}
	if r.dialOut, err = dialOut(environment); err != nil {
		return errors.Join(fmt.Errorf("%w: %w", err, ptipc.ExitUnavailable), out.Send(stdio.ProxyError{Text: stdio.OneLine(err.Error())}))
	}
	if environment.Proxy != "" {
		if err := out.Send(stdio.ProxyDone{}); err != nil { // PT1-24
			return err
		}
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	if environment.ExitOnStdinClose {
		go func() {
			_, _ = io.Copy(io.Discard, stdin)
			cancel()
		}()
	}
	defer r.close()
	if err := r.start(ctx); err != nil {
		return err
	}
	return r.serve(ctx)
}

// refuse tells tor that the environment cannot be used (PT1-1).
func refuse(out *stdio.Writer, refusal *wire.EnvironmentError) error {
	line := refusal.Line()
	code := ptipc.ExitUsage
	var first error
	switch line.(type) {
	case stdio.VersionError:
		code = ptipc.ExitConfig
	case stdio.ProxyError: // tor wants to hear of the version before
		code = ptipc.ExitUnavailable
		first = out.Send(stdio.Version{Version: wire.Version})
	}
	return errors.Join(fmt.Errorf("%w: %w", refusal, code), first, out.Send(line))
}

// An asciiWriter writes control lines of stdio so that every reader of PT 1.0 takes
// them (PT1-20). Each Write is one line.
type asciiWriter struct{ w io.Writer }

func (a asciiWriter) Write(line []byte) (int, error) {
	if !bytes.ContainsFunc(line, func(r rune) bool { return r > '~' }) {
		return a.w.Write(line)
	}
	quoted := bytes.HasPrefix(line, []byte("LOG ")) || bytes.HasPrefix(line, []byte("STATUS "))
	var b bytes.Buffer
	for _, c := range line {
		switch {
		case c <= '~':
			b.WriteByte(c)
		case quoted: // only a quoted string holds such bytes
			fmt.Fprintf(&b, `\%03o`, c)
		case c >= 0xc0 || c == 0x7f: // one for each character
			b.WriteByte('?')
		}
	}
	if _, err := a.w.Write(b.Bytes()); err != nil {
		return 0, err
	}
	return len(line), nil
}

// running is a Proxy that runs.
type running struct {
	proxy       *Proxy
	environment *wire.Environment
	out         *stdio.Writer
	log         *slog.Logger
	dialOut     func(ctx context.Context, network, addr string) (net.Conn, error)

	methods []*method
	serving sync.WaitGroup
}

// A method is a transport that was announced.
type method struct {
	name     string
	listener net.Listener // where tor connects, or the wire
	server   front.Server
	wait     func() error // it has ended by itself
	close    func() error
}

// start announces what tor has asked for (PT1-21).
func (r *running) start(ctx context.Context) error {
	if len(r.environment.Clients) > 0 {
		done := map[string]bool{}
		for _, name := range r.environment.Clients {
			if err := r.announce(name, "CMETHOD-ERROR", done, func() (stdio.Message, error) { return r.client(ctx, name) }); err != nil {
				return err
			}
		}
		return r.announced(stdio.CMethodsDone{})
	}
	done := map[string]bool{}
	for _, server := range r.environment.Servers {
		if err := r.announce(server.Name, "SMETHOD-ERROR", done, func() (stdio.Message, error) { return r.server(ctx, server) }); err != nil {
			return err
		}
	}
	return r.announced(stdio.SMethodsDone{})
}

// announce opens one transport and says so, or why not. The error is of the control channel.
func (r *running) announce(name, keyword string, done map[string]bool, open func() (stdio.Message, error)) error {
	if !wire.ValidName(name) {
		r.log.Warn("what tor asks for is not the name of a transport", "name", fmt.Sprintf("%.64s", name))
		return nil
	}
	if done[name] {
		return nil
	}
	done[name] = true
	line, err := open()
	if err != nil {
		// tor shows the text to people.
		return r.out.Send(stdio.Unknown{Keyword: keyword, Rest: name + " " + stdio.OneLine(err.Error())})
	}
	return r.out.Send(line)
}

func (r *running) announced(line stdio.Message) error {
	if err := r.out.Send(line); err != nil {
		return err
	}
	if len(r.methods) == 0 {
		return fmt.Errorf("no transport could be started: %w", ptipc.ExitUnavailable)
	}
	return nil
}

// add lets a method serve.
func (r *running) add(m *method) {
	r.methods = append(r.methods, m)
	r.serving.Go(func() {
		if err := m.server.Serve(m.listener); err != nil {
			r.log.Error("connections are not accepted any more", "transport", m.name, "err", err)
		}
	})
}

// serve waits for the end, and lets open connections finish.
func (r *running) serve(ctx context.Context) error {
	ended := make(chan *method, len(r.methods))
	for _, m := range r.methods {
		go func() {
			if err := m.wait(); err != nil && ctx.Err() == nil {
				r.log.Error("a transport has ended", "transport", m.name, "err", err)
			}
			ended <- m
		}()
	}
	for range r.methods {
		select {
		case <-ended:
		case <-ctx.Done():
			at, cancel := context.WithTimeout(context.WithoutCancel(ctx), drainTime)
			defer cancel()
			r.shutdown(at)
			return nil
		}
	}
	return fmt.Errorf("all transports have ended: %w", ptipc.ExitUnavailable)
}

// shutdown stops accepting, and cuts what has not ended when ctx does.
func (r *running) shutdown(ctx context.Context) {
	var shut sync.WaitGroup
	for _, m := range r.methods {
		shut.Go(func() {
			if err := m.server.Shutdown(ctx); err != nil {
				r.log.Info("connections were cut", "transport", m.name, "err", err)
			}
		})
	}
	shut.Wait()
}

func (r *running) close() {
	cut, cancel := context.WithCancel(context.Background())
	cancel()
	for _, m := range r.methods {
		_ = m.server.Shutdown(cut) // what is left is to be cut
	}
	for _, m := range r.methods {
		if err := m.close(); err != nil {
			r.log.Warn("a transport did not close", "transport", m.name, "err", err)
		}
	}
	r.serving.Wait()
}

// env is what a transport is given. Its directory belongs to it and its role alone:
// the client and the server proxy of one tor share the state location (PT1-30).
func (r *running) env(role, name string) (ptipc.Env, error) {
	dir := filepath.Join(r.environment.State, "ptipc-"+role+"-"+name)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return ptipc.Env{}, fmt.Errorf("the state location cannot be used: %w", err)
	}
	return ptipc.Env{
		Local:   dir,
		DialOut: r.dialOut,
		Log:     r.log.With("transport", name),
		Status: func(_ context.Context, attrs ...slog.Attr) {
			status := stdio.Status{Transport: name}
			for _, a := range attrs {
				if a.Key != "transport" {
					status.Attrs = append(status.Attrs, stdio.KV{Key: a.Key, Value: a.Value.Resolve().String()})
				}
			}
			if err := r.out.Send(status); err != nil {
				r.log.Warn("a status could not be told", "transport", name, "err", err)
			}
		},
	}, nil
}

// client opens the client of a transport, and a SOCKS5 server for tor before it (PT1-22).
func (r *running) client(ctx context.Context, name string) (stdio.Message, error) {
	open := r.proxy.Clients[name]
	if open == nil {
		return nil, unknown(name, maps.Keys(r.proxy.Clients))
	}
	env, err := r.env("client", name)
	if err != nil {
		return nil, err
	}
	transport, err := open(ctx, r.proxy.Configurations[name].Client, env)
	if err != nil {
		return nil, err
	}
	fail := func(err error) (stdio.Message, error) { return nil, errors.Join(err, transport.Close()) }
	factory, ok := transport.Connections[name]
	if names := slices.Sorted(maps.Keys(transport.Connections)); !ok && len(names) == 1 { // PT1-23
		factory = transport.Connections[names[0]]
	} else if !ok {
		return fail(fmt.Errorf("the transport has the connection factories %q: use the name of one of them in torrc", names))
	}
	listener, err := localnet.ListenTCP("127.0.0.1:0")
	if err != nil {
		return fail(err)
	}
	server := &socks.Server{
		Login: login,
		Dial: func(ctx context.Context, request *socks.Request) (net.Conn, error) {
			conn, err := dial(ctx, factory, request)
			if err != nil && ctx.Err() == nil {
				// tor shows its user the reply code alone.
				env.Log.Warn("a connection could not be made", "err", err)
			}
			return conn, err
		},
		Log: env.Log,
	}
	var guarded net.Listener = listener
	if runtime.GOOS == "linux" || localnet.Supported("tcp") {
		guarded = localnet.Guard(listener, env.Log) // SOCKS-17
	}
	r.add(&method{name: name, listener: guarded, server: server, wait: transport.Wait, close: transport.Close})
	return stdio.CMethod{Name: name, Protocol: stdio.ProtocolSOCKS5, Addr: listener.Addr().String()}, nil
}

// dial opens one connection for tor.
func dial(ctx context.Context, factory ptipc.ConnectionFactory, request *socks.Request) (net.Conn, error) {
	if !factory.Bound {
		return factory.Dial(ctx, request.Settings, request.Dest)
	}
	settings, err := withDestination(request.Settings, request.Dest)
	if err != nil {
		return nil, err
	}
	return factory.Dial(ctx, settings, "")
}

func unknown(name string, known func(yield func(string) bool)) error {
	return fmt.Errorf("there is no transport %s here; there are %s", name, strings.Join(slices.Sorted(known), ", "))
}

// server opens the server of a transport, and brings its connections to tor (PT1-28).
func (r *running) server(ctx context.Context, s wire.Server) (stdio.Message, error) {
	factory := r.proxy.Servers[s.Name]
	switch {
	case factory == nil:
		return nil, unknown(s.Name, maps.Keys(r.proxy.Servers))
	case factory.Listen == nil:
		return nil, errors.New("the server connects its clients itself, and has no connections for tor")
	}
	if r.environment.ExtendedPort != "" { // rather now than at each connection
		if _, err := wire.ReadCookie(r.environment.CookieFile); err != nil {
			return nil, err
		}
	}
	env, err := r.env("server", s.Name)
	if err != nil {
		return nil, err
	}
	configuration, err := r.configuration(ctx, s, factory, env)
	if err != nil {
		return nil, err
	}
	args, err := bridgeArgs(configuration.Client)
	if err != nil {
		return nil, err
	}
	listener, err := factory.Listen(ctx, configuration.Server, env)
	if err != nil {
		return nil, err
	}
	line := stdio.SMethod{Name: s.Name, Addr: announcedAddr(listener.Addr(), s.Bind), Args: args}
	if err := r.writeBridgeLine(line); err != nil {
		return nil, errors.Join(err, listener.Close())
	}
	r.add(&method{
		name: s.Name, listener: listener, wait: listener.Wait, close: listener.Close,
		server: front.Bring(func(ctx context.Context, client net.Conn) (net.Conn, error) {
			return bring(ctx, r.environment, wire.Client{Addr: userAddr(client.RemoteAddr()), Transport: s.Name})
		}, env.Log),
	})
	return line, nil
}

// announcedAddr is where the wire listens, in the words of tor: a socket for every
// address of IPv4 and IPv6 may call itself by another one.
func announcedAddr(addr net.Addr, bind netip.AddrPort) string {
	if tcp, ok := addr.(*net.TCPAddr); ok && bind.IsValid() && tcp.IP.IsUnspecified() {
		return netip.AddrPortFrom(bind.Addr(), uint16(tcp.Port)).String()
	}
	return addr.String()
}

// bring connects one client with tor. Nothing of its stream goes on before tor has
// agreed (PT1-28).
func bring(ctx context.Context, e *wire.Environment, client wire.Client) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, bringTime)
	defer cancel()
	addr := e.ExtendedPort
	if addr == "" {
		addr = e.Port
	}
	var d net.Dialer
	conn, err := d.DialContext(ctx, "tcp", addr)
	if err != nil || e.ExtendedPort == "" {
		return conn, err
	}
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	cookie, err := wire.ReadCookie(e.CookieFile)
	if err == nil {
		err = wire.ConnectExtended(conn, cookie, client)
	}
	if !stop() && err == nil {
		err = context.Cause(ctx)
	}
	if err != nil {
		return nil, errors.Join(err, conn.Close())
	}
	return conn, nil
}

// userAddr is the address of a client as tor takes it, "" when it is not known.
func userAddr(remote net.Addr) string {
	tcp, ok := remote.(*net.TCPAddr)
	if !ok {
		return ""
	}
	addr := tcp.AddrPort()
	if !addr.Addr().IsValid() {
		return ""
	}
	port := addr.Port()
	if port == 0 { // a proxy before the wire has said the address alone
		port = 1
	}
	return netip.AddrPortFrom(addr.Addr().Unmap().WithZone(""), port).String()
}
