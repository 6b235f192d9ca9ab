package sni

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"
	"unsafe"

	"github.com/google/go-cmp/cmp"

	"github.com/sluicemesh/sluice/gateway"
)

// chooser is a forwarder's choice without its sockets.
type chooser struct {
	*Forwarder
	reg registry
	now int64
}

func newChooser(t testing.TB, cfg Config, clusters ...gateway.Cluster) *chooser {
	f := New(cfg)
	c := &chooser{Forwarder: f, reg: registry{clusters: map[string]*cluster{}, dns: newResolver(t.Context(), f.cfg.Lookup, f.cfg.LookupInterval, f.log)}}
	c.apply(clusters...)
	return c
}

func (c *chooser) apply(clusters ...gateway.Cluster) {
	c.reg.commit(c.reg.prepare(&gateway.Table{Clusters: clusters}))
}

func (c *chooser) begin(name string) *dial {
	d := &dial{}
	d.begin(c.Forwarder, c.reg.clusters[name], c.now)
	return d
}

// all fails every attempt and returns the endpoints in the order of trying.
func (c *chooser) all(name string) (out []string) {
	d := c.begin(name)
	for d.next(c.now) {
		out = append(out, d.ep.key)
		d.failed(c.now, errors.New("no"))
	}
	return out
}

// weighted is a cluster of endpoints 10.0.0.1:1, :2... with weights.
func weighted(policy gateway.Policy, weights ...int) gateway.Cluster {
	c := gateway.Cluster{Name: "c", Policy: policy}
	for i, w := range weights {
		c.Endpoints = append(c.Endpoints, gateway.Endpoint{Address: "10.0.0.1", Port: i + 1, Healthy: true, Weight: w})
	}
	return c
}

func TestPolicies(t *testing.T) {
	const n = 12000
	for _, tc := range []struct {
		policy gateway.Policy
		within float64
	}{
		{gateway.PolicyLeastConnections, 0.05},
		{gateway.PolicyRoundRobin, 0.001},
		{gateway.PolicyRandom, 0.15},
	} {
		t.Run("policy "+string(tc.policy), func(t *testing.T) {
			c := newChooser(t, Config{}, weighted(tc.policy, 1, 2, 3))
			got := map[string]int{}
			for range n { // all stay open
				d := c.begin("c")
				if !d.next(0) {
					t.Fatal("nothing to try")
				}
				_, ep := d.done()
				got[ep.key]++
			}
			for i := 1; i <= 3; i++ {
				want := float64(n * i / 6)
				if k := float64(got[fmt.Sprintf("10.0.0.1:%d", i)]); k < want*(1-tc.within) || k > want*(1+tc.within) {
					t.Errorf("endpoint of weight %d of 6 has %v of %d connections: %v", i, k, n, got)
				}
			}
		})
	}
}

func TestRoundRobinSpreadsTurns(t *testing.T) {
	c := newChooser(t, Config{}, weighted(gateway.PolicyRoundRobin, 4, 1, 1))
	longest, run := 0, 0
	for range 60 {
		d := c.begin("c")
		d.next(0)
		if _, ep := d.done(); ep.key == "10.0.0.1:1" {
			run++
		} else {
			run = 0
		}
		longest = max(longest, run)
	}
	if longest > 3 {
		t.Errorf("the endpoint with 4 of 6 turns has %d in a row", longest)
	}
}

func TestLeastConnectionsPrefersTheIdle(t *testing.T) {
	c := newChooser(t, Config{}, weighted(gateway.PolicyLeastConnections, 1, 1))
	d := c.begin("c")
	d.next(0)
	_, busy := d.done()
	other := 0
	for range 200 {
		d := c.begin("c")
		d.next(0)
		if d.ep != busy {
			other++
		}
		d.abandon()
	}
	if other != 200 {
		t.Errorf("the idle endpoint of two was chosen %d times of 200", other)
	}
}

