package host

import (
	"encoding/json"
	"os"
	"path/filepath"
	"slices"

	"pthost/ptipc/proc"
)

// sandbox is the child's, with what the operator has named elsewhere: files in its
// arguments and in its configuration.
func (s *supervisor) sandbox() *proc.Sandbox {
	if s.command.Sandbox == nil {
		return nil
	}
	named := slices.Clone(s.command.Args)
	var config any
	if json.Unmarshal(s.config, &config) == nil {
		named = appendStrings(named, config)
	}
	allowed := proc.Sandbox{Read: slices.Clone(s.command.Sandbox.Read), Write: s.command.Sandbox.Write}
	for _, path := range named {
		if !filepath.IsAbs(path) {
			continue
		}
		// A directory is more than a name: it is allowed only where that is said.
		if info, err := os.Stat(path); err == nil && info.Mode().IsRegular() && !slices.Contains(allowed.Read, path) {
			allowed.Read = append(allowed.Read, path)
		}
	}
	return &allowed
}

// appendStrings appends every string value in v, which json.Unmarshal has made.
func appendStrings(found []string, v any) []string {
	switch v := v.(type) {
	case string:
		return append(found, v)
	case []any:
		for _, e := range v {
			found = appendStrings(found, e)
		}
	case map[string]any:
		for _, e := range v {
			found = appendStrings(found, e)
		}
	}
	return found
}
