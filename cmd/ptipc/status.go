package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"text/tabwriter"
	"time"
	"unicode"

	"github.com/spf13/cobra"

	"pthost/cmd/ptipc/internal/control"
	"pthost/ptipc"
)

// samplePause is how long the two samples of a rate are apart.
const samplePause = time.Second

// controlFlag adds --control to a command that talks to a running host.
func controlFlag(cmd *cobra.Command, path *string) {
	cmd.Flags().StringVar(path, "control", "", "the control socket of the host (default "+controlDefault+")")
}

const controlDefault = "$XDG_RUNTIME_DIR/ptipc/control.sock, else one in /run/user or a private temporary directory"

func client(path string) *control.Client {
	if path == "" {
		path = control.DefaultPath()
	}
	return control.NewClient(strings.TrimPrefix(path, "unix://"))
}

func newStatus() *cobra.Command {
	var at string
	var asJSON, watch bool
	cmd := &cobra.Command{
		Use:   "status",
		Short: "Show what a running host does",
		Long: `Shows the transports and fronts of a host that was started with ptipc run:
whether they are ready, how often their children were restarted and why, what they
carry and how fast. Rates are measured for one second. A host that is still starting
answers as well: a transport is then starting, with the last status that it told.

--watch shows it anew each second, as a live view on a terminal and otherwise as
one line for each transport. The exit code is 69 when no host runs.

The control socket speaks HTTP: curl --unix-socket PATH http://ptipc/v1/status`,
		Example: `  ptipc status
  ptipc status --watch
  ptipc status --json | jq '.transports[] | select(.state != "ready")'`,
		Args: usageArgs(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			out := cmd.OutOrStdout()
			var show func(control.Status) error
			switch {
			case asJSON:
				encoder := json.NewEncoder(out)
				if !watch {
					encoder.SetIndent("", "  ")
				}
				show = func(s control.Status) error { return encoder.Encode(s) }
			case watch && terminal(out):
				show = func(s control.Status) error { return redraw(out, s) }
			case watch:
				show = func(s control.Status) error { return writeLines(out, s) }
			default:
				show = func(s control.Status) error { return writeStatus(out, s) }
			}
			return followStatus(cmd.Context(), client(at), watch, show)
		},
	}
	controlFlag(cmd, &at)
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON; with --watch an object in each line")
	cmd.Flags().BoolVar(&watch, "watch", false, "show it anew each second until Ctrl-C")
	return cmd
}

// followStatus shows a status with its rates, once or each second until ctx ends.
func followStatus(ctx context.Context, c *control.Client, watch bool, show func(control.Status) error) error {
	before, err := c.Status(ctx)
	if err != nil {
		return err
	}
	ticker := time.NewTicker(samplePause)
	defer ticker.Stop()
	for {
		select {
		case <-ticker.C:
		case <-ctx.Done():
			return nil // Ctrl-C
		}
		now, err := c.Status(ctx)
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return err
		}
		if err := show(now.Since(before)); err != nil {
			return fmt.Errorf("%w: %w", err, ptipc.ExitIOErr)
		}
		if !watch {
			return nil
		}
		before = now
	}
}

func newStop() *cobra.Command {
	var at string
	cmd := &cobra.Command{
		Use:   "stop",
		Short: "End a running host in order",
		Long: `Asks a host that was started with ptipc run to end, as Ctrl-C does, and waits until
it has: open connections get a few seconds, children end, nothing is left behind.
The exit code is 69 when no host runs.`,
		Example: `  ptipc stop`,
		Args:    usageArgs(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := client(at).Stop(cmd.Context()); err != nil {
				return err
			}
			fmt.Fprintln(cmd.OutOrStdout(), "the host has ended")
			return nil
		},
	}
	controlFlag(cmd, &at)
	return cmd
}

// terminal reports whether somebody looks at out rather than reads it later.
func terminal(out io.Writer) bool {
	file, ok := out.(*os.File)
	if !ok {
		return false
	}
	info, err := file.Stat()
	return err == nil && info.Mode()&os.ModeCharDevice != 0
}

// redraw writes over what the terminal shows, line by line, so that it does not flicker.
func redraw(out io.Writer, s control.Status) error {
	var b strings.Builder
	if err := writeStatus(&b, s); err != nil {
		return err
	}
	_, err := io.WriteString(out, "\x1b[H"+strings.ReplaceAll(b.String(), "\n", "\x1b[K\n")+"\x1b[J")
	return err
}

