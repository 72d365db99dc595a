package socks

import "pthost/ptipc"

const (
	maxSettings = 65536 // bytes, SOCKS-3 and SOCKS-4
	maxDepth    = 64    // levels, SOCKS-4; one bit each in scanner.arrays
)

// A scanner finds where a JSON object ends, in constant work and no memory for
// each byte (SOCKS-4). It looks at strings and brackets alone, so that what it
// has delimited is not known to be JSON yet, but it fails as soon as the bytes
// cannot become an object of at most 64 levels.
type scanner struct {
	arrays  uint64 // for each open level, 1 if it is an array
	depth   int
	quoted  bool // inside a string
	escaped bool // behind a backslash
	done    bool
}

// feed takes the next bytes and returns how many of them belong to the object;
// s.done says that it is complete. The error is a [ptipc.Class].
func (s *scanner) feed(b []byte) (int, error) {
	for i, c := range b {
		switch {
		case s.escaped:
			s.escaped = false
		case s.quoted:
			switch c {
			case '\\':
				s.escaped = true
			case '"':
				s.quoted = false
			}
		case c == '{' || c == '[' && s.depth > 0:
			if s.depth == maxDepth {
				return i, ptipc.ErrSettingsTooLarge
			}
			s.arrays <<= 1
			if c == '[' {
				s.arrays |= 1
			}
			s.depth++
		case s.depth == 0:
			if !isSpace(c) {
				return i, ptipc.ErrSettingsNotJSON
			}
		case c == '"':
			s.quoted = true
		case c == '}' || c == ']':
			if (c == ']') != (s.arrays&1 == 1) {
				return i, ptipc.ErrSettingsNotJSON
			}
			s.arrays >>= 1
			s.depth--
			if s.depth == 0 {
				s.done = true
				return i + 1, nil
			}
		}
	}
	return len(b), nil
}

func isSpace(c byte) bool { return c == ' ' || c == '\t' || c == '\n' || c == '\r' }
