package gateway_test

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/hashicorp/consul/api"
	"github.com/hashicorp/go-memdb"

	"github.com/sluicemesh/sluice/agent/catalog"
	"github.com/sluicemesh/sluice/gateway"
	"github.com/sluicemesh/sluice/proxycfg"
	"github.com/sluicemesh/sluice/proxycfg/proxycfgtest"
)

// feed is what a manager would publish.
type feed struct {
	mu      sync.Mutex
	states  map[string]*proxycfg.State
	changed chan struct{}
}

func newFeed() *feed {
	return &feed{states: map[string]*proxycfg.State{}, changed: make(chan struct{})}
}

func (f *feed) latest(ws memdb.WatchSet) map[string]*proxycfg.State {
	f.mu.Lock()
	defer f.mu.Unlock()
	ws.Add(f.changed)
	return f.states
}

func (f *feed) set(id string, s *proxycfg.State) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.states = maps.Clone(f.states)
	if f.states[id] = s; s == nil {
		delete(f.states, id)
	}
	close(f.changed)
	f.changed = make(chan struct{})
}

// fakePlane remembers what it is given, and ends when it is told to.
type fakePlane struct {
	name string
	fail chan error

	mu      sync.Mutex
	tables  []*gateway.Table
	running bool
}

func (p *fakePlane) Apply(t *gateway.Table) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.tables = append(p.tables, t)
}

func (p *fakePlane) Run(ctx context.Context) error {
	p.setRunning(true)
	defer p.setRunning(false)
	select {
	case <-ctx.Done():
		return nil
	case err := <-p.fail:
		return err
	}
}

func (p *fakePlane) setRunning(b bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.running = b
}

func (p *fakePlane) Status() gateway.Status { return gateway.Status{} }

func (p *fakePlane) last() *gateway.Table {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.tables) == 0 {
		return nil
	}
	return p.tables[len(p.tables)-1]
}

func (p *fakePlane) applied() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.tables)
}

func (p *fakePlane) alive() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.running
}

// bench is a runner with fakes around it.
type bench struct {
	t      *testing.T
	feed   *feed
	runner *gateway.Runner
	stop   func()

	mu     sync.Mutex
	planes []*fakePlane
	refuse error // of the factory
	// wrap may make more of a data plane.
	wrap func(*fakePlane) gateway.DataPlane
}

