package spec

import (
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// mentions finds the clause IDs of the families that the specification has.
func mentions(families []string) *regexp.Regexp {
	return regexp.MustCompile(`\b(?:` + strings.Join(families, "|") + `)-[0-9]+\b`)
}

// The triangle: every MUST has an ID, stands in code, and is shown by a test, a
// vector or a conformance case; and nothing names a clause that does not exist.
func TestTriangle(t *testing.T) {
	clauses := map[string]Clause{}
	families := map[string]bool{}
	for _, c := range Clauses() {
		if _, twice := clauses[c.ID]; twice {
			t.Errorf("%s stands twice in the specification", c.ID)
		}
		clauses[c.ID] = c
		families[c.ID[:strings.IndexByte(c.ID, '-')]] = true
	}
	if len(clauses) < 50 {
		t.Fatalf("only %d clauses were found: the parser of ptipc.md is off", len(clauses))
	}
	id := mentions(slices.Sorted(maps.Keys(families)))

	code, shown := map[string][]string{}, map[string][]string{}
	err := filepath.WalkDir("..", func(path string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case d.IsDir() && d.Name() != ".." && strings.HasPrefix(d.Name(), "."):
			return filepath.SkipDir
		case d.IsDir() && d.Name() == "fuzz": // inputs that a fuzzer found, not text
			return filepath.SkipDir
		case d.IsDir():
			return nil
		}
		var into map[string][]string
		name := filepath.ToSlash(path)
		switch {
		case name == "../spec/triangle_test.go":
			return nil
		case strings.HasSuffix(name, "_test.go"), strings.HasPrefix(name, "../testdata/"), strings.HasPrefix(name, "../ptipc/conformance/"):
			into = shown
		case strings.HasSuffix(name, ".go"):
			into = code
		default:
			return nil
		}
		text, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		for _, found := range id.FindAllString(string(text), -1) {
			into[found] = append(into[found], name)
			if _, ok := clauses[found]; !ok {
				t.Errorf("%s names %s, which is not in the specification", name, found)
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range clauses {
		if !c.Must {
			continue
		}
		if len(code[c.ID]) == 0 {
			t.Errorf("no code names %s: %s", c.ID, c.Text)
		}
		if len(shown[c.ID]) == 0 {
			t.Errorf("no test, vector or conformance case names %s: %s", c.ID, c.Text)
		}
	}
}

// Every MUST of the documents stands in a numbered clause.
func TestEveryMustIsNumbered(t *testing.T) {
	names, err := fs.Glob(documents, "*.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range names {
		text, err := documents.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		inClauses := 0
		for _, c := range clausesOf(string(text)) {
			inClauses += len(must.FindAllString(c.Text, -1))
		}
		// The introduction, before the first heading, explains the word.
		_, body, found := strings.Cut(string(text), "\n## ")
		if !found && inClauses > 0 {
			t.Errorf("%s has no headings", name)
		}
		if all := len(must.FindAllString(body, -1)); all != inClauses {
			t.Errorf("%s: %d MUST in the text, %d of them in clauses", name, all, inClauses)
		}
	}
}
