package conformance_test

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/url"
	"os"
	"os/signal"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
	"unicode/utf8"

	"pthost/ptipc/conformance"
	"pthost/ptipc/localnet"
)

// A faulty is a child with one fault, or none. It shares no code with the library
// for children but the look-up of a peer's user, so that the suite is held against
// two readings of the specification.
type faulty struct {
	fault string
	role  string
	host  struct {
		Version []int  `json:"version"`
		Listen  string `json:"listen"`
		Proxy   string `json:"proxy"`
		UID     int    `json:"uid"`
		Ends    int    `json:"ends"`
		Deliver string `json:"deliver"`
	}
	config   map[string]string // each key once
	server   string            // the destination if the child is bound
	listener net.Listener
	messages chan struct{} // what comes from the other side

	leaked []*os.File

	managed *managedFaulty // what is more if it is a managed transport; nil if it is none

	mu    sync.Mutex // guards standard output and what follows
	conns map[string]*faultyCounts
	total struct{ active, opened, failed, received, sent int }

	serving sync.WaitGroup
}

type faultyCounts struct {
	opened         time.Time
	received, sent int
}

func (f *faulty) is(fault string) bool { return f.fault == fault }

// say writes a control line.
func (f *faulty) say(format string, args ...any) {
	f.mu.Lock()
	defer f.mu.Unlock()
	fmt.Fprintf(os.Stdout, format+"\n", args...)
}

// die ends the child for a reason.
func (f *faulty) die(code int, format string, args ...any) {
	fmt.Fprintf(os.Stderr, format+"\n", args...)
	os.Exit(code)
}

func faultyMain(fault string, args []string) {
	f := &faulty{fault: fault, role: conformance.Client, config: map[string]string{}, conns: map[string]*faultyCounts{}, messages: make(chan struct{}, 1)}
	f.host.UID = -1
	terms := make(chan os.Signal, 2)
	signal.Notify(terms, syscall.SIGTERM)
	in := bufio.NewReaderSize(os.Stdin, 2<<20)

	switch {
	case len(args) > 0 && slices.Contains([]string{conformance.Client, conformance.Server, conformance.Generate}, args[0]):
		f.role, args = args[0], args[1:]
	case f.is("wants a role"):
		f.die(64, "usage: client CONFIG [HOST]")
	}
	config := f.arguments(args, in)
	if f.role == conformance.Generate {
		f.configure(config)
		f.generate()
	}
	if len(f.host.Version) > 0 && !slices.Contains(f.host.Version, 1) && !f.is("speaks any version") {
		f.say("VERSION-ERROR no-version")
		f.die(78, "no common version")
	}
	if !f.is("no VERSION") && !f.is("VERSION late") {
		f.say("VERSION 1")
	}
	if f.is("LOG with a bad escape") {
		f.say(`LOG SEVERITY=notice MESSAGE="\q"`)
	}
	if f.is("STATUS with an open quote") {
		f.say(`STATUS TRANSPORT=faulty PROGRESS="`)
	}
	if f.is("a banner on stdout") {
		f.say("*** faulty ***")
	}
	f.configure(config)
	f.proxySetUp()
	if f.is("never ready") {
		select {}
	}
	ended := make(chan struct{})
	go func() {
		f.readLines(in)
		if !f.is("ignores the end of stdin") {
			close(ended)
		}
	}()
	f.signal()
	if f.is("listens everywhere for datagrams") {
		f.listenEverywhere()
	}
	if f.role == conformance.Server {
		f.announceServer()
	} else {
		f.announce()
		f.say("CMETHODS DONE")
		if f.is("announces after the end") {
			f.say("CMETHOD late socks5 127.0.0.1:1")
		}
	}
	if f.listener == nil { // it has datagrams alone
		f.listener = noListener{}
	}
	f.serving.Go(f.accept)
	for stopped := false; !stopped; {
		select {
		case <-ended:
			stopped = true
		case <-terms:
			stopped = !f.is("ignores SIGTERM")
		}
	}
	if f.is("keeps a file elsewhere for a moment") {
		if file, err := os.CreateTemp("/var/tmp", "ptipc-faulty"); err == nil {
			_ = file.Close()
			_ = os.Remove(file.Name())
		}
	}
	if f.is("listens everywhere in the end") {
		if l, err := net.Listen("tcp4", "0.0.0.0:0"); err == nil {
			<-time.After(500 * time.Millisecond)
			_ = l.Close()
		}
	}
	if f.is("listens everywhere for datagrams in the end") {
		conn := f.listenEverywhere()
		<-time.After(500 * time.Millisecond)
		_ = conn.Close()
	}
	if f.is("leaves a file outside") {
		_ = os.WriteFile("../left", nil, 0o600)
	}
	if !f.is("cuts at the end") {
		f.listener.Close()
		drained := make(chan struct{})
		go func() { f.serving.Wait(); close(drained) }()
		select {
		case <-drained:
		case <-terms:
			if f.is("ignores the second SIGTERM") {
				<-drained
			}
		}
	}
	if f.is("exits with 1 at the end") {
		os.Exit(1)
	}
	os.Exit(0)
}

