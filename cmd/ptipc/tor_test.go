package main

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"pthost/adapters/pt1"
	"pthost/ptipc"
	"pthost/ptipc/front"
	"pthost/ptipc/host"
	"pthost/ptipc/testpeer"
)

// torSite has a page, and bulk data.
func torSite() (site http.Handler, sum string) {
	data := []byte(strings.Repeat("0123456789abcdef", 1<<18)) // 4 MiB
	mux := http.NewServeMux()
	mux.HandleFunc("/", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "a page") })
	mux.HandleFunc("/bulk", func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(data) })
	return mux, fmt.Sprintf("%x", sha256.Sum256(data))
}

// self is the command line with which tor starts this tool as a managed proxy.
func self(t testing.TB, args ...string) string {
	t.Helper()
	return strings.Join(append([]string{toolCommand(t.Context(), t).Path, "pt1"}, args...), " ")
}

// tor carries a page and bulk data through a bridge, whose transport is obfs4 (the
// control), ours on both ends, or obfs4 with one end under our host; and the bridge
// line is the one that tor has written. The bridge sees the address from which the client's transport comes
// (PT1-24, PT1-27, PT1-28).
func TestTor(t *testing.T) {
	obfs4 := testpeer.Need(t, "obfs4proxy")
	site, sum := torSite()
	n := newTornet(t, site)
	const from = "127.0.0.77"
	for _, test := range []struct {
		name, transport string
		server, client  string
		options         string // of the server
		from            string // where the bridge sees the client
	}{
		{"obfs4", "obfs4", obfs4, obfs4, "", "127.0.0.1"},
		{"websocket", "websocket", self(t), self(t), "backend=http://" + n.site, from},
		{"executable", "websocket", self(t, "--exec", "websocket=builtin:websocket"), self(t, "--exec", "websocket=builtin:websocket"), "", from},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			debug := filepath.Join(t.TempDir(), "debug.log")
			lines := "Log [net]debug file " + debug + "\n"
			if test.options != "" {
				lines += "ServerTransportOptions " + test.transport + " " + test.options + "\n"
			}
			bridge, _ := n.bridge(t, test.name+"bridge", test.transport, torSide{test.server, lines})
			line := n.bridgeLine(t, bridge, test.transport)
			bridge.await(t, "Bootstrapped 75%")
			client, socks := n.client(t, test.name+"client", line, test.transport, torSide{test.client, "OutboundBindAddressPT " + from + "\n"})
			client.await(t, "Bootstrapped 100%")
			n.fetch(t, socks, sum)
			log, err := os.Open(debug)
			if err != nil {
				t.Fatal(err)
			}
			defer log.Close()
			text, err := io.ReadAll(log)
			if err != nil {
				t.Fatal(err)
			}
			if !strings.Contains(string(text), "to '"+test.from+":") {
				t.Errorf("the bridge does not see a client at %s", test.from)
			}
			if test.options == "" {
				return
			}
			// Strangers see the web site that stands in torrc (PT1-26).
			page, err := exec.CommandContext(t.Context(), n.curl, "-sS", "-k", "--noproxy", "*", "https://"+strings.Fields(line)[1]+"/").CombinedOutput()
			if err != nil || string(page) != "a page" {
				t.Errorf("a stranger gets %q, %v", page, err)
			}
		})
	}
	t.Run("our host has the client", func(t *testing.T) {
		t.Parallel()
		bridge, _ := n.bridge(t, "hostclientbridge", "obfs4", torSide{plugin: obfs4})
		words := strings.Fields(n.bridgeLine(t, bridge, "obfs4")) // obfs4 IP:PORT FINGERPRINT KEY=VALUE…
		server := netip.MustParseAddrPort(words[1])
		settings := map[string]any{"host": server.Addr().String(), "port": server.Port()}
		for _, arg := range words[3:] {
			key, value, _ := strings.Cut(arg, "=")
			settings[key] = value
		}
		transport, err := (&host.Command{Path: obfs4, Dialect: pt1.Dialect{}}).Open(t.Context(),
			object(t, map[string]any{"transports": map[string]any{"obfs4": settings}}), ptipc.Env{})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := transport.Close(); err != nil {
				t.Error(err)
			}
		})
		listener, err := front.Listen("tcp://127.0.0.1:0", slog.New(slog.DiscardHandler))
		if err != nil {
			t.Fatal(err)
		}
		serveFront(t, listener, front.Forward(transport.Connections["obfs4"], nil, "", slog.New(slog.DiscardHandler)))
		bridge.await(t, "Bootstrapped 75%")
		client, socks := n.client(t, "hostclientclient", listener.Addr().String()+" "+words[2], "", torSide{})
		client.await(t, "Bootstrapped 100%")
		n.fetch(t, socks, sum)
	})
	t.Run("our host has the server", func(t *testing.T) {
		t.Parallel()
		command, env := &host.Command{Path: obfs4, Dialect: pt1.Dialect{}}, ptipc.Env{Local: filepath.Join(t.TempDir(), "state")}
		clientConfig, serverConfig, err := command.Server().GenerateConfig(t.Context(), ptipc.Opaque(`{"transport":"obfs4","listen":"127.0.0.1:0"}`), env)
		if err != nil {
			t.Fatal(err)
		}
		listener, err := command.Server().Listen(t.Context(), serverConfig, env)
		if err != nil {
			t.Fatal(err)
		}
		bridge, orPort := n.bridge(t, "hostserverbridge", "", torSide{})
		deliver, err := front.Deliver(fmt.Sprintf("tcp://127.0.0.1:%d", orPort), false, slog.New(slog.DiscardHandler))
		if err != nil {
			t.Fatal(err)
		}
		serveFront(t, listener, deliver)
		var generated struct {
			Transports map[string]map[string]any `json:"transports"`
		}
		if err := json.Unmarshal(clientConfig, &generated); err != nil {
			t.Fatal(err)
		}
		settings := generated.Transports["obfs4"]
		line := fmt.Sprintf("obfs4 %v:%v %s cert=%v iat-mode=%v", settings["host"], settings["port"], n.fingerprint(t, bridge), settings["cert"], settings["iat-mode"])
		bridge.await(t, "Bootstrapped 75%")
		client, socks := n.client(t, "hostserverclient", line, "obfs4", torSide{plugin: obfs4})
		client.await(t, "Bootstrapped 100%")
		n.fetch(t, socks, sum)
	})
}

