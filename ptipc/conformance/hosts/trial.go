package hosts

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"pthost/ptipc/conformance"
	"pthost/ptipc/localnet"
)

const (
	shownLines = 12
	shownBytes = 300
	keptOutput = 64 << 10
)

// secret stands in the child's configuration.
const secret = "s3cr3t-of-the-suite"

// A trial is one run of one case. Its methods end the case when something is not as
// it should be, and are called from the goroutine of the case alone.
type trial struct {
	run      context.Context // of all cases
	ctx      context.Context // of this one
	suite    *suite
	probe    *probe
	result   conformance.Result
	dir      string // of the case
	front    string // where the host serves
	proxy    string // its upstream proxy
	config   object // HOST.json
	hosts    []*hostProcess
	cleanups []func()
}

func (t *trial) cleanUp() {
	for i := len(t.cleanups) - 1; i >= 0; i-- {
		t.cleanups[i]()
	}
}

func (t *trial) onEnd(f func()) { t.cleanups = append(t.cleanups, f) }

// fell ends the case: the host fell short.
func (t *trial) fell(expected, format string, args ...any) {
	if t.run.Err() != nil {
		t.cannot("the run was ended: %v", context.Cause(t.run))
	}
	t.result.Verdict = conformance.FellShort
	t.result.Expected = expected
	t.result.Got = fmt.Sprintf(format, args...)
	told := events(t.dir)
	for _, e := range told[max(0, len(told)-shownLines):] {
		line, _ := json.Marshal(e) // it was read as JSON
		t.result.Bytes = append(t.result.Bytes, "child "+cut(string(line)))
	}
	for _, h := range t.hosts {
		for _, line := range h.out.last(shownLines) {
			t.result.Bytes = append(t.result.Bytes, fmt.Sprintf("host  %q", cut(line)))
		}
	}
	runtime.Goexit()
}

func cut(text string) string {
	if len(text) > shownBytes {
		return text[:shownBytes] + "…"
	}
	return text
}

// cannot ends the case: nothing is known about the host.
func (t *trial) cannot(format string, args ...any) {
	t.result.Verdict = conformance.NotRun
	t.result.Why = fmt.Sprintf(format, args...)
	runtime.Goexit()
}

func (t *trial) need(err error) {
	if err != nil {
		t.cannot("%v", err)
	}
}

// within waits until cond holds, and asks it again and again, less often as time goes by.
func (t *trial) within(d time.Duration, cond func() bool) bool {
	ctx, cancel := context.WithTimeout(t.ctx, d)
	defer cancel()
	period := 5 * time.Millisecond
	timer := time.NewTimer(period)
	defer timer.Stop()
	for !cond() {
		select {
		case <-timer.C:
		case <-ctx.Done():
			return cond()
		}
		period = min(period*5/4, 100*time.Millisecond)
		timer.Reset(period)
	}
	return true
}

func (t *trial) until(cond func() bool) bool { return t.within(t.suite.patience, cond) }

// prepare makes the case's directory, with the child's executable in it.
func (t *trial) prepare(number int) {
	s := t.suite
	if t.probe.write != nil && !s.has("{config}") {
		t.cannot("the case is told to the host by {config}, which is not in the command")
	}
	if t.probe.proxied && !s.has("{config}") && !s.has("{proxy}") {
		t.cannot("the host is given no upstream proxy: neither {config} nor {proxy} is in the command")
	}
	t.dir = filepath.Join(s.base, strconv.Itoa(number))
	t.need(os.Mkdir(t.dir, 0o700))
	t.onEnd(func() { os.RemoveAll(t.dir) })
	for _, name := range []string{"data", "home"} {
		t.need(os.Mkdir(filepath.Join(t.dir, name), 0o700))
	}
	t.need(os.WriteFile(filepath.Join(t.dir, eventFile), nil, 0o600))
	// A loopback address of its own, so that no other case and nobody else has the port.
	ip := fmt.Sprintf("127.%d.%d.%d", s.net[0], s.net[1], number+1)
	t.front = ip + ":1080"
	t.onEnd(t.killAll)
	t.write(ip)
}

