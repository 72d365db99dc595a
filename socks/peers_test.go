package socks

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"strings"
	"testing"
)

// plain serves an ordinary SOCKS5 proxy that sends everything to target, and
// tells what it was asked for.
func plain(t *testing.T, target string) (addr string, dests chan string) {
	t.Helper()
	dests = make(chan string, 16)
	s := &Server{Plain: true, Dial: func(ctx context.Context, r *Request) (net.Conn, error) {
		dests <- r.Dest
		var d net.Dialer
		return d.DialContext(ctx, "tcp", target)
	}}
	l, _ := listen(t, "tcp")
	start(t, s, l)
	return l.Addr().String(), dests
}

func run(t *testing.T, stdin io.Reader, name string, args ...string) []byte {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), name, args...)
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "HOME=" + t.TempDir()} // no proxy settings of the user
	cmd.Stdin = stdin
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s: %v\n%s", name, err, stderr.Bytes())
	}
	return out
}

var page = bytes.Repeat([]byte("0123456789abcdef"), 1<<16)

func web(t *testing.T) string {
	t.Helper()
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodPost {
			_, _ = io.Copy(w, r.Body)
			return
		}
		_, _ = w.Write(page)
	}))
	t.Cleanup(server.Close)
	return server.Listener.Addr().String()
}

func TestCurl(t *testing.T) {
	curl := need(t, "curl", "curl")
	target := web(t)
	addr, dests := plain(t, target)
	_, port, _ := net.SplitHostPort(target)

	// SOCKS-13: the name is not looked up by anybody.
	if got := run(t, nil, curl, "-sS", "--socks5-hostname", addr, "http://name.invalid:8080/"); !bytes.Equal(got, page) {
		t.Errorf("got %d bytes, want %d", len(got), len(page))
	}
	if dest := <-dests; dest != "name.invalid:8080" {
		t.Errorf("curl asked for %q", dest)
	}
	got := run(t, bytes.NewReader(page), curl, "-sS", "--noproxy", "", "--socks5", addr, "--data-binary", "@-", "http://127.0.0.1:"+port+"/")
	if !bytes.Equal(got, page) {
		t.Errorf("got %d bytes, want %d", len(got), len(page))
	}
	if dest := <-dests; dest != target {
		t.Errorf("curl asked for %q", dest)
	}
}

// SOCKS-15: the end of the input of nc is passed on, and the whole answer
// comes back after it.
func TestNetcat(t *testing.T) {
	nc := need(t, "nc.openbsd", "netcat-openbsd")
	l, _ := listen(t, "tcp")
	defer l.Close()
	go func() {
		conn, err := l.Accept()
		if err != nil {
			return
		}
		defer conn.Close()
		all, err := io.ReadAll(conn) // to the end first
		if err != nil {
			t.Error(err)
		}
		_, _ = conn.Write(all)
	}()
	addr, dests := plain(t, l.Addr().String())
	host, port, _ := net.SplitHostPort(addr)
	got := run(t, bytes.NewReader(page), nc, "-N", "-X", "5", "-x", net.JoinHostPort(host, port), "name.invalid", "7")
	if !bytes.Equal(got, page) {
		t.Errorf("got %d bytes, want %d", len(got), len(page))
	}
	if dest := <-dests; dest != "name.invalid:7" {
		t.Errorf("nc asked for %q", dest)
	}
}

func TestPythonSocks(t *testing.T) {
	python := ""
	for _, p := range []string{"/usr/bin/python3", need(t, "python3", "python3")} {
		if exec.CommandContext(t.Context(), p, "-c", "import socks").Run() == nil {
			python = p
			break
		}
	}
	if python == "" {
		missing(t, "the Python module socks", "python3-socks")
	}
	addr, dests := plain(t, web(t))
	host, port, _ := net.SplitHostPort(addr)
	got := run(t, nil, python, "-c", fmt.Sprintf(`
import socks, sys
s = socks.socksocket()
s.set_proxy(socks.SOCKS5, %q, %s, rdns=True)
s.connect(("name.invalid", 80))
s.sendall(b"GET / HTTP/1.0\r\n\r\n")
while True:
    b = s.recv(65536)
    if not b:
        break
    sys.stdout.buffer.write(b)
`, host, port))
	if !bytes.HasSuffix(got, page) || !strings.HasPrefix(string(got), "HTTP/1.0 200 OK") {
		t.Errorf("got %d bytes, want %d and a header", len(got), len(page))
	}
	if dest := <-dests; dest != "name.invalid:80" {
		t.Errorf("Python asked for %q", dest)
	}
}

// need returns the path of a program that a test talks to. A missing one skips
// the test, or fails it where PTIPC_NO_SKIP forbids skipping.
func need(t *testing.T, program, pkg string) string {
	t.Helper()
	path, err := exec.LookPath(program)
	if err != nil {
		missing(t, program, pkg)
	}
	return path
}

func missing(t *testing.T, what, pkg string) {
	t.Helper()
	reason := what + " is not installed; on Debian: apt-get install " + pkg
	if os.Getenv("PTIPC_NO_SKIP") != "" {
		t.Fatal(reason + " (PTIPC_NO_SKIP is set)")
	}
	t.Skip(reason)
}
