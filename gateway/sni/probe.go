package sni

import (
	"context"
	"math/rand/v2"
	"net"
	"sync"
	"time"

	"github.com/sluicemesh/sluice/gateway"
)

const (
	// failingLeast is how many failures in a row make an endpoint one that is probed
	// where only the failing are.
	failingLeast = 2
	probesAtOnce = 32
	// probeTurn is the least time between two looks at what is to be probed.
	probeTurn           = 50 * time.Millisecond
	defaultProbeEvery   = 10 * time.Second
	defaultProbeTimeout = 2 * time.Second
	probeJitterDiv      = 5
	// probeLookDiv is how many times in an interval it is looked whether an endpoint
	// has begun to fail.
	probeLookDiv = 4
)

// prober connects to endpoints, where their cluster asks for it, to learn which of
// them can be connected to before a client has to. What it finds counts like what
// a client's connection finds.
type prober struct {
	f     *Forwarder
	slots chan struct{}
	wg    sync.WaitGroup
	due   map[*endpoint]int64 // on the forwarder's clock; run's own
}

func newProber(f *Forwarder) *prober {
	return &prober{f: f, slots: make(chan struct{}, probesAtOnce), due: map[*endpoint]int64{}}
}

// run probes until ctx ends, and returns when nothing of it is left.
func (p *prober) run(ctx context.Context) {
	defer p.wg.Wait()
	p.f.watch(ctx, p.turn)
}

// turn begins the probes that are due. It returns the time until the next, and
// false when nothing is ever to be probed with the table in use.
func (p *prober) turn(ctx context.Context) (wait time.Duration, ok bool) {
	now := p.f.now()
	next := now + int64(time.Hour)
	seen := make(map[*endpoint]bool, len(p.due))
	for _, c := range p.f.view.Load().probed {
		pl := c.plan.Load()
		if pl == nil || pl.probe == nil {
			continue
		}
		ok = true
		every := pl.probe.Interval
		if every <= 0 {
			every = defaultProbeEvery
		}
		for i := range pl.tiers {
			t := &pl.tiers[i]
			if t.owner != c {
				continue
			}
			for j := range t.members {
				ep := t.members[j].ep
				if seen[ep] {
					continue
				}
				if !pl.probe.All && ep.failures.Load() < pl.probeFrom {
					// Not even to be remembered: there may be very many.
					next = min(next, now+int64(every)/probeLookDiv)
					continue
				}
				seen[ep] = true
				at, known := p.due[ep]
				if !known {
					// Not all at once, and not in step with other gateways.
					at = now + rand.Int64N(int64(every))
				}
				if now >= at {
					p.begin(ctx, t, ep, pl.probe)
					at = now + int64(every) + rand.Int64N(int64(every)/probeJitterDiv+1)
				}
				p.due[ep] = at
				next = min(next, at)
			}
		}
	}
	for ep := range p.due {
		if !seen[ep] {
			delete(p.due, ep)
		}
	}
	return max(time.Duration(next-now), probeTurn), ok
}

// begin connects to an endpoint, unless too many probes are under way; then its turn
// is over.
func (p *prober) begin(ctx context.Context, t *tier, ep *endpoint, spec *gateway.Probe) {
	if len(ep.addresses()) == 0 {
		return
	}
	select {
	case p.slots <- struct{}{}:
	default:
		return
	}
	p.wg.Go(func() {
		defer func() { <-p.slots }()
		p.probe(ctx, t, ep, spec)
	})
}

// probe connects to one of an endpoint's addresses, as a client's connection would:
// those that rest come last, and one that can be connected to is enough.
func (p *prober) probe(ctx context.Context, t *tier, ep *endpoint, spec *gateway.Probe) {
	dialer := net.Dialer{Timeout: spec.Timeout}
	if dialer.Timeout <= 0 {
		dialer.Timeout = defaultProbeTimeout
	}
	d := dial{f: p.f, start: rand.Uint32()}
	for n := min(len(ep.addresses()), maxTries); d.tries < n; d.tries++ {
		place := d.chooseAddress(ep, p.f.now())
		d.tried[d.tries], d.places[d.tries] = ep, place
		c, err := dialer.DialContext(ctx, "tcp", d.addr.String())
		switch {
		case ctx.Err() != nil:
			if err == nil {
				c.Close()
			}
			return
		case err != nil:
			cause := connectError(err)
			if ownFault(cause) {
				return
			}
			text := "probe: " + cause.Error()
			ep.lastError.Store(&text)
			if d.rest != nil {
				d.rest.failed(&p.f.cfg, p.f.now())
			}
		default:
			c.Close()
			if d.rest != nil {
				d.rest.reached()
			}
			ep.failures.Store(0)
			if !ep.silenced.Load() && ep.ejectedUntil.Swap(0) > p.f.now() {
				p.f.log.Info("endpoint is back, as a probe found", "cluster", t.owner.name, "endpoint", ep.key)
			}
			return
		}
	}
	p.f.eject(t, ep, p.f.now())
}
