package host

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/nettest"

	"pthost/ptipc"
	"pthost/ptipc/localnet"
	"pthost/ptipc/stdio"
)

// A start ends with two factories that work, and Close leaves nothing (LIFE-4).
func TestOpen(t *testing.T) {
	c := self("fixture")
	events := record(c)
	echo := server(t)
	transport, err := c.Open(within(t), ptipc.Opaque(`{"server":"`+echo+`"}`), ptipc.Env{})
	if err != nil {
		t.Fatal(err)
	}
	if len(transport.Connections) != 2 || transport.Connections["free"].Bound || !transport.Connections["bound"].Bound {
		t.Errorf("connection factories: %v", transport.Connections)
	}
	talk(t, dial(t, transport.Connections["free"], "", echo), "free")
	talk(t, dial(t, transport.Connections["free"], `{}`, strings.Replace(echo, "127.0.0.1", "localhost", 1)), "by name")
	talk(t, dial(t, transport.Connections["bound"], "null", ""), "bound")
	if err := transport.Close(); err != nil {
		t.Error(err)
	}
	if err := transport.Wait(); err != nil {
		t.Error("after Close:", err)
	}
	if got := kinds(events.until(t, Exited)); got != "started, ready, exited" {
		t.Error("events:", got)
	}
	if _, err := transport.Connections["free"].Dial(t.Context(), nil, echo); !errors.Is(err, net.ErrClosed) {
		t.Error("a dial after Close:", err)
	}
}

// A connection through a child is a net.Conn like any other.
func TestConn(t *testing.T) {
	far, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { far.Close() })
	transport := open(t, self("direct"), `{}`, ptipc.Env{})
	nettest.TestConn(t, func() (near, wire net.Conn, stop func(), err error) {
		if near, err = transport.Connections["direct"].Dial(within(t), nil, far.Addr().String()); err != nil {
			return nil, nil, nil, err
		}
		if wire, err = far.Accept(); err != nil {
			near.Close()
			return nil, nil, nil, err
		}
		return near, wire, func() { near.Close(); wire.Close() }, nil
	})
}

// SOCKS-15: the end of one direction goes through a child, and leaves the other open.
func TestHalfClose(t *testing.T) {
	far, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { far.Close() })
	const size = 3 << 20
	go func() {
		conn, err := far.Accept()
		if err != nil {
			return
		}
		defer conn.Close()
		n, _ := io.Copy(io.Discard, conn)
		fmt.Fprintf(conn, "%d bytes came", n)
	}()
	conn := dial(t, open(t, self("direct"), `{}`, ptipc.Env{}).Connections["direct"], "", far.Addr().String())
	if _, err := conn.Write(make([]byte, size)); err != nil {
		t.Fatal(err)
	}
	if err := conn.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	answer, err := io.ReadAll(conn)
	if err != nil || string(answer) != fmt.Sprintf("%d bytes came", size) {
		t.Errorf("%q, %v", answer, err)
	}
}

// Settings reach the transport as they were given (SOCKS-2).
func TestSettings(t *testing.T) {
	transport := open(t, self("fixture"), `{}`, ptipc.Env{})
	const settings = `{"echo":{"a":[1,2,"ü"]}}`
	conn := dial(t, transport.Connections["free"], settings, server(t))
	heard := make([]byte, len(settings))
	if _, err := conn.Read(heard); err != nil || string(heard) != settings {
		t.Errorf("the far end heard %q, %v", heard, err)
	}
}