func TestOrderOfTrying(t *testing.T) {
	up := func(port, prio int) gateway.Endpoint {
		return gateway.Endpoint{Address: "10.0.0.1", Port: port, Healthy: true, Weight: 1, Priority: prio}
	}
	unknown, critical := up(3, 0), up(4, 0)
	unknown.Healthy = false
	critical.Healthy, critical.Why = false, "critical"
	web := gateway.Cluster{Name: "web", Endpoints: []gateway.Endpoint{up(1, 0), unknown, critical, up(2, 1)}, Failover: []string{"web", "spare", "gone"}}
	spare := gateway.Cluster{Name: "spare", Endpoints: []gateway.Endpoint{up(9, 0)}, Failover: []string{"deeper"}}
	c := newChooser(t, Config{ConnectAttempts: 8}, web, spare, gateway.Cluster{Name: "deeper", Endpoints: []gateway.Endpoint{up(10, 0)}})
	want := []string{"10.0.0.1:1", "10.0.0.1:2", "10.0.0.1:9", "10.0.0.1:3"}
	if d := cmp.Diff(want, c.all("web")); d != "" {
		t.Errorf("order (-want +got):\n%s", d)
	}
	c.cfg.ConnectAttempts = 2
	if d := cmp.Diff(want[:2], c.all("web")); d != "" {
		t.Errorf("bounded attempts (-want +got):\n%s", d)
	}
	// The failover goes, and the plan of who used it with it.
	c.cfg.ConnectAttempts = 8
	c.apply(web)
	if d := cmp.Diff([]string{want[0], want[1], want[3]}, c.all("web")); d != "" {
		t.Errorf("without the failover (-want +got):\n%s", d)
	}
	// Nothing is tried once the time is over.
	d := c.begin("web")
	d.next(0)
	d.failed(0, errors.New("no"))
	if d.next(int64(c.cfg.ConnectDeadline)) {
		t.Error("another attempt after the deadline")
	}
}

func TestNearestFirst(t *testing.T) {
	at := func(port, prio, weight int, zone string) gateway.Endpoint {
		return gateway.Endpoint{Address: "10.0.0.1", Port: port, Healthy: true, Weight: weight, Priority: prio, Zone: zone}
	}
	far := gateway.Cluster{Name: "far", Endpoints: []gateway.Endpoint{at(9, 0, 1, "eu/a")}}
	web := gateway.Cluster{Name: "web", Failover: []string{"far"}, Endpoints: []gateway.Endpoint{
		at(1, 0, 100, "us/a"), at(2, 0, 100, ""), at(3, 0, 100, "eu/b"), at(4, 0, 1, "eu/a"), at(5, 0, 3, "eu/a"), at(6, 1, 1, "eu/a"),
	}}
	sick := at(7, 0, 1, "eu/a")
	sick.Healthy, sick.Why = false, "critical"
	web.Endpoints = append(web.Endpoints, sick)
	c := newChooser(t, Config{ConnectAttempts: 8, EjectAfter: 2, EjectBase: time.Hour, EjectMax: time.Hour})
	use := func(zone string, clusters ...gateway.Cluster) {
		c.reg.commit(c.reg.prepare(&gateway.Table{Zone: zone, Clusters: clusters}))
	}
	use("eu/a", web, far)
	got := c.all("web")
	slices.Sort(got[:2])
	slices.Sort(got[3:5])
	port := func(ports ...int) (out []string) {
		for _, p := range ports {
			out = append(out, fmt.Sprintf("10.0.0.1:%d", p))
		}
		return out
	}
	if d := cmp.Diff(port(4, 5, 3, 1, 2, 6, 9), got); d != "" {
		t.Errorf("order (-want +got):\n%s", d)
	}
	// By weight among the near ones.
	n := map[string]int{}
	for range 400 {
		d := c.begin("web")
		d.next(0)
		n[d.ep.key]++
		d.done()
	}
	if n["10.0.0.1:4"]+n["10.0.0.1:5"] != 400 || n["10.0.0.1:5"] < 280 || n["10.0.0.1:5"] > 320 {
		t.Errorf("connections: %v", n)
	}
	// The only near one is passed over when it fails, as there are others.
	use("eu/a", gateway.Cluster{Name: "one", Endpoints: []gateway.Endpoint{at(8, 0, 1, "eu/a"), at(9, 0, 1, "us/a")}})
	for range 2 {
		d := c.begin("one")
		d.next(0)
		d.failed(0, errors.New("no"))
	}
	if d := c.begin("one"); !d.next(0) || d.ep.key != "10.0.0.1:9" {
		t.Errorf("after failures %s is tried first", d.ep.key)
	}
	// Elsewhere, or nowhere that is known.
	c = newChooser(t, Config{ConnectAttempts: 8})
	use("us/b", web)
	if got := c.all("web"); got[0] != "10.0.0.1:1" {
		t.Errorf("from us/b: %v", got)
	}
	use("", web)
	seen := map[string]bool{}
	for range 200 {
		d := c.begin("web")
		d.next(0)
		seen[d.ep.key] = true
		d.abandon()
	}
	if !seen["10.0.0.1:1"] || !seen["10.0.0.1:3"] {
		t.Errorf("from nowhere: %v", seen)
	}
}

