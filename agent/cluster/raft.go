package cluster

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/go-uuid"
	"github.com/hashicorp/raft"
	raftwal "github.com/hashicorp/raft-wal"
	"github.com/hashicorp/raft-wal/metadb"
	"github.com/hashicorp/serf/serf"
)

// raftStore is where raft keeps what it must not forget.
type raftStore struct {
	log       raft.LogStore
	stable    raft.StableStore
	snapshots raft.SnapshotStore
	closers   []io.Closer // in this order; none in memory
	// used says that this server was part of a cluster before.
	used bool
}

// Raft's housekeeping, Consul's values.
const (
	snapshotsKept     = 2
	snapshotInterval  = 30 * time.Second
	snapshotThreshold = 16384
	trailingLogs      = 10240
	logCache          = 512
)

func openRaftStore(c *Config) (*raftStore, error) {
	if c.DataDir == "" {
		m := raft.NewInmemStore()
		return &raftStore{log: m, stable: m, snapshots: raft.NewInmemSnapshotStore()}, nil
	}
	dir := filepath.Join(c.DataDir, "raft")
	log := c.Logger.Named("raft")
	if err := os.MkdirAll(filepath.Join(dir, "wal"), 0o700); err != nil {
		return nil, fmt.Errorf("open raft store: %w", err)
	}
	// The log does not close its own metadata, which holds a file lock.
	meta := &metadb.BoltMetaDB{}
	wal, err := raftwal.Open(filepath.Join(dir, "wal"), raftwal.WithLogger(log.Named("wal")), raftwal.WithMetaStore(meta))
	if err != nil {
		return nil, errors.Join(fmt.Errorf("open raft log: %w", err), meta.Close())
	}
	s := &raftStore{stable: wal, closers: []io.Closer{wal, meta}}
	if s.snapshots, err = raft.NewFileSnapshotStoreWithLogger(dir, snapshotsKept, log.Named("snapshot")); err != nil {
		return nil, errors.Join(fmt.Errorf("open raft snapshots: %w", err), s.close())
	}
	if s.log, err = raft.NewLogCache(logCache, wal); err != nil {
		return nil, errors.Join(fmt.Errorf("open raft log: %w", err), s.close())
	}
	if s.used, err = raft.HasExistingState(s.log, s.stable, s.snapshots); err != nil {
		return nil, errors.Join(fmt.Errorf("read raft store: %w", err), s.close())
	}
	return s, nil
}

func (s *raftStore) close() error {
	var errs []error
	for _, c := range s.closers {
		if err := c.Close(); err != nil {
			errs = append(errs, fmt.Errorf("close raft log: %w", err))
		}
	}
	return errors.Join(errs...)
}

// raftConfig returns raft's configuration. Its timings are raft's defaults for
// a multiplier of 1.
func (c *Config) raftConfig() *raft.Config {
	conf := raft.DefaultConfig()
	conf.LocalID = raft.ServerID(c.NodeID)
	conf.Logger = c.Logger.Named("raft")
	m := time.Duration(c.RaftMultiplier)
	conf.HeartbeatTimeout *= m
	conf.ElectionTimeout *= m
	conf.LeaderLeaseTimeout *= m
	if c.Dev {
		// Nobody else is there to be waited for.
		conf.HeartbeatTimeout = 50 * time.Millisecond
		conf.ElectionTimeout = 50 * time.Millisecond
		conf.LeaderLeaseTimeout = 50 * time.Millisecond
	}
	conf.SnapshotInterval = snapshotInterval
	conf.SnapshotThreshold = snapshotThreshold
	conf.TrailingLogs = trailingLogs
	// Who loses the vote by leaving goes on answering while it drains.
	conf.ShutdownOnRemove = false
	return conf
}

