package sni

import (
	"context"
	"errors"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/go-hclog"
)

// LookupFunc resolves a host name to all of its addresses, and says for how long
// they hold; 0 is not known.
type LookupFunc func(ctx context.Context, host string) (addrs []netip.Addr, ttl time.Duration, err error)

const (
	lookupTimeout   = 5 * time.Second
	lookupRetryMin  = time.Second
	lookupsAtOnce   = 16
	lookupJitterDiv = 5
)

// host is a name with a port whose addresses are kept current while a table
// uses it. The last good addresses stay when a lookup fails.
type host struct {
	name   string // host:port
	cancel context.CancelFunc
	addrs  atomic.Pointer[addressSet]
	err    atomic.Pointer[string] // of the last lookup
	ready  chan struct{}          // closed when the first lookup is over
}

// addressSet are the addresses of a host. The slices are immutable.
type addressSet struct {
	list []netip.AddrPort
	rest []*addressRest // of each
}

// addressRest says for how long an address is tried after the others only, because it
// could not be connected to: one family without a route is not to slow down every
// connection.
type addressRest struct {
	failures atomic.Int32 // in a row
	until    atomic.Int64 // on the forwarder's clock
}

// newAddressSet takes over what is known of addresses from was, which may be nil.
func newAddressSet(list []netip.AddrPort, was *addressSet) *addressSet {
	s := &addressSet{list: list, rest: make([]*addressRest, len(list))}
	for i, a := range list {
		if was != nil {
			if j := slices.Index(was.list, a); j >= 0 {
				s.rest[i] = was.rest[j]
				continue
			}
		}
		s.rest[i] = &addressRest{}
	}
	return s
}

// failed lets the address rest, as long as an endpoint is ejected for.
func (r *addressRest) failed(cfg *Config, now int64) {
	n := min(r.failures.Add(1), 16)
	r.until.Store(now + int64(min(cfg.EjectBase<<(n-1), cfg.EjectMax)))
}

func (r *addressRest) reached() {
	if r.failures.Load() != 0 {
		r.failures.Store(0)
		r.until.Store(0)
	}
}

// resolver keeps hosts current, one goroutine for each, a bounded number of
// lookups at one time. Its methods are for the control goroutine.
type resolver struct {
	lookup   LookupFunc
	interval time.Duration
	log      hclog.Logger
	slots    chan struct{}

	ctx   context.Context // of Run; the resolver owns goroutines that end with it
	wg    sync.WaitGroup
	hosts map[string]*host
}

func newResolver(ctx context.Context, lookup LookupFunc, interval time.Duration, log hclog.Logger) *resolver {
	return &resolver{
		lookup: lookup, interval: interval, log: log, ctx: ctx,
		slots: make(chan struct{}, lookupsAtOnce), hosts: map[string]*host{},
	}
}

// host returns the named host, and begins to look it up if it is new.
func (r *resolver) host(name string, port uint16) *host {
	key := net.JoinHostPort(name, strconv.Itoa(int(port)))
	if h := r.hosts[key]; h != nil {
		return h
	}
	ctx, cancel := context.WithCancel(r.ctx)
	h := &host{name: key, cancel: cancel, ready: make(chan struct{})}
	r.hosts[key] = h
	r.wg.Go(func() { r.follow(ctx, h, name, port) })
	return h
}

// retain stops looking up the hosts that are not in used.
func (r *resolver) retain(used map[string]bool) {
	for key, h := range r.hosts {
		if !used[key] {
			h.cancel()
			delete(r.hosts, key)
		}
	}
}

// await waits, for at most d, until every host had its first lookup.
func (r *resolver) await(ctx context.Context, d time.Duration) {
	var timeout <-chan time.Time
	for _, h := range r.hosts {
		select {
		case <-h.ready:
			continue
		default:
		}
		if timeout == nil {
			t := time.NewTimer(d)
			defer t.Stop()
			timeout = t.C
		}
		select {
		case <-h.ready:
		case <-timeout:
			return
		case <-ctx.Done():
			return
		}
	}
}

func (r *resolver) stop() {
	r.retain(nil)
	r.wg.Wait()
}

func (r *resolver) follow(ctx context.Context, h *host, name string, port uint16) {
	retry := lookupRetryMin
	t := time.NewTimer(0)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
		}
		ttl, err := r.once(ctx, h, name, port)
		if err != nil || ttl <= 0 {
			ttl = r.interval
		}
		// The jitter keeps many gateways from asking in step.
		wait := ttl + rand.N(ttl/lookupJitterDiv+1)
		if err != nil {
			if ctx.Err() != nil {
				return
			}
			text := "resolve: " + err.Error()
			if old := h.err.Swap(&text); old == nil {
				r.log.Warn("host not resolved", "host", name, "error", err, "kept", h.addrs.Load() != nil)
			}
			wait = min(retry, wait)
			retry *= 2
		} else {
			h.err.Store(nil)
			retry = lookupRetryMin
		}
		t.Reset(wait)
	}
}

func (r *resolver) once(ctx context.Context, h *host, name string, port uint16) (ttl time.Duration, err error) {
	select {
	case r.slots <- struct{}{}:
		defer func() { <-r.slots }()
	case <-ctx.Done():
		return 0, ctx.Err()
	}
	ctx, cancel := context.WithTimeout(ctx, lookupTimeout)
	defer cancel()
	ips, ttl, err := r.lookup(ctx, name)
	if err == nil && len(ips) == 0 {
		err = errors.New("no address")
	}
	if err == nil {
		h.addrs.Store(newAddressSet(interleave(ips, port), h.addrs.Load()))
	}
	select {
	case <-h.ready:
	default:
		close(h.ready)
	}
	return ttl, err
}

// interleave orders addresses so that the families alternate (RFC 8305 4): the
// next attempt after a family without a route is one of the other.
func interleave(ips []netip.Addr, port uint16) []netip.AddrPort {
	var v4, v6 []netip.AddrPort
	for _, ip := range ips {
		if ip = ip.Unmap(); ip.Is4() {
			v4 = append(v4, netip.AddrPortFrom(ip, port))
		} else {
			v6 = append(v6, netip.AddrPortFrom(ip, port))
		}
	}
	out := make([]netip.AddrPort, 0, len(ips))
	for i := range max(len(v4), len(v6)) {
		if i < len(v6) {
			out = append(out, v6[i])
		}
		if i < len(v4) {
			out = append(out, v4[i])
		}
	}
	return out
}
