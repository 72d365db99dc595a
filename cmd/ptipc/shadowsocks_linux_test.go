package main

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"pthost/ptipc/testpeer"
)

// asPlugin puts the tool into PATH as ptipc, and a transport that is an executable as
// pt-websocket, and marks the processes of the test.
func asPlugin(t *testing.T) (mark string) {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	if err := os.Symlink(self, filepath.Join(dir, "ptipc")); err != nil {
		t.Fatal(err)
	}
	script := "#!/bin/sh\nexec ptipc transport websocket \"$@\"\n"
	if err := os.WriteFile(filepath.Join(dir, "pt-websocket"), []byte(script), 0o755); err != nil { //nolint:gosec // it is executed
		t.Fatal(err)
	}
	name := "PTIPC_TEST_MARK"
	mark = fmt.Sprintf("%d-%d", os.Getpid(), time.Now().UnixNano())
	t.Setenv(name, mark)
	t.Setenv(asTool, "1")
	t.Setenv("GORACE", "atexit_sleep_ms=0 "+os.Getenv("GORACE"))
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
	return name + "=" + mark
}

// generateTo writes both sides' configurations of a WebSocket into a file, as ptipc
// generate prints them.
func generateTo(t *testing.T, listen string) (path string) {
	t.Helper()
	client, server := generateWebSocket(t, fmt.Sprintf(`{"listen":%q,"host":"wrong.invalid"}`, listen))
	path = filepath.Join(t.TempDir(), "ws.json")
	text, err := json.Marshal(map[string]any{"client": client, "server": server})
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, text, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// shadowsocks is a running ss-local or ss-server.
type shadowsocks struct {
	cmd   *exec.Cmd
	out   *lockedBuffer
	ended chan error
}

// startShadowsocks runs a program of shadowsocks-libev until the test ends.
func startShadowsocks(t *testing.T, program, server, options string, more ...string) *shadowsocks {
	t.Helper()
	host, port, err := net.SplitHostPort(server)
	if err != nil {
		t.Fatal(err)
	}
	args := append([]string{"-s", host, "-p", port, "-k", "a key", "-m", "chacha20-ietf-poly1305", "--plugin", "ptipc", "--plugin-opts", options}, more...)
	s := &shadowsocks{cmd: exec.Command(testpeer.Need(t, program), args...), out: new(lockedBuffer), ended: make(chan error, 1)}
	s.cmd.Stdout, s.cmd.Stderr = s.out, s.out
	s.cmd.WaitDelay = 10 * time.Second // a plugin that is left behind holds the outputs
	if err := s.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() { s.ended <- s.cmd.Wait() }()
	t.Cleanup(func() {
		s.signal(syscall.SIGTERM)
		s.wait(t)
		if t.Failed() {
			t.Logf("%s:\n%s", program, s.out)
		}
	})
	return s
}

func (s *shadowsocks) signal(sig syscall.Signal) { _ = s.cmd.Process.Signal(sig) } // it may have ended already

func (s *shadowsocks) wait(t *testing.T) error {
	t.Helper()
	select {
	case err := <-s.ended:
		s.ended <- err
		return err
	case <-time.After(30 * time.Second):
		s.signal(syscall.SIGKILL)
		t.Fatalf("%v does not end\n%s", s.cmd.Args, s.out)
		return nil
	}
}

// awaitPlugin waits until so many wires or fronts of the plugin are ready.
func (s *shadowsocks) awaitPlugin(t *testing.T, wires int) {
	t.Helper()
	eventually(t, "a plugin", func() bool {
		select {
		case err := <-s.ended:
			s.ended <- err
			t.Fatalf("%v has ended: %v\n%s", s.cmd.Args, err, s.out)
		default:
		}
		return strings.Count(s.out.String(), "plugin is ready") >= wires
	})
}

// ss-local and ss-server with the tool as their plugin: 100 MB each way at once through
// the WebSocket transport, inside of the plugin and as an executable of its own; and
// nothing is left, whether Shadowsocks ends in order or is killed (SIP-4 to SIP-8).
func TestShadowsocks(t *testing.T) {
	curl := testpeer.Need(t, "curl")
	page, www := startNginx(t)
	self, err := os.Executable() // what pt-websocket executes
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name, transport, server string
		size                    int64
		end                     syscall.Signal
	}{
		{"builtin", "transport=websocket", "127.0.0.1", bulk, syscall.SIGTERM},
		{"killed", "transport=websocket;connection=websocket", "localhost", 1 << 20, syscall.SIGKILL},
		{"executable", "exec=pt-websocket;allow-read=" + self, "::1", 10 << 20, syscall.SIGTERM},
		{"executable, killed", "exec=pt-websocket;no-sandbox", "127.0.0.1", 1 << 20, syscall.SIGKILL},
	} {
		t.Run(tt.name, func(t *testing.T) {
			mark := asPlugin(t)
			_, port, _ := net.SplitHostPort(freePort(t))
			wire := strings.Replace(tt.server, "localhost", "127.0.0.1", 1)
			file := generateTo(t, net.JoinHostPort(wire, port))
			server := startShadowsocks(t, "ss-server", net.JoinHostPort(wire, port), "server;config="+file+";"+strings.Split(tt.transport, ";connection")[0])
			front := freePort(t)
			_, frontPort, _ := net.SplitHostPort(front)
			// The configuration names another server: Shadowsocks is who says where it is.
			client := startShadowsocks(t, "ss-local", net.JoinHostPort(tt.server, port), tt.transport+";config="+file, "-b", "127.0.0.1", "-l", frontPort)
			server.awaitPlugin(t, 1)
			client.awaitPlugin(t, 1)

			down := randomFile(t, filepath.Join(www, "down"), tt.size)
			local := filepath.Join(t.TempDir(), "local")
			up := randomFile(t, local, tt.size)
			upload := exec.CommandContext(t.Context(), curl, "-sS", "--fail", "-m", "120", "--socks5-hostname", front, "-T", local, "http://"+page+"/up/up")
			if err := upload.Start(); err != nil {
				t.Fatal(err)
			}
			fetched := filepath.Join(t.TempDir(), "fetched")
			run(t, exec.CommandContext(t.Context(), curl, "-sS", "--fail", "-m", "120", "--socks5-hostname", front, "-o", fetched, "http://"+page+"/down"))
			if err := upload.Wait(); err != nil {
				t.Error("upload:", err)
			}
			if checksum(t, fetched) != down || checksum(t, filepath.Join(www, "up", "up")) != up {
				t.Error("what came is not what was sent")
			}

			if n := len(descendants(t, mark)); n < 4 {
				t.Errorf("%d processes run; two of Shadowsocks and their plugins were expected", n)
			}
			client.signal(tt.end)
			server.signal(tt.end)
			client.wait(t)
			server.wait(t)
			eventually(t, "the end of all processes", func() bool { return len(descendants(t, mark)) == 0 })
			for _, log := range []string{client.out.String(), server.out.String()} {
				if strings.Contains(log, "sha256:") || strings.Contains(log, "PRIVATE KEY") { // SIP-9
					t.Errorf("the log tells what the file of the options holds:\n%s", log)
				}
			}
		})
	}
}

