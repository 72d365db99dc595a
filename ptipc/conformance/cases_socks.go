package conformance

import (
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// socksCases are about the handshake, seen from the client alone.
var socksCases = []Case{
	must("SOCKS-1/settings-win", func(t *trial) {
		c := t.child()
		other := 0x20 + byte(rand.N(0x50)) // a method that nobody knows
		for _, tt := range []struct {
			offered []byte
			want    byte
		}{
			{[]byte{none, settings}, settings},
			{[]byte{settings, none}, settings},
			{[]byte{none, lengthOnly}, lengthOnly},
			{[]byte{lengthOnly, none}, lengthOnly},
			{[]byte{none, lengthOnly, settings}, settings},
			{[]byte{lengthOnly, settings, none}, settings},
			{[]byte{other, none, 2, settings, other}, settings},
		} {
			w := t.dial(c)
			w.send(greeting(tt.offered...))
			w.chosen(tt.want)
			w.close()
		}
	}),
	must("SOCKS-1/each-alone", func(t *trial) {
		c := t.child()
		for _, method := range []byte{none, lengthOnly, settings} {
			w := t.dial(c)
			w.send(greeting(method))
			w.chosen(method)
			w.close()
		}
	}),
	must("SOCKS-1/unknown-beside", func(t *trial) {
		w := t.dial(t.child())
		w.send(greeting(1, 0x20+byte(rand.N(0x50)), none, 2))
		w.chosen(none)
	}),
	must("SOCKS-1/none-known", func(t *trial) {
		c := t.child()
		for _, offered := range [][]byte{{}, {2}, {1, 2, 0x20 + byte(rand.N(0x50)), 0xfe}} {
			w := t.dial(c)
			w.send(greeting(offered...))
			w.chosen(refused)
			w.end("the end of the connection after method ff")
		}
	}),

	must("SOCKS-2/no-reply-between", func(t *trial) {
		c := t.child()
		for _, h := range t.framings(t.settings()) {
			w := t.settle(c, h)
			w.send(request(t.dest(c)))
			// A reply of its own to the settings would stand before this one.
			if b := w.read(4, "the reply to the request"); b[0] != 5 || b[1] != granted || b[2] != 0 {
				t.fell("05 00 00 and an address: the reply to the request, and nothing before it", "% x", b)
			}
		}
	}),

	must("SOCKS-3/largest", func(t *trial) {
		c := t.child()
		text := pad(t.settings(), 65_536)
		for _, method := range []byte{lengthOnly, settings} {
			t.granted(c, framing{method, lengthForm(text)})
		}
	}),
	must("SOCKS-3/promised", func(t *trial) {
		c := t.child()
		t.refusedAtOnce(c, framing{lengthOnly, []byte{0xff, 0xff, 0xff, 0xff}}, "a length of 4 GiB", tooLarge)
		// Under 0x80 a length begins with 00, so that this is the most.
		t.refusedAtOnce(c, framing{settings, []byte{0, 0xff, 0xff, 0xff}}, "a length of 16 MiB", tooLarge)
	}),
	must("SOCKS-4/end-of-object", func(t *trial) {
		c := t.child()
		for _, text := range []string{
			`{"` + grease() + `":"}{\"}\\"}`, `{"` + grease() + `":[{"a":"]"},{"}":{}}]}`, `{"` + grease() + `":"é \u007d"}`,
		} {
			// Whatever the transport thinks of the key, the request has to be found.
			w, code := t.shake(c, framing{settings, []byte(text)}, t.dest(c))
			if code != granted && code != settingsRefused {
				t.fell("reply 00 or 13 to settings with a key that the transport may not know", "reply %02x", code)
			}
			w.close()
		}
	}),
	must("SOCKS-4/white-space", func(t *trial) {
		t.granted(t.child(), framing{settings, []byte(" \t\r\n" + t.settings())})
	}),
	must("SOCKS-4/largest", func(t *trial) {
		t.granted(t.child(), framing{settings, []byte(pad(t.settings(), 65_536))})
	}),
	must("SOCKS-4/deepest", func(t *trial) {
		c := t.child()
		for _, deep := range []string{
			`{"` + grease() + `":` + strings.Repeat("[", 63) + strings.Repeat("]", 63) + `}`,
			`{"` + grease() + `":` + strings.Repeat(`{"a":`, 62) + "{}" + strings.Repeat("}", 62) + `}`,
		} {
			_, code := t.shake(c, framing{settings, []byte(deep)}, t.dest(c))
			if code != granted && code != settingsRefused {
				t.fell("reply 00 or 13 to settings of 64 levels with a key that the transport may not know", "reply %02x", code)
			}
		}
	}),
	must("SOCKS-4/too-deep", func(t *trial) {
		w := t.settle(t.child(), framing{settings, []byte(`{"a":` + strings.Repeat("[", 64))})
		w.replied("settings of 65 levels", tooLarge, notJSON)
	}),

	must("SOCKS-5/one-segment", func(t *trial) {
		c := t.child()
		t.echoing(c)
		for _, h := range t.allFramings(t.settings()) {
			w := t.dial(c)
			w.send(greeting(h.method), h.bytes, request(t.dest(c)), []byte("early"))
			w.chosen(h.method)
			w.replied("a handshake in one segment", granted)
			w.bytes([]byte("early"), "the early data back from the echo server")
			w.echo("late")
		}
	}),
	must("SOCKS-5/byte-by-byte", func(t *trial) {
		c := t.child()
		for _, h := range t.allFramings(t.settings()) {
			w := t.dial(c)
			for _, b := range slices.Concat(greeting(h.method), h.bytes, request(t.dest(c))) {
				w.send([]byte{b})
				w.taken()
			}
			w.chosen(h.method)
			w.replied("a handshake that comes byte by byte", granted)
		}
	}),
	must("SOCKS-5/two-segments", func(t *trial) {
		c := t.child()
		for _, h := range t.allFramings(t.settings()) {
			whole := slices.Concat(greeting(h.method), h.bytes, request(t.dest(c)))
			for cut := 1; cut < len(whole); cut += max(1, len(whole)/16) {
				w := t.dial(c)
				w.send(whole[:cut])
				w.taken()
				w.send(whole[cut:])
				w.chosen(h.method)
				w.replied(fmt.Sprintf("a handshake in two segments, cut after byte %d", cut), granted)
				w.close()
			}
		}
	}),

	must("SOCKS-6/too-large", func(t *trial) {
		c := t.child()
		for _, h := range []framing{
			{lengthOnly, []byte{0, 1, 0, 1}},
			{settings, []byte{0, 1, 0, 1}},
			{settings, []byte(`{"a":"` + strings.Repeat("x", 65_536))},
			{settings, []byte(`{` + strings.Repeat(" ", 65_536))},
		} {
			t.refusedAtOnce(c, h, "settings of more than 65,536 bytes", tooLarge)
		}
	}),
	must("SOCKS-6/not-json", func(t *trial) {
		c := t.child()
		for _, text := range []string{`[]`, `"x"`, `1`, `{"a":}`, `{"a":1,}`, "{\"a\":\"\xff\"}", "{]", "nonsense"} {
			for _, h := range t.framings(text) {
				t.refusedAtOnce(c, h, fmt.Sprintf("%q as settings", text), notJSON)
			}
		}
		for _, method := range []byte{lengthOnly, settings} {
			t.refusedAtOnce(c, framing{method, lengthForm("{} {}")}, "two objects as settings", notJSON)
		}
	}),
	must("SOCKS-6/unknown-key", func(t *trial) {
		c := t.child()
		for _, h := range t.framings(`{"` + grease() + `":1}`) {
			_, code := t.shake(c, h, t.dest(c))
			if code != granted && code != settingsRefused {
				t.fell("reply 00 or 13 to settings with a key that the transport may not know", "reply %02x", code)
			}
		}
	}),
	slow(must("SOCKS-6/too-late", func(t *trial) {
		w := t.settle(t.child(), framing{settings, []byte(`{"a"`)})
		b, err := w.try(2, limit+t.suite.patience)
		if err != nil || b[1] != tooLate {
			t.fell("reply 11 to settings that have not come in 10 seconds", "% x, %v", b, err)
		}
	})),

	must("SOCKS-7/commands", func(t *trial) {
		c := t.child()
		for _, command := range []byte{0, 2, 3, 4 + byte(rand.N(252))} {
			req := request(t.dest(c))
			req[1] = command
			w := t.begin(c)
			w.send(req)
			w.replied(fmt.Sprintf("command %02x", command), badCommand)
			w.close()
		}
	}),
	must("SOCKS-7/address-types", func(t *trial) {
		c := t.child()
		for _, kind := range []byte{0, 2, 5 + byte(rand.N(251))} {
			w := t.begin(c)
			w.send([]byte{5, 1, 0, kind, 1, 2, 3, 4, 0, 80})
			w.replied(fmt.Sprintf("address type %02x", kind), badType)
			w.close()
		}
	}),
	must("SOCKS-8/bound-address", func(t *trial) {
		c := t.child()
		requests := [][]byte{request(t.dest(c)), request(t.dest(c)), request(t.wrongDest())}
		requests[1][1] = 2
		for _, req := range requests {
			w := t.begin(c)
			w.send(req)
			if b := w.replyBytes(); string(b[2:]) != "\x00\x01\x00\x00\x00\x00\x00\x00" {
				t.fell("0.0.0.0:0 as the bound address: 00 01 00 00 00 00 00 00 after the code", "% x", b[2:])
			}
		}
	}),

	must("SOCKS-9/others-go-on", func(t *trial) {
		c := t.child()
		m := t.telling()
		for _, begun := range [][]byte{nil, {5}, greeting(m), append(greeting(m), '{'), append(greeting(none), 5, 1)} {
			w := t.dial(c)
			if len(begun) > 0 {
				w.send(begun)
			}
		}
		t.open(c, t.dest(c)).close()
	}),
	slow(must("SOCKS-9/silence-ends", func(t *trial) {
		// Together, so that the limit is waited for once.
		c := t.child()
		silent, begun, trickling := t.dial(c), t.dial(c), t.dial(c)
		begun.send(greeting(none))
		begun.chosen(none)
		tick := time.NewTicker(time.Second)
		defer tick.Stop()
		trickling.send([]byte{5, 255})
		for range limit / time.Second {
			select {
			case <-tick.C:
				trickling.send([]byte{none})
			case <-t.ctx.Done():
			}
		}
		for what, w := range map[string]*wire{"says nothing": silent, "sends no request": begun, "sends a byte a second": trickling} {
			for {
				// An answer on the way is as good.
				_, err := w.try(1, t.suite.patience)
				if errors.Is(err, os.ErrDeadlineExceeded) {
					t.fell("the end, after 10 seconds, of the handshake of a client that "+what, "it is still open")
				}
				if err != nil {
					break
				}
			}
		}
	})),
	should("SOCKS-10/many", func(t *trial) {
		const many = 200
		c := t.child()
		t.echoing(c)
		var open []*wire
		for range many {
			open = append(open, t.open(c, t.dest(c)))
		}
		for i, w := range open {
			w.echo(fmt.Sprintf("connection %d", i))
			w.close()
		}
	}),
	must("SOCKS-10/out-of-descriptors", func(t *trial) {
		const files = 64
		c := t.ready(launch{files: files})
		var open []net.Conn
		t.onEnd(func() {
			for _, conn := range open {
				conn.Close()
			}
		})
		t.showText(fmt.Sprintf("%d connections to a child that may have %d descriptors", files+16, files))
		for range files + 16 {
			open = append(open, t.connect(c))
		}
		// The child may also bound what it accepts, so that it never runs out.
		t.calm(func() int { return min(files, descriptors(c.proc.Pid())) })
		for _, conn := range open {
			conn.Close()
		}
		t.open(c, t.dest(c))
	}),

	must("SOCKS-11/anywhere", func(t *trial) {
		c := t.child()
		t.bound(c)
		t.open(c, anywhere)
	}),
	must("SOCKS-11/elsewhere", func(t *trial) {
		c := t.child()
		t.bound(c)
		for _, dest := range []string{"127.0.0.1:80", "0.0.0.0:0", "[::]:80", "[::1]:0", "example.com:80", ":0", "[::ffff:0.0.0.0]:0"} {
			t.refusesDest(c, dest)
		}
	}),
	must("SOCKS-12/nowhere", func(t *trial) {
		c := t.child()
		t.free(c)
		for _, dest := range []string{anywhere, ":80", ":0", "127.0.0.1:0", "example.com:0", "[::1]:0"} {
			t.refusesDest(c, dest)
		}
	}),

	must("SOCKS-17/other-user", func(t *trial) {
		c := t.child()
		t.refusesUser(c, func(m method) (net.Conn, error) { return connect(t.ctx, c, m) })
	}),
	must("SOCKS-17/other-user-unix", func(t *trial) {
		c := t.unixChild()
		state := filepath.Join(c.base, stateDir)
		path := filepath.Join(state, strings.TrimPrefix(t.method(c).addr, "unix:"))
		// The directory is for the host to close. Here it is open, to see the socket alone.
		for _, dir := range []string{t.suite.base, c.base, state} {
			t.need(os.Chmod(dir, 0o711)) //nolint:gosec // this is what the case is about
		}
		t.need(asUser(nobodyUID, func() error { _, err := os.Stat(path); return err }))
		t.refusesUser(c, func(method) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(t.ctx, "unix", path)
		})
	}),
	should("SOCKS-17/socket-mode", func(t *trial) {
		c := t.unixChild()
		info, err := os.Stat(filepath.Join(c.base, stateDir, strings.TrimPrefix(t.method(c).addr, "unix:")))
		t.need(err)
		if mode := info.Mode(); mode&fs.ModeSocket == 0 || mode.Perm()&0o077 != 0 {
			t.fell("a socket that gives nothing to group and others", "%v", mode)
		}
	}),
	should("SOCKS-17/host-user", func(t *trial) {
		t.extended()
		c := t.ready(launch{host: map[string]any{"uid": nobodyUID}})
		m := t.method(c)
		var conn net.Conn
		t.need(asUser(nobodyUID, func() (err error) { conn, err = connect(t.ctx, c, m); return err }))
		w := t.wire("client", conn, nil)
		w.send(greeting(none))
		w.chosen(none)
		w.close()
		t.open(c, t.dest(c)) // and the child's own user as before
	}),

	must("SOCKS-19/empty", func(t *trial) {
		c := t.child()
		if !t.suite.subject.Settings.Empty() {
			t.cannot("the transport needs settings")
		}
		t.granted(c, framing{method: none})
		for _, h := range slices.Concat(t.framings("{}"), t.framings(" { }")) {
			t.granted(c, h)
		}
	}),
	must("SOCKS-22/descriptors", func(t *trial) {
		const rounds = 20
		c := t.ready(launch{})
		if descriptors(c.proc.Pid()) == 0 {
			t.cannot("the descriptors of a process cannot be counted here")
		}
		round := func() {
			t.open(c, t.dest(c)).close()
			half := t.open(c, t.dest(c))
			half.closeWrite()
			half.close()
			refused, _ := t.ask(c, t.wrongDest()) // whatever it says to that
			refused.close()
			begun := t.dial(c)
			begun.send(greeting(t.telling()))
			begun.chosen(t.telling())
			begun.send([]byte("{"))
			begun.close()
		}
		for range rounds {
			round() // what is made once is there then
		}
		before := t.calm(func() int { return descriptors(c.proc.Pid()) })
		for range rounds {
			round()
		}
		var after int
		back := false
		for range 3 { // some transports have things of their own to end first
			back = back || t.until(func() bool { after = descriptors(c.proc.Pid()); return after <= before+rounds/4 })
		}
		if !back {
			t.fell(fmt.Sprintf("as many descriptors as before %d connections", 4*rounds), "%d, before %d", after, before)
		}
	}),
}

