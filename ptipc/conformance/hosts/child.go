package hosts

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"pthost/ptipc"
	"pthost/ptipc/localnet"
)

const (
	// probeName is what the child calls its connection factory.
	probeName = "probe"
	// lifetime is when a child ends that nobody has stopped: the suite may have been
	// killed.
	lifetime = time.Minute
	// grandchild is the argument of a process that a child has started.
	grandchild = "grandchild"
)

// A script is what the child of a case does, where it differs from an honest one.
type script struct {
	first    func(k *kid)                // before its first line
	announce func(k *kid)                // in place of VERSION to CMETHODS DONE
	ready    func(k *kid)                // after CMETHODS DONE
	serve    func(k *kid, conn net.Conn) // in place of the handshake and what follows
	relay    func(k *kid, conn net.Conn) // after the handshake, in place of an echo
	args     string                      // of its CMETHOD line
	stubborn bool                        // it ignores the end of standard input, and SIGTERM
	deaf     bool                        // it does not read standard input, not even its configuration
	noProxy  bool                        // it says nothing about the upstream proxy
	unix     bool                        // it listens on a unix socket, if it may
	wrapped  bool                        // its executable is a script that waits for it
}

// A kid is the child while it runs.
type kid struct {
	dir    string // of the case
	order  order
	script script
	number int // of this start, from 1
	host   struct {
		Listen  string `json:"listen"`
		Proxy   string `json:"proxy"`
		Deliver string `json:"deliver"`
	}
	addr string // where it listens
}

// Child is the main function of the suite's child: args are what follows
// Subject.Child on its command line. It returns the exit code.
func Child(args []string) int {
	if len(args) < 1 {
		fmt.Fprintln(os.Stderr, "this command is started by the host that a conformance suite looks at")
		return int(ptipc.ExitUsage)
	}
	k := &kid{dir: args[0]}
	args = args[1:]
	var err error
	if k.order, err = readOrder(k.dir); err != nil {
		fmt.Fprintln(os.Stderr, "the suite's child:", err)
		return int(ptipc.ExitNoInput)
	}
	p := find(k.order.Case)
	if p == nil {
		fmt.Fprintln(os.Stderr, "the suite's child: no such case:", k.order.Case)
		return int(ptipc.ExitDataErr)
	}
	k.script = p.child
	time.AfterFunc(lifetime, func() { k.exit(int(ptipc.ExitSoftware)) })
	signals := make(chan os.Signal, 8)
	signal.Notify(signals, syscall.SIGTERM, os.Interrupt, syscall.SIGHUP)
	if len(args) > 0 && args[0] == grandchild {
		k.tell(event{What: grandchild})
		for range signals { // none of them ends it
		}
	}
	go func() {
		for s := range signals {
			k.tell(event{What: "term", Text: s.String()})
			if !k.script.stubborn {
				k.exit(0)
			}
		}
	}()
	signal.Ignore(syscall.SIGPIPE)
	k.live(args)
	select {} // until one of the others ends the process
}

func (k *kid) exit(code int) {
	k.tell(event{What: "exit", Length: code})
	os.Exit(code)
}

// tell must not fail: without it the suite sees nothing.
func (k *kid) tell(e event) {
	if err := tell(k.dir, e); err != nil {
		fmt.Fprintln(os.Stderr, "the suite's child:", err)
		os.Exit(int(ptipc.ExitIOErr))
	}
}

func (k *kid) failed(err error) {
	if err != nil {
		k.tell(event{What: "failed", Text: err.Error()})
		k.exit(int(ptipc.ExitOSErr))
	}
}

// say writes lines on standard output. When nobody reads any more there is nobody to
// tell.
func (k *kid) say(lines ...string) { _, _ = os.Stdout.WriteString(strings.Join(lines, "\n") + "\n") }

func (k *kid) live(args []string) {
	start := event{What: "start", Args: args, Environ: map[string]string{}}
	for _, entry := range os.Environ() {
		if name, value, _ := strings.Cut(entry, "="); strings.HasPrefix(name, "TOR_PT_") {
			start.Environ[name] = value
		}
	}
	start.Dir, start.Mode = k.state(start.Environ)
	for _, e := range events(k.dir) {
		if e.What == "start" {
			k.number++
		}
	}
	k.number++
	k.tell(start)
	in := bufio.NewReaderSize(os.Stdin, 1<<16)
	if k.order.Dialect == PT1 {
		k.host.Proxy = start.Environ["TOR_PT_PROXY"]
	} else if !k.script.deaf {
		k.configure(args, in)
	}
	if !k.script.deaf {
		go k.listen(in)
	}
	if k.script.first != nil {
		k.script.first(k)
	}
	k.failed(k.open())
	if k.script.announce != nil {
		k.script.announce(k)
	} else {
		k.announce(k.addr)
	}
	if k.script.ready != nil {
		k.script.ready(k)
	}
}

