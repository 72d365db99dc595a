//go:build unix

package courier

import "syscall"

func makePipe(file string) error { return syscall.Mkfifo(file, 0o600) }
