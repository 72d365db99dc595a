package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"pthost/ptipc/testpeer"
)

const bulk = 100 << 20

// randomFile writes random bytes and returns their checksum.
func randomFile(t *testing.T, path string, size int64) string {
	t.Helper()
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	sum := sha256.New()
	if _, err := io.CopyN(io.MultiWriter(f, sum), rand.Reader, size); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	return hex.EncodeToString(sum.Sum(nil))
}

func checksum(t *testing.T, path string) string {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	sum := sha256.New()
	if _, err := io.Copy(sum, f); err != nil {
		t.Fatal(err)
	}
	return hex.EncodeToString(sum.Sum(nil))
}

// freePort returns a loopback address that was free a moment ago, for a program
// that cannot choose one by itself.
func freePort(t testing.TB) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

// startPeer runs a server program until the test ends and waits for its port.
func startPeer(t testing.TB, addr string, cmd *exec.Cmd) {
	t.Helper()
	out := new(lockedBuffer)
	cmd.Stdout, cmd.Stderr = out, out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	t.Cleanup(func() {
		_ = cmd.Process.Signal(syscall.SIGTERM) // it may have ended already
		select {
		case <-ended:
		case <-time.After(10 * time.Second):
			_ = cmd.Process.Kill()
			<-ended
		}
	})
	for deadline := time.Now().Add(20 * time.Second); ; {
		conn, err := net.Dial("tcp", addr)
		if err == nil {
			_ = conn.Close()
			return
		}
		select {
		case err := <-ended:
			ended <- err
			t.Fatalf("%s has ended: %v\n%s", cmd.Path, err, out)
		case <-time.After(10 * time.Millisecond):
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s does not listen on %s\n%s", cmd.Path, addr, out)
		}
	}
}

// startNginx serves www for GET and takes PUT below /up/.
func startNginx(t *testing.T) (addr, www string) {
	t.Helper()
	nginx := testpeer.Need(t, "nginx")
	dir := t.TempDir()
	www = filepath.Join(dir, "www")
	if err := os.MkdirAll(filepath.Join(www, "up"), 0o755); err != nil {
		t.Fatal(err)
	}
	addr = freePort(t)
	user := ""
	if os.Getuid() == 0 {
		user = "user root;" // the directory of the test belongs to root
	}
	config := fmt.Sprintf(`%s daemon off; worker_processes 1; pid %[2]s/pid; error_log %[2]s/error.log;
events { worker_connections 512; }
http {
	access_log off; client_max_body_size 0; client_body_temp_path %[2]s/body;
	proxy_temp_path %[2]s/p; fastcgi_temp_path %[2]s/f; uwsgi_temp_path %[2]s/u; scgi_temp_path %[2]s/s;
	server { listen %[3]s; root %[2]s/www; location /up/ { dav_methods PUT; } }
}`, user, dir, addr)
	path := filepath.Join(dir, "nginx.conf")
	if err := os.WriteFile(path, []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	startPeer(t, addr, exec.Command(nginx, "-c", path, "-p", dir, "-e", filepath.Join(dir, "error.log")))
	return addr, www
}

func run(t *testing.T, cmd *exec.Cmd) string {
	t.Helper()
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %v\n%s", cmd.Args, err, out)
	}
	return string(out)
}

// startDirect runs a SOCKS5 front before a child that changes nothing.
func startDirect(t *testing.T) *tool {
	t.Helper()
	return startTool(t, writeConfig(t, map[string]any{
		"transports": map[string]any{"direct": map[string]any{"exec": "builtin:direct"}},
		"fronts":     []any{map[string]any{"listen": "tcp://127.0.0.1:0", "serve": "socks5", "transport": "direct"}},
	}))
}

