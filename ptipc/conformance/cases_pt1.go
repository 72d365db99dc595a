package conformance

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"pthost/ptipc/proc"
)

// managedCases are those of a dialect for managed transports. Many of them are asked as
// in the dialect Seed. Their level is another: a MUST is what the protocol's own
// documents demand of a transport, everything else that pt1.md demands of ours is a
// SHOULD (section 5 there).
func managedCases(dialect string) []Case {
	seed := Cases(Seed)
	client := slices.Concat(
		as(Must, seed, Client, "LIFE-1/ready"),
		orderCases,
		methodCases,
		as(Must, seed, Client, "LINE-5/address", "LINE-7/listening", "LINE-7/last"),
	)
	if dialect == PT1 {
		client = append(client, argumentCases...)
	} else {
		client = append(client, parameterCases...)
	}
	client = slices.Concat(client,
		handshakeCases,
		as(Must, seed, Client, "SOCKS-7/commands", "SOCKS-7/address-types"),
		as(Should, seed, Client, "SOCKS-8/bound-address", "SOCKS-9/others-go-on", "SOCKS-9/silence-ends", "SOCKS-10/many", "SOCKS-10/out-of-descriptors"),
		as(Should, seed, Client, "SOCKS-14/hang-up", "SOCKS-14/end-without-early-data", "SOCKS-14/end-after-early-data"),
		as(Should, seed, Client, "SOCKS-15/client-first", "SOCKS-15/far-end-first", "SOCKS-15/broken-far-end", "SOCKS-15/broken-client"),
		as(Should, seed, Client, "SOCKS-17/other-user", "SOCKS-22/descriptors", "ERR-1/refused"),
		managedProxyCases,
		as(Must, seed, Client, "PROXY-1/not-around", "PROXY-1/failing", "PROXY-1/unreachable", "PROXY-3/password", "PROXY-1/nothing-around", "PROXY-3/nothing-looked-up"),
		as(Should, seed, Client, "PROXY-3/name", "PROXY-3/secret"),
	)
	if dialect == PT1 { // flags have no source address
		client = append(client, sourceCases...)
	}
	staying := slices.Concat(
		managedEndCases,
		as(Must, seed, Client, "LIFE-8/files", "LIFE-8/watched"),
		locationCases,
		as(Must, seed, Client, "LIFE-11/loopback", "LIFE-11/watched"),
		managedLineCases,
		as(Must, seed, Client, "LINE-9/log", "LINE-10/status"),
	)
	server := slices.Concat(
		as(Must, seed, Client, "LIFE-1/ready"),
		orderCases, managedServerOrderCases,
		managedServerCases,
		as(Must, seed, Server, "SRV-1/last"),
		as(Should, seed, Server, "SRV-3/half-close"),
	)
	return slices.Concat(client, staying, in(Server, slices.Concat(server, staying)))
}

// as returns cases by their names, as clients are asked, at another level.
func as(level Level, from []Case, role string, names ...string) []Case {
	var cases []Case
	for _, c := range from {
		if c.Role == role && slices.Contains(names, c.Name) {
			c.Level, c.Role = level, Client
			cases = append(cases, c)
		}
	}
	if len(cases) != len(names) {
		panic(fmt.Sprintf("some of these cases are not there: %q", names)) // every run calls this
	}
	return cases
}

// orderCases are about what a parent tells any managed transport.
var orderCases = []Case{
	must("PT1-1/version-list", func(t *trial) {
		t.starts(launch{tell: func(o order) { o[varVersion] = "65000,this_is_a_valid_ver," + o[varVersion] + ",1a" }})
	}),
	must("PT1-1/no-version", func(t *trial) {
		t.refusesOrder("VERSION-ERROR", "the parent speaks version 65000 alone", func(o order) { o[varVersion] = "65000" })
	}),
	must("PT1-1/without-version", func(t *trial) {
		t.refusesOrder("VERSION-ERROR or ENV-ERROR", "no version is offered", func(o order) { delete(o, varVersion) })
	}),
	should("PT1-1/without-transports", func(t *trial) {
		t.refusesOrder("ENV-ERROR", "no transport is named", func(o order) { delete(o, varClients); delete(o, varServers) })
	}),
	must("PT1-20/version-first", func(t *trial) {
		const expected = "VERSION and one of the versions that are offered, before any line but LOG and STATUS"
		var offered string
		c, _ := t.working(launch{tell: func(o order) { offered = o[varVersion] }})
		for _, line := range c.lines() {
			keyword, version, _ := strings.Cut(line.text, " ")
			switch {
			case keyword == "LOG" || keyword == "STATUS":
				continue
			case keyword != "VERSION" || !slices.Contains(strings.Split(offered, ","), version):
				t.fell(expected, "%q", line.text)
			}
			return
		}
		t.fell(expected, "no other line")
	}),
	must("PT1-21/unknown-transport", func(t *trial) {
		unknown := grease()
		_, works := t.working(launch{tell: func(o order) {
			for _, names := range []string{varClients, varServers} {
				if o[names] != "" {
					o[names] = unknown + "," + o[names]
				}
			}
		}})
		works()
	}),
}

