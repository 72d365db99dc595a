package host

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"pthost/ptipc"
	"pthost/ptipc/proc"
	"pthost/ptipc/testpeer"
)

const nobody = 65534

// published is a directory that every user can enter, with a copy of this test in it.
func published(t *testing.T) (dir, path string) {
	t.Helper()
	dir = filepath.Join(os.TempDir(), "published") // that of t.TempDir lets nobody in
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil { // whatever the umask is
		t.Fatal(err)
	}
	from, err := os.Open(os.Args[0])
	if err != nil {
		t.Fatal(err)
	}
	defer from.Close()
	path = filepath.Join(dir, "pt")
	to, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE, 0o755)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.Copy(to, from); err != nil {
		t.Fatal(err)
	}
	if err := to.Close(); err != nil {
		t.Fatal(err)
	}
	return dir, path
}

// LIFE-8: a child of another user has a state directory of its own, and the host is
// let in (SOCKS-17, by the uid of ARG-5).
func TestCredential(t *testing.T) {
	if os.Geteuid() != 0 {
		testpeer.Skip(t, "only root can start a child as another user; run the tests as root")
	}
	dir, path := published(t)
	echo := server(t)
	command := func() *Command {
		c := self("fixture")
		c.Path, c.Credential = path, &proc.Credential{UID: nobody, GID: nobody}
		return c
	}
	for _, state := range []string{"", filepath.Join(dir, "state"), filepath.Join(dir, "state")} { // the last one belongs to it already
		c := command()
		events := record(c)
		transport := open(t, c, `{}`, ptipc.Env{Local: state})
		talk(t, dial(t, transport.Connections["free"], "", echo), "as nobody")
		pid := last(events.until(t, Ready)).Pid
		status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
		if err != nil || !strings.Contains(string(status), "Uid:\t65534\t65534\t65534\t65534\n") || !strings.Contains(string(status), "Groups:\t \n") {
			t.Errorf("%v, %s", err, status)
		}
		kill(t, pid) // it must be able to replace its old socket
		events.until(t, Ready)
		talk(t, dial(t, transport.Connections["free"], "", echo), "again")
		if state != "" {
			info, err := os.Stat(state)
			if err != nil || info.Sys().(*syscall.Stat_t).Uid != nobody || info.Mode().Perm() != 0o700 {
				t.Error("the state directory:", info, err)
			}
		}
		if err := transport.Close(); err != nil {
			t.Error(err)
		}
	}

	// With a way out of ours, to which that user is let in as well.
	c := command()
	way := &onlyWay{echo: echo}
	transport := open(t, c, `{}`, ptipc.Env{DialOut: way.dial})
	talk(t, dial(t, transport.Connections["free"], "", "canary.invalid:7"), "way out")
	transport.Close()

	// A directory that others can enter is not given away.
	public := filepath.Join(dir, "public")
	if err := os.Mkdir(public, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := refused(t, command(), `{}`, ptipc.Env{Local: public}); !errors.Is(err, fs.ErrPermission) {
		t.Error(err)
	}
	if info, err := os.Stat(public); err != nil || info.Sys().(*syscall.Stat_t).Uid != 0 {
		t.Error("it was given away:", info, err)
	}
	// Nor one that another child uses.
	used := stateDir(t)
	open(t, self("direct"), `{}`, ptipc.Env{Local: used})
	refused(t, command(), `{}`, ptipc.Env{Local: used})
	if info, err := os.Stat(used); err != nil || info.Sys().(*syscall.Stat_t).Uid != 0 {
		t.Error("it was given away:", info, err)
	}
}