// ERR-2: a failure has the same class in the transport and in the application.
func TestClasses(t *testing.T) {
	transport := open(t, self("fixture"), `{}`, ptipc.Env{})
	free, bound := transport.Connections["free"], transport.Connections["bound"]
	for n := 1; n < 0x20; n++ { // ERR-1
		if class := ptipc.Class(n); class.Known() {
			_, err := free.Dial(within(t), ptipc.Opaque(fmt.Sprintf(`{"class":%d}`, n)), "example.com:80")
			onlyClass(t, err, class)
		}
	}
	tests := []struct {
		name, settings, dest string
		factory              ptipc.ConnectionFactory
		want                 ptipc.Class
	}{
		{"refused by the far end", "", unused(t), free, ptipc.ErrRefused},
		{"errno", `{"errno":113}`, "example.com:80", free, ptipc.ErrHostUnreachable},
		{"a name that nobody has", "", "host.invalid:80", free, ptipc.ErrHostUnreachable},
		{"a key that the transport does not know", `{"no":1}`, "example.com:80", free, ptipc.ErrSettingsRefused},
		{"settings that are no object", `[1]`, "example.com:80", free, ptipc.ErrSettingsNotJSON},
		{"settings that are too large", `{"a":"` + strings.Repeat("a", 70000) + `"}`, "example.com:80", free, ptipc.ErrSettingsTooLarge},
		{"free, no destination", "", "", free, ptipc.ErrNotAllowed},        // SOCKS-12
		{"free, no name", "", ":80", free, ptipc.ErrNotAllowed},            // SOCKS-12
		{"free, port 0", "", "example.com:0", free, ptipc.ErrNotAllowed},   // SOCKS-12
		{"free, no port", "", "example.com", free, ptipc.ErrNotAllowed},    // SOCKS-12
		{"bound, a destination", "", "[::]:0", bound, ptipc.ErrNotAllowed}, // SOCKS-11
		{"bound, a name", "", "example.com:80", bound, ptipc.ErrNotAllowed},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			_, err := tt.factory.Dial(within(t), ptipc.Opaque(tt.settings), tt.dest)
			onlyClass(t, err, tt.want)
			wants(t, err, "transport pt: ")
		})
	}
	stats, err := transport.Stats(t.Context())
	if err != nil || stats.Failed == 0 || stats.Opened != 0 {
		t.Error("after dials that failed (STAT-2):", stats, err)
	}
}

// SOCKS-11, SOCKS-12: what the specification forbids is not even sent. The child
// would end at the first byte.
func TestForbiddenIsNotSent(t *testing.T) {
	c := self("data", "1")
	c.Bound = map[string]bool{"direct": true}
	events := record(c)
	transport := open(t, c, `{}`, ptipc.Env{})
	events.until(t, Ready)
	if !transport.Connections["direct"].Bound {
		t.Error("Command.Bound was not heeded")
	}
	if _, err := transport.Connections["direct"].Dial(t.Context(), nil, "example.com:80"); !errors.Is(err, ptipc.ErrNotAllowed) {
		t.Error(err)
	}
	if err := transport.Close(); err != nil {
		t.Error(err)
	}
	if e := events.next(t); e.Kind != Exited || !strings.Contains(e.Err.Error(), "signal 15") {
		t.Error("the child did not live until it was stopped:", e)
	}
}

// A child that dies in the middle of a handshake ends the dial at once.
func TestDeathInHandshake(t *testing.T) {
	c := self("data", "1", "oops")
	events := record(c)
	transport := open(t, c, `{}`, ptipc.Env{})
	_, err := transport.Connections["direct"].Dial(within(t), nil, "example.com:80")
	onlyClass(t, err, ptipc.ErrGeneral)
	if e := last(events.until(t, Exited)); !errors.Is(e.Err, ptipc.ExitCode(1)) || !strings.Contains(e.Err.Error(), "oops") {
		t.Error("how the child ended:", e.Err)
	}
}

// CFG-1, ERR-3: a configuration error reaches the application whole.
func TestConfigError(t *testing.T) {
	err := refused(t, self("fixture"), `{"limit":11}`, ptipc.Env{})
	var config *ptipc.ConfigError
	want := ptipc.ConfigError{Pointer: "/limit", Value: "11", Problem: "is more than 10", Remedy: "give a number from 0 to 10"}
	if !errors.As(err, &config) || *config != want {
		t.Errorf("got %v", err)
	}
	if ptipc.ExitCodeOf(err) != ptipc.ExitConfig {
		t.Error("exit code:", ptipc.ExitCodeOf(err))
	}
	if strings.Count(err.Error(), "is more than 10") != 1 {
		t.Errorf("it does not say it once: %v", err)
	}

	// CFG-2: a secret is not repeated, by nobody on the way.
	log := new(capture)
	err = refused(t, self("fixture"), `{"password":{"hunter2":true}}`, ptipc.Env{Log: log.logger()})
	if !errors.As(err, &config) || config.Pointer != "/password" || config.Value != "***" {
		t.Errorf("got %v", err)
	}
	if strings.Contains(err.Error()+log.String(), "hunter2") {
		t.Errorf("the secret is told: %v\n%s", err, log)
	}

	// ARG-3: what is not an object does not get as far as the child.
	c := self("fixture")
	events := record(c)
	if err := refused(t, c, `[]`, ptipc.Env{}); !errors.As(err, &config) {
		t.Error(err)
	}
	if len(events.events) != 0 {
		t.Error("it was started")
	}
}

