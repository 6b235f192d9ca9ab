package gateway_test

import (
	"fmt"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/hashicorp/consul/api"

	"github.com/sluicemesh/sluice/agent/catalog"
	"github.com/sluicemesh/sluice/gateway"
	"github.com/sluicemesh/sluice/proxycfg"
	"github.com/sluicemesh/sluice/proxycfg/proxycfgtest"
)

func TestLookup(t *testing.T) {
	tbl := &gateway.Table{
		Routes: []gateway.Route{
			{Match: "*.dc2.internal.td", Cluster: "c"}, {Match: "*.internal.td", Cluster: "b"}, {Match: "a.dc2.internal.td", Cluster: "a"},
		},
		Clusters: []gateway.Cluster{{Name: "a"}, {Name: "b"}, {Name: "c"}},
	}
	for name, want := range map[string]string{
		"a.dc2.internal.td":   "a",
		"A.DC2.Internal.TD.":  "a",
		"b.dc2.internal.td":   "c",
		"x.a.dc2.internal.td": "c",
		"dc2.internal.td":     "b", // not below dc2 itself
		"internal.td":         "",
		"xinternal.td":        "",
		".internal.td":        "",
		"":                    "",
		".":                   "",
		"*.dc2.internal.td":   "c", // no server name, but no way around the rules either
	} {
		route, cluster := tbl.Lookup(name)
		got := ""
		if route != nil {
			got = cluster.Name
		}
		if got != want {
			t.Errorf("%q leads to %q, want %q", name, got, want)
		}
	}
}

func TestCheck(t *testing.T) {
	tbl := table(t, "sidecar")
	if err := tbl.Check(); err != nil {
		t.Fatal(err)
	}
	for want, breakIt := range map[string]func(t *gateway.Table){
		"is there twice":        func(t *gateway.Table) { t.Clusters = append(t.Clusters, t.Clusters[0]) },
		"have the same address": func(t *gateway.Table) { t.Listeners = append(t.Listeners, renamed(t.Listeners[0])) },
		"leads to cluster":      func(t *gateway.Table) { t.Routes = []gateway.Route{{Match: "x", Cluster: "nope"}} },
		"forwards to cluster":   func(t *gateway.Table) { t.Clusters = nil },
		"needs a certificate":   func(t *gateway.Table) { t.Identity = nil },
		"fails over to": func(t *gateway.Table) {
			t.Clusters = append(t.Clusters, gateway.Cluster{Name: "x", Failover: []string{"y"}})
		},
		"fails over to itself": func(t *gateway.Table) {
			t.Clusters = append(t.Clusters, gateway.Cluster{Name: "x", Failover: []string{"x"}})
		},
		"authorises nobody": func(t *gateway.Table) {
			t.Listeners = []gateway.Listener{{Mode: gateway.ListenInbound, Cluster: "local_app"}}
		},
		"unknown mode": func(t *gateway.Table) { t.Listeners = []gateway.Listener{{Mode: "magic"}} },
	} {
		broken := *tbl
		breakIt(&broken)
		if err := broken.Check(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("want a fault that says %q, got %v", want, err)
		}
	}
}

func renamed(l gateway.Listener) gateway.Listener {
	l.Name += "-2"
	return l
}