// write writes what the case needs to know, the child's executable and HOST.json.
func (t *trial) write(ip string) {
	s := t.suite
	o := order{Case: t.probe.name, Dialect: s.subject.Dialect}
	other, err := localnet.ListenTCP(ip + ":0")
	t.need(err)
	t.onEnd(func() { other.Close() })
	o.Other = other.Addr().String()
	var talked sync.WaitGroup
	talked.Go(func() { t.strange(other) })
	t.onEnd(func() { other.Close(); talked.Wait() })
	// Nobody connects through it: children of this suite have no wire.
	t.proxy = net.JoinHostPort(ip, "9")
	text, err := json.Marshal(o)
	t.need(err)
	t.need(os.WriteFile(filepath.Join(t.dir, orderFile), text, 0o600))

	exe := filepath.Join(t.dir, "child")
	words := make([]string, 0, len(s.subject.Child)+1)
	for _, word := range append(slices.Clone(s.subject.Child), t.dir) {
		words = append(words, "'"+strings.ReplaceAll(word, "'", `'\''`)+"'")
	}
	command := "exec " + strings.Join(words, " ") + ` "$@"` + "\n"
	if t.probe.child.wrapped {
		command = strings.TrimPrefix(command, "exec ") + "exit $?\n"
	}
	// Another case that starts its host just now must not inherit the open file, which
	// nobody could execute then.
	syscall.ForkLock.RLock()
	err = os.WriteFile(exe, []byte("#!/bin/sh\n"+command), 0o700) //nolint:gosec // the host has to execute it
	syscall.ForkLock.RUnlock()
	t.need(err)

	transport := object{
		"exec": exe, "config": object{"secret": secret},
		"sandbox":       object{"read": []string{s.subject.Child[0]}, "write": []string{t.dir}},
		"start_timeout": startTimeout.String(), "stop_timeout": "1s",
		"restart": object{"min": "100ms", "max": "5s", "give_up_after": 8},
	}
	if s.subject.Dialect == PT1 {
		transport["dialect"] = "pt1"
		transport["config"] = object{"transports": object{probeName: object{"key": "value", "hard": `a;b\c=d`}}}
		transport["bound"] = object{probeName: false}
	}
	if t.probe.proxied {
		transport["proxy"] = "socks5://" + t.proxy
	}
	t.config = object{
		"transports": object{probeName: transport},
		"fronts":     []any{object{"listen": "tcp://" + t.front, "serve": "socks5", "transport": probeName}},
		"control":    "unix://" + filepath.Join(t.dir, "control.sock"),
	}
	if t.probe.write != nil {
		t.probe.write(t)
	}
}

// transport is what HOST.json says of the child.
func (t *trial) transport() object {
	return t.config["transports"].(object)[probeName].(object)
}

// strange is a socket that is not the child's: that somebody connects to it is told, and
// what they send.
func (t *trial) strange(l net.Listener) {
	for {
		conn, err := l.Accept()
		if err != nil {
			return
		}
		_ = conn.SetDeadline(time.Now().Add(caseTimeout))
		b := make([]byte, 64)
		if n, _ := conn.Read(b); n > 0 {
			_ = tell(t.dir, event{What: "stranger", Text: fmt.Sprintf("% x", b[:n])}) // the events are the suite's own file
		}
		conn.Close()
	}
}

// A hostProcess is a run of the host.
type hostProcess struct {
	cmd   *exec.Cmd
	out   *output
	ended chan struct{}
	err   error // once ended is closed
}

func (h *hostProcess) hasEnded() bool {
	select {
	case <-h.ended:
		return true
	default:
		return false
	}
}

// output keeps the end of what a host writes.
type output struct {
	mu sync.Mutex
	b  []byte
}

func (o *output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.b = append(o.b, p...)
	if len(o.b) > 2*keptOutput {
		o.b = slices.Clone(o.b[len(o.b)-keptOutput:])
	}
	return len(p), nil
}

func (o *output) has(text string) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	return bytes.Contains(o.b, []byte(text))
}

func (o *output) last(n int) []string {
	o.mu.Lock()
	defer o.mu.Unlock()
	lines := strings.Split(strings.TrimRight(string(o.b), "\n"), "\n")
	return lines[max(0, len(lines)-n):]
}

// start runs the host with HOST.json as it is now.
func (t *trial) start() *hostProcess {
	text, err := json.MarshalIndent(t.config, "", "  ")
	t.need(err)
	config := filepath.Join(t.dir, fmt.Sprintf("host%d.json", len(t.hosts)))
	t.need(os.WriteFile(config, text, 0o600))
	fill := strings.NewReplacer(
		"{child}", filepath.Join(t.dir, "child"), "{config}", config, "{front}", t.front,
		"{proxy}", t.proxy, "{dir}", filepath.Join(t.dir, "data"),
	)
	var words []string
	for _, word := range t.suite.subject.Command {
		words = append(words, fill.Replace(word))
	}
	h := &hostProcess{cmd: exec.Command(words[0], words[1:]...), out: new(output), ended: make(chan struct{})} //nolint:gosec // it is what was asked for
	h.cmd.Stdout, h.cmd.Stderr = h.out, h.out
	h.cmd.WaitDelay = time.Second // what outlives the host may hold its outputs
	h.cmd.Env = os.Environ()
	home := filepath.Join(t.dir, "home")
	for _, variable := range []string{"HOME", "TMPDIR", "XDG_RUNTIME_DIR"} {
		h.cmd.Env = append(h.cmd.Env, variable+"="+home)
	}
	ownGroup(h.cmd)
	t.need(h.cmd.Start())
	t.hosts = append(t.hosts, h)
	go func() {
		defer close(h.ended)
		h.err = h.cmd.Wait()
	}()
	return h
}

