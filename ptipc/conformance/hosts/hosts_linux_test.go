package hosts_test

import (
	"context"
	"errors"
	"flag"
	"os"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"pthost/ptipc"
	"pthost/ptipc/conformance"
	"pthost/ptipc/conformance/hosts"
	"pthost/ptipc/proc"
)

// The first argument of this binary when it is something else than the tests.
const (
	asChild    = "hosts-child"
	asLauncher = "hosts-launcher"
	asHost     = "hosts-small-host"
)

func TestMain(m *testing.M) {
	if len(os.Args) > 1 {
		switch os.Args[1] {
		case asChild:
			os.Exit(hosts.Child(os.Args[2:]))
		case asLauncher:
			os.Exit(proc.Launch(os.Args[2:]))
		case asHost:
			os.Exit(runSmallHost(os.Args[2], os.Args[3]))
		}
	}
	// Otherwise every process with the race detector waits a second before it exits.
	os.Setenv("GORACE", "atexit_sleep_ms=0 "+os.Getenv("GORACE"))
	// The tests wait most of the time, so that more of them fit side by side than there
	// are processors.
	flag.Parse()
	if err := flag.Set("test.parallel", strconv.Itoa(5*runtime.GOMAXPROCS(0))); err != nil {
		panic(err)
	}
	goleak.VerifyTestMain(m)
}

func subject(t *testing.T, fault string) hosts.Subject {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	return hosts.Subject{Command: []string{self, asHost, fault, "{config}"}, Child: []string{self, asChild}}
}

func run(t *testing.T, s hosts.Subject, o hosts.Options) conformance.Report {
	t.Helper()
	report, err := hosts.Run(t.Context(), s, o)
	if err != nil {
		t.Fatal(err)
	}
	return report
}

func want(t *testing.T, report conformance.Report, v conformance.Verdict, names ...string) {
	t.Helper()
	got := report.Names(v)
	slices.Sort(got)
	names = slices.Sorted(slices.Values(names))
	if !slices.Equal(got, names) {
		t.Errorf("%s:\n\t%s\nwant\n\t%s\n%s", v, strings.Join(got, "\n\t"), strings.Join(names, "\n\t"), report)
	}
}

// sample are clauses that most hosts have to hold, whatever their fault.
var sample = []string{"ARG-1", "LINE-11", "SOCKS-13"}

// A host that keeps to everything.
func TestSmallHost(t *testing.T) {
	t.Parallel()
	want(t, run(t, subject(t, ""), hosts.Options{Parallel: 8, Patience: 10 * time.Second}), conformance.FellShort)
}

// Each broken host falls short of the cases of its fault, and of no others of the same
// clauses and the sample.
func TestBrokenHosts(t *testing.T) {
	t.Parallel()
	allAddresses := []string{
		"LINE-5/public-address", "LINE-5/name", "LINE-5/any-address", "LINE-5/port-0", "LINE-5/unix-slash", "LINE-5/unix-absolute", "LINE-5/unix-parent",
	}
	for fault, fells := range map[string][]string{
		"writes the wrong configuration":        {"ARG-3/config"},
		"shows secrets on command lines":        {"ARG-4/secret", "ARG-7/deaf"},
		"names no version":                      {"ARG-5/version"},
		"stops reading standard error":          {"LIFE-10/stderr", "LIFE-10/stderr-endless"},
		"wants VERSION":                         {"LINE-3/no-version"},
		"knows no unix sockets":                 {"LINE-5/unix"},
		"never restarts":                        {"LIFE-7/lives-on"},
		"hands HOST to plain children":          {"ARG-6/plain"},
		"dies of garbage":                       {"LINE-1/garbage", "LINE-1/malformed", "SIG-1/garbage"},
		"buffers an endless line":               {"LINE-1/endless"},
		"dies of unknown keywords":              {"LINE-2/unknown-keyword", "LINE-2/like-a-known-one"},
		"hides what is logged":                  {"LINE-9/log", "LINE-9/any-case"},
		"believes a public address":             allAddresses,
		"hides errors":                          {"LINE-8/text", "LINE-8/json", "ERR-3/pointer"},
		"goes around the proxy":                 {"PROXY-2/not-done"},
		"takes any socket":                      {"SOCKS-18/stranger", "LINE-7/nobody-listens"},
		"waits for ever":                        {"LIFE-1/silent"},
		"does not wait for the child to finish": {"LIFE-4/order"},
		"kills the process group alone":         {"LIFE-4/setsid", "LIFE-5/setsid"},
		"restarts in a tight loop":              {"LIFE-6/growing"},
		"restarts after every exit code":        {"LIFE-6/exit-64", "LIFE-6/exit-65", "LIFE-6/exit-77", "LIFE-6/exit-78"},
		"takes other factories":                 {"LIFE-7/other-factories"},
		"leaves the state directory open":       {"LIFE-8/private", "LIFE-8/opened"},
		"shares the state directory":            {"LIFE-8/second"},
		"stops reading":                         {"LIFE-10/stdout", "SIG-4/flood"},
		"loses settings":                        {"SOCKS-2/settings"},
		"sends settings always":                 {"SOCKS-19/no-settings", "SOCKS-19/empty-settings"},
		"looks names up":                        {"SOCKS-13/name"},
		"ends both directions":                  {"SOCKS-15/half-close"},
		"takes a break for an end":              {"SOCKS-15/broken"},
		"makes all errors one":                  {"SOCKS-16/early-refusal"},
		"shakes one hand at a time":             {"SOCKS-9/stalled"},
		"asks everybody for statistics":         {"STAT-3/not-asked"},
		"takes deliveries from anybody":         {"SRV-4/stranger"},
		"shows the address that it is bound to": {"SOCKS-8/delivery"},
		"keeps all signals":                     {"SIG-4/flood"},
	} {
		t.Run(fault, func(t *testing.T) {
			t.Parallel()
			asked := slices.Clone(sample)
			for _, name := range fells {
				clause, _, _ := strings.Cut(name, "/")
				asked = append(asked, clause)
			}
			report := run(t, subject(t, fault), hosts.Options{
				Pattern: `^(` + strings.Join(asked, "|") + `)/`, Patience: 5 * time.Second, Parallel: 2,
			})
			want(t, report, conformance.FellShort, fells...)
		})
	}
}

