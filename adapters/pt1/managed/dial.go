package managed

import (
	"context"
	"net"
	"net/netip"

	"pthost/adapters/pt1/wire"
	"pthost/socks"
)

type dialFunc = func(ctx context.Context, network, addr string) (net.Conn, error)

// dialOut is the way out that the environment demands, nil if it demands none
// (PT1-24).
func dialOut(e *wire.Environment) (dialFunc, error) {
	var dial dialFunc
	if e.BindV4.IsValid() || e.BindV6.IsValid() {
		dial = dialFrom(e.BindV4, e.BindV6)
	}
	if e.Proxy == "" {
		return dial, nil
	}
	return socks.UpstreamDialer(e.Proxy, dial)
}

// dialFrom dials from the address of the destination's family. A name is tried in
// both families, that of IPv4 first, since only the system's look-up knows its own.
func dialFrom(v4, v6 netip.Addr) dialFunc {
	from := func(ctx context.Context, network, addr string, local netip.Addr) (net.Conn, error) {
		var d net.Dialer
		if local.IsValid() {
			d.LocalAddr = net.TCPAddrFromAddrPort(netip.AddrPortFrom(local, 0))
		}
		return d.DialContext(ctx, network, addr)
	}
	return func(ctx context.Context, network, addr string) (net.Conn, error) {
		if network != "tcp" {
			return from(ctx, network, addr, netip.Addr{}) // it has no stream that could tell who dials
		}
		host, _, err := net.SplitHostPort(addr)
		if err != nil {
			return nil, err
		}
		if ip, err := netip.ParseAddr(host); err == nil {
			if ip.Unmap().Is4() {
				return from(ctx, "tcp4", addr, v4)
			}
			return from(ctx, "tcp6", addr, v6)
		}
		conn, err := from(ctx, "tcp4", addr, v4)
		if err != nil && ctx.Err() == nil {
			if conn, err6 := from(ctx, "tcp6", addr, v6); err6 == nil {
				return conn, nil
			}
		}
		return conn, err
	}
}
