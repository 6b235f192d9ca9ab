package view_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/hashicorp/consul/api"
	"github.com/hashicorp/go-memdb"

	"github.com/sluicemesh/sluice/agent/catalog"
	"github.com/sluicemesh/sluice/agent/configentry"
	"github.com/sluicemesh/sluice/agent/connect"
	"github.com/sluicemesh/sluice/agent/view"
	"github.com/sluicemesh/sluice/proxycfg"
)

var (
	_ proxycfg.Source = (*view.Remote)(nil)
	_ proxycfg.Source = (*view.Local)(nil)
)

// servers answer blocking queries from a table, as the agent's own API would.
type servers struct {
	mu       sync.Mutex
	answers  map[string]reply // by path and parameters but those of blocking
	changed  chan struct{}
	requests []string
	broken   error // what requests fail with
	header   func(h http.Header, stale bool)
	deaf     bool // never block
}

type reply struct {
	status int
	index  uint64
	body   string
}

func newServers() *servers {
	return &servers{answers: map[string]reply{}, changed: make(chan struct{})}
}

// change runs f and wakes all that block.
func (s *servers) change(f func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f()
	close(s.changed)
	s.changed = make(chan struct{})
}

func (s *servers) set(path string, index uint64, v any) {
	body, ok := v.(string)
	if !ok {
		b, err := json.Marshal(v)
		if err != nil {
			panic(err)
		}
		body = string(b)
	}
	s.change(func() { s.answers[path] = reply{200, index, body} })
}

func (s *servers) fail(err error) { s.change(func() { s.broken = err }) }

// asked returns how many requests there were, since the last time, whose path
// begins so.
func (s *servers) asked(prefix string) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := 0
	for _, r := range s.requests {
		if strings.HasPrefix(r, prefix) {
			n++
		}
	}
	s.requests = nil
	return n
}

func (s *servers) RoundTrip(req *http.Request) (*http.Response, error) {
	params := req.URL.Query()
	index, _ := strconv.ParseUint(params.Get("index"), 10, 64)
	wait, _ := time.ParseDuration(params.Get("wait"))
	_, stale := params["stale"]
	for _, k := range []string{"index", "wait", "stale"} {
		params.Del(k)
	}
	path := req.URL.EscapedPath()
	if len(params) > 0 {
		path += "?" + params.Encode()
	}
	timeout := time.NewTimer(wait)
	defer timeout.Stop()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.requests = append(s.requests, req.URL.RequestURI())
	for timedOut := false; ; {
		if s.broken != nil {
			return nil, s.broken
		}
		a, ok := s.answers[path]
		if !ok {
			a = reply{http.StatusNotFound, 1, "not found"}
		}
		if index == 0 || a.index != index || timedOut || s.deaf {
			h := http.Header{}
			if a.index != 0 {
				h.Set("X-Consul-Index", fmt.Sprint(a.index))
			}
			h.Set("X-Consul-KnownLeader", "true")
			if s.header != nil {
				s.header(h, stale)
			}
			return &http.Response{StatusCode: a.status, Header: h, Body: io.NopCloser(strings.NewReader(a.body)), Request: req}, nil
		}
		changed := s.changed
		s.mu.Unlock()
		select {
		case <-changed:
		case <-timeout.C:
			timedOut = true
		case <-req.Context().Done():
		}
		s.mu.Lock()
		if err := req.Context().Err(); err != nil {
			return nil, err
		}
	}
}

// bubble runs f with a view that is being run. The bubble itself fails the test
// if a goroutine is left.
func bubble(t *testing.T, f func(t *testing.T, s *servers, r *view.Remote)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		s := newServers()
		r := view.NewRemote(view.RemoteConfig{Client: &http.Client{Transport: s}, Datacenter: "dc1"})
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- r.Run(ctx) }()
		f(t, s, r)
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
		if n := r.Running(); n != 0 {
			t.Errorf("%d queries are still followed", n)
		}
	})
}

func woken(ws memdb.WatchSet) bool {
	for ch := range ws {
		select {
		case <-ch:
			return true
		default:
		}
	}
	return false
}

