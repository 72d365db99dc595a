package hosts

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"syscall"
	"time"

	"pthost/ptipc/conformance"
	"pthost/ptipc/localnet"
)

const (
	must   = conformance.Must
	should = conformance.Should

	// floodSize is what a flooding child writes, and bounded how much memory a host may
	// take for it.
	floodSize = 64 << 20
	bounded   = 32 << 20
	// signalSize is the same for signals, which cost a host more than other lines.
	signalSize    = 32 << 20
	signalBounded = 24 << 20
	// floodTimeout is how long a host is looked at that goes on reading.
	floodTimeout = 30 * time.Second
	// quiet is for how long nothing must happen.
	quiet = 1500 * time.Millisecond
	// finish is how long a child that is stopped in order takes, which a host allows.
	finish = 200 * time.Millisecond
)

// settings are what HOST.json has for a connection, with what is hard to carry.
var settings = object{"text": "ü \"} {\\", "list": []any{1.0, true, nil, object{}}, "long": strings.Repeat("x", 3000)}

// probes are all cases, in the order of the clauses.
var probes = slices.Concat(argProbes, lineProbes, announceProbes, lifeProbes, socksProbes, otherProbes)

// asItIs leaves HOST.json as it is, for a case that asks what is in it.
func asItIs(*trial) {}

var argProbes = []probe{
	{name: "ARG-1/form", level: must, in: Seed, check: func(t *trial) {
		t.start()
		args := t.event("start", 1).Args
		rest := args
		if len(rest) > 0 && rest[0] == "client" {
			rest = rest[1:]
		}
		form := len(rest) == 1 && (rest[0] == "-" || isObject([]byte(rest[0]))) ||
			len(rest) == 2 && isObject([]byte(rest[0])) && isObject([]byte(rest[1]))
		if !form {
			t.fell("the child is started as EXE [ROLE] CONFIG [HOST]", "its arguments are %q", args)
		}
	}},
	{name: "ARG-3/config", level: must, in: Seed, write: func(t *trial) {
		t.transport()["config"] = object{"secret": secret, "hard": settings}
	}, check: func(t *trial) {
		t.start()
		first := t.event("first", 1)
		var got, want any
		text, _ := json.Marshal(t.transport()["config"]) // it is made of JSON's types
		_ = json.Unmarshal(text, &want)
		if first.Text != "" || json.Unmarshal([]byte(first.Settings), &got) != nil || !reflect.DeepEqual(got, want) {
			t.fell("the child gets the configuration as it stands", "%s%s", first.Text, cut(first.Settings))
		}
	}},
	{name: "ARG-4/secret", level: must, in: Seed, write: asItIs, check: func(t *trial) {
		t.up()
		start := t.event("start", 1)
		if !slices.Contains(start.Args, "-") {
			t.fell("a child that takes - has its configuration on standard input", "its arguments are %q", start.Args)
		}
		for _, p := range t.survivors() {
			if strings.Contains(p.cmdline, secret) {
				t.fell("the configuration stands on no command line", "it is on that of process %d", p.pid)
			}
		}
	}},
	{name: "ARG-5/version", level: must, in: Seed, write: func(t *trial) {
		t.transport()["config_via"] = "argv"
	}, child: script{deaf: true}, check: func(t *trial) {
		t.start()
		args := t.event("start", 1).Args
		var host struct {
			Version []int `json:"version"`
		}
		if len(args) < 2 || json.Unmarshal([]byte(args[len(args)-1]), &host) != nil || !slices.Contains(host.Version, 1) {
			t.fell("HOST names the version 1", "the arguments are %q", args)
		}
	}},
	{name: "ARG-6/plain", level: must, in: Seed, write: func(t *trial) {
		t.transport()["plain"] = true
	}, check: func(t *trial) {
		t.up()
		if args := t.event("start", 1).Args; len(args) != 1 || !isObject([]byte(args[0])) {
			t.fell("a child that was not declared to take HOST or - is started as EXE CONFIG", "its arguments are %q", args)
		}
	}},
	{name: "ARG-7/deaf", level: must, in: Seed, child: script{deaf: true}, write: func(t *trial) {
		t.transport()["config"] = object{"long": strings.Repeat("x", 300<<10)} // more than a pipe holds
	}, check: func(t *trial) {
		h := t.up()
		t.stop(h)
		t.nobodyLeft("after the host's end")
	}},
}

// withTraffic is held when the host gets along with the child's lines.
func withTraffic(t *trial) { t.up() }

