package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/spf13/cobra"

	"pthost/adapters/free"
	"pthost/cmd/ptipc/internal/config"
	"pthost/ptipc"
	"pthost/ptipc/front"
	"pthost/ptipc/localnet"
)

// drainTime is how long connections may go on after Ctrl-C.
const drainTime = 3 * time.Second

func newRun(o *options) *cobra.Command {
	var listen, controlPath string
	var check bool
	cmd := &cobra.Command{
		Use:   "run [HOST.json]",
		Short: "Run transports and the fronts before them until Ctrl-C",
		Long: `Starts each transport of HOST.json, watches it, and opens the fronts through which
ordinary programs use it. Without a file it runs both ends of a WebSocket over TLS
in children of their own, behind a SOCKS5 proxy on 127.0.0.1:1080, and fetches a
page through it all, as a proof.

A front on udp://127.0.0.1:PORT forwards datagrams to one address, through a transport
that carries them; a SOCKS5 front in front of such a transport takes UDP ASSOCIATE too.
Datagrams go to addresses, never to names.

Other users of this machine are refused at every front. Ctrl-C ends everything
that was started; a second one does so at once.

While it starts and runs, ptipc status shows what it does, ptipc signal carries the
messages of its transports by hand, and ptipc stop ends it. They find it by its
control socket, which is for the same user alone. A second host of one user goes without
it, and says so, unless --control gives it one of its own.

A front's "via" puts an adapter over a transport whose far end is fixed: free opens one
connection of it for each stream, which is best for bulk; mux puts many streams on a few,
which is best for many short ones, such as a browser's. Both need a server with
"via": ["free"] at the far end.

The schema of HOST.json is spec/host.schema.json; ptipc check tells what is wrong
with a file without starting anything.`,
		Example: `  ptipc run
  ptipc run --listen 127.0.0.1:9150
  ptipc run --check && echo it works
  ptipc run host.json`,
		Args: usageArgs(cobra.MaximumNArgs(1)),
		ValidArgsFunction: func(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
			return []string{"json"}, cobra.ShellCompDirectiveFilterFileExt
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			opener, err := newOpener(o)
			if err != nil {
				return err
			}
			r := &runner{opener: opener, out: cmd.OutOrStdout(), control: controlPath, transports: map[string]*ptipc.Transport{}, servers: map[string]ptipc.ServerManager{}}
			var file *config.File
			var p *proof
			if len(args) == 1 {
				if listen != "" {
					return fmt.Errorf("--listen moves the front of the embedded default; %s has fronts of its own: %w", args[0], ptipc.ExitUsage)
				}
				file, err = config.Load(args[0])
			} else {
				if p, err = newProof(); err != nil {
					return err
				}
				defer p.close()
				file, err = embedded(cmd.Context(), opener, listen, p.addr())
			}
			if err != nil {
				return err
			}
			return r.run(cmd.Context(), file, p, check)
		},
	}
	cmd.Flags().StringVar(&listen, "listen", "", "where the front of the embedded default listens, IP:PORT (default 127.0.0.1:1080)")
	controlFlag(cmd, &controlPath)
	cmd.Flags().BoolVar(&check, "check", false, "stop when everything has started, and was proved to work; exit code 0 or 1")
	return cmd
}

func newCheck() *cobra.Command {
	return &cobra.Command{
		Use:   "check HOST.json",
		Short: "Say what is wrong with a configuration, without starting anything",
		Long: `Reads HOST.json as ptipc run does and checks all that can be checked without
starting a child. An error names the file, the place as a JSON pointer, the value
and the remedy.`,
		Example: `  ptipc check host.json`,
		Args:    usageArgs(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			file, err := config.Load(args[0])
			if err != nil {
				return err
			}
			opener, err := newOpener(&options{logFormat: "text", logLevel: "error"})
			if err != nil {
				return err
			}
			for _, name := range slices.Sorted(maps.Keys(file.Transports)) {
				if t := file.Transports[name]; len(t.Attach) == 0 {
					if _, err := opener.command(name, t); err != nil {
						return fmt.Errorf("%s: %w", args[0], err)
					}
					if err := checkDialect(name, t); err != nil {
						return fmt.Errorf("%s: %w", args[0], err)
					}
				}
			}
			fmt.Fprintf(cmd.OutOrStdout(), "%s: %d transports, %d fronts, no fault found\n", args[0], len(file.Transports), len(file.Fronts))
			return nil
		},
	}
}

// runner is one ptipc run.
type runner struct {
	opener     *opener
	out        io.Writer
	control    string // the control socket that was asked for; "" is the file's or the default
	transports map[string]*ptipc.Transport
	servers    map[string]ptipc.ServerManager
	fronts     []*runningFront
}

type runningFront struct {
	config.Front
	adapted *ptipc.Transport // what is under the front; nil under a delivery
	server  interface {
		Shutdown(ctx context.Context) error
	}
	listener interface{ Addr() net.Addr }
	ended    chan error
}

