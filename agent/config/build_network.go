package config

import (
	"net"
	"net/netip"
	"strconv"
	"strings"
)

// expandAddrs evaluates a template into addresses.
func (b *builder) expandAddrs(path, s string) []string {
	out, err := b.machine.Expand(s)
	if err != nil {
		b.bad(path, "%s: error parsing %q: %v", path, s, err)
		return nil
	}
	return strings.Fields(out)
}

// address reads a key that holds one address, which may be a template; the zero
// address is returned for a key that was not given, and after a problem.
func (b *builder) address(path string, p *string) netip.Addr {
	if p == nil {
		return netip.Addr{}
	}
	before := len(b.problems)
	addrs := b.expandAddrs(path, *p)
	switch {
	case len(b.problems) > before:
	case len(addrs) == 0:
		b.bad(path, "%s cannot be empty", path)
	case len(addrs) > 1:
		b.bad(path, "%s cannot contain multiple addresses: %s", path, strings.Join(addrs, " "))
	case strings.HasPrefix(addrs[0], "unix://"):
		b.bad(path, "%s cannot be a unix socket", path)
	default:
		a, err := parseAddr(addrs[0])
		if err == nil {
			return a
		}
		b.bad(path, "%s: invalid ip address: %s", path, addrs[0])
	}
	return netip.Addr{}
}

func parseAddr(s string) (netip.Addr, error) {
	if strings.HasPrefix(s, "[") && strings.HasSuffix(s, "]") {
		s = s[1 : len(s)-1]
	}
	a, err := netip.ParseAddr(s)
	return a.Unmap(), err
}

func (b *builder) port(name string, p *int, def int) int {
	port := or(p, def)
	if port > 65535 {
		b.bad("ports."+name, "ports.%s = %d: expected a port, at most 65535; 0 or less turns it off", name, port)
		port = 0
	}
	return max(port, 0)
}

func (b *builder) network(server bool) Network {
	s := &b.s.networkSettings
	n := Network{TranslateWAN: or(s.TranslateWAN, false), TaggedAddresses: map[string]string{}}
	n.UnixSocket = UnixSocket{or(s.UnixSockets.User, ""), or(s.UnixSockets.Group, ""), or(s.UnixSockets.Mode, "")}
	if m := n.UnixSocket.Mode; m != "" {
		if v, err := strconv.ParseUint(m, 8, 32); err != nil || v > 0o777 {
			b.bad("unix_sockets.mode", "unix_sockets.mode = %q: expected an octal mode such as \"0660\"", m)
		}
	}

	bind := netip.IPv4Unspecified()
	if s.BindAddr != nil {
		bind = b.address("bind_addr", s.BindAddr)
	}
	pick := func(path string, p *string, def netip.Addr) netip.Addr {
		if a := b.address(path, p); a.IsValid() {
			return a
		}
		return def
	}
	lan, wan := pick("serf_lan", s.SerfLAN, bind), pick("serf_wan", s.SerfWAN, bind)

	rpc := b.port("server", s.Ports.Server, 8300)
	serfLAN := b.port("serf_lan", s.Ports.SerfLAN, 8301)
	if rpc == 0 {
		b.bad("ports.server", "ports.server must be a valid port from 1 to 65535")
	}
	if serfLAN == 0 {
		b.bad("ports.serf_lan", "ports.serf_lan must be a valid port from 1 to 65535")
	}
	n.RPC = netip.AddrPortFrom(bind, uint16(rpc))
	n.SerfLAN = netip.AddrPortFrom(lan, uint16(serfLAN))
	n.SerfWAN = netip.AddrPortFrom(wan, uint16(b.port("serf_wan", s.Ports.SerfWAN, 8302)))

	b.advertise(&n, bind)
	n.SidecarPorts = b.portRange("sidecar", s.Ports.SidecarMin, s.Ports.SidecarMax, 21000, 21255)
	return n
}

