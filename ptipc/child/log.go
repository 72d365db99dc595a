package child

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"strings"
	"time"

	"pthost/ptipc/stdio"
)

// maxLogMessage keeps a LOG line inside of LINE-1, however its bytes are escaped.
const maxLogMessage = 8 << 10

// NewLogHandler returns a handler that writes records as LOG lines to out, without
// those for debugging: each line waits for the host to read it (LINE-9).
func NewLogHandler(out *stdio.Writer) slog.Handler { return &logHandler{out: out} }

// logHandler writes records as LOG lines (LINE-9).
type logHandler struct {
	out *stdio.Writer
	// with is what WithAttrs and WithGroup have added, to be done again for each
	// record's own text handler.
	with []func(slog.Handler) slog.Handler
}

// Enabled leaves out what is for debugging.
func (h *logHandler) Enabled(_ context.Context, level slog.Level) bool {
	return level >= slog.LevelInfo
}

func (h *logHandler) Handle(ctx context.Context, r slog.Record) error {
	// The line has places of its own for these, and has no time.
	builtIn := map[string]bool{}
	var attrs bytes.Buffer
	var text slog.Handler = slog.NewTextHandler(&attrs, &slog.HandlerOptions{
		Level: r.Level,
		ReplaceAttr: func(groups []string, a slog.Attr) slog.Attr {
			if len(groups) == 0 && builtIn[a.Key] {
				delete(builtIn, a.Key) // an attribute of the same name may follow
				return slog.Attr{}
			}
			return a
		},
	})
	for _, add := range h.with {
		text = add(text)
	}
	message := r.Message
	r.Time = time.Time{}
	builtIn[slog.LevelKey], builtIn[slog.MessageKey] = true, true
	if err := text.Handle(ctx, r); err != nil {
		return err
	}
	if rest := bytes.TrimSpace(attrs.Bytes()); len(rest) > 0 {
		message = fmt.Sprintf("%s %s", message, rest)
	}
	if len(message) > maxLogMessage {
		message = strings.ToValidUTF8(message[:maxLogMessage], "") + "…"
	}
	return h.out.Send(stdio.Log{Level: r.Level, Message: message})
}

func (h *logHandler) WithAttrs(attrs []slog.Attr) slog.Handler {
	return h.plus(func(t slog.Handler) slog.Handler { return t.WithAttrs(attrs) })
}

func (h *logHandler) WithGroup(name string) slog.Handler {
	return h.plus(func(t slog.Handler) slog.Handler { return t.WithGroup(name) })
}

func (h *logHandler) plus(add func(slog.Handler) slog.Handler) slog.Handler {
	return &logHandler{out: h.out, with: append(h.with[:len(h.with):len(h.with)], add)}
}
