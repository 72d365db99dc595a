package websocket

import (
	"bufio"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"pthost/ptipc"
)

func Example() {
	ctx := context.Background()
	clientConfig, serverConfig, err := Server.GenerateConfig(ctx, ptipc.Opaque(`{"listen":"127.0.0.1:0"}`), ptipc.Env{})
	if err != nil {
		fmt.Println(err)
		return
	}
	listener, err := Server.Listen(ctx, serverConfig, ptipc.Env{})
	if err != nil {
		fmt.Println(err)
		return
	}
	defer listener.Close()
	go func() {
		conn, err := listener.Accept()
		if err != nil {
			return
		}
		io.Copy(conn, conn) // an echo
		conn.Close()
	}()

	transport, err := Open(ctx, clientConfig, ptipc.Env{})
	if err != nil {
		fmt.Println(err)
		return
	}
	defer transport.Close()
	conn, err := transport.Connections["websocket"].Dial(ctx, nil, "")
	if err != nil {
		fmt.Println(err)
		return
	}
	defer conn.Close()
	fmt.Fprint(conn, "Hello")
	conn.CloseWrite()
	answer, err := io.ReadAll(conn)
	fmt.Printf("%s %v\n", answer, err)
	// Output: Hello <nil>
}

// fakeServer answers one connection.
func fakeServer(t *testing.T, answer func(c net.Conn, r *http.Request)) (address string) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		c, err := l.Accept()
		if err != nil {
			return
		}
		defer c.Close()
		r, err := http.ReadRequest(bufio.NewReader(c))
		if err != nil {
			return
		}
		answer(c, r)
	}()
	t.Cleanup(func() {
		l.Close()
		<-done
	})
	return l.Addr().String()
}

func openURL(t *testing.T, url string, env ptipc.Env) *pair {
	t.Helper()
	p := &pair{client: map[string]any{}}
	if url != "" {
		p.client["url"] = url
	}
	p.open(t, env)
	return p
}

func switching(r *http.Request, headers ...string) string {
	return "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n" +
		"Sec-WebSocket-Accept: " + acceptKey(r.Header.Get("Sec-WebSocket-Key")) + "\r\n" + strings.Join(append(headers, "", ""), "\r\n")
}