// TestCarryUpstream: the discovery chain of an upstream is pending, so where its
// listener leads stays as it was, failovers included.
func TestCarryUpstream(t *testing.T) {
	prev := table(t, "sidecar-failover")
	_, c := parse(t, "testdata/compile/sidecar-failover.txtar")
	c.Source.Update(func(d *proxycfgtest.Data) { d.Faults["entry service-resolver api"] = proxycfg.ErrPending })
	next, err := gateway.Compile(build(t, c))
	if err != nil {
		t.Fatal(err)
	}
	if next.Cluster("pending~api") == nil {
		t.Fatal("nothing is pending")
	}
	if got := gateway.Carry(nil, next); got != next {
		t.Error("without an earlier table there is nothing to carry")
	}
	before, _ := next.JSON()
	got := gateway.Carry(prev, next)
	if err := got.Check(); err != nil {
		t.Fatal(err)
	}
	if after, _ := next.JSON(); string(before) != string(after) {
		t.Error("the table was written to")
	}
	name := "api.default.dc1.internal." + proxycfgtest.TrustDomain
	for _, l := range got.Listeners {
		if l.Mode == gateway.ListenUpstream && l.Cluster != name {
			t.Errorf("listener %s leads to %s", l.Name, l.Cluster)
		}
	}
	cl := got.Cluster(name)
	if cl == nil || !cl.Pending || len(cl.Failover) != 2 || got.Cluster("pending~api") != nil {
		t.Fatalf("cluster %+v", cl)
	}
	if diff := cmp.Diff(prev.Cluster(cl.Failover[0]).Endpoints, got.Cluster(cl.Failover[0]).Endpoints); diff != "" {
		t.Error(diff)
	}
	// And so on for as long as it is pending.
	again := gateway.Carry(got, next)
	a, _ := got.JSON()
	b, _ := again.JSON()
	if diff := cmp.Diff(string(a), string(b)); diff != "" {
		t.Error(diff)
	}
}

// TestKnownEmptyReplaces is the other half: an answer that there is nothing takes
// away what was known.
func TestKnownEmptyReplaces(t *testing.T) {
	_, c := parse(t, "testdata/compile/sidecar-failover.txtar")
	prev, err := gateway.Compile(build(t, c))
	if err != nil {
		t.Fatal(err)
	}
	c.Source.Update(func(d *proxycfgtest.Data) { d.Connect["dc1"] = nil })
	next, err := gateway.Compile(build(t, c))
	if err != nil {
		t.Fatal(err)
	}
	if got := gateway.Carry(prev, next).Cluster("api.default.dc1.internal." + proxycfgtest.TrustDomain); len(got.Endpoints) != 0 {
		t.Errorf("endpoints %+v", got.Endpoints)
	}
}

// TestCompilerRemembers: with and without memory the tables are equal, whatever
// changes; and what did not change is not made again.
func TestCompilerRemembers(t *testing.T) {
	_, c := parse(t, "testdata/compile/gateway.txtar")
	var memory gateway.Compiler
	var tables []*gateway.Table
	step := func(edit func(d *proxycfgtest.Data)) {
		t.Helper()
		c.Source.Update(edit)
		snap := build(t, c)
		got, err := memory.Compile(snap)
		if err != nil {
			t.Fatal(err)
		}
		want, err := gateway.Compile(snap)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("step %d:\n%s", len(tables), diff)
		}
		tables = append(tables, got)
	}
	instances := func(edit func(*catalog.Instance) *catalog.Instance) func(d *proxycfgtest.Data) {
		return func(d *proxycfgtest.Data) {
			services := map[catalog.ServiceName][]*catalog.Instance{}
			for name, is := range d.Connect["dc1"] {
				services[name] = is
			}
			name := catalog.Name("api")
			var changed []*catalog.Instance
			for _, i := range services[name] {
				if n := edit(i); n != nil {
					changed = append(changed, n)
				}
			}
			services[name] = changed
			d.Connect["dc1"] = services
		}
	}
	step(func(d *proxycfgtest.Data) {})
	// A check that was removed leaves no higher index behind.
	step(instances(func(i *catalog.Instance) *catalog.Instance {
		n := *i
		n.Checks = nil
		return &n
	}))
	// The same records in new instances, as a store makes them for each read.
	step(instances(func(i *catalog.Instance) *catalog.Instance {
		n := *i
		return &n
	}))
	// An instance that went.
	step(instances(func(i *catalog.Instance) *catalog.Instance {
		if i.Service.ID == "api-p2" {
			return nil
		}
		return i
	}))
	// A resolver that changed, and one that went.
	step(func(d *proxycfgtest.Data) {
		d.Entries[0] = &api.ServiceResolverConfigEntry{Kind: api.ServiceResolver, Name: "api"}
		d.Entries = d.Entries[:1]
	})
	// What every cluster depends on.
	reg := *c.Proxy.Service
	reg.Proxy = &api.AgentServiceConnectProxyConfig{Config: map[string]any{"connect_timeout_ms": 9}}
	c.Proxy.Service = &reg
	step(func(d *proxycfgtest.Data) {})

	web := "web.default.dc1.internal." + proxycfgtest.TrustDomain
	if a, b := tables[0].Cluster(web).Endpoints, tables[3].Cluster(web).Endpoints; &a[0] != &b[0] {
		t.Error("a service that did not change was compiled again")
	}
}

