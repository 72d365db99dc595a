package sip003

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"runtime"
	"strings"

	"pthost/ptipc"
	"pthost/ptipc/front"
	"pthost/ptipc/localnet"
)

// Client is the client side of a plugin (SIP-5, SIP-6): it listens where Shadowsocks
// was told to connect, and carries each connection to the plugin's server. A free
// factory gets its address as the destination; a bound one as the settings host and
// port. Client returns nil at the end of ctx, when it cuts what is open: Shadowsocks,
// whose connections these are, is at its end too.
func Client(ctx context.Context, e Environment, factory ptipc.ConnectionFactory, log *slog.Logger) error {
	local, err := e.Local()
	if err != nil {
		return err
	}
	if e.RemoteHost == "" || strings.ContainsRune(e.RemoteHost, '|') {
		return fmt.Errorf("%s is %q, and has to be one name or address: %w", remoteHost, e.RemoteHost, ptipc.ExitUsage)
	}
	var settings []byte
	dest := e.Remote()
	if factory.Bound {
		dest = ""
		if settings, err = json.Marshal(map[string]any{"host": e.RemoteHost, "port": e.RemotePort}); err != nil {
			return err
		}
	}
	l, err := listenLocal(local, log)
	if err != nil {
		return fmt.Errorf("%w: %w", err, ptipc.ExitUnavailable)
	}
	log.Info("plugin is ready", "listen", l.Addr(), "remote", e.Remote())
	return serve(ctx, front.Forward(factory, settings, dest, log), l)
}

// listenLocal listens for Shadowsocks alone (SIP-5): for the users of this process and
// of the one that started it, which may have become another since.
func listenLocal(local netip.AddrPort, log *slog.Logger) (net.Listener, error) {
	l, err := localnet.ListenTCP(local.String())
	if err != nil {
		return nil, err
	}
	if !localnet.Supported("tcp") {
		log.Warn("this system does not tell who connects on the loopback: every user of it can use this plugin", "system", runtime.GOOS)
		return l, nil
	}
	own := uint32(os.Geteuid())
	return localnet.GuardFunc(l, log, func(peer localnet.Cred) bool {
		return peer.UID == own || localnet.RunsAs(os.Getppid(), peer.UID)
	}), nil
}

// A Listen opens a server's wire on an address.
type Listen func(ctx context.Context, wire netip.AddrPort) (ptipc.Listener, error)

// Server is the server side of a plugin (SIP-7): it opens the wire on each address that
// Shadowsocks was told to listen on, and delivers what comes to Shadowsocks. It returns
// nil at the end of ctx, and an error when a wire ends by itself.
func Server(ctx context.Context, e Environment, listen Listen, log *slog.Logger) error {
	local, err := e.Local()
	if err != nil {
		return err
	}
	wires, err := e.Wires()
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	ended := make(chan error, len(wires))
	started := 0
	for _, wire := range wires {
		var l ptipc.Listener
		if l, err = listen(ctx, wire); err != nil {
			break
		}
		var server front.Server
		if server, err = front.Deliver("tcp://"+local.String(), false, log); err != nil {
			err = errors.Join(err, l.Close())
			break
		}
		log.Info("plugin is ready", "wire", l.Addr(), "deliver", local)
		started++
		go func() {
			err := serve(ctx, server, l)
			cancel() // with one wire gone, Shadowsocks has to know
			ended <- errors.Join(err, l.Close())
		}()
	}
	if err != nil {
		cancel()
	}
	for range started {
		err = errors.Join(err, <-ended)
	}
	return err
}

// serve runs until ctx ends or the listener fails.
func serve(ctx context.Context, server front.Server, l net.Listener) error {
	stopped := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(stopped)
		cut, cancel := context.WithCancel(context.Background())
		cancel()
		_ = server.Shutdown(cut) // it reports that it cut what it was to cut
	})
	err := server.Serve(l)
	if stop() {
		cut, cancel := context.WithCancel(context.Background())
		cancel()
		_ = server.Shutdown(cut)
		return err
	}
	<-stopped
	return nil
}

// Config makes a transport's configuration of a document and of the options that are
// the transport's: each a string, or true for a key that stands alone. wire is where a
// server listens, as its key listen; the zero value is a client's. A key in both is an
// error, as is a listen that says something else than Shadowsocks (SIP-7).
func Config(document ptipc.Opaque, options Options, wire netip.AddrPort) (ptipc.Opaque, error) {
	members := map[string]json.RawMessage{}
	if err := document.Decode(&members); err != nil {
		return nil, err
	}
	for _, option := range options {
		if _, twice := members[option.Key]; twice {
			return nil, &ptipc.ConfigError{Pointer: pointer(option.Key), Problem: "stands in the options and in the file that they name", Remedy: "keep one of them"}
		}
		var value any = true
		if !option.Bare {
			value = option.Value
		}
		text, err := json.Marshal(value)
		if err != nil {
			return nil, err
		}
		members[option.Key] = text
	}
	if wire.IsValid() {
		listen, err := json.Marshal(wire.String())
		if err != nil {
			return nil, err
		}
		if said, ok := members["listen"]; ok && !sameWire(said, wire) {
			return nil, &ptipc.ConfigError{Pointer: "/listen", Value: string(said), Problem: "is not where Shadowsocks has its plugin listen, " + wire.String(), Remedy: "remove it, or change the server's address in Shadowsocks"}
		}
		members["listen"] = listen
	}
	return json.Marshal(members)
}

func pointer(key string) string {
	return "/" + strings.NewReplacer("~", "~0", "/", "~1").Replace(key)
}

// sameWire reports whether a listen of a configuration means this address. Shadowsocks
// has two spellings of every address, and so have others.
func sameWire(said json.RawMessage, wire netip.AddrPort) bool {
	var text string
	if json.Unmarshal(said, &text) != nil {
		return false
	}
	if strings.HasPrefix(text, ":") {
		text = "[::]" + text
	}
	addr, err := netip.ParseAddrPort(text)
	if err != nil || addr.Port() != wire.Port() {
		return false
	}
	return addr.Addr().Unmap() == wire.Addr() || addr.Addr().IsUnspecified() && wire.Addr().IsUnspecified()
}