func TestEjection(t *testing.T) {
	c := newChooser(t, Config{EjectAfter: 2, EjectBase: time.Second, EjectMax: 10 * time.Second, ConnectAttempts: 1},
		weighted(gateway.PolicyRoundRobin, 1, 1))
	bad := c.reg.clusters["c"].endpoints["10.0.0.1:1"]
	run := func(n int) (tried int) { // bad fails, the other does not
		for range n {
			d := c.begin("c")
			if !d.next(c.now) {
				t.Fatal("nothing to try")
			}
			if d.ep == bad {
				tried++
				d.failed(c.now, errors.New("no"))
			} else {
				closed(d.done())
			}
		}
		return tried
	}
	if n := run(20); n != 2 {
		t.Errorf("tried %d times before the ejection, want 2", n)
	}
	for _, wait := range []time.Duration{time.Second, 2 * time.Second, 4 * time.Second, 8 * time.Second, 10 * time.Second, 10 * time.Second} {
		if n := run(20); n != 0 {
			t.Errorf("ejected for %s: tried %d times", wait, n)
		}
		c.now += int64(wait) - 1
		if n := run(20); n != 0 {
			t.Errorf("just before %s: tried %d times", wait, n)
		}
		c.now++
		if n := run(20); n != 1 {
			t.Errorf("after %s: tried %d times, want once", wait, n)
		}
	}
	// The other is the last one: it is not ejected, whatever happens.
	good := c.reg.clusters["c"].endpoints["10.0.0.1:2"]
	for range 10 {
		d := c.begin("c")
		d.next(c.now)
		if d.ep != good {
			t.Fatal("the ejected one was chosen")
		}
		d.failed(c.now, errors.New("no"))
	}
	// It succeeds when its time is over: all is forgotten.
	c.now += int64(10 * time.Second)
	d := c.begin("c")
	for d.next(c.now); d.ep != bad; d.next(c.now) {
		d.abandon()
		d = c.begin("c")
	}
	closed(d.done())
	if bad.failures.Load() != 0 {
		t.Error("failures are kept after a success")
	}
	if n := c.reg.clusters["c"].active.Load() + bad.active.Load() + good.active.Load(); n != 0 {
		t.Errorf("%d connections are active, want none", n)
	}
}

