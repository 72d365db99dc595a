package socks

import (
	"context"
	"errors"
	"io"
	"net"
	"strings"
	"testing"

	"pthost/ptipc"
)

// Settings with a length reach a server of ours under 0x09 (SOCKS-3), and none are none
// (SOCKS-19).
func TestConnectLength(t *testing.T) {
	l, dial := listen(t, "tcp")
	start(t, &Server{Dial: func(_ context.Context, r *Request) (net.Conn, error) {
		if r.Dest == "refused.test:1" {
			return nil, ptipc.ErrRefused
		}
		near, far := net.Pipe()
		go func() {
			_, _ = io.WriteString(far, r.Dest+string(r.Settings))
			far.Close()
		}()
		return near, nil
	}}, l)
	for settings, want := range map[string]string{`{"k":"v"}`: `a.test:1{"k":"v"}`, `{}`: "a.test:1", "": "a.test:1"} {
		conn := dial()
		if err := ConnectLength(t.Context(), conn, ptipc.Opaque(settings), "a.test:1"); err != nil {
			t.Fatal(err)
		}
		got, err := io.ReadAll(conn)
		if err != nil || string(got) != want {
			t.Errorf("%q, error %v, want %q", got, err, want)
		}
		conn.Close()
	}
	conn := dial()
	defer conn.Close()
	if err := ConnectLength(t.Context(), conn, ptipc.Opaque(`{"k":1}`), "refused.test:1"); !errors.Is(err, ptipc.ErrRefused) {
		t.Errorf("got %v", err)
	}
}

// answering is a connection whose other end has said all that it says.
type answering struct {
	net.Conn
	strings.Reader
	sent []byte
}

func (a *answering) Read(p []byte) (int, error)  { return a.Reader.Read(p) }
func (a *answering) Write(p []byte) (int, error) { a.sent = append(a.sent, p...); return len(p), nil }

