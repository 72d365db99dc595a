//go:build !linux

package conformance_test

import (
	"bufio"
	"errors"
	"net"
)

// bindTCP is of Linux alone, as the tests are that need it.
func bindTCP() (listen func() (net.Listener, error), addr string, err error) {
	return nil, "", errors.ErrUnsupported
}

// taker is of Linux alone, as the memory is in which it is offered.
func (*faulty) taker(net.Conn, *faultyEnd, *bufio.Reader) (halfCloser, func(clean bool)) {
	return nil, func(bool) {}
}
