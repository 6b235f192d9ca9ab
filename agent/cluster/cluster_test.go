package cluster

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/consul/api"
	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/raft"
	"github.com/hashicorp/serf/serf"

	"github.com/sluicemesh/sluice/agent/cluster/memnet"
	"github.com/sluicemesh/sluice/agent/state"
)

// member is what servers and clients have in common.
type member interface {
	Run(context.Context) error
	Leave(context.Context) error
	SetHandler(http.Handler)
	Forward(context.Context, state.Target) (http.RoundTripper, error)
	LANMembers() []serf.Member
	WANMembers() []serf.Member
	Ready() <-chan struct{}
}

// agent is a member that runs.
type agent struct {
	member
	name, dc string
	server   *Server // nil on a client
	stop     context.CancelFunc
	ended    chan error
}

// lab is agents on one network, which all end with the test.
type lab struct {
	t   *testing.T
	net *memnet.Network
	log hclog.Logger
}

// bubble runs f in virtual time. All agents have ended when it returns: a
// goroutine that is left over fails the test.
func bubble(t *testing.T, f func(t *testing.T, l *lab)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		// Registered first, run last: memberlist does not wait for the probes it has
		// under way, which end by their timeouts.
		t.Cleanup(func() { time.Sleep(time.Minute) })
		level := hclog.Off
		if testing.Verbose() {
			level = hclog.Debug
		}
		f(t, &lab{t: t, net: &memnet.Network{}, log: hclog.New(&hclog.LoggerOptions{Output: t.Output(), Level: level})})
	})
}

func (l *lab) config(name, ip, dc string, change func(*Config)) Config {
	h := l.net.Host(name, ip)
	c := Config{
		NodeName: name, Datacenter: dc, PrimaryDatacenter: "dc1", Build: "1.0.0",
		BindLAN: ip, RaftMultiplier: 1, NoConnect: true,
		Network:   h,
		GossipLAN: h.Gossip(DefaultSerfLANPort),
		Logger:    l.log.Named(name),
	}
	if change != nil {
		change(&c)
	}
	return c
}

func (l *lab) startServer(name, ip, dc string, change func(*Config)) *agent {
	l.t.Helper()
	cfg := l.config(name, ip, dc, change)
	cfg.GossipWAN = l.net.Host(name, ip).Gossip(DefaultSerfWANPort)
	s, err := NewServer(cfg)
	if err != nil {
		l.t.Fatalf("make server: %v", err)
	}
	a := &agent{member: s, server: s, name: name, dc: dc}
	l.run(a)
	return a
}

func (l *lab) startClient(name, ip, dc string, change func(*Config)) *agent {
	l.t.Helper()
	c, err := NewClient(l.config(name, ip, dc, change))
	if err != nil {
		l.t.Fatalf("make client: %v", err)
	}
	a := &agent{member: c, name: name, dc: dc}
	l.run(a)
	return a
}

func (l *lab) run(a *agent) {
	a.SetHandler(a.handler())
	ctx, cancel := context.WithCancel(context.Background())
	a.stop, a.ended = cancel, make(chan error, 1)
	go func() { a.ended <- a.Run(ctx) }()
	l.t.Cleanup(func() { a.end() })
	select {
	case <-a.Ready():
	case err := <-a.ended:
		a.ended <- err
		l.t.Fatalf("run %s: %v", a.name, err)
	}
}

// end stops the agent and returns what Run said.
func (a *agent) end() error {
	a.stop()
	err := <-a.ended
	a.ended <- err
	return err
}

// crash ends the agent so that the others must find out.
func (l *lab) crash(a *agent) {
	l.net.Crash(a.name)
	a.end()
}