// ERR-4, LIFE-9: how a child ended before it was ready, and its last words.
func TestExitBeforeReady(t *testing.T) {
	for _, code := range []int{1, 64, 65, 69, 70, 75, 77, 78} {
		t.Run(fmt.Sprint(code), func(t *testing.T) {
			err := refused(t, self("exit", fmt.Sprint(code), "some words", "and the \x1b[31mlast"), `{}`, ptipc.Env{})
			var got ptipc.ExitCode
			if !errors.As(err, &got) || int(got) != code {
				t.Errorf("exit code %v in %v", got, err)
			}
			wants(t, err, "transport pt", "before it was ready", "some words\n\tand the \\x1b[31mlast")
		})
	}
	t.Run("0", func(t *testing.T) {
		err := refused(t, self("exit", "0", "bye"), `{}`, ptipc.Env{})
		wants(t, err, "before it was ready", "bye")
		if ptipc.ExitCodeOf(err) == ptipc.ExitOK {
			t.Error("whoever reports this error would end with exit code 0")
		}
	})
	t.Run("killed", func(t *testing.T) {
		err := refused(t, self("exit", "kill", "aargh"), `{}`, ptipc.Env{})
		wants(t, err, "signal 9", "aargh")
	})
	t.Run("after an error of its own", func(t *testing.T) {
		err := refused(t, self("fixture"), `{"exit":69}`, ptipc.Env{})
		wants(t, err, "told to", "first of the last words")
		if !errors.Is(err, ptipc.ExitUnavailable) {
			t.Error("exit code:", err)
		}
	})
	t.Run("no such file", func(t *testing.T) {
		err := refused(t, &Command{Path: "/no/such/file"}, `{}`, ptipc.Env{})
		if !errors.Is(err, fs.ErrNotExist) {
			t.Error(err)
		}
		wants(t, err, "install it")
	})
}

// LIFE-1: the start is bounded, and what has missed it is stopped and reaped.
func TestSilentChild(t *testing.T) {
	c := self("silent", "stubborn")
	c.StartTimeout = 200 * time.Millisecond
	events := record(c)
	err := refused(t, c, `{}`, ptipc.Env{})
	if !errors.Is(err, context.DeadlineExceeded) || !errors.Is(err, ptipc.ErrTimedOut) && ptipc.ClassOf(err) != ptipc.ErrTimedOut {
		t.Error(err)
	}
	wants(t, err, "not ready after 200ms", "thinking")
	if got := kinds(events.until(t, Exited)); got != "started, exited" {
		t.Error("events:", got)
	}

	// The caller's own bound counts as well.
	c = self("silent")
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	c.Events = func(e Event) {
		if e.Kind == Started {
			cancel()
		}
	}
	if _, err := c.Open(ctx, nil, ptipc.Env{}); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	if left := children(t); len(left) > 0 {
		t.Error("processes are left:", left)
	}
}

