package free

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/net/nettest"

	"pthost/ptipc"
)

func dialPlain(t testing.TB, transport *ptipc.Transport, dest string) ptipc.Conn {
	t.Helper()
	conn, err := transport.Connections["plain"].Dial(t.Context(), nil, dest)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

// stream opens one through the whole chain.
func stream(t testing.TB, transport *ptipc.Transport, dest string, accepted <-chan net.Conn) (near ptipc.Conn, far net.Conn) {
	t.Helper()
	near = dialPlain(t, transport, dest)
	far = <-accepted
	t.Cleanup(func() { far.Close() })
	return near, far
}

// SOCKS-15, both ways.
func TestHalfClose(t *testing.T) {
	eachAdapter(t, func(t *testing.T, adapter adapter) {
		dest, accepted := target(t)
		transport, _ := chain(t, adapter, loopback)
		for _, way := range []string{"out", "in"} {
			t.Run(way, func(t *testing.T) {
				var a, b net.Conn
				a, b = stream(t, transport, dest, accepted)
				if way == "in" {
					a, b = b, a
				}
				mustWrite(t, a, []byte("question"))
				closeWrite(t, a)
				if got := string(readExactly(t, b, 8)); got != "question" {
					t.Errorf("got %q", got)
				}
				mustEnd(t, b)
				mustWrite(t, b, []byte("answer"))
				closeWrite(t, b)
				if got := string(readExactly(t, a, 6)); got != "answer" {
					t.Errorf("got %q", got)
				}
				mustEnd(t, a)
			})
		}
	})
}

func TestConnIsANetConn(t *testing.T) {
	eachAdapter(t, func(t *testing.T, adapter adapter) {
		dest, accepted := target(t)
		transport, _ := chain(t, adapter, loopback)
		nettest.TestConn(t, func() (c1, c2 net.Conn, stop func(), err error) {
			near, err := transport.Connections["plain"].Dial(t.Context(), nil, dest)
			if err != nil {
				return nil, nil, nil, err
			}
			far := <-accepted
			return near, far, func() { near.Close(); far.Close() }, nil
		})
	})
}

// 100 MB in both directions at once.
func TestBulk(t *testing.T) {
	eachAdapter(t, func(t *testing.T, adapter adapter) {
		const size = 100 << 20
		dest, accepted := target(t)
		transport, server := chain(t, adapter, loopback)
		near, far := stream(t, transport, dest, accepted)

		var work sync.WaitGroup
		var sent, got [2][sha256.Size]byte
		for i, conns := range [][2]net.Conn{{near, far}, {far, near}} {
			work.Go(func() {
				h := sha256.New()
				src := io.LimitReader(rand.NewChaCha8([32]byte{byte(i)}), size)
				if _, err := io.Copy(io.MultiWriter(conns[0], h), src); err != nil {
					t.Error(err)
				}
				h.Sum(sent[i][:0])
				_ = conns[0].(interface{ CloseWrite() error }).CloseWrite()
			})
			work.Go(func() {
				h := sha256.New()
				if n, err := io.Copy(h, conns[1]); err != nil || n != size {
					t.Errorf("%d bytes came, then %v", n, err)
				}
				h.Sum(got[i][:0])
			})
		}
		work.Wait()
		if got != sent {
			t.Error("what came is not what was sent")
		}
		if s := near.Stats(); s.Received != size || s.Sent != size {
			t.Errorf("the connection counts %+v", s)
		}
		near.Close()
		far.Close()
		if err := server.Close(); err != nil {
			t.Error(err)
		}
		want := ptipc.TransportStats{Opened: 1, Failed: 7, Received: size, Sent: size}
		if got := server.Stats(); got != want {
			t.Errorf("the server counts %+v, want %+v", got, want)
		}
		want.Failed = 0
		if got := must(transport.Stats(t.Context())); got != want {
			t.Errorf("the client counts %+v, want %+v", got, want)
		}
	})
}

// A thousand streams at once leave nothing behind.
func TestThousandStreams(t *testing.T) {
	eachAdapter(t, func(t *testing.T, adapter adapter) {
		const streams = 1000
		dest, accepted := target(t)
		fds, goroutines := descriptors(t), runtime.NumGoroutine()
		transport, server := chain(t, adapter, loopback)
		var nears, fars []net.Conn
		for range streams {
			conn, err := transport.Connections["plain"].Dial(t.Context(), nil, dest)
			if err != nil {
				t.Fatal(err)
			}
			nears, fars = append(nears, conn), append(fars, <-accepted)
		}
		for _, c := range nears { // in the order of dialling: the far ends are in that order too
			mustWrite(t, c, []byte("x"))
		}
		for i, c := range fars {
			readExactly(t, c, 1)
			nears[i].Close()
			mustEnd(t, c)
			c.Close()
		}
		if got := server.Stats().Opened; got != streams {
			t.Errorf("%d streams were opened, want %d", got, streams)
		}
		if err := errors.Join(transport.Close(), server.Close()); err != nil {
			t.Error(err)
		}
		// The last stream is no longer counted before its goroutine and sockets are gone.
		for deadline := time.Now().Add(stuck); descriptors(t) > fds || runtime.NumGoroutine() > goroutines; {
			if time.Now().After(deadline) {
				t.Fatalf("%d descriptors and %d goroutines, were %d and %d", descriptors(t), runtime.NumGoroutine(), fds, goroutines)
			}
			runtime.Gosched()
		}
	})
}

// FREE-8, ERR-2: the class at the far end is the class here.
func TestClassesEndToEnd(t *testing.T) {
	eachAdapter(t, func(t *testing.T, adapter adapter) {
		for class := range ptipc.Class(0x20) {
			if !class.Known() {
				continue
			}
			env := ptipc.Env{DialOut: func(context.Context, string, string) (net.Conn, error) {
				return nil, ptipc.WithClass(class, errors.New("10.9.8.7 said no"))
			}}
			s, err := Server(carrier).Proxy(t.Context(), ptipc.Opaque(`{"carrier":{"addr":"127.0.0.1:0"}}`), env)
			if err != nil {
				t.Fatal(err)
			}
			transport, err := adapter(openCarrier)(t.Context(), ptipc.Opaque(`{"addr":"`+s.Addr().String()+`"}`), ptipc.Env{})
			if err != nil {
				t.Fatal(err)
			}
			_, err = transport.Connections["plain"].Dial(t.Context(), nil, "198.41.0.4:443")
			if !errors.Is(err, class) {
				t.Errorf("%v, want class %v", err, class)
			} else if strings.Contains(err.Error(), "10.9.8.7") { // EGRESS-8
				t.Errorf("%v tells what only the operator may know", err)
			}
			if err := errors.Join(transport.Close(), s.Close(), s.Wait()); err != nil {
				t.Error(err)
			}
		}
	})
}

// FREE-12, EGRESS-1, EGRESS-2, EGRESS-8: nothing that is not public is reached
// through the chain, and no port of the server can be told from another.
func TestForbiddenDestinations(t *testing.T) {
	eachAdapter(t, func(t *testing.T, adapter adapter) {
		dest, accepted := target(t)
		_, port, _ := net.SplitHostPort(dest)
		transport, server := chain(t, adapter, `{}`)
		hosts := []string{
			"127.0.0.1", "127.1.2.3", "::1", "localhost", "LOCALHOST", "0.0.0.0", "::", "::ffff:127.0.0.1", "64:ff9b::127.0.0.1",
			"10.0.0.1", "172.16.0.1", "192.168.0.1", "169.254.169.254", "100.64.0.1", "224.0.0.1", "255.255.255.255",
			"fd00::1", "fe80::1", "ff02::1", "2002:7f00:1::", "2001::7f00:1", "64:ff9b:1::1",
		}
		for _, host := range hosts {
			for _, p := range []string{port, "1"} {
				_, err := transport.Connections["plain"].Dial(t.Context(), nil, net.JoinHostPort(host, p))
				if !errors.Is(err, ptipc.ErrNotAllowed) {
					t.Errorf("%s: %v, want class %v", host, err, ptipc.ErrNotAllowed)
				}
			}
		}
		if len(accepted) > 0 {
			t.Error("somebody was connected")
		}
		if got, want := server.Stats().Failed, uint64(2*len(hosts)+7); got != want {
			t.Errorf("%d have failed, want %d", got, want)
		}
	})
}

// blocked is a dial that ends with its context.
func blocked() (dial dialFunc, began, ended chan struct{}) {
	began, ended = make(chan struct{}, 1), make(chan struct{}, 1)
	return func(ctx context.Context, _, _ string) (net.Conn, error) {
		began <- struct{}{}
		<-ctx.Done()
		ended <- struct{}{}
		return nil, ctx.Err()
	}, began, ended
}

func header(t testing.TB, dest string) []byte {
	t.Helper()
	b, err := appendHeader(nil, dest)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// FREE-11: hanging up cancels the dial; so does the end of a stream without data.
func TestHangUp(t *testing.T) {
	for _, network := range []string{"tcp", "pipe"} {
		for _, how := range []string{"close", "end", "reset after data"} {
			if network == "pipe" && how != "close" {
				continue // it has no other end
			}
			t.Run(network+"/"+how, func(t *testing.T) {
				dial, began, ended := blocked()
				s, open := startServer(t, network, drainTimeout, dial)
				c := open()
				defer c.Close()
				mustWrite(t, c, header(t, "a.example:1"))
				<-began
				switch how {
				case "close":
					c.Close()
				case "end":
					closeWrite(t, c)
				default:
					mustWrite(t, c, []byte("data"))
					_ = c.(*net.TCPConn).SetLinger(0)
					c.Close()
				}
				<-ended
				if how == "end" {
					mustEnd(t, c) // without an answer
				}
				if err := s.Close(); err != nil {
					t.Error(err)
				}
				if n := s.Stats().Failed; n != 1+7 {
					t.Errorf("%d have failed, want 8", n)
				}
			})
		}
	}
}

// The same, begun by a caller who gives up.
func TestCallerGivesUp(t *testing.T) {
	eachAdapter(t, func(t *testing.T, adapter adapter) {
		dial, began, ended := blocked()
		s, _ := startServer(t, "tcp", drainTimeout, dial)
		transport, err := adapter(openCarrier)(t.Context(), ptipc.Opaque(`{"addr":"`+s.Addr().String()+`"}`), ptipc.Env{})
		if err != nil {
			t.Fatal(err)
		}
		defer transport.Close()
		why := errors.New("no longer needed")
		ctx, cancel := context.WithCancelCause(t.Context())
		go func() {
			<-began
			cancel(why)
		}()
		if _, err := transport.Connections["plain"].Dial(ctx, nil, "a.example:1"); !errors.Is(err, why) {
			t.Errorf("%v, want %v", err, why)
		}
		<-ended
	})
}

// A far end that never answers, and a caller who would wait for ever.
func TestNoAnswer(t *testing.T) {
	eachAdapter(t, func(t *testing.T, adapter adapter) {
		synctest.Test(t, func(t *testing.T) {
			near, far := net.Pipe()
			go func() { _, _ = io.Copy(io.Discard, far) }()
			transport, err := adapter(openCarrier)(t.Context(), ptipc.Opaque(`{"addr":"far.example:1"}`), ptipc.Env{
				DialOut: func(context.Context, string, string) (net.Conn, error) { return near, nil },
			})
			if err != nil {
				t.Fatal(err)
			}
			defer transport.Close()
			if _, err := transport.Connections["plain"].Dial(t.Context(), nil, "a.example:1"); !errors.Is(err, ptipc.ErrTimedOut) {
				t.Errorf("%v, want class %v", err, ptipc.ErrTimedOut)
			}
		})
	})
}

// refusing answers, and takes nothing.
type refusing struct{ net.Conn }

func (c refusing) Write([]byte) (int, error) { return 0, syscall.EPIPE }

// FREE-8: the answer says more than a broken pipe.
func TestAnswerAfterBrokenWrite(t *testing.T) {
	near, far := net.Pipe()
	go func() { _, _ = far.Write([]byte{version, byte(ptipc.ErrSettingsTooLarge)}); far.Close() }()
	transport, err := Client(openCarrier)(t.Context(), ptipc.Opaque(`{"addr":"far.example:1"}`), ptipc.Env{
		DialOut: func(context.Context, string, string) (net.Conn, error) { return refusing{near}, nil },
	})
	if err != nil {
		t.Fatal(err)
	}
	defer transport.Close()
	dial := transport.Connections["plain"].Dial
	if _, err := dial(t.Context(), nil, "a.example:1"); !errors.Is(err, ptipc.ErrSettingsTooLarge) {
		t.Errorf("%v, want class %v", err, ptipc.ErrSettingsTooLarge)
	}
	// Without an answer the broken pipe is all there is to say.
	if _, err := dial(t.Context(), nil, "a.example:1"); !errors.Is(err, syscall.EPIPE) {
		t.Errorf("%v, want %v", err, syscall.EPIPE)
	}
}

// FREE-4: neither silent carriers nor dials that hang hold up another.
func TestNobodyWaitsForAnother(t *testing.T) {
	hang, began, _ := blocked()
	dest, accepted := target(t)
	_, open := startServer(t, "tcp", drainTimeout, func(ctx context.Context, network, addr string) (net.Conn, error) {
		if addr != dest {
			return hang(ctx, network, addr)
		}
		return new(net.Dialer).DialContext(ctx, network, addr)
	})
	for range 100 {
		silent := open()
		defer silent.Close()
		slow := open()
		defer slow.Close()
		mustWrite(t, slow, []byte{version})
	}
	hanging := open()
	defer hanging.Close()
	mustWrite(t, hanging, header(t, "a.example:1"))
	<-began
	c := open()
	defer c.Close()
	mustWrite(t, c, header(t, dest))
	if got := readExactly(t, c, answerSize); got[1] != 0 {
		t.Errorf("answered % x", got)
	}
	(<-accepted).Close()
}

// FREE-4: when the server has as many carriers as it may, the next one is not
// accepted until one of them has ended.
func TestBound(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newPipeListener()
		s := serve(&listener{Listener: l}, nil, ptipc.Env{}.Logger(), time.Hour)
		synctest.Wait() // it waits for the first, and has a place for it
		for range maxStreams - 1 {
			s.slots <- struct{}{}
		}
		last := l.dial()
		accepted := make(chan net.Conn, 1)
		go func() { accepted <- l.dial() }()
		synctest.Wait()
		if len(accepted) > 0 {
			t.Errorf("more than %d carriers were accepted", maxStreams)
		}
		last.Close()
		(<-accepted).Close()
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
}

// FREE-3, FREE-9: what a client sends beyond the limits is not kept.
func TestFlood(t *testing.T) {
	t.Run("header", func(t *testing.T) {
		_, open := startServer(t, "tcp", drainTimeout, nil)
		c := open()
		defer c.Close()
		mustWrite(t, c, []byte{version, 0xff, 0xff})
		if got := readExactly(t, c, answerSize); ptipc.Class(got[1]) != ptipc.ErrSettingsTooLarge {
			t.Errorf("answered % x", got)
		}
		flood := make([]byte, 64<<10)
		for range 1 << 10 {
			if _, err := c.Write(flood); err != nil {
				return // the server had enough of it
			}
		}
		t.Error("the server took 64 MiB of a client that it had refused")
	})
	t.Run("behind", func(t *testing.T) {
		near, far := connected(t, "tcp")
		proceed := make(chan struct{})
		_, open := startServer(t, "pipe", drainTimeout, func(context.Context, string, string) (net.Conn, error) {
			<-proceed
			return near, nil
		})
		c := open()
		defer c.Close()
		mustWrite(t, c, header(t, "a.example:1"))
		// A pipe has no buffer: what it takes is what the server keeps.
		mustWrite(t, c, make([]byte, maxEarly))
		_ = c.SetWriteDeadline(past)
		if n, err := c.Write([]byte{1}); n != 0 || err == nil {
			t.Errorf("the server keeps more than %d bytes", maxEarly)
		}
		_ = c.SetWriteDeadline(time.Time{})
		close(proceed)
		readExactly(t, c, answerSize)
		go func() { _, _ = c.Write([]byte{2}) }()
		if got := readExactly(t, far, maxEarly+1); got[maxEarly] != 2 {
			t.Errorf("behind the early data there is %d, want 2", got[maxEarly])
		}
		far.Close()
	})
}

// FREE-7: the destination has spoken before the dial is over, and comes second.
func TestAnswerComesFirst(t *testing.T) {
	near, far := connected(t, "tcp")
	mustWrite(t, far, []byte("hello"))
	_, open := startServer(t, "tcp", drainTimeout, func(context.Context, string, string) (net.Conn, error) { return near, nil })
	c := open()
	defer c.Close()
	mustWrite(t, c, header(t, "a.example:1"))
	if got := string(readExactly(t, c, answerSize+5)); got != "\x01\x00hello" {
		t.Errorf("got %q", got)
	}
	far.Close()
}

// FREE-14.
func TestCloseDrains(t *testing.T) {
	t.Run("finishes", func(t *testing.T) {
		near, far := connected(t, "tcp")
		s, open := startServer(t, "tcp", time.Hour, func(context.Context, string, string) (net.Conn, error) { return near, nil })
		c := open()
		defer c.Close()
		mustWrite(t, c, header(t, "a.example:1"))
		readExactly(t, c, answerSize)
		closed := make(chan error)
		go func() { closed <- s.Close() }()
		<-s.closing.Done()
		mustWrite(t, c, []byte("last"))
		closeWrite(t, c)
		if got := string(readExactly(t, far, 4)); got != "last" {
			t.Errorf("got %q", got)
		}
		mustEnd(t, far)
		mustWrite(t, far, []byte("word"))
		far.Close()
		if got := string(readExactly(t, c, 4)); got != "word" {
			t.Errorf("got %q", got)
		}
		mustEnd(t, c)
		if err := <-closed; err != nil {
			t.Error(err)
		}
		if err := s.Wait(); err != nil {
			t.Error("Wait after Close:", err)
		}
		if _, err := net.Dial("tcp", s.Addr().String()); err == nil {
			t.Error("it still accepts")
		}
	})
	t.Run("cuts", func(t *testing.T) {
		near, far := connected(t, "tcp")
		s, open := startServer(t, "tcp", time.Millisecond, func(context.Context, string, string) (net.Conn, error) { return near, nil })
		c := open()
		defer c.Close()
		mustWrite(t, c, header(t, "a.example:1"))
		readExactly(t, c, answerSize)
		if err := s.Close(); err != nil {
			t.Error(err)
		}
		for _, end := range []net.Conn{c, far} {
			if _, err := end.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
				t.Errorf("a stream that was cut ends with %v, want a reset", err)
			}
		}
	})
	t.Run("does not wait for what does not relay", func(t *testing.T) {
		dial, began, _ := blocked()
		s, open := startServer(t, "tcp", time.Hour, dial)
		silent, dialling := open(), open()
		defer silent.Close()
		defer dialling.Close()
		mustWrite(t, dialling, header(t, "a.example:1"))
		<-began
		if err := s.Close(); err != nil {
			t.Error(err)
		}
		for _, c := range []net.Conn{silent, dialling} {
			if _, err := c.Read(make([]byte, 1)); err == nil {
				t.Error("there was an answer")
			}
		}
	})
}

// A listener that is short of descriptors recovers; one that is broken ends the
// server, and Wait says why.
func TestAcceptFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newPipeListener()
		near, far := net.Pipe()
		s := serve(&listener{Listener: l}, func(context.Context, string, string) (net.Conn, error) { return near, nil }, ptipc.Env{}.Logger(), time.Hour)
		for range 3 {
			l.errs <- &net.OpError{Op: "accept", Err: syscall.EMFILE}
		}
		c := l.dial()
		mustWrite(t, c, header(t, "a.example:1"))
		readExactly(t, c, answerSize)
		c.Close()
		far.Close()
		broken := errors.New("the wire is gone")
		l.errs <- broken
		if err := s.Wait(); !errors.Is(err, broken) {
			t.Errorf("Wait: %v, want %v", err, broken)
		}
		if err := s.Close(); err != nil {
			t.Error("Close after the end:", err)
		}
	})
}

