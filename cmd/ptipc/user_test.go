//go:build unix

package main

import (
	"bufio"
	"errors"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"pthost/ptipc/testpeer"
)

// nobody is a user of the machine that is not the one of the tests.
const nobody = 65534

// Another user of the machine is refused at a front, on TCP and on a unix socket.
func TestOtherUsersAreRefused(t *testing.T) {
	curl := testpeer.Need(t, "curl")
	if os.Getuid() != 0 {
		testpeer.Skip(t, "only root can be another user; run the tests as root")
	}
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	page := serve(t, func(conn *net.TCPConn) {
		_, _ = bufio.NewReader(conn).ReadString('\n')
		_, _ = io.WriteString(conn, "HTTP/1.0 200 OK\r\nContent-Length: 5\r\n\r\nhello")
	})
	socket := filepath.Join(dir, "front.sock")
	r := startTool(t, writeConfig(t, map[string]any{
		"transports": map[string]any{"direct": map[string]any{"exec": "builtin:direct"}},
		"fronts": []any{
			map[string]any{"listen": "tcp://127.0.0.1:0", "serve": "socks5", "transport": "direct"},
			map[string]any{"listen": "unix://" + socket, "serve": "socks5", "transport": "direct"},
		},
	}))
	// The permissions of files are not all that keeps others out of a unix socket: here
	// is a way to it that they leave open.
	public := filepath.Join(t.TempDir(), "front.sock")
	if err := errors.Join(os.Link(socket, public), os.Chmod(public, 0o777)); err != nil { //nolint:gosec // see above
		t.Fatal(err)
	}
	for dir := filepath.Dir(public); dir != filepath.Clean(os.TempDir()) && dir != "/"; dir = filepath.Dir(dir) {
		if err := os.Chmod(dir, 0o755); err != nil { //nolint:gosec // see above
			t.Fatal(err)
		}
	}
	for name, proxy := range map[string]string{"tcp": "socks5h://" + r.front, "unix": "socks5h://localhost" + public} {
		fetch := func(uid uint32) (string, error) {
			cmd := exec.CommandContext(t.Context(), curl, "-sS", "-m", "20", "-x", proxy, "http://"+page+"/")
			cmd.Dir = "/"
			cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
			out, err := cmd.CombinedOutput()
			return string(out), err
		}
		if out, err := fetch(0); err != nil || !strings.HasSuffix(out, "hello") {
			t.Fatalf("%s: our own curl: %v\n%s", name, err, out)
		}
		if out, err := fetch(nobody); err == nil || strings.Contains(out, "hello") || strings.Contains(out, "denied") {
			t.Errorf("%s: another user's curl got in, or not even to the front: %v\n%s", name, err, out)
		}
	}
}
