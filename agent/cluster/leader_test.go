package cluster

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/hashicorp/consul/api"
	"github.com/hashicorp/go-memdb"
	"github.com/hashicorp/raft"
	"github.com/hashicorp/serf/serf"

	"github.com/sluicemesh/sluice/agent/catalog"
	"github.com/sluicemesh/sluice/agent/configentry"
	"github.com/sluicemesh/sluice/agent/connect"
	"github.com/sluicemesh/sluice/agent/state"
)

const dutyCluster = "11111111-2222-3333-4444-555555555555"

// dutyCore is a server that always leads: a state machine without raft, pools
// that the test sets, and a wire to the primary that the test can cut.
type dutyCore struct {
	fsm *state.FSM

	mu       sync.Mutex
	index    uint64
	lan, wan []serf.Member
	primary  *dutyDC // nil in the primary
	cut      bool
	requests int // to the primary
}

// dutyDC is a datacenter: a core and the leader over it.
type dutyDC struct {
	*dutyCore
	leader *leader
}

func newDutyDC(name string, primary *dutyDC, edit ...func(*leaderConfig)) *dutyDC {
	c := &dutyCore{fsm: state.NewFSM(nil), primary: primary}
	cfg := leaderConfig{Datacenter: name, PrimaryDatacenter: "dc1", NodeName: "s1", CAConfig: map[string]any{"cluster_id": dutyCluster}}
	for _, f := range edit {
		f(&cfg)
	}
	d := &dutyDC{dutyCore: c}
	d.leader = newLeader(c, cfg)
	return d
}

// lead runs a term; stop ends it and waits.
func (d *dutyDC) lead(t *testing.T) (stop func()) {
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- d.leader.run(ctx) }()
	stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(stop)
	return stop
}

func (c *dutyCore) Apply(ctx context.Context, cmd state.Command) (any, uint64, error) {
	if ctx.Err() != nil {
		return nil, 0, ctx.Err()
	}
	data, err := cmd.Encode()
	if err != nil {
		return nil, 0, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.index++
	res := c.fsm.Apply(&raft.Log{Index: c.index, Data: data})
	if err, ok := res.(error); ok {
		return nil, c.index, err
	}
	return res, c.index, nil
}

func (c *dutyCore) Barrier(context.Context) error { return nil }
func (c *dutyCore) Store() *state.Store           { return c.fsm.Store() }

func (c *dutyCore) LANMembers() []serf.Member {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.lan
}

func (c *dutyCore) WANMembers() []serf.Member {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.wan
}

func (c *dutyCore) setCut(cut bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.cut = cut
}

func (c *dutyCore) writes() uint64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.index
}

func (c *dutyCore) Forward(_ context.Context, to state.Target) (http.RoundTripper, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.primary == nil || to.Datacenter != "dc1" {
		return nil, state.ErrNoPath
	}
	if c.cut {
		return nil, state.ErrNoRemoteServer
	}
	return c, nil
}

// RoundTrip serves a request by the primary's state and leader.
func (c *dutyCore) RoundTrip(r *http.Request) (*http.Response, error) {
	c.mu.Lock()
	c.requests++
	primary, cut := c.primary, c.cut
	c.mu.Unlock()
	if cut {
		return nil, errors.New("connection reset")
	}
	w := httptest.NewRecorder()
	primary.serve(w, r)
	if r.Context().Err() != nil {
		return nil, r.Context().Err()
	}
	return w.Result(), nil
}

// serve is as much of the API as replication needs.
func (d *dutyDC) serve(w http.ResponseWriter, r *http.Request) {
	switch r.Method + " " + r.URL.Path {
	case "GET /v1/connect/ca/roots":
		d.blocking(w, r, func(s *state.Store, ws memdb.WatchSet) (uint64, any, error) {
			index, roots, err := s.CARoots(ws)
			if err == nil && roots == nil {
				err = connect.ErrNotFinished
			}
			return index, roots, err
		})
	case "GET /v1/internal/config-entries":
		d.blocking(w, r, func(s *state.Store, ws memdb.WatchSet) (uint64, any, error) {
			index, v, err := s.AllConfigEntries(ws)
			return index, v, err
		})
	case "GET /v1/internal/federation-states":
		d.blocking(w, r, func(s *state.Store, ws memdb.WatchSet) (uint64, any, error) {
			index, v, err := s.FederationStates(ws)
			return index, v, err
		})
	case "POST /v1/internal/connect/sign-intermediate":
		var body struct{ CSR string }
		err := json.NewDecoder(r.Body).Decode(&body)
		var cert string
		if err == nil {
			cert, err = d.leader.SignIntermediate(r.Context(), body.CSR)
		}
		answer(w, map[string]string{"Cert": cert}, err)
	case "PUT /v1/internal/federation-state":
		var fs state.FederationState
		err := json.NewDecoder(r.Body).Decode(&fs)
		if err == nil {
			_, _, err = d.Apply(r.Context(), state.FederationStateCommand(&fs))
		}
		answer(w, true, err)
	default:
		http.NotFound(w, r)
	}
}

