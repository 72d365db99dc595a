package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"pthost/ptipc"
	"pthost/ptipc/conformance"
)

// The exit codes of ptipc conform that are not those of sysexits.
const (
	exitFellShort ptipc.ExitCode = 1
	exitNotRun    ptipc.ExitCode = 2
)

// everyRole is what --role takes beside the roles of conformance.
const everyRole = "all"

func conformRoles() []string {
	return []string{conformance.Client, conformance.Server, conformance.Generate, everyRole}
}

// conformFlags are the flags of ptipc conform.
type conformFlags struct {
	role, run, format string
	strict, quick     bool
	list, generate    bool
	settings          string
	subject           conformance.Subject
	patience          time.Duration
}

func newConform() *cobra.Command {
	var f conformFlags
	cmd := &cobra.Command{
		Use:   "conform [FLAGS] -- EXE [ARGS…] CONFIG",
		Short: "Say whether a transport's executable keeps to the specification",
		Long: `Starts EXE again and again, as a host would, does to it what hosts, clients and
networks do, and says which clauses of spec/ptipc.md it keeps. Of a case that fell
short it shows what was expected, what came, and the bytes that led there.

Each case is named by its clause, such as SOCKS-5/byte-by-byte. A MUST decides. A
SHOULD is reported, and counts with --strict. What is about something that EXE does
not have (a bound transport has no destinations), or that this machine cannot show,
could not run and says why; some cases need Linux, and some of these root.

EXE is a path, a name in PATH, or builtin:NAME, ARGS are its own arguments, in which
files have whole paths, since it runs in a directory of its own. CONFIG is a JSON
object, or @FILE. It stands on command lines that every user of this machine can read.
What it says depends on dialect and role. Of a child of this project's own protocol:

  client    a configuration that works. A free transport is led to an echo server
            on this machine; where a bound one leads to an echo server, say --echoes
  server    one for a server whose wire is plain TCP
  generate  options from which EXE makes configurations for both sides
  all       the same; each side is then started with what was generated, and
            reached through the other one. --generate is that for one role

--dialect pt1 looks at one of Tor's managed transports, such as obfs4proxy, and pt2
at one of PT 2.0 to 3.0: the suite is then what tor is to it. Cases are named by the
clauses of spec/pt1.md, and a MUST is what the protocol's own documents demand. CONFIG
is what "ptipc run" takes in this dialect:

  client    {"transports":{NAME:{"host":…,"port":…,K:V,…}}}: the server, and the
            arguments of a connection. With --free the transport connects to wherever
            CONNECT says by itself, and the suite is there
  server    {"transports":{NAME:{"listen":"ip:port","options":{…}}}}, for a server
            whose wire is plain TCP
  all       {"transport":NAME,"listen":"ip:port","options":{…}} for client and server:
            the client is led through the server, with what that announces. --generate
            is that for one of them

The exit code is 0 when everything held that could run, 1 when something fell short,
and 2 when nothing could run; 64 is a wrong command line, as everywhere.`,
		Example: `  ptipc conform -- ./mytransport '{"server":"192.0.2.1:443"}'
  ptipc conform --plain -- python3 "$PWD/rawchild.py" '{}'
  ptipc conform --strict --role all -- builtin:websocket '{"listen":"127.0.0.1:0"}'
  ptipc conform --run '^SOCKS-(5|15)/' --format tap -- ./mytransport '{}'
  ptipc conform --dialect pt1 --role all -- obfs4proxy '{"transport":"obfs4","listen":"127.0.0.1:0"}'
  ptipc conform --dialect pt1 --free -- ./dummy-client '{"transports":{"dummy":{}}}'
  ptipc conform --list`,
		Args: usageArgs(func(_ *cobra.Command, args []string) error {
			if !f.list && len(args) < 2 {
				return errors.New("EXE and CONFIG are needed")
			}
			return nil
		}),
		ValidArgsFunction: completeExec,
		RunE: func(cmd *cobra.Command, args []string) error {
			if f.list {
				return f.showCases(cmd)
			}
			return f.conform(cmd, args)
		},
	}
	flags := cmd.Flags()
	flags.SetInterspersed(false) // what follows EXE is EXE's
	flags.StringVar(&f.subject.Dialect, "dialect", conformance.Seed, "what EXE speaks: seed (spec/ptipc.md), pt1 or pt2 (spec/pt1.md)")
	flags.StringVar(&f.role, "role", conformance.Client, "what is looked at: client, server, generate (of the dialect seed) or all")
	flags.StringVar(&f.run, "run", "", "run only the cases whose names match a regular expression")
	flags.BoolVar(&f.strict, "strict", false, "a SHOULD counts as a MUST")
	flags.StringVar(&f.format, "format", "text", "how results are written: text, tap, json or junit")
	flags.BoolVar(&f.quick, "quick", false, "leave out the cases that wait for limits of ten seconds")
	flags.BoolVar(&f.list, "list", false, "list the cases, and start nothing")
	flags.BoolVar(&f.generate, "generate", false, "CONFIG is options for generate, from which both sides are configured")
	flags.BoolVar(&f.subject.Plain, "plain", false, "EXE takes neither HOST nor \"-\": EXE CONFIG and nothing more")
	flags.StringVar(&f.subject.Factory, "factory", "", "the connection factory; may be left out when there is one")
	flags.StringVar(&f.settings, "settings", "", "the connection settings, a JSON object, or @FILE")
	flags.StringVar(&f.subject.Dest, "dest", "", "an echo server, HOST:PORT, for a free transport that does not reach this machine's loopback")
	flags.BoolVar(&f.subject.Free, "free", false, "a client of the dialects pt1 and pt2 connects to wherever it is told, without a server of its own")
	flags.BoolVar(&f.subject.Echoes, "echoes", false, "a bound transport leads to an echo server")
	flags.DurationVar(&f.patience, "patience", 5*time.Second, "how long is waited for each single thing")
	for flag, values := range map[string][]string{"dialect": conformance.Dialects(), "role": conformRoles(), "format": conformance.Formats()} {
		if err := cmd.RegisterFlagCompletionFunc(flag, cobra.FixedCompletions(values, cobra.ShellCompDirectiveNoFileComp)); err != nil {
			panic(err) // the flag was defined above
		}
	}
	return cmd
}

