package websocket

import (
	"errors"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"
)

// A group is the wires of one transport or server and what runs for them in the
// background. The zero value is ready.
type group struct {
	mu     sync.Mutex
	open   map[*wire]struct{}
	closed bool
	work   sync.WaitGroup
}

// add makes raw a wire of the group, which closes it when the group is closed.
func (g *group) add(raw net.Conn, onClose func()) *wire {
	w := &wire{raw: raw, group: g, onClose: onClose}
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.closed {
		_ = raw.Close() // nobody is left to tell
		return w
	}
	if g.open == nil {
		g.open = make(map[*wire]struct{})
	}
	g.open[w] = struct{}{}
	return w
}

func (g *group) remove(w *wire) {
	g.mu.Lock()
	defer g.mu.Unlock()
	delete(g.open, w)
}

// run runs f in the background. false means that the group is closed, and its
// wires with it.
func (g *group) run(f func()) bool {
	if !g.enter() {
		return false
	}
	go func() {
		defer g.work.Done()
		f()
	}()
	return true
}

// enter has close wait until g.work.Done is called, unless it returns false: then
// the group is closed.
func (g *group) enter() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.closed {
		return false
	}
	g.work.Add(1)
	return true
}

// close cuts every wire and waits for what runs in the background.
func (g *group) close() {
	g.mu.Lock()
	g.closed = true
	left := make([]*wire, 0, len(g.open))
	for w := range g.open {
		left = append(left, w)
	}
	g.mu.Unlock()
	for _, w := range left {
		w.abort()
	}
	g.work.Wait()
}

// maxRest is the most that waits behind a frame that was kept. Only a hostile
// peer, by what TLS has to answer on its own, makes more of it.
const maxRest = 2 * maxPayload

var errRest = errors.New("websocket: too much waits for a peer that does not read")

// A wire is the network connection, under TLS and frames, whose writes never
// fail because of a deadline: TLS would be corrupt from then on, and half a
// frame would be out. What a deadline keeps from being written is kept here, at
// most a frame, and goes out in the background.
type wire struct {
	raw     net.Conn
	group   *group
	onClose func() // may be nil
	once    sync.Once
	closed  atomic.Bool
	err     error // of closing raw

	reads atomic.Uint32 // grows when a read begins and when it ends: odd while one waits

	// Of whoever reads. TLS takes little more than a record at a time, and each record
	// would be a system call and a turn of all that follows.
	ahead  *[readAhead]byte // what was read and not taken; nil when there is nothing
	unread []byte           // of ahead
	bulk   bool             // the last read was full: the next will hardly have to wait
	nowait bool             // a Read that would wait fails with [os.ErrDeadlineExceeded]

	order sync.Mutex // held while raw is written; taken before mu

	mu       sync.Mutex
	deadline time.Time     // of writing
	rest     []byte        // what was kept
	flushed  chan struct{} // closed when rest is out or lost; nil when there is none
	moved    chan struct{} // closed when deadline changes; nil when nobody waits
	corked   []byte        // what is kept back until uncork; nil outside of cork and uncork
}

// readAhead is sixteen records of TLS. Four take a tenth to a fifth more CPU.
const readAhead = 16 * (16<<10 + 256)

var aheads = sync.Pool{New: func() any { return new([readAhead]byte) }}

func (w *wire) Read(p []byte) (int, error) {
	if len(w.unread) == 0 && !w.nowait && w.bulk {
		ahead := aheads.Get().(*[readAhead]byte)
		n, err := w.read(ahead[:])
		w.bulk = n == readAhead
		if n == 0 {
			aheads.Put(ahead)
			return 0, err
		}
		// An error behind bytes comes again.
		w.ahead, w.unread = ahead, ahead[:n]
	}
	if len(w.unread) > 0 {
		n := copy(p, w.unread)
		if w.unread = w.unread[n:]; len(w.unread) == 0 {
			aheads.Put(w.ahead)
			w.ahead, w.unread = nil, nil
		}
		return n, nil
	}
	if w.nowait {
		return 0, os.ErrDeadlineExceeded // TLS goes on after this one
	}
	n, err := w.read(p)
	w.bulk = n == len(p) && n > smallRead
	return n, err
}

func (w *wire) read(p []byte) (int, error) {
	w.reads.Add(1)
	defer w.reads.Add(1)
	n, err := w.raw.Read(p)
	if err != nil && errors.Is(err, os.ErrDeadlineExceeded) {
		err = os.ErrDeadlineExceeded // TLS goes on after this one, whatever raw is
	}
	return n, err
}

// cork keeps back what is written until uncork, so that the records of a frame go out
// in one piece.
func (w *wire) cork() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.corked = corks.Get().(*[corkSize]byte)[:0]
}