// state is the state directory with its permissions: in pt1, since the child may have to
// make it, those of what exists of its path.
func (k *kid) state(environ map[string]string) (string, uint32) {
	dir, err := os.Getwd()
	k.failed(err)
	if k.order.Dialect == PT1 {
		dir = environ["TOR_PT_STATE_LOCATION"]
	}
	for at := dir; ; at = filepath.Dir(at) {
		if info, err := os.Stat(at); err == nil {
			return dir, uint32(info.Mode().Perm())
		}
		if at == filepath.Dir(at) {
			return dir, 0
		}
	}
}

// configure reads CONFIG and HOST, wherever they are.
func (k *kid) configure(args []string, in *bufio.Reader) {
	if len(args) > 0 && args[len(args)-1] == "-" {
		line, err := in.ReadBytes('\n')
		var launch struct {
			Config json.RawMessage `json:"config"`
			Host   json.RawMessage `json:"host"`
		}
		e := event{What: "first", Length: len(line)}
		if err != nil || json.Unmarshal(line, &launch) != nil || !isObject(launch.Config) || !isObject(launch.Host) {
			e.Text = "not an object with the objects config and host in a line: " + cut(string(line))
		} else {
			k.failed(json.Unmarshal(launch.Host, &k.host))
			e.Settings = string(launch.Config)
		}
		k.tell(e)
		return
	}
	for i, arg := range args {
		if strings.HasPrefix(arg, "{") {
			k.tell(event{What: "first", Settings: arg})
			if i+1 < len(args) {
				k.failed(json.Unmarshal([]byte(args[i+1]), &k.host))
			}
			return
		}
	}
}

func isObject(text []byte) bool {
	var o map[string]any
	return json.Unmarshal(text, &o) == nil && o != nil
}

// listen reads standard input to its end.
func (k *kid) listen(in *bufio.Reader) {
	for {
		line, err := in.ReadString('\n')
		if line != "" {
			k.tell(event{What: "stdin", Text: cut(line), Length: len(line)})
		}
		if err != nil {
			k.tell(event{What: "eof"})
			if !k.script.stubborn {
				k.exit(0)
			}
			return
		}
	}
}

// open listens and serves.
func (k *kid) open() error {
	var l net.Listener
	var err error
	if k.script.unix && k.host.Listen == "unix" {
		dir, derr := localnet.OpenDir(".")
		if derr != nil {
			return derr
		}
		l, err = dir.Listen("probe.sock")
		k.addr = "unix:probe.sock"
	} else if l, err = localnet.ListenTCP("127.0.0.1:0"); err == nil {
		k.addr = l.Addr().String()
	}
	if err != nil {
		return err
	}
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer conn.Close()
				_ = conn.SetDeadline(time.Now().Add(lifetime))
				if k.script.serve != nil {
					k.script.serve(k, conn)
				} else {
					k.serve(conn)
				}
			}()
		}
	}()
	return nil
}

// hello are the lines before the first CMETHOD.
func (k *kid) hello() {
	k.say("VERSION 1")
	if k.host.Proxy != "" && !k.script.noProxy {
		k.say("PROXY DONE")
	}
}

// announce writes all lines of a start.
func (k *kid) announce(addr string) {
	k.hello()
	k.method(addr)
	k.say("CMETHODS DONE")
}

func (k *kid) method(addr string) {
	line := "CMETHOD " + k.name() + " socks5 " + addr
	if k.script.args != "" {
		line += " ARGS:" + k.script.args
	}
	k.say(line)
}

// name is what the host calls the transport: in pt1 the host decides.
func (k *kid) name() string {
	name, _, _ := strings.Cut(os.Getenv("TOR_PT_CLIENT_TRANSPORTS"), ",")
	if k.order.Dialect == PT1 && name != "" {
		return name
	}
	return probeName
}

// serve answers a handshake and echoes.
func (k *kid) serve(conn net.Conn) {
	if err := k.handshake(conn, nil); err != nil {
		return
	}
	if _, err := conn.Write([]byte{5, 0, 0, 1, 0, 0, 0, 0, 0, 0}); err != nil {
		return
	}
	if k.script.relay != nil {
		k.script.relay(k, conn)
		return
	}
	_, _ = io.Copy(conn, conn) // a broken connection is the host's affair
	if half, ok := conn.(interface{ CloseWrite() error }); ok {
		_ = half.CloseWrite()
	}
}

var errMethods = errors.New("none of the methods is known")

