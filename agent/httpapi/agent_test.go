package httpapi

import (
	"encoding/json"
	"errors"
	"net/http"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/hashicorp/consul/api"

	"github.com/sluicemesh/sluice/agent/catalog"
	"github.com/sluicemesh/sluice/agent/connect"
)

func TestAgentSelfAndMembers(t *testing.T) {
	s := newServer(t, newFakeServer(), func(c *Config) {
		c.DebugConfig = func() map[string]any { return map[string]any{"GRPCPort": 8502} }
		c.GRPCPort = 8502
	})
	self, err := s.api.Agent().Self()
	if err != nil {
		t.Fatal(err)
	}
	if self["Config"]["Datacenter"] != "dc1" || self["Config"]["Server"] != true || self["Config"]["Version"] != "1.21.4" ||
		self["DebugConfig"]["GRPCPort"] != 8502.0 || self["Member"]["Name"] != "n1" || self["Meta"]["consul-version"] != "1.21.4" ||
		self["xDS"]["Port"] != 8502.0 {
		t.Errorf("self = %v", self)
	}
	if name, err := s.api.Agent().NodeName(); err != nil || name != "n1" {
		t.Errorf("NodeName = %q, %v", name, err)
	}
	members, err := s.api.Agent().Members(false)
	if err != nil || len(members) != 2 || members[0].Addr != "10.0.0.1" || members[0].Status != 1 || members[1].Status != 4 {
		t.Errorf("Members = %+v, %v", members, err)
	}
	if members, err := s.api.Agent().MembersOpts(api.MembersOpts{Filter: `Tags.role == "consul"`}); err != nil || len(members) != 1 {
		t.Errorf("filtered Members = %+v, %v", members, err)
	}
	s.do(t, "GET", "/v1/agent/members?wan=1", "").want(t, 200, "[]")
	if v, err := s.api.Agent().Version(); err != nil || v["HumanVersion"] != "1.21.4" {
		t.Errorf("Version = %v, %v", v, err)
	}
	if h, err := s.api.Agent().Host(); err != nil || h["Host"] == nil {
		t.Errorf("Host = %v, %v", h, err)
	}
}

func TestAgentProcess(t *testing.T) {
	cluster := newFakeServer()
	s := newServer(t, cluster, func(c *Config) { c.WANFederationViaGateways = true })
	if err := s.api.Agent().Join("10.0.0.9:8301", false); err != nil {
		t.Error(err)
	}
	s.do(t, "PUT", "/v1/agent/join/10.0.0.9?wan=1", "").want(t, 500, "WAN join is disabled when wan federation via mesh gateways is enabled")
	if diff := cmp.Diff([]string{"[10.0.0.9:8301] false"}, cluster.joined); diff != "" {
		t.Errorf("joined (-want +got):\n%s", diff)
	}
	if err := s.api.Agent().ForceLeavePrune("n2"); err != nil {
		t.Error(err)
	}
	if diff := cmp.Diff([]string{"n2true false"}, cluster.left); diff != "" {
		t.Errorf("left (-want +got):\n%s", diff)
	}
	s.agent.reloads = errors.New("config: a is bad")
	s.do(t, "PUT", "/v1/agent/reload", "").want(t, 500, "config: a is bad")
	if err := s.api.Agent().Leave(); err != nil || !s.agent.left {
		t.Errorf("Leave = %v", err)
	}
	if err := s.api.Agent().EnableNodeMaintenance("why"); err != nil || s.agent.nodeMnt != "truewhy" {
		t.Errorf("EnableNodeMaintenance = %v, %q", err, s.agent.nodeMnt)
	}
	s.do(t, "PUT", "/v1/agent/maintenance", "").want(t, 400, "Missing value for enable")
	s.do(t, "PUT", "/v1/agent/maintenance?enable=x", "").want(t, 400, `Invalid value for enable: "x"`)
}

