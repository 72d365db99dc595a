//go:build !linux

package localnet

// SameNetwork is for Linux alone.
func SameNetwork([]int) bool { return false }