// handler stands for the HTTP API: it answers for the server it runs on.
func (a *agent) handler() http.Handler {
	m := http.NewServeMux()
	if a.server == nil {
		return m
	}
	m.HandleFunc("GET /v1/status/peers", func(w http.ResponseWriter, _ *http.Request) {
		_ = json.NewEncoder(w).Encode(a.server.Peers())
	})
	m.HandleFunc("/whoami", func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintf(w, "%s %v %s %s", a.name, FromRPC(r.Context()), r.URL.RawQuery, r.Header.Get("X-Consul-Token"))
	})
	m.HandleFunc("GET /block", func(w http.ResponseWriter, r *http.Request) {
		<-r.Context().Done()
	})
	m.HandleFunc("PUT /node", func(w http.ResponseWriter, r *http.Request) {
		name, err := io.ReadAll(r.Body)
		if err == nil {
			err = a.server.put(r.Context(), string(name))
		}
		if err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		fmt.Fprint(w, a.name)
	})
	return m
}

func (s *Server) put(ctx context.Context, node string) error {
	_, _, err := s.Apply(ctx, state.RegisterCommand(&api.CatalogRegistration{Node: node, Address: "192.0.2.1"}))
	return err
}

func (a *agent) has(node string) bool {
	_, n, err := a.server.Store().Node(nil, node)
	return err == nil && n != nil
}

// request sends one through Forward.
func (a *agent) request(t state.Target, method, path, body string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Minute)
	defer cancel()
	rt, err := a.Forward(ctx, t)
	if err != nil {
		return "", err
	}
	r, err := http.NewRequestWithContext(ctx, method, "http://agent"+path, bytes.NewReader([]byte(body)))
	if err != nil {
		return "", err
	}
	r.Header.Set("X-Consul-Token", "secret")
	resp, err := rt.RoundTrip(r)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	out, err := io.ReadAll(resp.Body)
	if err != nil {
		return "", err
	}
	if resp.StatusCode != http.StatusOK {
		return "", fmt.Errorf("status %d: %s", resp.StatusCode, out)
	}
	return string(out), nil
}

// until waits, in virtual time, for something that gossip and elections bring
// about at random moments.
func until(t *testing.T, what string, is func() bool) {
	t.Helper()
	for end := time.Now().Add(5 * time.Minute); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		synctest.Wait()
		if is() {
			return
		}
	}
	t.Fatalf("not within five minutes: %s", what)
}

// leaderOf waits until all of them agree on a leader, and returns it.
func leaderOf(t *testing.T, agents ...*agent) *agent {
	t.Helper()
	var leader *agent
	until(t, "agreement on a leader", func() bool {
		leader = nil
		for _, a := range agents {
			if a.server.IsLeader() {
				leader = a
			}
		}
		return leader != nil && !slices.ContainsFunc(agents, func(a *agent) bool {
			return a.server.Leader() != leader.server.Leader() || a.server.Leader() == ""
		})
	})
	return leader
}

func bootstrap(c *Config) { c.Bootstrap = true }

func TestSingleServer(t *testing.T) {
	bubble(t, func(t *testing.T, l *lab) {
		a := l.startServer("a", "10.1.0.1", "dc1", bootstrap)
		if err := a.server.put(t.Context(), "early"); !errors.Is(err, state.ErrNotLeader) {
			t.Errorf("apply before the election: %v, want ErrNotLeader", err)
		}
		leaderOf(t, a)
		if err := a.server.put(t.Context(), "n"); err != nil {
			t.Fatal(err)
		}
		if !a.has("n") {
			t.Error("what was applied is not in the store")
		}
		if err := a.server.VerifyLeader(t.Context()); err != nil {
			t.Errorf("verify leader: %v", err)
		}
		if got := a.server.Peers(); !slices.Equal(got, []string{"10.1.0.1:8300"}) {
			t.Errorf("peers %v", got)
		}
		if got := a.server.LastContact(); got != 0 {
			t.Errorf("last contact on the leader: %v", got)
		}
		got, err := a.request(state.Target{Leader: true}, http.MethodGet, "/whoami?x=1", "")
		if want := "a true x=1 secret"; err != nil || got != want {
			t.Errorf("forward to itself: %q, %v; want %q", got, err, want)
		}
		if _, err := a.request(state.Target{Datacenter: "nowhere"}, http.MethodGet, "/whoami", ""); !errors.Is(err, state.ErrNoPath) {
			t.Errorf("forward to an unknown datacenter: %v, want ErrNoPath", err)
		}
		if err := a.end(); err != nil {
			t.Errorf("run: %v", err)
		}
		if err := a.server.put(t.Context(), "late"); !errors.Is(err, state.ErrNotLeader) {
			t.Errorf("apply after the end: %v, want ErrNotLeader", err)
		}
	})
}

