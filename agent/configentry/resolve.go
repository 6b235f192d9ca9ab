package configentry

import (
	"maps"
	"slices"
	"strings"

	"github.com/hashicorp/consul/api"

	"github.com/sluicemesh/sluice/agent/catalog"
)

// Keys of opaque proxy configuration that central configuration sets.
const (
	keyProtocol    = "protocol"
	keyMeshGateway = "mesh_gateway"
)

// Origins of a mode that do not name a service.
const (
	FromUpstream        = "upstream"
	FromInstance        = "service instance"
	FromProxyDefaults   = "proxy-defaults/global"
	fromServiceDefaults = "service-defaults/"
)

// Resolved is what central configuration says about one registered proxy.
type Resolved struct {
	// Name is the service whose service-defaults apply: a sidecar's destination,
	// a gateway's own name.
	Name catalog.ServiceName
	// ProxyConfig is proxy-defaults' Config with the settings of service-defaults
	// folded in.
	ProxyConfig map[string]any
	// MeshGateway is the mode of the whole proxy without its registration's, and
	// MeshGatewayFrom the entry that said so.
	MeshGateway      api.MeshGatewayConfig
	MeshGatewayFrom  string
	Mode             api.ProxyMode
	TransparentProxy api.TransparentProxyConfig
	MutualTLSMode    api.MutualTLSMode
	Expose           api.ExposeConfig
	AccessLogs       api.AccessLogsConfig
	EnvoyExtensions  []api.EnvoyExtension
	Meta             map[string]string

	defaults *api.ServiceConfigEntry // the caller's; nil where there is none
	proxy    *api.ProxyConfigEntry
	// protocols are those of the upstreams' services, by name.
	protocols map[string]string
}

// UpstreamMode is the mesh gateway mode of one upstream of a merged
// registration, and what decided it: "upstream", "service-defaults/web override
// for api", "service instance", "service-defaults/web upstream defaults",
// "service-defaults/web" or "proxy-defaults/global". Both are empty where
// nothing sets a mode.
type UpstreamMode struct {
	Mode api.MeshGatewayMode
	From string
}

// ResolveService reads the central configuration of a registered proxy or
// gateway. For any other service the result is empty, as nothing is merged into
// those.
func ResolveService(get Get, reg *catalog.Service) (*Resolved, error) {
	r := &Resolved{ProxyConfig: map[string]any{}, protocols: map[string]string{}}
	if !catalog.IsProxy(reg) {
		return r, nil
	}
	r.Name = catalog.ServiceNameOf(reg)
	if reg.Kind == catalog.KindConnectProxy {
		if dest, ok := catalog.DestinationOf(reg); ok {
			r.Name = dest
		}
	}
	var err error
	if r.proxy, err = lookup[*api.ProxyConfigEntry](get, ProxyDefaults, Global); err != nil {
		return nil, err
	}
	if r.defaults, err = lookup[*api.ServiceConfigEntry](get, ServiceDefaults, r.Name.Name); err != nil {
		return nil, err
	}
	if pd := r.proxy; pd != nil {
		r.ProxyConfig = catalog.CanonicalConfig(pd.Config)
		if r.ProxyConfig == nil {
			r.ProxyConfig = map[string]any{}
		}
		r.Mode, r.MutualTLSMode = pd.Mode, pd.MutualTLSMode
		r.Expose = api.ExposeConfig{Checks: pd.Expose.Checks, Paths: slices.Clone(pd.Expose.Paths)}
		mergeTransparent(&r.TransparentProxy, pd.TransparentProxy)
		if pd.AccessLogs != nil {
			r.AccessLogs = *pd.AccessLogs
		}
		r.EnvoyExtensions = append(r.EnvoyExtensions, pd.EnvoyExtensions...)
	}
	if sd := r.defaults; sd != nil {
		foldServiceDefaults(r.ProxyConfig, sd)
		if sd.Mode != "" {
			r.Mode = sd.Mode
		}
		if sd.MutualTLSMode != "" {
			r.MutualTLSMode = sd.MutualTLSMode
		}
		if sd.Expose.Checks {
			r.Expose.Checks = true
		}
		if len(sd.Expose.Paths) > 0 {
			r.Expose.Paths = slices.Clone(sd.Expose.Paths)
		}
		mergeTransparent(&r.TransparentProxy, sd.TransparentProxy)
		r.EnvoyExtensions = append(r.EnvoyExtensions, sd.EnvoyExtensions...)
		r.Meta = maps.Clone(sd.Meta)
	}
	inherited := r.inherited()
	r.MeshGateway.Mode, r.MeshGatewayFrom = inherited.Mode, inherited.From

	if reg.Kind == catalog.KindConnectProxy {
		var names []string
		if reg.Proxy != nil {
			for _, u := range reg.Proxy.Upstreams {
				if isServiceUpstream(u) && u.DestinationPeer == "" {
					names = append(names, u.DestinationName)
				}
			}
		}
		for _, o := range r.overrides() {
			if o.Peer == "" {
				names = append(names, o.Name)
			}
		}
		for _, name := range names {
			if _, ok := r.protocols[name]; ok || name == "" {
				continue
			}
			sd, err := lookup[*api.ServiceConfigEntry](get, ServiceDefaults, name)
			if err != nil {
				return nil, err
			}
			protocol := legacyString(r.proxyConfig(), keyProtocol)
			if sd != nil && sd.Protocol != "" {
				protocol = sd.Protocol
			}
			r.protocols[name] = strings.ToLower(protocol)
		}
	}
	return r, nil
}

