package pt1_test

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"pthost/adapters/free"
	"pthost/adapters/pt1"
	"pthost/ptipc"
	"pthost/ptipc/front"
	"pthost/ptipc/host"
	"pthost/ptipc/testpeer"
)

// obfs4 is a server of obfs4proxy that hands its connections over, and what its
// clients need.
func obfs4(t testing.TB, serve func(net.Listener)) (client ptipc.Opaque) {
	t.Helper()
	command := &host.Command{Path: testpeer.Need(t, "obfs4proxy"), Dialect: pt1.Dialect{}, StopTimeout: time.Second}
	env := ptipc.Env{Local: stateDir(t)}
	client, server, err := command.Server().GenerateConfig(within(t), ptipc.Opaque(`{"transport":"obfs4","listen":"127.0.0.1:0"}`), env)
	if err != nil {
		t.Fatal(err)
	}
	listener, err := command.Server().Listen(within(t), server, env)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		serve(listener)
	}()
	t.Cleanup(func() {
		if err := listener.Close(); err != nil {
			t.Error(err)
		}
		<-done
	})
	return client
}

func obfs4Client(t testing.TB, config ptipc.Opaque, env ptipc.Env) *ptipc.Transport {
	t.Helper()
	return open(t, &host.Command{Path: testpeer.Need(t, "obfs4proxy"), Dialect: pt1.Dialect{}, StopTimeout: time.Second}, string(config), env)
}

// forward makes a port of a connection factory.
func forward(t testing.TB, f ptipc.ConnectionFactory) (addr string) {
	t.Helper()
	listener, err := front.Listen("tcp://127.0.0.1:0", slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	server := front.Forward(f, nil, "", slog.New(slog.DiscardHandler))
	done := make(chan error, 1)
	go func() { done <- server.Serve(listener) }()
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		_ = server.Shutdown(ctx)
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return listener.Addr().String()
}

// page is a web server of random bytes, which remembers who asked.
type page struct {
	size   int64
	sum    string // SHA-256 of the bytes
	seed   [32]byte
	client atomic.Value // string: the last one's address
}

func newPage(t testing.TB, size int64) *page {
	t.Helper()
	p := &page{size: size, seed: [32]byte{1, 2, 3}}
	hash := sha256.New()
	if _, err := io.Copy(hash, p.bytes()); err != nil {
		t.Fatal(err)
	}
	p.sum = hex.EncodeToString(hash.Sum(nil))
	return p
}

func (p *page) bytes() io.Reader { return io.LimitReader(rand.NewChaCha8(p.seed), p.size) }

func (p *page) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	p.client.Store(r.RemoteAddr)
	if r.Method == http.MethodPut {
		hash := sha256.New()
		if _, err := io.Copy(hash, r.Body); err == nil {
			fmt.Fprintf(w, "%x", hash.Sum(nil))
		}
		return
	}
	w.Header().Set("Content-Length", fmt.Sprint(p.size))
	_, _ = io.Copy(w, p.bytes()) // the client sees what is missing
}

func (p *page) serve(l net.Listener) {
	server := &http.Server{Handler: p}
	_ = server.Serve(l) // the listener is closed
	_ = server.Close()
}

// curl fetches the page and compares it.
func curl(t testing.TB, p *page, addr string, args ...string) {
	t.Helper()
	cmd := exec.CommandContext(within(t), testpeer.Need(t, "curl"), append([]string{"--silent", "--show-error", "http://" + addr + "/"}, args...)...)
	cmd.Env = []string{} // no proxy of the user's
	hash := sha256.New()
	var stderr strings.Builder
	cmd.Stdout, cmd.Stderr = hash, &stderr
	if err := cmd.Run(); err != nil {
		t.Fatalf("curl: %v\n%s", err, stderr.String())
	}
	if got := hex.EncodeToString(hash.Sum(nil)); got != p.sum {
		t.Errorf("the page arrived with the checksum %s, want %s", got, p.sum)
	}
}

const manyBytes = 100_000_000

