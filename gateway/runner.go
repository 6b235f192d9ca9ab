package gateway

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/go-memdb"

	"github.com/sluicemesh/sluice/agent/catalog"
	"github.com/sluicemesh/sluice/proxycfg"
)

// The names that the data_plane key may have without a plugin of that name.
const (
	DataPlaneBuiltin = "builtin"
	DataPlaneEnvoy   = "envoy"
	// DataPlaneNone means that the user runs the data plane: tables are made, kept
	// and shown, and nothing is started.
	DataPlaneNone = "none"
)

// dataPlaneKey is the key of a proxy's opaque configuration that chooses.
const dataPlaneKey = "data_plane"

// RunnerConfig configures a [Runner].
type RunnerConfig struct {
	// Latest returns the state of every registered proxy by its ID, those included
	// that have no snapshot yet, and adds to ws a channel that closes when one of
	// them changes: [proxycfg.Manager.Latest]. What it returns is not written to.
	Latest func(ws memdb.WatchSet) map[string]*proxycfg.State
	// Factory makes the data plane of a proxy. Config is the proxy's opaque
	// configuration with data_plane set to the name that was chosen. It does not
	// block. A failure is tried again.
	Factory func(kind catalog.Kind, proxyID string, config map[string]any) (DataPlane, error)
	// DataPlane is the name where the proxy does not say one; "" means builtin.
	DataPlane string
	// KeepDir is where last known good tables are kept; "" keeps none.
	KeepDir string
	// SaveEvery is the least time between two writes of one table; 0 means 1 s.
	SaveEvery time.Duration
	// ForgetAfter is how long after the start a kept table is deleted whose proxy
	// has not been registered: it went while the agent was down, and its private
	// key should not stay for good. 0 means 10 min.
	ForgetAfter time.Duration
	// RetryMin and RetryMax bound the delay before a data plane that ended is
	// started again; 0 means 500 ms and 30 s.
	RetryMin, RetryMax time.Duration
	// Logger may be nil.
	Logger hclog.Logger
}

// Runner runs a data plane for every proxy of this agent, and gives each the
// newest table. Make one with [NewRunner].
type Runner struct {
	conf   RunnerConfig
	logger hclog.Logger
	keep   *Keep

	mu      sync.Mutex // guards workers; never held while anything is waited for
	workers map[string]*worker
}

// NewRunner opens the directory of kept tables, and starts nothing.
func NewRunner(c RunnerConfig) (*Runner, error) {
	c.DataPlane = cmp.Or(c.DataPlane, DataPlaneBuiltin)
	c.SaveEvery = cmp.Or(c.SaveEvery, time.Second)
	c.ForgetAfter = cmp.Or(c.ForgetAfter, 10*time.Minute)
	c.RetryMin = cmp.Or(c.RetryMin, 500*time.Millisecond)
	c.RetryMax = cmp.Or(c.RetryMax, 30*time.Second)
	if c.Logger == nil {
		c.Logger = hclog.NewNullLogger()
	}
	r := &Runner{conf: c, logger: c.Logger.Named("gateway"), workers: make(map[string]*worker)}
	if c.KeepDir != "" {
		var err error
		if r.keep, err = OpenKeep(c.KeepDir); err != nil {
			return nil, err
		}
	}
	return r, nil
}

