package socks

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/url"
	"strings"

	"pthost/ptipc"
)

const (
	methodPassword  = 0x02
	passwordVersion = 0x01
)

// ConnectUpstream asks an ordinary SOCKS5 proxy (RFC 1928) at the other end of
// conn for a connection to dest, "host:port". A name goes to the proxy as a
// name (PROXY-3). user, if it is not nil, is offered as username and password
// (RFC 1929); errors never show it. Nothing is sent before the proxy has
// answered what came before, since many proxies cannot take that.
//
// ctx, errors and conn are as with [Connect].
func ConnectUpstream(ctx context.Context, conn net.Conn, user *url.Userinfo, dest string) error {
	greeting := []byte{version, 1, methodNone}
	var login []byte
	if user != nil {
		var err error
		if login, err = appendLogin(nil, user); err != nil {
			return err
		}
		greeting = []byte{version, 2, methodNone, methodPassword}
	}
	return connectInSteps(ctx, conn, greeting, login, dest)
}

// ConnectPassword is [ConnectUpstream] with a server that has to take the username and
// password (RFC 1929), since no other method is offered. Each has 1 to 255 bytes.
func ConnectPassword(ctx context.Context, conn net.Conn, username, password, dest string) error {
	if len(username) == 0 || len(username) > 255 || len(password) == 0 || len(password) > 255 {
		return ptipc.WithClass(ptipc.ErrNotAllowed, errors.New("socks: username and password must have 1 to 255 bytes each"))
	}
	login, err := appendLogin(nil, url.UserPassword(username, password))
	if err != nil {
		return err
	}
	return connectInSteps(ctx, conn, []byte{version, 1, methodPassword}, login, dest)
}

// connectInSteps waits for each answer before it goes on. login is nil for none.
func connectInSteps(ctx context.Context, conn net.Conn, greeting, login []byte, dest string) error {
	if dest == "" {
		return fmt.Errorf("socks: an ordinary proxy needs a destination: %w", ptipc.ErrNotAllowed)
	}
	request, err := appendDestination([]byte{version, commandConnect, 0}, dest)
	if err != nil {
		return err
	}
	return exchange(ctx, conn, func() error {
		b := make([]byte, replySize)
		err := sendAndRead(conn, greeting, func() error {
			if _, err := io.ReadFull(conn, b[:2]); err != nil {
				return endOfReply(err)
			}
			if b[1] == methodPassword && login != nil || greeting[2] == methodPassword {
				return checkMethod(b, methodPassword)
			}
			return checkMethod(b, methodNone)
		})
		if err != nil {
			return err
		}
		if b[1] == methodPassword {
			err := sendAndRead(conn, login, func() error { return readLoginReply(conn, b) })
			if err != nil {
				return err
			}
		}
		return sendAndRead(conn, request, func() error { return readReply(conn, b, 0) })
	})
}

func appendLogin(b []byte, user *url.Userinfo) ([]byte, error) {
	name := user.Username()
	password, _ := user.Password()
	if len(name) == 0 || len(name) > 255 || len(password) > 255 {
		return nil, ptipc.WithClass(ptipc.ErrNotAllowed,
			errors.New("socks: the username for the upstream proxy must have 1 to 255 bytes, the password at most 255"))
	}
	b = append(b, passwordVersion, byte(len(name)))
	b = append(b, name...)
	b = append(b, byte(len(password)))
	return append(b, password...), nil
}

func readLoginReply(r io.Reader, b []byte) error {
	if _, err := io.ReadFull(r, b[:2]); err != nil {
		return endOfReply(err)
	}
	if b[1] != 0 {
		return fmt.Errorf("socks: the upstream proxy refused username and password: %w", ptipc.ErrNotAllowed)
	}
	return nil
}

// UpstreamDialer returns a function that makes every connection through the proxy
// of a URL, socks5://[USER:PASSWORD@]HOST:PORT, and none in any other way (PROXY-1).
// dial reaches the proxy itself; nil is a plain [net.Dialer]. Errors do not repeat
// the URL, which is a secret (PROXY-3).
func UpstreamDialer(rawURL string, dial func(ctx context.Context, network, addr string) (net.Conn, error)) (func(ctx context.Context, network, addr string) (net.Conn, error), error) {
	u, err := url.Parse(rawURL)
	if err != nil || u.Scheme != "socks5" || u.Hostname() == "" || u.Port() == "" {
		return nil, errors.New("the upstream proxy has to be socks5://[USER:PASSWORD@]HOST:PORT")
	}
	if dial == nil {
		dial = new(net.Dialer).DialContext
	}
	return func(ctx context.Context, network, addr string) (net.Conn, error) {
		if !strings.HasPrefix(network, "tcp") {
			return nil, fmt.Errorf("the upstream proxy carries TCP, not %s: %w", network, ptipc.ErrNotAllowed)
		}
		conn, err := dial(ctx, "tcp", u.Host)
		if err != nil && ctx.Err() == nil {
			// It says nothing about the destination.
			err = ptipc.WithClass(ptipc.ErrGeneral, err)
		}
		if err != nil {
			return nil, fmt.Errorf("upstream proxy: %w", err)
		}
		if err := ConnectUpstream(ctx, conn, u.User, addr); err != nil {
			_ = conn.Close()
			return nil, fmt.Errorf("upstream proxy: %w", err)
		}
		return conn, nil
	}, nil
}
