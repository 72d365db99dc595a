package host

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"go.uber.org/goleak"

	"pthost/ptipc"
	author "pthost/ptipc/child"
	"pthost/transports/direct"
)

// roles are what the test binary plays when it is started as a child: its first
// argument is "@child", its second the role.
var roles = map[string]func(args []string) int{
	"direct": func(args []string) int {
		author.MainArgs(args, author.Transport{Client: direct.Open})
		return 0 // not reached
	},
	"streams": func(args []string) int { // the same without datagrams
		author.MainArgs(args, author.Transport{Client: func(ctx context.Context, config ptipc.Opaque, env ptipc.Env) (*ptipc.Transport, error) {
			t, err := direct.Open(ctx, config, env)
			if err == nil {
				t.Packets = nil
			}
			return t, err
		}})
		return 0 // not reached
	},
}

func play(role string, args []string) int {
	if f, ok := roles[role]; ok {
		return f(args)
	}
	fmt.Fprintln(os.Stderr, "no such role:", role)
	return 1
}

func TestMain(m *testing.M) {
	if len(os.Args) > 2 && os.Args[1] == "@child" {
		os.Exit(play(os.Args[2], os.Args[3:]))
	}
	os.Exit(func() int {
		// What is left behind among temporary files shows in a directory of our own,
		// which children of other users can enter.
		dir, err := os.MkdirTemp("", "host-test-")
		if err != nil {
			panic(err)
		}
		defer os.RemoveAll(dir)
		if err := os.Chmod(dir, 0o711); err != nil {
			panic(err)
		}
		os.Setenv("TMPDIR", dir)
		// Otherwise every child with the race detector waits a second before it exits.
		os.Setenv("GORACE", "atexit_sleep_ms=0 "+os.Getenv("GORACE"))
		code := m.Run()
		if err := goleak.Find(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			code = 1
		}
		if left, _ := filepath.Glob(filepath.Join(dir, "ptipc-*")); len(left) > 0 {
			fmt.Fprintln(os.Stderr, "state directories are left behind:", left)
			code = 1
		}
		return code
	}())
}
