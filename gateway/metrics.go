package gateway

import (
	"cmp"
	"context"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/armon/go-metrics"
)

// Metric describes a metric that a [Reporter] reports.
type Metric struct {
	Name   string // without the prefix of the agent's telemetry
	Type   string // counter or gauge
	Labels []string
	Help   string
}

// The names of the metrics.
const (
	metricAccepted          = "proxy.listener.accepted"
	metricRefused           = "proxy.listener.refused"
	metricClosed            = "proxy.listener.closed"
	metricListenerActive    = "proxy.listener.active"
	metricListenerBound     = "proxy.listener.bound"
	metricConnected         = "proxy.cluster.connected"
	metricFailed            = "proxy.cluster.failed"
	metricRetries           = "proxy.cluster.retries"
	metricBytesIn           = "proxy.cluster.bytes_in"
	metricBytesOut          = "proxy.cluster.bytes_out"
	metricClusterActive     = "proxy.cluster.active"
	metricEndpointConnected = "proxy.endpoint.connected"
	metricEndpointFailed    = "proxy.endpoint.failed"
	metricEndpointBytesIn   = "proxy.endpoint.bytes_in"
	metricEndpointBytesOut  = "proxy.endpoint.bytes_out"
	metricEndpointActive    = "proxy.endpoint.active"
	metricConnectBucket     = "proxy.cluster.connect_seconds_bucket"
	metricConnectSum        = "proxy.cluster.connect_seconds_sum"
	metricConnectCount      = "proxy.cluster.connect_seconds_count"
	metricAge               = "proxy.table.age_seconds"
	metricStale             = "proxy.table.stale"
	metricServing           = "proxy.serving"
	metricExpiry            = "proxy.certificate.expiry_seconds"
)

const (
	counter = "counter"
	gauge   = "gauge"
)

// Metrics are all that a [Reporter] reports.
var Metrics = []Metric{
	{metricAccepted, counter, []string{"proxy", "listener"}, "connections accepted"},
	{metricRefused, counter, []string{"proxy", "listener", "reason"}, "connections closed without reaching an endpoint"},
	{metricClosed, counter, []string{"proxy", "listener", "reason"}, "connections that had reached an endpoint and have ended, by why"},
	{metricListenerActive, gauge, []string{"proxy", "listener"}, "open connections"},
	{metricListenerBound, gauge, []string{"proxy", "listener"}, "1 while the listener accepts, else 0"},
	{metricConnected, counter, []string{"proxy", "cluster"}, "connections that reached an endpoint"},
	{metricFailed, counter, []string{"proxy", "cluster"}, "connections that reached none"},
	{metricRetries, counter, []string{"proxy", "cluster"}, "attempts to connect that were not a connection's first"},
	{metricBytesIn, counter, []string{"proxy", "cluster"}, "bytes from clients to endpoints"},
	{metricBytesOut, counter, []string{"proxy", "cluster"}, "bytes from endpoints to clients"},
	{metricConnectBucket, counter, []string{"proxy", "cluster", "le"}, "gateways: connections that took at most `le` seconds to connect to an endpoint; with the next two a histogram of Prometheus"},
	{metricConnectSum, counter, []string{"proxy", "cluster"}, "seconds that they all took"},
	{metricConnectCount, counter, []string{"proxy", "cluster"}, "how many there were"},
	{metricClusterActive, gauge, []string{"proxy", "cluster"}, "open connections"},
	{metricEndpointConnected, counter, []string{"proxy", "cluster", "endpoint"}, "connections that reached it"},
	{metricEndpointFailed, counter, []string{"proxy", "cluster", "endpoint", "reason"}, "attempts at it that failed, by why"},
	{metricEndpointBytesIn, counter, []string{"proxy", "cluster", "endpoint"}, "bytes from clients to it"},
	{metricEndpointBytesOut, counter, []string{"proxy", "cluster", "endpoint"}, "bytes from it to clients"},
	{metricEndpointActive, gauge, []string{"proxy", "cluster", "endpoint"}, "open connections"},
	{metricAge, gauge, []string{"proxy"}, "time since the forwarding table was last known to be current"},
	{metricStale, gauge, []string{"proxy"}, "1 while newer knowledge than the table cannot be had, else 0"},
	{metricServing, gauge, []string{"proxy"}, "1 while the state is serving, else 0"},
	{metricExpiry, gauge, []string{"proxy"}, "time until the certificate expires, below 0 when it has; sidecars only"},
}

// MetricSink is where metrics go; [metrics.Metrics] is one.
type MetricSink interface {
	IncrCounterWithLabels(key []string, val float32, labels []metrics.Label)
	SetGaugeWithLabels(key []string, val float32, labels []metrics.Label)
}

// MetricOther is the label of all clusters or endpoints together that have no
// series of their own.
const MetricOther = "other"

