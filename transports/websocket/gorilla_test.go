package websocket

import (
	"bufio"
	"crypto/sha1"
	"encoding/base64"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"time"

	"github.com/gorilla/websocket"
)

// A replay is a connection that gives the bytes of a reader and takes all others.
type replay struct{ io.Reader }

func (*replay) Write(p []byte) (int, error)      { return len(p), nil }
func (*replay) Close() error                     { return nil }
func (*replay) LocalAddr() net.Addr              { return &net.TCPAddr{} }
func (*replay) RemoteAddr() net.Addr             { return &net.TCPAddr{} }
func (*replay) SetDeadline(time.Time) error      { return nil }
func (*replay) SetReadDeadline(time.Time) error  { return nil }
func (*replay) SetWriteDeadline(time.Time) error { return nil }

// A hijack hands a connection to an Upgrader.
type hijack struct {
	*httptest.ResponseRecorder
	c net.Conn
}

func (h *hijack) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	return h.c, bufio.NewReadWriter(bufio.NewReaderSize(h.c, 16), bufio.NewWriterSize(h.c, 512)), nil
}

// gorillaServer is gorilla's server side on c, as if a client had just opened it.
func gorillaServer(c net.Conn) (*websocket.Conn, error) {
	r := httptest.NewRequest(http.MethodGet, "/", nil)
	r.Header = http.Header{
		"Connection":            {"Upgrade"},
		"Upgrade":               {"websocket"},
		"Sec-Websocket-Version": {"13"},
		"Sec-Websocket-Key":     {"dGhlIHNhbXBsZSBub25jZQ=="},
	}
	return new(websocket.Upgrader).Upgrade(&hijack{httptest.NewRecorder(), c}, r, nil)
}

// An opened connection swallows its first Write: the response to a handshake
// that the peer has behind it.
type opened struct {
	net.Conn
	done bool
}

func (o *opened) Write(p []byte) (int, error) {
	if !o.done {
		o.done = true
		return len(p), nil
	}
	return o.Conn.Write(p)
}

// acceptKey is RFC 6455's answer to a key.
func acceptKey(key string) string {
	sum := sha1.Sum([]byte(key + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"))
	return base64.StdEncoding.EncodeToString(sum[:])
}
