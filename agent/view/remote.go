package view

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/go-memdb"

	"github.com/sluicemesh/sluice/agent/catalog"
)

// Limits of the loops that have no reason to differ between agents.
const (
	// changeGap and idleGap are the least times between the starts of two requests,
	// after an answer that was new and one that was not. A server that does not
	// block must not be run over.
	changeGap = 100 * time.Millisecond
	idleGap   = time.Second
	// minBackoff doubles with every failure.
	minBackoff = time.Second
	// readGrace is how long the readers of an idle query, woken to tell whether
	// they are still there, have to read again.
	readGrace = time.Minute
	// slack is what an answer may be late after its wait has ended.
	slack = 10 * time.Second
)

// RemoteConfig says whom to ask. Zero durations mean the defaults.
type RemoteConfig struct {
	// Client asks this agent's own HTTP API, which passes on what is not its own to
	// answer. The host of the requests is "agent".
	Client *http.Client
	// Datacenter is this agent's own.
	Datacenter string
	// Leaves keeps this agent's certificates. Where they are made from this view's
	// roots, let their configuration refer to the view by a variable.
	Leaves Leaves
	Logger hclog.Logger // nil logs nothing

	// Wait is how long a query blocks when nothing changes: the age that an answer
	// may have while all is well. Default 1 m.
	Wait time.Duration
	// Idle is how long a query is kept that nobody reads. Default 20 m.
	Idle time.Duration
	// MaxBackoff limits the pause after failures. Default 30 s.
	MaxBackoff time.Duration
}

// Remote keeps answers of the servers. Its methods are safe for concurrent use
// and never block; answers are fetched while Run runs.
type Remote struct {
	cfg    RemoteConfig
	logger hclog.Logger

	mu sync.Mutex // guards what follows and the queries' fields below their mark
	// run is the context of Run while it runs, else nil.
	run     context.Context
	queries map[string]*query
	// loops counts the goroutines, all of them Run's.
	loops   sync.WaitGroup
	running int
}

// query is a distinct request and the last good answer to it.
type query struct {
	path   string // with parameters but those of blocking
	decode decoder

	// Guarded by Remote.mu.
	answer  *answer       // nil before the first
	changed chan struct{} // closes when answer is another
	asOf    time.Time
	err     error // of the last request, nil if it succeeded
	since   time.Time
	read    time.Time
	probed  time.Time // when idle readers were woken; zero if not
}

// NewRemote returns a view that knows nothing yet.
func NewRemote(cfg RemoteConfig) *Remote {
	if cfg.Logger == nil {
		cfg.Logger = hclog.NewNullLogger()
	}
	if cfg.Wait == 0 {
		cfg.Wait = time.Minute
	}
	if cfg.Idle == 0 {
		cfg.Idle = 20 * time.Minute
	}
	if cfg.MaxBackoff == 0 {
		cfg.MaxBackoff = 30 * time.Second
	}
	return &Remote{cfg: cfg, logger: cfg.Logger.Named("view"), queries: map[string]*query{}}
}

// Run fetches until ctx ends, and then waits for what is under way. What was
// fetched can still be read. It returns nil.
func (r *Remote) Run(ctx context.Context) error {
	r.mu.Lock()
	r.run = ctx
	for _, q := range r.queries {
		r.startLocked(q)
	}
	r.mu.Unlock()
	<-ctx.Done()
	r.mu.Lock()
	r.run = nil
	r.mu.Unlock()
	r.loops.Wait()
	return nil
}

func (r *Remote) startLocked(q *query) {
	if r.run == nil {
		return
	}
	ctx := r.run
	r.running++
	gauge(r.running)
	r.loops.Go(func() { r.follow(ctx, q) })
}

// get returns the last good answer to a query, which it starts if need be.
func get[T any](r *Remote, ws memdb.WatchSet, path string, decode decoder) (T, catalog.Freshness, error) {
	var zero T
	now := time.Now()
	r.mu.Lock()
	defer r.mu.Unlock()
	q := r.queries[path]
	if q == nil {
		q = &query{path: path, decode: decode, changed: make(chan struct{})}
		r.queries[path] = q
		r.startLocked(q)
	}
	q.read, q.probed = now, time.Time{}
	ws.Add(q.changed)
	switch {
	case q.answer != nil:
		return q.answer.value.(T), catalog.Freshness{Index: q.answer.index, AsOf: q.asOf}, nil
	case q.err != nil:
		return zero, catalog.Freshness{}, fmt.Errorf("%w: %w", catalog.ErrPending, q.err)
	}
	return zero, catalog.Freshness{}, catalog.ErrPending
}

