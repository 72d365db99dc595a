package egress

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/net/dns/dnsmessage"

	"pthost/ptipc"
)

const vectorDir = "../../testdata/free"

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// A zone answers for names.
type zone struct {
	names map[string]func() []netip.Addr // called under mu

	mu      sync.Mutex
	lookups int // questions for IPv4; those for IPv6 may come more than once
	serving sync.WaitGroup
}

func fixed(addrs ...string) func() []netip.Addr {
	var parsed []netip.Addr
	for _, a := range addrs {
		parsed = append(parsed, netip.MustParseAddr(a))
	}
	return func() []netip.Addr { return parsed }
}

// resolver returns one that asks the zone alone.
func (z *zone) resolver(t testing.TB) *net.Resolver {
	t.Cleanup(z.serving.Wait)
	return &net.Resolver{PreferGo: true, Dial: func(context.Context, string, string) (net.Conn, error) {
		near, far := net.Pipe() // no net.PacketConn, so that messages come with their length
		z.serving.Go(func() {
			defer far.Close()
			if err := z.answer(far); err != nil {
				t.Error(err)
			}
		})
		return near, nil
	}}
}

func (z *zone) answer(c net.Conn) error {
	var length uint16
	if err := binary.Read(c, binary.BigEndian, &length); err != nil {
		return err
	}
	b := make([]byte, length)
	if _, err := io.ReadFull(c, b); err != nil {
		return err
	}
	var m dnsmessage.Message
	if err := m.Unpack(b); err != nil {
		return err
	}
	q := m.Questions[0]
	m.Additionals = nil
	m.Response, m.RCode = true, dnsmessage.RCodeNameError
	z.mu.Lock()
	if q.Type == dnsmessage.TypeA {
		z.lookups++
	}
	if find := z.names[strings.TrimSuffix(strings.ToLower(q.Name.String()), ".")]; find != nil {
		m.RCode = dnsmessage.RCodeSuccess
		for _, a := range find() {
			r := dnsmessage.Resource{Header: dnsmessage.ResourceHeader{Name: q.Name, Class: q.Class, Type: q.Type}}
			switch {
			case q.Type == dnsmessage.TypeA && a.Is4():
				r.Body = &dnsmessage.AResource{A: a.As4()}
			case q.Type == dnsmessage.TypeAAAA && a.Is6():
				r.Body = &dnsmessage.AAAAResource{AAAA: a.As16()}
			default:
				continue
			}
			m.Answers = append(m.Answers, r)
		}
	}
	z.mu.Unlock()
	packed, err := m.Pack()
	if err != nil {
		return err
	}
	_, err = c.Write(append(binary.BigEndian.AppendUint16(nil, uint16(len(packed))), packed...))
	return err
}

func policy(t testing.TB, text string) *Policy {
	t.Helper()
	p := new(Policy)
	if err := ptipc.Opaque(text).Decode(p); err != nil {
		t.Fatal(err)
	}
	return p
}

// EGRESS-1 to EGRESS-8, EGRESS-10.
func TestPolicyVectors(t *testing.T) {
	files, err := filepath.Glob(filepath.Join(vectorDir, "policy-*.txt"))
	if err != nil || len(files) == 0 {
		t.Fatalf("no vectors in %s: %v", vectorDir, err)
	}
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		v := map[string]string{}
		for line := range strings.Lines(string(text)) {
			key, value, _ := strings.Cut(strings.TrimSuffix(line, "\n"), " ")
			v[key] = value
		}
		t.Run(strings.TrimSuffix(filepath.Base(file), ".txt"), func(t *testing.T) {
			z := &zone{names: map[string]func() []netip.Addr{}}
			host, _, err := net.SplitHostPort(v["dest"])
			if err != nil {
				t.Fatal(err)
			}
			z.names[strings.ToLower(strings.TrimSuffix(host, "."))] = fixed(strings.Fields(v["resolves"])...)
			var dials []string
			d := &dialer{policy: policy(t, v["policy"]), resolver: z.resolver(t), next: func(_ context.Context, _, addr string) (net.Conn, error) {
				dials = append(dials, addr)
				return nil, syscall.ECONNREFUSED
			}}
			_, err = d.dial(t.Context(), "tcp", v["dest"])
			want := strings.Fields(v["dials"])
			slices.Sort(dials)
			slices.Sort(want)
			if !slices.Equal(dials, want) {
				t.Errorf("%s: dialled %q, want %q", v["clause"], dials, want)
			}
			if len(want) == 0 && !errors.Is(err, ptipc.ErrNotAllowed) {
				t.Errorf("%s: %v, want class %v", v["clause"], err, ptipc.ErrNotAllowed)
			}
			if _, resolves := v["resolves"]; resolves != (z.lookups > 0) {
				t.Errorf("%s: %d look-ups", v["clause"], z.lookups)
			}
			if len(want) > 0 || v["resolves"] != "" && len(strings.Fields(v["resolves"])) > 1 {
				return
			}
			// The same, with the system to dial: what may not be dialled sends no packet.
			d.next = nil
			if _, err := d.dial(t.Context(), "tcp", v["dest"]); !errors.Is(err, ptipc.ErrNotAllowed) {
				t.Errorf("%s: by the system: %v, want class %v", v["clause"], err, ptipc.ErrNotAllowed)
			}
		})
	}
}

