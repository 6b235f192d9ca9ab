package httpapi

import (
	"bytes"
	"context"
	"errors"
	"mime"
	"net/http"
	"os"
	"runtime"
	"strconv"
	"strings"
	"time"

	"github.com/hashicorp/serf/serf"
)

func (c *call) agentSelf() (any, error) {
	h := c.h
	stats, meta := h.agent.Self()
	var member any
	for _, m := range h.cluster.LANMembers() {
		if m.Name == h.cfg.NodeName {
			member = m
		}
	}
	debug := map[string]any{}
	if h.cfg.DebugConfig != nil {
		debug = h.cfg.DebugConfig()
	}
	self := map[string]any{
		"Config": map[string]any{
			"Datacenter":        h.cfg.Datacenter,
			"PrimaryDatacenter": h.cfg.PrimaryDatacenter,
			"NodeName":          h.cfg.NodeName,
			"NodeID":            h.cfg.NodeID,
			"Revision":          h.cfg.Revision,
			"Server":            h.isServer(),
			"Version":           h.cfg.Version,
			"BuildDate":         h.buildDate(),
		},
		"DebugConfig": debug,
		"Coord":       h.cluster.Coordinate(h.cfg.NodeName),
		"Member":      member,
		"Stats":       stats,
		"Meta":        meta,
	}
	if h.cfg.GRPCPort > 0 || h.cfg.GRPCTLSPort > 0 {
		port := h.cfg.GRPCTLSPort
		if port <= 0 {
			port = h.cfg.GRPCPort
		}
		self["xDS"] = map[string]any{
			"SupportedProxies": map[string][]string{},
			"Port":             port,
			"Ports":            map[string]int{"Plaintext": h.cfg.GRPCPort, "TLS": h.cfg.GRPCTLSPort},
		}
	}
	return self, nil
}

func (c *call) agentVersion() (any, error) {
	return map[string]string{
		"SHA":          c.h.cfg.Revision,
		"BuildDate":    c.h.buildDate(),
		"HumanVersion": c.h.cfg.Version,
		"FIPS":         "",
	}, nil
}

func (c *call) agentHost() (any, error) {
	hostname, err := os.Hostname()
	errs := []string{}
	if err != nil {
		errs = append(errs, err.Error())
	}
	var mem runtime.MemStats
	runtime.ReadMemStats(&mem)
	return map[string]any{
		"Host": map[string]any{
			"hostname":   hostname,
			"os":         runtime.GOOS,
			"kernelArch": runtime.GOARCH,
			"goVersion":  runtime.Version(),
		},
		"CPU":            map[string]any{"cores": runtime.NumCPU()},
		"Memory":         map[string]any{"process": mem.Sys},
		"Disk":           nil,
		"CollectionTime": time.Now().UnixNano(),
		"Errors":         errs,
	}, nil
}

func (c *call) agentMembers() (any, error) {
	members := c.h.cluster.LANMembers()
	if flag(c.query.Get("wan")) {
		members = c.h.cluster.WANMembers()
	}
	if members == nil {
		members = []serf.Member{}
	}
	return filtered(c.opts.filter, members)
}

// flag says whether a parameter such as ?wan=1 is set.
func flag(v string) bool {
	on, err := strconv.ParseBool(v)
	return err == nil && on
}

func (c *call) agentMetrics() (any, error) {
	if c.query.Get("format") == "prometheus" || acceptsPrometheus(c.r.Header) {
		if c.h.cfg.Prometheus == nil {
			c.w.Header().Set("X-Consul-Reason", "Prometheus is not enabled since its retention time is not positive")
			return raw{}, nil
		}
		c.h.cfg.Prometheus.ServeHTTP(c.w, c.r)
		return written{}, nil
	}
	if c.h.cfg.Metrics == nil {
		return map[string]any{
			"Timestamp": "", "Gauges": []any{}, "Points": []any{}, "Counters": []any{}, "Samples": []any{},
		}, nil
	}
	return c.h.cfg.Metrics(c.w, c.r)
}

func acceptsPrometheus(header http.Header) bool {
	for part := range strings.SplitSeq(header.Get("Accept"), ",") {
		kind, params, err := mime.ParseMediaType(strings.TrimSpace(part))
		if err == nil && (kind == "application/openmetrics-text" || kind == "text/plain" && params["version"] == "0.4.0") {
			return true
		}
	}
	return false
}

// What changes the process goes on when the client goes away: nobody wants half
// of it.
func (c *call) agentReload() (any, error) {
	return nil, c.h.agent.Reload(context.WithoutCancel(c.ctx()))
}

