package stdio

import (
	"bytes"
	"encoding/json"
	"fmt"
	"reflect"
	"strings"
	"testing"

	"pthost/ptipc"
)

// FuzzScanSignal: the reader in one pass takes nothing that Decode refuses, reads it in
// the same way, and leaves nothing to Decode but what has escapes.
func FuzzScanSignal(f *testing.F) {
	for _, text := range []string{
		`{"body":{}}`, ` { "peer" : "p1" , "body" : { "a" : [ 1 , -0.5e+7 , true , false , null , "\u00fc\"" ] } } `,
		`{"body":{"a":{"b":{}},"c":[]},"peer":""}`, `{"body":{"a":1,"b":{"a":1},"a":2}}`, `{"body":{},"body":{}}`,
		`{"body":[]}`, `{"body":null}`, `{"peer":"p"}`, `{"body":{},"peer":null}`, `{"body":{},"else":1}`, `{"Body":{}}`,
		`{"body":{"\u0061":1,"a":2}}`, `{"bod\u0079":{}}`, `{"body":{},"peer":"a\nb"}`, `{"body":{}}{}`, `{"body":{}},`,
		`{"body":{"a":01}}`, `{"body":{"a":1.}}`, `{"body":{"a":.5}}`, `{"body":{"a":1e}}`, `{"body":{"a":-}}`, `{"body":{"a":+1}}`,
		`{"body":{"a":tru}}`, `{"body":{"a":"\x"}}`, `{"body":{"a":"\u12g4"}}`, `{"body":{"a":"\ud800"}}`, "{\"body\":{\"a\":\"\t\"}}",
		"{\"body\":{\"a\":\"\xff\"}}", `{"body":{"a":[1,]}}`, `{"body":{"a":1,}}`, `{"body":{,}}`, `{"body"`, `{`, ``, `"`, `{"body":{"a":"\`,
		nested(maxDepth), nested(maxDepth + 1), nestedLists(maxDepth), nestedLists(maxDepth + 1),
	} {
		f.Add([]byte(text))
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		if len(text) > MaxSignal {
			return
		}
		got, ok := scanSignal(text)
		var want ptipc.Message
		err := ptipc.Opaque(text).Decode(&want)
		switch {
		case ok && err != nil:
			t.Fatalf("%q was taken, and is refused by Decode: %v", text, err)
		case ok && !reflect.DeepEqual(got, want):
			t.Fatalf("%q was read as %+v, want %+v", text, got, want)
		case !ok && err == nil && !bytes.Contains(text, []byte{'\\'}):
			t.Fatalf("%q was not taken", text)
		}
		if err != nil {
			return
		}
		// What is written is what the encoder of a whole message writes.
		var plain bytes.Buffer
		encoder := json.NewEncoder(&plain)
		encoder.SetEscapeHTML(false)
		if err := encoder.Encode(want); err != nil {
			t.Fatal(err)
		}
		written, err := AppendSignal(nil, want)
		if fits := plain.Len()-1 <= MaxSignal; fits != (err == nil) {
			t.Fatalf("%q is refused: %v", text, err)
		} else if fits && string(written)+"\n" != plain.String() {
			t.Fatalf("%q is written as %q, want %q", text, written, plain.String())
		}
	})
}

// nested is a signal of so many objects, one in the other.
func nested(depth int) string {
	return `{"body":` + strings.Repeat(`{"a":`, depth-2) + `{}` + strings.Repeat(`}`, depth-1)
}

// nestedLists is the same with lists, but for the outermost two.
func nestedLists(depth int) string {
	return `{"body":{"a":` + strings.Repeat(`[`, depth-2) + strings.Repeat(`]`, depth-2) + `}}`
}

// What was read does not change when the line's memory is used again.
func TestScanSignalCopies(t *testing.T) {
	text := []byte(`{"peer":"p1","body":{"a":1}}`)
	m, ok := scanSignal(text)
	if !ok {
		t.Fatal("not taken")
	}
	clear(text)
	if m.Peer != "p1" || string(m.Body) != `{"a":1}` {
		t.Errorf("%q %q", m.Peer, m.Body)
	}
}

// What a signal costs its reader, beside the least that a reader of JSON can do.
func BenchmarkSignal(b *testing.B) {
	var candidates []string
	for i := range 40 {
		candidates = append(candidates, fmt.Sprintf(`{"foundation":"%d","address":"192.0.2.%d","port":%d,"relayed":false}`, i, i, 4000+i))
	}
	for name, body := range map[string]string{
		"short":  `{"offer":"abc"}`,
		"string": `{"sdp":"` + strings.Repeat("x", 16<<10) + `"}`,
		"list":   `{"candidates":[` + strings.Join(candidates, ",") + `]}`,
	} {
		line := []byte(`CMESSAGE {"body":` + body + `}`)
		b.Run(name+"/Parse", func(b *testing.B) {
			b.SetBytes(int64(len(line)))
			b.ReportAllocs()
			for b.Loop() {
				if _, err := Parse(line); err != nil {
					b.Fatal(err)
				}
			}
		})
		b.Run(name+"/json.Valid", func(b *testing.B) {
			text := line[len("CMESSAGE "):]
			b.SetBytes(int64(len(line)))
			b.ReportAllocs()
			for b.Loop() {
				if !json.Valid(text) {
					b.Fatal("not JSON")
				}
			}
		})
	}
}
