//go:build !linux

package conformance_test

import (
	"errors"
	"net"
)

// bindTCP is of Linux alone, as the tests are that need it.
func bindTCP() (listen func() (net.Listener, error), addr string, err error) {
	return nil, "", errors.ErrUnsupported
}
