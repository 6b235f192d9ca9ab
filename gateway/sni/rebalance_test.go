package sni

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/hashicorp/go-hclog"

	"github.com/sluicemesh/sluice/gateway"
)

func TestExcess(t *testing.T) {
	for name, tc := range map[string]struct {
		active  []int64
		weights []uint32
		total   int64 // 0 is the sum
		factor  float64
		least   int
		want    []int
	}{
		"even":               {active: []int64{10, 10, 10}, factor: 1.25, want: []int{0, 0, 0}},
		"one is new":         {active: []int64{100, 0}, factor: 1.25, want: []int{38, 0}},
		"within the factor":  {active: []int64{60, 40}, factor: 1.25, want: []int{0, 0}},
		"no factor":          {active: []int64{60, 40}, factor: 1, want: []int{10, 0}},
		"less than a factor": {active: []int64{60, 40}, factor: 0, want: []int{10, 0}},
		"by weight":          {active: []int64{75, 25}, weights: []uint32{3, 1}, factor: 1, want: []int{0, 0}},
		"weight is gone":     {active: []int64{75, 25}, weights: []uint32{1, 3}, factor: 1.5, want: []int{38, 0}},
		"the only one":       {active: []int64{100}, factor: 1, want: []int{0}},
		"few":                {active: []int64{50, 0}, factor: 1, least: 50, want: []int{0, 0}},
		"down to few":        {active: []int64{60, 0}, factor: 1, least: 50, want: []int{10, 0}},
		// Half a connection is no reason.
		"odd": {active: []int64{3, 2}, factor: 1, want: []int{0, 0}},
		// Those that were closed and have not come back yet have their share too.
		"on their way": {active: []int64{63, 0}, total: 100, factor: 1.25, want: []int{1, 0}},
		"nothing":      {active: []int64{0, 0}, factor: 1, want: []int{0, 0}},
	} {
		shares := make([]share, len(tc.active))
		total := tc.total
		for i := range shares {
			shares[i].weight = 1
			if tc.weights != nil {
				shares[i].weight = tc.weights[i]
			}
			if tc.total == 0 {
				total += tc.active[i]
			}
		}
		if d := cmp.Diff(tc.want, excess(shares, tc.active, total, tc.factor, tc.least)); d != "" {
			t.Errorf("%s (-want +got):\n%s", name, d)
		}
	}
}