func TestMetrics(t *testing.T) {
	s := newServer(t, newFakeServer(), nil)
	if m, err := s.api.Agent().Metrics(); err != nil || m.Gauges == nil {
		t.Errorf("Metrics without a sink = %+v, %v", m, err)
	}
	a := s.do(t, "GET", "/v1/agent/metrics?format=prometheus", "")
	a.want(t, 200, "")
	if got := a.header.Get("X-Consul-Reason"); got != "Prometheus is not enabled since its retention time is not positive" {
		t.Errorf("reason = %q", got)
	}
	s = newServer(t, newFakeServer(), func(c *Config) {
		c.Metrics = func(http.ResponseWriter, *http.Request) (any, error) {
			return map[string]string{"Timestamp": "now"}, nil
		}
		c.Prometheus = http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write([]byte("up 1\n")) })
	})
	s.do(t, "GET", "/v1/agent/metrics", "").want(t, 200, `{"Timestamp":"now"}`)
	s.do(t, "GET", "/v1/agent/metrics?format=prometheus", "").want(t, 200, "up 1\n")
	s.do(t, "GET", "/v1/agent/metrics", "", "Accept", "application/openmetrics-text; version=1.0.0, */*").want(t, 200, "up 1\n")
}

func TestServiceRegister(t *testing.T) {
	s := newServer(t, newFakeServer(), nil)
	err := s.api.Agent().ServiceRegisterOpts(&api.AgentServiceRegistration{
		Name: "web", Port: 80, Tags: []string{"a"},
		Check:   &api.AgentServiceCheck{HTTP: "http://127.0.0.1/", Interval: "10s"},
		Connect: &api.AgentServiceConnect{SidecarService: &api.AgentServiceRegistration{}},
	}, api.ServiceRegisterOpts{ReplaceExistingChecks: true, Token: "secret"})
	if err != nil {
		t.Fatal(err)
	}
	def := s.agent.defs["web"]
	if def == nil || def.Token.Reveal() != "secret" || def.Connect.SidecarService == nil || !s.agent.replaced {
		t.Fatalf("registered %+v, replace %t", def, s.agent.replaced)
	}
	services, err := s.api.Agent().ServicesWithFilter(`"a" in Tags and Port == 80`)
	if err != nil || services["web"] == nil || services["web"].Datacenter != "dc1" {
		t.Errorf("Services = %+v, %v", services, err)
	}
	checks, err := s.api.Agent().Checks()
	if err != nil || checks["service:web"] == nil || checks["service:web"].Status != "critical" || checks["service:web"].Type != "http" {
		t.Errorf("Checks = %+v, %v", checks, err)
	}

	for body, want := range map[string]string{
		``:             "Request decode failed: EOF",
		`{"Name":"x"`:  "Request decode failed: unexpected EOF",
		`{"Bogus": 1}`: `Request decode failed: json: unknown field "Bogus"`,
		`{"Name":"x","Connect":{"SidecarService":{"Proxy":{"Upstreams":[{"Bogus":1}]}}}}`: `Request decode failed: json: unknown field "Bogus"`,
		`{"Name":"x","name":"y"}`:                `Request decode failed: json: field "Name" is given twice`,
		`{"Name":"x","Check":{"OSService":"y"}}`: `Request decode failed: "OSService" is not supported`,
		`{"Name":"x"} {}`:                        `Request decode failed: invalid data after the top-level value`,
		`{}`:                                     "Missing service name",
		`{"Name":"x","Address":"0.0.0.0"}`:       "Invalid service address",
		`{"Name":"x","Checks":[{"TTL":"10s","Status":"x"}]}`:              "Status for checks must 'passing', 'warning', 'critical'",
		`{"Name":"x","Check":{"HTTP":"http://x"}}`:                        "Invalid check: Interval must be > 0 for Script, HTTP, H2PING, TCP, UDP or OSService checks",
		`{"Name":"x","Connect":{"SidecarService":{"Check":{"TTL":"x"}}}}`: "Invalid check in sidecar_service: invalid ttl: time: invalid duration \"x\"",
	} {
		s.do(t, "PUT", "/v1/agent/service/register", body).want(t, 400, want)
	}
	a := s.do(t, "PUT", "/v1/agent/service/register", `{"Name":"x","Weights":{"Passing":0,"Warning":-1}}`)
	if a.code != 400 || !strings.HasPrefix(a.body, "Invalid Weights: ") {
		t.Errorf("weights: %d %q", a.code, a.body)
	}
	s.do(t, "PUT", "/v1/agent/service/register", `{"Name":"x!"}`).want(t, 500, "service name has invalid characters")

	if err := s.api.Agent().EnableServiceMaintenance("web", "why"); err != nil {
		t.Error(err)
	}
	s.do(t, "GET", "/v1/agent/health/service/id/web?format=text", "").want(t, 503, "maintenance")
	s.do(t, "PUT", "/v1/agent/service/maintenance/?enable=true", "").want(t, 400, "Missing service ID")
	s.do(t, "PUT", "/v1/agent/service/maintenance/no?enable=true", "").want(t, 404, `Unknown service ID "no". Ensure that the service ID is passed, not the service name.`)
	if err := s.api.Agent().ServiceDeregister("web"); err != nil {
		t.Error(err)
	}
	s.do(t, "PUT", "/v1/agent/service/deregister/web", "").want(t, 404, `Unknown service ID "web". Ensure that the service ID is passed, not the service name.`)
}

