// Package courier carries the signals of a transport between two machines by other
// ways than the transport: by people, through directories, and by commands.
//
// Each courier is a [ptipc.Signals] that an application puts into the environment of
// a transport, and closes when the transport has ended:
//
//	dir, err := courier.OpenDir("/var/lib/pt/signals", courier.Options{Log: log})
//	if err != nil {
//		return err
//	}
//	defer dir.Close()
//	transport, err := factory(ctx, config, ptipc.Env{Signals: dir, Log: log})
//
// A [Dir] makes files of the messages, for people who mail them and for programs that
// synchronize directories. A [Command] hands each message to a program. A [Queue]
// keeps the messages until a person asks for them.
//
// # What a message looks like outside
//
// Everywhere it is the JSON of the control lines, {"body":{…},"peer":"…"}, at most
// 32,768 bytes (SIG-4). It is a secret: whoever reads it knows what the two sides say
// to each other, and whoever writes one speaks for the other side.
//
// # The way back to a client
//
// The courier of a server gives every message of a client a peer, which the answer
// has too (SIG-2): the "peer" of the message, or what the courier knows about where
// it came from, such as the name of its file. The courier of a client leaves the peer
// out in both directions.
//
// # Loss
//
// Nothing waits for a courier (SIG-3): what it keeps is bounded, and what does not
// fit is dropped and logged.
package courier
