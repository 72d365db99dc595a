package courier

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"pthost/ptipc"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// patience ends a test that would wait for ever.
const patience = 30 * time.Second

// records are what a courier logs.
type records chan string

func (r records) Enabled(context.Context, slog.Level) bool { return true }
func (r records) WithAttrs([]slog.Attr) slog.Handler       { return r }
func (r records) WithGroup(string) slog.Handler            { return r }

func (r records) Handle(_ context.Context, record slog.Record) error {
	line := record.Level.String() + " " + record.Message
	record.Attrs(func(a slog.Attr) bool {
		line += fmt.Sprintf(" %s=%v", a.Key, a.Value)
		return true
	})
	select {
	case r <- line:
	default: // a test that floods does not look at all of it
	}
	return nil
}

// await returns the next record that has all the words.
func (r records) await(t *testing.T, words ...string) string {
	t.Helper()
	timeout := time.After(patience)
next:
	for {
		select {
		case line := <-r:
			for _, word := range words {
				if !strings.Contains(line, word) {
					continue next
				}
			}
			return line
		case <-timeout:
			t.Fatalf("nothing was logged with %q", words)
		}
	}
}

// count returns how many of the records up to now have the word.
func (r records) count(word string) int {
	n := 0
	for {
		select {
		case line := <-r:
			if strings.Contains(line, word) {
				n++
			}
		default:
			return n
		}
	}
}

func newRecords() (records, *slog.Logger) {
	r := make(records, 10_000)
	return r, slog.New(r)
}

func receive(t *testing.T, s ptipc.Signals) ptipc.Message {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	m, err := s.Receive(ctx)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func send(t *testing.T, s ptipc.Signals, m ptipc.Message) {
	t.Helper()
	if err := s.Send(t.Context(), m); err != nil {
		t.Fatal(err)
	}
}

// message has n in its body.
func message(n int) ptipc.Message {
	return ptipc.Message{Body: ptipc.Opaque(fmt.Sprintf(`{"n":%d}`, n))}
}

// descriptors counts the open files of this process, or returns 0 where the system
// does not show them.
func descriptors() int {
	entries, _ := os.ReadDir("/proc/self/fd")
	return len(entries)
}
