package configentry

import (
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"maps"
	"math"
	"slices"
	"strings"
	"time"

	"github.com/hashicorp/consul/api"

	"github.com/sluicemesh/sluice/agent/catalog"
)

const (
	defaultConnectTimeout = 5 * time.Second
	protocolTCP           = "tcp"
)

// maxLegs bounds what nested splitters multiply out to. Without a bound a few
// entries make a chain that does not fit in memory.
//
// COMPAT: Consul has no bound.
const maxLegs = 10_000

// Compile resolves the routers, splitters and resolvers of a service into the
// graph that a proxy follows. A service of which nothing is known has a chain
// too, that of itself. The error of a graph that makes no sense has Consul's
// text.
func Compile(get Get, req CompileRequest) (*api.CompiledDiscoveryChain, error) {
	c, err := CompileChain(get, req)
	if err != nil {
		return nil, err
	}
	return c.CompiledDiscoveryChain, nil
}

// CompileChain is [Compile] with all that the HTTP API shows.
func CompileChain(get Get, req CompileRequest) (*Chain, error) {
	c := &compiler{
		get: get, req: req, root: req.Service.Canonical(),
		chain: &Chain{
			CompiledDiscoveryChain: &api.CompiledDiscoveryChain{
				Nodes: map[string]*api.DiscoveryGraphNode{}, Targets: map[string]*api.DiscoveryTarget{},
			},
			RequestTimeouts: map[string]time.Duration{}, Peers: map[string]string{},
		},
	}
	return c.compile()
}

type compiler struct {
	get   Get
	req   CompileRequest
	root  catalog.ServiceName
	chain *Chain
	proxy *api.ProxyConfigEntry
	// protocol is the one that every service of the chain must have, before any
	// override.
	protocol string
	// plain leaves routers and splitters out: the override asks for what they
	// cannot be in.
	plain    bool
	advanced bool // a router or splitter was used
	// What an override changed.
	gatewayChanged, protocolChanged, timeoutChanged bool
}

// destination is a target before it is resolved.
type destination struct {
	service catalog.ServiceName
	subset  string
	dc      string
	peer    string
}

// id is [SUBSET.]SVC.NS.AP.DC, or SVC.NS.AP.external.PEER.
func (d destination) id() string {
	id := nodeName(d.service)
	if d.peer != "" {
		return id + ".external." + d.peer
	}
	if d.subset != "" {
		id = d.subset + "." + id
	}
	return id + "." + d.dc
}

// redirected returns d moved to where the non-empty arguments say. Another
// service does not have the subsets of this one.
func (d destination) redirected(service, subset, dc, peer string) destination {
	if service != "" && service != d.service.Name {
		d.service.Name, d.subset = service, ""
	}
	if subset != "" {
		d.subset = subset
	}
	if dc != "" {
		d.dc = dc
	}
	if peer != "" {
		d.peer, d.subset, d.dc = peer, "", ""
	}
	return d
}

func nodeName(s catalog.ServiceName) string {
	return s.Name + "." + s.Namespace + "." + s.Partition
}

func nodeKey(n *api.DiscoveryGraphNode) string { return n.Type + ":" + n.Name }

func (c *compiler) compile() (*Chain, error) {
	var err error
	if c.proxy, err = lookup[*api.ProxyConfigEntry](c.get, ProxyDefaults, Global); err != nil {
		return nil, err
	}
	sd, err := c.serviceDefaults(c.root.Name)
	if err != nil {
		return nil, err
	}
	c.protocol = c.protocolOf(sd)
	final := c.protocol
	if o := strings.ToLower(c.req.OverrideProtocol); o != "" && o != c.protocol {
		final, c.protocolChanged = o, true
		c.plain = !isHTTP(o) || !isHTTP(c.protocol)
	}

	start, err := c.start()
	if err != nil {
		return nil, err
	}
	if err := c.findCycle(start); err != nil {
		return nil, err
	}
	if c.advanced && !isHTTP(final) {
		return nil, fmt.Errorf("discovery chain %q uses a protocol %q that does not permit advanced routing or splitting behavior", c.root.Name, final)
	}
	if err := c.flatten(start); err != nil {
		return nil, err
	}
	c.prune(start)

	out := c.chain
	out.ServiceName, out.Namespace = c.root.Name, c.root.Namespace
	out.Datacenter, out.Protocol, out.StartNode = c.req.EvaluateInDatacenter, final, start
	if c.proxy != nil {
		out.EnvoyExtensions = append(out.EnvoyExtensions, c.proxy.EnvoyExtensions...)
	}
	if sd != nil {
		out.ServiceMeta = maps.Clone(sd.Meta)
		out.EnvoyExtensions = append(out.EnvoyExtensions, sd.EnvoyExtensions...)
	}
	if r := out.Nodes[start].Resolver; r != nil && r.Default {
		out.Default = out.Targets[r.Target].Service == c.root.Name
	}
	out.CustomizationHash = c.customizationHash()
	return out, nil
}

