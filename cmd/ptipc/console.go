package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"pthost/cmd/ptipc/internal/config"
	"pthost/cmd/ptipc/internal/control"
	"pthost/cmd/ptipc/internal/metrics"
	"pthost/ptipc"
	"pthost/ptipc/courier"
	"pthost/ptipc/host"
)

// console is what the operator sees of a ptipc run and does to it: it follows the
// children, carries the signals, and answers at the control socket.
type console struct {
	log   *slog.Logger
	out   io.Writer
	began time.Time
	file  *config.File

	couriers map[string]carrier
	servers  []*control.Server // of the metrics, and then of the control socket

	stop context.CancelFunc // ends the runner,
	up   context.Context    // and ends with it

	mu       sync.Mutex
	started  bool // all of it
	children map[string]*childState
	opened   map[string]openTransport
	fronts   []openFront
}

// openTransport is what a transport tells since it was opened.
type openTransport struct {
	stats func(ctx context.Context) (ptipc.TransportStats, error)
	addr  string // of a server's wire
}

// openFront is a front that serves.
type openFront struct {
	control.Front
	refused func() uint64 // nil where it is not counted
}

// maxProgress bounds what a child's STATUS puts into the status.
const maxProgress = 400

// carrier is a courier, which is closed when its transport has ended.
type carrier interface {
	ptipc.Signals
	io.Closer
}

// childState is what the events of a transport tell.
type childState struct {
	state     control.State
	pid       int
	since     time.Time
	starts    uint64
	progress  string // the last STATUS of the child that runs
	lastError string
}

// newConsole makes the couriers of all transports. stop ends the runner, which ends
// up: both come before the transports, since a slow start is when people ask and
// stop.
func newConsole(up context.Context, stop context.CancelFunc, file *config.File, out io.Writer, log *slog.Logger) (*console, error) {
	c := &console{
		log: log, out: out, began: time.Now(), file: file, up: up, stop: stop,
		couriers: map[string]carrier{}, children: map[string]*childState{}, opened: map[string]openTransport{},
	}
	for _, name := range slices.Sorted(maps.Keys(file.Transports)) {
		t := file.Transports[name]
		if len(t.Attach) > 0 {
			continue // it has no control lines
		}
		carrier, err := newCourier(t, log.With("transport", name))
		if err != nil {
			return nil, errors.Join(fmt.Errorf("transport %s: signals: %w", name, err), c.close())
		}
		c.couriers[name] = carrier
	}
	return c, nil
}

func newCourier(t config.Transport, log *slog.Logger) (carrier, error) {
	options := courier.Options{Server: t.Role == "server", Log: log}
	switch {
	case t.Signals.Dir != "":
		return courier.OpenDir(t.Signals.Dir, options)
	case len(t.Signals.Command.Send) > 0:
		return courier.StartCommand(t.Signals.Command.Send, t.Signals.Command.Receive, options)
	}
	return courier.NewQueue(options), nil
}

// signals is the courier of a transport, for its environment.
func (c *console) signals(name string) ptipc.Signals {
	if carrier, ok := c.couriers[name]; ok {
		return carrier
	}
	return nil
}

// event follows the child of a transport.
func (c *console) event(name string, e host.Event) {
	c.mu.Lock()
	defer c.mu.Unlock()
	child := c.child(name)
	switch e.Kind {
	case host.Started:
		child.starts++
		child.pid, child.progress = e.Pid, ""
	case host.Ready:
		child.state, child.since = control.Ready, time.Now()
	case host.Exited:
		child.state, child.pid = control.Ended, 0 // unless Restarting follows at once
		if ptipc.ExitCodeOf(e.Err) != ptipc.ExitOK {
			child.lastError = e.Err.Error()
		}
	case host.Restarting:
		child.state, child.pid = control.Restarting, 0
	case host.GaveUp:
		child.state, child.pid, child.lastError = control.Ended, 0, e.Err.Error()
	}
}

// child is the state of a transport's child. The caller holds c.mu.
func (c *console) child(name string) *childState {
	child := c.children[name]
	if child == nil {
		child = &childState{state: control.Starting}
		c.children[name] = child
	}
	return child
}

