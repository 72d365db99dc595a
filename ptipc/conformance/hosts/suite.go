package hosts

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"sync"
	"time"

	"pthost/ptipc"
	"pthost/ptipc/conformance"
)

// Role is what results of this suite have as their role.
const Role = "host"

// The dialects of children that the suite can be.
const (
	Seed = "seed" // spec/ptipc.md
	PT1  = "pt1"  // managed transports of Tor, spec/pt1.md
)

// Dialects are the values of Subject.Dialect.
func Dialects() []string { return []string{Seed, PT1} }

// A Subject is the host that is looked at.
type Subject struct {
	// Command starts the host in the foreground; SIGTERM stops it. In its words
	// {child} is replaced by the path of the transport's executable, {config} by that of
	// a HOST.json (spec/host.schema.json), {front} by the ip:port at which the
	// host has to serve an ordinary SOCKS5 proxy, {proxy} by the ip:port of an upstream
	// proxy, and {dir} by an empty directory of the host's own. {child} or {config} must
	// be there. A host with neither {config} nor {front} makes connections by itself, as
	// tor does. The transport's name is "probe".
	Command []string
	// Child is a command that calls [Child] with the arguments that follow it.
	Child []string
	// Dialect is what the child speaks: Seed, which is also "", or PT1.
	Dialect string
}

// Options say which cases are run, and how.
type Options struct {
	// Pattern is a regular expression that the names of the cases must match.
	Pattern string
	// Strict makes a SHOULD count as a MUST.
	Strict bool
	// OnResult is called with each result in the order of the cases. It may be nil.
	OnResult func(conformance.Result)
	// Patience bounds the wait for each single thing that the host has to do. 0 is 5
	// seconds.
	Patience time.Duration
	// Parallel is how many cases are run at once. 0 is twice the processors.
	Parallel int
}

const (
	defaultPatience = 5 * time.Second
	// longest is how long a single thing is waited for that may take more than patience.
	longest = 10 * time.Second
	// caseTimeout bounds one case on a machine that has much else to do.
	caseTimeout = 2 * longest
	// startTimeout is what the suite's HOST.json says.
	startTimeout = 5 * time.Second
)

// Cases returns the cases of a dialect in the order in which they are reported.
func Cases(dialect string) []conformance.Case {
	var cases []conformance.Case
	for _, p := range probes {
		if p.is(dialect) {
			cases = append(cases, p.about())
		}
	}
	return cases
}

// A probe is one case: what the child does and what is expected of the host.
type probe struct {
	name  string
	level conformance.Level
	in    string         // the dialect that it is for; "" is all
	write func(t *trial) // changes HOST.json; the case needs {config} then
	// proxied gives the child an upstream proxy; the case needs {config} or {proxy}.
	proxied bool
	heavy   bool // it is run when no other heavy one is, since it measures
	child   script
	check   func(t *trial)
}

func (p *probe) is(dialect string) bool { return p.in == "" || p.in == dialect }

func (p *probe) about() conformance.Case {
	clause, _, _ := strings.Cut(p.name, "/")
	return conformance.Case{Clause: clause, Name: p.name, Level: p.level, Role: Role}
}

// find returns the probe of a name, nil if there is none.
func find(name string) *probe {
	for i := range probes {
		if probes[i].name == name {
			return &probes[i]
		}
	}
	return nil
}

// CasesOf returns the cases that a run would run. The error is
// [conformance.ErrNoCase] when there are none, and otherwise about dialect or pattern.
func CasesOf(dialect string, o Options) ([]conformance.Case, error) {
	switch dialect {
	case "":
		dialect = Seed
	case Seed, PT1:
	default:
		return nil, fmt.Errorf("hosts: the dialect %q is not known; write one of %s: %w", dialect, strings.Join(Dialects(), ", "), ptipc.ExitUsage)
	}
	pattern, err := regexp.Compile(o.Pattern)
	if err != nil {
		return nil, fmt.Errorf("hosts: the pattern %q: %w: %w", o.Pattern, err, ptipc.ExitUsage)
	}
	var cases []conformance.Case
	for _, c := range Cases(dialect) {
		if pattern.MatchString(c.Name) {
			cases = append(cases, c)
		}
	}
	if len(cases) == 0 {
		return nil, fmt.Errorf("hosts: %w %q under the dialect %s; names are like LIFE-5/setsid: %w", conformance.ErrNoCase, o.Pattern, dialect, ptipc.ExitUsage)
	}
	return cases, nil
}

