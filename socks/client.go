package socks

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"

	"pthost/ptipc"
)

// Connect asks the server at the other end of conn for a connection to dest
// with settings. dest is "host:port", where host is an address or a name, or ""
// for a bound transport (SOCKS-11). Once it has returned nil, conn is that
// connection, and nothing behind the reply has been read from it.
//
// The whole handshake is one write. When ctx ends, so does Connect, with its
// cause. An error answers errors.Is for the [ptipc.Class] of its failure; conn
// is of no use after one, and the caller closes it.
func Connect(ctx context.Context, conn net.Conn, settings ptipc.Opaque, dest string) error {
	settings, err := clientSettings(settings)
	if err != nil {
		return err
	}
	method := byte(methodNone) // SOCKS-19
	if len(settings) > 0 {
		method = methodSettings
	}
	b := make([]byte, 0, 3+len(settings)+4+1+255+2)
	b = append(b, version, 1, method)
	b = append(b, settings...) // SOCKS-2
	b = append(b, version, commandConnect, 0)
	b, err = appendDestination(b, dest)
	if err != nil {
		return err
	}
	return exchange(ctx, conn, func() error {
		return sendAndRead(conn, b, func() error { return readReplies(conn, method) })
	})
}

// exchange runs f, which talks to the other end of conn, and makes it fail when
// ctx ends.
func exchange(ctx context.Context, conn net.Conn, f func() error) error {
	interrupted := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(interrupted)
		_ = conn.SetDeadline(past) // wakes f
	})
	err := f()
	if !stop() {
		<-interrupted
		// Also if f was done in time: the deadline has made conn useless.
		err = fmt.Errorf("socks: the handshake was given up: %w", context.Cause(ctx))
	}
	return ptipc.Classify(err)
}

// sendAndRead writes b and calls read. The answer counts, also when the write
// fails: a server that refuses early stops reading (SOCKS-16).
func sendAndRead(conn net.Conn, b []byte, read func() error) error {
	var werr error
	switch conn.(type) {
	case *net.TCPConn, *net.UnixConn:
		_, werr = conn.Write(b)
		err := read()
		return firstAnswer(err, werr)
	}
	// The other end of a conn without a buffer may have to be read from before
	// it takes everything.
	written := make(chan error, 1)
	go func() {
		_, err := conn.Write(b)
		written <- err
	}()
	err := read()
	if err != nil {
		_ = conn.SetWriteDeadline(past) // wakes the writer
	}
	return firstAnswer(err, <-written)
}

// firstAnswer chooses between the errors of reading and writing: what the
// server said comes before what the socket said.
func firstAnswer(read, write error) error {
	var refused ptipc.Class
	if write == nil || errors.As(read, &refused) {
		return read
	}
	return fmt.Errorf("socks: cannot send the handshake: %w", write)
}

// readReplies reads the answer to the greeting and the reply, and not a byte more.
func readReplies(r io.Reader, method byte) error {
	// No reply is shorter than 7 bytes, so that 9 can be asked for at once.
	b := make([]byte, 2+replySize)
	n, err := io.ReadAtLeast(r, b[:2+shortestReply], 2)
	if err != nil {
		return endOfReply(err)
	}
	if err := checkMethod(b, method); err != nil {
		return err
	}
	return readReply(r, b[2:], n-2)
}

func checkMethod(b []byte, method byte) error {
	switch {
	case b[0] != version:
		return fmt.Errorf("socks: the server answers with version %d, it is not SOCKS5: %w", b[0], ptipc.ErrGeneral)
	case b[1] == methodRefused && method == methodSettings:
		return fmt.Errorf("socks: the server takes no settings (method 0x%02x): %w", method, ptipc.ErrSettingsRefused)
	case b[1] == methodRefused:
		return fmt.Errorf("socks: the server accepts none of the offered methods: %w", ptipc.ErrGeneral)
	case b[1] != method:
		return fmt.Errorf("socks: the server chose method 0x%02x, which was not offered: %w", b[1], ptipc.ErrGeneral)
	}
	return nil
}

const (
	shortestReply = 4 + 1 + 0 + 2       // with an empty name
	replySize     = 4 + net.IPv6len + 2 // the longest without a name
)

// readReply reads the reply to a request, of which have bytes, at most
// shortestReply, are in b already. b has room for replySize.
func readReply(r io.Reader, b []byte, have int) error {
	n, err := io.ReadAtLeast(r, b[have:shortestReply], shortestReply-have)
	have += n
	switch {
	case have >= 1 && b[0] != version:
		return fmt.Errorf("socks: the server replies with version %d, it is not SOCKS5: %w", b[0], ptipc.ErrGeneral)
	case have >= 2 && b[1] != 0: // what follows, if anything, does not matter any more
		class := ptipc.Class(b[1])
		if !class.Known() {
			return fmt.Errorf("socks: the server refused for an unknown reason, reply 0x%02x: %w", b[1], ptipc.ErrGeneral)
		}
		return fmt.Errorf("socks: the server refused: %w", class)
	case err != nil:
		return endOfReply(err)
	}
	var left int
	switch b[3] {
	case addressIPv4:
		left = 4 + net.IPv4len + 2 - shortestReply
	case addressIPv6:
		left = 4 + net.IPv6len + 2 - shortestReply
	case addressName:
		left = int(b[4])
		b = make([]byte, shortestReply+left)
	default:
		return fmt.Errorf("socks: the server replies with the unknown address type %d: %w", b[3], ptipc.ErrGeneral)
	}
	if _, err := io.ReadFull(r, b[shortestReply:shortestReply+left]); err != nil {
		return endOfReply(err)
	}
	return nil
}

func endOfReply(err error) error {
	if errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	return fmt.Errorf("socks: no whole reply from the server: %w", err)
}
