package agent_test

import (
	"crypto/tls"
	"fmt"
	"net"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/consul/api"

	"github.com/sluicemesh/sluice/agent/agenttest"
	"github.com/sluicemesh/sluice/gateway"
)

// greeter accepts connections on an address and says which of them it has got.
type greeter struct {
	addr *net.TCPAddr
	got  chan struct{}
}

// startGreeter accepts and closes until the end of the benchmark.
func startGreeter(b *testing.B, addr string) *greeter {
	b.Helper()
	l, err := net.Listen("tcp", addr)
	if err != nil {
		b.Fatal(err)
	}
	g := &greeter{addr: l.Addr().(*net.TCPAddr), got: make(chan struct{}, 1)}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			select {
			case g.got <- struct{}{}:
			default: // one is enough to know
			}
			_ = c.Close() // reaching it was the point
		}
	})
	b.Cleanup(func() { _ = l.Close(); wg.Wait() })
	return g
}

// BenchmarkCatalogChange moves a sidecar's instance in a catalog of 1,000
// services, and measures how long it takes until a connection through the mesh
// gateway, by the service's name, arrives at the new address.
func BenchmarkCatalogChange(b *testing.B) {
	const ip, services = "127.29.1.1", 1000
	n := agenttest.Start(b, agenttest.Config{Name: "s", IP: ip, HCL: "server = true\nbootstrap_expect = 1\nlog_level = \"warn\"\n" + fmt.Sprintf(gatewayHCL, ip)})
	greeters := [2]*greeter{startGreeter(b, ip+":22000"), startGreeter(b, ip+":22001")}
	register := func(i, port int) {
		b.Helper()
		name := fmt.Sprintf("svc-%04d", i)
		if _, err := n.Catalog().Register(&api.CatalogRegistration{
			Node: fmt.Sprintf("node-%02d", i%50), Address: ip, SkipNodeUpdate: i >= 50,
			Service: &api.AgentService{
				Kind: api.ServiceKindConnectProxy, ID: name + "-proxy", Service: name + "-sidecar-proxy", Address: ip, Port: port,
				Proxy: &api.AgentServiceConnectProxyConfig{DestinationServiceName: name},
			},
		}, nil); err != nil {
			b.Fatal(err)
		}
	}
	agenttest.Until(b, agenttest.Limit, "leader", func() error {
		_, _, err := n.Connect().CARoots(nil)
		return err
	})
	for i := range services {
		register(i, greeters[0].addr.Port)
	}
	var snis []string
	agenttest.Until(b, agenttest.Limit, "the gateway knows all services", func() error {
		table := new(gateway.Table)
		if err := n.Get("/v1/agent/proxy/mesh-gateway/table", table); err != nil {
			return err
		}
		snis = make([]string, services)
		found := 0
		for _, r := range table.Routes {
			var i int
			if _, err := fmt.Sscanf(r.Match, "svc-%04d.", &i); err == nil && snis[i] == "" {
				snis[i] = r.Match
				found++
			}
		}
		if found < services {
			return fmt.Errorf("it knows %d", found)
		}
		return nil
	})
	// arrives says whether a connection by the name arrives at g.
	arrives := func(sni string, g *greeter) bool {
		select {
		case <-g.got:
		default:
		}
		conn, err := net.DialTimeout("tcp", ip+":8443", time.Second)
		if err != nil {
			b.Fatal(err)
		}
		defer conn.Close() //nolint:errcheck // it has served
		if err := conn.SetDeadline(time.Now().Add(5 * time.Second)); err != nil {
			b.Fatal(err)
		}
		_ = tls.Client(conn, &tls.Config{ServerName: sni, InsecureSkipVerify: true}).Handshake() //nolint:gosec // it is closed by whom it reaches
		select {
		case <-g.got:
			return true
		default:
			return false
		}
	}
	at := make([]int, services)
	var took []time.Duration
	i := 0
	for b.Loop() {
		s := i * 37 % services
		i++
		at[s] = 1 - at[s]
		g := greeters[at[s]]
		start := time.Now()
		register(s, g.addr.Port)
		for !arrives(snis[s], g) {
			if time.Since(start) > agenttest.Limit {
				b.Fatalf("the move of %s has not arrived", snis[s])
			}
		}
		took = append(took, time.Since(start))
	}
	slices.Sort(took)
	ms := func(q float64) float64 {
		return float64(took[min(len(took)-1, int(q*float64(len(took))))]) / float64(time.Millisecond)
	}
	b.ReportMetric(ms(0.50), "p50-ms")
	b.ReportMetric(ms(0.99), "p99-ms")
	b.ReportMetric(ms(1), "max-ms")
}
