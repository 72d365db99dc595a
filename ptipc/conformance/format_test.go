package conformance_test

import (
	"encoding/json"
	"encoding/xml"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"pthost/ptipc"
	"pthost/ptipc/conformance"
	"pthost/ptipc/testpeer"
)

// results have every verdict and level, and text that formats have to keep apart.
func results() []conformance.Result {
	of := func(role string, level conformance.Level, name string, v conformance.Verdict) conformance.Result {
		clause, _, _ := strings.Cut(name, "/")
		r := conformance.Result{Case: conformance.Case{Clause: clause, Name: name, Level: level, Role: role}, Verdict: v, Seconds: 0.25}
		switch v {
		case conformance.FellShort:
			r.Expected, r.Got = "reply 00 & <this>", "two\nlines # \"quoted\"\x1b"
			r.Bytes = []string{`client > 05 01 00 |...|`, "stdout \"a: 'b' - # ]]>\""}
		case conformance.NotRun:
			r.Why = "no\nroot # TODO"
		case conformance.Held:
		}
		return r
	}
	return []conformance.Result{
		of(conformance.Client, conformance.Must, "SOCKS-5/one", conformance.Held),
		of(conformance.Client, conformance.Must, "SOCKS-5/two", conformance.FellShort),
		of(conformance.Client, conformance.Should, "CFG-2/three", conformance.FellShort),
		of(conformance.Server, conformance.Must, "SRV-1/four", conformance.NotRun),
		of(conformance.Server, conformance.Should, "CFG-2/five", conformance.Held),
	}
}