// What children say that they must not, and what a host has to put up with.
func TestAnnouncements(t *testing.T) {
	foreign, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer foreign.Close()
	foreignUDP, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer foreignUDP.Close()
	const secrets = " ARGS:username=hunter2,password=hunter2,realm=hunter2"
	const version, done = "VERSION 1", "CMETHODS DONE"
	const good = "CMETHOD x socks5 {tcp}"
	tests := []struct {
		name  string
		lines []string
		want  string // in the error; "" if the child is taken
	}{
		{"tcp", []string{version, good, done}, ""},
		{"unix", []string{version, "CMETHOD x socks5 {unix}", done}, ""},
		{"no VERSION (LINE-3)", []string{good, done}, ""},
		{"LOG and STATUS before VERSION (LINE-3)", []string{"LOG SEVERITY=info MESSAGE=x", "STATUS A=b", version, good, done}, ""},
		{"CRLF (LINE-1)", []string{version + "\r", good + "\r", done + "\r"}, ""},
		{"unknown keywords and ARGS (LINE-2)", []string{"GREASE a b", version, "ENV FOO=1", good + " ARGS:x=y,bound=0 more", "CMETHODZ DONE", done}, ""},
		{"lines that are none (LINE-1)", []string{"", " ", "===", "\xff\xfe", "CMETHOD\tx", version, "DÖNE", good, done}, ""},
		{"a line that is too long (LINE-1)", []string{version, "LOG SEVERITY=info MESSAGE=" + strings.Repeat("x", 70000), good, done}, ""},
		{"CMETHOD after CMETHODS DONE", []string{version, good, done, "CMETHOD y socks5 192.0.2.1:1", done}, ""},
		{"one of two factories fails (LINE-8)", []string{version, "CMETHOD-ERROR y it is broken", good, done}, ""},

		{"the same name for datagrams (PKT-3)", []string{version, good, "CMETHOD x turn {udp}" + secrets, done}, ""},

		{"datagrams twice (PKT-3)", []string{version, "CMETHOD x turn {udp}" + secrets, "CMETHOD x turn {udp}" + secrets, done}, "CMETHOD x was announced twice"},
		{"datagrams on a unix socket (PKT-3)", []string{version, "CMETHOD x turn {unix}" + secrets, done}, "unix socket"},
		{"datagrams without credentials (PKT-3)", []string{version, "CMETHOD x turn {udp} ARGS:username=a,password=hunter2", done}, "no username, password and realm"},
		{"datagrams from all addresses (LIFE-11)", []string{version, "CMETHOD x turn {wildudp}" + secrets, done}, "all addresses"},
		{"somebody else's UDP port (PKT-5)", []string{version, "CMETHOD x turn " + foreignUDP.LocalAddr().String() + secrets, done}, "belongs to another process"},
		{"nobody's UDP port (PKT-5)", []string{version, "CMETHOD x turn 127.0.0.1:1" + secrets, done}, "nobody listens"},

		{"another VERSION", []string{"VERSION 2", good, done}, `speaks version "2"`},
		{"VERSION-ERROR (LINE-11)", []string{"VERSION-ERROR no-version", "!exit"}, "none of our versions: no-version"},
		{"ENV-ERROR (LINE-11)", []string{version, "ENV-ERROR no home", "!exit"}, "its environment: no home"},
		{"CMETHOD-ERROR, text (LINE-8)", []string{version, "CMETHOD-ERROR x it is broken", done, "!exit"}, "x: it is broken"},
		{"CMETHOD-ERROR, JSON (LINE-8)", []string{version, `CMETHOD-ERROR x {"class":5,"message":"it is broken"}`, done, "!exit"}, "x: it is broken"},
		{"nothing (LINE-7)", []string{version, done}, "without a CMETHOD"},
		{"twice", []string{version, good, good, done}, "CMETHOD x was announced twice"},
		{"socks4 (LINE-4)", []string{version, "CMETHOD x socks4 {tcp}", done}, `protocol "socks4"`},
		{"a name that is none (LINE-4)", []string{version, "CMETHOD 0x socks5 {tcp}", done}, `name "0x"`},
		{"a CMETHOD that is cut", []string{version, "CMETHOD x socks5", done}, "LINE-4"},
		{"public (LINE-5)", []string{version, "CMETHOD x socks5 192.0.2.1:1080", done}, `"192.0.2.1:1080" is not on the loopback`},
		{"all addresses (LINE-5)", []string{version, "CMETHOD x socks5 0.0.0.0:1080", done}, "not on the loopback"},
		{"a name (LINE-5)", []string{version, "CMETHOD x socks5 localhost:1080", done}, "localhost"},
		{"mapped (LINE-5)", []string{version, "CMETHOD x socks5 [::ffff:127.0.0.1]:1080", done}, "127.0.0.1"},
		{"port 0 (LINE-5)", []string{version, "CMETHOD x socks5 127.0.0.1:0", done}, "127.0.0.1:0"},
		{"a path (LINE-5)", []string{version, "CMETHOD x socks5 unix:../x.sock", done}, "../x.sock"},
		{"an absolute path (LINE-5)", []string{version, "CMETHOD x socks5 unix:/tmp/x.sock", done}, "/tmp/x.sock"},
		{"bad after good (LINE-5)", []string{version, good, "CMETHOD y socks5 192.0.2.1:1080", done}, "192.0.2.1"},
		{"a listener on all addresses (LIFE-11)", []string{version, "CMETHOD x socks5 {wild}", done}, "all addresses"},
		{"somebody else's port (SOCKS-18)", []string{version, "CMETHOD x socks5 " + foreign.Addr().String(), done}, "belongs to another process"},
		{"nobody's port (LINE-7)", []string{version, "CMETHOD x socks5 " + unused(t), done}, "nothing listens"},
		{"nobody's socket (LINE-7)", []string{version, "CMETHOD x socks5 unix:none", done}, "nothing listens"},
		{"no socket (LINE-7)", []string{version, "CMETHOD x socks5 unix:.lock", done}, "not a socket"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			log := new(capture)
			c := self("say", tt.lines...)
			if tt.want == "" {
				transport := open(t, c, `{}`, ptipc.Env{Log: log.logger()})
				if len(transport.Connections) != 1 || transport.Connections["x"].Dial == nil {
					t.Error("connection factories:", transport.Connections)
				}
				return
			}
			err := refused(t, c, `{}`, ptipc.Env{Log: log.logger()})
			wants(t, err, tt.want)
			if strings.Contains(err.Error()+log.String(), "hunter2") { // PKT-4
				t.Errorf("credentials are told: %v; %s", err, log)
			}
		})
	}
}