// inMemory measures the host's memory while the child does something, and demands that
// traffic still goes through it.
func inMemory(t *trial, size, bound int64) {
	h := t.up()
	before := t.memory(h)
	t.begin()
	began := time.Now()
	last, read := began, 0 // when the child could write last, and how many MiB
	var most int64
	stuck := func() bool { return h.hasEnded() || time.Since(last) > t.suite.patience }
	t.within(floodTimeout, func() bool {
		most = max(most, t.memory(h)-before)
		if n := len(t.told("written")); n > read {
			last, read = time.Now(), n
		}
		return most > bound || len(t.told("wrote")) > 0 || stuck()
	})
	took := time.Since(began).Round(time.Second)
	switch {
	case most > bound:
		t.fell(fmt.Sprintf("memory stays bounded while the child writes %d MiB", size>>20), "the host grew by %d MiB when it had read %d", most>>20, read)
	case len(t.told("wrote")) > 0:
		t.traffic()
	case stuck():
		t.fell("the host reads all that the child writes", "in %v it has read %d of %d MiB, and then nothing more; %s", took, read, size>>20, t.state())
	case int64(read)<<20 > bound:
		t.traffic() // this machine has much else to do; a host that keeps all would have grown by more
	default:
		t.cannot("in %v the host has read %d of %d MiB, and goes on reading", took, read, size>>20)
	}
}

// goFile tells the child to begin.
const goFile = "go"

func (t *trial) begin() { t.need(os.WriteFile(filepath.Join(t.dir, goFile), nil, 0o600)) }

// awaitGo waits until the suite wants the child to begin.
func (k *kid) awaitGo() {
	for {
		if _, err := os.Stat(filepath.Join(k.dir, goFile)); err == nil {
			return
		}
		time.Sleep(5 * time.Millisecond)
	}
}

func floods(name string, write func(k *kid)) probe {
	return probe{name: name, level: must, heavy: true, child: script{ready: func(k *kid) {
		k.awaitGo()
		write(k)
		k.tell(event{What: "wrote"})
	}}, check: func(t *trial) { inMemory(t, floodSize, bounded) }}
}

// garbage is no control line, and malformed begins like one.
const (
	garbage   = "\n \r\n\x00\x01\x02\n?no keyword, this!\n=\n\xc3\x28 not UTF-8\n\u202e\n"
	malformed = "CMETHOD\xff\xfe\nCMETHOD\x00 x\nCMETHODS\x00DONE\nVERSION\t2\n"
)

// strews is a case of lines that have to be passed over, wherever they come.
func strews(name string, lines ...string) probe {
	return probe{name: name, level: must, child: script{announce: func(k *kid) {
		k.say(lines...)
		k.hello()
		k.say(lines...)
		k.method(k.addr)
		k.say(lines...)
		k.say("CMETHODS DONE")
		k.say(lines...)
	}}, check: withTraffic}
}

// logs is a case of a line LOG.
func logs(name, severity string) probe {
	return probe{name: name, level: must, child: script{ready: func(k *kid) {
		k.say("LOG SEVERITY=" + severity + ` MESSAGE="the wire \"\303\251\" is cut"`)
	}}, check: func(t *trial) {
		h := t.start()
		t.event("start", 1)
		if !t.until(func() bool { return h.out.has("the wire ") && h.out.has("is cut") }) {
			t.fell("what the child logs reaches the operator, on the host's output", "it does not")
		}
	}}
}

var lineProbes = []probe{
	{name: "LINE-1/too-long", level: must, child: script{announce: func(k *kid) {
		k.hello()
		k.say("LOG SEVERITY=info MESSAGE=" + strings.Repeat("x", 200<<10))
		k.say(strings.Repeat("CMETHODS DONE ", 20<<10))
		k.method(k.addr)
		k.say("CMETHODS DONE")
	}}, check: withTraffic},
	strews("LINE-1/garbage", garbage),
	strews("LINE-1/malformed", malformed),
	{name: "LINE-1/crlf", level: must, child: script{announce: func(k *kid) {
		k.say("VERSION 1\r")
		if k.host.Proxy != "" {
			k.say("PROXY DONE\r")
		}
		k.say("CMETHOD "+k.name()+" socks5 "+k.addr+"\r", "CMETHODS DONE\r")
	}}, check: withTraffic},
	{name: "LINE-1/pieces", level: must, child: script{announce: func(k *kid) {
		k.hello()
		for _, b := range []byte("CMETHOD " + k.name() + " socks5 " + k.addr + "\nCMETHODS DONE\n") {
			_, _ = os.Stdout.Write([]byte{b})
			time.Sleep(time.Millisecond)
		}
	}}, check: withTraffic},
	floods("LINE-1/endless", func(k *kid) { k.flood(os.Stdout, floodSize, strings.Repeat("LOG-without-an-end", 500)) }),
	strews("LINE-2/unknown-keyword", "GREASE", "GREASE-2 a=b c", "grease", "METHOD "+probeName+" socks5 203.0.113.1:80"),
	strews("LINE-2/like-a-known-one", "CMETHODS-DONE", "CMETHODX", "VERSIONS 7", "LOGS", "CMETHODS_DONE DONE"),
	{name: "LINE-2/unknown-args", level: must, child: script{args: "grease=1,bound-not=1,x=\\,"}, check: withTraffic},
	{name: "LINE-3/log-first", level: must, child: script{announce: func(k *kid) {
		k.say("LOG SEVERITY=notice MESSAGE=hello", "STATUS TRANSPORT="+k.name()+" PROGRESS=1")
		k.announce(k.addr)
	}}, check: withTraffic},
	{name: "LINE-3/no-version", level: should, child: script{announce: func(k *kid) {
		if k.host.Proxy != "" {
			k.say("PROXY DONE")
		}
		k.method(k.addr)
		k.say("CMETHODS DONE")
	}}, check: withTraffic},
	logs("LINE-9/log", "warning"),
	logs("LINE-9/any-case", "Warning"),
	floods("LIFE-10/stdout", func(k *kid) {
		k.flood(os.Stdout, floodSize, "LOG SEVERITY=debug MESSAGE=\""+strings.Repeat("flood ", 20)+"\"\n")
	}),
	floods("LIFE-10/stderr", func(k *kid) { k.flood(os.Stderr, floodSize, strings.Repeat("flood ", 20)+"\n") }),
	floods("LIFE-10/stderr-endless", func(k *kid) { k.flood(os.Stderr, floodSize, strings.Repeat("flood ", 200)) }),
}

