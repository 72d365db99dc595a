package bound

import (
	"context"
	"errors"
	"net"
	"testing"

	"go.uber.org/goleak"

	"pthost/adapters/free"
	"pthost/ptipc"
	"pthost/transports/direct"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// recorded gives transports a way out that notes where they go.
func recorded(dests *[]string) ptipc.Env {
	return ptipc.Env{DialOut: func(_ context.Context, _, addr string) (net.Conn, error) {
		*dests = append(*dests, addr)
		near, far := net.Pipe()
		far.Close()
		return near, nil
	}}
}

func TestDestinationIsFixed(t *testing.T) {
	var dests []string
	transport, err := Client(direct.Open, "a.example:443")(t.Context(), nil, recorded(&dests))
	if err != nil {
		t.Fatal(err)
	}
	defer transport.Close()
	factory, ok := transport.Connections["direct"]
	if !ok || !factory.Bound || len(transport.Connections) != 1 {
		t.Fatalf("the factories are %v", transport.Connections)
	}
	conn, err := factory.Dial(t.Context(), nil, "")
	if err != nil {
		t.Fatal(err)
	}
	conn.Close()
	if _, err := factory.Dial(t.Context(), nil, "b.example:443"); !errors.Is(err, ptipc.ErrNotAllowed) { // SOCKS-11
		t.Errorf("with a destination: %v, want class %v", err, ptipc.ErrNotAllowed)
	}
	if _, err := factory.Dial(t.Context(), ptipc.Opaque(`{"k":1}`), ""); !errors.Is(err, ptipc.ErrSettingsRefused) {
		t.Errorf("with settings that direct does not take: %v", err)
	}
	if len(dests) != 1 || dests[0] != "a.example:443" {
		t.Errorf("went to %q", dests)
	}
	stats, err := transport.Stats(t.Context())
	if want := (ptipc.TransportStats{Opened: 1, Failed: 1}); err != nil || stats != want {
		t.Errorf("%+v, %v, want %+v", stats, err, want)
	}
}

func TestNoDestination(t *testing.T) {
	for _, dest := range []string{"", "a.example", ":443", "a.example:0", "a.example:https", "a.example:65536", "::1:443"} {
		_, err := Client(direct.Open, dest)(t.Context(), nil, ptipc.Env{})
		if !errors.Is(err, ptipc.ExitConfig) {
			t.Errorf("%q: %v, want exit code %v", dest, err, ptipc.ExitConfig)
		}
	}
}

func TestErrorsOfTheTransport(t *testing.T) {
	_, err := Client(direct.Open, "a.example:443")(t.Context(), ptipc.Opaque(`{"k":1}`), ptipc.Env{})
	if !errors.As(err, new(*ptipc.ConfigError)) {
		t.Errorf("%v, want the transport's own error", err)
	}
}

// Bound over bound makes no sense; free over bound does, and dials the carrier.
func TestCompositions(t *testing.T) {
	once := Client(direct.Open, "a.example:443")
	var inner *ptipc.Transport
	keep := func(ctx context.Context, config ptipc.Opaque, env ptipc.Env) (t *ptipc.Transport, err error) {
		inner, err = once(ctx, config, env)
		return inner, err
	}
	if _, err := Client(keep, "b.example:443")(t.Context(), nil, ptipc.Env{}); !errors.Is(err, ptipc.ExitConfig) {
		t.Errorf("bound over bound: %v", err)
	}
	if err := inner.Wait(); err != nil { // it has been closed
		t.Error(err)
	}

	var dests []string
	transport, err := free.Client(once)(t.Context(), nil, recorded(&dests))
	if err != nil {
		t.Fatal(err)
	}
	defer transport.Close()
	if _, err := transport.Connections["direct"].Dial(t.Context(), nil, "c.example:80"); err == nil {
		t.Error("a far end that hangs up has answered")
	}
	if len(dests) != 1 || dests[0] != "a.example:443" {
		t.Errorf("went to %q", dests)
	}
}