// Whoever announces too much is not taken either (LIFE-10).
func TestTooManyAnnouncements(t *testing.T) {
	lines := []string{"VERSION 1"}
	for i := range maxMethods + 1 {
		lines = append(lines, fmt.Sprintf("CMETHOD x%d socks5 {tcp}", i))
	}
	wants(t, refused(t, self("say", append(lines, "CMETHODS DONE")...), `{}`, ptipc.Env{}), "more than 64")
}

// SOCKS-18, on a unix socket: the state directory is ours, but not what listens there.
func TestForeignUnixListener(t *testing.T) {
	dir := stateDir(t)
	foreign, err := net.Listen("unix", filepath.Join(dir, "foreign.sock"))
	if err != nil {
		t.Fatal(err)
	}
	defer foreign.Close()
	err = refused(t, self("say", "VERSION 1", "CMETHOD x socks5 unix:foreign.sock", "CMETHODS DONE"), `{}`, ptipc.Env{Local: dir})
	if !errors.Is(err, localnet.ErrForeignListener) {
		t.Error(err)
	}
	wants(t, err, "SOCKS-18")

	// Nor is a link to a socket elsewhere followed (LINE-5).
	elsewhere := filepath.Join(t.TempDir(), "s")
	other, err := net.Listen("unix", elsewhere)
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	if err := os.Symlink(elsewhere, filepath.Join(dir, "link.sock")); err != nil {
		t.Fatal(err)
	}
	wants(t, refused(t, self("say", "VERSION 1", "CMETHOD x socks5 unix:link.sock", "CMETHODS DONE"), `{}`, ptipc.Env{Local: dir}), "link.sock")
}

// A child that ends as soon as it is ready has not lied: its sockets went with it,
// and another start can help (LIFE-6).
func TestDeathAfterReady(t *testing.T) {
	err := refused(t, self("brief"), `{}`, ptipc.Env{})
	if final(err) || !errors.Is(err, ptipc.ExitCode(1)) {
		t.Error(err)
	}
	wants(t, err, "as soon as it was ready")
}

