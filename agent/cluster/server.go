package cluster

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/raft"
	"github.com/hashicorp/serf/coordinate"
	"github.com/hashicorp/serf/serf"
	"golang.org/x/sync/errgroup"

	"github.com/sluicemesh/sluice/agent/connect"
	"github.com/sluicemesh/sluice/agent/state"
)

// Server is a member of a datacenter's quorum, or on the way to becoming one.
type Server struct {
	cfg     Config
	log     hclog.Logger
	handler http.Handler
	fsm     *state.FSM
	leader  *leader
	dialer  *dialer
	trans   *transports

	// lan and wan are the servers of the pools.
	lan, wan serverList
	departed departures // from the LAN pool
	leads    *leaderWatch

	// Rung when the LAN pool changed.
	flood, voters, founding bell

	made  time.Time
	ready chan struct{}
	// caughtUp: see CaughtUp.
	caughtUp chan struct{}
	// up is what Run has started; nil before and after.
	up atomic.Pointer[running]
}

// running is what exists only while Run does.
type running struct {
	raft     *raft.Raft
	lan, wan *pool
	address  string // that others reach the RPC port at
	// settled is the last term that this server has led with all that was committed
	// before it applied.
	settled atomic.Uint64
}

// NewServer returns a server that does nothing before Run. It reads, or makes,
// the node's ID in the data directory.
func NewServer(cfg Config) (*Server, error) {
	cfg, err := cfg.prepare()
	if err != nil {
		return nil, err
	}
	s := &Server{
		cfg:      cfg,
		log:      cfg.Logger.Named("server"),
		handler:  http.NotFoundHandler(),
		fsm:      state.NewFSM(cfg.Logger.Named("fsm")),
		dialer:   newDialer(&cfg),
		leads:    newLeaderWatch(),
		flood:    newBell(),
		voters:   newBell(),
		founding: newBell(),
		made:     time.Now(),
		ready:    make(chan struct{}),
		caughtUp: make(chan struct{}),
	}
	s.trans = &transports{dialer: s.dialer}
	s.leader = newLeader(s, leaderConfig{
		NodeName:          cfg.NodeName,
		Datacenter:        cfg.Datacenter,
		PrimaryDatacenter: cfg.PrimaryDatacenter,
		NoConnect:         cfg.NoConnect,
		CAProvider:        cfg.CAProvider,
		CAConfig:          cfg.CAConfig,
		BootstrapEntries:  cfg.BootstrapEntries,
		ReplicationToken:  cfg.ReplicationToken,
		Logger:            cfg.Logger,
	})
	return s, nil
}

// prepare validates c, fills in defaults and finds the node's ID.
func (c Config) prepare() (Config, error) {
	if err := c.Validate(); err != nil {
		return c, err
	}
	c, err := c.withDefaults()
	if err != nil {
		return c, err
	}
	if c.BootstrapExpect == 1 {
		c.Bootstrap, c.BootstrapExpect = true, 0
	}
	if c.NodeID, err = nodeID(c.NodeID, c.DataDir); err != nil {
		return c, err
	}
	return c, nil
}

// NodeID returns the node's UUID.
func (s *Server) NodeID() string { return s.cfg.NodeID }

// SetHandler sets what serves requests on the RPC port; nil finds nothing. It
// is called before Run. Requests that come in there satisfy [FromRPC].
func (s *Server) SetHandler(h http.Handler) {
	if h == nil {
		h = http.NotFoundHandler()
	}
	s.handler = h
}

// Ready is closed once the RPC port and the gossip pools are open. There need
// not be a leader yet.
func (s *Server) Ready() <-chan struct{} { return s.ready }

