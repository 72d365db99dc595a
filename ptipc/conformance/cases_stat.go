package conformance

import (
	"encoding/json"
	"time"

	"pthost/ptipc/localnet"
)

// statCases are about STATS, for children that announce stats=1.
var statCases = []Case{
	must("STAT-1/connection", func(t *trial) {
		c := t.counting(t.child())
		t.echoing(c)
		w := t.open(c, t.dest(c))
		client := localnet.ClientName(w.conn.LocalAddr())
		t.stats(c, client) // known also before the first byte
		w.echo("0123456789")
		var got counts
		if !t.until(func() bool {
			got = t.counts(t.stats(c, client))
			return got.is("received", 10) && got.is("sent", 10)
		}) {
			t.fell("received and sent of 10 bytes each", "%v", got)
		}
		opened, ok := got["opened"].(string)
		if _, err := time.Parse(time.RFC3339, opened); !ok || err != nil {
			t.fell("a time of RFC 3339 as opened", "%v", got["opened"])
		}
	}),
	must("STAT-2/totals", func(t *trial) {
		c := t.counting(t.child())
		t.echoing(c)
		before := t.counts(t.stats(c, ""))
		for _, name := range []string{"active", "opened", "failed", "received", "sent"} {
			if n, ok := before[name].(float64); !ok || n < 0 || n != float64(uint64(n)) {
				t.fell("a number as "+name, "%v", before[name])
			}
		}
		w := t.open(c, t.dest(c))
		w.echo("0123456789")
		var after counts
		grown := func(name string, by float64) bool { return after.is(name, before[name].(float64)+by) }
		if !t.until(func() bool {
			after = t.counts(t.stats(c, ""))
			return grown("opened", 1) && grown("received", 10) && grown("sent", 10)
		}) {
			t.fell("opened more by one, received and sent by ten, also while the connection is open", "%v, before %v", after, before)
		}
		if active, _ := after["active"].(float64); active < 1 {
			t.fell("one active connection at least", "%v", after["active"])
		}
		if !t.method(c).bound() {
			t.ask(c, t.nobody())
			if !t.until(func() bool { after = t.counts(t.stats(c, "")); return grown("failed", 1) }) {
				t.fell("failed more by one after a dial that failed", "%v, before %v", after["failed"], before["failed"])
			}
		}
		w.close()
		if !t.until(func() bool {
			after = t.counts(t.stats(c, ""))
			return after["active"].(float64) <= before["active"].(float64)
		}) {
			t.fell("active less by one when the connection has ended", "%v, before %v", after["active"], before["active"])
		}
	}),
	must("STAT-3/unknown", func(t *trial) {
		c := t.counting(t.child())
		for _, client := range []string{"127.0.0.1:1", "[::1]:1", "@00000", grease()} {
			if got := t.stats(c, client); got != "null" {
				t.fell("null for a connection that nobody knows", "%s for %s", got, client)
			}
		}
	}),
	must("STAT-3/gone", func(t *trial) {
		c := t.counting(t.child())
		w := t.open(c, t.dest(c))
		client := localnet.ClientName(w.conn.LocalAddr())
		if got := t.stats(c, client); got == "null" {
			t.fell("the statistics of an open connection", "null for %s", client)
		}
		w.close()
		if !t.until(func() bool { return t.stats(c, client) == "null" }) {
			t.fell("null for a connection that has ended", "%s", t.stats(c, client))
		}
	}),
	must("STAT-3/unix", func(t *trial) {
		c := t.counting(t.unixChild())
		w := t.open(c, t.dest(c))
		client := localnet.ClientName(w.conn.LocalAddr())
		if client == "" {
			t.cannot("this system has no names in the abstract space")
		}
		if got := t.stats(c, client); got == "null" {
			t.fell("the statistics of an open connection", "null for %s", client)
		}
	}),
	must("STAT-3/id", func(t *trial) {
		c := t.counting(t.child())
		for range 20 {
			t.stats(c, "") // looks for the answer with its number
		}
	}),
}

// counting ends the case for a child that does not answer STATS.
func (t *trial) counting(c *child) *child {
	if !t.method(c).stats() {
		t.cannot("the child does not announce stats=1")
	}
	return c
}

type counts map[string]any

func (c counts) least(name string, n int) bool {
	got, ok := c[name].(float64)
	return ok && got >= float64(n)
}

func (c counts) is(name string, n float64) bool { return c[name] == n }

func (t *trial) counts(answer string) counts {
	var c counts
	if err := json.Unmarshal([]byte(answer), &c); err != nil || c == nil {
		t.fell("a JSON object of statistics", "%s", answer)
	}
	return c
}
