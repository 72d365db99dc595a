package sip003

import (
	"encoding/json"
	"os"
	"reflect"
	"strings"
	"testing"
)

type vector struct {
	name, text, written string
	want                Options // nil if it is an error
	fails               bool
}

func readVectors(t testing.TB) []vector {
	t.Helper()
	text, err := os.ReadFile("../../testdata/sip003/options.txt")
	if err != nil {
		t.Fatal(err)
	}
	var all []vector
	for stanza := range strings.SplitSeq(string(text), "\n\n") {
		v := vector{want: Options{}}
		write := false
		for line := range strings.Lines(stanza) {
			key, value, _ := strings.Cut(strings.TrimSuffix(line, "\n"), ": ")
			var err error
			switch key {
			case "name":
				v.name = value
			case "clause":
			case "text":
				err = json.Unmarshal([]byte(value), &v.text)
			case "written":
				write, err = true, json.Unmarshal([]byte(value), &v.written)
			case "want":
				if v.fails = value == "error"; v.fails {
					break
				}
				var want [][]string
				err = json.Unmarshal([]byte(value), &want)
				for _, o := range want {
					option := Option{Key: o[0], Bare: len(o) == 1}
					if !option.Bare {
						option.Value = o[1]
					}
					v.want = append(v.want, option)
				}
			default:
				t.Fatalf("strange line %q", line)
			}
			if err != nil {
				t.Fatalf("%s: %q: %v", v.name, line, err)
			}
		}
		if !write {
			v.written = v.text
		}
		all = append(all, v)
	}
	return all
}

// SIP-2, SIP-3
func TestOptions(t *testing.T) {
	for _, v := range readVectors(t) {
		t.Run(v.name, func(t *testing.T) {
			got, err := ParseOptions(v.text)
			if v.fails {
				if err == nil {
					t.Fatalf("%+v, want an error", got)
				}
				return
			}
			if err != nil || len(got)+len(v.want) > 0 && !reflect.DeepEqual(got, v.want) {
				t.Fatalf("%+v, %v; want %+v", got, err, v.want)
			}
			if written, err := got.Encode(); err != nil || written != v.written {
				t.Errorf("written as %q, %v; want %q", written, err, v.written)
			}
		})
	}
}

// SIP-2: what a vector in plain text cannot hold, or not conveniently.
func TestOptionsBounds(t *testing.T) {
	long := "k=" + strings.Repeat("v", maxOptions)
	if _, err := ParseOptions(long[:maxOptions]); err != nil {
		t.Errorf("%d bytes: %v", maxOptions, err)
	}
	for _, text := range []string{long, "a=\xff", "secret\\"} {
		if o, err := ParseOptions(text); err == nil {
			t.Errorf("%d bytes were read as %d options", len(text), len(o))
		}
	}
	for _, o := range []Options{
		{{Key: "", Value: "v"}},
		{{Key: "a"}, {Key: "a"}},
		{{Key: "a", Value: "v", Bare: true}},
		{{Key: "a", Value: "\x00"}},
		{{Key: "\xff"}},
		{{Key: "k", Value: long}},
	} {
		if text, err := o.Encode(); err == nil {
			t.Errorf("%+v was written as %q", o, text)
		}
	}
	if _, err := ParseOptions("key=hunter2;key=hunter3"); err == nil || strings.Contains(err.Error(), "hunter") {
		t.Errorf("an error repeats a value, which may be a secret: %v", err)
	}
}

func TestCut(t *testing.T) {
	all := Options{{Key: "a", Value: "1"}, {Key: "b", Bare: true}, {Key: "c", Value: "3"}}
	rest := all
	if o, ok := rest.Cut("b"); !ok || !o.Bare || len(rest) != 2 || rest[1].Key != "c" {
		t.Errorf("%+v, %v; left %+v", o, ok, rest)
	}
	if o, ok := rest.Cut("b"); ok {
		t.Errorf("%+v was taken twice", o)
	}
	if all[1].Key != "b" || len(all) != 3 {
		t.Errorf("the list that was copied has changed: %+v", all)
	}
}

// FuzzOptions: what is read is written so that it reads the same (SIP-2, SIP-3).
func FuzzOptions(f *testing.F) {
	for _, v := range readVectors(f) {
		f.Add(v.text)
	}
	f.Fuzz(func(t *testing.T, text string) {
		o, err := ParseOptions(text)
		if err != nil {
			if o != nil {
				t.Errorf("%+v with error %v", o, err)
			}
			return
		}
		written, err := o.Encode()
		if err != nil {
			if len(text) > maxOptions/2 {
				return // escapes have made it too long
			}
			t.Fatalf("%q was read as %+v, which cannot be written: %v", text, o, err)
		}
		again, err := ParseOptions(written)
		if err != nil || !reflect.DeepEqual(o, again) {
			t.Errorf("%q was read as %+v, written as %q and read as %+v, %v", text, o, written, again, err)
		}
	})
}
