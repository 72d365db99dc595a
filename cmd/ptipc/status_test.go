package main

import (
	"strings"
	"testing"
	"time"

	"pthost/cmd/ptipc/internal/control"
	"pthost/ptipc"
	"pthost/ptipc/host"
)

func TestSize(t *testing.T) {
	for n, want := range map[float64]string{
		0: "0 B", 999: "999 B", 1000: "1.0 kB", 999_940: "999.9 kB", 999_960: "1.0 MB", 12_345_678: "12.3 MB", 5e15: "5.0 PB", 5e19: "50000.0 PB",
	} {
		if got := size(n); got != want {
			t.Errorf("%v: %s, want %s", n, got, want)
		}
	}
}

// The live view begins at the top, clears what it does not write, and shows nothing
// that others wrote as it stands.
func TestRedraw(t *testing.T) {
	now := time.Unix(1000, 0)
	var out strings.Builder
	err := redraw(&out, control.Status{Time: now, Started: now.Add(-time.Minute), PID: 7, Stopping: true, Transports: []control.Transport{
		{Name: "a", State: control.Restarting, LastError: "exit\x1b[2J\n\u009b\x07code 1\u202e2", Pending: 2},
	}})
	if err != nil {
		t.Fatal(err)
	}
	got := out.String()
	if !strings.HasPrefix(got, "\x1b[Hhost: process 7, stopping, up for 1m0s\x1b[K\n") || !strings.HasSuffix(got, "\x1b[J") {
		t.Errorf("%q", got)
	}
	if strings.Contains(got, "\x1b[2J") || strings.Contains(got, "\u009b") || !strings.Contains(got, "last error: exit [2J   code 1 2") {
		t.Errorf("%q", got)
	}
	if !strings.Contains(got, "2 messages") || !strings.Contains(got, "(attached)") {
		t.Errorf("%q", got)
	}
}

// The state of a transport follows the events of its child.
func TestConsoleEvents(t *testing.T) {
	c := &console{children: map[string]*childState{}}
	for i, step := range []struct {
		event host.Event
		want  childState
	}{
		{host.Event{Kind: host.Started, Pid: 1}, childState{state: control.Starting, pid: 1, starts: 1}},
		{host.Event{Kind: host.Ready, Pid: 1}, childState{state: control.Ready, pid: 1, starts: 1}},
		{host.Event{Kind: host.Exited, Pid: 1, Err: ptipc.ExitSoftware}, childState{state: control.Ended, starts: 1, lastError: ptipc.ExitSoftware.Error()}},
		{host.Event{Kind: host.Restarting}, childState{state: control.Restarting, starts: 1, lastError: ptipc.ExitSoftware.Error()}},
		{host.Event{Kind: host.Started, Pid: 2}, childState{state: control.Restarting, pid: 2, starts: 2, lastError: ptipc.ExitSoftware.Error()}},
		{host.Event{Kind: host.Exited, Pid: 2}, childState{state: control.Ended, starts: 2, lastError: ptipc.ExitSoftware.Error()}},
		{host.Event{Kind: host.GaveUp, Err: ptipc.ExitConfig}, childState{state: control.Ended, starts: 2, lastError: ptipc.ExitConfig.Error()}},
	} {
		c.event("a", step.event)
		got := *c.children["a"]
		if ready := got.state == control.Ready; ready && got.since.IsZero() {
			t.Errorf("step %d: ready, and never since", i)
		}
		got.since = time.Time{}
		if got != step.want {
			t.Errorf("step %d: %+v, want %+v", i, got, step.want)
		}
	}
}