// suite is one run.
type suite struct {
	subject  Subject
	patience time.Duration
	base     string // everything that the run writes is in here
	net      [2]int // the middle of the loopback addresses of this run's fronts
	heavy    sync.Mutex
}

// Run runs the host once for each case, several at once. Nothing is left when it
// returns. The error is about the suite, not about the host.
func Run(ctx context.Context, subject Subject, o Options) (conformance.Report, error) {
	report := conformance.Report{Strict: o.Strict}
	cases, err := CasesOf(subject.Dialect, o)
	if err != nil {
		return report, err
	}
	s, err := newSuite(subject, o)
	if err != nil {
		return report, err
	}
	defer os.RemoveAll(s.base)
	if err := s.startsIt(ctx); err != nil {
		return report, err
	}
	parallel := o.Parallel
	if parallel <= 0 {
		parallel = 2 * runtime.NumCPU()
	}
	results := make([]chan conformance.Result, len(cases))
	for i := range results {
		results[i] = make(chan conformance.Result, 1)
	}
	var running sync.WaitGroup
	places := make(chan struct{}, parallel)
	running.Go(func() {
		for i, c := range cases {
			places <- struct{}{}
			running.Go(func() {
				defer func() { <-places }()
				results[i] <- s.judge(ctx, i, find(c.Name))
			})
		}
	})
	defer running.Wait()
	for _, result := range results {
		r := <-result
		report.Results = append(report.Results, r)
		if o.OnResult != nil {
			o.OnResult(r)
		}
	}
	return report, nil
}

func newSuite(subject Subject, o Options) (*suite, error) {
	all := strings.Join(subject.Command, "\x00")
	switch {
	case len(subject.Command) == 0:
		return nil, fmt.Errorf("hosts: Subject.Command is empty; name the host: %w", ptipc.ExitUsage)
	case !strings.Contains(all, "{child}") && !strings.Contains(all, "{config}"):
		return nil, fmt.Errorf("hosts: neither {child} nor {config} stands in the command, so the host would not start the suite's child: %w", ptipc.ExitUsage)
	case len(subject.Child) == 0:
		return nil, fmt.Errorf("hosts: Subject.Child is empty; name a command that calls hosts.Child: %w", ptipc.ExitUsage)
	}
	if _, err := exec.LookPath(subject.Command[0]); err != nil {
		return nil, fmt.Errorf("hosts: the host: %w: %w", err, ptipc.ExitNoInput)
	}
	if subject.Dialect == "" {
		subject.Dialect = Seed
	}
	if o.Patience == 0 {
		o.Patience = defaultPatience
	}
	base, err := os.MkdirTemp("", "hosts")
	if err != nil {
		return nil, fmt.Errorf("hosts: a directory: %w", err)
	}
	if base, err = filepath.EvalSymlinks(base); err != nil {
		return nil, fmt.Errorf("hosts: a directory: %w", err)
	}
	//nolint:gosec // addresses need no secret
	return &suite{subject: subject, patience: o.Patience, base: base, net: [2]int{64 + rand.N(128), rand.N(256)}}, nil
}

// startsIt makes sure that the command starts the suite's child: a mistake in it would
// make every case fall short.
func (s *suite) startsIt(ctx context.Context) error {
	if runtime.GOOS != "linux" {
		return nil // no case runs
	}
	p := &probe{name: honest, level: conformance.Must, check: func(t *trial) {
		t.start()
		t.event("start", 1)
	}}
	if r := s.judge(ctx, len(probes), p); r.Verdict != conformance.Held && ctx.Err() == nil {
		return fmt.Errorf("hosts: the command does not start the suite's child: %s%s\n\t%s: %w", r.Got, r.Why, strings.Join(r.Bytes, "\n\t"), ptipc.ExitUnavailable)
	}
	return nil
}

