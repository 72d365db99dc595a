package proc

import (
	"fmt"
	"os"

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

// enforce sets the limits of a process that has just been started. Set on this process
// they would bind it as well, and it needs some room to watch over the other.
func (l Limits) enforce(pid int) error {
	for resource, limit := range map[int]uint64{
		unix.RLIMIT_NOFILE: l.Descriptors,
		unix.RLIMIT_DATA:   l.Memory,
		unix.RLIMIT_NPROC:  l.Processes,
	} {
		if limit == 0 {
			continue
		}
		if err := unix.Prlimit(pid, resource, &unix.Rlimit{Cur: limit, Max: limit}, nil); err != nil {
			return fmt.Errorf("its limits cannot be set: %w", err)
		}
	}
	return nil
}
