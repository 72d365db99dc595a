package stdio

import (
	"encoding/json"
	"regexp"
	"strings"
)

// secretWord finds what makes a key speak of a secret: the words of CFG-2 and
// those of credentials.
const secretWord = `(?i:pass|secret|token|key|psk|private|credential|cookie|username|realm)`

var (
	// secretKey knows a key by itself. The URL of a proxy is a secret too (PROXY-3),
	// and so is what stands under a key with escapes that could spell anything.
	secretKey = regexp.MustCompile(secretWord + `|(?i:proxy)|` + hidden.String())
	// secretPair finds such a key with its = or : in text of any kind, through the
	// quotes, brackets and backslashes that may stand between, and whatever else the key
	// is made of.
	secretPair = regexp.MustCompile(secretWord + `[^\s=:]*["'\\\s\])]*[=:]`)
	// hidden finds escapes of JSON and C.
	hidden = regexp.MustCompile(`\\[0-7uUxX]`)
	// authority finds where the user and password of a URL begin, also where JSON
	// has escaped the slashes.
	authority = regexp.MustCompile(`:\\?/\\?/`)
)

const masked = "***"

// Mask returns a copy of a line, control line or [Launch], that can go into a
// trace: the values of keys that speak of a secret, in ARGS, K=V pairs and JSON,
// the user and password of URLs, and the signals of CMESSAGE and SMESSAGE whole
// are replaced by ***. It errs on the side of
// hiding: in free text and in what is not well formed, everything after such a
// key goes. Masking again changes nothing.
func Mask(line []byte) []byte { return []byte(mask(string(line))) }

func mask(line string) string {
	if keyword := messageKeyword(line); keyword != "" {
		// Only the transport knows what is a secret in the body, so all of it goes.
		if len(line) > len(keyword) {
			return keyword + " " + masked
		}
		return line
	}
	if start := strings.IndexByte(line, '{'); start >= 0 && json.Valid([]byte(line[start:])) {
		head, cut := maskText(line[:start])
		if cut {
			return head
		}
		return head + maskJSON(line[start:])
	}
	keyword, rest, _ := strings.Cut(line, " ")
	if keyword == "LOG" || keyword == "STATUS" {
		if attrs, err := parseAttrs(rest); err == nil {
			return maskAttrs(keyword, rest, attrs)
		}
	}
	if start := strings.Index(line, " "+argsPrefix); start >= 0 {
		start += len(" " + argsPrefix)
		head, cut := maskText(line[:start])
		if cut {
			return head
		}
		return head + maskArgs(line[start:])
	}
	text, _ := maskText(line)
	return text
}

// messageKeyword returns the keyword of CMESSAGE and SMESSAGE lines, with the spaces
// before it, also where the line is not well formed. It is "" for all others.
func messageKeyword(line string) string {
	start := len(line) - len(strings.TrimLeft(line, " \t"))
	end := start + len("CMESSAGE")
	if len(line) < end || !strings.EqualFold(line[start:end], "CMESSAGE") && !strings.EqualFold(line[start:end], "SMESSAGE") {
		return ""
	}
	return line[:end]
}

// maskText masks text without structure. cut says that a key took everything
// after it along, so that what follows the text must go too.
func maskText(text string) (out string, cut bool) {
	text = maskURL(text)
	end := -1
	if pair := secretPair.FindStringIndex(text); pair != nil {
		end = pair[1]
	}
	if escape := hidden.FindStringIndex(text); escape != nil && (end < 0 || escape[0] < end) {
		end = escape[0]
	}
	if end < 0 {
		return text, false
	}
	return text[:end] + masked, true
}

// maskURL hides everything from the first "://" to the last "@": in a URL that
// was put together without escaping, a password can hold any character.
func maskURL(text string) string {
	start, end := authority.FindStringIndex(text), strings.LastIndexByte(text, '@')
	if start == nil || end < start[1] {
		return text
	}
	return text[:start[1]] + masked + text[end:]
}

// maskAttrs leaves the arguments of a LOG or STATUS line as they are when they
// hold nothing to mask.
func maskAttrs(keyword, rest string, attrs []KV) string {
	out, changed := []byte(keyword), false
	for i, a := range attrs {
		key, cut := maskText(a.Key)
		value := masked
		if !cut && !secretKey.MatchString(a.Key) {
			value, cut = maskText(a.Value)
		}
		changed = changed || key != a.Key || value != a.Value || cut && i+1 < len(attrs)
		out = appendValue(append(append(append(out, ' '), key...), '='), value)
		if cut {
			break
		}
	}
	if !changed {
		return keyword + " " + rest
	}
	return string(out)
}

// maskArgs takes what follows "ARGS:" to the end of the line: behind a space may
// stand the rest of a value that should have had none.
func maskArgs(args string) string {
	var b strings.Builder
	for more := true; more; {
		var item string
		item, args, more = cutUnescaped(args, ',')
		key, value, pair := cutUnescaped(item, '=')
		item, cut := maskArg(key)
		if pair && !cut {
			if secretKey.MatchString(unescapeArg(key)) {
				value = masked
			} else {
				value, cut = maskArg(value)
			}
			item += "=" + value
		}
		b.WriteString(item)
		if cut {
			break
		}
		if more {
			b.WriteByte(',')
		}
	}
	// Once more over all of it, for a URL with a comma that was not escaped.
	return maskURL(b.String())
}

// maskArg masks one raw key or value, and leaves it as it is when nothing was masked.
func maskArg(raw string) (out string, cut bool) {
	plain := unescapeArg(raw)
	text, cut := maskText(plain)
	if text != plain {
		return argsEscaper.Replace(text), cut
	}
	return raw, cut
}

// maskJSON takes a valid JSON text and keeps all of it but what is masked.
func maskJSON(s string) string {
	var b strings.Builder
	for i := 0; i < len(s); {
		if s[i] != '"' {
			b.WriteByte(s[i])
			i++
			continue
		}
		raw := jsonValue(s[i:])
		i += len(raw)
		var text string
		_ = json.Unmarshal([]byte(raw), &text) // a string of a valid text
		if plain, _ := maskText(text); plain != text {
			quoted, _ := json.Marshal(plain) // a string always marshals
			raw = string(quoted)
		}
		b.WriteString(raw)
		next := strings.TrimLeft(s[i:], " \t\r\n")
		if strings.HasPrefix(next, ":") && secretKey.MatchString(text) {
			b.WriteString(`:"` + masked + `"`)
			value := strings.TrimLeft(next[1:], " \t\r\n")
			i = len(s) - len(value) + len(jsonValue(value))
		}
	}
	return b.String()
}

// jsonValue returns the JSON value that the valid text s begins with.
func jsonValue(s string) string {
	decoder := json.NewDecoder(strings.NewReader(s))
	var raw json.RawMessage
	_ = decoder.Decode(&raw) // the text is valid
	return s[:decoder.InputOffset()]
}
