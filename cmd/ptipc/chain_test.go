package main

import (
	"bufio"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/gorilla/websocket"

	"pthost/ptipc/testpeer"
	"pthost/socks"
)

// patience bounds what ends by an event: a test that runs into it has failed.
const patience = 60 * time.Second

// A chain is a pair of machines: one runs the server in a child, and connects its
// clients to where they want to go; the other runs the client in a child, below a
// SOCKS5 front.
type chain struct {
	server, client *tool
}

// generateWebSocket makes a configuration for each end.
func generateWebSocket(t testing.TB, options string) (client, server map[string]any) {
	t.Helper()
	cmd := toolCommand(t.Context(), t, "generate", "builtin:websocket", options)
	cmd.Stderr = os.Stderr
	text, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	var pair struct{ Client, Server map[string]any }
	if err := json.Unmarshal(text, &pair); err != nil {
		t.Fatal(err)
	}
	return pair.Client, pair.Server
}

// startServer runs the far end with one server, whose keys are those of HOST.json.
func startServer(t testing.TB, config map[string]any, keys map[string]any) *tool {
	t.Helper()
	keys["exec"], keys["role"], keys["config"] = "builtin:websocket", "server", config
	keys["restart"] = map[string]any{"min": "10ms", "max": "1s"}
	return startTool(t, "--log-level", "info", writeConfig(t, map[string]any{"transports": map[string]any{"server": keys}}))
}

// startClient runs the near end with one front before one client.
func startClient(t testing.TB, config map[string]any, front map[string]any) *tool {
	t.Helper()
	front["listen"] = "tcp://127.0.0.1:0"
	return startTool(t, "--log-level", "info", writeConfig(t, map[string]any{
		"transports": map[string]any{"client": map[string]any{
			"exec": "builtin:websocket", "config": config, "restart": map[string]any{"min": "10ms", "max": "1s"},
		}},
		"fronts": []any{front},
	}))
}

// eachVia runs a test of the chain with one stream on each WebSocket, and with many.
func eachVia(t *testing.T, f func(t *testing.T, via string)) {
	for _, via := range []string{"free", "mux"} {
		t.Run(via, func(t *testing.T) { f(t, via) })
	}
}

// startChain joins two machines by a WebSocket over TLS. via is the adapter that makes
// it free, allow are the egress rules of the far end; nil stands for its default.
func startChain(t testing.TB, via string, allow ...string) *chain {
	t.Helper()
	client, server := generateWebSocket(t, `{"listen":"127.0.0.1:0","host":"127.0.0.1"}`)
	keys := map[string]any{"via": []string{"free"}}
	if allow != nil {
		keys["egress"] = map[string]any{"allow": allow}
	}
	return &chain{
		server: startServer(t, server, keys),
		client: startClient(t, client, map[string]any{"serve": "socks5", "via": []string{via, "client"}}),
	}
}

func (c *chain) logs() string {
	return "--- server\n" + c.server.out.String() + "\n--- client\n" + c.client.out.String()
}

// dial connects through the front.
func (c *chain) dial(ctx context.Context, dest string) (*net.TCPConn, error) {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "tcp", c.client.front)
	if err != nil {
		return nil, err
	}
	if err := socks.ConnectUpstream(ctx, conn, nil, dest); err != nil {
		_ = conn.Close()
		return nil, err
	}
	return conn.(*net.TCPConn), nil
}

// eventually waits until something that another process does has been done.
func eventually(t *testing.T, what string, done func() bool) {
	t.Helper()
	limit := time.After(patience)
	look := time.NewTicker(5 * time.Millisecond)
	defer look.Stop()
	for !done() {
		select {
		case <-look.C:
		case <-limit:
			t.Fatalf("not after %v: %s", patience, what)
		}
	}
}

// within waits for a value of a channel.
func within[T any](t *testing.T, what string, c <-chan T) T {
	t.Helper()
	select {
	case v := <-c:
		return v
	case <-time.After(patience):
		t.Fatalf("not after %v: %s", patience, what)
		panic("unreachable")
	}
}

