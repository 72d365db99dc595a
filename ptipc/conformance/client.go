package conformance

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strconv"
	"syscall"
	"time"

	"pthost/ptipc/localnet"
)

// The methods and reply codes that the cases name.
const (
	none, lengthOnly, settings, refused byte = 0x00, 0x09, 0x80, 0xff

	granted, notAllowed, connRefused, badCommand, badType byte = 0x00, 0x02, 0x05, 0x07, 0x08
	tooLarge, tooLate, notJSON, settingsRefused           byte = 0x10, 0x11, 0x12, 0x13
)

// anywhere is the destination of a bound factory (SOCKS-11).
const anywhere = "[::]:0"

// A wire is a connection to an announced socket, or one at the far end.
type wire struct {
	t    *trial
	who  string // whose end of it, for the report
	conn net.Conn
	mine *localnet.End // this end; nil where none are marked
}

// wire is one of this case's, which is closed with it.
func (t *trial) wire(who string, conn net.Conn, mine *localnet.End) *wire {
	t.onEnd(func() { conn.Close() })
	t.conns = append(t.conns, conn)
	return &wire{t, who, conn, mine}
}

// hangUp closes all connections of the case, so that a child which is asked to stop has
// none to finish (LIFE-2).
func (t *trial) hangUp() {
	t.showText("all connections are hung up")
	for _, conn := range t.conns {
		conn.Close()
	}
}

// dial connects to the child.
func (t *trial) dial(c *child) *wire {
	if m := t.method(c); t.suite.managed() && m.protocol != "socks5" {
		t.cannot("the child announces the protocol %s, and the suite speaks socks5 alone", m.protocol)
	}
	if addr, err := localnet.ParseAddr(t.method(c).addr); err == nil && addr.Unix() && c.ends != nil {
		return t.dialMarked(c, addr)
	}
	return t.wire("client", t.connect(c), nil)
}

// dialMarked is dial with a place where the ends are marked.
func (t *trial) dialMarked(c *child, addr localnet.Addr) *wire {
	conn, end, err := c.dir.DialEnd(t.ctx, addr.Name(), c.ends)
	if err != nil {
		t.fell("a connection to "+addr.String(), "%v", err)
	}
	return t.wire("client", conn, end)
}

// connect is patient with a socket that does not listen yet: LINE-7 has a case for
// that, as LINE-5 has for addresses to which no child may lead.
func (t *trial) connect(c *child) net.Conn {
	m := t.method(c)
	var conn net.Conn
	var err error
	t.until(func() bool {
		conn, err = connect(t.ctx, c, m)
		return !errors.Is(err, syscall.ECONNREFUSED) || c.ended()
	})
	if errors.Is(err, localnet.ErrAddr) {
		t.cannot("%v", err)
	}
	if err != nil {
		t.fell("a connection to "+m.addr, "%v", err)
	}
	return conn
}

func connect(ctx context.Context, c *child, m method) (net.Conn, error) {
	addr, err := localnet.ParseAddr(m.addr)
	if err != nil {
		return nil, err
	}
	if addr.Unix() {
		return c.dir.Dial(ctx, addr.Name())
	}
	if c.within == nil {
		return localnet.DialTCP(ctx, addr)
	}
	var conn net.Conn
	c.within.run(func() { conn, err = localnet.DialTCP(ctx, addr) })
	return conn, err
}

// send writes the parts as one segment. A write that fails ends nothing: what the
// child answered before is what counts.
func (w *wire) send(parts ...[]byte) {
	var all []byte
	for _, part := range parts {
		all = append(all, part...)
	}
	w.t.show(w.who+" >", all)
	_ = w.conn.SetWriteDeadline(time.Now().Add(w.t.suite.patience))
	if _, err := w.conn.Write(all); err != nil {
		w.t.showText(fmt.Sprintf("%s: %v", w.who, err))
	}
}

