package localnet

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
)

const (
	unixPrefix = "unix:"
	maxName    = 64 // bytes in the name of a socket
)

// ErrAddr is in the chain of every error about an address or the name of a
// socket that is not of the form that the control lines allow.
var ErrAddr = errors.New("not a local address")

// An Addr is an address as a control line carries it (LINE-5): a loopback
// ip:port, or unix:NAME, where NAME is a file in the child's working directory.
// It is a [net.Addr] and comparable. The zero value is no address.
type Addr struct {
	tcp  netip.AddrPort
	name string
}

// ParseAddr reads the one spelling of an address that [Addr.String] writes: an
// address of 127.0.0.0/8 or [::1] with a port from 1 to 65535, or unix: and a
// bare file name of at most 64 letters, digits, dots, underscores and hyphens.
// Everything else is refused with an error that wraps [ErrAddr]: names, zones,
// IPv4-mapped addresses, other spellings of the same address, and paths (LINE-5).
func ParseAddr(s string) (Addr, error) {
	if name, ok := strings.CutPrefix(s, unixPrefix); ok {
		if err := checkName(name); err != nil {
			return Addr{}, err
		}
		return Addr{name: name}, nil
	}
	tcp, err := parseLoopback(s)
	if err != nil {
		return Addr{}, err
	}
	if tcp.Port() == 0 {
		return Addr{}, fmt.Errorf("localnet: %w: %q: port 0 cannot be dialed; announce the port that the system chose", ErrAddr, s)
	}
	return Addr{tcp: tcp}, nil
}

// parseLoopback reads a loopback ip:port in its canonical spelling, port 0 included.
func parseLoopback(s string) (netip.AddrPort, error) {
	// What is quoted in an error comes from outside.
	shown := s
	if len(shown) > 2*maxName {
		shown = shown[:2*maxName] + "..."
	}
	tcp, err := netip.ParseAddrPort(s)
	switch {
	case err != nil:
		return netip.AddrPort{}, fmt.Errorf("localnet: %w: %q; want 127.0.0.1:PORT, [::1]:PORT or unix:NAME", ErrAddr, shown)
	case tcp.Addr().Is4In6() || tcp.Addr().Zone() != "" || !tcp.Addr().IsLoopback():
		return netip.AddrPort{}, fmt.Errorf("localnet: %w: %q is not on the loopback; use 127.0.0.1 or [::1]", ErrAddr, shown)
	case tcp.String() != s:
		return netip.AddrPort{}, fmt.Errorf("localnet: %w: %q; write it %s", ErrAddr, shown, tcp)
	}
	return tcp, nil
}

// checkName says whether a name is safe as a file name on every system.
func checkName(name string) error {
	switch {
	case name == "":
		return fmt.Errorf("localnet: %w: the name of the socket is empty", ErrAddr)
	case len(name) > maxName:
		return fmt.Errorf("localnet: %w: the name of the socket has %d bytes, at most %d are allowed", ErrAddr, len(name), maxName)
	case name == "." || name == "..":
		return fmt.Errorf("localnet: %w: %q is a directory, not the name of a socket", ErrAddr, name)
	}
	for i := range len(name) {
		switch c := name[i]; {
		case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', '0' <= c && c <= '9', c == '.', c == '_', c == '-':
		default:
			return fmt.Errorf("localnet: %w: %q has the byte %q; use a bare file name of letters, digits, '.', '_' and '-'", ErrAddr, name, c)
		}
	}
	return nil
}

// Network is "unix" or "tcp", and "" for the zero Addr.
func (a Addr) Network() string {
	switch {
	case a.name != "":
		return "unix"
	case a.tcp.IsValid():
		return "tcp"
	}
	return ""
}

// String is the address in the form that [ParseAddr] reads, "" for the zero Addr.
func (a Addr) String() string {
	switch {
	case a.name != "":
		return unixPrefix + a.name
	case a.tcp.IsValid():
		return a.tcp.String()
	}
	return ""
}

// Unix reports whether the address is of a unix socket.
func (a Addr) Unix() bool { return a.name != "" }

// Name is the NAME of unix:NAME, and "" for a TCP address.
func (a Addr) Name() string { return a.name }

// AddrPort is the TCP address, and the zero AddrPort for a unix socket.
func (a Addr) AddrPort() netip.AddrPort { return a.tcp }

// ClientName names a connection so that both of its ends say the same: the
// dialing end passes conn.LocalAddr(), the accepting end conn.RemoteAddr(). On
// TCP it is the client's ip:port. On a unix socket it is the name that the
// kernel gave to a client that used [Dir.Dial], @ and five hexadecimal digits, or that of
// a client with an [End], @ and twenty. It is "" for anything else, and always printable ASCII without a space (STAT-3).
func ClientName(addr net.Addr) string {
	switch addr := addr.(type) {
	case *net.TCPAddr:
		ap := addr.AddrPort()
		if !ap.IsValid() || ap.Addr().Zone() != "" {
			return ""
		}
		return netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port()).String()
	case *net.UnixAddr:
		// A hostile client can bind any bytes as its name: only what the kernel's
		// autobind makes, and what looks like an End's, is passed on.
		if isName(addr.Name, 5) || hasSlot(addr.Name) {
			return addr.Name
		}
	}
	return ""
}

// hasSlot reports whether the name of a client's socket is an [End]'s.
func hasSlot(name string) bool { return isName(name, 20) }

func isName(name string, digits int) bool {
	return len(name) == 1+digits && name[0] == '@' && strings.Trim(name[1:], "0123456789abcdef") == ""
}
