package httpapi

import (
	"encoding/json"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"

	"github.com/google/go-cmp/cmp"
	"github.com/hashicorp/consul/api"

	"github.com/sluicemesh/sluice/agent/catalog"
	"github.com/sluicemesh/sluice/agent/connect"
	"github.com/sluicemesh/sluice/agent/state"
)

// seeded returns a server whose catalog has two nodes with web instances, and a
// sidecar of one.
func seeded(t *testing.T) *server {
	t.Helper()
	s := newServer(t, newFakeServer(), nil)
	for _, reg := range []*api.CatalogRegistration{
		{
			Node: "n1", Address: "10.0.0.1", NodeMeta: map[string]string{"zone": "a"},
			Service: &api.AgentService{Service: "web", Port: 80, Tags: []string{"v1", "blue"}},
			Checks: api.HealthChecks{
				{CheckID: "serfHealth", Name: "serf", Status: "passing"},
				{CheckID: "web", Name: "web", Status: "passing", ServiceID: "web"},
			},
		},
		{
			Node: "n2", Address: "10.0.0.2", NodeMeta: map[string]string{"zone": "b"},
			Service: &api.AgentService{Service: "web", Port: 80, Tags: []string{"v2"}, Meta: map[string]string{"k": "v"}},
			Check:   &api.AgentCheck{CheckID: "web", Name: "web", Status: "critical", ServiceID: "web"},
		},
		{
			Node: "n1", Address: "10.0.0.1", NodeMeta: map[string]string{"zone": "a"},
			Service: &api.AgentService{
				Kind: api.ServiceKindConnectProxy, Service: "web-sidecar-proxy", Port: 21000,
				Proxy: &api.AgentServiceConnectProxyConfig{DestinationServiceName: "web", DestinationServiceID: "web"},
			},
		},
	} {
		if _, err := s.api.Catalog().Register(reg, nil); err != nil {
			t.Fatal(err)
		}
	}
	return s
}

func TestCatalog(t *testing.T) {
	s := seeded(t)
	cat := s.api.Catalog()
	names := func(list []*api.CatalogService, meta *api.QueryMeta, err error) string {
		t.Helper()
		if err != nil || meta.LastIndex == 0 {
			t.Fatalf("index %d, %v", meta.LastIndex, err)
		}
		var out []string
		for _, x := range list {
			out = append(out, x.Node+"/"+x.ServiceID)
		}
		return strings.Join(out, " ")
	}
	q := func(edit func(*api.QueryOptions)) *api.QueryOptions { o := &api.QueryOptions{}; edit(o); return o }
	for _, c := range []struct{ what, got, want string }{
		{"all", names(cat.Service("web", "", nil)), "n1/web n2/web"},
		{"tag", names(cat.Service("web", "V2", nil)), "n2/web"},
		{"tags", names(cat.ServiceMultipleTags("web", []string{"v1", "blue"}, nil)), "n1/web"},
		{"filter", names(cat.Service("web", "", q(func(o *api.QueryOptions) { o.Filter = `ServiceMeta.k == "v"` }))), "n2/web"},
		{"node-meta", names(cat.Service("web", "", q(func(o *api.QueryOptions) { o.NodeMeta = map[string]string{"zone": "b"} }))), "n2/web"},
		{"near", names(cat.Service("web", "", q(func(o *api.QueryOptions) { o.Near = "n2" }))), "n2/web n1/web"},
		{"near agent", names(cat.Service("web", "", q(func(o *api.QueryOptions) { o.Near = "_agent" }))), "n1/web n2/web"},
		{"none", names(cat.Service("none", "", nil)), ""},
		{"peer", names(cat.Service("web", "", q(func(o *api.QueryOptions) { o.Peer = "p" }))), ""},
		{"connect", names(cat.Connect("web", "", nil)), "n1/web-sidecar-proxy"},
	} {
		if c.got != c.want {
			t.Errorf("%s: %q, want %q", c.what, c.got, c.want)
		}
	}
	s.do(t, "GET", "/v1/catalog/service/none", "").want(t, 200, "[]")
	services, _, err := cat.Services(nil)
	if diff := cmp.Diff(map[string][]string{"web": {"blue", "v1", "v2"}, "web-sidecar-proxy": {}}, services); err != nil || diff != "" {
		t.Errorf("services: %v (-want +got):\n%s", err, diff)
	}
	services, _, err = cat.Services(&api.QueryOptions{Filter: `ServiceName == "web"`, NodeMeta: map[string]string{"zone": "b"}})
	if diff := cmp.Diff(map[string][]string{"web": {"v2"}}, services); err != nil || diff != "" {
		t.Errorf("filtered services: %v (-want +got):\n%s", err, diff)
	}
	nodes, _, err := cat.Nodes(&api.QueryOptions{Filter: `Meta.zone == "a"`})
	if err != nil || len(nodes) != 1 || nodes[0].Node != "n1" || nodes[0].Datacenter != "dc1" {
		t.Errorf("nodes = %+v, %v", nodes, err)
	}
	node, _, err := cat.Node("n1", nil)
	if err != nil || node.Node.Node != "n1" || len(node.Services) != 2 || node.Services["web"].Port != 80 {
		t.Errorf("node = %+v, %v", node, err)
	}
	s.do(t, "GET", "/v1/catalog/node/none", "").want(t, 200, "null")
	s.do(t, "GET", "/v1/catalog/node-services/none", "").want(t, 200, `{"Node":null,"Services":null}`)
	list, _, err := cat.NodeServiceList("n1", &api.QueryOptions{Filter: `Kind == "connect-proxy"`})
	if err != nil || len(list.Services) != 1 || list.Services[0].Proxy.DestinationServiceName != "web" {
		t.Errorf("node services = %+v, %v", list, err)
	}
	dcs, err := cat.Datacenters()
	if err != nil || !cmp.Equal(dcs, []string{"dc1"}) {
		t.Errorf("datacenters = %v, %v", dcs, err)
	}
	s.do(t, "GET", "/v1/catalog/gateway-services/gw", "").want(t, 200, "[]")
	for _, path := range []string{"service/", "connect/", "node/", "node-services/"} {
		if a := s.do(t, "GET", "/v1/catalog/"+path, ""); a.code != 400 {
			t.Errorf("%s: %d %q", path, a.code, a.body)
		}
	}
}

