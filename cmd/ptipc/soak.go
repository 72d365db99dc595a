package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"pthost/cmd/ptipc/internal/bench"
	"pthost/cmd/ptipc/internal/config"
	"pthost/cmd/ptipc/internal/soak"
	"pthost/ptipc"
	"pthost/ptipc/host"
	"pthost/ptipc/localnet"
	"pthost/socks"
)

const (
	soakStreams     = 16
	soakEvery       = 3 * time.Second
	soakPatience    = 90 * time.Second // a peer that has gone without a word is missed after 60
	soakDescriptors = 300              // of each child, so that they can be used up
	soakDisk        = 1 << 20          // bytes for the state directories
	soakHold        = 2 * time.Second  // how long a shortage lasts
)

// runSoak is ptipc bench --soak.
func (f *benchFlags) runSoak(cmd *cobra.Command, o *options) (err error) {
	if f.soak < time.Second {
		return fmt.Errorf("--soak %v is too short; write 1s or more: %w", f.soak, ptipc.ExitUsage)
	}
	ctx, network, code, done, err := bench.EnterNamespace(cmd.Context())
	switch {
	case err != nil:
		return err
	case done && code != 0:
		return errors.Join(errSaid, ptipc.ExitCode(code))
	case done:
		return nil
	}
	quiet := *o
	if !cmd.Flags().Changed("log-level") {
		quiet.logLevel = "error" // that children are killed is no news here
	}
	opener, err := newOpener(&quiet)
	if err != nil {
		return err
	}
	s := &soaking{pids: map[string]int{}}
	opener.watch = s.event
	if s.dir, err = os.MkdirTemp("", "ptipc-soak-"); err != nil {
		return err
	}
	defer os.RemoveAll(s.dir)
	disk := errors.New(network.Why)
	if network.Namespace {
		var unmount func() error
		if unmount, disk = bench.MountSmall(s.dir, soakDisk); disk == nil {
			defer func() { err = errors.Join(err, unmount()) }()
		}
	}
	far, err := localnet.ListenTCP("127.0.0.1:0")
	if err != nil {
		return err
	}
	defer far.Close()
	r, err := s.start(ctx, opener, far.Addr().String())
	if err != nil {
		return err
	}
	defer func() {
		err = errors.Join(err, s.wire.Close(), r.stop(context.WithoutCancel(ctx)), opener.console.close())
	}()

	c := soak.Config{
		Duration: f.soak, Streams: soakStreams, Every: soakEvery, Dial: s.dial, Patience: soakPatience, Listener: far,
		Faults: []soak.Fault{
			{Name: "the client child is killed", Do: s.kill("client")},
			{Name: "the server child is killed", Do: s.kill("server")},
			{Name: "the carriers are cut", Do: s.wire.Cut},
			{Name: "descriptors run out", Do: s.exhaust},
		},
		Sample: func() (u soak.Usage) {
			u.Processes, u.Descriptors, u.Memory = bench.Processes(os.Getpid())
			return u
		},
		Progress: func(what string) { fmt.Fprintln(os.Stderr, "soak:", what) },
	}
	if disk == nil {
		c.Faults = append(c.Faults, soak.Fault{Name: "the disk is full while a child starts", Do: s.fill})
	}
	report, err := soak.Run(ctx, c)
	if report == nil {
		return err
	}
	if disk != nil {
		report.Skipped = append(report.Skipped, fmt.Sprintf("the disk is full while a child starts (%v)", disk))
	}
	if f.asJSON {
		encoder := json.NewEncoder(cmd.OutOrStdout())
		encoder.SetIndent("", "  ")
		err = errors.Join(err, encoder.Encode(report))
	} else {
		err = errors.Join(err, report.WriteText(cmd.OutOrStdout()))
	}
	if err == nil && !report.OK() {
		err = fmt.Errorf("%d connections were lost silently and %d stalled, of %d: %w", report.Lost, report.Stalled, report.Tried, ptipc.ExitCode(1))
	}
	return err
}

// soaking is the chain that is put under load: that of ptipc run without a file, with
// a wire that can be cut.
type soaking struct {
	dir   string // of the state directories
	front string
	dest  string // the far end
	wire  *soak.Wire

	mu   sync.Mutex
	pids map[string]int
}

