// Package telemetry is where metrics go: to memory for the API, and to Prometheus
// and statsd where they are configured. Raft, serf and memberlist report to the
// global sink of go-metrics, so that is the one sink of all.
package telemetry

import (
	"context"
	"fmt"
	"net/http"
	"time"

	"github.com/armon/go-metrics"
	armonprom "github.com/armon/go-metrics/prometheus"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/sluicemesh/sluice/agent/config"
)

// Interval is how long the metrics of one display are collected, and how often
// those of the proxies are reported.
const Interval = 10 * time.Second

// Telemetry is the sinks of a process. There can be one at a time.
type Telemetry struct {
	memory   *metrics.InmemSink   // nil where it is off
	registry *prometheus.Registry // nil where it is off
	global   *metrics.Metrics
}

// Open makes the sinks that c names, and reports to them whatever is reported to the
// global sink of go-metrics. With display they are kept in memory, too, for
// [Telemetry.Display]. [Telemetry.Close] ends it.
func Open(c config.Telemetry, display bool) (*Telemetry, error) {
	const retain = time.Minute
	t := &Telemetry{}
	var sinks metrics.FanoutSink
	if display {
		t.memory = metrics.NewInmemSink(Interval, retain)
		sinks = append(sinks, t.memory)
	}
	if c.PrometheusRetention > 0 {
		t.registry = prometheus.NewRegistry()
		s, err := armonprom.NewPrometheusSinkFrom(armonprom.PrometheusOpts{Expiration: c.PrometheusRetention, Registerer: t.registry})
		if err != nil {
			return nil, fmt.Errorf("open telemetry: %w", err)
		}
		sinks = append(sinks, s)
	}
	if c.StatsdAddr != "" {
		s, err := metrics.NewStatsdSink(c.StatsdAddr)
		if err != nil {
			return nil, fmt.Errorf("open telemetry.statsd_address: %w", err)
		}
		sinks = append(sinks, s)
	}
	if c.StatsiteAddr != "" {
		s, err := metrics.NewStatsiteSink(c.StatsiteAddr)
		if err != nil {
			return nil, fmt.Errorf("open telemetry.statsite_address: %w", err)
		}
		sinks = append(sinks, s)
	}
	conf := metrics.DefaultConfig(c.Prefix)
	conf.EnableHostname = !c.DisableHostname
	conf.EnableRuntimeMetrics = false // its goroutine could never be stopped: see Run
	conf.AllowedPrefixes, conf.BlockedPrefixes, conf.FilterDefault = c.AllowedPrefixes, c.BlockedPrefixes, c.FilterDefault
	global, err := metrics.NewGlobal(conf, sinks)
	if err != nil {
		return nil, fmt.Errorf("open telemetry: %w", err)
	}
	t.global = global
	return t, nil
}

// Sink is what to report to.
func (t *Telemetry) Sink() *metrics.Metrics { return t.global }

// Display serves /v1/agent/metrics. It must not be called where it was not asked for.
func (t *Telemetry) Display(w http.ResponseWriter, r *http.Request) (any, error) {
	return t.memory.DisplayMetrics(w, r)
}

// Prometheus serves the same in Prometheus' format; nil where it is off.
func (t *Telemetry) Prometheus() http.Handler {
	if t.registry == nil {
		return nil
	}
	return promhttp.HandlerFor(t.registry, promhttp.HandlerOpts{})
}

// Run reports on the Go runtime until ctx ends, and returns nil.
func (t *Telemetry) Run(ctx context.Context) error {
	tick := time.NewTicker(Interval)
	defer tick.Stop()
	for {
		t.global.EmitRuntimeStats()
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

// Close ends it; nothing may be reported after.
func (t *Telemetry) Close() { t.global.Shutdown() }
