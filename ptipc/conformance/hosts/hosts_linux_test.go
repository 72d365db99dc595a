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
	asNanny    = "hosts-nanny"
	asWire     = "hosts-wire"
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
		case asNanny:
			os.Exit(runNanny(os.Args[2], os.Args[3:]))
		case asWire:
			if err := spoil(os.Args[2]); err != nil {
				panic(err)
			}
			os.Exit(proc.Launch(os.Args[3:]))
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

// A host that keeps to everything.
func TestSmallHost(t *testing.T) {
	t.Parallel()
	for dialect, pattern := range map[string]string{hosts.Seed: "", hosts.PT1: "^(PT1|PROXY|SOCKS)-"} {
		t.Run(dialect, func(t *testing.T) {
			t.Parallel()
			s := subject(t, "")
			s.Dialect = dialect
			if wholeMatrix() {
				pattern = ""
			}
			report := run(t, s, hosts.Options{Pattern: pattern, Parallel: 8, Patience: 10 * time.Second})
			want(t, report, conformance.FellShort)
			want(t, report, conformance.NotRun)
		})
	}
}

// wholeMatrix says that each broken host is held against all cases, and not just those
// that are about its fault and a few others: that takes thousands of processes.
func wholeMatrix() bool { return os.Getenv("PTIPC_NO_SKIP") != "" && !testing.Short() }

// A fault of a host makes it fall short of the cases that are about it, and of those that
// depend on it, and of no others.
type fault struct {
	name    string
	dialect string // "" is hosts.Seed
	fells   []string
}

var faults = []fault{
	{name: "writes a word before the role", fells: []string{"ARG-1/form"}},
	{name: "writes the wrong configuration", fells: []string{"ARG-3/config"}},
	{name: "shows secrets on command lines", fells: []string{"ARG-4/secret", "ARG-7/deaf"}},
	{name: "names no version", fells: []string{"ARG-5/version"}},
	{name: "hands HOST to plain children", fells: []string{"ARG-6/plain"}},
	{name: "refuses long lines", fells: []string{"LINE-1/too-long"}},
	{name: "dies of garbage", fells: []string{"LINE-1/garbage", "LINE-1/malformed", "SIG-1/garbage"}},
	{name: dropsCR, fells: []string{"LINE-1/crlf"}},
	{name: readsAreLines, fells: []string{"LINE-1/pieces"}},
	{name: "buffers an endless line", fells: []string{"LINE-1/endless"}},
	{name: "dies of unknown keywords", fells: []string{"LINE-2/unknown-keyword", "LINE-2/like-a-known-one"}},
	{name: "refuses unknown ARGS", fells: []string{"LINE-2/unknown-args"}},
	{name: "wants VERSION first of all", fells: []string{"LINE-3/log-first"}},
	{name: "wants VERSION", fells: []string{"LINE-3/no-version"}},
	{name: "believes a public address", fells: []string{
		"LINE-5/public-address", "LINE-5/name", "LINE-5/any-address", "LINE-5/port-0", "LINE-5/unix-slash", "LINE-5/unix-absolute", "LINE-5/unix-parent",
	}},
	{name: "knows no unix sockets", fells: []string{"LINE-5/unix"}},
	{name: "takes any socket", fells: []string{"SOCKS-18/stranger", "LINE-7/nobody-listens"}},
	{name: "takes a child that offers nothing", fells: []string{"LINE-7/nothing-offered"}},
	{name: "hides errors", fells: []string{"LINE-8/text", "LINE-8/json", "ERR-3/pointer"}},
	{name: "hides what is logged", fells: []string{"LINE-9/log", "LINE-9/any-case"}},
	{name: "waits on after an error", fells: []string{"LINE-11/version-error", "LINE-11/env-error", "LIFE-1/silent"}},
	{name: "goes around the proxy", fells: []string{"PROXY-2/not-done"}},
	{name: "goes on after PROXY-ERROR", fells: []string{"PROXY-2/error"}},
	{name: "waits for ever", fells: []string{"LIFE-1/silent"}},
	{name: "does not wait for the child to finish", fells: []string{"LIFE-4/order"}},
	{name: keepsZombies, fells: []string{"LIFE-4/reaped", "LIFE-4/setsid", "LIFE-5/setsid"}},
	{name: killsNobody, fells: []string{
		"LIFE-1/silent", "LIFE-4/order", "LIFE-4/stubborn", "LIFE-4/wrapper", "LIFE-4/fork", "LIFE-4/setsid",
		"LIFE-5/stubborn", "LIFE-5/wrapper", "LIFE-5/fork", "LIFE-5/setsid", "LIFE-5/early",
	}},
	{name: killsOne, fells: []string{"LIFE-4/wrapper", "LIFE-4/fork", "LIFE-4/setsid", "LIFE-5/wrapper", "LIFE-5/fork", "LIFE-5/setsid"}},
	{name: "kills the process group alone", fells: []string{"LIFE-4/setsid", "LIFE-5/setsid"}},
	{name: "restarts in a tight loop", fells: []string{"LIFE-6/growing"}},
	{name: "restarts after every exit code", fells: []string{"LIFE-6/exit-64", "LIFE-6/exit-65", "LIFE-6/exit-77", "LIFE-6/exit-78"}},
	{name: "never restarts", fells: []string{"LIFE-7/lives-on"}},
	{name: "takes other factories", fells: []string{"LIFE-7/other-factories"}},
	{name: "leaves the state directory open", fells: []string{"LIFE-8/private", "LIFE-8/opened", "SOCKS-8/delivery"}},
	{name: "shares the state directory", fells: []string{"LIFE-8/second"}},
	{name: "stops reading", fells: []string{"LIFE-10/stdout", "SIG-4/flood"}},
	{name: "stops reading standard error", fells: []string{"LIFE-10/stderr", "LIFE-10/stderr-endless"}},
	{name: "loses settings", fells: []string{"SOCKS-2/settings"}},
	{name: "speaks version 4 of SOCKS", fells: []string{"SOCKS-7/connect"}},
	{name: "shows the address that it is bound to", fells: []string{"SOCKS-8/delivery", "SRV-4/stranger"}},
	{name: "shakes one hand at a time", fells: []string{"SOCKS-9/stalled"}},
	{name: "looks names up", fells: []string{"SOCKS-13/name"}},
	{name: "ends both directions", fells: []string{"SOCKS-15/half-close"}},
	{name: "takes a break for an end", fells: []string{"SOCKS-15/broken"}},
	{name: "makes all errors one", fells: []string{"SOCKS-16/early-refusal"}},
	{name: "sends settings always", fells: []string{"SOCKS-19/no-settings", "SOCKS-19/empty-settings"}},
	{name: "asks everybody for statistics", fells: []string{"STAT-3/not-asked"}},
	{name: "waits for statistics", fells: []string{"STAT-3/no-answer"}},
	{name: "takes deliveries from anybody", fells: []string{"SRV-4/stranger"}},
	{name: "keeps all signals", fells: []string{"SIG-4/flood"}},
	{name: "offers no version of managed transports", dialect: hosts.PT1, fells: []string{"PT1-1/environment"}},
	{name: "loses arguments", dialect: hosts.PT1, fells: []string{"PT1-3/arguments"}},
	{name: "does not wait for answers", dialect: hosts.PT1, fells: []string{"PT1-5/step-by-step"}},
	{name: "refuses transports that it did not ask for", dialect: hosts.PT1, fells: []string{"PT1-6/not-asked-for"}},
}

