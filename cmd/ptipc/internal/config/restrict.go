package config

import (
	"path/filepath"
	"strconv"

	"pthost/ptipc"
)

// A Sandbox is what a child may use beside its state directory, the system's programs
// and libraries, its executable, and the files that its arguments and configuration
// name (LIFE-12).
type Sandbox struct {
	Read  []string `json:"read,omitempty"`  // files and directories
	Write []string `json:"write,omitempty"` // those that it may change as well
	Off   bool     `json:"off,omitempty"`   // it may use what its user may use
}

// Validate checks that the list is not switched off.
func (s *Sandbox) Validate() error {
	if s.Off && len(s.Read)+len(s.Write) > 0 {
		return &ptipc.ConfigError{Pointer: "/off", Value: "true", Problem: "leaves the lists beside it without a meaning", Remedy: "remove it, or the lists"}
	}
	for name, paths := range map[string][]string{"read": s.Read, "write": s.Write} {
		for i, path := range paths {
			if path == "" {
				return &ptipc.ConfigError{Pointer: "/" + name + "/" + strconv.Itoa(i), Value: `""`, Problem: "is not a path", Remedy: "name a file or a directory"}
			}
		}
	}
	return nil
}

func (s *Sandbox) set() bool { return s.Off || len(s.Read)+len(s.Write) > 0 }

// Resolve makes the paths absolute.
func (s *Sandbox) Resolve(base string) {
	for _, paths := range [][]string{s.Read, s.Write} {
		for i, path := range paths {
			if !filepath.IsAbs(path) {
				paths[i] = filepath.Join(base, path)
			}
		}
	}
}

// Limits bound what a child may use of the machine (LIFE-13).
type Limits struct {
	Descriptors uint64 `json:"descriptors,omitempty"` // of each process
	MemoryMiB   uint64 `json:"memory_mib,omitempty"`  // writable, of each process
	Processes   uint64 `json:"processes,omitempty"`   // of the child's user, threads counted
}

const (
	minDescriptors = 32
	maxMemoryMiB   = 1 << 30
)

// Validate refuses limits that no child could start under.
func (l *Limits) Validate() error {
	if l.Descriptors > 0 && l.Descriptors < minDescriptors {
		return &ptipc.ConfigError{Pointer: "/descriptors", Value: strconv.FormatUint(l.Descriptors, 10), Problem: "is too few to start with", Remedy: "give at least " + strconv.Itoa(minDescriptors)}
	}
	if l.MemoryMiB > maxMemoryMiB {
		return &ptipc.ConfigError{Pointer: "/memory_mib", Value: strconv.FormatUint(l.MemoryMiB, 10), Problem: "is more than any machine has", Remedy: "give the number of MiB"}
	}
	return nil
}
