package host

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"

	"pthost/ptipc"
)

// onlyWay is a way out to an echo that can be reached by it alone.
type onlyWay struct {
	echo string
	mu   sync.Mutex
	seen []string
}

func (w *onlyWay) dial(ctx context.Context, network, addr string) (net.Conn, error) {
	w.mu.Lock()
	w.seen = append(w.seen, network+" "+addr)
	w.mu.Unlock()
	if !strings.HasSuffix(addr, ":7") {
		return nil, fmt.Errorf("canary: %w", ptipc.ErrNetworkUnreachable)
	}
	var d net.Dialer
	return d.DialContext(ctx, "tcp", w.echo)
}

// PROXY-1: the wire of a child goes through the application's DialOut, names as
// names (SOCKS-13), and through nothing else.
func TestDialOut(t *testing.T) {
	way := &onlyWay{echo: server(t)}
	transport := open(t, self("fixture"), `{"server":"server.invalid:7"}`, ptipc.Env{DialOut: way.dial})
	talk(t, dial(t, transport.Connections["free"], "", "canary.invalid:7"), "name")
	talk(t, dial(t, transport.Connections["free"], "", "192.0.2.1:7"), "address")
	talk(t, dial(t, transport.Connections["free"], "", "[2001:db8::1]:7"), "address")
	talk(t, dial(t, transport.Connections["bound"], "", ""), "bound")
	_, err := transport.Connections["free"].Dial(within(t), nil, way.echo) // it is there, but not that way
	onlyClass(t, err, ptipc.ErrNetworkUnreachable)                         // ERR-2, over two hops
	want := []string{"tcp canary.invalid:7", "tcp 192.0.2.1:7", "tcp [2001:db8::1]:7", "tcp server.invalid:7", "tcp " + way.echo}
	if !slices.Equal(way.seen, want) {
		t.Errorf("the way out saw %q", way.seen)
	}
}

// A transport that was given a way out has it after a restart too.
func TestDialOutAfterRestart(t *testing.T) {
	way := &onlyWay{echo: server(t)}
	c := self("fixture")
	events := record(c)
	transport := open(t, c, `{}`, ptipc.Env{DialOut: way.dial})
	kill(t, last(events.until(t, Ready)).Pid)
	events.until(t, Ready)
	talk(t, dial(t, transport.Connections["free"], "", "canary.invalid:7"), "again")
}

// A chain: the way out of one child is another.
func TestChain(t *testing.T) {
	way := &onlyWay{echo: server(t)}
	far := open(t, self("direct"), `{}`, ptipc.Env{DialOut: way.dial})
	near := open(t, self("direct"), `{}`, ptipc.Env{DialOut: func(ctx context.Context, _, addr string) (net.Conn, error) {
		return far.Connections["direct"].Dial(ctx, nil, addr)
	}})
	talk(t, dial(t, near.Connections["direct"], "", "canary.invalid:7"), "through two")
}

// upstream is an ordinary SOCKS5 proxy with one user, before an echo.
func upstream(t *testing.T, user, password string) (addr string, names func() []string) {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { listener.Close() })
	var mu sync.Mutex
	var seen []string
	serve := func(conn net.Conn) error {
		defer conn.Close()
		read := func(n byte) []byte {
			b := make([]byte, n)
			if _, err := io.ReadFull(conn, b); err != nil {
				panic(err)
			}
			return b
		}
		if greeting := read(2); !slices.Contains(read(greeting[1]), 2) {
			_, err := conn.Write([]byte{5, 0xff})
			return err
		}
		if _, err := conn.Write([]byte{5, 2}); err != nil {
			return err
		}
		gotUser := string(read(read(2)[1]))
		if string(read(read(1)[0])) != password || gotUser != user {
			_, err := conn.Write([]byte{1, 1})
			return err
		}
		if _, err := conn.Write([]byte{1, 0}); err != nil {
			return err
		}
		request := read(5)
		name := string(read(request[4]))
		read(2)
		mu.Lock()
		seen = append(seen, name)
		mu.Unlock()
		if name == "refused.invalid" {
			_, err := conn.Write([]byte{5, 5, 0, 1, 0, 0, 0, 0, 0, 0})
			return err
		}
		if _, err := conn.Write([]byte{5, 0, 0, 1, 0, 0, 0, 0, 0, 0}); err != nil {
			return err
		}
		_, err := io.Copy(conn, conn)
		return err
	}
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			go func() {
				if err := serve(conn); err != nil && !errors.Is(err, net.ErrClosed) {
					t.Log("upstream:", err)
				}
			}()
		}
	}()
	return listener.Addr().String(), func() []string { mu.Lock(); defer mu.Unlock(); return slices.Clone(seen) }
}