func (f *faulty) arguments(args []string, in *bufio.Reader) []byte {
	switch {
	case f.is("exits with 1 for a bad command line") && (len(args) == 0 || len(args) > 2):
		f.die(1, "usage: [client] CONFIG [HOST]")
	case len(args) == 0 || len(args) > 2:
		f.die(64, "usage: [client] CONFIG [HOST]")
	case args[0] == "-":
		line := make(chan []byte)
		go func() {
			text, err := in.ReadBytes('\n')
			if err == nil && !f.is("does not see its configuration") {
				line <- text
			}
		}()
		timeout := limit
		switch {
		case f.is("waits for its configuration"):
			timeout = time.Hour
		case f.is("does not see its configuration"):
			timeout = 0
		}
		select {
		case text := <-line:
			var launch struct {
				Config json.RawMessage `json:"config"`
				Host   json.RawMessage `json:"host"`
			}
			if len(text) > 1<<19 && f.is("takes half a MiB of configuration") {
				f.die(65, "the line is longer than 512 KiB")
			}
			if len(text) > 1<<20 && !f.is("takes any length of configuration") || json.Unmarshal(text, &launch) != nil {
				f.die(65, "the line is not {\"config\":…,\"host\":…} of at most 1 MiB")
			}
			f.hostObject(launch.Host)
			return f.object(launch.Config)
		case <-time.After(timeout):
			f.die(65, "no configuration came")
		}
	}
	if len(args) == 2 {
		f.hostObject([]byte(args[1]))
	}
	return f.object([]byte(args[0]))
}

const limit = 10 * time.Second

func (f *faulty) hostObject(text []byte) {
	dec := json.NewDecoder(bytes.NewReader(text))
	if f.is("knows all keys of HOST") {
		dec.DisallowUnknownFields()
	}
	if len(text) > 0 && dec.Decode(&f.host) != nil {
		f.die(65, "HOST is wrong")
	}
}

func (f *faulty) object(text []byte) []byte {
	if !objectOK(text) {
		if f.is("exits with 1 for bad JSON") {
			os.Exit(1)
		}
		f.die(65, "CONFIG is not a JSON object")
	}
	return text
}

func objectOK(text []byte) bool {
	var object map[string]json.RawMessage
	return utf8.Valid(text) && json.Unmarshal(text, &object) == nil && object != nil
}

// configure takes the keys of its role, each once.
func (f *faulty) configure(config []byte) {
	known := map[string][]string{
		conformance.Client:   {"server", "signals", "packets"},
		conformance.Server:   {"listen", "to", "signals", "packets"},
		conformance.Generate: {"listen", "to", "signals", "packets"},
	}[f.role]
	dec := json.NewDecoder(bytes.NewReader(config))
	_, _ = dec.Token()
	for dec.More() {
		token, _ := dec.Token()
		key, _ := token.(string)
		var raw json.RawMessage
		_ = dec.Decode(&raw)
		if f.is("repeats a secret") {
			fmt.Fprintf(os.Stderr, "%s is %s\n", key, raw)
		}
		var value string
		if slices.Contains(known, key) && f.config[key] == "" && json.Unmarshal(raw, &value) == nil {
			f.config[key] = value
			continue
		}
		if f.is("takes every key") {
			continue
		}
		code := 78
		if f.is("exits with 1 for a bad configuration") {
			code = 1
		}
		word := map[string]string{conformance.Client: "CMETHOD-ERROR", conformance.Server: "SMETHOD-ERROR"}[f.role]
		switch {
		case word == "":
		case f.is("an error without JSON"):
			f.say("%s _ bad key", word)
		default:
			f.say(`%s _ {"class":19,"message":"bad configuration","pointer":%q,"problem":"is unknown, or there twice","remedy":"remove it"}`, word, "/"+key)
		}
		f.die(code, "a key of the configuration is wrong")
	}
	f.server = f.config["server"]
}