// honest is the case of a child that does what it should.
const honest = "SOCKS-7/connect"

// has reports whether a placeholder stands in the command.
func (s *suite) has(placeholder string) bool {
	return strings.Contains(strings.Join(s.subject.Command, "\x00"), placeholder)
}

// relays reports whether the suite's connections go through the host.
func (s *suite) relays() bool { return s.has("{config}") || s.has("{front}") }

// judge runs one case. It ends by itself, or because one of its checks ended it.
func (s *suite) judge(ctx context.Context, number int, p *probe) conformance.Result {
	t := &trial{run: ctx, suite: s, probe: p, result: conformance.Result{Case: p.about()}}
	if runtime.GOOS != "linux" {
		t.result.Verdict, t.result.Why = conformance.NotRun, "processes are looked at in Linux's /proc"
		return t.result
	}
	if err := context.Cause(ctx); err != nil {
		t.result.Verdict, t.result.Why = conformance.NotRun, "the run was ended: "+err.Error()
		return t.result
	}
	timeout := caseTimeout
	if p.heavy {
		s.heavy.Lock()
		defer s.heavy.Unlock()
		timeout += floodTimeout
	}
	var cancel context.CancelFunc
	t.ctx, cancel = context.WithTimeout(ctx, timeout)
	defer cancel()
	began := time.Now()
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		defer t.cleanUp()
		t.prepare(number)
		t.probe.check(t)
		t.result.Verdict = conformance.Held
	}()
	<-ended
	t.result.Seconds = time.Since(began).Seconds()
	return t.result
}

// object is a JSON object.
type object = map[string]any

// order is what the child reads of its case, from a file beside its executable.
type order struct {
	Case    string `json:"case"`
	Dialect string `json:"dialect"`
	Other   string `json:"other,omitempty"` // the address of somebody else's socket
}

// orderFile and eventFile are in a case's directory.
const (
	orderFile = "order"
	eventFile = "events"
)

func readOrder(dir string) (order, error) {
	var o order
	text, err := os.ReadFile(filepath.Join(dir, orderFile))
	if err == nil {
		err = json.Unmarshal(text, &o)
	}
	return o, err
}

// An event is what a child tells the suite, one line of JSON in a file: nothing that the
// host does to sockets, environment or standard streams is in the way of a file.
type event struct {
	At   time.Time `json:"at"`
	Pid  int       `json:"pid"`
	What string    `json:"what"`

	Args     []string          `json:"args,omitempty"`     // start
	Dir      string            `json:"dir,omitempty"`      // start: the state directory
	Mode     uint32            `json:"mode,omitempty"`     // start: its permissions
	Environ  map[string]string `json:"environ,omitempty"`  // start: TOR_PT_*
	Text     string            `json:"text,omitempty"`     // stdin: the line, cut; failed: why
	Length   int               `json:"length,omitempty"`   // stdin: of the line; first: of CONFIG
	Methods  []byte            `json:"methods,omitempty"`  // greeting: those that were offered
	Method   byte              `json:"method,omitempty"`   // request: the one that was chosen
	Settings string            `json:"settings,omitempty"` // request: JSON, or in pt1 username and password
	Kind     byte              `json:"kind,omitempty"`     // request: the type of the address
	Dest     string            `json:"dest,omitempty"`     // request: host:port
}

// tell appends an event, in one write, so that several processes can.
func tell(dir string, e event) error {
	e.At, e.Pid = time.Now(), os.Getpid()
	line, err := json.Marshal(e)
	if err != nil {
		return err
	}
	f, err := os.OpenFile(filepath.Join(dir, eventFile), os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(append(line, '\n'))
	return errors.Join(err, f.Close())
}

// events reads what has been told so far.
func events(dir string) []event {
	text, err := os.ReadFile(filepath.Join(dir, eventFile))
	if err != nil {
		return nil // nothing was told yet
	}
	var told []event
	for line := range strings.Lines(string(text)) {
		var e event
		if strings.HasSuffix(line, "\n") && json.Unmarshal([]byte(line), &e) == nil {
			told = append(told, e)
		}
	}
	return told
}
