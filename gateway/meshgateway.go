package gateway

import (
	"cmp"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/hashicorp/consul/api"

	"github.com/sluicemesh/sluice/agent/catalog"
	"github.com/sluicemesh/sluice/agent/configentry"
	"github.com/sluicemesh/sluice/agent/connect"
	"github.com/sluicemesh/sluice/proxycfg"
)

// meshEnv is what the routes to a service depend on besides the service.
type meshEnv struct {
	datacenter, trustDomain string
	connectTimeout          time.Duration
	// answerTimeout is that of services here, and answerTimeoutWAN that of gateways
	// of other datacenters. 0 is the data plane's.
	answerTimeout, answerTimeoutWAN time.Duration
	maxConnections                  int
	connectionRate                  float64
	connectionBurst                 int
	// sendProxy goes to gateways of other datacenters, and sendProxyLocal to the
	// instances of services here.
	sendProxy, sendProxyLocal ProxyVersion
	congestion                string // of TCP inside the datacenter
}

// farther is by how much a gateway waits longer for another datacenter's gateway
// than that waits for its endpoints: the one that is closer to what is silent is to
// be the one that asks another.
const farther = 2 * time.Second

// answerTimeouts are those for services here and for gateways of other datacenters.
func answerTimeouts(conf *settings) (near, far time.Duration) {
	switch n := conf.int(0, "answer_timeout_ms"); {
	case n < 0:
		return -1, -1
	case n > 0:
		near = time.Duration(n) * time.Millisecond
	}
	return near, cmp.Or(near, DefaultAnswerTimeout) + farther
}

// limit sets the bounds that are the same for every cluster.
func (e *meshEnv) limit(cl *Cluster) {
	cl.MaxConnections, cl.ConnectionRate, cl.ConnectionBurst = e.maxConnections, e.connectionRate, e.connectionBurst
}

// serviceMemo is what was made of one service, and what of.
type serviceMemo struct {
	service  proxycfg.GatewayService
	clusters []Cluster
	warnings []string
}

// current says that s is what the memo was made of. Instances are compared by
// identity: records are never written to, so those that are the same are equal.
// Indexes would not do, because a datacenter that was set up anew counts anew.
func (m *serviceMemo) current(s *proxycfg.GatewayService) bool {
	if m.service.Index != s.Index || m.service.Resolver != s.Resolver || len(m.service.Instances) != len(s.Instances) {
		return false
	}
	return len(s.Instances) > 0 && &m.service.Instances[0] == &s.Instances[0] ||
		slices.EqualFunc(m.service.Instances, s.Instances, func(a, b *catalog.Instance) bool {
			return a == b || a.Node == b.Node && a.Service == b.Service && slices.Equal(a.Checks, b.Checks)
		})
}

