package gateway

import "slices"

// Carry returns next with what is pending in it filled in from prev, the table
// before it: unknown is not empty, and never replaces what is known. It returns
// next itself where there is nothing to fill in; neither table is written to.
func Carry(prev, next *Table) *Table {
	if prev == nil || !slices.ContainsFunc(next.Clusters, func(c Cluster) bool { return c.Pending }) {
		return next
	}
	out := *next
	out.Clusters = nil
	out.Listeners = slices.Clone(next.Listeners)
	have := make(map[string]bool, len(next.Clusters))
	for i := range next.Clusters {
		have[next.Clusters[i].Name] = true
	}
	// take adds the clusters of prev that name leads to, where next has none of
	// that name.
	var take func(name string)
	take = func(name string) {
		c := prev.Cluster(name)
		if c == nil || have[name] {
			return
		}
		have[name] = true
		kept := *c
		kept.Pending = true
		out.Clusters = append(out.Clusters, kept)
		for _, f := range c.Failover {
			take(f)
		}
	}
	for _, c := range next.Clusters {
		if !c.Pending {
			out.Clusters = append(out.Clusters, c)
			continue
		}
		if old := prev.Cluster(c.Name); old != nil {
			if len(c.Endpoints) == 0 {
				c.Endpoints = old.Endpoints
			}
			if c.TLS == nil || c.TLS.ServerName == "" {
				c.TLS, c.Failover = old.TLS, old.Failover
			}
			out.Clusters = append(out.Clusters, c)
			for _, f := range c.Failover {
				take(f)
			}
			continue
		}
		// Where the cluster leads is not known either: an upstream whose discovery
		// chain is pending. What its listener led to stays.
		moved, needed := false, false
		for i := range out.Listeners {
			l := &out.Listeners[i]
			if l.Cluster != c.Name {
				continue
			}
			j := slices.IndexFunc(prev.Listeners, func(x Listener) bool { return x.Name == l.Name && x.Mode == l.Mode })
			if j < 0 || prev.Cluster(prev.Listeners[j].Cluster) == nil {
				needed = true
				continue
			}
			l.Cluster = prev.Listeners[j].Cluster
			take(l.Cluster)
			moved = true
		}
		if !moved || needed {
			out.Clusters = append(out.Clusters, c)
		}
	}
	out.Warnings = slices.Clone(next.Warnings)
	out.sort()
	return &out
}
