package state

import (
	"reflect"
	"time"

	"github.com/hashicorp/consul/api"
	"github.com/hashicorp/go-memdb"

	"github.com/sluicemesh/sluice/agent/catalog"
)

// FederationState is what one datacenter tells the others of itself: its mesh
// gateways. Its JSON form is that of /v1/internal/federation-state.
type FederationState struct {
	Datacenter string
	// MeshGateways are all of them, of any health, by node and ID.
	MeshGateways []*catalog.Instance `json:",omitempty"`
	// UpdatedAt is by the clock of the datacenter that wrote it.
	UpdatedAt time.Time
	// PrimaryModifyIndex is ModifyIndex in the primary datacenter, which
	// replication compares.
	PrimaryModifyIndex uint64
	CreateIndex        uint64
	ModifyIndex        uint64
}

// SameGateways says whether two lists of gateways say the same, indexes apart.
func SameGateways(a, b []*catalog.Instance) bool {
	if len(a) != len(b) {
		return false
	}
	for i := range a {
		if !reflect.DeepEqual(withoutIndexes(a[i]), withoutIndexes(b[i])) {
			return false
		}
	}
	return true
}

// withoutIndexes returns a copy of what an instance says, indexes apart. Empty
// and absent are the same here: JSON on the way makes the one of the other.
func withoutIndexes(inst *catalog.Instance) catalog.Instance {
	var out catalog.Instance
	if n := inst.Node; n != nil {
		c := *n
		c.CreateIndex, c.ModifyIndex = 0, 0
		c.TaggedAddresses, c.Meta = nilIfEmpty(c.TaggedAddresses), nilIfEmpty(c.Meta)
		out.Node = &c
	}
	if s := inst.Service; s != nil {
		c := *s
		c.CreateIndex, c.ModifyIndex = 0, 0
		c.TaggedAddresses, c.Meta = nilIfEmpty(c.TaggedAddresses), nilIfEmpty(c.Meta)
		if len(c.Tags) == 0 {
			c.Tags = nil
		}
		out.Service = &c
	}
	for _, check := range inst.Checks {
		c := *check
		c.CreateIndex, c.ModifyIndex = 0, 0
		if len(c.ServiceTags) == 0 {
			c.ServiceTags = nil
		}
		c.Definition.Header = nilIfEmpty(c.Definition.Header)
		out.Checks = append(out.Checks, &c)
	}
	return out
}

func nilIfEmpty[V any](m map[string]V) map[string]V {
	if len(m) == 0 {
		return nil
	}
	return m
}

// upsertFederationState writes a datacenter's record and returns true. With no
// PrimaryModifyIndex it is the primary's own write, and gets this one.
func (w *writer) upsertFederationState(s *FederationState) any {
	n := *s
	n.CreateIndex, n.ModifyIndex = w.index, w.index
	if old := first[*FederationState](w.Txn, nil, tableFederationStates, byID, n.Datacenter); old != nil {
		if (n.PrimaryModifyIndex == 0 || n.PrimaryModifyIndex == old.PrimaryModifyIndex) && SameGateways(old.MeshGateways, n.MeshGateways) {
			return true
		}
		n.CreateIndex = old.CreateIndex
	}
	if n.PrimaryModifyIndex == 0 {
		n.PrimaryModifyIndex = w.index
	}
	insert(w.Txn, tableFederationStates, &n)
	w.bump(tableFederationStates)
	return true
}

func (w *writer) deleteFederationState(datacenter string) any {
	if old := first[*FederationState](w.Txn, nil, tableFederationStates, byID, datacenter); old != nil {
		remove(w.Txn, tableFederationStates, old)
		w.bump(tableFederationStates)
	}
	return true
}

// FederationState returns a datacenter's record, nil when there is none.
func (s *Store) FederationState(ws memdb.WatchSet, datacenter string) (uint64, *FederationState, error) {
	txn := s.read(ws)
	fs := first[*FederationState](txn, ws, tableFederationStates, byID, datacenter)
	return maxIndex(txn, tableFederationStates), fs, nil
}

// FederationStates returns all records by datacenter.
func (s *Store) FederationStates(ws memdb.WatchSet) (uint64, []*FederationState, error) {
	txn := s.read(ws)
	out := []*FederationState{}
	for fs := range under[*FederationState](txn, ws, tableFederationStates) {
		out = append(out, fs)
	}
	return maxIndex(txn, tableFederationStates), out, nil
}

// MeshGateways returns the mesh gateways of every datacenter that has any: this
// one's from its catalog, the others' from their federation states.
func (s *Store) MeshGateways(ws memdb.WatchSet, localDC string) (uint64, map[string][]*catalog.Instance, error) {
	txn := s.read(ws)
	out := map[string][]*catalog.Instance{}
	for fs := range under[*FederationState](txn, ws, tableFederationStates) {
		if fold(fs.Datacenter) != fold(localDC) && len(fs.MeshGateways) > 0 {
			out[fs.Datacenter] = fs.MeshGateways
		}
	}
	idx, local := readView(txn, ws, viewKey{viewKind, string(api.ServiceKindMeshGateway)})
	if len(local) > 0 {
		out[localDC] = local
	}
	return max(idx, maxIndex(txn, tableFederationStates)), out, nil
}
