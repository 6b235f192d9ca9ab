package state_test

import (
	"encoding/json"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/hashicorp/consul/api"
	"github.com/hashicorp/go-memdb"

	"github.com/sluicemesh/sluice/agent/catalog"
	"github.com/sluicemesh/sluice/agent/connect"
	"github.com/sluicemesh/sluice/agent/state"
)

func remoteGateway(address string, index uint64) *catalog.Instance {
	return &catalog.Instance{
		Node:    &catalog.Node{Node: "gw", Address: address, ModifyIndex: index},
		Service: gateway("gw"),
	}
}

func TestFederationStates(t *testing.T) {
	m := newMachine(t)
	put := func(fs state.FederationState) *state.FederationState {
		t.Helper()
		m.must(state.FederationStateCommand(&fs))
		_, got, _ := m.store().FederationState(nil, fs.Datacenter)
		return got
	}
	// The primary's own write gets its index; the same again changes nothing.
	a := put(state.FederationState{Datacenter: "dc2", MeshGateways: []*catalog.Instance{remoteGateway("10.2.0.1", 7)}})
	if a.PrimaryModifyIndex != m.index || a.ModifyIndex != m.index || a.CreateIndex != m.index {
		t.Errorf("got %+v at %d", a, m.index)
	}
	if b := put(state.FederationState{
		Datacenter: "dc2", MeshGateways: []*catalog.Instance{remoteGateway("10.2.0.1", 8)}, UpdatedAt: time.Unix(1, 0),
	}); b != a {
		t.Errorf("a record that says the same was written again: %+v", b)
	}
	// A replica keeps the primary's.
	c := put(state.FederationState{Datacenter: "dc2", MeshGateways: a.MeshGateways, PrimaryModifyIndex: 900})
	if c.PrimaryModifyIndex != 900 || c.ModifyIndex != m.index || c.CreateIndex != a.CreateIndex {
		t.Errorf("got %+v at %d", c, m.index)
	}
	if d := put(state.FederationState{Datacenter: "dc2", MeshGateways: a.MeshGateways, PrimaryModifyIndex: 900}); d != c {
		t.Errorf("a replica was written again: %+v", d)
	}
	put(state.FederationState{Datacenter: "dc3"})
	put(state.FederationState{Datacenter: "dc1", MeshGateways: []*catalog.Instance{remoteGateway("stale", 1)}})
	m.must(node("n1"))
	m.must(node("n1", with(gateway("local"))))

	ws := memdb.NewWatchSet()
	_, gws, _ := m.store().MeshGateways(ws, "dc1")
	got := map[string][]string{}
	for dc, in := range gws {
		got[dc] = names(in)
	}
	if diff := cmp.Diff(map[string][]string{"dc1": {"n1/local:passing"}, "dc2": {"gw/gw:passing"}}, got); diff != "" {
		t.Error(diff)
	}
	at := m.must(node("n1", withCheck(check("c", "local", "critical"))))
	if idx, _, _ := m.store().MeshGateways(nil, "dc1"); !woken(ws) || idx != at {
		t.Errorf("a local gateway's check: woken %v, index %d, want %d", woken(ws), idx, at)
	}
	ws = memdb.NewWatchSet()
	m.store().MeshGateways(ws, "dc1")
	at = m.must(state.DeleteFederationStateCommand("dc2"))
	idx, gws, _ := m.store().MeshGateways(nil, "dc1")
	if _, there := gws["dc2"]; there || idx != at || !woken(ws) {
		t.Errorf("after the end of dc2: %v, index %d, woken %v", gws, idx, woken(ws))
	}
	if _, all, _ := m.store().FederationStates(nil); len(all) != 2 || all[0].Datacenter != "dc1" {
		t.Errorf("got %v", all)
	}
}

func TestCARoots(t *testing.T) {
	m := newMachine(t)
	one := &connect.Root{ID: "aa", Name: "one", Active: true, RootCert: "pem"}
	if idx, r, _ := m.store().CARoots(nil); idx != 0 || r != nil {
		t.Fatalf("got %d, %v before the first", idx, r)
	}
	first := m.must(state.CARootsCommand(0, &connect.Roots{ActiveRootID: "aa", TrustDomain: "x.consul", Roots: []*connect.Root{one}}))
	ws := memdb.NewWatchSet()
	m.store().CARoots(ws)
	if res := m.apply(state.CARootsCommand(0, &connect.Roots{})); res != false {
		t.Errorf("a stale writer got %v", res)
	}
	m.must(state.CARootsCommand(first, &connect.Roots{ActiveRootID: "aa", TrustDomain: "x.consul", Roots: []*connect.Root{one}}))
	if idx, _, _ := m.store().CARoots(nil); idx != first || woken(ws) {
		t.Errorf("the same roots moved the index to %d, woken %v", idx, woken(ws))
	}
	old := *one
	old.Active = false
	at := m.must(state.CARootsCommand(first, &connect.Roots{ActiveRootID: "bb", TrustDomain: "x.consul", Roots: []*connect.Root{&old, {ID: "bb", Active: true}}}))
	_, r, _ := m.store().CARoots(nil)
	if !woken(ws) || r.Active().ID != "bb" || r.Roots[0].CreateIndex != first || r.Roots[0].ModifyIndex != at {
		t.Errorf("woken %v, roots %+v %+v", woken(ws), r.Roots[0], r.Roots[1])
	}
}

