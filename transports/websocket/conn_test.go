package websocket

import (
	"net"
	"testing"

	"golang.org/x/net/nettest"
)

func TestConnIsANetConn(t *testing.T) {
	for _, scheme := range []string{"ws", "wss"} {
		t.Run(scheme, func(t *testing.T) {
			p := newPair(t, scheme)
			for _, first := range []string{"client", "server"} {
				t.Run(first, func(t *testing.T) {
					nettest.TestConn(t, func() (c1, c2 net.Conn, stop func(), err error) {
						a, b := p.connect(t)
						if first == "server" {
							a, b = b, a
						}
						return a, b, func() { a.Close(); b.Close() }, nil
					})
				})
			}
		})
	}
}
