package main

import (
	"bytes"
	"context"
	"flag"
	"fmt"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/sluicemesh/sluice/gateway"
	"github.com/sluicemesh/sluice/gateway/sni"
)

var engines = []string{sni.EngineEpoll, sni.EngineNetpoll}

// testDeadline is for a hello, of the forwarder under test.
const testDeadline = 500 * time.Millisecond

// forwarding is a forwarder in this process, of the benchmark's routes.
type forwarding struct {
	*running
	backend netip.AddrPort
	before  resources
}

// resources are what a forwarder that ends has to give back, and what must not
// grow while it works.
type resources struct{ goroutines, files int }

func resourcesNow() resources {
	return resources{runtime.NumGoroutine(), memoryOf([]int{os.Getpid()}).files}
}

// within tells whether nothing is left over, apart from what is pooled.
func (r resources) within(before resources, pooled int) bool {
	return r.goroutines <= before.goroutines && r.files <= before.files+pooled
}

func newForwarding(t *testing.T, engine string) *forwarding {
	t.Helper()
	backend, stopBackend, err := runBackendHere(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(stopBackend)
	set, err := sni.ParseRoutes(bytes.NewReader(routesFile(newRoutes(64, []netip.AddrPort{backend}, backend))))
	if err != nil {
		t.Fatal(err)
	}
	r, err := runForwarder(t.Context(), sni.Config{Engine: engine, Workers: 2, HelloTimeout: testDeadline}, sni.StaticTable([]string{"127.0.0.1:0"}, set))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := r.stop(); err != nil {
			t.Error(err)
		}
	})
	f := &forwarding{running: r, backend: backend}
	// A connection makes what is made once.
	f.good(t)
	f.quiet(t, func() bool { return f.fw.Status().Listeners[0].Active == 0 })
	f.before = resourcesNow()
	return f
}

// good makes connections that must be served.
func (f *forwarding) good(t *testing.T) {
	t.Helper()
	k, err := newChecker(f.addr, nil)
	if err != nil {
		t.Fatal(err)
	}
	for i := range 4 {
		c, err := k.open(t.Context(), i)
		if err != nil {
			t.Fatalf("a good connection: %v", err)
		}
		c.Close()
	}
}

// quiet waits for a state, until 5 s have gone.
func (f *forwarding) quiet(t *testing.T, ok func() bool) bool {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	for !ok() {
		if ctx.Err() != nil {
			return false
		}
		settle(ctx, 5*time.Millisecond)
	}
	return true
}

// unchanged fails the test unless the forwarder has given everything back and
// still serves.
func (f *forwarding) unchanged(t *testing.T) {
	t.Helper()
	f.good(t)
	const pooled = 16 // pipes, and what the runtime opens for itself
	if !f.quiet(t, func() bool {
		return f.fw.Status().Listeners[0].Active == 0 && resourcesNow().within(f.before, pooled)
	}) {
		t.Errorf("before %+v, now %+v, %d connections", f.before, resourcesNow(), f.fw.Status().Listeners[0].Active)
	}
}

// paced makes a paced load of the forwarder.
func (f *forwarding) paced(t *testing.T, args ...string) *paced {
	t.Helper()
	fs := flag.NewFlagSet(t.Name(), flag.ContinueOnError)
	p := newPaced(fs, time.Second)
	_, cancel, err := p.prepare(t.Context(), fs, append([]string{"-target", f.addr, "-quiet", "100ms", "-rate", "200", "-pairs", "1"}, args...))
	if err != nil {
		t.Fatal(err)
	}
	p.rest = 10 * time.Millisecond
	t.Cleanup(cancel)
	t.Cleanup(p.poll.close)
	return p
}

