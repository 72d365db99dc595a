package main

import (
	"bufio"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	ws "github.com/gorilla/websocket"

	"pthost/cmd/ptipc/internal/bench"
	"pthost/ptipc"
	"pthost/ptipc/testpeer"
	"pthost/socks"
	"pthost/transports/websocket"
)

// The benchmarks of the chain compare with other programs in the same run, in
// alternating rounds. Each program is a process of its own; the CPU time is that
// of all processes of a program, without the caller and the far end, which are
// the same for all. A benchmark takes all its rounds in one iteration. Figures are
// medians of the rounds, and ratios medians of the rounds' ratios.
const (
	chainRounds = 5
	settleTime  = 200 * time.Millisecond // windows and buffers grow
	figureTime  = 500 * time.Millisecond
	message     = 32 << 10
)

// A rig is a program under measurement.
type rig struct {
	name string
	pids []int
	// dial opens a stream to its far end.
	dial func(ctx context.Context) (io.ReadWriteCloser, error)
}

func (r rig) cpu() float64 {
	sum := 0.0
	for _, pid := range r.pids {
		sum += bench.CPUTime(pid)
	}
	return sum
}

// A figure is what happened in one round.
type figure struct{ rate, perCPU float64 } // a second, and a second of CPU time

// compare takes a figure of each rig in each round, and reports them with unit, and
// the ratios of all others to the last.
func compare(b *testing.B, what, unit string, scale float64, rigs []rig, take func(r rig) figure) {
	b.Helper()
	rates, perCPU := make([][]float64, len(rigs)), make([][]float64, len(rigs))
	for round := range chainRounds {
		for turn := range rigs { // nobody is always behind the same one
			n := (round + turn) % len(rigs)
			f := take(rigs[n])
			rates[n], perCPU[n] = append(rates[n], f.rate/scale), append(perCPU[n], f.perCPU/scale)
		}
	}
	last := len(rigs) - 1
	for n, r := range rigs {
		// One line for each: a benchmark's log is cut after ten.
		line := fmt.Sprintf("%-4s %-10s %9.1f %s/s %9.1f %s/cpu-s", what, r.name, bench.Median(rates[n]), unit, bench.Median(perCPU[n]), unit)
		if n == last {
			b.Log(line)
		} else {
			rate, cpu := bench.Ratio(rates[n], rates[last]), bench.Ratio(perCPU[n], perCPU[last])
			b.Logf("%s: %.2f times the rate of %s, %.2f times for each second of CPU", line, rate, rigs[last].name, cpu)
			b.ReportMetric(rate, fmt.Sprintf("%s-%s-x", r.name, what))
			b.ReportMetric(cpu, fmt.Sprintf("%s-%s-cpu-x", r.name, what))
		}
	}
}

// during counts what happens in the time of a figure.
func (r rig) during(count *atomic.Uint64) figure {
	<-time.After(settleTime)
	cpu, start, before := r.cpu(), time.Now(), count.Load()
	<-time.After(figureTime)
	moved := float64(count.Load() - before)
	return figure{moved / time.Since(start).Seconds(), moved / (r.cpu() - cpu)}
}

// stream moves bytes one way, and the first byte says which.
func (r rig) stream(b *testing.B, direction byte) figure {
	b.Helper()
	conn, err := r.dial(b.Context())
	if err != nil {
		b.Fatalf("%s: %v", r.name, err)
	}
	if _, err := conn.Write([]byte{direction}); err != nil {
		b.Fatalf("%s: %v", r.name, err)
	}
	move := conn.Write
	if direction == 'd' {
		move = conn.Read
	}
	return r.flow(b, conn, message, move)
}

// echoes sends messages and counts what comes back.
func (r rig) echoes(b *testing.B, size int) figure {
	b.Helper()
	conn, err := r.dial(b.Context())
	if err != nil {
		b.Fatalf("%s: %v", r.name, err)
	}
	var writer sync.WaitGroup
	writer.Go(func() {
		for buf := make([]byte, size); err == nil; {
			_, err = conn.Write(buf)
		}
	})
	defer writer.Wait()
	return r.flow(b, conn, size, conn.Read)
}

// flow takes a figure of what move does, and closes conn.
func (r rig) flow(b *testing.B, conn io.Closer, size int, move func([]byte) (int, error)) figure {
	b.Helper()
	var count atomic.Uint64
	var over atomic.Bool
	broke := make(chan error, 1)
	go func() {
		for buf := make([]byte, size); ; {
			n, err := move(buf)
			count.Add(uint64(n))
			if err != nil {
				if over.Load() {
					err = nil
				}
				broke <- err
				return
			}
		}
	}()
	f := r.during(&count)
	over.Store(true)
	_ = conn.Close() // with bytes on their way
	if err := <-broke; err != nil {
		b.Fatalf("%s: %v", r.name, err)
	}
	return f
}