func instance(node, id string) *catalog.Instance {
	return &catalog.Instance{
		Node: &catalog.Node{Node: node}, Service: &catalog.Service{ID: id, Service: id}, Checks: api.HealthChecks{},
	}
}

const webPath = "/v1/health/connect/web"

func TestFirstAnswer(t *testing.T) {
	bubble(t, func(t *testing.T, s *servers, r *view.Remote) {
		s.set(webPath, 7, []*catalog.Instance{instance("n1", "web-proxy")})
		ws := memdb.NewWatchSet()
		if _, _, err := r.Connect(ws, "dc1", catalog.Name("web")); !errors.Is(err, catalog.ErrPending) {
			t.Errorf("got error %v, want pending", err)
		}
		synctest.Wait()
		if !woken(ws) {
			t.Error("the first answer woke nobody")
		}
		in, fresh, err := r.Connect(nil, "", catalog.Name("web"))
		if err != nil || len(in) != 1 || in[0].Node.Node != "n1" || fresh.Index != 7 || !fresh.AsOf.Equal(time.Now()) {
			t.Errorf("got %v, %+v, %v", in, fresh, err)
		}
		// What the first answer is compared with is nothing: it is the leader's.
		s.mu.Lock()
		if got := s.requests[0]; got != webPath {
			t.Errorf("first request %q, want %q", got, webPath)
		}
		s.mu.Unlock()
		time.Sleep(5 * time.Second)
		s.mu.Lock()
		if got, want := s.requests[1], webPath+"?stale=&wait=1m0s&index=7"; got != want {
			t.Errorf("second request %q, want %q", got, want)
		}
		s.mu.Unlock()
		if n := r.Running(); n != 1 {
			t.Errorf("%d loops for one query", n)
		}
	})
}

func TestChangeWakes(t *testing.T) {
	bubble(t, func(t *testing.T, s *servers, r *view.Remote) {
		s.set(webPath, 7, []*catalog.Instance{instance("n1", "a")})
		r.Connect(nil, "dc1", catalog.Name("web"))
		time.Sleep(2 * time.Second)
		ws := memdb.NewWatchSet()
		before, _, _ := r.Connect(ws, "dc1", catalog.Name("web"))

		// The same answer under a higher index, then the end of a wait.
		s.set(webPath, 9, []*catalog.Instance{instance("n1", "a")})
		time.Sleep(70 * time.Second)
		same, fresh, _ := r.Connect(nil, "dc1", catalog.Name("web"))
		if woken(ws) || same[0] != before[0] || fresh.Index != 9 {
			t.Errorf("the same answer: woken %v, index %d", woken(ws), fresh.Index)
		}
		if age := time.Since(fresh.AsOf); age > time.Minute {
			t.Errorf("all is well, and the answer is %v old", age)
		}

		s.set(webPath, 10, []*catalog.Instance{})
		synctest.Wait()
		none, fresh, err := r.Connect(nil, "dc1", catalog.Name("web"))
		if !woken(ws) || none == nil || len(none) != 0 || err != nil || fresh.Index != 10 {
			t.Errorf("woken %v, got %v, %+v, %v, want known to be empty", woken(ws), none, fresh, err)
		}
		if before[0].Service.ID != "a" {
			t.Error("what was handed out has changed")
		}
	})
}

func TestReadersShareALoop(t *testing.T) {
	bubble(t, func(t *testing.T, s *servers, r *view.Remote) {
		s.set(webPath, 7, []*catalog.Instance{})
		var wg sync.WaitGroup
		for range 50 {
			wg.Go(func() { r.Connect(nil, "dc1", catalog.Name("web")) })
		}
		wg.Wait()
		synctest.Wait()
		if n := s.asked(webPath); n != 1 || r.Running() != 1 {
			t.Errorf("%d requests, %d loops", n, r.Running())
		}
		r.Connect(nil, "dc2", catalog.Name("web"))
		synctest.Wait()
		if n := s.asked(webPath + "?dc=dc2"); n != 1 || r.Running() != 2 {
			t.Errorf("another datacenter: %d requests, %d loops", n, r.Running())
		}
	})
}

