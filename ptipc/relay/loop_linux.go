package relay

import (
	"encoding/binary"
	"errors"
	"fmt"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

const (
	chunk      = 16 << 10 // a read of less is cheaper than two splices
	spliceSize = 1 << 20  // the most that an unprivileged pipe holds
	rounds     = 4        // of reading and writing for one flow before others have their turn

	// Peers that stall in the middle of bulk each keep a pipe with up to
	// spliceSize in it. Beyond this number, flows are copied instead.
	maxPipes  = 64
	idlePipes = 4 // kept by a loop for the next bulk flow

	yieldAfter = 5 * time.Millisecond
)

// A loop relays many pairs on one thread, which sleeps in epoll_wait. It runs
// while there are pairs.
type loop struct {
	mu    sync.Mutex
	epfd  int             // 0 before the first pair
	wake  int             // an eventfd, for cuts
	pairs map[int32]*pair // by the id that epoll reports
	last  int32
	cuts  []*pair

	// What follows belongs to the loop's goroutine.
	ready   []*pair
	scratch *[chunk]byte
	pipes   []*pipe
	inUse   int // pipes in flows
}

type pipe struct{ r, w int }

var chunks = sync.Pool{New: func() any { return new([chunk]byte) }}

var (
	// A loop that sleeps keeps its processor of the Go scheduler for up to 10 ms.
	// Half of them are left to goroutines.
	loops    = make([]loop, max(1, runtime.GOMAXPROCS(0)/2))
	nextLoop atomic.Uint32
)

// add puts p into the loop. If p is the first pair, the caller has to run the loop.
// ok is false if the system is short of something.
func (l *loop) add(p *pair) (first, ok bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	first = len(l.pairs) == 0
	if l.epfd == 0 && !l.open() {
		return false, false
	}
	for { // ids wrap around
		l.last = (l.last + 1) & 0x3fffffff
		if _, taken := l.pairs[l.last]; !taken {
			break
		}
	}
	p.id = l.last
	for i := range p.legs {
		if l.watch(p, i, unix.EPOLL_CTL_ADD) != nil {
			if i == 1 {
				_ = unix.EpollCtl(l.epfd, unix.EPOLL_CTL_DEL, p.legs[0].fd, nil)
			}
			return false, false
		}
	}
	l.pairs[p.id] = p
	if p.cut != nil {
		l.abort(p)
	}
	return first, true
}

// open makes what the loop keeps for as long as the process lives: to make it anew
// for each short connection would take five system calls of its sixty.
func (l *loop) open() bool {
	epfd, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return false
	}
	wake, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		unix.Close(epfd)
		return false
	}
	// Edge-triggered: each write to it is an event, and nobody has to read it.
	err = unix.EpollCtl(epfd, unix.EPOLL_CTL_ADD, wake, &unix.EpollEvent{Events: unix.EPOLLIN | unix.EPOLLET, Fd: wakeID})
	if err != nil {
		unix.Close(epfd)
		unix.Close(wake)
		return false
	}
	l.epfd, l.wake, l.pairs = epfd, wake, make(map[int32]*pair)
	return true
}

const wakeID = -1

// rest lets go of what an idle loop does not need.
func (l *loop) rest() {
	for _, p := range l.pipes {
		p.close()
	}
	l.pipes, l.cuts, l.ready = nil, nil, nil
	if l.scratch != nil {
		chunks.Put(l.scratch)
		l.scratch = nil
	}
}

// watch asks for the events of a leg. EPOLLOUT is asked for only while a flow
// waits for it: a unix socket reports it for each message that the peer reads.
func (l *loop) watch(p *pair, side, op int) error {
	g := &p.legs[side]
	e := unix.EpollEvent{Events: unix.EPOLLET, Fd: p.id, Pad: int32(side)}
	if !g.silent {
		e.Events |= unix.EPOLLIN | unix.EPOLLRDHUP
	}
	if g.armed {
		e.Events |= unix.EPOLLOUT
	}
	return unix.EpollCtl(l.epfd, op, g.fd, &e)
}

