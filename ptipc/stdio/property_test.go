package stdio_test

import (
	"bytes"
	"encoding/json"
	"log/slog"
	"math"
	"reflect"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"pthost/ptipc"
	"pthost/ptipc/stdio"
)

var (
	name = rapid.StringMatching(`[A-Za-z_][A-Za-z0-9_-]{0,63}`)
	word = rapid.StringMatching(`[A-Za-z0-9_.-]{1,20}`)
	// text is the TEXT of a line: anything but control characters, without spaces
	// at its ends.
	text = rapid.Map(rapid.String(), stdio.OneLine)
	// argText is hard on the escapes of ARGS.
	argText = rapid.Map(rapid.StringOf(rapid.RuneFrom([]rune(`ab\\,,==:"é`))), strings.TrimSpace)
	// anyBytes is hard on the escapes of C.
	anyBytes = rapid.OneOf(
		rapid.String(),
		rapid.StringOf(rapid.RuneFrom([]rune("ab17 =\"\\\n\r\t\x00\x1b\x7fé"))),
		rapid.Map(rapid.SliceOf(rapid.Byte()), func(b []byte) string { return string(b) }),
	)
	addr = rapid.OneOf(
		rapid.StringMatching(`127\.1?[0-9]\.1?[0-9]\.1?[0-9]:[1-9][0-9]{0,3}`),
		rapid.StringMatching(`\[::1\]:[1-9][0-9]{0,3}`),
		rapid.StringMatching(`unix:[A-Za-z_-][A-Za-z0-9._-]{0,63}`),
	)
	wireAddr = rapid.OneOf(
		rapid.StringMatching(`1?[0-9]\.1?[0-9]\.1?[0-9]\.1?[0-9]:[1-9][0-9]{0,3}`),
		rapid.StringMatching(`\[2001:[1-9a-f]{1,4}::[1-9a-f]{1,4}\]:[1-9][0-9]{0,3}`),
	)
	class = rapid.SampledFrom([]ptipc.Class{
		ptipc.ErrGeneral, ptipc.ErrNotAllowed, ptipc.ErrRefused, ptipc.ErrTimedOut, ptipc.ErrSettingsRefused,
	})
	level = rapid.SampledFrom([]slog.Level{
		slog.LevelDebug, slog.LevelInfo, stdio.LevelNotice, slog.LevelWarn, slog.LevelError,
	})
)

// signals have bodies of one spelling.
var signals = rapid.Custom(func(t *rapid.T) ptipc.Message {
	body, err := json.Marshal(rapid.MapOf(rapid.String(), rapid.String()).Draw(t, "body"))
	if err != nil {
		t.Fatal(err)
	}
	return ptipc.Message{Peer: rapid.String().Draw(t, "peer"), Body: body}
})

func pairs(key, value *rapid.Generator[string]) *rapid.Generator[[]stdio.KV] {
	return rapid.Custom(func(t *rapid.T) []stdio.KV {
		var list []stdio.KV
		for range rapid.IntRange(0, 5).Draw(t, "pairs") {
			list = append(list, stdio.KV{Key: key.Draw(t, "key"), Value: value.Draw(t, "value")})
		}
		return list
	})
}

