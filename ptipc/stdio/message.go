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

	"pthost/ptipc/localnet"
)

// MaxLine is the most bytes that a control line has, its LF included (LINE-1).
const MaxLine = 65536

// ErrTooLong says that a line has more than [MaxLine] bytes. A [Reader] has
// skipped it whole and goes on with the next one (LINE-1).
var ErrTooLong = errors.New("the control line is longer than 65,536 bytes")

// The PROTOCOLs of a CMETHOD line (LINE-4).
const (
	ProtocolSOCKS5 = "socks5" // for streams
	ProtocolTURN   = "turn"   // for datagrams (PKT-3)
)

// A Message is one control line. The types of this package are its only
// implementations.
type Message interface {
	// appendTo writes the line without its LF. What holds for every line, length
	// and forbidden bytes, is checked by Append.
	appendTo(dst []byte) ([]byte, error)
}

// Version is the line VERSION, the first of a child's start (LINE-3).
type Version struct {
	Version string // "1"; one word
}

// VersionError is the line VERSION-ERROR: the child speaks none of the host's
// versions, and its start is over (LINE-3, LINE-11).
type VersionError struct{ Text string }

// EnvError is the line ENV-ERROR: the child cannot use its environment, and its
// start is over (LINE-11).
type EnvError struct{ Text string }

// CMethod is the line CMETHOD: it announces one connection factory (LINE-4). A
// parsed one holds the child's words as they came: the reader decides about a
// protocol that it does not speak, and passes Addr to [localnet.ParseAddr].
type CMethod struct {
	Name     string // of the connection factory; see ValidName
	Protocol string // ProtocolSOCKS5 or ProtocolTURN
	Addr     string // loopback ip:port or unix:NAME (LINE-5)
	Args     Args   // LINE-6
}

// CMethodsDone is the line CMETHODS DONE: all announced sockets listen (LINE-7).
type CMethodsDone struct{}

// ProxyDone is the line PROXY DONE: the wire goes through the upstream proxy (PROXY-1).
type ProxyDone struct{}

// ProxyError is the line PROXY-ERROR: the child cannot use the upstream proxy (PROXY-1).
type ProxyError struct{ Text string }

// LevelNotice is the severity notice among the levels of slog, between
// [slog.LevelInfo] and [slog.LevelWarn] (LINE-9).
const LevelNotice = slog.Level(2)

// Log is the line LOG, for the operator (LINE-9).
type Log struct {
	Level   slog.Level // written as the severity at or below it, parsed to the level of its name
	Message string     // any bytes; those that a line cannot hold are escaped
}

// Status is the line STATUS: the progress of a bootstrap (LINE-10).
type Status struct {
	Transport string // the factory that is meant, "" when the child does not say
	Attrs     []KV   // in the order of the line; values can be any bytes
}

// KV is one key with its value, both without quotes and escapes.
type KV struct{ Key, Value string }

// StatsRequest is the line STATS from host to child (STAT-3).
type StatsRequest struct {
	ID     uint64
	Client string // "ip:port" or "@NAME" of one connection's client socket; "" asks for the totals
}

// StatsReply is the line STATS from child to host (STAT-3).
type StatsReply struct {
	ID   uint64          // that of the request
	JSON json.RawMessage // statistics (STAT-1, STAT-2); nil is null, a connection that the child does not know
}

// Unknown is a line with a keyword that this version does not know. A reader
// ignores it (LINE-2).
type Unknown struct {
	Keyword string
	Rest    string // what follows the space after the keyword, as it came
}