func TestCatalogWrites(t *testing.T) {
	s := seeded(t)
	put := func(path, body string) answer { return s.do(t, "PUT", "/v1/catalog/"+path, body) }
	for body, want := range map[string]string{
		`{}`:           "Must provide node",
		`{"Node":"x"}`: "Must provide address if SkipNodeUpdate is not set",
		`{"Node":"x","Address":"a","Service":{"ID":"y"}}`:                                    "Must provide service name (Service.Service) when service ID is provided",
		`{"Node":"x","Address":"a","Check":{"Name":"c","ServiceID":"y","Status":"passing"}}`: "Unknown service ID 'y' for check ID 'c'",
	} {
		put("register", body).want(t, 500, want)
	}
	put("register", `{"Bogus":1}`).want(t, 400, `Request decode failed: json: unknown field "Bogus"`)
	put("register", `{"Node":"x","Address":"a","Check":{"Name":"c","Definition":{"HTTP":"http://x","IntervalDuration":"10s","timeout":"1s"}}}`).want(t, 200, "true")
	_, checks, err := s.cluster.Store().NodeChecks(nil, "x")
	if err != nil || len(checks) != 1 || checks[0].Definition.IntervalDuration.Seconds() != 10 || checks[0].Definition.TimeoutDuration.Seconds() != 1 {
		t.Errorf("checks = %+v, %v", checks, err)
	}
	put("register", `{"Node":"x","Address":"a","Service":{"Service":"g","Kind":"mesh-gateway"}}`)
	put("deregister", `{"Node":"n1","ServiceID":"web"}`).want(t, 200, "true")
	put("deregister", `{"Node":"n1","CheckID":"none"}`).want(t, 200, "true")
	put("deregister", `{"Node":"x"}`).want(t, 200, "true")
	put("deregister", `{}`).want(t, 500, "Must provide node")
	nodes, _, err := s.api.Catalog().Nodes(nil)
	if err != nil || len(nodes) != 2 {
		t.Errorf("nodes = %+v, %v", nodes, err)
	}
}

