//go:build unix

package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
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

	"pthost/cmd/ptipc/internal/config"
	"pthost/cmd/ptipc/internal/control"
	"pthost/ptipc"
	"pthost/ptipc/testpeer"
	"pthost/socks"
)

// runtimeDir gives the test a default control socket of its own.
func runtimeDir(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	t.Setenv("XDG_RUNTIME_DIR", dir)
	return filepath.Join(dir, "ptipc", "control.sock")
}

// operate runs a command of the tool and returns what it says and its exit code.
func operate(t *testing.T, stdin string, args ...string) (stdout, stderr string, code ptipc.ExitCode) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	cmd := toolCommand(ctx, t, args...)
	var out, said strings.Builder
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(stdin), &out, &said
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return out.String(), said.String(), ptipc.ExitCode(cmd.ProcessState.ExitCode())
}

func must(t *testing.T, stdin string, args ...string) string {
	t.Helper()
	out, said, code := operate(t, stdin, args...)
	if code != ptipc.ExitOK {
		t.Fatalf("ptipc %s: %v\n%s", strings.Join(args, " "), code, said)
	}
	return out
}

var oneDirect = map[string]any{
	"transports": map[string]any{"mine": map[string]any{"exec": "builtin:direct", "restart": map[string]any{"min": "1ms"}}},
	"fronts":     []any{map[string]any{"listen": "tcp://127.0.0.1:0", "serve": "socks5", "transport": "mine"}},
}

func sendBack(conn *net.TCPConn) { _, _ = io.Copy(conn, conn) }

// throughSOCKS says text to dest and returns the answer, once the connection is closed.
func throughSOCKS(t *testing.T, front, dest, text string) string {
	t.Helper()
	conn, err := net.Dial("tcp", front)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if err := socks.ConnectUpstream(t.Context(), conn, nil, dest); err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(conn, text); err != nil {
		t.Fatal(err)
	}
	if err := conn.(*net.TCPConn).CloseWrite(); err != nil {
		t.Fatal(err)
	}
	answer, err := io.ReadAll(conn)
	if err != nil {
		t.Fatal(err)
	}
	return string(answer)
}

// awaitStatus asks until the host is as it should be.
func awaitStatus(t *testing.T, path string, is func(control.Status) bool) control.Status {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); ; {
		s, err := control.NewClient(path).Status(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if is(s) {
			return s
		}
		if time.Now().After(deadline) {
			t.Fatalf("the status stays %+v", s)
		}
	}
}

func TestStatusAndStop(t *testing.T) {
	path := runtimeDir(t)
	_, said, code := operate(t, "", "status")
	if code != ptipc.ExitUnavailable || !strings.Contains(said, "ptipc run") {
		t.Errorf("without a host: %v %s", code, said)
	}
	host := startTool(t, writeConfig(t, oneDirect))
	echo := serve(t, sendBack)
	if got := throughSOCKS(t, host.front, echo, "hello"); got != "hello" {
		t.Fatalf("%q", got)
	}
	var s control.Status
	if err := json.Unmarshal([]byte(must(t, "", "status", "--json")), &s); err != nil {
		t.Fatal(err)
	}
	if s.PID != host.cmd.Process.Pid || len(s.Transports) != 1 || len(s.Fronts) != 1 {
		t.Fatalf("%+v", s)
	}
	mine := s.Transports[0]
	if mine.Exec != "builtin:direct" || mine.Role != "client" || mine.State != control.Ready || mine.PID == 0 || mine.Since == nil ||
		mine.Restarts != 0 || mine.LastError != "" || mine.Signals != "queue" || mine.Stats == nil || mine.Stats.Opened != 1 ||
		mine.Stats.Received != 5 || mine.Stats.Sent != 5 || mine.Rate == nil {
		t.Errorf("%+v", mine)
	}
	if f := s.Fronts[0]; f.Address != host.front || f.Serve != "socks5" || f.Transport != "mine" || f.Refused == nil {
		t.Errorf("%+v", f)
	}

	if err := syscall.Kill(mine.PID, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	back := awaitStatus(t, path, func(s control.Status) bool {
		return s.Transports[0].Restarts == 1 && s.Transports[0].State == control.Ready
	})
	if now := back.Transports[0]; now.PID == mine.PID || now.PID == 0 || !strings.Contains(now.LastError, "killed") {
		t.Errorf("%+v", now)
	}
	out := must(t, "", "status")
	for _, line := range []string{`(?m)^mine +builtin:direct +client +ready +\d+ .* 1 +0 +1 +0 +5 B +5 B`, `(?m)^127.*socks5 +mine$`, `mine, last error: .*killed`} {
		if !regexp.MustCompile(line).MatchString(out) {
			t.Errorf("there is no %s in\n%s", line, out)
		}
	}

	if out := must(t, "", "stop"); !strings.Contains(out, "has ended") {
		t.Error(out)
	}
	if err := host.stop(t); err != nil {
		t.Errorf("the host ended with %v", err)
	}
	if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the socket: %v", err)
	}
	if _, _, code := operate(t, "", "stop"); code != ptipc.ExitUnavailable {
		t.Errorf("stop, again: %v", code)
	}
}

