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

	"pthost/ptipc/localnet"
	"pthost/socks"
)

// prove fetches a page from a web server of its own through the first front, and
// so through the whole chain: front, host, child, wire.
func (r *runner) prove(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	page := rand.Text()
	listener, err := localnet.ListenTCP("127.0.0.1:0")
	if err != nil {
		return err
	}
	server := &http.Server{
		ReadHeaderTimeout: 10 * time.Second,
		Handler:           http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, page) }),
	}
	served := make(chan error, 1)
	go func() { served <- server.Serve(listener) }()
	defer func() {
		_ = server.Close() // only our own request was ever served
		<-served
	}()

	began := time.Now()
	got, err := fetch(ctx, r.fronts[0].listener.Addr().String(), "http://"+listener.Addr().String()+"/")
	if err != nil {
		return err
	}
	if got != page {
		return errors.New("a page came through the transport that is not the one that was served")
	}
	if stats, err := r.transports[r.fronts[0].Transport].Stats(ctx); err != nil || stats.Received < uint64(len(page)) {
		return fmt.Errorf("the page did not come through the transport (%+v, %w)", stats, err)
	}
	fmt.Fprintf(r.out, "proof: a page came through front, host, child and wire after %v\n", time.Since(began).Round(100*time.Microsecond))
	fmt.Fprintf(r.out, "try:   curl --socks5-hostname %s https://example.com/\n", r.fronts[0].listener.Addr())
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
