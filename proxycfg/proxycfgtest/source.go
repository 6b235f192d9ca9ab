// Package proxycfgtest has a [proxycfg.Source] that answers from text, for the
// tests of whoever builds snapshots or uses them. It is not for production code.
package proxycfgtest

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/consul/api"
	"github.com/hashicorp/go-memdb"
	"github.com/rogpeppe/go-internal/txtar"

	"github.com/sluicemesh/sluice/acl"
	"github.com/sluicemesh/sluice/agent/catalog"
	"github.com/sluicemesh/sluice/agent/configentry"
	"github.com/sluicemesh/sluice/agent/connect"
	"github.com/sluicemesh/sluice/proxycfg"
)

// TrustDomain of every [Source].
const TrustDomain = "11111111-2222-3333-4444-555555555555.consul"

// Key is the private key in every leaf. Tests look for it where it must not be.
const Key = "THE PRIVATE KEY"

// AsOf is the time of every answer.
var AsOf = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)

// Data is what a [Source] answers.
type Data struct {
	Index uint64
	// Connect is by datacenter; this one's is also what ConnectAll returns.
	Connect  map[string]map[catalog.ServiceName][]*catalog.Instance
	Gateways map[string][]*catalog.Instance
	Servers  []*catalog.Instance
	Entries  []configentry.Entry
	Roots    *connect.Roots
	// Faults are the errors of reads: "roots", "leaf", "intentions", "gateways",
	// "services", "servers", "resolvers", "entry KIND NAME", "connect DC SERVICE".
	Faults map[string]error
}

// Source answers from [Data]. It is safe for concurrent use.
type Source struct {
	Datacenter string

	mu      sync.Mutex
	data    Data
	changed chan struct{}
	builds  int // reads of the roots, of which each build makes one
}

var (
	_ proxycfg.Source       = (*Source)(nil)
	_ proxycfg.ServerSource = (*Source)(nil)
)

// New returns a source of a datacenter.
func New(datacenter string, d Data) *Source {
	if d.Roots == nil {
		d.Roots = &connect.Roots{
			ActiveRootID: "root-1", TrustDomain: TrustDomain,
			Roots: []*connect.Root{{ID: "root-1", Active: true, RootCert: "ROOT CERTIFICATE\n", ModifyIndex: 3}},
		}
	}
	return &Source{Datacenter: datacenter, data: d, changed: make(chan struct{})}
}

// Update changes what is answered and closes the channels of all watches. The
// edit replaces what it changes: values that were given out stay as they are.
func (s *Source) Update(edit func(d *Data)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.data.Connect, s.data.Gateways = maps.Clone(s.data.Connect), maps.Clone(s.data.Gateways)
	s.data.Faults, s.data.Entries = maps.Clone(s.data.Faults), slices.Clone(s.data.Entries)
	if s.data.Faults == nil {
		s.data.Faults = make(map[string]error)
	}
	edit(&s.data)
	close(s.changed)
	s.changed = make(chan struct{})
}

// SetQuietly is Update without waking anybody.
func (s *Source) SetQuietly(edit func(d *Data)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	edit(&s.data)
}

// Builds returns how often a snapshot has been built.
func (s *Source) Builds() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.builds
}

func (s *Source) read(ws memdb.WatchSet, what string) (Data, catalog.Freshness, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if ws != nil {
		ws.Add(s.changed)
	}
	if what == "roots" {
		s.builds++
	}
	return s.data, catalog.Freshness{Index: s.data.Index, AsOf: AsOf}, s.data.Faults[what]
}

// Roots implements [proxycfg.Source].
func (s *Source) Roots(ws memdb.WatchSet) (*connect.Roots, catalog.Freshness, error) {
	d, f, err := s.read(ws, "roots")
	return d.Roots, f, err
}

// Leaf implements [proxycfg.Source].
func (s *Source) Leaf(ws memdb.WatchSet, name catalog.ServiceName) (*connect.Leaf, catalog.Freshness, error) {
	_, f, err := s.read(ws, "leaf")
	if err != nil {
		return nil, f, err
	}
	id := connect.ServiceID{TrustDomain: TrustDomain, Service: name, Datacenter: s.Datacenter}
	return &connect.Leaf{
		CertPEM: "CERTIFICATE OF " + name.String() + "\n", PrivateKeyPEM: acl.Secret(Key),
		Service: name.Name, ServiceURI: id.URI(), ValidBefore: AsOf.Add(72 * time.Hour),
	}, f, nil
}

