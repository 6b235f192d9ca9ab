package gateway

import (
	"encoding/json"
	"strings"
	"time"

	"github.com/sluicemesh/sluice/acl"
	"github.com/sluicemesh/sluice/agent/catalog"
)

// Table says what a data plane does with a connection. It is immutable, its
// slices are sorted by name, and two equal tables have equal JSON.
//
// Every element carries its [Origin]. Data planes translate the table, and
// derive nothing else.
type Table struct {
	// Proxy is the service ID of the proxy that the table is for.
	Proxy       string
	Kind        catalog.Kind
	Service     string // the name the proxy is registered under
	Datacenter  string
	TrustDomain string `json:",omitempty"`
	// Zone is the locality of the proxy ("region/zone"), "" where unknown. Of
	// endpoints of one priority those of the same zone are used first, then those of
	// the same region, then the others.
	Zone string `json:",omitempty"`
	// Index is the highest catalog index the table was made from.
	Index uint64
	// AsOf is when everything in the table was last known to be current.
	AsOf      time.Time
	Listeners []Listener
	Routes    []Route   `json:",omitempty"`
	Clusters  []Cluster `json:",omitempty"`
	// Failback and Rebalance say that connections which are open are ended so that
	// their clients come to better endpoints; nil is never. They are for listeners of
	// mode ListenSNI.
	Failback  *Failback  `json:",omitempty"`
	Rebalance *Rebalance `json:",omitempty"`
	// Identity is what a sidecar presents and trusts; nil for a gateway that
	// terminates nothing.
	Identity *Identity `json:",omitempty"`
	// Warnings are facts an operator should know: an upstream without endpoints
	// and why, a datacenter without gateways.
	Warnings []string `json:",omitempty"`
}

// Failback ends connections that went to a failover cluster, to endpoints of a lower
// priority or farther away because no better ones could be used, once one of those
// can be again.
type Failback struct {
	// Stable is for how long a better endpoint must have been usable.
	Stable time.Duration
	// Rate is how many connections are ended per second, those of all clusters
	// together; 0 is all at once.
	Rate float64 `json:",omitempty"`
}

// Rebalance ends connections of endpoints that have more than their share, which is
// by weight, after others have come or come back.
type Rebalance struct {
	// Stable is for how long an endpoint must have been usable to have a share.
	Stable time.Duration
	// Rate is as for a Failback.
	Rate float64 `json:",omitempty"`
	// Factor is how many times its share an endpoint may keep; at least 1.
	Factor float64
	// MinConnections is how many an endpoint may keep whatever its share is.
	MinConnections int `json:",omitempty"`
}

// ListenerMode says what a listener does with what it accepts.
type ListenerMode string

// The modes of a listener.
const (
	// ListenSNI reads the ClientHello and forwards by Table.Routes, undecrypted.
	ListenSNI ListenerMode = "sni"
	// ListenInbound terminates mutual TLS, authorises, and forwards in plain text
	// to the listener's cluster.
	ListenInbound ListenerMode = "inbound"
	// ListenUpstream accepts plain text and forwards over mutual TLS to the
	// listener's cluster.
	ListenUpstream ListenerMode = "upstream"
)

// Listener is an address that is bound, and what is done there.
type Listener struct {
	Name string
	// Address is ip:port, or the path of a unix socket (Network says which).
	Network string // "tcp" or "unix"
	Address string
	Mode    ListenerMode
	// Cluster is where an inbound or upstream listener forwards to.
	Cluster string `json:",omitempty"`
	// MaxConnections bounds the connections open at one time; 0 is no bound.
	MaxConnections int `json:",omitempty"`
	// Limits are further bounds; nil is none.
	Limits *Limits `json:",omitempty"`
	// ProxyProtocol says whose headers of the PROXY protocol are believed; nil is
	// nobody's.
	ProxyProtocol *ProxyProtocol `json:",omitempty"`
	// IdleTimeout ends a connection on which no byte moved for so long; 0 is the
	// data plane's own, which may be never.
	IdleTimeout time.Duration `json:",omitempty"`
	// CongestionControl is the algorithm of TCP towards clients; "" is the system's.
	CongestionControl string `json:",omitempty"`
	// SocketMode is the octal file mode of a unix socket; "" is the process's.
	SocketMode string `json:",omitempty"`
	// Authorise is set on inbound listeners.
	Authorise *Authorisation `json:",omitempty"`
	Origin    Origin
}

