package stdio

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"unicode/utf8"

	"pthost/ptipc"
	"pthost/ptipc/localnet"
)

// The values of Host.Listen (ARG-5).
const (
	ListenUnix = "unix"
	ListenTCP  = "tcp"
)

// Host is the HOST object: what a host tells a child about itself (ARG-5). It
// hides the proxy when it is printed or logged.
type Host struct {
	Version []int   `json:"version,omitempty"` // the versions of the specification that the host speaks
	Listen  string  `json:"listen,omitempty"`  // ListenUnix or ListenTCP; "" leaves it to the child
	Proxy   string  `json:"proxy,omitempty"`   // URL of the upstream proxy, as it came; a secret (PROXY-3)
	UID     *uint32 `json:"uid,omitempty"`     // numeric user of the host
	Deliver string  `json:"deliver,omitempty"` // where a server brings connections: loopback ip:port or unix:NAME (SRV-3)
	Ends    int     `json:"ends,omitempty"`    // descriptor of the memory in which ends of streams are marked (SOCKS-20); 0 is none
}

// UnmarshalJSON ignores keys that it does not know and is strict about the types
// of those that it does (ARG-5). Errors never repeat a value.
func (h *Host) UnmarshalJSON(b []byte) error {
	// A map, because decoding into a struct takes keys in any case.
	keys := map[string]json.RawMessage{}
	if !isObject(b) || json.Unmarshal(b, &keys) != nil {
		return errors.New("HOST is not a JSON object (ARG-5)")
	}
	var host Host
	for _, key := range []struct {
		name   string
		target any
		want   string
	}{
		{"version", &host.Version, "a list of whole numbers"},
		{"listen", &host.Listen, "a string"},
		{"proxy", &host.Proxy, "a string"},
		{"uid", &host.UID, "a whole number from 0 to 4294967295"},
		{"deliver", &host.Deliver, "a string"},
		{"ends", &host.Ends, "a whole number"},
	} {
		if raw, ok := keys[key.name]; ok && json.Unmarshal(raw, key.target) != nil {
			return fmt.Errorf("the key %q of HOST must be %s (ARG-5)", key.name, key.want)
		}
	}
	if host.Listen != "" && host.Listen != ListenUnix && host.Listen != ListenTCP {
		return fmt.Errorf("the key %q of HOST must be %q or %q (ARG-5)", "listen", ListenUnix, ListenTCP)
	}
	if host.Deliver != "" {
		if _, err := localnet.ParseAddr(host.Deliver); err != nil {
			return fmt.Errorf("the key %q of HOST must be unix:NAME or a loopback ip:port (ARG-5, SRV-3)", "deliver")
		}
	}
	if host.Ends != 0 && host.Ends < 3 {
		return fmt.Errorf("the key %q of HOST must be the number of a descriptor above the standard streams (ARG-5)", "ends")
	}
	*h = host
	return nil
}

// String is the JSON text with the proxy masked.
func (h Host) String() string {
	b, err := json.Marshal(h)
	if err != nil {
		return err.Error()
	}
	return string(Mask(b))
}

// LogValue keeps the proxy out of logs (PROXY-3).
func (h Host) LogValue() slog.Value { return slog.StringValue(h.String()) }

// MaxLaunch is the most bytes that a [Launch] has as a line, LF included (ARG-4).
const MaxLaunch = 1 << 20

// Launch is the first line of standard input of a child whose CONFIG is "-" (ARG-4).
type Launch struct {
	Config ptipc.Opaque `json:"config"`
	Host   Host         `json:"host"`
}

// String hides the configuration, which holds secrets, and the proxy.
func (l Launch) String() string { return fmt.Sprintf(`{"config":***,"host":%s}`, l.Host) }

// LogValue keeps the configuration out of logs.
func (l Launch) LogValue() slog.Value { return slog.StringValue(l.String()) }

// Append appends the line, LF included, to dst. A configuration that is not one
// JSON object in UTF-8 (ARG-3), and a line longer than [MaxLaunch] (ARG-4), are
// refused.
func (l Launch) Append(dst []byte) ([]byte, error) {
	if l.Config != nil && !isObject(l.Config) {
		return dst, errors.New("cannot write the launch line: the configuration is not a JSON object in UTF-8 (ARG-3)")
	}
	line, err := json.Marshal(l) // compacts: no LF is left in the configuration
	if err != nil {
		return dst, fmt.Errorf("cannot write the launch line: %w", err)
	}
	if len(line) >= MaxLaunch {
		return dst, fmt.Errorf("cannot write the launch line: it has %d bytes, at most %d go through (ARG-4)", len(line)+1, MaxLaunch)
	}
	return append(append(dst, line...), '\n'), nil
}

// ReadLaunch reads the first line. Every error is final and wraps
// [ptipc.ExitDataErr], with which the child exits (ARG-4); none repeats the line.
// The time limit of ARG-4 is the caller's.
func (r *Reader) ReadLaunch() (Launch, error) {
	var line []byte
	for {
		part, err := r.r.ReadSlice('\n')
		line = append(line, part...)
		if len(line) > MaxLaunch {
			return Launch{}, fmt.Errorf("the first line of standard input is longer than %d bytes (ARG-4): %w", MaxLaunch, ptipc.ExitDataErr)
		}
		if err == nil {
			break
		}
		if !errors.Is(err, bufio.ErrBufferFull) {
			r.err = endOf(line, err)
			return Launch{}, fmt.Errorf("standard input ended before its first line (ARG-4): %w: %w", r.err, ptipc.ExitDataErr)
		}
	}
	launch, err := parseLaunch(line)
	if err != nil {
		return Launch{}, fmt.Errorf("the first line of standard input: %w: %w", err, ptipc.ExitDataErr)
	}
	return launch, nil
}

func parseLaunch(line []byte) (Launch, error) {
	keys := map[string]json.RawMessage{}
	if !isObject(line) || json.Unmarshal(line, &keys) != nil {
		return Launch{}, errors.New(`it is not {"config":…,"host":…} in UTF-8 (ARG-4)`)
	}
	if !isObject(keys["config"]) {
		return Launch{}, errors.New(`its key "config" is not a JSON object (ARG-3)`)
	}
	launch := Launch{Config: ptipc.Opaque(keys["config"])}
	if host, ok := keys["host"]; ok {
		if err := launch.Host.UnmarshalJSON(host); err != nil {
			return Launch{}, err
		}
	}
	return launch, nil
}

// isObject holds for one JSON object in UTF-8.
func isObject(b []byte) bool {
	return bytes.HasPrefix(bytes.TrimLeft(b, " \t\r\n"), []byte("{")) && utf8.Valid(b) && json.Valid(b)
}