// meshGateway fills in the table of a mesh gateway.
//
// The bare name of a datacenter ("dc2.internal.…") gets no route: nobody dials
// it. COMPAT: Consul forwards it, because its cluster happens to have that name.
func (c *Compiler) meshGateway(t *Table, s *proxycfg.Snapshot) {
	reg := s.Proxy.Service
	conf := &settings{}
	if reg.Proxy != nil {
		conf.values = reg.Proxy.Config
	}
	own := Origin{Object: "registration/" + reg.ID, Datacenter: t.Datacenter, Index: reg.ModifyIndex}

	env := meshEnv{
		datacenter:     t.Datacenter,
		trustDomain:    s.TrustDomain,
		connectTimeout: conf.milliseconds(DefaultConnectTimeout, "connect_timeout_ms"),
	}
	env.answerTimeout, env.answerTimeoutWAN = answerTimeouts(conf)
	t.Zone = zoneOf(reg, s.Proxy.Node)
	limits, done := conf.section("service_limits")
	env.maxConnections = cmp.Or(limits.count(0, "max_connections"), maxConnections(s.Gateway.Defaults))
	env.connectionRate, env.connectionBurst = limits.perSecond("connection_rate"), limits.count(0, "connection_burst")
	done()
	var accept *ProxyProtocol
	accept, env.sendProxy, env.sendProxyLocal = proxyProtocol(conf)
	env.congestion = conf.string("congestion_control")
	gatewayListeners(t, reg, conf, Listener{
		ProxyProtocol:     accept,
		IdleTimeout:       conf.milliseconds(0, "idle_timeout_ms"),
		CongestionControl: env.congestion,
		Origin:            own,
	})
	var keepalive *Keepalive
	if conf.bool("envoy_gateway_remote_tcp_enable_keepalive") {
		keepalive = &Keepalive{
			Idle:     seconds(conf.int(0, "envoy_gateway_remote_tcp_keepalive_time")),
			Interval: seconds(conf.int(0, "envoy_gateway_remote_tcp_keepalive_interval")),
			Probes:   max(0, conf.int(0, "envoy_gateway_remote_tcp_keepalive_probes")),
		}
	}

	if c.env != env {
		c.env, c.services = env, nil
	}
	memos := make(map[catalog.ServiceName]*serviceMemo, len(s.Gateway.Services))
	spelled := make(map[string]string, len(s.Gateway.Services))
	t.Clusters = make([]Cluster, 0, len(s.Gateway.Services)+len(s.Gateway.Datacenters))
	t.Routes = make([]Route, 0, cap(t.Clusters))
	add := func(svc *proxycfg.GatewayService) {
		m := c.services[svc.Name]
		if m == nil || !m.current(svc) {
			m = compileService(svc, env)
		}
		memos[svc.Name] = m
		t.Warnings = append(t.Warnings, m.warnings...)
		for _, cl := range m.clusters {
			if other, ok := spelled[cl.Name]; ok {
				t.warn("service %s: its server name %s is that of service %s, which has it", svc.Name, cl.Name, other)
				continue
			}
			spelled[cl.Name] = svc.Name.String()
			t.Clusters = append(t.Clusters, cl)
			t.Routes = append(t.Routes, Route{Match: cl.Name, Cluster: cl.Name, Origin: cl.Origin})
		}
	}
	// Server names have no letter case, names of services have. Where two claim
	// one name it is that of the service that is spelled like it.
	var odd []*proxycfg.GatewayService
	for i := range s.Gateway.Services {
		if svc := &s.Gateway.Services[i]; strings.ToLower(svc.Name.Name) == svc.Name.Name {
			add(svc)
		} else {
			odd = append(odd, svc)
		}
	}
	for _, svc := range odd {
		add(svc)
	}
	c.services = memos
	t.Failback, t.Rebalance = moving(conf)

	probe := probing(conf)
	for _, dc := range s.Gateway.Datacenters {
		if dc.Name == t.Datacenter || len(dc.Gateways) == 0 {
			continue
		}
		name := strings.ToLower(connect.DatacenterSNI(dc.Name, s.TrustDomain))
		origin := Origin{Object: "mesh-gateways/" + dc.Name, Datacenter: dc.Name, Index: newest(dc.Gateways)}
		cl := Cluster{
			Name: name,
			// COMPAT: hostnames are used beside IP addresses, and the health of each
			// gateway counts; Consul drops IP addresses where there is a hostname.
			Endpoints:      endpoints(dc.Gateways, dc.Name, true, false),
			ConnectTimeout: env.connectTimeout,
			AnswerTimeout:  env.answerTimeoutWAN,
			Keepalive:      keepalive,
			SendProxy:      env.sendProxy,
			Probe:          probe,
			Origin:         origin,
		}
		env.limit(&cl)
		t.Clusters = append(t.Clusters, cl)
		t.Routes = append(t.Routes, Route{Match: "*." + name, Cluster: name, Origin: origin})
		if why := allUnhealthy(cl.Endpoints); why != "" {
			t.warn("datacenter %s: none of its %d gateways is healthy (%s)", dc.Name, len(cl.Endpoints), why)
		}
	}
	if s.Gateway.CarriesServers {
		servers(t, s, env, keepalive)
	}
	t.Warnings = append(t.Warnings, conf.warnings()...)
}

