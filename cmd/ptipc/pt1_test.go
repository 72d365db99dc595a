package main

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"pthost/adapters/pt1"
	"pthost/ptipc"
	"pthost/ptipc/host"
)

// managedTool is a running ptipc pt1.
type managedTool struct {
	cmd   *exec.Cmd
	stdin io.Closer
	out   *bufio.Reader
	lines string // up to DONE
}

// startManaged starts it as tor does, with these variables, and waits until it has
// announced everything.
func startManaged(t *testing.T, state string, variables []string, args ...string) *managedTool {
	t.Helper()
	m := &managedTool{cmd: toolCommand(t.Context(), t, append([]string{"pt1"}, args...)...)}
	m.cmd.Env = append(m.cmd.Env, "TOR_PT_MANAGED_TRANSPORT_VER=1", "TOR_PT_EXIT_ON_STDIN_CLOSE=1", "TOR_PT_STATE_LOCATION="+state)
	m.cmd.Env = append(m.cmd.Env, variables...)
	m.cmd.Stderr = os.Stderr
	stdin, err := m.cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := m.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := m.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	m.stdin, m.out = stdin, bufio.NewReader(stdout)
	for !strings.HasSuffix(m.lines, "METHODS DONE\n") {
		line, err := m.out.ReadString('\n')
		if err != nil {
			t.Fatalf("%v after %q", err, m.lines)
		}
		m.lines += line
	}
	return m
}

// finish closes standard input and waits for the end.
func (m *managedTool) finish(t *testing.T) {
	t.Helper()
	_ = m.stdin.Close()
	_, _ = io.Copy(io.Discard, m.out)
	if err := m.cmd.Wait(); err != nil {
		t.Errorf("ptipc pt1 ended with %v", err)
	}
}

// The transports of the tool and executables, with configurations that were given,
// and made, as client and as server (PT1-21, PT1-25).
func TestPT1(t *testing.T) {
	dir := t.TempDir()
	state := filepath.Join(dir, "pt_state")
	server := []string{"TOR_PT_SERVER_TRANSPORTS=websocket", "TOR_PT_SERVER_BINDADDR=websocket-127.0.0.1:0", "TOR_PT_ORPORT=127.0.0.1:1"}
	mine := []string{"TOR_PT_SERVER_TRANSPORTS=mine", "TOR_PT_SERVER_BINDADDR=mine-127.0.0.1:0", "TOR_PT_ORPORT=127.0.0.1:1"}
	pair, err := toolCommand(t.Context(), t, "generate", "builtin:websocket", `{"listen":"127.0.0.1:0","host":"bridge.example"}`).Output()
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(dir, "pair.json")
	if err := os.WriteFile(file, pair, 0o600); err != nil {
		t.Fatal(err)
	}
	const addr, pin = `127\.0\.0\.1:[0-9]+`, `pin=sha256:[A-Za-z0-9+/]+`
	for _, test := range []struct {
		name      string
		variables []string
		args      []string
		want      string
		kept      string // the configuration that is there then
	}{
		{
			"clients",
			[]string{"TOR_PT_CLIENT_TRANSPORTS=websocket,nothing,mine"},
			[]string{"--exec", "mine=builtin:direct"},
			`VERSION 1\nCMETHOD websocket socks5 ` + addr + `\nCMETHOD-ERROR nothing there is no transport nothing here; there are [^\n]*\n(LOG [^\n]*\n)*CMETHOD mine socks5 ` + addr + `\n`, "",
		},
		{
			"an executable that is not there",
			[]string{"TOR_PT_CLIENT_TRANSPORTS=mine,websocket"},
			[]string{"--exec", "mine=" + filepath.Join(dir, "nothing")},
			`CMETHOD-ERROR mine [^\n]*nothing[^\n]*\nCMETHOD websocket `, "",
		},
		{"a configuration that was given", server, []string{"--config", "websocket=" + file}, `\nSMETHOD websocket ` + addr + ` ARGS:` + pin + `,url=wss://bridge\.example:`, ""},
		{"one that is made", server, nil, `\nSMETHOD websocket ` + addr + ` ARGS:` + pin + `,url=wss:///[A-Za-z0-9_-]+\n`, "ptipc-websocket.json"},
		{"an executable that makes one", mine, []string{"--exec", "mine=builtin:websocket"}, `\nSMETHOD mine ` + addr + ` ARGS:` + pin + `,url=wss:///`, "ptipc-mine.json"},
		{"an executable that made one", mine, []string{"--exec", "mine=builtin:websocket"}, `\nSMETHOD mine ` + addr + ` ARGS:` + pin + `,url=wss:///`, "ptipc-mine.json"},
	} {
		t.Run(test.name, func(t *testing.T) {
			m := startManaged(t, state, test.variables, test.args...)
			if !regexp.MustCompile(test.want).MatchString(m.lines) {
				t.Errorf("it says\n%swant %s", m.lines, test.want)
			}
			m.finish(t)
			kept, err := filepath.Glob(filepath.Join(state, "ptipc-*.json"))
			if err != nil || test.kept == "" && len(kept) > 0 || test.kept != "" && !strings.Contains(fmt.Sprint(kept), test.kept) {
				t.Errorf("the configurations that are kept are %q, %v; want %q", kept, err, test.kept)
			}
		})
	}
}

