package turn

import (
	"encoding/binary"
	"net"
	"net/netip"
	"os"
	"slices"
	"sync/atomic"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// A rawAddr is an address as the kernel takes it, for a socket of either family.
type rawAddr struct {
	in4 unix.RawSockaddrInet4 // Family 0: not an IPv4 address
	in6 unix.RawSockaddrInet6 // an IPv4 address is mapped
}

func (r *rawAddr) set(a netip.AddrPort) {
	port := func(p *uint16) { binary.BigEndian.PutUint16((*[2]byte)(unsafe.Pointer(p))[:], a.Port()) }
	if a.Addr().Is4() {
		r.in4.Family, r.in4.Addr = unix.AF_INET, a.Addr().As4()
		port(&r.in4.Port)
	}
	r.in6.Family, r.in6.Addr = unix.AF_INET6, a.Addr().As16()
	port(&r.in6.Port)
}

// mmsghdr is struct mmsghdr.
type mmsghdr struct {
	hdr unix.Msghdr
	n   uint32
}

// A segmentControl tells the kernel to cut what it is given into datagrams of one size.
type segmentControl struct {
	hdr  unix.Cmsghdr
	size uint16
	_    [6]byte
}

// batchSystem is what the calls for many datagrams need, ready made for each batch.
type batchSystem struct {
	receives  []mmsghdr
	iovs      []unix.Iovec
	names     []unix.RawSockaddrInet6
	sends     []mmsghdr
	firsts    []int // of the queued packets, for each of sends
	sendIovs  []unix.Iovec
	controls  []segmentControl
	doSend    func(fd uintptr) bool
	at, until int // of sends
	sent      int
	errno     syscall.Errno
	pieces    *[widePieces]widePiece // of a wide batch
}

// A wide batch receives a few pieces of many datagrams each, as the kernel puts together
// those of one size, or as a sender gave them to it (UDP_GRO).
const widePieces = 4

type widePiece struct {
	storage [1 << 16]byte
	control struct {
		hdr  unix.Cmsghdr
		size int32
		_    [4]byte
	}
}

func (s *batchSystem) init(b *batch) {
	if b.size == 0 {
		s.receives, s.iovs, s.pieces = make([]mmsghdr, widePieces), make([]unix.Iovec, widePieces), new([widePieces]widePiece)
		for i := range s.receives {
			setIovec(&s.iovs[i], s.pieces[i].storage[:])
			h := &s.receives[i].hdr
			h.Iov = &s.iovs[i]
			h.SetIovlen(1)
			h.Control = (*byte)(unsafe.Pointer(&s.pieces[i].control))
		}
		return
	}
	s.receives = make([]mmsghdr, b.size)
	s.iovs = make([]unix.Iovec, b.size)
	s.names = make([]unix.RawSockaddrInet6, b.size)
	s.sends = make([]mmsghdr, b.size)
	s.firsts = make([]int, b.size+1)
	s.sendIovs = make([]unix.Iovec, b.size)
	s.controls = make([]segmentControl, b.size)
	for i := range s.receives {
		s.iovs[i].Base = &b.packets[i].storage[headroom]
		s.iovs[i].SetLen(maxDatagram)
		h := &s.receives[i].hdr
		h.Iov = &s.iovs[i]
		h.SetIovlen(1)
		s.controls[i].hdr.Level, s.controls[i].hdr.Type = unix.SOL_UDP, unix.UDP_SEGMENT
		s.controls[i].hdr.SetLen(unix.CmsgLen(2))
	}
	s.doSend = func(fd uintptr) bool {
		n, _, errno := unix.Syscall6(unix.SYS_SENDMMSG, fd, uintptr(unsafe.Pointer(&s.sends[s.at])), uintptr(s.until-s.at), unix.MSG_DONTWAIT, 0, 0)
		s.sent, s.errno = int(n), errno
		return errno != unix.EINTR
	}
}

// A udpSocket moves datagrams of a UDP socket with one system call for many, and has the
// kernel cut those of one size out of one buffer.
type udpSocket struct {
	*net.UDPConn
	raw       syscall.RawConn
	inet6     bool
	connected bool
	wide      bool         // datagrams may come in pieces of many
	segment   atomic.Int64 // datagrams up to this size are segmented; 0: none
	doReceive func(fd uintptr) bool

	// Of the call of receive.
	batch *batch
	err   error
}

// largestSegmented is what the kernel takes in one piece, over IPv4 and IPv6.
const largestSegmented = 65000

func newUDPSocket(c *net.UDPConn, connected bool) socket {
	raw, err := c.SyscallConn()
	if err != nil {
		return nil
	}
	s := &udpSocket{UDPConn: c, raw: raw, connected: connected}
	ok := false
	_ = raw.Control(func(fd uintptr) {
		domain, err := unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_DOMAIN)
		s.inet6 = domain == unix.AF_INET6
		s.wide = connected && unix.SetsockoptInt(int(fd), unix.SOL_UDP, unix.UDP_GRO, 1) == nil
		ok = err == nil && (s.inet6 || domain == unix.AF_INET)
	})
	if !ok {
		return nil
	}
	s.segment.Store(maxDatagram)
	s.doReceive = s.tryReceive
	return s
}