// messages makes every message that a child can write.
var messages = rapid.Custom(func(t *rapid.T) stdio.Message {
	switch rapid.IntRange(0, 16).Draw(t, "kind") {
	case 0:
		return stdio.Version{Version: rapid.StringMatching(`[A-Za-z0-9_-]{1,9}`).Draw(t, "version")}
	case 1:
		return stdio.VersionError{Text: text.Draw(t, "text")}
	case 2:
		return stdio.EnvError{Text: text.Draw(t, "text")}
	case 3:
		return stdio.ProxyError{Text: text.Draw(t, "text")}
	case 4:
		return stdio.ProxyDone{}
	case 5:
		return stdio.CMethodsDone{}
	case 6:
		nonEmpty := argText.Filter(func(s string) bool { return s != "" })
		return stdio.CMethod{
			Name: name.Draw(t, "name"), Protocol: stdio.ProtocolSOCKS5, Addr: addr.Draw(t, "addr"),
			Args: pairs(nonEmpty, argText).Draw(t, "args"),
		}
	case 7:
		m := stdio.CMethodError{Name: name.Draw(t, "name"), Class: class.Draw(t, "class"), Message: "m" + rapid.String().Draw(t, "message")}
		if rapid.Bool().Draw(t, "configuration") {
			m.Config = &ptipc.ConfigError{
				Pointer: rapid.String().Draw(t, "pointer"), Value: rapid.String().Draw(t, "value"),
				Problem: rapid.String().Draw(t, "problem"), Remedy: rapid.String().Draw(t, "remedy"),
			}
		}
		return m
	case 8:
		return stdio.Log{Level: level.Draw(t, "level"), Message: anyBytes.Draw(t, "message")}
	case 9:
		m := stdio.Status{Transport: name.Draw(t, "transport")}
		m.Attrs = pairs(word.Filter(func(s string) bool { return s != "TRANSPORT" }), anyBytes).Draw(t, "attrs")
		return m
	case 10:
		m := stdio.StatsReply{ID: rapid.Uint64().Draw(t, "id")}
		if rapid.Bool().Draw(t, "known") {
			m.JSON, _ = json.Marshal(ptipc.TransportStats{Active: rapid.Uint64().Draw(t, "active")})
		}
		return m
	case 11:
		return stdio.SMethodsDone{}
	case 12:
		nonEmpty := argText.Filter(func(s string) bool { return s != "" })
		return stdio.SMethod{Name: name.Draw(t, "name"), Addr: wireAddr.Draw(t, "addr"), Args: pairs(nonEmpty, argText).Draw(t, "args")}
	case 13:
		return stdio.SMethodError{Name: name.Draw(t, "name"), Class: class.Draw(t, "class"), Message: "m" + rapid.String().Draw(t, "message")}
	case 14:
		return stdio.CMessage{Message: signals.Draw(t, "signal")}
	case 15:
		return stdio.SMessage{Message: signals.Draw(t, "signal")}
	default:
		return stdio.Unknown{Keyword: "X-" + name.Draw(t, "keyword"), Rest: text.Draw(t, "rest")}
	}
})

// Everything that can be written reads the same (LINE-1 to LINE-11).
func TestRoundTrip(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		m := messages.Draw(t, "message")
		line, err := stdio.Append([]byte("before"), m)
		if err != nil {
			t.Fatal(err)
		}
		line, ok := bytes.CutPrefix(line, []byte("before"))
		if !ok || bytes.Count(line, []byte("\n")) != 1 || line[len(line)-1] != '\n' {
			t.Fatalf("not one line after what was there: %q", line)
		}
		switch m.(type) {
		case stdio.Log, stdio.Status:
			// A trace is read on a terminal.
			if strings.ContainsFunc(string(line[:len(line)-1]), func(r rune) bool { return r < ' ' || r == 0x7f }) {
				t.Fatalf("control characters in %q", line)
			}
		}
		got, err := stdio.Parse(line)
		if err != nil {
			t.Fatal(err)
		}
		if !reflect.DeepEqual(got, m) {
			t.Fatalf("%#v was written as %q and reads as %#v", m, line, got)
		}
	})
}

// The same for the lines of a host (STAT-3, SIG-1).
func TestRoundTripHost(t *testing.T) {
	client := rapid.StringMatching(`|127\.0\.0\.1:[0-9]{5}|@[0-9a-f]{5}`)
	rapid.Check(t, func(t *rapid.T) {
		var m stdio.Message = stdio.StatsRequest{ID: rapid.Uint64().Draw(t, "id"), Client: client.Draw(t, "client")}
		switch rapid.IntRange(0, 2).Draw(t, "kind") {
		case 1:
			m = stdio.CMessage{Message: signals.Draw(t, "signal")}
		case 2:
			m = stdio.SMessage{Message: signals.Draw(t, "signal")}
		}
		line, err := stdio.Append(nil, m)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := stdio.ParseHost(line); err != nil || !reflect.DeepEqual(got, m) {
			t.Fatalf("%#v was written as %q and reads as %#v: %v", m, line, got, err)
		}
	})
}