// announces is a case of an address that a host has to refuse (LINE-5).
func announces(name string, addr func(k *kid) string) probe {
	return probe{name: name, level: must, child: script{announce: func(k *kid) { k.announce(addr(k)) }}, check: func(t *trial) {
		t.refused("announces such an address")
	}}
}

// port is that of the child's own socket.
func port(k *kid) string {
	_, p, _ := net.SplitHostPort(k.addr)
	return p
}

// gives is a case of a child that gives up but does not end.
func gives(name string, level conformance.Level, lines func(k *kid) []string, check func(t *trial)) probe {
	return probe{name: name, level: level, child: script{announce: func(k *kid) { k.say(lines(k)...) }}, check: check}
}

// heard demands that a text of the child's reaches the operator.
func heard(text string) func(t *trial) {
	return func(t *trial) {
		h := t.start()
		t.event("start", 1)
		if !t.until(func() bool { return h.out.has(text) }) {
			t.fell(fmt.Sprintf("the child's error, %q, reaches the operator, on the host's output", text), "it does not; %s", t.state())
		}
	}
}

var announceProbes = []probe{
	announces("LINE-5/public-address", func(*kid) string { return "203.0.113.1:1080" }),
	announces("LINE-5/any-address", func(k *kid) string { return "0.0.0.0:" + port(k) }),
	announces("LINE-5/name", func(k *kid) string { return "localhost:" + port(k) }),
	announces("LINE-5/port-0", func(*kid) string { return "127.0.0.1:0" }),
	announces("LINE-5/unix-slash", func(*kid) string { return "unix:../control.sock" }),
	announces("LINE-5/unix-absolute", func(*kid) string { return "unix:/tmp/probe.sock" }),
	announces("LINE-5/unix-parent", func(*kid) string { return "unix:.." }),
	{name: "LINE-5/unix", level: must, in: Seed, child: script{unix: true}, check: withTraffic},
	{name: "LINE-7/nobody-listens", level: should, child: script{announce: func(k *kid) { k.announce("127.0.0.1:9") }}, check: func(t *trial) {
		t.refused("announces a socket at which nobody listens")
	}},
	gives("LINE-7/nothing-offered", should, func(*kid) []string { return []string{"VERSION 1", "CMETHODS DONE"} }, func(t *trial) {
		t.refused("offers nothing")
	}),
	gives("LINE-8/text", must, func(k *kid) []string {
		return []string{"VERSION 1", "CMETHOD-ERROR " + k.name() + " no luck today: {", "CMETHODS DONE"}
	}, heard("no luck today")),
	gives("LINE-8/json", must, func(k *kid) []string {
		return []string{"VERSION 1", "CMETHOD-ERROR " + k.name() + ` {"class":1,"message":"the moon is in the way"}`, "CMETHODS DONE"}
	}, heard("the moon is in the way")),
	{
		name: "ERR-3/pointer", level: must, in: Seed, child: script{announce: func(k *kid) {
			k.say("VERSION 1", "CMETHOD-ERROR "+k.name()+` {"class":19,"message":"the configuration","pointer":"/conform/7","value":"\"v4lue\"","problem":"is strange","remedy":"make it less so"}`, "CMETHODS DONE")
		}},
		check: func(t *trial) {
			for _, text := range []string{"/conform/7", "v4lue", "is strange", "make it less so"} {
				if len(t.hosts) == 0 {
					heard(text)(t)
				} else if !t.until(func() bool { return t.hosts[0].out.has(text) }) {
					t.fell(fmt.Sprintf("pointer, value, problem and remedy reach the operator, and %q is one of them", text), "it is not on the host's output")
				}
			}
		},
	},
	gives("LINE-11/version-error", must, func(*kid) []string { return []string{"VERSION-ERROR no-version"} }, func(t *trial) {
		t.refused("speaks none of its versions")
	}),
	gives("LINE-11/env-error", must, func(*kid) []string { return []string{"VERSION 1", "ENV-ERROR the moon is missing"} }, func(t *trial) {
		t.refused("cannot use its environment")
	}),
	{name: "PROXY-2/not-done", level: must, proxied: true, child: script{noProxy: true}, check: unproxied},
	{name: "PROXY-2/error", level: must, proxied: true, child: script{announce: func(k *kid) {
		k.say("VERSION 1", "PROXY-ERROR it is the wrong colour")
		k.method(k.addr)
		k.say("CMETHODS DONE")
	}}, check: unproxied},
	{
		name: "SOCKS-18/stranger", level: must, child: script{announce: func(k *kid) { k.announce(k.order.Other) }},
		check: func(t *trial) { t.refused("announces a socket of another process") },
	},
}

