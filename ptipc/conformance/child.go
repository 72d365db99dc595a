package conformance

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"pthost/ptipc"
	"pthost/ptipc/localnet"
	"pthost/ptipc/proc"
)

// maxKept bounds the lines of a child that are kept, of each output.
const maxKept = 4096

// A launch says how a child is started, where it differs from the usual.
type launch struct {
	role   string         // in place of the subject's
	args   []string       // in place of [ROLE] CONFIG [HOST]
	config string         // in place of the subject's; must be there in the role server
	host   map[string]any // keys added to HOST, or taken from it if nil
	input  int            // not 0: CONFIG and HOST go over standard input, as a line of so many bytes at least
	first  []byte         // another line for standard input
	files  int            // how many descriptors the child may have
	onDone func(*child)   // called as soon as the announcements are done
	post   *post          // who carries the child's signals; nil is that of the far server
	silent bool           // nobody carries them
	within *cell          // where it is started; nil is where the suite is
	// prepare does what a host does in the state directory before the child starts.
	prepare func(*localnet.Dir) error
	// ends hands the child memory in which the ends of streams are marked, and says so in
	// HOST unless args are given.
	ends bool
	// tell changes what a managed transport is told.
	tell func(order)
}

// usual reports whether nothing is different that could keep a child from getting ready.
func (l launch) usual() bool {
	return l.args == nil && l.config == "" && l.host == nil && l.files == 0 && l.input == 0 && l.role == "" && !l.silent && !l.ends && l.tell == nil
}

// outLine is a line of standard output without its LF.
type outLine struct {
	text string
	cut  bool // longer than LINE-1 allows, or without an LF
}

// method is a CMETHOD or SMETHOD line, read with tolerance: LINE-4 to LINE-6 and SRV-1
// have cases of their own.
type method struct {
	name, protocol, addr, args string
	fixed                      bool // bound, as a managed transport cannot say
}

func (m method) bound() bool { return m.fixed || strings.Contains(","+m.args+",", ",bound=1,") }
func (m method) stats() bool { return strings.Contains(","+m.args+",", ",stats=1,") }
func (m method) ends() bool  { return strings.Contains(","+m.args+",", ",ends=1,") }

var (
	cmethod = regexp.MustCompile(`^CMETHOD (\S+) (\S+) (\S+)(?: ARGS:(.*))?$`)
	smethod = regexp.MustCompile(`^SMETHOD (\S+) ()(\S+)(?: ARGS:(.*))?$`)
)

// A child is a process that is looked at, with a state directory and a home of its own.
type child struct {
	suite   *suite
	proc    *proc.Process
	started chan struct{} // closed when proc is there
	role    string
	within  *cell
	base    string // holds state, home and the like
	dir     *localnet.Dir
	ends    *localnet.Ends // nil if it was given none
	nextN   uint64         // of a STATS
	fixed   bool           // its connection factories are bound, which it cannot say

	mu     sync.Mutex
	out    []outLine
	errout []string
}

// homes name directories that programs write to unasked.
var homes = []string{
	"HOME", "TMPDIR", "XDG_CONFIG_HOME", "XDG_CACHE_HOME", "XDG_DATA_HOME", "XDG_STATE_HOME", "XDG_RUNTIME_DIR",
}

// What is in a child's base directory.
const (
	stateDir = "state"
	homeDir  = "home" // the homes are all this one
)

// object is an Opaque as text.
func object(o ptipc.Opaque) string {
	if o.Empty() {
		return "{}"
	}
	return string(o)
}

// config is a configuration that works for the subject's role: options for generate.
func (t *trial) config() string {
	s := t.suite
	switch {
	case s.subject.Role == Generate:
		return object(s.subject.Generate)
	case len(s.subject.Generate) == 0:
		return object(s.subject.Config)
	case s.subject.Role == Server && s.managed():
		text, err := s.managedServer()
		t.need(err)
		return text
	case s.subject.Role == Server:
		return t.pair().server
	}
	return t.farServer().client
}

// host is HOST with some keys more. A server is told to deliver where nobody may
// listen: what only starts delivers nothing.
func (s *suite) host(role string, more map[string]any) string {
	host := map[string]any{"version": []int{1}, "listen": "tcp"}
	if role == Server {
		host["deliver"] = "unix:" + deliverName
	}
	maps.Copy(host, more)
	maps.DeleteFunc(host, func(_ string, value any) bool { return value == nil })
	text, err := json.Marshal(host)
	if err != nil {
		panic(err) // the cases pass strings, numbers and lists alone
	}
	return string(text)
}

