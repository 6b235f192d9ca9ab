package agent_test

import (
	"bytes"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/consul/api"

	"github.com/sluicemesh/sluice/agent/agenttest"
)

// Ports of the services in these tests.
const (
	appPort      = ":8080"
	upstreamPort = ":9191"
)

// switchLimit is how soon a change has to show on the data path.
const switchLimit = 2 * time.Second

// mesh is two federated datacenters: web in dc1 calls api in dc2 through its
// sidecar, whose upstream listens at upstream.
type mesh struct {
	t        *testing.T
	dc1, dc2 *agenttest.Node
	upstream string
}

const gatewayHCL = `
services {
  kind    = "mesh-gateway"
  name    = "mesh-gateway"
  address = "%[1]s"
  port    = 8443
  tagged_addresses {
    lan { address = "%[1]s" port = 8443 }
    wan { address = "%[1]s" port = 8443 }
  }
}
`

// startMesh starts both; subnet is the second number of all addresses, of which
// every test has its own.
func startMesh(t *testing.T, subnet int) *mesh {
	t.Helper()
	ip1, ip2 := fmt.Sprintf("127.%d.1.1", subnet), fmt.Sprintf("127.%d.2.1", subnet)
	agenttest.Leaks(t)
	agenttest.Echo(t, ip2+appPort, "")
	server := func(name, ip, other, more string) *agenttest.Node {
		return agenttest.Start(t, agenttest.Config{Name: name, IP: ip, HCL: fmt.Sprintf(`
datacenter         = %q
primary_datacenter = "dc1"
server             = true
bootstrap_expect   = 1
retry_join_wan     = [%q]
retry_interval_wan = "1s"
`, name, other) + fmt.Sprintf(gatewayHCL, ip) + more})
	}
	m := &mesh{t: t, upstream: ip1 + upstreamPort}
	m.dc1 = server("dc1", ip1, ip2, "")
	m.dc2 = server("dc2", ip2, ip1, fmt.Sprintf(`
services {
  name    = "api"
  address = %[1]q
  port    = 8080
  connect { sidecar_service { proxy { local_service_address = %[1]q } } }
}
`, ip2))
	m.setMode("", "")
	m.proxyDefaults(api.MeshGatewayModeLocal)
	agenttest.Until(t, agenttest.Limit, "first call", m.call)
	return m
}

// setMode registers web with modes for the whole proxy and for its upstream.
func (m *mesh) setMode(proxy, upstream api.MeshGatewayMode) {
	m.t.Helper()
	if err := m.dc1.Client.Agent().ServiceRegister(&api.AgentServiceRegistration{
		Name: "web", Address: m.dc1.IP, Port: 8081,
		Connect: &api.AgentServiceConnect{SidecarService: &api.AgentServiceRegistration{
			Proxy: &api.AgentServiceConnectProxyConfig{
				LocalServiceAddress: m.dc1.IP,
				MeshGateway:         api.MeshGatewayConfig{Mode: proxy},
				Upstreams: []api.Upstream{{
					DestinationName: "api", Datacenter: "dc2", LocalBindAddress: m.dc1.IP, LocalBindPort: 9191,
					MeshGateway: api.MeshGatewayConfig{Mode: upstream},
				}},
			},
		}},
	}); err != nil {
		m.t.Fatal(err)
	}
}

// write writes a config entry, as soon as there is a leader to write it.
func (m *mesh) write(e api.ConfigEntry) {
	m.t.Helper()
	agenttest.Until(m.t, agenttest.Limit, "write "+e.GetKind(), func() error {
		_, _, err := m.dc1.ConfigEntries().Set(e, nil)
		return err
	})
}

func (m *mesh) proxyDefaults(mode api.MeshGatewayMode) {
	m.t.Helper()
	m.write(&api.ProxyConfigEntry{Kind: api.ProxyDefaults, Name: api.ProxyConfigGlobal, MeshGateway: api.MeshGatewayConfig{Mode: mode}})
}

func (m *mesh) serviceDefaults(mode api.MeshGatewayMode) {
	m.t.Helper()
	m.write(&api.ServiceConfigEntry{Kind: api.ServiceDefaults, Name: "web", MeshGateway: api.MeshGatewayConfig{Mode: mode}})
}

func (m *mesh) call() error { return agenttest.Call(agenttest.Direct, m.upstream) }

