package config

import (
	"time"

	"github.com/hashicorp/consul/api"

	"github.com/sluicemesh/sluice/acl"
)

// settings is the form that all sources are decoded into. A nil pointer is a key
// that no source gave.
type settings struct {
	nodeSettings
	networkSettings
	clusterSettings
	legacyTLS
	logSettings

	ACL         aclSettings         `config:"acl"`
	Connect     connectSettings     `config:"connect"`
	TLS         tlsSettings         `config:"tls"`
	AutoEncrypt autoEncrypt         `config:"auto_encrypt"`
	AutoConfig  autoConfig          `config:"auto_config"`
	Performance performanceSettings `config:"performance"`
	Limits      limitSettings       `config:"limits"`
	Telemetry   telemetrySettings   `config:"telemetry"`
	HTTP        httpSettings        `config:"http_config"`
	UI          uiSettings          `config:"ui_config"`
	DataPlane   dataPlaneSettings   `config:"data_plane"`

	Services []serviceSettings `config:"services,service"`
	Checks   []checkSettings   `config:"checks,check"`
	Entries  struct {
		Bootstrap []bootstrapEntry `config:"bootstrap"`
	} `config:"config_entries"`

	LegacyUI          *bool     `config:"ui" deprecated:"ui_config.enabled"`
	EnableDebug       *bool     `config:"enable_debug"`
	DefaultQueryTime  *duration `config:"default_query_time"`
	MaxQueryTime      *duration `config:"max_query_time"`
	CheckUpdate       *duration `config:"check_update_interval"`
	CheckOutputMax    *int      `config:"check_output_max_size"`
	DiscardOutput     *bool     `config:"discard_check_output"`
	ScriptChecks      *bool     `config:"enable_script_checks"`
	LocalScriptChecks *bool     `config:"enable_local_script_checks"`
	AEInterval        *duration `config:"ae_interval"`
	CentralConfig     *bool     `config:"enable_central_service_config"`
	DefaultIntentions *string   `config:"default_intention_policy"`
	LegacyACLDC       *string   `config:"acl_datacenter"`
	LegacyACLToken    *secret   `config:"acl_token" deprecated:"acl.tokens.default"`
	LegacyAgentToken  *secret   `config:"acl_agent_token" deprecated:"acl.tokens.agent"`
	LegacyReplication *secret   `config:"acl_replication_token" deprecated:"acl.tokens.replication"`
	LegacyMaster      *secret   `config:"acl_master_token" deprecated:"acl.tokens.initial_management"`
	LegacyAgentMaster *secret   `config:"acl_agent_master_token" deprecated:"acl.tokens.agent_recovery"`
	LegacyACLPolicy   *string   `config:"acl_default_policy" deprecated:"acl.default_policy"`

	Ignored ignored `config:"version,version_prerelease,version_metadata,revision,build_date,disable_update_check,disable_anonymous_signature,experiments,segments,segment,audit,peering,autopilot,dns_config,recursors,recursor,watches,raft_protocol,raft_logstore,raft_snapshot_threshold,raft_snapshot_interval,raft_trailing_logs,raft_boltdb,reporting,cloud,license_path,sentinel,xds,use_streaming_backend,rpc,cache,gossip_lan,gossip_wan,protocol,read_replica,non_voting_server,disable_remote_exec,disable_coordinates,disable_keyring_file,disable_http_unprintable_char_filter,disable_host_node_id,session_ttl_min,sync_coordinate_interval_min,sync_coordinate_rate_target,snapshot_agent,acl_ttl,acl_down_policy,acl_enable_key_list_policy,acl_enforce_version_8,enable_acl_replication,enable_agent_tls_for_checks,ui_content_path,ui_dir,advertise_reconnect_timeout,server_rejoin_age_max,auto_reload_config"`
}

type (
	duration = time.Duration
	secret   = acl.Secret
)

type nodeSettings struct {
	Name              *string           `config:"node_name"`
	ID                *string           `config:"node_id"`
	Meta              map[string]string `config:"node_meta"`
	Datacenter        *string           `config:"datacenter"`
	PrimaryDatacenter *string           `config:"primary_datacenter"`
	Domain            *string           `config:"domain"`
	AltDomain         *string           `config:"alt_domain"`
	DataDir           *string           `config:"data_dir"`
	Locality          *api.Locality     `config:"locality"`
	Partition         *string           `config:"partition"`
}

