package websocket

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/gorilla/websocket"

	"pthost/ptipc"
	"pthost/ptipc/testpeer"
)

// request is an opening handshake as a browser sends it.
func request(path string, headers ...string) string {
	return "GET " + path + " HTTP/1.1\r\nHost: example.com\r\nConnection: keep-alive, Upgrade\r\nUpgrade: websocket\r\n" +
		"Origin: https://elsewhere.example\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n" +
		"Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits\r\nSec-WebSocket-Protocol: chat\r\n" +
		strings.Join(append(headers, "", ""), "\r\n")
}

// A page in a browser: it knows nothing of the end of a stream, sends an Origin,
// offers extensions and subprotocols, and closes without a code.
func TestBrowser(t *testing.T) {
	p := newPair(t, "ws")
	c := p.dialRaw(t)
	mustWrite(t, c, request(p.server["path"].(string)))
	r := bufio.NewReader(c)
	response, err := http.ReadResponse(r, nil)
	if err != nil {
		t.Fatal(err)
	}
	if response.StatusCode != http.StatusSwitchingProtocols || response.Header.Get("Sec-WebSocket-Accept") != "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=" {
		t.Errorf("answered %s, %v", response.Status, response.Header)
	}
	for _, name := range []string{"Sec-WebSocket-Extensions", "Sec-WebSocket-Protocol"} { // WS-1
		if got := response.Header.Get(name); got != "" {
			t.Errorf("%s is %q", name, got)
		}
	}
	server := p.accept(t)
	mustWrite(t, c, frame(finBit|opText, "hello")+frame(finBit|opBinary, " there"))
	buf := make([]byte, len("hello there"))
	if _, err := io.ReadFull(server, buf); err != nil || string(buf) != "hello there" {
		t.Errorf("read %q, %v", buf, err)
	}
	mustWrite(t, server, "hi")
	mustWrite(t, c, frame(finBit|opClose, ""))
	if n, err := server.Read(buf); n != 0 || !errors.Is(err, io.EOF) {
		t.Errorf("after the close frame: %d, %v", n, err)
	}
	if _, err := server.Write(buf); err == nil || errors.Is(err, net.ErrClosed) {
		t.Errorf("a Write after the close frame has the error %v", err) // WS-9
	}
	got, err := io.ReadAll(r)
	if want := "\x82\x02hi\x88\x00"; string(got) != want || err != nil {
		t.Errorf("the browser got %q, %v; want %q", got, err, want)
	}
	server.Close()
}

// All that is not an opening with the right path goes to the backend, or is
// answered 404 (WS-15).
func TestSharedPort(t *testing.T) {
	site := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		fmt.Fprintf(w, "site: %s %s%s %s %q", r.Method, r.Host, r.URL, r.Header.Get("X-Forwarded-For"), body)
	}))
	defer site.Close()
	for _, backend := range []string{"", site.URL} {
		t.Run("backend "+strings.TrimPrefix(backend, "http://"), func(t *testing.T) {
			p := generated(t, "ws")
			if backend != "" {
				p.server["backend"] = backend
			}
			t.Setenv("HTTP_PROXY", "http://127.0.0.1:1") // WS-2
			p.listen(t)
			p.open(t, ptipc.Env{})
			path := p.server["path"].(string)
			for _, test := range []struct{ name, request, want string }{
				{"a page", "GET /index.html?q HTTP/1.1\r\nHost: example.com\r\n\r\n", `site: GET example.com/index.html?q 127.0.0.1 ""`},
				{"a form", "POST / HTTP/1.1\r\nHost: example.com\r\nX-Forwarded-For: 192.0.2.7\r\nContent-Length: 5\r\n\r\nwords", `site: POST example.com/ 127.0.0.1 "words"`},
				{"another path", request("/other"), `site: GET example.com/other 127.0.0.1 ""`},
				{"no opening", "GET " + path + " HTTP/1.1\r\nHost: example.com\r\n\r\n", `site: GET example.com` + path + ` 127.0.0.1 ""`},
				{"no key", strings.Replace(request(path), "Sec-WebSocket-Key", "X-Key", 1), `site: GET example.com` + path + ` 127.0.0.1 ""`},
				{"another version", strings.Replace(request(path), "Version: 13", "Version: 8", 1), `site: GET example.com` + path + ` 127.0.0.1 ""`},
				{"another method", strings.Replace(request(path), "GET", "PUT", 1), `site: PUT example.com` + path + ` 127.0.0.1 ""`},
			} {
				t.Run(test.name, func(t *testing.T) {
					c := p.dialRaw(t)
					mustWrite(t, c, test.request)
					response, err := http.ReadResponse(bufio.NewReader(c), nil)
					if err != nil {
						t.Fatal(err)
					}
					defer response.Body.Close()
					body, err := io.ReadAll(response.Body)
					if err != nil {
						t.Fatal(err)
					}
					if backend == "" {
						if response.StatusCode != http.StatusNotFound {
							t.Errorf("answered %s", response.Status)
						}
					} else if string(body) != test.want {
						t.Errorf("answered %s %q, want %q", response.Status, body, test.want)
					}
				})
			}
			a, b := p.connect(t)
			mustWrite(t, a, "and a connection")
			a.Close()
			if got, err := io.ReadAll(b); string(got) != "and a connection" || err != nil {
				t.Errorf("read %q, %v", got, err)
			}
			b.Close()
		})
	}
}

