// Package bench measures a transport's child process beside other ways over the
// same machine at the same time.
//
//	report, err := bench.Run(ctx, bench.Config{
//		Open:     open,                               // starts the child
//		Peer:     []string{self, "bench", "bench-peer"}, // a command that calls RunPeer
//		Duration: time.Second / 2, Rounds: 7, Conns: 1000,
//	})
//	if err != nil {
//		return err
//	}
//	return report.WriteText(os.Stdout)
//
// What is measured depends on the machine and on what else it does, so that no
// figure means much by itself. Every figure is taken in turns, the child and its
// peers one after the other, several rounds of it, and what counts is the median
// of the ratios of each round. The peers are:
//
//   - direct: no relay at all
//   - relay: the bare kernel path, io.Copy between two TCP connections, which splices
//   - relay-ux: the same from a unix socket, if the child listens on one
//   - socks5: that relay behind a minimal SOCKS5 handshake without settings
//   - microsocks: a small C program, where it is installed
//
// Each is a process of its own, whose CPU time the kernel counts to the nanosecond,
// and so is the far end, which all of them lead to. The load comes from the calling
// process, and is the same for all of them.
package bench
