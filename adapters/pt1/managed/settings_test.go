package managed

import (
	"encoding/json"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"pthost/adapters/pt1/wire"
	"pthost/ptipc"
	"pthost/ptipc/stdio"
)

// vectorDir is explained by the README.md of the directory above it.
const vectorDir = "../../../testdata/pt1/managed"

// readVectors returns the vectors, each as its keys.
func readVectors(t testing.TB) []map[string]string {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(vectorDir, "*.txt"))
	if err != nil || len(files) == 0 {
		t.Fatalf("no vectors in %s: %v", vectorDir, err)
	}
	var vectors []map[string]string
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		for stanza := range strings.SplitSeq(strings.TrimSpace(string(text)), "\n\n") {
			v := map[string]string{}
			for line := range strings.SplitSeq(stanza, "\n") {
				if strings.HasPrefix(line, "#") {
					continue
				}
				key, value, ok := strings.Cut(line, ":")
				if !ok {
					t.Fatalf("%s: strange line %q", file, line)
				}
				v[key] = strings.TrimPrefix(value, " ")
			}
			if len(v) > 0 {
				vectors = append(vectors, v)
			}
		}
	}
	return vectors
}

func TestVectors(t *testing.T) {
	for _, v := range readVectors(t) {
		t.Run(v["name"], func(t *testing.T) {
			got := "error"
			switch v["input"] {
			case "bound", "free":
				settings, err := login(v["bytes"], "\x00")
				if err == nil && v["input"] == "bound" {
					settings, err = withDestination(settings, v["dest"])
				}
				if err == nil {
					got = string(settings)
				} else if len(v["bytes"]) > 4 && strings.Contains(err.Error(), v["bytes"][4:]) {
					t.Errorf("%v repeats a value", err)
				}
			case "client":
				if args, err := bridgeArgs(ptipc.Opaque(v["bytes"])); err == nil {
					line, err := stdio.Append(nil, stdio.SMethod{Name: "x", Addr: "192.0.2.1:1", Args: args})
					if err != nil {
						t.Fatal(err)
					}
					_, got, _ = strings.Cut(strings.TrimSuffix(string(line), "\n"), " ARGS:")
				}
			case "listen":
				var bind netip.AddrPort
				if v["bind"] != "" {
					bind = netip.MustParseAddrPort(v["bind"])
				}
				server, err := withListen(ptipc.Opaque(v["bytes"]), bind)
				if err != nil {
					t.Fatal(err)
				}
				got = string(server)
			default:
				t.Fatalf("the kind %q is not known", v["input"])
			}
			if got != v["want"] {
				t.Errorf("%s: %s, want %s", v["clause"], got, v["want"])
			}
		})
	}
}

// A long argument travels in both fields (PT1-3).
func TestLongArguments(t *testing.T) {
	value := strings.Repeat("v", 400)
	username, password, err := wire.Credentials("k=" + value)
	if err != nil {
		t.Fatal(err)
	}
	settings, err := login(username, password)
	if err != nil || string(settings) != `{"k":"`+value+`"}` {
		t.Errorf("%s, %v", settings, err)
	}
}

// FuzzSettings: what tor sends is refused or becomes one object, with a destination.
func FuzzSettings(f *testing.F) {
	for _, v := range readVectors(f) {
		if v["dest"] != "" {
			f.Add(v["bytes"], "\x00")
		}
	}
	f.Add(strings.Repeat("a", 250)+"=bcde", "f")
	f.Fuzz(func(t *testing.T, username, password string) {
		settings, err := login(username, password)
		if err != nil {
			return
		}
		full, err := withDestination(settings, "192.0.2.1:443")
		if err != nil {
			t.Fatalf("%s: %v", settings, err)
		}
		var members map[string]any
		if err := json.Unmarshal(full, &members); err != nil {
			t.Fatalf("%s: %v", full, err)
		}
		if _, ok := members[keyPort].(float64); !ok || members[keyHost] == nil {
			t.Fatalf("%s has no destination", full)
		}
	})
}

