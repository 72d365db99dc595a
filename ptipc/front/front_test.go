package front

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	proxyproto "github.com/pires/go-proxyproto"
	"go.uber.org/goleak"

	"pthost/ptipc"
	"pthost/ptipc/relay"
	"pthost/socks"
	"pthost/transports/direct"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const patience = 30 * time.Second

func quiet() *slog.Logger { return slog.New(slog.DiscardHandler) }

// far answers each stream, once it has ended, with what it was.
func far(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var open sync.WaitGroup
	open.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			open.Go(func() {
				defer conn.Close()
				all, _ := io.ReadAll(conn)
				fmt.Fprintf(conn, "heard %s", all)
			})
		}
	})
	t.Cleanup(func() { l.Close(); open.Wait() })
	return l.Addr().String()
}

func serve(t *testing.T, s Server, l net.Listener) {
	t.Helper()
	ended := make(chan error, 1)
	go func() { ended <- s.Serve(l) }()
	t.Cleanup(func() {
		cut, cancel := context.WithCancel(context.Background())
		cancel()
		_ = s.Shutdown(cut)
		if err := <-ended; err != nil {
			t.Error("Serve:", err)
		}
	})
}

func listen(t *testing.T, url string) net.Listener {
	t.Helper()
	l, err := Listen(url, quiet())
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func free(t *testing.T) ptipc.ConnectionFactory {
	t.Helper()
	transport, err := direct.Open(t.Context(), nil, ptipc.Env{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { transport.Close() })
	return transport.Connections["direct"]
}

// ask says a word, ends its direction and reads the answer.
func ask(t *testing.T, conn net.Conn, word string) string {
	t.Helper()
	_ = conn.SetDeadline(time.Now().Add(patience))
	if _, err := io.WriteString(conn, word); err != nil {
		t.Fatal(err)
	}
	if err := conn.(interface{ CloseWrite() error }).CloseWrite(); err != nil {
		t.Fatal(err)
	}
	answer, err := io.ReadAll(conn)
	if err != nil {
		t.Fatal(err)
	}
	return string(answer)
}

func privateDir(t *testing.T) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "private")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	return dir
}

// A forward and a SOCKS5 proxy carry a stream with its half-close, on TCP and on a
// unix socket; names go on as names (SOCKS-13).
func TestFronts(t *testing.T) {
	dest := far(t)
	_, port, _ := net.SplitHostPort(dest)
	for _, url := range []string{"tcp://127.0.0.1:0", "unix://" + filepath.Join(privateDir(t), "front.sock")} {
		network, _, _ := strings.Cut(url, "://")
		t.Run(network, func(t *testing.T) {
			l := listen(t, url)
			addr := l.Addr().String()
			if network == "unix" {
				addr = strings.TrimPrefix(url, "unix://")
			}
			serve(t, Forward(free(t), nil, dest, quiet()), l)
			conn, err := net.Dial(network, addr)
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			if got := ask(t, conn, "word"); got != "heard word" {
				t.Errorf("forward: %q", got)
			}
		})
	}
	asked := make(chan string, 1)
	factory := free(t)
	named := ptipc.ConnectionFactory{Dial: func(ctx context.Context, settings ptipc.Opaque, to string) (ptipc.Conn, error) {
		asked <- to + " " + string(settings)
		return factory.Dial(ctx, nil, dest)
	}}
	l := listen(t, "tcp://127.0.0.1:0")
	serve(t, SOCKS5(named, ptipc.Opaque(`{"a":1}`), quiet()), l)
	conn, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if err := socks.ConnectUpstream(t.Context(), conn, nil, "name.invalid:"+port); err != nil {
		t.Fatal(err)
	}
	if got := <-asked; got != "name.invalid:"+port+` {"a":1}` {
		t.Errorf("the transport was asked for %q", got)
	}
	if got := ask(t, conn, "word"); got != "heard word" {
		t.Errorf("proxy: %q", got)
	}
}

// A connection that cannot be forwarded is reset, so that it does not look like one
// that has ended (SOCKS-15).
func TestForwardFails(t *testing.T) {
	l := listen(t, "tcp://127.0.0.1:0")
	serve(t, Forward(free(t), nil, "127.0.0.1:1", quiet()), l)
	conn, err := net.Dial("tcp", l.Addr().String())
	if err == nil {
		defer conn.Close()
		_ = conn.SetDeadline(time.Now().Add(patience))
		_, err = conn.Read(make([]byte, 1))
	}
	if !errors.Is(err, syscall.ECONNRESET) { // it may come before the dial has returned
		t.Errorf("%v", err)
	}
}

