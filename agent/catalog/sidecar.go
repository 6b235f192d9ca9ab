package catalog

import (
	"errors"
	"net"
	"slices"
	"strconv"
	"strings"

	"github.com/hashicorp/consul/api"
)

const (
	sidecarSuffix         = "-sidecar-proxy"
	sidecarListeningCheck = "Connect Sidecar Listening"
	sidecarAliasingCheck  = "Connect Sidecar Aliasing "
	localhost             = "127.0.0.1"
)

// SidecarID returns the ID of the sidecar that a sidecar_service block of the
// service with this ID stands for.
func SidecarID(parentID string) string { return parentID + sidecarSuffix }

// ExpandSidecar returns the registration that the sidecar_service block of
// parent stands for, nil where it has none. It shares nothing with parent. A
// port of 0 is to be assigned with [AssignSidecarPort].
func ExpandSidecar(parent *Definition) (*Definition, error) {
	if parent.Connect == nil || parent.Connect.SidecarService == nil {
		return nil, nil
	}
	block := parent.Connect.SidecarService
	if block.ID != "" {
		return nil, errors.New("A SidecarService cannot specify an ID as this is managed by the agent")
	}
	if block.Connect != nil && block.Connect.SidecarService != nil {
		return nil, errors.New("A SidecarService cannot have a nested SidecarService")
	}
	parentID := parent.ID
	if parentID == "" {
		parentID = parent.Name
	}

	sc := &Definition{AgentServiceRegistration: *cloneRegistration(block), Token: parent.SidecarToken}
	if sc.Token == "" {
		sc.Token = parent.Token
	}
	own := cloneRegistration(&parent.AgentServiceRegistration)
	sc.ID = SidecarID(parentID)
	if sc.Name == "" {
		sc.Name = own.Name + sidecarSuffix
	}
	if sc.Kind == "" {
		sc.Kind = KindConnectProxy
	}
	if sc.Address == "" {
		sc.Address = own.Address
	}
	if len(sc.Meta) == 0 {
		sc.Meta = own.Meta
	}
	if len(sc.Tags) == 0 {
		sc.Tags = own.Tags
	}
	if sc.Locality == nil {
		sc.Locality = own.Locality
	}
	if sc.Namespace == "" {
		sc.Namespace = own.Namespace
	}
	if sc.Partition == "" {
		sc.Partition = own.Partition
	}

	if sc.Proxy == nil {
		sc.Proxy = &api.AgentServiceConnectProxyConfig{}
	}
	p := sc.Proxy
	if p.DestinationServiceName == "" {
		p.DestinationServiceName = own.Name
	}
	if p.DestinationServiceID == "" {
		p.DestinationServiceID = parentID
	}
	if p.LocalServiceAddress == "" && p.LocalServicePort == 0 && p.LocalServiceSocketPath == "" && own.SocketPath != "" {
		p.LocalServiceSocketPath = own.SocketPath
	}
	if p.LocalServiceSocketPath == "" {
		if p.LocalServiceAddress == "" {
			p.LocalServiceAddress = localhost
		}
		if p.LocalServicePort == 0 {
			p.LocalServicePort = own.Port
		}
	}

	if len(definedChecks(&sc.AgentServiceRegistration)) == 0 {
		host := sc.Address
		if host == "" {
			host = p.LocalServiceAddress
		}
		if host == "" {
			host = localhost
		}
		sc.Check = nil
		sc.Checks = api.AgentServiceChecks{
			{Name: sidecarListeningCheck, TCP: net.JoinHostPort(strings.Trim(host, "[]"), strconv.Itoa(sc.Port)), Interval: "10s"},
			{Name: sidecarAliasingCheck + parentID, AliasService: parentID},
		}
	}
	NormalizeDefinition(sc)
	return sc, nil
}

// AssignSidecarPort gives an expanded sidecar its port, and its listening check
// with it.
func AssignSidecarPort(sidecar *Definition, port int) {
	sidecar.Port = port
	i := slices.IndexFunc(sidecar.Checks, func(c *CheckDefinition) bool { return c != nil && c.Name == sidecarListeningCheck })
	if i < 0 {
		return
	}
	if host, p, err := net.SplitHostPort(sidecar.Checks[i].TCP); err == nil && p == "0" {
		sidecar.Checks[i].TCP = net.JoinHostPort(host, strconv.Itoa(port))
	}
}
