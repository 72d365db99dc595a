package host

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"syscall"
	"time"

	"pthost/ptipc"
	author "pthost/ptipc/child"
	"pthost/ptipc/relay"
	"pthost/socks"
)

func init() {
	for name, f := range map[string]func(args []string) int{
		"fixture": playFixture,
		"say":     playSay,
		"exit":    playExit,
		"silent":  playSilent,
		"steps":   playSteps,
		"report":  playReport,
		"deaf":    playDeaf,
		"data":    playData,
		"flood":   playFlood,
		"stats":   playStats,
		"far":     playFar,
		"noise":   playNoise,
		"brief":   playBrief,
		"leave":   playLeave,

		"data-as-other": func([]string) int { return playAs("other", "") },
		"data-bound":    func([]string) int { return playAs("direct", " ARGS:bound=1") },
	} {
		roles[name] = f
	}
}

// fixture is a well-behaved transport with a factory of each kind. Its
// configuration and settings choose what goes wrong.
type fixture struct {
	Password string   `json:"password,omitempty"`
	Server   string   `json:"server,omitempty"` // of the bound factory
	Limit    limit    `json:"limit,omitempty"`
	Exit     int      `json:"exit,omitempty"`
	Say      []string `json:"say,omitempty"`
}

type limit uint8

func (l *limit) Validate() error {
	if *l > 10 {
		return &ptipc.ConfigError{Value: fmt.Sprint(*l), Problem: "is more than 10", Remedy: "give a number from 0 to 10"}
	}
	return nil
}

type fixtureSettings struct {
	Class  uint8          `json:"class,omitempty"`
	Errno  int            `json:"errno,omitempty"`
	Refuse bool           `json:"refuse,omitempty"`
	Echo   map[string]any `json:"echo,omitempty"`
}

func openFixture(ctx context.Context, config ptipc.Opaque, env ptipc.Env) (*ptipc.Transport, error) {
	var f fixture
	if err := config.Decode(&f); err != nil {
		return nil, err
	}
	if f.Exit != 0 {
		fmt.Fprintln(os.Stderr, "first of the last words")
		return nil, fmt.Errorf("told to: %w", ptipc.ExitCode(f.Exit))
	}
	for _, text := range f.Say {
		env.Logger().Warn(text, slog.Int("n", 1))
		env.Report(ctx, slog.String("transport", "free"), slog.String("progress", text))
	}
	dial := func(ctx context.Context, settings ptipc.Opaque, dest string) (net.Conn, error) {
		var s fixtureSettings
		if err := settings.Decode(&s); err != nil {
			return nil, err
		}
		switch {
		case s.Class != 0:
			return nil, ptipc.WithClass(ptipc.Class(s.Class), errors.New("as it was told"))
		case s.Errno != 0:
			return nil, &net.OpError{Op: "dial", Net: "tcp", Err: os.NewSyscallError("connect", syscall.Errno(s.Errno))}
		case s.Echo != nil: // what came is what the far end hears first
			conn, err := env.Dial(ctx, "tcp", dest)
			if err != nil {
				return nil, err
			}
			_, err = conn.Write(settings)
			return conn, err
		}
		return env.Dial(ctx, "tcp", dest)
	}
	var meter relay.Meter
	return meter.Transport(map[string]ptipc.ConnectionFactory{
		"free": meter.Factory(false, dial),
		"bound": meter.Factory(true, func(ctx context.Context, settings ptipc.Opaque, _ string) (net.Conn, error) {
			return dial(ctx, settings, f.Server)
		}),
	}, nil), nil
}

func playFixture(args []string) int {
	author.MainArgs(args, author.Transport{Client: openFixture})
	return 0
}

// own splits off the arguments of the role: those before "client" or, in the plain
// form, before CONFIG.
func own(args []string) []string {
	for i, arg := range args {
		if arg == "client" || strings.HasPrefix(arg, "{") {
			return args[:i]
		}
	}
	return args
}

