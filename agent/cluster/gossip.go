package cluster

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/memberlist"
	"github.com/hashicorp/serf/coordinate"
	"github.com/hashicorp/serf/serf"
)

// pool is a gossip pool and the one goroutine that reads its events.
type pool struct {
	*serf.Serf
	wan    bool
	events chan serf.Event
	done   chan struct{} // closed when the event loop has ended
}

// openPool joins nobody yet. onEvent is called from one goroutine, for every
// membership event in order, and must not block: serf would wait for it. Own
// events come too.
//
// When ctx ends, connections that are being opened are given up, so that an agent
// which is stopped while it joins does not wait for hosts that do not answer.
func openPool(ctx context.Context, c *Config, wan bool, tags map[string]string, onEvent func(serf.MemberEvent)) (*pool, error) {
	conf := serf.DefaultConfig()
	conf.Init()
	name, snapshot := "lan", "local"
	if wan {
		name, snapshot = "wan", "remote"
		conf.MemberlistConfig = memberlist.DefaultWANConfig()
	}
	ml := conf.MemberlistConfig
	log := c.Logger.Named("serf." + name)
	conf.Logger = log.StandardLogger(&hclog.StandardLoggerOptions{InferLevels: true})
	ml.Logger = c.Logger.Named("memberlist." + name).StandardLogger(&hclog.StandardLoggerOptions{InferLevels: true})
	conf.LogOutput, ml.LogOutput = nil, nil

	conf.NodeName = c.NodeName
	conf.Tags = maps.Clone(tags)
	if wan {
		conf.NodeName += "." + c.Datacenter
	}
	conf.ProtocolVersion = serf.ProtocolVersionMax
	// Two nodes of one name are an operator's mistake. A vote would make one of
	// them stop its agent, possibly the rightful one; serf logs the conflict.
	conf.EnableNameConflictResolution = false
	// A leave must be known everywhere before the one who left stops answering.
	conf.LeavePropagateDelay = 3 * time.Second
	conf.MinQueueDepth = 4096
	conf.QueueDepthWarning = 4096
	conf.RejoinAfterLeave = c.RejoinAfterLeave
	conf.ReconnectTimeout = c.ReconnectTimeoutLAN
	conf.ReconnectInterval = reconnectInterval
	conf.Merge = &lanMerge{dc: c.Datacenter, name: c.NodeName, id: c.NodeID}
	ml.BindAddr, ml.BindPort = c.BindLAN, c.SerfLANPort
	ml.AdvertiseAddr, ml.AdvertisePort = c.AdvertiseLAN, c.SerfLANPort
	ml.Transport = c.GossipLAN
	ml.DeadNodeReclaimTime = 30 * time.Second
	if wan {
		conf.ReconnectTimeout = c.ReconnectTimeoutWAN
		conf.Merge = wanMerge{}
		ml.BindAddr, ml.BindPort = c.BindWAN, c.SerfWANPort
		ml.AdvertiseAddr, ml.AdvertisePort = c.AdvertiseWAN, c.SerfWANPort
		ml.Transport = c.GossipWAN
	}
	if c.Dev {
		conf.LeavePropagateDelay = 100 * time.Millisecond
		ml.GossipInterval = 100 * time.Millisecond
		ml.ProbeInterval = 100 * time.Millisecond
		ml.ProbeTimeout = 100 * time.Millisecond
		ml.SuspicionMult = 3
	}
	key, err := c.gossipKey()
	if err != nil {
		return nil, err
	}
	ml.SecretKey = key
	ml.GossipVerifyIncoming, ml.GossipVerifyOutgoing = !c.GossipAcceptsClear, !c.GossipSendsClear
	allowed := c.AllowedLAN
	if wan {
		allowed = c.AllowedWAN
	}
	for _, p := range allowed {
		ml.CIDRsAllowed = append(ml.CIDRsAllowed, net.IPNet{
			IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen()),
		})
	}

	if c.DataDir != "" {
		conf.SnapshotPath = filepath.Join(c.DataDir, "serf", snapshot+".snapshot")
		if err := os.MkdirAll(filepath.Dir(conf.SnapshotPath), 0o700); err != nil {
			return nil, fmt.Errorf("open gossip snapshot: %w", err)
		}
	}
	var opened *memberlist.NetTransport
	if ml.Transport == nil {
		opened, err = memberlist.NewNetTransport(&memberlist.NetTransportConfig{
			BindAddrs: []string{ml.BindAddr}, BindPort: ml.BindPort, Logger: ml.Logger,
		})
		if err != nil {
			return nil, fmt.Errorf("open %s gossip: %w", strings.ToUpper(name), err)
		}
		if ml.BindPort == 0 {
			ml.BindPort = opened.GetAutoBindPort()
			ml.AdvertisePort = ml.BindPort
		}
		ml.Transport = &gossipTransport{NetTransport: opened, ctx: ctx}
	}
	p := &pool{wan: wan, events: make(chan serf.Event, 2048), done: make(chan struct{})}
	conf.EventCh = p.events
	p.Serf, err = serf.Create(conf)
	if err != nil {
		if opened != nil {
			_ = opened.Shutdown()
		}
		return nil, fmt.Errorf("open %s gossip on %s: %w", strings.ToUpper(name), joinHostPort(ml.BindAddr, ml.BindPort), err)
	}
	go p.dispatch(onEvent)
	return p, nil
}

