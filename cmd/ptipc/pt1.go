package main

import (
	"context"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"pthost/adapters/pt1/managed"
	"pthost/cmd/ptipc/internal/config"
	"pthost/ptipc"
	"pthost/ptipc/host"
	"pthost/transports/builtin"
)

func newPT1(o *options) *cobra.Command {
	var execs, configs []string
	var f childFlags
	cmd := &cobra.Command{
		Use:   "pt1",
		Short: "Be a managed proxy: give tor the transports of this tool, or an executable",
		Long: `Speaks Tor's managed transport protocol (PT 1.0), so that tor can use transports that
were not made for it. tor starts this command, as a client or as a server, and
tells it by its environment what to do; started by hand it can do nothing.

On the bridge, in torrc:

  BridgeRelay 1
  ORPort 127.0.0.1:auto
  ExtORPort auto
  ServerTransportPlugin websocket exec /usr/bin/ptipc pt1
  ServerTransportListenAddr websocket 0.0.0.0:443

The server makes itself a configuration, once, and keeps it in tor's pt_state
directory, in ptipc-websocket.json. The line for the bridge's users stands in
ptipc-websocket-bridgeline.txt beside it, and in tor's own bridgelines file.
ServerTransportOptions websocket backend=http://127.0.0.1:8080 shows a web site to
everybody else.

On the client:

  UseBridges 1
  ClientTransportPlugin websocket exec /usr/bin/ptipc pt1
  Bridge websocket 192.0.2.1:443 FINGERPRINT pin=sha256:… url=wss:///…

What stands behind the fingerprint are the connection settings of the transport.
With a URL that has a host, such as that of a content delivery network, the address
in front of it means nothing.

The transports of this tool are there under their own names. --exec adds an
executable, which is started as "ptipc run" would start it, sandboxed: --plain,
--allow-read, --allow-write and --no-sandbox hold for all of them. Without --config a
client's configuration is {}.`,
		Example: `  ClientTransportPlugin websocket exec /usr/bin/ptipc pt1
  ServerTransportPlugin example exec /usr/bin/ptipc pt1 --exec example=/usr/lib/pt/pt-example
  ServerTransportPlugin websocket exec /usr/bin/ptipc pt1 --config websocket=/etc/tor/pair.json`,
		Args: usageArgs(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			proxy := managed.Proxy{
				Clients: maps.Clone(builtin.Clients), Servers: maps.Clone(builtin.Servers),
				Configurations: map[string]managed.Configuration{},
			}
			for _, text := range execs {
				name, exe, err := named("--exec", text)
				if err != nil {
					return err
				}
				t, err := f.config(exe)
				if err != nil {
					return err
				}
				o.addExec(&proxy, name, t)
			}
			for _, text := range configs {
				name, file, err := named("--config", text)
				if err != nil {
					return err
				}
				if proxy.Clients[name] == nil && proxy.Servers[name] == nil {
					return fmt.Errorf("--config %s: there is no transport of this name; there are %s: %w",
						name, strings.Join(slices.Sorted(maps.Keys(proxy.Clients)), ", "), ptipc.ExitUsage)
				}
				if proxy.Configurations[name], err = managed.ReadConfiguration(file); err != nil {
					return fmt.Errorf("--config %s: %w: %w", name, err, ptipc.ExitConfig)
				}
			}
			return proxy.Run(cmd.Context(), os.LookupEnv, os.Stdin, cmd.OutOrStdout())
		},
	}
	cmd.Flags().StringArrayVar(&execs, "exec", nil, "NAME=EXE: the transport NAME is this executable; may be given several times")
	cmd.Flags().StringArrayVar(&configs, "config", nil, `NAME=FILE: the configuration of a transport, {"client":…,"server":…} as "ptipc generate" prints it; may be given several times`)
	f.addKind(cmd)
	return cmd
}

// named splits NAME=VALUE.
func named(flag, text string) (name, value string, err error) {
	name, value, ok := strings.Cut(text, "=")
	if !ok || name == "" || value == "" {
		return "", "", fmt.Errorf("%s %q is not NAME=VALUE: %w", flag, text, ptipc.ExitUsage)
	}
	return name, value, nil
}

// addExec puts an executable behind the proxy, both sides of it. Which it has shows
// when tor asks for one. What there is to tell goes to tor.
func (o *options) addExec(proxy *managed.Proxy, name string, t config.Transport) {
	command := func(env ptipc.Env) (*host.Command, error) {
		opener, err := newOpener(o)
		if err != nil {
			return nil, err
		}
		c, err := opener.command(name, t)
		if err != nil {
			return nil, err
		}
		c.Events = opener.tell(name, env.Logger())
		return c, nil
	}
	proxy.Clients[name] = func(ctx context.Context, configuration ptipc.Opaque, env ptipc.Env) (*ptipc.Transport, error) {
		c, err := command(env)
		if err != nil {
			return nil, err
		}
		return c.Open(ctx, configuration, env)
	}
	proxy.Servers[name] = &ptipc.ServerFactory{
		Name: name,
		GenerateConfig: func(ctx context.Context, options ptipc.Opaque, env ptipc.Env) (client, own ptipc.Opaque, err error) {
			c, err := command(env)
			if err != nil {
				return nil, nil, err
			}
			return c.Server().GenerateConfig(ctx, options, env)
		},
		Listen: func(ctx context.Context, configuration ptipc.Opaque, env ptipc.Env) (ptipc.Listener, error) {
			c, err := command(env)
			if err != nil {
				return nil, err
			}
			return c.Server().Listen(ctx, configuration, env)
		},
	}
}
