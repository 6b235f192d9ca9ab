package main

import (
	"fmt"
	"net/netip"
	"strings"
)

// The servers behind a forwarder, and the one that speaks TLS.
const (
	backends    = 16
	backendPort = 19443
	wildcards   = 16
	tlsName     = "tls.bench.test"
)

// The sets of routes.
const smallRoutes, bigRoutes, churnRoutes = 64, 100_000, 10_000

// manyConns are what two descriptors each of a usual limit of 20,000 allow.
const manyConns = 9000

// sourceNetwork has the source addresses of the loads.
const sourceNetwork = "127.2.0.0/16"

var tlsAddr = netip.MustParseAddrPort("127.1.0.200:19444")

// backendAddrs are those of the benchmark, where the routes lead.
func backendAddrs() []netip.AddrPort {
	var out []netip.AddrPort
	for i := range backends {
		out = append(out, netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 1, 0, byte(1 + i)}), backendPort))
	}
	return out
}

// hostName is the name of the i-th route.
func hostName(i int) string { return fmt.Sprintf("h%06d.bench.test", i) }

// route of a name, which may be "*.suffix", to an address. Server is what HAProxy
// and Envoy call the address.
type route struct {
	Name, Server string
	Addr         netip.AddrPort
}

// newRoutes makes n routes of exact names, some of wildcards, and the one to the
// TLS server, spread over the given addresses.
func newRoutes(n int, addrs []netip.AddrPort, secure netip.AddrPort) []route {
	var out []route
	to := func(name string, i int) {
		i %= len(addrs)
		out = append(out, route{name, fmt.Sprintf("b%d", i), addrs[i]})
	}
	for i := range n {
		to(hostName(i), i)
	}
	for i := range wildcards {
		to(fmt.Sprintf("*.w%03d.bench.test", i), i)
	}
	return append(out, route{tlsName, "btls", secure})
}

// routesFile is the set as `sluice forward` reads it.
func routesFile(set []route) []byte {
	var b strings.Builder
	for _, r := range set {
		fmt.Fprintf(&b, "%s %s\n", r.Name, r.Addr)
	}
	return []byte(b.String())
}