// table reads one of the lists of vectors.
func table(t testing.TB, name string) (yes, no []string) {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(vectorDir, name))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		word, rest, _ := strings.Cut(strings.TrimSuffix(line, "\n"), " ")
		switch word {
		case "yes":
			yes = append(yes, rest)
		case "no":
			no = append(no, rest)
		}
	}
	if len(yes) == 0 || len(no) == 0 {
		t.Fatalf("%s has no vectors", name)
	}
	return yes, no
}

// EGRESS-2, EGRESS-6.
func TestAddresses(t *testing.T) {
	d := &dialer{policy: new(Policy)}
	yes, no := table(t, "addresses.txt")
	for _, a := range yes {
		if err := d.check("a.example", netip.MustParseAddr(a), 443); err != nil {
			t.Errorf("%s: %v", a, err)
		}
	}
	for _, a := range no {
		err := d.check("a.example", netip.MustParseAddr(a), 443)
		if !errors.Is(err, ptipc.ErrNotAllowed) {
			t.Errorf("%s: %v, want class %v", a, err, ptipc.ErrNotAllowed)
			continue
		}
		// The remedy in the text works, for every kind of address (EGRESS-5).
		_, rule, _ := strings.Cut(err.Error(), `add "`)
		rule, _, _ = strings.Cut(rule, `"`)
		allowed := &dialer{policy: policy(t, fmt.Sprintf(`{"allow":[%q]}`, rule))}
		if err := allowed.check("a.example", netip.MustParseAddr(a), 443); err != nil {
			t.Errorf("%s, with the rule %s: %v", a, rule, err)
		}
	}
}

// EGRESS-3, EGRESS-6.
func TestRules(t *testing.T) {
	yes, no := table(t, "rules.txt")
	for _, text := range yes {
		var r Rule
		if err := r.UnmarshalText([]byte(text)); err != nil {
			t.Errorf("%q: %v", text, err)
		} else if r.String() != strings.ToLower(text) {
			t.Errorf("%q reads as %q", text, r)
		}
	}
	for _, text := range no {
		var r Rule
		if err := r.UnmarshalText([]byte(text)); err == nil {
			t.Errorf("%q reads as %q, want an error", text, r)
		}
	}
}

func TestPolicyIsStrict(t *testing.T) {
	for text, pointer := range map[string]string{
		`{"allow":["*:443","10.0.0.0/33:1"]}`: "/allow/1",
		`{"allow":"*:443"}`:                   "/allow",
		`{"allow":[443]}`:                     "/allow/0",
		`{"allow":null}`:                      "/allow",
		`{"Allow":["*:443"]}`:                 "/Allow",
		`{"deny":["*:25"]}`:                   "/deny",
	} {
		var config *ptipc.ConfigError
		if err := ptipc.Opaque(text).Decode(new(Policy)); !errors.As(err, &config) || config.Pointer != pointer {
			t.Errorf("%s: %v, want an error at %s", text, err, pointer)
		}
	}
}

// An empty list is not the default, whatever way it goes (EGRESS-4).
func TestPolicyToJSONAndBack(t *testing.T) {
	for _, text := range []string{`{}`, `{"allow":[]}`, `{"allow":["*:443","[2001:db8::/32]:1-9"]}`} {
		b, err := json.Marshal(policy(t, text))
		if err != nil || string(b) != text {
			t.Errorf("%s became %s, %v", text, b, err)
		}
	}
}

