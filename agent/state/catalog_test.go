package state_test

import (
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/hashicorp/consul/api"
	"github.com/hashicorp/go-memdb"

	"github.com/sluicemesh/sluice/agent/catalog"
	"github.com/sluicemesh/sluice/agent/state"
)

const (
	idA = "aaaaaaaa-0000-0000-0000-000000000000"
	idB = "bbbbbbbb-0000-0000-0000-000000000000"
)

func TestRegisterNormalises(t *testing.T) {
	m := newMachine(t)
	at := m.must(state.RegisterCommand(&api.CatalogRegistration{
		Node: "n1", Address: "10.0.0.1", Datacenter: "dc1",
		Service: &catalog.Service{Service: "web", Port: 80},
		Checks:  api.HealthChecks{{Name: "alive"}, {CheckID: "up", ServiceID: "WEB", Status: "passing"}},
	}))
	_, in, _ := m.store().Service(nil, catalog.Name("web"))
	want := []*catalog.Instance{{
		Node: &catalog.Node{
			Node: "n1", Address: "10.0.0.1", Datacenter: "dc1",
			TaggedAddresses: map[string]string{}, Meta: map[string]string{}, CreateIndex: at, ModifyIndex: at,
		},
		Service: &catalog.Service{
			ID: "web", Service: "web", Port: 80, Tags: []string{}, Meta: map[string]string{},
			Weights: api.AgentWeights{Passing: 1, Warning: 1}, CreateIndex: at, ModifyIndex: at,
		},
		Checks: api.HealthChecks{
			{Node: "n1", CheckID: "alive", Name: "alive", Status: "critical", ServiceTags: []string{}, CreateIndex: at, ModifyIndex: at},
			{Node: "n1", CheckID: "up", Status: "passing", ServiceID: "web", ServiceName: "web", ServiceTags: []string{}, CreateIndex: at, ModifyIndex: at},
		},
	}}
	if diff := cmp.Diff(want, in); diff != "" {
		t.Error(diff)
	}
}

func TestRegisterRefuses(t *testing.T) {
	m := newMachine(t)
	m.must(node("n1", withID(idA)))
	m.must(node("n2", withID(idB)))
	for _, c := range []struct {
		name string
		cmd  state.Command
		want string
	}{
		{"no node", node(""), "Must provide node"},
		{"no address", state.RegisterCommand(&api.CatalogRegistration{Node: "x"}), "Must provide address if SkipNodeUpdate is not set"},
		{"bad id", node("x", withID("zz")), "Bad node ID: uuid string is wrong length"},
		{"no service name", node("x", with(&catalog.Service{ID: "a"})), "Must provide service name (Service.Service) when service ID is provided"},
		{"unknown service of a check", node("x", withCheck(check("c", "nope", "passing"))), "Unknown service ID 'nope' for check ID 'c'"},
		{"status", node("x", withCheck(check("c", "", "fine"))), `invalid check status: "fine"`},
		{"another node's check", node("x", withCheck(&catalog.Check{Node: "n1", CheckID: "c"})), `check node "n1" does not match node "x"`},
		{"check without a name", node("x", withCheck(&catalog.Check{})), "Must provide check ID or name"},
		{"name in use", node("n1", withID("cccccccc-0000-0000-0000-000000000000")), `node name "n1" is reserved by node ` + idA + " with address 10.0.0.1"},
		{"rename onto another", node("n2", withID(idA)), `node name "n2" is reserved by node ` + idB + " with address 10.0.0.1"},
	} {
		t.Run(c.name, func(t *testing.T) {
			m.t = t
			before := m.snapshot()
			m.refuse(c.cmd, c.want)
			_, n, _ := m.store().Node(nil, "x")
			if n != nil {
				t.Error("what was refused left a node behind")
			}
			if diff := cmp.Diff(lines(before)[1:], lines(m.snapshot())[1:]); diff != "" {
				t.Errorf("what was refused changed the state:\n%s", diff)
			}
		})
	}
}

