//go:build unix

package child_test

import (
	"bufio"
	"context"
	"errors"
	"io"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"
)

// LIFE-3: the first SIGTERM drains, the second ends the process at once.
func TestSignals(t *testing.T) {
	echo := server(t)
	cmd := exec.CommandContext(context.WithoutCancel(t.Context()), os.Args[0], "@child", "{}")
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	defer stdin.Close()
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	addr := ""
	for lines := bufio.NewScanner(stdout); lines.Scan() && lines.Text() != "CMETHODS DONE"; {
		if words := strings.Fields(lines.Text()); len(words) > 3 && words[1] == "free" {
			addr = words[3]
		}
	}
	conn, err := connect(t, "tcp", addr, "", echo)
	if err != nil {
		t.Fatal(err)
	}
	talk(t, conn, "before")
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	for err == nil {
		_, err = connect(t, "tcp", addr, "", echo)
	}
	talk(t, conn, "after the first")
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	_ = conn.SetDeadline(time.Now().Add(patience))
	if _, err := conn.Read(make([]byte, 1)); errors.Is(err, os.ErrDeadlineExceeded) || err == nil {
		t.Error("the connection goes on:", err)
	}
	_, _ = io.Copy(io.Discard, stdout)
	if err := cmd.Wait(); err != nil {
		t.Error("exit:", err)
	}
}
