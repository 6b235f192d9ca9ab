package gateway

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"
)

// Explanation says what a table does with a server name, and why.
type Explanation struct {
	Proxy      string
	Name       string // as asked
	Normalised string
	// Routed says that a rule matches and that there is an endpoint to dial.
	Routed bool
	// Match, Cluster and Origin are of the rule that decides; empty when none does.
	Match   string    `json:",omitempty"`
	Cluster string    `json:",omitempty"`
	Origin  Origin    `json:",omitzero"`
	Index   uint64    // of the table
	AsOf    time.Time // of the table
	// Candidates are the endpoints of the cluster, then those of its failovers.
	Candidates []Candidate `json:",omitempty"`
	// Steps tell it in sentences, in order.
	Steps []string
	// Missing says what would have to be there for the name to be routed.
	Missing []string `json:",omitempty"`
}

// Candidate is an endpoint that a connection may go to.
type Candidate struct {
	Endpoint
	Cluster string
	// Chosen says that a data plane dials it: it is healthy, and nothing before it
	// in priority or failover is. Reason says why not.
	Chosen bool
	Reason string `json:",omitempty"`
}

// Explain says what a table does with a server name. For a sidecar the name may
// also be that of an upstream listener or the bare name of its service. It is
// pure, and may be asked of a live table or a saved one.
func Explain(t *Table, name string) Explanation {
	x := Explanation{Proxy: t.Proxy, Name: name, Normalised: NormaliseServerName(name), Index: t.Index, AsOf: t.AsOf}
	step := func(format string, args ...any) { x.Steps = append(x.Steps, fmt.Sprintf(format, args...)) }
	if x.Normalised != name {
		step("the name is looked up as %q", x.Normalised)
	}
	var cluster *Cluster
	if l := t.findUpstream(name); l != nil {
		x.Match, x.Cluster, x.Origin = l.Name, l.Cluster, l.Origin
		cluster = t.Cluster(l.Cluster)
		step("upstream listener %s (from %s) leads to cluster %s", l.Name, origin(l.Origin), l.Cluster)
	} else if route, c := t.Lookup(name); route != nil {
		x.Match, x.Cluster, x.Origin = route.Match, route.Cluster, route.Origin
		cluster = c
		if route.Match == x.Normalised {
			step("an exact rule matches, from %s", origin(route.Origin))
		} else {
			step("no exact rule matches; the longest suffix that does is %s, from %s", route.Match, origin(route.Origin))
		}
		step("the rule leads to cluster %s", route.Cluster)
	} else {
		step("no rule matches, so the connection is closed")
		x.Missing = append(x.Missing, t.unmatched(x.Normalised)...)
		return x
	}
	if cluster == nil {
		x.Missing = append(x.Missing, fmt.Sprintf("cluster %s is not in the table", x.Cluster))
		return x
	}

	chain := []*Cluster{cluster}
	for _, f := range cluster.Failover {
		if c := t.Cluster(f); c != nil {
			chain = append(chain, c)
		}
	}
	for i, c := range chain {
		if i > 0 {
			step("failover %d is cluster %s", i, c.Name)
		}
		if c.Pending && len(c.Endpoints) > 0 {
			step("which endpoints cluster %s has is not known at present; those listed were last known", c.Name)
		}
		if c.Pending && len(c.Endpoints) == 0 {
			step("which endpoints cluster %s has is not known yet", c.Name)
			x.Missing = append(x.Missing, "an answer as to the endpoints of cluster "+c.Name)
			continue
		}
		if len(c.Endpoints) == 0 {
			step("cluster %s has no endpoints (%s)", c.Name, origin(c.Origin))
			x.Missing = append(x.Missing, "an endpoint in cluster "+c.Name)
			continue
		}
		healthy := 0
		best, near := -1, 0
		for _, e := range c.Endpoints {
			if e.Healthy {
				healthy++
				d := Distance(t.Zone, e.Zone)
				if best < 0 || e.Priority < best || e.Priority == best && d < near {
					best, near = e.Priority, d
				}
			}
		}
		step("cluster %s has %d endpoints, %d of them healthy", c.Name, len(c.Endpoints), healthy)
		if healthy == 0 {
			x.Missing = append(x.Missing, "a healthy endpoint in cluster "+c.Name)
		}
		for _, e := range c.Endpoints {
			cand := Candidate{Endpoint: e, Cluster: c.Name}
			switch {
			case !e.Healthy:
				cand.Reason = cmp.Or(e.Why, "unhealthy")
			case x.Routed:
				cand.Reason = "an earlier cluster has a healthy endpoint"
			case e.Priority > best:
				cand.Reason = fmt.Sprintf("there is a healthy endpoint of priority %d", best)
			case Distance(t.Zone, e.Zone) > near:
				cand.Reason = "there is a healthy endpoint nearer to zone " + t.Zone
			default:
				cand.Chosen = true
			}
			x.Candidates = append(x.Candidates, cand)
		}
		if healthy > 0 {
			x.Routed = true
		}
	}
	if x.Routed {
		x.Missing = nil
		step("a connection goes to one of the %d chosen endpoints", countChosen(x.Candidates))
		return x
	}
	if len(x.Candidates) > 0 {
		// There is no panic mode: being refused names the cause, and a connection to
		// what a check calls dead would only time out.
		step("no endpoint is healthy, so the connection is closed")
	} else {
		step("there is no endpoint to dial, so the connection is closed")
	}
	return x
}

