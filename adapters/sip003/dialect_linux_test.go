package sip003

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"pthost/ptipc"
	"pthost/ptipc/host"
	"pthost/ptipc/localnet"
	"pthost/ptipc/proc"
	"pthost/ptipc/testpeer"
	"pthost/transports/endpoint"
)

func init() {
	helpers["@plugin"] = pluginHelper
	helpers["@launch"] = func(args []string) { os.Exit(proc.Launch(args)) }
}

// pluginHelper is a plugin that misbehaves as its argument says. It listens as a client
// does, and sends back what it is sent.
func pluginHelper(args []string) {
	e, err := ReadEnvironment(os.Getenv)
	if err != nil {
		panic(err)
	}
	addr := net.JoinHostPort(e.LocalHost, strconv.Itoa(int(e.LocalPort)))
	if _, server := e.Options.Cut("server"); server {
		addr = e.Remote()
	}
	switch args[0] {
	case "silent":
		select {}
	case "elsewhere":
		addr = net.JoinHostPort("127.0.0.1", "0")
	case "wildcard":
		addr = ":" + strconv.Itoa(int(e.LocalPort))
	case "exits":
		fmt.Fprintln(os.Stderr, "cannot do that")
		os.Exit(7)
	case "stubborn":
		signal.Ignore(syscall.SIGTERM)
	case "forks", "forks-and-stays":
		cmd := exec.Command(self(), "@plugin", "listens")
		cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
		cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
		if err := cmd.Start(); err != nil {
			panic(err)
		}
		if args[0] == "forks" {
			return
		}
		_ = cmd.Wait()
		return
	case "options":
		fmt.Fprintln(os.Stdout, os.Getenv(pluginOptions))
		fmt.Fprintf(os.Stdout, "%d variables\n", strings.Count(strings.Join(os.Environ(), "\n")+"\n", "\nSS_"))
	}
	l, err := net.Listen("tcp", addr)
	if err != nil {
		panic(err)
	}
	for {
		conn, err := l.Accept()
		if err != nil {
			panic(err)
		}
		go func() {
			_, _ = io.Copy(conn, conn)
			_ = conn.Close()
		}()
	}
}

// marked makes a command whose processes can be found, with a launcher as the tool has.
func marked(t *testing.T, path string, args ...string) (*host.Command, func() []string) {
	t.Helper()
	mark := fmt.Sprintf("PTIPC_TEST_MARK=%d-%d", os.Getpid(), time.Now().UnixNano())
	c := &host.Command{
		Path: path, Args: args, Dialect: Dialect{}, Environ: append(os.Environ(), mark, pluginOptions+"=outer"),
		Launcher: []string{self(), "@launch"}, Restart: host.Restart{Never: true},
	}
	return c, func() []string {
		t.Helper()
		environs, err := filepath.Glob("/proc/[0-9]*/environ")
		if err != nil {
			t.Fatal(err)
		}
		var found []string
		for _, path := range environs {
			if environ, err := os.ReadFile(path); err == nil && bytes.Contains(environ, []byte(mark)) {
				found = append(found, path)
			}
		}
		return found
	}
}

func nothingLeft(t *testing.T, processes func() []string) {
	t.Helper()
	for deadline := time.Now().Add(patience); len(processes()) > 0; {
		if time.Now().After(deadline) {
			t.Fatalf("left behind: %v", processes())
		}
	}
}

// exchange sends what a service sends back, and closes.
func exchange(conn net.Conn, size int) error {
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(patience)); err != nil {
		return err
	}
	sent := make([]byte, size)
	_, _ = rand.Read(sent) // never fails
	wrote := make(chan error, 1)
	go func() {
		_, err := conn.Write(sent)
		wrote <- err
	}()
	got := make([]byte, size)
	if _, err := io.ReadFull(conn, got); err != nil {
		return err
	}
	if !bytes.Equal(got, sent) {
		return errors.New("other bytes came back")
	}
	return <-wrote
}

