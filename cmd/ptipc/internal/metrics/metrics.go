// Package metrics shows the state of a running host to Prometheus.
//
//	listener, err := metrics.Listen("tcp://127.0.0.1:9100", log)
//	if err != nil {
//		return err
//	}
//	server := control.Serve(listener, metrics.Handler(host.Status, log), log)
//	defer server.Close()
//
// The numbers are those of ptipc status, at /metrics:
//
//	ptipc_transport_up                        1 while the transport's child serves
//	ptipc_transport_restarts_total            children after the first
//	ptipc_transport_connections_active        connections open now
//	ptipc_transport_connections_opened_total  connections ever opened
//	ptipc_transport_connections_failed_total  dials that failed
//	ptipc_transport_bytes_total               application data, by direction: received or sent
//	ptipc_transport_signals_pending           messages that wait to be carried by people
//	ptipc_front_info                          1 for each front
//	ptipc_front_refused_total                 connections of other users, where it is counted
//
// Those of a transport have the labels transport and role, those of a front address,
// serve and transport. What could not be asked for is left out of one answer. The
// process's own numbers, process_… and go_…, are there as well.
package metrics

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"pthost/cmd/ptipc/internal/control"
	"pthost/ptipc/front"
)

const (
	collectTimeout = 2 * time.Second
	scrapeTimeout  = 10 * time.Second
	maxScrapes     = 4 // at once
)

// Listen opens tcp://IP:PORT, where everybody who reaches the address may ask: a
// Prometheus is another user's, or another machine's. unix:///PATH, in a directory
// that is the effective user's alone, is for that user.
func Listen(url string, log *slog.Logger) (net.Listener, error) {
	if addr, ok := strings.CutPrefix(url, "tcp://"); ok {
		l, err := new(net.ListenConfig).Listen(context.Background(), "tcp", addr)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", url, err)
		}
		return l, nil
	}
	return front.Listen(url, log)
}

// Handler answers scrapes at /metrics with what status says.
func Handler(status func(ctx context.Context) control.Status, log *slog.Logger) http.Handler {
	registry := prometheus.NewRegistry()
	registry.MustRegister(
		newCollector(status),
		collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}),
		collectors.NewGoCollector(),
	)
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(registry, promhttp.HandlerOpts{
		ErrorLog:            slog.NewLogLogger(log.Handler(), slog.LevelWarn),
		ErrorHandling:       promhttp.HTTPErrorOnError,
		MaxRequestsInFlight: maxScrapes,
		Timeout:             scrapeTimeout,
	}))
	return mux
}

// collector asks for a status at each scrape: there is one record of what happens,
// and no second one that could differ.
type collector struct {
	status func(ctx context.Context) control.Status

	up, restarts, active, opened, failed, bytes, pending *prometheus.Desc
	front, refused                                       *prometheus.Desc
}

// newCollector returns a collector of what status says.
func newCollector(status func(ctx context.Context) control.Status) prometheus.Collector {
	transport := func(name, help string, more ...string) *prometheus.Desc {
		return prometheus.NewDesc("ptipc_transport_"+name, help, append([]string{"transport", "role"}, more...), nil)
	}
	front := func(name, help string) *prometheus.Desc {
		return prometheus.NewDesc("ptipc_front_"+name, help, []string{"address", "serve", "transport"}, nil)
	}
	return &collector{
		status:   status,
		up:       transport("up", "Whether the child of the transport serves."),
		restarts: transport("restarts_total", "Children of the transport after the first."),
		active:   transport("connections_active", "Connections open now."),
		opened:   transport("connections_opened_total", "Connections ever opened, the open ones included."),
		failed:   transport("connections_failed_total", "Connections that could not be opened."),
		bytes:    transport("bytes_total", "Application data, received from the wire or sent to it.", "direction"),
		pending:  transport("signals_pending", "Outgoing messages kept for people to carry."),
		front:    front("info", "A front, where ordinary programs connect."),
		refused:  front("refused_total", "Connections of other users that the front has refused."),
	}
}

// Describe sends the descriptions of all metrics.
func (c *collector) Describe(out chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{c.up, c.restarts, c.active, c.opened, c.failed, c.bytes, c.pending, c.front, c.refused} {
		out <- d
	}
}

// Collect sends the metrics of one moment.
func (c *collector) Collect(out chan<- prometheus.Metric) {
	ctx, cancel := context.WithTimeout(context.Background(), collectTimeout)
	defer cancel()
	send := func(d *prometheus.Desc, kind prometheus.ValueType, v float64, labels ...string) {
		out <- prometheus.MustNewConstMetric(d, kind, v, labels...)
	}
	const gauge, counter = prometheus.GaugeValue, prometheus.CounterValue
	s := c.status(ctx)
	for _, t := range s.Transports {
		up := 0.0
		if t.State == control.Ready {
			up = 1
		}
		send(c.up, gauge, up, t.Name, t.Role)
		send(c.restarts, counter, float64(t.Restarts), t.Name, t.Role)
		if t.Signals == "queue" {
			send(c.pending, gauge, float64(t.Pending), t.Name, t.Role)
		}
		if t.Stats == nil {
			continue
		}
		send(c.active, gauge, float64(t.Stats.Active), t.Name, t.Role)
		send(c.opened, counter, float64(t.Stats.Opened), t.Name, t.Role)
		send(c.failed, counter, float64(t.Stats.Failed), t.Name, t.Role)
		send(c.bytes, counter, float64(t.Stats.Received), t.Name, t.Role, "received")
		send(c.bytes, counter, float64(t.Stats.Sent), t.Name, t.Role, "sent")
	}
	for _, f := range s.Fronts {
		address := strings.ToValidUTF8(f.Address, "\ufffd") // a path may be anything
		send(c.front, gauge, 1, address, f.Serve, f.Transport)
		if f.Refused != nil {
			send(c.refused, counter, float64(*f.Refused), address, f.Serve, f.Transport)
		}
	}
}