// ss-server on two addresses has its plugin listen on both (SIP-7), and options alone
// make a configuration (SIP-4).
func TestShadowsocksTwoAddresses(t *testing.T) {
	curl := testpeer.Need(t, "curl")
	page, www := startNginx(t)
	sum := randomFile(t, filepath.Join(www, "down"), 1<<20)
	asPlugin(t)
	_, port, _ := net.SplitHostPort(freePort(t))
	server := startShadowsocks(t, "ss-server", net.JoinHostPort("127.0.0.1", port), `server;transport=websocket;path=/a\;b`, "-s", "::1")
	server.awaitPlugin(t, 2)
	for _, host := range []string{"127.0.0.1", "::1"} {
		front := freePort(t)
		_, frontPort, _ := net.SplitHostPort(front)
		client := startShadowsocks(t, "ss-local", net.JoinHostPort(host, port), `transport=websocket;url=ws://there.invalid/a\;b`, "-b", "127.0.0.1", "-l", frontPort)
		client.awaitPlugin(t, 1)
		fetched := filepath.Join(t.TempDir(), "fetched")
		run(t, exec.CommandContext(t.Context(), curl, "-sS", "--fail", "-m", "60", "--socks5-hostname", front, "-o", fetched, "http://"+page+"/down"))
		if checksum(t, fetched) != sum {
			t.Errorf("%s: another file came", host)
		}
	}
}

