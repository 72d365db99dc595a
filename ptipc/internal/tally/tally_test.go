package tally_test

import (
	"log/slog"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"

	"pthost/ptipc/internal/tally"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// newLog returns a log without times, and what is in it since the last call.
func newLog() (*slog.Logger, func() string) {
	b := new(lines)
	log := slog.New(slog.NewTextHandler(b, &slog.HandlerOptions{ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
		if a.Key == slog.TimeKey {
			return slog.Attr{}
		}
		return a
	}}))
	return log, b.take
}

// lines are what a log has written.
type lines struct {
	mu   sync.Mutex
	text []byte
}

func (l *lines) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.text = append(l.text, b...)
	return len(b), nil
}

func (l *lines) take() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	defer func() { l.text = nil }()
	return string(l.text)
}

func want(t *testing.T, got, want string) {
	t.Helper()
	if got != want {
		t.Errorf("the log has\n%s, want\n%s", got, want)
	}
}

// The first time is logged at once, a flood once in an interval, and its end too.
func TestWarning(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log, logged := newLog()
		w := tally.New(log, "lost")
		w.Add(1, "id", 1)
		want(t, logged(), "level=WARN msg=lost count=1 id=1\n")
		for id := range 1000 {
			w.Add(2, "id", id)
		}
		want(t, logged(), "")
		time.Sleep(tally.Interval)
		synctest.Wait()
		want(t, logged(), "level=WARN msg=lost count=2000 id=999\n")
		w.Add(1, "id", 7)
		want(t, logged(), "")
		time.Sleep(tally.Interval)
		synctest.Wait()
		want(t, logged(), "level=WARN msg=lost count=1 id=7\n")

		// After an interval in which nothing happened the next time is a first one.
		time.Sleep(tally.Interval)
		synctest.Wait()
		w.Add(3)
		want(t, logged(), "level=WARN msg=lost count=3\n")

		w.Add(4, "id", 8)
		w.Close()
		want(t, logged(), "level=WARN msg=lost count=4 id=8\n")
		w.Add(1)
		w.Close()
		time.Sleep(2 * tally.Interval)
		synctest.Wait()
		want(t, logged(), "")
	})
}

// Nothing is counted twice or forgotten when many count at once.
func TestWarningIsShared(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		sum := 0
		log := slog.New(slog.NewTextHandler(new(lines), &slog.HandlerOptions{ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
			if a.Key == "count" {
				sum += int(a.Value.Int64())
			}
			return a
		}}))
		w := tally.New(log, "lost")
		var adding sync.WaitGroup
		for range 8 {
			adding.Go(func() {
				for range 100 {
					w.Add(1)
					time.Sleep(tally.Interval / 7)
				}
			})
		}
		adding.Wait()
		w.Close()
		if sum != 800 {
			t.Errorf("%d in the log, want 800", sum)
		}
	})
}
