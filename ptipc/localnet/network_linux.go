package localnet

import (
	"os"
	"strconv"
)

// SameNetwork reports whether these processes are all in the network namespace of
// this one. Of what cannot be looked at, it says that it is not.
func SameNetwork(pids []int) bool {
	own, err := os.Readlink("/proc/self/ns/net")
	if err != nil {
		return false
	}
	for _, pid := range pids {
		if other, err := os.Readlink("/proc/" + strconv.Itoa(pid) + "/ns/net"); err != nil || other != own {
			return false
		}
	}
	return true
}
