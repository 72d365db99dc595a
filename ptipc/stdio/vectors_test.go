package stdio_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"path/filepath"
	"reflect"
	"testing"

	"pthost/ptipc"
	"pthost/ptipc/localnet"
	"pthost/ptipc/stdio"
	"pthost/ptipc/testvector"
)

// vectors is where the vectors are; its README.md explains them.
const vectors = "../../testdata/stdio"

type vector struct {
	name, clause, input string
	bytes               []byte
	want                string
	refused             bool
}

func loadVectors(t testing.TB) []vector {
	t.Helper()
	var all []vector
	seen := map[string]bool{}
	testvector.Stanzas(t, filepath.Join(vectors, "*.txt"), func(file string, stanza []testvector.Line) {
		var v vector
		for _, line := range stanza {
			switch line.Key {
			case "name":
				v.name = file + "/" + line.Value
			case "clause":
				v.clause = line.Value
			case "input":
				v.input = line.Value
			case "bytes":
				v.bytes = testvector.Unescape(t, line.Value)
			case "want":
				v.want = line.Value
			case "write":
				v.refused = line.Value == "refused"
			default:
				t.Fatalf("%s: strange key %q", file, line.Key)
			}
		}
		if v.name == "" || v.clause == "" || v.input == "" || v.want == "" || seen[v.name] {
			t.Fatalf("%s: incomplete or double vector %q", file, v.name)
		}
		seen[v.name] = true
		all = append(all, v)
	})
	return all
}

// describe is m in the words of the vectors.
func describe(m stdio.Message) any {
	type object = map[string]any
	pairs := func(kvs []stdio.KV) any {
		list := [][2]string{}
		for _, kv := range kvs {
			list = append(list, [2]string{kv.Key, kv.Value})
		}
		return list
	}
	switch m := m.(type) {
	case stdio.Version:
		return object{"keyword": "VERSION", "version": m.Version}
	case stdio.VersionError:
		return object{"keyword": "VERSION-ERROR", "text": m.Text}
	case stdio.EnvError:
		return object{"keyword": "ENV-ERROR", "text": m.Text}
	case stdio.ProxyError:
		return object{"keyword": "PROXY-ERROR", "text": m.Text}
	case stdio.ProxyDone:
		return object{"keyword": "PROXY DONE"}
	case stdio.CMethodsDone:
		return object{"keyword": "CMETHODS DONE"}
	case stdio.CMethod:
		return object{"keyword": "CMETHOD", "name": m.Name, "protocol": m.Protocol, "addr": m.Addr, "args": pairs(m.Args)}
	case stdio.CMethodError:
		o := object{"keyword": "CMETHOD-ERROR", "name": m.Name, "class": m.Class, "message": m.Message}
		if m.Config != nil {
			o["config"] = m.Config
		}
		return o
	case stdio.SMethodsDone:
		return object{"keyword": "SMETHODS DONE"}
	case stdio.SMethod:
		return object{"keyword": "SMETHOD", "name": m.Name, "addr": m.Addr, "args": pairs(m.Args)}
	case stdio.SMethodError:
		o := describe(stdio.CMethodError(m)).(object)
		o["keyword"] = "SMETHOD-ERROR"
		return o
	case stdio.CMessage:
		return signal("CMESSAGE", m.Message)
	case stdio.SMessage:
		return signal("SMESSAGE", m.Message)
	case stdio.Log:
		names := map[slog.Level]string{
			slog.LevelError: "error", slog.LevelWarn: "warning", stdio.LevelNotice: "notice",
			slog.LevelInfo: "info", slog.LevelDebug: "debug",
		}
		return object{"keyword": "LOG", "severity": names[m.Level], "message": m.Message}
	case stdio.Status:
		return object{"keyword": "STATUS", "transport": m.Transport, "attrs": pairs(m.Attrs)}
	case stdio.StatsRequest:
		return object{"keyword": "STATS", "id": m.ID, "client": m.Client}
	case stdio.StatsReply:
		return object{"keyword": "STATS", "id": m.ID, "json": m.JSON}
	case stdio.Unknown:
		return object{"ignored": m.Keyword, "rest": m.Rest}
	}
	return fmt.Sprintf("%T", m)
}

func signal(keyword string, m ptipc.Message) map[string]any {
	o := map[string]any{"keyword": keyword, "body": m.Body}
	if m.Peer != "" {
		o["peer"] = m.Peer
	}
	return o
}

// sameJSON compares what came out with the text of a vector.
func sameJSON(t *testing.T, got any, want string) {
	t.Helper()
	text, err := json.Marshal(got)
	if err != nil {
		t.Fatal(err)
	}
	decode := func(s []byte) (v any) {
		decoder := json.NewDecoder(bytes.NewReader(s))
		decoder.UseNumber()
		if err := decoder.Decode(&v); err != nil {
			t.Fatalf("%s: %v", s, err)
		}
		return v
	}
	if !reflect.DeepEqual(decode(text), decode([]byte(want))) {
		t.Errorf("got  %s\nwant %s", text, want)
	}
}

