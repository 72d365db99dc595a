package wire

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"pthost/ptipc/stdio"
)

// An Arg is one argument of a connection, or one option of a server.
type Arg struct{ Key, Value string }

// Args are arguments in their order. A key may occur several times.
type Args []Arg

// Get returns the first value of a key.
func (a Args) Get(key string) (value string, ok bool) {
	for _, arg := range a {
		if arg.Key == key {
			return arg.Value, true
		}
	}
	return "", false
}

// ArgsOf makes arguments of the members of a JSON object, ordered by their keys (PT1-4): of
// a string its text, of a number or boolean what stands there, and of a list of these
// one argument for each element. misfit is the key of a member that is something else.
func ArgsOf(members map[string]json.RawMessage) (args Args, misfit string, ok bool) {
	for _, key := range slices.Sorted(maps.Keys(members)) {
		values := []json.RawMessage{members[key]}
		if members[key][0] == '[' {
			values = nil
			if json.Unmarshal(members[key], &values) != nil {
				return nil, key, false
			}
		}
		for _, raw := range values {
			value := string(raw)
			switch raw[0] {
			case '{', '[', 'n':
				return nil, key, false
			case '"':
				if json.Unmarshal(raw, &value) != nil {
					return nil, key, false
				}
			}
			args = append(args, Arg{key, value})
		}
	}
	return args, "", true
}

// The limits of what RFC 1929 carries (PT1-3).
const (
	maxField = 255
	// MaxArgs is the most bytes that the arguments of a connection have once encoded.
	MaxArgs = 2 * maxField
)

var (
	// ErrTooLong says that arguments do not fit into username and password (PT1-3).
	ErrTooLong = errors.New("the arguments of the connection are too long")
	// ErrAmbiguous says that arguments could not be told from others when they are
	// split into username and password (PT1-3).
	ErrAmbiguous = errors.New("the arguments of the connection have 256 bytes and end in NUL, which no reader can tell from the first 255 of them")
)

// errEmptyKey: a reader takes no argument without a name.
var errEmptyKey = errors.New("the key of an argument is empty")

var (
	// Only what a reader takes for something else: readers differ about escapes
	// before other characters (PT1-2).
	keyEscaper   = strings.NewReplacer(`\`, `\\`, `;`, `\;`, `=`, `\=`)
	valueEscaper = strings.NewReplacer(`\`, `\\`, `;`, `\;`)
)

// Encode writes k=v;k=v (PT1-2). It is "" for no arguments.
func (a Args) Encode() (string, error) {
	var b strings.Builder
	for i, arg := range a {
		if arg.Key == "" {
			return "", errEmptyKey
		}
		if i > 0 {
			b.WriteByte(';')
		}
		b.WriteString(keyEscaper.Replace(arg.Key) + "=" + valueEscaper.Replace(arg.Value))
	}
	return b.String(), nil
}

// ParseArgs reads k=v;k=v. A backslash takes away the meaning of any character
// behind it (PT1-2). Errors repeat nothing, since values are secrets.
func ParseArgs(s string) (Args, error) {
	var args Args
	for more := s != ""; more; {
		var key, value string
		var found bool
		var err error
		if key, s, found, err = cut(s, "=;", '='); err != nil {
			return nil, err
		}
		if !found {
			return nil, fmt.Errorf("argument %d has no equals sign", len(args)+1)
		}
		if key == "" {
			return nil, errEmptyKey
		}
		if value, s, more, err = cut(s, ";", ';'); err != nil {
			return nil, err
		}
		args = append(args, Arg{key, value})
	}
	return args, nil
}

// cut unescapes s up to the first character of ends that has its meaning. found says
// that it is want, which is dropped then.
func cut(s, ends string, want byte) (before, after string, found bool, err error) {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		switch {
		case strings.IndexByte(ends, s[i]) >= 0:
			return b.String(), s[i+1:], s[i] == want, nil
		case s[i] == '\\' && i+1 == len(s):
			return "", "", false, errors.New("the arguments end in a backslash, and nothing is behind it")
		case s[i] == '\\':
			i++
		}
		b.WriteByte(s[i])
	}
	return b.String(), "", false, nil
}

// Credentials splits encoded arguments into the username and password of RFC 1929
// (PT1-3): neither is empty, since readers take no empty field. No arguments have
// no credentials, and method 0x00.
func Credentials(encoded string) (username, password string, err error) {
	switch {
	case encoded == "":
		return "", "", errors.New("no arguments have no username; offer method 0x00 (PT1-3)")
	case len(encoded) > MaxArgs:
		return "", "", fmt.Errorf("%w: %d bytes, and at most %d go through (PT1-3)", ErrTooLong, len(encoded), MaxArgs)
	case len(encoded) <= maxField:
		return encoded, "\x00", nil
	case len(encoded) == maxField+1 && encoded[maxField] == 0:
		return "", "", fmt.Errorf("%w (PT1-3)", ErrAmbiguous)
	}
	return encoded[:maxField], encoded[maxField:], nil
}

// JoinCredentials is the reverse of [Credentials]. A password of one NUL is none.
func JoinCredentials(username, password string) string {
	if password == "\x00" {
		return username
	}
	return username + password
}

// BridgeArgs makes arguments the ARGS of an SMETHOD line. They end up on the line
// that tor writes for its bridge's users, and tor takes no escapes away: a key or
// value with a comma, an equals sign, a backslash or a character that is not
// printable ASCII is refused (PT1-9).
func BridgeArgs(a Args) (stdio.Args, error) {
	var out stdio.Args
	for _, arg := range a {
		if arg.Key == "" {
			return nil, errEmptyKey
		}
		for _, r := range arg.Key + arg.Value {
			if r <= ' ' || r > '~' || r == ',' || r == '=' || r == '\\' {
				return nil, fmt.Errorf(`the argument %q or its value holds %q, which a bridge line cannot carry; encode it without , = \ and space (PT1-9)`, arg.Key, r)
			}
		}
		out = append(out, stdio.KV(arg))
	}
	return out, nil
}