func TestHealth(t *testing.T) {
	s := seeded(t)
	h := s.api.Health()
	count := func(list []*api.ServiceEntry, _ *api.QueryMeta, err error) int {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return len(list)
	}
	for what, n := range map[string][2]int{
		"all":     {count(h.Service("web", "", false, nil)), 2},
		"passing": {count(h.Service("web", "", true, nil)), 1},
		"tag":     {count(h.Service("web", "v2", false, nil)), 1},
		"any":     {count(h.Service("web", "", false, &api.QueryOptions{Filter: `any Checks as k { k.Status == "critical" }`})), 1},
		"nil":     {count(h.Service("web", "", false, &api.QueryOptions{Filter: `Service.Proxy.Mode == "x"`})), 0},
		"node":    {count(h.Service("web", "", false, &api.QueryOptions{Filter: `Node.Node == "n2" and Service.Meta.k == v`})), 1},
		"connect": {count(h.Connect("web", "", true, nil)), 1},
		"none":    {count(h.Connect("none", "", true, nil)), 0},
	} {
		if n[0] != n[1] {
			t.Errorf("%s: %d instances, want %d", what, n[0], n[1])
		}
	}
	s.do(t, "GET", "/v1/health/service/web?passing=x", "").want(t, 400, "Invalid value for ?passing")
	if a := s.do(t, "GET", "/v1/health/service/web?passing=false", ""); len(decode[[]any](t, a)) != 2 {
		t.Errorf("passing=false: %s", a.body)
	}
	checks, _, err := h.Checks("web", &api.QueryOptions{NodeMeta: map[string]string{"zone": "b"}})
	if err != nil || len(checks) != 1 || checks[0].Node != "n2" {
		t.Errorf("checks = %+v, %v", checks, err)
	}
	for state, want := range map[string]int{"any": 3, "passing": 2, "critical": 1, "warning": 0} {
		if list, _, err := h.State(state, nil); err != nil || len(list) != want {
			t.Errorf("state %s: %d checks, %v, want %d", state, len(list), err, want)
		}
	}
	if list, _, err := h.Node("n1", &api.QueryOptions{Filter: `CheckID == "serfHealth"`}); err != nil || len(list) != 1 {
		t.Errorf("node checks = %+v, %v", list, err)
	}
}

func TestHealthJSON(t *testing.T) {
	s := newServer(t, newFakeServer(), nil)
	s.cluster.must(t, registerWeb("n1", 80))
	s.do(t, "GET", "/v1/health/service/web", "").want(t, 200,
		`[{"Node":{"ID":"","Node":"n1","Address":"10.0.0.1","Datacenter":"","TaggedAddresses":{},"Meta":{},"CreateIndex":11,"ModifyIndex":11},`+
			`"Service":{"ID":"web-n1","Service":"web","Tags":[],"Address":"","Meta":{},"Port":80,"Weights":{"Passing":1,"Warning":1},"EnableTagOverride":false,`+
			`"Proxy":{"Mode":"","MeshGateway":{},"Expose":{}},"Connect":{},"PeerName":"","CreateIndex":11,"ModifyIndex":11},"Checks":[]}]`)
	s.do(t, "GET", "/v1/catalog/service/web", "").want(t, 200,
		`[{"ID":"","Node":"n1","Address":"10.0.0.1","Datacenter":"","TaggedAddresses":{},"NodeMeta":{},"ServiceKind":"","ServiceID":"web-n1","ServiceName":"web",`+
			`"ServiceTags":[],"ServiceAddress":"","ServiceWeights":{"Passing":1,"Warning":1},"ServiceMeta":{},"ServicePort":80,"ServiceSocketPath":"",`+
			`"ServiceEnableTagOverride":false,"ServiceProxy":{"Mode":"","MeshGateway":{},"Expose":{}},"ServiceConnect":{},"CreateIndex":11,"ModifyIndex":11}]`)
}

