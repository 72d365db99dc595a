package conformance

import (
	"errors"
	"net/netip"
	"regexp"
	"strings"
	"sync"
	"unicode/utf8"

	"pthost/ptipc/localnet"
)

// anyLineCases are about the control lines of any child that stays.
var anyLineCases = []Case{
	must("LINE-1/skipped", func(t *trial) {
		c, works := t.working(launch{})
		for _, line := range []string{
			strings.Repeat("a", 70_000), "STATS " + strings.Repeat("1", 70_000), "STATS 1 " + strings.Repeat("x", 65_536-8),
			"", " ", " STATS 1", "STATS  1", "STATS\t1", "!", "\x00", "STATS 1\x00", "\xff\xfe", "STATS \xff", "\r", "STATS", "STATS x y z", "STATS -1",
		} {
			t.line(c, line)
		}
		t.alive(c, works)
	}),
	must("LINE-1/cr", func(t *trial) {
		c, _ := t.working(launch{})
		t.counting(c)
		t.line(c, "STATS 4711\r")
		if !t.until(func() bool { return len(c.with("STATS")) > 0 }) || !strings.HasPrefix(c.with("STATS")[0], "4711 ") {
			t.fell("the answer STATS 4711 to a line that ends in CR LF", "%q", c.with("STATS"))
		}
	}),
	must("LINE-2/unknown-keyword", func(t *trial) {
		c, works := t.working(launch{})
		for _, line := range []string{strings.ToUpper(grease()), grease() + " x", "CMETHOD x socks5 127.0.0.1:1", "VERSION 2", "-", "_ \"", "stats 1"} {
			t.line(c, line)
		}
		t.alive(c, works)
	}),
	must("LINE-3/version-first", func(t *trial) {
		const expected = "VERSION 1 before any line but LOG and STATUS"
		c, _ := t.working(launch{})
		for _, line := range c.lines() {
			switch keyword, _, _ := strings.Cut(line.text, " "); {
			case keyword == "LOG" || keyword == "STATUS":
				continue
			case line.text != "VERSION 1":
				t.fell(expected, "%q", line.text)
			}
			return
		}
		t.fell(expected, "no other line")
	}),
	must("LINE-3/no-version", func(t *trial) {
		t.extended()
		c := t.start(launch{host: map[string]any{"version": []int{65_000}}})
		t.exit(c, "when the host speaks version 65000 alone", 78)
		if lines := c.with("VERSION-ERROR"); len(lines) != 1 || lines[0] != "no-version" {
			t.fell("VERSION-ERROR no-version", "%q", lines)
		}
	}),
}

