package wire_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net/url"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"pthost/adapters/pt1/wire"
	"pthost/ptipc/stdio"
	"pthost/ptipc/testvector"
)

// vectors is where the vectors are; its README.md explains them.
const vectors = "../../../testdata/pt1"

type vector struct {
	name, clause, input string
	bytes, write        []byte
	want                string
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
				v.name = line.Value
			case "clause":
				v.clause = line.Value
			case "input":
				v.input = line.Value
			case "bytes":
				v.bytes = testvector.Unescape(t, line.Value)
			case "want":
				v.want = line.Value
			case "write":
				v.write = testvector.Unescape(t, line.Value)
			default:
				t.Fatalf("%s: strange key %q", file, line.Key)
			}
		}
		if v.name == "" || v.clause == "" || v.input == "" || v.want == "" || seen[v.name] {
			t.Fatalf("%s: incomplete or double vector %q", file, v.name)
		}
		if v.write == nil {
			v.write = v.bytes
		}
		seen[v.name] = true
		all = append(all, v)
	})
	return all
}

func pairs(args wire.Args) [][2]string {
	out := [][2]string{}
	for _, a := range args {
		out = append(out, [2]string{a.Key, a.Value})
	}
	return out
}

func jsonOf(t testing.TB, v any) string {
	t.Helper()
	var b bytes.Buffer
	encoder := json.NewEncoder(&b)
	encoder.SetEscapeHTML(false)
	if err := encoder.Encode(v); err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(b.String())
}

func TestVectors(t *testing.T) {
	kinds := map[string]func(t *testing.T, v vector) string{
		"args": argsVector, "credentials": credentialsVector, "bridge": bridgeVector, "options": optionsVector,
		"environment": environmentVector, "cookie": cookieVector, "hash": hashVector, "extended": extendedVector,
	}
	for _, v := range loadVectors(t) {
		t.Run(strings.ReplaceAll(v.name, "/", "_"), func(t *testing.T) {
			kind := kinds[v.input]
			if kind == nil {
				t.Skipf("vectors of kind %s are for others", v.input)
			}
			got := kind(t, v)
			if v.input == "options" && got != "error" {
				var a, b any
				if json.Unmarshal([]byte(got), &a) != nil || json.Unmarshal([]byte(v.want), &b) != nil || !reflect.DeepEqual(a, b) {
					t.Errorf("%s: got %s, want %s", v.clause, got, v.want)
				}
				return
			}
			if got != v.want {
				t.Errorf("%s: got %s\nwant %s", v.clause, got, v.want)
			}
		})
	}
}

func argsVector(t *testing.T, v vector) string {
	args, err := wire.ParseArgs(string(v.bytes))
	if err != nil {
		return "error"
	}
	if out, err := args.Encode(); err != nil || out != string(v.write) {
		t.Errorf("written as %q, error %v, want %q", out, err, v.write)
	}
	return jsonOf(t, pairs(args))
}

func credentialsVector(t *testing.T, v vector) string {
	username, password, err := wire.Credentials(string(v.bytes))
	switch {
	case errors.Is(err, wire.ErrTooLong):
		return "error too-long"
	case errors.Is(err, wire.ErrAmbiguous):
		return "error ambiguous"
	case err != nil:
		return "error empty"
	}
	if joined := wire.JoinCredentials(username, password); joined != string(v.bytes) {
		t.Errorf("joined again: %q", joined)
	}
	return jsonOf(t, [2]int{len(username), len(password)})
}

func bridgeVector(t *testing.T, v vector) string {
	args, err := wire.ParseArgs(string(v.bytes))
	if err != nil {
		t.Fatal(err)
	}
	bridge, err := wire.BridgeArgs(args)
	if err != nil {
		return "error"
	}
	line, err := stdio.Append(nil, stdio.SMethod{Name: "x", Addr: "192.0.2.1:1", Args: bridge})
	if err != nil {
		t.Fatal(err)
	}
	_, text, _ := strings.Cut(strings.TrimSpace(string(line)), "ARGS:")
	return text
}

