// Package launch is what the dialects of PT 1.0 and of PT 2 have in common about how a
// child is started.
//
//	if err := launch.CheckNames(config.Transports, "obfs4"); err != nil {
//		return nil, err
//	}
//	environment, err := launch.ServerEnvironment(l)
//	if err != nil {
//		return nil, err
//	}
//	environment.Servers = servers
package launch

import (
	"fmt"
	"net/netip"
	"path/filepath"
	"strconv"

	"pthost/adapters/pt1/wire"
	"pthost/ptipc"
	"pthost/ptipc/host"
)

// CheckNames refuses a configuration without transports, and names that the environment
// of a child cannot carry. example is the name of a transport.
func CheckNames[T any](transports map[string]T, example string) error {
	if len(transports) == 0 {
		return &ptipc.ConfigError{Pointer: "/transports", Value: "{}", Problem: "names no transport", Remedy: fmt.Sprintf(`add the one that the executable is asked for, such as "%s": {…}`, example)}
	}
	for name := range transports {
		if !wire.ValidName(name) {
			return &ptipc.ConfigError{Pointer: "/transports", Value: strconv.Quote(name), Problem: "is not the name of a managed transport", Remedy: "begin with a letter or _, go on with letters, digits and _"}
		}
	}
	return nil
}

// Listen reads the address of a server's wire, which is the key listen.
func Listen(text string) (netip.AddrPort, error) {
	bind, err := netip.ParseAddrPort(text)
	if err != nil || bind.Addr().Zone() != "" {
		return netip.AddrPort{}, &ptipc.ConfigError{Pointer: "/listen", Value: strconv.Quote(text), Problem: "is not an address to listen at", Remedy: "write ip:port, such as 0.0.0.0:443 or [::]:443"}
	}
	return bind, nil
}

// ServerEnvironment is what every server is told: its state directory, and where it brings
// connections, as the two deliveries of PT 1.0 are ordered (PT1-12). Servers is not set.
func ServerEnvironment(l host.Launch) (*wire.Environment, error) {
	if l.Proxy != "" {
		return nil, fmt.Errorf("the server of a managed transport makes no connections of its own, and takes no upstream proxy (PT1-7): %w", ptipc.ExitUsage)
	}
	e := &wire.Environment{State: l.Dir, ExitOnStdinClose: true, CookieFile: CookieFile(l)}
	if len(l.Deliver) == 2 {
		e.Port, e.ExtendedPort = l.Deliver[0], l.Deliver[1]
	}
	return e, nil
}

// CookieFile is the path of the Extended ORPort's cookie.
func CookieFile(l host.Launch) string { return filepath.Join(l.Dir, "extended_orport_auth_cookie") }

// Owner is the user and the group of the child, -1 for those of this process.
func Owner(l host.Launch) (uid, gid int) {
	if l.Credential == nil {
		return -1, -1
	}
	return int(l.Credential.UID), int(l.Credential.GID)
}