// servers adds the routes of the servers' own traffic:
// to any server of another datacenter through its gateways, to each of this
// one's directly. Their health plays no part: a server that its checks call dead
// is one that others must be able to reach to find out.
func servers(t *Table, s *proxycfg.Snapshot, env meshEnv, keepalive *Keepalive) {
	add := func(cl Cluster, matches ...string) {
		env.limit(&cl)
		for _, m := range matches {
			t.Routes = append(t.Routes, Route{Match: m, Cluster: cl.Name, Origin: cl.Origin})
		}
		t.Clusters = append(t.Clusters, cl)
	}
	domain := cmp.Or(s.Proxy.Domain, "consul")
	for _, dc := range s.Gateway.Datacenters {
		name := strings.ToLower(connect.ServerSNI("", dc.Name, domain))
		add(Cluster{
			Name:           name,
			Endpoints:      endpoints(dc.Gateways, dc.Name, true, false),
			ConnectTimeout: env.connectTimeout,
			AnswerTimeout:  env.answerTimeoutWAN,
			Keepalive:      keepalive,
			SendProxy:      env.sendProxy,
			Origin:         Origin{Object: "mesh-gateways/" + dc.Name, Datacenter: dc.Name, Index: newest(dc.Gateways)},
		}, name, "*."+name)
	}
	all := Cluster{
		Name:              strings.ToLower(connect.ServerSNI("", t.Datacenter, domain)),
		ConnectTimeout:    env.connectTimeout,
		AnswerTimeout:     env.answerTimeout,
		CongestionControl: env.congestion,
		Origin:            Origin{Object: "service/consul", Datacenter: t.Datacenter, Index: newest(s.Gateway.Servers)},
	}
	all.Endpoints = endpoints(s.Gateway.Servers, t.Datacenter, false, false)
	seen := make(map[string]bool)
	for i := range all.Endpoints {
		e := &all.Endpoints[i]
		e.Healthy, e.Why = true, ""
		one := all
		one.Name = strings.ToLower(connect.ServerSNI(e.Node, t.Datacenter, domain))
		one.Endpoints = []Endpoint{*e}
		if !seen[one.Name] {
			seen[one.Name] = true
			add(one, one.Name)
		}
	}
	if len(all.Endpoints) == 0 {
		t.warn("datacenter %s: no server is known, so that none can be reached through this gateway", t.Datacenter)
	}
	add(all, all.Name)
}

func seconds(n int) time.Duration { return time.Duration(max(0, n)) * time.Second }

func maxConnections(defaults *api.ServiceConfigEntry) int {
	if defaults == nil || defaults.UpstreamConfig == nil || defaults.UpstreamConfig.Defaults == nil {
		return 0
	}
	l := defaults.UpstreamConfig.Defaults.Limits
	if l == nil || l.MaxConnections == nil {
		return 0
	}
	return max(0, *l.MaxConnections)
}

