package catalog_test

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/hashicorp/consul/api"

	"github.com/sluicemesh/sluice/agent/catalog"
)

func TestAddresses(t *testing.T) {
	for _, tc := range []struct {
		name     string
		service  catalog.Service
		node     *catalog.Node
		lan, wan string
	}{
		{"service address", catalog.Service{Address: "10.0.0.1", Port: 1}, &catalog.Node{Address: "10.9.9.9"}, "10.0.0.1:1", "10.0.0.1:1"},
		{"node address", catalog.Service{Port: 1}, &catalog.Node{Address: "10.9.9.9"}, "10.9.9.9:1", "10.9.9.9:1"},
		{"node wan", catalog.Service{Port: 1}, &catalog.Node{Address: "10.9.9.9", TaggedAddresses: map[string]string{"wan": "1.1.1.1", "lan": "2.2.2.2"}}, "10.9.9.9:1", "1.1.1.1:1"},
		{"service address beats node wan", catalog.Service{Address: "10.0.0.1", Port: 1}, &catalog.Node{Address: "10.9.9.9", TaggedAddresses: map[string]string{"wan": "1.1.1.1"}}, "10.0.0.1:1", "10.0.0.1:1"},
		{"service wan", catalog.Service{Address: "10.0.0.1", Port: 1, TaggedAddresses: map[string]api.ServiceAddress{"wan": {Address: "3.3.3.3", Port: 443}}}, &catalog.Node{Address: "10.9.9.9"}, "10.0.0.1:1", "3.3.3.3:443"},
		{"service wan without port", catalog.Service{Address: "10.0.0.1", Port: 1, TaggedAddresses: map[string]api.ServiceAddress{"wan": {Address: "gw.example.com"}}}, &catalog.Node{Address: "10.9.9.9"}, "10.0.0.1:1", "gw.example.com:1"},
		{"service wan without address", catalog.Service{Address: "10.0.0.1", Port: 1, TaggedAddresses: map[string]api.ServiceAddress{"wan": {Port: 443}}}, &catalog.Node{Address: "10.9.9.9", TaggedAddresses: map[string]string{"wan": "1.1.1.1"}}, "10.0.0.1:1", "1.1.1.1:443"},
		{"lan tag is not consulted", catalog.Service{Address: "10.0.0.1", Port: 1, TaggedAddresses: map[string]api.ServiceAddress{"lan": {Address: "4.4.4.4", Port: 4}}}, nil, "10.0.0.1:1", "10.0.0.1:1"},
		{"no node", catalog.Service{Port: 1}, nil, ":1", ":1"},
	} {
		inst := &catalog.Instance{Service: &tc.service, Node: tc.node}
		host, port := catalog.LANAddress(inst)
		if got := fmt.Sprintf("%s:%d", host, port); got != tc.lan {
			t.Errorf("%s: LAN %s, want %s", tc.name, got, tc.lan)
		}
		host, port = catalog.WANAddress(inst)
		if got := fmt.Sprintf("%s:%d", host, port); got != tc.wan {
			t.Errorf("%s: WAN %s, want %s", tc.name, got, tc.wan)
		}
	}
}

