package hosts_test

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"pthost/ptipc"
	"pthost/ptipc/localnet"
	"pthost/ptipc/proc"
	"pthost/ptipc/stdio"
	"pthost/socks"
)

// A smallHost is a host for the suite alone: it does what the clauses demand of hosts of
// clients, but for one fault.
type smallHost struct {
	fault string
	file  struct {
		Transports map[string]struct {
			Exec      string          `json:"exec"`
			Config    json.RawMessage `json:"config"`
			ConfigVia string          `json:"config_via"`
			Plain     bool            `json:"plain"`
			Proxy     string          `json:"proxy"`
			State     string          `json:"state"`
			Role      string          `json:"role"`
			Dialect   string          `json:"dialect"`
			Deliver   string          `json:"deliver"`
		} `json:"transports"`
		Fronts []struct {
			Listen   string          `json:"listen"`
			Settings json.RawMessage `json:"settings"`
		} `json:"fronts"`
	}
	dir *localnet.Dir

	mu      sync.Mutex
	addr    localnet.Addr // of the child that runs
	names   string        // of the first child's factories
	kept    [][]byte
	waiting atomic.Bool // for an answer of the child
	handing sync.Mutex
}

// is reports whether this is the fault.
func (h *smallHost) is(fault string) bool { return h.fault == fault }

func (h *smallHost) say(args ...any) { fmt.Fprintln(os.Stderr, args...) }

// runSmallHost is the main function of one.
func runSmallHost(fault, config string) int {
	h := &smallHost{fault: fault}
	if h.is(keepsZombies) {
		_ = unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) // or others would reap them
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	text, err := os.ReadFile(config)
	if err == nil {
		err = json.Unmarshal(text, &h.file)
	}
	if err == nil {
		err = h.openState()
	}
	if err == nil {
		err = h.supervise(ctx)
	}
	if err != nil && ctx.Err() == nil {
		h.say(err)
		return 1
	}
	return 0
}

func (h *smallHost) openState() error {
	path := h.file.Transports["probe"].State
	var err error
	if path == "" {
		path, err = os.MkdirTemp("", "small")
	} else {
		err = os.MkdirAll(path, 0o700)
	}
	if err != nil {
		return err
	}
	open := h.is("leaves the state directory open")
	if open {
		_ = os.Chmod(path, 0o700)
	}
	if h.dir, err = localnet.OpenDir(path); err != nil {
		return err
	}
	if open {
		if err := os.Chmod(path, 0o755); err != nil {
			return err
		}
	}
	if h.is("shares the state directory") {
		return nil
	}
	return h.dir.Lock()
}

// supervise starts children one after the other, and serves once the first is ready.
func (h *smallHost) supervise(ctx context.Context) error {
	wait := 100 * time.Millisecond
	for number := 1; ; number++ {
		p, err := h.start(ctx)
		if err != nil && (number == 1 || errors.Is(err, errRefused) || ctx.Err() != nil) {
			return err
		}
		if number == 1 && len(h.file.Fronts) > 0 {
			if err := h.serve(); err != nil {
				return err
			}
		}
		if err == nil {
			select {
			case <-p.Done():
				err = p.Err()
			case <-ctx.Done():
				return p.Stop(context.Background())
			}
		}
		code := ptipc.ExitCodeOf(err)
		if code.Final() && !h.is("restarts after every exit code") || h.is("never restarts") {
			<-ctx.Done()
			return nil
		}
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return nil
		}
		if !h.is("restarts in a tight loop") {
			wait *= 2
		}
	}
}

var errRefused = errors.New("the child is refused")

