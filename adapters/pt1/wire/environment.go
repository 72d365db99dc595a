package wire

import (
	"errors"
	"fmt"
	"net/netip"
	"net/url"
	"slices"
	"strings"

	"pthost/ptipc/stdio"
)

// Version is the version of managed transports that this package speaks.
const Version = "1"

// Environment is what a managed transport is told by its environment (PT1-1). Either
// Clients or Servers is set, not both.
type Environment struct {
	Versions         []string // those that the host speaks; nil is Version alone
	State            string   // the directory for long-term storage
	ExitOnStdinClose bool     // the end of standard input ends the transport
	BindV4, BindV6   netip.Addr

	// Of a client:
	Clients []string // names of the transports
	Proxy   string   // URL of the upstream proxy, a secret; "" for none

	// Of a server:
	Servers      []Server
	Port         string // the ORPort, ip:port, to which connections are brought as they are
	ExtendedPort string // the Extended ORPort, ip:port; "" when there is none
	CookieFile   string // the file of its cookie
}

// A Server is one transport of a server.
type Server struct {
	Name    string
	Bind    netip.AddrPort // where its wire is to listen; the zero value leaves it to the transport
	Options Args
}

// An EnvironmentError says why a transport cannot use its environment.
type EnvironmentError struct {
	Variable string // without its prefix
	Problem  string // never repeats the value, which may be a secret
}

func (e *EnvironmentError) Error() string {
	if e.Variable == varVersion {
		return prefix + varVersion + ": " + e.Problem
	}
	return prefix + e.Variable + ": " + e.Problem + " (PT1-1)"
}

// Line is the control line with which a transport gives up.
func (e *EnvironmentError) Line() stdio.Message {
	switch e.Variable {
	case varVersion:
		return stdio.VersionError{Text: "no-version"}
	case varProxy:
		return stdio.ProxyError{Text: stdio.OneLine(e.Error())}
	}
	return stdio.EnvError{Text: stdio.OneLine(e.Error())}
}

const (
	prefix = "TOR_PT_"

	varVersion      = "MANAGED_TRANSPORT_VER"
	varState        = "STATE_LOCATION"
	varExitOnClose  = "EXIT_ON_STDIN_CLOSE"
	varBindV4       = "OUTBOUND_BIND_ADDRESS_V4"
	varBindV6       = "OUTBOUND_BIND_ADDRESS_V6"
	varClients      = "CLIENT_TRANSPORTS"
	varProxy        = "PROXY"
	varServers      = "SERVER_TRANSPORTS"
	varOptions      = "SERVER_TRANSPORT_OPTIONS"
	varServerBind   = "SERVER_BINDADDR"
	varPort         = "ORPORT"
	varExtendedPort = "EXTENDED_SERVER_PORT"
	varCookieFile   = "AUTH_COOKIE_FILE"
)

// Prefix is what the names of all variables of a managed transport begin with. A host
// takes those of its own environment away from its children.
const Prefix = prefix

// ValidName reports whether name can name a managed transport: a letter or _, then
// letters, digits and _ (PT1-1).
func ValidName(name string) bool { return stdio.ValidName(name) && !strings.Contains(name, "-") }

