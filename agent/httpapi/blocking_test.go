package httpapi

import (
	"context"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/consul/api"
	"github.com/hashicorp/go-memdb"

	"github.com/sluicemesh/sluice/agent/catalog"
	"github.com/sluicemesh/sluice/agent/connect"
	"github.com/sluicemesh/sluice/agent/state"
)

func registerWeb(node string, port int) state.Command {
	return state.RegisterCommand(&api.CatalogRegistration{
		Node: node, Address: "10.0.0.1", Service: &api.AgentService{ID: "web-" + node, Service: "web", Port: port},
	})
}

// later runs f after d, as another goroutine of the test.
func later(t *testing.T, d time.Duration, f func()) {
	t.Helper()
	done := make(chan struct{})
	timer := time.AfterFunc(d, func() { defer close(done); f() })
	t.Cleanup(func() {
		if !timer.Stop() {
			<-done
		}
	})
}

func TestBlockingQueryWithTheRealClient(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cluster := newFakeServer()
		s := newServer(t, cluster, nil)
		cluster.must(t, registerWeb("n1", 1))
		_, meta, err := s.api.Health().Service("web", "", false, nil)
		if err != nil {
			t.Fatal(err)
		}
		if meta.LastIndex != 11 || !meta.KnownLeader {
			t.Fatalf("meta = %+v", meta)
		}
		later(t, 3*time.Minute, func() { cluster.must(t, registerWeb("n1", 2)) })
		began := time.Now()
		entries, meta, err := s.api.Health().Service("web", "", false, &api.QueryOptions{WaitIndex: meta.LastIndex, WaitTime: 5 * time.Minute})
		if err != nil {
			t.Fatal(err)
		}
		if took := time.Since(began); took != 3*time.Minute {
			t.Errorf("woken after %v", took)
		}
		if len(entries) != 1 || entries[0].Service.Port != 2 || meta.LastIndex != 12 {
			t.Errorf("got %d entries at index %d", len(entries), meta.LastIndex)
		}
	})
}

func TestBlockingTimes(t *testing.T) {
	for _, c := range []struct {
		query    string
		min, max time.Duration
	}{
		{"index=99", 300 * time.Second, 319 * time.Second},
		{"index=99&wait=16s", 16 * time.Second, 17 * time.Second},
		{"index=99&wait=9h", 600 * time.Second, 638 * time.Second},
		{"index=0&wait=16s", 0, 0},
		{"wait=16s", 0, 0},
		{"index=1&wait=16s", 0, 0},
	} {
		t.Run(c.query, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				cluster := newFakeServer()
				s := newServer(t, cluster, nil)
				cluster.must(t, registerWeb("n1", 1))
				began := time.Now()
				a := s.do(t, "GET", "/v1/catalog/nodes?"+c.query, "")
				if took := time.Since(began); took < c.min || took > c.max {
					t.Errorf("took %v, want %v to %v", took, c.min, c.max)
				}
				if a.code != 200 || a.header.Get("X-Consul-Index") != "11" {
					t.Errorf("answer %d at index %s", a.code, a.header.Get("X-Consul-Index"))
				}
			})
		})
	}
}

func TestWhatIsMissingDoesNotBusyLoop(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cluster := newFakeServer()
		s := newServer(t, cluster, nil)
		write := func(name string) {
			cluster.must(t, state.ConfigEntryCommand(state.ConfigEntryUpsert, &api.ServiceConfigEntry{Kind: api.ServiceDefaults, Name: name, Protocol: "http"}, 0))
		}
		write("other")
		a := s.do(t, "GET", "/v1/config/service-defaults/web", "")
		a.want(t, 404, `Config entry not found for "service-defaults" / "web"`)
		index := a.header.Get("X-Consul-Index")
		if index != "11" {
			t.Fatalf("index of what is missing = %s", index)
		}
		// Its neighbours change each second; it appears after a minute.
		for i := range 59 {
			later(t, time.Duration(i+1)*time.Second, func() { write("other-" + strconv.Itoa(i)) })
		}
		later(t, time.Minute, func() { write("web") })
		began := time.Now()
		a = s.do(t, "GET", "/v1/config/service-defaults/web?index="+index, "")
		if took := time.Since(began); took != time.Minute || a.code != 200 {
			t.Errorf("answer %d after %v, want 200 after a minute", a.code, took)
		}
	})
}

