package control

import (
	"bufio"
	"errors"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"pthost/ptipc/testpeer"
)

// Any HTTP client of the same user gets in, and no process of another one, not even
// when the modes of directory and socket would let it.
func TestStranger(t *testing.T) {
	curl := testpeer.Need(t, "curl")
	if os.Getuid() != 0 {
		t.Skip("only root can be another user; run the tests as root")
	}
	dir := privateDir(t)
	path := filepath.Join(dir, "c.sock")
	host := newFake()
	read, write := io.Pipe()
	defer write.Close()
	logged := bufio.NewReader(read)
	l, err := Listen(path, slog.New(slog.NewTextHandler(write, &slog.HandlerOptions{Level: slog.LevelDebug})))
	if err != nil {
		t.Fatal(err)
	}
	s := Serve(l, Handler(host), discard)
	defer s.Close()
	ask := func(cred *syscall.Credential) (string, error) {
		cmd := exec.CommandContext(t.Context(), curl, "-s", "-X", "POST", "--max-time", "20", "--unix-socket", path, "http://ptipc/v1/stop")
		cmd.Dir = "/"
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: cred}
		out, err := cmd.Output()
		return string(out), err
	}
	for parent := dir; parent != filepath.Dir(os.TempDir()) && parent != "/"; parent = filepath.Dir(parent) {
		if info, err := os.Stat(parent); err == nil && info.Mode().Perm()&0o011 != 0o011 {
			if err := os.Chmod(parent, info.Mode()|0o055); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := os.Chmod(path, 0o666); err != nil {
		t.Fatal(err)
	}
	out, err := ask(&syscall.Credential{Uid: 65534, Gid: 65534})
	var exit *exec.ExitError
	if !errors.As(err, &exit) || out != "" {
		t.Errorf("nobody: %q %v", out, err)
	}
	// It did get as far as the guard, which says so.
	if line, err := logged.ReadString('\n'); err != nil || !strings.Contains(line, "65534") {
		t.Errorf("logged: %q %v", line, err)
	}
	select {
	case <-host.stopped:
		t.Error("another user has stopped the host")
	default:
	}
	if out, err := ask(nil); err != nil || strings.TrimSpace(out) != "{}" {
		t.Errorf("root: %q %v", out, err)
	}
	<-host.stopped
}

func TestNoDescriptorLeft(t *testing.T) {
	path := filepath.Join(privateDir(t), "c.sock")
	round := func() {
		l, err := Listen(path, discard)
		if err != nil {
			t.Fatal(err)
		}
		s := Serve(l, Handler(newFake()), discard)
		c := NewClient(path)
		for range 10 {
			if _, err := c.Status(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := Listen(path, discard); !errors.Is(err, syscall.EADDRINUSE) {
			t.Fatal(err)
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
	}
	round()
	before := descriptors(t)
	for range 5 {
		round()
	}
	// The HTTP client closes its connections a moment after the answer.
	for deadline := time.Now().Add(20 * time.Second); descriptors(t) > before; {
		if time.Now().After(deadline) {
			t.Fatalf("%d descriptors, %d before", descriptors(t), before)
		}
	}
}

func descriptors(t *testing.T) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}