func TestNodeIdentity(t *testing.T) {
	m := newMachine(t)
	created := m.must(node("old", withID(idA)))
	m.must(node("old", with(service("web"))))
	m.must(node("new", withID(idA)))
	if _, n, _ := m.store().Node(nil, "old"); n != nil {
		t.Errorf("the old name is still there: %v", n)
	}
	_, n, _ := m.store().NodeByID(nil, idA)
	if n == nil || n.Node != "new" || n.CreateIndex != created {
		t.Errorf("got %+v, want the renamed node with its CreateIndex %d", n, created)
	}
	if _, in, _ := m.store().Service(nil, catalog.Name("web")); len(in) != 0 {
		t.Errorf("services of the old name: %v", names(in))
	}

	// Who does not know the ID does not take it away.
	m.must(node("new", func(r *api.CatalogRegistration) { r.Address = "10.0.0.9" }))
	if _, n, _ := m.store().Node(nil, "NEW"); n.ID != idA || n.Address != "10.0.0.9" {
		t.Errorf("got %+v", n)
	}

	// A failed node's name can be taken.
	m.must(node("new", withCheck(check(catalog.NodeCheckID, "", "critical"))))
	m.must(node("new", withID(idB)))
	if _, n, _ := m.store().NodeByID(nil, idA); n != nil {
		t.Errorf("the ID that was replaced still finds %v", n)
	}
}

func TestNoopRegisterMovesNothing(t *testing.T) {
	full := func() state.Command {
		return state.RegisterCommand(&api.CatalogRegistration{
			Node: "n1", ID: idA, Address: "10.0.0.1", TaggedAddresses: map[string]string{"wan": "1.2.3.4"},
			Service: sidecar("web"),
			Checks:  api.HealthChecks{check("c", "web-proxy", "passing"), {CheckID: "h", Definition: api.HealthCheckDefinition{Header: map[string][]string{}}}},
		})
	}
	m := newMachine(t)
	m.must(full())
	before := m.snapshot()
	ws := memdb.NewWatchSet()
	m.store().ServiceDump(ws)
	m.store().Nodes(ws)
	m.store().ChecksInState(ws, "any")
	m.must(full())
	m.must(node("n1", func(r *api.CatalogRegistration) { r.SkipNodeUpdate = true; r.Address = "9.9.9.9" }))
	m.must(state.DeregisterCommand(&api.CatalogDeregistration{Node: "n1", ServiceID: "nope"}))
	m.must(state.DeregisterCommand(&api.CatalogDeregistration{Node: "nope"}))
	if woken(ws) {
		t.Error("a write of what is there woke a reader")
	}
	if diff := cmp.Diff(lines(before)[1:], lines(m.snapshot())[1:]); diff != "" {
		t.Error(diff)
	}
	if got := m.store().LastIndex(); got != m.index {
		t.Errorf("LastIndex: got %d, want %d", got, m.index)
	}
}