// obfs4proxy as client and as server under this host: curl fetches 100 MB and sends
// as many. The server sees the real address of the client's wire, which here is one
// of our own, the way out (PT1-12).
func TestObfs4(t *testing.T) {
	p := newPage(t, manyBytes)
	client := obfs4(t, p.serve)
	var wire atomic.Value
	out := func(ctx context.Context, network, addr string) (net.Conn, error) {
		d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 9)}}
		conn, err := d.DialContext(ctx, network, addr)
		if err == nil {
			wire.Store(conn.LocalAddr().String())
		}
		return conn, err
	}
	transport := obfs4Client(t, client, ptipc.Env{DialOut: out})
	addr := forward(t, transport.Connections["obfs4"])
	curl(t, p, addr)
	if seen := p.client.Load(); seen != wire.Load() || !strings.HasPrefix(fmt.Sprint(seen), "127.0.0.9:") {
		t.Errorf("the server sees the client at %v, and the wire came from %v", seen, wire.Load())
	}
	file := filepath.Join(t.TempDir(), "upload")
	f, err := os.Create(file)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.Copy(f, p.bytes()); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	upload := &page{}
	answer := sha256.Sum256([]byte(p.sum))
	upload.sum = hex.EncodeToString(answer[:])
	curl(t, upload, addr, "--upload-file", file)

	stats, err := transport.Stats(t.Context())
	if err != nil || stats.Received < manyBytes || stats.Sent < manyBytes {
		t.Errorf("counted %+v, error %v", stats, err)
	}
}

// With an upstream proxy of its own, obfs4proxy goes through it: microsocks has seen
// the connection (PT1-7).
func TestObfs4ThroughProxy(t *testing.T) {
	p := newPage(t, 1_000_000)
	client := obfs4(t, p.serve)
	microsocks := testpeer.Need(t, "microsocks")
	port := unused(t)
	cmd := exec.CommandContext(t.Context(), microsocks, "-i", "127.0.0.1", "-p", fmt.Sprint(port), "-u", "user", "-P", "password")
	var said journal
	cmd.Stderr = &said
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _, _ = cmd.Process.Kill(), cmd.Wait() })
	proxy := fmt.Sprintf("127.0.0.1:%d", port)
	eventually(t, "microsocks listens", func() bool {
		conn, err := net.Dial("tcp", proxy)
		if err == nil {
			conn.Close()
		}
		return err == nil
	})
	transport := open(t, &host.Command{
		Path: testpeer.Need(t, "obfs4proxy"), Dialect: pt1.Dialect{}, StopTimeout: time.Second,
		Proxy: (&url.URL{Scheme: "socks5", User: url.UserPassword("user", "password"), Host: proxy}).String(),
	}, string(client), ptipc.Env{})
	curl(t, p, forward(t, transport.Connections["obfs4"]))
	eventually(t, "microsocks has seen it", func() bool { return said.has("connected to 127.0.0.1:") })
}

func unused(t testing.TB) int {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port
}

// Several transports in one process, client and server (PT1-1): the old transports of
// obfs4proxy each carry a page.
func TestSeveral(t *testing.T) {
	p := newPage(t, 100_000)
	a, b := unused(t), unused(t)
	command := &host.Command{Path: testpeer.Need(t, "obfs4proxy"), Dialect: pt1.Dialect{}, StopTimeout: time.Second}
	var j journal
	env := j.env()
	listener, err := command.Server().Listen(within(t), ptipc.Opaque(fmt.Sprintf(
		`{"transports":{"obfs2":{"listen":"127.0.0.1:%d"},"obfs3":{"listen":"127.0.0.1:%d"},"obfs4":{"listen":"127.0.0.1:0","options":{"iat-mode":1}}}}`, a, b)), env)
	if err != nil {
		t.Fatal(err)
	}
	go p.serve(listener)
	t.Cleanup(func() { listener.Close() })
	if !j.has("iat-mode=1") || !j.has("cert=") { // PT1-13
		t.Error("what clients of obfs4 need was not told")
	}
	transport := obfs4Client(t, ptipc.Opaque(fmt.Sprintf(
		`{"transports":{"obfs2":{"host":"127.0.0.1","port":%d},"obfs3":{"host":"127.0.0.1","port":%d}}}`, a, b)), ptipc.Env{})
	for _, name := range []string{"obfs2", "obfs3"} {
		curl(t, p, forward(t, transport.Connections[name]))
	}
}

// snowflake-client starts, announces itself and stops cleanly. It has no broker here,
// and needs none for this.
func TestSnowflake(t *testing.T) {
	command := &host.Command{Path: testpeer.Need(t, "snowflake-client"), Dialect: pt1.Dialect{}, StopTimeout: 10 * time.Second}
	events := make(chan host.Event, 100)
	command.Events = func(e host.Event) { events <- e }
	transport := open(t, command, `{"transports":{"snowflake":{"url":"https://broker.invalid/","ice":"stun:stun.invalid:3478"}}}`, ptipc.Env{})
	if _, ok := transport.Connections["snowflake"]; !ok {
		t.Errorf("it announced %v", transport.Connections)
	}
	if err := transport.Close(); err != nil {
		t.Error(err)
	}
	for e := range events {
		if e.Kind == host.Exited {
			if ptipc.ExitCodeOf(e.Err) != ptipc.ExitOK {
				t.Errorf("it did not stop cleanly: %v", e.Err)
			}
			return
		}
	}
}

