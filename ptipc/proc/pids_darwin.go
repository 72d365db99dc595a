package proc

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// groupPids are the living processes of the group that watchdog leads, without itself.
func groupPids(watchdog int) ([]int, error) {
	const zombie = 5 // SZOMB of sys/proc.h
	members, err := unix.SysctlKinfoProcSlice("kern.proc.pgrp", watchdog)
	if err != nil {
		return nil, fmt.Errorf("list the processes of group %d: %w", watchdog, err)
	}
	var pids []int
	for _, m := range members {
		if pid := int(m.Proc.P_pid); pid != watchdog && m.Proc.P_stat != zombie {
			pids = append(pids, pid)
		}
	}
	return pids, nil
}
