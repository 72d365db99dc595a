package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"pthost/ptipc/testpeer"
)

// The commands of the guide, block by block, in a directory that has the project's
// testdata. Of the whole child only some cases are run here: the conformance package's
// own test runs all of them.
func TestGuideChild(t *testing.T) {
	testpeer.Need(t, "python3")
	text, err := os.ReadFile("../../spec/guides/child.md")
	if err != nil {
		t.Fatal(err)
	}
	testdata, err := filepath.Abs("../../testdata")
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	if err := os.Symlink(testdata, filepath.Join(dir, "testdata")); err != nil {
		t.Fatal(err)
	}
	want := []string{
		"MUST   8 held, 0 fell short, 1 could not run",
		"exit code 1",
		", 0 fell short, ",
		"host.json: 1 transports, 1 fronts, no fault found",
	}
	blocks := guideBlock.FindAllStringSubmatch(string(text), -1)
	if len(blocks) != len(want) {
		t.Fatalf("the guide has %d blocks of commands, and %d are looked at", len(blocks), len(want))
	}
	for i, block := range blocks {
		script := strings.ReplaceAll(block[1], "--strict -- python3", "--strict --run '^SOCKS-5/' -- python3")
		cmd := exec.CommandContext(t.Context(), "sh", "-e")
		cmd.Dir = dir
		cmd.Stdin = strings.NewReader(script)
		out, err := cmd.CombinedOutput()
		if err != nil || !strings.Contains(string(out), want[i]) {
			t.Errorf("block %d: %v, and there is no %q in\n%s", i, err, want[i], out)
		}
		if i == 1 && (!strings.Contains(string(out), "\texpected: method 00 in answer to the greeting\n") || !strings.Contains(string(out), "\tclient > 05 01 00 |...|\n")) {
			t.Errorf("the report is not what the guide shows:\n%s", out)
		}
	}
}