func (r *Resolved) proxyConfig() map[string]any {
	if r.proxy == nil {
		return nil
	}
	return r.proxy.Config
}

func (r *Resolved) overrides() []*api.UpstreamConfig {
	if r.defaults == nil || r.defaults.UpstreamConfig == nil {
		return nil
	}
	var out []*api.UpstreamConfig
	for _, o := range r.defaults.UpstreamConfig.Overrides {
		if o != nil {
			out = append(out, o)
		}
	}
	return out
}

func (r *Resolved) upstreamDefaults() *api.UpstreamConfig {
	if r.defaults == nil || r.defaults.UpstreamConfig == nil {
		return nil
	}
	return r.defaults.UpstreamConfig.Defaults
}

func (r *Resolved) overrideFor(u api.Upstream) *api.UpstreamConfig {
	for _, o := range r.overrides() {
		if o.Name == u.DestinationName && o.Peer == u.DestinationPeer &&
			defaulted(o.Namespace) == defaulted(u.DestinationNamespace) && defaulted(o.Partition) == defaulted(u.DestinationPartition) {
			return o
		}
	}
	return nil
}

// inherited is the part of the ladder below the registration that all upstreams
// share with the proxy itself: ranks 5 to 7.
func (r *Resolved) inherited() UpstreamMode {
	if r.defaults != nil && r.defaults.MeshGateway.Mode != "" {
		return UpstreamMode{r.defaults.MeshGateway.Mode, fromServiceDefaults + r.Name.Name}
	}
	if r.proxy != nil {
		if r.proxy.MeshGateway.Mode != "" {
			return UpstreamMode{r.proxy.MeshGateway.Mode, FromProxyDefaults}
		}
		if m := legacyMode(r.proxy.Config); m != "" {
			return UpstreamMode{m, FromProxyDefaults}
		}
	}
	return UpstreamMode{}
}

// modeOf walks the ladder for one upstream. The order
// has one surprise: an override in service-defaults beats the registration's
// proxy-wide mode.
func (r *Resolved) modeOf(reg *catalog.Service, u api.Upstream) UpstreamMode {
	if !isServiceUpstream(u) {
		return UpstreamMode{}
	}
	if m := u.MeshGateway.Mode; m != "" && !u.CentrallyConfigured {
		return UpstreamMode{m, FromUpstream}
	}
	if o := r.overrideFor(u); o != nil && o.MeshGateway.Mode != "" {
		return UpstreamMode{o.MeshGateway.Mode, fromServiceDefaults + r.Name.Name + " override for " + o.Name}
	}
	if reg.Proxy != nil && reg.Proxy.MeshGateway.Mode != "" {
		return UpstreamMode{reg.Proxy.MeshGateway.Mode, FromInstance}
	}
	if d := r.upstreamDefaults(); d != nil && d.MeshGateway.Mode != "" {
		return UpstreamMode{d.MeshGateway.Mode, fromServiceDefaults + r.Name.Name + " upstream defaults"}
	}
	return r.inherited()
}

// UpstreamModes returns the mode of each upstream of MergeService(reg, r), in
// the same order.
func UpstreamModes(reg *catalog.Service, r *Resolved) []UpstreamMode {
	upstreams := mergedUpstreams(reg, r)
	out := make([]UpstreamMode, len(upstreams))
	for i, u := range upstreams {
		out[i] = r.modeOf(reg, u)
	}
	return out
}

