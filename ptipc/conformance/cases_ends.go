package conformance

import (
	"errors"
	"io"
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
