// Package config reads the tool's configuration file, HOST.json, whose JSON
// Schema is spec/host.schema.json.
//
//	file, err := config.Load("host.json")
//	for name, transport := range file.Transports {
//		fmt.Println(name, transport.Exec)
//	}
package config

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"time"

	"pthost/ptipc"
	"pthost/ptipc/egress"
)

// maxSize bounds the file. A configuration is kilobytes; more is a mistake.
const maxSize = 4 << 20

// A File is the whole of HOST.json.
type File struct {
	Transports map[string]Transport `json:"transports"`
	Fronts     []Front              `json:"fronts,omitempty"`
	Control    string               `json:"control,omitempty"` // unix:///PATH of the control socket; "" is the default one
	Metrics    string               `json:"metrics,omitempty"` // tcp://IP:PORT or unix:///PATH, where Prometheus asks
}

// A Transport is a child to start, or one that runs already.
type Transport struct {
	Exec   string       `json:"exec,omitempty"`   // a path, a name in PATH, or builtin:NAME
	Args   []string     `json:"args,omitempty"`   // the executable's own, before ROLE
	Role   string       `json:"role,omitempty"`   // client or server
	Config ptipc.Opaque `json:"config,omitempty"` // handed to the child as it stands
	State  string       `json:"state,omitempty"`  // state directory; "" is a temporary one

	Dialect   string          `json:"dialect,omitempty"`    // what the child speaks: one of Dialects; "" is the project's own protocol
	ConfigVia string          `json:"config_via,omitempty"` // stdin or argv
	Plain     bool            `json:"plain,omitempty"`      // takes neither HOST nor "-" (ARG-6)
	Bound     map[string]bool `json:"bound,omitempty"`      // overrides what the child announces
	Proxy     string          `json:"proxy,omitempty"`      // upstream proxy (PROXY-3)
	User      string          `json:"user,omitempty"`       // user to run as, by name or number

	Sandbox Sandbox `json:"sandbox,omitzero"` // what it may use of the file system
	Limits  Limits  `json:"limits,omitzero"`  // and of the machine

	Restart      Restart  `json:"restart,omitempty"`
	StartTimeout Duration `json:"start_timeout,omitempty"`
	StopTimeout  Duration `json:"stop_timeout,omitempty"`

	Via           []string       `json:"via,omitempty"`            // of a server: free
	Egress        *egress.Policy `json:"egress,omitempty"`         // where a server that was made free may dial
	Deliver       string         `json:"deliver,omitempty"`        // of a server: where its connections go
	ProxyProtocol bool           `json:"proxy_protocol,omitempty"` // with a PROXY protocol header in front

	Signals Signals `json:"signals,omitzero"` // how messages to the other side are carried; by default in a queue

	Attach map[string]string `json:"attach,omitempty"` // connection factory name to address, in place of Exec
}

// Restart says what happens when a child ends by itself (LIFE-6).
type Restart struct {
	Policy      string   `json:"policy,omitempty"`        // always (the default) or never
	Min         Duration `json:"min,omitempty"`           // the first wait
	Max         Duration `json:"max,omitempty"`           // the longest
	GiveUpAfter int      `json:"give_up_after,omitempty"` // failures in a row
}

// A Front is where ordinary programs connect.
type Front struct {
	Listen     string       `json:"listen"`               // tcp://IP:PORT, unix:///PATH or, for datagrams, udp://IP:PORT
	Serve      string       `json:"serve"`                // socks5 or forward
	Transport  string       `json:"transport,omitempty"`  // a key of transports
	Via        []string     `json:"via,omitempty"`        // in its place: adapters, the last entry a key of transports
	Connection string       `json:"connection,omitempty"` // connection factory name; may be left out when there is one
	Settings   ptipc.Opaque `json:"settings,omitempty"`   // connection settings
	Dest       string       `json:"dest,omitempty"`       // where a forward through a free transport goes
	Idle       Duration     `json:"idle,omitempty"`       // of datagrams: how long a silent session lives
	Sessions   int          `json:"sessions,omitempty"`   // of datagrams: how many there may be
}

// A Duration is written as 500ms, 10s or 2m.
type Duration time.Duration

// durationForm is the part of Go's notation that the schema describes.
var durationForm = regexp.MustCompile(`^([0-9]+(\.[0-9]+)?(ns|us|µs|ms|s|m|h))+$`)

// UnmarshalText reads Go's notation of durations; they have to be positive.
func (d *Duration) UnmarshalText(text []byte) error {
	v, err := time.ParseDuration(string(text))
	if err != nil || v <= 0 || !durationForm.Match(text) {
		return errors.New("is not a duration: write a number and a unit, such as 500ms, 10s or 2m")
	}
	*d = Duration(v)
	return nil
}

