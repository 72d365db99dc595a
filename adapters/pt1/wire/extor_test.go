package wire_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"pthost/adapters/pt1/wire"
)

var cookie = wire.Cookie{1, 2, 3}

// authenticated is the transport's end of an Extended ORPort: it has the cookie, and
// behind its proof come commands.
type authenticated struct {
	commands  *bytes.Reader
	written   []byte // all that the ORPort's end wrote
	toRead    []byte
	answered  bool
	hasProved bool
}

func (a *authenticated) Write(p []byte) (int, error) {
	a.written = append(a.written, p...)
	nonce := make([]byte, 32)
	switch {
	case !a.answered: // the types
		a.answered = true
		a.toRead = append([]byte{1}, nonce...)
	case !a.hasProved: // the ORPort's proof and nonce
		a.hasProved = true
		a.toRead = wire.ClientHash(cookie, nonce, p[32:])
	}
	return len(p), nil
}

func (a *authenticated) Read(p []byte) (int, error) {
	if len(a.toRead) > 0 {
		n := copy(p, a.toRead)
		a.toRead = a.toRead[n:]
		return n, nil
	}
	return a.commands.Read(p)
}

// Both ends of this package understand each other, and the stream behind the answer
// is the client's (PT1-10, PT1-11).
func TestExtended(t *testing.T) {
	near, far := net.Pipe()
	defer near.Close()
	type result struct {
		client wire.Client
		err    error
	}
	accepted := make(chan result, 1)
	go func() {
		client, err := wire.AcceptExtended(far, cookie, decide)
		if err == nil {
			_, err = far.Write([]byte("hello"))
		}
		accepted <- result{client, errors.Join(err, far.Close())}
	}()
	want := wire.Client{Addr: "192.0.2.7:41000", Transport: "websocket"}
	if err := wire.ConnectExtended(near, cookie, want); err != nil {
		t.Fatal(err)
	}
	stream, err := io.ReadAll(near)
	if err != nil || string(stream) != "hello" {
		t.Errorf("the stream is %q, error %v", stream, err)
	}
	if got := <-accepted; got.err != nil || got.client != want {
		t.Errorf("got %+v, want %+v", got, want)
	}
}

// Neither end goes on with one that does not have the cookie, and a refusal is told (PT1-10).
func TestExtendedRefusals(t *testing.T) {
	for name, tt := range map[string]struct {
		server, client wire.Cookie
		send           wire.Client
		accept, dial   error
	}{
		"another cookie": {server: cookie, client: wire.Cookie{9}, accept: io.ErrUnexpectedEOF, dial: wire.ErrForged},
		"denied":         {server: cookie, client: cookie, send: wire.Client{Transport: "deny"}, accept: errDenied, dial: wire.ErrDenied},
	} {
		t.Run(name, func(t *testing.T) {
			near, far := net.Pipe()
			accepted := make(chan error, 1)
			go func() {
				_, err := wire.AcceptExtended(far, tt.server, decide)
				far.Close()
				accepted <- err
			}()
			err := wire.ConnectExtended(near, tt.client, tt.send)
			near.Close()
			if !errors.Is(err, tt.dial) {
				t.Errorf("the transport's end: %v, want %v", err, tt.dial)
			}
			if err := <-accepted; !errors.Is(err, tt.accept) {
				t.Errorf("the ORPort's end: %v, want %v", err, tt.accept)
			}
		})
	}
}

// A transport that guesses is refused before it can say anything (PT1-10).
func TestExtendedGuess(t *testing.T) {
	var written bytes.Buffer
	script := append([]byte{1}, make([]byte, 64)...) // nonce and proof are zeros
	conn := struct {
		io.Reader
		io.Writer
	}{io.MultiReader(bytes.NewReader(script), strings.NewReader("\x00\x00\x00\x00")), &written}
	_, err := wire.AcceptExtended(conn, cookie, func(wire.Client) error { t.Error("it was let in"); return nil })
	if !errors.Is(err, wire.ErrForged) {
		t.Errorf("got %v", err)
	}
	if b := written.Bytes(); b[len(b)-1] != 0 {
		t.Errorf("the answer is %x", b[len(b)-1])
	}
}

// What an ORPort says may be anything: nothing of it makes the other end hang on or
// panic (PT1-10).
func TestConnectExtendedGarbage(t *testing.T) {
	for name, input := range map[string]string{
		"nothing": "", "no types": "\x00", "other types": "\x02\x03\x00", "types without end": strings.Repeat("\x01", 300),
		"half a proof": "\x01\x00abc",
	} {
		t.Run(name, func(t *testing.T) {
			conn := struct {
				io.Reader
				io.Writer
			}{strings.NewReader(input), io.Discard}
			if err := wire.ConnectExtended(conn, cookie, wire.Client{}); err == nil {
				t.Error("it was taken")
			}
		})
	}
}

// The file is its owner's alone, also in place of another one (PT1-10), and errors and
// logs do not show the secret.
func TestWriteCookie(t *testing.T) {
	path := filepath.Join(t.TempDir(), "cookie")
	target := filepath.Join(t.TempDir(), "elsewhere")
	if err := os.Symlink(target, path); err != nil {
		t.Fatal(err)
	}
	made, err := wire.WriteCookie(path, -1, -1)
	if err != nil {
		t.Fatal(err)
	}
	info, err := os.Lstat(path)
	if err != nil || info.Mode() != 0o600 {
		t.Errorf("mode %v, error %v", info.Mode(), err)
	}
	if _, err := os.Stat(target); err == nil {
		t.Error("a link was followed")
	}
	read, err := wire.ReadCookie(path)
	if err != nil || read != made {
		t.Errorf("read back: error %v", err)
	}
	if again, err := wire.WriteCookie(path, -1, -1); err != nil || again == made {
		t.Errorf("a second one is the same, error %v", err)
	}
	for _, verb := range []string{"%v", "%s", "%#v", "%+v"} {
		if text := fmt.Sprintf(verb, made); text != "***" {
			t.Errorf("%s shows %q", verb, text)
		}
	}
	if err := os.WriteFile(path, []byte("hunter2"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := wire.ReadCookie(path); err == nil || strings.Contains(err.Error(), "hunter2") {
		t.Errorf("a file that is none: %v", err)
	}
	if _, err := wire.ReadCookie(path + "-not"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no file: %v", err)
	}
}

func FuzzAcceptExtended(f *testing.F) {
	for _, v := range loadVectors(f) {
		if v.input == "extended" {
			f.Add(v.bytes)
		}
	}
	f.Fuzz(func(t *testing.T, commands []byte) {
		conn := &authenticated{commands: bytes.NewReader(commands)}
		client, err := wire.AcceptExtended(conn, cookie, decide)
		if err != nil {
			return
		}
		// Everything up to the first DONE has been read, with its body, and nothing else.
		rest := commands
		for done := false; !done; {
			done = rest[0] == 0 && rest[1] == 0
			rest = rest[4+int(rest[2])<<8+int(rest[3]):]
		}
		if conn.commands.Len() != len(rest) {
			t.Errorf("%+v: %d bytes are left, want %d", client, conn.commands.Len(), len(rest))
		}
	})
}