func TestKeepsLastGood(t *testing.T) {
	bubble(t, func(t *testing.T, s *servers, r *view.Remote) {
		s.set(webPath, 7, []*catalog.Instance{instance("n1", "a")})
		r.Connect(nil, "dc1", catalog.Name("web"))
		time.Sleep(2 * time.Second)
		ws := memdb.NewWatchSet()
		_, good, _ := r.Connect(ws, "dc1", catalog.Name("web"))
		s.asked("")

		down := errors.New("connection refused")
		s.fail(down)
		began := time.Now()
		time.Sleep(10 * time.Minute)
		in, fresh, err := r.Connect(nil, "dc1", catalog.Name("web"))
		if err != nil || len(in) != 1 || fresh != good || woken(ws) {
			t.Errorf("after failures: %v, %+v, %v, woken %v", in, fresh, err, woken(ws))
		}
		st := r.Status()
		if len(st) != 1 || st[0].Query != webPath || !st[0].Known || !errors.Is(st[0].Err, down) || !st[0].Since.Equal(began) || !st[0].AsOf.Equal(good.AsOf) {
			t.Errorf("got status %+v", st)
		}
		// At most 30 s and at least half of that apart, once it has backed off.
		if n := s.asked(webPath); n < 20 || n > 50 {
			t.Errorf("%d requests in 10 minutes", n)
		}

		s.fail(nil)
		time.Sleep(31 * time.Second)
		_, fresh, _ = r.Connect(nil, "dc1", catalog.Name("web"))
		if age := time.Since(fresh.AsOf); age > 31*time.Second {
			t.Errorf("after recovery the answer is %v old", age)
		}
		if st := r.Status(); st[0].Err != nil {
			t.Errorf("got status %+v", st)
		}
	})
}

func TestPendingSaysWhy(t *testing.T) {
	bubble(t, func(t *testing.T, s *servers, r *view.Remote) {
		s.change(func() { s.answers["/v1/connect/ca/roots"] = reply{500, 0, "CA has not finished initializing"} })
		r.Roots(nil)
		synctest.Wait()
		_, _, err := r.Roots(nil)
		if !errors.Is(err, catalog.ErrPending) || !strings.Contains(err.Error(), "500 (CA has not finished initializing)") {
			t.Errorf("got %v", err)
		}
		s.set("/v1/connect/ca/roots", 3, &connect.Roots{})
		time.Sleep(5 * time.Second)
		if _, _, err := r.Roots(nil); !errors.Is(err, catalog.ErrPending) {
			t.Errorf("no roots at all: got %v", err)
		}
		s.set("/v1/connect/ca/roots", 4, &connect.Roots{ActiveRootID: "aa", TrustDomain: "x.consul", Roots: []*connect.Root{{ID: "aa", Active: true}}})
		time.Sleep(10 * time.Second)
		if roots, _, err := r.Roots(nil); err != nil || roots.TrustDomain != "x.consul" {
			t.Errorf("got %v, %v", roots, err)
		}
	})
}

// TestRefuses: what is no answer of the state replaces none.
func TestRefuses(t *testing.T) {
	for name, bad := range map[string]func(s *servers){
		"no index":         func(s *servers) { s.answers[webPath] = reply{200, 0, "[]"} },
		"404 of a path":    func(s *servers) { s.answers[webPath] = reply{404, 0, "Invalid URL path"} },
		"404 of a service": func(s *servers) { s.answers[webPath] = reply{404, 8, ""} },
		"no JSON":          func(s *servers) { s.answers[webPath] = reply{200, 8, "<html>"} },
		"half an instance": func(s *servers) { s.answers[webPath] = reply{200, 8, `[{"Node":null}]`} },
		"no leader": func(s *servers) {
			s.answers[webPath] = reply{200, 8, "[]"}
			s.header = func(h http.Header, _ bool) { h.Set("X-Consul-KnownLeader", "false") }
		},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T, s *servers, r *view.Remote) {
				s.set(webPath, 7, []*catalog.Instance{instance("n1", "a")})
				r.Connect(nil, "dc1", catalog.Name("web"))
				time.Sleep(2 * time.Second)
				s.change(func() { bad(s) })
				time.Sleep(time.Minute)
				in, fresh, err := r.Connect(nil, "dc1", catalog.Name("web"))
				if err != nil || len(in) != 1 || fresh.Index != 7 {
					t.Errorf("got %v, %+v, %v", in, fresh, err)
				}
				if r.Status()[0].Err == nil {
					t.Error("the status shows no error")
				}
			})
		})
	}
}

