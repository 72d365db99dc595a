package managed

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"maps"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"pthost/adapters/pt1/wire"
	"pthost/ptipc"
	"pthost/ptipc/relay"
	"pthost/socks"
	"pthost/transports/websocket"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// patience bounds what ends by an event: a test that runs into it has failed.
const patience = time.Minute

// A fakeTor has started a proxy.
type fakeTor struct {
	t     *testing.T
	stdin io.Closer
	stop  context.CancelFunc // SIGTERM
	lines []string           // until DONE, or the end
	ended chan error
}

// environ adds to what tor always says. A value "-" takes a variable away.
func environ(t *testing.T, more ...string) map[string]string {
	t.Helper()
	e := map[string]string{"MANAGED_TRANSPORT_VER": "1", "STATE_LOCATION": filepath.Join(t.TempDir(), "pt_state"), "EXIT_ON_STDIN_CLOSE": "1"}
	for _, v := range more {
		key, value, _ := strings.Cut(v, "=")
		if e[key] = value; value == "-" {
			delete(e, key)
		}
	}
	return e
}

// start runs a proxy until it has announced everything.
func start(t *testing.T, p *Proxy, environ map[string]string) *fakeTor {
	t.Helper()
	in, stdin := io.Pipe()
	out, stdout := io.Pipe()
	ctx, stop := context.WithCancel(context.Background())
	f := &fakeTor{t: t, stdin: stdin, stop: stop, ended: make(chan error, 1)}
	go func() {
		f.ended <- p.Run(ctx, func(name string) (string, bool) {
			value, ok := environ[strings.TrimPrefix(name, wire.Prefix)]
			return value, ok
		}, in, stdout)
		_ = stdout.Close()
	}()
	announced := make(chan struct{})
	read := make(chan struct{})
	go func() {
		defer close(read)
		first := true
		for lines := bufio.NewScanner(out); lines.Scan(); {
			if !first {
				continue // nobody waits for it
			}
			f.lines = append(f.lines, lines.Text())
			if lines.Text() == "CMETHODS DONE" || lines.Text() == "SMETHODS DONE" {
				first = false
				close(announced)
			}
		}
		if first {
			close(announced)
		}
	}()
	t.Cleanup(func() {
		stop()
		_ = stdin.Close()
		<-read
	})
	select {
	case <-announced:
	case <-time.After(patience):
		t.Fatal("the proxy announces nothing")
	}
	return f
}

// end waits for the end of the proxy.
func (f *fakeTor) end() error {
	f.t.Helper()
	select {
	case err := <-f.ended:
		return err
	case <-time.After(patience):
		f.t.Fatal("the proxy does not end")
		return nil
	}
}

// addr is where a transport was announced.
func (f *fakeTor) addr(name string) string {
	f.t.Helper()
	want := regexp.MustCompile(`^(?:CMETHOD ` + name + ` socks5|SMETHOD ` + name + `) (\S+)`)
	for _, line := range f.lines {
		if found := want.FindStringSubmatch(line); found != nil {
			return found[1]
		}
	}
	f.t.Fatalf("%s was not announced: %q", name, f.lines)
	return ""
}

// dialled is what a transport was asked for.
type dialled struct {
	settings, dest string
	far            net.Conn // the other end of its wire
}

// asked is a transport that tells what it is asked for. With a destination
// "refused:1" its dial fails.
func asked(bound bool, name string, dials chan dialled) ptipc.TransportFactory {
	return func(_ context.Context, config ptipc.Opaque, _ ptipc.Env) (*ptipc.Transport, error) {
		if !config.Empty() {
			return nil, &ptipc.ConfigError{Pointer: "/x", Problem: "is not\nwanted…"}
		}
		meter := new(relay.Meter)
		return meter.Transport(map[string]ptipc.ConnectionFactory{
			name: meter.Factory(bound, func(_ context.Context, settings ptipc.Opaque, dest string) (net.Conn, error) {
				if strings.Contains(dest+string(settings), "refused") {
					return nil, ptipc.ErrRefused
				}
				near, far := net.Pipe()
				dials <- dialled{string(settings), dest, far}
				return near, nil
			}),
		}, nil), nil
	}
}

// connect logs in as tor does, with arguments or without.
func connect(t *testing.T, addr, args, dest string) (net.Conn, error) {
	t.Helper()
	conn, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	var user *url.Userinfo
	if args != "" {
		username, password, err := wire.Credentials(args)
		if err != nil {
			t.Fatal(err)
		}
		user = url.UserPassword(username, password)
	}
	return conn, socks.ConnectUpstream(t.Context(), conn, user, dest)
}

