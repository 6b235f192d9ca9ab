package state

import (
	"fmt"
	"reflect"
	"strings"

	"github.com/hashicorp/consul/api"
	"github.com/hashicorp/go-uuid"

	"github.com/sluicemesh/sluice/agent/catalog"
)

// Texts of a refused registration are Consul's: clients match on them.

// register writes a node, and the service and checks that came with it, and
// returns true. What is refused leaves nothing behind.
func (w *writer) register(reg *api.CatalogRegistration) any {
	if reg.Node == "" {
		return fmt.Errorf("Must provide node") //nolint:staticcheck // Consul's text
	}
	if reg.Address == "" && !reg.SkipNodeUpdate {
		return fmt.Errorf("Must provide address if SkipNodeUpdate is not set") //nolint:staticcheck // Consul's text
	}
	if reg.ID != "" {
		if _, err := uuid.ParseUUID(reg.ID); err != nil {
			return fmt.Errorf("Bad node ID: %w", err) //nolint:staticcheck // Consul's text
		}
	}
	if err := w.registerNode(reg); err != nil {
		return err
	}
	if reg.Service != nil {
		if err := w.registerService(reg.Node, reg.Service); err != nil {
			return err
		}
	}
	checks := reg.Checks
	if c := reg.Check; c != nil {
		checks = append(checks[:len(checks):len(checks)], &catalog.Check{
			Node: c.Node, CheckID: c.CheckID, Name: c.Name, Status: c.Status, Notes: c.Notes, Output: c.Output,
			ServiceID: c.ServiceID, ServiceName: c.ServiceName, Type: c.Type, ExposedPort: c.ExposedPort,
			Definition: c.Definition, Namespace: c.Namespace, Partition: c.Partition,
		})
	}
	for _, c := range checks {
		if err := w.registerCheck(reg.Node, c); err != nil {
			return err
		}
	}
	return true
}

func (w *writer) registerNode(reg *api.CatalogRegistration) error {
	old := first[*catalog.Node](w.Txn, nil, tableNodes, byID, reg.Node)
	if old != nil && reg.SkipNodeUpdate {
		return nil
	}
	n := &catalog.Node{
		ID: strings.ToLower(reg.ID), Node: reg.Node, Address: reg.Address, Datacenter: reg.Datacenter,
		TaggedAddresses: reg.TaggedAddresses, Meta: reg.NodeMeta, Partition: reg.Partition, Locality: reg.Locality,
		CreateIndex: w.index, ModifyIndex: w.index,
	}
	if n.TaggedAddresses == nil {
		n.TaggedAddresses = map[string]string{}
	}
	if n.Meta == nil {
		n.Meta = map[string]string{}
	}
	if old != nil {
		switch {
		case n.ID == "":
			n.ID = old.ID // who does not know the ID does not take it away
		case old.ID != "" && old.ID != n.ID && !w.serfCritical(old.Node):
			return fmt.Errorf("node name %q is reserved by node %s with address %s", reg.Node, old.ID, old.Address)
		}
		n.CreateIndex = old.CreateIndex
	}
	if n.ID != "" {
		if same := first[*catalog.Node](w.Txn, nil, tableNodes, byUUID, n.ID); same != nil && fold(same.Node) != fold(n.Node) {
			// A node that came back under another name: its services belong to the
			// name it had, and it registers them anew.
			if old != nil && old.ID != n.ID && !w.serfCritical(old.Node) {
				return fmt.Errorf("rename node %q to %q: the name is in use", same.Node, n.Node)
			}
			w.removeNode(same)
			if old == nil {
				n.CreateIndex = same.CreateIndex
			}
		}
	}
	if old != nil {
		n.ModifyIndex = old.ModifyIndex
		if reflect.DeepEqual(old, n) {
			return nil
		}
		n.ModifyIndex = w.index
	}
	insert(w.Txn, tableNodes, n)
	w.bump(tableNodes)
	w.touchNode(n.Node)
	return nil
}

// serfCritical says whether gossip holds a node for failed.
func (w *writer) serfCritical(node string) bool {
	c := first[*catalog.Check](w.Txn, nil, tableChecks, byID, node, catalog.NodeCheckID)
	return c != nil && c.Status == api.HealthCritical
}

func (w *writer) registerService(node string, s *catalog.Service) error {
	if s.Service == "" {
		return fmt.Errorf("Must provide service name (Service.Service) when service ID is provided") //nolint:staticcheck // Consul's text
	}
	n := *s
	if n.ID == "" {
		n.ID = n.Service
	}
	if n.Tags == nil {
		n.Tags = []string{}
	}
	if n.Meta == nil {
		n.Meta = map[string]string{}
	}
	if n.Weights == (api.AgentWeights{}) {
		n.Weights = api.AgentWeights{Passing: 1, Warning: 1}
	}
	n.ContentHash, n.Datacenter = "", "" // only ever computed
	n.CreateIndex, n.ModifyIndex = w.index, w.index
	old := first[*serviceRow](w.Txn, nil, tableServices, byID, node, n.ID)
	if old != nil {
		n.CreateIndex, n.ModifyIndex = old.service.CreateIndex, old.service.ModifyIndex
		if reflect.DeepEqual(old.service, &n) {
			return nil
		}
		n.ModifyIndex = w.index
	}
	insert(w.Txn, tableServices, &serviceRow{node: node, service: &n})
	w.bump(tableServices)
	w.touch(node, n.ID)
	if old != nil && (old.service.Service != n.Service || !reflect.DeepEqual(old.service.Tags, n.Tags)) {
		return w.relabelChecks(node, &n)
	}
	return nil
}

