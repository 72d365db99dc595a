package host

import (
	"strings"
	"sync"
	"testing"
	"time"

	"pthost/ptipc"
)

// STAT-1, STAT-3: a connection's statistics come from the child, and are right.
func TestStats(t *testing.T) {
	var mu sync.Mutex
	var trace strings.Builder
	c := self("direct")
	c.Trace = func(fromChild bool, line []byte) {
		mu.Lock()
		defer mu.Unlock()
		trace.WriteString(map[bool]string{true: "< ", false: "> "}[fromChild] + string(line) + "\n")
	}
	began := time.Now()
	transport := open(t, c, `{}`, ptipc.Env{})
	echo := server(t)
	first, second := dial(t, transport.Connections["direct"], "", echo), dial(t, transport.Connections["direct"], "", echo)
	talk(t, first, "four")
	talk(t, second, strings.Repeat("x", 100000))
	for conn, want := range map[ptipc.Conn]uint64{first: 4, second: 100000} {
		eventually(t, "the child's counts", func() bool {
			stats := conn.Stats()
			return stats.Received == want && stats.Sent == want
		})
		if opened := conn.Stats().Opened; opened.Before(began) || opened.After(time.Now()) {
			t.Error("opened:", opened)
		}
	}
	mu.Lock()
	if !strings.Contains(trace.String(), "> STATS 1 @") || !strings.Contains(trace.String(), `< STATS 1 {"opened":"`) {
		t.Errorf("the child was not asked, or did not answer:\n%s", trace.String())
	}
	mu.Unlock()

	// STAT-2: totals, with what is open and what was.
	first.Close()
	stats, err := transport.Stats(t.Context())
	if err != nil || stats != (ptipc.TransportStats{Active: 1, Opened: 2, Received: 100004, Sent: 100004}) {
		t.Error("totals:", stats, err)
	}
	if stats := first.Stats(); stats.Sent != 4 || stats.Received != 4 {
		t.Error("a closed connection:", stats)
	}
	transport.Close()
	if stats := second.Stats(); stats.Sent != 100000 || stats.Received != 100000 {
		t.Error("after the end of the child:", stats)
	}
}

// STAT-3: an answer counts if it is one; otherwise the host's own counts do. A
// child that has not announced it is not asked, and one that never answers costs a
// bounded wait.
func TestStatsAnswers(t *testing.T) {
	for _, mode := range []string{"lie", "null", "list", "wrong-id", "never", "unannounced"} {
		t.Run(mode, func(t *testing.T) {
			c := self("stats", mode)
			c.Restart.Never = true
			transport := open(t, c, `{}`, ptipc.Env{})
			conn := dial(t, transport.Connections["x"], "", server(t))
			talk(t, conn, "hello")
			stats := conn.Stats()
			if mode == "lie" {
				want := ptipc.Stats{Opened: time.Date(2001, 2, 3, 4, 5, 6, 0, time.UTC), Received: 7, Sent: 9}
				if stats != want {
					t.Error(stats)
				}
			} else if stats.Sent != 5 || stats.Received != 5 || stats.Opened.IsZero() {
				t.Error(stats)
			}
			talk(t, conn, "and on it goes")
		})
	}
}
