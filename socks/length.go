package socks

import (
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"net"

	"pthost/ptipc"
)

// ConnectLength is [Connect] to a server that takes settings with their length alone,
// as those of PT 2.x and 3.0 do: under method 0x09, or under 0x80 as some of them
// say. The answer to the greeting is waited for, and the settings and the request are
// one write (SOCKS-2, SOCKS-3). Without settings it is [ConnectUpstream].
func ConnectLength(ctx context.Context, conn net.Conn, settings ptipc.Opaque, dest string) error {
	settings, err := clientSettings(settings)
	if err != nil {
		return err
	}
	if len(settings) == 0 { // SOCKS-19
		return ConnectUpstream(ctx, conn, nil, dest)
	}
	b := binary.BigEndian.AppendUint32(nil, uint32(len(settings)))
	b = append(b, settings...)
	b, err = appendDestination(append(b, version, commandConnect, 0), dest)
	if err != nil {
		return err
	}
	return exchange(ctx, conn, func() error {
		reply := make([]byte, replySize)
		err := sendAndRead(conn, []byte{version, 2, methodLength, methodSettings}, func() error {
			if _, err := io.ReadFull(conn, reply[:2]); err != nil {
				return endOfReply(err)
			}
			switch reply[1] {
			case methodRefused:
				return fmt.Errorf("socks: the server takes no settings (methods 0x%02x and 0x%02x): %w", methodLength, methodSettings, ptipc.ErrSettingsRefused)
			case methodSettings:
				return checkMethod(reply, methodSettings)
			}
			return checkMethod(reply, methodLength)
		})
		if err != nil {
			return err
		}
		return sendAndRead(conn, b, func() error { return readReply(conn, reply, 0) })
	})
}