// Run is the server's life: it starts everything, blocks until ctx ends, and
// returns nil once everything has ended. An error is of starting, or of joining
// a pool in vain for as often as was configured. It can be called once.
func (s *Server) Run(ctx context.Context) (err error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	// Deferred calls run from the last: the mirror of the order of starting.
	store, err := openRaftStore(&s.cfg)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, store.close()) }()

	listener, err := s.cfg.Network.Listen(joinHostPort(s.cfg.BindLAN, s.cfg.ServerPort))
	if err != nil {
		return fmt.Errorf("open rpc port: %w", err)
	}
	port := s.cfg.ServerPort
	if a, ok := listener.Addr().(*net.TCPAddr); ok {
		port = a.Port
	}
	up := &running{address: joinHostPort(s.cfg.AdvertiseLAN, port)}

	// The handler may be asked for things before there is a leader; it answers
	// that there is none.
	rpc := newRPC(listener, &s.cfg, s.handler, s.log)
	rpc.start(ctx)
	defer rpc.stop()
	defer s.trans.close()

	// Gossip comes before raft, since it knows where the others are now.
	tags := s.cfg.tags(true, port)
	up.wan, err = openPool(ctx, &s.cfg, true, tags, s.onWAN)
	if err != nil {
		return err
	}
	defer up.wan.close()
	up.lan, err = openPool(ctx, &s.cfg, false, wanPortTag(tags, up.wan.port()), s.onLAN)
	if err != nil {
		return err
	}
	defer up.lan.close()

	up.raft, err = s.openRaft(store, rpc.mux.raft, up.address)
	if err != nil {
		return err
	}
	defer func() {
		if serr := up.raft.Shutdown().Error(); serr != nil {
			err = errors.Join(err, fmt.Errorf("stop raft: %w", serr))
		}
	}()
	s.up.Store(up)
	defer s.up.Store(nil)
	close(s.ready)

	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { s.watchLeader(ctx, up.raft); return nil })
	g.Go(func() error { s.leadLoop(ctx, up); return nil })
	g.Go(func() error { s.catchUp(ctx, up.raft); return nil })
	g.Go(func() error { s.floodLoop(ctx, up); return nil })
	if s.cfg.BootstrapExpect > 0 && !store.used {
		g.Go(func() error { s.foundLoop(ctx, up); return nil })
	}
	g.Go(func() error {
		return up.lan.retryJoin(ctx, s.cfg.RetryJoin, s.cfg.RetryInterval, s.cfg.RetryMax, s.log)
	})
	g.Go(func() error {
		return up.wan.retryJoin(ctx, s.cfg.RetryJoinWAN, s.cfg.RetryIntervalWAN, s.cfg.RetryMaxWAN, s.log)
	})
	g.Go(func() error { <-ctx.Done(); return nil })
	return g.Wait()
}

// onLAN takes in a change of the LAN pool. It must not block.
func (s *Server) onLAN(e serf.MemberEvent) {
	s.lan.update(e)
	s.departed.note(e)
	s.flood.ring()
	s.voters.ring()
	s.founding.ring()
	s.leader.lanEvent(e)
}

// onWAN takes in a change of the WAN pool. It must not block.
func (s *Server) onWAN(e serf.MemberEvent) {
	s.wan.update(e)
	s.leader.wanEvent(e)
}

// watchLeader keeps s.leads up to date.
func (s *Server) watchLeader(ctx context.Context, r *raft.Raft) {
	// The observation only wakes; should the buffer overflow, what is in it will.
	ch := make(chan raft.Observation, 8)
	o := raft.NewObserver(ch, false, func(o *raft.Observation) bool {
		_, ok := o.Data.(raft.LeaderObservation)
		return ok
	})
	r.RegisterObserver(o)
	defer r.DeregisterObserver(o)
	defer s.leads.set("")
	for {
		address, id := r.LeaderWithID()
		if old, _ := s.leads.get(); old != string(address) && address != "" {
			s.log.Info("New leader elected", "leader_id", string(id), "leader_addr", string(address))
		}
		s.leads.set(string(address))
		select {
		case <-ctx.Done():
			return
		case <-ch:
		}
	}
}

// floodInterval is how often LAN peers are pushed into the WAN pool although
// nothing has changed.
const floodInterval = 60 * time.Second

