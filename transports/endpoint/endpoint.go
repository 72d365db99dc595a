// Package endpoint opens the sockets of transports as their configurations in
// JSON describe them: TCP, and TLS 1.3 on top of it.
//
//	var config struct {
//		Listen endpoint.Address `json:"listen"`
//	}
//	if err := opaque.Decode(&config); err != nil {
//		return err
//	}
//	listener, err := config.Listen.Open(ctx)
//
// Dialling is not here: transports dial with [ptipc.Env.Dial], and put the TLS of
// [Client] on what it returns.
package endpoint

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strconv"
)

// An Address is where a server listens: "192.0.2.1:443", "[::]:443", or ":443"
// for every address of the machine. Names are refused, since what they stand for
// may change; port 0 is a free port.
type Address string

// Validate implements [ptipc.Validator].
func (a Address) Validate() error {
	_, _, err := a.split()
	return err
}

var errAddress = errors.New("is not an address to listen on: write IP:PORT, [IPv6]:PORT or :PORT")

// split returns the zero netip.Addr for every address.
func (a Address) split() (netip.Addr, uint16, error) {
	host, port, err := net.SplitHostPort(string(a))
	if err != nil {
		return netip.Addr{}, 0, errAddress
	}
	number, err := strconv.ParseUint(port, 10, 16)
	if err != nil {
		return netip.Addr{}, 0, errAddress
	}
	if host == "" {
		return netip.Addr{}, uint16(number), nil
	}
	ip, err := netip.ParseAddr(host)
	if err != nil {
		return netip.Addr{}, 0, errAddress
	}
	return ip, uint16(number), nil
}

// IP is the address without its port, the zero Addr if that is every address or
// if the Address is not valid.
func (a Address) IP() netip.Addr {
	ip, _, _ := a.split()
	if ip.IsUnspecified() {
		return netip.Addr{}
	}
	return ip
}

// Port is the port, 0 if the Address is not valid.
func (a Address) Port() uint16 {
	_, port, _ := a.split()
	return port
}

// Open listens on the address. ctx bounds the call, not the listener's life.
func (a Address) Open(ctx context.Context) (net.Listener, error) {
	if err := a.Validate(); err != nil {
		return nil, fmt.Errorf("endpoint: %q %w", string(a), err)
	}
	var config net.ListenConfig
	l, err := config.Listen(ctx, "tcp", string(a))
	if err != nil {
		return nil, fmt.Errorf("endpoint: cannot listen on %s: %w", a, err)
	}
	return l, nil
}

// Settle is the address with a port that is free now in place of port 0, so that
// it can be written down. Another program may take the port before it is opened.
func (a Address) Settle(ctx context.Context) (Address, error) {
	if a.Port() != 0 {
		return a, nil
	}
	l, err := a.Open(ctx)
	if err != nil {
		return "", err
	}
	defer l.Close()
	host, _, err := net.SplitHostPort(string(a))
	if err != nil {
		return "", err // Open has split it already
	}
	port := l.Addr().(*net.TCPAddr).Port
	return Address(net.JoinHostPort(host, strconv.Itoa(port))), nil
}
