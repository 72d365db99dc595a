// Command ptipc runs pluggable transports: it starts them as children, puts
// ordinary SOCKS5 proxies and forwarded ports before them, and tries them out.
//
//	ptipc run                      # a transport behind a SOCKS5 proxy, with proof that it works
//	ptipc run HOST.json            # what you have configured
//	ptipc dial EXE '{…}' host:22   # one connection on standard input and output
//	ptipc bench EXE '{…}'          # how fast is it?
//	ptipc conform -- EXE '{…}'     # does it keep to the specification?
package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"github.com/spf13/cobra"

	"pthost/adapters/sip003"
	"pthost/ptipc"
)

func main() {
	// Ctrl-C ends what runs in order; a second one ends this process at once.
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	go func() {
		<-ctx.Done()
		stop()
	}()
	err := newRoot().ExecuteContext(ctx)
	if err != nil && !errors.Is(err, errSaid) {
		complain(err)
	}
	os.Exit(int(ptipc.ExitCodeOf(err)))
}

// complain tells people what went wrong. What a child has said may be in it.
func complain(err error) {
	fmt.Fprintln(os.Stderr, "ptipc:", printable(err.Error(), '\n', '\t'))
}

// errSaid marks an error that people have been told of already.
var errSaid = errors.New("said already")

// options are the flags of every command that runs a host.
type options struct {
	logFormat string
	logLevel  string
	trace     bool
}

func newRoot() *cobra.Command {
	var o options
	root := &cobra.Command{
		Use:   "ptipc",
		Short: "Host for pluggable transports",
		Long: `ptipc lets any program send its traffic through any pluggable transport.

A transport is an executable that is started with a JSON configuration, or one
that this tool carries, written builtin:NAME. ptipc starts it, watches it, and
puts an ordinary SOCKS5 proxy or a forwarded port in front of it.

Exit codes are those of sysexits: 64 for a wrong command line, 78 for a wrong
configuration, 69 when something needed is not there.`,
		Example: `  ptipc run                                    a transport behind 127.0.0.1:1080
  ptipc run host.json                          what the file says
  ptipc dial builtin:direct '{}' example.com:22
  ptipc generate builtin:websocket '{"host":"192.0.2.1"}'`,
		SilenceUsage:  true,
		SilenceErrors: true,
		Args:          usageArgs(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if sip003.Present(os.Getenv) { // Shadowsocks gives a plugin no arguments
				return runPlugin(cmd.Context(), &o)
			}
			return cmd.Help()
		},
	}
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		return fmt.Errorf("%w; see %s --help: %w", err, cmd.CommandPath(), ptipc.ExitUsage)
	})
	root.PersistentFlags().StringVar(&o.logFormat, "log-format", "text", "how the log on standard error is written: text or json")
	root.PersistentFlags().StringVar(&o.logLevel, "log-level", "info", "the least severe records that are logged: debug, info, warn or error")
	root.PersistentFlags().BoolVar(&o.trace, "trace", false, "log every control line of both directions, with secrets masked")
	for flag, values := range map[string][]string{
		"log-format": {"text", "json"}, "log-level": {"debug", "info", "warn", "error"},
	} {
		if err := root.RegisterFlagCompletionFunc(flag, cobra.FixedCompletions(values, cobra.ShellCompDirectiveNoFileComp)); err != nil {
			panic(err) // the flag was defined three lines above
		}
	}
	root.AddCommand(newRun(&o), newStatus(), newStop(), newSignal(), newCheck(), newExplain(), newDial(&o), newGenerate(&o), newTransport(), newPT1(&o), newSIP003(&o), newConform(), newConformHost(), newConformChild(), newBench(&o), newLaunch())
	return root
}

// usageArgs makes a wrong number of arguments exit code 64, with a pointer to help.
func usageArgs(check cobra.PositionalArgs) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if err := check(cmd, args); err != nil {
			return fmt.Errorf("%w; usage: %s: %w", err, cmd.UseLine(), ptipc.ExitUsage)
		}
		return nil
	}
}

// logger makes the log of a command, on standard error.
func (o *options) logger() (*slog.Logger, error) {
	var level slog.Level
	if err := level.UnmarshalText([]byte(o.logLevel)); err != nil {
		return nil, fmt.Errorf("--log-level %q is not known; write debug, info, warn or error: %w", o.logLevel, ptipc.ExitUsage)
	}
	handlerOptions := &slog.HandlerOptions{Level: level}
	switch o.logFormat {
	case "text":
		return slog.New(slog.NewTextHandler(os.Stderr, handlerOptions)), nil
	case "json":
		return slog.New(slog.NewJSONHandler(os.Stderr, handlerOptions)), nil
	}
	return nil, fmt.Errorf("--log-format %q is not known; write text or json: %w", o.logFormat, ptipc.ExitUsage)
}

// tracer is what --trace adds to a transport: nil without it.
func (o *options) tracer(log *slog.Logger, transport string) func(fromChild bool, line []byte) {
	if !o.trace {
		return nil
	}
	return func(fromChild bool, line []byte) {
		direction := "to child"
		if fromChild {
			direction = "from child"
		}
		log.Info("trace", "transport", transport, "direction", direction, "line", strings.TrimRight(string(line), "\r\n"))
	}
}
