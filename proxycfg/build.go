package proxycfg

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/hashicorp/consul/api"
	"github.com/hashicorp/go-memdb"

	"github.com/sluicemesh/sluice/agent/catalog"
	"github.com/sluicemesh/sluice/agent/configentry"
	"github.com/sluicemesh/sluice/agent/connect"
)

// Build makes the snapshot of a connect-proxy or a mesh gateway. It does not
// block, and writes to nothing it reads: instances, chains and certificates are
// shared by all snapshots.
//
// The watch set is never nil, and holds what was read up to an error too, so
// that waiting for it is right in any case. An error wraps [ErrPending] when all
// that is wrong is that answers are outstanding, and [ErrDenied] when the
// proxy's token was refused.
func Build(ctx context.Context, src Source, p Proxy) (*Snapshot, memdb.WatchSet, error) {
	b := &builder{
		src:     src,
		ws:      memdb.NewWatchSet(),
		snap:    &Snapshot{Proxy: p},
		entries: make(map[entryKey]entryAnswer),
	}
	if err := ctx.Err(); err != nil {
		return nil, b.ws, fmt.Errorf("build snapshot: %w", err)
	}
	if p.Service == nil || p.Node == nil {
		return nil, b.ws, errors.New("build snapshot: the proxy has no registration or no node")
	}
	roots, f, err := src.Roots(b.ws)
	if b.need("roots", f, err) {
		b.snap.Roots, b.snap.TrustDomain = roots, strings.ToLower(roots.TrustDomain)
	}
	modes, merged := b.resolve()
	// What follows is read even when something is missing already: the first read
	// of something is what makes a client agent ask for it, and asking for one
	// thing after the other would add up their delays.
	switch p.Service.Kind {
	case api.ServiceKindMeshGateway:
		b.gateway()
	case api.ServiceKindConnectProxy:
		b.sidecar(modes, merged)
	default:
		return nil, b.ws, fmt.Errorf("build snapshot of %q: kind %q needs none", p.Service.ID, p.Service.Kind)
	}
	if err := b.fault(); err != nil {
		return nil, b.ws, fmt.Errorf("build snapshot of %q: %w", p.Service.ID, err)
	}
	return b.snap, b.ws, nil
}

// Incomplete says that something in the snapshot is pending.
func (s *Snapshot) Incomplete() bool {
	if s.Sidecar == nil {
		return false
	}
	return slices.ContainsFunc(s.Sidecar.Upstreams, func(u Upstream) bool {
		return u.Pending || slices.ContainsFunc(u.Targets, func(t Target) bool { return t.Pending })
	})
}

type entryKey struct{ kind, name string }

type entryAnswer struct {
	entry configentry.Entry
	err   error
}

type builder struct {
	src  Source
	ws   memdb.WatchSet
	snap *Snapshot
	// entries are those read so far: one snapshot has one opinion of each.
	entries map[entryKey]entryAnswer
	// readErr is the newest error of get. It tells an entry that cannot be read
	// from a chain that cannot be compiled.
	readErr error
	faults  []error

	gateways    map[string][]*catalog.Instance
	gatewaysErr error
	asked       bool // for gateways
}

// note takes the age of something that was read into the snapshot's.
func (b *builder) note(f catalog.Freshness) {
	b.snap.Index = max(b.snap.Index, f.Index)
	if !f.AsOf.IsZero() && (b.snap.AsOf.IsZero() || f.AsOf.Before(b.snap.AsOf)) {
		b.snap.AsOf = f.AsOf
	}
}

// need notes a read that the snapshot cannot do without, and reports whether
// there was an answer.
func (b *builder) need(what string, f catalog.Freshness, err error) bool {
	if err != nil {
		b.faults = append(b.faults, fmt.Errorf("read %s: %w", what, err))
		return false
	}
	b.note(f)
	return true
}

// fault returns why there is no snapshot. A refusal or a failure is told rather
// than that other answers are outstanding.
func (b *builder) fault() error {
	if len(b.faults) == 0 {
		return nil
	}
	var hard []error
	for _, err := range b.faults {
		if errors.Is(err, ErrDenied) {
			return err
		}
		if !errors.Is(err, ErrPending) {
			hard = append(hard, err)
		}
	}
	if len(hard) > 0 {
		return errors.Join(hard...)
	}
	return b.faults[0]
}

