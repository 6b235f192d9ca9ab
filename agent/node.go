package agent

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"runtime"
	"strconv"
	"time"

	"github.com/hashicorp/go-memdb"

	"github.com/sluicemesh/sluice/acl"
	"github.com/sluicemesh/sluice/agent/catalog"
	"github.com/sluicemesh/sluice/agent/configentry"
	"github.com/sluicemesh/sluice/agent/connect"
	"github.com/sluicemesh/sluice/agent/httpapi"
	"github.com/sluicemesh/sluice/agent/local"
	"github.com/sluicemesh/sluice/gateway"
)

// node is the agent as the HTTP API sees it.
type node Agent

var _ httpapi.Agent = (*node)(nil)

func (n *node) Self() (stats map[string]map[string]string, meta map[string]string) {
	lan := n.member.LANMembers()
	server := n.member.Store() != nil
	stats = map[string]map[string]string{
		"agent": {
			"services": strconv.Itoa(len(n.registry.Services(nil))),
			"checks":   strconv.Itoa(len(n.registry.Checks(nil))),
		},
		"build": {"version": n.opts.Version, "revision": n.opts.Revision},
		"consul": {
			"server":            strconv.FormatBool(server),
			"known_datacenters": strconv.Itoa(len(n.member.Datacenters())),
		},
		"runtime": {
			"goroutines": strconv.Itoa(runtime.NumGoroutine()),
			"arch":       runtime.GOARCH, "os": runtime.GOOS, "version": runtime.Version(),
			"cpu_count": strconv.Itoa(runtime.NumCPU()),
			"max_procs": strconv.Itoa(runtime.GOMAXPROCS(0)),
		},
		"serf_lan": {"members": strconv.Itoa(len(lan))},
	}
	if server {
		leader := n.member.Leader()
		stats["consul"]["leader"] = strconv.FormatBool(n.member.IsLeader())
		stats["consul"]["leader_addr"] = leader
		stats["raft"] = map[string]string{
			"state":         map[bool]string{true: "Leader", false: "Follower"}[n.member.IsLeader()],
			"num_peers":     strconv.Itoa(max(0, len(n.member.Peers())-1)),
			"last_contact":  n.member.LastContact().Round(time.Millisecond).String(),
			"applied_index": strconv.FormatUint(n.member.Store().LastIndex(), 10),
		}
		stats["serf_wan"] = map[string]string{"members": strconv.Itoa(len(n.member.WANMembers()))}
	}
	return stats, maps.Clone(n.node.Meta)
}

func (n *node) Services(ws memdb.WatchSet) map[string]*catalog.Service {
	out := map[string]*catalog.Service{}
	for id, s := range n.registry.Services(ws) {
		out[id] = s.Merged
	}
	return out
}

func (n *node) Service(ws memdb.WatchSet, id string) *catalog.Service {
	if s := n.registry.Service(ws, id); s != nil {
		return s.Merged
	}
	return nil
}

// settle lets who has changed the registration find the change in the catalog,
// where that takes no longer than usual.
func (n *node) settle(ctx context.Context) {
	const limit = time.Second
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	n.syncer.Settle(ctx)
}

func (n *node) RegisterService(ctx context.Context, def *catalog.Definition, replaceChecks bool) error {
	defer n.settle(ctx)
	return n.registry.Register(def, replaceChecks)
}

func (n *node) DeregisterService(ctx context.Context, id string) (bool, error) {
	defer n.settle(ctx)
	return n.registry.Deregister(id), nil
}

func (n *node) ServiceMaintenance(ctx context.Context, id string, enable bool, reason string, token acl.Secret) (bool, error) {
	defer n.settle(ctx)
	return n.registry.ServiceMaintenance(id, enable, reason, token)
}

func (n *node) Checks(ws memdb.WatchSet) map[string]*catalog.Check {
	out := map[string]*catalog.Check{}
	for id, c := range n.registry.Checks(ws) {
		out[id] = c.Check
	}
	return out
}