// FREE-13.
func TestGenerate(t *testing.T) {
	generate := Server(carrier).GenerateConfig
	client, server, err := generate(t.Context(), ptipc.Opaque(`{"egress":{"allow":[]},"carrier":{"port":4}}`), ptipc.Env{})
	if err != nil {
		t.Fatal(err)
	}
	if string(client) != `{"addr":"127.0.0.1:4"}` || string(server) != `{"egress":{"allow":[]},"carrier":{"addr":"127.0.0.1:4"}}` {
		t.Errorf("generated %s and %s", client, server)
	}
	_, server, err = generate(t.Context(), ptipc.Opaque(`{"carrier":{"port":4}}`), ptipc.Env{})
	if err != nil || string(server) != `{"carrier":{"addr":"127.0.0.1:4"}}` {
		t.Errorf("generated %s, %v", server, err)
	}
	_, _, err = Server(ptipc.ServerFactory{Listen: carrier.Listen}).GenerateConfig(t.Context(), nil, ptipc.Env{})
	if !errors.Is(err, ptipc.ExitUsage) {
		t.Errorf("a carrier that cannot generate: %v", err)
	}
}

// FREE-13, ERR-3: the place of an error is its place in the whole.
func TestConfigErrors(t *testing.T) {
	for text, pointer := range map[string]string{
		`{"carrier":{"addr":1}}`:                             "/carrier/addr",
		`{"carrier":{"port":true}}`:                          "/carrier/port",
		`{"carrier":[]}`:                                     "/carrier",
		`{"carrier":{},"egress":{"allow":["10.0.0.1/8:1"]}}`: "/egress/allow/0",
		`{"listen":"127.0.0.1:1"}`:                           "/listen",
	} {
		_, err := Server(carrier).Proxy(t.Context(), ptipc.Opaque(text), ptipc.Env{})
		if strings.Contains(text, "port") {
			_, _, err = Server(carrier).GenerateConfig(t.Context(), ptipc.Opaque(text), ptipc.Env{})
		}
		var config *ptipc.ConfigError
		if !errors.As(err, &config) || config.Pointer != pointer {
			t.Errorf("%s: %v, want an error at %s", text, err, pointer)
		}
	}
}

