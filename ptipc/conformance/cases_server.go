package conformance

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"regexp"
	"slices"
	"strings"
	"time"

	"pthost/ptipc/localnet"
)

const roleServer = "server"

// deliverName is the host's socket in the state directory (SRV-3).
const deliverName = "deliver.sock"

func mustServer(name string, run func(*trial)) Case {
	c := must(name, run)
	c.Role = roleServer
	return c
}

// serverCases are about the roles server and generate. The suite is the host, and a
// client of the wire.
var serverCases = []Case{
	mustServer("SRV-1/announced", func(t *trial) {
		form := regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_-]{0,63} [^ ]+( ARGS:[^ ]+)?$`)
		s := t.serve()
		for _, line := range s.with("SMETHOD") {
			if !form.MatchString(line) {
				t.fell("SMETHOD NAME ADDR, and ARGS: or nothing", "SMETHOD %s", line)
			}
		}
		if addr, err := netip.ParseAddrPort(s.method.addr); err != nil || addr.Port() == 0 {
			t.fell("ip:port as the address of the wire", "%s", s.method.addr)
		}
		conn, err := (&net.Dialer{}).DialContext(t.ctx, "tcp", s.method.addr)
		if err != nil {
			t.fell("a wire that listens by the time of SMETHODS DONE", "%v", err)
		}
		conn.Close()
	}),
	mustServer("SRV-1/error", func(t *trial) {
		config := strings.TrimSuffix(strings.TrimSpace(t.pair().server), "}")
		comma := ","
		if strings.TrimSpace(config) == "{" {
			comma = ""
		}
		c := t.startServer(fmt.Sprintf(`%s%s%q:"x"}`, config, comma, grease()), map[string]any{"deliver": "unix:" + deliverName})
		t.until(func() bool { return c.ended() || c.serving() })
		if c.serving() {
			t.cannot("the child takes keys that it does not know, and the suite knows no other fault of a configuration (CFG-2)")
		}
		t.exit(c, "for a configuration with a key that the child does not know", 78)
		if len(c.with("SMETHOD-ERROR")) == 0 && len(c.stderr()) == 0 {
			t.fell("an SMETHOD-ERROR line, or a word on standard error", "neither")
		}
	}),
	mustServer("SRV-2/args", func(t *trial) {
		pairs := regexp.MustCompile(`^(?:(?:[^ \\,=]|\\[\\,=])+=(?:[^ \\,=]|\\[\\,=])*(?:,|$))*$`)
		args := t.serve().method.args
		if !pairs.MatchString(args) || strings.HasSuffix(args, ",") {
			t.fell(`K=V pairs with commas between them, and \ before \ , and = alone`, "%q", args)
		}
		for pair := range strings.SplitSeq(args, ",") {
			if k, v, _ := strings.Cut(pair, "="); (k == "proxy" || k == "stats") && v != "1" {
				t.fell(k+"=1", "%s", pair)
			}
		}
	}),
	mustServer("SRV-3/delivers", func(t *trial) {
		s := t.serve()
		client := s.dial()
		host := s.accepted()
		told := host.handshake()
		if told["transport"] != s.method.name {
			t.fell(fmt.Sprintf("the transport %q in the settings", s.method.name), "%v", told["transport"])
		}
		remote, _ := told["remote"].(string)
		addr, err := netip.ParseAddrPort(remote)
		if err != nil || s.plainWire() && addr.String() != client.conn.LocalAddr().String() {
			t.fell("the address of the wire's client as remote", "%q", remote)
		}
		host.answer(granted)
		client.send([]byte("question"))
		host.bytes([]byte("question"), "what the wire's client has sent")
		host.send([]byte("answer"))
		client.bytes([]byte("answer"), "what the host has sent")
	}),
	mustServer("SRV-3/nothing-before-the-reply", func(t *trial) {
		s := t.serve()
		client := s.dial()
		host := s.accepted()
		host.handshake()
		client.send([]byte("early"))
		if b, err := host.try(1, quiet); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.fell("nothing before the host's reply", "% x, %v", b, err)
		}
		host.answer(granted)
		host.bytes([]byte("early"), "what the wire's client has sent, after the reply")
	}),
	mustServer("SRV-3/refused", func(t *trial) {
		s := t.serve()
		client := s.dial()
		host := s.accepted()
		host.handshake()
		host.answer(notAllowed)
		if b, err := client.try(1, t.suite.patience); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
			t.fell("the end of the wire's connection, which the host has refused", "% x, %v", b, err)
		}
	}),
	mustServer("SRV-3/no-deliver", func(t *trial) {
		c := t.startServer(t.pair().server, nil)
		t.until(func() bool { return c.ended() || c.serving() })
		if m := c.serverMethods(); c.serving() && len(m) > 0 && m[0].proxies() {
			t.cannot("the server connects its clients itself")
		}
		t.exit(c, "without deliver", 64)
	}),
	mustServer("SRV-3/half-close", func(t *trial) {
		for _, hostFirst := range []bool{false, true} {
			s := t.serve()
			client := s.dial()
			host := s.accepted()
			host.handshake()
			host.answer(granted)
			first, second := client, host.wire
			if hostFirst {
				first, second = second, first
			}
			first.send([]byte("last words"))
			second.bytes([]byte("last words"), "what was sent before the end")
			first.closeWrite()
			second.end("the end of the stream of the " + first.who)
			second.send([]byte("answer"))
			first.bytes([]byte("answer"), "an answer, after the half-close")
			second.closeWrite()
			first.end("the end of the stream of the " + second.who)
		}
	}),
	mustServer("STAT-2/server", func(t *trial) {
		s := t.serve()
		if !s.method.stats() {
			t.cannot("the child does not announce stats=1")
		}
		client, host := s.deliver()
		client.send([]byte("0123456789"))
		host.read(10, "what the wire's client has sent")
		var got counts
		if !t.until(func() bool {
			got = t.counts(t.stats(s.child, ""))
			return got.is("active", 1) && got.is("opened", 1) && got.is("received", 10) && got.is("sent", 0)
		}) {
			t.fell("one connection, active and opened, and ten bytes received", "%v", got)
		}
	}),
	mustServer("LIFE-2/server", func(t *trial) { t.serverFinishes(t.closeStdin, "at the end of standard input") }),
	mustServer("LIFE-3/server", func(t *trial) { t.serverFinishes(t.terminate, "on SIGTERM") }),
	mustServer("SIG-1/ignored", func(t *trial) {
		s := t.serve()
		for _, line := range []string{
			"CMESSAGE", "CMESSAGE ", "CMESSAGE nonsense", "CMESSAGE []", `CMESSAGE {"body":1}`, `CMESSAGE {"body":{},"peer":7}`,
			"CMESSAGE {", "CMESSAGE {\"body\":{\"a\":\"\xff\"}}", `CMESSAGE {"body":{"` + grease() + `":1},"peer":"x"}`,
			`CMESSAGE {"body":{"a":"` + strings.Repeat("x", 40_000) + `"}}`, "CMESSAGE " + strings.Repeat("x", 70_000),
			`SMESSAGE {"body":{}}`, strings.ToUpper(grease()) + " x",
		} {
			t.line(s.child, line)
		}
		if s.method.stats() {
			t.stats(s.child, "") // no line after them is lost
		}
		client, host := s.deliver()
		client.send([]byte("alive"))
		host.bytes([]byte("alive"), "what the wire's client has sent")
	}),
	mustServer("SRV-6/generate", func(t *trial) {
		t.generates()
		t.pair()
	}),
	mustServer("SRV-6/match", func(t *trial) {
		t.generates()
		client, host := t.serve().deliver()
		host.send([]byte("end to end"))
		client.bytes([]byte("end to end"), "what the server's host has sent, at the client")
	}),
}

// quiet is how long nothing may come where nothing should.
const quiet = 100 * time.Millisecond

func (m method) proxies() bool { return strings.Contains(","+m.args+",", ",proxy=1,") }

var smethod = regexp.MustCompile(`^(\S+) (\S+)(?: ARGS:(.*))?$`)

func (c *child) serverMethods() []method {
	var methods []method
	for _, line := range c.with("SMETHOD") {
		if m := smethod.FindStringSubmatch(line); m != nil {
			methods = append(methods, method{name: m[1], addr: m[2], args: m[3]})
		}
	}
	return methods
}

// serving reports whether a server is ready.
func (c *child) serving() bool { return slices.Contains(c.with("SMETHODS"), "DONE") }

// generates ends the case for a child of which no options are known.
func (t *trial) generates() {
	if len(t.suite.subject.Generate) == 0 {
		t.cannot("no options for the role generate are known; set Subject.Generate")
	}
}

// A configPair is a configuration for each side.
type configPair struct{ client, server string }

// pair is what the child generates, or the subject's configuration for a server.
func (t *trial) pair() configPair {
	if len(t.suite.subject.Generate) == 0 {
		return configPair{server: t.suite.config()}
	}
	c := t.start(launch{args: []string{"generate", string(t.suite.subject.Generate)}})
	t.exit(c, "after generate", 0)
	var pair struct{ Client, Server map[string]any }
	lines := c.lines()
	if len(lines) != 1 || lines[0].cut || json.Unmarshal([]byte(lines[0].text), &pair) != nil || pair.Client == nil || pair.Server == nil {
		t.fell(`the line {"client":{…},"server":{…}} and nothing else`, "%d lines", len(lines))
	}
	for side, config := range map[string]any{"client": pair.Client, "server": pair.Server} {
		if portZero(config) {
			t.fell("no port 0 in the configuration of the "+side, "%v", config)
		}
	}
	client, err := json.Marshal(pair.Client)
	t.need(err)
	server, err := json.Marshal(pair.Server)
	t.need(err)
	return configPair{string(client), string(server)}
}

// portZero looks for a port 0 in a value of JSON.
func portZero(value any) bool {
	switch v := value.(type) {
	case map[string]any:
		for key, member := range v {
			if strings.HasSuffix(key, "port") && member == 0.0 || portZero(member) {
				return true
			}
		}
	case []any:
		return slices.ContainsFunc(v, portZero)
	case string:
		return portZeroText.MatchString(v)
	}
	return false
}

// portZeroText is HOST:0 by itself or in a URL.
var portZeroText = regexp.MustCompile(`^(?:[a-z0-9+]+://)?[A-Za-z0-9.\-\[\]:]*:0(?:/.*)?$`)

// A server is a child in that role, with the suite as its host.
type server struct {
	*child
	t      *trial
	method method
	client *child // through which the wire is reached; nil if it is plain TCP
	conns  chan net.Conn
	over   chan struct{} // closed when the case ends
}

// refuseAll refuses what is still delivered.
func (s *server) refuseAll() {
	for {
		select {
		case conn := <-s.conns:
			conn.Close()
		case <-s.over:
			return
		}
	}
}

func (t *trial) startServer(config string, host map[string]any) *child {
	return t.start(launch{args: []string{roleServer, config, t.suite.host(host)}})
}

// serve starts a server that delivers to the suite.
func (t *trial) serve() *server { return t.serveWith(false) }

// serveWith may hand it memory in which the ends of streams are marked.
func (t *trial) serveWith(ends bool) *server {
	if t.suite.unready {
		t.cannot("the child did not get ready before")
	}
	pair := t.pair()
	s := &server{t: t, conns: make(chan net.Conn), over: make(chan struct{})}
	var listener *localnet.Listener
	accepting := make(chan struct{})
	host := map[string]any{"deliver": "unix:" + deliverName}
	if ends {
		host["ends"] = endsFD
	}
	s.child = t.start(launch{
		args: []string{roleServer, pair.server, t.suite.host(host)},
		ends: ends,
		prepare: func(dir *localnet.Dir) (err error) {
			listener, err = dir.Listen(deliverName)
			return err
		},
	})
	t.onEnd(func() { close(s.over); listener.Close(); <-accepting })
	go func() {
		defer close(accepting)
		for {
			conn, err := listener.Accept()
			if err != nil {
				return // closed
			}
			select {
			case s.conns <- conn:
			case <-s.over:
				conn.Close()
				return
			}
		}
	}()
	t.until(func() bool { return s.serving() || s.ended() })
	if methods := s.serverMethods(); s.serving() && len(methods) > 0 {
		s.method = methods[0]
	} else {
		t.suite.unready = true
		t.fell("an SMETHOD and SMETHODS DONE", "neither or one of them in %v%s", t.suite.patience, t.whyNot(s.child))
	}
	if pair.client != "" {
		s.client = t.start(launch{args: []string{"client", pair.client, t.suite.host(nil)}})
		t.getsReady(s.client)
	}
	return s
}

func (s *server) plainWire() bool { return s.client == nil }

// dial connects to the wire as a client.
func (s *server) dial() *wire {
	t := s.t
	if s.method.proxies() {
		t.cannot("the server connects its clients itself")
	}
	if !s.plainWire() {
		// The wire's handshake may end at once or with the delivery: the reply comes later.
		return t.open(s.client, t.dest(s.client))
	}
	conn, err := (&net.Dialer{}).DialContext(t.ctx, "tcp", s.method.addr)
	if err != nil {
		t.fell("a connection to the wire at "+s.method.addr, "%v", err)
	}
	t.onEnd(func() { conn.Close() })
	return &wire{t: t, who: "wire's client", conn: conn}
}

// A delivery is a connection that the server hands to the suite.
type delivery struct{ *wire }

// accepted waits for a delivery.
func (s *server) accepted() *delivery {
	t := s.t
	select {
	case conn := <-s.conns:
		t.onEnd(func() { conn.Close() })
		return &delivery{&wire{t, "host", conn, s.ends.Accepted(conn.RemoteAddr())}}
	case <-time.After(t.suite.patience):
	case <-t.ctx.Done():
	}
	t.fell("a connection to deliver", "none in %v", t.suite.patience)
	return nil
}

// deliver is a connection with both of its ends.
func (s *server) deliver() (client *wire, host *delivery) {
	client = s.dial()
	host = s.accepted()
	host.handshake()
	host.answer(granted)
	return client, host
}

// handshake reads it up to the reply, and returns the settings.
func (d *delivery) handshake() map[string]any {
	head := d.read(2, "a greeting")
	if offered := d.read(int(head[1]), "a greeting"); head[0] != 5 || !slices.Contains(offered, settings) {
		d.t.fell("a greeting with method 80", "% x % x", head, offered)
	}
	d.send([]byte{5, settings})
	var text []byte
	if first := d.read(1, "settings"); first[0] == 0 {
		size := d.read(3, "the length of the settings")
		text = d.read(int(size[0])<<16|int(size[1])<<8|int(size[2]), "settings")
	} else {
		// No more is read than the object, so that nothing of the request is lost.
		_ = d.conn.SetReadDeadline(time.Now().Add(d.t.suite.patience))
		b := make([]byte, 1)
		for text = first; !json.Valid(text) && len(text) < 4096; text = append(text, b...) {
			if _, err := d.conn.Read(b); err != nil {
				d.t.fell("settings that are one JSON object", "%q and then: %v", text, err)
			}
		}
		d.t.show("host <", text)
	}
	var told map[string]any
	if err := json.Unmarshal(text, &told); err != nil {
		d.t.fell(`the settings {"transport":NAME,"remote":ADDR}`, "%q", text)
	}
	d.bytes(request(anywhere), "CONNECT to [::]:0")
	return told
}

func (d *delivery) answer(code byte) { d.send([]byte{5, code, 0, 1, 0, 0, 0, 0, 0, 0}) }

// serverFinishes demands of a server that is asked to stop what LIFE-2 says.
func (t *trial) serverFinishes(ask func(*child), when string) {
	s := t.serve()
	client, host := s.deliver()
	ask(s.child)
	go s.refuseAll() // what comes of looking whether the wire still listens
	if !t.until(func() bool {
		conn, err := (&net.Dialer{}).DialContext(t.ctx, "tcp", s.method.addr)
		if err == nil {
			conn.Close()
		}
		return err != nil
	}) {
		t.fell("no new connections "+when, "they are accepted after %v", t.suite.patience)
	}
	if s.ended() {
		t.fell("an open connection to be finished "+when, "%v", s.proc.Err())
	}
	client.send([]byte("still open"))
	host.bytes([]byte("still open"), "what the wire's client sends "+when)
	client.close()
	host.close()
	t.exit(s.child, when+", once the open connection has ended", 0)
}
