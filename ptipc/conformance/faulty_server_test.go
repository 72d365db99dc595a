package conformance_test

import (
	"bufio"
	"encoding/json"
	"errors"
	"io"
	"net"
	"os"
	"os/signal"
	"strings"
	"sync"
	"syscall"
)

// serverMain is a child in the role server whose wire is plain TCP, with one fault
// or none. Its configuration is {} or {"listen":ADDR}.
func (f *faulty) serverMain(args []string) {
	terms := make(chan os.Signal, 2)
	signal.Notify(terms, syscall.SIGTERM)
	var config struct {
		Listen string `json:"listen"`
	}
	dec := json.NewDecoder(strings.NewReader(args[0]))
	dec.DisallowUnknownFields()
	if dec.Decode(&config) != nil {
		if f.is("server: exits with 1 for a bad configuration") {
			os.Exit(1)
		}
		f.say(`SMETHOD-ERROR _ {"class":19,"message":"bad configuration"}`)
		f.die(78, "bad configuration")
	}
	var host struct {
		Deliver string `json:"deliver"`
		Ends    int    `json:"ends"`
	}
	_ = json.Unmarshal([]byte(args[1]), &host)
	f.host.Ends = host.Ends
	if host.Deliver == "" && !f.is("server: needs no deliver") {
		f.die(64, "nowhere to deliver")
	}
	if config.Listen == "" {
		config.Listen = "127.0.0.1:0"
	}
	listener, err := net.Listen("tcp", config.Listen)
	if err != nil {
		f.die(71, "%v", err)
	}
	addr := listener.Addr().String()
	if f.is("server: announces port 0") {
		addr = "127.0.0.1:0"
	}
	argsText := "stats=1"
	if f.host.Ends != 0 {
		argsText += ",ends=1"
	}
	if f.is("server: ARGS with a bad escape") {
		argsText += `,a=\b`
	}
	f.say("VERSION 1\nSMETHOD faulty %s ARGS:%s\nSMETHODS DONE", addr, argsText)
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			f.serving.Go(func() { f.handOver(conn.(*net.TCPConn), strings.TrimPrefix(host.Deliver, "unix:")) })
		}
	}()
	ended := make(chan struct{})
	go func() {
		f.readSignals()
		close(ended)
	}()
	select {
	case <-ended:
		if f.is("server: cuts at the end") {
			os.Exit(0)
		}
	case <-terms:
		if f.is("server: cuts on SIGTERM") {
			os.Exit(0)
		}
	}
	listener.Close()
	f.serving.Wait()
	os.Exit(0)
}

func (f *faulty) readSignals() {
	in := bufio.NewReaderSize(os.Stdin, 128<<10)
	for {
		line, err := in.ReadString('\n')
		if err != nil {
			return
		}
		keyword, id, _ := strings.Cut(strings.TrimSuffix(line, "\n"), " ")
		switch {
		case keyword == "CMESSAGE" && f.is("server: dies of a bad message"):
			f.die(76, "bad message")
		case keyword == "STATS":
			f.say("STATS %s %s", id, f.stats(""))
		}
	}
}

func (f *faulty) handOver(wire *net.TCPConn, socket string) {
	defer wire.Close()
	var name *net.UnixAddr
	end := f.dialing()
	if end != nil {
		name = &net.UnixAddr{Name: end.name, Net: "unix"}
	}
	to, err := net.DialUnix("unix", name, &net.UnixAddr{Name: socket, Net: "unix"})
	if err != nil {
		return
	}
	defer to.Close()
	remote := wire.RemoteAddr().String()
	if f.is("server: hides the client's address") {
		remote = "127.0.0.1:1"
	}
	told, _ := json.Marshal(map[string]string{"transport": "faulty", "remote": remote})
	if f.is("server: sends settings that are no object") {
		told = []byte("[]")
	}
	_, _ = to.Write(append([]byte{5, 1, 0x80}, told...))
	_, _ = to.Write(append([]byte{5, 1, 0, 4}, make([]byte, 18)...))
	if f.is("server: sends before the reply") {
		_, _ = io.CopyN(to, wire, 1)
	}
	reply := make([]byte, 12)
	if _, err := io.ReadFull(to, reply); err != nil || reply[3] != 0 && !f.is("server: does not read the reply") {
		return
	}
	f.mu.Lock()
	if !f.is("server: counts nothing") {
		f.total.active++
		f.total.opened++
	}
	f.mu.Unlock()
	var both sync.WaitGroup
	copy := func(dst, src interface {
		io.ReadWriteCloser
		CloseWrite() error
	}, count *int,
	) {
		b := make([]byte, 32<<10)
		for {
			n, err := src.Read(b)
			f.mu.Lock()
			*count += n
			f.mu.Unlock()
			_, werr := dst.Write(b[:n])
			if err == nil && werr == nil {
				continue
			}
			if end == nil {
				break
			}
			broken := werr != nil || !errors.Is(err, io.EOF)
			if src == to && !end.marked() && !f.is("server: does not look at marks") {
				broken = true
			}
			if broken {
				if f.is("server: marks what broke") {
					end.mark()
				}
				_ = wire.SetLinger(0)
				wire.Close()
				to.Close()
				return
			}
			break
		}
		if dst == to && end != nil && !f.is("server: marks nothing") {
			end.mark()
		}
		if f.is("server: ends both directions at once") {
			wire.Close()
		}
		_ = dst.CloseWrite()
	}
	both.Go(func() { copy(to, wire, &f.total.received) })
	both.Go(func() { copy(wire, to, &f.total.sent) })
	both.Wait()
	f.mu.Lock()
	f.total.active--
	f.mu.Unlock()
}

// generateMain makes configurations with a port that is free at the moment.
func (f *faulty) generateMain() {
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
	}
	f.say(`{"client":{"server":%q},"server":{"listen":%q}}`, to, addr)
	os.Exit(0)
}
