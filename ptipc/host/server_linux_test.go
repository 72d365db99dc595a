package host

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"pthost/ptipc"
	author "pthost/ptipc/child"
	"pthost/ptipc/proc"
	"pthost/ptipc/relay"
	"pthost/ptipc/testpeer"
	"pthost/socks"
)

func init() {
	roles["wire"] = func(args []string) int {
		author.MainArgs(args, author.Transport{Server: &ptipc.ServerFactory{Name: "wire", Listen: listenWire, GenerateConfig: generateWire}})
		return 0
	}
	roles["wire-proxy"] = func(args []string) int {
		author.MainArgs(args, author.Transport{Server: &ptipc.ServerFactory{Name: "wire", Proxy: proxyWire}})
		return 0
	}
	roles["forge"] = playForge
}

type wireConfig struct {
	Listen string `json:"listen"`
}

func listenWire(_ context.Context, config ptipc.Opaque, _ ptipc.Env) (ptipc.Listener, error) {
	var c wireConfig
	if err := config.Decode(&c); err != nil {
		return nil, err
	}
	l, err := net.Listen("tcp", c.Listen)
	if err != nil {
		return nil, err
	}
	return new(relay.Meter).Listener(l), nil
}

// proxyWire connects its clients with themselves: it echoes.
func proxyWire(ctx context.Context, config ptipc.Opaque, env ptipc.Env) (ptipc.ServerManager, error) {
	l, err := listenWire(ctx, config, env)
	if err != nil {
		return nil, err
	}
	go echo(l)
	return l, nil
}

func generateWire(_ context.Context, options ptipc.Opaque, _ ptipc.Env) (client, server ptipc.Opaque, err error) {
	var o struct {
		Port     int    `json:"port"`
		Password string `json:"password,omitempty"`
	}
	if err := options.Decode(&o); err != nil {
		return nil, nil, err
	}
	return fmt.Appendf(nil, `{"port":%d}`, o.Port), fmt.Appendf(nil, `{"password":%q}`, o.Password), nil
}

// playForge delivers a connection to somebody else's host: forge DIR.
func playForge(args []string) int {
	err := func() error {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		conn, err := net.Dial("unix", filepath.Join(args[0], "deliver.sock"))
		if err != nil {
			return err
		}
		defer conn.Close()
		return socks.Connect(ctx, conn, ptipc.Opaque(`{"transport":"wire","remote":"192.0.2.1:1"}`), "")
	}()
	fmt.Println(err)
	return 0
}

