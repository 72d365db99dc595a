// Package testvector reads the vectors of testdata. What they mean is the tests' own
// matter; their README files say it.
//
//	var vectors []*vector
//	testvector.Files(t, "../testdata/turn/server-*.txt", func(name string) func(line string) error {
//		v := &vector{name: name}
//		vectors = append(vectors, v)
//		return v.parse // "> 00 01*20 'text'", which testvector.Bytes reads
//	})
package testvector

import (
	"bytes"
	"encoding/hex"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
)

// Files reads each file that matches the pattern, of which there must be one, line by line.
// begin is told a file's name without ".txt", and returns what takes its lines.
func Files(t testing.TB, pattern string, begin func(name string) (line func(line string) error)) {
	t.Helper()
	for _, file := range glob(t, pattern) {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		line := begin(strings.TrimSuffix(filepath.Base(file), ".txt"))
		for i, text := range strings.Split(strings.TrimSuffix(string(text), "\n"), "\n") {
			if err := line(text); err != nil {
				t.Fatalf("%s:%d: %v", file, i+1, err)
			}
		}
	}
}

func glob(t testing.TB, pattern string) []string {
	t.Helper()
	files, err := filepath.Glob(pattern)
	if err != nil || len(files) == 0 {
		t.Fatalf("there are no vectors %s: %v", pattern, err)
	}
	return files
}

// Bytes reads bytes that are separated by blanks: HH is one, HH*N are N of it, and 'TEXT'
// is text without an escape.
func Bytes(text string) ([]byte, error) {
	out := []byte{}
	for text != "" {
		if quoted, ok := strings.CutPrefix(text, "'"); ok {
			s, rest, ok := strings.Cut(quoted, "'")
			if !ok {
				return nil, fmt.Errorf("no end of %q", text)
			}
			out = append(out, s...)
			text = strings.TrimPrefix(rest, " ")
			continue
		}
		word, rest, _ := strings.Cut(text, " ")
		text = rest
		digits, count, repeated := strings.Cut(word, "*")
		b, err := hex.DecodeString(digits)
		if err != nil || len(b) != 1 {
			return nil, fmt.Errorf("%q is not a byte", word)
		}
		n := 1
		if repeated {
			if n, err = strconv.Atoi(count); err != nil {
				return nil, err
			}
		}
		out = append(out, bytes.Repeat(b, n)...)
	}
	return out, nil
}

// A Line is "KEY: VALUE".
type Line struct{ Key, Value string }

// Stanzas reads files of many vectors, with an empty line between two of them and comments
// behind "#". take gets the lines of each, and the name of its file without ".txt".
func Stanzas(t testing.TB, pattern string, take func(file string, stanza []Line)) {
	t.Helper()
	for _, file := range glob(t, pattern) {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		for text := range strings.SplitSeq(string(text), "\n\n") {
			var stanza []Line
			for line := range strings.Lines(text) {
				line = strings.TrimSuffix(line, "\n")
				if line == "" || line[0] == '#' {
					continue
				}
				key, value, ok := strings.Cut(line, ":")
				if !ok {
					t.Fatalf("%s: strange line %q", file, line)
				}
				stanza = append(stanza, Line{key, strings.TrimPrefix(value, " ")})
			}
			if len(stanza) > 0 {
				take(strings.TrimSuffix(filepath.Base(file), ".txt"), stanza)
			}
		}
	}
}

// Unescape reads text in which %XX is a byte, and %{N} makes N of the one before.
func Unescape(t testing.TB, s string) []byte {
	t.Helper()
	b := []byte{}
	for s != "" {
		var err error
		switch {
		case s[0] != '%':
			b, s = append(b, s[0]), s[1:]
		case strings.HasPrefix(s, "%{"):
			var count string
			var n int
			count, s, _ = strings.Cut(s[2:], "}")
			n, err = strconv.Atoi(count)
			b = append(b, bytes.Repeat(b[len(b)-1:], n-1)...)
		default:
			var c uint64
			c, err = strconv.ParseUint(s[1:3], 16, 8)
			b, s = append(b, byte(c)), s[3:]
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	return b
}
