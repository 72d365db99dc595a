//go:build !linux

package localnet

import (
	"fmt"
	"os"
)

// NewEnds is for Linux alone: elsewhere client sockets have no names.
func NewEnds() (*Ends, *os.File, error) { return nil, nil, errNoEnds }

// InheritEnds is for Linux alone.
func InheritEnds(int) (*Ends, error) { return nil, errNoEnds }

var errNoEnds = fmt.Errorf("localnet: memory to share with a child: %w", ErrUnsupported)

func (*Ends) load(uint32) uint64               { return 0 }
func (*Ends) store(uint32, uint64)             {}
func (*Ends) swap(uint32, uint64, uint64) bool { return true }