// TestIndexGoesBack: an older answer is believed of the leader alone.
func TestIndexGoesBack(t *testing.T) {
	bubble(t, func(t *testing.T, s *servers, r *view.Remote) {
		s.set(webPath, 100, []*catalog.Instance{instance("n1", "new")})
		r.Connect(nil, "dc1", catalog.Name("web"))
		time.Sleep(2 * time.Second)
		// A follower that is behind.
		s.change(func() {
			s.header = func(h http.Header, stale bool) {
				if stale {
					h.Set("X-Consul-Index", "50")
				}
			}
			s.deaf = true
		})
		s.asked("")
		time.Sleep(10 * time.Second)
		if _, fresh, _ := r.Connect(nil, "dc1", catalog.Name("web")); fresh.Index != 100 {
			t.Errorf("went back to %d", fresh.Index)
		}
		if n := s.asked(webPath); n > 12 {
			t.Errorf("%d requests in 10 seconds", n)
		}
		// The datacenter was restored from an older snapshot.
		s.change(func() { s.header, s.deaf = nil, false })
		s.set(webPath, 40, []*catalog.Instance{instance("n1", "restored")})
		time.Sleep(5 * time.Second)
		in, fresh, _ := r.Connect(nil, "dc1", catalog.Name("web"))
		if fresh.Index != 40 || in[0].Service.ID != "restored" {
			t.Errorf("got index %d, %v", fresh.Index, in[0].Service.ID)
		}
		s.asked("")
		time.Sleep(50 * time.Second)
		if n := s.asked(webPath); n > 2 {
			t.Errorf("%d requests in 50 seconds: it does not block", n)
		}
	})
}

func TestServerThatDoesNotBlock(t *testing.T) {
	bubble(t, func(t *testing.T, s *servers, r *view.Remote) {
		s.set(webPath, 1, []*catalog.Instance{})
		s.change(func() { s.deaf = true })
		r.Connect(nil, "dc1", catalog.Name("web"))
		time.Sleep(time.Minute)
		if n := s.asked(webPath); n > 61 {
			t.Errorf("%d requests in a minute", n)
		}
	})
}

func TestLagIsAge(t *testing.T) {
	bubble(t, func(t *testing.T, s *servers, r *view.Remote) {
		s.change(func() {
			s.header = func(h http.Header, stale bool) {
				if stale {
					h.Set("X-Consul-LastContact", "60000")
				}
			}
		})
		s.set(webPath, 7, []*catalog.Instance{})
		r.Connect(nil, "dc1", catalog.Name("web"))
		synctest.Wait()
		_, first, _ := r.Connect(nil, "dc1", catalog.Name("web"))
		time.Sleep(62 * time.Second) // an answer that is as old as its server's last contact
		_, fresh, _ := r.Connect(nil, "dc1", catalog.Name("web"))
		if age := time.Since(fresh.AsOf); age < time.Minute || fresh.AsOf.Before(first.AsOf) {
			t.Errorf("got age %v, want a minute at least", age)
		}
	})
}

