package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"pthost/adapters/bound"
	"pthost/adapters/free"
	"pthost/cmd/ptipc/internal/config"
	"pthost/ptipc"
)

// adapt puts adapters over a transport that runs already, the outermost first. The
// transport is still its owner's to close.
func adapt(t *ptipc.Transport, adapters []string) (*ptipc.Transport, error) {
	for _, name := range slices.Backward(adapters) {
		below := *t
		below.Close = func() error { return nil }
		open := func(context.Context, ptipc.Opaque, ptipc.Env) (*ptipc.Transport, error) { return &below, nil }
		dest, isBound := strings.CutPrefix(name, config.BoundPrefix)
		adapter := free.Client(open)
		switch {
		case isBound:
			adapter = bound.Client(open, dest)
		case name == "mux":
			adapter = free.Mux(open)
		}
		adapted, err := adapter(context.Background(), nil, ptipc.Env{})
		if err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		t = adapted
	}
	return t, nil
}

// freeConfig is the configuration of a server that was made free.
func freeConfig(t config.Transport) (ptipc.Opaque, error) {
	document := free.ServerConfig{Carrier: t.Config}
	if t.Egress != nil {
		document.Egress = *t.Egress
	}
	return json.Marshal(document)
}

func newExplain() *cobra.Command {
	return &cobra.Command{
		Use:   "explain HOST.json",
		Short: "Draw the way that traffic takes, from program to wire and out again",
		Long: `Draws, for each front of HOST.json, what its traffic goes through: the program, the
front, the adapters, the host, the child and the wire; and for each server the way
from the wire to the service. Nothing is started.`,
		Example: `  ptipc explain host.json`,
		Args:    usageArgs(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			file, err := config.Load(args[0])
			if err != nil {
				return err
			}
			explain(cmd.OutOrStdout(), file)
			return nil
		},
	}
}

// explain draws one station a line, and what is spoken between two of them.
func explain(out io.Writer, file *config.File) {
	for _, f := range file.Fronts {
		t := file.Transports[f.Through()]
		fmt.Fprintln(out, "a program of this user")
		if f.Packets() {
			fmt.Fprintf(out, "  │ datagrams; each address that they come from is a session with a socket of its own\n")
			fmt.Fprintf(out, "front %s, datagrams to %s\n", f.Listen, f.Dest)
			fmt.Fprintf(out, "  │ TURN on loopback UDP, with credentials of this child alone\n")
			fmt.Fprintf(out, "%s\n  │ the transport's wire\n%s\n\n", describeChild(f.Through(), t), f.Dest)
			continue
		}
		if f.Serve == "socks5" {
			fmt.Fprintf(out, "  │ SOCKS5, CONNECT; names as names; UDP ASSOCIATE, to addresses alone, if the transport has datagrams\n")
		} else {
			fmt.Fprintf(out, "  │ whatever it speaks\n")
		}
		fmt.Fprintf(out, "front %s, %s", f.Listen, f.Serve)
		if f.Dest != "" {
			fmt.Fprintf(out, " to %s", f.Dest)
		}
		fmt.Fprintln(out)
		for _, name := range f.Adapters() {
			if dest, ok := strings.CutPrefix(name, config.BoundPrefix); ok {
				fmt.Fprintf(out, "  │ no destination\nadapter bound: everything goes to %s\n", dest)
				continue
			}
			many := ""
			if name == "mux" {
				many = ", with many streams on a connection"
			}
			fmt.Fprintf(out, "  │ destination\nadapter %s: the destination becomes a header of the stream%s (spec/free.md)\n", name, many)
		}
		fmt.Fprintf(out, "  │ %s\n", handover(f, t))
		fmt.Fprintf(out, "%s\n  │ the transport's wire%s\nits server\n", describeChild(f.Through(), t), proxied(t))
		if slices.ContainsFunc(f.Adapters(), func(name string) bool { return name == "free" || name == "mux" }) {
			fmt.Fprintf(out, "  │ stream with its header\na free server, which looks names up and dials within its egress policy\n  │\nthe destination\n\n")
			continue
		}
		fmt.Fprintf(out, "  │\n%s\n\n", map[bool]string{true: "the destination", false: "where the server delivers"}[f.Serve == "socks5" || f.Dest != ""])
	}
	for _, name := range slices.Sorted(maps.Keys(file.Transports)) {
		t := file.Transports[name]
		if t.Role != "server" {
			continue
		}
		fmt.Fprintf(out, "a client of the transport\n  │ the transport's wire\n%s\n", describeChild(name, t))
		switch {
		case len(t.Via) > 0:
			rules := "every public address, without port 25"
			if t.Egress != nil && t.Egress.Allow != nil {
				var texts []string
				for _, rule := range t.Egress.Allow {
					texts = append(texts, rule.String())
				}
				rules = strings.Join(texts, ", ")
			}
			fmt.Fprintf(out, "  │ delivery: %s\nadapter free: reads the header, looks names up, dials\n  │ allowed: %s\nthe destination\n\n", delivery(t), rules)
		case t.Deliver != "":
			header := ""
			if t.ProxyProtocol {
				header = "PROXY protocol header with the client's address, then "
				if t.Dialect == "sip003" {
					header = "PROXY protocol header that says that the client is not known, then "
				}
			}
			fmt.Fprintf(out, "  │ delivery: %s\nthis host\n  │ %sthe stream\nservice %s\n\n", delivery(t), header, t.Deliver)
		default:
			fmt.Fprintf(out, "  │ it connects its clients itself\nthe destination\n\n")
		}
	}
}

