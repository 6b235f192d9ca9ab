package cluster

import (
	"crypto/tls"
	"encoding/base64"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/go-sockaddr"
	"github.com/hashicorp/memberlist"

	"github.com/sluicemesh/sluice/acl"
	"github.com/sluicemesh/sluice/agent/configentry"
)

// Default ports.
const (
	DefaultServerPort  = 8300
	DefaultSerfLANPort = 8301
	DefaultSerfWANPort = 8302
)

// AnyPort, where a port is asked for, lets the system choose a free one.
const AnyPort = -1

// Config says who an agent is and how it finds the others. The zero value of a
// field means what its comment says.
type Config struct {
	// NodeName is required and unique in the datacenter.
	NodeName string
	// NodeID is a UUID that stays with the node. Empty: the one kept in DataDir,
	// else a new one.
	NodeID string
	// Datacenter is lower-case; empty means dc1.
	Datacenter string
	// PrimaryDatacenter holds the mesh's authority; empty means Datacenter. It
	// must be equal everywhere.
	PrimaryDatacenter string
	// Domain is the DNS domain that the names in RPC certificates end in; empty
	// means "consul".
	Domain string
	// NodeMeta is carried into the catalog by whoever registers the node.
	NodeMeta map[string]string
	// Build is the version that other agents see, such as "1.22.0:abcdef".
	Build string

	// Bootstrap makes a server elect itself, alone, when it has no data.
	Bootstrap bool
	// BootstrapExpect makes that many servers which all say the same number found
	// the datacenter together; 0 waits to be added to one. Not with Bootstrap.
	BootstrapExpect int
	// Dev is one server in memory with short timings: it implies Bootstrap and an
	// empty DataDir.
	Dev bool
	// NonVoter makes a server replicate and answer reads without a vote.
	NonVoter bool
	// DataDir keeps the log, the state and the gossip pools' memory. Empty keeps
	// everything in memory.
	DataDir string

	// BindLAN is the IP that the RPC port and LAN gossip listen on; empty means
	// 0.0.0.0. BindWAN is that of WAN gossip; empty means BindLAN.
	BindLAN, BindWAN string
	// AdvertiseLAN is the IP that others reach this agent at; empty means BindLAN
	// or, where that is unspecified, the host's private IP. AdvertiseWAN is the
	// same for other datacenters; empty means AdvertiseLAN.
	AdvertiseLAN, AdvertiseWAN string
	// Ports; 0 means the default, [AnyPort] a free one.
	ServerPort, SerfLANPort, SerfWANPort int
	// GRPCPort and GRPCTLSPort are only told to the others; <= 0 tells nothing.
	GRPCPort, GRPCTLSPort int

	// RetryJoin are addresses (host, host:port) of agents of this datacenter, one
	// of which is enough. RetryJoinWAN are servers of other datacenters.
	RetryJoin, RetryJoinWAN []string
	// RetryInterval is the time between attempts to join once the quick ones at
	// the start have failed; 0 means 30 s.
	RetryInterval, RetryIntervalWAN time.Duration
	// RetryMax ends Run with an error after that many attempts; 0 never gives up.
	RetryMax, RetryMaxWAN int
	// RejoinAfterLeave makes an agent that left return to the pools it knew.
	RejoinAfterLeave bool
	// GossipKey encrypts gossip in both pools: base64 of 16, 24 or 32 bytes; empty
	// sends clear text.
	GossipKey acl.Secret
	// GossipAcceptsClear and GossipSendsClear let clear text in and out although
	// there is a key, for the time in which a pool gets one.
	GossipAcceptsClear, GossipSendsClear bool
	// AllowedLAN and AllowedWAN are the networks that members may be in; empty is
	// every one.
	AllowedLAN, AllowedWAN []netip.Prefix
	// ReconnectTimeoutLAN is how long a failed member is remembered; 0 means 72 h. A
	// failed server keeps its vote as long, unless another one takes its name.
	ReconnectTimeoutLAN, ReconnectTimeoutWAN time.Duration

	// ServerTLS, where set, is offered on the RPC port; where it demands client
	// certificates clear text is refused. ClientTLS, where set, is used towards
	// servers that offer TLS. The names, ALPN and, without VerifyServerHostname,
	// the leniency about names are set here.
	ServerTLS, ClientTLS *tls.Config
	// VerifyServerHostname demands the name server.DATACENTER.DOMAIN of servers.
	VerifyServerHostname bool

	// RaftMultiplier scales raft's timings, 1..10; 0 means 5 (1 with Dev).
	RaftMultiplier int
	// LeaveDrainTime is how long Leave goes on answering after it left; 0 means
	// 5 s, negative not at all.
	LeaveDrainTime time.Duration
	// RPCHoldTimeout is how long a request waits for a leader; 0 means 7 s.
	RPCHoldTimeout time.Duration

	// NoConnect turns the certificate authority off. CAProvider and CAConfig count
	// only while the cluster has no CA configuration.
	NoConnect  bool
	CAProvider string
	CAConfig   map[string]any
	// BootstrapEntries are written by the primary's leader where absent.
	BootstrapEntries []configentry.Entry
	// ReplicationToken is sent with requests to the primary.
	ReplicationToken acl.Secret

	// Logger may be nil.
	Logger hclog.Logger

	// GossipLAN and GossipWAN replace the gossip sockets, Network those of the RPC
	// port; nil uses real ones. They belong to the agent once Run is called.
	GossipLAN, GossipWAN memberlist.Transport
	Network              Network
}