func (b *builder) portRange(name string, lo, hi *int, defLo, defHi int) PortRange {
	r := PortRange{or(lo, defLo), or(hi, defHi)}
	minKey, maxKey := "ports."+name+"_min_port", "ports."+name+"_max_port"
	switch {
	case r.Min <= 0 && r.Max <= 0:
		return PortRange{}
	case r.Min < 0 || r.Min > 65535:
		b.bad(minKey, "%s = %d: expected a port from 0 to 65535", minKey, r.Min)
	case r.Max < 0 || r.Max > 65535:
		b.bad(maxKey, "%s = %d: expected a port from 0 to 65535", maxKey, r.Max)
	case r.Max < r.Min:
		b.bad(maxKey, "%s_min_port must be less than %s_max_port. got %d to %d", name, name, r.Min, r.Max)
	default:
		return r
	}
	return PortRange{}
}

// advertise finds the addresses that others use.
func (b *builder) advertise(n *Network, bind netip.Addr) {
	s := &b.s.networkSettings
	byFamily := func(path string, p *string, v6 bool) netip.Addr {
		a := b.address(path, p)
		if a.IsValid() && a.Is4() == v6 {
			b.bad(path, "%s: %s is of the other family", path, a)
			return netip.Addr{}
		}
		return a
	}
	lan4 := byFamily("advertise_addr_ipv4", s.AdvertiseAddrV4, false)
	lan6 := byFamily("advertise_addr_ipv6", s.AdvertiseAddrV6, true)
	wan4 := byFamily("advertise_addr_wan_ipv4", s.AdvertiseWANV4, false)
	wan6 := byFamily("advertise_addr_wan_ipv6", s.AdvertiseWANV6, true)

	// The key that an address came from is where a problem with it is shown.
	lan, key := b.address("advertise_addr", s.AdvertiseAddr), "advertise_addr"
	if !lan.IsValid() && s.AdvertiseAddr == nil {
		switch {
		case lan4.IsValid():
			lan, key = lan4, "advertise_addr_ipv4"
		case lan6.IsValid():
			lan, key = lan6, "advertise_addr_ipv6"
		case bind.IsValid() && bind.IsUnspecified():
			lan, key = b.ownAddress(bind), "bind_addr"
		default:
			lan, key = bind, "bind_addr"
		}
	}
	wan, wanKey := b.address("advertise_addr_wan", s.AdvertiseWAN), "advertise_addr_wan"
	if !wan.IsValid() && s.AdvertiseWAN == nil {
		switch {
		case wan4.IsValid():
			wan, wanKey = wan4, "advertise_addr_wan_ipv4"
		case wan6.IsValid():
			wan, wanKey = wan6, "advertise_addr_wan_ipv6"
		default:
			wan, wanKey = lan, ""
		}
	}
	if lan.IsValid() && lan.IsUnspecified() {
		b.bad(key, "Advertise address cannot be 0.0.0.0, :: or [::]")
	}
	if wanKey != "" && wan.IsValid() && wan.IsUnspecified() {
		b.bad(wanKey, "Advertise WAN address cannot be 0.0.0.0, :: or [::]")
	}
	n.Advertise, n.AdvertiseWAN = lan, wan

	tag := func(name string, addrs ...netip.Addr) {
		for _, a := range addrs {
			if a.IsValid() {
				n.TaggedAddresses[name] = a.String()
				return
			}
		}
	}
	only := func(a netip.Addr, v6 bool) netip.Addr {
		if a.IsValid() && a.Is4() != v6 {
			return a
		}
		return netip.Addr{}
	}
	tag("lan", lan)
	tag("wan", wan)
	tag("lan_ipv4", lan4, only(lan, false))
	tag("lan_ipv6", lan6, only(lan, true))
	tag("wan_ipv4", wan4, only(wan, false))
	tag("wan_ipv6", wan6, only(wan, true))
}

