package main

import (
	"bytes"
	"errors"
	"maps"
	"strings"
	"testing"

	"pthost/cmd/ptipc/internal/control"
	"pthost/ptipc"
	"pthost/ptipc/stdio"
)

// What ptipc signal show prints, ptipc signal add takes, the largest message too (SIG-4).
func TestLargestSignal(t *testing.T) {
	around := len(`{"body":{"a":""}}`)
	for _, size := range []int{stdio.MaxSignal, stdio.MaxSignal - 1} {
		m := ptipc.Message{Body: ptipc.Opaque(`{"a":"` + strings.Repeat("x", size-around) + `"}`)}
		var shown bytes.Buffer
		if err := showSignals(&shown, []control.Signal{{Message: m}}, false, false); err != nil {
			t.Fatal(err)
		}
		text, err := signalText(&shown, nil)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := stdio.ParseSignal(text); err != nil || !bytes.Equal(got.Body, m.Body) {
			t.Errorf("a message of %d bytes was not taken: %v", size, err)
		}
	}
	text, err := signalText(strings.NewReader(strings.Repeat("x", 3*stdio.MaxSignal)), nil)
	if err != nil || len(text) > 2*stdio.MaxSignal {
		t.Errorf("%d bytes were read, %v", len(text), err)
	}
	if _, err := stdio.ParseSignal(text); err == nil || !strings.Contains(err.Error(), "SIG-4") {
		t.Errorf("what is too long: %v", err)
	}
}

// On a terminal a message is the same, and commands nothing.
func TestSignalOnTerminal(t *testing.T) {
	m := ptipc.Message{Body: ptipc.Opaque("{\"a\":\"é\u009b2J\u202e\U000e0001\x7f\"}")}
	text, err := stdio.AppendSignal(nil, m)
	if err != nil {
		t.Fatal(err)
	}
	got := escaped(text)
	if want := `{"body":{"a":"é\u009b2J\u202e\udb40\udc01\u007f"}}`; string(got) != want {
		t.Errorf("got %s, want %s", got, want)
	}
	back, err := stdio.ParseSignal(got)
	if err != nil {
		t.Fatal(err)
	}
	var a, b map[string]string
	if err := errors.Join(m.Body.Decode(&a), back.Body.Decode(&b)); err != nil || !maps.Equal(a, b) {
		t.Errorf("%q is not %q, %v", b, a, err)
	}
}
