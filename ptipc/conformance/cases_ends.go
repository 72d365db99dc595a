package conformance

import (
	"errors"
	"io"
	"net"
	"time"

	"pthost/ptipc/localnet"
)

// endCases are about unix sockets, for children that announce ends=1.
var endCases = []Case{
	must("SOCKS-20/clean", func(t *trial) {
		c := t.marking()
		dest, accept := t.destination(c)
		for _, clientFirst := range []bool{true, false} {
			w := t.open(c, dest)
			far := accept()
			ends := []func(){
				func() {
					w.mark()
					w.closeWrite()
					far.end("the end of the client's stream, which is marked")
				},
				func() {
					far.closeWrite()
					w.end("the end of the destination's stream")
					w.marked("the end of the destination's stream")
				},
			}
			if !clientFirst {
				ends[0], ends[1] = ends[1], ends[0]
			}
			ends[0]()
			ends[1]()
		}
	}),
	must("SOCKS-20/broken-far-end", func(t *trial) {
		c := t.marking()
		dest, accept := t.destination(c)
		for _, half := range []bool{false, true} {
			w := t.open(c, dest)
			far := accept()
			far.send([]byte("part"))
			w.bytes([]byte("part"), "what the destination has sent")
			if half {
				w.mark()
				w.closeWrite()
				far.end("the end of the client's stream, which is marked")
			}
			t.breaks(far.tcp())
			w.broken("the destination's stream broke")
		}
	}),
	must("SOCKS-21/broken-client", func(t *trial) {
		c := t.marking()
		dest, accept := t.destination(c)
		for _, half := range []bool{false, true} {
			w := t.open(c, dest)
			far := accept()
			w.send([]byte("part"))
			far.bytes([]byte("part"), "what the client has sent")
			if half {
				far.closeWrite()
				w.end("the end of the destination's stream")
			}
			w.close()
			if b, err := far.try(1, t.suite.patience); err == nil || errors.Is(err, io.EOF) {
				t.fell("a reset at the destination, since the client has gone without a mark", "% x, %v", b, err)
			}
		}
	}),
	must("SOCKS-24/handed-over", func(t *trial) {
		c := t.marking()
		dest, accept := t.destination(c)
		for _, appFirst := range []bool{true, false} {
			w := t.open(c, dest)
			t.passesOver(w, accept(), appFirst)
		}
	}),
	must("SOCKS-25/broken", func(t *trial) {
		c := t.marking()
		dest, accept := t.destination(c)
		w := t.open(c, dest)
		t.breaksBehind(w, accept())
		w = t.open(c, dest)
		t.isCut(w, accept())
	}),
}

// serverEndCases are about the unix socket to which a server delivers.
var serverEndCases = []Case{
	must("SOCKS-20/delivered", func(t *trial) {
		client, host := t.serveMarked().deliver()
		client.closeWrite()
		host.end("the end of the wire's client's stream")
		host.marked("the end of the wire's client's stream")
		host.mark()
		host.close()
		client.end("the end of the host's stream, which is marked")
	}),
	must("SOCKS-20/broken-wire", func(t *trial) {
		s := t.serveMarked()
		for _, half := range []bool{false, true} {
			client, host := s.deliver()
			client.send([]byte("part"))
			host.bytes([]byte("part"), "what the wire's client has sent")
			if half {
				host.mark()
				host.closeWrite()
				client.end("the end of the host's stream, which is marked")
			}
			t.breaks(client.tcp())
			host.broken("the stream of the wire's client broke")
		}
	}),
	must("SOCKS-21/broken-host", func(t *trial) {
		s := t.serveMarked()
		for _, half := range []bool{false, true} {
			client, host := s.deliver()
			host.send([]byte("part"))
			client.bytes([]byte("part"), "what the host has sent")
			if half {
				client.closeWrite()
				host.end("the end of the wire's client's stream")
			}
			host.close()
			if b, err := client.try(1, t.suite.patience); err == nil || errors.Is(err, io.EOF) {
				t.fell("a stream that breaks on the wire, since the host has gone without a mark", "% x, %v", b, err)
			}
		}
	}),
	must("SOCKS-24/service", func(t *trial) {
		s := t.serveMarked()
		for _, appFirst := range []bool{true, false} {
			client, host := s.deliver()
			t.passesOver(host.wire, client, appFirst)
		}
	}),
	must("SOCKS-25/broken-wire", func(t *trial) {
		s := t.serveMarked()
		client, host := s.deliver()
		t.breaksBehind(host.wire, client)
		client, host = s.deliver()
		t.isCut(host.wire, client)
	}),
}

// A handed is a socket that was handed to the child.
type handed struct {
	app    *wire        // its other end
	socket *net.TCPConn // the host's own descriptor of it
}

