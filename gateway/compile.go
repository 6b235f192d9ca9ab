package gateway

import (
	"cmp"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/hashicorp/consul/api"
	"github.com/hashicorp/go-bexpr"

	"github.com/sluicemesh/sluice/agent/catalog"
	"github.com/sluicemesh/sluice/proxycfg"
)

// DefaultConnectTimeout bounds an attempt to connect where nothing else says.
const DefaultConnectTimeout = 5 * time.Second

// DefaultAnswerTimeout bounds the wait for an endpoint's first byte, while there is
// another that could be asked, where nothing else says. It leaves time for the other
// before clients give up, who often do after 5 s.
const DefaultAnswerTimeout = 2 * time.Second

// Compile makes the table of a snapshot. It is pure: equal snapshots have equal
// tables. An error means that the snapshot is of no use; whatever is wrong with
// one route or upstream is a warning in the table instead.
func Compile(s *proxycfg.Snapshot) (*Table, error) { return new(Compiler).Compile(s) }

// Compiler compiles the successive snapshots of one proxy. It gives the same
// tables as [Compile], in less time: what it made of a service is used again
// while the service is the same. The zero value is ready. It is not safe for
// concurrent use.
type Compiler struct {
	env      meshEnv
	services map[catalog.ServiceName]*serviceMemo
}

// Compile is [Compile] with the compiler's memory.
func (c *Compiler) Compile(s *proxycfg.Snapshot) (*Table, error) {
	if s == nil || s.Proxy.Service == nil {
		return nil, errors.New("compile table: the snapshot has no proxy")
	}
	t := &Table{
		Proxy:       s.Proxy.Service.ID,
		Kind:        s.Proxy.Service.Kind,
		Service:     s.Proxy.Service.Service,
		Datacenter:  s.Proxy.Datacenter,
		TrustDomain: s.TrustDomain,
		Index:       s.Index,
		AsOf:        s.AsOf,
	}
	switch {
	case s.Gateway != nil:
		c.meshGateway(t, s)
	case s.Sidecar != nil:
		if err := sidecar(t, s); err != nil {
			return nil, fmt.Errorf("compile table of %q: %w", t.Proxy, err)
		}
	default:
		return nil, fmt.Errorf("compile table of %q: kind %q has no table", t.Proxy, t.Kind)
	}
	t.sort()
	if err := t.Check(); err != nil {
		return nil, fmt.Errorf("compile table of %q: %w", t.Proxy, err)
	}
	return t, nil
}

// sort puts the table into its one order. Rules of authorisation are in order of
// precedence, and failover in that of the chain: those stay.
func (t *Table) sort() {
	slices.SortFunc(t.Listeners, func(a, b Listener) int { return cmp.Compare(a.Name, b.Name) })
	slices.SortFunc(t.Routes, func(a, b Route) int { return cmp.Compare(a.Match, b.Match) })
	slices.SortFunc(t.Clusters, func(a, b Cluster) int { return cmp.Compare(a.Name, b.Name) })
	slices.Sort(t.Warnings)
	t.Warnings = slices.Compact(t.Warnings)
}

func (t *Table) warn(format string, args ...any) {
	t.Warnings = append(t.Warnings, fmt.Sprintf(format, args...))
}

// Check says what in the table refers to nothing or is there twice; nil when all
// of it hangs together. It reports every fault.
func (t *Table) Check() error {
	var faults []error
	fault := func(format string, args ...any) { faults = append(faults, fmt.Errorf(format, args...)) }

	clusters := make(map[string]bool, len(t.Clusters))
	for i := range t.Clusters {
		name := t.Clusters[i].Name
		if clusters[name] {
			fault("cluster %q is there twice", name)
		}
		clusters[name] = true
	}
	for i := range t.Clusters {
		for _, f := range t.Clusters[i].Failover {
			if !clusters[f] {
				fault("cluster %q fails over to %q, which there is not", t.Clusters[i].Name, f)
			}
			if f == t.Clusters[i].Name {
				fault("cluster %q fails over to itself", f)
			}
		}
	}
	names, addresses := make(map[string]bool), make(map[string]string)
	for _, l := range t.Listeners {
		if names[l.Name] {
			fault("listener %q is there twice", l.Name)
		}
		names[l.Name] = true
		address := l.Network + " " + l.Address
		if other, ok := addresses[address]; ok {
			fault("listeners %q and %q have the same address", other, l.Name)
		}
		addresses[address] = l.Name
		switch l.Mode {
		case ListenSNI:
		case ListenInbound, ListenUpstream:
			if !clusters[l.Cluster] {
				fault("listener %q forwards to cluster %q, which there is not", l.Name, l.Cluster)
			}
			if t.Identity == nil {
				fault("listener %q needs a certificate, which there is not", l.Name)
			}
		default:
			fault("listener %q has the unknown mode %q", l.Name, l.Mode)
		}
		if l.Mode == ListenInbound && l.Authorise == nil {
			fault("listener %q authorises nobody", l.Name)
		}
	}
	matches := make(map[string]bool, len(t.Routes))
	for i := range t.Routes {
		r := &t.Routes[i]
		if matches[r.Match] {
			fault("route %q is there twice", r.Match)
		}
		matches[r.Match] = true
		if !clusters[r.Cluster] {
			fault("route %q leads to cluster %q, which there is not", r.Match, r.Cluster)
		}
	}
	return errors.Join(faults...)
}