func (s *udpSocket) receive() (*batch, error) {
	if err := s.raw.Read(s.doReceive); err != nil {
		return nil, err
	}
	if s.err != nil {
		return nil, os.NewSyscallError("recvmmsg", s.err)
	}
	return s.batch, nil
}

func (s *udpSocket) tryReceive(fd uintptr) bool {
	var b *batch
	if s.wide {
		b = wides.Get().(*batch)
	} else {
		b = batches.Get().(*batch)
	}
	y := &b.system
	for i := range y.receives {
		h := &y.receives[i].hdr
		switch {
		case s.wide:
			h.SetControllen(int(unsafe.Sizeof(y.pieces[i].control)))
		case s.connected:
			h.Name, h.Namelen = nil, 0
		default:
			h.Name, h.Namelen = (*byte)(unsafe.Pointer(&y.names[i])), unix.SizeofSockaddrInet6
		}
	}
	for {
		n, _, errno := unix.Syscall6(unix.SYS_RECVMMSG, fd, uintptr(unsafe.Pointer(&y.receives[0])), uintptr(len(y.receives)), unix.MSG_DONTWAIT, 0, 0)
		switch {
		case errno == unix.EINTR:
			continue
		case errno == unix.EAGAIN:
			b.release()
			return false
		case errno != 0:
			b.release()
			s.batch, s.err = nil, errno
		case s.wide:
			b.cutUp(int(n))
			s.batch, s.err = b, nil
		default:
			s.take(b, int(n))
			s.batch, s.err = b, nil
		}
		return true
	}
}

// take says what was received.
func (s *udpSocket) take(b *batch, n int) {
	b.packets = b.packets[:n]
	for i := range b.packets {
		p, m := &b.packets[i], &b.system.receives[i]
		p.data, p.cut = p.storage[headroom:headroom+int(m.n)], m.hdr.Flags&unix.MSG_TRUNC != 0
		p.from = netip.AddrPort{}
		if !s.connected {
			p.from = addrOf(&b.system.names[i])
		}
	}
}

// cutUp makes datagrams of the pieces that were received.
func (b *batch) cutUp(n int) {
	b.packets = b.packets[:0]
	for i := range n {
		m, piece := &b.system.receives[i], &b.system.pieces[i]
		rest, size := piece.storage[:m.n], int(m.n)
		if h := &piece.control.hdr; int(m.hdr.Controllen) >= unix.CmsgLen(4) && h.Level == unix.SOL_UDP && h.Type == unix.UDP_GRO {
			size = int(piece.control.size)
		}
		if size <= 0 || size > len(rest) { // nothing, or a piece of one
			size = len(rest)
		}
		for first := true; first || len(rest) > 0; first = false {
			k := min(size, len(rest))
			b.packets = append(b.packets, packet{data: rest[:k:k], cut: k > maxDatagram})
			rest = rest[k:]
		}
	}
}

func addrOf(name *unix.RawSockaddrInet6) netip.AddrPort {
	port := binary.BigEndian.Uint16((*[2]byte)(unsafe.Pointer(&name.Port))[:])
	switch name.Family {
	case unix.AF_INET:
		return netip.AddrPortFrom(netip.AddrFrom4((*unix.RawSockaddrInet4)(unsafe.Pointer(name)).Addr), port)
	case unix.AF_INET6:
		return netip.AddrPortFrom(netip.AddrFrom16(name.Addr).Unmap(), port)
	default:
		return netip.AddrPort{}
	}
}