// three starts a datacenter of three servers, which find each other.
func (l *lab) three(dc, subnet string) []*agent {
	var out []*agent
	for i, n := range []string{"a", "b", "c"} {
		out = append(out, l.startServer(dc+n, fmt.Sprintf("%s.%d", subnet, i+1), dc, func(c *Config) {
			c.BootstrapExpect = 3
			c.RetryJoin = []string{subnet + ".1"}
		}))
	}
	return out
}

func TestExpectedServersFoundOneCluster(t *testing.T) {
	bubble(t, func(t *testing.T, l *lab) {
		servers := l.three("dc1", "10.1.0")
		lead := leaderOf(t, servers...)
		if got := len(lead.server.Peers()); got != 3 {
			t.Fatalf("%d voters, want 3", got)
		}
		if err := lead.server.put(t.Context(), "one"); err != nil {
			t.Fatal(err)
		}
		rest := slices.DeleteFunc(slices.Clone(servers), func(a *agent) bool { return a == lead })
		until(t, "replication", func() bool { return rest[0].has("one") && rest[1].has("one") })

		// A follower passes a write on to the leader.
		if got, err := rest[0].request(state.Target{Leader: true}, http.MethodPut, "/node", "two"); err != nil || got != lead.name {
			t.Errorf("forwarded write: answered by %q, %v; want %q", got, err, lead.name)
		}

		// The leader dies in the middle of it all; a write waits for the next one.
		l.crash(lead)
		got, err := rest[0].request(state.Target{Leader: true}, http.MethodPut, "/node", "three")
		if err != nil || got == lead.name {
			t.Errorf("write during the election: answered by %q, %v", got, err)
		}
		next := leaderOf(t, rest...)
		for _, n := range []string{"one", "two", "three"} {
			if !next.has(n) {
				t.Errorf("the new leader has no %q", n)
			}
		}

		// A latecomer with the same expectation is taken in and founds nothing.
		late := l.startServer("late", "10.1.0.9", "dc1", func(c *Config) {
			c.BootstrapExpect = 3
			c.RetryJoin = []string{rest[0].server.cfg.AdvertiseLAN, rest[1].server.cfg.AdvertiseLAN}
		})
		until(t, "the latecomer catching up", func() bool { return late.has("three") })
		leaderOf(t, append(rest, late)...)
	})
}

func TestWriteWithoutLeaderFailsAfterHoldTimeout(t *testing.T) {
	bubble(t, func(t *testing.T, l *lab) {
		a := l.startServer("a", "10.1.0.1", "dc1", func(c *Config) { c.BootstrapExpect = 3 })
		began := time.Now()
		_, err := a.request(state.Target{Leader: true}, http.MethodPut, "/node", "n")
		if !errors.Is(err, state.ErrNoLeader) {
			t.Errorf("error %v, want ErrNoLeader", err)
		}
		if took := time.Since(began); took != 7*time.Second {
			t.Errorf("took %v, want 7s", took)
		}
	})
}

