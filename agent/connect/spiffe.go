package connect

import (
	"errors"
	"fmt"
	"net/url"
	"strings"

	"github.com/sluicemesh/sluice/agent/catalog"
)

// ID is an identity that a certificate can carry: one of [ServiceID],
// [AgentID], [ServerID], [GatewayID] and [SigningID].
type ID interface {
	// URI returns the identity's one written form.
	URI() string
	// Host returns the trust domain, lower-case.
	Host() string
}

// ServiceID is the identity of a service in a datacenter.
type ServiceID struct {
	TrustDomain string
	Service     catalog.ServiceName
	Datacenter  string
}

// AgentID is the identity of a client agent.
type AgentID struct {
	TrustDomain, Partition, Datacenter, Node string
}

// ServerID is the identity of a datacenter's servers.
type ServerID struct {
	TrustDomain, Datacenter string
}

// GatewayID is the identity of a datacenter's mesh gateways.
type GatewayID struct {
	TrustDomain, Partition, Datacenter string
}

// SigningID is the identity of a certificate authority.
type SigningID struct {
	ClusterID string
	Domain    string // "consul"
}

// URI implements [ID].
func (s ServiceID) URI() string {
	n := s.Service.Canonical()
	return spiffe(s.TrustDomain, n.Partition, "ns", n.Namespace, "dc", s.Datacenter, "svc", n.Name)
}

// Host implements [ID].
func (s ServiceID) Host() string { return strings.ToLower(s.TrustDomain) }

// URI implements [ID].
func (a AgentID) URI() string {
	return spiffe(a.TrustDomain, a.Partition, "agent", "client", "dc", a.Datacenter, "id", a.Node)
}

// Host implements [ID].
func (a AgentID) Host() string { return strings.ToLower(a.TrustDomain) }

// URI implements [ID].
func (s ServerID) URI() string {
	return spiffe(s.TrustDomain, "", "agent", "server", "dc", s.Datacenter)
}

// Host implements [ID].
func (s ServerID) Host() string { return strings.ToLower(s.TrustDomain) }

// URI implements [ID].
func (g GatewayID) URI() string {
	return spiffe(g.TrustDomain, g.Partition, "gateway", "mesh", "dc", g.Datacenter)
}

// Host implements [ID].
func (g GatewayID) Host() string { return strings.ToLower(g.TrustDomain) }

// URI implements [ID].
func (s SigningID) URI() string { return "spiffe://" + s.Host() }

// Host implements [ID].
func (s SigningID) Host() string { return strings.ToLower(s.ClusterID + "." + s.Domain) }

// CanSign says whether the authority may issue certificates for id. An agent's
// identity must first be moved to the trust domain.
func (s SigningID) CanSign(id ID) bool {
	if id == nil || id.Host() != s.Host() {
		return false
	}
	switch id.(type) {
	case SigningID, ServiceID, GatewayID, ServerID:
		return true
	}
	return false
}

// SigningIDOf returns the identity of a cluster's certificate authority.
func SigningIDOf(clusterID string) SigningID {
	return SigningID{ClusterID: strings.ToLower(clusterID), Domain: strings.TrimPrefix(trustDomainSuffix, ".")}
}

func spiffe(trustDomain, partition string, segments ...string) string {
	var b strings.Builder
	b.WriteString("spiffe://")
	b.WriteString(strings.ToLower(trustDomain))
	if p := strings.ToLower(partition); p != "" && p != catalog.DefaultTenancy {
		b.WriteString("/ap/" + url.PathEscape(p))
	}
	for _, s := range segments {
		b.WriteString("/" + url.PathEscape(s))
	}
	return b.String()
}

// errScheme's text, like the other texts of identities, is Consul's.
var errScheme = errors.New("SPIFFE ID must have 'spiffe' scheme") //nolint:staticcheck // clients match the text

