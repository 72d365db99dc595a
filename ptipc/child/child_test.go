package child_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"pthost/ptipc"
	"pthost/ptipc/child"
	"pthost/ptipc/localnet"
	"pthost/ptipc/relay"
	"pthost/ptipc/stdio"
)

var test = child.Transport{Client: openTest}

func stateDir(t *testing.T) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "state")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	return dir
}

// LINE-3, LINE-4, LINE-7, LIFE-1, LIFE-2: what a child says from beginning to end,
// when it is reached over TCP and over unix sockets.
func TestLife(t *testing.T) {
	echo := server(t)
	config := `{"server":"` + echo + `"}`
	tests := []struct {
		name    string
		args    []string
		line    string // the first of standard input
		network string
	}{
		{"without a role (ARG-2)", []string{config}, "", "tcp"},
		{"with a role", []string{"client", config}, "", "tcp"},
		{"HOST with keys that nobody knows (ARG-5)", []string{"client", config, `{"version":[7,1],"grease":{"a":[1]},"listen":"tcp"}`}, "", "tcp"},
		{"unix", []string{config, `{"listen":"unix"}`}, "", "unix"},
		{"standard input (ARG-4)", []string{"client", "-"}, `{"config":` + config + `,"host":{"listen":"unix","uid":7}}` + "\n", "unix"},
		{"standard input, no HOST", []string{"-"}, `{"config":` + config + `}` + "\n", "tcp"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			dir := stateDir(t)
			r := run(t, test, dir, tt.args...)
			if tt.line != "" {
				r.say(tt.line)
			}
			lines := strings.Join(r.until("CMETHODS"), "\n")
			pattern := `^VERSION 1\nCMETHOD bound socks5 (\S+) ARGS:stats=1,bound=1\nCMETHOD free socks5 (\S+) ARGS:stats=1\nCMETHODS DONE$`
			found := regexp.MustCompile(pattern).FindStringSubmatch(lines)
			if found == nil {
				t.Fatalf("it said\n%s", lines)
			}
			for i, addr := range found[1:] {
				at, err := localnet.ParseAddr(addr) // LINE-5
				if err != nil || at.Network() != tt.network {
					t.Fatal(addr, err)
				}
				address := addr
				if at.Unix() {
					address = filepath.Join(dir, at.Name())
				}
				conn, err := connect(t, at.Network(), address, "", []string{"", echo}[i])
				if err != nil {
					t.Fatal(err)
				}
				talk(t, conn, "hello")
				conn.Close()
			}
			r.stdin.Close()
			r.exits(ptipc.ExitOK)
			if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
				t.Error("left behind:", left, err)
			}
		})
	}
}

