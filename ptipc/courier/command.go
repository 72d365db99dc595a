package courier

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os/exec"
	"sync"
	"sync/atomic"
	"time"

	"pthost/ptipc"
	"pthost/ptipc/proc"
	"pthost/ptipc/stdio"
)

// commandLimits bound what commands take.
type commandLimits struct {
	timeout  time.Duration // of a command that carries a message
	parallel int           // such commands that run at once
	waiting  int           // messages that wait for a command, and for Receive
	minPause time.Duration // before the receiving command is started again,
	maxPause time.Duration // longer after each time that it brought nothing
}

var defaultCommandLimits = commandLimits{
	timeout: time.Minute, parallel: 4, waiting: 64, minPause: time.Second, maxPause: time.Minute,
}

// A Command hands messages to programs. Its methods may be called from several
// goroutines.
type Command struct {
	send, receive []string
	options       Options
	log           *slog.Logger
	limits        commandLimits
	in            *inbox
	queue         chan parcel
	stop          context.CancelFunc
	running       sync.WaitGroup
}

var _ ptipc.Signals = (*Command)(nil)

// parcel is an outgoing message.
type parcel struct {
	line []byte
	peer string
}

// StartCommand returns a courier that starts send, a program and its arguments, for
// each outgoing message: the message is one line of JSON on its standard input, which
// ends then, and never among its arguments, which every user of the machine can read.
// It has a minute; four run at once. What is not in PATH is an error.
//
// Each line that it writes on standard output is an incoming message. On the server's
// side one without a peer gets the peer of the message that the program was started
// for. Its exit code, when that is not 0, and the last line of its standard error are
// logged.
//
// receive, unless it is nil, runs as long as the courier and brings incoming messages
// in the same way. When it ends, it is started again after a second, and after longer
// pauses up to a minute while it brings none: a program that fetches what is there and
// exits will do.
func StartCommand(send, receive []string, o Options) (*Command, error) {
	return startCommand(send, receive, o, defaultCommandLimits)
}

func startCommand(send, receive []string, o Options, limits commandLimits) (*Command, error) {
	if len(send) == 0 {
		return nil, errors.New("no command is named that carries messages: give a program and its arguments")
	}
	for _, argv := range [][]string{send, receive} {
		if len(argv) == 0 {
			continue
		}
		if _, err := exec.LookPath(argv[0]); err != nil {
			return nil, fmt.Errorf("the command %s cannot be run: install it or give its full path: %w", argv[0], err)
		}
	}
	ctx, stop := context.WithCancel(context.Background())
	c := &Command{
		send: send, receive: receive, options: o, log: o.logger(), limits: limits,
		in: newInbox(limits.waiting), queue: make(chan parcel, limits.waiting), stop: stop,
	}
	for range limits.parallel {
		c.running.Go(func() { c.sendAll(ctx) })
	}
	if len(receive) > 0 {
		c.running.Go(func() { c.receiveAll(ctx) })
	}
	return c, nil
}

// Send queues a message for the command. The error is [ErrFull] when 64 wait already
// (SIG-4).
func (c *Command) Send(ctx context.Context, m ptipc.Message) error {
	m, line, err := c.options.admit(m)
	if err != nil {
		return err
	}
	if err := c.in.ready(ctx); err != nil {
		return err
	}
	select {
	case c.queue <- parcel{line, m.Peer}:
		return nil
	default:
		return fmt.Errorf("the message is dropped: %s has not taken the %d before it: %w", c.send[0], c.limits.waiting, ErrFull)
	}
}

// Receive waits for a message that a command writes.
func (c *Command) Receive(ctx context.Context) (ptipc.Message, error) { return c.in.receive(ctx) }

// Close ends the commands and drops the messages that wait. Receive and all later
// calls return an error that wraps [net.ErrClosed].
func (c *Command) Close() error {
	c.in.close()
	c.stop()
	c.running.Wait()
	return nil
}

func (c *Command) sendAll(ctx context.Context) {
	for {
		select {
		case p := <-c.queue:
			c.sendOne(ctx, p)
		case <-ctx.Done():
			return
		}
	}
}

func (c *Command) sendOne(ctx context.Context, message parcel) {
	timeout := fmt.Errorf("it did not end in %v", c.limits.timeout)
	ctx, cancel := context.WithTimeoutCause(ctx, c.limits.timeout, timeout)
	defer cancel()
	c.run(ctx, c.send, message.peer, func(p *proc.Process) {
		if err := p.WriteLine(message.line); err != nil {
			c.log.Warn("a message did not reach its command", "command", c.send[0], "err", err)
		}
		p.CloseStdin()
	})
}