// openRaft starts raft, and founds a cluster of one where that is asked for.
func (s *Server) openRaft(store *raftStore, conns *handoff, address string) (*raft.Raft, error) {
	layer := &raftLayer{handoff: conns, advertise: raftAddr(address)}
	layer.dial = func(ctx context.Context, address string) (net.Conn, error) {
		return s.dialer.dialRaft(ctx, address, s.cfg.Datacenter)
	}
	trans := raft.NewNetworkTransportWithConfig(&raft.NetworkTransportConfig{
		Stream:                layer,
		MaxPool:               3,
		Timeout:               10 * time.Second,
		Logger:                s.cfg.Logger.Named("raft"),
		ServerAddressProvider: (*addresses)(&s.lan),
	})
	conf := s.cfg.raftConfig()
	if s.cfg.Bootstrap && !store.used {
		err := raft.BootstrapCluster(conf, store.log, store.stable, store.snapshots, trans, raft.Configuration{
			Servers: []raft.Server{{ID: conf.LocalID, Address: trans.LocalAddr()}},
		})
		if err != nil {
			return nil, errors.Join(fmt.Errorf("bootstrap raft: %w", err), trans.Close())
		}
	}
	r, err := raft.NewRaft(conf, s.fsm, store.log, store.stable, store.snapshots, trans)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("start raft: %w", err), trans.Close())
	}
	return r, nil
}

// raftAddr is an address that need not be a local one.
type raftAddr string

func (raftAddr) Network() string  { return "tcp" }
func (a raftAddr) String() string { return string(a) }

// addresses finds servers by ID in gossip, which hears first of one that came
// back with another address.
type addresses serverList

// ServerAddr implements [raft.ServerAddressProvider]; on an error raft uses the
// address in its configuration.
func (a *addresses) ServerAddr(id raft.ServerID) (raft.ServerAddress, error) {
	s, ok := (*serverList)(a).byID(string(id))
	if !ok {
		return "", fmt.Errorf("find address of server %s: not in the LAN pool", id)
	}
	return raft.ServerAddress(s.address), nil
}

// peers returns the servers of raft's latest configuration.
func peers(r *raft.Raft) []raft.Server {
	f := r.GetConfiguration()
	if f.Error() != nil { // never: it is answered from memory
		return nil
	}
	return f.Configuration().Servers
}

// foundLoop founds the datacenter once as many servers as were expected are
// there. It ends when this server is in a cluster, whoever founded it.
func (s *Server) foundLoop(ctx context.Context, up *running) {
	log := s.log.Named("bootstrap")
	for {
		if len(peers(up.raft)) > 0 || up.raft.LastIndex() > 0 {
			return
		}
		if err := s.found(ctx, up, log); err != nil {
			log.Warn("could not bootstrap the datacenter", "error", err)
		}
		// Gossip wakes; the timer is for peers that did not answer.
		t := time.NewTimer(5 * time.Second)
		select {
		case <-ctx.Done():
			t.Stop()
			return
		case <-s.founding:
		case <-t.C:
		}
		t.Stop()
	}
}

func (s *Server) found(ctx context.Context, up *running, log hclog.Logger) error {
	var servers []server
	voters := 0
	for _, x := range s.lan.all() {
		switch {
		case x.status != serf.StatusAlive || x.dc != s.cfg.Datacenter:
			continue
		case x.bootstrap:
			return fmt.Errorf("server %s is in bootstrap mode, which excludes bootstrap_expect", x.name)
		case x.expect != s.cfg.BootstrapExpect && x.expect != 0:
			return fmt.Errorf("server %s expects %d servers, this one %d", x.name, x.expect, s.cfg.BootstrapExpect)
		}
		servers = append(servers, x)
		if !x.nonVoter {
			voters++
		}
	}
	if voters < s.cfg.BootstrapExpect {
		return nil
	}
	// Where a cluster exists, this server must be added to it and not found another.
	for _, x := range servers {
		if x.name == s.cfg.NodeName {
			continue
		}
		n, err := s.peersOf(ctx, x)
		if err != nil {
			return fmt.Errorf("ask server %s for its peers: %w", x.name, err)
		}
		if n > 0 {
			log.Info("Existing Raft peers reported, disabling bootstrap mode", "server", x.name)
			return nil
		}
	}
	// All of them compute the same configuration from the same members. If they
	// do not see the same, their quorums overlap and one of them prevails.
	slices.SortFunc(servers, func(a, b server) int { return strings.Compare(a.id, b.id) })
	var conf raft.Configuration
	for _, x := range servers {
		p := raft.Server{ID: raft.ServerID(x.id), Address: raft.ServerAddress(x.address)}
		if x.nonVoter {
			p.Suffrage = raft.Nonvoter
		}
		conf.Servers = append(conf.Servers, p)
	}
	log.Info("Found expected number of peers, attempting bootstrap", "servers", len(servers))
	if err := up.raft.BootstrapCluster(conf).Error(); err != nil && !errors.Is(err, raft.ErrCantBootstrap) {
		return err
	}
	return nil
}

