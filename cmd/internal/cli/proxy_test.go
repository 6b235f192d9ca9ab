package cli

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/hashicorp/consul/api"
	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/go-memdb"

	"github.com/sluicemesh/sluice/agent/catalog"
	"github.com/sluicemesh/sluice/gateway"
	"github.com/sluicemesh/sluice/proxycfg"
)

// roundTrip is a transport of one function.
type roundTrip func(*http.Request) (*http.Response, error)

func (f roundTrip) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

func answer(code int, index uint64, body any) *http.Response {
	b, err := json.Marshal(body)
	if err != nil {
		panic(err)
	}
	h := http.Header{}
	if index > 0 {
		h.Set("X-Consul-Index", fmt.Sprint(index))
	}
	return &http.Response{StatusCode: code, Header: h, Body: io.NopCloser(bytes.NewReader(b))}
}

// fakeAgent answers one path after the other: a test says with what, and a
// request for which there is nothing yet waits.
type fakeAgent struct {
	answers chan func(*http.Request) *http.Response

	mu   sync.Mutex
	seen []string // method and URI of every request
}

func newFakeAgent() *fakeAgent {
	return &fakeAgent{answers: make(chan func(*http.Request) *http.Response, 16)}
}

func (a *fakeAgent) client(t *testing.T) *api.Client {
	t.Helper()
	c, err := api.NewClient(&api.Config{Address: "agent.test", HttpClient: &http.Client{Transport: roundTrip(a.serve)}})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func (a *fakeAgent) serve(r *http.Request) (*http.Response, error) {
	a.mu.Lock()
	a.seen = append(a.seen, r.Method+" "+r.URL.RequestURI())
	a.mu.Unlock()
	select {
	case f := <-a.answers:
		return f(r), nil
	case <-r.Context().Done():
		return nil, r.Context().Err()
	}
}

func (a *fakeAgent) reply(code int, index uint64, body any) {
	a.answers <- func(*http.Request) *http.Response { return answer(code, index, body) }
}

// requests returns what was asked since it was last called.
func (a *fakeAgent) requests() []string {
	a.mu.Lock()
	defer a.mu.Unlock()
	out := a.seen
	a.seen = nil
	return out
}

func closed(ws memdb.WatchSet) bool {
	for ch := range ws {
		select {
		case <-ch:
			return true
		default:
		}
	}
	return false
}

func TestTransport(t *testing.T) {
	for _, test := range []struct {
		name      string
		conf      api.Config
		url, want string
	}{
		{"plain", api.Config{Scheme: "http", Address: "10.0.0.1:8500"}, "http://agent/v1/connect/ca/roots?stale=", "http://10.0.0.1:8500/v1/connect/ca/roots?stale="},
		{"TLS", api.Config{Scheme: "https", Address: "consul.test:8501"}, "http://agent/v1/x", "https://consul.test:8501/v1/x"},
		{"unix socket", api.Config{Scheme: "http", Address: "/run/consul.sock"}, "http://agent/v1/x", "http://localhost/v1/x"},
		{"path prefix", api.Config{Scheme: "http", Address: "h:80", PathPrefix: "/consul"}, "http://agent/v1/config/mesh/a%2Fb", "http://h:80/consul/v1/config/mesh/a%2Fb"},
		{"agents only", api.Config{Scheme: "http", Address: "h:80"}, "http://agent/v1/internal/catalog/mesh-gateways?index=3", "http://h:80/v1/internal/federation-states/mesh-gateways?index=3"},
	} {
		t.Run(test.name, func(t *testing.T) {
			test.conf.Token = "secret"
			test.conf.HttpAuth = &api.HttpBasicAuth{Username: "u", Password: "p"}
			var got *http.Request
			tr := &transport{conf: &test.conf, base: roundTrip(func(r *http.Request) (*http.Response, error) {
				got = r
				return answer(200, 1, nil), nil
			})}
			req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, test.url, nil)
			if err != nil {
				t.Fatal(err)
			}
			resp, err := tr.RoundTrip(req)
			if err != nil {
				t.Fatal(err)
			}
			defer resp.Body.Close()
			if got.URL.String() != test.want {
				t.Errorf("asked %s, want %s", got.URL, test.want)
			}
			if user, pass, _ := got.BasicAuth(); got.Header.Get("X-Consul-Token") != "secret" || user != "u" || pass != "p" {
				t.Errorf("headers %v, want the token and the credentials", got.Header)
			}
			if req.URL.String() != test.url || len(req.Header) > 0 {
				t.Errorf("the caller's request was changed to %s, %v", req.URL, req.Header)
			}
		})
	}
}

func leafAnswer(cert string, index uint64) *api.LeafCert {
	return &api.LeafCert{CertPEM: cert, PrivateKeyPEM: "key of " + cert, Service: "web", ModifyIndex: index}
}

