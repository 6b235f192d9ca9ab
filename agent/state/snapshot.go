package state

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"

	"github.com/hashicorp/go-memdb"
	"github.com/hashicorp/raft"

	"github.com/sluicemesh/sluice/agent/catalog"
	"github.com/sluicemesh/sluice/agent/connect"
)

// snapshotVersion is that of the stream: a header, records, and a trailer, each
// one line of JSON. A reader refuses later ones.
const snapshotVersion = 1

// snapshotFormat tells a snapshot of ours from anything else.
const snapshotFormat = "sluice-state"

type snapshotHeader struct {
	Format    string
	Version   int
	LastIndex uint64
}

// snapshotRecord is one row. The order of records is that of their tables below,
// and of keys within them, so that equal states have equal snapshots.
type snapshotRecord struct {
	Type string
	Data json.RawMessage
}

// Types of record.
const (
	recordNode            = "node"
	recordService         = "service"
	recordCheck           = "check"
	recordView            = "view"
	recordConfigEntry     = "config-entry"
	recordFederationState = "federation-state"
	recordCARoots         = "ca-roots"
	recordCAConfig        = "ca-config"
	recordCAState         = "ca-state"
	recordIndex           = "index"
	recordEnd             = "end" // Data is the number of records before
)

type (
	serviceRecord struct {
		Node    string
		Service *catalog.Service
	}
	// viewRecord keeps the index of a view; its instances follow from the tables.
	viewRecord struct {
		Type, Name string
		Index      uint64
	}
	entryRecord struct {
		Kind, Name string
		Entry      json.RawMessage
	}
)

// snapshot is a moment of the store; writes go on meanwhile.
type snapshot struct {
	txn       *memdb.Txn
	lastIndex uint64
}

// Release implements [raft.FSMSnapshot].
func (s *snapshot) Release() { s.txn.Abort() }

// Persist implements [raft.FSMSnapshot].
func (s *snapshot) Persist(sink raft.SnapshotSink) error {
	if err := s.write(sink); err != nil {
		return errors.Join(fmt.Errorf("write snapshot: %w", err), sink.Cancel())
	}
	return sink.Close()
}

// write streams the snapshot. It holds secrets in the clear.
func (s *snapshot) write(out io.Writer) error {
	buf := bufio.NewWriter(out)
	enc := json.NewEncoder(buf)
	if err := enc.Encode(snapshotHeader{snapshotFormat, snapshotVersion, s.lastIndex}); err != nil {
		return err
	}
	count := 0
	var failed error
	put := func(typ string, v any) {
		if failed != nil {
			return
		}
		data, err := json.Marshal(v)
		if err == nil {
			err = enc.Encode(snapshotRecord{typ, data})
		}
		count++
		failed = err
	}
	for n := range under[*catalog.Node](s.txn, nil, tableNodes) {
		put(recordNode, n)
	}
	for r := range under[*serviceRow](s.txn, nil, tableServices) {
		put(recordService, serviceRecord{r.node, r.service})
	}
	for c := range under[*catalog.Check](s.txn, nil, tableChecks) {
		put(recordCheck, c)
	}
	for v := range under[*view](s.txn, nil, tableViews) {
		put(recordView, viewRecord{v.key.typ, v.key.name, v.index})
	}
	for r := range under[*configRow](s.txn, nil, tableConfigEntries) {
		data, err := json.Marshal(r.entry)
		if err != nil {
			return err
		}
		put(recordConfigEntry, entryRecord{r.kind, r.name, data})
	}
	for fs := range under[*FederationState](s.txn, nil, tableFederationStates) {
		put(recordFederationState, fs)
	}
	if r := caValue[*connect.Roots](s.txn, nil, caRoots); r != nil {
		put(recordCARoots, r)
	}
	if c := caValue[*connect.CAConfig](s.txn, nil, caConfig); c != nil {
		put(recordCAConfig, recordOfConfig(c))
	}
	if st := caValue[*connect.CAState](s.txn, nil, caState); st != nil {
		put(recordCAState, recordOfState(st))
	}
	for r := range under[*indexRow](s.txn, nil, tableIndex) {
		put(recordIndex, r)
	}
	records := count
	put(recordEnd, records)
	if failed != nil {
		return failed
	}
	return buf.Flush()
}

