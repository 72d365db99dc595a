package bench

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strconv"
	"strings"

	"pthost/ptipc"
	"pthost/ptipc/localnet"
)

// The roles of [RunPeer].
const (
	roleFar    = "far"    // far IP:PORT: the far end
	roleRelay  = "relay"  // relay IP:PORT [DIR]: a relay to that address, on a unix socket in DIR if that is given
	roleSOCKS5 = "socks5" // socks5: a proxy
)

// What the far end does is the first byte of a connection: one address serves
// every measurement, also where an author's own server leads there.
const (
	modeSource = 'd' // writes for as long as it can
	modeSink   = 'u' // reads until the end
	modeEcho   = 'e' // sends every byte back
	modeHello  = 'h' // answers with one byte and waits for the end
)

const bulkBuffer = 256 << 10

// RunPeer is the main function of the processes that Run starts with
// [Config].Peer. args are what follows it. It writes the address that it listens
// on to stdout, and returns when stdin ends.
func RunPeer(ctx context.Context, args []string, stdin io.Reader, stdout io.Writer) error {
	if len(args) == 2 && (args[0] == rolePacketFar || args[0] == rolePacketRelay) {
		return runPacketPeer(ctx, args[0], args[1], stdin, stdout)
	}
	listen, dir, serve := "127.0.0.1:0", "", serveSOCKS5
	switch {
	case len(args) == 2 && args[0] == roleFar:
		listen, serve = args[1], serveFar
	case (len(args) == 2 || len(args) == 3) && args[0] == roleRelay:
		serve = func(ctx context.Context, conn stream) { serveRelay(ctx, conn, args[1]) }
		if len(args) == 3 {
			dir = args[2]
		}
	case len(args) == 1 && args[0] == roleSOCKS5:
	default:
		return fmt.Errorf("a peer is started by the bench, and not by hand: %w", ptipc.ExitUsage)
	}
	listener, err := listenPeer(ctx, listen, dir)
	if err != nil {
		return err
	}
	defer listener.Close()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() {
		_, _ = io.Copy(io.Discard, stdin)
		cancel()
	}()
	defer context.AfterFunc(ctx, func() { _ = listener.Close() })()
	if _, err := fmt.Fprintln(stdout, listener.Addr()); err != nil {
		return err
	}
	for {
		conn, err := listener.Accept()
		if err != nil {
			if ctx.Err() != nil {
				return nil
			}
			return err
		}
		go serve(ctx, conn.(stream))
	}
}

// A stream is a *net.TCPConn or a *net.UnixConn.
type stream interface {
	net.Conn
	CloseWrite() error
}

// relaySocket is the name of a relay's unix socket.
const relaySocket = "relay.sock"

func listenPeer(ctx context.Context, addr, dir string) (net.Listener, error) {
	if dir != "" {
		d, err := localnet.OpenDir(dir)
		if err != nil {
			return nil, err
		}
		defer d.Close()
		return d.Listen(relaySocket)
	}
	// MPTCP only makes accepting slower.
	var config net.ListenConfig
	config.SetMultipathTCP(false)
	return config.Listen(ctx, "tcp", addr)
}

func serveFar(_ context.Context, conn stream) {
	defer conn.Close()
	var b [1]byte
	if _, err := conn.Read(b[:]); err != nil {
		return
	}
	switch b[0] {
	case modeSource:
		buf := make([]byte, bulkBuffer)
		for {
			if _, err := conn.Write(buf); err != nil {
				return
			}
		}
	case modeSink:
		buf := make([]byte, bulkBuffer)
		for {
			if _, err := conn.Read(buf); err != nil {
				return
			}
		}
	case modeEcho:
		echo(conn)
	case modeHello:
		if _, err := conn.Write(b[:]); err == nil {
			_, _ = conn.Read(b[:])
		}
	}
}

// serveRelay is what a Go programmer writes without thinking of speed, and the
// net package makes it splice.
func serveRelay(ctx context.Context, conn stream, dest string) {
	defer conn.Close()
	var d net.Dialer
	wire, err := d.DialContext(ctx, "tcp", dest)
	if err != nil {
		return
	}
	defer wire.Close()
	join(conn, wire.(stream))
}

func join(a, b stream) {
	back := make(chan struct{})
	go func() {
		defer close(back)
		_, _ = io.Copy(a, b)
		_ = a.CloseWrite()
	}()
	_, _ = io.Copy(b, a)
	_ = b.CloseWrite()
	<-back
}

