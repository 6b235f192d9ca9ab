package catalog

import (
	"github.com/hashicorp/consul/api"
)

// NormalizeDefinition fills in what d leaves out and has one meaning: the ID,
// the weights, the type of an upstream. Opaque configuration becomes canonical.
// It is idempotent, and leaves a sidecar_service block unexpanded.
func NormalizeDefinition(d *Definition) {
	if d.ID == "" {
		d.ID = d.Name
	}
	normalizeRegistration(&d.AgentServiceRegistration)
	if d.Connect != nil && d.Connect.SidecarService != nil {
		normalizeRegistration(d.Connect.SidecarService)
	}
}

func normalizeRegistration(r *api.AgentServiceRegistration) {
	if r.Weights == nil {
		r.Weights = &api.AgentWeights{Passing: 1, Warning: 1}
	}
	if r.Tags == nil {
		r.Tags = []string{}
	}
	if r.Meta == nil {
		r.Meta = map[string]string{}
	}
	var checks api.AgentServiceChecks
	for _, c := range r.Checks {
		if c != nil {
			checks = append(checks, c)
		}
	}
	r.Checks = checks
	normalizeProxy(r.Proxy)
}

func normalizeProxy(p *api.AgentServiceConnectProxyConfig) {
	if p == nil {
		return
	}
	p.Config = CanonicalConfig(p.Config)
	for i := range p.Upstreams {
		u := &p.Upstreams[i]
		if u.DestinationType == "" {
			u.DestinationType = api.UpstreamDestTypeService
		}
		u.Config = CanonicalConfig(u.Config)
	}
	for i := range p.Expose.Paths {
		if p.Expose.Paths[i].Protocol == "" {
			p.Expose.Paths[i].Protocol = "http"
		}
	}
}

// ServiceOf returns the catalog record of a definition: Tags and Meta are never
// nil, the weights are set, and a literal address has its tagged addresses. The
// record shares nothing with d.
func ServiceOf(d *Definition) *Service {
	r := cloneRegistration(&d.AgentServiceRegistration)
	normalizeRegistration(r)
	if r.ID == "" {
		r.ID = r.Name
	}
	s := &Service{
		Kind:              r.Kind,
		ID:                r.ID,
		Service:           r.Name,
		Tags:              r.Tags,
		Meta:              r.Meta,
		Port:              r.Port,
		Ports:             r.Ports,
		Address:           r.Address,
		SocketPath:        r.SocketPath,
		TaggedAddresses:   taggedAddresses(r.TaggedAddresses, r.Address, r.Port),
		Weights:           *r.Weights,
		EnableTagOverride: r.EnableTagOverride,
		Namespace:         r.Namespace,
		Partition:         r.Partition,
		Locality:          r.Locality,
	}
	if IsProxy(s) {
		if s.Proxy = r.Proxy; s.Proxy == nil {
			s.Proxy = &api.AgentServiceConnectProxyConfig{}
		}
	}
	if r.Connect != nil && r.Connect.Native {
		s.Connect = &api.AgentServiceConnect{Native: true}
	}
	return s
}