func answer(w http.ResponseWriter, v any, err error) {
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	_ = json.NewEncoder(w).Encode(v) // a recorder takes everything
}

func (d *dutyDC) blocking(w http.ResponseWriter, r *http.Request, read func(*state.Store, memdb.WatchSet) (uint64, any, error)) {
	ctx := r.Context()
	minIndex, _ := strconv.ParseUint(r.FormValue("index"), 10, 64)
	if wait, err := time.ParseDuration(r.FormValue("wait")); err == nil {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, wait)
		defer cancel()
	}
	for {
		ws := memdb.NewWatchSet()
		index, v, err := read(d.Store(), ws)
		if err == nil && minIndex > 0 && index <= minIndex && index >= 1 {
			if ws.WatchCtx(ctx) == nil {
				continue
			}
		}
		w.Header().Set("X-Consul-Index", strconv.FormatUint(max(index, 1), 10))
		answer(w, v, err)
		return
	}
}

// eventually waits, in virtual time, for a condition, and returns how long it
// took.
func eventually(t *testing.T, limit time.Duration, what string, ok func() bool) time.Duration {
	t.Helper()
	start := time.Now()
	for { // a look costs no time in a bubble
		synctest.Wait()
		if ok() {
			return time.Since(start)
		}
		if time.Since(start) > limit {
			t.Fatalf("not within %s: %s", limit, what)
		}
		time.Sleep(max(10*time.Millisecond, limit/1000))
	}
}

func mustApply(t *testing.T, d *dutyDC, cmd state.Command) {
	t.Helper()
	res, _, err := d.Apply(t.Context(), cmd)
	if err != nil || res == false {
		t.Fatalf("apply: %v, %v", res, err)
	}
}

func (d *dutyDC) duty(name string) DutyStatus {
	for _, s := range d.leader.Status() {
		if s.Name == name {
			return s
		}
	}
	return DutyStatus{}
}

func defaults(name, protocol string) *api.ServiceConfigEntry {
	return &api.ServiceConfigEntry{Kind: api.ServiceDefaults, Name: name, Protocol: protocol}
}

func upsert(e configentry.Entry) state.Command {
	return state.ConfigEntryCommand(state.ConfigEntryUpsert, e, 0)
}

// entries returns kind/name=protocol of the stored entries.
func (d *dutyDC) entries(t *testing.T) []string {
	t.Helper()
	_, all, err := d.Store().AllConfigEntries(nil)
	if err != nil {
		t.Fatal(err)
	}
	out := []string{}
	for _, e := range all {
		s := e.GetKind() + "/" + e.GetName()
		if sd, ok := e.(*api.ServiceConfigEntry); ok {
			s += "=" + sd.Protocol
		}
		out = append(out, s)
	}
	return out
}

func gossipMember(name, id, ip string, status serf.MemberStatus, tags ...string) serf.Member {
	m := serf.Member{Name: name, Addr: net.ParseIP(ip), Status: status, ProtocolCur: 5, Tags: map[string]string{"id": id, "dc": "dc1", "role": "node"}}
	for i := 0; i+1 < len(tags); i += 2 {
		m.Tags[tags[i]] = tags[i+1]
	}
	return m
}

func (c *dutyCore) setLAN(members ...serf.Member) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.lan = members
}

const (
	idS1 = "00000000-0000-0000-0000-000000000001"
	idC1 = "00000000-0000-0000-0000-000000000002"
	idC2 = "00000000-0000-0000-0000-000000000003"
)

func server1() serf.Member {
	return gossipMember("s1", idS1, "10.0.0.1", serf.StatusAlive, "role", "consul", "port", "8300", "raft_vsn", "3", "build", "1.0.0")
}

// serf returns the status of a node's serf check, "gone" where there is no
// node.
func (d *dutyDC) serf(t *testing.T, node string) string {
	t.Helper()
	_, n, err := d.Store().Node(nil, node)
	if err != nil {
		t.Fatal(err)
	}
	if n == nil {
		return "gone"
	}
	_, checks, err := d.Store().NodeChecks(nil, node)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range checks {
		if c.CheckID == catalog.NodeCheckID {
			return c.Status
		}
	}
	return "none"
}

