package config

import (
	"encoding/base64"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
)

// builder fills in the defaults and checks the whole. What it finds wrong it
// adds to the decoder's problems, and goes on with something usable.
type builder struct {
	*decoder
	s       *settings
	machine Machine
	dev     bool
}

// or returns what p points to, or the default.
func or[T any](p *T, def T) T {
	if p == nil {
		return def
	}
	return *p
}

// bad adds a problem with the value at path. The text is the whole message: many
// of them are Consul's.
func (b *builder) bad(path, format string, args ...any) {
	if b.failed[path] {
		return
	}
	b.problems = append(b.problems, Problem{Pos: b.at(path), Text: fmt.Sprintf(format, args...)})
}

func (b *builder) warn(path, format string, args ...any) {
	b.warnings = append(b.warnings, Warning{b.at(path), fmt.Sprintf(format, args...)})
}

func (b *builder) build() *Runtime {
	rt := &Runtime{}
	rt.Node = b.node()
	rt.Cluster = b.cluster(rt.Node)
	rt.Network = b.network(rt.Cluster.Server)
	rt.TLS = b.tls()
	b.listeners(&rt.Network, rt.TLS)
	rt.ACL = b.acl()
	rt.Connect = b.connect()
	b.federation(rt)
	rt.Log = b.log()
	b.rest(rt)
	rt.Services = b.services(b.s.Services)
	rt.Checks = b.checks(b.s.Checks)
	for _, e := range b.s.Entries.Bootstrap {
		if e.Entry != nil {
			b.entry(e)
			rt.ConfigEntries = append(rt.ConfigEntries, e.Entry)
		}
	}
	return rt
}

var (
	datacenterName = regexp.MustCompile(`^[a-z0-9_-]+$`)
	dnsName        = regexp.MustCompile(`^[A-Za-z0-9-]+$`)
	metaKey        = regexp.MustCompile(`^[A-Za-z0-9_-]+$`)
)

func (b *builder) node() Node {
	s := &b.s.nodeSettings
	n := Node{
		Name: strings.TrimSpace(or(s.Name, "")), Dev: b.dev, Meta: s.Meta, Locality: s.Locality,
		ID: strings.ToLower(strings.TrimSpace(or(s.ID, ""))),
	}
	if s.Name == nil {
		host, err := b.machine.Hostname()
		if err != nil {
			b.bad("node_name", "ask for the host's name: %v", err)
		}
		n.Name = strings.TrimSpace(host)
	}
	switch {
	case n.Name == "":
		b.bad("node_name", "node_name cannot be empty")
	case strings.ContainsAny(n.Name, " \t\n'\"`"):
		b.warn("node_name", "node name %q has white space or quotes", n.Name)
	case len(n.Name) > 63:
		b.warn("node_name", "node name %q is longer than 63 characters", n.Name)
	case !dnsName.MatchString(n.Name):
		b.warn("node_name", "node name %q cannot be found through DNS: it has other characters than letters, digits and dashes", n.Name)
	}
	if n.ID != "" && !uuid.MatchString(n.ID) {
		b.bad("node_id", "specified NodeID is invalid: %q is not a UUID", n.ID)
	}
	if len(n.Meta) > 64 {
		b.bad("node_meta", "node_meta invalid: Node metadata cannot contain more than 64 key/value pairs")
	}
	for _, k := range sortedKeys(n.Meta) {
		path, v := "node_meta."+k, n.Meta[k]
		switch {
		case k == "":
			b.bad("node_meta", "node_meta invalid: Key cannot be blank")
		case !metaKey.MatchString(k):
			b.bad(path, "node_meta invalid: Key %q contains invalid characters", k)
		case len(k) > 128:
			b.bad(path, "node_meta invalid: Key %q is too long (limit: 128 characters)", k)
		case strings.HasPrefix(k, "consul-"):
			b.bad(path, "node_meta invalid: Key prefix 'consul-' of %q is reserved for internal use", k)
		case len(v) > 512:
			b.bad(path, "node_meta invalid: Value of %q is too long (limit: 512 characters)", k)
		}
	}
	dc := func(key string, p *string, def string) string {
		name := strings.ToLower(or(p, def))
		if p == nil {
			return name
		}
		if !datacenterName.MatchString(name) {
			b.bad(key, "%s can only contain lowercase alphanumeric, - or _ characters. received: %q", key, name)
		}
		return name
	}
	n.Datacenter = dc("datacenter", s.Datacenter, "dc1")
	n.PrimaryDatacenter = dc("primary_datacenter", s.PrimaryDatacenter, n.Datacenter)
	domain := func(p *string, def string) string {
		d := strings.ToLower(strings.Trim(or(p, def), "."))
		if d == "" {
			return ""
		}
		return d + "."
	}
	n.Domain, n.AltDomain = domain(s.Domain, "consul"), domain(s.AltDomain, "")
	if n.Domain == "" {
		b.bad("domain", "domain cannot be empty")
	}
	if p := or(s.Partition, ""); p != "" && p != "default" {
		b.bad("partition", "partition = %q: an agent can only be in the partition \"default\"", p)
	}
	dir := or(s.DataDir, "")
	switch {
	case b.dev:
		if dir != "" {
			b.warn("data_dir", "data_dir has no effect with -dev: nothing is kept")
		}
	case dir == "":
		b.bad("data_dir", "data_dir cannot be empty")
	default:
		if abs, err := filepath.Abs(dir); err == nil {
			dir = abs
		}
		if fi, err := os.Stat(dir); err == nil && !fi.IsDir() {
			b.bad("data_dir", "data_dir %q is not a directory", dir)
		} else if err != nil && !os.IsNotExist(err) {
			b.bad("data_dir", "data_dir %q: %v", dir, cause(err))
		}
		n.DataDir = dir
	}
	return n
}

