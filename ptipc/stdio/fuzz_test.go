package stdio_test

import (
	"bytes"
	"errors"
	"io"
	"reflect"
	"strings"
	"testing"
	"testing/iotest"

	"pthost/ptipc/stdio"
)

// seed adds the vectors of the given kinds.
func seed(f *testing.F, kinds string, add func(b []byte)) {
	f.Helper()
	for _, v := range loadVectors(f) {
		if strings.Contains(kinds, v.input) {
			add(v.bytes)
		}
	}
}

// FuzzParse: no line of either direction makes a parser fail badly, and what was
// read and can be written reads the same.
func FuzzParse(f *testing.F) {
	seed(f, "child host", func(b []byte) { f.Add(b) })
	f.Fuzz(func(t *testing.T, line []byte) {
		for _, parse := range []func([]byte) (stdio.Message, error){stdio.Parse, stdio.ParseHost} {
			m, err := parse(line)
			if err != nil {
				var parseErr *stdio.ParseError
				if m != nil || !errors.As(err, &parseErr) && !errors.Is(err, stdio.ErrTooLong) {
					t.Fatalf("message %#v with error %v", m, err)
				}
				continue
			}
			written, err := stdio.Append(nil, m)
			if err != nil {
				continue
			}
			again, err := parse(written)
			if err != nil {
				t.Fatalf("%#v was written as %q and does not read: %v", m, written, err)
			}
			// JSON inside a message is written without white space.
			switch m.(type) {
			case stdio.StatsReply, stdio.CMessage, stdio.SMessage:
				if written2, err := stdio.Append(nil, again); err != nil || !bytes.Equal(written, written2) {
					t.Fatalf("%q: written as %q, then as %q: %v", line, written, written2, err)
				}
				continue
			}
			if !reflect.DeepEqual(m, again) {
				t.Fatalf("%#v was written as %q and reads as %#v", m, written, again)
			}
		}
	})
}

// FuzzReader compares a Reader with the plainest way to split a stream. Bytes of
// value 0xFE in the input stand for 20,000 bytes each, to reach over-long lines.
func FuzzReader(f *testing.F) {
	seed(f, "stream", func(b []byte) {
		if len(b) < 1000 {
			f.Add(b)
		}
	})
	f.Add([]byte("a\n\xfe\xfe\xfe\xfe\xfe\nb\n\xfe\xfe\xfe\xfe"))
	f.Add([]byte("\xfe\xfe\xfe\nb\n\xfe\xfe\xfe\xfe\xfe\xfe\xfe\n\n\xfe"))
	f.Fuzz(func(t *testing.T, input []byte) {
		if bytes.Count(input, []byte{0xfe}) > 50 {
			t.Skip("larger inputs show nothing more")
		}
		stream := bytes.ReplaceAll(input, []byte{0xfe}, bytes.Repeat([]byte{'x'}, 20_000))
		var want []any
		rest := stream
		for {
			line, after, whole := bytes.Cut(rest, []byte("\n"))
			switch {
			case len(line) >= stdio.MaxLine:
				want = append(want, map[string]string{"error": "too-long"})
			case whole && len(line) > 100:
				want = append(want, len(line))
			case whole:
				want = append(want, string(line))
			}
			if !whole {
				end := "whole"
				if 0 < len(line) && len(line) < stdio.MaxLine {
					end = "cut off"
				}
				want = append(want, map[string]string{"end": end})
				break
			}
			rest = after
		}
		for _, r := range []io.Reader{
			bytes.NewReader(stream),
			iotest.HalfReader(bytes.NewReader(stream)),
			iotest.DataErrReader(bytes.NewReader(stream)),
		} {
			if got := readAll(t, r); !reflect.DeepEqual(got, want) {
				t.Fatalf("%q:\ngot  %v\nwant %v", input, got, want)
			}
		}
	})
}