// get is the [configentry.Get] over the source.
func (b *builder) get(kind, name string) (configentry.Entry, error) {
	key := entryKey{kind, name}
	a, ok := b.entries[key]
	if !ok {
		var f catalog.Freshness
		a.entry, f, a.err = b.src.ConfigEntry(b.ws, kind, name)
		if a.err == nil {
			b.note(f)
		} else {
			a.err = fmt.Errorf("read %s/%s: %w", kind, name, a.err)
		}
		b.entries[key] = a
	}
	if a.err != nil {
		b.readErr = a.err
	}
	return a.entry, a.err
}

// resolve merges central configuration into the registration, and returns what
// decided the mode of each upstream; ok is false when it could not be read.
func (b *builder) resolve() (modes []configentry.UpstreamMode, ok bool) {
	reg := b.snap.Proxy.Service
	r, err := configentry.ResolveService(b.get, reg)
	if err != nil {
		b.faults = append(b.faults, fmt.Errorf("merge central configuration: %w", err))
		return nil, false
	}
	b.snap.Proxy.Service = configentry.MergeService(reg, r)
	return configentry.UpstreamModes(reg, r), true
}

// meshGateways returns the gateways of a datacenter.
func (b *builder) meshGateways(dc string) ([]*catalog.Instance, error) {
	if !b.asked {
		b.asked = true
		var f catalog.Freshness
		b.gateways, f, b.gatewaysErr = b.src.MeshGateways(b.ws)
		if b.gatewaysErr == nil {
			b.note(f)
		}
	}
	return b.gateways[dc], b.gatewaysErr
}

func (b *builder) gateway() {
	g := &Gateway{}
	b.snap.Gateway = g
	reg := b.snap.Proxy.Service

	services, f, err := b.src.ConnectAll(b.ws)
	b.need("services", f, err)
	entries, f, err := b.src.ConfigEntries(b.ws, configentry.ServiceResolver)
	b.need("service resolvers", f, err)
	resolvers := make(map[catalog.ServiceName]*api.ServiceResolverConfigEntry, len(entries))
	for _, e := range entries {
		if r, ok := e.(*api.ServiceResolverConfigEntry); ok {
			resolvers[catalog.ServiceName{Name: r.Name, Namespace: r.Namespace, Partition: r.Partition}.Canonical()] = r
		}
	}
	g.Services = make([]GatewayService, 0, len(services))
	for name, instances := range services {
		if len(instances) == 0 {
			continue
		}
		s := GatewayService{Name: name, Instances: instances, Index: newest(instances), Resolver: resolvers[name]}
		if s.Resolver != nil {
			s.Index = max(s.Index, s.Resolver.ModifyIndex)
		}
		g.Services = append(g.Services, s)
	}
	slices.SortFunc(g.Services, func(x, y GatewayService) int { return compareNames(x.Name, y.Name) })

	if _, err := b.meshGateways(""); err != nil {
		b.need("mesh gateways", catalog.Freshness{}, err)
	}
	for dc, gateways := range b.gateways {
		if dc != b.snap.Proxy.Datacenter && len(gateways) > 0 {
			g.Datacenters = append(g.Datacenters, GatewayDatacenter{Name: dc, Gateways: gateways})
		}
	}
	slices.SortFunc(g.Datacenters, func(x, y GatewayDatacenter) int { return cmp.Compare(x.Name, y.Name) })

	if servers, ok := b.src.(ServerSource); ok && catalog.IsWANFederation(reg) {
		g.CarriesServers = true
		g.Servers, f, err = servers.Servers(b.ws)
		b.need("servers", f, err)
	}

	own, err := b.get(configentry.ServiceDefaults, reg.Service)
	if err != nil {
		b.need("limits", catalog.Freshness{}, err)
	}
	g.Defaults, _ = own.(*api.ServiceConfigEntry)
}

