//go:build !linux

package bench

import (
	"context"
	"errors"
	"io"
	"math"
	"net"
	"os/exec"
)

// Other systems show times and rates, but no CPU time, memory or descriptors of
// another process.

type memory struct{ user, fds, kernel float64 }

func memoryOf(int) memory { return memory{math.NaN(), math.NaN(), math.NaN()} }

// CPUTime is not known.
func CPUTime(int) float64 { return math.NaN() }

func callerCPU() float64 { return math.NaN() }

func busy() float64 { return math.NaN() }

func kernel() string { return "" }

// startTied starts a process. Peers of our own end when their standard input does.
func startTied(cmd *exec.Cmd) error { return cmd.Start() }

const canBlock = false

func blocking(net.Conn) (io.ReadWriteCloser, error) { return nil, errors.ErrUnsupported }

// echo sends everything back.
func echo(conn net.Conn) { _, _ = io.Copy(conn, conn) }

// EnterNamespace does nothing: only Linux has network namespaces.
func EnterNamespace(ctx context.Context) (going context.Context, n Network, code int, done bool, err error) {
	return ctx, Network{Why: "only Linux has them"}, 0, false, nil
}

// MountSmall is for Linux.
func MountSmall(string, int) (unmount func() error, err error) { return nil, errors.ErrUnsupported }

// Processes does not know.
func Processes(int) (n, descriptors int, memory uint64) { return 0, 0, 0 }

// CongestionControl is not known.
func CongestionControl() string { return "" }