// MergeService returns reg with central configuration merged in; what reg says
// itself wins, except as the ladder of modes has it. The result shares nothing
// with reg or r. Merging is not repeatable: reg must be the registration, never
// a merged one.
func MergeService(reg *catalog.Service, r *Resolved) *catalog.Service {
	out := catalog.CloneService(reg)
	if !catalog.IsProxy(reg) || r == nil {
		return out
	}
	if out.Proxy == nil {
		out.Proxy = &api.AgentServiceConnectProxyConfig{}
	}
	p := out.Proxy
	config := catalog.CanonicalConfig(r.ProxyConfig)
	if config == nil {
		config = map[string]any{}
	}
	maps.Copy(config, p.Config)
	if p.Config = config; len(config) == 0 {
		p.Config = nil
	}
	if p.MeshGateway.Mode == "" {
		p.MeshGateway = r.MeshGateway
	}
	if p.Mode == "" {
		p.Mode = r.Mode
	}
	tp := r.TransparentProxy
	mergeTransparent(&tp, p.TransparentProxy)
	if tp != (api.TransparentProxyConfig{}) {
		p.TransparentProxy = &tp
	}
	p.Expose.Checks = p.Expose.Checks || r.Expose.Checks
	if len(p.Expose.Paths) == 0 {
		p.Expose.Paths = slices.Clone(r.Expose.Paths)
	}
	if p.AccessLogs == nil && r.AccessLogs != (api.AccessLogsConfig{}) {
		logs := r.AccessLogs
		p.AccessLogs = &logs
	}
	if len(r.EnvoyExtensions) > 0 {
		p.EnvoyExtensions = slices.Clone(r.EnvoyExtensions)
		for i := range p.EnvoyExtensions {
			p.EnvoyExtensions[i].Arguments = catalog.CanonicalConfig(p.EnvoyExtensions[i].Arguments)
		}
	}
	p.Upstreams = mergedUpstreams(reg, r)
	for i := range p.Upstreams {
		if u := &p.Upstreams[i]; isServiceUpstream(*u) {
			u.MeshGateway.Mode = r.modeOf(reg, *u).Mode
		}
	}
	return out
}

// mergedUpstreams returns the registration's upstreams with their merged
// configuration, then, for a transparent proxy, those that only central
// configuration names. Their modes are still the registration's.
func mergedUpstreams(reg *catalog.Service, r *Resolved) []api.Upstream {
	if reg.Kind != catalog.KindConnectProxy {
		if reg.Proxy == nil {
			return nil
		}
		return catalog.CloneProxy(reg.Proxy).Upstreams
	}
	var out []api.Upstream
	mode := r.Mode
	if reg.Proxy != nil {
		out = catalog.CloneProxy(reg.Proxy).Upstreams
		if reg.Proxy.Mode != "" {
			mode = reg.Proxy.Mode
		}
	}
	for i := range out {
		if u := &out[i]; isServiceUpstream(*u) {
			own := u.Config
			u.Config = r.upstreamConfig(*u)
			maps.Copy(u.Config, own)
			delete(u.Config, keyMeshGateway)
			if len(u.Config) == 0 {
				u.Config = nil
			}
		}
	}
	if mode != api.ProxyModeTransparent {
		return out
	}
	for _, o := range r.overrides() {
		u := api.Upstream{
			DestinationType: api.UpstreamDestTypeService, DestinationName: o.Name, DestinationNamespace: o.Namespace,
			DestinationPartition: o.Partition, DestinationPeer: o.Peer, CentrallyConfigured: true,
		}
		named := slices.ContainsFunc(out, func(x api.Upstream) bool {
			return isServiceUpstream(x) && x.DestinationName == u.DestinationName && x.DestinationPeer == u.DestinationPeer
		})
		if named {
			continue
		}
		if c := r.upstreamConfig(u); len(c) > 0 {
			u.Config = c
		}
		out = append(out, u)
	}
	all := api.Upstream{DestinationType: api.UpstreamDestTypeService, DestinationName: Wildcard, CentrallyConfigured: true}
	if c := r.upstreamConfig(all); len(c) > 0 {
		all.Config = c
	}
	return append(out, all)
}

