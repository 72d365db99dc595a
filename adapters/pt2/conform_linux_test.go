package pt2_test

import (
	"os"
	"testing"
	"time"

	"pthost/ptipc"
	"pthost/ptipc/conformance"
)

// The suite reads the documents of PT 2.0 to 3.0 as the child of these tests does, which
// knows nothing of it: what they are about, it keeps. Told by flags and by its environment,
// it is the same.
func TestConformance(t *testing.T) {
	t.Parallel()
	for role, config := range map[string]string{
		"flags":       `{"transports":{"shadow":{"host":"192.0.2.1","port":443,"password":"p;w","list":[1,true]}},"options":{"a":{"b":1}}}`,
		"environment": `{"transports":{"shadow":{"host":"192.0.2.1","port":443,"password":"p;w"}},"pass":"environment","version":"2"}`,
	} {
		t.Run(role, func(t *testing.T) {
			t.Parallel()
			report, err := conformance.Run(t.Context(), conformance.Subject{
				Path: os.Args[0], Args: []string{"@child", role}, Dialect: conformance.PT2, Config: ptipc.Opaque(config),
			}, conformance.Options{
				Strict: true, Patience: 15 * time.Second,
				Pattern: `^(LIFE-1|PT1-1|PT1-20|PT1-8|LINE-[579]|SOCKS-5|LIFE-8|LIFE-11)/|^PT1-15/(each-alone|settings-win|no-reply-between)$|^PT1-24/answered$|^PT1-29/stdin$`,
			})
			if err != nil {
				t.Fatal(err)
			}
			if len(report.Results) < 15 {
				t.Errorf("only %d cases", len(report.Results))
			}
			for _, r := range report.Results {
				if r.Verdict == conformance.FellShort {
					t.Error(r)
				}
			}
		})
	}
}
