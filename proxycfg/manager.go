package proxycfg

import (
	"cmp"
	"context"
	"errors"
	"maps"
	"reflect"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/go-memdb"
	"golang.org/x/time/rate"

	"github.com/sluicemesh/sluice/agent/catalog"
)

// Config of a [Manager].
type Config struct {
	Source Source
	// Proxies returns the proxies and gateways registered on this agent, and adds
	// to ws a channel that closes when there are others. It does not block, and
	// what it returns is not written to.
	Proxies func(ws memdb.WatchSet) []Proxy
	// Settle is the least time between two builds of one proxy: a change after a
	// quiet time is built at once, and a burst costs one build per Settle.
	// 0 means 50 ms.
	Settle time.Duration
	// MaxPerSecond bounds the builds of all proxies together; 0 means 250.
	MaxPerSecond int
	// Refresh is how often a snapshot is built though nothing has changed, which
	// moves its age. 0 means 10 s.
	Refresh time.Duration
	// RetryMin and RetryMax bound the delay before a build that failed is tried
	// again, though no channel has closed. 0 means 1 s and 1 min.
	RetryMin, RetryMax time.Duration
	// Logger may be nil.
	Logger hclog.Logger
}

// Phase says what a state is worth.
type Phase string

// The phases of a state.
const (
	PhasePending Phase = "pending" // answers are outstanding, and there is no snapshot
	PhaseCurrent Phase = "current" // the snapshot is of the newest build
	PhaseStale   Phase = "stale"   // the snapshot is good, and newer builds failed
	PhaseDenied  Phase = "denied"  // the token was refused; a snapshot is an old one
	PhaseFailed  Phase = "failed"  // builds fail, and there is no snapshot
)

// State is a proxy with its newest snapshot. It is never written to.
type State struct {
	Proxy Proxy
	// Snapshot is the last good one; nil before the first.
	Snapshot *Snapshot
	Phase    Phase
	// Since is when the phase began.
	Since time.Time
	// Err is why the newest build failed; nil when it did not.
	Err error
	// Index and AsOf are the snapshot's.
	Index uint64
	AsOf  time.Time
}

// Manager keeps the snapshot of every local proxy current. Make one with
// [NewManager]. All methods but Run may be called at any time from any
// goroutine, and do not block.
type Manager struct {
	conf    Config
	logger  hclog.Logger
	limiter *rate.Limiter
	current atomic.Pointer[published]
	// mu serialises publishers.
	mu sync.Mutex
}

// published is one immutable set of states, with the channel that closes when
// there is another.
type published struct {
	states  map[string]*State
	changed chan struct{}
}

// NewManager returns a manager that has no states until it runs.
func NewManager(c Config) *Manager {
	c.Settle = cmp.Or(c.Settle, 50*time.Millisecond)
	c.MaxPerSecond = cmp.Or(c.MaxPerSecond, 250)
	c.Refresh = cmp.Or(c.Refresh, 10*time.Second)
	c.RetryMin = cmp.Or(c.RetryMin, time.Second)
	c.RetryMax = cmp.Or(c.RetryMax, time.Minute)
	if c.Logger == nil {
		c.Logger = hclog.NewNullLogger()
	}
	m := &Manager{
		conf:    c,
		logger:  c.Logger.Named("proxycfg"),
		limiter: rate.NewLimiter(rate.Limit(c.MaxPerSecond), c.MaxPerSecond),
	}
	m.current.Store(&published{states: map[string]*State{}, changed: make(chan struct{})})
	return m
}

// Latest returns the state of every proxy by its ID, those included that have no
// snapshot yet, and adds to ws (nil allowed) the channel that closes when one of
// them changes. The map is shared and must not be written to.
func (m *Manager) Latest(ws memdb.WatchSet) map[string]*State {
	p := m.current.Load()
	if ws != nil {
		ws.Add(p.changed)
	}
	return p.states
}

// Snapshot returns the last good snapshot of a proxy, nil where there is none.
func (m *Manager) Snapshot(id string) *Snapshot {
	if s := m.current.Load().states[id]; s != nil {
		return s.Snapshot
	}
	return nil
}

// publish applies edit to a copy of the states.
func (m *Manager) publish(edit func(states map[string]*State)) {
	m.mu.Lock()
	defer m.mu.Unlock()
	old := m.current.Load()
	next := &published{states: maps.Clone(old.states), changed: make(chan struct{})}
	edit(next.states)
	m.current.Store(next)
	close(old.changed)
}

