package view_test

import (
	"bytes"
	"errors"
	"io"
	"net/http"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/consul/api"
	"github.com/hashicorp/go-memdb"
	"github.com/hashicorp/raft"

	"github.com/sluicemesh/sluice/agent/catalog"
	"github.com/sluicemesh/sluice/agent/configentry"
	"github.com/sluicemesh/sluice/agent/connect"
	"github.com/sluicemesh/sluice/agent/state"
	"github.com/sluicemesh/sluice/agent/view"
)

// oneLeaf has a certificate for every service.
type oneLeaf struct{}

func (oneLeaf) Leaf(_ memdb.WatchSet, s catalog.ServiceName) (*connect.Leaf, catalog.Freshness, error) {
	return &connect.Leaf{Service: s.Name}, catalog.Freshness{Index: 1}, nil
}

func applyAll(t *testing.T, fsm *state.FSM, from uint64, cmds ...state.Command) {
	t.Helper()
	for i, c := range cmds {
		data, err := c.Encode()
		if err != nil {
			t.Fatal(err)
		}
		if res := fsm.Apply(&raft.Log{Index: from + uint64(i), Data: data}); res != true {
			t.Fatalf("command %d: %v", i, res)
		}
	}
}

func TestLocal(t *testing.T) {
	bubble(t, func(t *testing.T, s *servers, remote *view.Remote) {
		fsm := state.NewFSM(nil)
		ready := make(chan struct{})
		lag := 3 * time.Second
		l := view.NewLocal(view.LocalConfig{
			Store: fsm.Store, LastContact: func() time.Duration { return lag },
			Remote: remote, Leaves: oneLeaf{}, Datacenter: "dc1", Ready: ready,
		})
		ws := memdb.NewWatchSet()
		if _, _, err := l.ConnectAll(ws); !errors.Is(err, catalog.ErrPending) || woken(ws) {
			t.Errorf("before it is ready: %v, woken %v", err, woken(ws))
		}
		close(ready)
		if !woken(ws) {
			t.Error("not woken when ready")
		}
		ws = memdb.NewWatchSet()
		if _, _, err := l.Roots(ws); !errors.Is(err, catalog.ErrPending) {
			t.Errorf("roots before the CA: %v", err)
		}
		if all, _, err := l.ConnectAll(nil); err != nil || all == nil || len(all) != 0 {
			t.Errorf("got %v, %v, want known to be empty", all, err)
		}

		proxy := &catalog.Service{Kind: api.ServiceKindConnectProxy, Service: "web-proxy", Proxy: &api.AgentServiceConnectProxyConfig{DestinationServiceName: "web"}}
		gw := &catalog.Service{Kind: api.ServiceKindMeshGateway, Service: "gw"}
		applyAll(t, fsm, 10,
			state.RegisterCommand(&api.CatalogRegistration{Node: "n", Address: "a", Service: proxy}),
			state.RegisterCommand(&api.CatalogRegistration{Node: "n", Address: "a", Service: gw}),
			state.CARootsCommand(0, &connect.Roots{ActiveRootID: "aa", Roots: []*connect.Root{{ID: "aa", Active: true}}}),
			state.ConfigEntryCommand(state.ConfigEntryUpsert, &api.ServiceIntentionsConfigEntry{
				Kind: configentry.ServiceIntentions, Name: "*", Sources: []*api.SourceIntention{{Name: "*", Action: "deny"}},
			}, 0),
		)
		if !woken(ws) {
			t.Error("the first roots woke nobody")
		}
		if roots, fresh, err := l.Roots(nil); err != nil || roots.ActiveRootID != "aa" || fresh.Index != 12 || !fresh.AsOf.Equal(time.Now().Add(-lag)) {
			t.Errorf("roots: %v, %+v, %v", roots, fresh, err)
		}
		if in, fresh, err := l.Connect(nil, "dc1", catalog.Name("web")); err != nil || len(in) != 1 || fresh.Index != 10 {
			t.Errorf("connect: %v, %+v, %v", in, fresh, err)
		}
		if all, _, err := l.ConnectAll(nil); err != nil || len(all[catalog.Name("web")]) != 1 {
			t.Errorf("connect all: %v, %v", all, err)
		}
		if gws, _, err := l.MeshGateways(nil); err != nil || len(gws["dc1"]) != 1 {
			t.Errorf("gateways: %v, %v", gws, err)
		}
		ws = memdb.NewWatchSet()
		if in, fresh, err := l.Intentions(ws, catalog.Name("web")); err != nil || len(in) != 1 || fresh.Index != 13 {
			t.Errorf("intentions: %v, %+v, %v", in, fresh, err)
		}
		if es, _, err := l.ConfigEntries(nil, configentry.ServiceIntentions); err != nil || len(es) != 1 {
			t.Errorf("entries: %v, %v", es, err)
		}
		if leaf, _, err := l.Leaf(nil, catalog.Name("web")); err != nil || leaf.Service != "web" {
			t.Errorf("leaf: %v, %v", leaf, err)
		}

		// Another datacenter is asked, and only about what only it knows.
		s.set(webPath+"?dc=dc2", 5, []*catalog.Instance{instance("far", "web")})
		l.Connect(nil, "dc2", catalog.Name("web"))
		synctest.Wait()
		if in, _, err := l.Connect(nil, "dc2", catalog.Name("web")); err != nil || in[0].Node.Node != "far" {
			t.Errorf("dc2: %v, %v", in, err)
		}
		if n := s.asked("/"); n != 1 {
			t.Errorf("%d requests, want one", n)
		}

		// A restored snapshot wakes readers, who then see the new store.
		snap, err := state.NewFSM(nil).Snapshot()
		if err != nil {
			t.Fatal(err)
		}
		defer snap.Release()
		sink := &memorySink{}
		if err := snap.Persist(sink); err != nil {
			t.Fatal(err)
		}
		if err := fsm.Restore(io.NopCloser(&sink.Buffer)); err != nil {
			t.Fatal(err)
		}
		if in, _, err := l.Intentions(nil, catalog.Name("web")); !woken(ws) || err != nil || len(in) != 0 {
			t.Errorf("after a restore: woken %v, %v, %v", woken(ws), in, err)
		}
	})
}

func TestRemoteLeaf(t *testing.T) {
	r := view.NewRemote(view.RemoteConfig{Client: http.DefaultClient, Leaves: oneLeaf{}})
	if leaf, _, err := r.Leaf(nil, catalog.Name("web")); err != nil || leaf.Service != "web" {
		t.Errorf("got %v, %v", leaf, err)
	}
}

type memorySink struct{ bytes.Buffer }

func (s *memorySink) ID() string    { return "memory" }
func (s *memorySink) Close() error  { return nil }
func (s *memorySink) Cancel() error { return nil }
