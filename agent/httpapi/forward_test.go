package httpapi

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/consul/api"

	"github.com/sluicemesh/sluice/agent/state"
)

// recorder answers requests with the name of who was asked.
type recorder struct {
	name string
	mu   sync.Mutex
	seen []string // guarded by mu
	last *http.Request
}

func (r *recorder) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	body, _ := io.ReadAll(req.Body)
	r.mu.Lock()
	defer r.mu.Unlock()
	r.seen = append(r.seen, fmt.Sprintf("%s %s %s", req.Method, req.URL.RequestURI(), body))
	r.last = req
	w.Header().Set("X-Answered-By", r.name)
	_, _ = io.WriteString(w, "true")
}

func TestPlacement(t *testing.T) {
	type world struct {
		leads, client bool
		primary       string
		contact       time.Duration
	}
	follower, leader, client := world{}, world{leads: true}, world{client: true}
	secondary := world{leads: true, primary: "dc2"}
	for _, c := range []struct {
		what         string
		world        world
		method, path string
		want         string
	}{
		{"agent", follower, "GET", "/v1/agent/services", "here"},
		{"agent", client, "GET", "/v1/agent/services", "here"},
		{"agent in another dc", leader, "GET", "/v1/agent/services?dc=dc2", "here"},
		{"read", leader, "GET", "/v1/catalog/nodes", "here"},
		{"read, own dc", leader, "GET", "/v1/catalog/nodes?dc=dc1", "here"},
		{"read", follower, "GET", "/v1/catalog/nodes", "leader"},
		{"stale read", follower, "GET", "/v1/catalog/nodes?stale", "here"},
		{"stale read within bounds", world{contact: time.Second}, "GET", "/v1/catalog/nodes?max_stale=2s", "here"},
		{"stale read beyond bounds", world{contact: time.Minute}, "GET", "/v1/catalog/nodes?max_stale=2s", "leader"},
		{"stale read but leader", follower, "GET", "/v1/catalog/nodes?stale&leader", "leader"},
		{"read", client, "GET", "/v1/catalog/nodes?stale", "server"},
		{"read elsewhere", leader, "GET", "/v1/catalog/nodes?dc=dc2", "dc2"},
		{"read elsewhere", leader, "GET", "/v1/catalog/nodes?datacenter=dc2", "dc2"},
		{"read elsewhere", client, "GET", "/v1/catalog/nodes?dc=dc2", "server"},
		{"read nowhere", leader, "GET", "/v1/catalog/nodes?dc=dc9", "500 No path to datacenter"},
		{"status", follower, "GET", "/v1/status/leader", "here"},
		{"status", client, "GET", "/v1/status/leader", "server"},
		{"write", leader, "PUT", "/v1/catalog/register", "here"},
		{"write", follower, "PUT", "/v1/catalog/register", "leader"},
		{"write stale", follower, "PUT", "/v1/catalog/register?stale", "leader"},
		{"write", client, "PUT", "/v1/catalog/register", "server"},
		{"write elsewhere", follower, "PUT", "/v1/catalog/register?dc=dc2", "dc2"},
		{"config", leader, "PUT", "/v1/config", "here"},
		{"config", follower, "PUT", "/v1/config", "leader"},
		{"config of the secondary", leader, "PUT", "/v1/config?dc=dc2", "here"},
		{"config", secondary, "PUT", "/v1/config", "dc2"},
		{"config", secondary, "PUT", "/v1/config?dc=dc1", "dc2"},
		{"config read", secondary, "GET", "/v1/config/proxy-defaults", "here"},
		{"intention", secondary, "PUT", "/v1/connect/intentions/exact?source=a&destination=b", "dc2"},
	} {
		t.Run(fmt.Sprintf("%s %+v %s", c.what, c.world, c.path), func(t *testing.T) {
			cluster := newFakeServer()
			cluster.dcs = []string{"dc1", "dc2"}
			cluster.leads, cluster.contact = c.world.leads, c.world.contact
			if c.world.client {
				cluster.fsm = nil
			}
			asked := "here"
			cluster.forward = func(target Target) (http.RoundTripper, error) {
				switch {
				case target.Leader:
					asked = "leader"
				case target.Datacenter != "":
					asked = target.Datacenter
				default:
					asked = "server"
				}
				return rpcTo(t, &recorder{name: asked}), nil
			}
			s := newServer(t, cluster, func(cfg *Config) { cfg.PrimaryDatacenter = c.world.primary })
			a := s.do(t, c.method, c.path, `{"Node":"n","Address":"a"}`)
			if by := a.header.Get("X-Answered-By"); asked != "here" && by != asked {
				t.Errorf("the answer of %s did not arrive: %+v", asked, a)
			}
			if a.code == 500 {
				asked = fmt.Sprintf("500 %s", a.body)
			}
			if asked != c.want {
				t.Errorf("went to %s, want %s", asked, c.want)
			}
		})
	}
}