func (r *runner) run(ctx context.Context, file *config.File, p *proof, check bool) (err error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	console, err := newConsole(ctx, cancel, file, r.out, r.opener.log)
	if err != nil {
		return err
	}
	r.opener.console = console
	defer func() {
		if stopErr := errors.Join(r.stop(ctx), console.close()); stopErr != nil {
			err = errors.Join(err, stopErr)
		}
		if check && err != nil {
			// What went wrong is said here, since the exit code of --check is 1.
			complain(err)
			err = errors.Join(errSaid, ptipc.ExitCode(1))
		}
	}()
	if err := console.open(r.control, check); err != nil {
		return err
	}
	if err := r.start(ctx, file); err != nil {
		if ctx.Err() != nil {
			return nil // Ctrl-C during the start
		}
		return err
	}
	if p != nil {
		if err := r.prove(ctx, p); err != nil {
			if ctx.Err() != nil {
				return nil
			}
			return fmt.Errorf("the proof failed: %w", err)
		}
	}
	console.complete()
	if check {
		return nil
	}
	fmt.Fprintln(r.out, "press Ctrl-C to stop")
	return r.wait(ctx)
}

// start opens the transports and then the fronts, and says what it started.
func (r *runner) start(ctx context.Context, file *config.File) error {
	for _, name := range slices.Sorted(maps.Keys(file.Transports)) {
		t := file.Transports[name]
		began := time.Now()
		if t.Role == "server" {
			if err := r.startServer(ctx, name, t); err != nil {
				return err
			}
			continue
		}
		transport, err := r.opener.open(ctx, name, t)
		if err != nil {
			return err
		}
		r.transports[name] = transport
		r.opener.console.client(name, transport)
		what := t.Exec
		if what == "" {
			what = "a child that runs already"
		}
		fmt.Fprintf(r.out, "transport %s: %s is ready after %v, with %s\n", name, what,
			time.Since(began).Round(time.Millisecond), strings.Join(factories(transport), ", "))
	}
	for i, f := range file.Fronts {
		if err := r.startFront(f); err != nil {
			return fmt.Errorf("front %d: %w", i, err)
		}
	}
	return nil
}

// startServer starts a server, and what brings its connections to their service.
func (r *runner) startServer(ctx context.Context, name string, t config.Transport) error {
	began := time.Now()
	command, err := r.opener.command(name, t)
	if err != nil {
		return err
	}
	where := "connecting its clients itself"
	switch {
	case len(t.Via) > 0:
		config, err := freeConfig(t)
		if err != nil {
			return err
		}
		manager, err := free.Server(*command.Server()).Proxy(ctx, config, r.opener.env(name, t.State))
		if err != nil {
			return err
		}
		r.servers[name] = manager
		where = "free: connecting its clients to where they want to go"
	case t.Deliver == "":
		manager, err := command.Server().Proxy(ctx, t.Config, r.opener.env(name, t.State))
		if err != nil {
			return err
		}
		r.servers[name] = manager
	default:
		listener, err := command.Server().Listen(ctx, t.Config, r.opener.env(name, t.State))
		if err != nil {
			return err
		}
		r.servers[name] = listener
		server, err := front.Deliver(t.Deliver, t.ProxyProtocol, r.opener.log.With("transport", name))
		if err != nil {
			return err
		}
		running := &runningFront{Front: config.Front{Listen: "server " + name}, server: server, listener: listener, ended: make(chan error, 1)}
		r.fronts = append(r.fronts, running)
		go func() { running.ended <- server.Serve(listener) }()
		where = "delivering to " + t.Deliver
	}
	r.opener.console.server(name, r.servers[name])
	fmt.Fprintf(r.out, "server %s: %s is ready after %v, on %s, %s\n", name, t.Exec,
		time.Since(began).Round(time.Millisecond), r.servers[name].Addr(), where)
	return nil
}

// factories names what a transport offers, for people.
func factories(t *ptipc.Transport) []string {
	names := slices.Sorted(maps.Keys(t.Connections))
	for _, name := range slices.Sorted(maps.Keys(t.Packets)) {
		names = append(names, name+" for datagrams")
	}
	return names
}

