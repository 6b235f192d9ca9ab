package config

import (
	"cmp"
	"fmt"
	"os"
	"reflect"
	"strconv"
	"strings"
	"time"

	"github.com/hashicorp/consul/api"

	"github.com/sluicemesh/sluice/agent/catalog"
)

// Service is a service definition of a file.
type Service struct {
	Definition catalog.Definition
	// Source is where the definition begins.
	Source Pos
}

// Check is a health check of a file that stands outside of a service definition:
// of the node, or of the service it names.
type Check struct {
	Definition catalog.CheckDefinition
	// ServiceID is the service the check is of; empty means the node.
	ServiceID string
	Token     secret
	Source    Pos
}

// ParseServiceFile reads the service definitions of a file, which has them as
// the agent's own files do: under service or services. The error is [Problems],
// or that of reading the file.
func ParseServiceFile(path string) ([]Service, []Warning, error) {
	src, err := os.ReadFile(path)
	if err != nil {
		return nil, nil, fmt.Errorf("read service definition: %w", err)
	}
	format := formatOf(path)
	if format == "" {
		format = guess(src)
	}
	var d decoder
	var file struct {
		Services []serviceSettings `config:"services,service"`
	}
	docs, err := parse(path, format, src)
	d.problems.add(Pos{}, err)
	for _, doc := range docs {
		d.decode(doc, reflect.ValueOf(&file).Elem(), "")
	}
	services := d.services(file.Services)
	if len(services) == 0 && len(d.problems) == 0 {
		d.problems = append(d.problems, Problem{Pos: Pos{File: path}, Text: "no service definition in the file", Hint: `write it in a "service" block`})
	}
	d.warnIgnored()
	if err := d.problems.err(); err != nil {
		return nil, d.warnings, err
	}
	return services, d.warnings, nil
}

// services turns the definitions of the files into registrations and checks
// them.
func (d *decoder) services(all []serviceSettings) []Service {
	var out []Service
	first := map[string]Pos{}
	for i := range all {
		s := &all[i]
		path := fmt.Sprintf("services[%d]", i)
		def := d.definition(s, path)
		if id := cmp.Or(def.ID, def.Name); id != "" {
			if at, again := first[id]; again {
				d.problems = append(d.problems, Problem{Pos: s.At, Path: path, Text: fmt.Sprintf("service ID %q is defined already at %s", id, at)})
			} else {
				first[id] = s.At
			}
		}
		d.register(&def, s.At, path)
		out = append(out, Service{def, s.At})
	}
	return out
}

// proxyKinds are the kinds a service may say it is of.
var proxyKinds = map[string]bool{
	string(api.ServiceKindConnectProxy):       true,
	string(api.ServiceKindMeshGateway):        true,
	string(api.ServiceKindTerminatingGateway): true,
	string(api.ServiceKindIngressGateway):     true,
	string(api.ServiceKindAPIGateway):         true,
}

func (d *decoder) definition(s *serviceSettings, path string) catalog.Definition {
	if s.Kind != "" && s.Kind != "typical" && !proxyKinds[s.Kind] {
		d.warnings = append(d.warnings, Warning{d.at(path + ".kind"), fmt.Sprintf("service %q: unknown kind %q is taken for an ordinary service", s.Name, s.Kind)})
	}
	if !proxyKinds[s.Kind] {
		s.Kind = ""
	}
	def := catalog.Definition{Token: s.Token, AgentServiceRegistration: api.AgentServiceRegistration{
		Kind: api.ServiceKind(s.Kind), ID: s.ID, Name: s.Name, Tags: s.Tags,
		Port: s.Port, Ports: s.Ports, Address: s.Address, SocketPath: s.SocketPath,
		TaggedAddresses: s.TaggedAddresses, EnableTagOverride: s.EnableTagOverride, Meta: s.Meta,
		Proxy: s.Proxy, Locality: s.Locality, Namespace: s.Namespace, Partition: s.Partition,
	}}
	if s.Weights != nil {
		def.Weights = &api.AgentWeights{Passing: 1, Warning: 1}
		if s.Weights.Passing != nil {
			def.Weights.Passing = *s.Weights.Passing
		}
		if s.Weights.Warning != nil {
			def.Weights.Warning = *s.Weights.Warning
		}
	}
	for _, x := range []struct {
		key    string
		checks []checkSettings
	}{{"check", s.Check}, {"checks", s.Checks}} {
		for i := range x.checks {
			d.serviceCheck(&def, &x.checks[i], fmt.Sprintf("%s.%s[%d]", path, x.key, i))
		}
	}
	d.port(s.Port, path+".port")
	for _, name := range sortedKeys(s.TaggedAddresses) {
		d.port(s.TaggedAddresses[name].Port, path+".tagged_addresses."+name+".port")
	}
	if p := s.Proxy; p != nil {
		d.port(p.LocalServicePort, path+".proxy.local_service_port")
		for i, e := range p.Expose.Paths {
			d.port(e.ListenerPort, fmt.Sprintf("%s.proxy.expose.paths[%d].listener_port", path, i))
			d.port(e.LocalPathPort, fmt.Sprintf("%s.proxy.expose.paths[%d].local_path_port", path, i))
		}
		d.mode(p.MeshGateway.Mode, path+".proxy.mesh_gateway.mode")
		for i, u := range p.Upstreams {
			d.port(u.LocalBindPort, fmt.Sprintf("%s.proxy.upstreams[%d].local_bind_port", path, i))
			d.mode(u.MeshGateway.Mode, fmt.Sprintf("%s.proxy.upstreams[%d].mesh_gateway.mode", path, i))
		}
		// The block of a sidecar need not say its kind.
		if s.Kind == "" && !strings.HasSuffix(path, ".sidecar_service") {
			d.warnings = append(d.warnings, Warning{d.at(path + ".proxy"), fmt.Sprintf("service %q: proxy has no effect without kind = \"connect-proxy\"", s.Name)})
		}
	}
	if c := s.Connect; c != nil {
		def.Connect = &api.AgentServiceConnect{Native: c.Native}
		if c.SidecarService != nil {
			side := d.definition(c.SidecarService, path+".connect.sidecar_service")
			def.Connect.SidecarService = &side.AgentServiceRegistration
			def.SidecarToken = side.Token
		}
	}
	return def
}