// curl fetches and uploads 100 MB at once, from and to nginx.
func TestChainCurl(t *testing.T) {
	eachVia(t, func(t *testing.T, via string) {
		size := int64(bulk)
		if testing.Short() {
			size = 10 << 20
		}
		curl := testpeer.Need(t, "curl")
		addr, www := startNginx(t)
		down := randomFile(t, filepath.Join(www, "down"), size)
		local, fetched := filepath.Join(t.TempDir(), "upload"), filepath.Join(t.TempDir(), "fetched")
		up := randomFile(t, local, size)
		c := startChain(t, via, addr)
		proxy := "socks5h://" + c.client.front
		var both sync.WaitGroup
		both.Go(func() {
			cmd := exec.CommandContext(t.Context(), curl, "-sS", "--fail", "-m", "120", "-x", proxy, "-o", fetched, "http://"+addr+"/down")
			if out, err := cmd.CombinedOutput(); err != nil {
				t.Errorf("download: %v\n%s", err, out)
			}
		})
		both.Go(func() {
			cmd := exec.CommandContext(t.Context(), curl, "-sS", "--fail", "-m", "120", "-x", proxy, "-T", local, "http://"+addr+"/up/file")
			if out, err := cmd.CombinedOutput(); err != nil {
				t.Errorf("upload: %v\n%s", err, out)
			}
		})
		both.Wait()
		if t.Failed() {
			t.Fatal(c.logs())
		}
		if checksum(t, fetched) != down {
			t.Error("the download is not what nginx has")
		}
		if checksum(t, filepath.Join(www, "up", "file")) != up {
			t.Error("nginx has not got what was uploaded")
		}
	})
}

// One connection through the chain carries a hundred streams of HTTP/2, inside TLS.
func TestChainHTTP2(t *testing.T) {
	const streams = 100
	curl, nginx := testpeer.Need(t, "curl"), testpeer.Need(t, "nginx")
	dir, addr := t.TempDir(), freePort(t)
	www := filepath.Join(dir, "www")
	if err := os.Mkdir(www, 0o755); err != nil {
		t.Fatal(err)
	}
	sums := make([]string, streams)
	for i := range sums {
		sums[i] = randomFile(t, filepath.Join(www, strconv.Itoa(i)), 256<<10)
	}
	certificate(t, dir)
	startNginxWith(t, nginx, dir, addr, fmt.Sprintf(`log_format h2 "$connection $server_protocol $status";
	access_log %[1]s/access.log h2; keepalive_requests 1000;
	server { listen %[2]s ssl http2; ssl_certificate certificate; ssl_certificate_key key; root %[1]s/www; }`, dir, addr))
	c := startChain(t, "free", addr)
	got := t.TempDir()
	run(t, exec.CommandContext(t.Context(), curl, "-sSk", "--fail", "-m", "120", "-x", "socks5h://"+c.client.front,
		"--http2", "--parallel", "--parallel-max", strconv.Itoa(streams),
		"-o", filepath.Join(got, "#1"), "https://"+addr+"/[0-"+strconv.Itoa(streams-1)+"]"))
	for i, sum := range sums {
		if checksum(t, filepath.Join(got, strconv.Itoa(i))) != sum {
			t.Errorf("file %d is not what nginx has", i)
		}
	}
	log, err := os.ReadFile(filepath.Join(dir, "access.log"))
	if err != nil {
		t.Fatal(err)
	}
	connections := map[string]int{}
	for line := range strings.Lines(string(log)) {
		if id, rest, _ := strings.Cut(strings.TrimSpace(line), " "); rest == "HTTP/2.0 200" {
			connections[id]++
		}
	}
	if len(connections) != 1 || strings.Count(string(log), "\n") != streams {
		t.Errorf("the streams came in these connections, of which one with %d was expected: %v\n%s", streams, connections, log)
	}
}

