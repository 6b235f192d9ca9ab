package state_test

import (
	"bytes"
	"fmt"
	"io"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/hashicorp/consul/api"
	"github.com/hashicorp/go-memdb"
	"github.com/hashicorp/raft"

	"github.com/sluicemesh/sluice/agent/catalog"
	"github.com/sluicemesh/sluice/agent/configentry"
	"github.com/sluicemesh/sluice/agent/connect"
	"github.com/sluicemesh/sluice/agent/state"
)

func lines(b []byte) []string { return strings.Split(strings.TrimSpace(string(b)), "\n") }

// fill writes something into every table.
func fill(m *machine) {
	m.must(node("n1", withID(idA)))
	m.must(node("N2", func(r *api.CatalogRegistration) {
		r.NodeMeta = map[string]string{"z": "1", "a": "2", "m": "3"}
		r.TaggedAddresses = map[string]string{"wan": "1.2.3.4", "lan": "10.0.0.2"}
	}))
	for _, n := range []string{"n1", "n2"} {
		m.must(node(n, with(service("web"))))
		m.must(node(n, with(sidecar("web"))))
		m.must(node(n, with(gateway("gw"))))
		m.must(node(n, withCheck(&catalog.Check{
			CheckID: "c", ServiceID: "web", Status: "passing",
			Definition: api.HealthCheckDefinition{HTTP: "http://x", IntervalDuration: 10e9, Header: map[string][]string{"A": {"b"}}},
		})))
		m.must(node(n, withCheck(check(catalog.NodeCheckID, "", "passing"))))
	}
	m.must(node("n1", with(service("short-lived"))))
	m.must(state.DeregisterCommand(&api.CatalogDeregistration{Node: "n1", ServiceID: "short-lived"}))
	m.must(node("n1", with(service("web-2"))))
	m.must(upsert(&api.ProxyConfigEntry{Kind: configentry.ProxyDefaults, Name: "global", Config: map[string]any{
		"protocol": "http", "nested": map[string]any{"b": 1, "a": []any{"x", 2.5, true, nil}},
	}}))
	m.must(upsert(splitter("web", "web", "web-2")))
	m.must(upsert(&api.ServiceResolverConfigEntry{
		Kind: configentry.ServiceResolver, Name: "web", ConnectTimeout: 3e9,
		Subsets:  map[string]api.ServiceResolverSubset{"v2": {Filter: "Service.Meta.v == 2"}, "v1": {OnlyPassing: true}},
		Failover: map[string]api.ServiceResolverFailover{"*": {Datacenters: []string{"dc2"}}},
	}))
	m.must(upsert(&api.ServiceIntentionsConfigEntry{
		Kind: configentry.ServiceIntentions, Name: "web", Sources: []*api.SourceIntention{{Name: "*", Action: "deny", Precedence: 8, Type: "consul"}},
	}))
	m.must(upsert(&api.MeshConfigEntry{TransparentProxy: api.TransparentProxyMeshConfig{MeshDestinationsOnly: true}}))
	m.must(upsert(&api.ExportedServicesConfigEntry{Name: "default", Services: []api.ExportedService{{Name: "web", Consumers: []api.ServiceConsumer{{Peer: "p"}}}}}))
	m.must(state.FederationStateCommand(&state.FederationState{Datacenter: "dc2", MeshGateways: []*catalog.Instance{remoteGateway("10.2.0.1", 7)}}))
	m.must(state.BatchCommand(
		state.CARootsCommand(0, &connect.Roots{ActiveRootID: "aa", TrustDomain: "x.consul", Roots: []*connect.Root{{ID: "aa", Active: true, RootCert: "pem"}}}),
		state.CAConfigCommand(&connect.CAConfig{ClusterID: "cluster", Provider: "consul", Config: map[string]any{"PrivateKey": "key-in-config"}}),
		state.CAStateCommand(&connect.CAState{RootKeyPEM: "root-key", IntermediateKeyPEM: "intermediate-key", RootCertPEM: "root"}),
	))
}

