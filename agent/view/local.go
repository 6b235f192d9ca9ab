package view

import (
	"time"

	"github.com/hashicorp/go-memdb"

	"github.com/sluicemesh/sluice/agent/catalog"
	"github.com/sluicemesh/sluice/agent/configentry"
	"github.com/sluicemesh/sluice/agent/connect"
	"github.com/sluicemesh/sluice/agent/state"
)

// Leaves keeps this agent's certificates.
type Leaves interface {
	// Leaf returns the current certificate of a service, as a Source's does.
	Leaf(ws memdb.WatchSet, service catalog.ServiceName) (*connect.Leaf, catalog.Freshness, error)
}

// LocalConfig is what a [Local] reads. All fields but Ready are required.
type LocalConfig struct {
	// Store returns the current store: it changes when a snapshot is restored.
	Store func() *state.Store
	// LastContact is the time since the leader was heard from; 0 on the leader.
	LastContact func() time.Duration
	// Remote answers for other datacenters.
	Remote     *Remote
	Leaves     Leaves
	Datacenter string
	// Ready closes when this server has caught up with the log for the first time
	// since it started. Until then its store may be empty where the datacenter is
	// not, and every read is pending. Nil means that it has.
	Ready <-chan struct{}
}

// Local answers from a server's own replicated state. Its methods are safe for
// concurrent use.
type Local struct{ cfg LocalConfig }

// NewLocal returns a view of a server's state.
func NewLocal(cfg LocalConfig) *Local { return &Local{cfg} }

// pending says that the store is not to be believed yet.
func (l *Local) pending(ws memdb.WatchSet) error {
	if l.cfg.Ready == nil {
		return nil
	}
	select {
	case <-l.cfg.Ready:
		return nil
	default:
		ws.Add(l.cfg.Ready)
		return catalog.ErrPending
	}
}

// read makes a Source's answer of a store's.
func read[T any](l *Local, ws memdb.WatchSet, from func(*state.Store) (uint64, T, error)) (T, catalog.Freshness, error) {
	var zero T
	if err := l.pending(ws); err != nil {
		return zero, catalog.Freshness{}, err
	}
	idx, v, err := from(l.cfg.Store())
	if err != nil {
		return zero, catalog.Freshness{}, err
	}
	return v, catalog.Freshness{Index: idx, AsOf: time.Now().Add(-l.cfg.LastContact())}, nil
}

// Roots returns the trusted roots; before the CA is initialised they are pending.
func (l *Local) Roots(ws memdb.WatchSet) (*connect.Roots, catalog.Freshness, error) {
	roots, fresh, err := read(l, ws, func(s *state.Store) (uint64, *connect.Roots, error) { return s.CARoots(ws) })
	if err == nil && roots.Active() == nil {
		return nil, catalog.Freshness{}, catalog.ErrPending
	}
	return roots, fresh, err
}

// Leaf returns the current certificate of a local service.
func (l *Local) Leaf(ws memdb.WatchSet, service catalog.ServiceName) (*connect.Leaf, catalog.Freshness, error) {
	return l.cfg.Leaves.Leaf(ws, service)
}

// ConfigEntry returns nil where there is no such entry.
func (l *Local) ConfigEntry(ws memdb.WatchSet, kind, name string) (configentry.Entry, catalog.Freshness, error) {
	return read(l, ws, func(s *state.Store) (uint64, configentry.Entry, error) { return s.ConfigEntry(ws, kind, name) })
}

// ConfigEntries returns all entries of a kind by name.
func (l *Local) ConfigEntries(ws memdb.WatchSet, kind string) ([]configentry.Entry, catalog.Freshness, error) {
	return read(l, ws, func(s *state.Store) (uint64, []configentry.Entry, error) { return s.ConfigEntries(ws, kind) })
}

// Intentions returns those that apply to a destination, highest precedence first.
func (l *Local) Intentions(ws memdb.WatchSet, destination catalog.ServiceName) ([]*configentry.Intention, catalog.Freshness, error) {
	return intentions(l, ws, destination)
}

// Connect returns the instances that accept mutual TLS for a service.
func (l *Local) Connect(ws memdb.WatchSet, datacenter string, service catalog.ServiceName) ([]*catalog.Instance, catalog.Freshness, error) {
	if datacenter != "" && datacenter != l.cfg.Datacenter {
		return l.cfg.Remote.Connect(ws, datacenter, service)
	}
	return read(l, ws, func(s *state.Store) (uint64, []*catalog.Instance, error) { return s.Connect(ws, service) })
}

// ConnectAll returns those of every service in this datacenter.
func (l *Local) ConnectAll(ws memdb.WatchSet) (map[catalog.ServiceName][]*catalog.Instance, catalog.Freshness, error) {
	return read(l, ws, func(s *state.Store) (uint64, map[catalog.ServiceName][]*catalog.Instance, error) {
		return s.ConnectAll(ws)
	})
}

// MeshGateways returns the gateways of every datacenter that has any.
func (l *Local) MeshGateways(ws memdb.WatchSet) (map[string][]*catalog.Instance, catalog.Freshness, error) {
	return read(l, ws, func(s *state.Store) (uint64, map[string][]*catalog.Instance, error) {
		return s.MeshGateways(ws, l.cfg.Datacenter)
	})
}

// entries is what intentions are read from.
type entries interface {
	ConfigEntry(ws memdb.WatchSet, kind, name string) (configentry.Entry, catalog.Freshness, error)
}

// intentions joins the entries that have a say on a destination. It is as current
// as the oldest of them.
func intentions(from entries, ws memdb.WatchSet, destination catalog.ServiceName) ([]*configentry.Intention, catalog.Freshness, error) {
	var fresh catalog.Freshness
	get := func(kind, name string) (configentry.Entry, error) {
		e, f, err := from.ConfigEntry(ws, kind, name)
		if err != nil {
			return nil, err
		}
		fresh.Index = max(fresh.Index, f.Index)
		if fresh.AsOf.IsZero() || f.AsOf.Before(fresh.AsOf) {
			fresh.AsOf = f.AsOf
		}
		return e, nil
	}
	out, err := configentry.IntentionsFor(get, destination)
	if err != nil {
		return nil, catalog.Freshness{}, err
	}
	return out, fresh, nil
}