func TestConfigEntries(t *testing.T) {
	s := newServer(t, newFakeServer(), nil)
	entries := s.api.ConfigEntries()
	set := func(e api.ConfigEntry) {
		t.Helper()
		if ok, _, err := entries.Set(e, nil); !ok || err != nil {
			t.Fatalf("Set(%s) = %t, %v", e.GetName(), ok, err)
		}
	}
	set(&api.ServiceConfigEntry{Kind: api.ServiceDefaults, Name: "web", Protocol: "HTTP", MeshGateway: api.MeshGatewayConfig{Mode: "local"}})
	set(&api.ServiceConfigEntry{Kind: api.ServiceDefaults, Name: "api", Protocol: "tcp"})
	got, meta, err := entries.Get(api.ServiceDefaults, "web", nil)
	if err != nil || got.(*api.ServiceConfigEntry).Protocol != "http" || meta.LastIndex != 12 {
		t.Fatalf("Get = %+v, %+v, %v", got, meta, err)
	}
	list, _, err := entries.List(api.ServiceDefaults, nil)
	if err != nil || len(list) != 2 || list[0].GetName() != "api" {
		t.Errorf("List = %+v, %v", list, err)
	}
	list, _, err = entries.List(api.ServiceDefaults, &api.QueryOptions{Filter: `Protocol == "http"`})
	if err != nil || len(list) != 1 {
		t.Errorf("filtered List = %+v, %v", list, err)
	}
	// A write that changes nothing keeps the index, and comes before the CAS.
	set(&api.ServiceConfigEntry{Kind: api.ServiceDefaults, Name: "api", Protocol: "tcp"})
	if ok, _, err := entries.CAS(&api.ServiceConfigEntry{Kind: api.ServiceDefaults, Name: "api", Protocol: "tcp"}, 99, nil); !ok || err != nil {
		t.Errorf("CAS of the same = %t, %v", ok, err)
	}
	if ok, _, err := entries.CAS(&api.ServiceConfigEntry{Kind: api.ServiceDefaults, Name: "api", Protocol: "grpc"}, 99, nil); ok || err != nil {
		t.Errorf("CAS that misses = %t, %v", ok, err)
	}
	if ok, _, err := entries.DeleteCAS(api.ServiceDefaults, "api", 99, nil); ok || err != nil {
		t.Errorf("DeleteCAS that misses = %t, %v", ok, err)
	}
	do := func(method, path, body string) answer { return s.do(t, method, "/v1/config"+path, body) }
	do("PUT", "?cas=x", `{"Kind":"service-defaults","Name":"a"}`).want(t, 500, `strconv.ParseUint: parsing "x": invalid syntax`)
	do("PUT", "", `{"kind":"service-defaults","name":"snake","mesh_gateway":{"mode":"remote"}}`).want(t, 200, "true")
	do("PUT", "", `{"Kind":"service-defaults","Name":"a","bogus":1}`).want(t, 400, "Request decoding failed: 1 error occurred:\n\t* invalid config key \"bogus\"\n\n")
	do("PUT", "", `{"Name":"a"}`).want(t, 400, "Request decoding failed: Payload does not contain a kind/Kind key at the top level")
	if a := do("PUT", "", `{"Kind":"proxy-defaults","Name":"foo"}`); a.code != 500 || !strings.Contains(a.body, `invalid name ("foo"), only "global" is supported`) {
		t.Errorf("proxy-defaults foo: %d %q", a.code, a.body)
	}
	if a := do("PUT", "", `{"Kind":"service-router","Name":"tcp-service","Routes":[]}`); a.code != 500 || !strings.Contains(a.body, "does not permit advanced routing") {
		t.Errorf("router of a tcp service: %d %q", a.code, a.body)
	}
	do("GET", "/nonsense", "").want(t, 500, "invalid config entry kind: nonsense")
	do("GET", "/nonsense/x", "").want(t, 500, "invalid config entry kind: nonsense")
	do("GET", "/service-router", "").want(t, 200, "[]")
	a := do("GET", "/service-resolver/none", "")
	a.want(t, 404, `Config entry not found for "service-resolver" / "none"`)
	if a.header.Get("X-Consul-Index") == "" {
		t.Error("a missing entry without an index")
	}
	do("GET", "/service-router?filter=x", "").want(t, 500, "filtering is only supported for service-defaults config entries")
	do("DELETE", "/service-defaults", "").want(t, 404, "Must provide both a kind and name to delete")
	do("DELETE", "/service-defaults/none", "").want(t, 200, "{}")
	do("DELETE", "/service-defaults/none?cas=5", "").want(t, 200, "true")
	do("DELETE", "/service-defaults/api", "").want(t, 200, "{}")
	do("GET", "/service-defaults/api", "").want(t, 404, `Config entry not found for "service-defaults" / "api"`)
}