func TestHealth(t *testing.T) {
	checks := func(statuses ...string) (out api.HealthChecks) {
		for i, s := range statuses {
			out = append(out, &api.HealthCheck{CheckID: fmt.Sprintf("c%d", i), Status: s})
		}
		return out
	}
	w := func(passing, warning int) api.AgentWeights {
		return api.AgentWeights{Passing: passing, Warning: warning}
	}
	for _, tc := range []struct {
		name    string
		weights api.AgentWeights
		checks  api.HealthChecks
		only    bool
		want    string
	}{
		{"no checks, no weights", w(0, 0), nil, true, "true 1 "},
		{"passing", w(10, 2), checks("passing"), true, "true 10 "},
		{"warning", w(10, 2), checks("passing", "warning"), false, "true 2 "},
		{"warning, only passing", w(10, 2), checks("passing", "warning"), true, `false 2 check "c1" is warning`},
		{"warning without a weight", w(10, 0), checks("warning"), false, `false 1 check "c0" is warning, and its weight is then 0`},
		{"critical", w(10, 2), checks("passing", "critical", "critical"), false, `false 10 check "c1" is critical`},
		{"critical and warning", w(10, 2), checks("warning", "critical"), false, `false 2 check "c1" is critical`},
		{"heavy", w(1000, 1), nil, false, "true 128 "},
		{"negative", w(-1, 1), nil, false, "false 1 its weight is 0"},
		{"no check", w(1, 1), api.HealthChecks{nil}, true, "true 1 "},
	} {
		inst := &catalog.Instance{Service: &catalog.Service{Weights: tc.weights}, Checks: tc.checks}
		healthy, weight, why := catalog.Health(inst, tc.only)
		if got := fmt.Sprintf("%v %d %s", healthy, weight, why); got != tc.want {
			t.Errorf("%s: got %q, want %q", tc.name, got, tc.want)
		}
	}
	maint := append(checks("passing"), &api.HealthCheck{CheckID: "_node_maintenance", Status: "critical"})
	for want, c := range map[string]api.HealthChecks{
		"passing": nil, "warning": checks("passing", "warning"), "critical": checks("warning", "critical"), "maintenance": maint,
	} {
		if got := catalog.AggregatedStatus(c); got != want {
			t.Errorf("aggregated: got %q, want %q", got, want)
		}
	}
}

func TestDestinationOf(t *testing.T) {
	for _, tc := range []struct {
		s    *catalog.Service
		want string
	}{
		{nil, ""},
		{&catalog.Service{Service: "web"}, ""},
		{&catalog.Service{Service: "web", Connect: &api.AgentServiceConnect{Native: true}}, "web"},
		{&catalog.Service{Service: "x", Kind: catalog.KindConnectProxy, Proxy: &api.AgentServiceConnectProxyConfig{DestinationServiceName: "web"}}, "web"},
		{&catalog.Service{Service: "x", Kind: catalog.KindConnectProxy, Namespace: "n", Proxy: &api.AgentServiceConnectProxyConfig{DestinationServiceName: "web"}}, "default/n/web"},
		{&catalog.Service{Service: "x", Kind: catalog.KindConnectProxy}, ""},
		{&catalog.Service{Service: "mgw", Kind: catalog.KindMeshGateway}, ""},
	} {
		got, ok := catalog.DestinationOf(tc.s)
		if ok != (tc.want != "") || ok && got.String() != tc.want {
			t.Errorf("%+v: got %v %v, want %q", tc.s, got, ok, tc.want)
		}
	}
}

// registration decodes what a client would send.
func registration(t *testing.T, body string) *catalog.Definition {
	t.Helper()
	d := &catalog.Definition{}
	if err := json.Unmarshal([]byte(body), &d.AgentServiceRegistration); err != nil {
		t.Fatal(err)
	}
	return d
}

