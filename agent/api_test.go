package agent_test

import (
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/consul/api"
	"github.com/hashicorp/consul/sdk/testutil"

	"github.com/sluicemesh/sluice/agent/agenttest"
	"github.com/sluicemesh/sluice/gateway"
)

// hello begins TLS with a server name and succeeds when somebody answers it, who
// then finds no certificate.
func hello(addr, serverName string) error {
	conn, err := net.DialTimeout("tcp", addr, time.Second)
	if err != nil {
		return err
	}
	defer conn.Close() //nolint:errcheck // it has served
	if err := conn.SetDeadline(time.Now().Add(5 * time.Second)); err != nil {
		return err
	}
	answered := errors.New("answered")
	err = tls.Client(conn, &tls.Config{
		ServerName: serverName, InsecureSkipVerify: true, //nolint:gosec // what matters is that there is one
		VerifyConnection: func(tls.ConnectionState) error { return answered },
	}).Handshake()
	if errors.Is(err, answered) {
		return nil
	}
	return fmt.Errorf("tls to %s at %s: %w", serverName, addr, err)
}

// TestSDK runs the binary under Consul's own test harness.
func TestSDK(t *testing.T) {
	dir := t.TempDir()
	if err := os.Symlink(agenttest.Binary(t), filepath.Join(dir, "consul")); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", dir+string(filepath.ListSeparator)+os.Getenv("PATH"))
	s, err := testutil.NewTestServerConfigT(t, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		// An agent that is interrupted and does not leave ends with 1, as Consul's.
		if err := s.Stop(); err != nil && err.Error() != "exit status 1" {
			t.Error(err)
		}
	}()
	s.WaitForLeader(t)
	s.WaitForVoting(t)
	s.WaitForActiveCARoot(t)
	s.WaitForServiceIntentions(t)
	s.WaitForSerfCheck(t)
	s.AddService(t, "redis", "passing", []string{"primary"})
	s.AddAddressableService(t, "db", "warning", "127.0.0.1", 5432, nil)
	s.AddCheck(t, "extra", "redis", "passing")

	c, err := api.NewClient(&api.Config{Address: s.HTTPAddr})
	if err != nil {
		t.Fatal(err)
	}
	agenttest.Until(t, agenttest.Limit, "redis passes in the catalog", func() error {
		got, _, err := c.Health().Service("redis", "primary", true, nil)
		if err == nil && len(got) != 1 {
			err = fmt.Errorf("%d instances", len(got))
		}
		return err
	})
	agenttest.Until(t, agenttest.Limit, "db warns in the catalog", func() error {
		got, _, err := c.Health().Service("db", "", false, nil)
		if err == nil && (len(got) != 1 || got[0].Checks.AggregatedStatus() != api.HealthWarning || got[0].Service.Port != 5432) {
			err = fmt.Errorf("%+v", got)
		}
		return err
	})
}