func TestRegistrationSpellings(t *testing.T) {
	const camel = `{"ID":"w1","Name":"web","Port":80,"EnableTagOverride":true,"TaggedAddresses":{"wan_x":{"Address":"192.0.2.1","Port":1}},
		"Meta":{"snake_key":"v","CamelKey":"v"},"Check":{"CheckID":"c","ScriptArgs":["a"],"Interval":"10s","DeregisterCriticalServiceAfter":"1m0s"},
		"Connect":{"SidecarService":{"Port":21000,"Proxy":{"LocalServiceAddress":"127.0.0.1","Config":{"some_key":1,"someKey":2},
		"Upstreams":[{"DestinationName":"db","LocalBindPort":9191,"MeshGateway":{"Mode":"local"},"Config":{"connect_timeout_ms":1}}],
		"Expose":{"Paths":[{"ListenerPort":1,"LocalPathPort":2,"Path":"/"}]}}}}}`
	const snake = `{"id":"w1","name":"web","PORT":80,"enable_tag_override":true,"tagged_addresses":{"wan_x":{"address":"192.0.2.1","port":1}},
		"meta":{"snake_key":"v","CamelKey":"v"},"check":{"check_id":"c","args":["a"],"interval":10000000000,"deregister_critical_service_after":60000000000},
		"connect":{"sidecar_service":{"port":21000,"token":"sc","proxy":{"local_service_address":"127.0.0.1","config":{"some_key":1,"someKey":2},
		"upstreams":[{"destination_name":"db","local_bind_port":9191,"mesh_gateway":{"mode":"local"},"config":{"connect_timeout_ms":1}}],
		"expose":{"paths":[{"listener_port":1,"local_path_port":2,"path":"/"}]}}}},"token":"ignored"}`
	a, err := decodeRegistration([]byte(camel))
	if err != nil {
		t.Fatal(err)
	}
	b, err := decodeRegistration([]byte(snake))
	if err != nil {
		t.Fatal(err)
	}
	if b.SidecarToken.Reveal() != "sc" || b.Token != "" {
		t.Errorf("tokens %q, %q", b.Token.Reveal(), b.SidecarToken.Reveal())
	}
	b.SidecarToken = ""
	if diff := cmp.Diff(a, b); diff != "" {
		t.Errorf("the spellings differ (-camel +snake):\n%s", diff)
	}
	up := a.Connect.SidecarService.Proxy.Upstreams[0]
	if up.DestinationName != "db" || up.MeshGateway.Mode != "local" || up.Config["connect_timeout_ms"] != 1.0 {
		t.Errorf("upstream = %+v", up)
	}
	if a.Connect.SidecarService.Proxy.Config["someKey"] != 2.0 || a.Check.Args[0] != "a" || a.Meta["snake_key"] != "v" {
		t.Errorf("definition = %+v", a)
	}
}

func FuzzDecodeRegistration(f *testing.F) {
	f.Add([]byte(`{"ID":"a","name":"web","Check":{"TTL":"1s","interval":5},"connect":{"sidecar_service":{"proxy":{"upstreams":[{"destination_name":"db"}]}}}}`))
	f.Add([]byte(`{"name":null,"tags":[1],"meta":{"":{}},"connect":[]}`))
	f.Add([]byte(`{"Name":"x","Weights":{"Passing":1e400}}`))
	f.Add([]byte(`[[[[`))
	f.Fuzz(func(t *testing.T, body []byte) {
		def, err := decodeRegistration(body)
		if err != nil {
			if code, _, _ := answerTo(err); code != 400 {
				t.Errorf("%q: answered %d", body, code)
			}
			return
		}
		// What was accepted can be validated, and its own JSON says the same.
		_ = catalog.ValidateRegistration(def)
		again, err := json.Marshal(def.AgentServiceRegistration)
		if err != nil {
			t.Fatal(err)
		}
		next, err := decodeRegistration(again)
		if err != nil {
			t.Fatalf("%q accepted, %q refused: %v", body, again, err)
		}
		a, _ := json.Marshal(next.AgentServiceRegistration)
		if string(a) != string(again) {
			t.Errorf("%s became %s", again, a)
		}
	})
}