// An environment that cannot be used is refused in the words of PT 1.0, with an exit
// code (PT1-1, PT1-20, PT1-24).
func TestEnvironment(t *testing.T) {
	server := []string{"SERVER_TRANSPORTS=x", "ORPORT=127.0.0.1:1"}
	client := []string{"CLIENT_TRANSPORTS=x"}
	for _, test := range []struct {
		name    string
		environ []string
		code    ptipc.ExitCode
		lines   []string // prefixes
	}{
		{"no version", append(client, "MANAGED_TRANSPORT_VER=-"), ptipc.ExitConfig, []string{"VERSION-ERROR no-version"}},
		{"other versions", append(client, "MANAGED_TRANSPORT_VER=2,3"), ptipc.ExitConfig, []string{"VERSION-ERROR no-version"}},
		{"no state", append(client, "STATE_LOCATION=-"), ptipc.ExitUsage, []string{"ENV-ERROR TOR_PT_STATE_LOCATION"}},
		{"no side", nil, ptipc.ExitUsage, []string{"ENV-ERROR TOR_PT_CLIENT_TRANSPORTS"}},
		{"both sides", append(client, server...), ptipc.ExitUsage, []string{"ENV-ERROR TOR_PT_SERVER_TRANSPORTS"}},
		{"no ORPort", append(server, "ORPORT=-"), ptipc.ExitUsage, []string{"ENV-ERROR TOR_PT_ORPORT"}},
		{"a bad ORPort", append(server, "ORPORT=localhost:1"), ptipc.ExitUsage, []string{"ENV-ERROR TOR_PT_ORPORT"}},
		{"no cookie", append(server, "EXTENDED_SERVER_PORT=127.0.0.1:1"), ptipc.ExitUsage, []string{"ENV-ERROR TOR_PT_AUTH_COOKIE_FILE"}},
		{"a bad address", append(server, "SERVER_BINDADDR=x-localhost"), ptipc.ExitUsage, []string{"ENV-ERROR TOR_PT_SERVER_BINDADDR"}},
		{"bad options", append(server, "SERVER_TRANSPORT_OPTIONS=a=b"), ptipc.ExitUsage, []string{"ENV-ERROR TOR_PT_SERVER_TRANSPORT_OPTIONS"}},
		{"a proxy that is none", append(client, "PROXY=hunter2"), ptipc.ExitUnavailable, []string{"VERSION 1", "PROXY-ERROR TOR_PT_PROXY"}},
		{"a proxy of another kind", append(client, "PROXY=ftp://u:hunter2@127.0.0.1:1"), ptipc.ExitUnavailable, []string{"VERSION 1", "PROXY-ERROR "}},
		{"a proxy without a port", append(client, "PROXY=socks5://u:hunter2@127.0.0.1"), ptipc.ExitUnavailable, []string{"VERSION 1", "PROXY-ERROR "}},
		{"several versions", append(client, "MANAGED_TRANSPORT_VER=3,1"), ptipc.ExitUnavailable, []string{"VERSION 1", "CMETHOD-ERROR x there is no transport x here", "CMETHODS DONE"}},
		{"no such server", server, ptipc.ExitUnavailable, []string{"VERSION 1", "SMETHOD-ERROR x there is no transport x here", "SMETHODS DONE"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			f := start(t, &Proxy{}, environ(t, test.environ...))
			err := f.end()
			if code := ptipc.ExitCodeOf(err); err == nil || code != test.code {
				t.Errorf("ends with %v, want exit code %d", err, test.code)
			}
			if len(f.lines) != len(test.lines) {
				t.Fatalf("the lines are %q", f.lines)
			}
			for i, want := range test.lines {
				if !strings.HasPrefix(f.lines[i], want) {
					t.Errorf("line %d is %q, want %q", i, f.lines[i], want)
				}
			}
			if strings.Contains(fmt.Sprint(f.lines, err), "hunter2") {
				t.Errorf("the proxy's URL is repeated: %q, %v", f.lines, err)
			}
		})
	}
}

// Each transport is answered, in one line, and none hinders another (PT1-20, PT1-21).
func TestAnnouncements(t *testing.T) {
	several := func(context.Context, ptipc.Opaque, ptipc.Env) (*ptipc.Transport, error) {
		meter := new(relay.Meter)
		return meter.Transport(map[string]ptipc.ConnectionFactory{"a": {}, "b": {}}, nil), nil
	}
	p := &Proxy{
		Clients: map[string]ptipc.TransportFactory{
			"good": asked(true, "good", nil), "single": asked(true, "other", nil), "bad": asked(true, "bad", nil), "several": several, "a": several,
		},
		Configurations: map[string]Configuration{"bad": {Client: ptipc.Opaque(`{"x":1}`)}},
	}
	f := start(t, p, environ(t, "CLIENT_TRANSPORTS=bad,good,unknown,single,good,no-name,several,a,"))
	port := regexp.MustCompile(`127\.0\.0\.1:[0-9]+$`)
	for i, line := range f.lines {
		f.lines[i] = port.ReplaceAllString(line, "ADDR")
	}
	want := []string{
		"VERSION 1",
		"CMETHOD-ERROR bad /x: is not wanted?", // one for each character
		"CMETHOD good socks5 ADDR",
		"CMETHOD-ERROR unknown there is no transport unknown here; there are a, bad, good, several, single",
		"CMETHOD single socks5 ADDR",
		`LOG SEVERITY=warning MESSAGE="what tor asks for is not the name of a transport name=no-name"`,
		`CMETHOD-ERROR several the transport has the connection factories ["a" "b"]: use the name of one of them in torrc`,
		"CMETHOD a socks5 ADDR",
		`LOG SEVERITY=warning MESSAGE="what tor asks for is not the name of a transport name=\"\""`,
		"CMETHODS DONE",
	}
	if !slices.Equal(f.lines, want) {
		t.Errorf("the lines are\n%s\nwant\n%s", strings.Join(f.lines, "\n"), strings.Join(want, "\n"))
	}
	_ = f.stdin.Close()
	if err := f.end(); err != nil { // PT1-29
		t.Errorf("ends with %v", err)
	}
}