type networkSettings struct {
	BindAddr        *string         `config:"bind_addr"`
	ClientAddr      *string         `config:"client_addr"`
	AdvertiseAddr   *string         `config:"advertise_addr"`
	AdvertiseAddrV4 *string         `config:"advertise_addr_ipv4"`
	AdvertiseAddrV6 *string         `config:"advertise_addr_ipv6"`
	AdvertiseWAN    *string         `config:"advertise_addr_wan"`
	AdvertiseWANV4  *string         `config:"advertise_addr_wan_ipv4"`
	AdvertiseWANV6  *string         `config:"advertise_addr_wan_ipv6"`
	SerfLAN         *string         `config:"serf_lan"`
	SerfWAN         *string         `config:"serf_wan"`
	SerfLANCIDRs    []string        `config:"serf_lan_allowed_cidrs"`
	SerfWANCIDRs    []string        `config:"serf_wan_allowed_cidrs"`
	TranslateWAN    *bool           `config:"translate_wan_addrs"`
	Ports           portSettings    `config:"ports"`
	Addresses       addressSettings `config:"addresses"`
	UnixSockets     unixSockets     `config:"unix_sockets"`
}

type portSettings struct {
	HTTP       *int    `config:"http"`
	HTTPS      *int    `config:"https"`
	GRPC       *int    `config:"grpc"`
	GRPCTLS    *int    `config:"grpc_tls"`
	SerfLAN    *int    `config:"serf_lan"`
	SerfWAN    *int    `config:"serf_wan"`
	Server     *int    `config:"server"`
	SidecarMin *int    `config:"sidecar_min_port"`
	SidecarMax *int    `config:"sidecar_max_port"`
	Ignored    ignored `config:"dns,proxy_min_port,proxy_max_port,expose_min_port,expose_max_port"`
}

type addressSettings struct {
	HTTP    *string `config:"http"`
	HTTPS   *string `config:"https"`
	GRPC    *string `config:"grpc"`
	GRPCTLS *string `config:"grpc_tls"`
	Ignored ignored `config:"dns"`
}

type unixSockets struct {
	User  *string `config:"user"`
	Group *string `config:"group"`
	Mode  *string `config:"mode"`
}

type clusterSettings struct {
	Server            *bool     `config:"server"`
	Bootstrap         *bool     `config:"bootstrap"`
	BootstrapExpect   *int      `config:"bootstrap_expect"`
	RetryJoin         []string  `config:"retry_join"`
	RetryJoinWAN      []string  `config:"retry_join_wan"`
	StartJoin         []string  `config:"start_join" deprecated:"retry_join"`
	StartJoinWAN      []string  `config:"start_join_wan" deprecated:"retry_join_wan"`
	RetryInterval     *duration `config:"retry_interval"`
	RetryIntervalWAN  *duration `config:"retry_interval_wan"`
	RetryMax          *int      `config:"retry_max"`
	RetryMaxWAN       *int      `config:"retry_max_wan"`
	RejoinAfterLeave  *bool     `config:"rejoin_after_leave"`
	ReconnectLAN      *duration `config:"reconnect_timeout"`
	ReconnectWAN      *duration `config:"reconnect_timeout_wan"`
	Encrypt           *secret   `config:"encrypt"`
	EncryptVerifyIn   *bool     `config:"encrypt_verify_incoming"`
	EncryptVerifyOut  *bool     `config:"encrypt_verify_outgoing"`
	PrimaryGateways   []string  `config:"primary_gateways"`
	PrimaryGatewaysIv *duration `config:"primary_gateways_interval"`
	LeaveOnTerm       *bool     `config:"leave_on_terminate"`
	SkipLeaveOnInt    *bool     `config:"skip_leave_on_interrupt"`
}

// legacyTLS are the keys of TLS from before the tls block.
type legacyTLS struct {
	CAFile               *string `config:"ca_file" deprecated:"tls.defaults.ca_file"`
	CAPath               *string `config:"ca_path" deprecated:"tls.defaults.ca_path"`
	CertFile             *string `config:"cert_file" deprecated:"tls.defaults.cert_file"`
	KeyFile              *string `config:"key_file" deprecated:"tls.defaults.key_file"`
	MinVersion           *string `config:"tls_min_version" deprecated:"tls.defaults.tls_min_version"`
	CipherSuites         *string `config:"tls_cipher_suites" deprecated:"tls.defaults.tls_cipher_suites"`
	VerifyIncoming       *bool   `config:"verify_incoming" deprecated:"tls.defaults.verify_incoming"`
	VerifyIncomingRPC    *bool   `config:"verify_incoming_rpc" deprecated:"tls.internal_rpc.verify_incoming"`
	VerifyIncomingHTTPS  *bool   `config:"verify_incoming_https" deprecated:"tls.https.verify_incoming"`
	VerifyOutgoing       *bool   `config:"verify_outgoing" deprecated:"tls.defaults.verify_outgoing"`
	VerifyServerHostname *bool   `config:"verify_server_hostname" deprecated:"tls.internal_rpc.verify_server_hostname"`
	ServerName           *string `config:"server_name"`
	PreferServerCiphers  ignored `config:"tls_prefer_server_cipher_suites"`
}

