// Package soak puts a load on a proxy for a long time while things go wrong behind
// it, and counts what became of each connection.
//
//	report, err := soak.Run(ctx, soak.Config{
//		Duration: 20 * time.Minute, Streams: 16, Every: 5 * time.Second,
//		Dial:     dial, Listener: far, Faults: faults, Sample: sample,
//		Progress: func(what string) { fmt.Fprintln(os.Stderr, what) },
//	})
//
// A connection may finish, or fail with an error that says so. One whose stream ends
// as if it were complete, and is not, is lost silently: the worst that can happen.
package soak

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"pthost/ptipc"
)

// A Config says what is tried, and for how long.
type Config struct {
	Duration time.Duration
	// Streams is how many connections there are at a time.
	Streams int
	// Every is how long it is from one fault to the next.
	Every time.Duration
	// Dial connects to the far end through everything. A connection that hangs is
	// given up after Patience, and so is one that stands still.
	Dial     func(ctx context.Context) (Conn, error)
	Patience time.Duration
	// Listener is the far end's.
	Listener net.Listener
	// Faults are injected in turns.
	Faults []Fault
	// Sample measures what the whole uses now.
	Sample func() Usage
	// Progress is told what happens.
	Progress func(what string)
}

// A Conn is a stream with two ends.
type Conn interface {
	net.Conn
	CloseWrite() error
}

// A Fault is something that goes wrong. Do injects it and takes it back.
type Fault struct {
	Name string
	Do   func(ctx context.Context) error
}

// Usage is what a set of processes uses.
type Usage struct {
	Processes   int    `json:"processes"`
	Descriptors int    `json:"descriptors"`
	Memory      uint64 `json:"memory_bytes"` // anonymous pages
}

// A Report is what came of it.
type Report struct {
	Seconds  float64        `json:"seconds"`
	Tried    uint64         `json:"tried"`
	Finished uint64         `json:"finished"`
	Failed   uint64         `json:"failed_with_an_error"`
	Lost     uint64         `json:"lost_silently"`
	Stalled  uint64         `json:"stalled"` // neither went on nor failed for Patience
	Bytes    uint64         `json:"bytes"`   // of connections that finished
	Errors   map[string]int `json:"errors"`  // what the failed ones said, by class
	Faults   map[string]int `json:"faults"`  // how often each was injected
	Skipped  []string       `json:"faults_not_possible,omitempty"`
	Recovery float64        `json:"longest_recovery_seconds"` // from a fault's end to the next connection that finishes
	Before   Usage          `json:"before"`                   // idle, after the first connections
	After    Usage          `json:"after"`                    // idle, at the end
	Lines    []string       `json:"lost,omitempty"`           // what is known of those that were lost
}

// OK reports whether nothing was lost, and nothing stalled.
func (r *Report) OK() bool { return r.Lost == 0 && r.Stalled == 0 && r.Finished > 0 }

type run struct {
	config Config
	mu     sync.Mutex
	report Report
	far    far
	phase  atomic.Value // the fault that is in force, or was last
}

// warmUp is how many connections come before the usage is measured for the first time.
const warmUp = 100

// Run runs the load and the faults. The end of ctx ends it early, with a report.
func Run(ctx context.Context, c Config) (*Report, error) {
	r := &run{config: c, report: Report{Errors: map[string]int{}, Faults: map[string]int{}}}
	r.phase.Store("no fault yet")
	r.far.patience = 2 * c.Patience // what this end gives up, that end need not
	var serving sync.WaitGroup
	serving.Go(func() { r.far.serve(c.Listener) })
	defer serving.Wait()
	defer c.Listener.Close()

	for range warmUp {
		r.one(ctx)
	}
	if r.report.Finished != warmUp {
		return nil, fmt.Errorf("before any fault, %d of %d connections did not finish: %v", warmUp-r.report.Finished, warmUp, r.report.Errors)
	}
	r.report.Before = r.idle(ctx)
	began := time.Now()
	loading, stop := context.WithTimeout(ctx, c.Duration)
	defer stop()
	var load sync.WaitGroup
	for range c.Streams {
		load.Go(func() {
			for loading.Err() == nil {
				if !r.one(ctx) {
					Pause(loading, 20*time.Millisecond) // as a program that tries again
				}
			}
		})
	}
	err := r.faults(loading)
	load.Wait()
	r.report.Seconds = time.Since(began).Seconds()
	if err == nil && ctx.Err() == nil {
		err = r.recover(ctx)
	}
	r.report.After = r.idle(ctx)
	lost := r.far.lost()
	r.report.Lost += uint64(len(lost))
	r.report.Lines = append(r.report.Lines, lost...)
	return &r.report, err
}

