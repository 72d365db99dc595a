package conformance

import (
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// The states of a TCP socket in /proc/net/tcp.
const (
	stateConnecting = "02"
	stateListening  = "0A"
)

// listening returns the TCP addresses on which the processes listen.
func listening(pids []int) ([]netip.AddrPort, error) {
	own := map[string]bool{}
	for _, pid := range pids {
		fds, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid))
		if err != nil {
			return nil, err
		}
		for _, fd := range fds {
			if link, err := os.Readlink(fd); err == nil { // it may have been closed just now
				own[strings.TrimSuffix(strings.TrimPrefix(link, "socket:["), "]")] = true
			}
		}
	}
	var found []netip.AddrPort
	for _, pid := range pids {
		sockets, err := tcpSockets(pid, stateListening)
		if err != nil {
			continue // the process has just ended
		}
		for _, s := range sockets {
			if own[s.inode] {
				found = append(found, s.local)
			}
		}
		return found, nil // the others are in the same network namespace
	}
	return nil, fmt.Errorf("none of the child's processes %v can be looked at", pids)
}

// dialing reports whether somebody is about to connect to an address.
func dialing(pid int, to netip.AddrPort) (bool, error) {
	sockets, err := tcpSockets(pid, stateConnecting)
	for _, s := range sockets {
		if s.remote == to {
			return true, nil
		}
	}
	return false, err
}

type tcpSocket struct {
	local, remote netip.AddrPort
	inode         string
}

// tcpSockets are all sockets of one state in the process's network namespace.
func tcpSockets(pid int, state string) ([]tcpSocket, error) {
	var sockets []tcpSocket
	for _, name := range []string{"tcp", "tcp6"} {
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/net/%s", pid, name))
		if err != nil {
			if name == "tcp6" && os.IsNotExist(err) {
				break // a kernel without IPv6
			}
			return nil, err
		}
		for line := range strings.Lines(string(text)) {
			// Most of the lines can be connections that are long gone.
			if !strings.Contains(line, " "+state+" ") {
				continue
			}
			fields := strings.Fields(line)
			if len(fields) < 10 || fields[3] != state {
				continue
			}
			local, err := kernelAddr(fields[1])
			if err != nil {
				return nil, err
			}
			remote, err := kernelAddr(fields[2])
			if err != nil {
				return nil, err
			}
			sockets = append(sockets, tcpSocket{local, remote, fields[9]})
		}
	}
	return sockets, nil
}

// kernelAddr reads an address as /proc/net/tcp has it: 32-bit words in the
// machine's byte order, then the port.
func kernelAddr(s string) (netip.AddrPort, error) {
	host, portText, _ := strings.Cut(s, ":")
	port, err := strconv.ParseUint(portText, 16, 16)
	if err != nil {
		return netip.AddrPort{}, fmt.Errorf("the address %q in /proc/net/tcp: %w", s, err)
	}
	var ip []byte
	for ; len(host) >= 8; host = host[8:] {
		word, err := strconv.ParseUint(host[:8], 16, 32)
		if err != nil {
			return netip.AddrPort{}, fmt.Errorf("the address %q in /proc/net/tcp: %w", s, err)
		}
		ip = binary.NativeEndian.AppendUint32(ip, uint32(word))
	}
	addr, _ := netip.AddrFromSlice(ip)
	return netip.AddrPortFrom(addr.Unmap(), uint16(port)), nil
}

// descriptors counts those that a process has open.
func descriptors(pid int) int {
	fds, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid))
	if err != nil {
		return 0
	}
	return len(fds)
}

// asUser runs f as another user of the machine. Users belong to threads here, so
// that the rest of this process keeps its own.
func asUser(uid int, f func() error) error {
	if os.Geteuid() != 0 {
		return fmt.Errorf("only root can connect as another user")
	}
	ended := make(chan error)
	go func() {
		runtime.LockOSThread() // without an Unlock: the thread ends with the goroutine
		keep := ^uintptr(0)
		if _, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, keep, uintptr(uid), keep); errno != 0 {
			ended <- fmt.Errorf("become user %d: %w", uid, errno)
			return
		}
		ended <- f()
	}()
	return <-ended
}

// fill makes a listener's queue so short that one connection fills it, so that
// later ones have no answer until somebody accepts.
func fill(l *net.TCPListener) error {
	raw, err := l.SyscallConn()
	if err != nil {
		return err
	}
	if cerr := raw.Control(func(fd uintptr) { err = unix.Listen(int(fd), 0) }); cerr != nil {
		return cerr
	}
	return err
}