func TestChecksAndHealth(t *testing.T) {
	s := newServer(t, newFakeServer(), nil)
	put := func(path, body string) answer { return s.do(t, "PUT", "/v1/agent/"+path, body) }
	put("service/register", `{"Name":"web","Checks":[{"CheckID":"ttl","TTL":"10s"},{"CheckID":"http","HTTP":"http://x","Interval":"1s","Status":"passing"}]}`).want(t, 200, "")
	put("service/register", `{"Name":"web","ID":"web2"}`).want(t, 200, "")
	if err := s.api.Agent().CheckRegister(&api.AgentCheckRegistration{Name: "disk", Notes: "n", AgentServiceCheck: api.AgentServiceCheck{TTL: "1m", Status: "passing"}}); err != nil {
		t.Fatal(err)
	}
	if k := s.agent.checks["disk"]; k == nil || k.Status != "passing" || k.Notes != "n" {
		t.Errorf("check = %+v", k)
	}
	put("check/register", `{}`).want(t, 400, "Missing check name")
	put("check/register", `{"Name":"x","Status":"y"}`).want(t, 400, "Bad check status")
	put("check/register", `{"Name":"x"}`).want(t, 400, "Invalid check: TTL must be > 0 for TTL checks")
	put("check/register", `{"Name":"x","TTL":"1s","ServiceID":"no"}`).want(t, 404, `ServiceID "no" does not exist`)

	for _, c := range []struct {
		path, body string
		code       int
		text       string
	}{
		{"check/pass/none", "", 404, `Unknown check ID "none". Ensure that the check ID is passed, not the check name.`},
		{"check/pass/http", "", 500, `CheckID "http" does not have associated TTL`},
		{"check/update/ttl", `{"Status":"bad"}`, 400, "Invalid check status: 'bad'"},
		{"check/warn/ttl?note=hm", "", 200, ""},
	} {
		put(c.path, c.body).want(t, c.code, c.text)
	}
	if k := s.agent.checks["ttl"]; k.Status != "warning" || k.Output != "hm" {
		t.Errorf("after warn: %+v", k)
	}
	status, infos, err := s.api.Agent().AgentHealthServiceByName("web")
	if err != nil || status != "warning" || len(infos) != 2 || infos[0].AggregatedStatus != "warning" || infos[1].AggregatedStatus != "passing" || len(infos[0].Checks) != 3 {
		t.Errorf("health by name = %q %+v, %v", status, infos, err)
	}
	get := func(path string, headers ...string) answer {
		return s.do(t, "GET", "/v1/agent/health/service/"+path, "", headers...)
	}
	get("id/web?format=text").want(t, 429, "warning")
	get("id/web2", "Accept", "text/plain").want(t, 200, "passing")
	get("id/none").want(t, 404, `{"AggregatedStatus":null,"Checks":null,"Service":null}`)
	a := get("name/none")
	a.want(t, 404, "[]")
	if got := a.header.Get("X-Consul-Reason"); got != "ServiceName none Not Found" {
		t.Errorf("reason = %q", got)
	}
	if err := s.api.Agent().UpdateTTL("ttl", "out", "critical"); err != nil {
		t.Error(err)
	}
	a = get("name/web?format=text")
	a.want(t, 503, "critical")
	if got := a.header.Get("X-Consul-Reason"); got != "critical" {
		t.Errorf("reason = %q", got)
	}
	if err := s.api.Agent().CheckDeregister("disk"); err != nil {
		t.Error(err)
	}
	put("check/deregister/disk", "").want(t, 404, `Unknown check ID "disk". Ensure that the check ID is passed, not the check name.`)
}