// faults injects one after the other, and sees to it that each is got over.
func (r *run) faults(ctx context.Context) error {
	for i := 0; ; i++ {
		Pause(ctx, r.config.Every)
		if ctx.Err() != nil || len(r.config.Faults) == 0 {
			return nil
		}
		f := r.config.Faults[i%len(r.config.Faults)]
		r.phase.Store(f.Name)
		r.config.Progress(fmt.Sprintf("fault: %s; so far %s", f.Name, r.summary()))
		if err := f.Do(ctx); err != nil {
			if ctx.Err() != nil {
				return nil
			}
			return fmt.Errorf("fault %s: %w", f.Name, err)
		}
		r.mu.Lock()
		r.report.Faults[f.Name]++
		r.mu.Unlock()
		if err := r.recover(context.WithoutCancel(ctx)); err != nil {
			return fmt.Errorf("after the fault %s: %w", f.Name, err)
		}
	}
}

// recoveryTime bounds how long connections may fail after a fault is over.
const recoveryTime = time.Minute

var errNoRecovery = errors.New("no connection finished for a minute")

// recover waits for a connection of its own to finish.
func (r *run) recover(ctx context.Context) error {
	began := time.Now()
	for !r.one(ctx) {
		if ctx.Err() != nil {
			return nil // it was us who ended it
		}
		if time.Since(began) > recoveryTime {
			return errNoRecovery
		}
		Pause(ctx, 20*time.Millisecond)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.report.Recovery = max(r.report.Recovery, time.Since(began).Seconds())
	return nil
}

// idle measures once nothing changes any more.
func (r *run) idle(ctx context.Context) Usage {
	runtime.GC()
	last := r.config.Sample()
	for range 20 {
		Pause(ctx, 500*time.Millisecond)
		now := r.config.Sample()
		if now.Descriptors == last.Descriptors && now.Processes == last.Processes {
			return now
		}
		last = now
	}
	return last
}

func (r *run) summary() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return fmt.Sprintf("%d tried, %d finished, %d failed, %d lost, %d stalled",
		r.report.Tried, r.report.Finished, r.report.Failed, r.report.Lost, r.report.Stalled)
}

// Pause waits for d, or until ctx ends.
func Pause(ctx context.Context, d time.Duration) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
	}
}

// one makes one connection of a kind and size that chance decides, and reports
// whether it finished.
func (r *run) one(ctx context.Context) bool {
	job := newJob()
	n, err := r.try(ctx, job)
	if ctx.Err() != nil {
		return false // it was us who ended it
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.report.Tried++
	switch {
	case err == nil:
		r.report.Finished++
		r.report.Bytes += n
		return true
	case errors.Is(err, errIncomplete):
		r.report.Lost++
		r.report.Lines = append(r.report.Lines, fmt.Sprintf("%s: %v; last fault: %v", job, err, r.phase.Load()))
	case errors.Is(err, errStalled):
		r.report.Stalled++
		r.report.Lines = append(r.report.Lines, fmt.Sprintf("%s: %v; last fault: %v", job, err, r.phase.Load()))
	default:
		r.report.Failed++
		r.report.Errors[class(err)]++
	}
	return false
}

var (
	errIncomplete = errors.New("the stream ended as if it were complete, and was not")
	errStalled    = errors.New("nothing moved, and no error came")
)

// class is a short name of an error, for counting.
func class(err error) string {
	var c ptipc.Class
	var errno syscall.Errno
	switch {
	case errors.As(err, &c):
		return c.Error()
	case errors.As(err, &errno):
		return errno.Error()
	}
	for errors.Unwrap(err) != nil {
		err = errors.Unwrap(err)
	}
	return err.Error()
}

// try opens a connection and does the job.
func (r *run) try(ctx context.Context, j job) (uint64, error) {
	dialling, cancel := context.WithTimeoutCause(ctx, r.config.Patience, errStalled)
	defer cancel()
	conn, err := r.config.Dial(dialling)
	if err != nil {
		if errors.Is(context.Cause(dialling), errStalled) {
			return 0, fmt.Errorf("dialling: %w", errStalled)
		}
		return 0, err
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { conn.Close() })()
	n, err := j.do(&patient{conn, r.config.Patience})
	var timeout net.Error
	if errors.As(err, &timeout) && timeout.Timeout() {
		err = fmt.Errorf("after %d bytes: %w", n, errStalled)
	}
	return n, err
}

// A patient conn gives each Read and Write the same time.
type patient struct {
	Conn
	time time.Duration
}

func (p *patient) Read(b []byte) (int, error) {
	_ = p.SetReadDeadline(time.Now().Add(p.time)) // fails only if it is closed
	return p.Conn.Read(b)
}

func (p *patient) Write(b []byte) (int, error) {
	_ = p.SetWriteDeadline(time.Now().Add(p.time)) // fails only if it is closed
	return p.Conn.Write(b)
}

// maxSize is the largest stream; most are small.
const maxSize = 4 << 20

func newJob() job {
	size := uint64(1) << rand.N(23)
	return job{kind: kinds[rand.N(len(kinds))], size: min(size+rand.N(size), maxSize), seed: rand.Uint64()}
}
