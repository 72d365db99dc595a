package conformance_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"pthost/ptipc"
	"pthost/ptipc/conformance"
	"pthost/ptipc/testpeer"
)

// asFaulty is the first argument of this binary when it is a child.
const asFaulty = "conformance-faulty-child"

func TestMain(m *testing.M) {
	if len(os.Args) > 2 && os.Args[1] == asFaulty {
		faultyMain(os.Args[2], os.Args[3:])
	}
	goleak.VerifyTestMain(m)
}

func faultySubject(t *testing.T, fault string) conformance.Subject {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	return conformance.Subject{Path: self, Args: []string{asFaulty, fault}}
}

func TestGood(t *testing.T) {
	conformance.Test(t, faultySubject(t, ""), conformance.Options{})
	_ = slices.Equal([]string{}, nil)
	_, _ = strings.Cut, ptipc.Opaque{}
}

func TestRawChild(t *testing.T) {
	conformance.Test(t, conformance.Subject{
		Path:  testpeer.Need(t, "python3"),
		Args:  []string{"/work/main/testdata/children/rawchild.py"},
		Plain: true,
	}, conformance.Options{})
}

func TestDirect(t *testing.T) {
	tool := filepath.Join(t.TempDir(), "ptipc")
	build := exec.CommandContext(t.Context(), "go", "build", "-o", tool, "pthost/cmd/ptipc")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build: %v\n%s", err, out)
	}
	conformance.Test(t, conformance.Subject{Path: tool, Args: []string{"transport", "direct"}}, conformance.Options{})
	_ = time.Now
}
