package host

import (
	"context"
	"io"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"pthost/ptipc"
	author "pthost/ptipc/child"
	"pthost/ptipc/proc"
	"pthost/ptipc/relay"
	"pthost/ptipc/testpeer"
)

func init() {
	roles["wrapping"] = func(args []string) int {
		author.MainArgs(args, author.Transport{Client: openWrapping})
		return 0 // not reached
	}
}

// wrapped is a wire that is no plain socket, as that of most transports.
type wrapped struct{ *net.UnixConn }

func (w wrapped) Read(p []byte) (int, error)  { return w.UnixConn.Read(p) }
func (w wrapped) Write(p []byte) (int, error) { return w.UnixConn.Write(p) }

// openWrapping dials a unix socket, which is there in every network namespace.
func openWrapping(_ context.Context, config ptipc.Opaque, _ ptipc.Env) (*ptipc.Transport, error) {
	var c struct {
		To string `json:"to"`
	}
	if err := config.Decode(&c); err != nil {
		return nil, err
	}
	var meter relay.Meter
	return meter.Transport(map[string]ptipc.ConnectionFactory{
		"wrapping": meter.Factory(true, func(context.Context, ptipc.Opaque, string) (net.Conn, error) {
			conn, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: c.To, Net: "unix"})
			if err != nil {
				return nil, err
			}
			return wrapped{conn}, nil
		}),
	}, nil), nil
}

// A program's socket is handed to a child that takes it, once bulk has gone through,
// but to none in a network or of a user of its own (SOCKS-23, SOCKS-26); in any case all comes
// through, and is counted.
func TestSocketIsHandedOver(t *testing.T) {
	dir, executable := published(t)
	to := filepath.Join(dir, "wire.sock")
	wire, err := net.Listen("unix", to)
	if err != nil {
		t.Fatal(err)
	}
	defer wire.Close()
	if err := os.Chmod(to, 0o666); err != nil { //nolint:gosec // for nobody's child
		t.Fatal(err)
	}
	for _, apart := range []string{"", "network", "user"} {
		c := self("wrapping")
		if apart != "" && os.Geteuid() != 0 {
			testpeer.Skip(t, "only root makes network namespaces, and starts children of other users; run the tests as root")
		}
		switch apart {
		case "network":
			c.Args = append([]string{"--net", c.Path}, c.Args...)
			c.Path = testpeer.Need(t, "unshare")
		case "user":
			c.Path, c.Credential = executable, &proc.Credential{UID: nobody, GID: nobody}
		}
		events := record(c)
		conn, err := open(t, c, `{"to":"`+to+`"}`, ptipc.Env{}).Connections["wrapping"].Dial(within(t), nil, "")
		if err != nil {
			t.Fatal(err)
		}
		pid := last(events.until(t, Ready)).Pid
		far, err := wire.Accept()
		if err != nil {
			t.Fatal(err)
		}
		defer far.Close()
		program, socket := tcpPair(t)
		joined := make(chan error, 1)
		go func() { joined <- relay.Join(context.Background(), socket, conn) }()

		const size = 1 << 20
		echoed := make(chan error, 1)
		go func() {
			_, err := io.Copy(far, far)
			_ = far.(*net.UnixConn).CloseWrite() // Copy's error says all
			echoed <- err
		}()
		before := tcpSockets(t, pid)
		for range 2 {
			sent := make(chan error, 1)
			go func() {
				_, err := program.Write(make([]byte, size))
				sent <- err
			}()
			if _, err := io.ReadFull(program, make([]byte, size)); err != nil {
				t.Fatal(err)
			}
			if err := <-sent; err != nil {
				t.Fatal(err)
			}
		}
		want := before
		if apart == "" {
			want++
		}
		if n := tcpSockets(t, pid); n != want {
			t.Errorf("%q of its own: the child has %d TCP sockets, and had %d", apart, n, before)
		}
		if err := program.CloseWrite(); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadAll(program); err != nil {
			t.Error(err)
		}
		if err := <-joined; err != nil {
			t.Errorf("the relay: %v", err)
		}
		if err := <-echoed; err != nil {
			t.Error(err)
		}
		if s := conn.Stats(); s.Received != 2*size || s.Sent != 2*size {
			t.Errorf("%q of its own: %d bytes received and %d sent, of %d", apart, s.Received, s.Sent, 2*size)
		}
	}
}

func tcpPair(t *testing.T) (a, b *net.TCPConn) {
	t.Helper()
	l := far(t)
	conn, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	if b, err = l.AcceptTCP(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { b.Close() })
	return conn.(*net.TCPConn), b
}

// tcpSockets counts the TCP sockets among a process's descriptors that this network has.
func tcpSockets(t *testing.T, pid int) int {
	t.Helper()
	table, err := os.ReadFile("/proc/self/net/tcp")
	if err != nil {
		t.Fatal(err)
	}
	inodes := map[string]bool{}
	for _, line := range strings.Split(string(table), "\n")[1:] {
		if fields := strings.Fields(line); len(fields) > 9 {
			inodes["socket:["+fields[9]+"]"] = true
		}
	}
	n := 0
	fds, err := filepath.Glob("/proc/" + strconv.Itoa(pid) + "/fd/*")
	if err != nil {
		t.Fatal(err)
	}
	for _, fd := range fds {
		if name, err := os.Readlink(fd); err == nil && inodes[name] {
			n++
		}
	}
	return n
}
