package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"os/user"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"pthost/adapters/pt1"
	"pthost/adapters/pt2"
	"pthost/adapters/sip003"
	"pthost/cmd/ptipc/internal/config"
	"pthost/ptipc"
	"pthost/ptipc/host"
	"pthost/ptipc/proc"
	"pthost/transports/builtin"
)

// dialects are the protocols of children other than the project's own, by the words of
// HOST.json.
var dialects = map[string]checkedDialect{"pt1": pt1.Dialect{}, "pt2": pt2.Dialect{}, "sip003": sip003.Dialect{}}

// A checkedDialect can tell what is wrong with a configuration without starting a child.
type checkedDialect interface {
	host.Dialect
	Check(role string, config ptipc.Opaque) error
}

// builtinPrefix marks a transport that the tool carries.
const builtinPrefix = "builtin:"

// opener makes transports of what people write.
type opener struct {
	options *options
	log     *slog.Logger
	self    string                          // this executable, which is the child of builtin transports and the launcher
	console *console                        // of ptipc run; nil for commands that nobody looks at
	watch   func(name string, e host.Event) // nil: nobody watches the children
}

func newOpener(o *options) (*opener, error) {
	log, err := o.logger()
	if err != nil {
		return nil, err
	}
	self, err := os.Executable()
	if err != nil {
		return nil, fmt.Errorf("finding this executable, which runs the builtin transports: %w", err)
	}
	return &opener{options: o, log: log, self: self}, nil
}

// command is the child of an executable, or of this tool itself.
func (o *opener) command(name string, t config.Transport) (*host.Command, error) {
	c := &host.Command{
		Name: name, Path: t.Exec, Args: t.Args, Plain: t.Plain, ConfigArgv: t.ConfigVia == "argv", Bound: t.Bound, Proxy: t.Proxy,
		StartTimeout: time.Duration(t.StartTimeout), StopTimeout: time.Duration(t.StopTimeout),
		Restart: host.Restart{
			Never: t.Restart.Policy == "never",
			Min:   time.Duration(t.Restart.Min), Max: time.Duration(t.Restart.Max), GiveUpAfter: t.Restart.GiveUpAfter,
		},
		Events: o.events(name), Trace: o.options.tracer(o.log, name),
	}
	if d, ok := dialects[t.Dialect]; ok {
		c.Dialect = d
	}
	if runtime.GOOS == "linux" {
		c.Launcher = []string{o.self, launchCommand}
		if !t.Sandbox.Off {
			c.Sandbox = &proc.Sandbox{Read: t.Sandbox.Read, Write: t.Sandbox.Write}
		}
		c.Limits = proc.Limits{Descriptors: t.Limits.Descriptors, Memory: t.Limits.MemoryMiB << 20, Processes: t.Limits.Processes}
	}
	if own, ok := strings.CutPrefix(t.Exec, builtinPrefix); ok {
		if known := builtinTransport(own); known.Client == nil && known.Server == nil {
			return nil, &ptipc.ConfigError{
				Pointer: "/transports/" + name + "/exec", Value: strconv.Quote(t.Exec), Problem: "is not a transport of this tool",
				Remedy: "write one of " + strings.Join(builtins(), ", ") + ", or a path",
			}
		}
		c.Path, c.Args = o.self, append([]string{"transport", own}, t.Args...)
	}
	if t.User != "" {
		credential, err := lookUpUser(t.User)
		if err != nil {
			return nil, &ptipc.ConfigError{Pointer: "/transports/" + name + "/user", Value: strconv.Quote(t.User), Problem: err.Error(), Remedy: "name a user of this machine"}
		}
		c.Credential = credential
	}
	return c, nil
}

func lookUpUser(name string) (*proc.Credential, error) {
	u, err := user.Lookup(name)
	if err != nil {
		if u, err = user.LookupId(name); err != nil {
			return nil, errors.New("is not a user that is known")
		}
	}
	uid, err := strconv.ParseUint(u.Uid, 10, 32)
	if err != nil {
		return nil, errors.New("has no number as its id")
	}
	gid, err := strconv.ParseUint(u.Gid, 10, 32)
	if err != nil {
		return nil, errors.New("has no number as its group")
	}
	return &proc.Credential{UID: uint32(uid), GID: uint32(gid)}, nil
}

// checkDialect tells what is wrong with a configuration that a dialect reads.
func checkDialect(name string, t config.Transport) error {
	d, ok := dialects[t.Dialect]
	if !ok {
		return nil // only the transport knows
	}
	role := host.RoleClient
	if t.Role != "" {
		role = t.Role
	}
	return pt1.Under("/transports/"+name+"/config", d.Check(role, t.Config))
}