// Shutdown waits for open connections and refuses new ones; when its time is over it
// cuts what is left with a reset.
func TestShutdown(t *testing.T) {
	l := listen(t, "tcp://127.0.0.1:0")
	s := Forward(free(t), nil, far(t), quiet())
	served := make(chan error, 1)
	go func() { served <- s.Serve(l) }()
	dial := func() net.Conn {
		t.Helper()
		conn, err := net.Dial("tcp", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close() })
		_ = conn.SetDeadline(time.Now().Add(patience))
		return conn
	}
	patient, hanging := dial(), dial()
	for _, conn := range []net.Conn{patient, hanging} {
		if _, err := io.WriteString(conn, "x"); err != nil {
			t.Fatal(err)
		}
	}
	// Both are accepted before the end begins: the listener hands them out in order,
	// and a third one is answered.
	if got := ask(t, dial(), "third"); got != "heard third" {
		t.Fatal(got)
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	shut := make(chan error, 1)
	go func() { shut <- s.Shutdown(ctx) }()
	if err := <-served; err != nil {
		t.Error("Serve:", err)
	}
	if got := ask(t, patient, "y"); got != "heard xy" {
		t.Errorf("an open connection: %q", got)
	}
	late := errors.New("too late")
	cancel(late)
	if err := <-shut; !errors.Is(err, late) {
		t.Errorf("Shutdown: %v", err)
	}
	if _, err := hanging.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("what was cut: %v", err)
	}
	if err := s.Serve(listen(t, "tcp://127.0.0.1:0")); err != nil {
		t.Errorf("Serve after Shutdown: %v", err)
	}
}

func TestListenErrors(t *testing.T) {
	open := t.TempDir()
	if err := os.Chmod(open, 0o755); err != nil {
		t.Fatal(err)
	}
	for url, want := range map[string]string{
		"tcp://0.0.0.0:0":                  "not a local address",
		"tcp://localhost:0":                "not a local address",
		"udp://127.0.0.1:1":                "tcp://127.0.0.1:PORT or unix:///PATH",
		"127.0.0.1:1":                      "tcp://127.0.0.1:PORT or unix:///PATH",
		"unix://" + open + "/s.sock":       open,
		"unix:///no/such/directory/s.sock": "/no/such/directory",
	} {
		l, err := Listen(url, quiet())
		if err == nil {
			l.Close()
			t.Errorf("%s: it listens", url)
		} else if !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", url, err)
		}
	}
}

// The service is told the client's address, or that it is not known (SRV-5).
func TestDeliver(t *testing.T) {
	service, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer service.Close()
	for name, remote := range map[string]net.Addr{
		"IPv4":  &net.TCPAddr{IP: net.IPv4(192, 0, 2, 7), Port: 4711},
		"IPv6":  &net.TCPAddr{IP: net.ParseIP("2001:db8::7"), Port: 4711},
		"other": &net.UnixAddr{Name: "@", Net: "unix"},
	} {
		t.Run(name, func(t *testing.T) {
			wire, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			s, err := Deliver("tcp://"+service.Addr().String(), true, quiet())
			if err != nil {
				t.Fatal(err)
			}
			serve(t, s, &wireOf{wire, new(relay.Meter), remote})
			client, err := net.Dial("tcp", wire.Addr().String())
			if err != nil {
				t.Fatal(err)
			}
			defer client.Close()
			conn, err := service.Accept()
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			_ = conn.SetDeadline(time.Now().Add(patience))
			if _, err := io.WriteString(client, "first bytes\n"); err != nil {
				t.Fatal(err)
			}
			r := bufio.NewReader(conn)
			header, err := proxyproto.Read(r)
			if err != nil {
				t.Fatal(err)
			}
			if name == "other" {
				if header.Command != proxyproto.LOCAL || header.Version != 2 {
					t.Errorf("%+v", header)
				}
			} else if header.Version != 2 || header.SourceAddr.String() != remote.String() {
				t.Errorf("%+v", header)
			}
			if line, err := r.ReadString('\n'); err != nil || line != "first bytes\n" {
				t.Errorf("%q %v", line, err)
			}
		})
	}
	for _, to := range []string{"127.0.0.1:1", "http://127.0.0.1:1", "tcp://"} {
		if _, err := Deliver(to, false, quiet()); ptipc.ExitCodeOf(err) != ptipc.ExitConfig {
			t.Errorf("%s: %v", to, err)
		}
	}
}

// wireOf is a wire whose clients come from somewhere else.
type wireOf struct {
	net.Listener
	meter  *relay.Meter
	remote net.Addr
}

func (l *wireOf) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return l.meter.Conn(conn, relay.Options{Remote: l.remote}), nil
}
