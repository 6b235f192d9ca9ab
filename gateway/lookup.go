package gateway

import "strings"

// NormaliseServerName returns a server name in the form that routes have:
// lower-case, without a trailing dot.
func NormaliseServerName(name string) string {
	return strings.ToLower(strings.TrimSuffix(name, "."))
}

// Lookup returns the route and the cluster of a server name, in any letter case
// and with or without a trailing dot: the exact name, else the longest suffix;
// nil when nothing matches. It goes through all routes; a data plane that is
// asked for every connection makes an index.
func (t *Table) Lookup(serverName string) (*Route, *Cluster) {
	name := NormaliseServerName(serverName)
	if name == "" {
		return nil, nil
	}
	var best *Route
	for i := range t.Routes {
		r := &t.Routes[i]
		if r.Match == name {
			return r, t.Cluster(r.Cluster)
		}
		if matchesSuffix(r.Match, name) && (best == nil || len(r.Match) > len(best.Match)) {
			best = r
		}
	}
	if best == nil {
		return nil, nil
	}
	return best, t.Cluster(best.Cluster)
}

// matchesSuffix says that match is "*." and a suffix of name that at least one
// label precedes.
func matchesSuffix(match, name string) bool {
	suffix, ok := strings.CutPrefix(match, "*")
	return ok && len(name) > len(suffix) && strings.HasSuffix(name, suffix)
}
