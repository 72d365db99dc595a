package pt1

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"slices"
	"strconv"

	"pthost/adapters/internal/launch"
	"pthost/adapters/pt1/wire"
	"pthost/ptipc"
	"pthost/ptipc/host"
	"pthost/ptipc/stdio"
	"pthost/socks"
)

// Dialect is PT 1.0. The zero value is ready.
type Dialect struct{}

var (
	_ host.Dialect   = Dialect{}
	_ host.Generator = Dialect{}
)

// example is the transport that errors name.
const example = "obfs4"

// ClientConfig is the configuration of a client.
type ClientConfig struct {
	// Transports are the settings of each transport's connections by its name.
	Transports map[string]ptipc.Opaque `json:"transports"`
	// BindV4 and BindV6 are the addresses that the wire goes out from; "" leaves them
	// to the system.
	BindV4 string `json:"bind_v4,omitempty"`
	BindV6 string `json:"bind_v6,omitempty"`
}

// Validate checks all that can be known before a connection is made.
func (c *ClientConfig) Validate() error {
	if err := launch.CheckNames(c.Transports, example); err != nil {
		return err
	}
	for name, defaults := range c.Transports {
		if _, _, err := readSettings(defaults, nil, ""); err != nil {
			return Under("/transports/"+name, err)
		}
	}
	if a, err := netip.ParseAddr(c.BindV4); c.BindV4 != "" && (err != nil || !a.Is4()) {
		return &ptipc.ConfigError{Pointer: "/bind_v4", Value: strconv.Quote(c.BindV4), Problem: "is not an address of IPv4", Remedy: "write one of this machine's, or leave it out"}
	}
	if a, err := netip.ParseAddr(c.BindV6); c.BindV6 != "" && (err != nil || !a.Is6() || a.Zone() != "" || a.Is4In6()) {
		return &ptipc.ConfigError{Pointer: "/bind_v6", Value: strconv.Quote(c.BindV6), Problem: "is not an address of IPv6", Remedy: "write one of this machine's without a zone, or leave it out"}
	}
	return nil
}

// ServerConfig is the configuration of a server.
type ServerConfig struct {
	Transports map[string]ServerTransport `json:"transports"`
}

// A ServerTransport is one transport of a server.
type ServerTransport struct {
	Listen  string       `json:"listen"`            // ip:port of the wire; port 0 lets the system choose
	Options ptipc.Opaque `json:"options,omitempty"` // of the transport, as settings of a client are
}

// Validate checks all that can be known before the server runs.
func (c *ServerConfig) Validate() error {
	if err := launch.CheckNames(c.Transports, example); err != nil {
		return err
	}
	for name, t := range c.Transports {
		if _, err := t.server(name); err != nil {
			return Under("/transports/"+name, err)
		}
	}
	return nil
}

func (t ServerTransport) server(name string) (wire.Server, error) {
	bind, err := launch.Listen(t.Listen)
	if err != nil {
		return wire.Server{}, err
	}
	options, err := readArgs(t.Options)
	if err != nil {
		return wire.Server{}, Under("/options", err)
	}
	return wire.Server{Name: name, Bind: bind, Options: options}, nil
}

// Check reads a configuration, for [host.RoleClient] or [host.RoleServer], and starts
// nothing.
func (Dialect) Check(role string, config ptipc.Opaque) error {
	if role == host.RoleServer {
		return config.Decode(new(ServerConfig))
	}
	return config.Decode(new(ClientConfig))
}

// Start says how a child is started (PT1-1).
func (d Dialect) Start(l host.Launch) (*host.Session, error) {
	if l.Role == host.RoleServer {
		return d.startServer(l)
	}
	var c ClientConfig
	if err := l.Config.Decode(&c); err != nil {
		return nil, err
	}
	names := slices.Sorted(maps.Keys(c.Transports))
	e := wire.Environment{State: l.Dir, ExitOnStdinClose: true, Clients: names, Proxy: l.Proxy} // PT1-7
	// They were checked; "" stays the zero value.
	e.BindV4, _ = netip.ParseAddr(c.BindV4)
	e.BindV6, _ = netip.ParseAddr(c.BindV6)
	session, err := session(&e, names)
	if err != nil {
		return nil, err
	}
	session.Protocols = []string{"socks5", "socks4"} // PT1-8
	session.Connect = func(ctx context.Context, conn net.Conn, m stdio.CMethod, settings ptipc.Opaque, dest string) error {
		return Connect(ctx, conn, m.Protocol, c.Transports[m.Name], settings, dest)
	}
	return session, nil
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
		s, err := c.Transports[name].server(name)
		if err != nil {
			return nil, err
		}
		e.Servers = append(e.Servers, s)
	}
	return session(e, names)
}

func session(e *wire.Environment, names []string) (*host.Session, error) {
	environ, err := e.Environ()
	if err != nil {
		return nil, err
	}
	// Lines are those of PT 1.0 here too, and are read as tolerantly as all are (PT1-6).
	return &host.Session{Environ: environ, Unset: wire.Prefix, Versions: []string{wire.Version}, Names: names}, nil
}

// Deliveries are an ORPort, for transports that know no better, and an Extended
// ORPort with its cookie in the state directory (PT1-12).
func (Dialect) Deliveries(l host.Launch) ([]host.TakeFunc, error) {
	uid, gid := launch.Owner(l)
	cookie, err := wire.WriteCookie(launch.CookieFile(l), uid, gid)
	if err != nil {
		return nil, err
	}
	return []host.TakeFunc{
		func(net.Conn) (string, error) { return "", nil },
		func(conn net.Conn) (string, error) {
			client, err := wire.AcceptExtended(conn, cookie, func(wire.Client) error { return nil })
			return client.Addr, err
		},
	}, nil
}

