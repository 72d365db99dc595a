package localnet

import (
	"bytes"
	"errors"
	"log/slog"
	"net"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

// lines keeps what was logged.
type lines struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lines) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(b)
}

func (l *lines) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

func (l *lines) logger() *slog.Logger { return slog.New(slog.NewTextHandler(l, nil)) }

// scripted is a listener that returns what is put into it.
type scripted struct {
	results chan any // an error or a net.Conn
	closed  chan struct{}
	once    sync.Once
}

func newScripted(results ...any) *scripted {
	s := &scripted{results: make(chan any, len(results)), closed: make(chan struct{})}
	for _, r := range results {
		s.results <- r
	}
	return s
}

func (s *scripted) Accept() (net.Conn, error) {
	select {
	case r := <-s.results:
		if err, ok := r.(error); ok {
			return nil, &net.OpError{Op: "accept", Err: err}
		}
		return r.(net.Conn), nil
	case <-s.closed:
		return nil, net.ErrClosed
	}
}

func (s *scripted) Close() error   { s.once.Do(func() { close(s.closed) }); return nil }
func (s *scripted) Addr() net.Addr { return Addr{name: "scripted"} }

// SOCKS-10: running out of descriptors does not end a listener.
func TestGuardSurvivesAcceptErrors(t *testing.T) {
	t.Parallel()
	// A connection made outside of the bubble: its peer is known at once.
	d := openDir(t, privateDir(t))
	l, err := d.Listen("s")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	_, server := pair(t, l, func() (net.Conn, error) { return d.Dial(t.Context(), "s") })
	synctest.Test(t, func(t *testing.T) {
		log := &lines{}
		g := Guard(newScripted(syscall.EMFILE, syscall.ENFILE, syscall.ECONNABORTED, syscall.ENOBUFS, server), log.logger())
		c, err := g.Accept()
		if err != nil || c != server {
			t.Fatalf("Accept: %v, %v", c, err)
		}
		if n := strings.Count(log.String(), "level=WARN"); n != 4 {
			t.Errorf("%d lines were logged about 4 errors: %s", n, log)
		}
		g.Close()
	})
}

func TestGuardCloseEndsWait(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := newScripted(syscall.EMFILE, syscall.EMFILE, syscall.EMFILE)
		g := Guard(s, nil)
		ended := make(chan error)
		go func() {
			_, err := g.Accept()
			ended <- err
		}()
		synctest.Wait() // Accept waits before its second try
		if len(s.results) != 2 {
			t.Errorf("%d errors were taken before a wait", 3-len(s.results))
		}
		started := time.Now()
		g.Close()
		if err := <-ended; !errors.Is(err, net.ErrClosed) {
			t.Errorf("Accept: %v", err)
		}
		if time.Now() != started {
			t.Errorf("Close took %v to end a wait", time.Since(started))
		}
		if err := g.Close(); err != nil {
			t.Errorf("a second Close: %v", err)
		}
	})
}

func TestGuardReturnsOtherErrors(t *testing.T) {
	t.Parallel()
	g := Guard(newScripted(syscall.EINVAL), nil)
	defer g.Close()
	if _, err := g.Accept(); !errors.Is(err, syscall.EINVAL) {
		t.Errorf("Accept: %v", err)
	}
	g.Close()
	if _, err := g.Accept(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("Accept after Close: %v", err)
	}
}

// Who cannot be told is not let in, and cannot fill the log either.
func TestGuardLogsOnceASecond(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := newScripted()
		s.results = make(chan any)
		log := &lines{}
		g := Guard(s, log.logger())
		ended := make(chan struct{})
		go func() {
			defer close(ended)
			if c, err := g.Accept(); err == nil {
				t.Errorf("a connection of nobody was accepted: %v", c)
			}
		}()
		refuse := func(n int) {
			for range n {
				a, b := net.Pipe() // its peer cannot be told
				s.results <- a
				if _, err := b.Read(make([]byte, 1)); err == nil {
					t.Error("a refused connection was not closed")
				}
				b.Close()
			}
			synctest.Wait()
		}
		counts := func(want ...string) {
			t.Helper()
			var got []string
			for line := range strings.Lines(log.String()) {
				for field := range strings.FieldsSeq(line) {
					if n, ok := strings.CutPrefix(field, "count="); ok {
						got = append(got, n)
					}
				}
			}
			if strings.Join(got, " ") != strings.Join(want, " ") {
				t.Errorf("counts logged: %v, want %v", got, want)
			}
		}
		refuse(100)
		counts("1")
		time.Sleep(refusalLogInterval)
		refuse(1)
		counts("1", "100")
		refuse(5)
		g.Close()
		<-ended
		counts("1", "100", "5") // none is lost
		if g.Refused() != 106 {
			t.Errorf("%d refused, want 106", g.Refused())
		}
	})
}

// The relay takes its fast path with these types only.
func TestGuardKeepsTypes(t *testing.T) {
	t.Parallel()
	d := openDir(t, privateDir(t))
	l, err := d.Listen("s")
	if err != nil {
		t.Fatal(err)
	}
	g := Guard(l, nil)
	defer g.Close()
	if g.Addr().String() != "unix:s" {
		t.Errorf("the address is %s", g.Addr())
	}
	_, server := pair(t, g, func() (net.Conn, error) { return d.Dial(t.Context(), "s") })
	if _, ok := server.(*net.UnixConn); !ok {
		t.Errorf("accepted a %T", server)
	}
	tcp := Guard(listenTCP(t, "127.0.0.1:0"), nil)
	defer tcp.Close()
	_, server = pair(t, tcp, func() (net.Conn, error) { return net.Dial("tcp", tcp.Addr().String()) })
	if _, ok := server.(*net.TCPConn); !ok {
		t.Errorf("accepted a %T", server)
	}
}
