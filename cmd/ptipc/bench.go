package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/spf13/cobra"

	"pthost/cmd/ptipc/internal/bench"
	"pthost/ptipc"
	"pthost/ptipc/host"
	"pthost/ptipc/stdio"
)

// benchPeer is the command of the processes that bench starts beside the child.
const benchPeer = "bench-peer"

// benchFlags are the flags of bench.
type benchFlags struct {
	execFlags
	asJSON   bool
	listen   string
	packets  string
	duration time.Duration
	rounds   int
	conns    int
	only     []string
	soak     time.Duration
}

func newBench(o *options) *cobra.Command {
	var f benchFlags
	cmd := &cobra.Command{
		Use:   "bench {EXE CONFIG | --soak DURATION}",
		Short: "Measure a transport beside the bare kernel path",
		Long: `Measures a transport's child: bulk throughput and its CPU time, dials, one-byte
round trips, idle connections, the time from spawn to ready, and datagrams: how
many, how many of them are lost, how long they take, and their CPU time. Beside it, in
turns and in the same run, stand no relay at all, the bare kernel path (a relay of
a few lines of Go, which splices), a minimal SOCKS5 server and, where it is
installed, microsocks. Each runs in a process of its own. The ratios are the
result; the absolute figures depend on the machine and on what else it does.

` + execUsage + `
The measured connections lead to a server that this command runs. A free transport
is given its address. A bound transport's own server has to deliver to it: choose
the address with --listen. Datagrams that only another transport understands go to
that one's address with --packets-to, and from there to the one of --listen.

As root on Linux it runs in a network namespace of its own, with cubic as TCP's
congestion control, where a transport that needs the network cannot be measured.
With --listen or --proxy it stays in the network that is there.

User memory is that of anonymous pages of the child and its descendants. Kernel
memory is what all slabs of the system have grown by: it covers the sockets of the
whole path from load to far end, and what else the system did meanwhile.

With --soak it measures nothing but endurance: the chain of ptipc run is put under
load for so long, while its children are killed, its carriers cut, its descriptors
used up and, as root on Linux, its disk filled. Every connection has to finish, or to
fail with an error; one that ends as if it were complete and is not makes the exit
code 1.`,
		Example: `  ptipc bench builtin:direct '{}'
  ptipc bench ./pt-x @pt-x.json --only bulk,dial --json
  ptipc bench ./pt-bound @client.json --listen 127.0.0.1:7000
  ptipc bench builtin:scramble @client.json --listen 127.0.0.1:7000 --packets-to 127.0.0.1:4444
  ptipc bench --soak 20m`,
		Args: usageArgs(func(cmd *cobra.Command, args []string) error {
			if f.soak != 0 {
				return cobra.NoArgs(cmd, args)
			}
			return cobra.ExactArgs(2)(cmd, args)
		}),
		ValidArgsFunction: completeExec,
		RunE: func(cmd *cobra.Command, args []string) error {
			if f.soak != 0 {
				return f.runSoak(cmd, o)
			}
			return f.run(cmd, o, args[0], args[1])
		},
	}
	f.add(cmd)
	cmd.Flags().BoolVar(&f.asJSON, "json", false, "write the report as JSON, with the figures of every round")
	cmd.Flags().StringVar(&f.listen, "listen", "", "where the far end listens, IP:PORT; by default a port of the loopback")
	cmd.Flags().StringVar(&f.packets, "packets-to", "", "where datagrams are sent, IP:PORT, if that is not the far end itself")
	cmd.Flags().DurationVar(&f.duration, "duration", 500*time.Millisecond, "how long each figure is measured in each round")
	cmd.Flags().IntVar(&f.rounds, "rounds", 7, "how many rounds there are")
	cmd.Flags().IntVar(&f.conns, "idle", 1000, "how many idle connections there are")
	cmd.Flags().StringSliceVar(&f.only, "only", nil, "measure these alone: "+strings.Join(bench.Groups, ", "))
	cmd.Flags().DurationVar(&f.soak, "soak", 0, "put the chain of ptipc run under load for so long while things go wrong")
	err := cmd.RegisterFlagCompletionFunc("only", cobra.FixedCompletions(bench.Groups, cobra.ShellCompDirectiveNoFileComp))
	if err != nil {
		panic(err) // the flag was defined a line above
	}
	cmd.AddCommand(&cobra.Command{
		Use:    benchPeer,
		Short:  "Be what a transport is measured beside",
		Hidden: true,
		RunE: func(cmd *cobra.Command, args []string) error {
			return bench.RunPeer(cmd.Context(), args, os.Stdin, os.Stdout)
		},
	})
	return cmd
}