// upstreamConfig returns what central configuration says about one upstream: the
// protocol of its service, then the caller's defaults, then its override.
func (r *Resolved) upstreamConfig(u api.Upstream) map[string]any {
	out := map[string]any{}
	if u.DestinationPeer == "" {
		protocol, ok := r.protocols[u.DestinationName]
		if !ok {
			protocol = legacyString(r.proxyConfig(), keyProtocol)
		}
		if protocol != "" {
			out[keyProtocol] = protocol
		}
	}
	overlayUpstream(out, r.upstreamDefaults())
	overlayUpstream(out, r.overrideFor(u))
	if u.DestinationPeer != "" {
		delete(out, keyProtocol) // only the exporting cluster knows it
	}
	return out
}

// overlayUpstream writes what c sets into out, with the keys that a registration
// would use.
//
// COMPAT: Consul shows limits and passive_health_check, once merged, with the
// CamelCase keys of the entry. Here both origins have one form.
func overlayUpstream(out map[string]any, c *api.UpstreamConfig) {
	if c == nil {
		return
	}
	for k, v := range map[string]string{
		"envoy_listener_json":          c.EnvoyListenerJSON,
		"envoy_cluster_json":           c.EnvoyClusterJSON,
		keyProtocol:                    c.Protocol,
		"balance_outbound_connections": c.BalanceOutboundConnections,
	} {
		if v != "" {
			out[k] = v
		}
	}
	if c.ConnectTimeoutMs > 0 {
		out["connect_timeout_ms"] = float64(c.ConnectTimeoutMs)
	}
	if l := c.Limits; l != nil {
		limits := map[string]any{}
		for k, v := range map[string]*int{
			"max_connections":         l.MaxConnections,
			"max_pending_requests":    l.MaxPendingRequests,
			"max_concurrent_requests": l.MaxConcurrentRequests,
		} {
			if v != nil {
				limits[k] = float64(*v)
			}
		}
		out["limits"] = limits
	}
	if h := c.PassiveHealthCheck; h != nil {
		check := map[string]any{}
		if h.Interval != 0 {
			check["interval"] = h.Interval.String()
		}
		if h.MaxFailures != 0 {
			check["max_failures"] = float64(h.MaxFailures)
		}
		if h.BaseEjectionTime != nil {
			check["base_ejection_time"] = h.BaseEjectionTime.String()
		}
		for k, v := range map[string]*uint32{
			"enforcing_consecutive_5xx":             h.EnforcingConsecutive5xx,
			"enforcing_consecutive_gateway_failure": h.EnforcingConsecutiveGatewayFailure,
			"consecutive_5xx":                       h.Consecutive5xx,
			"consecutive_gateway_failure":           h.ConsecutiveGatewayFailure,
			"max_ejection_percent":                  h.MaxEjectionPercent,
		} {
			if v != nil {
				check[k] = float64(*v)
			}
		}
		out["passive_health_check"] = check
	}
}

func foldServiceDefaults(config map[string]any, sd *api.ServiceConfigEntry) {
	if sd.Protocol != "" {
		config[keyProtocol] = sd.Protocol
	}
	if sd.BalanceInboundConnections != "" {
		config["balance_inbound_connections"] = sd.BalanceInboundConnections
	}
	for k, v := range map[string]int{
		"max_inbound_connections":  sd.MaxInboundConnections,
		"local_connect_timeout_ms": sd.LocalConnectTimeoutMs,
		"local_request_timeout_ms": sd.LocalRequestTimeoutMs,
	} {
		if v > 0 {
			config[k] = float64(v)
		}
	}
}

func mergeTransparent(dst *api.TransparentProxyConfig, over *api.TransparentProxyConfig) {
	if over == nil {
		return
	}
	if over.OutboundListenerPort != 0 {
		dst.OutboundListenerPort = over.OutboundListenerPort
	}
	dst.DialedDirectly = dst.DialedDirectly || over.DialedDirectly
}

func isServiceUpstream(u api.Upstream) bool {
	return u.DestinationType == "" || u.DestinationType == api.UpstreamDestTypeService
}

// legacyMode reads Config.mesh_gateway, a mode or an object that holds one.
func legacyMode(config map[string]any) api.MeshGatewayMode {
	switch v := catalog.CanonicalConfig(config)[keyMeshGateway].(type) {
	case string:
		return api.MeshGatewayMode(v)
	case map[string]any:
		for _, k := range slices.Sorted(maps.Keys(v)) {
			if s, ok := v[k].(string); ok && strings.EqualFold(k, "mode") {
				return api.MeshGatewayMode(s)
			}
		}
	}
	return ""
}

func legacyString(config map[string]any, key string) string {
	s, _ := config[key].(string)
	return s
}