// signal says hello to the other side, if the configuration wants it.
func (f *faulty) signal() {
	if f.config["signals"] == "" || f.role == conformance.Server && !f.is("signals: waits for an answer") {
		return
	}
	word := map[string]string{conformance.Client: "CMESSAGE", conformance.Server: "SMESSAGE"}[f.role]
	switch {
	case f.is("signals: body is no object"):
		f.say(`%s {"body":"hello"}`, word)
	case f.is("signals: with a peer"):
		f.say(`%s {"body":{"hello":1},"peer":"me"}`, word)
	case f.is("signals: too long"):
		f.say(`%s {"body":{"hello":%q}}`, word, strings.Repeat("x", 40_000))
	default:
		f.say(`%s {"body":{"hello":1}}`, word)
	}
	if f.is("signals: waits for an answer") {
		<-f.messages
	}
}

func (f *faulty) proxySetUp() {
	if f.host.Proxy == "" {
		return
	}
	if f.is("tells the password of the proxy") {
		fmt.Fprintln(os.Stderr, "proxy", f.host.Proxy)
	}
	u, err := url.Parse(f.host.Proxy)
	if (err != nil || u.Scheme != "socks5" || u.Hostname() == "" || u.Port() == "") && !f.is("takes any proxy") {
		f.say("PROXY-ERROR the proxy is not socks5://[USER:PASSWORD@]HOST:PORT")
		f.die(69, "the proxy cannot be used")
	}
	if f.is("tells home") {
		if home, err := net.Dial("udp", "127.0.0.9:9"); err == nil {
			_, _ = home.Write([]byte("hello"))
			_ = home.Close()
		}
	}
	if !f.is("no PROXY DONE") {
		f.say("PROXY DONE")
	}
}

func (f *faulty) listen() string {
	var err error
	switch {
	case f.host.Listen == "unix" && !f.is("listens on TCP alone"):
		f.listener, err = net.ListenUnix("unix", &net.UnixAddr{Name: "s", Net: "unix"})
		if err == nil && (f.is("open unix socket") || f.is("open to everybody")) {
			err = os.Chmod("s", 0o666)
		} else if err == nil {
			err = os.Chmod("s", 0o600)
		}
		if err != nil {
			f.die(71, "%v", err)
		}
		return "unix:s"
	case f.is("listens everywhere"):
		f.listener, err = net.Listen("tcp4", "0.0.0.0:0")
	default:
		f.listener, err = net.Listen("tcp", "127.0.0.1:0")
	}
	if err != nil {
		f.die(71, "%v", err)
	}
	return fmt.Sprintf("127.0.0.1:%d", f.listener.Addr().(*net.TCPAddr).Port)
}

func (f *faulty) announce() {
	if f.config["packets"] != "" {
		f.announceDatagrams()
		return
	}
	addr := f.listen()
	if f.is("done before it listens") && f.host.Listen != "unix" {
		f.listener.Close()
		bound, at, err := bindTCP()
		if err != nil {
			f.die(71, "%v", err)
		}
		addr = at
		f.listener = &lateListener{bound: bound, ready: make(chan struct{})}
	}
	if f.is("announces a public address") && f.host.Listen != "unix" {
		addr = "203.0.113.1:1080"
	}
	args := "stats=1"
	if f.host.Ends != 0 {
		args += ",ends=1"
	}
	if f.server != "" {
		args += ",bound=1"
	}
	if f.is("ARGS with a bad escape") {
		args += `,a=\b`
	}
	protocol := "socks5"
	if f.is("CMETHOD of another protocol") {
		protocol = "socks4"
	}
	f.say("CMETHOD faulty %s %s ARGS:%s", protocol, addr, args)
	if strings.HasPrefix(f.fault, "turn:") && (f.host.Proxy == "" || f.is("turn: goes around the proxy")) {
		f.announcePackets()
	}
	if f.is("VERSION late") {
		f.say("VERSION 1")
	}
}

