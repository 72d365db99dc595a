// Package child turns a [ptipc.TransportFactory] into an executable that any
// host can start. A whole transport:
//
//	package main
//
//	import (
//		"context"
//		"net"
//
//		"pthost/ptipc"
//		"pthost/ptipc/child"
//		"pthost/ptipc/relay"
//	)
//
//	func open(_ context.Context, config ptipc.Opaque, env ptipc.Env) (*ptipc.Transport, error) {
//		var c struct {
//			Server string `json:"server"`
//		}
//		if err := config.Decode(&c); err != nil {
//			return nil, err
//		}
//		var meter relay.Meter
//		return meter.Transport(map[string]ptipc.ConnectionFactory{
//			"plain": meter.Factory(true, func(ctx context.Context, _ ptipc.Opaque, _ string) (net.Conn, error) {
//				return env.Dial(ctx, "tcp", c.Server)
//			}),
//		}, nil), nil
//	}
//
//	func main() { child.Main(child.Transport{Client: open}) }
//
// The package does the rest: the command line (ARG), the control lines (LINE), the
// modified SOCKS5 (SOCKS), statistics (STAT), and the end of life (LIFE).
package child

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"pthost/ptipc"
	"pthost/ptipc/stdio"
)

const (
	// launchTimeout bounds the wait for the first line of standard input (ARG-4).
	launchTimeout = 10 * time.Second
	// drainTimeout is how long open connections may go on after the end of standard
	// input (LIFE-2).
	drainTimeout = 30 * time.Second
)

// A Transport is what an executable offers.
type Transport struct {
	// Client opens the client side; nil if there is none.
	Client ptipc.TransportFactory
	// Server is the server side, and generates configurations; nil if there is none.
	Server *ptipc.ServerFactory
}

// Main runs the transport as this process: with its arguments, its working
// directory, its standard streams and its signals. It does not return.
func Main(t Transport) { MainArgs(os.Args[1:], t) }

// MainArgs is Main for an executable that has arguments of its own before those of
// ARG-1.
func MainArgs(args []string, t Transport) {
	// A host that dies closes our output; the end of input tells us, a signal would kill.
	signal.Ignore(syscall.SIGPIPE)
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, syscall.SIGTERM, os.Interrupt)
	ctx, cancel := context.WithCancel(context.Background())
	go func() {
		<-signals
		cancel()
		<-signals
		os.Exit(int(ptipc.ExitOK)) // LIFE-3: a second one means at once
	}()
	os.Exit(Run(ctx, args, ".", os.Stdin, os.Stdout, os.Stderr, t))
}

// Run runs the transport without a process of its own. args are the command line
// after the transport's own arguments (ARG-1), and dir is the state directory. The
// end of stdin makes it finish and return (LIFE-2); so does the end of ctx, which
// stands for SIGTERM, and which cuts what is still open when it comes later
// (LIFE-3). The result is the exit code (ERR-4). stdin is read until it ends, also
// after Run has returned.
func Run(ctx context.Context, args []string, dir string, stdin io.Reader, stdout, stderr io.Writer, t Transport) int {
	err := run(ctx, args, dir, stdin, stdout, t)
	if err != nil {
		fmt.Fprintf(stderr, "%v\n", err) // LIFE-9
	}
	return int(ptipc.ExitCodeOf(err))
}

// side is what a child does in one role.
type side interface {
	// open starts the transport and announces it.
	open(ctx context.Context, config ptipc.Opaque, env ptipc.Env) error
	// wait returns when the transport has ended by itself.
	wait() error
	// drain stops accepting and lets open connections finish until ctx ends.
	drain(ctx context.Context)
	// close ends everything at once, also what open has left half done.
	close()
	// stats are those of one connection, or the totals for "" (STAT-3); nil if there are none.
	stats(client string) any
}

func run(ctx context.Context, args []string, dir string, stdin io.Reader, stdout io.Writer, t Transport) error {
	in := stdio.NewReader(stdin)
	role, launch, err := parseArgs(ctx, args, in, t)
	if ctx.Err() != nil {
		return nil // LIFE-3
	}
	if err != nil {
		return err
	}
	l := newLink(dir, launch.Host, stdout)
	defer l.dropped.Close()
	if role == roleGenerate {
		return l.generate(ctx, t.Server, launch.Config, stdout)
	}
	if v := launch.Host.Version; len(v) > 0 && !slices.Contains(v, stdio.ProtocolVersion) {
		return errors.Join(
			fmt.Errorf("the host speaks versions %v and this transport %d: %w", v, stdio.ProtocolVersion, ptipc.ExitConfig),
			l.out.Send(stdio.VersionError{Text: "no-version"}))
	}
	if err := l.out.Send(stdio.Version{Version: strconv.Itoa(stdio.ProtocolVersion)}); err != nil {
		return err
	}
	env, err := l.env(role)
	if err != nil {
		return err
	}
	var own side = &client{link: l, factory: t.Client, conns: map[string]ptipc.Conn{}}
	if role == roleServer {
		own = &server{link: l, factory: t.Server}
	}
	defer own.close()
	if err := own.open(ctx, launch.Config, env); ctx.Err() != nil && err != nil {
		return nil // LIFE-3: it was given up
	} else if err != nil {
		return err
	}
	return serve(ctx, l, in, own)
}