// unproxied demands that nothing goes through a child that does not use the proxy.
func unproxied(t *trial) {
	t.start()
	t.event("start", 1)
	used := func() bool { return len(t.told("greeting")) > 0 }
	t.poke(quiet, func() bool { return used() || t.hosts[0].hasEnded() })
	if used() {
		t.fell("no traffic for a child that has not written PROXY DONE", "the host connects to it")
	}
}

// exits is a case of a child that ends by itself with a code that is final.
func exits(code int) probe {
	return probe{name: fmt.Sprintf("LIFE-6/exit-%d", code), level: must, child: script{ready: func(k *kid) {
		k.awaitGo()
		k.exit(code)
	}}, check: func(t *trial) {
		t.up()
		t.begin()
		t.event("exit", 1)
		if t.within(2*quiet, func() bool { return len(t.told("start")) > 1 }) {
			t.fell(fmt.Sprintf("a child that has ended with exit code %d is not started again", code), "it is, after %v",
				t.told("start")[1].At.Sub(t.told("exit")[0].At).Round(time.Millisecond))
		}
	}}
}

// ended is a case of the host's end: by SIGTERM, or killed.
func ended(name string, child script, killed bool) probe {
	return probe{name: name, level: must, child: child, check: func(t *trial) {
		h := t.up()
		if killed {
			t.murder(h)
			t.nobodyLeft("after the host was killed")
			return
		}
		t.stop(h)
		t.nobodyLeft("after the host's end")
	}}
}

var (
	forks    = script{first: func(k *kid) { k.fork(false) }}
	sessions = script{first: func(k *kid) { k.fork(true) }}
	stubborn = script{stubborn: true}
)