// What tor says of a connection reaches the transport, and its bytes do (PT1-22, PT1-23).
func TestConnections(t *testing.T) {
	dials := make(chan dialled, 1)
	f := start(t, &Proxy{Clients: map[string]ptipc.TransportFactory{
		"bound": asked(true, "bound", dials), "free": asked(false, "free", dials),
	}}, environ(t, "CLIENT_TRANSPORTS=bound,free"))
	for _, test := range []struct{ transport, args, dest, settings, dialled string }{
		{"bound", "a=b", "192.0.2.1:443", `{"a":"b","host":"192.0.2.1","port":443}`, ""},
		{"bound", "", "[2001:db8::1]:443", `{"host":"2001:db8::1","port":443}`, ""},
		{"bound", "host=h;port=1;l=" + strings.Repeat("x", 300), "192.0.2.1:443", `{"host":"h","l":"` + strings.Repeat("x", 300) + `","port":1}`, ""},
		{"free", "a=b", "192.0.2.1:443", `{"a":"b"}`, "192.0.2.1:443"},
		{"free", "", "name.invalid:443", "", "name.invalid:443"},
	} {
		conn, err := connect(t, f.addr(test.transport), test.args, test.dest)
		if err != nil {
			t.Errorf("%+v: %v", test, err)
			continue
		}
		d := <-dials
		if d.settings != test.settings || d.dest != test.dialled {
			t.Errorf("%+v: the transport was asked for %+v", test, d)
		}
		go fmt.Fprint(conn, "there")
		buf := make([]byte, 5)
		if _, err := io.ReadFull(d.far, buf); err != nil || string(buf) != "there" {
			t.Errorf("the wire got %q, %v", buf, err)
		}
		go fmt.Fprint(d.far, "back!")
		if _, err := io.ReadFull(conn, buf); err != nil || string(buf) != "back!" {
			t.Errorf("tor got %q, %v", buf, err)
		}
		conn.Close()
		d.far.Close()
	}
	for _, test := range []struct {
		args, dest string
		want       error
	}{
		{"noequals", "192.0.2.1:443", ptipc.ErrNotAllowed},
		{"port=x", "192.0.2.1:443", ptipc.ErrNotAllowed},
		{"a=b", "refused.invalid:1", ptipc.ErrRefused},
	} {
		if _, err := connect(t, f.addr("bound"), test.args, test.dest); !errors.Is(err, test.want) {
			t.Errorf("%+v: %v, want %v", test, err, test.want)
		}
	}
}

// What is not SOCKS5 ends, and hinders nobody.
func TestGarbage(t *testing.T) {
	dials := make(chan dialled, 1)
	f := start(t, &Proxy{Clients: map[string]ptipc.TransportFactory{"x": asked(true, "x", dials)}}, environ(t, "CLIENT_TRANSPORTS=x"))
	for _, garbage := range []string{
		"\x04\x01\x01\xbb\xc0\x00\x02\x01\x00", "GET / HTTP/1.0\r\n\r\n", "\x05\x01\x80{}", "\x05\x01\x02\x05\x01\x00", "\x05\x01\x00\x05\x02\x00\x01\x7f\x00\x00\x01\x00\x01",
		"\x05\x01\x02\x01\x01;\x01\x00", "\x05\x01\x00\x05\x01\x00\x03\x00\x00\x50",
	} {
		conn, err := net.Dial("tcp", f.addr("x"))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(conn, garbage); err != nil {
			t.Fatal(err)
		}
		if answer, err := io.ReadAll(conn); err != nil && !errors.Is(err, syscall.ECONNRESET) || len(dials) > 0 {
			t.Errorf("% x is answered % x, %v, with %d dials", garbage, answer, err, len(dials))
		}
		conn.Close()
	}
	conn, err := connect(t, f.addr("x"), "", "192.0.2.1:443")
	if err != nil {
		t.Fatal(err)
	}
	conn.Close()
	(<-dials).far.Close()
}

// dialling is a free transport that goes where it is told, by the way that it has.
func dialling(_ context.Context, _ ptipc.Opaque, env ptipc.Env) (*ptipc.Transport, error) {
	meter := new(relay.Meter)
	return meter.Transport(map[string]ptipc.ConnectionFactory{
		"x": meter.Factory(false, func(ctx context.Context, _ ptipc.Opaque, dest string) (net.Conn, error) {
			return env.Dial(ctx, "tcp", dest)
		}),
	}, nil), nil
}

// listenTCP accepts connections and tells where they come from.
func listenTCP(t *testing.T, addr string) (net.Listener, chan string) {
	t.Helper()
	l, err := net.Listen("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	from := make(chan string, 8)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			host, _, _ := net.SplitHostPort(conn.RemoteAddr().String())
			from <- host
			conn.Close()
		}
	}()
	t.Cleanup(func() {
		l.Close()
		<-done
	})
	return l, from
}

