package socks

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"strconv"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"pthost/ptipc"
)

// A script is a conn whose peer has sent everything already, and ends then.
type script struct {
	in    []byte
	piece int // bytes that one Read gets
	out   bytes.Buffer
}

func (s *script) Read(p []byte) (int, error) {
	if len(s.in) == 0 {
		return 0, io.EOF
	}
	n := copy(p[:min(len(p), s.piece)], s.in)
	s.in = s.in[n:]
	return n, nil
}

func (s *script) Write(p []byte) (int, error)      { return s.out.Write(p) }
func (s *script) Close() error                     { return nil }
func (s *script) CloseWrite() error                { return nil }
func (s *script) LocalAddr() net.Addr              { return &net.UnixAddr{Name: "script", Net: "pipe"} }
func (s *script) RemoteAddr() net.Addr             { return s.LocalAddr() }
func (s *script) SetDeadline(time.Time) error      { return nil }
func (s *script) SetReadDeadline(time.Time) error  { return nil }
func (s *script) SetWriteDeadline(time.Time) error { return nil }

// outcome is what a server made of a client's bytes.
type outcome struct {
	answer, wire string
	dialed       bool
	dest         string
	settings     string
}

func serveScript(in []byte, piece int, bound, plain bool) outcome {
	return serveScriptBy(&Server{Bound: bound, Plain: plain}, in, piece)
}

func serveScriptBy(s *Server, in []byte, piece int) outcome {
	var o outcome
	client := &script{in: in, piece: piece}
	wire := &script{piece: 1}
	s.Dial = func(_ context.Context, r *Request) (net.Conn, error) {
		o.dialed, o.dest, o.settings = true, r.Dest, string(r.Settings)
		return wire, nil
	}
	s.init()
	session := &session{conn: client}
	s.slots <- struct{}{}
	s.add(session)
	s.serve(session)
	o.answer, o.wire = client.out.String(), wire.out.String()
	return o
}

// FuzzLogin: every input is answered or dropped, the same in one segment as byte by
// byte, and nothing is dialled before the login was taken (PT1-22).
func FuzzLogin(f *testing.F) {
	for _, v := range readVectors(f) {
		if v.server == "login" {
			f.Add(append(v.sent(), "early"...))
		}
	}
	f.Fuzz(func(t *testing.T, in []byte) {
		whole := serveScriptBy(&Server{Login: login}, in, len(in)+1)
		if single := serveScriptBy(&Server{Login: login}, in, 1); single != whole {
			t.Fatalf("in one segment %+v, byte by byte %+v", whole, single)
		}
		reply := whole.answer
		switch {
		case strings.HasPrefix(reply, "\x05\x02\x01\x00"):
			reply = reply[4:]
		case strings.HasPrefix(reply, "\x05\x00"):
			reply = reply[2:]
		case reply == "", reply == "\x05\xff", reply == "\x05\x02\x01\x01":
			if whole.dialed {
				t.Fatalf("dialled after % x", reply)
			}
			return
		default:
			t.Fatalf("the answer is % x", reply)
		}
		if len(reply) != 10 || reply[1] > 8 || (reply[1] == 0) != whole.dialed {
			t.Fatalf("dialled: %v, the reply is % x", whole.dialed, reply)
		}
	})
}

