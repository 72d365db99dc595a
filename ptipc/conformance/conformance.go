package conformance

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"pthost/ptipc"
)

// A Subject is the child that is looked at, and what the suite has to know of it.
type Subject struct {
	// Path is the executable: a path, or a name to be looked for in PATH.
	Path string
	// Args are the executable's own arguments, before the role.
	Args []string
	// Dialect is what the child speaks: [Seed], which is also "", [PT1] or [PT2]. In the
	// latter two Config is the configuration that a host of ours takes in this dialect
	// (adapters/pt1, adapters/pt2), and so is Generate.
	Dialect string
	// Role is what is looked at: [Client], which is also "", [Server] or, of the dialect
	// Seed, [Generate].
	Role string
	// Generate are options with which the child, in the role generate, makes
	// configurations for a server that listens on this machine's loopback and for its
	// client. With them, each side is started with what was generated, a server is
	// reached through the child's own client, and a client through a server that
	// leads to the suite. A server of datagrams has to lead to an echo server, for
	// which Echoes is set. Without them, a server is started with Config and its wire
	// has to be plain TCP, and the role generate can be asked little.
	Generate ptipc.Opaque
	// Config is a configuration that works, unless there is Generate. It stands on the
	// child's command line, where other users of the machine can read it: use one
	// without secrets of worth.
	Config ptipc.Opaque
	// Plain says that the child takes neither HOST nor "-" (ARG-6). Cases that need
	// them cannot run.
	Plain bool
	// Factory is the name of the connection factory to use; "" is the only one.
	Factory string
	// Free says of a managed transport's client that it connects to wherever CONNECT says
	// and that no server of the transport need be there, so that the suite can be there.
	// In the dialect Seed the child says so itself.
	Free bool
	// Settings are those that a connection needs, nil if it needs none.
	Settings ptipc.Opaque
	// Dest is an echo server (RFC 862), host:port, for a free transport whose far end
	// cannot reach this machine's loopback. "" is one that the suite runs, which lets
	// it look at the far end too. A bound transport has none.
	Dest string
	// Echoes says that what a bound transport leads to, or a bound server that connects
	// its clients itself, is an echo server. Without one, cases that need bytes to
	// come back cannot run.
	Echoes bool
}

// The roles of ARG-1, which are what cases are about.
const (
	Client   = "client"
	Server   = "server"
	Generate = "generate"
)

// Options say which cases are run, and how.
type Options struct {
	// Pattern is a regular expression that the names of the cases must match.
	Pattern string
	// Slow also runs the cases that wait for limits of ten seconds.
	Slow bool
	// Strict makes a SHOULD count as a MUST.
	Strict bool
	// OnResult is called with each result as it comes. It may be nil.
	OnResult func(Result)
	// Patience bounds the wait for each single thing that a child has to do. 0 is 5
	// seconds.
	Patience time.Duration
}

const (
	defaultPatience = 5 * time.Second
	// limit is how long a child may leave a client or a configuration line waiting
	// (ARG-4, SOCKS-6, SOCKS-9).
	limit = 10 * time.Second
	// caseTimeout bounds one case with everything that it waits for.
	caseTimeout = 2 * time.Minute
)

// A Level is how much a clause demands.
type Level string

// The levels, as in RFC 2119.
const (
	Must   Level = "MUST"
	Should Level = "SHOULD"
)

// A Case is one question to a child.
type Case struct {
	Clause string `json:"clause"` // for example SOCKS-5
	Name   string `json:"name"`   // for example SOCKS-5/byte-by-byte
	Level  Level  `json:"level"`
	Slow   bool   `json:"slow,omitempty"` // run only with Options.Slow
	Role   string `json:"role"`           // in which the child is asked

	run func(*trial)
}

func newCase(level Level, name string, run func(*trial)) Case {
	clause, _, _ := strings.Cut(name, "/")
	return Case{Clause: clause, Name: name, Level: level, Role: Client, run: run}
}

func must(name string, run func(*trial)) Case   { return newCase(Must, name, run) }
func should(name string, run func(*trial)) Case { return newCase(Should, name, run) }

func slow(c Case) Case {
	c.Slow = true
	return c
}

// in returns cases as they are asked in a role.
func in(role string, cases []Case) []Case {
	cases = slices.Clone(cases)
	for i := range cases {
		cases[i].Role = role
	}
	return cases
}