func (c *compiler) customizationHash() string {
	if !c.gatewayChanged && !c.protocolChanged && !c.timeoutChanged {
		return ""
	}
	h := sha256.New()
	if c.gatewayChanged {
		fmt.Fprintf(h, "gateway=%q\n", c.req.OverrideMeshGateway)
	}
	if c.protocolChanged {
		fmt.Fprintf(h, "protocol=%q\n", strings.ToLower(c.req.OverrideProtocol))
	}
	if c.timeoutChanged {
		fmt.Fprintf(h, "timeout=%d\n", c.req.OverrideConnectTimeout)
	}
	return hex.EncodeToString(h.Sum(nil))[:8]
}

func (c *compiler) serviceDefaults(name string) (*api.ServiceConfigEntry, error) {
	return lookup[*api.ServiceConfigEntry](c.get, ServiceDefaults, name)
}

// protocolOf: a service-defaults entry hides the protocol of proxy-defaults even
// if it has none itself.
func (c *compiler) protocolOf(sd *api.ServiceConfigEntry) string {
	p := ""
	switch {
	case sd != nil:
		p = sd.Protocol
	case c.proxy != nil:
		p = legacyString(c.proxy.Config, keyProtocol)
	}
	return strings.ToLower(cmp.Or(p, protocolTCP))
}

// checkProtocol makes sure that a service speaks what the whole chain does.
func (c *compiler) checkProtocol(name string, sd *api.ServiceConfigEntry) error {
	if p := c.protocolOf(sd); p != c.protocol {
		return fmt.Errorf("discovery chain %q uses inconsistent protocols; service %q has %q which is not %q", c.root.Name, name, p, c.protocol)
	}
	return nil
}

func isHTTP(protocol string) bool {
	switch protocol {
	case "http", "http2", "grpc":
		return true
	}
	return false
}

func (c *compiler) here(service string) destination {
	s := c.root
	if service != "" {
		s.Name = service
	}
	return destination{service: s, dc: c.req.EvaluateInDatacenter}
}

func (c *compiler) start() (string, error) {
	if !c.plain {
		router, err := lookup[*api.ServiceRouterConfigEntry](c.get, ServiceRouter, c.root.Name)
		if err != nil {
			return "", err
		}
		if router != nil {
			return c.router(router)
		}
	}
	return c.splitterOrResolver(c.here(""))
}

func (c *compiler) router(e *api.ServiceRouterConfigEntry) (string, error) {
	c.advanced = true
	n := &api.DiscoveryGraphNode{Type: api.DiscoveryGraphNodeTypeRouter, Name: nodeName(c.root)}
	c.chain.Nodes[nodeKey(n)] = n
	routes := slices.Clone(e.Routes)
	// What no route matches goes to the service itself.
	routes = append(routes, api.ServiceRoute{
		Match:       &api.ServiceRouteMatch{HTTP: &api.ServiceRouteHTTPMatch{PathPrefix: "/"}},
		Destination: &api.ServiceRouteDestination{Service: c.root.Name, Namespace: c.root.Namespace, Partition: c.root.Partition},
	})
	for i := range routes {
		dest := routes[i].Destination
		if dest == nil {
			dest = &api.ServiceRouteDestination{}
		}
		next, err := c.leg(dest.Service, dest.ServiceSubset)
		if err != nil {
			return "", err
		}
		n.Routes = append(n.Routes, &api.DiscoveryRoute{Definition: &routes[i], NextNode: next})
	}
	return nodeKey(n), nil
}

