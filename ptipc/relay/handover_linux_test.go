package relay

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"strings"
	"sync/atomic"
	"testing"
)

// notes are what both ends of a connection note, the bits of [0] for one of them.
type notes [2]atomic.Uint32

// An ending is one of the ends.
type ending struct {
	own, other *atomic.Uint32
}

func (n *notes) ends() (a, b ending) {
	return ending{&n[0], &n[1]}, ending{&n[1], &n[0]}
}

func (e ending) Mark()          { e.own.Or(1) }
func (e ending) Marked() bool   { return e.other.Load()&1 != 0 }
func (e ending) Take()          { e.own.Or(2) }
func (e ending) Takes() bool    { return e.other.Load()&2 != 0 }
func (e ending) Finish()        { e.own.Or(4) }
func (e ending) Finished() bool { return e.other.Load()&4 != 0 }

// A handover is an application that is joined with a unix socket by a host, which may hand
// the application's socket over to a child, which joins its end with a wire.
type handover struct {
	app, far             net.Conn
	notes                *notes
	toChild, toApp       *Conn // the host's, to be asked for their counts
	meter                Meter
	cutHost, cutChild    context.CancelCauseFunc
	hostEnded, child     chan struct{}
	hostError, childErrs error
}

func startHandover(tb testing.TB) *handover {
	tb.Helper()
	h := &handover{notes: new(notes), hostEnded: make(chan struct{}), child: make(chan struct{})}
	hostEnd, childEnd := h.notes.ends()
	var app, wire, hostSocket, childSocket net.Conn
	h.app, app = socketPair(tb, "tcp")
	wire, h.far = socketPair(tb, "tcp")
	hostSocket, childSocket = socketPair(tb, "unix")
	h.toChild = h.meter.Conn(hostSocket, Options{End: hostEnd, HandOver: true})
	h.toApp = h.meter.Conn(app, Options{})
	var host, child context.Context
	host, h.cutHost = context.WithCancelCause(context.Background())
	child, h.cutChild = context.WithCancelCause(context.Background())
	go func() {
		defer close(h.hostEnded)
		h.hostError = Join(host, h.toApp, h.toChild)
	}()
	go func() {
		defer close(h.child)
		h.childErrs = Join(child, h.meter.Conn(childSocket, Options{End: childEnd, TakeOver: true}), plain{wire.(*net.TCPConn)})
	}()
	tb.Cleanup(func() {
		h.app.Close()
		h.far.Close()
		h.cutHost(nil)
		h.cutChild(nil)
		<-h.hostEnded
		<-h.child
	})
	return h
}

func (h *handover) wait() error {
	<-h.hostEnded
	<-h.child
	return errors.Join(h.hostError, h.childErrs)
}

// wasHanded tells whether the application's socket went to the child.
func (h *handover) wasHanded() bool { return h.toChild.beyond.Load() != nil }

// pattern is what is sent: no two parts of it are the same.
func pattern(n, from int) []byte {
	b := make([]byte, 0, n+8)
	for i := uint64(from); len(b) < n; i++ { //nolint:gosec // from is a constant
		b = binary.BigEndian.AppendUint64(b, i)
	}
	return b[:n]
}

// send writes in pieces and ends the direction.
func send(c net.Conn, b []byte, pieces *rand.Rand) error {
	for len(b) > 0 {
		n := min(len(b), 1+pieces.IntN(200<<10))
		if _, err := c.Write(b[:n]); err != nil {
			return err
		}
		b = b[n:]
	}
	return c.(closeWriter).CloseWrite()
}