// What comes in one piece with the response is not lost.
func TestEarlyData(t *testing.T) {
	address := fakeServer(t, func(c net.Conn, r *http.Request) {
		if r.URL.Path != "/p" || r.Header.Get("Sec-WebSocket-Extensions")+r.Header.Get("Sec-WebSocket-Protocol") != "" { // WS-1
			t.Errorf("asked %s with %v", r.URL, r.Header)
		}
		early := strings.Repeat("early", 1000)
		io.WriteString(c, switching(r)+string(appendFrame(nil, opBinary, []byte(early), nil))+"\x82\x00\x88\x02\x03\xe8")
	})
	p := openURL(t, "ws://"+address+"/p", ptipc.Env{})
	c, err := p.dial(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if got, err := io.ReadAll(c); len(got) != 5000 || err != nil {
		t.Errorf("read %d bytes, %v", len(got), err)
	}
}

func TestServersThatAreNone(t *testing.T) {
	for _, test := range []struct {
		name   string
		answer func(c net.Conn, r *http.Request)
		want   string
	}{
		{"404", func(c net.Conn, _ *http.Request) {
			io.WriteString(c, "HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
		}, `"404 Not Found"`},
		{"an extension", func(c net.Conn, r *http.Request) { // WS-1
			io.WriteString(c, switching(r, "Sec-WebSocket-Extensions: permessage-deflate; server_no_context_takeover; client_no_context_takeover"))
		}, "nobody asked for"},
		{"a subprotocol", func(c net.Conn, r *http.Request) { io.WriteString(c, switching(r, "Sec-WebSocket-Protocol: chat")) }, "nobody asked for"},
		{"the wrong key", func(c net.Conn, r *http.Request) {
			r.Header.Set("Sec-WebSocket-Key", "another")
			io.WriteString(c, switching(r))
		}, "opening a WebSocket"},
		{"an endless header", func(c net.Conn, r *http.Request) { // WS-4
			_, err := io.WriteString(c, strings.TrimSuffix(switching(r), "\r\n"))
			for err == nil {
				_, err = io.WriteString(c, "X: "+strings.Repeat("x", 1000)+"\r\n")
			}
		}, "longer than 16384"},
		{"garbage", func(c net.Conn, _ *http.Request) { io.WriteString(c, "220 mail.example ESMTP\r\n") }, "malformed HTTP"},
		{"nothing", func(net.Conn, *http.Request) {}, "EOF"},
	} {
		t.Run(test.name, func(t *testing.T) {
			p := openURL(t, "ws://"+fakeServer(t, test.answer)+"/secret", ptipc.Env{})
			_, err := p.dial(t.Context())
			if err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("dials with %v, want %s", err, test.want)
			}
			if err != nil && strings.Contains(err.Error(), "secret") {
				t.Errorf("%v tells the path", err)
			}
			if s, _ := p.transport.Stats(t.Context()); s.Failed != 1 || s.Active != 0 {
				t.Errorf("Stats() = %+v, want one that failed", s)
			}
		})
	}
}

// A dial ends with its context, in the middle of a handshake as well.
func TestDialIsCancelled(t *testing.T) {
	for _, scheme := range schemes {
		t.Run(scheme, func(t *testing.T) {
			ctx, cancel := context.WithCancelCause(t.Context())
			why := errors.New("not wanted any more")
			l, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			gone := make(chan error, 1)
			go func() {
				c, err := l.Accept()
				if err != nil {
					gone <- err
					return
				}
				defer c.Close()
				_, err = c.Read(make([]byte, 1)) // the handshake has begun
				cancel(why)
				for err == nil {
					_, err = c.Read(make([]byte, 1<<10))
				}
				gone <- err
			}()
			p := openURL(t, scheme+"://"+l.Addr().String()+"/", ptipc.Env{})
			if _, err := p.dial(ctx); !errors.Is(err, why) {
				t.Errorf("dials with %v, want the cause", err)
			}
			<-gone // the connection is closed
		})
	}
}

// A handshake that goes nowhere is given up, and that is a timeout (WS-4).
func TestHandshakeTimesOut(t *testing.T) {
	for _, scheme := range schemes {
		t.Run(scheme, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
			defer cancel()
			near, far := net.Pipe()
			go io.Copy(io.Discard, far)
			p := openURL(t, scheme+"://192.0.2.1/", ptipc.Env{DialOut: func(context.Context, string, string) (net.Conn, error) { return near, nil }})
			if _, err := p.dial(ctx); !errors.Is(err, ptipc.ErrTimedOut) {
				t.Errorf("dials with %v, want class timed out", err)
			}
			far.Close()
		})
	}
}