// peersOf asks another server how many voters it knows.
func (s *Server) peersOf(ctx context.Context, to server) (int, error) {
	ctx, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://server/v1/status/peers", nil)
	if err != nil {
		return 0, fmt.Errorf("make request: %w", err)
	}
	resp, err := s.trans.roundTrip(r, to)
	if err != nil {
		return 0, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return 0, fmt.Errorf("status %s", resp.Status)
	}
	var peers []string
	if err := json.NewDecoder(io.LimitReader(resp.Body, 1<<16)).Decode(&peers); err != nil {
		return 0, fmt.Errorf("decode peers: %w", err)
	}
	return len(peers), nil
}

// leadLoop does what the leader has to do, for as long as this server is it.
func (s *Server) leadLoop(ctx context.Context, up *running) {
	var (
		wg   sync.WaitGroup
		stop = func() {}
	)
	end := func() { stop(); wg.Wait(); stop = func() {} }
	defer end()
	for {
		select {
		case <-ctx.Done():
			return
		case leads := <-up.raft.LeaderCh():
			// The channel keeps only the newest: two gains in a row mean that a loss was
			// missed, and what was established in the old term must be done again.
			end()
			if !leads {
				s.log.Info("cluster leadership lost")
				continue
			}
			s.log.Info("cluster leadership acquired")
			term, cancel := context.WithCancel(ctx)
			stop = cancel
			wg.Go(func() { s.term(term) })
			wg.Go(func() { s.voterLoop(term, up) })
		}
	}
}

// Pauses between attempts to establish a term.
const minTermPause, maxTermPause = 500 * time.Millisecond, 30 * time.Second

// term runs the duties until ctx ends.
func (s *Server) term(ctx context.Context) {
	for pause := minTermPause; ; pause = min(2*pause, maxTermPause) {
		began := time.Now()
		err := s.leader.run(ctx)
		if ctx.Err() != nil {
			return
		}
		if time.Since(began) > maxTermPause {
			pause = minTermPause
		}
		s.log.Error("leader's duties ended", "error", err, "retry_in", pause)
		wait(ctx, pause)
		if ctx.Err() != nil {
			return
		}
	}
}

// voterInterval is how often voters are looked at although nothing has changed.
const voterInterval = 10 * time.Second

// voterLoop has the quorum follow the LAN pool, during a term.
func (s *Server) voterLoop(ctx context.Context, up *running) {
	tick := time.NewTicker(voterInterval)
	defer tick.Stop()
	absent := map[raft.ServerID]time.Time{}
	for {
		err := s.reconcileVoters(ctx, up)
		if ctx.Err() == nil {
			err = errors.Join(err, s.removeDead(ctx, up, absent))
		}
		if err != nil && ctx.Err() == nil {
			s.log.Warn("could not update raft peers", "error", err)
		}
		select {
		case <-ctx.Done():
			return
		case <-s.voters:
		case <-tick.C:
		}
	}
}