func TestAuthorize(t *testing.T) {
	s := newServer(t, newFakeServer(), nil)
	s.agent.roots = &connect.Roots{TrustDomain: "11111111-2222-3333-4444-555555555555.consul"}
	entry := &api.ServiceIntentionsConfigEntry{Kind: api.ServiceIntentions, Name: "db", Sources: []*api.SourceIntention{
		{Name: "web", Action: api.IntentionActionAllow},
		{Name: "l7", Permissions: []*api.IntentionPermission{{Action: api.IntentionActionAllow}}},
		{Name: "*", Action: api.IntentionActionDeny},
	}}
	s.agent.entries = append(s.agent.entries, entry)
	uri := func(service string) string {
		return "spiffe://11111111-2222-3333-4444-555555555555.consul/ns/default/dc/dc1/svc/" + service
	}
	for _, c := range []struct {
		target, uri string
		want        bool
		reason      string
	}{
		{"db", uri("web"), true, "Matched L4 intention: default/web => default/db (allow)"},
		{"db", uri("other"), false, "Matched L4 intention: default/* => default/db (deny)"},
		{"db", uri("l7"), false, "Matched L7 intention: default/l7 => default/db (1 permission)"},
		{"api", uri("other"), true, "Default behavior configured by ACLs"},
		{"db", "spiffe://other.consul/ns/default/dc/dc1/svc/web", false, "Identity from an external trust domain: other.consul"},
	} {
		got, err := s.api.Agent().ConnectAuthorize(&api.AgentAuthorizeParams{Target: c.target, ClientCertURI: c.uri})
		if err != nil {
			t.Errorf("%s to %s: %v", c.uri, c.target, err)
			continue
		}
		reason := strings.ReplaceAll(got.Reason, "default/", "")
		if got.Authorized != c.want || reason != strings.ReplaceAll(c.reason, "default/", "") {
			t.Errorf("%s to %s: %+v, want %t %q", c.uri, c.target, got, c.want, c.reason)
		}
	}
	post := func(body string) answer { return s.do(t, "POST", "/v1/agent/connect/authorize", body) }
	post(`{}`).want(t, 400, "Target service must be specified")
	post(`{"Target":"db","ClientCertURI":"x"}`).want(t, 400, "ClientCertURI not a valid Connect identifier")
	post(`{"Target":"db","ClientCertURI":"spiffe://11111111-2222-3333-4444-555555555555.consul/agent/client/dc/dc1/id/n1"}`).want(t, 400, "ClientCertURI not a valid Service identifier")
}

func TestProxies(t *testing.T) {
	s := newServer(t, newFakeServer(), nil)
	s.do(t, "GET", "/v1/agent/proxies", "").want(t, 200, `{"gw":{"State":"running"},"new":{"State":"waiting"}}`)
	s.do(t, "GET", "/v1/agent/proxy/gw", "").want(t, 200, `{"State":"running"}`)
	s.do(t, "GET", "/v1/agent/proxy/none", "").want(t, 404, "unknown proxy service ID: none")
	s.do(t, "GET", "/v1/agent/proxy/gw/table", "").want(t, 200, `{"Proxy":"gw"}`)
	s.do(t, "GET", "/v1/agent/proxy/new/table", "").want(t, 404, `proxy "new" has no forwarding table yet`)
	s.do(t, "GET", "/v1/agent/proxy/none/table", "").want(t, 404, "unknown proxy service ID: none")
	s.do(t, "GET", "/v1/agent/proxy/gw/connections", "").want(t, 200, `[1000]`)
	s.do(t, "GET", "/v1/agent/proxy/gw/connections?limit=7", "").want(t, 200, `[7]`)
	s.do(t, "GET", "/v1/agent/proxy/gw/connections?limit=0", "").want(t, 400, `Invalid value for limit: "0" is not from 1 to 100000`)
	s.do(t, "GET", "/v1/agent/proxy/none/connections", "").want(t, 404, "unknown proxy service ID: none")

	s.do(t, "GET", "/v1/agent/proxy/gw/drain", "").want(t, 404, "the proxy is not being drained")
	s.do(t, "PUT", "/v1/agent/proxy/gw/drain", `{"Wait":"x"}`).want(t, 400, `Invalid value for Wait: "x" is no duration from 0 on`)
	s.do(t, "PUT", "/v1/agent/proxy/gw/drain", `{"Timeout":"-1s"}`).want(t, 400, `Invalid value for Timeout: "-1s" is no duration from 0 on`)
	s.do(t, "PUT", "/v1/agent/proxy/gw/drain", `{"Rate":-1}`).want(t, 400, `Invalid value for Rate: -1 is less than 0`)
	s.do(t, "PUT", "/v1/agent/proxy/gw/drain", `{"Hurry":true}`).want(t, 400, `Request decode failed: json: unknown field "Hurry"`)
	s.do(t, "PUT", "/v1/agent/proxy/new/drain", "").want(t, 400, "the proxy cannot be drained: it has not begun")
	s.do(t, "PUT", "/v1/agent/proxy/none/drain", "").want(t, 404, "unknown proxy service ID: none")
	s.do(t, "PUT", "/v1/agent/proxy/gw/drain?token=t", `{"wait":"1s","Timeout":"2m","Rate":2.5}`).want(t, 200, `{"Wait":"1s","Timeout":"2m0s","Rate":2.5,"Token":"t"}`)
	s.do(t, "PUT", "/v1/agent/proxy/gw/drain", "").want(t, 409, "the proxy is being drained already")
	s.do(t, "GET", "/v1/agent/proxy/gw/drain", "").want(t, 200, `{"Wait":"1s","Timeout":"2m0s","Rate":2.5,"Token":"t"}`)
	s.do(t, "DELETE", "/v1/agent/proxy/gw/drain", "").want(t, 200, "")
	s.do(t, "DELETE", "/v1/agent/proxy/gw/drain", "").want(t, 404, "the proxy is not being drained")
	s.do(t, "PUT", "/v1/agent/proxy/gw/drain", "").want(t, 200, `{"Wait":"","Timeout":"","Rate":0,"Token":""}`)
}