// roles are those that were asked for.
func (f *conformFlags) roles() ([]string, error) {
	all := conformRoles()
	switch {
	case f.role == everyRole && f.subject.Dialect != conformance.Seed:
		return []string{conformance.Client, conformance.Server}, nil
	case f.role == everyRole:
		return all[:len(all)-1], nil
	case slices.Contains(all, f.role):
		return []string{f.role}, nil
	}
	return nil, fmt.Errorf("--role %q is not known; write %s: %w", f.role, strings.Join(all, ", "), ptipc.ExitUsage)
}

// complete makes a subject of the arguments.
func (f *conformFlags) complete(args []string) error {
	config, err := inline("CONFIG", args[len(args)-1])
	if err != nil {
		return err
	}
	var settings string
	if settings, err = inline("--settings", f.settings); err != nil {
		return err
	}
	s := &f.subject
	s.Path, s.Args, s.Settings = args[0], args[1:len(args)-1], ptipc.Opaque(settings)
	for what, text := range map[string]ptipc.Opaque{"CONFIG": ptipc.Opaque(config), "--settings": s.Settings} {
		var object map[string]any
		if err := text.Decode(&object); err != nil {
			return fmt.Errorf("%s: %w: %w", what, err, ptipc.ExitUsage)
		}
	}
	if f.generate || f.role == conformance.Generate || f.role == everyRole {
		s.Generate = ptipc.Opaque(config)
	} else {
		s.Config = ptipc.Opaque(config)
	}
	own, ok := strings.CutPrefix(s.Path, builtinPrefix)
	if !ok {
		return nil
	}
	if known := builtinTransport(own); known.Client == nil && known.Server == nil {
		return fmt.Errorf("%q is not a transport of this tool; it has %s: %w", s.Path, strings.Join(builtins(), ", "), ptipc.ExitUsage)
	}
	if s.Path, err = os.Executable(); err != nil {
		return fmt.Errorf("finding this executable, which runs the builtin transports: %w", err)
	}
	switch s.Dialect {
	case conformance.Seed:
		s.Args = append([]string{"transport", own}, s.Args...)
	case conformance.PT1:
		s.Args = append([]string{"pt1"}, s.Args...)
	default:
		return fmt.Errorf("%q cannot be asked in the dialect %s; the builtin transports speak %s and %s: %w", builtinPrefix+own, s.Dialect, conformance.Seed, conformance.PT1, ptipc.ExitUsage)
	}
	return nil
}