func TestIdleQueriesEnd(t *testing.T) {
	bubble(t, func(t *testing.T, s *servers, r *view.Remote) {
		s.set(webPath, 7, []*catalog.Instance{})
		r.Connect(nil, "dc1", catalog.Name("web"))
		r.ConfigEntry(nil, configentry.ServiceDefaults, "web")
		synctest.Wait()

		// One reader sleeps on its channel, as a proxy does of which nothing changes.
		ctx, stop := context.WithCancel(t.Context())
		done := make(chan struct{})
		reads := 0
		go func() {
			defer close(done)
			for {
				ws := memdb.NewWatchSet()
				if _, _, err := r.ConfigEntry(ws, configentry.ServiceDefaults, "web"); err != nil {
					t.Errorf("a reader that is there got %v", err)
				}
				reads++
				if ws.WatchCtx(ctx) != nil {
					return
				}
			}
		}()
		time.Sleep(2 * time.Hour)
		if st := r.Status(); len(st) != 1 || r.Running() != 1 || st[0].Query != "/v1/config/service-defaults/web" {
			t.Errorf("%d loops, status %+v", r.Running(), st)
		}
		stop()
		<-done
		if reads < 4 || reads > 7 {
			t.Errorf("the sleeping reader was woken %d times in two hours", reads)
		}
		time.Sleep(time.Hour)
		if len(r.Status()) != 0 || r.Running() != 0 {
			t.Errorf("%d loops that nobody reads", r.Running())
		}
		// It can be read anew.
		r.Connect(nil, "dc1", catalog.Name("web"))
		synctest.Wait()
		if _, _, err := r.Connect(nil, "dc1", catalog.Name("web")); err != nil {
			t.Error(err)
		}
	})
}

func TestReadBeforeAndAfterRun(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newServers()
		s.set(webPath, 7, []*catalog.Instance{})
		r := view.NewRemote(view.RemoteConfig{Client: &http.Client{Transport: s}, Datacenter: "dc1"})
		ws := memdb.NewWatchSet()
		r.Connect(ws, "dc1", catalog.Name("web"))
		synctest.Wait()
		if n := s.asked(""); n != 0 {
			t.Errorf("%d requests before Run", n)
		}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- r.Run(ctx) }()
		synctest.Wait()
		if !woken(ws) {
			t.Error("Run did not fetch what was read before")
		}
		cancel()
		<-done
		if _, _, err := r.Connect(nil, "dc1", catalog.Name("web")); err != nil {
			t.Errorf("what was known is not after Run: %v", err)
		}
		if _, _, err := r.ConnectAll(nil); !errors.Is(err, catalog.ErrPending) || r.Running() != 0 {
			t.Errorf("got %v, %d loops", err, r.Running())
		}
	})
}

func TestConfigEntries(t *testing.T) {
	bubble(t, func(t *testing.T, s *servers, r *view.Remote) {
		read := func() (configentry.Entry, catalog.Freshness, error) {
			return r.ConfigEntry(nil, configentry.ServiceResolver, "team/web")
		}
		list := func() ([]configentry.Entry, catalog.Freshness, error) {
			return r.ConfigEntries(nil, configentry.ServiceResolver)
		}
		const path = "/v1/config/service-resolver/team%2Fweb"
		s.change(func() { s.answers[path] = reply{404, 5, `Config entry not found for "service-resolver" / "team/web"`} })
		s.set("/v1/config/service-resolver", 5, "[]")
		read()
		list()
		synctest.Wait()
		if e, fresh, err := read(); e != nil || err != nil || fresh.Index != 5 {
			t.Errorf("absent: got %v, %+v, %v", e, fresh, err)
		}
		if l, _, err := list(); l == nil || len(l) != 0 || err != nil {
			t.Errorf("none: got %v, %v", l, err)
		}
		// A field of a newer server does not matter.
		const entry = `{"Kind":"service-resolver","Name":"team/web","ConnectTimeout":"3s","FromTheFuture":1,"ModifyIndex":6}`
		s.set(path, 6, entry)
		s.set("/v1/config/service-resolver", 6, "["+entry+"]")
		time.Sleep(2 * time.Second)
		e, _, err := read()
		want := &api.ServiceResolverConfigEntry{Kind: "service-resolver", Name: "team/web", ConnectTimeout: 3 * time.Second, ModifyIndex: 6}
		if diff := cmp.Diff(configentry.Entry(want), e); diff != "" || err != nil {
			t.Error(diff, err)
		}
		if l, _, err := list(); len(l) != 1 || err != nil {
			t.Errorf("got %v, %v", l, err)
		}
	})
}