// Read reads a file of JSON, which is kilobytes: a larger one is a mistake.
func Read(path string) (ptipc.Opaque, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", err, ptipc.ExitNoInput)
	}
	if info.Size() > maxSize {
		return nil, fmt.Errorf("%s is larger than %d bytes: %w", path, maxSize, ptipc.ExitDataErr)
	}
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", err, ptipc.ExitNoInput)
	}
	return text, nil
}

// Load reads and checks a file. Paths in it are relative to its directory. The
// error names the file, the JSON pointer, the value and the remedy.
func Load(path string) (*File, error) {
	text, err := Read(path)
	if err != nil {
		return nil, err
	}
	file, err := Parse(text)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	base, err := filepath.Abs(filepath.Dir(path))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	file.resolve(base)
	return file, nil
}

// Parse reads and checks a document.
func Parse(text []byte) (*File, error) {
	var file File
	if err := ptipc.Opaque(text).Decode(&file); err != nil {
		return nil, err
	}
	return &file, nil
}

// resolve makes the paths absolute. A name without a slash is looked up in PATH.
func (f *File) resolve(base string) {
	for name, t := range f.Transports {
		if strings.ContainsRune(t.Exec, '/') && !filepath.IsAbs(t.Exec) {
			t.Exec = filepath.Join(base, t.Exec)
		}
		if t.State != "" && !filepath.IsAbs(t.State) {
			t.State = filepath.Join(base, t.State)
		}
		t.Signals.resolve(base)
		t.Sandbox.Resolve(base)
		f.Transports[name] = t
	}
	for i := range f.Fronts {
		resolveSocket(&f.Fronts[i].Listen, base)
	}
	resolveSocket(&f.Control, base)
	resolveSocket(&f.Metrics, base)
}

var transportName = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_-]{0,63}$`)

// Validate checks what one key says of another.
func (f *File) Validate() error {
	if len(f.Transports) == 0 {
		return &ptipc.ConfigError{Pointer: "/transports", Value: "{}", Problem: "names no transport", Remedy: `add one, such as "direct": {"exec": "builtin:direct"}`}
	}
	states := map[string]string{}
	for name, t := range f.Transports {
		if !transportName.MatchString(name) {
			return &ptipc.ConfigError{Pointer: "/transports", Value: strconv.Quote(name), Problem: "is not a transport's name", Remedy: "begin with a letter, go on with letters, digits, _ and -, at most 64"}
		}
		if other, ok := states[t.State]; ok && t.State != "" {
			return &ptipc.ConfigError{
				Pointer: "/transports/" + max(name, other) + "/state", Value: strconv.Quote(t.State),
				Problem: "is the state directory of " + min(name, other) + " as well", Remedy: "give each transport a directory of its own",
			}
		}
		states[t.State] = name
	}
	listens := map[string]bool{}
	for i, front := range f.Fronts {
		at := "/fronts/" + strconv.Itoa(i)
		name, where := front.Through(), at+"/transport"
		if len(front.Via) > 0 {
			where = at + "/via/" + strconv.Itoa(len(front.Via)-1)
		}
		if t, ok := f.Transports[name]; ok && t.Role == "server" {
			return &ptipc.ConfigError{Pointer: where, Value: strconv.Quote(name), Problem: "is a server, through which nothing can be sent", Remedy: "name a client"}
		} else if !ok {
			return &ptipc.ConfigError{Pointer: where, Value: strconv.Quote(name), Problem: "is not one of the transports", Remedy: "name a key of /transports"}
		}
		if listens[front.Listen] && !strings.HasSuffix(front.Listen, ":0") {
			return &ptipc.ConfigError{Pointer: at + "/listen", Value: strconv.Quote(front.Listen), Problem: "is taken by a front above", Remedy: "give each front an address of its own"}
		}
		listens[front.Listen] = true
	}
	return f.validateOperator(listens)
}

func oneOf(pointer, value string, allowed ...string) error {
	if value == "" {
		return nil
	}
	for _, a := range allowed {
		if value == a {
			return nil
		}
	}
	return &ptipc.ConfigError{Pointer: pointer, Value: strconv.Quote(value), Problem: "is not known", Remedy: "write " + strings.Join(allowed, " or ")}
}

// Dialects are the protocols of children other than the project's own.
var Dialects = []string{"pt1", "pt2", "sip003"}

// validateDialect checks what children of another protocol cannot be given.
func (t *Transport) validateDialect() error {
	if t.Dialect == "" {
		return nil
	}
	wrong := func(pointer, problem, remedy string) error {
		return &ptipc.ConfigError{Pointer: pointer, Problem: problem, Remedy: remedy}
	}
	switch {
	case len(t.Attach) > 0:
		return wrong("/attach", "leads to a child of the project's own protocol", `remove "dialect", or start the child with "exec"`)
	case strings.HasPrefix(t.Exec, "builtin:"):
		return wrong("/dialect", "is not what a builtin transport speaks", "remove it")
	case t.Plain:
		return wrong("/plain", "has no meaning beside a dialect, which has its own way to start a child", "remove it")
	case t.ConfigVia != "":
		return wrong("/config_via", "has no meaning beside a dialect, which has its own way to start a child", "remove it")
	case t.Signals.set():
		return wrong("/signals", "need control lines that children of this dialect do not know", "remove them")
	case t.Dialect == "sip003" && t.Proxy != "":
		return wrong("/proxy", "cannot be handed to a Shadowsocks plugin, whose traffic would go around it", "remove it")
	case t.Role == "server" && t.Proxy != "":
		return wrong("/proxy", "has no meaning for a server of this dialect, which makes no connections of its own", "remove it")
	case t.Role == "server" && t.Deliver == "" && len(t.Via) == 0:
		return wrong("/deliver", "is missing: a server of this dialect hands its connections over", `add it, tcp://HOST:PORT or unix:///PATH, or "via": ["free"]`)
	}
	return nil
}