// Whatever goes through, in whatever pieces and with the directions ending in any
// order, comes out as it was, is counted, and leaves nothing behind (SOCKS-23 to
// SOCKS-25).
func TestHandOver(t *testing.T) {
	openLoops(t)
	before := descriptors(t)
	var overs atomic.Int32
	t.Run("many", func(t *testing.T) {
		for i := range 200 {
			t.Run(fmt.Sprint(i), func(t *testing.T) {
				t.Parallel()
				choose := rand.New(rand.NewPCG(uint64(i), 7)) //nolint:gosec // the same each time
				size := func() int {
					return []int{0, 1, handAfter - 1, handAfter, handAfter + 1, 300 << 10, 1 << 20, 2 << 20}[choose.IntN(8)]
				}
				up, down := pattern(size(), 0), pattern(size(), 1<<40)
				h := startHandover(t)
				ways := []struct {
					from, to net.Conn
					bytes    []byte
				}{{h.app, h.far, up}, {h.far, h.app, down}}
				done := make(chan error, 4)
				first := choose.IntN(3) // one direction only after the other, or both at once
				go func() {
					seed := rand.New(rand.NewPCG(uint64(i), 8)) //nolint:gosec // the same each time
					if first < 2 {
						w := ways[first]
						done <- send(w.from, w.bytes, seed)
						w = ways[1-first]
						done <- send(w.from, w.bytes, seed)
						return
					}
					go func() { done <- send(ways[0].from, ways[0].bytes, rand.New(rand.NewPCG(uint64(i), 9))) }() //nolint:gosec // the same each time
					done <- send(ways[1].from, ways[1].bytes, seed)
				}()
				for _, w := range ways {
					go func() {
						got, err := io.ReadAll(w.to)
						if err == nil && !bytes.Equal(got, w.bytes) {
							err = fmt.Errorf("%d bytes have come that are not the %d that were sent", len(got), len(w.bytes))
						}
						done <- err
					}()
				}
				for range 4 {
					if err := <-done; err != nil {
						t.Errorf("up %d, down %d, first %d: %v", len(up), len(down), first, err)
					}
				}
				if err := h.wait(); err != nil {
					t.Errorf("up %d, down %d: %v", len(up), len(down), err)
				}
				if h.wasHanded() {
					overs.Add(1)
				}
				for name, counts := range map[string][2]uint64{
					"to the child": {uint64(len(down)), uint64(len(up))}, "to the application": {uint64(len(up)), uint64(len(down))},
				} {
					conn := map[string]*Conn{"to the child": h.toChild, "to the application": h.toApp}[name]
					if received, sent := conn.counts(); received != counts[0] || sent != counts[1] {
						t.Errorf("%s %d bytes were received and %d sent, of %d and %d (handed over: %t)", name, received, sent, counts[0], counts[1], h.wasHanded())
					}
				}
			})
		}
	})
	if n := overs.Load(); n < 20 {
		t.Errorf("only %d of 200 were handed over", n)
	}
	if after := descriptors(t); after != before {
		t.Errorf("%d descriptors before, %d after", before, after)
	}
}

// bulk sends until the socket was handed over, and with both, until the child also writes it.
func (h *handover) bulk(t *testing.T) {
	t.Helper()
	block := make([]byte, handAfter)
	for range 4 {
		for _, way := range [][2]net.Conn{{h.app, h.far}, {h.far, h.app}} {
			sent := make(chan error, 1)
			go func() {
				_, err := way[0].Write(block)
				sent <- err
			}()
			if _, err := io.ReadFull(way[1], make([]byte, len(block))); err != nil {
				t.Fatal(err)
			}
			if err := <-sent; err != nil {
				t.Fatal(err)
			}
		}
	}
	if !h.wasHanded() {
		t.Fatal("the socket was not handed over")
	}
}

// What breaks after a socket was handed over breaks at the other end, and is never taken for
// an end (SOCKS-15).
func TestHandOverBreaks(t *testing.T) {
	for name, breaks := range map[string]func(h *handover){
		"application resets": func(h *handover) { _ = Abort(h.app) },
		"far end resets":     func(h *handover) { _ = Abort(h.far) },
		"host cut":           func(h *handover) { h.cutHost(nil) },
		"host's conn closed": func(h *handover) { _ = h.toChild.Close() },
		"child cut":          func(h *handover) { h.cutChild(nil) },
	} {
		for _, ended := range []string{"", "application", "far end"} {
			t.Run(name+" "+ended, func(t *testing.T) {
				h := startHandover(t)
				h.bulk(t)
				switch ended {
				case "application":
					mustCloseWrite(t, h.app)
					mustEnd(t, h.far)
				case "far end":
					mustCloseWrite(t, h.far)
					mustEnd(t, h.app)
				}
				breaks(h)
				if strings.HasPrefix(name, "host") {
					<-h.hostEnded
				}
				// Who only writes there learns of it by writing.
				switch ended {
				case "application":
					_, _ = h.far.Write([]byte{1})
				case "far end":
					_, _ = h.app.Write([]byte{1})
				}
				for who, c := range map[string]net.Conn{"application": h.app, "far end": h.far} {
					other := map[string]string{"application": "far end", "far end": "application"}[who]
					if name == who+" resets" || ended == other {
						continue // it is not open any more, or has had its end
					}
					if _, err := io.Copy(io.Discard, c); !isReset(err) {
						t.Errorf("the %s reads %v, want a reset", who, err)
					}
				}
				if err := h.wait(); err == nil {
					t.Error("both joins say that all was well")
				}
			})
		}
	}
}

// A child that may run out of descriptors takes nothing over, and relays as before.
func TestNoRoomToTakeOver(t *testing.T) {
	most := mostDescriptors
	mostDescriptors = func() uint64 { return 8 }
	defer func() { mostDescriptors = most }()
	h := startHandover(t)
	for _, way := range [][2]net.Conn{{h.app, h.far}, {h.far, h.app}} {
		sent := make(chan error, 1)
		go func() { sent <- send(way[0], pattern(2*handAfter, 0), rand.New(rand.NewPCG(1, 2))) }() //nolint:gosec // the same each time
		if got, err := io.ReadAll(way[1]); err != nil || !bytes.Equal(got, pattern(2*handAfter, 0)) {
			t.Errorf("%d bytes, %v", len(got), err)
		}
		if err := <-sent; err != nil {
			t.Error(err)
		}
	}
	if err := h.wait(); err != nil {
		t.Error(err)
	}
	if h.wasHanded() {
		t.Error("the socket was handed over")
	}
}