func TestExportedServicesFromASecondary(t *testing.T) {
	cluster := newFakeServer()
	cluster.dcs = []string{"dc1", "dc2"}
	primary := &recorder{name: "dc2"}
	cluster.forward = func(Target) (http.RoundTripper, error) { return rpcTo(t, primary), nil }
	s := newServer(t, cluster, func(cfg *Config) { cfg.PrimaryDatacenter = "dc2" })
	const body = `{"Kind":"exported-services","Name":"default"}`
	s.do(t, "PUT", "/v1/config", body).want(t, 500, "exported-services writes must not target secondary datacenters.")
	s.do(t, "DELETE", "/v1/config/exported-services/default?dc=dc1", "").want(t, 500, "exported-services writes must not target secondary datacenters.")
	s.do(t, "PUT", "/v1/config?dc=dc2", body).want(t, 200, "true")
	if len(primary.seen) != 1 {
		t.Errorf("the primary saw %q", primary.seen)
	}
}

func TestForwardedRequestIsWhole(t *testing.T) {
	cluster := newFakeServer()
	cluster.leads = false
	rec := &recorder{name: "leader"}
	cluster.forward = func(Target) (http.RoundTripper, error) { return rpcTo(t, rec), nil }
	s := newServer(t, cluster, nil)
	a := s.do(t, "PUT", "/v1/catalog/register?token=t&x=%2F", `{"Node": "n"}`, "X-Consul-Token", "secret", "X-Sluice-Hops", "5", "Connection", "close")
	a.want(t, 200, "true")
	if got := rec.seen; len(got) != 1 || got[0] != `PUT /v1/catalog/register?token=t&x=%2F {"Node": "n"}` {
		t.Errorf("passed on as %q", got)
	}
	h := rec.last.Header
	if h.Get("X-Consul-Token") != "secret" || h.Get("Connection") != "" || h.Get("X-Sluice-Hops") != "1" {
		t.Errorf("headers passed on: %v", h)
	}
	s.do(t, "GET", "/v1/health/service/web?near=_agent&passing", "").want(t, 200, "true")
	if got := rec.last.URL.Query().Get("near"); got != "n1" {
		t.Errorf("near=_agent passed on as %q", got)
	}
}

func TestLoopGuard(t *testing.T) {
	// Two followers that each hold the other for the leader.
	a, b := newFakeServer(), newFakeServer()
	a.leads, b.leads = false, false
	sa, sb := newServer(t, a, nil), newServer(t, b, nil)
	count := 0
	a.forward = func(Target) (http.RoundTripper, error) { count++; return rpcTo(t, sb.Handler), nil }
	b.forward = func(Target) (http.RoundTripper, error) { count++; return rpcTo(t, sa.Handler), nil }
	sa.do(t, "GET", "/v1/catalog/nodes", "").want(t, 500, textTooManyHops)
	if count != maxHops {
		t.Errorf("passed on %d times, want %d", count, maxHops)
	}
}

func TestTheLeaderMoves(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		// The request finds a leader that has just lost the lead, and no other for a
		// second.
		next := newFakeServer()
		next.leads = false
		leader := newServer(t, next, nil)
		next.forward = func(Target) (http.RoundTripper, error) { return nil, state.ErrNoLeader }
		cluster := newFakeServer()
		cluster.leads = false
		cluster.forward = func(Target) (http.RoundTripper, error) { return rpcTo(t, leader.Handler), nil }
		s := newServer(t, cluster, func(c *Config) { c.HoldTimeout = 7 * time.Second })
		later(t, time.Second, func() { next.setLeader(true, "x") })
		a := s.do(t, "PUT", "/v1/catalog/register", `{"Node":"n","Address":"10.0.0.1"}`)
		a.want(t, 200, "true")
		if a.header.Get(retryHeader) != "" {
			t.Error("the client saw the mark for agents")
		}
		if _, nodes, _ := next.Store().Nodes(nil); len(nodes) != 1 {
			t.Errorf("the write was lost")
		}
		next.setLeader(false, "")
		began := time.Now()
		s.do(t, "GET", "/v1/catalog/nodes", "").want(t, 500, "No cluster leader")
		if took := time.Since(began); took < 5*time.Second || took > 8*time.Second {
			t.Errorf("gave up after %v, want about 7 s", took)
		}
	})
}