func TestReconcile(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newDutyDC("dc1", nil)
		c1 := gossipMember("c1", idC1, "10.0.0.2", serf.StatusAlive)
		d.setLAN(server1(), c1)
		d.lead(t)
		synctest.Wait()

		_, ns, err := d.Store().NodeServices(nil, "s1")
		if err != nil || ns == nil {
			t.Fatalf("server is not in the catalog: %v", err)
		}
		if ns.Node.ID != idS1 || ns.Node.Address != "10.0.0.1" {
			t.Errorf("server's node is %+v", ns.Node)
		}
		if len(ns.Services) != 1 || ns.Services[0].ID != "consul" || ns.Services[0].Port != 8300 || ns.Services[0].Meta["raft_version"] != "3" {
			t.Errorf("server's services are %+v", ns.Services)
		}
		if got := d.serf(t, "c1"); got != api.HealthPassing {
			t.Errorf("client's check is %s", got)
		}

		// Nothing to do writes nothing.
		before := d.writes()
		time.Sleep(10 * time.Minute)
		synctest.Wait()
		if n := d.writes() - before; n != 0 {
			t.Errorf("%d writes while nothing changed", n)
		}

		// What the agent says of its own node stays.
		mustApply(t, d, state.RegisterCommand(&api.CatalogRegistration{ID: idC1, Node: "c1", Address: "192.0.2.9", NodeMeta: map[string]string{"a": "b"}}))
		c1.Status = serf.StatusFailed
		d.setLAN(server1(), c1)
		d.leader.lanEvent(serf.MemberEvent{Type: serf.EventMemberFailed, Members: []serf.Member{c1}})
		synctest.Wait()
		if got := d.serf(t, "c1"); got != api.HealthCritical {
			t.Errorf("failed client's check is %s", got)
		}
		c1.Status = serf.StatusAlive
		d.setLAN(server1(), c1)
		d.leader.lanEvent(serf.MemberEvent{Type: serf.EventMemberJoin, Members: []serf.Member{c1}})
		synctest.Wait()
		if got := d.serf(t, "c1"); got != api.HealthPassing {
			t.Errorf("returned client's check is %s", got)
		}
		if _, n, _ := d.Store().Node(nil, "c1"); n.Address != "192.0.2.9" || n.Meta["a"] != "b" {
			t.Errorf("the node's own record was overwritten: %+v", n)
		}

		// Another machine takes the name.
		d.setLAN(server1(), gossipMember("c1", idC2, "10.0.0.3", serf.StatusAlive))
		d.leader.lanEvent(serf.MemberEvent{Type: serf.EventMemberUpdate})
		synctest.Wait()
		if _, n, _ := d.Store().Node(nil, "c1"); n == nil || n.ID != idC2 || n.Address != "10.0.0.3" {
			t.Errorf("node is still %+v", n)
		}

		// It leaves; this server's own leaving is not its own business.
		s1 := server1()
		s1.Status = serf.StatusLeft
		d.setLAN(s1, gossipMember("c1", idC2, "10.0.0.3", serf.StatusLeft))
		d.leader.lanEvent(serf.MemberEvent{Type: serf.EventMemberLeave})
		time.Sleep(2 * time.Second) // the limiter has had its burst
		synctest.Wait()
		if got := d.serf(t, "c1"); got != "gone" {
			t.Errorf("client that left has check %s", got)
		}
		if got := d.serf(t, "s1"); got != api.HealthPassing {
			t.Errorf("leaving leader has check %s", got)
		}
	})
}

func TestReconcileAbsent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newDutyDC("dc1", nil)
		c1, c2 := gossipMember("c1", idC1, "10.0.0.2", serf.StatusAlive), gossipMember("c2", idC2, "10.0.0.3", serf.StatusAlive)
		d.setLAN(server1(), c1, c2)
		stop := d.lead(t)
		synctest.Wait()
		stop()
		// A node that is not gossip's: somebody else looks after it.
		mustApply(t, d, state.RegisterCommand(&api.CatalogRegistration{Node: "external", Address: "10.9.9.9"}))

		// All servers restarted: the pool starts empty.
		d.setLAN(server1())
		d.lead(t)
		synctest.Wait()
		if got := d.serf(t, "c1"); got != api.HealthPassing {
			t.Errorf("before the pool is whole the client's check is %s", got)
		}
		d.setLAN(server1(), c2)
		took := eventually(t, time.Hour, "c1 critical", func() bool { return d.serf(t, "c1") == api.HealthCritical })
		if took < absentCritical {
			t.Errorf("critical after %s already", took)
		}
		if got := d.serf(t, "c2"); got != api.HealthPassing {
			t.Errorf("client that came back has check %s", got)
		}
		eventually(t, 2*time.Hour, "c1 gone", func() bool { return d.serf(t, "c1") == "gone" })

		// Serf says that it forgot a member: no reason to wait.
		d.setLAN(server1())
		d.leader.lanEvent(serf.MemberEvent{Type: serf.EventMemberReap, Members: []serf.Member{c2}})
		eventually(t, 2*time.Second, "c2 gone", func() bool { return d.serf(t, "c2") == "gone" })
		if got := d.serf(t, "external"); got != "none" {
			t.Errorf("external node is %s", got)
		}
	})
}