// playSay writes the lines that it is given, in which {tcp}, {unix}, {wild}, {udp} and {wildudp} are
// sockets of its own, and then waits for the end of its standard input, or ends at
// !exit.
func playSay(args []string) int {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return 1
	}
	wild, err := net.Listen("tcp4", "0.0.0.0:0")
	if err != nil {
		return 1
	}
	udp, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		return 1
	}
	wildUDP, err := net.ListenPacket("udp4", "0.0.0.0:0")
	if err != nil {
		return 1
	}
	_ = os.Remove("own.sock") // of a start before this one
	if _, err := net.Listen("unix", "own.sock"); err != nil {
		return 1
	}
	replace := strings.NewReplacer("{tcp}", listener.Addr().String(), "{unix}", "unix:own.sock",
		"{wild}", fmt.Sprintf("127.0.0.1:%d", wild.Addr().(*net.TCPAddr).Port),
		"{udp}", udp.LocalAddr().String(), "{wildudp}", fmt.Sprintf("127.0.0.1:%d", wildUDP.LocalAddr().(*net.UDPAddr).Port))
	for _, line := range own(args) {
		if line == "!exit" {
			return int(ptipc.ExitConfig)
		}
		fmt.Println(replace.Replace(line))
	}
	_, _ = io.Copy(io.Discard, os.Stdin)
	return 0
}

// playExit writes its arguments but the first to standard error and exits with the
// first, or kills itself.
func playExit(args []string) int {
	args = own(args)
	for _, line := range args[1:] {
		fmt.Fprintln(os.Stderr, line)
	}
	if args[0] == "kill" {
		_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
		block()
	}
	code, _ := strconv.Atoi(args[0])
	return code
}

// playSilent says nothing and reads nothing, and does not heed SIGTERM if it is
// told to be stubborn.
func playSilent(args []string) int {
	if len(own(args)) > 0 {
		signal.Ignore(syscall.SIGTERM)
	}
	fmt.Fprintln(os.Stderr, "thinking")
	return block()
}

// block never returns. It cannot be select{}: the runtime would call it a deadlock.
func block() int {
	r, w, _ := os.Pipe()
	_, _ = r.Read(make([]byte, 1))
	return int(w.Fd())
}

// playSteps plays the n-th of its arguments when it is started for the n-th time
// in one state directory, and the last one from then on. A step is a role and its
// arguments between spaces.
func playSteps(args []string) int {
	steps := own(args)
	before, _ := os.ReadFile("starts")
	_ = os.WriteFile("starts", append(before, '.'), 0o600)
	words := strings.Fields(steps[min(len(before), len(steps)-1)])
	return play(words[0], append(words[1:], args[len(steps):]...))
}

// got is what playReport finds.
type got struct {
	Args []string
	Line string // the first of standard input
	UID  int
}

// playReport writes what it was given into its directory and is ready then.
func playReport(args []string) int {
	report := got{Args: args, UID: os.Geteuid()}
	in := bufio.NewReader(os.Stdin)
	if args[len(args)-1] == "-" {
		report.Line, _ = in.ReadString('\n')
	}
	text, _ := json.Marshal(report)
	if err := os.WriteFile("got", text, 0o600); err != nil {
		return 1
	}
	os.Stdin = os.NewFile(0, "stdin")
	return playSay([]string{"VERSION 1", "CMETHOD x socks5 {tcp}", "CMETHODS DONE"})
}

// playDeaf is ready without ever reading its standard input.
func playDeaf([]string) int {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return 1
	}
	fmt.Printf("VERSION 1\nCMETHOD x socks5 %s\nCMETHODS DONE\n", listener.Addr())
	return block()
}

// playData is ready, and exits with the code that is its argument when somebody
// sends it a byte.
func playData(args []string) int {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return 1
	}
	fmt.Printf("VERSION 1\nCMETHOD direct socks5 %s\nCMETHODS DONE\n", listener.Addr())
	for {
		conn, err := listener.Accept()
		if err != nil {
			return 1
		}
		if _, err := conn.Read(make([]byte, 1)); err == nil {
			return playExit(args)
		}
		conn.Close()
	}
}

