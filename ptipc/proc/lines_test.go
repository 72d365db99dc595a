package proc

import (
	"bytes"
	"fmt"
	"strings"
	"testing"
	"unicode"
	"unicode/utf8"
)

type gotLine struct {
	text      string
	truncated bool
}

func (l gotLine) String() string { return fmt.Sprintf("%q/%t", l.text, l.truncated) }

// split feeds a stream in pieces of the given size.
func split(stream []byte, limit, piece int) []gotLine {
	var got []gotLine
	s := &splitter{max: limit, emit: func(line []byte, truncated bool) {
		got = append(got, gotLine{string(line), truncated})
	}}
	for len(stream) > 0 {
		n := min(piece, len(stream))
		// A copy, spoilt afterwards: the splitter may not keep what it was given.
		p := bytes.Clone(stream[:n])
		s.write(p)
		for i := range p {
			p[i] = '#'
		}
		stream = stream[n:]
	}
	s.finish()
	return got
}

// splitWhole says the same as split of a stream that is there as a whole.
func splitWhole(stream []byte, limit int) []gotLine {
	var got []gotLine
	lines := strings.SplitAfter(string(stream), "\n")
	for _, line := range lines {
		body, whole := strings.CutSuffix(line, "\n")
		switch {
		case line == "":
		case len(body) > limit-1:
			got = append(got, gotLine{body[:limit-1], true})
		case !whole:
			got = append(got, gotLine{body, true})
		default:
			got = append(got, gotLine{strings.TrimSuffix(body, "\r"), false})
		}
	}
	return got
}

func TestSplitter(t *testing.T) {
	const limit = 8 // seven bytes and LF
	for _, c := range []struct {
		name, stream string
		want         []gotLine
	}{
		{"plain", "a\nbc\n", []gotLine{{"a", false}, {"bc", false}}},
		{"empty lines", "\n\n", []gotLine{{"", false}, {"", false}}},
		{"CR LF", "a\r\nb\rc\n", []gotLine{{"a", false}, {"b\rc", false}}},
		{"just fits", "1234567\nx\n", []gotLine{{"1234567", false}, {"x", false}}},
		{"one too long", "12345678\nx\n", []gotLine{{"1234567", true}, {"x", false}}},
		{"much too long", strings.Repeat("1234567890", 100) + "\nx\n", []gotLine{{"1234567", true}, {"x", false}}},
		{"two too long", "123456789\n987654321\n", []gotLine{{"1234567", true}, {"9876543", true}}},
		{"NUL and not UTF-8", "a\x00\xff\xfe\n\x80\n", []gotLine{{"a\x00\xff\xfe", false}, {"\x80", false}}},
		{"cut off", "a\nb", []gotLine{{"a", false}, {"b", true}}},
		{"cut off in a long one", "a\n123456789", []gotLine{{"a", false}, {"1234567", true}}},
	} {
		t.Run(c.name, func(t *testing.T) {
			for piece := 1; piece <= len(c.stream); piece++ {
				if got := split([]byte(c.stream), limit, piece); fmt.Sprint(got) != fmt.Sprint(c.want) {
					t.Errorf("in pieces of %d: got %v, want %v", piece, got, c.want)
				}
			}
		})
	}
}

// A splitter that is fed an endless line keeps no more than the limit.
func TestSplitterMemory(t *testing.T) {
	s := &splitter{max: 100, emit: func([]byte, bool) {}}
	for range 1000 {
		s.write(bytes.Repeat([]byte{'x'}, 1000))
		if cap(s.buf) > 1000 {
			t.Fatalf("the splitter holds %d bytes of a line of at most 100", cap(s.buf))
		}
	}
}

func FuzzSplitter(f *testing.F) {
	f.Add([]byte("VERSION 1\nCMETHODS DONE\r\n"), 16, 3)
	f.Fuzz(func(t *testing.T, stream []byte, limit, piece int) {
		if limit < 1 || limit > 1<<12 || piece < 1 {
			t.Skip()
		}
		got, want := split(stream, limit, piece), splitWhole(stream, limit)
		if fmt.Sprint(got) != fmt.Sprint(want) {
			t.Errorf("limit %d, pieces of %d: got %v, want %v", limit, piece, got, want)
		}
	})
}

func TestSafe(t *testing.T) {
	for _, c := range []struct{ in, want string }{
		{"plain text, ünï", "plain text, ünï"},
		{"a\tb", "a\tb"},
		{"\x1b[2J\x07\x00\r", `\x1b[2J\x07\x00\x0d`},
		{"\xff\xc3", `\xff\xc3`},
		{"\u009b31m", `\x9b31m`},             // CSI as one character
		{"a\u202eb\u2066", `a\u202eb\u2066`}, // direction marks
		{strings.Repeat("x", 2000), strings.Repeat("x", stderrLine-len("…")) + "…"},
		{strings.Repeat("\x1b", 2000), strings.Repeat(`\x1b`, (stderrLine-len("…"))/4) + "…"},
	} {
		got := safe([]byte(c.in))
		if got != c.want {
			t.Errorf("safe(%.40q) = %.60q, want %.60q", c.in, got, c.want)
		}
		if len(got) > stderrLine {
			t.Errorf("safe(%.40q) has %d bytes, limit %d", c.in, len(got), stderrLine)
		}
	}
}

func FuzzSafe(f *testing.F) {
	f.Add([]byte("plain"))
	f.Fuzz(func(t *testing.T, line []byte) {
		got := safe(line)
		if len(got) > stderrLine || !utf8.ValidString(got) {
			t.Errorf("safe(%q) = %q with %d bytes", line, got, len(got))
		}
		for _, r := range got {
			if r != '\t' && !unicode.IsPrint(r) {
				t.Errorf("safe(%q) = %q has %U in it", line, got, r)
			}
		}
	})
}

func TestTail(t *testing.T) {
	var tl tail
	if got := tl.lines(); len(got) != 0 {
		t.Errorf("an empty tail has lines %q", got)
	}
	for i := range 53 {
		tl.add(fmt.Appendf(nil, "line %d", i))
	}
	got := tl.lines()
	if len(got) != tailLines || got[0] != "line 33" || got[tailLines-1] != "line 52" {
		t.Errorf("the tail of 53 lines is %q", got)
	}
}
