package conformance_test

import (
	"net"
	"os"
	"strconv"

	"golang.org/x/sys/unix"
)

// bindTCP takes a port at which nobody listens before the function it returns does.
// Without SO_REUSEADDR nobody else gets it meanwhile.
func bindTCP() (listen func() (net.Listener, error), addr string, err error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, "", err
	}
	if err := unix.Bind(fd, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}); err != nil {
		return nil, "", err
	}
	name, err := unix.Getsockname(fd)
	if err != nil {
		return nil, "", err
	}
	return func() (net.Listener, error) {
		if err := unix.Listen(fd, unix.SOMAXCONN); err != nil {
			return nil, err
		}
		file := os.NewFile(uintptr(fd), "late")
		defer file.Close()
		return net.FileListener(file)
	}, "127.0.0.1:" + strconv.Itoa(name.(*unix.SockaddrInet4).Port), nil
}