// serveFront serves until the test ends.
func serveFront(t *testing.T, l net.Listener, server front.Server) {
	t.Helper()
	done := make(chan error, 1)
	go func() { done <- server.Serve(l) }()
	t.Cleanup(func() {
		cut, cancel := context.WithCancel(context.Background())
		cancel()
		_ = server.Shutdown(cut) // what is left is to be cut
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

func object(t testing.TB, v any) ptipc.Opaque {
	t.Helper()
	text, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return text
}

// fetch demands the page and the bulk data of a client.
func (n *tornet) fetch(t testing.TB, socks, sum string) {
	t.Helper()
	if page := n.get(t, socks, "/"); page != "a page" {
		t.Errorf("the page is %q", page)
	}
	if got := fmt.Sprintf("%x", sha256.Sum256([]byte(n.get(t, socks, "/bulk")))); got != sum {
		t.Error("bulk data did not come as it was")
	}
}

// tor's download through a bridge with our WebSocket transport and with none, as
// ratios to obfs4. All pairs share a network and stand from the beginning; CPU time
// is that of the bridge, its client and their transports.
func BenchmarkTor(b *testing.B) {
	obfs4 := testpeer.Need(b, "obfs4proxy")
	n := newTornet(b, http.NotFoundHandler())
	far := startFar(b)
	var rigs []rig
	for _, pair := range []struct{ name, transport, plugin string }{
		{"websocket", "websocket", self(b)}, {"none", "", ""}, {"obfs4", "obfs4", obfs4},
	} {
		bridge, orPort := n.bridge(b, pair.name+"bridge", pair.transport, torSide{plugin: pair.plugin})
		line := fmt.Sprintf("127.0.0.1:%d %s", orPort, n.fingerprint(b, bridge))
		if pair.transport != "" {
			line = n.bridgeLine(b, bridge, pair.transport)
		}
		bridge.await(b, "Bootstrapped 75%")
		client, socks := n.client(b, pair.name+"client", line, pair.transport, torSide{plugin: pair.plugin})
		client.await(b, "Bootstrapped 100%")
		rigs = append(rigs, rig{pair.name, []int{bridge.cmd.Process.Pid, client.cmd.Process.Pid}, dialSOCKS(socks, nil, far)})
	}
	for b.Loop() {
		compare(b, "down", "MB", 1e6, rigs, func(r rig) figure { return r.download(b) })
	}
	b.ReportMetric(0, "ns/op")
}

// download takes a figure of a fixed amount, since the windows of a circuit take
// longer to open than the time that other figures have.
func (r rig) download(b *testing.B) figure {
	b.Helper()
	const settle, size = 4 << 20, 24 << 20
	conn, err := r.dial(b.Context())
	if err != nil {
		b.Fatalf("%s: %v", r.name, err)
	}
	defer conn.Close()
	if _, err := conn.Write([]byte{'d'}); err != nil {
		b.Fatalf("%s: %v", r.name, err)
	}
	if _, err := io.CopyN(io.Discard, conn, settle); err != nil {
		b.Fatalf("%s: %v", r.name, err)
	}
	cpu, start := r.cpu(), time.Now()
	if _, err := io.CopyN(io.Discard, conn, size); err != nil {
		b.Fatalf("%s: %v", r.name, err)
	}
	return figure{size / time.Since(start).Seconds(), size / (r.cpu() - cpu)}
}
