package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"unicode"
	"unicode/utf16"
	"unicode/utf8"

	"github.com/spf13/cobra"

	"pthost/cmd/ptipc/internal/control"
	"pthost/ptipc"
	"pthost/ptipc/stdio"
)

// signalHelp teaches what signals are for.
const signalHelp = `Some transports cannot come up from their configurations alone: client and server
have to exchange a few messages first, by a way of their own, since the wire is not
there yet. These messages are signals, and whoever runs the two sides carries them,
by mail, chat or any other way. Keep them secret: they are what the two sides say
to each other. They may be lost, come twice or late; a transport bears it.

  on one machine:     ptipc signal show mine           copy what it prints, one line
  on the other one:   ptipc signal add theirs '{"body":{…}}'
                      ptipc signal show theirs         the answer, carried back likewise

On the server's side a message has a "peer": the client that it is for, or came from.
Choose one when you add a client's message, {"peer":"alice","body":{…}}, and the
answer will have it too; leave it out on the client's side.

What people carry by hand, directories and commands carry as well: see "signals" in
spec/host.schema.json.`

func newSignal() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "signal",
		Short: "Carry messages between the two sides of a transport by hand",
		Long:  signalHelp,
		Args:  usageArgs(cobra.NoArgs),
		RunE:  func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(newSignalShow(), newSignalAdd())
	return cmd
}

func newSignalShow() *cobra.Command {
	var at string
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "show [TRANSPORT]",
		Short: "Print the messages that wait to be carried to the other side",
		Long: `Prints the outgoing messages of a transport, the oldest first, each as one line of
JSON for ptipc signal add on the other machine. Without TRANSPORT a line names each
message's transport first. They stay in the list, since nobody knows whether they
have arrived: the newest 100.

` + signalHelp,
		Example: `  ptipc signal show mine
  ptipc signal show mine | tail -n 1 > message.json
  ptipc signal show --json`,
		Args:              usageArgs(cobra.MaximumNArgs(1)),
		ValidArgsFunction: completeTransport(&at),
		RunE: func(cmd *cobra.Command, args []string) error {
			transport := ""
			if len(args) == 1 {
				transport = args[0]
			}
			signals, err := client(at).Signals(cmd.Context(), transport)
			if err != nil {
				return err
			}
			return showSignals(cmd.OutOrStdout(), signals, asJSON, transport == "")
		},
	}
	controlFlag(cmd, &at)
	cmd.Flags().BoolVar(&asJSON, "json", false, "print a list with the transport, number and time of each message")
	return cmd
}

// showSignals writes what can be copied and pasted: standard output has nothing but
// messages when they are of one transport.
func showSignals(out io.Writer, signals []control.Signal, asJSON, named bool) error {
	if asJSON {
		encoder := json.NewEncoder(out)
		encoder.SetIndent("", "  ")
		encoder.SetEscapeHTML(false)
		return encoder.Encode(signals)
	}
	for _, s := range signals {
		text, err := stdio.AppendSignal(nil, s.Message)
		if err != nil {
			return err
		}
		if terminal(out) {
			text = escaped(text)
		}
		if named {
			fmt.Fprintf(out, "# %s, message %d of %s\n", s.Transport, s.ID, s.Time.Local().Format("2006-01-02 15:04:05"))
		}
		if _, err := fmt.Fprintf(out, "%s\n", text); err != nil {
			return fmt.Errorf("%w: %w", err, ptipc.ExitIOErr)
		}
	}
	return nil
}

// escaped is the same JSON without what a terminal could take for a command.
func escaped(text []byte) []byte {
	var b []byte
	for _, r := range string(text) {
		switch {
		case unicode.IsPrint(r):
			b = utf8.AppendRune(b, r)
		case r > 0xffff:
			high, low := utf16.EncodeRune(r)
			b = fmt.Appendf(b, `\u%04x\u%04x`, high, low)
		default:
			b = fmt.Appendf(b, `\u%04x`, r)
		}
	}
	return b
}

func newSignalAdd() *cobra.Command {
	var at string
	cmd := &cobra.Command{
		Use:   "add TRANSPORT [JSON|@FILE|-]",
		Short: "Hand in a message that came from the other side",
		Long: `Hands a message to a transport, as ptipc signal show printed it on the other
machine: an argument, which other users of this machine can read, a file, or
standard input, which is the default.

` + signalHelp,
		Example: `  ptipc signal add mine < message.json
  ptipc signal add theirs '{"peer":"alice","body":{"offer":"…"}}'`,
		Args:              usageArgs(cobra.RangeArgs(1, 2)),
		ValidArgsFunction: completeTransport(&at),
		RunE: func(cmd *cobra.Command, args []string) error {
			text, err := signalText(cmd.InOrStdin(), args[1:])
			if err != nil {
				return err
			}
			m, err := stdio.ParseSignal(text)
			if err != nil {
				return fmt.Errorf("%w: %w", err, ptipc.ExitDataErr)
			}
			if err := client(at).AddSignal(cmd.Context(), args[0], m); err != nil {
				return err
			}
			fmt.Fprintf(cmd.OutOrStdout(), "handed to %s\n", args[0])
			return nil
		},
	}
	controlFlag(cmd, &at)
	return cmd
}

// around is the white space that may be around a message by hand, in bytes.
const around = 1024

// signalText is the message that the arguments name, without white space around it. Of
// one that is too long only a part is read.
func signalText(stdin io.Reader, args []string) ([]byte, error) {
	source := stdin
	if len(args) == 1 && args[0] != "-" {
		if args[0] == "" || args[0][0] != '@' {
			return []byte(args[0]), nil
		}
		file, err := os.Open(args[0][1:])
		if err != nil {
			return nil, fmt.Errorf("the message: %w: %w", err, ptipc.ExitNoInput)
		}
		defer file.Close()
		source = file
	}
	text, err := io.ReadAll(io.LimitReader(source, stdio.MaxSignal+around))
	if err != nil {
		return nil, fmt.Errorf("reading the message: %w: %w", err, ptipc.ExitIOErr)
	}
	return bytes.TrimSpace(text), nil
}

// completeTransport completes the names of the transports of the host that runs.
func completeTransport(at *string) cobra.CompletionFunc {
	return func(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
		if len(args) > 0 {
			return nil, cobra.ShellCompDirectiveDefault
		}
		status, err := client(*at).Status(cmd.Context())
		if err != nil {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		var names []string
		for _, t := range status.Transports {
			names = append(names, t.Name)
		}
		return names, cobra.ShellCompDirectiveNoFileComp
	}
}
