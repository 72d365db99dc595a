package socks

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"net/url"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	socks5 "github.com/armon/go-socks5"

	"pthost/ptipc"
)

// SOCKS-16: the reply counts, though nothing can be written any more.
func TestConnectReadsReplyOfClosedServer(t *testing.T) {
	near, far := connected(t, "unix")
	if _, err := far.Write(reply(methodSettings, true, ptipc.ErrSettingsTooLarge)); err != nil {
		t.Fatal(err)
	}
	far.Close()
	err := Connect(t.Context(), near, ptipc.Opaque(`{"k":"v"}`), "")
	if !errors.Is(err, ptipc.ErrSettingsTooLarge) {
		t.Errorf("Connect: %v, want %v", err, ptipc.ErrSettingsTooLarge)
	}
}

// The write error counts if there is no reply, and a reply of success does not
// make up for it.
func TestConnectCannotWrite(t *testing.T) {
	for _, answer := range []string{"", string(granted)} {
		near, far := connected(t, "unix")
		if _, err := io.WriteString(far, answer); err != nil {
			t.Fatal(err)
		}
		far.Close()
		err := Connect(t.Context(), near, nil, "")
		var op *net.OpError
		if !errors.As(err, &op) || op.Op != "write" || !errors.Is(err, ptipc.ErrGeneral) {
			t.Errorf("Connect: %v, want an error of writing", err)
		}
	}
}

// A conn without buffers, and settings larger than what the server reads at
// once: neither waits for the other.
func TestConnectOnPipe(t *testing.T) {
	settings := ptipc.Opaque(`{"k":"` + strings.Repeat("v", maxSettings-8) + `"}`)
	for _, want := range []error{nil, ptipc.ErrRefused} {
		l, dial := listen(t, "pipe")
		start(t, &Server{Dial: func(_ context.Context, r *Request) (net.Conn, error) {
			if !bytes.Equal(r.Settings, settings) {
				t.Error("the settings are not what was sent")
			}
			near, far := net.Pipe()
			far.Close()
			return near, want
		}}, l)
		conn := dial()
		if err := Connect(t.Context(), conn, settings, "example.com:443"); !errors.Is(err, want) {
			t.Errorf("Connect: %v, want %v", err, want)
		}
		conn.Close()
	}
}

func TestConnectEndsWithContext(t *testing.T) {
	for _, network := range networks {
		t.Run(network, func(t *testing.T) {
			near, far := connected(t, network)
			cause := errors.New("enough")
			ctx, cancel := context.WithCancelCause(t.Context())
			got := make(chan error, 1)
			go func() { got <- Connect(ctx, near, nil, "example.com:443") }()
			readExactly(t, far, 1)
			cancel(cause)
			if err := <-got; !errors.Is(err, cause) {
				t.Errorf("Connect: %v, want %v", err, cause)
			}
		})
	}
}

func TestConnectTimesOut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		near, far := net.Pipe()
		defer far.Close()
		defer near.Close()
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		if err := Connect(ctx, near, nil, "example.com:443"); !errors.Is(err, ptipc.ErrTimedOut) {
			t.Errorf("Connect: %v, want %v", err, ptipc.ErrTimedOut)
		}
	})
}

// upstream is an ordinary proxy that takes one step after the other, and
// notices what comes too early: a pipe gives no more than was written at once.
type upstream struct {
	t    *testing.T
	conn net.Conn
}

func (u *upstream) expect(want string) {
	b := make([]byte, 1024)
	n, err := u.conn.Read(b)
	if err != nil || string(b[:n]) != want {
		u.t.Errorf("the proxy got %q, %v; want %q", b[:n], err, want)
	}
}

func (u *upstream) answer(s string) {
	_, _ = io.WriteString(u.conn, s) // the client may leave when it has seen enough
}