// path makes a call and tells by which gateways it went, by their own counters.
func (m *mesh) path() (api.MeshGatewayMode, error) {
	const gw = "mesh-gateway"
	before1, before2 := m.dc1.Connected(gw), m.dc2.Connected(gw)
	if err := m.call(); err != nil {
		return "", err
	}
	switch n1, n2 := m.dc1.Connected(gw)-before1, m.dc2.Connected(gw)-before2; {
	case n1 == 1 && n2 == 1:
		return api.MeshGatewayModeLocal, nil
	case n1 == 0 && n2 == 1:
		return api.MeshGatewayModeRemote, nil
	case n1 == 0 && n2 == 0:
		return api.MeshGatewayModeNone, nil
	default:
		return "", fmt.Errorf("the call went %d times through dc1's gateway and %d times through dc2's", n1, n2)
	}
}

// wantPath wants calls to go by the mode, soon.
func (m *mesh) wantPath(why string, want api.MeshGatewayMode) {
	m.t.Helper()
	took := agenttest.Until(m.t, switchLimit, why, func() error {
		got, err := m.path()
		if err == nil && got != want {
			err = fmt.Errorf("calls go by mode %q, want %q", got, want)
		}
		return err
	})
	m.t.Logf("%s: %q after %v", why, want, took.Round(time.Millisecond))
}

// TestBytes sends much through both gateways and wants every byte back.
func TestBytes(t *testing.T) {
	m := startMesh(t, 21)
	m.wantPath("proxy-defaults", api.MeshGatewayModeLocal)
	const size = 64 << 20
	conn, err := net.Dial("tcp", m.upstream)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close() //nolint:errcheck // it has been read to its end
	if err := conn.SetDeadline(time.Now().Add(agenttest.Limit)); err != nil {
		t.Fatal(err)
	}
	stream := func() io.Reader { return io.LimitReader(rand.NewChaCha8([32]byte{1}), size) }
	sent := make(chan error, 1)
	start := time.Now()
	go func() {
		_, err := io.Copy(conn, stream())
		sent <- errors.Join(err, conn.(*net.TCPConn).CloseWrite())
	}()
	got, want := make([]byte, 1<<16), make([]byte, 1<<16)
	total, same := 0, stream()
	for {
		n, err := conn.Read(got)
		if _, err := io.ReadFull(same, want[:n]); err != nil {
			t.Fatalf("more came back than was sent, after %d bytes: %v", total, err)
		}
		if !bytes.Equal(got[:n], want[:n]) {
			t.Fatalf("other bytes came back than were sent, after %d", total)
		}
		total += n
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatalf("receive after %d bytes: %v", total, err)
		}
	}
	if err := <-sent; err != nil {
		t.Fatal(err)
	}
	if total != size {
		t.Fatalf("%d bytes came back, want %d", total, size)
	}
	t.Logf("%d MiB there and back in %v", size>>20, time.Since(start).Round(time.Millisecond))
}

// TestCallsDuringChanges wants no call to fail while what decides about its way is
// written again and again.
func TestCallsDuringChanges(t *testing.T) {
	m := startMesh(t, 22)
	const calls, concurrency = 1000, 50
	var wg, writer sync.WaitGroup
	var next atomic.Int64
	done := make(chan struct{})
	writes := 0
	writer.Go(func() {
		modes := []api.MeshGatewayMode{api.MeshGatewayModeRemote, api.MeshGatewayModeLocal, api.MeshGatewayModeNone, api.MeshGatewayModeDefault}
		for {
			for i, mode := range modes {
				for _, e := range []api.ConfigEntry{
					&api.ProxyConfigEntry{Kind: api.ProxyDefaults, Name: api.ProxyConfigGlobal, MeshGateway: api.MeshGatewayConfig{Mode: modes[(i+1)%len(modes)]}},
					&api.ServiceConfigEntry{Kind: api.ServiceDefaults, Name: "web", MeshGateway: api.MeshGatewayConfig{Mode: mode}},
				} {
					select {
					case <-done:
						return
					default:
					}
					if _, _, err := m.dc1.ConfigEntries().Set(e, nil); err != nil {
						t.Errorf("write %s: %v", e.GetKind(), err)
						return
					}
					writes++
				}
			}
		}
	})
	var slowest atomic.Int64
	start := time.Now()
	for range concurrency {
		wg.Go(func() {
			for next.Add(1) <= calls {
				begun := time.Now()
				if err := m.call(); err != nil {
					t.Errorf("call: %v", err)
				}
				took := int64(time.Since(begun))
				for old := slowest.Load(); took > old && !slowest.CompareAndSwap(old, took); old = slowest.Load() {
				}
			}
		})
	}
	wg.Wait()
	took := time.Since(start)
	close(done)
	writer.Wait()
	t.Logf("%d calls in %v, the slowest in %v, during %d writes", calls, took.Round(time.Millisecond), time.Duration(slowest.Load()).Round(time.Millisecond), writes)
	if writes < 10 {
		t.Errorf("only %d config entries were written meanwhile", writes)
	}
}

