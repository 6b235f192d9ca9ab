// Package catalog is the vocabulary of the service catalog: names, nodes,
// services, checks, and the pure rules about them (normalising, validating,
// choosing an address, judging health). It does no I/O and imports nothing of
// this module but acl.
//
// The records are those of the public API module: one set of types serves the
// state store, the RPC and the HTTP API, so that nothing is converted on the
// way and the wire form is the client's by construction.
package catalog

import (
	"errors"
	"strings"
	"time"

	"github.com/hashicorp/consul/api"

	"github.com/sluicemesh/sluice/acl"
)

type (
	// Node is a machine in the catalog.
	Node = api.Node
	// Service is an instance of a service on a node.
	Service = api.AgentService
	// Check is a health check and its last result.
	Check = api.HealthCheck
	// CheckDefinition says how a check is made (HTTP, TCP, TTL...).
	CheckDefinition = api.AgentServiceCheck
	// Instance is a service instance with its node and its checks.
	Instance = api.ServiceEntry
	// Kind tells an ordinary service (the empty kind) from a proxy or gateway.
	Kind = api.ServiceKind
)

// DefaultTenancy is the name of the namespace and of the partition that a name
// has when it does not say another.
const DefaultTenancy = "default"

// ErrPending is returned by reads of something of which there has been no answer
// yet. It is transient: a channel in the watch set closes when there is one.
var ErrPending = errors.New("not known yet")

// NodeCheckID is the check that serf's view of a node drives.
const NodeCheckID = "serfHealth"

// ServiceName names a service with its tenancy. It is comparable, and the key
// wherever a service is named. The zero Namespace and Partition mean
// [DefaultTenancy]; [ServiceName.Canonical] fills them in, and names must be
// canonical before they are compared.
type ServiceName struct {
	Name, Namespace, Partition string
}

// Name returns the canonical name of a service in the default tenancy.
func Name(name string) ServiceName { return ServiceName{Name: name}.Canonical() }

// Canonical returns n with its tenancy spelled out.
func (n ServiceName) Canonical() ServiceName {
	if n.Namespace == "" {
		n.Namespace = DefaultTenancy
	}
	if n.Partition == "" {
		n.Partition = DefaultTenancy
	}
	return n
}

// String returns the bare name in the default tenancy, else
// partition/namespace/name.
func (n ServiceName) String() string {
	n = n.Canonical()
	if n.Namespace == DefaultTenancy && n.Partition == DefaultTenancy {
		return n.Name
	}
	return strings.Join([]string{n.Partition, n.Namespace, n.Name}, "/")
}

// MarshalText implements [encoding.TextMarshaler], so that names can be JSON
// object keys.
func (n ServiceName) MarshalText() ([]byte, error) { return []byte(n.String()), nil }

// UnmarshalText is the inverse of MarshalText.
func (n *ServiceName) UnmarshalText(b []byte) error {
	*n = ServiceName{Name: string(b)}
	if p := strings.Split(string(b), "/"); len(p) == 3 {
		*n = ServiceName{Partition: p[0], Namespace: p[1], Name: p[2]}
	}
	*n = n.Canonical()
	return nil
}

// ServiceNameOf returns the canonical name that s is registered under.
func ServiceNameOf(s *Service) ServiceName {
	return ServiceName{Name: s.Service, Namespace: s.Namespace, Partition: s.Partition}.Canonical()
}

// Definition is a registration as its author wrote it, in a file or over HTTP:
// before central configuration is merged in, and with the token it acts with.
// Connect.SidecarService, where present, has not been expanded.
type Definition struct {
	api.AgentServiceRegistration
	// Token is the secret this registration is written to the catalog with.
	Token acl.Secret
	// SidecarToken is the token key of a sidecar_service block; empty means Token.
	SidecarToken acl.Secret
}

// Freshness says how current a read is.
type Freshness struct {
	// Index is that of the newest write the value includes.
	Index uint64
	// AsOf is when the value was last known to be current. It is later than the
	// last change: an answer "nothing has changed" moves it.
	AsOf time.Time
}
