package sip003

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"pthost/ptipc"
	"pthost/ptipc/host"
	"pthost/ptipc/localnet"
	"pthost/ptipc/stdio"
)

// Name is what the connection factory and the server of every plugin are called.
const Name = "plugin"

// lookEvery is how often a host looks whether its plugin listens by now.
const lookEvery = 10 * time.Millisecond

// A Dialect runs Shadowsocks plugins as transports: it goes into [host.Command]. The
// configuration is
//
//	remote   HOST:PORT, where the plugin's server is; of a server the IP:PORT of its wire
//	options  an object of the plugin's options: strings, numbers, and true for a
//	         key that stands alone
//
// There are no settings. A dial that succeeds says that the plugin has taken the
// connection, and not that its server is there. The RemoteAddr of a connection that a
// server hands over is not known (SIP-13).
type Dialect struct{}

var _ host.Dialect = Dialect{}

// Check tells what is wrong with a configuration without starting anything.
func (Dialect) Check(role string, config ptipc.Opaque) error {
	_, err := read(host.Launch{Role: role, Config: config})
	return err
}

// config is the configuration of a plugin (SIP-10).
type config struct {
	Remote  remote           `json:"remote"`
	Options map[string]value `json:"options,omitempty"`
}

// remote is HOST:PORT.
type remote struct {
	host string
	port uint16
}

// UnmarshalText implements [encoding.TextUnmarshaler].
func (r *remote) UnmarshalText(text []byte) error {
	host, port, err := net.SplitHostPort(string(text))
	n, perr := strconv.ParseUint(port, 10, 16)
	// Plugins take | for the end of an address.
	if err != nil || perr != nil || n == 0 || host == "" ||
		strings.ContainsFunc(host, func(r rune) bool { return r <= ' ' || r == 0x7f || r == '|' }) {
		return errors.New("is not where a plugin's server can be: write HOST:PORT")
	}
	*r = remote{host, uint16(n)}
	return nil
}

// value is the value of an option.
type value struct {
	text string
	kind byte // the first byte of the JSON
}

// UnmarshalJSON takes what an option can carry.
func (v *value) UnmarshalJSON(text []byte) error {
	*v = value{kind: text[0]}
	switch text[0] {
	case '"':
		return json.Unmarshal(text, &v.text)
	case '{', '[', 'n':
		return errors.New("is not what an option can carry: write a string, a number, or true for a key that stands alone")
	case 't', 'f':
	default:
		v.text = string(text)
	}
	return nil
}

// options are the options in the order of their keys.
func (c *config) options() Options {
	var options Options
	for _, key := range slices.Sorted(maps.Keys(c.Options)) {
		switch v := c.Options[key]; v.kind {
		case 'f':
		case 't':
			options = append(options, Option{Key: key, Bare: true})
		default:
			options = append(options, Option{Key: key, Value: v.text})
		}
	}
	return options
}

// Validate implements [ptipc.Validator].
func (c *config) Validate() error {
	if _, err := c.options().Encode(); err != nil {
		return &ptipc.ConfigError{Pointer: "/options", Problem: "cannot be handed over: " + err.Error(), Remedy: "change them"}
	}
	return nil
}

// read reads the configuration for a role.
func read(l host.Launch) (*config, error) {
	if l.Proxy != "" { // PROXY-2
		return nil, fmt.Errorf("a Shadowsocks plugin cannot be given a way out, and its traffic would go around it (SIP-14): %w", ptipc.ExitUsage)
	}
	var c config
	if err := l.Config.Decode(&c); err != nil {
		return nil, err
	}
	if l.Role != host.RoleServer {
		return &c, nil
	}
	if _, err := netip.ParseAddr(c.Remote.host); err != nil {
		return nil, &ptipc.ConfigError{Pointer: "/remote", Value: strconv.Quote(c.Remote.host), Problem: "is a name, and a server listens on an address", Remedy: "write IP:PORT, such as 0.0.0.0:443"}
	}
	return &c, nil
}

// Deliveries implements [host.Dialect]: one socket, on which streams begin at once.
func (Dialect) Deliveries(l host.Launch) ([]host.TakeFunc, error) {
	if _, err := read(l); err != nil {
		return nil, err
	}
	return []host.TakeFunc{func(net.Conn) (string, error) { return "", nil }}, nil // SIP-13: nobody says who it is
}

