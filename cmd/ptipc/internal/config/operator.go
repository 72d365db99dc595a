package config

import (
	"maps"
	"net/netip"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"pthost/ptipc"
)

// Signals is one way to carry the messages between the two sides of a transport
// (SIG-1). The zero value is a queue for people.
type Signals struct {
	Dir     string        `json:"dir,omitempty"`    // a directory for them, of this transport alone
	Command SignalCommand `json:"command,omitzero"` // programs that take and bring them
	Queue   bool          `json:"queue,omitempty"`  // ptipc signal show and add
}

// A SignalCommand is programs with their arguments.
type SignalCommand struct {
	Send    []string `json:"send"`              // gets an outgoing message on its standard input
	Receive []string `json:"receive,omitempty"` // writes incoming ones on its standard output
}

// Validate checks that one way was chosen.
func (s *Signals) Validate() error {
	ways := 0
	for _, chosen := range []bool{s.Dir != "", len(s.Command.Send) > 0, s.Queue} {
		if chosen {
			ways++
		}
	}
	if ways != 1 {
		return &ptipc.ConfigError{Problem: "do not name one way", Remedy: `write {"dir": "PATH"}, {"command": {"send": ["PROGRAM"]}} or {"queue": true}`}
	}
	return nil
}

// Validate checks that there are programs to run.
func (c *SignalCommand) Validate() error {
	if len(c.Send) == 0 || c.Send[0] == "" {
		return &ptipc.ConfigError{Pointer: "/send", Problem: "names no program", Remedy: `write ["PROGRAM", "ARGUMENT"]`}
	}
	if len(c.Receive) > 0 && c.Receive[0] == "" {
		return &ptipc.ConfigError{Pointer: "/receive", Problem: "names no program", Remedy: `write ["PROGRAM", "ARGUMENT"], or leave it out`}
	}
	return nil
}

func (s *Signals) set() bool { return s.Dir != "" || len(s.Command.Send) > 0 || s.Queue }

func (s *Signals) resolve(base string) {
	if s.Dir != "" && !filepath.IsAbs(s.Dir) {
		s.Dir = filepath.Join(base, s.Dir)
	}
	for _, argv := range [][]string{s.Command.Send, s.Command.Receive} {
		if len(argv) > 0 && strings.ContainsRune(argv[0], '/') && !filepath.IsAbs(argv[0]) {
			argv[0] = filepath.Join(base, argv[0])
		}
	}
}

// validateOperator checks what is for the operator: the control socket, the metrics,
// and the directories of signals. taken are the addresses of the fronts.
func (f *File) validateOperator(taken map[string]bool) error {
	dirs := map[string]string{}
	for _, name := range slices.Sorted(maps.Keys(f.Transports)) {
		dir := f.Transports[name].Signals.Dir
		if other, ok := dirs[dir]; ok && dir != "" {
			return &ptipc.ConfigError{
				Pointer: "/transports/" + name + "/signals/dir", Value: strconv.Quote(dir),
				Problem: "is the directory of " + other + " as well", Remedy: "give each transport a directory of its own",
			}
		}
		dirs[dir] = name
	}
	if f.Control != "" && !unixSocket(f.Control) {
		return &ptipc.ConfigError{Pointer: "/control", Value: strconv.Quote(f.Control), Problem: "is not a unix socket to listen on", Remedy: "write unix:///PATH"}
	}
	if f.Metrics != "" && !unixSocket(f.Metrics) && !tcpAddress(f.Metrics) {
		return &ptipc.ConfigError{Pointer: "/metrics", Value: strconv.Quote(f.Metrics), Problem: "is not an address to listen on", Remedy: "write tcp://IP:PORT or unix:///PATH"}
	}
	for _, own := range []struct{ pointer, url string }{{"/control", f.Control}, {"/metrics", f.Metrics}} {
		if own.url == "" {
			continue
		}
		if taken[own.url] && !strings.HasSuffix(own.url, ":0") {
			return &ptipc.ConfigError{Pointer: own.pointer, Value: strconv.Quote(own.url), Problem: "is taken by something else here", Remedy: "give each an address of its own"}
		}
		taken[own.url] = true
	}
	return nil
}

func unixSocket(url string) bool {
	path, ok := strings.CutPrefix(url, "unix://")
	return ok && path != "" && !strings.HasSuffix(path, "/") && !strings.ContainsAny(path, "\x00\n\r")
}

// tcpAddress takes any address of this machine: who may read the numbers of a host is
// the operator's decision.
func tcpAddress(url string) bool {
	text, ok := strings.CutPrefix(url, "tcp://")
	addr, err := netip.ParseAddrPort(text)
	return ok && err == nil && !addr.Addr().Is4In6() && addr.Addr().Zone() == "" && addr.String() == text
}

func resolveSocket(url *string, base string) {
	if path, ok := strings.CutPrefix(*url, "unix://"); ok && !filepath.IsAbs(path) {
		*url = "unix://" + filepath.Join(base, path)
	}
}
