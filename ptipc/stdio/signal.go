package stdio

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"unicode/utf8"

	"pthost/ptipc"
)

// CMessage is the line CMESSAGE: a signal on its way from the client of a
// transport to its server. A client's child writes it, a server's child reads it
// (SIG-1); [Parse] and [ParseHost] both know it, and who reads decides which way is
// meant.
type CMessage struct{ ptipc.Message }

// SMessage is the line SMESSAGE: a signal on its way from the server of a
// transport to its client. A server's child writes it, a client's child reads it
// (SIG-1).
type SMessage struct{ ptipc.Message }

// MaxSignal is the most bytes that a signal has as JSON (SIG-4).
const MaxSignal = 32768

// AppendSignal appends a signal as JSON on one line, without an LF, to dst: what
// stands after CMESSAGE and SMESSAGE, and what couriers carry. It refuses what
// [ParseSignal] would not take. dst is returned unchanged then, and the error
// repeats nothing of the body.
func AppendSignal(dst []byte, m ptipc.Message) ([]byte, error) {
	if !utf8.ValidString(m.Peer) {
		return dst, errors.New(`the "peer" of the message is not UTF-8 (SIG-1)`)
	}
	compact := false
	if m.Body != nil {
		var ok bool
		if ok, compact = scanObject(m.Body); !ok && !isObject(m.Body) {
			return dst, errors.New(`the "body" of the message is not one JSON object in UTF-8 (SIG-1)`)
		}
	}
	var b bytes.Buffer
	encoder := json.NewEncoder(&b)
	encoder.SetEscapeHTML(false) // would make a message of the greatest size too long
	err := encoder.Encode(ptipc.Message{Peer: m.Peer})
	if err == nil && m.Body != nil { // in place of the {} that is there
		b.Truncate(b.Len() - len("{}}\n"))
		if compact {
			b.Write(m.Body)
		} else {
			err = json.Compact(&b, m.Body)
		}
		b.WriteString("}\n")
	}
	if err != nil {
		return dst, fmt.Errorf("the message cannot be written: %w", err)
	}
	text := bytes.TrimSuffix(b.Bytes(), []byte("\n"))
	if _, err := ParseSignal(text); err != nil {
		return dst, err
	}
	return append(dst, text...), nil
}

// ParseSignal reads a signal, {"body":{…},"peer":"…"}, white space around it
// allowed. It refuses keys that it does not know, since it could not hand them on
// and a message goes on whole or not at all (SIG-1); keys that occur twice, in the
// body too; and what is longer than [MaxSignal] (SIG-4). The error repeats nothing of the
// body, which only the transport knows.
func ParseSignal(text []byte) (ptipc.Message, error) {
	if len(text) > MaxSignal {
		return ptipc.Message{}, fmt.Errorf("the message has %d bytes, at most %d are carried (SIG-4)", len(text), MaxSignal)
	}
	m, ok := scanSignal(text)
	if ok {
		return m, nil
	}
	m = ptipc.Message{}
	err := ptipc.Opaque(text).Decode(&m)
	if err == nil {
		return m, nil
	}
	problem := "it cannot be read"
	var config *ptipc.ConfigError
	if errors.As(err, &config) {
		place := "one of its keys"
		switch {
		case config.Pointer == "":
			place = "it"
		case config.Pointer == "/body" || config.Pointer == "/peer":
			place = config.Pointer
		case strings.HasPrefix(config.Pointer, "/body/"):
			place = "a key in /body"
		}
		problem = place + " " + config.Problem
	}
	return ptipc.Message{}, fmt.Errorf(`the message is not {"body":{…},"peer":"…"} (SIG-1): %s`, problem)
}

func (m CMessage) appendTo(dst []byte) ([]byte, error) {
	return AppendSignal(append(dst, "CMESSAGE "...), m.Message)
}

func (m SMessage) appendTo(dst []byte) ([]byte, error) {
	return AppendSignal(append(dst, "SMESSAGE "...), m.Message)
}

func parseCMessage(rest string) (Message, error) {
	m, err := ParseSignal([]byte(strings.Trim(rest, " ")))
	if err != nil {
		return nil, err
	}
	return CMessage{m}, nil
}

func parseSMessage(rest string) (Message, error) {
	m, err := ParseSignal([]byte(strings.Trim(rest, " ")))
	if err != nil {
		return nil, err
	}
	return SMessage{m}, nil
}
