package httpapi

import (
	"net/http"
	"slices"
	"strings"
)

// route is a row of the route table.
type route struct {
	method string
	// pattern is a path; ":name" stands for one segment, and at the end for the
	// whole rest, slashes included.
	pattern string
	scope   scope
	handler func(*call) (any, error)
	// doc is the row of the documentation.
	doc string
	// consistency says that answers name the consistency they have.
	consistency bool
	// internal routes are served to agents only.
	internal bool
	// check, if not nil, may refuse a request before it is passed on.
	check func(*call) error
}

// ofMesh says whether the route is about the mesh's certificates or intentions.
func (r *route) ofMesh() bool {
	return strings.HasPrefix(r.pattern, "/v1/connect/") || strings.HasPrefix(r.pattern, "/v1/agent/connect/")
}

const (
	get  = http.MethodGet
	put  = http.MethodPut
	post = http.MethodPost
	del  = http.MethodDelete
)

// routeTable is every route there is: dispatch, the Allow header, the answers to
// unknown paths and the documentation come from it.
var routeTable = []route{
	{method: get, pattern: "/v1/agent/self", scope: scopeAgent, handler: (*call).agentSelf, doc: "configuration, statistics and gossip member of this agent"},
	{method: get, pattern: "/v1/agent/version", scope: scopeAgent, handler: (*call).agentVersion, doc: "version of this agent"},
	{method: get, pattern: "/v1/agent/host", scope: scopeAgent, handler: (*call).agentHost, doc: "the machine this agent runs on"},
	{method: get, pattern: "/v1/agent/members", scope: scopeAgent, handler: (*call).agentMembers, doc: "gossip members; `wan`, `filter`"},
	{method: get, pattern: "/v1/agent/metrics", scope: scopeAgent, handler: (*call).agentMetrics, doc: "metrics of the last interval; `format=prometheus`"},
	{method: get, pattern: "/v1/agent/monitor", scope: scopeAgent, handler: (*call).agentMonitor, doc: "stream of this agent's log; `loglevel`, `logjson`"},
	{method: put, pattern: "/v1/agent/reload", scope: scopeAgent, handler: (*call).agentReload, doc: "read the configuration again"},
	{method: put, pattern: "/v1/agent/join/:address", scope: scopeAgent, handler: (*call).agentJoin, doc: "join a gossip pool; `wan`"},
	{method: put, pattern: "/v1/agent/leave", scope: scopeAgent, handler: (*call).agentLeave, doc: "leave the cluster and stop"},
	{method: put, pattern: "/v1/agent/force-leave/:node", scope: scopeAgent, handler: (*call).agentForceLeave, doc: "make a failed member one that left; `prune`, `wan`"},
	{method: put, pattern: "/v1/agent/maintenance", scope: scopeAgent, handler: (*call).agentMaintenance, doc: "node maintenance; `enable`, `reason`"},
	{method: get, pattern: "/v1/agent/services", scope: scopeAgent, handler: (*call).agentServices, doc: "services registered on this agent by ID; `filter`"},
	{method: get, pattern: "/v1/agent/service/:id", scope: scopeAgent, handler: (*call).agentService, doc: "one service; blocks with `hash` and `wait`"},
	{method: put, pattern: "/v1/agent/service/register", scope: scopeAgent, handler: (*call).agentServiceRegister, doc: "register a service; `replace-existing-checks`"},
	{method: put, pattern: "/v1/agent/service/deregister/:id", scope: scopeAgent, handler: (*call).agentServiceDeregister, doc: "remove a service"},
	{method: put, pattern: "/v1/agent/service/maintenance/:id", scope: scopeAgent, handler: (*call).agentServiceMaintenance, doc: "service maintenance; `enable`, `reason`"},
	{method: get, pattern: "/v1/agent/checks", scope: scopeAgent, handler: (*call).agentChecks, doc: "checks of this agent by ID; `filter`"},
	{method: put, pattern: "/v1/agent/check/register", scope: scopeAgent, handler: (*call).agentCheckRegister, doc: "register a check"},
	{method: put, pattern: "/v1/agent/check/deregister/:id", scope: scopeAgent, handler: (*call).agentCheckDeregister, doc: "remove a check"},
	{method: put, pattern: "/v1/agent/check/pass/:id", scope: scopeAgent, handler: (*call).agentCheckPass, doc: "set a TTL check passing; `note`"},
	{method: put, pattern: "/v1/agent/check/warn/:id", scope: scopeAgent, handler: (*call).agentCheckWarn, doc: "set a TTL check warning; `note`"},
	{method: put, pattern: "/v1/agent/check/fail/:id", scope: scopeAgent, handler: (*call).agentCheckFail, doc: "set a TTL check critical; `note`"},
	{method: put, pattern: "/v1/agent/check/update/:id", scope: scopeAgent, handler: (*call).agentCheckUpdate, doc: "set a TTL check's status and output"},
	{method: get, pattern: "/v1/agent/health/service/name/:name", scope: scopeAgent, handler: (*call).agentHealthByName, doc: "health of a service's instances on this agent; `format=text`"},
	{method: get, pattern: "/v1/agent/health/service/id/:id", scope: scopeAgent, handler: (*call).agentHealthByID, doc: "health of a service instance on this agent; `format=text`"},
	{method: put, pattern: "/v1/agent/token/:kind", scope: scopeAgent, handler: (*call).aclDisabled, doc: "set a token of the agent; 401 as long as ACLs are off"},
	{method: post, pattern: "/v1/agent/connect/authorize", scope: scopeAgent, handler: (*call).agentAuthorize, doc: "may a client certificate connect to a service?"},
	{method: get, pattern: "/v1/agent/connect/ca/roots", scope: scopeAgent, handler: (*call).agentRoots, doc: "trusted roots as this agent knows them; blocks"},
	{method: get, pattern: "/v1/agent/connect/ca/leaf/:service", scope: scopeAgent, handler: (*call).agentLeaf, doc: "certificate and key for a service; blocks"},
	{method: get, pattern: "/v1/agent/proxies", scope: scopeAgent, handler: (*call).agentProxies, doc: "status of this agent's proxies and gateways by ID (not in Consul)"},
	{method: get, pattern: "/v1/agent/proxy/:id", scope: scopeAgent, handler: (*call).agentProxy, doc: "status of one proxy or gateway (not in Consul)"},
	{method: get, pattern: "/v1/agent/proxy/:id/connections", scope: scopeAgent, handler: (*call).agentProxyConnections, doc: "open connections of a proxy or gateway, the oldest first; `limit`, 1000 (not in Consul)"},
	{method: put, pattern: "/v1/agent/proxy/:id/drain", scope: scopeAgent, handler: (*call).agentProxyDrain, doc: "begin to drain a proxy or gateway; the body may have `Wait`, `Timeout` and `Rate` (not in Consul)"},
	{method: get, pattern: "/v1/agent/proxy/:id/drain", scope: scopeAgent, handler: (*call).agentProxyDrainProgress, doc: "how far the drain is (not in Consul)"},
	{method: del, pattern: "/v1/agent/proxy/:id/drain", scope: scopeAgent, handler: (*call).agentProxyDrainCancel, doc: "take the drain back (not in Consul)"},
	{method: get, pattern: "/v1/agent/proxy/:id/table", scope: scopeAgent, handler: (*call).agentProxyTable, doc: "forwarding table in use for a proxy or gateway (not in Consul)"},

	{method: get, pattern: "/v1/catalog/datacenters", scope: scopeServer, handler: (*call).catalogDatacenters, doc: "known datacenters, nearest first"},
	{method: get, pattern: "/v1/catalog/nodes", scope: scopeRead, handler: (*call).catalogNodes, doc: "nodes; `near`, `node-meta`, `filter`", consistency: true},
	{method: get, pattern: "/v1/catalog/services", scope: scopeRead, handler: (*call).catalogServices, doc: "service names and their tags; `node-meta`, `filter`", consistency: true},
	{method: get, pattern: "/v1/catalog/service/:name", scope: scopeRead, handler: (*call).catalogService, doc: "instances of a service; `tag`, `near`, `node-meta`, `filter`", consistency: true},
	{method: get, pattern: "/v1/catalog/connect/:name", scope: scopeRead, handler: (*call).catalogConnect, doc: "instances that accept mutual TLS for a service; as above", consistency: true},
	{method: get, pattern: "/v1/catalog/node/:node", scope: scopeRead, handler: (*call).catalogNode, doc: "a node and its services by ID; `filter`", consistency: true},
	{method: get, pattern: "/v1/catalog/node-services/:node", scope: scopeRead, handler: (*call).catalogNodeServices, doc: "a node and its services as a list; `filter`", consistency: true},
	{method: get, pattern: "/v1/catalog/gateway-services/:gateway", scope: scopeRead, handler: (*call).catalogGatewayServices, doc: "services linked to a gateway; none for mesh gateways", consistency: true},
	{method: put, pattern: "/v1/catalog/register", scope: scopeWrite, handler: (*call).catalogRegister, doc: "write a node, service or checks to the catalog"},
	{method: put, pattern: "/v1/catalog/deregister", scope: scopeWrite, handler: (*call).catalogDeregister, doc: "remove a node, service or check from the catalog"},

	{method: get, pattern: "/v1/health/service/:name", scope: scopeRead, handler: (*call).healthService, doc: "instances of a service with checks; `passing`, `tag`, `near`, `node-meta`, `filter`", consistency: true},
	{method: get, pattern: "/v1/health/connect/:name", scope: scopeRead, handler: (*call).healthConnect, doc: "instances that accept mutual TLS for a service, with checks; as above", consistency: true},
	{method: get, pattern: "/v1/health/node/:node", scope: scopeRead, handler: (*call).healthNode, doc: "checks on a node; `filter`", consistency: true},
	{method: get, pattern: "/v1/health/checks/:name", scope: scopeRead, handler: (*call).healthChecks, doc: "checks of a service's instances; `near`, `node-meta`, `filter`", consistency: true},
	{method: get, pattern: "/v1/health/state/:state", scope: scopeRead, handler: (*call).healthState, doc: "checks in a state, or `any`; `near`, `node-meta`, `filter`", consistency: true},

	{method: put, pattern: "/v1/config", scope: scopePrimary, handler: (*call).configApply, doc: "write a config entry; `cas`", check: (*call).checkExported},
	{method: get, pattern: "/v1/config/:kind", scope: scopeRead, handler: (*call).configGet, doc: "config entries of a kind; `filter` for service-defaults"},
	{method: get, pattern: "/v1/config/:kind/:name", scope: scopeRead, handler: (*call).configGet, doc: "one config entry"},
	{method: del, pattern: "/v1/config/:kind", scope: scopePrimary, handler: (*call).configDelete, doc: "refused: a name is needed"},
	{method: del, pattern: "/v1/config/:kind/:name", scope: scopePrimary, handler: (*call).configDelete, doc: "remove a config entry; `cas`", check: (*call).checkExported},

	{method: get, pattern: "/v1/connect/ca/roots", scope: scopeRead, handler: (*call).connectRoots, doc: "trusted roots; `pem`"},
	{method: get, pattern: "/v1/connect/ca/configuration", scope: scopeRead, handler: (*call).connectCAConfig, doc: "configuration of the CA"},
	{method: put, pattern: "/v1/connect/ca/configuration", scope: scopePrimary, handler: (*call).connectSetCAConfig, doc: "change the configuration of the CA"},
	{method: get, pattern: "/v1/connect/intentions", scope: scopeRead, handler: (*call).intentionList, doc: "all intentions; `filter`"},
	{method: post, pattern: "/v1/connect/intentions", scope: scopePrimary, handler: (*call).intentionCreate, doc: "make an intention with an ID (deprecated)"},
	{method: get, pattern: "/v1/connect/intentions/:id", scope: scopeRead, handler: (*call).intentionGetByID, doc: "one intention by ID (deprecated)"},
	{method: put, pattern: "/v1/connect/intentions/:id", scope: scopePrimary, handler: (*call).intentionUpdate, doc: "write an intention by ID (deprecated)"},
	{method: del, pattern: "/v1/connect/intentions/:id", scope: scopePrimary, handler: (*call).intentionDeleteByID, doc: "remove an intention by ID (deprecated)"},
	{method: get, pattern: "/v1/connect/intentions/exact", scope: scopeRead, handler: (*call).intentionGet, doc: "one intention; `source`, `destination`"},
	{method: put, pattern: "/v1/connect/intentions/exact", scope: scopePrimary, handler: (*call).intentionPut, doc: "write an intention; `source`, `destination`"},
	{method: del, pattern: "/v1/connect/intentions/exact", scope: scopePrimary, handler: (*call).intentionDelete, doc: "remove an intention; `source`, `destination`"},
	{method: get, pattern: "/v1/connect/intentions/match", scope: scopeRead, handler: (*call).intentionMatch, doc: "intentions that apply to names, by precedence; `by`, `name`"},
	{method: get, pattern: "/v1/connect/intentions/check", scope: scopeRead, handler: (*call).intentionCheck, doc: "may a service connect to another? `source`, `destination`"},

	{method: get, pattern: "/v1/discovery-chain/:service", scope: scopeRead, handler: (*call).discoveryChain, doc: "compiled discovery chain; `compile-dc`", consistency: true},
	{method: post, pattern: "/v1/discovery-chain/:service", scope: scopeRead, handler: (*call).discoveryChain, doc: "the same with overrides", consistency: true},

	{method: get, pattern: "/v1/internal/federation-states", scope: scopeRead, handler: (*call).federationStates, doc: "what the datacenters tell of themselves"},
	{method: get, pattern: "/v1/internal/federation-states/mesh-gateways", scope: scopeRead, handler: (*call).federationGateways, doc: "mesh gateways of all datacenters, from the federation states"},
	{method: get, pattern: "/v1/internal/federation-state/:datacenter", scope: scopeRead, handler: (*call).federationState, doc: "what one datacenter tells of itself"},
	{method: put, pattern: "/v1/internal/federation-state", scope: scopePrimary, handler: (*call).federationStateApply, doc: "write a federation state (agents only)", internal: true},
	{method: get, pattern: "/v1/internal/config-entries", scope: scopeRead, handler: (*call).internalConfigEntries, doc: "config entries of all kinds, for replication (agents only)", internal: true},
	{method: get, pattern: "/v1/internal/catalog/connect", scope: scopeRead, handler: (*call).internalConnect, doc: "instances that accept mutual TLS, by service (agents only)", internal: true},
	{method: get, pattern: "/v1/internal/catalog/mesh-gateways", scope: scopeRead, handler: (*call).internalGateways, doc: "mesh gateways by datacenter, this one's from the catalog (agents only)", internal: true},
	{method: post, pattern: "/v1/internal/connect/sign", scope: scopeWrite, handler: (*call).internalSign, doc: "sign a leaf certificate (agents only)", internal: true},
	{method: post, pattern: "/v1/internal/connect/sign-intermediate", scope: scopePrimary, handler: (*call).internalSignIntermediate, doc: "sign another datacenter's CA (agents only)", internal: true},
	{method: get, pattern: "/v1/internal/ui/services", scope: scopeRead, handler: (*call).uiServices, doc: "summary of all services; `filter`"},

	{method: get, pattern: "/v1/status/leader", scope: scopeServer, handler: (*call).statusLeader, doc: "RPC address of the leader, `\"\"` when there is none"},
	{method: get, pattern: "/v1/status/peers", scope: scopeServer, handler: (*call).statusPeers, doc: "RPC addresses of the voters"},
	{method: get, pattern: "/v1/operator/raft/configuration", scope: scopeServer, handler: (*call).operatorRaft, doc: "the raft voters"},
	{method: del, pattern: "/v1/operator/raft/peer", scope: scopeWrite, handler: (*call).operatorRemovePeer, doc: "remove a server from raft; `id` or `address`", check: (*call).checkPeer},
	{method: post, pattern: "/v1/operator/raft/transfer-leader", scope: scopeWrite, handler: (*call).operatorTransfer, doc: "have another server lead; `id`"},

	{method: get, pattern: "/v1/acl/:rest", scope: scopeAgent, handler: (*call).aclDisabled, doc: "401 as long as ACLs are off"},
	{method: put, pattern: "/v1/acl/:rest", scope: scopeAgent, handler: (*call).aclDisabled, doc: "401 as long as ACLs are off"},
	{method: post, pattern: "/v1/acl/:rest", scope: scopeAgent, handler: (*call).aclDisabled, doc: "401 as long as ACLs are off"},
	{method: del, pattern: "/v1/acl/:rest", scope: scopeAgent, handler: (*call).aclDisabled, doc: "401 as long as ACLs are off"},
}

