//go:build !unix

package courier

import "errors"

func makePipe(string) error { return errors.ErrUnsupported }
