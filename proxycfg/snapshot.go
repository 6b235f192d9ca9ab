package proxycfg

import (
	"time"

	"github.com/hashicorp/consul/api"

	"github.com/sluicemesh/sluice/acl"
	"github.com/sluicemesh/sluice/agent/catalog"
	"github.com/sluicemesh/sluice/agent/configentry"
	"github.com/sluicemesh/sluice/agent/connect"
)

// Proxy is a proxy or gateway registered on this agent.
type Proxy struct {
	// Service is the registration, sidecar expanded, before central
	// configuration is merged in: Build merges, so that one snapshot never mixes
	// two moments.
	Service *catalog.Service
	// Node is this agent's node; its address serves where the service has none.
	Node       *catalog.Node
	Datacenter string
	// Domain is the agent's DNS domain, of which the servers' names are; "" means
	// consul.
	Domain string
	Token  acl.Secret
	// DefaultAllow is what a sidecar does with a client that no intention
	// matches; the zero value refuses.
	DefaultAllow bool
}

// Snapshot is everything one proxy needs to know, as true at one moment. It is
// never written to after Build returns.
type Snapshot struct {
	// Proxy.Service here is the merged registration.
	Proxy       Proxy
	TrustDomain string
	Roots       *connect.Roots
	// Exactly one of the two is set, by the proxy's kind.
	Gateway *Gateway
	Sidecar *Sidecar
	// Index is the highest index of all reads; AsOf the oldest of their times.
	Index uint64
	AsOf  time.Time
}

// Gateway is the part of a snapshot that a mesh gateway needs.
type Gateway struct {
	// Services are this datacenter's, by name; each has at least one instance.
	Services []GatewayService
	// Datacenters are the other datacenters that have gateways, by name.
	Datacenters []GatewayDatacenter
	// CarriesServers says that servers reach other datacenters' servers through
	// this gateway (its meta has consul-wan-federation), and Servers are this
	// datacenter's.
	CarriesServers bool
	Servers        []*catalog.Instance
	// Defaults is the service-defaults entry of the gateway's own name, or nil.
	Defaults *api.ServiceConfigEntry
}

// GatewayService is a local service that the gateway forwards to.
type GatewayService struct {
	Name      catalog.ServiceName
	Instances []*catalog.Instance
	Index     uint64 // highest of its instances' and its resolver's
	// Resolver is nil where the service has none.
	Resolver *api.ServiceResolverConfigEntry
}

// GatewayDatacenter is another datacenter and its gateways.
type GatewayDatacenter struct {
	Name     string
	Gateways []*catalog.Instance
}

// Sidecar is the part of a snapshot that a connect-proxy needs.
type Sidecar struct {
	// Service is the service the proxy stands in front of.
	Service    catalog.ServiceName
	Leaf       *connect.Leaf
	Intentions []*configentry.Intention
	// Upstreams are in the order of the registration.
	Upstreams []Upstream
}

// Upstream is one upstream of a sidecar, resolved.
type Upstream struct {
	// Config is the upstream as merged.
	Config api.Upstream
	// Mode is the one that was chosen by precedence, and ModeFrom says by what:
	// "upstream", "service instance", "service-defaults/web override", …
	Mode     api.MeshGatewayMode
	ModeFrom string
	Chain    *api.CompiledDiscoveryChain
	// Targets are the chain's primary target, then its failovers in order.
	Targets []Target
	// Err says why there are no targets (a chain that does not compile), and
	// Pending that they are not known (yet): what was known of them stays good.
	Err     string
	Pending bool
	// Warnings are parts of the chain that a connection, as opposed to a request,
	// cannot follow.
	Warnings []string
}

// Target is a service in a datacenter that an upstream may connect to.
type Target struct {
	Service        catalog.ServiceName
	Subset         string
	Filter         string // of the subset, over direct instances; "" is all
	Datacenter     string
	Mode           api.MeshGatewayMode
	ModeFrom       string // as in [Upstream]
	SNI            string
	SPIFFE         string // the identity its certificate must have
	ConnectTimeout time.Duration
	LoadBalancer   *api.LoadBalancer
	// Via says what Instances are: the service's own, or the gateways of a
	// datacenter.
	Via       Via
	ViaDC     string
	Instances []*catalog.Instance
	// WAN says that the instances are to be reached by their WAN addresses.
	WAN bool
	// Pending is true while the instances are not known: not the same as none.
	Pending bool
	// Err says why they are not, where it is more than that no answer has come.
	Err         string
	OnlyPassing bool
	Index       uint64
}

// Via is the kind of hop that a target's instances are.
type Via string

// The kinds of hop.
const (
	ViaDirect  Via = "direct"
	ViaGateway Via = "gateway"
)
