package pt1_test

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"pthost/adapters/pt1"
	"pthost/adapters/pt1/wire"
	"pthost/ptipc"
	"pthost/ptipc/host"
	"pthost/ptipc/testpeer"
)

func init() {
	// A server that brings connections as its line of standard input says, and tells
	// where it may bring them.
	roles["server"] = func(args []string) int {
		fmt.Printf("VERSION 1\nSMETHOD x 0.0.0.0:4444 ARGS:k=v,or=%s\nSMETHODS DONE\n", os.Getenv("TOR_PT_ORPORT"))
		cookie, err := wire.ReadCookie(os.Getenv("TOR_PT_AUTH_COOKIE_FILE"))
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		bring := func(port string) net.Conn {
			conn, err := net.Dial("tcp", os.Getenv("TOR_PT_"+port))
			if err != nil {
				panic(err)
			}
			return conn
		}
		var conns []net.Conn
		for _, what := range args {
			conn := bring("EXTENDED_SERVER_PORT")
			conns = append(conns, conn)
			switch what {
			case "silent":
			case "forged":
				fmt.Printf("LOG SEVERITY=notice MESSAGE=\"forged: %v\"\n", wire.ConnectExtended(conn, wire.Cookie{1}, wire.Client{Addr: "192.0.2.66:6"}))
			case "plain":
				conn.Close()
				conn = bring("ORPORT")
				conns = append(conns, conn)
				fmt.Fprint(conn, "plain")
			default:
				if err := wire.ConnectExtended(conn, cookie, wire.Client{Addr: what, Transport: "x"}); err != nil {
					panic(err)
				}
				fmt.Fprint(conn, what)
			}
		}
		wait()
		for _, conn := range conns {
			conn.Close()
		}
		return 0
	}
	// Another user's program, which connects and says what became of it.
	roles["stranger"] = func(args []string) int {
		conn, err := net.Dial("tcp", args[0])
		if err == nil {
			_, err = conn.Read(make([]byte, 1))
		}
		fmt.Print(err)
		return 0
	}
}

const serverConfig = `{"transports":{"x":{"listen":"127.0.0.1:0","options":{"k":"v"}}}}`

func listen(t *testing.T, state string, env ptipc.Env, bring ...string) ptipc.Listener {
	t.Helper()
	env.Local = state
	listener, err := self("server", bring...).Server().Listen(within(t), ptipc.Opaque(serverConfig), env)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { listener.Close() })
	return listener
}

// Connections come with their clients' addresses, in whatever order: one that stays
// silent holds nobody up, one that has no cookie is refused, and of one on the plain
// ORPort nothing is claimed (PT1-10, PT1-11, PT1-12).
func TestDeliveries(t *testing.T) {
	state := stateDir(t)
	var j journal
	listener := listen(t, state, j.env(), "silent", "forged", "192.0.2.77:5", "plain", "[2001:db8::7]:9", "no address")
	if listener.Addr().String() != "0.0.0.0:4444" {
		t.Errorf("the wire listens at %v", listener.Addr())
	}
	if !j.has("listens=0.0.0.0:4444 k=v") { // PT1-13
		t.Error("what the clients need was not told")
	}
	info, err := os.Stat(filepath.Join(state, "extended_orport_auth_cookie"))
	if err != nil || info.Mode() != 0o600 {
		t.Errorf("the cookie: %v, error %v", info.Mode(), err)
	}
	got := map[string]string{}
	for range 4 {
		conn, err := listener.Accept()
		if err != nil {
			t.Fatal(err)
		}
		if err := conn.SetDeadline(time.Now().Add(patience)); err != nil {
			t.Fatal(err)
		}
		b := make([]byte, 100)
		n, err := conn.Read(b)
		if err != nil {
			t.Fatal(err)
		}
		got[string(b[:n])] = conn.RemoteAddr().String()
		conn.Close()
	}
	want := map[string]string{"192.0.2.77:5": "192.0.2.77:5", "plain": "unknown", "[2001:db8::7]:9": "[2001:db8::7]:9", "no address": "no address"}
	if fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("got %v, want %v", got, want)
	}
	eventually(t, "the forger has been refused", func() bool { return j.has("forged: the Extended ORPort: the other end does not have the cookie") })
	if err := listener.Close(); err != nil {
		t.Error(err)
	}
	if _, err := listener.Accept(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("after Close: %v", err)
	}
}

// Another user of the machine brings no connections, though the port is open to all
// (PT1-12).
func TestStranger(t *testing.T) {
	if os.Getuid() != 0 {
		testpeer.Skip(t, "only root can play another user")
	}
	var j journal
	listen(t, stateDir(t), j.env())
	_, addr, _ := strings.Cut(j.find("or="), "or=")
	// The test binary is in a directory of root's alone.
	program := filepath.Join("/proc/self/fd", "3")
	f, err := os.Open(os.Args[0])
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	cmd := exec.CommandContext(within(t), program, "@child", "stranger", strings.Trim(addr, "]\n "))
	cmd.ExtraFiles = []*os.File{f}
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65533, Gid: 65533}}
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if text := string(out); text != io.EOF.Error() && !strings.Contains(text, "reset") {
		t.Errorf("the stranger at %q: %s", addr, text)
	}
	eventually(t, "the refusal is told", func() bool { return j.has("uid 65533") })
}

