package courier

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"

	"pthost/ptipc"
	"pthost/ptipc/stdio"
)

// ErrFull says that a message was dropped because as many as a courier keeps wait
// already (SIG-4).
var ErrFull = errors.New("too many messages wait already")

// Options are what all couriers need to know. The zero value is the client's side.
type Options struct {
	// Server says that this is the side of the server: its messages have peers (SIG-2).
	Server bool
	// Log is told what happens to messages, but never what is in them. nil discards.
	Log *slog.Logger
}

func (o Options) logger() *slog.Logger {
	if o.Log != nil {
		return o.Log
	}
	return slog.New(slog.DiscardHandler)
}

// admit checks a message on its way in either direction, and returns it with its
// JSON: what has passed can go over the control lines too.
func (o Options) admit(m ptipc.Message) (ptipc.Message, []byte, error) {
	if !o.Server {
		m.Peer = "" // SIG-2
	}
	text, err := stdio.AppendSignal(nil, m)
	return m, text, err
}

// inbox holds the messages that wait for Receive.
type inbox struct {
	messages chan ptipc.Message
	closed   chan struct{}
	once     sync.Once
}

func newInbox(size int) *inbox {
	return &inbox{messages: make(chan ptipc.Message, size), closed: make(chan struct{})}
}

func (b *inbox) close() { b.once.Do(func() { close(b.closed) }) }

// open returns an error that wraps [net.ErrClosed] after close.
func (b *inbox) open() error {
	select {
	case <-b.closed:
		return fmt.Errorf("the courier is closed: %w", net.ErrClosed)
	default:
		return nil
	}
}

// ready says whether a message can be sent with ctx.
func (b *inbox) ready(ctx context.Context) error {
	if err := b.open(); err != nil {
		return err
	}
	return ctx.Err()
}

func (b *inbox) receive(ctx context.Context) (ptipc.Message, error) {
	if err := b.open(); err != nil {
		return ptipc.Message{}, err
	}
	select {
	case m := <-b.messages:
		return m, nil
	case <-ctx.Done():
		return ptipc.Message{}, ctx.Err()
	case <-b.closed:
		return ptipc.Message{}, b.open()
	}
}