// allowed returns the Allow header of the routes of one path.
func allowed(routes []*route) string {
	methods := []string{http.MethodOptions}
	for _, r := range routes {
		methods = append(methods, r.method)
	}
	return strings.Join(methods, ",")
}

// routeNode is a node of the tree of patterns, one level for each segment.
type routeNode struct {
	literal map[string]*routeNode
	// param is the child for any one segment, by the name it is bound to.
	param     *routeNode
	paramName string
	// rest are the routes whose pattern ends here in a variable, and their path.
	rest     []*route
	restName string
	// routes are those whose pattern ends here.
	routes []*route
}

func newRouteTree(table []route) *routeNode {
	root := &routeNode{}
	for i := range table {
		r := &table[i]
		n := root
		segments := strings.Split(strings.TrimPrefix(r.pattern, "/"), "/")
		for i, seg := range segments {
			name, isVar := strings.CutPrefix(seg, ":")
			switch {
			case isVar && i == len(segments)-1:
				n.rest, n.restName = append(n.rest, r), name
				n = nil
			case isVar:
				if n.param == nil {
					n.param = &routeNode{}
				}
				n.paramName = name
				n = n.param
			default:
				if n.literal == nil {
					n.literal = map[string]*routeNode{}
				}
				if n.literal[seg] == nil {
					n.literal[seg] = &routeNode{}
				}
				n = n.literal[seg]
			}
		}
		if n != nil {
			n.routes = append(n.routes, r)
		}
	}
	return root
}

// find returns the routes for a path and the variables of their pattern; nil
// where there is none. A literal segment goes before a variable one.
func (n *routeNode) find(path string) ([]*route, map[string]string) {
	path, ok := strings.CutPrefix(path, "/")
	if !ok {
		return nil, nil
	}
	return n.match(path, nil)
}

func (n *routeNode) match(path string, params []string) ([]*route, map[string]string) {
	seg, rest, more := strings.Cut(path, "/")
	if child := n.literal[seg]; child != nil {
		if !more {
			if len(child.routes) > 0 {
				return child.routes, bind(params)
			}
		} else if r, p := child.match(rest, params); r != nil {
			return r, p
		}
	}
	if n.param != nil && more {
		if r, p := n.param.match(rest, append(slices.Clip(params), n.paramName, seg)); r != nil {
			return r, p
		}
	}
	if n.rest != nil {
		return n.rest, bind(append(slices.Clip(params), n.restName, path))
	}
	return nil, nil
}

func bind(pairs []string) map[string]string {
	m := make(map[string]string, len(pairs)/2)
	for i := 0; i+1 < len(pairs); i += 2 {
		m[pairs[i]] = pairs[i+1]
	}
	return m
}