// Environ writes the variables as "key=value" (PT1-1), in a fixed order.
func (e *Environment) Environ() ([]string, error) {
	var out []string
	var err error
	set := func(name, value string) {
		if strings.ContainsAny(value, "\x00\n") {
			err = errors.Join(err, fmt.Errorf("%s%s would hold a NUL or LF", prefix, name))
		}
		out = append(out, prefix+name+"="+value)
	}
	name := func(name string) {
		if !ValidName(name) {
			err = errors.Join(err, fmt.Errorf("%q is not the name of a managed transport; begin with a letter or _, go on with letters, digits and _ (PT1-1)", name))
		}
	}
	if (len(e.Clients) == 0) == (len(e.Servers) == 0) {
		return nil, errors.New("a managed transport is either a client or a server, with at least one name (PT1-1)")
	}
	versions := e.Versions
	if len(versions) == 0 {
		versions = []string{Version}
	}
	set(varVersion, strings.Join(versions, ","))
	set(varState, e.State)
	if e.ExitOnStdinClose {
		set(varExitOnClose, "1")
	}
	if e.BindV4.IsValid() {
		set(varBindV4, e.BindV4.String())
	}
	if e.BindV6.IsValid() {
		set(varBindV6, "["+e.BindV6.String()+"]")
	}
	for _, client := range e.Clients {
		name(client)
	}
	if len(e.Clients) > 0 {
		set(varClients, strings.Join(e.Clients, ","))
		if e.Proxy != "" {
			set(varProxy, e.Proxy)
		}
		return out, err
	}
	var names, binds []string
	for _, s := range e.Servers {
		name(s.Name)
		names = append(names, s.Name)
		if s.Bind.IsValid() {
			binds = append(binds, s.Name+"-"+s.Bind.String())
		}
	}
	set(varServers, strings.Join(names, ","))
	options, oerr := encodeOptions(e.Servers)
	if options != "" {
		set(varOptions, options)
	}
	if len(binds) > 0 {
		set(varServerBind, strings.Join(binds, ","))
	}
	if e.Port != "" {
		set(varPort, e.Port)
	}
	set(varExtendedPort, e.ExtendedPort) // empty says that there is none
	if e.CookieFile != "" {
		set(varCookieFile, e.CookieFile)
	}
	return out, errors.Join(err, oerr)
}

