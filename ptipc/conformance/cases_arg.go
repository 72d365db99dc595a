package conformance

import (
	"bytes"
	"encoding/json"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"
	"time"

	"pthost/ptipc"
)

// argCases are about a client's command line.
var argCases = []Case{
	must("LIFE-1/ready", func(t *trial) {
		t.ready(launch{})
	}),
	must("ARG-2/no-role", func(t *trial) {
		t.starts(launch{args: []string{t.config()}})
	}),
	must("ARG-2/client", func(t *trial) {
		t.extended()
		t.starts(launch{args: []string{Client, t.config()}})
	}),
	must("ARG-4/no-role", func(t *trial) {
		t.extended()
		t.starts(launch{args: []string{"-"}, input: 1})
	}),
	should("ARG-5/listen-unix", func(t *trial) {
		t.extended()
		c := t.ready(launch{host: map[string]any{"listen": "unix"}})
		if m := t.method(c); !strings.HasPrefix(m.addr, "unix:") {
			t.fell("a unix socket, which HOST asked for", "%s", m.addr)
		}
		t.open(c, t.dest(c))
	}),
}

// commandLineCases are about the command line in any role.
var commandLineCases = []Case{
	must("ARG-3/not-an-object", func(t *trial) {
		for _, config := range []string{"", "{", "nonsense", "null", "[]", `"{}"`, "{} {}", "{}x", "{\"a\":\"\xff\"}"} {
			t.showText(fmt.Sprintf("CONFIG is %q", config))
			t.exit(t.start(launch{args: t.shortest(config)}), fmt.Sprintf("for CONFIG %q", config), 65)
		}
	}),
	must("ARG-3/shape", func(t *trial) {
		t.exit(t.start(launch{args: t.shortest()}), "without CONFIG", 64)
		config := t.config()
		t.exit(t.start(launch{args: []string{t.suite.subject.Role, config, "{}", config, "{}"}}), "for two arguments too many", 64)
	}),
	must("ARG-4/standard-input", func(t *trial) {
		t.extended()
		_, works := t.working(launch{input: 1})
		works()
	}),
	must("ARG-4/largest", func(t *trial) {
		t.extended()
		t.starts(launch{input: 1<<20 - 1})
	}),
	must("ARG-4/too-large", func(t *trial) {
		t.extended()
		t.exit(t.start(launch{input: 1<<20 + 1}), "for a line of more than 1 MiB", 65)
	}),
	must("ARG-4/not-json", func(t *trial) {
		t.extended()
		for _, line := range []string{"nonsense", "[]", `{"config":[]}`, "{\"config\":{\"a\":\"\xff\"}}"} {
			t.exit(t.start(launch{args: []string{t.suite.subject.Role, "-"}, first: []byte(line)}), fmt.Sprintf("for the line %q", line), 65)
		}
	}),
	slow(must("ARG-4/no-line", func(t *trial) {
		t.extended()
		c := t.start(launch{args: []string{t.suite.subject.Role, "-"}})
		select {
		case <-c.proc.Done():
		case <-time.After(limit):
		case <-t.ctx.Done():
		}
		t.exit(c, "after 10 seconds without a line", 65)
	})),
}

