package agent_test

import (
	"errors"
	"fmt"
	"io"
	"testing"
	"time"

	"github.com/hashicorp/consul/api"

	"github.com/sluicemesh/sluice/agent/agenttest"
)

// TestRotation replaces the root certificate of the mesh while calls go on.
func TestRotation(t *testing.T) {
	m := startMesh(t, 30)
	open, err := agenttest.Open(agenttest.Direct, m.upstream)
	if err != nil {
		t.Fatal(err)
	}
	c := callAll(t, m.call)
	ca := m.dc1.Client.Connect()
	before, _, err := ca.CARoots(nil)
	if err != nil {
		t.Fatal(err)
	}
	conf, _, err := ca.CAGetConfig(nil)
	if err != nil {
		t.Fatal(err)
	}
	conf.Config["PrivateKeyType"], conf.Config["PrivateKeyBits"] = "ec", 384
	if _, err := ca.CASetConfig(conf, nil); err != nil {
		t.Fatal(err)
	}
	start := time.Now()
	root := ""
	for _, n := range []*agenttest.Node{m.dc1, m.dc2} {
		n.Watch("the new root", func(q *api.QueryOptions) (bool, *api.QueryMeta, error) {
			roots, meta, err := n.Client.Connect().CARoots(q)
			if err != nil {
				return false, nil, err
			}
			root = roots.ActiveRootID
			return root != before.ActiveRootID, meta, nil
		})
	}
	// A service that comes now has its certificate of the new root, and those that
	// were there renew theirs over some time: all of them understand each other.
	if err := m.dc1.Client.Agent().ServiceRegister(&api.AgentServiceRegistration{
		Name: "late", Address: m.dc1.IP, Port: 8082,
		Connect: &api.AgentServiceConnect{SidecarService: &api.AgentServiceRegistration{Proxy: &api.AgentServiceConnectProxyConfig{
			LocalServiceAddress: m.dc1.IP,
			Upstreams:           []api.Upstream{{DestinationName: "api", Datacenter: "dc2", LocalBindAddress: m.dc1.IP, LocalBindPort: 9192}},
		}}},
	}); err != nil {
		t.Fatal(err)
	}
	leaf, _, err := m.dc1.Client.Agent().ConnectCALeaf("late", nil)
	if err != nil {
		t.Fatal(err)
	}
	if ok, err := signedBy(m.dc1.Client, leaf.CertPEM, root); err != nil || !ok {
		t.Errorf("the new service's certificate is not of the new root: %v", err)
	}
	late := func() error { return agenttest.Call(agenttest.Direct, m.dc1.IP+":9192") }
	agenttest.Until(t, agenttest.Limit, "a call of the new service", late)
	more := callAll(t, late)
	t.Logf("both roots in use after %v", time.Since(start).Round(time.Millisecond))
	at := c.calls.Load()
	agenttest.Until(t, agenttest.Limit, "calls after the rotation", func() error {
		if n, late := c.calls.Load()-at, more.calls.Load(); n < 100 || late < 100 {
			return fmt.Errorf("%d and %d calls", n, late)
		}
		return nil
	})
	c.stop()
	more.stop()
	if err := errors.Join(open.Ping(), open.End()); err != nil {
		t.Errorf("a connection that was open during the rotation: %v", err)
	}
	t.Logf("%d calls, %d of them failed", c.calls.Load(), c.failed.Load())
}

// answerer calls and says who answered; the applications say their name first.
func answerer(addr string) (string, error) {
	conn, err := agenttest.Open(agenttest.Direct, addr)
	if err != nil {
		return "", err
	}
	defer conn.Close() //nolint:errcheck // it has served
	if err := conn.SetDeadline(time.Now().Add(5 * time.Second)); err != nil {
		return "", err
	}
	if err := conn.Conn.(interface{ CloseWrite() error }).CloseWrite(); err != nil {
		return "", err
	}
	b, err := io.ReadAll(conn)
	if err == nil && len(b) == 0 {
		err = errors.New("closed without an answer")
	}
	return string(b), err
}