// A noListener accepts nothing.
type noListener struct{ net.Listener }

func (noListener) Accept() (net.Conn, error) { return nil, net.ErrClosed }
func (noListener) Close() error              { return nil }

// A lateListener begins to listen half a second after the first Accept. Its port is
// bound before, so that nobody else gets it.
type lateListener struct {
	net.Listener
	bound func() (net.Listener, error)
	once  sync.Once
	ready chan struct{}
}

func (l *lateListener) Accept() (net.Conn, error) {
	l.once.Do(func() {
		<-time.After(500 * time.Millisecond)
		var err error
		if l.Listener, err = l.bound(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(71)
		}
		close(l.ready)
	})
	return l.Listener.Accept()
}

func (l *lateListener) Close() error {
	<-l.ready
	return l.Listener.Close()
}

func (f *faulty) readLines(in *bufio.Reader) {
	for {
		line, err := in.ReadString('\n')
		if err != nil {
			return
		}
		line = strings.TrimSuffix(line, "\n")
		if !f.is("does not drop CR") {
			line = strings.TrimSuffix(line, "\r")
		}
		if len(line) > 65_535 || !utf8.ValidString(line) || strings.Contains(line, "\x00") {
			if f.is("stops reading at an over-long line") {
				_, _ = io.Copy(io.Discard, in)
				return
			}
			continue
		}
		keyword, rest, _ := strings.Cut(line, " ")
		switch keyword {
		case "STATS":
		case "CMESSAGE", "SMESSAGE":
			f.message(keyword, rest)
			continue
		default:
			if f.is("dies of an unknown keyword") && strings.HasPrefix(keyword, "GREASE") {
				f.die(76, "unknown keyword %s", keyword)
			}
			continue
		}
		id, client, _ := strings.Cut(rest, " ")
		n, err := strconv.ParseUint(id, 10, 64)
		if err != nil {
			continue
		}
		if f.is("numbers STATS by itself") {
			n = 1
		}
		f.say("STATS %d %s", n, f.stats(client))
	}
}

// message takes a message, and a server answers it.
func (f *faulty) message(keyword, text string) {
	var m struct {
		Body map[string]any `json:"body"`
		Peer string         `json:"peer"`
	}
	if err := json.Unmarshal([]byte(text), &m); err != nil || m.Body == nil {
		if f.is("dies of a bad message") {
			f.die(76, "bad message")
		}
		return
	}
	select {
	case f.messages <- struct{}{}:
	default:
	}
	if keyword != "CMESSAGE" || f.role != conformance.Server || f.config["signals"] == "" {
		return
	}
	answer := map[string]any{"body": map[string]any{"heard": 1}, "peer": m.Peer}
	switch {
	case f.is("signals: forgets the peer"):
		answer["peer"] = "somebody"
	case f.is("signals: answers with no object"):
		answer["body"] = "heard"
	case f.is("signals: too long"):
		answer["body"] = map[string]string{"heard": strings.Repeat("x", 40_000)}
	}
	line, _ := json.Marshal(answer)
	f.say("SMESSAGE %s", line)
}

func (f *faulty) stats(client string) string {
	f.mu.Lock()
	defer f.mu.Unlock()
	if client == "" {
		t := f.total
		for _, c := range f.conns {
			t.received, t.sent = t.received+c.received, t.sent+c.sent
		}
		return fmt.Sprintf(`{"active":%d,"opened":%d,"failed":%d,"received":%d,"sent":%d}`, t.active, t.opened, t.failed, t.received, t.sent)
	}
	c := f.conns[client]
	if c == nil && f.is("statistics of what it does not know") {
		return `{"opened":"2020-01-01T00:00:00Z","received":0,"sent":0}`
	}
	if c == nil {
		return "null"
	}
	return fmt.Sprintf(`{"opened":%q,"received":%d,"sent":%d}`, c.opened.Format(time.RFC3339), c.received, c.sent)
}