// Shadowsocks that becomes another user after it has started its plugin is let in by it
// (SIP-5), though it cannot end it.
func TestShadowsocksBecomesAnotherUser(t *testing.T) {
	if os.Getuid() != 0 {
		testpeer.Skip(t, "needs two users: run as root")
	}
	curl := testpeer.Need(t, "curl")
	page, www := startNginx(t)
	sum := randomFile(t, filepath.Join(www, "down"), 1<<20)
	mark := asPlugin(t)
	server := freePort(t)
	front := freePort(t)
	_, frontPort, _ := net.SplitHostPort(front)
	serving := startShadowsocks(t, "ss-server", server, "server;transport=websocket;path=/p")
	client := startShadowsocks(t, "ss-local", server, "transport=websocket;url=ws://x/p", "-a", "nobody", "-b", "127.0.0.1", "-l", frontPort)
	serving.awaitPlugin(t, 1)
	client.awaitPlugin(t, 1)
	fetched := filepath.Join(t.TempDir(), "fetched")
	run(t, exec.CommandContext(t.Context(), curl, "-sS", "--fail", "-m", "60", "--socks5-hostname", front, "-o", fetched, "http://"+page+"/down"))
	if checksum(t, fetched) != sum {
		t.Error("another file came")
	}
	for _, path := range descendants(t, mark) {
		status, err := os.ReadFile(filepath.Join(path, "status"))
		if err == nil && strings.Contains(string(status), "PPid:\t"+strconv.Itoa(client.cmd.Process.Pid)+"\n") {
			pid, err := strconv.Atoi(filepath.Base(path))
			if err != nil {
				t.Fatal(err)
			}
			kill(t, pid)
		}
	}
}

// A plugin that cannot start, or whose transport ends, tells why and ends Shadowsocks
// (SIP-8); and it does not tell secrets (SIP-9).
func TestShadowsocksPluginFails(t *testing.T) {
	asPlugin(t)
	for options, want := range map[string]string{
		"transport=websocket;url=ws://x/p;nonsense":   "/nonsense: is not a key here",
		"transport=websocket;url=wss://x/p;pin=short": "/pin",
		"exec=no-such-transport":                      "no-such-transport",
		"exec=false;plain":                            "exit code 1",
		"transport=websocket;token=hunter2":           "/token: is not a key here",
	} {
		client := startShadowsocks(t, "ss-local", "127.0.0.1:1", options, "-b", "127.0.0.1", "-l", "0")
		if err := client.wait(t); err == nil {
			t.Errorf("%s: success", options)
		}
		if out := client.out.String(); !strings.Contains(out, want) || strings.Contains(out, "hunter2") {
			t.Errorf("%s: no %q in\n%s", options, want, out)
		}
	}
}

// When the transport of a plugin ends for good, the plugin and Shadowsocks end (SIP-8).
func TestShadowsocksTransportEnds(t *testing.T) {
	mark := asPlugin(t)
	// A configuration that was right when it was read, and is not any more.
	path := filepath.Join(t.TempDir(), "pt-ends")
	if err := os.WriteFile(path, []byte("#!/bin/sh\nptipc transport websocket \"$@\"\nexit 78\n"), 0o755); err != nil { //nolint:gosec // it is executed
		t.Fatal(err)
	}
	client := startShadowsocks(t, "ss-local", "127.0.0.1:1", "exec="+path+";no-sandbox;url=ws://x/p", "-b", "127.0.0.1", "-l", "0")
	client.awaitPlugin(t, 1)
	for _, path := range descendants(t, mark) {
		command, err := os.ReadFile(filepath.Join(path, "cmdline"))
		if err == nil && strings.HasPrefix(string(command), "ptipc\x00transport\x00websocket\x00") {
			pid, err := strconv.Atoi(filepath.Base(path))
			if err != nil {
				t.Fatal(err)
			}
			kill(t, pid)
		}
	}
	if err := client.wait(t); err == nil || !strings.Contains(client.out.String(), "ended for good") {
		t.Errorf("%v\n%s", err, client.out)
	}
	eventually(t, "the end of all processes", func() bool { return len(descendants(t, mark)) == 0 })
}

