package pt2

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"pthost/adapters/internal/launch"
	"pthost/adapters/pt1"
	"pthost/adapters/pt1/wire"
	"pthost/ptipc"
	"pthost/ptipc/host"
	"pthost/ptipc/stdio"
	"pthost/socks"
)

// Dialect is PT 2.0 to 3.0. The zero value is ready.
type Dialect struct{}

var _ host.Dialect = Dialect{}

// The values of Common.Pass and Common.Version.
const (
	PassFlags       = "flags"
	PassEnvironment = "environment"
	Version2        = "2"
	Version3        = "3.0"
)

const (
	example     = "shadow" // the transport that errors name
	optionsName = "pt2-options.json"
	// protocolRaw is the protocol of a socket whose connections are the streams.
	protocolRaw = "transparent-TCP"
)

// versions are those that are offered, and taken, newest first (PT1-14).
var versions = []string{"3.0", "3", "2.2", "2.1", "2.0", "2"}

// Common is what the configurations of clients and servers share.
type Common struct {
	Options ptipc.Opaque `json:"options,omitempty"` // for the executable, once
	Pass    string       `json:"pass,omitempty"`    // PassFlags or PassEnvironment
	Version string       `json:"version,omitempty"` // Version2 or Version3
}

func (c Common) validate() error {
	for _, choice := range []struct {
		pointer, value string
		known          []string
	}{{"/pass", c.Pass, []string{PassFlags, PassEnvironment}}, {"/version", c.Version, []string{Version2, Version3}}} {
		if choice.value != "" && !slices.Contains(choice.known, choice.value) {
			return &ptipc.ConfigError{Pointer: choice.pointer, Value: strconv.Quote(choice.value), Problem: "is not known", Remedy: "write " + strings.Join(choice.known, " or ")}
		}
	}
	if c.Pass == PassEnvironment && c.Version == Version3 {
		return &ptipc.ConfigError{Pointer: "/pass", Value: strconv.Quote(c.Pass), Problem: "is not known to version 3.0", Remedy: `write "flags", or "version": "2"`}
	}
	return nil
}

// ClientConfig is the configuration of a client.
type ClientConfig struct {
	Transports map[string]ptipc.Opaque `json:"transports"` // the settings of each transport's connections by its name
	Options    ptipc.Opaque            `json:"options,omitempty"`
	Pass       string                  `json:"pass,omitempty"`
	Version    string                  `json:"version,omitempty"`
}

func (c *ClientConfig) common() Common { return Common{c.Options, c.Pass, c.Version} }

// Validate checks all that can be known before a connection is made.
func (c *ClientConfig) Validate() error {
	if err := launch.CheckNames(c.Transports, example); err != nil {
		return err
	}
	for name, defaults := range c.Transports {
		if _, _, err := pt1.Destination(defaults, nil, ""); err != nil {
			return pt1.Under("/transports/"+name, err)
		}
	}
	if c.Pass == PassEnvironment && !c.Options.Empty() {
		return &ptipc.ConfigError{Pointer: "/options", Problem: "have no variable of their own for a client", Remedy: `write "pass": "flags", or give them as settings`}
	}
	return c.common().validate()
}

// ServerConfig is the configuration of a server.
type ServerConfig struct {
	Transports map[string]ServerTransport `json:"transports"`
	Options    ptipc.Opaque               `json:"options,omitempty"`
	Pass       string                     `json:"pass,omitempty"`
	Version    string                     `json:"version,omitempty"`
}

func (c *ServerConfig) common() Common { return Common{c.Options, c.Pass, c.Version} }

// A ServerTransport is one transport of a server.
type ServerTransport struct {
	Listen string `json:"listen"` // ip:port of the wire
}

// Validate checks all that can be known before the server runs.
func (c *ServerConfig) Validate() error {
	if err := launch.CheckNames(c.Transports, example); err != nil {
		return err
	}
	for name, t := range c.Transports {
		if _, err := launch.Listen(t.Listen); err != nil {
			return pt1.Under("/transports/"+name, err)
		}
	}
	return c.common().validate()
}

// Check reads a configuration, for [host.RoleClient] or [host.RoleServer], and starts
// nothing.
func (Dialect) Check(role string, config ptipc.Opaque) error {
	if role == host.RoleServer {
		return config.Decode(new(ServerConfig))
	}
	return config.Decode(new(ClientConfig))
}

// Start says how a child is started (PT1-14).
func (d Dialect) Start(l host.Launch) (*host.Session, error) {
	if l.Role == host.RoleServer {
		return d.startServer(l)
	}
	var c ClientConfig
	if err := l.Config.Decode(&c); err != nil {
		return nil, err
	}
	names := slices.Sorted(maps.Keys(c.Transports))
	e := wire.Environment{State: l.Dir, ExitOnStdinClose: true, Clients: names, Proxy: l.Proxy}
	session, err := session(l, &e, c.common(), names)
	if err != nil {
		return nil, err
	}
	session.Protocols = []string{stdio.ProtocolSOCKS5, protocolRaw}
	session.Connect = func(ctx context.Context, conn net.Conn, m stdio.CMethod, settings ptipc.Opaque, dest string) error {
		if m.Protocol == protocolRaw {
			return raw(c.Transports[m.Name], settings, dest)
		}
		return Connect(ctx, conn, c.Transports[m.Name], settings, dest)
	}
	return session, nil
}