// ERR-4, LIFE-9: every way to fail has its exit code, and says why on standard error.
func TestExitCodes(t *testing.T) {
	failing := func(err error) child.Transport {
		return child.Transport{Client: func(context.Context, ptipc.Opaque, ptipc.Env) (*ptipc.Transport, error) { return nil, err }}
	}
	empty := child.Transport{Client: func(context.Context, ptipc.Opaque, ptipc.Env) (*ptipc.Transport, error) {
		return new(relay.Meter).Transport(nil, nil), nil
	}}
	config := &ptipc.ConfigError{Pointer: "/a", Value: "1", Problem: "is wrong", Remedy: "mend it"}
	tests := []struct {
		name      string
		transport child.Transport
		args      []string
		stdin     string
		code      ptipc.ExitCode
		stderr    string
		stdout    string
	}{
		{"nothing (ARG-3)", test, nil, "", ptipc.ExitUsage, "the configuration is missing", ""},
		{"a role alone (ARG-3)", test, []string{"client"}, "", ptipc.ExitUsage, "the configuration is missing", ""},
		{"too much (ARG-3)", test, []string{"{}", "{}", "{}"}, "", ptipc.ExitUsage, "3 arguments are too many", ""},
		{"HOST beside - (ARG-4)", test, []string{"-", "{}"}, "", ptipc.ExitUsage, "standard input", ""},
		{"a role that it does not have", test, []string{"server", "{}"}, "", ptipc.ExitUsage, "no server side", ""},
		{"generate", test, []string{"generate", "{}"}, "", ptipc.ExitUsage, "no generate side", ""},
		{"an empty configuration (ARG-3)", test, []string{""}, "", ptipc.ExitDataErr, "is empty", ""},
		{"not JSON (ARG-3)", test, []string{`{"password":"hunter2"`}, "", ptipc.ExitDataErr, "is not JSON", ""},
		{"a list (ARG-3)", test, []string{`[1]`}, "", ptipc.ExitDataErr, "not an object", ""},
		{"not UTF-8 (ARG-3)", test, []string{"{\"a\":\"\xff\"}"}, "", ptipc.ExitDataErr, "not UTF-8", ""},
		{"HOST that is none", test, []string{"{}", "[]"}, "", ptipc.ExitDataErr, "HOST", ""},
		{"HOST with a wrong type", test, []string{"{}", `{"proxy":["socks5://u:hunter2@h:1"]}`}, "", ptipc.ExitDataErr, `"proxy"`, ""},
		{"no line (ARG-4)", test, []string{"-"}, "", ptipc.ExitDataErr, "standard input ended", ""},
		{"half a line (ARG-4)", test, []string{"-"}, `{"config":{"password":"hunter2"}}`, ptipc.ExitDataErr, "standard input ended", ""},
		{"a line that is none (ARG-4)", test, []string{"-"}, "hunter2\n", ptipc.ExitDataErr, "first line", ""},
		{"a line that is too long (ARG-4)", test, []string{"-"}, strings.Repeat("x", stdio.MaxLaunch+1) + "\n", ptipc.ExitDataErr, "longer than", ""},
		{"no common version (LINE-3)", test, []string{"{}", `{"version":[2,3]}`}, "", ptipc.ExitConfig, "versions [2 3]", `^VERSION-ERROR no-version$`},
		{
			"a key that it does not know (CFG-1, CFG-2)", test,
			[]string{`{"no":1}`},
			"", ptipc.ExitConfig, "/no: is not a key",
			`^VERSION 1\nCMETHOD-ERROR _ {"class":19,"message":"/no: .*","pointer":"/no","problem":"is not a key here","remedy":".*"}$`,
		},
		{"a key twice (CFG-2)", test, []string{`{"server":"a","server":"b"}`}, "", ptipc.ExitConfig, "/server: occurs twice", `"pointer":"/server"`},
		{"a key twice, from standard input (CFG-2)", test, []string{"-"}, `{"config":{"server":"a","server":"b"}}` + "\n", ptipc.ExitConfig, "/server: occurs twice", `"pointer":"/server"`},
		{
			"a configuration error (ERR-3)", failing(fmt.Errorf("no: %w", config)),
			[]string{"{}"},
			"", ptipc.ExitConfig, "no: /a = 1: is wrong; mend it",
			`"pointer":"/a","value":"1","problem":"is wrong","remedy":"mend it"}$`,
		},
		{"an exit code", failing(fmt.Errorf("no: %w", ptipc.ExitTempFail)), []string{"{}"}, "", ptipc.ExitTempFail, "no: temporary failure", `CMETHOD-ERROR _ {"class":1,"message":"no: temporary`},
		{"an error", failing(errors.New("two\nlines")), []string{"{}"}, "", ptipc.ExitSoftware, "two\nlines", `"message":"two\\nlines"`},
		{"permission", failing(os.ErrPermission), []string{"{}"}, "", ptipc.ExitNoPerm, "permission", ""},
		{"nothing to offer (LINE-7)", empty, []string{"{}"}, "", ptipc.ExitSoftware, "no connection factory", "^VERSION 1\nCMETHOD-ERROR _ {"},
		{"a proxy that is none (PROXY-1, PROXY-3)", test, []string{"{}", `{"proxy":"socks5://u:hunter2@h"}`}, "", ptipc.ExitUnavailable, "socks5://[USER", `^VERSION 1\nPROXY-ERROR .*HOST:PORT$`},
		{"another kind of proxy (PROXY-1)", test, []string{"{}", `{"proxy":"http://u:hunter2@h:1"}`}, "", ptipc.ExitUnavailable, "socks5://[USER", `PROXY-ERROR`},
		{"a proxy that does not parse (PROXY-3)", test, []string{"{}", `{"proxy":"socks5://u:hunter2%zz@h:1"}`}, "", ptipc.ExitUnavailable, "socks5://[USER", `PROXY-ERROR`},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			r := run(t, tt.transport, stateDir(t), tt.args...)
			go func() {
				_, _ = io.WriteString(r.stdin, tt.stdin) // it need not be read to its end
				r.stdin.Close()
			}()
			lines, code := r.exit()
			if code != int(tt.code) {
				t.Errorf("exit code %d, want %d", code, tt.code)
			}
			said := strings.Join(lines, "\n")
			if !strings.Contains(r.stderr.String(), tt.stderr) || strings.Contains(said, "CMETHODS DONE") ||
				!regexp.MustCompile(tt.stdout).MatchString(said) || tt.stdout == "" && tt.code != ptipc.ExitNoPerm && said != "" {
				t.Errorf("it said\n%s\nand on standard error\n%s", said, r.stderr)
			}
			if strings.Contains(said+r.stderr.String(), "hunter2") {
				t.Errorf("a secret is told:\n%s\n%s", said, r.stderr)
			}
		})
	}
}

