package conformance_test

import (
	"encoding/json"
	"errors"
	"io"
	"net"
	"os"
	"strings"
	"sync"
)

// announceServer opens a wire that is plain TCP. A server whose configuration says
// where its clients want to go connects them itself.
func (f *faulty) announceServer() {
	if f.config["packets"] != "" {
		f.serveDatagrams()
		f.say("SMETHODS DONE")
		return
	}
	if f.host.Deliver == "" && f.config["to"] == "" && !f.is("server: needs no deliver") {
		f.die(64, "nowhere to deliver")
	}
	if f.host.Deliver == "" && f.is("server: needs deliver") {
		f.die(64, "nowhere to deliver")
	}
	at := f.config["listen"]
	if at == "" {
		at = "127.0.0.1:0"
	}
	var err error
	if f.listener, err = net.Listen("tcp", at); err != nil {
		f.die(71, "%v", err)
	}
	addr := f.listener.Addr().String()
	if f.is("server: announces port 0") {
		addr = "127.0.0.1:0"
	}
	args := "stats=1"
	if f.host.Ends != 0 {
		args += ",ends=1"
	}
	if f.config["to"] != "" {
		args += ",proxy=1"
	}
	if f.is("server: ARGS with a bad escape") {
		args += `,a=\b`
	}
	if f.is("listens everywhere") {
		if _, err := net.Listen("tcp4", "0.0.0.0:0"); err != nil {
			f.die(71, "%v", err)
		}
	}
	f.say("SMETHOD %s %s ARGS:%s", f.name(), addr, args)
	if f.is("VERSION late") {
		f.say("VERSION 1")
	}
	f.say("SMETHODS DONE")
	if f.is("announces after the end") {
		f.say("SMETHOD late 127.0.0.1:1")
	}
}

// name is what the server is called.
func (f *faulty) name() string {
	if f.is("server: a name with a digit in front") {
		return "1faulty"
	}
	return "faulty"
}

type halfCloser interface {
	io.ReadWriteCloser
	CloseWrite() error
}

func (f *faulty) handOver(wire *net.TCPConn) {
	defer wire.Close()
	var to halfCloser
	var end *faultyEnd
	if dest := f.config["to"]; dest != "" {
		if f.is("server: delivers all the same") {
			if conn, err := f.dialHost(nil); err == nil {
				defer conn.Close()
			}
		}
		conn, err := net.Dial("tcp", dest)
		if err != nil {
			return
		}
		to = conn.(*net.TCPConn)
	} else {
		if strings.HasPrefix(f.host.Deliver, "unix:") {
			end = f.dialing()
		}
		conn, err := f.dialHost(end)
		if err != nil {
			return
		}
		to = conn.(halfCloser)
	}
	defer to.Close()
	var both sync.WaitGroup
	clean := true
	copy := func(dst, src halfCloser, count *int) {
		b := make([]byte, 32<<10)
		for {
			n, err := src.Read(b)
			f.mu.Lock()
			*count += n
			f.mu.Unlock()
			if _, werr := dst.Write(b[:n]); werr != nil {
				err = werr
			}
			if err == nil {
				continue
			}
			if src == to && end != nil && !over(src) && !end.marked() && !f.is("server: does not look at marks") {
				err = io.ErrUnexpectedEOF
			}
			if !errors.Is(err, io.EOF) {
				f.mu.Lock()
				clean = false
				f.mu.Unlock()
				if end != nil && f.is("finishes what broke") {
					end.note(4)
				}
				if end != nil && f.is("server: marks what broke") {
					end.mark()
				}
				for _, conn := range []halfCloser{dst, src} { // what broke must not look like an end
					if socket, ok := conn.(*net.TCPConn); ok {
						_ = socket.SetLinger(0)
					}
					conn.Close()
				}
				return
			}
			break
		}
		if dst == to && end != nil && !over(dst) && !f.is("server: marks nothing") {
			end.mark()
		}
		if f.is("server: ends both directions at once") {
			wire.Close()
		}
		_ = dst.CloseWrite()
	}
	f.propose(wire, to)
	early := f.is("server: sends before the reply")
	if early {
		both.Go(func() { copy(to, wire, &f.total.received) })
	}
	if f.config["to"] == "" && !f.agreed(to) {
		return
	}
	f.mu.Lock()
	if !f.is("server: counts nothing") {
		f.total.active++
		f.total.opened++
	}
	f.mu.Unlock()
	finish := func(bool) {}
	if !early {
		var taker halfCloser
		if taker, finish = f.taker(to.(net.Conn), end, nil); taker != nil {
			to = taker
		}
		both.Go(func() { copy(to, wire, &f.total.received) })
	}
	both.Go(func() { copy(wire, to, &f.total.sent) })
	both.Wait()
	finish(clean)
	f.mu.Lock()
	f.total.active--
	f.mu.Unlock()
}

func (f *faulty) dialHost(end *faultyEnd) (net.Conn, error) {
	if socket, ok := strings.CutPrefix(f.host.Deliver, "unix:"); ok {
		var name *net.UnixAddr
		if end != nil {
			name = &net.UnixAddr{Name: end.name, Net: "unix"}
		}
		return net.DialUnix("unix", name, &net.UnixAddr{Name: socket, Net: "unix"})
	}
	return net.Dial("tcp", f.host.Deliver)
}

// propose asks the host whether it wants the connection.
func (f *faulty) propose(wire *net.TCPConn, to io.Writer) {
	if f.config["to"] != "" {
		return
	}
	remote := wire.RemoteAddr().String()
	if f.is("server: hides the client's address") {
		remote = "127.0.0.1:1"
	}
	told, _ := json.Marshal(map[string]string{"transport": f.name(), "remote": remote})
	_, _ = to.Write(append([]byte{5, 1, 0x80}, told...))
	_, _ = to.Write(append([]byte{5, 1, 0, 4}, make([]byte, 18)...))
}

func (f *faulty) agreed(to io.Reader) bool {
	reply := make([]byte, 12)
	_, err := io.ReadFull(to, reply)
	return err == nil && (reply[3] == 0 || f.is("server: does not read the reply"))
}

// generate makes configurations with a port that is free at the moment.
func (f *faulty) generate() {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		f.die(71, "%v", err)
	}
	addr := listener.Addr().String()
	listener.Close()
	to := addr
	switch {
	case f.is("generate: port 0"):
		addr, to = "127.0.0.1:0", "127.0.0.1:0"
	case f.is("generate: no match"):
		to = "127.0.0.1:1" // where nobody listens
	case f.is("generate: a banner"):
		f.say("*** faulty ***")
	}
	client, server := map[string]string{"server": to}, map[string]string{"listen": addr}
	if value := f.config["packets"]; value != "" {
		client, server["packets"] = map[string]string{"packets": value}, value
	}
	for _, key := range []string{"signals", "to"} {
		if value := f.config[key]; value != "" {
			server[key] = value
		}
	}
	if value := f.config["signals"]; value != "" {
		client["signals"] = value
	}
	line, _ := json.Marshal(map[string]any{"client": client, "server": server})
	f.say("%s", line)
	os.Exit(0)
}