// However the proxy ends, its executables end with it (LIFE-5, PT1-29).
func TestPT1LeavesNothingBehind(t *testing.T) {
	for name, end := range map[string]func(m *managedTool) error{
		"standard input": func(m *managedTool) error { return m.stdin.Close() },
		"SIGTERM":        func(m *managedTool) error { return m.cmd.Process.Signal(syscall.SIGTERM) },
		"SIGKILL":        func(m *managedTool) error { return m.cmd.Process.Kill() },
	} {
		t.Run(name, func(t *testing.T) {
			mark := fmt.Sprintf("PTIPC_TEST_MARK=%d-%d", os.Getpid(), time.Now().UnixNano())
			m := startManaged(t, filepath.Join(t.TempDir(), "pt_state"), []string{"TOR_PT_CLIENT_TRANSPORTS=mine", mark}, "--exec", "mine=builtin:direct")
			if n := len(descendants(t, mark)); n < 3 {
				t.Fatalf("%d processes run; the tool, its launcher and a child were expected", n)
			}
			if err := end(m); err != nil {
				t.Fatal(err)
			}
			_, _ = io.Copy(io.Discard, m.out)
			if err := m.cmd.Wait(); err != nil && name != "SIGKILL" {
				t.Errorf("ptipc pt1 ended with %v", err)
			}
			for deadline := time.Now().Add(20 * time.Second); len(descendants(t, mark)) > 0; {
				if time.Now().After(deadline) {
					t.Fatalf("left behind: %v", descendants(t, mark))
				}
			}
		})
	}
}

// The protocol in both of its roles: our host runs our managed proxy as it would run
// anybody's, with the configurations that come of what the server announces (PT1-13,
// PT1-23, PT1-27).
func TestPT1UnderOurHost(t *testing.T) {
	t.Setenv(asTool, "1")
	command := &host.Command{Path: toolCommand(t.Context(), t).Path, Args: []string{"pt1"}, Dialect: pt1.Dialect{}}
	env := ptipc.Env{Local: filepath.Join(t.TempDir(), "state")}
	client, server, err := command.Server().GenerateConfig(t.Context(), ptipc.Opaque(`{"transport":"websocket","listen":"127.0.0.1:0"}`), env)
	if err != nil {
		t.Fatal(err)
	}
	listener, err := command.Server().Listen(t.Context(), server, env)
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	transport, err := command.Open(t.Context(), client, ptipc.Env{})
	if err != nil {
		t.Fatal(err)
	}
	defer transport.Close()
	conn, err := transport.Connections["websocket"].Dial(t.Context(), nil, "")
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	far, err := listener.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer far.Close()
	if remote, ok := far.RemoteAddr().(*net.TCPAddr); !ok || remote.Port == 0 || !remote.IP.IsLoopback() {
		t.Errorf("the client is said to be %v", far.RemoteAddr())
	}
	sent := bytes.Repeat([]byte("both ways "), 100_000)
	go func() {
		_, _ = io.Copy(far, far) // an echo
		_ = far.(ptipc.Conn).CloseWrite()
	}()
	go func() {
		_, _ = conn.Write(sent)
		_ = conn.CloseWrite()
	}()
	if got, err := io.ReadAll(conn); err != nil || !bytes.Equal(got, sent) {
		t.Errorf("%d bytes of %d came back, %v", len(got), len(sent), err)
	}
}