func (f *faulty) accept() {
	for {
		conn, err := f.listener.Accept()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			if f.is("stops accepting without descriptors") {
				return
			}
			<-time.After(10 * time.Millisecond)
			continue
		}
		if f.role == conformance.Server {
			f.serving.Go(func() {
				if f.managed != nil {
					f.bring(conn.(*net.TCPConn))
					return
				}
				f.handOver(conn.(*net.TCPConn))
			})
			continue
		}
		if f.is("one handshake at a time") {
			f.serve(conn, func(relay func()) { f.serving.Go(relay) })
			continue
		}
		f.serving.Go(func() { f.serve(conn, func(relay func()) { relay() }) })
	}
}

func (f *faulty) welcome(conn net.Conn) bool {
	cred, err := localnet.Peer(conn)
	return f.is("lets everybody in") || f.is("open to everybody") || err == nil &&
		(int(cred.UID) == os.Geteuid() || int(cred.UID) == f.host.UID && !f.is("does not let the host in"))
}

func (f *faulty) serve(conn net.Conn, relay func(func())) {
	close := func() { conn.Close() }
	if !f.welcome(conn) {
		close()
		return
	}
	if !f.is("waits forever") {
		_ = conn.SetReadDeadline(time.Now().Add(limit))
	}
	r := bufio.NewReaderSize(conn, 128<<10)
	dest, code, ok := f.handshake(conn, r)
	if ok && f.is("leaks descriptors") {
		if null, err := os.Open(os.DevNull); err == nil {
			f.mu.Lock()
			f.leaked = append(f.leaked, null)
			f.mu.Unlock()
		}
	}
	if !ok {
		close()
		return
	}
	var wire net.Conn
	early := code == 0 && f.is("pt: knows no failure")
	if early {
		_, _ = conn.Write(f.reply(conn, 0))
		<-time.After(200 * time.Millisecond)
	}
	if code == 0 {
		wire, code, r = f.dial(conn, r, dest)
		if r == nil { // the client is gone
			close()
			return
		}
	}
	if !early {
		_, _ = conn.Write(f.reply(conn, code))
	}
	_ = conn.SetDeadline(time.Time{})
	if code != 0 {
		_ = conn.(interface{ CloseWrite() error }).CloseWrite()
		_ = conn.SetDeadline(time.Now().Add(time.Second))
		_, _ = io.Copy(io.Discard, conn) // so that a reset does not destroy the reply
		close()
		return
	}
	relay(func() { f.relay(conn, r, wire) })
}

func (f *faulty) reply(conn net.Conn, code byte) []byte {
	if f.is("tells its bound address") {
		if addr, ok := conn.LocalAddr().(*net.TCPAddr); ok {
			return binary.BigEndian.AppendUint16(append([]byte{5, code, 0, 1}, addr.IP.To4()...), uint16(addr.Port))
		}
	}
	return []byte{5, code, 0, 1, 0, 0, 0, 0, 0, 0}
}

// handshake returns the destination, or the code with which it is refused. It is
// not ok if there is to be no reply.
func (f *faulty) handshake(conn net.Conn, r *bufio.Reader) (dest string, code byte, ok bool) {
	if f.is("takes the greeting for one segment") {
		b, err := r.Peek(1)
		if err != nil || r.Buffered() < 2 || r.Buffered() < 2+int(must(r.Peek(2))[1]) || b[0] != 5 {
			return "", 0, false
		}
	}
	offered, ok := greeting(r)
	if !ok {
		return "", 0, false
	}
	if f.is("takes no pipelining") && r.Buffered() > 0 {
		return "", 0, false
	}
	method := f.choose(offered)
	_, _ = conn.Write([]byte{5, method})
	if method == 0xff {
		return "", 0, false
	}
	if method == 2 {
		if !f.login(conn, r) {
			return "", 0, false
		}
	} else if method != 0 {
		code = f.settings(r, method)
		if code != 0 && f.is("waits for the request to refuse settings") {
			_, _ = r.ReadByte()
		}
		if code != 0 {
			return "", code, true
		}
		if f.is("replies to settings") {
			_, _ = conn.Write([]byte{5, 0})
		}
	}
	dest, code, err := f.request(r)
	return dest, code, err == nil
}

