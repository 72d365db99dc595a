package relay

import (
	"os"
	"runtime"
	"strconv"
)

var forced, _ = strconv.Atoi(os.Getenv("RELAY_LOOPS"))

func numLoops() int {
	if forced > 0 {
		return forced
	}
	return runtime.GOMAXPROCS(0)
}
