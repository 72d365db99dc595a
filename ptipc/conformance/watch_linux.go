package conformance

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// A cell is a thread of this process with namespaces of its own. What is started from
// it is alone in them, so that whatever happens there is its doing.
type cell struct {
	work    chan func()
	fds     []int // closed with the cell
	files   int   // reports files that were written; -1 if nobody watches them
	packets int   // gets a copy of every packet; -1 if nobody watches them
}

// newCell makes one with a mount namespace, in which written files are watched, or a
// network namespace, in which packets are. Both need root.
func newCell(network bool) (*cell, error) {
	c := &cell{work: make(chan func()), files: -1, packets: -1}
	ready := make(chan error)
	go func() {
		// Without an Unlock: the thread, and with it the namespace, ends with the goroutine.
		runtime.LockOSThread()
		err := c.enter(network)
		ready <- err
		if err != nil {
			return
		}
		for f := range c.work {
			f()
		}
	}()
	if err := <-ready; err != nil {
		c.closeFiles()
		return nil, fmt.Errorf("only root can watch a child in a namespace of its own: %w", err)
	}
	return c, nil
}

func (c *cell) enter(network bool) (err error) {
	if network {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return err
		}
		if c.packets, err = unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, int(htons(unix.ETH_P_ALL))); err != nil {
			return err
		}
		c.fds = append(c.fds, c.packets)
		if err := unix.SetsockoptInt(c.packets, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 16<<20); err != nil {
			return err
		}
		return oneWayOut()
	}
	if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
		return err
	}
	// What is mounted here stays here, so that the marks below are of this namespace.
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return err
	}
	if c.files, err = unix.FanotifyInit(unix.FAN_CLASS_NOTIF|unix.FAN_CLOEXEC|unix.FAN_NONBLOCK|unix.FAN_UNLIMITED_QUEUE, unix.O_RDONLY|unix.O_CLOEXEC|unix.O_LARGEFILE); err != nil {
		return err
	}
	c.fds = append(c.fds, c.files)
	mounts, err := os.ReadFile("/proc/thread-self/mountinfo")
	if err != nil {
		return err
	}
	for line := range bytes.Lines(mounts) {
		fields := strings.Fields(string(line))
		end := slices.Index(fields, "-")
		if len(fields) < 5 || end < 0 || end+1 >= len(fields) {
			continue
		}
		if slices.Contains(withoutFiles, fields[end+1]) {
			continue
		}
		if err := unix.FanotifyMark(c.files, unix.FAN_MARK_ADD|unix.FAN_MARK_MOUNT, unix.FAN_CLOSE_WRITE, unix.AT_FDCWD, unescape(fields[4])); err != nil && fields[4] == "/" {
			return err // others may be covered by a later mount
		}
	}
	return nil
}

// withoutFiles are file systems in which nothing is kept.
var withoutFiles = []string{
	"proc", "sysfs", "cgroup", "cgroup2", "devpts", "mqueue", "debugfs", "tracefs", "securityfs", "bpf", "pstore", "configfs", "fusectl", "autofs", "binfmt_misc",
}

