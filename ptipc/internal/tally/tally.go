// Package tally warns of what may happen very often, without filling the log.
//
//	dropped := tally.New(log, "dropped messages: nobody reads them")
//	defer dropped.Close()
//	…
//	dropped.Add(1, "last", id)
//
// The first time is in the log at once, as count=1 last=1, and what happens after it as one
// line for each [Interval].
package tally

import (
	"log/slog"
	"sync"
	"time"
)

// Interval is the least time between two lines of a Warning, but for the last.
const Interval = 10 * time.Second

// A Warning is a line of a log that is repeated as long as there is reason to. Its methods
// may be called from several goroutines.
type Warning struct {
	log     *slog.Logger
	message string

	mu     sync.Mutex
	count  int         // since the last line
	last   []any       // attributes of the last time
	timer  *time.Timer // runs while a line would come too soon
	closed bool
}

// New returns a Warning that writes message to log, at the level of warnings.
func New(log *slog.Logger, message string) *Warning { return &Warning{log: log, message: message} }

// Add counts what has happened n times. The line has the attribute count, which is the sum
// since the line before it, and those of the last call, which are like slog's. After Close
// it does nothing.
func (w *Warning) Add(n int, attrs ...any) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.closed {
		return
	}
	w.count, w.last = w.count+n, attrs
	if w.timer == nil {
		w.write()
		w.timer = time.AfterFunc(Interval, w.tick)
	}
}

// write is called with mu held.
func (w *Warning) write() {
	w.log.Warn(w.message, append([]any{"count", w.count}, w.last...)...)
	w.count, w.last = 0, nil
}

func (w *Warning) tick() {
	w.mu.Lock()
	defer w.mu.Unlock()
	switch {
	case w.closed:
	case w.count == 0:
		w.timer = nil
	default:
		w.write()
		w.timer.Reset(Interval)
	}
}

// Close writes what has not been written yet.
func (w *Warning) Close() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.timer != nil {
		w.timer.Stop()
	}
	if w.count > 0 {
		w.write()
	}
	w.closed = true
}