// killAll ends what is left of the case.
func (t *trial) killAll() {
	for _, h := range t.hosts {
		if !h.hasEnded() {
			killGroup(h.cmd.Process.Pid)
		}
	}
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for {
		left := t.survivors()
		for _, p := range left {
			kill(p.pid)
		}
		if len(left) == 0 {
			break
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return // what cannot be killed stays
		}
	}
	for _, h := range t.hosts {
		<-h.ended
	}
}

// survivors are the processes of the case: all that have its directory on their command
// line, which the child, its launchers and whatever they start do.
func (t *trial) survivors() []process {
	all, err := processes()
	if err != nil {
		return nil
	}
	return slices.DeleteFunc(all, func(p process) bool {
		return !strings.Contains(p.cmdline, t.dir+"/") && !strings.Contains(p.cmdline, t.dir+"\x00")
	})
}

// memory is what the host and its helpers use, without the suite's children.
func (t *trial) memory(h *hostProcess) int64 {
	all, err := processes()
	t.need(err)
	parents := map[int]int{}
	for _, p := range all {
		parents[p.pid] = p.parent
	}
	var sum int64
	for _, p := range all {
		if strings.Contains(p.cmdline, "\x00"+t.dir+"\x00") {
			continue
		}
		for pid := p.pid; pid > 1; pid = parents[pid] {
			if pid == h.cmd.Process.Pid {
				sum += resident(p.pid)
				break
			}
		}
	}
	return sum
}

// told returns the events of a kind.
func (t *trial) told(what string) []event {
	return slices.DeleteFunc(events(t.dir), func(e event) bool { return e.What != what })
}

// event waits for the number-th event of a kind, counted from 1.
func (t *trial) event(what string, number int) event {
	expected := map[string]string{
		"start": "the host starts its child", "greeting": "the host connects to its child", "request": "the host connects through its child",
		"eof": "the host closes the child's standard input", "term": "the host sends SIGTERM", "wrote": "the host goes on reading what the child writes",
		"exit": "the child ends", "answered": "an answer of the host",
	}[what]
	var found []event
	t.until(func() bool {
		found = t.told(what)
		return len(found) >= number || (what == "start" || what == "request" || what == "greeting") && t.hosts[len(t.hosts)-1].hasEnded()
	})
	if failed := t.told("failed"); len(failed) > 0 {
		t.cannot("the suite's child: %s", failed[0].Text)
	}
	if len(found) < number {
		if found = t.told(what); len(found) < number { // it may have been told at the last moment
			t.fell(expected, "not within %v; %s", t.suite.patience, t.state())
		}
	}
	return found[number-1]
}

// state says whether the host runs.
func (t *trial) state() string {
	if h := t.hosts[len(t.hosts)-1]; h.hasEnded() {
		return fmt.Sprintf("the host has ended (%v)", h.err)
	}
	return "the host runs"
}

// up starts the host and waits until traffic goes through it.
func (t *trial) up() *hostProcess {
	h := t.start()
	t.traffic()
	return h
}

// traffic is held when what is sent through the host comes to the child and back. A host
// that makes connections by itself has to make one more.
func (t *trial) traffic() {
	if !t.suite.relays() {
		t.event("request", len(t.told("request"))+1)
		return
	}
	var err error
	if t.until(func() bool {
		if t.hosts[len(t.hosts)-1].hasEnded() {
			err = errors.New(t.state())
			return true
		}
		err = t.echo()
		return err == nil
	}) && err == nil {
		return
	}
	if failed := t.told("failed"); len(failed) > 0 {
		t.cannot("the suite's child: %s", failed[0].Text)
	}
	t.fell("traffic goes through the host to the child and back", "%v", err)
}

