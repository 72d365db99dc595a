package stdio

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"
)

// SMethod is the line SMETHOD: it announces one server (SRV-1).
type SMethod struct {
	Name string // of the server; see ValidName
	Addr string // ip:port at which the wire listens, an address of IPv6 in brackets; never port 0
	Args Args   // what a client needs to know beyond the address; no secrets (SRV-2)
}

// SMethodsDone is the line SMETHODS DONE: all announced servers listen (SRV-1).
type SMethodsDone struct{}

// SMethodError is the line SMETHOD-ERROR: one server could not start (SRV-1). It is
// to a server what [CMethodError] is to a connection factory.
type SMethodError CMethodError

// NewSMethodError is [NewCMethodError] for the server name.
func NewSMethodError(name string, err error) SMethodError {
	return SMethodError(NewCMethodError(name, err))
}

// Error is the message under the name of the server.
func (m SMethodError) Error() string { return CMethodError(m).Error() }

// Unwrap returns the class and the configuration error.
func (m SMethodError) Unwrap() []error { return CMethodError(m).Unwrap() }

func (m SMethodError) appendTo(dst []byte) ([]byte, error) {
	return CMethodError(m).appendAs(dst, "SMETHOD-ERROR")
}

func (SMethodsDone) appendTo(dst []byte) ([]byte, error) { return append(dst, "SMETHODS DONE"...), nil }

func (m SMethod) appendTo(dst []byte) ([]byte, error) {
	if err := checkName(m.Name); err != nil {
		return nil, err
	}
	if err := checkWireAddr(m.Addr); err != nil {
		return nil, err
	}
	return m.Args.appendTo(fmt.Appendf(dst, "SMETHOD %s %s", m.Name, m.Addr))
}

func parseSMethod(rest string) (Message, error) {
	words := words(rest)
	if len(words) < 2 {
		return nil, fmt.Errorf("NAME ADDR are wanted and there are %d words (SRV-1)", len(words))
	}
	if err := checkName(words[0]); err != nil {
		return nil, err
	}
	if err := checkWireAddr(words[1]); err != nil {
		return nil, err
	}
	return SMethod{Name: words[0], Addr: words[1], Args: findArgs(words[2:])}, nil
}

// checkWireAddr holds for any address, since other machines come from anywhere.
func checkWireAddr(s string) error {
	addr, err := netip.ParseAddrPort(s)
	switch {
	case err != nil:
		return fmt.Errorf("the address %q is not ip:port, with an address of IPv6 in brackets (SRV-1)", shorten(s, 64))
	case addr.Addr().Zone() != "":
		return fmt.Errorf("the address %q has a zone, which means nothing on other machines; leave it out (SRV-1)", shorten(s, 64))
	case addr.Port() == 0:
		return errors.New("port 0 cannot be connected to; announce the port that the system chose (SRV-1)")
	}
	return nil
}

// findArgs reads the ARGS among the last words of an announcement.
func findArgs(words []string) Args {
	for _, word := range words {
		if args, ok := strings.CutPrefix(word, argsPrefix); ok {
			return parseArgs(args)
		}
	}
	return nil
}
