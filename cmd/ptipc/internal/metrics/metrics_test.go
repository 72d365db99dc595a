package metrics

import (
	"context"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus/testutil"
	"go.uber.org/goleak"

	"pthost/cmd/ptipc/internal/control"
	"pthost/ptipc"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var discard = slog.New(slog.DiscardHandler)

func status(context.Context) control.Status {
	refused := uint64(4)
	return control.Status{
		Transports: []control.Transport{
			{
				Name: "a", Role: "client", State: control.Ready, Restarts: 2, Signals: "queue", Pending: 3,
				Stats: &ptipc.TransportStats{Active: 1, Opened: 5, Failed: 6, Received: 7, Sent: 8},
			},
			{Name: "b", Role: "server", State: control.Ended, Signals: "dir"},
		},
		Fronts: []control.Front{
			{Address: "127.0.0.1:1", Serve: "socks5", Transport: "a", Refused: &refused},
			{Address: "/\xff/x", Serve: "forward", Transport: "a"},
		},
	}
}

const want = `# HELP ptipc_front_info A front, where ordinary programs connect.
# TYPE ptipc_front_info gauge
ptipc_front_info{address="/�/x",serve="forward",transport="a"} 1
ptipc_front_info{address="127.0.0.1:1",serve="socks5",transport="a"} 1
# HELP ptipc_front_refused_total Connections of other users that the front has refused.
# TYPE ptipc_front_refused_total counter
ptipc_front_refused_total{address="127.0.0.1:1",serve="socks5",transport="a"} 4
# HELP ptipc_transport_bytes_total Application data, received from the wire or sent to it.
# TYPE ptipc_transport_bytes_total counter
ptipc_transport_bytes_total{direction="received",role="client",transport="a"} 7
ptipc_transport_bytes_total{direction="sent",role="client",transport="a"} 8
# HELP ptipc_transport_connections_active Connections open now.
# TYPE ptipc_transport_connections_active gauge
ptipc_transport_connections_active{role="client",transport="a"} 1
# HELP ptipc_transport_connections_failed_total Connections that could not be opened.
# TYPE ptipc_transport_connections_failed_total counter
ptipc_transport_connections_failed_total{role="client",transport="a"} 6
# HELP ptipc_transport_connections_opened_total Connections ever opened, the open ones included.
# TYPE ptipc_transport_connections_opened_total counter
ptipc_transport_connections_opened_total{role="client",transport="a"} 5
# HELP ptipc_transport_restarts_total Children of the transport after the first.
# TYPE ptipc_transport_restarts_total counter
ptipc_transport_restarts_total{role="client",transport="a"} 2
ptipc_transport_restarts_total{role="server",transport="b"} 0
# HELP ptipc_transport_signals_pending Outgoing messages kept for people to carry.
# TYPE ptipc_transport_signals_pending gauge
ptipc_transport_signals_pending{role="client",transport="a"} 3
# HELP ptipc_transport_up Whether the child of the transport serves.
# TYPE ptipc_transport_up gauge
ptipc_transport_up{role="client",transport="a"} 1
ptipc_transport_up{role="server",transport="b"} 0
`

func TestCollector(t *testing.T) {
	c := newCollector(status)
	if err := testutil.CollectAndCompare(c, strings.NewReader(want)); err != nil {
		t.Error(err)
	}
	problems, err := testutil.CollectAndLint(c)
	if err != nil || len(problems) > 0 {
		t.Errorf("against Prometheus's conventions: %v %v", problems, err)
	}
}

// Nothing but /metrics is there, and nothing but asking can be done.
func TestHandler(t *testing.T) {
	h := Handler(status, discard)
	for request, code := range map[string]int{
		"GET /metrics": 200, "GET /": 404, "GET /debug/pprof/": 404, "GET /v1/status": 404, "POST /v1/stop": 404, "POST /metrics": 405,
	} {
		method, path, _ := strings.Cut(request, " ")
		w := httptest.NewRecorder()
		h.ServeHTTP(w, httptest.NewRequest(method, path, nil))
		if w.Code != code {
			t.Errorf("%s: %d, want %d", request, w.Code, code)
		}
	}
}

func TestListen(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "private")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	for _, url := range []string{"tcp://127.0.0.1:0", "unix://" + filepath.Join(dir, "m.sock")} {
		t.Run(url[:4], func(t *testing.T) {
			l, err := Listen(url, discard)
			if err != nil {
				t.Fatal(err)
			}
			s := control.Serve(l, Handler(status, discard), discard)
			defer s.Close()
			client := http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
				if path, ok := strings.CutPrefix(url, "unix://"); ok {
					return new(net.Dialer).DialContext(ctx, "unix", path)
				}
				return new(net.Dialer).DialContext(ctx, "tcp", l.Addr().String())
			}}}
			response, err := client.Get("http://host/metrics")
			if err != nil {
				t.Fatal(err)
			}
			defer response.Body.Close()
			text, err := io.ReadAll(response.Body)
			if err != nil {
				t.Fatal(err)
			}
			for _, line := range []string{`ptipc_transport_up{role="client",transport="a"} 1`, "process_open_fds", "go_goroutines"} {
				if !strings.Contains(string(text), line) {
					t.Errorf("there is no %s in\n%s", line, text)
				}
			}
		})
	}
	if _, err := Listen("tcp://192.0.2.1:9100", discard); err == nil || !strings.Contains(err.Error(), "tcp://192.0.2.1:9100") {
		t.Errorf("an address of nobody here: %v", err)
	}
}
