package ptipc

import (
	"encoding/json"
	"errors"
	"reflect"
	"strings"
	"testing"
)

type server struct {
	Host string `json:"host"`
	Port uint16 `json:"port"`
}

func (s *server) Validate() error {
	if s.Port == 0 {
		return &ConfigError{Pointer: "/port", Value: "0", Problem: "is not a port", Remedy: "give a number from 1 to 65535"}
	}
	return nil
}

type document struct {
	Server   server            `json:"server"`
	More     []server          `json:"more,omitempty"`
	Password string            `json:"password,omitempty"`
	Labels   map[string]string `json:"labels,omitempty"`
	Inner    Opaque            `json:"inner,omitempty"`
	Verbose  *bool             `json:"verbose,omitempty"`
	Any      any               `json:"any,omitempty"`
	Level    int8              `json:"level,omitempty"`
	Ratio    float64           `json:"ratio,omitempty"`
}

// CFG-2, ERR-3: each fault is found at its place, with the value and a remedy.
func TestDecodeFaults(t *testing.T) {
	ok := `"server":{"host":"a","port":1}`
	tests := []struct {
		name, doc, pointer, value, problem, remedy string
	}{
		{"not JSON", `{`, "", "", "is not JSON", "JSON object"},
		{"not JSON, place", "{\n \"a\": x}", "", "", "line 2", ""},
		{"not an object", `[]`, "", "", "is a list, not an object", "write {…}"},
		{"null", `null`, "", "", "is null", "an object"},
		{"two objects", `{} {}`, "", "", "is not JSON", ""},
		{"not UTF-8", "{\"a\":\"\xff\"}", "", "", "not UTF-8", ""},
		{"too deep", strings.Repeat(`{"a":`, 65) + "1" + strings.Repeat("}", 65), "", "", "nested deeper", ""},
		{"missing", `{}`, "/server", "", "is missing", "an object"},
		{"missing below", `{"server":{"host":"a"}}`, "/server/port", "", "is missing", "0 to 65535"},
		{"unknown", `{` + ok + `,"extra":1}`, "/extra", "", "not a key", "the keys known here are any, inner"},
		{"case-folded", `{` + ok + `,"Level":1}`, "/Level", "", "not a key", `write "level"`},
		{"duplicate", `{` + ok + `,"level":1,"level":1}`, "/level", "", "twice", "keep one"},
		{"duplicate, escaped", `{` + ok + `,"level":1,"l\u0065vel":1}`, "/level", "", "twice", "keep one"},
		{"duplicate below", `{` + ok + `,"inner":{"a":[{"b":1,"b":2}]}}`, "/inner/a/0/b", "", "twice", ""},
		{"duplicate in any", `{` + ok + `,"any":{"b":1,"b":2}}`, "/any/b", "", "twice", ""},
		{"duplicate in map", `{` + ok + `,"labels":{"b":"1","b":"2"}}`, "/labels/b", "", "twice", ""},
		{"type", `{"server":{"host":7,"port":1}}`, "/server/host", "7", "is a number", "a string"},
		{"type of number", `{"server":{"host":"a","port":"1"}}`, "/server/port", `"1"`, "is a string", "whole number"},
		{"type of boolean", `{` + ok + `,"verbose":1}`, "/verbose", "1", "", "a boolean"},
		{"type of list", `{` + ok + `,"more":{}}`, "/more", "{}", "is an object, not a list", ""},
		{"type of opaque", `{` + ok + `,"inner":[]}`, "/inner", "[]", "is a list, not an object", ""},
		{"range", `{"server":{"host":"a","port":65536}}`, "/server/port", "65536", "out of range", "0 to 65535"},
		{"negative", `{"server":{"host":"a","port":-1}}`, "/server/port", "-1", "out of range", "0 to 65535"},
		{"not whole", `{` + ok + `,"level":1.5}`, "/level", "1.5", "not whole", "-128 to 127"},
		{"float range", `{` + ok + `,"ratio":1e999}`, "/ratio", "1e999", "out of range", "a number"},
		{"validate", `{"server":{"host":"a","port":0}}`, "/server/port", "0", "is not a port", "1 to 65535"},
		{"validate in list", `{` + ok + `,"more":[{"host":"a","port":1},{"host":"a","port":0}]}`, "/more/1/port", "0", "is not a port", ""},
		{"null value", `{"server":{"host":null,"port":1}}`, "/server/host", "null", "is null", "leave the key out"},
		{"pointer escapes", `{` + ok + `,"labels":{"a/b~c":1}}`, "/labels/a~1b~0c", "1", "is a number", ""},
		{"secret", `{` + ok + `,"password":{"hunter2":1}}`, "/password", "***", "is an object", ""},
		{"long value", `{` + ok + `,"level":"` + strings.Repeat("é", 100) + `"}`, "/level", `"` + strings.Repeat("é", 31) + "…", "", ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			var d document
			err := Opaque(tt.doc).Decode(&d)
			var config *ConfigError
			if !errors.As(err, &config) {
				t.Fatalf("got %v, want a *ConfigError", err)
			}
			if config.Pointer != tt.pointer || config.Value != tt.value ||
				!strings.Contains(config.Problem, tt.problem) || !strings.Contains(config.Remedy, tt.remedy) {
				t.Errorf("got %#v", config)
			}
			if strings.Contains(err.Error(), "hunter2") {
				t.Errorf("the secret stands in %q", err)
			}
			if ClassOf(err) != ErrSettingsRefused || ExitCodeOf(err) != ExitConfig {
				t.Errorf("class %v, exit code %v", ClassOf(err), ExitCodeOf(err))
			}
		})
	}
}