// Start implements [host.Dialect].
func (Dialect) Start(l host.Launch) (*host.Session, error) {
	c, err := read(l)
	if err != nil {
		return nil, err
	}
	var local netip.AddrPort
	if l.Role == host.RoleServer {
		local, err = netip.ParseAddrPort(l.Deliver[0])
	} else {
		local, err = freePort()
	}
	if err != nil {
		return nil, err
	}
	environ, err := Environment{
		RemoteHost: c.Remote.host, RemotePort: c.Remote.port,
		LocalHost: local.Addr().String(), LocalPort: local.Port(), Options: c.options(),
	}.Environ()
	if err != nil {
		return nil, err
	}
	networks := []string{"tcp"}
	listens, announcements := local, []stdio.Message{
		stdio.CMethod{Name: Name, Protocol: protocol, Addr: local.String()}, stdio.CMethodsDone{},
	}
	if l.Role == host.RoleServer {
		networks = []string{"tcp", "udp"} // the wire may be QUIC
		listens = netip.AddrPortFrom(netip.MustParseAddr(c.Remote.host).Unmap(), c.Remote.port)
		announcements = []stdio.Message{stdio.SMethod{Name: Name, Addr: listens.String()}, stdio.SMethodsDone{}}
	}
	return &host.Session{
		Environ: environ, Unset: "SS_", // SIP-10
		SignalOnly: true, // SIP-12
		Line: func(line []byte) (stdio.Message, error) {
			return stdio.Log{Level: slog.LevelInfo, Message: strings.ToValidUTF8(string(line), "?")}, nil
		},
		Announce: func(ctx context.Context, pids func() ([]int, error)) ([]stdio.Message, error) {
			return announcements, awaitListener(ctx, networks, listens, pids)
		},
		Protocols: []string{protocol},
		Connect:   connect,
	}, nil
}

// protocol is what is spoken with the socket of a plugin: nothing, all is the stream.
const protocol = "tunnel"

// connect makes sure that a connection asks for nothing that a plugin cannot give (SIP-14).
func connect(_ context.Context, _ net.Conn, _ stdio.CMethod, settings ptipc.Opaque, dest string) error {
	if dest != "" {
		return fmt.Errorf("a Shadowsocks plugin leads to one place, and cannot be told to go to %q: %w", dest, ptipc.ErrNotAllowed)
	}
	if !settings.Empty() {
		return fmt.Errorf("a Shadowsocks plugin takes no connection settings; its options are in its configuration (SIP-14): %w", ptipc.ErrSettingsRefused)
	}
	return nil
}

// freePort is an address of the loopback that was free a moment ago: a plugin cannot
// choose one itself, and say which.
func freePort() (netip.AddrPort, error) {
	// A process that is being started has copies of all sockets until it executes its
	// program: with one of this, the port would not be free.
	syscall.ForkLock.RLock()
	defer syscall.ForkLock.RUnlock()
	l, err := localnet.ListenTCP("127.0.0.1:0")
	if err != nil {
		return netip.AddrPort{}, err
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).AddrPort(), nil
}

// awaitListener waits until one of the plugin's processes listens on addr, on one of the
// networks (SIP-11).
func awaitListener(ctx context.Context, networks []string, addr netip.AddrPort, pids func() ([]int, error)) error {
	ticker := time.NewTicker(lookEvery)
	defer ticker.Stop()
	for {
		for _, network := range networks {
			err := localnet.ListenerAt(network, addr, nil)
			if errors.Is(err, localnet.ErrForeignListener) { // there is one, and whose is it?
				err = ownedBy(network, addr, pids)
			}
			if errors.Is(err, errors.ErrUnsupported) {
				err = reach(ctx, addr)
			}
			if !errors.Is(err, localnet.ErrNoListener) {
				return err
			}
		}
		select {
		case <-ticker.C:
		case <-ctx.Done():
			return fmt.Errorf("the plugin does not listen on %s: %w", addr, context.Cause(ctx))
		}
	}
}

// ownedBy says whether a listener is held by one of the plugin's processes.
func ownedBy(network string, addr netip.AddrPort, pids func() ([]int, error)) error {
	own, err := pids()
	if err != nil {
		return err
	}
	if len(own) == 0 { // the plugin has just ended, which says more
		return localnet.ErrNoListener
	}
	return localnet.ListenerAt(network, addr, own)
}

// reach connects, where the system tells nothing else about listeners.
func reach(ctx context.Context, addr netip.AddrPort) error {
	conn, err := ptipc.Env{}.Dial(ctx, "tcp", addr.String())
	if err != nil && ptipc.ClassOf(err) == ptipc.ErrRefused {
		return fmt.Errorf("%w: %w", localnet.ErrNoListener, err)
	}
	if err != nil {
		return err
	}
	return conn.Close()
}