// A composition that makes no sense is refused, and nothing stays open.
func TestSenseless(t *testing.T) {
	_, err := Server(Server(carrier)).Proxy(t.Context(), nil, ptipc.Env{})
	if !errors.Is(err, ptipc.ExitConfig) {
		t.Errorf("free over free, the server: %v", err)
	}
	var inner *ptipc.Transport
	once := Client(openCarrier)
	_, err = Client(func(ctx context.Context, config ptipc.Opaque, env ptipc.Env) (*ptipc.Transport, error) {
		var err error
		inner, err = once(ctx, config, env)
		return inner, err
	})(t.Context(), ptipc.Opaque(`{"addr":"127.0.0.1:1"}`), ptipc.Env{})
	if !errors.Is(err, ptipc.ExitConfig) {
		t.Errorf("free over free, the client: %v", err)
	}
	if err := inner.Wait(); err != nil { // it has been closed
		t.Error(err)
	}
	if _, err := once(t.Context(), ptipc.Opaque(`{"port":1}`), ptipc.Env{}); !errors.As(err, new(*ptipc.ConfigError)) {
		t.Errorf("the carrier's own error: %v", err)
	}
}

// Settings are the carrier's.
func TestSettingsReachTheCarrier(t *testing.T) {
	eachAdapter(t, func(t *testing.T, adapter adapter) {
		transport, _ := chain(t, adapter, loopback)
		_, err := transport.Connections["plain"].Dial(t.Context(), ptipc.Opaque(`{"k":1}`), "127.0.0.1:1")
		if !errors.Is(err, ptipc.ErrSettingsRefused) {
			t.Errorf("%v, want class %v", err, ptipc.ErrSettingsRefused)
		}
	})
}

func TestServerConfigToJSONAndBack(t *testing.T) {
	for _, text := range []string{`{}`, `{"egress":{"allow":[]}}`, `{"egress":{"allow":["*:443"]},"carrier":{"k":1}}`} {
		var c ServerConfig
		if err := ptipc.Opaque(text).Decode(&c); err != nil {
			t.Error(err)
		}
		if b, err := json.Marshal(c); err != nil || string(b) != text {
			t.Errorf("%s became %s, %v", text, b, err)
		}
	}
}