// newBench starts a runner in the bubble. The feed may be filled before.
func newBench(t *testing.T, dir string, f *feed) *bench {
	t.Helper()
	b := &bench{t: t, feed: f}
	var err error
	b.runner, err = gateway.NewRunner(gateway.RunnerConfig{
		Latest: f.latest, KeepDir: dir,
		Factory: func(kind catalog.Kind, id string, conf map[string]any) (gateway.DataPlane, error) {
			b.mu.Lock()
			defer b.mu.Unlock()
			if b.refuse != nil {
				return nil, b.refuse
			}
			p := &fakePlane{name: fmt.Sprint(conf["data_plane"]), fail: make(chan error, 1)}
			b.planes = append(b.planes, p)
			if b.wrap != nil {
				return b.wrap(p), nil
			}
			return p, nil
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- b.runner.Run(ctx) }()
	b.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	synctest.Wait()
	return b
}

func (b *bench) plane(i int) *fakePlane {
	b.t.Helper()
	b.mu.Lock()
	defer b.mu.Unlock()
	if i >= len(b.planes) {
		b.t.Fatalf("there are %d data planes, not %d", len(b.planes), i+1)
	}
	return b.planes[i]
}

func (b *bench) made() int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return len(b.planes)
}

func (b *bench) status() gateway.ProxyStatus {
	b.t.Helper()
	s := b.runner.Status()
	if len(s) != 1 {
		b.t.Fatalf("%d proxies", len(s))
	}
	return s[0]
}

func (b *bench) set(id string, s *proxycfg.State) {
	b.feed.set(id, s)
	synctest.Wait()
}

// current is a state with the snapshot of a case; index and age may be set.
func current(t *testing.T, name string, index uint64, edit func(c *proxycfgtest.Case)) *proxycfg.State {
	t.Helper()
	_, c := parse(t, filepath.Join("testdata/compile", name+".txtar"))
	if edit != nil {
		edit(c)
	}
	s := build(t, c)
	s.Index = index
	return &proxycfg.State{Proxy: c.Proxy, Snapshot: s, Phase: proxycfg.PhaseCurrent, Index: index, AsOf: s.AsOf}
}

// unknown is the state of the same proxy before there is a snapshot.
func unknown(s *proxycfg.State) *proxycfg.State {
	return &proxycfg.State{Proxy: s.Proxy, Phase: proxycfg.PhasePending, Err: proxycfg.ErrPending}
}

func TestRunnerServes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t, "", newFeed())
		defer b.stop()
		s := current(t, "gateway", 100, nil)
		b.set("gw1", unknown(s))
		if st := b.status(); st.State != gateway.PhasePending || b.made() != 0 {
			t.Fatalf("%d data planes, status %+v", b.made(), st)
		}
		b.set("gw1", s)
		p := b.plane(0)
		if !p.alive() || p.name != "builtin" || p.last().Index != 100 {
			t.Fatalf("plane %+v", p)
		}
		if st := b.status(); st.State != gateway.PhaseServing || st.TableIndex != 100 || st.Stale {
			t.Errorf("status %+v", st)
		}
		// The same with another age is not applied again, and the age is told.
		same := *s.Snapshot
		same.AsOf = s.AsOf.Add(time.Minute)
		n := p.applied()
		b.set("gw1", &proxycfg.State{Proxy: s.Proxy, Snapshot: &same, Phase: proxycfg.PhaseCurrent})
		if p.applied() != n {
			t.Error("a table was applied again for its age")
		}
		if st := b.status(); !st.TableAsOf.Equal(same.AsOf) {
			t.Errorf("as of %s", st.TableAsOf)
		}
		// A failure keeps the table.
		b.set("gw1", &proxycfg.State{Proxy: s.Proxy, Snapshot: &same, Phase: proxycfg.PhaseDenied, Err: proxycfg.ErrDenied})
		if st := b.status(); st.State != gateway.PhaseStale || !strings.Contains(st.Reason, "permission denied") || p.last().Index != 100 || !p.alive() {
			t.Errorf("status %+v", st)
		}
	})
}

// TestRunnerLastKnownGood restarts a runner in the dark: the sidecar of the
// earlier run serves, key and all, until there is something newer.
func TestRunnerLastKnownGood(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		s := current(t, "sidecar", 100, nil)
		f := newFeed()
		b := newBench(t, dir, f)
		b.set("web-p", s)
		b.stop()

		f = newFeed()
		f.set("web-p", unknown(s))
		b = newBench(t, dir, f)
		defer b.stop()
		p := b.plane(0)
		if tbl := p.last(); tbl.Index != 100 || tbl.Identity.PrivateKeyPEM.Reveal() != proxycfgtest.Key {
			t.Fatalf("kept table %+v", tbl)
		}
		st := b.status()
		if st.State != gateway.PhaseStale || !st.FromDisk || !st.Stale || st.Age <= 0 && time.Now().After(st.TableAsOf) {
			t.Errorf("status %+v", st)
		}
		if len(st.Upstreams) != 5 {
			t.Errorf("upstreams %+v", st.Upstreams)
		}
		next := current(t, "sidecar", 101, nil)
		b.set("web-p", next)
		if b.made() != 1 || p.last().Index != 101 {
			t.Errorf("%d data planes, table %d", b.made(), p.last().Index)
		}
		if st := b.status(); st.State != gateway.PhaseServing || st.FromDisk {
			t.Errorf("status %+v", st)
		}
	})
}

// TestRunnerCarriesPending: the first snapshot after a restart does not know one
// upstream yet; what the earlier run knew of it stays.
func TestRunnerCarriesPending(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t, dir, newFeed())
		known := current(t, "sidecar", 100, nil)
		b.set("web-p", known)
		b.stop()

		f := newFeed()
		f.set("web-p", current(t, "sidecar", 101, func(c *proxycfgtest.Case) {
			c.Source.Update(func(d *proxycfgtest.Data) {
				d.Faults["connect dc1 api"] = proxycfg.ErrPending
				d.Faults["entry service-resolver lost"] = proxycfg.ErrPending
			})
		}))
		b = newBench(t, dir, f)
		defer b.stop()
		tbl := b.plane(0).last()
		c := tbl.Cluster("api.default.dc1.internal." + proxycfgtest.TrustDomain)
		if tbl.Index != 101 || c == nil || !c.Pending || len(c.Endpoints) != 3 {
			t.Errorf("cluster %+v of table %d", c, tbl.Index)
		}
	})
}