var lifeProbes = []probe{
	{name: "LIFE-1/silent", level: must, child: script{stubborn: true, announce: func(*kid) {}}, check: func(t *trial) {
		t.start()
		first := t.event("start", 1)
		expected := "the host stops and reaps a child that never gets ready, in bounded time"
		if !t.within(longest, func() bool { return stateOf(first.Pid) == "" }) {
			t.fell(expected, "after %v it is still there; %s", time.Since(first.At).Round(time.Second), t.state())
		}
	}},
	{name: "LIFE-4/order", level: must, child: script{stubborn: true}, check: func(t *trial) {
		h := t.up()
		t.stop(h)
		eof, term := t.event("eof", 1), t.event("term", 1)
		if term.At.Before(eof.At.Add(finish)) {
			t.fell("the host closes standard input and waits before it sends SIGTERM", "SIGTERM came %v after the end of standard input", term.At.Sub(eof.At).Round(time.Millisecond))
		}
		t.nobodyLeft("after the host's end")
	}},
	{name: "LIFE-4/reaped", level: must, child: script{ready: func(k *kid) {
		k.awaitGo()
		k.exit(1)
	}}, check: func(t *trial) {
		t.up()
		t.begin()
		t.goneChild(t.event("exit", 1).Pid, "the host reaps a child that has ended by itself")
	}},
	ended("LIFE-4/stubborn", stubborn, false),
	ended("LIFE-4/wrapper", script{wrapped: true, stubborn: true}, false),
	ended("LIFE-4/fork", forks, false),
	ended("LIFE-4/setsid", sessions, false),
	ended("LIFE-5/killed", script{}, true),
	ended("LIFE-5/stubborn", stubborn, true),
	ended("LIFE-5/wrapper", script{wrapped: true, stubborn: true}, true),
	ended("LIFE-5/fork", forks, true),
	ended("LIFE-5/setsid", sessions, true),
	{name: "LIFE-5/early", level: must, child: script{stubborn: true, announce: func(*kid) {}}, check: func(t *trial) {
		h := t.start()
		t.event("start", 1)
		t.murder(h)
		t.nobodyLeft("after the host was killed during the start")
	}},
	{name: "LIFE-6/growing", level: must, child: script{ready: func(k *kid) {
		if k.number == 1 {
			k.awaitGo()
		}
		k.exit(1)
	}}, check: func(t *trial) {
		t.up()
		t.begin()
		// The shorter one of two, since a busy machine adds something to each wait. Where waits
		// double with a jitter of a half the fourth and fifth are longer than twice the first
		// two whatever happens, but not the third and fourth.
		var waits []time.Duration
		const least, enough = 5, 6
		longer := false
		t.within(caseTimeout, func() bool {
			starts, exits := t.told("start"), t.told("exit")
			waits = nil
			for i := 1; i < len(starts) && i <= len(exits); i++ {
				waits = append(waits, starts[i].At.Sub(exits[i-1].At).Round(time.Millisecond))
			}
			n := len(waits)
			longer = n >= least && min(waits[n-2], waits[n-1]) >= 2*min(waits[0], waits[1])
			return longer || n >= enough || t.hosts[0].hasEnded()
		})
		switch {
		case longer:
		case len(waits) < least:
			t.cannot("the host has started the child again only %d times, after %v", len(waits), waits)
		default:
			t.fell("the host waits longer after each failure", "it started the child again after %v", waits)
		}
	}},
	exits(64), exits(65), exits(77), exits(78),
	{name: "LIFE-7/other-factories", level: must, in: Seed, child: script{announce: func(k *kid) {
		if k.number == 1 {
			k.announce(k.addr)
			k.awaitGo()
			k.exit(1)
		}
		k.hello()
		k.say("CMETHOD other socks5 "+k.addr, "CMETHODS DONE")
	}}, check: func(t *trial) {
		t.up()
		t.begin()
		if t.until(func() bool { return len(t.told("start")) > 1 || t.hosts[0].hasEnded() }); len(t.told("start")) < 2 {
			t.cannot("the host does not start the child again")
		}
		second := t.event("start", 2)
		t.goneChild(second.Pid, "the host refuses a child that announces other factories than before, and stops it")
	}},
	{name: "LIFE-7/lives-on", level: must, child: script{ready: func(k *kid) {
		if k.number == 1 {
			k.awaitGo()
			k.exit(1)
		}
	}}, check: func(t *trial) {
		t.relayed()
		t.up()
		t.begin()
		t.event("exit", 1)
		t.traffic()
	}},
	{name: "LIFE-8/private", level: must, check: func(t *trial) {
		t.start()
		private(t, t.event("start", 1))
	}},
	{name: "LIFE-8/opened", level: must, write: func(t *trial) {
		state := filepath.Join(t.dir, "data", "state")
		t.need(os.Mkdir(state, 0o700))
		t.need(os.Chmod(state, 0o777)) //nolint:gosec // this is what the host has to notice
		t.transport()["state"] = state
	}, check: func(t *trial) {
		h := t.start()
		t.until(func() bool { return h.hasEnded() || len(t.told("start")) > 0 })
		if told := t.told("start"); len(told) > 0 {
			private(t, told[0])
		}
	}},
	{name: "LIFE-8/second", level: must, write: func(t *trial) {
		t.transport()["state"] = filepath.Join(t.dir, "data", "state")
	}, check: func(t *trial) {
		t.up()
		host, _, _ := net.SplitHostPort(t.front)
		t.config["fronts"].([]any)[0].(object)["listen"] = "tcp://" + net.JoinHostPort(host, "1081")
		t.config["control"] = "unix://" + filepath.Join(t.dir, "control2.sock")
		second := t.start()
		t.until(func() bool { return second.hasEnded() || len(t.told("start")) > 1 })
		if len(t.told("start")) > 1 {
			t.fell("a state directory is kept from a second child", "two children have the same one: %s", t.told("start")[1].Dir)
		}
	}},
}

// private demands that other users cannot get into the child's state directory.
func private(t *trial, start event) {
	if start.Mode&0o077 != 0 {
		t.fell("the state directory is closed to other users", "%s has the permissions %04o", start.Dir, start.Mode)
	}
}

// withSettings puts settings on the suite's connections.
func withSettings(t *trial) {
	t.config["fronts"].([]any)[0].(object)["settings"] = settings
}

// early answers before it has read everything, and is gone.
func early(k *kid, conn net.Conn) {
	head := make([]byte, 2)
	if _, err := io.ReadFull(conn, head); err != nil {
		return // a look
	}
	methods := make([]byte, head[1])
	if _, err := io.ReadFull(conn, methods); err != nil {
		return
	}
	k.tell(event{What: "greeting", Methods: methods})
	method := byte(0)
	if bytes.IndexByte(methods, 0x80) >= 0 {
		method = 0x80
	}
	_, _ = conn.Write([]byte{5, method, 5, 5, 0, 1, 0, 0, 0, 0, 0, 0})
}