type tlsSettings struct {
	Defaults    tlsBlock `config:"defaults"`
	InternalRPC tlsBlock `config:"internal_rpc"`
	HTTPS       tlsBlock `config:"https"`
	GRPC        tlsGRPC  `config:"grpc"`
}

type tlsGRPC struct {
	tlsBlock
	UseAutoCert *bool `config:"use_auto_cert"`
}

type tlsBlock struct {
	CAFile               *string `config:"ca_file"`
	CAPath               *string `config:"ca_path"`
	CertFile             *string `config:"cert_file"`
	KeyFile              *string `config:"key_file"`
	MinVersion           *string `config:"tls_min_version"`
	CipherSuites         *string `config:"tls_cipher_suites"`
	VerifyIncoming       *bool   `config:"verify_incoming"`
	VerifyOutgoing       *bool   `config:"verify_outgoing"`
	VerifyServerHostname *bool   `config:"verify_server_hostname"`
}

type logSettings struct {
	Level          *string   `config:"log_level"`
	JSON           *bool     `config:"log_json"`
	File           *string   `config:"log_file"`
	RotateDuration *duration `config:"log_rotate_duration"`
	RotateBytes    *int      `config:"log_rotate_bytes"`
	RotateMaxFiles *int      `config:"log_rotate_max_files"`
	PIDFile        *string   `config:"pid_file"`
	Ignored        ignored   `config:"enable_syslog,syslog_facility"`
}

type aclSettings struct {
	Enabled       *bool     `config:"enabled"`
	Tokens        aclTokens `config:"tokens"`
	DefaultPolicy *string   `config:"default_policy"`
	Ignored       ignored   `config:"policy_ttl,token_ttl,role_ttl,down_policy,disabled_ttl,enable_key_list_policy,enable_token_persistence,enable_token_replication,msp_disable_bootstrap"`
}

type aclTokens struct {
	InitialManagement *secret `config:"initial_management,master"`
	AgentRecovery     *secret `config:"agent_recovery,agent_master"`
	Default           *secret `config:"default"`
	Agent             *secret `config:"agent"`
	Replication       *secret `config:"replication"`
	ConfigFile        *secret `config:"config_file_service_registration"`
	Ignored           ignored `config:"dns,managed_service_provider"`
}

type connectSettings struct {
	Enabled       *bool          `config:"enabled"`
	CAProvider    *string        `config:"ca_provider"`
	CAConfig      map[string]any `config:"ca_config"`
	WANFederation *bool          `config:"enable_mesh_gateway_wan_federation"`
	Deregister    *duration      `config:"default_deregister_critical_service_after"`
	Ignored       ignored        `config:"enable_serverless_plugin,test_ca_leaf_root_change_spread,test_disable_federation_state_anti_entropy"`
}

type autoEncrypt struct {
	TLS      *bool   `config:"tls"`
	AllowTLS *bool   `config:"allow_tls"`
	Ignored  ignored `config:"dns_san,ip_san"`
}

type autoConfig struct {
	Enabled       *bool   `config:"enabled"`
	Authorization ignored `config:"authorization,intro_token,intro_token_file,server_addresses,dns_sans,ip_sans"`
}

type performanceSettings struct {
	RaftMultiplier *int      `config:"raft_multiplier"`
	LeaveDrain     *duration `config:"leave_drain_time"`
	RPCHold        *duration `config:"rpc_hold_timeout"`
	Ignored        ignored   `config:"enable_xds_load_balancing,grpc_keepalive_interval,grpc_keepalive_timeout"`
}

