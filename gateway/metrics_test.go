package gateway_test

import (
	"context"
	"fmt"
	"os"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/armon/go-metrics"
	"github.com/google/go-cmp/cmp"

	"github.com/sluicemesh/sluice/gateway"
)

// reported collects what a reporter reports.
type reported struct {
	counters map[string]float64 // summed up, as sinks do
	gauges   map[string]float32
}

func (r *reported) IncrCounterWithLabels(key []string, v float32, labels []metrics.Label) {
	r.counters[name(key, labels)] += float64(v)
}

func (r *reported) SetGaugeWithLabels(key []string, v float32, labels []metrics.Label) {
	r.gauges[name(key, labels)] = v
}

func name(key []string, labels []metrics.Label) string {
	var b strings.Builder
	b.WriteString(strings.Join(key, "."))
	for _, l := range labels {
		fmt.Fprintf(&b, " %s=%s", l.Name, l.Value)
	}
	return b.String()
}

// report runs a reporter over the statuses, one interval each.
func report(t *testing.T, top int, rounds ...[]gateway.ProxyStatus) *reported {
	t.Helper()
	sink := &reported{map[string]float64{}, map[string]float32{}}
	synctest.Test(t, func(t *testing.T) {
		round := 0
		r := gateway.Reporter{Sink: sink, Top: top, Status: func() []gateway.ProxyStatus {
			st := rounds[min(round, len(rounds)-1)]
			round++
			return st
		}}
		ctx, cancel := context.WithTimeout(t.Context(), time.Duration(len(rounds)-1)*10*time.Second+time.Second)
		defer cancel()
		if err := r.Run(ctx); err != nil {
			t.Error(err)
		}
		if round != len(rounds) {
			t.Errorf("%d reports, want %d", round, len(rounds))
		}
	})
	return sink
}

func proxyStatus(accepted, refused, connected, in uint64) gateway.ProxyStatus {
	return gateway.ProxyStatus{
		ID: "gw", State: gateway.PhaseServing, Age: gateway.Duration(1500 * time.Millisecond), TableAsOf: time.Unix(1, 0),
		Plane: &gateway.Status{
			Listeners: []gateway.ListenerStatus{{
				Name: "default", Bound: true, Active: 3, Accepted: accepted,
				Refused: map[string]uint64{gateway.RefuseNoRoute: refused}, Closed: map[string]uint64{gateway.CloseDone: connected},
			}},
			Clusters: []gateway.ClusterStatus{{
				Name: "api", Active: 3, Connected: connected, Failed: 1, Retries: 2, BytesIn: in, BytesOut: 2 * in,
				ConnectTimes: &gateway.ConnectTimes{Sum: gateway.Duration(connected) * gateway.Duration(time.Second/4),
					Counts: []uint64{connected - 1, 0, 0, 0, 0, 0, 0, 0, 0, 1}},
				Endpoints: []gateway.EndpointStatus{{Address: "10.0.0.1:80", Active: 3, Connected: connected, Failed: 3,
					BytesIn: in, BytesOut: 2 * in,
					Failures: map[string]uint64{gateway.FailReset: 2}}},
			}},
		},
	}
}

