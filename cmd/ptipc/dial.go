package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/spf13/cobra"

	"pthost/ptipc"
)

func newDial(o *options) *cobra.Command {
	var f execFlags
	cmd := &cobra.Command{
		Use:   "dial EXE CONFIG [DEST]",
		Short: "Connect standard input and output through a transport",
		Long: `Starts a transport and opens one connection through it, for standard input and
output, as nc does. The end of standard input ends the outgoing direction and
leaves the other one open; the command ends when the far end has nothing more to say.

` + execUsage + `
DEST is host:port, and has to be left out for a bound transport.`,
		Example: `  printf 'GET / HTTP/1.0\r\n\r\n' | ptipc dial builtin:direct '{}' example.com:80
  ssh -o ProxyCommand='ptipc dial ./pt-x @pt-x.json %h:%p' example.com`,
		Args:              usageArgs(cobra.RangeArgs(2, 3)),
		ValidArgsFunction: completeExec,
		RunE: func(cmd *cobra.Command, args []string) error {
			if !cmd.Flags().Changed("log-level") {
				o.logLevel = "warn" // like nc, it is quiet while all goes well
			}
			opener, err := newOpener(o)
			if err != nil {
				return err
			}
			transport, factory, err := f.open(cmd.Context(), opener, args[0], args[1])
			if err != nil {
				return err
			}
			dest := ""
			if len(args) == 3 {
				dest = args[2]
			}
			switch {
			case factory.Bound && dest != "":
				err = fmt.Errorf("%s is bound: leave %q out: %w", args[0], dest, ptipc.ExitUsage)
			case !factory.Bound && dest == "":
				err = fmt.Errorf("%s is a free transport and needs a destination, host:port: %w", args[0], ptipc.ExitUsage)
			default:
				err = f.dial(cmd.Context(), factory, dest)
			}
			return errors.Join(err, transport.Close())
		},
	}
	f.add(cmd)
	return cmd
}

func (f *execFlags) dial(ctx context.Context, factory ptipc.ConnectionFactory, dest string) error {
	settings, err := inline("--settings", f.settings)
	if err != nil {
		return err
	}
	conn, err := factory.Dial(ctx, ptipc.Opaque(settings), dest)
	if err != nil {
		return err
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { _ = conn.Close() })()
	sent := make(chan error, 1)
	go func() {
		_, err := io.Copy(conn, os.Stdin)
		sent <- errors.Join(err, conn.CloseWrite())
	}()
	if _, err := io.Copy(os.Stdout, conn); err != nil {
		return fmt.Errorf("the connection broke: %w: %w", err, ptipc.ExitIOErr)
	}
	select {
	case err := <-sent:
		if err != nil {
			return fmt.Errorf("not everything could be sent: %w: %w", err, ptipc.ExitIOErr)
		}
	default: // the far end has said all; what standard input still holds nobody wants
	}
	return nil
}
