package conformance

import (
	"encoding/json"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"

	ptwire "pthost/adapters/pt1/wire"
	"pthost/ptipc"
)

// The dialects of children, which are the values of Subject.Dialect.
const (
	Seed = "seed" // spec/ptipc.md
	PT1  = "pt1"  // Tor's managed transports, spec/pt1.md
	PT2  = "pt2"  // PT 2.0 to 3.0, spec/pt1.md
)

// Dialects are the values of Subject.Dialect.
func Dialects() []string { return []string{Seed, PT1, PT2} }

// managed reports whether the child is a managed transport.
func (s *suite) managed() bool { return s.subject.Dialect != Seed }

// A managedConfig is the configuration of a child that is a managed transport. It is
// the one that a host of ours takes for it, read here once more.
type managedConfig struct {
	// Transports are, by name, the settings of a client's connections, or a listener.
	Transports map[string]ptipc.Opaque `json:"transports"`
	BindV4     string                  `json:"bind_v4,omitempty"`
	BindV6     string                  `json:"bind_v6,omitempty"`
	// Options, Pass and Version are of PT 2.
	Options ptipc.Opaque `json:"options,omitempty"`
	Pass    string       `json:"pass,omitempty"`
	Version string       `json:"version,omitempty"`
}

// A managedListener is a server's transport.
type managedListener struct {
	Listen  string       `json:"listen"`
	Options ptipc.Opaque `json:"options,omitempty"`
}

// A managedPair is options from which both sides are configured: the server's listener,
// and what it announces for its clients.
type managedPair struct {
	Transport string       `json:"transport"`
	Listen    string       `json:"listen"`
	Host      string       `json:"host,omitempty"`
	Options   ptipc.Opaque `json:"options,omitempty"`
}

// checkManaged says what is wrong with a subject of a dialect for managed transports.
func checkManaged(s Subject) error {
	if len(s.Generate) > 0 {
		var pair managedPair
		if err := s.Generate.Decode(&pair); err != nil {
			return fmt.Errorf("conformance: Subject.Generate: %w: %w", err, ptipc.ExitUsage)
		}
		if _, err := netip.ParseAddrPort(pair.Listen); err != nil || !ptwire.ValidName(pair.Transport) {
			return fmt.Errorf(`conformance: Subject.Generate is not {"transport":NAME,"listen":"ip:port"}: %w`, ptipc.ExitUsage)
		}
		return nil
	}
	var config managedConfig
	if err := s.Config.Decode(&config); err != nil {
		return fmt.Errorf("conformance: Subject.Config: %w: %w", err, ptipc.ExitUsage)
	}
	if len(config.Transports) == 0 {
		return fmt.Errorf(`conformance: Subject.Config names no transport; write {"transports":{NAME:{…}}}: %w`, ptipc.ExitUsage)
	}
	if s.Factory == "" && len(config.Transports) > 1 {
		return fmt.Errorf("conformance: Subject.Config has %d transports; name one of them in Subject.Factory: %w", len(config.Transports), ptipc.ExitUsage)
	}
	for name, own := range config.Transports {
		if !ptwire.ValidName(name) {
			return fmt.Errorf("conformance: %q in Subject.Config is not the name of a managed transport: %w", name, ptipc.ExitUsage)
		}
		if s.Role == Server {
			var listener managedListener
			if err := own.Decode(&listener); err != nil {
				return fmt.Errorf("conformance: Subject.Config, /transports/%s: %w: %w", name, err, ptipc.ExitUsage)
			}
			if _, err := netip.ParseAddrPort(listener.Listen); err != nil {
				return fmt.Errorf("conformance: Subject.Config, /transports/%s/listen is not ip:port: %w", name, ptipc.ExitUsage)
			}
		}
	}
	return nil
}

// An order is what a parent tells a managed transport: the variables of PT1-1 by their
// names without the prefix. Cases change it.
type order map[string]string

const (
	varVersion  = "MANAGED_TRANSPORT_VER"
	varState    = "STATE_LOCATION"
	varExit     = "EXIT_ON_STDIN_CLOSE"
	varClients  = "CLIENT_TRANSPORTS"
	varServers  = "SERVER_TRANSPORTS"
	varOptions  = "SERVER_TRANSPORT_OPTIONS"
	varBind     = "SERVER_BINDADDR"
	varProxy    = "PROXY"
	varORPort   = "ORPORT"
	varExtended = "EXTENDED_SERVER_PORT"
	varCookie   = "AUTH_COOKIE_FILE"
	varBindV4   = "OUTBOUND_BIND_ADDRESS_V4"
)

// noORPort is where a server is told to bring its connections that is only started.
const noORPort = "127.0.0.1:1"

