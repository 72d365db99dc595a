package bench

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"time"

	"pthost/ptipc"
	"pthost/ptipc/localnet"
)

// startTimeout bounds the start of a peer.
const startTimeout = 10 * time.Second

// A way leads to the far end. There may be several through one program.
type way struct {
	column string
	dial   func(ctx context.Context) (net.Conn, error)
}

// A program is what stands between the load and the far end.
type program struct {
	start func(ctx context.Context) (*instance, error)
}

// An instance is a program that runs. Its first way is that of real use.
type instance struct {
	pid  int // 0: there is no process
	ways []way
	stop func() error
}

func (i *instance) column() string { return i.ways[0].column }

// A Child is a transport's child process that runs.
type Child struct {
	Transport *ptipc.Transport
	Name      string // of the connection factory that is measured; "" if there is none
	Packets   string // of the packet factory that is measured; "" if there is none
	Pid       int
	Dir       string // the state directory, where its unix sockets are
	Addr      string // that was announced for the connection factory; "" if it is not known
}

// programs are the child and its peers, in the order in which they are measured.
func (b *bench) programs() []program {
	programs := []program{
		{b.startChild},
		{b.startDirect},
		{b.startRelay},
	}
	if b.dir != "" {
		programs = append(programs, program{b.startRelayUnix})
	}
	programs = append(programs, program{b.startSOCKS5})
	if b.microsocks != "" {
		programs = append(programs, program{b.startMicrosocks})
	}
	return programs
}

func (b *bench) startChild(ctx context.Context) (*instance, error) {
	c, err := b.config.Open(ctx)
	if err != nil {
		return nil, err
	}
	factory := c.Transport.Connections[c.Name]
	dest := b.far
	if factory.Bound {
		dest = ""
	}
	i := &instance{pid: c.Pid, stop: c.Transport.Close}
	i.ways = append(i.ways, way{ChildDial, func(ctx context.Context) (net.Conn, error) {
		return factory.Dial(ctx, b.config.Settings, dest)
	}})
	connect, closeDir, err := connector(c.Addr, c.Dir)
	if err != nil {
		return nil, errors.Join(err, c.Transport.Close())
	}
	if connect == nil {
		return i, nil
	}
	i.stop = func() error { return errors.Join(closeDir(), c.Transport.Close()) }
	settings := []byte(b.config.Settings)
	if len(settings) == 0 {
		settings = []byte("{}")
	}
	i.ways = append(i.ways, way{ChildWire, func(ctx context.Context) (net.Conn, error) {
		return handshake(ctx, connect, settings, dest, true)
	}})
	return i, nil
}

// connector connects to an announced address, whose unix socket would be in path.
func connector(announced, path string) (connect func(ctx context.Context) (net.Conn, error), closeDir func() error, err error) {
	if announced == "" {
		return nil, nil, nil
	}
	addr, err := localnet.ParseAddr(announced)
	if err != nil {
		return nil, nil, err
	}
	if !addr.Unix() {
		return func(ctx context.Context) (net.Conn, error) { return localnet.DialTCP(ctx, addr) }, func() error { return nil }, nil
	}
	dir, err := localnet.OpenDir(path)
	if err != nil {
		return nil, nil, err
	}
	return func(ctx context.Context) (net.Conn, error) { return dir.Dial(ctx, addr.Name()) }, dir.Close, nil
}

func (b *bench) startDirect(context.Context) (*instance, error) {
	return &instance{ways: []way{{Direct, tcp(b.far)}}, stop: func() error { return nil }}, nil
}

func (b *bench) startRelay(ctx context.Context) (*instance, error) {
	p, addr, err := b.startPeer(ctx, roleRelay, b.far)
	if err != nil {
		return nil, err
	}
	return &instance{pid: p.pid, ways: []way{{Relay, tcp(addr)}}, stop: p.stop}, nil
}

func (b *bench) startRelayUnix(ctx context.Context) (*instance, error) {
	p, addr, err := b.startPeer(ctx, roleRelay, b.far, b.dir)
	if err != nil {
		return nil, err
	}
	connect, closeDir, err := connector(addr, b.dir)
	if err != nil {
		return nil, errors.Join(err, p.stop())
	}
	return &instance{pid: p.pid, ways: []way{{RelayUnix, connect}}, stop: func() error { return errors.Join(closeDir(), p.stop()) }}, nil
}