// Whatever the other end answers, a client of any form takes success alone for success,
// and sends nothing that its form has no room for.
func TestOtherClientsAnswers(t *testing.T) {
	near, far := net.Pipe()
	defer near.Close()
	defer far.Close()
	ok := "\x00\x00\x01\x00\x00\x00\x00\x00\x00"
	long := strings.Repeat("x", 256)
	for _, tt := range []struct {
		name, answer string
		connect      func(context.Context, net.Conn) error
		sent         string
		want         error
	}{
		{"length", "\x05\x09\x05" + ok, func(ctx context.Context, c net.Conn) error {
			return ConnectLength(ctx, c, ptipc.Opaque(`{"k":1}`), "192.0.2.1:1")
		}, "\x05\x02\x09\x80\x00\x00\x00\x07{\"k\":1}\x05\x01\x00\x01\xc0\x00\x02\x01\x00\x01", nil},
		{"length under 0x80", "\x05\x80\x05" + ok, func(ctx context.Context, c net.Conn) error {
			return ConnectLength(ctx, c, ptipc.Opaque(`{"k":1}`), "192.0.2.1:1")
		}, "\x05\x02\x09\x80\x00\x00\x00\x07{\"k\":1}\x05\x01\x00\x01\xc0\x00\x02\x01\x00\x01", nil},
		{"length, but none are taken", "\x05\x00", func(ctx context.Context, c net.Conn) error {
			return ConnectLength(ctx, c, ptipc.Opaque(`{"k":1}`), "192.0.2.1:1")
		}, "\x05\x02\x09\x80", ptipc.ErrGeneral},
		{"length, refused", "\x05\xff", func(ctx context.Context, c net.Conn) error {
			return ConnectLength(ctx, c, ptipc.Opaque(`{"k":1}`), "192.0.2.1:1")
		}, "\x05\x02\x09\x80", ptipc.ErrSettingsRefused},
		{"password", "\x05\x02\x01\x00\x05" + ok, func(ctx context.Context, c net.Conn) error {
			return ConnectPassword(ctx, c, "u", "p", "192.0.2.1:1")
		}, "\x05\x01\x02\x01\x01u\x01p\x05\x01\x00\x01\xc0\x00\x02\x01\x00\x01", nil},
		{"password, not asked for", "\x05\x00", func(ctx context.Context, c net.Conn) error {
			return ConnectPassword(ctx, c, "u", "p", "192.0.2.1:1")
		}, "\x05\x01\x02", ptipc.ErrGeneral},
		{"password, refused", "\x05\x02\x01\x01", func(ctx context.Context, c net.Conn) error {
			return ConnectPassword(ctx, c, "u", "p", "192.0.2.1:1")
		}, "\x05\x01\x02\x01\x01u\x01p", ptipc.ErrNotAllowed},
		{"password, too long", "", func(ctx context.Context, c net.Conn) error {
			return ConnectPassword(ctx, c, long, "p", "192.0.2.1:1")
		}, "", ptipc.ErrNotAllowed},
		{"SOCKS4", "\x00\x5a\x00\x00\x00\x00\x00\x00", func(ctx context.Context, c net.Conn) error {
			return Connect4(ctx, c, "id", "192.0.2.1:1")
		}, "\x04\x01\x00\x01\xc0\x00\x02\x01id\x00", nil},
		{"SOCKS4a", "\x00\x5a\x00\x00\x00\x00\x00\x00", func(ctx context.Context, c net.Conn) error {
			return Connect4(ctx, c, "", "a.test:1")
		}, "\x04\x01\x00\x01\x00\x00\x00\x01\x00a.test\x00", nil},
		{"SOCKS4, refused", "\x00\x5b\x00\x00\x00\x00\x00\x00", func(ctx context.Context, c net.Conn) error {
			return Connect4(ctx, c, "id", "192.0.2.1:1")
		}, "\x04\x01\x00\x01\xc0\x00\x02\x01id\x00", ptipc.ErrGeneral},
		{"SOCKS4, cut", "\x00\x5a\x00", func(ctx context.Context, c net.Conn) error {
			return Connect4(ctx, c, "id", "192.0.2.1:1")
		}, "\x04\x01\x00\x01\xc0\x00\x02\x01id\x00", io.ErrUnexpectedEOF},
		{"SOCKS4, another protocol", "\x05\x5a\x00\x00\x00\x00\x00\x00", func(ctx context.Context, c net.Conn) error {
			return Connect4(ctx, c, "id", "192.0.2.1:1")
		}, "\x04\x01\x00\x01\xc0\x00\x02\x01id\x00", ptipc.ErrGeneral},
		{"SOCKS4, IPv6", "", func(ctx context.Context, c net.Conn) error { return Connect4(ctx, c, "", "[2001:db8::1]:1") }, "", ptipc.ErrAddressType},
		{"SOCKS4, port 0", "", func(ctx context.Context, c net.Conn) error { return Connect4(ctx, c, "", "a.test:0") }, "", ptipc.ErrNotAllowed},
		{"SOCKS4, long name", "", func(ctx context.Context, c net.Conn) error { return Connect4(ctx, c, "", long+":1") }, "", ptipc.ErrNotAllowed},
		{"SOCKS4, NUL", "", func(ctx context.Context, c net.Conn) error { return Connect4(ctx, c, "a\x00", "a.test:1") }, "", ptipc.ErrSettingsTooLarge},
	} {
		t.Run(tt.name, func(t *testing.T) {
			conn := &answering{Conn: near, Reader: *strings.NewReader(tt.answer)}
			err := tt.connect(t.Context(), conn)
			if (err == nil) != (tt.want == nil) || tt.want != nil && !errors.Is(err, tt.want) {
				t.Errorf("got %v, want %v", err, tt.want)
			}
			if string(conn.sent) != tt.sent {
				t.Errorf("sent %q, want %q", conn.sent, tt.sent)
			}
			if conn.Len() > 0 {
				t.Errorf("%d bytes of the answer were not read", conn.Len())
			}
		})
	}
}
