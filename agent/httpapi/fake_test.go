package httpapi

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/consul/api"
	"github.com/hashicorp/go-memdb"
	"github.com/hashicorp/raft"
	"github.com/hashicorp/serf/coordinate"
	"github.com/hashicorp/serf/serf"

	"github.com/sluicemesh/sluice/acl"
	"github.com/sluicemesh/sluice/agent/catalog"
	"github.com/sluicemesh/sluice/agent/configentry"
	"github.com/sluicemesh/sluice/agent/connect"
	"github.com/sluicemesh/sluice/agent/state"
)

// fakeCluster is a place in a cluster without a network: a real state machine,
// written to directly.
type fakeCluster struct {
	fsm *state.FSM // nil on a client agent
	dcs []string
	// forward answers Forward.
	forward func(Target) (http.RoundTripper, error)

	mu sync.Mutex
	// leads, leader, verify, contact and index are guarded by mu.
	leads   bool
	leader  string
	verify  error
	contact time.Duration
	index   uint64

	joined, left []string // by mu
	caConfig     *connect.CAConfig
}

func newFakeServer() *fakeCluster {
	return &fakeCluster{fsm: state.NewFSM(nil), dcs: []string{"dc1"}, leads: true, leader: "10.0.0.1:8300", index: 10}
}

func (f *fakeCluster) Store() *state.Store {
	if f.fsm == nil {
		return nil
	}
	return f.fsm.Store()
}

func (f *fakeCluster) IsLeader() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.leads
}

func (f *fakeCluster) setLeader(leads bool, address string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.leads, f.leader = leads, address
}

func (f *fakeCluster) Leader() string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.leader
}

func (f *fakeCluster) Peers() []string { return []string{"10.0.0.1:8300"} }

func (f *fakeCluster) LastContact() time.Duration {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.contact
}

func (f *fakeCluster) Apply(_ context.Context, cmd state.Command) (any, uint64, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if !f.leads {
		return nil, 0, fmt.Errorf("apply: %w", state.ErrNotLeader)
	}
	data, err := cmd.Encode()
	if err != nil {
		return nil, 0, err
	}
	f.index++
	return f.fsm.Apply(&raft.Log{Index: f.index, Data: data}), f.index, nil
}

// must applies a command that cannot be refused.
func (f *fakeCluster) must(t testing.TB, cmd state.Command) uint64 {
	t.Helper()
	res, idx, err := f.Apply(t.Context(), cmd)
	if err != nil || res != true {
		t.Fatalf("apply: %v, %v", res, err)
	}
	return idx
}

func (f *fakeCluster) VerifyLeader(context.Context) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.verify
}

func (f *fakeCluster) Forward(_ context.Context, t Target) (http.RoundTripper, error) {
	if f.forward == nil {
		return nil, state.ErrNoServers
	}
	return f.forward(t)
}

func (f *fakeCluster) Datacenters() []string { return f.dcs }

func (f *fakeCluster) LANMembers() []serf.Member {
	return []serf.Member{
		{Name: "n1", Addr: net.IPv4(10, 0, 0, 1), Port: 8301, Status: serf.StatusAlive, Tags: map[string]string{"role": "consul", "port": "8300", "id": "uuid-1"}},
		{Name: "n2", Addr: net.IPv4(10, 0, 0, 2), Port: 8301, Status: serf.StatusFailed, Tags: map[string]string{"role": "node"}},
	}
}
func (f *fakeCluster) WANMembers() []serf.Member { return nil }

func (f *fakeCluster) Join(addrs []string, wan bool) (int, error) {
	f.joined = append(f.joined, fmt.Sprint(addrs, wan))
	return len(addrs), nil
}

func (f *fakeCluster) ForceLeave(node string, prune, wan bool) error {
	f.left = append(f.left, fmt.Sprint(node, prune, wan))
	return nil
}

// Coordinate puts n1, n2 and n3 on a line, n2 furthest from n1.
func (f *fakeCluster) Coordinate(member string) *coordinate.Coordinate {
	at, ok := map[string]float64{"n1": 0, "n2": 0.3, "n3": 0.1}[member]
	if !ok {
		return nil
	}
	c := coordinate.NewCoordinate(coordinate.DefaultConfig())
	c.Vec[0] = at
	return c
}