// TestServiceIndex follows the index and the watch of one service through what
// happens to it and to others.
func TestServiceIndex(t *testing.T) {
	m := newMachine(t)
	m.must(node("n1"))
	m.must(node("n2"))
	m.must(node("n1", with(service("web"))))
	m.must(node("n1", with(sidecar("web"))))
	m.must(node("n2", with(service("db"))))
	type read func(memdb.WatchSet) (uint64, []*catalog.Instance, error)
	web := func(ws memdb.WatchSet) (uint64, []*catalog.Instance, error) {
		return m.store().Service(ws, catalog.Name("web"))
	}
	proxy := func(ws memdb.WatchSet) (uint64, []*catalog.Instance, error) {
		return m.store().Connect(ws, catalog.Name("web"))
	}
	gone := func(ws memdb.WatchSet) (uint64, []*catalog.Instance, error) {
		return m.store().Service(ws, catalog.Name("gone"))
	}
	for _, s := range []struct {
		name string
		cmd  state.Command
		wake map[string]bool // whose index moves
	}{
		{"another service changes", node("n2", with(&catalog.Service{ID: "db", Service: "db", Port: 5432})), nil},
		{"another service's check", node("n2", withCheck(check("d", "db", "warning"))), nil},
		{"another node", node("n2", func(r *api.CatalogRegistration) { r.Address = "10.0.0.2" }), nil},
		{"a config entry", state.ConfigEntryCommand(state.ConfigEntryUpsert, &api.MeshConfigEntry{}, 0), nil},
		{"own check", node("n1", withCheck(check("w", "web", "passing"))), map[string]bool{"web": true}},
		{"node check", node("n1", withCheck(check(catalog.NodeCheckID, "", "passing"))), map[string]bool{"web": true, "proxy": true}},
		{"own node", node("n1", func(r *api.CatalogRegistration) { r.Address = "10.0.0.3" }), map[string]bool{"web": true, "proxy": true}},
		{"another instance", node("n2", with(service("web"))), map[string]bool{"web": true}},
		{"instance leaves", state.DeregisterCommand(&api.CatalogDeregistration{Node: "n2", ServiceID: "web"}), map[string]bool{"web": true}},
		{"node check removed", state.DeregisterCommand(&api.CatalogDeregistration{Node: "n1", CheckID: catalog.NodeCheckID}), map[string]bool{"web": true, "proxy": true}},
		{"last instance leaves", state.DeregisterCommand(&api.CatalogDeregistration{Node: "n1", ServiceID: "web"}), map[string]bool{"web": true, "gone": true}},
		{"it comes back", node("n1", with(service("web"))), map[string]bool{"web": true}},
		{"renamed under the same ID", node("n1", with(&catalog.Service{ID: "web", Service: "gone"})), map[string]bool{"web": true, "gone": true}},
		{"node leaves", state.DeregisterCommand(&api.CatalogDeregistration{Node: "n1"}), map[string]bool{"web": true, "proxy": true, "gone": true}},
	} {
		t.Run(s.name, func(t *testing.T) {
			m.t = t
			reads := map[string]read{"web": web, "proxy": proxy, "gone": gone}
			sets, before := map[string]memdb.WatchSet{}, map[string]uint64{}
			for k, r := range reads {
				sets[k] = memdb.NewWatchSet()
				before[k], _, _ = r(sets[k])
			}
			at := m.must(s.cmd)
			for k, r := range reads {
				idx, _, _ := r(nil)
				switch {
				case s.wake[k] && (!woken(sets[k]) || idx != at):
					t.Errorf("%s: woken %v, index %d, want true, %d", k, woken(sets[k]), idx, at)
				case !s.wake[k] && idx != before[k]:
					t.Errorf("%s: index moved from %d to %d", k, before[k], idx)
				}
			}
		})
	}
}

