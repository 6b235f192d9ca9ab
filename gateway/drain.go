package gateway

import (
	"cmp"
	"context"
	"errors"
	"math"
	"math/rand/v2"
	"time"
)

// Drainer is a [DataPlane] that can be taken out of use in order.
type Drainer interface {
	// Drain closes the listeners, once what waits to be accepted there has been,
	// and lets open connections finish; when p.Timeout is over it ends the rest at
	// p.Rate. It holds that state, for new tables too, until ctx ends: then the
	// listeners are bound again and it returns nil. It returns an error when Run
	// ends or is not running. One Drain runs at a time.
	//
	// progress is called from Drain's goroutine, at each change of the phase and
	// about once a second; it must not block.
	Drain(ctx context.Context, p Plan, progress func(Progress)) error
}

// Plan says how to drain.
type Plan struct {
	// Wait is the time between saying in the catalog that the proxy is going and
	// closing its listeners: clients learn of it meanwhile and go elsewhere.
	Wait time.Duration
	// Timeout is how long connections may take to finish by themselves.
	Timeout time.Duration
	// Rate is how many of the rest are ended per second; 0 or less ends all at once.
	Rate float64
}

// DrainPhase is a step of a drain.
type DrainPhase string

// The phases of a drain, in their order.
const (
	DrainWaiting   DrainPhase = "waiting"   // the catalog says so; clients learn of it
	DrainStopping  DrainPhase = "stopping"  // the last connections are accepted
	DrainFinishing DrainPhase = "finishing" // open connections go on
	DrainClosing   DrainPhase = "closing"   // what is left is ended, at a pace
	DrainDrained   DrainPhase = "drained"   // no connection is left
)

// Progress tells how far a drain is.
type Progress struct {
	Phase DrainPhase
	// Since is when the drain began.
	Since time.Time
	// Open connections, those that have Finished since the listeners were closed,
	// and those that the drain has Closed.
	Open, Finished, Closed int
	// Rate is how many connections ended per second, lately.
	Rate float64
	// ETA is when the drain is over at the latest, as far as is known.
	ETA time.Time
}

// Draining is what a data plane does for [RunDrain]. Its methods are called from
// one goroutine.
type Draining interface {
	// StopAccepting closes the listeners once their queues are empty, and returns
	// when nothing more is accepted. New tables open none until Resume.
	StopAccepting(ctx context.Context) error
	// Resume undoes StopAccepting, also one that failed.
	Resume()
	// Open is how many connections there are.
	Open() int
	// CloseOldest begins to end up to n connections, the oldest first, and returns
	// how many it found that were not being ended already.
	CloseOldest(n int) int
	// Ended is closed when there is nothing left to drain, because Run has ended.
	Ended() <-chan struct{}
}

// ErrStopped is what [Drainer.Drain] returns when the data plane does not run.
var ErrStopped = errors.New("drain: the data plane does not run")

// RunDrain is [Drainer.Drain] for a data plane that can do the parts.
func RunDrain(ctx context.Context, p Plan, d Draining, progress func(Progress)) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	ended := make(chan struct{})
	go watchEnd(ctx, d, cancel, ended)
	defer func() { cancel(nil); <-ended }()

	t := tracker{plan: p, d: d, tell: progress, deadline: time.Now().Add(p.Timeout)}
	t.now.Since = time.Now()
	t.enter(DrainStopping)
	if err := d.StopAccepting(ctx); err != nil && ctx.Err() == nil {
		d.Resume()
		return err
	}
	t.deadline = time.Now().Add(p.Timeout)
	t.opened = d.Open()
	t.enter(DrainFinishing)
	for t.now.Open > 0 && time.Now().Before(t.deadline) && sleep(ctx, min(drainTick, time.Until(t.deadline))) {
		t.update()
	}
	if t.now.Open > 0 && ctx.Err() == nil {
		t.enter(DrainClosing)
		err := Pacer{Rate: p.Rate}.Run(ctx, func(n int) bool {
			t.closed += d.CloseOldest(n)
			t.update()
			return t.now.Open > 0
		})
		_ = err // that of ctx, which is looked at below
	}
	if ctx.Err() == nil {
		t.enter(DrainDrained)
	}
	<-ctx.Done()
	if errors.Is(context.Cause(ctx), ErrStopped) {
		return ErrStopped
	}
	d.Resume()
	return nil
}