// calm waits until a count has stayed the same for a while, and returns it.
func (t *trial) calm(count func() int) int {
	before, same := -1, 0
	t.until(func() bool {
		now := count()
		if now != before {
			before, same = now, 0
		}
		same++
		return same > 20
	})
	return before
}

// nobodyUID is a user of every system who is not the child's.
const nobodyUID = 65534

// A framing is how settings are sent.
type framing struct {
	method byte
	bytes  []byte
}

// framings are the three ways to send settings.
func (t *trial) framings(text string) []framing {
	return []framing{{settings, []byte(text)}, {settings, lengthForm(text)}, {lengthOnly, lengthForm(text)}}
}

// allFramings is also the way to send none, if the transport needs none.
func (t *trial) allFramings(text string) []framing {
	if t.suite.subject.Settings.Empty() {
		return append(t.framings(text), framing{method: none})
	}
	return t.framings(text)
}

// pad puts blanks into an object, behind its first brace.
func pad(object string, length int) string {
	return "{" + strings.Repeat(" ", length-len(object)) + object[1:]
}

// granted demands that a handshake with these settings succeeds.
func (t *trial) granted(c *child, h framing) {
	w, code := t.shake(c, h, t.dest(c))
	if code != granted {
		t.fell(fmt.Sprintf("reply 00 under method %02x", h.method), "reply %02x", code)
	}
	w.close()
}