// raw is for a socket that can be told nothing.
func raw(defaults, settings ptipc.Opaque, dest string) error {
	if !defaults.Empty() || !settings.Empty() || dest != "" {
		return fmt.Errorf("the transport speaks %s, which carries neither settings nor a destination: %w", protocolRaw, ptipc.ErrSettingsRefused)
	}
	return nil
}

func (Dialect) startServer(l host.Launch) (*host.Session, error) {
	e, err := launch.ServerEnvironment(l)
	if err != nil {
		return nil, err
	}
	var c ServerConfig
	if err := l.Config.Decode(&c); err != nil {
		return nil, err
	}
	names := slices.Sorted(maps.Keys(c.Transports))
	for _, name := range names {
		bind, err := launch.Listen(c.Transports[name].Listen)
		if err != nil {
			return nil, err
		}
		e.Servers = append(e.Servers, wire.Server{Name: name, Bind: bind})
	}
	return session(l, e, c.common(), names)
}

// session says how a child is told, by flags or by its environment.
func session(l host.Launch, e *wire.Environment, c Common, names []string) (*host.Session, error) {
	s := &host.Session{Unset: wire.Prefix, Versions: versions, Names: names, Line: parse, Stderr: parseStderr}
	e.Versions = versions
	environ, err := e.Environ()
	if err != nil {
		return nil, err
	}
	if c.Pass == PassEnvironment {
		if !c.Options.Empty() {
			compact, err := compacted(c.Options)
			if err != nil {
				return nil, err
			}
			environ = append(environ, wire.Prefix+"SERVER_TRANSPORT_OPTIONS="+compact)
		}
		s.Environ = environ
		return s, nil
	}
	s.Args = flags(e, c.Version != Version2, names)
	if !c.Options.Empty() {
		// Not on the command line, which every user of the machine can read.
		path := filepath.Join(l.Dir, optionsName)
		uid, gid := launch.Owner(l)
		if err := wire.WritePrivate(path, c.Options, uid, gid); err != nil {
			return nil, fmt.Errorf("writing the options: %w", err)
		}
		s.Args = append(s.Args, "-optionsFile", path)
	}
	switch {
	case strings.Contains(e.Proxy, "@"):
		return nil, fmt.Errorf("the password of the upstream proxy would stand on a command line; use a proxy without one, or an executable that takes %q: %w", PassEnvironment, ptipc.ExitUsage)
	case e.Proxy != "":
		s.Args = append(s.Args, "-proxy", e.Proxy)
	}
	return s, nil
}

func flags(e *wire.Environment, three bool, names []string) []string {
	role := "-client"
	if len(e.Servers) > 0 {
		role = "-server"
	}
	args := []string{
		role, "-ptversion", strings.Join(e.Versions, ","), "-state", e.State, "-exit-on-stdin-close", "-transports", strings.Join(names, ","),
	}
	if len(e.Servers) == 0 {
		return args
	}
	var binds []string
	for _, s := range e.Servers {
		binds = append(binds, s.Name+"-"+s.Bind.String())
	}
	args = append(args, "-bindaddr", strings.Join(binds, ","))
	if e.Port == "" {
		return args
	}
	target := "-orport"
	if three {
		target = "-target"
	}
	return append(args, target, e.Port, "-extorport", e.ExtendedPort, "-authcookie", e.CookieFile)
}

func compacted(o ptipc.Opaque) (string, error) {
	var b bytes.Buffer
	err := json.Compact(&b, o)
	return b.String(), err
}

// Deliveries are those of PT 1.0 (PT1-12).
func (Dialect) Deliveries(l host.Launch) ([]host.TakeFunc, error) { return pt1.Dialect{}.Deliveries(l) }

// parse reads a line of standard output. LOG has words in place of keys since 2.2
// (PT1-16).
func parse(line []byte) (stdio.Message, error) {
	m, err := stdio.Parse(line)
	var parse *stdio.ParseError
	if !errors.As(err, &parse) || parse.Keyword != "LOG" {
		return m, err
	}
	words := strings.SplitN(strings.TrimRight(string(line), "\r\n"), " ", 3)
	level, ok := levels[strings.ToUpper(words[min(1, len(words)-1)])]
	if !ok {
		return m, err
	}
	return stdio.Log{Level: level, Message: strings.Join(words[2:], " ")}, nil
}

var levels = map[string]slog.Level{"ERROR": slog.LevelError, "WARN": slog.LevelWarn, "INFO": slog.LevelInfo, "DEBUG": slog.LevelDebug}

// parseStderr reads the errors that are written there (PT1-16).
func parseStderr(line string) stdio.Message {
	keyword, _, _ := strings.Cut(line, " ")
	switch keyword {
	case "VERSION-ERROR", "ENV-ERROR", "PROXY-ERROR", "CMETHOD-ERROR", "SMETHOD-ERROR":
		if m, err := stdio.Parse([]byte(line)); err == nil {
			return m
		}
	}
	return nil
}

// Connect opens a stream through a client of PT 2 that listens at the other end of
// conn. settings add to defaults, key by key. dest is "" unless the destination is not
// that of the settings. ctx and errors are as with [socks.Connect] (PT1-15).
func Connect(ctx context.Context, conn net.Conn, defaults, settings ptipc.Opaque, dest string) error {
	rest, dest, err := pt1.Destination(defaults, settings, dest)
	if err != nil {
		return err
	}
	text, err := json.Marshal(rest)
	if err != nil {
		return err
	}
	return socks.ConnectLength(ctx, conn, text, dest)
}
