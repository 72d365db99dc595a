//go:build unix && !linux

package proc

import "testing"

func playSystem(string, []string) int { return 64 }

// watch is for systems that tell of the end of a process that is not a child.
func watch(*testing.T, int) func() { return func() {} }
