package ptipc

import (
	"bytes"
	"encoding"
	"encoding/json"
	"errors"
	"fmt"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"
)

// maxDepth bounds the nesting of a document (SOCKS-4 has the same bound for settings).
const maxDepth = 64

// Empty reports whether o holds no keys: nil, null and {} are the same (SOCKS-19).
func (o Opaque) Empty() bool {
	b := bytes.TrimSpace(o)
	if len(b) >= 2 && b[0] == '{' && b[len(b)-1] == '}' {
		return len(bytes.TrimSpace(b[1:len(b)-1])) == 0
	}
	return len(b) == 0 || string(b) == "null"
}

// A Validator is a configuration type with rules that its Go type cannot say.
// Decode calls Validate on every value that has it, once its parts are filled
// in. A [*ConfigError] that it returns has its pointer relative to the value.
type Validator interface{ Validate() error }

// Decode fills v, a pointer, from the object. It is stricter than encoding/json
// (CFG-2): unknown keys, keys that occur twice or in the wrong case, missing keys
// (those of a field without omitempty or omitzero), values of another type or out
// of range, and anything after the object are errors. Each is a [*ConfigError]
// with the RFC 6901 pointer of the place.
func (o Opaque) Decode(v any) error {
	target := reflect.ValueOf(v)
	if target.Kind() != reflect.Pointer || target.IsNil() {
		return fmt.Errorf("ptipc: Decode needs a pointer, not %T", v)
	}
	doc := []byte(o)
	if len(bytes.TrimSpace(doc)) == 0 {
		doc = []byte("{}")
	}
	if err := wellFormed(doc); err != nil {
		return err
	}
	return assign(doc, target.Elem(), place{})
}

// wellFormed checks what holds for every document, whatever it is decoded into.
func wellFormed(doc []byte) error {
	if !utf8.Valid(doc) {
		return &ConfigError{Problem: "is not UTF-8", Remedy: "write JSON in UTF-8"}
	}
	depth := 0
	for dec := json.NewDecoder(bytes.NewReader(doc)); ; {
		token, err := dec.Token()
		if err != nil {
			break // json.Unmarshal below finds it and says where
		}
		switch token {
		case json.Delim('{'), json.Delim('['):
			depth++
		case json.Delim('}'), json.Delim(']'):
			depth--
		}
		if depth > maxDepth {
			return &ConfigError{Problem: fmt.Sprintf("is nested deeper than %d levels", maxDepth), Remedy: "flatten it"}
		}
	}
	var raw json.RawMessage
	if err := json.Unmarshal(doc, &raw); err != nil {
		problem := "is not JSON: " + err.Error()
		var syntax *json.SyntaxError
		if errors.As(err, &syntax) {
			before := doc[:min(int(syntax.Offset), len(doc))]
			line := 1 + bytes.Count(before, []byte("\n"))
			column := len(before) - (bytes.LastIndexByte(before, '\n') + 1)
			problem = fmt.Sprintf("is not JSON: %v (line %d, byte %d)", err, line, column)
		}
		return &ConfigError{Problem: problem, Remedy: "write one JSON object"}
	}
	return nil
}

// place is where in the document a value stands.
type place struct {
	pointer string
	secret  bool
}

func (p place) key(k string) place {
	escaped := strings.NewReplacer("~", "~0", "/", "~1").Replace(k)
	return place{p.pointer + "/" + escaped, p.secret || secretName(k)}
}

func (p place) index(i int) place { return place{p.pointer + "/" + strconv.Itoa(i), p.secret} }

func (p place) err(raw []byte, problem, remedy string) *ConfigError {
	value := string(bytes.TrimSpace(raw))
	if p.secret && value != "" {
		value = "***"
	}
	const longest = 64
	if len(value) > longest {
		cut := longest
		for !utf8.RuneStart(value[cut]) {
			cut--
		}
		value = value[:cut] + "…"
	}
	if p.pointer == "" {
		value = ""
	}
	return &ConfigError{Pointer: p.pointer, Value: value, Problem: problem, Remedy: remedy}
}