// Names and ports reach the environment as they are, the settings' before the
// URL's, whatever the environment variables say (WS-2).
func TestWhereItDials(t *testing.T) {
	t.Setenv("HTTP_PROXY", "http://127.0.0.1:1")
	t.Setenv("HTTPS_PROXY", "http://127.0.0.1:1")
	for _, test := range []struct{ url, settings, want string }{
		{"wss://name.invalid/", "", "name.invalid:443"},
		{"ws://name.invalid", "", "name.invalid:80"},
		{"ws://[2001:db8::1]:8080/", "", "[2001:db8::1]:8080"},
		{"wss://name.invalid:8443/", `{"host":"other.invalid"}`, "other.invalid:8443"},
		{"wss://name.invalid/", `{"host":"2001:db8::2","port":1}`, "[2001:db8::2]:1"},
		{"wss:///p", `{"host":"name.invalid"}`, "name.invalid:443"},
		// WS-17: a URL in the settings says it all, but what it leaves out.
		{"", `{"url":"ws://name.invalid/","host":"192.0.2.1","port":9}`, "name.invalid:80"},
		{"wss://other.invalid:9/", `{"url":"wss:///","host":"192.0.2.1","port":1}`, "192.0.2.1:1"},
	} {
		var got string
		p := openURL(t, test.url, ptipc.Env{DialOut: func(_ context.Context, network, addr string) (net.Conn, error) {
			got = network + " " + addr
			return nil, fmt.Errorf("none: %w", ptipc.ErrHostUnreachable)
		}})
		_, err := p.transport.Connections["websocket"].Dial(t.Context(), ptipc.Opaque(test.settings), "")
		if got != "tcp "+test.want || !errors.Is(err, ptipc.ErrHostUnreachable) {
			t.Errorf("%s with %s: dials %s, %v; want %s", test.url, test.settings, got, err, test.want)
		}
	}
	p := openURL(t, "wss://name.invalid/", ptipc.Env{})
	_, err := p.transport.Connections["websocket"].Dial(t.Context(), ptipc.Opaque(`{"hots":"x"}`), "")
	if !errors.Is(err, ptipc.ErrSettingsRefused) {
		t.Errorf("settings that nobody knows: %v, want class settings refused", err)
	}
	for _, test := range []struct{ url, settings, pointer string }{ // WS-17
		{"", ``, "/url"},
		{"", `{"host":"h","port":1}`, "/url"},
		{"wss:///p", `{"port":1}`, "/host"},
		{"wss://h/p", `{"pin":"sha256:AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA"}`, "/pin"},
		{"wss://h/p", `{"url":"ws://h/p","server_name":"n"}`, "/server_name"},
		{"wss://h/p", `{"url":"wss://h/p","pin":"sha256:AA"}`, "/pin"},
		{"wss://h/p", `{"url":"wss://h/p","ca":"x"}`, "/ca"},
	} {
		p := openURL(t, test.url, ptipc.Env{DialOut: func(context.Context, string, string) (net.Conn, error) {
			t.Errorf("%q with %s is dialled", test.url, test.settings)
			return nil, ptipc.ErrGeneral
		}})
		_, err := p.transport.Connections["websocket"].Dial(t.Context(), ptipc.Opaque(test.settings), "")
		var config *ptipc.ConfigError
		if !errors.As(err, &config) || config.Pointer != test.pointer || !errors.Is(err, ptipc.ErrSettingsRefused) {
			t.Errorf("%q with %s: %v, want an error at %s", test.url, test.settings, err, test.pointer)
		}
	}
	if !p.transport.Connections["websocket"].Bound {
		t.Error("the connection factory is not bound")
	}
}

// signed makes an authority and a certificate for 127.0.0.1 from it.
func signed(t *testing.T, notAfter time.Time) (ca, certificate, key string) {
	t.Helper()
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), NotBefore: notAfter.AddDate(-1, 0, 0), NotAfter: time.Now().AddDate(1, 0, 0),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	caKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	ownKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	authority, err := x509.CreateCertificate(rand.Reader, template, template, caKey.Public(), caKey)
	if err != nil {
		t.Fatal(err)
	}
	own, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: big.NewInt(2), NotBefore: notAfter.AddDate(-1, 0, 0), NotAfter: notAfter,
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, DNSNames: []string{"name.invalid"},
	}, template, ownKey.Public(), caKey)
	if err != nil {
		t.Fatal(err)
	}
	private, err := x509.MarshalPKCS8PrivateKey(ownKey)
	if err != nil {
		t.Fatal(err)
	}
	text := func(kind string, b []byte) string {
		return string(pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: b}))
	}
	return text("CERTIFICATE", authority), text("CERTIFICATE", own), text("PRIVATE KEY", private)
}