// Validate checks one transport.
func (t *Transport) Validate() error {
	if (t.Exec == "") == (len(t.Attach) == 0) {
		return &ptipc.ConfigError{Pointer: "/exec", Value: strconv.Quote(t.Exec), Problem: "has to stand alone: a transport is either started or attached to", Remedy: `give either "exec" or "attach"`}
	}
	if err := errors.Join(
		oneOf("/role", t.Role, "client", "server"),
		oneOf("/config_via", t.ConfigVia, "stdin", "argv"),
		oneOf("/dialect", t.Dialect, Dialects...),
		oneOf("/restart/policy", t.Restart.Policy, "always", "never"),
	); err != nil {
		return err
	}
	if t.Plain && t.ConfigVia == "stdin" {
		return &ptipc.ConfigError{Pointer: "/config_via", Value: `"stdin"`, Problem: "cannot be had from a plain child", Remedy: `write "argv", or remove "plain"`}
	}
	if err := t.validateServer(); err != nil {
		return err
	}
	if err := t.validateDialect(); err != nil {
		return err
	}
	if len(t.Attach) > 0 && (t.Sandbox.set() || t.Limits != Limits{}) {
		return &ptipc.ConfigError{Pointer: "/attach", Problem: "is a child that runs already, which cannot be restricted any more", Remedy: `remove "sandbox" and "limits"`}
	}
	if t.Signals.set() && len(t.Attach) > 0 {
		return &ptipc.ConfigError{Pointer: "/signals", Problem: "need control lines, which a child that runs already does not have here", Remedy: `remove them, or start the child with "exec"`}
	}
	if t.Plain && t.Proxy != "" {
		return &ptipc.ConfigError{Pointer: "/proxy", Value: "***", Problem: "cannot be handed to a plain child", Remedy: `remove "plain", or the proxy`}
	}
	if t.Proxy != "" && !strings.HasPrefix(t.Proxy, "socks5://") {
		return &ptipc.ConfigError{Pointer: "/proxy", Value: "***", Problem: "is not a proxy that can be used", Remedy: "write socks5://[USER:PASSWORD@]HOST:PORT"}
	}
	if t.Restart.Min > t.Restart.Max && t.Restart.Max != 0 {
		return &ptipc.ConfigError{Pointer: "/restart/min", Value: strconv.Quote(time.Duration(t.Restart.Min).String()), Problem: "is longer than max", Remedy: "give min the shorter one"}
	}
	if t.Restart.GiveUpAfter < 0 {
		return &ptipc.ConfigError{Pointer: "/restart/give_up_after", Value: strconv.Itoa(t.Restart.GiveUpAfter), Problem: "is negative", Remedy: "give the number of failures in a row"}
	}
	return nil
}

