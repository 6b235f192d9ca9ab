package gateway

import (
	"cmp"
	"errors"
	"fmt"
	"reflect"
	"slices"

	"github.com/hashicorp/consul/api"

	"github.com/sluicemesh/sluice/agent/catalog"
	"github.com/sluicemesh/sluice/agent/configentry"
	"github.com/sluicemesh/sluice/agent/connect"
	"github.com/sluicemesh/sluice/proxycfg"
)

// localApp is the cluster of the service that a sidecar stands in front of.
const localApp = "local_app"

// sidecar fills in the table of a connect-proxy.
func sidecar(t *Table, s *proxycfg.Snapshot) error {
	reg := s.Proxy.Service
	if reg.Proxy == nil || s.Sidecar.Leaf == nil || s.Roots == nil || len(s.Roots.Roots) == 0 {
		return errors.New("the snapshot has no certificate, no roots or no proxy block")
	}
	t.Identity = identity(s.Sidecar.Leaf, s.Roots)
	conf := &settings{values: reg.Proxy.Config}
	own := Origin{Object: "registration/" + reg.ID, Datacenter: t.Datacenter, Index: reg.ModifyIndex}

	host := cmp.Or(conf.string("bind_address"), reg.Address, "0.0.0.0")
	port := conf.int(reg.Port, "bind_port")
	limit := max(0, conf.int(0, "max_inbound_connections"))
	t.Listeners = append(t.Listeners, Listener{
		Name:           "public_listener:" + hostPort(host, port),
		Network:        "tcp",
		Address:        hostPort(host, port),
		Mode:           ListenInbound,
		Cluster:        localApp,
		MaxConnections: limit,
		Authorise:      authorisation(t, s),
		Origin:         own,
	})
	app := Cluster{
		Name:           localApp,
		ConnectTimeout: conf.milliseconds(DefaultConnectTimeout, "local_connect_timeout_ms"),
		MaxConnections: limit,
		Origin:         own,
	}
	switch {
	case reg.Proxy.LocalServiceSocketPath != "":
		app.Endpoints = []Endpoint{{Network: "unix", Address: reg.Proxy.LocalServiceSocketPath, Healthy: true, Weight: 1, Origin: own}}
	case reg.Proxy.LocalServicePort > 0:
		app.Endpoints = []Endpoint{{
			Address: cmp.Or(reg.Proxy.LocalServiceAddress, "127.0.0.1"), Port: reg.Proxy.LocalServicePort,
			Healthy: true, Weight: 1, Origin: own,
		}}
	default:
		t.warn("service %s: the proxy has neither a port nor a socket of it", s.Sidecar.Service)
	}
	t.Clusters = append(t.Clusters, app)

	bound := map[string]string{"tcp " + t.Listeners[0].Address: t.Listeners[0].Name}
	for i := range s.Sidecar.Upstreams {
		upstream(t, s, &s.Sidecar.Upstreams[i], own, bound)
	}
	t.Warnings = append(t.Warnings, conf.warnings()...)
	return nil
}

func identity(leaf *connect.Leaf, roots *connect.Roots) *Identity {
	id := &Identity{
		SPIFFE:        leaf.ServiceURI,
		CertPEM:       leaf.CertPEM,
		PrivateKeyPEM: leaf.PrivateKeyPEM,
		NotAfter:      leaf.ValidBefore,
	}
	for _, r := range roots.Roots {
		id.RootsPEM = append(id.RootsPEM, r.RootCert)
	}
	return id
}

// authorisation turns intentions into rules. The first intention of a source
// counts; the input is in order of precedence, so that is the most exact one.
func authorisation(t *Table, s *proxycfg.Snapshot) *Authorisation {
	a := &Authorisation{DefaultAllow: s.Proxy.DefaultAllow}
	seen := make(map[catalog.ServiceName]bool)
	for _, in := range s.Sidecar.Intentions {
		if in.SourcePeer != "" || in.SourceSamenessGroup != "" {
			t.warn("intention from %s to %s is left out: sources of other clusters are not supported", in.SourceName, s.Sidecar.Service)
			continue
		}
		source := catalog.ServiceName{Name: in.SourceName, Namespace: in.SourceNS, Partition: in.SourcePartition}.Canonical()
		if seen[source] {
			continue
		}
		seen[source] = true
		allow := in.Action == api.IntentionActionAllow
		if len(in.Permissions) > 0 {
			// As Consul does where the service does not speak HTTP: a condition that
			// cannot be checked is not met.
			allow = false
			t.warn("intention from %s to %s refuses: its permissions are about HTTP requests, which are not looked at", in.SourceName, s.Sidecar.Service)
		}
		a.Rules = append(a.Rules, AuthoriseRule{
			Source:     source,
			Allow:      allow,
			Precedence: in.Precedence,
			Origin:     Origin{Object: "config/" + configentry.ServiceIntentions + "/" + in.DestinationName, Datacenter: t.Datacenter, Index: in.ModifyIndex},
		})
	}
	slices.SortStableFunc(a.Rules, func(x, y AuthoriseRule) int { return cmp.Compare(y.Precedence, x.Precedence) })
	return a
}