type limitSettings struct {
	HTTPMaxConns   *int      `config:"http_max_conns_per_client"`
	RPCMaxConns    *int      `config:"rpc_max_conns_per_client"`
	HTTPSHandshake *duration `config:"https_handshake_timeout"`
	RPCHandshake   *duration `config:"rpc_handshake_timeout"`
	Ignored        ignored   `config:"rpc_rate,rpc_max_burst,rpc_client_timeout,kv_max_value_size,txn_max_req_len,request_limits"`
}

type telemetrySettings struct {
	Prefix              *string   `config:"metrics_prefix"`
	DisableHostname     *bool     `config:"disable_hostname"`
	PrometheusRetention *duration `config:"prometheus_retention_time"`
	Statsd              *string   `config:"statsd_address"`
	Statsite            *string   `config:"statsite_address"`
	PrefixFilter        []string  `config:"prefix_filter"`
	FilterDefault       *bool     `config:"filter_default"`
	Ignored             ignored   `config:"circonus_api_app,circonus_api_token,circonus_api_url,circonus_broker_id,circonus_broker_select_tag,circonus_check_display_name,circonus_check_force_metric_activation,circonus_check_id,circonus_check_instance_id,circonus_check_search_tag,circonus_check_tags,circonus_submission_interval,circonus_submission_url,disable_compat_1.9,disable_per_tenancy_usage_metrics,dogstatsd_addr,dogstatsd_tags,retry_failed_connection,enable_host_metrics"`
}

type httpSettings struct {
	BlockEndpoints  []string          `config:"block_endpoints"`
	ResponseHeaders map[string]string `config:"response_headers"`
	AllowWriteFrom  []string          `config:"allow_write_http_from"`
	MaxHeaderBytes  *int              `config:"max_header_bytes"`
	Ignored         ignored           `config:"use_cache"`
}

type uiSettings struct {
	Enabled *bool   `config:"enabled"`
	Ignored ignored `config:"dir,content_path,metrics_provider,metrics_provider_files,metrics_provider_options_json,metrics_proxy,dashboard_url_templates"`
}

// dataPlaneSettings is a block of this agent's own.
type dataPlaneSettings struct {
	Default   *string           `config:"default"`
	Engine    *string           `config:"engine"`
	Drain     drainSettings     `config:"drain"`
	AccessLog accessLogSettings `config:"access_log"`
}

type drainSettings struct {
	Wait        *duration `config:"wait"`
	Timeout     *duration `config:"timeout"`
	Rate        *float64  `config:"rate"`
	OnTerminate *bool     `config:"on_terminate"`
}

type accessLogSettings struct {
	Enabled *bool    `config:"enabled"`
	Sample  *float64 `config:"sample"`
}

// serviceSettings is a service definition as a file has it.
type serviceSettings struct {
	At                Pos                                 `config:"-"`
	Kind              string                              `config:"kind"`
	ID                string                              `config:"id"`
	Name              string                              `config:"name"`
	Tags              []string                            `config:"tags"`
	Address           string                              `config:"address"`
	TaggedAddresses   map[string]api.ServiceAddress       `config:"tagged_addresses"`
	Port              int                                 `config:"port"`
	Ports             api.ServicePorts                    `config:"ports"`
	SocketPath        string                              `config:"socket_path"`
	Meta              map[string]string                   `config:"meta"`
	EnableTagOverride bool                                `config:"enable_tag_override,enabletagoverride"`
	Weights           *weightSettings                     `config:"weights"`
	Token             acl.Secret                          `config:"token"`
	Check             []checkSettings                     `config:"check"`
	Checks            []checkSettings                     `config:"checks"`
	Proxy             *api.AgentServiceConnectProxyConfig `config:"proxy"`
	Connect           *serviceConnect                     `config:"connect"`
	Locality          *api.Locality                       `config:"locality"`
	Namespace         string                              `config:"namespace"`
	Partition         string                              `config:"partition"`
}

type weightSettings struct {
	Passing *int `config:"passing"`
	Warning *int `config:"warning"`
}

type serviceConnect struct {
	Native         bool             `config:"native"`
	SidecarService *serviceSettings `config:"sidecar_service"`
}

// checkSettings is a check as a file has it. A check of a service leaves
// ServiceID empty.
type checkSettings struct {
	At Pos `config:"-"`
	api.AgentServiceCheck
	ServiceID string      `config:"service_id,serviceid"`
	Token     acl.Secret  `config:"token"`
	OSService unsupported `config:"os_service" reason:"os_service checks are not supported by this version"`
	Ignored   ignored     `config:"disable_redirects,output_max_size,namespace,partition"`
}