// refusedAtOnce demands a reply to settings without a request behind them.
func (t *trial) refusedAtOnce(c *child, h framing, what string, code byte) {
	w := t.settle(c, h)
	w.replied(what, code)
	w.close()
}

func (t *trial) refusesDest(c *child, dest string) {
	w, code := t.ask(c, dest)
	if code != notAllowed {
		t.fell("reply 02 to the destination "+dest, "reply %02x", code)
	}
	w.close()
}

// bound ends the case for a free factory.
func (t *trial) bound(c *child) {
	if !t.method(c).bound() {
		t.cannot("the connection factory is free")
	}
}

// refusesUser connects as another user and demands that nothing comes of it.
func (t *trial) refusesUser(c *child, dial func(method) (net.Conn, error)) {
	m := t.method(c)
	var conn net.Conn
	var refusal error
	t.need(asUser(nobodyUID, func() error {
		conn, refusal = dial(m)
		return nil
	}))
	if refusal != nil {
		t.showText(fmt.Sprintf("client, as user %d: %v", nobodyUID, refusal))
		return
	}
	w := t.wire(fmt.Sprintf("client, as user %d,", nobodyUID), conn, nil)
	w.send(greeting(none))
	b, err := w.try(1, t.suite.patience)
	if len(b) > 0 || errors.Is(err, os.ErrDeadlineExceeded) {
		t.fell("the end of a connection of another user", "% x, %v", b, err)
	}
}