// accept sends back what comes on each connection of a server, and gives their
// addresses to remotes.
func accept(t *testing.T, l ptipc.Listener, remotes chan<- net.Addr) {
	t.Helper()
	var open sync.WaitGroup
	open.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			remotes <- conn.RemoteAddr()
			open.Go(func() {
				_, _ = io.Copy(conn, conn)
				_ = conn.Close()
			})
		}
	})
	t.Cleanup(open.Wait)
}

// Plugins of Debian under a host, both sides of each: data goes through them, several
// connections at once, and nothing is left (SIP-10 to SIP-13).
func TestRealPlugins(t *testing.T) {
	dir := t.TempDir()
	own, _, err := endpoint.SelfSigned("x.invalid")
	if err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string]string{"cert.pem": own.Certificate, "key.pem": own.Key} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for _, tt := range []struct {
		name, client, server, clientOptions, serverOptions string
	}{
		{"v2ray", "ss-v2ray-plugin", "ss-v2ray-plugin", `{"path":"/a=b","host":"x.invalid","mux":2}`, `{"server":true,"path":"/a=b","host":"x.invalid"}`},
		{
			"v2ray over QUIC", "ss-v2ray-plugin", "ss-v2ray-plugin", `{"mode":"quic","host":"x.invalid","cert":"` + dir + `/cert.pem"}`,
			`{"server":true,"mode":"quic","host":"x.invalid","cert":"` + dir + `/cert.pem","key":"` + dir + `/key.pem"}`,
		},
		{"obfs http", "obfs-local", "obfs-server", `{"obfs":"http","obfs-host":"x.invalid","fast-open":false}`, `{"obfs":"http"}`},
		{"obfs tls", "obfs-local", "obfs-server", `{"obfs":"tls","obfs-host":"x.invalid"}`, `{"obfs":"tls"}`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			for _, program := range []string{tt.client, tt.server} {
				testpeer.Need(t, program)
			}
			wire := fmt.Sprintf("127.0.0.1:%d", unused(t))
			serverCommand, serving := marked(t, tt.server)
			listener, err := serverCommand.Server().Listen(t.Context(), ptipc.Opaque(`{"remote":"`+wire+`","options":`+tt.serverOptions+`}`), ptipc.Env{})
			if err != nil {
				t.Fatal(err)
			}
			remotes := make(chan net.Addr, 100)
			accept(t, listener, remotes)
			if listener.Addr().String() != wire {
				t.Errorf("the wire is said to be %s", listener.Addr())
			}
			clientCommand, dialling := marked(t, tt.client)
			transport, err := clientCommand.Open(t.Context(), ptipc.Opaque(`{"remote":"`+wire+`","options":`+tt.clientOptions+`}`), ptipc.Env{})
			if err != nil {
				t.Fatal(errors.Join(err, listener.Close()))
			}
			factory := transport.Connections[Name]
			if !factory.Bound || len(transport.Connections) != 1 {
				t.Errorf("%+v", transport.Connections)
			}
			var all sync.WaitGroup
			for i := range 5 {
				all.Go(func() {
					conn, err := factory.Dial(t.Context(), nil, "")
					if err != nil {
						t.Error(err)
						return
					}
					if err := exchange(conn, 1<<10+i*2<<20); err != nil {
						t.Error(err)
					}
				})
			}
			all.Wait()
			// SIP-11: waiting for readiness opened no connection.
			if len(remotes) != 5 {
				t.Errorf("%d connections came, 5 were opened", len(remotes))
			}
			if remote := <-remotes; remote.String() != "unknown" {
				t.Errorf("the client is said to be %s", remote)
			} else if _, isTCP := remote.(*net.TCPAddr); isTCP { // a service would be told it
				t.Errorf("%T", remote)
			}
			if err := errors.Join(transport.Close(), listener.Close()); err != nil {
				t.Error(err)
			}
			nothingLeft(t, serving)
			nothingLeft(t, dialling)
		})
	}
}

