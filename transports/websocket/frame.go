package websocket

import (
	"crypto/subtle"
	"encoding/binary"
	"errors"
	"fmt"
	"unicode/utf8"

	"github.com/gorilla/websocket"
)

// Frames are read and written here and not by gorilla's Conn, which makes the
// opening handshake. That Conn fails for good when a deadline passes, in either
// direction, and a net.Conn's must not; and it holds a buffer and makes an
// object for each message, where a stream can go straight to its reader.

// The opcodes of RFC 6455, section 5.2.
const (
	opContinuation = 0
	opText         = websocket.TextMessage
	opBinary       = websocket.BinaryMessage
	opClose        = websocket.CloseMessage
	opPing         = websocket.PingMessage
	opPong         = websocket.PongMessage
)

const (
	finBit     = 0x80
	rsvBits    = 0x70
	opBits     = 0x0f
	maskBit    = 0x80
	lengthBits = 0x7f

	maxControl = 125       // bytes in a control frame
	maxHeader  = 2 + 8 + 4 // of a frame
)

// appendFrame appends a final frame. key is nil on a server.
func appendFrame(b []byte, op byte, payload []byte, key *[4]byte) []byte {
	var masked byte
	if key != nil {
		masked = maskBit
	}
	b = append(b, finBit|op)
	switch n := len(payload); {
	case n <= maxControl:
		b = append(b, masked|byte(n))
	case n <= 0xffff:
		b = append(b, masked|126)
		b = binary.BigEndian.AppendUint16(b, uint16(n))
	default:
		b = append(b, masked|127)
		b = binary.BigEndian.AppendUint64(b, uint64(n))
	}
	if key == nil {
		return append(b, payload...)
	}
	b = append(b, key[:]...)
	start := len(b)
	if cap(b)-start < len(payload) {
		b = append(b, payload...)
		mask(b[start:], b[start:], *key, 0)
		return b
	}
	b = b[:start+len(payload)]
	mask(b[start:], payload, *key, 0) // copies and masks in one pass
	return b
}

// mask writes src, masked from position pos of the key on, to dst. They are the
// same memory or do not overlap, and have the same length.
func mask(dst, src []byte, key [4]byte, pos int) {
	var pattern [256]byte
	for i := range 4 {
		pattern[i] = key[(pos+i)&3]
	}
	size := min(len(pattern), len(src))
	for n := 4; n < size; n *= 2 {
		copy(pattern[n:], pattern[:n])
	}
	for len(src) > 0 {
		n := subtle.XORBytes(dst, src, pattern[:])
		dst, src = dst[n:], src[n:]
	}
}

// broken is a fault of the peer (WS-12).
func broken(reason string) error {
	return errors.New("websocket: the peer broke the protocol: " + reason)
}

// An event is what a decoder stops at. Control frames have their opcodes.
type event byte

const (
	nothing  event = 0
	gotEnd   event = 1 // the end of the stream
	gotClose event = opClose
	gotPing  event = opPing
	gotPong  event = opPong
)

// A decoder turns the bytes of one direction into a stream, whatever pieces they
// come in. It holds nothing but a header and the payload of a control frame,
// however large a message is (WS-5).
type decoder struct {
	masked bool // the peer is a client, whose frames are masked

	header  [maxHeader]byte
	have    int  // bytes in header
	inFrame bool // the header is whole, its payload is not
	op      byte
	left    uint64 // payload still to come
	key     [4]byte
	pos     int // in key

	inMessage bool // the last frame of a message is still to come
	binary    bool // the message is
	empty     bool // the message has had no bytes
	ended     bool // the stream has

	control []byte // the payload of a control frame
}

// decode takes bytes from src and puts those of the stream into dst, until src
// is used up, dst is full or something happens. dst and src may start at the same
// place. The payload of a control frame is in d.control until the next call.
func (d *decoder) decode(dst, src []byte) (n, used int, what event, err error) {
	for used < len(src) {
		if !d.inFrame {
			used += d.takeHeader(src[used:])
			if d.have < d.headerSize() {
				break
			}
			if err := d.beginFrame(); err != nil {
				return n, used, nothing, err
			}
		} else {
			m := int(min(d.left, uint64(len(src)-used)))
			if d.op >= opClose {
				d.control = append(d.control, src[used:used+m]...)
			} else {
				if m = min(m, len(dst)-n); m == 0 {
					return n, used, nothing, nil
				}
				d.payload(dst[n:n+m], src[used:used+m])
				n += m
			}
			used += m
			d.left -= uint64(m)
		}
		if d.left == 0 {
			if what := d.endFrame(); what != nothing {
				return n, used, what, nil
			}
		}
	}
	return n, used, nothing, nil
}

