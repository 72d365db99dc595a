package pt1

import (
	"encoding/json"
	"errors"
	"maps"
	"net"
	"slices"
	"strconv"
	"strings"

	"pthost/adapters/pt1/wire"
	"pthost/ptipc"
)

// The settings that name the destination (PT1-4).
const (
	keyHost = "host"
	keyPort = "port"
)

// Nowhere is the destination for transports that need none, by an old convention of
// bridge lines: an address that belongs to nobody (PT1-4).
const Nowhere = "192.0.2.3:80"

// settings are those of one connection.
type settings struct {
	host, port string // "" when they were not given
	args       wire.Args
}

// readSettings reads the settings of a connection on top of those of its transport.
func readSettings(defaults, own ptipc.Opaque) (settings, error) {
	var all, more map[string]json.RawMessage
	if err := defaults.Decode(&all); err != nil {
		return settings{}, err
	}
	if err := own.Decode(&more); err != nil {
		return settings{}, err
	}
	if all == nil {
		all = map[string]json.RawMessage{}
	}
	maps.Copy(all, more)
	var s settings
	var err error
	if s.host, err = takeHost(all); err != nil {
		return settings{}, err
	}
	if s.port, err = takePort(all); err != nil {
		return settings{}, err
	}
	if (s.host == "") != (s.port == "") {
		missing, other := keyPort, keyHost
		if s.host == "" {
			missing, other = other, missing
		}
		return settings{}, &ptipc.ConfigError{Pointer: "/" + missing, Problem: "is missing beside " + other, Remedy: "give both: they are the server's; or neither, for a transport that needs none"}
	}
	s.args, err = argsOf(all)
	return s, err
}

func takeHost(all map[string]json.RawMessage) (string, error) {
	raw, ok := all[keyHost]
	if !ok {
		return "", nil
	}
	delete(all, keyHost)
	var name string
	if err := json.Unmarshal(raw, &name); err != nil || name == "" || strings.ContainsAny(name, "[]") {
		return "", &ptipc.ConfigError{Pointer: "/" + keyHost, Value: short(raw), Problem: "is not a name or an address", Remedy: "write that of the server as a string, without a port or brackets"}
	}
	return name, nil
}

func takePort(all map[string]json.RawMessage) (string, error) {
	raw, ok := all[keyPort]
	if !ok {
		return "", nil
	}
	delete(all, keyPort)
	text := string(raw)
	_ = json.Unmarshal(raw, &text) // a string serves as well
	if n, err := strconv.ParseUint(text, 10, 16); err != nil || n == 0 {
		return "", &ptipc.ConfigError{Pointer: "/" + keyPort, Value: short(raw), Problem: "is not a port", Remedy: "give a number from 1 to 65535"}
	}
	return text, nil
}

// readArgs reads options, of which none has a meaning here.
func readArgs(o ptipc.Opaque) (wire.Args, error) {
	var all map[string]json.RawMessage
	if err := o.Decode(&all); err != nil {
		return nil, err
	}
	return argsOf(all)
}

// argsOf makes arguments of settings, ordered by their keys (PT1-4).
func argsOf(all map[string]json.RawMessage) (wire.Args, error) {
	var args wire.Args
	for _, key := range slices.Sorted(maps.Keys(all)) {
		at := "/" + escapePointer(key)
		if key == "" {
			return nil, &ptipc.ConfigError{Pointer: at, Problem: "has no name, and cannot be handed to a managed transport", Remedy: "remove it"}
		}
		raw := all[key]
		var list []json.RawMessage
		if raw[0] != '[' || json.Unmarshal(raw, &list) != nil {
			list = []json.RawMessage{raw}
		}
		for _, raw := range list {
			value, ok := scalar(raw)
			if !ok { // the value may be a secret
				return nil, &ptipc.ConfigError{Pointer: at, Problem: "cannot be handed to a managed transport, which knows texts alone", Remedy: "write a string, a number, true or false, or a list of these"}
			}
			args = append(args, wire.Arg{Key: key, Value: value})
		}
	}
	return args, nil
}

// scalar is the text of a string, or a number or boolean as it stands.
func scalar(raw json.RawMessage) (string, bool) {
	switch raw[0] {
	case '"':
		var text string
		return text, json.Unmarshal(raw, &text) == nil
	case '{', '[', 'n':
		return "", false
	}
	return string(raw), true
}

// destination is what goes into CONNECT: that of the dial, of the settings, or none.
func (s settings) destination(dest string) (string, error) {
	switch {
	case dest != "" && s.host != "":
		return "", &ptipc.ConfigError{Pointer: "/" + keyHost, Value: strconv.Quote(s.host), Problem: "is a second destination: the factory was made free, and the connection has its own", Remedy: "remove host and port"}
	case dest != "":
		return dest, nil
	case s.host != "":
		return net.JoinHostPort(s.host, s.port), nil
	}
	return Nowhere, nil
}

// under moves the place of a configuration error.
func under(pointer string, err error) error {
	var config *ptipc.ConfigError
	if !errors.As(err, &config) {
		return err
	}
	moved := *config
	moved.Pointer = pointer + config.Pointer
	return &moved
}

func short(raw []byte) string {
	if len(raw) > 64 {
		return string(raw[:64]) + "…"
	}
	return string(raw)
}

func escapePointer(key string) string {
	return strings.NewReplacer("~", "~0", "/", "~1").Replace(key)
}
