//go:build !unix

package sidecar

// isExhausted tells whether accepting failed for want of something that will be
// had again; here nothing tells such a failure from another.
func isExhausted(error) bool { return false }
