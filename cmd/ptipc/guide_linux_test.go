package main

import (
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"pthost/ptipc/testpeer"
)

// guideBlock finds the commands of a guide.
var guideBlock = regexp.MustCompile("(?ms)^```sh\n(.*?)^```$")

// stays says what tells that a command is up which does not end by itself.
var stays = map[string]string{"ptipc run ": "press Ctrl-C to stop", "python3 -m http.server": "Serving HTTP on"}

// The commands of the guide, exactly as they stand there but for the address of the
// server and the ports, one block after the other.
func TestGuideObfs4(t *testing.T) {
	for _, program := range []string{"obfs4proxy", "curl", "jq", "python3"} {
		testpeer.Need(t, program)
	}
	text, err := os.ReadFile("../../spec/guides/obfs4.md")
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	replace := []string{"192.0.2.1", "127.0.0.1"}
	for _, port := range []string{"8443", "8080", "8000"} {
		_, free, _ := strings.Cut(freePort(t), ":")
		replace = append(replace, ":"+port, ":"+free, " "+port+" ", " "+free+" ")
	}
	blocks := guideBlock.FindAllStringSubmatch(string(text), -1)
	if len(blocks) < 4 {
		t.Fatalf("the guide has %d blocks of commands", len(blocks))
	}
	var said string
	for i, block := range blocks {
		script := strings.NewReplacer(replace...).Replace(block[1])
		// Each terminal of the guide is one of another machine, or at least of another user.
		runtime := fmt.Sprintf("%s/runtime-%d", dir, i)
		if err := os.Mkdir(runtime, 0o700); err != nil {
			t.Fatal(err)
		}
		cmd := exec.Command("sh", "-e")
		cmd.Dir = dir
		cmd.Env = append(os.Environ(), "XDG_RUNTIME_DIR="+runtime, "PYTHONUNBUFFERED=1", "no_proxy=*")
		cmd.Stdin = strings.NewReader(script)
		cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // Ctrl-C reaches all of a terminal
		out := new(lockedBuffer)
		cmd.Stdout, cmd.Stderr = out, out
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		ended := make(chan error, 1)
		go func() { ended <- cmd.Wait() }()
		up := ""
		for command, sign := range stays {
			if strings.Contains(script, command) {
				up = sign
			}
		}
		if up != "" {
			t.Cleanup(func() {
				_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGINT)
				select {
				case <-ended:
				case <-time.After(20 * time.Second):
					_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
					t.Errorf("block %d does not stop:\n%s", i, out)
				}
			})
		}
		said = awaitBlock(t, script, up, out, ended)
	}
	if !strings.Contains(said, "hello through obfs4") {
		t.Errorf("the last block said %q", said)
	}
}

// awaitBlock waits until the commands of a block have ended, or are up.
func awaitBlock(t *testing.T, script, up string, out *lockedBuffer, ended chan error) string {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); ; {
		if up != "" && strings.Contains(out.String(), up) {
			return out.String()
		}
		select {
		case err := <-ended:
			if err != nil || up != "" {
				t.Fatalf("%s%v\n%s", script, err, out)
			}
			return out.String()
		case <-time.After(10 * time.Millisecond):
		}
		if time.Now().After(deadline) {
			t.Fatalf("nothing comes of\n%s%s", script, out)
		}
	}
}
