package websocket

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/gorilla/websocket"
)

// newPipe makes a connection on one end of a pipe and returns the other end.
func newPipe(t testing.TB, client bool, ping time.Duration) (*conn, net.Conn) {
	near, far := net.Pipe()
	var g group
	w := g.add(near, nil)
	t.Cleanup(func() {
		far.Close()
		g.close()
	})
	return newConn(w, w, client, nil, near.RemoteAddr(), ping), far
}

var testKey = [4]byte{0x37, 0xfa, 0x21, 0x3d}

// frame is a masked frame with these first bits, as a client sends it.
func frame(first byte, payload string) string {
	b := appendFrame(nil, first&opBits, []byte(payload), &testKey)
	b[0] = first
	return string(b)
}

func closeFrame(code int) string {
	return frame(finBit|opClose, string(websocket.FormatCloseMessage(code, "")))
}

// readFrames collects what a server sends until the connection ends: the stream,
// and the code of its close frame, 0 if there was none.
func readFrames(c net.Conn) (stream string, code int) {
	var d decoder
	var data []byte
	buf := make([]byte, 4096)
	for {
		n, err := c.Read(buf)
		for src := buf[:n]; len(src) > 0; {
			dst := make([]byte, len(src))
			m, used, what, err := d.decode(dst, src)
			if err != nil {
				return string(data), -1
			}
			data = append(data, dst[:m]...)
			src = src[used:]
			if what == gotClose {
				code = websocket.CloseNoStatusReceived
				if len(d.control) >= 2 {
					code = int(binary.BigEndian.Uint16(d.control))
				}
			}
		}
		if err != nil {
			return string(data), code
		}
	}
}