func TestIntentions(t *testing.T) {
	s := newServer(t, newFakeServer(), nil)
	c := s.api.Connect()
	upsert := func(source, dest string, action api.IntentionAction) {
		t.Helper()
		if _, err := c.IntentionUpsert(&api.Intention{SourceName: source, DestinationName: dest, Action: action, Description: "d " + source}, nil); err != nil {
			t.Fatal(err)
		}
	}
	upsert("*", "db", "deny")
	upsert("web", "db", "allow")
	upsert("web", "*", "deny")
	upsert("web", "db", "allow") // again
	list, meta, err := c.Intentions(nil)
	if err != nil || len(list) != 3 || meta.LastIndex == 0 {
		t.Fatalf("Intentions = %v, %v", list, err)
	}
	exact, _, err := c.IntentionGetExact("web", "db", nil)
	if err != nil || exact == nil || exact.Precedence != 9 || exact.Action != "allow" || exact.Description != "d web" || exact.SourceNS != "default" {
		t.Errorf("exact = %+v, %v", exact, err)
	}
	match, _, err := c.IntentionMatch(&api.IntentionMatch{By: api.IntentionMatchDestination, Names: []string{"db", "other"}}, nil)
	if err != nil || len(match["db"]) != 3 || match["db"][0].SourceName != "web" || len(match["other"]) != 1 {
		t.Errorf("match = %v, %v", match, err)
	}
	match, _, err = c.IntentionMatch(&api.IntentionMatch{By: api.IntentionMatchSource, Names: []string{"web"}}, nil)
	if err != nil || len(match["web"]) != 3 {
		t.Errorf("match by source = %v, %v", match, err)
	}
	for pair, want := range map[[2]string]bool{{"web", "db"}: true, {"api", "db"}: false, {"web", "api"}: false, {"api", "x"}: true} {
		if got, _, err := c.IntentionCheck(&api.IntentionCheck{Source: pair[0], Destination: pair[1]}, nil); err != nil || got != want {
			t.Errorf("check %v = %t, %v", pair, got, err)
		}
	}
	if filtered, _, err := c.Intentions(&api.QueryOptions{Filter: `Action == "allow"`}); err != nil || len(filtered) != 1 {
		t.Errorf("filtered = %v, %v", filtered, err)
	}
	do := func(method, path, body string) answer { return s.do(t, method, "/v1/connect/intentions"+path, body) }
	do("GET", "/exact?source=a&destination=db", "").want(t, 404, "Intention not found")
	do("GET", "/exact?source=a", "").want(t, 500, "required query parameter 'destination' not set")
	do("GET", "/exact?source=default/web&destination=default/db", "")
	if a := do("PUT", "/exact?source=a&destination=db", `{}`); a.code != 500 || !strings.Contains(a.body, "must be set to 'allow' or 'deny'") {
		t.Errorf("no action: %d %q", a.code, a.body)
	}
	do("PUT", "/exact?source=a&destination=new", `{"Action":"allow","Meta":{"k":"v"}}`).want(t, 200, "true")
	do("PUT", "/exact?source=b&destination=new", `{"Action":"allow","Meta":{"k":"w"}}`).want(t, 500, "Meta must not be specified, or should be unchanged during an update.")
	do("GET", "/match?by=x&name=y", "").want(t, 500, "'by' parameter must be one of 'source' or 'destination'")
	for _, source := range []string{"a", "a"} { // the last source takes the entry with it
		do("DELETE", "/exact?destination=new&source="+source, "").want(t, 200, "true")
	}
	if _, e, _ := s.cluster.Store().ConfigEntry(nil, api.ServiceIntentions, "new"); e != nil {
		t.Errorf("an entry without sources: %+v", e)
	}
}

// TestIntentionWritesDoNotLoseEachOther writes from many clients at once.
func TestIntentionWritesDoNotLoseEachOther(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newServer(t, newFakeServer(), nil)
		const n = 20
		errs := make(chan error, n)
		for i := range n {
			go func() {
				_, err := s.api.Connect().IntentionUpsert(&api.Intention{SourceName: "s" + strconv.Itoa(i), DestinationName: "db", Action: "allow"}, nil)
				errs <- err
			}()
		}
		for range n {
			if err := <-errs; err != nil {
				t.Error(err)
			}
		}
		if list, _, err := s.api.Connect().Intentions(nil); err != nil || len(list) != n {
			t.Errorf("%d intentions, %v, want %d", len(list), err, n)
		}
	})
}

