package pt1_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"pthost/adapters/pt1"
	"pthost/ptipc"
	"pthost/ptipc/host"
)

func within(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	t.Cleanup(cancel)
	return ctx
}

func open(t testing.TB, c *host.Command, config string, env ptipc.Env) *ptipc.Transport {
	t.Helper()
	transport, err := c.Open(within(t), ptipc.Opaque(config), env)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { transport.Close() })
	return transport
}

func dial(t testing.TB, f ptipc.ConnectionFactory, settings, dest string) ptipc.Conn {
	t.Helper()
	conn, err := f.Dial(within(t), ptipc.Opaque(settings), dest)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

// Settings become arguments, host and port the destination, and defaults stand where
// a connection says nothing (PT1-2, PT1-3, PT1-4). The child refuses what is
// pipelined (PT1-5).
func TestSettings(t *testing.T) {
	transport := open(t, self("echo"), `{"transports":{"x":{"host":"192.0.2.1","port":443,"cert":"a;b","iat-mode":0}}}`, ptipc.Env{})
	if !transport.Connections["x"].Bound {
		t.Error("it is free")
	}
	long := strings.Repeat("v", 253)
	for settings, want := range map[string]seen{
		``:                                      {2, `cert=a\;b;iat-mode=0`, "\x00", "192.0.2.1:443", false},
		`{"cert":"c","host":"example.com"}`:     {2, `cert=c;iat-mode=0`, "\x00", "example.com:443", false},
		`{"host":"2001:db8::1","port":"80"}`:    {2, `cert=a\;b;iat-mode=0`, "\x00", "[2001:db8::1]:80", false},
		`{"iat-mode":[1,true,"x\\"]}`:           {2, `cert=a\;b;iat-mode=1;iat-mode=true;iat-mode=x\\`, "\x00", "192.0.2.1:443", false},
		`{"a=b":"c=d","cert":"","iat-mode":""}`: {2, `a\=b=c=d;cert=;iat-mode=`, "\x00", "192.0.2.1:443", false},
		`{"cert":"` + long + `"}`:               {2, "cert=" + long[:250], long[250:] + ";iat-mode=0", "192.0.2.1:443", false},
	} {
		if got := told(t, dial(t, transport.Connections["x"], settings, "")); got != want {
			t.Errorf("%s: got %+v\nwant %+v", settings, got, want)
		}
	}
}

// Without arguments no username is sent (PT1-3), and without a server nobody's
// address (PT1-4). A factory that was made free takes the destination of the dial.
func TestNoSettings(t *testing.T) {
	transport := open(t, self("echo"), `{"transports":{"x":{}}}`, ptipc.Env{})
	if got := told(t, dial(t, transport.Connections["x"], "", "")); got != (seen{Dest: pt1.Nowhere}) {
		t.Errorf("got %+v", got)
	}
	command := self("echo")
	command.Bound = map[string]bool{"x": false}
	free := open(t, command, `{"transports":{"x":{}}}`, ptipc.Env{})
	if got := told(t, dial(t, free.Connections["x"], `{"k":"v"}`, "example.com:7")); got.Dest != "example.com:7" || got.Username != "k=v" {
		t.Errorf("got %+v", got)
	}
	_, err := free.Connections["x"].Dial(within(t), ptipc.Opaque(`{"host":"a","port":1}`), "example.com:7")
	wantConfigError(t, err, "/host")
}

func TestSOCKS4(t *testing.T) { // PT1-8
	transport := open(t, self("socks4"), `{"transports":{"x":{"host":"192.0.2.1","port":443,"k":"v;w"}}}`, ptipc.Env{})
	x := transport.Connections["x"]
	if got := told(t, dial(t, x, "", "")); got != (seen{4, `k=v\;w`, "", "192.0.2.1:443", false}) {
		t.Errorf("got %+v", got)
	}
	if got := told(t, dial(t, x, `{"host":"example.com"}`, "")); got.Dest != "example.com:443" {
		t.Errorf("got %+v", got)
	}
	for settings, want := range map[string]ptipc.Class{
		`{"host":"2001:db8::1"}`:     ptipc.ErrAddressType,
		`{"host":"refused.invalid"}`: ptipc.ErrGeneral,
		`{"k":"\u0000"}`:             ptipc.ErrSettingsTooLarge,
	} {
		if _, err := x.Dial(within(t), ptipc.Opaque(settings), ""); ptipc.ClassOf(err) != want {
			t.Errorf("%s: %v, want %v", settings, err, want)
		}
	}
	// A failure without a reason says what can be looked at, and no secret.
	_, err := x.Dial(within(t), ptipc.Opaque(`{"host":"refused.invalid","k":"hunter2","l":1}`), "")
	if text := fmt.Sprint(err); !strings.Contains(text, "can refused.invalid:443 be reached") || !strings.Contains(text, "needs: k, l?") || strings.Contains(text, "hunter2") {
		t.Errorf("got %s", text)
	}
}

// What the child replies is the class of the error (ERR-2).
func TestRefusal(t *testing.T) {
	transport := open(t, self("echo"), `{"transports":{"x":{"port":1,"host":"refused.invalid"}}}`, ptipc.Env{})
	_, err := transport.Connections["x"].Dial(within(t), nil, "")
	if !errors.Is(err, ptipc.ErrRefused) {
		t.Errorf("got %v", err)
	}
}

func wantConfigError(t *testing.T, err error, pointer string) {
	t.Helper()
	var config *ptipc.ConfigError
	if !errors.As(err, &config) || config.Pointer != pointer || config.Problem == "" || config.Remedy == "" {
		t.Errorf("got %v, want a configuration error at %s", err, pointer)
	}
}

// untouched is a connection on which nothing may be sent.
type untouched struct {
	net.Conn
	t *testing.T
}

func (u untouched) Write(p []byte) (int, error) {
	u.t.Errorf("sent: %q", p)
	return 0, net.ErrClosed
}

func (u untouched) Read([]byte) (int, error) { return 0, net.ErrClosed }

// What does not fit is refused before anything is sent (PT1-3), and so are settings
// that are no arguments (PT1-4).
func TestConnectRefuses(t *testing.T) {
	near, far := net.Pipe()
	defer near.Close()
	defer far.Close()
	conn := untouched{near, t}
	long := strings.Repeat("v", 509)
	for _, tt := range []struct {
		settings, pointer string
		class             ptipc.Class
	}{
		{`{"k":"` + long + `"}`, "", ptipc.ErrSettingsTooLarge},
		{`{"k":"` + long[:253] + `\u0000"}`, "", ptipc.ErrSettingsTooLarge},
		{`{"k":{}}`, "/k", ptipc.ErrSettingsRefused},
		{`{"k":[["v"]]}`, "/k", ptipc.ErrSettingsRefused},
		{`{"k":null}`, "/k", ptipc.ErrSettingsRefused},
		{`{"":"v"}`, "/", ptipc.ErrSettingsRefused},
		{`{"a/b":null}`, "/a~1b", ptipc.ErrSettingsRefused},
		{`{"host":"a"}`, "/port", ptipc.ErrSettingsRefused},
		{`{"port":1}`, "/host", ptipc.ErrSettingsRefused},
		{`{"host":"","port":1}`, "/host", ptipc.ErrSettingsRefused},
		{`{"host":"[::1]","port":1}`, "/host", ptipc.ErrSettingsRefused},
		{`{"host":["a"],"port":1}`, "/host", ptipc.ErrSettingsRefused},
		{`{"host":"a","port":0}`, "/port", ptipc.ErrSettingsRefused},
		{`{"host":"a","port":65536}`, "/port", ptipc.ErrSettingsRefused},
		{`{"host":"a","port":"http"}`, "/port", ptipc.ErrSettingsRefused},
		{`{"k":"v","k":"w"}`, "/k", ptipc.ErrSettingsRefused},
		{`[]`, "", ptipc.ErrSettingsRefused},
	} {
		err := pt1.Connect(t.Context(), conn, "socks5", nil, ptipc.Opaque(tt.settings), "")
		if err == nil || ptipc.ClassOf(err) != tt.class {
			t.Errorf("%.40s: %v, want class %v", tt.settings, err, tt.class)
		}
		if tt.pointer != "" {
			wantConfigError(t, err, tt.pointer)
		}
	}
}

// A wrong configuration is refused with its place, before anything starts.
func TestConfigErrors(t *testing.T) {
	for config, pointer := range map[string]string{
		`{}`:                                            "/transports",
		`{"transports":{}}`:                             "/transports",
		`{"transports":{"x-y":{}}}`:                     "/transports",
		`{"transports":{"x":{"k":{}}}}`:                 "/transports/x/k",
		`{"transports":{"x":{"port":1}}}`:               "/transports/x/host",
		`{"transports":{"x":{}},"more":1}`:              "/more",
		`{"transports":{"x":{}},"bind_v4":"x"}`:         "/bind_v4",
		`{"transports":{"x":{}},"bind_v6":"127.0.0.1"}`: "/bind_v6",
	} {
		_, err := self("silent").Open(within(t), ptipc.Opaque(config), ptipc.Env{})
		wantConfigError(t, err, pointer)
	}
	for config, pointer := range map[string]string{
		`{"transports":{"x":{}}}`:                                            "/transports/x/listen",
		`{"transports":{"x":{"listen":"1.2.3.4"}}}`:                          "/transports/x/listen",
		`{"transports":{"x":{"listen":"127.0.0.1:0","options":{"k":null}}}}`: "/transports/x/options/k",
	} {
		_, err := self("silent").Server().Listen(within(t), ptipc.Opaque(config), ptipc.Env{})
		wantConfigError(t, err, pointer)
	}
	for options, pointer := range map[string]string{
		`{"transport":"x y","listen":"127.0.0.1:0"}`:                      "/transport",
		`{"transport":"x","listen":"here"}`:                               "/listen",
		`{"transport":"x","listen":"0.0.0.0:0"}`:                          "/host",
		`{"transport":"x","listen":"127.0.0.1:0","options":{"k":[null]}}`: "/options/k",
	} {
		_, _, err := self("silent").Server().GenerateConfig(within(t), ptipc.Opaque(options), ptipc.Env{Local: stateDir(t)})
		wantConfigError(t, err, pointer)
	}
	if _, _, err := self("silent").Server().GenerateConfig(within(t), nil, ptipc.Env{}); ptipc.ExitCodeOf(err) != ptipc.ExitUsage {
		t.Errorf("generated without a place for keys: %v", err)
	}
}

func stateDir(t testing.TB) string {
	t.Helper()
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	return dir
}

// journal collects what an environment is told.
type journal struct {
	mu    sync.Mutex
	lines []string
}

func (j *journal) add(line string) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.lines = append(j.lines, line)
}

