package relay

import (
	"bufio"
	"context"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"go.uber.org/goleak"
)

// roleEnv makes the test binary a process of its own: see roles.
const roleEnv = "RELAY_TEST_ROLE"

func TestMain(m *testing.M) {
	if role := os.Getenv(roleEnv); role != "" {
		os.Exit(playRole(role))
	}
	flag.Parse()
	if flag.Lookup("test.bench").Value.String() != "" && beforeBenchmarks != nil {
		if code, done := beforeBenchmarks(); done {
			os.Exit(code)
		}
	}
	goleak.VerifyTestMain(m)
}

// beforeBenchmarks may run the benchmarks in a better place instead.
var beforeBenchmarks func() (code int, done bool)

// roles are what the test binary can be instead. Each listens on the network
// that is its first argument, and ends with its standard input.
var roles = map[string]func(l net.Listener, args []string){
	"sink":   serveEach(drainConn),
	"echo":   serveEach(echoConn),
	"join":   serveRelay(func(a, b net.Conn) { _ = Join(context.Background(), a, b) }),
	"copy":   serveRelay(func(a, b net.Conn) { _ = joinConns(context.Background(), a, b) }),
	"iocopy": serveRelay(joinByIOCopy),
}

func playRole(role string) int {
	args := strings.Fields(role)
	l, err := listen(args[1], os.Getenv(roleEnv+"_DIR"))
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	fmt.Println(l.Addr().String())
	go roles[args[0]](l, args[2:])
	_, _ = io.Copy(io.Discard, os.Stdin)
	return 0
}

func listen(network, dir string) (net.Listener, error) {
	if network == "unix" {
		f, err := os.CreateTemp(dir, "s")
		if err != nil {
			return nil, err
		}
		f.Close()
		os.Remove(f.Name())
		return net.Listen("unix", filepath.Clean(f.Name()))
	}
	return net.Listen("tcp", "127.0.0.1:0")
}

// A process is the test binary in a role, or a program that is compared with it.
type process struct {
	network, addr string
	cmd           *exec.Cmd
}

func startRole(tb testing.TB, role, network string, args ...string) *process {
	tb.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(),
		roleEnv+"="+strings.Join(append([]string{role, network}, args...), " "),
		roleEnv+"_DIR="+tb.TempDir())
	cmd.Stderr = os.Stderr
	stdin, err := cmd.StdinPipe()
	if err != nil {
		tb.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		tb.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		stdin.Close()
		_ = cmd.Wait()
	})
	line, err := bufio.NewReader(stdout).ReadString('\n')
	if err != nil {
		tb.Fatalf("%s did not start: %v", role, err)
	}
	return &process{network: network, addr: strings.TrimSpace(line), cmd: cmd}
}

func serveEach(serve func(net.Conn)) func(net.Listener, []string) {
	return func(l net.Listener, _ []string) {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				serve(c)
			}()
		}
	}
}

func serveRelay(relay func(a, b net.Conn)) func(net.Listener, []string) {
	return func(l net.Listener, args []string) {
		for {
			a, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				b, err := net.Dial(args[0], args[1])
				if err != nil {
					a.Close()
					return
				}
				relay(a, b)
			}()
		}
	}
}

func joinByIOCopy(a, b net.Conn) {
	done := make(chan struct{})
	half := func(dst, src net.Conn) {
		_, _ = io.Copy(dst, src)
		_ = dst.(closeWriter).CloseWrite()
	}
	go func() {
		half(a, b)
		close(done)
	}()
	half(b, a)
	<-done
	a.Close()
	b.Close()
}

func drainConn(c net.Conn) {
	b := make([]byte, 256<<10)
	for {
		if _, err := c.Read(b); err != nil {
			return
		}
	}
}

func echoConn(c net.Conn) {
	var b [1]byte
	for {
		if _, err := c.Read(b[:]); err != nil {
			return
		}
		if _, err := c.Write(b[:]); err != nil {
			return
		}
	}
}