// gatewayListeners adds the listeners of a gateway. All of them do the same, as in
// model; an address that an earlier name has is left out.
func gatewayListeners(t *Table, reg *catalog.Service, conf *settings, model Listener) {
	type bind struct {
		name, host string
		port       int
	}
	var binds []bind
	if !conf.bool("envoy_gateway_no_default_bind", "envoy_mesh_gateway_no_default_bind") {
		binds = append(binds, bind{"default", cmp.Or(reg.Address, "0.0.0.0"), reg.Port})
	}
	if conf.bool("envoy_gateway_bind_tagged_addresses", "envoy_mesh_gateway_bind_tagged_addresses") {
		for name, a := range reg.TaggedAddresses {
			binds = append(binds, bind{name, cmp.Or(a.Address, "127.0.0.1"), a.Port})
		}
	}
	for name, m := range conf.maps("envoy_gateway_bind_addresses", "envoy_mesh_gateway_bind_addresses") {
		a := &settings{values: m}
		host, port := a.string("address"), a.int(0, "port")
		for _, w := range a.warnings() {
			t.warn("bind address %q: %s", name, w)
		}
		binds = append(binds, bind{name, cmp.Or(host, "127.0.0.1"), port})
	}
	slices.SortFunc(binds, func(a, b bind) int {
		return cmp.Or(cmp.Compare(a.name, b.name), cmp.Compare(hostPort(a.host, a.port), hostPort(b.host, b.port)))
	})
	model.Network, model.Mode = "tcp", ListenSNI
	model.Limits, model.MaxConnections = listenerLimits(conf)
	taken := make(map[string]bool)
	for _, b := range binds {
		address := hostPort(b.host, b.port)
		if b.port < 1 || b.port > 65535 {
			t.warn("listener %s: %d is no port to listen on", b.name, b.port)
			continue
		}
		if taken[address] {
			continue
		}
		taken[address] = true
		l := model
		l.Name, l.Address = b.name+":"+address, address
		if b.name == "wan" {
			l.CongestionControl = "" // those who come here are far away
		}
		t.Listeners = append(t.Listeners, l)
	}
	if len(t.Listeners) == 0 {
		t.warn("nothing is listened on: the default bind is off and no other address is given")
	}
}

// listenerLimits are the bounds of each listener; nil is none.
func listenerLimits(conf *settings) (l *Limits, maxConnections int) {
	s, done := conf.section("limits")
	defer done()
	l = &Limits{
		ConnectionRate:           s.perSecond("connection_rate"),
		ConnectionBurst:          s.count(0, "connection_burst"),
		MaxConnectionsPerSource:  s.count(0, "max_connections_per_source"),
		ConnectionRatePerSource:  s.perSecond("connection_rate_per_source"),
		ConnectionBurstPerSource: s.count(0, "connection_burst_per_source"),
		MaxPendingHellos:         s.count(0, "max_pending_hellos"),
	}
	if *l == (Limits{}) {
		l = nil
	}
	return l, s.count(0, "max_connections")
}

// probing reads whether gateways of other datacenters are probed; nil is not.
func probing(conf *settings) *Probe {
	if _, ok := conf.block("probe"); !ok {
		return nil
	}
	s, done := conf.section("probe")
	defer done()
	return &Probe{
		Interval: s.duration(10*time.Second, "interval"),
		Timeout:  s.duration(2*time.Second, "timeout"),
		All:      s.oneOf("endpoints", "failing", "all") == "all",
	}
}

// moving reads whether connections that are open are ended so that their clients come
// to better endpoints; nil is not.
func moving(conf *settings) (back *Failback, balance *Rebalance) {
	const defaultStable, defaultRate = 30 * time.Second, 10
	if _, ok := conf.block("failback"); ok {
		s, done := conf.section("failback")
		back = &Failback{
			Stable: s.duration(defaultStable, "stable"),
			Rate:   cmp.Or(s.perSecond("rate"), defaultRate),
		}
		done()
	}
	if _, ok := conf.block("rebalance"); ok {
		s, done := conf.section("rebalance")
		balance = &Rebalance{
			Stable:         s.duration(defaultStable, "stable"),
			Rate:           cmp.Or(s.perSecond("rate"), defaultRate),
			Factor:         s.factor(1.25, "factor"),
			MinConnections: s.count(50, "min_connections"),
		}
		done()
	}
	return back, balance
}