// ParseURI reads an identity. The result is one of the ID types of this
// package, by value.
func ParseURI(s string) (ID, error) {
	u, err := url.Parse(s)
	if err != nil {
		return nil, fmt.Errorf("SPIFFE ID is not in the expected format: %q", s)
	}
	return ParseURL(u)
}

// ParseURL is [ParseURI] of a URL as a certificate has it.
func ParseURL(u *url.URL) (ID, error) {
	if u.Scheme != "spiffe" {
		return nil, errScheme
	}
	bad := fmt.Errorf("SPIFFE ID is not in the expected format: %s", u.String())
	// An identity is compared as text elsewhere, so what would be lost in
	// parsing is refused.
	if u.Opaque != "" || u.User != nil || u.RawQuery != "" || u.ForceQuery || u.Fragment != "" || !validHost(u.Host) {
		return nil, bad
	}
	if u.Path == "" {
		cluster, domain, ok := strings.Cut(u.Host, ".")
		if !ok || cluster == "" || domain == "" {
			return nil, bad
		}
		return SigningID{ClusterID: strings.ToLower(cluster), Domain: strings.ToLower(domain)}, nil
	}
	host := strings.ToLower(u.Host)
	// Split what is still encoded, so that an encoded slash stays in its segment.
	seg := strings.Split(strings.TrimPrefix(u.EscapedPath(), "/"), "/")
	partition := catalog.DefaultTenancy
	if len(seg) > 2 && seg[0] == "ap" {
		p, err := unescape("admin partition", seg[1])
		if err != nil {
			return nil, err
		}
		if p == "" {
			return nil, bad
		}
		partition, seg = strings.ToLower(p), seg[2:]
	}
	for _, s := range seg {
		if s == "" {
			return nil, bad
		}
	}
	switch {
	case len(seg) == 6 && seg[0] == "ns" && seg[2] == "dc" && seg[4] == "svc":
		ns, err := unescape("namespace", seg[1])
		if err != nil {
			return nil, err
		}
		dc, err := unescape("datacenter", seg[3])
		if err != nil {
			return nil, err
		}
		name, err := unescape("service", seg[5])
		if err != nil {
			return nil, err
		}
		return ServiceID{
			TrustDomain: host,
			Service:     catalog.ServiceName{Name: name, Namespace: ns, Partition: partition}.Canonical(),
			Datacenter:  dc,
		}, nil
	case len(seg) == 6 && seg[0] == "agent" && seg[1] == "client" && seg[2] == "dc" && seg[4] == "id":
		dc, err := unescape("datacenter", seg[3])
		if err != nil {
			return nil, err
		}
		node, err := unescape("node", seg[5])
		if err != nil {
			return nil, err
		}
		return AgentID{TrustDomain: host, Partition: partition, Datacenter: dc, Node: node}, nil
	case len(seg) == 4 && seg[0] == "agent" && seg[1] == "server" && seg[2] == "dc" && partition == catalog.DefaultTenancy:
		dc, err := unescape("datacenter", seg[3])
		if err != nil {
			return nil, err
		}
		return ServerID{TrustDomain: host, Datacenter: dc}, nil
	case len(seg) == 4 && seg[0] == "gateway" && seg[1] == "mesh" && seg[2] == "dc":
		dc, err := unescape("datacenter", seg[3])
		if err != nil {
			return nil, err
		}
		return GatewayID{TrustDomain: host, Partition: partition, Datacenter: dc}, nil
	}
	return nil, bad
}

// validHost says whether h can be a trust domain. A port, brackets or escapes
// would not survive being written again.
func validHost(h string) bool {
	if h == "" {
		return false
	}
	for i := range len(h) {
		switch c := h[i]; {
		case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', '0' <= c && c <= '9', c == '-', c == '.', c == '_':
		default:
			return false
		}
	}
	return true
}

func unescape(what, s string) (string, error) {
	out, err := url.PathUnescape(s)
	if err != nil {
		return "", fmt.Errorf("Invalid %s: %w", what, err) //nolint:staticcheck // clients match the text
	}
	return out, nil
}
