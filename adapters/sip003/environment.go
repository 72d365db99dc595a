package sip003

import (
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"pthost/ptipc"
)

// The variables of SIP003.
const (
	remoteHost    = "SS_REMOTE_HOST"
	remotePort    = "SS_REMOTE_PORT"
	localHost     = "SS_LOCAL_HOST"
	localPort     = "SS_LOCAL_PORT"
	pluginOptions = "SS_PLUGIN_OPTIONS"
)

// Variables are the names of all of them.
var Variables = []string{remoteHost, remotePort, localHost, localPort, pluginOptions}

// An Environment is all that a plugin is told (SIP-1).
type Environment struct {
	// RemoteHost and RemotePort are the far side: for a client the plugin's server,
	// for a server where its wire listens. Shadowsocks separates the addresses of a
	// server that listens on several by "|".
	RemoteHost string
	RemotePort uint16
	// LocalHost and LocalPort are the near side, on the loopback: for a client where
	// it listens for Shadowsocks, for a server where Shadowsocks listens for it.
	LocalHost string
	LocalPort uint16
	Options   Options
}

// Present reports whether a process was started as a plugin: all four variables
// that a plugin needs are set. getenv is [os.Getenv].
func Present(getenv func(string) string) bool {
	return !slices.ContainsFunc([]string{remoteHost, remotePort, localHost, localPort},
		func(name string) bool { return getenv(name) == "" })
}

// ReadEnvironment reads the variables (SIP-1). Its errors name the variable and wrap
// [ptipc.ExitUsage].
func ReadEnvironment(getenv func(string) string) (Environment, error) {
	var e Environment
	for _, v := range []struct {
		name string
		host *string
		port *uint16
	}{
		{remoteHost, &e.RemoteHost, nil},
		{remotePort, nil, &e.RemotePort},
		{localHost, &e.LocalHost, nil},
		{localPort, nil, &e.LocalPort},
	} {
		text := getenv(v.name)
		if text == "" {
			return Environment{}, fmt.Errorf("%s is not set: a plugin is started by a Shadowsocks client or server (SIP-1): %w", v.name, ptipc.ExitUsage)
		}
		if v.host != nil {
			*v.host = strings.TrimSuffix(strings.TrimPrefix(text, "["), "]")
			continue
		}
		port, err := strconv.ParseUint(text, 10, 16)
		if err != nil || port == 0 {
			return Environment{}, fmt.Errorf("%s is %q, and has to be a port from 1 to 65535 (SIP-1): %w", v.name, text, ptipc.ExitUsage)
		}
		*v.port = uint16(port)
	}
	var err error
	if e.Options, err = ParseOptions(getenv(pluginOptions)); err != nil {
		return Environment{}, fmt.Errorf("%s: %w: %w", pluginOptions, err, ptipc.ExitUsage)
	}
	return e, nil
}

// Environ is the environment as "key=value", without SS_PLUGIN_OPTIONS if there are none.
func (e Environment) Environ() ([]string, error) {
	environ := []string{
		remoteHost + "=" + e.RemoteHost, remotePort + "=" + strconv.Itoa(int(e.RemotePort)),
		localHost + "=" + e.LocalHost, localPort + "=" + strconv.Itoa(int(e.LocalPort)),
	}
	if len(e.Options) == 0 {
		return environ, nil
	}
	options, err := e.Options.Encode()
	if err != nil {
		return nil, err
	}
	return append(environ, pluginOptions+"="+options), nil
}

// Remote is the far side as HOST:PORT.
func (e Environment) Remote() string {
	return net.JoinHostPort(e.RemoteHost, strconv.Itoa(int(e.RemotePort)))
}

// Local is the near side, which has to be on the loopback (SIP-5).
func (e Environment) Local() (netip.AddrPort, error) {
	host := e.LocalHost
	if host == "localhost" {
		host = "127.0.0.1"
	}
	ip, err := netip.ParseAddr(host)
	if err != nil || !ip.IsLoopback() || ip.Zone() != "" {
		return netip.AddrPort{}, fmt.Errorf("%s is %q, and has to be on the loopback: whoever reaches the plugin there is taken for Shadowsocks (SIP-5): %w",
			localHost, e.LocalHost, ptipc.ExitUsage)
	}
	return netip.AddrPortFrom(ip.Unmap(), e.LocalPort), nil
}

// Wires are the addresses on which a server's wire listens (SIP-7). A name is
// refused, since nothing says which of its addresses is meant.
func (e Environment) Wires() ([]netip.AddrPort, error) {
	var wires []netip.AddrPort
	for host := range strings.SplitSeq(e.RemoteHost, "|") {
		host = strings.TrimSuffix(strings.TrimPrefix(host, "["), "]")
		ip, err := netip.ParseAddr(host)
		if err != nil {
			return nil, fmt.Errorf("%s is %q, and has to be an address to listen on, such as 0.0.0.0 (SIP-7): %w", remoteHost, e.RemoteHost, ptipc.ExitUsage)
		}
		wire := netip.AddrPortFrom(ip.Unmap(), e.RemotePort)
		if !slices.Contains(wires, wire) {
			wires = append(wires, wire)
		}
	}
	// One socket of IPv6 takes both, and leaves no place for another.
	all6 := netip.AddrPortFrom(netip.IPv6Unspecified(), e.RemotePort)
	all4 := netip.AddrPortFrom(netip.IPv4Unspecified(), e.RemotePort)
	if slices.Contains(wires, all6) {
		wires = slices.DeleteFunc(wires, func(a netip.AddrPort) bool { return a == all4 })
	}
	return wires, nil
}
