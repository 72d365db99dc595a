package websocket

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"maps"
	"net"
	"os"
	"testing"

	"go.uber.org/goleak"

	"pthost/ptipc"
	"pthost/transports/endpoint"
)

func TestMain(m *testing.M) {
	// After a bad request, net/http holds the closed connection for half a second,
	// which is longer than goleak waits.
	goleak.VerifyTestMain(m, goleak.IgnoreAnyFunction("net/http.(*conn).closeWriteAndWait"))
}

// A pair is a server and a client of it.
type pair struct {
	listener  ptipc.Listener
	transport *ptipc.Transport
	client    map[string]any // the configurations
	server    map[string]any
}

// generated makes configurations on a free port of loopback. scheme is ws or wss.
func generated(t testing.TB, scheme string) *pair {
	t.Helper()
	client, server, err := Server.GenerateConfig(t.Context(), ptipc.Opaque(`{"listen":"127.0.0.1:0"}`), ptipc.Env{})
	if err != nil {
		t.Fatal(err)
	}
	p := &pair{client: object(t, client), server: object(t, server)}
	if scheme == "ws" {
		p.client["url"] = "ws" + p.client["url"].(string)[len("wss"):]
		delete(p.client, "pin")
		delete(p.server, "certificate")
		delete(p.server, "key")
	}
	return p
}

func object(t testing.TB, o ptipc.Opaque) map[string]any {
	t.Helper()
	m := map[string]any{}
	if err := json.Unmarshal(o, &m); err != nil {
		t.Fatal(err)
	}
	return m
}

func opaque(t testing.TB, m map[string]any) ptipc.Opaque {
	t.Helper()
	b, err := json.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func (p *pair) listen(t testing.TB) {
	t.Helper()
	l, err := Server.Listen(t.Context(), opaque(t, p.server), ptipc.Env{})
	if err != nil {
		t.Fatal(err)
	}
	p.listener = l
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
		if err := l.Wait(); err != nil {
			t.Error(err)
		}
	})
}

func (p *pair) open(t testing.TB, env ptipc.Env) {
	t.Helper()
	transport, err := Open(t.Context(), opaque(t, p.client), env)
	if err != nil {
		t.Fatal(err)
	}
	p.transport = transport
	t.Cleanup(func() {
		if err := transport.Close(); err != nil {
			t.Error(err)
		}
	})
}

// newPair starts a server with more keys in its configuration, and a client.
func newPair(t testing.TB, scheme string, more ...map[string]any) *pair {
	t.Helper()
	p := generated(t, scheme)
	for _, keys := range more {
		maps.Copy(p.server, keys)
	}
	p.listen(t)
	p.open(t, ptipc.Env{})
	return p
}

func (p *pair) dial(ctx context.Context) (ptipc.Conn, error) {
	return p.transport.Connections["websocket"].Dial(ctx, nil, "")
}

// connect makes a connection and returns both ends.
func (p *pair) connect(t testing.TB) (client, server ptipc.Conn) {
	t.Helper()
	client, err := p.dial(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return client, p.accept(t)
}

func (p *pair) accept(t testing.TB) ptipc.Conn {
	t.Helper()
	c, err := p.listener.Accept()
	if err != nil {
		t.Fatal(err)
	}
	return c.(ptipc.Conn)
}

// dialRaw connects to the server without a WebSocket.
func (p *pair) dialRaw(t testing.TB) net.Conn {
	t.Helper()
	c, err := net.Dial("tcp", p.listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// descriptors counts the open ones, where the system lists them.
func descriptors(t testing.TB) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Skip("this system does not list descriptors")
	}
	return len(entries)
}

// serverTLS is how the server of p shows itself, clientTLS how its client knows it.
func serverTLS(t testing.TB, p *pair) *tls.Config {
	t.Helper()
	config, err := endpoint.Server{Certificate: p.server["certificate"].(string), Key: p.server["key"].(string)}.TLS()
	if err != nil {
		t.Fatal(err)
	}
	return config
}

func clientTLS(t testing.TB, p *pair) *tls.Config {
	t.Helper()
	pin, _ := p.client["pin"].(string) // none with ws
	config, err := endpoint.Client{Pin: pin}.TLS("127.0.0.1")
	if err != nil {
		t.Fatal(err)
	}
	return config
}