// An endpoint that does not answer is passed over only when it answers nobody and
// another does.
func TestSilence(t *testing.T) {
	const base = time.Second
	for name, tc := range map[string]struct {
		bad, good int64 // when each last answered, before now; -1 is never
		silences  int
		ejected   bool
	}{
		"alone silent":       {bad: -1, good: 0, silences: 2, ejected: true},
		"silent for long":    {bad: int64(base), good: 0, silences: 2, ejected: true},
		"not often enough":   {bad: -1, good: 0, silences: 1},
		"answered lately":    {bad: int64(base) - 1, good: 0, silences: 2},
		"so is the other":    {bad: -1, good: -1, silences: 2},
		"the other was once": {bad: -1, good: int64(base), silences: 2},
	} {
		t.Run(name, func(t *testing.T) {
			c := newChooser(t, Config{EjectAfter: 2, EjectBase: base, EjectMax: time.Minute, ConnectAttempts: 1}, weighted(gateway.PolicyRoundRobin, 1, 1))
			c.now = int64(time.Hour)
			bad, good := c.reg.clusters["c"].endpoints["10.0.0.1:1"], c.reg.clusters["c"].endpoints["10.0.0.1:2"]
			answer := func(ep *endpoint, ago int64) {
				for ago >= 0 {
					d := c.begin("c")
					if d.next(c.now); d.ep == ep {
						closed(d.answered(c.now - ago))
						return
					}
					d.abandon()
				}
			}
			answer(good, tc.good)
			answer(bad, tc.bad)
			for n := 0; n < tc.silences; {
				d := c.begin("c")
				if d.next(c.now); d.ep == bad {
					d.connected(c.now)
					d.unanswered(c.now, errClosedUnanswered)
					n++
				} else {
					d.abandon()
				}
			}
			if got := bad.ejectedUntil.Load() > c.now; got != tc.ejected {
				t.Errorf("ejected %t, want %t", got, tc.ejected)
			}
			if n := c.reg.clusters["c"].active.Load() + bad.active.Load(); n != 0 {
				t.Errorf("%d are active", n)
			}
		})
	}
}

// When every endpoint is slow, only a part of the hellos is sent twice.
func TestReplaysAreBounded(t *testing.T) {
	for _, tc := range []struct{ conns, want int }{{2, 2}, {10, 3}, {100, 20}} {
		c := newChooser(t, Config{ConnectAttempts: 8}, weighted(gateway.PolicyRoundRobin, 1, 1, 1))
		var open []*dial
		for range tc.conns {
			d := c.begin("c")
			d.next(c.now)
			d.connected(c.now)
			open = append(open, d)
		}
		var replayed []*dial
		for _, d := range open {
			if d.mayReplay(c.now) {
				replayed = append(replayed, d)
			}
		}
		if len(replayed) != tc.want {
			t.Errorf("%d of %d are sent to another, want %d", len(replayed), tc.conns, tc.want)
		}
		// One more time is no more load, and the end gives the place to another.
		for i, d := range replayed {
			d.unanswered(c.now, errNoAnswer)
			if !d.next(c.now) || !d.mayReplay(c.now) {
				t.Fatal("it is not sent on again")
			}
			switch i % 3 {
			case 0:
				closed(d.done())
			case 1:
				d.abandon()
			case 2:
				d.failed(c.now, errors.New("no"))
				d.refusal()
			}
		}
		if n := c.reg.clusters["c"].replays.Load(); n != 0 {
			t.Errorf("%d replays are left", n)
		}
	}
}