// TestBlockingOnAServerThatIsBehind asks a server that has not read its log yet
// for what its client has seen. By the time the query looks again the server has
// read it all, and what the client saw is gone: that is news.
func TestBlockingOnAServerThatIsBehind(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newServer(t, newFakeServer(), nil)
		c := &call{
			h: s.Handler, r: httptest.NewRequestWithContext(t.Context(), "GET", "/", nil), route: &route{scope: scopeAgent},
			opts: options{wait: time.Minute},
		}
		const seen = 45
		caughtUp := make(chan struct{})
		later(t, time.Second, func() { close(caughtUp) })
		began := time.Now()
		index, _, err := c.wait(seen, nil, func(ws memdb.WatchSet) (uint64, any, error) {
			select {
			case <-caughtUp:
				return seen + 5, nil, status(404, "gone")
			default:
				ws.Add(caughtUp)
				return 1, nil, status(404, "not read yet")
			}
		})
		if took := time.Since(began); took != time.Second || index != seen+5 || !isNotFound(err) {
			t.Errorf("answer of index %d (%v) after %v, want 404 of %d after a second", index, err, took, seen+5)
		}
	})
}

func TestBlockingEndsWithTheClient(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newServer(t, newFakeServer(), nil)
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		req, err := http.NewRequestWithContext(ctx, "GET", "http://agent/v1/catalog/nodes?index=99", nil)
		if err != nil {
			t.Fatal(err)
		}
		resp, err := s.Transport().RoundTrip(req)
		if !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("RoundTrip = %v, %v", resp, err)
		}
		s.Wait() // the handler has ended too, or this never returns
	})
}

func TestBlockingOnALeaderThatStops(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cluster := newFakeServer()
		cluster.forward = func(Target) (http.RoundTripper, error) { return nil, state.ErrNoLeader }
		s := newServer(t, cluster, nil)
		later(t, time.Minute, func() { cluster.setLeader(false, "") })
		began := time.Now()
		a := s.do(t, "GET", "/v1/catalog/nodes?index=99", "")
		a.want(t, 500, "No cluster leader")
		if took := time.Since(began); took > time.Minute+leaderCheck+time.Second {
			t.Errorf("noticed after %v", took)
		}
		// Who takes stale answers does not mind.
		later(t, time.Minute, func() { cluster.setLeader(true, "") })
		a = s.do(t, "GET", "/v1/catalog/nodes?stale&index=99&wait=30s", "")
		if a.code != 200 || a.header.Get("X-Consul-Knownleader") != "false" {
			t.Errorf("stale answer: %d, %v", a.code, a.header)
		}
	})
}

func TestRestoreWakesQueries(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cluster := newFakeServer()
		s := newServer(t, cluster, nil)
		cluster.must(t, registerWeb("n1", 1))
		snap, err := cluster.fsm.Snapshot()
		if err != nil {
			t.Fatal(err)
		}
		sink := &memSink{}
		if err := snap.Persist(sink); err != nil {
			t.Fatal(err)
		}
		cluster.must(t, registerWeb("n2", 1))
		later(t, time.Minute, func() {
			if err := cluster.fsm.Restore(sink); err != nil {
				t.Error(err)
			}
		})
		began := time.Now()
		a := s.do(t, "GET", "/v1/catalog/service/web?index=12", "")
		if took := time.Since(began); took != time.Minute {
			t.Errorf("answered after %v, want a minute", took)
		}
		if got := decode[[]api.CatalogService](t, a); len(got) != 1 || a.header.Get("X-Consul-Index") != "11" {
			t.Errorf("got %d instances at index %s, want the restored one", len(got), a.header.Get("X-Consul-Index"))
		}
	})
}

// memSink is a snapshot in memory, written once and then read once.
type memSink struct{ strings.Builder }

func (*memSink) ID() string    { return "mem" }
func (*memSink) Cancel() error { return nil }
func (*memSink) Close() error  { return nil }
func (m *memSink) Read(p []byte) (int, error) {
	rest := m.String()
	n := copy(p, rest)
	m.Reset()
	m.WriteString(rest[n:])
	if n == 0 {
		return 0, io.EOF
	}
	return n, nil
}

