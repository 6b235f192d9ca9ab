package configentry

import (
	"errors"
	"fmt"
	"maps"
	"math"
	"regexp"
	"slices"
	"strings"

	"github.com/hashicorp/consul/api"
	"github.com/hashicorp/go-bexpr"
	"github.com/hashicorp/go-multierror"

	"github.com/sluicemesh/sluice/agent/catalog"
)

// The error texts below are Consul's where it has one, capital letters included:
// its clients match them.

// problems collects everything that is wrong with an entry.
type problems struct{ all *multierror.Error }

func (p *problems) add(format string, args ...any) {
	p.all = multierror.Append(p.all, fmt.Errorf(format, args...))
}

// Validate returns what is wrong with a normalised entry. That it fits in with
// the other entries is for [Compile] to say.
func Validate(e Entry) error {
	if m := e.GetMeta(); m != nil {
		if err := validateMeta(m); err != nil {
			return err
		}
	}
	p := &problems{}
	switch e := e.(type) {
	case *api.ProxyConfigEntry:
		return validateProxyDefaults(e)
	case *api.ServiceConfigEntry:
		p.tenancy("", e.Namespace, e.Partition)
		validateServiceDefaults(e, p)
	case *api.ServiceResolverConfigEntry:
		return validateResolver(e)
	case *api.ServiceRouterConfigEntry:
		return validateRouter(e)
	case *api.ServiceSplitterConfigEntry:
		return validateSplitter(e)
	case *api.ServiceIntentionsConfigEntry:
		return validateIntentions(e)
	case *api.MeshConfigEntry:
		return validateMesh(e)
	case *api.ExportedServicesConfigEntry:
		return validateExported(e)
	default:
		return fmt.Errorf("invalid config entry kind: %s", e.GetKind())
	}
	return p.all.ErrorOrNil()
}

func validateMeta(meta map[string]string) error {
	if len(meta) > 64 {
		return errors.New("invalid config entry Meta: it has more than 64 pairs")
	}
	for _, k := range slices.Sorted(maps.Keys(meta)) {
		if len(k) > 128 || len(meta[k]) > 512 || k == "" {
			return fmt.Errorf("invalid config entry Meta: the pair %q is empty or too long", k)
		}
	}
	return nil
}

// enterprise returns an error for a tenancy that needs Consul's paid edition.
func enterprise(path, field, value string) error {
	if value == "" || value == catalog.DefaultTenancy {
		return nil
	}
	err := fmt.Errorf("Setting %s requires Consul Enterprise", field)
	if path != "" {
		return fmt.Errorf("%s: %w", path, err)
	}
	return err
}

func (p *problems) tenancy(path, namespace, partition string) {
	for _, err := range []error{enterprise(path, "Namespace", namespace), enterprise(path, "Partition", partition)} {
		if err != nil {
			p.all = multierror.Append(p.all, err)
		}
	}
}

func firstError(errs ...error) error {
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}

func tenancy(path, namespace, partition string) error {
	return firstError(enterprise(path, "Namespace", namespace), enterprise(path, "Partition", partition))
}

func sameness(path, group string) error {
	if group == "" {
		return nil
	}
	return fmt.Errorf("%s: Setting SamenessGroup requires Consul Enterprise", path)
}

func validateProxyDefaults(e *api.ProxyConfigEntry) error {
	if e.Name != Global {
		return fmt.Errorf("invalid name (%q), only %q is supported", e.Name, Global)
	}
	if err := tenancy("", e.Namespace, e.Partition); err != nil {
		return err
	}
	if l := e.AccessLogs; l != nil {
		switch l.Type {
		case api.DefaultLogSinkType, api.StdErrLogSinkType, api.StdOutLogSinkType:
			if l.Path != "" {
				return errors.New("path is only valid for file type access logs")
			}
		case api.FileLogSinkType:
			if l.Path == "" {
				return errors.New("path must be specified when using file type access logs")
			}
		default:
			return fmt.Errorf("invalid access log type: %s", l.Type)
		}
		if l.JSONFormat != "" && l.TextFormat != "" {
			return errors.New("cannot specify both access log JSONFormat and TextFormat")
		}
	}
	if err := validateMutualTLS(e.MutualTLSMode); err != nil {
		return err
	}
	if err := validateExtensions(e.EnvoyExtensions); err != nil {
		return err
	}
	if e.FailoverPolicy != nil && (e.FailoverPolicy.Mode != "" || len(e.FailoverPolicy.Regions) > 0) {
		return errors.New("Setting FailoverPolicy requires Consul Enterprise")
	}
	if e.PrioritizeByLocality != nil && e.PrioritizeByLocality.Mode != "" {
		return errors.New("Setting PrioritizeByLocality requires Consul Enterprise")
	}
	return nil
}