func TestRunnerRestartsDataPlane(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t, "", newFeed())
		defer b.stop()
		b.set("gw1", current(t, "gateway", 1, nil))
		b.plane(0).fail <- errors.New("out of files")
		synctest.Wait()
		if st := b.status(); st.State != gateway.PhaseFailed || !strings.Contains(st.Reason, "out of files") {
			t.Errorf("status %+v", st)
		}
		b.set("gw1", current(t, "gateway", 2, nil))
		time.Sleep(time.Second)
		synctest.Wait()
		if p := b.plane(1); !p.alive() || p.last().Index != 2 {
			t.Errorf("plane %+v", p)
		}
		if st := b.status(); st.State != gateway.PhaseServing {
			t.Errorf("status %+v", st)
		}
		// One that always ends is not started all the time.
		b.mu.Lock()
		b.refuse = errors.New("no such plugin")
		b.mu.Unlock()
		b.plane(1).fail <- nil
		time.Sleep(time.Hour)
		synctest.Wait()
		if st := b.status(); st.State != gateway.PhaseFailed || !strings.Contains(st.Reason, "no such plugin") {
			t.Errorf("status %+v", st)
		}
		b.mu.Lock()
		b.refuse = nil
		b.mu.Unlock()
		time.Sleep(31 * time.Second)
		synctest.Wait()
		if p := b.plane(2); !p.alive() {
			t.Error("the data plane did not come back")
		}
	})
}

func TestRunnerChoosesDataPlane(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t, "", newFeed())
		defer b.stop()
		choose := func(name string, index uint64) *proxycfg.State {
			return current(t, "gateway", index, func(c *proxycfgtest.Case) {
				reg := *c.Proxy.Service
				reg.Proxy = &api.AgentServiceConnectProxyConfig{Config: map[string]any{"data_plane": name}}
				c.Proxy.Service = &reg
			})
		}
		b.set("gw1", choose("none", 1))
		if st := b.status(); b.made() != 0 || st.DataPlane != "none" || st.State != gateway.PhaseServing || b.runner.Table("gw1") == nil {
			t.Errorf("%d data planes, status %+v", b.made(), st)
		}
		b.set("gw1", choose("envoy", 2))
		if p := b.plane(0); p.name != "envoy" || !p.alive() || p.last().Index != 2 {
			t.Errorf("plane %+v", p)
		}
		b.set("gw1", choose("fancy", 3))
		if p := b.plane(1); b.plane(0).alive() || p.name != "fancy" || p.last().Index != 3 {
			t.Errorf("plane %+v", p)
		}
		b.set("gw1", choose("none", 4))
		if b.plane(1).alive() {
			t.Error("the data plane still runs")
		}
	})
}

func TestRunnerKeepsTableOverBadSnapshot(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t, "", newFeed())
		defer b.stop()
		s := current(t, "sidecar", 1, nil)
		b.set("web-p", s)
		bad := *s.Snapshot
		sc := *bad.Sidecar
		sc.Leaf = nil
		bad.Sidecar, bad.Index = &sc, 2
		b.set("web-p", &proxycfg.State{Proxy: s.Proxy, Snapshot: &bad, Phase: proxycfg.PhaseCurrent})
		if st := b.status(); st.State != gateway.PhaseStale || st.TableIndex != 1 || b.plane(0).last().Index != 1 {
			t.Errorf("status %+v", st)
		}
	})
}

func TestRunnerRemovesProxy(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t, dir, newFeed())
		defer b.stop()
		b.set("gw1", current(t, "gateway", 1, nil))
		time.Sleep(2 * time.Second)
		synctest.Wait()
		files := func() int {
			got, err := os.ReadDir(dir)
			if err != nil {
				t.Fatal(err)
			}
			return len(got)
		}
		if files() != 1 {
			t.Fatalf("%d files", files())
		}
		b.set("gw1", nil)
		if b.plane(0).alive() || files() != 0 || len(b.runner.Status()) != 0 {
			t.Errorf("alive %t, %d files, status %v", b.plane(0).alive(), files(), b.runner.Status())
		}
	})
}

