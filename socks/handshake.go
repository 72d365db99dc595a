package socks

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"sync"

	socks5 "github.com/armon/go-socks5"

	"pthost/ptipc"
)

const (
	version = 0x05

	methodNone       = 0x00
	methodLength     = 0x09 // settings with a length
	methodSettings   = 0x80 // settings, raw or with a length
	methodRefused    = 0xff
	loginTaken       = 0x00
	loginRefused     = 0x01
	commandConnect   = 0x01
	commandAssociate = 0x03
	handshakeBuffer  = 2048
	refusedByVersion = "socks: version %d is not SOCKS5"
)

// errSilent marks the end of a handshake that gets no answer: what came is not
// SOCKS5, or the client is gone.
var errSilent = errors.New("no answer")

// errLogin marks a handshake that did not get past username and password.
var errLogin = errors.New("the login is refused")

// A handshake reads greeting, settings and request from a client. Its memory is
// used again for other clients; nothing may point into it once it is released.
type handshake struct {
	conn   net.Conn
	buf    []byte // all bytes that have come
	pos    int    // how many of them have been taken
	method byte   // the answer to the greeting
	owed   bool   // the client has not been told the method
	parser bytes.Reader
	small  [handshakeBuffer]byte
}

var handshakes = sync.Pool{New: func() any { return new(handshake) }}

func newHandshake(conn net.Conn) *handshake {
	h := handshakes.Get().(*handshake)
	h.conn = conn
	h.buf = h.small[:0]
	return h
}

func (h *handshake) release() {
	h.conn, h.buf, h.pos, h.owed = nil, nil, 0, false
	h.parser.Reset(nil)
	handshakes.Put(h)
}

// rest returns a copy of the bytes that came behind the request: early data.
func (h *handshake) rest() []byte { return bytes.Clone(h.buf[h.pos:]) }

// read runs the handshake with the methods that s takes. The error has the class
// that the client is to be told, or is errSilent or errLogin.
func (h *handshake) read(s *Server) (Request, error) {
	method, err := h.readGreeting(s.methods())
	if err != nil {
		return Request{}, err
	}
	var settings ptipc.Opaque
	switch method {
	case methodLength:
		settings, err = h.readLengthSettings()
	case methodSettings:
		settings, err = h.readSettings()
	case methodPassword:
		if settings, err = h.readLogin(s.Login); err != nil {
			return Request{}, fmt.Errorf("%w: %w", errLogin, err)
		}
	}
	if err != nil {
		return Request{}, h.ended(err, ptipc.ErrSettingsTimedOut, ptipc.ErrSettingsNotJSON) // SOCKS-6
	}
	request := Request{Settings: settings, Client: h.conn}
	if err := h.readRequest(&request, s.Bound, s.Plain && s.Associate != nil); err != nil {
		return Request{}, h.ended(err, ptipc.ErrTimedOut, ptipc.ErrGeneral)
	}
	return request, nil
}

// ended gives a class to the end of the input: timeout when it did not come in
// time, and truncated when the client ended its stream, and may still read.
func (h *handshake) ended(err error, timeout, truncated ptipc.Class) error {
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded):
		return ptipc.WithClass(timeout, err)
	case errors.Is(err, io.EOF):
		return ptipc.WithClass(truncated, err)
	}
	return err
}

func (h *handshake) readGreeting(known []byte) (byte, error) {
	b, err := h.next(2)
	if err != nil {
		return 0, fmt.Errorf("socks: %w to a greeting that did not come whole: %w", errSilent, err)
	}
	if b[0] != version {
		return 0, fmt.Errorf(refusedByVersion+": %w", b[0], errSilent)
	}
	offered, err := h.next(int(b[1]))
	if err != nil {
		return 0, fmt.Errorf("socks: %w to a greeting that did not come whole: %w", errSilent, err)
	}
	h.method, h.owed = chooseMethod(offered, known), true
	if h.method == methodRefused {
		return 0, fmt.Errorf("socks: none of the offered methods % x is known", offered)
	}
	return h.method, nil
}

// methods are those that the server takes, the preferred ones first.
func (s *Server) methods() []byte {
	switch {
	case s.Login != nil:
		return []byte{methodPassword, methodNone}
	case s.Plain:
		return []byte{methodNone}
	}
	return []byte{methodSettings, methodLength, methodNone}
}

// chooseMethod lets settings win whatever the order of the client (SOCKS-1).
func chooseMethod(offered, known []byte) byte {
	for _, m := range known {
		if bytes.IndexByte(offered, m) >= 0 {
			return m
		}
	}
	return methodRefused
}

func (h *handshake) readSettings() (ptipc.Opaque, error) {
	b, err := h.peek(1)
	if err != nil {
		return nil, err
	}
	if b[0] == 0 { // SOCKS-3: no JSON begins with NUL
		return h.readLengthSettings()
	}
	// SOCKS-4. The scanner goes on where it stopped when more bytes come.
	var scan scanner
	for end := h.pos; ; {
		fresh := h.buf[end:min(len(h.buf), h.pos+maxSettings)]
		n, err := scan.feed(fresh)
		if err != nil {
			return nil, err
		}
		end += n
		if scan.done {
			return h.takeSettings(end - h.pos)
		}
		if end-h.pos == maxSettings {
			return nil, ptipc.ErrSettingsTooLarge
		}
		if err := h.fill(); err != nil {
			return nil, err
		}
	}
}