func (j *journal) has(text string) bool {
	j.mu.Lock()
	defer j.mu.Unlock()
	return slices.ContainsFunc(j.lines, func(line string) bool { return strings.Contains(line, text) })
}

// find is the first line that holds text.
func (j *journal) find(text string) string {
	j.mu.Lock()
	defer j.mu.Unlock()
	if i := slices.IndexFunc(j.lines, func(line string) bool { return strings.Contains(line, text) }); i >= 0 {
		return j.lines[i]
	}
	return ""
}

func (j *journal) env() ptipc.Env {
	return ptipc.Env{
		Log: slog.New(slog.NewTextHandler(j, &slog.HandlerOptions{Level: slog.LevelDebug})),
		Status: func(_ context.Context, attrs ...slog.Attr) {
			j.add(fmt.Sprint("status ", attrs))
		},
	}
}

func (j *journal) Write(p []byte) (int, error) {
	j.add(string(p))
	return len(p), nil
}

// eventually waits for something that no event tells of.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for end := time.Now().Add(patience); !ok(); <-tick.C {
		if time.Now().After(end) {
			t.Fatal("it did not come about:", what)
		}
	}
}

const plainConfig = `{"transports":{"x":{"host":"192.0.2.1","port":443,"k":"v"}}}`

// What children really print is read (PT1-6): the transport works all the same.
func TestTolerance(t *testing.T) {
	for _, role := range []string{"no-version", "more-than-asks", "early-log", "endless", "crlf"} {
		t.Run(role, func(t *testing.T) {
			var j journal
			transport := open(t, self(role), plainConfig, j.env())
			if len(transport.Connections) != 1 {
				t.Errorf("it has %d connection factories", len(transport.Connections))
			}
			if got := told(t, dial(t, transport.Connections["x"], "", "")); got.Dest != "192.0.2.1:443" {
				t.Errorf("got %+v", got)
			}
			if role == "early-log" {
				for _, line := range []string{`before é \"version\"`, "level=ERROR msg=bare", "IMPLEMENTATION=a b", "PROGRESS=100"} {
					eventually(t, line, func() bool { return j.has(line) })
				}
			}
		})
	}
}

