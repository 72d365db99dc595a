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
	"log/slog"
	"maps"
	"net"
	"net/url"
	"os"
	"os/signal"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"pthost/ptipc"
	"pthost/ptipc/localnet"
	"pthost/ptipc/stdio"
	"pthost/socks"
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
	// Client opens the client side.
	Client ptipc.TransportFactory
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

func run(ctx context.Context, args []string, dir string, stdin io.Reader, stdout io.Writer, t Transport) error {
	in := stdio.NewReader(stdin)
	launch, err := parseArgs(ctx, args, in)
	if err != nil {
		return err
	}
	c := &child{dir: dir, host: launch.Host, out: stdio.NewWriter(stdout), conns: map[string]ptipc.Conn{}}
	if v := launch.Host.Version; len(v) > 0 && !slices.Contains(v, stdio.ProtocolVersion) {
		return errors.Join(
			fmt.Errorf("the host speaks versions %v and this transport %d: %w", v, stdio.ProtocolVersion, ptipc.ExitConfig),
			c.out.Send(stdio.VersionError{Text: "no-version"}))
	}
	if err := c.out.Send(stdio.Version{Version: strconv.Itoa(stdio.ProtocolVersion)}); err != nil {
		return err
	}
	if err := c.start(ctx, t, launch.Config); err != nil {
		return err
	}
	defer c.close()
	return c.serve(ctx, in)
}

// parseArgs reads [ROLE] CONFIG [HOST] (ARG-1, ARG-2).
func parseArgs(ctx context.Context, args []string, in *stdio.Reader) (stdio.Launch, error) {
	var launch stdio.Launch
	usage := func(format string, a ...any) (stdio.Launch, error) {
		return launch, fmt.Errorf("%s; usage: [client] CONFIG [HOST], where CONFIG is a JSON object, or - to read it from standard input: %w",
			fmt.Sprintf(format, a...), ptipc.ExitUsage)
	}
	if len(args) > 0 && isRole(args[0]) {
		if args[0] != "client" {
			return usage("this transport has no %s side", args[0])
		}
		args = args[1:]
	}
	switch {
	case len(args) == 0:
		return usage("the configuration is missing")
	case len(args) > 2:
		return usage("%d arguments are too many", len(args))
	case args[0] == "-" && len(args) == 2:
		return usage("with -, HOST comes from standard input as well")
	case args[0] == "-":
		return readLaunch(ctx, in)
	}
	launch.Config = ptipc.Opaque(args[0])
	if err := checkObject(launch.Config); err != nil {
		return launch, fmt.Errorf("CONFIG: %w: %w", err, ptipc.ExitDataErr)
	}
	if len(args) == 2 {
		if err := launch.Host.UnmarshalJSON([]byte(args[1])); err != nil {
			return launch, fmt.Errorf("HOST: %w: %w", err, ptipc.ExitDataErr)
		}
	}
	return launch, nil
}

func isRole(s string) bool { return s == "client" || s == "server" || s == "generate" }

// checkObject holds CONFIG to ARG-3: one JSON object. What its keys mean, and
// whether one occurs twice, the transport's own decoding says.
func checkObject(o ptipc.Opaque) error {
	if strings.TrimSpace(string(o)) == "" {
		return errors.New("is empty, not a JSON object")
	}
	var object map[string]any
	return o.Decode(&object)
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
		return stdio.Launch{}, fmt.Errorf("no configuration has come on standard input: %w: %w", context.Cause(ctx), ptipc.ExitDataErr)
	}
}

// start opens the transport and announces its factories.
func (c *child) start(ctx context.Context, t Transport, config ptipc.Opaque) error {
	env := ptipc.Env{Local: c.dir, Status: c.status, Log: c.logger()}
	if c.host.Proxy != "" {
		dial, err := proxyDialer(c.host.Proxy)
		if err != nil {
			return errors.Join(fmt.Errorf("%w: %w", err, ptipc.ExitUnavailable),
				c.out.Send(stdio.ProxyError{Text: stdio.OneLine(err.Error())}))
		}
		env.DialOut = dial
		if err := c.out.Send(stdio.ProxyDone{}); err != nil { // PROXY-1
			return err
		}
	}
	transport, err := t.Client(ctx, config, env)
	if err == nil && len(transport.Connections) == 0 {
		err = errors.New("the transport offers no connection factory")
	}
	if err != nil {
		// CFG-1: the host learns the place in the configuration, the operator the text.
		return errors.Join(err, c.out.Send(stdio.NewCMethodError(stdio.WholeTransport, err)))
	}
	c.transport = transport
	for i, name := range slices.Sorted(maps.Keys(transport.Connections)) {
		if err := c.announce(i, name, transport.Connections[name]); err != nil {
			c.close()
			return errors.Join(err, c.out.Send(stdio.NewCMethodError(stdio.WholeTransport, err)))
		}
	}
	return c.out.Send(stdio.CMethodsDone{}) // LINE-7: every announced socket listens by now
}

// listen opens the i-th socket for the host: in the state directory, or on the
// loopback (LINE-5, LIFE-11), for nobody but this user and the host's (SOCKS-17).
func (c *child) listen(i int) (net.Listener, string, error) {
	uids := []uint32{}
	if uid := os.Geteuid(); uid >= 0 {
		uids = append(uids, uint32(uid))
	}
	if c.host.UID != nil {
		uids = append(uids, *c.host.UID)
	}
	if c.host.Listen == stdio.ListenUnix {
		// The host has checked and locked the directory; here its owner is what counts.
		dir, err := localnet.OpenDir(c.dir)
		if err != nil {
			return nil, "", err
		}
		c.dirs = append(c.dirs, dir)
		listener, err := dir.Listen(strconv.Itoa(i) + ".sock")
		if err != nil {
			return nil, "", err
		}
		return guard(listener, "unix", c.logger(), uids), listener.Addr().String(), nil
	}
	listener, err := localnet.ListenTCP("127.0.0.1:0")
	if err != nil {
		return nil, "", err
	}
	return guard(listener, "tcp", c.logger(), uids), listener.Addr().String(), nil
}

// proxyDialer makes every connection of the wire through an upstream proxy, and
// none in any other way (PROXY-1). Errors do not repeat the URL (PROXY-3).
func proxyDialer(raw string) (func(ctx context.Context, network, addr string) (net.Conn, error), error) {
	u, err := url.Parse(raw)
	if err != nil || u.Scheme != "socks5" || u.Hostname() == "" || u.Port() == "" {
		return nil, errors.New("the upstream proxy has to be socks5://[USER:PASSWORD@]HOST:PORT")
	}
	return func(ctx context.Context, network, addr string) (net.Conn, error) {
		if !strings.HasPrefix(network, "tcp") {
			return nil, fmt.Errorf("the upstream proxy carries TCP, not %s: %w", network, ptipc.ErrNotAllowed)
		}
		var d net.Dialer
		conn, err := d.DialContext(ctx, "tcp", u.Host)
		if err != nil {
			return nil, fmt.Errorf("upstream proxy: %w", err)
		}
		if err := socks.ConnectUpstream(ctx, conn, u.User, addr); err != nil {
			_ = conn.Close()
			return nil, fmt.Errorf("upstream proxy: %w", err)
		}
		return conn, nil
	}, nil
}

// guard keeps other users out where the system can tell them apart.
func guard(l net.Listener, network string, log *slog.Logger, uids []uint32) net.Listener {
	if runtime.GOOS != "linux" && !localnet.Supported(network) {
		return l
	}
	return localnet.Guard(l, log, uids...)
}
