package main

import (
	"bytes"
	"encoding/json"
	"os"
	"os/exec"
	"testing"

	"pthost/ptipc/conformance"
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
			if len(report.Results) < 50 {
				t.Errorf("only %d cases", len(report.Results))
			}
			for _, r := range report.Results {
				if r.Verdict != conformance.Held {
					t.Error(r)
				}
			}
		})
	}
}

// tor starts the suite's child, and gets along with one that does what it should.
func TestConformHostTor(t *testing.T) {
	t.Parallel()
	tor := testpeer.Need(t, "tor")
	if out, err := exec.CommandContext(t.Context(), tor, "--version").CombinedOutput(); err == nil {
		t.Logf("%s", out)
	}
	report := conformHost(t, "--dialect", "pt1", "--run", "^(SOCKS-7|PT1-[135])/", "--",
		tor, "-f", "{dir}/torrc", "--ignore-missing-torrc", "--DataDirectory", "{dir}/tor", "--UseBridges", "1",
		"--ClientTransportPlugin", "probe exec {child}", "--Bridge", "probe 192.0.2.3:80 key=value", "--SocksPort", "0", "--Socks5Proxy", "{proxy}")
	if len(report.Results) != 4 {
		t.Errorf("%d cases, want 4", len(report.Results))
	}
	for _, r := range report.Results {
		if r.Verdict != conformance.Held {
			t.Error(r)
		}
	}
}
