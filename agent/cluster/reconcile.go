package cluster

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"strconv"
	"time"

	"github.com/hashicorp/consul/api"
	"github.com/hashicorp/go-memdb"
	"github.com/hashicorp/serf/serf"

	"github.com/sluicemesh/sluice/agent/catalog"
	"github.com/sluicemesh/sluice/agent/state"
)

// consulService is the name and ID under which servers are in the catalog.
const consulService = "consul"

// Texts of the check that gossip drives.
const (
	serfCheckName  = "Serf Health Status"
	serfAlive      = "Agent alive and reachable"
	serfFailed     = "Agent not live or unreachable"
	reconcileEvery = time.Minute
)

// A node that gossip does not know at all, neither as failed nor as gone, may
// yet come: the pool is not whole when all servers have just restarted. So it is
// given time, to come back before it counts as failed, and before it is
// forgotten.
const (
	absentCritical = 2 * time.Minute
	absentForget   = time.Hour
)

// reconcileLoop keeps nodes and their serf checks in the catalog in step with
// the LAN pool.
func (l *leader) reconcileLoop(ctx context.Context) error {
	r := &reconciler{l: l, absent: map[string]time.Time{}}
	return l.do(ctx, duty{name: "catalog reconciliation", pass: r.pass, every: reconcileEvery, wake: &l.lan})
}

// reconciler belongs to one goroutine.
type reconciler struct {
	l      *leader
	absent map[string]time.Time // since when a node is not in the pool
}

