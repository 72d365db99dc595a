package child

import (
	"bytes"
	"strings"
	"testing"

	"pthost/ptipc"
	"pthost/ptipc/stdio"
)

// A host that floods a transport which receives no signals does not flood the log.
func TestDroppedSignalsAreCounted(t *testing.T) {
	var out bytes.Buffer
	l := newLink(t.TempDir(), stdio.Host{}, &out)
	for range maxSignals + 1000 {
		l.deliver(ptipc.Message{})
	}
	l.dropped.Close()
	if text := out.String(); strings.Count(text, "\n") != 2 || !strings.Contains(text, "count=1\"") || !strings.Contains(text, "count=999\"") {
		t.Errorf("the log has\n%s", text)
	}
}