func TestMisplaced(t *testing.T) {
	const now, stable = int64(time.Hour), 30 * time.Second
	at := now - int64(time.Minute) // for long enough
	own, spare := &cluster{name: "own"}, &cluster{name: "spare"}
	type ep struct {
		name           string
		since          int64
		fails, silence int32
		active         int64
	}
	for name, tc := range map[string]struct {
		tiers [][]ep // those from the third are of the spare cluster, the last's health is unknown
		limit int64  // of the first tier
		want  []string
	}{
		"all are where they should be": {tiers: [][]ep{{{name: "a", since: at, active: 5}}, {{name: "b", since: at}}}},
		"back":                         {tiers: [][]ep{{{name: "a", since: at}}, {{name: "b", since: at, active: 5}}}, want: []string{"b"}},
		"a moment ago":                 {tiers: [][]ep{{{name: "a", since: now - int64(time.Second)}}, {{name: "b", since: at, active: 5}}}},
		"not tried yet":                {tiers: [][]ep{{{name: "a", since: at, fails: 1}}, {{name: "b", since: at, active: 5}}}},
		"not answered once":            {tiers: [][]ep{{{name: "a", since: at, silence: 1}}, {{name: "b", since: at, active: 5}}}, want: []string{"b"}},
		"silent":                       {tiers: [][]ep{{{name: "a", since: at, silence: 3}}, {{name: "b", since: at, active: 5}}}},
		"down":                         {tiers: [][]ep{{{name: "a"}}, {{name: "b", since: at, active: 5}}}},
		"full":                         {tiers: [][]ep{{{name: "a", since: at}}, {{name: "b", since: at, active: 5}}}, limit: 7},
		"to the second of four": {
			tiers: [][]ep{{{name: "a"}}, {{name: "b", since: at, active: 1}}, {{name: "c", since: at, active: 1}, {name: "d", active: 1}, {name: "e", since: at}}, {{name: "f", active: 1}}},
			want:  []string{"c", "d", "f"},
		},
		"nothing is known to be healthy": {tiers: [][]ep{{{name: "a"}}, {{name: "b"}}, {{name: "c"}}, {{name: "d", since: at, active: 1}}, {{name: "e", active: 1}}}},
		"one that is in two tiers":       {tiers: [][]ep{{{name: "a", since: at, active: 5}}, {{name: "a", since: at, active: 5}}}},
	} {
		own.active.Store(7)
		eps := map[string]*endpoint{}
		pl := &plan{}
		for i, members := range tc.tiers {
			tr := tier{owner: own, unknown: i > 2}
			if i == 0 {
				tr.limit = tc.limit
			}
			if i > 1 {
				tr.owner = spare
			}
			for _, m := range members {
				e := eps[m.name]
				if e == nil {
					e = &endpoint{key: m.name, fixed: []netip.AddrPort{netip.MustParseAddrPort("127.0.0.1:1")}}
					eps[m.name] = e
				}
				e.usableSince.Store(m.since)
				e.failures.Store(m.fails)
				e.silences.Store(m.silence)
				e.active.Store(m.active)
				tr.members = append(tr.members, member{ep: e})
			}
			pl.tiers = append(pl.tiers, tr)
		}
		var got []string
		pl.misplaced(now, stable, func(ep *endpoint, before int64) {
			got = append(got, ep.key)
			if before != at {
				t.Errorf("%s: those of %s before %d, want %d", name, ep.key, before, at)
			}
		})
		if d := cmp.Diff(tc.want, got); d != "" {
			t.Errorf("%s (-want +got):\n%s", name, d)
		}
	}
}

// movedEngine is an engine without sockets, whose connections are entries in a list.
type movedEngine struct {
	engine
	f      *Forwarder
	mu     sync.Mutex // guards what follows
	conns  []handle
	closed []handle
	times  []time.Duration // of the closes, since the epoch
	why    closeReason
	looks  int
}

func (e *movedEngine) listen(l *listener) (string, error) { return l.address, nil }

func (e *movedEngine) oldest(limit int, want func(handle) bool) []handle {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.looks++
	var hs []handle
	for _, h := range e.conns {
		if want(h) {
			hs = append(hs, h)
		}
	}
	return firstOf(hs, limit)
}

func (e *movedEngine) closeThese(hs []handle, why closeReason) (n int) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.why = why
	for _, h := range hs {
		i := slices.Index(e.conns, h)
		if i < 0 {
			continue
		}
		e.conns = slices.Delete(e.conns, i, i+1)
		e.closed = append(e.closed, h)
		e.times = append(e.times, time.Since(e.f.epoch))
		h.ep.active.Add(-1)
		n++
	}
	return n
}

// bed is a forwarder on a movedEngine.
type bed struct {
	t   *testing.T
	f   *Forwarder
	eng *movedEngine
	reg *registry
	log *bytes.Buffer
	ids uint32
}

// inBed runs a test in virtual time. The log may be read once all goroutines wait.
func inBed(t *testing.T, test func(b *bed)) {
	synctest.Test(t, func(t *testing.T) {
		b := &bed{t: t, log: &bytes.Buffer{}}
		b.f = New(Config{Logger: hclog.New(&hclog.LoggerOptions{Output: b.log, Level: hclog.Info})})
		b.f.started.Store(true)
		b.eng = &movedEngine{f: b.f}
		ctx, cancel := context.WithCancel(t.Context())
		c := &control{
			f: b.f, eng: b.eng, listeners: map[string]*listener{},
			reg: registry{clusters: map[string]*cluster{}, dns: newResolver(ctx, b.f.cfg.Lookup, time.Hour, b.f.log)},
		}
		b.reg = &c.reg
		var wg sync.WaitGroup
		wg.Go(func() { newMover(b.f).run(ctx) })
		wg.Go(func() { c.run(ctx); close(b.f.ended) })
		test(b)
		cancel()
		wg.Wait()
	})
}