// try reads n bytes, or as many as come in time, with the error that ended them.
func (w *wire) try(n int, patience time.Duration) ([]byte, error) {
	_ = w.conn.SetReadDeadline(time.Now().Add(patience))
	b := make([]byte, n)
	n, err := io.ReadFull(w.conn, b)
	if n > 0 {
		w.t.show(w.who+" <", b[:n])
	}
	if err != nil {
		w.t.showText(fmt.Sprintf("%s: %v", w.who, err))
	}
	return b[:n], err
}

// read demands n bytes.
func (w *wire) read(n int, expected string) []byte {
	b, err := w.try(n, w.t.suite.patience)
	if err != nil {
		w.t.fell(expected, "% x and then: %v", b, err)
	}
	return b
}

// bytes demands exactly these.
func (w *wire) bytes(want []byte, expected string) {
	if got := w.read(len(want), expected); string(got) != string(want) {
		w.t.fell(expected, "% x", got)
	}
}

// end demands the end of the stream.
func (w *wire) end(expected string) {
	if b, err := w.try(1, w.t.suite.patience); !errors.Is(err, io.EOF) || len(b) > 0 {
		w.t.fell(expected, "% x and then: %v", b, err)
	}
}

// chosen demands a method in answer to the greeting.
func (w *wire) chosen(method byte) {
	w.bytes([]byte{5, method}, fmt.Sprintf("method %02x in answer to the greeting", method))
}

// reply reads a reply, whatever the bound address is: SOCKS-8 has a case for that.
func (w *wire) reply() byte { return w.replyBytes()[1] }

func (w *wire) replyBytes() []byte {
	const expected = "a reply: 05, a code, 00, an address and a port"
	b := w.read(4, expected)
	if b[0] != 5 || b[2] != 0 {
		w.t.fell(expected, "% x", b)
	}
	n := 0
	switch b[3] {
	case 1:
		n = net.IPv4len
	case 4:
		n = net.IPv6len
	case 3:
		b = append(b, w.read(1, expected)...)
		n = int(b[4])
	default:
		w.t.fell(expected, "address type %d", b[3])
	}
	return append(b, w.read(n+2, expected)...)
}

// replied demands a reply with one of the codes.
func (w *wire) replied(what string, codes ...byte) {
	got := w.reply()
	for _, code := range codes {
		if got == code {
			return
		}
	}
	w.t.fell(fmt.Sprintf("reply % x to %s", codes, what), "reply %02x", got)
}

// echo demands that what is sent comes back.
func (w *wire) echo(text string) {
	w.send([]byte(text))
	w.bytes([]byte(text), fmt.Sprintf("%q back from the echo server", text))
}

// taken waits until the child has read what was sent, so that what follows comes to it
// as a piece of its own, however busy the machine is.
func (w *wire) taken() {
	t := w.t
	var left int
	var err error
	if !t.peeks {
		t.peeks = !t.untilEvery(takenPeriod, func() bool {
			left, err = unread(w.conn)
			return left == 0 || err != nil
		})
	}
	// A child may look at bytes without taking them, and not all systems tell. When there
	// is an error of another kind, the child has hung up.
	if t.peeks || errors.Is(err, errors.ErrUnsupported) {
		t.pause()
	}
}

// takenPeriod is short since most children read at once.
const takenPeriod = 200 * time.Microsecond

// closeWrite ends the outgoing direction.
func (w *wire) closeWrite() {
	w.t.showText(w.who + " > end of the stream")
	if half, ok := w.conn.(interface{ CloseWrite() error }); ok {
		_ = half.CloseWrite() // it fails when the child has hung up, which reading shows
	}
}

// close hangs up.
func (w *wire) close() {
	w.t.showText(w.who + " > hangs up")
	w.conn.Close()
}

// tcp ends the case for sockets that do not tell a stream that broke from one that ended.
func (w *wire) tcp() *net.TCPConn {
	conn, ok := w.conn.(*net.TCPConn)
	if !ok {
		w.t.cannot("the child listens on a unix socket, which cannot tell a stream that broke")
	}
	return conn
}

func greeting(methods ...byte) []byte { return append([]byte{5, byte(len(methods))}, methods...) }