// gorilla is a WebSocket as a stream: a Write is a message.
type gorilla struct {
	*ws.Conn
	r io.Reader
}

func (g *gorilla) Write(p []byte) (int, error) { return len(p), g.WriteMessage(ws.BinaryMessage, p) }

func (g *gorilla) Read(p []byte) (int, error) {
	for {
		if g.r == nil {
			_, r, err := g.NextReader()
			if err != nil {
				return 0, err
			}
			g.r = r
		}
		n, err := g.r.Read(p)
		if errors.Is(err, io.EOF) {
			g.r = nil
			if n == 0 {
				continue
			}
			err = nil
		}
		return n, err
	}
}

// dialGorilla is the client that is the same for all servers.
func dialGorilla(to string, size int) func(ctx context.Context) (io.ReadWriteCloser, error) {
	dialer := ws.Dialer{
		ReadBufferSize: message + 14, WriteBufferSize: size,
		TLSClientConfig: &tls.Config{InsecureSkipVerify: true}, // what it costs is the same
	}
	return func(ctx context.Context) (io.ReadWriteCloser, error) {
		conn, _, err := dialer.DialContext(ctx, to, nil)
		if err != nil {
			return nil, err
		}
		return &gorilla{Conn: conn}, nil
	}
}

// dialSOCKS connects to dest through a SOCKS5 proxy.
func dialSOCKS(proxy string, user *url.Userinfo, dest string) func(ctx context.Context) (io.ReadWriteCloser, error) {
	return func(ctx context.Context) (io.ReadWriteCloser, error) {
		var d net.Dialer
		conn, err := d.DialContext(ctx, "tcp", proxy)
		if err != nil {
			return nil, err
		}
		if err := socks.ConnectUpstream(ctx, conn, user, dest); err != nil {
			return nil, errors.Join(err, conn.Close())
		}
		return conn, nil
	}
}

// webSockets makes a configuration for each end, of ws:// or wss://.
func webSockets(b *testing.B, scheme string) (client, server map[string]any) {
	b.Helper()
	client, server = generateWebSocket(b, `{"listen":"127.0.0.1:0","host":"127.0.0.1"}`)
	if scheme == "ws" {
		client = map[string]any{"url": strings.Replace(client["url"].(string), "wss:", "ws:", 1)}
		server = map[string]any{"listen": server["listen"], "path": server["path"]}
	}
	return client, server
}

// startLine runs a program until the benchmark ends, and returns its first line
// of output that begins with prefix, without it. The end of its standard input
// ends it.
func startLine(b *testing.B, cmd *exec.Cmd, prefix string) string {
	b.Helper()
	stdin, err := cmd.StdinPipe()
	if err != nil {
		b.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		b.Fatal(err)
	}
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		b.Fatal(err)
	}
	found := make(chan string, 1)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for lines := bufio.NewScanner(stdout); lines.Scan(); {
			if rest, ok := strings.CutPrefix(lines.Text(), prefix); ok {
				select {
				case found <- rest:
				default: // another one
				}
			}
		}
		_ = cmd.Wait() // it has said what it had to say
	}()
	b.Cleanup(func() {
		_ = stdin.Close()
		kill := time.AfterFunc(10*time.Second, func() { _ = cmd.Process.Kill() })
		<-ended
		kill.Stop()
	})
	select {
	case line := <-found:
		return line
	case <-ended:
		b.Fatalf("%s has ended", cmd.Path)
	case <-time.After(patience):
		b.Fatalf("%s does not say %q", cmd.Path, prefix)
	}
	return ""
}

// startFar runs the destination, which does what the first byte of a connection says.
func startFar(b *testing.B) string {
	b.Helper()
	return startLine(b, toolCommand(context.Background(), b, "bench", benchPeer, "far", "127.0.0.1:0"), "")
}

// benchChain starts both ends.
func benchChain(b *testing.B, scheme, adapter, far string) rig {
	b.Helper()
	client, server := webSockets(b, scheme)
	s := startServer(b, server, map[string]any{"via": []string{"free"}, "egress": map[string]any{"allow": []string{far}}})
	c := startClient(b, client, map[string]any{"serve": "socks5", "via": []string{adapter, "client"}})
	return rig{adapter + "-" + scheme, []int{c.cmd.Process.Pid, s.cmd.Process.Pid}, dialSOCKS(c.front, nil, far)}
}

