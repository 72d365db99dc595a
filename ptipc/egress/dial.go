package egress

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"syscall"
	"time"

	"pthost/ptipc"
)

// dialTimeout bounds a dial with everything in it: the look-up, and all the
// addresses that it finds (EGRESS-9).
const dialTimeout = 30 * time.Second

// Dialer makes a function for [ptipc.Env].DialOut that dials only where the
// policy lets it, and only over TCP. Errors about the policy are
// [ptipc.ErrNotAllowed] (EGRESS-8) and tell its operator what was found.
//
// With a nil next the system dials, and each address is judged when it is about
// to be dialled (EGRESS-1). Otherwise next dials; names are looked up here, and
// next gets addresses that have been judged, one after the other (EGRESS-10).
func (p *Policy) Dialer(next func(ctx context.Context, network, addr string) (net.Conn, error)) func(ctx context.Context, network, addr string) (net.Conn, error) {
	d := &dialer{policy: p, next: next, resolver: net.DefaultResolver}
	return d.dial
}

type dialer struct {
	policy   *Policy
	next     func(ctx context.Context, network, addr string) (net.Conn, error)
	resolver *net.Resolver //nolint:forbidigo // the far end is where names are looked up (SOCKS-13)
	own      ownList
}

func (d *dialer) dial(ctx context.Context, network, addr string) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, dialTimeout) // EGRESS-9
	defer cancel()
	conn, err := d.dialHost(ctx, network, addr)
	if err != nil {
		return nil, ptipc.Classify(fmt.Errorf("egress: %q: %w", addr, err))
	}
	return conn, nil
}

func (d *dialer) dialHost(ctx context.Context, network, addr string) (net.Conn, error) {
	switch network {
	case "tcp", "tcp4", "tcp6":
	default: // a unix socket is on this machine, whatever its address
		return nil, fmt.Errorf("the network %q is not TCP: %w", network, ptipc.ErrNotAllowed)
	}
	host, portText, err := net.SplitHostPort(addr)
	if err != nil {
		return nil, ptipc.WithClass(ptipc.ErrNotAllowed, err)
	}
	port, err := strconv.ParseUint(portText, 10, 16)
	if err != nil || port == 0 || host == "" { // an empty host would be this machine
		return nil, fmt.Errorf("not a host and a port from 1 to 65535: %w", ptipc.ErrNotAllowed)
	}
	name := lower(strings.TrimSuffix(host, "."))
	if _, err := netip.ParseAddr(host); err != nil {
		// A name that cannot be allowed is not looked up either: a look-up carries
		// the name to whoever serves it (EGRESS-7).
		if err := d.policy.mayDial(name, uint16(port)); err != nil {
			return nil, err
		}
	}
	if d.next != nil {
		return d.dialNext(ctx, network, host, name, uint16(port))
	}
	system := net.Dialer{
		Resolver: d.resolver, //nolint:forbidigo // see dialer
		// Called for each address, with the very one that is connected to next: what
		// the name resolves to before or after makes no difference (EGRESS-1).
		ControlContext: func(_ context.Context, _, address string, _ syscall.RawConn) error {
			to, err := netip.ParseAddrPort(address)
			if err != nil {
				return ptipc.WithClass(ptipc.ErrNotAllowed, err)
			}
			return d.check(name, to.Addr(), to.Port())
		},
	}
	return system.DialContext(ctx, network, addr)
}

// dialNext looks host up and has next dial the addresses that may be dialled.
func (d *dialer) dialNext(ctx context.Context, network, host, name string, port uint16) (net.Conn, error) {
	// EGRESS-10: a next that looked the name up would find what it likes.
	found, err := d.resolver.LookupNetIP(ctx, "ip"+strings.TrimPrefix(network, "tcp"), host) //nolint:forbidigo // see dialer
	if err != nil {
		return nil, err
	}
	var first error // as net.Dialer does, which puts the likeliest address first
	for i, addr := range found {
		addr = addr.Unmap()
		err := d.check(name, addr, port)
		if err == nil {
			var conn net.Conn
			if conn, err = d.dialOne(ctx, network, netip.AddrPortFrom(addr, port), len(found)-i); err == nil {
				return conn, nil
			}
		}
		if first == nil {
			first = err
		}
		if ctx.Err() != nil {
			break
		}
	}
	if first == nil {
		first = &net.DNSError{Err: "no address was found", Name: host, IsNotFound: true}
	}
	return nil, first
}

// dialOne gives one of left addresses its share of the time.
func (d *dialer) dialOne(ctx context.Context, network string, addr netip.AddrPort, left int) (net.Conn, error) {
	if deadline, ok := ctx.Deadline(); ok && left > 1 {
		const shortest = 2 * time.Second
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, max(shortest, time.Until(deadline)/time.Duration(left)))
		defer cancel()
	}
	return d.next(ctx, network, addr.String())
}

func (d *dialer) check(name string, addr netip.Addr, port uint16) error {
	addr = dialled(addr)
	within := blockOf(addr)
	if within.public() {
		var err error
		if within, err = d.own.block(addr); err != nil {
			return err
		}
	}
	return d.policy.check(name, addr, port, within)
}