// secretName reports whether what stands under the name must not be repeated (CFG-2).
func secretName(name string) bool {
	name = strings.ToLower(name)
	return slices.ContainsFunc([]string{"secret", "password", "passwd", "token", "key", "psk", "private"},
		func(word string) bool { return strings.Contains(name, word) })
}

func kindOf(raw []byte) string {
	switch raw = bytes.TrimSpace(raw); raw[0] {
	case '{':
		return "an object"
	case '[':
		return "a list"
	case '"':
		return "a string"
	case 't', 'f':
		return "a boolean"
	case 'n':
		return "null"
	default:
		return "a number"
	}
}

// want names what a Go type takes.
func want(t reflect.Type) string {
	switch t.Kind() {
	case reflect.Struct, reflect.Map:
		return "an object"
	case reflect.Slice, reflect.Array:
		return "a list"
	case reflect.String:
		return "a string"
	case reflect.Bool:
		return "a boolean"
	case reflect.Int, reflect.Int8, reflect.Int16, reflect.Int32, reflect.Int64:
		bits := t.Bits()
		return fmt.Sprintf("a whole number from %d to %d", int64(-1)<<(bits-1), int64(1)<<(bits-1)-1)
	case reflect.Uint, reflect.Uint8, reflect.Uint16, reflect.Uint32, reflect.Uint64:
		return fmt.Sprintf("a whole number from 0 to %d", ^uint64(0)>>(64-t.Bits()))
	case reflect.Float32, reflect.Float64:
		return "a number"
	default:
		return "a value of type " + t.String()
	}
}

var (
	unmarshaler     = reflect.TypeFor[json.Unmarshaler]()
	textUnmarshaler = reflect.TypeFor[encoding.TextUnmarshaler]()
)

// assign decodes one value. raw is well-formed JSON.
func assign(raw []byte, v reflect.Value, at place) error {
	raw = bytes.TrimSpace(raw)
	if v.Kind() == reflect.Pointer {
		if raw[0] == 'n' {
			v.SetZero()
			return nil
		}
		v.Set(reflect.New(v.Type().Elem()))
		return assign(raw, v.Elem(), at)
	}
	if err := assignParts(raw, v, at); err != nil {
		return err
	}
	validator, ok := v.Addr().Interface().(Validator)
	if !ok {
		return nil
	}
	err := validator.Validate()
	if err == nil {
		return nil
	}
	var config *ConfigError
	if errors.As(err, &config) {
		inner := *config
		inner.Pointer = at.pointer + inner.Pointer
		return &inner
	}
	return at.err(raw, err.Error(), "")
}

func assignParts(raw []byte, v reflect.Value, at place) error {
	t := v.Type()
	custom := reflect.PointerTo(t).Implements(unmarshaler)
	if t == reflect.TypeFor[Opaque]() && raw[0] != '{' {
		return at.err(raw, "is "+kindOf(raw)+", not an object", "write {…}")
	}
	switch {
	case custom, t.Kind() == reflect.Interface:
		if err := noDuplicates(raw, at); err != nil {
			return err
		}
		if err := json.Unmarshal(raw, v.Addr().Interface()); err != nil {
			return at.err(raw, err.Error(), "")
		}
		return nil
	case raw[0] == 'n':
		return at.err(raw, "is null", "give "+want(t)+", or leave the key out")
	case reflect.PointerTo(t).Implements(textUnmarshaler):
		if raw[0] != '"' {
			return at.err(raw, "is "+kindOf(raw), "give a string")
		}
		if err := json.Unmarshal(raw, v.Addr().Interface()); err != nil {
			return at.err(raw, err.Error(), "")
		}
		return nil
	}
	switch t.Kind() {
	case reflect.Struct:
		return assignStruct(raw, v, at)
	case reflect.Map:
		m := reflect.MakeMap(t)
		err := eachMember(raw, at, t, func(key string, value []byte, at place) error {
			element := reflect.New(t.Elem()).Elem()
			if err := assign(value, element, at); err != nil {
				return err
			}
			m.SetMapIndex(reflect.ValueOf(key).Convert(t.Key()), element)
			return nil
		})
		v.Set(m)
		return err
	case reflect.Slice:
		return assignSlice(raw, v, at)
	default:
		return assignScalar(raw, v, at)
	}
}