func TestStateSurvivesTables(t *testing.T) {
	web := weighted(gateway.PolicyRoundRobin, 1, 1)
	c := newChooser(t, Config{}, web)
	cl := c.reg.clusters["c"]
	first := cl.endpoints["10.0.0.1:1"]
	plan := cl.plan.Load()
	same := weighted(gateway.PolicyRoundRobin, 1, 1)
	same.Origin.Index = 99
	c.apply(same)
	if c.reg.clusters["c"] != cl || cl.plan.Load() != plan {
		t.Error("an unchanged cluster was compiled again")
	}
	d := c.begin("c")
	d.next(0)
	owner, ep := d.done()
	c.apply(weighted(gateway.PolicyRoundRobin, 1, 5, 1))
	if c.reg.clusters["c"] != cl || cl.endpoints["10.0.0.1:1"] != first || cl.plan.Load() == plan {
		t.Error("a changed cluster lost its state, or did not change")
	}
	c.apply(weighted(gateway.PolicyRoundRobin, 1))
	c.apply(weighted(gateway.PolicyRoundRobin, 2))
	if len(cl.endpoints) != 2 || cl.endpoints["10.0.0.1:1"] != first || cl.endpoints[ep.key] != ep {
		t.Errorf("endpoints: %v, want the one there is and the one with a connection", cl.endpoints)
	}
	// Gone, but with a connection: kept until that ends.
	c.apply()
	if c.reg.clusters["c"] != cl {
		t.Error("a cluster with a connection was forgotten")
	}
	c.apply(web)
	if c.reg.clusters["c"] != cl {
		t.Error("a cluster that came back lost its state")
	}
	closed(owner, ep)
	c.apply()
	if c.reg.clusters["c"] != nil {
		t.Error("a cluster without a connection was kept")
	}
}

func TestChoiceAllocatesNothing(t *testing.T) {
	c := newChooser(t, Config{}, weighted(gateway.PolicyLeastConnections, 1, 2, 3))
	cl := c.reg.clusters["c"]
	var d dial
	if n := testing.AllocsPerRun(100, func() {
		d.begin(c.Forwarder, cl, 0)
		d.next(0)
		closed(d.done())
	}); n != 0 {
		t.Errorf("%v allocations, want none", n)
	}
}

func TestAddressesRest(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		addrs := []netip.Addr{netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("10.0.0.2"), netip.MustParseAddr("2001:db8::1")}
		f := New(Config{LookupInterval: time.Second, EjectBase: 10 * time.Second, EjectMax: 15 * time.Second, Lookup: func(context.Context, string) ([]netip.Addr, time.Duration, error) {
			rand.Shuffle(len(addrs), func(i, j int) { addrs[i], addrs[j] = addrs[j], addrs[i] }) // as name servers do
			return slices.Clone(addrs), 0, nil
		}})
		c := &chooser{Forwarder: f, reg: registry{clusters: map[string]*cluster{}, dns: newResolver(ctx, f.cfg.Lookup, f.cfg.LookupInterval, f.log)}}
		gw := gateway.Cluster{Name: "c", ConnectTimeout: 5 * time.Second, Endpoints: []gateway.Endpoint{{Address: "gw.example", Port: 1, Healthy: true, Weight: 1}}}
		c.apply(gw)
		c.reg.dns.await(ctx, time.Second)
		first := func() string {
			c.now = f.now()
			d := c.begin("c")
			d.next(c.now)
			defer d.abandon()
			return d.addr.Addr().String()
		}
		firsts := func() (n int) {
			all := map[string]bool{}
			for range 200 {
				all[first()] = true
			}
			return len(all)
		}
		if n := firsts(); n != 3 {
			t.Errorf("%d addresses are begun with, want all", n)
		}
		// Each is tried once, whatever becomes of it.
		c.now = f.now()
		d, tried := c.begin("c"), map[string]bool{}
		for d.next(f.now()) {
			if left := 2 - len(tried); left > 0 && d.timeout(f.now()) > attemptDelay {
				t.Errorf("%s for an address with %d others", d.timeout(f.now()), left)
			}
			tried[d.addr.String()] = true
			d.failed(f.now(), errConnectTimeout)
		}
		if d.tries != 3 || len(tried) != 3 {
			t.Errorf("tried %v in %d attempts", tried, d.tries)
		}
		time.Sleep(11 * time.Second)
		synctest.Wait()
		c.now = f.now()
		d = c.begin("c")
		d.next(c.now)
		bad := d.addr.Addr().String()
		d.failed(f.now(), errConnectTimeout)
		for range 14 { // for EjectMax, over several lookups
			if n := firsts(); n != 2 {
				t.Fatalf("%d addresses are begun with, want all but %s", n, bad)
			}
			if first() == bad {
				t.Fatal("an address that rests is tried first")
			}
			time.Sleep(time.Second)
			synctest.Wait()
		}
		time.Sleep(2 * time.Second)
		synctest.Wait()
		if n := firsts(); n != 3 {
			t.Errorf("%d addresses are begun with after a rest, want all", n)
		}
		for c.now = f.now(); ; {
			d = c.begin("c")
			if d.next(c.now); d.addr.Addr().String() == bad {
				d.done()
				break
			}
			d.abandon()
		}
		if n := d.rest.failures.Load(); n != 0 {
			t.Errorf("%d failures of one that was reached", n)
		}
		cancel()
		c.reg.dns.stop()
	})
}