func (b *bed) apply(table *gateway.Table) {
	table.Index = b.f.Status().Applied + 1
	b.f.Apply(table)
	synctest.Wait()
	if got := b.f.Status().Applied; got != table.Index {
		b.t.Fatalf("table %d is in use, want %d", got, table.Index)
	}
}

func (b *bed) endpoint(cluster, key string) (*cluster, *endpoint) {
	for _, c := range b.f.view.Load().clusters {
		if c.name == cluster {
			for _, ep := range c.plan.Load().endpoints {
				if ep.key == key {
					return c, ep
				}
			}
		}
	}
	b.t.Fatalf("there is no %s in %s", key, cluster)
	return nil, nil
}

// open adds connections that were routed to via and are with an endpoint.
func (b *bed) open(n int, via, owner, key string) {
	c, _ := b.endpoint(via, b.f.view.Load().first(via))
	_, ep := b.endpoint(owner, key)
	b.eng.mu.Lock()
	defer b.eng.mu.Unlock()
	for range n {
		b.ids++
		b.eng.conns = append(b.eng.conns, handle{born: b.f.now(), id: b.ids, via: c.number, ep: ep})
		ep.active.Add(1)
	}
}

func (v *view) first(name string) string {
	for _, c := range v.clusters {
		if c.name == name {
			return c.plan.Load().endpoints[0].key
		}
	}
	return ""
}

// closed returns the connections that were closed since it was last asked, by ID.
func (b *bed) closed() (ids []uint32, at []time.Duration) {
	synctest.Wait()
	b.eng.mu.Lock()
	defer b.eng.mu.Unlock()
	for _, h := range b.eng.closed {
		ids = append(ids, h.id)
	}
	at = b.eng.times
	b.eng.closed, b.eng.times = nil, nil
	return ids, at
}

func (b *bed) logged(line string) {
	b.t.Helper()
	synctest.Wait()
	if !strings.Contains(b.log.String(), line) {
		b.t.Errorf("the log lacks %q:\n%s", line, b.log)
	}
}

func ids(from, to uint32) (out []uint32) {
	for ; from <= to; from++ {
		out = append(out, from)
	}
	return out
}

func failbackTable() *gateway.Table {
	main, spare := clusterOf("main", "10.0.0.1:1"), clusterOf("spare", "10.0.0.2:1")
	main.Failover = []string{"spare"}
	tab := table([]gateway.Cluster{main, spare})
	tab.Failback = &gateway.Failback{Stable: 30 * time.Second, Rate: 2}
	return tab
}