// What a server makes of what a client sends (WS-5, WS-6, WS-7, WS-9, WS-12).
func TestFrames(t *testing.T) {
	const (
		binaryF = finBit | opBinary
		textF   = finBit | opText
		lastF   = finBit | opContinuation
	)
	end := frame(binaryF, "")
	long := strings.Repeat("0123456789abcdef", 5000)
	noCode := frame(finBit|opClose, "")
	for _, test := range []struct {
		name string
		wire string
		want string
		err  string // "": the end of the stream
		code int    // of the answer; 0: none
	}{
		{"binary", frame(binaryF, "hello") + closeFrame(1000), "hello", "", 1000},
		{"text", frame(textF, "grüße") + closeFrame(1001), "grüße", "", 1001},
		{"text that is not UTF-8", frame(textF, "\xff\xfe") + closeFrame(1000), "\xff\xfe", "", 1000},
		{"126 bytes", frame(binaryF, long[:126]) + closeFrame(1000), long[:126], "", 1000},
		{"64 KiB and more", frame(binaryF, long) + closeFrame(1000), long, "", 1000},
		{"fragments", frame(opBinary, "a") + frame(opContinuation, "b") + frame(lastF, "c") + closeFrame(1000), "abc", "", 1000},
		{"a ping between fragments", frame(opText, "a") + frame(finBit|opPing, "") + frame(lastF, "c") + closeFrame(1000), "ac", "", 1000},
		{"an empty text message", frame(textF, "") + frame(binaryF, "on") + closeFrame(1000), "on", "", 1000},
		{"empty fragments", frame(opBinary, "") + frame(opContinuation, "on") + frame(lastF, "") + closeFrame(1000), "on", "", 1000},
		{"the end", frame(binaryF, "x") + end + closeFrame(1000), "x", "", 1000},
		{"the end in fragments", frame(opBinary, "") + frame(lastF, "") + closeFrame(1000), "", "", 1000},
		{"close without a code", frame(binaryF, "x") + noCode, "x", "", 1005},
		{"the end, then a reset", frame(binaryF, "x") + end, "x", "", 0},

		{"close with another code", frame(binaryF, "x") + closeFrame(1011), "x", "1011", 1011},
		{"close with a code of an application", closeFrame(4000), "", "4000", 4000},
		{"close inside a message", frame(opBinary, "x") + closeFrame(1000), "x", "inside a message", 1000},
		{"no close", frame(binaryF, "x"), "x", "without a close frame", 0},
		{"a header without the rest", frame(binaryF, "x")[:3], "", "without a close frame", 0},
		{"a frame without the rest", frame(binaryF, "hello")[:8], "he", "without a close frame", 0},

		{"data after the end", end + frame(binaryF, "x"), "", "", 1002},
		{"a second end", end + end, "", "", 1002},
		{"reserved bit", frame(binaryF|0x40, "x"), "", "reserved bit", 1002},
		{"reserved opcode", frame(finBit|3, "x"), "", "opcode 3", 1002},
		{"reserved control opcode", frame(finBit|0xb, "x"), "", "opcode 11", 1002},
		{"no mask", string(appendFrame(nil, opBinary, []byte("x"), nil)), "", "not masked", 1002},
		{"a message in a message", frame(opBinary, "x") + frame(binaryF, "y"), "x", "inside another", 1002},
		{"a continuation of nothing", frame(lastF, "x"), "", "continues nothing", 1002},
		{"a fragmented ping", frame(opPing, "x"), "", "fragmented", 1002},
		{"a long ping", frame(finBit|opPing, long[:126]), "", "longer than 125", 1002},
		{"a length of 64 bits", "\x82\xff\xff\xff\xff\xff\xff\xff\xff\xff" + string(testKey[:]), "", "63 bits", 1002},
		{"half a close code", frame(finBit|opClose, "\x03"), "", "half a code", 1002},
		{"close code 1005", closeFrame(1006), "", "code 1006", 1002},
		{"close code 999", closeFrame(999), "", "code 999", 1002},
		{"close text", frame(finBit|opClose, "\x03\xe8\xff"), "", "not UTF-8", 1002},
	} {
		for piece, size := range map[string]int{"whole": 1 << 20, "byte by byte": 1, "by 7": 7} {
			for _, room := range []int{1, 1 << 10} {
				t.Run(fmt.Sprintf("%s/%s/room %d", test.name, piece, room), func(t *testing.T) {
					c, far := newPipe(t, false, 0)
					type answer struct {
						stream string
						code   int
					}
					answered := make(chan answer, 1)
					go func() {
						stream, code := readFrames(far)
						answered <- answer{stream, code}
					}()
					go func() {
						for rest := test.wire; rest != ""; {
							n := min(size, len(rest))
							if _, err := io.WriteString(far, rest[:n]); err != nil {
								return // the server has seen enough
							}
							rest = rest[n:]
						}
						if test.code == 0 {
							far.Close()
						}
					}()
					got, err := readAll(c, room)
					if got != test.want {
						t.Errorf("read %d bytes %.20q, want %d", len(got), got, len(test.want))
					}
					switch {
					case test.err == "" && !errors.Is(err, io.EOF):
						t.Errorf("the stream ends with %v, want the end of the stream", err)
					case test.err != "" && (errors.Is(err, io.EOF) || !strings.Contains(err.Error(), test.err)):
						t.Errorf("the stream ends with %v, want %s", err, test.err)
					}
					if a := <-answered; a.code != test.code {
						t.Errorf("answered with code %d, want %d", a.code, test.code)
					}
					if _, err := c.Write([]byte("x")); err == nil {
						t.Error("a Write after the end of the WebSocket has no error")
					}
				})
			}
		}
	}
}

// readAll is io.ReadAll with room for that many bytes at a time, and with the end.
func readAll(c io.Reader, room int) (string, error) {
	var all []byte
	buf := make([]byte, room)
	for {
		n, err := c.Read(buf)
		all = append(all, buf[:n]...)
		if err != nil {
			return string(all), err
		}
	}
}

// A length alone takes no memory, and what has come of a message is there to be
// read (WS-5).
func TestHugeMessage(t *testing.T) {
	c, far := newPipe(t, false, 0)
	header := append([]byte{finBit | opBinary, maskBit | 127}, 0x7f, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff)
	header = append(header, 0, 0, 0, 0)
	go far.Write(append(header, "first"...))
	buf := make([]byte, 1024)
	if n, err := c.Read(buf); string(buf[:n]) != "first" {
		t.Errorf("read %q, %v", buf[:n], err)
	}
}

