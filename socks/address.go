package socks

import (
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"unicode/utf8"

	socks5 "github.com/armon/go-socks5"

	"pthost/ptipc"
)

const (
	addressIPv4 = 0x01
	addressName = 0x03
	addressIPv6 = 0x04
)

// anywhere is the destination of a bound transport, [::]:0, in a request (SOCKS-11).
var anywhere = [19]byte{0: addressIPv6}

// destination makes "host:port" of the address in a request, or "" for a bound
// server. It refuses what SOCKS-11 and SOCKS-12 refuse.
func destination(addr *socks5.AddrSpec, bound bool) (string, error) {
	if bound { // SOCKS-11
		if addr.FQDN != "" || addr.Port != 0 || string(addr.IP) != string(net.IPv6zero) {
			return "", fmt.Errorf("socks: a bound transport takes [::]:0 alone as the destination: %w", ptipc.ErrNotAllowed)
		}
		return "", nil
	}
	host := addr.FQDN // SOCKS-13: a name stays a name
	if len(addr.IP) > 0 {
		host = addr.IP.String()
	} else if err := checkName(host); err != nil {
		return "", err
	}
	if addr.Port == 0 { // SOCKS-12; [::]:0 is one of these
		return "", fmt.Errorf("socks: port 0 is no destination: %w", ptipc.ErrNotAllowed)
	}
	return net.JoinHostPort(host, strconv.Itoa(addr.Port)), nil
}

// checkName refuses names that are empty, or that would make "host:port" mean
// something else to whoever takes it apart again or prints it.
func checkName(name string) error {
	switch {
	case name == "": // SOCKS-12
		return fmt.Errorf("socks: the destination has an empty name: %w", ptipc.ErrNotAllowed)
	case len(name) > 255:
		return fmt.Errorf("socks: the destination's name has %d bytes, at most 255 can be sent: %w", len(name), ptipc.ErrNotAllowed)
	case !utf8.ValidString(name),
		strings.ContainsFunc(name, func(r rune) bool { return r <= ' ' || r == 0x7f || r == '[' || r == ']' }):
		return fmt.Errorf("socks: the destination %q is not a name: %w", name, ptipc.ErrNotAllowed)
	}
	if strings.Contains(name, ":") {
		if _, err := netip.ParseAddr(name); err != nil {
			return fmt.Errorf("socks: the destination %q is not a name: %w", name, ptipc.ErrNotAllowed)
		}
	}
	return nil
}

// appendDestination appends ATYP, DST.ADDR and DST.PORT of dest, which is
// "host:port", or "" for a bound transport. It never looks a name up (SOCKS-13).
func appendDestination(b []byte, dest string) ([]byte, error) {
	if dest == "" { // SOCKS-11
		return append(b, anywhere[:]...), nil
	}
	host, portText, err := net.SplitHostPort(dest)
	if err != nil {
		return nil, ptipc.WithClass(ptipc.ErrNotAllowed, fmt.Errorf("socks: the destination must be host:port: %w", err))
	}
	port, err := strconv.ParseUint(portText, 10, 16)
	if err != nil || port == 0 { // SOCKS-12
		return nil, fmt.Errorf("socks: the destination's port %q must be a number from 1 to 65535: %w", portText, ptipc.ErrNotAllowed)
	}
	if ip, err := netip.ParseAddr(host); err == nil && ip.Zone() == "" {
		if ip.Is4() {
			b = append(b, addressIPv4)
		} else {
			b = append(b, addressIPv6)
		}
		b = append(b, ip.AsSlice()...)
	} else { // a name, or an address with a zone, which fits in a name alone
		if err := checkName(host); err != nil {
			return nil, err
		}
		b = append(b, addressName, byte(len(host)))
		b = append(b, host...)
	}
	return append(b, byte(port>>8), byte(port)), nil
}
