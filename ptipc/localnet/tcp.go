package localnet

import (
	"context"
	"fmt"
	"net"
)

// ListenTCP listens on a loopback ip:port, where port 0 lets the system choose;
// any other address is an error that wraps [ErrAddr] (LIFE-11).
func ListenTCP(addr string) (*net.TCPListener, error) {
	tcp, err := parseLoopback(addr)
	if err != nil {
		return nil, err
	}
	// Keep-alives cannot find out anything on the loopback, where a peer's end is
	// always seen, and MPTCP only makes accepting slower.
	config := net.ListenConfig{KeepAlive: -1}
	config.SetMultipathTCP(false)
	l, err := config.Listen(context.Background(), "tcp", tcp.String())
	if err != nil {
		return nil, fmt.Errorf("localnet: %w; choose an address that is free, or port 0", err)
	}
	return l.(*net.TCPListener), nil
}

// DialTCP connects to a loopback address. ctx bounds the dial. An address of a
// unix socket is an error that wraps [ErrAddr]: [Dir.Dial] takes those.
func DialTCP(ctx context.Context, addr Addr) (*net.TCPConn, error) {
	if !addr.tcp.IsValid() {
		return nil, fmt.Errorf("localnet: dial %q over TCP: %w", addr, ErrAddr)
	}
	dialer := net.Dialer{KeepAlive: -1}
	c, err := dialer.DialContext(ctx, "tcp", addr.tcp.String())
	if err != nil {
		return nil, fmt.Errorf("localnet: %w", err)
	}
	return c.(*net.TCPConn), nil
}
