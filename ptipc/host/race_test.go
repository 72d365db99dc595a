//go:build race

package host

// The race detector keeps at most 8,128 goroutines apart.
const raced = true
