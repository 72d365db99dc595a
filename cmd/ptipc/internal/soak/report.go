package soak

import (
	"fmt"
	"io"
	"maps"
	"slices"
	"text/tabwriter"
)

// WriteText writes the report for people.
func (r *Report) WriteText(out io.Writer) error {
	fmt.Fprintf(out, "%.0f seconds; %.1f GB in connections that finished\n\n", r.Seconds, float64(r.Bytes)/1e9)
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	for _, row := range []struct {
		name string
		n    uint64
	}{{"connections tried", r.Tried}, {"finished", r.Finished}, {"failed with an error", r.Failed}, {"lost silently", r.Lost}, {"stalled", r.Stalled}} {
		fmt.Fprintf(w, "%s\t%d\n", row.name, row.n)
	}
	fmt.Fprintf(w, "longest recovery\t%.1f s\n", r.Recovery)
	fmt.Fprintf(w, "processes, idle\t%d before, %d after\n", r.Before.Processes, r.After.Processes)
	fmt.Fprintf(w, "descriptors, idle\t%d before, %d after\n", r.Before.Descriptors, r.After.Descriptors)
	fmt.Fprintf(w, "memory, idle\t%.1f MB before, %.1f MB after\n", float64(r.Before.Memory)/1e6, float64(r.After.Memory)/1e6)
	if err := w.Flush(); err != nil {
		return err
	}
	list := func(title string, counts map[string]int) {
		fmt.Fprintf(out, "\n%s\n", title)
		for _, name := range slices.Sorted(maps.Keys(counts)) {
			fmt.Fprintf(out, "  %6d  %s\n", counts[name], name)
		}
	}
	list("faults", r.Faults)
	for _, name := range r.Skipped {
		fmt.Fprintf(out, "       -  %s\n", name)
	}
	list("errors", r.Errors)
	for _, line := range r.Lines {
		fmt.Fprintf(out, "lost: %s\n", line)
	}
	_, err := fmt.Fprintln(out)
	return err
}
