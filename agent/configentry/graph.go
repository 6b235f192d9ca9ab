package configentry

import (
	"slices"

	"github.com/hashicorp/consul/api"

	"github.com/sluicemesh/sluice/agent/catalog"
)

// Overlay returns a Get that reads changed, or for a deletion nothing, in the
// place of the entry with its key, and any other entry from get.
func Overlay(get Get, changed Entry, deleted bool) Get {
	kind, name := changed.GetKind(), changed.GetName()
	return func(k, n string) (Entry, error) {
		if k != kind || n != name {
			return get(k, n)
		}
		if deleted {
			return nil, nil
		}
		return changed, nil
	}
}

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

// ValidateGraph returns the error of the first discovery chain, by name, that
// compiles with entries as they are and would not once changed is written, or
// deleted. A chain that is broken already hinders no write that may mend it.
func ValidateGraph(entries []Entry, changed Entry, deleted bool) error {
	names := []string{}
	switch changed.GetKind() {
	case ServiceDefaults, ServiceResolver, ServiceRouter, ServiceSplitter:
		names = append(names, changed.GetName())
	case ProxyDefaults:
	default:
		return nil // no part of a chain
	}
	for _, e := range entries {
		switch e.GetKind() {
		case ServiceResolver, ServiceRouter, ServiceSplitter:
			names = append(names, e.GetName())
		}
	}
	slices.Sort(names)
	before := GetFrom(entries)
	after := Overlay(before, changed, deleted)
	for _, name := range slices.Compact(names) {
		req := CompileRequest{Service: catalog.Name(name), EvaluateInDatacenter: "dc1", TrustDomain: "b6fc9da3-03d4-4b5a-9134-c045e9b20152.consul"}
		_, err := CompileChain(after, req)
		if err == nil {
			continue
		}
		if _, was := CompileChain(before, req); was == nil {
			return err
		}
	}
	return nil
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
