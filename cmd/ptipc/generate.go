package main

import (
	"encoding/json"
	"fmt"

	"github.com/spf13/cobra"

	"pthost/ptipc"
)

func newGenerate(o *options) *cobra.Command {
	var f childFlags
	cmd := &cobra.Command{
		Use:   "generate EXE [OPTIONS]",
		Short: "Make a configuration for a server and the one for its clients",
		Long: `Asks a transport for two configurations that match and prints them as one JSON
object, {"client":…,"server":…}. Both hold secrets: keep them from others.

` + execUsage + `
OPTIONS is a JSON object that only the transport knows, or @FILE. With --dialect pt1
they are transport, listen, host and options; the server runs once and leaves its
keys in --state, which is then the server's own state directory.`,
		Example: `  ptipc generate builtin:websocket '{"listen":"0.0.0.0:443","host":"192.0.2.1"}'
  ptipc generate obfs4proxy '{"transport":"obfs4","listen":"0.0.0.0:443","host":"192.0.2.1"}' --dialect pt1 --state ./obfs4`,
		Args:              usageArgs(cobra.RangeArgs(1, 2)),
		ValidArgsFunction: completeExec,
		RunE: func(cmd *cobra.Command, args []string) error {
			if !cmd.Flags().Changed("log-level") {
				o.logLevel = "warn"
			}
			opener, err := newOpener(o)
			if err != nil {
				return err
			}
			text := "{}"
			if len(args) == 2 {
				if text, err = inline("OPTIONS", args[1]); err != nil {
					return err
				}
			}
			t, err := f.config(args[0])
			if err != nil {
				return err
			}
			if err := t.Validate(); err != nil {
				return fmt.Errorf("%w: %w", err, ptipc.ExitUsage)
			}
			command, err := opener.command(args[0], t)
			if err != nil {
				return err
			}
			client, server, err := command.Server().GenerateConfig(cmd.Context(), ptipc.Opaque(text), opener.env(args[0], f.state))
			if err != nil {
				return err
			}
			out := json.NewEncoder(cmd.OutOrStdout())
			out.SetIndent("", "  ")
			return out.Encode(map[string]ptipc.Opaque{"client": client, "server": server})
		},
	}
	f.add(cmd)
	return cmd
}
