package proc

import (
	"fmt"
	"strings"
	"sync"
	"unicode"
	"unicode/utf8"
)

const (
	tailLines  = 20      // lines of standard error that an ExitError carries
	stderrLine = 1 << 10 // bytes that are kept of one of them
)

// tail keeps the last lines of standard error as they came: they are made safe
// only when somebody asks, so that a flood costs one copy and no garbage.
type tail struct {
	mu    sync.Mutex
	ring  [tailLines][]byte
	count int // lines ever added
}

func (t *tail) add(line []byte) {
	t.mu.Lock()
	defer t.mu.Unlock()
	slot := &t.ring[t.count%tailLines]
	*slot = append((*slot)[:0], line...)
	t.count++
}

func (t *tail) lines() []string {
	t.mu.Lock()
	defer t.mu.Unlock()
	lines := make([]string, 0, min(t.count, tailLines))
	for i := max(0, t.count-tailLines); i < t.count; i++ {
		lines = append(lines, safe(t.ring[i%tailLines]))
	}
	return lines
}

// safe makes a line fit for terminals and logs: whatever is not printable, the
// escape sequences of terminals and the marks that reverse the direction of text
// among it, is shown as an escape. The result has at most stderrLine bytes.
func safe(line []byte) string {
	const more = "…"
	var b strings.Builder
	for len(line) > 0 {
		r, n := utf8.DecodeRune(line)
		var shown string
		switch {
		case r == utf8.RuneError && n == 1:
			shown = fmt.Sprintf(`\x%02x`, line[0])
		case r == '\t', unicode.IsPrint(r):
			shown = string(line[:n])
		case r < 0x100:
			shown = fmt.Sprintf(`\x%02x`, r)
		default:
			shown = fmt.Sprintf(`\u%04x`, r)
		}
		// Escapes make a line longer, and the last byte may have more after it.
		if b.Len()+len(shown) > stderrLine-len(more) {
			b.WriteString(more)
			break
		}
		b.WriteString(shown)
		line = line[n:]
	}
	return b.String()
}