func TestConnectUpstream(t *testing.T) {
	const toName = "\x05\x01\x00\x03\x0cname.invalid\x00\x50"
	login := "\x01\x04user\x06secret"
	user := url.UserPassword("user", "secret")
	var class ptipc.Class
	for _, test := range []struct {
		name  string
		user  *url.Userinfo
		steps []string // what the proxy gets and what it answers, in turns
		want  error
	}{
		{"none", nil, []string{"\x05\x01\x00", "\x05\x00", toName, string(granted[2:])}, nil},
		{"login", user, []string{"\x05\x02\x00\x02", "\x05\x02", login, "\x01\x00", toName, string(granted[2:])}, nil},
		{"login not wanted", user, []string{"\x05\x02\x00\x02", "\x05\x00", toName, string(granted[2:])}, nil},
		{"login refused", user, []string{"\x05\x02\x00\x02", "\x05\x02", login, "\x01\x01"}, ptipc.ErrNotAllowed},
		{"login without a password", url.User("user"), []string{"\x05\x02\x00\x02", "\x05\x02", "\x01\x04user\x00", "\x01\x00", toName, string(granted[2:])}, nil},
		{"login wanted", nil, []string{"\x05\x01\x00", "\x05\x02"}, ptipc.ErrGeneral},
		{"no method", nil, []string{"\x05\x01\x00", "\x05\xff"}, ptipc.ErrGeneral},
		{"no SOCKS5", nil, []string{"\x05\x01\x00", "HT"}, ptipc.ErrGeneral},
		{"refused", nil, []string{"\x05\x01\x00", "\x05\x00", toName, "\x05\x05\x00\x01\x00\x00\x00\x00\x00\x00"}, ptipc.ErrRefused},
		{"closed", nil, []string{"\x05\x01\x00", "\x05\x00", toName, "\x05"}, io.ErrUnexpectedEOF},
	} {
		t.Run(test.name, func(t *testing.T) {
			near, far := net.Pipe()
			defer near.Close()
			ended := make(chan struct{})
			go func() {
				defer close(ended)
				defer far.Close()
				u := &upstream{t, far}
				for i, step := range test.steps {
					if i%2 == 0 {
						u.expect(step)
					} else {
						u.answer(step)
					}
				}
			}()
			err := ConnectUpstream(t.Context(), near, test.user, "name.invalid:80")
			if !errors.Is(err, test.want) {
				t.Errorf("ConnectUpstream: %v, want %v", err, test.want)
			}
			if err != nil && (!errors.As(ptipc.Classify(err), &class) && !errors.Is(err, ptipc.ErrGeneral) || strings.Contains(err.Error(), "secret")) {
				t.Errorf("ConnectUpstream: %v", err)
			}
			near.Close()
			<-ended
		})
	}
}

func TestConnectUpstreamRefusesToSend(t *testing.T) {
	long := strings.Repeat("secret", 50)
	for _, test := range []struct {
		user *url.Userinfo
		dest string
	}{
		{nil, ""},
		{nil, "example.com"},
		{nil, "example.com:0"},
		{url.User(""), "example.com:80"},
		{url.User(long), "example.com:80"},
		{url.UserPassword("user", long), "example.com:80"},
	} {
		conn := &script{piece: 1}
		err := ConnectUpstream(t.Context(), conn, test.user, test.dest)
		if !errors.Is(err, ptipc.ErrNotAllowed) || strings.Contains(err.Error(), "secret") || conn.out.Len() > 0 {
			t.Errorf("ConnectUpstream(%q): %v, after % x", test.dest, err, conn.out.Bytes())
		}
	}
}

// An implementation of somebody else reads what ConnectUpstream sends.
func TestConnectUpstreamPeer(t *testing.T) {
	near, far := connected(t, "tcp")
	got := make(chan string, 1)
	go func() {
		defer far.Close()
		readExactly(t, far, 4)
		login := socks5.UserPassAuthenticator{Credentials: socks5.StaticCredentials{"user": "secret"}}
		if _, err := login.Authenticate(far, far); err != nil {
			t.Error(err)
		}
		request, err := socks5.NewRequest(far)
		if err != nil {
			t.Error(err)
		}
		got <- request.DestAddr.FQDN
		_, _ = far.Write(granted[2:])
	}()
	if err := ConnectUpstream(t.Context(), near, url.UserPassword("user", "secret"), "name.invalid:80"); err != nil {
		t.Error(err)
	}
	if name := <-got; name != "name.invalid" {
		t.Errorf("the proxy was asked for %q", name)
	}
}