// orphaned are the cases of a host that leaves everything behind when its leader is
// killed.
var orphaned = []string{"LIFE-5/killed", "LIFE-5/stubborn", "LIFE-5/wrapper", "LIFE-5/fork", "LIFE-5/setsid", "LIFE-5/early"}

func clauseOf(name string) string {
	clause, _, _ := strings.Cut(name, "/")
	return clause
}

// floods are cases that take a processor for seconds.
func floods(name string) bool {
	return clauseOf(name) == "LIFE-10" || name == "LINE-1/endless" || name == "SIG-4/flood"
}

// spread is out of how many cases that have nothing to do with a fault one is run. Which
// one differs from fault to fault.
const spread = 16

// casesFor are the cases that the number-th fault is held against: all of the clauses
// that it is about, and some others.
func casesFor(number int, f fault) []string {
	about := map[string]bool{}
	for _, name := range f.fells {
		about[clauseOf(name)] = true
	}
	var names []string
	for i, c := range hosts.Cases(f.dialect) {
		if about[c.Clause] || !floods(c.Name) && (wholeMatrix() || (i+number)%spread == 0) {
			names = append(names, c.Name)
		}
	}
	return names
}

// Each broken host falls short of the cases of its fault, and of no others.
func TestBrokenHosts(t *testing.T) {
	t.Parallel()
	for i, f := range faults {
		if f.dialect == "" {
			f.dialect = hosts.Seed
		}
		t.Run(f.name, func(t *testing.T) {
			t.Parallel()
			s := subject(t, f.name)
			s.Dialect = f.dialect
			report := run(t, s, hosts.Options{
				Pattern: `^(` + strings.Join(casesFor(i, f), "|") + `)$`, Patience: 5 * time.Second, Parallel: 6,
			})
			want(t, report, conformance.FellShort, f.fells...)
		})
	}
}

func TestOrphaningHost(t *testing.T) {
	t.Parallel()
	s := subject(t, "waits for ever") // what is left would end by itself otherwise
	s.Command = append([]string{"/bin/sh", "-c", `"$@" & host=$!; trap 'kill $host' TERM; wait; wait`, "sh"}, s.Command...)
	report := run(t, s, hosts.Options{Pattern: "^LIFE-[45]/", Patience: 5 * time.Second, Parallel: 4})
	want(t, report, conformance.FellShort, orphaned...)
}

// Every case has a broken host that falls short of it: one that cannot fall short would
// say nothing.
func TestEveryCaseCanFallShort(t *testing.T) {
	t.Parallel()
	fells := map[string]bool{}
	for _, name := range orphaned {
		fells[name] = true
	}
	for _, f := range faults {
		for _, name := range f.fells {
			fells[name] = true
		}
	}
	cases := map[string]bool{}
	for _, dialect := range hosts.Dialects() {
		for _, c := range hosts.Cases(dialect) {
			cases[c.Name] = true
			if !fells[c.Name] {
				t.Errorf("no broken host falls short of %s (%s)", c.Name, dialect)
			}
		}
	}
	for name := range fells {
		if !cases[name] {
			t.Errorf("no case has the name %s", name)
		}
	}
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
