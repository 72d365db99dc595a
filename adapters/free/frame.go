package free

import (
	"encoding/binary"
	"errors"
	"fmt"

	"pthost/ptipc"
)

// A frame of a carrier of many streams (FREE-15).
const (
	versionMany = 2

	frameHeader  = 7         // type, stream, length
	maxFrameData = 1<<16 - 1 // what the length can say

	frameOpen   = 1
	frameAnswer = 2
	frameData   = 3
	frameEnd    = 4
	frameStop   = 5
	frameReset  = 6
	frameWindow = 7
	framePing   = 8
	framePong   = 9
)

func appendFrame(b []byte, kind byte, id uint32, payload []byte) []byte {
	b = append(b, kind)
	b = binary.BigEndian.AppendUint32(b, id)
	b = binary.BigEndian.AppendUint16(b, uint16(len(payload)))
	return append(b, payload...)
}

// A frameReceiver takes what a decoder reads.
type frameReceiver interface {
	// begin is told of a frame before its payload.
	begin(kind byte, id uint32, length int) error
	// data is part of a DATA frame's payload.
	data(id uint32, p []byte) error
	// frame is any other frame, whole. The payload is valid during the call.
	frame(kind byte, id uint32, payload []byte) error
}

// errMuxFault is what the peer does against section 4 of spec/free.md (FREE-22).
var errMuxFault = errors.New("free: the peer broke the protocol of a carrier of many streams")

func fault(what string) error { return fmt.Errorf("%w: %s", errMuxFault, what) }

// A decoder turns the bytes of a carrier into frames, whatever pieces they come
// in. It holds no more than the payload of one frame that is not data.
type decoder struct {
	header [frameHeader]byte
	have   int // bytes in header
	kind   byte
	id     uint32
	left   int    // payload still to come
	body   []byte // of a frame that is not data
}

// limit is how long the payload of a frame may be, and whether one that is shorter is
// possible too. Types that are not known are skipped (FREE-15).
func limit(kind byte) (most int, exact, known bool) {
	switch kind {
	case frameOpen, frameData:
		return maxFrameData, false, true
	case frameAnswer:
		return 1, true, true
	case frameWindow:
		return 4, true, true
	case frameEnd, frameStop, frameReset, framePing, framePong:
		return 0, true, true
	}
	return 0, false, false
}

func (d *decoder) decode(b []byte, to frameReceiver) error {
	for len(b) > 0 {
		if d.have < frameHeader {
			n := copy(d.header[d.have:], b)
			d.have += n
			b = b[n:]
			if d.have < frameHeader {
				return nil
			}
			d.kind, d.id = d.header[0], binary.BigEndian.Uint32(d.header[1:])
			d.left = int(binary.BigEndian.Uint16(d.header[5:]))
			if most, exact, _ := limit(d.kind); exact && d.left != most {
				return fault(fmt.Sprintf("a frame of type %d has %d bytes", d.kind, d.left))
			}
			d.body = d.body[:0]
			if err := to.begin(d.kind, d.id, d.left); err != nil {
				return err
			}
		}
		n := min(d.left, len(b))
		part := b[:n]
		b = b[n:]
		d.left -= n
		_, _, known := limit(d.kind)
		switch {
		case d.kind == frameData:
			if err := to.data(d.id, part); err != nil {
				return err
			}
		case known && len(d.body) <= maxLength: // an OPEN that is longer is refused, see handle
			d.body = append(d.body, part...)
		}
		if d.left > 0 {
			return nil
		}
		d.have = 0
		if known && d.kind != frameData {
			if err := to.frame(d.kind, d.id, d.body); err != nil {
				return err
			}
		}
	}
	return nil
}

// parseOpen reads the payload of an OPEN, which is what stands behind the length of a header.
func parseOpen(b []byte) (dest string, err error) {
	if len(b) > maxLength { // FREE-3
		return "", fmt.Errorf("the header has more than %d bytes: %w", maxLength, ptipc.ErrSettingsTooLarge)
	}
	return parseBody(b)
}