// Append appends the line of m, LF included, to dst. It refuses what a reader
// could not take: a line longer than [MaxLine] (an error that wraps
// [ErrTooLong]); LF, CR, NUL or bytes that are not UTF-8 outside the quoted
// strings of LOG and STATUS; names, addresses and keys outside their clauses;
// empty words. dst is returned unchanged then.
func Append(dst []byte, m Message) ([]byte, error) {
	start := len(dst)
	out, err := m.appendTo(dst)
	if err == nil {
		line := out[start:]
		switch {
		case len(line) >= MaxLine: // LINE-1
			err = fmt.Errorf("%w: %d bytes; shorten the text", ErrTooLong, len(line)+1)
		case bytes.ContainsAny(line, "\n\r\x00"):
			err = errors.New("the line would hold a LF, CR or NUL (LINE-1); use OneLine for texts")
		case !utf8.Valid(line):
			err = errors.New("the line would not be UTF-8 (LINE-1); use OneLine for texts")
		}
	}
	if err != nil {
		return dst[:start], fmt.Errorf("cannot write the control line %T: %w", m, err)
	}
	return append(out, '\n'), nil
}

// OneLine makes any text fit for the TEXT of a line: line ends and other control
// characters become spaces, bytes that are not UTF-8 become U+FFFD, and what is
// beyond 4,096 bytes is cut off.
func OneLine(text string) string {
	text = strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f {
			return ' '
		}
		return r
	}, strings.ToValidUTF8(text, "\uFFFD"))
	return strings.Trim(shorten(text, maxText), " ")
}

// maxText keeps texts for people well inside a line, however they are escaped.
const maxText = 4096

// shorten cuts text to at most limit bytes, at the start of a character.
func shorten(text string, limit int) string {
	if len(text) <= limit {
		return text
	}
	const mark = "…"
	end := limit - len(mark)
	for end > 0 && !utf8.RuneStart(text[end]) {
		end--
	}
	return text[:end] + mark
}

// ValidName reports whether name can name a connection factory: a letter or _,
// then letters, digits, _ and -, at most 64 bytes (LINE-4).
func ValidName(name string) bool {
	if name == "" || len(name) > 64 || name[0] == '-' || isDigit(name[0]) {
		return false
	}
	return isKeyword(name)
}

// isKeyword holds for the keywords of LINE-1.
func isKeyword(s string) bool {
	for i := range len(s) {
		if c := s[i]; !isAlnum(c) && c != '_' && c != '-' {
			return false
		}
	}
	return s != ""
}

func isAlnum(c byte) bool { return 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || isDigit(c) }

func isDigit(c byte) bool { return '0' <= c && c <= '9' }

func checkName(name string) error {
	if !ValidName(name) {
		return fmt.Errorf("the name %q is not one of LINE-4; begin with a letter or _, go on with letters, digits, _ and -, at most 64 bytes", name)
	}
	return nil
}

func (m Version) appendTo(dst []byte) ([]byte, error) {
	if !isKeyword(m.Version) {
		return nil, fmt.Errorf("the version %q is not one word of letters and digits (LINE-3)", m.Version)
	}
	return append(append(dst, "VERSION "...), m.Version...), nil
}

func (m VersionError) appendTo(dst []byte) ([]byte, error) {
	return appendText(dst, "VERSION-ERROR", m.Text)
}

func (m EnvError) appendTo(dst []byte) ([]byte, error) { return appendText(dst, "ENV-ERROR", m.Text) }

func (m ProxyError) appendTo(dst []byte) ([]byte, error) {
	return appendText(dst, "PROXY-ERROR", m.Text)
}

func appendText(dst []byte, keyword, text string) ([]byte, error) {
	if strings.Trim(text, " ") != text {
		return nil, fmt.Errorf("the text %q begins or ends with a space, which readers drop; use OneLine", shorten(text, 64))
	}
	dst = append(dst, keyword...)
	if text != "" {
		dst = append(append(dst, ' '), text...)
	}
	return dst, nil
}