func (n *node) RegisterCheck(ctx context.Context, c *httpapi.CheckRegistration) error {
	defer n.settle(ctx)
	return n.registry.RegisterCheck(local.CheckRegistration{
		ID: c.ID, Name: c.Name, Notes: c.Notes, ServiceID: c.ServiceID, Status: c.Definition.Status, Def: c.Definition, Token: c.Token,
	})
}

func (n *node) DeregisterCheck(ctx context.Context, id string) (bool, error) {
	defer n.settle(ctx)
	return n.registry.DeregisterCheck(id), nil
}

func (n *node) UpdateTTL(ctx context.Context, id, status, output string) (bool, error) {
	defer n.settle(ctx)
	return n.registry.UpdateTTL(id, status, output)
}

func (n *node) NodeMaintenance(ctx context.Context, enable bool, reason string, token acl.Secret) error {
	defer n.settle(ctx)
	return n.registry.NodeMaintenance(enable, reason, token)
}

func (n *node) Reload(ctx context.Context) error { return (*Agent)(n).Reload(ctx) }

func (n *node) Leave(ctx context.Context) error { return (*Agent)(n).Leave(ctx) }

func (n *node) Roots(ws memdb.WatchSet) (*connect.Roots, catalog.Freshness, error) {
	return n.source.Roots(ws)
}

func (n *node) Leaf(ws memdb.WatchSet, service catalog.ServiceName) (*connect.Leaf, catalog.Freshness, error) {
	return n.source.Leaf(ws, service)
}

func (n *node) Intentions(ws memdb.WatchSet, destination catalog.ServiceName) ([]*configentry.Intention, catalog.Freshness, error) {
	return n.source.Intentions(ws, destination)
}

func (n *node) Proxies() map[string]any {
	out := map[string]any{}
	for _, s := range n.runner.Status() {
		out[s.ID] = s
	}
	return out
}

func (n *node) ProxyTable(id string) (any, bool) {
	for _, s := range n.runner.Status() {
		if s.ID != id {
			continue
		}
		if t := n.runner.Table(id); t != nil {
			return t, true
		}
		return nil, true
	}
	return nil, false
}

func (n *node) Connections(id string, limit int) (any, error) {
	list, err := n.runner.Connections(id, limit)
	if err != nil {
		return nil, proxyError(err)
	}
	if list == nil {
		list = []gateway.Connection{}
	}
	return list, nil
}

func (n *node) DrainProxy(_ context.Context, id string, req httpapi.DrainRequest, token acl.Secret) error {
	a := (*Agent)(n)
	plan := a.drainPlan()
	if req.Wait != nil {
		plan.Wait = *req.Wait
	}
	if req.Timeout != nil {
		plan.Timeout = *req.Timeout
	}
	if req.Rate != nil {
		plan.Rate = *req.Rate
	}
	return proxyError(n.runner.Drain(id, plan, a.announceDrain(id, token)))
}

func (n *node) DrainProgress(id string) (any, error) {
	p, err := n.runner.DrainProgress(id)
	if err != nil {
		return nil, proxyError(err)
	}
	return p, nil
}

func (n *node) CancelDrain(ctx context.Context, id string) error {
	return proxyError(n.runner.CancelDrain(ctx, id))
}

// proxyError returns the API's error for one of the runner.
func proxyError(err error) error {
	switch {
	case errors.Is(err, gateway.ErrNoProxy):
		return httpapi.ErrNoProxy
	case errors.Is(err, gateway.ErrDraining):
		return httpapi.ErrDraining
	case errors.Is(err, gateway.ErrNotDraining):
		return httpapi.ErrNotDraining
	case errors.Is(err, gateway.ErrNoDrain):
		return fmt.Errorf("%w: %w", httpapi.ErrNoDrain, err)
	}
	return err
}