// Run keeps data planes running until ctx ends, and returns nil when all of them
// have ended and every table is on disk. A kept table is deleted when its proxy
// goes; one whose proxy is not registered (yet) is left for a while.
func (r *Runner) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()

	kept := map[string]Kept{}
	if r.keep != nil {
		var err error
		if kept, err = r.keep.Load(); err != nil {
			r.logger.Warn("some kept tables are not used", "error", err)
		}
	}
	forget := make(chan struct{})
	timer := time.AfterFunc(r.conf.ForgetAfter, func() { close(forget) })
	defer timer.Stop()
	for {
		ws := memdb.NewWatchSet()
		states := r.conf.Latest(ws)
		select {
		case <-forget:
			r.forget(kept, states)
			kept = nil
		default:
			ws.Add(forget)
		}
		for id, w := range r.all() {
			if states[id] != nil {
				continue
			}
			// Waiting keeps the address of a proxy that comes back free for it; the
			// other proxies go on meanwhile, only news for them wait.
			w.remove()
			r.mu.Lock()
			delete(r.workers, id)
			r.mu.Unlock()
			delete(kept, id)
			r.logger.Info("proxy removed", "proxy_id", id)
		}
		for _, id := range slices.Sorted(maps.Keys(states)) {
			r.mu.Lock()
			w := r.workers[id]
			if w == nil {
				w = newWorker(r, id, states[id])
				if k, ok := kept[id]; ok && k.Table.Kind == states[id].Proxy.Service.Kind {
					w.seed(k)
				}
				r.workers[id] = w
				var wctx context.Context
				wctx, w.cancel = context.WithCancel(ctx)
				wg.Go(func() { w.run(wctx) })
			}
			r.mu.Unlock()
			w.offer(states[id])
		}
		if err := ws.WatchCtx(ctx); err != nil {
			return nil
		}
	}
}

// forget deletes the kept tables of proxies that are not registered.
func (r *Runner) forget(kept map[string]Kept, states map[string]*proxycfg.State) {
	for id := range kept {
		if states[id] != nil {
			continue
		}
		r.logger.Info("kept table of an unregistered proxy deleted", "proxy_id", id)
		if err := r.keep.Delete(id); err != nil {
			r.logger.Warn("kept table not deleted", "proxy_id", id, "error", err)
		}
	}
}

func (r *Runner) all() map[string]*worker {
	r.mu.Lock()
	defer r.mu.Unlock()
	return maps.Clone(r.workers)
}

// Table returns the table that a proxy's data plane has, nil where there is none.
func (r *Runner) Table(proxyID string) *Table {
	r.mu.Lock()
	w := r.workers[proxyID]
	r.mu.Unlock()
	if w == nil {
		return nil
	}
	return w.view.Load().table
}

// worker runs the data plane of one proxy. Four goroutines share it, all ended
// by run: one that compiles, one that keeps a data plane running, one that drains
// it, one that writes tables to disk.
type worker struct {
	r      *Runner
	id     string
	logger hclog.Logger
	cancel context.CancelFunc
	done   chan struct{}
	// gone says that the proxy was deregistered, so its table is to be deleted.
	gone atomic.Bool

	state atomic.Pointer[proxycfg.State] // newest offered
	view  atomic.Pointer[view]           // written by the compiling goroutine only
	plane atomic.Pointer[planeView]

	offered *signal // a state
	chosen  *signal // another data plane, or a table for the first time
	unsaved *signal // a table

	drain      atomic.Pointer[drainJob] // nil while it is in use
	drainAsked *signal
	replaced   *signal // a data plane was started
}

// view is what the compiling goroutine has made. It is never written to.
type view struct {
	table *Table
	// kept is when the table was written to disk, where it comes from there and
	// nothing newer has been applied.
	kept time.Time
	// asOf is when the table was last known to be current: the table's own AsOf or
	// later, because a table is not applied again only for that.
	asOf       time.Time
	err        error // why the newest snapshot has no table
	planeName  string
	kind       catalog.Kind
	planeConf  map[string]any
	snapshot   *proxycfg.Snapshot // of the table
	compiledAt time.Time
}

// planeView is what the goroutine that runs the data plane has.
type planeView struct {
	name    string
	plane   DataPlane // nil while none runs
	err     error     // why the last one ended
	retryAt time.Time
}

func newWorker(r *Runner, id string, s *proxycfg.State) *worker {
	w := &worker{
		r: r, id: id, done: make(chan struct{}), logger: r.logger.With("proxy_id", id),
		offered: newSignal(), chosen: newSignal(), unsaved: newSignal(), drainAsked: newSignal(), replaced: newSignal(),
	}
	v := &view{}
	v.choose(s, r.conf.DataPlane)
	w.view.Store(v)
	w.plane.Store(&planeView{})
	w.state.Store(s)
	return w
}

