package stdio

import (
	"errors"
	"fmt"
	"strings"
)

// The ARGS keys that have a meaning (LINE-6, SRV-2, PKT-3).
const (
	ArgBound = "bound" // bound=1: the factory is bound
	ArgStats = "stats" // stats=1: the child answers STATS
	ArgProxy = "proxy" // proxy=1: the server connects its clients itself
	ArgEnds  = "ends"  // ends=1: the child marks the ends of streams

	ArgUsername = "username" // the credentials of a packet factory
	ArgPassword = "password"
	ArgRealm    = "realm"
)

// Args are the ARGS of a CMETHOD or SMETHOD line in their order. Keys that nobody knows are
// kept, and ignored (LINE-2).
type Args []KV

// Get returns the value of a key, that of the first when it occurs twice.
func (a Args) Get(key string) (value string, ok bool) {
	for _, kv := range a {
		if kv.Key == key {
			return kv.Value, true
		}
	}
	return "", false
}

// Bound reports whether the factory is bound; otherwise it is free (LINE-6).
func (a Args) Bound() bool { v, _ := a.Get(ArgBound); return v == "1" }

// Stats reports whether the child answers STATS (LINE-6).
func (a Args) Stats() bool { v, _ := a.Get(ArgStats); return v == "1" }

// Proxy reports whether the server connects its clients itself; otherwise it hands
// their connections over (SRV-2).
func (a Args) Proxy() bool { v, _ := a.Get(ArgProxy); return v == "1" }

// TURN returns the credentials of a packet factory, which are secrets (PKT-4). ok says
// that all of them are there.
func (a Args) TURN() (username, password, realm string, ok bool) {
	username, _ = a.Get(ArgUsername)
	password, _ = a.Get(ArgPassword)
	realm, _ = a.Get(ArgRealm)
	return username, password, realm, username != "" && password != "" && realm != ""
}

// Ends reports whether the child marks the ends of streams (SOCKS-20).
func (a Args) Ends() bool { v, _ := a.Get(ArgEnds); return v == "1" }

const argsPrefix = "ARGS:"

// argsEscaper takes away the meaning of the three characters that have one (LINE-6).
var argsEscaper = strings.NewReplacer(`\`, `\\`, `,`, `\,`, `=`, `\=`)

func (a Args) appendTo(dst []byte) ([]byte, error) {
	for i, kv := range a {
		if kv.Key == "" {
			return nil, errors.New("a key of ARGS is empty (LINE-6)")
		}
		// The value may be a secret and is not repeated. A space would end ARGS.
		if strings.Contains(kv.Key+kv.Value, " ") {
			return nil, fmt.Errorf("the ARGS key %q or its value holds a space, which no escape can carry (LINE-6)", kv.Key)
		}
		if i == 0 {
			dst = append(dst, " "+argsPrefix...)
		} else {
			dst = append(dst, ',')
		}
		dst = append(dst, argsEscaper.Replace(kv.Key)+"="+argsEscaper.Replace(kv.Value)...)
	}
	return dst, nil
}

// parseArgs reads what follows "ARGS:". Nothing is refused: a key without "=" has
// the empty value, an item without a key is dropped.
func parseArgs(s string) Args {
	var args Args
	for s != "" {
		var item string
		item, s, _ = cutUnescaped(s, ',')
		key, value, _ := cutUnescaped(item, '=')
		if key != "" {
			args = append(args, KV{unescapeArg(key), unescapeArg(value)})
		}
	}
	return args
}

// cutUnescaped splits s at the first sep that has its meaning.
func cutUnescaped(s string, sep byte) (before, after string, found bool) {
	for i := 0; i < len(s); i++ {
		switch {
		case s[i] == sep:
			return s[:i], s[i+1:], true
		case escapesArg(s[i:]):
			i++
		}
	}
	return s, "", false
}

// escapesArg reports whether s begins with an escape of LINE-6. A backslash
// before any other character stands for itself.
func escapesArg(s string) bool {
	return len(s) >= 2 && s[0] == '\\' && (s[1] == '\\' || s[1] == ',' || s[1] == '=')
}

func unescapeArg(s string) string {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if escapesArg(s[i:]) {
			i++
		}
		b.WriteByte(s[i])
	}
	return b.String()
}