// The machine's own addresses are none to others, public or not (EGRESS-2).
func TestOwnAddresses(t *testing.T) {
	var own ownList
	if b, err := own.block(netip.MustParseAddr("127.0.0.1")); err != nil || b.public() {
		t.Errorf("127.0.0.1 is not this machine: %v", err)
	}
	public := netip.MustParseAddr("198.41.0.4")
	if b, err := own.block(public); err != nil || !b.public() {
		t.Errorf("%s is this machine: %v", public, err)
	}

	d := &dialer{policy: policy(t, `{"allow":["*:*","198.41.0.0/24:80"]}`)}
	d.own.set([]net.Addr{&net.IPNet{IP: public.AsSlice(), Mask: net.CIDRMask(24, 32)}}, time.Now().Add(time.Hour))
	for _, a := range []string{"198.41.0.4", "::ffff:198.41.0.4", "64:ff9b::c629:4"} {
		if err := d.check("a.example", netip.MustParseAddr(a), 80); !errors.Is(err, ptipc.ErrNotAllowed) {
			t.Errorf("%s: %v, want class %v", a, err, ptipc.ErrNotAllowed)
		}
	}
	if err := d.check("a.example", public.Next(), 80); err != nil {
		t.Errorf("the next address: %v", err)
	}
	d.policy = policy(t, `{"allow":["198.41.0.4:80"]}`)
	if err := d.check("a.example", public, 80); err != nil {
		t.Errorf("with a rule that names it: %v", err)
	}
}

// listen accepts on an address of the loopback, and reports who came.
func listen(t testing.TB, addr string) (port string, accepted <-chan string) {
	t.Helper()
	l, err := net.Listen("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	came := make(chan string, 16)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			came <- c.LocalAddr().String()
			c.Close()
		}
	}()
	t.Cleanup(func() { l.Close(); <-done })
	_, port, _ = net.SplitHostPort(l.Addr().String())
	return port, came
}

// A name that resolves to something else each time it is asked for (EGRESS-1).
func TestRebinding(t *testing.T) {
	port, accepted := listen(t, "127.0.0.1:0")
	_, forbidden := listen(t, "127.0.0.2:"+port)
	for _, way := range []string{"system", "next"} {
		t.Run(way, func(t *testing.T) {
			z := new(zone)
			z.names = map[string]func() []netip.Addr{"a.example": func() []netip.Addr {
				if z.lookups == 1 {
					return fixed("127.0.0.1")()
				}
				return fixed("127.0.0.2")()
			}}
			d := &dialer{policy: policy(t, `{"allow":["127.0.0.1:*"]}`), resolver: z.resolver(t)}
			if way == "next" {
				d.next = (&net.Dialer{Resolver: d.resolver}).DialContext
			}
			conn, err := d.dial(t.Context(), "tcp", "a.example:"+port)
			if err != nil {
				t.Fatal(err)
			}
			conn.Close()
			if got := <-accepted; got != "127.0.0.1:"+port {
				t.Errorf("connected to %s", got)
			}
			if _, err := d.dial(t.Context(), "tcp", "a.example:"+port); !errors.Is(err, ptipc.ErrNotAllowed) {
				t.Errorf("the name leads elsewhere: %v, want class %v", err, ptipc.ErrNotAllowed)
			}
			if z.lookups != 2 {
				t.Errorf("%d look-ups for two dials", z.lookups)
			}
			select {
			case addr := <-forbidden:
				t.Errorf("connected to %s", addr)
			default:
			}
		})
	}
}

// The forbidden address of a name is skipped, and the other one is used.
func TestSystemSkips(t *testing.T) {
	port, accepted := listen(t, "127.0.0.1:0")
	_, forbidden := listen(t, "127.0.0.2:"+port)
	z := &zone{names: map[string]func() []netip.Addr{"a.example": fixed("127.0.0.2", "127.0.0.1", "::1")}}
	d := &dialer{policy: policy(t, `{"allow":["127.0.0.1:*"]}`), resolver: z.resolver(t)}
	conn, err := d.dial(t.Context(), "tcp", "a.example:"+port)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	<-accepted
	if len(forbidden) > 0 {
		t.Error("connected to", <-forbidden)
	}
	if _, ok := conn.(*net.TCPConn); !ok {
		t.Errorf("the connection is a %T, which the kernel does not relay", conn)
	}
}