// ARG-1, ARG-4, ARG-6: the ways of handing over the configuration.
func TestHandOver(t *testing.T) {
	const config = `{"password":"hunter2"}`
	report := func(t *testing.T, c *Command) (got, string) {
		t.Helper()
		dir := stateDir(t)
		events := record(c)
		open(t, c, config, ptipc.Env{Local: dir})
		cmdline, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", last(events.until(t, Ready)).Pid))
		if err != nil {
			t.Fatal(err)
		}
		text, err := os.ReadFile(filepath.Join(dir, "got"))
		if err != nil {
			t.Fatal(err)
		}
		var g got
		if err := json.Unmarshal(text, &g); err != nil {
			t.Fatal(err)
		}
		return g, string(cmdline)
	}
	uid := uint32(os.Geteuid())
	checkHost := func(t *testing.T, h stdio.Host) {
		t.Helper()
		if len(h.Version) != 1 || h.Version[0] != 1 || h.Listen != "unix" || h.Proxy != "" || h.UID == nil || *h.UID != uid { // ARG-5
			t.Error("HOST:", h)
		}
	}
	t.Run("standard input", func(t *testing.T) {
		g, cmdline := report(t, self("report", "own"))
		if strings.Join(g.Args, " ") != "own client -" {
			t.Error("arguments:", g.Args)
		}
		launch, err := stdio.NewReader(strings.NewReader(g.Line)).ReadLaunch()
		if err != nil || string(launch.Config) != config {
			t.Errorf("first line %q: %v", g.Line, err)
		}
		checkHost(t, launch.Host)
		if strings.Contains(cmdline, "hunter2") {
			t.Error("every user can read the secret on the command line")
		}
	})
	t.Run("command line", func(t *testing.T) {
		c := self("report", "own")
		c.ConfigArgv = true
		g, _ := report(t, c)
		if len(g.Args) != 4 || g.Args[0] != "own" || g.Args[1] != "client" || g.Args[2] != config {
			t.Fatal("arguments:", g.Args)
		}
		var h stdio.Host
		if err := json.Unmarshal([]byte(g.Args[3]), &h); err != nil {
			t.Fatal(err)
		}
		checkHost(t, h)
	})
	t.Run("plain", func(t *testing.T) {
		c := self("report", "own")
		c.Plain = true
		if g, _ := report(t, c); len(g.Args) != 2 || g.Args[0] != "own" || g.Args[1] != config {
			t.Error("arguments:", g.Args)
		}
	})
	t.Run("no configuration", func(t *testing.T) {
		dir := stateDir(t)
		c := self("report")
		c.Plain = true
		open(t, c, "", ptipc.Env{Local: dir})
		text, err := os.ReadFile(filepath.Join(dir, "got"))
		if err != nil || !strings.Contains(string(text), `"Args":["{}"]`) {
			t.Errorf("%s, %v", text, err)
		}
	})
}

// ARG-2, ARG-5: real children take all three ways.
func TestHandOverToRealChild(t *testing.T) {
	echo := server(t)
	for name, c := range map[string]*Command{"stdin": {}, "argv": {ConfigArgv: true}, "plain": {Plain: true}} {
		t.Run(name, func(t *testing.T) {
			real := self("fixture")
			real.ConfigArgv, real.Plain = c.ConfigArgv, c.Plain
			transport := open(t, real, `{"server":"`+echo+`"}`, ptipc.Env{})
			talk(t, dial(t, transport.Connections["bound"], "", ""), name)
		})
	}
}

// ARG-7: a child that never reads its standard input holds nobody up, however much
// is waiting there for it.
func TestDeafChild(t *testing.T) {
	c := self("deaf")
	transport := open(t, c, `{"password":"`+strings.Repeat("x", 900<<10)+`"}`, ptipc.Env{})
	if err := transport.Close(); err != nil {
		t.Error(err)
	}
	err := refused(t, c, `{"password":"`+strings.Repeat("x", 2<<20)+`"}`, ptipc.Env{})
	wants(t, err, "ARG-4")
}

// LIFE-10: a flood on both outputs does not keep a child from getting ready.
func TestNoise(t *testing.T) {
	log := new(capture)
	open(t, self("noise"), `{}`, ptipc.Env{Log: log.logger()})
	if len(log.String()) > 4<<20 {
		t.Error("the log has", len(log.String()), "bytes")
	}
}