// Limits bound what a listener takes of clients. A field that is 0 is no bound.
// What is beyond a bound is refused as [RefuseLimit].
type Limits struct {
	// ConnectionRate is how many new connections per second are taken, in the long
	// run, and ConnectionBurst how many at once; 0 is as many as in a second.
	ConnectionRate  float64 `json:",omitempty"`
	ConnectionBurst int     `json:",omitempty"`
	// The same for each source, which is an IPv4 address or a /64 of IPv6.
	MaxConnectionsPerSource  int     `json:",omitempty"`
	ConnectionRatePerSource  float64 `json:",omitempty"`
	ConnectionBurstPerSource int     `json:",omitempty"`
	// MaxPendingHellos bounds the clients that have not sent all of their hello, in
	// each of the data plane's threads; the one that waits longest is refused then.
	// 0 is the data plane's own bound.
	MaxPendingHellos int `json:",omitempty"`
}

// ProxyProtocol is what a listener does with headers of the PROXY protocol, of
// either version, which name the source of a connection that came through a load
// balancer.
type ProxyProtocol struct {
	Accept ProxyAccept
	// Trusted are the networks whose headers are believed, as CIDR prefixes.
	Trusted []string `json:",omitempty"`
}

// ProxyAccept says which connections must begin with a header.
type ProxyAccept string

// The ways to accept headers of the PROXY protocol.
const (
	// ProxyOptional takes trusted peers with and without a header, others without.
	ProxyOptional ProxyAccept = "optional"
	// ProxyStrict takes trusted peers with a header, and nobody else.
	ProxyStrict ProxyAccept = "strict"
)

// ProxyVersion is a version of the PROXY protocol.
type ProxyVersion string

// The versions of the PROXY protocol.
const (
	ProxyV1 ProxyVersion = "v1"
	ProxyV2 ProxyVersion = "v2"
)

// Authorisation decides which clients an inbound listener admits: the first rule
// that matches the client's identity, else Default.
type Authorisation struct {
	DefaultAllow bool
	Rules        []AuthoriseRule `json:",omitempty"`
}

// AuthoriseRule matches a client by its SPIFFE service identity. The client's
// datacenter plays no part.
type AuthoriseRule struct {
	// Source is a service name, or "*" for any.
	Source     catalog.ServiceName
	Allow      bool
	Precedence int
	Origin     Origin
}

// Route sends a server name to a cluster.
type Route struct {
	// Match is a server name, lower-case, or "*." and a suffix that one or more
	// labels precede. The exact name wins, then the longest suffix.
	Match   string
	Cluster string
	Origin  Origin
}

// Cluster is a set of endpoints that are as good as each other, in order of
// priority.
type Cluster struct {
	Name string
	// Endpoints are sorted by priority, address and port. Unhealthy ones are
	// listed so that the table can explain itself; they are not dialled.
	Endpoints []Endpoint `json:",omitempty"`
	// Pending is true while it is not known which endpoints there are. Those
	// listed are then what was last known of them, by [Carry].
	Pending bool `json:",omitempty"`
	// ConnectTimeout bounds one attempt to connect to one endpoint.
	ConnectTimeout time.Duration
	// AnswerTimeout is how long an endpoint may take for its first byte before
	// another is asked; 0 is the data plane's default, negative is for ever.
	AnswerTimeout time.Duration `json:",omitempty"`
	// Keepalive of connections to the endpoints; nil is the data plane's default.
	Keepalive *Keepalive `json:",omitempty"`
	Policy    Policy     `json:",omitempty"`
	// MaxConnections bounds the connections open at one time; 0 is no bound.
	MaxConnections int `json:",omitempty"`
	// ConnectionRate is how many new connections per second are taken, in the long
	// run, and ConnectionBurst how many at once; 0 is no bound, and as many as in a
	// second.
	ConnectionRate  float64 `json:",omitempty"`
	ConnectionBurst int     `json:",omitempty"`
	// SendProxy is the version of the PROXY header that the endpoints are sent
	// before anything else; "" is none.
	SendProxy ProxyVersion `json:",omitempty"`
	// CongestionControl is the algorithm of TCP towards the endpoints; "" is the
	// system's.
	CongestionControl string `json:",omitempty"`
	// Probe says that endpoints are connected to for no client; nil is not.
	Probe *Probe `json:",omitempty"`
	// TLS is set where the data plane originates mutual TLS.
	TLS *ClientTLS `json:",omitempty"`
	// Failover names the clusters to use, in order, when this one has no healthy
	// endpoint or none that can be connected to.
	Failover []string `json:",omitempty"`
	Origin   Origin
}