func TestCA(t *testing.T) {
	s := newServer(t, newFakeServer(), nil)
	s.do(t, "GET", "/v1/connect/ca/roots", "").want(t, 500, "CA has not finished initializing")
	s.do(t, "GET", "/v1/connect/ca/configuration", "").want(t, 500, "CA has not finished initializing")
	s.cluster.must(t, state.CARootsCommand(0, &connect.Roots{ActiveRootID: "r", TrustDomain: "td.consul", Roots: []*connect.Root{
		{ID: "r", Active: true, RootCert: "ROOT", IntermediateCerts: []string{"INTER\n"}},
	}}))
	s.cluster.must(t, state.CAConfigCommand(&connect.CAConfig{ClusterID: "id", Provider: "consul", Config: map[string]any{"LeafCertTTL": "72h"}}))
	roots, meta, err := s.api.Connect().CARoots(nil)
	if err != nil || roots.ActiveRootID != "r" || roots.Roots[0].RootCertPEM != "ROOT" || meta.LastIndex != 11 {
		t.Errorf("roots = %+v, %+v, %v", roots, meta, err)
	}
	a := s.do(t, "GET", "/v1/connect/ca/roots?pem=true", "")
	a.want(t, 200, "ROOT\nINTER\n")
	if got := a.header.Get("Content-Type"); got != "application/pem-certificate-chain" {
		t.Errorf("Content-Type = %q", got)
	}
	if a := s.do(t, "GET", "/v1/connect/ca/roots?pem=x", ""); a.code != 400 {
		t.Errorf("pem=x: %d %q", a.code, a.body)
	}
	cfg, _, err := s.api.Connect().CAGetConfig(nil)
	if err != nil || cfg.Provider != "consul" || cfg.Config["LeafCertTTL"] != "72h" {
		t.Errorf("config = %+v, %v", cfg, err)
	}
	if strings.Contains(s.do(t, "GET", "/v1/connect/ca/configuration", "").body, "ClusterID") {
		t.Error("the cluster ID shows")
	}
	cfg.Config["LeafCertTTL"] = "1h"
	if _, err := s.api.Connect().CASetConfig(cfg, nil); err != nil || s.cluster.caConfig.Config["LeafCertTTL"] != "1h" {
		t.Errorf("CASetConfig = %v, got %+v", err, s.cluster.caConfig)
	}
}

func TestDiscoveryChain(t *testing.T) {
	s := newServer(t, newFakeServer(), nil)
	s.cluster.must(t, state.CARootsCommand(0, &connect.Roots{TrustDomain: "td.consul"}))
	chain, meta, err := s.api.DiscoveryChain().Get("web", nil, nil)
	if err != nil || chain.Chain.ServiceName != "web" || chain.Chain.Datacenter != "dc1" || len(chain.Chain.Targets) != 1 || meta.LastIndex == 0 {
		t.Fatalf("chain = %+v, %v", chain, err)
	}
	chain, _, err = s.api.DiscoveryChain().Get("web", &api.DiscoveryChainOptions{
		EvaluateInDatacenter: "dc2", OverrideMeshGateway: api.MeshGatewayConfig{Mode: api.MeshGatewayModeRemote},
	}, nil)
	if err != nil || chain.Chain.Targets["web.default.default.dc2"].MeshGateway.Mode != api.MeshGatewayModeRemote {
		t.Errorf("overridden chain = %+v, %v", chain, err)
	}
	post := func(body string) answer { return s.do(t, "POST", "/v1/discovery-chain/web", body) }
	post(`{"OverrideMeshGateway":{"Mode":"x"}}`).want(t, 400, "Invalid OverrideMeshGateway.Mode parameter")
	if a := post(`{"OverrideConnectTimeout":"8s"}`); a.code != 200 || !strings.Contains(a.body, `"ConnectTimeout":"8s"`) {
		t.Errorf("connect timeout: %d %s", a.code, a.body)
	}
	if a := post(""); a.code != 200 {
		t.Errorf("empty body: %d %q", a.code, a.body)
	}
}