// The way to the backend is the environment's (WS-2).
func TestBackendThroughEnv(t *testing.T) {
	p := generated(t, "ws")
	p.server["backend"] = "http://backend.invalid:80"
	var asked atomic.Value
	env := ptipc.Env{DialOut: func(_ context.Context, _, addr string) (net.Conn, error) {
		asked.Store(addr)
		return nil, ptipc.ErrRefused
	}}
	l, err := Server.Listen(t.Context(), opaque(t, p.server), env)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	response, err := http.Get("http://" + l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	response.Body.Close()
	if response.StatusCode != http.StatusBadGateway || asked.Load() != "backend.invalid:80" {
		t.Errorf("answered %s, dialled %v", response.Status, asked.Load())
	}
	http.DefaultClient.CloseIdleConnections()
}

// What is no handshake is refused, and counted (WS-4).
func TestGarbage(t *testing.T) {
	for name, garbage := range map[string]string{
		"bytes":                          "\x16\x03\x01\x00\x00\x00\x00\r\n\r\n",
		"no version":                     "GET /\r\n\r\n",
		"long header":                    "GET / HTTP/1.1\r\nHost: x\r\nX: " + strings.Repeat("x", maxHeaders+8<<10) + "\r\n\r\n",
		"two hosts":                      "GET / HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n",
		"an opening with data behind it": request("/PATH") + strings.Repeat("x", 100),
	} {
		for _, scheme := range schemes {
			t.Run(name+"/"+scheme, func(t *testing.T) {
				p := newPair(t, scheme)
				c := p.dialRaw(t)
				if scheme == "wss" && !strings.HasPrefix(garbage, "\x16") {
					c = tls.Client(c, clientTLS(t, p))
				}
				_, _ = io.WriteString(c, strings.Replace(garbage, "/PATH", p.server["path"].(string), 1)) // it may be refused before it is out
				got, _ := io.ReadAll(c)
				if bytes.Contains(got, []byte(" 101 ")) {
					t.Errorf("answered %q", got)
				}
				c.Close()
				p.listener.Close()
				for p.listener.Stats().Failed == 0 { // net/http may still be closing it
					runtime.Gosched()
				}
				if s := p.listener.Stats(); s.Failed != 1 || s.Opened != 0 {
					t.Errorf("Stats() = %+v, want one that failed", s)
				}
			})
		}
	}
}

// A server holds a bounded number of connections in a handshake (WS-4): with one
// place left, a second client is served when the first has gone.
func TestBoundedOpenings(t *testing.T) {
	p := newPair(t, "ws")
	s := p.listener.(*server)
	for range maxOpening - 1 { // Accept waits with one of them
		s.opening <- struct{}{}
	}
	first := p.dialRaw(t)
	mustWrite(t, first, "GET / HTTP/1.1\r\n") // and no more
	second := p.dialRaw(t)
	mustWrite(t, second, request("/"))
	answered := make(chan error, 1)
	go func() {
		_, err := second.Read(make([]byte, 1))
		answered <- err
	}()
	for len(s.opening) < maxOpening { // the first client has yet to be accepted
		runtime.Gosched()
	}
	first.Close()
	if err := <-answered; err != nil {
		t.Errorf("the second client reads %v", err)
	}
	// A stream takes no place.
	for range maxOpening - 1 {
		<-s.opening
	}
	second.Close()
	var conns []net.Conn
	for range 3 {
		a, b := p.connect(t)
		conns = append(conns, a, b)
	}
	for len(s.opening) > 1 { // the second client's is given back when its end is seen
		c := p.dialRaw(t)
		mustWrite(t, c, request("/"))
		_, _ = io.ReadAll(io.LimitReader(c, 1))
		c.Close()
	}
	for _, c := range conns {
		c.Close()
	}
}

// Who keeps the web site busy holds no place of those who open a WebSocket (WS-4).
func TestBoundedVisitors(t *testing.T) {
	answers, asked := make(chan struct{}), make(chan struct{}, 1)
	site := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {
		asked <- struct{}{}
		<-answers
	}))
	defer site.Close()
	defer close(answers)
	p := newPair(t, "ws", map[string]any{"backend": site.URL})
	s := p.listener.(*server)
	for range maxVisitors - 1 {
		s.visitors <- struct{}{}
	}
	last := p.dialRaw(t)
	mustWrite(t, last, "POST / HTTP/1.1\r\nHost: example.com\r\nContent-Length: 1000\r\n\r\n") // and no body
	<-asked
	if len(s.visitors) != maxVisitors || len(s.opening) > 1 { // Accept waits with one of them
		t.Errorf("%d places of visitors are taken and %d of openings", len(s.visitors), len(s.opening))
	}
	more := p.dialRaw(t)
	mustWrite(t, more, "GET / HTTP/1.1\r\nHost: example.com\r\n\r\n")
	if text, err := io.ReadAll(more); err != nil || !strings.HasPrefix(string(text), "HTTP/1.1 503 ") {
		t.Errorf("one visitor too many reads %q, %v", text, err)
	}
	a, b := p.connect(t)
	a.Close()
	b.Close()
	last.Close()
	for range maxVisitors - 1 {
		<-s.visitors
	}
}

