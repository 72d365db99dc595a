package conformance_test

import (
	"bufio"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/url"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"pthost/ptipc/conformance"
	"pthost/ptipc/localnet"
)

// A managedFaulty is what a faulty child is told that is a managed transport. It reads
// and writes everything itself, as the other one does.
type managedFaulty struct {
	two    bool // PT 2.0 to 3.0
	told   map[string]string
	source string // the address that the wire goes out from
}

// managedVariables are those of the environment, with the flags of PT 2.
var managedVariables = map[string]string{
	"MANAGED_TRANSPORT_VER": "ptversion", "STATE_LOCATION": "state", "CLIENT_TRANSPORTS": "", "SERVER_TRANSPORTS": "", "PROXY": "proxy",
	"EXIT_ON_STDIN_CLOSE": "", "SERVER_TRANSPORT_OPTIONS": "", "SERVER_BINDADDR": "bindaddr", "ORPORT": "target",
	"EXTENDED_SERVER_PORT": "extorport", "AUTH_COOKIE_FILE": "authcookie", "OUTBOUND_BIND_ADDRESS_V4": "",
}

// tell reads the environment or the flags.
func (m *managedFaulty) tell(args []string) error {
	m.told = map[string]string{}
	if !m.two {
		for name := range managedVariables {
			m.told[name] = os.Getenv("TOR_PT_" + name)
		}
		return nil
	}
	flags := flag.NewFlagSet("pt", flag.ContinueOnError)
	values := map[string]*string{}
	for variable, name := range managedVariables {
		if name != "" {
			values[variable] = flags.String(name, "", "")
		}
	}
	names := flags.String("transports", "", "")
	client, server, exit := flags.Bool("client", false, ""), flags.Bool("server", false, ""), flags.Bool("exit-on-stdin-close", false, "")
	if err := flags.Parse(args); err != nil {
		return err
	}
	for variable, value := range values {
		m.told[variable] = *value
	}
	switch {
	case *client && !*server:
		m.told["CLIENT_TRANSPORTS"] = *names
	case *server && !*client:
		m.told["SERVER_TRANSPORTS"] = *names
	}
	if *exit {
		m.told["EXIT_ON_STDIN_CLOSE"] = "1"
	}
	return nil
}

// fail writes the line of an error, and exits.
func (f *faulty) fail(format string, args ...any) {
	if f.is("pt: gives up silently") {
		os.Exit(1)
	}
	if f.managed.two {
		fmt.Fprintf(os.Stderr, format+"\n", args...)
		os.Exit(64)
	}
	f.say(format, args...)
	if f.is("pt: lives on after an error") {
		_, _ = io.Copy(io.Discard, os.Stdin)
	}
	os.Exit(1)
}