// cut makes the loop abort p, if need be as soon as it is added.
func (l *loop) cut(p *pair, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if p.cut != nil {
		return
	}
	p.cut = err
	if l.pairs[p.id] == p {
		l.abort(p)
	}
}

// abort has the loop look at a pair that is cut. l.mu is held.
func (l *loop) abort(p *pair) {
	l.cuts = append(l.cuts, p)
	_, _ = unix.Write(l.wake, one[:]) // each is an event
}

// one is what abort adds to the eventfd. Nobody reads it, so that a larger number would
// fill it some day, and then there are no more events.
var one = func() (b [8]byte) { binary.NativeEndian.PutUint64(b[:], 1); return b }()

// run runs the loop until it has no pairs any more. It begins in the goroutine of the
// Join of its first pair, own: to start another would wake a thread for each short
// connection. When own ends before others, a goroutine of its own takes over.
func (l *loop) run(own *pair) {
	var events [64]unix.EpollEvent
	ownEnded := false
	yielded := time.Now()
	if l.scratch == nil {
		l.scratch = chunks.Get().(*[chunk]byte)
	}
	for {
		timeout := -1
		if len(l.ready) > 0 {
			timeout = 0
		}
		n, err := unix.EpollWait(l.epfd, events[:], timeout)
		if err != nil && !errors.Is(err, unix.EINTR) {
			panic(fmt.Sprintf("relay: epoll_wait: %v", err)) // the descriptor was closed by a stranger
		}
		l.mu.Lock()
		for i := range max(n, 0) {
			e := &events[i]
			p := l.pairs[e.Fd]
			if p == nil {
				continue
			}
			p.note(int(e.Pad), e.Events)
			l.enqueue(p)
		}
		for _, p := range l.cuts {
			if l.pairs[p.id] == p { // it may have ended since
				p.failed = p.cut
				l.enqueue(p)
			}
		}
		l.cuts = l.cuts[:0]
		l.mu.Unlock()

		// A goroutine that has run for 10 ms without a break, be it in system
		// calls, makes the runtime's monitor take its processor away every 20 µs.
		if now := time.Now(); now.Sub(yielded) > yieldAfter {
			runtime.Gosched()
			yielded = time.Now()
		}

		turn := len(l.ready)
		for _, p := range l.ready[:turn] {
			p.queued = false
			more := p.failed == nil && l.pump(p)
			if p.failed != nil || p.flows[0].done && p.flows[1].done {
				if l.finish(p) {
					return
				}
				ownEnded = ownEnded || p == own
			} else if more {
				l.enqueue(p)
			}
		}
		l.ready = append(l.ready[:0], l.ready[turn:]...)
		if ownEnded {
			go l.run(nil)
			return
		}
	}
}

func (l *loop) enqueue(p *pair) {
	if !p.queued {
		p.queued = true
		l.ready = append(l.ready, p)
	}
}

// note takes down what epoll says about a leg.
func (p *pair) note(side int, events uint32) {
	from, to := &p.flows[side], &p.flows[1-side]
	if p.legs[side].silent { // what it is to say, it says to another process
		to.blocked = false
		return
	}
	if events&(unix.EPOLLIN|unix.EPOLLRDHUP|unix.EPOLLHUP|unix.EPOLLERR) != 0 {
		from.readable = true
	}
	if events&(unix.EPOLLRDHUP|unix.EPOLLHUP|unix.EPOLLERR) != 0 {
		from.ending = true
	}
	if events&(unix.EPOLLHUP|unix.EPOLLERR) != 0 {
		p.legs[side].gone = true
	}
	if events&(unix.EPOLLOUT|unix.EPOLLHUP|unix.EPOLLERR) != 0 {
		to.blocked = false
	}
}

