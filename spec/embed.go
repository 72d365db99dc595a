// Package spec carries the specification, so that the tool and the tests read
// the very text that people read.
//
//	for _, clause := range spec.Clauses() {
//		fmt.Println(clause.ID, clause.Text)
//	}
package spec

import (
	"embed"
	"io/fs"
	"regexp"
)

//go:generate go test -run ^TestCoverage$ . -update

// HostSchema is the JSON Schema of the tool's configuration file.
//
//go:embed host.schema.json
var HostSchema []byte

// documents are all that have numbered clauses: ptipc.md and the wires of transports
// and adapters.
//
//go:embed *.md
var documents embed.FS

// A Clause is one numbered demand of the specification.
type Clause struct {
	ID   string // for example SOCKS-4
	Text string // one line, without the mark-up around the ID
	Must bool   // the clause has a MUST, so something has to show it
}

var (
	clauseStart = regexp.MustCompile(`(?m)^- \*\*([A-Z][A-Z0-9]*-[0-9]+)\*\* `)
	clauseEnd   = regexp.MustCompile(`(?m)\n(?:\n|#|- )`)
	white       = regexp.MustCompile(`\s+`)
	must        = regexp.MustCompile(`\bMUST\b`)
)

// Clauses returns the clauses of all documents, in the order of their names and
// within one in its own.
func Clauses() []Clause {
	var clauses []Clause
	names, err := fs.Glob(documents, "*.md")
	if err != nil {
		panic(err) // the pattern is a constant
	}
	for _, name := range names {
		document, err := documents.ReadFile(name)
		if err != nil {
			panic(err) // it was listed a line above
		}
		clauses = append(clauses, clausesOf(string(document))...)
	}
	return clauses
}

func clausesOf(document string) []Clause {
	var clauses []Clause
	for _, at := range clauseStart.FindAllStringSubmatchIndex(document, -1) {
		text := document[at[1]:]
		if end := clauseEnd.FindStringIndex(text); end != nil {
			text = text[:end[0]]
		}
		text = white.ReplaceAllString(text, " ")
		clauses = append(clauses, Clause{ID: document[at[2]:at[3]], Text: text, Must: must.MatchString(text)})
	}
	return clauses
}
