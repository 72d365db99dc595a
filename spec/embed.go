// Package spec carries the specification, so that the tool and the tests read
// the very text that people read.
//
//	fmt.Println(strings.Count(spec.Text, "MUST"))
package spec

import (
	_ "embed"
	"regexp"
)

// Text is ptipc.md.
//
//go:embed ptipc.md
var Text string

// HostSchema is the JSON Schema of the tool's configuration file.
//
//go:embed host.schema.json
var HostSchema []byte

// A Clause is one numbered demand of the specification.
type Clause struct {
	ID   string // for example SOCKS-4
	Text string // one line, without the mark-up around the ID
	Must bool   // the clause has a MUST, so something has to show it
}

var (
	clauseStart = regexp.MustCompile(`(?m)^- \*\*([A-Z]+-[0-9]+)\*\* `)
	clauseEnd   = regexp.MustCompile(`(?m)\n(?:\n|#|- )`)
	white       = regexp.MustCompile(`\s+`)
	must        = regexp.MustCompile(`\bMUST\b`)
)

// Clauses returns the clauses of the specification in its order.
func Clauses() []Clause {
	var clauses []Clause
	for _, at := range clauseStart.FindAllStringSubmatchIndex(Text, -1) {
		text := Text[at[1]:]
		if end := clauseEnd.FindStringIndex(text); end != nil {
			text = text[:end[0]]
		}
		text = white.ReplaceAllString(text, " ")
		clauses = append(clauses, Clause{ID: Text[at[2]:at[3]], Text: text, Must: must.MatchString(text)})
	}
	return clauses
}
