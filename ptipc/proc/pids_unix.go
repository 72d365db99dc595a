//go:build unix && !linux && !darwin

package proc

import (
	"errors"
	"fmt"
)

func groupPids(watchdog int) ([]int, error) {
	return nil, fmt.Errorf("list the processes of group %d: %w", watchdog, errors.ErrUnsupported)
}