func (f *fakeCluster) RemovePeer(_ context.Context, id, address string) error {
	if id != "old" && address != "10.0.0.9:8300" {
		return fmt.Errorf("id %q was not found in the Raft configuration", id)
	}
	f.left = append(f.left, id+address)
	return nil
}

func (f *fakeCluster) TransferLeadership(_ context.Context, id string) error {
	f.setLeader(false, id)
	return nil
}

func (f *fakeCluster) SignLeaf(_ context.Context, csr string) (*connect.Leaf, error) {
	return &connect.Leaf{SerialNumber: "01", CertPEM: "cert for " + csr, PrivateKeyPEM: "never"}, nil
}

func (f *fakeCluster) SignIntermediate(_ context.Context, csr string) (string, error) {
	return "intermediate for " + csr, nil
}

func (f *fakeCluster) SetCAConfig(_ context.Context, c *connect.CAConfig) error {
	f.caConfig = c
	return nil
}

// fakeAgent keeps registrations in maps.
type fakeAgent struct {
	mu       sync.Mutex
	changed  chan struct{} // guarded by mu; closed and replaced by every change
	services map[string]*catalog.Service
	checks   map[string]*catalog.Check
	defs     map[string]*catalog.Definition
	replaced bool
	drain    *fakeDrain
	nodeMnt  string
	roots    *connect.Roots
	leaf     *connect.Leaf
	entries  []configentry.Entry
	reloads  error
	left     bool
}

func newFakeAgent() *fakeAgent {
	return &fakeAgent{
		changed: make(chan struct{}), services: map[string]*catalog.Service{}, checks: map[string]*catalog.Check{},
		defs: map[string]*catalog.Definition{},
	}
}

// change runs f under the lock and wakes the watchers.
func (a *fakeAgent) change(f func()) {
	a.mu.Lock()
	defer a.mu.Unlock()
	f()
	close(a.changed)
	a.changed = make(chan struct{})
}

func (a *fakeAgent) read(ws memdb.WatchSet) func() {
	a.mu.Lock()
	ws.Add(a.changed)
	return a.mu.Unlock
}

func (a *fakeAgent) Self() (map[string]map[string]string, map[string]string) {
	return map[string]map[string]string{"agent": {"checks": "0"}}, map[string]string{"consul-version": "1.21.4"}
}

func (a *fakeAgent) Services(ws memdb.WatchSet) map[string]*catalog.Service {
	defer a.read(ws)()
	out := map[string]*catalog.Service{}
	for id, s := range a.services {
		out[id] = s
	}
	return out
}

func (a *fakeAgent) Service(ws memdb.WatchSet, id string) *catalog.Service {
	defer a.read(ws)()
	return a.services[id]
}

func (a *fakeAgent) RegisterService(_ context.Context, def *catalog.Definition, replace bool) error {
	if strings.Contains(def.Name, "!") {
		return errors.New("service name has invalid characters")
	}
	specs, err := catalog.ChecksOf(def)
	if err != nil {
		return err
	}
	a.change(func() {
		a.services[def.ID], a.defs[def.ID], a.replaced = catalog.ServiceOf(def), def, replace
		for _, s := range specs {
			a.checks[s.CheckID] = &catalog.Check{CheckID: s.CheckID, Name: s.Name, Status: s.Status, ServiceID: def.ID, ServiceName: def.Name, Type: catalog.CheckType(s.Def)}
		}
	})
	return nil
}

func (a *fakeAgent) DeregisterService(_ context.Context, id string) (found bool, err error) {
	a.change(func() {
		_, found = a.services[id]
		delete(a.services, id)
	})
	return found, nil
}

func (a *fakeAgent) ServiceMaintenance(_ context.Context, id string, enable bool, reason string, _ acl.Secret) (found bool, err error) {
	a.change(func() {
		if _, found = a.services[id]; !found {
			return
		}
		if enable {
			a.checks["_service_maintenance:"+id] = &catalog.Check{CheckID: "_service_maintenance:" + id, ServiceID: id, Status: api.HealthCritical, Notes: reason}
		} else {
			delete(a.checks, "_service_maintenance:"+id)
		}
	})
	return found, nil
}

