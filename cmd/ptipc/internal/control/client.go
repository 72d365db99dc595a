package control

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"pthost/ptipc"
	"pthost/ptipc/localnet"
	"pthost/ptipc/stdio"
)

const (
	requestTimeout = 10 * time.Second
	maxAnswer      = 64 << 20              // 100 messages of many transports
	stopPoll       = 50 * time.Millisecond // between two looks at whether the host is gone
)

// ErrNoHost says that nobody listens on the control socket.
var ErrNoHost = errors.New("no host is running")

// A Client talks to the host behind one control socket. It keeps no connection open.
type Client struct {
	path string
	http *http.Client
}

// NewClient returns a client of the host whose control socket is at path.
func NewClient(path string) *Client {
	c := &Client{path: path}
	c.http = &http.Client{
		Timeout: requestTimeout,
		Transport: &http.Transport{
			DisableKeepAlives: true,
			DialContext:       func(ctx context.Context, _, _ string) (net.Conn, error) { return c.dial(ctx) },
		},
	}
	return c
}

// dial goes only through a directory that is the user's alone: nobody else can have
// made the socket in it.
func (c *Client) dial(ctx context.Context) (net.Conn, error) {
	dir, err := localnet.OpenDir(filepath.Dir(c.path))
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	return dir.Dial(ctx, filepath.Base(c.path))
}

// Status asks for the state of the host. The error of this and all other methods is
// [ErrNoHost] when none runs.
func (c *Client) Status(ctx context.Context) (Status, error) {
	var s Status
	err := c.do(ctx, http.MethodGet, "/v1/status", nil, &s)
	return s, err
}

// Signals lists the outgoing messages of a transport, of all if it is "".
func (c *Client) Signals(ctx context.Context, transport string) ([]Signal, error) {
	path := "/v1/signals"
	if transport != "" {
		path += "/" + url.PathEscape(transport)
	}
	var signals []Signal
	err := c.do(ctx, http.MethodGet, path, nil, &signals)
	return signals, err
}

// AddSignal hands in a message that came from the other side.
func (c *Client) AddSignal(ctx context.Context, transport string, m ptipc.Message) error {
	text, err := stdio.AppendSignal(nil, m)
	if err != nil {
		return fmt.Errorf("%w: %w", err, ptipc.ExitDataErr)
	}
	return c.do(ctx, http.MethodPost, "/v1/signals/"+url.PathEscape(transport), text, &struct{}{})
}

// Stop ends the host in order, and returns when it is gone or ctx ends.
func (c *Client) Stop(ctx context.Context) error {
	was, err := c.Status(ctx)
	if err != nil {
		return err
	}
	if err := c.do(ctx, http.MethodPost, "/v1/stop", nil, &struct{}{}); err != nil {
		return err
	}
	ticker := time.NewTicker(stopPoll)
	defer ticker.Stop()
	for {
		// Between two looks, one host may end and another one take its place.
		is, err := c.Status(ctx)
		if errors.Is(err, ErrNoHost) || err == nil && !is.same(was) {
			return nil
		}
		select {
		case <-ticker.C: // an error otherwise is of a request that the end has cut
		case <-ctx.Done():
			return fmt.Errorf("the host, process %d, was asked to stop and has not ended yet: %w", was.PID, ctx.Err())
		}
	}
}

func (c *Client) do(ctx context.Context, method, path string, body []byte, into any) error {
	request, err := http.NewRequestWithContext(ctx, method, "http://ptipc"+path, bytes.NewReader(body))
	if err != nil {
		return err
	}
	response, err := c.http.Do(request)
	if err != nil {
		return c.explain(err)
	}
	defer response.Body.Close()
	text, err := io.ReadAll(io.LimitReader(response.Body, maxAnswer))
	if err != nil {
		return c.explain(err)
	}
	if response.StatusCode >= 300 {
		var f failure
		if err := json.Unmarshal(text, &f); err != nil || f.Error == "" || f.Code == ptipc.ExitOK {
			return fmt.Errorf("the host at %s answers %s: %w", c.path, response.Status, ptipc.ExitProtocol)
		}
		return &remoteError{f}
	}
	if err := json.Unmarshal(text, into); err != nil {
		return fmt.Errorf("the answer of the host at %s cannot be read: %w: %w", c.path, err, ptipc.ExitProtocol)
	}
	return nil
}

// explain says what to do when nobody answers.
func (c *Client) explain(err error) error {
	var u *url.Error
	if errors.As(err, &u) {
		err = u.Err // without the address, which is made up
	}
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, syscall.ECONNREFUSED) {
		return fmt.Errorf("%w: nobody listens on %s; start one with ptipc run, or name its socket with --control: %w",
			ErrNoHost, c.path, ptipc.ExitUnavailable)
	}
	return fmt.Errorf("the host at %s does not answer: %w", c.path, err)
}

// remoteError is what the host said, with its exit code.
type remoteError struct{ failure }

func (e *remoteError) Error() string { return e.failure.Error }
func (e *remoteError) Unwrap() error { return e.Code }
