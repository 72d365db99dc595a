//go:build unix

package proc_test

import (
	"context"
	"errors"
	"fmt"
	"os"

	"pthost/ptipc/proc"
)

func Example() {
	lines := make(chan string)
	child, err := proc.Start(context.Background(), proc.Spec{
		Path:   "/bin/sh",
		Args:   []string{"-c", "read name; echo hello $name; read end; echo bye >&2; exit 75"},
		OnLine: func(line []byte, _ bool) { lines <- string(line) },
	})
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return
	}
	if err := child.WriteLine([]byte("world")); err != nil {
		fmt.Fprintln(os.Stderr, err)
	}
	fmt.Fprintln(os.Stdout, <-lines)
	if err := child.Stop(context.Background()); err != nil {
		fmt.Fprintln(os.Stderr, err)
	}
	var exit *proc.ExitError
	if errors.As(child.Err(), &exit) {
		fmt.Fprintln(os.Stdout, exit.Code, exit.Stderr)
	}
	// Output:
	// hello world
	// 75 [bye]
}
