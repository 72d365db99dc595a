package conformance_test

import (
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"pthost/ptipc"
	"pthost/ptipc/conformance"
	"pthost/ptipc/testpeer"
)

var updateReports = flag.Bool("update-reports", false, "write the reports of spec/reports anew, as root and without -short")

// reportPatience is that of the commands in the reports. It is shorter than the 5 seconds
// after which goptlib gives a silent client up.
const reportPatience = 4 * time.Second

// A reportOf is what a file of spec/reports says about one program, or a pair of them.
type reportOf struct {
	file     string
	strict   bool
	subjects func(t *testing.T) []conformance.Subject
}

var reports = []reportOf{
	{"obfs4proxy.md", false, func(t *testing.T) []conformance.Subject {
		return bothRoles(conformance.Subject{Path: testpeer.Need(t, "obfs4proxy"), Generate: ptipc.Opaque(`{"transport":"obfs4","listen":"127.0.0.1:0"}`)})
	}},
	{"snowflake-client.md", false, func(t *testing.T) []conformance.Subject {
		// Nobody is at either address, and the program needs nobody for this.
		return []conformance.Subject{{
			Path: testpeer.Need(t, "snowflake-client"), Role: conformance.Client,
			Config: ptipc.Opaque(`{"transports":{"snowflake":{"url":"https://127.0.0.1:1/","ice":"stun:127.0.0.1:1"}}}`),
		}}
	}},
	{"goptlib.md", false, func(t *testing.T) []conformance.Subject {
		return []conformance.Subject{
			{Path: goptlib(t, "dummy-client"), Role: conformance.Client, Free: true, Config: ptipc.Opaque(`{"transports":{"dummy":{}}}`)},
			{Path: goptlib(t, "dummy-server"), Role: conformance.Server, Config: ptipc.Opaque(`{"transports":{"dummy":{"listen":"127.0.0.1:0"}}}`)},
		}
	}},
	{"ptipc-pt1.md", true, func(t *testing.T) []conformance.Subject {
		return bothRoles(conformance.Subject{Path: tool(t), Args: []string{"pt1"}, Generate: ptipc.Opaque(`{"transport":"websocket","listen":"127.0.0.1:0"}`)})
	}},
}

func bothRoles(s conformance.Subject) []conformance.Subject {
	client, server := s, s
	client.Role, server.Role = conformance.Client, conformance.Server
	return []conformance.Subject{client, server}
}

// goptlib builds an example of Tor's own library.
func goptlib(t *testing.T, name string) (path string) {
	t.Helper()
	source := filepath.Join("/usr/share/doc/golang-goptlib-dev/examples", name, name+".go")
	if _, err := os.Stat(source); err != nil {
		testpeer.Skip(t, "goptlib's examples are not installed; on Debian: apt-get install golang-goptlib-dev")
	}
	path = filepath.Join(t.TempDir(), name)
	build := exec.CommandContext(t.Context(), "go", "build", "-o", path, source)
	build.Env = append(os.Environ(), "GO111MODULE=off", "GOPATH=/usr/share/gocode", "GOFLAGS=")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("building %s: %v\n%s", name, err, out)
	}
	return path
}

// The reports on managed transports say what the suite says now: every verdict, and in the
// table every shortcoming and nothing else.
//
// It is not parallel: on a machine that is busy with the others of this package, programs that are
// slow would fall short of what they keep.
func TestReports(t *testing.T) {
	if testing.Short() {
		t.Skip("-short is set, and the reports are about the cases that wait for limits too")
	}
	for _, of := range reports {
		t.Run(of.file, func(t *testing.T) {
			t.Parallel()
			subjects := of.subjects(t)
			results := judgeAll(t, subjects, of.strict)
			path := filepath.Join("../../spec/reports", of.file)
			text, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			about, block, ok := strings.Cut(string(text), reportHeading)
			if !ok {
				t.Fatalf("%s has no heading %q", path, reportHeading)
			}
			got := reportText(results)
			if *updateReports {
				if err := os.WriteFile(path, []byte(about+reportHeading+got+"```\n"), 0o644); err != nil { //nolint:gosec // everybody may read it
					t.Fatal(err)
				}
				block = got
			}
			if g, w := verdicts(got), verdicts(block); !slices.Equal(g, w) {
				t.Errorf("the program is no more as the report says; run go test ./ptipc/conformance -run TestReports -update-reports, and mend its table\ngot but not reported:\n%s\nreported but not got:\n%s\n%s",
					strings.Join(without(g, w), "\n"), strings.Join(without(w, g), "\n"), got)
			}
			fells := map[string]bool{}
			for i, r := range results {
				for _, name := range r.Names(conformance.FellShort) {
					fells[name] = true
				}
				if of.strict && !r.OK() {
					t.Errorf("as %s it falls short:\n%s", subjects[i].Role, r)
				}
			}
			told := map[string]bool{}
			for _, name := range caseName.FindAllString(about, -1) {
				told[strings.Trim(name, "`")] = true
			}
			for name := range fells {
				if !told[name] {
					t.Errorf("%s says nothing about %s, which fell short", path, name)
				}
			}
			for name := range told {
				if !fells[name] {
					t.Errorf("%s is about %s, which did not fall short", path, name)
				}
			}
		})
	}
}

