package gateway

import (
	"context"
	"errors"
	"net"
	"slices"
	"sync/atomic"
	"syscall"
)

// The reasons why an attempt at an endpoint failed.
const (
	FailRefused     = "refused"       // nothing listens there
	FailTimeout     = "timeout"       // it could not be connected to in time
	FailUnreachable = "unreachable"   // there is no way to it
	FailReset       = "reset"         // it took the connection and reset it before it answered
	FailClosed      = "closed"        // it took the connection and closed it before it answered
	FailNoAnswer    = "no-answer"     // it took the connection and said nothing
	FailHandshake   = "tls-handshake" // sidecar: mutual TLS failed
	FailOther       = "other"
)

var failReasons = [...]string{
	FailRefused, FailTimeout, FailUnreachable, FailReset, FailClosed, FailNoAnswer, FailHandshake, FailOther,
}

// FailReason is the reason of an error of connecting.
func FailReason(err error) string {
	var timeout net.Error
	switch {
	case errors.Is(err, syscall.ECONNREFUSED):
		return FailRefused
	case errors.Is(err, syscall.EHOSTUNREACH), errors.Is(err, syscall.ENETUNREACH):
		return FailUnreachable
	case errors.Is(err, syscall.ETIMEDOUT), errors.Is(err, context.DeadlineExceeded), errors.As(err, &timeout) && timeout.Timeout():
		return FailTimeout
	case errors.Is(err, syscall.ECONNRESET), errors.Is(err, syscall.EPIPE):
		return FailReset // it was there, before the first byte could be sent
	}
	return FailOther
}

// Failures counts the failures of an endpoint by the Fail constants. The zero value
// is ready, and takes next to no memory before the first; its methods may be called
// from any goroutine.
type Failures struct {
	counts atomic.Pointer[[len(failReasons)]atomic.Uint64]
}

// Add counts one.
func (f *Failures) Add(reason string) {
	counts := f.counts.Load()
	if counts == nil {
		counts = new([len(failReasons)]atomic.Uint64)
		if !f.counts.CompareAndSwap(nil, counts) {
			counts = f.counts.Load()
		}
	}
	i := slices.Index(failReasons[:], reason)
	if i < 0 {
		i = len(failReasons) - 1
	}
	counts[i].Add(1)
}

// Map returns what was counted, without the reasons that never were; nil for
// nothing.
func (f *Failures) Map() map[string]uint64 {
	counts := f.counts.Load()
	if counts == nil {
		return nil
	}
	out := map[string]uint64{}
	for i := range counts {
		if n := counts[i].Load(); n > 0 {
			out[failReasons[i]] = n
		}
	}
	return out
}