// leg is the node that a route or split leads to. A subset is asked of the
// resolver: a splitter divides a service, not one of its subsets.
func (c *compiler) leg(service, subset string) (string, error) {
	d := c.here(service)
	if subset != "" {
		d.subset = subset
		return c.resolver(d)
	}
	return c.splitterOrResolver(d)
}

func (c *compiler) splitterOrResolver(d destination) (string, error) {
	if c.plain {
		return c.resolver(d)
	}
	n := &api.DiscoveryGraphNode{Type: api.DiscoveryGraphNodeTypeSplitter, Name: nodeName(d.service)}
	key := nodeKey(n)
	if c.chain.Nodes[key] != nil {
		return key, nil
	}
	e, err := lookup[*api.ServiceSplitterConfigEntry](c.get, ServiceSplitter, d.service.Name)
	if err != nil {
		return "", err
	}
	if e == nil || len(e.Splits) == 0 {
		return c.resolver(d)
	}
	c.advanced = true
	c.chain.Nodes[key] = n // before the legs: one of them may lead back here
	for _, s := range e.Splits {
		var next string
		var err error
		if s.Service == "" || s.Service == d.service.Name {
			self := d
			self.subset = s.ServiceSubset
			next, err = c.resolver(self)
		} else {
			next, err = c.leg(s.Service, s.ServiceSubset)
		}
		if err != nil {
			return "", err
		}
		n.Splits = append(n.Splits, &api.DiscoverySplit{Weight: s.Weight, NextNode: next})
		if n.LoadBalancer == nil && c.chain.Nodes[next] != nil {
			n.LoadBalancer = c.chain.Nodes[next].LoadBalancer
		}
	}
	return key, nil
}

// resolver makes the node of a target and of its failovers, and returns its key.
func (c *compiler) resolver(d destination) (string, error) {
	n, e, sd, d, err := c.resolve(d)
	if err != nil {
		return "", err
	}
	key := nodeKey(n)
	if c.chain.Nodes[key] != nil {
		return key, nil
	}
	c.chain.Nodes[key] = n
	if e == nil || len(e.Failover) == 0 {
		return key, nil
	}
	if sd != nil && sd.ExternalSNI != "" {
		return "", externalError(d, "failover")
	}
	f, ok := e.Failover[d.subset]
	if !ok || d.subset == "" {
		if f, ok = e.Failover[Wildcard]; !ok {
			return key, nil
		}
	}
	var to []destination
	switch {
	case len(f.Targets) > 0:
		for _, t := range f.Targets {
			to = append(to, d.redirected(t.Service, t.ServiceSubset, t.Datacenter, t.Peer))
		}
	case len(f.Datacenters) > 0:
		for _, dc := range f.Datacenters {
			to = append(to, d.redirected(f.Service, f.ServiceSubset, dc, ""))
		}
	default:
		to = append(to, d.redirected(f.Service, f.ServiceSubset, "", ""))
	}
	var targets []string
	for _, t := range to {
		if t.id() == d.id() {
			continue
		}
		// A failover's own failover is not followed, its redirect is.
		fn, _, _, _, err := c.resolve(t)
		if err != nil {
			return "", err
		}
		if id := fn.Resolver.Target; id != n.Resolver.Target && !slices.Contains(targets, id) {
			targets = append(targets, id)
		}
	}
	if len(targets) > 0 {
		n.Resolver.Failover = &api.DiscoveryFailover{Targets: targets}
		if f.Policy != nil {
			n.Resolver.Failover.Policy = *f.Policy
		}
	}
	return key, nil
}