func leafCSR(t *testing.T, dc, name string) string {
	t.Helper()
	key, err := connect.NewKey("ec", 256)
	if err != nil {
		t.Fatal(err)
	}
	id := connect.ServiceID{TrustDomain: connect.TrustDomain(dutyCluster), Service: catalog.Name(name), Datacenter: dc}
	csr, err := connect.NewLeafCSR(id, key)
	if err != nil {
		t.Fatal(err)
	}
	return csr
}

// verify checks a leaf against the roots that another datacenter trusts.
func verify(t *testing.T, leaf *connect.Leaf, d *dutyDC) error {
	t.Helper()
	chain, err := connect.ParseCerts(leaf.CertPEM)
	if err != nil {
		t.Fatal(err)
	}
	return connect.VerifyChain(d.roots(t), chain, time.Now(), []string{leaf.ServiceURI})
}

func (d *dutyDC) roots(t *testing.T) *connect.Roots {
	t.Helper()
	_, roots, err := d.Store().CARoots(nil)
	if err != nil {
		t.Fatal(err)
	}
	return roots
}

func (d *dutyDC) canSign() bool { return d.leader.ca.active.Load() != nil }

func TestPrimaryCA(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newDutyDC("dc1", nil)
		if _, err := d.leader.SignLeaf(t.Context(), leafCSR(t, "dc1", "web")); !errors.Is(err, connect.ErrUninitialized) {
			t.Errorf("signing outside a term: %v", err)
		}
		stop := d.lead(t)
		eventually(t, time.Second, "CA initialised", d.canSign)
		first := d.roots(t)
		if first.TrustDomain != dutyCluster+".consul" || first.Active() == nil || first.Active().ID != first.ActiveRootID {
			t.Errorf("roots are %+v", first)
		}
		leaf, err := d.leader.SignLeaf(t.Context(), leafCSR(t, "dc1", "web"))
		if err != nil {
			t.Fatal(err)
		}
		if err := verify(t, leaf, d); err != nil {
			t.Error(err)
		}
		if leaf.RootID != first.ActiveRootID || leaf.ModifyIndex == 0 {
			t.Errorf("leaf of root %q at index %d", leaf.RootID, leaf.ModifyIndex)
		}
		if _, err := d.leader.SignLeaf(t.Context(), leafCSR(t, "dc9", "web")); err == nil ||
			err.Error() != "SPIFFE ID in CSR from a different datacenter: dc9, we are dc1" {
			t.Errorf("another datacenter's leaf: %v", err)
		}

		// The next leader signs with what is stored, and makes nothing new.
		stop()
		if d.canSign() {
			t.Error("signs after its term")
		}
		before := d.writes()
		d.lead(t)
		eventually(t, time.Second, "CA resumed", d.canSign)
		time.Sleep(2 * time.Hour)
		if n := d.writes() - before; n != 0 {
			t.Errorf("%d writes in the second term", n)
		}
		if diff := cmp.Diff(first, d.roots(t)); diff != "" {
			t.Error(diff)
		}
	})
}

func TestSignLimit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newDutyDC("dc1", nil, func(c *leaderConfig) { c.CAConfig["csr_max_per_second"] = 4 })
		d.lead(t)
		eventually(t, time.Second, "CA initialised", d.canSign)
		csr := leafCSR(t, "dc1", "web")
		start := time.Now()
		var wg sync.WaitGroup
		errs := make([]error, 6)
		for i := range errs {
			wg.Go(func() { _, errs[i] = d.leader.SignLeaf(t.Context(), csr) })
		}
		wg.Wait()
		var ok, limited int
		for _, err := range errs {
			switch {
			case err == nil:
				ok++
			case errors.Is(err, connect.ErrRateLimited):
				limited++
			default:
				t.Error(err)
			}
		}
		// One at once, and those whose turn is within half a second.
		if ok != 3 || limited != 3 {
			t.Errorf("%d signed, %d limited", ok, limited)
		}
		if took := time.Since(start); took > signWait {
			t.Errorf("took %s", took)
		}
	})
}

