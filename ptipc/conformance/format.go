package conformance

import (
	"encoding/json"
	"encoding/xml"
	"fmt"
	"io"
	"slices"
	"strings"

	"pthost/ptipc"
	"pthost/spec"
)

// A Writer writes results in one of the [Formats]: text and tap as they come, json
// and junit in the end.
type Writer struct {
	out    io.Writer
	format string
	strict bool
	report Report
	texts  map[string]string // of the clauses
}

// Formats are the names of what a [Writer] writes: text for people, the Test Anything
// Protocol, version 13, one JSON object, and the XML of JUnit.
func Formats() []string { return []string{"text", "tap", "json", "junit"} }

// NewWriter returns a Writer to out. If it is strict, a SHOULD counts as a MUST.
func NewWriter(out io.Writer, format string, strict bool) (*Writer, error) {
	if !slices.Contains(Formats(), format) {
		return nil, fmt.Errorf("conformance: the format %q is not known; write one of %s: %w", format, strings.Join(Formats(), ", "), ptipc.ExitUsage)
	}
	w := &Writer{out: out, format: format, strict: strict, report: Report{Strict: strict}, texts: map[string]string{}}
	for _, c := range spec.Clauses() {
		w.texts[c.ID] = c.Text
	}
	if format == "tap" {
		if _, err := fmt.Fprintln(out, "TAP version 13"); err != nil {
			return nil, fmt.Errorf("conformance: %w: %w", err, ptipc.ExitIOErr)
		}
	}
	return w, nil
}

// Add takes one result.
func (w *Writer) Add(r Result) error {
	var b strings.Builder
	switch w.format {
	case "text":
		if n := len(w.report.Results); n == 0 || w.report.Results[n-1].Role != r.Role {
			fmt.Fprintf(&b, "in the role %s:\n", r.Role)
		}
		fmt.Fprintln(&b, r)
		if r.Verdict == FellShort {
			fmt.Fprintf(&b, "\tclause:   %s: %s\n", r.Clause, w.texts[r.Clause])
		}
	case "tap":
		w.tap(&b, r)
	}
	w.report.Results = append(w.report.Results, r)
	return w.write(b.String())
}

func (w *Writer) write(text string) error {
	if _, err := io.WriteString(w.out, text); err != nil {
		return fmt.Errorf("conformance: %w: %w", err, ptipc.ExitIOErr)
	}
	return nil
}

// Report is what has been added.
func (w *Writer) Report() Report { return w.report }

// Close writes what can only be written in the end.
func (w *Writer) Close() error {
	switch w.format {
	case "tap":
		return w.write(fmt.Sprintf("1..%d\n", len(w.report.Results)))
	case "json":
		encoder := json.NewEncoder(w.out)
		encoder.SetIndent("", "  ")
		encoder.SetEscapeHTML(false)
		if err := encoder.Encode(w.summary()); err != nil {
			return fmt.Errorf("conformance: %w: %w", err, ptipc.ExitIOErr)
		}
		return nil
	case "junit":
		text, err := xml.MarshalIndent(w.junit(), "", "  ")
		if err != nil {
			return fmt.Errorf("conformance: %w: %w", err, ptipc.ExitSoftware)
		}
		return w.write(xml.Header + string(text) + "\n")
	}
	return w.write(w.report.summary())
}

// A tally counts the verdicts of one level.
type tally struct {
	Held      int `json:"held"`
	FellShort int `json:"fell_short"`
	NotRun    int `json:"could_not_run"`
}

func (r Report) tally(level Level) tally {
	var t tally
	for _, result := range r.Results {
		if result.Level != level {
			continue
		}
		switch result.Verdict {
		case Held:
			t.Held++
		case FellShort:
			t.FellShort++
		case NotRun:
			t.NotRun++
		}
	}
	return t
}

// summary counts the levels apart.
func (r Report) summary() string {
	var b strings.Builder
	for _, level := range []Level{Must, Should} {
		t := r.tally(level)
		fmt.Fprintf(&b, "%-6s %d held, %d fell short, %d could not run\n", level, t.Held, t.FellShort, t.NotRun)
	}
	return b.String()
}

// document is the JSON format.
type document struct {
	OK      bool     `json:"ok"`
	Strict  bool     `json:"strict"`
	Must    tally    `json:"must"`
	Should  tally    `json:"should"`
	Results []Result `json:"results"`
}

