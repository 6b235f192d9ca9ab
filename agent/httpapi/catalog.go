package httpapi

import (
	"cmp"
	"math"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/hashicorp/consul/api"
	"github.com/hashicorp/go-memdb"

	"github.com/sluicemesh/sluice/agent/catalog"
	"github.com/sluicemesh/sluice/agent/state"
)

// nearAgent, as ?near, means the node of the agent that was asked.
const nearAgent = "_agent"

func (c *call) catalogDatacenters() (any, error) {
	return emptyIfNil(c.h.cluster.Datacenters()), nil
}

func emptyIfNil[T any](list []T) []T {
	if list == nil {
		return []T{}
	}
	return list
}

// matchesNode says whether a node has all metadata asked for, and comes from the
// peer asked for; there are none but this cluster's own so far.
func (c *call) matchesNode(n *catalog.Node) bool {
	for k, v := range c.opts.nodeMeta {
		if got, ok := n.Meta[k]; !ok || got != v {
			return false
		}
	}
	return n.PeerName == c.opts.peer
}

// matches says whether an instance is on such a node and has all tags asked for.
func (c *call) matches(inst *catalog.Instance) bool {
	for _, want := range c.opts.tags {
		if want != "" && !slices.ContainsFunc(inst.Service.Tags, func(t string) bool { return strings.EqualFold(t, want) }) {
			return false
		}
	}
	return c.matchesNode(inst.Node)
}

// nearest sorts by the estimated round-trip time from the node asked for: what is
// on the node itself first, and last, in the order it had, what is on nodes whose
// place in the network is not known.
//
// COMPAT: Consul's servers keep the coordinates of all nodes. Sluice's leader
// knows the place of nodes that have answered its own probes.
func nearest[T any](c *call, list []T, node func(T) string) []T {
	near := c.opts.near
	if near == nearAgent {
		near = c.h.cfg.NodeName
	}
	if near == "" {
		return list
	}
	from := c.h.cluster.Coordinate(near)
	distances := map[string]time.Duration{}
	for _, e := range list {
		n := node(e)
		if _, ok := distances[n]; ok {
			continue
		}
		d := unknownDistance
		if strings.EqualFold(n, near) {
			d = -1
		} else if from != nil {
			if to := c.h.cluster.Coordinate(n); to != nil && from.IsCompatibleWith(to) {
				d = from.DistanceTo(to)
			}
		}
		distances[n] = d
	}
	out := slices.Clone(list)
	slices.SortStableFunc(out, func(a, b T) int { return cmp.Compare(distances[node(a)], distances[node(b)]) })
	return out
}

// unknownDistance is further than anything.
const unknownDistance = time.Duration(math.MaxInt64)

func (c *call) catalogNodes() (any, error) {
	return c.blocking(func(ws memdb.WatchSet) (uint64, any, error) {
		idx, nodes, err := c.store().Nodes(ws)
		if err != nil {
			return 0, nil, err
		}
		out := []*catalog.Node{}
		for _, n := range nodes {
			if c.matchesNode(n) {
				out = append(out, n)
			}
		}
		out, err = filtered(c.opts.filter, out)
		return idx, nearest(c, out, func(n *catalog.Node) string { return n.Node }), err
	})
}

func (c *call) catalogServices() (any, error) {
	return c.blocking(func(ws memdb.WatchSet) (uint64, any, error) {
		if c.opts.filter == "" && len(c.opts.nodeMeta) == 0 && c.opts.peer == "" {
			idx, list, err := c.store().ServiceList(ws)
			return idx, list, err
		}
		idx, instances, err := c.store().ServiceDump(ws)
		if err != nil {
			return 0, nil, err
		}
		flat, err := c.flat(instances)
		if err != nil {
			return 0, nil, err
		}
		out := map[string][]string{}
		for _, s := range flat {
			tags := append(emptyIfNil(out[s.ServiceName]), s.ServiceTags...)
			slices.Sort(tags)
			out[s.ServiceName] = slices.Compact(tags)
		}
		return idx, out, nil
	})
}

// flat selects instances by the request's parameters.
func (c *call) flat(instances []*catalog.Instance) ([]*flatService, error) {
	out := []*flatService{}
	for _, inst := range instances {
		if c.matches(inst) {
			out = append(out, flatten(inst))
		}
	}
	out, err := filtered(c.opts.filter, out)
	return nearest(c, out, func(s *flatService) string { return s.Node }), err
}

func (c *call) catalogService() (any, error) { return c.catalogInstances((*state.Store).Service) }
func (c *call) catalogConnect() (any, error) { return c.catalogInstances((*state.Store).Connect) }