// readSnapshot builds a store from a stream.
func readSnapshot(in io.Reader) (*Store, error) {
	dec := json.NewDecoder(bufio.NewReader(in))
	var h snapshotHeader
	if err := dec.Decode(&h); err != nil {
		return nil, fmt.Errorf("read header: %w", err)
	}
	if h.Format != snapshotFormat {
		return nil, fmt.Errorf("not a snapshot of this program: format %q", h.Format)
	}
	if h.Version != snapshotVersion {
		return nil, fmt.Errorf("snapshot of version %d: this server reads version %d", h.Version, snapshotVersion)
	}
	s := newStore()
	txn := s.db.Txn(true)
	defer txn.Abort()
	views := map[viewKey]*view{}
	for count := 0; ; count++ {
		var rec snapshotRecord
		if err := dec.Decode(&rec); err != nil {
			if errors.Is(err, io.EOF) {
				err = io.ErrUnexpectedEOF
			}
			return nil, fmt.Errorf("read record %d: %w", count, err)
		}
		if rec.Type == recordEnd {
			var want int
			if err := json.Unmarshal(rec.Data, &want); err != nil || want != count {
				return nil, fmt.Errorf("read trailer: %d records, want %s", count, rec.Data)
			}
			break
		}
		if err := readRecord(txn, rec, views); err != nil {
			return nil, fmt.Errorf("read record %d of type %q: %w", count, rec.Type, err)
		}
	}
	if err := restoreViews(txn, views); err != nil {
		return nil, err
	}
	txn.Commit()
	s.lastIndex.Store(h.LastIndex)
	return s, nil
}

func readRecord(txn *memdb.Txn, rec snapshotRecord, views map[viewKey]*view) error {
	into := func(v any) error { return json.Unmarshal(rec.Data, v) }
	switch rec.Type {
	case recordNode:
		n := &catalog.Node{}
		if err := into(n); err != nil {
			return err
		}
		return txn.Insert(tableNodes, n)
	case recordService:
		var r serviceRecord
		if err := into(&r); err != nil {
			return err
		}
		if r.Service == nil {
			return errors.New("no service")
		}
		return txn.Insert(tableServices, &serviceRow{r.Node, r.Service})
	case recordCheck:
		c := &catalog.Check{}
		if err := into(c); err != nil {
			return err
		}
		if len(c.Definition.Header) == 0 {
			c.Definition.Header = nil
		}
		return txn.Insert(tableChecks, c)
	case recordView:
		var r viewRecord
		if err := into(&r); err != nil {
			return err
		}
		k := viewKey{r.Type, r.Name}
		views[k] = &view{key: k, index: r.Index}
		return nil
	case recordConfigEntry:
		var r entryRecord
		if err := into(&r); err != nil {
			return err
		}
		e, err := decodeEntry(r.Kind, r.Entry)
		if err != nil {
			return err
		}
		return txn.Insert(tableConfigEntries, &configRow{r.Kind, r.Name, e})
	case recordFederationState:
		fs := &FederationState{}
		if err := into(fs); err != nil {
			return err
		}
		if err := fs.check(); err != nil {
			return err
		}
		return txn.Insert(tableFederationStates, fs)
	case recordCARoots:
		r := &connect.Roots{}
		if err := into(r); err != nil {
			return err
		}
		if err := checkRoots(r); err != nil {
			return err
		}
		return txn.Insert(tableCA, &caRow{caRoots, r})
	case recordCAConfig:
		r := &caConfigRecord{CAConfig: &connect.CAConfig{}}
		if err := into(r); err != nil {
			return err
		}
		return txn.Insert(tableCA, &caRow{caConfig, r.config()})
	case recordCAState:
		r := &caStateRecord{}
		if err := into(r); err != nil {
			return err
		}
		return txn.Insert(tableCA, &caRow{caState, r.state()})
	case recordIndex:
		r := &indexRow{}
		if err := into(r); err != nil {
			return err
		}
		return txn.Insert(tableIndex, r)
	}
	return errors.New("unknown type of record")
}

// restoreViews joins the instances again and groups them.
func restoreViews(txn *memdb.Txn, views map[viewKey]*view) error {
	var rows []*instanceRow
	for r := range under[*serviceRow](txn, nil, tableServices) {
		k := keyOf(r.node, r.service.ID)
		inst := buildInstance(txn, k)
		if inst.Node == nil {
			return fmt.Errorf("service %q: no node %q", r.service.ID, r.node)
		}
		rows = append(rows, &instanceRow{k, inst})
	}
	// Instances of a view are in the order of their folded keys, which is that of
	// the table but where a name has bytes below the separator.
	slices.SortFunc(rows, func(a, b *instanceRow) int { return a.key.compare(b.key) })
	for _, r := range rows {
		insert(txn, tableInstances, r)
		for _, k := range viewsOf(r.inst) {
			v := views[k]
			if v == nil {
				return fmt.Errorf("service %q: no index of view %s %q", r.inst.Service.ID, k.typ, k.name)
			}
			v.instances = append(v.instances, r.inst)
		}
	}
	for _, v := range views { // their order does not matter: a table has its own
		if len(v.instances) == 0 {
			return fmt.Errorf("view %s %q: no instances", v.key.typ, v.key.name)
		}
		v.name = nameIn(v.key.typ, v.instances[0])
		insert(txn, tableViews, v)
	}
	return nil
}
