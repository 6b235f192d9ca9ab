package configentry

import (
	"encoding/json"
	"time"

	"github.com/hashicorp/consul/api"

	"github.com/sluicemesh/sluice/agent/catalog"
)

// CompileRequest says whose discovery chain is wanted, and as seen by whom.
type CompileRequest struct {
	Service catalog.ServiceName
	// EvaluateInDatacenter is where targets are that name no datacenter: the
	// caller's own, unless its upstream names another.
	EvaluateInDatacenter string
	TrustDomain          string
	// The overrides are the caller's own settings; empty ones change nothing.
	OverrideMeshGateway    api.MeshGatewayMode
	OverrideProtocol       string
	OverrideConnectTimeout time.Duration
}

// Chain is a compiled chain with what the public API's type has no room for. Its
// JSON is that of /v1/discovery-chain.
type Chain struct {
	*api.CompiledDiscoveryChain
	EnvoyExtensions []api.EnvoyExtension
	// RequestTimeouts is by the name of a resolver node; one with none is absent.
	RequestTimeouts map[string]time.Duration
	// Peers is by target ID; a target of this cluster is absent.
	Peers map[string]string
}

// MarshalJSON implements [json.Marshaler].
func (c *Chain) MarshalJSON() ([]byte, error) {
	type failover struct{ Targets []string }
	type resolver struct {
		ConnectTimeout string
		RequestTimeout time.Duration `json:",omitempty"` // nanoseconds, as Consul has it
		Default        bool          `json:",omitempty"`
		Target         string
		Failover       *failover `json:",omitempty"`
	}
	type node struct {
		Type, Name   string
		Routes       []*api.DiscoveryRoute `json:",omitempty"`
		Splits       []*api.DiscoverySplit `json:",omitempty"`
		Resolver     *resolver             `json:",omitempty"`
		LoadBalancer *api.LoadBalancer     `json:",omitempty"`
	}
	type target struct {
		ConnectTimeout       string
		ID, Service          string
		ServiceSubset        string `json:",omitempty"`
		Namespace, Partition string
		Datacenter           string
		Peer                 string `json:",omitempty"`
		MeshGateway          api.MeshGatewayConfig
		Subset               api.ServiceResolverSubset
		TransparentProxy     struct{}
		External             bool   `json:",omitempty"`
		SNI                  string `json:",omitempty"`
		Name                 string `json:",omitempty"`
	}
	nodes := make(map[string]node, len(c.Nodes))
	for k, n := range c.Nodes {
		out := node{Type: n.Type, Name: n.Name, Routes: n.Routes, Splits: n.Splits, LoadBalancer: n.LoadBalancer}
		if r := n.Resolver; r != nil {
			out.Resolver = &resolver{
				ConnectTimeout: r.ConnectTimeout.String(), RequestTimeout: c.RequestTimeouts[n.Name],
				Default: r.Default, Target: r.Target,
			}
			if r.Failover != nil {
				out.Resolver.Failover = &failover{r.Failover.Targets}
			}
		}
		nodes[k] = out
	}
	targets := make(map[string]target, len(c.Targets))
	for k, t := range c.Targets {
		targets[k] = target{
			ConnectTimeout: t.ConnectTimeout.String(), ID: t.ID, Service: t.Service, ServiceSubset: t.ServiceSubset,
			Namespace: t.Namespace, Partition: catalog.DefaultTenancy, Datacenter: t.Datacenter, Peer: c.Peers[k],
			MeshGateway: t.MeshGateway, Subset: t.Subset, External: t.External, SNI: t.SNI, Name: t.Name,
		}
	}
	return json.Marshal(struct {
		ServiceName, Namespace, Partition, Datacenter string
		CustomizationHash                             string               `json:",omitempty"`
		Default                                       bool                 `json:",omitempty"`
		Protocol                                      string               `json:",omitempty"`
		ServiceMeta                                   map[string]string    `json:",omitempty"`
		EnvoyExtensions                               []api.EnvoyExtension `json:",omitempty"`
		StartNode                                     string
		Nodes                                         map[string]node
		Targets                                       map[string]target
		AutoVirtualIPs, ManualVirtualIPs              []string
	}{
		ServiceName: c.ServiceName, Namespace: c.Namespace, Partition: catalog.DefaultTenancy, Datacenter: c.Datacenter,
		CustomizationHash: c.CustomizationHash, Default: c.Default, Protocol: c.Protocol, ServiceMeta: c.ServiceMeta,
		EnvoyExtensions: c.EnvoyExtensions, StartNode: c.StartNode, Nodes: nodes, Targets: targets,
		AutoVirtualIPs: []string{}, ManualVirtualIPs: []string{},
	})
}