func TestRotation(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newDutyDC("dc1", nil)
		set := func(c map[string]any) error {
			return d.leader.SetCAConfig(t.Context(), &connect.CAConfig{Provider: "consul", Config: c})
		}
		if err := set(nil); !errors.Is(err, connect.ErrNotFinished) {
			t.Errorf("before there is a CA: %v", err)
		}
		d.lead(t)
		eventually(t, time.Second, "CA initialised", d.canSign)
		old := d.roots(t)
		oldLeaf, err := d.leader.SignLeaf(t.Context(), leafCSR(t, "dc1", "web"))
		if err != nil {
			t.Fatal(err)
		}

		_, config, err := d.Store().CAConfig(nil)
		if err != nil {
			t.Fatal(err)
		}
		before := d.writes()
		if err := d.leader.SetCAConfig(t.Context(), config); err != nil {
			t.Fatal(err)
		}
		if d.writes() != before {
			t.Error("setting what is set writes something")
		}
		if err := set(map[string]any{"LeafCertTTL": "1m"}); err == nil ||
			err.Error() != "error configuring provider: leaf cert TTL must be greater or equal than 1h0m0s" {
			t.Errorf("short TTL: %v", err)
		}
		if err := d.leader.SetCAConfig(t.Context(), &connect.CAConfig{Config: config.Config, State: map[string]string{"a": "b"}}); !errors.Is(err, connect.ErrStateReadOnly) {
			t.Errorf("state: %v", err)
		}
		if err := set(map[string]any{"leaf_cert_ttl": "2h"}); err != nil {
			t.Fatal(err)
		}
		leaf, err := d.leader.SignLeaf(t.Context(), leafCSR(t, "dc1", "web"))
		if err != nil {
			t.Fatal(err)
		}
		if got := leaf.ValidBefore.Sub(leaf.ValidAfter); got != 2*time.Hour {
			t.Errorf("leaf lives %s under the new configuration", got)
		}
		if d.roots(t).ActiveRootID != old.ActiveRootID {
			t.Error("a lifetime rotated the root")
		}

		if err := set(map[string]any{"leaf_cert_ttl": "2h", "private_key_bits": 384}); err != nil {
			t.Fatal(err)
		}
		now := d.roots(t)
		if len(now.Roots) != 2 || now.ActiveRootID == old.ActiveRootID || now.Active().PrivateKeyBits != 384 {
			t.Fatalf("roots after rotation: %+v", now)
		}
		leaf, err = d.leader.SignLeaf(t.Context(), leafCSR(t, "dc1", "web"))
		if err != nil {
			t.Fatal(err)
		}
		chain, err := connect.ParseCerts(leaf.CertPEM)
		if err != nil {
			t.Fatal(err)
		}
		for name, roots := range map[string]*connect.Roots{"old": old, "new": {Roots: []*connect.Root{now.Active()}}} {
			if err := connect.VerifyChain(roots, chain, time.Now(), nil); err != nil {
				t.Errorf("who trusts the %s root only: %v", name, err)
			}
		}
		if err := verify(t, oldLeaf, d); err != nil {
			t.Errorf("a leaf from before: %v", err)
		}

		// Twice the lifetime of a leaf later nobody needs the old root.
		time.Sleep(3*time.Hour + 30*time.Minute)
		if n := len(d.roots(t).Roots); n != 2 {
			t.Errorf("%d roots while leaves of the old one may be valid", n)
		}
		time.Sleep(2 * time.Hour)
		synctest.Wait()
		if got := d.roots(t); len(got.Roots) != 1 || got.ActiveRootID != now.ActiveRootID {
			t.Errorf("roots in the end: %+v", got)
		}
	})
}

