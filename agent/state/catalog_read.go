package state

import (
	"iter"
	"slices"

	"github.com/hashicorp/consul/api"
	"github.com/hashicorp/go-memdb"

	"github.com/sluicemesh/sluice/agent/catalog"
)

// Nodes returns all nodes by name.
func (s *Store) Nodes(ws memdb.WatchSet) (uint64, []*catalog.Node, error) {
	txn := s.read(ws)
	out := []*catalog.Node{}
	for n := range under[*catalog.Node](txn, ws, tableNodes) {
		out = append(out, n)
	}
	return maxIndex(txn, tableNodes), out, nil
}

// Node returns a node, nil when there is none of the name.
func (s *Store) Node(ws memdb.WatchSet, name string) (uint64, *catalog.Node, error) {
	txn := s.read(ws)
	n := first[*catalog.Node](txn, ws, tableNodes, byID, name)
	return maxIndex(txn, tableNodes), n, nil
}

// NodeByID returns the node with a node ID (a UUID), nil when there is none.
func (s *Store) NodeByID(ws memdb.WatchSet, id string) (uint64, *catalog.Node, error) {
	txn := s.read(ws)
	n := first[*catalog.Node](txn, ws, tableNodes, byUUID, id)
	return maxIndex(txn, tableNodes), n, nil
}

// NodeServices is a node and what is registered on it, by service ID.
type NodeServices struct {
	Node     *catalog.Node
	Services []*catalog.Service
}

// NodeServices returns a node's services, nil when there is no such node.
func (s *Store) NodeServices(ws memdb.WatchSet, node string) (uint64, *NodeServices, error) {
	txn := s.read(ws)
	idx := maxIndex(txn, tableNodes, tableServices)
	n := first[*catalog.Node](txn, ws, tableNodes, byID, node)
	if n == nil {
		return idx, nil, nil
	}
	out := &NodeServices{Node: n, Services: []*catalog.Service{}}
	for r := range under[*serviceRow](txn, ws, tableServices, node) {
		out.Services = append(out.Services, r.service)
	}
	return idx, out, nil
}

// ServiceList returns the names of all services, each with the tags that any of
// its instances has, sorted.
func (s *Store) ServiceList(ws memdb.WatchSet) (uint64, map[string][]string, error) {
	txn := s.read(ws)
	out := map[string][]string{}
	for r := range under[*serviceRow](txn, ws, tableServices) {
		name := catalog.ServiceNameOf(r.service).String()
		tags, ok := out[name]
		if !ok {
			tags = []string{}
		}
		out[name] = append(tags, r.service.Tags...)
	}
	for name, tags := range out {
		slices.Sort(tags)
		out[name] = slices.Compact(tags)
	}
	return maxIndex(txn, tableServices), out, nil
}

// Service returns the instances of a service, of any health, by node and ID. The
// index is that of the service alone.
func (s *Store) Service(ws memdb.WatchSet, name catalog.ServiceName) (uint64, []*catalog.Instance, error) {
	idx, out := readView(s.read(ws), ws, serviceView(name))
	return idx, out, nil
}

// Connect returns the instances that accept mutual TLS for a service: its
// sidecars and its native instances, of any health, by node and ID. The index is
// that of the service alone.
func (s *Store) Connect(ws memdb.WatchSet, name catalog.ServiceName) (uint64, []*catalog.Instance, error) {
	idx, out := readView(s.read(ws), ws, connectView(name))
	return idx, out, nil
}

// ConnectAll returns what Connect does, of every service that has any. As long
// as nothing of it changes it returns the same map; after a change, the slices of
// the services that did not change are the same.
func (s *Store) ConnectAll(ws memdb.WatchSet) (uint64, map[catalog.ServiceName][]*catalog.Instance, error) {
	txn := s.read(ws)
	rows := under[*view](txn, ws, tableViews, viewConnect)
	idx := maxIndex(txn, indexConnect)
	s.connectMu.Lock()
	defer s.connectMu.Unlock()
	if s.connectAll != nil && s.connectIndex == idx {
		return idx, s.connectAll, nil
	}
	out := make(map[catalog.ServiceName][]*catalog.Instance, len(s.connectAll))
	for v := range rows {
		out[v.name] = v.instances
	}
	if s.connectAll == nil || s.connectIndex < idx {
		s.connectIndex, s.connectAll = idx, out
	}
	return idx, out, nil
}

// ServicesByKind returns the instances of a kind, of any health, by node and ID.
// For gateways the index is that of the kind alone.
func (s *Store) ServicesByKind(ws memdb.WatchSet, kind catalog.Kind) (uint64, []*catalog.Instance, error) {
	txn := s.read(ws)
	if catalog.IsGateway(kind) {
		idx, out := readView(txn, ws, viewKey{viewKind, string(kind)})
		return idx, out, nil
	}
	var out []*catalog.Instance
	for r := range under[*instanceRow](txn, ws, tableInstances) {
		if r.inst.Service.Kind == kind {
			out = append(out, r.inst)
		}
	}
	return maxIndex(txn, tableNodes, tableServices, tableChecks), out, nil
}

// ServiceDump returns all instances by node and ID.
func (s *Store) ServiceDump(ws memdb.WatchSet) (uint64, []*catalog.Instance, error) {
	txn := s.read(ws)
	out := []*catalog.Instance{}
	for r := range under[*instanceRow](txn, ws, tableInstances) {
		out = append(out, r.inst)
	}
	return maxIndex(txn, tableNodes, tableServices, tableChecks), out, nil
}

// NodeChecks returns a node's checks, its services' among them, by ID.
func (s *Store) NodeChecks(ws memdb.WatchSet, node string) (uint64, []*catalog.Check, error) {
	txn := s.read(ws)
	out := []*catalog.Check{}
	for c := range under[*catalog.Check](txn, ws, tableChecks, node) {
		out = append(out, c)
	}
	return maxIndex(txn, tableChecks), out, nil
}

// ServiceChecks returns the checks of a service's instances, without those of
// their nodes, by node, instance and ID. The index is that of the service alone.
func (s *Store) ServiceChecks(ws memdb.WatchSet, name catalog.ServiceName) (uint64, []*catalog.Check, error) {
	idx, instances := readView(s.read(ws), ws, serviceView(name))
	out := []*catalog.Check{}
	for _, inst := range instances {
		for _, c := range inst.Checks {
			if c.ServiceID != "" {
				out = append(out, c)
			}
		}
	}
	return idx, out, nil
}

// ChecksInState returns the checks with a status, or all for "any", by node
// and ID.
func (s *Store) ChecksInState(ws memdb.WatchSet, status string) (uint64, []*catalog.Check, error) {
	txn := s.read(ws)
	rows := func() iter.Seq[*catalog.Check] {
		if status == api.HealthAny {
			return under[*catalog.Check](txn, ws, tableChecks)
		}
		return each[*catalog.Check](txn, ws, tableChecks, byStatus, status)
	}
	out := []*catalog.Check{}
	for c := range rows() {
		out = append(out, c)
	}
	return maxIndex(txn, tableChecks), out, nil
}
