package host

import (
	"bytes"
	"context"
	"log/slog"

	"pthost/ptipc"
	"pthost/ptipc/internal/tally"
	"pthost/ptipc/stdio"
)

// maxSignals bounds the child's signals that wait for somebody to carry them (SIG-4).
const maxSignals = 64

// carrySignals carries messages between the child and Env.Signals until the
// supervision ends. They are the children's one after the other: a message for one
// that has died goes to the next.
func (s *supervisor) carrySignals() {
	s.carrying.Go(func() {
		failed := tally.New(s.log, "signals of the child could not be carried")
		defer failed.Close()
		for {
			select {
			case m := <-s.signals:
				// Whoever carries it may take long, and must not hold the child's output up (SIG-3).
				if err := s.env.Signals.Send(s.stopping, m); err != nil && s.stopping.Err() == nil {
					failed.Add(1, "err", err)
				}
			case <-s.stopping.Done():
				return
			}
		}
	})
	s.carrying.Go(func() {
		failed := tally.New(s.log, "signals were not handed to the child")
		defer failed.Close()
		for s.stopping.Err() == nil {
			m, err := s.env.Signals.Receive(s.stopping)
			if err != nil {
				if s.stopping.Err() == nil {
					s.log.Warn("no more signals can be received", "err", err)
				}
				return
			}
			if err := s.signal(s.stopping, m); err != nil && s.stopping.Err() == nil {
				failed.Add(1, "err", err)
			}
		}
	})
}

// signal hands a message to the child that runs: to a client what its server sent,
// and to a server what a client sent (SIG-1).
func (s *supervisor) signal(ctx context.Context, m ptipc.Message) error {
	c, err := s.child(ctx)
	if err != nil {
		return err
	}
	var message stdio.Message = stdio.SMessage{Message: m}
	if s.role == roleServer {
		message = stdio.CMessage{Message: m}
	}
	line, err := stdio.Append(nil, message)
	if err != nil {
		return err
	}
	line = bytes.TrimSuffix(line, []byte("\n"))
	if c.trace != nil {
		c.trace(false, stdio.Mask(line))
	}
	return c.proc.WriteLine(line)
}

// signalled takes a message that the child wrote.
func (c *child) signalled(m ptipc.Message) {
	if c.signals == nil {
		c.say(slog.LevelDebug, "the child sent a signal, and nobody carries them")
		return
	}
	select {
	case c.signals <- m:
	default:
		c.dropped.Add(1)
	}
}
