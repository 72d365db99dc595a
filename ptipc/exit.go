package ptipc

import (
	"errors"
	"fmt"
	"os"
)

// An ExitCode is how a process says why it ended: 0, or a code of sysexits
// (ERR-4). It is an error; an error that wraps one sets a child's exit code.
type ExitCode int

// The codes of sysexits(3).
const (
	ExitOK          ExitCode = 0
	ExitUsage       ExitCode = 64 // the command line is wrong
	ExitDataErr     ExitCode = 65 // the input is not what it should be: CONFIG is not JSON
	ExitNoInput     ExitCode = 66 // an input file is missing
	ExitNoUser      ExitCode = 67 // no such user
	ExitNoHost      ExitCode = 68 // no such host
	ExitUnavailable ExitCode = 69 // something needed is not there
	ExitSoftware    ExitCode = 70 // an error of the program
	ExitOSErr       ExitCode = 71 // the system refused something
	ExitOSFile      ExitCode = 72 // a system file is missing or wrong
	ExitCantCreate  ExitCode = 73 // an output file cannot be made
	ExitIOErr       ExitCode = 74 // input or output failed
	ExitTempFail    ExitCode = 75 // it may work later
	ExitProtocol    ExitCode = 76 // the other side broke the protocol
	ExitNoPerm      ExitCode = 77 // not permitted
	ExitConfig      ExitCode = 78 // the configuration is JSON, and wrong
)

var exitText = map[ExitCode]string{
	ExitOK: "success", ExitUsage: "wrong usage", ExitDataErr: "bad input data", ExitNoInput: "no input",
	ExitNoUser: "no such user", ExitNoHost: "no such host", ExitUnavailable: "service unavailable",
	ExitSoftware: "internal error", ExitOSErr: "system error", ExitOSFile: "system file missing",
	ExitCantCreate: "cannot create output", ExitIOErr: "input/output error", ExitTempFail: "temporary failure",
	ExitProtocol: "protocol error", ExitNoPerm: "permission denied", ExitConfig: "configuration error",
}

func (c ExitCode) Error() string {
	if s, ok := exitText[c]; ok {
		return fmt.Sprintf("%s (exit code %d)", s, int(c))
	}
	return fmt.Sprintf("exit code %d", int(c))
}

// Final reports whether starting again without a change cannot help: usage,
// data, permission and configuration errors (LIFE-6).
func (c ExitCode) Final() bool {
	return c == ExitUsage || c == ExitDataErr || c == ExitNoPerm || c == ExitConfig
}

// ExitCodeOf is the code that a process ends with because of err.
func ExitCodeOf(err error) ExitCode {
	var code ExitCode
	var config *ConfigError
	switch {
	case err == nil:
		return ExitOK
	case errors.As(err, &code):
		return code
	case errors.As(err, &config):
		return ExitConfig
	case errors.Is(err, os.ErrPermission):
		return ExitNoPerm
	case errors.Is(err, os.ErrNotExist):
		return ExitUnavailable
	}
	switch ClassOf(err) {
	case ErrTimedOut:
		return ExitTempFail
	case ErrNetworkUnreachable, ErrHostUnreachable, ErrRefused:
		return ExitUnavailable
	default:
		return ExitSoftware
	}
}
