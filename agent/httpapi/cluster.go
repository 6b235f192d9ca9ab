package httpapi

import (
	"context"
	"net/http"
	"time"

	"github.com/hashicorp/serf/coordinate"
	"github.com/hashicorp/serf/serf"

	"github.com/sluicemesh/sluice/agent/connect"
	"github.com/sluicemesh/sluice/agent/state"
)

// Target names the agent that a request is passed on to.
type Target = state.Target

// Cluster is this agent's place in its datacenter and among the others, as a
// server or as a client agent. All methods are safe for concurrent use.
type Cluster interface {
	// Store returns the replicated state; nil on a client agent, which passes on
	// everything that is not about itself.
	Store() *state.Store
	IsLeader() bool
	// Leader returns the RPC address (ip:port) of the leader, "" when there is none.
	Leader() string
	// Peers returns the RPC addresses of the voters.
	Peers() []string
	// LastContact is the time since the leader was heard from; 0 on the leader.
	LastContact() time.Duration
	// Apply commits a command through raft and returns what the state machine
	// answered and the command's index. It blocks until the command is applied
	// here. Only the leader can; others return an error wrapping
	// [state.ErrNotLeader].
	Apply(ctx context.Context, cmd state.Command) (any, uint64, error)
	// VerifyLeader confirms with a quorum that this server still leads.
	VerifyLeader(ctx context.Context) error
	// Forward returns a transport to another agent's RPC port: requests sent
	// through it keep their path, query, headers and body; the host is ignored.
	// Errors: the sentinels of package state.
	Forward(ctx context.Context, t Target) (http.RoundTripper, error)

	// Datacenters returns the known ones, this one first, then by distance.
	Datacenters() []string
	LANMembers() []serf.Member
	WANMembers() []serf.Member // nil on a client agent
	// Coordinate returns where a member of the LAN pool is in the network, as far as
	// this agent knows; nil where it does not.
	Coordinate(member string) *coordinate.Coordinate
	// Join joins the LAN or WAN pool and returns how many addresses answered.
	Join(addrs []string, wan bool) (int, error)
	// ForceLeave turns a failed member into one that left; prune forgets it.
	ForceLeave(node string, prune, wan bool) error
	// RemovePeer removes a server from raft's configuration by its ID or, where that
	// is "", by its RPC address. A server that is alive is added again. Leader only.
	RemovePeer(ctx context.Context, id, address string) error
	// TransferLeadership has the server with that ID lead, or, where that is "", any
	// other one. It blocks until that has happened. Leader only.
	TransferLeadership(ctx context.Context, id string) error

	// SignLeaf signs a leaf certificate request (PEM). Leader only.
	SignLeaf(ctx context.Context, csrPEM string) (*connect.Leaf, error)
	// SignIntermediate signs another datacenter's CA. Leader of the primary only.
	SignIntermediate(ctx context.Context, csrPEM string) (certPEM string, err error)
	// SetCAConfig replaces the CA's configuration, rotating the root where the
	// change asks for it. Leader of the primary only.
	SetCAConfig(ctx context.Context, c *connect.CAConfig) error
}