// pump moves what can be moved, and reports whether there is more.
func (l *loop) pump(p *pair) (more bool) {
	if p.hand == relaying && p.moved >= handAfter && p.handsOver() {
		p.hand = emptying
	}
	for i := range p.flows {
		for r := 0; r < rounds && l.step(p, i); r++ {
		}
		if p.failed != nil {
			return false
		}
	}
	if p.hand >= handed {
		to := 1 - p.app
		if p.hand == beyond && p.legs[to].gone {
			p.conclude()
		}
		f := &p.flows[to]
		return !f.done && !f.blocked && (f.readable || f.holds())
	}
	for i := range p.flows {
		f, back := &p.flows[i], &p.flows[1-i]
		if !f.done && back.done && p.legs[1-i].gone {
			// Nobody reads on the other side any more, and a unix socket, other
			// than TCP, says so before something is written.
			f.done = true
			if f.readable || f.holds() {
				f.err = writeFailed(unix.EPIPE)
			}
		}
		more = more || !f.done && !f.blocked && (f.readable || f.holds())
	}
	return more
}

func (f *flow) holds() bool { return f.inPipe > 0 || len(f.rest) > 0 }

// step reads once and writes once. It reports whether another step may help.
func (l *loop) step(p *pair, i int) bool {
	f, dst := &p.flows[i], &p.legs[1-i]
	if f.done || f.blocked {
		return false
	}
	if !f.holds() {
		if p.hand != relaying && i == p.app {
			if p.hand == emptying {
				l.handOver(p)
			}
			return p.hand == relaying
		}
		if f.readable {
			l.fill(p, i)
			if p.failed != nil || f.done {
				return false
			}
		}
		if f.eof {
			l.passEnd(p, i)
			return false
		}
		if !f.holds() {
			if dst.armed && !f.readable {
				dst.armed = false
				l.rewatch(p, 1-i)
			}
			return f.readable
		}
	}
	l.drain(p, i)
	return !f.done && !f.blocked && p.failed == nil
}

// fill reads into the flow.
func (l *loop) fill(p *pair, i int) {
	f, src := &p.flows[i], &p.legs[i]
	if f.bulk && !f.copies {
		f.pipe = l.takePipe()
		if dst := &p.legs[1-i]; !dst.tcp && !dst.widened {
			dst.widened = true
			_ = unix.SetsockoptInt(dst.fd, unix.SOL_SOCKET, unix.SO_SNDBUF, unixSendBuffer) // without it bulk is only slower
		}
	}
	var n int
	var err error
	if f.pipe != nil {
		n, err = splice(src.fd, f.pipe.w, spliceSize)
		if n > 0 {
			f.inPipe = n
			f.bulk = n >= chunk
		} else {
			l.returnPipe(f)
		}
	} else {
		n, err = retry(func() (int, error) { return unix.Read(src.fd, l.scratch[:]) })
		if n > 0 {
			f.rest = l.scratch[:n]
			f.bulk = n == chunk
			// A short read from a stream has emptied it; what comes then is a new event.
			f.readable = n == chunk || f.ending
		}
	}
	switch {
	case n > 0:
		src.received(n)
	case err == nil && p.hand == handed && !src.end.Marked():
		f.readable = false
		l.letGo(p)
	case err == nil && src.end != nil && !src.end.Marked():
		p.failed = readFailed(errBroken)
	case err == nil:
		f.eof = true
		f.readable = false
	case errors.Is(err, unix.EAGAIN):
		f.readable = false
	case errors.Is(err, unix.EINVAL) && !f.copies: // not every kernel splices from every kind of TCP
		f.copies = true
	default:
		p.failed = readFailed(err)
	}
}

// drain writes what the flow holds.
func (l *loop) drain(p *pair, i int) {
	f, dst := &p.flows[i], &p.legs[1-i]
	for f.holds() {
		var n int
		var err error
		if f.inPipe > 0 {
			n, err = splice(f.pipe.r, dst.fd, f.inPipe)
		} else {
			n, err = retry(func() (int, error) { return unix.Write(dst.fd, f.rest) })
		}
		switch {
		case n > 0:
			dst.sent(n)
			p.moved += n
			if f.inPipe == 0 {
				f.rest = f.rest[n:]
			} else if f.inPipe -= n; f.inPipe == 0 {
				l.returnPipe(f)
			}
		case errors.Is(err, unix.EAGAIN):
			l.block(p, i)
			return
		default:
			l.writeFailed(p, i, err)
			return
		}
	}
	l.dropBuffer(f)
}