func TestVectors(t *testing.T) {
	for _, v := range loadVectors(t) {
		t.Run(v.name, func(t *testing.T) {
			switch v.input {
			case "child":
				lineVector(t, v, stdio.Parse)
			case "host":
				lineVector(t, v, stdio.ParseHost)
			case "stream":
				sameJSON(t, readAll(t, bytes.NewReader(v.bytes)), v.want)
			case "launch":
				launch, err := stdio.NewReader(bytes.NewReader(append(v.bytes, '\n'))).ReadLaunch()
				if v.want == "error" {
					wantDataErr(t, err)
					return
				}
				if err != nil {
					t.Fatal(err)
				}
				sameJSON(t, launch, v.want)
			case "generated":
				generatedVector(t, v)
			case "host-object":
				var host stdio.Host
				err := host.UnmarshalJSON(v.bytes)
				if v.want == "error" {
					if err == nil || !reflect.DeepEqual(host, stdio.Host{}) {
						t.Fatalf("%+v, error %v", host, err)
					}
					return
				}
				if err != nil {
					t.Fatal(err)
				}
				sameJSON(t, host, v.want)
			case "address":
				addr, err := localnet.ParseAddr(string(v.bytes))
				if v.want == "error" {
					if err == nil {
						t.Fatalf("%v was taken", addr)
					}
					return
				}
				if err != nil {
					t.Fatal(err)
				}
				address := addr.Name()
				if !addr.Unix() {
					address = addr.AddrPort().String()
				}
				sameJSON(t, map[string]string{"network": addr.Network(), "address": address}, v.want)
			case "mask":
				want := testvector.Unescape(t, v.want)
				if got := stdio.Mask(v.bytes); !bytes.Equal(got, want) {
					t.Errorf("got  %s\nwant %s", got, want)
				}
				if got := stdio.Mask(want); !bytes.Equal(got, want) {
					t.Errorf("masked again %s\nwant         %s", got, want)
				}
			default:
				t.Fatalf("unknown input %q", v.input)
			}
		})
	}
}

func generatedVector(t *testing.T, v vector) {
	t.Helper()
	generated, err := stdio.ParseGenerated(v.bytes)
	if v.want == "error" {
		if err == nil || !reflect.DeepEqual(generated, stdio.Generated{}) {
			t.Fatalf("%s, error %v", generated.Client, err)
		}
		return
	}
	if err != nil {
		t.Fatal(err)
	}
	sameJSON(t, generated, v.want)
	line, err := generated.Append(nil)
	if v.refused {
		if err == nil {
			t.Errorf("written as %q", line)
		}
		return
	}
	if err != nil {
		t.Fatal(err)
	}
	again, err := stdio.ParseGenerated(line)
	if err != nil {
		t.Fatal(err)
	}
	sameJSON(t, again, v.want)
}

func lineVector(t *testing.T, v vector, parse func([]byte) (stdio.Message, error)) {
	t.Helper()
	m, err := parse(v.bytes)
	var parseErr *stdio.ParseError
	switch v.want {
	case "error form":
		if !errors.As(err, &parseErr) || parseErr.Keyword != "" {
			t.Fatalf("%#v, error %v", m, err)
		}
		return
	case "error arguments":
		if !errors.As(err, &parseErr) || parseErr.Keyword == "" {
			t.Fatalf("%#v, error %v", m, err)
		}
		return
	case "error too-long":
		if !errors.Is(err, stdio.ErrTooLong) {
			t.Fatalf("%#v, error %v", m, err)
		}
		return
	}
	if err != nil {
		t.Fatal(err)
	}
	sameJSON(t, describe(m), v.want)
	// What a stream reader leaves at the end of the line changes nothing.
	if again, err := parse(append(bytes.Clone(v.bytes), '\n')); err != nil || !reflect.DeepEqual(m, again) {
		t.Errorf("with its LF: %#v, error %v", again, err)
	}
	line, err := stdio.Append(nil, m)
	if v.refused {
		if err == nil {
			t.Errorf("written as %q", line)
		}
		return
	}
	if err != nil {
		t.Fatal(err)
	}
	again, err := parse(line)
	if err != nil {
		t.Fatal(err)
	}
	sameJSON(t, describe(again), v.want)
}

// readAll describes a stream in the words of the vectors.
func readAll(t testing.TB, r io.Reader) []any {
	t.Helper()
	var out []any
	reader := stdio.NewReader(r)
	for {
		line, err := reader.ReadLine()
		switch {
		case err == nil && len(line) > 100:
			out = append(out, len(line))
		case err == nil:
			out = append(out, string(line))
		case errors.Is(err, stdio.ErrTooLong):
			out = append(out, map[string]string{"error": "too-long"})
		case errors.Is(err, io.EOF):
			return append(out, map[string]string{"end": "whole"})
		case errors.Is(err, io.ErrUnexpectedEOF):
			return append(out, map[string]string{"end": "cut off"})
		default:
			t.Fatal(err)
		}
	}
}

func wantDataErr(t *testing.T, err error) {
	t.Helper()
	if ptipc.ExitCodeOf(err) != ptipc.ExitDataErr {
		t.Errorf("exit code %d for %v, want %d", ptipc.ExitCodeOf(err), err, ptipc.ExitDataErr)
	}
}