// configCases are about the configuration, or the options, in any role.
var configCases = []Case{
	must("CFG-1/refused", func(t *trial) {
		c, _ := t.refused(`"x"`)
		t.exit(c, "for a configuration with a key that the child does not know", 78)
		if len(c.with(c.errorWord())) == 0 && len(c.stderr()) == 0 {
			t.fell("a line "+c.errorWord()+", or a word on standard error", "neither")
		}
	}),
	must("CFG-2/secret", func(t *trial) {
		secret := "hunter2" + grease()
		values := []string{`"` + secret + `"`, `{"` + secret + `":1}`, `["` + secret + `"]`}
		for i, word := range []string{"secret", "password", "token", "key", "psk", "private"} {
			c := t.start(launch{config: t.withKey(grease()+"_"+word, values[i%len(values)])})
			t.settled(c)
			t.keepsSecret(c, secret)
		}
		c := t.start(launch{config: `{"password":"` + secret + `"`})
		t.settled(c)
		t.keepsSecret(c, secret)
	}),
	should("CFG-2/unknown-key", func(t *trial) {
		c := t.start(launch{config: t.withKey(grease(), "1")})
		if t.settled(c) {
			t.fell("a refusal of a key that nobody knows", "the child got ready")
		}
	}),
	should("CFG-2/twice", func(t *trial) {
		key, value := t.firstKey()
		if t.settled(t.start(launch{config: t.withKey(key, value)})) {
			t.fell(fmt.Sprintf("a refusal of a configuration with the key %q twice", key), "the child got ready")
		}
	}),
	should("CFG-2/wrong-case", func(t *trial) {
		key, value := t.firstKey()
		other := strings.ToUpper(key)
		if other == key {
			other = strings.ToLower(key)
		}
		if t.settled(t.start(launch{config: t.withKey(other, value)})) {
			t.fell(fmt.Sprintf("a refusal of a configuration with the key %q beside %q", other, key), "the child got ready")
		}
	}),
	must("LIFE-9/exit-code", func(t *trial) {
		// What the code has to be for these, other cases say. Here it is that there is one.
		for _, args := range [][]string{t.shortest(), t.shortest("nonsense"), t.shortest(t.withKey(grease(), "1"))} {
			c := t.start(launch{args: args})
			if t.settled(c) {
				continue // it knows every key
			}
			t.anyExit(c)
		}
	}),
	should("LIFE-9/standard-error", func(t *trial) {
		c := t.start(launch{args: t.shortest("nonsense")})
		t.anyExit(c)
		if len(c.stderr()) == 0 {
			t.fell("a line on standard error that says what was wrong with CONFIG", "nothing")
		}
	}),
}

// announcedCases are about what only a child has that is started by a host and stays.
var announcedCases = []Case{
	must("ARG-5/unknown-keys", func(t *trial) {
		t.extended()
		unknown := map[string]any{grease(): []int{1}, grease(): map[string]any{"uid": "x"}, grease(): 1.5}
		t.starts(launch{host: unknown})
		t.starts(launch{host: unknown, input: 1})
	}),
	should("CFG-2/place", func(t *trial) {
		c, key := t.refused("1")
		told := t.methodError(c)
		for _, want := range []string{"pointer", "problem", "remedy"} {
			if text, ok := told[want].(string); !ok || text == "" {
				t.fell("pointer, problem and remedy in the JSON of "+c.errorWord()+", as strings", "%q is %v", want, told[want])
			}
		}
		if told["pointer"] != "/"+key {
			t.fell("the pointer /"+key, "%q", told["pointer"])
		}
	}),
	must("LINE-8/method-error", func(t *trial) {
		c, _ := t.refused("1")
		told := t.methodError(c)
		class, ok := told["class"].(float64)
		if !ok || !slices.Contains(classes, byte(class)) || class != float64(byte(class)) {
			t.fell("a class that is a number of ERR-1", "%v", told["class"])
		}
		if _, ok := told["message"].(string); !ok {
			t.fell("a message", "%v", told["message"])
		}
	}),
}

// shortest is a command line without HOST and, for a client, without its role.
func (t *trial) shortest(config ...string) []string {
	if role := t.suite.subject.Role; role != Client {
		return append([]string{role}, config...)
	}
	return append([]string{}, config...)
}

// errorWord begins the line that says why a child announces nothing.
func (c *child) errorWord() string {
	if c.role == Client {
		return "CMETHOD-ERROR"
	}
	return "SMETHOD-ERROR"
}

// classes are those of ERR-1.
var classes = []byte{1, 2, 3, 4, 5, 6, 7, 8, tooLarge, tooLate, notJSON, settingsRefused}

// starts demands that a child gets ready, and stops it again.
func (t *trial) starts(l launch) {
	for tries := 1; ; tries++ {
		c := t.start(l)
		if t.settled(c) {
			c.stop()
			return
		}
		if !t.again(c, tries) {
			t.fellUnready(c)
		}
	}
}

// working starts a child, and returns what demands that it works.
func (t *trial) working(l launch) (c *child, works func()) {
	switch t.suite.subject.Role {
	case Server:
		s := t.serveWith(l)
		return s.child, func() {
			p := s.open()
			p.exchange()
			p.close()
		}
	case Generate:
		c = t.start(l)
		t.getsReady(c)
		return c, func() { t.generated(c) }
	}
	if l.usual() {
		c = t.ready(l)
	} else {
		c = t.start(l)
		t.getsReady(c)
	}
	if c.datagrams() {
		return c, func() { t.exchangePackets(c) }
	}
	return c, func() { t.open(c, t.dest(c)).close() }
}

