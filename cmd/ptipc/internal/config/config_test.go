package config

import (
	"bytes"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/santhosh-tekuri/jsonschema/v6"

	"pthost/ptipc"
	"pthost/spec"
)

func schema(t *testing.T) *jsonschema.Schema {
	t.Helper()
	document, err := jsonschema.UnmarshalJSON(bytes.NewReader(spec.HostSchema))
	if err != nil {
		t.Fatal(err)
	}
	compiler := jsonschema.NewCompiler()
	if err := compiler.AddResource("host.schema.json", document); err != nil {
		t.Fatal(err)
	}
	s, err := compiler.Compile("host.schema.json")
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func base(change string) string {
	return `{"transports":{"a":{"exec":"builtin:direct"` + change + `}}}`
}

func dialect(change string) string {
	return `{"transports":{"a":{"exec":"obfs4proxy","dialect":"pt1"` + change + `}}}`
}

func front(change string) string {
	return `{"transports":{"a":{"exec":"x"}},"fronts":[{"listen":"tcp://127.0.0.1:1","serve":"socks5","transport":"a"` + change + `}]}`
}

func via(path string) string {
	return strings.Replace(front(""), `"transport":"a"`, `"via":[`+path+`]`, 1)
}

func datagrams(keys string) string {
	return strings.Replace(strings.Replace(front(keys), "tcp://", "udp://", 1), "socks5", "forward", 1)
}

func operator(keys string) string { return `{"transports":{"a":{"exec":"x"}},` + keys + `}` }

// Each fault is found at its place. What the schema can say it says as well;
// what one key says of another it cannot, and JSON's duplicate keys it never sees.
func TestFaults(t *testing.T) {
	s := schema(t)
	tests := []struct {
		name, doc, pointer, contains string
		schemaToo                    bool
	}{
		{"no transports", `{}`, "/transports", "missing", true},
		{"empty transports", `{"transports":{}}`, "/transports", "names no transport", true},
		{"unknown key", `{"transports":{},"front":[]}`, "/front", "fronts, metrics, transports", true},
		{"name", `{"transports":{"a b":{"exec":"x"}}}`, "/transports", "not a transport's name", true},
		{"neither", `{"transports":{"a":{}}}`, "/transports/a/exec", "either", true},
		{"both", base(`,"attach":{"x":"127.0.0.1:1"}`), "/transports/a/exec", "either", true},
		{"role", base(`,"role":"peer"`), "/transports/a/role", "client or server", true},
		{"plugin and proxy", `{"transports":{"a":{"exec":"x","dialect":"sip003","proxy":"socks5://user:hunter2@127.0.0.1:1"}}}`, "/transports/a/proxy", "around", false},
		{"config", base(`,"config":[]`), "/transports/a/config", "not an object", true},
		{"duplicate in config", base(`,"config":{"a":1,"a":2}`), "/transports/a/config/a", "twice", false},
		{"deliver of a client", base(`,"deliver":"tcp://127.0.0.1:1"`), "/transports/a/deliver", "belongs to a server", false},
		{"deliver", base(`,"role":"server","deliver":"127.0.0.1:1"`), "/transports/a/deliver", "tcp://HOST:PORT", true},
		{"proxy protocol of a client", base(`,"proxy_protocol":true`), "/transports/a/proxy_protocol", "belongs to a server", false},
		{"proxy protocol to nobody", base(`,"role":"server","proxy_protocol":true`), "/transports/a/proxy_protocol", "deliver", false},
		{"attach a server", `{"transports":{"a":{"role":"server","attach":{"x":"127.0.0.1:1"}}}}`, "/transports/a/attach", "exec", false},
		{"front of a server", `{"transports":{"a":{"role":"server","exec":"x"}},"fronts":[{"listen":"tcp://127.0.0.1:1","serve":"socks5","transport":"a"}]}`, "/fronts/0/transport", "is a server", false},
		{"via", base(`,"config_via":"env"`), "/transports/a/config_via", "stdin or argv", true},
		{"plain and stdin", base(`,"plain":true,"config_via":"stdin"`), "/transports/a/config_via", "plain", false},
		{"plain and proxy", base(`,"plain":true,"proxy":"socks5://127.0.0.1:1"`), "/transports/a/proxy", "plain", false},
		{"proxy", base(`,"proxy":"http://user:hunter2@127.0.0.1:1"`), "/transports/a/proxy", "socks5://", true},
		{"restart", base(`,"restart":{"policy":"sometimes"}`), "/transports/a/restart/policy", "always or never", true},
		{"restart times", base(`,"restart":{"min":"2s","max":"1s"}`), "/transports/a/restart/min", "longer", false},
		{"restart count", base(`,"restart":{"give_up_after":-1}`), "/transports/a/restart/give_up_after", "negative", true},
		{"duration", base(`,"start_timeout":"10"`), "/transports/a/start_timeout", "500ms", true},
		{"duration zero", base(`,"start_timeout":"0s"`), "/transports/a/start_timeout", "500ms", false},
		{"duration type", base(`,"start_timeout":10`), "/transports/a/start_timeout", "string", true},
		{"same state", `{"transports":{"a":{"exec":"x","state":"s"},"b":{"exec":"y","state":"s"}}}`, "/transports/b/state", "of a as well", false},
		{"dialect", base(`,"dialect":"pt9"`), "/transports/a/dialect", "pt1 or pt2 or sip003", true},
		{"dialect of a builtin", base(`,"dialect":"pt1"`), "/transports/a/dialect", "builtin", false},
		{"dialect and attach", `{"transports":{"a":{"dialect":"pt1","attach":{"x":"127.0.0.1:1"}}}}`, "/transports/a/attach", "exec", false},
		{"dialect and plain", dialect(`,"plain":true`), "/transports/a/plain", "remove", false},
		{"dialect and config_via", dialect(`,"config_via":"stdin"`), "/transports/a/config_via", "remove", false},
		{"dialect and signals", dialect(`,"signals":{"queue":true}`), "/transports/a/signals", "control lines", false},
		{"dialect and a server's proxy", dialect(`,"role":"server","deliver":"tcp://a:1","proxy":"socks5://127.0.0.1:1"`), "/transports/a/proxy", "server", false},
		{"dialect and no service", dialect(`,"role":"server"`), "/transports/a/deliver", "hands its connections over", false},
		{"front listen", front(`,"listen":"x"`), "/fronts/0/listen", "twice", true},
		{"listen scheme", strings.Replace(front(""), "tcp://127.0.0.1:1", "sctp://127.0.0.1:1", 1), "/fronts/0/listen", "tcp://127.0.0.1:PORT", true},
		{"datagrams for socks5", strings.Replace(front(""), "tcp://127.0.0.1:1", "udp://127.0.0.1:1", 1), "/fronts/0/serve", "UDP ASSOCIATE", true},
		{"datagrams to nowhere", datagrams(""), "/fronts/0/dest", "IP:PORT", true},
		{"datagrams to a name", datagrams(`,"dest":"localhost:53"`), "/fronts/0/dest", "never sent to names", false},
		{"datagrams to port 0", datagrams(`,"dest":"127.0.0.1:0"`), "/fronts/0/dest", "IP:PORT", false},
		{"datagrams with settings", datagrams(`,"dest":"127.0.0.1:53","settings":{"a":1}`), "/fronts/0/settings", "streams", true},
		{"datagrams via", strings.Replace(datagrams(`,"dest":"127.0.0.1:53"`), `"transport":"a"`, `"via":["free","a"]`, 1), "/fronts/0/via", "streams", true},
		{"datagrams public", strings.Replace(datagrams(`,"dest":"127.0.0.1:53"`), "//127.0.0.1:1", "//0.0.0.0:1", 1), "/fronts/0/listen", "other machines", true},
		{"negative sessions", datagrams(`,"dest":"127.0.0.1:53","sessions":-1`), "/fronts/0/sessions", "negative", true},
		{"idle of streams", front(`,"idle":"1s"`), "/fronts/0/idle", "datagrams", true},
		{"sessions of streams", front(`,"sessions":1`), "/fronts/0/sessions", "datagrams", true},
		{"listen public", strings.Replace(front(""), "127.0.0.1:1", "0.0.0.0:1", 1), "/fronts/0/listen", "other machines", true},
		{"listen name", strings.Replace(front(""), "127.0.0.1:1", "localhost:1", 1), "/fronts/0/listen", "tcp://", true},
		{"listen unix", strings.Replace(front(""), "tcp://127.0.0.1:1", "unix://", 1), "/fronts/0/listen", "unix:///PATH", true},
		{"serve", strings.Replace(front(""), "socks5", "http", 1), "/fronts/0/serve", "socks5 or forward", true},
		{"serve empty", strings.Replace(front(""), "socks5", "", 1), "/fronts/0/serve", "socks5 or forward", true},
		{"transport", strings.Replace(front(""), `"transport":"a"`, `"transport":"b"`, 1), "/fronts/0/transport", "name a key", false},
		{"dest of socks5", front(`,"dest":"a:1"`), "/fronts/0/dest", "forward", false},
		{"dest", strings.Replace(front(`,"dest":"a"`), "socks5", "forward", 1), "/fronts/0/dest", "HOST:PORT", false},
		{"no transport", `{"transports":{"a":{"exec":"x"}},"fronts":[{"listen":"tcp://127.0.0.1:1","serve":"socks5"}]}`, "/fronts/0/transport", "via", true},
		{"transport and via", front(`,"via":["free","a"]`), "/fronts/0/via", "keep one", true},
		{"via nothing", via(`"b"`), "/fronts/0/via/0", "name a key", false},
		{"via unknown", via(`"fre","a"`), "/fronts/0/via/0", "is not an adapter", false},
		{"via twice", via(`"free","free","a"`), "/fronts/0/via/1", "its own kind", false},
		{"via mux over free", via(`"mux","free","a"`), "/fronts/0/via/1", "its own kind", false},
		{"via bound to nowhere", via(`"free","bound:x","a"`), "/fronts/0/via/1", "bound:HOST:PORT", false},
		{"via bound on top", via(`"bound:x:1","a"`), "/fronts/0/via/0", "nothing to choose", false},
		{"via of a client", base(`,"via":["free"]`), "/transports/a/via", "front", false},
		{"egress of a client", base(`,"egress":{}`), "/transports/a/egress", "server", false},
		{"egress of a bound server", base(`,"role":"server","egress":{}`), "/transports/a/egress", "via", false},
		{"egress rule", base(`,"role":"server","via":["free"],"egress":{"allow":["x"]}`), "/transports/a/egress/allow/0", "", false},
		{"via of a server", base(`,"role":"server","via":["bound:x:1"]`), "/transports/a/via/0", "free", true},
		{"via and deliver", base(`,"role":"server","via":["free"],"deliver":"tcp://a:1"`), "/transports/a/deliver", "itself", false},
		{"signals of nobody", base(`,"signals":{}`), "/transports/a/signals", "one way", true},
		{"signals not queued", base(`,"signals":{"queue":false}`), "/transports/a/signals", "one way", true},
		{"signals twice", base(`,"signals":{"queue":true,"dir":"d"}`), "/transports/a/signals", "one way", true},
		{"signals null", base(`,"signals":null`), "/transports/a/signals", "null", true},
		{"signals unknown", base(`,"signals":{"mail":"x"}`), "/transports/a/signals/mail", "command, dir, queue", true},
		{"signal command", base(`,"signals":{"command":{}}`), "/transports/a/signals/command/send", "missing", true},
		{"signal command empty", base(`,"signals":{"command":{"send":[]}}`), "/transports/a/signals/command/send", "names no program", true},
		{"signal command receive", base(`,"signals":{"command":{"send":["x"],"receive":[""]}}`), "/transports/a/signals/command/receive", "names no program", false},
		{"signals of an attached child", `{"transports":{"a":{"attach":{"x":"127.0.0.1:1"},"signals":{"queue":true}}}}`, "/transports/a/signals", "control lines", false},
		{"signals in one place", `{"transports":{"a":{"exec":"x","signals":{"dir":"s"}},"b":{"exec":"y","signals":{"dir":"s"}}}}`, "/transports/b/signals/dir", "of a as well", false},
		{"sandbox switched off beside lists", base(`,"sandbox":{"off":true,"read":["/x"]}`), "/transports/a/sandbox/off", "remove it", false},
		{"sandbox path", base(`,"sandbox":{"write":["/x",""]}`), "/transports/a/sandbox/write/1", "file or a directory", true},
		{"sandbox unknown", base(`,"sandbox":{"on":true}`), "/transports/a/sandbox/on", "off, read, write", true},
		{"sandbox of an attached child", `{"transports":{"a":{"attach":{"x":"127.0.0.1:1"},"sandbox":{"off":true}}}}`, "/transports/a/attach", "remove", false},
		{"limit of descriptors", base(`,"limits":{"descriptors":3}`), "/transports/a/limits/descriptors", "at least 32", false},
		{"limit of memory", base(`,"limits":{"memory_mib":-1}`), "/transports/a/limits/memory_mib", "", true},
		{"limit of much memory", base(`,"limits":{"memory_mib":1073741825}`), "/transports/a/limits/memory_mib", "MiB", true},
		{"control", operator(`"control":"/run/x.sock"`), "/control", "unix:///PATH", true},
		{"control tcp", operator(`"control":"tcp://127.0.0.1:1"`), "/control", "unix:///PATH", true},
		{"control directory", operator(`"control":"unix:///run/"`), "/control", "unix:///PATH", true},
		{"metrics", operator(`"metrics":"127.0.0.1:9100"`), "/metrics", "tcp://IP:PORT", true},
		{"metrics name", operator(`"metrics":"tcp://localhost:9100"`), "/metrics", "tcp://IP:PORT", false},
		{"metrics twice", operator(`"metrics":"unix:///a/b","control":"unix:///a/b"`), "/metrics", "taken", false},
		{"listen twice", `{"transports":{"a":{"exec":"x"}},"fronts":[` + strings.Repeat(`{"listen":"tcp://127.0.0.1:1","serve":"socks5","transport":"a"},`, 1) +
			`{"listen":"tcp://127.0.0.1:1","serve":"socks5","transport":"a"}]}`, "/fronts/1/listen", "taken", false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			_, err := Parse([]byte(tt.doc))
			var fault *ptipc.ConfigError
			if !errors.As(err, &fault) {
				t.Fatalf("got %v, want a *ptipc.ConfigError", err)
			}
			if fault.Pointer != tt.pointer || !strings.Contains(err.Error(), tt.contains) {
				t.Errorf("got %v", err)
			}
			if strings.Contains(err.Error(), "hunter2") {
				t.Errorf("the password stands in %q", err)
			}
			var document any
			if err := json.Unmarshal([]byte(tt.doc), &document); err != nil {
				t.Fatal(err)
			}
			if err := s.Validate(document); (err != nil) != tt.schemaToo {
				t.Errorf("the schema says %v", err)
			}
		})
	}
}