// floodLoop joins every server of this datacenter to the WAN pool, so that it is
// enough if one of them, or of theirs, is told of another datacenter.
func (s *Server) floodLoop(ctx context.Context, up *running) {
	tick := time.NewTicker(floodInterval)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-s.flood:
		case <-tick.C:
			s.lan.sync(up.lan.Members())
			s.wan.sync(up.wan.Members())
		}
		var missing []string
		there := s.wan.all()
		for _, l := range s.lan.all() {
			if l.status != serf.StatusAlive || l.name == s.cfg.NodeName || l.wanAddress == "" {
				continue
			}
			if !slices.ContainsFunc(there, func(w server) bool {
				return w.name == l.name && w.dc == l.dc && w.status == serf.StatusAlive
			}) {
				missing = append(missing, l.name+"."+l.dc+"/"+l.wanAddress)
			}
		}
		if len(missing) == 0 {
			continue
		}
		if n, err := up.wan.join(missing); err != nil {
			s.log.Debug("flood-join WAN peers", "addresses", missing, "error", err)
		} else {
			s.log.Debug("flood-joined WAN peers", "num_agents", n)
		}
	}
}

// Store returns the replicated state.
func (s *Server) Store() *state.Store { return s.fsm.Store() }

// IsLeader says whether this server believes that it leads; VerifyLeader makes
// sure.
func (s *Server) IsLeader() bool {
	up := s.up.Load()
	return up != nil && up.raft.State() == raft.Leader
}

// Leader returns the RPC address of the leader, "" when there is none.
func (s *Server) Leader() string {
	up := s.up.Load()
	if up == nil {
		return ""
	}
	address, _ := up.raft.LeaderWithID()
	return string(address)
}

// Peers returns the RPC addresses of the voters, sorted; never nil.
func (s *Server) Peers() []string {
	out := []string{}
	up := s.up.Load()
	if up == nil {
		return out
	}
	for _, p := range peers(up.raft) {
		if p.Suffrage == raft.Voter {
			out = append(out, string(p.Address))
		}
	}
	slices.Sort(out)
	return out
}

// LastContact returns how long ago the leader was heard from, by raft; 0 on the
// leader. On a server that never heard from one it is the server's age.
func (s *Server) LastContact() time.Duration {
	up := s.up.Load()
	if up == nil {
		return time.Since(s.made)
	}
	if up.raft.State() == raft.Leader {
		return 0
	}
	last := up.raft.LastContact()
	if last.IsZero() {
		last = s.made
	}
	return time.Since(last)
}

// enqueueTimeout is how long a command waits for raft to take it in. Being
// committed then takes as long as the quorum, or finding out that there is none.
const enqueueTimeout = 30 * time.Second

// Apply commits a command and returns the state machine's answer and the
// command's index. It blocks until the command is applied here or leadership is
// lost; ctx is looked at before that. Errors: one wrapping [state.ErrNotLeader]
// when nothing was committed because this server does not lead; the state
// machine's own refusal; or raft's, after which the command may or may not be
// committed.
func (s *Server) Apply(ctx context.Context, cmd state.Command) (any, uint64, error) {
	if err := ctx.Err(); err != nil {
		return nil, 0, fmt.Errorf("apply command: %w", err)
	}
	up := s.up.Load()
	if up == nil {
		return nil, 0, fmt.Errorf("apply command: server is not running: %w", state.ErrNotLeader)
	}
	data, err := cmd.Encode()
	if err != nil {
		return nil, 0, err
	}
	timeout := enqueueTimeout
	if d, ok := ctx.Deadline(); ok {
		// Not 0, which would wait for ever.
		timeout = max(min(timeout, time.Until(d)), time.Millisecond)
	}
	f := up.raft.Apply(data, timeout)
	if err := f.Error(); err != nil {
		return nil, 0, fmt.Errorf("apply command: %w", raftError(err))
	}
	if err, ok := f.Response().(error); ok {
		return nil, f.Index(), err
	}
	return f.Response(), f.Index(), nil
}

// Barrier blocks until all that was committed before is applied here. Errors
// are as those of Apply.
func (s *Server) Barrier(ctx context.Context) error {
	up := s.up.Load()
	if up == nil {
		return fmt.Errorf("raft barrier: server is not running: %w", state.ErrNotLeader)
	}
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("raft barrier: %w", err)
	}
	if err := up.raft.Barrier(2 * time.Minute).Error(); err != nil {
		return fmt.Errorf("raft barrier: %w", raftError(err))
	}
	return nil
}

