package catalog

import (
	"maps"
	"slices"

	"github.com/hashicorp/consul/api"
)

// CloneService returns a deep copy of s, opaque configuration in canonical form;
// nil for nil.
func CloneService(s *Service) *Service {
	if s == nil {
		return nil
	}
	c := *s
	c.Tags = slices.Clone(s.Tags)
	c.Meta = maps.Clone(s.Meta)
	c.Ports = slices.Clone(s.Ports)
	c.TaggedAddresses = maps.Clone(s.TaggedAddresses)
	c.Proxy = CloneProxy(s.Proxy)
	c.Locality = clonePtr(s.Locality)
	if s.Connect != nil {
		c.Connect = &api.AgentServiceConnect{Native: s.Connect.Native, SidecarService: cloneRegistration(s.Connect.SidecarService)}
	}
	return &c
}

// CloneProxy returns a deep copy of p; nil for nil.
func CloneProxy(p *api.AgentServiceConnectProxyConfig) *api.AgentServiceConnectProxyConfig {
	if p == nil {
		return nil
	}
	c := *p
	c.Config = CanonicalConfig(p.Config)
	c.TransparentProxy = clonePtr(p.TransparentProxy)
	c.AccessLogs = clonePtr(p.AccessLogs)
	c.LocalServicePorts = slices.Clone(p.LocalServicePorts)
	c.Expose.Paths = slices.Clone(p.Expose.Paths)
	c.EnvoyExtensions = slices.Clone(p.EnvoyExtensions)
	for i := range c.EnvoyExtensions {
		c.EnvoyExtensions[i].Arguments = CanonicalConfig(c.EnvoyExtensions[i].Arguments)
	}
	c.Upstreams = slices.Clone(p.Upstreams)
	for i := range c.Upstreams {
		c.Upstreams[i].Config = CanonicalConfig(c.Upstreams[i].Config)
	}
	return &c
}

// CloneDefinition returns a deep copy of d; nil for nil.
func CloneDefinition(d *Definition) *Definition {
	if d == nil {
		return nil
	}
	c := *d
	c.AgentServiceRegistration = *cloneRegistration(&d.AgentServiceRegistration)
	return &c
}

func cloneRegistration(r *api.AgentServiceRegistration) *api.AgentServiceRegistration {
	if r == nil {
		return nil
	}
	c := *r
	c.Tags = slices.Clone(r.Tags)
	c.Ports = slices.Clone(r.Ports)
	c.Meta = maps.Clone(r.Meta)
	c.TaggedAddresses = maps.Clone(r.TaggedAddresses)
	c.Weights = clonePtr(r.Weights)
	c.Locality = clonePtr(r.Locality)
	c.Proxy = CloneProxy(r.Proxy)
	c.Check = cloneCheck(r.Check)
	c.Checks = slices.Clone(r.Checks)
	for i := range c.Checks {
		c.Checks[i] = cloneCheck(c.Checks[i])
	}
	if r.Connect != nil {
		c.Connect = &api.AgentServiceConnect{Native: r.Connect.Native, SidecarService: cloneRegistration(r.Connect.SidecarService)}
	}
	return &c
}

func cloneCheck(c *CheckDefinition) *CheckDefinition {
	if c == nil {
		return nil
	}
	out := *c
	out.Args = slices.Clone(c.Args)
	if c.Header != nil {
		out.Header = make(map[string][]string, len(c.Header))
		for k, v := range c.Header {
			out.Header[k] = slices.Clone(v)
		}
	}
	return &out
}

func clonePtr[T any](p *T) *T {
	if p == nil {
		return nil
	}
	c := *p
	return &c
}
