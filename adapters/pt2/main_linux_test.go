package pt2_test

import (
	"bufio"
	"encoding/binary"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"pthost/adapters/pt1/wire"
	"pthost/adapters/pt2"
	"pthost/ptipc/host"
)

// patience bounds every wait of these tests: none of them measures time.
const patience = time.Minute

func TestMain(m *testing.M) {
	if len(os.Args) > 2 && os.Args[1] == "@child" {
		os.Exit(roles[os.Args[2]](os.Args[3:]))
	}
	// Otherwise every child with the race detector waits a second before it exits.
	os.Setenv("GORACE", "atexit_sleep_ms=0 "+os.Getenv("GORACE"))
	goleak.VerifyTestMain(m)
}

// self is a transport that the test binary plays.
func self(role string, args ...string) *host.Command {
	return &host.Command{
		Path: os.Args[0], Name: "pt", Args: append([]string{"@child", role}, args...), Dialect: pt2.Dialect{},
		StopTimeout: 100 * time.Millisecond, Restart: host.Restart{Never: true},
	}
}

var roles = map[string]func(args []string) int{
	// By flags, as the document of 3.0 has them: an unknown one is an error.
	"flags": func(args []string) int { return play(args, 0x09) },
	// As the programs of 2017 to 2020 do.
	"flags-80": func(args []string) int { return play(args, 0x80) },
	"refuses-settings": func(args []string) int {
		return play(args, 0xff)
	},
	"environment": func([]string) int {
		get := func(name string) string { return os.Getenv("TOR_PT_" + name) }
		o := options{
			version: get("MANAGED_TRANSPORT_VER"), state: get("STATE_LOCATION"), exit: get("EXIT_ON_STDIN_CLOSE") == "1",
			transports: get("CLIENT_TRANSPORTS") + get("SERVER_TRANSPORTS"), server: get("SERVER_TRANSPORTS") != "",
			bind: get("SERVER_BINDADDR"), orport: get("ORPORT"), extorport: get("EXTENDED_SERVER_PORT"), cookie: get("AUTH_COOKIE_FILE"),
			proxy: get("PROXY"), options: get("SERVER_TRANSPORT_OPTIONS"),
		}
		return o.run(0x09)
	},
	"positional-log": func([]string) int {
		fmt.Print("LOG WARN the clock is slow\nLOG LOUD nothing\nLOG\nVERSION 2.1\n")
		announce("socks5", serveSettings(0x09))
		return 0
	},
	"raw": func([]string) int {
		announce("transparent-TCP", func(conn net.Conn) { _, _ = io.Copy(conn, conn) })
		return 0
	},
	"datagrams": func([]string) int {
		announce("transparent-UDP", func(net.Conn) {})
		return 0
	},
	"gives-up": func(args []string) int { // on standard error, with a code
		fmt.Fprintln(os.Stderr, args[1])
		var code int
		_, _ = fmt.Sscan(args[0], &code)
		return code
	},
}

type options struct {
	server, exit                                                bool
	version, state, transports, bind, orport, target, extorport string
	cookie, proxy, options, optionsFile                         string
}

func play(args []string, method byte) int {
	var o options
	f := flag.NewFlagSet("pt", flag.ContinueOnError)
	client := f.Bool("client", false, "")
	f.BoolVar(&o.server, "server", false, "")
	f.BoolVar(&o.exit, "exit-on-stdin-close", false, "")
	for name, value := range map[string]*string{
		"ptversion": &o.version, "state": &o.state, "transports": &o.transports, "bindaddr": &o.bind, "orport": &o.orport, "target": &o.target,
		"extorport": &o.extorport, "authcookie": &o.cookie, "proxy": &o.proxy, "optionsFile": &o.optionsFile,
	} {
		f.StringVar(value, name, "", "")
	}
	if err := f.Parse(args); err != nil || *client == o.server || f.NArg() > 0 {
		fmt.Fprintln(os.Stderr, "ENV-ERROR flags:", err, f.Args())
		return 64
	}
	if o.optionsFile != "" {
		text, err := os.ReadFile(o.optionsFile)
		if err != nil {
			panic(err)
		}
		o.options = string(text)
	}
	return o.run(method)
}

