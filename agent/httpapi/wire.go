package httpapi

import (
	"github.com/hashicorp/consul/api"

	"github.com/sluicemesh/sluice/agent/catalog"
)

// The wire forms below differ from the public API's own types in which fields
// are left out when they are empty: clients of other languages rely on it.

// flatService is an instance as /v1/catalog/service shows it.
type flatService struct {
	ID                       string
	Node                     string
	Address                  string
	Datacenter               string
	TaggedAddresses          map[string]string
	NodeMeta                 map[string]string
	ServiceKind              catalog.Kind
	ServiceID                string
	ServiceName              string
	ServiceTags              []string
	ServiceAddress           string
	ServiceTaggedAddresses   map[string]api.ServiceAddress `json:",omitempty"`
	ServiceWeights           api.AgentWeights
	ServiceMeta              map[string]string
	ServicePort              int
	ServiceSocketPath        string
	ServiceEnableTagOverride bool
	ServiceProxy             wireProxy
	ServiceConnect           wireConnect
	ServiceLocality          *api.Locality `json:",omitempty"`
	CreateIndex              uint64
	ModifyIndex              uint64
}

func flatten(inst *catalog.Instance) *flatService {
	n, s := inst.Node, inst.Service
	return &flatService{
		ID: n.ID, Node: n.Node, Address: n.Address, Datacenter: n.Datacenter, TaggedAddresses: n.TaggedAddresses, NodeMeta: n.Meta,
		ServiceKind: s.Kind, ServiceID: s.ID, ServiceName: s.Service, ServiceTags: s.Tags, ServiceAddress: s.Address,
		ServiceTaggedAddresses: s.TaggedAddresses, ServiceWeights: s.Weights, ServiceMeta: s.Meta, ServicePort: s.Port,
		ServiceSocketPath: s.SocketPath, ServiceEnableTagOverride: s.EnableTagOverride,
		ServiceProxy: proxyOf(s), ServiceConnect: connectOf(s), ServiceLocality: s.Locality,
		CreateIndex: s.CreateIndex, ModifyIndex: s.ModifyIndex,
	}
}

// wireProxy is a proxy's configuration that is shown even where there is none.
type wireProxy struct {
	EnvoyExtensions        []api.EnvoyExtension `json:",omitempty"`
	DestinationServiceName string               `json:",omitempty"`
	DestinationServiceID   string               `json:",omitempty"`
	LocalServiceAddress    string               `json:",omitempty"`
	LocalServicePort       int                  `json:",omitempty"`
	LocalServicePorts      api.ServicePorts     `json:",omitempty" bexpr:"-"`
	LocalServiceSocketPath string               `json:",omitempty"`
	Mode                   api.ProxyMode
	TransparentProxy       *api.TransparentProxyConfig `json:",omitempty"`
	Config                 map[string]any              `json:",omitempty" bexpr:"-"`
	Upstreams              []api.Upstream              `json:",omitempty"`
	MeshGateway            api.MeshGatewayConfig
	Expose                 api.ExposeConfig
	AccessLogs             *api.AccessLogsConfig `json:",omitempty"`
}

func proxyOf(s *catalog.Service) wireProxy {
	if s.Proxy == nil {
		return wireProxy{}
	}
	return wireProxy(*s.Proxy)
}

type wireConnect struct {
	Native bool `json:",omitempty"`
}

func connectOf(s *catalog.Service) wireConnect {
	return wireConnect{Native: catalog.IsConnectNative(s)}
}

// nodeService is a service as /v1/health and /v1/catalog/node show it.
type nodeService struct {
	Kind              catalog.Kind `json:",omitempty"`
	ID                string
	Service           string
	Tags              []string
	Address           string
	TaggedAddresses   map[string]api.ServiceAddress `json:",omitempty"`
	Meta              map[string]string
	Port              int
	Ports             api.ServicePorts `json:",omitempty" bexpr:"-"`
	SocketPath        string           `json:",omitempty"`
	Weights           api.AgentWeights
	EnableTagOverride bool
	Proxy             wireProxy
	Connect           wireConnect
	Locality          *api.Locality `json:",omitempty" bexpr:"-"`
	PeerName          string
	CreateIndex       uint64 `bexpr:"-"`
	ModifyIndex       uint64 `bexpr:"-"`
}

func nodeServiceOf(s *catalog.Service) *nodeService {
	return &nodeService{
		Kind: s.Kind, ID: s.ID, Service: s.Service, Tags: s.Tags, Address: s.Address, TaggedAddresses: s.TaggedAddresses,
		Meta: s.Meta, Port: s.Port, Ports: s.Ports, SocketPath: s.SocketPath, Weights: s.Weights, EnableTagOverride: s.EnableTagOverride,
		Proxy: proxyOf(s), Connect: connectOf(s), Locality: s.Locality, PeerName: s.PeerName,
		CreateIndex: s.CreateIndex, ModifyIndex: s.ModifyIndex,
	}
}

// entry is an instance with its node and its checks.
type entry struct {
	Node    *catalog.Node
	Service *nodeService
	Checks  api.HealthChecks
}

func entryOf(inst *catalog.Instance) *entry {
	checks := inst.Checks
	if checks == nil {
		checks = api.HealthChecks{}
	}
	return &entry{Node: inst.Node, Service: nodeServiceOf(inst.Service), Checks: checks}
}