// ownAddress asks the machine for its address where the agent binds to all.
func (b *builder) ownAddress(bind netip.Addr) netip.Addr {
	what, many, ask := "private IPv4", "Multiple private IPv4 addresses found. Please configure one with 'bind' and/or 'advertise'.", b.machine.PrivateIPv4
	if bind.Is6() {
		what, many, ask = "public IPv6", "Multiple public IPv6 addresses found. Please configure one with 'bind' and/or 'advertise'.", b.machine.PublicIPv6
	}
	out, err := ask()
	addrs := strings.Fields(out)
	switch {
	case err != nil:
		b.bad("bind_addr", "Error detecting %s address: %v", what, err)
	case len(addrs) == 0:
		b.bad("bind_addr", "No %s address found. Please configure one with 'bind' and/or 'advertise'.", what)
	case len(addrs) > 1:
		b.bad("bind_addr", "%s", many)
	default:
		a, err := parseAddr(addrs[0])
		if err != nil {
			b.bad("bind_addr", "Error detecting %s address: %v", what, err)
		}
		return a
	}
	return netip.Addr{}
}

// listeners fills in where the APIs are served.
func (b *builder) listeners(n *Network, t TLS) {
	s := &b.s.networkSettings
	client, clientKey := or(s.ClientAddr, "127.0.0.1"), "client_addr"
	listen := func(name string, addr *string, port int) []Listen {
		if port == 0 {
			return nil
		}
		text, key := client, clientKey
		if addr != nil {
			text, key = *addr, "addresses."+name
		}
		before := len(b.problems)
		addrs := b.expandAddrs(key, text)
		if len(addrs) == 0 && len(b.problems) == before {
			b.bad(key, "%s cannot be empty", key)
		}
		var out []Listen
		for _, a := range addrs {
			if path, ok := strings.CutPrefix(a, "unix://"); ok {
				if addr == nil {
					b.bad(key, "%s cannot be a unix socket", key)
					continue
				}
				out = append(out, Listen{"unix", path})
				continue
			}
			ip, err := parseAddr(a)
			if err != nil {
				b.bad(key, "%s: invalid ip address: %s", key, a)
				continue
			}
			out = append(out, Listen{"tcp", net.JoinHostPort(ip.String(), strconv.Itoa(port))})
		}
		return out
	}
	grpcTLS := -1
	if or(b.s.Server, false) {
		grpcTLS = 8503
	}
	n.HTTP = listen("http", s.Addresses.HTTP, b.port("http", s.Ports.HTTP, 8500))
	n.GRPC = listen("grpc", s.Addresses.GRPC, b.port("grpc", s.Ports.GRPC, -1))
	https := b.port("https", s.Ports.HTTPS, -1)
	if https != 0 && t.HTTPS.CertFile == "" {
		// COMPAT: Consul binds the port and fails each handshake.
		b.warn("ports.https", "ports.https has no effect: tls.https.cert_file and key_file are not set")
		https = 0
	}
	n.HTTPS = listen("https", s.Addresses.HTTPS, https)
	gt := b.port("grpc_tls", s.Ports.GRPCTLS, grpcTLS)
	if gt != 0 && t.GRPC.CertFile == "" && !t.GRPC.UseAutoCert {
		if s.Ports.GRPCTLS != nil {
			b.warn("ports.grpc_tls", "ports.grpc_tls has no effect: tls.grpc.cert_file and key_file are not set")
		}
		gt = 0
	}
	n.GRPCTLS = listen("grpc_tls", s.Addresses.GRPCTLS, gt)

	used := map[string]string{}
	claim := func(name string, addrs ...string) {
		for _, a := range addrs {
			if other, ok := used[a]; ok {
				b.bad("ports."+name, "ports.%s: %s is the address of ports.%s already", name, a, other)
			}
			used[a] = name
		}
	}
	texts := func(ls []Listen) (out []string) {
		for _, l := range ls {
			out = append(out, l.String())
		}
		return out
	}
	if n.RPC.Addr().IsValid() {
		claim("server", n.RPC.String())
	}
	if n.SerfLAN.Addr().IsValid() {
		claim("serf_lan", n.SerfLAN.String())
	}
	if n.SerfWAN.Addr().IsValid() && n.SerfWAN.Port() != 0 {
		claim("serf_wan", n.SerfWAN.String())
	}
	claim("http", texts(n.HTTP)...)
	claim("https", texts(n.HTTPS)...)
	claim("grpc", texts(n.GRPC)...)
	claim("grpc_tls", texts(n.GRPCTLS)...)
}