func TestFailbackInTime(t *testing.T) {
	inBed(t, func(b *bed) {
		b.apply(failbackTable())
		_, better := b.endpoint("main", "10.0.0.1:1")
		better.failures.Store(5)
		b.open(3, "spare", "spare", "10.0.0.2:1") // their place
		time.Sleep(time.Minute)
		b.open(20, "main", "spare", "10.0.0.2:1")
		time.Sleep(time.Hour)
		if got, _ := b.closed(); got != nil {
			t.Errorf("closed while the better one is down: %v", got)
		}
		// It is back for less than is asked for, and then is down again.
		better.failures.Store(0)
		time.Sleep(29 * time.Second)
		better.failures.Store(1)
		time.Sleep(2 * time.Second)
		better.failures.Store(0)
		back := b.f.now()
		time.Sleep(5 * time.Second)
		b.open(5, "main", "spare", "10.0.0.2:1") // for another reason
		if got, _ := b.closed(); got != nil {
			t.Errorf("closed when the better one was not back for long: %v", got)
		}
		time.Sleep(30 * time.Second)
		got, at := b.closed()
		if len(got) < 6 || len(got) > 18 {
			t.Errorf("%d were closed after 5 s, want about 10", len(got))
		}
		if at[0] < time.Duration(back)+30*time.Second {
			t.Errorf("the first was closed after %s", at[0]-time.Duration(back))
		}
		b.logged("failback begins: connections=20 clusters=1 rate=2")
		// It goes down while they move.
		better.failures.Store(1)
		time.Sleep(time.Minute)
		if more, _ := b.closed(); len(more) > 0 {
			t.Errorf("closed while the better one is down again: %v", more)
		}
		b.logged(fmt.Sprintf("failback ended: closed=%d left=%d", len(got), 20-len(got)))
		better.failures.Store(0)
		time.Sleep(time.Minute)
		more, at := b.closed()
		if d := cmp.Diff(ids(4, 28), append(got, more...)); d != "" {
			t.Errorf("closed, the oldest first (-want +got):\n%s", d)
		}
		gaps := map[time.Duration]bool{}
		for i := range at[1:] {
			gap := at[i+1] - at[i]
			gaps[gap] = true
			if gap < 250*time.Millisecond || gap > 750*time.Millisecond {
				t.Errorf("%s between two", gap)
			}
		}
		if len(gaps) < 5 {
			t.Errorf("the gaps have no jitter: %v", gaps)
		}
		if b.eng.why != closeFailback {
			t.Errorf("closed as %q", closeNames[b.eng.why])
		}
		// What stays is looked for once, and not every second.
		b.open(1, "main", "spare", "10.0.0.2:1")
		time.Sleep(time.Minute)
		looks := b.eng.looks
		time.Sleep(time.Hour)
		if b.eng.looks != looks {
			t.Errorf("looked through all connections %d times in vain", b.eng.looks-looks)
		}
		if got, _ := b.closed(); got != nil {
			t.Errorf("closed one that came while the better one was usable: %v", got)
		}
	})
}

// An endpoint that a check called critical has been usable for no time when the
// check passes.
func TestFailbackByHealth(t *testing.T) {
	inBed(t, func(b *bed) {
		tab := failbackTable()
		tab.Failback.Rate = 0
		b.apply(tab)
		time.Sleep(time.Hour)
		down := *tab
		down.Clusters = slices.Clone(tab.Clusters)
		down.Clusters[0].Endpoints = slices.Clone(tab.Clusters[0].Endpoints)
		down.Clusters[0].Endpoints[0].Healthy, down.Clusters[0].Endpoints[0].Why = false, "critical"
		b.apply(&down)
		b.open(10, "main", "spare", "10.0.0.2:1")
		time.Sleep(time.Minute)
		up := *tab
		b.apply(&up)
		time.Sleep(29 * time.Second)
		if got, _ := b.closed(); got != nil {
			t.Errorf("closed too early: %v", got)
		}
		time.Sleep(3 * time.Second)
		if got, _ := b.closed(); len(got) != 10 {
			t.Errorf("closed: %v, want all", got)
		}
	})
}

func TestFailbackIsOff(t *testing.T) {
	inBed(t, func(b *bed) {
		tab := failbackTable()
		tab.Failback = nil
		b.apply(tab)
		b.open(10, "main", "spare", "10.0.0.2:1")
		time.Sleep(time.Hour)
		if got, _ := b.closed(); got != nil || b.eng.looks > 0 {
			t.Errorf("closed without being asked to: %v", got)
		}
		// On, and off while they move.
		on := failbackTable()
		b.apply(on)
		time.Sleep(33 * time.Second)
		if got, _ := b.closed(); len(got) == 0 || len(got) == 10 {
			t.Errorf("closed: %v, want some", got)
		}
		off := *tab
		b.apply(&off)
		b.closed()
		time.Sleep(time.Hour)
		if got, _ := b.closed(); got != nil {
			t.Errorf("closed once it was switched off: %v", got)
		}
	})
}

