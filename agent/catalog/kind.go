package catalog

import (
	"fmt"

	"github.com/hashicorp/consul/api"
)

// The kinds of service.
const (
	KindTypical            = api.ServiceKindTypical
	KindConnectProxy       = api.ServiceKindConnectProxy
	KindMeshGateway        = api.ServiceKindMeshGateway
	KindTerminatingGateway = api.ServiceKindTerminatingGateway
	KindIngressGateway     = api.ServiceKindIngressGateway
	KindAPIGateway         = api.ServiceKindAPIGateway
)

// IsGateway reports whether kind is one of the gateways.
func IsGateway(kind Kind) bool {
	switch kind {
	case KindMeshGateway, KindTerminatingGateway, KindIngressGateway, KindAPIGateway:
		return true
	}
	return false
}

// IsMeshGateway reports whether s is a mesh gateway.
func IsMeshGateway(s *Service) bool { return s != nil && s.Kind == KindMeshGateway }

// IsConnectProxy reports whether s is the sidecar of another service.
func IsConnectProxy(s *Service) bool { return s != nil && s.Kind == KindConnectProxy }

// IsConnectNative reports whether s accepts mutual TLS itself.
func IsConnectNative(s *Service) bool { return s != nil && s.Connect != nil && s.Connect.Native }

// IsProxy reports whether s runs a data plane: a sidecar or a gateway. These are
// the services that central configuration is merged into.
func IsProxy(s *Service) bool { return s != nil && (s.Kind == KindConnectProxy || IsGateway(s.Kind)) }

// DestinationOf returns the service that s accepts mutual TLS for: a sidecar's
// destination, a native service's own name; false where there is none.
func DestinationOf(s *Service) (ServiceName, bool) {
	switch {
	case s == nil:
		return ServiceName{}, false
	case s.Kind == KindConnectProxy:
		if s.Proxy == nil || s.Proxy.DestinationServiceName == "" {
			return ServiceName{}, false
		}
		return ServiceName{Name: s.Proxy.DestinationServiceName, Namespace: s.Namespace, Partition: s.Partition}.Canonical(), true
	case IsConnectNative(s):
		return ServiceNameOf(s), true
	}
	return ServiceName{}, false
}

// IsWANFederation reports whether s is a gateway that carries the servers' own
// traffic between datacenters.
func IsWANFederation(s *Service) bool {
	return IsMeshGateway(s) && s.Meta[MetaWANFederation] == "1"
}

// MetaWANFederation is the one metadata key with a reserved prefix that an
// operator may set, on mesh gateways.
const MetaWANFederation = "consul-wan-federation"

// ParseMode returns the mesh gateway mode that s names; configuration files use
// it. HTTP registrations and config entries take any value, as Consul does.
func ParseMode(s string) (api.MeshGatewayMode, error) {
	switch m := api.MeshGatewayMode(s); m {
	case api.MeshGatewayModeDefault, api.MeshGatewayModeNone, api.MeshGatewayModeLocal, api.MeshGatewayModeRemote:
		return m, nil
	}
	return "", fmt.Errorf("Invalid Mesh Gateway Mode: %q", s) //nolint:staticcheck // Consul's text
}