// Reporter turns the counters of every proxy's status into [Metrics], once in an
// interval, so that nothing is reported where bytes are moved. Its fields must not
// change while Run runs.
type Reporter struct {
	// Status is [Runner.Status].
	Status func() []ProxyStatus
	Sink   MetricSink
	// Interval between reports; 0 means 10 s.
	Interval time.Duration
	// Top bounds the clusters, and besides the endpoints, that have series of their
	// own, those of all proxies together: the ones with the most traffic. The rest
	// is summed under MetricOther. 0 means 200.
	Top int

	// Owned by Run.
	before    map[series]uint64
	clusters  ranking
	endpoints ranking
}

// series is a metric with its labels.
type series struct {
	metric, proxy, listener, cluster, endpoint, reason, le string
}

func compareSeries(a, b series) int {
	return cmp.Or(strings.Compare(a.metric, b.metric), strings.Compare(a.proxy, b.proxy), strings.Compare(a.listener, b.listener),
		strings.Compare(a.cluster, b.cluster), strings.Compare(a.endpoint, b.endpoint), strings.Compare(a.reason, b.reason), strings.Compare(a.le, b.le))
}

// Run reports until ctx ends, the last time then, and returns nil.
func (r *Reporter) Run(ctx context.Context) error {
	tick := time.NewTicker(cmp.Or(r.Interval, 10*time.Second))
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			r.report(time.Now())
			return nil
		case <-tick.C:
			r.report(time.Now())
		}
	}
}

// reading is one round of reading the status.
type reading struct {
	counters map[series]uint64  // since the start of the data plane
	gauges   map[series]float64 // now
}

func (r *Reporter) report(now time.Time) {
	rd := read(r.Status(), now)

	// What was counted since the last time. A counter that has gone back is that of
	// a data plane that was started anew.
	grown := make(map[series]uint64, len(rd.counters))
	clusters, endpoints := map[series]float64{}, map[series]float64{}
	for s, n := range rd.counters {
		d := n
		if was := r.before[s]; was <= n {
			d = n - was
		}
		grown[s] = d
		traffic := float64(d)
		switch s.metric {
		case metricConnected, metricFailed, metricEndpointConnected, metricEndpointFailed:
			traffic *= connectionWeight
		case metricConnectBucket, metricConnectSum, metricConnectCount:
			traffic = 0
		}
		switch {
		case s.endpoint != "":
			endpoints[series{proxy: s.proxy, cluster: s.cluster, endpoint: s.endpoint}] += traffic
		case s.cluster != "":
			clusters[series{proxy: s.proxy, cluster: s.cluster}] += traffic
		}
	}
	r.before = rd.counters
	top := cmp.Or(r.Top, 200)
	r.clusters.update(clusters, top)
	r.endpoints.update(endpoints, top)

	counters, gauges := map[series]float64{}, map[series]float64{}
	for s, n := range grown {
		v := float64(n)
		if s.metric == metricConnectSum {
			v = time.Duration(n).Seconds()
		}
		counters[r.label(s)] += v
	}
	for s, v := range rd.gauges {
		gauges[r.label(s)] += v
	}
	// What did not grow is reported too: sinks that forget what is not reported for
	// a while would begin it again at nothing.
	for _, s := range sortedSeries(counters) {
		r.Sink.IncrCounterWithLabels(s.key(), float32(counters[s]), s.labels())
	}
	for _, s := range sortedSeries(gauges) {
		r.Sink.SetGaugeWithLabels(s.key(), float32(gauges[s]), s.labels())
	}
}

// connectionWeight is how many bytes a connection counts as traffic.
const connectionWeight = 1000

// label returns the series that s is reported as.
func (r *Reporter) label(s series) series {
	if s.endpoint != "" && !r.endpoints.chosen[series{proxy: s.proxy, cluster: s.cluster, endpoint: s.endpoint}] {
		s.endpoint = MetricOther
	}
	if s.cluster != "" && !r.clusters.chosen[series{proxy: s.proxy, cluster: s.cluster}] {
		s.cluster = MetricOther
		if s.endpoint != "" {
			s.endpoint = MetricOther
		}
	}
	return s
}

func (s series) key() []string { return strings.Split(s.metric, ".") }

func (s series) labels() []metrics.Label {
	var out []metrics.Label
	for _, l := range []metrics.Label{
		{Name: "proxy", Value: s.proxy}, {Name: "listener", Value: s.listener}, {Name: "cluster", Value: s.cluster},
		{Name: "endpoint", Value: s.endpoint}, {Name: "reason", Value: s.reason}, {Name: "le", Value: s.le},
	} {
		if l.Value != "" {
			out = append(out, l)
		}
	}
	return out
}