// A drain has its own pace.
func TestFailbackRestsInADrain(t *testing.T) {
	inBed(t, func(b *bed) {
		b.apply(failbackTable())
		_, better := b.endpoint("main", "10.0.0.1:1")
		better.failures.Store(5)
		b.open(10, "main", "spare", "10.0.0.2:1")
		time.Sleep(time.Minute)
		b.f.do(func(c *control) { c.stopped = true })
		better.failures.Store(0)
		time.Sleep(time.Hour)
		if got, _ := b.closed(); got != nil {
			t.Errorf("closed while draining: %v", got)
		}
		b.f.do(func(c *control) { c.stopped = false })
		time.Sleep(time.Minute)
		if got, _ := b.closed(); len(got) != 10 {
			t.Errorf("closed: %v, want all", got)
		}
	})
}

func TestRebalanceInTime(t *testing.T) {
	inBed(t, func(b *bed) {
		tab := table([]gateway.Cluster{clusterOf("web", "10.0.0.1:1", "10.0.0.2:1")})
		tab.Rebalance = &gateway.Rebalance{Stable: 30 * time.Second, Rate: 2, Factor: 1.25, MinConnections: 10}
		b.apply(tab)
		_, second := b.endpoint("web", "10.0.0.2:1")
		second.failures.Store(3)
		b.open(100, "web", "web", "10.0.0.1:1")
		time.Sleep(time.Hour)
		if got, _ := b.closed(); got != nil {
			t.Errorf("closed while there is only one endpoint: %v", got)
		}
		second.failures.Store(0)
		b.open(10, "web", "web", "10.0.0.1:1")
		time.Sleep(30 * time.Second)
		if got, _ := b.closed(); got != nil {
			t.Errorf("closed while the second is not usable for long: %v", got)
		}
		// Their clients do not come back, and yet no more than the excess is closed.
		time.Sleep(time.Hour)
		got, at := b.closed()
		if d := cmp.Diff(ids(1, 42), got); d != "" { // 110 - 1.25*55
			t.Errorf("closed (-want +got):\n%s", d)
		}
		if took := at[len(at)-1] - at[0]; took < 15*time.Second || took > 27*time.Second {
			t.Errorf("it took %s for 42 at 2 a second", took)
		}
		if b.eng.why != closeRebalance {
			t.Errorf("closed as %q", closeNames[b.eng.why])
		}
		b.logged("rebalance begins: connections=42 clusters=1 rate=2")
		b.logged("rebalance ended: closed=42")
		// Those that came since chose between both.
		b.open(200, "web", "web", "10.0.0.2:1")
		time.Sleep(time.Hour)
		if got, _ := b.closed(); got != nil {
			t.Errorf("closed though no endpoint was added: %v", got)
		}
		// Weights count.
		heavy := *tab
		heavy.Clusters = []gateway.Cluster{clusterOf("web", "10.0.0.1:1", "10.0.0.2:1")}
		heavy.Clusters[0].Endpoints[0].Weight = 3
		b.apply(&heavy)
		time.Sleep(time.Hour)
		if got, _ := b.closed(); len(got) != 200-83 || got[0] != 111 { // 1.25 * 268/4
			t.Errorf("%d were closed, from %v, want 117", len(got), got[0])
		}
		// Few are left alone.
		few := heavy
		few.Rebalance = &gateway.Rebalance{Stable: time.Second, Factor: 1, MinConnections: 1000}
		few.Clusters = tab.Clusters
		b.apply(&few)
		time.Sleep(time.Hour)
		if got, _ := b.closed(); got != nil {
			t.Errorf("closed of few: %v", got)
		}
	})
}

