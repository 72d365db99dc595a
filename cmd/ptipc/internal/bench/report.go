package bench

import (
	"fmt"
	"io"
	"math"
	"slices"
	"strings"
	"text/tabwriter"
)

// The columns of a report: ways to the far end.
const (
	ChildDial      = "child"            // the child, through ConnectionFactory.Dial
	ChildWire      = "child_wire"       // the child, by a client of the bench's own on its socket, always with settings
	Direct         = "direct"           // no relay
	Relay          = "relay"            // the bare splicing relay
	RelayUnix      = "relay_unix"       // the same, reached by a unix socket
	SOCKS5         = "socks5"           // the minimal SOCKS5 server, by an ordinary client
	SOCKS5OneWrite = "socks5_one_write" // the same server, by a client that sends greeting and request in one write
	Microsocks     = "microsocks"
)

// abouts says what the columns are, in their order.
var abouts = []struct{ column, short, about string }{
	{ChildDial, "child", "the transport, through ConnectionFactory.Dial"},
	{ChildWire, "wire", "the transport, by a bare client on its socket, with settings {} or those given"},
	{Direct, "direct", "no relay"},
	{Relay, "relay", "bare Go relay: io.Copy, which splices; for packets one at a time"},
	{RelayUnix, "relay-ux", "the same, reached by a unix socket as the transport is"},
	{SOCKS5, "socks5", "minimal Go SOCKS5 server without settings, ordinary client"},
	{SOCKS5OneWrite, "socks5-1w", "the same server, greeting and request in one write"},
	{Microsocks, "microsocks", "microsocks"},
}

// A Report is the outcome of [Run].
type Report struct {
	Transport         string            `json:"transport"`
	ConnectionFactory string            `json:"connection_factory"`
	Bound             bool              `json:"bound"`
	Machine           Machine           `json:"machine"`
	Network           Network           `json:"network"`
	Rounds            int               `json:"rounds"`
	Seconds           float64           `json:"seconds"` // that each figure was measured for in each round
	IdleConns         int               `json:"idle_connections"`
	Columns           map[string]string `json:"columns"` // what stands under each key of Values
	Notes             []string          `json:"notes,omitempty"`
	Metrics           []*Metric         `json:"metrics"`
}

// A Machine is what the figures depend on.
type Machine struct {
	OS     string `json:"os"`
	Arch   string `json:"arch"`
	Kernel string `json:"kernel,omitempty"`
	CPUs   int    `json:"cpus"`
	Go     string `json:"go"`
}

// A Network is where the measured connections run.
type Network struct {
	Namespace         bool   `json:"namespace"`                    // a network namespace of its own
	Why               string `json:"why,omitempty"`                // why not
	CongestionControl string `json:"congestion_control,omitempty"` // of TCP; "" if the system does not tell
}

// A Metric is one figure in all columns where it has been measured.
type Metric struct {
	Name           string             `json:"name"` // such as bulk.down.cpu
	Title          string             `json:"title"`
	Unit           string             `json:"unit"`
	HigherIsBetter bool               `json:"higher_is_better"`
	Values         map[string]*Series `json:"values"` // by column
	// Ratios are the medians of the rounds' ratios: Ratios["child"]["relay"] is the
	// child's figure divided by the relay's.
	Ratios map[string]map[string]float64 `json:"ratios"`
}

// A Series holds one figure of one column.
type Series struct {
	Median float64   `json:"median"`
	Rounds []float64 `json:"rounds"`
}

// add notes a figure of one round. NaN is one that could not be taken.
func (r *Report) add(m Metric, column string, value float64) {
	if math.IsNaN(value) || math.IsInf(value, 0) {
		return
	}
	i := slices.IndexFunc(r.Metrics, func(have *Metric) bool { return have.Name == m.Name })
	if i < 0 {
		i = len(r.Metrics)
		m.Values = map[string]*Series{}
		r.Metrics = append(r.Metrics, &m)
	}
	values := r.Metrics[i].Values
	if values[column] == nil {
		values[column] = &Series{}
	}
	values[column].Rounds = append(values[column].Rounds, value)
}

// finish computes medians and ratios.
func (r *Report) finish() {
	r.Columns = map[string]string{}
	for _, m := range r.Metrics {
		for _, s := range m.Values {
			s.Median = Median(s.Rounds)
		}
		m.Ratios = map[string]map[string]float64{}
		for _, a := range abouts {
			if m.Values[a.column] != nil {
				r.Columns[a.column] = a.about
			}
		}
		for _, ours := range []string{ChildDial, ChildWire} {
			if m.Values[ours] == nil {
				continue
			}
			m.Ratios[ours] = map[string]float64{}
			for column, theirs := range m.Values {
				if column == ChildDial || column == ChildWire {
					continue
				}
				if v := Ratio(m.Values[ours].Rounds, theirs.Rounds); !math.IsNaN(v) {
					m.Ratios[ours][column] = v
				}
			}
		}
	}
}