// TestValidateRegistration: every text, and that of two faults the one that
// Consul finds first.
func TestValidateRegistration(t *testing.T) {
	proxy := func(rest string) string {
		return `{"Kind":"connect-proxy","Name":"p","Port":1,"Proxy":{"DestinationServiceName":"web",` + rest + `}}`
	}
	many := func(n int) string {
		var pairs []string
		for i := range n {
			pairs = append(pairs, fmt.Sprintf(`"k%d":"v"`, i))
		}
		return strings.Join(pairs, ",")
	}
	for _, tc := range []struct{ body, want string }{
		{`{"Name":"web"}`, ""},
		{`{"Name":"web_1.x y/ü"}`, ""}, // any name
		{`{"Name":"mgw","Kind":"mesh-gateway","Port":8443,"Meta":{"consul-wan-federation":"1"}}`, ""},
		{`{"Name":"x","Kind":"no-such-kind"}`, ""},
		{proxy(`"Upstreams":[{"DestinationName":"a","LocalBindPort":1},{"DestinationName":"b","LocalBindSocketPath":"/s","LocalBindSocketMode":"0600"}]`), ""},

		{`{"Address":"0.0.0.0"}`, "Missing service name"},
		{`{"Name":"web","Address":"0.0.0.0","Weights":{"Passing":0}}`, "Invalid service address"},
		{`{"Name":"web","Address":"[::]"}`, "Invalid service address"},
		{`{"Name":"web","Weights":{"Passing":0},"Meta":{"":"x"}}`, "Invalid Weights: Passing must be greater than 0"},
		{`{"Name":"web","Weights":{"Passing":1,"Warning":-1}}`, "Invalid Weights: Warning must be greater or equal than 0"},
		{`{"Name":"web","Weights":{"Passing":70000}}`, "Invalid Weights: Passing and Warning must be less or equal than 65535"},
		{`{"Name":"web","Kind":"mesh-gateway","Meta":{"consul-k":"v"}}`, "Invalid Service Meta: Couldn't load metadata pair ('consul-k', 'v'): Key prefix 'consul-' is reserved for internal use"},
		{`{"Name":"web","Meta":{"consul-wan-federation":"1"}}`, "Invalid Service Meta: Couldn't load metadata pair ('consul-wan-federation', '1'): Key prefix 'consul-' is reserved for internal use"},
		{`{"Name":"web","Meta":{"a.b":"v"}}`, "Invalid Service Meta: Couldn't load metadata pair ('a.b', 'v'): Key contains invalid characters"},
		{`{"Name":"web","Meta":{` + many(65) + `}}`, "Invalid Service Meta: Node metadata cannot contain more than 64 key/value pairs"},
		{
			`{"Name":"mgw","Kind":"mesh-gateway","Connect":{"SidecarService":{}},"Check":{"TTL":"x"},"Proxy":{"DestinationServiceName":"a","DestinationServiceID":"b","LocalServiceAddress":"c","LocalServicePort":1,"LocalServiceSocketPath":"d","Upstreams":[{}]}}`,
			"Validation failed: 8 errors occurred:\n\t* Port must be non-zero for a mesh-gateway\n" +
				"\t* The Proxy.DestinationServiceName configuration is invalid for a mesh-gateway\n" +
				"\t* The Proxy.DestinationServiceID configuration is invalid for a mesh-gateway\n" +
				"\t* The Proxy.LocalServiceAddress configuration is invalid for a mesh-gateway\n" +
				"\t* The Proxy.LocalServicePort configuration is invalid for a mesh-gateway\n" +
				"\t* The Proxy.LocalServiceSocketPath configuration is invalid for a mesh-gateway\n" +
				"\t* The Proxy.Upstreams configuration is invalid for a mesh-gateway\n" +
				"\t* A mesh-gateway cannot have a sidecar service defined\n\n",
		},
		{`{"Name":"mgw","Kind":"mesh-gateway","Port":1,"Connect":{"SidecarService":{}}}`, "Validation failed: 1 error occurred:\n\t* A mesh-gateway cannot have a sidecar service defined\n\n"},
		{`{"Name":"p","Kind":"connect-proxy","Port":1}`, "Validation failed: 1 error occurred:\n\t* Proxy.DestinationServiceName must be non-empty for Connect proxy services\n\n"},
		{`{"Name":"web","TaggedAddresses":{"wan_ipv4":{"Address":"gw.example.com"},"lan_ipv6":{"Address":"10.0.0.1"}}}`,
			"Validation failed: 2 errors occurred:\n\t* Service tagged address \"lan_ipv6\" must be a valid ipv6 address\n\t* Service tagged address \"wan_ipv4\" must be a valid ipv4 address\n\n"},
		{
			proxy(`"Upstreams":[{"LocalBindPort":1},{"DestinationName":"*","LocalBindPort":2},{"DestinationName":"a","Datacenter":"dc2","DestinationPeer":"east","LocalBindPort":3},{"DestinationName":"b"},{"DestinationName":"e","DestinationType":"x","LocalBindPort":6},{"DestinationName":"c","LocalBindPort":4,"LocalBindSocketPath":"/s"},{"DestinationName":"d","LocalBindPort":5},{"DestinationName":"d","LocalBindPort":5,"LocalBindAddress":"127.0.0.1"}]`),
			"Validation failed: 8 errors occurred:\n\t* upstream destination name cannot be empty\n\t* upstream destination name cannot be a wildcard\n" +
				"\t* upstream cannot specify both destination peer and datacenter\n" +
				"\t* upstream local bind port or local socket path must be defined and nonzero\n" +
				"\t* unknown upstream destination type: \"x\"\n" +
				"\t* only one of upstream local bind port or local socket path can be defined and nonzero\n" +
				"\t* upstreams cannot contain duplicates by local bind port and unix path; \"127.0.0.1:5\" specified twice\n" +
				"\t* upstreams cannot contain duplicates of service:d\n\n",
		},
		{`{"Name":"web","Connect":{"SidecarService":{"ID":"x","Connect":{"SidecarService":{}}}}}`,
			"Validation failed: 2 errors occurred:\n\t* A SidecarService cannot specify an ID as this is managed by the agent\n\t* A SidecarService cannot have a nested SidecarService\n\n"},
		{`{"Name":"web","Check":{"TTL":"1s","Interval":"1s"}}`, "Invalid check: Interval and TTL cannot both be specified"},
		{`{"Name":"web","Checks":[{"TTL":"1s"},{"HTTP":"http://x"}]}`, "Invalid check: Interval must be > 0 for Script, HTTP, H2PING, TCP, UDP or OSService checks"},
		{`{"Name":"web","Check":{"TTL":"1s","Status":"fine"}}`, "Status for checks must 'passing', 'warning', 'critical'"},
		{`{"Name":"web","Connect":{"SidecarService":{"Check":{"AliasService":"x","TTL":"1s"}}}}`, "Invalid check in sidecar_service: TTL must be not be set for Alias checks"},
	} {
		got := ""
		if err := catalog.ValidateRegistration(registration(t, tc.body)); err != nil {
			got = err.Error()
		}
		if got != tc.want {
			t.Errorf("%s:\n got %q\nwant %q", tc.body, got, tc.want)
		}
	}
}