func TestOldTLSIsRefused(t *testing.T) { // WS-3
	p := newPair(t, "wss")
	config := clientTLS(t, p)
	config.MinVersion, config.MaxVersion = tls.VersionTLS12, tls.VersionTLS12
	c := tls.Client(p.dialRaw(t), config)
	if err := c.HandshakeContext(t.Context()); err == nil || !strings.Contains(err.Error(), "protocol version") {
		t.Errorf("TLS 1.2: %v, want a refusal of the version", err)
	}

	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	old := serverTLS(t, p)
	old.MinVersion, old.MaxVersion = tls.VersionTLS12, tls.VersionTLS12
	done := make(chan struct{})
	go func() {
		defer close(done)
		c, err := l.Accept()
		if err != nil {
			return
		}
		_ = tls.Server(c, old).HandshakeContext(t.Context()) // the client refuses
		c.Close()
	}()
	p.client["url"] = "wss://" + l.Addr().String() + "/"
	p.open(t, ptipc.Env{})
	if _, err := p.dial(t.Context()); err == nil || !strings.Contains(err.Error(), "protocol version") {
		t.Errorf("a server with TLS 1.2: %v, want a refusal of the version", err)
	}
	<-done
}

func TestForwarded(t *testing.T) { // WS-16
	for _, test := range []struct{ forwardedFor, realIP, want string }{
		{"", "192.0.2.1", "192.0.2.1"},
		{"192.0.2.1", "", "192.0.2.1"},
		{"10.0.0.1, 192.0.2.1", "192.0.2.1", "192.0.2.1"},
		{"2001:db8::1", "", "2001:db8::1"},
		{"192.0.2.1,", "", ""},
		{"", "", ""},
		{"unknown", "", ""},
		{"192.0.2.1", "192.0.2.2", ""},
		{"192.0.2.1:80", "", ""},
	} {
		h := http.Header{}
		if test.forwardedFor != "" {
			h.Set("X-Forwarded-For", test.forwardedFor)
		}
		if test.realIP != "" {
			h.Set("X-Real-IP", test.realIP)
		}
		addr, err := forwarded(h)
		if got := addr.String(); err == nil && got != test.want || err != nil && test.want != "" {
			t.Errorf("%v: %v, %v; want %q", h, addr, err, test.want)
		}
	}
}

