package main

import (
	"fmt"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"pthost/ptipc"
	"pthost/ptipc/child"
	"pthost/ptipc/proc"
	"pthost/transports/builtin"
)

func newTransport() *cobra.Command {
	return &cobra.Command{
		Use:   "transport NAME [ROLE] CONFIG [HOST]",
		Short: "Be a child: run a transport that this tool carries, for any host",
		Long: `Runs one of the builtin transports as a child process. A host starts this
command; started by hand it announces its sockets on standard output and ends
with standard input. ROLE is client, server or generate. CONFIG is the transport's
configuration as a JSON object, or for generate the options; - reads it from
standard input, together with HOST.

The builtin transports are: ` + strings.Join(builtins(), ", ") + `.`,
		Example: `  ptipc transport direct '{}'`,
		// What follows NAME is the child's, to the letter.
		DisableFlagParsing: true,
		ValidArgsFunction: func(_ *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
			if len(args) > 0 {
				return nil, cobra.ShellCompDirectiveNoFileComp
			}
			var names []string
			for _, name := range builtins() {
				names = append(names, strings.TrimPrefix(name, builtinPrefix))
			}
			return names, cobra.ShellCompDirectiveNoFileComp
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				return fmt.Errorf("name a transport: %s: %w", strings.Join(builtins(), ", "), ptipc.ExitUsage)
			}
			if args[0] == "--help" || args[0] == "-h" {
				return cmd.Help()
			}
			own := builtinTransport(strings.TrimPrefix(args[0], builtinPrefix))
			if own.Client == nil && own.Server == nil {
				return fmt.Errorf("%q is not a transport of this tool; it has %s: %w", args[0], strings.Join(builtins(), ", "), ptipc.ExitUsage)
			}
			child.MainArgs(args[1:], own)
			return nil
		},
	}
}

// builtinTransport is a transport that this tool carries, with the sides that it has.
func builtinTransport(name string) child.Transport {
	own := child.Transport{Client: builtin.Clients[name]}
	if server, ok := builtin.Servers[name]; ok {
		named := *server
		named.Name = name
		own.Server = &named
	}
	return own
}

// launchCommand is what the host puts before a child's command line.
const launchCommand = "launch"

func newLaunch() *cobra.Command {
	return &cobra.Command{
		Use:                launchCommand,
		Short:              "Start a child so that none of its processes outlives the host",
		Hidden:             true,
		DisableFlagParsing: true,
		RunE: func(_ *cobra.Command, args []string) error {
			os.Exit(proc.Launch(args))
			return nil
		},
	}
}