func countChosen(cs []Candidate) (n int) {
	for i := range cs {
		if cs[i].Chosen {
			n++
		}
	}
	return n
}

func origin(o Origin) string {
	s := cmp.Or(o.Object, "an unknown object")
	if o.Datacenter != "" {
		s += " in " + o.Datacenter
	}
	if o.Index > 0 {
		s += fmt.Sprintf(" at index %d", o.Index)
	}
	return s
}

// upstream returns the upstream's part of an upstream listener's name.
func (l *Listener) upstream() string { return strings.TrimSuffix(l.Name, ":"+l.Address) }

// findUpstream finds an upstream listener by its name, its address, its
// upstream's name, or the server name its cluster sends.
func (t *Table) findUpstream(name string) *Listener {
	sni := NormaliseServerName(name)
	for i := range t.Listeners {
		l := &t.Listeners[i]
		if l.Mode != ListenUpstream {
			continue
		}
		id := l.upstream()
		bare, _, _ := strings.Cut(id, "?")
		if name == l.Name || name == l.Address || name == id || name == bare {
			return l
		}
		if c := t.Cluster(l.Cluster); c != nil && c.TLS != nil && c.TLS.ServerName != "" && strings.ToLower(c.TLS.ServerName) == sni {
			return l
		}
	}
	return nil
}

// unmatched says what is missing for a name that no rule matches.
func (t *Table) unmatched(name string) []string {
	if name == "" {
		return []string{"a server name: the client sent none"}
	}
	base := "internal." + strings.ToLower(t.TrustDomain)
	rest, ok := strings.CutSuffix(name, "."+base)
	if !ok || t.TrustDomain == "" {
		if strings.Contains("."+name, ".server.") {
			return []string{"the name is of a server: it is routed by a gateway with the meta consul-wan-federation, to the servers that the catalog has here, and elsewhere by the gateways of that datacenter"}
		}
		if strings.Contains(name, ".internal.") {
			return []string{fmt.Sprintf("the name is of another trust domain; this one's names end in %s", base)}
		}
		return []string{fmt.Sprintf("the name is not one of the mesh; those end in %s", base)}
	}
	labels := strings.Split(rest, ".")
	dc := labels[len(labels)-1]
	if dc != strings.ToLower(t.Datacenter) {
		known := t.otherDatacenters(base)
		if len(known) == 0 {
			return []string{fmt.Sprintf("a mesh gateway of datacenter %s; none of any other datacenter is known here", dc)}
		}
		if slices.Contains(known, dc) {
			return []string{fmt.Sprintf("a service in front of datacenter %s: the bare name of a datacenter is not routed", dc)}
		}
		return []string{fmt.Sprintf("a mesh gateway of datacenter %s; those known here are of %s", dc, strings.Join(known, ", "))}
	}
	switch len(labels) {
	case 3:
		return []string{fmt.Sprintf("an instance of service %s in datacenter %s that accepts mutual TLS (a sidecar, or a native one)", labels[0], dc)}
	case 4:
		whole := strings.Join(labels[1:], ".") + "." + base
		if r, _ := t.Lookup(whole); r != nil {
			return []string{fmt.Sprintf("a subset %s in the service-resolver of %s", labels[0], labels[1])}
		}
		return []string{
			fmt.Sprintf("an instance of service %s in datacenter %s that accepts mutual TLS (a sidecar, or a native one)", labels[1], dc),
			fmt.Sprintf("a subset %s in its service-resolver", labels[0]),
		}
	}
	return []string{fmt.Sprintf("the name has %d labels before %s; service.namespace.datacenter are 3, and a subset before them makes 4", len(labels), base)}
}

// otherDatacenters returns those that a suffix rule leads to, sorted.
func (t *Table) otherDatacenters(base string) []string {
	var out []string
	for i := range t.Routes {
		if rest, ok := strings.CutPrefix(t.Routes[i].Match, "*."); ok {
			if dc, ok := strings.CutSuffix(rest, "."+base); ok {
				out = append(out, dc)
			}
		}
	}
	slices.Sort(out)
	return out
}