// TestLeafFollower follows a certificate through what may happen to it: the agent
// has none yet, it is renewed, the agent goes away.
func TestLeafFollower(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		agent := newFakeAgent()
		l := &leafFollower{
			client: agent.client(t), service: catalog.Name("web"), logger: hclog.NewNullLogger(),
			err: catalog.ErrPending, changed: make(chan struct{}),
		}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() { defer close(done); l.run(ctx) }()

		ws := memdb.NewWatchSet()
		if _, _, err := l.Leaf(ws, catalog.Name("web")); !errors.Is(err, catalog.ErrPending) {
			t.Fatalf("Leaf before an answer: %v, want that it is pending", err)
		}
		if _, _, err := l.Leaf(nil, catalog.Name("api")); err == nil || errors.Is(err, catalog.ErrPending) {
			t.Errorf("Leaf of another service: %v, want that there will be none", err)
		}
		agent.reply(500, 0, "CA has not finished initializing")
		synctest.Wait()
		if _, _, err := l.Leaf(nil, catalog.Name("web")); !closed(ws) || !errors.Is(err, catalog.ErrPending) || !strings.Contains(err.Error(), "finished initializing") {
			t.Errorf("Leaf after a failure: %v (woken: %v), want that it is pending and why", err, closed(ws))
		}

		agent.reply(200, 5, leafAnswer("one", 5))
		time.Sleep(minPause)
		synctest.Wait()
		ws = memdb.NewWatchSet()
		leaf, fresh, err := l.Leaf(ws, catalog.Name("web"))
		if err != nil || leaf.CertPEM != "one" || leaf.PrivateKeyPEM.Reveal() != "key of one" || fresh.Index != 5 {
			t.Fatalf("Leaf = %+v, %+v, %v, want the first certificate", leaf, fresh, err)
		}

		// An answer that nothing has changed makes it younger and wakes nobody.
		time.Sleep(time.Minute)
		agent.reply(200, 5, leafAnswer("one", 5))
		synctest.Wait()
		if _, now, _ := l.Leaf(nil, catalog.Name("web")); closed(ws) || now.AsOf.Sub(fresh.AsOf) != time.Minute {
			t.Errorf("an unchanged answer: woken %v, AsOf moved by %s, want not woken and 1m", closed(ws), now.AsOf.Sub(fresh.AsOf))
		}

		agent.reply(200, 6, leafAnswer("two", 6))
		synctest.Wait()
		if leaf, _, err = l.Leaf(nil, catalog.Name("web")); err != nil || leaf.CertPEM != "two" || !closed(ws) {
			t.Errorf("Leaf after a renewal = %+v, %v (woken: %v), want the second certificate", leaf, err, closed(ws))
		}

		// The last good one is served whatever fails.
		agent.requests()
		agent.reply(500, 0, "gone")
		time.Sleep(minPause)
		synctest.Wait()
		if leaf, _, err = l.Leaf(nil, catalog.Name("web")); err != nil || leaf.CertPEM != "two" {
			t.Errorf("Leaf while the agent fails = %+v, %v, want the second certificate", leaf, err)
		}
		want := []string{"GET /v1/agent/connect/ca/leaf/web?wait=60000ms"} // no index: another agent may answer
		if diff := cmp.Diff(want, agent.requests()); diff != "" {
			t.Errorf("requests after the failure (-want +got):\n%s", diff)
		}
		cancel()
		<-done
	})
}

func proxyAnswer(hash string, port int) *api.AgentService {
	return &api.AgentService{
		Kind: api.ServiceKindConnectProxy, ID: "p", Service: "p", ContentHash: hash,
		Proxy: &api.AgentServiceConnectProxyConfig{
			DestinationServiceName: "web", Config: map[string]any{"data_plane": "none"},
			Upstreams: []api.Upstream{{DestinationName: "api", LocalBindPort: port}},
		},
	}
}

// TestFollowRegistration checks that a registration that changes is taken over,
// and one that goes is not.
func TestFollowRegistration(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		agent := newFakeAgent()
		p := &foreground{client: agent.client(t), logger: hclog.NewNullLogger(), follow: "p", changed: make(chan struct{})}
		p.proxy = proxycfg.Proxy{Service: runHere(proxyAnswer("", 1)), Datacenter: "dc1"}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- p.followRegistration(ctx) }()

		state := func() (port int, plane any, ws memdb.WatchSet) {
			ws = memdb.NewWatchSet()
			s := p.proxies(ws)[0].Service
			return s.Proxy.Upstreams[0].LocalBindPort, s.Proxy.Config["data_plane"], ws
		}
		_, _, ws := state()
		agent.reply(200, 0, proxyAnswer("h2", 2))
		synctest.Wait()
		port, plane, next := state()
		if !closed(ws) || port != 2 || plane != "builtin" {
			t.Errorf("after a change: woken %v, port %d, data plane %v, want woken, 2 and builtin", closed(ws), port, plane)
		}
		ws = next
		agent.reply(200, 0, proxyAnswer("h2", 2))
		agent.reply(404, 0, "unknown service ID: p")
		synctest.Wait()
		if port, _, _ := state(); closed(ws) || port != 2 {
			t.Errorf("after it has gone: woken %v, port %d, want that it is as it was", closed(ws), port)
		}
		agent.reply(200, 0, proxyAnswer("h3", 3))
		time.Sleep(minPause)
		synctest.Wait()
		if port, _, _ := state(); !closed(ws) || port != 3 {
			t.Errorf("after it has come back: woken %v, port %d, want woken and 3", closed(ws), port)
		}
		cancel()
		if err := <-done; err != nil {
			t.Errorf("followRegistration: %v", err)
		}
		want := []string{
			"GET /v1/agent/service/p?wait=300000ms", "GET /v1/agent/service/p?hash=h2&wait=300000ms", "GET /v1/agent/service/p?hash=h2&wait=300000ms",
			"GET /v1/agent/service/p?wait=300000ms", "GET /v1/agent/service/p?hash=h3&wait=300000ms",
		}
		if diff := cmp.Diff(want, agent.requests()); diff != "" {
			t.Errorf("requests (-want +got):\n%s", diff)
		}
	})
}