func TestServiceJSON(t *testing.T) {
	s := newServer(t, newFakeServer(), nil)
	s.do(t, "PUT", "/v1/agent/service/register", `{"Name":"web","Port":80}`).want(t, 200, "")
	s.do(t, "GET", "/v1/agent/services", "").want(t, 200,
		`{"web":{"ID":"web","Service":"web","Tags":[],"Meta":{},"Port":80,"Address":"","Weights":{"Passing":1,"Warning":1},"EnableTagOverride":false,"Datacenter":"dc1"}}`)
	s.do(t, "PUT", "/v1/agent/service/register", `{"Name":"web","Check":{"TTL":"1s"}}`).want(t, 200, "")
	s.do(t, "GET", "/v1/agent/checks", "").want(t, 200,
		`{"service:web":{"Node":"","CheckID":"service:web","Name":"Service 'web' check","Status":"critical","Notes":"","Output":"","ServiceID":"web","ServiceName":"web","ServiceTags":[],"Type":"ttl","Interval":"","Timeout":"","ExposedPort":0,"Definition":{},"CreateIndex":0,"ModifyIndex":0}}`)
}

func TestRoutes(t *testing.T) {
	seen := map[string]bool{}
	for _, r := range routeTable {
		if key := r.method + " " + r.pattern; seen[key] {
			t.Errorf("%s is there twice", key)
		} else {
			seen[key] = true
		}
		if r.doc == "" || r.handler == nil {
			t.Errorf("%s %s has no documentation or no handler", r.method, r.pattern)
		}
		if strings.HasPrefix(r.pattern, "/v1/agent/") != (r.scope == scopeAgent) && !strings.HasPrefix(r.pattern, "/v1/acl/") {
			t.Errorf("%s %s: scope %d", r.method, r.pattern, r.scope)
		}
	}
	tree := newRouteTree(routeTable)
	for _, c := range []struct {
		path, pattern string
		params        []string
	}{
		{"/v1/agent/service/register", "/v1/agent/service/register", nil},
		{"/v1/agent/service/registered", "/v1/agent/service/:id", []string{"id", "registered"}},
		{"/v1/agent/service/a/b", "/v1/agent/service/:id", []string{"id", "a/b"}},
		{"/v1/agent/service/", "/v1/agent/service/:id", []string{"id", ""}},
		{"/v1/agent/service/deregister/a/b", "/v1/agent/service/deregister/:id", []string{"id", "a/b"}},
		{"/v1/agent/proxy/a/table", "/v1/agent/proxy/:id/table", []string{"id", "a"}},
		{"/v1/agent/proxy/a/b/table", "/v1/agent/proxy/:id", []string{"id", "a/b/table"}},
		{"/v1/config/kind", "/v1/config/:kind", []string{"kind", "kind"}},
		{"/v1/config/kind/a/b", "/v1/config/:kind/:name", []string{"kind", "kind", "name", "a/b"}},
		{"/v1/internal/federation-states/mesh-gateways", "/v1/internal/federation-states/mesh-gateways", nil},
		{"/v1/agent/service", "", nil},
		{"/v1", "", nil},
		{"v1/agent/self", "", nil},
	} {
		routes, params := tree.find(c.path)
		pattern := ""
		if len(routes) > 0 {
			pattern = routes[0].pattern
		}
		want := bind(c.params)
		if pattern != c.pattern || pattern != "" && !cmp.Equal(params, want) {
			t.Errorf("find(%s) = %s %v, want %s %v", c.path, pattern, params, c.pattern, want)
		}
	}
	if !slices.ContainsFunc(routeTable, func(r route) bool { return r.internal }) {
		t.Error("no internal route")
	}
}