// choose sets what data plane a state asks for. The merged registration says it
// where there is one, because proxy-defaults may.
func (v *view) choose(s *proxycfg.State, def string) {
	reg := s.Proxy.Service
	if s.Snapshot != nil {
		reg = s.Snapshot.Proxy.Service
	}
	var raw map[string]any
	if reg.Proxy != nil {
		raw = reg.Proxy.Config
	}
	conf := &settings{values: raw}
	v.kind = reg.Kind
	v.planeName = cmp.Or(conf.string(dataPlaneKey), def)
	v.planeConf = maps.Clone(raw)
	if v.planeConf == nil {
		v.planeConf = make(map[string]any)
	}
	v.planeConf[dataPlaneKey] = v.planeName
}

// seed starts from a table that was on disk. It is called before run.
func (w *worker) seed(k Kept) {
	v := *w.view.Load()
	v.table, v.kept, v.asOf = k.Table, k.SavedAt, k.Table.AsOf
	if k.DataPlane != "" && w.state.Load().Snapshot == nil {
		// Central configuration, which is not known yet, may have chosen it.
		v.planeName = k.DataPlane
		v.planeConf[dataPlaneKey] = k.DataPlane
	}
	w.view.Store(&v)
}

func (w *worker) offer(s *proxycfg.State) {
	if w.state.Swap(s) != s {
		w.offered.set()
	}
}

// remove ends the worker and deletes what is kept of it.
func (w *worker) remove() {
	w.gone.Store(true)
	w.cancel()
	<-w.done
}

func (w *worker) run(ctx context.Context) {
	defer close(w.done)
	defer w.cancel()
	var wg sync.WaitGroup
	wg.Go(func() { w.compile(ctx) })
	wg.Go(func() { w.serve(ctx) })
	wg.Go(func() { w.drains(ctx) })
	if w.r.keep != nil {
		wg.Go(func() { w.save(ctx) })
	}
	wg.Wait()
	if w.gone.Load() && w.r.keep != nil {
		if err := w.r.keep.Delete(w.id); err != nil {
			w.logger.Warn("kept table not deleted", "error", err)
		}
	}
}

// compile makes a table of each new snapshot and hands it over.
func (w *worker) compile(ctx context.Context) {
	var compiler Compiler
	for {
		s := w.state.Load()
		old := w.view.Load()
		v := *old
		if s.Snapshot != nil || v.table == nil {
			v.choose(s, w.r.conf.DataPlane)
		}
		if s.Snapshot != nil && s.Snapshot != v.snapshot {
			v.snapshot = s.Snapshot
			next, err := compiler.Compile(s.Snapshot)
			if err == nil {
				if carried := Carry(old.table, next); carried != next {
					next, err = carried, carried.Check()
				}
			}
			switch v.err = err; {
			case err != nil:
				w.logger.Error("table not used", "error", err)
			case old.table == nil || old.table.Index != next.Index || !sameContent(old.table, next):
				v.table, v.kept, v.asOf, v.compiledAt = next, time.Time{}, next.AsOf, time.Now()
			default:
				// Nothing to do for the data plane; the file and the status hear of it.
				v.kept, v.asOf = time.Time{}, next.AsOf
			}
		}
		w.view.Store(&v)
		if v.table != old.table {
			if p := w.plane.Load(); p.plane != nil {
				p.plane.Apply(v.table)
			}
		}
		if v.planeName != old.planeName || v.kind != old.kind || old.table == nil && v.table != nil {
			w.chosen.set()
		}
		if v.table != nil && v.kept.IsZero() {
			w.unsaved.set()
		}
		if !w.offered.wait(ctx) {
			return
		}
	}
}