// optionEscaper takes away the meaning of what has one in either reader of options:
// between transport and key, key and value, and options.
var optionEscaper = strings.NewReplacer(`\`, `\\`, `:`, `\:`, `;`, `\;`, `=`, `\=`)

func encodeOptions(servers []Server) (string, error) {
	var items []string
	for _, s := range servers {
		for _, o := range s.Options {
			if o.Key == "" {
				return "", fmt.Errorf("an option of %s: %w", s.Name, errEmptyKey)
			}
			items = append(items, s.Name+":"+optionEscaper.Replace(o.Key)+"="+optionEscaper.Replace(o.Value))
		}
	}
	return strings.Join(items, ";"), nil
}

// ParseOptions reads name:k=v;name:k=v, the options of servers by their names (PT1-1).
func ParseOptions(s string) (map[string]Args, error) {
	options := map[string]Args{}
	for more := s != ""; more; {
		name, rest, found, err := cut(s, ":=;", ':')
		if err != nil {
			return nil, err
		}
		if !found || name == "" {
			return nil, errors.New("an option has no transport; name:key=value is wanted")
		}
		key, rest, found, err := cut(rest, "=;", '=')
		if err != nil {
			return nil, err
		}
		if !found || key == "" {
			return nil, fmt.Errorf("an option of %.64q has no key; name:key=value is wanted", name)
		}
		var value string
		if value, s, more, err = cut(rest, ";", ';'); err != nil {
			return nil, err
		}
		options[name] = append(options[name], Arg{key, value})
	}
	return options, nil
}

// ParseEnvironment reads the variables, as [os.LookupEnv] gives them. The error is an
// [*EnvironmentError].
func ParseEnvironment(lookup func(string) (string, bool)) (*Environment, error) {
	e := &Environment{}
	get := func(name string) string { value, _ := lookup(prefix + name); return value }
	fail := func(variable, format string, args ...any) (*Environment, error) {
		return nil, &EnvironmentError{variable, fmt.Sprintf(format, args...)}
	}
	versions := get(varVersion)
	if e.Versions = strings.Split(versions, ","); !slices.Contains(e.Versions, Version) {
		if versions == "" {
			return fail(varVersion, "is not set: this program is started by tor, or another host of managed transports")
		}
		return fail(varVersion, "offers %.64q, and version %s is spoken here", versions, Version)
	}
	e.State = get(varState)
	if e.State == "" {
		return fail(varState, "is not set")
	}
	e.ExitOnStdinClose = get(varExitOnClose) == "1"
	var err error
	if e.BindV4, err = parseBind(get(varBindV4)); err != nil || e.BindV4.IsValid() && !e.BindV4.Is4() {
		return fail(varBindV4, "is not an address of IPv4")
	}
	if e.BindV6, err = parseBind(get(varBindV6)); err != nil || e.BindV6.IsValid() && !e.BindV6.Is6() {
		return fail(varBindV6, "is not an address of IPv6 in brackets")
	}
	clients, servers := get(varClients), get(varServers)
	switch {
	case clients != "" && servers != "":
		return fail(varServers, "is set beside %s%s", prefix, varClients)
	case servers != "":
		if problem := e.parseServers(servers, get); problem != nil {
			return nil, problem
		}
	case clients != "":
		e.Clients = namesIn(clients)
		e.Proxy = get(varProxy)
		if e.Proxy == "" {
			break
		}
		if u, err := url.Parse(e.Proxy); err != nil || u.Scheme == "" || u.Host == "" {
			return fail(varProxy, "is not scheme://[user:password@]host:port")
		}
	default:
		return fail(varClients, "is not set, and neither is %s%s", prefix, varServers)
	}
	return e, nil
}

// namesIn are the names of a list, each once: one that comes again asks for nothing new.
func namesIn(list string) []string {
	var names []string
	for name := range strings.SplitSeq(list, ",") {
		if !slices.Contains(names, name) {
			names = append(names, name)
		}
	}
	return names
}

// parseBind takes brackets away, which tor has not always written.
func parseBind(s string) (netip.Addr, error) {
	if s == "" {
		return netip.Addr{}, nil
	}
	if inner, ok := strings.CutPrefix(s, "["); ok {
		s = strings.TrimSuffix(inner, "]")
	}
	return netip.ParseAddr(s)
}

func (e *Environment) parseServers(names string, get func(string) string) *EnvironmentError {
	fail := func(variable, format string, args ...any) *EnvironmentError {
		return &EnvironmentError{variable, fmt.Sprintf(format, args...)}
	}
	options, err := ParseOptions(get(varOptions))
	if err != nil {
		return fail(varOptions, "%v", err)
	}
	binds := map[string]netip.AddrPort{}
	for item := range strings.SplitSeq(get(varServerBind), ",") {
		if item == "" {
			continue
		}
		name, text, _ := strings.Cut(item, "-")
		addr, err := netip.ParseAddrPort(text)
		if err != nil {
			return fail(varServerBind, "%.64q is not name-ip:port", item)
		}
		if _, twice := binds[name]; twice {
			return fail(varServerBind, "has two addresses for %.64q", name)
		}
		binds[name] = addr
	}
	for _, name := range namesIn(names) {
		e.Servers = append(e.Servers, Server{Name: name, Bind: binds[name], Options: options[name]})
	}
	e.Port, e.ExtendedPort, e.CookieFile = get(varPort), get(varExtendedPort), get(varCookieFile)
	for _, port := range []struct{ variable, addr string }{{varPort, e.Port}, {varExtendedPort, e.ExtendedPort}} {
		if _, err := netip.ParseAddrPort(port.addr); err != nil && port.addr != "" {
			return fail(port.variable, "%.64q is not ip:port", port.addr)
		}
	}
	switch {
	case e.ExtendedPort != "" && e.CookieFile == "":
		return fail(varCookieFile, "is not set, and %s%s is", prefix, varExtendedPort)
	case e.ExtendedPort == "" && e.Port == "":
		return fail(varPort, "is not set, and neither is %s%s: connections have nowhere to go", prefix, varExtendedPort)
	}
	return nil
}
