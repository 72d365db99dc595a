package conformance_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"sync/atomic"
	"time"

	"pthost/ptipc/localnet"
	"pthost/turn"
)

// announceDatagrams is for a client that has nothing else.
func (f *faulty) announceDatagrams() {
	if f.host.Proxy != "" {
		f.say(`CMETHOD-ERROR faulty {"class":2,"message":"a proxy carries streams alone"}`)
		f.die(69, "a proxy carries streams alone")
	}
	f.announcePackets()
}

// serveDatagrams opens a wire of datagrams that leads to an echo server, its own.
func (f *faulty) serveDatagrams() {
	at := f.config["listen"]
	if at == "" {
		at = "127.0.0.1:0"
	}
	local, err := net.ResolveUDPAddr("udp", at)
	if err != nil {
		f.die(78, "%v", err)
	}
	conn, err := net.ListenUDP("udp", local)
	if err != nil {
		f.die(71, "%v", err)
	}
	f.say("SMETHOD faulty %s ARGS:stats=1,proxy=1", conn.LocalAddr())
	if f.is("server: hears no datagrams") {
		conn.Close()
		return
	}
	go func() {
		clients := map[netip.AddrPort]bool{}
		buf := make([]byte, 4096)
		for {
			n, from, err := conn.ReadFromUDPAddrPort(buf)
			if err != nil {
				return
			}
			f.mu.Lock()
			if !clients[from] && !f.is("server: counts nothing") {
				f.total.active++
				f.total.opened++
			}
			clients[from] = true
			f.total.received += n
			f.total.sent += n
			f.mu.Unlock()
			_, _ = conn.WriteToUDPAddrPort(buf[:n], from)
		}
	}()
}

// listenEverywhere opens a socket that takes datagrams from other machines.
func (f *faulty) listenEverywhere() net.PacketConn {
	conn, err := net.ListenPacket("udp4", "0.0.0.0:0")
	if err != nil {
		f.die(71, "%v", err)
	}
	return conn
}

// announcePackets serves a packet factory of plain datagrams.
func (f *faulty) announcePackets() {
	at := &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)}
	if f.is("turn: listens everywhere") {
		at.IP = net.IPv4zero
	}
	conn, err := net.ListenUDP("udp4", at)
	if err != nil {
		f.die(71, "%v", err)
	}
	at = &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1), Port: conn.LocalAddr().(*net.UDPAddr).Port}
	credentials := turn.NewCredentials()
	if f.is("turn: the same credentials") {
		credentials = turn.Credentials{Username: "u", Password: "p", Realm: "r"}
	}
	args := fmt.Sprintf("username=%s,password=%s", credentials.Username, credentials.Password)
	if !f.is("turn: no realm") {
		args += ",realm=" + credentials.Realm
	}
	f.say("CMETHOD faulty turn %s ARGS:%s", at, args)
	if f.is("turn: needs no credentials") || f.is("turn: takes any password") {
		go f.grantAll(conn)
		return
	}
	server := &turn.Server{Credentials: credentials, Packets: f.openPackets}
	if !f.is("turn: hears everybody") {
		server.Allow = func(client net.Addr) error {
			if !ownUser(at, client.(*net.UDPAddr).AddrPort()) {
				return errors.New("another user")
			}
			return nil
		}
	}
	go func() { _ = server.Serve(conn) }()
}

func ownUser(at *net.UDPAddr, from netip.AddrPort) bool {
	cred, err := localnet.UDPPeer(netip.AddrPortFrom(netip.AddrFrom4([4]byte(at.IP.To4())), uint16(at.Port)), from)
	return err == nil && cred.UID == uint32(os.Geteuid())
}

func (f *faulty) openPackets(context.Context) (net.PacketConn, error) {
	conn, err := net.ListenUDP("udp", nil)
	if err != nil {
		return nil, err
	}
	return &faultyPackets{UDPConn: conn, f: f}, nil
}

// grantAll answers without looking at credentials as it should.
func (f *faulty) grantAll(conn *net.UDPConn) {
	buf := make([]byte, 2048)
	for {
		n, from, err := conn.ReadFromUDPAddrPort(buf)
		if err != nil {
			return
		}
		if n < 20 || !ownUser(conn.LocalAddr().(*net.UDPAddr), from) {
			continue
		}
		success := append([]byte{0x01, 0x03, 0, 0}, buf[4:20]...)
		// ERROR-CODE 401, REALM "r" and NONCE "n", in the bytes of RFC 5389.
		challenge := append(append([]byte{0x01, 0x13, 0, 24}, buf[4:20]...),
			0, 9, 0, 4, 0, 0, 4, 1, 0, 0x14, 0, 1, 'r', 0, 0, 0, 0, 0x15, 0, 1, 'n', 0, 0, 0)
		asked := bytes.Contains(buf[20:n], []byte{0, 0x06, 0}) // USERNAME, in what this suite sends
		if f.is("turn: takes any password") && !asked {
			_, _ = conn.WriteToUDPAddrPort(challenge, from)
		} else {
			_, _ = conn.WriteToUDPAddrPort(success, from)
		}
	}
}

// faultyPackets is a socket of the factory.
type faultyPackets struct {
	*net.UDPConn
	f    *faulty
	peer atomic.Pointer[net.UDPAddr]
}

func (c *faultyPackets) WriteTo(p []byte, addr net.Addr) (int, error) {
	c.peer.Store(addr.(*net.UDPAddr))
	if c.f.is("turn: cuts datagrams") {
		p = p[:min(len(p), 1400)]
	}
	return c.UDPConn.WriteTo(p, addr)
}

func (c *faultyPackets) ReadFrom(p []byte) (int, net.Addr, error) {
	n, addr, err := c.UDPConn.ReadFrom(p)
	if peer := c.peer.Load(); err == nil && peer != nil && c.f.is("turn: takes strangers for peers") {
		addr = peer
	}
	return n, addr, err
}

func (c *faultyPackets) Close() error {
	if c.f.is("turn: keeps sockets") {
		return c.SetReadDeadline(time.Unix(1, 0))
	}
	return c.UDPConn.Close()
}