// TestReporter counts what came since the last report, also when a data plane has
// begun anew, and what was there before the first.
func TestReporter(t *testing.T) {
	stale := proxyStatus(2, 0, 2, 10) // a new data plane
	stale.State, stale.Stale = gateway.PhaseStale, true
	got := report(t, 0,
		[]gateway.ProxyStatus{proxyStatus(10, 1, 9, 100)},
		[]gateway.ProxyStatus{proxyStatus(15, 2, 13, 150)},
		[]gateway.ProxyStatus{stale})
	if diff := cmp.Diff(map[string]float64{
		"proxy.listener.accepted proxy=gw listener=default":                            17,
		"proxy.listener.refused proxy=gw listener=default reason=no-route":             2,
		"proxy.listener.closed proxy=gw listener=default reason=done":                  15,
		"proxy.cluster.connected proxy=gw cluster=api":                                 15,
		"proxy.cluster.failed proxy=gw cluster=api":                                    1,
		"proxy.cluster.retries proxy=gw cluster=api":                                   2,
		"proxy.cluster.bytes_in proxy=gw cluster=api":                                  160,
		"proxy.cluster.bytes_out proxy=gw cluster=api":                                 320,
		"proxy.cluster.connect_seconds_bucket proxy=gw cluster=api le=0.001":           13,
		"proxy.cluster.connect_seconds_bucket proxy=gw cluster=api le=0.0025":          13,
		"proxy.cluster.connect_seconds_bucket proxy=gw cluster=api le=0.005":           13,
		"proxy.cluster.connect_seconds_bucket proxy=gw cluster=api le=0.01":            13,
		"proxy.cluster.connect_seconds_bucket proxy=gw cluster=api le=0.025":           13,
		"proxy.cluster.connect_seconds_bucket proxy=gw cluster=api le=0.05":            13,
		"proxy.cluster.connect_seconds_bucket proxy=gw cluster=api le=0.1":             13,
		"proxy.cluster.connect_seconds_bucket proxy=gw cluster=api le=0.25":            13,
		"proxy.cluster.connect_seconds_bucket proxy=gw cluster=api le=1":               13,
		"proxy.cluster.connect_seconds_bucket proxy=gw cluster=api le=+Inf":            15,
		"proxy.cluster.connect_seconds_sum proxy=gw cluster=api":                       3.75,
		"proxy.cluster.connect_seconds_count proxy=gw cluster=api":                     15,
		"proxy.endpoint.bytes_in proxy=gw cluster=api endpoint=10.0.0.1:80":            160,
		"proxy.endpoint.bytes_out proxy=gw cluster=api endpoint=10.0.0.1:80":           320,
		"proxy.endpoint.connected proxy=gw cluster=api endpoint=10.0.0.1:80":           15,
		"proxy.endpoint.failed proxy=gw cluster=api endpoint=10.0.0.1:80 reason=reset": 2,
		"proxy.endpoint.failed proxy=gw cluster=api endpoint=10.0.0.1:80 reason=other": 1,
	}, got.counters); diff != "" {
		t.Errorf("counters (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff(map[string]float32{
		"proxy.listener.active proxy=gw listener=default":                 3,
		"proxy.listener.bound proxy=gw listener=default":                  1,
		"proxy.cluster.active proxy=gw cluster=api":                       3,
		"proxy.endpoint.active proxy=gw cluster=api endpoint=10.0.0.1:80": 3,
		"proxy.table.age_seconds proxy=gw":                                1.5,
		"proxy.table.stale proxy=gw":                                      1,
		"proxy.serving proxy=gw":                                          0,
	}, got.gauges); diff != "" {
		t.Errorf("gauges (-want +got):\n%s", diff)
	}
}

func TestReporterExpiry(t *testing.T) {
	var got *reported
	synctest.Test(t, func(t *testing.T) {
		got = &reported{map[string]float64{}, map[string]float32{}}
		r := gateway.Reporter{Sink: got, Status: func() []gateway.ProxyStatus {
			return []gateway.ProxyStatus{{ID: "web", CertificateExpires: time.Now().Add(time.Hour)}}
		}}
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if err := r.Run(ctx); err != nil {
			t.Error(err)
		}
	})
	if v := got.gauges["proxy.certificate.expiry_seconds proxy=web"]; v != 3600 {
		t.Errorf("expiry in %v s, want 3600; gauges %v", v, got.gauges)
	}
	if _, ok := got.gauges["proxy.table.age_seconds proxy=web"]; ok {
		t.Error("a proxy without a table has an age")
	}
}

// TestReporterInmem goes by way of go-metrics to what the API shows.
func TestReporterInmem(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		sink := metrics.NewInmemSink(10*time.Second, time.Minute)
		conf := metrics.DefaultConfig("consul")
		conf.EnableHostname, conf.EnableRuntimeMetrics = false, false
		m, err := metrics.New(conf, sink)
		if err != nil {
			t.Fatal(err)
		}
		defer m.Shutdown()
		r := gateway.Reporter{Sink: m, Status: func() []gateway.ProxyStatus {
			return []gateway.ProxyStatus{proxyStatus(3, 1, 2, 1<<20)}
		}}
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if err := r.Run(ctx); err != nil {
			t.Fatal(err)
		}
		data := sink.Data()
		last := data[len(data)-1]
		c := last.Counters["consul.proxy.cluster.bytes_in;proxy=gw;cluster=api"]
		if c.AggregateSample == nil || c.Sum != 1<<20 {
			t.Errorf("counter %+v, want 1 MiB; there are %v", c, last.Counters)
		}
		if g, ok := last.Gauges["consul.proxy.listener.active;proxy=gw;listener=default"]; !ok || g.Value != 3 {
			t.Errorf("gauge %+v, want 3; there are %v", g, last.Gauges)
		}
	})
}

