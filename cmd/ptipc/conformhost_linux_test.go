package main

import (
	"bytes"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"testing"

	"pthost/ptipc/conformance"
	"pthost/ptipc/conformance/hosts"
	"pthost/ptipc/testpeer"
)

// conformHost runs ptipc conform-host and returns its report.
func conformHost(t *testing.T, args ...string) (report conformance.Report) {
	t.Helper()
	cmd := toolCommand(t.Context(), t, append([]string{"conform-host", "--format", "json"}, args...)...)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil && (cmd.ProcessState == nil || cmd.ProcessState.ExitCode() != int(exitFellShort)) {
		t.Fatalf("%v\n%s", err, errs.String())
	}
	if err := json.Unmarshal(out.Bytes(), &report); err != nil {
		t.Fatalf("%v\n%s", err, out.String())
	}
	return report
}

// Our own host holds in every case, whatever its children speak.
func TestConformHost(t *testing.T) {
	t.Parallel()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	for _, dialect := range []string{"seed", "pt1"} {
		t.Run(dialect, func(t *testing.T) {
			t.Parallel()
			report := conformHost(t, "--strict", "--patience", "10s", "--dialect", dialect, "--", self, "run", "{config}")
			if n := len(hosts.Cases(dialect)); len(report.Results) != n {
				t.Errorf("%d cases of %d", len(report.Results), n)
			}
			for _, r := range report.Results {
				if r.Verdict != conformance.Held {
					t.Error(r)
				}
			}
		})
	}
}

var updateReport = flag.Bool("update-report", false, "write the verdicts of spec/reports/tor.md anew")

const torReport = "../../spec/reports/tor.md"

// verdictLine is the line of a report about one case.
var verdictLine = regexp.MustCompile(`(?m)^(held|fell short|could not run) +(MUST|SHOULD) +([A-Z0-9]+-[0-9]+/[a-z0-9-]+)`)

// unread is the line about a flood that was not read far enough.
var unread = regexp.MustCompile(`(?m)^could not run MUST +(\S+): .* and goes on reading$`)

// verdicts are what a report in text says of each case.
func verdicts(text string) map[string]string {
	all := map[string]string{}
	for _, m := range verdictLine.FindAllStringSubmatch(text, -1) {
		all[m[3]] = m[1] + " " + m[2]
	}
	return all
}

// The report on tor says what the suite finds, in each case. go test -run
// TestConformHostTor ./cmd/ptipc -update-report writes its verdicts anew.
func TestConformHostTor(t *testing.T) {
	t.Parallel()
	tor := testpeer.Need(t, "tor")
	version, err := exec.CommandContext(t.Context(), tor, "--version").Output()
	if err != nil {
		t.Fatal(err)
	}
	report, err := os.ReadFile(torReport)
	if err != nil {
		t.Fatal(err)
	}
	// What is waited for in vain takes all of the patience, so many cases are run at once.
	cmd := toolCommand(t.Context(), t, "conform-host", "--dialect", "pt1", "--patience", "10s", "--parallel", "16", "--",
		tor, "-f", "{dir}/torrc", "--ignore-missing-torrc", "--DataDirectory", "{dir}/tor", "--UseBridges", "1",
		"--ClientTransportPlugin", "probe exec {child}", "--Bridge", "probe 192.0.2.3:80 key=value", "--SocksPort", "0", "--Socks5Proxy", "{proxy}")
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); cmd.ProcessState == nil || cmd.ProcessState.ExitCode() != int(exitFellShort) {
		t.Fatalf("%v, want exit code %d\n%s", err, exitFellShort, errs.String())
	}
	if *updateReport {
		writeTorReport(t, string(report), out.String())
		return
	}
	// tor reads an endless line slower and slower, on a machine with much else to do too
	// slowly to say anything.
	unknown := map[string]bool{}
	for _, m := range unread.FindAllStringSubmatch(out.String(), -1) {
		t.Log(m[0])
		unknown[m[1]] = true
	}
	got, want := verdicts(out.String()), verdicts(string(report))
	if n := len(hosts.Cases(hosts.PT1)); len(got) != n || len(want) != n {
		t.Errorf("%d cases were run, and the report has %d, of %d", len(got), len(want), n)
	}
	for name, v := range got {
		if v != want[name] && !unknown[name] {
			t.Errorf("%s %s, and in the report it %s", name, v, want[name])
		}
	}
	if t.Failed() {
		t.Logf("the report may be one of another tor than\n%s%s", version, out.String())
	}
}

// writeTorReport puts a run's text in the place of that in the report, without what
// differs from run to run.
func writeTorReport(t *testing.T, report, text string) {
	t.Helper()
	text = regexp.MustCompile(`(?m)^\t(child |host |clause:).*\n`).ReplaceAllString(text, "")
	text = regexp.MustCompile(`\((\S*/)?(\S+) conform-child /\S+/`).ReplaceAllString(text, "(ptipc conform-child /tmp/…/")
	before, _, found := strings.Cut(report, "```\n")
	if !found {
		t.Fatal("the report has no verdicts")
	}
	if err := os.WriteFile(torReport, []byte(before+"```\n"+text+"```\n"), 0o644); err != nil { //nolint:gosec // people read it
		t.Fatal(err)
	}
}

// The report says in how many cases our own host holds, which TestConformHost shows.
func TestTorReportCounts(t *testing.T) {
	t.Parallel()
	report, err := os.ReadFile(torReport)
	if err != nil {
		t.Fatal(err)
	}
	want := fmt.Sprintf("in all %d cases of this dialect, and in all %d of the project's own", len(hosts.Cases(hosts.PT1)), len(hosts.Cases(hosts.Seed)))
	if text := strings.Join(strings.Fields(string(report)), " "); !strings.Contains(text, want) {
		t.Errorf("%q is not in the report", want)
	}
}