func TestConsistentReads(t *testing.T) {
	cluster := newFakeServer()
	s := newServer(t, cluster, nil)
	level := func(query string) string {
		t.Helper()
		a := s.do(t, "GET", "/v1/catalog/nodes?"+query, "")
		if a.code != 200 {
			t.Fatalf("%s: %d %q", query, a.code, a.body)
		}
		return a.header.Get("X-Consul-Effective-Consistency")
	}
	for query, want := range map[string]string{"": "leader", "stale": "stale", "consistent": "consistent", "stale&leader": "leader", "max_stale=5s": "stale"} {
		if got := level(query); got != want {
			t.Errorf("?%s: consistency %q, want %q", query, got, want)
		}
	}
	if a := s.do(t, "GET", "/v1/internal/federation-states", ""); a.header.Get("X-Consul-Effective-Consistency") != "" {
		t.Error("consistency named where Consul does not")
	}
	cluster.verify = state.ErrNoLeader
	s.do(t, "GET", "/v1/catalog/nodes?consistent", "").want(t, 500, "No cluster leader")
}

func TestServiceHash(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newServer(t, newFakeServer(), nil)
		put := func(port int) {
			s.agent.change(func() {
				s.agent.services["web"] = &catalog.Service{ID: "web", Service: "web", Port: port}
			})
		}
		put(1)
		svc, meta, err := s.api.Agent().Service("web", nil)
		if err != nil {
			t.Fatal(err)
		}
		if svc.ContentHash == "" || meta.LastContentHash != svc.ContentHash || svc.Datacenter != "dc1" || svc.Tags == nil {
			t.Fatalf("service = %+v, meta = %+v", svc, meta)
		}
		later(t, time.Minute, func() { put(1) }) // wakes, and changes nothing
		later(t, 2*time.Minute, func() { put(2) })
		began := time.Now()
		next, _, err := s.api.Agent().Service("web", &api.QueryOptions{WaitHash: svc.ContentHash, WaitTime: 5 * time.Minute})
		if err != nil || next.Port != 2 || next.ContentHash == svc.ContentHash {
			t.Errorf("next = %+v, %v", next, err)
		}
		if took := time.Since(began); took != 2*time.Minute {
			t.Errorf("answered after %v", took)
		}
		began = time.Now()
		same := s.do(t, "GET", "/v1/agent/service/web?wait=16s&hash="+next.ContentHash, "")
		if took := time.Since(began); same.code != 200 || took < 16*time.Second || took > 17*time.Second {
			t.Errorf("answer %d after %v", same.code, took)
		}
		s.do(t, "GET", "/v1/agent/service/none?hash=x", "").want(t, 404, "unknown service ID: none")
	})
}

func TestLeafAndRoots(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newServer(t, newFakeServer(), func(c *Config) { c.HoldTimeout = 7 * time.Second })
		s.do(t, "GET", "/v1/agent/connect/ca/roots", "").want(t, 500, "CA has not finished initializing")
		a := s.do(t, "GET", "/v1/agent/connect/ca/leaf/web", "")
		a.want(t, 500, `sign a certificate for service "web": not known yet`)

		later(t, time.Second, func() {
			s.agent.change(func() {
				s.agent.roots = &connect.Roots{ActiveRootID: "r1", TrustDomain: "td", Roots: []*connect.Root{{ID: "r1", Active: true, RootCert: "PEM"}}}
				s.agent.leaf = &connect.Leaf{SerialNumber: "01", CertPEM: "CERT", PrivateKeyPEM: "KEY", Service: "web", ModifyIndex: 5}
			})
		})
		leaf, meta, err := s.api.Agent().ConnectCALeaf("web", nil)
		if err != nil {
			t.Fatal(err)
		}
		if leaf.PrivateKeyPEM != "KEY" || leaf.CertPEM != "CERT" || meta.LastIndex != 5 || meta.CacheHit {
			t.Errorf("leaf = %+v, meta = %+v", leaf, meta)
		}
		roots, meta, err := s.api.Agent().ConnectCARoots(nil)
		if err != nil {
			t.Fatal(err)
		}
		if roots.ActiveRootID != "r1" || roots.TrustDomain != "td" || len(roots.Roots) != 1 || roots.Roots[0].RootCertPEM != "PEM" || meta.LastIndex != 7 || !meta.CacheHit || !meta.KnownLeader {
			t.Errorf("roots = %+v, meta = %+v", roots, meta)
		}
		later(t, time.Minute, func() {
			s.agent.change(func() { s.agent.leaf = &connect.Leaf{SerialNumber: "02", Service: "web", ModifyIndex: 6} })
		})
		began := time.Now()
		leaf, _, err = s.api.Agent().ConnectCALeaf("web", &api.QueryOptions{WaitIndex: 5})
		if err != nil || leaf.SerialNumber != "02" || time.Since(began) != time.Minute {
			t.Errorf("next leaf %+v, %v after %v", leaf, err, time.Since(began))
		}
	})
}
