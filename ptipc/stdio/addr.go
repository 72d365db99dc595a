package stdio

import (
	"fmt"
	"net/netip"
	"strings"
)

// ParseAddr splits the ADDR of a CMETHOD line into a network and an address as
// package net has them: "tcp" and a loopback address with a port, or "unix" and
// a plain file name, which stands in the child's state directory. Anything else
// is an error, and a host refuses the child for it (LINE-5).
func ParseAddr(addr string) (network, address string, err error) {
	if name, ok := strings.CutPrefix(addr, "unix:"); ok {
		if !validSocketName(name) {
			return "", "", fmt.Errorf("the address %q names no file of the state directory; unix:NAME takes letters, digits, '.', '_' and '-', at most 64 (LINE-5)", shorten(addr, 128))
		}
		return "unix", name, nil
	}
	// Only 127.0.0.0/8 and ::1 themselves: a mapped address or one with a zone is
	// not what LINE-5 names, and systems differ in where they lead.
	ap, err := netip.ParseAddrPort(addr)
	if err != nil || !ap.Addr().IsLoopback() || ap.Addr().Is4In6() || ap.Addr().Zone() != "" || ap.Port() == 0 {
		return "", "", fmt.Errorf("the address %q is neither a loopback address with a port nor unix:NAME (LINE-5)", shorten(addr, 128))
	}
	return "tcp", ap.String(), nil
}

func validSocketName(name string) bool {
	if name == "" || len(name) > 64 || name == "." || name == ".." {
		return false
	}
	return isKeyword(strings.ReplaceAll(name, ".", "_"))
}
