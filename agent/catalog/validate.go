package catalog

import (
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/hashicorp/consul/api"
	"github.com/hashicorp/go-multierror"
)

// The error texts below are Consul's, capital letters included: its clients
// match them.

const (
	maxMetaPairs   = 64
	maxMetaKey     = 128
	maxMetaValue   = 512
	maxWeightGiven = 65535
	reservedMeta   = "consul-"
	wildcard       = "*"
)

// ValidateRegistration says what is wrong with a registration over HTTP, in the
// order and in the words of Consul's API: the text of a 400 answer, or nil. What
// comes after the permission check is [ValidateSidecar].
func ValidateRegistration(d *Definition) error {
	if d.Name == "" {
		return errors.New("Missing service name")
	}
	if IsAnyAddress(d.Address) {
		return errors.New("Invalid service address")
	}
	if err := ValidateWeights(d.Weights); err != nil {
		return fmt.Errorf("Invalid Weights: %w", err)
	}
	if err := ValidateMeta(d.Meta, d.Kind == KindMeshGateway); err != nil {
		return fmt.Errorf("Invalid Service Meta: %w", err)
	}
	var all *multierror.Error
	for _, err := range []error{ValidateService(ServiceOf(d)), validateSidecarBlock(d)} {
		if err != nil {
			all = multierror.Append(all, err)
		}
	}
	if err := all.ErrorOrNil(); err != nil {
		return fmt.Errorf("Validation failed: %w", err)
	}
	if err := validateChecks("Invalid check: %w", &d.AgentServiceRegistration); err != nil {
		return err
	}
	if d.Connect != nil && d.Connect.SidecarService != nil {
		return validateChecks("Invalid check in sidecar_service: %w", d.Connect.SidecarService)
	}
	return nil
}

func validateChecks(format string, r *api.AgentServiceRegistration) error {
	for _, c := range definedChecks(r) {
		if err := ValidateCheck(*c); err != nil {
			return fmt.Errorf(format, err)
		}
		if c.Status != "" && !ValidCheckStatus(c.Status) {
			return errors.New("Status for checks must 'passing', 'warning', 'critical'")
		}
	}
	return nil
}

// ValidateSidecar expands the sidecar_service block of d and says what is wrong
// with it; the text is that of a 400 answer. The sidecar is nil where d has none.
func ValidateSidecar(d *Definition) (*Definition, error) {
	sc, err := ExpandSidecar(d)
	if err != nil {
		return nil, fmt.Errorf("Invalid SidecarService: %w", err)
	}
	if sc == nil {
		return nil, nil
	}
	s := ServiceOf(sc)
	if s.Port == 0 && s.SocketPath == "" {
		s.Port = 1 // one will be assigned
	}
	if err := ValidateService(s); err != nil {
		return nil, fmt.Errorf("Failed Validation: %w", err)
	}
	return sc, nil
}

// ValidateDefinition returns everything that is wrong with d, as a
// [multierror.Error]: what a configuration file is told.
func ValidateDefinition(d *Definition) error {
	var all *multierror.Error
	if d.Name == "" {
		all = multierror.Append(all, errors.New("Missing service name"))
	}
	if IsAnyAddress(d.Address) {
		all = multierror.Append(all, errors.New("Invalid service address"))
	}
	if err := ValidateWeights(d.Weights); err != nil {
		all = multierror.Append(all, fmt.Errorf("Invalid Weights: %w", err))
	}
	if err := ValidateMeta(d.Meta, d.Kind == KindMeshGateway); err != nil {
		all = multierror.Append(all, fmt.Errorf("Invalid Service Meta: %w", err))
	}
	if err := ValidateService(ServiceOf(d)); err != nil {
		all = multierror.Append(all, err)
	}
	if d.SocketPath != "" && (d.Address != "" || d.Port != 0) {
		all = multierror.Append(all, errors.New("socket_path cannot be set together with address or port"))
	}
	if err := validateSidecarBlock(d); err != nil {
		all = multierror.Append(all, err)
	} else if _, err := ValidateSidecar(d); err != nil {
		all = multierror.Append(all, err)
	}
	regs := []*api.AgentServiceRegistration{&d.AgentServiceRegistration}
	if d.Connect != nil && d.Connect.SidecarService != nil {
		regs = append(regs, d.Connect.SidecarService)
	}
	for _, r := range regs {
		for _, c := range definedChecks(r) {
			if err := ValidateCheck(*c); err != nil {
				all = multierror.Append(all, fmt.Errorf("check %q: %w", c.Name, err))
			}
			if c.Status != "" && !ValidCheckStatus(c.Status) {
				all = multierror.Append(all, fmt.Errorf("check %q: Status for checks must 'passing', 'warning', 'critical'", c.Name))
			}
		}
	}
	return all.ErrorOrNil()
}

