package state

import (
	"errors"
	"fmt"
	"io"
	"sync/atomic"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/raft"
)

// FSM is the state machine that raft drives: the only writer of the store.
type FSM struct {
	logger hclog.Logger
	store  atomic.Pointer[Store]
}

var _ raft.FSM = (*FSM)(nil)

// NewFSM returns a state machine with an empty store. A nil logger discards.
func NewFSM(logger hclog.Logger) *FSM {
	if logger == nil {
		logger = hclog.NewNullLogger()
	}
	f := &FSM{logger: logger.Named("state")}
	f.store.Store(newStore())
	return f
}

// Store returns the current store. It is replaced when a snapshot is restored:
// whoever is woken by a watch asks again.
func (f *FSM) Store() *Store { return f.store.Load() }

// Apply implements [raft.FSM]. It returns an error if the command is refused,
// else its result; a refused command changes nothing. It panics on a command of a
// newer server: to pass over it would make this server's state another one.
func (f *FSM) Apply(l *raft.Log) any {
	s := f.store.Load()
	defer s.lastIndex.Store(l.Index)
	c, err := DecodeCommand(l.Data)
	if errors.Is(err, errUnknownCommand) {
		panic(fmt.Sprintf("apply log entry %d: %v: this server is older than the one that wrote it", l.Index, err))
	}
	if err != nil {
		f.logger.Error("cannot decode log entry", "index", l.Index, "error", err)
		return err
	}
	return s.write(l.Index, func(w *writer) any { return w.apply(c) })
}

// Snapshot implements [raft.FSM].
func (f *FSM) Snapshot() (raft.FSMSnapshot, error) {
	s := f.store.Load()
	return &snapshot{txn: s.db.Txn(false), lastIndex: s.lastIndex.Load()}, nil
}

// Restore implements [raft.FSM]: it replaces the store, and wakes everyone who
// waits on the one before. On an error the store stays.
func (f *FSM) Restore(r io.ReadCloser) error {
	defer r.Close()
	s, err := readSnapshot(r)
	if err != nil {
		return fmt.Errorf("restore snapshot: %w", err)
	}
	old := f.store.Swap(s)
	close(old.abandoned)
	f.logger.Info("restored snapshot", "index", s.LastIndex())
	return nil
}