// reconcileVoters adds servers that came and removes those that left. Failed
// ones keep their vote until removeDead takes them for dead: they may come back,
// and a quorum that shrinks with every failure ends as one server which believes
// to be all there is.
func (s *Server) reconcileVoters(ctx context.Context, up *running) error {
	have := peers(up.raft)
	members := up.lan.Members()
	var errs []error
	for _, m := range members {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		x, ok := parseServer(m)
		if !ok || x.id == "" || x.dc != s.cfg.Datacenter {
			continue
		}
		id, address := raft.ServerID(x.id), raft.ServerAddress(x.address)
		at := slices.IndexFunc(have, func(p raft.Server) bool { return p.ID == id })
		switch x.status {
		case serf.StatusAlive:
			want := raft.Voter
			if x.nonVoter {
				want = raft.Nonvoter
			}
			if at >= 0 && have[at].Address == address && have[at].Suffrage == want {
				continue
			}
			if x.bootstrap && s.cfg.Bootstrap && x.name != s.cfg.NodeName {
				errs = append(errs, fmt.Errorf("'%s' and '%s' are both in bootstrap mode. Only one node should be in bootstrap mode, not adding Raft peer", s.cfg.NodeName, x.name)) //nolint:staticcheck // Consul's text
				continue
			}
			// A server that lost its data comes back under a new ID; its old one would
			// count as a voter that never answers.
			for _, p := range have {
				if p.Address == address && p.ID != id && p.ID != raft.ServerID(s.cfg.NodeID) {
					if err := up.raft.RemoveServer(p.ID, 0, 0).Error(); err != nil {
						errs = append(errs, fmt.Errorf("remove replaced server %s: %w", p.ID, err))
					}
				}
			}
			add := up.raft.AddVoter
			if x.nonVoter {
				add = up.raft.AddNonvoter
				if at >= 0 && have[at].Suffrage == raft.Voter {
					if err := up.raft.DemoteVoter(id, 0, 0).Error(); err != nil {
						errs = append(errs, fmt.Errorf("demote server %s: %w", x.name, err))
						continue
					}
				}
			}
			s.log.Info("adding raft peer", "server", x.name, "address", x.address)
			if err := add(id, address, 0, 0).Error(); err != nil {
				errs = append(errs, fmt.Errorf("add server %s: %w", x.name, err))
			}
		case serf.StatusLeft:
			if at < 0 || id == raft.ServerID(s.cfg.NodeID) {
				continue
			}
			s.log.Info("removing raft peer", "server", x.name)
			if err := up.raft.RemoveServer(id, 0, 0).Error(); err != nil {
				errs = append(errs, fmt.Errorf("remove server %s: %w", x.name, err))
			}
		}
	}
	return errors.Join(errs...)
}

