package agent_test

import (
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/consul/api"

	"github.com/sluicemesh/sluice/agent/agenttest"
	"github.com/sluicemesh/sluice/gateway"
)

// caller calls again and again until it is stopped.
type caller struct {
	calls, failed atomic.Int64
	stop          func()
}

// callAll starts it; the calls that fail are told of as errors of the test.
func callAll(t *testing.T, call func() error) *caller {
	t.Helper()
	c := &caller{}
	done := make(chan struct{})
	var wg sync.WaitGroup
	const concurrency = 4
	for range concurrency {
		wg.Go(func() {
			tick := time.NewTicker(10 * time.Millisecond)
			defer tick.Stop()
			for {
				select {
				case <-done:
					return
				case <-tick.C:
				}
				if err := call(); err != nil {
					c.failed.Add(1)
					t.Errorf("call %d: %v", c.calls.Load(), err)
				}
				c.calls.Add(1)
			}
		})
	}
	c.stop = sync.OnceFunc(func() { close(done); wg.Wait() })
	t.Cleanup(c.stop)
	return c
}

// second is another gateway of a datacenter, on a client agent.
func second(t *testing.T, n *agenttest.Node, dc, ip string) *agenttest.Node {
	t.Helper()
	gw := agenttest.Start(t, agenttest.Config{Name: dc + "g", IP: ip, HCL: fmt.Sprintf(`
datacenter = %q
retry_join = [%q]
retry_interval = "1s"
performance { leave_drain_time = "200ms" }
services {
  kind    = "mesh-gateway"
  name    = "mesh-gateway"
  address = %[3]q
  port    = 8443
  check { name = "listening" tcp = "%[3]s:8443" interval = "1s" }
}
`, dc, n.IP, ip)})
	n.AwaitCatalog("mesh-gateway", 2)
	return gw
}

// used waits until calls go through the gateway, as it says itself.
func used(t *testing.T, gw *agenttest.Node, call func() error) {
	t.Helper()
	agenttest.Until(t, agenttest.Limit, "calls through the gateway at "+gw.IP, func() error {
		if err := call(); err != nil {
			return err
		}
		if st, err := gw.Proxy("mesh-gateway"); err != nil {
			return err
		} else if st.Plane == nil || len(st.Plane.Clusters) == 0 {
			return fmt.Errorf("none yet")
		}
		return nil
	})
}

// TestGatewayGoes takes one of two gateways away, in the caller's datacenter and
// in the other one, in order and abruptly. No call fails.
func TestGatewayGoes(t *testing.T) {
	m := startMesh(t, 25)
	more := func(last string) []*agenttest.Node {
		gws := []*agenttest.Node{second(t, m.dc1, "dc1", "127.25.1."+last), second(t, m.dc2, "dc2", "127.25.2."+last)}
		for _, gw := range gws {
			used(t, gw, m.call)
		}
		return gws
	}
	enough := func(c *caller, what string) {
		t.Helper()
		at := c.calls.Load()
		agenttest.Until(t, agenttest.Limit, what, func() error {
			if n := c.calls.Load() - at; n < 100 {
				return fmt.Errorf("%d calls", n)
			}
			return nil
		})
	}

	// They leave: open calls are drained.
	gws := more("2")
	c := callAll(t, m.call)
	var wg sync.WaitGroup
	for _, gw := range gws {
		wg.Go(func() {
			if err := gw.Client.Agent().Leave(); err != nil {
				t.Errorf("leave: %v", err)
			}
		})
	}
	wg.Wait()
	for i, n := range []*agenttest.Node{m.dc1, m.dc2} {
		n.AwaitCatalog("mesh-gateway", 1)
		gws[i].Stop()
	}
	enough(c, "calls after gateways left")
	c.stop()
	t.Logf("%d calls, %d of them failed, while a gateway of each datacenter left", c.calls.Load(), c.failed.Load())

	// They die: what they were carrying dies with them, and every call after that
	// finds the other ones, long before the death is noticed.
	for _, gw := range more("3") {
		gw.Stop()
	}
	c = callAll(t, m.call)
	enough(c, "calls after gateways died")
	c.stop()
	t.Logf("%d calls, %d of them failed, after a gateway of each datacenter died", c.calls.Load(), c.failed.Load())
}

