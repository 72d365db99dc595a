package managed

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"strings"

	"pthost/adapters/pt1/wire"
	"pthost/ptipc"
	"pthost/ptipc/stdio"
)

// A Configuration is what the two sides of a transport need, as `ptipc generate`
// prints it and as it is kept in the state location (PT1-25).
type Configuration struct {
	Client ptipc.Opaque `json:"client,omitempty"`
	Server ptipc.Opaque `json:"server,omitempty"`
	// Options are those of torrc from which the configuration was made.
	Options map[string]string `json:"options,omitempty"`
}

// maxConfiguration bounds the file of a configuration.
const maxConfiguration = 1 << 20

// ReadConfiguration reads the file of a configuration.
func ReadConfiguration(path string) (Configuration, error) {
	var c Configuration
	info, err := os.Stat(path)
	if err != nil {
		return c, err
	}
	if info.Size() > maxConfiguration {
		return c, fmt.Errorf("%s: %d bytes are too many for a configuration, at most %d make sense", path, info.Size(), maxConfiguration)
	}
	text, err := os.ReadFile(path)
	if err != nil {
		return c, err
	}
	if err := ptipc.Opaque(text).Decode(&c); err != nil {
		return c, fmt.Errorf("%s: %w", path, err)
	}
	return c, nil
}

const (
	// optionListen is where a server's configuration, and the options from which it
	// is made, have the address of the wire (PT1-26).
	optionListen = "listen"
	optionHost   = keyHost
)

// configuration is the one that was given, that is kept, or that is made now
// (PT1-25), with the address that tor wants the wire to have (PT1-26).
func (r *running) configuration(ctx context.Context, s wire.Server, factory *ptipc.ServerFactory, env ptipc.Env) (Configuration, error) {
	c, err := r.keptConfiguration(ctx, s, factory, env)
	if err != nil {
		return Configuration{}, err
	}
	c.Server, err = withListen(c.Server, s.Bind)
	return c, err
}

func (r *running) keptConfiguration(ctx context.Context, s wire.Server, factory *ptipc.ServerFactory, env ptipc.Env) (Configuration, error) {
	options := map[string]string{}
	for _, option := range s.Options {
		if _, twice := options[option.Key]; twice {
			return Configuration{}, fmt.Errorf("the option %.64q stands twice in ServerTransportOptions", option.Key)
		}
		options[option.Key] = option.Value
	}
	if _, ok := options[optionListen]; ok {
		return Configuration{}, fmt.Errorf("the option %s is for ServerTransportListenAddr to say (PT1-26)", optionListen)
	}
	if given, ok := r.proxy.Configurations[s.Name]; ok {
		switch {
		case len(given.Server) == 0:
			return Configuration{}, errors.New("the configuration that was given has none for the server")
		case len(options) > 0:
			return Configuration{}, errors.New("ServerTransportOptions do nothing beside a configuration that was given: remove one of them")
		}
		return given, nil
	}
	path := filepath.Join(r.environment.State, "ptipc-"+s.Name+".json")
	kept, err := ReadConfiguration(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return r.makeConfiguration(ctx, s, factory, env, options, path)
	case err == nil && len(kept.Server) == 0:
		err = fmt.Errorf("%s: it has no configuration for the server", path)
	case err == nil && !maps.Equal(kept.Options, options):
		err = fmt.Errorf("%s was made with other ServerTransportOptions: change them back", path)
	}
	if err != nil {
		return Configuration{}, fmt.Errorf("%w; or remove the file to have a new one made, and then give clients the new bridge line (PT1-25)", err)
	}
	return kept, nil
}

// makeConfiguration has a configuration made and keeps it.
func (r *running) makeConfiguration(ctx context.Context, s wire.Server, factory *ptipc.ServerFactory, env ptipc.Env, options map[string]string, path string) (Configuration, error) {
	if factory.GenerateConfig == nil {
		return Configuration{}, errors.New("the transport makes no configurations: give it one")
	}
	c := Configuration{Options: options}
	var err error
	c.Client, c.Server, err = generate(ctx, factory, options, s.Bind, env)
	if err != nil {
		return Configuration{}, fmt.Errorf("no configuration could be made: %w", err)
	}
	if _, err := bridgeArgs(c.Client); err != nil { // before it is kept for ever
		return Configuration{}, err
	}
	text, err := json.MarshalIndent(c, "", "  ")
	if err != nil {
		return Configuration{}, err
	}
	if err := writeFile(path, append(text, '\n')); err != nil {
		return Configuration{}, fmt.Errorf("the configuration cannot be kept: %w", err)
	}
	r.log.Info("a configuration was made", "transport", s.Name, "file", path)
	return c, nil
}

