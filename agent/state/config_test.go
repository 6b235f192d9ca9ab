package state_test

import (
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/hashicorp/consul/api"
	"github.com/hashicorp/go-memdb"

	"github.com/sluicemesh/sluice/agent/configentry"
	"github.com/sluicemesh/sluice/agent/state"
)

func defaults(name, protocol string) *api.ServiceConfigEntry {
	return &api.ServiceConfigEntry{Kind: configentry.ServiceDefaults, Name: name, Protocol: protocol}
}

func splitter(name string, to ...string) *api.ServiceSplitterConfigEntry {
	e := &api.ServiceSplitterConfigEntry{Kind: configentry.ServiceSplitter, Name: name}
	for _, s := range to {
		e.Splits = append(e.Splits, api.ServiceSplit{Weight: float32(100 / len(to)), Service: s})
	}
	return e
}

func upsert(e configentry.Entry) state.Command {
	return state.ConfigEntryCommand(state.ConfigEntryUpsert, e, 0)
}

func TestConfigEntryCAS(t *testing.T) {
	// The entry was written at index 11, if it is there.
	for _, c := range []struct {
		name   string
		exists bool
		op     state.ConfigEntryOp
		entry  configentry.Entry
		index  uint64
		want   bool
		moves  bool
	}{
		{"create", false, state.ConfigEntryUpsert, defaults("web", "http"), 0, true, true},
		{"replace", true, state.ConfigEntryUpsert, defaults("web", "grpc"), 0, true, true},
		{"same again", true, state.ConfigEntryUpsert, defaults("web", "http"), 0, true, false},
		{"cas 0, absent", false, state.ConfigEntryUpsertCAS, defaults("web", "http"), 0, true, true},
		{"cas 0, present", true, state.ConfigEntryUpsertCAS, defaults("web", "grpc"), 0, false, false},
		{"cas match", true, state.ConfigEntryUpsertCAS, defaults("web", "grpc"), 11, true, true},
		{"cas miss", true, state.ConfigEntryUpsertCAS, defaults("web", "grpc"), 10, false, false},
		{"cas, absent", false, state.ConfigEntryUpsertCAS, defaults("web", "grpc"), 11, false, false},
		{"cas miss, same", true, state.ConfigEntryUpsertCAS, defaults("web", "http"), 3, true, false},
		{"cas 0, same", true, state.ConfigEntryUpsertCAS, defaults("web", "http"), 0, true, false},
		{"delete", true, state.ConfigEntryDelete, defaults("WEB", ""), 0, true, true},
		{"delete absent", false, state.ConfigEntryDelete, defaults("web", ""), 0, true, false},
		{"delete cas match", true, state.ConfigEntryDeleteCAS, defaults("web", ""), 11, true, true},
		{"delete cas miss", true, state.ConfigEntryDeleteCAS, defaults("web", ""), 10, false, false},
		{"delete cas absent", false, state.ConfigEntryDeleteCAS, defaults("web", ""), 10, true, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			m := newMachine(t)
			if c.exists {
				m.must(upsert(defaults("web", "http")))
			}
			ws := memdb.NewWatchSet()
			before, old, _ := m.store().ConfigEntry(ws, configentry.ServiceDefaults, "web")
			if res := m.apply(state.ConfigEntryCommand(c.op, c.entry, c.index)); res != c.want {
				t.Errorf("got %v, want %v", res, c.want)
			}
			idx, now, _ := m.store().ConfigEntry(nil, configentry.ServiceDefaults, "web")
			if woken(ws) != c.moves || (idx != before) != c.moves {
				t.Errorf("woken %v, index from %d to %d, want a change: %v", woken(ws), before, idx, c.moves)
			}
			if now != nil && old != nil && c.moves && (now.GetCreateIndex() != old.GetCreateIndex() || now.GetModifyIndex() != m.index) {
				t.Errorf("indexes %d, %d", now.GetCreateIndex(), now.GetModifyIndex())
			}
			if c.moves && old != nil && old.GetModifyIndex() != 11 {
				t.Error("a record that was handed out has changed")
			}
		})
	}
}

func TestConfigEntryReads(t *testing.T) {
	m := newMachine(t)
	m.must(upsert(defaults("b", "")))
	m.must(upsert(defaults("a", "")))
	m.must(upsert(&api.MeshConfigEntry{}))
	web := memdb.NewWatchSet()
	m.store().ConfigEntry(web, configentry.ServiceDefaults, "a")
	absent := memdb.NewWatchSet()
	m.store().ConfigEntry(absent, configentry.ServiceResolver, "a")
	kind := memdb.NewWatchSet()
	_, list, _ := m.store().ConfigEntries(kind, configentry.ServiceDefaults)
	if len(list) != 2 || list[0].GetName() != "a" {
		t.Errorf("got %v", list)
	}
	_, all, _ := m.store().AllConfigEntries(nil)
	if len(all) != 3 || all[0].GetKind() != configentry.Mesh {
		t.Errorf("got %v", all)
	}
	if _, list, _ := m.store().ConfigEntries(nil, "nope"); list == nil || len(list) != 0 {
		t.Errorf("got %v, want an empty list", list)
	}
	m.must(upsert(defaults("b", "http")))
	if woken(web) || !woken(kind) {
		t.Errorf("after a change of another entry: one %v, list %v", woken(web), woken(kind))
	}
	m.must(upsert(&api.ServiceResolverConfigEntry{Kind: configentry.ServiceResolver, Name: "a"}))
	if !woken(absent) {
		t.Error("whoever waits for an entry to appear was not woken")
	}
}