func TestServerLeaves(t *testing.T) {
	bubble(t, func(t *testing.T, l *lab) {
		servers := l.three("dc1", "10.1.0")
		lead := leaderOf(t, servers...)
		rest := slices.DeleteFunc(slices.Clone(servers), func(a *agent) bool { return a == lead })
		if err := lead.Leave(t.Context()); err != nil {
			t.Errorf("leader's leave: %v", err)
		}
		if err := lead.end(); err != nil {
			t.Errorf("run: %v", err)
		}
		next := leaderOf(t, rest...)
		until(t, "two voters", func() bool { return len(next.server.Peers()) == 2 })
		other := rest[0]
		if other == next {
			other = rest[1]
		}
		if err := other.Leave(t.Context()); err != nil {
			t.Errorf("follower's leave: %v", err)
		}
		if got := next.server.Peers(); len(got) != 1 {
			t.Errorf("voters after the follower left: %v", got)
		}
		if err := next.server.put(t.Context(), "n"); err != nil {
			t.Errorf("write with one server left: %v", err)
		}
		for _, m := range next.LANMembers() {
			if m.Name != next.name && m.Status != serf.StatusLeft {
				t.Errorf("member %s is %v, want left", m.Name, m.Status)
			}
		}
	})
}

// TestDeadServersLoseTheirVote has one server of three die for good.
func TestDeadServersLoseTheirVote(t *testing.T) {
	// begin returns the two that live on, their leader first, once the third is
	// known to have failed.
	begin := func(t *testing.T, l *lab, change func(*Config)) (lead, other, dead *agent) {
		var servers []*agent
		for i, n := range []string{"a", "b", "c"} {
			servers = append(servers, l.startServer(n, fmt.Sprintf("10.1.0.%d", i+1), "dc1", func(c *Config) {
				c.BootstrapExpect = 3
				c.RetryJoin = []string{"10.1.0.1"}
				change(c)
			}))
		}
		lead = leaderOf(t, servers...)
		rest := slices.DeleteFunc(servers, func(a *agent) bool { return a == lead })
		other, dead = rest[0], rest[1]
		l.crash(dead)
		until(t, "failure", func() bool {
			return slices.ContainsFunc(lead.LANMembers(), func(m serf.Member) bool { return m.Status == serf.StatusFailed })
		})
		wait(t.Context(), 45*time.Second)
		if got := lead.server.Peers(); len(got) != 3 {
			t.Fatalf("voters after a failure: %v", got)
		}
		return lead, other, dead
	}
	t.Run("reaped", func(t *testing.T) {
		bubble(t, func(t *testing.T, l *lab) {
			lead, other, _ := begin(t, l, func(c *Config) { c.ReconnectTimeoutLAN = 2 * time.Minute })
			until(t, "two voters", func() bool { return len(lead.server.Peers()) == 2 })
			if err := lead.server.put(t.Context(), "n"); err != nil {
				t.Error(err)
			}
			// Without the other there is no quorum, and so nobody to remove it.
			l.crash(other)
			wait(t.Context(), 10*time.Minute)
			if got := lead.server.Peers(); len(got) != 2 {
				t.Errorf("voters without a quorum: %v", got)
			}
		})
	})
	t.Run("pruned", func(t *testing.T) {
		bubble(t, func(t *testing.T, l *lab) {
			lead, other, dead := begin(t, l, func(*Config) {})
			if err := other.server.ForceLeave(dead.name, true, false); err != nil {
				t.Fatal(err)
			}
			until(t, "two voters", func() bool { return len(lead.server.Peers()) == 2 })
		})
	})
	t.Run("replaced", func(t *testing.T) {
		bubble(t, func(t *testing.T, l *lab) {
			lead, other, dead := begin(t, l, func(*Config) {})
			next := l.startServer("next", "10.1.0.9", "dc1", func(c *Config) {
				c.NodeName = dead.name
				c.BootstrapExpect = 3
				c.RetryJoin = []string{lead.server.cfg.AdvertiseLAN}
			})
			want := []string{lead.server.cfg.AdvertiseLAN + ":8300", other.server.cfg.AdvertiseLAN + ":8300", "10.1.0.9:8300"}
			slices.Sort(want)
			until(t, "the replacement's vote and no other", func() bool { return slices.Equal(lead.server.Peers(), want) })
			leaderOf(t, lead, other, next)
		})
	})
	t.Run("absent", func(t *testing.T) {
		// Nobody has ever seen the third, as when all have restarted since.
		bubble(t, func(t *testing.T, l *lab) {
			start := func(name, ip string) *agent {
				return l.startServer(name, ip, "dc1", func(c *Config) {
					c.BootstrapExpect = 2
					c.RetryJoin = []string{"10.1.0.1"}
					c.ReconnectTimeoutLAN = 2 * time.Minute
				})
			}
			lead := leaderOf(t, start("a", "10.1.0.1"), start("b", "10.1.0.2"))
			if err := lead.server.up.Load().raft.AddVoter("ghost", "10.1.0.3:8300", 0, 0).Error(); err != nil {
				t.Fatal(err)
			}
			wait(t.Context(), 110*time.Second)
			if got := lead.server.Peers(); len(got) != 3 {
				t.Fatalf("voters after two minutes: %v", got)
			}
			until(t, "two voters", func() bool { return len(lead.server.Peers()) == 2 })
		})
	})
}

