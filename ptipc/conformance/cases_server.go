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
)

// serverCases are about a server. The suite is the host, and a client of the wire.
var serverCases = []Case{
	must("SRV-1/announced", func(t *trial) {
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
		const listening = "a wire that listens by the time of SMETHODS DONE"
		if s.datagrams {
			if err := t.probeUDP(s.method.addr); err != nil {
				t.fell(listening, "%v", err)
			}
			return
		}
		conn, err := (&net.Dialer{}).DialContext(t.ctx, "tcp", s.method.addr)
		if err != nil {
			t.fell(listening, "%v", err)
		}
		conn.Close()
	}),
	must("SRV-1/last", func(t *trial) {
		t.announcesNoMore(t.serve().child)
	}),
	must("SRV-2/args", func(t *trial) {
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
	must("SRV-2/connects", func(t *trial) {
		s := t.serve()
		s.proxying()
		s.open().exchange()
		select {
		case conn := <-s.conns:
			conn.Close()
			t.fell("a server that connects its clients itself, as it announces with proxy=1", "a delivery")
		case <-time.After(quiet):
		}
	}),
	must("SRV-2/no-deliver", func(t *trial) {
		t.serve().proxying()
		s := t.serveWith(launch{host: map[string]any{"deliver": nil}})
		s.open().exchange()
	}),
	must("SRV-3/delivers", func(t *trial) {
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
		passage{server: s, client: client, host: host}.exchange()
	}),
	must("SRV-3/nothing-before-the-reply", func(t *trial) {
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
	must("SRV-3/refused", func(t *trial) {
		s := t.serve()
		client := s.dial()
		host := s.accepted()
		host.handshake()
		host.answer(notAllowed)
		if b, err := client.try(1, t.suite.patience); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
			t.fell("the end of the wire's connection, which the host has refused", "% x, %v", b, err)
		}
	}),
	must("SRV-3/no-deliver", func(t *trial) {
		t.extended()
		c := t.start(launch{host: map[string]any{"deliver": nil}})
		if t.settled(c) && t.method(c).proxies() {
			t.cannot("the server connects its clients itself")
		}
		t.exit(c, "without deliver", 64)
	}),
	must("SRV-3/half-close", func(t *trial) {
		for _, hostFirst := range []bool{false, true} {
			s := t.serve()
			s.streams()
			p := s.open()
			if p.host == nil {
				p.client.send([]byte("last words"))
				p.client.closeWrite()
				p.client.bytes([]byte("last words"), "what was sent before the end, back from the echo server")
				p.client.end("the end of the stream, back from the echo server")
				return
			}
			first, second := p.client, p.host.wire
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
			s.stop() // its port is the next one's
		}
	}),
	must("STAT-2/totals", func(t *trial) {
		s := t.serve()
		t.counting(s.child)
		p := s.open()
		sent := p.spent + p.up("0123456789")
		received := p.spent + 10
		var got counts
		if !t.until(func() bool {
			got = t.counts(t.stats(s.child, ""))
			if s.datagrams { // some may have been sent again
				return got.is("active", 1) && got.is("opened", 1) && got.least("received", received) && got.least("sent", sent)
			}
			return got.is("active", 1) && got.is("opened", 1) && got.is("received", float64(received)) && got.is("sent", float64(sent))
		}) {
			t.fell(fmt.Sprintf("one connection, active and opened, %d bytes received and %d sent", received, sent), "%v", got)
		}
	}),
	must("LIFE-2/idle", func(t *trial) { t.serverEnds(t.closeStdin, "at the end of standard input") }),
	must("LIFE-2/open-connection", func(t *trial) { t.serverFinishes(t.closeStdin, "at the end of standard input") }),
	must("LIFE-3/idle", func(t *trial) { t.serverEnds(t.terminate, "on SIGTERM") }),
	must("LIFE-3/open-connection", func(t *trial) { t.serverFinishes(t.terminate, "on SIGTERM") }),
	must("LIFE-3/second", func(t *trial) { t.serverEndsAtOnce(t.terminate, "the first SIGTERM") }),
	must("LIFE-3/after-end", func(t *trial) { t.serverEndsAtOnce(t.closeStdin, "the end of standard input") }),
}

// generateCases are about what a child generates.
var generateCases = []Case{
	must("SRV-6/generate", func(t *trial) {
		c := t.start(launch{})
		t.exit(c, "after generate", 0)
		t.generated(c)
		if n := len(c.lines()); n != 1 {
			t.fell(`the line {"client":{…},"server":{…}} and nothing else`, "%d lines", n)
		}
	}),
	must("SRV-6/port", func(t *trial) {
		pair := t.pair()
		for side, text := range map[string]string{"client": pair.client, "server": pair.server} {
			var config any
			t.need(json.Unmarshal([]byte(text), &config))
			if portZero(config) {
				t.fell("no port 0 in the configuration of the "+side, "%s", text)
			}
		}
	}),
	must("SRV-6/match", func(t *trial) {
		s := t.serve()
		s.open().exchange()
	}),
}

// deliverName is the host's socket in the state directory (SRV-3).
const deliverName = "deliver.sock"

// quiet is how long nothing may come where nothing should.
const quiet = 100 * time.Millisecond

func (m method) proxies() bool { return strings.Contains(","+m.args+",", ",proxy=1,") }

// A configPair is a configuration for each side.
type configPair struct{ client, server string }

// pair is what the child generates, or the subject's configuration for a server.
func (t *trial) pair() configPair {
	options := t.suite.subject.Generate
	if len(options) == 0 && t.suite.subject.Role != Generate {
		return configPair{server: object(t.suite.subject.Config)}
	}
	c := t.start(launch{role: Generate, config: object(options)})
	t.exit(c, "after generate", 0)
	return t.generated(c)
}

// generated is what a child has written that was to generate. Whether it wrote
// anything else, SRV-6/generate says.
func (t *trial) generated(c *child) configPair {
	for _, line := range slices.Backward(c.lines()) {
		var pair struct{ Client, Server map[string]json.RawMessage }
		if line.cut || json.Unmarshal([]byte(line.text), &pair) != nil || pair.Client == nil || pair.Server == nil {
			continue
		}
		client, err := json.Marshal(pair.Client)
		t.need(err)
		server, err := json.Marshal(pair.Server)
		t.need(err)
		return configPair{string(client), string(server)}
	}
	t.fell(`a line {"client":{…},"server":{…}}`, "none in %d lines", len(c.lines()))
	return configPair{}
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

// serverEnds demands that a server without connections ends with code 0.
func (t *trial) serverEnds(ask func(*child), when string) {
	s := t.serve()
	ask(s.child)
	t.exit(s.child, when, 0)
}

// serverFinishes demands of a server that is asked to stop what LIFE-2 says.
func (t *trial) serverFinishes(ask func(*child), when string) {
	s := t.serve()
	s.streams()
	p := s.open()
	ask(s.child)
	if !s.closed() {
		t.fell("no new connections "+when, "they are accepted after %v", t.suite.patience)
	}
	if s.ended() {
		t.fell("an open connection to be finished "+when, "%v", s.proc.Err())
	}
	p.up("still open")
	p.client.close()
	if p.host != nil {
		p.host.close()
	}
	t.exit(s.child, when+", once the open connection has ended", 0)
}

// serverEndsAtOnce demands that a server which finishes an open connection after first
// does not do so after SIGTERM.
func (t *trial) serverEndsAtOnce(first func(*child), what string) {
	s := t.serve()
	s.streams()
	s.open()
	first(s.child)
	s.closed() // that it is, another case says
	if s.ended() {
		t.cannot("the child has ended on %s; another case is about that", what)
	}
	t.terminate(s.child)
	if !t.until(s.ended) {
		t.fell("an exit at once on SIGTERM after "+what, "it still runs after %v", t.suite.patience)
	}
}
