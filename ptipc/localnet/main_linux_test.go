package localnet

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"go.uber.org/goleak"
)

// roleVar makes the test binary play one role in another process.
const roleVar = "LOCALNET_TEST_ROLE"

// otherUID is nobody in particular, and not the user who runs the tests.
const otherUID = 65534

func TestMain(m *testing.M) {
	if role := os.Getenv(roleVar); role != "" {
		if err := play(role, os.Args[1], os.Args[2]); err != nil {
			fmt.Println("error:", err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	goleak.VerifyTestMain(m)
}

// play does what its role says, prints one line, and ends with stdin.
func play(role, a, b string) error {
	switch role {
	case "dial":
		c, err := net.Dial(a, b)
		if err != nil {
			return err
		}
		defer c.Close()
		fmt.Println("ok")
	case "dial-and-leave": // connect, send, close at once
		c, err := net.Dial(a, b)
		if err != nil {
			return err
		}
		if _, err := c.Write([]byte("secrets")); err != nil {
			return err
		}
		if err := c.Close(); err != nil {
			return err
		}
		fmt.Println("ok")
	case "dir-dial":
		d, err := OpenDir(a)
		if err != nil {
			return err
		}
		defer d.Close()
		c, err := d.Dial(context.Background(), b)
		if err != nil {
			return err
		}
		defer c.Close()
		fmt.Println("ok")
	case "lock":
		d, err := OpenDir(a)
		if err != nil {
			return err
		}
		if err := d.Lock(); err != nil {
			return err
		}
		fmt.Println("ok")
	case "datagrams": // say a word to b from one address of each kind, and hold one at a
		held, err := net.ListenPacket("udp", a)
		if err != nil {
			return err
		}
		defer held.Close()
		c, err := net.Dial("udp", b)
		if err != nil {
			return err
		}
		defer c.Close()
		if _, err := c.Write([]byte("connected")); err != nil {
			return err
		}
		if _, err := held.WriteTo([]byte("held"), c.RemoteAddr()); err != nil {
			return err
		}
		fmt.Println(held.LocalAddr())
	case "listen":
		l, err := net.Listen(a, b)
		if err != nil {
			return err
		}
		defer l.Close()
		fmt.Println(l.Addr())
	case "ask": // who owns the listener at a: the process b?
		pid, err := strconv.Atoi(b)
		if err != nil {
			return err
		}
		c, err := net.Dial("tcp", a)
		if err != nil {
			return err
		}
		defer c.Close()
		switch err := ListenerOwnedBy(c, []int{pid}); {
		case err == nil:
			fmt.Println("ok")
		case errors.Is(err, ErrForeignListener):
			fmt.Println("error: foreign")
		default:
			return err
		}
	default:
		return errors.New("unknown role")
	}
	_, err := io.Copy(io.Discard, os.Stdin)
	return err
}

// A player is another process.
type player struct {
	cmd   *exec.Cmd
	line  string // what it printed
	stdin io.Closer
}

// start runs a role in another process, and as another user if uid is not 0.
// Between fork and exec the new process holds every descriptor of this one, so a
// test that needs a socket to be closed for good must not be parallel to others.
func start(t *testing.T, uid uint32, role string, args ...string) *player {
	t.Helper()
	cmd := exec.Command("/proc/self/exe", args...)
	// The race detector makes every process sleep for a second when it ends.
	cmd.Env = append(os.Environ(), roleVar+"="+role, "GORACE=atexit_sleep_ms=0")
	if uid != 0 {
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
	}
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	p := &player{cmd: cmd, stdin: stdin}
	t.Cleanup(p.stop)
	line, err := bufio.NewReader(stdout).ReadString('\n')
	if err != nil {
		t.Fatalf("the other process said %q: %v", line, err)
	}
	p.line = strings.TrimSpace(line)
	return p
}

// stop ends the process and waits for it.
func (p *player) stop() {
	p.stdin.Close()
	_ = p.cmd.Wait()
}

// needRoot skips a test that needs to act as two users.
func needRoot(t *testing.T) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs two users: run as root")
	}
}

// publicDir is a directory that other users may enter, too.
func publicDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "localnet") //nolint:usetesting // other users cannot enter t.TempDir
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	return dir
}

// privateDir is the path of a directory as OpenDir wants it.
func privateDir(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "d")
	if err := os.Mkdir(path, 0o700); err != nil {
		t.Fatal(err)
	}
	return path
}

func openDir(t *testing.T, path string) *Dir {
	t.Helper()
	d, err := OpenDir(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() })
	return d
}

// pair is a connection through l from both ends, dialed by dial, which the
// kernel completes before it is accepted.
func pair(t *testing.T, l net.Listener, dial func() (net.Conn, error)) (client, server net.Conn) {
	t.Helper()
	client, err := dial()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Close() })
	if server, err = l.Accept(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { server.Close() })
	return client, server
}

// descriptors is how many this process has open.
func descriptors(t *testing.T) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}
