package sni

import (
	"net"
	"testing"
	"time"

	"github.com/sluicemesh/sluice/gateway"
)

// endpointStatus returns what the status says of an endpoint that was used.
func endpointStatus(s gateway.Status, addr string) (gateway.EndpointStatus, bool) {
	for _, c := range s.Clusters {
		for _, e := range c.Endpoints {
			if e.Address == addr {
				return e, true
			}
		}
	}
	return gateway.EndpointStatus{}, false
}

func TestProbe(t *testing.T) {
	hello := helloFor(t, "web.example")
	onEngines(t, func(t *testing.T, engine string) {
		good := greeter(t, hello, "G", nil)
		dead := closedPort(t)
		web := clusterOf("web", dead, good.addr)
		web.Policy = gateway.PolicyRoundRobin
		web.Probe = &gateway.Probe{Interval: 5 * time.Millisecond, Timeout: time.Second, All: true}
		f := start(t, Config{Engine: engine, EjectAfter: 3, EjectBase: time.Hour, EjectMax: time.Hour},
			table([]gateway.Cluster{web}, "web.example", "web"))
		ep := f.view.Load().clusters[0].endpoints[dead]
		// It is taken out of use before a client has tried it.
		f.untilCounted(func(gateway.Status) bool { return ep.ejectedUntil.Load() > f.now() })
		for range 8 {
			expectTag(t, f.dial(hello), "G")
		}
		e, ok := endpointStatus(f.Status(), dead)
		if !ok || e.Failed != 0 || e.LastError != "probe: connection refused" || e.EjectedUntil.IsZero() {
			t.Errorf("endpoint: %+v", e)
		}
		// It is back, and is used again long before its time is over.
		serveOn(t, dead, func(c *net.TCPConn) {
			if expect(c, hello) == nil {
				c.Write([]byte("D"))
			}
		})
		f.untilCounted(func(s gateway.Status) bool {
			e, _ := endpointStatus(s, dead)
			return e.EjectedUntil.IsZero()
		})
		got := map[byte]int{}
		for range 8 {
			var tag [1]byte
			if _, err := f.dial(hello).Read(tag[:]); err != nil {
				t.Fatal(err)
			}
			got[tag[0]]++
		}
		if got['D'] == 0 || got['G'] == 0 {
			t.Errorf("connections: %v", got)
		}

		// Where only those that fail are probed, others are left alone.
		probes := make(chan struct{}, 100)
		quiet := serve(t, func(*net.TCPConn) { probes <- struct{}{} })
		flaky := clusterOf("flaky", quiet.addr, good.addr)
		flaky.Probe = &gateway.Probe{Interval: time.Millisecond, Timeout: time.Second}
		f.apply(table([]gateway.Cluster{flaky}, "web.example", "flaky"))
		ep = f.view.Load().clusters[0].endpoints[quiet.addr]
		if got := f.view.Load().clusters[0].name; got != "flaky" {
			t.Fatal(got)
		}
		select {
		case <-probes:
			t.Error("an endpoint without a failure is probed")
		case <-time.After(100 * time.Millisecond):
		}
		ep.failures.Store(failingLeast)
		<-probes
		f.untilCounted(func(gateway.Status) bool { return ep.failures.Load() == 0 })

		// Off is off.
		flaky.Probe = nil
		f.apply(table([]gateway.Cluster{flaky}, "web.example", "flaky"))
		for len(probes) > 0 {
			<-probes
		}
		ep.failures.Store(failingLeast)
		select {
		case <-probes:
			t.Error("an endpoint is probed that is not to be")
		case <-time.After(100 * time.Millisecond):
		}
	})
}