// upstreamID names an upstream as Consul does.
func upstreamID(u *api.Upstream) string {
	switch {
	case u.DestinationType == api.UpstreamDestTypePreparedQuery:
		return "prepared_query:" + u.DestinationName
	case u.DestinationPeer != "":
		return u.DestinationName + "?peer=" + u.DestinationPeer
	case u.Datacenter != "":
		return u.DestinationName + "?dc=" + u.Datacenter
	}
	return u.DestinationName
}

// upstreamListener returns the name and address of an upstream's listener; the
// address is empty where it has none.
func upstreamListener(u *api.Upstream) Listener {
	l := Listener{Network: "tcp", Mode: ListenUpstream}
	switch {
	case u.LocalBindSocketPath != "":
		l.Network, l.Address, l.SocketMode = "unix", u.LocalBindSocketPath, u.LocalBindSocketMode
	case u.LocalBindPort > 0:
		l.Address = hostPort(cmp.Or(u.LocalBindAddress, "127.0.0.1"), u.LocalBindPort)
	}
	l.Name = upstreamID(u) + ":" + l.Address
	return l
}

// upstream adds the listener and the clusters of one upstream.
func upstream(t *Table, s *proxycfg.Snapshot, u *proxycfg.Upstream, own Origin, bound map[string]string) {
	id := upstreamID(&u.Config)
	for _, w := range u.Warnings {
		t.warn("upstream %s: %s", id, w)
	}
	if u.Err != "" && !u.Pending {
		t.warn("upstream %s: %s", id, u.Err)
		return
	}
	l := upstreamListener(&u.Config)
	if l.Address == "" {
		t.warn("upstream %s: it has neither a port nor a socket to be reached by", id)
		return
	}
	l.Origin = own
	if other, ok := bound[l.Network+" "+l.Address]; ok {
		t.warn("upstream %s: its address %s is that of %s, which has it", id, l.Address, other)
		return
	}
	bound[l.Network+" "+l.Address] = l.Name

	conf := &settings{values: u.Config.Config}
	if u.Pending {
		l.Cluster = t.addCluster(Cluster{
			Name:           "pending~" + id,
			Pending:        true,
			ConnectTimeout: conf.milliseconds(DefaultConnectTimeout, "connect_timeout_ms"),
			TLS:            &ClientTLS{},
			Origin:         own,
		})
		t.Listeners = append(t.Listeners, l)
		t.warn("upstream %s: %s", id, cmp.Or(u.Err, "where it leads is not known yet"))
		return
	}

	limit := 0
	if limits, ok := conf.block("limits"); ok {
		limit = max(0, limits.int(0, "max_connections", "MaxConnections"))
		t.Warnings = append(t.Warnings, limits.warnings()...)
	}
	var failover []string
	// Backwards, because the first names the others.
	for i := len(u.Targets) - 1; i >= 0; i-- {
		target := &u.Targets[i]
		cl := targetCluster(t, s, u, target, id)
		cl.MaxConnections = limit
		if ms := conf.milliseconds(0, "connect_timeout_ms"); ms > 0 {
			cl.ConnectTimeout = ms
		}
		cl.Name = target.SNI
		if u.Chain != nil && u.Chain.CustomizationHash != "" {
			cl.Name = u.Chain.CustomizationHash + "~" + cl.Name
		}
		if i > 0 {
			cl.Name = fmt.Sprintf("failover-target~%d~%s", i, cl.Name)
			failover = append([]string{t.addCluster(cl)}, failover...)
			continue
		}
		cl.Failover = failover
		l.Cluster = t.addCluster(cl)
	}
	if l.Cluster == "" {
		t.warn("upstream %s: its discovery chain has no target", id)
		return
	}
	t.Listeners = append(t.Listeners, l)
	t.Warnings = append(t.Warnings, conf.warnings()...)
}

