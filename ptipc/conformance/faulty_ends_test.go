package conformance_test

import (
	"encoding/binary"
	"fmt"
	"os"
	"strconv"
	"sync"
	"sync/atomic"
)

// A faultyEnd marks with nothing but reading and writing, as any language can.
type faultyEnd struct {
	memory     *os.File
	name       string
	id         uint64
	own, other int64
	mu         sync.Mutex // for notes
}

var (
	faultySlots  atomic.Uint64
	faultyMemory *os.File
	faultyOnce   sync.Once
)

func (f *faulty) memory() *os.File {
	faultyOnce.Do(func() { faultyMemory = os.NewFile(uintptr(f.host.Ends), "ends") })
	return faultyMemory
}

// dialing is the end of a connection that the child makes; nil without memory.
func (f *faulty) dialing() *faultyEnd {
	if f.host.Ends == 0 {
		return nil
	}
	slot := faultySlots.Add(1)
	e := &faultyEnd{memory: f.memory(), id: 8*slot + uint64(os.Getpid())<<32}
	e.name = fmt.Sprintf("@%04x%016x", slot, e.id)
	e.own, e.other = int64(16*slot), int64(16*slot+8)
	e.put(e.own, e.id)
	e.put(e.other, e.id)
	return e
}

// accepted is the end of a connection that the child accepts.
func (f *faulty) accepted(name string) *faultyEnd {
	if f.host.Ends == 0 || len(name) != 21 {
		return nil
	}
	slot, _ := strconv.ParseInt(name[1:5], 16, 64)
	id, _ := strconv.ParseUint(name[5:], 16, 64)
	return &faultyEnd{memory: f.memory(), id: id, own: 16*slot + 8, other: 16 * slot}
}

func (e *faultyEnd) put(at int64, word uint64) {
	_, _ = e.memory.WriteAt(binary.NativeEndian.AppendUint64(nil, word), at)
}

func (e *faultyEnd) get(at int64) uint64 {
	var word [8]byte
	_, _ = e.memory.ReadAt(word[:], at)
	return binary.NativeEndian.Uint64(word[:])
}

// note sets bits of the end's own word.
func (e *faultyEnd) note(bits uint64) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if word := e.get(e.own); word&^7 == e.id {
		e.put(e.own, word|bits)
	}
}

func (e *faultyEnd) mark() { e.note(1) }

func (e *faultyEnd) marked() bool {
	word := e.get(e.other)
	return word&^7 == e.id && word&1 != 0
}