// judgeAll runs all cases on each subject, some of them side by side, since those that
// fall short wait for all patience. The results are in the order of the cases.
func judgeAll(t *testing.T, subjects []conformance.Subject, strict bool) []conformance.Report {
	t.Helper()
	const side = 4
	parts := make([][side]conformance.Report, len(subjects))
	errs := make([][side]error, len(subjects))
	var runs sync.WaitGroup
	for i, s := range subjects {
		s.Dialect = conformance.PT1
		var names [side][]string
		for n, name := range caseNames(s.Dialect, s.Role) {
			if strings.HasPrefix(name, "LINE-") || strings.HasPrefix(name, "SOCKS-8/") {
				n = 0 // what failures write is looked at in the end
			}
			names[n%side] = append(names[n%side], name)
		}
		for j := range side {
			runs.Go(func() {
				parts[i][j], errs[i][j] = conformance.Run(t.Context(), s, conformance.Options{Slow: true, Strict: strict, Patience: reportPatience, Pattern: exactly(names[j])})
			})
		}
	}
	runs.Wait()
	results := make([]conformance.Report, len(subjects))
	for i := range subjects {
		if err := errors.Join(errs[i][:]...); err != nil {
			t.Fatal(err)
		}
		results[i].Strict = strict
		all := map[string]conformance.Result{}
		for _, part := range parts[i] {
			for _, r := range part.Results {
				all[r.Name] = r
			}
		}
		for _, name := range caseNames(conformance.PT1, subjects[i].Role) {
			results[i].Results = append(results[i].Results, all[name])
		}
	}
	return results
}

const reportHeading = "## The report\n\n```\n"

var (
	caseName = regexp.MustCompile("`[A-Z0-9]+-[0-9]+/[a-z0-9-]+`")
	// What is another one each time.
	volatile = []struct {
		find *regexp.Regexp
		by   string
	}{
		{regexp.MustCompile(`127\.0\.0\.1:[0-9]{2,}`), "127.0.0.1:…"},
		{regexp.MustCompile(` after [0-9.]+m?s\b`), ""},
		{regexp.MustCompile(` /\S*/`), " "},
		{regexp.MustCompile(`\b[0-9]+, before [0-9]+`), "many more"},
	}
	verdictLine = regexp.MustCompile(`(?m)^(?:in the role|held|fell short|could not run) .*$`)
)

// reportText is the part of a report that is made by the suite.
func reportText(results []conformance.Report) string {
	var b strings.Builder
	for _, report := range results {
		for i, r := range report.Results {
			if i == 0 {
				fmt.Fprintf(&b, "in the role %s:\n", r.Role)
			}
			r.Bytes = nil
			name := r.Name
			r.Name = "{name}" // it is no path
			line := r.String()
			for _, v := range volatile {
				line = v.find.ReplaceAllString(line, v.by)
			}
			fmt.Fprintln(&b, strings.Replace(line, "{name}", name, 1))
		}
	}
	return b.String()
}

// verdicts are the cases with their verdicts, without what only root can see if this is
// another user. Whether a program has happened to log anything makes no difference.
func verdicts(text string) []string {
	var all []string
	for _, line := range verdictLine.FindAllString(text, -1) {
		line, _, _ = strings.Cut(line, ": ")
		fields := strings.Fields(line)
		name := fields[len(fields)-1]
		if os.Geteuid() != 0 && slices.Contains(ofRoot, name) || fields[0] != "fell" && slices.Contains(withoutLogs, name) {
			continue
		}
		all = append(all, strings.Join(fields, " "))
	}
	return all
}

func without(from, these []string) []string {
	return slices.DeleteFunc(slices.Clone(from), func(s string) bool { return slices.Contains(these, s) })
}
