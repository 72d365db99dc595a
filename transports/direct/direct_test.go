package direct_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"syscall"
	"testing"

	"go.uber.org/goleak"
	"golang.org/x/net/nettest"

	"pthost/ptipc"
	"pthost/transports/direct"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func open(t *testing.T, env ptipc.Env) *ptipc.Transport {
	t.Helper()
	transport, err := direct.Open(t.Context(), ptipc.Opaque(`{}`), env)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { transport.Close() })
	return transport
}

func listen(t testing.TB) net.Listener {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

// A connection of the transport is a net.Conn like any other.
func TestConn(t *testing.T) {
	transport := open(t, ptipc.Env{})
	l := listen(t)
	nettest.TestConn(t, func() (near, far net.Conn, stop func(), err error) {
		if near, err = transport.Connections["direct"].Dial(t.Context(), nil, l.Addr().String()); err != nil {
			return nil, nil, nil, err
		}
		if far, err = l.Accept(); err != nil {
			near.Close()
			return nil, nil, nil, err
		}
		return near, far, func() { near.Close(); far.Close() }, nil
	})
}

// SOCKS-15: the end of one direction leaves the other open.
func TestHalfClose(t *testing.T) {
	transport := open(t, ptipc.Env{})
	l := listen(t)
	go func() {
		conn, err := l.Accept()
		if err != nil {
			return
		}
		defer conn.Close()
		question, _ := io.ReadAll(conn)
		fmt.Fprintf(conn, "you said %q", question)
	}()
	conn, err := transport.Connections["direct"].Dial(t.Context(), nil, l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if _, err := io.WriteString(conn, "hello"); err != nil {
		t.Fatal(err)
	}
	if err := conn.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	answer, err := io.ReadAll(conn)
	if err != nil || string(answer) != `you said "hello"` {
		t.Errorf("%q, %v", answer, err)
	}
	if stats := conn.Stats(); stats.Sent != 5 || stats.Received != uint64(len(answer)) || stats.Opened.IsZero() { // STAT-1
		t.Error(stats)
	}
	stats, err := transport.Stats(t.Context())
	if err != nil || stats != (ptipc.TransportStats{Active: 1, Opened: 1, Sent: 5, Received: uint64(len(answer))}) { // STAT-2
		t.Error(stats, err)
	}
}

// CFG-2: there are no keys, so every key is an error with its place.
func TestConfig(t *testing.T) {
	for _, config := range []string{"", "{}", " { } "} {
		transport, err := direct.Open(t.Context(), ptipc.Opaque(config), ptipc.Env{})
		if err != nil {
			t.Errorf("%q: %v", config, err)
			continue
		}
		if err := errors.Join(transport.Close(), transport.Wait()); err != nil {
			t.Error(err)
		}
	}
	for config, pointer := range map[string]string{`{"a":1}`: "/a", `[]`: "", `{"a/b":{}}`: "/a~1b", `{`: ""} {
		_, err := direct.Open(t.Context(), ptipc.Opaque(config), ptipc.Env{})
		var wrong *ptipc.ConfigError
		if !errors.As(err, &wrong) || wrong.Pointer != pointer || wrong.Remedy == "" {
			t.Errorf("%s: %v", config, err)
		}
	}
}

// Settings have no keys either, and what is wrong with them has its class (ERR-1).
func TestSettings(t *testing.T) {
	transport := open(t, ptipc.Env{})
	_, err := transport.Connections["direct"].Dial(t.Context(), ptipc.Opaque(`{"server":"x"}`), listen(t).Addr().String())
	var wrong *ptipc.ConfigError
	if !errors.As(err, &wrong) || wrong.Pointer != "/server" || !errors.Is(err, ptipc.ErrSettingsRefused) {
		t.Error(err)
	}
}

// ERR-2: the class of a failure comes from its type.
func TestClasses(t *testing.T) {
	gone := listen(t)
	gone.Close()
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	unreachable := ptipc.Env{DialOut: func(context.Context, string, string) (net.Conn, error) {
		return nil, &net.OpError{Op: "dial", Err: syscall.ENETUNREACH}
	}}
	for _, tt := range []struct {
		name string
		ctx  context.Context
		env  ptipc.Env
		dest string
		want error
	}{
		{"nobody listens", t.Context(), ptipc.Env{}, gone.Addr().String(), ptipc.ErrRefused},
		{"nobody has the name", t.Context(), ptipc.Env{}, "host.invalid:80", ptipc.ErrHostUnreachable},
		{"no way", t.Context(), unreachable, "192.0.2.1:80", ptipc.ErrNetworkUnreachable},
		{"given up", ended, ptipc.Env{}, "192.0.2.1:80", context.Canceled},
		{"not an address", t.Context(), ptipc.Env{}, "192.0.2.1", ptipc.ErrAddressType},
	} {
		t.Run(tt.name, func(t *testing.T) {
			transport := open(t, tt.env)
			_, err := transport.Connections["direct"].Dial(tt.ctx, nil, tt.dest)
			if !errors.Is(err, tt.want) {
				t.Error(err)
			}
			if stats, err := transport.Stats(t.Context()); err != nil || stats.Failed != 1 || stats.Opened != 0 { // STAT-2
				t.Error(stats, err)
			}
		})
	}
}

// SOCKS-13: a name goes to the way out as it came; PROXY-1: and nothing goes past it.
func TestWayOut(t *testing.T) {
	l := listen(t)
	var asked []string
	transport := open(t, ptipc.Env{DialOut: func(ctx context.Context, network, addr string) (net.Conn, error) {
		asked = append(asked, network+" "+addr)
		var d net.Dialer
		return d.DialContext(ctx, "tcp", l.Addr().String())
	}})
	conn, err := transport.Connections["direct"].Dial(t.Context(), nil, "name.invalid:80")
	if err != nil {
		t.Fatal(err)
	}
	conn.Close()
	if len(asked) != 1 || asked[0] != "tcp name.invalid:80" {
		t.Errorf("the way out was asked for %q", asked)
	}
}

// Close cuts what is open, and Wait returns then.
func TestClose(t *testing.T) {
	transport := open(t, ptipc.Env{})
	l := listen(t)
	conn, err := transport.Connections["direct"].Dial(t.Context(), nil, l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(transport.Close(), transport.Wait(), transport.Close()); err != nil {
		t.Error(err)
	}
	if _, err := conn.Read(make([]byte, 1)); !errors.Is(err, net.ErrClosed) {
		t.Error("the connection goes on:", err)
	}
}

// A datagram goes out and its answer comes back, whole up to what UDP carries.
func TestPackets(t *testing.T) {
	conn, err := open(t, ptipc.Env{}).Packets["direct"](t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	peer, err := net.ListenPacket("udp", "[::1]:0")
	if err != nil {
		t.Fatal(err)
	}
	defer peer.Close()
	for _, size := range []int{0, 1, 1500, 9000} {
		if _, err := conn.WriteTo(make([]byte, size), peer.LocalAddr()); err != nil {
			t.Fatal(err)
		}
		buf := make([]byte, 1<<16)
		n, from, err := peer.ReadFrom(buf)
		if err != nil || n != size {
			t.Fatalf("%d bytes of %d: %v", n, size, err)
		}
		if _, err := peer.WriteTo(buf[:n], from); err != nil {
			t.Fatal(err)
		}
		if n, from, err := conn.ReadFrom(buf); err != nil || n != size || from.String() != peer.LocalAddr().String() {
			t.Errorf("%d bytes of %d from %v: %v", n, size, from, err)
		}
	}
}

// PROXY-4: under a proxy for streams there are no datagrams; a way out for both serves both.
func TestPacketsUnderProxy(t *testing.T) {
	proxied := ptipc.Env{DialOut: func(context.Context, string, string) (net.Conn, error) { return nil, syscall.ECONNREFUSED }}
	if packets := open(t, proxied).Packets; len(packets) != 0 {
		t.Errorf("datagrams go around the proxy: %v", packets)
	}
	if conn, err := proxied.ListenPacket(t.Context(), ""); !errors.Is(err, ptipc.ErrNotAllowed) || ptipc.ExitCodeOf(err) != ptipc.ExitUnavailable {
		t.Errorf("%v, %v", conn, err)
	}
	used := false
	proxied.PacketsOut = func(ctx context.Context, local string) (net.PacketConn, error) {
		used = true
		return ptipc.Env{}.ListenPacket(ctx, local)
	}
	conn, err := open(t, proxied).Packets["direct"](t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if !used {
		t.Error("the way out was not used")
	}
}