// FuzzServer: every input is answered or dropped, the same in one segment as
// byte by byte (SOCKS-5), nothing is dialled that must not be, and what stands
// behind the request reaches the wire whole.
func FuzzServer(f *testing.F) {
	for _, v := range readVectors(f) {
		if v.server != "" && len(v.sent()) < 1000 {
			f.Add(append(v.sent(), "early"...), v.server == "bound", v.server == "plain")
		}
	}
	f.Fuzz(func(t *testing.T, in []byte, bound, plain bool) {
		whole := serveScript(in, len(in)+1, bound, plain)
		if single := serveScript(in, 1, bound, plain); single != whole {
			t.Fatalf("in one segment %+v, byte by byte %+v", whole, single)
		}
		answer := []byte(whole.answer)
		switch {
		case len(answer) == 0 || string(answer) == "\x05\xff":
			if whole.dialed {
				t.Fatal("dialled without an answer")
			}
		case len(answer) != 12 || answer[0] != 5 || answer[2] != 5 || string(answer[4:]) != "\x00\x01\x00\x00\x00\x00\x00\x00": // SOCKS-8
			t.Fatalf("the answer is % x", answer)
		case (answer[3] == 0) != whole.dialed:
			t.Fatalf("dialled: %v, the reply is %d", whole.dialed, answer[3])
		case plain && (answer[1] != 0 || answer[3] > 8):
			t.Fatalf("an ordinary server answered % x", answer)
		}
		if !bytes.HasSuffix(in, []byte(whole.wire)) {
			t.Fatalf("the wire got %q", whole.wire)
		}
		if !whole.dialed {
			return
		}
		if (whole.dest == "") != bound {
			t.Fatalf("destination %q, bound: %v", whole.dest, bound)
		}
		if !bound {
			host, port, err := net.SplitHostPort(whole.dest)
			if n, perr := strconv.ParseUint(port, 10, 16); err != nil || perr != nil || n == 0 || host == "" {
				t.Fatalf("destination %q", whole.dest)
			}
		}
		if s := whole.settings; s != "" {
			var object map[string]json.RawMessage
			if err := json.Unmarshal([]byte(s), &object); err != nil || len(object) == 0 || !utf8.ValidString(s) || plain {
				t.Fatalf("settings %q: %v", s, err)
			}
		}
	})
}

// FuzzClient: whatever a server sends, a client takes no more than the reply, and
// fails with a known class.
func FuzzClient(f *testing.F) {
	for _, v := range readVectors(f) {
		if v.client != "" {
			f.Add(append(v.receives, "next"...), []byte(v.settings), v.client)
		}
	}
	f.Fuzz(func(t *testing.T, in, settings []byte, dest string) {
		var lefts [2]int
		for i, piece := range []int{1, len(in) + 1} {
			conn := &script{in: in, piece: piece}
			err := Connect(t.Context(), conn, settings, dest)
			lefts[i] = len(conn.in)
			if err != nil {
				if class := ptipc.ClassOf(err); !class.Known() || !errors.Is(err, class) {
					t.Fatalf("%v has no class", err)
				}
				continue
			}
			taken := in[:len(in)-len(conn.in)]
			want := map[byte]int{addressIPv4: 12, addressIPv6: 24}[taken[5]]
			if taken[5] == addressName {
				want = 2 + 4 + 1 + int(taken[6]) + 2
			}
			if len(taken) != want {
				t.Fatalf("took % x, %d bytes, want %d", taken, len(taken), want)
			}
			// A server of ours understands it, and gets the same.
			o := serveScript(conn.out.Bytes(), 1<<20, dest == "", false)
			if !o.dialed || len(o.wire) > 0 {
				t.Fatalf("the server made %+v of % x", o, conn.out.Bytes())
			}
		}
	})
}

// FuzzScanner holds the scanner against the decoder of encoding/json (SOCKS-4).
func FuzzScanner(f *testing.F) {
	for _, v := range readVectors(f) {
		if b := v.sent(); v.server != "" && len(b) > 3 && len(b) < 1000 && b[2] == methodSettings {
			f.Add(b[3:], 1)
		}
	}
	f.Fuzz(func(t *testing.T, in []byte, cut int) {
		var s scanner
		cut = min(max(cut, 0), len(in))
		end, err := s.feed(in[:cut])
		if err == nil && !s.done {
			var n int
			n, err = s.feed(in[cut:])
			end += n
		}
		decoder := json.NewDecoder(bytes.NewReader(in))
		var value json.RawMessage
		derr := decoder.Decode(&value)
		switch {
		case errors.Is(err, ptipc.ErrSettingsTooLarge):
			if bytes.Count(in, []byte("{"))+bytes.Count(in, []byte("[")) <= maxDepth {
				t.Fatalf("too deep: %q", in)
			}
		case derr == nil && value[0] == '{':
			if err != nil || !s.done || int64(end) != decoder.InputOffset() {
				t.Fatalf("the object in %q ends at %d, %v, %v; want %d", in, end, s.done, err, decoder.InputOffset())
			}
		case err == nil && s.done:
			if json.Valid(in[:end]) {
				t.Fatalf("%q is an object that the decoder did not find: %v", in[:end], derr)
			}
		}
	})
}