// serviceCheck adds a check to the definition it is written in.
func (d *decoder) serviceCheck(def *catalog.Definition, c *checkSettings, path string) {
	if !d.checkTimes(&c.AgentServiceCheck, path) {
		d.breaks(path)
	}
	if c.ServiceID != "" || c.Token != "" {
		d.problems = append(d.problems, Problem{Pos: c.At, Path: path, Text: "a check within a service has no service_id or token of its own"})
	}
	def.Checks = append(def.Checks, &c.AgentServiceCheck)
}

// port checks a port; 0 is one that is not set.
func (d *decoder) port(port int, path string) {
	if port < 0 || port > 65535 {
		d.problems = append(d.problems, Problem{Pos: d.at(path), Path: path, Value: strconv.Itoa(port), Text: "expected a port, at most 65535"})
		d.breaks(path)
	}
}

// mode checks the mode of a mesh gateway.
//
// COMPAT: as in Consul, only files are held to this; the API takes any mode.
func (d *decoder) mode(m api.MeshGatewayMode, path string) {
	switch m {
	case api.MeshGatewayModeDefault, api.MeshGatewayModeNone, api.MeshGatewayModeLocal, api.MeshGatewayModeRemote:
	default:
		d.problems = append(d.problems, Problem{
			Pos: d.at(path), Path: path, Text: fmt.Sprintf("Invalid Mesh Gateway Mode: %q", m),
			Hint: `expected "none", "local" or "remote"`,
		})
	}
}

// checkTimes checks the durations of a check, which the API's type has as
// strings, and reports whether they are well-formed.
func (d *decoder) checkTimes(c *api.AgentServiceCheck, path string) (ok bool) {
	ok = true
	for _, t := range []struct{ key, value string }{
		{"interval", c.Interval}, {"timeout", c.Timeout}, {"ttl", c.TTL},
		{"deregister_critical_service_after", c.DeregisterCriticalServiceAfter},
	} {
		if t.value == "" {
			continue
		}
		if _, err := time.ParseDuration(t.value); err != nil {
			p := join(path, t.key)
			d.problems = append(d.problems, Problem{Pos: d.at(p), Path: p, Value: strconv.Quote(t.value), Text: `expected a duration such as "30s" or "1h30m"`})
			ok = false
		}
	}
	return ok
}

// checks turns the checks of the files into definitions and checks them.
func (d *decoder) checks(all []checkSettings) []Check {
	var out []Check
	first := map[string]Pos{}
	for i, c := range all {
		path := fmt.Sprintf("checks[%d]", i)
		timed := d.checkTimes(&all[i].AgentServiceCheck, path)
		if c.CheckID == "" {
			c.CheckID = c.Name
		}
		if at, again := first[c.CheckID]; again && c.CheckID != "" {
			d.problems = append(d.problems, Problem{Pos: c.At, Path: path, Text: fmt.Sprintf("check ID %q is defined already at %s", c.CheckID, at)})
		} else {
			first[c.CheckID] = c.At
		}
		out = append(out, Check{Definition: c.AgentServiceCheck, ServiceID: c.ServiceID, Token: c.Token, Source: c.At})
		if d.broken[path] || !timed {
			continue
		}
		if err := catalog.ValidateCheck(c.AgentServiceCheck); err != nil {
			d.problems = append(d.problems, Problem{Pos: c.At, Text: fmt.Sprintf("check %q: %v", c.CheckID, err)})
		}
		if c.CheckID == "" {
			d.problems = append(d.problems, Problem{Pos: c.At, Path: path, Text: "a check needs a name or an id"})
		}
	}
	return out
}

// register normalises a definition and reports what is wrong with it. One that
// could not be decoded is left alone: what it lacks may be what was not read.
func (d *decoder) register(def *catalog.Definition, at Pos, path string) {
	if d.broken[path] {
		return
	}
	catalog.NormalizeDefinition(def)
	var found Problems
	found.add(at, catalog.ValidateDefinition(def))
	for _, p := range found {
		p.Text = fmt.Sprintf("service %q: %s", def.Name, p.Text)
		d.problems = append(d.problems, p)
	}
}