// FuzzBridgeArgs: what a client's configuration becomes is a line that tor can copy.
func FuzzBridgeArgs(f *testing.F) {
	for _, v := range readVectors(f) {
		if v["input"] == "client" {
			f.Add(v["bytes"])
		}
	}
	f.Fuzz(func(t *testing.T, config string) {
		args, err := bridgeArgs(ptipc.Opaque(config))
		if err != nil {
			return
		}
		line, err := stdio.Append(nil, stdio.SMethod{Name: "x", Addr: "192.0.2.1:1", Args: args})
		if err != nil && len(config) < 60000 {
			t.Fatalf("%s: %v", config, err)
		}
		for i, c := range line {
			if c == '\\' || c > '~' || c < ' ' && i < len(line)-1 {
				t.Fatalf("%s becomes %q", config, line)
			}
		}
	})
}

func TestUserAddr(t *testing.T) {
	for _, test := range []struct {
		remote net.Addr
		want   string
	}{
		{&net.TCPAddr{IP: net.IPv4(192, 0, 2, 1), Port: 7}, "192.0.2.1:7"},
		{&net.TCPAddr{IP: net.ParseIP("::ffff:192.0.2.1"), Port: 7}, "192.0.2.1:7"},
		{&net.TCPAddr{IP: net.ParseIP("2001:db8::1"), Port: 7}, "[2001:db8::1]:7"},
		{&net.TCPAddr{IP: net.ParseIP("fe80::1"), Port: 7, Zone: "eth0"}, "[fe80::1]:7"},
		{&net.TCPAddr{IP: net.IPv4(192, 0, 2, 1)}, "192.0.2.1:1"}, // PT1-28: tor takes no port 0
		{&net.TCPAddr{}, ""},
		{&net.UnixAddr{Name: "@x", Net: "unix"}, ""},
	} {
		if got := userAddr(test.remote); got != test.want {
			t.Errorf("%v becomes %q, want %q", test.remote, got, test.want)
		}
	}
}

func TestAnnouncedAddr(t *testing.T) {
	for _, test := range []struct{ listens, bind, want string }{
		{"[::]:443", "0.0.0.0:0", "0.0.0.0:443"},
		{"[::]:443", "[::]:443", "[::]:443"},
		{"192.0.2.1:443", "192.0.2.1:0", "192.0.2.1:443"},
		{"[::]:443", "", "[::]:443"},
	} {
		var bind netip.AddrPort
		if test.bind != "" {
			bind = netip.MustParseAddrPort(test.bind)
		}
		if got := announcedAddr(net.TCPAddrFromAddrPort(netip.MustParseAddrPort(test.listens)), bind); got != test.want {
			t.Errorf("%s for %s is announced as %s", test.listens, test.bind, got)
		}
	}
}

// Lines are ASCII, whatever stands in them (PT1-20).
func TestASCII(t *testing.T) {
	var b strings.Builder
	out := stdio.NewWriter(asciiWriter{&b})
	for _, m := range []stdio.Message{
		stdio.Log{Level: 8, Message: "é\x7f \"x\"\n\xff"},
		stdio.Status{Transport: "t", Attrs: []stdio.KV{{Key: "k", Value: "…"}}},
		stdio.EnvError{Text: "é…\x7f."},
		stdio.Unknown{Keyword: "CMETHOD-ERROR", Rest: "t plain"},
	} {
		if err := out.Send(m); err != nil {
			t.Fatal(err)
		}
	}
	want := `LOG SEVERITY=error MESSAGE="\303\251\177 \"x\"\n\377"` + "\n" +
		`STATUS TRANSPORT=t k="\342\200\246"` + "\n" + "ENV-ERROR ???.\nCMETHOD-ERROR t plain\n"
	if b.String() != want {
		t.Errorf("got\n%swant\n%s", b.String(), want)
	}
}
