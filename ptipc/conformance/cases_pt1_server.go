package conformance

import (
	"errors"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"strings"
)

// managedServerOrderCases are about what a parent tells a server.
var managedServerOrderCases = []Case{
	must("PT1-1/no-cookie", func(t *trial) {
		t.refusesOrder("ENV-ERROR or SMETHOD-ERROR", "there is an Extended ORPort, and no file for its cookie", func(o order) {
			o[varExtended] = noORPort
			delete(o, varCookie)
		})
	}),
	should("PT1-1/bad-options", func(t *trial) {
		if t.suite.subject.Dialect == PT2 {
			t.cannot("options of PT 2 are the transport's own")
		}
		for _, options := range []string{"nonsense", ":k=v", `x:k=v\`} {
			t.showText("options " + options)
			t.refusesOrder("ENV-ERROR", "the options of transports are malformed", func(o order) { o[varOptions] = options })
		}
	}),
}

// managedServerCases are about a managed server: its wire, and what it brings.
var managedServerCases = []Case{
	must("PT1-26/address", func(t *trial) {
		var want string
		s := t.serveWith(launch{tell: func(o order) {
			name, _, _ := strings.Cut(o[varBind], "-")
			want = "127.0.0.1:" + t.unusedPort()
			o[varBind] = name + "-" + want
		}})
		if got, err := netip.ParseAddrPort(s.method.addr); err != nil || got.String() != want {
			t.fell("the address that the environment says in SMETHOD: "+want, "%s", s.method.addr)
		}
		p := s.open()
		p.exchange()
		p.close()
	}),
	must("PT1-9/form", func(t *trial) {
		name := regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_]*$`)
		const pair = `(?:[^ \\,=]|\\[ -~])+=(?:[^ \\,]|\\[ -~])*`
		pairs := regexp.MustCompile(`^` + pair + `(?:,` + pair + `)*$`)
		for _, line := range t.serve().with("SMETHOD") {
			fields := strings.Split(line, " ")
			ok := len(fields) >= 2 && name.MatchString(fields[0])
			for _, option := range fields[min(2, len(fields)):] {
				args, is := strings.CutPrefix(option, "ARGS:")
				ok = ok && (!is || pairs.MatchString(args))
			}
			if !ok {
				t.fell(`SMETHOD NAME ADDR, and ARGS: with K=V pairs, commas between them, and \ before , and =`, "SMETHOD %s", line)
			}
		}
	}),
	should("PT1-9/plain", func(t *trial) {
		for key, values := range announcedArgs(t.serve().method.args) {
			for _, text := range append(values, key) {
				if strings.ContainsAny(text, `,=\ `) || strings.ContainsFunc(text, func(r rune) bool { return r <= ' ' || r > '~' }) {
					t.fell(`keys and values without , = \, spaces and what is not ASCII, which tor does not take escapes away from`, "%q", text)
				}
			}
		}
	}),
	should("PT1-25/kept", func(t *trial) {
		location := filepath.Join(t.suite.base, grease())
		t.need(os.Mkdir(location, 0o700))
		keep := func(o order) { o[varState] = location }
		first := t.serveWith(launch{tell: keep})
		if first.method.args == "" {
			t.cannot("the server announces nothing for its clients")
		}
		first.stop()
		if again := t.serveWith(launch{tell: keep}); again.method.args != first.method.args {
			t.fell("the same ARGS from a server that has its state location again", "%q, and before %q", again.method.args, first.method.args)
		}
	}),
	must("PT1-28/extended", func(t *trial) {
		s := t.serve()
		client := s.dial()
		host := s.accepted()
		told := host.identify()
		if told["transport"] != s.method.name {
			t.fell("TRANSPORT with the name "+s.method.name, "%v", told["transport"])
		}
		remote, _ := told["remote"].(string)
		addr, err := netip.ParseAddrPort(remote)
		if err != nil || s.plainWire() && addr.String() != client.conn.LocalAddr().String() {
			t.fell("USERADDR with the address of the wire's client", "%q", remote)
		}
		host.agree(true)
		passage{server: s, client: client, host: host}.exchange()
	}),
	must("PT1-28/orport", func(t *trial) {
		s := t.serveWith(launch{tell: func(o order) { o[varExtended] = ""; delete(o, varCookie) }})
		client := s.dial()
		host := s.accepted()
		passage{server: s, client: client, host: host}.exchange()
	}),
	must("PT1-28/before-okay", func(t *trial) {
		s := t.serve()
		client := s.dial()
		host := s.accepted()
		host.identify()
		client.send([]byte("early"))
		host.silent("nothing before OKAY")
		host.agree(true)
		host.bytes([]byte("early"), "what the wire's client has sent, after OKAY")
	}),
	must("PT1-28/denied", func(t *trial) {
		s := t.serve()
		client := s.dial()
		host := s.accepted()
		host.identify()
		host.agree(false)
		client.gone("the end of the wire's connection, which the parent has denied")
	}),
	must("PT1-10/forged", func(t *trial) {
		s := t.serve()
		client := s.dial()
		host := s.accepted()
		host.prove(true)
		host.gone("the end of a connection to an Extended ORPort that does not have the cookie")
		client.gone("the end of the wire's connection, which nobody takes")
	}),
	must("PT1-11/not-beyond", func(t *trial) {
		s := t.serve()
		client := s.dial()
		host := s.accepted()
		host.identify()
		host.send(orCommand(orOkay, ""), []byte("first"))
		client.bytes([]byte("first"), "what came in one segment with OKAY")
	}),
	should("PT1-11/unknown-answer", func(t *trial) {
		s := t.serve()
		client := s.dial()
		host := s.accepted()
		host.identify()
		host.send(orCommand(0x1777, "grease"), orCommand(orOkay, ""))
		passage{server: s, client: client, host: host}.exchange()
	}),
	should("PT1-28/others-go-on", func(t *trial) {
		s := t.serve()
		s.dial()
		stalled := s.accepted() // and never answered
		s.dial()
		next := s.accepted()
		next.identify()
		next.agree(true)
		stalled.close()
	}),
	should("PT1-28/broken", func(t *trial) {
		p := t.serve().open()
		p.exchange()
		t.breaks(p.host.tcp())
		if b, err := p.client.try(1, t.suite.patience); err == nil || errors.Is(err, io.EOF) || errors.Is(err, os.ErrDeadlineExceeded) {
			t.fell("a reset on the wire, since the parent's stream broke", "% x, %v", b, err)
		}
	}),
}
