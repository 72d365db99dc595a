package proc

import (
	"errors"
	"fmt"
	"os"
	"syscall"

	"github.com/landlock-lsm/go-landlock/landlock"
	llsys "github.com/landlock-lsm/go-landlock/landlock/syscall"
	"golang.org/x/sys/unix"
)

const canRestrict = true

// What every program may use. /proc shows of other processes what everybody may see:
// the sandbox keeps the rest from the child, as it does ptrace. Of /etc only what
// libraries look for: the rest is the machine's own business.
var (
	systemRead = []string{
		"/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32", "/nix/store", "/gnu/store",
		"/proc", "/sys/devices/system", "/sys/fs/cgroup", "/sys/kernel/mm",
		"/etc/ld.so.cache", "/etc/ld.so.preload", "/etc/alternatives", "/etc/localtime", "/etc/timezone", "/etc/locale.alias",
		"/etc/ssl/certs", "/etc/ssl/openssl.cnf", "/etc/ca-certificates", "/etc/pki/tls/certs", "/etc/pki/ca-trust", "/etc/crypto-policies",
		"/etc/hosts", "/etc/host.conf", "/etc/resolv.conf", "/etc/nsswitch.conf", "/etc/gai.conf", "/etc/services", "/etc/protocols",
		"/etc/passwd", "/etc/group", "/etc/mime.types", "/run/systemd/resolve",
		"/dev/random", "/dev/urandom", "/dev/zero",
	}
	systemWrite = []string{"/dev/null", "/dev/full"}
)

// sandboxWorks reports whether this kernel has Landlock.
func sandboxWorks() bool {
	version, err := llsys.LandlockGetABIVersion()
	return err == nil && version > 0
}

// enforce puts the calling process, and all that it starts, into the sandbox.
func (s *Sandbox) enforce(command string) error {
	rules := []landlock.Rule{
		landlock.ROFiles(command).IgnoreIfMissing(), // that it is missing says exec
		landlock.RWDirs(".").WithRefer(),
	}
	allow := func(paths []string, dirs, files func(...string) landlock.FSRule) {
		for _, path := range paths {
			info, err := os.Stat(path)
			switch {
			case err != nil: // not on this machine
			case info.IsDir():
				rules = append(rules, dirs(path).IgnoreIfMissing())
			default:
				rules = append(rules, files(path).IgnoreIfMissing())
			}
		}
	}
	allow(systemRead, landlock.RODirs, landlock.ROFiles)
	allow(s.Read, landlock.RODirs, landlock.ROFiles)
	allow(systemWrite, landlock.RWDirs, landlock.RWFiles)
	allow(s.Write, landlock.RWDirs, landlock.RWFiles)
	if err := landlock.V11.BestEffort().RestrictPaths(rules...); err != nil {
		return fmt.Errorf("its sandbox cannot be set up: %w", err)
	}
	return nil
}

// enforce sets the limits of a process that this thread has started and traces, and lets
// it run. Set on this process they would bind it as well, and it needs some room to
// watch over the other.
func (l Limits) enforce(pid int, user *Credential) error {
	for {
		var status syscall.WaitStatus
		if _, err := syscall.Wait4(pid, &status, 0, nil); errors.Is(err, syscall.EINTR) {
			continue
		} else if err != nil {
			return err
		}
		if !status.Stopped() {
			return errors.New("it ended before its limits were set")
		}
		if status.StopSignal() == syscall.SIGTRAP {
			break
		}
		if err := syscall.PtraceCont(pid, int(status.StopSignal())); err != nil {
			return err
		}
	}
	if err := as(user, func() error { return l.set(pid) }); err != nil {
		return err
	}
	return syscall.PtraceDetach(pid)
}

// as calls f with the real user and group of this process changed: they are what the
// system compares with those of a process whose limits are set, and only with
// CAP_SYS_RESOURCE, which root in a container has not, can those be another user's.
func as(user *Credential, f func() error) error {
	if user == nil {
		return f()
	}
	uid, gid := os.Getuid(), os.Getgid()
	change := func(uid, gid int) error {
		return errors.Join(syscall.Setresgid(gid, -1, -1), syscall.Setresuid(uid, -1, -1))
	}
	if err := change(int(user.UID), int(user.GID)); err != nil {
		return err
	}
	return errors.Join(f(), change(uid, gid))
}

func (l Limits) set(pid int) error {
	for _, limit := range []struct {
		resource int
		most     uint64
		what     string
	}{
		{unix.RLIMIT_NOFILE, l.Descriptors, "descriptors"},
		{unix.RLIMIT_DATA, l.Memory, "bytes of memory"},
		{unix.RLIMIT_NPROC, l.Processes, "processes"},
	} {
		if limit.most == 0 {
			continue
		}
		err := unix.Prlimit(pid, limit.resource, &unix.Rlimit{Cur: limit.most, Max: limit.most}, nil)
		if err == nil {
			continue
		}
		var own unix.Rlimit
		if e := unix.Getrlimit(limit.resource, &own); e == nil && limit.most > own.Max {
			return fmt.Errorf("its limit of %d %s is more than the %d of this process: lower it, or raise that: %w", limit.most, limit.what, own.Max, err)
		}
		return fmt.Errorf("its limit of %d %s cannot be set: %w", limit.most, limit.what, err)
	}
	return nil
}