// Plugins that do what they must not (SIP-11, SIP-12, LIFE-1, LIFE-5).
func TestPluginsThatMisbehave(t *testing.T) {
	config := ptipc.Opaque(`{"remote":"192.0.2.1:443"}`)
	for _, tt := range []struct {
		role, want string // "" if it is used
		is         error
	}{
		{"silent", "not ready after 1s", context.DeadlineExceeded},
		{"elsewhere", "not ready after 1s", context.DeadlineExceeded},
		{"wildcard", "listens on all addresses", localnet.ErrWildcard},
		{"exits", "cannot do that", ptipc.ExitCode(7)},
		{"forks", " ended", nil}, // with what it left behind; that may have listened before
		{"forks-and-stays", "", nil},
		{"stubborn", "", nil},
	} {
		t.Run(tt.role, func(t *testing.T) {
			t.Parallel()
			command, processes := marked(t, self(), "@plugin", tt.role)
			if errors.Is(tt.is, context.DeadlineExceeded) {
				command.StartTimeout = time.Second
			}
			transport, err := command.Open(t.Context(), config, ptipc.Env{})
			if tt.want != "" {
				if err == nil && tt.role == "forks" {
					err = transport.Wait()
				} else if err == nil {
					_ = transport.Close()
				}
				if err == nil || !strings.Contains(err.Error(), tt.want) || tt.is != nil && !errors.Is(err, tt.is) {
					t.Errorf("%v", err)
				}
				nothingLeft(t, processes)
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			conn, err := transport.Connections[Name].Dial(t.Context(), nil, "")
			if err != nil {
				t.Fatal(err)
			}
			if err := exchange(conn, 100); err != nil {
				t.Error(err)
			}
			if err := transport.Close(); err != nil {
				t.Error(err)
			}
			nothingLeft(t, processes)
		})
	}
}

// A plugin comes back on another port when it has died, and the transport lives on.
func TestPluginRestarts(t *testing.T) {
	command, processes := marked(t, self(), "@plugin", "listens")
	command.Restart = host.Restart{Min: time.Millisecond, Max: 10 * time.Millisecond}
	pids := make(chan int, 100)
	command.Events = func(e host.Event) {
		if e.Kind == host.Ready {
			pids <- e.Pid
		}
	}
	transport, err := command.Open(t.Context(), ptipc.Opaque(`{"remote":"192.0.2.1:443"}`), ptipc.Env{})
	if err != nil {
		t.Fatal(err)
	}
	for range 3 {
		pid := <-pids
		conn, err := transport.Connections[Name].Dial(t.Context(), nil, "")
		if err != nil {
			t.Fatal(err)
		}
		if err := exchange(conn, 100); err != nil {
			t.Error(err)
		}
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
			t.Error(err)
		}
	}
	<-pids
	if err := transport.Close(); err != nil {
		t.Error(err)
	}
	nothingLeft(t, processes)
}

// SIP-10: the plugin gets its options, and nothing of what the host was told by the same
// names; what it writes goes into the log.
func TestPluginOptions(t *testing.T) {
	for options, want := range map[string]string{
		`{"z":"a;b=c\\","tls":true,"no":false,"mux":4}`: `mux=4;tls;z=a\\;b\\=c\\\\`,
		`{}`: "message=\"\"",
	} {
		var log bytes.Buffer
		command, _ := marked(t, self(), "@plugin", "options")
		transport, err := command.Open(t.Context(), ptipc.Opaque(`{"remote":"name.invalid:443","options":`+options+`}`),
			ptipc.Env{Log: slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
				if a.Key == slog.MessageKey {
					a.Key = "message"
				}
				return a
			}}))})
		if err != nil {
			t.Fatal(err)
		}
		if err := transport.Close(); err != nil { // and what was written has been read
			t.Error(err)
		}
		variables := 4 + strings.Count(options, "mux")
		if got := log.String(); !strings.Contains(got, want) || !strings.Contains(got, fmt.Sprintf("%d variables", variables)) || strings.Contains(got, "outer") {
			t.Errorf("%s: the plugin wrote\n%s", options, got)
		}
	}
}