// Probe finds out which endpoints can be connected to before a client has to. What
// it finds counts like what a client's connection finds: enough failures in a row
// take an endpoint out of use for a time, and a success puts it back.
type Probe struct {
	Interval time.Duration
	Timeout  time.Duration // of one attempt to connect
	// All probes every endpoint; without it those are that failed twice in a row.
	All bool `json:",omitempty"`
}

// Policy is how a healthy endpoint is chosen.
type Policy string

// The policies. The zero value is PolicyLeastConnections.
const (
	PolicyLeastConnections Policy = "" // power of two choices, weighted
	PolicyRoundRobin       Policy = "round_robin"
	PolicyRandom           Policy = "random"
)

// Keepalive is TCP keepalive. A zero field is the system's default.
type Keepalive struct {
	Idle, Interval time.Duration
	Probes         int
}

// ClientTLS is what a data plane presents and expects when it originates TLS.
type ClientTLS struct {
	// ServerName is the SNI to send.
	ServerName string
	// SPIFFE are the identities of which the server must have one.
	SPIFFE []string
}

// Endpoint is an address to connect to.
type Endpoint struct {
	// Address is an IP address, a host name, or (Network unix) a path.
	Network string `json:",omitempty"` // "" is tcp
	Address string
	Port    int `json:",omitempty"`
	Healthy bool
	// Weight is at least 1.
	Weight int
	// Priority 0 is used first.
	Priority int `json:",omitempty"`
	// Zone is the locality of the instance ("region/zone"), "" where unknown.
	Zone string `json:",omitempty"`
	// Node and ServiceID name the instance; Why says why it is not healthy.
	Node      string `json:",omitempty"`
	ServiceID string `json:",omitempty"`
	Why       string `json:",omitempty"`
	Origin    Origin
}

// Distance is how far an endpoint in zone is from a proxy in own: 0 in the same
// zone, 1 in the same region, else 2. Where own is not known all are as near.
func Distance(own, zone string) int {
	if own == "" || own == zone {
		return 0
	}
	region, _, _ := strings.Cut(own, "/")
	if r, _, _ := strings.Cut(zone, "/"); r == region && r != "" {
		return 1
	}
	return 2
}

// Identity is the certificate that a sidecar presents and the roots it trusts.
type Identity struct {
	SPIFFE        string
	CertPEM       string
	PrivateKeyPEM acl.Secret
	RootsPEM      []string
	NotAfter      time.Time
}

// Origin is the object that put an element into the table.
type Origin struct {
	// Object is a path such as "service/web", "config/service-resolver/api",
	// "federation-state/dc2", "registration/web-sidecar-proxy".
	Object     string `json:",omitempty"`
	Datacenter string `json:",omitempty"`
	Index      uint64 `json:",omitempty"`
}

// Cluster returns the named cluster, or nil.
func (t *Table) Cluster(name string) *Cluster {
	for i := range t.Clusters {
		if t.Clusters[i].Name == name {
			return &t.Clusters[i]
		}
	}
	return nil
}

// JSON returns the table's one serialised form, in which private keys do not
// show.
func (t *Table) JSON() ([]byte, error) { return json.MarshalIndent(t, "", "  ") }