// Who is the right server (WS-3).
func TestAuthentication(t *testing.T) {
	ca, certificate, key := signed(t, time.Now().AddDate(0, 1, 0))
	otherCA, expired, expiredKey := signed(t, time.Now().AddDate(0, 0, -1))
	file := filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(file, []byte(ca), 0o600); err != nil {
		t.Fatal(err)
	}
	good := map[string]any{"certificate": certificate, "key": key}
	old := map[string]any{"certificate": expired, "key": expiredKey}
	const otherPin = "sha256:AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="
	for _, test := range []struct {
		name   string
		server map[string]any // nil: the generated one
		client map[string]any
		want   string
	}{
		{"the pin", nil, nil, ""},
		{"another pin", nil, map[string]any{"pin": otherPin}, "not the pinned " + otherPin},
		{"the system's authorities", nil, map[string]any{"pin": ""}, "unknown authority"},
		{"the authority", good, map[string]any{"pin": "", "ca": ca}, ""},
		{"the authority in a file", good, map[string]any{"pin": "", "ca": file}, ""},
		{"another name", good, map[string]any{"pin": "", "ca": ca, "server_name": "name.invalid"}, ""},
		{"a wrong name", good, map[string]any{"pin": "", "ca": ca, "server_name": "wrong.invalid"}, "not wrong.invalid"},
		{"another authority", good, map[string]any{"pin": "", "ca": otherCA}, "unknown authority"},
		{"expired", old, map[string]any{"pin": "", "ca": otherCA}, "expired"},
	} {
		t.Run(test.name, func(t *testing.T) {
			p := generated(t, "wss")
			for k, v := range test.server {
				p.server[k] = v
			}
			for k, v := range test.client {
				if p.client[k] = v; v == "" {
					delete(p.client, k)
				}
			}
			p.listen(t)
			p.open(t, ptipc.Env{})
			if test.want == "" {
				a, b := p.connect(t)
				a.Close()
				b.Close()
				return
			}
			if _, err := p.dial(t.Context()); err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("dials with %v, want %s", err, test.want)
			}
		})
	}
}