const echoHCL = `
services {
  name    = "api"
  address = %[1]q
  port    = 8080
  connect { sidecar_service { proxy { local_service_address = %[1]q } } }
}
`

// registerWeb registers web through the API, with an upstream to api in the same
// datacenter, and returns the upstream's address.
func registerWeb(t *testing.T, n *agenttest.Node) string {
	t.Helper()
	agenttest.Until(t, agenttest.Limit, "register web", func() error {
		return n.Client.Agent().ServiceRegister(&api.AgentServiceRegistration{
			Name: "web", Address: n.IP, Port: 8081, Meta: map[string]string{"by": "the API"},
			Connect: &api.AgentServiceConnect{SidecarService: &api.AgentServiceRegistration{
				Proxy: &api.AgentServiceConnectProxyConfig{
					LocalServiceAddress: n.IP,
					Upstreams:           []api.Upstream{{DestinationName: "api", LocalBindAddress: n.IP, LocalBindPort: 9191}},
				},
			}},
		})
	})
	return n.IP + upstreamPort
}

// TestKill kills the one server with SIGKILL and starts it again on its data.
func TestKill(t *testing.T) {
	const ip = "127.26.1.1"
	agenttest.Echo(t, ip+appPort, "")
	c := agenttest.Config{Name: "s", IP: ip, Dir: t.TempDir(), HCL: "server = true\nbootstrap_expect = 1\n" + fmt.Sprintf(echoHCL, ip)}
	n := agenttest.StartProcess(t, c)
	upstream := registerWeb(t, n)
	call := func() error { return agenttest.Call(agenttest.Direct, upstream) }
	agenttest.Until(t, agenttest.Limit, "first call", call)
	n.AwaitCatalog("web-sidecar-proxy", 1)

	type facts struct{ root, services string }
	read := func() facts {
		t.Helper()
		roots, _, err := n.Client.Connect().CARoots(nil)
		if err != nil {
			t.Fatal(err)
		}
		services, err := n.Client.Agent().Services()
		if err != nil {
			t.Fatal(err)
		}
		var b strings.Builder
		for _, id := range []string{"api", "api-sidecar-proxy", "web", "web-sidecar-proxy"} {
			s := services[id]
			if s == nil {
				t.Fatalf("service %s is gone; there are %v", id, services)
			}
			fmt.Fprintf(&b, "%s at %s:%d %v\n", id, s.Address, s.Port, s.Meta)
		}
		return facts{roots.ActiveRootID, b.String()}
	}
	before := read()
	n.Stop()
	n = agenttest.StartProcess(t, c)
	took := agenttest.Until(t, agenttest.Limit, "calls after the restart", call)
	t.Logf("calls go on %v after the start", took.Round(time.Millisecond))
	n.AwaitCatalog("web-sidecar-proxy", 1)
	n.AwaitCatalog("api-sidecar-proxy", 1)
	if after := read(); after != before {
		t.Errorf("before the kill: %+v\nafter: %+v", before, after)
	}
	// New certificates come from the same root.
	agenttest.Until(t, agenttest.Limit, "current table", func() error {
		st, err := n.Proxy("web-sidecar-proxy")
		if err == nil && st.State != gateway.PhaseServing {
			err = fmt.Errorf("state %s: %s", st.State, st.Reason)
		}
		return err
	})
	if err := call(); err != nil {
		t.Error(err)
	}
}