// certificate makes one, with its key, in files of these names.
func certificate(t *testing.T, dir string) (pin string) {
	t.Helper()
	client, server := generateWebSocket(t, `{"listen":"127.0.0.1:0","host":"127.0.0.1"}`)
	for _, name := range []string{"certificate", "key"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(server[name].(string)), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return client["pin"].(string)
}

// startNginxWith runs nginx with what stands in its block http.
func startNginxWith(t *testing.T, nginx, dir, addr, http string) {
	t.Helper()
	user := ""
	if os.Getuid() == 0 {
		user = "user root;" // the directory of the test belongs to root
	}
	path := filepath.Join(dir, "nginx.conf")
	config := fmt.Sprintf(`%s daemon off; worker_processes 1; pid %[2]s/pid; error_log %[2]s/error.log;
events { worker_connections 512; }
http {
	client_body_temp_path %[2]s/body; proxy_temp_path %[2]s/p; fastcgi_temp_path %[2]s/f;
	uwsgi_temp_path %[2]s/u; scgi_temp_path %[2]s/s;
	%[3]s
}`, user, dir, http)
	if err := os.WriteFile(path, []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	startPeer(t, addr, exec.Command(nginx, "-c", path, "-p", dir, "-e", filepath.Join(dir, "error.log")))
}

// A far end with the default policy, and one with every port of the public network,
// refuse what is not public: curl sees SOCKS reply 2, and nothing is dialled.
func TestChainForbidden(t *testing.T) {
	curl := testpeer.Need(t, "curl")
	var dialled sync.Map
	page := func(network, addr string) string {
		l, err := net.Listen(network, addr)
		if err != nil {
			t.Fatal(err)
		}
		done := make(chan struct{})
		go func() {
			defer close(done)
			for {
				conn, err := l.Accept()
				if err != nil {
					return
				}
				dialled.Store(conn.RemoteAddr().String()+" to "+conn.LocalAddr().String(), true)
				_ = conn.Close()
			}
		}()
		t.Cleanup(func() {
			_ = l.Close()
			<-done
		})
		_, port, _ := net.SplitHostPort(l.Addr().String())
		return port
	}
	port := page("tcp", ":0") // every address of this machine, of both families
	own := ""
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range addrs {
		if prefix, err := netip.ParsePrefix(a.String()); err == nil && prefix.Addr().Is4() && !prefix.Addr().IsLoopback() {
			own = prefix.Addr().String()
		}
	}
	for name, allow := range map[string][]string{"default": nil, "public": {"*:*"}, "nothing": {}} {
		t.Run(name, func(t *testing.T) {
			c := startChain(t, "free", allow...)
			for _, host := range []string{
				"127.0.0.1", "127.1.2.3", "localhost", "0.0.0.0", own, "10.0.0.1", "172.16.0.1", "192.168.0.1",
				"169.254.169.254", "100.64.0.1", "224.0.0.1", "255.255.255.255", "[::1]", "[::]", "[::ffff:127.0.0.1]",
				"[::ffff:10.0.0.1]", "[::127.0.0.1]", "[64:ff9b::127.0.0.1]", "[64:ff9b::10.0.0.1]", "[fe80::1]", "[fd00::1]",
				"[2002:7f00:1::]", "[2001::1]",
			} {
				if host == "" {
					continue
				}
				out, err := exec.CommandContext(t.Context(), curl, "-sS", "-m", "30", "--socks5-hostname", c.client.front,
					"http://"+host+":"+port+"/").CombinedOutput()
				if err == nil || !strings.Contains(string(out), "(2)") {
					t.Errorf("%s: %v\n%s", host, err, out)
				}
			}
		})
	}
	dialled.Range(func(who, _ any) bool {
		t.Errorf("was dialled: %v", who)
		return true
	})
}

// A child that is killed in mid-transfer breaks it: curl says so, and the destination
// sees the end. Once supervision has brought the child back, all is as before.
func TestChainKilled(t *testing.T) {
	eachVia(t, func(t *testing.T, via string) {
		curl := testpeer.Need(t, "curl")
		const part = 4 << 20
		started, ended := make(chan struct{}, 1), make(chan struct{}, 1)
		// It goes no further than a part of the transfer, whichever way that goes.
		addr := serve(t, func(conn *net.TCPConn) {
			in := bufio.NewReader(conn)
			request, err := in.ReadString('\n')
			for line := request; err == nil && line != "\r\n"; {
				line, err = in.ReadString('\n')
			}
			switch {
			case strings.HasPrefix(request, "GET /whole "):
				_, _ = io.WriteString(conn, "HTTP/1.0 200 OK\r\nContent-Length: 5\r\n\r\nhello")
				return
			case strings.HasPrefix(request, "GET "):
				_, _ = fmt.Fprintf(conn, "HTTP/1.0 200 OK\r\nContent-Length: %d\r\n\r\n", 2*part)
				_, _ = conn.Write(make([]byte, part))
			case strings.HasPrefix(request, "PUT "):
				_, _ = io.CopyN(io.Discard, in, part)
			default:
				return
			}
			started <- struct{}{}
			_, _ = io.Copy(io.Discard, in)
			ended <- struct{}{}
		})
		c := startChain(t, via, addr)
		whole := func() {
			t.Helper()
			out, err := exec.CommandContext(t.Context(), curl, "-sS", "--fail", "-m", "30", "--socks5-hostname", c.client.front, "http://"+addr+"/whole").CombinedOutput()
			if err != nil || string(out) != "hello" {
				t.Fatalf("%v\n%s\n%s", err, out, c.logs())
			}
		}
		whole()
		for name, victim := range map[string]*tool{"server": c.server, "client": c.client} {
			for _, what := range []string{"download", "upload"} {
				t.Run(name+"/"+what, func(t *testing.T) {
					args := []string{"-sS", "--fail", "-m", "60", "-o", os.DevNull, "--socks5-hostname", c.client.front, "http://" + addr + "/" + what}
					if what == "upload" {
						args = append(args, "-T", "-", "-H", "Expect:")
					}
					cmd := exec.CommandContext(t.Context(), curl, args...)
					out := new(lockedBuffer)
					cmd.Stdin, cmd.Stdout, cmd.Stderr = endless{}, out, out
					if err := cmd.Start(); err != nil {
						t.Fatal(err)
					}
					within(t, "the transfer is on its way", started)
					ready := strings.Count(victim.out.String(), "child ready")
					kill(t, lastPid(victim.out.String()))
					err := cmd.Wait()
					var exit *exec.ExitError
					if !errors.As(err, &exit) || exit.ExitCode() == curlTimedOut || !strings.Contains(out.String(), "curl: (") {
						t.Errorf("curl took it for the whole, or saw no end: %v\n%s", err, out)
					}
					within(t, "the destination sees the end", ended)
					eventually(t, "the child is back", func() bool {
						return strings.Count(victim.out.String(), "child ready") > ready
					})
					whole()
				})
			}
		}
	})
}

// curlTimedOut is the exit code of curl after the time that -m gives it.
const curlTimedOut = 28

// An answer that comes before the upload has ended gets through.
func TestChainEarlyAnswer(t *testing.T) {
	eachVia(t, func(t *testing.T, via string) {
		curl, nginx := testpeer.Need(t, "curl"), testpeer.Need(t, "nginx")
		dir, addr := t.TempDir(), freePort(t)
		startNginxWith(t, nginx, dir, addr, fmt.Sprintf(`access_log off; client_max_body_size 1m; lingering_close off;
	server { listen %s; root %s; dav_methods PUT; }`, addr, dir))
		local := filepath.Join(dir, "upload")
		randomFile(t, local, 20<<20)
		c := startChain(t, via, addr)
		cmd := exec.CommandContext(t.Context(), curl, "-sS", "-m", "30", "-o", os.DevNull, "-w", "%{http_code}", "-H", "Expect:",
			"--socks5-hostname", c.client.front, "-T", local, "http://"+addr+"/file")
		// Whether curl complains of what it could not send is its own affair.
		if out, err := cmd.Output(); string(out) != "413" {
			t.Errorf("%v: %q, want 413", err, out)
		}
	})
}

// kill ends a process that has no say in it.
func kill(t *testing.T, pid int) {
	t.Helper()
	process, err := os.FindProcess(pid)
	if err == nil {
		err = process.Kill()
	}
	if err != nil && !errors.Is(err, os.ErrProcessDone) {
		t.Fatal(err)
	}
}

// endless are zeros.
type endless struct{}

func (endless) Read(p []byte) (int, error) {
	clear(p)
	return len(p), nil
}

// webService runs nginx on addr, for which the client's address comes in a PROXY
// protocol header, and which takes it down in its log.
func webService(t *testing.T, nginx string) (addr string, logged func() []string) {
	t.Helper()
	dir := t.TempDir()
	addr = freePort(t)
	startNginxWith(t, nginx, dir, addr, fmt.Sprintf(`log_format who "$proxy_protocol_addr $request";
	access_log %[1]s/access.log who;
	server { listen %[2]s proxy_protocol; location / { return 200 "hello"; } }`, dir, addr))
	return addr, func() (lines []string) {
		log, err := os.ReadFile(filepath.Join(dir, "access.log"))
		if err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(string(log)) {
			if !strings.HasPrefix(line, "- ") { // a connection without a request
				lines = append(lines, strings.TrimSpace(line))
			}
		}
		return lines
	}
}

// A client's address gets from the wire into the log of a service: as the server saw
// it, or as the reverse proxy before the server did, and never as a client claims.
func TestChainClientAddress(t *testing.T) {
	curl, nginx := testpeer.Need(t, "curl"), testpeer.Need(t, "nginx")
	service, logged := webService(t, nginx)
	keys := func() map[string]any { return map[string]any{"deliver": "tcp://" + service, "proxy_protocol": true} }

	client, server := generateWebSocket(t, `{"listen":"127.0.0.1:0","host":"127.0.0.1"}`)
	startServer(t, server, keys())
	direct := startClient(t, client, map[string]any{"serve": "forward", "transport": "client"})

	// The same, with nginx doing TLS before it.
	behind := map[string]any{"listen": freePort(t), "path": "/secret", "trust_forwarded": true}
	startServer(t, behind, keys())
	dir, before := t.TempDir(), freePort(t)
	pin := certificate(t, dir)
	startNginxWith(t, nginx, dir, before, fmt.Sprintf(`access_log off;
	server {
		listen %[2]s ssl; ssl_certificate certificate; ssl_certificate_key key; ssl_protocols TLSv1.3;
		location / { return 200 "a web site"; }
		location /secret {
			proxy_pass http://%[3]s; proxy_http_version 1.1; proxy_buffering off;
			proxy_set_header Upgrade $http_upgrade; proxy_set_header Connection upgrade;
			proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;
		}
	}`, dir, before, behind["listen"]))
	proxied := startClient(t, map[string]any{"url": "wss://" + before + "/secret", "pin": pin}, map[string]any{"serve": "forward", "transport": "client"})

	want := map[string]bool{}
	for name, front := range map[string]string{"direct": direct.front, "proxied": proxied.front} {
		if out := run(t, exec.CommandContext(t.Context(), curl, "-sS", "-m", "30", "http://"+front+"/"+name)); out != "hello" {
			t.Errorf("%s: %q", name, out)
		}
		want["127.0.0.1 GET /"+name+" HTTP/1.1"] = true
	}
	// Somebody with another address, who claims a third one.
	for name, to := range map[string]string{"alien-direct": client["url"].(string), "alien-proxied": "wss://" + before + "/secret"} {
		dialer := websocket.Dialer{
			NetDialContext: (&net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 7)}}).DialContext,
			//nolint:gosec // who the server is makes no difference here
			TLSClientConfig: &tls.Config{InsecureSkipVerify: true},
		}
		ws, _, err := dialer.DialContext(t.Context(), to, http.Header{"X-Forwarded-For": {"192.0.2.1"}})
		if err != nil {
			t.Fatal(err)
		}
		_ = ws.SetReadDeadline(time.Now().Add(patience)) // fails only on a closed one
		if err := ws.WriteMessage(websocket.BinaryMessage, []byte("GET /"+name+" HTTP/1.0\r\n\r\n")); err != nil {
			t.Error(err)
		}
		if _, answer, err := ws.ReadMessage(); err != nil || !strings.HasPrefix(string(answer), "HTTP/1.1 200 OK") {
			t.Errorf("%s: %v, %q", name, err, answer)
		}
		_ = ws.Close()
		want["127.0.0.7 GET /"+name+" HTTP/1.0"] = true
	}
	eventually(t, "nginx has logged every request", func() bool { return len(logged()) >= len(want) })
	for _, line := range logged() {
		if !want[line] {
			t.Errorf("nginx has logged %q, and not one of %v", line, want)
		}
		delete(want, line)
	}
}

