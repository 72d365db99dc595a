package spec

import (
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// What security.md promises is shown by tests that exist, and names clauses that do.
func TestSecurity(t *testing.T) {
	text, err := os.ReadFile("security.md")
	if err != nil {
		t.Fatal(err)
	}
	known := map[string]bool{} // package.Test
	declared := regexp.MustCompile(`(?m)^func (Test\w+)\(`)
	of := regexp.MustCompile(`(?m)^package (\w+)`)
	err = filepath.WalkDir("..", func(path string, d fs.DirEntry, err error) error {
		if err != nil || !strings.HasSuffix(path, "_test.go") {
			return err
		}
		source, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		name := strings.TrimSuffix(string(of.FindSubmatch(source)[1]), "_test")
		if name == "main" {
			name = filepath.Base(filepath.Dir(path))
		}
		for _, test := range declared.FindAllSubmatch(source, -1) {
			known[name+"."+string(test[1])] = true
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	named := regexp.MustCompile(`\b[a-z0-9]+\.Test\w+`).FindAllString(string(text), -1)
	if len(named) < 40 {
		t.Errorf("security.md names only %d tests", len(named))
	}
	for _, name := range named {
		if !known[name] {
			t.Errorf("security.md names %s, which there is not", name)
		}
	}
	clauses := map[string]bool{}
	for _, c := range Clauses() {
		clauses[c.ID] = true
	}
	for _, id := range regexp.MustCompile(`\b[A-Z][A-Z0-9]+-[0-9]+\b`).FindAllString(string(text), -1) {
		if !clauses[id] {
			t.Errorf("security.md names %s, which is no clause", id)
		}
	}
}