// TestWithoutServer restarts a client agent while its only server is down: its
// proxies go on by the tables they had, and say so.
func TestWithoutServer(t *testing.T) {
	const serverIP, clientIP = "127.27.1.1", "127.27.1.2"
	agenttest.Leaks(t)
	agenttest.Echo(t, clientIP+appPort, "")
	serverConfig := agenttest.Config{Name: "s", IP: serverIP, Dir: t.TempDir(), HCL: "server = true\nbootstrap_expect = 1\n"}
	clientConfig := agenttest.Config{Name: "c", IP: clientIP, Dir: t.TempDir(), HCL: fmt.Sprintf("retry_join = [%q]\nretry_interval = \"1s\"\n", serverIP) +
		fmt.Sprintf(echoHCL, clientIP) + fmt.Sprintf(gatewayHCL, clientIP)}
	server, client := agenttest.Start(t, serverConfig), agenttest.Start(t, clientConfig)
	upstream := registerWeb(t, client)
	call := func() error { return agenttest.Call(agenttest.Direct, upstream) }
	agenttest.Until(t, agenttest.Limit, "first call", call)
	server.AwaitCatalog("mesh-gateway", 1)
	server.AwaitCatalog("api-sidecar-proxy", 1)
	proxies := []string{"web-sidecar-proxy", "api-sidecar-proxy", "mesh-gateway"}
	sni := ""
	for _, id := range proxies {
		agenttest.Until(t, agenttest.Limit, id+" serves", func() error {
			st, err := client.Proxy(id)
			if err == nil && st.State != gateway.PhaseServing {
				err = fmt.Errorf("state %s: %s", st.State, st.Reason)
			}
			return err
		})
	}
	agenttest.Until(t, agenttest.Limit, "the gateway has a route", func() error {
		table := new(gateway.Table)
		if err := client.Get("/v1/agent/proxy/mesh-gateway/table", table); err != nil {
			return err
		}
		for _, r := range table.Routes {
			if c := table.Cluster(r.Cluster); strings.HasPrefix(r.Match, "api.") && c != nil && len(c.Endpoints) == 1 && c.Endpoints[0].Healthy {
				sni = r.Match
				return nil
			}
		}
		return fmt.Errorf("there is none to api among %d", len(table.Routes))
	})

	c := callAll(t, call)
	server.Stop()
	at := c.calls.Load()
	agenttest.Until(t, agenttest.Limit, "calls without the server", func() error {
		if n := c.calls.Load() - at; n < 100 {
			return fmt.Errorf("%d calls", n)
		}
		return nil
	})
	c.stop()
	client.Stop()

	client = agenttest.Start(t, clientConfig)
	took := agenttest.Until(t, 5*time.Second, "calls after the restart", call)
	t.Logf("calls go on %v after the start without a server", took.Round(time.Millisecond))
	for _, id := range proxies {
		agenttest.Until(t, agenttest.Limit, id+" is stale", func() error {
			st, err := client.Proxy(id)
			if err != nil {
				return err
			}
			if !st.Stale || st.State != gateway.PhaseStale || st.Age <= 0 || !st.FromDisk || st.Reason == "" {
				return fmt.Errorf("state %s, stale %v, from disk %v, age %v, reason %q", st.State, st.Stale, st.FromDisk, st.Age, st.Reason)
			}
			return nil
		})
	}
	agenttest.Until(t, agenttest.Limit, "through the gateway", func() error { return hello(clientIP+":8443", sni) })

	// The server comes back, and with it what is current.
	agenttest.Start(t, serverConfig)
	for _, id := range proxies {
		took := agenttest.Until(t, agenttest.Limit, id+" is current again", func() error {
			st, err := client.Proxy(id)
			if err == nil && (st.Stale || st.FromDisk || st.State != gateway.PhaseServing) {
				err = fmt.Errorf("state %s, from disk %v: %s", st.State, st.FromDisk, st.Reason)
			}
			return err
		})
		t.Logf("%s is current after %v", id, took.Round(time.Millisecond))
	}
	if err := call(); err != nil {
		t.Error(err)
	}
}