// Nothing is dialled for a destination that is none.
func TestNotADestination(t *testing.T) {
	for _, next := range []bool{false, true} {
		d := &dialer{policy: policy(t, `{"allow":["*:*","127.0.0.0/8:*"]}`), resolver: (&zone{}).resolver(t)}
		if next {
			d.next = func(_ context.Context, network, addr string) (net.Conn, error) {
				t.Errorf("dialled %s %s", network, addr)
				return nil, errors.ErrUnsupported
			}
		}
		for _, dest := range [][2]string{
			{"unix", "/run/secret.sock"},
			{"unix", "127.0.0.1:80"},
			{"udp", "198.41.0.4:53"},
			{"ip", "198.41.0.4"},
			{"tcp", ""},
			{"tcp", ":80"},
			{"tcp", "a.example"},
			{"tcp", "a.example:0"},
			{"tcp", "a.example:http"},
			{"tcp", "a.example:65536"},
			{"tcp", "a.example:-1"},
		} {
			if _, err := d.dial(t.Context(), dest[0], dest[1]); !errors.Is(err, ptipc.ErrNotAllowed) {
				t.Errorf("%q: %v, want class %v", dest, err, ptipc.ErrNotAllowed)
			}
		}
	}
}

// What is not about the policy keeps its class (ERR-1).
func TestClasses(t *testing.T) {
	port, _ := listen(t, "127.0.0.1:0")
	z := &zone{names: map[string]func() []netip.Addr{"only4.example": fixed("127.0.0.1")}}
	d := &dialer{policy: policy(t, `{"allow":["*:*","127.0.0.0/8:*"]}`), resolver: z.resolver(t)}
	cancelled, cancel := context.WithDeadline(t.Context(), time.Unix(1, 0))
	defer cancel()
	for _, next := range []func(context.Context, string, string) (net.Conn, error){nil, (&net.Dialer{}).DialContext} {
		d.next = next
		if _, err := d.dial(t.Context(), "tcp", "nobody.example:80"); !errors.Is(err, ptipc.ErrHostUnreachable) {
			t.Errorf("a name that does not exist: %v", err)
		}
		if _, err := d.dial(t.Context(), "tcp6", "only4.example:80"); !errors.Is(err, ptipc.ErrHostUnreachable) && !errors.Is(err, ptipc.ErrAddressType) {
			t.Errorf("a name without an address of this family: %v", err)
		}
		if _, err := d.dial(t.Context(), "tcp", "127.0.0.3:"+port); !errors.Is(err, ptipc.ErrRefused) {
			t.Errorf("a port that nobody listens on: %v", err)
		}
		if _, err := d.dial(cancelled, "tcp", "127.0.0.1:"+port); !errors.Is(err, ptipc.ErrTimedOut) {
			t.Errorf("too late: %v", err)
		}
	}
}

// EGRESS-9, with a next that never comes back by itself; each address gets its share.
func TestDialIsBounded(t *testing.T) {
	z := &zone{names: map[string]func() []netip.Addr{"a.example": fixed("198.41.0.4", "198.41.0.5", "198.41.0.6")}}
	synctest.Test(t, func(t *testing.T) {
		var dials []string
		d := &dialer{policy: new(Policy), resolver: z.resolver(t), next: func(ctx context.Context, _, addr string) (net.Conn, error) {
			dials = append(dials, addr)
			<-ctx.Done()
			return nil, ctx.Err()
		}}
		start := time.Now()
		_, err := d.dial(t.Context(), "tcp", "a.example:443")
		if !errors.Is(err, ptipc.ErrTimedOut) {
			t.Errorf("%v, want class %v", err, ptipc.ErrTimedOut)
		}
		if took := time.Since(start); took > 30*time.Second { // of the bubble, not of the world
			t.Errorf("gave up after %v", took)
		}
		if len(dials) != 3 {
			t.Errorf("dialled %q, want all three", dials)
		}
	})
}

// The text is for the operator: who, where to, why, and the rule that would do.
func TestRefusalSaysWhy(t *testing.T) {
	z := &zone{names: map[string]func() []netip.Addr{"a.example": fixed("10.0.0.1")}}
	d := &dialer{policy: new(Policy), resolver: z.resolver(t)}
	_, err := d.dial(t.Context(), "tcp", "a.example:80")
	for _, want := range []string{`"a.example:80"`, "10.0.0.1", "private (RFC 1918)", `"10.0.0.1:80"`} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v does not say %s", err, want)
		}
	}
}