// instanceReader is a read of the instances of a service.
type instanceReader func(*state.Store, memdb.WatchSet, catalog.ServiceName) (uint64, []*catalog.Instance, error)

func (c *call) catalogInstances(read instanceReader) (any, error) {
	name := c.param("name")
	if name == "" {
		return nil, bad("Missing service name")
	}
	return c.blocking(func(ws memdb.WatchSet) (uint64, any, error) {
		idx, instances, err := read(c.store(), ws, catalog.Name(name))
		if err != nil {
			return 0, nil, err
		}
		out, err := c.flat(instances)
		return idx, out, err
	})
}

// nodeServices reads a node's services by the request's filter; ns is nil where
// there is no such node.
func (c *call) nodeServices(ws memdb.WatchSet) (idx uint64, ns *state.NodeServices, services []*nodeService, err error) {
	idx, ns, err = c.store().NodeServices(ws, c.param("node"))
	if err != nil || ns == nil {
		return idx, nil, nil, err
	}
	services = []*nodeService{}
	for _, s := range ns.Services {
		services = append(services, nodeServiceOf(s))
	}
	services, err = filtered(c.opts.filter, services)
	return idx, ns, services, err
}

func (c *call) catalogNode() (any, error) {
	if c.param("node") == "" {
		return nil, bad("Missing node name")
	}
	type node struct {
		Node     *catalog.Node
		Services map[string]*nodeService
	}
	return c.blocking(func(ws memdb.WatchSet) (uint64, any, error) {
		idx, ns, services, err := c.nodeServices(ws)
		if err != nil {
			return 0, nil, err
		}
		if ns == nil {
			return idx, (*node)(nil), nil // "null", as Consul says
		}
		out := &node{Node: ns.Node, Services: map[string]*nodeService{}}
		for _, s := range services {
			out.Services[s.ID] = s
		}
		return idx, out, nil
	})
}

func (c *call) catalogNodeServices() (any, error) {
	if c.param("node") == "" {
		return nil, bad("Missing node name")
	}
	type node struct {
		Node     *catalog.Node
		Services []*nodeService
	}
	return c.blocking(func(ws memdb.WatchSet) (uint64, any, error) {
		idx, ns, services, err := c.nodeServices(ws)
		if err != nil {
			return 0, nil, err
		}
		out := &node{Services: services}
		if ns != nil {
			out.Node = ns.Node
		}
		return idx, out, nil
	})
}

// catalogGatewayServices lists what is linked to a gateway. Mesh gateways, the
// only kind there is, are linked to nothing: they carry what comes.
func (c *call) catalogGatewayServices() (any, error) {
	if c.param("gateway") == "" {
		return nil, bad("Missing gateway name")
	}
	return c.blocking(func(ws memdb.WatchSet) (uint64, any, error) {
		idx, _, err := c.store().Service(ws, catalog.Name(c.param("gateway")))
		return idx, []any{}, err
	})
}

// registerRequest is the body of /v1/catalog/register. Its Check may have all
// that those in Checks may.
type registerRequest struct {
	ID              string
	Node            string
	Address         string
	TaggedAddresses map[string]string
	NodeMeta        map[string]string
	Datacenter      string
	Service         *api.AgentService
	Check           *api.HealthCheck
	Checks          api.HealthChecks
	SkipNodeUpdate  bool
	Partition       string
	Locality        *api.Locality
}

func (c *call) catalogRegister() (any, error) {
	var req registerRequest
	if err := c.decodeBody(&req); err != nil {
		return nil, err
	}
	if elsewhere, err := c.bodyDatacenter(req.Datacenter); elsewhere {
		return nil, err
	}
	checks := slices.DeleteFunc(append(api.HealthChecks{req.Check}, req.Checks...), func(k *api.HealthCheck) bool { return k == nil })
	for _, k := range checks {
		if k.CheckID == "" {
			k.CheckID = k.Name
		}
		// A check of the service that is being registered need not name it.
		if k.ServiceID == "" && req.Service != nil && k.ServiceName != "" && k.ServiceName == req.Service.Service {
			k.ServiceID = cmp.Or(req.Service.ID, req.Service.Service)
		}
	}
	if s := req.Service; s != nil {
		if err := normalizeService(s); err != nil {
			return nil, err
		}
	}
	return c.apply(state.RegisterCommand(&api.CatalogRegistration{
		ID: req.ID, Node: req.Node, Address: req.Address, TaggedAddresses: req.TaggedAddresses, NodeMeta: req.NodeMeta,
		Datacenter: c.h.cfg.Datacenter, Service: req.Service, Checks: checks, SkipNodeUpdate: req.SkipNodeUpdate,
		Partition: req.Partition, Locality: req.Locality,
	}))
}