// A host that leaves everything behind when its leader is killed.
func TestOrphaningHost(t *testing.T) {
	t.Parallel()
	s := subject(t, "waits for ever") // what is left would end by itself otherwise
	s.Command = append([]string{"/bin/sh", "-c", `"$@" & host=$!; trap 'kill $host' TERM; wait; wait`, "sh"}, s.Command...)
	report := run(t, s, hosts.Options{Pattern: "^LIFE-[45]/", Patience: 5 * time.Second, Parallel: 4})
	want(t, report, conformance.FellShort, "LIFE-5/killed", "LIFE-5/stubborn", "LIFE-5/wrapper", "LIFE-5/fork", "LIFE-5/setsid", "LIFE-5/early")
}

func TestUnusable(t *testing.T) {
	t.Parallel()
	good := subject(t, "")
	for what, c := range map[string]struct {
		subject hosts.Subject
		options hosts.Options
		code    ptipc.ExitCode
	}{
		"no command":       {hosts.Subject{Child: good.Child}, hosts.Options{}, ptipc.ExitUsage},
		"no placeholder":   {hosts.Subject{Command: []string{"true"}, Child: good.Child}, hosts.Options{}, ptipc.ExitUsage},
		"no child":         {hosts.Subject{Command: good.Command}, hosts.Options{}, ptipc.ExitUsage},
		"no executable":    {hosts.Subject{Command: []string{"/nowhere", "{child}"}, Child: good.Child}, hosts.Options{}, ptipc.ExitNoInput},
		"no such dialect":  {hosts.Subject{Command: good.Command, Child: good.Child, Dialect: "pt9"}, hosts.Options{}, ptipc.ExitUsage},
		"no such case":     {good, hosts.Options{Pattern: "^NONE-1/"}, ptipc.ExitUsage},
		"no pattern":       {good, hosts.Options{Pattern: "("}, ptipc.ExitUsage},
		"starts something": {hosts.Subject{Command: []string{"true", "{child}"}, Child: good.Child}, hosts.Options{}, ptipc.ExitUnavailable},
	} {
		if _, err := hosts.Run(t.Context(), c.subject, c.options); ptipc.ExitCodeOf(err) != c.code {
			t.Errorf("%s: %v, want exit code %d", what, err, c.code)
		}
	}
}

// The end of a run leaves cases that could not run, and no process.
func TestEndOfARun(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithCancelCause(t.Context())
	ended := errors.New("enough")
	report, err := hosts.Run(ctx, subject(t, ""), hosts.Options{Pattern: "^LIFE-8/", Parallel: 1, OnResult: func(conformance.Result) { cancel(ended) }})
	if err != nil {
		t.Fatal(err)
	}
	last := report.Results[len(report.Results)-1]
	if last.Verdict != conformance.NotRun || !strings.Contains(last.Why, ended.Error()) {
		t.Errorf("%s, although the run was ended", last)
	}
}

// Names of cases are those of clauses, and each is there once.
func TestCases(t *testing.T) {
	t.Parallel()
	form := regexp.MustCompile(`^[A-Z0-9]+-[0-9]+/[a-z0-9-]+$`)
	for _, dialect := range hosts.Dialects() {
		seen := map[string]bool{}
		for _, c := range hosts.Cases(dialect) {
			if !form.MatchString(c.Name) || seen[c.Name] || c.Role != hosts.Role {
				t.Errorf("%+v", c)
			}
			seen[c.Name] = true
		}
	}
}
