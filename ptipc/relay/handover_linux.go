package relay

import (
	"errors"
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
		if to.hands && app.tcp && to.end.Takes() && !p.flows[0].eof && !p.flows[1].eof && !p.flows[0].done && !p.flows[1].done {
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
	counts := &ledger{fd: app.fd}
	counts.start(&counts.received) // before the peer reads
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
	p.ledger.start(&p.ledger.sent)
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

// A ledger counts what goes over a socket in another process, as the kernel knows it.
type ledger struct {
	mu             sync.Mutex
	fd             int
	received, sent base
	final          [2]uint64
}

// A base is where counting begins.
type base struct {
	from  uint64
	begun bool
}

// start begins to count one direction.
func (t *ledger) start(b *base) {
	t.mu.Lock()
	defer t.mu.Unlock()
	received, sent := socketCounts(t.fd, true)
	b.begun, b.from = true, received
	if b == &t.sent {
		b.from = sent
	}
}

// stop keeps the last counts: the descriptor is to be closed.
func (t *ledger) stop() {
	received, sent := t.totals()
	t.mu.Lock()
	defer t.mu.Unlock()
	t.fd, t.final = -1, [2]uint64{received, sent}
}

func (t *ledger) totals() (received, sent uint64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.fd < 0 {
		return t.final[0], t.final[1]
	}
	received, sent = socketCounts(t.fd, false)
	return t.received.since(received), t.sent.since(sent)
}

func (b *base) since(now uint64) uint64 {
	if !b.begun || now < b.from {
		return 0
	}
	return now - b.from
}

// socketCounts returns how many bytes have come over a TCP socket, those that nobody has
// read yet included unless read is set, and how many were written to it. After a reset they
// may be one short.
func socketCounts(fd int, read bool) (received, sent uint64) {
	for range 10 { // while more comes between the calls, what they say does not fit together
		before, err := unix.GetsockoptTCPInfo(fd, unix.IPPROTO_TCP, unix.TCP_INFO)
		if err != nil {
			return 0, 0
		}
		unread, _ := unix.IoctlGetInt(fd, unix.SIOCINQ) // with these two, nothing is known
		queued, _ := unix.IoctlGetInt(fd, unix.SIOCOUTQ)
		after, err := unix.GetsockoptTCPInfo(fd, unix.IPPROTO_TCP, unix.TCP_INFO)
		if err != nil {
			return 0, 0
		}
		received, sent = after.Bytes_received, after.Bytes_acked+uint64(queued)
		if read {
			received -= min(received, uint64(unread))
		}
		// The end of a direction counts as a byte.
		switch after.State {
		case unix.BPF_TCP_CLOSE_WAIT:
			received--
		case unix.BPF_TCP_FIN_WAIT1, unix.BPF_TCP_FIN_WAIT2:
			sent--
		case unix.BPF_TCP_CLOSING, unix.BPF_TCP_LAST_ACK, unix.BPF_TCP_TIME_WAIT, unix.BPF_TCP_CLOSE:
			received, sent = received-min(received, 1), sent-min(sent, 1)
		}
		if before.Bytes_received == after.Bytes_received && before.Bytes_acked == after.Bytes_acked && before.State == after.State {
			break
		}
	}
	return received, sent
}
