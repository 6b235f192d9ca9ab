package proxycfg

import (
	"errors"

	"github.com/hashicorp/go-memdb"

	"github.com/sluicemesh/sluice/agent/catalog"
	"github.com/sluicemesh/sluice/agent/configentry"
	"github.com/sluicemesh/sluice/agent/connect"
)

// ErrPending is returned by a [Source] that has not got a first answer yet. It
// is transient: a channel in the watch set closes when there is one. Unknown is
// not empty, and never replaces what is known.
var ErrPending = catalog.ErrPending

// ErrDenied is wrapped by errors of a [Source] that refuses the proxy's token.
// The last good snapshot is kept, and the refusal shown.
var ErrDenied = errors.New("permission denied")

// Source answers what [Build] asks. Every method returns at once, with the value
// and how current it is, and adds to ws the channels that close when another
// answer may be had; ws may be nil. What it returns is shared and immutable.
//
// A server answers from its state store, a client agent from what it keeps of
// its servers' answers; an error other than [ErrPending] and [ErrDenied] is
// transient too.
type Source interface {
	// Roots returns the trusted roots; never nil without an error.
	Roots(ws memdb.WatchSet) (*connect.Roots, catalog.Freshness, error)
	// Leaf returns the current certificate of a local service, which the agent
	// renews.
	Leaf(ws memdb.WatchSet, service catalog.ServiceName) (*connect.Leaf, catalog.Freshness, error)
	// ConfigEntry returns nil where there is no such entry.
	ConfigEntry(ws memdb.WatchSet, kind, name string) (configentry.Entry, catalog.Freshness, error)
	// ConfigEntries returns all entries of a kind by name.
	ConfigEntries(ws memdb.WatchSet, kind string) ([]configentry.Entry, catalog.Freshness, error)
	// Intentions returns those that apply to a destination, wildcards included,
	// highest precedence first.
	Intentions(ws memdb.WatchSet, destination catalog.ServiceName) ([]*configentry.Intention, catalog.Freshness, error)
	// Connect returns the instances that accept mutual TLS for a service (its
	// sidecars and native instances), of any health, ordered by node and ID. The
	// datacenter may be another one: only an upstream of mode none asks that.
	Connect(ws memdb.WatchSet, datacenter string, service catalog.ServiceName) ([]*catalog.Instance, catalog.Freshness, error)
	// ConnectAll returns those of every service in this datacenter.
	ConnectAll(ws memdb.WatchSet) (map[catalog.ServiceName][]*catalog.Instance, catalog.Freshness, error)
	// MeshGateways returns the gateways of every datacenter: this one's from its
	// catalog, the others' from the federation states replicated here, so that no
	// other datacenter is asked. A datacenter with none is absent.
	MeshGateways(ws memdb.WatchSet) (map[string][]*catalog.Instance, catalog.Freshness, error)
}

// ServerSource is implemented by sources that know this datacenter's servers.
// Only a gateway that carries the servers' own traffic asks, and without it
// carries none.
type ServerSource interface {
	// Servers returns the instances of service "consul" in this datacenter, of any
	// health, ordered by node.
	Servers(ws memdb.WatchSet) ([]*catalog.Instance, catalog.Freshness, error)
}