// SIP-14, SIP-10: what a plugin cannot do is refused, and what is wrong is named.
func TestRefusedPlugins(t *testing.T) {
	command, _ := marked(t, self(), "@plugin", "listens")
	transport, err := command.Open(t.Context(), ptipc.Opaque(`{"remote":"[2001:db8::1]:443"}`), ptipc.Env{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := transport.Connections[Name].Dial(t.Context(), ptipc.Opaque(`{"a":1}`), ""); !errors.Is(err, ptipc.ErrSettingsRefused) {
		t.Errorf("settings: %v", err)
	}
	if conn, err := transport.Connections[Name].Dial(t.Context(), ptipc.Opaque(`{}`), ""); err != nil {
		t.Errorf("empty settings: %v", err)
	} else {
		_ = conn.Close()
	}
	if _, err := transport.Connections[Name].Dial(t.Context(), nil, "example.com:80"); !errors.Is(err, ptipc.ErrNotAllowed) {
		t.Errorf("a destination: %v", err)
	}
	if err := transport.Close(); err != nil {
		t.Error(err)
	}

	free := *command
	free.Bound = map[string]bool{Name: false}
	if transport, err = free.Open(t.Context(), ptipc.Opaque(`{"remote":"192.0.2.1:443"}`), ptipc.Env{}); err != nil {
		t.Fatal(err)
	}
	if _, err := transport.Connections[Name].Dial(t.Context(), nil, "example.com:80"); !errors.Is(err, ptipc.ErrNotAllowed) {
		t.Errorf("a destination of a plugin that is said to be free: %v", err)
	}
	if err := transport.Close(); err != nil {
		t.Error(err)
	}

	proxied := *command
	proxied.Proxy = "socks5://127.0.0.1:1"
	_, err = proxied.Open(t.Context(), ptipc.Opaque(`{"remote":"192.0.2.1:443"}`), ptipc.Env{})
	if ptipc.ExitCodeOf(err) != ptipc.ExitUsage {
		t.Errorf("a proxy: %v", err)
	}
	_, err = command.Open(t.Context(), ptipc.Opaque(`{"remote":"192.0.2.1:443"}`), ptipc.Env{DialOut: (&net.Dialer{}).DialContext})
	if ptipc.ExitCodeOf(err) != ptipc.ExitUsage {
		t.Errorf("a way out: %v", err)
	}
	for config, pointer := range map[string]string{
		`{}`:                                        "/remote",
		`{"remote":"x"}`:                            "/remote",
		`{"remote":":443"}`:                         "/remote",
		`{"remote":"x:0"}`:                          "/remote",
		`{"remote":"a|b:1"}`:                        "/remote",
		`{"remote":"a b:1"}`:                        "/remote",
		`{"remote":"x:1","option":{}}`:              "/option",
		`{"remote":"x:1","options":{"a":null}}`:     "/options/a",
		`{"remote":"x:1","options":{"a":[1]}}`:      "/options/a",
		`{"remote":"x:1","options":{"":"1"}}`:       "/options",
		`{"remote":"x:1","options":{"a":"\u0000"}}`: "/options",
	} {
		_, err := command.Open(t.Context(), ptipc.Opaque(config), ptipc.Env{})
		var bad *ptipc.ConfigError
		if !errors.As(err, &bad) || bad.Pointer != pointer {
			t.Errorf("%s: %v", config, err)
		}
	}
	_, err = command.Server().Listen(t.Context(), ptipc.Opaque(`{"remote":"localhost:1"}`), ptipc.Env{})
	var bad *ptipc.ConfigError
	if !errors.As(err, &bad) || bad.Pointer != "/remote" {
		t.Errorf("a server at a name: %v", err)
	}
	if _, err := command.Server().Proxy(t.Context(), ptipc.Opaque(`{"remote":"127.0.0.1:1"}`), ptipc.Env{}); ptipc.ExitCodeOf(err) != ptipc.ExitUsage {
		t.Errorf("a server that connects its clients itself: %v", err)
	}
}

// FuzzPluginConfig: whatever is taken can be handed over, and is read the same by a plugin.
func FuzzPluginConfig(f *testing.F) {
	f.Add(`{"remote":"192.0.2.1:443","options":{"a":"b;c=\\","tls":true,"no":false,"mux":4.5e3}}`, true)
	f.Add(`{"remote":"[2001:db8::1]:443"}`, false)
	f.Add(`{"remote":"name.invalid:1","options":{"":"x"}}`, false)
	f.Fuzz(func(t *testing.T, document string, server bool) {
		l := host.Launch{Role: host.RoleClient, Config: ptipc.Opaque(document)}
		if server {
			l.Role, l.Deliver = host.RoleServer, []string{"127.0.0.1:1"}
		}
		c, err := read(l)
		if err != nil {
			return
		}
		environ, err := Environment{c.Remote.host, c.Remote.port, "127.0.0.1", 1, c.options()}.Environ()
		if err != nil {
			t.Fatalf("%s: %v", document, err)
		}
		e, err := ReadEnvironment(func(name string) string {
			for _, variable := range environ {
				if value, ok := strings.CutPrefix(variable, name+"="); ok {
					return value
				}
			}
			return ""
		})
		if err != nil || e.RemotePort != c.Remote.port || len(e.Options) != len(c.options()) {
			t.Errorf("%s was handed over as %q and read as %+v, %v", document, environ, e, err)
		}
		for i, option := range c.options() {
			if e.Options[i] != option {
				t.Errorf("%+v was read as %+v", option, e.Options[i])
			}
		}
	})
}

// SIP-11: a socket of another process is not the plugin's.
func TestAnotherProcessListens(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	addr, tcp := l.Addr().(*net.TCPAddr).AddrPort(), []string{"tcp"}
	if err := awaitListener(t.Context(), tcp, addr, func() ([]int, error) { return []int{1 << 30}, nil }); !errors.Is(err, localnet.ErrForeignListener) {
		t.Errorf("%v", err)
	}
	if err := awaitListener(t.Context(), tcp, addr, func() ([]int, error) { return []int{os.Getpid()}, nil }); err != nil {
		t.Error(err)
	}
	// Where nothing tells, a connection does.
	if err := awaitListener(t.Context(), tcp, addr, func() ([]int, error) { return nil, errors.ErrUnsupported }); err != nil {
		t.Error(err)
	}
	if conn, err := l.Accept(); err != nil {
		t.Error(err)
	} else {
		_ = conn.Close()
	}
	_ = l.Close()
	if err := reach(t.Context(), addr); !errors.Is(err, localnet.ErrNoListener) {
		t.Error(err)
	}
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	if err := awaitListener(ended, tcp, addr, nil); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}

// SIP-13: other users do not get in where a plugin's server brings its connections.
func TestDeliveriesOfOthers(t *testing.T) {
	if os.Getuid() != 0 {
		testpeer.Skip(t, "needs two users: run as root")
	}
	curl := testpeer.Need(t, "curl")
	var log bytes.Buffer
	command, processes := marked(t, self(), "@plugin", "options-of-server")
	wire := fmt.Sprintf("127.0.0.1:%d", unused(t))
	ports := make(chan string, 1)
	command.Dialect = deliveredTo{Dialect{}, ports}
	listener, err := command.Server().Listen(t.Context(), ptipc.Opaque(`{"remote":"`+wire+`","options":{"server":true}}`), ptipc.Env{Log: slog.New(slog.NewTextHandler(&log, nil))})
	if err != nil {
		t.Fatal(err)
	}
	remotes := make(chan net.Addr, 10)
	accept(t, listener, remotes)
	other := exec.CommandContext(t.Context(), curl, "-sS", "-m", "30", "http://"+<-ports+"/")
	other.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	if out, err := other.CombinedOutput(); err == nil {
		t.Errorf("another user delivers, and got %q", out)
	}
	if err := listener.Close(); err != nil {
		t.Error(err)
	}
	if len(remotes) != 0 || !strings.Contains(log.String(), "uid 65534") {
		t.Errorf("%d connections were delivered by another user\n%s", len(remotes), &log)
	}
	nothingLeft(t, processes)
}

// deliveredTo tells where a server's child brings connections.
type deliveredTo struct {
	host.Dialect
	ports chan<- string
}

func (d deliveredTo) Start(l host.Launch) (*host.Session, error) {
	d.ports <- l.Deliver[0]
	return d.Dialect.Start(l)
}