// ConfigEntry implements [proxycfg.Source].
func (s *Source) ConfigEntry(ws memdb.WatchSet, kind, name string) (configentry.Entry, catalog.Freshness, error) {
	d, f, err := s.read(ws, "entry "+kind+" "+name)
	if err != nil {
		return nil, f, err
	}
	for _, e := range d.Entries {
		if e.GetKind() == kind && e.GetName() == name {
			return e, f, nil
		}
	}
	return nil, f, nil
}

// ConfigEntries implements [proxycfg.Source].
func (s *Source) ConfigEntries(ws memdb.WatchSet, kind string) ([]configentry.Entry, catalog.Freshness, error) {
	d, f, err := s.read(ws, "resolvers")
	if err != nil {
		return nil, f, err
	}
	var out []configentry.Entry
	for _, e := range d.Entries {
		if e.GetKind() == kind {
			out = append(out, e)
		}
	}
	return out, f, nil
}

// Intentions implements [proxycfg.Source].
func (s *Source) Intentions(ws memdb.WatchSet, destination catalog.ServiceName) ([]*configentry.Intention, catalog.Freshness, error) {
	_, f, err := s.read(ws, "intentions")
	if err != nil {
		return nil, f, err
	}
	in, err := configentry.IntentionsFor(func(kind, name string) (configentry.Entry, error) {
		e, _, err := s.ConfigEntry(nil, kind, name)
		return e, err
	}, destination)
	return in, f, err
}

// Connect implements [proxycfg.Source].
func (s *Source) Connect(ws memdb.WatchSet, datacenter string, name catalog.ServiceName) ([]*catalog.Instance, catalog.Freshness, error) {
	d, f, err := s.read(ws, "connect "+datacenter+" "+name.String())
	if err != nil {
		return nil, f, err
	}
	return d.Connect[datacenter][name], f, nil
}

// ConnectAll implements [proxycfg.Source].
func (s *Source) ConnectAll(ws memdb.WatchSet) (map[catalog.ServiceName][]*catalog.Instance, catalog.Freshness, error) {
	d, f, err := s.read(ws, "services")
	if err != nil {
		return nil, f, err
	}
	return d.Connect[s.Datacenter], f, nil
}

// MeshGateways implements [proxycfg.Source].
func (s *Source) MeshGateways(ws memdb.WatchSet) (map[string][]*catalog.Instance, catalog.Freshness, error) {
	d, f, err := s.read(ws, "gateways")
	if err != nil {
		return nil, f, err
	}
	return d.Gateways, f, nil
}

// Servers implements [proxycfg.ServerSource].
func (s *Source) Servers(ws memdb.WatchSet) ([]*catalog.Instance, catalog.Freshness, error) {
	d, f, err := s.read(ws, "servers")
	if err != nil {
		return nil, f, err
	}
	return d.Servers, f, nil
}

// Case is a parsed test case.
type Case struct {
	Source *Source
	Proxy  proxycfg.Proxy
}

// Parse reads a case in datacenter dc1 from the sections of an archive:
//
//	-- catalog --   a line per instance: DC SERVICE ID NODE NODE-ADDRESS [ADDRESS]:PORT and then
//	                any of wan=HOST:PORT nodewan=HOST check=STATUS meta.KEY=VALUE index=N zone=REGION/ZONE
//	                weight=N. SERVICE is a service with a sidecar, "gateway" for a mesh gateway, or
//	                "consul" for a server.
//	-- entries --   a JSON array of config entries
//	-- faults --    a line per read that fails: READ: TEXT, where the texts "pending" and "denied" are those errors
//	-- proxy --     the registration, as JSON
//	-- default --   "allow" or "deny"; deny where absent
func Parse(ar *txtar.Archive) (*Case, error) {
	const dc = "dc1"
	d := Data{
		Index: 100, Connect: map[string]map[catalog.ServiceName][]*catalog.Instance{},
		Gateways: map[string][]*catalog.Instance{}, Faults: map[string]error{},
	}
	c := &Case{Proxy: proxycfg.Proxy{
		Node: &catalog.Node{Node: "here", Address: "10.0.0.1", Datacenter: dc}, Datacenter: dc, Token: "the-token",
	}}
	for _, f := range ar.Files {
		var err error
		switch f.Name {
		case "catalog":
			err = lines(f.Data, d.instance)
		case "faults":
			err = lines(f.Data, d.fault)
		case "entries":
			err = d.entries(f.Data)
		case "proxy":
			c.Proxy.Service = new(catalog.Service)
			err = json.Unmarshal(f.Data, c.Proxy.Service)
		case "default":
			c.Proxy.DefaultAllow = strings.TrimSpace(string(f.Data)) == "allow"
		}
		if err != nil {
			return nil, fmt.Errorf("section %s: %w", f.Name, err)
		}
	}
	c.Source = New(dc, d)
	return c, nil
}