// resolve follows redirects and default subsets to the resolver that ends them,
// and returns its node, which it does not put into the graph, and the target,
// which it does.
func (c *compiler) resolve(d destination) (*api.DiscoveryGraphNode, *api.ServiceResolverConfigEntry, *api.ServiceConfigEntry, destination, error) {
	fail := func(err error) (*api.DiscoveryGraphNode, *api.ServiceResolverConfigEntry, *api.ServiceConfigEntry, destination, error) {
		return nil, nil, nil, d, err
	}
	var (
		path []string
		e    *api.ServiceResolverConfigEntry
		sd   *api.ServiceConfigEntry
		err  error
	)
	for {
		path = append(path, d.id())
		if i := slices.Index(path, d.id()); i < len(path)-1 {
			return fail(fmt.Errorf("detected circular resolver redirect: [%s]", strings.Join(path, " -> ")))
		}
		if d.peer != "" {
			e, sd = nil, nil // the other cluster's entries are not known here
			break
		}
		if sd, err = c.serviceDefaults(d.service.Name); err != nil {
			return fail(err)
		}
		if err := c.checkProtocol(d.service.Name, sd); err != nil {
			return fail(err)
		}
		if e, err = lookup[*api.ServiceResolverConfigEntry](c.get, ServiceResolver, d.service.Name); err != nil {
			return fail(err)
		}
		if e == nil {
			break
		}
		external := sd != nil && sd.ExternalSNI != ""
		if r := e.Redirect; r != nil {
			if external {
				return fail(externalError(d, "redirects"))
			}
			if to := d.redirected(r.Service, r.ServiceSubset, r.Datacenter, r.Peer); to != d {
				d = to
				continue
			}
		}
		if external && len(e.Subsets) > 0 {
			return fail(externalError(d, "subsets"))
		}
		if d.subset == "" && e.DefaultSubset != "" {
			d.subset = e.DefaultSubset
			continue
		}
		break
	}
	if d.subset != "" {
		if e == nil {
			return fail(subsetError(d))
		}
		if _, ok := e.Subsets[d.subset]; !ok {
			return fail(subsetError(d))
		}
	}

	timeout := defaultConnectTimeout
	if e != nil && e.ConnectTimeout > 0 {
		timeout = e.ConnectTimeout
	}
	if o := c.req.OverrideConnectTimeout; o > 0 && o != timeout {
		timeout, c.timeoutChanged = o, true
	}
	t := c.target(d, e, sd)
	t.ConnectTimeout = timeout
	n := &api.DiscoveryGraphNode{
		Type: api.DiscoveryGraphNodeTypeResolver, Name: t.ID,
		Resolver: &api.DiscoveryResolver{Default: isDefaultResolver(e), ConnectTimeout: timeout, Target: t.ID},
	}
	if e != nil {
		n.LoadBalancer = e.LoadBalancer
		if e.RequestTimeout > 0 {
			c.chain.RequestTimeouts[n.Name] = e.RequestTimeout
		}
	}
	return n, e, sd, d, nil
}

func subsetError(d destination) error {
	return fmt.Errorf("service %q does not have a subset named %q", d.service.Name, d.subset)
}

func externalError(d destination, what string) error {
	return fmt.Errorf("service %q has an external SNI set; cannot define %s for external services", d.service.Name, what)
}

func isDefaultResolver(e *api.ServiceResolverConfigEntry) bool {
	return e == nil || e.DefaultSubset == "" && len(e.Subsets) == 0 && e.Redirect == nil && len(e.Failover) == 0 &&
		e.ConnectTimeout == 0 && e.RequestTimeout == 0 && e.LoadBalancer == nil
}

func (c *compiler) target(d destination, e *api.ServiceResolverConfigEntry, sd *api.ServiceConfigEntry) *api.DiscoveryTarget {
	id := d.id()
	if t := c.chain.Targets[id]; t != nil {
		return t
	}
	t := &api.DiscoveryTarget{ID: id, Service: d.service.Name, ServiceSubset: d.subset, Namespace: d.service.Namespace, Datacenter: d.dc}
	c.chain.Targets[id] = t
	if e != nil {
		t.Subset = e.Subsets[d.subset]
	}
	if d.peer != "" {
		// Its server name is the exporter's to say.
		c.chain.Peers[id] = d.peer
	} else {
		t.SNI = targetSNI(d, c.req.TrustDomain)
		t.Name = t.SNI
	}
	if sd != nil && sd.ExternalSNI != "" {
		t.SNI, t.External = sd.ExternalSNI, true
		return t // and no gateway: what it names is not in the mesh
	}
	mode := api.MeshGatewayModeDefault
	if sd != nil {
		mode = sd.MeshGateway.Mode
	}
	if mode == "" && c.proxy != nil {
		mode = c.proxy.MeshGateway.Mode
	}
	if o := c.req.OverrideMeshGateway; o != "" && o != mode {
		mode, c.gatewayChanged = o, true
	}
	t.MeshGateway.Mode = mode
	return t
}

