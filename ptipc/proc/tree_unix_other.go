//go:build unix && !linux

package proc

import (
	"context"
	"errors"
	"os"
)

const launcherWorks = false

func startLaunched(context.Context, *Spec, [3]*os.File) (tree, error) {
	return nil, errors.ErrUnsupported
}
