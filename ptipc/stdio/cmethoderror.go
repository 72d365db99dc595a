package stdio

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"strings"

	"pthost/ptipc"
)

// CMethodError is the line CMETHOD-ERROR: one factory could not start (LINE-8).
// It is an error too, with the same answers in the application as in the child:
// errors.Is finds its class (ERR-2), errors.As the [*ptipc.ConfigError] (ERR-3).
type CMethodError struct {
	Name    string             // of the factory
	Class   ptipc.Class        // ERR-1
	Message string             // for people
	Config  *ptipc.ConfigError // what is wrong with the configuration, nil when something else is
}

// NewCMethodError describes for the host why the factory name could not start.
// Of an over-long message only the beginning goes over the line.
func NewCMethodError(name string, err error) CMethodError {
	m := CMethodError{Name: name, Class: ptipc.ClassOf(err), Message: shorten(err.Error(), maxText)}
	errors.As(err, &m.Config)
	return m
}

// Error is the message under the name of the factory, with what is wrong with the
// configuration if the message does not say it (ERR-3).
func (m CMethodError) Error() string {
	text := m.Message
	switch {
	case m.Config == nil:
	case text == "":
		text = m.Config.Error()
	case !strings.Contains(text, m.Config.Error()):
		text += ": " + m.Config.Error()
	}
	if text == "" {
		text = m.Class.Error()
	}
	if m.Name == WholeTransport {
		return text
	}
	return m.Name + ": " + text
}

// Unwrap returns the class and the configuration error.
func (m CMethodError) Unwrap() []error {
	if m.Config != nil {
		return []error{m.Class, m.Config}
	}
	return []error{m.Class}
}

// errorText is the JSON of LINE-8.
type errorText struct {
	Class   *int    `json:"class,omitempty"`
	Message string  `json:"message"`
	Pointer *string `json:"pointer,omitempty"` // "" is the whole document, so absence must show
	Value   any     `json:"value,omitempty"`
	Problem string  `json:"problem,omitempty"`
	Remedy  string  `json:"remedy,omitempty"`
}

func (m CMethodError) appendTo(dst []byte) ([]byte, error) { return m.appendAs(dst, "CMETHOD-ERROR") }

func (m CMethodError) appendAs(dst []byte, keyword string) ([]byte, error) {
	if err := checkName(m.Name); err != nil {
		return nil, err
	}
	if !m.Class.Known() {
		return nil, fmt.Errorf("the class %d is none of ERR-1; use ptipc.ClassOf", uint8(m.Class))
	}
	if m.Message == "" && m.Config == nil {
		return nil, errors.New("the message is empty (LINE-8)")
	}
	class := int(m.Class)
	text := errorText{Class: &class, Message: m.Message}
	if m.Config != nil {
		text.Pointer, text.Problem, text.Remedy = &m.Config.Pointer, m.Config.Problem, m.Config.Remedy
		if m.Config.Value != "" {
			text.Value = m.Config.Value
		}
	}
	var b bytes.Buffer
	encoder := json.NewEncoder(&b)
	encoder.SetEscapeHTML(false)
	if err := encoder.Encode(text); err != nil {
		return nil, err
	}
	dst = fmt.Appendf(dst, "%s %s ", keyword, m.Name)
	return append(dst, bytes.TrimSuffix(b.Bytes(), []byte("\n"))...), nil
}

func parseMethodError(rest string) (CMethodError, error) {
	name, text, _ := strings.Cut(strings.Trim(rest, " "), " ")
	if err := checkName(name); err != nil {
		return CMethodError{}, err
	}
	return parseErrorText(name, strings.Trim(text, " ")), nil
}

// parseErrorText takes text that is not the JSON of LINE-8 as the message.
func parseErrorText(name, text string) CMethodError {
	m := CMethodError{Name: name, Class: ptipc.ErrGeneral, Message: text}
	var t errorText
	if !strings.HasPrefix(text, "{") || json.Unmarshal([]byte(text), &t) != nil {
		return m
	}
	if t.Pointer != nil || t.Problem != "" {
		m.Config = &ptipc.ConfigError{Problem: t.Problem, Remedy: t.Remedy}
		if t.Pointer != nil {
			m.Config.Pointer = *t.Pointer
		}
		switch value := t.Value.(type) {
		case nil:
		case string:
			m.Config.Value = value
		default:
			// LINE-8 does not say what type a value has: a child may give it as it stood.
			raw, _ := json.Marshal(value)
			m.Config.Value = string(raw)
		}
		m.Class = ptipc.ClassOf(m.Config)
	}
	if t.Message != "" || m.Config != nil {
		m.Message = t.Message
	}
	if t.Class != nil {
		// A class of a later version is a failure all the same.
		m.Class = ptipc.ErrGeneral
		if c := *t.Class; 0 <= c && c <= 0xff && ptipc.Class(c).Known() {
			m.Class = ptipc.Class(c)
		}
	}
	return m
}
