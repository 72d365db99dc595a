package ptipc

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"syscall"
	"testing"
)

// ERR-1, ERR-2: the class comes from types, and survives wrapping.
func TestClassOf(t *testing.T) {
	refused := &net.OpError{Op: "dial", Err: os.NewSyscallError("connect", syscall.ECONNREFUSED)}
	for _, tt := range []struct {
		err  error
		want Class
	}{
		{refused, ErrRefused},
		{fmt.Errorf("x: %w", refused), ErrRefused},
		{errors.New("connection refused"), ErrGeneral},
		{io.EOF, ErrGeneral},
		{syscall.ENETUNREACH, ErrNetworkUnreachable},
		{syscall.EHOSTUNREACH, ErrHostUnreachable},
		{syscall.ETIMEDOUT, ErrTimedOut},
		{syscall.EPERM, ErrNotAllowed},
		{syscall.EAFNOSUPPORT, ErrAddressType},
		{&net.DNSError{IsNotFound: true}, ErrHostUnreachable},
		{&net.DNSError{IsTimeout: true}, ErrTimedOut},
		{&net.AddrError{}, ErrAddressType},
		{context.DeadlineExceeded, ErrTimedOut},
		{os.ErrDeadlineExceeded, ErrTimedOut},
		{ErrCommand, ErrCommand},
		{fmt.Errorf("x: %w", ErrSettingsTooLarge), ErrSettingsTooLarge},
		{&ConfigError{Problem: "p"}, ErrSettingsRefused},
		{WithClass(ErrNotAllowed, refused), ErrNotAllowed},
		{Class(0x77), ErrGeneral},
	} {
		if got := ClassOf(tt.err); got != tt.want {
			t.Errorf("%v: %v, want %v", tt.err, got, tt.want)
		}
		classified := Classify(tt.err)
		if !errors.Is(classified, tt.want) || !errors.Is(classified, tt.err) {
			t.Errorf("%v: Classify gave %#v", tt.err, classified)
		}
	}
	if Classify(nil) != nil {
		t.Error("Classify(nil) is an error")
	}
	var timeout net.Error
	if err := Classify(&net.OpError{Op: "dial", Err: ErrTimedOut}); !errors.As(err, &timeout) || !timeout.Timeout() {
		t.Errorf("%v is no time-out", err)
	}
}

// ERR-4, LIFE-6
func TestExitCodes(t *testing.T) {
	for _, tt := range []struct {
		err   error
		want  ExitCode
		final bool
	}{
		{nil, ExitOK, false},
		{fmt.Errorf("x: %w", ExitUsage), ExitUsage, true},
		{&ConfigError{}, ExitConfig, true},
		{ExitDataErr, ExitDataErr, true},
		{os.ErrPermission, ExitNoPerm, true},
		{context.DeadlineExceeded, ExitTempFail, false},
		{os.ErrNotExist, ExitUnavailable, false},
		{ErrRefused, ExitUnavailable, false},
		{errors.New("x"), ExitSoftware, false},
	} {
		if got := ExitCodeOf(tt.err); got != tt.want || got.Final() != tt.final {
			t.Errorf("%v: %v, final %v", tt.err, got, got.Final())
		}
	}
}