func (c *Command) receiveAll(ctx context.Context) {
	pause := c.limits.minPause
	for ctx.Err() == nil {
		began := time.Now()
		brought := c.run(ctx, c.receive, "", func(*proc.Process) {})
		if brought > 0 || time.Since(began) > c.limits.maxPause {
			pause = c.limits.minPause
		}
		// With jitter, so that couriers which failed together do not come back together.
		timer := time.NewTimer(pause/2 + rand.N(pause/2+1))
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
		}
		pause = min(2*pause, c.limits.maxPause)
	}
}

// counts are what became of the lines that a command wrote.
type counts struct {
	taken   atomic.Int64 // messages
	refused atomic.Int64 // lines that are none
	lost    atomic.Int64 // messages that the transport did not read before the end
}

// run runs a command to its end or that of ctx, and returns the number of messages
// that it brought.
func (c *Command) run(ctx context.Context, argv []string, peer string, feed func(*proc.Process)) (brought int64) {
	var counts counts
	// A line that is cut off is too long for a message, and a last line without an LF
	// is whole when it is one.
	onLine := func(line []byte, _ bool) {
		if len(bytes.TrimSpace(line)) == 0 {
			return
		}
		err := c.takeLine(ctx, line, peer)
		switch {
		case err == nil:
			counts.taken.Add(1)
		case errors.Is(err, ErrFull):
			counts.lost.Add(1)
		case counts.refused.Add(1) == 1: // one that floods must not fill the log
			c.log.Warn("a line of a command is not a message", "command", argv[0], "err", err)
		}
	}
	process, err := proc.Start(ctx, proc.Spec{
		Path: argv[0], Args: argv[1:], OnLine: onLine, FinishWait: -1, Log: c.log,
	})
	if err != nil {
		if !errors.Is(context.Cause(ctx), context.Canceled) { // by Close
			c.log.Warn("cannot start a command for messages", "err", err)
		}
		return 0
	}
	feed(process)
	select {
	case <-process.Done():
	case <-ctx.Done():
		if err := process.Stop(context.WithoutCancel(ctx)); err != nil {
			c.log.Error("cannot stop a command for messages", "err", err)
			return counts.taken.Load()
		}
	}
	c.logEnd(ctx, argv[0], process.Err(), &counts)
	return counts.taken.Load()
}

// takeLine waits until there is room: a command that writes faster than the
// transport reads waits too.
func (c *Command) takeLine(ctx context.Context, line []byte, peer string) error {
	if ctx.Err() != nil {
		return ErrFull // and may be half a line of a command that was stopped
	}
	m, err := stdio.ParseSignal(line)
	if err != nil {
		return err
	}
	if m.Peer == "" {
		m.Peer = peer
	}
	if m, _, err = c.options.admit(m); err != nil {
		return err
	}
	select {
	case c.in.messages <- m:
		return nil
	case <-ctx.Done():
		return ErrFull
	}
}

func (c *Command) logEnd(ctx context.Context, command string, err error, counts *counts) {
	level, attrs := slog.LevelDebug, []any{"command", command, "messages", counts.taken.Load()}
	if refused := counts.refused.Load(); refused > 0 {
		level = slog.LevelWarn
		attrs = append(attrs, "refused", refused)
	}
	if lost := counts.lost.Load(); lost > 0 {
		attrs = append(attrs, "lost", lost)
	}
	var exit *proc.ExitError
	if errors.As(err, &exit) {
		attrs = append(attrs, "code", exit.Code)
		if exit.Signal != 0 {
			attrs = append(attrs, "signal", exit.Signal.String())
		}
		if len(exit.Stderr) > 0 {
			attrs = append(attrs, "stderr", exit.Stderr[len(exit.Stderr)-1])
		}
		if exit.Code != 0 && !exit.Stopped {
			level = slog.LevelWarn
		}
	}
	if cause := context.Cause(ctx); cause != nil && !errors.Is(cause, context.Canceled) {
		level = slog.LevelWarn
		attrs = append(attrs, "stopped", cause)
	}
	c.log.Log(context.WithoutCancel(ctx), level, "a command for messages ended", attrs...)
}