// endpoints makes endpoints of instances, in table order.
func endpoints(instances []*catalog.Instance, dc string, wan, onlyPassing bool) []Endpoint {
	if len(instances) == 0 {
		return nil
	}
	out := make([]Endpoint, 0, len(instances))
	for _, inst := range instances {
		host, port := catalog.LANAddress(inst)
		if wan {
			host, port = catalog.WANAddress(inst)
		}
		healthy, weight, why := catalog.Health(inst, onlyPassing)
		e := Endpoint{
			Address:   host,
			Port:      port,
			Healthy:   healthy,
			Weight:    max(weight, 1),
			Node:      inst.Node.Node,
			ServiceID: inst.Service.ID,
			Origin: Origin{
				Object:     "instance/" + inst.Node.Node + "/" + inst.Service.ID,
				Datacenter: dc,
				Index:      inst.Service.ModifyIndex,
			},
		}
		if !healthy {
			e.Why = why
		}
		e.Zone = zoneOf(inst.Service, inst.Node)
		out = append(out, e)
	}
	slices.SortFunc(out, func(a, b Endpoint) int {
		return cmp.Or(
			cmp.Compare(a.Priority, b.Priority),
			cmp.Compare(a.Address, b.Address),
			cmp.Compare(a.Port, b.Port),
			cmp.Compare(a.Node, b.Node),
			cmp.Compare(a.ServiceID, b.ServiceID),
		)
	})
	return out
}

// zoneOf is the locality of a service, which is its node's unless it has its own.
func zoneOf(s *catalog.Service, n *catalog.Node) string {
	if s.Locality != nil || n == nil {
		return zone(s.Locality)
	}
	return zone(n.Locality)
}

func zone(l *api.Locality) string {
	if l == nil || l.Region == "" && l.Zone == "" {
		return ""
	}
	return l.Region + "/" + l.Zone
}

// matching returns the instances that a subset's filter admits, all where it is
// empty. A filter that cannot be evaluated admits none: a subset is a promise
// that the others get no traffic.
func matching(instances []*catalog.Instance, filter string) ([]*catalog.Instance, error) {
	if strings.TrimSpace(filter) == "" {
		return instances, nil
	}
	eval, err := bexpr.CreateEvaluator(filter)
	if err != nil {
		return nil, fmt.Errorf("parse filter %q: %w", filter, err)
	}
	var out []*catalog.Instance
	for _, inst := range instances {
		ok, err := eval.Evaluate(inst)
		if err != nil {
			return nil, fmt.Errorf("evaluate filter %q: %w", filter, err)
		}
		if ok {
			out = append(out, inst)
		}
	}
	return out, nil
}

// policy translates a load-balancer policy; known is false for those that hash,
// which need something of the request that a forwarder of bytes does not see.
func policy(lb *api.LoadBalancer) (p Policy, known bool) {
	if lb == nil {
		return PolicyLeastConnections, true
	}
	switch lb.Policy {
	case "", "least_request":
		return PolicyLeastConnections, true
	case "round_robin":
		return PolicyRoundRobin, true
	case "random":
		return PolicyRandom, true
	}
	return PolicyLeastConnections, false
}

func isHostname(address string) bool {
	_, err := netip.ParseAddr(address)
	return err != nil
}

func hostPort(host string, port int) string {
	return net.JoinHostPort(strings.Trim(host, "[]"), strconv.Itoa(port))
}