// assignScalar decodes what has no parts.
func assignScalar(raw []byte, v reflect.Value, at place) error {
	t := v.Type()
	if err := json.Unmarshal(raw, v.Addr().Interface()); err != nil {
		problem := "is " + kindOf(raw) + ", not " + want(t)
		if kindOf(raw) == "a number" && t.Kind() >= reflect.Int && t.Kind() <= reflect.Float64 {
			problem = "is out of range or not whole"
		}
		return at.err(raw, problem, "give "+want(t))
	}
	return nil
}

func assignStruct(raw []byte, v reflect.Value, at place) error {
	t := v.Type()
	fields := map[string]int{}
	var names, required []string
	for i := range t.NumField() {
		name, options, _ := strings.Cut(t.Field(i).Tag.Get("json"), ",")
		if name == "" || name == "-" {
			continue
		}
		fields[name] = i
		names = append(names, name)
		if !strings.Contains(options, "omit") {
			required = append(required, name)
		}
	}
	seen := map[string]bool{}
	err := eachMember(raw, at, t, func(key string, value []byte, at place) error {
		i, ok := fields[key]
		if !ok {
			return unknownKey(key, names, at)
		}
		seen[key] = true
		return assign(value, v.Field(i), at)
	})
	if err != nil {
		return err
	}
	for _, name := range required {
		if !seen[name] {
			missing := at.key(name)
			return missing.err(nil, "is missing", "add it: "+want(t.Field(fields[name]).Type))
		}
	}
	return nil
}

func unknownKey(key string, names []string, at place) error {
	for _, name := range names {
		if strings.EqualFold(name, key) {
			return at.err(nil, "is not a key here", fmt.Sprintf("keys are case-sensitive: write %q", name))
		}
	}
	slices.Sort(names)
	remedy := "remove it; no keys are known here"
	if len(names) > 0 {
		remedy = "remove it; the keys known here are " + strings.Join(names, ", ")
	}
	return at.err(nil, "is not a key here", remedy)
}

func assignSlice(raw []byte, v reflect.Value, at place) error {
	var elements []json.RawMessage
	if raw[0] != '[' {
		return at.err(raw, "is "+kindOf(raw)+", not a list", "write […]")
	}
	if err := json.Unmarshal(raw, &elements); err != nil {
		return at.err(raw, err.Error(), "")
	}
	s := reflect.MakeSlice(v.Type(), len(elements), len(elements))
	for i, element := range elements {
		if err := assign(element, s.Index(i), at.index(i)); err != nil {
			return err
		}
	}
	v.Set(s)
	return nil
}

// eachMember calls f for each member of an object and refuses duplicates, which
// encoding/json takes silently.
func eachMember(raw []byte, at place, t reflect.Type, f func(key string, value []byte, at place) error) error {
	if raw[0] != '{' {
		return at.err(raw, "is "+kindOf(raw)+", not "+want(t), "write {…}")
	}
	dec := json.NewDecoder(bytes.NewReader(raw))
	if _, err := dec.Token(); err != nil {
		return at.err(raw, err.Error(), "")
	}
	seen := map[string]bool{}
	for dec.More() {
		token, err := dec.Token()
		if err != nil {
			return at.err(raw, err.Error(), "")
		}
		key, _ := token.(string)
		var value json.RawMessage
		if err := dec.Decode(&value); err != nil {
			return at.err(raw, err.Error(), "")
		}
		if seen[key] {
			return at.key(key).err(nil, "occurs twice", "keep one of them")
		}
		seen[key] = true
		if err := f(key, value, at.key(key)); err != nil {
			return err
		}
	}
	return nil
}

// noDuplicates looks through a value that something else decodes.
func noDuplicates(raw []byte, at place) error {
	raw = bytes.TrimSpace(raw)
	switch raw[0] {
	case '{':
		return eachMember(raw, at, reflect.TypeFor[map[string]any](), func(_ string, value []byte, at place) error {
			return noDuplicates(value, at)
		})
	case '[':
		var elements []json.RawMessage
		if err := json.Unmarshal(raw, &elements); err != nil {
			return at.err(raw, err.Error(), "")
		}
		for i, element := range elements {
			if err := noDuplicates(element, at.index(i)); err != nil {
				return err
			}
		}
	}
	return nil
}