func (l *loop) block(p *pair, i int) {
	f, dst := &p.flows[i], &p.legs[1-i]
	f.blocked = true
	if len(f.rest) > 0 && f.buf == nil {
		// The bytes are in the loop's scratch buffer: give it away.
		f.buf, l.scratch = l.scratch, chunks.Get().(*[chunk]byte)
	}
	if !dst.armed {
		dst.armed = true
		l.rewatch(p, 1-i)
	}
}

func (l *loop) rewatch(p *pair, side int) {
	if err := l.watch(p, side, unix.EPOLL_CTL_MOD); err != nil {
		p.failed = fmt.Errorf("relay: epoll_ctl: %w", err)
	}
}

func (l *loop) dropBuffer(f *flow) {
	f.rest = nil
	if f.buf != nil {
		chunks.Put(f.buf)
		f.buf = nil
	}
}

// passEnd tells the destination that the stream has ended.
func (l *loop) passEnd(p *pair, i int) {
	if p.reset != nil {
		// A reset is reported once. After a write has had it, a read sees what
		// looks like the end of the stream.
		p.failed = p.reset
		return
	}
	f := &p.flows[i]
	f.done = true
	dst := &p.legs[1-i]
	if dst.end != nil {
		dst.end.Mark()
	}
	if err := unix.Shutdown(dst.fd, unix.SHUT_WR); err != nil {
		l.writeFailed(p, i, err)
	} else if p.hand == handed {
		l.letGo(p) // the peer has ended its direction before it took the socket
	}
}

func (l *loop) writeFailed(p *pair, i int, err error) {
	f, back := &p.flows[i], &p.flows[1-i]
	f.done = true
	f.err = writeFailed(err)
	switch {
	case p.hand == handed: // the peer, which reads this socket, cannot find out what ended it
		p.failed = f.err
	case peerIsGone(err):
	case errors.Is(err, unix.ECONNRESET) && !back.done:
		p.reset = f.err
		back.readable, back.ending = true, true
	default:
		p.failed = f.err
	}
}

// finish lets go of a pair, and stops the loop if it was the last. Its Join closes
// the sockets: closing one may block, if somebody has asked it to linger.
func (l *loop) finish(p *pair) (last bool) {
	if p.ledger != nil {
		p.ledger.close()
	}
	if p.hand == handed {
		l.unwatch(p)
	}
	for i := range p.flows {
		f := &p.flows[i]
		l.dropBuffer(f)
		if f.pipe != nil {
			f.pipe.close() // it may hold bytes
			f.pipe = nil
			l.inUse--
		}
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.pairs, p.id)
	last = len(l.pairs) == 0
	if last {
		l.rest()
	}
	close(p.done)
	return last
}

// takePipe returns an empty pipe, or nil: then the flow is copied.
func (l *loop) takePipe() *pipe {
	if n := len(l.pipes); n > 0 {
		p := l.pipes[n-1]
		l.pipes = l.pipes[:n-1]
		l.inUse++
		return p
	}
	if l.inUse >= maxPipes {
		return nil
	}
	var fds [2]int
	if unix.Pipe2(fds[:], unix.O_CLOEXEC|unix.O_NONBLOCK) != nil {
		return nil
	}
	// A user who has many pipes gets small ones. They work too.
	_, _ = unix.FcntlInt(uintptr(fds[0]), unix.F_SETPIPE_SZ, spliceSize)
	l.inUse++
	return &pipe{r: fds[0], w: fds[1]}
}

func (l *loop) returnPipe(f *flow) {
	p := f.pipe
	f.pipe = nil
	l.inUse--
	if len(l.pipes) == idlePipes {
		p.close()
		return
	}
	l.pipes = append(l.pipes, p)
}

func (p *pipe) close() {
	unix.Close(p.r)
	unix.Close(p.w)
}

func splice(from, to, n int) (int, error) {
	return retry(func() (int, error) {
		moved, err := unix.Splice(from, nil, to, nil, n, unix.SPLICE_F_MOVE|unix.SPLICE_F_NONBLOCK)
		return int(moved), err
	})
}

func retry(call func() (int, error)) (int, error) {
	for {
		n, err := call()
		if !errors.Is(err, unix.EINTR) {
			return n, err
		}
	}
}
