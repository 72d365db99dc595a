package ptipc

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"syscall"
)

// A Class says what kind of failure ended a dial. It is an error itself, it is
// the reply code on the wire (ERR-1), and errors.Is gives the same answer for it
// inside the transport's process and in the application.
type Class uint8

// The classes of ERR-1.
const (
	ErrGeneral            Class = 0x01
	ErrNotAllowed         Class = 0x02
	ErrNetworkUnreachable Class = 0x03
	ErrHostUnreachable    Class = 0x04
	ErrRefused            Class = 0x05
	ErrTimedOut           Class = 0x06
	ErrCommand            Class = 0x07
	ErrAddressType        Class = 0x08
	ErrSettingsTooLarge   Class = 0x10
	ErrSettingsTimedOut   Class = 0x11
	ErrSettingsNotJSON    Class = 0x12
	ErrSettingsRefused    Class = 0x13
)

var classText = map[Class]string{
	ErrGeneral:            "general failure",
	ErrNotAllowed:         "destination not allowed",
	ErrNetworkUnreachable: "network unreachable",
	ErrHostUnreachable:    "host unreachable",
	ErrRefused:            "connection refused",
	ErrTimedOut:           "timed out",
	ErrCommand:            "command not supported",
	ErrAddressType:        "address type not supported",
	ErrSettingsTooLarge:   "connection settings too large",
	ErrSettingsTimedOut:   "connection settings came too late",
	ErrSettingsNotJSON:    "connection settings are not a JSON object",
	ErrSettingsRefused:    "connection settings refused by the transport",
}

func (c Class) Error() string {
	if s, ok := classText[c]; ok {
		return s
	}
	return fmt.Sprintf("failure of unknown class 0x%02x", uint8(c))
}

// Timeout makes a Class answer the net.Error question.
func (c Class) Timeout() bool { return c == ErrTimedOut || c == ErrSettingsTimedOut }

// Known reports whether c is one of the classes of ERR-1.
func (c Class) Known() bool { _, ok := classText[c]; return ok }

type classified struct {
	class Class
	err   error
}

func (e *classified) Error() string        { return e.err.Error() }
func (e *classified) Unwrap() error        { return e.err }
func (e *classified) Is(target error) bool { c, ok := target.(Class); return ok && c == e.class }
func (e *classified) Timeout() bool        { return e.class.Timeout() }

// Classify makes errors.Is(err, ClassOf(err)) true, keeping text and chain.
// Transports pass what they got from the network through it. nil stays nil.
func Classify(err error) error {
	if err == nil {
		return nil
	}
	c := ClassOf(err)
	if errors.Is(err, c) {
		return err
	}
	return &classified{class: c, err: err}
}

// WithClass is err with its class decided by the caller, who knows better than
// the chain of causes does.
func WithClass(c Class, err error) error { return &classified{class: c, err: err} }

// ClassOf finds the class of an error from the types in its chain, never from
// its text (ERR-2). An error that says nothing is ErrGeneral.
func ClassOf(err error) Class {
	var own *classified
	if errors.As(err, &own) {
		return own.class
	}
	var c Class
	if errors.As(err, &c) && c.Known() {
		return c
	}
	var config *ConfigError
	if errors.As(err, &config) {
		return ErrSettingsRefused
	}
	var errno syscall.Errno
	if errors.As(err, &errno) {
		if c, ok := classOfErrno(errno); ok {
			return c
		}
	}
	var dns *net.DNSError
	if errors.As(err, &dns) {
		if dns.IsTimeout {
			return ErrTimedOut
		}
		return ErrHostUnreachable
	}
	var addr *net.AddrError
	if errors.As(err, &addr) {
		return ErrAddressType
	}
	if errors.Is(err, context.DeadlineExceeded) || errors.Is(err, os.ErrDeadlineExceeded) {
		return ErrTimedOut
	}
	var netErr net.Error
	if errors.As(err, &netErr) && netErr.Timeout() {
		return ErrTimedOut
	}
	return ErrGeneral
}

func classOfErrno(errno syscall.Errno) (Class, bool) {
	switch errno {
	case syscall.ECONNREFUSED:
		return ErrRefused, true
	case syscall.ENETUNREACH, syscall.ENETDOWN:
		return ErrNetworkUnreachable, true
	case syscall.EHOSTUNREACH:
		return ErrHostUnreachable, true
	case syscall.ETIMEDOUT:
		return ErrTimedOut, true
	case syscall.EACCES, syscall.EPERM:
		return ErrNotAllowed, true
	case syscall.EAFNOSUPPORT:
		return ErrAddressType, true
	default:
		return 0, false
	}
}

// A ConfigError says what is wrong with a JSON document, where, and what to do
// (ERR-3). It crosses from child to host in a CMETHOD-ERROR line.
type ConfigError struct {
	Pointer string `json:"pointer"`          // RFC 6901; "" is the whole document
	Value   string `json:"value,omitempty"`  // what was found, shortened; masked under a secret's name
	Problem string `json:"problem"`          // what is wrong with it
	Remedy  string `json:"remedy,omitempty"` // what would be right
}

func (e *ConfigError) Error() string {
	var b strings.Builder
	if e.Pointer == "" {
		b.WriteString("the document")
	} else {
		b.WriteString(e.Pointer)
	}
	if e.Value != "" {
		b.WriteString(" = " + e.Value)
	}
	b.WriteString(": " + e.Problem)
	if e.Remedy != "" {
		b.WriteString("; " + e.Remedy)
	}
	return b.String()
}
