package conformance

import (
	"encoding/json"
	"fmt"
	"maps"
	"strings"
	"sync"
	"unicode/utf8"
)

// maxSignal is the most bytes of a message (SIG-4).
const maxSignal = 32_768

// signalCases are about the signals of a client.
var signalCases = []Case{
	must("SIG-1/ignored", func(t *trial) { t.ignoresSignals("SMESSAGE", "CMESSAGE") }),
	must("SIG-1/form", func(t *trial) {
		for _, line := range t.signals("CMESSAGE") {
			t.signal(line)
		}
	}),
	must("SIG-2/no-peer", func(t *trial) {
		for _, line := range t.signals("CMESSAGE") {
			if m := t.signal(line); m["peer"] != nil {
				t.fell("a client's message without peer", "%s", line)
			}
		}
	}),
	must("SIG-3/unanswered", func(t *trial) {
		t.unanswered(t.start(launch{silent: true}), "CMESSAGE")
	}),
	must("SIG-4/size", func(t *trial) { t.signalSize("CMESSAGE") }),
}

// serverSignalCases are about the signals of a server.
var serverSignalCases = []Case{
	must("SIG-1/ignored", func(t *trial) { t.ignoresSignals("CMESSAGE", "SMESSAGE") }),
	must("SIG-1/form", func(t *trial) {
		for _, line := range t.answers() {
			t.signal(line)
		}
	}),
	must("SIG-2/repeated", func(t *trial) {
		for _, line := range t.answers() {
			if peer, _ := t.signal(line)["peer"].(string); !strings.HasPrefix(peer, peerPrefix) {
				t.fell("the return path of the client's message as peer", "%s", line)
			}
		}
	}),
	must("SIG-3/unanswered", func(t *trial) {
		t.unanswered(t.start(launch{}), "SMESSAGE")
	}),
	must("SIG-4/size", func(t *trial) {
		t.answers()
		t.signalSize("SMESSAGE")
	}),
}

// ignoresSignals demands that messages which are none do no harm.
func (t *trial) ignoresSignals(reads, writes string) {
	c, works := t.working(launch{})
	for _, rest := range []string{
		"", " ", " nonsense", " []", ` {"body":1}`, ` {"body":{},"peer":7}`, " {",
		` {"body":{"` + grease() + `":1},"peer":"x"}`, ` {"body":{"a":"` + strings.Repeat("x", 40_000) + `"}}`,
	} {
		t.line(c, reads+rest)
	}
	t.line(c, writes+` {"body":{}}`)
	t.alive(c, works) // and no line after them is lost
}

// unanswered demands that a child whose messages nobody answers gets ready.
func (t *trial) unanswered(c *child, writes string) {
	ready := t.settled(c)
	switch sent := len(c.with(writes)) > 0; {
	case ready && sent:
	case sent:
		t.fell("the end of the announcements, without an answer to the child's messages", "none in %v%s", t.suite.patience, t.whyNot(c))
	case ready:
		t.cannot("the child sends no signals before it is ready")
	default:
		t.cannot("the child did not get ready, and has sent no signal either%s", t.whyNot(c))
	}
}

// signals are the messages that a child writes which starts and is used.
func (t *trial) signals(keyword string) []string {
	c, works := t.working(launch{})
	works()
	lines := c.with(keyword)
	if len(lines) == 0 {
		t.cannot("the child sends no signals")
	}
	return lines
}

// answers are what a server sends when clients have sent it something.
func (t *trial) answers() []string {
	s := t.serve()
	if !s.plainWire() {
		s.open()
	}
	if s.plainWire() || len(s.client.with("CMESSAGE")) == 0 {
		t.cannot("no client sends signals to which the server could answer")
	}
	if !t.until(func() bool { return len(s.with("SMESSAGE")) > 0 }) {
		t.cannot("the server sends no signals")
	}
	return s.with("SMESSAGE")
}

// signal demands the form of a message.
func (t *trial) signal(text string) map[string]any {
	const expected = `{"body":{…}} or {"body":{…},"peer":"…"}`
	var m map[string]any
	if err := json.Unmarshal([]byte(text), &m); err != nil || !utf8.ValidString(text) {
		t.fell(expected, "%s: %v", text, err)
	}
	if _, ok := m["body"].(map[string]any); !ok {
		t.fell(expected, "%s", text)
	}
	if peer, ok := m["peer"]; ok {
		if _, ok := peer.(string); !ok {
			t.fell(expected, "%s", text)
		}
	}
	for key := range maps.Keys(m) {
		if key != "body" && key != "peer" {
			t.fell(expected, "%s", text)
		}
	}
	return m
}

// signalSize demands that all messages that were written are short enough.
func (t *trial) signalSize(keyword string) {
	seen := false
	for _, line := range t.everything() {
		k, text, _ := strings.Cut(line.text, " ")
		if k != keyword {
			continue
		}
		seen = true
		if len(text) > maxSignal {
			t.fell(fmt.Sprintf("messages of at most %d bytes", maxSignal), "one of %d", len(text))
		}
	}
	if !seen {
		t.cannot("no child wrote a %s line", keyword)
	}
}

// peerPrefix begins the return paths that the suite gives to clients.
const peerPrefix = "client-"

// A post carries signals between one server and its clients, as two hosts and their
// people would.
type post struct {
	mu      sync.Mutex
	server  *child
	clients map[string]*child
}

func newPost() *post { return &post{clients: map[string]*child{}} }

// collect takes a line that a child has written, and hands it on if it is a message.
func (p *post) collect(from *child, line string) {
	keyword, text, _ := strings.Cut(line, " ")
	p.mu.Lock()
	defer p.mu.Unlock()
	var m map[string]any
	switch {
	case from.role == Server:
		p.server = from
	case keyword != "CMESSAGE":
		return
	}
	if keyword != "CMESSAGE" && keyword != "SMESSAGE" || json.Unmarshal([]byte(text), &m) != nil || m == nil {
		return
	}
	to := p.server
	if from.role == Server {
		peer, _ := m["peer"].(string)
		to = p.clients[peer]
		delete(m, "peer")
		keyword = "SMESSAGE"
	} else {
		peer := peerPrefix + fmt.Sprint(len(p.clients))
		p.clients[peer] = from
		m["peer"] = peer
	}
	body, err := json.Marshal(m)
	if to == nil || err != nil {
		return // signals may be lost
	}
	go func() {
		<-to.started
		_ = to.proc.WriteLine([]byte(keyword + " " + string(body)))
	}()
}