// VerifyLeader confirms with a quorum that this server still leads. It blocks
// for a round trip, or until leadership is lost.
//
// A new leader has what was committed before its time in its log, and applies it
// only after a moment; the first call of a term waits for that.
func (s *Server) VerifyLeader(ctx context.Context) error {
	up := s.up.Load()
	if up == nil {
		return fmt.Errorf("verify leader: server is not running: %w", state.ErrNotLeader)
	}
	if term := up.raft.CurrentTerm(); up.settled.Load() != term {
		if err := s.Barrier(ctx); err != nil {
			return err
		}
		up.settled.Store(term)
	}
	if err := up.raft.VerifyLeader().Error(); err != nil {
		return fmt.Errorf("verify leader: %w", raftError(err))
	}
	return nil
}

// raftError marks errors which say that nothing was done for want of leadership.
func raftError(err error) error {
	if errors.Is(err, raft.ErrNotLeader) || errors.Is(err, raft.ErrLeadershipTransferInProgress) {
		return fmt.Errorf("%w: %w", state.ErrNotLeader, err)
	}
	return err
}

// Forward returns a transport to another server's RPC port. A request keeps its
// method, path, query, headers and body; it is sent again, to another server,
// when it did not arrive, or changes nothing. For the leader, Forward and then
// each request wait up to RPCHoldTimeout for there to be one. Errors, of Forward
// and wrapped of requests: state.ErrNoLeader, ErrNoPath, ErrNoRemoteServer,
// ErrNoServers.
func (s *Server) Forward(ctx context.Context, t state.Target) (http.RoundTripper, error) {
	switch dc := t.Datacenter; {
	case dc != "" && dc != s.cfg.Datacenter:
		servers, known := s.wan.healthy(dc)
		switch {
		case !known:
			return nil, state.ErrNoPath
		case len(servers) == 0:
			return nil, state.ErrNoRemoteServer
		}
		shuffle(servers)
		return &forwarder{transports: s.trans, next: oneOf(servers, state.ErrNoRemoteServer)}, nil
	case t.Leader:
		if _, err := s.leads.await(ctx, time.Now().Add(s.cfg.RPCHoldTimeout), false); err != nil {
			return nil, err
		}
		return &leaderForwarder{s}, nil
	default:
		servers, _ := s.lan.healthy(s.cfg.Datacenter)
		others := slices.DeleteFunc(slices.Clone(servers), func(x server) bool { return x.name == s.cfg.NodeName })
		if len(others) == 0 {
			others = servers
		}
		if len(others) == 0 {
			return nil, state.ErrNoServers
		}
		shuffle(others)
		return &forwarder{transports: s.trans, next: oneOf(others, state.ErrNoServers)}, nil
	}
}

// leaderForwarder gives every request its own time to find a leader.
type leaderForwarder struct{ s *Server }

// RoundTrip implements [http.RoundTripper].
func (f *leaderForwarder) RoundTrip(r *http.Request) (*http.Response, error) {
	s := f.s
	deadline := time.Now().Add(s.cfg.RPCHoldTimeout)
	one := forwarder{transports: s.trans, next: func(ctx context.Context, failed []string) (server, error) {
		address, err := s.leads.await(ctx, deadline, len(failed) > 0)
		if err != nil {
			return server{}, err
		}
		if to, ok := s.lan.at(address); ok {
			return to, nil
		}
		// Gossip does not know it, or not at this address; raft does.
		return server{dc: s.cfg.Datacenter, address: address, useTLS: s.cfg.ServerTLS != nil}, nil
	}}
	return one.RoundTrip(r)
}

