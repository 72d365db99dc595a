package socks

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"os"
	"runtime"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"pthost/ptipc"
)

// request is a whole handshake without settings, for example.com:443.
const request = "\x05\x01\x00" + "\x05\x01\x00\x03\x0bexample.com\x01\xbb"

var granted = []byte("\x05\x00" + "\x05\x00\x00\x01\x00\x00\x00\x00\x00\x00")

var networks = []string{"tcp", "unix", "pipe"}

// echoServer dials a connection of the network that sends back what it gets.
func echoServer(t testing.TB, network string) *Server {
	return &Server{Dial: func(context.Context, *Request) (net.Conn, error) {
		near, far := connected(t, network)
		go func() {
			defer far.Close()
			// Splicing would leave pipes behind for a while. It ends with the
			// connection, however that ends.
			_, _ = io.Copy(struct{ io.Writer }{far}, struct{ io.Reader }{far})
		}()
		return near, nil
	}}
}

func connect(t testing.TB, dial func() net.Conn) net.Conn {
	t.Helper()
	conn := dial()
	if err := Connect(t.Context(), conn, nil, "example.com:443"); err != nil {
		t.Fatal(err)
	}
	return conn
}

func checkEcho(t testing.TB, conn net.Conn) {
	t.Helper()
	if _, err := conn.Write([]byte("echo")); err != nil {
		t.Fatal(err)
	}
	if got := string(readExactly(t, conn, 4)); got != "echo" {
		t.Fatalf("the echo is %q", got)
	}
}

// SOCKS-9: silent clients hold nobody up.
func TestSilentClients(t *testing.T) {
	for _, network := range []string{"tcp", "unix"} {
		t.Run(network, func(t *testing.T) {
			l, dial := listen(t, network)
			start(t, echoServer(t, network), l)
			for range 50 {
				defer dial().Close()
			}
			conn := connect(t, dial)
			defer conn.Close()
			checkEcho(t, conn)
		})
	}
}

// SOCKS-9: the time limit is for the whole handshake, however often bytes come.
func TestSlowClient(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l, dial := listen(t, "pipe")
		start(t, &Server{}, l)
		begin := time.Now()
		conn := dial()
		defer conn.Close()
		for i := range len(request) {
			if i == 3 {
				readExactly(t, conn, 2)
			}
			if _, err := conn.Write([]byte(request[i : i+1])); err != nil {
				break
			}
			select {
			case <-time.After(900 * time.Millisecond):
			case <-t.Context().Done():
			}
			if time.Since(begin) > DefaultHandshakeTimeout-time.Second {
				break
			}
		}
		got, err := io.ReadAll(conn)
		if want := reply(0, false, ptipc.ErrTimedOut); !bytes.Equal(got, want) {
			t.Errorf("the server sent % x, then %v; want % x", got, err, want)
		}
		if took := time.Since(begin); took != DefaultHandshakeTimeout {
			t.Errorf("the handshake was ended after %v, want %v", took, DefaultHandshakeTimeout)
		}
	})
}

// SOCKS-14: a client that hangs up cancels the dial, and what the dial brings
// nevertheless is closed.
func TestHangUp(t *testing.T) {
	half := func(c net.Conn) { _ = c.(interface{ CloseWrite() error }).CloseWrite() }
	whole := func(c net.Conn) { c.Close() }
	reset := func(c net.Conn) { _ = c.(*net.TCPConn).SetLinger(0); c.Close() }
	large := string(make([]byte, 2*handshakeBuffer))
	for _, test := range []struct {
		name, network, early string
		hangUp               func(net.Conn)
	}{
		{"end of stream", "tcp", "", half},
		{"close", "tcp", "", whole},
		{"reset", "tcp", "", reset},
		{"reset after early data", "tcp", "early", reset},
		{"reset after much early data", "tcp", large, reset},
		{"end of stream", "unix", "", half},
		{"close", "unix", "", whole},
		{"close after early data", "unix", "early", whole},
		{"close after much early data", "unix", large, whole},
		{"close", "pipe", "", whole},
	} {
		t.Run(test.network+"/"+test.name, func(t *testing.T) {
			dialing := make(chan struct{})
			wire := make(chan net.Conn, 1)
			s := &Server{Dial: func(ctx context.Context, _ *Request) (net.Conn, error) {
				close(dialing)
				<-ctx.Done()
				near, far := net.Pipe()
				wire <- far
				return near, nil
			}}
			l, dial := listen(t, test.network)
			start(t, s, l)
			client := dial()
			defer client.Close()
			if _, err := client.Write([]byte(request + test.early)); err != nil {
				t.Fatal(err)
			}
			<-dialing
			test.hangUp(client)
			far := <-wire
			if n, err := far.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
				t.Errorf("the wire got %d bytes, then %v; want the end", n, err)
			}
		})
	}
}

