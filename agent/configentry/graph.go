package configentry

import (
	"slices"

	"github.com/hashicorp/consul/api"
)

// GetFrom reads from a list of entries, of which the last of a key wins.
func GetFrom(entries []Entry) Get {
	m := make(map[string]Entry, len(entries))
	for _, e := range entries {
		m[Key(e)] = e
	}
	return func(kind, name string) (Entry, error) {
		if e, ok := m[kind+"/"+name]; ok {
			return e, nil
		}
		return nil, nil
	}
}

// ReferencedServices returns the other services that a resolver, router or
// splitter sends traffic to, sorted: those whose read permission writing it
// needs.
func ReferencedServices(e Entry) []string {
	var out []string
	switch e := e.(type) {
	case *api.ServiceResolverConfigEntry:
		if r := e.Redirect; r != nil && r.Peer == "" {
			out = append(out, r.Service)
		}
		for _, f := range e.Failover {
			out = append(out, f.Service)
			for _, t := range f.Targets {
				if t.Peer == "" {
					out = append(out, t.Service)
				}
			}
		}
	case *api.ServiceRouterConfigEntry:
		for _, r := range e.Routes {
			if r.Destination != nil {
				out = append(out, r.Destination.Service)
			}
		}
	case *api.ServiceSplitterConfigEntry:
		for _, s := range e.Splits {
			out = append(out, s.Service)
		}
	}
	out = slices.DeleteFunc(out, func(s string) bool { return s == "" || s == e.GetName() })
	slices.Sort(out)
	return slices.Compact(out)
}