// Validate returns everything that is wrong with c as written, joined. The
// texts are Consul's where it has them.
func (c *Config) Validate() error {
	var errs []error
	add := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	if c.NodeName == "" {
		add("node_name cannot be empty")
	}
	if c.Bootstrap && c.BootstrapExpect > 0 {
		add("'bootstrap_expect > 0' and 'bootstrap = true' are mutually exclusive")
	}
	if c.Dev && c.BootstrapExpect > 0 {
		add("'bootstrap_expect > 0' not allowed in dev mode")
	}
	if c.BootstrapExpect < 0 {
		add("bootstrap_expect cannot be %d. Must be greater than or equal to zero", c.BootstrapExpect)
	}
	if c.RaftMultiplier < 0 || c.RaftMultiplier > 10 {
		add("performance.raft_multiplier cannot be %d. Must be between 1 and 10", c.RaftMultiplier)
	}
	for _, a := range []struct{ key, ip string }{
		{"bind_addr", c.BindLAN}, {"serf_wan", c.BindWAN},
		{"advertise_addr", c.AdvertiseLAN}, {"advertise_addr_wan", c.AdvertiseWAN},
	} {
		if a.ip == "" {
			continue
		}
		ip := net.ParseIP(a.ip)
		switch {
		case ip == nil:
			add("%s: invalid ip address: %s", a.key, a.ip)
		case ip.IsUnspecified() && strings.HasPrefix(a.key, "advertise"):
			add("Advertise address cannot be 0.0.0.0, :: or [::]") //nolint:staticcheck // Consul's text
		}
	}
	for _, p := range []struct {
		key  string
		port int
	}{
		{"ports.server", c.ServerPort}, {"ports.serf_lan", c.SerfLANPort}, {"ports.serf_wan", c.SerfWANPort},
	} {
		if p.port > 65535 || p.port < AnyPort {
			add("%s: invalid port %d", p.key, p.port)
		}
	}
	if _, err := c.gossipKey(); err != nil {
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

func (c *Config) gossipKey() ([]byte, error) {
	if c.GossipKey.Reveal() == "" {
		return nil, nil
	}
	key, err := base64.StdEncoding.DecodeString(c.GossipKey.Reveal())
	if err != nil {
		return nil, fmt.Errorf("encrypt has invalid key: %w", err)
	}
	if err := memberlist.ValidateKey(key); err != nil {
		return nil, fmt.Errorf("encrypt has invalid key: %w", err)
	}
	return key, nil
}

// withDefaults returns c with every default filled in. It fails only where an
// address has to be found on the host and there is none.
func (c Config) withDefaults() (Config, error) {
	str := func(s *string, def string) {
		if *s == "" {
			*s = def
		}
	}
	dur := func(d *time.Duration, def time.Duration) {
		if *d == 0 {
			*d = def
		}
	}
	port := func(p *int, def int) {
		switch *p {
		case 0:
			*p = def
		case AnyPort:
			*p = 0
		}
	}
	str(&c.Datacenter, "dc1")
	str(&c.PrimaryDatacenter, c.Datacenter)
	str(&c.Domain, "consul")
	c.Domain = strings.Trim(c.Domain, ".")
	str(&c.BindLAN, "0.0.0.0")
	str(&c.BindWAN, c.BindLAN)
	if c.AdvertiseLAN == "" {
		c.AdvertiseLAN = c.BindLAN
		if net.ParseIP(c.BindLAN).IsUnspecified() {
			ip, err := sockaddr.GetPrivateIP()
			if err != nil {
				return c, fmt.Errorf("find advertise address: %w", err)
			}
			switch {
			case ip == "":
				return c, errors.New("No private IPv4 address found. Please configure one with 'bind' and/or 'advertise'.") //nolint:staticcheck // Consul's text
			case strings.Contains(ip, " "):
				return c, errors.New("Multiple private IPv4 addresses found. Please configure one with 'bind' and/or 'advertise'.") //nolint:staticcheck // Consul's text
			}
			c.AdvertiseLAN = ip
		}
	}
	str(&c.AdvertiseWAN, c.AdvertiseLAN)
	port(&c.ServerPort, DefaultServerPort)
	port(&c.SerfLANPort, DefaultSerfLANPort)
	port(&c.SerfWANPort, DefaultSerfWANPort)
	dur(&c.RetryInterval, 30*time.Second)
	dur(&c.RetryIntervalWAN, 30*time.Second)
	dur(&c.ReconnectTimeoutLAN, 72*time.Hour)
	dur(&c.ReconnectTimeoutWAN, 72*time.Hour)
	dur(&c.LeaveDrainTime, 5*time.Second)
	dur(&c.RPCHoldTimeout, 7*time.Second)
	if c.Dev {
		c.Bootstrap = true
		c.DataDir = ""
	}
	if c.RaftMultiplier == 0 {
		c.RaftMultiplier = 5
		if c.Dev {
			c.RaftMultiplier = 1
		}
	}
	if c.Logger == nil {
		c.Logger = hclog.NewNullLogger()
	}
	if c.Network == nil {
		c.Network = tcpNetwork{}
	}
	return c, nil
}

func joinHostPort(ip string, port int) string { return net.JoinHostPort(ip, strconv.Itoa(port)) }