func (m CMethod) appendTo(dst []byte) ([]byte, error) {
	if err := checkName(m.Name); err != nil {
		return nil, err
	}
	if m.Protocol != ProtocolSOCKS5 && m.Protocol != ProtocolTURN {
		return nil, fmt.Errorf("the protocol is %q; LINE-4 has only %s and %s", m.Protocol, ProtocolSOCKS5, ProtocolTURN)
	}
	addr, err := localnet.ParseAddr(m.Addr)
	if err != nil {
		return nil, fmt.Errorf("%w (LINE-5)", err)
	}
	if m.Protocol == ProtocolTURN {
		if addr.Unix() {
			return nil, fmt.Errorf("the address of a packet factory is %s, and has to be that of a UDP socket (PKT-3)", m.Addr)
		}
		if _, _, _, ok := m.Args.TURN(); !ok {
			return nil, errors.New("a packet factory needs username, password and realm in its ARGS (PKT-3)")
		}
	}
	dst = fmt.Appendf(dst, "CMETHOD %s %s %s", m.Name, m.Protocol, m.Addr)
	return m.Args.appendTo(dst)
}

func (CMethodsDone) appendTo(dst []byte) ([]byte, error) { return append(dst, "CMETHODS DONE"...), nil }

func (ProxyDone) appendTo(dst []byte) ([]byte, error) { return append(dst, "PROXY DONE"...), nil }

// severities holds the names of LINE-9, from the highest level down.
var severities = []struct {
	name  string
	level slog.Level
}{
	{"error", slog.LevelError},
	{"warning", slog.LevelWarn},
	{"notice", LevelNotice},
	{"info", slog.LevelInfo},
	{"debug", slog.LevelDebug},
}

func (m Log) appendTo(dst []byte) ([]byte, error) {
	name := "debug"
	for _, s := range severities {
		if m.Level >= s.level {
			name = s.name
			break
		}
	}
	return appendAttrs(append(dst, "LOG"...), []KV{{"SEVERITY", name}, {"MESSAGE", m.Message}})
}

func (m Status) appendTo(dst []byte) ([]byte, error) {
	dst = append(dst, "STATUS"...)
	if m.Transport != "" {
		if err := checkName(m.Transport); err != nil {
			return nil, err
		}
		dst = append(append(dst, " "+keyTransport+"="...), m.Transport...)
	} else if len(m.Attrs) == 0 {
		return nil, errors.New("the status says nothing; give it a transport or attributes (LINE-10)")
	}
	for _, a := range m.Attrs {
		if a.Key == keyTransport {
			return nil, errors.New("the key TRANSPORT stands among the attributes; put it into Status.Transport (LINE-10)")
		}
	}
	return appendAttrs(dst, m.Attrs)
}

func (m StatsRequest) appendTo(dst []byte) ([]byte, error) {
	dst = strconv.AppendUint(append(dst, "STATS "...), m.ID, 10)
	if m.Client == "" {
		return dst, nil
	}
	if strings.Contains(m.Client, " ") {
		return nil, fmt.Errorf("the client %q holds a space; ip:port or @NAME is wanted (STAT-3)", shorten(m.Client, 64))
	}
	return append(append(dst, ' '), m.Client...), nil
}

func (m StatsReply) appendTo(dst []byte) ([]byte, error) {
	dst = append(strconv.AppendUint(append(dst, "STATS "...), m.ID, 10), ' ')
	if m.JSON == nil {
		return append(dst, "null"...), nil
	}
	var compact bytes.Buffer
	if err := json.Compact(&compact, m.JSON); err != nil {
		return nil, fmt.Errorf("the statistics are not JSON (STAT-3): %w", err)
	}
	return append(dst, compact.Bytes()...), nil
}

func (m Unknown) appendTo(dst []byte) ([]byte, error) {
	if !isKeyword(m.Keyword) {
		return nil, fmt.Errorf("the keyword %q has other characters than letters, digits, _ and - (LINE-1)", shorten(m.Keyword, 64))
	}
	dst = append(dst, m.Keyword...)
	if m.Rest != "" {
		dst = append(append(dst, ' '), m.Rest...)
	}
	return dst, nil
}