// What cannot work is refused before anything is started, with the remedy.
func TestUsage(t *testing.T) {
	out := ptipc.Env{DialOut: (&net.Dialer{}).DialContext}
	tests := []struct {
		name string
		c    *Command
		env  ptipc.Env
		want string
	}{
		{"no path", &Command{}, ptipc.Env{}, "name an executable"},
		{"two ways out", &Command{Path: "x", Proxy: "socks5://h:1"}, out, "give one"},
		{"plain and DialOut", &Command{Path: "x", Plain: true}, out, "ARG-6"},
		{"plain and a proxy (ARG-6)", &Command{Path: "x", Plain: true, Proxy: "socks5://h:1"}, ptipc.Env{}, "go around it"},
		{"a proxy on the command line (PROXY-3)", &Command{Path: "x", ConfigArgv: true, Proxy: "socks5://u:hunter2@h:1"}, ptipc.Env{}, "by standard input"},
		{"another kind of proxy (PROXY-3)", &Command{Path: "x", Proxy: "http://u:hunter2@h:1"}, ptipc.Env{}, "socks5://"},
		{"a way out for datagrams alone (PROXY-4)", &Command{Path: "x"}, ptipc.Env{PacketsOut: func(context.Context, string) (net.PacketConn, error) { return nil, net.ErrClosed }}, "go around it"},
		{"less than no wait", &Command{Path: "x", Restart: Restart{Min: -1}}, ptipc.Env{}, "less than 0"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			err := refused(t, tt.c, `{}`, tt.env)
			if !errors.Is(err, ptipc.ExitUsage) {
				t.Error(err)
			}
			wants(t, err, tt.want)
			if strings.Contains(err.Error(), "hunter2") {
				t.Error("the proxy's password is told:", err)
			}
		})
	}
}

// LIFE-8: the state directory is private, and one child's.
func TestStateDirectory(t *testing.T) {
	t.Run("is made", func(t *testing.T) {
		dir := filepath.Join(t.TempDir(), "new", "state")
		open(t, self("direct"), `{}`, ptipc.Env{Local: dir})
		info, err := os.Stat(dir)
		if err != nil || info.Mode().Perm() != 0o700 {
			t.Error(info, err)
		}
	})
	t.Run("may be relative", func(t *testing.T) {
		dir := t.TempDir()
		t.Chdir(dir)
		c := self("report")
		open(t, c, `{}`, ptipc.Env{Local: "state"})
		if _, err := os.Stat(filepath.Join(dir, "state", "got")); err != nil {
			t.Error("it is not the child's working directory:", err)
		}
	})
	t.Run("open to others", func(t *testing.T) {
		dir := t.TempDir()
		if err := os.Chmod(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		err := refused(t, self("direct"), `{}`, ptipc.Env{Local: dir})
		if !errors.Is(err, fs.ErrPermission) {
			t.Error(err)
		}
		wants(t, err, "0755", "chmod 700")
	})
	t.Run("in use", func(t *testing.T) {
		dir := stateDir(t)
		first := open(t, self("direct"), `{}`, ptipc.Env{Local: dir})
		_, err := self("direct").Open(within(t), nil, ptipc.Env{Local: dir})
		var locked *localnet.LockedError
		if !errors.As(err, &locked) || locked.PID != os.Getpid() {
			t.Error(err)
		}
		wants(t, err, dir, "use another directory")
		if err := first.Close(); err != nil {
			t.Fatal(err)
		}
		open(t, self("direct"), `{}`, ptipc.Env{Local: dir})
	})
	t.Run("with a long path", func(t *testing.T) {
		dir := filepath.Join(t.TempDir(), strings.Repeat("x", 120))
		transport := open(t, self("direct"), `{}`, ptipc.Env{Local: dir})
		talk(t, dial(t, transport.Connections["direct"], "", server(t)), "far down")
	})
	t.Run("temporary", func(t *testing.T) {
		c := self("direct")
		events := record(c)
		transport := open(t, c, `{}`, ptipc.Env{})
		dir, err := os.Readlink(fmt.Sprintf("/proc/%d/cwd", last(events.until(t, Ready)).Pid))
		if err != nil {
			t.Fatal(err)
		}
		if err := transport.Close(); err != nil {
			t.Error(err)
		}
		if _, err := os.Stat(dir); !errors.Is(err, fs.ErrNotExist) {
			t.Error("it is left behind:", dir, err)
		}
	})
}