// follow keeps a query's answer current until ctx ends or nobody reads it.
func (r *Remote) follow(ctx context.Context, q *query) {
	defer r.ended()
	failures := 0
	// leader asks it alone, and for an answer at once.
	for leader := true; !r.expire(q); {
		start := time.Now()
		changed, err := r.renew(ctx, q, leader)
		if ctx.Err() != nil {
			return
		}
		gap := idleGap
		switch {
		case errors.Is(err, errWentBack):
			leader = true
		case err != nil:
			failures++
			gap = time.Since(start) + backoff(failures, r.cfg.MaxBackoff)
			leader = true
		default:
			failures, leader = 0, false
			if changed {
				gap = changeGap
			}
		}
		if !sleep(ctx, gap-time.Since(start)) {
			return
		}
	}
}

func (r *Remote) ended() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.running--
	gauge(r.running)
}

// renew makes one request and records what came of it. It says whether the
// answer is another than before.
func (r *Remote) renew(ctx context.Context, q *query, leader bool) (changed bool, err error) {
	r.mu.Lock()
	prev := q.answer
	r.mu.Unlock()
	next, asOf, err := r.fetch(ctx, q, prev, leader)
	if ctx.Err() != nil {
		return false, ctx.Err()
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if errors.Is(err, errWentBack) {
		r.logger.Debug("answer goes back, asking the leader", "query", q.path, "error", err)
		return false, err
	}
	if err != nil {
		if q.err == nil {
			q.since = time.Now()
			r.logger.Warn("query fails", "query", q.path, "error", err)
		}
		q.err = err
		return false, err
	}
	if q.err != nil {
		r.logger.Info("query succeeds again", "query", q.path, "after", time.Since(q.since).Round(time.Second))
	}
	q.err, q.since = nil, time.Time{}
	changed = prev == nil || next.sum != prev.sum
	q.answer = next
	if asOf.After(q.asOf) {
		q.asOf = asOf // a server that is behind another does not make it older
	}
	if changed {
		q.wakeLocked()
	}
	return changed, nil
}

func (q *query) wakeLocked() {
	close(q.changed)
	q.changed = make(chan struct{})
}

// expire ends a query that nobody reads. A reader that sleeps on its channel
// does not read either: it is woken once, to read again if it is there.
func (r *Remote) expire(q *query) bool {
	now := time.Now()
	r.mu.Lock()
	defer r.mu.Unlock()
	switch {
	case now.Sub(q.read) < r.cfg.Idle:
		return false
	case q.probed.IsZero():
		q.probed = now
		q.wakeLocked()
		return false
	case now.Sub(q.probed) < readGrace:
		return false
	}
	delete(r.queries, q.path)
	close(q.changed)
	return true
}

// backoff is the pause after so many failures in a row: between half of a time
// that doubles, and all of it.
func backoff(failures int, limit time.Duration) time.Duration {
	d := min(limit, minBackoff<<min(failures-1, 20))
	return d/2 + rand.N(d/2+1)
}

// sleep says whether ctx is still alive after d.
func sleep(ctx context.Context, d time.Duration) bool {
	if d <= 0 {
		return ctx.Err() == nil
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// QueryStatus tells of one query.
type QueryStatus struct {
	// Query is the path asked, with its parameters.
	Query string
	// Known says whether there is an answer. Index and AsOf are that answer's.
	Known bool
	Index uint64
	AsOf  time.Time
	// Err is why the last request failed, and Since when that began; nil while
	// requests succeed.
	Err   error
	Since time.Time
	// Read is when the answer was last asked for.
	Read time.Time
}

// Status tells of every query, by path. The age of what the agent knows is the
// time since AsOf.
func (r *Remote) Status() []QueryStatus {
	r.mu.Lock()
	defer r.mu.Unlock()
	out := make([]QueryStatus, 0, len(r.queries))
	for _, q := range r.queries {
		s := QueryStatus{Query: q.path, Known: q.answer != nil, AsOf: q.asOf, Err: q.err, Since: q.since, Read: q.read}
		if q.answer != nil {
			s.Index = q.answer.index
		}
		out = append(out, s)
	}
	slices.SortFunc(out, func(a, b QueryStatus) int { return strings.Compare(a.Query, b.Query) })
	return out
}

// Running returns how many queries are being followed.
func (r *Remote) Running() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.running
}
