package main

import (
	"bytes"
	"encoding/json"
	"runtime"
	"strings"
	"testing"

	"pthost/cmd/ptipc/internal/bench"
)

// A bench of the smallest size shows that every figure is taken. What they say is
// not for a test.
func TestBench(t *testing.T) {
	cmd := toolCommand(t.Context(), t, "bench", "builtin:direct", "{}", "--json", "--duration", "10ms", "--rounds", "1", "--idle", "20")
	// Built with the race detector a process sleeps for a second before it ends, and
	// here there are many.
	cmd.Env = append(cmd.Env, "GORACE=atexit_sleep_ms=0")
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%v: %s", err, &stderr)
	}
	var report bench.Report
	if err := json.Unmarshal(out, &report); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if report.Transport != "builtin:direct" || report.ConnectionFactory != "direct" || report.Bound || report.Rounds != 1 {
		t.Errorf("the head of the report is %+v", report)
	}
	if report.Network.Namespace == (report.Network.Why != "") {
		t.Errorf("the report does not say where the connections ran: %+v", report.Network)
	}
	all := []string{bench.ChildDial, bench.ChildWire, bench.Direct, bench.Relay, bench.SOCKS5, bench.SOCKS5OneWrite}
	if runtime.GOOS != "windows" {
		all = append(all, bench.RelayUnix) // the child has a unix socket there
	}
	processes := []string{bench.ChildDial, bench.Relay}
	want := map[string][]string{
		"bulk.down": {bench.ChildDial, bench.Direct, bench.Relay},
		"bulk.up":   {bench.ChildDial, bench.Direct, bench.Relay},
		"dial.1":    all, "dial.1.p50": all, "dial.1.p99": all,
		"dial.16": all, "dial.16.p50": all, "dial.16.p99": all,
		"rtt.p50": {bench.ChildDial, bench.Direct, bench.Relay, bench.SOCKS5},
		"rtt.p99": {bench.ChildDial, bench.Direct, bench.Relay, bench.SOCKS5},
		"spawn":   {bench.ChildDial, bench.Relay, bench.SOCKS5},

		"packets.64": {bench.ChildDial, bench.Direct, bench.Relay}, "packets.1": {bench.ChildDial, bench.Direct, bench.Relay},
		"packets.1.p50": {bench.ChildDial, bench.Direct, bench.Relay}, "packets.1.p99": {bench.ChildDial, bench.Direct, bench.Relay},
	}
	// These may be nothing, or less than that, when they are as small as here.
	there := map[string][]string{}
	if runtime.GOOS == "linux" {
		if report.Network.CongestionControl == "" {
			t.Error("the report names no congestion control")
		}
		for _, name := range []string{"bulk.down.cpu", "bulk.up.cpu", "dial.1.cpu", "dial.16.cpu", "rtt.cpu", "packets.1.cpu", "packets.64.cpu"} {
			want[name] = processes
		}
		want["dial.1.caller_cpu"], want["dial.16.caller_cpu"] = all, all
		want["rtt.blocking.p50"] = []string{bench.ChildWire, bench.Direct, bench.Relay, bench.SOCKS5}
		want["rtt.blocking.p99"] = want["rtt.blocking.p50"]
		want["rtt.blocking.cpu"] = []string{bench.ChildWire, bench.Relay}
		want["idle.fds"] = processes
		there["packets.64.loss"] = []string{bench.ChildDial, bench.Direct, bench.Relay}
		there["idle.user"] = processes
		there["idle.kernel"] = []string{bench.ChildDial, bench.Direct, bench.Relay, bench.SOCKS5}
	}
	figures := map[string]*bench.Metric{}
	for _, m := range report.Metrics {
		figures[m.Name] = m
		if m.Title == "" || (m.Unit == "") != strings.HasSuffix(m.Name, ".fds") {
			t.Errorf("%s has the title %q and the unit %q", m.Name, m.Title, m.Unit)
		}
	}
	for name, columns := range there {
		for _, column := range columns {
			if figures[name] == nil || figures[name].Values[column] == nil {
				t.Errorf("%s of %s was not measured", name, column)
			}
		}
	}
	for name, columns := range want {
		m := figures[name]
		if m == nil {
			t.Errorf("%s was not measured", name)
			continue
		}
		for _, column := range columns {
			if s := m.Values[column]; s == nil || !(s.Median > 0) || len(s.Rounds) == 0 {
				t.Errorf("%s of %s is %+v", name, column, s)
			}
			if column == columns[0] || column == bench.ChildWire {
				continue
			}
			if v := m.Ratios[columns[0]][column]; !(v > 0) {
				t.Errorf("the ratio of %s to %s is %v", name, column, v)
			}
		}
	}
}

func TestBenchUsage(t *testing.T) {
	for name, test := range map[string]struct {
		args []string
		says string
	}{
		"listen":   {[]string{"--listen", "localhost:1"}, "--listen"},
		"packets":  {[]string{"--packets-to", "localhost:1"}, "--packets-to"},
		"duration": {[]string{"--duration", "0"}, "--duration"},
		"rounds":   {[]string{"--rounds", "0"}, "--rounds"},
		"idle":     {[]string{"--idle", "0"}, "--idle"},
		"only":     {[]string{"--only", "bulk,luck"}, `"luck" is no measurement`},
	} {
		t.Run(name, func(t *testing.T) {
			cmd := toolCommand(t.Context(), t, append([]string{"bench", "builtin:direct", "{}"}, test.args...)...)
			var stderr bytes.Buffer
			cmd.Stderr = &stderr
			if err := cmd.Run(); err == nil || cmd.ProcessState.ExitCode() != 64 {
				t.Errorf("it ended with %v, want exit code 64", err)
			}
			if !strings.Contains(stderr.String(), test.says) {
				t.Errorf("it says %q, and nothing of %q", &stderr, test.says)
			}
		})
	}
}
