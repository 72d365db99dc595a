package host

import (
	"context"
	"fmt"
	"log/slog"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"pthost/ptipc"
)

// LINE-9, LINE-10: what children say goes to the log and to Status, before
// VERSION too (LINE-3).
func TestLogAndStatus(t *testing.T) {
	log := new(capture)
	var mu sync.Mutex
	var statuses []string
	env := ptipc.Env{Log: log.logger(), Status: func(_ context.Context, attrs ...slog.Attr) {
		mu.Lock()
		defer mu.Unlock()
		statuses = append(statuses, fmt.Sprint(attrs))
	}}
	open(t, self("say",
		`STATUS TRANSPORT=x PROGRESS=1 SUMMARY="one \"half\""`,
		`LOG SEVERITY=NOTICE MESSAGE="before VERSION"`,
		"VERSION 1", "CMETHOD x socks5 {tcp}", "CMETHODS DONE",
		`LOG SEVERITY=Warning MESSAGE="two\nlines \303\274"`,
		`LOG SEVERITY=error MESSAGE=bare`,
		`LOG SEVERITY=debug MESSAGE=small`,
		`LOG MESSAGE=lost`,
		`STATUS PROGRESS=2`,
	), `{}`, env)
	eventually(t, "the second status", func() bool { mu.Lock(); defer mu.Unlock(); return len(statuses) == 2 })
	want := []string{`[transport=x PROGRESS=1 SUMMARY=one "half"]`, `[PROGRESS=2]`}
	if !slices.Equal(statuses, want) {
		t.Errorf("statuses %q", statuses)
	}
	for _, line := range []string{
		`level=INFO+2 msg="before VERSION"`, `level=WARN msg="two\nlines ü"`, `level=ERROR msg=bare`, `level=DEBUG msg=small`,
	} {
		if !strings.Contains(log.String(), line) {
			t.Errorf("the log does not hold %s:\n%s", line, log)
		}
	}
}

// LIFE-9: what goes to standard error goes to the log as well.
func TestStandardErrorIsLogged(t *testing.T) {
	log := new(capture)
	refused(t, self("exit", "1", "help"), `{}`, ptipc.Env{Log: log.logger()})
	if !strings.Contains(log.String(), `line=help`) {
		t.Error(log)
	}
}

// LIFE-10: a child that floods its host does not flood the log, nor hide a status.
func TestFloodOfLogLines(t *testing.T) {
	log := new(capture)
	done := make(chan struct{})
	began := time.Now()
	open(t, self("flood"), `{}`, ptipc.Env{Log: log.logger(), Status: func(context.Context, ...slog.Attr) { close(done) }})
	select {
	case <-done:
	case <-within(t).Done():
		t.Fatal("the status behind the flood was lost")
	}
	seconds := int(time.Since(began)/time.Second) + 2
	if n := strings.Count(log.String(), "flood-"); n == 0 || n > seconds*maxLogLines {
		t.Errorf("%d of %d lines were logged in at most %d seconds", n, flooded, seconds)
	}
}

func TestLineLimit(t *testing.T) {
	var l lineLimit
	now := time.Unix(1000, 0)
	for range 2 {
		for i := range 3 * maxLogLines {
			if got := l.allow(now); got != (i < maxLogLines) {
				t.Fatalf("line %d: %v", i, got)
			}
		}
		now = now.Add(time.Second)
	}
}

// What nobody reads does not use up the room of what somebody does.
func TestUnwantedLinesDoNotCount(t *testing.T) {
	log := new(capture)
	c := &child{log: slog.New(slog.NewTextHandler(log, nil))}
	for range 3 * maxLogLines {
		c.say(slog.LevelDebug, "chatter")
	}
	c.say(slog.LevelError, "news")
	if !strings.Contains(log.String(), "msg=news") {
		t.Error("the error was dropped")
	}
}

// Trace shows both directions, and no secret (CFG-2, PROXY-3).
func TestTrace(t *testing.T) {
	var mu sync.Mutex
	var lines []string
	c := self("fixture")
	c.Proxy = "socks5://user:hunter2@127.0.0.1:9"
	c.Trace = func(fromChild bool, line []byte) {
		mu.Lock()
		defer mu.Unlock()
		lines = append(lines, fmt.Sprint(fromChild, " ", string(line)))
	}
	log := new(capture)
	transport := open(t, c, `{"password":"hunter2","say":["password=hunter2","socks5://user:hunter2@x"]}`, ptipc.Env{Log: log.logger()})
	_, err := transport.Connections["free"].Dial(within(t), nil, "example.com:80")
	onlyClass(t, err, ptipc.ErrGeneral) // the proxy is not there: that is not the destination's refusal
	if err := transport.Close(); err != nil {
		t.Error(err)
	}
	mu.Lock()
	defer mu.Unlock()
	trace := strings.Join(lines, "\n")
	for _, want := range []string{`false \{"config":"\*\*\*","host":"\*\*\*"\}`, `true VERSION 1`, `true PROXY DONE`, `true CMETHOD bound socks5 unix:\S+ ARGS:stats=1,ends=1,bound=1`, `true LOG SEVERITY=warning MESSAGE="password=\*\*\*`, `true CMETHODS DONE`} {
		if !regexp.MustCompile(`(?m)^` + want).MatchString(trace) {
			t.Errorf("the trace does not hold %s:\n%s", want, trace)
		}
	}
	if strings.Contains(trace, "hunter2") {
		t.Errorf("the trace tells a secret:\n%s", trace)
	}
	// The transport itself has told its log; nothing else may.
	if n := strings.Count(log.String(), "hunter2"); n != 2 {
		t.Errorf("the log tells a secret:\n%s", log)
	}
}
