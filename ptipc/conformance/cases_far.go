package conformance

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"syscall"
	"time"

	"pthost/ptipc/localnet"
)

// farCases are about both ends of a connection, the far one included.
var farCases = []Case{
	must("SOCKS-13/name", func(t *trial) {
		c := t.child()
		t.free(c)
		_, port, _ := net.SplitHostPort(t.suite.echo.addr())
		switch w, code := t.ask(c, "localhost:"+port); code {
		case badType, badCommand, notAllowed:
			t.fell("a name to be taken as a destination", "reply %02x to localhost:%s", code, port)
		case granted:
			w.echo("by name")
		}
	}),
	must("SOCKS-14/hang-up", func(t *trial) { t.hangsUp((*wire).close) }),
	must("SOCKS-14/end-without-early-data", func(t *trial) { t.hangsUp((*wire).closeWrite) }),
	must("SOCKS-14/end-after-early-data", func(t *trial) {
		c := t.child()
		full := t.unanswering(c)
		w := t.begin(c)
		w.send(request(full.addr), []byte("early"))
		full.dialed()
		w.closeWrite()
		t.pause()
		far, got := full.accept()
		if got != "early" {
			t.fell(`"early" and the end of the stream at the destination`, "%q and the end", got)
		}
		far.send([]byte("answer"))
		w.replied("a request whose client has half-closed after early data", granted)
		w.bytes([]byte("answer"), "the destination's answer, after the half-close")
	}),
	must("SOCKS-15/client-first", func(t *trial) {
		c := t.child()
		dest, accept := t.destination(c)
		w := t.open(c, dest)
		far := accept()
		w.send([]byte("question"))
		far.bytes([]byte("question"), "what the client has sent")
		w.closeWrite()
		far.end("the end of the client's stream at the destination")
		far.send([]byte("answer"))
		w.bytes([]byte("answer"), "the answer, after the client's half-close")
		far.closeWrite()
		w.end("the end of the destination's stream")
	}),
	must("SOCKS-15/far-end-first", func(t *trial) {
		c := t.child()
		dest, accept := t.destination(c)
		w := t.open(c, dest)
		far := accept()
		far.send([]byte("hello"))
		w.bytes([]byte("hello"), "what the destination has sent")
		far.closeWrite()
		w.end("the end of the destination's stream")
		w.send([]byte("late"))
		far.bytes([]byte("late"), "what the client sends after the destination's half-close")
		w.closeWrite()
		far.end("the end of the client's stream at the destination")
	}),
	must("SOCKS-15/broken-far-end", func(t *trial) {
		c := t.child()
		dest, accept := t.destination(c)
		w := t.open(c, dest)
		w.tcp()
		far := accept()
		far.send([]byte("part"))
		w.bytes([]byte("part"), "what the destination has sent")
		t.breaks(far.tcp())
		if b, err := w.try(1, t.suite.patience); !errors.Is(err, syscall.ECONNRESET) {
			t.fell("a reset at the client, since the destination's stream broke", "% x, %v", b, err)
		}
	}),
	must("SOCKS-15/broken-client", func(t *trial) {
		c := t.child()
		dest, accept := t.destination(c)
		w := t.open(c, dest)
		far := accept()
		w.send([]byte("part"))
		far.bytes([]byte("part"), "what the client has sent")
		t.breaks(w.tcp())
		if b, err := far.try(1, t.suite.patience); !errors.Is(err, syscall.ECONNRESET) {
			t.fell("a reset at the destination, since the client's stream broke", "% x, %v", b, err)
		}
	}),
	must("SOCKS-15/bulk", func(t *trial) {
		// More than fits into buffers on the way, so that reading and writing alternate.
		const size = 4 << 20
		c := t.child()
		t.echoing(c)
		w := t.open(c, t.dest(c))
		_ = w.conn.SetDeadline(time.Now().Add(t.suite.patience + limit))
		sent := make(chan error, 1)
		go func() {
			b := make([]byte, 64<<10)
			for n := 0; n < size; n += len(b) {
				for i := range b {
					b[i] = byte((n + i) % 251)
				}
				if _, err := w.conn.Write(b); err != nil {
					sent <- err
					return
				}
			}
			sent <- w.conn.(interface{ CloseWrite() error }).CloseWrite()
		}()
		got, err := io.ReadAll(w.conn)
		if serr := <-sent; err == nil {
			err = serr
		}
		if err != nil || len(got) != size {
			t.fell("4 MiB back from the echo server, and the end of the stream", "%d bytes, %v", len(got), err)
		}
		for i, b := range got {
			if b != byte(i%251) {
				t.fell("the same bytes back from the echo server", "another one at %d", i)
			}
		}
	}),
}