func validateMutualTLS(m api.MutualTLSMode) error {
	switch m {
	case api.MutualTLSModeDefault, api.MutualTLSModeStrict, api.MutualTLSModePermissive:
		return nil
	}
	return fmt.Errorf("Invalid MutualTLSMode %q. Must be one of %q, %q, or %q.", m, "", api.MutualTLSModeStrict, api.MutualTLSModePermissive)
}

func validateExtensions(in []api.EnvoyExtension) error {
	for i, x := range in {
		if x.Name == "" {
			return fmt.Errorf("invalid EnvoyExtensions[%d]: Name is required", i)
		}
	}
	return nil
}

func validateName(name string) error {
	switch name {
	case "":
		return errors.New("Name is required")
	case Wildcard:
		return errors.New("Name must be the name of a service, and not a wildcard")
	}
	return nil
}

func validateServiceDefaults(e *api.ServiceConfigEntry, p *problems) {
	if err := validateName(e.Name); err != nil {
		p.add("%w", err)
	}
	switch e.Protocol {
	case "", protocolTCP, "http", "http2", "grpc":
	default:
		p.add("invalid value for protocol: %s", e.Protocol)
	}
	switch e.BalanceInboundConnections {
	case "", "exact_balance":
	default:
		p.add("invalid value for balance_inbound_connections: %v", e.BalanceInboundConnections)
	}
	if err := validateMutualTLS(e.MutualTLSMode); err != nil {
		p.add("%w", err)
	}
	if e.RateLimits != nil {
		p.add("Setting RateLimits requires Consul Enterprise")
	}
	if err := validateExtensions(e.EnvoyExtensions); err != nil {
		p.add("%w", err)
	}
	if u := e.UpstreamConfig; u != nil {
		if e.Destination != nil {
			p.add("UpstreamConfig and Destination are mutually exclusive for service defaults")
		}
		seen := map[string]bool{}
		for i, o := range u.Overrides {
			path := fmt.Sprintf("UpstreamConfig.Overrides[%d]", i)
			switch o.Name {
			case "":
				p.add("error in upstream override for %s: Name is required", path)
			case Wildcard:
				p.add("error in upstream override for %s: Wildcard name is not supported", path)
			}
			if o.Peer != "" && o.Partition != "" {
				p.add("error in upstream override for %s: cannot set both Peer and Partition", path)
			}
			p.tenancy(path, o.Namespace, o.Partition)
			if key := o.Peer + "/" + o.Name; seen[key] {
				p.add("error in upstream override for %s: duplicate of an earlier one", path)
			} else {
				seen[key] = true
			}
			validateUpstreamConfig("error in upstream override for "+path, o, p)
		}
		if d := u.Defaults; d != nil {
			if d.Name != "" || d.Peer != "" {
				p.add("error in upstream defaults: Name and Peer must be empty")
			}
			p.tenancy("UpstreamConfig.Defaults", d.Namespace, d.Partition)
			validateUpstreamConfig("error in upstream defaults", d, p)
		}
	}
	if d := e.Destination; d != nil {
		if len(d.Addresses) == 0 {
			p.add("invalid destination: at least one address is required")
		}
		seen := map[string]bool{}
		for _, a := range d.Addresses {
			switch {
			case a == "":
				p.add("invalid destination: address cannot be empty")
			case strings.Contains(a, Wildcard):
				p.add("invalid destination: address %q cannot have a wildcard", a)
			case seen[a]:
				p.add("invalid destination: duplicate address %q", a)
			}
			seen[a] = true
		}
		if d.Port < 1 || d.Port > 65535 {
			p.add("invalid destination: port %d is not between 1 and 65535", d.Port)
		}
	}
}