// targetSNI is the server name of a target. Package connect has
// the same, for names that no chain made.
func targetSNI(d destination, trustDomain string) string {
	labels := []string{d.service.Name, d.service.Namespace}
	if d.subset != "" {
		labels = append([]string{d.subset}, labels...)
	}
	if d.service.Partition == catalog.DefaultTenancy {
		labels = append(labels, d.dc, "internal", trustDomain)
	} else {
		labels = append(labels, d.service.Partition, d.dc, "internal-v1", trustDomain)
	}
	return strings.Join(labels, ".")
}

func nextNodes(n *api.DiscoveryGraphNode) []string {
	var out []string
	for _, r := range n.Routes {
		out = append(out, r.NextNode)
	}
	for _, s := range n.Splits {
		out = append(out, s.NextNode)
	}
	return out
}

// findCycle refuses a graph in which a splitter leads back to itself.
func (c *compiler) findCycle(start string) error {
	done := map[string]bool{}
	var path []string
	var visit func(key string) error
	visit = func(key string) error {
		if i := slices.Index(path, key); i >= 0 {
			var names []string
			for _, k := range append(slices.Clone(path[i:]), key) {
				names = append(names, c.shortName(k))
			}
			return fmt.Errorf("detected circular reference: [%s]", strings.Join(names, " -> "))
		}
		if done[key] {
			return nil
		}
		path = append(path, key)
		for _, next := range nextNodes(c.chain.Nodes[key]) {
			if err := visit(next); err != nil {
				return err
			}
		}
		path = path[:len(path)-1]
		done[key] = true
		return nil
	}
	return visit(start)
}

func (c *compiler) shortName(key string) string {
	return strings.TrimSuffix(c.chain.Nodes[key].Name, "."+c.root.Namespace+"."+c.root.Partition)
}

// flatten multiplies out splitters that lead to splitters, so that a proxy
// divides traffic once. The graph has no cycle.
func (c *compiler) flatten(start string) error {
	done := map[string]bool{}
	var visit func(key string) error
	visit = func(key string) error {
		if done[key] {
			return nil
		}
		done[key] = true
		n := c.chain.Nodes[key]
		for _, next := range nextNodes(n) {
			if err := visit(next); err != nil {
				return err
			}
		}
		if n.Type != api.DiscoveryGraphNodeTypeSplitter {
			return nil
		}
		var flat []*api.DiscoverySplit
		for _, s := range n.Splits {
			inner := c.chain.Nodes[s.NextNode]
			if inner.Type != api.DiscoveryGraphNodeTypeSplitter {
				flat = append(flat, s)
				continue
			}
			for _, leg := range inner.Splits {
				flat = append(flat, &api.DiscoverySplit{Weight: roundWeight(s.Weight * leg.Weight / 100), NextNode: leg.NextNode})
			}
			if len(flat) > maxLegs {
				return fmt.Errorf("discovery chain %q splits traffic more than %d ways", c.root.Name, maxLegs)
			}
		}
		n.Splits = flat
		return nil
	}
	return visit(start)
}

// roundWeight keeps a weight to two decimals.
func roundWeight(w float32) float32 { return float32(math.Round(float64(w)*100) / 100) }

// prune drops what the start does not lead to: splitters that were multiplied
// out, targets of redirects that went on.
func (c *compiler) prune(start string) {
	nodes, targets := map[string]bool{}, map[string]bool{}
	todo := []string{start}
	for len(todo) > 0 {
		key := todo[len(todo)-1]
		todo = todo[:len(todo)-1]
		if nodes[key] {
			continue
		}
		nodes[key] = true
		n := c.chain.Nodes[key]
		todo = append(todo, nextNodes(n)...)
		if n.Resolver != nil {
			targets[n.Resolver.Target] = true
			if n.Resolver.Failover != nil {
				for _, t := range n.Resolver.Failover.Targets {
					targets[t] = true
				}
			}
		}
	}
	maps.DeleteFunc(c.chain.Nodes, func(k string, _ *api.DiscoveryGraphNode) bool { return !nodes[k] })
	maps.DeleteFunc(c.chain.Targets, func(k string, _ *api.DiscoveryTarget) bool { return !targets[k] })
	maps.DeleteFunc(c.chain.Peers, func(k, _ string) bool { return !targets[k] })
	maps.DeleteFunc(c.chain.RequestTimeouts, func(k string, _ time.Duration) bool {
		return !nodes[api.DiscoveryGraphNodeTypeResolver+":"+k]
	})
}
