package state

import (
	"fmt"
	"iter"
	"strings"

	"github.com/hashicorp/go-memdb"

	"github.com/sluicemesh/sluice/agent/catalog"
	"github.com/sluicemesh/sluice/agent/configentry"
)

// Tables. The names of those with an index of their own are also keys of
// tableIndex.
const (
	tableNodes            = "nodes"
	tableServices         = "services"
	tableChecks           = "checks"
	tableInstances        = "instances" // derived
	tableViews            = "views"     // derived, but for the index in each row
	tableConfigEntries    = "config-entries"
	tableFederationStates = "federation-states"
	tableCA               = "ca"
	tableIndex            = "index"
)

// Indexes of tables.
const (
	byID      = "id"
	byUUID    = "uuid"    // nodes
	byService = "service" // checks, by node and service ID; "" are the node's own
	byStatus  = "status"  // checks
	byLink    = "link"    // config entries, by a service that they lead to
)

type (
	serviceRow struct {
		node    string
		service *catalog.Service
	}
	instanceRow struct {
		key  instanceKey
		inst *catalog.Instance
	}
	configRow struct {
		kind, name string
		entry      configentry.Entry
	}
	caRow struct {
		what  string // caRoots, caConfig, caState
		value any
	}
	indexRow struct {
		Key   string
		Index uint64
	}
)

func newSchema() *memdb.DBSchema {
	table := func(name string, indexes ...*memdb.IndexSchema) *memdb.TableSchema {
		t := &memdb.TableSchema{Name: name, Indexes: map[string]*memdb.IndexSchema{}}
		for _, ix := range indexes {
			t.Indexes[ix.Name] = ix
		}
		return t
	}
	tables := []*memdb.TableSchema{
		table(tableNodes,
			unique(func(n *catalog.Node) []string { return []string{n.Node} }),
			&memdb.IndexSchema{Name: byUUID, AllowMissing: true, Indexer: keyIndex[*catalog.Node](func(n *catalog.Node) []string {
				if n.ID == "" {
					return nil
				}
				return []string{n.ID}
			})}),
		table(tableServices, unique(func(r *serviceRow) []string { return []string{r.node, r.service.ID} })),
		table(tableChecks,
			unique(func(c *catalog.Check) []string { return []string{c.Node, c.CheckID} }),
			&memdb.IndexSchema{Name: byService, Indexer: keyIndex[*catalog.Check](func(c *catalog.Check) []string {
				return []string{c.Node, c.ServiceID}
			})},
			&memdb.IndexSchema{Name: byStatus, Indexer: keyIndex[*catalog.Check](func(c *catalog.Check) []string {
				return []string{c.Status}
			})}),
		table(tableInstances, unique(func(r *instanceRow) []string { return []string{r.key.node, r.key.id} })),
		table(tableViews, unique(func(v *view) []string { return []string{v.key.typ, v.key.name} })),
		table(tableConfigEntries,
			unique(func(r *configRow) []string { return []string{r.kind, r.name} }),
			&memdb.IndexSchema{Name: byLink, AllowMissing: true, Indexer: linkIndex{}}),
		table(tableFederationStates, unique(func(s *FederationState) []string { return []string{s.Datacenter} })),
		table(tableCA, unique(func(r *caRow) []string { return []string{r.what} })),
		table(tableIndex, unique(func(r *indexRow) []string { return []string{r.Key} })),
	}
	s := &memdb.DBSchema{Tables: map[string]*memdb.TableSchema{}}
	for _, t := range tables {
		s.Tables[t.Name] = t
	}
	return s
}

// unique is the schema of a table's primary index.
func unique[T any](key func(T) []string) *memdb.IndexSchema {
	return &memdb.IndexSchema{Name: byID, Unique: true, Indexer: keyIndex[T](key)}
}

// keyIndex indexes rows by a tuple of strings; nil means that the row has no
// such key. A prefix is a tuple with fewer parts, never a part of a part.
type keyIndex[T any] func(T) []string

// FromObject implements [memdb.SingleIndexer].
func (f keyIndex[T]) FromObject(raw any) (bool, []byte, error) {
	row, ok := raw.(T)
	if !ok {
		return false, nil, fmt.Errorf("index row: unexpected type %T", raw)
	}
	parts := f(row)
	if parts == nil {
		return false, nil, nil
	}
	return true, encodeKey(parts...), nil
}

// FromArgs implements [memdb.Indexer].
func (f keyIndex[T]) FromArgs(args ...any) ([]byte, error) { return keyFromArgs(args) }

// PrefixFromArgs implements [memdb.PrefixIndexer].
func (f keyIndex[T]) PrefixFromArgs(args ...any) ([]byte, error) { return keyFromArgs(args) }

func keyFromArgs(args []any) ([]byte, error) {
	parts := make([]string, len(args))
	for i, a := range args {
		s, ok := a.(string)
		if !ok {
			return nil, fmt.Errorf("index key: unexpected type %T", a)
		}
		parts[i] = s
	}
	return encodeKey(parts...), nil
}

// encodeKey ends every part with a zero byte, so that no key is the prefix of
// another part's; a zero within a part is followed by a byte that UTF-8 never
// contains.
func encodeKey(parts ...string) []byte {
	n := len(parts)
	for _, p := range parts {
		n += len(p)
	}
	b := make([]byte, 0, n)
	for _, p := range parts {
		p = fold(p)
		if strings.IndexByte(p, 0) >= 0 {
			p = strings.ReplaceAll(p, "\x00", "\x00\xff")
		}
		b = append(b, p...)
		b = append(b, 0)
	}
	return b
}

// fold is the form in which names are compared.
func fold(s string) string { return strings.ToLower(s) }

// first returns the row with a key, or the zero T, and watches it. A failure is
// a mismatch with the schema, hence a panic.
func first[T any](txn *memdb.Txn, ws memdb.WatchSet, table, index string, args ...any) T {
	ch, raw, err := txn.FirstWatch(table, index, args...)
	if err != nil {
		panic(fmt.Sprintf("read table %s by %s: %v", table, index, err))
	}
	ws.Add(ch)
	row, _ := raw.(T)
	return row
}

// each iterates over rows in key order and watches them as a group. The
// transaction must not write meanwhile.
func each[T any](txn *memdb.Txn, ws memdb.WatchSet, table, index string, args ...any) iter.Seq[T] {
	it, err := txn.Get(table, index, args...)
	if err != nil {
		panic(fmt.Sprintf("read table %s by %s: %v", table, index, err))
	}
	ws.Add(it.WatchCh())
	return func(yield func(T) bool) {
		for raw := it.Next(); raw != nil; raw = it.Next() {
			if !yield(raw.(T)) {
				return
			}
		}
	}
}

// under is each for the rows whose key begins with the parts.
func under[T any](txn *memdb.Txn, ws memdb.WatchSet, table string, parts ...any) iter.Seq[T] {
	return each[T](txn, ws, table, byID+"_prefix", parts...)
}

func insert(txn *memdb.Txn, table string, row any) {
	if err := txn.Insert(table, row); err != nil {
		panic(fmt.Sprintf("insert into table %s: %v", table, err))
	}
}

func remove(txn *memdb.Txn, table string, row any) {
	if err := txn.Delete(table, row); err != nil {
		panic(fmt.Sprintf("delete from table %s: %v", table, err))
	}
}