// validateServer checks what belongs to the role server.
func (t *Transport) validateServer() error {
	if t.Role != "server" {
		if len(t.Via) > 0 {
			return &ptipc.ConfigError{Pointer: "/via", Problem: "belongs to a server here", Remedy: "name the adapters of a client in the via of a front"}
		}
		if t.Egress != nil {
			return &ptipc.ConfigError{Pointer: "/egress", Problem: "belongs to a server", Remedy: `remove it, or write "role": "server" and "via": ["free"]`}
		}
		if t.Deliver != "" {
			return &ptipc.ConfigError{Pointer: "/deliver", Value: strconv.Quote(t.Deliver), Problem: "belongs to a server", Remedy: `remove it, or write "role": "server"`}
		}
		if t.ProxyProtocol {
			return &ptipc.ConfigError{Pointer: "/proxy_protocol", Value: "true", Problem: "belongs to a server that delivers", Remedy: "remove it"}
		}
		return nil
	}
	if len(t.Attach) > 0 {
		return &ptipc.ConfigError{Pointer: "/attach", Problem: "cannot be done to a server", Remedy: `start it with "exec"`}
	}
	for i, name := range t.Via {
		if name != "free" || i > 0 {
			return &ptipc.ConfigError{Pointer: "/via/" + strconv.Itoa(i), Value: strconv.Quote(name), Problem: "cannot be put on a server", Remedy: `write ["free"], once, for a server that connects its clients to where they want to go`}
		}
	}
	if len(t.Via) > 0 && t.Deliver != "" {
		return &ptipc.ConfigError{Pointer: "/deliver", Value: strconv.Quote(t.Deliver), Problem: "has no meaning for a free server, which connects its clients itself", Remedy: "remove it, or via"}
	}
	if t.Egress != nil && len(t.Via) == 0 {
		return &ptipc.ConfigError{Pointer: "/egress", Problem: "has no meaning for a server that is not free", Remedy: `add "via": ["free"]`}
	}
	if t.ProxyProtocol && t.Deliver == "" {
		return &ptipc.ConfigError{Pointer: "/proxy_protocol", Value: "true", Problem: "has no service to go to", Remedy: `add "deliver"`}
	}
	if t.Deliver == "" {
		return nil
	}
	scheme, rest, _ := strings.Cut(t.Deliver, "://")
	_, port, err := net.SplitHostPort(rest)
	if scheme == "unix" && strings.HasPrefix(rest, "/") || scheme == "tcp" && err == nil && port != "" && port != "0" {
		return nil
	}
	return &ptipc.ConfigError{Pointer: "/deliver", Value: strconv.Quote(t.Deliver), Problem: "is not a service to deliver to", Remedy: "write tcp://HOST:PORT or unix:///PATH"}
}

// Through is the transport that the front uses.
func (f *Front) Through() string {
	if len(f.Via) > 0 {
		return f.Via[len(f.Via)-1]
	}
	return f.Transport
}

// Adapters are what stands between the front and its transport, the outermost first.
func (f *Front) Adapters() []string {
	if len(f.Via) == 0 {
		return nil
	}
	return f.Via[:len(f.Via)-1]
}

// BoundPrefix marks the adapter that fixes a destination: bound:HOST:PORT.
const BoundPrefix = "bound:"

// validateVia refuses paths that make no sense: what each adapter takes and makes is
// known without the transport at their end.
func (f *Front) validateVia() error {
	switch {
	case f.Transport == "" && len(f.Via) == 0:
		return &ptipc.ConfigError{Pointer: "/transport", Problem: "is missing", Remedy: "name a key of /transports, or a path of adapters to one in /via"}
	case f.Transport != "" && len(f.Via) > 0:
		return &ptipc.ConfigError{Pointer: "/via", Problem: "stands beside transport", Remedy: "keep one of the two; the last entry of via names the transport"}
	}
	above := "" // what the adapter above makes of what is below it
	for i, name := range f.Adapters() {
		at := "/via/" + strconv.Itoa(i)
		dest, isBound := strings.CutPrefix(name, BoundPrefix)
		kind := "bound"
		switch {
		case isBound && !destination(dest):
			return &ptipc.ConfigError{Pointer: at, Value: strconv.Quote(name), Problem: "has no destination", Remedy: "write bound:HOST:PORT"}
		case !isBound && name != "free" && name != "mux":
			return &ptipc.ConfigError{Pointer: at, Value: strconv.Quote(name), Problem: "is not an adapter", Remedy: "write free, mux or bound:HOST:PORT; the transport comes last"}
		case !isBound:
			kind = "free"
		}
		if kind == above {
			return &ptipc.ConfigError{Pointer: at, Value: strconv.Quote(name), Problem: "comes under its own kind: what it makes is " + kind + " already, and the one above needs the other", Remedy: "remove one of the two"}
		}
		if i == 0 && isBound && f.Serve == "socks5" {
			return &ptipc.ConfigError{Pointer: at, Value: strconv.Quote(name), Problem: "leaves a SOCKS5 proxy nothing to choose: its clients name their destinations", Remedy: `put "free" above it, or write "serve": "forward"`}
		}
		above = kind
	}
	return nil
}