func (o options) run(method byte) int {
	if !strings.Contains(","+o.version+",", ",2,") || !strings.Contains(o.version, "3.0") {
		fmt.Fprintln(os.Stderr, "VERSION-ERROR no-version")
		return 78
	}
	if o.state == "" || !o.exit || o.transports != "shadow" {
		fmt.Fprintf(os.Stderr, "ENV-ERROR %+v\n", o)
		return 64
	}
	fmt.Print("VERSION 2\n")
	if o.proxy != "" {
		fmt.Print("PROXY DONE\n")
	}
	fmt.Printf("LOG SEVERITY=notice MESSAGE=\"proxy %s, options %s\"\n", o.proxy, strings.ReplaceAll(o.options, `"`, `\"`))
	if !o.server {
		announce("socks5", serveSettings(method))
		return 0
	}
	fmt.Printf("SMETHOD shadow %s ARGS:k=v\nSMETHODS DONE\n", strings.TrimPrefix(o.bind, "shadow-"))
	conn, err := net.Dial("tcp", o.extorport)
	if err != nil {
		panic(err)
	}
	cookie, err := wire.ReadCookie(o.cookie)
	if err != nil {
		panic(err)
	}
	if err := wire.ConnectExtended(conn, cookie, wire.Client{Addr: "192.0.2.7:7", Transport: "shadow"}); err != nil {
		panic(err)
	}
	fmt.Fprint(conn, "target "+o.target+o.orport)
	conn.Close()
	_, _ = io.Copy(io.Discard, os.Stdin)
	return 0
}

// announce offers shadow until the end of standard input.
func announce(protocol string, serve func(net.Conn)) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		panic(err)
	}
	fmt.Printf("CMETHOD shadow %s %s\nCMETHODS DONE\n", protocol, l.Addr())
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer conn.Close()
				serve(conn)
			}()
		}
	}()
	_, _ = io.Copy(io.Discard, os.Stdin)
}

// seen is what a transport has been told about a connection.
type seen struct {
	Method   byte
	Settings string
	Dest     string
}

func serveSettings(method byte) func(net.Conn) {
	return func(conn net.Conn) {
		s, r, err := handshake(conn, method)
		if err != nil {
			return
		}
		_, _ = conn.Write([]byte{5, 0, 0, 1, 0, 0, 0, 0, 0, 0})
		line, _ := json.Marshal(s)
		_, _ = conn.Write(append(line, '\n'))
		_, _ = io.Copy(conn, r)
	}
}

func handshake(conn net.Conn, method byte) (s seen, r *bufio.Reader, err error) {
	r = bufio.NewReader(conn)
	next := func(n int) []byte {
		b := make([]byte, n)
		if _, e := io.ReadFull(r, b); e != nil {
			err = errors.Join(err, e)
		}
		return b
	}
	for _, offered := range next(int(next(2)[1])) {
		if offered == 0 && s.Method == 0 || offered == method {
			s.Method = offered
		}
	}
	if method == 0xff {
		s.Method = method
	}
	_, _ = conn.Write([]byte{5, s.Method})
	if s.Method == 0xff {
		return s, r, io.EOF
	}
	if s.Method != 0 {
		s.Settings = string(next(int(binary.BigEndian.Uint32(next(4)))))
	}
	request := next(4)
	name := ""
	switch request[3] {
	case 1:
		name = net.IP(next(4)).String()
	case 3:
		name = string(next(int(next(1)[0])))
	}
	s.Dest = net.JoinHostPort(name, fmt.Sprint(binary.BigEndian.Uint16(next(2))))
	return s, r, err
}
