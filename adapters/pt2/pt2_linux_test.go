package pt2_test

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"pthost/adapters/pt1"
	"pthost/ptipc"
)

func within(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	t.Cleanup(cancel)
	return ctx
}

func dial(t *testing.T, transport *ptipc.Transport, settings, dest string) ptipc.Conn {
	t.Helper()
	conn, err := transport.Connections["shadow"].Dial(within(t), ptipc.Opaque(settings), dest)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	if err := conn.SetDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	return conn
}

func told(t *testing.T, conn ptipc.Conn) (s seen) {
	t.Helper()
	line, err := bufio.NewReader(conn).ReadBytes('\n')
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(line, &s); err != nil {
		t.Fatal(err)
	}
	return s
}

type capture struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (c *capture) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.text.Write(p)
}

func (c *capture) String() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.text.String()
}

func stateDir(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	return dir
}

// A client is told by flags or by its environment (PT1-14), options in a file that
// others cannot read, and settings go as JSON with their length, under the method that
// the child knows (PT1-15).
func TestClient(t *testing.T) {
	for role, more := range map[string]string{
		"flags":       `,"options":{"shadow":{"password":"secret"}}`,
		"flags-80":    `,"version":"2"`,
		"environment": `,"pass":"environment"`,
	} {
		t.Run(role, func(t *testing.T) {
			state := stateDir(t)
			log := new(capture)
			command := self(role)
			command.Proxy = "socks5://127.0.0.1:9"
			transport, err := command.Open(within(t), ptipc.Opaque(`{"transports":{"shadow":{"host":"192.0.2.1","port":443,"k":{"l":[1]}}}`+more+`}`),
				ptipc.Env{Local: state, Log: slog.New(slog.NewTextHandler(log, nil))})
			if err != nil {
				t.Fatal(err)
			}
			defer transport.Close()
			if !strings.Contains(log.String(), "proxy socks5://127.0.0.1:9") || role == "flags" && !strings.Contains(log.String(), "secret") {
				t.Errorf("the child was told: %s", log)
			}
			method := byte(0x09)
			if role == "flags-80" {
				method = 0x80
			}
			for settings, want := range map[string]seen{
				``:                           {method, `{"k":{"l":[1]}}`, "192.0.2.1:443"},
				`{"k":true,"host":"a.test"}`: {method, `{"k":true}`, "a.test:443"},
			} {
				if got := told(t, dial(t, transport, settings, "")); got != want {
					t.Errorf("got %+v, want %+v", got, want)
				}
			}
			info, err := os.Stat(filepath.Join(state, "pt2-options.json"))
			if (err == nil) != (role == "flags") || err == nil && info.Mode() != 0o600 {
				t.Errorf("the file of options: %v, error %v", info, err)
			}
		})
	}
}

// No settings have method 0x00, and no destination is nobody's.
func TestNoSettings(t *testing.T) {
	transport, err := self("flags").Open(within(t), ptipc.Opaque(`{"transports":{"shadow":{}}}`), ptipc.Env{})
	if err != nil {
		t.Fatal(err)
	}
	defer transport.Close()
	if got := told(t, dial(t, transport, "", "")); got != (seen{Dest: pt1.Nowhere}) {
		t.Errorf("got %+v", got)
	}
}

// Settings are never dropped: a child that takes none is given no connection (PT1-15).
func TestSettingsRefused(t *testing.T) {
	transport, err := self("refuses-settings").Open(within(t), ptipc.Opaque(`{"transports":{"shadow":{"k":1}}}`), ptipc.Env{})
	if err != nil {
		t.Fatal(err)
	}
	defer transport.Close()
	if _, err := transport.Connections["shadow"].Dial(within(t), nil, ""); !errors.Is(err, ptipc.ErrSettingsRefused) {
		t.Errorf("got %v", err)
	}
}

// A server delivers through the Extended ORPort (PT1-12), whose place each version
// names in its own way (PT1-14).
func TestServer(t *testing.T) {
	for role, more := range map[string]string{"flags": ``, "flags-80": `,"version":"2"`, "environment": `,"pass":"environment","options":{"k":1}`} {
		t.Run(role, func(t *testing.T) {
			listener, err := self(role).Server().Listen(within(t), ptipc.Opaque(`{"transports":{"shadow":{"listen":"127.0.0.1:4444"}}`+more+`}`), ptipc.Env{})
			if err != nil {
				t.Fatal(err)
			}
			defer listener.Close()
			conn, err := listener.Accept()
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			if listener.Addr().String() != "127.0.0.1:4444" || conn.RemoteAddr().String() != "192.0.2.7:7" {
				t.Errorf("on %v, from %v", listener.Addr(), conn.RemoteAddr())
			}
			text, err := io.ReadAll(conn)
			if err != nil || !strings.HasPrefix(string(text), "target 127.0.0.1:") {
				t.Errorf("%q, error %v", text, err)
			}
		})
	}
}