func TestRemoteAddr(t *testing.T) {
	for _, trust := range []bool{false, true} {
		for header, want := range map[string]string{
			"X-Real-IP: 192.0.2.9":       map[bool]string{false: "127.0.0.1", true: "192.0.2.9"}[trust],
			"X-Forwarded-For: elsewhere": "127.0.0.1",
		} {
			p := newPair(t, "ws", map[string]any{"trust_forwarded": trust})
			c := p.dialRaw(t)
			mustWrite(t, c, request(p.server["path"].(string), header))
			s := p.accept(t)
			if got := s.RemoteAddr().(*net.TCPAddr).IP.String(); got != want {
				t.Errorf("trust %v, %s: RemoteAddr is %s, want %s", trust, header, got, want)
			}
			s.Close()
		}
	}
}

// Connections come and go without leaving descriptors or counts.
func TestNothingIsLeft(t *testing.T) {
	p := newPair(t, "wss")
	a, b := p.connect(t)
	a.Close()
	b.Close()
	before := descriptors(t)
	for range 5 {
		var conns []net.Conn
		for range 20 {
			a, b := p.connect(t)
			mustWrite(t, a, "x")
			conns = append(conns, a, b)
		}
		for _, c := range conns {
			c.Close()
		}
	}
	s := p.listener.Stats()
	if s.Active != 0 || s.Opened != 101 || s.Failed != 0 {
		t.Errorf("Stats() = %+v", s)
	}
	p.transport.Close()
	p.listener.Close()
	if after := descriptors(t); after >= before {
		t.Errorf("%d descriptors before, %d after everything is closed", before, after)
	}
	if _, err := p.listener.Accept(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("Accept after Close: %v, want ErrClosed", err)
	}
}

func TestListenRefuses(t *testing.T) {
	p := generated(t, "wss")
	p.listen(t)
	if _, err := Server.Listen(t.Context(), opaque(t, p.server), ptipc.Env{}); err == nil || !strings.Contains(err.Error(), p.server["listen"].(string)) {
		t.Errorf("a port that is in use: %v", err)
	}
}