// Cases returns the cases of a dialect, in all roles and in the order in which they are
// run. A case that is asked in several roles is there once for each.
func Cases(dialect string) []Case {
	switch dialect {
	case PT1, PT2:
		return managedCases(dialect)
	}
	anyChild := slices.Concat(commandLineCases, configCases)
	staying := slices.Concat(anyChild, announcedCases, stateCases, watchedCases, anyProxyCases, anyLineCases)
	return slices.Concat(
		argCases, staying, socksCases, farCases, errCases, statCases, lifeCases, proxyCases, watchedProxyCases, packetCases, lineCases, endCases, signalCases, writtenCases,
		in(Server, slices.Concat(staying, serverCases, serverEndCases, serverSignalCases, writtenCases)),
		in(Generate, slices.Concat(anyChild, generateCases)),
	)
}

// A Verdict is how a case went.
type Verdict string

// The verdicts.
const (
	Held      Verdict = "held"
	FellShort Verdict = "fell short"
	NotRun    Verdict = "could not run"
)

// A Result is the answer to one case.
type Result struct {
	Case
	Verdict  Verdict  `json:"verdict"`
	Why      string   `json:"why,omitempty"`      // why the case could not run
	Expected string   `json:"expected,omitempty"` // what was expected of a child that fell short,
	Got      string   `json:"got,omitempty"`      // and what came
	Bytes    []string `json:"bytes,omitempty"`    // what went over the wire and the pipes then
	Seconds  float64  `json:"seconds"`            // how long it took
}

// String is one line, and for a case that fell short all that is known of it.
func (r Result) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%-13s %-6s %s", r.Verdict, r.Level, r.Name)
	if r.Why != "" {
		fmt.Fprintf(&b, ": %s", r.Why)
	}
	if r.Verdict == FellShort {
		fmt.Fprintf(&b, "\n\texpected: %s\n\tgot:      %s", r.Expected, strings.ReplaceAll(r.Got, "\n", "\n\t          "))
		for _, line := range r.Bytes {
			fmt.Fprintf(&b, "\n\t%s", line)
		}
	}
	return b.String()
}

// A Report is the results of a run, in the order of the cases.
type Report struct {
	Strict  bool     `json:"strict"` // as in [Options]
	Results []Result `json:"results"`
}

// OK reports whether every case of a MUST that could run has held, and one at least
// did. If the report is strict, those of a SHOULD must have held as well.
func (r Report) OK() bool {
	held := false
	for _, result := range r.Results {
		held = held || result.Verdict == Held
		if r.counts(result) {
			return false
		}
	}
	return held
}

// Names returns the names of the cases with a verdict.
func (r Report) Names(v Verdict) []string {
	var names []string
	for _, result := range r.Results {
		if result.Verdict == v {
			names = append(names, result.Name)
		}
	}
	return names
}

// String lists the results and counts those of each level.
func (r Report) String() string {
	var b strings.Builder
	for _, result := range r.Results {
		fmt.Fprintln(&b, result)
	}
	b.WriteString(r.summary())
	return b.String()
}

// Run runs the cases one after the other, each with a child of its own or, where
// that makes no difference, with one that several share. Nothing is left when it
// returns. The error is about the suite, not about the child: a pattern that is
// none, an executable that is not there, or a machine without room for a directory
// or a socket. When ctx ends, the
// cases that are left could not run.
func Run(ctx context.Context, subject Subject, options Options) (Report, error) {
	report := Report{Strict: options.Strict}
	cases, err := CasesOf(subject.Dialect, subject.Role, options)
	if err != nil {
		return report, err
	}
	s, err := newSuite(subject, options)
	if err != nil {
		return report, err
	}
	defer s.close()
	for _, c := range cases {
		result := s.judge(ctx, c)
		report.Results = append(report.Results, result)
		if options.OnResult != nil {
			options.OnResult(result)
		}
	}
	return report, nil
}

// Test runs each case as a subtest. A MUST that the child falls short of is an
// error, a SHOULD is logged unless Options.Strict is set, and what could not run is
// skipped.
func Test(t *testing.T, subject Subject, options Options) {
	t.Helper()
	cases, err := CasesOf(subject.Dialect, subject.Role, options)
	if err != nil {
		t.Fatal(err)
	}
	s, err := newSuite(subject, options)
	if err != nil {
		t.Fatal(err)
	}
	defer s.close()
	for _, c := range cases {
		t.Run(c.Name, func(t *testing.T) {
			switch result := s.judge(t.Context(), c); {
			case result.Verdict == NotRun:
				t.Skip(result)
			case result.Verdict == FellShort && (c.Level == Must || options.Strict):
				t.Error(result)
			case result.Verdict == FellShort:
				t.Log(result)
			}
		})
	}
}

// ErrNoCase says that no case is named as Options.Pattern wants.
var ErrNoCase = errors.New("no case matches")

