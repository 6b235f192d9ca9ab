package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"slices"
	"time"

	"github.com/sluicemesh/sluice/gateway"
	"github.com/sluicemesh/sluice/gateway/sni"
)

// featuresText tells of [featured] and of the flags beside it, in the report.
const featuresText = "`sluice` and `sluice-netpoll` have every feature on: limits of connections and their rates for listeners, names and\n" +
	"sources; the PROXY protocol accepted from the clients' network; idle timeouts and keepalive; least connections among\n" +
	"endpoints with weights, zones, priorities and failover; ejection, and a probe of every endpoint; open connections moved\n" +
	"back and apart; congestion control set for each connection; an access log of one in a hundred; metrics, status and open\n" +
	"connections, all asked for every second, but not while memory is measured. No limit is reached. `sluice-plain` has the defaults.\n" +
	"`floor` is a C program that forwards without a look at what: it makes the same system calls, and has no names, timers,\n" +
	"limits, counts or logs.\n"

// The zones of the endpoints; the forwarder is in the first.
var zones = []string{"eu/a", "eu/a", "eu/b", "us/a"}

// featured is the table of a routes file with everything on that a table can say:
// beside its own endpoints, each cluster has some that are others' own, so that
// there is something to choose among. Those at secure are alone: they speak TLS.
func featured(listen string, routes []byte, secure string) (*gateway.Table, error) {
	set, err := sni.ParseRoutes(bytes.NewReader(routes))
	if err != nil {
		return nil, err
	}
	t := sni.StaticTable([]string{listen}, set)
	t.Zone = zones[0]
	t.Failback = &gateway.Failback{Stable: 30 * time.Second, Rate: 10}
	t.Rebalance = &gateway.Rebalance{Stable: 30 * time.Second, Rate: 10, Factor: 2, MinConnections: 1000}
	for i := range t.Listeners {
		l := &t.Listeners[i]
		l.MaxConnections, l.IdleTimeout, l.CongestionControl = 1e6, 10*time.Minute, "reno"
		l.Limits = &gateway.Limits{
			ConnectionRate: 1e6, ConnectionBurst: 1e6, MaxPendingHellos: 4096,
			MaxConnectionsPerSource: 1e5, ConnectionRatePerSource: 1e5, ConnectionBurstPerSource: 1e5,
		}
		l.ProxyProtocol = &gateway.ProxyProtocol{Accept: gateway.ProxyOptional, Trusted: []string{sourceNetwork}}
	}
	var all []gateway.Endpoint
	for i := range t.Clusters {
		for _, e := range t.Clusters[i].Endpoints {
			if t.Clusters[i].Name != secure && !slices.ContainsFunc(all, func(o gateway.Endpoint) bool { return o.Address == e.Address && o.Port == e.Port }) {
				all = append(all, e)
			}
		}
	}
	for i := range t.Clusters {
		c := &t.Clusters[i]
		c.MaxConnections, c.ConnectionRate, c.ConnectionBurst, c.CongestionControl = 1e6, 1e6, 1e6, "reno"
		c.Keepalive = &gateway.Keepalive{Idle: time.Minute, Interval: 15 * time.Second, Probes: 4}
		if c.Name == secure {
			continue
		}
		c.Probe = &gateway.Probe{Interval: 5 * time.Second, Timeout: 2 * time.Second, All: true}
		if next := t.Clusters[(i+1)%len(t.Clusters)].Name; next != secure && next != c.Name {
			c.Failover = []string{next}
		}
		own := c.Endpoints[0]
		at := slices.IndexFunc(all, func(e gateway.Endpoint) bool { return e.Address == own.Address && e.Port == own.Port })
		for j := 1; len(c.Endpoints) < min(len(zones), len(all)) && j < len(all); j++ {
			if e := all[(at+j)%len(all)]; !slices.Contains(c.Endpoints, e) {
				c.Endpoints = append(c.Endpoints, e)
			}
		}
		for j := range c.Endpoints {
			e := &c.Endpoints[j]
			e.Zone, e.Weight = zones[min(j, len(zones)-1)], 1
			if j == 0 {
				e.Weight = 2
			}
			if j == len(zones)-1 {
				e.Priority = 1
			}
		}
	}
	if err := t.Check(); err != nil {
		return nil, fmt.Errorf("make table: %w", err)
	}
	return t, nil
}

// tableFile is [featured] without the routes, as `sluice forward` reads it beside
// their file.
func tableFile(listen string, routes []byte, secure string) ([]byte, error) {
	t, err := featured(listen, routes, secure)
	if err != nil {
		return nil, err
	}
	t.Routes = nil
	return json.Marshal(t)
}
