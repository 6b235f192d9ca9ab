package sni

import (
	"context"
	"math"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/sluicemesh/sluice/gateway"
)

const (
	// moveLookMin and moveLookMax bound the time between two looks at which endpoints
	// can be used; within them it is a part of the time that they must have been.
	moveLookMin = 20 * time.Millisecond
	moveLookMax = time.Second
	moveLookDiv = 8

	// moveAhead is for how long a list of connections to close is to last, and
	// moveLeast and moveMost how long it may be.
	moveAhead = time.Minute
	moveLeast = 64
	moveMost  = 1 << 16

	// silentLeast is how many times in a row an endpoint must not have answered to be
	// taken for one that cannot be used.
	silentLeast = 3
)

// usable says whether a connection that is made now would be given to the endpoint,
// and is likely to be answered. That the time of an ejection is over is no sign that it
// is back; a connection or a probe is. That it did not answer once may be no fault of
// its own.
func (e *endpoint) usable(now int64) bool {
	return e.failures.Load() == 0 && e.silences.Load() < silentLeast && e.ejectedUntil.Load() <= now && len(e.addresses()) > 0
}

// steady returns since when the endpoint has been usable, or 0 where that is not
// for as long as is asked for.
func (e *endpoint) steady(now int64, stable time.Duration) int64 {
	since := e.usableSince.Load()
	if since == 0 || now-since < int64(stable) || !e.usable(now) {
		return 0
	}
	return since
}

// seat is where a connection is: the number of the cluster that it was routed to,
// and its endpoint. With 0 it is a connection by whatever route.
type seat struct {
	via uint32
	ep  *endpoint
}

// surplus are connections of a seat that may be closed so that their clients come
// to a better one.
type surplus struct {
	cluster *cluster
	// before is when the better place could be had again: connections that were
	// begun later are where they are for another reason, and would come back there.
	before int64
	most   int // how many of them may be closed
	cause  cause
}

// cause is what made connections of a cluster a surplus. A search that finds none of
// them is not done again before the cause is another.
type cause struct {
	plan *plan
	at   int64
}

// misplaced calls add for each endpoint that has connections, and is worse than the
// best that has been usable for a time; before is since when. Connections that the
// plan's cluster has there are there because the better was not to be had, as far
// as they began before.
func (pl *plan) misplaced(now int64, stable time.Duration, add func(ep *endpoint, before int64)) {
	best, before := -1, int64(0)
	for i := range pl.tiers {
		t := &pl.tiers[i]
		if best >= 0 {
			for j := range t.members {
				if ep := t.members[j].ep; ep.active.Load() > 0 && !listed(pl.tiers[:best+1], ep) {
					add(ep, before)
				}
			}
			continue
		}
		if t.unknown {
			return
		}
		if t.limit > 0 && t.owner.active.Load() >= t.limit {
			continue
		}
		for j := range t.members {
			if since := t.members[j].ep.steady(now, stable); since != 0 && (before == 0 || since < before) {
				best, before = i, since
			}
		}
	}
}

// listed says whether an endpoint is in one of the tiers.
func listed(tiers []tier, ep *endpoint) bool {
	return slices.ContainsFunc(tiers, func(t tier) bool {
		return slices.ContainsFunc(t.members, func(m member) bool { return m.ep == ep })
	})
}

// share is an endpoint among which connections are to be spread.
type share struct {
	ep     *endpoint
	weight uint32
}

// shares returns the endpoints of the best tier of c itself that have been usable for
// a time.
func (pl *plan) shares(c *cluster, now int64, stable time.Duration, into []share) []share {
	into = into[:0]
	for i := range pl.tiers {
		t := &pl.tiers[i]
		if t.owner != c || t.unknown {
			break
		}
		for _, m := range t.members {
			if m.ep.steady(now, stable) != 0 {
				into = append(into, share{m.ep, m.weight})
			}
		}
		if len(into) > 0 {
			break
		}
	}
	return into
}

// excess returns how many connections each endpoint has beyond factor times its
// share of total. One with at most least connections has none, and neither has the
// only one.
func excess(shares []share, active []int64, total int64, factor float64, least int) []int {
	out := make([]int, len(shares))
	if len(shares) < 2 {
		return out
	}
	var weight float64
	for i := range shares {
		weight += float64(shares[i].weight)
	}
	for i, n := range active {
		fair := float64(total) * float64(shares[i].weight) / weight
		most := max(int64(math.Ceil(fair)), int64(fair*factor), int64(least))
		out[i] = int(max(n-most, 0))
	}
	return out
}