func TestConnectTimes(t *testing.T) {
	c := newChooser(t, Config{}, weighted("", 1))
	var sum time.Duration
	for i, took := range []time.Duration{
		0, time.Millisecond, time.Millisecond + 1, 4 * time.Millisecond, 30 * time.Millisecond, 90 * time.Millisecond, time.Second, 4 * time.Second, time.Minute,
	} {
		d := c.begin("c")
		if i == 4 { // an attempt before it does not count
			d.next(int64(time.Second))
			d.failed(int64(2*time.Second), errConnectTimeout)
			d.tried[0] = nil
		}
		d.next(int64(3 * time.Second))
		d.connected(int64(3*time.Second + took))
		_, ep := d.done()
		ep.counter(i%2, 2).made(d.took)
		sum += took
	}
	got := c.reg.clusters["c"].status(c.Forwarder).ConnectTimes
	want := &gateway.ConnectTimes{Sum: gateway.Duration(sum), Counts: []uint64{2, 1, 1, 0, 0, 1, 1, 0, 1, 2}}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("(-want +got):\n%s", d)
	}
}

// The counts of a cluster do not go back when endpoints leave it.
func TestCountsOfThoseThatLeft(t *testing.T) {
	web := weighted(gateway.PolicyRoundRobin, 1, 1)
	c := newChooser(t, Config{}, web)
	cl := c.reg.clusters["c"]
	open := func() (*cluster, *endpoint) {
		d := c.begin("c")
		d.next(0)
		d.connected(0)
		owner, ep := d.done()
		n := ep.counter(0, 1)
		n.made(d.took)
		n.in.Add(10)
		n.out.Add(100)
		return owner, ep
	}
	check := func(when string, bytes uint64, endpoints int) {
		t.Helper()
		s := cl.status(c.Forwarder)
		if s.BytesIn != bytes || s.BytesOut != 10*bytes || s.ConnectTimes.Counts[0] != bytes/10 || len(s.Endpoints) != endpoints {
			t.Errorf("%s: %+v", when, s)
		}
	}
	a, aEP := open()
	b, bEP := open()
	check("both are there", 20, 2)
	c.apply(weighted(gateway.PolicyRoundRobin, 1))
	check("one has left", 20, 1)
	gone := bEP
	if bEP.key == "10.0.0.1:1" {
		gone = aEP
	}
	gone.counter(0, 1).in.Add(10)
	gone.counter(0, 1).out.Add(100)
	gone.counter(0, 1).made(0)
	check("its connection goes on", 30, 1)
	c.apply(web)
	if cl.endpoints[gone.key] != gone || gone.active.Load() != 1 {
		t.Error("one that came back does not have its connection")
	}
	check("it came back", 30, 2)
	c.apply(weighted(gateway.PolicyRoundRobin, 1))
	closed(a, aEP)
	closed(b, bEP)
	for weight := range 3 {
		c.apply(weighted(gateway.PolicyRoundRobin, weight+2))
		check("it has left for good", 30, 1)
	}
	if pl := cl.plan.Load(); len(pl.gone) != 0 || len(cl.endpoints) != 1 {
		t.Errorf("not forgotten: %v, %v", pl.gone, cl.endpoints)
	}
}