// SOCKS-14: a client that hangs up after early data has been taken does so too,
// where the socket shows it, after it has half-closed.
func TestHangUpAfterHalfClose(t *testing.T) {
	dialing := make(chan struct{})
	canceled := make(chan struct{})
	s := &Server{Dial: func(ctx context.Context, _ *Request) (net.Conn, error) {
		close(dialing)
		<-ctx.Done()
		close(canceled)
		return nil, ctx.Err()
	}}
	l, dial := listen(t, "unix")
	start(t, s, l)
	client := dial().(*net.UnixConn)
	if _, err := client.Write([]byte(request + "early")); err != nil {
		t.Fatal(err)
	}
	<-dialing
	_ = client.CloseWrite()
	readExactly(t, client, 2) // the watch answers the greeting when it begins
	select {
	case <-canceled:
		t.Error("a half-close after early data has canceled the dial")
	default:
	}
	client.Close()
	<-canceled
}

// SOCKS-14: after early data the end of the stream is a half-close, which waits
// for the dial and is passed on behind the data.
func TestHalfCloseDuringDial(t *testing.T) {
	large := bytes.Repeat([]byte("early"), 5000)
	for _, network := range []string{"tcp", "unix"} {
		for _, early := range [][]byte{[]byte("early"), large} {
			dialing := make(chan struct{})
			release := make(chan struct{})
			fars := make(chan net.Conn, 1)
			s := &Server{Dial: func(ctx context.Context, _ *Request) (net.Conn, error) {
				close(dialing)
				select {
				case <-release:
				case <-ctx.Done():
					return nil, ctx.Err()
				}
				near, far := connected(t, network)
				fars <- far
				return near, nil
			}}
			l, dial := listen(t, network)
			start(t, s, l)
			client := dial()
			if _, err := client.Write([]byte(request)); err != nil {
				t.Fatal(err)
			}
			<-dialing
			if _, err := client.Write(early); err != nil {
				t.Fatal(err)
			}
			_ = client.(interface{ CloseWrite() error }).CloseWrite()
			got := readExactly(t, client, 2) // the watch answers the greeting when it begins
			close(release)
			got = append(got, readExactly(t, client, len(granted)-2)...)
			if !bytes.Equal(got, granted) {
				t.Errorf("the reply is % x", got)
			}
			far := <-fars
			if wire, err := io.ReadAll(far); !bytes.Equal(wire, early) {
				t.Errorf("the wire got %d bytes, then %v; want %d", len(wire), err, len(early))
			}
			if _, err := far.Write([]byte("back")); err != nil {
				t.Fatal(err)
			}
			far.Close()
			if back, err := io.ReadAll(client); string(back) != "back" || err != nil {
				t.Errorf("the client got %q, then %v", back, err)
			}
			client.Close()
		}
	}
}