// handshake reads greeting, settings and request and tells of them. between, if set, is
// called before each answer.
func (k *kid) handshake(conn net.Conn, between func() error) error {
	get := func(n int) ([]byte, error) {
		b := make([]byte, n)
		_, err := io.ReadFull(conn, b)
		return b, err
	}
	answer := func(b ...byte) error {
		if between != nil {
			if err := between(); err != nil {
				return err
			}
		}
		_, err := conn.Write(b)
		return err
	}
	head, err := get(2)
	if err != nil {
		return err // a host may look whether the socket is there
	}
	methods, err := get(int(head[1]))
	if err != nil {
		return err
	}
	k.tell(event{What: "greeting", Methods: methods, Kind: head[0]})
	known := []byte{0x80, 0x09, 0x00}
	if k.order.Dialect == PT1 {
		known = []byte{0x02, 0x00}
	}
	e := event{What: "request", Methods: methods, Method: 0xff}
	for _, method := range known {
		if bytes.IndexByte(methods, method) >= 0 {
			e.Method = method
			break
		}
	}
	if err := answer(5, e.Method); err != nil {
		return err
	}
	switch e.Method {
	case 0xff:
		return errMethods
	case 0x02:
		if e.Settings, err = k.login(get); err == nil {
			err = answer(1, 0)
		}
	case 0x09, 0x80:
		e.Settings, err = k.settings(e.Method, get)
	}
	if err != nil {
		return err
	}
	if head, err = get(4); err != nil {
		return err
	}
	e.Kind = head[3]
	var host string
	switch head[3] {
	case 1, 4:
		b, err := get(map[byte]int{1: 4, 4: 16}[head[3]])
		if err != nil {
			return err
		}
		ip, _ := netip.AddrFromSlice(b)
		host = ip.String()
	default:
		n, err := get(1)
		if err != nil {
			return err
		}
		name, err := get(int(n[0]))
		if err != nil {
			return err
		}
		host = string(name)
	}
	port, err := get(2)
	if err != nil {
		return err
	}
	e.Dest = net.JoinHostPort(host, strconv.Itoa(int(binary.BigEndian.Uint16(port))))
	k.tell(e)
	if between != nil {
		return between()
	}
	return nil
}

// login reads username and password of RFC 1929, which in pt1 are the settings.
func (k *kid) login(get func(int) ([]byte, error)) (string, error) {
	var words []string
	if _, err := get(1); err != nil {
		return "", err
	}
	for range 2 {
		n, err := get(1)
		if err != nil {
			return "", err
		}
		word, err := get(int(n[0]))
		if err != nil {
			return "", err
		}
		words = append(words, string(word))
	}
	return strings.TrimSuffix(strings.Join(words, ""), "\x00"), nil
}

// settings reads a JSON object, with a length (SOCKS-3) or without (SOCKS-4).
func (k *kid) settings(method byte, get func(int) ([]byte, error)) (string, error) {
	first, err := get(1)
	if err != nil {
		return "", err
	}
	if method == 0x09 || first[0] == 0 {
		rest, err := get(3)
		if err != nil {
			return "", err
		}
		length := binary.BigEndian.Uint32(append(first, rest...))
		if length > 1<<16 {
			return "", fmt.Errorf("settings of %d bytes", length)
		}
		text, err := get(int(length))
		return string(text), err
	}
	text := first
	for !json.Valid(text) {
		b, err := get(1)
		if err != nil || len(text) > 1<<16 {
			k.tell(event{What: "unsettled", Text: cut(string(text))})
			return "", errors.Join(err, errors.New("settings without an end"))
		}
		text = append(text, b...)
	}
	return string(text), nil
}

// flood writes so many bytes of lines on an output, and tells of each MiB.
func (k *kid) flood(f *os.File, size int, line string) {
	block := strings.Repeat(line, max(1, (1<<20)/len(line)))
	for written := 0; written < size; written += len(block) {
		if _, err := f.WriteString(block); err != nil {
			return
		}
		k.tell(event{What: "written"})
	}
}

// fork starts another process, which ignores all signals that can be ignored, and waits
// until it runs.
func (k *kid) fork(session bool) {
	self, err := os.Executable()
	k.failed(err)
	args := []string{}
	for _, word := range os.Args[1:] {
		args = append(args, word)
		if word == k.dir {
			break
		}
	}
	cmd := exec.Command(self, append(args, grandchild)...) //nolint:gosec // it is this program
	if session {
		ownSession(cmd)
	}
	k.failed(cmd.Start())
	for deadline := time.Now().Add(caseTimeout); time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
		for _, e := range events(k.dir) {
			if e.What == grandchild && e.Pid == cmd.Process.Pid {
				return
			}
		}
	}
}

// deliver connects to where the host takes connections of a server (SRV-3).
func (k *kid) deliver() (net.Conn, error) {
	ctx, cancel := context.WithTimeout(context.Background(), caseTimeout)
	defer cancel()
	addr, err := localnet.ParseAddr(k.host.Deliver)
	if err != nil {
		return nil, err
	}
	if !addr.Unix() {
		return localnet.DialTCP(ctx, addr)
	}
	dir, err := localnet.OpenDir(".")
	if err != nil {
		return nil, err
	}
	return dir.Dial(ctx, addr.Name())
}