// managedMain is the child.
func managedMain(fault string, two bool, args []string) {
	m := &managedFaulty{two: two}
	f := &faulty{fault: fault, role: conformance.Client, managed: m, conns: map[string]*faultyCounts{}}
	f.host.UID = -1
	terms := make(chan os.Signal, 2)
	signal.Notify(terms, syscall.SIGTERM, os.Interrupt)
	if err := m.tell(args); err != nil {
		f.fail("ENV-ERROR flags")
	}
	versions := strings.Split(m.told["MANAGED_TRANSPORT_VER"], ",")
	version := "1"
	if two {
		version = "2"
	}
	switch {
	case f.is("pt: takes any version") && len(versions[0]) > 0:
	case f.is("pt: needs no version") && versions[0] == "":
	case f.is("pt: takes its own version alone") && (versions[0] != version && !two || two && len(versions) > 5):
		f.fail("VERSION-ERROR no-version")
	case !slices.Contains(versions, version):
		f.fail("VERSION-ERROR no-version")
	}
	if !f.is("VERSION late") {
		f.say("VERSION %s", version)
	}
	switch {
	case f.is("LOG with a bad escape"):
		f.say(`LOG SEVERITY=notice MESSAGE="\q"`)
	case f.is("STATUS with an open quote"):
		f.say(`STATUS TRANSPORT=faulty PROGRESS="`)
	case f.is("pt: writes UTF-8"):
		f.say("LOG SEVERITY=notice MESSAGE=\"caf\u00e9\"")
	}
	f.say(`LOG SEVERITY=notice MESSAGE="hello \303\251"`)
	f.say(`STATUS TRANSPORT=faulty PROGRESS="100"`)
	if f.is("never ready") {
		_, _ = io.Copy(io.Discard, os.Stdin)
		os.Exit(0)
	}
	names := m.told["CLIENT_TRANSPORTS"]
	if m.told["SERVER_TRANSPORTS"] != "" {
		f.role, names = conformance.Server, m.told["SERVER_TRANSPORTS"]
	}
	if names == "" && !f.is("pt: needs no transports") {
		f.fail("ENV-ERROR no transport is named")
	}
	if f.is("pt: is confused by other names") && names != "faulty" {
		f.fail("ENV-ERROR unknown transport")
	}
	if f.is("pt: needs the state location") {
		if _, err := os.Stat(m.told["STATE_LOCATION"]); err != nil {
			f.fail("ENV-ERROR no state location")
		}
	}
	if err := os.MkdirAll(m.told["STATE_LOCATION"], 0o700); err != nil {
		f.fail("ENV-ERROR %v", err)
	}
	if !f.is("pt: does not know source addresses") {
		m.source = m.told["OUTBOUND_BIND_ADDRESS_V4"]
	}
	f.managedProxy()
	ended := make(chan struct{})
	go func() {
		_, _ = io.Copy(io.Discard, bufio.NewReader(os.Stdin))
		if (m.told["EXIT_ON_STDIN_CLOSE"] == "1" || f.is("pt: always ends with stdin")) && !f.is("ignores the end of stdin") {
			close(ended)
		}
	}()
	if f.role == conformance.Server {
		f.announceManagedServer()
	} else {
		f.announceManaged()
	}
	f.serving.Go(f.accept)
	for stopped := false; !stopped; {
		select {
		case <-ended:
			stopped = true
		case s := <-terms:
			ignored := s == syscall.SIGTERM && f.is("ignores SIGTERM") || s == os.Interrupt && f.is("pt: ignores SIGINT")
			stopped = !ignored
		}
	}
	f.managedEnd()
}

// managedEnd is the end of the child, in order.
func (f *faulty) managedEnd() {
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
	if f.is("leaves a file outside") {
		_ = os.WriteFile("left", nil, 0o600)
		_ = os.WriteFile("../left", nil, 0o600)
	}
	f.listener.Close()
	drained := make(chan struct{})
	go func() { f.serving.Wait(); close(drained) }()
	patience := 5 * time.Second
	if f.is("pt: waits for ever in the end") {
		patience = time.Hour
	}
	select {
	case <-drained:
	case <-time.After(patience):
	}
	if f.is("pt: does not end while it was used") && f.total.opened > 0 {
		select {}
	}
	if f.is("exits with 1 at the end") {
		os.Exit(1)
	}
	os.Exit(0)
}