// TestLetterCase: server names have none, so two services may claim one.
func TestLetterCase(t *testing.T) {
	_, c := parse(t, "testdata/compile/gateway-no-bind.txtar")
	c.Source.Update(func(d *proxycfgtest.Data) {
		d.Connect["dc1"] = map[catalog.ServiceName][]*catalog.Instance{
			catalog.Name("API"): {proxycfgtest.Instance("dc1", "API", "p1", "n1", "10.0.0.1", 1)},
			catalog.Name("api"): {proxycfgtest.Instance("dc1", "api", "p2", "n2", "10.0.0.2", 2)},
		}
	})
	tbl, err := gateway.Compile(build(t, c))
	if err != nil {
		t.Fatal(err)
	}
	if len(tbl.Routes) != 1 || !strings.HasPrefix(tbl.Routes[0].Match, "api.") {
		t.Errorf("routes %+v", tbl.Routes)
	}
	if w := strings.Join(tbl.Warnings, "\n"); !strings.Contains(w, "service API: its server name") {
		t.Errorf("warnings %s", w)
	}
}

// many is a source of n services with three instances each.
func many(n int) *proxycfgtest.Source {
	services := make(map[catalog.ServiceName][]*catalog.Instance, n)
	for i := range n {
		name := fmt.Sprintf("service-%05d", i)
		for j := range 3 {
			services[catalog.Name(name)] = append(services[catalog.Name(name)],
				proxycfgtest.Instance("dc1", name, fmt.Sprintf("%s-%d", name, j), fmt.Sprintf("node-%d", j), fmt.Sprintf("10.0.%d.%d", j, i%250), 20000+j))
		}
	}
	return proxycfgtest.New("dc1", proxycfgtest.Data{
		Index: 10, Connect: map[string]map[catalog.ServiceName][]*catalog.Instance{"dc1": services},
		Gateways: map[string][]*catalog.Instance{"dc2": {proxycfgtest.Instance("dc2", "gateway", "gw2", "n2", "10.2.0.1", 8443)}},
	})
}

// BenchmarkOneChange is what a change of one instance costs a gateway: a
// snapshot and a table.
func BenchmarkOneChange(b *testing.B) {
	for _, n := range []int{1_000, 10_000} {
		b.Run(fmt.Sprintf("%d-services", n), func(b *testing.B) {
			src := many(n)
			p := proxycfg.Proxy{
				Service:    &catalog.Service{Kind: api.ServiceKindMeshGateway, ID: "gw", Service: "mesh-gateway", Port: 8443},
				Node:       &catalog.Node{Node: "here", Address: "10.0.0.1"},
				Datacenter: "dc1",
			}
			all, _, _ := src.ConnectAll(nil)
			name := catalog.Name("service-00500")
			var compiler gateway.Compiler
			b.ReportAllocs()
			for i := 0; b.Loop(); i++ {
				changed := *all[name][0]
				service := *changed.Service
				service.ModifyIndex = uint64(100 + i)
				changed.Service = &service
				all[name] = []*catalog.Instance{&changed, all[name][1], all[name][2]}
				snap, _, err := proxycfg.Build(b.Context(), src, p)
				if err != nil {
					b.Fatal(err)
				}
				if _, err := compiler.Compile(snap); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
