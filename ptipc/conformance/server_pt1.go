package conformance

import (
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"

	ptwire "pthost/adapters/pt1/wire"
	"pthost/ptipc/localnet"
)

// An orConn is a connection that a managed server has brought.
type orConn struct {
	*net.TCPConn
	extended bool // to the Extended ORPort
}

// serveManaged starts a managed server that brings its connections to the suite, which
// has an ORPort and an Extended ORPort (PT1-28). l.tell may take one of them away.
func (t *trial) serveManaged(l launch) *server {
	usual := l.usual()
	if usual && t.suite.unready {
		t.cannot("the child did not get ready before")
	}
	s := &server{t: t, post: newPost(), conns: make(chan net.Conn), over: make(chan struct{})}
	dir, err := os.MkdirTemp(t.suite.base, "cookie")
	t.need(err)
	cookiePath := filepath.Join(dir, "cookie")
	s.cookie, err = ptwire.WriteCookie(cookiePath, -1, -1)
	t.need(err)
	addrs := map[bool]string{}
	for _, extended := range []bool{false, true} {
		listener, err := localnet.ListenTCP("127.0.0.1:0")
		t.need(err)
		addrs[extended] = listener.Addr().String()
		accepting := make(chan struct{})
		t.onEnd(func() { listener.Close(); <-accepting })
		go func() {
			defer close(accepting)
			for {
				conn, err := listener.AcceptTCP()
				if err != nil {
					return // closed
				}
				select {
				case s.conns <- orConn{conn, extended}:
				case <-s.over:
					conn.Close()
					return
				}
			}
		}()
	}
	t.onEnd(func() { close(s.over) })
	tell := l.tell
	l.role = Server
	l.tell = func(o order) {
		o[varORPort], o[varExtended], o[varCookie] = addrs[false], addrs[true], cookiePath
		if tell != nil {
			tell(o)
		}
		s.plain = o[varExtended] == ""
	}
	s.child = t.start(l)
	if !t.settled(s.child) {
		t.suite.unready = t.suite.unready || usual
		t.fellUnready(s.child)
	}
	s.method = t.method(s.child)
	if len(t.suite.subject.Generate) > 0 {
		t.client = t.clientOf(s.child)
		s.client = t.start(launch{role: Client, config: t.client})
		t.getsReady(s.client)
	}
	return s
}

// delivered is a connection that a managed server has brought, at the port where it had to.
func (s *server) delivered(conn net.Conn) *delivery {
	or, ok := conn.(orConn)
	if !ok || or.extended == s.plain {
		s.t.fell("a connection to the Extended ORPort, or to the ORPort if there is no other", "one to the wrong port")
	}
	return &delivery{s.t.wire("parent", or.TCPConn, nil), s}
}

// What is said on an Extended ORPort (PT1-10, PT1-11). It is read and written here once
// more, so that no tolerance of the project's own reader is the child's.
const (
	safeCookie   = 0x01
	nonceSize    = 32
	orDone       = 0x0000
	orUserAddr   = 0x0001
	orTransport  = 0x0002
	orOkay       = 0x1000
	orDeny       = 0x1001
	maxORCommand = 16
)

func (s *server) hash(label string, nonces []byte) []byte {
	mac := hmac.New(sha256.New, s.cookie[:])
	mac.Write([]byte("ExtORPort authentication " + label + " hash"))
	mac.Write(nonces)
	return mac.Sum(nil)
}

// prove offers authentication and answers the child's nonce with a proof, a wrong one if
// it is forged.
func (d *delivery) prove(forged bool) (nonces []byte) {
	d.send([]byte{safeCookie, 0})
	d.bytes([]byte{safeCookie}, "authentication of type 01, which was offered")
	nonces = d.read(nonceSize, "a nonce of 32 bytes")
	own := make([]byte, nonceSize)
	_, _ = rand.Read(own) // it never fails
	nonces = append(nonces[:nonceSize:nonceSize], own...)
	proof := d.server.hash("server-to-client", nonces)
	if forged {
		proof[0] ^= 1
	}
	d.send(proof, own)
	return nonces
}

// identify reads who the client is, up to the answer, and returns it as a delivery of
// the dialect Seed would tell it.
func (d *delivery) identify() map[string]any {
	if d.server.plain {
		return nil
	}
	nonces := d.prove(false)
	if got := d.read(sha256.Size, "a proof of the cookie"); !hmac.Equal(got, d.server.hash("client-to-server", nonces)) {
		d.t.fell("a proof of the cookie", "% x", got)
	}
	d.send([]byte{1})
	told := map[string]any{}
	for range maxORCommand {
		head := d.read(4, "a command of the Extended ORPort, and DONE in the end")
		body := string(d.read(int(binary.BigEndian.Uint16(head[2:])), "the body of a command"))
		switch binary.BigEndian.Uint16(head) {
		case orUserAddr:
			told["remote"] = body
		case orTransport:
			told["transport"] = body
		case orDone:
			return told
		}
	}
	d.t.fell("DONE after the commands that say who the client is", "%d commands without it", maxORCommand)
	return nil
}

// agree answers that the connection is taken, or not.
func (d *delivery) agree(ok bool) {
	switch {
	case d.server.plain && !ok:
		d.close()
	case d.server.plain:
	case ok:
		d.send(orCommand(orOkay, ""))
	default:
		d.send(orCommand(orDeny, ""))
	}
}

func orCommand(command uint16, body string) []byte {
	b := binary.BigEndian.AppendUint16(nil, command)
	b = binary.BigEndian.AppendUint16(b, uint16(len(body)))
	return append(b, body...)
}

// silent demands that nothing comes for a moment.
func (w *wire) silent(expected string) {
	if b, err := w.try(1, quiet); !errors.Is(err, os.ErrDeadlineExceeded) {
		w.t.fell(expected, "% x, %v", b, err)
	}
}

// gone demands the end of the connection, by itself or by a reset.
func (w *wire) gone(expected string) {
	b, err := w.try(1, w.t.suite.patience)
	if err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		w.t.fell(expected, "% x, %v", b, err)
	}
}

// unusedPort is a port of the loopback that nobody has just now.
func (t *trial) unusedPort() string {
	listener, err := localnet.ListenTCP("127.0.0.1:0")
	t.need(err)
	defer listener.Close()
	return fmt.Sprint(listener.Addr().(*net.TCPAddr).Port)
}
