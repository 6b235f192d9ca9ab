package agent_test

import (
	"fmt"
	"testing"
	"time"

	"github.com/hashicorp/consul/api"

	"github.com/sluicemesh/sluice/agent/agenttest"
	"github.com/sluicemesh/sluice/gateway"
)

// TestDrain drains one of two gateways of a datacenter under load, that of the
// caller's and that of the other one. No call fails and no open connection is
// touched before the timeout is over; then those on the gateway are ended, and no
// others. Taken back, the gateway is used again.
func TestDrain(t *testing.T) {
	m := startMesh(t, 28)
	for _, far := range []bool{false, true} {
		dc, ip, n := "dc1", "127.28.1.2", m.dc1
		if far {
			dc, ip, n = "dc2", "127.28.2.2", m.dc2
		}
		gw := second(t, n, dc, ip)
		used(t, gw, m.call)
		drainUnderLoad(t, m, n, gw)
		keepsMaintenance(t, gw)
		if err := gw.Client.Agent().Leave(); err != nil {
			t.Fatal(err)
		}
		n.AwaitCatalog("mesh-gateway", 1)
		gw.Stop()
	}
}

func drainUnderLoad(t *testing.T, m *mesh, server, gw *agenttest.Node) {
	t.Helper()
	const id, path = "mesh-gateway", "/v1/agent/proxy/mesh-gateway/drain"
	active := func() (n int64) {
		t.Helper()
		st, err := gw.Proxy(id)
		if err != nil {
			t.Fatal(err)
		}
		for _, l := range st.Plane.Listeners {
			n += l.Active
		}
		return n
	}
	var open []*agenttest.Conn
	agenttest.Until(t, agenttest.Limit, "connections that stay open", func() error {
		c, err := agenttest.Open(agenttest.Direct, m.upstream)
		if err == nil {
			open = append(open, c)
			err = c.Ping()
		}
		if err == nil && active() < 5 {
			err = fmt.Errorf("%d go through the gateway", active())
		}
		return err
	})
	through := active()
	var listed []gateway.Connection
	if err := gw.Get("/v1/agent/proxy/"+id+"/connections", &listed); err != nil || len(listed) != int(through) {
		t.Errorf("%d connections listed, want %d; %v", len(listed), through, err)
	}

	calls := callAll(t, m.call)
	const wait, timeout = time.Second, 2 * time.Second
	start := time.Now()
	if _, err := gw.Raw().Write(path, map[string]any{"Wait": wait.String(), "Timeout": timeout.String(), "Rate": 20}, nil, nil); err != nil {
		t.Fatal(err)
	}
	progress := func() (p gateway.Progress) {
		t.Helper()
		if err := gw.Get(path, &p); err != nil {
			t.Fatal(err)
		}
		return p
	}
	// While nothing may be broken, everything is used.
	var before uint64
	seen := map[gateway.DrainPhase]bool{}
	for time.Since(start) < wait+timeout {
		if p := progress(); !seen[p.Phase] {
			seen[p.Phase] = true
			t.Logf("%v: %+v", time.Since(start).Round(time.Millisecond), p)
			if p.Phase == gateway.DrainFinishing {
				before = gw.Connected(id)
			}
		}
		for i, c := range open {
			if err := c.Ping(); err != nil && time.Since(start) < wait+timeout {
				t.Fatalf("open connection %d, %v after the begin: %v", i, time.Since(start), err)
			}
		}
	}
	if !seen[gateway.DrainWaiting] || !seen[gateway.DrainFinishing] {
		t.Errorf("phases seen: %v", seen)
	}
	server.Watch("the gateway in maintenance", func(q *api.QueryOptions) (bool, *api.QueryMeta, error) {
		list, meta, err := server.Health().Service(id, "", false, q)
		for _, s := range list {
			if s.Service.Address == gw.IP && s.Checks.AggregatedStatus() == api.HealthMaint {
				return true, meta, err
			}
		}
		return false, meta, err
	})
	agenttest.Until(t, agenttest.Limit, "drained", func() error {
		if p := progress(); p.Phase != gateway.DrainDrained {
			return fmt.Errorf("%+v", p)
		}
		return nil
	})
	p := progress()
	t.Logf("%v: %+v", time.Since(start).Round(time.Millisecond), p)
	if p.Closed != int(through) || active() != 0 {
		t.Errorf("%d connections closed, %d active, want %d and none", p.Closed, active(), through)
	}
	if n := gw.Connected(id); n != before {
		t.Errorf("%d calls came by the gateway after its listeners were closed", n-before)
	}
	calls.stop()
	t.Logf("%d calls, %d of them failed", calls.calls.Load(), calls.failed.Load())
	ended := 0
	for _, c := range open {
		if err := c.Ping(); err != nil {
			ended++
			_ = c.Close() // the other side has
		} else if err := c.End(); err != nil {
			t.Errorf("end of a connection by another way: %v", err)
		}
	}
	if ended != int(through) {
		t.Errorf("%d of %d open connections have ended, want those %d that went through the gateway", ended, len(open), through)
	}

	if _, err := gw.Raw().Delete(path, nil); err != nil {
		t.Fatal(err)
	}
	server.AwaitCatalog(id, 2)
	agenttest.Until(t, agenttest.Limit, "calls through the gateway again", func() error {
		if err := m.call(); err != nil {
			return err
		}
		if gw.Connected(id) == before {
			return fmt.Errorf("none yet")
		}
		return nil
	})
}

// keepsMaintenance drains a gateway that somebody has put into maintenance: the
// drain, and its end, leave that alone.
func keepsMaintenance(t *testing.T, gw *agenttest.Node) {
	t.Helper()
	const id, path, reason = "mesh-gateway", "/v1/agent/proxy/mesh-gateway/drain", "somebody's own"
	if err := gw.Client.Agent().EnableServiceMaintenance(id, reason); err != nil {
		t.Fatal(err)
	}
	if _, err := gw.Raw().Write(path, map[string]any{"Wait": "0s", "Timeout": "0s"}, nil, nil); err != nil {
		t.Fatal(err)
	}
	if _, err := gw.Raw().Delete(path, nil); err != nil {
		t.Fatal(err)
	}
	checks, err := gw.Client.Agent().Checks()
	if err != nil {
		t.Fatal(err)
	}
	if c := checks[api.ServiceMaintPrefix+id]; c == nil || c.Notes != reason {
		t.Errorf("maintenance after the drain: %+v", c)
	}
	if err := gw.Client.Agent().DisableServiceMaintenance(id); err != nil {
		t.Fatal(err)
	}
}