// playLeave is ready, stops listening when somebody sends it a byte, and is gone a
// little later.
func playLeave([]string) int {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return 1
	}
	fmt.Printf("VERSION 1\nCMETHOD direct socks5 %s\nCMETHODS DONE\n", listener.Addr())
	for {
		conn, err := listener.Accept()
		if err != nil {
			return 1
		}
		if _, err := conn.Read(make([]byte, 1)); err == nil {
			listener.Close()
			conn.Close()
			<-time.After(200 * time.Millisecond)
			return 1
		}
		conn.Close()
	}
}

// playAs is ready with one factory.
func playAs(name, args string) int {
	return playSay([]string{"VERSION 1", "CMETHOD " + name + " socks5 {tcp}" + args, "CMETHODS DONE"})
}

// playBrief is ready and gone.
func playBrief([]string) int {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return 1
	}
	listener.Close()
	fmt.Printf("VERSION 1\nCMETHOD x socks5 %s\nCMETHODS DONE\n", listener.Addr())
	return 1
}

const flooded = 20000

// playFlood is ready, and writes more than anybody wants to read.
func playFlood([]string) int {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return 1
	}
	defer listener.Close()
	out := bufio.NewWriter(os.Stdout)
	fmt.Fprintf(out, "VERSION 1\nCMETHOD x socks5 %s\nCMETHODS DONE\n", listener.Addr())
	for i := range flooded {
		fmt.Fprintf(out, "LOG SEVERITY=warning MESSAGE=flood-%d\n", i)
	}
	fmt.Fprintln(out, "STATUS TRANSPORT=x done=1")
	_ = out.Flush()
	_, _ = io.Copy(io.Discard, os.Stdin)
	return 0
}

// playNoise floods both outputs before it is ready.
func playNoise([]string) int {
	for _, out := range []*os.File{os.Stderr, os.Stdout} {
		w := bufio.NewWriter(out)
		line := strings.Repeat("n", 1<<20)
		for n := 0; n < 16<<20; {
			size := (n*7 + 1) % len(line)
			n += size + 1
			_, _ = w.WriteString(line[:size] + "\n")
		}
		_ = w.Flush()
	}
	return playSay([]string{"VERSION 1", "CMETHOD x socks5 {tcp}", "CMETHODS DONE"})
}

// playStats serves connections, and answers STATS in the way that is its argument.
func playStats(args []string) int {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return 1
	}
	server := &socks.Server{Dial: func(ctx context.Context, r *socks.Request) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "tcp", r.Dest)
	}}
	go server.Serve(listener) //nolint:errcheck // it ends with the process
	announced := ""
	if args[0] != "unannounced" {
		announced = " ARGS:stats=1"
	}
	fmt.Printf("VERSION 1\nCMETHOD x socks5 %s%s\nCMETHODS DONE\n", listener.Addr(), announced)
	lines := bufio.NewScanner(os.Stdin)
	for lines.Scan() {
		words := strings.Fields(lines.Text())
		if len(words) != 3 || words[0] != "STATS" {
			continue
		}
		const lie = `{"opened":"2001-02-03T04:05:06Z","received":7,"sent":9}`
		id, _ := strconv.Atoi(words[1])
		switch args[0] {
		case "lie":
			fmt.Printf("STATS %d %s\n", id, lie)
		case "wrong-id":
			fmt.Printf("STATS %d %s\nSTATS %d {}\nSTATS x {}\nSTATS\n", id+1000, lie, id)
		case "null":
			fmt.Printf("STATS %d null\n", id)
		case "list":
			fmt.Printf("STATS %d [1]\n", id)
		case "unannounced":
			fmt.Fprintln(os.Stderr, "asked all the same")
			return 1
		}
	}
	return 0
}

// playFar is the other end of the network in a process of its own: it echoes.
func playFar([]string) int {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return 1
	}
	fmt.Println(listener.Addr())
	go echo(listener)
	_, _ = io.Copy(io.Discard, os.Stdin)
	return 0
}

func echo(l net.Listener) {
	for {
		conn, err := l.Accept()
		if err != nil {
			return
		}
		go func() {
			defer conn.Close()
			buf := make([]byte, 512) // small: there can be thousands
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