// Datacenters returns the known ones: this one, then by the distance that the
// servers' network coordinates tell, then by name.
func (s *Server) Datacenters() []string {
	up := s.up.Load()
	if up == nil {
		return []string{s.cfg.Datacenter}
	}
	distances := map[string][]time.Duration{}
	own, err := up.wan.GetCoordinate()
	for _, w := range s.wan.all() {
		d := unknownDistance
		if c, ok := up.wan.GetCachedCoordinate(w.member); ok && err == nil {
			d = own.DistanceTo(c)
		}
		distances[w.dc] = append(distances[w.dc], d)
	}
	return sortDatacenters(s.cfg.Datacenter, distances)
}

const unknownDistance = time.Duration(1<<63 - 1)

func sortDatacenters(own string, distances map[string][]time.Duration) []string {
	median := map[string]time.Duration{}
	out := []string{own}
	for dc, d := range distances {
		if dc == own {
			continue
		}
		slices.Sort(d)
		median[dc] = d[len(d)/2]
		out = append(out, dc)
	}
	slices.SortFunc(out[1:], func(a, b string) int {
		return cmp.Or(cmp.Compare(median[a], median[b]), strings.Compare(a, b))
	})
	return out
}

// LANMembers returns the members of this datacenter's pool.
func (s *Server) LANMembers() []serf.Member {
	if up := s.up.Load(); up != nil {
		return up.lan.Members()
	}
	return nil
}

// WANMembers returns the servers of all datacenters.
func (s *Server) WANMembers() []serf.Member {
	if up := s.up.Load(); up != nil {
		return up.wan.Members()
	}
	return nil
}

// Coordinate returns where a member of the LAN pool is in the network, by what
// its answers to this agent's probes told; nil where there were none yet.
func (s *Server) Coordinate(member string) *coordinate.Coordinate {
	if up := s.up.Load(); up != nil {
		return up.lan.coordinate(member)
	}
	return nil
}

var errNotRunning = errors.New("agent is not running")

// Join joins the LAN or WAN pool and returns how many addresses answered; an
// error only when none did. It blocks for the time of the attempts.
func (s *Server) Join(addrs []string, wan bool) (int, error) {
	up := s.up.Load()
	if up == nil {
		return 0, errNotRunning
	}
	if wan {
		return up.wan.join(addrs)
	}
	return up.lan.join(addrs)
}

// ForceLeave takes a failed member for one that left; prune forgets it at once.
// In the WAN pool a node without its datacenter is one of this datacenter.
func (s *Server) ForceLeave(node string, prune, wan bool) error {
	up := s.up.Load()
	if up == nil {
		return errNotRunning
	}
	if !wan {
		return up.lan.forceLeave(node, prune)
	}
	if !strings.Contains(node, ".") {
		node += "." + s.cfg.Datacenter
	}
	return up.wan.forceLeave(node, prune)
}

// RemovePeer removes a server from raft's configuration by its ID or, where that
// is "", by its RPC address; one that is alive is added again. It blocks until
// that is committed. Only the leader does, others return an error wrapping
// [state.ErrNotLeader].
func (s *Server) RemovePeer(_ context.Context, id, address string) error {
	up := s.up.Load()
	if up == nil || !s.IsLeader() {
		return fmt.Errorf("remove raft peer: %w", state.ErrNotLeader)
	}
	by, key := "id", id
	if id == "" {
		by, key = "address", address
	}
	for _, p := range peers(up.raft) {
		if id != "" && p.ID != raft.ServerID(id) || id == "" && p.Address != raft.ServerAddress(address) {
			continue
		}
		s.log.Warn("removing raft peer by request", "id", p.ID, "address", p.Address)
		if err := up.raft.RemoveServer(p.ID, 0, 0).Error(); err != nil {
			return fmt.Errorf("remove raft peer: %w", raftError(err))
		}
		return nil
	}
	return fmt.Errorf("%s %q was not found in the Raft configuration", by, key)
}