// words are the arguments before which the executable's own stand: EXE CONFIG for a
// plain client, else EXE ROLE CONFIG HOST.
func (s *suite) words(role, config string, more map[string]any) []string {
	switch {
	case s.subject.Plain && role == Client:
		return []string{config}
	case s.subject.Plain || role == Generate:
		return []string{role, config}
	}
	return []string{role, config, s.host(role, more)}
}

// endsFD is the descriptor that a child with ends is given.
const endsFD = 3

// start starts a child, which is stopped at the end of the case.
func (t *trial) start(l launch) *child {
	if l.role == "" {
		l.role = t.suite.subject.Role
	}
	if l.config == "" && (l.args == nil || l.input > 0) {
		l.config = t.config()
	}
	if l.ends {
		host := map[string]any{"ends": endsFD}
		maps.Copy(host, l.host)
		l.host = host
	}
	if l.input > 0 {
		l.first = t.suite.firstLine(l)
	}
	switch {
	case l.args != nil || t.suite.managed():
	case l.input > 0:
		l.args = []string{l.role, "-"}
	default:
		l.args = t.suite.words(l.role, l.config, l.host)
	}
	if l.post == nil && l.role == Client && t.suite.far != nil && !l.silent {
		l.post = t.suite.far.post
	}
	var c *child
	var err error
	start := func() { c, err = t.suite.start(t.ctx, l) }
	if l.within != nil {
		l.within.run(start)
	} else {
		start()
	}
	t.need(err)
	t.onEnd(c.stop)
	t.onEnd(func() { t.suite.keep(c) })
	t.children = append(t.children, c)
	return c
}

func (s *suite) start(ctx context.Context, l launch) (*child, error) {
	base, err := os.MkdirTemp(s.base, "child")
	if err != nil {
		return nil, err
	}
	c := &child{suite: s, base: base, within: l.within, role: l.role, started: make(chan struct{}), fixed: s.managed() && !s.subject.Free}
	state, home := filepath.Join(base, stateDir), filepath.Join(base, homeDir)
	if err := errors.Join(os.Mkdir(state, 0o700), os.Mkdir(home, 0o700)); err != nil {
		return nil, err
	}
	env := os.Environ()
	for _, variable := range homes {
		env = append(env, variable+"="+home)
	}
	if c.dir, err = localnet.OpenDir(state); err != nil {
		return nil, err
	}
	if l.prepare != nil {
		if err := l.prepare(c.dir); err != nil {
			_ = c.dir.Close()
			return nil, err
		}
	}
	var files []*os.File
	if l.ends {
		ends, file, err := localnet.NewEnds()
		switch {
		case errors.Is(err, errors.ErrUnsupported):
		case err != nil:
			_ = c.dir.Close()
			return nil, err
		default:
			defer file.Close()
			c.ends, files = ends, []*os.File{file}
		}
	}
	dir := state
	if s.managed() {
		// What it keeps in its working directory is in the wrong place.
		dir = home
		o, err := s.orderFor(l, state)
		if err == nil {
			var more []string
			more, l.args, err = s.told(o, l, base)
			env = append(withoutOrders(env), more...)
		}
		if err != nil {
			_ = c.dir.Close()
			return nil, err
		}
	}
	path, args := s.subject.Path, append(s.subject.Args[:len(s.subject.Args):len(s.subject.Args)], l.args...)
	if l.files > 0 {
		if runtime.GOOS == "windows" {
			_ = c.dir.Close()
			return nil, errors.New("descriptors cannot be limited here")
		}
		args = append([]string{"-c", fmt.Sprintf(`ulimit -n %d && exec "$@"`, l.files), "sh", path}, args...)
		path = "/bin/sh"
	}
	c.proc, err = proc.Start(ctx, proc.Spec{
		Path: path, Args: args, Dir: dir, Env: env, Files: files,
		OnLine: func(line []byte, truncated bool) {
			c.mu.Lock()
			if len(c.out) < maxKept {
				c.out = append(c.out, outLine{string(line), truncated})
			}
			c.mu.Unlock()
			if l.post != nil {
				l.post.collect(c, string(line))
			}
			if l.onDone != nil && string(line) == c.lastWord() {
				l.onDone(c)
			}
		},
		OnStderr: func(line string) {
			c.mu.Lock()
			defer c.mu.Unlock()
			if len(c.errout) < maxKept {
				c.errout = append(c.errout, line)
			}
		},
		FinishWait: s.finishWait(), TermWait: time.Second,
	})
	if err != nil {
		_ = c.dir.Close()
		return nil, err
	}
	close(c.started)
	if l.first != nil {
		if err := c.proc.WriteLine(l.first); err != nil {
			c.stop()
			return nil, err
		}
	}
	return c, nil
}