func (h *handshake) readLengthSettings() (ptipc.Opaque, error) {
	b, err := h.next(4)
	if err != nil {
		return nil, err
	}
	n := binary.BigEndian.Uint32(b)
	if n > maxSettings { // SOCKS-3: before anything of that length is read or made
		return nil, ptipc.ErrSettingsTooLarge
	}
	if _, err := h.peek(int(n)); err != nil {
		return nil, err
	}
	return h.takeSettings(int(n))
}

func (h *handshake) takeSettings(n int) (ptipc.Opaque, error) {
	b, err := h.next(n)
	if err != nil {
		return nil, err
	}
	settings, err := checkSettings(b)
	return bytes.Clone(settings), err
}

// readLogin reads username and password (RFC 1929), and answers them once login has
// made settings of them.
func (h *handshake) readLogin(login func(username, password string) (ptipc.Opaque, error)) (ptipc.Opaque, error) {
	b, err := h.next(2)
	if err != nil {
		return nil, err
	}
	if b[0] != passwordVersion {
		return nil, fmt.Errorf("socks: a login of version %d is not that of RFC 1929", b[0])
	}
	if b, err = h.next(int(b[1]) + 1); err != nil {
		return nil, err
	}
	username := string(b[:len(b)-1])
	if b, err = h.next(int(b[len(b)-1])); err != nil {
		return nil, err
	}
	settings, err := login(username, string(b))
	if err != nil {
		return nil, err
	}
	answer := []byte{version, h.method, passwordVersion, loginTaken}
	if !h.owed {
		answer = answer[2:]
	}
	h.owed = false
	_, err = h.conn.Write(answer)
	return settings, err
}

func (h *handshake) readRequest(r *Request, bound, associates bool) error {
	b, err := h.peek(4)
	if err != nil {
		return err
	}
	if b[0] != version {
		return fmt.Errorf("socks: a request of version %d is not SOCKS5: %w", b[0], ptipc.ErrGeneral)
	}
	r.associate = associates && b[1] == commandAssociate
	if b[1] != commandConnect && !r.associate { // SOCKS-7
		return fmt.Errorf("socks: command %d is not CONNECT: %w", b[1], ptipc.ErrCommand)
	}
	n := 4 + 2
	switch b[3] {
	case addressIPv4:
		n += net.IPv4len
	case addressIPv6:
		n += net.IPv6len
	case addressName:
		if r.associate { // PKT-10
			return fmt.Errorf("socks: datagrams are associated with an address, not with a name: %w", ptipc.ErrAddressType)
		}
		if b, err = h.peek(5); err != nil {
			return err
		}
		n += 1 + int(b[4])
	default: // SOCKS-7
		return fmt.Errorf("socks: address type %d is unknown: %w", b[3], ptipc.ErrAddressType)
	}
	if b, err = h.next(n); err != nil {
		return err
	}
	h.parser.Reset(b)
	request, err := socks5.NewRequest(&h.parser)
	if err != nil {
		return fmt.Errorf("socks: cannot parse the request: %w", err)
	}
	if r.associate {
		r.Dest = net.JoinHostPort(request.DestAddr.IP.String(), strconv.Itoa(request.DestAddr.Port))
		return nil
	}
	r.Dest, err = destination(request.DestAddr, bound)
	return err
}

// next takes n bytes. They are valid until the next call.
func (h *handshake) next(n int) ([]byte, error) {
	b, err := h.peek(n)
	if err == nil {
		h.pos += n
	}
	return b, err
}

// peek waits until n bytes are there, and does not take them.
func (h *handshake) peek(n int) ([]byte, error) {
	for len(h.buf)-h.pos < n {
		if err := h.fill(); err != nil {
			return nil, err
		}
	}
	return h.buf[h.pos : h.pos+n], nil
}

// fill reads what is there, at least a byte, so that a handshake may come whole or in
// pieces (SOCKS-5). The method must have been answered
// by then: the client may be waiting for it. When all has come at once there is
// no need to, and one write answers everything.
func (h *handshake) fill() error {
	if h.owed {
		if _, err := h.conn.Write([]byte{version, h.method}); err != nil {
			return fmt.Errorf("socks: %w, the client is gone: %w", errSilent, err)
		}
		h.owed = false
	}
	if len(h.buf) == cap(h.buf) {
		// SOCKS-3: memory grows with what has come, never with what was promised.
		bigger := make([]byte, len(h.buf), 2*cap(h.buf))
		copy(bigger, h.buf)
		h.buf = bigger
	}
	n, err := h.conn.Read(h.buf[len(h.buf):cap(h.buf)])
	h.buf = h.buf[:len(h.buf)+n]
	if n > 0 {
		return nil
	}
	return err
}