func TestValidateCheck(t *testing.T) {
	for _, tc := range []struct {
		def  catalog.CheckDefinition
		want string
	}{
		{catalog.CheckDefinition{TTL: "10s"}, ""},
		{catalog.CheckDefinition{TCP: "x:1", Interval: "10s"}, ""},
		{catalog.CheckDefinition{AliasService: "web"}, ""},
		{catalog.CheckDefinition{}, "TTL must be > 0 for TTL checks"},
		{catalog.CheckDefinition{AliasService: "web", Interval: "1s"}, "Interval cannot be set for Alias checks"},
		{catalog.CheckDefinition{AliasNode: "n", TTL: "1s"}, "TTL must be not be set for Alias checks"},
		{catalog.CheckDefinition{Args: []string{"x"}}, "Interval must be > 0 for Script, HTTP, H2PING, TCP, UDP or OSService checks"},
		{catalog.CheckDefinition{TTL: "1s", FailuresBeforeWarning: 3, FailuresBeforeCritical: 2}, "FailuresBeforeWarning can't be higher than FailuresBeforeCritical"},
		{catalog.CheckDefinition{TTL: "soon"}, `invalid ttl: time: invalid duration "soon"`},
	} {
		got := ""
		if err := catalog.ValidateCheck(tc.def); err != nil {
			got = err.Error()
		}
		if got != tc.want {
			t.Errorf("%+v: got %q, want %q", tc.def, got, tc.want)
		}
	}
}

