package configentry

import (
	"math"
	"slices"
	"strings"

	"github.com/hashicorp/consul/api"

	"github.com/sluicemesh/sluice/agent/catalog"
)

// Normalize gives equal meanings one form: names that have a default have it,
// protocols and methods have one letter case, opaque configuration is canonical,
// the sources of an intention are in order of precedence. It is idempotent,
// changes e in place, and comes before [Validate].
func Normalize(e Entry) {
	switch e := e.(type) {
	case *api.ProxyConfigEntry:
		e.Kind = ProxyDefaults
		if e.Name == "" {
			e.Name = Global
		}
		e.Config = catalog.CanonicalConfig(e.Config)
		e.TransparentProxy = present(e.TransparentProxy)
		e.AccessLogs = present(e.AccessLogs)
		normalizeExtensions(e.EnvoyExtensions)
		normalizeExpose(&e.Expose)
	case *api.ServiceConfigEntry:
		e.Kind = ServiceDefaults
		e.Protocol = strings.ToLower(e.Protocol)
		e.TransparentProxy = present(e.TransparentProxy)
		normalizeExtensions(e.EnvoyExtensions)
		normalizeExpose(&e.Expose)
		if u := e.UpstreamConfig; u != nil {
			normalizeUpstream(u.Defaults)
			u.Overrides = withoutNil(u.Overrides)
			for _, o := range u.Overrides {
				normalizeUpstream(o)
			}
		}
	case *api.ServiceResolverConfigEntry:
		e.Kind = ServiceResolver
	case *api.ServiceRouterConfigEntry:
		e.Kind = ServiceRouter
		for i := range e.Routes {
			if m := e.Routes[i].Match; m != nil && m.HTTP != nil {
				upper(m.HTTP.Methods)
			}
		}
	case *api.ServiceSplitterConfigEntry:
		e.Kind = ServiceSplitter
		for i := range e.Splits {
			e.Splits[i].Weight = float32(float64(scaledWeight(e.Splits[i].Weight)) / 100)
		}
	case *api.ServiceIntentionsConfigEntry:
		e.Kind = ServiceIntentions
		e.Sources = withoutNil(e.Sources)
		for _, s := range e.Sources {
			s.Precedence = Precedence(s.Name, e.Name)
			s.Type = api.IntentionSourceConsul
			s.Permissions = withoutNil(s.Permissions)
			for _, p := range s.Permissions {
				if p.HTTP != nil {
					upper(p.HTTP.Methods)
				}
			}
		}
		slices.SortStableFunc(e.Sources, func(a, b *api.SourceIntention) int { return b.Precedence - a.Precedence })
	case *api.ExportedServicesConfigEntry:
		if e.Name == "" {
			e.Name = catalog.DefaultTenancy
		}
	}
}

// present makes an absent object an empty one: Consul always shows these.
func present[T any](p *T) *T {
	if p == nil {
		return new(T)
	}
	return p
}

func withoutNil[T any](in []*T) []*T {
	return slices.DeleteFunc(in, func(p *T) bool { return p == nil })
}

func upper(methods []string) {
	for i := range methods {
		methods[i] = strings.ToUpper(methods[i])
	}
}

func normalizeExtensions(in []api.EnvoyExtension) {
	for i := range in {
		in[i].Arguments = catalog.CanonicalConfig(in[i].Arguments)
	}
}

func normalizeExpose(e *api.ExposeConfig) {
	for i := range e.Paths {
		if e.Paths[i].Protocol == "" {
			e.Paths[i].Protocol = "http"
		}
	}
}

func normalizeUpstream(u *api.UpstreamConfig) {
	if u == nil {
		return
	}
	u.Protocol = strings.ToLower(u.Protocol)
	u.ConnectTimeoutMs = max(u.ConnectTimeoutMs, 0)
}

// scaledWeight is a split's weight in hundredths of a percent.
func scaledWeight(w float32) int { return int(math.Round(float64(w) * 100)) }