// corkSize is a frame with what TLS adds to it.
const corkSize = maxHeader + maxPayload + 4<<10

var corks = sync.Pool{New: func() any { return new([corkSize]byte) }}

func (w *wire) uncork() error {
	w.order.Lock() // what TLS answers on its own meanwhile comes behind
	defer w.order.Unlock()
	w.mu.Lock()
	corked := w.corked
	w.corked = nil
	w.mu.Unlock()
	_, err := w.write(corked)
	if cap(corked) == corkSize {
		corks.Put((*[corkSize]byte)(corked[:corkSize]))
	}
	return err
}

func (w *wire) Write(p []byte) (int, error) {
	w.mu.Lock()
	if w.corked != nil {
		defer w.mu.Unlock()
		w.corked = append(w.corked, p...)
		return len(p), nil
	}
	w.mu.Unlock()
	w.order.Lock()
	defer w.order.Unlock()
	return w.write(p)
}

func (w *wire) write(p []byte) (int, error) {
	w.mu.Lock()
	if w.flushed != nil { // a control frame or the end, small and few: see ready and stuck
		defer w.mu.Unlock()
		if len(w.rest)+len(p) > maxRest {
			return 0, errRest
		}
		w.rest = append(w.rest, p...)
		return len(p), nil
	}
	w.mu.Unlock()
	n, err := w.raw.Write(p)
	if err == nil || !errors.Is(err, os.ErrDeadlineExceeded) {
		return n, err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.rest = append([]byte(nil), p[n:]...)
	w.flushed = make(chan struct{})
	_ = w.raw.SetWriteDeadline(time.Time{}) // fails only on a closed conn, as the write will
	if !w.group.run(w.flush) {
		close(w.flushed)
		w.flushed = nil
		return n, net.ErrClosed
	}
	return len(p), nil
}

// flush writes what was kept. It ends when that is out or the wire is closed.
func (w *wire) flush() {
	for {
		w.mu.Lock()
		rest := w.rest
		w.rest = nil
		if len(rest) == 0 {
			close(w.flushed)
			w.flushed = nil
			_ = w.raw.SetWriteDeadline(w.deadline) // fails only on a closed conn
			w.mu.Unlock()
			return
		}
		w.mu.Unlock()
		if _, err := w.raw.Write(rest); err != nil {
			_ = w.Close() // half a frame is out: nothing can follow it
		}
	}
}

// ready waits until nothing is kept any more, or the deadline has passed.
func (w *wire) ready() error {
	for {
		w.mu.Lock()
		deadline, flushed := w.deadline, w.flushed
		late := !deadline.IsZero() && !time.Now().Before(deadline)
		if w.moved == nil && flushed != nil {
			w.moved = make(chan struct{})
		}
		moved := w.moved
		w.mu.Unlock()
		if late {
			return os.ErrDeadlineExceeded
		}
		if flushed == nil {
			return nil
		}
		var passed <-chan time.Time // nil, which never comes, without a deadline
		if !deadline.IsZero() {
			passed = time.After(time.Until(deadline))
		}
		select {
		case <-flushed:
		case <-moved:
		case <-passed:
		}
	}
}

// stuck reports whether something is kept.
func (w *wire) stuck() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.flushed != nil
}

func (w *wire) SetWriteDeadline(t time.Time) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.deadline = t
	if w.moved != nil {
		close(w.moved)
		w.moved = nil
	}
	if w.flushed != nil {
		return nil // flush sets it when it is done
	}
	return w.raw.SetWriteDeadline(t)
}

func (w *wire) SetReadDeadline(t time.Time) error { return w.raw.SetReadDeadline(t) }

func (w *wire) SetDeadline(t time.Time) error {
	return errors.Join(w.SetReadDeadline(t), w.SetWriteDeadline(t))
}

func (w *wire) LocalAddr() net.Addr  { return w.raw.LocalAddr() }
func (w *wire) RemoteAddr() net.Addr { return w.raw.RemoteAddr() }

func (w *wire) Close() error {
	w.once.Do(func() {
		w.closed.Store(true)
		w.err = w.raw.Close()
		w.group.remove(w)
		if w.onClose != nil {
			w.onClose()
		}
	})
	return w.err
}

// abort closes the wire so that the peer does not take the end for a clean one.
func (w *wire) abort() {
	switch raw := w.raw.(type) {
	case interface{ Abort() error }:
		_ = raw.Abort() // Close follows
	case interface{ SetLinger(sec int) error }:
		_ = raw.SetLinger(0) // fails only on a closed conn
	}
	_ = w.Close() // it is cut, whatever Close says
}
