package proc

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"sync"
	"syscall"
	"unsafe"

	"golang.org/x/sys/windows"
)

// job is a child in a job object. The only handle of the job is this process's, so
// the system kills the child and its descendants when this process ends (LIFE-5).
type job struct {
	child *exec.Cmd

	mu       sync.Mutex
	handle   windows.Handle
	released bool
}

func startTree(_ context.Context, s *Spec, stdio [3]*os.File) (tree, error) {
	if s.Credential != nil {
		return nil, fmt.Errorf("start %s: another user for a child: %w on Windows", s.Path, errors.ErrUnsupported)
	}
	if len(s.Files) > 0 {
		return nil, fmt.Errorf("start %s: a child inherits no files on this system: %w", s.Path, errors.ErrUnsupported)
	}
	handle, err := newJob()
	if err != nil {
		return nil, fmt.Errorf("start %s: make a job object: %w", s.Path, err)
	}
	j := &job{handle: handle, child: &exec.Cmd{
		Path: s.Path, Args: append([]string{s.Path}, s.Args...), Dir: s.Dir, Env: s.Env,
		Stdin: stdio[0], Stdout: stdio[1], Stderr: stdio[2],
		// It sleeps until it is in the job: what it starts cannot be outside. Its own
		// console group lets terminate reach it alone.
		SysProcAttr: &syscall.SysProcAttr{
			CreationFlags: windows.CREATE_SUSPENDED | windows.CREATE_NEW_PROCESS_GROUP, HideWindow: true,
		},
	}}
	if err := j.child.Start(); err != nil {
		windows.CloseHandle(handle)
		return nil, explain(s, err)
	}
	if err := j.admit(); err != nil {
		_ = j.child.Process.Kill()
		_ = j.child.Wait()
		windows.CloseHandle(handle)
		return nil, fmt.Errorf("start %s: put it in a job object: %w", s.Path, err)
	}
	return j, nil
}

func newJob() (windows.Handle, error) {
	handle, err := windows.CreateJobObject(nil, nil)
	if err != nil {
		return 0, err
	}
	var limits windows.JOBOBJECT_EXTENDED_LIMIT_INFORMATION
	limits.BasicLimitInformation.LimitFlags = windows.JOB_OBJECT_LIMIT_KILL_ON_JOB_CLOSE
	if _, err := windows.SetInformationJobObject(handle, windows.JobObjectExtendedLimitInformation,
		uintptr(unsafe.Pointer(&limits)), uint32(unsafe.Sizeof(limits))); err != nil {
		windows.CloseHandle(handle)
		return 0, err
	}
	return handle, nil
}

// admit puts the suspended child into the job and lets it run.
func (j *job) admit() error {
	var assigned error
	if err := j.child.Process.WithHandle(func(process uintptr) {
		assigned = windows.AssignProcessToJobObject(j.handle, windows.Handle(process))
	}); err != nil {
		return err
	}
	if assigned != nil {
		return assigned
	}
	// os.StartProcess closes the handle of the first thread, so it is looked up.
	snapshot, err := windows.CreateToolhelp32Snapshot(windows.TH32CS_SNAPTHREAD, 0)
	if err != nil {
		return err
	}
	defer windows.CloseHandle(snapshot)
	entry := windows.ThreadEntry32{Size: uint32(unsafe.Sizeof(windows.ThreadEntry32{}))}
	for err = windows.Thread32First(snapshot, &entry); err == nil; err = windows.Thread32Next(snapshot, &entry) {
		if entry.OwnerProcessID != uint32(j.pid()) {
			continue
		}
		thread, err := windows.OpenThread(windows.THREAD_SUSPEND_RESUME, false, entry.ThreadID)
		if err != nil {
			return err
		}
		defer windows.CloseHandle(thread)
		_, err = windows.ResumeThread(thread)
		return err
	}
	return fmt.Errorf("find its first thread: %w", err)
}

func (j *job) pid() int { return j.child.Process.Pid }

func (j *job) pids() ([]int, error) {
	var list struct {
		assigned, listed uint32
		ids              [1024]uintptr
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.released {
		return nil, nil
	}
	if err := windows.QueryInformationJobObject(j.handle, windows.JobObjectBasicProcessIdList,
		uintptr(unsafe.Pointer(&list)), uint32(unsafe.Sizeof(list)), nil); err != nil {
		return nil, fmt.Errorf("list the processes of the job of %d: %w", j.pid(), err)
	}
	var pids []int
	for _, id := range list.ids[:list.listed] {
		pids = append(pids, int(id))
	}
	return pids, nil
}

func (j *job) wait() outcome {
	_ = j.child.Wait() // the state says it all
	return outcome{code: j.child.ProcessState.ExitCode()}
}

// terminate sends the console event that comes nearest to SIGTERM. A process
// without a console, such as a service, cannot send it, and the child is killed.
func (j *job) terminate() error {
	return windows.GenerateConsoleCtrlEvent(windows.CTRL_BREAK_EVENT, uint32(j.pid()))
}

func (j *job) kill() {
	j.mu.Lock()
	defer j.mu.Unlock()
	if !j.released {
		_ = windows.TerminateJobObject(j.handle, 1)
	}
}

func (j *job) release() {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.released = true
	windows.CloseHandle(j.handle)
}

// explain says what to do about a program that could not be started.
func explain(s *Spec, err error) error {
	remedy := "the system refuses"
	switch {
	case errors.Is(err, os.ErrNotExist):
		remedy = "there is no such file: correct the path or install it"
		if info, statErr := os.Stat(s.Dir); s.Dir != "" && (statErr != nil || !info.IsDir()) {
			remedy = fmt.Sprintf("its working directory %s is not there: create it", s.Dir)
		}
	case errors.Is(err, os.ErrPermission):
		remedy = "this user may not run it"
	case errors.Is(err, windows.ERROR_BAD_EXE_FORMAT):
		remedy = "it is not a program for this machine"
	}
	return fmt.Errorf("start %s: %s: %w", s.Path, remedy, err)
}
