package sip003

import (
	"errors"
	"fmt"
	"strings"
	"unicode/utf8"
)

// maxOptions bounds the options in bytes. A longer list would not fit into the one
// string that Linux allows a variable of the environment to be.
const maxOptions = 64 << 10

// An Option is one KEY=VALUE of SS_PLUGIN_OPTIONS, or a KEY that stands alone.
type Option struct {
	Key   string
	Value string
	// Bare is a KEY without "=". It has no Value.
	Bare bool
}

// Options are the options in their order. No key occurs twice.
type Options []Option

// ParseOptions reads the text of SS_PLUGIN_OPTIONS (SIP-2). Errors name the key and
// never repeat a value, which may be a secret.
func ParseOptions(text string) (Options, error) {
	switch {
	case len(text) > maxOptions:
		return nil, fmt.Errorf("the options have %d bytes, and at most %d are taken (SIP-2)", len(text), maxOptions)
	case !utf8.ValidString(text):
		return nil, errors.New("the options are not UTF-8 (SIP-2)")
	case strings.IndexByte(text, 0) >= 0:
		return nil, errors.New("the options hold a NUL, which no environment can carry (SIP-2)")
	}
	var options Options
	seen := map[string]bool{}
	for text != "" {
		key, end, rest, err := unescape(text, "=;")
		if err != nil {
			return nil, err
		}
		if key == "" && end != '=' { // a semicolon at the end, or two of them
			text = rest
			continue
		}
		option := Option{Key: key, Bare: end != '='}
		if !option.Bare {
			if option.Value, _, rest, err = unescape(rest, ";"); err != nil {
				return nil, err
			}
		}
		switch {
		case key == "":
			return nil, errors.New(`an option has no key before its "=" (SIP-2)`)
		case seen[key]:
			return nil, fmt.Errorf("the option %q occurs twice; keep one of them (SIP-2)", key)
		}
		seen[key] = true
		options = append(options, option)
		text = rest
	}
	return options, nil
}

// unescape reads up to one of the terminators that no backslash stands before, and
// returns what is read, the terminator (0 at the end of the text), and what follows.
func unescape(text, terminators string) (word string, end byte, rest string, err error) {
	var b strings.Builder
	for i := 0; i < len(text); i++ {
		switch c := text[i]; {
		case strings.IndexByte(terminators, c) >= 0:
			return b.String(), c, text[i+1:], nil
		case c != '\\':
			b.WriteByte(c)
		case i+1 == len(text):
			return "", 0, "", errors.New(`the options end in a "\" that escapes nothing; write "\\" for a backslash (SIP-2)`)
		default:
			i++
			b.WriteByte(text[i])
		}
	}
	return b.String(), 0, "", nil
}

// escaper escapes the equals sign in values too (SIP-3): a reader of everyday use,
// simple-obfs, takes the last unescaped one for the one that ends the key.
var escaper = strings.NewReplacer(`\`, `\\`, `;`, `\;`, `=`, `\=`)

// Encode writes the options as SS_PLUGIN_OPTIONS carries them (SIP-3). What
// [ParseOptions] would not read the same is an error.
func (o Options) Encode() (string, error) {
	var b strings.Builder
	seen := map[string]bool{}
	for i, option := range o {
		switch {
		case option.Key == "":
			return "", errors.New("an option has no key (SIP-2)")
		case seen[option.Key]:
			return "", fmt.Errorf("the option %q occurs twice (SIP-2)", option.Key)
		case option.Bare && option.Value != "":
			return "", fmt.Errorf("the option %q stands alone and has a value", option.Key)
		case !utf8.ValidString(option.Key+option.Value) || strings.IndexByte(option.Key+option.Value, 0) >= 0:
			return "", fmt.Errorf("the option %q or its value is not UTF-8 without NUL (SIP-2)", option.Key)
		}
		seen[option.Key] = true
		if i > 0 {
			b.WriteByte(';')
		}
		b.WriteString(escaper.Replace(option.Key))
		if !option.Bare {
			b.WriteString("=" + escaper.Replace(option.Value))
		}
	}
	if b.Len() > maxOptions {
		return "", fmt.Errorf("the options have %d bytes, and at most %d are taken (SIP-2)", b.Len(), maxOptions)
	}
	return b.String(), nil
}

// Cut takes the option with this key out of the list.
func (o *Options) Cut(key string) (option Option, found bool) {
	for i, option := range *o {
		if option.Key == key {
			*o = append((*o)[:i:i], (*o)[i+1:]...)
			return option, true
		}
	}
	return Option{}, false
}