func (f *conformFlags) conform(cmd *cobra.Command, args []string) error {
	roles, err := f.roles()
	if err != nil {
		return err
	}
	if err := f.complete(args); err != nil {
		return err
	}
	out, err := conformance.NewWriter(cmd.OutOrStdout(), f.format, f.strict)
	if err != nil {
		return err
	}
	ran := false
	for _, role := range roles {
		switch did, err := f.runRole(cmd.Context(), role, out); {
		case err == nil:
			ran = ran || did
		case ptipc.ExitCodeOf(err) == ptipc.ExitUsage:
			return err
		default:
			return conformNotRun(err)
		}
	}
	if !ran {
		return fmt.Errorf("--run %q matches no case of the role %s; see ptipc conform --list: %w", f.run, f.role, ptipc.ExitUsage)
	}
	if err := out.Close(); err != nil {
		return err
	}
	return verdict(cmd.Context(), out.Report())
}

// verdict is the exit code that a report comes to.
func verdict(ctx context.Context, report conformance.Report) error {
	switch {
	case ctx.Err() != nil:
		return conformNotRun(errors.New("the run was ended"))
	case report.OK():
		return nil
	case len(report.Names(conformance.FellShort)) > 0:
		return errors.Join(errSaid, exitFellShort)
	}
	return conformNotRun(errors.New("no case could run"))
}

// conformNotRun is said here, since the exit code is not one of sysexits.
func conformNotRun(err error) error {
	complain(err)
	return errors.Join(errSaid, exitNotRun)
}

// runRole runs the cases of one role. With all of them, a pattern need not match in each.
func (f *conformFlags) runRole(ctx context.Context, role string, out *conformance.Writer) (ran bool, err error) {
	var writing error
	s := f.subject
	s.Role = role
	_, err = conformance.Run(ctx, s, conformance.Options{
		Pattern: f.run, Slow: !f.quick, Strict: f.strict, Patience: f.patience,
		OnResult: func(r conformance.Result) { writing = errors.Join(writing, out.Add(r)) },
	})
	if errors.Is(err, conformance.ErrNoCase) {
		return false, nil
	}
	return true, errors.Join(err, writing)
}

// showCases lists the cases of the roles that match.
func (f *conformFlags) showCases(cmd *cobra.Command) error {
	roles, err := f.roles()
	if err != nil {
		return err
	}
	table := tabwriter.NewWriter(cmd.OutOrStdout(), 0, 0, 2, ' ', 0)
	for _, role := range roles {
		cases, err := conformance.CasesOf(f.subject.Dialect, role, conformance.Options{Pattern: f.run, Slow: !f.quick})
		if errors.Is(err, conformance.ErrNoCase) {
			continue
		}
		if err != nil {
			return err
		}
		for _, c := range cases {
			fmt.Fprintf(table, "%s\t%s\t%s\n", c.Role, c.Level, c.Name)
		}
	}
	if err := table.Flush(); err != nil {
		return fmt.Errorf("%w: %w", err, ptipc.ExitIOErr)
	}
	return nil
}
