package cluster

import (
	"net"
	"strconv"
	"strings"

	"github.com/hashicorp/serf/serf"
)

// Tags of gossip members.
const (
	tagRole        = "role"
	tagDatacenter  = "dc"
	tagID          = "id"
	tagPort        = "port"
	tagWANJoinPort = "wan_join_port"
	tagBootstrap   = "bootstrap"
	tagExpect      = "expect"
	tagNonVoter    = "nonvoter"
	tagUseTLS      = "use_tls"

	roleServer = "consul"
	roleClient = "node"
)

// server is what a gossip member's tags say of a server.
type server struct {
	name    string // without the datacenter
	member  string // as it is called in its pool
	id      string
	dc      string
	address string // ip:port of its RPC port
	// wanAddress is where it gossips with other datacenters; "" where unknown.
	wanAddress string
	bootstrap  bool
	expect     int
	nonVoter   bool
	useTLS     bool
	status     serf.MemberStatus
}

// parseServer returns the server that m is; false when it is none.
func parseServer(m serf.Member) (server, bool) {
	if m.Tags[tagRole] != roleServer {
		return server{}, false
	}
	port, err := strconv.Atoi(m.Tags[tagPort])
	if err != nil || port <= 0 || port > 65535 {
		return server{}, false
	}
	s := server{
		name:      strings.TrimSuffix(m.Name, "."+m.Tags[tagDatacenter]),
		member:    m.Name,
		id:        m.Tags[tagID],
		dc:        m.Tags[tagDatacenter],
		address:   joinHostPort(m.Addr.String(), port),
		bootstrap: m.Tags[tagBootstrap] != "",
		nonVoter:  m.Tags[tagNonVoter] != "",
		useTLS:    m.Tags[tagUseTLS] != "",
		status:    m.Status,
	}
	if p, err := strconv.Atoi(m.Tags[tagWANJoinPort]); err == nil {
		s.wanAddress = net.JoinHostPort(m.Addr.String(), strconv.Itoa(p))
	}
	s.expect, _ = strconv.Atoi(m.Tags[tagExpect])
	return s, true
}

// serversOf returns the servers among the members.
func serversOf(members []serf.Member) []server {
	var out []server
	for _, m := range members {
		if s, ok := parseServer(m); ok {
			out = append(out, s)
		}
	}
	return out
}

// tags returns what an agent tells of itself in both pools.
func (c *Config) tags(isServer bool, rpcPort int) map[string]string {
	t := map[string]string{
		tagRole:       roleClient,
		tagDatacenter: c.Datacenter,
		"segment":     "",
		tagID:         c.NodeID,
		// Versions of the membership protocol, Consul's.
		"vsn":     "2",
		"vsn_min": "2",
		"vsn_max": "3",
		"build":   c.Build,
	}
	if !isServer {
		return t
	}
	t[tagRole] = roleServer
	t["raft_vsn"] = "3"
	t[tagPort] = strconv.Itoa(rpcPort)
	t["acls"] = "0"
	t["ft_fs"] = "1" // knows federation states
	t["ft_si"] = "1" // knows service-intentions entries
	if c.GRPCPort > 0 {
		t["grpc_port"] = strconv.Itoa(c.GRPCPort)
	}
	if c.GRPCTLSPort > 0 {
		t["grpc_tls_port"] = strconv.Itoa(c.GRPCTLSPort)
	}
	if c.Bootstrap {
		t[tagBootstrap] = "1"
	}
	if c.BootstrapExpect > 0 {
		t[tagExpect] = strconv.Itoa(c.BootstrapExpect)
	}
	if c.NonVoter {
		t[tagNonVoter] = "1"
		t["read_replica"] = "1"
	}
	if c.ServerTLS != nil {
		t[tagUseTLS] = "1"
	}
	return t
}