// TestNarrowWatch: a reader of one service sleeps through writes to another.
func TestNarrowWatch(t *testing.T) {
	m := newMachine(t)
	for _, n := range []string{"n1", "n2"} {
		m.must(node(n))
	}
	m.must(node("n1", with(service("web"))))
	m.must(node("n1", withCheck(check("w", "web", "passing"))))
	m.must(node("n1", with(sidecar("web"))))
	m.must(node("n2", with(service("web2"))))
	m.must(node("n2", withCheck(check("n", "", "passing"))))
	reads := map[string]func(memdb.WatchSet){
		"Service":       func(ws memdb.WatchSet) { m.store().Service(ws, catalog.Name("web")) },
		"Connect":       func(ws memdb.WatchSet) { m.store().Connect(ws, catalog.Name("web")) },
		"ServiceChecks": func(ws memdb.WatchSet) { m.store().ServiceChecks(ws, catalog.Name("web")) },
		"Node":          func(ws memdb.WatchSet) { m.store().Node(ws, "n1") },
		"NodeServices":  func(ws memdb.WatchSet) { m.store().NodeServices(ws, "n1") },
		"NodeChecks":    func(ws memdb.WatchSet) { m.store().NodeChecks(ws, "n1") },
		"MeshGateways":  func(ws memdb.WatchSet) { m.store().MeshGateways(ws, "dc1") },
	}
	sets := map[string]memdb.WatchSet{}
	for k, r := range reads {
		sets[k] = memdb.NewWatchSet()
		r(sets[k])
	}
	m.must(node("n2", with(sidecar("web2"))))
	m.must(node("n2", withCheck(check("w2", "web2", "critical"))))
	m.must(node("n2", func(r *api.CatalogRegistration) { r.Address = "10.0.0.2" }))
	m.must(state.DeregisterCommand(&api.CatalogDeregistration{Node: "n2", ServiceID: "web2"}))
	for k, ws := range sets {
		if k != "MeshGateways" && woken(ws) { // there is none, so it may be woken
			t.Errorf("%s: woken by another service", k)
		}
	}
	m.must(state.DeregisterCommand(&api.CatalogDeregistration{Node: "n1"}))
	for k, ws := range sets {
		if k != "MeshGateways" && !woken(ws) {
			t.Errorf("%s: not woken by the end of its node", k)
		}
	}
}

func TestConnectAllShares(t *testing.T) {
	m := newMachine(t)
	m.must(node("n1"))
	m.must(node("n1", with(sidecar("a"))))
	m.must(node("n1", with(sidecar("b"))))
	native := service("c")
	native.Connect = &api.AgentServiceConnect{Native: true}
	m.must(node("n1", with(native)))
	m.must(node("n1", with(service("plain"))))
	ws := memdb.NewWatchSet()
	idx, before, _ := m.store().ConnectAll(ws)
	if len(before) != 3 {
		t.Fatalf("got %d services, want a, b and c: %v", len(before), before)
	}
	m.must(node("n1", with(service("plain2"))))
	same, again, _ := m.store().ConnectAll(nil)
	if woken(ws) || same != idx {
		t.Errorf("a service without mutual TLS moved the index from %d to %d or woke the reader", idx, same)
	}
	again[catalog.Name("probe")] = nil // only a test may write to it: is it the same map?
	if _, shared := before[catalog.Name("probe")]; !shared {
		t.Error("nothing changed, but the map did")
	}
	delete(again, catalog.Name("probe"))

	at := m.must(node("n1", withCheck(check("x", "b-proxy", "passing"))))
	idx, after, _ := m.store().ConnectAll(nil)
	if !woken(ws) || idx != at {
		t.Errorf("woken %v, index %d, want true, %d", woken(ws), idx, at)
	}
	for name, in := range after {
		changed := &in[0] != &before[name][0]
		if want := name.Name == "b"; changed != want {
			t.Errorf("%s: rebuilt %v, want %v", name, changed, want)
		}
	}
	if s := before[catalog.Name("b")][0].Checks; len(s) != 0 {
		t.Errorf("a record that was handed out has changed: %v", s)
	}
	m.must(state.DeregisterCommand(&api.CatalogDeregistration{Node: "n1", ServiceID: "a-proxy"}))
	if _, all, _ := m.store().ConnectAll(nil); len(all) != 2 {
		t.Errorf("got %v", all)
	}
}