func (a *fakeAgent) Checks(ws memdb.WatchSet) map[string]*catalog.Check {
	defer a.read(ws)()
	out := map[string]*catalog.Check{}
	for id, k := range a.checks {
		out[id] = k
	}
	return out
}

func (a *fakeAgent) RegisterCheck(_ context.Context, k *CheckRegistration) error {
	a.change(func() {
		a.checks[k.ID] = &catalog.Check{CheckID: k.ID, Name: k.Name, Notes: k.Notes, Status: k.Definition.Status, ServiceID: k.ServiceID, Type: catalog.CheckType(k.Definition)}
	})
	return nil
}

func (a *fakeAgent) DeregisterCheck(_ context.Context, id string) (found bool, err error) {
	a.change(func() {
		_, found = a.checks[id]
		delete(a.checks, id)
	})
	return found, nil
}

func (a *fakeAgent) UpdateTTL(_ context.Context, id, status, output string) (found bool, err error) {
	a.change(func() {
		k := a.checks[id]
		if found = k != nil; !found {
			return
		}
		if k.Type != catalog.CheckTTL {
			err = fmt.Errorf("CheckID %q does not have associated TTL", id)
			return
		}
		n := *k
		n.Status, n.Output = status, output
		a.checks[id] = &n
	})
	return found, err
}

func (a *fakeAgent) NodeMaintenance(_ context.Context, enable bool, reason string, _ acl.Secret) error {
	a.change(func() { a.nodeMnt = fmt.Sprint(enable, reason) })
	return nil
}

func (a *fakeAgent) Reload(context.Context) error { return a.reloads }
func (a *fakeAgent) Leave(context.Context) error  { a.left = true; return nil }

func (a *fakeAgent) Roots(ws memdb.WatchSet) (*connect.Roots, catalog.Freshness, error) {
	defer a.read(ws)()
	if a.roots == nil {
		return nil, catalog.Freshness{}, catalog.ErrPending
	}
	return a.roots, catalog.Freshness{Index: 7, AsOf: time.Now()}, nil
}

func (a *fakeAgent) Leaf(ws memdb.WatchSet, _ catalog.ServiceName) (*connect.Leaf, catalog.Freshness, error) {
	defer a.read(ws)()
	if a.leaf == nil {
		return nil, catalog.Freshness{}, catalog.ErrPending
	}
	return a.leaf, catalog.Freshness{Index: a.leaf.ModifyIndex, AsOf: time.Now()}, nil
}

func (a *fakeAgent) Intentions(ws memdb.WatchSet, dest catalog.ServiceName) ([]*configentry.Intention, catalog.Freshness, error) {
	defer a.read(ws)()
	out, err := configentry.IntentionsFor(func(_, name string) (configentry.Entry, error) {
		for _, e := range a.entries {
			if e.GetName() == name {
				return e, nil
			}
		}
		return nil, nil
	}, dest)
	return out, catalog.Freshness{Index: 9}, err
}

func (a *fakeAgent) Proxies() map[string]any {
	return map[string]any{"gw": map[string]string{"State": "running"}, "new": map[string]string{"State": "waiting"}}
}

func (a *fakeAgent) ProxyTable(id string) (any, bool) {
	switch id {
	case "gw":
		return map[string]any{"Proxy": "gw"}, true
	case "new":
		return nil, true
	}
	return nil, false
}

func (a *fakeAgent) Connections(id string, limit int) (any, error) {
	if id != "gw" {
		return nil, ErrNoProxy
	}
	return []int{limit}, nil
}

// fakeDrain is what a request has set.
type fakeDrain struct {
	Wait, Timeout string
	Rate          float64
	Token         string
}

func (a *fakeAgent) DrainProxy(_ context.Context, id string, req DrainRequest, token acl.Secret) error {
	if id == "new" {
		return fmt.Errorf("%w: it has not begun", ErrNoDrain)
	}
	if id != "gw" {
		return ErrNoProxy
	}
	if a.drain != nil {
		return ErrDraining
	}
	d := &fakeDrain{Token: token.Reveal()}
	if req.Wait != nil {
		d.Wait = req.Wait.String()
	}
	if req.Timeout != nil {
		d.Timeout = req.Timeout.String()
	}
	if req.Rate != nil {
		d.Rate = *req.Rate
	}
	a.drain = d
	return nil
}