// The wire goes through tor's upstream proxy, and from the address that tor wants,
// and in no other way (PT1-24).
func TestWayOut(t *testing.T) {
	far, from := listenTCP(t, "127.0.0.1:0")
	for _, test := range []struct {
		name, from string
		proxied    bool
		environ    []string
	}{
		{"plain", "127.0.0.1", false, nil},
		{"an address", "127.0.0.77", false, []string{"OUTBOUND_BIND_ADDRESS_V4=127.0.0.77"}},
		{"an address of the other family", "127.0.0.1", false, []string{"OUTBOUND_BIND_ADDRESS_V6=[::1]"}},
		{"a proxy", "127.0.0.1", true, []string{"PROXY=socks5://user:hunter2@PROXY"}},
		{"a proxy from an address", "127.0.0.77", true, []string{"PROXY=socks5://PROXY", "OUTBOUND_BIND_ADDRESS_V4=127.0.0.77"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			var mu sync.Mutex
			var through []string // the proxy's clients
			upstream := &socks.Server{
				Login: func(username, password string) (ptipc.Opaque, error) {
					if username != "user" || password != "hunter2" {
						return nil, errors.New("a stranger")
					}
					return nil, nil
				},
				Dial: func(ctx context.Context, r *socks.Request) (net.Conn, error) {
					mu.Lock()
					defer mu.Unlock()
					host, _, _ := net.SplitHostPort(r.Client.RemoteAddr().String())
					through = append(through, host+" "+r.Dest)
					var d net.Dialer
					return d.DialContext(ctx, "tcp", r.Dest)
				},
			}
			l, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			served := make(chan error, 1)
			go func() { served <- upstream.Serve(l) }()
			defer func() {
				cut, cancel := context.WithCancel(context.Background())
				cancel()
				_ = upstream.Shutdown(cut)
				<-served
			}()
			variables := environ(t, append(test.environ, "CLIENT_TRANSPORTS=x")...)
			if test.proxied {
				variables["PROXY"] = strings.Replace(variables["PROXY"], "PROXY", l.Addr().String(), 1)
			}
			f := start(t, &Proxy{Clients: map[string]ptipc.TransportFactory{"x": dialling}}, variables)
			if done := slices.Index(f.lines, "PROXY DONE"); (done == 1) != test.proxied {
				t.Errorf("the lines are %q", f.lines)
			}
			conn, err := connect(t, f.addr("x"), "", far.Addr().String())
			if err != nil {
				t.Fatal(err)
			}
			conn.Close()
			seen := <-from
			want := []string{test.from + " " + far.Addr().String()}
			if !test.proxied {
				if seen != test.from {
					t.Errorf("the wire came from %s, want %s", seen, test.from)
				}
				want = nil
			}
			mu.Lock()
			defer mu.Unlock()
			if !slices.Equal(through, want) {
				t.Errorf("through the proxy went %q, want %q", through, want)
			}
		})
	}
	// The other kinds of proxy that tor can have, each played by hand: the destination
	// and the password arrive, and what comes right behind the answer is the stream's.
	for _, test := range []struct{ name, url, request, answer, want string }{
		{"socks4a", "socks4a://me@", "\x04\x01\x00\x50\x00\x00\x00\x01me\x00name.invalid\x00", "\x00\x5a\x00\x00\x00\x00\x00\x00", ""},
		{"socks4a refuses", "socks4a://", "\x04\x01\x00\x50\x00\x00\x00\x01\x00name.invalid\x00", "\x00\x5b\x00\x00\x00\x00\x00\x00", "general"},
		{"http", "http://me:hunter2@", "CONNECT name.invalid:80 HTTP/1.1\r\nHost: name.invalid:80\r\nProxy-Authorization: Basic bWU6aHVudGVyMg==\r\n\r\n", "HTTP/1.0 200 Connection established\r\nX: y\r\n\r\n", ""},
		{"http refuses", "http://", "CONNECT name.invalid:80 HTTP/1.1\r\nHost: name.invalid:80\r\n\r\n", "HTTP/1.1 403 Forbidden\r\nContent-Length: 5\r\n\r\n", "general"},
		{"http, endless", "http://", "CONNECT name.invalid:80 HTTP/1.1\r\nHost: name.invalid:80\r\n\r\n", "HTTP/1.1 200 OK\r\nX: " + strings.Repeat("x", maxAnswer) + "\r\n\r\n", "general"},
		{"not http", "http://", "CONNECT name.invalid:80 HTTP/1.1\r\nHost: name.invalid:80\r\n\r\n", "220 mail.example ESMTP\r\n", "general"},
	} {
		t.Run(test.name, func(t *testing.T) {
			l, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			asked := make(chan string, 1)
			go func() {
				conn, err := l.Accept()
				if err != nil {
					asked <- err.Error()
					return
				}
				defer conn.Close()
				request := make([]byte, len(test.request))
				n, _ := io.ReadFull(conn, request)
				asked <- string(request[:n])
				_, _ = io.WriteString(conn, test.answer+"early")
			}()
			f := start(t, &Proxy{Clients: map[string]ptipc.TransportFactory{"x": dialling}}, environ(t, "CLIENT_TRANSPORTS=x", "PROXY="+test.url+l.Addr().String()))
			if !slices.Contains(f.lines, "PROXY DONE") {
				t.Errorf("the lines are %q", f.lines)
			}
			conn, err := connect(t, f.addr("x"), "", "name.invalid:80")
			if got := <-asked; got != test.request {
				t.Errorf("the proxy was asked %q, want %q", got, test.request)
			}
			if test.want != "" {
				if !errors.Is(err, ptipc.ErrGeneral) {
					t.Errorf("connected: %v", err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if got, err := io.ReadAll(conn); err != nil || string(got) != "early" {
				t.Errorf("the stream is %q, %v", got, err)
			}
		})
	}
	t.Run("a proxy that is gone", func(t *testing.T) {
		gone, _ := listenTCP(t, "127.0.0.1:0")
		gone.Close()
		f := start(t, &Proxy{Clients: map[string]ptipc.TransportFactory{"x": dialling}}, environ(t, "CLIENT_TRANSPORTS=x", "PROXY=socks5://"+gone.Addr().String()))
		if _, err := connect(t, f.addr("x"), "", far.Addr().String()); err == nil || len(from) > 0 {
			t.Errorf("the wire went around the proxy: %v", err)
		}
	})
}

// A destination cannot say more to an HTTP proxy than where to go: arguments of bridge
// lines have it from strangers.
func TestHTTPProxyIsAskedForNothingElse(t *testing.T) {
	for _, dest := range []string{"a.invalid\r\nX-More: b:80", "a.invalid:80 HTTP/1.1\r\n\r\nGET http://b.invalid/:80", "a b:80", "a\x7f:80", "a\x00:80"} {
		near, far := net.Pipe()
		asked := make(chan string, 1)
		go func() {
			b, _ := io.ReadAll(far)
			asked <- string(b)
		}()
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		err := connectHTTP(ctx, near, nil, dest)
		cancel()
		near.Close()
		if got := <-asked; got != "" || !errors.Is(err, ptipc.ErrNotAllowed) {
			t.Errorf("%q: the proxy was asked %q, %v", dest, got, err)
		}
	}
}

// An orPort is tor's end of a bridge's connections.
type orPort struct {
	net.Listener
	cookie wire.Cookie
	file   string
}

func listenOR(t *testing.T) *orPort {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	o := &orPort{Listener: l, file: filepath.Join(t.TempDir(), "cookie")}
	if o.cookie, err = wire.WriteCookie(o.file, -1, -1); err != nil {
		t.Fatal(err)
	}
	return o
}

func (o *orPort) environ() []string {
	return []string{"EXTENDED_SERVER_PORT=" + o.Addr().String(), "AUTH_COOKIE_FILE=" + o.file}
}

// plain is a server whose wire is TCP as it is. It makes configurations with what
// it was asked for.
func plain(t *testing.T, asked *[]string, take func(options map[string]any) error) *ptipc.ServerFactory {
	t.Helper()
	return &ptipc.ServerFactory{
		GenerateConfig: func(_ context.Context, options ptipc.Opaque, env ptipc.Env) (client, server ptipc.Opaque, err error) {
			if asked != nil {
				*asked = append(*asked, string(options))
			}
			var o map[string]any
			if err := options.Decode(&o); err != nil {
				return nil, nil, err
			}
			if take != nil {
				if err := take(o); err != nil {
					return nil, nil, err
				}
			}
			if info, err := os.Stat(env.Local); err != nil || info.Mode().Perm() != 0o700 {
				t.Errorf("the state directory is %v, %v", info, err)
			}
			return ptipc.Opaque(`{"secret":"s3","host":"192.0.2.1"}`), ptipc.Opaque(`{"listen":"127.0.0.1:0","secret":"s3"}`), nil
		},
		Listen: func(ctx context.Context, config ptipc.Opaque, _ ptipc.Env) (ptipc.Listener, error) {
			var c struct {
				Listen string `json:"listen"`
				Secret string `json:"secret"`
			}
			if err := config.Decode(&c); err != nil {
				return nil, err
			}
			var lc net.ListenConfig
			l, err := lc.Listen(ctx, "tcp", c.Listen)
			if err != nil {
				return nil, err
			}
			return new(relay.Meter).Listener(l), nil
		},
	}
}

func servers(f *ptipc.ServerFactory) *Proxy {
	return &Proxy{Servers: map[string]*ptipc.ServerFactory{"x": f}}
}

// The Extended ORPort is told who the client is, and nothing of the stream goes on
// before it has agreed (PT1-28).
func TestExtendedORPort(t *testing.T) {
	or := listenOR(t)
	f := start(t, servers(plain(t, nil, nil)), environ(t, append(or.environ(), "SERVER_TRANSPORTS=x", "ORPORT=127.0.0.1:1", "SERVER_BINDADDR=x-127.0.0.1:0")...))
	for _, test := range []struct {
		name    string
		refusal error
	}{{"okay", nil}, {"deny", errors.New("not wanted")}} {
		t.Run(test.name, func(t *testing.T) {
			client, err := net.Dial("tcp", f.addr("x"))
			if err != nil {
				t.Fatal(err)
			}
			defer client.Close()
			if _, err := io.WriteString(client, "there"); err != nil {
				t.Fatal(err)
			}
			conn, err := or.Accept()
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			said, err := wire.AcceptExtended(conn, or.cookie, func(wire.Client) error { return test.refusal })
			if want := (wire.Client{Addr: client.LocalAddr().String(), Transport: "x"}); said != want || !errors.Is(err, test.refusal) {
				t.Errorf("tor was told of %+v, %v; want %+v", said, err, want)
			}
			if test.refusal != nil {
				if got, err := io.ReadAll(client); len(got) > 0 || !errors.Is(err, syscall.ECONNRESET) {
					t.Errorf("the client got %q, %v: that looks clean", got, err)
				}
				if got, _ := io.ReadAll(conn); len(got) > 0 {
					t.Errorf("tor got %q of a client that it has refused", got)
				}
				return
			}
			buf := make([]byte, 5)
			if _, err := io.ReadFull(conn, buf); err != nil || string(buf) != "there" {
				t.Errorf("tor got %q, %v", buf, err)
			}
			if _, err := io.WriteString(conn, "back"); err != nil {
				t.Fatal(err)
			}
			conn.Close()
			if got, err := io.ReadAll(client); err != nil || string(got) != "back" {
				t.Errorf("the client got %q, %v", got, err)
			}
		})
	}
}

// A tor that does not have the cookie gets no connection (PT1-10).
func TestForgedORPort(t *testing.T) {
	or := listenOR(t)
	f := start(t, servers(plain(t, nil, nil)), environ(t, append(or.environ(), "SERVER_TRANSPORTS=x", "SERVER_BINDADDR=x-127.0.0.1:0")...))
	client, err := net.Dial("tcp", f.addr("x"))
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	conn, err := or.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if _, err := wire.AcceptExtended(conn, wire.Cookie{}, func(wire.Client) error { return nil }); err == nil {
		t.Error("a wrong cookie was taken")
	}
	if _, err := io.ReadAll(client); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("the client's connection ended with %v", err)
	}
}

// Without an Extended ORPort connections go to the ORPort as they are (PT1-28).
func TestORPort(t *testing.T) {
	or := listenOR(t)
	f := start(t, servers(plain(t, nil, nil)), environ(t, "EXTENDED_SERVER_PORT=", "ORPORT="+or.Addr().String(), "SERVER_TRANSPORTS=x", "SERVER_BINDADDR=x-127.0.0.1:0"))
	client, err := net.Dial("tcp", f.addr("x"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(client, "there"); err != nil {
		t.Fatal(err)
	}
	client.Close()
	conn, err := or.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if got, err := io.ReadAll(conn); err != nil || string(got) != "there" {
		t.Errorf("tor got %q, %v", got, err)
	}
}

// A configuration is made once and kept for its owner (PT1-25, PT1-26, PT1-27).
func TestConfigurationIsKept(t *testing.T) {
	var asked []string
	p := servers(plain(t, &asked, nil))
	variables := environ(t, "SERVER_TRANSPORTS=x", "ORPORT=127.0.0.1:1", "SERVER_BINDADDR=x-127.0.0.1:0", `SERVER_TRANSPORT_OPTIONS=x:a=b\;c;y:d=e`)
	kept := filepath.Join(variables["STATE_LOCATION"], "ptipc-x.json")
	var content []byte
	for range 2 {
		f := start(t, p, variables)
		line := f.lines[len(f.lines)-2]
		if !strings.HasSuffix(line, " ARGS:secret=s3") {
			t.Errorf("the server is announced as %q", line)
		}
		_ = f.stdin.Close()
		if err := f.end(); err != nil {
			t.Fatal(err)
		}
		text, err := os.ReadFile(kept)
		if err != nil || content != nil && string(text) != string(content) {
			t.Errorf("%v, or the file has changed:\n%s\n%s", err, content, text)
		}
		content = text
		bridge, err := os.ReadFile(filepath.Join(variables["STATE_LOCATION"], "ptipc-x-bridgeline.txt"))
		if err != nil || !strings.Contains(string(bridge), "\nBridge x <IP ADDRESS>:"+f.addr("x")[len("127.0.0.1:"):]+" <FINGERPRINT> secret=s3\n") {
			t.Errorf("the bridge line is %q, %v", bridge, err)
		}
		for _, name := range []string{"ptipc-x.json", "ptipc-x-bridgeline.txt"} {
			if info, err := os.Stat(filepath.Join(variables["STATE_LOCATION"], name)); err != nil || info.Mode().Perm() != 0o600 {
				t.Errorf("%s is %v, %v", name, info, err)
			}
		}
	}
	if want := []string{`{"a":"b;c","host":"","listen":"127.0.0.1:0"}`}; !slices.Equal(asked, want) {
		t.Errorf("the transport was asked with %q, want %q", asked, want)
	}

	// What cannot be used is not replaced.
	for _, test := range []struct {
		name, options, content, want string
	}{
		{"other options", "x:a=c", string(content), "other ServerTransportOptions"},
		{"no options any more", "", string(content), "other ServerTransportOptions"},
		{"garbage", `x:a=b\;c`, "{", "is not JSON"},
		{"no server", "", `{"client":{}}`, "no configuration for the server"},
		{"an unknown key", `x:a=b\;c`, `{"server":{},"hots":1}`, "/hots"},
	} {
		t.Run(test.name, func(t *testing.T) {
			variables := maps.Clone(variables)
			variables["SERVER_TRANSPORT_OPTIONS"] = test.options
			if err := os.WriteFile(kept, []byte(test.content), 0o600); err != nil {
				t.Fatal(err)
			}
			f := start(t, p, variables)
			if err := f.end(); ptipc.ExitCodeOf(err) != ptipc.ExitUnavailable {
				t.Errorf("ends with %v", err)
			}
			line := f.lines[1]
			if !strings.HasPrefix(line, "SMETHOD-ERROR x ") || !strings.Contains(line, test.want) || !strings.Contains(line, kept) || !strings.Contains(line, "remove the file") {
				t.Errorf("the answer is %q", line)
			}
			if text, err := os.ReadFile(kept); err != nil || string(text) != test.content {
				t.Errorf("the file has changed: %s, %v", text, err)
			}
		})
	}
	if len(asked) != 1 {
		t.Errorf("a configuration was made again: %q", asked)
	}
}

// A transport is asked for what it knows (PT1-26).
func TestGenerate(t *testing.T) {
	refusing := func(keys ...string) func(map[string]any) error {
		return func(options map[string]any) error {
			for _, key := range keys {
				if _, ok := options[key]; ok {
					return &ptipc.ConfigError{Pointer: "/" + key, Problem: "is not a key here"}
				}
			}
			return nil
		}
	}
	for _, test := range []struct {
		name  string
		bind  string
		take  func(map[string]any) error
		asked []string
		want  string // in the answer
	}{
		{"host is not known", "192.0.2.1:443", refusing("host"), []string{`{"host":"","listen":"192.0.2.1:443"}`, `{"listen":"192.0.2.1:443"}`}, "cannot assign"},
		{"nor is listen, and tor has no wish", "0.0.0.0:0", refusing("host", "listen"), []string{`{"host":"","listen":"0.0.0.0:0"}`, `{"listen":"0.0.0.0:0"}`, `{}`}, "SMETHOD x 0.0.0.0:"},
		{"nor is listen, and tor has one", "127.0.0.1:0", refusing("host", "listen"), []string{`{"host":"","listen":"127.0.0.1:0"}`, `{"listen":"127.0.0.1:0"}`}, "/host: is not a key here"},
		{"another fault", "0.0.0.0:0", func(map[string]any) error { return fs.ErrPermission }, []string{`{"host":"","listen":"0.0.0.0:0"}`}, "permission denied"},
	} {
		t.Run(test.name, func(t *testing.T) {
			var asked []string
			f := start(t, servers(plain(t, &asked, test.take)), environ(t, "SERVER_TRANSPORTS=x", "ORPORT=127.0.0.1:1", "SERVER_BINDADDR=x-"+test.bind))
			if !slices.Equal(asked, test.asked) {
				t.Errorf("the transport was asked with %q, want %q", asked, test.asked)
			}
			if line := f.lines[len(f.lines)-2]; !strings.Contains(line, test.want) {
				t.Errorf("the answer is %q, want %q", line, test.want)
			}
		})
	}
}

// Servers that cannot be had say why, and leave nothing behind (PT1-21).
func TestServerErrors(t *testing.T) {
	good := func() *ptipc.ServerFactory { return plain(t, nil, nil) }
	proxying := &ptipc.ServerFactory{Proxy: func(context.Context, ptipc.Opaque, ptipc.Env) (ptipc.ServerManager, error) { return nil, nil }}
	silent := good()
	silent.GenerateConfig = nil
	odd := good()
	odd.GenerateConfig = func(context.Context, ptipc.Opaque, ptipc.Env) (client, server ptipc.Opaque, err error) {
		return ptipc.Opaque(`{"pin":"a=b"}`), ptipc.Opaque(`{}`), nil
	}
	given := map[string]Configuration{"x": {Server: ptipc.Opaque(`{"listen":"127.0.0.1:1","secret":"s"}`)}}
	for _, test := range []struct {
		name    string
		factory *ptipc.ServerFactory
		given   map[string]Configuration
		environ []string
		want    string
	}{
		{"it connects its clients itself", proxying, nil, nil, "connects its clients itself"},
		{"it makes no configurations", silent, nil, nil, "makes no configurations"},
		{"what clients need fits on no line", odd, nil, nil, "bridge line cannot carry"}, // PT1-27
		{"two addresses", good(), nil, []string{"SERVER_TRANSPORT_OPTIONS=x:listen=:1"}, "ServerTransportListenAddr"},
		{"an option twice", good(), nil, []string{"SERVER_TRANSPORT_OPTIONS=x:a=1;x:a=2"}, "stands twice"},
		{"options beside a configuration", good(), given, []string{"SERVER_TRANSPORT_OPTIONS=x:a=1"}, "do nothing"},
		{"a configuration for the client alone", good(), map[string]Configuration{"x": {Client: ptipc.Opaque(`{}`)}}, nil, "none for the server"},
		{"a configuration with a fault", good(), map[string]Configuration{"x": {Server: ptipc.Opaque(`{"key":1}`)}}, nil, "/key"},
		{"no cookie there", good(), nil, []string{"EXTENDED_SERVER_PORT=127.0.0.1:1", "AUTH_COOKIE_FILE=/nonexistent/cookie"}, "/nonexistent/cookie"},
	} {
		t.Run(test.name, func(t *testing.T) {
			p := servers(test.factory)
			p.Configurations = test.given
			variables := environ(t, append(test.environ, "SERVER_TRANSPORTS=x", "ORPORT=127.0.0.1:1")...)
			f := start(t, p, variables)
			if err := f.end(); ptipc.ExitCodeOf(err) != ptipc.ExitUnavailable {
				t.Errorf("ends with %v", err)
			}
			if line := f.lines[1]; !strings.HasPrefix(line, "SMETHOD-ERROR x ") || !strings.Contains(line, test.want) {
				t.Errorf("the answer is %q, want %q", line, test.want)
			}
			if _, err := os.Stat(filepath.Join(variables["STATE_LOCATION"], "ptipc-x.json")); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("a configuration is kept: %v", err)
			}
		})
	}
	t.Run("a state location that is a file", func(t *testing.T) {
		file := filepath.Join(t.TempDir(), "file")
		if err := os.WriteFile(file, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		f := start(t, servers(good()), environ(t, "SERVER_TRANSPORTS=x", "ORPORT=127.0.0.1:1", "STATE_LOCATION="+file))
		if line := f.lines[1]; !strings.Contains(line, "the state location cannot be used") {
			t.Errorf("the answer is %q", line)
		}
	})
}

// When tor wants the end, nobody new is let in, and what is open may finish (PT1-29).
func TestEnd(t *testing.T) {
	for _, test := range []struct {
		name string
		exit string
		end  func(f *fakeTor)
	}{
		{"standard input ends", "1", func(f *fakeTor) { _ = f.stdin.Close() }},
		{"SIGTERM", "", func(f *fakeTor) { _ = f.stdin.Close(); f.stop() }},
	} {
		t.Run(test.name, func(t *testing.T) {
			dials := make(chan dialled, 1)
			f := start(t, &Proxy{Clients: map[string]ptipc.TransportFactory{"x": asked(true, "x", dials)}}, environ(t, "CLIENT_TRANSPORTS=x", "EXIT_ON_STDIN_CLOSE="+test.exit))
			conn, err := connect(t, f.addr("x"), "", "192.0.2.1:443")
			if err != nil {
				t.Fatal(err)
			}
			d := <-dials
			test.end(f)
			for { // it stops accepting soon
				late, err := net.Dial("tcp", f.addr("x"))
				if err != nil {
					break
				}
				late.Close()
			}
			go fmt.Fprint(d.far, "last words")
			buf := make([]byte, 10)
			if _, err := io.ReadFull(conn, buf); err != nil || string(buf) != "last words" {
				t.Errorf("tor got %q, %v", buf, err)
			}
			conn.Close()
			d.far.Close()
			if err := f.end(); err != nil {
				t.Errorf("ends with %v", err)
			}
		})
	}
}

// What does not end by itself is cut, and does not look complete (PT1-29).
func TestCut(t *testing.T) {
	t.Parallel() // it waits for the proxy's patience
	dials := make(chan dialled, 1)
	f := start(t, &Proxy{Clients: map[string]ptipc.TransportFactory{"x": asked(true, "x", dials)}}, environ(t, "CLIENT_TRANSPORTS=x"))
	conn, err := connect(t, f.addr("x"), "", "192.0.2.1:443")
	if err != nil {
		t.Fatal(err)
	}
	d := <-dials
	_ = f.stdin.Close()
	if got, err := io.ReadAll(conn); len(got) > 0 || !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("tor got %q, %v", got, err)
	}
	if _, err := d.far.Read(make([]byte, 1)); err == nil {
		t.Error("the wire is still open")
	}
	if err := f.end(); err != nil {
		t.Errorf("ends with %v", err)
	}
}

// Nothing is held for connections that have ended, well or badly.
func TestDescriptors(t *testing.T) {
	descriptors := func() int {
		entries, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Skip("this system does not list descriptors")
		}
		return len(entries)
	}
	before := descriptors()
	or := listenOR(t)
	f := start(t, servers(plain(t, nil, nil)), environ(t, append(or.environ(), "SERVER_TRANSPORTS=x", "SERVER_BINDADDR=x-127.0.0.1:0")...))
	for i := range 20 {
		client, err := net.Dial("tcp", f.addr("x"))
		if err != nil {
			t.Fatal(err)
		}
		conn, err := or.Accept()
		if err != nil {
			t.Fatal(err)
		}
		if i%4 > 0 { // otherwise tor hangs up at once
			_, _ = wire.AcceptExtended(conn, or.cookie, func(wire.Client) error { return []error{nil, ptipc.ErrRefused, nil, nil}[i%4] })
		}
		conn.Close()
		_, _ = io.ReadAll(client)
		client.Close()
	}
	_ = f.stdin.Close()
	if err := f.end(); err != nil {
		t.Error(err)
	}
	or.Close()
	if after := descriptors(); after > before {
		t.Errorf("%d descriptors are open, %d were before", after, before)
	}
}

// The end of standard input means nothing to a proxy that was not told so (PT1-29).
func TestStandardInputIsClosed(t *testing.T) {
	dials := make(chan dialled, 1)
	f := start(t, &Proxy{Clients: map[string]ptipc.TransportFactory{"x": asked(true, "x", dials)}}, environ(t, "CLIENT_TRANSPORTS=x", "EXIT_ON_STDIN_CLOSE=-"))
	_ = f.stdin.Close()
	conn, err := connect(t, f.addr("x"), "", "192.0.2.1:443")
	if err != nil {
		t.Fatal(err)
	}
	conn.Close()
	(<-dials).far.Close()
	f.stop()
	if err := f.end(); err != nil {
		t.Errorf("ends with %v", err)
	}
}

// A proxy whose transports have all ended ends too, and tor starts another.
func TestTransportsEnd(t *testing.T) {
	ends := make(chan struct{})
	open := func(context.Context, ptipc.Opaque, ptipc.Env) (*ptipc.Transport, error) {
		meter := new(relay.Meter)
		transport := meter.Transport(map[string]ptipc.ConnectionFactory{"x": {}}, nil)
		transport.Wait = func() error { <-ends; return errors.New("it broke") }
		return transport, nil
	}
	f := start(t, &Proxy{Clients: map[string]ptipc.TransportFactory{"a": open, "b": open}}, environ(t, "CLIENT_TRANSPORTS=a,b"))
	close(ends)
	if err := f.end(); ptipc.ExitCodeOf(err) != ptipc.ExitUnavailable {
		t.Errorf("ends with %v", err)
	}
}

// What a transport has to tell goes to tor, each in its line (PT1-20).
func TestLogAndStatus(t *testing.T) {
	open := func(ctx context.Context, config ptipc.Opaque, env ptipc.Env) (*ptipc.Transport, error) {
		env.Log.Warn("slow…", "n", 1)
		env.Log.Debug("nobody's business")
		env.Report(ctx, slog.String("transport", "other"), slog.Int("PROGRESS", 50))
		return asked(true, "x", nil)(ctx, config, env)
	}
	f := start(t, &Proxy{Clients: map[string]ptipc.TransportFactory{"x": open}}, environ(t, "CLIENT_TRANSPORTS=x"))
	if want := []string{`LOG SEVERITY=warning MESSAGE="slow\342\200\246 transport=x n=1"`, "STATUS TRANSPORT=x PROGRESS=50"}; !slices.Equal(f.lines[1:3], want) {
		t.Errorf("the lines are %q, want %q", f.lines, want)
	}
}

// Both ends of the WebSocket transport, without tor: what the server announces is
// what the client needs (PT1-23, PT1-27).
func TestWebSocket(t *testing.T) {
	or := listenOR(t)
	bridge := start(t, &Proxy{Servers: map[string]*ptipc.ServerFactory{"websocket": websocket.Server}},
		environ(t, append(or.environ(), "SERVER_TRANSPORTS=websocket", "SERVER_BINDADDR=websocket-127.0.0.1:0")...))
	var args wire.Args
	_, announced, _ := strings.Cut(bridge.lines[len(bridge.lines)-2], " ARGS:")
	for item := range strings.SplitSeq(announced, ",") {
		key, value, _ := strings.Cut(item, "=")
		args = append(args, wire.Arg{Key: key, Value: value})
	}
	encoded, err := args.Encode()
	if err != nil {
		t.Fatal(err)
	}
	f := start(t, &Proxy{Clients: map[string]ptipc.TransportFactory{"websocket": websocket.Open}}, environ(t, "CLIENT_TRANSPORTS=websocket"))
	conn, err := connect(t, f.addr("websocket"), encoded, bridge.addr("websocket"))
	if err != nil {
		t.Fatal(err)
	}
	far, err := or.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer far.Close()
	if _, err := wire.AcceptExtended(far, or.cookie, func(wire.Client) error { return nil }); err != nil {
		t.Fatal(err)
	}
	go func() {
		_, _ = io.WriteString(conn, "there")
		_ = conn.(*net.TCPConn).CloseWrite()
	}()
	if got, err := io.ReadAll(far); err != nil || string(got) != "there" {
		t.Errorf("tor got %q, %v", got, err)
	}
	wrong, err := args[:1].Encode() // a pin without its URL
	if err != nil {
		t.Fatal(err)
	}
	if _, err := connect(t, f.addr("websocket"), wrong, bridge.addr("websocket")); !errors.Is(err, ptipc.ErrGeneral) {
		t.Errorf("settings that are refused: %v", err)
	}
}

// A configuration that was given is the one that is used.
func TestGivenConfiguration(t *testing.T) {
	client, server, err := websocket.Server.GenerateConfig(t.Context(), ptipc.Opaque(`{"listen":"127.0.0.1:0","host":"name.invalid"}`), ptipc.Env{})
	if err != nil {
		t.Fatal(err)
	}
	text, err := json.Marshal(Configuration{Client: client, Server: server})
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "pair.json")
	if err := os.WriteFile(file, text, 0o600); err != nil {
		t.Fatal(err)
	}
	given, err := ReadConfiguration(file)
	if err != nil {
		t.Fatal(err)
	}
	variables := environ(t, "SERVER_TRANSPORTS=websocket", "ORPORT=127.0.0.1:1")
	f := start(t, &Proxy{Servers: map[string]*ptipc.ServerFactory{"websocket": websocket.Server}, Configurations: map[string]Configuration{"websocket": given}}, variables)
	if line := f.lines[len(f.lines)-2]; !strings.Contains(line, "url=wss://name.invalid:") {
		t.Errorf("the server is announced as %q", line)
	}
	if _, err := os.Stat(filepath.Join(variables["STATE_LOCATION"], "ptipc-websocket.json")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("it is kept: %v", err)
	}
}
