package connect

import (
	"fmt"
	"strings"

	"github.com/sluicemesh/sluice/agent/catalog"
)

// trustDomainSuffix is the literal end of every trust domain, whatever the
// agent's DNS domain is.
const trustDomainSuffix = ".consul"

// TrustDomain returns the trust domain of a cluster: lower-case, with the
// suffix that names the CA's domain.
func TrustDomain(clusterID string) string {
	return strings.ToLower(clusterID) + trustDomainSuffix
}

// ServiceSNI returns the server name that reaches a service, or one subset of
// it, in a datacenter. Nothing is escaped: the parts were validated where they
// were registered.
func ServiceSNI(subset string, s catalog.ServiceName, dc, trustDomain string) string {
	s = s.Canonical()
	parts := make([]string, 0, 7)
	if subset != "" {
		parts = append(parts, subset)
	}
	parts = append(parts, s.Name, s.Namespace)
	if s.Partition != catalog.DefaultTenancy {
		parts = append(parts, s.Partition)
	}
	parts = append(parts, dc, internalLabel(s.Partition), trustDomain)
	return strings.Join(parts, ".")
}

// DatacenterSNI returns the name under which gateways know a datacenter, the
// suffix of all its services' names in the default partition. It is never
// dialled.
func DatacenterSNI(dc, trustDomain string) string {
	return dc + "." + internalLabel(catalog.DefaultTenancy) + "." + trustDomain
}

// PeeredServiceSNI returns the server name of a service exported to a peer.
// Peer is the name that the exporting cluster has for the importing one, and
// trustDomain the exporting cluster's.
func PeeredServiceSNI(s catalog.ServiceName, peer, trustDomain string) string {
	s = s.Canonical()
	return strings.Join([]string{s.Name, s.Namespace, s.Partition, peer, "external", trustDomain}, ".")
}

// ServerSNI returns the name that a server answers to when it is reached
// through gateways. An empty node or "*" means any server of the datacenter.
// Domain is the agent's DNS domain, not the trust domain.
func ServerSNI(node, dc, domain string) string {
	name := "server." + dc + "." + strings.TrimSuffix(domain, ".")
	if node == "" || node == "*" {
		return name
	}
	return node + "." + name
}

func internalLabel(partition string) string {
	if partition == "" || partition == catalog.DefaultTenancy {
		return "internal"
	}
	return "internal-v1"
}

// SNI is what a server name of this mesh says.
type SNI struct {
	// Service.Name is empty in the name of a whole datacenter.
	Service     catalog.ServiceName
	Subset      string
	Datacenter  string
	TrustDomain string
}

// ParseSNI splits an internal server name. It is the inverse of [ServiceSNI]
// and [DatacenterSNI] for names whose parts contain no dots.
func ParseSNI(name string) (SNI, error) {
	bad := func() (SNI, error) {
		return SNI{}, fmt.Errorf("parse server name %q: not the name of a service in this mesh", name)
	}
	labels := strings.Split(name, ".")
	for _, l := range labels {
		if l == "" {
			return bad()
		}
	}
	// The trust domain is the last two labels; "internal" is before it.
	n := len(labels) - 3
	if n < 1 || "."+labels[n+2] != trustDomainSuffix {
		return bad()
	}
	out := SNI{TrustDomain: labels[n+1] + "." + labels[n+2]}
	rest := labels[:n]
	pop := func() string {
		last := rest[len(rest)-1]
		rest = rest[:len(rest)-1]
		return last
	}
	out.Datacenter = pop()
	switch labels[n] {
	case "internal":
	case "internal-v1":
		if len(rest) == 0 {
			return bad()
		}
		out.Service.Partition = pop()
	default:
		return bad()
	}
	switch len(rest) {
	case 0:
	case 2, 3:
		out.Service.Namespace = pop()
		out.Service.Name = pop()
		if len(rest) == 1 {
			out.Subset = pop()
		}
	default:
		return bad()
	}
	out.Service = out.Service.Canonical()
	return out, nil
}
