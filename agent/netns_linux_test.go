package agent_test

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/consul/api"

	"github.com/sluicemesh/sluice/agent/agenttest"
)

// cutFor is how long the line between the datacenters is cut;
// SLUICE_TEST_CUT has another duration for it.
const cutFor = 10 * time.Second

// site is a datacenter of real hosts: a server, a gateway and one for
// applications, on a network of their own. The server and the gateway are on the
// line between the datacenters too.
type site struct {
	dc                   string
	number               int
	server, gateway, app *agenttest.Node
	hostS, hostG, hostA  *agenttest.Host
	// startServer starts the server, on the data of the one before.
	startServer func() *agenttest.Node
}

func (s *site) lan(k int) string { return fmt.Sprintf("10.%d.0.%d", s.number, k) }
func (s *site) wan(k int) string { return fmt.Sprintf("192.0.2.%d", 10*s.number+k) }

// startSite starts the datacenter's three processes. Each app calls those of both
// datacenters: its own at port 9191, the other's at 9192.
func startSite(t *testing.T, network *agenttest.Network, number int) *site {
	t.Helper()
	s := &site{dc: fmt.Sprintf("dc%d", number), number: number}
	other := &site{dc: fmt.Sprintf("dc%d", 3-number), number: 3 - number}
	lan := fmt.Sprintf("lan%d", number)
	network.Bridge(lan)
	for k, h := range []**agenttest.Host{&s.hostS, &s.hostG, &s.hostA} {
		*h = network.Host(fmt.Sprintf("%s%d", []string{"s", "g", "a"}[k], number))
		(*h).Join(lan, s.lan(k+1)+"/24")
	}
	s.hostS.Join("wan", s.wan(1)+"/24")
	s.hostG.Join("wan", s.wan(2)+"/24")
	s.hostA.Join("wan", s.wan(3)+"/24") // used in mode remote alone
	s.hostA.Unplug("wan")

	l, err := s.hostA.Listen(s.lan(3) + appPort)
	if err != nil {
		t.Fatal(err)
	}
	agenttest.EchoOn(t, l, "")

	common := fmt.Sprintf("datacenter = %q\nprimary_datacenter = \"dc1\"\n", s.dc)
	server := agenttest.Config{Name: s.dc + "s", IP: s.lan(1), Dir: t.TempDir(), NoAddress: true, HCL: common + fmt.Sprintf(`
node_name          = "%[1]s-server"
data_dir           = %[2]q
bind_addr          = "0.0.0.0"
client_addr        = %[3]q
advertise_addr     = %[3]q
advertise_addr_wan = %[4]q
server             = true
bootstrap_expect   = 1
retry_join_wan     = [%[5]q]
retry_interval_wan = "1s"
performance { raft_multiplier = 1 }
`, s.dc, t.TempDir(), s.lan(1), s.wan(1), other.wan(1))}
	s.startServer = func() *agenttest.Node { return s.hostS.Start(t, server) }
	s.server = s.startServer()

	common += fmt.Sprintf("retry_join = [%q]\nretry_interval = \"1s\"\n", s.lan(1))
	s.gateway = s.hostG.Start(t, agenttest.Config{Name: s.dc + "g", IP: s.lan(2), HCL: common + fmt.Sprintf(`
services {
  kind    = "mesh-gateway"
  name    = "mesh-gateway"
  address = %[1]q
  port    = 8443
  tagged_addresses {
    lan { address = %[1]q port = 8443 }
    wan { address = %[2]q port = 8443 }
  }
  proxy { config { envoy_mesh_gateway_bind_tagged_addresses = true } }
}
`, s.lan(2), s.wan(2))})
	s.app = s.hostA.Start(t, agenttest.Config{Name: s.dc + "a", IP: s.lan(3), HCL: common + fmt.Sprintf(`
services {
  name    = "app"
  address = %[1]q
  port    = 8080
  connect { sidecar_service { proxy {
    local_service_address = %[1]q
    upstreams = [
      { destination_name = "app", local_bind_address = %[1]q, local_bind_port = 9191 },
      { destination_name = "app", datacenter = %[2]q, local_bind_address = %[1]q, local_bind_port = 9192 },
    ]
  } } }
}
`, s.lan(3), other.dc)})
	return s
}

func (s *site) near() error { return agenttest.Call(s.hostA.Dialer(), s.lan(3)+":9191") }
func (s *site) far() error  { return agenttest.Call(s.hostA.Dialer(), s.lan(3)+":9192") }

