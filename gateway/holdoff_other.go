//go:build !linux

package gateway

import (
	"errors"
	"syscall"
)

// HoldOffConn is not to be had here: what is queued in the moment a listener
// closes is reset.
func HoldOffConn(syscall.Conn) error { return errors.ErrUnsupported }