func destination(text string) bool {
	host, port, err := net.SplitHostPort(text)
	n, perr := strconv.ParseUint(port, 10, 16)
	return err == nil && perr == nil && host != "" && n != 0
}

// Validate checks one front.
func (f *Front) Validate() error {
	if err := f.validateVia(); err != nil {
		return err
	}
	if f.Serve == "" {
		return &ptipc.ConfigError{Pointer: "/serve", Value: `""`, Problem: "is empty", Remedy: "write socks5 or forward"}
	}
	if err := oneOf("/serve", f.Serve, "socks5", "forward"); err != nil {
		return err
	}
	if f.Serve == "socks5" && f.Dest != "" {
		return &ptipc.ConfigError{Pointer: "/dest", Value: strconv.Quote(f.Dest), Problem: "has no meaning for a SOCKS5 proxy, whose clients name their destinations", Remedy: `remove it, or write "serve": "forward"`}
	}
	if f.Packets() {
		return f.validatePackets()
	}
	if f.Idle != 0 || f.Sessions != 0 {
		at := "/idle"
		if f.Idle == 0 {
			at = "/sessions"
		}
		return &ptipc.ConfigError{Pointer: at, Problem: "belongs to a front for datagrams", Remedy: "remove it, or listen on udp://127.0.0.1:PORT"}
	}
	if f.Dest != "" {
		if !destination(f.Dest) {
			return &ptipc.ConfigError{Pointer: "/dest", Value: strconv.Quote(f.Dest), Problem: "is not a destination", Remedy: "write HOST:PORT"}
		}
	}
	return f.validateListen()
}

// Packets reports whether the front is for datagrams.
func (f *Front) Packets() bool { return strings.HasPrefix(f.Listen, "udp://") }

// validatePackets checks what a front for datagrams may have (PKT-9).
func (f *Front) validatePackets() error {
	if f.Serve != "forward" {
		return &ptipc.ConfigError{Pointer: "/serve", Value: strconv.Quote(f.Serve), Problem: "cannot be had over datagrams", Remedy: `write "serve": "forward"; a socks5 front on tcp:// takes datagrams by UDP ASSOCIATE`}
	}
	if len(f.Via) > 0 {
		return &ptipc.ConfigError{Pointer: "/via", Problem: "carries streams, and this front has datagrams", Remedy: `name the transport with "transport"`}
	}
	if !f.Settings.Empty() {
		return &ptipc.ConfigError{Pointer: "/settings", Problem: "belong to streams, and this front has datagrams", Remedy: "remove them"}
	}
	if dest, err := netip.ParseAddrPort(f.Dest); err != nil || dest.Port() == 0 || dest.Addr().IsUnspecified() { // PKT-1
		return &ptipc.ConfigError{Pointer: "/dest", Value: strconv.Quote(f.Dest), Problem: "is not an address for datagrams, which are never sent to names", Remedy: "write IP:PORT"}
	}
	if f.Sessions < 0 {
		return &ptipc.ConfigError{Pointer: "/sessions", Value: strconv.Itoa(f.Sessions), Problem: "is negative", Remedy: "give the number of sessions that there may be"}
	}
	return f.validateListen()
}

func (f *Front) validateListen() error {
	bad := &ptipc.ConfigError{Pointer: "/listen", Value: strconv.Quote(f.Listen), Problem: "is not an address to listen on", Remedy: "write tcp://127.0.0.1:PORT, udp://127.0.0.1:PORT or unix:///PATH"}
	scheme, rest, _ := strings.Cut(f.Listen, "://")
	switch scheme {
	case "tcp", "udp":
		addr, err := netip.ParseAddrPort(rest)
		if err != nil {
			return bad
		}
		if addr.Addr().Is4In6() || addr.Addr().Zone() != "" || addr.String() != rest {
			return bad
		}
		if !addr.Addr().IsLoopback() {
			bad.Problem, bad.Remedy = "can be reached from other machines", "listen on 127.0.0.1 or [::1]"
			return bad
		}
		return nil
	case "unix":
		if rest == "" || strings.HasSuffix(rest, "/") || strings.ContainsAny(rest, "\x00\n\r") {
			return bad
		}
		return nil
	}
	return bad
}