func TestRaftByRequest(t *testing.T) {
	bubble(t, func(t *testing.T, l *lab) {
		servers := l.three("dc1", "10.1.0")
		lead := leaderOf(t, servers...)
		next := servers[0]
		if next == lead {
			next = servers[1]
		}
		if err := next.server.TransferLeadership(t.Context(), ""); !errors.Is(err, state.ErrNotLeader) {
			t.Errorf("transfer by a follower: %v", err)
		}
		if err := next.server.RemovePeer(t.Context(), next.server.NodeID(), ""); !errors.Is(err, state.ErrNotLeader) {
			t.Errorf("removal by a follower: %v", err)
		}
		if err := lead.server.TransferLeadership(t.Context(), "nobody"); err == nil || errors.Is(err, state.ErrNotLeader) {
			t.Errorf("transfer to nobody: %v", err)
		}
		if err := lead.server.TransferLeadership(t.Context(), next.server.NodeID()); err != nil {
			t.Fatalf("transfer: %v", err)
		}
		if got := leaderOf(t, servers...); got != next {
			t.Fatalf("%s leads, want %s", got.name, next.name)
		}
		if err := next.server.TransferLeadership(t.Context(), ""); err != nil {
			t.Fatalf("transfer to anybody: %v", err)
		}
		after := leaderOf(t, servers...)
		if after == next {
			t.Fatal("it still leads")
		}

		for _, ghost := range []struct{ id, address string }{{"ghost", ""}, {"", "10.1.0.9:8300"}} {
			if err := after.server.up.Load().raft.AddNonvoter("ghost", "10.1.0.9:8300", 0, 0).Error(); err != nil {
				t.Fatal(err)
			}
			if err := after.server.RemovePeer(t.Context(), ghost.id, ghost.address); err != nil {
				t.Errorf("remove %+v: %v", ghost, err)
			}
			if got := len(peers(after.server.up.Load().raft)); got != 3 {
				t.Errorf("%d peers after removing %+v", got, ghost)
			}
		}
		err := after.server.RemovePeer(t.Context(), "", "10.1.0.9:8300")
		if want := `address "10.1.0.9:8300" was not found in the Raft configuration`; err == nil || err.Error() != want {
			t.Errorf("remove what is gone: %v, want %s", err, want)
		}
	})
}

func TestQuorumWithout(t *testing.T) {
	servers := []raft.Server{{ID: "a"}, {ID: "b"}, {ID: "c"}, {ID: "d"}, {ID: "reader", Suffrage: raft.Nonvoter}}
	for _, tc := range []struct {
		alive string
		want  bool
	}{
		{"a b c", true}, {"a b", true}, {"a", false}, {"a reader", false}, {"", false},
	} {
		alive := map[raft.ServerID]bool{}
		for id := range strings.FieldsSeq(tc.alive) {
			alive[raft.ServerID(id)] = true
		}
		if got := quorumWithout("d", servers, alive); got != tc.want {
			t.Errorf("%q alive: %v, want %v", tc.alive, got, tc.want)
		}
	}
}

