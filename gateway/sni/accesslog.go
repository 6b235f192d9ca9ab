package sni

import (
	"sync"
	"sync/atomic"
	"time"

	"github.com/sluicemesh/sluice/gateway"
)

// accessLog passes lines on to a log that may block, without blocking. Nil stands
// for no log; only add must not be called on it.
type accessLog struct {
	log     *gateway.AccessLog
	lines   chan accessLine
	last    chan struct{} // closed when nothing is added any more
	dropped atomic.Uint64
	wg      sync.WaitGroup
}

type accessLine struct {
	c      gateway.Connection
	reason string
}

const (
	// keptLines is how many lines may wait for the log.
	keptLines = 4096
	// logRest is how long they wait for others: to be woken for each takes a processor
	// from connections each time.
	logRest = 20 * time.Millisecond
)

func newAccessLog(log *gateway.AccessLog) *accessLog {
	if log == nil {
		return nil
	}
	return &accessLog{log: log, lines: make(chan accessLine, keptLines), last: make(chan struct{})}
}

// sampled says whether a connection that begins is one to tell of.
func (a *accessLog) sampled() bool { return a != nil && a.log.Sampled() }

// add tells of a connection that has ended.
func (a *accessLog) add(c gateway.Connection, reason string) {
	select {
	case a.lines <- accessLine{c, reason}:
	default:
		a.dropped.Add(1)
	}
}

// start begins to write; stop ends it once all is written. Nothing may be added
// after stop.
func (a *accessLog) start() {
	if a == nil {
		return
	}
	a.wg.Go(func() {
		var told uint64
		tell := func() {
			if n := a.dropped.Load(); n != told {
				a.log.Logger.Warn("connections are missing here: the log did not keep up", "count", n-told)
				told = n
			}
		}
		for l := range a.lines {
			a.log.Write(&l.c, l.reason)
			if len(a.lines) == 0 {
				tell()
				select {
				case <-time.After(logRest):
				case <-a.last:
				}
			}
		}
		tell()
	})
}

func (a *accessLog) stop() {
	if a != nil {
		close(a.last)
		close(a.lines)
		a.wg.Wait()
	}
}
