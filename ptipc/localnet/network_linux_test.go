package localnet

import (
	"os"
	"os/exec"
	"syscall"
	"testing"

	"pthost/ptipc/testpeer"
)

func TestSameNetwork(t *testing.T) {
	sleeper := func(flags uintptr) int {
		cmd := exec.CommandContext(t.Context(), testpeer.Need(t, "cat"))
		cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: flags}
		stdin, err := cmd.StdinPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			if os.Geteuid() != 0 {
				testpeer.Skip(t, "only root makes network namespaces")
			}
			t.Fatal(err)
		}
		t.Cleanup(func() {
			_ = stdin.Close()
			_ = cmd.Wait()
		})
		return cmd.Process.Pid
	}
	near, far := sleeper(0), sleeper(syscall.CLONE_NEWNET)
	for _, test := range []struct {
		pids []int
		same bool
	}{{nil, true}, {[]int{os.Getpid(), near}, true}, {[]int{near, far}, false}, {[]int{1 << 30}, false}} {
		if same := SameNetwork(test.pids); same != test.same {
			t.Errorf("%v: %t, want %t", test.pids, same, test.same)
		}
	}
}
