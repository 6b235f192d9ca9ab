package gateway

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"
)

// Errors of [Runner.Drain] and its kin.
var (
	ErrNoProxy     = errors.New("there is no such proxy")
	ErrDraining    = errors.New("it is being drained already")
	ErrNotDraining = errors.New("it is not being drained")
	ErrNoDrain     = errors.New("its data plane cannot be drained")
)

// drainJob is one drain of a proxy, from when it is asked for to when it is taken
// back. Data planes may come and go meanwhile.
type drainJob struct {
	plan     Plan
	announce func(on bool) error
	began    time.Time

	progress atomic.Pointer[Progress]
	drained  chan struct{} // closed when there is nothing left
	once     sync.Once     // of drained

	// ctx ends when it is taken back.
	ctx    context.Context
	cancel context.CancelFunc
	done   chan struct{} // closed when it has been
	err    error         // of that; read after done
}

func (j *drainJob) tell(p Progress) {
	p.Since = j.began
	j.progress.Store(&p)
	if p.Phase == DrainDrained {
		j.once.Do(func() { close(j.drained) })
	}
}

// Drain begins to take a proxy out of use, and returns when that has been
// announced: announce(true) is called at once, and its error ends it; p.Wait later
// the data plane is drained. It stays so, for a data plane that is started anew
// too, until [Runner.CancelDrain] or the end of Run.
func (r *Runner) Drain(proxyID string, p Plan, announce func(on bool) error) error {
	w := r.worker(proxyID)
	if w == nil {
		return ErrNoProxy
	}
	if plane := w.plane.Load(); plane.plane == nil {
		return fmt.Errorf("%w: none is running", ErrNoDrain)
	} else if _, ok := plane.plane.(Drainer); !ok {
		return fmt.Errorf("%w: %q cannot", ErrNoDrain, plane.name)
	}
	j := &drainJob{plan: p, announce: announce, began: time.Now(), drained: make(chan struct{}), done: make(chan struct{})}
	j.ctx, j.cancel = context.WithCancel(context.Background())
	open := w.openConnections()
	j.tell(Progress{Phase: DrainWaiting, Open: open, ETA: p.until(j.began, j.began.Add(p.Wait+p.Timeout), open)})
	if !w.drain.CompareAndSwap(nil, j) {
		j.cancel()
		return ErrDraining
	}
	if err := announce(true); err != nil {
		w.drain.Store(nil)
		j.cancel()
		return fmt.Errorf("announce the drain: %w", err)
	}
	w.drainAsked.set()
	return nil
}

// DrainProgress tells how far the drain of a proxy is; the error is ErrNoProxy or
// ErrNotDraining.
func (r *Runner) DrainProgress(proxyID string) (*Progress, error) {
	j, _, err := r.job(proxyID)
	if err != nil {
		return nil, err
	}
	return j.progress.Load(), nil
}

// AwaitDrained waits until the drain of a proxy has left no connection, it is
// taken back, or ctx ends, whose error it returns.
func (r *Runner) AwaitDrained(ctx context.Context, proxyID string) error {
	j, w, err := r.job(proxyID)
	if err != nil {
		return err
	}
	select {
	case <-j.drained:
	case <-j.done:
	case <-w.done:
	case <-ctx.Done():
		return ctx.Err()
	}
	return nil
}

// CancelDrain takes a drain back: the listeners are bound again, then
// announce(false) is called, whose error it returns. It waits for all that, or
// until ctx ends.
func (r *Runner) CancelDrain(ctx context.Context, proxyID string) error {
	j, w, err := r.job(proxyID)
	if err != nil {
		return err
	}
	j.cancel()
	select {
	case <-j.done:
		return j.err
	case <-w.done: // the runner ends, or the proxy is gone
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// Connections returns open connections of a proxy, the oldest first; the error is
// ErrNoProxy, or says that its data plane does not tell.
func (r *Runner) Connections(proxyID string, limit int) ([]Connection, error) {
	w := r.worker(proxyID)
	if w == nil {
		return nil, ErrNoProxy
	}
	p := w.plane.Load()
	if p.plane == nil {
		return nil, nil
	}
	l, ok := p.plane.(ConnectionLister)
	if !ok {
		return nil, fmt.Errorf("data plane %q does not list its connections", p.name)
	}
	return l.Connections(limit), nil
}

func (r *Runner) worker(proxyID string) *worker {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.workers[proxyID]
}

func (r *Runner) job(proxyID string) (*drainJob, *worker, error) {
	w := r.worker(proxyID)
	if w == nil {
		return nil, nil, ErrNoProxy
	}
	j := w.drain.Load()
	if j == nil {
		return nil, nil, ErrNotDraining
	}
	return j, w, nil
}

func (w *worker) openConnections() (n int) {
	if p := w.plane.Load(); p.plane != nil {
		for _, l := range p.plane.Status().Listeners {
			n += int(l.Active)
		}
	}
	return n
}

// drains runs the drains of the proxy, one at a time, until ctx ends.
func (w *worker) drains(ctx context.Context) {
	for w.drainAsked.wait(ctx) {
		j := w.drain.Load()
		if j == nil {
			continue
		}
		w.logger.Info("drain begins", "wait", j.plan.Wait, "timeout", j.plan.Timeout, "rate", j.plan.Rate)
		w.runDrain(ctx, j)
		if ctx.Err() != nil {
			return // it goes down drained, and says so in the catalog
		}
		if j.err = j.announce(false); j.err != nil {
			j.err = fmt.Errorf("take back the announcement of the drain: %w", j.err)
		}
		w.logger.Info("drain taken back")
		w.drain.Store(nil)
		close(j.done)
	}
}

// runDrain drains the data plane, and each that takes its place, until the job is
// taken back or ctx ends.
func (w *worker) runDrain(ctx context.Context, j *drainJob) {
	// The end of ctx ends the data plane, and that its drain, which must not be taken
	// back first: it would accept for its last moment.
	drainCtx := j.ctx
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(drainCtx, cancel)()
	for until := j.began.Add(j.plan.Wait); time.Now().Before(until); {
		if !sleep(ctx, min(time.Second, time.Until(until))) {
			return
		}
		p := *j.progress.Load()
		p.Open = w.openConnections()
		p.ETA = j.plan.until(time.Now(), until.Add(j.plan.Timeout), p.Open)
		j.tell(p)
	}
	for ctx.Err() == nil {
		d, ok := w.plane.Load().plane.(Drainer)
		err := ErrStopped
		if ok {
			err = d.Drain(drainCtx, j.plan, j.tell)
		} else { // none runs, or another was chosen that cannot
			j.tell(Progress{Phase: DrainDrained, Open: w.openConnections(), ETA: time.Now()})
		}
		switch {
		case err == nil:
			return
		case errors.Is(err, ErrStopped):
			// A data plane that has ended is replaced in a moment, and one that was made
			// begins to run in a moment.
			w.replaced.waitFor(ctx, 100*time.Millisecond)
		default:
			w.logger.Error("drain failed, trying again", "error", err)
			sleep(ctx, w.r.conf.RetryMin)
		}
	}
}