func (b *builder) sidecar(modes []configentry.UpstreamMode, merged bool) {
	reg := b.snap.Proxy.Service
	destination, ok := catalog.DestinationOf(reg)
	if !ok {
		b.faults = append(b.faults, errors.New("the registration names no destination service"))
		return
	}
	sc := &Sidecar{Service: destination}
	b.snap.Sidecar = sc
	var f catalog.Freshness
	var err error
	sc.Leaf, f, err = b.src.Leaf(b.ws, destination)
	b.need("certificate", f, err)
	sc.Intentions, f, err = b.src.Intentions(b.ws, destination)
	b.need("intentions", f, err)
	if !merged || reg.Proxy == nil {
		return // which upstreams there are, and in what mode, is not known
	}
	for i, u := range reg.Proxy.Upstreams {
		if u.CentrallyConfigured && u.LocalBindPort == 0 && u.LocalBindSocketPath == "" {
			continue // it carries defaults for transparent proxies
		}
		sc.Upstreams = append(sc.Upstreams, b.upstream(u, modes[i].From))
	}
}

// upstream resolves one upstream. It never fails: what is wrong or missing is
// said in the upstream.
func (b *builder) upstream(u api.Upstream, modeFrom string) Upstream {
	out := Upstream{Config: u, Mode: u.MeshGateway.Mode}
	if out.Mode != "" {
		out.ModeFrom = modeFrom
	}
	switch {
	case u.DestinationType == api.UpstreamDestTypePreparedQuery:
		out.Err = "prepared queries are not supported"
		return out
	case u.DestinationPeer != "":
		out.Err = "cluster peering is not supported"
		return out
	}
	name := catalog.ServiceName{Name: u.DestinationName, Namespace: u.DestinationNamespace, Partition: u.DestinationPartition}.Canonical()
	req := configentry.CompileRequest{
		Service:              name,
		EvaluateInDatacenter: strings.ToLower(cmp.Or(u.Datacenter, b.snap.Proxy.Datacenter)),
		TrustDomain:          b.snap.TrustDomain,
		OverrideMeshGateway:  u.MeshGateway.Mode,
	}
	if p, ok := u.Config["protocol"].(string); ok {
		req.OverrideProtocol = p
	}
	b.readErr = nil
	chain, err := configentry.CompileChain(b.get, req)
	if err != nil {
		if b.readErr != nil {
			out.Pending = true
			if !errors.Is(b.readErr, ErrPending) {
				out.Err = b.readErr.Error()
			}
			return out
		}
		out.Err = err.Error()
		return out
	}
	out.Chain = chain.CompiledDiscoveryChain
	node, warnings := resolverNode(out.Chain)
	out.Warnings = warnings
	if node == nil {
		out.Err = "its discovery chain leads to no resolver"
		return out
	}
	ids := []string{node.Resolver.Target}
	if fo := node.Resolver.Failover; fo != nil {
		ids = append(ids, fo.Targets...)
	}
	for i, id := range ids {
		if peer := chain.Peers[id]; peer != "" {
			// A failover that cannot be used leaves the others as they are.
			text := fmt.Sprintf("its target in cluster %s is left out: cluster peering is not supported", peer)
			if i == 0 {
				out.Err = text
				return out
			}
			out.Warnings = append(out.Warnings, text)
			continue
		}
		dt := chain.Targets[id]
		if dt == nil {
			out.Err = fmt.Sprintf("its discovery chain lacks target %q", id)
			return out
		}
		t := b.target(dt, name.Partition, out.ModeFrom)
		t.ConnectTimeout = cmp.Or(dt.ConnectTimeout, node.Resolver.ConnectTimeout)
		t.LoadBalancer = node.LoadBalancer
		out.Targets = append(out.Targets, t)
	}
	out.Mode, out.ModeFrom = out.Targets[0].Mode, out.Targets[0].ModeFrom
	return out
}