// methodCases are about what a client announces.
var methodCases = []Case{
	must("PT1-8/form", func(t *trial) {
		form := regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_]* (?:socks[45]|transparent-TCP|transparent-UDP|STUN) [^ ]+(?: .*)?$`)
		for _, line := range t.child().with("CMETHOD") {
			if !form.MatchString(line) || t.suite.subject.Dialect == PT1 && !strings.Contains(line, " socks") {
				t.fell("CMETHOD NAME PROTOCOL ADDR, where PROTOCOL is socks5 or socks4, or one more of PT 2", "CMETHOD %s", line)
			}
		}
	}),
}

// argumentCases are about methods and arguments of PT 1.0.
var argumentCases = []Case{
	must("PT1-22/each-alone", func(t *trial) { t.choosesAlone(password, none) }),
	should("PT1-22/password-first", func(t *trial) {
		c := t.child()
		for _, offered := range [][]byte{{none, password}, {password, none}, {0x77, none, password}} {
			w := t.dial(c)
			w.send(greeting(offered...))
			w.chosen(password)
			w.close()
		}
	}),
	must("PT1-22/none-known", func(t *trial) { t.choosesNone() }),
	must("PT1-3/username", func(t *trial) {
		for _, text := range []string{"a=b", filling(255)} {
			t.takesArguments(login(text, "\x00"), fmt.Sprintf("arguments of %d bytes and a password of one NUL", len(text)))
		}
	}),
	must("PT1-3/both", func(t *trial) {
		for _, size := range []int{256, 300, 510} {
			text := filling(size)
			t.takesArguments(login(text[:255], text[255:]), fmt.Sprintf("arguments of %d bytes, split after the first 255", size))
		}
	}),
	must("PT1-2/escapes", func(t *trial) {
		t.takesArguments(login(`gr\=ease=a\\b\;c\=d\\;again=1`, "\x00"), `arguments with \ before \, ; and =`)
	}),
	should("PT1-2/any-escape", func(t *trial) {
		t.takesArguments(login(`grease=a\:b\c`, "\x00"), `arguments with \ before other characters`)
	}),
	should("PT1-2/refused", func(t *trial) {
		c := t.child()
		for _, text := range []string{"grease", "=grease", "a=b;", `a=b\`, "a=b;;c=d"} {
			w := t.dial(c)
			w.send(greeting(password))
			w.chosen(password)
			w.send(login(text, "\x00"))
			if b := w.read(2, "a status of RFC 1929"); b[1] == 0 {
				t.fell(fmt.Sprintf("a status that is not 0 for %q, which is no list of arguments", text), "% x", b)
			}
			w.close()
		}
	}),
}

// parameterCases are about methods and settings of PT 2.0 to 3.0.
var parameterCases = []Case{
	must("PT1-15/each-alone", func(t *trial) { t.choosesAlone(lengthOnly, none) }),
	should("PT1-15/settings-win", func(t *trial) {
		c := t.child()
		for _, offered := range [][]byte{{none, lengthOnly}, {lengthOnly, none}, {0x77, none, lengthOnly}} {
			w := t.dial(c)
			w.send(greeting(offered...))
			w.chosen(lengthOnly)
			w.close()
		}
	}),
	must("PT1-15/none-known", func(t *trial) { t.choosesNone() }),
	must("PT1-15/no-reply-between", func(t *trial) {
		c := t.child()
		rest, _ := t.connectionSettings()
		text, err := json.Marshal(rest)
		t.need(err)
		w := t.settle(c, framing{lengthOnly, lengthForm(string(text))})
		w.send(request(t.dest(c)))
		w.replied("settings with a length, and a request", granted)
	}),
	should("SOCKS-6/not-json", func(t *trial) {
		c := t.child()
		for _, text := range []string{"[]", "1", `{"a":}`, "{\"a\":\"\xff\"}", "{} {}", "nonsense"} {
			t.refusedAtOnce(c, framing{lengthOnly, lengthForm(text)}, fmt.Sprintf("%q as settings", text), notJSON)
		}
	}),
	should("SOCKS-3/promised", func(t *trial) {
		c := t.child()
		t.refusedAtOnce(c, framing{lengthOnly, []byte{0, 0xff, 0xff, 0xff}}, "a length of 16 MiB", tooLarge)
		t.refusedAtOnce(c, framing{lengthOnly, []byte{0xff, 0xff, 0xff, 0xff}}, "a length of 4 GiB", tooLarge)
	}),
}

// handshakeCases are about how the bytes of a handshake come, and where it leads.
var handshakeCases = []Case{
	must("SOCKS-5/byte-by-byte", func(t *trial) {
		c := t.child()
		h := t.usual()
		w := t.dial(c)
		trickle := func(b []byte) {
			for _, one := range b {
				w.send([]byte{one})
				t.pause()
			}
		}
		trickle(greeting(h.method))
		w.chosen(h.method)
		trickle(h.bytes)
		if h.method == password {
			w.bytes([]byte{1, 0}, "01 00 in answer to username and password")
		}
		trickle(request(t.dest(c)))
		w.replied("a handshake that comes byte by byte", granted)
	}),
	should("SOCKS-5/one-segment", func(t *trial) {
		c := t.child()
		h := t.usual()
		w := t.dial(c)
		w.send(greeting(h.method), h.bytes, request(t.dest(c)), []byte("early"))
		w.chosen(h.method)
		if h.method == password {
			w.bytes([]byte{1, 0}, "01 00 in answer to username and password")
		}
		w.replied("a handshake in one segment", granted)
		if !t.method(c).bound() || t.suite.echoes() {
			w.bytes([]byte("early"), "the early data back from the echo server")
		}
	}),
	must("PT1-22/bytes", func(t *trial) {
		const size = 4 << 20 // more than fits into buffers on the way
		c := t.child()
		t.echoing(c)
		w := t.open(c, t.dest(c))
		_ = w.conn.SetDeadline(time.Now().Add(t.suite.patience + limit))
		want := make([]byte, size)
		for i := range want {
			want[i] = byte(i % 251)
		}
		go func() { _, _ = w.conn.Write(want) }() // what is missing shows below
		got := make([]byte, size)
		n, err := io.ReadFull(w.conn, got)
		if err != nil {
			t.fell("4 MiB back from the echo server", "%d bytes, %v", n, err)
		}
		if string(got) != string(want) {
			t.fell("the same bytes back from the echo server", "others")
		}
	}),
	must("PT1-23/destination", func(t *trial) { t.reaches("127.0.0.1") }),
	must("SOCKS-13/name", func(t *trial) { t.reaches("localhost") }),
	must("PT1-22/failure", func(t *trial) {
		c := t.child()
		t.connects()
		if w, code := t.ask(c, t.nobody()); code == granted {
			t.fell("a reply that is not 00 for a server where nobody listens", "reply %02x", code)
		} else {
			w.close()
		}
	}),
}

// managedProxyCases are about the upstream proxy of a managed transport.
var managedProxyCases = []Case{
	must("PT1-24/answered", func(t *trial) {
		c := t.start(launch{host: map[string]any{"proxy": "socks5://" + t.upstream("", "", dialer).addr()}})
		const expected = "PROXY DONE before the first CMETHOD, or PROXY-ERROR, no CMETHOD and an exit"
		ready := t.settled(c)
		for _, line := range c.lines() {
			switch keyword, _, _ := strings.Cut(line.text, " "); {
			case line.text == "PROXY DONE" && ready:
				return
			case keyword == "CMETHOD" || keyword == "CMETHODS":
				t.fell(expected, "%q", line.text)
			}
		}
		if len(t.saidWith(c, "PROXY-ERROR")) == 0 {
			t.fell(expected, "neither")
		}
		t.ends(c, "after PROXY-ERROR")
	}),
	must("PT1-24/unusable", func(t *trial) {
		for _, url := range []string{"gopher://" + t.nobody(), "socks5://", "nonsense"} {
			t.showText("proxy " + url)
			c := t.start(launch{host: map[string]any{"proxy": url}})
			if t.settled(c) {
				t.fell("PROXY-ERROR or ENV-ERROR and an exit for the proxy URL "+url, "it got ready")
			}
			if len(t.saidWith(c, "PROXY-ERROR"))+len(t.saidWith(c, "ENV-ERROR")) == 0 {
				t.fell("PROXY-ERROR or ENV-ERROR for the proxy URL "+url, "neither")
			}
			t.ends(c, "for the proxy URL "+url)
		}
	}),
}

// sourceCases are about the address that a client's wire goes out from.
var sourceCases = []Case{
	should("PT1-24/source-address", func(t *trial) {
		const source = "127.0.0.9"
		t.connects()
		c := t.ready(launch{tell: func(o order) { o[varBindV4] = source }})
		y := t.canary()
		w := t.begin(c)
		w.send(request(y.addr()))
		if from := y.from(t); !strings.HasPrefix(from, source+":") {
			t.fell("a connection from "+source, "one from %s", from)
		}
	}),
}

// managedEndCases are about the end of a managed transport.
var managedEndCases = []Case{
	should("PT1-29/stdin", func(t *trial) {
		c, _ := t.working(launch{})
		t.closeStdin(c)
		t.exit(c, "at the end of standard input, which is asked for", 0)
	}),
	must("PT1-29/not-asked", func(t *trial) {
		for _, tell := range []func(order){
			func(o order) { delete(o, varExit) },
			func(o order) { o[varExit] = "0" },
		} {
			c, works := t.working(launch{tell: tell})
			t.closeStdin(c)
			t.moment(c)
			if c.ended() {
				t.fell("a child that goes on after the end of standard input, which was not to end it", "%v", c.proc.Err())
			}
			works()
			t.terminate(c)
			t.until(c.ended) // that it does, another case says
		}
	}),
	should("PT1-29/sigterm", func(t *trial) {
		c, _ := t.working(launch{})
		t.terminate(c)
		t.exit(c, "on SIGTERM", 0)
	}),
	should("PT1-29/sigint", func(t *trial) {
		c, _ := t.working(launch{})
		t.interrupt(c)
		t.ends(c, "on SIGINT")
	}),
	should("PT1-29/open-connection", func(t *trial) {
		for _, ask := range []func(*child){t.closeStdin, t.terminate} {
			c, hangUp := t.occupied()
			ask(c)
			hangUp()
			t.exit(c, "once the open connection has ended", 0)
		}
	}),
	slow(should("PT1-29/lingering", func(t *trial) {
		c, _ := t.occupied()
		t.closeStdin(c)
		select {
		case <-c.proc.Done():
		case <-time.After(limit):
		case <-t.ctx.Done():
		}
		t.exit(c, "10 seconds after the end of standard input, whatever is open", 0)
	})),
}

// locationCases are about the state location of a managed transport.
var locationCases = []Case{
	should("PT1-30/created", func(t *trial) {
		_, works := t.working(launch{tell: func(o order) { o[varState] = filepath.Join(o[varState], "pt_state", "own") }})
		works()
	}),
}

// managedLineCases look at everything that the children of this run have written.
var managedLineCases = []Case{
	must("PT1-20/lines", func(t *trial) {
		form := regexp.MustCompile(`^[A-Za-z0-9_-]+(?: [\x01-\x7f]*)?$`)
		for _, line := range t.everything() {
			if line.cut || !form.MatchString(line.text) {
				t.fell("a keyword, and nothing or a space and arguments, in ASCII without NUL, that ends in LF", "%q", line.text[:min(len(line.text), 4*shownBytes)])
			}
		}
	}),
}

// saidWith returns the lines that begin with a keyword. A child of PT 2 may write errors
// on standard error (PT1-16).
func (t *trial) saidWith(c *child, keyword string) []string {
	said := c.with(keyword)
	if t.suite.subject.Dialect == PT2 {
		for _, line := range c.stderr() {
			if k, rest, _ := strings.Cut(line, " "); k == keyword {
				said = append(said, rest)
			}
		}
	}
	return said
}

// refusesOrder demands that a child which cannot use what it is told says so with one of
// the keywords, announces nothing, and exits.
func (t *trial) refusesOrder(keywords, when string, tell func(order)) {
	c := t.start(launch{tell: tell})
	if t.settled(c) {
		t.fell(keywords+" when "+when, "the child got ready")
	}
	t.ends(c, "when "+when)
	said := 0
	for keyword := range strings.SplitSeq(keywords, " or ") {
		said += len(t.saidWith(c, keyword))
	}
	if said == 0 {
		t.fell(keywords+" when "+when, "neither this nor a method")
	}
}

// ends demands an exit, with whatever code: the protocol has none.
func (t *trial) ends(c *child, when string) {
	if !t.until(c.ended) {
		t.fell("an exit "+when, "it still runs after %v", t.suite.patience)
	}
	var exit *proc.ExitError
	if err := c.proc.Err(); err != nil && !errors.As(err, &exit) {
		t.fell("an exit "+when, "%v", err)
	}
}

// interrupt sends SIGINT to the child alone.
func (t *trial) interrupt(c *child) {
	process, err := os.FindProcess(c.proc.Pid())
	t.need(err)
	t.showText("SIGINT")
	t.need(process.Signal(os.Interrupt))
}

// moment gives a child the time to do what it should not do.
func (t *trial) moment(c *child) {
	select {
	case <-c.proc.Done():
	case <-time.After(3 * quiet):
	case <-t.ctx.Done():
	}
}

// occupied is a child of the subject's role with an open connection, and what hangs up.
func (t *trial) occupied() (c *child, hangUp func()) {
	if t.suite.subject.Role == Server {
		s := t.serve()
		p := s.open()
		return s.child, p.close
	}
	c = t.ready(launch{})
	w := t.open(c, t.dest(c))
	return c, w.close
}

func (t *trial) choosesAlone(methods ...byte) {
	c := t.child()
	for _, method := range methods {
		w := t.dial(c)
		w.send(greeting(method))
		w.chosen(method)
		w.close()
	}
}

func (t *trial) choosesNone() {
	w := t.dial(t.child())
	w.send(greeting(0x77, 0xfe))
	w.chosen(refused)
	w.end("the end of the connection after method ff")
}

// filling are arguments of so many bytes, of which most readers know none.
func filling(size int) string { return "grease=" + strings.Repeat("x", size-len("grease=")) }

// takesArguments demands the status of RFC 1929 that says that they can be read. What
// the transport thinks of them is told by the reply.
func (t *trial) takesArguments(message []byte, what string) {
	w := t.dial(t.child())
	w.send(greeting(password))
	w.chosen(password)
	w.send(message)
	w.bytes([]byte{1, 0}, "01 00 in answer to "+what)
	w.close()
}

// A canary is a server that only tells who has come.
type canary struct {
	*farEnd
	came chan net.Addr
}

func (t *trial) canary() *canary {
	y := &canary{came: make(chan net.Addr, 1)}
	var err error
	y.farEnd, err = newFarEnd(func(conn *net.TCPConn) {
		select {
		case y.came <- conn.RemoteAddr():
		default:
		}
	})
	t.need(err)
	t.onEnd(y.close)
	return y
}

// from is the address of who comes first.
func (y *canary) from(t *trial) string {
	select {
	case from := <-y.came:
		return from.String()
	case <-time.After(t.suite.patience):
	case <-t.ctx.Done():
	}
	t.fell("a connection to "+y.addr(), "none in %v", t.suite.patience)
	return ""
}

// reaches demands that the wire goes where CONNECT says. Whoever is there hangs up: that
// somebody comes is all that is asked for.
func (t *trial) reaches(host string) {
	c := t.child()
	t.connects()
	y := t.canary()
	_, port, _ := net.SplitHostPort(y.addr())
	w := t.begin(c)
	w.send(request(net.JoinHostPort(host, port)))
	y.from(t)
	w.close()
}