func (b *bench) startSOCKS5(ctx context.Context) (*instance, error) {
	p, addr, err := b.startPeer(ctx, roleSOCKS5)
	if err != nil {
		return nil, err
	}
	return &instance{pid: p.pid, ways: []way{
		{SOCKS5, func(ctx context.Context) (net.Conn, error) { return handshake(ctx, tcp(addr), nil, b.far, false) }},
		{SOCKS5OneWrite, func(ctx context.Context) (net.Conn, error) { return handshake(ctx, tcp(addr), nil, b.far, true) }},
	}, stop: p.stop}, nil
}

func (b *bench) startMicrosocks(ctx context.Context) (*instance, error) {
	port, err := freePort(ctx)
	if err != nil {
		return nil, err
	}
	p, err := startProcess(exec.Command(b.microsocks, "-i", "127.0.0.1", "-p", port))
	if err != nil {
		return nil, err
	}
	// It does not say when it is ready.
	connect := tcp("127.0.0.1:" + port)
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	for {
		conn, err := connect(ctx)
		if err == nil {
			_ = conn.Close() // nothing was sent on it
			break
		}
		if ctx.Err() != nil {
			return nil, errors.Join(fmt.Errorf("%s does not take connections: %w", b.microsocks, err), p.stop())
		}
		if err := pause(ctx, time.Millisecond/2); err != nil {
			continue
		}
	}
	return &instance{pid: p.pid, ways: []way{{Microsocks, func(ctx context.Context) (net.Conn, error) {
		return handshake(ctx, connect, nil, b.far, false)
	}}}, stop: p.stop}, nil
}

func tcp(addr string) func(ctx context.Context) (net.Conn, error) {
	return func(ctx context.Context) (net.Conn, error) {
		d := net.Dialer{KeepAlive: -1}
		return d.DialContext(ctx, "tcp", addr)
	}
}

func handshake(ctx context.Context, connect func(ctx context.Context) (net.Conn, error), settings []byte, dest string, oneWrite bool) (net.Conn, error) {
	conn, err := connect(ctx)
	if err != nil {
		return nil, err
	}
	defer context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })()
	if err := connectSOCKS5(conn, settings, dest, oneWrite); err != nil {
		_ = conn.Close() // it is of no use any more
		return nil, err
	}
	return conn, nil
}

// process is a peer that runs.
type process struct {
	pid  int
	stop func() error
}

// startPeer runs RunPeer in a process of its own, and returns where it listens.
func (b *bench) startPeer(ctx context.Context, args ...string) (*process, string, error) {
	cmd := exec.Command(b.config.Peer[0], append(b.config.Peer[1:len(b.config.Peer):len(b.config.Peer)], args...)...)
	cmd.Stderr = os.Stderr
	stdin, err := cmd.StdinPipe() // its end is the peer's
	if err != nil {
		return nil, "", err
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return nil, "", err
	}
	p, err := startProcess(cmd)
	if err != nil {
		return nil, "", err
	}
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	defer context.AfterFunc(ctx, func() { _ = stdout.Close() })()
	line, _ := bufio.NewReader(io.LimitReader(stdout, 256)).ReadString('\n')
	addr, err := peerAddr(line)
	if err != nil {
		return nil, "", errors.Join(err, ctx.Err(), stdin.Close(), p.stop())
	}
	return p, addr, nil
}

// startProcess starts a peer, which ends with this process in any case.
func startProcess(cmd *exec.Cmd) (*process, error) {
	started, ended := make(chan error, 1), make(chan struct{})
	go func() {
		defer close(ended)
		err := startTied(cmd)
		started <- err
		if err == nil {
			_ = cmd.Wait() // it is killed, and nothing it could say counts
		}
	}()
	if err := <-started; err != nil {
		return nil, fmt.Errorf("starting a peer of the bench: %w", err)
	}
	return &process{pid: cmd.Process.Pid, stop: func() error {
		err := cmd.Process.Kill()
		<-ended
		return err
	}}, nil
}

// pause waits, but not beyond the end of ctx.
func pause(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}