// must is for what has been looked at already.
func must(b []byte, _ error) []byte { return b }

func greeting(r *bufio.Reader) ([]byte, bool) {
	head := make([]byte, 2)
	if _, err := io.ReadFull(r, head); err != nil || head[0] != 5 {
		return nil, false
	}
	offered := make([]byte, head[1])
	_, err := io.ReadFull(r, offered)
	return offered, err == nil
}

func (f *faulty) choose(offered []byte) byte {
	for _, method := range f.methods() {
		if f.is("refuses unknown methods") && slices.ContainsFunc(offered, func(m byte) bool { return m != 0x80 && m != 0x09 && m != 0 }) {
			return 0xff
		}
		if f.is("does not know 0x09 alone") && bytes.Equal(offered, []byte{0x09}) {
			return 0xff
		}
		if f.is("prefers no settings") && slices.Contains(offered, 0) {
			return 0
		}
		if slices.Contains(offered, method) {
			return method
		}
	}
	if f.is("takes any method") {
		return 0
	}
	return 0xff
}

// settings reads them and returns the code with which they are refused, or 0.
func (f *faulty) settings(r *bufio.Reader, method byte) byte {
	largest := 65_536
	switch {
	case f.is("takes 4 KiB of settings"):
		largest = 4096
	case f.is("takes any length of settings"):
		largest = 1 << 30
	}
	first, err := r.Peek(1)
	if err != nil {
		return settingsEnd(err)
	}
	var text []byte
	if method == 0x09 || first[0] == 0 {
		head := make([]byte, 4)
		if _, err := io.ReadFull(r, head); err != nil {
			return settingsEnd(err)
		}
		n := binary.BigEndian.Uint32(head)
		if int64(n) > int64(largest) {
			return 0x10
		}
		var all bytes.Buffer
		if _, err := io.CopyN(&all, r, int64(n)); err != nil {
			return settingsEnd(err)
		}
		text = all.Bytes()
	} else if text, err = f.rawObject(r, largest); err != nil {
		return settingsEnd(err)
	}
	var object map[string]any
	switch {
	case !objectOK(text) && !f.is("takes what is no object"):
		return 0x12
	case f.is("refuses empty settings"):
		return 0x13
	case f.is("takes unknown settings for bad ones") && len(text) > 10 && bytes.Contains(text, []byte("grease")):
		return 1
	case f.managed != nil: // it knows every key
	case json.Unmarshal(text, &object) != nil || len(object) > 0:
		return 0x13
	}
	return 0
}

var errLarge, errJSON = errors.New("too large"), errors.New("not JSON")

func settingsEnd(err error) byte {
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded):
		return 0x11
	case errors.Is(err, errLarge):
		return 0x10
	}
	return 0x12
}

func (f *faulty) rawObject(r *bufio.Reader, largest int) (text []byte, err error) {
	var open []byte
	quoted, escaped := false, false
	for len(text) < largest {
		c, err := r.ReadByte()
		if err != nil {
			return nil, err
		}
		text = append(text, c)
		switch {
		case escaped:
			escaped = false
		case quoted && !f.is("counts braces in strings"):
			quoted, escaped = c != '"', c == '\\'
		case c == '{' || c == '[' && len(open) > 0:
			switch {
			case f.is("takes any depth"):
			case len(open) == 64, len(open) == 32 && f.is("takes 32 levels"):
				return nil, errLarge
			}
			open = append(open, c+2) // its closing one
		case len(open) == 0 && (f.is("takes no white space") || !strings.ContainsRune(" \t\r\n", rune(c))):
			return nil, errJSON
		case len(open) > 0 && c == '"':
			quoted = true
		case len(open) > 0 && (c == '}' || c == ']'):
			if open[len(open)-1] != c {
				return nil, errJSON
			}
			if open = open[:len(open)-1]; len(open) == 0 {
				return text, nil
			}
		}
	}
	return nil, errLarge
}

