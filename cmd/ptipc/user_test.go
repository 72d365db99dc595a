//go:build unix

package main

import (
	"bufio"
	"io"
	"net"
	"os"
	"os/exec"
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
	r := startDirect(t)
	fetch := func(uid uint32) ([]byte, error) {
		cmd := exec.CommandContext(t.Context(), curl, "-sS", "-m", "20", "--socks5-hostname", r.front, "http://"+page+"/")
		cmd.Dir = "/"
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
		return cmd.CombinedOutput()
	}
	if out, err := fetch(0); err != nil || !strings.HasSuffix(string(out), "hello") {
		t.Fatalf("our own curl: %v\n%s", err, out)
	}
	if out, err := fetch(nobody); err == nil || strings.Contains(string(out), "hello") {
		t.Errorf("another user's curl got in: %v\n%s", err, out)
	}
}