func validateUpstreamConfig(path string, u *api.UpstreamConfig, p *problems) {
	switch u.Protocol {
	case "", protocolTCP, "http", "http2", "grpc":
	default:
		p.add("%s: invalid value for protocol: %s", path, u.Protocol)
	}
	switch u.BalanceOutboundConnections {
	case "", "exact_balance":
	default:
		p.add("%s: invalid value for balance_outbound_connections: %v", path, u.BalanceOutboundConnections)
	}
	if l := u.Limits; l != nil {
		for _, f := range []struct {
			name string
			n    *int
		}{
			{"max connections", l.MaxConnections},
			{"max pending requests", l.MaxPendingRequests},
			{"max concurrent requests", l.MaxConcurrentRequests},
		} {
			if f.n != nil && *f.n < 0 {
				p.add("%s: %s cannot be negative", path, f.name)
			}
		}
	}
	if h := u.PassiveHealthCheck; h != nil {
		if h.Interval < 0 {
			p.add("%s: passive health check interval cannot be negative", path)
		}
		if h.BaseEjectionTime != nil && *h.BaseEjectionTime < 0 {
			p.add("%s: passive health check base_ejection_time cannot be negative", path)
		}
		for _, f := range []struct {
			name string
			n    *uint32
		}{
			{"enforcing_consecutive_5xx", h.EnforcingConsecutive5xx},
			{"enforcing_consecutive_gateway_failure", h.EnforcingConsecutiveGatewayFailure},
			{"max_ejection_percent", h.MaxEjectionPercent},
		} {
			if f.n != nil && *f.n > 100 {
				p.add("%s: passive health check %s must be a percentage between 0 and 100", path, f.name)
			}
		}
	}
}

