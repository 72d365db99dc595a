package conformance

import (
	"maps"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"
)

// watchedCases are about what a child does that stays, seen by the system.
var watchedCases = []Case{
	must("LIFE-8/watched", func(t *trial) {
		in := t.cell(false)
		c, works := t.working(launch{within: in})
		works()
		t.hangUp()
		t.closeStdin(c)
		if !t.until(c.ended) {
			c.stop()
		}
		paths, err := in.written()
		t.need(err)
		base, err := filepath.EvalSymlinks(t.suite.base)
		t.need(err)
		for _, path := range paths {
			// A child that the suite had to start beside it has a state directory as well.
			own, err := filepath.Rel(base, path)
			if parts := strings.Split(own, string(filepath.Separator)); err != nil || len(parts) < 3 || parts[1] != stateDir {
				t.fell("files written in the working directory alone", "%s", path)
			}
		}
	}),
	must("LIFE-11/watched", func(t *trial) {
		c, works := t.working(launch{})
		w := &watcher{child: c, tcp: map[netip.AddrPort]bool{}, udp: map[netip.AddrPort]bool{}, wires: map[netip.AddrPort]bool{}}
		t.need(w.look())
		stop := make(chan struct{})
		var looking sync.WaitGroup
		looking.Go(func() {
			tick := time.NewTicker(lookPeriod)
			defer tick.Stop()
			for w.look() == nil { // when the child is gone, there is nothing to be seen
				select {
				case <-tick.C:
				case <-stop:
					return
				}
			}
		})
		t.onEnd(func() { close(stop); looking.Wait() })
		w.use(true)
		works()
		t.need(w.look())
		w.use(false)
		t.hangUp()
		t.closeStdin(c)
		t.until(c.ended) // that it does, another case says
		w.mu.Lock()
		defer w.mu.Unlock()
		t.reachable(c, "TCP", slices.Collect(maps.Keys(w.tcp)))
		t.reachable(c, "UDP", slices.Collect(maps.Keys(w.udp)))
	}),
}

// A watcher looks at the sockets of a child again and again.
type watcher struct {
	child *child

	mu       sync.Mutex // held while it looks
	used     bool       // there are connections, which may have wires of datagrams
	tcp, udp map[netip.AddrPort]bool
	wires    map[netip.AddrPort]bool
}

// use says whether there will be connections, of what is seen from now on.
func (w *watcher) use(used bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.used = used
}

func (w *watcher) look() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	pids, err := w.child.proc.Pids()
	if err != nil {
		return err
	}
	tcp, udp, err := listening(pids)
	for _, addr := range tcp {
		w.tcp[addr] = true
	}
	for _, addr := range udp {
		switch {
		case w.udp[addr] || w.wires[addr]:
		case w.used: // what was not there before is a connection's wire
			w.wires[addr] = true
		default:
			w.udp[addr] = true
		}
	}
	return err
}

// watchedProxyCases are about what leaves a client that has a proxy: it runs in a network
// that has no other way out, where every packet is seen.
var watchedProxyCases = []Case{
	must("PROXY-1/nothing-around", func(t *trial) {
		for _, p := range t.aroundProxy() {
			if !p.aboutNames() {
				t.fellPacket("connections to the proxy alone", p)
			}
		}
	}),
	must("PROXY-3/nothing-looked-up", func(t *trial) {
		for _, p := range t.aroundProxy() {
			if p.aboutNames() {
				t.fellPacket("no name looked up", p)
			}
		}
	}),
}

// aboutNames reports whether the packet looks a name up: DNS, also over TLS, or mDNS
// and its kin.
func (p packet) aboutNames() bool {
	return slices.Contains([]uint16{53, 853, 5353, 5355, 137}, p.to.Port())
}

func (t *trial) fellPacket(expected string, p packet) {
	t.show(p.network+" packet", p.bytes)
	t.fell(expected, "a packet from %s to %s, %s", p.from, p.to, p.network)
}

// aroundProxy uses a child that has a proxy and returns what it has sent elsewhere.
func (t *trial) aroundProxy() []packet {
	t.extended()
	in := t.cell(true)
	var proxy *upstream
	var err error
	in.run(func() { proxy, err = t.newUpstream("", "", t.toEcho) })
	t.need(err)
	t.onEnd(proxy.close)
	c := t.ready(launch{within: in, host: map[string]any{"proxy": "socks5://" + proxy.addr(), "listen": "unix"}})
	dests := []string{t.dest(c)}
	if !t.method(c).bound() {
		dests = []string{grease() + ".invalid:443", "192.0.2.7:443", "[2001:db8::7]:443"}
	}
	for _, dest := range dests {
		w, _ := t.ask(c, dest) // whether it works, PROXY-1/not-around says
		w.close()
	}
	t.closeStdin(c)
	if !t.until(c.ended) {
		c.stop()
	}
	packets, err := in.begun()
	t.need(err)
	own := []string{proxy.addr(), t.method(c).addr}
	around := slices.DeleteFunc(packets, func(p packet) bool { return p.network == "tcp" && slices.Contains(own, p.to.String()) })
	if len(around) == 0 && len(proxy.requests()) == 0 {
		t.cannot("the child makes no connection, neither through the proxy nor around it")
	}
	return around
}

// cell ends the case where a child cannot be watched.
func (t *trial) cell(network bool) *cell {
	in, err := newCell(network)
	t.need(err)
	t.onEnd(in.close)
	return in
}
