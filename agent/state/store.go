package state

import (
	"fmt"
	"sync"
	"sync/atomic"

	"github.com/hashicorp/go-memdb"

	"github.com/sluicemesh/sluice/agent/catalog"
)

// Store is the replicated state at the newest command applied. Its methods are
// safe for concurrent use and never block. What they return is shared: it must
// not be changed.
//
// Reads take a watch set, which may be nil, and return the index to block on:
// that of the last change to what was read, or to the table it is in.
type Store struct {
	db        *memdb.MemDB
	abandoned chan struct{}
	lastIndex atomic.Uint64

	// connectMu guards the answer that ConnectAll last gave.
	connectMu    sync.Mutex
	connectIndex uint64
	connectAll   map[catalog.ServiceName][]*catalog.Instance
}

// newStore returns an empty store.
func newStore() *Store {
	db, err := memdb.NewMemDB(newSchema())
	if err != nil {
		panic(fmt.Sprintf("create state store: %v", err)) // the schema is constant
	}
	return &Store{db: db, abandoned: make(chan struct{})}
}

// LastIndex returns the index of the newest command applied, whether or not it
// changed anything.
func (s *Store) LastIndex() uint64 { return s.lastIndex.Load() }

// AbandonCh returns a channel that closes when a restored snapshot has replaced
// this store. Every read adds it to the watch set by itself; it is here for
// those who wait without reading.
func (s *Store) AbandonCh() <-chan struct{} { return s.abandoned }

// read begins a read transaction and watches for the end of the store.
func (s *Store) read(ws memdb.WatchSet) *memdb.Txn {
	ws.Add(s.abandoned)
	return s.db.Txn(false)
}

// writer is the transaction of one command.
type writer struct {
	*memdb.Txn
	index uint64
	// dirty are the instances whose node, service or checks have changed.
	dirty map[instanceKey]struct{}
	// chains are the services whose discovery chains must still compile, by folded
	// name.
	chains map[string]string
}

// write runs f in a transaction that is committed unless the result is an error
// or false, a compare-and-set that missed.
func (s *Store) write(index uint64, f func(*writer) any) any {
	w := &writer{Txn: s.db.Txn(true), index: index, dirty: map[instanceKey]struct{}{}, chains: map[string]string{}}
	defer w.Abort() // nothing to undo after a commit
	res := f(w)
	if _, failed := res.(error); failed || res == false {
		return res
	}
	if err := w.checkChains(); err != nil {
		return err
	}
	w.renewViews()
	w.Commit()
	return res
}

// bump moves an index to that of the command.
func (w *writer) bump(keys ...string) {
	for _, k := range keys {
		insert(w.Txn, tableIndex, &indexRow{Key: k, Index: w.index})
	}
}

// maxIndex returns the highest of some indexes. Nobody watches them: they move
// only together with the rows that readers watch.
func maxIndex(txn *memdb.Txn, keys ...string) uint64 {
	var hi uint64
	for _, k := range keys {
		if r := first[*indexRow](txn, nil, tableIndex, byID, k); r != nil {
			hi = max(hi, r.Index)
		}
	}
	return hi
}