var socksProbes = []probe{
	{name: "SOCKS-2/settings", level: must, in: Seed, write: withSettings, check: func(t *trial) {
		t.up()
		r := t.event("request", 1)
		if r.Method != 0x80 && r.Method != 0x09 {
			t.fell("settings travel under method 0x80 or 0x09", "the host offers % x", r.Methods)
		}
		var got any
		if err := json.Unmarshal([]byte(r.Settings), &got); err != nil || !reflect.DeepEqual(got, any(settings)) {
			t.fell("the child gets the settings as they stand", "%s", cut(r.Settings))
		}
	}},
	{name: "SOCKS-7/connect", level: must, check: func(t *trial) {
		t.start()
		if !t.suite.relays() {
			t.event("request", 1)
			return
		}
		t.traffic()
		if g := t.event("greeting", 1); g.Kind != 5 {
			t.fell("the version is 5", "it is %d", g.Kind)
		}
	}},
	{name: "SOCKS-13/name", level: must, check: func(t *trial) {
		t.relayed()
		t.up()
		if r := t.event("request", 1); r.Kind != 3 || r.Dest != destName+":443" {
			t.fell("a name travels as a name", "an address of type %d, %s, for %s:443", r.Kind, r.Dest, destName)
		}
	}},
	{name: "SOCKS-15/half-close", level: must, child: script{relay: func(_ *kid, conn net.Conn) {
		all, err := io.ReadAll(conn)
		if err == nil {
			_, _ = conn.Write(append([]byte("all: "), all...))
		}
	}}, check: func(t *trial) {
		t.relayed()
		conn := t.connected()
		defer conn.Close()
		_, err := conn.Write([]byte("question"))
		t.needOf("the stream takes bytes", err)
		t.needOf("the stream can be ended in one direction", conn.CloseWrite())
		_ = conn.SetReadDeadline(time.Now().Add(t.suite.patience))
		all, err := io.ReadAll(conn)
		if err != nil || string(all) != "all: question" {
			t.fell("the end of one direction goes on, and leaves the other open", "%q, %v", all, err)
		}
	}},
	{name: "SOCKS-15/broken", level: must, child: script{relay: func(k *kid, conn net.Conn) {
		_, _ = conn.Write([]byte("half of"))
		k.awaitGo()
		_ = conn.(*net.TCPConn).SetLinger(0) // a reset
		conn.Close()
	}}, check: func(t *trial) {
		t.relayed()
		conn := t.connected()
		defer conn.Close()
		_ = conn.SetReadDeadline(time.Now().Add(t.suite.patience))
		half := make([]byte, len("half of"))
		_, err := io.ReadFull(conn, half)
		t.needOf("bytes of the child come through", err)
		t.begin()
		if _, err := conn.Read(half); !errors.Is(err, syscall.ECONNRESET) {
			t.fell("a stream that broke does not look like one that ended", "%v, and not a reset", err)
		}
	}},
	{name: "SOCKS-16/early-refusal", level: must, in: Seed, child: script{serve: early}, check: func(t *trial) {
		t.start()
		var got refusal
		if !t.until(func() bool {
			conn, err := t.dial()
			if err == nil {
				conn.Close()
			}
			return errors.As(err, &got) && len(t.told("greeting")) > 0 || t.hosts[0].hasEnded()
		}) || got != 5 {
			t.fell("the reply of a child that did not wait for the request, 5 (refused), reaches the program", "reply %d; %s", got, t.state())
		}
	}},
	{name: "SOCKS-19/no-settings", level: must, in: Seed, check: func(t *trial) {
		t.up()
		if m := t.event("greeting", 1).Methods; bytes.IndexByte(m, 0) < 0 || bytes.ContainsAny(m, "\x09") || bytes.IndexByte(m, 0x80) >= 0 {
			t.fell("method 0x00 when there are no settings", "the host offers % x", m)
		}
	}},
	{name: "SOCKS-19/empty-settings", level: must, in: Seed, write: func(t *trial) {
		t.config["fronts"].([]any)[0].(object)["settings"] = object{}
	}, check: func(t *trial) {
		t.up()
		if m := t.event("greeting", 1).Methods; bytes.IndexByte(m, 0) < 0 || bytes.ContainsAny(m, "\x09") || bytes.IndexByte(m, 0x80) >= 0 {
			t.fell("method 0x00 when the settings are {}", "the host offers % x", m)
		}
	}},
	{name: "SOCKS-9/stalled", level: must, child: script{serve: func(k *kid, conn net.Conn) {
		if len(k.seen("greeting")) == 0 { // the first one gets no answer
			b := make([]byte, 1)
			if _, err := conn.Read(b); err == nil {
				k.tell(event{What: "greeting"})
				_, _ = io.Copy(io.Discard, conn)
			}
			return
		}
		k.serve(conn)
	}}, check: func(t *trial) {
		t.relayed()
		t.start()
		t.until(func() bool {
			conn, err := t.reach()
			if err != nil {
				return t.hosts[0].hasEnded()
			}
			t.onEnd(func() { conn.Close() })
			return true
		})
		t.event("greeting", 1)
		t.traffic()
	}},
	{name: "PT1-3/arguments", level: must, in: PT1, check: func(t *trial) {
		t.up()
		r := t.event("request", 1)
		if r.Method != 2 || !slices.Contains(strings.Split(r.Settings, ";"), "key=value") {
			t.fell("the argument key=value comes as username and password", "methods % x, %q", r.Methods, r.Settings)
		}
	}},
	{name: "PT1-5/step-by-step", level: must, in: PT1, child: script{serve: func(k *kid, conn net.Conn) {
		if err := k.handshake(conn, func() error {
			// What comes within this moment was sent before its turn.
			_ = conn.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
			b := make([]byte, 64)
			n, err := conn.Read(b)
			_ = conn.SetReadDeadline(time.Now().Add(lifetime))
			if n > 0 {
				k.tell(event{What: "ahead", Text: fmt.Sprintf("% x", b[:n])})
				return errors.New("bytes came before their turn")
			}
			if !errors.Is(err, os.ErrDeadlineExceeded) {
				return err
			}
			return nil
		}); err != nil {
			return
		}
		k.tell(event{What: "answered"})
		_, _ = conn.Write([]byte{5, 0, 0, 1, 0, 0, 0, 0, 0, 0})
		_, _ = io.Copy(conn, conn)
	}}, check: func(t *trial) {
		t.start()
		t.poke(t.suite.patience, func() bool { return len(t.told("answered"))+len(t.told("ahead")) > 0 })
		if told := t.told("ahead"); len(told) > 0 {
			t.fell("the host waits for each answer of the handshake", "%s came before the child's answer", told[0].Text)
		}
		t.event("answered", 1)
	}},
	{name: "PT1-1/environment", level: must, in: PT1, check: func(t *trial) {
		t.start()
		environ := t.event("start", 1).Environ
		versions := strings.Split(environ["TOR_PT_MANAGED_TRANSPORT_VER"], ",")
		if !slices.Contains(versions, "1") || environ["TOR_PT_CLIENT_TRANSPORTS"] == "" || !filepath.IsAbs(environ["TOR_PT_STATE_LOCATION"]) {
			t.fell("MANAGED_TRANSPORT_VER=1, CLIENT_TRANSPORTS and an absolute STATE_LOCATION", "%v", environ)
		}
	}},
	{name: "PT1-6/not-asked-for", level: must, in: PT1, child: script{announce: func(k *kid) {
		k.hello()
		k.say("CMETHOD somebody_else socks5 " + k.order.Other)
		k.method(k.addr)
		k.say("CMETHODS DONE")
	}}, check: withTraffic},
}