func (w *Writer) summary() document {
	return document{w.report.OK(), w.strict, w.report.tally(Must), w.report.tally(Should), w.report.Results}
}

// counts reports whether a result speaks against the child.
func (r Report) counts(result Result) bool {
	return result.Verdict == FellShort && (result.Level == Must || r.Strict)
}

// tap writes one test point. What fell short of a SHOULD is to do, unless that counts.
func (w *Writer) tap(b *strings.Builder, r Result) {
	name := fmt.Sprintf("%s %s %s", r.Role, r.Level, r.Name)
	n := len(w.report.Results) + 1
	switch r.Verdict {
	case Held:
		fmt.Fprintf(b, "ok %d - %s\n", n, name)
		return
	case NotRun:
		fmt.Fprintf(b, "ok %d - %s # SKIP %s\n", n, name, oneLine(r.Why))
		return
	case FellShort:
	}
	todo := ""
	if !w.report.counts(r) {
		todo = " # TODO a SHOULD"
	}
	fmt.Fprintf(b, "not ok %d - %s%s\n  ---\n", n, name, todo)
	for _, field := range [][2]string{{"expected", r.Expected}, {"got", r.Got}, {"clause", w.texts[r.Clause]}} {
		fmt.Fprintf(b, "  %s: %s\n", field[0], yamlString(field[1]))
	}
	fmt.Fprintln(b, "  bytes:")
	for _, line := range r.Bytes {
		fmt.Fprintf(b, "    - %s\n", yamlString(line))
	}
	fmt.Fprintln(b, "  ...")
}

// yamlString quotes a string for YAML, of which JSON is a part.
func yamlString(s string) string {
	var b strings.Builder
	encoder := json.NewEncoder(&b)
	encoder.SetEscapeHTML(false)
	if err := encoder.Encode(s); err != nil {
		return `""` // strings can be encoded
	}
	return strings.TrimSuffix(b.String(), "\n")
}

// oneLine keeps what a child wrote from ending a line or beginning a comment.
func oneLine(s string) string {
	return strings.Map(func(r rune) rune {
		if r < ' ' || r == '#' || r == 0x7f {
			return ' '
		}
		return r
	}, s)
}

// The XML of JUnit, as its readers agree on it.
type (
	junitSuites struct {
		XMLName xml.Name     `xml:"testsuites"`
		Suites  []junitSuite `xml:"testsuite"`
	}
	junitSuite struct {
		Name     string      `xml:"name,attr"`
		Tests    int         `xml:"tests,attr"`
		Failures int         `xml:"failures,attr"`
		Skipped  int         `xml:"skipped,attr"`
		Time     string      `xml:"time,attr"`
		Cases    []junitCase `xml:"testcase"`
	}
	junitCase struct {
		Class   string     `xml:"classname,attr"`
		Name    string     `xml:"name,attr"`
		Time    string     `xml:"time,attr"`
		Failure *junitText `xml:"failure"`
		Skipped *junitText `xml:"skipped"`
	}
	junitText struct {
		Message string `xml:"message,attr"`
		Text    string `xml:",chardata"`
	}
)

// junit has a suite for each role.
func (w *Writer) junit() junitSuites {
	var all junitSuites
	seconds := 0.0
	for _, r := range w.report.Results {
		if n := len(all.Suites); n == 0 || all.Suites[n-1].Name != r.Role {
			all.Suites = append(all.Suites, junitSuite{Name: r.Role})
			seconds = 0
		}
		suite := &all.Suites[len(all.Suites)-1]
		c := junitCase{Class: r.Role + "." + r.Clause, Name: r.Name, Time: fmt.Sprintf("%.3f", r.Seconds)}
		switch {
		case r.Verdict == NotRun:
			c.Skipped = &junitText{Message: r.Why}
			suite.Skipped++
		case w.report.counts(r):
			c.Failure = &junitText{"expected " + r.Expected + ", got " + r.Got, r.String() + "\n\tclause:   " + w.texts[r.Clause] + "\n"}
			suite.Failures++
		case r.Verdict == FellShort:
			c.Skipped = &junitText{"fell short of a SHOULD", r.String() + "\n"}
			suite.Skipped++
		}
		suite.Tests++
		seconds += r.Seconds
		suite.Time = fmt.Sprintf("%.3f", seconds)
		suite.Cases = append(suite.Cases, c)
	}
	return all
}
