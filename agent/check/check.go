// Package check runs health checks: one scheduler, and a prober for each kind of
// check. It knows nothing of services or the catalog: it is told which checks
// there are, and tells what they found.
package check

import (
	"context"
	"fmt"
	"maps"
	"math/rand/v2"
	"reflect"
	"slices"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/sluicemesh/sluice/agent/catalog"
)

// The statuses a check can have.
const (
	Passing  = "passing"
	Warning  = "warning"
	Critical = "critical"
)

// MaxOutput bounds the output kept of a check, in bytes, where [Config] does not.
const MaxOutput = 4096

// firstWait is the time within which a check runs first, and from which the time
// between its runs doubles until it has passed once.
const firstWait = 250 * time.Millisecond

// minInterval is the shortest interval at which a check runs.
const minInterval = time.Second

// Config of a [Scheduler]. Update is required.
type Config struct {
	// Update is told each result. It is called from the scheduler's goroutines,
	// one at a time for one check, and must not block for long.
	Update func(id, status, output string)
	// MaxOutput bounds the output told, in bytes; 0 is the constant of that name,
	// and less than 0 is no output at all.
	MaxOutput int
	Logger    hclog.Logger
	// Jitter returns a random part of d, for the first run of a check; nil is
	// uniform. It keeps an agent's checks from all running at one moment.
	Jitter func(d time.Duration) time.Duration
}

// Scheduler runs the checks it is given until it is told otherwise.
type Scheduler struct {
	cfg Config

	// mu guards running.
	mu      sync.Mutex
	running map[string]*task
	wg      sync.WaitGroup
}

// task is one check that runs.
type task struct {
	def    catalog.CheckDefinition
	cancel context.CancelFunc
	done   chan struct{}
	beat   chan struct{} // TTL checks: an update came
}

// New returns a scheduler without checks.
func New(cfg Config) *Scheduler {
	if cfg.Logger == nil {
		cfg.Logger = hclog.NewNullLogger()
	}
	if cfg.MaxOutput == 0 {
		cfg.MaxOutput = MaxOutput
	}
	cfg.MaxOutput = max(cfg.MaxOutput, 0)
	if cfg.Jitter == nil {
		cfg.Jitter = func(d time.Duration) time.Duration { return rand.N(max(d, 1)) }
	}
	return &Scheduler{cfg: cfg, running: map[string]*task{}}
}

// Set makes defs, by check ID, the checks that run: new ones start, those whose
// definition changed start again, those missing stop. It returns when what was
// to stop has stopped. All stop when ctx ends; the caller then calls [Scheduler.Wait].
func (s *Scheduler) Set(ctx context.Context, defs map[string]catalog.CheckDefinition) {
	var stopped []*task
	s.mu.Lock()
	for id, t := range s.running {
		if def, ok := defs[id]; !ok || !reflect.DeepEqual(def, t.def) {
			t.cancel()
			stopped = append(stopped, t)
			delete(s.running, id)
		}
	}
	s.mu.Unlock()
	for _, t := range stopped {
		<-t.done
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, id := range sorted(defs) {
		if _, ok := s.running[id]; ok {
			continue
		}
		def := defs[id]
		run := s.runner(id, def)
		if run == nil {
			continue // an alias, maintenance: somebody else decides its status
		}
		tctx, cancel := context.WithCancel(ctx)
		t := &task{def: def, cancel: cancel, done: make(chan struct{}), beat: make(chan struct{}, 1)}
		s.running[id] = t
		s.wg.Go(func() {
			defer close(t.done)
			defer cancel()
			run(tctx, t)
		})
	}
}

// Beat tells that a TTL check was updated, and starts its time afresh.
func (s *Scheduler) Beat(id string) {
	s.mu.Lock()
	t := s.running[id]
	s.mu.Unlock()
	if t == nil {
		return
	}
	select {
	case t.beat <- struct{}{}:
	default: // one is waiting already, and is as good
	}
}

// Wait returns when every check has stopped, which the end of the context given
// to Set makes them do.
func (s *Scheduler) Wait() { s.wg.Wait() }

func sorted(m map[string]catalog.CheckDefinition) []string {
	return slices.Sorted(maps.Keys(m))
}

// runner returns what keeps the check running, or nil where nothing does.
func (s *Scheduler) runner(id string, def catalog.CheckDefinition) func(context.Context, *task) {
	switch {
	case def.TTL != "":
		ttl, err := time.ParseDuration(def.TTL)
		if err != nil || ttl <= 0 {
			s.cfg.Logger.Error("check not run: bad ttl", "check", id, "ttl", def.TTL)
			return nil
		}
		return func(ctx context.Context, t *task) { s.watchTTL(ctx, id, ttl, t) }
	case def.HTTP != "":
		return s.periodic(id, def, httpProber(def, s.cfg.MaxOutput))
	case def.TCP != "":
		return s.periodic(id, def, tcpProber(def))
	}
	return nil
}

// watchTTL turns the check critical when no update has come for its ttl.
func (s *Scheduler) watchTTL(ctx context.Context, id string, ttl time.Duration, t *task) {
	timer := time.NewTimer(ttl)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.beat:
		case <-timer.C:
			s.cfg.Logger.Warn("check missed its ttl, now critical", "check", id, "ttl", ttl)
			s.cfg.Update(id, Critical, "TTL expired")
		}
		timer.Reset(ttl)
	}
}