func TestCatalogReads(t *testing.T) {
	m := newMachine(t)
	m.must(node("n2"))
	m.must(node("n1"))
	tagged := service("web")
	tagged.Tags = []string{"v2", "v1"}
	m.must(node("n2", with(tagged)))
	other := service("web")
	other.ID, other.Tags = "web-2", []string{"v1", "v3"}
	m.must(node("n1", with(other), withCheck(check("c1", "web-2", "warning"))))
	m.must(node("n1", withCheck(check("n", "", "passing"))))
	m.must(node("n1", with(gateway("gw"))))
	s := m.store()

	_, list, _ := s.ServiceList(nil)
	if diff := cmp.Diff(map[string][]string{"web": {"v1", "v2", "v3"}, "mesh-gateway": {}}, list); diff != "" {
		t.Error(diff)
	}
	for what, c := range map[string]struct {
		in   []*catalog.Instance
		want []string
	}{
		"service": {second(s.Service(nil, catalog.Name("WEB"))), []string{"n1/web-2:warning", "n2/web:passing"}},
		"kind":    {second(s.ServicesByKind(nil, api.ServiceKindMeshGateway)), []string{"n1/gw:passing"}},
		"typical": {second(s.ServicesByKind(nil, api.ServiceKindTypical)), []string{"n1/web-2:warning", "n2/web:passing"}},
		"dump":    {second(s.ServiceDump(nil)), []string{"n1/gw:passing", "n1/web-2:warning", "n2/web:passing"}},
	} {
		if diff := cmp.Diff(c.want, names(c.in)); diff != "" {
			t.Errorf("%s: %s", what, diff)
		}
	}
	_, nodes, _ := s.Nodes(nil)
	if len(nodes) != 2 || nodes[0].Node != "n1" {
		t.Errorf("nodes: %v", nodes)
	}
	if _, ns, _ := s.NodeServices(nil, "n1"); ns.Node.Node != "n1" || len(ns.Services) != 2 || ns.Services[1].ID != "web-2" {
		t.Errorf("node services: %+v", ns)
	}
	if _, ns, _ := s.NodeServices(nil, "nope"); ns != nil {
		t.Errorf("node services of no node: %+v", ns)
	}
	for what, c := range map[string]struct {
		in   []*catalog.Check
		want []string
	}{
		"node":    {checks(s.NodeChecks(nil, "n1")), []string{"c1", "n"}},
		"service": {checks(s.ServiceChecks(nil, catalog.Name("web"))), []string{"c1"}},
		"any":     {checks(s.ChecksInState(nil, "any")), []string{"c1", "n"}},
		"warning": {checks(s.ChecksInState(nil, "warning")), []string{"c1"}},
	} {
		got := []string{}
		for _, x := range c.in {
			got = append(got, x.CheckID)
		}
		if diff := cmp.Diff(c.want, got); diff != "" {
			t.Errorf("checks of %s: %s", what, diff)
		}
	}
}

// TestChecksFollowTheirService: a check shows its service's name and tags, and
// moves with its service ID.
func TestChecksFollowTheirService(t *testing.T) {
	m := newMachine(t)
	m.must(node("n1"))
	m.must(node("n1", with(service("web"))))
	m.must(node("n1", with(service("db"))))
	m.must(node("n1", withCheck(check("c", "web", "critical"))))
	m.must(node("n1", with(&catalog.Service{ID: "web", Service: "www", Tags: []string{"new"}})))
	_, in, _ := m.store().Service(nil, catalog.Name("www"))
	if c := in[0].Checks[0]; c.ServiceName != "www" || !cmp.Equal(c.ServiceTags, []string{"new"}) {
		t.Errorf("got %+v", c)
	}
	m.must(node("n1", withCheck(check("c", "db", "critical"))))
	_, in, _ = m.store().Service(nil, catalog.Name("www"))
	if len(in[0].Checks) != 0 {
		t.Errorf("the check stayed: %v", in[0].Checks)
	}
	_, in, _ = m.store().Service(nil, catalog.Name("db"))
	if len(in[0].Checks) != 1 {
		t.Errorf("the check did not move: %v", in[0].Checks)
	}
	m.must(state.DeregisterCommand(&api.CatalogDeregistration{Node: "n1", ServiceID: "db"}))
	if _, all, _ := m.store().ChecksInState(nil, "any"); len(all) != 0 {
		t.Errorf("the check outlived its service: %v", all)
	}
}

func second(_ uint64, in []*catalog.Instance, _ error) []*catalog.Instance { return in }
func checks(_ uint64, in []*catalog.Check, _ error) []*catalog.Check       { return in }