func (r *reconciler) pass(ctx context.Context, _ memdb.WatchSet) error {
	// Taken before the members are read: whoever joins again in between is a
	// member then.
	reaped := r.l.takeReaped()
	members := r.l.core.LANMembers()
	known := make(map[string]bool, len(members))
	var errs []error
	for _, m := range members {
		known[m.Name] = true
		delete(r.absent, m.Name)
		if err := r.member(ctx, m); err != nil {
			errs = append(errs, fmt.Errorf("reconcile member %q: %w", m.Name, err))
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
	}
	if err := r.strangers(ctx, known, reaped); err != nil {
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

func (l *leader) takeReaped() map[string]struct{} {
	l.reapedMu.Lock()
	defer l.reapedMu.Unlock()
	out := l.reaped
	l.reaped = map[string]struct{}{}
	return out
}

func (r *reconciler) member(ctx context.Context, m serf.Member) error {
	switch m.Status {
	case serf.StatusAlive:
		return r.alive(ctx, m)
	case serf.StatusFailed:
		return r.failed(ctx, m.Name)
	case serf.StatusLeft:
		if m.Name == r.l.cfg.NodeName {
			return nil // this server is leaving: the next leader sees to it
		}
		return r.forget(ctx, m.Name)
	}
	return nil // leaving: it will have left soon
}

// alive registers a member, its serf check and, for a server, the consul
// service. What the agent itself registered of its node is left alone.
func (r *reconciler) alive(ctx context.Context, m serf.Member) error {
	store := r.l.core.Store()
	_, ns, err := store.NodeServices(nil, m.Name)
	if err != nil {
		return err
	}
	reg := &api.CatalogRegistration{
		ID: m.Tags[tagID], Node: m.Name, Address: m.Addr.String(), Datacenter: r.l.cfg.Datacenter,
		// A node that is not there is made all the same. One that is, or that its own
		// agent writes at this moment, knows more of itself than its member does.
		SkipNodeUpdate: true,
	}
	var cmds []state.Command
	if ns != nil && ns.Node.ID != "" && reg.ID != "" && ns.Node.ID != reg.ID {
		// Another machine has the name now, and the pool has settled whose it is.
		cmds = append(cmds, state.DeregisterCommand(&api.CatalogDeregistration{Node: m.Name}))
		ns = nil
	}
	if s, ok := parseServer(m); ok && s.dc == r.l.cfg.Datacenter {
		if want := consulServiceOf(m); ns == nil || !hasService(ns.Services, want) {
			reg.Service = want
		}
	}
	status, err := r.serfStatus(m.Name)
	if err != nil {
		return err
	}
	if ns == nil || status != api.HealthPassing {
		reg.Checks = api.HealthChecks{serfCheck(m.Name, api.HealthPassing)}
	}
	if ns != nil && reg.Service == nil && reg.Checks == nil {
		return nil
	}
	cmds = append(cmds, state.RegisterCommand(reg))
	if len(cmds) == 1 {
		return r.l.apply(ctx, cmds[0])
	}
	return r.l.apply(ctx, state.BatchCommand(cmds...))
}

// failed turns the serf check of a node critical, if it is in the catalog.
func (r *reconciler) failed(ctx context.Context, node string) error {
	_, n, err := r.l.core.Store().Node(nil, node)
	if err != nil || n == nil {
		return err
	}
	status, err := r.serfStatus(node)
	if err != nil || status == api.HealthCritical {
		return err
	}
	r.l.log.Info("member failed", "node", node)
	return r.l.apply(ctx, state.RegisterCommand(&api.CatalogRegistration{
		Node: n.Node, Address: n.Address, Datacenter: r.l.cfg.Datacenter, SkipNodeUpdate: true,
		Checks: api.HealthChecks{serfCheck(n.Node, api.HealthCritical)},
	}))
}

// forget removes a node and all that is on it.
func (r *reconciler) forget(ctx context.Context, node string) error {
	_, n, err := r.l.core.Store().Node(nil, node)
	if err != nil || n == nil {
		return err
	}
	r.l.log.Info("member gone, deregistering", "node", node)
	return r.l.apply(ctx, state.DeregisterCommand(&api.CatalogDeregistration{Node: n.Node, Datacenter: r.l.cfg.Datacenter}))
}

// strangers looks at the nodes that were in the pool, which their serf check
// shows, and are not any more.
func (r *reconciler) strangers(ctx context.Context, known map[string]bool, reaped map[string]struct{}) error {
	_, checks, err := r.l.core.Store().ChecksInState(nil, api.HealthAny)
	if err != nil {
		return fmt.Errorf("reconcile reaped members: %w", err)
	}
	now := time.Now()
	present := map[string]bool{}
	var errs []error
	for _, c := range checks {
		if c.CheckID != catalog.NodeCheckID || known[c.Node] || c.Node == r.l.cfg.NodeName {
			continue
		}
		present[c.Node] = true
		since, ok := r.absent[c.Node]
		if !ok {
			since = now
			r.absent[c.Node] = now
		}
		_, gone := reaped[c.Node]
		var err error
		switch {
		case gone || now.Sub(since) >= absentForget:
			err = r.forget(ctx, c.Node)
		case now.Sub(since) >= absentCritical:
			err = r.failed(ctx, c.Node)
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("reconcile reaped member %q: %w", c.Node, err))
			if gone {
				r.absent[c.Node] = now.Add(-absentForget) // the event does not come again
			}
		}
	}
	maps.DeleteFunc(r.absent, func(node string, _ time.Time) bool { return !present[node] })
	return errors.Join(errs...)
}

func (r *reconciler) serfStatus(node string) (string, error) {
	_, checks, err := r.l.core.Store().NodeChecks(nil, node)
	if err != nil {
		return "", err
	}
	for _, c := range checks {
		if c.CheckID == catalog.NodeCheckID {
			return c.Status, nil
		}
	}
	return "", nil
}

func serfCheck(node, status string) *catalog.Check {
	out := serfAlive
	if status != api.HealthPassing {
		out = serfFailed
	}
	return &catalog.Check{Node: node, CheckID: catalog.NodeCheckID, Name: serfCheckName, Status: status, Output: out}
}

// consulServiceOf returns the service that stands for a server.
func consulServiceOf(m serf.Member) *catalog.Service {
	port, _ := strconv.Atoi(m.Tags[tagPort]) // parseServer has seen to it
	meta := map[string]string{
		"raft_version":          m.Tags["raft_vsn"],
		"serf_protocol_current": strconv.Itoa(int(m.ProtocolCur)),
		"serf_protocol_min":     strconv.Itoa(int(m.ProtocolMin)),
		"serf_protocol_max":     strconv.Itoa(int(m.ProtocolMax)),
		"version":               m.Tags["build"],
		"non_voter":             strconv.FormatBool(m.Tags[tagNonVoter] != ""),
		"read_replica":          strconv.FormatBool(m.Tags["read_replica"] != ""),
	}
	for _, k := range []string{"grpc_port", "grpc_tls_port"} {
		if v := m.Tags[k]; v != "" {
			meta[k] = v
		}
	}
	return &catalog.Service{
		ID: consulService, Service: consulService, Tags: []string{}, Meta: meta, Port: port,
		Weights: api.AgentWeights{Passing: 1, Warning: 1},
	}
}

func hasService(services []*catalog.Service, want *catalog.Service) bool {
	for _, s := range services {
		if s.ID == want.ID {
			return s.Service == want.Service && s.Port == want.Port && maps.Equal(s.Meta, want.Meta)
		}
	}
	return false
}