func (t *trial) getsReady(c *child) {
	if !t.settled(c) {
		t.fellUnready(c)
	}
}

func (t *trial) fellUnready(c *child) {
	word := strings.TrimSuffix(c.lastWord(), "S DONE")
	if c.role == Generate {
		t.fell("an exit with code 0 and what was generated", "none in %v%s", t.suite.patience, t.whyNot(c))
	}
	t.fell("a "+word+" and "+c.lastWord(), "neither or one of them in %v%s", t.suite.patience, t.whyNot(c))
}

// anyExit demands an exit with a code of ERR-4 that is not success.
func (t *trial) anyExit(c *child) {
	if !t.until(c.ended) {
		t.fell("an exit after a fatal error", "it still runs after %v", t.suite.patience)
	}
	code, known := ptipc.ExitCode(0), []ptipc.ExitCode{64, 65, 66, 69, 70, 71, 73, 74, 75, 76, 77, 78}
	if code = ptipc.ExitCodeOf(c.proc.Err()); !slices.Contains(known, code) {
		t.fell("an exit code of ERR-4 that is not 0", "%v", c.proc.Err())
	}
}

// firstLine is {"config":…,"host":…} with blanks to make it so many bytes long.
func (s *suite) firstLine(l launch) []byte {
	line := fmt.Appendf(nil, `{"config":%s,"host":%s}`, l.config, s.host(l.role, l.host))
	return append(line, bytes.Repeat([]byte(" "), max(0, l.input-len(line)))...)
}

// withKey is a configuration that works with one key more, at its end.
func (t *trial) withKey(key, value string) string {
	config := strings.TrimSpace(strings.TrimSuffix(strings.TrimSpace(t.config()), "}"))
	comma := ","
	if config == "{" {
		comma = ""
	}
	return fmt.Sprintf("%s%s%q:%s}", config, comma, key, value)
}

// firstKey is a key of the subject's configuration.
func (t *trial) firstKey() (key, value string) {
	var config map[string]json.RawMessage
	t.need(json.Unmarshal([]byte(t.config()), &config))
	letter := regexp.MustCompile("[A-Za-z]")
	for _, key := range slices.Sorted(maps.Keys(config)) {
		if letter.MatchString(key) {
			return key, string(config[key])
		}
	}
	t.cannot("the configuration has no key")
	return "", ""
}

// refused starts a child whose configuration has a key that it does not know, and
// ends the case if it takes that.
func (t *trial) refused(value string) (c *child, key string) {
	key = grease()
	c = t.start(launch{config: t.withKey(key, value)})
	if t.settled(c) {
		t.cannot("the child takes keys that it does not know, and the suite knows no other fault of a configuration (CFG-2)")
	}
	return c, key
}

// methodError is the JSON of the line that says why nothing is announced.
func (t *trial) methodError(c *child) map[string]any {
	lines := c.with(c.errorWord())
	if len(lines) == 0 {
		t.cannot("the child wrote no line %s", c.errorWord())
	}
	_, text, _ := strings.Cut(lines[0], " ")
	var told map[string]any
	if err := json.Unmarshal([]byte(text), &told); err != nil {
		t.fell(c.errorWord()+" NAME and a JSON object", "%v", err)
	}
	return told
}

// keepsSecret demands that the child has not repeated a secret.
func (t *trial) keepsSecret(c *child, secret string) {
	if c.wrote(secret) {
		t.fell("outputs without the secret "+secret, "it was repeated")
	}
	c.stop()
	if c.wrote(secret) {
		t.fell("outputs without the secret "+secret, "it was repeated at the end")
	}
}

// unixChild is a child of the case's own that listens on a unix socket.
func (t *trial) unixChild() *child { return t.unixChildWith(false) }

// unixChildWith may hand it memory in which the ends of streams are marked.
func (t *trial) unixChildWith(ends bool) *child {
	t.extended()
	c := t.ready(launch{host: map[string]any{"listen": "unix"}, ends: ends})
	if m := t.method(c); !strings.HasPrefix(m.addr, "unix:") {
		t.cannot("the child listens on %s, not on the unix socket that HOST asked for", m.addr)
	}
	return c
}