func watchEnd(ctx context.Context, d Draining, cancel context.CancelCauseFunc, ended chan<- struct{}) {
	defer close(ended)
	select {
	case <-d.Ended():
		cancel(ErrStopped)
	case <-ctx.Done():
	}
}

// drainTick is how often the open connections are counted.
const drainTick = 100 * time.Millisecond

// tracker makes the progress.
type tracker struct {
	plan     Plan
	d        Draining
	tell     func(Progress)
	deadline time.Time
	opened   int // when nothing more was accepted
	closed   int

	now    Progress
	told   time.Time
	toldAt int // how many had ended by then
}

func (t *tracker) enter(phase DrainPhase) {
	t.now.Phase = phase
	t.told = time.Time{}
	t.update()
}

// update counts, and tells what it finds once a second.
func (t *tracker) update() {
	now := time.Now()
	t.now.Open, t.now.Closed = t.d.Open(), t.closed
	t.now.Finished = max(0, t.opened-t.now.Open-t.closed)
	t.now.ETA = now
	if t.now.Open > 0 {
		t.now.ETA = t.plan.until(now, t.deadline, t.now.Open)
	}
	since := now.Sub(t.told)
	if since < time.Second {
		return
	}
	gone := t.opened - t.now.Open
	if !t.told.IsZero() {
		t.now.Rate = float64(gone-t.toldAt) / since.Seconds()
	}
	t.told, t.toldAt = now, gone
	t.tell(t.now)
}

// until is when the last of open connections is closed, if none finishes.
func (p Plan) until(now, deadline time.Time, open int) time.Time {
	at := deadline
	if now.After(at) {
		at = now
	}
	if p.Rate > 0 {
		at = at.Add(time.Duration(float64(open) / p.Rate * float64(time.Second)))
	}
	return at
}

// Pacer does something often, and never often at once: it ends connections so
// that those who open them again do not all come in the same moment. A drain uses
// it, and so do a failback and a rebalancing: whoever may decide what to end calls
// Run and ends the oldest each time, until those that should move have moved.
type Pacer struct {
	// Rate is how often per second, on average; 0 or less is all at once.
	Rate float64
	// Jitter is how far a gap may be from the average, as a part of it: 0 means 0.5
	// and less than 0 none. At most 1.
	Jitter float64
	// Rand may be nil.
	Rand *rand.Rand
}

// paceLeast is the least time between two turns; at rates above its inverse a
// turn is for several.
const paceLeast = 10 * time.Millisecond

// Run calls act with the number that is due until act returns false, or ctx ends,
// whose error it returns. The first turn comes at once. A turn that comes late
// does not make up for it.
func (p Pacer) Run(ctx context.Context, act func(n int) (more bool)) error {
	n, gap := math.MaxInt, paceLeast
	if p.Rate > 0 {
		n, gap = 1, time.Duration(float64(time.Second)/p.Rate)
		if gap < paceLeast {
			n = int(math.Ceil(float64(paceLeast) / float64(gap)))
			gap = time.Duration(float64(n) / p.Rate * float64(time.Second))
		}
	}
	jitter := min(cmp.Or(p.Jitter, 0.5), 1)
	float := rand.Float64
	if p.Rand != nil {
		float = p.Rand.Float64
	}
	next := time.Now()
	for act(n) {
		d := float64(gap)
		if jitter > 0 {
			d *= 1 + jitter*(2*float()-1)
		}
		next = next.Add(time.Duration(d))
		if now := time.Now(); next.Before(now) {
			next = now
		}
		if !sleep(ctx, time.Until(next)) {
			return ctx.Err()
		}
	}
	return nil
}

// sleep returns false when ctx ended before d was over.
func sleep(ctx context.Context, d time.Duration) bool {
	if d <= 0 {
		return ctx.Err() == nil
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return ctx.Err() == nil
	case <-ctx.Done():
		return false
	}
}
