package managed

import (
	"bufio"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strings"
	"time"

	"pthost/adapters/pt1/wire"
	"pthost/ptipc"
	"pthost/socks"
)

type dialFunc = func(ctx context.Context, network, addr string) (net.Conn, error)

// dialOut is the way out that the environment demands, nil if it demands none
// (PT1-24). Errors do not repeat the proxy's URL.
func dialOut(e *wire.Environment) (dialFunc, error) {
	var dial dialFunc
	if e.BindV4.IsValid() || e.BindV6.IsValid() {
		dial = dialFrom(e.BindV4, e.BindV6)
	}
	if e.Proxy == "" {
		return dial, nil
	}
	u, err := url.Parse(e.Proxy)
	if err != nil || u.Hostname() == "" || u.Port() == "" {
		return nil, errors.New("the upstream proxy has to be SCHEME://[USER:PASSWORD@]HOST:PORT")
	}
	if dial == nil {
		dial = new(net.Dialer).DialContext
	}
	switch u.Scheme {
	case "socks5":
		return socks.UpstreamDialer(e.Proxy, dial)
	case "socks4a":
		return dialThrough(dial, u.Host, func(ctx context.Context, conn net.Conn, dest string) error {
			return socks.Connect4(ctx, conn, u.User.Username(), dest)
		}), nil
	case "http":
		return dialThrough(dial, u.Host, func(ctx context.Context, conn net.Conn, dest string) error {
			return connectHTTP(ctx, conn, u.User, dest)
		}), nil
	}
	return nil, fmt.Errorf("an upstream proxy of the kind %.16q is not known here: there are socks5, socks4a and http", u.Scheme)
}

// dialThrough makes every connection through a proxy, which connect asks for it.
func dialThrough(dial dialFunc, proxy string, connect func(ctx context.Context, conn net.Conn, dest string) error) dialFunc {
	return func(ctx context.Context, network, addr string) (net.Conn, error) {
		if !strings.HasPrefix(network, "tcp") {
			return nil, fmt.Errorf("the upstream proxy carries TCP, not %s: %w", network, ptipc.ErrNotAllowed)
		}
		conn, err := dial(ctx, "tcp", proxy)
		if err != nil && ctx.Err() == nil {
			// It says nothing about the destination.
			err = ptipc.WithClass(ptipc.ErrGeneral, err)
		}
		if err != nil {
			return nil, fmt.Errorf("upstream proxy: %w", err)
		}
		if err := connect(ctx, conn, addr); err != nil {
			_ = conn.Close()
			return nil, fmt.Errorf("upstream proxy: %w", err)
		}
		return conn, nil
	}
}

// maxAnswer bounds the header with which an HTTP proxy answers.
const maxAnswer = 16 << 10

// connectHTTP asks an HTTP proxy for a connection. A name goes to it as a name, and
// nothing behind its answer is read.
func connectHTTP(ctx context.Context, conn net.Conn, user *url.Userinfo, dest string) error {
	if strings.ContainsFunc(dest, func(r rune) bool { return r <= ' ' || r == 0x7f }) { // it would end the line
		return fmt.Errorf("the destination %q is not host:port: %w", dest, ptipc.ErrNotAllowed)
	}
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	request := "CONNECT " + dest + " HTTP/1.1\r\nHost: " + dest + "\r\n"
	if user != nil {
		password, _ := user.Password()
		request += "Proxy-Authorization: Basic " + base64.StdEncoding.EncodeToString([]byte(user.Username()+":"+password)) + "\r\n"
	}
	if _, err := io.WriteString(conn, request+"\r\n"); err != nil {
		return orCause(ctx, err)
	}
	// A reader of one byte: what comes behind the header is the stream's.
	header := bufio.NewReaderSize(&singly{r: conn, left: maxAnswer}, 16)
	response, err := http.ReadResponse(header, &http.Request{Method: http.MethodConnect})
	switch {
	case err != nil:
		return orCause(ctx, fmt.Errorf("the answer is not one of an HTTP proxy: %w", err))
	case response.StatusCode != http.StatusOK:
		return fmt.Errorf("it answers %.64q: %w", response.Status, ptipc.ErrGeneral)
	case !stop():
		return context.Cause(ctx)
	}
	return nil
}

func orCause(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return err
}

// singly reads one byte at a time, and not for ever.
type singly struct {
	r    io.Reader
	left int
}

func (s *singly) Read(p []byte) (int, error) {
	if s.left == 0 {
		return 0, fmt.Errorf("its header is longer than %d bytes", maxAnswer)
	}
	s.left--
	return s.r.Read(p[:1])
}

// dialFrom dials from the address of the destination's family. A name is tried in
// both families, that of IPv4 first, since only the system's look-up knows its own.
func dialFrom(v4, v6 netip.Addr) dialFunc {
	from := func(ctx context.Context, network, addr string, local netip.Addr) (net.Conn, error) {
		var d net.Dialer
		if local.IsValid() {
			d.LocalAddr = net.TCPAddrFromAddrPort(netip.AddrPortFrom(local, 0))
		}
		return d.DialContext(ctx, network, addr)
	}
	return func(ctx context.Context, network, addr string) (net.Conn, error) {
		if network != "tcp" {
			return nil, fmt.Errorf("the addresses to go out from are for TCP, not %s: %w", network, ptipc.ErrNotAllowed)
		}
		host, _, err := net.SplitHostPort(addr)
		if err != nil {
			return nil, err
		}
		if ip, err := netip.ParseAddr(host); err == nil {
			if ip.Unmap().Is4() {
				return from(ctx, "tcp4", addr, v4)
			}
			return from(ctx, "tcp6", addr, v6)
		}
		conn, err := from(ctx, "tcp4", addr, v4)
		if err != nil && ctx.Err() == nil {
			if conn, err6 := from(ctx, "tcp6", addr, v6); err6 == nil {
				return conn, nil
			}
		}
		return conn, err
	}
}