// TestReporterBounds gives series of their own to the busiest, and loses nothing
// of the others.
func TestReporterBounds(t *testing.T) {
	const n = 50
	status := func(round uint64, busy int) []gateway.ProxyStatus {
		p := gateway.ProxyStatus{ID: "gw", Plane: &gateway.Status{}}
		for i := range n {
			bytes := round * 10
			if i == busy {
				bytes = round * 100_000
			}
			p.Plane.Clusters = append(p.Plane.Clusters, gateway.ClusterStatus{
				Name: fmt.Sprintf("c%02d", i), Connected: round, BytesIn: bytes,
				Endpoints: []gateway.EndpointStatus{{Address: fmt.Sprintf("10.0.0.%d:80", i), Connected: round}},
			})
		}
		return []gateway.ProxyStatus{p}
	}
	got := report(t, 3, status(1, 41), status(2, 41), status(3, 41))
	own, all := map[string]bool{}, 0.0
	endpoints := map[string]bool{}
	for name, v := range got.counters {
		if cluster, ok := strings.CutPrefix(name, "proxy.cluster.connected proxy=gw cluster="); ok {
			own[cluster] = true
			all += v
		}
		if strings.HasPrefix(name, "proxy.endpoint.connected") {
			endpoints[name] = true
		}
	}
	if want := map[string]bool{"c00": true, "c01": true, "c41": true, "other": true}; !cmp.Equal(own, want) {
		t.Errorf("clusters with series %v, want %v", own, want)
	}
	if all != 3*n {
		t.Errorf("%v connections in all, want %d", all, 3*n)
	}
	if len(endpoints) > 3+4 {
		t.Errorf("%d series of endpoints: %v", len(endpoints), endpoints)
	}

	// Another becomes the busiest, and takes the place of an idle one.
	got = report(t, 1, status(1, 0), status(2, 49), status(3, 49))
	if got.counters["proxy.cluster.bytes_in proxy=gw cluster=c49"] == 0 {
		t.Errorf("the busiest cluster has no series: %v", got.counters)
	}
}

// TestMetricsPage compares the manual's page with the list.
func TestMetricsPage(t *testing.T) {
	const page = "../website/metrics.md"
	var b strings.Builder
	b.WriteString(`# Metrics of gateways and sidecars

Generated from the list in gateway/metrics.go; change it there.

Reported every 10 seconds from the status of every proxy, so they cost nothing where bytes are moved. Shown by
` + "`/v1/agent/metrics`, `/v1/agent/metrics?format=prometheus`" + `, statsd and statsite, with ` + "`telemetry.metrics_prefix`" + `
before the name (` + "`consul`" + `); for Prometheus the dots are underscores.

| metric | type | labels | what |
|---|---|---|---|
`)
	for _, m := range gateway.Metrics {
		fmt.Fprintf(&b, "| `%s` | %s | %s | %s |\n", m.Name, m.Type, strings.Join(m.Labels, ", "), m.Help)
	}
	b.WriteString(`
| label | what |
|---|---|
| ` + "`proxy`" + ` | service ID of the gateway or sidecar |
| ` + "`listener`" + ` | name in the forwarding table |
| ` + "`cluster`" + ` | name in the forwarding table: where connections go |
| ` + "`endpoint`" + ` | host:port |
| ` + "`le`" + ` | upper bound of a bucket, in seconds; each has those below it too |
| ` + "`reason`" + ` | why connections were [refused](gateways.md#what-is-refused-and-why), or have ended: ` + "`done`, `reset`, `idle`, `drain`, `failback`, `rebalance`, `removed`, `stopped`" + ` |

The number of series is bounded: the 200 clusters and the 200 endpoints of an agent that have the most traffic have
series of their own. The rest is summed up under ` + "`cluster=\"other\"`" + ` and ` + "`endpoint=\"other\"`" + `, so sums over all are
right. Traffic is bytes, a connection counting as 1000, older traffic for less; who has a series keeps it until another
has twice as much.
`)
	want := b.String()
	if os.Getenv("UPDATE_GOLDEN") != "" {
		if err := os.WriteFile(page, []byte(want), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	got, err := os.ReadFile(page)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, string(got)); diff != "" {
		t.Errorf("%s is not current; run with UPDATE_GOLDEN=1 (-want +got):\n%s", page, diff)
	}
}

func TestTally(t *testing.T) {
	var n gateway.Tally
	if n.Map() != nil {
		t.Error("something was counted")
	}
	for _, r := range []string{gateway.RefuseDenied, gateway.RefuseDenied, gateway.CloseStopped, "new"} {
		n.Add(r)
	}
	if diff := cmp.Diff(map[string]uint64{"denied": 2, "stopped": 1, "other": 1}, n.Map()); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}
