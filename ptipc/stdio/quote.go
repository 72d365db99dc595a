package stdio

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
	"unicode/utf8"
)

// appendAttrs writes " K=V" for each pair, quoted where a bare word would not do
// (LINE-9, LINE-10).
func appendAttrs(dst []byte, attrs []KV) ([]byte, error) {
	for _, a := range attrs {
		if !isKeyword(strings.ReplaceAll(a.Key, ".", "_")) {
			return nil, fmt.Errorf("the key %q has other characters than letters, digits, '.', '_' and '-' (LINE-10)", shorten(a.Key, 64))
		}
		dst = append(append(append(dst, ' '), a.Key...), '=')
		dst = appendValue(dst, a.Value)
	}
	return dst, nil
}

func appendValue(dst []byte, value string) []byte {
	if isBare(value) {
		return append(dst, value...)
	}
	dst = append(dst, '"')
	for len(value) > 0 {
		r, size := utf8.DecodeRuneInString(value)
		switch c := value[0]; {
		case c == '"' || c == '\\':
			dst = append(dst, '\\', c)
		case c == '\n':
			dst = append(dst, `\n`...)
		case c == '\t':
			dst = append(dst, `\t`...)
		case c < ' ' || c == 0x7f || r == utf8.RuneError && size == 1:
			// Always three digits: one that follows must not join the escape.
			dst = fmt.Appendf(dst, `\%03o`, c)
		default:
			dst = append(dst, value[:size]...)
		}
		value = value[size:]
	}
	return append(dst, '"')
}

// isBare holds for values that need no quotes in any reader.
func isBare(value string) bool {
	for i := range len(value) {
		if c := value[i]; !isAlnum(c) && !strings.ContainsRune("_-./:%@+*", rune(c)) {
			return false
		}
	}
	return value != ""
}

// parseAttrs reads K=V pairs between spaces. A value is a bare word or a string
// in double quotes with C escapes (LINE-9).
func parseAttrs(s string) ([]KV, error) {
	var attrs []KV
	for {
		s = strings.TrimLeft(s, " ")
		if s == "" {
			return attrs, nil
		}
		end := strings.IndexAny(s, `= "`)
		if end <= 0 || s[end] != '=' {
			return nil, errors.New("the arguments are not K=V pairs between spaces; quote a value that holds a space")
		}
		key := s[:end]
		s = s[end+1:]
		var value string
		if strings.HasPrefix(s, `"`) {
			var err error
			if value, s, err = unquote(s[1:]); err != nil {
				return nil, fmt.Errorf("the value of %.64q %w", key, err)
			}
		} else {
			value, s, _ = strings.Cut(s, " ")
		}
		attrs = append(attrs, KV{key, value})
	}
}

var cEscapes = map[byte]byte{
	'n': '\n', 't': '\t', 'r': '\r', 'a': '\a', 'b': '\b', 'f': '\f', 'v': '\v',
	'\\': '\\', '"': '"', '\'': '\'', '?': '?',
}

// unquote decodes a quoted string whose opening quote is gone, and returns what
// follows its closing quote and space.
func unquote(s string) (value, rest string, err error) {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		switch {
		case s[i] == '"':
			rest = s[i+1:]
			if rest != "" && rest[0] != ' ' {
				return "", "", errors.New("goes on after its closing quote; escape quotes inside")
			}
			return b.String(), rest, nil
		case s[i] != '\\' || i+1 == len(s):
			b.WriteByte(s[i])
			continue
		}
		i++
		if plain, ok := cEscapes[s[i]]; ok {
			b.WriteByte(plain)
			continue
		}
		start, base, digits := i, 8, 3
		if s[i] == 'x' {
			start, base, digits = i+1, 16, 2
		}
		end := start
		for end < len(s) && end < start+digits && isBaseDigit(s[end], base) {
			end++
		}
		c, err := strconv.ParseUint(s[start:end], base, 8)
		if err != nil {
			return "", "", errors.New("has an escape that C does not know; octal is at most \\377")
		}
		b.WriteByte(byte(c))
		i = end - 1
	}
	return "", "", errors.New("has no closing quote")
}

func isBaseDigit(c byte, base int) bool {
	if base == 8 {
		return '0' <= c && c <= '7'
	}
	return isDigit(c) || 'a' <= c|0x20 && c|0x20 <= 'f'
}
