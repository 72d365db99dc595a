package localnet

import (
	"errors"
	"net"
	"strings"
	"testing"
)

// LINE-5: loopback addresses and bare names in the state directory, nothing else.
func TestParseAddr(t *testing.T) {
	t.Parallel()
	for s, network := range map[string]string{
		"127.0.0.1:1":                      "tcp",
		"127.255.255.254:65535":            "tcp",
		"[::1]:1080":                       "tcp",
		"unix:socks":                       "unix",
		"unix:...":                         "unix",
		"unix:-":                           "unix",
		"unix:" + strings.Repeat("a", 64):  "unix",
		"unix:A.Z_a-z09":                   "unix",
		"unix:unix":                        "unix",
		"unix:.hidden":                     "unix",
		"unix:127.0.0.1":                   "unix",
		"127.0.0.1:65534":                  "tcp",
		"unix:" + strings.Repeat(".", 1+2): "unix",
	} {
		a, err := ParseAddr(s)
		if err != nil {
			t.Errorf("ParseAddr(%q): %v", s, err)
			continue
		}
		if a.String() != s || a.Network() != network || a.Unix() != (network == "unix") {
			t.Errorf("ParseAddr(%q) = %q of network %q", s, a, a.Network())
		}
		if (a.Name() != "") == a.AddrPort().IsValid() {
			t.Errorf("%q has the name %q and the address %v", s, a.Name(), a.AddrPort())
		}
	}
	for _, s := range []string{
		"", ":", "127.0.0.1", "127.0.0.1:", "127.0.0.1:0", "127.0.0.1:65536", "127.0.0.1:-1", "127.0.0.1:+1",
		"127.0.0.1:080", "127.1:80", "127.0.0.01:80", "0.0.0.0:80", "128.0.0.1:80", "10.0.0.1:80", "192.0.2.1:80",
		":80", "localhost:80", "example.com:80", "[::]:80", "[::1%lo]:80", "[fe80::1%lo]:80", "::1:80", "[::1]",
		"[::ffff:127.0.0.1]:80", "[::127.0.0.1]:80", "[0:0:0:0:0:0:0:1]:80", "127.0.0.1:80 ", " 127.0.0.1:80", "127.0.0.1:http",
		"127.0.0.1:80\n", "tcp:127.0.0.1:80",
		"unix:", "unix:.", "unix:..", "unix:/run/docker.sock", "unix:../x", "unix:a/b", "unix:a\\b", "unix:a\x00", "unix:\x00a",
		"unix:@a", "unix:a b", "unix:a\n", "unix:ä", "unix:\x7f", "unix:" + strings.Repeat("a", 65), "UNIX:a", "unix",
		strings.Repeat("9", 100000),
	} {
		a, err := ParseAddr(s)
		if !errors.Is(err, ErrAddr) {
			t.Errorf("ParseAddr(%.50q) = %q, %v; want ErrAddr", s, a, err)
		}
		if a != (Addr{}) {
			t.Errorf("ParseAddr(%.50q) returned %q beside its error", s, a)
		}
		if err != nil && (len(err.Error()) > 1000 || strings.ContainsAny(err.Error(), "\x00\n")) {
			t.Errorf("ParseAddr(%.50q): the error is %d bytes long or not printable", s, len(err.Error()))
		}
	}
	if a := (Addr{}); a.String() != "" || a.Network() != "" {
		t.Errorf("the zero address is %q of network %q", a, a.Network())
	}
}

func FuzzParseAddr(f *testing.F) {
	f.Fuzz(func(t *testing.T, s string) {
		a, err := ParseAddr(s)
		if err != nil {
			if !errors.Is(err, ErrAddr) {
				t.Fatalf("%q: %v is not ErrAddr", s, err)
			}
			return
		}
		if a.String() != s {
			t.Fatalf("%q comes back as %q", s, a)
		}
		if a.Unix() {
			if n := a.Name(); strings.ContainsAny(n, "/\\\x00@: ") || n == "." || n == ".." || len(n) > 64 {
				t.Fatalf("%q gives the name %q", s, n)
			}
			return
		}
		// The net package is the judge of what would be dialed.
		tcp, err := net.ResolveTCPAddr("tcp", s)
		if err != nil || !tcp.IP.IsLoopback() || tcp.Port == 0 || tcp.Zone != "" {
			t.Fatalf("%q would be dialed as %v, %v", s, tcp, err)
		}
	})
}

// STAT-3: a connection's name is printable, whatever its client bound.
func TestClientName(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		addr net.Addr
		want string
	}{
		{&net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 5}, "127.0.0.1:5"},
		{&net.TCPAddr{IP: net.IPv4(127, 0, 0, 1).To4(), Port: 5}, "127.0.0.1:5"},
		{&net.TCPAddr{IP: net.IPv6loopback, Port: 5}, "[::1]:5"},
		{&net.TCPAddr{IP: net.IPv6loopback, Port: 5, Zone: "a b"}, ""},
		{&net.TCPAddr{}, ""},
		{&net.UnixAddr{Name: "@0a1b2", Net: "unix"}, "@0a1b2"},
		{&net.UnixAddr{Name: "@0a1b0123456789abcdef", Net: "unix"}, "@0a1b0123456789abcdef"},
		{&net.UnixAddr{Name: "@0a1b 123456789abcdef", Net: "unix"}, ""},
		{&net.UnixAddr{Name: "@0a1b", Net: "unix"}, ""},
		{&net.UnixAddr{Name: "@0a1b23", Net: "unix"}, ""},
		{&net.UnixAddr{Name: "@0a1\n2", Net: "unix"}, ""},
		{&net.UnixAddr{Name: "@0A1B2", Net: "unix"}, ""},
		{&net.UnixAddr{Name: "00a1b2", Net: "unix"}, ""},
		{&net.UnixAddr{Name: "@", Net: "unix"}, ""},
		{&net.UnixAddr{}, ""},
		{Addr{name: "@0a1b2"}, ""},
		{nil, ""},
	} {
		if got := ClientName(c.addr); got != c.want {
			t.Errorf("ClientName(%#v) = %q, want %q", c.addr, got, c.want)
		}
	}
}