func TestChurn(t *testing.T) {
	for _, engine := range engines {
		t.Run(engine, func(t *testing.T) {
			f := newForwarding(t, engine)
			index := f.fw.Status().Applied
			replace := func(routes []byte) error {
				set, err := sni.ParseRoutes(bytes.NewReader(routes))
				if err != nil {
					return err
				}
				next := sni.StaticTable([]string{"127.0.0.1:0"}, set)
				index++
				next.Index = index
				f.fw.Apply(next)
				return nil
			}
			c, err := newChurn(f.addr, 9999, 150*time.Millisecond, []netip.AddrPort{f.backend}, replace)
			if err != nil {
				t.Fatal(err)
			}
			p := f.paced(t, "-disturbed", "700ms")
			if err := p.churn(t.Context(), c); err != nil {
				t.Fatal(err)
			}
			if p.out.Failed > 0 {
				t.Errorf("%d connections failed: %v", p.out.Failed, p.out.Problems)
			}
			if n := len(c.took); n < 2 {
				t.Errorf("%d tables", n)
			}
			if got := f.fw.Status().Listeners[0].Refused; got["no-route"] == 0 {
				t.Errorf("old names were not refused: %v", got)
			}
			// The table has other names now than good connections ask for.
			if err := replace(routesFile(newRoutes(64, []netip.AddrPort{f.backend}, f.backend))); err != nil {
				t.Fatal(err)
			}
			f.quiet(t, func() bool { return f.fw.Status().Applied == index })
			f.unchanged(t)
		})
	}
}

func TestIdle(t *testing.T) {
	for _, engine := range engines {
		t.Run(engine, func(t *testing.T) {
			f := newForwarding(t, engine)
			k, err := newChecker(f.addr, nil)
			if err != nil {
				t.Fatal(err)
			}
			const n = 100
			for i := range n {
				c, err := k.open(t.Context(), i)
				if err != nil {
					t.Fatal(err)
				}
				defer c.Close()
			}
			now := resourcesNow()
			// The client and the backend are in this process, too.
			files := float64(now.files-f.before.files)/n - 2
			t.Logf("%v descriptors, %v goroutines per connection", files, float64(now.goroutines-f.before.goroutines)/n)
			if engine == sni.EngineEpoll && (files > 2.1 || now.goroutines > f.before.goroutines) {
				t.Errorf("%v descriptors per connection, %d goroutines more", files, now.goroutines-f.before.goroutines)
			}
			if st := f.fw.Status(); st.Listeners[0].Active != n {
				t.Errorf("%d connections are open, want %d", st.Listeners[0].Active, n)
			}
		})
	}
}

func TestFlood(t *testing.T) {
	for _, engine := range engines {
		t.Run(engine, func(t *testing.T) {
			f := newForwarding(t, engine)
			p := f.paced(t, "-disturbed", "1100ms")
			fl, err := newFlood(p.load, 200, testDeadline)
			if err != nil {
				t.Fatal(err)
			}
			defer fl.poll.close()
			if err := p.flood(t.Context(), fl); err != nil {
				t.Fatal(err)
			}
			if p.out.Failed > 0 {
				t.Errorf("%d failed: %v", p.out.Failed, p.out.Problems)
			}
			if len(fl.shed) < 40 || fl.early > 0 {
				t.Errorf("%d half hellos were shed, %d before their time", len(fl.shed), fl.early)
			}
			if got := f.fw.Status().Listeners[0].Refused["hello-timeout"]; got < uint64(len(fl.shed)) {
				t.Errorf("%d hello timeouts are counted, %d were seen", got, len(fl.shed))
			}
			f.unchanged(t)
		})
	}
}

func TestDrain(t *testing.T) {
	for _, engine := range engines {
		t.Run(engine, func(t *testing.T) {
			first, second := newForwarding(t, engine), newForwarding(t, engine)
			k, err := newChecker(first.addr, nil)
			if err != nil {
				t.Fatal(err)
			}
			ctx, cancel := context.WithCancel(t.Context())
			var phase atomic.Pointer[gateway.DrainPhase]
			var wg sync.WaitGroup
			defer wg.Wait()
			defer cancel()
			d := &draining{
				list: []string{first.addr, second.addr}, hellos: k.hellos, flows: 20, rate: 100,
				quiet: 100 * time.Millisecond, timeout: 1200 * time.Millisecond,
			}
			d.begin = func() error {
				wg.Go(func() {
					if err := first.fw.Drain(ctx, gateway.Plan{Timeout: d.timeout, Rate: 1000}, func(p gateway.Progress) { phase.Store(&p.Phase) }); err != nil {
						t.Error(err)
					}
				})
				return nil
			}
			d.ended = func() bool { p := phase.Load(); return p != nil && *p == gateway.DrainDrained }
			if err := d.run(t.Context()); err != nil {
				t.Fatal(err)
			}
			d.tell()
			if d.out.Failed > 0 {
				t.Errorf("%d failed: %v", d.out.Failed, d.out.Problems)
			}
			if d.moved == 0 || len(d.calm) == 0 || d.held != 4 {
				t.Errorf("%d calls before, %d by the other forwarder, %d flows ended", len(d.calm), d.moved, d.held)
			}
		})
	}
}