func optionsVector(t *testing.T, v vector) string {
	options, err := wire.ParseOptions(string(v.bytes))
	if err != nil {
		return "error"
	}
	if len(options) == 1 {
		for name, args := range options {
			environment := wire.Environment{Port: "127.0.0.1:1", Servers: []wire.Server{{Name: name, Options: args}}}
			environ, err := environment.Environ()
			if want := "TOR_PT_SERVER_TRANSPORT_OPTIONS=" + string(v.write); err != nil || !slices.Contains(environ, want) {
				t.Errorf("written as %q, error %v, want %q", environ, err, want)
			}
		}
	}
	out := map[string][][2]string{}
	for name, args := range options {
		out[name] = pairs(args)
	}
	return jsonOf(t, out)
}

// split makes an environment of lines without the prefix.
func split(lines string) []string {
	var environ []string
	for line := range strings.SplitSeq(lines, "\n") {
		environ = append(environ, wire.Prefix+line)
	}
	return environ
}

func lookup(environ []string) func(string) (string, bool) {
	return func(name string) (string, bool) {
		for _, variable := range environ {
			if key, value, _ := strings.Cut(variable, "="); key == name {
				return value, true
			}
		}
		return "", false
	}
}

func environmentVector(t *testing.T, v vector) string {
	e, err := wire.ParseEnvironment(lookup(split(string(v.bytes))))
	if err != nil {
		var refusal *wire.EnvironmentError
		if !errors.As(err, &refusal) {
			t.Fatalf("%v is no *EnvironmentError", err)
		}
		line, err := stdio.Append(nil, refusal.Line())
		if err != nil {
			t.Fatal(err)
		}
		return "error " + strings.TrimSpace(string(line))
	}
	out, err := e.Environ()
	if err != nil {
		t.Fatal(err)
	}
	for i := range out {
		out[i] = strings.TrimPrefix(out[i], wire.Prefix)
	}
	slices.Sort(out)
	return strings.Join(out, " ")
}

func cookieVector(t *testing.T, v vector) string {
	cookie, err := wire.ParseCookie(v.bytes)
	if err != nil {
		return "error"
	}
	if !bytes.Equal(cookie.Append(nil), v.bytes) {
		t.Errorf("written as %q", cookie.Append(nil))
	}
	return "ok"
}

func hashVector(_ *testing.T, v vector) string {
	cookie := wire.Cookie(v.bytes[:32])
	return fmt.Sprintf("%x %x", wire.ServerHash(cookie, v.bytes[32:64], v.bytes[64:]), wire.ClientHash(cookie, v.bytes[32:64], v.bytes[64:]))
}

var errDenied = errors.New("denied")

func decide(c wire.Client) error {
	if c.Transport == "deny" {
		return errDenied
	}
	return nil
}

func extendedVector(t *testing.T, v vector) string {
	conn := &authenticated{commands: bytes.NewReader(v.bytes)}
	client, err := wire.AcceptExtended(conn, cookie, decide)
	switch {
	case errors.Is(err, errDenied) && bytes.HasSuffix(conn.written, []byte{0x10, 0x01, 0, 0}):
		return "deny"
	case err != nil:
		return "error"
	case !bytes.HasSuffix(conn.written, []byte{0x10, 0x00, 0, 0}):
		t.Errorf("written: %x", conn.written)
	}
	return jsonOf(t, []any{client.Addr, client.Transport, conn.commands.Len()}) + " okay"
}

func TestEscapeInURL(t *testing.T) {
	// The proxy's URL goes through as it is: its own escapes are those of URLs.
	u := url.URL{Scheme: "socks5", User: url.UserPassword("a:b", "c@d"), Host: "[::1]:9"}
	e := wire.Environment{State: "/s", Clients: []string{"x"}, Proxy: u.String()}
	environ, err := e.Environ()
	if err != nil {
		t.Fatal(err)
	}
	back, err := wire.ParseEnvironment(lookup(environ))
	if err != nil || back.Proxy != u.String() {
		t.Errorf("got %+v, error %v", back, err)
	}
}