// echo sends a few bytes through the host.
func (t *trial) echo() error {
	conn, err := t.dial()
	if err != nil {
		return err
	}
	defer conn.Close()
	want := []byte("there and back again")
	if _, err := conn.Write(want); err != nil {
		return err
	}
	got := make([]byte, len(want))
	if _, err := io.ReadFull(conn, got); err != nil {
		return fmt.Errorf("after the host's reply: %w", err)
	}
	if !bytes.Equal(got, want) {
		return fmt.Errorf("%q came back for %q", got, want)
	}
	return nil
}

// destName is where the suite's connections want to go: a name that nobody can look up.
const destName = "conform-host.invalid"

// A refusal is a reply of the host's front.
type refusal byte

func (r refusal) Error() string { return fmt.Sprintf("the host replies %d", byte(r)) }

// dial connects through the host's front.
func (t *trial) dial() (*net.TCPConn, error) {
	addr, err := localnet.ParseAddr(t.front)
	if err != nil {
		return nil, err
	}
	conn, err := localnet.DialTCP(t.ctx, addr)
	if err != nil {
		return nil, fmt.Errorf("the host's SOCKS5 proxy: %w", err)
	}
	if err := t.socks(conn); err != nil {
		conn.Close()
		return nil, err
	}
	return conn, nil
}

// socks asks for the suite's destination, by an ordinary SOCKS5 handshake.
func (t *trial) socks(conn net.Conn) error {
	_ = conn.SetDeadline(time.Now().Add(t.suite.patience))
	reply := make([]byte, 10)
	if _, err := conn.Write([]byte{5, 1, 0}); err != nil {
		return err
	}
	if _, err := io.ReadFull(conn, reply[:2]); err != nil {
		return fmt.Errorf("the host's SOCKS5 proxy does not answer: %w", err)
	}
	if _, err := conn.Write(append(append([]byte{5, 1, 0, 3, byte(len(destName))}, destName...), 1, 187)); err != nil {
		return err
	}
	if _, err := io.ReadFull(conn, reply); err != nil {
		return fmt.Errorf("the host's SOCKS5 proxy does not reply: %w", err)
	}
	if reply[1] != 0 {
		return refusal(reply[1])
	}
	return nil
}

// relayed ends the case for a host that takes no connections of the suite's.
func (t *trial) relayed() {
	if !t.suite.relays() {
		t.cannot("the host makes connections by itself: neither {front} nor {config} is in the command")
	}
}

// goneChild waits until a process of the child's is gone and reaped.
func (t *trial) goneChild(pid int, expected string) {
	state := ""
	t.until(func() bool {
		state = stateOf(pid)
		return state == ""
	})
	switch state {
	case "":
	case "Z":
		t.fell(expected, "process %d is a zombie: nobody has waited for it", pid)
	default:
		t.fell(expected, "process %d is still there (state %s); %s", pid, state, t.state())
	}
}

// nobodyLeft waits until no process of the case is there any more.
func (t *trial) nobodyLeft(when string) {
	var left []process
	t.until(func() bool {
		left = t.survivors()
		return len(left) == 0
	})
	if len(left) > 0 {
		var names []string
		for _, p := range left {
			names = append(names, fmt.Sprintf("%d (%s)", p.pid, cut(strings.TrimRight(strings.ReplaceAll(p.cmdline, "\x00", " "), " "))))
		}
		t.fell("no process is left behind "+when, "%d are left: %s", len(left), strings.Join(names, "; "))
	}
}

// stop ends the host in order.
func (t *trial) stop(h *hostProcess) {
	t.need(h.cmd.Process.Signal(syscall.SIGTERM))
	select {
	case <-h.ended:
	case <-t.ctx.Done():
		t.fell("the host ends after SIGTERM", "it still runs")
	}
}

// murder ends the host without a warning.
func (t *trial) murder(h *hostProcess) {
	t.need(h.cmd.Process.Kill())
	<-h.ended
}

// refused demands that the host does not use its child: it is stopped, and nobody
// connects to anything that it has announced.
func (t *trial) refused(why string) {
	t.start()
	first := t.event("start", 1)
	t.goneChild(first.Pid, "the host refuses a child that "+why+", and stops it")
	for _, what := range []string{"greeting", "stranger", "request"} {
		if told := t.told(what); len(told) > 0 {
			t.fell("the host refuses a child that "+why, "it sent something to the announced address: %s%x", told[0].Text, told[0].Methods)
		}
	}
}

// poke tries for a while to send something through the host.
func (t *trial) poke(d time.Duration, enough func() bool) {
	t.within(d, func() bool {
		if t.suite.relays() {
			if conn, err := t.dial(); err == nil {
				conn.Close()
			}
		}
		return enough()
	})
}

// merge sets keys of an object.
func merge(o, more object) { maps.Copy(o, more) }