// subsetName is a label of a server name.
var subsetName = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$`)

// CompileFilter parses the filter of a subset, which is evaluated over an
// instance with its node and service present, and tries it on one, so that a
// field that does not exist is an error now. An empty filter is nil and selects
// everything.
func CompileFilter(filter string) (*bexpr.Evaluator, error) {
	if filter == "" {
		return nil, nil
	}
	f, err := bexpr.CreateEvaluator(filter)
	if err != nil {
		return nil, err
	}
	sample := &catalog.Instance{Node: &catalog.Node{}, Service: &catalog.Service{Proxy: &api.AgentServiceConnectProxyConfig{}}, Checks: api.HealthChecks{}}
	if _, err := f.Evaluate(sample); err != nil {
		return nil, err
	}
	return f, nil
}

func validateResolver(e *api.ServiceResolverConfigEntry) error {
	if err := firstError(validateName(e.Name), tenancy("", e.Namespace, e.Partition)); err != nil {
		return err
	}
	for _, name := range slices.Sorted(maps.Keys(e.Subsets)) {
		if name == "" {
			return errors.New("Subset defined with empty name")
		}
		if !subsetName.MatchString(name) {
			return fmt.Errorf("Subset %q is invalid: it must be a lower-case label of letters, digits and dashes, at most 63 characters long", name)
		}
		if _, err := CompileFilter(e.Subsets[name].Filter); err != nil {
			return fmt.Errorf("Filter for subset %q is not a valid expression: %w", name, err)
		}
	}
	isSubset := func(s string) bool {
		_, ok := e.Subsets[s]
		return s == "" || ok
	}
	if !isSubset(e.DefaultSubset) {
		return fmt.Errorf("DefaultSubset %q is not a valid subset", e.DefaultSubset)
	}
	if e.PrioritizeByLocality != nil && e.PrioritizeByLocality.Mode != "" {
		return errors.New("Setting PrioritizeByLocality requires Consul Enterprise")
	}
	if r := e.Redirect; r != nil {
		if err := firstError(tenancy("Redirect", r.Namespace, r.Partition), sameness("Redirect", r.SamenessGroup)); err != nil {
			return err
		}
		switch {
		case len(e.Failover) > 0:
			return errors.New("Redirect and Failover cannot both be set")
		case *r == api.ServiceResolverRedirect{}:
			return errors.New("Redirect is empty")
		case r.Service == "" && r.ServiceSubset != "":
			return errors.New("Redirect.ServiceSubset defined without Redirect.Service")
		case r.Service == "" && r.Peer != "":
			return errors.New("Redirect.Peer defined without Redirect.Service")
		case r.Peer != "" && r.ServiceSubset != "":
			return errors.New("Redirect.Peer cannot be set with Redirect.ServiceSubset")
		case r.Peer != "" && r.Partition != "":
			return errors.New("Redirect.Partition cannot be set with Redirect.Peer")
		case r.Peer != "" && r.Datacenter != "":
			return errors.New("Redirect.Peer cannot be set with Redirect.Datacenter")
		case r.Service == e.Name && r.ServiceSubset != "" && !isSubset(r.ServiceSubset):
			return fmt.Errorf("Redirect.ServiceSubset %q is not a valid subset of %q", r.ServiceSubset, r.Service)
		}
	}
	for _, subset := range slices.Sorted(maps.Keys(e.Failover)) {
		if err := validateFailover(e, subset, isSubset); err != nil {
			return err
		}
	}
	if e.ConnectTimeout < 0 {
		return fmt.Errorf("Bad ConnectTimeout '%s', must be >= 0", e.ConnectTimeout)
	}
	if e.RequestTimeout < 0 {
		return fmt.Errorf("Bad RequestTimeout '%s', must be >= 0", e.RequestTimeout)
	}
	return validateLoadBalancer(e.LoadBalancer)
}

func validateFailover(e *api.ServiceResolverConfigEntry, subset string, isSubset func(string) bool) error {
	f := e.Failover[subset]
	prefix := fmt.Sprintf("Bad Failover[%q]", subset)
	if subset == "" || subset != Wildcard && !isSubset(subset) {
		return fmt.Errorf("%s: not a valid subset", prefix)
	}
	if err := firstError(tenancy(prefix, f.Namespace, ""), sameness(prefix, f.SamenessGroup)); err != nil {
		return err
	}
	if p := f.Policy; p != nil {
		switch {
		case p.Mode != "" && p.Mode != "sequential":
			return fmt.Errorf("%s: Setting Policy.Mode %q requires Consul Enterprise", prefix, p.Mode)
		case len(p.Regions) > 0:
			return fmt.Errorf("%s: Setting Policy.Regions requires Consul Enterprise", prefix)
		}
	}
	switch {
	case f.Service == "" && f.ServiceSubset == "" && f.Namespace == "" && len(f.Datacenters) == 0 && len(f.Targets) == 0:
		return fmt.Errorf("%s: one of Service, ServiceSubset, Namespace, Targets, SamenessGroup, or Datacenters is required", prefix)
	case len(f.Datacenters) > 0 && len(f.Targets) > 0:
		return fmt.Errorf("%s: Targets cannot be set with Datacenters", prefix)
	case len(f.Targets) > 0 && f.Service != "":
		return fmt.Errorf("%s: Targets cannot be set with Service", prefix)
	case len(f.Targets) > 0 && f.ServiceSubset != "":
		return fmt.Errorf("%s: Targets cannot be set with ServiceSubset", prefix)
	case f.ServiceSubset != "" && (f.Service == "" || f.Service == e.Name) && !isSubset(f.ServiceSubset):
		return fmt.Errorf("%s: ServiceSubset %q is not a valid subset of %q", prefix, f.ServiceSubset, e.Name)
	case slices.Contains(f.Datacenters, ""):
		return fmt.Errorf("%s: Datacenters contains an empty datacenter", prefix)
	}
	for i, t := range f.Targets {
		prefix := fmt.Sprintf("%s.Targets[%d]", prefix, i)
		if err := tenancy(prefix, t.Namespace, t.Partition); err != nil {
			return err
		}
		switch {
		case t == api.ServiceResolverFailoverTarget{}:
			return fmt.Errorf("%s: one of Service, ServiceSubset, Namespace, Partition, Peer, or Datacenter is required", prefix)
		case t.Peer != "" && t.ServiceSubset != "":
			return fmt.Errorf("%s: Peer cannot be set with ServiceSubset", prefix)
		case t.Peer != "" && t.Partition != "":
			return fmt.Errorf("%s: Partition cannot be set with Peer", prefix)
		case t.Peer != "" && t.Datacenter != "":
			return fmt.Errorf("%s: Peer cannot be set with Datacenter", prefix)
		case t.ServiceSubset != "" && (t.Service == "" || t.Service == e.Name) && !isSubset(t.ServiceSubset):
			return fmt.Errorf("%s: ServiceSubset %q is not a valid subset of %q", prefix, t.ServiceSubset, e.Name)
		}
	}
	return nil
}

func validateLoadBalancer(lb *api.LoadBalancer) error {
	if lb == nil {
		return nil
	}
	switch lb.Policy {
	case "", "random", "round_robin", "least_request", "ring_hash", "maglev":
	default:
		return fmt.Errorf("Bad LoadBalancer policy: unsupported load balancing policy: %q", lb.Policy)
	}
	if lb.Policy != "ring_hash" && lb.RingHashConfig != nil {
		return fmt.Errorf("Bad LoadBalancer configuration. RingHashConfig specified for incompatible load balancing policy %q", lb.Policy)
	}
	if lb.Policy != "least_request" && lb.LeastRequestConfig != nil {
		return fmt.Errorf("Bad LoadBalancer configuration. LeastRequestConfig specified for incompatible load balancing policy %q", lb.Policy)
	}
	if lb.Policy != "ring_hash" && lb.Policy != "maglev" && len(lb.HashPolicies) > 0 {
		return fmt.Errorf("Bad LoadBalancer configuration: HashPolicies specified for non-hash-based Policy: %q", lb.Policy)
	}
	if r := lb.RingHashConfig; r != nil && r.MaximumRingSize != 0 && r.MinimumRingSize > r.MaximumRingSize {
		return errors.New("Bad LoadBalancer configuration: MinimumRingSize is greater than MaximumRingSize")
	}
	for i, h := range lb.HashPolicies {
		prefix := fmt.Sprintf("Bad LoadBalancer HashPolicy[%d]", i)
		switch h.Field {
		case "", "header", "cookie", "query_parameter":
		default:
			return fmt.Errorf("%s: %q is not a supported hash policy", prefix, h.Field)
		}
		switch {
		case h.SourceIP && (h.Field != "" || h.FieldValue != ""):
			return fmt.Errorf("%s: A single hash policy cannot hash both a source address and a %q", prefix, h.Field)
		case !h.SourceIP && h.Field == "":
			return fmt.Errorf("%s: one of Field and SourceIP is required", prefix)
		case h.Field != "" && h.FieldValue == "":
			return fmt.Errorf("%s: Field %q was specified without a FieldValue", prefix, h.Field)
		case h.CookieConfig != nil && h.Field != "cookie":
			return fmt.Errorf("%s: cookie_config provided for %q", prefix, h.Field)
		case h.CookieConfig != nil && h.CookieConfig.Session && h.CookieConfig.TTL != 0:
			return fmt.Errorf("%s: a session cookie cannot have an associated TTL", prefix)
		}
	}
	return nil
}

var httpMethods = []string{"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "CONNECT", "OPTIONS", "TRACE"}

func validateMethods(prefix string, methods []string) error {
	seen := map[string]bool{}
	for _, m := range methods {
		if !slices.Contains(httpMethods, m) {
			return fmt.Errorf("%s contains an invalid method %q", prefix, m)
		}
		if seen[m] {
			return fmt.Errorf("%s contains %q more than once", prefix, m)
		}
		seen[m] = true
	}
	return nil
}

func count(set ...bool) int {
	n := 0
	for _, s := range set {
		if s {
			n++
		}
	}
	return n
}

func validatePaths(prefix, exact, pathPrefix, regex string) error {
	if count(exact != "", pathPrefix != "", regex != "") > 1 {
		return fmt.Errorf("%s should only contain at most one of PathExact, PathPrefix, or PathRegex", prefix)
	}
	if exact != "" && !strings.HasPrefix(exact, "/") {
		return fmt.Errorf("%s.PathExact doesn't start with '/': %q", prefix, exact)
	}
	if pathPrefix != "" && !strings.HasPrefix(pathPrefix, "/") {
		return fmt.Errorf("%s.PathPrefix doesn't start with '/': %q", prefix, pathPrefix)
	}
	return nil
}

func validateRouter(e *api.ServiceRouterConfigEntry) error {
	if err := firstError(validateName(e.Name), tenancy("", e.Namespace, e.Partition)); err != nil {
		return err
	}
	for i, r := range e.Routes {
		matched := ""
		if r.Match != nil && r.Match.HTTP != nil {
			h := r.Match.HTTP
			prefix := fmt.Sprintf("Route[%d]", i)
			if err := validatePaths(prefix, h.PathExact, h.PathPrefix, h.PathRegex); err != nil {
				return err
			}
			for j, x := range h.Header {
				if x.Name == "" {
					return fmt.Errorf("%s Header[%d] missing required Name field", prefix, j)
				}
				if count(x.Present, x.Exact != "", x.Prefix != "", x.Suffix != "", x.Regex != "") != 1 {
					return fmt.Errorf("%s Header[%d] should only contain one of Present, Exact, Prefix, Suffix, or Regex", prefix, j)
				}
			}
			for j, x := range h.QueryParam {
				if x.Name == "" {
					return fmt.Errorf("%s QueryParam[%d] missing required Name field", prefix, j)
				}
				if count(x.Present, x.Exact != "", x.Regex != "") != 1 {
					return fmt.Errorf("%s QueryParam[%d] should only contain one of Present, Exact, or Regex", prefix, j)
				}
			}
			if err := validateMethods(prefix+" Methods", h.Methods); err != nil {
				return err
			}
			matched = h.PathExact + h.PathPrefix
		}
		if d := r.Destination; d != nil {
			prefix := fmt.Sprintf("Route[%d].Destination", i)
			if err := tenancy(prefix, d.Namespace, d.Partition); err != nil {
				return err
			}
			if d.PrefixRewrite != "" && matched == "" {
				return fmt.Errorf("Route[%d] cannot make use of PrefixRewrite without configuring either PathExact or PathPrefix", i)
			}
			if d.RequestTimeout < 0 || d.IdleTimeout < 0 {
				return fmt.Errorf("%s: timeouts must be >= 0", prefix)
			}
			for _, code := range d.RetryOnStatusCodes {
				if code < 100 || code > 599 {
					return fmt.Errorf("%s: %d is not a status code", prefix, code)
				}
			}
		}
	}
	return nil
}

func validateSplitter(e *api.ServiceSplitterConfigEntry) error {
	if err := firstError(validateName(e.Name), tenancy("", e.Namespace, e.Partition)); err != nil {
		return err
	}
	if len(e.Splits) == 0 {
		return errors.New("no splits configured")
	}
	total := 0
	type leg struct{ service, subset string }
	seen := map[leg]bool{}
	for i, s := range e.Splits {
		if w := float64(s.Weight); w < 0 || w > 100 || math.IsNaN(w) {
			return fmt.Errorf("splits[%d]: weight must be between 0 and 100, not %v", i, s.Weight)
		}
		if err := tenancy(fmt.Sprintf("splits[%d]", i), s.Namespace, s.Partition); err != nil {
			return err
		}
		l := leg{s.Service, s.ServiceSubset}
		if l.service == "" {
			l.service = e.Name
		}
		if seen[l] {
			return fmt.Errorf("split destination occurs more than once: service=%q, subset=%q", l.service, l.subset)
		}
		seen[l] = true
		total += scaledWeight(s.Weight)
	}
	if total != 10000 {
		return fmt.Errorf("the sum of all split weights must be 100, not %v", float32(total)/100)
	}
	return nil
}

func validateIntentions(e *api.ServiceIntentionsConfigEntry) error {
	if e.Name == "" {
		return errors.New("Name is required")
	}
	if err := wildcardName("Name", e.Name); err != nil {
		return err
	}
	if err := tenancy("", e.Namespace, e.Partition); err != nil {
		return err
	}
	if len(e.Sources) == 0 {
		return errors.New("At least one source is required")
	}
	type source struct{ name, peer string }
	seen := map[source]bool{}
	for i, s := range e.Sources {
		prefix := fmt.Sprintf("Sources[%d]", i)
		if s.Name == "" {
			return fmt.Errorf("%s.Name is required", prefix)
		}
		if err := wildcardName(prefix+".Name", s.Name); err != nil {
			return err
		}
		if err := firstError(tenancy(prefix, s.Namespace, s.Partition), sameness(prefix, s.SamenessGroup)); err != nil {
			return err
		}
		switch {
		case s.Peer == Wildcard:
			return fmt.Errorf("%s.Peer: cannot use wildcard '*' in peer", prefix)
		case s.Peer != "" && s.Partition != "":
			return fmt.Errorf("%s.Peer: cannot set Peer and Partition at the same time.", prefix)
		case len(s.Description) > 512:
			return fmt.Errorf("%s.Description exceeds maximum length 512", prefix)
		case s.LegacyID != "":
			return fmt.Errorf("%s.LegacyID must be omitted", prefix)
		case len(s.LegacyMeta) > 0:
			return fmt.Errorf("%s.LegacyMeta must be omitted", prefix)
		case s.LegacyCreateTime != nil:
			return fmt.Errorf("%s.LegacyCreateTime must be omitted", prefix)
		case s.LegacyUpdateTime != nil:
			return fmt.Errorf("%s.LegacyUpdateTime must be omitted", prefix)
		}
		if len(s.Permissions) == 0 {
			if !validAction(s.Action) {
				return fmt.Errorf("%s.Action must be set to 'allow' or 'deny'", prefix)
			}
		} else {
			if s.Action != "" {
				return fmt.Errorf("%s.Action must be omitted if Permissions are specified", prefix)
			}
			if e.Name == Wildcard {
				return fmt.Errorf("%s.Permissions cannot be specified on intentions with wildcarded destinations", prefix)
			}
		}
		for j, p := range s.Permissions {
			if err := validatePermission(fmt.Sprintf("%s.Permissions[%d]", prefix, j), p); err != nil {
				return err
			}
		}
		k := source{s.Name, s.Peer}
		if seen[k] {
			return fmt.Errorf("%s defines %q more than once", prefix, s.Name)
		}
		seen[k] = true
	}
	return nil
}

func wildcardName(field, name string) error {
	if name != Wildcard && strings.Contains(name, Wildcard) {
		return fmt.Errorf("%s: wildcard character '*' cannot be used with partial values", field)
	}
	return nil
}

func validAction(a api.IntentionAction) bool {
	return a == api.IntentionActionAllow || a == api.IntentionActionDeny
}

func validatePermission(prefix string, p *api.IntentionPermission) error {
	if !validAction(p.Action) {
		return fmt.Errorf("%s.Action must be set to 'allow' or 'deny'", prefix)
	}
	h := p.HTTP
	if h == nil {
		return fmt.Errorf("%s.HTTP is required", prefix)
	}
	if h.PathExact == "" && h.PathPrefix == "" && h.PathRegex == "" && len(h.Header) == 0 && len(h.Methods) == 0 {
		return fmt.Errorf("%s.HTTP should not be empty", prefix)
	}
	if err := validatePaths(prefix+".HTTP", h.PathExact, h.PathPrefix, h.PathRegex); err != nil {
		return err
	}
	for i, x := range h.Header {
		at := fmt.Sprintf("%s.HTTP.Header[%d]", prefix, i)
		switch {
		case x.Name == "":
			return fmt.Errorf("%s missing required Name field", at)
		case count(x.Present, x.Exact != "", x.Prefix != "", x.Suffix != "", x.Contains != "", x.Regex != "") != 1:
			return fmt.Errorf("%s should only contain one of Present, Exact, Prefix, Suffix, Contains, or Regex", at)
		case x.IgnoreCase && (x.Present || x.Regex != ""):
			return fmt.Errorf("%s should set one of Exact, Prefix, Suffix, or Contains when using IgnoreCase", at)
		}
	}
	return validateMethods(prefix+".HTTP.Methods", h.Methods)
}

var tlsVersions = []string{"", "TLS_AUTO", "TLSv1_0", "TLSv1_1", "TLSv1_2", "TLSv1_3"}

func validateMesh(e *api.MeshConfigEntry) error {
	if err := tenancy("", e.Namespace, e.Partition); err != nil {
		return err
	}
	if e.TLS != nil {
		for _, d := range []struct {
			name string
			tls  *api.MeshDirectionalTLSConfig
		}{{"incoming", e.TLS.Incoming}, {"outgoing", e.TLS.Outgoing}} {
			if d.tls == nil {
				continue
			}
			if err := validateMeshTLS(d.tls); err != nil {
				return fmt.Errorf("error in %s TLS configuration: %w", d.name, err)
			}
		}
	}
	if e.HTTP != nil && e.HTTP.Incoming != nil && e.HTTP.Incoming.RequestNormalization != nil {
		n := e.HTTP.Incoming.RequestNormalization
		if !slices.Contains([]string{"", "IMPLEMENTATION_SPECIFIC_DEFAULT", "KEEP_UNCHANGED", "REJECT_REQUEST", "UNESCAPE_AND_REDIRECT", "UNESCAPE_AND_FORWARD"}, n.PathWithEscapedSlashesAction) {
			return fmt.Errorf("error in HTTP incoming configuration: no matching PathWithEscapedSlashesAction value found for %q", n.PathWithEscapedSlashesAction)
		}
		if !slices.Contains([]string{"", "ALLOW", "REJECT_REQUEST", "DROP_HEADER"}, n.HeadersWithUnderscoresAction) {
			return fmt.Errorf("error in HTTP incoming configuration: no matching HeadersWithUnderscoresAction value found for %q", n.HeadersWithUnderscoresAction)
		}
	}
	return nil
}

func validateMeshTLS(t *api.MeshDirectionalTLSConfig) error {
	lo, hi := slices.Index(tlsVersions, t.TLSMinVersion), slices.Index(tlsVersions, t.TLSMaxVersion)
	const auto = 1 // it and "" leave the choice open
	switch {
	case lo < 0:
		return fmt.Errorf("invalid TLS version: %q", t.TLSMinVersion)
	case hi < 0:
		return fmt.Errorf("invalid TLS version: %q", t.TLSMaxVersion)
	case lo > auto && hi > auto && lo > hi:
		return fmt.Errorf("configuring max version %s less than the configured min version %s", t.TLSMaxVersion, t.TLSMinVersion)
	case len(t.CipherSuites) > 0 && t.TLSMinVersion == "TLSv1_3":
		return errors.New("configuring CipherSuites is only applicable to connections negotiated with TLS 1.2 or earlier")
	}
	return nil
}

func validateExported(e *api.ExportedServicesConfigEntry) error {
	if e.Name != catalog.DefaultTenancy {
		return fmt.Errorf("exported-services Name must be %q", catalog.DefaultTenancy)
	}
	if err := tenancy("", "", e.Partition); err != nil {
		return err
	}
	for i, s := range e.Services {
		if s.Name == "" {
			return fmt.Errorf("Services[%d]: service name cannot be empty", i)
		}
		if err := wildcardName(fmt.Sprintf("Services[%d].Name", i), s.Name); err != nil {
			return err
		}
		if err := tenancy(fmt.Sprintf("Services[%d]", i), s.Namespace, ""); err != nil {
			return err
		}
		if len(s.Consumers) == 0 {
			return fmt.Errorf("Services[%d]: must have at least one consumer", i)
		}
		for j, c := range s.Consumers {
			prefix := fmt.Sprintf("Services[%d].Consumers[%d]", i, j)
			switch count(c.Peer != "", c.Partition != "", c.SamenessGroup != "") {
			case 0:
				return fmt.Errorf("%s: must define Peer, Partition, or SamenessGroup", prefix)
			case 1:
			default:
				return fmt.Errorf("%s: must define at most one of Peer, Partition, or SamenessGroup", prefix)
			}
			if c.Peer == Wildcard {
				return fmt.Errorf("%s: exporting to all peers (wildcard) is not supported", prefix)
			}
			// Exporting to a partition has no meaning where there is only one, not
			// even the default one.
			if c.Partition != "" {
				return fmt.Errorf("%s: Setting Partition requires Consul Enterprise", prefix)
			}
			if err := sameness(prefix, c.SamenessGroup); err != nil {
				return err
			}
		}
	}
	return nil
}
