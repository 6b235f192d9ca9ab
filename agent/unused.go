package agent

import (
	"time"

	"github.com/sluicemesh/sluice/agent/config"
)

// withoutEffect names the keys that are read, checked and set to something, and
// that nothing in this version acts on; whoever sets one should know. Keys that
// only Consul has are told by config itself.
func withoutEffect(rt *config.Runtime) []string {
	var keys []string
	add := func(set bool, key string) {
		if set {
			keys = append(keys, key)
		}
	}
	add(rt.Node.AltDomain != "", "alt_domain")
	add(rt.Network.TranslateWAN, "translate_wan_addrs")
	add(!rt.Connect.CentralConfig, "enable_central_service_config")
	add(rt.Limits.RPCMaxConns != 100, "limits.rpc_max_conns_per_client")
	add(rt.Limits.RPCHandshake != 5*time.Second, "limits.rpc_handshake_timeout")
	add(rt.Health.LocalScriptChecks, "enable_script_checks, enable_local_script_checks")
	for _, t := range []struct {
		set bool
		key string
	}{
		{rt.ACL.Default != "", "acl.tokens.default"},
		{rt.ACL.Agent != "", "acl.tokens.agent"},
		{rt.ACL.InitialManagement != "", "acl.tokens.initial_management"},
		{rt.ACL.AgentRecovery != "", "acl.tokens.agent_recovery"},
		{rt.ACL.ConfigFileService != "", "acl.tokens.config_file_service_registration"},
	} {
		add(t.set, t.key)
	}
	if !rt.Node.Dev { // -dev sets these for whoever has them
		add(len(rt.Network.GRPC) > 0, "ports.grpc")
		add(len(rt.Network.GRPCTLS) > 0, "ports.grpc_tls")
		add(rt.HTTP.EnableDebug, "enable_debug")
		add(rt.HTTP.UI, "ui_config.enabled")
	}
	return keys
}