// everything is what all reads answer.
func everything(s *state.Store) map[string]any {
	out := map[string]any{}
	put := func(name string, idx uint64, v any, err error) {
		out[name] = []any{idx, v, err}
	}
	put2 := func(name string) func(uint64, []*catalog.Instance, error) {
		return func(idx uint64, v []*catalog.Instance, err error) { put(name, idx, v, err) }
	}
	put2("service")(s.Service(nil, catalog.Name("web")))
	put2("gone")(s.Service(nil, catalog.Name("short-lived")))
	put2("connect")(s.Connect(nil, catalog.Name("web")))
	put2("dump")(s.ServiceDump(nil))
	put2("kind")(s.ServicesByKind(nil, api.ServiceKindMeshGateway))
	idx, nodes, err := s.Nodes(nil)
	put("nodes", idx, nodes, err)
	idx, all, err := s.ConnectAll(nil)
	put("connect all", idx, all, err)
	idx, byUUID, err := s.NodeByID(nil, idA)
	put("node by id", idx, byUUID, err)
	idx, chk, err := s.ChecksInState(nil, "passing")
	put("checks", idx, chk, err)
	idx, entries, err := s.AllConfigEntries(nil)
	put("entries", idx, entries, err)
	idx, fss, err := s.FederationStates(nil)
	put("federation", idx, fss, err)
	idx, gws, err := s.MeshGateways(nil, "dc1")
	put("gateways", idx, gws, err)
	idx, roots, err := s.CARoots(nil)
	put("roots", idx, roots, err)
	idx, cfg, err := s.CAConfig(nil)
	put("config", idx, cfg, err)
	idx, st, err := s.CAState(nil)
	put("state", idx, st, err)
	out["last"] = s.LastIndex()
	return out
}

func TestSnapshotRoundTrip(t *testing.T) {
	m := newMachine(t)
	fill(m)
	snap := m.snapshot()
	want := everything(m.store())

	n := newMachine(t)
	n.must(node("leftover"))
	old := n.store()
	ws := memdb.NewWatchSet()
	old.Nodes(ws)
	if err := n.fsm.Restore(io.NopCloser(bytes.NewReader(snap))); err != nil {
		t.Fatal(err)
	}
	if !woken(ws) {
		t.Error("whoever waits on the old store was not woken")
	}
	select {
	case <-old.AbandonCh():
	default:
		t.Error("the old store is not marked as abandoned")
	}
	if n.store() == old {
		t.Fatal("the store was not replaced")
	}
	if diff := cmp.Diff(want, everything(n.store())); diff != "" {
		t.Error(diff)
	}
	_, st, _ := n.store().CAState(nil)
	_, cfg, _ := n.store().CAConfig(nil)
	if st.RootKeyPEM.Reveal() != "root-key" || st.IntermediateKeyPEM.Reveal() != "intermediate-key" || cfg.ClusterID != "cluster" || cfg.Config["PrivateKey"] != "key-in-config" {
		t.Errorf("secrets did not survive: %q, %q, %+v", st.RootKeyPEM.Reveal(), st.IntermediateKeyPEM.Reveal(), cfg)
	}
	// Both go on alike: nothing that a write depends on was lost.
	n.index = m.index
	for _, c := range []state.Command{
		node("n1", withCheck(check("c", "web", "critical"))),
		node("n2", with(service("web"))), // a write of what is there
		state.DeregisterCommand(&api.CatalogDeregistration{Node: "n2", ServiceID: "gw"}),
		upsert(splitter("web", "web", "web-2")),
	} {
		m.must(c)
		n.must(c)
	}
	if diff := cmp.Diff(lines(m.snapshot()), lines(n.snapshot())); diff != "" {
		t.Error(diff)
	}
}

// TestDeterminism: the same log makes the same bytes.
func TestDeterminism(t *testing.T) {
	m := newMachine(t)
	fill(m)
	want := m.snapshot()
	for range 5 {
		again := newMachine(t)
		for _, l := range m.log {
			again.fsm.Apply(l)
		}
		if got := again.snapshot(); !bytes.Equal(got, want) {
			t.Fatal(cmp.Diff(lines(want), lines(got)))
		}
	}
}

func TestRestoreRefuses(t *testing.T) {
	m := newMachine(t)
	fill(m)
	whole := lines(m.snapshot())
	for name, in := range map[string][]string{
		"nothing":         nil,
		"another format":  {`{"Format":"other","Version":1}`},
		"a later version": append([]string{strings.Replace(whole[0], `"Version":1`, `"Version":2`, 1)}, whole[1:]...),
		"cut off":         whole[:len(whole)-1],
		"a line missing":  append(append([]string{}, whole[:5]...), whole[6:]...),
		"unknown record":  append(append([]string{whole[0], `{"Type":"martian","Data":1}`}, whole[1:len(whole)-1]...), fmt.Sprintf(`{"Type":"end","Data":%d}`, len(whole)-1)),
		"not JSON":        {whole[0], "{"},
		"a bare service":  {whole[0], `{"Type":"service","Data":{"Node":"x","Service":{"ID":"a"}}}`, `{"Type":"end","Data":1}`},
		"an empty view":   {whole[0], `{"Type":"view","Data":{"Type":"service","Name":"x","Index":1}}`, `{"Type":"end","Data":1}`},
	} {
		t.Run(name, func(t *testing.T) {
			n := newMachine(t)
			n.must(node("stays"))
			if err := n.fsm.Restore(io.NopCloser(strings.NewReader(strings.Join(in, "\n")))); err == nil {
				t.Error("accepted")
			}
			if _, x, _ := n.store().Node(nil, "stays"); x == nil {
				t.Error("a snapshot that was refused replaced the store")
			}
		})
	}
}

