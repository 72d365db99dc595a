package sip003

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
)

// patience is how long a test waits for what comes at once.
const patience = 30 * time.Second

// helpers are what the test binary plays when it is started as another process: its
// first argument is "@" and the name.
var helpers = map[string]func(args []string){"@parent": parentHelper, "@watcher": watcherHelper}

func TestMain(m *testing.M) {
	if len(os.Args) > 1 && helpers[os.Args[1]] != nil {
		helpers[os.Args[1]](os.Args[2:])
		return
	}
	// What is made of the race detector would sleep for a second before it exits.
	if err := os.Setenv("GORACE", "atexit_sleep_ms=0 "+os.Getenv("GORACE")); err != nil {
		panic(err)
	}
	goleak.VerifyTestMain(m)
}

// self is this test binary.
func self() string {
	path, err := os.Executable()
	if err != nil {
		panic(err)
	}
	return path
}

// parentHelper starts a process that watches it and lives until it is killed.
func parentHelper([]string) {
	cmd := exec.Command(self(), "@watcher")
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	if err := cmd.Start(); err != nil {
		panic(err)
	}
	select {}
}

// watcherHelper says when it watches, and ends with its parent.
func watcherHelper([]string) {
	ctx, stop := WithParent(context.Background(), quiet)
	defer stop()
	_, _ = fmt.Fprintln(os.Stdout, "watching")
	<-ctx.Done()
}

var quiet = slog.New(slog.DiscardHandler)

// answering is a service that answers each stream, once it has ended, with what it was.
func answering(t *testing.T) *net.TCPAddr {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var open sync.WaitGroup
	open.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			open.Go(func() {
				defer conn.Close()
				all, _ := io.ReadAll(conn)
				fmt.Fprintf(conn, "heard %s", all)
			})
		}
	})
	t.Cleanup(func() { l.Close(); open.Wait() })
	return l.Addr().(*net.TCPAddr)
}

// ask says a word, ends its direction and reads the answer.
func ask(conn net.Conn, word string) (string, error) {
	_ = conn.SetDeadline(time.Now().Add(patience))
	if _, err := io.WriteString(conn, word); err != nil {
		return "", err
	}
	if err := conn.(interface{ CloseWrite() error }).CloseWrite(); err != nil {
		return "", err
	}
	answer, err := io.ReadAll(conn)
	return string(answer), err
}

// unused is a port of the loopback that was free a moment ago.
func unused(t testing.TB) uint16 {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return uint16(l.Addr().(*net.TCPAddr).Port)
}
