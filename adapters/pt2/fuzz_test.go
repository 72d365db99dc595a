package pt2

import (
	"strings"
	"testing"

	"pthost/ptipc/stdio"
)

// Whatever a child writes, it is read as a control line of PT 1.0 is, or it is a LOG in
// words (PT1-16).
func FuzzParse(f *testing.F) {
	for _, line := range []string{
		"LOG ERROR the clock is slow", "LOG WARN", "LOG debug lower case", "LOG LOUD nothing", "LOG", "LOG  two spaces", "LOG INFO \x00",
		"LOG SEVERITY=error MESSAGE=\"x\"", "VERSION 3.0", "CMETHOD shadow socks5 127.0.0.1:1", "VERSION-ERROR no-version",
		"CMETHOD-ERROR shadow no password", "SMETHOD-ERROR", "panic: runtime error",
	} {
		f.Add(line)
	}
	f.Fuzz(func(t *testing.T, line string) {
		want, wantErr := stdio.Parse([]byte(line))
		got, err := parse([]byte(line))
		if log, ok := got.(stdio.Log); ok && wantErr != nil {
			if !strings.HasPrefix(line, "LOG ") || !strings.HasSuffix(strings.TrimRight(line, "\r\n"), log.Message) {
				t.Errorf("%q became %+v", line, log)
			}
		} else if (err == nil) != (wantErr == nil) || err == nil && got == nil || err != nil && got != want {
			t.Errorf("%q: %v, error %v; want %v, error %v", line, got, err, want, wantErr)
		}
		if m := parseStderr(line); m != nil && !strings.Contains(line, "-ERROR") {
			t.Errorf("%q on standard error is %+v", line, m)
		}
	})
}