// Run builds until ctx ends, and returns nil when everything it started has
// ended. The last states stay readable.
func (m *Manager) Run(ctx context.Context) error {
	tasks := make(map[string]*task)
	var wg sync.WaitGroup
	defer wg.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	for {
		ws := memdb.NewWatchSet()
		now := make(map[string]Proxy)
		for _, p := range m.conf.Proxies(ws) {
			now[p.Service.ID] = p
		}
		var added []*task
		for id, t := range tasks {
			if _, ok := now[id]; !ok {
				t.cancel()
				<-t.done
				delete(tasks, id)
				m.publish(func(s map[string]*State) { delete(s, id) })
			}
		}
		for _, id := range slices.Sorted(maps.Keys(now)) {
			if t := tasks[id]; t != nil {
				t.set(now[id])
				continue
			}
			t := &task{manager: m, id: id, done: make(chan struct{})}
			t.proxy.Store(&proxyBox{proxy: now[id], changed: make(chan struct{})})
			tasks[id] = t
			added = append(added, t)
		}
		if len(added) > 0 {
			// All at once, so that who applies what was kept on disk sees every proxy
			// before the first snapshot.
			m.publish(func(s map[string]*State) {
				for _, t := range added {
					s[t.id] = &State{Proxy: now[t.id], Phase: PhasePending, Since: time.Now(), Err: ErrPending}
				}
			})
			for _, t := range added {
				var tctx context.Context
				tctx, t.cancel = context.WithCancel(ctx)
				wg.Go(func() { t.run(tctx) })
			}
		}
		if err := ws.WatchCtx(ctx); err != nil {
			return nil
		}
	}
}

// task keeps one proxy current.
type task struct {
	manager *Manager
	id      string
	proxy   atomic.Pointer[proxyBox]
	cancel  context.CancelFunc
	done    chan struct{}
}

// proxyBox is a registration, with the channel that closes when there is a newer
// one.
type proxyBox struct {
	proxy   Proxy
	changed chan struct{}
}

// set replaces the registration, where it differs.
func (t *task) set(p Proxy) {
	old := t.proxy.Load()
	if old.proxy.Service == p.Service && old.proxy.Node == p.Node && old.proxy.Token == p.Token &&
		old.proxy.Datacenter == p.Datacenter && old.proxy.Domain == p.Domain && old.proxy.DefaultAllow == p.DefaultAllow || reflect.DeepEqual(old.proxy, p) {
		return
	}
	t.proxy.Store(&proxyBox{proxy: p, changed: make(chan struct{})})
	close(old.changed)
}

func (t *task) run(ctx context.Context) {
	defer close(t.done)
	defer t.cancel()
	m := t.manager
	logger := m.logger.With("proxy_id", t.id)
	retry := m.conf.RetryMin
	for {
		if m.limiter.Wait(ctx) != nil {
			return
		}
		began := time.Now()
		box := t.proxy.Load()
		snap, ws, err := Build(ctx, m.conf.Source, box.proxy)
		if ctx.Err() != nil {
			return
		}
		t.publish(box.proxy, snap, err, logger)
		ws.Add(box.changed)

		wait := m.conf.Refresh
		if err != nil || snap.Incomplete() {
			// A source wakes us when it has an answer; the timer is for sources that
			// failed in a way that they cannot.
			wait, retry = retry, min(2*retry, m.conf.RetryMax)
			if err == nil {
				wait = min(wait, m.conf.Refresh)
			}
		} else {
			retry = m.conf.RetryMin
		}
		if !await(ctx, ws, wait) {
			return
		}
		// The rest of a burst arrives while we settle; the build after it sees all
		// of it, because it reads what is newest then.
		if !await(ctx, nil, m.conf.Settle-time.Since(began)) {
			return
		}
	}
}

// await waits until a channel of ws closes or d has passed, and returns false
// when ctx has ended.
func await(ctx context.Context, ws memdb.WatchSet, d time.Duration) bool {
	if d <= 0 {
		return ctx.Err() == nil
	}
	tctx, cancel := context.WithTimeout(ctx, d)
	defer cancel()
	if ws == nil {
		<-tctx.Done()
	} else {
		_ = ws.WatchCtx(tctx) // an error is that tctx has ended
	}
	return ctx.Err() == nil
}

// publish turns the outcome of a build into the proxy's state.
func (t *task) publish(p Proxy, snap *Snapshot, err error, logger hclog.Logger) {
	t.manager.publish(func(states map[string]*State) {
		old := states[t.id]
		s := &State{Proxy: p, Snapshot: snap, Err: err}
		if snap == nil && old != nil {
			s.Snapshot = old.Snapshot
		}
		switch {
		case err == nil:
			s.Phase = PhaseCurrent
		case errors.Is(err, ErrDenied):
			s.Phase = PhaseDenied
		case s.Snapshot != nil:
			s.Phase = PhaseStale
		case errors.Is(err, catalog.ErrPending):
			s.Phase = PhasePending
		default:
			s.Phase = PhaseFailed
		}
		if s.Snapshot != nil {
			s.Index, s.AsOf = s.Snapshot.Index, s.Snapshot.AsOf
		}
		s.Since = time.Now()
		if old != nil && old.Phase == s.Phase {
			s.Since = old.Since
		}
		states[t.id] = s
		if old != nil && old.Phase != s.Phase {
			logger.Info("proxy state changed", "from", old.Phase, "to", s.Phase, "error", err)
		}
	})
}