// lineCases are about what a client announces.
var lineCases = []Case{
	must("LINE-4/form", func(t *trial) {
		form := regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_-]{0,63} (?:socks5|turn) [^ ]+( ARGS:[^ ]+)?$`)
		for _, line := range t.child().with("CMETHOD") {
			if !form.MatchString(line) {
				t.fell("CMETHOD NAME and socks5 or turn, ADDR, and ARGS: or nothing", "CMETHOD %s", line)
			}
		}
	}),
	must("LINE-5/address", func(t *trial) {
		name := regexp.MustCompile(`^unix:[A-Za-z0-9._-]{1,64}$`)
		c := t.ready(launch{})
		for _, m := range c.methods() {
			tcp, err := netip.ParseAddrPort(m.addr)
			if loopback := err == nil && tcp.Addr().IsLoopback() && !tcp.Addr().Is4In6() && tcp.Port() > 0; !loopback && !name.MatchString(m.addr) {
				t.fell("a loopback address with a port, or unix: and a plain file name", "%s", m.addr)
			}
		}
	}),
	must("LINE-6/args", func(t *trial) {
		pair := regexp.MustCompile(`^(?:[^ \\,=]|\\[\\,=])+=(?:[^ \\,=]|\\[\\,=])*(?:,|$)`)
		const expected = `K=V pairs with commas between them, without spaces, and \ before \ , and = alone`
		for _, m := range t.child().methods() {
			for rest := m.args; rest != ""; {
				kv := pair.FindString(rest)
				if kv == "" || rest == kv && strings.HasSuffix(kv, ",") {
					t.fell(expected, "%q in %q", rest, m.args)
				}
				rest = rest[len(kv):]
				k, v, _ := strings.Cut(strings.TrimSuffix(kv, ","), "=")
				if (k == "bound" || k == "stats") && v != "1" {
					t.fell(k+"=1", "%s", kv)
				}
			}
		}
	}),
	must("LINE-7/listening", func(t *trial) {
		var once sync.Once
		failed := make(chan error, 1)
		t.ready(launch{onDone: func(c *child) {
			once.Do(func() {
				defer close(failed)
				for _, m := range c.methods() {
					if m.protocol == turnProtocol {
						continue // PKT-4 has a case that needs an answer
					}
					conn, err := connect(t.ctx, c, m)
					if errors.Is(err, localnet.ErrAddr) {
						continue // LINE-5 has a case for that
					}
					if err != nil {
						failed <- err
						return
					}
					conn.Close()
				}
			})
		}})
		if err := <-failed; err != nil {
			t.fell("every announced socket listening by the time of CMETHODS DONE", "%v", err)
		}
	}),
	must("LINE-7/last", func(t *trial) {
		t.announcesNoMore(t.ready(launch{}))
	}),
}

// writtenCases look at everything that the children of this run have written.
var writtenCases = []Case{
	should("LINE-1/form", func(t *trial) {
		form := regexp.MustCompile(`^[A-Za-z0-9_-]+(?: .*)?$`)
		for _, line := range t.everything() {
			if line.cut || !form.MatchString(line.text) || !utf8.ValidString(line.text) || strings.Contains(line.text, "\x00") {
				t.fell("a keyword, and nothing or a space and arguments, in UTF-8 without NUL, at most 65,536 bytes with its LF",
					"%q", line.text[:min(len(line.text), 4*shownBytes)])
			}
		}
	}),
	must("LINE-9/log", func(t *trial) {
		form := regexp.MustCompile(`^LOG SEVERITY=(?i:error|warning|notice|info|debug) MESSAGE=` + value + `$`)
		t.everyLine("LOG", form, "LOG SEVERITY=S MESSAGE=M, where M is a bare word or a string in double quotes")
	}),
	must("LINE-10/status", func(t *trial) {
		form := regexp.MustCompile(`^STATUS(?: [^ ="]+=` + value + `)+$`)
		t.everyLine("STATUS", form, "STATUS K=V …, where V is a bare word or a string in double quotes")
	}),
}

// value is a bare word or a string with C escapes (LINE-9).
const value = `(?:[^" ][^ ]*|"(?:[^"\\]|\\[abefnrtv'"\\?]|\\[0-7]{1,3}|\\x[0-9A-Fa-f]{1,2})*")?`

// announcesNoMore demands that nothing is announced after the end of the announcements.
func (t *trial) announcesNoMore(c *child) {
	c.stop()
	word := strings.TrimSuffix(c.lastWord(), "S DONE")
	seen := false
	for _, line := range c.lines() {
		keyword, _, _ := strings.Cut(line.text, " ")
		if seen && (keyword == word || keyword == word+"S") {
			t.fell("no announcement after "+c.lastWord(), "%q", line.text)
		}
		seen = seen || line.text == c.lastWord()
	}
}

// alive demands that the child still works, and still reads its standard input.
func (t *trial) alive(c *child, works func()) {
	if !c.datagrams() && t.method(c).stats() {
		t.stats(c, "")
	}
	works()
	if c.ended() {
		t.fell("a child that goes on", "%v", c.proc.Err())
	}
}

// everything is what the children of this run have written: at least what one
// writes that starts, is asked for something that fails, and stops.
func (t *trial) everything() []outLine {
	if len(t.suite.lines) == 0 {
		c, works := t.working(launch{})
		works()
		if c.role == Client && !c.datagrams() {
			w, _ := t.ask(c, t.wrongDest()) // whatever it says to that
			w.close()
		}
		c.stop()
		return c.lines()
	}
	return t.suite.lines
}

func (t *trial) everyLine(keyword string, form *regexp.Regexp, expected string) {
	seen := false
	for _, line := range t.everything() {
		if k, _, _ := strings.Cut(line.text, " "); k != keyword {
			continue
		}
		seen = true
		if !form.MatchString(line.text) {
			t.fell(expected, "%q", line.text)
		}
	}
	if !seen {
		t.cannot("no child wrote a %s line", keyword)
	}
}