// prober runs a check once and says how it went.
type prober interface {
	probe(ctx context.Context) (status, output string)
	close()
}

// periodic runs p every interval, the first time soon.
func (s *Scheduler) periodic(id string, def catalog.CheckDefinition, p prober) func(context.Context, *task) {
	interval := max(duration(def.Interval, 10*time.Second), minInterval)
	timeout := duration(def.Timeout, 10*time.Second)
	count := thresholds{
		success:  def.SuccessBeforePassing,
		warning:  def.FailuresBeforeWarning,
		critical: def.FailuresBeforeCritical,
	}
	return func(ctx context.Context, _ *task) {
		defer p.close()
		// The first good result decides whether a new instance is used at all. It is
		// looked for soon, and soon again while there is none, more rarely each time:
		// what is checked may be starting just now.
		wait := firstWait
		passed := false
		timer := time.NewTimer(s.cfg.Jitter(min(interval, firstWait)))
		defer timer.Stop()
		for {
			select {
			case <-ctx.Done():
				return
			case <-timer.C:
			}
			pctx, cancel := context.WithTimeout(ctx, timeout)
			status, output := p.probe(pctx)
			cancel()
			if ctx.Err() != nil {
				return
			}
			if len(output) > s.cfg.MaxOutput {
				output = output[:s.cfg.MaxOutput]
			}
			if status, ok := count.add(status); ok {
				s.cfg.Update(id, status, output)
			}
			if passed = passed || status == Passing; passed {
				timer.Reset(interval)
				continue
			}
			timer.Reset(min(wait, interval))
			wait *= 2
		}
	}
}

// thresholds holds back a change of status until it has been seen often enough
// in a row; 0 and 1 are "at once".
type thresholds struct {
	success, warning, critical int
	good, bad                  int
}

// add counts a result, and returns the status to report, if any.
func (t *thresholds) add(status string) (string, bool) {
	if status != Critical {
		t.good, t.bad = t.good+1, 0
		return status, t.good >= t.success
	}
	t.good, t.bad = 0, t.bad+1
	switch {
	case t.bad >= t.critical:
		return Critical, true
	case t.warning > 0 && t.bad >= t.warning:
		return Warning, true
	}
	return "", false
}

func duration(s string, otherwise time.Duration) time.Duration {
	if d, err := time.ParseDuration(s); err == nil && d > 0 {
		return d
	}
	return otherwise
}

// Supported tells whether this package can run a check of def's kind, and what
// kind it is.
func Supported(def catalog.CheckDefinition) error {
	var kind string
	switch {
	case def.TTL != "", def.HTTP != "", def.TCP != "", def.AliasService != "", def.AliasNode != "":
		return nil
	case def.GRPC != "":
		kind = "grpc"
	case def.UDP != "":
		kind = "udp"
	case len(def.Args) > 0:
		kind = "script"
	case def.DockerContainerID != "":
		kind = "docker"
	case def.H2PING != "":
		kind = "h2ping"
	default:
		return fmt.Errorf("the check says nothing to check: give it an http, tcp, ttl or alias_service field")
	}
	return fmt.Errorf("%s checks are not supported: use an http, tcp, ttl or alias check", kind)
}