func sortedSeries(m map[series]float64) []series {
	out := make([]series, 0, len(m))
	for s := range m {
		out = append(out, s)
	}
	slices.SortFunc(out, compareSeries)
	return out
}

func read(proxies []ProxyStatus, now time.Time) reading {
	rd := reading{map[series]uint64{}, map[series]float64{}}
	for i := range proxies {
		p := &proxies[i]
		set := func(metric string, v float64) { rd.gauges[series{metric: metric, proxy: p.ID}] = v }
		set(metricStale, truth(p.Stale))
		set(metricServing, truth(p.State == PhaseServing))
		if !p.TableAsOf.IsZero() {
			set(metricAge, time.Duration(p.Age).Seconds())
		}
		if !p.CertificateExpires.IsZero() {
			set(metricExpiry, p.CertificateExpires.Sub(now).Seconds())
		}
		if p.Plane == nil {
			continue
		}
		for _, l := range p.Plane.Listeners {
			s := series{proxy: p.ID, listener: l.Name}
			rd.count(s, metricAccepted, l.Accepted)
			rd.gauge(s, metricListenerActive, float64(l.Active))
			rd.gauge(s, metricListenerBound, truth(l.Bound))
			for reason, n := range l.Refused {
				s.reason = reason
				rd.count(s, metricRefused, n)
			}
			for reason, n := range l.Closed {
				s.reason = reason
				rd.count(s, metricClosed, n)
			}
		}
		for _, c := range p.Plane.Clusters {
			s := series{proxy: p.ID, cluster: c.Name}
			rd.count(s, metricConnected, c.Connected)
			rd.count(s, metricFailed, c.Failed)
			rd.count(s, metricRetries, c.Retries)
			rd.count(s, metricBytesIn, c.BytesIn)
			rd.count(s, metricBytesOut, c.BytesOut)
			rd.gauge(s, metricClusterActive, float64(c.Active))
			rd.countConnects(s, c.ConnectTimes)
			for _, e := range c.Endpoints {
				s.endpoint = e.Address
				rd.count(s, metricEndpointConnected, e.Connected)
				rd.countFailures(s, &e)
				rd.count(s, metricEndpointBytesIn, e.BytesIn)
				rd.count(s, metricEndpointBytesOut, e.BytesOut)
				rd.gauge(s, metricEndpointActive, float64(e.Active))
			}
		}
	}
	return rd
}

func (rd *reading) count(s series, metric string, n uint64) {
	s.metric = metric
	rd.counters[s] = n
}

// countFailures counts those whose reason is not told as other ones, so that the
// sum is right.
func (rd *reading) countFailures(s series, e *EndpointStatus) {
	rest := e.Failed
	for reason, n := range e.Failures {
		if reason != FailOther {
			s.reason = reason
			rd.count(s, metricEndpointFailed, n)
			rest -= min(rest, n)
		}
	}
	if s.reason = FailOther; rest > 0 {
		rd.count(s, metricEndpointFailed, rest)
	}
}

// countConnects counts as Prometheus does: each bucket has those below it too.
func (rd *reading) countConnects(s series, t *ConnectTimes) {
	if t == nil {
		return
	}
	var n uint64
	for i, k := range t.Counts {
		n += k
		s.le = "+Inf"
		if i < len(ConnectBounds) {
			s.le = strconv.FormatFloat(ConnectBounds[i].Seconds(), 'g', -1, 64)
		}
		rd.count(s, metricConnectBucket, n)
	}
	s.le = ""
	rd.count(s, metricConnectSum, uint64(t.Sum))
	rd.count(s, metricConnectCount, n)
}

func (rd *reading) gauge(s series, metric string, v float64) {
	s.metric = metric
	rd.gauges[s] = v
}

func truth(b bool) float64 {
	if b {
		return 1
	}
	return 0
}

// ranking chooses those with the most traffic, old traffic counting for less.
// Who is chosen is replaced only by one with twice as much, so that series do not
// come and go.
type ranking struct {
	score  map[series]float64
	chosen map[series]bool
}

func (r *ranking) update(traffic map[series]float64, most int) {
	const keep = 0.9 // of the score, from one interval to the next
	score := make(map[series]float64, len(traffic))
	names := make([]series, 0, len(traffic))
	for s, n := range traffic {
		score[s] = n + keep*r.score[s]
		names = append(names, s)
	}
	r.score = score
	if len(names) > most {
		rank := func(s series) float64 {
			if r.chosen[s] {
				return 2 * score[s]
			}
			return score[s]
		}
		slices.SortFunc(names, func(a, b series) int { return cmp.Or(cmp.Compare(rank(b), rank(a)), compareSeries(a, b)) })
		names = names[:most]
	}
	r.chosen = make(map[series]bool, len(names))
	for _, s := range names {
		r.chosen[s] = true
	}
}