// serve keeps a data plane running, once there is a table for it.
func (w *worker) serve(ctx context.Context) {
	retry := w.r.conf.RetryMin
	for {
		v := w.view.Load()
		if v.table == nil || v.planeName == DataPlaneNone {
			w.plane.Store(&planeView{name: v.planeName})
			if !w.chosen.wait(ctx) {
				return
			}
			continue
		}
		began := time.Now()
		err := w.serveOne(ctx, v)
		if ctx.Err() != nil {
			return
		}
		if err == nil {
			continue // another was chosen
		}
		if time.Since(began) > w.r.conf.RetryMax {
			retry = w.r.conf.RetryMin
		}
		w.logger.Error("data plane ended", "data_plane", v.planeName, "error", err, "retry_in", retry)
		w.plane.Store(&planeView{name: v.planeName, err: err, retryAt: time.Now().Add(retry)})
		if !w.chosen.waitFor(ctx, retry) {
			return
		}
		retry = min(2*retry, w.r.conf.RetryMax)
	}
}

// serveOne runs one data plane until it ends, which is an error, or until
// another is chosen or ctx ends.
func (w *worker) serveOne(ctx context.Context, v *view) error {
	plane, err := w.r.conf.Factory(v.kind, w.id, v.planeConf)
	if err != nil {
		return fmt.Errorf("make data plane %q: %w", v.planeName, err)
	}
	w.plane.Store(&planeView{name: v.planeName, plane: plane})
	w.replaced.set()
	// The compiling goroutine hands over what it makes from here on. Until nothing
	// newer is seen, because it may have done so between the load and the Apply.
	for t := (*Table)(nil); t != w.view.Load().table; {
		t = w.view.Load().table
		plane.Apply(t)
	}

	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	ended := make(chan error, 1)
	go runPlane(ctx, plane, ended)
	for {
		select {
		case err := <-ended:
			if ctx.Err() != nil {
				return nil
			}
			if err == nil {
				err = errors.New("it ended without being asked to")
			}
			return err
		case <-w.chosen.c:
			if now := w.view.Load(); now.planeName == v.planeName && now.kind == v.kind {
				continue
			}
			cancel()
			<-ended //nolint:errcheck // it was told to end
			return nil
		}
	}
}

// runPlane sends what the plane returns. It is owned by serveOne, which always
// receives it.
func runPlane(ctx context.Context, p DataPlane, ended chan<- error) { ended <- p.Run(ctx) }

// save writes tables to disk, at most one per SaveEvery, and the last one before
// it ends.
func (w *worker) save(ctx context.Context) {
	write := func() {
		v := w.view.Load()
		if v.table == nil || !v.kept.IsZero() || w.gone.Load() {
			return
		}
		t := v.table
		if !v.asOf.Equal(t.AsOf) {
			renewed := *t
			renewed.AsOf = v.asOf
			t = &renewed
		}
		if err := w.r.keep.Save(t, v.planeName); err != nil {
			w.logger.Warn("table not kept", "error", err)
		}
	}
	for w.unsaved.wait(ctx) {
		write()
		if !pause(ctx, w.r.conf.SaveEvery) {
			break
		}
	}
	write()
}

func pause(ctx context.Context, d time.Duration) bool {
	ctx, cancel := context.WithTimeoutCause(ctx, d, errPaused)
	defer cancel()
	<-ctx.Done()
	return errors.Is(context.Cause(ctx), errPaused)
}

var errPaused = errors.New("the pause is over")

// signal wakes one waiter. What was set before the waiter waits is not lost, and
// setting it twice is setting it once.
type signal struct{ c chan struct{} }

func newSignal() *signal { return &signal{c: make(chan struct{}, 1)} }

func (s *signal) set() {
	select {
	case s.c <- struct{}{}:
	default: // it is set already, and whoever takes it reads what is newest
	}
}

// wait returns false when ctx has ended.
func (s *signal) wait(ctx context.Context) bool {
	select {
	case <-s.c:
		return ctx.Err() == nil
	case <-ctx.Done():
		return false
	}
}

// waitFor is wait for at most d.
func (s *signal) waitFor(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-s.c:
	case <-t.C:
	case <-ctx.Done():
	}
	return ctx.Err() == nil
}
