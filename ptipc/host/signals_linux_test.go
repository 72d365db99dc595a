package host

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"pthost/ptipc"
	author "pthost/ptipc/child"
	"pthost/ptipc/internal/tally"
	"pthost/ptipc/relay"
)

func init() {
	roles["invited"] = func(args []string) int {
		author.MainArgs(args, author.Transport{
			Client: openInvited,
			Server: &ptipc.ServerFactory{Name: "invited", Listen: listenInvited},
		})
		return 0
	}
}

// openInvited is a transport that needs a signal to come up: it asks its server for
// a word, and dials only when it has it.
func openInvited(ctx context.Context, _ ptipc.Opaque, env ptipc.Env) (*ptipc.Transport, error) {
	if err := env.Signals.Send(ctx, ptipc.Message{Body: ptipc.Opaque(`{"want":"word"}`)}); err != nil {
		return nil, err
	}
	invited := make(chan string, 1)
	go func() {
		m, err := env.Signals.Receive(context.Background())
		var answer struct {
			Word string `json:"word"`
		}
		if err == nil && m.Body.Decode(&answer) == nil {
			invited <- answer.Word
		}
	}()
	var meter relay.Meter
	return meter.Transport(map[string]ptipc.ConnectionFactory{
		"invited": meter.Factory(false, func(ctx context.Context, _ ptipc.Opaque, dest string) (net.Conn, error) {
			select {
			case word := <-invited:
				invited <- word
				conn, err := env.Dial(ctx, "tcp", dest)
				if err != nil {
					return nil, err
				}
				_, err = conn.Write([]byte(word))
				return conn, err
			case <-ctx.Done():
				return nil, ctx.Err()
			}
		}),
	}, nil), nil
}

// listenInvited answers clients that ask, by the path on which they asked.
func listenInvited(ctx context.Context, _ ptipc.Opaque, env ptipc.Env) (ptipc.Listener, error) {
	go func() {
		for {
			m, err := env.Signals.Receive(context.Background())
			if err != nil {
				return
			}
			_ = env.Signals.Send(ctx, ptipc.Message{Peer: m.Peer, Body: ptipc.Opaque(`{"word":"hello"}`)})
		}
	}()
	return listenWire(ctx, ptipc.Opaque(`{"listen":"127.0.0.1:0"}`), env)
}

// post is a courier between two hosts in one process.
type post struct{ out, in chan ptipc.Message }

func (p *post) Send(ctx context.Context, m ptipc.Message) error {
	select {
	case p.out <- m:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (p *post) Receive(ctx context.Context) (ptipc.Message, error) {
	select {
	case m := <-p.in:
		return m, nil
	case <-ctx.Done():
		return ptipc.Message{}, ctx.Err()
	}
}

// A client's message reaches the server with its return path, and the answer comes
// back on it; a transport that waits for it is ready all the same (SIG-1, SIG-2,
// SIG-3).
func TestSignals(t *testing.T) {
	client := &post{out: make(chan ptipc.Message, 1), in: make(chan ptipc.Message, 1)}
	other := &post{out: make(chan ptipc.Message, 1), in: make(chan ptipc.Message, 1)}
	listenOn(t, self("invited"), `{}`, ptipc.Env{Signals: other})
	transport := open(t, self("invited"), `{}`, ptipc.Env{Signals: client})
	echo := server(t)

	// Nobody has carried anything yet: the transport is there, and its dial waits.
	impatient, cancel := context.WithCancel(within(t))
	asked := <-client.out
	cancel()
	if _, err := transport.Connections["invited"].Dial(impatient, nil, echo); !errors.Is(err, context.Canceled) {
		t.Fatalf("before the signal: %v", err)
	}
	if asked.Peer != "" || string(asked.Body) != `{"want":"word"}` {
		t.Fatalf("the client sent %+v", asked)
	}
	asked.Peer = "mail:alice"
	other.in <- asked
	answer := <-other.out
	if answer.Peer != "mail:alice" {
		t.Fatalf("the server answers %+v", answer)
	}
	answer.Peer = ""
	client.in <- answer
	conn := dial(t, transport.Connections["invited"], "", echo)
	got := make([]byte, 5)
	if _, err := conn.Read(got); err != nil || string(got) != "hello" {
		t.Fatalf("%q %v", got, err)
	}
	talk(t, conn, "word")
}

// The log says once in a while how many signals of a flood were dropped, and the child's
// own lines have their place in it all the same.
func TestDroppedSignalsAreLogged(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log strings.Builder
		logger := slog.New(slog.NewTextHandler(&log, nil))
		c := &child{log: logger, signals: make(chan ptipc.Message, maxSignals), dropped: tally.New(logger, "dropped"), role: roleClient, session: &Session{own: true}}
		for range maxSignals + 1000 {
			c.line([]byte(`CMESSAGE {"body":{}}`), false)
		}
		c.line([]byte(`LOG SEVERITY=notice MESSAGE="still heard"`), false)
		time.Sleep(tally.Interval)
		synctest.Wait()
		c.dropped.Close()
		if got := log.String(); strings.Count(got, "\n") != 3 || !strings.Contains(got, "msg=dropped count=1\n") ||
			!strings.Contains(got, "msg=dropped count=999\n") || !strings.Contains(got, "still heard") {
			t.Errorf("the log has\n%s", got)
		}
	})
}

// A child that floods signals, when nobody carries them or somebody is slow, is not
// held up (SIG-3, SIG-4).
func TestSignalsAreBounded(t *testing.T) {
	lines := []string{"VERSION 1", "CMETHOD x socks5 {tcp}"}
	for range 500 {
		lines = append(lines, `CMESSAGE {"body":{"n":1}}`)
	}
	lines = append(lines, "CMETHODS DONE")
	for name, env := range map[string]ptipc.Env{
		"nobody": {},
		"slow":   {Signals: &post{out: make(chan ptipc.Message), in: make(chan ptipc.Message)}},
	} {
		t.Run(name, func(t *testing.T) { open(t, self("say", lines...), `{}`, env) })
	}
}