// lengthForm is settings under 0x09, and one form of them under 0x80 (SOCKS-3).
func lengthForm(text string) []byte {
	return append(binary.BigEndian.AppendUint32(nil, uint32(len(text))), text...)
}

// address is ATYP, address and port of host:port.
func address(dest string) []byte {
	host, portText, err := net.SplitHostPort(dest)
	port, perr := strconv.ParseUint(portText, 10, 16)
	if err != nil || perr != nil {
		panic(fmt.Sprintf("the destination %q is not host:port", dest)) // newSuite has checked the subject's
	}
	var b []byte
	ip, err := netip.ParseAddr(host)
	switch {
	case err != nil:
		b = append([]byte{3, byte(len(host))}, host...)
	case ip.Is4():
		b = append([]byte{1}, ip.AsSlice()...)
	default:
		b = append([]byte{4}, ip.AsSlice()...)
	}
	return append(b, byte(port>>8), byte(port))
}

// request is CONNECT to host:port.
func request(dest string) []byte { return append([]byte{5, 1, 0}, address(dest)...) }

// dest is where the cases connect to when they only want it to work.
func (t *trial) dest(c *child) string {
	switch {
	case t.suite.managed():
		return t.managedDest()
	case t.method(c).bound():
		return anywhere
	case t.suite.subject.Dest != "":
		return t.suite.subject.Dest
	}
	return t.suite.echo.addr()
}

// wrongDest is a destination to which no connection can be had. What is no destination
// at all is no request to a managed transport.
func (t *trial) wrongDest() string {
	if !t.suite.managed() {
		return ":1"
	}
	if _, dest := t.connectionSettings(); dest == "" && !t.suite.subject.Free {
		return t.dest(nil)
	}
	return t.nobody()
}

// settings are those that a connection of the subject needs, as raw JSON.
func (t *trial) settings() string {
	return object(t.suite.subject.Settings)
}

// shake runs a handshake step by step, as the simplest of clients would, and
// returns the code of the reply.
func (t *trial) shake(c *child, h framing, dest string) (*wire, byte) {
	w := t.settle(c, h)
	w.send(request(dest))
	return w, w.reply()
}

// begin runs the usual handshake up to the request.
func (t *trial) begin(c *child) *wire { return t.settle(c, t.usual()) }

// settle sends greeting and settings.
func (t *trial) settle(c *child, h framing) *wire {
	w := t.dial(c)
	w.send(greeting(h.method))
	w.chosen(h.method)
	if len(h.bytes) > 0 {
		w.send(h.bytes)
	}
	if h.method == password {
		w.bytes([]byte{1, 0}, "01 00 in answer to username and password")
	}
	return w
}

// usual is how the subject's settings are sent when it does not matter.
func (t *trial) usual() framing {
	if t.suite.managed() {
		return t.managedUsual()
	}
	if t.suite.subject.Settings.Empty() {
		return framing{method: none}
	}
	return framing{settings, []byte(t.settings())}
}

// ask runs the usual handshake.
func (t *trial) ask(c *child, dest string) (*wire, byte) { return t.shake(c, t.usual(), dest) }

// open runs the usual handshake and demands that it succeeds.
func (t *trial) open(c *child, dest string) *wire {
	w, code := t.ask(c, dest)
	if code != granted {
		t.fell("reply 00 for a connection to "+dest, "reply %02x", code)
	}
	return w
}

// echoing ends the case when bytes do not come back from the far end.
func (t *trial) echoing(c *child) {
	if t.method(c).bound() && !t.suite.echoes() {
		t.cannot("nothing is known about where the bound factory leads; give it an echo server and set Subject.Echoes")
	}
}

// echoes reports whether a bound factory leads to an echo server.
func (s *suite) echoes() bool { return s.subject.Echoes || s.far != nil }

// free ends the case for a bound factory.
func (t *trial) free(c *child) {
	if t.method(c).bound() {
		t.cannot("the connection factory is bound")
	}
}
