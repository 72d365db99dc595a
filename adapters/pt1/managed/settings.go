package managed

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"strconv"

	"pthost/adapters/pt1/wire"
	"pthost/ptipc"
	"pthost/ptipc/stdio"
)

// The settings that name the server of a bound transport.
const (
	keyHost = "host"
	keyPort = "port"
)

// login makes settings of what tor sends as username and password (PT1-22, PT1-23).
// Errors repeat no value, since values are secrets.
func login(username, password string) (ptipc.Opaque, error) {
	args, err := wire.ParseArgs(wire.JoinCredentials(username, password))
	if err != nil {
		return nil, err
	}
	settings := map[string]any{}
	for _, arg := range args {
		switch old := settings[arg.Key].(type) {
		case nil:
			settings[arg.Key] = arg.Value
		case string:
			settings[arg.Key] = []string{old, arg.Value}
		case []string:
			settings[arg.Key] = append(old, arg.Value)
		}
	}
	if value, ok := settings[keyPort]; ok {
		text, _ := value.(string)
		if settings[keyPort], err = strconv.ParseUint(text, 10, 16); err != nil {
			return nil, errors.New("the argument port is not one number from 0 to 65535 (PT1-23)")
		}
	}
	return json.Marshal(settings)
}

// withDestination adds where tor connects to (PT1-23).
func withDestination(settings ptipc.Opaque, dest string) (ptipc.Opaque, error) {
	host, port, err := net.SplitHostPort(dest)
	if err != nil {
		return nil, err
	}
	members := map[string]json.RawMessage{}
	if len(settings) > 0 {
		if err := json.Unmarshal(settings, &members); err != nil {
			return nil, err
		}
	}
	if _, ok := members[keyHost]; !ok {
		if members[keyHost], err = json.Marshal(host); err != nil {
			return nil, err
		}
	}
	if _, ok := members[keyPort]; !ok {
		members[keyPort] = json.RawMessage(port)
	}
	return json.Marshal(members)
}

// bridgeArgs are what a client needs to know, as the ARGS of an SMETHOD line, which
// tor copies to its bridge line (PT1-27).
func bridgeArgs(client ptipc.Opaque) (stdio.Args, error) {
	if client.Empty() {
		return nil, nil
	}
	members := map[string]json.RawMessage{}
	if err := client.Decode(&members); err != nil {
		return nil, fmt.Errorf("the client's configuration: %w", err)
	}
	delete(members, keyHost) // tor has them in front of the arguments
	delete(members, keyPort)
	args, misfit, ok := wire.ArgsOf(members)
	if !ok {
		return nil, fmt.Errorf("the client's configuration has a member %q that is more than strings, numbers and booleans, which a bridge line cannot carry (PT1-27)", misfit)
	}
	out, err := wire.BridgeArgs(args)
	if err != nil {
		return nil, fmt.Errorf("the client's configuration: %w", err)
	}
	return out, nil
}