func TestClientForwards(t *testing.T) {
	bubble(t, func(t *testing.T, l *lab) {
		servers := l.three("dc1", "10.1.0")
		lead := leaderOf(t, servers...)
		c := l.startClient("client", "10.1.0.100", "dc1", nil)
		began := time.Now()
		if _, err := c.request(state.Target{}, http.MethodGet, "/whoami", ""); !errors.Is(err, state.ErrNoServers) {
			t.Errorf("before joining: %v, want ErrNoServers", err)
		}
		if took := time.Since(began); took != 7*time.Second {
			t.Errorf("no known server: failed after %v, want 7s", took)
		}
		if n, err := c.member.(*Client).Join([]string{"10.1.0.2"}, false); n != 1 || err != nil {
			t.Fatalf("join: %d, %v", n, err)
		}
		until(t, "three known servers", func() bool { return len(c.LANMembers()) == 4 })
		if _, err := c.request(state.Target{}, http.MethodGet, "/whoami", ""); err != nil {
			t.Error(err)
		}
		// Whichever server it prefers dies: the next one is asked at once, before
		// gossip knows.
		first, _ := c.member.(*Client).servers.healthy("dc1")
		for _, a := range servers {
			if first[0].name == a.name {
				l.crash(a)
			}
		}
		got, err := c.request(state.Target{}, http.MethodGet, "/whoami", "")
		if err != nil || strings.HasPrefix(got, first[0].name+" ") {
			t.Errorf("after %s died: %q, %v", first[0].name, got, err)
		}
		_ = lead
	})
}

// TestClientHoldsRequests starts a client that asks before it has joined, as
// agents do, and one whose only server is dead.
func TestClientHoldsRequests(t *testing.T) {
	bubble(t, func(t *testing.T, l *lab) {
		a := l.startServer("a", "10.1.0.1", "dc1", bootstrap)
		leaderOf(t, a)
		c := l.startClient("client", "10.1.0.100", "dc1", nil)
		type result struct {
			answer string
			err    error
		}
		early := make(chan result, 1)
		go func() {
			answer, err := c.request(state.Target{}, http.MethodGet, "/whoami", "")
			early <- result{answer, err}
		}()
		gone, cancel := context.WithCancelCause(t.Context())
		ended := make(chan error, 1)
		go func() {
			_, err := c.Forward(gone, state.Target{})
			ended <- err
		}()
		synctest.Wait()
		stopped := errors.New("stopped")
		cancel(stopped)
		if err := <-ended; !errors.Is(err, stopped) {
			t.Errorf("request that was given up: %v", err)
		}
		began := time.Now()
		if n, err := c.member.(*Client).Join([]string{"10.1.0.1"}, false); n != 1 || err != nil {
			t.Fatalf("join: %d, %v", n, err)
		}
		if r := <-early; r.err != nil || !strings.HasPrefix(r.answer, "a ") {
			t.Errorf("request before the join: %q, %v", r.answer, r.err)
		}
		if took := time.Since(began); took > time.Second {
			t.Errorf("answered %v after the join", took)
		}

		l.crash(a)
		for _, state := range []string{"alive", "failed"} {
			until(t, "a seen as "+state, func() bool {
				i := slices.IndexFunc(c.LANMembers(), func(m serf.Member) bool { return m.Name == "a" })
				return i >= 0 && c.LANMembers()[i].Status.String() == state
			})
			requestFailsAtOnce(t, c)
		}
	})
}

func requestFailsAtOnce(t *testing.T, c *agent) {
	t.Helper()
	began := time.Now()
	_, err := c.request(state.Target{}, http.MethodGet, "/whoami", "")
	if !errors.Is(err, state.ErrNoServers) {
		t.Errorf("dead server: %v, want ErrNoServers", err)
	}
	if took := time.Since(began); took > 0 {
		t.Errorf("dead server: failed after %v", took)
	}
}