func TestSecondaryCA(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dc1 := newDutyDC("dc1", nil)
		dc1.wan = wanServers("dc1", "dc2")
		dc2 := newDutyDC("dc2", dc1, func(c *leaderConfig) { c.CAConfig = nil })
		dc2.setCut(true)
		stop2 := dc2.lead(t)
		dc1.lead(t)
		time.Sleep(time.Minute)
		if dc2.canSign() {
			t.Fatal("signs without a root")
		}
		if s := dc2.duty("certificate authority"); s.LastError == "" || !s.LastSuccess.IsZero() {
			t.Errorf("status is %+v", s)
		}
		// The WAN pool sees the primary again.
		dc2.setCut(false)
		dc2.leader.wanEvent(serf.MemberEvent{})
		took := eventually(t, 10*time.Second, "intermediate signed", dc2.canSign)
		if took > 100*time.Millisecond {
			t.Errorf("the woken duty took %s", took)
		}
		if s := dc2.duty("certificate authority"); s.LastError != "" || s.LastSuccess.IsZero() {
			t.Errorf("status is %+v", s)
		}

		r1, r2 := dc1.roots(t), dc2.roots(t)
		if r1.ActiveRootID != r2.ActiveRootID || r1.TrustDomain != r2.TrustDomain || r2.Active() == nil {
			t.Fatalf("roots differ: %+v, %+v", r1, r2)
		}
		if r1.Active().SigningKeyID == r2.Active().SigningKeyID || len(r2.Active().IntermediateCerts) != 1 {
			t.Errorf("secondary's root is %+v", r2.Active())
		}
		_, config, err := dc2.Store().CAConfig(nil)
		if err != nil || config.ClusterID != dutyCluster {
			t.Errorf("config %+v, %v", config, err)
		}
		leaf, err := dc2.leader.SignLeaf(t.Context(), leafCSR(t, "dc2", "db"))
		if err != nil {
			t.Fatal(err)
		}
		if err := verify(t, leaf, dc1); err != nil {
			t.Errorf("dc1 does not trust dc2's leaf: %v", err)
		}
		if _, err := dc2.leader.SignIntermediate(t.Context(), ""); err == nil {
			t.Error("a secondary signs intermediates")
		}

		// No news, no writes.
		time.Sleep(time.Minute) // let the other duties settle
		before := dc2.writes()
		time.Sleep(time.Hour)
		if n := dc2.writes() - before; n != 0 {
			t.Errorf("%d writes while nothing changed", n)
		}

		// The primary rotates: the new intermediate follows at once, and both
		// generations trust each other.
		if err := dc1.leader.SetCAConfig(t.Context(), &connect.CAConfig{Config: map[string]any{"private_key_bits": 384}}); err != nil {
			t.Fatal(err)
		}
		took = eventually(t, 10*time.Second, "rotation followed", func() bool { return dc2.roots(t).ActiveRootID == dc1.roots(t).ActiveRootID })
		if took > 100*time.Millisecond {
			t.Errorf("rotation took %s", took)
		}
		newLeaf, err := dc2.leader.SignLeaf(t.Context(), leafCSR(t, "dc2", "db"))
		if err != nil {
			t.Fatal(err)
		}
		chain, err := connect.ParseCerts(newLeaf.CertPEM)
		if err != nil {
			t.Fatal(err)
		}
		if err := connect.VerifyChain(r1, chain, time.Now(), nil); err != nil {
			t.Errorf("who has only the old root: %v", err)
		}
		if err := verify(t, leaf, dc2); err != nil {
			t.Errorf("a leaf from before: %v", err)
		}

		// Cut off, and with a new leader, it goes on signing.
		dc2.setCut(true)
		stop2()
		stop2 = dc2.lead(t)
		eventually(t, time.Second, "resumed", dc2.canSign)
		if leaf, err = dc2.leader.SignLeaf(t.Context(), leafCSR(t, "dc2", "db")); err != nil {
			t.Fatal(err)
		}
		if err := verify(t, leaf, dc1); err != nil {
			t.Error(err)
		}
		stop2()
	})
}

// A datacenter whose primary is lost is made the primary itself.
func TestPromotedCA(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dc1 := newDutyDC("dc1", nil)
		dc1.wan = wanServers("dc1", "dc2")
		dc2 := newDutyDC("dc2", dc1)
		dc1.lead(t)
		stop2 := dc2.lead(t)
		eventually(t, time.Minute, "intermediate signed", dc2.canSign)
		before := dc2.roots(t)
		old, err := dc2.leader.SignLeaf(t.Context(), leafCSR(t, "dc2", "db"))
		if err != nil {
			t.Fatal(err)
		}
		stop2()

		dc2.leader = newLeader(dc2.dutyCore, leaderConfig{Datacenter: "dc2", NodeName: "s1"})
		dc2.lead(t)
		eventually(t, time.Second, "own root", dc2.canSign)
		now := dc2.roots(t)
		if now.TrustDomain != before.TrustDomain || now.ActiveRootID == before.ActiveRootID || len(now.Roots) != 2 {
			t.Fatalf("roots are %+v", now)
		}
		leaf, err := dc2.leader.SignLeaf(t.Context(), leafCSR(t, "dc2", "db"))
		if err != nil {
			t.Fatal(err)
		}
		for name, l := range map[string]*connect.Leaf{"new": leaf, "old": old} {
			if err := verify(t, l, dc2); err != nil {
				t.Errorf("%s leaf: %v", name, err)
			}
		}
	})
}

func TestIntermediateRenewal(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dc1 := newDutyDC("dc1", nil, func(c *leaderConfig) {
			c.CAConfig["intermediate_cert_ttl"], c.CAConfig["leaf_cert_ttl"] = "4h", "1h"
		})
		dc2 := newDutyDC("dc2", dc1)
		dc1.lead(t)
		dc2.lead(t)
		eventually(t, time.Minute, "intermediate signed", dc2.canSign)
		first := dc2.roots(t).Active().SigningKeyID
		time.Sleep(time.Hour)
		if dc2.roots(t).Active().SigningKeyID != first {
			t.Error("renewed in the first half of its life")
		}
		dc2.setCut(true)
		time.Sleep(2 * time.Hour)
		if !dc2.canSign() {
			t.Error("stops signing because it cannot renew")
		}
		dc2.setCut(false)
		eventually(t, time.Minute, "renewed", func() bool { return dc2.roots(t).Active().SigningKeyID != first })
		leaf, err := dc2.leader.SignLeaf(t.Context(), leafCSR(t, "dc2", "db"))
		if err != nil {
			t.Fatal(err)
		}
		if err := verify(t, leaf, dc1); err != nil {
			t.Error(err)
		}
	})
}

