package conformance_test

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"pthost/ptipc/testpeer"
)

// The vectors serve another language: decoders in Python, which share nothing with ours,
// make the same of them.
func TestVectorsInPython(t *testing.T) {
	t.Parallel()
	python := testpeer.Need(t, "python3")
	const testdata = "../../testdata"
	decode := func(dir string) (out string, err error) {
		text, err := exec.CommandContext(t.Context(), python, filepath.Join(testdata, "children", "vectors.py"), dir).CombinedOutput()
		return string(text), err
	}
	out, err := decode(testdata)
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	for _, dir := range []string{"socks", "stdio"} {
		m := regexp.MustCompile(dir + `: (\d+) agree, 0 differ`).FindStringSubmatch(out)
		if m == nil {
			t.Fatalf("no word on %s:\n%s", dir, out)
		}
		if n, _ := strconv.Atoi(m[1]); n < 100 {
			t.Errorf("%d vectors of %s were read, which is too few:\n%s", n, dir, out)
		}
	}

	// Vectors that say something else are found out.
	for _, change := range []struct{ file, old, new, want string }{
		{"socks/length-65537.txt", "< 05 10", "< 05 12", "socks: length-65537:"},
		{"socks/raw-empty.txt", "dial example.com:443", "dial example.com:444", "socks: raw-empty:"},
		{"stdio/form.txt", "want: error too-long", "want: error form", "stdio: form: one byte longer:"},
		{"stdio/log.txt", `"severity":"notice"`, `"severity":"Notice"`, "stdio: log: a severity with a capital"},
	} {
		t.Run(change.file, func(t *testing.T) {
			dir := t.TempDir()
			for _, name := range []string{"socks", "stdio"} {
				if err := os.CopyFS(filepath.Join(dir, name), os.DirFS(filepath.Join(testdata, name))); err != nil {
					t.Fatal(err)
				}
			}
			path := filepath.Join(dir, change.file)
			text, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			changed := bytes.Replace(text, []byte(change.old), []byte(change.new), 1)
			if bytes.Equal(text, changed) {
				t.Fatalf("%q is not in %s", change.old, change.file)
			}
			if err := os.WriteFile(path, changed, 0o600); err != nil {
				t.Fatal(err)
			}
			if out, err := decode(dir); err == nil || !strings.Contains(out, change.want) {
				t.Errorf("%v, without %q:\n%s", err, change.want, out)
			}
		})
	}
}