// serve runs until the host wants the end, or the transport has ended by itself.
func serve(ctx context.Context, l *link, in *stdio.Reader, own side) error {
	lines := make(chan error, 1)
	go func() { lines <- l.readLines(in, own) }()
	ended := make(chan error, 1)
	go func() { ended <- own.wait() }()

	select {
	case err := <-ended:
		if err == nil {
			err = errors.New("the transport has ended by itself")
		}
		return err
	case <-lines: // LIFE-2
		// When SIGTERM comes after the end of input, it means at once (LIFE-3).
	case <-ctx.Done(): // LIFE-3
		ctx = context.WithoutCancel(ctx)
	}
	ctx, cancel := context.WithTimeout(ctx, drainTimeout)
	defer cancel()
	own.drain(ctx)
	return nil
}

// The roles of ARG-1.
const (
	roleClient   = "client"
	roleServer   = "server"
	roleGenerate = "generate"
)

// parseArgs reads [ROLE] CONFIG [HOST] (ARG-1, ARG-2).
func parseArgs(ctx context.Context, args []string, in *stdio.Reader, t Transport) (role string, launch stdio.Launch, err error) {
	role = roleClient
	usage := func(format string, a ...any) (string, stdio.Launch, error) {
		return role, launch, fmt.Errorf("%s; usage: [client|server|generate] CONFIG [HOST], where CONFIG is a JSON object, or - to read it from standard input: %w",
			fmt.Sprintf(format, a...), ptipc.ExitUsage)
	}
	if len(args) > 0 && (args[0] == roleClient || args[0] == roleServer || args[0] == roleGenerate) {
		role, args = args[0], args[1:]
	}
	if role == roleClient && t.Client == nil || role != roleClient && t.Server == nil ||
		role == roleGenerate && t.Server.GenerateConfig == nil {
		return usage("this transport has no %s side", role)
	}
	switch {
	case len(args) == 0:
		return usage("the configuration is missing")
	case len(args) > 2:
		return usage("%d arguments are too many", len(args))
	case args[0] == "-" && len(args) == 2:
		return usage("with -, HOST comes from standard input as well")
	case args[0] == "-":
		launch, err = readLaunch(ctx, in)
		return role, launch, err
	}
	launch.Config = ptipc.Opaque(args[0])
	if err := checkObject(launch.Config); err != nil {
		return role, launch, fmt.Errorf("CONFIG: %w: %w", err, ptipc.ExitDataErr)
	}
	if len(args) == 2 {
		if err := launch.Host.UnmarshalJSON([]byte(args[1])); err != nil {
			return role, launch, fmt.Errorf("HOST: %w: %w", err, ptipc.ExitDataErr)
		}
	}
	return role, launch, nil
}

// checkObject holds CONFIG to ARG-3: one JSON object. What its keys mean, and
// whether one occurs twice, the transport's own decoding says.
func checkObject(o ptipc.Opaque) error {
	if strings.TrimSpace(string(o)) == "" {
		return errors.New("is empty, not a JSON object")
	}
	var object map[string]any
	err := o.Decode(&object)
	var config *ptipc.ConfigError
	if errors.As(err, &config) && config.Pointer != "" {
		return nil // inside of the object
	}
	return err
}

// readLaunch waits for the first line of standard input (ARG-4).
func readLaunch(ctx context.Context, in *stdio.Reader) (stdio.Launch, error) {
	type result struct {
		launch stdio.Launch
		err    error
	}
	read := make(chan result, 1)
	go func() {
		launch, err := in.ReadLaunch()
		read <- result{launch, err}
	}()
	timer := time.NewTimer(launchTimeout)
	defer timer.Stop()
	select {
	case r := <-read:
		return r.launch, r.err
	case <-timer.C:
		return stdio.Launch{}, fmt.Errorf("no configuration came on standard input in %v: %w", launchTimeout, ptipc.ExitDataErr)
	case <-ctx.Done():
		return stdio.Launch{}, context.Cause(ctx)
	}
}