// events tells the operator what happens to a child.
func (o *opener) events(name string) func(host.Event) {
	return o.tell(name, o.log.With("transport", name))
}

// tell tells what happens to a child in a log that says which one it is.
func (o *opener) tell(name string, log *slog.Logger) func(host.Event) {
	return func(e host.Event) {
		if o.console != nil {
			o.console.event(name, e)
		}
		if o.watch != nil {
			o.watch(name, e)
		}
		switch e.Kind {
		case host.Started, host.Ready:
			log.Info("child "+string(e.Kind), "pid", e.Pid)
		case host.Exited:
			if ptipc.ExitCodeOf(e.Err) == ptipc.ExitOK {
				log.Info("child exited", "pid", e.Pid)
				return
			}
			log.Warn("child exited", "pid", e.Pid, "err", e.Err)
		case host.Restarting:
			log.Warn("child is restarted", "delay", e.Delay.Round(time.Millisecond))
		case host.GaveUp:
			log.Error("child is not restarted", "err", e.Err)
		}
	}
}

func (o *opener) env(name, state string) ptipc.Env {
	log := o.log.With("transport", name)
	var signals ptipc.Signals
	if o.console != nil {
		signals = o.console.signals(name)
	}
	return ptipc.Env{
		Local:   state,
		Log:     log,
		Signals: signals,
		Status: func(ctx context.Context, attrs ...slog.Attr) {
			log.LogAttrs(ctx, slog.LevelInfo, "status", attrs...)
			if o.console != nil {
				o.console.progress(name, attrs)
			}
		},
	}
}

// open opens a transport of the configuration file.
func (o *opener) open(ctx context.Context, name string, t config.Transport) (*ptipc.Transport, error) {
	if len(t.Attach) > 0 {
		return (&host.Attachment{Addrs: t.Attach, Bound: t.Bound}).Open(ctx, t.Config, o.env(name, t.State))
	}
	command, err := o.command(name, t)
	if err != nil {
		return nil, err
	}
	return command.Open(ctx, t.Config, o.env(name, t.State))
}

// factory picks a connection factory: the named one, or the only one.
func factory(t *ptipc.Transport, name string) (ptipc.ConnectionFactory, string, error) {
	names := slices.Sorted(maps.Keys(t.Connections))
	if name == "" && len(names) == 1 {
		name = names[0]
	}
	f, ok := t.Connections[name]
	switch {
	case ok:
		return f, name, nil
	case len(names) == 0 && len(t.Packets) > 0:
		return f, "", errors.New("the transport carries datagrams and no streams")
	case name == "":
		return f, "", fmt.Errorf("the transport has several connection factories; name one of %s", strings.Join(names, ", "))
	}
	return f, "", fmt.Errorf("the transport has no connection factory %q; it has %s", name, strings.Join(names, ", "))
}

// packetFactory picks a packet factory: the named one, or the only one.
func packetFactory(t *ptipc.Transport, name string) (ptipc.PacketFactory, string, error) {
	names := slices.Sorted(maps.Keys(t.Packets))
	f, ok := t.Packets[name]
	switch {
	case ok:
		return f, name, nil
	case len(names) == 0:
		return nil, "", errors.New("the transport carries no datagrams")
	case len(names) == 1 && (name == "" || t.Connections[name].Dial != nil):
		return t.Packets[names[0]], names[0], nil
	case name == "":
		return nil, "", fmt.Errorf("the transport has several packet factories; name one of %s", strings.Join(names, ", "))
	}
	return nil, "", fmt.Errorf("the transport has no packet factory %q; it has %s", name, strings.Join(names, ", "))
}

func builtins() []string {
	all := map[string]bool{}
	for name := range builtin.Clients {
		all[builtinPrefix+name] = true
	}
	for name := range builtin.Servers {
		all[builtinPrefix+name] = true
	}
	return slices.Sorted(maps.Keys(all))
}

// completeExec completes builtin:NAME and files.
func completeExec(_ *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	if len(args) == 0 {
		return builtins(), cobra.ShellCompDirectiveDefault
	}
	return nil, cobra.ShellCompDirectiveNoFileComp
}

// childFlags say how one child is started.
type childFlags struct {
	dialect   string
	plain     bool
	configVia string
	state     string
	sandbox   config.Sandbox
}