// progress keeps what a transport has last told of its bootstrap (LINE-10).
func (c *console) progress(name string, attrs []slog.Attr) {
	words := make([]string, len(attrs))
	for i, attr := range attrs {
		words[i] = attr.String()
	}
	text := strings.ToValidUTF8(strings.Join(words, " "), "\ufffd")
	if len(text) > maxProgress {
		text = strings.ToValidUTF8(text[:maxProgress], "") + "…"
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.child(name).progress = text
}

// client takes over a transport that has been opened.
func (c *console) client(name string, t *ptipc.Transport) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.opened[name] = openTransport{stats: t.Stats}
}

// server takes over a server that has been opened.
func (c *console) server(name string, s ptipc.ServerManager) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.opened[name] = openTransport{
		stats: func(context.Context) (ptipc.TransportStats, error) { return s.Stats(), nil },
		addr:  s.Addr().String(),
	}
}

// front takes over a front that serves.
func (c *console) front(f *runningFront) {
	shown := openFront{Front: control.Front{Address: f.listener.Addr().String(), Serve: f.Serve, Transport: f.Through()}}
	if path, ok := strings.CutPrefix(f.Listen, "unix://"); ok {
		shown.Address = path
	} else if f.Packets() {
		shown.Address = "udp://" + shown.Address // one for streams may have the same port
	}
	if guard, ok := f.listener.(interface{ Refused() uint64 }); ok {
		shown.refused = guard.Refused
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.fronts = append(c.fronts, shown)
}

// complete says that everything has started.
func (c *console) complete() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.started = true
}

// open opens the address of the metrics, and the control socket. Only one that was
// asked for has to be had: the default one may be another host's, and a mere check
// goes without.
func (c *console) open(at string, check bool) error {
	if url := c.file.Metrics; url != "" {
		listener, err := metrics.Listen(url, c.log)
		if err != nil {
			return fmt.Errorf("metrics: %w: %w", err, ptipc.ExitUnavailable)
		}
		c.servers = append(c.servers, control.Serve(listener, metrics.Handler(c.Status, c.log), c.log))
		where := "http://" + listener.Addr().String() + "/metrics"
		if path, ok := strings.CutPrefix(url, "unix://"); ok {
			where = "/metrics on unix://" + path
		}
		fmt.Fprintf(c.out, "metrics: %s\n", where)
	}
	if at == "" {
		at = c.file.Control
	}
	if at == "" {
		if !check {
			c.openDefault()
		}
		return nil
	}
	at = strings.TrimPrefix(at, "unix://")
	listener, err := control.Listen(at, c.log)
	if err != nil {
		return fmt.Errorf("the control socket: %w: %w", err, ptipc.ExitUnavailable)
	}
	c.servers = append(c.servers, control.Serve(listener, control.Handler(c), c.log))
	fmt.Fprintf(c.out, "control: unix://%s, for ptipc status --control %s\n", at, at)
	return nil
}

func (c *console) openDefault() {
	listener, at, err := control.ListenDefault(c.log)
	switch {
	case errors.Is(err, syscall.EADDRINUSE):
		c.log.Warn("another host has the control socket, and this one goes without; give it one of its own with --control PATH", "path", at)
	case err != nil:
		c.log.Warn("ptipc status, stop and signal will not find this host: there is no control socket; give it one with --control PATH", "err", err)
	default:
		c.servers = append(c.servers, control.Serve(listener, control.Handler(c), c.log))
		fmt.Fprintf(c.out, "control: unix://%s, for ptipc status\n", at)
	}
}

// close ends what the console runs, after the transports have ended. The control
// socket goes last: that it is gone tells that all is.
func (c *console) close() error {
	var errs []error
	for _, name := range slices.Sorted(maps.Keys(c.couriers)) {
		errs = append(errs, c.couriers[name].Close())
	}
	for _, s := range c.servers { // the control socket is the last
		errs = append(errs, s.Close())
	}
	return errors.Join(errs...)
}

