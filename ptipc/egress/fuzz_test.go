package egress

import (
	"errors"
	"net/netip"
	"strings"
	"testing"

	"pthost/ptipc"
)

func FuzzRule(f *testing.F) {
	yes, no := table(f, "rules.txt")
	for _, text := range append(yes, no...) {
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text string) {
		var r, again Rule
		if err := r.UnmarshalText([]byte(text)); err != nil {
			if r != (Rule{}) {
				t.Errorf("%q was refused, and left %v behind", text, r)
			}
			return
		}
		if err := again.UnmarshalText([]byte(r.String())); err != nil || again != r {
			t.Errorf("%q reads as %v, and that as %v, %v", text, r, again, err)
		}
		if len(r.String()) != len(text) {
			t.Errorf("%q has a second form, %v", text, r)
		}
		if r.low == 0 || r.low > r.high {
			t.Errorf("%q has the ports %d to %d", text, r.low, r.high)
		}
	})
}

func FuzzPolicy(f *testing.F) {
	for _, text := range []string{`{}`, `{"allow":[]}`, `{"allow":["*:443","10.0.0.0/8:1-9"]}`, `{"allow":["*:443",1]}`, `{"allow":{}}`, `{"deny":[]}`} {
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text string) {
		var p Policy
		err := ptipc.Opaque(text).Decode(&p)
		var config *ptipc.ConfigError
		if err != nil && !errors.As(err, &config) {
			t.Errorf("%q: %v has no place", text, err)
		}
		if err == nil && p.Allow == nil && strings.Contains(text, `"`) {
			t.Errorf("%q became the default", text)
		}
	})
}

// FuzzAddress compares what the default lets through with what the standard
// library knows of addresses.
func FuzzAddress(f *testing.F) {
	yes, no := table(f, "addresses.txt")
	for _, text := range append(yes, no...) {
		b, _ := netip.MustParseAddr(text).MarshalBinary()
		f.Add(b)
	}
	d := &dialer{policy: new(Policy)}
	f.Fuzz(func(t *testing.T, b []byte) {
		var addr netip.Addr
		if addr.UnmarshalBinary(b) != nil || !addr.IsValid() {
			return
		}
		if err := d.check("a.example", addr, 443); err != nil {
			if !errors.Is(err, ptipc.ErrNotAllowed) {
				t.Errorf("%s: %v", addr, err)
			}
			return
		}
		inner := addr.Unmap()
		if b := addr.As16(); strings.HasPrefix(addr.StringExpanded(), "0064:ff9b:0000:0000:0000:0000:") {
			inner = netip.AddrFrom4([4]byte(b[12:]))
		}
		if !inner.IsGlobalUnicast() || inner.IsPrivate() {
			t.Errorf("%s was let through", addr)
		}
	})
}