func (f *faulty) request(r *bufio.Reader) (dest string, code byte, err error) {
	head := make([]byte, 4)
	if _, err := io.ReadFull(r, head); err != nil {
		return "", 0, err
	}
	if head[1] != 1 && !f.is("takes any command") {
		return "", 7, nil
	}
	read := func(n int) []byte {
		b := make([]byte, n)
		if _, rerr := io.ReadFull(r, b); rerr != nil {
			err = rerr
		}
		return b
	}
	var host string
	var raw []byte
	switch head[3] {
	case 1:
		host = net.IP(read(4)).String()
	case 3:
		if host = string(read(int(read(1)[0]))); f.is("takes no names") {
			return "", 8, nil
		}
	case 4:
		raw = read(16)
		host = net.IP(raw).String()
	default:
		if f.is("does not tell address types") {
			return "", 1, nil
		}
		return "", 8, nil
	}
	port := binary.BigEndian.Uint16(read(2))
	switch {
	case f.is("pt: goes elsewhere"):
		return "127.0.0.1:1", 0, err
	case f.server != "" && f.is("bound to nothing"):
		return "", 2, err
	case f.server != "":
		if (head[3] != 4 || port != 0 || !bytes.Equal(raw, net.IPv6zero)) && !f.is("bound to anything") {
			return "", 2, err
		}
		return f.server, 0, err
	case (host == "" || port == 0) && !f.is("dials nowhere"):
		return "", 2, err
	}
	return net.JoinHostPort(host, strconv.Itoa(int(port))), 0, err
}

// dial connects to the wire and watches the client. The reader has what the client
// has sent meanwhile; it is nil if the client has hung up.
func (f *faulty) dial(conn net.Conn, r *bufio.Reader, dest string) (net.Conn, byte, *bufio.Reader) {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	_ = conn.SetReadDeadline(time.Time{})
	gone := false
	watched := make(chan struct{})
	go func() {
		defer close(watched)
		for r.Buffered() < r.Size() {
			_, err := r.Peek(r.Buffered() + 1)
			switch {
			case err == nil:
				continue
			case errors.Is(err, os.ErrDeadlineExceeded), f.is("does not see a hang-up"):
			case errors.Is(err, io.EOF) && r.Buffered() > 0 && !f.is("takes a half-close for a hang-up"):
			default:
				gone = true
				cancel()
			}
			return
		}
	}()
	wire, err := f.connect(ctx, dest)
	if ctx.Err() == nil {
		_ = conn.SetReadDeadline(time.Unix(1, 0))
		<-watched
		_ = conn.SetReadDeadline(time.Time{})
	}
	<-watched
	f.mu.Lock()
	defer f.mu.Unlock()
	if gone {
		if wire != nil {
			wire.Close()
		}
		return nil, 0, nil
	}
	if err != nil {
		f.total.failed++
		if f.is("general failures alone") {
			return nil, 1, r
		}
		return nil, f.class(err), r
	}
	if f.total.active >= 100 && f.is("serves a hundred") {
		wire.Close()
		return nil, 1, r
	}
	f.total.opened++
	f.total.active++
	f.conns[localnet.ClientName(conn.RemoteAddr())] = &faultyCounts{opened: time.Now()}
	return wire, 0, r
}

func (f *faulty) class(err error) byte {
	var dns *net.DNSError
	switch {
	case errors.Is(err, syscall.ECONNREFUSED):
		return 5
	case f.is("knows no unknown name") && errors.As(err, &dns):
		return 2
	case errors.As(err, &dns):
		return 4
	}
	return 1
}