// TestPrecedence sets the mode at every level, lowest first, and takes it away
// again in that order's reverse. An open connection is not touched by any of it.
func TestPrecedence(t *testing.T) {
	m := startMesh(t, 23)
	open, err := agenttest.Open(agenttest.Direct, m.upstream)
	if err != nil {
		t.Fatal(err)
	}
	const (
		none   = api.MeshGatewayModeNone
		local  = api.MeshGatewayModeLocal
		remote = api.MeshGatewayModeRemote
	)
	for _, step := range []struct {
		why string
		do  func()
		// want is the mode that wins, and from where.
		want api.MeshGatewayMode
	}{
		{"proxy-defaults local", func() { m.proxyDefaults(local) }, local},
		{"proxy-defaults remote", func() { m.proxyDefaults(remote) }, remote},
		{"service-defaults local over proxy-defaults remote", func() { m.serviceDefaults(local) }, local},
		{"instance none over service-defaults local", func() { m.setMode(none, "") }, none},
		{"upstream remote over instance none", func() { m.setMode(none, remote) }, remote},
		{"proxy-defaults and service-defaults below do not count", func() { m.proxyDefaults(none); m.serviceDefaults(none) }, remote},
		{"upstream local", func() { m.setMode(none, local) }, local},
		{"upstream taken away", func() { m.setMode(remote, "") }, remote},
		{"instance taken away", func() { m.serviceDefaults(local); m.setMode("", "") }, local},
		{"service-defaults taken away", func() {
			m.proxyDefaults(remote)
			if _, err := m.dc1.ConfigEntries().Delete(api.ServiceDefaults, "web", nil); err != nil {
				t.Fatal(err)
			}
		}, remote},
	} {
		step.do()
		m.wantPath(step.why, step.want)
		st, err := m.dc1.Proxy("web-sidecar-proxy")
		if err != nil {
			t.Fatal(err)
		}
		if len(st.Upstreams) != 1 || st.Upstreams[0].Mode != step.want || st.Upstreams[0].ModeFrom == "" {
			t.Errorf("%s: the status says %+v, want mode %s and where it is from", step.why, st.Upstreams, step.want)
		}
		if err := open.Ping(); err != nil {
			t.Fatalf("%s: the open connection: %v", step.why, err)
		}
	}
	if err := open.End(); err != nil {
		t.Errorf("end of the open connection: %v", err)
	}
}

// TestIntentions forbids a call in the primary and wants the other datacenter's
// sidecar to refuse it.
func TestIntentions(t *testing.T) {
	m := startMesh(t, 24)
	for range 2 {
		for _, action := range []api.IntentionAction{api.IntentionActionDeny, api.IntentionActionAllow} {
			m.write(&api.ServiceIntentionsConfigEntry{Kind: api.ServiceIntentions, Name: "api", Sources: []*api.SourceIntention{{Name: "web", Action: action}}})
			took := agenttest.Until(t, switchLimit, string(action), func() error {
				err := m.call()
				if action == api.IntentionActionAllow {
					return err
				}
				if err == nil {
					return errors.New("calls go on")
				}
				return nil
			})
			t.Logf("%s after %v", action, took.Round(time.Millisecond))
		}
	}
}

// signedBy says whether the root of that ID has signed a certificate, by way of
// the intermediates that come with it.
func signedBy(c *api.Client, chainPEM, rootID string) (bool, error) {
	list, _, err := c.Connect().CARoots(nil)
	if err != nil {
		return false, err
	}
	roots, between := x509.NewCertPool(), x509.NewCertPool()
	for _, r := range list.Roots {
		if r.ID == rootID {
			roots.AppendCertsFromPEM([]byte(r.RootCertPEM))
		}
	}
	block, rest := pem.Decode([]byte(chainPEM))
	if block == nil {
		return false, errors.New("no certificate")
	}
	between.AppendCertsFromPEM(rest)
	leaf, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return false, err
	}
	_, err = leaf.Verify(x509.VerifyOptions{Roots: roots, Intermediates: between, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}})
	return err == nil, nil
}