func TestLostAnswers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		tries := 0
		cluster := newFakeServer()
		cluster.dcs = []string{"dc1", "dc2"}
		cluster.leads = false
		cluster.forward = func(Target) (http.RoundTripper, error) {
			return roundTripper(func(*http.Request) (*http.Response, error) {
				tries++
				return nil, errors.New("connection reset")
			}), nil
		}
		s := newServer(t, cluster, nil)
		s.do(t, "GET", "/v1/catalog/nodes", "").want(t, 500, "No cluster leader")
		if tries < 2 {
			t.Errorf("a read was tried %d times", tries)
		}
		tries = 0
		s.do(t, "PUT", "/v1/catalog/register", "{}").want(t, 500, "No cluster leader")
		if tries != 1 {
			t.Errorf("a write that may have been done was tried %d times", tries)
		}
		s.do(t, "PUT", "/v1/catalog/register?dc=dc2", "{}").want(t, 500, "Remote DC has no server currently reachable")
		cluster.fsm = nil
		s.do(t, "PUT", "/v1/catalog/register", "{}").want(t, 500, "rpc error making call: connection reset")
		cluster.forward = nil
		s.do(t, "GET", "/v1/catalog/nodes", "").want(t, 500, "No known Consul servers")
	})
}

func TestRelayStreamsAndBreaksOff(t *testing.T) {
	step := make(chan string)
	cluster := newFakeServer()
	cluster.leads = false
	cluster.forward = func(Target) (http.RoundTripper, error) {
		return rpcTo(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			for line := range step {
				if line == "abort" {
					panic(http.ErrAbortHandler)
				}
				_, _ = io.WriteString(w, line+"\n")
			}
		})), nil
	}
	s := newServer(t, cluster, nil)
	req, err := http.NewRequestWithContext(t.Context(), "GET", "http://agent/v1/catalog/nodes", nil)
	if err != nil {
		t.Fatal(err)
	}
	go func() { step <- "one" }()
	resp, err := s.http.Transport.RoundTrip(req)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	lines := bufio.NewReader(resp.Body)
	for _, want := range []string{"one\n", "two\n"} {
		// Each line arrives before the next is written.
		got, err := lines.ReadString('\n')
		if err != nil || got != want {
			t.Fatalf("read %q, %v, want %q", got, err, want)
		}
		if want == "one\n" {
			step <- "two"
		}
	}
	step <- "abort"
	if _, err := io.ReadAll(lines); err == nil {
		t.Error("an answer that broke off read as a whole one")
	}
}

func TestTheClientGoesAway(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		// A client agent, a server, and the leader, where the query blocks.
		leaderCluster, follower, client := newFakeServer(), newFakeServer(), newFakeServer()
		follower.leads, client.fsm = false, nil
		leader := newServer(t, leaderCluster, nil)
		var wg sync.WaitGroup
		follower.forward = func(Target) (http.RoundTripper, error) { return rpcToCounted(leader.Handler, &wg), nil }
		server := newServer(t, follower, nil)
		client.forward = func(Target) (http.RoundTripper, error) { return rpcToCounted(server.Handler, &wg), nil }
		s := newServer(t, client, nil)
		ctx, cancel := context.WithCancel(t.Context())
		later(t, time.Minute, cancel)
		_, _, err := s.api.Catalog().Nodes((&api.QueryOptions{WaitIndex: 99}).WithContext(ctx))
		if !errors.Is(err, context.Canceled) {
			t.Errorf("query = %v", err)
		}
		wg.Wait() // on every agent
	})
}

// rpcToCounted is rpcTo with a group that counts what is being served.
func rpcToCounted(h http.Handler, wg *sync.WaitGroup) http.RoundTripper {
	in := &inProcess{handler: h, wg: wg}
	return roundTripper(func(r *http.Request) (*http.Response, error) {
		ctx := context.WithValue(context.WithValue(r.Context(), inProcessKey{}, false), rpcKey{}, true)
		return in.RoundTrip(r.WithContext(ctx))
	})
}

func TestBodyNamesTheDatacenter(t *testing.T) {
	cluster := newFakeServer()
	cluster.dcs = []string{"dc1", "dc2"}
	rec := &recorder{name: "dc2"}
	cluster.forward = func(Target) (http.RoundTripper, error) { return rpcTo(t, rec), nil }
	s := newServer(t, cluster, nil)
	const body = `{"Node":"n","Address":"10.0.0.1","Datacenter":"dc2"}`
	a := s.do(t, "PUT", "/v1/catalog/register", body)
	if a.header.Get("X-Answered-By") != "dc2" || !strings.HasSuffix(rec.seen[0], body) {
		t.Errorf("answer %+v, dc2 saw %q", a, rec.seen)
	}
	s.do(t, "PUT", "/v1/catalog/deregister", `{"Node":"n","Datacenter":"dc9"}`).want(t, 500, "No path to datacenter")
	s.do(t, "PUT", "/v1/catalog/deregister", `{"Node":"n","Datacenter":"dc1"}`).want(t, 200, "true")
}