// serveSOCKS5 is a SOCKS5 server with nothing in it that is not needed: no
// authentication, no limits, no deadlines. It takes a greeting and a request that
// come in one segment.
func serveSOCKS5(ctx context.Context, conn stream) {
	defer conn.Close()
	var buf [512]byte
	have := 0
	// need waits until n bytes are there.
	need := func(n int) bool {
		m, err := io.ReadAtLeast(conn, buf[have:], max(0, n-have))
		have += m
		return err == nil
	}
	if !need(2) || buf[0] != 5 || !need(2+int(buf[1])) {
		return
	}
	if _, err := conn.Write([]byte{5, 0}); err != nil {
		return
	}
	have = copy(buf[:], buf[2+int(buf[1]):have])
	if !need(5) || buf[0] != 5 || buf[1] != 1 {
		return
	}
	end, host := 0, ""
	switch buf[3] {
	case 1:
		end = 4 + 4
	case 3:
		end = 5 + int(buf[4])
	case 4:
		end = 4 + 16
	default:
		return
	}
	if !need(end + 2) {
		return
	}
	if buf[3] == 3 {
		host = string(buf[5:end])
	} else {
		ip, _ := netip.AddrFromSlice(buf[4:end]) // has 4 or 16 bytes
		host = ip.String()
	}
	var d net.Dialer
	wire, err := d.DialContext(ctx, "tcp", net.JoinHostPort(host, strconv.Itoa(int(binary.BigEndian.Uint16(buf[end:])))))
	if err != nil {
		return
	}
	defer wire.Close()
	if _, err := conn.Write([]byte{5, 0, 0, 1, 0, 0, 0, 0, 0, 0}); err != nil {
		return
	}
	if have > end+2 {
		if _, err := wire.Write(buf[end+2 : have]); err != nil {
			return
		}
	}
	join(conn, wire.(stream))
}

// connectSOCKS5 is the client's side. settings is the method's JSON object; nil
// offers method 0x00. An ordinary client waits for the answer to its greeting
// before it sends the request; with settings there is nothing to wait for.
func connectSOCKS5(conn net.Conn, settings []byte, dest string, oneWrite bool) error {
	method := byte(0)
	if settings != nil {
		method = 0x80 // SOCKS-2
	}
	greeting := append([]byte{5, 1, method}, settings...)
	request, err := appendRequest(nil, dest)
	if err != nil {
		return err
	}
	answer := make([]byte, 2+10)
	if oneWrite {
		_, err = conn.Write(append(greeting, request...))
	} else {
		_, err = conn.Write(greeting)
	}
	if err != nil {
		return err
	}
	// The answers of servers that are measured here bind IPv4, as SOCKS-8 demands of
	// a child, so their size is known.
	wait := 2
	if oneWrite {
		wait = len(answer)
	}
	n, err := io.ReadAtLeast(conn, answer[:wait], wait)
	if n >= 2 && (answer[0] != 5 || answer[1] != method) {
		return fmt.Errorf("the server answers % x to a greeting with method 0x%02x", answer[:2], method)
	}
	if err != nil {
		return whole(err, answer[:n])
	}
	if !oneWrite {
		if _, err := conn.Write(request); err != nil {
			return err
		}
		if n, err = io.ReadFull(conn, answer[2:]); err != nil {
			return whole(err, answer[:2+n])
		}
	}
	if answer[3] != 0 || answer[5] != 1 {
		return fmt.Errorf("the server replies % x", answer[2:])
	}
	return nil
}

func whole(err error, answer []byte) error {
	if errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	return fmt.Errorf("no whole answer, but % x: %w", answer, err)
}

// appendRequest asks for dest, or for what a bound transport takes (SOCKS-11).
func appendRequest(b []byte, dest string) ([]byte, error) {
	b = append(b, 5, 1, 0)
	if dest == "" {
		return append(append(b, 4), make([]byte, 16+2)...), nil
	}
	ap, err := netip.ParseAddrPort(dest)
	if err != nil {
		return nil, err
	}
	kind := byte(1)
	if ap.Addr().Is6() {
		kind = 4
	}
	b = append(append(b, kind), ap.Addr().AsSlice()...)
	return binary.BigEndian.AppendUint16(b, ap.Port()), nil
}

// freePort is a port that nobody has just now, for programs that cannot choose one
// themselves.
func freePort(ctx context.Context) (string, error) {
	var config net.ListenConfig
	listener, err := config.Listen(ctx, "tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	defer listener.Close()
	_, port, err := net.SplitHostPort(listener.Addr().String())
	return port, err
}

// peerAddr reads what RunPeer has written.
func peerAddr(line string) (string, error) {
	line = strings.TrimSpace(line)
	if line == "unix:"+relaySocket {
		return line, nil
	}
	ap, err := netip.ParseAddrPort(line)
	if err != nil {
		return "", fmt.Errorf("a peer of the bench did not start: it wrote %q", line)
	}
	if ap.Addr().IsUnspecified() {
		ap = netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), ap.Port())
	}
	return ap.String(), nil
}