// slowChild tells of a bootstrap that goes on until somebody opens the FIFO "go" beside it.
const slowChild = `#!/usr/bin/env python3
import os, socket, sys
s = socket.create_server(("127.0.0.1", 0))
print('VERSION 1\nSTATUS TRANSPORT=x PROGRESS=40 SUMMARY="waits for a \\x1b[2Jkey"', flush=True)
open(os.path.join(os.path.dirname(sys.argv[0]), "go")).close()
print("CMETHOD x socks5 127.0.0.1:%d\nCMETHODS DONE" % s.getsockname()[1], flush=True)
sys.stdin.read()
`

// A host that is still starting can be looked at, handed signals, and stopped: a slow
// bootstrap is when people ask.
func TestStatusWhileStarting(t *testing.T) {
	testpeer.Need(t, "python3")
	path := runtimeDir(t)
	dir := t.TempDir()
	child, gate := filepath.Join(dir, "child"), filepath.Join(dir, "go")
	if err := os.WriteFile(child, []byte(slowChild), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Mkfifo(gate, 0o600); err != nil {
		t.Fatal(err)
	}
	document := writeConfig(t, map[string]any{
		"transports": map[string]any{"a": map[string]any{"exec": "builtin:direct"}, "slow": map[string]any{"exec": child, "plain": true, "sandbox": map[string]any{"read": []string{gate}}}, "z": map[string]any{"exec": "builtin:direct"}},
		"fronts":     []any{map[string]any{"listen": "tcp://127.0.0.1:0", "serve": "socks5", "transport": "slow"}},
		"metrics":    "tcp://127.0.0.1:0",
	})
	// begin runs a host until its second transport waits.
	begin := func() (host *tool, s control.Status) {
		host = beginTool(t, nil, document)
		for deadline := time.Now().Add(30 * time.Second); ; {
			var err error
			if s, err = control.NewClient(path).Status(t.Context()); err == nil && len(s.Transports) == 3 && s.Transports[1].Progress != "" {
				return host, s
			}
			if time.Now().After(deadline) {
				t.Fatalf("no status in time: %+v %v\n%s", s, err, host.out)
			}
		}
	}
	host, s := begin()
	a, slow, z := s.Transports[0], s.Transports[1], s.Transports[2]
	if !s.Starting || s.Stopping || len(s.Fronts) != 0 {
		t.Errorf("%+v", s)
	}
	if a.State != control.Ready || a.Stats == nil || a.PID == 0 {
		t.Errorf("%+v", a)
	}
	if slow.State != control.Starting || slow.PID == 0 || slow.Since != nil || slow.Restarts != 0 || slow.Stats != nil || !strings.Contains(slow.Progress, "PROGRESS=40") {
		t.Errorf("%+v", slow)
	}
	if z.State != control.Starting || z.PID != 0 {
		t.Errorf("%+v", z)
	}
	out := must(t, "", "status")
	for _, line := range []string{`(?m)^host: process \d+, starting, `, `(?m)^slow +\S+child +client +starting +\d+ +- +0 `, `slow, last status: .*SUMMARY="?waits for a`} {
		if !regexp.MustCompile(line).MatchString(out) {
			t.Errorf("there is no %s in\n%s", line, out)
		}
	}
	if strings.Contains(out, "\x1b") {
		t.Errorf("%q moves the cursor", out)
	}
	if got := must(t, "", "signal", "add", "slow", `{"body":{}}`); got != "handed to slow\n" {
		t.Error(got)
	}
	if err := os.WriteFile(gate, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	host.awaitUp(t)
	awaitStatus(t, path, func(s control.Status) bool {
		return !s.Starting && s.Transports[1].State == control.Ready && s.Transports[2].State == control.Ready && len(s.Fronts) == 1
	})
	if err := host.stop(t); err != nil {
		t.Error(err)
	}

	host, s = begin()
	if out := must(t, "", "stop"); !strings.Contains(out, "has ended") {
		t.Error(out)
	}
	if err := host.stop(t); err != nil {
		t.Errorf("a host that was stopped while it started ended with %v\n%s", err, host.out)
	}
	if err := syscall.Kill(s.Transports[1].PID, 0); !errors.Is(err, syscall.ESRCH) {
		t.Errorf("the child that was starting is there: %v", err)
	}
}

// A watch goes on until Ctrl-C, and ends with 69 when the host does.
func TestWatch(t *testing.T) {
	runtimeDir(t)
	host := startTool(t, writeConfig(t, oneDirect))
	for _, end := range []func(*exec.Cmd) ptipc.ExitCode{
		func(cmd *exec.Cmd) ptipc.ExitCode {
			if err := cmd.Process.Signal(os.Interrupt); err != nil {
				t.Error(err)
			}
			return ptipc.ExitOK
		},
		func(*exec.Cmd) ptipc.ExitCode {
			if err := host.stop(t); err != nil {
				t.Error(err)
			}
			return ptipc.ExitUnavailable
		},
	} {
		cmd := toolCommand(t.Context(), t, "status", "--watch")
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		lines := bufio.NewScanner(out)
		for range 2 {
			if !lines.Scan() || !strings.Contains(lines.Text(), " mine ready restarts=0 open=0") {
				t.Fatalf("%q %v", lines.Text(), lines.Err())
			}
		}
		want := end(cmd)
		for lines.Scan() {
			continue
		}
		_ = cmd.Wait() // its code is looked at
		if got := ptipc.ExitCode(cmd.ProcessState.ExitCode()); got != want {
			t.Errorf("%v, want %v", got, want)
		}
	}
}

// A second host goes without the default socket, or gets one of its own.
func TestTwoHosts(t *testing.T) {
	path := runtimeDir(t)
	document := writeConfig(t, oneDirect)
	first := startTool(t, document)
	second := startTool(t, document)
	for deadline := time.Now().Add(30 * time.Second); !strings.Contains(second.out.String(), "another host has the control socket"); {
		if time.Now().After(deadline) {
			t.Fatal(second.out.String())
		}
	}
	own := filepath.Join(filepath.Dir(path), "own.sock")
	third := startTool(t, "--control", own, document)
	for at, want := range map[string]*tool{path: first, own: third} {
		s, err := control.NewClient(at).Status(t.Context())
		if err != nil || s.PID != want.cmd.Process.Pid {
			t.Errorf("%s: process %d, want %d: %v", at, s.PID, want.cmd.Process.Pid, err)
		}
	}
	// One that was asked for has to be had.
	if _, said, code := operate(t, "", "run", "--control", own, document); code != ptipc.ExitUnavailable || !strings.Contains(said, "own.sock") {
		t.Errorf("%v %s", code, said)
	}
}

// signalChild is a transport that says hello to the other side and echoes what it
// hears from there.
const signalChild = `#!/usr/bin/env python3
import socket, sys
s = socket.create_server(("127.0.0.1", 0))
print("CMETHOD x socks5 127.0.0.1:%d" % s.getsockname()[1])
print("CMETHODS DONE")
print('CMESSAGE {"body":{"hello":"<&>"}}', flush=True)
for line in sys.stdin:
    word, _, rest = line.strip().partition(" ")
    if word == "SMESSAGE":
        print('CMESSAGE {"body":{"heard":%s}}' % rest, flush=True)
`

func TestSignals(t *testing.T) {
	testpeer.Need(t, "python3")
	path := runtimeDir(t)
	dir := t.TempDir()
	child := filepath.Join(dir, "child")
	if err := os.WriteFile(child, []byte(signalChild), 0o700); err != nil {
		t.Fatal(err)
	}
	mail := filepath.Join(dir, "mail")
	document := map[string]any{
		"transports": map[string]any{
			"people":  map[string]any{"exec": child},
			"dir":     map[string]any{"exec": child, "signals": map[string]any{"dir": mail}},
			"command": map[string]any{"exec": child, "signals": map[string]any{"command": map[string]any{"send": []string{"sh", "-c", `cat > "$1"`, "sh", filepath.Join(dir, "sent")}}}},
		},
	}
	startTool(t, writeConfig(t, document))
	pending := func(n int) {
		awaitStatus(t, path, func(s control.Status) bool { return s.Transports[2].Pending == n })
	}
	pending(1)
	if got, want := must(t, "", "signal", "show", "people"), `{"body":{"hello":"<&>"}}`+"\n"; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
	if got := must(t, "", "signal", "add", "people", `{"body":{"n":1},"peer":"nobody"}`); got != "handed to people\n" {
		t.Error(got)
	}
	must(t, `{"body":{"n":2}}`+"\n", "signal", "add", "people")
	file := filepath.Join(dir, "message")
	if err := os.WriteFile(file, []byte(`{"body":{"n":3}}`), 0o600); err != nil {
		t.Fatal(err)
	}
	must(t, "", "signal", "add", "people", "@"+file)
	must(t, `{"body":{"n":4}}`, "signal", "add", "people", "-")
	pending(5)
	lines := strings.Split(must(t, "", "signal", "show", "people"), "\n")
	for i, want := range []string{`{"body":{"n":1}}`, `{"body":{"n":2}}`, `{"body":{"n":3}}`, `{"body":{"n":4}}`} {
		if want = `{"body":{"heard":` + want + `}}`; lines[i+1] != want {
			t.Errorf("got %s, want %s", lines[i+1], want)
		}
	}
	var all []control.Signal
	if err := json.Unmarshal([]byte(must(t, "", "signal", "show", "--json")), &all); err != nil || len(all) != 5 || all[4].ID != 5 || all[4].Transport != "people" {
		t.Errorf("%+v %v", all, err)
	}
	if got := must(t, "", "signal", "show"); !strings.HasPrefix(got, "# people, message 1 of ") {
		t.Error(got)
	}

	for _, refused := range []struct {
		args     []string
		code     ptipc.ExitCode
		contains string
	}{
		{[]string{"signal", "add", "people", `{"bod":{}}`}, ptipc.ExitDataErr, "SIG-1"},
		{[]string{"signal", "add", "people", `@` + file + `x`}, ptipc.ExitNoInput, "no such file"},
		{[]string{"signal", "add", "other", `{"body":{}}`}, ptipc.ExitUsage, "command, dir, people"},
		{[]string{"signal", "show", "dir"}, ptipc.ExitUsage, mail},
		{[]string{"signal", "add", "command", `{"body":{}}`}, ptipc.ExitUsage, "the command sh"},
		{[]string{"signal", "add"}, ptipc.ExitUsage, "usage"},
	} {
		if _, said, code := operate(t, "", refused.args...); code != refused.code || !strings.Contains(said, refused.contains) {
			t.Errorf("%q: %v %s", refused.args, code, said)
		}
	}

	// What the directory and the command carried.
	awaitFile := func(pattern string) {
		for deadline := time.Now().Add(30 * time.Second); ; {
			found, err := filepath.Glob(pattern)
			if err != nil {
				t.Fatal(err)
			}
			if len(found) == 1 {
				if text, err := os.ReadFile(found[0]); err == nil && strings.TrimSpace(string(text)) == `{"body":{"hello":"<&>"}}` {
					return
				}
			}
			if time.Now().After(deadline) {
				t.Fatalf("%s: %q", pattern, found)
			}
		}
	}
	awaitFile(filepath.Join(mail, "out", "*.json"))
	awaitFile(filepath.Join(dir, "sent"))

	if got := must(t, "", "__complete", "signal", "add", ""); !strings.Contains(got, "people\n") {
		t.Error(got)
	}
}

func TestMetrics(t *testing.T) {
	curl := testpeer.Need(t, "curl")
	path := runtimeDir(t)
	private := filepath.Join(filepath.Dir(filepath.Dir(path)), "private")
	if err := os.Mkdir(private, 0o700); err != nil {
		t.Fatal(err)
	}
	socket := filepath.Join(private, "metrics.sock")
	for url, ask := range map[string]func(said string) []string{
		"unix://" + socket: func(string) []string { return []string{"--unix-socket", socket, "http://ptipc/metrics"} },
		"tcp://127.0.0.1:0": func(said string) []string {
			return []string{regexp.MustCompile(`(?m)^metrics: (http:\S+)$`).FindStringSubmatch(said)[1]}
		},
	} {
		t.Run(url[:4], func(t *testing.T) {
			host := startTool(t, writeConfig(t, map[string]any{"transports": oneDirect["transports"], "fronts": oneDirect["fronts"], "metrics": url}))
			throughSOCKS(t, host.front, serve(t, sendBack), "hello")
			got := run(t, exec.Command(curl, append([]string{"-sS", "--fail", "--max-time", "20"}, ask(host.out.String())...)...))
			for _, line := range []string{
				`ptipc_transport_up{role="client",transport="mine"} 1`,
				`ptipc_transport_connections_opened_total{role="client",transport="mine"} 1`,
				`ptipc_transport_bytes_total{direction="received",role="client",transport="mine"} 5`,
				`ptipc_front_info{address="` + host.front + `",serve="socks5",transport="mine"} 1`,
			} {
				if !strings.Contains(got, line+"\n") {
					t.Errorf("there is no %s in\n%s", line, got)
				}
			}
			status := run(t, exec.Command(curl, "-sS", "--fail", "--max-time", "20", "--unix-socket", path, "http://ptipc/v1/status"))
			if !strings.Contains(status, `"name":"mine"`) {
				t.Error(status)
			}
			if err := host.stop(t); err != nil {
				t.Error(err)
			}
		})
	}
	if _, said, code := operate(t, "", "run", writeConfig(t, map[string]any{"transports": oneDirect["transports"], "metrics": "tcp://192.0.2.1:9"})); code != ptipc.ExitUnavailable || !strings.Contains(said, "metrics") {
		t.Errorf("%v %s", code, said)
	}
}

// A child that somebody else runs has no control lines, and so no signals.
func TestConsoleOfAnAttachedChild(t *testing.T) {
	file, err := config.Parse([]byte(`{"transports":{"a":{"attach":{"x":"127.0.0.1:1"}}}}`))
	if err != nil {
		t.Fatal(err)
	}
	c, err := newConsole(t.Context(), func() {}, file, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	if got := c.signals("a"); got != nil {
		t.Errorf("%v", got)
	}
	if err := c.AddSignal("a", ptipc.Message{}); ptipc.ExitCodeOf(err) != ptipc.ExitUsage {
		t.Error(err)
	}
	if signals, err := c.Signals(""); err != nil || len(signals) != 0 {
		t.Errorf("%v %v", signals, err)
	}
}