// A state directory that others can enter is refused when a socket goes there (LIFE-8).
func TestOpenStateDirectory(t *testing.T) {
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	r := run(t, test, dir, "{}", `{"listen":"unix"}`)
	lines, code := r.exit()
	if code != int(ptipc.ExitNoPerm) || !strings.HasPrefix(lines[len(lines)-1], "CMETHOD-ERROR _ ") || !strings.Contains(r.stderr.String(), "chmod 700") {
		t.Errorf("exit code %d, %q, %s", code, lines, r.stderr)
	}
}

// ARG-4: the first line has 10 seconds to come.
func TestLaunchTimeout(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		stdin, in := io.Pipe()
		var stdout, stderr strings.Builder
		began := time.Now()
		code := child.Run(t.Context(), []string{"-"}, ".", stdin, &stdout, &stderr, test)
		in.Close()
		if code != int(ptipc.ExitDataErr) || stdout.String() != "" || !strings.Contains(stderr.String(), "10s") {
			t.Errorf("exit code %d, %q, %q", code, stdout.String(), stderr.String())
		}
		if waited := time.Since(began); waited != 10*time.Second {
			t.Error("it waited", waited)
		}
	})
}

// LIFE-3: SIGTERM is heeded before there is anything to drain, too.
func TestTermBeforeReady(t *testing.T) {
	r := run(t, test, ".", "-")
	r.term()
	r.exits(ptipc.ExitOK)

	opening := make(chan struct{})
	slow := child.Transport{Client: func(ctx context.Context, _ ptipc.Opaque, _ ptipc.Env) (*ptipc.Transport, error) {
		close(opening)
		<-ctx.Done()
		return nil, ctx.Err()
	}}
	r = run(t, slow, ".", "{}")
	if got := r.line(); got != "VERSION 1" {
		t.Error(got)
	}
	<-opening
	r.term()
	if got := r.line(); !strings.HasPrefix(got, "CMETHOD-ERROR _ ") {
		t.Error(got)
	}
	r.exits(ptipc.ExitOK)
}