// TestRunnerUnregistered: a kept table whose proxy is not registered is not
// served, and not deleted at once, because the registration may come.
func TestRunnerUnregistered(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		s := current(t, "gateway", 1, nil)
		other := current(t, "sidecar", 1, nil)
		b := newBench(t, dir, newFeed())
		b.set("gw1", s)
		b.set("web-p", other)
		b.stop()
		b = newBench(t, dir, newFeed())
		defer b.stop()
		if b.made() != 0 {
			t.Error("the table of a stranger is served")
		}
		time.Sleep(9 * time.Minute)
		b.set("gw1", unknown(s))
		if b.made() != 1 {
			t.Error("the table is gone")
		}
		time.Sleep(2 * time.Minute)
		synctest.Wait()
		left, err := gateway.OpenKeep(dir)
		if err != nil {
			t.Fatal(err)
		}
		tables, err := left.Load()
		if err != nil || len(tables) != 1 || tables["gw1"].Table == nil {
			t.Errorf("tables on disk %v, %v", tables, err)
		}
	})
}

// TestStatusUpstreams: by what way each upstream is reached, and why.
func TestStatusUpstreams(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t, "", newFeed())
		defer b.stop()
		b.set("web-p", current(t, "sidecar", 1, nil))
		var got []string
		for _, u := range b.status().Upstreams {
			got = append(got, fmt.Sprintf("%s at %s: %s in %s by %s of %q, mode %q from %q, %d of %d healthy",
				u.Name, u.Listener, u.Service, u.Datacenter, u.Via, u.ViaDatacenter, u.Mode, u.ModeFrom, u.Healthy, u.Endpoints))
		}
		want := []string{
			`api at 127.0.0.1:9001: api in dc1 by direct of "dc1", mode "remote" from "proxy-defaults/global", 2 of 3 healthy`,
			`api?dc=dc2 at 127.0.0.1:9002: api in dc2 by gateway of "dc2", mode "remote" from "proxy-defaults/global", 1 of 2 healthy`,
			`api?dc=dc2 at 127.0.0.1:9003: api in dc2 by gateway of "dc1", mode "local" from "upstream", 1 of 2 healthy`,
			`api?dc=dc2 at [::1]:9004: api in dc2 by direct of "dc2", mode "none" from "upstream", 1 of 1 healthy`,
			`api?dc=dc9 at /run/api.sock: api in dc9 by gateway of "dc9", mode "remote" from "proxy-defaults/global", 0 of 0 healthy`,
			`lost at : lost in dc1 by direct of "dc1", mode "remote" from "proxy-defaults/global", 0 of 0 healthy`,
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Error(diff)
		}
		time.Sleep(30 * 365 * 24 * time.Hour)
		if st := b.status(); st.State != gateway.PhaseStale || !strings.Contains(st.Reason, "certificate expired") {
			t.Errorf("status %+v", st)
		}
	})
}

// TestRunnerLeaksNothing adds and removes proxies; the bubble fails the test if
// a goroutine is left.
func TestRunnerLeaksNothing(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t, dir, newFeed())
		s := current(t, "gateway", 1, nil)
		for i := range 100 {
			id := fmt.Sprintf("gw-%d", i%7)
			reg := *s.Proxy.Service
			reg.ID = id
			snap := *s.Snapshot
			snap.Proxy.Service = &reg
			b.feed.set(id, &proxycfg.State{Proxy: snap.Proxy, Snapshot: &snap, Phase: proxycfg.PhaseCurrent})
			time.Sleep(time.Duration(i%3) * time.Millisecond)
			if i%2 == 1 {
				b.set(fmt.Sprintf("gw-%d", (i*3)%7), nil)
			}
			if i%11 == 0 && b.made() > 0 {
				select {
				case b.plane(b.made() - 1).fail <- errors.New("boom"):
				default:
				}
			}
		}
		for i := range 7 {
			b.set(fmt.Sprintf("gw-%d", i), nil)
		}
		for i := range b.made() {
			if b.plane(i).alive() {
				t.Errorf("data plane %d still runs", i)
			}
		}
		b.stop()
	})
}
