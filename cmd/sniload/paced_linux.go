package main

import (
	"context"
	"flag"
	"os"
	"runtime"
	"slices"
	"time"
)

// paced opens short connections at a rate, whether or not those before have been
// answered: what a user of the forwarder sees while something else goes on. It
// does so in pairs of windows, one quiet and one disturbed, so that whatever else
// the machine does is in both.
type paced struct {
	*connRate
	rate             int
	pairs            int
	quiet, disturbed time.Duration
	rest             time.Duration // between them
}

func newPaced(fs *flag.FlagSet, disturbed time.Duration) *paced {
	p := &paced{connRate: &connRate{load: newLoad(fs, 1), byFD: map[int]*attempt{}}, rest: 300 * time.Millisecond}
	fs.IntVar(&p.rate, "rate", 500, "connections per second")
	fs.IntVar(&p.pairs, "pairs", 3, "pairs of a quiet and a disturbed time")
	fs.DurationVar(&p.quiet, "quiet", 2*time.Second, "quiet time of a pair")
	fs.DurationVar(&p.disturbed, "disturbed", disturbed, "disturbed time of a pair")
	return p
}

// answerLimit is how long a paced connection waits for its answer.
const answerLimit = 5 * time.Second

// window opens connections for d and returns their set-up times.
func (p *paced) window(ctx context.Context, d time.Duration) []time.Duration {
	p.lat = nil
	n := max(1, int(float64(p.rate)*d.Seconds()))
	gap := d / time.Duration(n)
	began := time.Now()
	for i := 0; i < n || len(p.byFD) > 0; {
		now := time.Since(began)
		if ctx.Err() != nil || now > d+answerLimit {
			for _, a := range p.byFD {
				p.end(a, os.ErrDeadlineExceeded)
			}
			break
		}
		for i < n && gap*time.Duration(i) <= now {
			p.start()
			i++
		}
		wait := 100 * time.Millisecond
		if i < n {
			wait = gap*time.Duration(i) - now + time.Millisecond
		}
		p.handle(p.poll.wait(wait))
	}
	return p.lat
}

// run makes the pairs. disturb is called at the beginning of each disturbed
// window and returns what ends it; both have ended when run returns.
func (p *paced) run(ctx context.Context, disturb func(ctx context.Context) (stop func() error, err error)) error {
	p.window(ctx, min(p.quiet, 500*time.Millisecond)) // warms up
	busy, path, began := machineBusy(), spentBy(p.proxies).cpu+spentBy(p.others).cpu, time.Now()
	var quiet, loaded []time.Duration
	for range p.pairs {
		quiet = append(quiet, p.window(ctx, p.quiet)...)
		stop, err := disturb(ctx)
		if err != nil {
			return err
		}
		loaded = append(loaded, p.window(ctx, p.disturbed)...)
		if err := stop(); err != nil {
			return err
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		settle(ctx, p.rest)
	}
	busy, path = machineBusy()-busy, spentBy(p.proxies).cpu+spentBy(p.others).cpu-path
	p.out.Metrics = map[string]float64{
		"rate":      float64(p.rate),
		"strangers": max(0, float64(busy-path)/float64(time.Since(began)*time.Duration(runtime.NumCPU()))),
	}
	// Of all windows together: the p99 of one is that of a few connections.
	if q, l := percentile(quiet, .99), percentile(loaded, .99); q > 0 && l > 0 {
		p.out.Metrics["p99quiet"], p.out.Metrics["p99"], p.out.Metrics["p99ratio"] = q, l, l/q
		p.out.Metrics["p50"] = percentile(loaded, .5)
	}
	return nil
}

// percentile, in seconds, of times that it sorts; 0 where there are none.
func percentile(lat []time.Duration, part float64) float64 {
	if len(lat) == 0 {
		return 0
	}
	slices.Sort(lat)
	return lat[min(int(part*float64(len(lat))), len(lat)-1)].Seconds()
}