// arguments are those of the child, and its first line.
func (h *smallHost) arguments() (args []string, first string) {
	t := h.file.Transports["probe"]
	host := map[string]any{"version": []int{1}, "listen": "unix"}
	if t.Proxy != "" {
		host["proxy"] = t.Proxy
	}
	role := "client"
	if t.Role == "server" {
		role, host["deliver"] = t.Role, "unix:"+deliverName
	}
	if h.is("names no version") {
		delete(host, "version")
	}
	info, _ := json.Marshal(host) // it is made of strings and numbers
	config := string(t.Config)
	switch {
	case t.Plain && h.is("hands HOST to plain children"):
		return []string{config, string(info)}, ""
	case t.Plain:
		return []string{config}, ""
	case t.ConfigVia == "argv" || h.is("shows secrets on command lines"):
		return []string{role, config, string(info)}, ""
	case h.is("writes the wrong configuration"):
		config = "{}"
	}
	args = []string{role, "-"}
	if h.is("writes a word before the role") {
		args = slices.Insert(args, 0, "as")
	}
	return args, fmt.Sprintf(`{"config":%s,"host":%s}`, strings.ReplaceAll(config, "\n", " "), info)
}

// start starts a child and waits until it is ready.
func (h *smallHost) start(ctx context.Context) (*proc.Process, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	var deliveries net.Listener
	if h.file.Transports["probe"].Role == "server" {
		if deliveries, err = h.dir.Listen(deliverName); err != nil {
			return nil, err
		}
	}
	args, first := h.arguments()
	pt1 := h.file.Transports["probe"].Dialect == "pt1"
	var env []string
	if pt1 {
		args, first, env = nil, "", h.environment()
	}
	ready := make(chan error, 16)
	var addr, names string
	var served atomic.Bool
	versioned, stats := false, false
	proxied := h.file.Transports["probe"].Proxy == ""
	spec := proc.Spec{
		Path: h.file.Transports["probe"].Exec, Args: args, Dir: h.dir.Path(), Env: env, Launcher: []string{self, asLauncher},
		FinishWait: time.Second, TermWait: 500 * time.Millisecond,
		OnLine: func(line []byte, truncated bool) {
			message, err := stdio.Parse(line)
			switch {
			case truncated:
				if h.is("refuses long lines") {
					ready <- errRefused
				}
				return
			case err != nil && h.is("dies of garbage"):
				os.Exit(1)
			case err != nil:
				return
			}
			switch m := message.(type) {
			case stdio.Status:
				if !versioned && h.is("wants VERSION first of all") {
					ready <- errRefused
				}
			case stdio.Version:
				versioned = true
			case stdio.CMethod:
				if !versioned && h.is("wants VERSION") || len(m.Args) > 0 && !m.Args.Stats() && h.is("refuses unknown ARGS") {
					ready <- errRefused
				}
				if pt1 && m.Name != "probe" {
					if h.is("refuses transports that it did not ask for") {
						ready <- errRefused
					}
					return
				}
				stats = m.Args.Stats()
				addr, names = m.Addr, names+m.Name
			case stdio.CMethodError:
				if !h.is("hides errors") {
					h.say(m)
				}
				ready <- errRefused
			case stdio.VersionError, stdio.EnvError:
				if !h.is("waits on after an error") {
					ready <- errRefused
				}
			case stdio.ProxyError:
				if proxied = h.is("goes on after PROXY-ERROR"); !proxied {
					ready <- errRefused
				}
			case stdio.ProxyDone:
				proxied = true
			case stdio.Log:
				if m.Level >= slog.LevelInfo && !h.is("hides what is logged") {
					h.say(m.Message)
				}
			case stdio.CMethodsDone:
				if !proxied && !h.is("goes around the proxy") {
					ready <- errRefused
				}
				ready <- nil
			case stdio.CMessage:
				if h.is("keeps all signals") {
					h.kept = append(h.kept, line, []byte(string(line)))
				}
			case stdio.SMethodsDone:
				ready <- nil
			case stdio.Unknown:
				if h.is("dies of unknown keywords") {
					os.Exit(1)
				}
			}
			if h.is("stops reading") && served.Load() {
				select {}
			}
		},
	}
	if h.is("stops reading standard error") {
		spec.OnStderr = func(string) { select {} }
	}
	switch fault := h.fault; fault {
	case "kills the process group alone":
		spec.Launcher = nil
	case keepsZombies, killsOne, killsNobody:
		spec.Launcher = nil
		spec.Path, spec.Args = self, append([]string{asNanny, fault, spec.Path}, args...)
	case dropsCR, readsAreLines:
		spec.Launcher = []string{self, asWire, fault}
	}
	if h.is("does not wait for the child to finish") {
		spec.FinishWait = -1
	}
	if h.is("buffers an endless line") {
		spec.MaxLine = 1 << 30
	}
	p, err := proc.Start(ctx, spec)
	if err != nil {
		return nil, err
	}
	if deliveries != nil {
		go h.take(deliveries, p)
	}
	if first != "" {
		if err := p.WriteLine([]byte(first)); err != nil {
			return nil, errors.Join(err, p.Stop(context.Background()))
		}
	}
	patience := 5 * time.Second
	if h.is("waits for ever") || h.is("waits on after an error") {
		patience = time.Hour
	}
	select {
	case err = <-ready:
	case <-p.Done():
		err = errors.New("the child ended before it was ready")
	case <-time.After(patience):
		err = errors.New("the child was not ready in time")
	case <-ctx.Done():
		err = ctx.Err()
	}
	if err == nil && h.file.Transports["probe"].Role != "server" {
		err = h.check(p, addr, names)
	}
	h.waiting.Store(stats && h.is("waits for statistics"))
	if (h.is("asks everybody for statistics") || h.waiting.Load()) && err == nil {
		_ = p.WriteLine([]byte("STATS 1"))
	}
	if err != nil {
		return nil, errors.Join(err, p.Stop(context.Background()))
	}
	served.Store(true)
	return p, nil
}

