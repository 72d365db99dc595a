package localnet

import (
	"math/rand/v2"
	"net"
	"strconv"
	"sync"
)

// maxEnds is how many connections the table has room for.
const maxEnds = 1 << 16

// Ends is memory that a host and its child share. In it each end of a connection notes
// that it has ended its direction, before it says so on the socket. For a unix socket
// knows no reset: its reader sees the same end of the stream whether the other end is
// done, has given up or was killed. What the note is missing from has broken (SOCKS-20).
//
// The host makes it with [NewEnds] and hands File on to the child, which takes it with
// [InheritEnds]. Nothing that the child writes into it can harm the host. It needs no
// Close but that of File: the memory goes with the last [End].
type Ends struct {
	words []uint64 // two for each slot: the connecting end's, and the accepting end's

	mu   sync.Mutex
	used uint32   // slots below are in use or free again
	free []uint32 // last in, first out: few pages are touched
}

// An End is one end of a connection.
type End struct {
	ends *Ends
	slot uint32
	id   uint64 // a multiple of 8
	dial bool   // the connecting end
}

// What an end notes in its word, on top of the id (SOCKS-20, SOCKS-23).
const (
	ended    = 1 << iota // its direction has ended
	takes                // it takes over the socket of the other end
	finished             // and all that went over that socket has ended
	notes    = ended | takes | finished
)

// name is what a client's socket is called in the abstract space, without the NUL: four
// hexadecimal digits for the slot and sixteen for the id.
func (e *End) name() string {
	var b [20]byte
	putHex(b[:4], uint64(e.slot))
	putHex(b[4:], e.id)
	return string(b[:])
}

func putHex(b []byte, v uint64) {
	for i := len(b) - 1; i >= 0; i-- {
		b[i] = "0123456789abcdef"[v&15]
		v >>= 4
	}
}

// dialing takes a slot for a connection that this process makes; nil if none is free.
func (e *Ends) dialing() *End {
	end := &End{ends: e, dial: true, id: rand.Uint64() &^ notes} //nolint:gosec // nobody is let in for knowing it
	e.mu.Lock()
	defer e.mu.Unlock()
	switch n := len(e.free); {
	case n > 0:
		end.slot, e.free = e.free[n-1], e.free[:n-1]
	case e.used < maxEnds:
		end.slot = e.used
		e.used++
	default:
		return nil
	}
	e.store(2*end.slot, end.id)
	e.store(2*end.slot+1, end.id)
	return end
}

// Accepted is the end of a connection that was accepted from a client at addr, nil if
// the client's socket does not have the name of a slot.
func (e *Ends) Accepted(addr net.Addr) *End {
	unix, ok := addr.(*net.UnixAddr)
	if e == nil || !ok || !hasSlot(unix.Name) {
		return nil
	}
	slot, _ := strconv.ParseUint(unix.Name[1:5], 16, 16) // hasSlot has looked at the digits
	id, _ := strconv.ParseUint(unix.Name[5:], 16, 64)
	return &End{ends: e, slot: uint32(slot), id: id &^ notes}
}

// Release gives the slot of a connecting end back. It is called once, when the
// connection is closed. A nil End and an accepting one need not.
func (e *End) Release() {
	if e == nil || !e.dial {
		return
	}
	e.ends.mu.Lock()
	defer e.ends.mu.Unlock()
	e.ends.free = append(e.ends.free, e.slot)
}

// words returns the indexes of this end's word and of the other end's.
func (e *End) words() (own, other uint32) {
	if e.dial {
		return 2 * e.slot, 2*e.slot + 1
	}
	return 2*e.slot + 1, 2 * e.slot
}

// Mark notes that this end has sent all that it had to send. It comes before the
// socket's own end (SOCKS-20). An end that was closed long ago cannot mark another
// connection that has its slot now.
func (e *End) Mark() { e.note(ended) }

// Marked reports whether the other end has sent all that it had to send. It is asked when
// the stream has ended: without a mark it has broken (SOCKS-21).
func (e *End) Marked() bool { return e.noted(ended) }

// Take notes that this end takes over the socket behind the other one (SOCKS-23).
func (e *End) Take() { e.note(takes) }

// Takes reports whether the other end takes over the socket behind this one.
func (e *End) Takes() bool { return e.noted(takes) }

// Finish notes that all that went over the socket that was taken over has ended (SOCKS-25).
func (e *End) Finish() { e.note(finished) }

// Finished reports whether the other end has noted that.
func (e *End) Finished() bool { return e.noted(finished) }

func (e *End) note(what uint64) {
	own, _ := e.words()
	for range 16 { // only this process writes there, unless the other one is hostile
		word := e.ends.load(own)
		if word&^notes != e.id || e.ends.swap(own, word, word|what) {
			return
		}
	}
}

func (e *End) noted(what uint64) bool {
	_, other := e.words()
	word := e.ends.load(other)
	return word&^notes == e.id && word&what != 0
}
