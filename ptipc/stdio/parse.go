package stdio

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"strconv"
	"strings"
	"unicode/utf8"
)

// keyTransport is the STATUS key that names the factory (LINE-10).
const keyTransport = "TRANSPORT"

// A ParseError says why a line is not understood. The reader skips that line and
// goes on (LINE-1).
type ParseError struct {
	Keyword string // "" when the line is not even of the form of LINE-1
	Problem string

	line []byte
}

// Error repeats the line, secrets masked, shortened to 256 bytes.
func (e *ParseError) Error() string {
	// Masked before it is cut: a URL that is cut before its @ hides nothing. And
	// masked only here: a child that floods its host must not cost more than reading.
	line := shorten(string(Mask(e.line)), 256)
	return fmt.Sprintf("control line %q: %s", line, e.Problem)
}

// Parse reads a line that a child wrote, with or without its line end. A line
// that is too long gives [ErrTooLong], one that is not understood a
// [*ParseError], and one with an unknown keyword an [Unknown] (LINE-1, LINE-2).
func Parse(line []byte) (Message, error) { return parse(line, parseChild) }

// ParseHost reads a line that a host wrote, as Parse does for those of a child.
func ParseHost(line []byte) (Message, error) { return parse(line, parseHost) }

func parse(line []byte, arguments func(keyword, rest string) (Message, error)) (Message, error) {
	line = bytes.TrimSuffix(line, []byte("\n"))
	if len(line) >= MaxLine {
		return nil, ErrTooLong
	}
	line = bytes.TrimSuffix(line, []byte("\r"))
	keyword, rest, _ := strings.Cut(string(line), " ")
	fail := func(keyword, problem string) error {
		return &ParseError{Keyword: keyword, Problem: problem, line: bytes.Clone(line)}
	}
	switch {
	case !isKeyword(keyword):
		return nil, fail("", "it does not begin with a keyword of letters, digits, _ and - (LINE-1)")
	case bytes.IndexByte(line, 0) >= 0:
		return nil, fail("", "it holds a NUL (LINE-1)")
	case bytes.IndexByte(line, '\n') >= 0:
		return nil, fail("", "it is more than one line (LINE-1)")
	case !utf8.Valid(line):
		return nil, fail("", "it is not UTF-8 (LINE-1)")
	}
	m, err := arguments(keyword, rest)
	if err != nil {
		return nil, fail(keyword, err.Error())
	}
	return m, nil
}

// parseChild knows the keywords of children.
func parseChild(keyword, rest string) (Message, error) {
	switch keyword {
	case "VERSION":
		words := words(rest)
		if len(words) == 0 {
			return nil, errors.New("the version is missing (LINE-3)")
		}
		return Version{words[0]}, nil
	case "VERSION-ERROR":
		return VersionError{strings.Trim(rest, " ")}, nil
	case "ENV-ERROR":
		return EnvError{strings.Trim(rest, " ")}, nil
	case "PROXY-ERROR":
		return ProxyError{strings.Trim(rest, " ")}, nil
	case "CMETHOD":
		return parseCMethod(rest)
	case "CMETHOD-ERROR":
		return parseMethodError(rest)
	case "CMETHODS":
		return CMethodsDone{}, wantDone(rest)
	case "SMETHOD":
		return parseSMethod(rest)
	case "SMETHOD-ERROR":
		m, err := parseMethodError(rest)
		return SMethodError(m), err
	case "SMETHODS":
		return SMethodsDone{}, wantDone(rest)
	case "PROXY":
		return ProxyDone{}, wantDone(rest)
	case "LOG":
		return parseLog(rest)
	case "STATUS":
		return parseStatus(rest)
	case "STATS":
		return parseStatsReply(rest)
	case "CMESSAGE":
		return parseCMessage(rest)
	case "SMESSAGE":
		return parseSMessage(rest)
	}
	return Unknown{keyword, rest}, nil
}

// parseHost knows the keywords of hosts.
func parseHost(keyword, rest string) (Message, error) {
	switch keyword {
	case "STATS":
		return parseStatsRequest(rest)
	case "CMESSAGE":
		return parseCMessage(rest)
	case "SMESSAGE":
		return parseSMessage(rest)
	}
	return Unknown{keyword, rest}, nil
}

func parseStatsRequest(rest string) (Message, error) {
	words := words(rest)
	if len(words) == 0 {
		return nil, errors.New("the ID is missing (STAT-3)")
	}
	id, err := parseID(words[0])
	if err != nil {
		return nil, err
	}
	m := StatsRequest{ID: id}
	if len(words) > 1 {
		// Whatever names no connection is answered with null, so nothing is refused here.
		m.Client = words[1]
	}
	return m, nil
}

// words splits at runs of spaces.
func words(s string) []string {
	return strings.FieldsFunc(s, func(r rune) bool { return r == ' ' })
}

func wantDone(rest string) error {
	if words := words(rest); len(words) == 0 || words[0] != "DONE" {
		return errors.New("DONE is missing after the keyword")
	}
	return nil
}

func parseCMethod(rest string) (Message, error) {
	words := words(rest)
	if len(words) < 3 {
		return nil, fmt.Errorf("NAME PROTOCOL ADDR are wanted and there are %d words (LINE-4)", len(words))
	}
	if err := checkName(words[0]); err != nil {
		return nil, err
	}
	return CMethod{Name: words[0], Protocol: words[1], Addr: words[2], Args: findArgs(words[3:])}, nil
}

func parseLog(rest string) (Message, error) {
	attrs, err := parseAttrs(rest)
	if err != nil {
		return nil, err
	}
	severity, ok := Args(attrs).Get("SEVERITY")
	if !ok {
		return nil, errors.New("SEVERITY is missing (LINE-9)")
	}
	message, ok := Args(attrs).Get("MESSAGE")
	if !ok {
		return nil, errors.New("MESSAGE is missing (LINE-9)")
	}
	level, ok := parseSeverity(severity)
	if !ok {
		return nil, fmt.Errorf("the severity %.64q is not error, warning, notice, info or debug (LINE-9)", severity)
	}
	return Log{level, message}, nil
}

func parseSeverity(severity string) (slog.Level, bool) {
	for _, s := range severities {
		if strings.EqualFold(severity, s.name) { // LINE-9: in any case
			return s.level, true
		}
	}
	return 0, false
}

func parseStatus(rest string) (Message, error) {
	attrs, err := parseAttrs(rest)
	if err != nil {
		return nil, err
	}
	if len(attrs) == 0 {
		return nil, errors.New("it says nothing; K=V pairs are wanted (LINE-10)")
	}
	var m Status
	m.Transport, _ = Args(attrs).Get(keyTransport)
	for _, a := range attrs {
		if a.Key != keyTransport {
			m.Attrs = append(m.Attrs, a)
		}
	}
	return m, nil
}

func parseStatsReply(rest string) (Message, error) {
	word, text, _ := strings.Cut(strings.Trim(rest, " "), " ")
	id, err := parseID(word)
	if err != nil {
		return nil, err
	}
	text = strings.Trim(text, " ")
	if !json.Valid([]byte(text)) {
		return nil, errors.New("the statistics are not JSON (STAT-3)")
	}
	m := StatsReply{ID: id}
	if text != "null" {
		m.JSON = json.RawMessage(text)
	}
	return m, nil
}

func parseID(word string) (uint64, error) {
	id, err := strconv.ParseUint(word, 10, 64)
	if err != nil {
		return 0, fmt.Errorf("the ID %.64q is not a decimal number below 2^64 (STAT-3)", word)
	}
	return id, nil
}