func TestIntentions(t *testing.T) {
	bubble(t, func(t *testing.T, s *servers, r *view.Remote) {
		source := func(dest, name string, precedence int) *api.ServiceIntentionsConfigEntry {
			return &api.ServiceIntentionsConfigEntry{Kind: "service-intentions", Name: dest, Sources: []*api.SourceIntention{
				{Name: name, Action: "allow", Precedence: precedence, Type: "consul"},
			}}
		}
		s.set("/v1/config/service-intentions/web", 7, source("web", "api", 9))
		s.set("/v1/config/service-intentions/%2A", 9, source("*", "*", 5))
		ws := memdb.NewWatchSet()
		if _, _, err := r.Intentions(ws, catalog.Name("web")); !errors.Is(err, catalog.ErrPending) || len(r.Status()) != 2 {
			t.Errorf("got %v, %d queries, want both asked for at once", err, len(r.Status()))
		}
		time.Sleep(2 * time.Second)
		ws = memdb.NewWatchSet()
		in, fresh, err := r.Intentions(ws, catalog.Name("web"))
		if err != nil || len(in) != 2 || in[0].DestinationName != "web" || in[1].DestinationName != "*" || fresh.Index != 9 {
			t.Fatalf("got %v, %+v, %v", in, fresh, err)
		}
		s.change(func() { s.answers["/v1/config/service-intentions/%2A"] = reply{404, 10, "Config entry not found"} })
		synctest.Wait()
		if in, _, _ := r.Intentions(nil, catalog.Name("web")); !woken(ws) || len(in) != 1 {
			t.Errorf("woken %v, got %v", woken(ws), in)
		}
	})
}

func TestGroupsShare(t *testing.T) {
	bubble(t, func(t *testing.T, s *servers, r *view.Remote) {
		const path = "/v1/internal/catalog/connect"
		s.set(path, 7, map[string][]*catalog.Instance{"a": {instance("n", "a")}, "b": {instance("n", "b")}, "none": {}})
		s.set("/v1/internal/catalog/mesh-gateways", 7, map[string][]*catalog.Instance{"dc1": {instance("n", "gw")}, "dc2": nil})
		r.ConnectAll(nil)
		r.MeshGateways(nil)
		time.Sleep(2 * time.Second)
		before, _, err := r.ConnectAll(nil)
		if err != nil || len(before) != 2 {
			t.Fatalf("got %v, %v", before, err)
		}
		if gws, _, err := r.MeshGateways(nil); err != nil || len(gws) != 1 || gws["dc1"][0].Service.ID != "gw" {
			t.Errorf("got %v, %v", gws, err)
		}
		s.set(path, 8, map[string][]*catalog.Instance{"a": {instance("n", "a")}, "b": {instance("n", "b"), instance("n", "b2")}, "default/team/c": {instance("n", "c")}})
		synctest.Wait()
		after, _, _ := r.ConnectAll(nil)
		team := catalog.ServiceName{Name: "c", Namespace: "team"}.Canonical()
		if len(after) != 3 || len(after[catalog.Name("b")]) != 2 || len(after[team]) != 1 {
			t.Fatalf("got %v", after)
		}
		if &after[catalog.Name("a")][0] != &before[catalog.Name("a")][0] {
			t.Error("a did not change, but was decoded again")
		}
		if len(before[catalog.Name("b")]) != 1 {
			t.Error("what was handed out has changed")
		}
	})
}

// TestHangingServer: a request that never ends does not hold up the loop.
func TestHangingServer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		hang := roundTripper(func(req *http.Request) (*http.Response, error) {
			<-req.Context().Done()
			return nil, req.Context().Err()
		})
		r := view.NewRemote(view.RemoteConfig{Client: &http.Client{Transport: hang}})
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- r.Run(ctx) }()
		r.ConnectAll(nil)
		time.Sleep(2 * time.Minute)
		if st := r.Status(); st[0].Err == nil {
			t.Error("the status shows no error")
		}
		cancel()
		<-done
	})
}

type roundTripper func(*http.Request) (*http.Response, error)

func (f roundTripper) RoundTrip(req *http.Request) (*http.Response, error) { return f(req) }