// The real proxy of many web sites in front: TLS there, plain WebSocket here.
func TestNginxInFront(t *testing.T) {
	nginx := testpeer.Need(t, "nginx")
	p := generated(t, "wss")
	front, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address := front.Addr().String()
	front.Close()
	dir := t.TempDir()
	for name, key := range map[string]string{"cert.pem": "certificate", "key.pem": "key"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(p.server[key].(string)), 0o600); err != nil {
			t.Fatal(err)
		}
		delete(p.server, key)
	}
	p.server["trust_forwarded"] = true
	p.client["url"] = "wss://" + address + p.server["path"].(string)
	p.listen(t)
	p.open(t, ptipc.Env{})
	config := fmt.Sprintf(`daemon off; pid %[1]s/pid; error_log %[1]s/error.log; worker_processes 1;
events { worker_connections 64; }
http {
	access_log off;
	client_body_temp_path %[1]s/body; proxy_temp_path %[1]s/proxy; fastcgi_temp_path %[1]s/f; uwsgi_temp_path %[1]s/u; scgi_temp_path %[1]s/s;
	server {
		listen %[2]s ssl;
		ssl_certificate %[1]s/cert.pem; ssl_certificate_key %[1]s/key.pem; ssl_protocols TLSv1.3;
		location / {
			proxy_pass http://%[3]s; proxy_http_version 1.1;
			proxy_set_header Upgrade $http_upgrade; proxy_set_header Connection upgrade; proxy_set_header Host $host;
			proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for; proxy_set_header X-Real-IP $remote_addr;
			proxy_buffering off;
		}
	}
}
`, dir, address, p.server["listen"])
	file := filepath.Join(dir, "nginx.conf")
	if err := os.WriteFile(file, []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(nginx, "-p", dir, "-e", filepath.Join(dir, "error.log"), "-c", file)
	if os.Getuid() == 0 {
		cmd.Args = append(cmd.Args, "-g", "user root;") // it reads the key
	}
	var output bytes.Buffer
	cmd.Stdout, cmd.Stderr = &output, &output
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	exited := make(chan struct{})
	go func() {
		_ = cmd.Wait()
		close(exited)
	}()
	t.Cleanup(func() {
		_ = cmd.Process.Signal(os.Interrupt)
		<-exited
	})
	var a ptipc.Conn
	for { // nginx listens as soon as it can
		a, err = p.dial(t.Context())
		if !errors.Is(err, ptipc.ErrRefused) {
			break
		}
		select {
		case <-exited:
			t.Fatalf("nginx has ended: %s", output.String())
		default:
		}
	}
	if err != nil {
		t.Fatal(err)
	}
	b := p.accept(t)
	if got := b.RemoteAddr().String(); got != "127.0.0.1:0" {
		t.Errorf("RemoteAddr is %s, want what nginx said", got)
	}
	data := bytes.Repeat([]byte("0123456789abcdef"), 1<<16)
	go func() {
		_, _ = a.Write(data) // the reader finds out
		a.CloseWrite()
	}()
	if got, err := io.ReadAll(b); !bytes.Equal(got, data) || err != nil {
		t.Errorf("read %d bytes of %d, %v", len(got), len(data), err)
	}
	mustWrite(t, b, "the other way goes on")
	b.Close()
	if got, err := io.ReadAll(a); string(got) != "the other way goes on" || err != nil {
		t.Errorf("read %q, %v", got, err)
	}
	a.Close()

	a, b = p.connect(t)
	b.(interface{ Abort() error }).Abort()
	if _, err := a.Read(make([]byte, 1)); err == nil || errors.Is(err, io.EOF) {
		t.Errorf("the server broke behind nginx, and the client reads %v", err)
	}
	a.Close()
}

// A real HTTP client sees the web site that the port is shared with.
func TestCurlSeesTheSite(t *testing.T) {
	curl := testpeer.Need(t, "curl")
	page := strings.Repeat("a page\n", 10_000)
	site := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, page) }))
	defer site.Close()
	p := newPair(t, "wss", map[string]any{"backend": site.URL})
	pin := strings.Replace(p.client["pin"].(string), "sha256:", "sha256//", 1) + "=" // curl wants the padding
	out, err := exec.CommandContext(t.Context(), curl, "-sS", "--noproxy", "*", "-k", "--pinnedpubkey", pin,
		"https://"+p.listener.Addr().String()+"/").CombinedOutput()
	if err != nil || string(out) != page {
		t.Errorf("curl got %d bytes of %d, %v: %.100s", len(out), len(page), err, out)
	}
}

// A plain client that many programs are written with.
func TestGorillaClient(t *testing.T) {
	p := newPair(t, "wss")
	dialer := websocket.Dialer{TLSClientConfig: clientTLS(t, p), EnableCompression: true}
	c, _, err := dialer.DialContext(t.Context(), p.client["url"].(string), nil)
	if err != nil {
		t.Fatal(err)
	}
	s := p.accept(t)
	if err := c.WriteMessage(websocket.TextMessage, []byte("hello")); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 5)
	if _, err := io.ReadFull(s, buf); err != nil || string(buf) != "hello" {
		t.Errorf("read %q, %v", buf, err)
	}
	mustWrite(t, s, "you")
	s.Close()
	for _, want := range []string{"you", ""} {
		kind, got, err := c.ReadMessage()
		if kind != websocket.BinaryMessage || string(got) != want || err != nil {
			t.Errorf("got %d %q %v, want %q", kind, got, err, want)
		}
	}
	if _, _, err := c.ReadMessage(); !websocket.IsCloseError(err, websocket.CloseNormalClosure) {
		t.Errorf("closed with %v, want code 1000", err)
	}
	c.Close()
}