// TransferLeadership has another server lead: the voter with that ID or, where
// it is "", the one that is furthest. It blocks until that has happened, or for
// about an election's time. Only the leader does, others return an error wrapping
// [state.ErrNotLeader].
func (s *Server) TransferLeadership(_ context.Context, id string) error {
	up := s.up.Load()
	if up == nil || !s.IsLeader() {
		return fmt.Errorf("transfer leadership: %w", state.ErrNotLeader)
	}
	transfer := up.raft.LeadershipTransfer
	if id != "" {
		have := peers(up.raft)
		at := slices.IndexFunc(have, func(p raft.Server) bool { return p.ID == raft.ServerID(id) && p.Suffrage == raft.Voter })
		if at < 0 {
			return fmt.Errorf("transfer leadership: id %q was not found among the Raft voters", id)
		}
		p := have[at]
		transfer = func() raft.Future { return up.raft.LeadershipTransferToServer(p.ID, p.Address) }
	}
	s.log.Info("transferring leadership by request", "to", id)
	if err := transfer().Error(); err != nil {
		return fmt.Errorf("transfer leadership: %w", raftError(err))
	}
	return nil
}

// SignLeaf signs a leaf certificate request (PEM). Only the leader does, others
// return an error wrapping [state.ErrNotLeader].
func (s *Server) SignLeaf(ctx context.Context, csrPEM string) (*connect.Leaf, error) {
	if !s.IsLeader() {
		return nil, fmt.Errorf("sign leaf: %w", state.ErrNotLeader)
	}
	return s.leader.SignLeaf(ctx, csrPEM)
}

// SignIntermediate signs another datacenter's CA. Only the primary's leader does.
func (s *Server) SignIntermediate(ctx context.Context, csrPEM string) (certPEM string, err error) {
	if !s.IsLeader() {
		return "", fmt.Errorf("sign intermediate: %w", state.ErrNotLeader)
	}
	return s.leader.SignIntermediate(ctx, csrPEM)
}

// SetCAConfig replaces the CA's configuration. Only the primary's leader does.
func (s *Server) SetCAConfig(ctx context.Context, c *connect.CAConfig) error {
	if !s.IsLeader() {
		return fmt.Errorf("set ca configuration: %w", state.ErrNotLeader)
	}
	return s.leader.SetCAConfig(ctx, c)
}

// Duties returns how the leader's duties fare; none when this server has not led.
func (s *Server) Duties() []DutyStatus { return s.leader.Status() }

// removalWait is how long a leaving server waits to see that it has no vote.
const removalWait = 5 * time.Second

// Leave gives up the server's vote and leaves the gossip pools, so that nobody
// takes it for failed, then waits for the drain time, in which it goes on
// answering. The caller ends Run's context afterwards. Errors do not keep it
// from going on; they are returned joined. When ctx ends it returns early.
func (s *Server) Leave(ctx context.Context) error {
	up := s.up.Load()
	if up == nil {
		return nil
	}
	s.log.Info("server starting leave")
	var errs []error
	// A single server keeps its vote, or it could never start again.
	alone := len(peers(up.raft)) <= 1
	led := s.IsLeader()
	if led && !alone {
		if err := up.raft.RemoveServer(raft.ServerID(s.cfg.NodeID), 0, 0).Error(); err != nil {
			errs = append(errs, fmt.Errorf("remove own vote: %w", err))
		}
	}
	// Both at once: each takes seconds.
	var wg sync.WaitGroup
	var wanErr error
	wg.Go(func() { wanErr = up.wan.leave() })
	lanErr := up.lan.leave()
	wg.Wait()
	errs = append(errs, wanErr, lanErr)
	wait(ctx, s.cfg.LeaveDrainTime)
	if !led && !alone {
		// The leader removes us when it sees us leave. A server that ends before it
		// knows comes back as a candidate for a cluster it has left.
		for end := time.Now().Add(removalWait); time.Now().Before(end) && ctx.Err() == nil; wait(ctx, 50*time.Millisecond) {
			if !slices.ContainsFunc(peers(up.raft), func(p raft.Server) bool {
				return p.ID == raft.ServerID(s.cfg.NodeID)
			}) {
				break
			}
		}
	}
	return errors.Join(append(errs, context.Cause(ctx))...)
}

// wait returns when ctx ends or d is over.
func wait(ctx context.Context, d time.Duration) {
	if d <= 0 {
		return
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
	case <-t.C:
	}
}
