package cluster

import (
	"context"
	"fmt"
	"net/http"
	"sync/atomic"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/serf/coordinate"
	"github.com/hashicorp/serf/serf"
	"golang.org/x/sync/errgroup"

	"github.com/sluicemesh/sluice/agent/connect"
	"github.com/sluicemesh/sluice/agent/state"
)

// Client is an agent that keeps no state of its datacenter: it gossips in the
// LAN pool and hands requests to the servers.
type Client struct {
	cfg     Config
	log     hclog.Logger
	trans   *transports
	servers serverList
	ready   chan struct{}
	// lan is open while Run runs.
	lan atomic.Pointer[pool]
}

// NewClient returns a client agent that does nothing before Run.
func NewClient(cfg Config) (*Client, error) {
	cfg, err := cfg.prepare()
	if err != nil {
		return nil, err
	}
	switch {
	case cfg.Bootstrap:
		return nil, fmt.Errorf("'bootstrap = true' requires 'server = true'")
	case cfg.BootstrapExpect > 0:
		return nil, fmt.Errorf("'bootstrap_expect > 0' requires 'server = true'")
	}
	return &Client{
		cfg:   cfg,
		log:   cfg.Logger.Named("client"),
		trans: &transports{dialer: newDialer(&cfg)},
		ready: make(chan struct{}),
	}, nil
}

// NodeID returns the node's UUID.
func (c *Client) NodeID() string { return c.cfg.NodeID }

// SetHandler does nothing: a client agent has no RPC port.
func (c *Client) SetHandler(http.Handler) {}

// Ready is closed once the gossip pool is open. No server need be known yet.
func (c *Client) Ready() <-chan struct{} { return c.ready }

// rebalanceInterval is how often the order of the servers is chosen anew.
const rebalanceInterval = 3 * time.Minute

// Run is the client's life; see [Server.Run].
func (c *Client) Run(ctx context.Context) error {
	defer c.trans.close()
	lan, err := openPool(ctx, &c.cfg, false, c.cfg.tags(false, 0), c.servers.update)
	if err != nil {
		return err
	}
	defer lan.close()
	c.lan.Store(lan)
	defer c.lan.Store(nil)
	close(c.ready)
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		return lan.retryJoin(ctx, c.cfg.RetryJoin, c.cfg.RetryInterval, c.cfg.RetryMax, c.log)
	})
	g.Go(func() error {
		tick := time.NewTicker(rebalanceInterval)
		defer tick.Stop()
		for {
			select {
			case <-ctx.Done():
				return nil
			case <-tick.C:
				c.servers.sync(lan.Members())
				c.servers.shuffle()
			}
		}
	})
	return g.Wait()
}

// Leave leaves the gossip pool and waits for the drain time; see [Server.Leave].
func (c *Client) Leave(ctx context.Context) error {
	lan := c.lan.Load()
	if lan == nil {
		return nil
	}
	c.log.Info("client starting leave")
	err := lan.leave()
	wait(ctx, c.cfg.LeaveDrainTime)
	return err
}

// Forward returns a transport to a server of this datacenter, which passes
// requests on to the leader or another datacenter by itself. Servers that do not
// answer are asked last from then on. While no server is known at all, as before
// the pool is joined, it waits for one, up to RPCHoldTimeout; servers that are
// known and failed are not waited for. Errors, of Forward and wrapped of
// requests: [state.ErrNoServers].
func (c *Client) Forward(ctx context.Context, _ state.Target) (http.RoundTripper, error) {
	servers, err := c.await(ctx)
	if err != nil {
		return nil, err
	}
	return &forwarder{
		transports: c.trans,
		next:       oneOf(servers, state.ErrNoServers),
		onFail:     func(s server) { c.servers.demote(s.address) },
	}, nil
}

