package turn

import (
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"testing"

	"go.uber.org/goleak"
)

// roleVariable makes the test binary the relaying process of a benchmark, so that its
// CPU is counted apart from that of the load.
const roleVariable = "TURN_TEST_ROLE"

func TestMain(m *testing.M) {
	switch role := os.Getenv(roleVariable); role {
	case "":
		goleak.VerifyTestMain(m)
	case "turn", "relay":
		if err := playRole(role); err != nil {
			fmt.Fprintln(os.Stderr, role+":", err)
			os.Exit(1)
		}
	}
}

var roleCredentials = Credentials{Username: "user", Password: "password", Realm: "realm"}

// playRole says on standard output where it listens, and ends with standard input.
func playRole(role string) error {
	front, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		return err
	}
	fmt.Println(front.LocalAddr())
	if role == "relay" {
		back, err := directPackets(nil) //nolint:staticcheck // it does not look at it
		if err != nil {
			return err
		}
		go bareRelay(front, back.(*net.UDPConn))
	} else {
		s := &Server{Credentials: roleCredentials, Packets: directPackets}
		go func() { _ = s.Serve(front) }()
	}
	_, err = io.Copy(io.Discard, os.Stdin)
	return err
}

// bareRelay is one hop as Go programs write it: two sockets, a goroutine each way. The
// first eight bytes that it gets say where the peer is.
func bareRelay(front, back *net.UDPConn) {
	var first [64]byte
	n, client, err := front.ReadFromUDPAddrPort(first[:])
	if err != nil {
		return
	}
	peer, err := netip.ParseAddrPort(string(first[:n]))
	if err != nil {
		return
	}
	go func() {
		b := make([]byte, maxDatagram)
		for {
			n, _, err := back.ReadFromUDPAddrPort(b)
			if err != nil {
				return
			}
			_, _ = front.WriteToUDPAddrPort(b[:n], client)
		}
	}()
	b := make([]byte, maxDatagram)
	for {
		n, _, err := front.ReadFromUDPAddrPort(b)
		if err != nil {
			return
		}
		_, _ = back.WriteToUDPAddrPort(b[:n], peer)
	}
}