func TestCAConfigAndState(t *testing.T) {
	m := newMachine(t)
	first := m.must(state.CAConfigCommand(&connect.CAConfig{ClusterID: "id", Provider: "consul", Config: map[string]any{"LeafCertTTL": "72h"}}))
	_, c, _ := m.store().CAConfig(nil)
	if c.ClusterID != "id" || c.Config["LeafCertTTL"] != "72h" || c.ModifyIndex != first {
		t.Errorf("got %+v", c)
	}
	m.must(state.CAConfigCommand(c))
	if _, again, _ := m.store().CAConfig(nil); again != c {
		t.Error("the same configuration was written again")
	}
	if res := m.apply(state.CAConfigCommand(&connect.CAConfig{Provider: "vault", ModifyIndex: first - 1})); res != false {
		t.Errorf("a stale writer got %v", res)
	}
	m.must(state.CAConfigCommand(&connect.CAConfig{Provider: "vault", ModifyIndex: first}))

	st := m.must(state.CAStateCommand(&connect.CAState{RootKeyPEM: "secret", RootCertPEM: "cert", Serial: 4}))
	for want := uint64(5); want < 7; want++ {
		if got := m.apply(state.CASerialCommand()); got != want {
			t.Errorf("serial: got %v, want %d", got, want)
		}
	}
	if res := m.apply(state.CAStateCommand(&connect.CAState{ModifyIndex: st})); res != false {
		t.Errorf("a stale writer got %v", res)
	}
	m.must(state.CAStateCommand(&connect.CAState{RootKeyPEM: "other", Serial: 1}))
	if _, s, _ := m.store().CAState(nil); s.Serial != 6 || s.RootKeyPEM.Reveal() != "other" {
		t.Errorf("got serial %d, key %q", s.Serial, s.RootKeyPEM.Reveal())
	}
}

// TestSameGateways: a record compares equal after it went to the primary and
// back, and unequal when anything but an index differs.
func TestSameGateways(t *testing.T) {
	m := newMachine(t)
	m.must(node("n1"))
	gw := gateway("gw")
	gw.Proxy = &api.AgentServiceConnectProxyConfig{Config: map[string]any{"n": 1, "list": []any{"a"}}}
	gw.TaggedAddresses = map[string]api.ServiceAddress{"wan": {Address: "1.2.3.4", Port: 443}}
	m.must(node("n1", with(gw)))
	m.must(node("n1", withCheck(&catalog.Check{
		CheckID: "c", ServiceID: "gw", Status: "passing", Definition: api.HealthCheckDefinition{TCP: "x:1", IntervalDuration: 10e9},
	})))
	_, here, _ := m.store().ServicesByKind(nil, api.ServiceKindMeshGateway)
	travelled := func() []*catalog.Instance {
		data, err := json.Marshal(here)
		if err != nil {
			t.Fatal(err)
		}
		var out []*catalog.Instance
		if err := json.Unmarshal(data, &out); err != nil {
			t.Fatal(err)
		}
		return out
	}
	same := travelled()
	same[0].Node.ModifyIndex, same[0].Service.CreateIndex, same[0].Checks[0].ModifyIndex = 1, 2, 3
	same[0].Service.Meta, same[0].Service.Tags, same[0].Checks[0].ServiceTags = nil, nil, nil
	if !state.SameGateways(here, same) {
		t.Error("the same gateways differ after a journey")
	}
	for what, change := range map[string]func(*catalog.Instance){
		"address": func(i *catalog.Instance) { i.Service.TaggedAddresses["wan"] = api.ServiceAddress{Address: "1.2.3.5"} },
		"meta":    func(i *catalog.Instance) { i.Service.Meta = map[string]string{"a": "b"} },
		"health":  func(i *catalog.Instance) { i.Checks[0].Status = "critical" },
		"checks":  func(i *catalog.Instance) { i.Checks = nil },
		"node":    func(i *catalog.Instance) { i.Node.Address = "other" },
	} {
		other := travelled()
		change(other[0])
		if state.SameGateways(here, other) {
			t.Errorf("another %s makes no difference", what)
		}
	}
	if state.SameGateways(here, nil) {
		t.Error("some and none are the same")
	}
}