// relabelChecks gives a service's checks its new name and tags.
func (w *writer) relabelChecks(node string, s *catalog.Service) error {
	var checks []*catalog.Check
	for c := range each[*catalog.Check](w.Txn, nil, tableChecks, byService, node, s.ID) {
		checks = append(checks, c)
	}
	for _, c := range checks {
		if err := w.registerCheck(node, c); err != nil {
			return err
		}
	}
	return nil
}

func (w *writer) registerCheck(node string, c *catalog.Check) error {
	n := *c
	if n.Node == "" {
		n.Node = node
	}
	if n.CheckID == "" {
		n.CheckID = n.Name
	}
	if n.CheckID == "" {
		return fmt.Errorf("Must provide check ID or name") //nolint:staticcheck // beside Consul's texts
	}
	if fold(n.Node) != fold(node) {
		return fmt.Errorf("check node %q does not match node %q", n.Node, node)
	}
	n.Node = node
	switch n.Status {
	case api.HealthPassing, api.HealthWarning, api.HealthCritical:
	case "":
		n.Status = api.HealthCritical // unknown is not healthy
	default:
		return fmt.Errorf("invalid check status: %q", n.Status)
	}
	n.ServiceName, n.ServiceTags = "", []string{}
	if n.ServiceID != "" {
		svc := first[*serviceRow](w.Txn, nil, tableServices, byID, node, n.ServiceID)
		if svc == nil {
			return fmt.Errorf("Unknown service ID '%s' for check ID '%s'", n.ServiceID, n.CheckID) //nolint:staticcheck // Consul's text
		}
		n.ServiceID = svc.service.ID
		n.ServiceName, n.ServiceTags = svc.service.Service, svc.service.Tags
	}
	if len(n.Definition.Header) == 0 {
		n.Definition.Header = nil
	}
	n.CreateIndex, n.ModifyIndex = w.index, w.index
	if old := first[*catalog.Check](w.Txn, nil, tableChecks, byID, node, n.CheckID); old != nil {
		n.CreateIndex, n.ModifyIndex = old.CreateIndex, old.ModifyIndex
		if reflect.DeepEqual(old, &n) {
			return nil
		}
		n.ModifyIndex = w.index
		if old.ServiceID != n.ServiceID {
			w.touchCheck(old)
		}
	}
	insert(w.Txn, tableChecks, &n)
	w.bump(tableChecks)
	w.touchCheck(&n)
	return nil
}

// touchCheck marks the instances that a check counts for.
func (w *writer) touchCheck(c *catalog.Check) {
	if c.ServiceID == "" {
		w.touchNode(c.Node)
		return
	}
	w.touch(c.Node, c.ServiceID)
}

// deregister removes a service with its checks, a check, or a node with
// everything on it. What is not there is removed already.
func (w *writer) deregister(d *api.CatalogDeregistration) any {
	if d.Node == "" {
		return fmt.Errorf("Must provide node") //nolint:staticcheck // Consul's text
	}
	switch {
	case d.ServiceID != "":
		if r := first[*serviceRow](w.Txn, nil, tableServices, byID, d.Node, d.ServiceID); r != nil {
			w.removeService(r)
		}
	case d.CheckID != "":
		if c := first[*catalog.Check](w.Txn, nil, tableChecks, byID, d.Node, d.CheckID); c != nil {
			w.removeCheck(c)
		}
	default:
		if n := first[*catalog.Node](w.Txn, nil, tableNodes, byID, d.Node); n != nil {
			w.removeNode(n)
		}
	}
	return true
}

func (w *writer) removeNode(n *catalog.Node) {
	var services []*serviceRow
	for r := range under[*serviceRow](w.Txn, nil, tableServices, n.Node) {
		services = append(services, r)
	}
	for _, r := range services {
		w.removeService(r)
	}
	var checks []*catalog.Check
	for c := range under[*catalog.Check](w.Txn, nil, tableChecks, n.Node) {
		checks = append(checks, c)
	}
	for _, c := range checks {
		w.removeCheck(c)
	}
	remove(w.Txn, tableNodes, n)
	w.bump(tableNodes)
}

func (w *writer) removeService(r *serviceRow) {
	var checks []*catalog.Check
	for c := range each[*catalog.Check](w.Txn, nil, tableChecks, byService, r.node, r.service.ID) {
		checks = append(checks, c)
	}
	for _, c := range checks {
		w.removeCheck(c)
	}
	remove(w.Txn, tableServices, r)
	w.bump(tableServices)
	w.touch(r.node, r.service.ID)
}

func (w *writer) removeCheck(c *catalog.Check) {
	remove(w.Txn, tableChecks, c)
	w.bump(tableChecks)
	w.touchCheck(c)
}