func (s *udpSocket) send(b *batch) (failed, lost int, err error) {
	y := &b.system
	y.until, y.at = s.group(b), 0
	for y.at < y.until {
		stop := s.raw.Write(y.doSend)
		if stop == nil && y.errno == unix.EAGAIN {
			stop = errFull // a packet that is late is worth less than all those that would wait for it
		}
		if stop != nil { // or closed
			for _, p := range b.sends[y.firsts[y.at]:] {
				failed, lost = failed+1, lost+p.payload
			}
			b.sends = b.sends[:0]
			return failed, lost, stop
		}
		if y.errno == 0 {
			y.at += max(y.sent, 1)
			continue
		}
		group := b.sends[y.firsts[y.at]:y.firsts[y.at+1]]
		if len(group) > 1 {
			s.learn(y.errno, len(group[0].out))
		}
		for _, p := range group {
			if e := y.errno; len(group) == 1 {
				failed, lost, err = failed+1, lost+p.payload, e
			} else if e := s.write(p.out, p.to); e != nil {
				failed, lost, err = failed+1, lost+p.payload, e
			}
		}
		y.at++
	}
	b.sends = b.sends[:0]
	return failed, lost, err
}

// learn takes that datagrams of this size cannot be segmented here.
func (s *udpSocket) learn(errno syscall.Errno, size int) {
	if slices.Contains([]syscall.Errno{unix.EINVAL, unix.EMSGSIZE}, errno) { // more than the network takes without fragmenting
		s.segment.Store(int64(size - 1))
	} else if slices.Contains([]syscall.Errno{unix.EIO, unix.EOPNOTSUPP, unix.ENOPROTOOPT}, errno) { // not by this network
		s.segment.Store(0)
	}
}

// group makes a message of each run of packets that are for the same address and,
// but for a shorter last one, of one size.
func (s *udpSocket) group(b *batch) int {
	y := &b.system
	limit := int(s.segment.Load())
	messages := 0
	for i := 0; i < len(b.sends); messages++ {
		first := b.sends[i]
		size, total, end := len(first.out), 0, i
		for end < len(b.sends) {
			p := b.sends[end]
			if end > i && (p.to != first.to || len(p.out) > size || total+len(p.out) > largestSegmented || size > limit || len(p.out) == 0) {
				break
			}
			setIovec(&y.sendIovs[end], p.out)
			total += len(p.out)
			end++
			if len(p.out) < size {
				break
			}
		}
		h := &y.sends[messages].hdr
		h.Iov = &y.sendIovs[i]
		h.SetIovlen(end - i)
		s.setName(h, first.to)
		h.Control = nil
		h.SetControllen(0)
		if end-i > 1 {
			y.controls[messages].size = uint16(size)
			h.Control = (*byte)(unsafe.Pointer(&y.controls[messages]))
			h.SetControllen(int(unsafe.Sizeof(y.controls[messages])))
		}
		y.firsts[messages] = i
		y.firsts[messages+1] = end
		i = end
	}
	return messages
}

func setIovec(v *unix.Iovec, b []byte) {
	v.Base = unsafe.SliceData(b)
	v.SetLen(len(b))
}

func (s *udpSocket) setName(h *unix.Msghdr, to *endpoint) {
	switch {
	case to == nil:
		h.Name, h.Namelen = nil, 0
	case !s.inet6 && to.raw.in4.Family != 0:
		h.Name, h.Namelen = (*byte)(unsafe.Pointer(&to.raw.in4)), unix.SizeofSockaddrInet4
	default: // IPv6 over an IPv4 socket is the kernel's to refuse
		h.Name, h.Namelen = (*byte)(unsafe.Pointer(&to.raw.in6)), unix.SizeofSockaddrInet6
	}
}

func (s *udpSocket) write(b []byte, to *endpoint) error {
	var err error
	if to == nil {
		_, err = s.Write(b)
	} else {
		_, err = s.WriteToUDPAddrPort(b, to.port)
	}
	return err
}
