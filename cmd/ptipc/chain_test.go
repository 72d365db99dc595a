package main

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

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
func generateWebSocket(t *testing.T, options string) (client, server map[string]any) {
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
func startServer(t *testing.T, config map[string]any, keys map[string]any) *tool {
	t.Helper()
	keys["exec"], keys["role"], keys["config"] = "builtin:websocket", "server", config
	keys["restart"] = map[string]any{"min": "10ms", "max": "1s"}
	return startTool(t, "--log-level", "info", writeConfig(t, map[string]any{"transports": map[string]any{"server": keys}}))
}

// startClient runs the near end with one front before one client.
func startClient(t *testing.T, config map[string]any, front map[string]any) *tool {
	t.Helper()
	front["listen"] = "tcp://127.0.0.1:0"
	return startTool(t, "--log-level", "info", writeConfig(t, map[string]any{
		"transports": map[string]any{"client": map[string]any{
			"exec": "builtin:websocket", "config": config, "restart": map[string]any{"min": "10ms", "max": "1s"},
		}},
		"fronts": []any{front},
	}))
}

// startChain joins two machines by a WebSocket over TLS. allow are the egress rules
// of the far one; nil stands for its default.
func startChain(t *testing.T, allow ...string) *chain {
	t.Helper()
	client, server := generateWebSocket(t, `{"listen":"127.0.0.1:0","host":"127.0.0.1"}`)
	keys := map[string]any{"via": []string{"free"}}
	if allow != nil {
		keys["egress"] = map[string]any{"allow": allow}
	}
	return &chain{
		server: startServer(t, server, keys),
		client: startClient(t, client, map[string]any{"serve": "socks5", "via": []string{"free", "client"}}),
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
	size := int64(bulk)
	if testing.Short() {
		size = 10 << 20
	}
	curl := testpeer.Need(t, "curl")
	addr, www := startNginx(t)
	down := randomFile(t, filepath.Join(www, "down"), size)
	local, fetched := filepath.Join(t.TempDir(), "upload"), filepath.Join(t.TempDir(), "fetched")
	up := randomFile(t, local, size)
	c := startChain(t, addr)
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
	c := startChain(t, addr)
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
			c := startChain(t, allow...)
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