// goptlib builds an example of Tor's own library, the other real peer.
func goptlib(t *testing.T, name string) string {
	t.Helper()
	source := filepath.Join("/usr/share/doc/golang-goptlib-dev/examples", name, name+".go")
	if _, err := os.Stat(source); err != nil {
		testpeer.Skip(t, "goptlib's examples are not installed; on Debian: apt-get install golang-goptlib-dev")
	}
	program := filepath.Join(t.TempDir(), name)
	cmd := exec.CommandContext(within(t), "go", "build", "-o", program, source)
	cmd.Env = append(os.Environ(), "GO111MODULE=off", "GOPATH=/usr/share/gocode", "GOFLAGS=")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("building %s: %v\n%s", name, err, out)
	}
	return program
}

// goptlib's dummy client and server: a transport that does nothing to the bytes shows
// the protocol alone, with an address and a name.
func TestGoptlib(t *testing.T) {
	client, server := goptlib(t, "dummy-client"), goptlib(t, "dummy-server")
	command := &host.Command{Path: server, Dialect: pt1.Dialect{}, StopTimeout: time.Second}
	listener, err := command.Server().Listen(within(t), ptipc.Opaque(`{"transports":{"dummy":{"listen":"127.0.0.1:0"}}}`), ptipc.Env{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { listener.Close() })
	transport := open(t, &host.Command{Path: client, Dialect: pt1.Dialect{}, StopTimeout: time.Second}, `{"transports":{"dummy":{}}}`, ptipc.Env{})
	port := netip.MustParseAddrPort(listener.Addr().String()).Port()
	for _, name := range []string{"127.0.0.1", "localhost"} {
		conn := dial(t, transport.Connections["dummy"], fmt.Sprintf(`{"host":%q,"port":%d,"k":"v=;"}`, name, port), "")
		accepted, err := listener.Accept()
		if err != nil {
			t.Fatal(err)
		}
		if addr, err := netip.ParseAddrPort(accepted.RemoteAddr().String()); err != nil || !addr.Addr().IsLoopback() {
			t.Errorf("the client is at %v", accepted.RemoteAddr())
		}
		if _, err := io.WriteString(conn, "hello"); err != nil {
			t.Fatal(err)
		}
		b := make([]byte, 5)
		if _, err := io.ReadFull(accepted, b); err != nil || string(b) != "hello" {
			t.Errorf("%q, error %v", b, err)
		}
		accepted.Close()
	}
	if _, err := transport.Connections["dummy"].Dial(within(t), ptipc.Opaque(fmt.Sprintf(`{"host":"127.0.0.1","port":%d}`, unused(t))), ""); err == nil {
		t.Error("nobody listens, and it connected")
	}
}

// What is free elsewhere is free here: a SOCKS5 proxy to everywhere, through obfs4.
func TestFreeOverObfs4(t *testing.T) {
	p := newPage(t, 1_000_000)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	go p.serve(l)
	t.Cleanup(func() { l.Close() })
	command := &host.Command{Path: testpeer.Need(t, "obfs4proxy"), Dialect: pt1.Dialect{}, StopTimeout: time.Second}
	env := ptipc.Env{Local: stateDir(t)}
	factory := free.Server(*command.Server())
	client, server, err := factory.GenerateConfig(within(t), ptipc.Opaque(
		`{"egress":{"allow":["127.0.0.0/8:*"]},"carrier":{"transport":"obfs4","listen":"127.0.0.1:0"}}`), env)
	if err != nil {
		t.Fatal(err)
	}
	manager, err := factory.Proxy(within(t), server, env)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { manager.Close() })
	transport, err := free.Client((&host.Command{Path: command.Path, Dialect: pt1.Dialect{}, StopTimeout: time.Second}).Open)(within(t), client, ptipc.Env{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { transport.Close() })
	listener, err := front.Listen("tcp://127.0.0.1:0", slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	proxy := front.SOCKS5(transport.Connections["obfs4"], nil, slog.New(slog.DiscardHandler))
	done := make(chan error, 1)
	go func() { done <- proxy.Serve(listener) }()
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		_ = proxy.Shutdown(ctx)
		<-done
	})
	curl(t, p, l.Addr().String(), "--socks5-hostname", listener.Addr().String())
	if stats, err := transport.Stats(t.Context()); err != nil || stats.Received < uint64(p.size) {
		t.Errorf("it went another way: %+v, error %v", stats, err)
	}
}
