package config

import (
	"net/netip"
	"time"

	"github.com/hashicorp/consul/api"

	"github.com/sluicemesh/sluice/acl"
	"github.com/sluicemesh/sluice/agent/configentry"
)

// Runtime is a complete and valid configuration: everything is merged, filled in
// and checked. It is immutable; whoever receives it must not change what its
// maps and slices hold. Only the agent's root sees all of it.
type Runtime struct {
	Node        Node
	Network     Network
	Cluster     Cluster
	Connect     Connect
	TLS         TLS
	ACL         ACL
	Log         Log
	Performance Performance
	Limits      Limits
	Telemetry   Telemetry
	HTTP        HTTP
	Health      Health
	DataPlane   DataPlane

	// Services and Checks are those of the files, in the order of the sources.
	Services []Service
	Checks   []Check
	// ConfigEntries are written by the primary's leader where they do not exist.
	ConfigEntries []configentry.Entry
}

// Node says which node of which datacenter this is.
type Node struct {
	Name string
	// ID is the configured one, a lower-case UUID, or empty: see [Node.EnsureID].
	ID   string
	Meta map[string]string
	// Datacenter and PrimaryDatacenter are lower-case; they are equal in the primary.
	Datacenter, PrimaryDatacenter string
	// Domain and AltDomain end in a dot; the latter may be empty.
	Domain, AltDomain string
	// DataDir is empty where nothing is kept: in dev mode.
	DataDir  string
	Dev      bool
	Locality *api.Locality
}

// Network says where the agent listens and how others reach it.
type Network struct {
	// RPC, SerfLAN and SerfWAN are what is bound. The port of SerfWAN is 0 where
	// there is no WAN pool.
	RPC, SerfLAN, SerfWAN netip.AddrPort
	// Advertise is the address that others of the datacenter use, and AdvertiseWAN
	// that of other datacenters; the ports are those that are bound.
	Advertise, AdvertiseWAN netip.Addr
	// TaggedAddresses are those of the node in the catalog: lan, wan and their
	// variants by family.
	TaggedAddresses map[string]string
	// HTTP, HTTPS, GRPC and GRPCTLS are empty where the listener is off.
	HTTP, HTTPS, GRPC, GRPCTLS []Listen
	UnixSocket                 UnixSocket
	// SidecarPorts are what sidecars without a port of their own get; zero turns
	// that off.
	SidecarPorts PortRange
	// TranslateWAN has answers about other datacenters carry WAN addresses.
	TranslateWAN bool
}

// Listen is an address to bind: Network is "tcp" or "unix".
type Listen struct{ Network, Address string }

// String returns the address as a configuration has it.
func (l Listen) String() string {
	if l.Network == "unix" {
		return "unix://" + l.Address
	}
	return l.Address
}

// UnixSocket says who may use a listener's socket; empty fields leave that to
// the system. Mode is octal.
type UnixSocket struct{ User, Group, Mode string }

// PortRange is inclusive.
type PortRange struct{ Min, Max int }

// Cluster is about gossip, raft and membership.
type Cluster struct {
	Server bool
	// Bootstrap lets this server elect itself; else BootstrapExpect servers must
	// have met, where it is not 0.
	Bootstrap       bool
	BootstrapExpect int
	// RetryJoin are addresses, host or host:port, of agents to join through.
	RetryJoin, RetryJoinWAN         []string
	RetryInterval, RetryIntervalWAN time.Duration
	// RetryMax is how many rounds fail before the agent gives up; 0 is never.
	RetryMax, RetryMaxWAN      int
	RejoinAfterLeave           bool
	ReconnectLAN, ReconnectWAN time.Duration
	LANAllowed, WANAllowed     []netip.Prefix // empty allows all
	LeaveOnTerminate           bool
	SkipLeaveOnInterrupt       bool
	LeaveDrain                 time.Duration
	Encrypt                    acl.Secret // gossip key, base64; empty is no encryption
	EncryptVerifyIn            bool
	EncryptVerifyOut           bool
	PrimaryGateways            []string
	PrimaryGatewaysInterval    time.Duration
	MeshGatewayWANFederation   bool
	SyncInterval               time.Duration // of a full anti-entropy, before scaling
	FastTimings                bool          // gossip and raft as one node on loopback may have them
}

