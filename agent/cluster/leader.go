package cluster

import (
	"context"
	"fmt"
	"net/http"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/serf/serf"
	"golang.org/x/sync/errgroup"

	"github.com/sluicemesh/sluice/acl"
	"github.com/sluicemesh/sluice/agent/configentry"
	"github.com/sluicemesh/sluice/agent/state"
)

// leaderCore is what the leader's duties need of the server they run in. A
// server satisfies it; its methods are safe for concurrent use.
type leaderCore interface {
	// Apply commits a command through raft; see httpapi.Cluster.
	Apply(ctx context.Context, cmd state.Command) (any, uint64, error)
	// Barrier blocks until everything committed before it is applied here.
	Barrier(ctx context.Context) error
	Store() *state.Store
	LANMembers() []serf.Member
	WANMembers() []serf.Member
	// Forward returns a transport to another datacenter's servers.
	Forward(ctx context.Context, t state.Target) (http.RoundTripper, error)
}

// leaderConfig is the part of a server's configuration that its duties as a
// leader depend on.
type leaderConfig struct {
	NodeName   string // this server's name in the LAN pool
	Datacenter string
	// PrimaryDatacenter empty means Datacenter.
	PrimaryDatacenter string
	// NoConnect turns the certificate authority off.
	NoConnect bool
	// CAProvider and CAConfig are connect.ca_provider and connect.ca_config as
	// written; they count only while the cluster has no CA configuration yet.
	CAProvider string
	CAConfig   map[string]any
	// BootstrapEntries are written by the primary's leader where absent.
	BootstrapEntries []configentry.Entry
	// ReplicationToken is sent with requests to the primary.
	ReplicationToken acl.Secret
	Logger           hclog.Logger // nil logs nothing
}

// leader does what only the leader of a datacenter does: it keeps the catalog
// in step with the gossip pool, runs the certificate authority, replicates from
// the primary datacenter and publishes this datacenter's gateways to it.
//
// One leader is made per server and lives as long as it; run is called for each
// term. The CA methods may be called at any time and fail outside a term.
type leader struct {
	core leaderCore
	cfg  leaderConfig
	log  hclog.Logger

	ca *ca

	lan wakeup // the LAN pool changed
	wan wakeup // the WAN pool changed

	reapedMu sync.Mutex
	reaped   map[string]struct{} // members that serf forgot, by name

	duties duties
}

// newLeader starts nothing.
func newLeader(core leaderCore, cfg leaderConfig) *leader {
	if cfg.PrimaryDatacenter == "" {
		cfg.PrimaryDatacenter = cfg.Datacenter
	}
	if cfg.Logger == nil {
		cfg.Logger = hclog.NewNullLogger()
	}
	return &leader{
		core:   core,
		cfg:    cfg,
		log:    cfg.Logger.Named("leader"),
		ca:     newCA(),
		reaped: map[string]struct{}{},
	}
}

// lanEvent tells the duties of a change in the LAN pool. It does not block, and
// may be called whether this server leads or not.
func (l *leader) lanEvent(e serf.MemberEvent) {
	l.reapedMu.Lock()
	for _, m := range e.Members {
		if e.Type == serf.EventMemberReap {
			l.reaped[m.Name] = struct{}{}
		} else {
			delete(l.reaped, m.Name)
		}
	}
	l.reapedMu.Unlock()
	l.lan.wake()
}

// wanEvent tells the duties of a change in the WAN pool; as lanEvent. Loops
// that wait to try another datacenter again do so at once.
func (l *leader) wanEvent(serf.MemberEvent) { l.wan.wake() }

// run does the duties of one term. The server calls it when raft says that it
// leads, and cancels ctx when it no longer does; it returns once everything it
// started has ended. An error means that the term could not be established, and
// the server should call run again, after a pause, while it still leads.
func (l *leader) run(ctx context.Context) error {
	if err := l.core.Barrier(ctx); err != nil {
		return fmt.Errorf("establish leadership: %w", err)
	}
	l.duties.reset()
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return l.reconcileLoop(ctx) })
	if !l.cfg.NoConnect {
		defer l.ca.retire()
		if l.isPrimary() {
			g.Go(func() error { return l.primaryCALoop(ctx) })
		} else {
			g.Go(func() error { return l.secondaryCALoop(ctx) })
		}
	}
	g.Go(func() error { return l.fedStateLoop(ctx) })
	if l.isPrimary() {
		g.Go(func() error { return l.bootstrapEntriesLoop(ctx) })
		g.Go(func() error { return l.fedStatePruneLoop(ctx) })
	} else {
		g.Go(func() error { return l.replicateEntriesLoop(ctx) })
		g.Go(func() error { return l.replicateFedStatesLoop(ctx) })
	}
	return g.Wait()
}

func (l *leader) isPrimary() bool { return l.cfg.Datacenter == l.cfg.PrimaryDatacenter }

// DutyStatus says how a duty of the leader fares. Its health is the age of
// LastSuccess.
type DutyStatus struct {
	Name        string
	LastSuccess time.Time // zero when there was none in this term
	// LastError is the text of the last failure, "" once a pass has succeeded.
	LastError string
	// Since is when the duty came into the state it is in: working or failing.
	Since time.Time
}

// Status returns the state of every duty of this term by name; none when this
// server has not led.
func (l *leader) Status() []DutyStatus { return l.duties.statuses() }