func listenOn(t *testing.T, c *Command, config string, env ptipc.Env) ptipc.Listener {
	t.Helper()
	l, err := c.Server().Listen(within(t), ptipc.Opaque(config), env)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

// accept is Accept with an end.
func accept(l ptipc.Listener) (net.Conn, error) {
	defer time.AfterFunc(patience, func() { l.Close() }).Stop()
	return l.Accept()
}

// A connection of the wire arrives with its client's own address, carries bytes both
// ways, and its end in one direction leaves the other open (SRV-1, SRV-3).
func TestServerDelivers(t *testing.T) {
	l := listenOn(t, self("wire"), `{"listen":"127.0.0.1:0"}`, ptipc.Env{})
	if l.Addr().(*net.TCPAddr).Port == 0 {
		t.Fatal("the wire's address has no port")
	}
	var all sync.WaitGroup
	for range 20 {
		all.Go(func() {
			client, err := net.Dial("tcp", l.Addr().String())
			if err != nil {
				t.Error(err)
				return
			}
			defer client.Close()
			fmt.Fprint(client, client.LocalAddr())
			_ = client.(*net.TCPConn).CloseWrite()
			if answer, err := io.ReadAll(client); err != nil || string(answer) != "hello "+client.LocalAddr().String() {
				t.Errorf("%q %v", answer, err)
			}
		})
	}
	for range 20 {
		conn, err := accept(l)
		if err != nil {
			t.Fatal(err)
		}
		all.Go(func() {
			defer conn.Close()
			asked, err := io.ReadAll(conn)
			if err != nil || string(asked) != conn.RemoteAddr().String() {
				t.Errorf("%q came from %v: %v", asked, conn.RemoteAddr(), err)
			}
			fmt.Fprintf(conn, "hello %s", asked)
			if err := conn.(ptipc.Conn).CloseWrite(); err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
	if s := l.Stats(); s.Opened != 20 || s.Received == 0 || s.Sent <= s.Received {
		t.Errorf("%+v", s)
	}
	if err := l.Close(); err != nil {
		t.Error(err)
	}
	if _, err := l.Accept(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("after Close: %v", err)
	}
	if err := l.Wait(); err != nil {
		t.Error(err)
	}
}

// A delivery from a process that is not the child's is refused, of our own user and
// of another (SRV-4).
func TestServerRefusesForgeries(t *testing.T) {
	state := stateDir(t)
	l := listenOn(t, self("wire"), `{"listen":"127.0.0.1:0"}`, ptipc.Env{Local: state})
	forge := func(path string, credential *syscall.Credential) string {
		t.Helper()
		cmd := exec.CommandContext(t.Context(), path, "@child", "forge", state)
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: credential}
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		return string(out)
	}
	if out := forge(os.Args[0], nil); !strings.Contains(out, ptipc.ErrNotAllowed.Error()) {
		t.Errorf("our own user's forgery: %s", out)
	}
	if os.Geteuid() != 0 {
		testpeer.Skip(t, "only root can be another user; run the tests as root")
	}
	_, path := published(t)
	if out := forge(path, &syscall.Credential{Uid: nobody, Gid: nobody}); !strings.Contains(out, "permission denied") {
		t.Errorf("another user's forgery: %s", out)
	}
	// The real one still works.
	client, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	conn, err := accept(l)
	if err != nil {
		t.Fatal(err)
	}
	conn.Close()
}

// A client is let through only when the host agrees: a child whose host is gone from
// its socket resets its clients (SRV-3).
func TestServerWithoutItsHost(t *testing.T) {
	state := stateDir(t)
	l := listenOn(t, self("wire"), `{"listen":"127.0.0.1:0"}`, ptipc.Env{Local: state})
	if err := os.Remove(filepath.Join(state, "deliver.sock")); err != nil {
		t.Fatal(err)
	}
	client, err := net.Dial("tcp", l.Addr().String())
	if errors.Is(err, syscall.ECONNRESET) {
		return // even before the dial was done
	}
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	_ = client.SetDeadline(time.Now().Add(patience))
	if n, err := client.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("%d bytes, %v", n, err)
	}
}

// A killed server comes back on its address, and the Listener with it (LIFE-6, LIFE-7).
func TestServerRestarts(t *testing.T) {
	addr := unused(t)
	c := self("wire")
	events := record(c)
	l := listenOn(t, c, fmt.Sprintf(`{"listen":%q}`, addr), ptipc.Env{})
	for range 3 {
		pid := last(events.until(t, Ready)).Pid
		client, err := net.Dial("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		defer client.Close()
		conn, err := accept(l)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		go io.Copy(conn, conn)
		talk(t, client, "word")
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
	}
	events.until(t, Ready)
}

// A server that connects its clients itself needs no delivery, and what it counts is
// asked for (SRV-2, STAT-3).
func TestServerProxies(t *testing.T) {
	manager, err := self("wire-proxy").Server().Proxy(within(t), ptipc.Opaque(`{"listen":"127.0.0.1:0"}`), ptipc.Env{})
	if err != nil {
		t.Fatal(err)
	}
	client, err := net.Dial("tcp", manager.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	talk(t, client, "word")
	eventually(t, "the child's counts", func() bool { return manager.Stats().Opened == 1 && manager.Stats().Received == 4 })
	if err := manager.Close(); err != nil {
		t.Error(err)
	}

	for name, open := range map[string]func() error{
		"Listen of one that proxies": func() error {
			_, err := self("wire-proxy").Server().Listen(within(t), ptipc.Opaque(`{"listen":"127.0.0.1:0"}`), ptipc.Env{})
			return err
		},
		"Proxy of one that delivers": func() error {
			_, err := self("wire").Server().Proxy(within(t), ptipc.Opaque(`{"listen":"127.0.0.1:0"}`), ptipc.Env{})
			return err
		},
		"Listen of a plain child": func() error {
			c := self("wire")
			c.Plain = true
			_, err := c.Server().Listen(within(t), ptipc.Opaque(`{"listen":"127.0.0.1:0"}`), ptipc.Env{})
			return err
		},
		"a client's executable": func() error {
			_, err := self("direct").Server().Listen(within(t), nil, ptipc.Env{})
			return err
		},
	} {
		if err := open(); ptipc.ExitCodeOf(err) != ptipc.ExitUsage {
			t.Errorf("%s: %v", name, err)
		}
	}
	_, err = self("wire").Server().Listen(within(t), ptipc.Opaque(`{"listn":"x"}`), ptipc.Env{})
	var config *ptipc.ConfigError
	if !errors.As(err, &config) || config.Pointer != "/listn" {
		t.Errorf("a wrong configuration: %v", err)
	}
}

// Two configurations that match, and never a port 0 (SRV-6).
func TestServerGenerates(t *testing.T) {
	for _, argv := range []bool{false, true} {
		c := self("wire")
		c.ConfigArgv = argv
		client, server, err := c.Server().GenerateConfig(within(t), ptipc.Opaque(`{"port":7,"password":"p"}`), ptipc.Env{})
		if err != nil || string(client) != `{"port":7}` || string(server) != `{"password":"p"}` {
			t.Errorf("%s %s %v", client, server, err)
		}
	}
	for name, want := range map[string]struct {
		c       *Command
		options string
		code    ptipc.ExitCode
	}{
		"port 0":           {self("wire"), `{"port":0}`, ptipc.ExitSoftware},
		"wrong options":    {self("wire"), `{"prot":1}`, ptipc.ExitConfig},
		"no server":        {self("direct"), `{}`, ptipc.ExitUsage},
		"nothing is said":  {self("exit", "0"), `{}`, ptipc.ExitSoftware},
		"another document": {self("say", "hello", "EXIT"), `{}`, ptipc.ExitTempFail},
	} {
		want.c.StartTimeout = time.Second
		_, _, err := want.c.Server().GenerateConfig(within(t), ptipc.Opaque(want.options), ptipc.Env{})
		if ptipc.ExitCodeOf(err) != want.code {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// The host of a child of another user is let in, and the child into the delivery.
func TestServerOfAnotherUser(t *testing.T) {
	if os.Geteuid() != 0 {
		testpeer.Skip(t, "only root can start a child as another user; run the tests as root")
	}
	_, path := published(t)
	c := self("wire")
	c.Path, c.Credential = path, &proc.Credential{UID: nobody, GID: nobody}
	l := listenOn(t, c, `{"listen":"127.0.0.1:0"}`, ptipc.Env{})
	client, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	conn, err := accept(l)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	go io.Copy(conn, conn)
	talk(t, client, "word")
}
