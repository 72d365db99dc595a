package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"pthost/adapters/sip003"
	"pthost/cmd/ptipc/internal/config"
	"pthost/ptipc"
	"pthost/ptipc/localnet"
	"pthost/transports/builtin"
)

// pluginStop is how long an executable may take to end by itself: Shadowsocks waits for
// its plugin, and what it could still finish is cut already.
const pluginStop = time.Second

func newSIP003(o *options) *cobra.Command {
	return &cobra.Command{
		Use:   "sip003",
		Short: "Be a Shadowsocks plugin: carry Shadowsocks through any transport",
		Long: `Runs a transport as a SIP003 plugin. Shadowsocks starts this command and tells it all
by environment variables: SS_REMOTE_HOST, SS_REMOTE_PORT, SS_LOCAL_HOST,
SS_LOCAL_PORT and SS_PLUGIN_OPTIONS. Since many take the name of an executable alone,
ptipc without arguments is this command when the first four are set.

The options are KEY=VALUE or KEY alone, with ; between them; \ takes away the meaning
of \, ; and =. These are for ptipc:

  server          the side of ss-server; without it, that of ss-local
  transport=NAME  a builtin transport: ` + builtinNames() + `
  exec=PATH       in its place an executable; with plain, it takes neither HOST
                  nor "-"; with allow-read=PATHS and allow-write=PATHS, separated
                  by colons, or no-sandbox it may use other files than its own
  config=FILE     its configuration as JSON, or what ptipc generate has printed,
                  of which this side's part is taken
  connection=NAME the connection factory; needed if the transport has several
  state=DIR       the state directory; without it the state is temporary

All others are keys of the transport's configuration: a string each, or true for a
KEY alone. Where the server is comes from Shadowsocks: on the server it is the key
listen, on the client the settings host and port, or the destination of a transport
that is free.

The command lines of programs can be read by all users of a machine, and options in
them. Whatever is secret belongs into the file of config=, or into the configuration
file of Shadowsocks.

Only TCP goes through a plugin. Shadowsocks sends UDP, if it is switched on, beside it.

The other way round, a Shadowsocks plugin is a transport for ptipc run: its executable
with "dialect": "sip003" in HOST.json. See spec/sip003.md.`,
		Example: `  ptipc generate builtin:websocket '{"listen":"0.0.0.0:443","host":"192.0.2.1"}' >ws.json
  ss-server -s 0.0.0.0 -p 443 -k SECRET -m aes-256-gcm --plugin ptipc --plugin-opts 'server;transport=websocket;config=ws.json'
  ss-local -s 192.0.2.1 -p 443 -l 1080 -k SECRET -m aes-256-gcm --plugin ptipc --plugin-opts 'transport=websocket;config=ws.json'`,
		Args: usageArgs(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error { return runPlugin(cmd.Context(), o) },
	}
}

func builtinNames() string {
	names := builtins()
	for i := range names {
		names[i] = strings.TrimPrefix(names[i], builtinPrefix)
	}
	return strings.Join(names, ", ")
}

// runPlugin is a whole life as a plugin. Options, and files that they name, are told to
// nobody but the transport: an error of either names the key, and a value only where its
// name does not speak of a secret (SIP-9, CFG-2).
func runPlugin(ctx context.Context, o *options) error {
	e, err := sip003.ReadEnvironment(os.Getenv)
	if err != nil {
		return err
	}
	for _, name := range sip003.Variables { // no child is to take them for its own
		if err := os.Unsetenv(name); err != nil {
			return err
		}
	}
	opener, err := newOpener(o)
	if err != nil {
		return err
	}
	p := &plugin{opener: opener, environment: e}
	if err := p.readOptions(); err != nil {
		return fmt.Errorf("SS_PLUGIN_OPTIONS: %w", err)
	}
	ctx, stop := sip003.WithParent(ctx, opener.log)
	defer stop()
	if p.server {
		return p.runServer(ctx)
	}
	return p.runClient(ctx)
}

// plugin is what the options ask for.
type plugin struct {
	opener      *opener
	environment sip003.Environment
	server      bool
	builtin     string // or
	transport   config.Transport
	connection  string
	document    ptipc.Opaque   // of config=FILE
	keys        sip003.Options // of the transport's configuration
}

// readOptions takes what is for this command out of the options; the rest is the
// transport's (SIP-4).
func (p *plugin) readOptions() error {
	rest := p.environment.Options
	word := func(key string) (string, error) {
		option, found := rest.Cut(key)
		if found && option.Value == "" {
			return "", &ptipc.ConfigError{Pointer: "/" + key, Problem: "has no value", Remedy: "write " + key + "=…"}
		}
		return option.Value, nil
	}
	flag := func(key string) (bool, error) {
		option, found := rest.Cut(key)
		if !option.Bare && found && option.Value != "1" && option.Value != "true" {
			return false, &ptipc.ConfigError{Pointer: "/" + key, Value: strconv.Quote(option.Value), Problem: "takes no value", Remedy: "write " + key + " alone, or leave it out"}
		}
		return found, nil
	}
	var file, read, write string
	t := &p.transport
	t.Restart.Policy, t.StopTimeout = "always", config.Duration(pluginStop)
	for key, to := range map[string]*string{
		"transport": &p.builtin, "exec": &t.Exec, "config": &file, "connection": &p.connection, "state": &t.State,
		"allow-read": &read, "allow-write": &write,
	} {
		var err error
		if *to, err = word(key); err != nil {
			return err
		}
	}
	for key, to := range map[string]*bool{"server": &p.server, "plain": &t.Plain, "no-sandbox": &t.Sandbox.Off} {
		var err error
		if *to, err = flag(key); err != nil {
			return err
		}
	}
	p.keys = rest
	known := builtinTransport(p.builtin)
	switch {
	case p.builtin == "" && t.Exec == "":
		return &ptipc.ConfigError{Pointer: "/transport", Problem: "is missing", Remedy: "write transport=NAME with one of " + builtinNames() + ", or exec=PATH"}
	case p.builtin != "" && t.Exec != "":
		return &ptipc.ConfigError{Pointer: "/exec", Value: strconv.Quote(t.Exec), Problem: "stands beside transport", Remedy: "keep one of the two"}
	case p.builtin != "" && known.Client == nil && known.Server == nil:
		return &ptipc.ConfigError{Pointer: "/transport", Value: strconv.Quote(p.builtin), Problem: "is not a transport of this tool", Remedy: "write one of " + builtinNames() + ", or exec=PATH"}
	case p.builtin != "" && (t.Plain || t.Sandbox.Off || read != "" || write != ""):
		return &ptipc.ConfigError{Problem: "has plain, no-sandbox, allow-read or allow-write, which belong to an executable", Remedy: "remove them"}
	case t.Sandbox.Off && (read != "" || write != ""):
		return &ptipc.ConfigError{Pointer: "/no-sandbox", Problem: "leaves nothing to be allowed", Remedy: "remove it, or allow-read and allow-write"}
	}
	t.Sandbox.Read, t.Sandbox.Write = filepath.SplitList(read), filepath.SplitList(write)
	directory, err := os.Getwd()
	if err != nil {
		return err
	}
	t.Sandbox.Resolve(directory)
	if t.State != "" && !filepath.IsAbs(t.State) {
		t.State = filepath.Join(directory, t.State)
	}
	if file == "" {
		return nil
	}
	p.document, err = readDocument(file, p.server)
	return err
}

// readDocument reads a configuration, or one side's part of what was generated.
func readDocument(file string, server bool) (ptipc.Opaque, error) {
	text, err := config.Read(file)
	if err != nil {
		return nil, err
	}
	var members map[string]json.RawMessage
	if err := text.Decode(&members); err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	if len(members) != 2 || members["client"] == nil || members["server"] == nil {
		return text, nil
	}
	if server {
		return ptipc.Opaque(members["server"]), nil
	}
	return ptipc.Opaque(members["client"]), nil
}

// name is what errors and logs call the transport.
func (p *plugin) name() string {
	if p.builtin != "" {
		return p.builtin
	}
	return filepath.Base(p.transport.Exec)
}

func (p *plugin) runClient(ctx context.Context) (err error) {
	document, err := sip003.Config(p.document, p.keys, netip.AddrPort{})
	if err != nil {
		return err
	}
	var transport *ptipc.Transport
	if open, ok := builtin.Clients[p.builtin]; ok {
		env, release, err := p.env()
		if err != nil {
			return err
		}
		defer release()
		transport, err = open(ctx, document, env)
		if err != nil {
			return err
		}
	} else if p.builtin != "" {
		return fmt.Errorf("transport %s has no client side: %w", p.builtin, ptipc.ExitConfig)
	} else {
		p.transport.Config = document
		if transport, err = p.opener.open(ctx, p.name(), p.transport); err != nil {
			return err
		}
	}
	defer func() { err = errors.Join(err, transport.Close()) }()
	chosen, _, err := factory(transport, p.connection)
	if err != nil {
		return fmt.Errorf("connection: %w: %w", err, ptipc.ExitConfig)
	}
	return p.until(ctx, transport.Wait, func(ctx context.Context) error {
		return sip003.Client(ctx, p.environment, chosen, p.opener.log)
	})
}

// until runs serve, and ends it with an error when the transport ends by itself:
// Shadowsocks has to know.
func (p *plugin) until(ctx context.Context, wait func() error, serve func(context.Context) error) error {
	inner, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	go func() {
		if err := wait(); err != nil {
			cancel(err)
		}
	}()
	err := serve(inner)
	if ctx.Err() == nil && inner.Err() != nil {
		err = errors.Join(context.Cause(inner), err)
	}
	return err
}

func (p *plugin) runServer(ctx context.Context) error {
	if p.connection != "" {
		return &ptipc.ConfigError{Pointer: "/connection", Value: strconv.Quote(p.connection), Problem: "belongs to a client", Remedy: "remove it"}
	}
	env, release := p.opener.env(p.name(), p.transport.State), func() {}
	factory := builtin.Servers[p.builtin]
	if p.builtin == "" {
		command, err := p.opener.command(p.name(), p.transport)
		if err != nil {
			return err
		}
		factory = command.Server()
	} else {
		if factory == nil || factory.Listen == nil {
			return fmt.Errorf("transport %s has no server that hands connections over to Shadowsocks: %w", p.builtin, ptipc.ExitConfig)
		}
		var err error
		if env, release, err = p.env(); err != nil {
			return err
		}
	}
	defer release()
	return sip003.Server(ctx, p.environment, func(ctx context.Context, wire netip.AddrPort) (ptipc.Listener, error) {
		document, err := sip003.Config(p.document, p.keys, wire)
		if err != nil {
			return nil, err
		}
		return factory.Listen(ctx, document, env)
	}, p.opener.log)
}

// env is the environment of a builtin transport, which runs in this process: it is the
// plugin's child already. The state directory is kept from other users and processes.
func (p *plugin) env() (ptipc.Env, func(), error) {
	env := p.opener.env(p.name(), p.transport.State)
	if env.Local == "" {
		return env, func() {}, nil
	}
	if err := os.MkdirAll(env.Local, 0o700); err != nil {
		return env, nil, fmt.Errorf("state: %w", err)
	}
	dir, err := localnet.OpenDir(env.Local)
	if err != nil {
		return env, nil, fmt.Errorf("state: %w", err)
	}
	if err := dir.Lock(); err != nil {
		return env, nil, errors.Join(fmt.Errorf("state: %w", err), dir.Close())
	}
	return env, func() { _ = dir.Close() }, nil // nothing was written through it
}
