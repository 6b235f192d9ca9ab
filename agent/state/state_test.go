package state_test

import (
	"bytes"
	"fmt"
	"io"
	"testing"

	"github.com/hashicorp/consul/api"
	"github.com/hashicorp/go-memdb"
	"github.com/hashicorp/raft"

	"github.com/sluicemesh/sluice/agent/catalog"
	"github.com/sluicemesh/sluice/agent/state"
)

// machine applies commands as raft does: encoded, one index after the other.
type machine struct {
	t     testing.TB
	fsm   *state.FSM
	index uint64
	log   []*raft.Log
}

func newMachine(t testing.TB) *machine {
	return &machine{t: t, fsm: state.NewFSM(nil), index: 10}
}

func (m *machine) store() *state.Store { return m.fsm.Store() }

// apply returns the state machine's answer, an error too.
func (m *machine) apply(c state.Command) any {
	m.t.Helper()
	data, err := c.Encode()
	if err != nil {
		m.t.Fatal(err)
	}
	m.index++
	l := &raft.Log{Index: m.index, Type: raft.LogCommand, Data: data}
	m.log = append(m.log, l)
	return m.fsm.Apply(l)
}

// must applies a command that has to succeed and returns its index.
func (m *machine) must(c state.Command) uint64 {
	m.t.Helper()
	if res := m.apply(c); res != true {
		m.t.Fatalf("apply: got %v, want true", res)
	}
	return m.index
}

// refuse applies a command that has to fail with a text.
func (m *machine) refuse(c state.Command, want string) {
	m.t.Helper()
	err, _ := m.apply(c).(error)
	if err == nil || err.Error() != want {
		m.t.Fatalf("apply: got error %v, want %q", err, want)
	}
}

func (m *machine) snapshot() []byte {
	m.t.Helper()
	snap, err := m.fsm.Snapshot()
	if err != nil {
		m.t.Fatal(err)
	}
	defer snap.Release()
	sink := &memorySink{}
	if err := snap.Persist(sink); err != nil {
		m.t.Fatal(err)
	}
	if !sink.closed || sink.cancelled {
		m.t.Fatalf("sink: closed %v, cancelled %v", sink.closed, sink.cancelled)
	}
	return sink.Bytes()
}

type memorySink struct {
	bytes.Buffer
	closed, cancelled bool
	limit             int // fail a write beyond this many bytes, if not 0
}

func (s *memorySink) Write(b []byte) (int, error) {
	if s.limit != 0 && s.Len()+len(b) > s.limit {
		return 0, io.ErrShortWrite
	}
	return s.Buffer.Write(b)
}
func (s *memorySink) ID() string    { return "memory" }
func (s *memorySink) Close() error  { s.closed = true; return nil }
func (s *memorySink) Cancel() error { s.cancelled = true; return nil }

// node, service and check are registrations on a node.
func node(name string, change ...func(*api.CatalogRegistration)) state.Command {
	reg := &api.CatalogRegistration{Node: name, Address: "10.0.0.1", Datacenter: "dc1"}
	for _, f := range change {
		f(reg)
	}
	return state.RegisterCommand(reg)
}

func withID(id string) func(*api.CatalogRegistration) {
	return func(r *api.CatalogRegistration) { r.ID = id }
}

func with(s *catalog.Service) func(*api.CatalogRegistration) {
	return func(r *api.CatalogRegistration) { r.Service = s; r.SkipNodeUpdate = true }
}

func withCheck(c *catalog.Check) func(*api.CatalogRegistration) {
	return func(r *api.CatalogRegistration) { r.Checks = append(r.Checks, c); r.SkipNodeUpdate = true }
}

func service(name string) *catalog.Service {
	return &catalog.Service{ID: name, Service: name, Port: 80}
}

func sidecar(of string) *catalog.Service {
	return &catalog.Service{
		Kind: api.ServiceKindConnectProxy, ID: of + "-proxy", Service: of + "-proxy", Port: 21000,
		Proxy: &api.AgentServiceConnectProxyConfig{DestinationServiceName: of},
	}
}

func gateway(id string) *catalog.Service {
	return &catalog.Service{Kind: api.ServiceKindMeshGateway, ID: id, Service: "mesh-gateway", Port: 8443}
}

func check(id, serviceID, status string) *catalog.Check {
	return &catalog.Check{CheckID: id, Name: id, ServiceID: serviceID, Status: status}
}

// woken says whether any channel of a watch set is closed.
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

// names renders instances as node/id:status.
func names(in []*catalog.Instance) []string {
	out := []string{}
	for _, i := range in {
		out = append(out, fmt.Sprintf("%s/%s:%s", i.Node.Node, i.Service.ID, i.Checks.AggregatedStatus()))
	}
	return out
}