// SOCKS-14: on a conn that can only be read, early data is kept up to a bound,
// and comes first.
func TestEarlyDataOnPipe(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		release := make(chan struct{})
		fars := make(chan net.Conn, 1)
		s := &Server{Dial: func(context.Context, *Request) (net.Conn, error) {
			<-release
			near, far := net.Pipe()
			fars <- far
			return near, nil
		}}
		l, dial := listen(t, "pipe")
		start(t, s, l)
		client := dial()
		early := bytes.Repeat([]byte("0123456789abcdef"), 2*maxEarly/16)
		written := 0
		ended := make(chan struct{})
		go func() {
			defer close(ended)
			for _, b := range [][]byte{[]byte(request), early} {
				n, err := client.Write(b)
				if err != nil {
					t.Error(err)
				}
				written += n
			}
		}()
		go func() {
			if got := readExactly(t, client, len(granted)); !bytes.Equal(got, granted) {
				t.Errorf("the reply is % x", got)
			}
		}()
		synctest.Wait()
		<-time.After(time.Minute) // the dial takes long
		synctest.Wait()
		if written > len(request) {
			t.Error("all early data was taken during the dial: it is not bounded")
		}
		close(release)
		far := <-fars
		if got := readExactly(t, far, len(early)); !bytes.Equal(got, early) {
			t.Error("the wire got other bytes than were sent")
		}
		<-ended
		client.Close()
		far.Close()
	})
}

// SOCKS-16: the answer to a client that goes on writing is not destroyed.
func TestEarlyWriterGetsReply(t *testing.T) {
	for _, network := range []string{"tcp", "unix"} {
		t.Run(network, func(t *testing.T) {
			s := &Server{Dial: func(context.Context, *Request) (net.Conn, error) {
				return nil, ptipc.ErrRefused
			}}
			l, dial := listen(t, network)
			start(t, s, l)
			client := dial()
			defer client.Close()
			written := make(chan struct{})
			go func() {
				defer close(written)
				_, _ = client.Write(append([]byte(request), make([]byte, 4*lingerBytes)...)) // fails when the server has closed
			}()
			if got := readExactly(t, client, len(granted)); got[3] != byte(ptipc.ErrRefused) {
				t.Errorf("the reply is % x", got)
			}
			<-written
		})
	}
}

// SOCKS-10: above MaxConns requests are refused, until one has ended.
func TestMaxConns(t *testing.T) {
	for _, network := range networks {
		t.Run(network, func(t *testing.T) {
			s := echoServer(t, "tcp")
			s.MaxConns = 2
			l, dial := listen(t, network)
			start(t, s, l)
			first, second := connect(t, dial), connect(t, dial)
			defer first.Close()
			third := dial()
			if err := Connect(t.Context(), third, nil, "example.com:443"); !errors.Is(err, ptipc.ErrGeneral) {
				t.Errorf("the third connection: %v, want %v", err, ptipc.ErrGeneral)
			}
			third.Close()
			second.Close()
			for { // until the server has seen the end
				conn := dial()
				err := Connect(t.Context(), conn, nil, "example.com:443")
				if err == nil {
					checkEcho(t, conn)
					conn.Close()
					return
				}
				conn.Close()
				if !errors.Is(err, ptipc.ErrGeneral) {
					t.Fatal(err)
				}
			}
		})
	}
}

// SOCKS-10: above MaxHandshakes connections wait.
func TestMaxHandshakes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dialed := false
		s := &Server{MaxHandshakes: 1, Dial: func(context.Context, *Request) (net.Conn, error) {
			dialed = true
			return nil, ptipc.ErrRefused
		}}
		l, dial := listen(t, "pipe")
		start(t, s, l)
		silent, waiting := dial(), dial()
		refused := make(chan error, 1)
		go func() { refused <- Connect(t.Context(), waiting, nil, "example.com:443") }()
		synctest.Wait()
		if dialed {
			t.Error("the second handshake was served beside the first")
		}
		silent.Close()
		if err := <-refused; !errors.Is(err, ptipc.ErrRefused) {
			t.Error(err)
		}
		waiting.Close()
	})
}

// A signalHandler tells when something is logged.
type signalHandler chan string

func (h signalHandler) Enabled(_ context.Context, level slog.Level) bool {
	return level >= slog.LevelWarn
}

func (h signalHandler) Handle(_ context.Context, r slog.Record) error {
	select {
	case h <- r.Message:
	default:
	}
	return nil
}
func (h signalHandler) WithAttrs([]slog.Attr) slog.Handler { return h }
func (h signalHandler) WithGroup(string) slog.Handler      { return h }