// TestResolver sends calls to another datacenter, to a subset there, and to
// wherever an instance is healthy.
func TestResolver(t *testing.T) {
	m := startMesh(t, 31)
	// A service in both datacenters, and in dc2 a second version of it.
	for addr, name := range map[string]string{m.dc1.IP + ":7001": "dc1", m.dc2.IP + ":7001": "dc2-v1", m.dc2.IP + ":7002": "dc2-v2"} {
		agenttest.Echo(t, addr, name)
	}
	for _, s := range []struct {
		n    *agenttest.Node
		port int
		v    string
	}{{m.dc1, 7001, "1"}, {m.dc2, 7001, "1"}, {m.dc2, 7002, "2"}} {
		if err := s.n.Client.Agent().ServiceRegister(&api.AgentServiceRegistration{
			ID: "db" + s.v, Name: "db", Address: s.n.IP, Port: s.port, Meta: map[string]string{"version": s.v},
			Check:   &api.AgentServiceCheck{CheckID: "db-alive", TTL: "10m", Status: api.HealthPassing},
			Connect: &api.AgentServiceConnect{SidecarService: &api.AgentServiceRegistration{Proxy: &api.AgentServiceConnectProxyConfig{LocalServiceAddress: s.n.IP}}},
		}); err != nil {
			t.Fatal(err)
		}
	}
	if err := m.dc1.Client.Agent().ServiceRegister(&api.AgentServiceRegistration{
		Name: "client", Address: m.dc1.IP, Port: 7003,
		Connect: &api.AgentServiceConnect{SidecarService: &api.AgentServiceRegistration{Proxy: &api.AgentServiceConnectProxyConfig{
			LocalServiceAddress: m.dc1.IP,
			Upstreams:           []api.Upstream{{DestinationName: "db", LocalBindAddress: m.dc1.IP, LocalBindPort: 9300}},
		}}},
	}); err != nil {
		t.Fatal(err)
	}
	want := func(why string, limit time.Duration, who ...string) {
		t.Helper()
		took := agenttest.Until(t, limit, why, func() error {
			got, err := answerer(m.dc1.IP + ":9300")
			if err != nil {
				return err
			}
			for _, w := range who {
				if got == w {
					return nil
				}
			}
			return fmt.Errorf("%q answered, want one of %q", got, who)
		})
		t.Logf("%s: after %v", why, took.Round(time.Millisecond))
	}
	want("no resolver", agenttest.Limit, "dc1")
	versions := map[string]api.ServiceResolverSubset{"v1": {Filter: "Service.Meta.version == 1"}, "v2": {Filter: "Service.Meta.version == 2"}}
	resolver := func(r api.ServiceResolverConfigEntry) {
		r.Kind, r.Name = api.ServiceResolver, "db"
		m.write(&r)
	}
	resolver(api.ServiceResolverConfigEntry{Redirect: &api.ServiceResolverRedirect{Datacenter: "dc2"}})
	want("redirect to dc2", switchLimit, "dc2-v1", "dc2-v2")
	resolver(api.ServiceResolverConfigEntry{
		Subsets: versions, DefaultSubset: "v2",
		Failover: map[string]api.ServiceResolverFailover{"*": {Datacenters: []string{"dc2"}}},
	})
	want("a subset that is in dc2 alone", switchLimit, "dc2-v2")
	resolver(api.ServiceResolverConfigEntry{
		Subsets: versions, DefaultSubset: "v1",
		Failover: map[string]api.ServiceResolverFailover{"*": {Datacenters: []string{"dc2"}}},
	})
	want("a subset that is in both", switchLimit, "dc1")
	ttl := func(status string) {
		t.Helper()
		if err := m.dc1.Client.Agent().UpdateTTL("db-alive", "", status); err != nil {
			t.Fatal(err)
		}
	}
	ttl(api.HealthCritical)
	want("dc1's instance is critical", switchLimit, "dc2-v1")
	ttl(api.HealthPassing)
	want("dc1's instance passes again", switchLimit, "dc1")
}

// TestLeaderGoes stops the leader of three servers. Calls do not notice, and what
// is written afterwards comes into force.
func TestLeaderGoes(t *testing.T) {
	agenttest.Leaks(t)
	const appIP = "127.32.1.9"
	agenttest.Echo(t, appIP+appPort, "")
	servers := map[string]*agenttest.Node{}
	join := `retry_join = ["127.32.1.1", "127.32.1.2", "127.32.1.3"]` + "\nretry_interval = \"1s\"\n"
	for i := range 3 {
		ip := fmt.Sprintf("127.32.1.%d", i+1)
		servers[ip] = agenttest.Start(t, agenttest.Config{Name: fmt.Sprintf("s%d", i+1), IP: ip, HCL: "server = true\nbootstrap_expect = 3\n" + join})
	}
	app := agenttest.Start(t, agenttest.Config{Name: "a", IP: appIP, HCL: join + fmt.Sprintf(echoHCL, appIP)})
	upstream := registerWeb(t, app)
	call := func() error { return agenttest.Call(agenttest.Direct, upstream) }
	agenttest.Until(t, agenttest.Limit, "first call", call)
	app.AwaitCatalog("api-sidecar-proxy", 1)
	app.AwaitCatalog("web-sidecar-proxy", 1)

	leader, err := app.Client.Status().Leader()
	if err != nil {
		t.Fatal(err)
	}
	ip := leader[:len(leader)-len(":8300")]
	if servers[ip] == nil {
		t.Fatalf("the leader %s is none of the servers", leader)
	}
	c := callAll(t, call)
	servers[ip].Stop()
	took := agenttest.Until(t, agenttest.Limit, "a write after the leader stopped", func() error {
		_, _, err := app.ConfigEntries().Set(&api.ServiceIntentionsConfigEntry{
			Kind: api.ServiceIntentions, Name: "api", Sources: []*api.SourceIntention{{Name: "other", Action: api.IntentionActionDeny}},
		}, nil)
		return err
	})
	t.Logf("writes go on %v after the leader stopped", took.Round(time.Millisecond))
	c.stop()
	t.Logf("%d calls, %d of them failed", c.calls.Load(), c.failed.Load())
	if _, _, err := app.ConfigEntries().Set(&api.ServiceIntentionsConfigEntry{
		Kind: api.ServiceIntentions, Name: "api", Sources: []*api.SourceIntention{{Name: "web", Action: api.IntentionActionDeny}},
	}, nil); err != nil {
		t.Fatal(err)
	}
	took = agenttest.Until(t, agenttest.Limit, "a denial after the leader stopped", func() error {
		if call() == nil {
			return errors.New("calls still work")
		}
		return nil
	})
	t.Logf("denied after %v", took.Round(time.Millisecond))
}