func lines(data []byte, each func(line string) error) error {
	for line := range strings.Lines(string(data)) {
		line = strings.TrimSpace(line)
		if line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		if err := each(line); err != nil {
			return fmt.Errorf("%q: %w", line, err)
		}
	}
	return nil
}

func (d *Data) fault(line string) error {
	read, text, ok := strings.Cut(line, ": ")
	if !ok {
		return errors.New("want READ: TEXT")
	}
	switch text {
	case "pending":
		d.Faults[read] = proxycfg.ErrPending
	case "denied":
		d.Faults[read] = fmt.Errorf("%w: the token lacks service:read", proxycfg.ErrDenied)
	default:
		d.Faults[read] = errors.New(text)
	}
	return nil
}

func (d *Data) entries(data []byte) error {
	var raws []json.RawMessage
	if err := json.Unmarshal(data, &raws); err != nil {
		return err
	}
	for _, raw := range raws {
		e, err := api.DecodeConfigEntryFromJSON(raw)
		if err != nil {
			return err
		}
		d.Entries = append(d.Entries, e)
	}
	return nil
}

func (d *Data) instance(line string) error {
	w := strings.Fields(line)
	if len(w) < 6 {
		return errors.New("want DC SERVICE ID NODE NODE-ADDRESS [ADDRESS]:PORT")
	}
	host, port, err := net.SplitHostPort(w[5])
	if err != nil {
		return err
	}
	n, err := strconv.Atoi(port)
	if err != nil {
		return err
	}
	inst := Instance(w[0], w[1], w[2], w[3], w[4], n)
	inst.Service.Address = host
	status := api.HealthPassing
	for _, opt := range w[6:] {
		k, v, _ := strings.Cut(opt, "=")
		switch {
		case k == "check":
			status = v
		case k == "nodewan":
			inst.Node.TaggedAddresses = map[string]string{"wan": v}
		case k == "wan":
			host, port, err := net.SplitHostPort(v)
			if err != nil {
				return err
			}
			n, err := strconv.Atoi(port)
			if err != nil {
				return err
			}
			inst.Service.TaggedAddresses = map[string]api.ServiceAddress{"wan": {Address: host, Port: n}}
		case k == "index":
			n, err := strconv.ParseUint(v, 10, 64)
			if err != nil {
				return err
			}
			inst.Service.ModifyIndex = n
		case k == "weight":
			n, err := strconv.Atoi(v)
			if err != nil {
				return err
			}
			inst.Service.Weights.Passing = n
		case k == "zone":
			region, zone, _ := strings.Cut(v, "/")
			inst.Service.Locality = &api.Locality{Region: region, Zone: zone}
		case strings.HasPrefix(k, "meta."):
			inst.Service.Meta[strings.TrimPrefix(k, "meta.")] = v
		default:
			return fmt.Errorf("unknown option %q", k)
		}
	}
	inst.Checks[0].Status = status
	if w[1] == "consul" {
		inst.Service.Kind, inst.Service.Service, inst.Service.Proxy = "", "consul", nil
		d.Servers = append(d.Servers, inst)
		return nil
	}
	if w[1] == "gateway" {
		d.Gateways[w[0]] = append(d.Gateways[w[0]], inst)
		return nil
	}
	if d.Connect[w[0]] == nil {
		d.Connect[w[0]] = map[catalog.ServiceName][]*catalog.Instance{}
	}
	name := catalog.Name(w[1])
	d.Connect[w[0]][name] = append(d.Connect[w[0]][name], inst)
	return nil
}

// Instance returns a passing sidecar of a service, or a passing mesh gateway
// where the service is "gateway".
func Instance(dc, service, id, node, address string, port int) *catalog.Instance {
	inst := &catalog.Instance{
		Node: &catalog.Node{Node: node, Address: address, Datacenter: dc, ModifyIndex: 5},
		Service: &catalog.Service{
			Kind: api.ServiceKindConnectProxy, ID: id, Service: service + "-sidecar-proxy", Port: port,
			Meta: map[string]string{}, Weights: api.AgentWeights{Passing: 1, Warning: 1}, ModifyIndex: 7,
			Proxy: &api.AgentServiceConnectProxyConfig{DestinationServiceName: service},
		},
		Checks: api.HealthChecks{{Node: node, CheckID: "service:" + id, Name: "listening", ServiceID: id, Status: api.HealthPassing, ModifyIndex: 6}},
	}
	if service == "gateway" {
		inst.Service.Kind, inst.Service.Service, inst.Service.Proxy = api.ServiceKindMeshGateway, "mesh-gateway", nil
	}
	return inst
}
