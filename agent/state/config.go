package state

import (
	"fmt"
	"reflect"

	"github.com/hashicorp/consul/api"
	"github.com/hashicorp/go-memdb"

	"github.com/sluicemesh/sluice/agent/catalog"
	"github.com/sluicemesh/sluice/agent/configentry"
)

// entryName is the name that an entry is kept and looked up under: the bare name
// in the default tenancy, else partition/namespace/name.
func entryName(e configentry.Entry) string {
	return catalog.ServiceName{Name: e.GetName(), Namespace: e.GetNamespace(), Partition: e.GetPartition()}.String()
}

// setEntryIndexes sets the indexes of an entry that nobody else has yet.
func setEntryIndexes(e configentry.Entry, create, modify uint64) {
	v := reflect.ValueOf(e).Elem()
	v.FieldByName("CreateIndex").SetUint(create)
	v.FieldByName("ModifyIndex").SetUint(modify)
}

// configEntry applies a write to one entry. It returns true, or false for a
// compare-and-set that missed.
func (w *writer) configEntry(c *configEntryCommand) any {
	if c.Op.deletes() {
		return w.deleteConfigEntry(c)
	}
	e := c.entry
	row := &configRow{kind: e.GetKind(), name: entryName(e), entry: e}
	old := first[*configRow](w.Txn, nil, tableConfigEntries, byID, row.kind, row.name)
	create := w.index
	if old != nil {
		// Equality comes before the comparison of indexes: to write what is there
		// succeeds with any index.
		create = old.entry.GetCreateIndex()
		setEntryIndexes(e, create, old.entry.GetModifyIndex())
		if reflect.DeepEqual(old.entry, e) {
			return true
		}
	}
	if c.Op == ConfigEntryUpsertCAS {
		switch {
		case c.Index == 0 && old != nil,
			c.Index != 0 && (old == nil || old.entry.GetModifyIndex() != c.Index):
			return false
		}
	}
	setEntryIndexes(e, create, w.index)
	insert(w.Txn, tableConfigEntries, row)
	w.bump(tableConfigEntries)
	if c.Op != ConfigEntryReplicate {
		w.affects(row.kind, row.name)
	}
	return true
}

func (w *writer) deleteConfigEntry(c *configEntryCommand) any {
	old := first[*configRow](w.Txn, nil, tableConfigEntries, byID, c.Kind, c.Name)
	if old == nil {
		return true
	}
	if c.Op == ConfigEntryDeleteCAS && old.entry.GetModifyIndex() != c.Index {
		return false
	}
	remove(w.Txn, tableConfigEntries, old)
	w.bump(tableConfigEntries)
	if c.Op != ConfigEntryReplicateDelete {
		w.affects(old.kind, old.name)
	}
	return true
}

// ConfigEntry returns an entry, nil when there is none. A name outside the
// default tenancy is spelled as [catalog.ServiceName.String] does. The index is
// that of all entries.
func (s *Store) ConfigEntry(ws memdb.WatchSet, kind, name string) (uint64, configentry.Entry, error) {
	txn := s.read(ws)
	row := first[*configRow](txn, ws, tableConfigEntries, byID, kind, name)
	if row == nil {
		return maxIndex(txn, tableConfigEntries), nil, nil
	}
	return maxIndex(txn, tableConfigEntries), row.entry, nil
}

// ConfigEntries returns the entries of a kind by name. The index is that of all
// entries.
func (s *Store) ConfigEntries(ws memdb.WatchSet, kind string) (uint64, []configentry.Entry, error) {
	txn := s.read(ws)
	out := []configentry.Entry{}
	for r := range under[*configRow](txn, ws, tableConfigEntries, kind) {
		out = append(out, r.entry)
	}
	return maxIndex(txn, tableConfigEntries), out, nil
}

// AllConfigEntries returns all entries by kind and name.
func (s *Store) AllConfigEntries(ws memdb.WatchSet) (uint64, []configentry.Entry, error) {
	txn := s.read(ws)
	out := []configentry.Entry{}
	for r := range under[*configRow](txn, ws, tableConfigEntries) {
		out = append(out, r.entry)
	}
	return maxIndex(txn, tableConfigEntries), out, nil
}

// linkIndex indexes an entry by the services that its chain leads on to.
type linkIndex struct{}

// FromObject implements [memdb.MultiIndexer].
func (linkIndex) FromObject(raw any) (bool, [][]byte, error) {
	row, ok := raw.(*configRow)
	if !ok {
		return false, nil, fmt.Errorf("index row: unexpected type %T", raw)
	}
	var out [][]byte
	for _, name := range linksOf(row.entry) {
		out = append(out, encodeKey(name))
	}
	return len(out) > 0, out, nil
}

// FromArgs implements [memdb.Indexer].
func (linkIndex) FromArgs(args ...any) ([]byte, error) { return keyFromArgs(args) }

// linksOf returns the names of the services that a router, splitter or resolver
// names, possibly more than once.
func linksOf(e configentry.Entry) []string {
	var out []string
	add := func(name, namespace, partition string) {
		if name != "" {
			out = append(out, catalog.ServiceName{Name: name, Namespace: namespace, Partition: partition}.String())
		}
	}
	switch e := e.(type) {
	case *api.ServiceRouterConfigEntry:
		for _, r := range e.Routes {
			if d := r.Destination; d != nil {
				add(d.Service, d.Namespace, d.Partition)
			}
		}
	case *api.ServiceSplitterConfigEntry:
		for _, s := range e.Splits {
			add(s.Service, s.Namespace, s.Partition)
		}
	case *api.ServiceResolverConfigEntry:
		if r := e.Redirect; r != nil {
			add(r.Service, r.Namespace, r.Partition)
		}
		for _, f := range e.Failover {
			add(f.Service, f.Namespace, "")
			for _, t := range f.Targets {
				add(t.Service, t.Namespace, t.Partition)
			}
		}
	}
	return out
}
