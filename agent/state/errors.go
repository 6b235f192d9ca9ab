package state

import "errors"

// Errors of reaching the authority for some state. Their texts are
// Consul's: clients match on them.
var (
	// ErrNotLeader is returned by writes on a server that does not lead.
	ErrNotLeader = errors.New("node is not the leader")
	// ErrNoLeader means that the datacenter has no leader now.
	ErrNoLeader = errors.New("No cluster leader") //nolint:staticcheck // clients match the text
	// ErrNoServers is returned on a client agent that knows no server.
	ErrNoServers = errors.New("No known Consul servers") //nolint:staticcheck // clients match the text
	// ErrNoPath means that the datacenter is not known.
	ErrNoPath = errors.New("No path to datacenter") //nolint:staticcheck // clients match the text
	// ErrNoRemoteServer means that the datacenter is known and no server of it
	// can be reached.
	ErrNoRemoteServer = errors.New("Remote DC has no server currently reachable") //nolint:staticcheck // clients match the text
)

// Target names the agent that a request is passed on to.
type Target struct {
	// Datacenter other than this agent's own: a healthy server there.
	Datacenter string
	// Leader asks for this datacenter's leader; otherwise any of its servers.
	Leader bool
}