// orderFor is what a parent tells a child with this configuration, which may use the
// state location.
func (s *suite) orderFor(l launch, state string) (order, error) {
	var config managedConfig
	if err := json.Unmarshal([]byte(l.config), &config); err != nil {
		return nil, err
	}
	e := ptwire.Environment{State: state, ExitOnStdinClose: true}
	e.BindV4, _ = netip.ParseAddr(config.BindV4) // "" is none
	e.BindV6, _ = netip.ParseAddr(config.BindV6)
	if s.subject.Dialect == PT2 {
		e.Versions = []string{"3.0", "2.2", "2.1", "2.0", "2"}
	}
	for _, name := range slices.Sorted(maps.Keys(config.Transports)) {
		if l.role == Client {
			e.Clients = append(e.Clients, name)
			continue
		}
		var own managedListener
		if err := json.Unmarshal(config.Transports[name], &own); err != nil {
			return nil, err
		}
		bind, err := netip.ParseAddrPort(own.Listen)
		if err != nil {
			return nil, err
		}
		var options ptwire.Args
		if s.subject.Dialect == PT1 { // those of PT 2 are one object for all
			if options, err = settingsArgs(own.Options); err != nil {
				return nil, err
			}
		}
		e.Servers = append(e.Servers, ptwire.Server{Name: name, Bind: bind, Options: options})
		e.Port = noORPort
	}
	if proxy, ok := l.host["proxy"].(string); ok {
		e.Proxy = proxy
	}
	environ, err := e.Environ()
	if err != nil {
		return nil, err
	}
	o := order{}
	for _, variable := range environ {
		name, value, _ := strings.Cut(strings.TrimPrefix(variable, ptwire.Prefix), "=")
		o[name] = value
	}
	if s.subject.Dialect == PT2 && !config.Options.Empty() {
		o[varOptions] = string(config.Options)
	}
	if l.tell != nil {
		l.tell(o)
	}
	return o, nil
}

// told is an order as environment and arguments. A PT 2 child that takes flags has its
// options in a file (PT1-14).
func (s *suite) told(o order, l launch, base string) (environ, args []string, err error) {
	var config managedConfig
	if err := json.Unmarshal([]byte(l.config), &config); err != nil {
		return nil, nil, err
	}
	if s.subject.Dialect == PT1 || config.Pass == "environment" {
		for name, value := range o {
			environ = append(environ, ptwire.Prefix+name+"="+value)
		}
		return environ, nil, nil
	}
	flag := func(name, variable string) {
		if value, ok := o[variable]; ok && value != "" {
			args = append(args, name, value)
		}
	}
	target := "-target"
	if config.Version == "2" {
		target = "-orport"
	}
	args = []string{"-" + l.role}
	flag("-ptversion", varVersion)
	flag("-state", varState)
	if o[varExit] == "1" {
		args = append(args, "-exit-on-stdin-close")
	}
	flag("-transports", varClients)
	flag("-transports", varServers)
	flag("-bindaddr", varBind)
	flag("-proxy", varProxy)
	flag(target, varORPort)
	flag("-extorport", varExtended)
	flag("-authcookie", varCookie)
	if options := o[varOptions]; options != "" {
		path := filepath.Join(base, stateDir, "pt2-options.json")
		if err := os.WriteFile(path, []byte(options), 0o600); err != nil {
			return nil, nil, err
		}
		args = append(args, "-optionsFile", path)
	}
	return nil, args, nil
}

// transport is the name of the transport that is looked at.
func (s *suite) transport() string {
	if s.subject.Factory != "" {
		return s.subject.Factory
	}
	var pair managedPair
	var config managedConfig
	_ = json.Unmarshal(s.subject.Generate, &pair) // both were checked
	_ = json.Unmarshal(s.subject.Config, &config)
	for name := range config.Transports {
		return name
	}
	return pair.Transport
}

// connectionSettings are what a connection of the subject is told, and its
// destination, which is "" if nothing says it.
func (t *trial) connectionSettings() (rest map[string]json.RawMessage, dest string) {
	s := t.suite
	text := t.client
	if text == "" {
		text = t.config()
	}
	var config managedConfig
	t.need(json.Unmarshal([]byte(text), &config))
	t.need(json.Unmarshal([]byte(object(config.Transports[s.transport()])), &rest))
	t.need(json.Unmarshal([]byte(object(s.subject.Settings)), &rest))
	var host string
	var port any
	for key, into := range map[string]any{"host": &host, "port": &port} {
		if raw, ok := rest[key]; ok {
			t.need(json.Unmarshal(raw, into))
			delete(rest, key)
		}
	}
	if host != "" {
		dest = net.JoinHostPort(host, fmt.Sprint(port))
	}
	return rest, dest
}

// managedDest is where connections go: for a free transport, to the suite.
func (t *trial) managedDest() string {
	s := t.suite
	if s.subject.Free {
		if s.subject.Dest != "" {
			return s.subject.Dest
		}
		return s.echo.addr()
	}
	if _, dest := t.connectionSettings(); dest != "" {
		return dest
	}
	return "192.0.2.3:80" // PT1-4
}

// connects ends the case for a transport that does not connect to where its parent
// says: its servers are found in another way.
func (t *trial) connects() {
	if t.suite.subject.Free {
		return
	}
	if _, dest := t.connectionSettings(); dest == "" {
		t.cannot("the transport does not connect to an address of its parent's; if it does, set Subject.Free")
	}
}

