package sip003

import (
	"context"
	"log/slog"
	"os"
	"time"
)

// parentPoll is how often the parent is looked for where nothing tells of its end.
const parentPoll = time.Second

// WithParent returns a context that ends when the process that started this one does
// (SIP-8): a plugin is given no lifeline, and what its parent forgets, or leaves behind
// in a crash, would serve nobody for ever. stop gives the watch up. A process whose
// parent is outside of its PID namespace has no parent to watch. On Windows the id of the
// parent never changes, and its end is not seen; a Shadowsocks client keeps its plugins
// in a job object there.
func WithParent(ctx context.Context, log *slog.Logger) (_ context.Context, stop func()) {
	ctx, cancel := context.WithCancel(ctx)
	parent := os.Getppid()
	if parent <= 0 {
		return ctx, cancel
	}
	gone := parentGone(ctx, parent)
	go func() {
		<-gone
		if ctx.Err() == nil {
			log.Info("the process that started this plugin is gone", "pid", parent)
		}
		cancel()
	}()
	return ctx, cancel
}

// pollParent returns a channel that is closed when the process with this id is not the
// parent any more, or ctx has ended.
func pollParent(ctx context.Context, parent int) <-chan struct{} {
	gone := make(chan struct{})
	go func() {
		defer close(gone)
		ticker := time.NewTicker(parentPoll)
		defer ticker.Stop()
		for os.Getppid() == parent {
			select {
			case <-ticker.C:
			case <-ctx.Done():
				return
			}
		}
	}()
	return gone
}
