// Package egress decides where a free server may dial, by the address that is
// really dialled.
//
//	var policy egress.Policy
//	err := ptipc.Opaque(`{"allow": ["*.example.org:443", "10.1.0.0/16:80-90"]}`).Decode(&policy)
//	if err != nil {
//		return err
//	}
//	conn, err := policy.Dialer(nil)(ctx, "tcp", "www.example.org:443")
//	if errors.Is(err, ptipc.ErrNotAllowed) {
//		// err says why, for the operator; strangers are told the class alone
//	}
//
// A name that resolves to a private address, to this machine or to anything else
// that is not public leads nowhere, however often and whatever it resolves to,
// unless the policy names that address. Clauses such as EGRESS-1 are those of
// spec/free.md.
package egress

import (
	"encoding"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"strings"

	"pthost/ptipc"
)

// A Policy is a list of what may be dialled; what is not on it may not. It is
// what [ptipc.Opaque.Decode] makes of {"allow": […]}.
type Policy struct {
	// Allow is nil for the default: every public address on every port but 25, where
	// mail servers take mail from strangers (EGRESS-4). An empty list allows nothing.
	Allow []Rule `json:"allow,omitzero"`
}

// defaultRules are everything public without port 25 (EGRESS-4).
var defaultRules = []Rule{{name: "*", low: 1, high: 24}, {name: "*", low: 26, high: 65535}}

func (p *Policy) rules() []Rule {
	if p.Allow == nil {
		return defaultRules
	}
	return p.Allow
}

// A Rule allows hosts and ports (EGRESS-3). Its text is HOST:PORTS, where HOST is
// a name, *.NAME for every name below one, * for everything public, an address, or
// a network in CIDR form, IPv6 in square brackets; PORTS is a number, two with a
// hyphen between them, or *.
type Rule struct {
	name      string       // a name in small letters, "*", or with a "*." before it; "" if net counts
	net       netip.Prefix // masked
	low, high uint16
}

var (
	_ encoding.TextUnmarshaler = (*Rule)(nil)
	_ encoding.TextMarshaler   = Rule{}
)

// UnmarshalText reads the text of a rule. It takes nothing that can be read in
// two ways: addresses inside other addresses, bits beyond the prefix, names that
// could be mistaken for addresses. Errors say what to write.
func (r *Rule) UnmarshalText(text []byte) error {
	host, ports, err := net.SplitHostPort(lower(string(text)))
	if err != nil {
		return errors.New("is not HOST:PORTS; write example.com:443, 192.0.2.0/24:*, [2001:db8::/32]:80-90 or *:443")
	}
	var rule Rule
	if err := rule.parsePorts(ports); err != nil {
		return err
	}
	if err := rule.parseHost(host); err != nil {
		return err
	}
	if s := rule.String(); s != lower(string(text)) {
		return fmt.Errorf("is not in its usual form; write %s", s)
	}
	*r = rule
	return nil
}

func (r *Rule) parsePorts(text string) error {
	if text == "*" {
		r.low, r.high = 1, 65535
		return nil
	}
	first, last, isRange := strings.Cut(text, "-")
	if !isRange {
		last = first
	}
	low, err1 := strconv.ParseUint(first, 10, 16)
	high, err2 := strconv.ParseUint(last, 10, 16)
	if err1 != nil || err2 != nil || low == 0 || high < low {
		return fmt.Errorf("has %q for its ports; write a number from 1 to 65535, two with a hyphen between them, or *", text)
	}
	r.low, r.high = uint16(low), uint16(high)
	return nil
}

func (r *Rule) parseHost(host string) error {
	prefix, err := netip.ParsePrefix(host)
	if err != nil {
		addr, aerr := netip.ParseAddr(host)
		if aerr != nil {
			if !isPattern(host) {
				return fmt.Errorf("has %q for its host, which is no name, address or network; write a name in ASCII, *.NAME, * alone, an address, or a network such as 192.0.2.0/24", host)
			}
			r.name = host
			return nil
		}
		if addr.Zone() != "" {
			return fmt.Errorf("has an address with a zone; write %s without it", addr.WithZone(""))
		}
		prefix = netip.PrefixFrom(addr, addr.BitLen())
	}
	// Such an address is dialled, and so judged, as the IPv4 address inside (EGRESS-6).
	if addr := prefix.Addr(); prefix.Bits() >= insideBits && dialled(addr) != addr {
		inner := netip.PrefixFrom(dialled(addr), prefix.Bits()-insideBits).Masked()
		return fmt.Errorf("has IPv4 inside of IPv6; write %s, which covers it", inner)
	}
	r.net = prefix.Masked() // a prefix with more bits has another text, and is refused for that
	return nil
}

