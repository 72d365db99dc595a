package egress

import (
	"fmt"
	"net"
	"net/netip"
	"sync"
	"time"
)

// A block is a part of the address space that is not public.
type block struct {
	net  netip.Prefix
	what string
}

// public says that an address is in no block.
func (b block) public() bool { return !b.net.IsValid() }

// nat64 is IPv4 behind a translator that everybody may have (RFC 6052).
var nat64 = netip.MustParsePrefix("64:ff9b::/96")

// insideBits is where IPv4 begins in an IPv6 address that it is mapped into, and
// in one of nat64.
const insideBits = 96

// blocks are what the IANA special-purpose address registries call not globally
// reachable, with multicast and transition mechanisms that are no more (EGRESS-2).
// The first that contains an address counts.
var blocks = func() (blocks []block) {
	for _, b := range []struct{ net, what string }{
		{"0.0.0.0/8", "this network (RFC 791)"},
		{"10.0.0.0/8", "private (RFC 1918)"},
		{"100.64.0.0/10", "a carrier's own (RFC 6598)"},
		{"127.0.0.0/8", "loopback"},
		{"169.254.0.0/16", "link-local (RFC 3927)"},
		{"172.16.0.0/12", "private (RFC 1918)"},
		{"192.0.0.0/24", "for protocols (RFC 6890)"},
		{"192.0.2.0/24", "for documentation (RFC 5737)"},
		{"192.88.99.0/24", "a 6to4 relay (RFC 7526)"},
		{"192.168.0.0/16", "private (RFC 1918)"},
		{"198.18.0.0/15", "for benchmarks (RFC 2544)"},
		{"198.51.100.0/24", "for documentation (RFC 5737)"},
		{"203.0.113.0/24", "for documentation (RFC 5737)"},
		{"224.0.0.0/4", "multicast"},
		{"255.255.255.255/32", "broadcast"},
		{"240.0.0.0/4", "reserved (RFC 1112)"},

		{"::/128", "unspecified"},
		{"::1/128", "loopback"},
		{"::/96", "IPv4-compatible (RFC 4291)"},
		{"::ffff:0:0:0/96", "IPv4-translated (RFC 2765)"},
		{"64:ff9b:1::/48", "behind a local translator (RFC 8215)"},
		{"100::/64", "for discarding (RFC 6666)"},
		{"2001::/32", "Teredo (RFC 4380)"},
		{"2001::/23", "for protocols (RFC 2928)"},
		{"2001:db8::/32", "for documentation (RFC 3849)"},
		{"2002::/16", "6to4 (RFC 3056)"},
		{"3fff::/20", "for documentation (RFC 9637)"},
		{"fc00::/7", "unique local (RFC 4193)"},
		{"fe80::/10", "link-local (RFC 4291)"},
		{"fec0::/10", "site-local (RFC 3879)"},
		{"ff00::/8", "multicast"},
		{"::/3", "not given out"},
		{"4000::/2", "not given out"},
		{"8000::/1", "not given out"},
	} {
		blocks = append(blocks, block{netip.MustParsePrefix(b.net), b.what})
	}
	return blocks
}()

// dialled returns the address that a packet to addr really goes to: without a
// zone, and IPv4 for what is IPv4 inside of IPv6 (EGRESS-6).
func dialled(addr netip.Addr) netip.Addr {
	addr = addr.WithZone("")
	if nat64.Contains(addr) {
		b := addr.As16()
		return netip.AddrFrom4([4]byte(b[insideBits/8:]))
	}
	return addr.Unmap()
}

// blockOf returns the block that an address is in, none if it is public.
func blockOf(addr netip.Addr) block {
	for _, b := range blocks {
		if b.net.Contains(addr) {
			return b
		}
	}
	return block{}
}

// ownFor is how long a list of this machine's addresses is good. Making it takes
// longer than a dial on a fast network does.
const ownFor = time.Second

// An ownList knows the addresses of this machine.
type ownList struct {
	mu    sync.Mutex
	until time.Time
	addrs map[netip.Addr]bool
}

// block returns the block that addr alone is in if it is this machine's own. A
// service here takes connections from here that it would not take from outside,
// so a public address of this machine is none to others (EGRESS-2).
func (o *ownList) block(addr netip.Addr) (block, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if now := time.Now(); now.After(o.until) {
		addrs, err := net.InterfaceAddrs()
		if err != nil {
			return block{}, fmt.Errorf("this machine's own addresses are not known: %w", err)
		}
		o.set(addrs, now.Add(ownFor))
	}
	if o.addrs[addr] {
		return block{netip.PrefixFrom(addr, addr.BitLen()), "this machine"}, nil
	}
	return block{}, nil
}

func (o *ownList) set(addrs []net.Addr, until time.Time) {
	o.addrs, o.until = make(map[netip.Addr]bool, len(addrs)), until
	for _, a := range addrs {
		if prefix, err := netip.ParsePrefix(a.String()); err == nil {
			o.addrs[prefix.Addr().Unmap()] = true
		}
	}
}
