package pt1_test

import (
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"

	"pthost/ptipc"
	"pthost/ptipc/testpeer"
)

// inNamespace says that the test binary runs in a network namespace of its own.
const inNamespace = "PT1_TEST_IN_NAMESPACE"

func init() {
	// A transport that says that it goes through the proxy, and does not.
	roles["liar"] = func([]string) int {
		return managed("VERSION 1\nPROXY DONE\n", "", method, func(conn net.Conn) {
			serveDirect(conn, func(dest string) (net.Conn, error) { return net.Dial("tcp", dest) })
		})
	}
}

// serveDirect is the client of a transport that does nothing to the bytes.
func serveDirect(conn net.Conn, dial func(string) (net.Conn, error)) {
	b := make([]byte, 1024)
	if _, err := conn.Read(b); err != nil {
		return
	}
	_, _ = conn.Write([]byte{5, 0})
	n, err := conn.Read(b)
	if err != nil || n != 10 {
		return
	}
	far, err := dial(net.JoinHostPort(net.IP(b[4:8]).String(), strconv.Itoa(int(b[8])<<8|int(b[9]))))
	if err != nil {
		_, _ = conn.Write([]byte{5, 5, 0, 1, 0, 0, 0, 0, 0, 0})
		return
	}
	defer far.Close()
	_, _ = conn.Write([]byte{5, 0, 0, 1, 0, 0, 0, 0, 0, 0})
	go func() { _, _ = io.Copy(far, conn) }()
	_, _ = io.Copy(conn, far)
}

// The way out that a host gives is the only one that a transport takes, or it is caught:
// in a network namespace where everything that leaves the loopback's own addresses is
// counted, obfs4proxy leaves nothing, and one that says PROXY DONE and dials directly
// is seen to (PT1-7).
func TestWayOut(t *testing.T) {
	if os.Getenv(inNamespace) == "" {
		ip, nft := testpeer.Need(t, "ip"), testpeer.Need(t, "nft")
		testpeer.Need(t, "obfs4proxy")
		cmd := exec.CommandContext(within(t), os.Args[0], "-test.run=^TestWayOut$", "-test.v")
		cmd.Env = append(os.Environ(), inNamespace+"="+ip+":"+nft)
		cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET}
		if os.Getuid() != 0 {
			cmd.SysProcAttr.Cloneflags |= syscall.CLONE_NEWUSER
			cmd.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: 1}}
		}
		out, err := cmd.CombinedOutput()
		if err != nil && cmd.Process == nil {
			testpeer.Skip(t, "a network namespace is not allowed here: "+err.Error())
		}
		if err != nil || !strings.Contains(string(out), "--- PASS: TestWayOut") {
			t.Errorf("in the namespace: %v\n%s", err, out)
		}
		return
	}
	ip, nft, _ := strings.Cut(os.Getenv(inNamespace), ":")
	run := func(args ...string) string {
		t.Helper()
		out, err := exec.CommandContext(within(t), args[0], args[1:]...).CombinedOutput()
		if err != nil {
			t.Fatalf("%v: %v\n%s", args, err, out)
		}
		return string(out)
	}
	run(ip, "link", "set", "lo", "up")
	// The world outside is here too, so that what is sent to it arrives and is counted.
	run(ip, "route", "add", "local", "203.0.113.0/24", "dev", "lo")
	run(nft, "add", "table", "inet", "leak")
	run(nft, "add", "chain", "inet", "leak", "out", "{ type filter hook output priority 0; }")
	run(nft, "add", "rule", "inet", "leak", "out", "ip", "daddr", "!=", "127.0.0.0/8", "counter")
	leaked := func() bool { return !strings.Contains(run(nft, "list", "table", "inet", "leak"), "counter packets 0 ") }

	p := newPage(t, 100_000)
	client := obfs4(t, p.serve)
	open4 := func(t *testing.T, path string, config ptipc.Opaque, dials *atomic.Int32) *ptipc.Transport {
		command := self("liar")
		if path != "" {
			command.Path, command.Args = path, nil
		}
		return open(t, command, string(config), ptipc.Env{DialOut: func(ctx context.Context, network, addr string) (net.Conn, error) {
			dials.Add(1)
			_, port, err := net.SplitHostPort(addr)
			if err != nil {
				return nil, err
			}
			var d net.Dialer
			return d.DialContext(ctx, network, "127.0.0.1:"+port) // the way out leads there
		}})
	}
	// The same server, by its address in the world outside.
	outside := ptipc.Opaque(strings.Replace(string(client), `"127.0.0.1"`, `"203.0.113.5"`, 1))
	var dials atomic.Int32
	curl(t, p, forward(t, open4(t, testpeer.Need(t, "obfs4proxy"), outside, &dials).Connections["obfs4"]))
	if dials.Load() == 0 || leaked() {
		t.Errorf("obfs4proxy went out %d times by the way that it was given, and leaked: %v", dials.Load(), leaked())
	}

	listener, err := net.Listen("tcp", "203.0.113.5:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	dials.Store(0)
	config := fmt.Sprintf(`{"transports":{"x":{"host":"203.0.113.5","port":%d}}}`, listener.Addr().(*net.TCPAddr).Port)
	dial(t, open4(t, "", ptipc.Opaque(config), &dials).Connections["x"], "", "")
	if dials.Load() != 0 || !leaked() {
		t.Errorf("the liar went out %d times by the way that it was given, and was not caught: %v", dials.Load(), !leaked())
	}
}