// writeStatus writes the status as tables for people.
func writeStatus(out io.Writer, s control.Status) error {
	state := "up"
	switch {
	case s.Stopping:
		state = "stopping, up"
	case s.Starting:
		state = "starting, up"
	}
	table := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintf(table, "host: process %d, %s for %s\n\n", s.PID, state, elapsed(s.Time, s.Started))
	fmt.Fprintln(table, "TRANSPORT\tEXEC\tROLE\tSTATE\tPID\tUP\tRESTARTS\tOPEN\tOPENED\tFAILED\tRECEIVED\tSENT\tRECEIVED/S\tSENT/S")
	for _, t := range s.Transports {
		pid, up := "-", "-"
		if t.PID != 0 {
			pid = fmt.Sprint(t.PID)
		}
		if t.Since != nil {
			up = elapsed(s.Time, *t.Since)
		}
		stats := "-\t-\t-\t-\t-"
		if n := t.Stats; n != nil {
			stats = fmt.Sprintf("%d\t%d\t%d\t%s\t%s", n.Active, n.Opened, n.Failed, size(float64(n.Received)), size(float64(n.Sent)))
		}
		rate := "-\t-"
		if t.Rate != nil {
			rate = size(t.Rate.Received) + "\t" + size(t.Rate.Sent)
		}
		exec := t.Exec
		if exec == "" {
			exec = "(attached)"
		}
		fmt.Fprintf(table, "%s\t%s\t%s\t%s\t%s\t%s\t%d\t%s\t%s\n", t.Name, printable(exec), t.Role, t.State, pid, up, t.Restarts, stats, rate)
	}
	if len(s.Fronts) > 0 {
		fmt.Fprintln(table, "\nFRONT\tSERVE\tTRANSPORT")
		for _, f := range s.Fronts {
			fmt.Fprintf(table, "%s\t%s\t%s\n", printable(f.Address), f.Serve, f.Transport)
		}
	}
	err := table.Flush()
	for _, t := range s.Transports {
		if t.Address != "" {
			_, e := fmt.Fprintf(out, "\n%s listens on %s\n", t.Name, printable(t.Address))
			err = errors.Join(err, e)
		}
		if t.Progress != "" {
			_, e := fmt.Fprintf(out, "\n%s, last status: %s\n", t.Name, printable(t.Progress))
			err = errors.Join(err, e)
		}
		if t.LastError != "" {
			_, e := fmt.Fprintf(out, "\n%s, last error: %s\n", t.Name, printable(t.LastError))
			err = errors.Join(err, e)
		}
		if t.Pending > 0 {
			_, e := fmt.Fprintf(out, "\n%s has %d messages to be carried: ptipc signal show %s\n", t.Name, t.Pending, t.Name)
			err = errors.Join(err, e)
		}
	}
	return err
}

// writeLines writes one line for each transport.
func writeLines(out io.Writer, s control.Status) error {
	for _, t := range s.Transports {
		line := fmt.Sprintf("%s %s %s restarts=%d", s.Time.Format(time.TimeOnly), t.Name, t.State, t.Restarts)
		if n := t.Stats; n != nil {
			line += fmt.Sprintf(" open=%d opened=%d failed=%d received=%d sent=%d", n.Active, n.Opened, n.Failed, n.Received, n.Sent)
		}
		if t.Rate != nil {
			line += fmt.Sprintf(" received/s=%.0f sent/s=%.0f", t.Rate.Received, t.Rate.Sent)
		}
		if _, err := fmt.Fprintln(out, line); err != nil {
			return err
		}
	}
	return nil
}

// printable keeps what others wrote from moving the cursor, breaking the table or turning
// the text around, but for what is to be kept.
func printable(text string, keep ...rune) string {
	return strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) && !slices.Contains(keep, r) {
			return ' '
		}
		return r
	}, text)
}

func elapsed(now, since time.Time) string { return now.Sub(since).Round(time.Second).String() }

// size writes a number of bytes as people read it.
func size(n float64) string {
	units := []string{"B", "kB", "MB", "GB", "TB", "PB"}
	i := 0
	for n >= 999.95 && i < len(units)-1 {
		n /= 1000
		i++
	}
	if i == 0 {
		return fmt.Sprintf("%.0f B", n)
	}
	return fmt.Sprintf("%.1f %s", n, units[i])
}