// Another user of the machine is refused where the plugin listens for Shadowsocks (SIP-5).
func TestPluginRefusesOtherUsers(t *testing.T) {
	if os.Getuid() != 0 {
		testpeer.Skip(t, "needs two users: run as root")
	}
	page := serve(t, func(conn *net.TCPConn) {
		_, _ = conn.Write([]byte("HTTP/1.0 200 OK\r\nContent-Length: 5\r\n\r\nhello"))
	})
	curl := testpeer.Need(t, "curl")
	host, port, _ := net.SplitHostPort(page)
	front := freePort(t)
	_, frontPort, _ := net.SplitHostPort(front)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	plugin := toolCommand(ctx, t)
	plugin.Env = append(plugin.Env, "SS_REMOTE_HOST="+host, "SS_REMOTE_PORT="+port, "SS_LOCAL_HOST=localhost", "SS_LOCAL_PORT="+frontPort, "SS_PLUGIN_OPTIONS=transport=direct")
	plugin.Cancel = func() error { return plugin.Process.Signal(syscall.SIGTERM) }
	startPeer(t, front, plugin)
	fetch := exec.CommandContext(t.Context(), curl, "-sS", "-m", "30", "http://"+front+"/")
	if out := run(t, fetch); out != "hello" {
		t.Errorf("%q", out)
	}
	other := exec.CommandContext(t.Context(), curl, "-sS", "-m", "30", "http://"+front+"/")
	other.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	if out, err := other.CombinedOutput(); err == nil || strings.Contains(string(out), "hello") {
		t.Errorf("another user got %q", out)
	}
}

// Plugins of Debian in HOST.json, as the carrier of a free server: curl fetches 20 MB
// through a SOCKS5 front, free, the plugin's client and its server.
func TestPluginsInHost(t *testing.T) {
	curl := testpeer.Need(t, "curl")
	testpeer.Need(t, "obfs-local")
	page, www := startNginx(t)
	sum := randomFile(t, filepath.Join(www, "down"), 20<<20)
	wire := freePort(t)
	server := startTool(t, writeConfig(t, map[string]any{"transports": map[string]any{"obfs": map[string]any{
		"exec": "obfs-server", "dialect": "sip003", "role": "server", "via": []string{"free"}, "egress": map[string]any{"allow": []string{page}},
		"config": map[string]any{"remote": wire, "options": map[string]any{"obfs": "tls"}},
	}}}))
	client := startTool(t, writeConfig(t, map[string]any{
		"transports": map[string]any{"obfs": map[string]any{
			"exec": "obfs-local", "dialect": "sip003",
			"config": map[string]any{"remote": wire, "options": map[string]any{"obfs": "tls", "obfs-host": "x.invalid"}},
		}},
		"fronts": []any{map[string]any{"listen": "tcp://127.0.0.1:0", "serve": "socks5", "via": []string{"free", "obfs"}}},
	}))
	fetched := filepath.Join(t.TempDir(), "fetched")
	run(t, exec.CommandContext(t.Context(), curl, "-sS", "--fail", "-m", "60", "--socks5-hostname", client.front, "-o", fetched, "http://"+page+"/down"))
	if checksum(t, fetched) != sum {
		t.Error("another file came")
	}
	for _, r := range []*tool{client, server} {
		if err := r.stop(t); err != nil {
			t.Errorf("%v\n%s", err, r.out)
		}
	}
}
