package courier

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"time"

	"pthost/ptipc"
	"pthost/ptipc/internal/tally"
)

// maxQueue is how many messages a Queue keeps in each direction: what people can
// still deal with.
const maxQueue = 100

// A Queue keeps messages in memory for people, who look at those that go out and add
// those that came to them. Its methods may be called from several goroutines.
type Queue struct {
	options Options
	in      *inbox
	dropped *tally.Warning

	mu      sync.Mutex
	lastID  uint64
	pending []Pending
}

var _ ptipc.Signals = (*Queue)(nil)

// Pending is an outgoing message that a person has to carry.
type Pending struct {
	ID      uint64        `json:"id"`   // counts from 1
	Time    time.Time     `json:"time"` // when it was sent
	Message ptipc.Message `json:"message"`
}

// NewQueue returns an empty queue.
func NewQueue(o Options) *Queue {
	return &Queue{options: o, in: newInbox(maxQueue), dropped: tally.New(o.logger(), "dropped the oldest outgoing messages")}
}

// Send keeps a message for [Queue.Pending]. Of more than 100 the oldest is dropped
// (SIG-4). The log says at once that it begins, and then at most every 10 seconds how
// many they were.
func (q *Queue) Send(ctx context.Context, m ptipc.Message) error {
	m, _, err := q.options.admit(m)
	if err != nil {
		return err
	}
	if err := q.in.ready(ctx); err != nil {
		return err
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	q.lastID++
	q.pending = append(q.pending, Pending{ID: q.lastID, Time: time.Now(), Message: m})
	if len(q.pending) > maxQueue {
		q.dropped.Add(1, "last", q.pending[0].ID, "kept", maxQueue)
		q.pending = slices.Delete(q.pending, 0, 1)
	}
	return nil
}

// Receive waits for a message that somebody adds.
func (q *Queue) Receive(ctx context.Context) (ptipc.Message, error) { return q.in.receive(ctx) }

// Pending returns the last 100 outgoing messages, the oldest first. They stay: nobody
// knows whether a person has carried them.
func (q *Queue) Pending() []Pending {
	q.mu.Lock()
	defer q.mu.Unlock()
	return slices.Clone(q.pending)
}

// Add takes in a message that came from the other side. The error is [ErrFull] when
// 100 wait already for Receive.
func (q *Queue) Add(m ptipc.Message) error {
	m, _, err := q.options.admit(m)
	if err != nil {
		return err
	}
	if err := q.in.open(); err != nil {
		return err
	}
	select {
	case q.in.messages <- m:
		return nil
	default:
		return fmt.Errorf("the message is dropped: the transport has not read the %d before it: %w", maxQueue, ErrFull)
	}
}

// Close ends Receive and all later calls with an error that wraps [net.ErrClosed].
func (q *Queue) Close() error {
	q.in.close()
	q.dropped.Close()
	return nil
}