func format(t *testing.T, name string, strict bool, results []conformance.Result) (string, conformance.Report) {
	t.Helper()
	var out strings.Builder
	w, err := conformance.NewWriter(&out, name, strict)
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range results {
		if err := w.Add(r); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return out.String(), w.Report()
}

func TestFormatText(t *testing.T) {
	got, _ := format(t, "text", false, results())
	for _, want := range []string{
		"in the role client:\nheld          MUST   SOCKS-5/one\nfell short    MUST   SOCKS-5/two\n\texpected: reply 00",
		"\n\tclient > 05 01 00 |...|\n", "\n\tclause:   SOCKS-5: A server MUST take a whole handshake in one segment",
		"in the role server:\ncould not run MUST   SRV-1/four: no\n",
		"MUST   1 held, 1 fell short, 1 could not run\nSHOULD 1 held, 1 fell short, 0 could not run\n",
	} {
		if !strings.Contains(got, want) {
			t.Errorf("%q is not in\n%s", want, got)
		}
	}
}

func TestFormatJSON(t *testing.T) {
	for _, strict := range []bool{false, true} {
		text, report := format(t, "json", strict, results())
		var got struct {
			OK     bool `json:"ok"`
			Strict bool `json:"strict"`
			Must   struct {
				Held      int `json:"held"`
				FellShort int `json:"fell_short"`
				NotRun    int `json:"could_not_run"`
			} `json:"must"`
			Results []conformance.Result `json:"results"`
		}
		if err := json.Unmarshal([]byte(text), &got); err != nil {
			t.Fatal(err)
		}
		if got.OK || got.Strict != strict || got.Must.Held != 1 || got.Must.FellShort != 1 || got.Must.NotRun != 1 || len(got.Results) != 5 {
			t.Errorf("%+v", got)
		}
		second, want := got.Results[1], results()[1]
		if second.Name != want.Name || second.Role != want.Role || second.Got != want.Got || second.Bytes[1] != want.Bytes[1] || second.Seconds != 0.25 {
			t.Errorf("%+v", second)
		}
		if report.OK() {
			t.Error("the report is OK although a MUST fell short")
		}
	}
}

func TestFormatJUnit(t *testing.T) {
	type suites struct {
		XMLName xml.Name `xml:"testsuites"`
		Suites  []struct {
			Name                     string `xml:"name,attr"`
			Tests, Failures, Skipped int    `xml:",attr"`
			Time                     string `xml:"time,attr"`
			Cases                    []struct {
				Class   string `xml:"classname,attr"`
				Name    string `xml:"name,attr"`
				Failure *struct {
					Message string `xml:"message,attr"`
					Text    string `xml:",chardata"`
				} `xml:"failure"`
				Skipped *struct {
					Message string `xml:"message,attr"`
				} `xml:"skipped"`
			} `xml:"testcase"`
		} `xml:"testsuite"`
	}
	for _, tt := range []struct {
		strict   bool
		failures string
	}{{false, `failures="1" skipped="1"`}, {true, `failures="2" skipped="0"`}} {
		text, _ := format(t, "junit", tt.strict, results())
		var got suites
		if err := xml.Unmarshal([]byte(text), &got); err != nil {
			t.Fatalf("%v\n%s", err, text)
		}
		if len(got.Suites) != 2 || got.Suites[0].Name != "client" || len(got.Suites[0].Cases) != 3 || got.Suites[0].Time != "0.750" {
			t.Fatalf("%+v", got)
		}
		if !strings.Contains(text, `tests="3" `+tt.failures) {
			t.Errorf("strict is %v, and there is no %s in\n%s", tt.strict, tt.failures, text)
		}
		fell := got.Suites[0].Cases[1]
		if fell.Class != "client.SOCKS-5" || fell.Failure == nil || !strings.Contains(fell.Failure.Text, "client > 05 01 00") || !strings.Contains(fell.Failure.Message, "& <this>") {
			t.Errorf("%+v", fell)
		}
		if should := got.Suites[0].Cases[2]; (should.Failure != nil) != tt.strict || (should.Skipped != nil) == tt.strict {
			t.Errorf("strict is %v: %+v", tt.strict, should)
		}
		if skipped := got.Suites[1].Cases[0].Skipped; skipped == nil || !strings.Contains(skipped.Message, "root") {
			t.Errorf("%+v", skipped)
		}
	}
}

// The lines of TAP are read here, and as a whole by a program that others wrote.
func TestFormatTAP(t *testing.T) {
	for _, strict := range []bool{false, true} {
		text, _ := format(t, "tap", strict, results())
		point := regexp.MustCompile(`^(not )?ok (\d+) - ([^#]*?)(?: # (SKIP|TODO) .*)?$`)
		var got []string
		inYAML := false
		for line := range strings.Lines(text) {
			line = strings.TrimSuffix(line, "\n")
			if inYAML = inYAML && line != "  ..." || line == "  ---"; inYAML || line == "  ..." {
				if !strings.HasPrefix(line, "  ") {
					t.Errorf("%q ends the block", line)
				}
				continue
			}
			if m := point.FindStringSubmatch(line); m != nil {
				got = append(got, m[1]+m[3]+m[4])
			} else if line != "TAP version 13" && line != "1..5" {
				t.Errorf("%q is no line of TAP", line)
			}
		}
		todo := "TODO"
		if strict {
			todo = ""
		}
		want := "client MUST SOCKS-5/one\nnot client MUST SOCKS-5/two\nnot client SHOULD CFG-2/three" + todo + "\nserver MUST SRV-1/fourSKIP\nserver SHOULD CFG-2/five"
		if strings.Join(got, "\n") != want {
			t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), want)
		}

		prove := testpeer.Need(t, "prove")
		file := filepath.Join(t.TempDir(), "out.tap")
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		out, err := exec.CommandContext(t.Context(), prove, "-v", file).CombinedOutput()
		var exit *exec.ExitError
		if !errors.As(err, &exit) {
			t.Fatalf("%v\n%s", err, out)
		}
		failed := "Failed test:  2\n"
		if strict {
			failed = "Failed tests:  2-3\n"
		}
		if !strings.Contains(string(out), failed) || strings.Contains(string(out), "Parse errors") {
			t.Errorf("strict is %v:\n%s", strict, out)
		}
	}
}

func TestFormatErrors(t *testing.T) {
	if _, err := conformance.NewWriter(nil, "html", false); ptipc.ExitCodeOf(err) != ptipc.ExitUsage || !strings.Contains(err.Error(), "text, tap, json, junit") {
		t.Error(err)
	}
}

// A SHOULD counts only if the report is strict.
func TestStrict(t *testing.T) {
	held, should := results()[0], results()[2]
	for _, strict := range []bool{false, true} {
		if report := (conformance.Report{Strict: strict, Results: []conformance.Result{held, should}}); report.OK() == strict {
			t.Errorf("strict is %v, and OK %v", strict, report.OK())
		}
	}
}