// TestReconnect has members come back that know nobody, long after they failed.
func TestReconnect(t *testing.T) {
	for _, pool := range []string{"LAN", "WAN"} {
		t.Run(pool, func(t *testing.T) {
			bubble(t, func(t *testing.T, l *lab) {
				start := func(change func(*Config)) *agent {
					if pool == "LAN" {
						return l.startClient("other", "10.1.0.2", "dc1", change)
					}
					return l.startServer("other", "10.1.0.2", "dc2", change)
				}
				began := time.Now()
				a := l.startServer("a", "10.1.0.1", "dc1", bootstrap)
				alive := func() int {
					members, n := a.LANMembers(), 0
					if pool == "WAN" {
						members = a.WANMembers()
					}
					for _, m := range members {
						if m.Status == serf.StatusAlive {
							n++
						}
					}
					return n
				}
				other := start(func(c *Config) { c.RetryJoin, c.RetryJoinWAN = []string{"10.1.0.1"}, []string{"10.1.0.1"} })
				until(t, "join", func() bool { return alive() == 2 })
				l.crash(other)
				until(t, "failure", func() bool { return alive() == 1 })
				// Longer than the dead are gossiped to, and just after serf would have tried
				// by its default.
				wait(t.Context(), 3*time.Minute)
				wait(t.Context(), 31*time.Second-time.Since(began)%(30*time.Second))
				l.net.Restart("other")
				back := time.Now()
				start(nil)
				until(t, "return", func() bool { return alive() == 2 })
				if took := time.Since(back); took > 6*time.Second {
					t.Errorf("reconnected after %v", took)
				}
			})
		})
	}
}

func TestCoordinates(t *testing.T) {
	bubble(t, func(t *testing.T, l *lab) {
		a := l.startServer("a", "10.1.0.1", "dc1", bootstrap)
		c := l.startClient("client", "10.1.0.100", "dc1", func(c *Config) { c.RetryJoin = []string{"10.1.0.1"} }).member.(*Client)
		until(t, "coordinates", func() bool { return a.server.Coordinate("client") != nil && c.Coordinate("a") != nil })
		if a.server.Coordinate("a") == nil || c.Coordinate("client") == nil {
			t.Error("an agent does not know where it is itself")
		}
		if got := c.Coordinate("nobody"); got != nil {
			t.Errorf("coordinate of nobody: %v", got)
		}
	})
}

func TestFederation(t *testing.T) {
	bubble(t, func(t *testing.T, l *lab) {
		one := l.three("dc1", "10.1.0")
		two := []*agent{
			l.startServer("dc2a", "10.2.0.1", "dc2", func(c *Config) {
				c.BootstrapExpect = 2
				c.RetryJoin = []string{"10.2.0.2"}
				c.RetryJoinWAN = []string{"10.1.0.1"}
			}),
			l.startServer("dc2b", "10.2.0.2", "dc2", func(c *Config) { c.BootstrapExpect = 2 }),
		}
		leaderOf(t, one...)
		leaderOf(t, two...)
		all := append(slices.Clone(one), two...)
		until(t, "everyone in the WAN pool", func() bool {
			return !slices.ContainsFunc(all, func(a *agent) bool { return len(a.WANMembers()) != 5 })
		})
		var names []string
		for _, m := range one[2].WANMembers() {
			names = append(names, m.Name)
		}
		slices.Sort(names)
		if want := []string{"dc1a.dc1", "dc1b.dc1", "dc1c.dc1", "dc2a.dc2", "dc2b.dc2"}; !slices.Equal(names, want) {
			t.Errorf("WAN members %v, want %v", names, want)
		}
		if got := two[1].server.Datacenters(); !slices.Equal(got, []string{"dc2", "dc1"}) {
			t.Errorf("datacenters %v", got)
		}
		got, err := one[0].request(state.Target{Datacenter: "dc2"}, http.MethodGet, "/whoami?dc=dc2", "")
		if err != nil || !strings.HasPrefix(got, "dc2") || !strings.HasSuffix(got, " true dc=dc2 secret") {
			t.Errorf("forward to dc2: %q, %v", got, err)
		}

		// One of the two dies: the other answers, before and after gossip knows.
		l.crash(two[1])
		for range 10 {
			if got, err := one[0].request(state.Target{Datacenter: "dc2"}, http.MethodGet, "/whoami", ""); err != nil || !strings.HasPrefix(got, "dc2a ") {
				t.Fatalf("forward to what is left of dc2: %q, %v", got, err)
			}
		}
	})
}