// LIFE-2, LIFE-3: at the end of standard input and at SIGTERM, a child accepts no
// more, lets go on what is open, and ends with it.
func TestDrain(t *testing.T) {
	for name, end := range map[string]func(*running){
		"end of standard input": func(r *running) { r.stdin.Close() },
		"SIGTERM":               func(r *running) { r.term() },
		"SIGTERM, then the end of standard input": func(r *running) {
			r.term()
			r.stdin.Close()
		},
	} {
		t.Run(name, func(t *testing.T) {
			echo := server(t)
			r := run(t, test, ".", "{}")
			addr := r.ready()["free"]
			conn, err := connect(t, "tcp", addr, "", echo)
			if err != nil {
				t.Fatal(err)
			}
			talk(t, conn, "before")
			end(r)
			for err == nil { // until it has stopped listening
				_, err = connect(t, "tcp", addr, "", echo)
			}
			talk(t, conn, "after")
			select {
			case <-r.ended:
				t.Fatal("it did not wait for the connection")
			default:
			}
			conn.Close()
			r.exits(ptipc.ExitOK)
		})
	}
}

// LIFE-3: SIGTERM while it drains after the end of standard input cuts what is open.
func TestTermWhileDraining(t *testing.T) {
	echo := server(t)
	r := run(t, test, ".", "{}")
	addr := r.ready()["free"]
	conn, err := connect(t, "tcp", addr, "", echo)
	if err != nil {
		t.Fatal(err)
	}
	talk(t, conn, "before")
	r.stdin.Close()
	for err == nil { // until it drains
		_, err = connect(t, "tcp", addr, "", echo)
	}
	r.term()
	r.exits(ptipc.ExitOK)
	_ = conn.SetDeadline(time.Now().Add(patience))
	if _, err := conn.Read(make([]byte, 1)); err == nil || errors.Is(err, io.EOF) { // SOCKS-15
		t.Error("the cut connection ended with", err)
	}
}

// A transport that ends by itself ends the child, with what it has to say.
func TestTransportEnds(t *testing.T) {
	for name, want := range map[string]struct {
		err  error
		code ptipc.ExitCode
	}{
		"for a reason": {fmt.Errorf("the far end has closed for good: %w", ptipc.ExitUnavailable), ptipc.ExitUnavailable},
		"without":      {nil, ptipc.ExitSoftware},
	} {
		t.Run(name, func(t *testing.T) {
			end := make(chan struct{})
			r := run(t, child.Transport{Client: func(ctx context.Context, config ptipc.Opaque, env ptipc.Env) (*ptipc.Transport, error) {
				transport, err := openTest(ctx, config, env)
				transport.Wait = func() error { <-end; return want.err }
				return transport, err
			}}, ".", "{}")
			r.ready()
			close(end)
			r.exits(want.code)
			if want.err != nil && r.stderr.String() != want.err.Error()+"\n" || r.stderr.Len() == 0 {
				t.Error(r.stderr)
			}
		})
	}
}

// What a transport leaves open when it fails late is closed.
func TestCloseAfterFailure(t *testing.T) {
	closed := false
	r := run(t, child.Transport{Client: func(context.Context, ptipc.Opaque, ptipc.Env) (*ptipc.Transport, error) {
		return new(relay.Meter).Transport(map[string]ptipc.ConnectionFactory{"not a name": {}}, func() error { closed = true; return nil }), nil
	}}, ".", "{}")
	lines, code := r.exit()
	if code == 0 || !closed || !strings.HasPrefix(lines[len(lines)-1], "CMETHOD-ERROR") {
		t.Errorf("exit code %d, closed %v, %q", code, closed, lines)
	}
}

// A host that is gone takes its end of the pipe along: the child does not stay.
func TestBrokenStandardOutput(t *testing.T) {
	stdin, in := io.Pipe()
	out, stdout := io.Pipe()
	out.Close()
	defer in.Close()
	if code := child.Run(t.Context(), []string{"{}"}, ".", stdin, stdout, io.Discard, test); code == 0 {
		t.Error("exit code 0")
	}

	r := run(t, test, ".", "{}")
	r.ready()
	stats := make(chan struct{})
	go func() {
		defer close(stats)
		_, _ = io.WriteString(r.stdin, "STATS 1\n")
	}()
	<-stats
	if got := r.line(); !strings.HasPrefix(got, "STATS 1 {") {
		t.Error(got)
	}
}