func (s *site) farUpstream(t *testing.T) (st struct {
	Mode api.MeshGatewayMode
	Text string
}) {
	t.Helper()
	p, err := s.app.Proxy("app-sidecar-proxy")
	if err != nil {
		t.Fatal(err)
	}
	for _, u := range p.Upstreams {
		if u.Datacenter != s.dc {
			st.Mode = u.Mode
		}
	}
	var text string
	if err := s.app.Get("/v1/agent/proxy/app-sidecar-proxy", &text); err != nil {
		t.Fatal(err)
	}
	st.Text = text
	return st
}

// callNear calls within each datacenter until stop is called; no call may fail.
func callNear(t *testing.T, during string, sites ...*site) (stop func()) {
	done := make(chan struct{})
	var wg sync.WaitGroup
	for _, s := range sites {
		wg.Go(func() {
			tick := time.NewTicker(20 * time.Millisecond)
			defer tick.Stop()
			for n := 0; ; n++ {
				select {
				case <-done:
					t.Logf("%d calls within %s during %s", n, s.dc, during)
					if n == 0 {
						t.Errorf("no call within %s during %s", s.dc, during)
					}
					return
				case <-tick.C:
				}
				if err := s.near(); err != nil {
					t.Errorf("call within %s during %s: %v", s.dc, during, err)
				}
			}
		})
	}
	stop = sync.OnceFunc(func() { close(done); wg.Wait() })
	t.Cleanup(stop)
	return stop
}