// generate asks for a configuration with the address of the wire and without that
// of clients, and again without what the transport does not take (PT1-26).
func generate(ctx context.Context, factory *ptipc.ServerFactory, options map[string]string, bind netip.AddrPort, env ptipc.Env) (client, server ptipc.Opaque, err error) {
	ask := func(without ...string) (client, server ptipc.Opaque, err error) {
		members := map[string]string{optionHost: ""}
		if bind.IsValid() {
			members[optionListen] = bind.String()
		}
		for _, key := range without {
			delete(members, key)
		}
		maps.Copy(members, options)
		object, err := json.Marshal(members)
		if err != nil {
			return nil, nil, err
		}
		return factory.GenerateConfig(ctx, object, env)
	}
	if client, server, err = ask(); ptipc.ExitCodeOf(err) != ptipc.ExitConfig {
		return client, server, err
	}
	if client, server, again := ask(optionHost); again == nil {
		return client, server, nil
	}
	if anywhere(bind) {
		if client, server, again := ask(optionHost, optionListen); again == nil {
			return client, server, nil
		}
	}
	return nil, nil, err
}

// anywhere says that tor has no wish for the address, which it writes as 0.0.0.0:0.
func anywhere(bind netip.AddrPort) bool {
	return !bind.IsValid() || bind.Addr().IsUnspecified() && bind.Port() == 0
}

// withListen puts the address into a server's configuration. Port 0 leaves the port
// as it is: clients know it.
func withListen(server ptipc.Opaque, bind netip.AddrPort) (ptipc.Opaque, error) {
	if !bind.IsValid() {
		return server, nil
	}
	members := map[string]json.RawMessage{}
	if err := server.Decode(&members); err != nil {
		return nil, fmt.Errorf("the server's configuration: %w", err)
	}
	old, ok := members[optionListen]
	if !ok && anywhere(bind) {
		return server, nil // it listens by another key, or on its own
	}
	if bind.Port() == 0 && ok {
		var text string
		if json.Unmarshal(old, &text) == nil {
			if was, err := netip.ParseAddrPort(text); err == nil {
				bind = netip.AddrPortFrom(bind.Addr(), was.Port())
			}
		}
	}
	listen, err := json.Marshal(bind.String())
	if err != nil {
		return nil, err
	}
	members[optionListen] = listen
	return json.Marshal(members)
}

// writeBridgeLine writes what users of the bridge need, for operators whose tor does
// not write it itself.
func (r *running) writeBridgeLine(line stdio.SMethod) error {
	words := []string{"Bridge", line.Name, "<IP ADDRESS>:" + line.Addr[strings.LastIndexByte(line.Addr, ':')+1:], "<FINGERPRINT>"}
	for _, arg := range line.Args {
		words = append(words, arg.Key+"="+arg.Value)
	}
	text := "# The line for the users of this bridge, with its address and fingerprint filled in.\n" + strings.Join(words, " ") + "\n"
	if err := writeFile(filepath.Join(r.environment.State, "ptipc-"+line.Name+"-bridgeline.txt"), []byte(text)); err != nil {
		return fmt.Errorf("the bridge line cannot be written: %w", err)
	}
	return nil
}

// writeFile writes a file for its owner alone, whole or not at all.
func writeFile(path string, content []byte) error {
	f, err := os.CreateTemp(filepath.Dir(path), ".ptipc-*")
	if err != nil {
		return err
	}
	_, err = f.Write(content)
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		return errors.Join(err, os.Remove(f.Name()))
	}
	if err := os.Rename(f.Name(), path); err != nil {
		return errors.Join(err, os.Remove(f.Name()))
	}
	return nil
}
