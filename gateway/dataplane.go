package gateway

import (
	"context"
	"time"
)

// DataPlane moves the bytes of one proxy by its newest table. Implementations
// are gateway/sni, gateway/sidecar and, later, Envoy and plugins.
type DataPlane interface {
	// Apply hands over a table; the newest wins, and one that was not applied yet
	// is dropped. It does not block, may be called before Run, and may be called
	// from several goroutines. Connections that are open stay as they were routed.
	Apply(t *Table)
	// Run serves until ctx ends, then closes every listener and connection and
	// returns nil once nothing of it is left; or an error it cannot go on after.
	// A listener that cannot be bound is no such error: it is retried and shows
	// in Status.
	Run(ctx context.Context) error
	// Status may be called at any time from any goroutine.
	Status() Status
}

// Status is what a data plane says of itself.
type Status struct {
	// Applied is the Index of the table in use, AppliedAt when it was taken.
	Applied   uint64
	AppliedAt time.Time
	Listeners []ListenerStatus `json:",omitempty"`
	// Clusters that have had a connection since the start, by name.
	Clusters []ClusterStatus `json:",omitempty"`
	// Refused are the newest refusals, newest first; at most 64.
	Refused []Refusal `json:",omitempty"`
	// LastError is the newest fault of the data plane itself.
	LastError string `json:",omitempty"`
}

// ListenerStatus tells of one listener of the table in use.
type ListenerStatus struct {
	Name    string
	Address string // as bound
	Bound   bool
	Error   string `json:",omitempty"` // why it is not bound
	// Active connections, and Accepted since the start.
	Active   int64
	Accepted uint64
	// RefusedTotal connections were closed without reaching an endpoint. Refused
	// has them by reason.
	RefusedTotal uint64
	Refused      map[string]uint64 `json:",omitempty"`
	// Closed are connections that had reached an endpoint and have ended, by one of
	// the Close constants; those whose end the data plane does not tell are not in
	// it.
	Closed map[string]uint64 `json:",omitempty"`
}

// ClusterStatus tells of one cluster.
type ClusterStatus struct {
	Name      string
	Active    int64
	Connected uint64 // connections that reached an endpoint
	Failed    uint64 // connections that reached none
	Retries   uint64 // attempts to connect that were not a connection's first
	BytesIn   uint64 // from the client to the endpoint
	BytesOut  uint64 // from the endpoint to the client
	// ConnectTimes are those of the connections that reached an endpoint; nil while
	// there are none, and where the data plane does not tell.
	ConnectTimes *ConnectTimes    `json:",omitempty"`
	Endpoints    []EndpointStatus `json:",omitempty"`
}

// ConnectTimes tells how long it took to connect to endpoints, attempts that failed
// not included.
type ConnectTimes struct {
	Sum Duration
	// Counts has how many took at most as long as the ConnectBounds of the same index,
	// and longer than the one before; the last is of those that took longer than all.
	Counts []uint64
}

// ConnectBounds are the bounds that connections are counted by, in [ConnectTimes].
var ConnectBounds = [...]time.Duration{
	time.Millisecond, 2500 * time.Microsecond, 5 * time.Millisecond, 10 * time.Millisecond, 25 * time.Millisecond,
	50 * time.Millisecond, 100 * time.Millisecond, 250 * time.Millisecond, time.Second,
}

// EndpointStatus tells of one endpoint of a cluster.
type EndpointStatus struct {
	Address   string // host:port
	Active    int64
	Connected uint64
	BytesIn   uint64 `json:",omitempty"` // from clients to it
	BytesOut  uint64 `json:",omitempty"` // from it to clients
	// Failed attempts: it could not be connected to, or did not answer. Failures has
	// them by one of the Fail constants, where the data plane tells.
	Failed    uint64
	Failures  map[string]uint64 `json:",omitempty"`
	LastError string            `json:",omitempty"`
	// EjectedUntil is how long the endpoint is passed over, because too many attempts
	// in a row failed; zero while it is not.
	EjectedUntil time.Time `json:",omitzero"`
}

// Refusal is a connection that was closed without reaching an endpoint.
type Refusal struct {
	At       time.Time
	Listener string
	Peer     string // address of the client
	// ServerName and ALPN are as the client sent them, "" where none was read.
	ServerName string   `json:",omitempty"`
	ALPN       []string `json:",omitempty"`
	// HelloBytes is how much of the ClientHello was read.
	HelloBytes int `json:",omitempty"`
	// Reason is one of the Refuse constants, and Detail what an operator needs
	// besides.
	Reason string
	Detail string `json:",omitempty"`
}

// The reasons of refusals.
const (
	RefuseHelloTimeout  = "hello-timeout"   // no complete ClientHello in time
	RefuseHelloTooLarge = "hello-too-large" // more bytes than the bound
	RefuseNotTLS        = "not-tls"         // the bytes are no ClientHello
	RefuseProxyHeader   = "proxy-header"    // that of the PROXY protocol is missing or wrong
	RefuseNoServerName  = "no-server-name"
	RefuseBadServerName = "bad-server-name" // not a host name
	RefuseNoRoute       = "no-route"        // no rule matches the server name
	RefuseNoEndpoint    = "no-endpoint"     // the cluster has none that may be dialled
	RefuseConnect       = "connect-failed"  // every endpoint that was tried failed
	RefuseNoAnswer      = "no-answer"       // the last that was tried took the hello, and ended before it answered
	RefuseLimit         = "limit"           // Detail names the limit
	RefuseHandshake     = "tls-handshake"   // sidecar: mutual TLS failed
	RefuseIdentity      = "identity"        // sidecar: the peer is somebody else
	RefuseDenied        = "denied"          // sidecar: an intention forbids it
	RefuseClientGone    = "client-gone"     // closed before anything could be done
)

// The reasons of ends of connections that had reached an endpoint.
const (
	CloseDone    = "done"    // both sides had no more to say
	CloseReset   = "reset"   // a side broke off, or could not be written to
	CloseIdle    = "idle"    // no byte moved for too long
	CloseDrain   = "drain"   // ended by a drain, at its pace
	CloseRemoved = "removed" // its listener is gone
	CloseStopped = "stopped" // the data plane ended
	// CloseFailback and CloseRebalance: ended at a pace so that the client comes to a
	// better endpoint.
	CloseFailback  = "failback"
	CloseRebalance = "rebalance"
)