func TestInternal(t *testing.T) {
	s := newServer(t, newFakeServer(), nil)
	s.cluster.must(t, state.RegisterCommand(&api.CatalogRegistration{
		Node: "n1", Address: "10.0.0.1", Service: &api.AgentService{Kind: api.ServiceKindMeshGateway, Service: "mesh-gateway", Port: 8443},
	}))
	s.cluster.must(t, state.RegisterCommand(&api.CatalogRegistration{
		Node: "n1", Address: "10.0.0.1", Service: &api.AgentService{Service: "native", Port: 1, Connect: &api.AgentServiceConnect{Native: true}},
	}))
	s.cluster.must(t, state.ConfigEntryCommand(state.ConfigEntryUpsert, &api.ProxyConfigEntry{Kind: api.ProxyDefaults, Name: "global"}, 0))
	in := s.Transport()
	remote := &state.FederationState{Datacenter: "dc2", PrimaryModifyIndex: 7, MeshGateways: []*catalog.Instance{
		{Node: &api.Node{Node: "r1", Address: "192.0.2.1"}, Service: &api.AgentService{Kind: api.ServiceKindMeshGateway, Service: "mesh-gateway", Port: 443}},
	}}
	body, err := json.Marshal(remote)
	if err != nil {
		t.Fatal(err)
	}
	roundTrip(t, in, "PUT", "/v1/internal/federation-state", string(body)).want(t, 200, "true")
	roundTrip(t, in, "PUT", "/v1/internal/federation-state", `{"Datacenter":"dc3"}`).want(t, 200, "true")

	states := decode[[]*state.FederationState](t, s.do(t, "GET", "/v1/internal/federation-states", ""))
	if len(states) != 2 || states[0].Datacenter != "dc2" || states[0].PrimaryModifyIndex != states[0].ModifyIndex {
		t.Errorf("states = %+v", states)
	}
	one := decode[struct {
		State *state.FederationState
		Index uint64
	}](t, s.do(t, "GET", "/v1/internal/federation-state/dc2", ""))
	if one.State == nil || one.State.MeshGateways[0].Service.Port != 443 || one.Index == 0 {
		t.Errorf("state = %+v", one)
	}
	s.do(t, "GET", "/v1/internal/federation-state/dc9", "").want(t, 404, "")
	gateways := decode[map[string][]*catalog.Instance](t, s.do(t, "GET", "/v1/internal/federation-states/mesh-gateways", ""))
	if len(gateways) != 1 || len(gateways["dc2"]) != 1 {
		t.Errorf("federation gateways = %v", gateways)
	}
	gateways = decode[map[string][]*catalog.Instance](t, roundTrip(t, in, "GET", "/v1/internal/catalog/mesh-gateways", ""))
	if len(gateways) != 2 || gateways["dc1"][0].Service.Port != 8443 {
		t.Errorf("gateways = %v", gateways)
	}
	connects := decode[map[string][]*catalog.Instance](t, roundTrip(t, in, "GET", "/v1/internal/catalog/connect", ""))
	if len(connects["native"]) != 1 {
		t.Errorf("connect = %v", connects)
	}
	a := roundTrip(t, in, "GET", "/v1/internal/config-entries", "")
	if list := decode[[]map[string]any](t, a); len(list) != 1 || list[0]["Kind"] != "proxy-defaults" || a.header.Get("X-Consul-Index") == "" {
		t.Errorf("config entries = %v", list)
	}
	a = roundTrip(t, in, "POST", "/v1/internal/connect/sign", `{"CSR":"csr"}`)
	if l := decode[connect.Leaf](t, a); l.CertPEM != "cert for csr" || strings.Contains(a.body, "never") {
		t.Errorf("leaf = %s", a.body)
	}
	roundTrip(t, in, "POST", "/v1/internal/connect/sign-intermediate", `{"CSR":"csr"}`).want(t, 200, `{"Cert":"intermediate for csr"}`)
	roundTrip(t, in, "POST", "/v1/internal/connect/sign", `{}`).want(t, 400, "Missing CSR")
	roundTrip(t, outside(s.Handler, &s.inProcess), http.MethodPost, "/v1/internal/connect/sign", `{"CSR":"csr"}`).
		want(t, 403, "/v1/internal/connect/sign is served to agents only")
}

func TestUIServices(t *testing.T) {
	s := seeded(t)
	list := decode[[]serviceSummary](t, s.do(t, "GET", "/v1/internal/ui/services?filter=Name+==+web", ""))
	want := []serviceSummary{{
		Name: "web", Datacenter: "dc1", Tags: []string{"blue", "v1", "v2"}, Nodes: []string{"n1", "n2"}, ExternalSources: []string{},
		InstanceCount: 2, ChecksPassing: 2, ChecksCritical: 1, ConnectedWithProxy: true,
	}}
	if diff := cmp.Diff(want, list); diff != "" {
		t.Errorf("summary (-want +got):\n%s", diff)
	}
}