// FuzzMask: no line makes Mask fail; masking again changes nothing; and whatever
// stands before and after, a secret under its name or in a URL does not come out.
func FuzzMask(f *testing.F) {
	seed(f, "child host launch mask", func(b []byte) {
		if len(b) > 1000 {
			return
		}
		f.Add(b, []byte{})
		f.Add(b[:len(b)/2], b[len(b)/2:])
	})
	f.Fuzz(func(t *testing.T, before, after []byte) {
		const secret = "zQ7secret"
		if bytes.Contains(before, []byte("zQ7")) || bytes.Contains(after, []byte("zQ7")) {
			t.Skip("the secret stands outside its place")
		}
		for _, hide := range []string{
			"", "password=" + secret, "password = " + secret, `password="` + secret + `"`, "a.key_2: '" + secret + "'", `"token":"` + secret + `"`,
			`\"token\" : \"` + secret + `\"`, "socks5://user:" + secret + "@192.0.2.1", `http:\/\/` + secret + `:@h`,
		} {
			line := []byte(string(before) + hide + string(after))
			once := stdio.Mask(line)
			if bytes.Contains(once, []byte("zQ7")) {
				t.Fatalf("%q shows as %q", line, once)
			}
			if twice := stdio.Mask(once); !bytes.Equal(once, twice) {
				t.Fatalf("%q is masked to %q and then to %q", line, once, twice)
			}
		}
		// A message is hidden whatever stands in it and however it is written.
		for _, keyword := range []string{"CMESSAGE", " smessage"} {
			line := []byte(keyword + string(before) + secret + string(after))
			if once := stdio.Mask(line); bytes.Contains(once, []byte("zQ7")) {
				t.Fatalf("%q shows as %q", line, once)
			}
		}
	})
}

// FuzzLaunch: no first line makes ReadLaunch fail badly, and what was read can be
// written and reads the same.
func FuzzLaunch(f *testing.F) {
	seed(f, "launch", func(b []byte) {
		if len(b) < 1000 {
			f.Add(b)
		}
	})
	seed(f, "host-object", func(b []byte) { f.Add([]byte(`{"config":{},"host":` + string(b) + `}`)) })
	f.Fuzz(func(t *testing.T, line []byte) {
		launch, err := stdio.NewReader(bytes.NewReader(append(line, '\n'))).ReadLaunch()
		if err != nil {
			wantDataErr(t, err)
			return
		}
		written, err := launch.Append(nil)
		if err != nil {
			t.Fatal(err)
		}
		again, err := stdio.NewReader(bytes.NewReader(written)).ReadLaunch()
		if err != nil {
			t.Fatalf("%q: %v", written, err)
		}
		if !reflect.DeepEqual(launch.Host, again.Host) {
			t.Fatalf("%#v was written as %q and reads as %#v", launch.Host, written, again.Host)
		}
		if rewritten, err := again.Append(nil); err != nil || !bytes.Equal(written, rewritten) {
			t.Fatalf("written as %q, then as %q: %v", written, rewritten, err)
		}
	})
}

// FuzzSignal: no text makes ParseSignal fail badly, an error does not repeat the
// body, and what was read can be written and reads the same, unless a character of
// the peer needs more bytes in the one spelling than in the other.
func FuzzSignal(f *testing.F) {
	seed(f, "child host", func(b []byte) {
		_, text, found := bytes.Cut(b, []byte("MESSAGE "))
		if found && len(text) < 1000 {
			f.Add(text)
		}
	})
	f.Fuzz(func(t *testing.T, text []byte) {
		m, err := stdio.ParseSignal(text)
		if err != nil {
			if m.Body != nil || m.Peer != "" || len(err.Error()) > 300 {
				t.Fatalf("%+v with error %v", m, err)
			}
			return
		}
		if len(text) > stdio.MaxSignal {
			t.Fatalf("a message of %d bytes was taken", len(text))
		}
		written, err := stdio.AppendSignal(nil, m)
		if err != nil {
			if 2*len(text) < stdio.MaxSignal {
				t.Fatalf("%q does not write: %v", text, err)
			}
			return
		}
		if bytes.ContainsAny(written, "\n\r\x00") {
			t.Fatalf("more than a line: %q", written)
		}
		again, err := stdio.ParseSignal(written)
		if err != nil {
			t.Fatal(err)
		}
		twice, err := stdio.AppendSignal(nil, again)
		if err != nil || again.Peer != m.Peer || !bytes.Equal(written, twice) {
			t.Fatalf("%q: written as %q, then as %q: %v", text, written, twice, err)
		}
	})
}

// FuzzGenerated: no line makes ParseGenerated fail badly, and what was read and can
// be written reads the same.
func FuzzGenerated(f *testing.F) {
	seed(f, "generated", func(b []byte) {
		if len(b) < 1000 {
			f.Add(b)
		}
	})
	f.Fuzz(func(t *testing.T, line []byte) {
		generated, err := stdio.ParseGenerated(line)
		if err != nil {
			if len(err.Error()) > 300 {
				t.Fatal(err)
			}
			return
		}
		written, err := generated.Append(nil)
		if err != nil {
			return
		}
		again, err := stdio.ParseGenerated(written)
		if err != nil {
			t.Fatal(err)
		}
		if twice, err := again.Append(nil); err != nil || !bytes.Equal(written, twice) {
			t.Fatalf("%q: written as %q, then as %q: %v", line, written, twice, err)
		}
	})
}