// SOCKS-10: the server goes on after descriptors ran out.
func TestNoDescriptors(t *testing.T) {
	if runtime.GOOS == "windows" {
		t.Skip("descriptors do not run out there")
	}
	s := echoServer(t, "pipe")
	logged := make(signalHandler, 1)
	s.Log = slog.New(logged)
	l, dial := listen(t, "unix")
	start(t, s, l)
	checkEcho(t, connect(t, dial)) // what is opened once is open now

	lowerFileLimit(t)
	var fillers []*os.File
	for {
		f, err := os.Open(os.DevNull)
		if err != nil {
			if !errors.Is(err, syscall.EMFILE) {
				t.Error(err)
			}
			break
		}
		fillers = append(fillers, f)
	}
	fillers[0].Close() // for the client's end
	conn := dial()
	<-logged
	for _, f := range fillers[1:] {
		f.Close()
	}
	if err := Connect(t.Context(), conn, nil, "example.com:443"); err != nil {
		t.Fatal(err)
	}
	checkEcho(t, conn)
	conn.Close()
}

type brokenListener struct {
	net.Listener
	errs []error
}

func (l *brokenListener) Accept() (net.Conn, error) {
	err := l.errs[0]
	l.errs = l.errs[1:]
	return nil, err
}

// SOCKS-10: the pause after a failure grows, and an error of the listener
// itself is the end.
func TestAcceptErrors(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		inner, _ := listen(t, "pipe")
		broken := errors.New("broken")
		l := &brokenListener{Listener: inner}
		for range 20 {
			l.errs = append(l.errs, &net.OpError{Op: "accept", Err: os.NewSyscallError("accept", syscall.EMFILE)})
		}
		l.errs = append(l.errs, broken)
		begin := time.Now()
		if err := new(Server).Serve(l); !errors.Is(err, broken) {
			t.Errorf("Serve: %v", err)
		}
		// 5, 10, … 640 ms, and 12 times a second.
		if took, want := time.Since(begin), 1275*time.Millisecond+12*time.Second; took != want {
			t.Errorf("20 failures took %v, want %v", took, want)
		}
	})
}

func TestShutdownDrains(t *testing.T) {
	for _, network := range networks {
		t.Run(network, func(t *testing.T) {
			s := echoServer(t, "tcp")
			l, dial := listen(t, network)
			l2, dial2 := listen(t, network)
			served := make(chan error, 2)
			go func() { served <- s.Serve(l) }()
			go func() { served <- s.Serve(l2) }()
			conn, conn2 := connect(t, dial), connect(t, dial2)
			down := make(chan error, 1)
			go func() { down <- s.Shutdown(t.Context()) }()
			for range 2 {
				if err := <-served; err != nil {
					t.Error("Serve:", err)
				}
			}
			checkEcho(t, conn)
			conn.Close()
			checkEcho(t, conn2)
			select {
			case err := <-down:
				t.Errorf("Shutdown returned %v before the last connection had ended", err)
			default:
			}
			conn2.Close()
			if err := <-down; err != nil {
				t.Error("Shutdown:", err)
			}
			l3, _ := listen(t, network)
			if err := s.Serve(l3); err != nil {
				t.Error("Serve after Shutdown:", err)
			}
		})
	}
}

// SOCKS-15: what is cut does not look like what has ended.
func TestShutdownCuts(t *testing.T) {
	fars := make(chan net.Conn, 1)
	dialing := make(chan struct{})
	s := &Server{Dial: func(ctx context.Context, r *Request) (net.Conn, error) {
		if r.Dest == "slow.example:1" {
			close(dialing)
			<-ctx.Done()
			return nil, ctx.Err()
		}
		near, far := connected(t, "tcp")
		fars <- far
		return near, nil
	}}
	l, dial := listen(t, "tcp")
	served := make(chan error, 1)
	go func() { served <- s.Serve(l) }()

	relayed := connect(t, dial)
	defer relayed.Close()
	far := <-fars
	silent := dial()
	defer silent.Close()
	if _, err := silent.Write([]byte{5, 1, 0}); err != nil {
		t.Fatal(err)
	}
	readExactly(t, silent, 2)
	slow := dial()
	defer slow.Close()
	refused := make(chan error, 1)
	go func() { refused <- Connect(t.Context(), slow, nil, "slow.example:1") }()
	<-dialing

	cause := errors.New("enough")
	ctx, cancel := context.WithCancelCause(t.Context())
	first := make(chan error, 1)
	go func() { first <- s.Shutdown(t.Context()) }()
	<-served
	cancel(cause)
	if err := s.Shutdown(ctx); !errors.Is(err, cause) {
		t.Errorf("Shutdown: %v, want %v", err, cause)
	}
	if err := <-first; err != nil {
		t.Error("the Shutdown that waits:", err)
	}
	for name, conn := range map[string]net.Conn{"client": relayed, "wire": far} {
		if n, err := conn.Read(make([]byte, 1)); err == nil || errors.Is(err, io.EOF) {
			t.Errorf("the %s got %d bytes, then %v; want a reset", name, n, err)
		}
	}
	if n, err := silent.Read(make([]byte, 1)); err == nil {
		t.Errorf("a handshake went on after the shutdown: %d bytes", n)
	}
	if err := <-refused; err == nil {
		t.Error("a dial succeeded after the shutdown")
	}
}

