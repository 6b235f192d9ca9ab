package proxycfg_test

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/hashicorp/consul/api"
	"github.com/hashicorp/go-memdb"

	"github.com/sluicemesh/sluice/agent/catalog"
	"github.com/sluicemesh/sluice/proxycfg"
	"github.com/sluicemesh/sluice/proxycfg/proxycfgtest"
)

// registry is a list of proxies that can change.
type registry struct {
	mu      sync.Mutex
	proxies map[string]proxycfg.Proxy
	changed chan struct{}
}

func newRegistry(ids ...string) *registry {
	r := &registry{proxies: map[string]proxycfg.Proxy{}, changed: make(chan struct{})}
	for _, id := range ids {
		r.proxies[id] = gatewayProxy(id, 8443)
	}
	return r
}

func gatewayProxy(id string, port int) proxycfg.Proxy {
	return proxycfg.Proxy{
		Service:    &catalog.Service{Kind: api.ServiceKindMeshGateway, ID: id, Service: "mesh-gateway", Port: port},
		Node:       &catalog.Node{Node: "here", Address: "10.0.0.1"},
		Datacenter: "dc1",
	}
}

func (r *registry) list(ws memdb.WatchSet) []proxycfg.Proxy {
	r.mu.Lock()
	defer r.mu.Unlock()
	ws.Add(r.changed)
	return slices.Collect(maps.Values(r.proxies))
}

func (r *registry) edit(f func(map[string]proxycfg.Proxy)) {
	r.mu.Lock()
	defer r.mu.Unlock()
	f(r.proxies)
	close(r.changed)
	r.changed = make(chan struct{})
}

func data(index uint64) proxycfgtest.Data {
	return proxycfgtest.Data{
		Index: index,
		Connect: map[string]map[catalog.ServiceName][]*catalog.Instance{"dc1": {
			catalog.Name("api"): {proxycfgtest.Instance("dc1", "api", "api-p", "n1", "10.0.0.1", 20000)},
		}},
	}
}

// run starts a manager in a bubble; the returned function stops it and waits.
func run(t *testing.T, src proxycfg.Source, r *registry) (*proxycfg.Manager, func()) {
	t.Helper()
	m := proxycfg.NewManager(proxycfg.Config{Source: src, Proxies: r.list})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- m.Run(ctx) }()
	synctest.Wait()
	return m, func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	}
}

func TestManagerPublishesAtOnceWhenIdle(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		src := proxycfgtest.New("dc1", data(1))
		m, stop := run(t, src, newRegistry("gw"))
		defer stop()
		if s := m.Latest(nil)["gw"]; s.Phase != proxycfg.PhaseCurrent || s.Index != 1 {
			t.Fatalf("state %+v", s)
		}
		time.Sleep(time.Second)
		ws := memdb.NewWatchSet()
		m.Latest(ws)
		began := time.Now()
		src.Update(func(d *proxycfgtest.Data) { d.Index = 2 })
		if err := ws.WatchCtx(t.Context()); err != nil {
			t.Fatal(err)
		}
		if d := time.Since(began); d != 0 {
			t.Errorf("an idle proxy was built after %s", d)
		}
		if got := m.Snapshot("gw").Index; got != 2 {
			t.Errorf("index %d", got)
		}
	})
}

func TestManagerCoalescesBursts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		src := proxycfgtest.New("dc1", data(1))
		m, stop := run(t, src, newRegistry("gw"))
		defer stop()
		time.Sleep(time.Second)
		before := src.Builds()
		const changes = 500
		for i := range changes {
			src.Update(func(d *proxycfgtest.Data) { d.Index = uint64(i + 2) })
			time.Sleep(time.Millisecond)
			synctest.Wait()
			if lag := i + 2 - int(m.Snapshot("gw").Index); lag > 51 {
				t.Fatalf("the snapshot is %d ms behind in a burst", lag)
			}
		}
		time.Sleep(50 * time.Millisecond)
		synctest.Wait()
		if got := m.Snapshot("gw").Index; got != changes+1 {
			t.Errorf("index %d after the burst", got)
		}
		// Half a second of changes at one build per 50 ms.
		if n := src.Builds() - before; n < 8 || n > 13 {
			t.Errorf("%d builds for %d changes", n, changes)
		}
	})
}

