package turn

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/pion/stun"
)

// A rawClient is a TURN client that does just what it is told.
type rawClient struct {
	*net.UDPConn
	credentials Credentials
	nonce       []byte
}

func newRawClient(t testing.TB, server netip.AddrPort, c Credentials) *rawClient {
	t.Helper()
	conn, err := net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(server))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return &rawClient{UDPConn: conn, credentials: c}
}

func (c *rawClient) build(method stun.Method, setters ...stun.Setter) *stun.Message {
	all := append([]stun.Setter{stun.TransactionID, stun.NewType(method, stun.ClassRequest)}, setters...)
	if c.nonce != nil {
		all = append(all, stun.NewUsername(c.credentials.Username), stun.NewRealm(c.credentials.Realm),
			attribute(stun.AttrNonce, c.nonce...), c.credentials.key())
	}
	return stun.MustBuild(all...)
}

// exchange sends a datagram and returns the next STUN message.
func (c *rawClient) exchange(b []byte) (*message, error) {
	_ = c.SetDeadline(time.Now().Add(10 * time.Second))
	if _, err := c.Write(b); err != nil {
		return nil, err
	}
	return c.next()
}

func (c *rawClient) next() (*message, error) {
	buf := make([]byte, maxDatagram)
	n, err := c.Read(buf)
	if err != nil {
		return nil, err
	}
	m := new(message)
	return m, m.parse(buf[:n])
}

// request makes a request, with credentials, and returns the answer.
func (c *rawClient) request(method stun.Method, setters ...stun.Setter) (*message, error) {
	for range 3 {
		m, err := c.exchange(c.build(method, setters...).Raw)
		if err != nil {
			return nil, err
		}
		if code := m.code(); (code == 401 && c.nonce == nil || code == 438) && m.nonce != nil {
			c.nonce = m.nonce
			continue
		}
		return m, nil
	}
	return nil, errors.New("no nonce is good enough")
}

func (c *rawClient) succeed(method stun.Method, setters ...stun.Setter) error {
	m, err := c.request(method, setters...)
	if err == nil && m.class != stun.ClassSuccessResponse {
		err = fmt.Errorf("%s: %d", method, m.code())
	}
	return err
}

var requestUDP = attribute(stun.AttrRequestedTransport, 17, 0, 0, 0)

func channelNumber(n uint16) stun.Setter {
	return uint32Attribute(stun.AttrChannelNumber, uint32(n)<<16)
}

func peerAddress(a netip.AddrPort) stun.Setter { return addressAttribute{stun.AttrXORPeerAddress, a} }

// open allocates and binds the first channel.
func (c *rawClient) open(peer netip.AddrPort) error {
	if err := c.succeed(stun.MethodAllocate, requestUDP); err != nil {
		return err
	}
	return c.succeed(stun.MethodChannelBind, channelNumber(minChannel), peerAddress(peer))
}

// echo is the peer: what comes goes back.
func echo(sock socket) {
	from := newEndpoint(netip.AddrPortFrom(netip.IPv4Unspecified(), 0))
	for {
		b, err := sock.receive()
		if err != nil {
			return
		}
		for i := range b.packets {
			p := &b.packets[i]
			if from.port != p.from {
				from = newEndpoint(p.from)
			}
			b.queue(p, p.data, len(p.data), from)
		}
		_, _, _ = sock.send(b)
		b.release()
	}
}