// reconnectInterval is how often a failed member is tried: after a cut that took
// longer than members are gossiped to, it is what joins the two sides again. Serf
// spreads the attempts, so that the whole pool makes about one for each failed
// member in this time.
const reconnectInterval = 5 * time.Second

// gossipTransport is memberlist's own, but for connections that end with Run and
// are not waited for as long: the pauses of TCP between attempts grow, so that
// one that was begun during a cut takes long to notice that the cut is over.
type gossipTransport struct {
	*memberlist.NetTransport
	ctx context.Context // of Run
}

// DialTimeout implements [memberlist.Transport].
func (t *gossipTransport) DialTimeout(addr string, timeout time.Duration) (net.Conn, error) {
	d := net.Dialer{Timeout: min(timeout, dialTimeout)}
	return d.DialContext(t.ctx, "tcp", addr)
}

// DialAddressTimeout implements [memberlist.NodeAwareTransport].
func (t *gossipTransport) DialAddressTimeout(a memberlist.Address, timeout time.Duration) (net.Conn, error) {
	return t.DialTimeout(a.Addr, timeout)
}

// dispatch ends once serf has shut down.
func (p *pool) dispatch(onEvent func(serf.MemberEvent)) {
	defer close(p.done)
	for {
		select {
		case e := <-p.events:
			if m, ok := e.(serf.MemberEvent); ok {
				onEvent(m)
			}
		case <-p.ShutdownCh():
			return
		}
	}
}

// close leaves nobody informed: peers see a failure unless Leave came first.
func (p *pool) close() {
	_ = p.Shutdown() // the transport's failure to close is logged by memberlist
	<-p.done
}

// coordinate returns where a member is; nil where that is not known.
func (p *pool) coordinate(member string) *coordinate.Coordinate {
	if member == p.LocalMember().Name {
		c, err := p.GetCoordinate()
		if err != nil {
			return nil // coordinates are turned off
		}
		return c
	}
	c, ok := p.GetCachedCoordinate(member)
	if !ok {
		return nil
	}
	return c
}

// port returns the port that the pool gossips on.
func (p *pool) port() int { return int(p.LocalMember().Port) }

// lanMerge refuses members that do not belong into the datacenter's pool.
type lanMerge struct{ dc, name, id string }