// handOver hands the child a socket, as soon as bytes have gone both ways.
func (t *trial) handOver(w, far *wire) *handed {
	w.send([]byte("before"))
	far.bytes([]byte("before"), "what the host has sent on the unix socket")
	far.send([]byte("early"))
	w.bytes([]byte("early"), "what the far end has sent")
	w.lookAtEnd()
	if !w.mine.Takes() {
		t.cannot("the child does not take over sockets")
	}
	listener, err := localnet.ListenTCP("127.0.0.1:0")
	t.need(err)
	defer listener.Close()
	addr, err := localnet.ParseAddr(listener.Addr().String())
	t.need(err)
	conn, err := localnet.DialTCP(t.ctx, addr)
	t.need(err)
	t.onEnd(func() { conn.Close() })
	socket, err := listener.Accept()
	t.need(err)
	t.onEnd(func() { socket.Close() })
	h := &handed{app: &wire{t: t, who: "application", conn: conn}, socket: socket.(*net.TCPConn)}
	far.send([]byte("one, "))
	t.showText(w.who + " > a byte with the application's socket")
	t.need(sendSocket(w.conn, h.socket))
	h.app.send([]byte("more"))
	far.bytes([]byte("more"), "what the application has sent on the socket that was handed over")
	far.send([]byte("two"))
	return h
}

// letGo passes on what the child has sent before, and lets it go on.
func (h *handed) letGo(w *wire) {
	t := w.t
	_ = w.conn.SetReadDeadline(time.Now().Add(t.suite.patience))
	before, err := io.ReadAll(w.conn)
	if err != nil {
		t.fell("the end of the stream on the unix socket", "% x, %v", before, err)
	}
	t.show(w.who+" <", before)
	if w.mine.Marked() {
		t.fell("an end that is not marked: the stream goes on elsewhere", "a mark")
	}
	t.pause()
	if b, err := h.app.try(1, time.Millisecond); err == nil {
		t.fell("nothing on the socket before the host lets the child go on", "% x", b)
	}
	_, err = h.socket.Write(before)
	t.need(err)
	w.send([]byte{0})
	h.app.bytes([]byte("one, two"), "all that the far end has sent, in its order")
}

// passesOver demands that a stream goes on over a socket that is handed over, and ends there.
func (t *trial) passesOver(w, far *wire, appFirst bool) {
	h := t.handOver(w, far)
	h.letGo(w)
	ends := [2][2]*wire{{h.app, far}, {far, h.app}}
	if !appFirst {
		ends[0], ends[1] = ends[1], ends[0]
	}
	for _, way := range ends {
		way[0].closeWrite()
		way[1].end("the end of the stream of the " + way[0].who)
	}
	h.gone(w)
	if !w.mine.Finished() {
		t.fell("the note that all has ended", "none")
	}
}

// breaksBehind demands that the end of a socket that was handed over is not noted when the far end breaks.
func (t *trial) breaksBehind(w, far *wire) {
	socket := far.tcp()
	h := t.handOver(w, far)
	h.letGo(w)
	t.breaks(socket)
	h.gone(w)
	if w.mine.Finished() || w.mine.Marked() {
		t.fell("no note of an end, since the far end's stream broke", "one")
	}
}

// isCut demands that the far end sees it when the host resets a socket that it has handed over.
func (t *trial) isCut(w, far *wire) {
	h := t.handOver(w, far)
	h.letGo(w)
	t.showText(w.who + " > resets the application's connection")
	t.need(disconnect(h.socket))
	if b, err := far.try(1, t.suite.patience); err == nil || errors.Is(err, io.EOF) {
		t.fell("a stream that breaks at the far end", "% x, %v", b, err)
	}
}

// gone demands that the child closes the unix socket.
func (h *handed) gone(w *wire) {
	if !w.t.until(func() bool { return hungUp(w.conn) }) {
		w.t.fell("the child closes the unix socket when all has ended", "it is open")
	}
}

// marking is a child of the case's own that listens on a unix socket and marks the ends
// of streams.
func (t *trial) marking() *child {
	c := t.unixChildWith(true)
	t.marks(c, t.method(c))
	return c
}

// serveMarked is serve for a server that marks the ends of streams.
func (t *trial) serveMarked() *server {
	s := t.serveWith(launch{ends: true})
	t.marks(s.child, s.method)
	return s
}

// deliver is a connection with both of its ends.
func (s *server) deliver() (client *wire, host *delivery) {
	if s.method.proxies() {
		s.t.cannot("the server connects its clients itself")
	}
	p := s.open()
	return p.client, p.host
}

// marks ends the case for a child that does not mark the ends of streams.
func (t *trial) marks(c *child, m method) {
	switch {
	case c.ends == nil:
		t.cannot("this system has no memory to share with a child")
	case !m.ends():
		t.cannot("the child does not announce ends=1")
	}
}

// mark notes that this end is done.
func (w *wire) mark() {
	w.t.showText(w.who + " > marks its end")
	w.lookAtEnd()
	w.mine.Mark()
}

// marked demands that the child has marked the end that was seen.
func (w *wire) marked(what string) {
	w.lookAtEnd()
	if !w.mine.Marked() {
		w.t.fell("a mark for "+what, "none")
	}
}

// broken demands that the stream does not look like one that has ended.
func (w *wire) broken(why string) {
	w.lookAtEnd()
	b, err := w.try(1, w.t.suite.patience)
	if err == nil || errors.Is(err, io.EOF) && w.mine.Marked() {
		w.t.fell("an end without a mark, since "+why, "% x, %v", b, err)
	}
}

// lookAtEnd demands that the connection has a place for marks.
func (w *wire) lookAtEnd() {
	if w.mine == nil {
		w.t.fell("a client's socket with a name that says where its ends are marked", "%v", w.conn.RemoteAddr())
	}
}