func TestReplicateEntries(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dc1 := newDutyDC("dc1", nil, func(c *leaderConfig) {
			c.NoConnect = true
			c.BootstrapEntries = []configentry.Entry{defaults("boot", "grpc"), defaults("web", "http")}
		})
		dc1.wan = wanServers("dc1", "dc2")
		mustApply(t, dc1, upsert(defaults("web", "tcp")))
		dc2 := newDutyDC("dc2", dc1, func(c *leaderConfig) { c.NoConnect = true })
		mustApply(t, dc2, upsert(defaults("stray", "tcp")))
		exported := &api.ExportedServicesConfigEntry{Name: "default", Services: []api.ExportedService{{Name: "own", Consumers: []api.ServiceConsumer{{Peer: "p"}}}}}
		mustApply(t, dc2, upsert(exported))
		dc1.lead(t)
		dc2.lead(t)

		// Bootstrap writes what is not there, and replication what differs.
		want := []string{"exported-services/default", "service-defaults/boot=grpc", "service-defaults/web=tcp"}
		eventually(t, time.Second, "first copy", func() bool { return cmp.Equal(want, dc2.entries(t)) })
		if diff := cmp.Diff(want[1:], dc1.entries(t)); diff != "" {
			t.Error(diff)
		}

		// A change arrives at once, even when there was none for long.
		time.Sleep(time.Hour)
		before := dc2.writes()
		for _, protocol := range []string{"http", "http2", "grpc"} {
			mustApply(t, dc1, upsert(defaults("web", protocol)))
			took := eventually(t, time.Second, protocol, func() bool { return dc2.entries(t)[2] == "service-defaults/web="+protocol })
			if took > 100*time.Millisecond {
				t.Errorf("change to %s took %s", protocol, took)
			}
		}
		mustApply(t, dc1, state.ConfigEntryCommand(state.ConfigEntryDelete, defaults("boot", ""), 0))
		eventually(t, time.Second, "deletion", func() bool { return len(dc2.entries(t)) == 2 })
		if n := dc2.writes() - before; n != 4 {
			t.Errorf("%d writes for four changes", n)
		}

		// Many changes while the WAN is cut; it heals, gossip says so.
		dc2.setCut(true)
		time.Sleep(time.Minute)
		for i := range 300 {
			mustApply(t, dc1, upsert(defaults("svc-"+strconv.Itoa(i), "http")))
		}
		time.Sleep(10 * time.Minute)
		if n := len(dc2.entries(t)); n != 2 {
			t.Errorf("%d entries while cut", n)
		}
		if s := dc2.duty("config entry replication"); s.LastError == "" || time.Since(s.LastSuccess) < 10*time.Minute || time.Since(s.Since) < 10*time.Minute {
			t.Errorf("status while cut: %+v", s)
		}
		before = dc2.writes()
		dc2.setCut(false)
		dc2.leader.wanEvent(serf.MemberEvent{})
		took := eventually(t, time.Second, "caught up", func() bool { return len(dc2.entries(t)) == 302 })
		if took > 100*time.Millisecond {
			t.Errorf("catching up took %s", took)
		}
		if n := dc2.writes() - before; n > 6 {
			t.Errorf("%d writes for 300 entries", n)
		}
	})
}

func TestReplicateAfterRestore(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		quiet := func(c *leaderConfig) { c.NoConnect = true }
		dc1, dc2 := newDutyDC("dc1", nil, quiet), newDutyDC("dc2", nil, quiet)
		dc2.primary = dc1
		for i := range 20 {
			mustApply(t, dc1, upsert(defaults("svc-"+strconv.Itoa(i), "http")))
		}
		stop := dc1.lead(t)
		dc2.lead(t)
		eventually(t, time.Second, "first copy", func() bool { return len(dc2.entries(t)) == 20 })

		// The primary is built anew, its indexes start over.
		stop()
		fresh := newDutyDC("dc1", nil, quiet)
		mustApply(t, fresh, upsert(defaults("new", "http")))
		fresh.lead(t)
		dc2.mu.Lock()
		dc2.primary = fresh
		dc2.mu.Unlock()
		eventually(t, 2*primaryWait, "copy of the new one", func() bool {
			return cmp.Equal([]string{"service-defaults/new=http"}, dc2.entries(t))
		})
		mustApply(t, fresh, upsert(defaults("newer", "http")))
		eventually(t, 2*time.Second, "change of the new one", func() bool { return len(dc2.entries(t)) == 2 })
	})
}

// filtered marks every answer as incomplete.
type filtered struct{ http.RoundTripper }

func (f filtered) RoundTrip(r *http.Request) (*http.Response, error) {
	resp, err := f.RoundTripper.RoundTrip(r)
	if err == nil {
		resp.Header.Set("X-Consul-Results-Filtered-By-ACLs", "true")
		resp.Body = io.NopCloser(strings.NewReader("[]"))
	}
	return resp, err
}