func TestMask(t *testing.T) {
	for _, size := range []int{0, 1, 3, 4, 5, 15, 255, 256, 257, 1000} {
		for pos := range 4 {
			src := bytes.Repeat([]byte{0xa5}, size)
			got := make([]byte, size)
			mask(got, src, testKey, pos)
			for i := range got {
				if want := src[i] ^ testKey[(pos+i)&3]; got[i] != want {
					t.Fatalf("size %d, position %d: byte %d is %#x, want %#x", size, pos, i, got[i], want)
				}
			}
		}
	}
}

// Whatever bytes come, a server makes of them what gorilla does, where both take
// them.
func FuzzDecoder(f *testing.F) {
	f.Add([]byte(frame(finBit|opBinary, "hello")), 3)
	f.Add([]byte(frame(opText, "a")+frame(finBit|opPing, "p")+frame(finBit, "b")+closeFrame(1000)), 1)
	f.Add([]byte(frame(finBit|opBinary, strings.Repeat("x", 300))+frame(finBit|opBinary, "")), 100)
	f.Add([]byte(frame(finBit|opBinary, "")+frame(finBit|opBinary, "late")), 7)
	f.Add([]byte("\x82\xff\xff\xff\xff\xff\xff\xff\xff\xff1234"), 2)
	f.Fuzz(func(t *testing.T, wire []byte, size int) {
		size = max(1, min(size, 1024))
		mine, mineErr := decodeAll(wire, size)
		theirs, theirsErr := gorillaAll(wire)
		if !bytes.HasPrefix(theirs, mine) {
			t.Fatalf("decoded %q, gorilla %q", mine, theirs)
		}
		// Gorilla knows no end of the stream, and looks at half a header.
		if mineErr == nil != (theirsErr == nil) && !errors.Is(mineErr, errAfterEnd) && !errors.Is(mineErr, errHalfHeader) {
			t.Fatalf("ended with %v, gorilla with %v", mineErr, theirsErr)
		}
		if mineErr == nil && !bytes.Equal(mine, theirs) {
			t.Fatalf("decoded %q, gorilla %q", mine, theirs)
		}
	})
}

var (
	errAfterEnd   = errors.New("something came after the end of the stream")
	errHalfHeader = errors.New("a header is not whole")
)

// decodeAll decodes in pieces of that size, in place as Read does. The error is
// nil if the bytes broke no rule.
func decodeAll(wire []byte, size int) ([]byte, error) {
	d := decoder{masked: true}
	var all []byte
	for len(wire) > 0 {
		piece := bytes.Clone(wire[:min(size, len(wire))])
		wire = wire[len(piece):]
		for n, used := 0, 0; used < len(piece); {
			m, took, what, err := d.decode(piece[n:], piece[used:])
			all = append(all, piece[n:n+m]...)
			n += m
			used += took
			switch {
			case err != nil && d.ended:
				return all, errAfterEnd
			case err != nil:
				return all, err
			case what == gotClose && len(d.control) == 1:
				return all, nil // gorilla lets it pass
			case what == gotClose:
				closed, err := closing(d.control)
				if err == nil && closed.Code == 1014 {
					err = errors.New("gorilla does not know this one")
				}
				return all, err
			}
		}
	}
	if d.have > 0 {
		return all, errHalfHeader
	}
	return all, nil
}

// gorillaAll reads the same with gorilla.
func gorillaAll(wire []byte) ([]byte, error) {
	c, err := gorillaServer(&replay{Reader: bytes.NewReader(wire)})
	if err != nil {
		return nil, err
	}
	var all []byte
	for {
		_, r, err := c.NextReader()
		if err == nil {
			var b []byte
			b, err = io.ReadAll(r)
			all = append(all, b...)
		}
		var closed *websocket.CloseError
		switch {
		case err == nil:
		case errors.As(err, &closed), errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
			return all, nil // a close frame, or the bytes are used up
		default:
			return all, err
		}
	}
}
