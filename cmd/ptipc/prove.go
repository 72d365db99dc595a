package main

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"time"

	"pthost/cmd/ptipc/internal/config"
	"pthost/ptipc"
	"pthost/ptipc/egress"
	"pthost/ptipc/localnet"
	"pthost/socks"
)

// A proof is a page on a web server of its own, to be fetched through everything.
type proof struct {
	page     string
	listener net.Listener
	server   *http.Server
	served   chan error
}

func newProof() (*proof, error) {
	listener, err := localnet.ListenTCP("127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	p := &proof{page: rand.Text(), listener: listener, served: make(chan error, 1)}
	p.server = &http.Server{
		ReadHeaderTimeout: 10 * time.Second,
		Handler:           http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, p.page) }),
	}
	go func() { p.served <- p.server.Serve(listener) }()
	return p, nil
}

func (p *proof) addr() string { return p.listener.Addr().String() }

func (p *proof) close() {
	_ = p.server.Close() // only our own request was ever served
	<-p.served
	p.served <- nil
}

// embedded is the configuration that runs without a file: a WebSocket's server and
// client in children of their own, free over bound. Beside the public network it
// lets the proof through, which is on this machine.
func embedded(ctx context.Context, o *opener, listen, proofAddr string) (*config.File, error) {
	front := config.Front{Listen: "tcp://127.0.0.1:1080", Serve: "socks5", Via: []string{"free", "client"}}
	if listen != "" {
		front.Listen = "tcp://" + listen
	}
	if err := front.Validate(); err != nil {
		return nil, fmt.Errorf("--listen: %w: %w", err, ptipc.ExitUsage)
	}
	t := config.Transport{Exec: builtinPrefix + "websocket"}
	command, err := o.command("websocket", t)
	if err != nil {
		return nil, err
	}
	env := o.env("websocket", "")
	client, server, err := command.Server().GenerateConfig(ctx, ptipc.Opaque(`{"listen":"127.0.0.1:0","host":"127.0.0.1"}`), env)
	if err != nil {
		return nil, fmt.Errorf("the embedded default: %w", err)
	}
	var policy egress.Policy
	if err := ptipc.Opaque(fmt.Sprintf(`{"allow":["*:1-24","*:26-65535",%q]}`, proofAddr)).Decode(&policy); err != nil {
		return nil, fmt.Errorf("the embedded default: %w", err)
	}
	return &config.File{
		Transports: map[string]config.Transport{
			"client": {Exec: t.Exec, Config: client},
			"server": {Exec: t.Exec, Role: "server", Config: server, Via: []string{"free"}, Egress: &policy},
		},
		Fronts: []config.Front{front},
	}, nil
}

// prove fetches the page through the first front, and so through the whole chain.
func (r *runner) prove(ctx context.Context, p *proof) error {
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	began := time.Now()
	got, err := fetch(ctx, r.fronts[len(r.fronts)-1].listener.Addr().String(), "http://"+p.addr()+"/")
	if err != nil {
		return err
	}
	if got != p.page {
		return errors.New("a page came through the transport that is not the one that was served")
	}
	if stats, err := r.transports["client"].Stats(ctx); err != nil || stats.Received < uint64(len(p.page)) {
		return fmt.Errorf("the page did not come through the transport (%+v, %w)", stats, err)
	}
	took := time.Since(began).Round(100 * time.Microsecond)
	front := r.fronts[len(r.fronts)-1].listener.Addr()
	fmt.Fprintf(r.out, "proof: a page came through front, host, child, TLS, WebSocket, child and out again after %v\n", took)
	fmt.Fprintf(r.out, "try:   curl --socks5-hostname %s https://example.com/\n", front)
	return nil
}

// fetch gets a page as a browser would: through an ordinary SOCKS5 proxy.
func fetch(ctx context.Context, proxy, url string) (string, error) {
	transport := &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, addr string) (net.Conn, error) {
			var d net.Dialer
			conn, err := d.DialContext(ctx, "tcp", proxy)
			if err != nil {
				return nil, err
			}
			if err := socks.ConnectUpstream(ctx, conn, nil, addr); err != nil {
				return nil, errors.Join(err, conn.Close())
			}
			return conn, nil
		},
	}
	defer transport.CloseIdleConnections()
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return "", err
	}
	response, err := (&http.Client{Transport: transport}).Do(request)
	if err != nil {
		return "", err
	}
	defer response.Body.Close()
	body, err := io.ReadAll(io.LimitReader(response.Body, 1<<20))
	if err == nil && response.StatusCode != http.StatusOK {
		err = fmt.Errorf("the web server answered %s", response.Status)
	}
	return string(body), err
}