// curl fetches and uploads 100 MB at once from and to nginx, through a TCP front
// and a child on a unix socket, and through a unix front and a child on TCP.
func TestCurlAndNginx(t *testing.T) {
	curl := testpeer.Need(t, "curl")
	addr, www := startNginx(t)
	down := randomFile(t, filepath.Join(www, "down"), bulk)
	local := filepath.Join(t.TempDir(), "upload")
	up := randomFile(t, local, bulk)

	dir := t.TempDir()
	if err := os.Chmod(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	socket := filepath.Join(dir, "front.sock")
	r := startTool(t, writeConfig(t, map[string]any{
		"transports": map[string]any{
			"unix": map[string]any{"exec": "builtin:direct", "state": filepath.Join(dir, "state")},
			"tcp":  map[string]any{"exec": "builtin:direct", "plain": true},
		},
		"fronts": []any{
			map[string]any{"listen": "tcp://127.0.0.1:0", "serve": "socks5", "transport": "unix"},
			map[string]any{"listen": "unix://" + socket, "serve": "socks5", "transport": "tcp"},
		},
	}))
	for name, proxy := range map[string]string{"tcp": "socks5h://" + r.front, "unix": "socks5h://localhost" + socket} {
		t.Run(name, func(t *testing.T) {
			fetched := filepath.Join(t.TempDir(), "fetched")
			var both sync.WaitGroup
			both.Go(func() {
				cmd := exec.CommandContext(t.Context(), curl, "-sS", "--fail", "-m", "120", "-x", proxy, "-o", fetched, "http://"+addr+"/down")
				if out, err := cmd.CombinedOutput(); err != nil {
					t.Errorf("download: %v\n%s", err, out)
				}
			})
			both.Go(func() {
				cmd := exec.CommandContext(t.Context(), curl, "-sS", "--fail", "-m", "120", "-x", proxy, "-T", local, "http://"+addr+"/up/"+name)
				if out, err := cmd.CombinedOutput(); err != nil {
					t.Errorf("upload: %v\n%s", err, out)
				}
			})
			both.Wait()
			if t.Failed() {
				return
			}
			if checksum(t, fetched) != down {
				t.Error("the download is not what nginx has")
			}
			if checksum(t, filepath.Join(www, "up", name)) != up {
				t.Error("nginx has not got what was uploaded")
			}
		})
	}
}

// The reply of SOCKS tells programs why (ERR-1).
func TestCurlErrors(t *testing.T) {
	curl := testpeer.Need(t, "curl")
	r := startDirect(t)
	for dest, reply := range map[string]string{"127.0.0.1:1": "(5)", "no-such-name.invalid:80": "(4)"} {
		out, err := exec.CommandContext(t.Context(), curl, "-sS", "-m", "30", "--socks5-hostname", r.front, "http://"+dest+"/").CombinedOutput()
		if err == nil || !strings.Contains(string(out), reply) {
			t.Errorf("%s: %v\n%s", dest, err, out)
		}
	}
}

// ssh runs a command and scp copies, through nc as the proxy command, before one
// child and before a chain, and through ptipc dial.
func TestSSH(t *testing.T) {
	ssh, scp, sshd := testpeer.Need(t, "ssh"), testpeer.Need(t, "scp"), testpeer.Need(t, "sshd")
	keygen, nc := testpeer.Need(t, "ssh-keygen"), testpeer.Need(t, "nc.openbsd")
	dir := t.TempDir()
	for _, key := range []string{"host", "user"} {
		run(t, exec.CommandContext(t.Context(), keygen, "-q", "-t", "ed25519", "-N", "", "-f", filepath.Join(dir, key)))
	}
	if os.Getuid() == 0 {
		// sshd as root wants its privilege separation directory, which its service makes.
		if err := os.MkdirAll("/run/sshd", 0o755); err != nil {
			t.Fatal(err)
		}
	}
	addr := freePort(t)
	host, port, _ := net.SplitHostPort(addr)
	config := fmt.Sprintf(`ListenAddress %s
Port %s
HostKey %s/host
AuthorizedKeysFile %s/user.pub
PasswordAuthentication no
UsePAM no
StrictModes no
PidFile none
Subsystem sftp internal-sftp
`, host, port, dir, dir)
	if err := os.WriteFile(filepath.Join(dir, "sshd_config"), []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	startPeer(t, addr, exec.Command(sshd, "-D", "-e", "-f", filepath.Join(dir, "sshd_config")))
	r := startDirect(t)
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	sum := randomFile(t, filepath.Join(dir, "file"), 20<<20)
	for name, proxy := range map[string]string{
		"front": nc + " -X 5 -x " + r.front + " %h %p",
		"chain": nc + " -X 5 -x " + startChain(t, "mux", addr).client.front + " %h %p",
		"dial":  "env " + asTool + "=1 " + self + " dial builtin:direct {} %h:%p",
	} {
		t.Run(name, func(t *testing.T) {
			options := []string{
				"-F", "none", "-i", filepath.Join(dir, "user"), "-o", "ProxyCommand=" + proxy, "-o", "BatchMode=yes",
				"-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null", "-o", "LogLevel=ERROR",
			}
			command := append(append([]string{"-p", port}, options...), host, "echo $((6*7)); cat >/dev/null; echo done")
			cmd := exec.CommandContext(t.Context(), ssh, command...)
			cmd.Stdin = strings.NewReader("some input")
			if out := run(t, cmd); out != "42\ndone\n" {
				t.Errorf("ssh: %q", out)
			}
			copied := filepath.Join(t.TempDir(), "copy")
			run(t, exec.CommandContext(t.Context(), scp, append(append([]string{"-P", port}, options...), filepath.Join(dir, "file"), host+":"+copied)...))
			if checksum(t, copied) != sum {
				t.Error("scp made another file")
			}
		})
	}
}

// nc ends its direction and still gets the whole answer (SOCKS-15).
func TestNetcatHalfClose(t *testing.T) {
	nc := testpeer.Need(t, "nc.openbsd")
	answer := make([]byte, 8<<20)
	_, _ = rand.Read(answer) // never fails
	asked := make(chan string, 1)
	addr := serve(t, func(conn *net.TCPConn) {
		all, _ := io.ReadAll(conn) // until nc ends its direction
		asked <- string(all)
		_, _ = conn.Write(answer)
	})
	r := startDirect(t)
	host, port, _ := net.SplitHostPort(addr)
	cmd := exec.CommandContext(t.Context(), nc, "-N", "-w", "30", "-X", "5", "-x", r.front, host, port)
	cmd.Stdin = strings.NewReader("the question")
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	if got := <-asked; got != "the question" || !bytes.Equal(out, answer) {
		t.Errorf("asked %q, and %d of %d bytes of the answer came", got, len(out), len(answer))
	}
}

// Other SOCKS5 clients of Debian: python3-socks, with a name and with an address,
// and proxychains4.
func TestOtherClients(t *testing.T) {
	page := serve(t, func(conn *net.TCPConn) {
		_, _ = bufio.NewReader(conn).ReadString('\n')
		_, _ = io.WriteString(conn, "HTTP/1.0 200 OK\r\nContent-Length: 5\r\n\r\nhello")
	})
	r := startDirect(t)
	host, port, _ := net.SplitHostPort(r.front)
	_, pagePort, _ := net.SplitHostPort(page)

	t.Run("python3-socks", func(t *testing.T) {
		python := testpeer.NeedPython(t, "socks", "python3-socks")
		for _, name := range []string{"localhost", "127.0.0.1"} {
			out := run(t, exec.CommandContext(t.Context(), python, "-c", `
import socks, sys
s = socks.socksocket()
s.set_proxy(socks.SOCKS5, sys.argv[1], int(sys.argv[2]), rdns=True)
s.settimeout(30)
s.connect((sys.argv[3], int(sys.argv[4])))
s.sendall(b"GET / HTTP/1.0\r\n\r\n")
print(s.makefile("rb").read().decode())`, host, port, name, pagePort))
			if !strings.HasSuffix(strings.TrimSpace(out), "hello") {
				t.Errorf("%s: %q", name, out)
			}
		}
	})
	t.Run("proxychains4", func(t *testing.T) {
		proxychains, curl := testpeer.Need(t, "proxychains4"), testpeer.Need(t, "curl")
		config := filepath.Join(t.TempDir(), "proxychains.conf")
		if err := os.WriteFile(config, []byte("strict_chain\nproxy_dns\n[ProxyList]\nsocks5 "+host+" "+port+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		cmd := exec.CommandContext(t.Context(), proxychains, "-q", "-f", config, curl, "-sS", "-m", "30", "http://localhost:"+pagePort+"/")
		cmd.Env = append(os.Environ(), "no_proxy=", "http_proxy=")
		if out := run(t, cmd); !strings.HasSuffix(out, "hello") {
			t.Errorf("%q", out)
		}
	})
}

// A child that runs already is attached to by its address, and a front forwards
// to one place.
func TestAttachAndForward(t *testing.T) {
	curl := testpeer.Need(t, "curl")
	page := serve(t, func(conn *net.TCPConn) {
		_, _ = bufio.NewReader(conn).ReadString('\n')
		_, _ = io.WriteString(conn, "HTTP/1.0 200 OK\r\nContent-Length: 5\r\n\r\nhello")
	})
	child := toolCommand(context.Background(), t, "transport", "direct", "{}")
	stdin, err := child.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := child.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := child.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		_ = stdin.Close() // asks it to finish
		if err := child.Wait(); err != nil {
			t.Errorf("the child ended with %v", err)
		}
	}()
	address := ""
	for lines := bufio.NewScanner(stdout); address == "" && lines.Scan(); {
		if words := strings.Fields(lines.Text()); words[0] == "CMETHOD" {
			address = words[3]
		}
	}
	r := startTool(t, writeConfig(t, map[string]any{
		"transports": map[string]any{"mine": map[string]any{"attach": map[string]string{"direct": address}}},
		"fronts":     []any{map[string]any{"listen": "tcp://127.0.0.1:0", "serve": "forward", "transport": "mine", "dest": page}},
	}))
	if out := run(t, exec.CommandContext(t.Context(), curl, "-sS", "-m", "30", "http://"+r.front+"/")); out != "hello" {
		t.Errorf("%q", out)
	}
	if err := r.stop(t); err != nil {
		t.Errorf("%v\n%s", err, r.out)
	}
}

// A front lives through the restart of its child, and the child of the other
// language behaves like any other.
func TestFrontOutlivesItsChild(t *testing.T) {
	python, curl := testpeer.Need(t, "python3"), testpeer.Need(t, "curl")
	// It may be a script that looks for one of several, in places that no sandbox knows.
	found := strings.Fields(run(t, exec.CommandContext(t.Context(), python, "-c", "import sys; print(sys.executable, sys.base_prefix)")))
	page := serve(t, func(conn *net.TCPConn) {
		_, _ = bufio.NewReader(conn).ReadString('\n')
		_, _ = io.WriteString(conn, "HTTP/1.0 200 OK\r\nContent-Length: 5\r\n\r\nhello")
	})
	script, err := filepath.Abs("../../testdata/children/rawchild.py")
	if err != nil {
		t.Fatal(err)
	}
	r := startTool(t, writeConfig(t, map[string]any{
		"transports": map[string]any{"raw": map[string]any{
			"exec": found[0], "args": []string{script}, "plain": true, "sandbox": map[string]any{"read": found[1:]},
			"restart": map[string]any{"min": "10ms", "max": "1s"},
		}},
		"fronts": []any{map[string]any{"listen": "tcp://127.0.0.1:0", "serve": "socks5", "transport": "raw"}},
	}))
	fetch := func() {
		t.Helper()
		out := run(t, exec.CommandContext(t.Context(), curl, "-sS", "-m", "60", "--socks5-hostname", r.front, "http://"+page+"/"))
		if !strings.HasSuffix(out, "hello") {
			t.Errorf("%q", out)
		}
	}
	fetch()
	for range 3 {
		kill(t, lastPid(r.out.String()))
		fetch()
	}
	if n := strings.Count(r.out.String(), "child is restarted"); n < 3 {
		t.Errorf("%d restarts were logged\n%s", n, r.out)
	}
}

// lastPid is the child that was last said to be ready.
func lastPid(log string) int {
	var pid int
	for line := range strings.Lines(log) {
		if _, after, ok := strings.Cut(line, "child ready"); ok {
			_, number, _ := strings.Cut(after, "pid=")
			_, _ = fmt.Sscan(number, &pid)
		}
	}
	return pid
}