func validateSidecarBlock(d *Definition) error {
	if d.Connect == nil || d.Connect.SidecarService == nil {
		return nil
	}
	var all *multierror.Error
	block := d.Connect.SidecarService
	if block.ID != "" {
		all = multierror.Append(all, errors.New("A SidecarService cannot specify an ID as this is managed by the agent"))
	}
	if block.Connect != nil && block.Connect.SidecarService != nil {
		all = multierror.Append(all, errors.New("A SidecarService cannot have a nested SidecarService"))
	}
	if IsGateway(d.Kind) {
		all = multierror.Append(all, fmt.Errorf("A %s cannot have a sidecar service defined", d.Kind))
	}
	return all.ErrorOrNil()
}

// ValidateService returns everything that is wrong with a catalog record, as a
// [multierror.Error]. A service name may have any characters; see [SNIName].
func ValidateService(s *Service) error {
	var all *multierror.Error
	add := func(err error) {
		if err != nil {
			all = multierror.Append(all, err)
		}
	}
	for _, tag := range slices.Sorted(maps.Keys(s.TaggedAddresses)) {
		add(validateTagged(tag, s.TaggedAddresses[tag].Address))
	}
	p := s.Proxy
	if p == nil {
		p = &api.AgentServiceConnectProxyConfig{}
	}
	switch {
	case s.Kind == KindConnectProxy:
		switch strings.TrimSpace(p.DestinationServiceName) {
		case "":
			add(errors.New("Proxy.DestinationServiceName must be non-empty for Connect proxy services"))
		case wildcard:
			add(errors.New("Proxy.DestinationServiceName must not be a wildcard for Connect proxy services"))
		}
		if s.Port == 0 && s.SocketPath == "" {
			add(errors.New("Port or SocketPath must be set for a Connect proxy"))
		}
		if IsConnectNative(s) {
			add(errors.New("A Proxy cannot also be Connect Native, only typical services"))
		}
		validateUpstreams(p.Upstreams, add)
		validateExpose(p.Expose, add)
	case IsGateway(s.Kind):
		if s.Port == 0 && (s.Kind == KindMeshGateway || s.Kind == KindTerminatingGateway) {
			add(fmt.Errorf("Port must be non-zero for a %s", s.Kind))
		}
		for _, f := range []struct {
			name string
			set  bool
		}{
			{"DestinationServiceName", p.DestinationServiceName != ""},
			{"DestinationServiceID", p.DestinationServiceID != ""},
			{"LocalServiceAddress", p.LocalServiceAddress != ""},
			{"LocalServicePort", p.LocalServicePort != 0},
			{"LocalServiceSocketPath", p.LocalServiceSocketPath != ""},
			{"Upstreams", len(p.Upstreams) != 0},
		} {
			if f.set {
				add(fmt.Errorf("The Proxy.%s configuration is invalid for a %s", f.name, s.Kind))
			}
		}
		if s.Connect != nil && s.Connect.SidecarService != nil {
			add(fmt.Errorf("A %s cannot have a sidecar service defined", s.Kind))
		}
	}
	return all.ErrorOrNil()
}

func validateTagged(tag, address string) error {
	var v4 bool
	switch tag {
	case tagLANIPv4, tagWANIPv4:
		v4 = true
	case tagLANIPv6, tagWANIPv6:
	default:
		return nil
	}
	ip, err := netip.ParseAddr(address)
	switch {
	case v4 && (err != nil || !ip.Is4()):
		return fmt.Errorf("Service tagged address %q must be a valid ipv4 address", tag)
	case !v4 && (err != nil || !ip.Is6()):
		return fmt.Errorf("Service tagged address %q must be a valid ipv6 address", tag)
	}
	return nil
}

func validateUpstreams(upstreams []api.Upstream, add func(error)) {
	destinations, binds := make(map[string]bool), make(map[string]bool)
	for _, u := range upstreams {
		switch {
		// Central configuration adds these; they bind nothing of their own.
		case u.CentrallyConfigured:
			continue
		case u.DestinationName == "":
			add(errors.New("upstream destination name cannot be empty"))
			continue
		case u.DestinationName == wildcard:
			add(errors.New("upstream destination name cannot be a wildcard"))
			continue
		}
		switch u.DestinationType {
		case "", api.UpstreamDestTypeService, api.UpstreamDestTypePreparedQuery:
		default:
			add(fmt.Errorf("unknown upstream destination type: %q", u.DestinationType))
		}
		if u.DestinationPeer != "" && u.Datacenter != "" {
			add(errors.New("upstream cannot specify both destination peer and datacenter"))
		}
		switch {
		case u.LocalBindPort == 0 && u.LocalBindSocketPath == "":
			add(errors.New("upstream local bind port or local socket path must be defined and nonzero"))
			continue
		case u.LocalBindPort != 0 && u.LocalBindSocketPath != "":
			add(errors.New("only one of upstream local bind port or local socket path can be defined and nonzero"))
			continue
		case u.LocalBindSocketMode != "" && u.LocalBindSocketPath != "":
			if _, err := strconv.ParseUint(u.LocalBindSocketMode, 8, 16); err != nil {
				add(fmt.Errorf("upstream local bind socket mode %q is not an octal file mode", u.LocalBindSocketMode))
			}
		}
		bind := u.LocalBindSocketPath
		if bind == "" {
			host := u.LocalBindAddress
			if host == "" {
				host = localhost
			}
			bind = net.JoinHostPort(host, strconv.Itoa(u.LocalBindPort))
		}
		if binds[bind] {
			add(fmt.Errorf("upstreams cannot contain duplicates by local bind port and unix path; %q specified twice", bind))
		}
		binds[bind] = true
		key := UpstreamKey(u)
		if destinations[key] {
			add(fmt.Errorf("upstreams cannot contain duplicates of %s", key))
		}
		destinations[key] = true
	}
}

