package proc

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"sync"
	"time"
)

const (
	// maxQueued bounds what waits for a child that does not read, in bytes. A
	// configuration line (ARG-4) fits, with room for messages behind it.
	maxQueued = 2 << 20
	// writeTimeout is how long one line may take to get into the pipe.
	writeTimeout = 10 * time.Second
)

var (
	// ErrStdinFull is returned by WriteLine while the child does not read what was
	// written before. The line was not queued; the ones queued before are kept.
	ErrStdinFull = errors.New("the child does not read its standard input: the queue is full")
	// ErrStdinClosed is returned by WriteLine after CloseStdin or Stop, and when the
	// child has ended.
	ErrStdinClosed = errors.New("standard input is closed")
)

// input writes lines to a pipe from a goroutine of its own: a child that does not
// read its standard input holds nobody up (ARG-7).
type input struct {
	pipe    *os.File
	timeout time.Duration // of one line
	wake    chan struct{} // something in the fields below has changed
	done    chan struct{} // run has returned

	mu     sync.Mutex
	queue  [][]byte
	queued int   // bytes, the line that is being written included
	err    error // why nothing more is taken
}

func newInput(pipe *os.File, timeout time.Duration) *input {
	return &input{pipe: pipe, timeout: timeout, wake: make(chan struct{}, 1), done: make(chan struct{})}
}

// put queues a copy of line, and LF after it.
func (in *input) put(line []byte) error {
	if bytes.IndexByte(line, '\n') >= 0 {
		return errors.New("a line for standard input has an LF in it: it would be two lines")
	}
	in.mu.Lock()
	defer in.mu.Unlock()
	if in.err != nil {
		return in.err
	}
	size := len(line) + 1
	if in.queued+size > maxQueued {
		return ErrStdinFull
	}
	in.queue = append(in.queue, append(append(make([]byte, 0, size), line...), '\n'))
	in.queued += size
	in.notify()
	return nil
}

// close lets what is queued be written, then closes the pipe.
func (in *input) close() {
	in.mu.Lock()
	defer in.mu.Unlock()
	if in.err == nil {
		in.err = ErrStdinClosed
	}
	in.notify()
}

// abort closes the pipe now and returns when the goroutine has ended.
func (in *input) abort() {
	in.close()
	in.mu.Lock()
	in.queue, in.queued = nil, 0
	in.mu.Unlock()
	in.pipe.Close()
	<-in.done
}

func (in *input) notify() {
	select {
	case in.wake <- struct{}{}:
	default:
	}
}

// run writes until the queue is closed and empty, or a write fails: half a line
// may be in the pipe then, and nothing sensible can follow it.
func (in *input) run() {
	defer close(in.done)
	defer in.pipe.Close()
	for {
		in.mu.Lock()
		var line []byte
		if len(in.queue) > 0 {
			line, in.queue = in.queue[0], in.queue[1:]
		}
		ended := in.err != nil
		in.mu.Unlock()
		if line == nil {
			if ended {
				return
			}
			<-in.wake
			continue
		}
		// Where pipes take no deadline (Windows), the end of the child ends the write.
		_ = in.pipe.SetWriteDeadline(time.Now().Add(in.timeout))
		_, err := in.pipe.Write(line)
		in.mu.Lock()
		in.queued -= len(line)
		if err != nil {
			if errors.Is(err, os.ErrDeadlineExceeded) {
				err = fmt.Errorf("the child has not read its standard input for %v: %w", in.timeout, err)
			}
			if in.err == nil {
				in.err = fmt.Errorf("%w: %w", ErrStdinClosed, err)
			}
			in.queue = nil
		}
		in.mu.Unlock()
		if err != nil {
			return
		}
	}
}