// TestTwoNetworks runs two datacenters whose networks have no route to each other:
// only servers and gateways reach the line between them.
func TestTwoNetworks(t *testing.T) {
	cut := cutFor
	if s := os.Getenv("SLUICE_TEST_CUT"); s != "" {
		var err error
		if cut, err = time.ParseDuration(s); err != nil {
			t.Fatal(err)
		}
	}
	network := agenttest.NewNetwork(t)
	network.Bridge("wan")
	dc1, dc2 := startSite(t, network, 1), startSite(t, network, 2)
	write := func(mode api.MeshGatewayMode) {
		t.Helper()
		agenttest.Until(t, agenttest.Limit, "write proxy-defaults", func() error {
			_, _, err := dc1.server.ConfigEntries().Set(&api.ProxyConfigEntry{
				Kind: api.ProxyDefaults, Name: api.ProxyConfigGlobal, MeshGateway: api.MeshGatewayConfig{Mode: mode},
			}, nil)
			return err
		})
	}
	// path makes a call from dc1 to dc2 and tells by which gateways it went.
	path := func() (api.MeshGatewayMode, error) {
		before1, before2 := dc1.gateway.Connected("mesh-gateway"), dc2.gateway.Connected("mesh-gateway")
		if err := dc1.far(); err != nil {
			return "", err
		}
		n1, n2 := dc1.gateway.Connected("mesh-gateway")-before1, dc2.gateway.Connected("mesh-gateway")-before2
		switch {
		case n1 == 1 && n2 == 1:
			return api.MeshGatewayModeLocal, nil
		case n1 == 0 && n2 == 1:
			return api.MeshGatewayModeRemote, nil
		}
		return "", fmt.Errorf("the call went %d times through dc1's gateway and %d times through dc2's", n1, n2)
	}
	wantPath := func(want api.MeshGatewayMode, limit time.Duration) {
		t.Helper()
		took := agenttest.Until(t, limit, "calls by mode "+string(want), func() error {
			got, err := path()
			if err == nil && got != want {
				err = fmt.Errorf("calls go by mode %q, want %q", got, want)
			}
			return err
		})
		t.Logf("calls go by mode %q after %v", want, took.Round(time.Millisecond))
	}

	// Local: nothing but gateways and servers is on the line.
	write(api.MeshGatewayModeLocal)
	wantPath(api.MeshGatewayModeLocal, agenttest.Limit)
	agenttest.Until(t, agenttest.Limit, "call from dc2 to dc1", dc2.far)
	open, err := agenttest.Open(dc1.hostA.Dialer(), dc1.lan(3)+":9192")
	if err != nil {
		t.Fatal(err)
	}
	if err := open.Ping(); err != nil {
		t.Fatal(err)
	}

	// Remote: the sidecar itself needs the line, which it has only now.
	dc1.hostA.Plug("wan")
	write(api.MeshGatewayModeRemote)
	wantPath(api.MeshGatewayModeRemote, switchLimit)
	if err := open.Ping(); err != nil {
		t.Fatalf("the open connection after the switch: %v", err)
	}

	// None: the far side's own address is on its own network alone.
	write(api.MeshGatewayModeNone)
	agenttest.Until(t, switchLimit, "mode none fails", func() error {
		if dc1.far() == nil {
			return errors.New("calls still work")
		}
		return nil
	})
	want := dc2.lan(3) + ":21000"
	agenttest.Until(t, switchLimit, "mode none tells why", func() error {
		st := dc1.farUpstream(t)
		if st.Mode != api.MeshGatewayModeNone {
			return fmt.Errorf("the status says mode %q", st.Mode)
		}
		for _, text := range []string{want, "connect-failed", "unreachable"} {
			if !strings.Contains(st.Text, text) {
				return fmt.Errorf("the status does not speak of %q: %s", text, st.Text)
			}
		}
		for _, text := range []string{want, "unreachable"} {
			if !strings.Contains(dc1.app.Log(), text) {
				return fmt.Errorf("the log does not speak of %q", text)
			}
		}
		return nil
	})
	if err := open.Ping(); err != nil {
		t.Fatalf("the open connection in mode none: %v", err)
	}

	// A service-defaults entry switches it live, over proxy-defaults.
	if _, _, err := dc1.server.ConfigEntries().Set(&api.ServiceConfigEntry{
		Kind: api.ServiceDefaults, Name: "app", MeshGateway: api.MeshGatewayConfig{Mode: api.MeshGatewayModeLocal},
	}, nil); err != nil {
		t.Fatal(err)
	}
	dc1.hostA.Unplug("wan")
	wantPath(api.MeshGatewayModeLocal, switchLimit)
	if err := open.Ping(); err != nil {
		t.Fatalf("the open connection after the last switch: %v", err)
	}

	// The line is cut, and mended: within the datacenters no call fails meanwhile.
	stop := callNear(t, "the cut", dc1, dc2)
	cutLine := func(do func(*agenttest.Host, string)) {
		for _, h := range []*agenttest.Host{dc2.hostS, dc2.hostG} {
			do(h, "wan")
		}
	}
	cutLine((*agenttest.Host).Unplug)
	mend := time.NewTimer(cut)
	agenttest.Until(t, cut, "the cut shows", func() error {
		if dc1.far() == nil {
			return errors.New("calls still work")
		}
		return nil
	})
	<-mend.C
	cutLine((*agenttest.Host).Plug)
	const resume = 10 * time.Second
	for _, s := range []*site{dc1, dc2} {
		took := agenttest.Until(t, resume, "calls from "+s.dc+" after the cut", s.far)
		t.Logf("calls from %s go on %v after the end of a cut of %v", s.dc, took.Round(time.Millisecond), cut)
	}
	stop()

	// The primary's server is killed: nothing that is known is lost, in any
	// datacenter, and what is decided after its return comes into force.
	stop = callNear(t, "the server's absence", dc1, dc2)
	dc1.server.Stop()
	for _, s := range []*site{dc1, dc2} {
		for range 20 {
			if err := s.far(); err != nil {
				t.Errorf("call from %s without dc1's server: %v", s.dc, err)
			}
		}
	}
	dc1.server = dc1.startServer()
	dc1.hostA.Plug("wan")
	agenttest.Until(t, agenttest.Limit, "write after the return", func() error {
		_, err := dc1.server.ConfigEntries().Delete(api.ServiceDefaults, "app", nil)
		return err
	})
	write(api.MeshGatewayModeRemote)
	wantPath(api.MeshGatewayModeRemote, agenttest.Limit)
	stop()

	// What is decided in dc1 reaches dc2 again.
	if _, _, err := dc1.server.ConfigEntries().Set(&api.ServiceIntentionsConfigEntry{
		Kind: api.ServiceIntentions, Name: "app", Sources: []*api.SourceIntention{{Name: "*", Action: api.IntentionActionDeny}},
	}, nil); err != nil {
		t.Fatal(err)
	}
	took := agenttest.Until(t, agenttest.Limit, "a denial after the cut", func() error {
		if dc2.near() == nil {
			return errors.New("calls still work")
		}
		return nil
	})
	t.Logf("replication goes on %v after the calls", took.Round(time.Millisecond))
}
