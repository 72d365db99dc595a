package bench

import (
	"errors"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"

	"golang.org/x/sys/unix"
)

// startScript runs a shell, which reads its commands from a script and ends with
// the test. It returns once the shell has written something.
func startScript(t *testing.T, script string) (pid int) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "sh", "-c", script)
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		stdin.Close()
		_ = cmd.Wait() // the end of the test may have been faster
	})
	if _, err := stdout.Read(make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	return cmd.Process.Pid
}

// A transport may be a script that runs another program: all of it counts.
func TestTree(t *testing.T) {
	const script = "exec 3<&0; (echo; exec cat <&3) & wait"
	pid := startScript(t, script)
	pids, _ := tree(pid)
	if len(pids) != 2 || !slices.Contains(pids, pid) {
		t.Errorf("the processes of %d are %v, want two", pid, pids)
	}
	if pids, _ := tree(os.Getpid()); len(pids) < 3 {
		t.Errorf("the processes of the test are %v, want its own and two more", pids)
	}
	more := startScript(t, "exec 4<&0; "+script)
	one, two := memoryOf(pid), memoryOf(more)
	// The shells have spoken, and may still be about to become cat, with descriptors of their own.
	for range 10000 {
		if two.fds-one.fds == 2 {
			break
		}
		one, two = memoryOf(pid), memoryOf(more)
	}
	if got := two.fds - one.fds; got != 2 {
		t.Errorf("a descriptor that both processes have counts %v times", got)
	}
	if one.user <= 0 {
		t.Errorf("the two processes need %v bytes", one.user)
	}
}

func TestCPUTime(t *testing.T) {
	if got := CPUTime(0); !math.IsNaN(got) {
		t.Errorf("no process has used %v s", got)
	}
	before := CPUTime(os.Getpid())
	if got := callerCPU(); got <= 0 {
		t.Errorf("this process has used %v s", got)
	}
	if got := busy(); got <= before-1 {
		t.Errorf("all processes have used %v s, and this one %v", got, before)
	}
	var used, children unix.Rusage
	for start := before; start < before+0.02; start = CPUTime(os.Getpid()) {
		if err := errors.Join(unix.Getrusage(unix.RUSAGE_SELF, &used), unix.Getrusage(unix.RUSAGE_CHILDREN, &children)); err != nil {
			t.Fatal(err)
		}
	}
	// Another clock of the system for the same thing; ended children count in ticks.
	const tick = 0.01
	other := float64(used.Utime.Nano()+used.Stime.Nano()+children.Utime.Nano()+children.Stime.Nano()) / 1e9
	if after := CPUTime(os.Getpid()); after < other-2*tick || before-2*tick > other {
		t.Errorf("the process has used from %v to %v s, and getrusage says %v", before, after, other)
	}
}

func TestMemoryOf(t *testing.T) {
	before := memoryOf(os.Getpid())
	const size = 64 << 20
	block, err := unix.Mmap(-1, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON)
	if err != nil {
		t.Fatal(err)
	}
	for i := 0; i < size; i += os.Getpagesize() {
		block[i] = 1
	}
	after := memoryOf(os.Getpid())
	if err := unix.Munmap(block); err != nil {
		t.Fatal(err)
	}
	if grown := after.user - before.user; grown < size*0.9 || grown > size*1.1 {
		t.Errorf("user memory has grown by %v bytes, want about %d", grown, size)
	}
	if before.kernel <= 0 {
		t.Errorf("the kernel uses %v bytes", before.kernel)
	}
	if none := memoryOf(0); none.user != 0 || none.fds != 0 || none.kernel <= 0 {
		t.Errorf("no process has %+v", none)
	}
}

func TestKilobytes(t *testing.T) {
	file := filepath.Join(t.TempDir(), "meminfo")
	if err := os.WriteFile(file, []byte("MemTotal: 5 kB\nSlab:        1234 kB\nBad: x kB\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if got := kilobytes(file, "Slab:"); got != 1234*1024 {
		t.Errorf("got %v", got)
	}
	for _, key := range []string{"Bad:", "None:"} {
		if got := kilobytes(file, key); !math.IsNaN(got) {
			t.Errorf("%s is %v", key, got)
		}
	}
	if got := kilobytes(file+"x", "Slab:"); !math.IsNaN(got) {
		t.Errorf("a file that is not there says %v", got)
	}
}