// normalizeService fills in and validates a service that is written to the
// catalog. What is wrong with it is answered 500.
func normalizeService(s *catalog.Service) error {
	if s.ID == "" {
		s.ID = s.Service
	}
	if s.Weights == (api.AgentWeights{}) {
		s.Weights = api.AgentWeights{Passing: 1, Warning: 1}
	}
	if s.Service == "" {
		return nil // the state says it in Consul's words
	}
	if s.Proxy != nil {
		s.Proxy.Config = catalog.CanonicalConfig(s.Proxy.Config)
	}
	return catalog.ValidateService(s)
}

func (c *call) catalogDeregister() (any, error) {
	var req api.CatalogDeregistration
	if err := c.decodeBody(&req); err != nil {
		return nil, err
	}
	if elsewhere, err := c.bodyDatacenter(req.Datacenter); elsewhere {
		return nil, err
	}
	return c.apply(state.DeregisterCommand(&req))
}

// bodyDatacenter passes a write on to the datacenter that its body names, unless
// that is this one or ?dc= has named it before.
func (c *call) bodyDatacenter(dc string) (elsewhere bool, err error) {
	if dc == "" || dc == c.h.cfg.Datacenter || c.opts.dc != "" {
		return false, nil
	}
	if !slices.Contains(c.h.cluster.Datacenters(), dc) {
		return true, state.ErrNoPath
	}
	return true, c.passOn(Target{Datacenter: dc})
}

// apply writes through raft. What the state machine refuses is an error.
func (c *call) apply(cmd state.Command) (any, error) {
	result, _, err := c.h.cluster.Apply(c.ctx(), cmd)
	if err != nil {
		return nil, err
	}
	if err, ok := result.(error); ok {
		return nil, err
	}
	return result, nil
}

// entries returns a reader of config entries that watches what it reads; index is
// the highest of what it has read.
func (c *call) entries(ws memdb.WatchSet, index *uint64) func(kind, name string) (api.ConfigEntry, error) {
	return func(kind, name string) (api.ConfigEntry, error) {
		idx, e, err := c.store().ConfigEntry(ws, kind, name)
		*index = max(*index, idx)
		return e, err
	}
}

func (c *call) statusLeader() (any, error) { return c.h.cluster.Leader(), nil }

func (c *call) statusPeers() (any, error) { return emptyIfNil(c.h.cluster.Peers()), nil }

// operatorRaft lists the voters by what gossip says of their addresses.
func (c *call) operatorRaft() (any, error) {
	type server struct {
		ID, Node, Address string
		Leader            bool
		ProtocolVersion   string
		Voter             bool
		LastIndex         uint64
	}
	leader := c.h.cluster.Leader()
	servers := []server{}
	for _, addr := range c.h.cluster.Peers() {
		s := server{ID: addr, Node: "(unknown)", Address: addr, Leader: addr == leader, ProtocolVersion: "3", Voter: true}
		for _, m := range c.h.cluster.LANMembers() {
			if serverAddress(m) == addr {
				s.Node = m.Name
				s.ID = cmp.Or(m.Tags["id"], s.ID)
			}
		}
		if s.Leader {
			s.LastIndex = c.store().LastIndex()
		}
		servers = append(servers, s)
	}
	if len(servers) == 0 {
		return nil, status(http.StatusInternalServerError, "%s", state.ErrNoLeader)
	}
	return map[string]any{"Servers": servers, "Index": 0}, nil
}

// checkPeer refuses a removal that does not say of which server.
func (c *call) checkPeer() error {
	id, address := c.query.Get("id"), c.query.Get("address")
	switch {
	case id == "" && address == "":
		return bad("Must specify either ?id with the server's ID or ?address with IP:port of peer to remove")
	case id != "" && address != "":
		return bad("Must specify only one of ?id or ?address")
	}
	return nil
}

func (c *call) operatorRemovePeer() (any, error) {
	return nil, c.h.cluster.RemovePeer(c.ctx(), c.query.Get("id"), c.query.Get("address"))
}

func (c *call) operatorTransfer() (any, error) {
	if err := c.h.cluster.TransferLeadership(c.ctx(), c.query.Get("id")); err != nil {
		return nil, err
	}
	return map[string]bool{"Success": true}, nil
}