// delivery says how a server's child brings its connections to the host.
func delivery(t config.Transport) string {
	switch t.Dialect {
	case "":
		return "modified SOCKS5 on a unix socket, with the client's address"
	case "sip003":
		return "the stream alone on loopback TCP; who the client is, is not known"
	}
	return "Extended ORPort on loopback TCP, with the client's address"
}

// handover says what host and child speak for a front.
func handover(f config.Front, t config.Transport) string {
	switch t.Dialect {
	case "pt1":
		return "SOCKS5 on loopback TCP, settings as username and password (RFC 1929)"
	case "pt2":
		return "SOCKS5 on loopback TCP, settings as JSON with a length (method 0x09)"
	case "sip003":
		return "the stream alone on loopback TCP"
	}
	method := "no settings (method 0x00)"
	if !f.Settings.Empty() {
		method = "settings as JSON (method 0x80)"
	}
	where := "a unix socket in the state directory"
	if t.Plain || len(t.Attach) > 0 {
		where = "loopback TCP"
	}
	return fmt.Sprintf("modified SOCKS5 on %s, %s", where, method)
}

func describeChild(name string, t config.Transport) string {
	if len(t.Attach) > 0 {
		return fmt.Sprintf("transport %s: a child that runs already", name)
	}
	via := "standard input"
	if t.Dialect != "" {
		via = "the dialect " + t.Dialect
	} else if t.Plain || t.ConfigVia == "argv" {
		via = "the command line"
	}
	return fmt.Sprintf("transport %s: child %s, configured by %s, %s", name, t.Exec, via, sandboxed(t.Sandbox))
}

// sandboxed says which files a child may use, beside those that LIFE-12 lets it use.
func sandboxed(s config.Sandbox) string {
	if s.Off {
		return "not sandboxed"
	}
	text := "sandboxed"
	if len(s.Read) > 0 {
		text += "\n    reads " + strings.Join(s.Read, ", ")
	}
	if len(s.Write) > 0 {
		text += "\n    writes " + strings.Join(s.Write, ", ")
	}
	return text
}

func proxied(t config.Transport) string {
	if t.Proxy != "" {
		return ", through the upstream proxy"
	}
	return ""
}