func TestValidateDefinitionCollects(t *testing.T) {
	d := registration(t, `{"Kind":"mesh-gateway","Name":"mg","Weights":{"Passing":0},"SocketPath":"/s","Address":"::","Check":{"Name":"c","TTL":"1s","Interval":"1s"}}`)
	err := catalog.ValidateDefinition(d)
	want := "5 errors occurred:\n\t* Invalid service address\n\t* Invalid Weights: Passing must be greater than 0\n" +
		"\t* Port must be non-zero for a mesh-gateway\n\t* socket_path cannot be set together with address or port\n" +
		"\t* check \"c\": Interval and TTL cannot both be specified\n\n"
	if err == nil || err.Error() != want {
		t.Errorf("got %q\nwant %q", err, want)
	}
	if err := catalog.ValidateDefinition(registration(t, `{"Name":"mg","Kind":"mesh-gateway"}`)); err == nil || err.Error() != "1 error occurred:\n\t* Port must be non-zero for a mesh-gateway\n\n" {
		t.Errorf("got %q", err)
	}
	if err := catalog.ValidateDefinition(registration(t, `{"Name":"web","Port":80,"Connect":{"SidecarService":{}}}`)); err != nil {
		t.Errorf("got %q", err)
	}
}

func TestExpandSidecar(t *testing.T) {
	d := registration(t, `{"ID":"web-1","Name":"web","Port":8080,"Address":"10.0.0.5","Tags":["a"],"Meta":{"v":"1"},"Weights":{"Passing":5,"Warning":1},
	  "Connect":{"SidecarService":{"Proxy":{"Config":{"n":1},"Upstreams":[{"DestinationName":"db","LocalBindPort":9000}]}}}}`)
	d.Token = "parent"
	sc, err := catalog.ExpandSidecar(d)
	if err != nil {
		t.Fatal(err)
	}
	want := &catalog.Definition{Token: "parent", AgentServiceRegistration: api.AgentServiceRegistration{
		Kind: "connect-proxy", ID: "web-1-sidecar-proxy", Name: "web-sidecar-proxy", Address: "10.0.0.5",
		Tags: []string{"a"}, Meta: map[string]string{"v": "1"}, Weights: &api.AgentWeights{Passing: 1, Warning: 1},
		Checks: api.AgentServiceChecks{
			{Name: "Connect Sidecar Listening", TCP: "10.0.0.5:0", Interval: "10s"},
			{Name: "Connect Sidecar Aliasing web-1", AliasService: "web-1"},
		},
		Proxy: &api.AgentServiceConnectProxyConfig{
			DestinationServiceName: "web", DestinationServiceID: "web-1", LocalServiceAddress: "127.0.0.1", LocalServicePort: 8080,
			Config:    map[string]any{"n": 1.0},
			Upstreams: []api.Upstream{{DestinationType: "service", DestinationName: "db", LocalBindPort: 9000}},
		},
	}}
	if diff := cmp.Diff(want, sc); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
	if d.Connect.SidecarService.Name != "" || d.Connect.SidecarService.Proxy.DestinationServiceName != "" {
		t.Error("expanding changed the parent")
	}
	sc.Tags[0] = "changed"
	if d.Tags[0] != "a" {
		t.Error("the sidecar shares its tags with the parent")
	}

	catalog.AssignSidecarPort(sc, 21000)
	specs, err := catalog.ChecksOf(sc)
	if err != nil {
		t.Fatal(err)
	}
	if sc.Port != 21000 || specs[0].Def.TCP != "10.0.0.5:21000" {
		t.Errorf("port %d, check %q", sc.Port, specs[0].Def.TCP)
	}
	if specs[0].CheckID != "service:web-1-sidecar-proxy:1" || specs[1].CheckID != "service:web-1-sidecar-proxy:2" || specs[0].Status != "critical" {
		t.Errorf("got %+v", specs)
	}

	if sc, err := catalog.ExpandSidecar(registration(t, `{"Name":"web"}`)); sc != nil || err != nil {
		t.Errorf("without a block: %v %v", sc, err)
	}
	for body, want := range map[string]string{
		`{"Name":"w","Connect":{"SidecarService":{"ID":"x"}}}`:                        "A SidecarService cannot specify an ID as this is managed by the agent",
		`{"Name":"w","Connect":{"SidecarService":{"Connect":{"SidecarService":{}}}}}`: "A SidecarService cannot have a nested SidecarService",
	} {
		if _, err := catalog.ExpandSidecar(registration(t, body)); err == nil || err.Error() != want {
			t.Errorf("%s: got %v", body, err)
		}
	}

	own := registration(t, `{"Name":"w","SocketPath":"/run/w","Connect":{"SidecarService":{"Name":"n","Port":7,"Tags":["x"],"Check":{"TTL":"1s"}}}}`)
	own.Token, own.SidecarToken = "parent", "own"
	sc, err = catalog.ExpandSidecar(own)
	if err != nil {
		t.Fatal(err)
	}
	if sc.Name != "n" || sc.Port != 7 || sc.Tags[0] != "x" || sc.Token != "own" || sc.Proxy.LocalServiceSocketPath != "/run/w" ||
		sc.Proxy.LocalServiceAddress != "" || len(sc.Checks) != 0 || sc.Check.TTL != "1s" {
		t.Errorf("what the block says does not win: %+v", sc)
	}
}