// What must not be, and what ends a start, is an error that says why (PT1-6, LINE-5, PT1-1).
func TestIntolerance(t *testing.T) {
	for _, tt := range []struct {
		role  string
		args  []string
		wants []string
	}{
		{"public", nil, []string{"0.0.0.0:4444", "LINE-5"}},
		{"far", nil, []string{"192.0.2.1:4444", "LINE-5"}},
		{"other-version", nil, []string{`version "7"`}},
		{"says", []string{"VERSION-ERROR no-version"}, []string{"no-version", "last words"}},
		{"says", []string{"VERSION 1", "ENV-ERROR no state"}, []string{"environment: no state", "last words"}},
		{"says", []string{"VERSION 1", "PROXY-ERROR no such thing"}, []string{"upstream proxy: no such thing"}},
		{"says", []string{"VERSION 1", "CMETHOD-ERROR x no such transport", "CMETHODS DONE"}, []string{"x: no such transport", "last words"}},
		{"says", []string{"VERSION 1", "CMETHOD x socks7 127.0.0.1:1", "CMETHODS DONE"}, []string{`"socks7"`, "socks5 or socks4"}},
		{"says", []string{"VERSION 1", "CMETHODS DONE"}, []string{"without a CMETHOD"}},
		{"says", []string{"VERSION 1", "CMETHOD y socks5 127.0.0.1:1", "CMETHODS DONE"}, []string{"without a CMETHOD"}},
		{"says", []string{"Usage: …"}, []string{"ended before it was ready", "last words"}},
	} {
		t.Run(tt.role+strings.Join(tt.args, ","), func(t *testing.T) {
			transport, err := self(tt.role, tt.args...).Open(within(t), ptipc.Opaque(plainConfig), ptipc.Env{})
			if err == nil {
				transport.Close()
				t.Fatal("it opened")
			}
			for _, want := range tt.wants {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("the error %q does not say %q", err, want)
				}
			}
		})
	}
}

