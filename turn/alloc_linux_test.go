//go:build !race

package turn

import (
	"runtime"
	"testing"
)

// Relaying costs no allocation for a packet, on either end.
func TestNoAllocations(t *testing.T) {
	s := &Server{}
	conn := mustDial(t, startServer(t, s), s.Credentials)
	peer := listenUDP(t, "127.0.0.1")
	done := make(chan struct{})
	go func() { defer close(done); echo(newSocket(peer, false)) }()
	defer func() { _ = peer.Close(); <-done }()
	patient(t, conn)
	to := peer.LocalAddr()
	payload, buf := make([]byte, 1200), make([]byte, MaxPayload)
	run := func(count int) {
		t.Helper()
		const window = 16
		for i := range count {
			if i < count-window {
				if _, err := conn.WriteTo(payload, to); err != nil {
					t.Fatal(err)
				}
			}
			if i >= window {
				if n, _, err := conn.ReadFrom(buf); err != nil || n != len(payload) {
					t.Fatal(n, err)
				}
			}
		}
	}
	run(1000) // channels, pools
	const count = 20000
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	run(count)
	runtime.ReadMemStats(&after)
	// The pools are emptied by each collection, of which there are few when nothing is allocated.
	if got := float64(after.Mallocs-before.Mallocs) / count; got > 0.05 {
		t.Errorf("%.3f allocations for each round trip", got)
	}
}