// isPattern reports whether a host is * or a name of letters, digits, hyphens and
// underscores, perhaps with "*." before it. A name whose last label is a number
// is refused: some resolvers take 127.1 or 0x7f000001 for an address, and a
// mistyped address must not become a rule for a name.
func isPattern(host string) bool {
	if host == "*" {
		return true
	}
	host = strings.TrimPrefix(host, "*.")
	if len(host) > 253 {
		return false
	}
	labels := strings.Split(host, ".")
	for _, label := range labels {
		if label == "" || len(label) > 63 || strings.ContainsFunc(label, func(c rune) bool {
			return (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '-' && c != '_'
		}) {
			return false
		}
	}
	last := labels[len(labels)-1]
	return last[0] < '0' || last[0] > '9'
}

// lower makes letters small, those of ASCII alone: DNS folds no others, and what
// Unicode takes for a k, such as U+212A, is another name.
func lower(s string) string {
	return strings.Map(func(c rune) rune {
		if 'A' <= c && c <= 'Z' {
			c += 'a' - 'A'
		}
		return c
	}, s)
}

// String returns the text of the rule.
func (r Rule) String() string {
	host := r.name
	if host == "" {
		host = r.net.String()
		if r.net.IsSingleIP() {
			host = r.net.Addr().String()
		}
	}
	ports := strconv.Itoa(int(r.low))
	switch {
	case r.low == 1 && r.high == 65535:
		ports = "*"
	case r.low != r.high:
		ports += "-" + strconv.Itoa(int(r.high))
	}
	return net.JoinHostPort(host, ports)
}

// MarshalText returns the text of the rule.
func (r Rule) MarshalText() ([]byte, error) { return []byte(r.String()), nil }

func (r Rule) coversPort(port uint16) bool { return r.low <= port && port <= r.high }

// coversName reports whether a rule is for a name. host is in small letters and
// without a dot at its end.
func (r Rule) coversName(host string) bool {
	if below, ok := strings.CutPrefix(r.name, "*"); ok {
		return strings.HasSuffix(host, below) && len(host) > len(below)
	}
	return r.name != "" && host == r.name
}

// coversAddr reports whether a rule is for an address that is not public. It
// must name it: a network counts that lies within the block, so that 0.0.0.0/0
// is everything public and not everything (EGRESS-5).
func (r Rule) coversAddr(addr netip.Addr, within block) bool {
	return r.net.IsValid() && r.net.Contains(addr) &&
		(within.public() || within.net.Bits() <= r.net.Bits())
}

// mayDial tells whether a destination has a chance, before its name is looked up.
func (p *Policy) mayDial(host string, port uint16) error {
	for _, r := range p.rules() {
		if r.coversPort(port) && (r.net.IsValid() || r.coversName(host)) {
			return nil
		}
	}
	return ptipc.WithClass(ptipc.ErrNotAllowed, fmt.Errorf("no rule allows it; add %q to the list of what is allowed", Rule{name: host, low: port, high: port}))
}

// check judges the address to be dialled (EGRESS-1), which host has led to. within
// is the block that it is in.
func (p *Policy) check(host string, addr netip.Addr, port uint16, within block) error {
	for _, r := range p.rules() {
		if !r.coversPort(port) {
			continue
		}
		// A name never opens what is not public: whoever owns it chooses what it
		// resolves to (EGRESS-5).
		if r.coversAddr(addr, within) || within.public() && r.coversName(host) {
			return nil
		}
	}
	rule := Rule{net: netip.PrefixFrom(addr, addr.BitLen()), low: port, high: port}
	what := "no rule allows it"
	if !within.public() {
		what = "it is " + within.what + ", and no rule names it"
	}
	return ptipc.WithClass(ptipc.ErrNotAllowed, fmt.Errorf("the address is %s: %s; add %q to the list of what is allowed", addr, what, rule))
}
