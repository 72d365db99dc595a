package conformance

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net"
	"runtime"
	"strings"
	"time"
)

const (
	shownEvents = 40 // of a case
	shownBytes  = 64 // of an event
	shownLines  = 12 // of a child's output
)

// A trial is one run of one case. Its methods end the case when something is not
// as it should be, and are called from the goroutine of the case alone.
type trial struct {
	ctx      context.Context // of the case
	suite    *suite
	result   Result
	cleanups []func()
	children []*child // those that the case has used
	conns    []net.Conn
	peeks    bool // the child leaves what it has seen in the socket's queue
	events   []string
	client   string // the configuration of a managed server's own client; "" is the subject's
}

func (t *trial) cleanUp() {
	for i := len(t.cleanups) - 1; i >= 0; i-- {
		t.cleanups[i]()
	}
}

func (t *trial) onEnd(f func()) { t.cleanups = append(t.cleanups, f) }

// fell ends the case: the child fell short.
func (t *trial) fell(expected, format string, args ...any) {
	if t.ctx.Err() != nil {
		t.cannot("the run was ended: %v", context.Cause(t.ctx))
	}
	t.result.Verdict = FellShort
	t.result.Expected = expected
	t.result.Got = fmt.Sprintf(format, args...)
	t.result.Bytes = t.events
	for _, c := range t.children {
		t.result.Bytes = append(t.result.Bytes, c.said(shownLines)...)
	}
	runtime.Goexit()
}

// cannot ends the case: nothing is known about the child.
func (t *trial) cannot(format string, args ...any) {
	t.result.Verdict = NotRun
	t.result.Why = fmt.Sprintf(format, args...)
	runtime.Goexit()
}

// need ends the case if it cannot run on this machine.
func (t *trial) need(err error) {
	if err != nil {
		t.cannot("%v", err)
	}
}

// show keeps an event for the report.
func (t *trial) show(who string, b []byte) {
	event := fmt.Sprintf("%s % x |%s|", who, b[:min(len(b), shownBytes)], printable(b[:min(len(b), shownBytes)]))
	if len(b) > shownBytes {
		event += fmt.Sprintf(" and %d bytes more", len(b)-shownBytes)
	}
	t.showText(event)
}

func (t *trial) showText(event string) {
	if len(t.events) == shownEvents {
		t.events = t.events[1:] // the last ones are nearest to the fault
	}
	t.events = append(t.events, event)
}

func printable(b []byte) string {
	return strings.Map(func(r rune) rune {
		if r < ' ' || r > '~' {
			return '.'
		}
		return r
	}, string(b))
}

// until waits until cond holds, and asks it again and again.
func (t *trial) until(cond func() bool) bool { return t.untilEvery(5*time.Millisecond, cond) }

func (t *trial) untilEvery(period time.Duration, cond func() bool) bool {
	ctx, cancel := context.WithTimeout(t.ctx, t.suite.patience)
	defer cancel()
	tick := time.NewTicker(period)
	defer tick.Stop()
	for !cond() {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return cond()
		}
	}
	return true
}

// pause lets a moment pass, so that what was sent before and after it comes in two
// pieces at the other end.
func (t *trial) pause() {
	timer := time.NewTimer(2 * time.Millisecond)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-t.ctx.Done():
	}
}

// extended ends the case for a child that takes no HOST.
func (t *trial) extended() {
	if t.suite.subject.Plain {
		t.cannot("the child is plain: it takes neither HOST nor - (ARG-6)")
	}
}

// grease is a name that nobody knows: readers have to get along with what is added
// to the protocol later.
func grease() string { return fmt.Sprintf("grease_%08x", rand.Uint32()) }
