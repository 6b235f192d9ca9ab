package state

import (
	"cmp"
	"slices"

	"github.com/hashicorp/consul/api"
	"github.com/hashicorp/go-memdb"

	"github.com/sluicemesh/sluice/agent/catalog"
)

// instanceKey identifies a service instance; both parts are folded.
type instanceKey struct{ node, id string }

func keyOf(node, id string) instanceKey { return instanceKey{fold(node), fold(id)} }

func (k instanceKey) compare(l instanceKey) int {
	return cmp.Or(cmp.Compare(k.node, l.node), cmp.Compare(k.id, l.id))
}

// Types of view.
const (
	viewService = "service" // the instances of a service
	viewConnect = "connect" // those that accept mutual TLS for a service
	viewKind    = "kind"    // those of a gateway kind
)

// indexConnect moves with every change to any view of type viewConnect.
const indexConnect = "connect"

// extinct is the index of the last time that a view of a type ended: the index
// of those that do not exist.
func extinct(typ string) string { return "extinct-" + typ }

type viewKey struct{ typ, name string }

// view is a group of instances, by node and ID. It exists while it has any.
type view struct {
	key       viewKey
	name      catalog.ServiceName // not of viewKind
	instances []*catalog.Instance
	index     uint64
}

func serviceView(n catalog.ServiceName) viewKey {
	n = n.Canonical()
	return viewKey{viewService, fold(n.String())}
}

func connectView(n catalog.ServiceName) viewKey {
	n = n.Canonical()
	return viewKey{viewConnect, fold(n.String())}
}

// viewsOf returns the views that an instance is in.
func viewsOf(inst *catalog.Instance) []viewKey {
	if inst == nil {
		return nil
	}
	keys := []viewKey{serviceView(catalog.ServiceNameOf(inst.Service))}
	if dest, ok := catalog.DestinationOf(inst.Service); ok {
		keys = append(keys, connectView(dest))
	}
	// Gateways are few and often asked for by kind. A view of all sidecars would be
	// copied at each of their changes.
	if catalog.IsGateway(inst.Service.Kind) {
		keys = append(keys, viewKey{viewKind, string(inst.Service.Kind)})
	}
	return keys
}

// nameIn returns the name of the view of a type that an instance is in.
func nameIn(typ string, inst *catalog.Instance) catalog.ServiceName {
	switch typ {
	case viewService:
		return catalog.ServiceNameOf(inst.Service)
	case viewConnect:
		dest, _ := catalog.DestinationOf(inst.Service)
		return dest
	}
	return catalog.ServiceName{}
}

func (w *writer) touch(node, id string) { w.dirty[keyOf(node, id)] = struct{}{} }

// touchNode marks all instances on a node.
func (w *writer) touchNode(node string) {
	for r := range under[*serviceRow](w.Txn, nil, tableServices, node) {
		w.touch(node, r.service.ID)
	}
}

// renewViews brings instances and views up to date with what was written.
func (w *writer) renewViews() {
	keys := make([]instanceKey, 0, len(w.dirty))
	for k := range w.dirty {
		keys = append(keys, k)
	}
	slices.SortFunc(keys, instanceKey.compare)
	for _, k := range keys {
		var old *catalog.Instance
		row := first[*instanceRow](w.Txn, nil, tableInstances, byID, k.node, k.id)
		if row != nil {
			old = row.inst
		}
		now := buildInstance(w.Txn, k)
		switch {
		case now != nil:
			insert(w.Txn, tableInstances, &instanceRow{key: k, inst: now})
		case row != nil:
			remove(w.Txn, tableInstances, row)
		}
		in := viewsOf(now)
		for _, v := range in {
			w.setInView(v, k, now)
		}
		for _, v := range viewsOf(old) {
			if !slices.Contains(in, v) {
				w.setInView(v, k, nil)
			}
		}
	}
}

// setInView puts an instance into a view, in place of its predecessor if it has
// one; nil takes it out.
func (w *writer) setInView(vk viewKey, k instanceKey, inst *catalog.Instance) {
	v := first[*view](w.Txn, nil, tableViews, byID, vk.typ, vk.name)
	next := &view{key: vk, index: w.index}
	if v != nil {
		at, found := slices.BinarySearchFunc(v.instances, k, func(i *catalog.Instance, k instanceKey) int {
			return keyOf(i.Node.Node, i.Service.ID).compare(k)
		})
		next.instances = make([]*catalog.Instance, 0, len(v.instances)+1)
		next.instances = append(next.instances, v.instances[:at]...)
		if inst != nil {
			next.instances = append(next.instances, inst)
		}
		if found {
			at++
		}
		next.instances = append(next.instances, v.instances[at:]...)
	} else if inst != nil {
		next.instances = []*catalog.Instance{inst}
	}
	if vk.typ == viewConnect {
		w.bump(indexConnect)
	}
	if len(next.instances) == 0 {
		if v != nil {
			remove(w.Txn, tableViews, v)
		}
		w.bump(extinct(vk.typ))
		return
	}
	next.name = nameIn(vk.typ, next.instances[0])
	insert(w.Txn, tableViews, next)
}

// buildInstance joins an instance from its tables; nil when it is gone.
func buildInstance(txn *memdb.Txn, k instanceKey) *catalog.Instance {
	svc := first[*serviceRow](txn, nil, tableServices, byID, k.node, k.id)
	if svc == nil {
		return nil
	}
	inst := &catalog.Instance{
		Node:    first[*catalog.Node](txn, nil, tableNodes, byID, k.node),
		Service: svc.service,
		Checks:  api.HealthChecks{},
	}
	for c := range each[*catalog.Check](txn, nil, tableChecks, byService, k.node, "") {
		inst.Checks = append(inst.Checks, c)
	}
	for c := range each[*catalog.Check](txn, nil, tableChecks, byService, k.node, k.id) {
		inst.Checks = append(inst.Checks, c)
	}
	return inst
}

// readView returns a view's instances and its index, and watches it.
func readView(txn *memdb.Txn, ws memdb.WatchSet, k viewKey) (uint64, []*catalog.Instance) {
	v := first[*view](txn, ws, tableViews, byID, k.typ, k.name)
	if v == nil {
		return maxIndex(txn, extinct(k.typ)), nil
	}
	return v.index, v.instances
}