func (c *call) agentLeave() (any, error) {
	return nil, c.h.agent.Leave(context.WithoutCancel(c.ctx()))
}

func (c *call) agentJoin() (any, error) {
	wan := flag(c.query.Get("wan"))
	if wan && c.h.cfg.WANFederationViaGateways {
		return nil, status(http.StatusInternalServerError, "WAN join is disabled when wan federation via mesh gateways is enabled")
	}
	if c.param("address") == "" {
		return nil, bad("Missing address")
	}
	_, err := c.h.cluster.Join([]string{c.param("address")}, wan)
	return nil, err
}

func (c *call) agentForceLeave() (any, error) {
	_, prune := c.query["prune"]
	_, wan := c.query["wan"]
	return nil, c.h.cluster.ForceLeave(c.param("node"), prune, wan)
}

func (c *call) agentMaintenance() (any, error) {
	enable, err := c.enable()
	if err != nil {
		return nil, err
	}
	return nil, c.h.agent.NodeMaintenance(c.ctx(), enable, c.query.Get("reason"), c.token())
}

// enable reads the parameter that maintenance is turned on or off with.
func (c *call) enable() (bool, error) {
	v := c.query.Get("enable")
	if v == "" {
		return false, bad("Missing value for enable")
	}
	on, err := strconv.ParseBool(v)
	if err != nil {
		return false, bad("Invalid value for enable: %q", v)
	}
	return on, nil
}

func (c *call) agentProxies() (any, error) { return c.h.agent.Proxies(), nil }

func (c *call) agentProxy() (any, error) {
	if p, ok := c.h.agent.Proxies()[c.param("id")]; ok {
		return p, nil
	}
	return nil, c.unknownProxy()
}

func (c *call) agentProxyTable() (any, error) {
	table, found := c.h.agent.ProxyTable(c.param("id"))
	switch {
	case !found:
		return nil, c.unknownProxy()
	case table == nil:
		return nil, status(http.StatusNotFound, "proxy %q has no forwarding table yet", c.param("id"))
	}
	return table, nil
}

// How many connections are listed, and how many may be asked for.
const defaultConnections, maxConnections = 1000, 100_000

func (c *call) agentProxyConnections() (any, error) {
	limit := defaultConnections
	if v := c.query.Get("limit"); v != "" {
		n, err := strconv.Atoi(v)
		if err != nil || n < 1 || n > maxConnections {
			return nil, bad("Invalid value for limit: %q is not from 1 to %d", v, maxConnections)
		}
		limit = n
	}
	list, err := c.h.agent.Connections(c.param("id"), limit)
	return list, c.proxyError(err)
}

func (c *call) agentProxyDrain() (any, error) {
	var body struct {
		Wait, Timeout string
		Rate          *float64
	}
	if len(bytes.TrimSpace(c.body)) > 0 {
		if err := c.decodeBody(&body); err != nil {
			return nil, err
		}
	}
	req := DrainRequest{Rate: body.Rate}
	for _, f := range []struct {
		name, text string
		to         **time.Duration
	}{{"Wait", body.Wait, &req.Wait}, {"Timeout", body.Timeout, &req.Timeout}} {
		if f.text == "" {
			continue
		}
		d, err := time.ParseDuration(f.text)
		if err != nil || d < 0 {
			return nil, bad("Invalid value for %s: %q is no duration from 0 on", f.name, f.text)
		}
		*f.to = &d
	}
	if r := req.Rate; r != nil && *r < 0 {
		return nil, bad("Invalid value for Rate: %v is less than 0", *r)
	}
	// It goes on when the client goes away; that is what taking it back is for.
	if err := c.h.agent.DrainProxy(context.WithoutCancel(c.ctx()), c.param("id"), req, c.token()); err != nil {
		return nil, c.proxyError(err)
	}
	return c.agentProxyDrainProgress()
}

func (c *call) agentProxyDrainProgress() (any, error) {
	p, err := c.h.agent.DrainProgress(c.param("id"))
	return p, c.proxyError(err)
}

func (c *call) agentProxyDrainCancel() (any, error) {
	return nil, c.proxyError(c.h.agent.CancelDrain(c.ctx(), c.param("id")))
}

// proxyError names the proxy that there is not.
func (c *call) proxyError(err error) error {
	if errors.Is(err, ErrNoProxy) {
		return c.unknownProxy()
	}
	return err
}

func (c *call) unknownProxy() error {
	return status(http.StatusNotFound, "unknown proxy service ID: %s", c.param("id"))
}

func (c *call) aclDisabled() (any, error) {
	return nil, status(http.StatusUnauthorized, textACLDisabled)
}
