package httpapi

import (
	"context"
	"errors"
	"time"

	"github.com/hashicorp/go-memdb"

	"github.com/sluicemesh/sluice/acl"
	"github.com/sluicemesh/sluice/agent/catalog"
	"github.com/sluicemesh/sluice/agent/configentry"
	"github.com/sluicemesh/sluice/agent/connect"
)

// Agent is what the API serves of this node: its registrations and checks, its
// certificates, its proxies, and the process itself. All methods are safe for
// concurrent use.
//
// Reads take a watch set (nil allowed) to which they add channels that close
// when another answer may be had, return at once, and return values that are
// shared: neither side changes them afterwards.
//
// Validation of a request is the API's: a definition that arrives here has been
// decoded, normalised and validated ([catalog.ValidateDefinition]). What the
// agent refuses nevertheless is answered with 500 and the text of its error.
type Agent interface {
	// Self returns the statistics of /v1/agent/self (section, key, value; the
	// sections agent, build, consul, raft, runtime, serf_lan, serf_wan) and the
	// node's metadata.
	Self() (stats map[string]map[string]string, meta map[string]string)

	// Services returns the registered services by ID, each with central
	// configuration merged in. Indexes are 0, and ContentHash is empty.
	Services(ws memdb.WatchSet) map[string]*catalog.Service
	// Service returns one of them, or nil. Its channel closes only when this
	// service changes, appears or disappears.
	Service(ws memdb.WatchSet, id string) *catalog.Service
	// RegisterService registers a service and its sidecar_service, if it has one,
	// in place of one with the same ID, persists it, and starts to synchronise it
	// without waiting for the outcome. def.Token is the token to write to the
	// catalog with ("" for the agent's own). Checks that are not in def are kept,
	// unless replaceChecks; checks that are keep their status. The agent keeps def.
	RegisterService(ctx context.Context, def *catalog.Definition, replaceChecks bool) error
	// DeregisterService removes a service, its sidecar if one came with it, and
	// their checks; found is false where there is no such service.
	DeregisterService(ctx context.Context, id string) (found bool, err error)
	// ServiceMaintenance turns maintenance of a service on or off. It does
	// nothing where that changes nothing.
	ServiceMaintenance(ctx context.Context, id string, enable bool, reason string, token acl.Secret) (found bool, err error)

	// Checks returns the checks by ID. Indexes are 0.
	Checks(ws memdb.WatchSet) map[string]*catalog.Check
	// RegisterCheck registers a check of the node, or of the service it names,
	// which exists. check.ID is never empty, nor check.Name.
	RegisterCheck(ctx context.Context, check *CheckRegistration) error
	// DeregisterCheck removes a check; found is false where there is none.
	DeregisterCheck(ctx context.Context, id string) (found bool, err error)
	// UpdateTTL sets the result of a TTL check; status is api.HealthPassing,
	// HealthWarning or HealthCritical. The error for a check of another kind is
	//	CheckID "x" does not have associated TTL
	UpdateTTL(ctx context.Context, id, status, output string) (found bool, err error)
	// NodeMaintenance turns maintenance of the node on or off.
	NodeMaintenance(ctx context.Context, enable bool, reason string, token acl.Secret) error

	// Reload reads the configuration again and applies it, or changes nothing and
	// says why. It returns when the new configuration is in use.
	Reload(ctx context.Context) error
	// Leave leaves the cluster gracefully and then makes the agent stop. It
	// returns once the cluster has been left, before the API stops to serve.
	Leave(ctx context.Context) error

	// Roots, Leaf and Intentions answer as proxycfg.Source does, from what this
	// agent knows, whether it is a server or not; the error is
	// [catalog.ErrPending] until there is a first answer. Leaf takes any service
	// name, registered or not, and keeps its certificate renewed from then on for
	// as long as it is asked for.
	Roots(ws memdb.WatchSet) (*connect.Roots, catalog.Freshness, error)
	Leaf(ws memdb.WatchSet, service catalog.ServiceName) (*connect.Leaf, catalog.Freshness, error)
	Intentions(ws memdb.WatchSet, destination catalog.ServiceName) ([]*configentry.Intention, catalog.Freshness, error)

	// Proxies returns the status of each proxy and gateway that this agent runs or
	// configures, by service ID, as values that encode to JSON and hold no secret.
	Proxies() map[string]any
	// ProxyTable returns the forwarding table in use for a proxy as a value that
	// encodes to JSON and holds no secret; nil while there is none, and found is
	// false where there is no such proxy.
	ProxyTable(id string) (table any, found bool)
	// Connections returns up to limit open connections of a proxy as a value that
	// encodes to a JSON array; the error may be ErrNoProxy.
	Connections(id string, limit int) (list any, err error)

	// DrainProxy begins to drain a proxy and returns when that has been announced;
	// the token is to announce it with. The error may be ErrNoProxy, ErrDraining or
	// ErrNoDrain.
	DrainProxy(ctx context.Context, id string, req DrainRequest, token acl.Secret) error
	// DrainProgress tells how far that is; the error is ErrNoProxy or
	// ErrNotDraining.
	DrainProgress(id string) (progress any, err error)
	// CancelDrain takes it back, and returns when the proxy serves again; the error
	// may be ErrNoProxy or ErrNotDraining.
	CancelDrain(ctx context.Context, id string) error
}

// DrainRequest says how to drain; what is nil is as the agent's configuration has
// it.
type DrainRequest struct {
	Wait, Timeout *time.Duration
	Rate          *float64
}

// Errors of the methods about proxies; they may be wrapped.
var (
	ErrNoProxy     = errors.New("unknown proxy service ID")
	ErrDraining    = errors.New("the proxy is being drained already")
	ErrNotDraining = errors.New("the proxy is not being drained")
	ErrNoDrain     = errors.New("the proxy cannot be drained")
)

// CheckRegistration is a check as registered on its own, not with a service.
type CheckRegistration struct {
	ID, Name, Notes string
	// ServiceID is empty for a check of the node.
	ServiceID string
	// Definition.Status is the initial status, never empty.
	Definition catalog.CheckDefinition
	// Token is the token to write to the catalog with, "" for the service's or
	// the agent's own.
	Token acl.Secret
}