// GenerateOptions are the options for generating configurations.
type GenerateOptions struct {
	Transport string       `json:"transport"`
	Listen    string       `json:"listen"`            // ip:port of the server's wire
	Host      string       `json:"host,omitempty"`    // the server's name or address for its clients; "" is that of Listen
	Options   ptipc.Opaque `json:"options,omitempty"` // of the server
}

// Validate demands an address that clients can use.
func (o *GenerateOptions) Validate() error {
	if err := launch.CheckNames(map[string]bool{o.Transport: true}, example); err != nil {
		return &ptipc.ConfigError{Pointer: "/transport", Value: strconv.Quote(o.Transport), Problem: "is not the name of a managed transport", Remedy: "write one that the executable knows, such as obfs4"}
	}
	s, err := ServerTransport{Listen: o.Listen, Options: o.Options}.server(o.Transport)
	if err != nil {
		return err
	}
	if o.Host == "" && s.Bind.Addr().IsUnspecified() {
		return &ptipc.ConfigError{Pointer: "/host", Problem: "is missing, and clients cannot connect to " + s.Bind.Addr().String(), Remedy: "give the name or address at which clients reach the server"}
	}
	return nil
}

// Generate makes the configurations of a server, and of clients with the arguments
// that the server announces for them (PT1-13).
func (Dialect) Generate(options ptipc.Opaque) (ptipc.Opaque, func([]stdio.SMethod) (client, server ptipc.Opaque, err error), error) {
	var o GenerateOptions
	if err := options.Decode(&o); err != nil {
		return nil, nil, err
	}
	serverConfig := func(listen string) (ptipc.Opaque, error) {
		return json.Marshal(ServerConfig{Transports: map[string]ServerTransport{o.Transport: {Listen: listen, Options: o.Options}}})
	}
	finish := func(announced []stdio.SMethod) (client, server ptipc.Opaque, err error) {
		if len(announced) != 1 || announced[0].Name != o.Transport {
			return nil, nil, fmt.Errorf("the server announced %d transports, and not %s alone", len(announced), o.Transport)
		}
		wireAddr, err := netip.ParseAddrPort(announced[0].Addr)
		if err != nil {
			return nil, nil, err
		}
		// It was checked. The port is the one that the system chose, if it was to (SRV-6).
		bind, _ := netip.ParseAddrPort(o.Listen)
		bind = netip.AddrPortFrom(bind.Addr(), wireAddr.Port())
		settings := map[string]any{"host": o.Host, "port": bind.Port()}
		if o.Host == "" {
			settings["host"] = bind.Addr().String()
		}
		for _, arg := range announced[0].Args {
			if _, twice := settings[arg.Key]; !twice {
				settings[arg.Key] = arg.Value
			}
		}
		text, err := json.Marshal(settings)
		if err != nil {
			return nil, nil, err
		}
		if client, err = json.Marshal(ClientConfig{Transports: map[string]ptipc.Opaque{o.Transport: text}}); err != nil {
			return nil, nil, err
		}
		server, err = serverConfig(bind.String())
		return client, server, err
	}
	server, err := serverConfig(o.Listen)
	return server, finish, err
}

func readSettings(defaults, settings ptipc.Opaque, dest string) (wire.Args, string, error) {
	rest, dest, err := Destination(defaults, settings, dest)
	if err != nil {
		return nil, "", err
	}
	args, err := argsOf(rest)
	return args, dest, err
}

// Connect opens a stream through a managed transport's client that listens at the
// other end of conn, with a PROTOCOL of its CMETHOD line (PT1-8). settings add to
// defaults. dest is "" unless the destination is not that of the settings.
//
// ctx and errors are as with [socks.Connect]. Nothing is sent when the arguments
// cannot be.
func Connect(ctx context.Context, conn net.Conn, protocol string, defaults, settings ptipc.Opaque, dest string) error {
	args, dest, err := readSettings(defaults, settings, dest)
	if err != nil {
		return err
	}
	text, err := args.Encode()
	if err != nil {
		return ptipc.WithClass(ptipc.ErrSettingsRefused, err)
	}
	switch {
	case protocol == "socks4":
		err = socks.Connect4(ctx, conn, text, dest)
	case text == "": // PT1-3
		err = socks.ConnectUpstream(ctx, conn, nil, dest)
	default:
		var username, password string
		if username, password, err = wire.Credentials(text); err != nil {
			return ptipc.WithClass(ptipc.ErrSettingsTooLarge, err)
		}
		// Not pipelined: most of these transports refuse it (PT1-5).
		err = socks.ConnectPassword(ctx, conn, username, password, dest)
	}
	return unexplained(err, dest, args)
}

// unexplained adds what can be looked at to a failure of which the transport says
// nothing, as most of them do.
func unexplained(err error, dest string, args wire.Args) error {
	var class ptipc.Class // of a reply
	if !errors.As(err, &class) || class != ptipc.ErrGeneral {
		return err
	}
	keys := "none"
	for i, arg := range args { // the values are secrets
		if i == 0 {
			keys = arg.Key
			continue
		}
		keys += ", " + arg.Key
	}
	return fmt.Errorf("%w; the transport does not say why: can %s be reached, and are these all the settings that it needs: %s?", err, dest, keys)
}