func sortedKeys[V any](m map[string]V) []string {
	keys := make([]string, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}

func (b *builder) cluster(n Node) Cluster {
	s := &b.s.clusterSettings
	c := Cluster{
		Server: or(s.Server, false), BootstrapExpect: or(s.BootstrapExpect, 0),
		RetryJoin:     append(append([]string{}, s.StartJoin...), s.RetryJoin...),
		RetryJoinWAN:  append(append([]string{}, s.StartJoinWAN...), s.RetryJoinWAN...),
		RetryInterval: b.positive("retry_interval", s.RetryInterval, 30*time.Second),
		RetryMax:      b.least("retry_max", s.RetryMax, 0, 0),
		RetryMaxWAN:   b.least("retry_max_wan", s.RetryMaxWAN, 0, 0),

		RetryIntervalWAN:        b.positive("retry_interval_wan", s.RetryIntervalWAN, 30*time.Second),
		RejoinAfterLeave:        or(s.RejoinAfterLeave, false),
		ReconnectLAN:            b.reconnect("reconnect_timeout", s.ReconnectLAN),
		ReconnectWAN:            b.reconnect("reconnect_timeout_wan", s.ReconnectWAN),
		Encrypt:                 or(s.Encrypt, ""),
		EncryptVerifyIn:         or(s.EncryptVerifyIn, true),
		EncryptVerifyOut:        or(s.EncryptVerifyOut, true),
		PrimaryGateways:         s.PrimaryGateways,
		PrimaryGatewaysInterval: b.positive("primary_gateways_interval", s.PrimaryGatewaysIv, 30*time.Second),
		SyncInterval:            time.Minute,
		FastTimings:             n.Dev,
		LANAllowed:              b.prefixes("serf_lan_allowed_cidrs", b.s.SerfLANCIDRs),
		WANAllowed:              b.prefixes("serf_wan_allowed_cidrs", b.s.SerfWANCIDRs),
		LeaveDrain:              b.notNegative("performance.leave_drain_time", b.s.Performance.LeaveDrain, 5*time.Second),
	}
	c.LeaveOnTerminate = or(s.LeaveOnTerm, !c.Server)
	c.SkipLeaveOnInterrupt = or(s.SkipLeaveOnInt, c.Server)
	if p := b.s.AEInterval; p != nil {
		if c.SyncInterval = *p; *p <= 0 {
			b.bad("ae_interval", "ae_interval cannot be %s. Must be positive", *p)
		}
	}
	bootstrap, expect := or(s.Bootstrap, false), or(s.BootstrapExpect, 0)
	switch {
	case expect < 0:
		b.bad("bootstrap_expect", "bootstrap_expect cannot be %d. Must be greater than or equal to zero", expect)
	case expect > 0 && n.Dev:
		b.bad("bootstrap_expect", "'bootstrap_expect > 0' not allowed in dev mode")
	case expect > 0 && !c.Server:
		b.bad("bootstrap_expect", "'bootstrap_expect > 0' requires 'server = true'")
	case expect > 0 && bootstrap:
		b.bad("bootstrap_expect", "'bootstrap_expect > 0' and 'bootstrap = true' are mutually exclusive")
	case expect == 1:
		// One server need not wait for others.
		bootstrap, c.BootstrapExpect = true, 0
	case expect == 2:
		b.warn("bootstrap_expect", "bootstrap_expect = 2: two servers tolerate no failure; use three")
	case expect > 0 && expect%2 == 0:
		b.warn("bootstrap_expect", "bootstrap_expect = %d: an even number of servers tolerates no more failures than one less", expect)
	}
	if bootstrap && !c.Server {
		b.bad("bootstrap", "'bootstrap = true' requires 'server = true'")
	}
	c.Bootstrap = bootstrap || n.Dev && c.Server
	if c.Encrypt != "" {
		key, err := base64.StdEncoding.DecodeString(c.Encrypt.Reveal())
		switch {
		case err != nil:
			b.bad("encrypt", "encrypt has invalid key: expected base64")
		case len(key) != 16 && len(key) != 24 && len(key) != 32:
			b.bad("encrypt", "encrypt has invalid key: expected 16, 24 or 32 bytes, got %d", len(key))
		}
	}
	return c
}

func (b *builder) reconnect(path string, p *duration) time.Duration {
	if p != nil && *p < 8*time.Hour {
		b.bad(path, "%s must be >= 8h", path)
	}
	return or(p, 72*time.Hour)
}

func (b *builder) positive(path string, p *duration, def time.Duration) time.Duration {
	if p != nil && *p <= 0 {
		b.bad(path, "%s cannot be %s. Must be positive", path, *p)
	}
	return or(p, def)
}

func (b *builder) notNegative(path string, p *duration, def time.Duration) time.Duration {
	if p != nil && *p < 0 {
		b.bad(path, "%s cannot be %s. Must be greater than or equal to zero", path, *p)
	}
	return or(p, def)
}

func (b *builder) least(path string, p *int, least, def int) int {
	if p != nil && *p < least {
		b.bad(path, "%s cannot be %d. Must be greater than or equal to %d", path, *p, least)
	}
	return or(p, def)
}

func (b *builder) within(path string, p *float64, def, least, most float64) float64 {
	if p != nil && !(*p >= least && *p <= most) {
		b.bad(path, "%s cannot be %v. Must be from %v to %v", path, *p, least, most)
	}
	return or(p, def)
}

func (b *builder) prefixes(path string, list []string) []netip.Prefix {
	var out []netip.Prefix
	for i, s := range list {
		p, err := netip.ParsePrefix(s)
		if err != nil {
			b.bad(fmt.Sprintf("%s[%d]", path, i), "%s: invalid network %q, expected one such as \"10.0.0.0/8\"", path, s)
			continue
		}
		out = append(out, p.Masked())
	}
	return out
}

func (b *builder) acl() ACL {
	s := &b.s.ACL
	const refused = "access control lists are not supported by this version: tokens are passed on, but nothing is checked"
	if or(s.Enabled, false) {
		b.problems = append(b.problems, Problem{Pos: b.at("acl.enabled"), Path: "acl.enabled", Value: "true", Text: refused})
	}
	if p := b.s.LegacyACLDC; p != nil && *p != "" {
		b.problems = append(b.problems, Problem{Pos: b.at("acl_datacenter"), Path: "acl_datacenter", Value: strconv.Quote(*p), Text: refused})
	}
	for _, x := range []struct {
		path string
		p    *string
	}{{"acl.default_policy", s.DefaultPolicy}, {"acl_default_policy", b.s.LegacyACLPolicy}} {
		switch or(x.p, "allow") {
		case "allow":
		case "deny":
			b.warn(x.path, "%s = \"deny\" has no effect while acl.enabled is false; use default_intention_policy for intentions", x.path)
		default:
			b.bad(x.path, "%s = %q: expected \"allow\" or \"deny\"", x.path, *x.p)
		}
	}
	t := &s.Tokens
	token := func(p, legacy *secret) secret { return or(p, or(legacy, "")) }
	return ACL{
		Default: token(t.Default, b.s.LegacyACLToken), Agent: token(t.Agent, b.s.LegacyAgentToken),
		Replication:       token(t.Replication, b.s.LegacyReplication),
		InitialManagement: token(t.InitialManagement, b.s.LegacyMaster),
		AgentRecovery:     token(t.AgentRecovery, b.s.LegacyAgentMaster),
		ConfigFileService: or(t.ConfigFile, ""),
	}
}

// caKeys are the keys of ca_config that are spelled otherwise in a file.
var caKeys = map[string]string{
	"private_key": "PrivateKey", "root_cert": "RootCert", "leaf_cert_ttl": "LeafCertTTL",
	"intermediate_cert_ttl": "IntermediateCertTTL", "root_cert_ttl": "RootCertTTL",
	"csr_max_per_second": "CSRMaxPerSecond", "csr_max_concurrent": "CSRMaxConcurrent",
	"private_key_type": "PrivateKeyType", "private_key_bits": "PrivateKeyBits",
	"rotation_period": "RotationPeriod", "skip_validate": "SkipValidate", "cluster_id": "ClusterID",
}

func (b *builder) connect() Connect {
	s := &b.s.Connect
	c := Connect{
		Enabled: or(s.Enabled, true), CAProvider: or(s.CAProvider, "consul"), CAConfig: map[string]any{},
		DeregisterCritical: b.notNegative("connect.default_deregister_critical_service_after", s.Deregister, 0),
		CentralConfig:      or(b.s.CentralConfig, true), DefaultAllow: true,
	}
	switch c.CAProvider {
	case "consul", "":
		c.CAProvider = "consul"
	case "vault", "aws-pca":
		b.bad("connect.ca_provider", "the CA provider %q is not supported by this version", c.CAProvider)
	default:
		b.bad("connect.ca_provider", "%s is not a valid CA provider", c.CAProvider)
	}
	known := make([]string, 0, 2*len(caKeys))
	for snake, camel := range caKeys {
		known = append(known, snake, camel)
	}
	slices.Sort(known)
	for _, k := range sortedKeys(s.CAConfig) {
		path := "connect.ca_config." + k
		name, ok := caKeys[strings.ToLower(k)]
		if !ok {
			i := slices.IndexFunc(known, func(n string) bool { return strings.EqualFold(n, k) })
			if i < 0 {
				p := Problem{Pos: b.at(path), Text: "invalid config key " + path}
				if n := nearest(k, known); n != "" {
					p.Hint = fmt.Sprintf("did you mean %q?", n)
				}
				b.problems = append(b.problems, p)
				continue
			}
			name = known[i]
		}
		v := s.CAConfig[k]
		if name == "ClusterID" {
			id, ok := v.(string)
			if !ok || !uuid.MatchString(strings.ToLower(id)) {
				b.bad(path, "cluster_id was supplied but was not a valid UUID")
			}
			c.ClusterID = strings.ToLower(id)
			continue
		}
		c.CAConfig[name] = v
	}
	switch p := or(b.s.DefaultIntentions, "allow"); p {
	case "allow", "":
	case "deny":
		c.DefaultAllow = false
	default:
		b.bad("default_intention_policy", "default_intention_policy = %q: expected \"allow\" or \"deny\"", p)
	}
	return c
}

// federation checks what concerns several sections.
func (b *builder) federation(rt *Runtime) {
	c := &rt.Cluster
	c.MeshGatewayWANFederation = or(b.s.Connect.WANFederation, false)
	secondary := rt.Node.Datacenter != rt.Node.PrimaryDatacenter
	if c.MeshGatewayWANFederation {
		const key = "connect.enable_mesh_gateway_wan_federation"
		b.bad(key, "federation of servers through mesh gateways is not supported by this version: remove '%s', and name servers of the other datacenters in 'retry_join_wan'", key)
		if !c.Server {
			b.bad(key, "'%s = true' requires 'server = true'", key)
		}
		if !rt.Connect.Enabled {
			b.bad(key, "'%s = true' requires 'connect.enabled = true'", key)
		}
		if strings.Contains(rt.Node.Name, "/") {
			b.bad("node_name", "'node_name' must not contain '/' characters: %q", rt.Node.Name)
		}
		if len(c.RetryJoinWAN) > 0 {
			b.bad("retry_join_wan", "'retry_join_wan' is incompatible with '%s = true'", key)
		}
		if t := rt.TLS.InternalRPC; !t.VerifyOutgoing || !t.VerifyServerHostname {
			b.bad(key, "'%s = true' requires 'tls.internal_rpc.verify_outgoing = true' and 'tls.internal_rpc.verify_server_hostname = true'", key)
		}
	}
	for key, list := range map[string][]string{"retry_join": c.RetryJoin, "retry_join_wan": c.RetryJoinWAN} {
		for _, a := range list {
			if strings.Contains(a, "provider=") {
				b.bad(key, "%s = %q: joining by a cloud provider's lists is not supported by this version: name addresses or host names", key, a)
			}
		}
	}
	if len(c.PrimaryGateways) > 0 {
		if !c.Server {
			b.bad("primary_gateways", "'primary_gateways' requires 'server = true'")
		}
		if !secondary {
			b.bad("primary_gateways", "'primary_gateways' should only be configured in a secondary datacenter")
		}
		if !c.MeshGatewayWANFederation {
			b.bad("primary_gateways", "'primary_gateways' requires 'connect.enable_mesh_gateway_wan_federation = true'")
		}
	}
	if or(b.s.AutoEncrypt.TLS, false) {
		if c.Server {
			b.bad("auto_encrypt.tls", "auto_encrypt.tls can only be used on a client.")
		} else {
			b.bad("auto_encrypt.tls", "auto_encrypt is not supported by this version: configure certificates in the tls block")
		}
	}
	if or(b.s.AutoEncrypt.AllowTLS, false) {
		b.bad("auto_encrypt.allow_tls", "auto_encrypt is not supported by this version: configure certificates in the tls block")
	}
	if or(b.s.AutoConfig.Enabled, false) {
		b.bad("auto_config.enabled", "auto_config is not supported by this version: configure this agent by files")
	}
}

func (b *builder) log() Log {
	s := &b.s.logSettings
	l := Log{
		Level: strings.ToLower(or(s.Level, "info")), JSON: or(s.JSON, false), File: or(s.File, ""),
		RotateDuration: b.notNegative("log_rotate_duration", s.RotateDuration, 24*time.Hour),
		RotateBytes:    b.least("log_rotate_bytes", s.RotateBytes, 0, 0),
		RotateMaxFiles: b.least("log_rotate_max_files", s.RotateMaxFiles, -1, 0),
		PIDFile:        or(s.PIDFile, ""),
	}
	switch l.Level {
	case "trace", "debug", "info", "warn", "error":
	case "err":
		l.Level = "error"
	default:
		b.bad("log_level", "Invalid log level: %s. Valid log levels are: trace, debug, info, warn, error", or(s.Level, ""))
	}
	return l
}

func (b *builder) rest(rt *Runtime) {
	s := b.s
	multiplier := 5
	if rt.Cluster.Bootstrap {
		// COMPAT: a server that founds a datacenter alone has nobody to wait for; with
		// Consul's 5 it would take up to ten seconds to elect itself at each start.
		multiplier = 1
	}
	rt.Performance = Performance{
		RaftMultiplier: or(s.Performance.RaftMultiplier, multiplier),
		RPCHold:        b.notNegative("performance.rpc_hold_timeout", s.Performance.RPCHold, 7*time.Second),
	}
	if m := rt.Performance.RaftMultiplier; m < 1 || m > 10 {
		b.bad("performance.raft_multiplier", "performance.raft_multiplier cannot be %d. Must be between 1 and 10", m)
	}
	rt.Limits = Limits{
		HTTPMaxConns:   b.least("limits.http_max_conns_per_client", s.Limits.HTTPMaxConns, 0, 200),
		RPCMaxConns:    b.least("limits.rpc_max_conns_per_client", s.Limits.RPCMaxConns, 0, 100),
		HTTPSHandshake: b.positive("limits.https_handshake_timeout", s.Limits.HTTPSHandshake, 5*time.Second),
		RPCHandshake:   b.positive("limits.rpc_handshake_timeout", s.Limits.RPCHandshake, 5*time.Second),
	}
	rt.Telemetry = b.telemetry()
	rt.HTTP = HTTP{
		BlockEndpoints: s.HTTP.BlockEndpoints, ResponseHeaders: s.HTTP.ResponseHeaders,
		AllowWriteFrom:   b.prefixes("http_config.allow_write_http_from", s.HTTP.AllowWriteFrom),
		MaxHeaderBytes:   b.least("http_config.max_header_bytes", s.HTTP.MaxHeaderBytes, 0, 0),
		DefaultQueryTime: b.positive("default_query_time", s.DefaultQueryTime, 300*time.Second),
		MaxQueryTime:     b.positive("max_query_time", s.MaxQueryTime, 600*time.Second),
		EnableDebug:      or(s.EnableDebug, false), UI: or(s.UI.Enabled, or(s.LegacyUI, false)),
		Pretty: b.dev,
	}
	rt.Health = Health{
		UpdateInterval: b.notNegative("check_update_interval", s.CheckUpdate, 5*time.Minute),
		OutputMaxSize:  b.least("check_output_max_size", s.CheckOutputMax, 1, 4096),
		DiscardOutput:  or(s.DiscardOutput, false), ScriptChecks: or(s.ScriptChecks, false),
		LocalScriptChecks: or(s.LocalScriptChecks, false) || or(s.ScriptChecks, false),
	}
	if rt.Health.ScriptChecks && len(rt.HTTP.AllowWriteFrom) == 0 {
		b.warn("enable_script_checks", "enable_script_checks lets everyone who reaches the API run programs on this node; use enable_local_script_checks")
	}
	oneOf := func(path string, p *string, choices ...string) string {
		v := or(p, choices[0])
		if !slices.Contains(choices, v) {
			b.bad(path, "%s = %q: expected %s", path, v, list(choices))
		}
		return v
	}
	rt.DataPlane = DataPlane{
		Default: oneOf("data_plane.default", s.DataPlane.Default, "builtin", "none"),
		Engine:  oneOf("data_plane.engine", s.DataPlane.Engine, "auto", "epoll", "netpoll"),

		DrainWait:        b.notNegative("data_plane.drain.wait", s.DataPlane.Drain.Wait, 5*time.Second),
		DrainTimeout:     b.notNegative("data_plane.drain.timeout", s.DataPlane.Drain.Timeout, 30*time.Second),
		DrainRate:        b.within("data_plane.drain.rate", s.DataPlane.Drain.Rate, 50, 0, 1e6),
		DrainOnTerminate: or(s.DataPlane.Drain.OnTerminate, false),
		AccessLog:        or(s.DataPlane.AccessLog.Enabled, false),
		AccessLogSample:  b.within("data_plane.access_log.sample", s.DataPlane.AccessLog.Sample, 1, 0, 1),
	}
}

func list(choices []string) string {
	q := make([]string, len(choices))
	for i, c := range choices {
		q[i] = strconv.Quote(c)
	}
	return strings.Join(q[:len(q)-1], ", ") + " or " + q[len(q)-1]
}

func (b *builder) telemetry() Telemetry {
	s := &b.s.Telemetry
	t := Telemetry{
		Prefix: or(s.Prefix, "consul"), DisableHostname: or(s.DisableHostname, false),
		PrometheusRetention: b.notNegative("telemetry.prometheus_retention_time", s.PrometheusRetention, 0),
		StatsdAddr:          or(s.Statsd, ""), StatsiteAddr: or(s.Statsite, ""), FilterDefault: or(s.FilterDefault, true),
	}
	for i, f := range s.PrefixFilter {
		switch {
		case strings.HasPrefix(f, "+"):
			t.AllowedPrefixes = append(t.AllowedPrefixes, f[1:])
		case strings.HasPrefix(f, "-"):
			t.BlockedPrefixes = append(t.BlockedPrefixes, f[1:])
		default:
			b.bad(fmt.Sprintf("telemetry.prefix_filter[%d]", i), "Filter rule must begin with either '+' or '-': %q", f)
		}
	}
	return t
}