// UpstreamKey names what an upstream connects to: type, name, and where it is.
// No two explicit upstreams of a proxy have the same.
func UpstreamKey(u api.Upstream) string {
	typ := u.DestinationType
	if typ == "" {
		typ = api.UpstreamDestTypeService
	}
	name := ServiceName{Name: u.DestinationName, Namespace: u.DestinationNamespace, Partition: u.DestinationPartition}
	key := string(typ) + ":" + name.String()
	if u.Datacenter != "" {
		key += "?dc=" + u.Datacenter
	}
	if u.DestinationPeer != "" {
		key += "?peer=" + u.DestinationPeer
	}
	return key
}

func validateExpose(e api.ExposeConfig, add func(error)) {
	paths, ports := make(map[string]bool), make(map[int]bool)
	for _, p := range e.Paths {
		switch {
		case p.Path == "":
			add(errors.New("expose.paths: path is required"))
		case !strings.HasPrefix(p.Path, "/"):
			add(fmt.Errorf("expose.paths: path must begin with '/': %s", p.Path))
		case paths[p.Path]:
			add(fmt.Errorf("expose.paths: duplicate paths: %s", p.Path))
		}
		paths[p.Path] = true
		if p.ListenerPort <= 0 || p.ListenerPort > 65535 {
			add(fmt.Errorf("expose.paths: invalid listener port: %d", p.ListenerPort))
		} else if ports[p.ListenerPort] {
			add(fmt.Errorf("expose.paths: duplicate listener ports: %d", p.ListenerPort))
		}
		ports[p.ListenerPort] = true
		if p.LocalPathPort <= 0 || p.LocalPathPort > 65535 {
			add(fmt.Errorf("expose.paths: invalid local path port: %d", p.LocalPathPort))
		}
		switch p.Protocol {
		case "", "http", "http2":
		default:
			add(fmt.Errorf("expose.paths: protocol '%s' not supported for path: %s, must be http or http2", p.Protocol, p.Path))
		}
	}
}

// ValidateWeights accepts nil, which stands for the default.
func ValidateWeights(w *api.AgentWeights) error {
	switch {
	case w == nil:
		return nil
	case w.Passing < 1:
		return errors.New("Passing must be greater than 0")
	case w.Warning < 0:
		return errors.New("Warning must be greater or equal than 0")
	case w.Passing > maxWeightGiven || w.Warning > maxWeightGiven:
		return errors.New("Passing and Warning must be less or equal than 65535")
	}
	return nil
}

// ValidateMeta checks the metadata of a service or node. The first offending key
// in alphabetical order is named. Only a mesh gateway may have
// [MetaWANFederation].
func ValidateMeta(meta map[string]string, meshGateway bool) error {
	if len(meta) > maxMetaPairs {
		return fmt.Errorf("Node metadata cannot contain more than %d key/value pairs", maxMetaPairs)
	}
	for _, k := range slices.Sorted(maps.Keys(meta)) {
		if err := validateMetaPair(k, meta[k], meshGateway); err != nil {
			return fmt.Errorf("Couldn't load metadata pair ('%s', '%s'): %w", k, meta[k], err)
		}
	}
	return nil
}

func validateMetaPair(k, v string, meshGateway bool) error {
	switch {
	case k == "":
		return errors.New("Key cannot be blank")
	case strings.ContainsFunc(k, func(r rune) bool { return r == '.' || !nameRune(r) }):
		return errors.New("Key contains invalid characters")
	case len(k) > maxMetaKey:
		return fmt.Errorf("Key is too long (limit: %d characters)", maxMetaKey)
	case strings.HasPrefix(k, reservedMeta) && (!meshGateway || k != MetaWANFederation):
		return fmt.Errorf("Key prefix '%s' is reserved for internal use", reservedMeta)
	case len(v) > maxMetaValue:
		return fmt.Errorf("Value is too long (limit: %d characters)", maxMetaValue)
	}
	return nil
}

// SNIName reports whether name can be a label of a server name: letters, digits,
// '-', '_' and '.'. The catalog takes other names too, but no gateway can carry
// traffic for them.
func SNIName(name string) bool {
	return name != "" && !strings.ContainsFunc(name, func(r rune) bool { return !nameRune(r) })
}

func nameRune(r rune) bool {
	return r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || r == '-' || r == '_' || r == '.'
}