func (d *lanMerge) NotifyMerge(members []*serf.Member) error {
	for _, m := range members {
		if dc, ok := m.Tags[tagDatacenter]; ok && dc != d.dc {
			return fmt.Errorf("Member '%s' part of wrong datacenter '%s'", m.Name, dc) //nolint:staticcheck // Consul's text
		}
		if role := m.Tags[tagRole]; role != roleServer && role != roleClient {
			return fmt.Errorf("Member '%s' is not a server or a node", m.Name) //nolint:staticcheck // style of the others
		}
		if _, lan := m.Tags[tagWANJoinPort]; !lan && m.Tags[tagRole] == roleServer && strings.HasSuffix(m.Name, "."+d.dc) {
			// Without this a wrong port joins the two pools for good.
			return fmt.Errorf("Member '%s' is part of the WAN pool", m.Name) //nolint:staticcheck // style of the others
		}
		if id := m.Tags[tagID]; id != "" && id == d.id && m.Name != d.name {
			return fmt.Errorf("Member '%s' has conflicting node ID '%s' with this agent's ID", m.Name, id) //nolint:staticcheck // Consul's text
		}
	}
	return nil
}

// wanMerge refuses members that are no servers.
type wanMerge struct{}

func (wanMerge) NotifyMerge(members []*serf.Member) error {
	for _, m := range members {
		if _, ok := parseServer(*m); !ok {
			return fmt.Errorf("Member '%s' is not a server", m.Name) //nolint:staticcheck // Consul's text
		}
	}
	return nil
}

// leave tells the pool that this member goes for good.
func (p *pool) leave() error {
	if err := p.Leave(); err != nil {
		return fmt.Errorf("leave gossip pool: %w", err)
	}
	return nil
}

// quickJoin is the pause after the first failed attempt to join; it doubles up
// to the configured interval. Agents that are started together, as in a lab or
// after a power cut, so need not wait for a whole interval.
const quickJoin = 250 * time.Millisecond

// retryJoin joins the pool, again and again until an address answers. Attempts
// within the first interval count as one towards limit; when limit > 0 of them
// failed it returns an error.
func (p *pool) retryJoin(ctx context.Context, addrs []string, interval time.Duration, limit int, log hclog.Logger) error {
	if len(addrs) == 0 {
		return nil
	}
	kind := "LAN"
	if p.wan {
		kind = "WAN"
	}
	log = log.With("cluster", kind)
	log.Info("Joining cluster...")
	var (
		started = time.Now()
		pause   = min(quickJoin, interval)
		failed  int
	)
	for {
		n, err := p.join(addrs)
		if err == nil {
			log.Info("Join cluster completed. Synced with initial agents", "num_agents", n)
			return nil
		}
		if time.Since(started)+pause > interval {
			pause = interval
			failed++
		}
		if limit > 0 && failed >= limit {
			return fmt.Errorf("agent: max join %s retry exhausted, exiting", kind)
		}
		log.Warn("Join cluster failed, will retry", "retry_interval", pause, "error", err)
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(pause):
		}
		pause = min(2*pause, interval)
	}
}

// join returns how many addresses answered; an error only when none did.
func (p *pool) join(addrs []string) (int, error) {
	var plain []string
	var errs []error
	for _, a := range addrs {
		if strings.Contains(a, "provider=") {
			errs = append(errs, fmt.Errorf("join %q: cloud discovery is not supported", a))
			continue
		}
		plain = append(plain, a)
	}
	if len(plain) > 0 {
		n, err := p.Join(plain, true)
		if n > 0 {
			return n, nil
		}
		errs = append(errs, err)
	}
	return 0, errors.Join(errs...)
}

// forceLeave takes a failed member for one that left.
func (p *pool) forceLeave(node string, prune bool) error {
	var err error
	if prune {
		err = p.RemoveFailedNodePrune(node)
	} else {
		err = p.RemoveFailedNode(node)
	}
	if err != nil {
		return fmt.Errorf("force member %q to leave: %w", node, err)
	}
	return nil
}

// wanPortTag tells LAN peers where a server gossips with other datacenters.
func wanPortTag(tags map[string]string, port int) map[string]string {
	t := maps.Clone(tags)
	t[tagWANJoinPort] = strconv.Itoa(port)
	return t
}