// LINE-9: records of slog become LOG lines, attributes and groups behind the message.
func TestLogLines(t *testing.T) {
	r := run(t, child.Transport{Client: func(ctx context.Context, config ptipc.Opaque, env ptipc.Env) (*ptipc.Transport, error) {
		log := env.Logger()
		log.Info("plain")
		log.Debug("left out")
		log.Info("fine", "a", 1, "b", "two words")
		log.With("with", true).WithGroup("g").With("in", 2).Warn("grouped", slog.Group("h", "x", 3))
		log.Log(ctx, stdio.LevelNotice, "notice")
		log.Error("two\nlines \"quoted\" \\ \x00\xff", "err", errors.New("e\n"))
		log.Info("same names", "level", "a", "msg", "b", "time", "c")
		log.With("level", "w").Info("same names")
		log.Info(strings.Repeat("ü", 60000), "more", strings.Repeat("m", 60000))
		return openTest(ctx, config, env)
	}}, ".", "{}")
	want := []string{
		"VERSION 1",
		`LOG SEVERITY=info MESSAGE=plain`,
		`LOG SEVERITY=info MESSAGE="fine a=1 b=\"two words\""`,
		`LOG SEVERITY=warning MESSAGE="grouped with=true g.in=2 g.h.x=3"`,
		`LOG SEVERITY=notice MESSAGE=notice`,
		`LOG SEVERITY=error MESSAGE="two\nlines \"quoted\" \\ \000\377 err=\"e\\n\""`,
		`LOG SEVERITY=info MESSAGE="same names level=a msg=b time=c"`,
		`LOG SEVERITY=info MESSAGE="same names level=w"`,
	}
	for _, line := range want {
		if got := r.line(); got != line {
			t.Errorf("got  %s\nwant %s", got, line)
		}
	}
	long := r.line() // LINE-1: the beginning of it, not nothing
	if !strings.HasPrefix(long, `LOG SEVERITY=info MESSAGE="üü`) || !strings.HasSuffix(long, `ü…"`) || len(long) > stdio.MaxLine {
		t.Error(long)
	}
	r.ready()
}

// LINE-10: progress becomes STATUS lines; what no line can carry is left out.
func TestStatusLines(t *testing.T) {
	r := run(t, child.Transport{Client: func(ctx context.Context, config ptipc.Opaque, env ptipc.Env) (*ptipc.Transport, error) {
		env.Report(ctx, slog.String("transport", "free"), slog.Int("progress", 10), slog.String("summary", "half way"))
		env.Report(ctx, slog.Any("secret", secret{}))
		env.Report(ctx, slog.String("a key", "x"))
		return openTest(ctx, config, env)
	}}, ".", "{}")
	for _, line := range []string{
		"VERSION 1",
		`STATUS TRANSPORT=free progress=10 summary="half way"`,
		`STATUS secret=hidden`,
	} {
		if got := r.line(); got != line {
			t.Errorf("got  %s\nwant %s", got, line)
		}
	}
	if got := r.line(); !strings.HasPrefix(got, `LOG SEVERITY=warning MESSAGE="a status could not be told`) {
		t.Error(got)
	}
	r.ready()
}

// secret shows how a value says what may be seen of it.
type secret struct{ _ int }

func (secret) LogValue() slog.Value { return slog.StringValue("hidden") }