// finishWait is how long a child may take to end by itself when a case has ended.
const finishWait = time.Second

// finishWait is short once a child has not done so: the others will not either, and that
// they do not, LIFE-2 has cases for.
func (s *suite) finishWait() time.Duration {
	if s.stays {
		return finishWait / 10
	}
	return finishWait
}

// stop ends the child and removes what it has left. It may be called twice.
func (c *child) stop() {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	began := time.Now()
	_ = c.proc.Stop(ctx) // it says what could not be killed, which no case is about
	c.suite.stays = c.suite.stays || time.Since(began) > finishWait
	_ = c.dir.Close()
	os.RemoveAll(c.base)
}

// keep remembers what a child has written for the cases about its lines.
func (s *suite) keep(c *child) {
	if len(s.lines) < maxKept && c.role != Generate { // what is generated are no control lines
		s.lines = append(s.lines, c.lines()...)
	}
}

func (c *child) lines() []outLine {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.out[:len(c.out):len(c.out)]
}

func (c *child) stderr() []string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.errout[:len(c.errout):len(c.errout)]
}

// said shows the last lines of both outputs.
func (c *child) said(most int) []string {
	var said []string
	out, errout := c.lines(), c.stderr()
	for _, line := range out[max(0, len(out)-most):] {
		said = append(said, fmt.Sprintf("stdout %q", line.text[:min(len(line.text), 4*shownBytes)]))
	}
	for _, line := range errout[max(0, len(errout)-most):] {
		said = append(said, fmt.Sprintf("stderr %q", line))
	}
	return said
}

// wrote reports whether the child has written the text, on either output.
func (c *child) wrote(text string) bool {
	for _, line := range c.lines() {
		if strings.Contains(line.text, text) {
			return true
		}
	}
	for _, line := range c.stderr() {
		if strings.Contains(line, text) {
			return true
		}
	}
	return false
}

// with returns the lines that begin with a keyword, without it.
func (c *child) with(keyword string) []string {
	var rest []string
	for _, line := range c.lines() {
		if k, r, _ := strings.Cut(line.text, " "); k == keyword && !line.cut {
			rest = append(rest, r)
		}
	}
	return rest
}

func (c *child) methods() []method {
	form := cmethod
	if c.role == Server {
		form = smethod
	}
	var methods []method
	for _, line := range c.lines() {
		if m := form.FindStringSubmatch(line.text); m != nil && !line.cut {
			methods = append(methods, method{m[1], m[2], m[3], m[4], c.fixed})
		}
	}
	return methods
}

// datagrams reports whether a client announces packet factories alone.
func (c *child) datagrams() bool {
	methods := c.methods()
	return len(methods) > 0 && !slices.ContainsFunc(methods, func(m method) bool { return m.protocol != turnProtocol })
}

// lastWord ends the announcements.
func (c *child) lastWord() string {
	if c.role == Server {
		return "SMETHODS DONE"
	}
	return "CMETHODS DONE"
}

func (c *child) done() bool {
	return slices.ContainsFunc(c.lines(), func(line outLine) bool { return line.text == c.lastWord() && !line.cut })
}

func (c *child) ended() bool {
	select {
	case <-c.proc.Done():
		return true
	default:
		return false
	}
}

// settled waits until the child is ready or has ended, and reports whether it is ready,
// which in the role generate it is when it has done its work.
func (t *trial) settled(c *child) bool {
	t.until(func() bool { return c.done() || c.ended() })
	if c.role == Generate {
		return c.ended() && ptipc.ExitCodeOf(c.proc.Err()) == ptipc.ExitOK
	}
	return c.done() && len(c.methods()) > 0
}