// removeDead removes the servers that do not come back. It is slow to believe
// that, and never does while the others could not go on without the server:
//   - the pool has reaped it: it had failed for ReconnectTimeoutLAN, or somebody
//     forced it out and had it forgotten;
//   - another server came alive under its name, so that it has been replaced;
//   - the pool has not known it for ReconnectTimeoutLAN, in this term: it was
//     reaped when nobody was there to see it.
//
// absent is since when servers have not been in the pool; it is of this term.
func (s *Server) removeDead(ctx context.Context, up *running, absent map[raft.ServerID]time.Time) error {
	have := peers(up.raft)
	known := map[raft.ServerID]bool{}
	alive := map[raft.ServerID]bool{}
	names := map[string]bool{} // of those that are alive
	for _, x := range serversOf(up.lan.Members()) {
		id := raft.ServerID(x.id)
		known[id] = true
		if x.status == serf.StatusAlive && x.dc == s.cfg.Datacenter {
			alive[id], names[x.name] = true, true
		}
	}
	var errs []error
	for _, p := range have {
		if known[p.ID] || p.ID == raft.ServerID(s.cfg.NodeID) {
			delete(absent, p.ID)
			continue
		}
		since, ok := absent[p.ID]
		if !ok {
			since = time.Now()
			absent[p.ID] = since
		}
		name, reaped := s.departed.of(p.ID)
		var why string
		switch {
		case reaped:
			why = "reaped"
		case name != "" && names[name]:
			why = "replaced under its name"
		case time.Since(since) >= s.cfg.ReconnectTimeoutLAN:
			why = "absent"
		default:
			continue
		}
		if !quorumWithout(p.ID, peers(up.raft), alive) {
			s.log.Debug("dead raft peer stays: the others are no quorum without it", "id", p.ID, "server", name)
			continue
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		s.log.Info("removing dead raft peer", "id", p.ID, "server", name, "address", p.Address, "reason", why)
		if err := up.raft.RemoveServer(p.ID, 0, 0).Error(); err != nil {
			errs = append(errs, fmt.Errorf("remove dead server %s: %w", p.ID, err))
			continue
		}
		delete(absent, p.ID)
		s.departed.forget(p.ID)
	}
	return errors.Join(errs...)
}

// quorumWithout says whether those voters that are alive are a quorum once the
// server has been removed.
func quorumWithout(id raft.ServerID, servers []raft.Server, alive map[raft.ServerID]bool) bool {
	voters, healthy := 0, 0
	for _, p := range servers {
		if p.Suffrage != raft.Voter || p.ID == id {
			continue
		}
		voters++
		if alive[p.ID] {
			healthy++
		}
	}
	return healthy >= voters/2+1
}

// departures is what the LAN pool has told of servers that it may not know any
// more. The zero value is ready.
type departures struct {
	mu sync.Mutex
	// Guarded by mu: the name that an ID last had, and what was reaped.
	names  map[raft.ServerID]string
	reaped map[raft.ServerID]bool
}

// note takes in what an event says.
func (d *departures) note(e serf.MemberEvent) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.names == nil {
		d.names, d.reaped = map[raft.ServerID]string{}, map[raft.ServerID]bool{}
	}
	for _, m := range e.Members {
		x, ok := parseServer(m)
		if !ok || x.id == "" {
			continue
		}
		d.names[raft.ServerID(x.id)] = x.name
		d.reaped[raft.ServerID(x.id)] = e.Type == serf.EventMemberReap
	}
}

// of returns the name of a server, "" where it is not known.
func (d *departures) of(id raft.ServerID) (name string, reaped bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.names[id], d.reaped[id]
}

func (d *departures) forget(id raft.ServerID) {
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.names, id)
	delete(d.reaped, id)
}

// nodeID returns id, else the one kept in dir, else a new one, which is kept.
func nodeID(id, dir string) (string, error) {
	if id != "" {
		id = strings.ToLower(id)
		if _, err := uuid.ParseUUID(id); err != nil {
			return "", fmt.Errorf("specified NodeID is invalid: %w", err)
		}
	}
	path := filepath.Join(dir, "node-id")
	if id == "" && dir != "" {
		b, err := os.ReadFile(path)
		if err == nil {
			id = strings.TrimSpace(strings.ToLower(string(b)))
			if _, err := uuid.ParseUUID(id); err != nil {
				return "", fmt.Errorf("NodeID in %s is invalid: %w", path, err)
			}
			return id, nil
		}
		if !errors.Is(err, os.ErrNotExist) {
			return "", fmt.Errorf("read node id: %w", err)
		}
	}
	if id == "" {
		var err error
		if id, err = uuid.GenerateUUID(); err != nil {
			return "", fmt.Errorf("generate node id: %w", err)
		}
	}
	if dir != "" {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return "", fmt.Errorf("keep node id: %w", err)
		}
		if err := os.WriteFile(path, []byte(id), 0o600); err != nil {
			return "", fmt.Errorf("keep node id: %w", err)
		}
	}
	return id, nil
}