// proxyProtocol reads whose headers are believed, nil for nobody's, and which are
// sent to other gateways and to instances of services.
func proxyProtocol(conf *settings) (accept *ProxyProtocol, send, sendLocal ProxyVersion) {
	s, done := conf.section("proxy_protocol")
	defer done()
	version := func(key string) ProxyVersion {
		if v := s.oneOf(key, "off", string(ProxyV1), string(ProxyV2)); v != "off" {
			return ProxyVersion(v)
		}
		return ""
	}
	send, sendLocal = version("send"), version("send_to_services")
	a := &ProxyProtocol{Accept: ProxyAccept(s.oneOf("accept", "off", string(ProxyOptional), string(ProxyStrict)))}
	for _, text := range s.strings("trusted") {
		p, err := netip.ParsePrefix(text)
		if ip, ipErr := netip.ParseAddr(text); ipErr == nil {
			p, err = ip.Prefix(ip.BitLen())
		}
		if err != nil {
			s.reject("trusted", text, "an address or a network")
			continue
		}
		a.Trusted = append(a.Trusted, p.Masked().String())
	}
	if a.Accept == "" || a.Accept == "off" {
		return nil, send, sendLocal
	}
	if len(a.Trusted) == 0 {
		s.bad = append(s.bad, fmt.Sprintf("accept is %s, and no network is trusted: no header is believed", a.Accept))
	}
	return a, send, sendLocal
}

// compileService makes the clusters of a local service: one for the service, one
// for each subset.
func compileService(s *proxycfg.GatewayService, env meshEnv) *serviceMemo {
	m := &serviceMemo{service: *s}
	warn := func(text string) { m.warnings = append(m.warnings, "service "+s.Name.String()+": "+text) }
	base := Cluster{
		ConnectTimeout: env.connectTimeout,
		AnswerTimeout:  env.answerTimeout,
		Origin:         Origin{Object: "service/" + s.Name.String(), Datacenter: env.datacenter, Index: s.Index},
	}
	env.limit(&base)
	base.SendProxy, base.CongestionControl = env.sendProxyLocal, env.congestion
	for _, inst := range s.Instances {
		if host, _ := catalog.LANAddress(inst); isHostname(host) {
			warn("instance " + inst.Service.ID + " on " + inst.Node.Node + " has the hostname " + host + " as its address, which is resolved here")
		}
	}
	add := func(subset string, def api.ServiceResolverSubset, cl Cluster) {
		instances, err := matching(s.Instances, def.Filter)
		if err != nil {
			warn("subset " + cmp.Or(subset, s.Resolver.DefaultSubset) + ": " + err.Error())
		}
		cl.Name = strings.ToLower(connect.ServiceSNI(subset, s.Name, env.datacenter, env.trustDomain))
		cl.Endpoints = endpoints(instances, env.datacenter, false, def.OnlyPassing)
		m.clusters = append(m.clusters, cl)
	}
	r := s.Resolver
	if r == nil {
		add("", api.ServiceResolverSubset{}, base)
		return m
	}
	if r.ConnectTimeout > 0 {
		base.ConnectTimeout = r.ConnectTimeout
	}
	// COMPAT: policies that hash are left out, as Consul does at a gateway.
	base.Policy, _ = policy(r.LoadBalancer)
	ofResolver := base
	ofResolver.Origin.Object = "config/" + configentry.ServiceResolver + "/" + s.Name.String()
	if def, ok := r.Subsets[r.DefaultSubset]; ok {
		add("", def, ofResolver)
	} else {
		add("", api.ServiceResolverSubset{}, base)
	}
	for _, name := range slices.Sorted(maps.Keys(r.Subsets)) {
		add(name, r.Subsets[name], ofResolver)
	}
	return m
}

func newest(instances []*catalog.Instance) uint64 {
	var index uint64
	for _, inst := range instances {
		index = max(index, inst.Service.ModifyIndex)
	}
	return index
}

// allUnhealthy says why, when there are endpoints and none is healthy.
func allUnhealthy(es []Endpoint) string {
	var why []string
	for _, e := range es {
		if e.Healthy {
			return ""
		}
		why = append(why, cmp.Or(e.Why, "unhealthy"))
	}
	slices.Sort(why)
	return strings.Join(slices.Compact(why), "; ")
}