// mover closes connections, where the table asks for it, so that their clients
// connect anew and come to a better endpoint: back to where they were sent away
// from while it was down, and to endpoints that came when they were there already.
// One goroutine watches which endpoints are usable; what there is to do has another,
// which it waits for.
type mover struct {
	f       *Forwarder
	wg      sync.WaitGroup
	on      bool // run's own
	back    movement
	balance movement
}

// movement is one of the two ways to move connections. Its fields are those of the
// goroutine that runs it, and of mover's own while none does.
type movement struct {
	m       *mover
	name    string
	why     closeReason
	running atomic.Bool
	// spec says how a table wants it done; off is not at all.
	spec func(v *view) (s moveSpec, on bool)
	// judge calls add for each seat with a surplus.
	judge func(v *view, now int64, add func(seat, surplus))
	seat  func(h handle) seat
	// vain is where it is noted for what cause nothing was found to close.
	vain func(m *moved) *cause
}

// moved is what is known of a cluster whose connections are to be moved. Each field
// is its movement's.
type moved struct {
	backVain    cause
	balanceVain cause
	sharing     sharing
}

// sharing is among which endpoints connections are to be spread, since when it is
// those, and how many connections there have been since: what is closed is opened
// again only after a while, and a share is not less for that.
type sharing struct {
	shares []share
	since  int64
	total  int64
}

type moveSpec struct {
	stable time.Duration
	rate   float64
}

func newMover(f *Forwarder) *mover {
	m := &mover{f: f}
	m.back = movement{
		m: m, name: "failback", why: closeFailback, judge: judgeFailback,
		spec: func(v *view) (s moveSpec, on bool) {
			if v.failback == nil {
				return s, false
			}
			return moveSpec{v.failback.Stable, v.failback.Rate}, true
		},
		seat: func(h handle) seat { return seat{h.via, h.ep} },
		vain: func(m *moved) *cause { return &m.backVain },
	}
	m.balance = movement{
		m: m, name: "rebalance", why: closeRebalance, judge: judgeRebalance,
		spec: func(v *view) (s moveSpec, on bool) {
			if v.rebalance == nil {
				return s, false
			}
			return moveSpec{v.rebalance.Stable, v.rebalance.Rate}, true
		},
		seat: func(h handle) seat { return seat{0, h.ep} },
		vain: func(m *moved) *cause { return &m.balanceVain },
	}
	return m
}

func judgeFailback(v *view, now int64, add func(seat, surplus)) {
	for _, c := range v.live {
		pl := c.plan.Load()
		if pl == nil || len(pl.tiers) < 2 {
			continue
		}
		pl.misplaced(now, v.failback.Stable, func(ep *endpoint, before int64) {
			add(seat{c.number, ep}, surplus{cluster: c, before: before, most: math.MaxInt, cause: cause{pl, before}})
		})
	}
}

func judgeRebalance(v *view, now int64, add func(seat, surplus)) {
	var at []share
	var active []int64
	for _, c := range v.live {
		pl, m := c.plan.Load(), c.moved.Load()
		if pl == nil || m == nil || len(pl.endpoints) < 2 {
			continue
		}
		s := &m.sharing
		if at = pl.shares(c, now, v.rebalance.Stable, at); !slices.Equal(s.shares, at) {
			*s = sharing{shares: slices.Clone(at), since: now}
		}
		active = active[:0]
		var sum, most int64
		for i := range at {
			n := at[i].ep.active.Load()
			active = append(active, n)
			sum += n
			most = max(most, n)
		}
		if s.total = max(s.total, sum); most <= int64(v.rebalance.MinConnections) {
			continue
		}
		for i, n := range excess(at, active, s.total, v.rebalance.Factor, v.rebalance.MinConnections) {
			if n > 0 {
				add(seat{0, at[i].ep}, surplus{cluster: c, before: s.since, most: n, cause: cause{at: s.since}})
			}
		}
	}
}

// run watches until ctx ends, and returns when nothing of it is left.
func (m *mover) run(ctx context.Context) {
	defer m.wg.Wait()
	m.f.watch(ctx, m.look)
}