// payload moves payload from src to dst, which starts at the same place or before.
func (d *decoder) payload(dst, src []byte) {
	if &dst[0] != &src[0] {
		copy(dst, src)
	}
	if d.masked {
		mask(dst, dst, d.key, d.pos)
		d.pos = (d.pos + len(dst)) & 3
	}
}

// headerSize is how long the header is, as far as is known.
func (d *decoder) headerSize() int {
	if d.have < 2 {
		return 2
	}
	size := 2
	switch d.header[1] & lengthBits {
	case 126:
		size += 2
	case 127:
		size += 8
	}
	if d.header[1]&maskBit != 0 {
		size += 4
	}
	return size
}

func (d *decoder) takeHeader(src []byte) (used int) {
	for used < len(src) && d.have < d.headerSize() {
		n := copy(d.header[d.have:d.headerSize()], src[used:])
		d.have += n
		used += n
	}
	return used
}

// beginFrame reads the header, which is whole (WS-12).
func (d *decoder) beginFrame() error {
	first, second := d.header[0], d.header[1]
	rest := d.header[2:d.have]
	switch second & lengthBits {
	case 126:
		d.left = uint64(binary.BigEndian.Uint16(rest))
		rest = rest[2:]
	case 127:
		d.left = binary.BigEndian.Uint64(rest)
		rest = rest[8:]
	default:
		d.left = uint64(second & lengthBits)
	}
	if masked := second&maskBit != 0; masked != d.masked {
		if masked {
			return broken("a server's frame is masked")
		}
		return broken("a client's frame is not masked")
	}
	copy(d.key[:], rest)
	d.pos, d.have, d.inFrame = 0, 0, true
	d.op = first & opBits
	final := first&finBit != 0
	if first&rsvBits != 0 {
		return broken("a reserved bit is set")
	}
	if d.left>>63 != 0 {
		return broken("a length has more than 63 bits")
	}
	switch d.op {
	case opClose, opPing, opPong:
		if !final {
			return broken("a control frame is fragmented")
		}
		if second&lengthBits > maxControl { // also one that is written longer than it has to be
			return broken("a control frame is longer than 125 bytes")
		}
		d.control = d.control[:0]
		return nil
	case opText, opBinary:
		if d.inMessage {
			return broken("a message begins inside another one")
		}
		d.binary, d.empty = d.op == opBinary, true
	case opContinuation:
		if !d.inMessage {
			return broken("a continuation continues nothing")
		}
	default:
		return broken(fmt.Sprintf("opcode %d is reserved", d.op))
	}
	if d.ended {
		return broken("data came after the end of the stream") // WS-7
	}
	d.inMessage = !final
	d.empty = d.empty && d.left == 0
	return nil
}

// endFrame says what the frame that is complete now means.
func (d *decoder) endFrame() event {
	d.inFrame = false
	switch d.op {
	case opClose, opPing, opPong:
		if d.masked {
			mask(d.control, d.control, d.key, 0)
		}
		return event(d.op)
	}
	if !d.inMessage && d.binary && d.empty {
		d.ended = true // WS-6
		return gotEnd
	}
	return nothing
}

// closing reads the payload of a close frame.
func closing(payload []byte) (*websocket.CloseError, error) {
	switch {
	case len(payload) == 0:
		return &websocket.CloseError{Code: websocket.CloseNoStatusReceived}, nil
	case len(payload) == 1:
		return nil, broken("a close frame has half a code")
	}
	code, text := int(binary.BigEndian.Uint16(payload)), payload[2:]
	switch {
	case code >= 3000 && code <= 4999:
	case code < websocket.CloseNormalClosure, code > websocket.CloseTryAgainLater+1, // 1014 is newer than gorilla
		code == 1004, code == websocket.CloseNoStatusReceived, code == websocket.CloseAbnormalClosure:
		return nil, broken(fmt.Sprintf("a close frame has code %d", code))
	}
	if !utf8.Valid(text) {
		return nil, broken("the text of a close frame is not UTF-8")
	}
	return &websocket.CloseError{Code: code, Text: string(text)}, nil
}

// clean reports whether a close frame with this error ends the streams, rather
// than breaking them (WS-9).
func clean(err error) bool {
	var closed *websocket.CloseError
	if !errors.As(err, &closed) {
		return false
	}
	switch closed.Code {
	case websocket.CloseNormalClosure, websocket.CloseGoingAway, websocket.CloseNoStatusReceived:
		return true
	}
	return false
}