func (a *fakeAgent) DrainProgress(id string) (any, error) {
	if id != "gw" {
		return nil, ErrNoProxy
	}
	if a.drain == nil {
		return nil, ErrNotDraining
	}
	return a.drain, nil
}

func (a *fakeAgent) CancelDrain(_ context.Context, id string) error {
	if _, err := a.DrainProgress(id); err != nil {
		return err
	}
	a.drain = nil
	return nil
}

type rpcKey struct{}

func fromRPC(ctx context.Context) bool { ok, _ := ctx.Value(rpcKey{}).(bool); return ok }

// roundTripper is a function as a transport.
type roundTripper func(*http.Request) (*http.Response, error)

func (f roundTripper) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

// rpcTo returns a transport to the RPC port of another agent.
func rpcTo(t testing.TB, h http.Handler) http.RoundTripper {
	t.Helper()
	in := &inProcess{handler: h, wg: new(sync.WaitGroup)}
	return roundTripper(func(r *http.Request) (*http.Response, error) {
		ctx := context.WithValue(context.WithValue(r.Context(), inProcessKey{}, false), rpcKey{}, true)
		return in.RoundTrip(r.WithContext(ctx))
	})
}

// outside returns a transport to the HTTP port of an agent.
func outside(h http.Handler, wg *sync.WaitGroup) http.RoundTripper {
	return &inProcess{handler: h, wg: wg}
}

// server is an agent under test with a client of its HTTP port.
type server struct {
	*Handler
	cluster *fakeCluster
	agent   *fakeAgent
	http    *http.Client
	api     *api.Client
}

// newServer returns an agent; edit, if not nil, changes its configuration.
func newServer(t testing.TB, cluster *fakeCluster, edit func(*Config)) *server {
	t.Helper()
	agent := newFakeAgent()
	cfg := Config{
		Cluster: cluster, Agent: agent, FromRPC: fromRPC, Datacenter: "dc1", NodeName: "n1", NodeID: "uuid-1", Version: "1.21.4",
		HoldTimeout: 50 * time.Millisecond,
	}
	if edit != nil {
		edit(&cfg)
	}
	h := New(cfg)
	var wg sync.WaitGroup
	hc := &http.Client{Transport: outside(h, &wg)}
	t.Cleanup(func() { h.Wait(); wg.Wait() })
	client, err := api.NewClient(&api.Config{Address: "http://agent", HttpClient: hc})
	if err != nil {
		t.Fatal(err)
	}
	return &server{Handler: h, cluster: cluster, agent: agent, http: hc, api: client}
}

// answer is what came back.
type answer struct {
	code   int
	header http.Header
	body   string
}

// do sends a request; headers are name, value, ...
func (s *server) do(t testing.TB, method, path, body string, headers ...string) answer {
	t.Helper()
	return roundTrip(t, s.http.Transport, method, path, body, headers...)
}

func roundTrip(t testing.TB, rt http.RoundTripper, method, path, body string, headers ...string) answer {
	t.Helper()
	var r io.Reader
	if body != "" {
		r = strings.NewReader(body)
	}
	req, err := http.NewRequestWithContext(t.Context(), method, "http://agent"+path, r)
	if err != nil {
		t.Fatal(err)
	}
	for i := 0; i+1 < len(headers); i += 2 {
		req.Header.Set(headers[i], headers[i+1])
	}
	resp, err := rt.RoundTrip(req)
	if err != nil {
		t.Fatalf("%s %s: %v", method, path, err)
	}
	defer func() { _ = resp.Body.Close() }()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatalf("%s %s: read the answer: %v", method, path, err)
	}
	return answer{resp.StatusCode, resp.Header, string(b)}
}

// want fails the test unless the answer has this code and body.
func (a answer) want(t testing.TB, code int, body string) {
	t.Helper()
	if a.code != code || a.body != body {
		t.Errorf("answer = %d %q, want %d %q", a.code, a.body, code, body)
	}
}
