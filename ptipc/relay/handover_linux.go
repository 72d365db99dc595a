package relay

import (
	"errors"
	"math"
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"
)

// handAfter is how much a pair relays before it is worth handing a socket over: that
// takes some system calls in both processes, which a short connection would not get back.
const handAfter = 256 << 10

// How far a pair has come with handing the socket of one leg over to the process at the
// other, which is reached by a unix socket (SOCKS-24).
type handing int

const (
	relaying handing = iota // everything goes through here
	emptying                // what was read from the socket is still to be written
	handed                  // the peer reads the socket; what it has sent before comes through here
	beyond                  // nothing comes through here any more
)

// handsOver reports whether the pair is to hand a socket over, and notes which.
func (p *pair) handsOver() bool {
	for i := range p.legs {
		to, app := &p.legs[i], &p.legs[1-i]
		if to.hands && app.tcp && to.end.Takes() && !p.flows[0].done && !p.flows[1].done {
			p.app = 1 - i
			return true
		}
	}
	return false
}

// handOver hands the socket of p.app over, once nothing that was read from it is left here.
// The message is one byte, which says nothing, with the descriptor.
func (l *loop) handOver(p *pair) {
	app, to, f := &p.legs[p.app], &p.legs[1-p.app], &p.flows[p.app]
	if p.flows[1-p.app].done { // half of it is not worth it
		p.hand, to.hands = relaying, false
		return
	}
	counts := newLedger(app.fd) // before the peer reads
	err := unix.Sendmsg(to.fd, []byte{0}, unix.UnixRights(app.fd), nil, unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL)
	switch {
	case errors.Is(err, unix.EAGAIN):
		l.block(p, p.app)
		return
	case err != nil: // not to be had, or nobody is there any more, which the flows find out
		p.hand, to.hands = relaying, false
		return
	}
	p.hand = handed
	f.readable, f.ending = false, false
	p.ledger = counts
	app.count(counts.totals)
	to.count(func() (received, sent uint64) { sent, received = counts.totals(); return received, sent })
	app.silent = true // its events are the peer's now
	l.rewatch(p, p.app)
}

// letGo is called when the last byte that the peer has sent through here has been
// written: the peer, which waits for that, may go on (SOCKS-24).
func (l *loop) letGo(p *pair) {
	p.ledger.peerWrites()
	to := &p.legs[1-p.app]
	_, err := retry(func() (int, error) { return unix.Write(to.fd, []byte{0}) })
	if err != nil && !to.end.Marked() {
		p.failed = readFailed(errBroken) // the peer has not ended anything, but died
		return
	}
	p.hand = beyond
	p.flows[1-p.app].done = true
	l.unwatch(p)
}

// unwatch wants no more events of a socket that was handed over. To close it would not do,
// since the peer has it too.
func (l *loop) unwatch(p *pair) {
	_ = unix.EpollCtl(l.epfd, unix.EPOLL_CTL_DEL, p.legs[p.app].fd, nil) // of one that is watched
}

// conclude ends a pair whose peer has closed its end of the unix socket.
func (p *pair) conclude() {
	back := &p.flows[p.app]
	back.done = true
	end := p.legs[1-p.app].end
	switch {
	case end.Finished():
	case end.Marked(): // as if its socket took nothing more
		back.err = writeFailed(unix.EPIPE)
	default:
		p.failed = readFailed(errBroken)
	}
}

// disconnect resets a TCP connection although another process has its socket too.
func disconnect(fd int) {
	unspecified := unix.RawSockaddrAny{Addr: unix.RawSockaddr{Family: unix.AF_UNSPEC}}
	// There may be no connection any more.
	_, _, _ = unix.Syscall(unix.SYS_CONNECT, uintptr(fd), uintptr(unsafe.Pointer(&unspecified)), unix.SizeofSockaddrInet4)
}

// A ledger counts what goes over a TCP socket in another process, as the kernel knows it.
type ledger struct {
	mu             sync.Mutex
	fd             int // -1 when it is closed
	received, sent uint64
	// The kernel's counts where counting begins, the most there is before it does.
	receivedFrom, sentFrom uint64
}

// newLedger begins with what has come and nobody has read yet.
func newLedger(fd int) *ledger {
	received, _ := steadyCounts(fd)
	return &ledger{fd: fd, receivedFrom: received, sentFrom: math.MaxUint64}
}

// peerWrites begins to count what is sent.
func (l *ledger) peerWrites() {
	_, sent := steadyCounts(l.fd)
	l.mu.Lock()
	defer l.mu.Unlock()
	l.sentFrom = sent
}

// totals returns what was received and sent. After a reset they may be one short.
func (l *ledger) totals() (received, sent uint64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.fd >= 0 {
		received, _, sent = socketCounts(l.fd)
		l.received, l.sent = received-min(received, l.receivedFrom), sent-min(sent, l.sentFrom)
	}
	return l.received, l.sent
}

// close keeps the last counts: the descriptor is to be closed.
func (l *ledger) close() {
	l.totals()
	l.mu.Lock()
	defer l.mu.Unlock()
	l.fd = -1
}

// steadyCounts returns how many bytes were read from a TCP socket and written to it.
// While more comes, what the kernel says in one call does not fit what it says in the next.
func steadyCounts(fd int) (read, written uint64) {
	received, unread, sent := socketCounts(fd)
	for range 10 {
		r, u, s := socketCounts(fd)
		if r == received && u == unread && s == sent {
			break
		}
		received, unread, sent = r, u, s
	}
	return received - min(received, unread), sent
}

// socketCounts returns how many bytes have come over a TCP socket, how many of them nobody
// has read, and how many were written to it; zeros of what is no such socket.
func socketCounts(fd int) (received, unread, sent uint64) {
	info, err := unix.GetsockoptTCPInfo(fd, unix.IPPROTO_TCP, unix.TCP_INFO)
	if err != nil {
		return 0, 0, 0
	}
	in, _ := unix.IoctlGetInt(fd, unix.SIOCINQ)
	out, _ := unix.IoctlGetInt(fd, unix.SIOCOUTQ)
	received, sent = info.Bytes_received, info.Bytes_acked+uint64(out)
	// The end of a direction counts as a byte.
	switch info.State {
	case unix.BPF_TCP_CLOSE_WAIT:
		received--
	case unix.BPF_TCP_FIN_WAIT1, unix.BPF_TCP_FIN_WAIT2:
		sent--
	case unix.BPF_TCP_CLOSING, unix.BPF_TCP_LAST_ACK, unix.BPF_TCP_TIME_WAIT, unix.BPF_TCP_CLOSE:
		received, sent = received-min(received, 1), sent-min(sent, 1)
	}
	return received, uint64(in), sent
}
