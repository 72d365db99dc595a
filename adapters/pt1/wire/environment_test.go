package wire_test

import (
	"fmt"
	"net/netip"
	"os"
	"testing"

	"pthost/adapters/pt1/wire"
	"pthost/ptipc/stdio"
)

func Example() {
	// A host starts a transport with this environment …
	environ, err := (&wire.Environment{State: "/var/lib/pt", ExitOnStdinClose: true, Clients: []string{"obfs4"}}).Environ()
	if err != nil {
		fmt.Println(err)
	}
	for _, variable := range environ {
		fmt.Println(variable)
	}
	// … and the transport reads it.
	e, err := wire.ParseEnvironment(lookup(environ))
	fmt.Println(e.Clients, err)

	// The arguments of one connection:
	text, err := wire.Args{{"cert", "a;b="}, {"iat-mode", "0"}}.Encode()
	fmt.Println(text, err)
	// Output:
	// TOR_PT_MANAGED_TRANSPORT_VER=1
	// TOR_PT_STATE_LOCATION=/var/lib/pt
	// TOR_PT_EXIT_ON_STDIN_CLOSE=1
	// TOR_PT_CLIENT_TRANSPORTS=obfs4
	// [obfs4] <nil>
	// cert=a\;b=;iat-mode=0 <nil>
}

// What no reader could take is not written (PT1-1, PT1-2, PT1-9).
func TestWritingRefuses(t *testing.T) {
	client := wire.Environment{State: "/s", Clients: []string{"x"}}
	for name, change := range map[string]func(*wire.Environment){
		"nobody":              func(e *wire.Environment) { e.Clients = nil },
		"both":                func(e *wire.Environment) { e.Servers = []wire.Server{{Name: "x"}} },
		"LF":                  func(e *wire.Environment) { e.State = "/s\nTOR_PT_PROXY=x" },
		"a comma in a name":   func(e *wire.Environment) { e.Clients = []string{"x,y"} },
		"a hyphen in a name":  func(e *wire.Environment) { e.Clients = []string{"x-y"} },
		"an option, no key":   func(e *wire.Environment) { *e = server(wire.Server{Name: "x", Options: wire.Args{{"", "v"}}}) },
		"a name of no server": func(e *wire.Environment) { *e = server(wire.Server{}) },
	} {
		t.Run(name, func(t *testing.T) {
			e := client
			change(&e)
			if environ, err := e.Environ(); err == nil {
				t.Errorf("written: %q", environ)
			}
		})
	}
	if _, err := (wire.Args{{"", "v"}}).Encode(); err == nil {
		t.Error("an argument without a key was written")
	}
	if _, err := wire.BridgeArgs(wire.Args{{"", "v"}}); err == nil {
		t.Error("a bridge's argument without a key was written")
	}
}

func server(s wire.Server) wire.Environment {
	return wire.Environment{State: "/s", Port: "127.0.0.1:1", Servers: []wire.Server{s}}
}

// The line for an environment that cannot be used does not repeat what may be a secret.
func TestEnvironmentErrorHidesTheProxy(t *testing.T) {
	_, err := wire.ParseEnvironment(lookup([]string{
		"TOR_PT_MANAGED_TRANSPORT_VER=1", "TOR_PT_STATE_LOCATION=/s", "TOR_PT_CLIENT_TRANSPORTS=x", "TOR_PT_PROXY=://u:hunter2@h",
	}))
	if err == nil || fmt.Sprint(err) != "TOR_PT_PROXY: is not scheme://[user:password@]host:port (PT1-1)" {
		t.Errorf("got %v", err)
	}
	if _, err := wire.ParseEnvironment(os.LookupEnv); err == nil {
		t.Error("this test was not started by tor")
	}
}

// tor wrote addresses of IPv6 without brackets once.
func TestBindWithoutBrackets(t *testing.T) {
	e, err := wire.ParseEnvironment(lookup([]string{
		"TOR_PT_MANAGED_TRANSPORT_VER=1", "TOR_PT_STATE_LOCATION=/s", "TOR_PT_CLIENT_TRANSPORTS=x",
		"TOR_PT_OUTBOUND_BIND_ADDRESS_V6=2001:db8::1",
	}))
	if err != nil || e.BindV6 != netip.MustParseAddr("2001:db8::1") {
		t.Errorf("got %+v, error %v", e, err)
	}
}

func FuzzParseArgs(f *testing.F) {
	for _, v := range loadVectors(f) {
		if v.input == "args" || v.input == "credentials" || v.input == "bridge" {
			f.Add(string(v.bytes))
		}
	}
	f.Fuzz(func(t *testing.T, s string) {
		args, err := wire.ParseArgs(s)
		if err != nil {
			return
		}
		text, err := args.Encode()
		if err != nil {
			t.Fatalf("what was read cannot be written: %v", err)
		}
		if len(text) > len(s) {
			t.Errorf("written longer than needed: %q from %q", text, s)
		}
		again, err := wire.ParseArgs(text)
		if err != nil || fmt.Sprint(pairs(again)) != fmt.Sprint(pairs(args)) {
			t.Errorf("%q became %q: %q, error %v", s, text, again, err)
		}
		if username, password, err := wire.Credentials(text); err == nil {
			if username == "" || password == "" || len(username) > 255 || len(password) > 255 || wire.JoinCredentials(username, password) != text {
				t.Errorf("username %q and password %q for %q", username, password, text)
			}
		}
		if bridge, err := wire.BridgeArgs(args); err == nil && len(bridge) > 0 {
			line, err := stdio.Append(nil, stdio.SMethod{Name: "x", Addr: "192.0.2.1:1", Args: bridge})
			if err != nil {
				return // too long for a line
			}
			m, err := stdio.Parse(line)
			if err != nil || len(m.(stdio.SMethod).Args) != len(bridge) {
				t.Errorf("ARGS are read as %v, error %v", m, err)
			}
		}
	})
}

func FuzzParseEnvironment(f *testing.F) {
	for _, v := range loadVectors(f) {
		if v.input == "environment" {
			f.Add(string(v.bytes))
		}
	}
	f.Fuzz(func(t *testing.T, s string) {
		e, err := wire.ParseEnvironment(lookup(split(s)))
		if err != nil {
			return
		}
		environ, err := e.Environ()
		if err != nil {
			return // stricter than reading
		}
		again, err := wire.ParseEnvironment(lookup(environ))
		if err != nil {
			t.Fatalf("%q cannot be read again: %v", environ, err)
		}
		if got, err := again.Environ(); err != nil || fmt.Sprint(got) != fmt.Sprint(environ) {
			t.Errorf("%q became %q, error %v", environ, got, err)
		}
	})
}
