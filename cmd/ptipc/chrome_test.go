package main

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"pthost/ptipc/testpeer"
)

// startChromium opens a page in a browser of its own, which knows nothing and keeps
// nothing, and asks nobody else for anything.
func startChromium(t *testing.T, page string, args ...string) {
	t.Helper()
	cmd := exec.Command(testpeer.Need(t, "chromium"), append([]string{
		"--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-quic", "--no-first-run",
		"--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-default-apps",
		"--disable-extensions", "--remote-debugging-port=0", "--user-data-dir=" + t.TempDir(),
		page,
	}, args...)...)
	out := new(lockedBuffer)
	cmd.Stdout, cmd.Stderr = out, out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		all := family(t, cmd.Process.Pid) // some of them lead sessions of their own
		for _, pid := range all {
			kill(t, pid)
		}
		_ = cmd.Wait() // it was killed
		for _, pid := range all {
			eventually(t, fmt.Sprintf("process %d of chromium is gone", pid), func() bool { return !alive(pid) })
		}
		if t.Failed() {
			t.Logf("chromium: %s", out)
		}
	})
}

// alive reports whether a process is there and no zombie.
func alive(pid int) bool {
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	return err == nil && !strings.Contains(string(status), "\nState:\tZ")
}

// A browser whose proxy is the front loads a page of a hundred objects.
func TestChromiumThroughChain(t *testing.T) {
	const objects = 100
	testpeer.Need(t, "chromium")
	// Its own resolver is closed to the browser, so that only the proxy leads here.
	listener, err := net.Listen("tcp", "127.0.0.2:0")
	if err != nil {
		t.Fatal(err)
	}
	result := make(chan string, 1)
	mux := http.NewServeMux()
	mux.HandleFunc("GET /{$}", func(w http.ResponseWriter, _ *http.Request) {
		fmt.Fprintf(w, `<!DOCTYPE html><title>objects</title><body><script>
let loaded = 0, failed = 0;
function done() {
	if (loaded + failed == %[1]d) fetch("/result", {method: "POST", body: loaded + " loaded, " + failed + " failed"});
}
for (let i = 0; i < %[1]d; i++) {
	const image = new Image();
	image.onload = () => { if (image.naturalWidth == i + 1) loaded++; else failed++; done(); };
	image.onerror = () => { failed++; done(); };
	image.src = "/object/" + (i + 1);
	document.body.append(image);
}
</script>`, objects)
	})
	mux.HandleFunc("GET /object/{width}", func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "image/svg+xml")
		w.Header().Set("Cache-Control", "no-store")
		fmt.Fprintf(w, `<svg xmlns="http://www.w3.org/2000/svg" width="%s" height="1"><!-- %s --></svg>`, r.PathValue("width"), strings.Repeat("x", 20_000))
	})
	mux.HandleFunc("POST /result", func(_ http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		result <- string(body)
	})
	site := &httptest.Server{Listener: listener, Config: &http.Server{Handler: mux, ReadHeaderTimeout: 10 * time.Second}}
	site.Start()
	defer site.Close()
	c := startChain(t, "mux", listener.Addr().String())
	startChromium(t, site.URL+"/", "--proxy-server=socks5://"+c.client.front, "--proxy-bypass-list=<-loopback>",
		"--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1")
	if got, want := within(t, "the page tells what it has loaded", result), fmt.Sprintf("%d loaded, 0 failed", objects); got != want {
		t.Errorf("%s; want %s", got, want)
	}
}

// The server side alone: a page of the web site behind the server opens a WebSocket to
// it, and talks to a service that knows nothing of either.
func TestChromiumTalksToServer(t *testing.T) {
	testpeer.Need(t, "chromium")
	echo := serve(t, func(conn *net.TCPConn) { _, _ = io.Copy(conn, conn) })
	result := make(chan string, 1)
	mux := http.NewServeMux()
	mux.HandleFunc("GET /{$}", func(w http.ResponseWriter, _ *http.Request) {
		_, _ = io.WriteString(w, `<!DOCTYPE html><title>echo</title><script>
const sent = new Uint8Array(100000).map((_, i) => i * 7);
const ws = new WebSocket("ws://" + location.host + "/secret");
ws.binaryType = "arraybuffer";
let got = [], opened = false;
ws.onopen = () => { opened = true; for (let i = 0; i < sent.length; i += 10000) ws.send(sent.slice(i, i + 10000)); };
ws.onmessage = (event) => {
	got.push(...new Uint8Array(event.data));
	if (got.length == sent.length) ws.close(1000);
};
ws.onclose = (event) => fetch("/result", {method: "POST", body:
	(opened ? "opened, " : "refused, ") + (got.length == sent.length && got.every((b, i) => b == sent[i]) ? "echoed" : got.length + " bytes") + ", code " + event.code});
</script>`)
	})
	mux.HandleFunc("POST /result", func(_ http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		result <- string(body)
	})
	site := httptest.NewServer(mux)
	defer site.Close()
	listen := freePort(t)
	startServer(t, map[string]any{"listen": listen, "path": "/secret", "backend": site.URL}, map[string]any{"deliver": "tcp://" + echo})
	startChromium(t, "http://"+listen+"/", "--no-proxy-server")
	if got := within(t, "the page tells how it went", result); got != "opened, echoed, code 1000" {
		t.Error(got)
	}
}