// Bulk data against websockify, which takes a WebSocket and connects it to a
// service. In its place stand a server of ours in a child, delivered to the same
// service and with the same client before it, and the whole chain, which has more
// to do, with a client of its own.
//
// All of them speak TLS 1.3 on the wire, with AES-GCM of 128 bits, which the client of Go
// asks for first. websockify and the server of ours each count one end of TLS, the chain
// both. The client of the first two is in this process: it counts for nobody, but takes
// its share of the machine.
func BenchmarkChainBulk(b *testing.B) {
	websockify := testpeer.Need(b, "websockify")
	for _, scheme := range []string{"ws", "wss"} {
		b.Run(scheme, func(b *testing.B) {
			far := startFar(b)
			client, server := webSockets(b, scheme)
			var args []string
			if scheme == "wss" {
				dir := b.TempDir()
				for _, name := range []string{"certificate", "key"} {
					path := filepath.Join(dir, name)
					if err := os.WriteFile(path, []byte(server[name].(string)), 0o600); err != nil {
						b.Fatal(err)
					}
					args = append(args, map[string]string{"certificate": "--cert=", "key": "--key="}[name]+path)
				}
				args = append(args, "--ssl-only")
			}
			addr := freePort(b)
			peer := exec.Command(websockify, append(args, addr, far)...)
			startPeer(b, addr, peer)
			delivered := startServer(b, server, map[string]any{"deliver": "tcp://" + far})
			rigs := []rig{
				{"server", []int{delivered.cmd.Process.Pid}, dialGorilla(client["url"].(string), message)},
				benchChain(b, scheme, "free", far),
				benchChain(b, scheme, "mux", far),
				{"websockify", []int{peer.Process.Pid}, dialGorilla(scheme+"://"+addr+"/", message)},
			}
			b.Logf("congestion control is %s", bench.CongestionControl())
			for b.Loop() {
				compare(b, "up", "MB", 1e6, rigs, func(r rig) figure { return r.stream(b, 'u') })
				compare(b, "down", "MB", 1e6, rigs, func(r rig) figure { return r.stream(b, 'd') })
			}
			b.ReportMetric(0, "ns/op")
		})
	}
}

// An echo over the WebSocket of this module and over bare gorilla, with the same
// client: the transport alone in its process, and a server in a child that
// delivers to an echo over TCP, whose own CPU time does not count.
func BenchmarkChainEcho(b *testing.B) {
	for _, scheme := range []string{"ws", "wss"} {
		for _, size := range []int{1 << 10, message} {
			b.Run(fmt.Sprintf("%s/%dK", scheme, size>>10), func(b *testing.B) {
				var rigs []rig
				echo := func(kind string) rig {
					client, server := webSockets(b, scheme)
					text, err := json.Marshal(server)
					if err != nil {
						b.Fatal(err)
					}
					pid, addr := startEchoProcess(b, kind, string(text))
					to, err := url.Parse(client["url"].(string))
					if err != nil {
						b.Fatal(err)
					}
					to.Host = addr
					return rig{kind, []int{pid}, dialGorilla(to.String(), size)}
				}
				_, service := startEchoProcess(b, echoTCP, "{}")
				client, server := webSockets(b, scheme)
				delivered := startServer(b, server, map[string]any{"deliver": "tcp://" + service})
				rigs = append(rigs, echo(echoOurs),
					rig{"delivered", []int{delivered.cmd.Process.Pid}, dialGorilla(client["url"].(string), size)}, echo(echoGorilla))
				for b.Loop() {
					compare(b, "echo", "MB", 1e6, rigs, func(r rig) figure { return r.echoes(b, size) })
				}
				b.ReportMetric(0, "ns/op")
			})
		}
	}
}

// Connections a second: front, free, WebSocket with and without TLS and a byte of
// the destination, against a pair of obfs4proxy.
func BenchmarkChainConnections(b *testing.B) {
	obfs4proxy := testpeer.Need(b, "obfs4proxy")
	far := startFar(b)
	rigs := []rig{benchChain(b, "wss", "mux", far), benchChain(b, "wss", "free", far), benchChain(b, "ws", "free", far), startObfs4(b, obfs4proxy, far)}
	for _, atOnce := range []int{1, 16} {
		b.Run(fmt.Sprintf("%d-at-once", atOnce), func(b *testing.B) {
			for b.Loop() {
				compare(b, "dial", "conns", 1, rigs, func(r rig) figure { return r.hellos(b, atOnce) })
			}
			b.ReportMetric(0, "ns/op")
		})
	}
}

// hellos opens connections, has a byte come back, and closes them.
func (r rig) hellos(b *testing.B, atOnce int) figure {
	b.Helper()
	var count atomic.Uint64
	var over atomic.Bool
	var workers sync.WaitGroup
	hello := func() error {
		conn, err := r.dial(b.Context())
		if err != nil {
			return err
		}
		defer conn.Close()
		var answer [1]byte
		if _, err := conn.Write([]byte{'h'}); err != nil {
			return err
		}
		_, err = io.ReadFull(conn, answer[:])
		return err
	}
	for range atOnce {
		workers.Go(func() {
			for !over.Load() {
				if err := hello(); err != nil {
					b.Errorf("%s: %v", r.name, err)
					return
				}
				count.Add(1)
			}
		})
	}
	f := r.during(&count)
	over.Store(true)
	workers.Wait()
	return f
}