// STAT-1, STAT-2, STAT-3: STATS lines, and what is none is passed over (LINE-1, LINE-2).
func TestStatsLines(t *testing.T) {
	echo := server(t)
	r := run(t, test, ".", "{}")
	addr := r.ready()["free"]
	conn, err := connect(t, "tcp", addr, "", echo)
	if err != nil {
		t.Fatal(err)
	}
	talk(t, conn, "hello")
	if _, err := connect(t, "tcp", addr, "", "127.0.0.1:1"); !errors.Is(err, ptipc.ErrRefused) {
		t.Fatal(err)
	}
	ask := func(question, pattern string) string {
		t.Helper()
		r.say(question)
		for {
			line := r.line()
			if strings.HasPrefix(line, "LOG SEVERITY=debug ") {
				continue
			}
			if !regexp.MustCompile(`^` + pattern + `$`).MatchString(line) {
				t.Errorf("to %.40q it answered %s, want %s", question, line, pattern)
			}
			return line
		}
	}
	const opened = `"opened":"\d{4}-\d\d-\d\dT[^"]+"`
	name := conn.LocalAddr().String()
	ask("STATS 7\n", `STATS 7 {"active":1,"opened":1,"failed":1,"received":5,"sent":5}`)
	ask("STATS 18446744073709551615 "+name+"\n", `STATS 18446744073709551615 {`+opened+`,"received":5,"sent":5}`)
	ask("STATS 8 127.0.0.1:1\n", `STATS 8 null`)
	ask("STATS 9 @nobody\n", `STATS 9 null`)
	ask("GREASE\nSTATS\nSTATS x\n\n\xff\n"+strings.Repeat("x", 3*stdio.MaxLine)+"\nSTATS 10\r\n", `STATS 10 {.*}`)
	conn.Close()
	for end := time.Now().Add(patience); ; {
		if line := ask("STATS 11 "+name+"\n", `STATS 11 .*`); line == "STATS 11 null" {
			break
		}
		if time.Now().After(end) {
			t.Fatal("a closed connection stays")
		}
	}
	ask("STATS 12\n", `STATS 12 {"active":0,"opened":1,"failed":1,"received":5,"sent":5}`)
}

// SOCKS-6, SOCKS-11, SOCKS-12, ERR-2: the classes of what a transport refuses.
func TestReplies(t *testing.T) {
	r := run(t, test, ".", `{"server":"`+server(t)+`"}`)
	addrs := r.ready()
	for _, tt := range []struct {
		factory, settings, dest string
		want                    error
	}{
		{"bound", `{"no":1}`, "", ptipc.ErrSettingsRefused},
		{"bound", "", "example.com:80", ptipc.ErrNotAllowed},
		{"free", "", "", ptipc.ErrNotAllowed},
		{"free", "", "127.0.0.1:1", ptipc.ErrRefused},
		{"free", "", "host.invalid:1", ptipc.ErrHostUnreachable},
		{"bound", "", "", nil},
	} {
		if _, err := connect(t, "tcp", addrs[tt.factory], tt.settings, tt.dest); !errors.Is(err, tt.want) {
			t.Errorf("%+v: %v", tt, err)
		}
	}
}

// PROXY-1: a child says PROXY DONE before it announces anything, and then uses the
// proxy for everything; without it, it dials nothing in another way.
func TestProxyIsUsed(t *testing.T) {
	proxy, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	r := run(t, test, ".", "{}", `{"proxy":"socks5://user:hunter2@`+proxy.Addr().String()+`"}`)
	if got := []string{r.line(), r.line()}; got[0] != "VERSION 1" || got[1] != "PROXY DONE" {
		t.Error(got)
	}
	addr := r.ready()["free"]
	greeting := make(chan []byte, 1)
	go func() {
		conn, err := proxy.Accept()
		if err != nil {
			return
		}
		defer conn.Close()
		b := make([]byte, 4)
		_, _ = io.ReadFull(conn, b)
		greeting <- b
	}()
	echo := server(t)
	if _, err := connect(t, "tcp", addr, "", echo); !errors.Is(err, ptipc.ErrGeneral) {
		t.Error("the proxy hung up:", err)
	}
	if got := <-greeting; string(got) != "\x05\x02\x00\x02" {
		t.Errorf("the proxy was greeted with %x", got)
	}
	proxy.Close()
	if _, err := connect(t, "tcp", addr, "", echo); !errors.Is(err, ptipc.ErrGeneral) {
		t.Error("without the proxy:", err)
	}
	r.stdin.Close()
	lines, _ := r.exit()
	if said := strings.Join(lines, "\n") + r.stderr.String(); strings.Contains(said, "hunter2") {
		t.Error("the password is told:", said) // PROXY-3
	}
}