const full = `{
  "transports": {
    "a": {"exec": "./pt", "args": ["-v"], "role": "client", "config": {"k": 1}, "state": "st", "config_via": "argv",
      "bound": {"x": true}, "proxy": "socks5://u:p@127.0.0.1:9", "user": "nobody",
      "restart": {"policy": "never", "min": "1s", "max": "2m30s", "give_up_after": 3},
      "start_timeout": "500ms", "stop_timeout": "1.5s"},
    "b": {"attach": {"x": "127.0.0.1:4000"}},
    "c": {"exec": "pt-in-path", "plain": true, "signals": {"dir": "mail"}},
    "d": {"exec": "x", "signals": {"command": {"send": ["./carry", "./as it is"], "receive": ["fetch"]}}},
    "e": {"exec": "obfs-server", "dialect": "sip003", "role": "server", "config": {"remote": "0.0.0.0:443"}, "deliver": "tcp://127.0.0.1:80"}
  },
  "control": "unix://ctl.sock",
  "metrics": "tcp://192.0.2.1:9100",
  "fronts": [
    {"listen": "tcp://[::1]:1080", "serve": "socks5", "transport": "a", "connection": "x", "settings": {"s": true}},
    {"listen": "unix://run/x.sock", "serve": "forward", "transport": "b", "dest": "example.com:22"},
    {"listen": "udp://127.0.0.1:5353", "serve": "forward", "transport": "a", "connection": "x", "dest": "192.0.2.1:53", "idle": "30s", "sessions": 100}
  ]
}`

