package sip003

import (
	"bufio"
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"reflect"
	"strings"
	"syscall"
	"testing"
	"time"

	"pthost/ptipc"
	"pthost/ptipc/localnet"
	"pthost/ptipc/relay"
)

func variables(pairs ...string) func(string) string {
	return func(name string) string {
		for i := 0; i < len(pairs); i += 2 {
			if pairs[i] == name {
				return pairs[i+1]
			}
		}
		return ""
	}
}

// SIP-1
func TestEnvironment(t *testing.T) {
	whole := []string{remoteHost, "2001:db8::1", remotePort, "8388", localHost, "127.0.0.1", localPort, "1984", pluginOptions, `server;a=b\;c`}
	e, err := ReadEnvironment(variables(whole...))
	want := Environment{"2001:db8::1", 8388, "127.0.0.1", 1984, Options{{Key: "server", Bare: true}, {Key: "a", Value: "b;c"}}}
	if err != nil || !reflect.DeepEqual(e, want) {
		t.Fatalf("%+v, %v", e, err)
	}
	if e.Remote() != "[2001:db8::1]:8388" || !Present(variables(whole...)) {
		t.Error(e.Remote())
	}
	for i := 0; i < 8; i += 2 {
		for _, value := range []string{"", "0", "65536", "+1", "http"} {
			some := append([]string{}, whole...)
			some[i+1] = value
			_, err := ReadEnvironment(variables(some...))
			if bad := value == "" || strings.HasSuffix(some[i], "PORT"); bad != errors.Is(err, ptipc.ExitUsage) || bad && !strings.Contains(err.Error(), some[i]) {
				t.Errorf("%s=%q: %v", some[i], value, err)
			}
			if Present(variables(some...)) != (value != "") {
				t.Errorf("%s=%q: present?", some[i], value)
			}
		}
	}
	if _, err := ReadEnvironment(variables(append(whole[:8], pluginOptions, `\`)...)); !errors.Is(err, ptipc.ExitUsage) {
		t.Errorf("bad options: %v", err)
	}
	got, err := e.Environ()
	if want := []string{"SS_REMOTE_HOST=2001:db8::1", "SS_REMOTE_PORT=8388", "SS_LOCAL_HOST=127.0.0.1", "SS_LOCAL_PORT=1984", `SS_PLUGIN_OPTIONS=server;a=b\;c`}; err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("%q, %v", got, err)
	}
	e.Options = nil
	if got, err := e.Environ(); err != nil || len(got) != 4 {
		t.Errorf("without options: %q, %v", got, err)
	}
	e.Options = Options{{Key: ""}}
	if got, err := e.Environ(); err == nil {
		t.Errorf("options that cannot be written became %q", got)
	}
}

// SIP-5, SIP-7: which addresses are meant, and which are refused.
func TestAddresses(t *testing.T) {
	for host, want := range map[string]string{
		"127.0.0.1": "127.0.0.1:7", "::1": "[::1]:7", "localhost": "127.0.0.1:7", "::ffff:127.0.0.1": "127.0.0.1:7", "127.9.8.7": "127.9.8.7:7",
		"0.0.0.0": "", "192.0.2.1": "", "::": "", "name.invalid": "", "::1%lo": "",
	} {
		addr, err := Environment{LocalHost: host, LocalPort: 7}.Local()
		if want == "" && !errors.Is(err, ptipc.ExitUsage) || want != "" && addr.String() != want {
			t.Errorf("local %s: %v, %v", host, addr, err)
		}
	}
	for host, want := range map[string][]string{
		"0.0.0.0":             {"0.0.0.0:7"},
		"::0":                 {"[::]:7"},
		"::0|0.0.0.0":         {"[::]:7"},
		"0.0.0.0|::":          {"[::]:7"},
		"127.0.0.1|::1":       {"127.0.0.1:7", "[::1]:7"},
		"127.0.0.1|127.0.0.1": {"127.0.0.1:7"},
		"[::1]":               {"[::1]:7"},
		"127.0.0.1|":          nil,
		"name.invalid":        nil,
		"":                    nil,
	} {
		wires, err := Environment{RemoteHost: host, RemotePort: 7}.Wires()
		var got []string
		for _, wire := range wires {
			got = append(got, wire.String())
		}
		if !reflect.DeepEqual(got, want) || want == nil && !errors.Is(err, ptipc.ExitUsage) {
			t.Errorf("wires %s: %q, %v", host, got, err)
		}
	}
}

// SIP-4, SIP-7: the configuration that options, a file and Shadowsocks make together.
func TestConfig(t *testing.T) {
	wire := netip.MustParseAddrPort("192.0.2.1:443")
	for _, tt := range []struct {
		name, document string
		options        Options
		wire           netip.AddrPort
		want           string // or the pointer of the error
	}{
		{"nothing", ``, nil, netip.AddrPort{}, `{}`},
		{"options", ``, Options{{Key: "url", Value: "wss://x/\""}, {Key: "flag", Bare: true}}, netip.AddrPort{}, `{"flag":true,"url":"wss://x/\""}`},
		{"both", `{"n":5}`, Options{{Key: "a", Value: "5"}}, netip.AddrPort{}, `{"a":"5","n":5}`},
		{"twice", `{"a":5}`, Options{{Key: "a", Value: "5"}}, netip.AddrPort{}, `/a`},
		{"twice, with a slash", `{"a/~":5}`, Options{{Key: "a/~", Value: "5"}}, netip.AddrPort{}, `/a~1~0`},
		{"no object", `[]`, nil, netip.AddrPort{}, ``},
		{"wire", `{}`, nil, wire, `{"listen":"192.0.2.1:443"}`},
		{"the same wire", `{"listen":"192.0.2.1:443"}`, nil, wire, `{"listen":"192.0.2.1:443"}`},
		{"another address", `{"listen":"192.0.2.2:443"}`, nil, wire, `/listen`},
		{"another port", `{"listen":"192.0.2.1:444"}`, nil, wire, `/listen`},
		{"every address", `{"listen":":443"}`, nil, wire, `/listen`},
		{"every address, spelled otherwise", `{"listen":":443"}`, nil, netip.MustParseAddrPort("0.0.0.0:443"), `{"listen":"0.0.0.0:443"}`},
		{"an option, another wire", ``, Options{{Key: "listen", Value: ":80"}}, wire, `/listen`},
		{"no address", `{"listen":443}`, nil, wire, `/listen`},
	} {
		got, err := Config(ptipc.Opaque(tt.document), tt.options, tt.wire)
		var bad *ptipc.ConfigError
		if errors.As(err, &bad) && bad.Pointer != tt.want || err == nil && string(got) != tt.want {
			t.Errorf("%s: %s, %v", tt.name, got, err)
		}
	}
}

// carrier is a transport of TCP connections to where the settings say, bound, or free.
func carrier(bound bool, asked chan<- string) ptipc.ConnectionFactory {
	return new(relay.Meter).Factory(bound, func(ctx context.Context, settings ptipc.Opaque, dest string) (net.Conn, error) {
		asked <- string(settings) + " " + dest
		var s struct {
			Host string `json:"host,omitempty"`
			Port uint16 `json:"port,omitempty"`
		}
		if err := settings.Decode(&s); err != nil {
			return nil, err
		}
		if bound {
			dest = netip.AddrPortFrom(netip.MustParseAddr(s.Host), s.Port).String()
		}
		return ptipc.Env{}.Dial(ctx, "tcp", dest)
	})
}

// start runs a side of a plugin until the test ends, and waits until it listens.
func start(t *testing.T, addr string, run func(ctx context.Context) error) (end func() error) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- run(ctx) }()
	end = func() error {
		cancel()
		err := <-ended
		ended <- err
		return err
	}
	t.Cleanup(func() {
		if err := end(); err != nil {
			t.Error(err)
		}
	})
	for deadline := time.Now().Add(patience); ; {
		err := localnet.ListenerAt("tcp", netip.MustParseAddrPort(addr), []int{os.Getpid()})
		if err == nil {
			return end
		}
		if !errors.Is(err, localnet.ErrNoListener) || time.Now().After(deadline) {
			t.Fatal(err)
		}
		select {
		case err := <-ended:
			ended <- err
			t.Fatalf("it has ended: %v", err)
		case <-time.After(time.Millisecond):
		}
	}
}

// Both sides: what Shadowsocks sends arrives at the other Shadowsocks, and the answer,
// with the ends of both streams (SIP-6, SIP-7).
func TestBothSides(t *testing.T) {
	service := answering(t)
	wires := []string{"127.0.0.1", "::1"}
	port := unused(t)
	var meter relay.Meter
	server := Environment{RemoteHost: strings.Join(wires, "|"), RemotePort: port, LocalHost: "127.0.0.1", LocalPort: uint16(service.Port)}
	endServer := start(t, server.wire(t, 1), func(ctx context.Context) error {
		return Server(ctx, server, func(_ context.Context, wire netip.AddrPort) (ptipc.Listener, error) {
			l, err := net.Listen("tcp", wire.String())
			if err != nil {
				return nil, err
			}
			return meter.Listener(l), nil
		}, quiet)
	})
	for i, wire := range wires {
		for _, bound := range []bool{true, false} {
			asked := make(chan string, 1)
			client := Environment{RemoteHost: wire, RemotePort: port, LocalHost: "127.0.0.1", LocalPort: unused(t)}
			local, err := client.Local()
			if err != nil {
				t.Fatal(err)
			}
			start(t, local.String(), func(ctx context.Context) error { return Client(ctx, client, carrier(bound, asked), quiet) })
			conn, err := net.Dial("tcp", local.String())
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			if got, err := ask(conn, "word"); err != nil || got != "heard word" {
				t.Errorf("%s: %q, %v", wire, got, err)
			}
			want := " " + server.wire(t, i)
			if bound {
				want = `{"host":"` + wire + `","port":` + want[strings.LastIndex(want, ":")+1:] + "} "
			}
			if got := <-asked; got != want {
				t.Errorf("the transport was asked for %q, want %q", got, want)
			}
		}
	}
	if meter.Stats().Opened != 4 {
		t.Errorf("%+v", meter.Stats())
	}
	// SIP-8: the end cuts what is open.
	open, err := net.Dial("tcp", server.wire(t, 0))
	if err != nil {
		t.Fatal(err)
	}
	defer open.Close()
	_ = open.SetDeadline(time.Now().Add(patience))
	if err := endServer(); err != nil {
		t.Error(err)
	}
	if _, err := open.Read(make([]byte, 1)); err == nil {
		t.Error("a connection is open after the end")
	}
}

func (e Environment) wire(t *testing.T, i int) string {
	t.Helper()
	wires, err := e.Wires()
	if err != nil {
		t.Fatal(err)
	}
	return wires[i].String()
}

// A connection that cannot be opened is reset, and the next one is tried (SIP-6).
func TestClientCannotConnect(t *testing.T) {
	asked := make(chan string, 2)
	e := Environment{RemoteHost: "127.0.0.1", RemotePort: unused(t), LocalHost: "localhost", LocalPort: unused(t)}
	local, _ := e.Local()
	start(t, local.String(), func(ctx context.Context) error { return Client(ctx, e, carrier(true, asked), quiet) })
	for range 2 {
		conn, err := net.Dial("tcp", local.String())
		if err == nil {
			defer conn.Close()
			_ = conn.SetDeadline(time.Now().Add(patience))
			_, err = conn.Read(make([]byte, 1))
		}
		if !errors.Is(err, syscall.ECONNRESET) { // it may come before the dial has returned
			t.Errorf("%v", err)
		}
		<-asked
	}
}

// What cannot work is refused before anything listens (SIP-5, SIP-6, SIP-7).
func TestRefused(t *testing.T) {
	busy := answering(t)
	factory := carrier(true, nil)
	for name, e := range map[string]Environment{
		"an outside address": {"192.0.2.1", 1, "0.0.0.0", 1, nil},
		"two servers":        {"192.0.2.1|192.0.2.2", 1, "127.0.0.1", 1, nil},
		"a busy port":        {"192.0.2.1", 1, "127.0.0.1", uint16(busy.Port), nil},
	} {
		if err := Client(t.Context(), e, factory, quiet); err == nil || ptipc.ExitCodeOf(err) == ptipc.ExitSoftware {
			t.Errorf("client, %s: %v", name, err)
		}
	}
	broken := errors.New("broken")
	for name, e := range map[string]Environment{
		"an outside address": {"127.0.0.1", 1, "192.0.2.1", 1, nil},
		"a name":             {"name.invalid", 1, "127.0.0.1", 1, nil},
		"the second wire":    {"127.0.0.1|127.0.0.2", unused(t), "127.0.0.1", 1, nil},
	} {
		var meter relay.Meter
		opened := 0
		err := Server(t.Context(), e, func(_ context.Context, wire netip.AddrPort) (ptipc.Listener, error) {
			if opened++; opened == 2 {
				return nil, broken
			}
			l, err := net.Listen("tcp", wire.String())
			if err != nil {
				return nil, err
			}
			return meter.Listener(l), nil
		}, quiet)
		if err == nil || opened > 0 && !errors.Is(err, broken) {
			t.Errorf("server, %s: %v", name, err)
		}
	}
}

// SIP-8: the end of the process that started a plugin is the plugin's, even if it was
// killed and had no time to tell.
func TestParentDies(t *testing.T) {
	cmd := exec.Command(self(), "@parent")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewReader(out)
	if line, err := lines.ReadString('\n'); err != nil || line != "watching\n" {
		t.Errorf("%q, %v", line, err)
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Error(err)
	}
	// The watcher holds the pipe for as long as it lives.
	ended := make(chan error, 1)
	go func() {
		_, err := io.Copy(io.Discard, lines)
		ended <- err
	}()
	select {
	case err := <-ended:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(patience):
		t.Error("the watcher has survived its parent")
	}
	_ = cmd.Wait() // it was killed
}

// A parent that is gone before it can be watched is seen as well.
func TestParentIsGone(t *testing.T) {
	cmd := exec.Command(self(), "@watcher")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	pid := cmd.Process.Pid
	_ = cmd.Process.Kill()
	_ = cmd.Wait()
	for _, parent := range []int{pid, 1} { // one that is not there, and one that is not ours
		for name, watch := range map[string]func(context.Context, int) <-chan struct{}{"pidfd": parentGone, "poll": pollParent} {
			select {
			case <-watch(t.Context(), parent):
			case <-time.After(patience):
				t.Errorf("%s: process %d counts as the parent", name, parent)
			}
		}
	}
	ctx, stop := WithParent(t.Context(), quiet)
	polled := pollParent(ctx, os.Getppid())
	if ctx.Err() != nil {
		t.Error("the parent is there, and counts as gone")
	}
	stop()
	<-ctx.Done()
	<-polled
}