func TestServiceOf(t *testing.T) {
	got := catalog.ServiceOf(registration(t, `{"Name":"web","Port":80,"Address":"10.0.0.1","Proxy":{"Config":{"ignored":1}},
	  "TaggedAddresses":{"wan":{"Address":"1.1.1.1","Port":8}},"Connect":{"SidecarService":{}}}`))
	want := &catalog.Service{
		ID: "web", Service: "web", Port: 80, Address: "10.0.0.1", Tags: []string{}, Meta: map[string]string{},
		Weights: api.AgentWeights{Passing: 1, Warning: 1},
		TaggedAddresses: map[string]api.ServiceAddress{
			"lan_ipv4": {Address: "10.0.0.1", Port: 80}, "wan_ipv4": {Address: "10.0.0.1", Port: 80}, "wan": {Address: "1.1.1.1", Port: 8},
		},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
	if s := catalog.ServiceOf(registration(t, `{"Name":"w","Address":"fd00::1"}`)); s.TaggedAddresses["lan_ipv6"].Address != "fd00::1" || s.TaggedAddresses["wan_ipv6"].Address != "fd00::1" || len(s.TaggedAddresses) != 2 {
		t.Errorf("got %v", s.TaggedAddresses)
	}
	if s := catalog.ServiceOf(registration(t, `{"Name":"w","Address":"host.example.com"}`)); s.TaggedAddresses != nil {
		t.Errorf("got %v", s.TaggedAddresses)
	}
	if s := catalog.ServiceOf(registration(t, `{"Name":"mgw","Kind":"mesh-gateway","Port":1}`)); s.Proxy == nil {
		t.Error("a gateway has no proxy block")
	}
}

func TestChecksOf(t *testing.T) {
	one, err := catalog.ChecksOf(registration(t, `{"ID":"w1","Name":"web","Check":{"TTL":"1s"}}`))
	if err != nil || len(one) != 1 || one[0].CheckID != "service:w1" || one[0].Name != "Service 'web' check" || one[0].ServiceID != "w1" {
		t.Errorf("got %+v, %v", one, err)
	}
	some, err := catalog.ChecksOf(registration(t, `{"Name":"web","Check":{},"Checks":[{"TTL":"1s"},null,{"CheckID":"mine","Name":"n","TTL":"1s","Status":"passing","Notes":"x"}]}`))
	if err != nil || len(some) != 2 || some[0].CheckID != "service:web:1" || some[1].CheckID != "mine" || some[1].Status != "passing" || some[1].Notes != "x" {
		t.Errorf("got %+v, %v", some, err)
	}
	if _, err := catalog.ChecksOf(registration(t, `{"Name":"web","Checks":[{"CheckID":"a","TTL":"1s"},{"CheckID":"a","TTL":"1s"}]}`)); err == nil {
		t.Error("two checks have one ID")
	}
	for want, def := range map[string]catalog.CheckDefinition{
		"grpc": {GRPC: "x", HTTP: "y"}, "http": {HTTP: "x", TTL: "1s"}, "ttl": {TTL: "1s", TCP: "x"}, "tcp": {TCP: "x", UDP: "y"},
		"udp": {UDP: "x"}, "alias": {AliasNode: "x"}, "docker": {DockerContainerID: "x", Args: []string{"y"}}, "script": {Args: []string{"x"}}, "h2ping": {H2PING: "x"}, "": {},
	} {
		if got := catalog.CheckType(def); got != want {
			t.Errorf("%+v: got %q, want %q", def, got, want)
		}
	}
}

// TestCanonicalConfig: the canonical form is what a round trip through JSON
// gives, so that a registration is the same from a file, over HTTP and from disk.
func TestCanonicalConfig(t *testing.T) {
	type text string
	in := map[string]any{
		"int": 1, "uint8": uint8(2), "float32": float32(0.5), "number": json.Number("7"), "bool": true, "null": nil, "text": text("t"),
		"duration": 5 * time.Second, "bytes": []byte("b"), "ints": []int{1, 2}, "strings": []string{"a"},
		"any keys": map[any]any{"k": 1}, "typed": map[string]int{"k": 1}, "deep": []any{map[string]any{"x": []any{1}}},
		"block": []map[string]any{{"x": 1}}, "blocks": []map[string]any{{"x": 1}, {"x": 2}},
		"struct": api.ServiceAddress{Address: "a", Port: 1}, "pointer": &api.ServiceAddress{Port: 2},
	}
	want := map[string]any{
		"int": 1.0, "uint8": 2.0, "float32": 0.5, "number": 7.0, "bool": true, "null": nil, "text": "t",
		"duration": "5s", "bytes": "b", "ints": []any{1.0, 2.0}, "strings": []any{"a"},
		"any keys": map[string]any{"k": 1.0}, "typed": map[string]any{"k": 1.0}, "deep": []any{map[string]any{"x": []any{1.0}}},
		"block": map[string]any{"x": 1.0}, "blocks": []any{map[string]any{"x": 1.0}, map[string]any{"x": 2.0}},
		"struct": map[string]any{"Address": "a", "Port": 1.0}, "pointer": map[string]any{"Address": "", "Port": 2.0},
	}
	got := catalog.CanonicalConfig(in)
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
	b, err := json.Marshal(got)
	if err != nil {
		t.Fatal(err)
	}
	var back map[string]any
	if err := json.Unmarshal(b, &back); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(got, back); diff != "" {
		t.Errorf("JSON changes it, -before +after:\n%s", diff)
	}
	if catalog.CanonicalConfig(nil) != nil {
		t.Error("nil became something")
	}
}

func TestServiceNameText(t *testing.T) {
	for _, n := range []catalog.ServiceName{catalog.Name("web"), {Name: "web", Namespace: "n", Partition: "p"}, {Name: "a.b_c", Namespace: "n", Partition: "default"}} {
		b, _ := n.MarshalText()
		var back catalog.ServiceName
		if err := back.UnmarshalText(b); err != nil || back != n {
			t.Errorf("%q reads back as %+v, %v", b, back, err)
		}
	}
}

func TestNames(t *testing.T) {
	for name, want := range map[string]bool{"web": true, "web_1.x-Y": true, "": false, "we b": false, "wéb": false, "a/b": false} {
		if catalog.SNIName(name) != want {
			t.Errorf("%q: got %v", name, !want)
		}
	}
	for _, m := range []string{"", "none", "local", "remote"} {
		if got, err := catalog.ParseMode(m); err != nil || string(got) != m {
			t.Errorf("%q: %v", m, err)
		}
	}
	if _, err := catalog.ParseMode("bad"); err == nil || err.Error() != `Invalid Mesh Gateway Mode: "bad"` {
		t.Errorf("got %v", err)
	}
}