// ready starts a child and waits until it is ready. One that gets ready with its own
// arguments but not with these is no fault of its own making.
func (t *trial) ready(l launch) *child {
	usual := l.usual()
	if usual && t.suite.unready {
		t.cannot("the child did not get ready before")
	}
	c := t.start(l)
	t.isReady(c, usual)
	return c
}

func (t *trial) isReady(c *child, usual bool) {
	switch {
	case t.settled(c):
	case usual:
		// Once is enough to know; a child that hangs would take all patience each time.
		t.suite.unready = true
		t.fellUnready(c)
	default:
		t.cannot("the child did not get ready%s", t.whyNot(c))
	}
}

func (t *trial) whyNot(c *child) string {
	if c.ended() {
		return ": " + c.proc.Err().Error()
	}
	return ""
}

// child is the child that cases share which leave it as it was.
func (t *trial) child() *child {
	s := t.suite
	if s.unready {
		t.cannot("the child did not get ready before")
	}
	if s.shared != nil && s.shared.ended() {
		s.dropShared()
	}
	if s.shared == nil {
		l := launch{role: Client, config: t.config()}
		if !s.managed() {
			l.args = s.words(Client, l.config, nil)
		}
		if s.far != nil {
			l.post = s.far.post
		}
		c, err := s.start(t.ctx, l)
		t.need(err)
		s.shared = c
	}
	t.children = append(t.children, s.shared)
	t.isReady(s.shared, true)
	return s.shared
}

// method is the connection factory that the subject names, or what a server offers.
func (t *trial) method(c *child) method {
	if c.datagrams() {
		t.cannot("the child announces packet factories alone")
	}
	methods, name := c.methods(), t.suite.subject.Factory
	if c.role == Server && len(methods) > 0 {
		return methods[0]
	}
	methods = slices.DeleteFunc(methods, func(m method) bool { return m.protocol == turnProtocol })
	for _, m := range methods {
		if m.name == name || name == "" && len(methods) == 1 {
			return m
		}
	}
	if name == "" {
		t.cannot("the child announces %d connection factories; name one of them in Subject.Factory", len(methods))
	}
	t.cannot("the child announces no connection factory %q", name)
	return method{}
}

// exit waits for the end of the child and demands an exit code.
func (t *trial) exit(c *child, when string, want int) {
	expected := fmt.Sprintf("exit code %d %s", want, when)
	t.showText("expecting " + expected)
	select {
	case <-c.proc.Done():
	case <-time.After(t.suite.patience):
		t.fell(expected, "it still runs after %v", t.suite.patience)
	case <-t.ctx.Done():
		t.fell(expected, "it still runs")
	}
	var exit *proc.ExitError
	if !errors.As(c.proc.Err(), &exit) {
		t.fell(expected, "%v", c.proc.Err())
	}
	if exit.Code != want {
		t.fell(expected, "%v", exit)
	}
}

// terminate sends SIGTERM to the child alone, as an init system would.
func (t *trial) terminate(c *child) {
	process, err := os.FindProcess(c.proc.Pid())
	t.need(err)
	t.showText("SIGTERM")
	t.need(process.Signal(syscall.SIGTERM))
}

// line writes a line on the child's standard input.
func (t *trial) line(c *child, line string) {
	t.show("stdin >", []byte(line))
	if err := c.proc.WriteLine([]byte(line)); err != nil {
		t.fell("a child that reads its standard input", "%v", err)
	}
}

// stats asks STATS and returns the JSON of the answer.
func (t *trial) stats(c *child, client string) string {
	// Far apart from line numbers, lengths and the like that a child could mistake for it.
	c.nextN += 1_000_003
	id := strconv.FormatUint(c.nextN, 10)
	t.line(c, strings.TrimSuffix("STATS "+id+" "+client, " "))
	var answer string
	if !t.until(func() bool {
		for _, rest := range c.with("STATS") {
			if got, text, _ := strings.Cut(rest, " "); got == id {
				answer = text
				return true
			}
		}
		return c.ended()
	}) || answer == "" {
		t.fell("the answer STATS "+id+" JSON", "none in %v%s", t.suite.patience, t.whyNot(c))
	}
	return answer
}
