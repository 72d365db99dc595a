package pt1_test

import (
	"bufio"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"pthost/ptipc"
	"pthost/ptipc/host"

	"pthost/adapters/pt1"
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

// self is a managed transport that the test binary plays.
func self(role string, args ...string) *host.Command {
	return &host.Command{
		Path: os.Args[0], Name: "pt", Args: append([]string{"@child", role}, args...), Dialect: pt1.Dialect{},
		StopTimeout: 100 * time.Millisecond,
		Restart:     host.Restart{Min: time.Millisecond, Max: 10 * time.Millisecond, GiveUpAfter: 3},
	}
}

// roles are the managed transports that the test binary plays. Each writes its lines
// itself: what this project writes would prove little.
var roles = map[string]func(args []string) int{
	// well-behaved tells through each connection what it has been told about it.
	"echo": func([]string) int {
		return managed("VERSION 1\n", "", func(addr string) string {
			return fmt.Sprintf("CMETHOD x socks5 %s\nCMETHODS DONE\n", addr)
		}, serveSOCKS5)
	},
	"proxied": func([]string) int {
		return managed("VERSION 1\nPROXY DONE\n", "", method, serveSOCKS5)
	},
	"socks4": func([]string) int {
		return managed("VERSION 1\n", "", func(addr string) string {
			return fmt.Sprintf("CMETHOD x socks4 %s\nCMETHODS DONE\n", addr)
		}, serveSOCKS4)
	},
	"no-version": func([]string) int { return managed("", "", method, serveSOCKS5) },
	"more-than-asks": func([]string) int {
		return managed("VERSION 1\nCMETHOD y socks5 127.0.0.1:1\n", "", method, serveSOCKS5)
	},
	"early-log": func([]string) int {
		return managed("LOG SEVERITY=Notice MESSAGE=\"before \\303\\251 \\\"version\\\"\"\nSTATUS TYPE=version IMPLEMENTATION=\"a b\" VERSION=\"1.2\"\nVERSION 1\n",
			"LOG SEVERITY=ERROR MESSAGE=bare\nSTATUS TRANSPORT=x PROGRESS=\"100\"\nNEW-THING with words\n", method, serveSOCKS5)
	},
	"endless": func([]string) int {
		return managed("VERSION 1\nCMETHOD "+strings.Repeat("x", 3<<20)+"\n", strings.Repeat("no end", 1<<20), method, serveSOCKS5)
	},
	"crlf": func([]string) int {
		return managed("VERSION 1\r\n", "", func(addr string) string { return "CMETHOD x socks5 " + addr + "\r\nCMETHODS DONE\r\n" }, serveSOCKS5)
	},
	"public": func([]string) int {
		return managed("VERSION 1\n", "", func(string) string { return "CMETHOD x socks5 0.0.0.0:4444\nCMETHODS DONE\n" }, serveSOCKS5)
	},
	"far": func([]string) int {
		return managed("VERSION 1\n", "", func(string) string { return "CMETHOD x socks5 192.0.2.1:4444\nCMETHODS DONE\n" }, serveSOCKS5)
	},
	"other-version": func([]string) int { fmt.Print("VERSION 7\n"); wait(); return 0 },
	"says": func(args []string) int { // and gives up
		fmt.Print(strings.Join(args, "\n") + "\n")
		fmt.Fprintln(os.Stderr, "last words")
		return 1
	},
	"silent": func([]string) int { wait(); return 0 },
	"deaf": func([]string) int { // to everything but SIGKILL
		signal.Ignore(syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP)
		managed("VERSION 1\n", "", method, serveSOCKS5)
		select {}
	},
	"dies-in-handshake": func([]string) int {
		return managed("VERSION 1\n", "", method, func(conn net.Conn) {
			if _, err := conn.Read(make([]byte, 1)); err == nil {
				fmt.Fprintln(os.Stderr, "no more")
				os.Exit(3)
			}
		})
	},
	"environment": func([]string) int {
		for _, v := range os.Environ() {
			if strings.HasPrefix(v, "TOR_PT_") {
				fmt.Fprintln(os.Stderr, v)
			}
		}
		return 1
	},
}

func method(addr string) string { return fmt.Sprintf("CMETHOD x socks5 %s\nCMETHODS DONE\n", addr) }

func wait() { _, _ = io.Copy(io.Discard, os.Stdin) }

// managed writes lines and serves connections until the end of standard input.
func managed(before, after string, announce func(addr string) string, serve func(net.Conn)) int {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	fmt.Print(before + announce(l.Addr().String()) + after)
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
	wait()
	return 0
}

// seen is what a managed transport has been told about a connection.
type seen struct {
	Method    byte
	Username  string
	Password  string
	Dest      string
	Pipelined bool // something came before its turn
}

// serveSOCKS5 speaks as the strictest do: what comes before its turn is a fault. It
// refuses the destination refused.invalid.
func serveSOCKS5(conn net.Conn) {
	var s seen
	step := func() []byte { // all that has come: one message, if nothing came early
		b := make([]byte, 1024)
		n, err := conn.Read(b)
		if err != nil {
			return nil
		}
		return b[:n]
	}
	greeting := step()
	if len(greeting) != 3 || greeting[0] != 5 || greeting[1] != 1 {
		return
	}
	s.Method = greeting[2]
	_, _ = conn.Write([]byte{5, s.Method})
	if s.Method == 2 {
		login := step()
		u := int(login[1])
		p := int(login[2+u])
		s.Username, s.Password = string(login[2:2+u]), string(login[3+u:3+u+p])
		s.Pipelined = s.Pipelined || len(login) != 3+u+p
		_, _ = conn.Write([]byte{1, 0})
	}
	request := step()
	switch request[3] {
	case 1:
		s.Dest = net.JoinHostPort(net.IP(request[4:8]).String(), fmt.Sprint(binary.BigEndian.Uint16(request[8:])))
	case 3:
		n := int(request[4])
		s.Dest = net.JoinHostPort(string(request[5:5+n]), fmt.Sprint(binary.BigEndian.Uint16(request[5+n:])))
	case 4:
		s.Dest = net.JoinHostPort(net.IP(request[4:20]).String(), fmt.Sprint(binary.BigEndian.Uint16(request[20:])))
	}
	if strings.HasPrefix(s.Dest, "refused.invalid:") {
		_, _ = conn.Write([]byte{5, 5, 0, 1, 0, 0, 0, 0, 0, 0})
		return
	}
	_, _ = conn.Write([]byte{5, 0, 0, 1, 0, 0, 0, 0, 0, 0})
	tell(conn, conn, s)
}

func serveSOCKS4(conn net.Conn) {
	r := bufio.NewReader(conn)
	head := make([]byte, 8)
	if _, err := io.ReadFull(r, head); err != nil {
		return
	}
	id, _ := r.ReadString(0)
	s := seen{Method: 4, Username: strings.TrimSuffix(id, "\x00")}
	port := fmt.Sprint(binary.BigEndian.Uint16(head[2:]))
	name := net.IP(head[4:]).String()
	if head[4] == 0 && head[5] == 0 && head[6] == 0 {
		name, _ = r.ReadString(0)
		name = strings.TrimSuffix(name, "\x00")
	}
	s.Dest = net.JoinHostPort(name, port)
	s.Pipelined = r.Buffered() > 0
	if name == "refused.invalid" {
		_, _ = conn.Write([]byte{0, 0x5b, 0, 0, 0, 0, 0, 0})
		return
	}
	_, _ = conn.Write([]byte{0, 0x5a, 0, 0, 0, 0, 0, 0})
	tell(conn, r, s)
}

// tell says what was seen, and then echoes.
func tell(conn net.Conn, r io.Reader, s seen) {
	line, _ := json.Marshal(s)
	_, _ = conn.Write(append(line, '\n'))
	_, _ = io.Copy(conn, r)
}

// told is what the child was told about a connection.
func told(t *testing.T, conn ptipc.Conn) seen {
	t.Helper()
	if err := conn.SetDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	r := bufio.NewReader(conn)
	line, err := r.ReadBytes('\n')
	if err != nil {
		t.Fatal(err)
	}
	var s seen
	if err := json.Unmarshal(line, &s); err != nil {
		t.Fatal(err)
	}
	if s.Pipelined {
		t.Errorf("the handshake was pipelined (PT1-5): %+v", s)
	}
	if _, err := io.WriteString(conn, "word"); err != nil {
		t.Fatal(err)
	}
	answer := make([]byte, 4)
	if _, err := io.ReadFull(r, answer); err != nil || string(answer) != "word" {
		t.Errorf("the echo is %q, error %v", answer, err)
	}
	return s
}