// After a server has died the next one brings its connections to the same place (LIFE-7).
func TestServerRestarts(t *testing.T) {
	command := self("server", "192.0.2.77:5")
	events := make(chan host.Event, 100)
	command.Events = func(e host.Event) { events <- e }
	listener, err := command.Server().Listen(within(t), ptipc.Opaque(serverConfig), ptipc.Env{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { listener.Close() })
	for range 2 {
		conn, err := listener.Accept()
		if err != nil {
			t.Fatal(err)
		}
		if conn.RemoteAddr().String() != "192.0.2.77:5" {
			t.Errorf("the client is at %v", conn.RemoteAddr())
		}
		conn.Close()
		e := <-events
		for e.Kind != host.Ready {
			e = <-events
		}
		if err := syscall.Kill(e.Pid, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
	}
}

// Nothing is held after a server is closed: no descriptor, no cookie's listener.
func TestServerLeavesNothing(t *testing.T) {
	descriptors := func() int {
		entries, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		return len(entries)
	}
	once := func() {
		listener, err := self("server", "silent", "plain", "192.0.2.77:5").Server().Listen(within(t), ptipc.Opaque(serverConfig), ptipc.Env{})
		if err != nil {
			t.Fatal(err)
		}
		for range 2 {
			conn, err := listener.Accept()
			if err != nil {
				t.Fatal(err)
			}
			conn.Close()
		}
		if err := listener.Close(); err != nil {
			t.Error(err)
		}
	}
	once() // what is kept for good is opened by the first one
	before := descriptors()
	once()
	if after := descriptors(); after > before {
		t.Errorf("%d descriptors before, %d after", before, after)
	}
}

// A server that cannot start says why.
func TestServerErrors(t *testing.T) {
	for _, tt := range []struct {
		lines []string
		want  string
	}{
		{[]string{"VERSION 1", "SMETHOD-ERROR x address in use", "SMETHODS DONE"}, "x: address in use"},
		{[]string{"VERSION 1", "ENV-ERROR no ORPort"}, "no ORPort"},
		{[]string{"VERSION 1", "SMETHOD x localhost:1", "SMETHODS DONE"}, "localhost:1"},
		{[]string{"VERSION 1", "CMETHOD x socks5 127.0.0.1:1", "SMETHODS DONE"}, "without a CMETHOD or SMETHOD"},
	} {
		listener, err := self("says", tt.lines...).Server().Listen(within(t), ptipc.Opaque(serverConfig), ptipc.Env{})
		if err == nil {
			listener.Close()
			t.Errorf("%q: it listens", tt.lines)
		} else if !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%q: %v", tt.lines, err)
		}
	}
}

// Whoever wants a server that connects its clients itself is told that this one does
// not.
func TestProxyServer(t *testing.T) {
	_, err := self("server").Server().Proxy(within(t), ptipc.Opaque(serverConfig), ptipc.Env{})
	if ptipc.ExitCodeOf(err) != ptipc.ExitUsage {
		t.Errorf("got %v", err)
	}
}

// A server's keys stay: generated twice in one directory, obfs4 gives the same ones,
// and neither configuration has a port 0 (SRV-6, PT1-13).
func TestGenerate(t *testing.T) {
	command := self("")
	command.Path, command.Args = testpeer.Need(t, "obfs4proxy"), nil
	env := ptipc.Env{Local: stateDir(t)}
	var clients []string
	for range 2 {
		client, server, err := command.Server().GenerateConfig(within(t), ptipc.Opaque(
			`{"transport":"obfs4","listen":"127.0.0.1:0","host":"bridge.example.com","options":{"iat-mode":1}}`), env)
		if err != nil {
			t.Fatal(err)
		}
		var c pt1.ClientConfig
		if err := client.Decode(&c); err != nil {
			t.Fatal(err)
		}
		var s struct {
			Host string `json:"host"`
			Port uint16 `json:"port"`
			Cert string `json:"cert"`
			IAT  string `json:"iat-mode"`
		}
		if err := c.Transports["obfs4"].Decode(&s); err != nil || s.Host != "bridge.example.com" || s.Port == 0 || s.IAT != "1" {
			t.Errorf("%s: %v", client, err)
		}
		if want := fmt.Sprintf(`{"transports":{"obfs4":{"listen":"127.0.0.1:%d","options":{"iat-mode":1}}}}`, s.Port); string(server) != want {
			t.Errorf("got %s, want %s", server, want)
		}
		clients = append(clients, s.Cert)
	}
	if clients[0] != clients[1] || clients[0] == "" {
		t.Errorf("two runs have made %q", clients)
	}
}
