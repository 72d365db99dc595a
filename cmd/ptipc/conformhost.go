package main

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"pthost/ptipc"
	"pthost/ptipc/conformance"
	"pthost/ptipc/conformance/hosts"
)

// conformChildCommand is what ptipc conform-host has as its child.
const conformChildCommand = "conform-child"

func newConformChild() *cobra.Command {
	return &cobra.Command{
		Use:                conformChildCommand,
		Short:              "Be the child that ptipc conform-host lets a host start",
		Hidden:             true,
		DisableFlagParsing: true,
		RunE: func(_ *cobra.Command, args []string) error {
			os.Exit(hosts.Child(args))
			return nil
		},
	}
}

// conformHostFlags are the flags of ptipc conform-host.
type conformHostFlags struct {
	run, format string
	list        bool
	subject     hosts.Subject
	options     hosts.Options
}

func newConformHost() *cobra.Command {
	var f conformHostFlags
	cmd := &cobra.Command{
		Use:   "conform-host [FLAGS] -- COMMAND…",
		Short: "Say whether a host keeps to the specification",
		Long: `Runs the host that COMMAND starts again and again, each time with a child that lies,
stalls, floods, crashes, forks, ignores signals, prints garbage, or announces public
addresses and other people's sockets, and says which clauses of spec/ptipc.md the
host keeps. Of a case that fell short it shows what was expected, what came, what the
child saw, and what the host wrote.

COMMAND stays in the foreground, and SIGTERM ends it. In its words stand for

  {child}   the executable of the transport, whose name is "probe"
  {config}  a HOST.json that says all a case needs, for hosts that read such a file;
            without it, cases about settings, proxies and servers could not run
  {front}   the IP:PORT at which the host has to serve an ordinary SOCKS5 proxy
  {proxy}   the IP:PORT of an upstream proxy
  {dir}     an empty directory of the host's own

{child} or {config} has to be there. A host with neither {config} nor {front} makes
its connections by itself, as tor does. --dialect pt1 makes the child a managed
transport of tor's; its bridge needs the argument key=value.

Each case is named by its clause, such as LIFE-5/setsid. A MUST decides; a SHOULD is
reported, and counts with --strict. Processes are looked at in Linux's /proc.

The exit code is 0 when everything held that could run, 1 when something fell short,
and 2 when nothing could run; 64 is a wrong command line, as everywhere.`,
		Example: `  ptipc conform-host -- ptipc run {config}
  ptipc conform-host --run '^LIFE-' --format tap -- ./myhost --exec {child} --socks {front}
  ptipc conform-host --dialect pt1 -- tor -f /dev/null --DataDirectory {dir} --UseBridges 1 \
    --ClientTransportPlugin 'probe exec {child}' --Bridge 'probe 192.0.2.3:80 key=value'
  ptipc conform-host --list`,
		Args: usageArgs(func(_ *cobra.Command, args []string) error {
			if !f.list && len(args) == 0 {
				return errors.New("COMMAND is needed")
			}
			return nil
		}),
		RunE: func(cmd *cobra.Command, args []string) error {
			f.options.Pattern = f.run
			if f.list {
				return f.showCases(cmd)
			}
			return f.conform(cmd, args)
		},
	}
	flags := cmd.Flags()
	flags.SetInterspersed(false) // what follows COMMAND is COMMAND's
	flags.StringVar(&f.subject.Dialect, "dialect", hosts.Seed, "what the child speaks: seed (spec/ptipc.md) or pt1 (spec/pt1.md)")
	flags.StringVar(&f.run, "run", "", "run only the cases whose names match a regular expression")
	flags.BoolVar(&f.options.Strict, "strict", false, "a SHOULD counts as a MUST")
	flags.StringVar(&f.format, "format", "text", "how results are written: text, tap, json or junit")
	flags.BoolVar(&f.list, "list", false, "list the cases, and start nothing")
	flags.DurationVar(&f.options.Patience, "patience", 5*time.Second, "how long is waited for each single thing")
	flags.IntVar(&f.options.Parallel, "parallel", 2*runtime.NumCPU(), "how many cases are run at once")
	for flag, values := range map[string][]string{"dialect": hosts.Dialects(), "format": conformance.Formats()} {
		if err := cmd.RegisterFlagCompletionFunc(flag, cobra.FixedCompletions(values, cobra.ShellCompDirectiveNoFileComp)); err != nil {
			panic(err) // the flag was defined above
		}
	}
	return cmd
}

func (f *conformHostFlags) conform(cmd *cobra.Command, args []string) error {
	out, err := conformance.NewWriter(cmd.OutOrStdout(), f.format, f.options.Strict)
	if err != nil {
		return err
	}
	self, err := os.Executable()
	if err != nil {
		return fmt.Errorf("finding this executable, which is the child: %w", err)
	}
	f.subject.Command, f.subject.Child = args, []string{self, conformChildCommand}
	var writing error
	f.options.OnResult = func(r conformance.Result) { writing = errors.Join(writing, out.Add(r)) }
	report, err := hosts.Run(cmd.Context(), f.subject, f.options)
	switch {
	case err != nil && ptipc.ExitCodeOf(err) == ptipc.ExitUsage:
		return err
	case err != nil:
		return conformNotRun(err)
	}
	if err := errors.Join(writing, out.Close()); err != nil {
		return err
	}
	return verdict(cmd.Context(), report)
}

// showCases lists the cases that match.
func (f *conformHostFlags) showCases(cmd *cobra.Command) error {
	cases, err := hosts.CasesOf(f.subject.Dialect, f.options)
	if err != nil {
		return err
	}
	table := tabwriter.NewWriter(cmd.OutOrStdout(), 0, 0, 2, ' ', 0)
	for _, c := range cases {
		fmt.Fprintf(table, "%s\t%s\n", c.Level, c.Name)
	}
	if err := table.Flush(); err != nil {
		return fmt.Errorf("%w: %w", err, ptipc.ExitIOErr)
	}
	return nil
}