// look notes which endpoints are usable, and begins what there is to do. It returns
// when to look again, and false when the table in use asks for nothing.
func (m *mover) look(ctx context.Context) (wait time.Duration, on bool) {
	v := m.f.view.Load()
	now := max(m.f.now(), 1)
	wait = moveLookMax
	for _, mv := range []*movement{&m.back, &m.balance} {
		if spec, ok := mv.spec(v); ok {
			on = true
			wait = min(wait, max(spec.stable/moveLookDiv, moveLookMin))
		}
	}
	if !on {
		m.on = false
		return 0, false
	}
	for _, c := range v.live {
		pl := c.plan.Load()
		if pl == nil {
			continue
		}
		if c.moved.Load() == nil {
			c.moved.Store(&moved{})
		}
		pl.known(c, func(ep *endpoint) {
			// What was seen before it was switched off and on again is old.
			switch since := ep.usableSince.Load(); {
			case !ep.usable(now):
				ep.usableSince.Store(0)
			case since == 0 || !m.on:
				ep.usableSince.Store(now)
			}
		})
	}
	m.on = true
	for _, mv := range []*movement{&m.back, &m.balance} {
		if _, ok := mv.spec(v); !ok || mv.running.Load() {
			continue
		}
		if len(mv.surplus(v)) > 0 {
			mv.running.Store(true)
			m.wg.Go(func() {
				defer mv.running.Store(false)
				mv.run(ctx)
			})
		}
	}
	return wait, true
}

// surplus returns what may be closed now.
func (mv *movement) surplus(v *view) map[seat]*surplus {
	var out map[seat]*surplus
	mv.judge(v, mv.m.f.now(), func(at seat, s surplus) {
		if m := s.cluster.moved.Load(); m == nil || *mv.vain(m) == s.cause {
			return
		}
		if out == nil {
			out = map[seat]*surplus{}
		}
		out[at] = &s
	})
	return out
}

// of says whether a connection is one of a surplus, which may be nil.
func (s *surplus) of(h handle) bool { return s != nil && s.most > 0 && h.born < s.before }

// run closes what there is to close, at the pace, until nothing is left of it, the
// better endpoints cannot be used any more, or the settings are others.
func (mv *movement) run(ctx context.Context) {
	f := mv.m.f
	v := f.view.Load()
	spec, on := mv.spec(v)
	if !on {
		return
	}
	found := mv.surplus(v)
	left, all, ok := mv.find(found, spec)
	if !ok || len(left) == 0 {
		return
	}
	clusters := map[*cluster]bool{}
	most := 0
	for _, s := range found {
		clusters[s.cluster] = true
		most += min(s.most, all-most)
	}
	f.log.Info(mv.name+" begins", "connections", min(all, most), "clusters", len(clusters), "rate", spec.rate)
	began, closed := time.Now(), 0
	_ = gateway.Pacer{Rate: spec.rate}.Run(ctx, func(n int) bool {
		v := f.view.Load()
		if now, on := mv.spec(v); !on || now != spec {
			return false
		}
		found := mv.surplus(v)
		if len(found) == 0 {
			return false
		}
		if len(left) == 0 {
			var ok bool
			if left, _, ok = mv.find(found, spec); !ok || len(left) == 0 {
				return false
			}
		}
		var hs []handle
		for ; len(left) > 0 && len(hs) < n; left = left[1:] {
			if s := found[mv.seat(left[0])]; s.of(left[0]) {
				s.most--
				hs = append(hs, left[0])
			}
		}
		done, ok := mv.close(hs)
		closed += done
		return ok
	}) // whose error is that ctx has ended
	f.log.Info(mv.name+" ended", "closed", closed, "left", len(left), "took", time.Since(began).Round(time.Millisecond))
}

// find returns the oldest connections of a surplus, some of which may be more than
// it is, and how many there are. ok is false while no connections are to be moved.
func (mv *movement) find(found map[seat]*surplus, spec moveSpec) (hs []handle, all int, ok bool) {
	limit := moveMost
	if spec.rate > 0 {
		limit = int(min(max(spec.rate*moveAhead.Seconds(), moveLeast), moveMost))
	}
	mv.m.f.do(func(c *control) {
		if ok = !c.stopped; !ok {
			return // a drain has its own pace
		}
		hs = c.eng.oldest(limit, func(h handle) bool {
			if h.ep == nil || !found[mv.seat(h)].of(h) {
				return false
			}
			all++
			return true
		})
	})
	if ok && len(hs) == 0 {
		for _, s := range found {
			*mv.vain(s.cluster.moved.Load()) = s.cause
		}
	}
	return hs, all, ok
}

// close closes connections. It returns false while no connections are to be moved.
func (mv *movement) close(hs []handle) (n int, ok bool) {
	mv.m.f.do(func(c *control) {
		if ok = !c.stopped; ok && len(hs) > 0 {
			n = c.eng.closeThese(hs, mv.why)
		}
	})
	return n, ok
}