// password is the method of RFC 1929, which carries arguments (PT1-3).
const password byte = 2

// telling is the method that carries settings in the subject's dialect.
func (t *trial) telling() byte {
	switch t.suite.subject.Dialect {
	case PT1:
		return password
	case PT2:
		return lengthOnly
	}
	return settings
}

// managedUsual is how the subject's settings are sent to a managed transport.
func (t *trial) managedUsual() framing {
	rest, _ := t.connectionSettings()
	if len(rest) == 0 {
		return framing{method: none}
	}
	if t.suite.subject.Dialect == PT2 {
		text, err := json.Marshal(rest)
		t.need(err)
		return framing{lengthOnly, lengthForm(string(text))}
	}
	return t.arguments(t.encoded(rest))
}

// arguments is a login with the text of arguments.
func (t *trial) arguments(text string) framing {
	username, secret, err := ptwire.Credentials(text)
	t.need(err)
	return framing{password, login(username, secret)}
}

// login is a request of RFC 1929.
func login(username, secret string) []byte {
	b := append([]byte{1, byte(len(username))}, username...)
	return append(append(b, byte(len(secret))), secret...)
}

// encoded are settings as arguments.
func (t *trial) encoded(rest map[string]json.RawMessage) string {
	text, err := json.Marshal(rest)
	t.need(err)
	args, err := settingsArgs(text)
	t.need(err)
	encoded, err := args.Encode()
	t.need(err)
	return encoded
}

// settingsArgs are settings as arguments: strings, numbers and booleans, and lists of them.
func settingsArgs(o ptipc.Opaque) (ptwire.Args, error) {
	var all map[string]json.RawMessage
	if err := json.Unmarshal([]byte(object(o)), &all); err != nil {
		return nil, err
	}
	var args ptwire.Args
	for _, key := range slices.Sorted(maps.Keys(all)) {
		list := []json.RawMessage{all[key]}
		if all[key][0] == '[' {
			if err := json.Unmarshal(all[key], &list); err != nil {
				return nil, err
			}
		}
		for _, raw := range list {
			value := string(raw)
			switch raw[0] {
			case '{', '[', 'n':
				return nil, fmt.Errorf("the setting %q cannot be handed to a managed transport; write a string, a number, true or false, or a list of these", key)
			case '"':
				if err := json.Unmarshal(raw, &value); err != nil {
					return nil, err
				}
			}
			args = append(args, ptwire.Arg{Key: key, Value: value})
		}
	}
	return args, nil
}

// clientOf is the configuration of a generated server's clients: its address and what
// it announces for them (PT1-13).
func (t *trial) clientOf(server *child) string {
	var pair managedPair
	t.need(json.Unmarshal(t.suite.subject.Generate, &pair))
	m := t.method(server)
	host, port, err := net.SplitHostPort(m.addr)
	t.need(err)
	if ip := net.ParseIP(host); ip != nil && ip.IsUnspecified() {
		host = "127.0.0.1"
	}
	if pair.Host != "" {
		host = pair.Host
	}
	own := map[string]any{"host": host, "port": port}
	for key, values := range announcedArgs(m.args) {
		if key == "host" || key == "port" {
			continue
		}
		own[key] = values
		if len(values) == 1 {
			own[key] = values[0]
		}
	}
	text, err := json.Marshal(map[string]any{"transports": map[string]any{pair.Transport: own}})
	t.need(err)
	return string(text)
}

// announcedArgs are the ARGS of a line, however well they are escaped: other cases are
// about that.
func announcedArgs(args string) map[string][]string {
	all := map[string][]string{}
	var key, part strings.Builder
	into := &key
	end := func() {
		if key.Len() > 0 {
			all[key.String()] = append(all[key.String()], part.String())
		}
		key.Reset()
		part.Reset()
		into = &key
	}
	escaped := false
	for _, c := range args {
		switch {
		case escaped:
			into.WriteRune(c)
			escaped = false
		case c == '\\':
			escaped = true
		case c == ',':
			end()
		case c == '=' && into == &key:
			into = &part
		default:
			into.WriteRune(c)
		}
	}
	end()
	return all
}

// managedServer is the configuration of a server, given or generated.
func (s *suite) managedServer() (string, error) {
	if len(s.subject.Generate) == 0 {
		return string(s.subject.Config), nil
	}
	var pair managedPair
	if err := json.Unmarshal(s.subject.Generate, &pair); err != nil {
		return "", err
	}
	config := map[string]any{}
	listener := managedListener{Listen: pair.Listen}
	if s.subject.Dialect == PT2 {
		config["options"] = pair.Options
	} else {
		listener.Options = pair.Options
	}
	config["transports"] = map[string]any{pair.Transport: listener}
	text, err := json.Marshal(config)
	return string(text), err
}

// withoutOrders are the variables of this process that are for children.
func withoutOrders(environ []string) []string {
	return slices.DeleteFunc(slices.Clone(environ), func(variable string) bool { return strings.HasPrefix(variable, ptwire.Prefix) })
}