// Shutdown does not hang because of a Dial that does not heed its ctx.
func TestShutdownWithStuckDial(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dialing, release := make(chan struct{}), make(chan struct{})
		s := &Server{Dial: func(context.Context, *Request) (net.Conn, error) {
			close(dialing)
			<-release
			return nil, ptipc.ErrGeneral
		}}
		l, dial := listen(t, "pipe")
		served := make(chan error, 1)
		go func() { served <- s.Serve(l) }()
		client := dial()
		go func() { _, _ = client.Write([]byte(request)) }()
		<-dialing
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if err := s.Shutdown(ctx); !errors.Is(err, context.Canceled) {
			t.Errorf("Shutdown: %v", err)
		}
		<-served
		client.Close()
		close(release)
	})
}

// Whatever becomes of connections, goroutines and descriptors are given back.
func TestNothingLeft(t *testing.T) {
	for _, network := range []string{"tcp", "unix"} {
		t.Run(network, func(t *testing.T) {
			echo := echoServer(t, network).Dial
			s := &Server{Dial: func(ctx context.Context, r *Request) (net.Conn, error) {
				switch string(r.Settings) {
				case `{"do":"refuse"}`:
					return nil, ptipc.ErrRefused
				case `{"do":"wait"}`:
					<-ctx.Done()
					return nil, ctx.Err()
				}
				return echo(ctx, r)
			}}
			l, dial := listen(t, network)
			served := make(chan error, 1)
			go func() { served <- s.Serve(l) }()
			run := func() {
				conn := dial()
				defer conn.Close()
				if err := Connect(t.Context(), conn, nil, "example.com:443"); err != nil {
					t.Error(err)
				}
				checkEcho(t, conn)
			}
			run()
			files, goroutines := openFiles(t), runtime.NumGoroutine()
			const rounds = 50
			ended := make(chan struct{})
			for range rounds {
				go func() {
					defer func() { ended <- struct{}{} }()
					run()
					for _, bytes := range []string{"", "\x05", "\x04", "\x05\x01\x80{", "\x05\x01\x80[", request} {
						conn := dial()
						_, _ = conn.Write([]byte(bytes)) // hang up in every state
						conn.Close()
					}
					conn := dial()
					if err := Connect(t.Context(), conn, ptipc.Opaque(`{"do":"refuse"}`), "example.com:443"); !errors.Is(err, ptipc.ErrRefused) {
						t.Error(err)
					}
					conn.Close()
					conn = dial()
					_, _ = conn.Write([]byte("\x05\x01\x80{\"do\":\"wait\"}" + request[3:]))
					conn.Close()
				}()
			}
			for range rounds {
				<-ended
			}
			if err := s.Shutdown(t.Context()); err != nil {
				t.Error(err)
			}
			<-served
			// The far ends are on their way out still.
			for limit := time.Now().Add(10 * time.Second); time.Now().Before(limit); runtime.Gosched() {
				if openFiles(t) <= files && runtime.NumGoroutine() <= goroutines {
					return
				}
			}
			t.Errorf("%d descriptors and %d goroutines are left, there were %d and %d",
				openFiles(t), runtime.NumGoroutine(), files, goroutines)
		})
	}
}