// seen returns events of this child's case.
func (k *kid) seen(what string) []event {
	return slices.DeleteFunc(events(k.dir), func(e event) bool { return e.What != what })
}

// connected starts the host and connects through it.
func (t *trial) connected() *net.TCPConn {
	t.start()
	var conn *net.TCPConn
	var err error
	t.until(func() bool {
		conn, err = t.dial()
		return err == nil || t.hosts[0].hasEnded()
	})
	if err != nil {
		t.fell("the host connects to its child", "%v; %s", err, t.state())
	}
	return conn
}

// needOf ends the case if something fails that comes before what it is about.
func (t *trial) needOf(expected string, err error) {
	if err != nil {
		t.fell(expected, "%v", err)
	}
}

// reach sends a request at the host's front and waits for no reply.
func (t *trial) reach() (*net.TCPConn, error) {
	addr, err := localnet.ParseAddr(t.front)
	if err != nil {
		return nil, err
	}
	conn, err := localnet.DialTCP(t.ctx, addr)
	if err != nil {
		return nil, err
	}
	_ = conn.SetDeadline(time.Now().Add(caseTimeout))
	if _, err = conn.Write([]byte{5, 1, 0}); err == nil {
		_, err = io.ReadFull(conn, make([]byte, 2))
	}
	if err == nil {
		_, err = conn.Write(append(append([]byte{5, 1, 0, 3, byte(len(destName))}, destName...), 1, 187))
	}
	if err != nil {
		conn.Close()
		return nil, err
	}
	return conn, nil
}

// asServer makes the child a server that delivers to the suite's service, which echoes.
func asServer(t *trial) {
	service, err := localnet.ListenTCP("127.0.0.1:0")
	t.need(err)
	t.onEnd(func() { service.Close() })
	go func() {
		for {
			conn, err := service.Accept()
			if err != nil {
				return
			}
			go func() {
				defer conn.Close()
				_ = conn.SetDeadline(time.Now().Add(caseTimeout))
				_, _ = io.Copy(conn, conn)
			}()
		}
	}()
	merge(t.transport(), object{"role": "server", "deliver": "tcp://" + service.Addr().String()})
	t.config["fronts"] = []any{}
}