// The first line of standard input reads as it was written (ARG-4, ARG-5).
func TestRoundTripLaunch(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		launch := stdio.Launch{
			Config: ptipc.Opaque(`{"a":[1,{"b":"c"}]}`),
			Host: stdio.Host{
				Version: rapid.SliceOfN(rapid.Int(), 1, 3).Draw(t, "version"),
				Listen:  rapid.SampledFrom([]string{"", stdio.ListenUnix, stdio.ListenTCP}).Draw(t, "listen"),
				Proxy:   rapid.String().Draw(t, "proxy"),
				UID:     rapid.Ptr(rapid.Uint32Range(0, math.MaxUint32), true).Draw(t, "uid"),
				Deliver: rapid.OneOf(rapid.Just(""), addr).Draw(t, "deliver"),
			},
		}
		line, err := launch.Append(nil)
		if err != nil {
			t.Fatal(err)
		}
		reader := stdio.NewReader(bytes.NewReader(append(line, "STATS 1\n"...)))
		got, err := reader.ReadLaunch()
		if err != nil {
			t.Fatal(err)
		}
		if !reflect.DeepEqual(got, launch) {
			t.Fatalf("%#v was written as %q and reads as %#v", launch, line, got)
		}
		if next, err := reader.ReadLine(); err != nil || string(next) != "STATS 1" {
			t.Fatalf("the next line is %q: %v", next, err)
		}
	})
}

// No secret under its name comes through Mask, whatever it is made of and
// whatever stands around it (CFG-2, PROXY-3).
func TestMaskHidesSecrets(t *testing.T) {
	const mark = "zQ7" // stands in every secret and nowhere else
	secret := rapid.Map(anyBytes, func(s string) string { return mark + strings.ToValidUTF8(s, "?") + mark })
	secretKey := rapid.SampledFrom([]string{"username", "password", "realm", "Secret", "auth-token", "KEY", "psk", "private.id"})
	rapid.Check(t, func(t *rapid.T) {
		s := secret.Draw(t, "secret")
		key := secretKey.Draw(t, "key")
		pair := stdio.KV{Key: key, Value: s}
		object := map[string]any{
			"a": []any{1, map[string]any{"b": text.Draw(t, "b"), key: s}},
			"c": text.Draw(t, "c"),
			key: rapid.SampledFrom([]any{s, []any{s, 1}, map[string]any{"x": s}}).Draw(t, "value"),
		}
		around := func(key *rapid.Generator[string], pair stdio.KV) []stdio.KV {
			all := append(pairs(key, argText).Draw(t, "before"), pair)
			return append(all, pairs(key, argText).Draw(t, "after")...)
		}
		encoded, err := json.Marshal(object)
		if err != nil {
			t.Fatal(err)
		}
		url := strings.ReplaceAll("socks5://user:"+s+"@192.0.2.1:1080", " ", "%20")
		argSecret := strings.Map(func(r rune) rune {
			if r <= ' ' {
				return -1
			}
			return r
		}, s)

		var line []byte
		switch rapid.IntRange(0, 7).Draw(t, "kind") {
		case 7:
			body := ptipc.Opaque(`{"a":` + string(encoded) + `}`)
			line, err = stdio.Append(nil, stdio.CMessage{Message: ptipc.Message{Peer: s, Body: body}})
		case 0:
			line, err = stdio.Append(nil, stdio.CMethod{
				Name: "e", Protocol: stdio.ProtocolSOCKS5, Addr: "unix:s",
				Args: around(word, stdio.KV{Key: key, Value: argSecret}),
			})
		case 1:
			line, err = stdio.Append(nil, stdio.Status{Attrs: around(word, pair)})
		case 2:
			line, err = stdio.Append(nil, stdio.StatsReply{JSON: encoded})
		case 3:
			line, err = stdio.Launch{Config: encoded, Host: stdio.Host{Proxy: url}}.Append(nil)
		case 4:
			line, err = stdio.Append(nil, stdio.Log{Message: string(encoded)})
		case 5:
			line, err = stdio.Append(nil, stdio.Log{Message: text.Draw(t, "text") + url})
		case 6:
			line, err = stdio.Append(nil, stdio.ProxyError{Text: stdio.OneLine("dial " + url + ": refused")})
		}
		if err != nil {
			t.Fatal(err)
		}
		shown := stdio.Mask(line)
		if bytes.Contains(shown, []byte(mark)) {
			t.Fatalf("%q shows as %q", line, shown)
		}
		if again := stdio.Mask(shown); !bytes.Equal(again, shown) {
			t.Fatalf("%q is masked to %q and then to %q", line, shown, again)
		}
	})
}