// TestManagerKeepsTheLastGood goes through the phases of a proxy.
func TestManagerKeepsTheLastGood(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := data(1)
		d.Faults = map[string]error{"roots": proxycfg.ErrPending}
		src := proxycfgtest.New("dc1", d)
		m, stop := run(t, src, newRegistry("gw"))
		defer stop()
		var seen []string
		look := func() {
			time.Sleep(100 * time.Millisecond)
			synctest.Wait()
			s := m.Latest(nil)["gw"]
			seen = append(seen, fmt.Sprintf("%s snapshot %t error %v", s.Phase, s.Snapshot != nil, s.Err != nil))
		}
		set := func(err error) {
			src.Update(func(d *proxycfgtest.Data) { d.Faults["roots"] = err })
			look()
		}
		look()
		set(errors.New("no leader"))
		set(nil)
		set(proxycfg.ErrPending)
		set(fmt.Errorf("read: %w", proxycfg.ErrDenied))
		set(nil)
		want := []string{
			"pending snapshot false error true",
			"failed snapshot false error true",
			"current snapshot true error false",
			"stale snapshot true error true",
			"denied snapshot true error true",
			"current snapshot true error false",
		}
		if diff := cmp.Diff(want, seen); diff != "" {
			t.Error(diff)
		}
	})
}

// TestManagerRetriesUnwoken: a source that cannot say when it is well again is
// asked again, ever less often.
func TestManagerRetriesUnwoken(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := data(1)
		d.Faults = map[string]error{"services": errors.New("connection refused")}
		src := proxycfgtest.New("dc1", d)
		m, stop := run(t, src, newRegistry("gw"))
		defer stop()
		time.Sleep(10 * time.Minute)
		synctest.Wait()
		if n := src.Builds(); n < 10 || n > 20 {
			t.Errorf("%d builds in ten minutes of failure", n)
		}
		src.SetQuietly(func(d *proxycfgtest.Data) { d.Faults = nil })
		time.Sleep(time.Minute)
		synctest.Wait()
		if s := m.Latest(nil)["gw"]; s.Phase != proxycfg.PhaseCurrent {
			t.Errorf("phase %s a minute after the failure", s.Phase)
		}
	})
}

func TestManagerRefreshesAge(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		src := proxycfgtest.New("dc1", data(1))
		_, stop := run(t, src, newRegistry("gw"))
		defer stop()
		time.Sleep(time.Minute + time.Second)
		synctest.Wait()
		if n := src.Builds(); n != 7 {
			t.Errorf("%d builds in a quiet minute", n)
		}
	})
}

func TestManagerFollowsRegistrations(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		src := proxycfgtest.New("dc1", data(1))
		r := newRegistry("a", "b")
		m, stop := run(t, src, r)
		defer stop()
		time.Sleep(time.Second)
		before := src.Builds()
		// The same registrations again: nothing is built.
		r.edit(func(p map[string]proxycfg.Proxy) { p["a"] = gatewayProxy("a", 8443) })
		time.Sleep(time.Second)
		synctest.Wait()
		if n := src.Builds() - before; n != 0 {
			t.Errorf("%d builds for nothing", n)
		}
		r.edit(func(p map[string]proxycfg.Proxy) {
			p["a"] = gatewayProxy("a", 9443)
			delete(p, "b")
			p["c"] = gatewayProxy("c", 8443)
		})
		time.Sleep(time.Second)
		synctest.Wait()
		states := m.Latest(nil)
		if got := slices.Sorted(maps.Keys(states)); !slices.Equal(got, []string{"a", "c"}) {
			t.Fatalf("proxies %v", got)
		}
		if got := m.Snapshot("a").Proxy.Service.Port; got != 9443 {
			t.Errorf("port %d", got)
		}
		if m.Snapshot("b") != nil {
			t.Error("the removed proxy has a snapshot")
		}
	})
}

// TestManagerLeaksNothing adds and removes proxies; the bubble fails the test if
// a goroutine is left.
func TestManagerLeaksNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		src := proxycfgtest.New("dc1", data(1))
		r := newRegistry()
		m, stop := run(t, src, r)
		for i := range 200 {
			r.edit(func(p map[string]proxycfg.Proxy) {
				clear(p)
				for j := range i % 5 {
					id := fmt.Sprintf("gw-%d-%d", i%7, j)
					p[id] = gatewayProxy(id, 8443)
				}
			})
			time.Sleep(time.Duration(i%90) * time.Millisecond)
		}
		r.edit(func(p map[string]proxycfg.Proxy) { clear(p) })
		synctest.Wait()
		if n := len(m.Latest(nil)); n != 0 {
			t.Errorf("%d states are left", n)
		}
		stop()
	})
}
