package socks

import (
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strconv"
	"strings"

	"pthost/ptipc"
)

const (
	version4   = 0x04
	granted4   = 0x5a
	reply4Size = 8
	maxUserID  = 4096 // no server of this protocol has a use for more
	maxName4   = 255
	unnamed4   = "\x00\x00\x00\x01" // the address that says that a name follows (SOCKS4a)
)

// Connect4 asks a SOCKS4a server at the other end of conn for a connection to dest,
// "host:port". A name goes to the server as a name; the protocol has no addresses of
// IPv6. userID may be "". The only thing that its replies tell is success.
//
// ctx, errors and conn are as with [Connect].
func Connect4(ctx context.Context, conn net.Conn, userID, dest string) error {
	host, portText, err := net.SplitHostPort(dest)
	port, perr := strconv.ParseUint(portText, 10, 16)
	if err != nil || perr != nil || host == "" || port == 0 || len(host) > maxName4 || strings.Contains(host, "\x00") {
		return fmt.Errorf("socks: the destination %.300q is not host:port: %w", dest, ptipc.ErrNotAllowed)
	}
	if strings.Contains(userID, "\x00") || len(userID) > maxUserID {
		return ptipc.WithClass(ptipc.ErrSettingsTooLarge, fmt.Errorf("socks: the user ID holds a NUL, or more than %d bytes, which SOCKS4 cannot carry", maxUserID))
	}
	b := binary.BigEndian.AppendUint16([]byte{version4, commandConnect}, uint16(port))
	name := ""
	if addr, err := netip.ParseAddr(host); err != nil {
		b, name = append(b, unnamed4...), host+"\x00"
	} else if addr = addr.Unmap(); addr.Is4() {
		b = append(b, addr.AsSlice()...)
	} else {
		return fmt.Errorf("socks: SOCKS4 has no addresses of IPv6, such as %s: %w", host, ptipc.ErrAddressType)
	}
	b = append(append(append(b, userID...), 0), name...)
	return exchange(ctx, conn, func() error {
		return sendAndRead(conn, b, func() error {
			var reply [reply4Size]byte
			if _, err := io.ReadFull(conn, reply[:]); err != nil {
				return endOfReply(err)
			}
			switch {
			case reply[0] != 0:
				return fmt.Errorf("socks: the server replies with version %d, it is not SOCKS4: %w", reply[0], ptipc.ErrGeneral)
			case reply[1] != granted4:
				return fmt.Errorf("socks: the server refused: %w", ptipc.ErrGeneral)
			}
			return nil
		})
	})
}