// TestClient drives an agent with Consul's API client, from configuration entries
// to checks, maintenance, metrics and reload.
func TestClient(t *testing.T) {
	const ip = "127.28.1.1"
	agenttest.Leaks(t)
	agenttest.Echo(t, ip+appPort, "")
	var healthy atomic.Bool
	healthy.Store(true)
	app := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		if !healthy.Load() {
			http.Error(w, "not today", http.StatusServiceUnavailable)
		}
	}))
	defer app.Close()
	n := agenttest.Start(t, agenttest.Config{Name: "s", IP: ip, HCL: "server = true\nbootstrap_expect = 1\n" +
		"telemetry { prometheus_retention_time = \"1m\" disable_hostname = true }\n" + fmt.Sprintf(echoHCL, ip)})
	a := n.Client.Agent()
	upstream := registerWeb(t, n)
	agenttest.Until(t, agenttest.Limit, "first call", func() error { return agenttest.Call(agenttest.Direct, upstream) })
	open, err := agenttest.Open(agenttest.Direct, upstream)
	if err != nil {
		t.Fatal(err)
	}
	if err := open.Ping(); err != nil {
		t.Fatal(err)
	}

	status := func(service, want string) {
		t.Helper()
		n.Watch(service+" is "+want, func(q *api.QueryOptions) (bool, *api.QueryMeta, error) {
			got, meta, err := n.Health().Service(service, "", false, q)
			return len(got) == 1 && got[0].Checks.AggregatedStatus() == want, meta, err
		})
	}
	t.Run("node", func(t *testing.T) {
		// The leader makes a record of the node too, at the same time: it must not
		// take away what the agent says of itself.
		n.Watch("the node's record is whole", func(q *api.QueryOptions) (bool, *api.QueryMeta, error) {
			node, meta, err := n.Catalog().Node("s", q)
			if err != nil || node == nil {
				return false, meta, err
			}
			return node.Node.TaggedAddresses["wan"] == ip && node.Node.Meta["consul-version"] != "", meta, nil
		})
		if err := a.ServiceRegister(&api.AgentServiceRegistration{Name: "brief", Port: 1}); err != nil {
			t.Fatal(err)
		}
		if got, _, err := n.Catalog().Service("brief", "", nil); err != nil || len(got) != 1 {
			t.Errorf("a service is not in the catalog when its registration is answered: %v, %v", got, err)
		}
		if err := a.ServiceDeregister("brief"); err != nil {
			t.Fatal(err)
		}
		if got, _, err := n.Catalog().Service("brief", "", nil); err != nil || len(got) != 0 {
			t.Errorf("a service is in the catalog when its deregistration is answered: %v, %v", got, err)
		}
	})
	t.Run("checks", func(t *testing.T) {
		if err := a.ServiceRegister(&api.AgentServiceRegistration{
			Name: "checked", Port: 1, Address: ip,
			Checks: api.AgentServiceChecks{
				{CheckID: "beat", TTL: "1m"},
				{CheckID: "page", HTTP: app.URL, Interval: "50ms", Timeout: "5s"},
			},
		}); err != nil {
			t.Fatal(err)
		}
		status("checked", api.HealthCritical) // a TTL check begins so
		if err := a.UpdateTTL("beat", "fine", api.HealthPassing); err != nil {
			t.Fatal(err)
		}
		status("checked", api.HealthPassing)
		healthy.Store(false)
		status("checked", api.HealthCritical)
		healthy.Store(true)
		status("checked", api.HealthPassing)
		if err := a.UpdateTTL("beat", "hm", api.HealthWarning); err != nil {
			t.Fatal(err)
		}
		status("checked", api.HealthWarning)
	})
	t.Run("maintenance", func(t *testing.T) {
		if err := a.EnableServiceMaintenance("checked", "paint"); err != nil {
			t.Fatal(err)
		}
		status("checked", api.HealthMaint)
		if err := a.DisableServiceMaintenance("checked"); err != nil {
			t.Fatal(err)
		}
		status("checked", api.HealthWarning)
		if err := a.EnableNodeMaintenance("paint"); err != nil {
			t.Fatal(err)
		}
		status("api", api.HealthMaint)
		if err := a.DisableNodeMaintenance(); err != nil {
			t.Fatal(err)
		}
		status("api", api.HealthPassing)
	})
	t.Run("entries", func(t *testing.T) {
		e := &api.ServiceConfigEntry{Kind: api.ServiceDefaults, Name: "api", Protocol: "tcp", MaxInboundConnections: 77}
		if _, _, err := n.ConfigEntries().Set(e, nil); err != nil {
			t.Fatal(err)
		}
		got, _, err := n.ConfigEntries().Get(api.ServiceDefaults, "api", nil)
		if err != nil {
			t.Fatal(err)
		}
		if d := got.(*api.ServiceConfigEntry); d.MaxInboundConnections != 77 || d.ModifyIndex == 0 {
			t.Errorf("read back %+v", d)
		}
		ok, _, err := n.ConfigEntries().CAS(&api.ServiceConfigEntry{Kind: api.ServiceDefaults, Name: "api", Protocol: "http"}, 1, nil)
		if err != nil || ok {
			t.Errorf("a write at an old index: %v, %v", ok, err)
		}
		if _, err := n.ConfigEntries().Delete(api.ServiceDefaults, "api", nil); err != nil {
			t.Fatal(err)
		}
	})
	t.Run("certificates", func(t *testing.T) {
		leaf, _, err := a.ConnectCALeaf("web", nil)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := tls.X509KeyPair([]byte(leaf.CertPEM), []byte(leaf.PrivateKeyPEM)); err != nil {
			t.Error(err)
		}
		auth, err := a.ConnectAuthorize(&api.AgentAuthorizeParams{Target: "api", ClientCertURI: leaf.ServiceURI, ClientCertSerial: leaf.SerialNumber})
		if err != nil || !auth.Authorized {
			t.Errorf("authorise: %+v, %v", auth, err)
		}
	})
	t.Run("metrics", func(t *testing.T) {
		agenttest.Until(t, agenttest.Limit, "a raft metric", func() error {
			m, err := a.Metrics()
			if err != nil {
				return err
			}
			names := []string{}
			for _, c := range m.Counters {
				names = append(names, c.Name)
			}
			for _, g := range m.Gauges {
				names = append(names, g.Name)
			}
			for _, want := range []string{"consul.raft.apply", "consul.runtime.alloc_bytes"} {
				if !slices.Contains(names, want) {
					return fmt.Errorf("there is no %s among %v", want, names)
				}
			}
			return nil
		})
		var text string
		if err := n.Get("/v1/agent/metrics?format=prometheus", &text); err != nil {
			t.Fatal(err)
		}
		for _, want := range []string{"consul_raft_apply", "consul_raft_commitTime"} {
			if !strings.Contains(text, want) {
				t.Errorf("there is no %s among the metrics of Prometheus' format", want)
			}
		}
	})
	t.Run("reload", func(t *testing.T) {
		n.WriteConfig("more.hcl", fmt.Sprintf("services { name = \"more\" port = 7 address = %q }\n", ip))
		if err := n.Agent.Reload(t.Context()); err != nil {
			t.Fatal(err)
		}
		n.AwaitCatalog("more", 1)
		n.WriteConfig("more.hcl", "services { name = \"\" }\n")
		if err := a.Reload(); err == nil {
			t.Error("a configuration that is wrong was taken")
		}
		n.WriteConfig("more.hcl", "")
		if err := a.Reload(); err != nil {
			t.Fatal(err)
		}
		n.AwaitCatalog("more", 0)
		if err := open.Ping(); err != nil {
			t.Errorf("a connection that was open during reloads: %v", err)
		}
		if services, err := a.Services(); err != nil || services["web"] == nil {
			t.Errorf("a service that was registered through the API is gone: %v", err)
		}
	})
	if err := open.End(); err != nil {
		t.Error(err)
	}
	st, err := n.Proxy("web-sidecar-proxy")
	if err != nil || st.State != gateway.PhaseServing {
		t.Errorf("%+v, %v", st, err)
	}
}