func TestDecode(t *testing.T) {
	var d document
	err := Opaque(` {"server":{"host":"h","port":65535},"more":[{"host":"i","port":1}],"labels":{"a":"b"},
		"inner":{"x":[1]},"verbose":true,"any":[1,"2"],"level":-128,"ratio":0.5} `).Decode(&d)
	if err != nil {
		t.Fatal(err)
	}
	verbose := true
	want := document{
		Server: server{"h", 65535}, More: []server{{"i", 1}}, Labels: map[string]string{"a": "b"},
		Inner: Opaque(`{"x":[1]}`), Verbose: &verbose, Any: []any{1.0, "2"}, Level: -128, Ratio: 0.5,
	}
	if !reflect.DeepEqual(d, want) {
		t.Errorf("got %+v\nwant %+v", d, want)
	}
	var empty struct {
		A int `json:"a,omitempty"`
	}
	if err := Opaque(nil).Decode(&empty); err != nil {
		t.Errorf("nil: %v", err)
	}
	if err := Opaque(nil).Decode(empty); err == nil {
		t.Error("a value that is no pointer was taken")
	}
}

// SOCKS-19
func TestOpaqueEmpty(t *testing.T) {
	for doc, want := range map[string]bool{
		"": true, "{}": true, " { } ": true, "null": true, `{"a":1}`: false, "[]": false, "{": false,
	} {
		if got := Opaque(doc).Empty(); got != want {
			t.Errorf("%q: %v", doc, got)
		}
	}
	b, err := json.Marshal(map[string]Opaque{"a": nil, "b": Opaque(`{"c":1}`)})
	if err != nil || string(b) != `{"a":{},"b":{"c":1}}` {
		t.Errorf("%s %v", b, err)
	}
}

// What Decode takes, encoding/json takes with the same result.
func FuzzDecode(f *testing.F) {
	f.Add([]byte(`{"server":{"host":"h","port":1},"inner":{"a":1},"any":[null],"more":[]}`))
	f.Add([]byte(`{"server":{"host":"h","port":1},"SERVER":{}}`))
	f.Add([]byte(`{"server":{"host":"\ud800","port":1e0}}`))
	f.Fuzz(func(t *testing.T, doc []byte) {
		var got, want document
		err := Opaque(doc).Decode(&got)
		if err != nil {
			var config *ConfigError
			if !errors.As(err, &config) {
				t.Fatalf("%v is no *ConfigError", err)
			}
			return
		}
		if err := json.Unmarshal(doc, &want); err != nil {
			t.Fatalf("encoding/json refuses what Decode took: %v", err)
		}
		if !reflect.DeepEqual(got, want) {
			t.Fatalf("got %+v, want %+v", got, want)
		}
	})
}