// Connections come back to the better endpoint, those that others have at the worse
// one by themselves stay there.
func TestFailback(t *testing.T) {
	hello, direct := helloFor(t, "web.example"), helloFor(t, "spare.example")
	onEngines(t, func(t *testing.T, engine string) {
		for _, kind := range []string{"failover", "priority", "zone"} {
			t.Run(kind, func(t *testing.T) {
				better := closedPort(t)
				worse := serve(t, func(c *net.TCPConn) {
					b := make([]byte, 64<<10)
					if _, err := c.Read(b); err == nil { // of one hello or the other
						c.Write([]byte("W"))
						echo(c)
					}
				})
				spare := clusterOf("spare", worse.addr)
				web := clusterOf("web", better)
				tab := table(nil, "web.example", "web", "spare.example", "spare")
				switch kind {
				case "failover":
					web.Failover = []string{"spare"}
				case "priority":
					web = clusterOf("web", better, worse.addr)
					web.Endpoints[1].Priority = 1
				case "zone":
					tab.Zone = "eu/a"
					web = clusterOf("web", better, worse.addr)
					web.Endpoints[0].Zone, web.Endpoints[1].Zone = "eu/a", "eu/b"
				}
				web.Probe = &gateway.Probe{Interval: 5 * time.Millisecond}
				tab.Clusters = []gateway.Cluster{web, spare}
				tab.Failback = &gateway.Failback{Stable: 50 * time.Millisecond, Rate: 100}
				f := start(t, Config{Engine: engine}, tab)
				own := f.dial(direct)
				expectTag(t, own, "W")
				var away []net.Conn
				for range 10 {
					c := f.dial(hello)
					expectTag(t, c, "W")
					away = append(away, c)
				}
				for _, c := range away {
					alive(t, c)
				}
				serveOn(t, better, func(c *net.TCPConn) {
					if expect(c, hello) == nil {
						c.Write([]byte("B"))
						echo(c)
					}
				})
				for _, c := range away {
					ends(t, c)
				}
				c := f.dial(hello)
				expectTag(t, c, "B")
				alive(t, c)
				alive(t, own)
				f.untilCounted(func(s gateway.Status) bool { return s.Listeners[0].Active == 2 })
				if d := cmp.Diff(map[string]uint64{gateway.CloseFailback: 10}, f.Status().Listeners[0].Closed); d != "" {
					t.Errorf("closed (-want +got):\n%s", d)
				}
			})
		}
	})
}

func TestRebalance(t *testing.T) {
	hello := helloFor(t, "web.example")
	onEngines(t, func(t *testing.T, engine string) {
		a, b := greeter(t, hello, "A", echo), greeter(t, hello, "B", echo)
		tab := table([]gateway.Cluster{clusterOf("web", a.addr)}, "web.example", "web")
		tab.Rebalance = &gateway.Rebalance{Stable: 50 * time.Millisecond, Rate: 100, Factor: 1.25}
		f := start(t, Config{Engine: engine}, tab)
		var conns []net.Conn
		for range 12 {
			c := f.dial(hello)
			expectTag(t, c, "A")
			conns = append(conns, c)
			// Ages are known by the tick: the next is to be in another.
			for at, t := f.now(), time.NewTicker(time.Millisecond); f.now()-at < 20e6; <-t.C {
			}
		}
		tab.Clusters = []gateway.Cluster{clusterOf("web", a.addr, b.addr)}
		f.apply(tab)
		for _, c := range conns[:5] { // 12 - 1.25*6
			ends(t, c)
			expectTag(t, f.dial(hello), "B")
		}
		for _, c := range conns[5:] {
			alive(t, c)
		}
		f.untilCounted(func(s gateway.Status) bool { return s.Listeners[0].Active == 12 })
		if d := cmp.Diff(map[string]uint64{gateway.CloseRebalance: 5}, f.Status().Listeners[0].Closed); d != "" {
			t.Errorf("closed (-want +got):\n%s", d)
		}
	})
}

// With failback, what failed is probed without being asked for.
func TestFailbackProbes(t *testing.T) {
	tab := failbackTable()
	alone := clusterOf("alone", "10.0.0.3:1")
	tab.Clusters = append(tab.Clusters, alone)
	check := func(want string) {
		t.Helper()
		f := start(t, Config{}, tab)
		var got []string
		for _, c := range f.view.Load().probed {
			got = append(got, c.name)
		}
		if fmt.Sprint(got) != want {
			t.Errorf("probed: %v, want %s", got, want)
		}
	}
	check("[main spare]")
	tab.Failback = nil
	check("[]")
}