func TestSilence(t *testing.T) { // LIFE-1
	command := self("silent")
	command.StartTimeout = 50 * time.Millisecond
	_, err := command.Open(within(t), ptipc.Opaque(plainConfig), ptipc.Env{})
	if !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v", err)
	}
}

// A child that ignores the end of its input, and every signal that can be ignored,
// is gone after Close (LIFE-4).
func TestDeaf(t *testing.T) {
	command := self("deaf")
	events := make(chan host.Event, 100)
	command.Events = func(e host.Event) { events <- e }
	transport := open(t, command, plainConfig, ptipc.Env{})
	pid := (<-events).Pid
	if err := transport.Close(); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(fmt.Sprintf("/proc/%d", pid)); err == nil {
		t.Error("it is still there")
	}
}

// A child that dies of a handshake is an error that says how it died, and the next one
// is started (LIFE-6).
func TestDeathInHandshake(t *testing.T) {
	command := self("dies-in-handshake")
	command.Restart.GiveUpAfter = 2
	transport := open(t, command, plainConfig, ptipc.Env{})
	if _, err := transport.Connections["x"].Dial(within(t), nil, ""); err == nil {
		t.Error("it connected")
	}
	// Every connection kills one, and so the transport ends.
	go func() {
		for range 4 {
			_, _ = transport.Connections["x"].Dial(t.Context(), nil, "")
		}
	}()
	if err := transport.Wait(); err == nil || !strings.Contains(err.Error(), "no more") {
		t.Errorf("it ended with %v", err)
	}
}

// The environment is what was configured, and nothing of our own (PT1-1, PT1-7).
func TestEnvironment(t *testing.T) {
	t.Setenv("TOR_PT_SERVER_TRANSPORTS", "ours")
	t.Setenv("TOR_PT_PROXY", "socks5://ours:1")
	state := stateDir(t)
	command := self("environment")
	command.Proxy = "socks5://u:p@127.0.0.1:9"
	_, err := command.Open(within(t), ptipc.Opaque(`{"transports":{"x":{},"a":{}},"bind_v4":"192.0.2.9","bind_v6":"2001:db8::9"}`), ptipc.Env{Local: state})
	for _, want := range []string{
		"TOR_PT_MANAGED_TRANSPORT_VER=1", "TOR_PT_STATE_LOCATION=" + state, "TOR_PT_EXIT_ON_STDIN_CLOSE=1", "TOR_PT_CLIENT_TRANSPORTS=a,x",
		"TOR_PT_PROXY=socks5://u:p@127.0.0.1:9", "TOR_PT_OUTBOUND_BIND_ADDRESS_V4=192.0.2.9", "TOR_PT_OUTBOUND_BIND_ADDRESS_V6=[2001:db8::9]",
	} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("no %s in %v", want, err)
		}
	}
	if err != nil && strings.Contains(err.Error(), "ours") {
		t.Errorf("the host's own variables went through: %v", err)
	}
}

// Without PROXY DONE nothing is sent through a child that was given a proxy (PT1-7), and
// a server is given none.
func TestProxyIsDemanded(t *testing.T) {
	command := self("echo")
	command.Proxy = "socks5://127.0.0.1:9"
	if transport, err := command.Open(within(t), ptipc.Opaque(plainConfig), ptipc.Env{}); err == nil {
		transport.Close()
		t.Error("it opened without PROXY DONE")
	}
	honest := self("proxied")
	honest.Proxy = command.Proxy
	told(t, dial(t, open(t, honest, plainConfig, ptipc.Env{}).Connections["x"], "", ""))

	_, err := command.Server().Listen(within(t), ptipc.Opaque(`{"transports":{"x":{"listen":"127.0.0.1:0"}}}`), ptipc.Env{})
	if ptipc.ExitCodeOf(err) != ptipc.ExitUsage {
		t.Errorf("a server with a proxy: %v", err)
	}
}
