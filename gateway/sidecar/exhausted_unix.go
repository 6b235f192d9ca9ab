//go:build unix

package sidecar

import (
	"errors"
	"syscall"
)

// isExhausted tells whether accepting failed for want of something that will be
// had again.
func isExhausted(err error) bool {
	for _, e := range []error{syscall.EMFILE, syscall.ENFILE, syscall.ENOBUFS, syscall.ENOMEM, syscall.ECONNABORTED} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}
