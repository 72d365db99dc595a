package pt1

import (
	"encoding/json"
	"errors"
	"maps"
	"net"
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

// Destination puts the settings of a connection on top of those of its transport, key
// by key, and takes host and port out of them: the destination, unless dest names
// another one. Without any it is [Nowhere] (PT1-4).
func Destination(defaults, settings ptipc.Opaque, dest string) (rest map[string]json.RawMessage, to string, err error) {
	var more map[string]json.RawMessage
	if err := defaults.Decode(&rest); err != nil {
		return nil, "", err
	}
	if err := settings.Decode(&more); err != nil {
		return nil, "", err
	}
	if rest == nil {
		rest = map[string]json.RawMessage{}
	}
	maps.Copy(rest, more)
	host, err := takeHost(rest)
	if err != nil {
		return nil, "", err
	}
	port, err := takePort(rest)
	switch {
	case err != nil:
		return nil, "", err
	case host != "" && port == "":
		return nil, "", missing(keyPort, keyHost)
	case host == "" && port != "":
		return nil, "", missing(keyHost, keyPort)
	case host != "" && dest != "":
		return nil, "", &ptipc.ConfigError{Pointer: "/" + keyHost, Value: strconv.Quote(host), Problem: "is a second destination: the factory was made free, and the connection has its own", Remedy: "remove host and port"}
	case host != "":
		dest = net.JoinHostPort(host, port)
	case dest == "":
		dest = Nowhere
	}
	return rest, dest, nil
}

func missing(key, beside string) error {
	return &ptipc.ConfigError{Pointer: "/" + key, Problem: "is missing beside " + beside, Remedy: "give both: they are the server's; or neither, for a transport that needs none"}
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

// argsOf makes arguments of settings (PT1-4).
func argsOf(all map[string]json.RawMessage) (wire.Args, error) {
	if _, ok := all[""]; ok {
		return nil, &ptipc.ConfigError{Pointer: "/", Problem: "has no name, and cannot be handed to a managed transport", Remedy: "remove it"}
	}
	args, misfit, ok := wire.ArgsOf(all)
	if !ok { // the value may be a secret
		return nil, &ptipc.ConfigError{Pointer: "/" + escapePointer(misfit), Problem: "cannot be handed to a managed transport, which knows texts alone", Remedy: "write a string, a number, true or false, or a list of these"}
	}
	return args, nil
}

// Under moves the place of a configuration error below pointer.
func Under(pointer string, err error) error {
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
