package stdio

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"pthost/ptipc"
)

// MaxGenerated is the most bytes that a [Generated] has as a line, LF included.
const MaxGenerated = 1 << 20

// Generated is the one line that a child writes in the role generate: a
// configuration for each side, that match (SRV-6). Both hold secrets, so it hides
// them when it is printed or logged.
type Generated struct {
	Client ptipc.Opaque `json:"client"`
	Server ptipc.Opaque `json:"server"`
}

// String hides the configurations.
func (Generated) String() string { return `{"client":***,"server":***}` }

// LogValue keeps the configurations out of logs.
func (g Generated) LogValue() slog.Value { return slog.StringValue(g.String()) }

// Append appends the line, LF included, to dst. It refuses configurations that are
// not JSON objects in UTF-8; those that hold a port 0, which is the number 0 under a
// key "port" or a string that ends in ":0" and is not an address (SRV-6); and a line
// longer than [MaxGenerated]. dst is returned unchanged then, and the error repeats
// no value.
func (g Generated) Append(dst []byte) ([]byte, error) {
	for side, config := range map[string]ptipc.Opaque{"client": g.Client, "server": g.Server} {
		if config == nil {
			continue // {}
		}
		if !isObject(config) {
			return dst, fmt.Errorf("cannot write what was generated: the configuration of the %s is not a JSON object in UTF-8 (ARG-3)", side)
		}
		if pointer, found := portZero(config); found {
			return dst, fmt.Errorf("cannot write what was generated: the configuration of the %s has port 0 at %s, which says nothing to the other side; choose a port (SRV-6)", side, pointer)
		}
	}
	line, err := json.Marshal(g) // compacts: no LF is left in the configurations
	if err != nil {
		return dst, fmt.Errorf("cannot write what was generated: %w", err)
	}
	if len(line) >= MaxGenerated {
		return dst, fmt.Errorf("cannot write what was generated: it has %d bytes, at most %d go through (SRV-6)", len(line)+1, MaxGenerated)
	}
	return append(append(dst, line...), '\n'), nil
}

// ParseGenerated reads the line, with or without its line end. Keys that it does
// not know are ignored. The error repeats nothing of the line.
func ParseGenerated(line []byte) (Generated, error) {
	if len(bytes.TrimSuffix(line, []byte("\n"))) >= MaxGenerated {
		return Generated{}, fmt.Errorf("what was generated is longer than %d bytes (SRV-6)", MaxGenerated)
	}
	// A map, because decoding into a struct takes keys in any case.
	keys := map[string]json.RawMessage{}
	if !isObject(line) || json.Unmarshal(line, &keys) != nil {
		return Generated{}, errors.New(`what was generated is not {"client":…,"server":…} in UTF-8 (SRV-6)`)
	}
	for _, side := range []string{"client", "server"} {
		if !isObject(keys[side]) {
			return Generated{}, fmt.Errorf("what was generated has no configuration for the %s: its key %q is not a JSON object (SRV-6)", side, side)
		}
	}
	return Generated{Client: ptipc.Opaque(keys["client"]), Server: ptipc.Opaque(keys["server"])}, nil
}

// portZero finds a port 0 in a JSON text, and says where by an RFC 6901 pointer.
func portZero(config []byte) (pointer string, found bool) {
	decoder := json.NewDecoder(bytes.NewReader(config))
	decoder.UseNumber()
	var value any
	if decoder.Decode(&value) != nil {
		return "", false
	}
	return findPortZero("", "", value)
}

func findPortZero(pointer, key string, value any) (string, bool) {
	found := false
	switch value := value.(type) {
	case json.Number:
		n, err := value.Float64()
		found = key == "port" && n == 0 && err == nil
	case string:
		// 2001:db8::0 is an address and has no port.
		_, err := netip.ParseAddr(value)
		found = key == "port" && value == "0" || strings.HasSuffix(value, ":0") && err != nil
	case []any:
		for i, element := range value {
			if at, found := findPortZero(pointer+"/"+strconv.Itoa(i), key, element); found {
				return at, true
			}
		}
	case map[string]any:
		keys := make([]string, 0, len(value))
		for key := range value {
			keys = append(keys, key)
		}
		slices.Sort(keys)
		for _, key := range keys {
			escaped := strings.NewReplacer("~", "~0", "/", "~1").Replace(key)
			if at, found := findPortZero(pointer+"/"+escaped, key, value[key]); found {
				return at, true
			}
		}
	}
	return pointer, found
}
