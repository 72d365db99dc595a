package proc

import "bytes"

// splitter cuts a stream into lines of bounded length. A line that is too long is
// passed on once, cut, as soon as it is known to be too long, and the rest of it is
// skipped; nothing after its LF is lost (LINE-1).
type splitter struct {
	max      int // bytes of a line, its LF included
	emit     func(line []byte, truncated bool)
	buf      []byte // the beginning of a line whose LF has not come yet
	skipping bool   // the line has been passed on, cut; its LF has not come yet
}

// write takes the next bytes of the stream. What emit is given is valid until emit
// returns: lines that came in one piece are not copied.
func (s *splitter) write(p []byte) {
	for len(p) > 0 {
		i := bytes.IndexByte(p, '\n')
		piece, rest := p, p[len(p):]
		if i >= 0 {
			piece, rest = p[:i], p[i+1:]
		}
		s.take(piece, i >= 0)
		p = rest
	}
}

// take adds a piece of one line, which ends with it if last is set.
func (s *splitter) take(piece []byte, last bool) {
	switch room := s.max - 1 - len(s.buf); {
	case s.skipping:
		s.skipping = !last
	case len(piece) > room:
		s.buf = append(s.buf, piece[:room]...)
		s.emit(s.buf, true)
		s.forget()
		s.skipping = !last
	case !last:
		s.buf = append(s.buf, piece...)
	case len(s.buf) == 0:
		s.emit(bytes.TrimSuffix(piece, []byte{'\r'}), false)
	default:
		s.buf = append(s.buf, piece...)
		s.emit(bytes.TrimSuffix(s.buf, []byte{'\r'}), false)
		s.forget()
	}
}

// forget empties the buffer. A big one is given back: most children write a long
// line once, if ever, and live for weeks.
func (s *splitter) forget() {
	if cap(s.buf) > 4<<10 {
		s.buf = nil
	}
	s.buf = s.buf[:0]
}

// finish is the end of the stream. A last line without an LF may have been cut
// anywhere by the death of its writer, so it counts as truncated.
func (s *splitter) finish() {
	if len(s.buf) > 0 {
		s.emit(s.buf, true)
		s.forget()
	}
	s.skipping = false
}