// Status is the host now.
func (c *console) Status(ctx context.Context) control.Status {
	c.mu.Lock()
	fronts, started := slices.Clone(c.fronts), c.started
	c.mu.Unlock()
	s := control.Status{
		Time: time.Now(), PID: os.Getpid(), Started: c.began,
		Starting: !started, Stopping: c.up.Err() != nil,
	}
	for _, f := range fronts {
		if f.refused != nil {
			n := f.refused()
			f.Refused = &n
		}
		s.Fronts = append(s.Fronts, f.Front)
	}
	for _, name := range slices.Sorted(maps.Keys(c.file.Transports)) {
		s.Transports = append(s.Transports, c.transport(ctx, name))
	}
	return s
}

func (c *console) transport(ctx context.Context, name string) control.Transport {
	config := c.file.Transports[name]
	t := control.Transport{Name: name, Exec: config.Exec, Role: config.Role, State: control.Starting}
	if t.Role == "" {
		t.Role = "client"
	}
	switch carrier := c.couriers[name].(type) {
	case *courier.Queue:
		t.Signals, t.Pending = "queue", len(carrier.Pending())
	case *courier.Dir:
		t.Signals = "dir"
	case *courier.Command:
		t.Signals = "command"
	}
	c.mu.Lock()
	opened, ok := c.opened[name]
	child := c.children[name]
	if child != nil {
		t.State, t.PID, t.Progress, t.LastError = child.state, child.pid, child.progress, child.lastError
		if child.starts > 0 {
			t.Restarts = child.starts - 1
		}
		if child.state == control.Ready {
			since := child.since
			t.Since = &since
		}
	}
	c.mu.Unlock()
	if !ok {
		return t
	}
	if child == nil {
		t.State = control.Ready // it is somebody else's, who does not tell
	}
	t.Address = opened.addr
	if totals, err := opened.stats(ctx); err == nil {
		t.Stats = &totals
	}
	return t
}

// Stop ends the run as Ctrl-C does.
func (c *console) Stop() {
	c.log.Info("asked to stop at the control socket")
	c.stop()
}

// queue is the courier of a transport, if people carry its signals.
func (c *console) queue(name string) (*courier.Queue, error) {
	t, ok := c.file.Transports[name]
	if !ok {
		return nil, fmt.Errorf("the host has no transport %q; it has %s: %w", name,
			strings.Join(slices.Sorted(maps.Keys(c.file.Transports)), ", "), ptipc.ExitUsage)
	}
	switch carrier := c.couriers[name].(type) {
	case *courier.Queue:
		return carrier, nil
	case *courier.Dir:
		return nil, fmt.Errorf("the signals of %s are carried through the directory %s: look there: %w", name, t.Signals.Dir, ptipc.ExitUsage)
	case *courier.Command:
		return nil, fmt.Errorf("the signals of %s are carried by the command %s: %w", name, t.Signals.Command.Send[0], ptipc.ExitUsage)
	}
	return nil, fmt.Errorf("%s is a child that somebody else runs, and has no signals here: %w", name, ptipc.ExitUsage)
}

// Signals lists what waits to be carried by people.
func (c *console) Signals(transport string) ([]control.Signal, error) {
	names := []string{transport}
	if transport == "" {
		names = slices.Sorted(maps.Keys(c.couriers))
	}
	signals := []control.Signal{}
	for _, name := range names {
		queue, err := c.queue(name)
		if err != nil {
			if transport == "" {
				continue // carried by something else
			}
			return nil, err
		}
		for _, p := range queue.Pending() {
			signals = append(signals, control.Signal{Transport: name, ID: p.ID, Time: p.Time, Message: p.Message})
		}
	}
	return signals, nil
}

// AddSignal takes in what somebody has carried here.
func (c *console) AddSignal(transport string, m ptipc.Message) error {
	queue, err := c.queue(transport)
	if err != nil {
		return err
	}
	if err := queue.Add(m); err != nil {
		return fmt.Errorf("%w: %w", err, ptipc.ExitTempFail)
	}
	return nil
}