// TestGraph: a write is refused when any chain it has a part in would break.
func TestGraph(t *testing.T) {
	proxyHTTP := &api.ProxyConfigEntry{Kind: configentry.ProxyDefaults, Name: configentry.Global, Config: map[string]any{"protocol": "http"}}
	redirect := func(name, to string) configentry.Entry {
		return &api.ServiceResolverConfigEntry{Kind: configentry.ServiceResolver, Name: name, Redirect: &api.ServiceResolverRedirect{Service: to}}
	}
	const tcp = `does not permit advanced routing or splitting behavior`
	for _, c := range []struct {
		name   string
		before []configentry.Entry
		cmd    state.Command
		ok     bool
	}{
		{"a splitter needs http", nil, upsert(splitter("web", "web")), false},
		{"has it from service-defaults", []configentry.Entry{defaults("web", "http")}, upsert(splitter("web", "web")), true},
		{"has it from proxy-defaults", []configentry.Entry{proxyHTTP}, upsert(splitter("web", "web")), true},
		{"protocol taken away", []configentry.Entry{defaults("web", "http"), splitter("web", "web")}, upsert(defaults("web", "tcp")), false},
		{"defaults deleted", []configentry.Entry{defaults("web", "http"), splitter("web", "web")},
			state.ConfigEntryCommand(state.ConfigEntryDelete, defaults("web", ""), 0), false},
		{"proxy-defaults deleted", []configentry.Entry{proxyHTTP, splitter("web", "web")},
			state.ConfigEntryCommand(state.ConfigEntryDelete, proxyHTTP, 0), false},
		{"a split's protocol changes", []configentry.Entry{defaults("web", "http"), defaults("v2", "http"), splitter("web", "web", "v2")},
			upsert(defaults("v2", "grpc")), false},
		{"two hops away", []configentry.Entry{
			defaults("a", "http"), defaults("b", "http"), defaults("c", "http"), splitter("a", "a", "b"), redirect("b", "c"),
		}, upsert(defaults("c", "grpc")), false},
		{"unrelated", []configentry.Entry{defaults("web", "http"), splitter("web", "web")}, upsert(defaults("other", "tcp")), true},
		{"redirects in a circle", []configentry.Entry{redirect("a", "b")}, upsert(redirect("b", "a")), false},
		{"a replica takes what it gets", nil, state.ConfigEntryCommand(state.ConfigEntryReplicate, splitter("web", "web"), 0), true},
		{"a batch in any order", nil, state.BatchCommand(upsert(splitter("web", "web")), upsert(defaults("web", "http"))), true},
		{"a batch that does not add up", nil, state.BatchCommand(upsert(defaults("web", "tcp")), upsert(splitter("web", "web"))), false},
	} {
		t.Run(c.name, func(t *testing.T) {
			m := newMachine(t)
			for _, e := range c.before {
				m.must(upsert(e))
			}
			before := lines(m.snapshot())[1:]
			res := m.apply(c.cmd)
			if _, failed := res.(error); failed == c.ok {
				t.Fatalf("got %v, want success %v", res, c.ok)
			}
			if diff := cmp.Diff(before, lines(m.snapshot())[1:]); !c.ok && diff != "" {
				t.Errorf("what was refused changed the state:\n%s", diff)
			}
		})
	}
	m := newMachine(t)
	m.refuse(upsert(splitter("web", "web")), `discovery chain "web" uses a protocol "tcp" that `+tcp)
}

func TestBatchIsAllOrNothing(t *testing.T) {
	m := newMachine(t)
	m.must(upsert(defaults("web", "http")))
	res := m.apply(state.BatchCommand(node("n1"), state.ConfigEntryCommand(state.ConfigEntryUpsertCAS, defaults("web", "grpc"), 5)))
	if res != false {
		t.Errorf("got %v, want false", res)
	}
	m.refuse(state.BatchCommand(node("n1"), node("")), "command 1 of a batch: Must provide node")
	if _, n, _ := m.store().Node(nil, "n1"); n != nil {
		t.Error("half a batch was applied")
	}
	if _, err := state.BatchCommand(state.BatchCommand()).Encode(); err == nil {
		t.Error("a batch within a batch was encoded")
	}
}

func TestEntriesKeepTheirTenancy(t *testing.T) {
	m := newMachine(t)
	other := defaults("web", "grpc")
	other.Namespace = "team"
	m.must(upsert(defaults("web", "http")))
	m.must(upsert(other))
	_, a, _ := m.store().ConfigEntry(nil, configentry.ServiceDefaults, "web")
	_, b, _ := m.store().ConfigEntry(nil, configentry.ServiceDefaults, "default/team/web")
	if a.(*api.ServiceConfigEntry).Protocol != "http" || b.(*api.ServiceConfigEntry).Protocol != "grpc" {
		t.Errorf("got %+v and %+v", a, b)
	}
}