// unescape undoes what mountinfo does to blanks.
func unescape(path string) string {
	return strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`).Replace(path)
}

// run runs f on the thread of the cell.
func (c *cell) run(f func()) {
	done := make(chan struct{})
	c.work <- func() { defer close(done); f() }
	<-done
}

func (c *cell) close() {
	close(c.work)
	c.closeFiles()
}

func (c *cell) closeFiles() {
	for _, fd := range c.fds {
		unix.Close(fd)
	}
	c.fds = nil
}

// written returns the paths of regular files that were open for writing and have been
// closed.
func (c *cell) written() ([]string, error) {
	var paths []string
	b := make([]byte, 64<<10)
	for {
		n, err := unix.Read(c.files, b)
		if errors.Is(err, unix.EAGAIN) {
			return paths, nil
		}
		if err != nil {
			return nil, err
		}
		for rest := b[:n]; len(rest) >= int(unsafe.Sizeof(unix.FanotifyEventMetadata{})); {
			event := *(*unix.FanotifyEventMetadata)(unsafe.Pointer(&rest[0])) //nolint:gosec // the kernel's own layout
			if int(event.Event_len) > len(rest) || event.Event_len == 0 {
				return nil, fmt.Errorf("an event of %d bytes in %d", event.Event_len, len(rest))
			}
			rest = rest[event.Event_len:]
			if event.Fd < 0 {
				continue
			}
			var stat unix.Stat_t
			path, lerr := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", event.Fd))
			if serr := unix.Fstat(int(event.Fd), &stat); lerr == nil && serr == nil && stat.Mode&unix.S_IFMT == unix.S_IFREG {
				paths = append(paths, strings.TrimSuffix(path, " (deleted)"))
			}
			unix.Close(int(event.Fd))
		}
	}
}

// A packet is one that begins something: a TCP connection, or a datagram.
type packet struct {
	network  string // tcp or udp
	from, to netip.AddrPort
	bytes    []byte // of the packet, as far as they are shown
}

// begun returns the packets that begin something.
func (c *cell) begun() ([]packet, error) {
	var packets []packet
	b := make([]byte, 64<<10)
	for {
		n, from, err := unix.Recvfrom(c.packets, b, 0)
		if errors.Is(err, unix.EAGAIN) {
			return packets, nil
		}
		if err != nil {
			return nil, err
		}
		// A packet on the loopback is seen going out and coming in.
		if link, ok := from.(*unix.SockaddrLinklayer); !ok || link.Pkttype != unix.PACKET_OUTGOING {
			continue
		}
		if p, ok := parsePacket(b[:n]); ok {
			packets = append(packets, p)
		}
	}
}

// parsePacket reads the headers of IP and what is in it. Segments after the first and
// what is about other packets begin nothing.
func parsePacket(b []byte) (p packet, ok bool) {
	var protocol byte
	var from, to netip.Addr
	var payload []byte
	switch {
	case len(b) >= 20 && b[0]>>4 == 4 && len(b) >= int(b[0]&15)*4:
		protocol = b[9]
		from, to = netip.AddrFrom4([4]byte(b[12:16])), netip.AddrFrom4([4]byte(b[16:20]))
		payload = b[int(b[0]&15)*4:]
	case len(b) >= 40 && b[0]>>4 == 6:
		protocol = b[6]
		from, to = netip.AddrFrom16([16]byte(b[8:24])), netip.AddrFrom16([16]byte(b[24:40]))
		payload = b[40:]
	default:
		return p, false
	}
	switch {
	case protocol == unix.IPPROTO_UDP && len(payload) >= 8:
		p.network = "udp"
	case protocol == unix.IPPROTO_TCP && len(payload) >= 20 && payload[13]&0x12 == 0x02: // SYN without ACK
		p.network = "tcp"
	default:
		return p, false
	}
	p.from = netip.AddrPortFrom(from, binary.BigEndian.Uint16(payload))
	p.to = netip.AddrPortFrom(to, binary.BigEndian.Uint16(payload[2:]))
	p.bytes = bytes.Clone(b[:min(len(b), 2*shownBytes)])
	return p, true
}

func htons(v uint16) uint16 {
	var b [2]byte
	binary.BigEndian.PutUint16(b[:], v)
	return binary.NativeEndian.Uint16(b[:])
}

// oneWayOut makes the loopback the way to everywhere: what goes to the Internet is seen
// on it, and refused at once since nobody listens.
func oneWayOut() error {
	const loopback = 1 // its index in a new namespace
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_ROUTE)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	up := make([]byte, unix.SizeofIfInfomsg)
	binary.NativeEndian.PutUint32(up[4:], loopback)
	binary.NativeEndian.PutUint32(up[8:], unix.IFF_UP)
	binary.NativeEndian.PutUint32(up[12:], unix.IFF_UP)
	if err := askRoute(fd, unix.RTM_NEWLINK, 0, up); err != nil {
		return fmt.Errorf("the loopback cannot be set up: %w", err)
	}
	for _, family := range []byte{unix.AF_INET, unix.AF_INET6} {
		// struct rtmsg of <linux/rtnetlink.h>, and the attribute that names the interface.
		route := []byte{family, 0, 0, 0, unix.RT_TABLE_LOCAL, unix.RTPROT_BOOT, unix.RT_SCOPE_HOST, unix.RTN_LOCAL, 0, 0, 0, 0}
		route = binary.NativeEndian.AppendUint16(route, 8)
		route = binary.NativeEndian.AppendUint16(route, unix.RTA_OIF)
		route = binary.NativeEndian.AppendUint32(route, loopback)
		if err := askRoute(fd, unix.RTM_NEWROUTE, unix.NLM_F_CREATE, route); err != nil && family == unix.AF_INET {
			return fmt.Errorf("a route through the loopback: %w", err) // there may be no IPv6
		}
	}
	return nil
}

// askRoute sends one request to the kernel's routing and reads whether it was done.
func askRoute(fd int, kind uint16, flags int, body []byte) error {
	ask := binary.NativeEndian.AppendUint32(nil, uint32(unix.SizeofNlMsghdr+len(body)))
	ask = binary.NativeEndian.AppendUint16(ask, kind)
	ask = binary.NativeEndian.AppendUint16(ask, uint16(unix.NLM_F_REQUEST|unix.NLM_F_ACK|flags))
	ask = append(ask, make([]byte, 8)...) // sequence and port
	if err := unix.Sendto(fd, append(ask, body...), 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return err
	}
	b := make([]byte, 4096)
	n, err := unix.Read(fd, b)
	if err != nil {
		return err
	}
	if n < unix.SizeofNlMsghdr+4 || binary.NativeEndian.Uint16(b[4:]) != unix.NLMSG_ERROR {
		return errors.New("the kernel's answer is another one")
	}
	if code := int32(binary.NativeEndian.Uint32(b[unix.SizeofNlMsghdr:])); code != 0 {
		return syscall.Errno(-code)
	}
	return nil
}