func TestPersistCancels(t *testing.T) {
	m := newMachine(t)
	fill(m)
	snap, err := m.fsm.Snapshot()
	if err != nil {
		t.Fatal(err)
	}
	defer snap.Release()
	sink := &memorySink{limit: 100}
	if err := snap.Persist(sink); err == nil || !sink.cancelled || sink.closed {
		t.Errorf("error %v, cancelled %v, closed %v", err, sink.cancelled, sink.closed)
	}
}

// TestSnapshotIsAMoment: writes after Snapshot do not show in it.
func TestSnapshotIsAMoment(t *testing.T) {
	m := newMachine(t)
	m.must(node("n1"))
	want := m.snapshot()
	snap, err := m.fsm.Snapshot()
	if err != nil {
		t.Fatal(err)
	}
	defer snap.Release()
	m.must(node("n2"))
	sink := &memorySink{}
	if err := snap.Persist(sink); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(lines(want), lines(sink.Bytes())); diff != "" {
		t.Error(diff)
	}
}

func TestApplyMeetsTheUnknown(t *testing.T) {
	f := state.NewFSM(nil)
	for _, data := range []string{
		"", "\x01", "\x01\x01{", "\x01\x01{\"Checks\":[null]}", "\x01\x03{}",
		"\x01\x03{\"Op\":\"upsert\",\"Kind\":\"mars\",\"Entry\":{}}",
		"\x01\x03{\"Op\":\"upsert\",\"Kind\":\"service-defaults\",\"Entry\":{\"Kind\":\"mesh\"}}",
		"\x01\x04{}", "\x01\x04{\"Datacenter\":\"x\",\"MeshGateways\":[{}]}", "\x01\x06{}", "\x01\x06{\"Roots\":{\"Roots\":[null]}}",
		"\x01\x0a[{\"Type\":10,\"Data\":[]}]",
	} {
		if err, _ := f.Apply(&raft.Log{Index: 1, Data: []byte(data)}).(error); err == nil {
			t.Errorf("a damaged command was applied: %q", data)
		}
	}
	for name, data := range map[string][]byte{"version": {2, 1, '{', '}'}, "type": {1, 200, '{', '}'}} {
		t.Run(name, func(t *testing.T) {
			defer func() {
				if recover() == nil {
					t.Error("a command of a newer server was passed over")
				}
			}()
			f.Apply(&raft.Log{Index: 2, Data: data})
		})
	}
}

func FuzzDecodeCommand(f *testing.F) {
	m := newMachine(f)
	fill(m)
	for _, l := range m.log {
		f.Add(l.Data)
	}
	f.Add([]byte{})
	f.Add([]byte{1, 3, '{', '}'})
	f.Fuzz(func(t *testing.T, data []byte) {
		c, err := state.DecodeCommand(data)
		if err != nil {
			return
		}
		// What decodes can be written, read again the same, and applied.
		again, err := c.Encode()
		if err != nil {
			t.Fatal(err)
		}
		d, err := state.DecodeCommand(again)
		if err != nil {
			t.Fatal(err)
		}
		third, err := d.Encode()
		if err != nil || !bytes.Equal(again, third) {
			t.Fatalf("not stable: %q, %q, %v", again, third, err)
		}
		fsm := state.NewFSM(nil)
		fsm.Apply(&raft.Log{Index: 1, Data: data})
		fsm.Apply(&raft.Log{Index: 2, Data: again})
		snap, err := fsm.Snapshot()
		if err != nil {
			t.Fatal(err)
		}
		sink := &memorySink{}
		if err := snap.Persist(sink); err != nil {
			t.Fatal(err)
		}
		if err := state.NewFSM(nil).Restore(io.NopCloser(&sink.Buffer)); err != nil {
			t.Fatalf("restore %q: %v", sink.Bytes(), err)
		}
	})
}