// WriteText writes the report for people: the medians, and the ratios.
func (r *Report) WriteText(w io.Writer) error {
	var b strings.Builder
	kind := "free"
	if r.Bound {
		kind = "bound"
	}
	if r.ConnectionFactory == "" {
		fmt.Fprintf(&b, "%s, datagrams alone\n", r.Transport)
	} else {
		fmt.Fprintf(&b, "%s, connection factory %s, %s\n", r.Transport, r.ConnectionFactory, kind)
	}
	fmt.Fprintf(&b, "%s %s %s, %d CPUs, %s\n", r.Machine.OS, r.Machine.Kernel, r.Machine.Arch, r.Machine.CPUs, r.Machine.Go)
	fmt.Fprintf(&b, "%s\n", r.Network)
	fmt.Fprintf(&b, "%d rounds of %gs for each figure, in turns; what counts are the ratios\n", r.Rounds, r.Seconds)
	for _, note := range r.Notes {
		fmt.Fprintf(&b, "note: %s\n", note)
	}
	columns := r.columns()

	fmt.Fprint(&b, "\nMedians\n")
	t := tabwriter.NewWriter(&b, 0, 0, 2, ' ', tabwriter.AlignRight)
	head := "\t"
	for _, c := range columns {
		head += "\t" + short(c)
	}
	fmt.Fprintln(t, head+"\t")
	for _, m := range r.Metrics {
		line := leftAligned(m.Title, r.titleWidth()) + "\t" + m.Unit
		for _, c := range columns {
			line += "\t" + m.median(c)
		}
		fmt.Fprintln(t, line+"\t")
	}
	if err := t.Flush(); err != nil {
		return err
	}

	fmt.Fprint(&b, "\nRatios: the transport's figure divided by a peer's\n")
	t = tabwriter.NewWriter(&b, 0, 0, 2, ' ', tabwriter.AlignRight)
	head = "\t"
	for _, c := range columns {
		if c != ChildDial && c != ChildWire {
			head += "\t" + short(c)
		}
	}
	fmt.Fprintln(t, head+"\tbetter is\t")
	for _, m := range r.Metrics {
		for _, ours := range []string{ChildDial, ChildWire} {
			if len(m.Ratios[ours]) == 0 {
				continue
			}
			line := leftAligned(m.Title, r.titleWidth()) + "\t" + short(ours)
			for _, c := range columns {
				if c == ChildDial || c == ChildWire {
					continue
				}
				line += "\t" + figure(m.Ratios[ours], c)
			}
			better := "less"
			if m.HigherIsBetter {
				better = "more"
			}
			fmt.Fprintln(t, line+"\t"+better+"\t")
		}
	}
	if err := t.Flush(); err != nil {
		return err
	}
	fmt.Fprintln(&b)
	for _, a := range abouts {
		if text, ok := r.Columns[a.column]; ok {
			fmt.Fprintf(&b, "%-11s %s\n", a.short, text)
		}
	}
	_, err := io.WriteString(w, b.String())
	return err
}

// String says where the measured connections ran.
func (n Network) String() string {
	s := "network namespace of its own"
	if !n.Namespace {
		s = "no network namespace of its own: " + n.Why
	}
	if n.CongestionControl != "" {
		s += "; TCP congestion control " + n.CongestionControl
	}
	return s
}

func (r *Report) columns() []string {
	var columns []string
	for _, a := range abouts {
		if _, ok := r.Columns[a.column]; ok {
			columns = append(columns, a.column)
		}
	}
	return columns
}

func (r *Report) titleWidth() int {
	width := 0
	for _, m := range r.Metrics {
		width = max(width, len(m.Title))
	}
	return width
}

// leftAligned fills up a cell of a table whose cells are aligned to the right.
func leftAligned(s string, width int) string { return fmt.Sprintf("%-*s", width, s) }

func short(column string) string {
	for _, a := range abouts {
		if a.column == column {
			return a.short
		}
	}
	return column
}

func (m *Metric) median(column string) string {
	if s := m.Values[column]; s != nil {
		return number(s.Median)
	}
	return "-"
}

func figure(values map[string]float64, column string) string {
	if v, ok := values[column]; ok {
		return number(v)
	}
	return "-"
}

// number shows three digits of what was measured, and no exponent.
func number(v float64) string {
	switch size := math.Abs(v); {
	case size >= 99.95:
		return fmt.Sprintf("%.0f", v)
	case size >= 9.995:
		return fmt.Sprintf("%.1f", v)
	case size >= 0.9995 || v == 0:
		return fmt.Sprintf("%.2f", v)
	default:
		return fmt.Sprintf("%.3f", v)
	}
}
