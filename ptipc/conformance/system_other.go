//go:build !linux

package conformance

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
)

var errLinux = fmt.Errorf("it looks at sockets in a way that Linux alone has: %w", errors.ErrUnsupported)

func listening([]int) (tcp, udp []netip.AddrPort, err error) { return nil, nil, errLinux }
func dialing(netip.AddrPort) (bool, error)                   { return false, errLinux }
func descriptors(int) int                                    { return 0 }
func asUser(int, func() error) error                         { return errLinux }
func fill(*net.TCPListener) error                            { return errLinux }
func sendSocket(net.Conn, *net.TCPConn) error                { return errLinux }
func disconnect(*net.TCPConn) error                          { return errLinux }
func hungUp(net.Conn) bool                                   { return true }
func unread(net.Conn) (int, error)                           { return 0, errLinux }

// A cell watches a child, where namespaces are.
type cell struct{}

// A packet is one that begins something.
type packet struct {
	network  string
	from, to netip.AddrPort
	bytes    []byte
}

func newCell(bool) (*cell, error)        { return nil, errLinux }
func (*cell) run(f func())               { f() }
func (*cell) close()                     {}
func (*cell) written() ([]string, error) { return nil, errLinux }
func (*cell) begun() ([]packet, error)   { return nil, errLinux }
