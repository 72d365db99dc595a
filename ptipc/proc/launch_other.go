//go:build !linux

package proc

import (
	"fmt"
	"os"

	"pthost/ptipc"
)

// Launch is the main function of a launcher on Linux. Elsewhere Start does not use
// launchers, and Launch only says so.
func Launch([]string) int {
	fmt.Fprintln(os.Stderr, "launchers are for Linux")
	return int(ptipc.ExitUnavailable)
}