func TestOperator(t *testing.T) {
	s := newServer(t, newFakeServer(), nil)
	cfg, err := s.api.Operator().RaftGetConfiguration(nil)
	if err != nil || len(cfg.Servers) != 1 {
		t.Fatalf("configuration = %+v, %v", cfg, err)
	}
	got := *cfg.Servers[0]
	got.LastIndex = 0
	if diff := cmp.Diff(api.RaftServer{ID: "uuid-1", Node: "n1", Address: "10.0.0.1:8300", Leader: true, ProtocolVersion: "3", Voter: true}, got); diff != "" {
		t.Errorf("server (-want +got):\n%s", diff)
	}
	if leader, err := s.api.Status().Leader(); err != nil || leader != "10.0.0.1:8300" {
		t.Errorf("leader = %q, %v", leader, err)
	}
	s.cluster.setLeader(false, "")
	s.do(t, "GET", "/v1/status/leader", "").want(t, 200, `""`)
	if peers, err := s.api.Status().Peers(); err != nil || len(peers) != 1 {
		t.Errorf("peers = %v, %v", peers, err)
	}
}

// TestCachedReads makes sure that what may come from a cache says that it has not.
func TestCachedReads(t *testing.T) {
	s := seeded(t)
	_, meta, err := s.api.Health().Service("web", "", false, &api.QueryOptions{UseCache: true})
	if err != nil || meta.CacheHit {
		t.Errorf("health: %+v, %v", meta, err)
	}
	for path, want := range map[string]string{
		"/v1/health/service/web?cached": "MISS", "/v1/catalog/service/web?cached": "MISS", "/v1/catalog/services?cached": "MISS",
		"/v1/catalog/services": "",
	} {
		if got := s.do(t, "GET", path, "").header.Get("X-Cache"); got != want {
			t.Errorf("%s: X-Cache %q, want %q", path, got, want)
		}
	}
}

func TestRaftOperations(t *testing.T) {
	cluster := newFakeServer()
	s := newServer(t, cluster, nil)
	op := s.api.Operator()
	const path = "/v1/operator/raft/peer"
	s.do(t, "DELETE", path, "").want(t, 400, "Must specify either ?id with the server's ID or ?address with IP:port of peer to remove")
	s.do(t, "DELETE", path+"?id=a&address=b", "").want(t, 400, "Must specify only one of ?id or ?address")
	s.do(t, "DELETE", path+"?id=a", "").want(t, 500, `id "a" was not found in the Raft configuration`)
	if err := op.RaftRemovePeerByID("old", nil); err != nil {
		t.Error(err)
	}
	if err := op.RaftRemovePeerByAddress("10.0.0.9:8300", nil); err != nil {
		t.Error(err)
	}
	if want := []string{"old", "10.0.0.9:8300"}; !slices.Equal(cluster.left, want) {
		t.Errorf("removed %q, want %q", cluster.left, want)
	}
	got, err := op.RaftLeaderTransfer("uuid-2", nil)
	if err != nil || !got.Success || cluster.Leader() != "uuid-2" {
		t.Errorf("transfer = %+v, %v; leader %q", got, err, cluster.Leader())
	}
}

func TestNearSortsByCoordinates(t *testing.T) {
	cluster := newFakeServer()
	s := newServer(t, cluster, nil)
	for _, n := range []string{"n1", "n2", "n3", "a-stranger"} {
		cluster.must(t, state.RegisterCommand(&api.CatalogRegistration{Node: n, Address: "10.0.0.1"}))
	}
	for near, want := range map[string]string{
		"n1": "n1 n3 n2 a-stranger", "n2": "n2 n3 n1 a-stranger", "_agent": "n1 n3 n2 a-stranger",
		// From an unknown place all others are as far.
		"a-stranger": "a-stranger n1 n2 n3", "": "a-stranger n1 n2 n3",
	} {
		nodes, _, err := s.api.Catalog().Nodes(&api.QueryOptions{Near: near})
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		for _, n := range nodes {
			got = append(got, n.Node)
		}
		if got := strings.Join(got, " "); got != want {
			t.Errorf("near %q: %s, want %s", near, got, want)
		}
	}
	self, err := s.api.Agent().Self()
	if err != nil || len(self["Coord"]) != 4 || self["Coord"]["Vec"] == nil {
		t.Errorf("Coord = %v, %v", self["Coord"], err)
	}
}
