package sni

import (
	"fmt"
	"hash/maphash"
	"math"
	"net/netip"
	"sync/atomic"
	"time"

	"github.com/sluicemesh/sluice/gateway"
)

// terms is what a table says of a listener, ready for use. Immutable.
type terms struct {
	spec *gateway.Listener
	most int64 // connections; 0 is none
	rate rate
	// ofSource are the limits of one source.
	ofSource struct {
		most int32
		rate rate
	}
	hellos int // clients whose hello is waited for, in each loop
	// accept says whether connections begin with a header of the PROXY protocol.
	accept  gateway.ProxyAccept
	trusted []netip.Prefix
	// idle and halfIdle are how long a connection may be idle, the second once one
	// side sends no more; 0 is for ever.
	idle, halfIdle time.Duration
}

// idleLimit is idle or halfIdle.
func (t *terms) idleLimit(halfClosed bool) time.Duration {
	if halfClosed {
		return t.halfIdle
	}
	return t.idle
}

func (f *Forwarder) newTerms(spec *gateway.Listener) *terms {
	t := &terms{spec: spec, most: int64(spec.MaxConnections), hellos: f.cfg.PendingHellos}
	t.idle, t.halfIdle = f.cfg.idleLimits(max(spec.IdleTimeout, 0))
	if lim := spec.Limits; lim != nil {
		t.rate = newRate(lim.ConnectionRate, lim.ConnectionBurst)
		t.ofSource.most = int32(min(max(lim.MaxConnectionsPerSource, 0), math.MaxInt32-1))
		t.ofSource.rate = newRate(lim.ConnectionRatePerSource, lim.ConnectionBurstPerSource)
		if lim.MaxPendingHellos > 0 {
			t.hellos = lim.MaxPendingHellos
		}
	}
	if pp := spec.ProxyProtocol; pp != nil {
		t.accept = pp.Accept
		for _, s := range pp.Trusted {
			p, err := netip.ParsePrefix(s)
			if err != nil {
				f.fail(fmt.Errorf("listener %s: trusted network: %w", spec.Name, err))
				continue
			}
			t.trusted = append(t.trusted, p.Masked())
		}
	}
	return t
}

// bySource says whether sources are told apart.
func (t *terms) bySource() bool { return t.ofSource.most > 0 || t.ofSource.rate.gap > 0 }

// admit accounts a new connection, and returns which limit is in its way, "" if
// none.
func (l *listener) admit(t *terms, now int64) (limit string) {
	l.accepted.Add(1)
	if n := l.active.Add(1); t.most > 0 && n > t.most {
		return "max connections of the listener"
	}
	if t.rate.gap > 0 && !t.rate.take(&l.full, now) {
		return "connection rate of the listener"
	}
	return ""
}

// admitSource is admit for the connection's source. Where s is not nil its
// release is to be called at the end of the connection.
func (l *listener) admitSource(t *terms, ip netip.Addr, now int64) (s *source, limit string) {
	tab := l.sources.Load()
	if tab == nil {
		return nil, ""
	}
	return tab.acquire(sourceKey(ip), now, t.ofSource.most, t.ofSource.rate)
}

// rate admits one in each gap, and a burst at once: a token bucket, kept as the
// time at which it will be full (GCRA). The zero value is no limit.
type rate struct {
	gap   int64 // nanoseconds
	slack int64 // how far ahead of now that time may be for one more to be admitted
}

// newRate makes a rate; a burst of 0 is what comes in a second, and at least 1.
func newRate(perSecond float64, burst int) rate {
	if !(perSecond > 0) {
		return rate{}
	}
	if burst <= 0 {
		burst = int(math.Ceil(min(perSecond, math.MaxInt32)))
	}
	const most = float64(1 << 60)
	gap := max(min(1e9/perSecond, most), 1)
	return rate{gap: int64(gap), slack: int64(min(gap*float64(burst-1), most))}
}

// take admits one more, or returns false.
func (r rate) take(full *atomic.Int64, now int64) bool {
	for {
		was := full.Load()
		at := max(was, now)
		if at-now > r.slack {
			return false
		}
		if full.CompareAndSwap(was, at+r.gap) {
			return true
		}
	}
}

// sources are the sources of a listener's connections: a table of fixed size, in
// which a source keeps its place while it has a connection or has not regained
// all of its rate. Nothing of it is locked; two loops that see a new source in the
// same moment may for a while count it in two places.
type sources struct {
	seed maphash.Seed
	sets [sourceSets][sourceWays]source
}

const (
	sourceSets = 8192
	sourceWays = 8
)

// source is one address, or one network of IPv6.
type source struct {
	key    atomic.Uint64 // 0 is nobody
	full   atomic.Int64  // of its rate
	active atomic.Int32  // connections; -1 while the key is being changed
}

// newSources touches all of the table, so that its pages are there from the start and
// no connection has to wait for one.
func newSources() *sources {
	t := &sources{seed: maphash.MakeSeed()}
	for i := range t.sets {
		t.sets[i][0].key.Store(0)
	}
	return t
}

// sourceKey is never 0. IPv6 counts by the /64: a host has as many addresses
// there as it likes.
func sourceKey(ip netip.Addr) uint64 {
	ip = ip.Unmap()
	b := ip.As16()
	var k uint64
	if ip.Is4() {
		// 0:1::/32 is nobody's.
		for _, c := range b[12:] {
			k = k<<8 | uint64(c)
		}
		return k | 1<<32
	}
	for _, c := range b[:8] {
		k = k<<8 | uint64(c)
	}
	if k == 0 {
		return 1 << 33 // ::1
	}
	return k
}

// acquire accounts a connection to a source, or names the limit in its way. Both
// are empty for a source that there is no place for: it is not limited by itself.
func (t *sources) acquire(key uint64, now int64, most int32, r rate) (s *source, limit string) {
	set := &t.sets[maphash.Comparable(t.seed, key)%sourceSets]
	if s = find(set, key, sourceWays); s == nil {
		if s = claim(set, key, now); s == nil {
			return nil, ""
		}
	}
	if n := s.active.Load(); most > 0 && n > most {
		s.release()
		return nil, "max connections of the source"
	}
	if r.gap > 0 && !r.take(&s.full, now) {
		s.release()
		return nil, "connection rate of the source"
	}
	return s, ""
}

// find returns the place of key among the first ways, with a connection added.
func find(set *[sourceWays]source, key uint64, ways int) *source {
	for i := range set[:ways] {
		s := &set[i]
		for s.key.Load() == key {
			n := s.active.Load()
			if n < 0 {
				break
			}
			if !s.active.CompareAndSwap(n, n+1) {
				continue
			}
			if s.key.Load() == key {
				return s
			}
			s.release() // it became somebody else's before we had it
		}
	}
	return nil
}

// claim finds a place for a key that has none, with a connection added.
func claim(set *[sourceWays]source, key uint64, now int64) *source {
	for i := range set {
		s := &set[i]
		if s.full.Load() > now || !s.active.CompareAndSwap(0, -1) {
			continue
		}
		if s.full.Load() > now { // used since
			s.active.Store(0)
			continue
		}
		s.full.Store(0)
		s.key.Store(key)
		s.active.Store(1)
		// Another loop may have done the same in an earlier place: that one counts.
		if first := find(set, key, i); first != nil {
			s.release()
			return first
		}
		return s
	}
	return nil
}

// release takes a connection off.
func (s *source) release() { s.active.Add(-1) }
