package catalog

import (
	"net/netip"

	"github.com/hashicorp/consul/api"
)

// Names of tagged addresses that mean something to the mesh.
const (
	TagLAN     = "lan"
	TagWAN     = "wan"
	tagLANIPv4 = "lan_ipv4"
	tagWANIPv4 = "wan_ipv4"
	tagLANIPv6 = "lan_ipv6"
	tagWANIPv6 = "wan_ipv6"
)

// LANAddress returns where inst is reached from its own datacenter: the
// service's address, else its node's. The lan tag plays no part.
func LANAddress(inst *Instance) (host string, port int) {
	if inst == nil || inst.Service == nil {
		return "", 0
	}
	host, port = inst.Service.Address, inst.Service.DefaultPort()
	if host == "" && inst.Node != nil {
		host = inst.Node.Address
	}
	return host, port
}

// WANAddress returns where inst is reached from another datacenter: the
// service's wan address, else its address, else the node's wan address, else the
// node's. A wan address without a port has the service's.
func WANAddress(inst *Instance) (host string, port int) {
	if inst == nil || inst.Service == nil {
		return "", 0
	}
	host, port = inst.Service.Address, inst.Service.DefaultPort()
	if wan, ok := inst.Service.TaggedAddresses[TagWAN]; ok {
		host = wan.Address
		if wan.Port != 0 {
			port = wan.Port
		}
	}
	if host == "" && inst.Node != nil {
		if host = inst.Node.TaggedAddresses[TagWAN]; host == "" {
			host = inst.Node.Address
		}
	}
	return host, port
}

// IsAnyAddress reports whether address is a wildcard that can be bound to but
// not connected to, and so cannot be registered.
func IsAnyAddress(address string) bool {
	return address == "0.0.0.0" || address == "::" || address == "[::]"
}

// taggedAddresses returns given with the entries that a literal service address
// stands for. It does not change given.
func taggedAddresses(given map[string]api.ServiceAddress, address string, port int) map[string]api.ServiceAddress {
	out := make(map[string]api.ServiceAddress, len(given)+2)
	for k, v := range given {
		out[k] = v
	}
	if ip, err := netip.ParseAddr(address); err == nil {
		lan, wan := tagLANIPv6, tagWANIPv6
		if ip.Is4() {
			lan, wan = tagLANIPv4, tagWANIPv4
		}
		for _, tag := range []string{lan, wan} {
			if _, ok := out[tag]; !ok {
				out[tag] = api.ServiceAddress{Address: address, Port: port}
			}
		}
	}
	if len(out) == 0 {
		return nil
	}
	return out
}