// Errors are read from standard error, and exit codes mean what they say (PT1-16).
func TestErrors(t *testing.T) {
	for _, tt := range []struct {
		role string
		args []string
		want string
		code ptipc.ExitCode
	}{
		{"gives-up", []string{"78", "VERSION-ERROR no-version"}, "versions: no-version", 78},
		{"gives-up", []string{"64", "ENV-ERROR no such flag"}, "environment: no such flag", 78},
		{"gives-up", []string{"69", "PROXY-ERROR SOCKS 4 upstream proxies unsupported."}, "proxy: SOCKS 4", 69},
		{"gives-up", []string{"1", "panic: oh"}, "panic: oh", 1},
		{"datagrams", nil, `"transparent-UDP"; socks5 or transparent-TCP`, 0},
	} {
		t.Run(strings.Join(tt.args, " "), func(t *testing.T) {
			transport, err := self(tt.role, tt.args...).Open(within(t), ptipc.Opaque(`{"transports":{"shadow":{}}}`), ptipc.Env{})
			if err == nil {
				transport.Close()
				t.Fatal("it opened")
			}
			if !strings.Contains(err.Error(), tt.want) || tt.code != 0 && ptipc.ExitCodeOf(err) != tt.code {
				t.Errorf("code %v: %v", ptipc.ExitCodeOf(err), err)
			}
		})
	}
}

// What dispatchers print is read (PT1-16).
func TestLog(t *testing.T) {
	log := new(capture)
	transport, err := self("positional-log").Open(within(t), ptipc.Opaque(`{"transports":{"shadow":{}}}`), ptipc.Env{Log: slog.New(slog.NewTextHandler(log, nil))})
	if err != nil {
		t.Fatal(err)
	}
	defer transport.Close()
	if !strings.Contains(log.String(), `level=WARN msg="the clock is slow"`) {
		t.Errorf("logged: %s", log)
	}
}

// A socket that can be told nothing is the stream, and takes no settings.
func TestRaw(t *testing.T) {
	transport, err := self("raw").Open(within(t), ptipc.Opaque(`{"transports":{"shadow":{}}}`), ptipc.Env{})
	if err != nil {
		t.Fatal(err)
	}
	defer transport.Close()
	conn := dial(t, transport, "", "")
	if _, err := io.WriteString(conn, "word"); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 4)
	if _, err := io.ReadFull(conn, b); err != nil || string(b) != "word" {
		t.Errorf("%q, error %v", b, err)
	}
	if _, err := transport.Connections["shadow"].Dial(within(t), ptipc.Opaque(`{"k":1}`), ""); !errors.Is(err, ptipc.ErrSettingsRefused) {
		t.Errorf("settings: %v", err)
	}
}

func TestConfigErrors(t *testing.T) {
	for config, pointer := range map[string]string{
		`{"transports":{}}`:                                                     "/transports",
		`{"transports":{"a-b":{}}}`:                                             "/transports",
		`{"transports":{"a":{"host":"x"}}}`:                                     "/transports/a/port",
		`{"transports":{"a":{}},"pass":"mail"}`:                                 "/pass",
		`{"transports":{"a":{}},"version":"1"}`:                                 "/version",
		`{"transports":{"a":{}},"version":"3.0","pass":"environment"}`:          "/pass",
		`{"transports":{"a":{}},"pass":"environment","options":{"k":"hidden"}}`: "/options",
	} {
		_, err := self("flags").Open(within(t), ptipc.Opaque(config), ptipc.Env{})
		var wrong *ptipc.ConfigError
		if !errors.As(err, &wrong) || wrong.Pointer != pointer {
			t.Errorf("%s: %v", config, err)
		}
	}
	_, err := self("flags").Server().Listen(within(t), ptipc.Opaque(`{"transports":{"a":{"listen":"x"}}}`), ptipc.Env{})
	var wrong *ptipc.ConfigError
	if !errors.As(err, &wrong) || wrong.Pointer != "/transports/a/listen" {
		t.Errorf("got %v", err)
	}
	command := self("flags")
	command.Proxy = "socks5://u:hunter2@127.0.0.1:9"
	if _, err := command.Open(within(t), ptipc.Opaque(`{"transports":{"shadow":{}}}`), ptipc.Env{}); ptipc.ExitCodeOf(err) != ptipc.ExitUsage || strings.Contains(err.Error(), "hunter2") {
		t.Errorf("a password for a command line: %v", err)
	}
}