// targetCluster makes the cluster of one target, without name and limits, and
// warns of what makes it useless.
func targetCluster(t *Table, s *proxycfg.Snapshot, u *proxycfg.Upstream, target *proxycfg.Target, id string) Cluster {
	cl := Cluster{
		Pending:        target.Pending,
		ConnectTimeout: cmp.Or(target.ConnectTimeout, DefaultConnectTimeout),
		TLS:            &ClientTLS{ServerName: target.SNI},
		Origin:         Origin{Object: "service/" + target.Service.String(), Datacenter: target.Datacenter, Index: target.Index},
	}
	if target.SPIFFE != "" {
		cl.TLS.SPIFFE = []string{target.SPIFFE}
	}
	var known bool
	if cl.Policy, known = policy(target.LoadBalancer); !known {
		t.warn("upstream %s: load-balancer policy %s looks at requests; connections go to the least loaded", id, target.LoadBalancer.Policy)
	}
	instances, onlyPassing := target.Instances, target.OnlyPassing
	if target.Via == proxycfg.ViaGateway {
		cl.Origin = Origin{Object: "mesh-gateways/" + target.ViaDC, Datacenter: target.ViaDC, Index: target.Index}
		// COMPAT: the health of each gateway counts. Consul overrides it with that of
		// the service behind, which it asks the other datacenter for.
		onlyPassing = false
	} else {
		var err error
		if instances, err = matching(instances, target.Filter); err != nil {
			t.warn("upstream %s: subset %s: %v", id, target.Subset, err)
		}
	}
	cl.Endpoints = endpoints(instances, cmp.Or(target.ViaDC, target.Datacenter), target.WAN, onlyPassing)

	what := id
	if target.Service.Name != u.Config.DestinationName || target.Datacenter != cmp.Or(u.Config.Datacenter, s.Proxy.Datacenter) {
		what += " (target " + target.Service.String() + " in " + target.Datacenter + ")"
	}
	mode := "mode " + cmp.Or(string(target.Mode), "unset")
	if target.ModeFrom != "" {
		mode += " from " + target.ModeFrom
	}
	switch why := allUnhealthy(cl.Endpoints); {
	case target.Pending && target.Err != "":
		t.warn("upstream %s: its endpoints are not known: %s (%s)", what, target.Err, mode)
	case target.Pending:
		t.warn("upstream %s: its endpoints are not known yet (%s)", what, mode)
	case len(cl.Endpoints) == 0 && target.Via == proxycfg.ViaGateway:
		t.warn("upstream %s: datacenter %s has no mesh gateway known here (%s)", what, target.ViaDC, mode)
	case len(cl.Endpoints) == 0 && len(target.Instances) > 0:
		t.warn("upstream %s: none of the %d instances in datacenter %s is in subset %s", what, len(target.Instances), target.Datacenter, target.Subset)
	case len(cl.Endpoints) == 0 && target.Datacenter != s.Proxy.Datacenter:
		t.warn("upstream %s: datacenter %s has no instance of it (%s)", what, target.Datacenter, mode)
	case len(cl.Endpoints) == 0:
		t.warn("upstream %s: datacenter %s has no instance of it", what, target.Datacenter)
	case why != "" && target.Via == proxycfg.ViaGateway:
		t.warn("upstream %s: no mesh gateway of datacenter %s is healthy: %s (%s)", what, target.ViaDC, why, mode)
	case why != "":
		t.warn("upstream %s: no instance in datacenter %s is healthy: %s", what, target.Datacenter, why)
	}
	return cl
}

// addCluster adds a cluster and returns its name. Two upstreams may lead to the
// same target: they share the cluster where it is the same, and the later one
// has a name of its own where they differ (a limit, a timeout).
func (t *Table) addCluster(cl Cluster) string {
	base := cl.Name
	for n := 2; ; n++ {
		i := slices.IndexFunc(t.Clusters, func(x Cluster) bool { return x.Name == cl.Name })
		if i < 0 {
			t.Clusters = append(t.Clusters, cl)
			return cl.Name
		}
		if reflect.DeepEqual(t.Clusters[i], cl) {
			return cl.Name
		}
		cl.Name = fmt.Sprintf("%s~%d", base, n)
	}
}