func (f *benchFlags) check() error {
	usage := func(format string, a ...any) error {
		return fmt.Errorf("%w: %w", fmt.Errorf(format, a...), ptipc.ExitUsage)
	}
	if f.listen != "" {
		if _, err := netip.ParseAddrPort(f.listen); err != nil {
			return usage("--listen %q: %w; write IP:PORT", f.listen, err)
		}
	}
	if f.packets != "" {
		if _, err := netip.ParseAddrPort(f.packets); err != nil {
			return usage("--packets-to %q: %w; write IP:PORT", f.packets, err)
		}
	}
	switch {
	case f.duration < time.Millisecond:
		return usage("--duration %v is too short; write 1ms or more", f.duration)
	case f.rounds < 1:
		return usage("--rounds %d is too few; write 1 or more", f.rounds)
	case f.conns < 1:
		return usage("--idle %d is too few; write 1 or more", f.conns)
	}
	return bench.CheckGroups(f.only)
}

func (f *benchFlags) run(cmd *cobra.Command, o *options, exe, configText string) error {
	if err := f.check(); err != nil {
		return err
	}
	ctx := cmd.Context()
	network := bench.Network{Why: "the far end, or the proxy, is reached through the network that is there"}
	if f.listen == "" && f.proxy == "" && f.packets == "" {
		going, n, code, done, err := bench.EnterNamespace(ctx)
		if err != nil {
			return err
		}
		if done && code != 0 {
			return errors.Join(errSaid, ptipc.ExitCode(code))
		}
		if done {
			return nil
		}
		ctx, network = going, n
	}
	network.CongestionControl = bench.CongestionControl()

	opener, err := newOpener(o)
	if err != nil {
		return err
	}
	c := bench.Config{
		Transport: exe, Peer: []string{opener.self, "bench", benchPeer}, Listen: f.listen, PacketsTo: f.packets,
		Duration: f.duration, Rounds: f.rounds, Conns: f.conns, Only: f.only, Network: network,
		Progress: func(what string) { fmt.Fprintln(os.Stderr, "bench:", what) },
	}
	settings, err := inline("--settings", f.settings)
	if err != nil {
		return err
	}
	c.Settings = ptipc.Opaque(settings)
	state := f.state
	if state == "" {
		// The way of the wire leads through it, so it has to be known.
		if state, err = os.MkdirTemp("", "ptipc-bench-"); err != nil {
			return err
		}
		defer os.RemoveAll(state)
	}
	if c.Open, err = f.child(opener, exe, configText, state); err != nil {
		return err
	}
	report, err := bench.Run(ctx, c)
	if ctx.Err() != nil {
		return fmt.Errorf("interrupted, and there is no report: %w", ptipc.ExitTempFail)
	}
	if err != nil {
		return err
	}
	if f.asJSON {
		encoder := json.NewEncoder(cmd.OutOrStdout())
		encoder.SetIndent("", "  ")
		return encoder.Encode(report)
	}
	return report.WriteText(cmd.OutOrStdout())
}

// child returns what starts the child. It listens to the control lines: the way of
// the wire leads to the socket that they announce.
func (f *benchFlags) child(o *opener, exe, configText, state string) (func(ctx context.Context) (*bench.Child, error), error) {
	object, err := inline("CONFIG", configText)
	if err != nil {
		return nil, err
	}
	proxy, err := inline("--proxy", f.proxy)
	if err != nil {
		return nil, err
	}
	t, err := f.config(exe)
	if err != nil {
		return nil, err
	}
	t.Config, t.Proxy, t.Restart.Policy = ptipc.Opaque(object), strings.TrimSpace(proxy), "never"
	if err := t.Validate(); err != nil {
		return nil, fmt.Errorf("%w: %w", err, ptipc.ExitUsage)
	}
	return func(ctx context.Context) (*bench.Child, error) {
		command, err := o.command("bench", t)
		if err != nil {
			return nil, err
		}
		var mu sync.Mutex
		addrs := map[string]string{}
		c := &bench.Child{Dir: state}
		command.Events = func(e host.Event) {
			mu.Lock()
			defer mu.Unlock()
			if e.Kind == host.Started {
				c.Pid = e.Pid
			}
		}
		shown := command.Trace
		command.Trace = func(fromChild bool, line []byte) {
			if shown != nil {
				shown(fromChild, line)
			}
			message, err := stdio.Parse(line)
			if err != nil || !fromChild {
				return
			}
			if m, ok := message.(stdio.CMethod); ok && m.Protocol == stdio.ProtocolSOCKS5 {
				mu.Lock()
				defer mu.Unlock()
				addrs[m.Name] = m.Addr
			}
		}
		env := o.env("bench", state)
		env.Status = func(context.Context, ...slog.Attr) {} // a bootstrap at every start
		transport, err := command.Open(ctx, t.Config, env)
		if err != nil {
			return nil, err
		}
		_, packets, noPackets := packetFactory(transport, f.factory)
		_, name, err := factory(transport, f.factory)
		if err != nil && noPackets != nil {
			return nil, errors.Join(fmt.Errorf("--factory: %w: %w", err, ptipc.ExitUsage), transport.Close())
		}
		mu.Lock()
		defer mu.Unlock()
		c.Transport, c.Name, c.Addr, c.Packets = transport, name, addrs[name], packets
		return c, nil
	}, nil
}
