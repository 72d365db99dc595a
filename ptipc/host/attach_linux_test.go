package host

import (
	"bufio"
	"context"
	"errors"
	"io"
	"net"
	"strings"
	"testing"

	"pthost/ptipc"
	author "pthost/ptipc/child"
)

// running is a child that somebody else has started, here in this process.
func running(t *testing.T, dir, host string) map[string]string {
	t.Helper()
	stdin, in := io.Pipe()
	out, stdout := io.Pipe()
	code := make(chan int, 1)
	go func() {
		code <- author.Run(context.WithoutCancel(t.Context()), []string{"{}", host}, dir, stdin, stdout, io.Discard, author.Transport{Client: openFixture})
		stdout.Close()
	}()
	addrs := map[string]string{}
	lines := bufio.NewScanner(out)
	for lines.Scan() && lines.Text() != "CMETHODS DONE" {
		if words := strings.Fields(lines.Text()); words[0] == "CMETHOD" {
			addrs[words[1]] = words[3]
		}
	}
	go io.Copy(io.Discard, out) //nolint:errcheck // until the child ends
	t.Cleanup(func() {
		in.Close()
		if got := <-code; got != 0 {
			t.Error("the child's exit code:", got)
		}
	})
	return addrs
}

func TestAttachment(t *testing.T) {
	echo := server(t)
	for _, listen := range []string{"tcp", "unix"} {
		t.Run(listen, func(t *testing.T) {
			dir := stateDir(t)
			addrs := running(t, dir, `{"version":[1],"listen":"`+listen+`"}`)
			a := &Attachment{Addrs: addrs, Bound: map[string]bool{"bound": true}}
			transport, err := a.Open(t.Context(), nil, ptipc.Env{Local: dir})
			if err != nil {
				t.Fatal(err)
			}
			free := transport.Connections["free"]
			talk(t, dial(t, free, "", echo), "attached")
			_, err = free.Dial(within(t), ptipc.Opaque(`{"class":4}`), echo)
			onlyClass(t, err, ptipc.ErrHostUnreachable) // ERR-2
			_, err = transport.Connections["bound"].Dial(within(t), nil, echo)
			onlyClass(t, err, ptipc.ErrNotAllowed) // SOCKS-11
			stats, err := transport.Stats(t.Context())
			if err != nil || stats.Opened != 1 || stats.Failed != 2 {
				t.Error(stats, err)
			}
			ended, cancel := context.WithCancel(t.Context())
			cancel()
			if _, err := free.Dial(ended, nil, echo); !errors.Is(err, context.Canceled) {
				t.Error(err)
			}
			if err := errors.Join(transport.Close(), transport.Close(), transport.Wait()); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestAttachmentRefusals(t *testing.T) {
	tests := []struct {
		name   string
		a      Attachment
		config string
		env    ptipc.Env
		want   string
	}{
		{"nothing", Attachment{}, "", ptipc.Env{}, "no address"},
		{"configuration", Attachment{Addrs: map[string]string{"x": "127.0.0.1:1"}}, `{"a":1}`, ptipc.Env{}, "leave the configuration out"},
		{"way out", Attachment{Addrs: map[string]string{"x": "127.0.0.1:1"}}, "", ptipc.Env{DialOut: (&net.Dialer{}).DialContext}, "way out"},
		{"public (LINE-5)", Attachment{Addrs: map[string]string{"x": "192.0.2.1:1"}}, "", ptipc.Env{}, "not on the loopback"},
		{"no directory", Attachment{Addrs: map[string]string{"x": "unix:a.sock"}}, "", ptipc.Env{}, "Env.Local"},
		{"open directory (LIFE-8)", Attachment{Addrs: map[string]string{"x": "unix:a.sock"}}, "", ptipc.Env{Local: "/"}, "/"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			_, err := tt.a.Open(t.Context(), ptipc.Opaque(tt.config), tt.env)
			if err == nil {
				t.Fatal("it opened")
			}
			wants(t, err, tt.want)
		})
	}
	t.Run("nobody there", func(t *testing.T) {
		a := &Attachment{Addrs: map[string]string{"x": unused(t)}}
		transport, err := a.Open(t.Context(), nil, ptipc.Env{})
		if err != nil {
			t.Fatal(err)
		}
		defer transport.Close()
		_, err = transport.Connections["x"].Dial(t.Context(), nil, "example.com:80")
		onlyClass(t, err, ptipc.ErrGeneral) // it says nothing about example.com
	})
}