type filteredCore struct{ *dutyCore }

func (f filteredCore) Forward(ctx context.Context, to state.Target) (http.RoundTripper, error) {
	rt, err := f.dutyCore.Forward(ctx, to)
	return filtered{rt}, err
}

func TestReplicateFiltered(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		quiet := func(c *leaderConfig) { c.NoConnect = true }
		dc1 := newDutyDC("dc1", nil, quiet)
		dc2 := newDutyDC("dc2", dc1, quiet)
		dc2.leader.core = filteredCore{dc2.dutyCore}
		mustApply(t, dc2, upsert(defaults("web", "http")))
		dc2.lead(t)
		time.Sleep(time.Minute)
		if got := dc2.entries(t); len(got) != 1 {
			t.Errorf("entries are %v: what the token may not see was deleted", got)
		}
		if s := dc2.duty("config entry replication"); !strings.Contains(s.LastError, "cannot read everything") {
			t.Errorf("status is %+v", s)
		}
	})
}

func gateway(node, address string) state.Command {
	return state.RegisterCommand(&api.CatalogRegistration{
		Node: node, Address: address,
		Service: &api.AgentService{ID: "gw", Service: "gw", Kind: api.ServiceKindMeshGateway, Port: 8443, Address: address},
	})
}

// gateways returns the addresses of every datacenter's gateways by its records.
func (d *dutyDC) gateways(t *testing.T) map[string]string {
	t.Helper()
	_, states, err := d.Store().FederationStates(nil)
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]string{}
	for _, fs := range states {
		var addrs []string
		for _, gw := range fs.MeshGateways {
			addrs = append(addrs, gw.Service.Address)
		}
		out[fs.Datacenter] = strings.Join(addrs, ",")
	}
	return out
}

func wanServers(dcs ...string) (out []serf.Member) {
	for _, dc := range dcs {
		out = append(out, gossipMember("s1."+dc, idS1, "10.0.0.1", serf.StatusAlive, "role", "consul", "port", "8300", "dc", dc))
	}
	return out
}

func TestFederationStates(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		quiet := func(c *leaderConfig) { c.NoConnect = true }
		dc1 := newDutyDC("dc1", nil, quiet)
		dc2 := newDutyDC("dc2", dc1, quiet)
		dc3 := newDutyDC("dc3", dc1, quiet)
		dc1.wan = wanServers("dc1", "dc2", "dc3")
		mustApply(t, dc1, gateway("n1", "10.1.0.1"))
		dc1.lead(t)
		dc2.lead(t)
		stop3 := dc3.lead(t)
		all := []*dutyDC{dc1, dc2, dc3}
		agree := func(want map[string]string) func() bool {
			return func() bool {
				for _, d := range all {
					if !cmp.Equal(want, d.gateways(t)) {
						return false
					}
				}
				return true
			}
		}
		// A datacenter without gateways has a record too.
		eventually(t, 2*time.Second, "first records", agree(map[string]string{"dc1": "10.1.0.1", "dc2": "", "dc3": ""}))

		time.Sleep(10 * time.Minute)
		before := []uint64{dc1.writes(), dc2.writes()}
		mustApply(t, dc2, gateway("n2", "10.2.0.1"))
		took := eventually(t, 2*time.Second, "new gateway known", agree(map[string]string{"dc1": "10.1.0.1", "dc2": "10.2.0.1", "dc3": ""}))
		if took > 100*time.Millisecond {
			t.Errorf("a gateway's way around the world took %s", took)
		}
		time.Sleep(10 * time.Minute)
		if n1, n2 := dc1.writes()-before[0], dc2.writes()-before[1]; n1 != 1 || n2 != 2 {
			t.Errorf("%d and %d writes for one gateway", n1, n2)
		}
		_, fs1, _ := dc1.Store().FederationState(nil, "dc2")
		_, fs3, _ := dc3.Store().FederationState(nil, "dc2")
		if fs1.PrimaryModifyIndex == 0 || fs3.PrimaryModifyIndex != fs1.PrimaryModifyIndex {
			t.Errorf("primary's index is %d, a copy says %d", fs1.PrimaryModifyIndex, fs3.PrimaryModifyIndex)
		}

		// dc3 leaves the federation.
		stop3()
		all = all[:2]
		dc1.mu.Lock()
		dc1.wan = wanServers("dc1", "dc2")
		dc1.mu.Unlock()
		eventually(t, 2*time.Hour, "pruned", agree(map[string]string{"dc1": "10.1.0.1", "dc2": "10.2.0.1"}))

		// A lost record is written again.
		mustApply(t, dc1, state.DeleteFederationStateCommand("dc2"))
		eventually(t, 2*time.Second, "record restored", agree(map[string]string{"dc1": "10.1.0.1", "dc2": "10.2.0.1"}))
	})
}