func (r *runner) startFront(f config.Front) error {
	if f.Packets() {
		return r.startPackets(f)
	}
	transport, err := adapt(r.transports[f.Through()], f.Adapters())
	if err != nil {
		return fmt.Errorf("via: %w: %w", err, ptipc.ExitConfig)
	}
	chosen, name, err := factory(transport, f.Connection)
	if err != nil {
		return fmt.Errorf("connection: %w: %w", err, ptipc.ExitConfig)
	}
	log := r.opener.log.With("front", f.Listen, "transport", f.Through())
	var server front.Server
	switch {
	case f.Serve == "socks5" && chosen.Bound:
		return &ptipc.ConfigError{Pointer: "/serve", Value: `"socks5"`, Problem: "needs a free transport, and " + name + " is bound", Remedy: `write "serve": "forward"`}
	case f.Serve == "socks5":
		server = front.SOCKS5(chosen, f.Settings, log)
		if packets, _, err := packetFactory(transport, name); err == nil {
			server = front.SOCKS5WithPackets(chosen, packets, f.Settings, log)
		}
	case chosen.Bound && f.Dest != "":
		return &ptipc.ConfigError{Pointer: "/dest", Value: strconv.Quote(f.Dest), Problem: "has no meaning, since " + name + " is bound", Remedy: "remove it"}
	case !chosen.Bound && f.Dest == "":
		return &ptipc.ConfigError{Pointer: "/dest", Problem: "is missing, and " + name + " is free", Remedy: "add it: HOST:PORT"}
	default:
		server = front.Forward(chosen, f.Settings, f.Dest, log)
	}
	listener, err := front.Listen(f.Listen, log)
	if err != nil {
		return fmt.Errorf("%w: %w", err, ptipc.ExitUnavailable)
	}
	running := &runningFront{Front: f, adapted: transport, server: server, listener: listener, ended: make(chan error, 1)}
	r.fronts = append(r.fronts, running)
	go func() { running.ended <- server.Serve(listener) }()
	r.opener.console.front(running)
	fmt.Fprintf(r.out, "front %s: %s on %s, through %s\n", f.Listen, f.Serve, listener.Addr(), strings.Join(append(f.Adapters(), f.Through()), " over "))
	return nil
}

// startPackets starts a front for datagrams.
func (r *runner) startPackets(f config.Front) error {
	chosen, name, err := packetFactory(r.transports[f.Transport], f.Connection)
	if err != nil {
		return fmt.Errorf("connection: %w: %w", err, ptipc.ExitConfig)
	}
	to, err := netip.ParseAddrPort(f.Dest)
	if err != nil {
		return err // it was checked with the file
	}
	log := r.opener.log.With("front", f.Listen, "transport", f.Transport)
	conn, err := front.ListenPacket(f.Listen, log)
	if err != nil {
		return fmt.Errorf("%w: %w", err, ptipc.ExitUnavailable)
	}
	server := front.ForwardPackets(chosen, to, log)
	server.Idle, server.Max = time.Duration(f.Idle), f.Sessions
	running := &runningFront{Front: f, server: server, listener: packetFront{conn}, ended: make(chan error, 1)}
	r.fronts = append(r.fronts, running)
	go func() { running.ended <- server.Serve(conn) }()
	r.opener.console.front(running)
	fmt.Fprintf(r.out, "front %s: datagrams to %s on %s, through %s of %s\n", f.Listen, to, conn.LocalAddr(), name, f.Transport)
	return nil
}

// packetFront is the socket of a front for datagrams.
type packetFront struct{ *localnet.GuardedPacketConn }

func (f packetFront) Addr() net.Addr { return f.LocalAddr() }

// wait returns at Ctrl-C, or when a front or every transport has ended.
func (r *runner) wait(ctx context.Context) error {
	ended := make(chan error)
	var all sync.WaitGroup
	waits := map[string]func() error{}
	for name, t := range r.transports {
		waits[name] = t.Wait
	}
	for name, s := range r.servers {
		waits[name] = s.Wait
	}
	errs := make(chan error, len(waits))
	for name, wait := range waits {
		all.Go(func() {
			err := wait()
			if err != nil {
				r.opener.log.Error("transport has ended", "transport", name, "err", err)
			}
			errs <- err
		})
	}
	go func() {
		all.Wait()
		close(errs)
		var joined error
		for err := range errs {
			joined = errors.Join(joined, err)
		}
		select {
		case ended <- joined:
		case <-ctx.Done():
		}
	}()
	for _, f := range r.fronts {
		go func() {
			select {
			case err := <-f.ended:
				select {
				case ended <- err:
				case <-ctx.Done():
				}
			case <-ctx.Done():
			}
		}()
	}
	select {
	case err := <-ended:
		return err
	case <-ctx.Done():
		return nil
	}
}

// stop ends the fronts, then the transports, and leaves nothing behind.
func (r *runner) stop(ctx context.Context) error {
	if ctx.Err() != nil {
		fmt.Fprintln(r.out, "stopping")
	}
	grace, cancel := context.WithTimeout(context.WithoutCancel(ctx), drainTime)
	defer cancel()
	var stopping sync.WaitGroup
	for _, f := range r.fronts {
		stopping.Go(func() {
			if err := f.server.Shutdown(grace); err != nil {
				r.opener.log.Info("connections were cut", "front", f.Listen, "err", err)
			}
			if f.adapted != nil && len(f.Adapters()) > 0 {
				_ = f.adapted.Close() // the adapters' own; the transport's end is told below
			}
		})
	}
	stopping.Wait()
	var mu sync.Mutex
	var errs []error
	closes := map[string]func() error{}
	for name, t := range r.transports {
		closes[name] = t.Close
	}
	for name, s := range r.servers {
		closes[name] = s.Close
	}
	for name, end := range closes {
		stopping.Go(func() {
			// What a transport ended with by itself was told when it did.
			if err := end(); err != nil {
				mu.Lock()
				defer mu.Unlock()
				errs = append(errs, fmt.Errorf("transport %q: %w", name, err))
			}
		})
	}
	stopping.Wait()
	return errors.Join(errs...)
}