// TestKeepRegistered checks that a proxy is registered when it listens, again
// when the agent has forgotten it, and not any more when it ends.
func TestKeepRegistered(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		agent := newFakeAgent()
		p := &foreground{client: agent.client(t), logger: hclog.NewNullLogger(), registration: &api.AgentServiceRegistration{ID: "p", Name: "p"}}
		ctx, cancel := context.WithCancel(t.Context())
		bound, done := make(chan struct{}), make(chan error, 1)
		go func() { done <- p.keepRegistered(ctx, bound) }()
		synctest.Wait()
		if got := agent.requests(); len(got) > 0 {
			t.Errorf("requests before it listens: %v, want none", got)
		}
		const read, register = "GET /v1/agent/service/p", "PUT /v1/agent/service/register"
		expect := func(when string, want ...string) {
			t.Helper()
			synctest.Wait()
			if diff := cmp.Diff(want, agent.requests()); diff != "" {
				t.Errorf("requests %s (-want +got):\n%s", when, diff)
			}
		}
		agent.reply(404, 0, "unknown")
		agent.reply(200, 0, nil)
		close(bound)
		expect("when it listens", read, register)
		agent.reply(200, 0, &api.AgentService{ID: "p"})
		time.Sleep(10 * time.Second)
		expect("while it is known", read)
		agent.reply(404, 0, "unknown")
		agent.reply(200, 0, nil)
		time.Sleep(10 * time.Second)
		expect("when it is forgotten", read, register)
		agent.reply(200, 0, nil)
		cancel()
		if err := <-done; err != nil {
			t.Errorf("keepRegistered: %v", err)
		}
		expect("at the end", "PUT /v1/agent/service/deregister/p")
	})
}

func TestRefuseTwin(t *testing.T) {
	type status struct{ DataPlane, State string }
	for _, test := range []struct {
		name    string
		replies []any
		want    string
	}{
		{"nobody", []any{404}, ""},
		{"left to others", []any{status{"none", "serving"}}, ""},
		{"the agent", []any{status{"builtin", "serving"}}, `the agent runs proxy "p" itself (data plane "builtin")`},
		{"its supervised process", []any{status{"envoy", "stale"}}, `data plane "envoy"`},
		{"not known yet", []any{status{"builtin", "pending"}, status{"none", "pending"}}, ""},
		{"never known", []any{status{"builtin", "pending"}}, "the agent runs"},
		{"no answer", []any{500}, "ask the agent"},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				n := 0
				client, err := api.NewClient(&api.Config{Address: "agent.test", HttpClient: &http.Client{Transport: roundTrip(func(*http.Request) (*http.Response, error) {
					r := test.replies[min(n, len(test.replies)-1)]
					n++
					if code, ok := r.(int); ok {
						return answer(code, 0, "no"), nil
					}
					return answer(200, 0, r), nil
				})}})
				if err != nil {
					t.Fatal(err)
				}
				err = refuseTwin(t.Context(), client, "p")
				if test.want == "" && err != nil || test.want != "" && (err == nil || !strings.Contains(err.Error(), test.want)) {
					t.Errorf("refuseTwin() = %v, want %q", err, test.want)
				}
			})
		})
	}
}

// planeRecorder keeps the newest table.
type planeRecorder struct {
	gateway.DataPlane
	table *gateway.Table
}

func (p *planeRecorder) Apply(t *gateway.Table) { p.table = t }

func TestInwardHasNoPublicListener(t *testing.T) {
	rec := &planeRecorder{}
	table := &gateway.Table{Index: 3, Listeners: []gateway.Listener{
		{Name: "public", Mode: gateway.ListenInbound}, {Name: "api", Mode: gateway.ListenUpstream},
	}}
	inward{rec}.Apply(table)
	if len(rec.table.Listeners) != 1 || rec.table.Listeners[0].Name != "api" || rec.table.Index != 3 {
		t.Errorf("applied %+v, want the upstream's listener alone", rec.table)
	}
	if len(table.Listeners) != 2 || table.Listeners[0].Name != "public" {
		t.Errorf("the table handed over was changed: %+v", table.Listeners)
	}
}
