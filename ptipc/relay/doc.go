// Package relay moves bytes between two connections and counts them.
//
// [Join] relays both directions of two connections, with half-close, until both
// have ended. A [Meter] keeps the open connections of one transport and their
// totals; its [Conn] counts while data flows, also where the kernel moves the
// data. A server that forwards what it accepts:
//
//	var meter relay.Meter
//
//	func serve(ctx context.Context, client net.Conn) error {
//		raw, err := dial(ctx)
//		if err != nil {
//			meter.Failed()
//			client.Close()
//			return err
//		}
//		return relay.Join(ctx, client, meter.Conn(raw, relay.Options{}))
//	}
//
//	func shutdown(ctx context.Context) error {
//		return meter.Drain(ctx) // and cut what is left when ctx ends
//	}
//
// # What is never bypassed
//
// The kernel relays only between a *net.TCPConn or a *net.UnixConn on either
// side, bare or in a *Conn, and the types are matched exactly. Every other
// connection is copied with its own Read and Write, so that one which embeds a
// socket and overrides them, to encrypt say, has the last word.
//
// A transport's own connection type can have two more methods that Join uses:
// CloseWrite, to end one direction, and Abort, to close so that the peer sees that
// something is missing. A unix socket has no such end: its peer sees a plain end
// of the stream even if the other side was reset or killed, unless the two ends of the
// connection tell each other in another way, an [End].
//
// # How it runs on Linux
//
// Pairs of sockets are not relayed by goroutines but by loops around epoll(7),
// each on one thread, half as many as there are processors. The reason is what a
// goroutine costs that waits for a socket: when the runtime's poller finds it
// ready, it wakes a second thread to look for more work, and finds none. Loops run
// while there are pairs, at first in the goroutine of the first pair's Join; the last
// pair to end stops its loop. An idle pair holds
// two descriptors, the parked goroutine of its Join and no buffer. Small amounts
// are read and written; when a read is full, splice(2) takes over, with a pipe
// that the flow keeps only while the other side does not take its bytes. A unix socket
// that bulk goes to gets a larger send buffer.
//
// Where the process at the other end of a unix socket takes it, the TCP socket of a pair
// that moves bulk is handed over to it (SOCKS-23), and the pair only waits for the end.
//
// While Join runs, the sockets belong to the loop, and the conns that were given
// to it only tell their addresses and counts.
package relay
