package free

import (
	"bytes"
	"errors"
	"testing"

	"pthost/ptipc"
)

// FuzzHeader reads any bytes, in one piece and byte by byte (FREE-1, FREE-9).
func FuzzHeader(f *testing.F) {
	for _, v := range readVectors(f, "server") {
		f.Add(v.sent())
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		r := bytes.NewReader(b)
		dest, err := readHeader(r)
		if err != nil {
			if dest != "" {
				t.Errorf("%v, and the destination %q", err, dest)
			}
			if !errors.Is(err, errSilent) && !ptipc.ClassOf(err).Known() {
				t.Errorf("%v cannot be answered", err)
			}
			return
		}
		if read, length := len(b)-r.Len(), int(b[1])<<8|int(b[2]); read != prefixSize+length {
			t.Errorf("read %d bytes, want %d", read, prefixSize+length)
		}
		again, err := appendHeader(nil, dest)
		if err != nil {
			t.Fatalf("%q came out, and cannot be sent: %v", dest, err)
		}
		if back, err := readHeader(bytes.NewReader(again)); err != nil || back != dest {
			t.Errorf("%q came out, and became %q, %v", dest, back, err)
		}
	})
}

// FuzzDest sends any destination, which is refused or arrives.
func FuzzDest(f *testing.F) {
	for _, v := range readVectors(f, "client") {
		f.Add(v.client)
	}
	f.Fuzz(func(t *testing.T, dest string) {
		b, err := appendHeader([]byte("before"), dest)
		if err != nil {
			if !errors.Is(err, ptipc.ErrNotAllowed) {
				t.Errorf("%q: %v", dest, err)
			}
			return
		}
		back, err := readHeader(bytes.NewReader(b[len("before"):]))
		if err != nil {
			t.Fatalf("%q was sent as % x: %v", dest, b, err)
		}
		if again, err := appendHeader([]byte("before"), back); err != nil || !bytes.Equal(again, b) {
			t.Errorf("%q arrived as %q, which is % x, not % x: %v", dest, back, again, b, err)
		}
	})
}

func FuzzAnswer(f *testing.F) {
	for _, v := range readVectors(f, "client") {
		f.Add(v.receives)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		r := bytes.NewReader(b)
		err := readAnswer(r)
		if ok := len(b) >= answerSize && b[0] == version && b[1] == 0; ok != (err == nil) {
			t.Errorf("% x: %v", b, err)
		}
		if err != nil && !ptipc.ClassOf(err).Known() {
			t.Errorf("% x: %v has no class", b, err)
		}
		if len(b)-r.Len() > answerSize {
			t.Errorf("read %d bytes", len(b)-r.Len())
		}
	})
}