// TestDrainIsSeenToFail breaks flows before their time, and leaves calls nowhere to
// go.
func TestDrainIsSeenToFail(t *testing.T) {
	backend, stopBackend, err := runBackendHere(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer stopBackend()
	set, err := sni.ParseRoutes(bytes.NewReader(routesFile(newRoutes(64, []netip.AddrPort{backend}, backend))))
	if err != nil {
		t.Fatal(err)
	}
	r, err := runForwarder(t.Context(), sni.Config{}, sni.StaticTable([]string{"127.0.0.1:0"}, set))
	if err != nil {
		t.Fatal(err)
	}
	k, err := newChecker(r.addr, nil)
	if err != nil {
		t.Fatal(err)
	}
	d := &draining{
		list: []string{r.addr, r.addr}, hellos: k.hellos, flows: 20, rate: 100,
		quiet: 100 * time.Millisecond, timeout: time.Second,
		begin: r.stop, ended: func() bool { return true },
	}
	if err := d.run(t.Context()); err != nil {
		t.Fatal(err)
	}
	d.tell()
	// Some calls were under way when it ended.
	if calls := d.out.Failed - d.flows; calls < 20 || len(d.during) > calls/2 {
		t.Errorf("%d failed, and %d calls did not: %v", d.out.Failed, len(d.during), d.out.Problems)
	}
}

func TestFaults(t *testing.T) {
	for _, engine := range engines {
		for _, c := range faultCases {
			t.Run(fmt.Sprintf("%s/%s", engine, c.name), func(t *testing.T) {
				t.Parallel() // they mostly wait
				f, stop, err := newFaults(t.Context(), engine)
				if err != nil {
					t.Fatal(err)
				}
				if err := c.run(f, t.Context()); err != nil {
					t.Error(err)
				}
				if err := stop(); err != nil {
					t.Error(err)
				}
			})
		}
	}
}

func TestTorture(t *testing.T) {
	for _, engine := range engines {
		t.Run(engine, func(t *testing.T) {
			f := newForwarding(t, engine)
			k, err := newChecker(f.addr, nil)
			if err != nil {
				t.Fatal(err)
			}
			tt := &torture{checker: k, deadline: testDeadline, seed: 1}
			tt.run(t.Context(), 1500*time.Millisecond, 24)
			if tt.out.Failed > 0 {
				t.Errorf("%d failed: %v", tt.out.Failed, tt.out.Problems)
			}
			for _, kind := range torments {
				if tt.done[kind.name] == 0 {
					t.Errorf("nothing was made of %q", kind.name)
				}
			}
			f.unchanged(t)
		})
	}
}

// TestTormentsAreAsTold sends the kinds of hello whose outcome is certain straight
// to the backend, which takes every name: those that must be answered are hellos.
func TestTormentsAreAsTold(t *testing.T) {
	backend, stop, err := runBackendHere(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer stop()
	k, err := newChecker(backend.String(), nil)
	if err != nil {
		t.Fatal(err)
	}
	tt := &torture{checker: k, deadline: testDeadline, seed: 1}
	good := []string{"a byte at a time", "many records", "records and segments", "as large as may be", "slow"}
	for i, kind := range torments {
		if !slices.Contains(good, kind.name) {
			continue
		}
		if err := tt.one(t.Context(), kind, uint64(i)); err != nil {
			t.Errorf("%s: %v", kind.name, err)
		}
	}
	big := padHello(k.hellos[0], 60000)
	if n := len(big) - 5; n != 60000 {
		t.Errorf("a hello of %d bytes, want 60000", n)
	}
}

func TestGrowth(t *testing.T) {
	rss := func(sizes ...int64) (out []memory) {
		for _, n := range sizes {
			out = append(out, memory{rss: n})
		}
		return out
	}
	for name, tc := range map[string]struct {
		seen []memory
		want int64
	}{
		"warms up, and stays":   {rss(1, 4, 8, 9, 8, 9), 0},
		"comes and goes":        {rss(5, 9, 9, 5, 9, 5, 9, 5, 9), 0},
		"more with every table": {rss(1, 2, 3, 4, 5, 6), 2},
	} {
		before, after := growth(tc.seen)
		if got := after.rss - before.rss; got != tc.want {
			t.Errorf("%s: %d, want %d", name, got, tc.want)
		}
	}
}