func TestCutWAN(t *testing.T) {
	bubble(t, func(t *testing.T, l *lab) {
		one := l.startServer("one", "10.1.0.1", "dc1", bootstrap)
		two := l.startServer("two", "10.2.0.1", "dc2", func(c *Config) {
			c.Bootstrap = true
			c.RetryJoinWAN = []string{"10.1.0.1"}
		})
		leaderOf(t, one)
		leaderOf(t, two)
		dc2 := state.Target{Datacenter: "dc2"}
		until(t, "dc2 known", func() bool { return len(one.WANMembers()) == 2 })
		if _, err := one.request(dc2, http.MethodGet, "/whoami", ""); err != nil {
			t.Fatal(err)
		}
		blocked := make(chan error, 1)
		go func() {
			_, err := one.request(dc2, http.MethodGet, "/block", "")
			blocked <- err
		}()
		synctest.Wait()

		cut := time.Now()
		l.net.Partition([]string{"one"}, []string{"two"})
		err := <-blocked
		if !errors.Is(err, state.ErrNoRemoteServer) {
			t.Errorf("blocking query over the cut: %v, want ErrNoRemoteServer", err)
		}
		if took := time.Since(cut); took > 20*time.Second {
			t.Errorf("the cut was noticed after %v", took)
		}
		began := time.Now()
		if _, err := one.request(dc2, http.MethodPut, "/node", "n"); !errors.Is(err, state.ErrNoRemoteServer) {
			t.Errorf("write over the cut: %v, want ErrNoRemoteServer", err)
		}
		if took := time.Since(began); took > 10*time.Second {
			t.Errorf("the write failed after %v", took)
		}
		until(t, "dc2 failed", func() bool {
			_, err := one.Forward(t.Context(), dc2)
			return errors.Is(err, state.ErrNoRemoteServer)
		})
		if got := one.server.Datacenters(); !slices.Equal(got, []string{"dc1", "dc2"}) {
			t.Errorf("datacenters during the cut: %v", got)
		}

		l.net.Heal()
		until(t, "dc2 back", func() bool {
			_, err := one.request(dc2, http.MethodGet, "/whoami", "")
			return err == nil
		})
	})
}

func TestClientIsRefusedFromWAN(t *testing.T) {
	bubble(t, func(t *testing.T, l *lab) {
		a := l.startServer("a", "10.1.0.1", "dc1", bootstrap)
		c := l.startClient("client", "10.1.0.100", "dc1", nil)
		if n, err := a.server.Join([]string{"10.1.0.100:8301"}, true); err == nil || n != 0 {
			t.Errorf("joining a client agent to the WAN pool: %d, %v", n, err)
		}
		other := l.startServer("other", "10.2.0.1", "dc2", bootstrap)
		if n, err := other.server.Join([]string{"10.1.0.1"}, false); err == nil || n != 0 {
			t.Errorf("joining the LAN pool of another datacenter: %d, %v", n, err)
		}
		for _, x := range []*agent{a, c, other} {
			if got := len(x.LANMembers()); got != 1 {
				t.Errorf("%s has %d members", x.name, got)
			}
		}
	})
}

func TestRetryMaxEndsRun(t *testing.T) {
	bubble(t, func(t *testing.T, l *lab) {
		a := l.startServer("a", "10.1.0.1", "dc1", func(c *Config) {
			c.Bootstrap = true
			c.RetryJoinWAN = []string{"10.9.9.9"}
			c.RetryMaxWAN = 2
		})
		began := time.Now()
		err := <-a.ended
		a.ended <- err
		if err == nil || err.Error() != "agent: max join WAN retry exhausted, exiting" {
			t.Errorf("run: %v", err)
		}
		if took := time.Since(began); took < 30*time.Second || took > 2*time.Minute {
			t.Errorf("gave up after %v", took)
		}
	})
}