// check looks at what was announced.
func (h *smallHost) check(p *proc.Process, text, names string) error {
	addr, err := localnet.ParseAddr(text)
	if err != nil {
		if h.is("believes a public address") && text != "" || h.is("takes a child that offers nothing") && text == "" {
			return nil
		}
		return err
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.names != "" && h.names != names && !h.is("takes other factories") {
		return errRefused
	}
	h.addr, h.names = addr, names
	if h.is("takes any socket") {
		return nil
	}
	if addr.Unix() && h.is("knows no unix sockets") {
		return errRefused
	}
	conn, err := h.reach(context.Background(), addr)
	if err != nil {
		return err
	}
	defer conn.Close()
	pids, err := p.Pids()
	if err != nil {
		return err
	}
	return localnet.ListenerOwnedBy(conn, pids)
}

func (h *smallHost) reach(ctx context.Context, addr localnet.Addr) (net.Conn, error) {
	if addr.Unix() {
		return h.dir.Dial(ctx, addr.Name())
	}
	return localnet.DialTCP(ctx, addr)
}

func (h *smallHost) serve() error {
	front := h.file.Fronts[0]
	settings := ptipc.Opaque(front.Settings)
	if h.is("loses settings") {
		settings = nil
	}
	l, err := net.Listen("tcp", strings.TrimPrefix(front.Listen, "tcp://"))
	if err != nil {
		return err
	}
	server := &socks.Server{Plain: true, Dial: func(ctx context.Context, r *socks.Request) (net.Conn, error) {
		if h.is("shakes one hand at a time") {
			h.handing.Lock()
			defer h.handing.Unlock()
		}
		if h.waiting.Load() {
			<-ctx.Done()
			return nil, ctx.Err()
		}
		h.mu.Lock()
		addr := h.addr
		h.mu.Unlock()
		conn, err := h.reach(ctx, addr)
		if err != nil {
			return nil, err
		}
		dest := r.Dest
		if h.is("looks names up") {
			dest = "192.0.2.1:443"
		}
		switch name, _, _ := net.SplitHostPort(dest); {
		case h.file.Transports["probe"].Dialect == "pt1":
			err = h.connectPT1(conn, name)
		case h.is("sends settings always") && settings.Empty():
			err = steps(conn, false, step{"\x05\x01\x80{}" + request(name), 12})
		case h.is("speaks version 4 of SOCKS"):
			err = socks.Connect(ctx, version4{conn}, settings, dest)
		default:
			err = socks.Connect(ctx, conn, settings, dest)
		}
		if err != nil {
			conn.Close()
			if h.is("makes all errors one") {
				return nil, ptipc.ErrGeneral
			}
			return nil, err
		}
		switch h.fault {
		case "ends both directions":
			return oneEnd{conn}, nil
		case "takes a break for an end":
			return noBreak{conn}, nil
		}
		return conn, nil
	}}
	go func() { h.say(server.Serve(l)) }()
	return nil
}

// request is a CONNECT to port 443 of a name.
func request(name string) string {
	return "\x05\x01\x00\x03" + string(rune(len(name))) + name + "\x01\xbb"
}

// A step is what is written, and how many bytes the answer has.
type step struct {
	write  string
	answer int
}

// steps takes them one after the other, or all at once. The last answer ends with the
// reply to a request.
func steps(conn net.Conn, once bool, all ...step) error {
	_ = conn.SetDeadline(time.Now().Add(5 * time.Second))
	if once {
		var whole step
		for _, s := range all {
			whole.write, whole.answer = whole.write+s.write, whole.answer+s.answer
		}
		all = []step{whole}
	}
	var answer []byte
	for _, s := range all {
		if _, err := io.WriteString(conn, s.write); err != nil {
			return err
		}
		answer = make([]byte, s.answer)
		if _, err := io.ReadFull(conn, answer); err != nil {
			return err
		}
	}
	if code := answer[len(answer)-9]; code != 0 {
		return ptipc.Class(code)
	}
	return conn.SetDeadline(time.Time{})
}

// environment is what a managed transport is told by.
func (h *smallHost) environment() []string {
	version := "1"
	if h.is("offers no version of managed transports") {
		version = "3"
	}
	env := append(os.Environ(), "TOR_PT_MANAGED_TRANSPORT_VER="+version, "TOR_PT_CLIENT_TRANSPORTS=probe", "TOR_PT_STATE_LOCATION="+h.dir.Path())
	if proxy := h.file.Transports["probe"].Proxy; proxy != "" {
		env = append(env, "TOR_PT_PROXY="+proxy)
	}
	return env
}

// connectPT1 asks a managed transport for a connection, with the arguments of
// HOST.json.
func (h *smallHost) connectPT1(conn net.Conn, name string) error {
	ahead := h.is("does not wait for answers")
	if h.is("loses arguments") {
		return steps(conn, ahead, step{"\x05\x01\x00", 2}, step{request(name), 10})
	}
	var config struct {
		Transports map[string]map[string]string `json:"transports"`
	}
	if err := json.Unmarshal(h.file.Transports["probe"].Config, &config); err != nil {
		return err
	}
	var args []string
	for key, value := range config.Transports["probe"] {
		args = append(args, key+"="+strings.NewReplacer(`\`, `\\`, `;`, `\;`).Replace(value))
	}
	user := strings.Join(args, ";")
	return steps(conn, ahead, step{"\x05\x01\x02", 2}, step{"\x01" + string(rune(len(user))) + user + "\x01\x00", 2}, step{request(name), 10})
}

// Faults that need a process between the host and its child.
const (
	keepsZombies  = "leaves zombies"
	killsOne      = "kills one process alone"
	killsNobody   = "never kills"
	dropsCR       = "drops lines with a CR"
	readsAreLines = "takes each read for a line"
)

// runNanny is the main function of a process that starts the child for a host. The
// host's signals end this process, and the child only as far as the fault lets them.
func runNanny(fault string, words []string) int {
	runtime.LockOSThread() // a child with Pdeathsig ends with the thread that has started it
	terms := make(chan os.Signal, 8)
	signal.Notify(terms, syscall.SIGTERM)
	cmd := exec.Command(words[0], words[1:]...)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: fault != keepsZombies}
	if fault == killsOne {
		cmd.SysProcAttr.Pdeathsig = syscall.SIGKILL
	}
	in, err := cmd.StdinPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	var stopped atomic.Bool
	go func() {
		_, _ = io.Copy(in, os.Stdin)
		stopped.Store(true)
		in.Close()
	}()
	go func() {
		for range terms {
			_ = cmd.Process.Signal(syscall.SIGTERM)
		}
	}()
	if fault == keepsZombies {
		_ = unix.Waitid(unix.P_PID, cmd.Process.Pid, nil, unix.WEXITED|unix.WNOWAIT, nil)
		if !stopped.Load() {
			return exitOf(cmd.Process.Pid)
		}
	}
	_ = cmd.Wait()
	return max(cmd.ProcessState.ExitCode(), 0)
}

// exitOf is the exit code of a process that has ended and was not waited for.
func exitOf(pid int) int {
	text, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	fields := strings.Fields(string(text))
	status, _ := strconv.Atoi(fields[len(fields)-1])
	return syscall.WaitStatus(status).ExitStatus()
}

// spoil puts itself between this process's standard output and those who will inherit
// it.
func spoil(fault string) error {
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	fd, err := unix.FcntlInt(1, unix.F_DUPFD_CLOEXEC, 0)
	if err == nil {
		err = unix.Dup2(int(w.Fd()), 1)
	}
	if err != nil {
		return err
	}
	out := os.NewFile(uintptr(fd), "stdout")
	w.Close()
	if fault == dropsCR {
		go func() {
			for in := bufio.NewReader(r); ; {
				line, err := in.ReadSlice('\n')
				if err != nil && !errors.Is(err, bufio.ErrBufferFull) {
					return
				}
				if !bytes.HasSuffix(line, []byte("\r\n")) {
					_, _ = out.Write(line)
				}
			}
		}()
		return nil
	}
	go func() {
		for b := make([]byte, 1<<16); ; {
			n, err := r.Read(b)
			if err != nil {
				return
			}
			if b = b[:n]; n < 100 { // what is longer is cut by the pipe's size
				b = append(bytes.TrimSuffix(b, []byte("\n")), '\n')
			}
			_, _ = out.Write(b)
			b = b[:cap(b)]
		}
	}()
	return nil
}

// deliverName is the socket at which servers bring connections.
const deliverName = "deliver"

// take takes deliveries of a child.
func (h *smallHost) take(l net.Listener, p *proc.Process) {
	server := &socks.Server{Bound: true, Dial: func(ctx context.Context, r *socks.Request) (net.Conn, error) {
		peer, err := localnet.Peer(r.Client)
		if err != nil {
			return nil, err
		}
		pids, err := p.Pids()
		if err != nil {
			return nil, err
		}
		if !slices.Contains(pids, peer.PID) && !h.is("takes deliveries from anybody") {
			return nil, ptipc.ErrNotAllowed
		}
		var d net.Dialer
		return d.DialContext(ctx, "tcp", strings.TrimPrefix(h.file.Transports["probe"].Deliver, "tcp://"))
	}}
	if h.is("shows the address that it is bound to") {
		conn, err := l.Accept()
		if err != nil {
			return
		}
		_, _ = conn.Read(make([]byte, 4096))
		_, _ = conn.Write([]byte("\x05\x80\x05\x00\x00\x01\x7f\x00\x00\x01\x12\x34ping"))
		return
	}
	_ = server.Serve(l)
}

// version4 says that it speaks version 4 of SOCKS.
type version4 struct{ net.Conn }

func (c version4) Write(b []byte) (int, error) { return c.Conn.Write(append([]byte{4}, b[1:]...)) }

// oneEnd has no two ends.
type oneEnd struct{ net.Conn }

func (c oneEnd) CloseWrite() error { return c.Close() }

// noBreak shows the end of a stream where it broke.
type noBreak struct{ net.Conn }

func (c noBreak) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	if errors.Is(err, syscall.ECONNRESET) {
		err = io.EOF
	}
	return n, err
}

func (c noBreak) CloseWrite() error { return c.Conn.(*net.TCPConn).CloseWrite() }