// family lists a process and its descendants.
func family(t *testing.T, pid int) []int {
	t.Helper()
	pids := []int{pid}
	for i := 0; i < len(pids); i++ {
		tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pids[i]))
		if err != nil {
			t.Fatal(err)
		}
		for _, path := range tasks {
			children, _ := os.ReadFile(path) // the thread may be gone
			for _, child := range strings.Fields(string(children)) {
				pid, err := strconv.Atoi(child)
				if err != nil {
					t.Fatal(err)
				}
				pids = append(pids, pid)
			}
		}
	}
	return pids
}

// peakMemory is the most memory that a process has had, in bytes.
func peakMemory(t *testing.T, pid int) int {
	t.Helper()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	_, after, ok := strings.Cut(string(status), "VmHWM:")
	if !ok {
		t.Fatalf("process %d has no VmHWM\n%s", pid, status)
	}
	kb, err := strconv.Atoi(strings.Fields(after)[0])
	if err != nil {
		t.Fatal(err)
	}
	return kb << 10
}

// Clients that do not read make the sender wait, and nobody in between takes the
// bytes into memory. When they read, all of it comes.
func TestChainSlowReaders(t *testing.T) {
	eachVia(t, func(t *testing.T, via string) {
		const readers, size, bound = 8, 100 << 20, 64 << 20
		if testing.Short() {
			t.Skip("moves 800 MB")
		}
		stalled := make(chan error, readers)
		addr := serve(t, func(conn *net.TCPConn) {
			block := make([]byte, 64<<10)
			said := false
			for left := size; left > 0; {
				if !said {
					_ = conn.SetWriteDeadline(time.Now().Add(time.Second)) // fails only on a closed conn
				}
				n, err := conn.Write(block[:min(left, len(block))])
				left -= n
				if err != nil && !said && errors.Is(err, os.ErrDeadlineExceeded) {
					said, err = true, nil
					_ = conn.SetWriteDeadline(time.Time{})
					stalled <- nil
				}
				if err != nil {
					stalled <- err
					return
				}
			}
			if !said {
				stalled <- errors.New("all of it was taken at once")
			}
		})
		c := startChain(t, via, addr)
		conns := make([]*net.TCPConn, readers)
		for i := range conns {
			conn, err := c.dial(t.Context(), addr)
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			conns[i] = conn
		}
		for range conns {
			if err := within(t, "the sender has to wait", stalled); err != nil {
				t.Fatal(err)
			}
		}
		check := func(when string) {
			for name, r := range map[string]*tool{"server": c.server, "client": c.client} {
				pids := family(t, r.cmd.Process.Pid)
				if len(pids) < 3 {
					t.Errorf("the %s's processes are %v; the tool, its launcher and a child were expected", name, pids)
				}
				for _, pid := range pids {
					if peak := peakMemory(t, pid); peak > bound {
						t.Errorf("%s, a process at the %s has had %d MB of memory", when, name, peak>>20)
					}
				}
			}
		}
		check("while nobody reads")
		for i, conn := range conns {
			_ = conn.SetReadDeadline(time.Now().Add(patience)) // fails only on a closed conn
			if n, err := io.Copy(io.Discard, conn); err != nil || n != size {
				t.Errorf("reader %d: %d bytes, %v", i, n, err)
			}
		}
		check("after all was read")
	})
}