func (s *soaking) event(name string, e host.Event) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if e.Kind == host.Ready {
		s.pids[name] = e.Pid
	} else {
		delete(s.pids, name)
	}
}

func (s *soaking) start(ctx context.Context, o *opener, far string) (*runner, error) {
	file, err := embedded(ctx, o, "127.0.0.1:0", far)
	if err != nil {
		return nil, err
	}
	for name, t := range file.Transports {
		t.State = filepath.Join(s.dir, name)
		t.Limits.Descriptors = soakDescriptors
		// Children are killed far more often here than a breaker would stand.
		t.Restart = config.Restart{Min: config.Duration(50 * time.Millisecond), Max: config.Duration(time.Second), GiveUpAfter: 1 << 20}
		file.Transports[name] = t
	}
	client := file.Transports["client"]
	var settings map[string]any
	if err := json.Unmarshal(client.Config, &settings); err != nil {
		return nil, err
	}
	server, err := url.Parse(fmt.Sprint(settings["url"]))
	if err != nil {
		return nil, err
	}
	if s.wire, err = soak.NewWire(server.Host); err != nil {
		return nil, err
	}
	server.Host = s.wire.Addr()
	settings["url"] = server.String()
	if client.Config, err = json.Marshal(settings); err != nil {
		return nil, errors.Join(err, s.wire.Close())
	}
	file.Transports["client"] = client
	if o.console, err = newConsole(ctx, func() {}, file, io.Discard, o.log); err != nil {
		return nil, errors.Join(err, s.wire.Close())
	}
	r := &runner{opener: o, out: io.Discard, transports: map[string]*ptipc.Transport{}, servers: map[string]ptipc.ServerManager{}}
	if err := r.start(ctx, file); err != nil {
		return nil, errors.Join(err, s.wire.Close(), r.stop(ctx), o.console.close())
	}
	s.front = r.fronts[0].listener.Addr().String()
	s.dest = far
	return r, nil
}

// dial is a program that connects through the proxy.
func (s *soaking) dial(ctx context.Context) (soak.Conn, error) {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "tcp", s.front)
	if err != nil {
		return nil, err
	}
	if err := socks.ConnectUpstream(ctx, conn, nil, s.dest); err != nil {
		return nil, errors.Join(err, conn.Close())
	}
	return conn.(*net.TCPConn), nil
}

// kill kills a child, once it is there.
func (s *soaking) kill(name string) func(ctx context.Context) error {
	return func(ctx context.Context) error {
		for ctx.Err() == nil {
			s.mu.Lock()
			pid := s.pids[name]
			s.mu.Unlock()
			if pid != 0 {
				process, err := os.FindProcess(pid)
				if err == nil {
					err = process.Kill()
				}
				if errors.Is(err, os.ErrProcessDone) {
					return nil
				}
				return err
			}
			soak.Pause(ctx, 10*time.Millisecond)
		}
		return ctx.Err()
	}
}

// exhaust opens idle connections until the children have no descriptors for more.
func (s *soaking) exhaust(ctx context.Context) error {
	var idle []net.Conn
	defer func() {
		for _, conn := range idle {
			conn.Close()
		}
	}()
	for range soakDescriptors {
		dialling, cancel := context.WithTimeout(ctx, soakHold)
		conn, err := s.dial(dialling)
		cancel()
		if err != nil {
			break // there are none left
		}
		idle = append(idle, conn)
	}
	soak.Pause(ctx, soakHold)
	return nil
}

// fill leaves no room for the state of a child that is started again.
func (s *soaking) fill(ctx context.Context) (err error) {
	dir := filepath.Join(s.dir, "full")
	if err := os.Mkdir(dir, 0o700); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	for i := 0; ; i++ {
		err := os.WriteFile(filepath.Join(dir, strconv.Itoa(i)), make([]byte, 4<<10), 0o600)
		if errors.Is(err, syscall.ENOSPC) {
			break
		}
		if err != nil {
			return err
		}
	}
	if err := s.kill("client")(ctx); err != nil {
		return err
	}
	if err := s.kill("server")(ctx); err != nil {
		return err
	}
	soak.Pause(ctx, soakHold)
	return nil
}