// serves announces a server and waits.
func serves(k *kid) {
	k.hello()
	k.say("SMETHOD "+probeName+" "+k.addr, "SMETHODS DONE")
}

var otherProbes = []probe{
	{name: "STAT-3/not-asked", level: must, in: Seed, check: func(t *trial) {
		h := t.up()
		t.stop(h)
		t.until(func() bool { return len(t.told("exit")) > 0 })
		for _, e := range t.told("stdin") {
			if strings.HasPrefix(e.Text, "STATS") {
				t.fell("a child that has not announced stats=1 is not asked for them", "%q", e.Text)
			}
		}
	}},
	{name: "STAT-3/no-answer", level: must, in: Seed, child: script{args: "stats=1"}, check: func(t *trial) {
		h := t.up()
		t.traffic()
		t.stop(h)
		t.nobodyLeft("after the host's end")
	}},
	{name: "SIG-1/garbage", level: must, in: Seed, child: script{announce: func(k *kid) {
		k.hello()
		k.method(k.addr)
		k.say("CMESSAGE", "CMESSAGE {", "CMESSAGE []", `CMESSAGE {"body":7}`, `SMESSAGE {"body":{}}`, `CMESSAGE {"body":{"x":"`+strings.Repeat("x", 40<<10)+`"}}`)
		k.say("CMETHODS DONE")
	}}, check: withTraffic},
	{name: "SIG-4/flood", level: must, heavy: true, in: Seed, child: script{ready: func(k *kid) {
		k.awaitGo()
		for range signalSize >> 20 {
			k.flood(os.Stdout, 1, `CMESSAGE {"body":{"x":"`+strings.Repeat("x", 16<<10)+`"}}`+"\n")
			time.Sleep(20 * time.Millisecond) // a host's collector of garbage gets its turn
		}
		k.tell(event{What: "wrote"})
	}}, check: func(t *trial) { inMemory(t, signalSize, signalBounded) }},
	{name: "SOCKS-8/delivery", level: must, in: Seed, write: asServer, child: script{announce: func(k *kid) {
		serves(k)
		conn, err := k.deliver()
		if err != nil {
			k.tell(event{What: "answered", Text: err.Error()})
			return
		}
		defer conn.Close()
		_ = conn.SetDeadline(time.Now().Add(caseTimeout))
		settings := `{"transport":"probe","remote":"192.0.2.7:4711"}`
		_, err = conn.Write([]byte("\x05\x01\x80" + settings + "\x05\x01\x00\x04" + strings.Repeat("\x00", 18) + "ping"))
		k.failed(err)
		b := make([]byte, 2+10+4)
		n, err := io.ReadFull(conn, b)
		e := event{What: "answered", Methods: b[:n]}
		if err != nil {
			e.Text = err.Error()
		}
		k.tell(e)
	}}, check: func(t *trial) {
		t.start()
		e := t.event("answered", 1)
		if want := "\x05\x80\x05\x00\x00\x01\x00\x00\x00\x00\x00\x00ping"; string(e.Methods) != want {
			t.fell("a delivery is taken with the bound address 0.0.0.0:0, and its bytes go to the service and back", "% x %s", e.Methods, e.Text)
		}
	}},
	{name: "SRV-4/stranger", level: must, in: Seed, write: asServer, child: script{announce: func(k *kid) {
		serves(k)
		k.tell(event{What: "deliver", Text: k.host.Deliver, Dir: mustGetwd()})
	}}, check: func(t *trial) {
		t.start()
		e := t.event("deliver", 1)
		addr, err := localnet.ParseAddr(e.Text)
		if err != nil {
			t.fell("deliver is unix:NAME or a loopback address (SRV-3)", "%q", e.Text)
		}
		var conn net.Conn
		if addr.Unix() {
			dir, err := localnet.OpenDir(e.Dir)
			t.need(err)
			defer dir.Close()
			conn, err = dir.Dial(t.ctx, addr.Name())
			t.need(err)
		} else {
			conn, err = localnet.DialTCP(t.ctx, addr)
			t.need(err)
		}
		defer conn.Close()
		_ = conn.SetDeadline(time.Now().Add(t.suite.patience))
		_, _ = conn.Write([]byte("\x05\x01\x80" + `{"transport":"probe","remote":"192.0.2.7:4711"}` + "\x05\x01\x00\x04" + strings.Repeat("\x00", 18)))
		answer := make([]byte, 12)
		if n, _ := io.ReadFull(conn, answer); n == 12 && answer[3] == 0 {
			t.fell("a delivery from a process that is not the child's is refused", "% x", answer[:n])
		}
	}},
}

func mustGetwd() string {
	dir, err := os.Getwd()
	if err != nil {
		return "."
	}
	return dir
}