func (f *faulty) managedProxy() {
	f.host.Proxy = f.managed.told["PROXY"]
	if f.host.Proxy == "" {
		return
	}
	if f.is("tells the password of the proxy") {
		fmt.Fprintln(os.Stderr, "proxy", f.host.Proxy)
	}
	u, err := url.Parse(f.host.Proxy)
	if (err != nil || u.Scheme != "socks5" || u.Hostname() == "" || u.Port() == "") && !f.is("takes any proxy") {
		f.fail("PROXY-ERROR the proxy is not socks5://[USER:PASSWORD@]HOST:PORT")
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

func (f *faulty) announceManaged() {
	addr := f.listen()
	protocol := "socks5"
	switch {
	case f.is("done before it listens"):
		f.listener.Close()
		bound, at, err := bindTCP()
		if err != nil {
			f.die(71, "%v", err)
		}
		addr = at
		f.listener = &lateListener{bound: bound, ready: make(chan struct{})}
	case f.is("announces a public address"):
		addr = "203.0.113.1:1080"
	case f.is("CMETHOD of another protocol"):
		protocol = "http"
	}
	f.say("CMETHOD faulty %s %s", protocol, addr)
	if f.is("VERSION late") {
		f.say("VERSION 1")
	}
	f.say("CMETHODS DONE")
	if f.is("announces after the end") {
		f.say("CMETHOD late socks5 127.0.0.1:1")
	}
}

func (f *faulty) announceManagedServer() {
	m := f.managed
	if m.told["EXTENDED_SERVER_PORT"] != "" && m.told["AUTH_COOKIE_FILE"] == "" && !f.is("pt: needs no cookie") {
		f.fail("ENV-ERROR no cookie")
	}
	if options := m.told["SERVER_TRANSPORT_OPTIONS"]; options != "" && !f.is("pt: takes any options") {
		name, rest, ok := strings.Cut(options, ":")
		if !ok || name == "" || !strings.Contains(rest, "=") || strings.HasSuffix(rest, `\`) {
			f.fail("ENV-ERROR options")
		}
	}
	_, at, _ := strings.Cut(m.told["SERVER_BINDADDR"], "-")
	if f.is("pt: listens where it likes") {
		at = "127.0.0.1:0"
	}
	var err error
	if f.listener, err = net.Listen("tcp", at); err != nil {
		f.die(71, "%v", err)
	}
	if f.is("listens everywhere") {
		if _, err := net.Listen("tcp4", "0.0.0.0:0"); err != nil {
			f.die(71, "%v", err)
		}
	}
	args := "key=" + f.key()
	switch {
	case f.is("pt: ARGS without a value"):
		args += ",more"
	case f.is("pt: ARGS that need escapes"):
		args += `,more=a\,b`
	}
	f.say("SMETHOD faulty %s ARGS:%s", f.listener.Addr(), args)
	if f.is("VERSION late") {
		f.say("VERSION 1")
	}
	f.say("SMETHODS DONE")
	if f.is("announces after the end") {
		f.say("SMETHOD late 127.0.0.1:1")
	}
}

// key is what the server keeps.
func (f *faulty) key() string {
	path := filepath.Join(f.managed.told["STATE_LOCATION"], "key")
	if text, err := os.ReadFile(path); err == nil && !f.is("pt: forgets its key") {
		return string(text)
	}
	var b [8]byte
	_, _ = rand.Read(b[:])
	text := fmt.Sprintf("%x", b)
	_ = os.WriteFile(path, []byte(text), 0o600)
	return text
}

// methods are those of the handshake, the first first.
func (f *faulty) methods() []byte {
	switch {
	case f.managed == nil:
		return []byte{0x80, 0x09, 0}
	case f.is("pt: knows no method but 00"):
		return []byte{0}
	case f.is("prefers no settings"):
		return []byte{0, 2, 0x09}
	case f.managed.two:
		return []byte{0x09, 0}
	}
	return []byte{2, 0}
}

// dialer is how the wire goes out.
func (f *faulty) dialer() net.Dialer {
	var d net.Dialer
	if f.managed != nil && f.managed.source != "" {
		d.LocalAddr = &net.TCPAddr{IP: net.ParseIP(f.managed.source)}
	}
	return d
}

// login reads arguments (RFC 1929) and answers.
func (f *faulty) login(conn net.Conn, r *bufio.Reader) bool {
	if f.is("takes no pipelining") && r.Buffered() > 0 {
		return false
	}
	field := func() string {
		n, err := r.ReadByte()
		b := make([]byte, n)
		if err == nil {
			_, err = io.ReadFull(r, b)
		}
		if err != nil {
			return ""
		}
		return string(b)
	}
	_, _ = r.ReadByte()
	text, more := field(), field()
	if f.is("takes no pipelining") && r.Buffered() > 0 {
		return false
	}
	if more != "\x00" {
		text += more
	}
	ok := f.argumentsOK(text)
	switch {
	case f.is("pt: takes no long arguments") && len(text) > 255, f.is("pt: takes the NUL for an argument") && more == "\x00":
		ok = false
	}
	status := byte(1)
	if ok {
		status = 0
	}
	_, _ = conn.Write([]byte{1, status})
	return ok
}

func (f *faulty) argumentsOK(text string) bool {
	if f.is("pt: takes any arguments") {
		return true
	}
	escaped, inKey, size := false, true, 0
	for _, c := range []byte(text) {
		switch {
		case escaped:
			if c == '\\' && f.is("pt: does not know escapes") || c != '\\' && c != ';' && c != '=' && f.is("pt: knows three escapes") {
				return false
			}
			escaped, size = false, size+1
		case c == '\\':
			escaped = true
		case c == '=' && inKey:
			if size == 0 {
				return false
			}
			inKey = false
		case c == ';':
			if inKey {
				return false
			}
			inKey, size = true, 0
		default:
			size++
		}
	}
	return !escaped && !inKey
}

var errExtended = errors.New("the Extended ORPort refuses")

// bring carries a client of the wire to the parent.
func (f *faulty) bring(client *net.TCPConn) {
	if f.is("pt: brings one after the other") {
		f.mu.Lock()
	}
	to, r, err := f.parent(client)
	if f.is("pt: brings one after the other") {
		f.mu.Unlock()
	}
	if err != nil {
		if f.is("pt: keeps clients that nobody takes") {
			<-time.After(time.Hour)
		}
		client.Close()
		return
	}
	name := localnet.ClientName(to.RemoteAddr())
	f.mu.Lock()
	f.total.active++
	f.total.opened++
	f.conns[name] = &faultyCounts{opened: time.Now()}
	f.mu.Unlock()
	f.relay(to, r, client)
}

func (f *faulty) parent(client *net.TCPConn) (to *net.TCPConn, r *bufio.Reader, err error) {
	m := f.managed
	addr := m.told["EXTENDED_SERVER_PORT"]
	extended := addr != ""
	if !extended || f.is("pt: uses the plain ORPort") {
		addr, extended = m.told["ORPORT"], f.is("pt: speaks to the plain ORPort")
	}
	conn, err := net.Dial("tcp", addr)
	if err != nil {
		return nil, nil, err
	}
	to, r = conn.(*net.TCPConn), bufio.NewReader(conn)
	if extended {
		if err = f.introduce(to, r, client); err != nil {
			to.Close()
		}
	}
	return to, r, err
}

// introduce proves the cookie, has it proved, and says who the client is.
func (f *faulty) introduce(to *net.TCPConn, r *bufio.Reader, client *net.TCPConn) (err error) {
	read := func(n int) []byte {
		b := make([]byte, n)
		if err == nil {
			_, err = io.ReadFull(r, b)
		}
		return b
	}
	file, ferr := os.ReadFile(f.managed.told["AUTH_COOKIE_FILE"])
	if ferr != nil || len(file) != 64 {
		return errExtended
	}
	hash := func(label string, nonces []byte) []byte {
		mac := hmac.New(sha256.New, file[32:])
		mac.Write([]byte("ExtORPort authentication " + label + " hash"))
		mac.Write(nonces)
		return mac.Sum(nil)
	}
	for kind := byte(1); kind != 0 && err == nil; {
		kind = read(1)[0]
	}
	nonces := make([]byte, 32)
	_, _ = rand.Read(nonces)
	_, _ = to.Write(append([]byte{1}, nonces...))
	proof := read(32)
	nonces = append(nonces, read(32)...)
	if err != nil || !hmac.Equal(proof, hash("server-to-client", nonces)) && !f.is("pt: believes any parent") {
		return errExtended
	}
	_, _ = to.Write(hash("client-to-server", nonces))
	if read(1)[0] != 1 {
		return errExtended
	}
	command := func(n uint16, body string) []byte {
		b := binary.BigEndian.AppendUint16(nil, n)
		return append(binary.BigEndian.AppendUint16(b, uint16(len(body))), body...)
	}
	who := client.RemoteAddr().String()
	if f.is("pt: hides the client's address") {
		who = "127.0.0.1:1"
	}
	_, _ = to.Write(slices.Concat(command(1, who), command(2, "faulty"), command(0, "")))
	if f.is("pt: sends before OKAY") {
		b := make([]byte, 5)
		_ = client.SetReadDeadline(time.Now().Add(50 * time.Millisecond))
		n, _ := io.ReadFull(client, b)
		_ = client.SetReadDeadline(time.Time{})
		_, _ = to.Write(b[:n])
	}
	for {
		head := read(4)
		read(int(binary.BigEndian.Uint16(head[2:])))
		switch answer := binary.BigEndian.Uint16(head); {
		case err != nil:
			return err
		case answer == 0x1000:
			if next, _ := r.Peek(r.Buffered()); f.is("pt: reads beyond OKAY") && string(next) == "first" {
				_, _ = r.Discard(r.Buffered())
			}
			return nil
		case answer == 0x1001 && !f.is("pt: does not understand DENY"):
			return errExtended
		case answer == 0x1001:
			return nil
		case f.is("pt: knows every answer"):
			return errExtended
		}
	}
}