func (f *faulty) connect(ctx context.Context, dest string) (net.Conn, error) {
	d := f.dialer()
	if f.host.Proxy == "" || f.is("goes around the proxy") {
		return d.DialContext(ctx, "tcp", dest)
	}
	u, err := url.Parse(f.host.Proxy)
	if err != nil {
		return nil, err
	}
	conn, err := d.DialContext(ctx, "tcp", u.Host)
	if err != nil {
		return nil, fmt.Errorf("proxy: %w", err)
	}
	host, portText, _ := net.SplitHostPort(dest)
	if f.is("looks names up beside") {
		ctx, cancel := context.WithTimeout(ctx, time.Second)
		_, _ = net.DefaultResolver.LookupNetIP(ctx, "ip4", host)
		cancel()
	}
	if f.is("looks names up") {
		ips, err := net.DefaultResolver.LookupNetIP(ctx, "ip4", host)
		if err != nil {
			conn.Close()
			return nil, err
		}
		host = ips[0].Unmap().String()
	}
	port, _ := strconv.Atoi(portText)
	to := append([]byte{3, byte(len(host))}, host...)
	if ip := net.ParseIP(host).To4(); ip != nil {
		to = append([]byte{1}, ip...)
	}
	password, _ := u.User.Password()
	steps := []struct {
		send []byte
		want string
	}{{[]byte{5, 1, 0}, "0500"}}
	if u.User != nil && !f.is("keeps the password from the proxy") {
		login := append([]byte{1, byte(len(u.User.Username()))}, u.User.Username()...)
		login = append(append(login, byte(len(password))), password...)
		steps = steps[:0]
		steps = append(steps, struct {
			send []byte
			want string
		}{[]byte{5, 1, 2}, "0502"}, struct {
			send []byte
			want string
		}{login, "0100"})
	}
	steps = append(steps, struct {
		send []byte
		want string
	}{append(append([]byte{5, 1, 0}, to...), byte(port>>8), byte(port)), "05000001000000000000"})
	for _, step := range steps {
		got := make([]byte, len(step.want)/2)
		_, _ = conn.Write(step.send)
		if _, err := io.ReadFull(conn, got); err != nil || hex.EncodeToString(got) != step.want {
			conn.Close()
			return nil, errors.New("the proxy refuses")
		}
	}
	return conn, nil
}

// relay copies until both directions have ended, and resets both if one breaks.
func (f *faulty) relay(client net.Conn, r *bufio.Reader, wire net.Conn) {
	name := localnet.ClientName(client.RemoteAddr())
	end := f.accepted(name)
	var to, from any = client, r
	taker, finish := f.taker(client, end, r)
	if taker != nil {
		to, from = taker, taker
	}
	clean := true
	f.mu.Lock()
	counts := f.conns[name]
	f.mu.Unlock()
	var both sync.WaitGroup
	copy := func(dst io.Writer, src io.Reader, count *int) {
		b := make([]byte, 32<<10)
		for {
			n, err := src.Read(b)
			f.mu.Lock()
			if !f.is("counts nothing") {
				*count += n
			}
			f.mu.Unlock()
			if n == len(b) && f.is("changes full buffers") {
				b[0]++
			}
			if _, werr := dst.Write(b[:n]); werr != nil {
				err = werr
			}
			if err == nil {
				continue
			}
			if src == from && end != nil && !over(src) && !end.marked() && !f.is("does not look at marks") {
				err = io.ErrUnexpectedEOF
			}
			if !errors.Is(err, io.EOF) && !f.is("hides a reset") {
				f.mu.Lock()
				clean = false
				f.mu.Unlock()
				if end != nil && f.is("finishes what broke") {
					end.note(4)
				}
				if end != nil && f.is("marks what broke") {
					end.mark()
				}
				for _, conn := range []net.Conn{client, wire} {
					if socket, ok := conn.(*net.TCPConn); ok {
						_ = socket.SetLinger(0)
					}
					conn.Close()
				}
				return
			}
			if f.is("ends both directions at once") {
				wire.Close() // first, so that the other direction cannot reset it
				client.Close()
			}
			if dst == to && end != nil && !over(dst) && !f.is("marks nothing") {
				end.mark()
			}
			_ = dst.(interface{ CloseWrite() error }).CloseWrite()
			return
		}
	}
	both.Go(func() { copy(wire, from.(io.Reader), &counts.sent) })
	both.Go(func() { copy(to.(io.Writer), wire, &counts.received) })
	both.Wait()
	finish(clean)
	client.Close()
	wire.Close()
	f.mu.Lock()
	defer f.mu.Unlock()
	f.total.active--
	f.total.received += counts.received
	f.total.sent += counts.sent
	if delete(f.conns, name); f.is("never forgets") {
		f.conns[name] = &faultyCounts{}
	}
}

// over reports whether a socket that was taken over is in the place of the host's connection.
func over(conn any) bool {
	t, ok := conn.(interface{ taken() *net.TCPConn })
	return ok && t.taken() != nil
}