var errCases = []Case{
	must("ERR-1/refused", func(t *trial) {
		c := t.child()
		t.free(c)
		if _, code := t.ask(c, t.nobody()); code != connRefused {
			t.fell("reply 05 for a port on which nobody listens", "reply %02x", code)
		}
	}),
	must("ERR-1/unknown-name", func(t *trial) {
		c := t.child()
		t.free(c)
		w := t.begin(c)
		w.send(request(grease() + ".invalid:80"))
		b, err := w.try(2, t.suite.patience+limit)
		if errors.Is(err, os.ErrDeadlineExceeded) {
			t.cannot("the name servers of this machine take too long")
		}
		// A name server can fail in several ways.
		if err != nil || b[1] != 1 && b[1] != 3 && b[1] != 4 && b[1] != 6 {
			t.fell("reply 04 for a name that does not exist, or 01, 03 or 06", "% x, %v", b, err)
		}
	}),
	must("ERR-2/same-class", func(t *trial) {
		c := t.child()
		t.free(c)
		nobody := t.nobody()
		for _, h := range t.allFramings(t.settings()) {
			if _, code := t.shake(c, h, nobody); code != connRefused {
				t.fell("reply 05 however the settings come", "reply %02x under method %02x", code, h.method)
			}
		}
	}),
}

// breaks resets a connection.
func (t *trial) breaks(conn *net.TCPConn) {
	t.showText("reset")
	t.need(conn.SetLinger(0))
	conn.Close()
}

// A fullServer is a destination whose queue is full, so that a dial neither
// succeeds nor fails.
type fullServer struct {
	t        *trial
	c        *child
	listener *net.TCPListener
	addr     string
	fillers  map[string]bool // who has filled the queue, by address
}

// unanswering ends the case where such a destination cannot be made.
func (t *trial) unanswering(c *child) *fullServer {
	t.free(c)
	if t.suite.subject.Dest != "" {
		t.cannot("the child does not reach this machine's loopback (Subject.Dest)")
	}
	listener, err := localnet.ListenTCP("127.0.0.1:0")
	t.need(err)
	t.onEnd(func() { listener.Close() })
	t.need(fill(listener))
	full := &fullServer{t, c, listener, listener.Addr().String(), map[string]bool{}}
	addr, err := localnet.ParseAddr(full.addr)
	t.need(err)
	for range 8 {
		ctx, cancel := context.WithTimeout(t.ctx, 100*time.Millisecond)
		conn, err := localnet.DialTCP(ctx, addr)
		cancel()
		if err != nil {
			return full
		}
		t.onEnd(func() { conn.Close() })
		full.fillers[conn.LocalAddr().String()] = true
	}
	t.cannot("this system does not leave a dial to a full queue waiting")
	return nil
}

// lookPeriod is slow because the system looks at all of its sockets.
const lookPeriod = 20 * time.Millisecond

func (f *fullServer) dialing() bool {
	yes, err := dialing(netip.MustParseAddrPort(f.addr))
	f.t.need(err)
	return yes
}

// dialed waits until the child dials.
func (f *fullServer) dialed() {
	if !f.t.untilEvery(lookPeriod, f.dialing) {
		f.t.cannot("the child does not dial the destination over TCP from this machine")
	}
}

// accept makes room in the queue until the child's connection has come, and reads
// all that comes on it.
func (f *fullServer) accept() (far *wire, got string) {
	const expected = "the dial to go on after the half-close, with the early data and the end"
	t := f.t
	deadline := time.Now().Add(t.suite.patience + limit) // the system dials again in growing steps
	_ = f.listener.SetDeadline(deadline)
	for {
		conn, err := f.listener.AcceptTCP()
		if err != nil {
			t.fell(expected, "no connection with bytes at the destination: %v", err)
		}
		t.onEnd(func() { conn.Close() })
		if f.fillers[conn.RemoteAddr().String()] {
			continue
		}
		_ = conn.SetDeadline(deadline)
		b, err := io.ReadAll(io.LimitReader(conn, 100))
		if len(b) == 0 && err == nil {
			continue // a dial of the suite's that had succeeded when it was given up
		}
		if err != nil {
			t.fell(expected, "%q and then: %v", b, err)
		}
		t.show("far end <", b)
		return &wire{t: t, who: "far end", conn: conn}, string(b)
	}
}

// hangsUp demands that a dial ends when its client does what it is told to.
func (t *trial) hangsUp(how func(*wire)) {
	c := t.child()
	full := t.unanswering(c)
	w := t.begin(c)
	w.send(request(full.addr))
	full.dialed()
	how(w)
	if !t.untilEvery(lookPeriod, func() bool { return !full.dialing() }) {
		t.fell("the end of the dial when the client hangs up", "it goes on after %v", t.suite.patience)
	}
}