func TestLoad(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "host.json")
	if err := os.WriteFile(path, []byte(full), 0o600); err != nil {
		t.Fatal(err)
	}
	file, err := Load(path)
	if err != nil {
		t.Fatal(err)
	}
	if a := file.Transports["a"]; a.Exec != filepath.Join(dir, "pt") || a.State != filepath.Join(dir, "st") || string(a.Config) != `{"k": 1}` {
		t.Errorf("%+v", a)
	}
	if c := file.Transports["c"]; c.Exec != "pt-in-path" {
		t.Errorf("%+v", c)
	}
	if got, want := file.Transports["c"].Signals.Dir, filepath.Join(dir, "mail"); got != want {
		t.Errorf("%s, want %s", got, want)
	}
	if got, want := file.Transports["d"].Signals.Command.Send, []string{filepath.Join(dir, "carry"), "./as it is"}; !slices.Equal(got, want) {
		t.Errorf("%q, want %q", got, want)
	}
	if got, want := file.Control, "unix://"+filepath.Join(dir, "ctl.sock"); got != want {
		t.Errorf("%s, want %s", got, want)
	}
	if got, want := file.Fronts[1].Listen, "unix://"+filepath.Join(dir, "run/x.sock"); got != want {
		t.Errorf("%s, want %s", got, want)
	}
	var document any
	if err := json.Unmarshal([]byte(full), &document); err != nil {
		t.Fatal(err)
	}
	if err := schema(t).Validate(document); err != nil {
		t.Error(err)
	}

	if _, err := Load(filepath.Join(dir, "none.json")); ptipc.ExitCodeOf(err) != ptipc.ExitNoInput {
		t.Errorf("a missing file: %v", err)
	}
	if err := os.WriteFile(path, []byte(`{"transports":7}`), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Load(path); ptipc.ExitCodeOf(err) != ptipc.ExitConfig || !strings.HasPrefix(err.Error(), path+": /transports = 7") {
		t.Errorf("a fault: %v", err)
	}
	if err := os.Truncate(path, maxSize+1); err != nil {
		t.Fatal(err)
	}
	if _, err := Load(path); ptipc.ExitCodeOf(err) != ptipc.ExitDataErr {
		t.Errorf("a huge file: %v", err)
	}
}

// What is taken obeys the schema.
func FuzzParse(f *testing.F) {
	f.Add([]byte(full))
	f.Add([]byte(base("")))
	f.Add([]byte(front(`,"dest":"a:1"`)))
	f.Add([]byte(datagrams(`,"dest":"192.0.2.1:53","idle":"1s","sessions":1,"settings":{},"via":[]`)))
	f.Add([]byte(front(`,"sessions":0`)))
	document, err := jsonschema.UnmarshalJSON(bytes.NewReader(spec.HostSchema))
	if err != nil {
		f.Fatal(err)
	}
	compiler := jsonschema.NewCompiler()
	if err := compiler.AddResource("host.schema.json", document); err != nil {
		f.Fatal(err)
	}
	s, err := compiler.Compile("host.schema.json")
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		if _, err := Parse(text); err != nil {
			return
		}
		document, err := jsonschema.UnmarshalJSON(bytes.NewReader(text))
		if err != nil {
			t.Fatal(err)
		}
		if err := s.Validate(document); err != nil {
			t.Fatalf("taken, against the schema: %v", err)
		}
	})
}
