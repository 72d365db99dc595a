package stdio

import (
	"bytes"
	"slices"
	"unicode/utf8"

	"pthost/ptipc"
)

// maxDepth is how deep a document may be nested, as for [ptipc.Opaque.Decode].
const maxDepth = 64

// scanSignal reads a signal as [ptipc.Opaque.Decode] does, but in one pass and without
// an allocation for each value: a child that floods its host with signals costs it little
// more than reading them. It takes nothing that Decode refuses. What it does not take
// is to be given to Decode, which says what is wrong; that may be nothing, since keys with
// escapes are left to it too.
func scanSignal(text []byte) (m ptipc.Message, ok bool) {
	if !utf8.Valid(text) {
		return m, false
	}
	s := scanner{b: text}
	whole := s.object(1, func(key []byte) bool {
		s.space()
		start := s.i
		switch {
		case string(key) == "body" && s.next() == '{' && s.value(2):
			m.Body = bytes.Clone(text[start:s.i])
		case string(key) == "peer" && s.next() == '"':
			peer, ok := s.text()
			if !ok || bytes.IndexByte(peer, '\\') >= 0 {
				return false
			}
			m.Peer = string(peer)
		default:
			return false
		}
		return true
	})
	s.space()
	return m, whole && s.i == len(text) && m.Body != nil
}

// scanObject reports whether text is one JSON object in UTF-8 as scanSignal takes them, and
// whether there is no space between its parts.
func scanObject(text []byte) (ok, compact bool) {
	s := scanner{b: text}
	s.space()
	ok = utf8.Valid(text) && s.next() == '{' && s.value(1)
	s.space()
	return ok && s.i == len(text), !s.spaced
}

// A scanner goes through JSON in which no key occurs twice. Its methods take what begins
// at i, with space before it but for text and word, and report whether it is there.
type scanner struct {
	b    []byte
	i    int
	keys [][]byte // those of all objects that i is in

	spaced bool // there was space
}

// next is the byte at i, 0 at the end.
func (s *scanner) next() byte {
	if s.i < len(s.b) {
		return s.b[s.i]
	}
	return 0
}

func (s *scanner) space() {
	for {
		switch s.next() {
		case ' ', '\t', '\n', '\r':
			s.i++
			s.spaced = true
		default:
			return
		}
	}
}

func (s *scanner) take(c byte) bool {
	s.space()
	if s.next() != c {
		return false
	}
	s.i++
	return true
}

// value takes a value whose own depth, if it has parts, is the one given.
func (s *scanner) value(depth int) bool {
	s.space()
	switch c := s.next(); c {
	case '{':
		return s.object(depth, func([]byte) bool { return s.value(depth + 1) })
	case '[':
		return s.list(depth)
	case '"':
		_, ok := s.text()
		return ok
	case 't':
		return s.word("true")
	case 'f':
		return s.word("false")
	case 'n':
		return s.word("null")
	default:
		return s.number()
	}
}

// object calls member for each value.
func (s *scanner) object(depth int, member func(key []byte) bool) bool {
	if depth > maxDepth || !s.take('{') {
		return false
	}
	if s.take('}') {
		return true
	}
	first := len(s.keys)
	for {
		s.space()
		key, ok := s.text()
		if !ok || bytes.IndexByte(key, '\\') >= 0 || !s.take(':') {
			return false
		}
		s.keys = append(s.keys, key)
		if !member(key) {
			return false
		}
		if s.take(',') {
			continue
		}
		ok = s.take('}') && allDiffer(s.keys[first:])
		s.keys = s.keys[:first]
		return ok
	}
}

// allDiffer may change the order of the keys.
func allDiffer(keys [][]byte) bool {
	if len(keys) > 1 {
		slices.SortFunc(keys, bytes.Compare)
	}
	for i := 1; i < len(keys); i++ {
		if bytes.Equal(keys[i-1], keys[i]) {
			return false
		}
	}
	return true
}

func (s *scanner) list(depth int) bool {
	if depth > maxDepth || !s.take('[') {
		return false
	}
	if s.take(']') {
		return true
	}
	for s.value(depth + 1) {
		if !s.take(',') {
			return s.take(']')
		}
	}
	return false
}

// text takes a string and returns what is between its quotes, escapes as they stand.
func (s *scanner) text() ([]byte, bool) {
	if s.next() != '"' {
		return nil, false
	}
	s.i++
	for start := s.i; s.i < len(s.b); {
		switch c := s.b[s.i]; {
		case c == '"':
			s.i++
			return s.b[start : s.i-1], true
		case c < ' ':
			return nil, false
		case c == '\\':
			if !s.escape() {
				return nil, false
			}
		default:
			s.i++
		}
	}
	return nil, false
}

func (s *scanner) escape() bool {
	s.i++
	c := s.next()
	s.i++
	if c != 'u' {
		return c != 0 && bytes.IndexByte([]byte(`"\/bfnrt`), c) >= 0
	}
	for range 4 {
		if c := s.next(); !isDigit(c) && (c|0x20 < 'a' || c|0x20 > 'f') {
			return false
		}
		s.i++
	}
	return true
}

func (s *scanner) word(w string) bool {
	ok := bytes.HasPrefix(s.b[s.i:], []byte(w))
	s.i += len(w)
	return ok
}

func (s *scanner) number() bool {
	if s.next() == '-' {
		s.i++
	}
	if s.next() == '0' {
		s.i++
	} else if !s.digits() {
		return false
	}
	if s.next() == '.' {
		s.i++
		if !s.digits() {
			return false
		}
	}
	if s.next()|0x20 == 'e' {
		s.i++
		if c := s.next(); c == '+' || c == '-' {
			s.i++
		}
		return s.digits()
	}
	return true
}

// digits takes one at least.
func (s *scanner) digits() bool {
	start := s.i
	for isDigit(s.next()) {
		s.i++
	}
	return s.i > start
}