// PROXY-1, PROXY-3: the child goes through the proxy that it is given, with user
// and password, which nobody else gets to see.
func TestProxy(t *testing.T) {
	addr, names := upstream(t, "user", "hunt=er,2")
	log := new(capture)
	c := self("direct")
	c.Proxy = "socks5://user:hunt%3Der,2@" + addr
	events := record(c)
	transport := open(t, c, `{}`, ptipc.Env{Log: log.logger()})
	factory := transport.Connections["direct"]
	talk(t, dial(t, factory, "", "name.invalid:80"), "proxied")
	_, err := factory.Dial(within(t), nil, "refused.invalid:80")
	onlyClass(t, err, ptipc.ErrRefused)
	if got := names(); !slices.Equal(got, []string{"name.invalid", "refused.invalid"}) {
		t.Errorf("the proxy saw %q", got)
	}
	cmdline, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", last(events.until(t, Ready)).Pid))
	if err != nil {
		t.Fatal(err)
	}
	if told := string(cmdline) + log.String(); strings.Contains(told, "hunt") || strings.Contains(told, c.Proxy) {
		t.Errorf("the proxy is told:\n%s", told)
	}

	c = self("direct")
	c.Proxy = "socks5://user:hunter2@" + addr
	_, err = open(t, c, `{}`, ptipc.Env{Log: log.logger()}).Connections["direct"].Dial(within(t), nil, "name.invalid:80")
	onlyClass(t, err, ptipc.ErrNotAllowed)
	if strings.Contains(fmt.Sprint(err, log), "hunter2") {
		t.Errorf("the password is told: %v\n%s", err, log)
	}
}

// PROXY-2: no PROXY DONE, no traffic.
func TestNoProxyDone(t *testing.T) {
	ready := []string{"VERSION 1", "CMETHOD x socks5 {tcp}", "CMETHODS DONE"}
	c := self("say", ready...)
	c.Proxy = "socks5://127.0.0.1:1"
	wants(t, refused(t, c, `{}`, ptipc.Env{}), "PROXY-2")
	wants(t, refused(t, self("say", ready...), `{}`, ptipc.Env{DialOut: (&net.Dialer{}).DialContext}), "PROXY-2")

	c = self("say", append(ready, "PROXY DONE")...) // too late
	c.Proxy = "socks5://127.0.0.1:1"
	wants(t, refused(t, c, `{}`, ptipc.Env{}), "PROXY-2")

	c = self("say", append([]string{"PROXY DONE"}, ready...)...)
	c.Proxy = "socks5://127.0.0.1:1"
	open(t, c, `{}`, ptipc.Env{})

	c = self("say", "VERSION 1", "PROXY-ERROR not that one")
	c.Proxy = "socks5://127.0.0.1:1"
	err := refused(t, c, `{}`, ptipc.Env{})
	wants(t, err, "upstream proxy: not that one")
	if !errors.Is(err, ptipc.ExitUnavailable) {
		t.Error(err)
	}
	// A child of ours says the same of a URL that it cannot use, and does not repeat it.
	c = self("direct")
	c.Proxy = "socks5://user:hunter2@nowhere"
	err = refused(t, c, `{}`, ptipc.Env{})
	wants(t, err, "socks5://[USER:PASSWORD@]HOST:PORT")
	if strings.Contains(err.Error(), "hunter2") || !errors.Is(err, ptipc.ExitUnavailable) {
		t.Error(err)
	}
}

// SOCKS-17: the way out is for the child's user alone; LIFE-5: it ends with the child.
func TestWayOutEnds(t *testing.T) {
	dir := stateDir(t)
	transport := open(t, self("report"), `{}`, ptipc.Env{})
	transport.Close()
	c := self("report", "x")
	_, err := c.Open(within(t), nil, ptipc.Env{Local: dir, DialOut: (&net.Dialer{}).DialContext})
	wants(t, err, "PROXY-2") // but it was told where the way out is
	text, err := os.ReadFile(dir + "/got")
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(text), "socks5://")
	addr, _, _ := strings.Cut(rest, `\"`)
	if conn, err := net.Dial("tcp", addr); err == nil {
		conn.Close()
		t.Error("somebody still listens on", addr)
	} else if ptipc.ClassOf(err) != ptipc.ErrRefused {
		t.Error(addr, err)
	}
}
