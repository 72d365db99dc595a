//go:build !linux

package proc

const canRestrict = false

// sandboxWorks reports whether this system has a sandbox for children.
func sandboxWorks() bool { return false }