func TestConfigs(t *testing.T) {
	ca, certificate, key := signed(t, time.Now().AddDate(0, 1, 0))
	_, _, otherKey := signed(t, time.Now().AddDate(0, 1, 0))
	quote := func(s string) string {
		b, err := json.Marshal(s)
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	client := func(o ptipc.Opaque) error { _, err := Open(t.Context(), o, ptipc.Env{}); return err }
	server := func(o ptipc.Opaque) error {
		l, err := Server.Listen(t.Context(), o, ptipc.Env{})
		if err == nil {
			l.Close()
		}
		return err
	}
	generate := func(o ptipc.Opaque) error {
		_, _, err := Server.GenerateConfig(t.Context(), o, ptipc.Env{})
		return err
	}
	const listen = `"listen":"127.0.0.1:0","path":"/p"`
	for _, test := range []struct {
		use     func(ptipc.Opaque) error
		config  string
		pointer string // "-": there is no error
	}{
		{client, `{"url":"wss://h/p","ping":"1m"}`, "-"},
		{client, `{"url":"ws://h"}`, "-"},
		{client, `{"url":"wss://h/p","ca":` + quote(ca) + `}`, "-"},
		{client, `{}`, "-"},
		{client, `{"url":""}`, "/url"},
		{client, `{"pin":"sha256:AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA"}`, "/pin"},
		{client, `{"url":"https://h/"}`, "/url"},
		{client, `{"url":"wss:///p"}`, "-"},
		{client, `{"url":"wss://:1/p"}`, "/url"},
		{client, `{"url":"wss:p"}`, "/url"},
		{client, `{"url":"wss://]/p"}`, "/url"},
		{client, `{"url":"wss://u:p@h/p"}`, "/url"},
		{client, `{"url":"wss://h:0/p"}`, "/url"},
		{client, `{"url":"wss://h:65536/p"}`, "/url"},
		{client, `{"url":"wss://h/p","pin":"sha256:AA"}`, "/pin"},
		{client, `{"url":"wss://h/p","pin":"AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="}`, "/pin"},
		{client, `{"url":"ws://h/p","pin":"sha256:AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="}`, "/pin"},
		{client, `{"url":"ws://h/p","server_name":"n"}`, "/server_name"},
		{client, `{"url":"wss://h/p","ca":"-----BEGIN NOTHING-----"}`, "/ca"},
		{client, `{"url":"wss://h/p","ca":"/nonexistent"}`, "/ca"},
		{client, `{"url":"wss://h/p","ca":` + quote(ca) + `,"pin":"sha256:AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="}`, "/ca"},
		{client, `{"url":"wss://h/p","ping":"10ms"}`, "/ping"},
		{client, `{"url":"wss://h/p","ping":30}`, "/ping"},
		{client, `{"url":"wss://h/p","Ping":"30s"}`, "/Ping"},

		{server, `{` + listen + `}`, "-"},
		{server, `{` + listen + `,"certificate":` + quote(certificate) + `,"key":` + quote(key) + `,"ping":"off"}`, "-"},
		{server, `{"path":"/p"}`, "/listen"},
		{server, `{"listen":"127.0.0.1:0"}`, "/path"},
		{server, `{"listen":"localhost:0","path":"/p"}`, "/listen"},
		{server, `{"listen":"127.0.0.1","path":"/p"}`, "/listen"},
		{server, `{"listen":"127.0.0.1:65536","path":"/p"}`, "/listen"},
		{server, `{"listen":"127.0.0.1:0","path":"p"}`, "/path"},
		{server, `{"listen":"127.0.0.1:0","path":"/p?q"}`, "/path"},
		{server, `{` + listen + `,"certificate":` + quote(certificate) + `}`, "/key"},
		{server, `{` + listen + `,"key":` + quote(key) + `}`, "/certificate"},
		{server, `{` + listen + `,"certificate":` + quote(certificate) + `,"key":` + quote(otherKey) + `}`, "/certificate"},
		{server, `{` + listen + `,"certificate":` + quote(certificate) + `,"key":"/nonexistent"}`, "/key"},
		{server, `{` + listen + `,"certificate":"/nonexistent","key":` + quote(key) + `}`, "/certificate"},
		{server, `{` + listen + `,"backend":"https://h"}`, "/backend"},
		{server, `{` + listen + `,"backend":"127.0.0.1:80"}`, "/backend"},
		{server, `{` + listen + `,"more":1}`, "/more"},

		{generate, `{"host":"h"}`, "-"},
		{generate, `{"listen":"127.0.0.1:0"}`, "-"},
		{generate, `{}`, "/host"},
		{generate, `{"listen":"[::]:0"}`, "/host"},
		{generate, `{"host":"h:1"}`, "/host"},
		{generate, `{"listen":"x"}`, "/listen"},
		{generate, `{"host":"h","backend":"x"}`, "/backend"},
	} {
		err := test.use(ptipc.Opaque(test.config))
		var config *ptipc.ConfigError
		switch {
		case test.pointer == "-":
			if err != nil {
				t.Errorf("%.100s: %v", test.config, err)
			}
		case !errors.As(err, &config) || config.Pointer != test.pointer:
			t.Errorf("%.100s: %v, want an error at %s", test.config, err, test.pointer)
		case strings.Contains(err.Error(), "PRIVATE") || strings.Contains(err.Error(), key[40:60]):
			t.Errorf("%v tells the key", err)
		}
	}
}

// Settings can name the server of one connection, and nothing that vouches for the
// configuration's server vouches for it (WS-17).
func TestServerOfOneConnection(t *testing.T) {
	own, other := newPair(t, "wss"), newPair(t, "wss")
	for _, test := range []struct {
		name     string
		settings map[string]any
		want     string
	}{
		{"with its pin", other.client, ""},
		{"with its pin, padded", map[string]any{"url": other.client["url"], "pin": other.client["pin"].(string) + "="}, ""},
		{"with an address that means nothing", map[string]any{"url": other.client["url"], "pin": other.client["pin"], "host": "192.0.2.1", "port": 1}, ""},
		{"with the pin of the configuration's server", map[string]any{"url": other.client["url"], "pin": own.client["pin"]}, "not the pinned"},
		{"without a pin", map[string]any{"url": other.client["url"]}, "unknown authority"},
	} {
		t.Run(test.name, func(t *testing.T) {
			c, err := own.transport.Connections["websocket"].Dial(t.Context(), opaque(t, test.settings), "")
			if err == nil {
				defer c.Close()
				defer other.accept(t).Close()
			}
			if test.want == "" && err != nil || test.want != "" && (err == nil || !strings.Contains(err.Error(), test.want)) {
				t.Errorf("dials with %v, want %q", err, test.want)
			}
		})
	}
}

// A generated configuration can leave the server's place to the settings (WS-17).
func TestGenerateWithoutHost(t *testing.T) {
	client, server, err := Server.GenerateConfig(t.Context(), ptipc.Opaque(`{"listen":"127.0.0.1:0","host":""}`), ptipc.Env{})
	if err != nil {
		t.Fatal(err)
	}
	p := &pair{client: object(t, client), server: object(t, server)}
	if u := p.client["url"].(string); u != "wss://"+p.server["path"].(string) {
		t.Errorf("the client's URL is %s", u)
	}
	p.listen(t)
	p.open(t, ptipc.Env{})
	port := p.listener.Addr().(*net.TCPAddr).Port
	c, err := p.transport.Connections["websocket"].Dial(t.Context(), opaque(t, map[string]any{"host": "127.0.0.1", "port": port}), "")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	p.accept(t).Close()
}

func TestGenerate(t *testing.T) {
	seen := map[string]bool{}
	for range 3 {
		client, server, err := Server.GenerateConfig(t.Context(), ptipc.Opaque(`{"listen":"0.0.0.0:0","host":"2001:db8::1","backend":"http://127.0.0.1:80"}`), ptipc.Env{})
		if err != nil {
			t.Fatal(err)
		}
		var c clientConfig
		var s serverConfig
		if err := errors.Join(client.Decode(&c), server.Decode(&s)); err != nil {
			t.Fatal(err)
		}
		if s.Listen.Port() == 0 || c.URL.Host != fmt.Sprintf("[2001:db8::1]:%d", s.Listen.Port()) || c.URL.Path != string(s.Path) {
			t.Errorf("%s does not lead to %s with %s", &c.URL.URL, s.Listen, s.Path)
		}
		if len(s.Path) < 20 || seen[string(s.Path)] || seen[c.Pin] || s.Backend.url.String() != "http://127.0.0.1:80" {
			t.Errorf("the server gets %+v", s)
		}
		seen[string(s.Path)], seen[c.Pin] = true, true
		if strings.Contains(string(client), "PRIVATE") {
			t.Error("the client gets the key")
		}
		pair, err := tls.X509KeyPair([]byte(s.Certificate), []byte(s.Key))
		if err != nil {
			t.Fatal(err)
		}
		if left := time.Until(pair.Leaf.NotAfter); left < 10*365*24*time.Hour {
			t.Errorf("the certificate is good until %v", pair.Leaf.NotAfter)
		}
		if err := pair.Leaf.VerifyHostname("2001:db8::1"); err != nil {
			t.Error(err)
		}
	}
}

func FuzzClientConfig(f *testing.F) {
	f.Add([]byte(`{"url":"wss://192.0.2.1:443/path","pin":"sha256:AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=","ping":"30s"}`))
	f.Add([]byte(`{"url":"ws://[::1]:80","server_name":"x"}`))
	f.Add([]byte(`{"url":"wss://h:99999/%zz","ca":"-----BEGIN CERTIFICATE-----"}`))
	f.Fuzz(func(t *testing.T, config []byte) {
		var c clientConfig
		if ptipc.Opaque(config).Decode(&c) != nil {
			return
		}
		to, err := (&client{config: c, tls: new(tls.Config)}).target(settings{Host: "fallback"})
		if c.URL.Scheme == "" && err != nil {
			return // the settings have to say it
		}
		if err != nil || c.URL.Scheme != "ws" && c.URL.Scheme != "wss" {
			t.Fatalf("%q was taken, and leads to %v", config, err)
		}
		if host, port, err := net.SplitHostPort(to.url.Host); err != nil || host == "" || port == "" || port == "0" {
			t.Errorf("%q would dial %s", config, to.url.Host)
		}
	})
}

func FuzzServerConfig(f *testing.F) {
	f.Add([]byte(`{"listen":"0.0.0.0:443","path":"/p","certificate":"c","key":"k","backend":"http://127.0.0.1:8080","trust_forwarded":true,"ping":"off"}`))
	f.Add([]byte(`{"listen":":443","path":"/"}`))
	f.Add([]byte(`{"listen":"[fe80::1%eth0]:443","path":"//"}`))
	f.Fuzz(func(t *testing.T, config []byte) {
		var c serverConfig
		if ptipc.Opaque(config).Decode(&c) != nil {
			return
		}
		if !strings.HasPrefix(string(c.Path), "/") || (c.Certificate == "") != (c.Key == "") {
			t.Errorf("%q was taken", config)
		}
		if _, _, err := net.SplitHostPort(string(c.Listen)); err != nil {
			t.Errorf("%q would listen on %s", config, c.Listen)
		}
	})
}
