package cluster

import (
	"cmp"
	"context"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"github.com/hashicorp/go-memdb"
	"golang.org/x/time/rate"
)

// How often a duty makes a pass: at once while there is little to do, at this
// rate when changes keep coming.
const (
	passesPerSecond = 1
	passBurst       = 5
)

// Pauses after a pass that failed.
const (
	minDutyBackoff = 250 * time.Millisecond
	maxDutyBackoff = 30 * time.Second
)

// wakeup wakes everyone who waits. The zero value is ready.
type wakeup struct {
	mu sync.Mutex
	ch chan struct{} // closed by the next wake; guarded by mu
}

// wait returns a channel that closes at the next wake. Take it before looking
// at what the wake is about.
func (w *wakeup) wait() <-chan struct{} {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.ch == nil {
		w.ch = make(chan struct{})
	}
	return w.ch
}

func (w *wakeup) wake() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.ch != nil {
		close(w.ch)
		w.ch = nil
	}
}

// duty is a loop: make a pass, wait for a reason to make the next.
type duty struct {
	name string
	// pass brings about what should be, from what is; a second pass finds nothing
	// to do. What it adds to ws makes the next one due. It returns when ctx ends.
	pass func(ctx context.Context, ws memdb.WatchSet) error
	// every is the longest time between passes. 0 with an empty ws makes the next
	// one due at once: the pass itself waits, for another datacenter.
	every time.Duration
	// wake makes a pass due, and cuts the pause after a failure short.
	wake *wakeup
	// late starts with waiting, for what a fresh term does not know enough for.
	late bool
}

// do runs a duty until ctx ends.
func (l *leader) do(ctx context.Context, d duty) error {
	limit := rate.NewLimiter(passesPerSecond, passBurst)
	l.duties.begin(d.name)
	if d.late && !waitFor(ctx, d.every, nil, nil) {
		return nil
	}
	failures := 0
	for {
		if limit.Wait(ctx) != nil {
			return nil
		}
		var woken <-chan struct{}
		if d.wake != nil {
			woken = d.wake.wait()
		}
		ws := memdb.NewWatchSet()
		err := d.pass(ctx, ws)
		if ctx.Err() != nil {
			return nil
		}
		l.duties.report(d.name, err)
		if err != nil {
			failures++
			pause := dutyBackoff(failures)
			l.log.Warn("duty failed", "duty", d.name, "retry_in", pause, "error", err)
			if !waitFor(ctx, pause, nil, woken) {
				return nil
			}
			continue
		}
		if failures > 0 {
			l.log.Info("duty works again", "duty", d.name)
			failures = 0
		}
		if d.every == 0 && len(ws) == 0 {
			continue
		}
		if !waitFor(ctx, d.every, ws, woken) {
			return nil
		}
	}
}

// dutyBackoff returns the pause after that many failures: twice as long each
// time, the upper half of it random.
func dutyBackoff(failures int) time.Duration {
	d := min(minDutyBackoff<<min(failures-1, 16), maxDutyBackoff)
	return d/2 + rand.N(d/2)
}

// waitFor blocks until a channel in ws or woken closes or, if d is not 0, until
// it is over. It returns false when ctx ended.
func waitFor(ctx context.Context, d time.Duration, ws memdb.WatchSet, woken <-chan struct{}) bool {
	wctx := ctx
	if d > 0 {
		var cancel context.CancelFunc
		wctx, cancel = context.WithTimeout(ctx, d)
		defer cancel()
	}
	all := memdb.NewWatchSet()
	for ch := range ws {
		all.Add(ch)
	}
	if woken != nil {
		all.Add(woken)
	}
	if len(all) == 0 {
		<-wctx.Done()
		return ctx.Err() == nil
	}
	_ = all.WatchCtx(wctx) // why it ended is in ctx
	return ctx.Err() == nil
}

// duties is the state of the duties of a term.
type duties struct {
	mu   sync.Mutex
	list map[string]*dutyState // guarded by mu
}

type dutyState struct {
	DutyStatus
	failing bool
}

func (d *duties) reset() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.list = map[string]*dutyState{}
}

func (d *duties) begin(name string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.list[name] = &dutyState{DutyStatus: DutyStatus{Name: name, Since: time.Now()}}
}

func (d *duties) report(name string, err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	s, now := d.list[name], time.Now()
	if failing := err != nil; failing != s.failing {
		s.failing, s.Since = failing, now
	}
	if err != nil {
		s.LastError = err.Error()
		return
	}
	s.LastError, s.LastSuccess = "", now
}

func (d *duties) statuses() []DutyStatus {
	d.mu.Lock()
	defer d.mu.Unlock()
	out := make([]DutyStatus, 0, len(d.list))
	for _, s := range d.list {
		out = append(out, s.DutyStatus)
	}
	slices.SortFunc(out, func(a, b DutyStatus) int { return cmp.Compare(a.Name, b.Name) })
	return out
}
