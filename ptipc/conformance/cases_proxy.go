package conformance

import (
	"context"
	"fmt"
	"net"
	"slices"
	"strings"
)

// proxyCases are about an upstream proxy, which the suite runs.
var proxyCases = []Case{
	must("PROXY-1/not-around", func(t *trial) {
		t.extended()
		// Whoever comes to the canary has gone around the proxy, which leads elsewhere.
		canary, err := newFarEnd(echo)
		t.need(err)
		t.onEnd(canary.close)
		proxy := t.upstream("", "", t.toEcho)
		c := t.proxied(proxy, "")
		if t.serverDials(c) {
			t.open(c, t.dest(c))
			if len(proxy.requests()) == 0 {
				t.fell("a request at the proxy", "none")
			}
			return
		}
		w := t.open(c, canary.addr())
		w.echo("through the proxy")
		w.close()
		if n := canary.accepted(); n > 0 {
			t.fell("the destination to be reached through the proxy alone", "%d connections went around it", n)
		}
		if asks := proxy.requests(); !slices.Contains(asks, asked{dest: canary.addr()}) {
			t.fell("a request for "+canary.addr()+" at the proxy", "%v", asks)
		}
	}),
	must("PROXY-1/failing", func(t *trial) {
		t.extended()
		canary, err := newFarEnd(echo)
		t.need(err)
		t.onEnd(canary.close)
		c := t.proxied(t.upstream("", "", func(context.Context, asked) (net.Conn, byte) { return nil, connRefused }), "")
		t.free(c)
		w := t.begin(c)
		w.send(request(canary.addr()))
		if code := w.reply(); code == granted || canary.accepted() > 0 {
			t.fell("a failure when the proxy fails, and no way around it", "reply %02x, %d connections around it", code, canary.accepted())
		}
	}),
	must("PROXY-1/unreachable", func(t *trial) {
		t.extended()
		t.streams()
		t.noWayAround("socks5://" + t.nobody())
	}),
	must("PROXY-3/name", func(t *trial) {
		// SOCKS-13: the name goes to the proxy, which is the one to look it up.
		t.extended()
		proxy := t.upstream("", "", t.toEcho)
		c := t.proxied(proxy, "")
		t.free(c)
		if t.serverDials(c) {
			t.cannot("the destination is the server's to dial, which has no proxy")
		}
		for _, name := range []string{grease() + ".invalid:443", "localhost:443"} {
			t.open(c, name).echo("by name")
			if asks := proxy.requests(); !slices.Contains(asks, asked{name: true, dest: name}) {
				t.fell("a request for the name "+name+" at the proxy", "%v", asks)
			}
		}
	}),
	must("PROXY-3/password", func(t *trial) {
		t.extended()
		user, password := grease(), "p@ss/word:%"+grease()
		proxy := t.upstream(user, password, t.toEcho)
		c := t.proxied(proxy, user+":p%40ss%2Fword%3A%25"+password[len("p@ss/word:%"):]+"@")
		t.open(c, t.dest(c))
		if asks := proxy.requests(); len(asks) == 0 || asks[0].user != user || asks[0].password != password {
			t.fell("user and password at the proxy", "%v", asks)
		}
	}),
}

// anyProxyCases are about the proxy of any child that stays.
var anyProxyCases = []Case{
	must("PROXY-1/done-first", func(t *trial) {
		t.extended()
		t.streams()
		c, _ := t.working(launch{host: map[string]any{"proxy": "socks5://" + t.upstream("", "", dialer).addr()}})
		word := strings.TrimSuffix(c.lastWord(), "S DONE")
		expected := "PROXY DONE before the first " + word
		for _, line := range c.lines() {
			switch keyword, _, _ := strings.Cut(line.text, " "); {
			case line.text == "PROXY DONE":
				return
			case keyword == word:
				t.fell(expected, "%q", line.text)
			}
		}
		t.fell(expected, "none")
	}),
	must("PROXY-1/unusable", func(t *trial) {
		t.extended()
		for _, url := range []string{"http://" + t.nobody(), "socks5://", "nonsense", "socks5://127.0.0.1", "socks5://:1080"} {
			t.showText("proxy " + url)
			c := t.start(launch{host: map[string]any{"proxy": url}})
			if t.settled(c) {
				t.fell("PROXY-ERROR and an exit for the proxy URL "+url, "it got ready")
			}
			t.refusesProxy(c)
		}
	}),
	must("PROXY-3/secret", func(t *trial) {
		t.extended()
		secret := grease()
		for _, url := range []string{
			"socks5://user:" + secret + "@" + t.nobody(), "http://user:" + secret + "@127.0.0.1:1",
			"socks5://user:" + secret + "@", "socks5://user:" + secret + "@%zz:1",
		} {
			c := t.start(launch{host: map[string]any{"proxy": url}})
			if t.settled(c) && c.role == Client && !c.datagrams() {
				w, _ := t.ask(c, t.dest(c)) // whatever it says to that, it must not say the password
				w.close()
			}
			t.keepsSecret(c, secret)
		}
	}),
}

// streams ends the case for a child of datagrams alone, which does not start under a
// proxy.
func (t *trial) streams() {
	datagrams := false
	switch {
	case t.suite.unready: // there is nothing to be learnt
	case t.suite.subject.Role == Server:
		datagrams = t.serve().datagrams
	default:
		datagrams = t.child().datagrams()
	}
	if datagrams {
		t.cannot("the child is of datagrams alone, which a proxy for streams cannot carry (PROXY-4)")
	}
}

// refusesProxy demands that the child ends because of its proxy, and says so.
func (t *trial) refusesProxy(c *child) {
	if t.suite.managed() { // whose protocol says nothing about codes
		t.ends(c, "for a proxy that does not work")
	} else {
		t.exit(c, "for a proxy that does not work", 69)
	}
	if len(t.saidWith(c, "PROXY-ERROR")) == 0 {
		t.fell("a PROXY-ERROR line", "none")
	}
}

// serverDials reports whether the child dials its server alone, wherever its client
// wants to go.
func (t *trial) serverDials(c *child) bool { return t.method(c).bound() || t.suite.far != nil }

// proxied starts a child that is given a proxy.
func (t *trial) proxied(proxy *upstream, user string) *child {
	return t.ready(launch{host: map[string]any{"proxy": fmt.Sprintf("socks5://%s%s", user, proxy.addr())}})
}

// toEcho is the route of a proxy that leads to the echo server, whatever it is asked
// for, unless a bound transport needs its own far end.
func (t *trial) toEcho(ctx context.Context, a asked) (net.Conn, byte) {
	if t.suite.echoes() {
		return dialer(ctx, a)
	}
	return dialer(ctx, asked{dest: t.suite.echo.addr()})
}

// noWayAround starts a child whose proxy does not work, and demands that it says so,
// or that its connections fail.
func (t *trial) noWayAround(url string) {
	canary, err := newFarEnd(echo)
	t.need(err)
	t.onEnd(canary.close)
	t.showText("proxy " + url)
	c := t.start(launch{host: map[string]any{"proxy": url}})
	if !t.settled(c) {
		t.refusesProxy(c)
		return
	}
	dest := t.dest(c)
	if dest == t.suite.echo.addr() {
		dest = canary.addr()
	}
	if _, code := t.ask(c, dest); code == granted || canary.accepted() > 0 {
		t.fell("a failure when the proxy does not work, and no way around it", "reply %02x, %d connections around it", code, canary.accepted())
	}
}