// Thousands of clients that say nothing are all still there when they do.
func TestChainIdleClients(t *testing.T) {
	eachVia(t, func(t *testing.T, via string) {
		clients := 3000
		if testing.Short() {
			clients = 100
		}
		addr := serve(t, func(conn *net.TCPConn) {
			_, _ = io.Copy(conn, conn)
		})
		c := startChain(t, via, addr)
		conns := make([]*net.TCPConn, clients)
		work := make(chan int)
		var dialling sync.WaitGroup
		for range 16 {
			dialling.Go(func() {
				for i := range work {
					conn, err := c.dial(t.Context(), addr)
					if err != nil {
						t.Errorf("client %d: %v", i, err)
						continue
					}
					conns[i] = conn
				}
			})
		}
		for i := range conns {
			work <- i
		}
		close(work)
		dialling.Wait()
		defer func() {
			for _, conn := range conns {
				if conn != nil {
					_ = conn.Close()
				}
			}
		}()
		if t.Failed() {
			t.FailNow()
		}
		for _, conn := range conns {
			_ = conn.SetDeadline(time.Now().Add(patience)) // fails only on a closed conn
		}
		for i, conn := range conns {
			if _, err := conn.Write([]byte{byte(i)}); err != nil {
				t.Fatalf("client %d: %v", i, err)
			}
		}
		for i, conn := range conns {
			var answer [1]byte
			if _, err := io.ReadFull(conn, answer[:]); err != nil || answer[0] != byte(i) {
				t.Fatalf("client %d: %v, %d", i, err, answer[0])
			}
		}
	})
}
