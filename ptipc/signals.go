package ptipc

import "context"

// A Message is one signal between the client and the server of a transport (SIG-1).
type Message struct {
	// Peer is a server's return path to one client (SIG-2): what Receive gave with a
	// client's message goes into the answer to it. On the client side it is "".
	Peer string `json:"peer,omitempty"`
	// Body is the transport's own.
	Body Opaque `json:"body"`
}

// Signals is a transport's end of the out-of-band channel. Messages may be lost,
// come twice, or late: somebody may be carrying them by hand.
type Signals interface {
	// Send gives a message to whoever carries it. It does not wait for its arrival.
	Send(ctx context.Context, m Message) error
	// Receive waits for the next message.
	Receive(ctx context.Context) (Message, error)
}
