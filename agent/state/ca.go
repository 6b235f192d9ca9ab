package state

import (
	"reflect"

	"github.com/hashicorp/go-memdb"

	"github.com/sluicemesh/sluice/agent/connect"
)

// Rows of the CA table, and the keys of their indexes.
const (
	caRoots  = "ca-roots"
	caConfig = "ca-config"
	caState  = "ca-state"
)

func caValue[T any](txn *memdb.Txn, ws memdb.WatchSet, what string) T {
	var zero T
	row := first[*caRow](txn, ws, tableCA, byID, what)
	if row == nil {
		return zero
	}
	return row.value.(T)
}

func (w *writer) setCA(what string, value any) any {
	insert(w.Txn, tableCA, &caRow{what: what, value: value})
	w.bump(what)
	return true
}

// setCARoots replaces the set of roots if its index is still what the writer
// saw. A root that does not change keeps its indexes.
func (w *writer) setCARoots(cas uint64, roots *connect.Roots) any {
	if maxIndex(w.Txn, caRoots) != cas {
		return false
	}
	old := caValue[*connect.Roots](w.Txn, nil, caRoots)
	was := map[string]*connect.Root{}
	if old != nil {
		for _, r := range old.Roots {
			was[r.ID] = r
		}
	}
	next := &connect.Roots{ActiveRootID: roots.ActiveRootID, TrustDomain: roots.TrustDomain}
	for _, r := range roots.Roots {
		n := *r
		n.CreateIndex, n.ModifyIndex = w.index, w.index
		if o := was[n.ID]; o != nil {
			n.CreateIndex, n.ModifyIndex = o.CreateIndex, o.ModifyIndex
			if !reflect.DeepEqual(o, &n) {
				n.ModifyIndex = w.index
			}
		}
		next.Roots = append(next.Roots, &n)
	}
	if old != nil && reflect.DeepEqual(old, next) {
		return true
	}
	return w.setCA(caRoots, next)
}

// setCAConfig writes the configuration; a ModifyIndex other than 0 must be that
// of the one it replaces.
func (w *writer) setCAConfig(c *connect.CAConfig) any {
	n := *c
	old := caValue[*connect.CAConfig](w.Txn, nil, caConfig)
	if n.ModifyIndex != 0 && (old == nil || old.ModifyIndex != n.ModifyIndex) {
		return false
	}
	n.CreateIndex = w.index
	if old != nil {
		n.CreateIndex, n.ModifyIndex = old.CreateIndex, old.ModifyIndex
		if reflect.DeepEqual(old, &n) {
			return true
		}
	}
	n.ModifyIndex = w.index
	return w.setCA(caConfig, &n)
}

// setCAState writes the built-in provider's state as setCAConfig does the
// configuration.
func (w *writer) setCAState(c *connect.CAState) any {
	n := *c
	old := caValue[*connect.CAState](w.Txn, nil, caState)
	if n.ModifyIndex != 0 && (old == nil || old.ModifyIndex != n.ModifyIndex) {
		return false
	}
	if old != nil {
		n.ModifyIndex, n.Serial = old.ModifyIndex, max(n.Serial, old.Serial)
		if *old == n {
			return true
		}
	}
	n.ModifyIndex = w.index
	return w.setCA(caState, &n)
}

// nextSerial takes a serial number and returns it.
func (w *writer) nextSerial() any {
	var n connect.CAState
	if old := caValue[*connect.CAState](w.Txn, nil, caState); old != nil {
		n = *old
	}
	n.Serial++
	n.ModifyIndex = w.index
	w.setCA(caState, &n)
	return n.Serial
}

// CARoots returns the trusted roots, nil before the CA is initialised.
func (s *Store) CARoots(ws memdb.WatchSet) (uint64, *connect.Roots, error) {
	txn := s.read(ws)
	return maxIndex(txn, caRoots), caValue[*connect.Roots](txn, ws, caRoots), nil
}

// CAConfig returns the CA's configuration, nil before the CA is initialised.
func (s *Store) CAConfig(ws memdb.WatchSet) (uint64, *connect.CAConfig, error) {
	txn := s.read(ws)
	return maxIndex(txn, caConfig), caValue[*connect.CAConfig](txn, ws, caConfig), nil
}

// CAState returns the built-in provider's keys, nil where there are none. They
// must not leave the servers.
func (s *Store) CAState(ws memdb.WatchSet) (uint64, *connect.CAState, error) {
	txn := s.read(ws)
	return maxIndex(txn, caState), caValue[*connect.CAState](txn, ws, caState), nil
}