// await returns the servers to ask, of which there is at least one.
func (c *Client) await(ctx context.Context) ([]server, error) {
	// Taken before the servers are looked at: a change in between is not missed.
	changed := c.servers.changed.wait()
	servers, known := c.servers.healthy(c.cfg.Datacenter)
	if len(servers) > 0 {
		return servers, nil
	}
	if known {
		return nil, state.ErrNoServers
	}
	timeout := time.NewTimer(c.cfg.RPCHoldTimeout)
	defer timeout.Stop()
	for {
		select {
		case <-changed:
		case <-timeout.C:
			return nil, state.ErrNoServers
		case <-ctx.Done():
			return nil, fmt.Errorf("wait for servers: %w", context.Cause(ctx))
		}
		changed = c.servers.changed.wait()
		if servers, _ = c.servers.healthy(c.cfg.Datacenter); len(servers) > 0 {
			return servers, nil
		}
	}
}

// Store returns nil: a client agent has no state.
func (c *Client) Store() *state.Store { return nil }

// IsLeader returns false.
func (c *Client) IsLeader() bool { return false }

// Leader returns "": the servers know.
func (c *Client) Leader() string { return "" }

// Peers returns none: the servers know them.
func (c *Client) Peers() []string { return []string{} }

// LastContact returns 0: answers carry the server's.
func (c *Client) LastContact() time.Duration { return 0 }

// Apply returns an error wrapping [state.ErrNotLeader].
func (c *Client) Apply(context.Context, state.Command) (any, uint64, error) {
	return nil, 0, fmt.Errorf("apply command on a client agent: %w", state.ErrNotLeader)
}

// VerifyLeader returns an error wrapping [state.ErrNotLeader].
func (c *Client) VerifyLeader(context.Context) error {
	return fmt.Errorf("verify leader on a client agent: %w", state.ErrNotLeader)
}

// Datacenters returns this agent's own: the servers know the others.
func (c *Client) Datacenters() []string { return []string{c.cfg.Datacenter} }

// LANMembers returns the members of this datacenter's pool.
func (c *Client) LANMembers() []serf.Member {
	if lan := c.lan.Load(); lan != nil {
		return lan.Members()
	}
	return nil
}

// WANMembers returns nil.
func (c *Client) WANMembers() []serf.Member { return nil }

// Coordinate returns where a member of the LAN pool is in the network, by what
// its answers to this agent's probes told; nil where there were none yet.
func (c *Client) Coordinate(member string) *coordinate.Coordinate {
	if lan := c.lan.Load(); lan != nil {
		return lan.coordinate(member)
	}
	return nil
}

// Join joins the LAN pool; see [Server.Join].
func (c *Client) Join(addrs []string, wan bool) (int, error) {
	lan := c.lan.Load()
	switch {
	case wan:
		return 0, fmt.Errorf("join WAN pool: not a server")
	case lan == nil:
		return 0, errNotRunning
	}
	return lan.join(addrs)
}

// ForceLeave takes a failed member of the LAN pool for one that left.
func (c *Client) ForceLeave(node string, prune, wan bool) error {
	lan := c.lan.Load()
	switch {
	case wan:
		return fmt.Errorf("force WAN member to leave: not a server")
	case lan == nil:
		return errNotRunning
	}
	return lan.forceLeave(node, prune)
}

// RemovePeer returns an error wrapping [state.ErrNotLeader].
func (c *Client) RemovePeer(context.Context, string, string) error {
	return fmt.Errorf("remove raft peer on a client agent: %w", state.ErrNotLeader)
}

// TransferLeadership returns an error wrapping [state.ErrNotLeader].
func (c *Client) TransferLeadership(context.Context, string) error {
	return fmt.Errorf("transfer leadership on a client agent: %w", state.ErrNotLeader)
}

// SignLeaf returns an error wrapping [state.ErrNotLeader].
func (c *Client) SignLeaf(context.Context, string) (*connect.Leaf, error) {
	return nil, fmt.Errorf("sign leaf on a client agent: %w", state.ErrNotLeader)
}

// SignIntermediate returns an error wrapping [state.ErrNotLeader].
func (c *Client) SignIntermediate(context.Context, string) (string, error) {
	return "", fmt.Errorf("sign intermediate on a client agent: %w", state.ErrNotLeader)
}

// SetCAConfig returns an error wrapping [state.ErrNotLeader].
func (c *Client) SetCAConfig(context.Context, *connect.CAConfig) error {
	return fmt.Errorf("set ca configuration on a client agent: %w", state.ErrNotLeader)
}