// startObfs4 runs a server and a client of obfs4, which are told by their
// environment what to do (pt-spec, version 1).
func startObfs4(b *testing.B, path, far string) rig {
	b.Helper()
	start := func(prefix string, env ...string) (pid int, line string) {
		cmd := exec.Command(path)
		cmd.Env = append(env, "TOR_PT_MANAGED_TRANSPORT_VER=1", "TOR_PT_EXIT_ON_STDIN_CLOSE=1", "TOR_PT_STATE_LOCATION="+b.TempDir())
		line = startLine(b, cmd, prefix) // before its pid is read
		return cmd.Process.Pid, line
	}
	server, line := start("SMETHOD obfs4 ", "TOR_PT_SERVER_TRANSPORTS=obfs4", "TOR_PT_SERVER_BINDADDR=obfs4-127.0.0.1:0", "TOR_PT_ORPORT="+far)
	bridge, args, _ := strings.Cut(line, " ARGS:")
	client, line := start("CMETHOD obfs4 ", "TOR_PT_CLIENT_TRANSPORTS=obfs4")
	proxy, ok := strings.CutPrefix(line, "socks5 ")
	if !ok {
		b.Fatalf("the client of obfs4 says %q", line)
	}
	user := url.UserPassword(strings.ReplaceAll(args, ",", ";"), "\x00")
	return rig{"obfs4", []int{server, client}, dialSOCKS(proxy, user, bridge)}
}

const (
	// echoCommand is the name under which the test binary is an echo: a kind, and the
	// configuration of a WebSocket server.
	echoCommand = "ptipc-test-echo"

	echoOurs    = "transport"
	echoGorilla = "gorilla"
	echoTCP     = "tcp"
)

// startEchoProcess runs an echo in a process of its own.
func startEchoProcess(b *testing.B, kind, config string) (pid int, addr string) {
	b.Helper()
	self, err := os.Executable()
	if err != nil {
		b.Fatal(err)
	}
	cmd := &exec.Cmd{Path: self, Args: []string{echoCommand, kind, config}}
	addr = startLine(b, cmd, "listening on ")
	return cmd.Process.Pid, addr
}

// echoMain is the process of an echo. It ends with its standard input.
func echoMain() {
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin)
		os.Exit(0)
	}()
	if err := serveEcho(os.Args[1], ptipc.Opaque(os.Args[2])); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func serveEcho(kind string, config ptipc.Opaque) error {
	var l net.Listener
	var err error
	if kind == echoOurs {
		l, err = websocket.Server.Listen(context.Background(), config, ptipc.Env{})
	} else {
		l, err = net.Listen("tcp", "127.0.0.1:0")
	}
	if err != nil {
		return err
	}
	fmt.Fprintln(os.Stdout, "listening on", l.Addr())
	if kind == echoGorilla {
		return serveGorilla(l, config)
	}
	for {
		conn, err := l.Accept()
		if err != nil {
			return err
		}
		go func() {
			defer conn.Close()
			buf := make([]byte, message)
			for {
				n, err := conn.Read(buf)
				if err != nil {
					return
				}
				if _, err := conn.Write(buf[:n]); err != nil {
					return
				}
			}
		}()
	}
}

// serveGorilla is gorilla's example of an echo, without the copies that it can do without.
func serveGorilla(l net.Listener, config ptipc.Opaque) error {
	var pair struct{ Certificate, Key string }
	if err := json.Unmarshal(config, &pair); err != nil {
		return err
	}
	if pair.Key != "" {
		own, err := tls.X509KeyPair([]byte(pair.Certificate), []byte(pair.Key))
		if err != nil {
			return err
		}
		l = tls.NewListener(l, &tls.Config{Certificates: []tls.Certificate{own}, MinVersion: tls.VersionTLS13})
	}
	upgrader := ws.Upgrader{ReadBufferSize: message + 14, WriteBufferSize: message}
	return http.Serve(l, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		conn, err := upgrader.Upgrade(w, r, nil)
		if err != nil {
			return
		}
		defer conn.Close()
		for {
			kind, from, err := conn.NextReader()
			if err != nil {
				return
			}
			to, err := conn.NextWriter(kind)
			if err != nil {
				return
			}
			if _, err := io.Copy(to, from); err != nil {
				return
			}
			if err := to.Close(); err != nil {
				return
			}
		}
	}))
}