// CasesOf returns the cases that a run in a dialect and a role would run, in their order.
// The error is [ErrNoCase] when there are none, and otherwise about dialect, role or
// pattern.
func CasesOf(dialect, role string, o Options) ([]Case, error) {
	if dialect != "" && !slices.Contains(Dialects(), dialect) {
		return nil, fmt.Errorf("conformance: Subject.Dialect is %q; it is %s: %w", dialect, strings.Join(Dialects(), " or "), ptipc.ExitUsage)
	}
	switch role {
	case "":
		role = Client
	case Client, Server:
	case Generate:
		if dialect != "" && dialect != Seed {
			return nil, fmt.Errorf("conformance: managed transports have no role %s: it is client or server: %w", role, ptipc.ExitUsage)
		}
	default:
		return nil, fmt.Errorf("conformance: Subject.Role is %q; it is client, server or generate: %w", role, ptipc.ExitUsage)
	}
	pattern, err := regexp.Compile(o.Pattern)
	if err != nil {
		return nil, fmt.Errorf("conformance: the pattern %q: %w: %w", o.Pattern, err, ptipc.ExitUsage)
	}
	var cases []Case
	for _, c := range Cases(dialect) {
		if c.Role == role && pattern.MatchString(c.Name) && (o.Slow || !c.Slow) {
			cases = append(cases, c)
		}
	}
	if len(cases) == 0 {
		return nil, fmt.Errorf("conformance: %w %q in the role %s; names are like SOCKS-5/byte-by-byte, some are run with Slow alone: %w", ErrNoCase, o.Pattern, role, ptipc.ExitUsage)
	}
	return cases, nil
}

// A suite is one run: what its cases have in common.
type suite struct {
	subject  Subject
	patience time.Duration
	base     string     // everything that the run writes is in here
	echo     *farEnd    // the destination of a free transport
	far      *farServer // what a generated client leads to; nil before it is needed
	shared   *child     // for cases that leave a child as it was; nil if none runs
	unready  bool       // a child did not get ready as it is usually started
	stays    bool       // a child did not end at the end of its standard input
	lines    []outLine  // what all children have written on standard output
}

func newSuite(subject Subject, options Options) (*suite, error) {
	if subject.Path == "" {
		return nil, fmt.Errorf("conformance: Subject.Path is empty; name an executable: %w", ptipc.ExitUsage)
	}
	if _, err := exec.LookPath(subject.Path); err != nil {
		return nil, fmt.Errorf("conformance: the executable: %w: %w", err, ptipc.ExitNoInput)
	}
	if subject.Dest != "" {
		host, port, err := net.SplitHostPort(subject.Dest)
		if _, perr := strconv.ParseUint(port, 10, 16); err != nil || perr != nil || len(host) > 255 {
			return nil, fmt.Errorf("conformance: Subject.Dest is %q; write host:port with a port number: %w", subject.Dest, ptipc.ExitUsage)
		}
	}
	if subject.Role == "" {
		subject.Role = Client
	}
	if subject.Dialect == "" {
		subject.Dialect = Seed
	}
	if subject.Dialect != Seed {
		if err := checkManaged(subject); err != nil {
			return nil, err
		}
	}
	if options.Patience == 0 {
		options.Patience = defaultPatience
	}
	base, err := os.MkdirTemp("", "conformance")
	if err != nil {
		return nil, fmt.Errorf("conformance: a directory for the child: %w", err)
	}
	echo, err := newFarEnd(echo)
	if err != nil {
		os.RemoveAll(base)
		return nil, fmt.Errorf("conformance: an echo server: %w", err)
	}
	return &suite{subject: subject, patience: options.Patience, base: base, echo: echo}, nil
}

func (s *suite) close() {
	s.dropShared()
	if s.far != nil {
		s.far.close()
	}
	s.echo.close()
	os.RemoveAll(s.base)
}

// dropShared ends the shared child: a new one is in a state that is known.
func (s *suite) dropShared() {
	if s.shared != nil {
		s.keep(s.shared)
		s.shared.stop()
		s.shared = nil
	}
}

// judge runs one case. It ends by itself, or because one of its checks ended it.
func (s *suite) judge(ctx context.Context, c Case) Result {
	ctx, cancel := context.WithTimeout(ctx, caseTimeout)
	defer cancel()
	t := &trial{ctx: ctx, suite: s, result: Result{Case: c}}
	if err := context.Cause(ctx); err != nil {
		t.result.Verdict, t.result.Why = NotRun, "the run was ended: "+err.Error()
		return t.result
	}
	began := time.Now()
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		defer t.cleanUp()
		c.run(t)
		t.result.Verdict = Held
	}()
	<-ended
	t.result.Seconds = time.Since(began).Seconds()
	if t.result.Verdict == FellShort {
		s.dropShared()
	}
	return t.result
}