// resolverNode walks to the resolver that a connection leads to. A connection
// cannot be routed or split by request: it takes the router's last route, which
// matches everything, and the splitter's greatest share.
func resolverNode(chain *api.CompiledDiscoveryChain) (*api.DiscoveryGraphNode, []string) {
	var warnings []string
	next := chain.StartNode
	for range len(chain.Nodes) + 1 {
		n := chain.Nodes[next]
		switch {
		case n == nil:
			return nil, warnings
		case n.Type == api.DiscoveryGraphNodeTypeResolver && n.Resolver != nil:
			return n, warnings
		case n.Type == api.DiscoveryGraphNodeTypeRouter && len(n.Routes) > 0:
			if len(n.Routes) > 1 {
				warnings = append(warnings, "its service-router has rules about requests, which are not looked at; connections take the default route")
			}
			next = n.Routes[len(n.Routes)-1].NextNode
		case n.Type == api.DiscoveryGraphNodeTypeSplitter && len(n.Splits) > 0:
			best := slices.MaxFunc(n.Splits, func(a, b *api.DiscoverySplit) int {
				return cmp.Or(cmp.Compare(a.Weight, b.Weight), cmp.Compare(b.NextNode, a.NextNode))
			})
			if len(n.Splits) > 1 {
				warnings = append(warnings, fmt.Sprintf("its service-splitter divides requests, which are not looked at; connections take the share of %g%%", best.Weight))
			}
			next = best.NextNode
		default:
			return nil, warnings
		}
	}
	return nil, warnings
}

// target finds the instances of a target. There is no way back
// to dialling directly where a mode asks for gateways and there are none.
func (b *builder) target(dt *api.DiscoveryTarget, partition, modeFrom string) Target {
	name := catalog.ServiceName{Name: dt.Service, Namespace: dt.Namespace, Partition: partition}.Canonical()
	t := Target{
		Service:     name,
		Subset:      dt.ServiceSubset,
		Filter:      dt.Subset.Filter,
		OnlyPassing: dt.Subset.OnlyPassing,
		Datacenter:  dt.Datacenter,
		Mode:        dt.MeshGateway.Mode,
		SNI:         dt.SNI,
		SPIFFE:      connect.ServiceID{TrustDomain: b.snap.TrustDomain, Service: name, Datacenter: dt.Datacenter}.URI(),
	}
	if t.Mode != "" {
		t.ModeFrom = cmp.Or(modeFrom, b.targetModeFrom(dt.Service))
	}
	own := b.snap.Proxy.Datacenter
	var err error
	switch {
	case dt.Datacenter != own && t.Mode == api.MeshGatewayModeRemote:
		t.Via, t.ViaDC, t.WAN = ViaGateway, dt.Datacenter, true
		t.Instances, err = b.meshGateways(dt.Datacenter)
	case dt.Datacenter != own && t.Mode == api.MeshGatewayModeLocal:
		t.Via, t.ViaDC, t.WAN = ViaGateway, own, false
		t.Instances, err = b.meshGateways(own)
	default:
		t.Via, t.ViaDC, t.WAN = ViaDirect, dt.Datacenter, dt.Datacenter != own
		var f catalog.Freshness
		t.Instances, f, err = b.src.Connect(b.ws, dt.Datacenter, name)
		if err == nil {
			b.note(f)
		}
	}
	if err != nil {
		t.Instances, t.Pending = nil, true
		if !errors.Is(err, ErrPending) {
			t.Err = err.Error()
		}
	}
	t.Index = newest(t.Instances)
	return t
}

// targetModeFrom says what gave a target its mode where the caller's side gave
// none.
func (b *builder) targetModeFrom(service string) string {
	e, err := b.get(configentry.ServiceDefaults, service)
	if sd, ok := e.(*api.ServiceConfigEntry); err == nil && ok && sd.MeshGateway.Mode != "" {
		return configentry.ServiceDefaults + "/" + service
	}
	return configentry.FromProxyDefaults
}

// newest returns the index of the newest record that instances are made of.
func newest(instances []*catalog.Instance) uint64 {
	var index uint64
	for _, inst := range instances {
		index = max(index, inst.Service.ModifyIndex, inst.Node.ModifyIndex)
		for _, c := range inst.Checks {
			index = max(index, c.ModifyIndex)
		}
	}
	return index
}

func compareNames(a, b catalog.ServiceName) int {
	return cmp.Or(
		cmp.Compare(a.Name, b.Name),
		cmp.Compare(a.Namespace, b.Namespace),
		cmp.Compare(a.Partition, b.Partition),
	)
}