func TestResolver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		var mu sync.Mutex // guards what follows, for the race detector
		var answer []netip.Addr
		var ttl time.Duration
		var fail error
		asked := 0
		lookup := func(context.Context, string) ([]netip.Addr, time.Duration, error) {
			mu.Lock()
			defer mu.Unlock()
			asked++
			return answer, ttl, fail
		}
		set := func(a []netip.Addr, err error) {
			mu.Lock()
			defer mu.Unlock()
			answer, fail = a, err
		}
		count := func() int {
			mu.Lock()
			defer mu.Unlock()
			return asked
		}
		r := newResolver(ctx, lookup, 10*time.Second, New(Config{}).log)
		addrs := func(text ...string) (out []netip.AddrPort) {
			for _, a := range text {
				out = append(out, netip.MustParseAddrPort(a))
			}
			return out
		}
		three := []netip.Addr{netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("::ffff:10.0.0.2"), netip.MustParseAddr("2001:db8::1")}
		set(three, nil)
		h := r.host("gw.example", 443)
		r.await(ctx, time.Second)
		want := addrs("[2001:db8::1]:443", "10.0.0.1:443", "10.0.0.2:443")
		if d := cmp.Diff(want, h.addrs.Load().list, cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b })); d != "" {
			t.Errorf("addresses (-want +got):\n%s", d)
		}
		if r.host("gw.example", 443) != h {
			t.Error("a name is followed twice")
		}
		// Failures keep the last good answer, and are asked again sooner.
		set(nil, errors.New("no servers"))
		time.Sleep(12 * time.Second)
		synctest.Wait()
		if h.err.Load() == nil || len(h.addrs.Load().list) != 3 {
			t.Errorf("after a failure: %v, %v", h.err.Load(), h.addrs.Load())
		}
		before := count()
		time.Sleep(3 * time.Second)
		synctest.Wait()
		if count() < before+1 {
			t.Error("a failure is not asked again before the interval")
		}
		set(three[:1], nil)
		time.Sleep(15 * time.Second)
		synctest.Wait()
		if h.err.Load() != nil || len(h.addrs.Load().list) != 1 {
			t.Errorf("after a new answer: %v, %v", h.err.Load(), h.addrs.Load())
		}
		// Where it is known how long an answer holds, that is when it is asked again.
		mu.Lock()
		ttl = time.Minute
		mu.Unlock()
		time.Sleep(13 * time.Second)
		before = count()
		time.Sleep(45 * time.Second)
		if n := count(); n != before {
			t.Errorf("asked %d times while the answer holds", n-before)
		}
		time.Sleep(time.Minute)
		if n := count(); n < before+1 || n > before+2 {
			t.Errorf("asked %d times in 105 s", n-before)
		}
		r.retain(nil)
		synctest.Wait()
		before = count()
		time.Sleep(time.Minute)
		if count() != before {
			t.Error("a name that nothing uses is asked for")
		}
		cancel()
		r.stop()
	})
}

// The counts of a gateway that runs for months never go back, and those of one worker
// share no cache line with those of another.
func TestTraffic(t *testing.T) {
	if n := unsafe.Sizeof(traffic{}); n%64 != 0 {
		t.Errorf("%d bytes are no whole number of cache lines", n)
	}
	ep := &endpoint{}
	c := ep.counter(0, 2)
	c.took[0].Store(1<<32 - 1)
	c.made(0)
	ep.counter(1, 2).made(0)
	var all total
	if all.add(ep); all.took[0] != 1<<32+1 {
		t.Errorf("counted %d", all.took[0])
	}
}