// Connect is about the mesh's certificates and intentions.
type Connect struct {
	Enabled    bool
	CAProvider string
	// CAConfig has Consul's CamelCase keys, and not ClusterID.
	CAConfig  map[string]any
	ClusterID string // to be given to a new trust domain; may be empty
	// DefaultAllow is what holds where no intention matches.
	DefaultAllow bool
	// DeregisterCritical is for checks that do not say; 0 is never.
	DeregisterCritical time.Duration
	// CentralConfig merges configuration entries into registrations.
	CentralConfig bool
}

// TLS is what each kind of listener and connection uses, defaults applied.
type TLS struct {
	InternalRPC, HTTPS, GRPC TLSEndpoint
	// ServerName replaces the node's name in what it expects of itself.
	ServerName string
}

// TLSEndpoint names files; the agent reads them.
type TLSEndpoint struct {
	CAFile, CAPath, CertFile, KeyFile string
	MinVersion                        uint16   // a version of crypto/tls
	CipherSuites                      []uint16 // of TLS 1.2; empty is Go's choice
	VerifyIncoming                    bool
	VerifyOutgoing                    bool
	VerifyServerHostname              bool
	// UseAutoCert is of GRPC alone: it serves the agent's own certificate of the mesh.
	UseAutoCert bool
}

// ACL holds the agent's own tokens.
type ACL struct {
	Default, Agent, Replication, InitialManagement, AgentRecovery, ConfigFileService acl.Secret
}

// Log says what is logged and where.
type Log struct {
	Level string // trace, debug, info, warn or error
	JSON  bool
	// File is written besides standard output; it is rotated by age and size, and
	// RotateMaxFiles old ones are kept: 0 is all, -1 none.
	File           string
	RotateDuration time.Duration
	RotateBytes    int
	RotateMaxFiles int
	PIDFile        string
}

// Performance trades load for reaction time.
type Performance struct {
	RaftMultiplier int // 1 to 10
	RPCHold        time.Duration
}

// Limits bound what clients may use.
type Limits struct {
	// HTTPMaxConns and RPCMaxConns are per client address; 0 is no limit.
	HTTPMaxConns, RPCMaxConns    int
	HTTPSHandshake, RPCHandshake time.Duration
}

// Telemetry says which metrics go where.
type Telemetry struct {
	Prefix                           string
	DisableHostname                  bool
	PrometheusRetention              time.Duration // 0 is no Prometheus
	StatsdAddr, StatsiteAddr         string
	AllowedPrefixes, BlockedPrefixes []string
	FilterDefault                    bool // whether a metric that no prefix names is kept
}

// HTTP is about the API.
type HTTP struct {
	BlockEndpoints   []string
	ResponseHeaders  map[string]string
	AllowWriteFrom   []netip.Prefix // empty allows all
	MaxHeaderBytes   int            // 0 is the default of net/http
	DefaultQueryTime time.Duration
	MaxQueryTime     time.Duration
	EnableDebug      bool
	UI               bool
	// Pretty indents all JSON.
	Pretty bool
}

// Health is about checks.
type Health struct {
	UpdateInterval    time.Duration // at least between two syncs of mere output
	OutputMaxSize     int           // bytes
	DiscardOutput     bool
	ScriptChecks      bool // from anywhere
	LocalScriptChecks bool // from files only
}

// DataPlane says what runs the proxies that do not say it themselves.
type DataPlane struct {
	Default string // builtin or none
	Engine  string // of the built-in forwarder: auto, epoll or netpoll
	// How gateways and sidecars are drained where a request does not say: clients
	// have DrainWait to learn of it, then connections DrainTimeout to finish, and
	// what is left is ended at DrainRate per second, 0 being all at once.
	DrainWait, DrainTimeout time.Duration
	DrainRate               float64
	// DrainOnTerminate drains the gateways before SIGTERM stops the agent.
	DrainOnTerminate bool
	// AccessLog writes a line per connection, for AccessLogSample of them: 0 to 1.
	AccessLog       bool
	AccessLogSample float64
}