func (f *childFlags) add(cmd *cobra.Command) {
	cmd.Flags().StringVar(&f.dialect, "dialect", "", "what the executable speaks when it is not this project's protocol: "+strings.Join(config.Dialects, ", "))
	err := cmd.RegisterFlagCompletionFunc("dialect", cobra.FixedCompletions(config.Dialects, cobra.ShellCompDirectiveNoFileComp))
	if err != nil {
		panic(err) // the flag was defined a line above
	}
	f.addKind(cmd)
	cmd.Flags().StringVar(&f.configVia, "config-via", "", "how the configuration is handed over: stdin or argv, which every local user can read")
	cmd.Flags().StringVar(&f.state, "state", "", "the state directory; without it the state is temporary")
}

// addKind adds the flags that say what kind of child it is and what it may do.
func (f *childFlags) addKind(cmd *cobra.Command) {
	cmd.Flags().BoolVar(&f.plain, "plain", false, "the executable takes neither HOST nor \"-\": EXE CONFIG and nothing more")
	cmd.Flags().StringArrayVar(&f.sandbox.Read, "allow-read", nil, "a file or directory that the child may read, beside its state, the system's, and files that CONFIG names")
	cmd.Flags().StringArrayVar(&f.sandbox.Write, "allow-write", nil, "one that it may change as well")
	cmd.Flags().BoolVar(&f.sandbox.Off, "no-sandbox", false, "the child may use what this user may use")
}

// config is the child as HOST.json would have it.
func (f *childFlags) config(exe string) (config.Transport, error) {
	t := config.Transport{Exec: exe, State: f.state, Dialect: f.dialect, ConfigVia: f.configVia, Plain: f.plain, Sandbox: f.sandbox}
	if f.sandbox.Off && len(f.sandbox.Read)+len(f.sandbox.Write) > 0 {
		return t, fmt.Errorf("--no-sandbox leaves nothing to be allowed; remove it, or --allow-read and --allow-write: %w", ptipc.ExitUsage)
	}
	base, err := os.Getwd()
	if err != nil {
		return t, err
	}
	t.Sandbox.Resolve(base)
	return t, nil
}

// execFlags are the flags of commands that take EXE CONFIG.
type execFlags struct {
	childFlags
	factory  string
	settings string
	proxy    string
}

func (f *execFlags) add(cmd *cobra.Command) {
	f.childFlags.add(cmd)
	cmd.Flags().StringVar(&f.factory, "factory", "", "the connection factory; may be left out when there is one")
	cmd.Flags().StringVar(&f.settings, "settings", "", "the connection settings, a JSON object, or @FILE")
	cmd.Flags().StringVar(&f.proxy, "proxy", "", "upstream proxy of the transport: socks5://HOST:PORT, or @FILE for one with a password")
}

// execUsage describes EXE and CONFIG in the help of commands that take them.
const execUsage = `EXE is a path, a name in PATH, or builtin:NAME. CONFIG is a JSON object, or @FILE
to read it from a file and keep it off the command line. An executable that was made
for tor is used with --dialect pt1, and its CONFIG is of the form
{"transports":{"obfs4":{"host":"192.0.2.1","port":443,"cert":"…","iat-mode":"0"}}}.`

// transport opens EXE with CONFIG.
func (f *execFlags) open(ctx context.Context, o *opener, exe, configText string) (*ptipc.Transport, ptipc.ConnectionFactory, error) {
	var none ptipc.ConnectionFactory
	object, err := inline("CONFIG", configText)
	if err != nil {
		return nil, none, err
	}
	proxy, err := inline("--proxy", f.proxy)
	if err != nil {
		return nil, none, err
	}
	t, err := f.config(exe)
	if err != nil {
		return nil, none, err
	}
	t.Config, t.Proxy, t.Restart.Policy = ptipc.Opaque(object), strings.TrimSpace(proxy), "never"
	if err := t.Validate(); err != nil {
		return nil, none, fmt.Errorf("%w: %w", err, ptipc.ExitUsage)
	}
	transport, err := o.open(ctx, filepath.Base(exe), t)
	if err != nil {
		return nil, none, err
	}
	chosen, _, err := factory(transport, f.factory)
	if err != nil {
		return nil, none, errors.Join(fmt.Errorf("--factory: %w: %w", err, ptipc.ExitUsage), transport.Close())
	}
	return transport, chosen, nil
}

// inline is the text of an argument, or of the file that it names by @FILE.
func inline(what, text string) (string, error) {
	path, ok := strings.CutPrefix(text, "@")
	if !ok {
		return text, nil
	}
	content, err := os.ReadFile(path)
	if err != nil {
		return "", fmt.Errorf("%s: %w: %w", what, err, ptipc.ExitNoInput)
	}
	return string(content), nil
}
