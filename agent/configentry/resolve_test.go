package configentry_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/hashicorp/consul/api"

	"github.com/sluicemesh/sluice/agent/catalog"
	"github.com/sluicemesh/sluice/agent/configentry"
)

// rungs are the places where a mode can be set for the upstream api of web, the
// winner first.
var rungs = []struct {
	name string
	from string
	set  func(*scene, api.MeshGatewayMode)
}{
	{"upstream", "upstream", func(s *scene, m api.MeshGatewayMode) { s.upstream = m }},
	{"override", "service-defaults/web override for api", func(s *scene, m api.MeshGatewayMode) { s.override = m }},
	{"instance", "service instance", func(s *scene, m api.MeshGatewayMode) { s.instance = m }},
	{"upstream defaults", "service-defaults/web upstream defaults", func(s *scene, m api.MeshGatewayMode) { s.defaults = m }},
	{"service-defaults", "service-defaults/web", func(s *scene, m api.MeshGatewayMode) { s.service = m }},
	{"proxy-defaults", "proxy-defaults/global", func(s *scene, m api.MeshGatewayMode) { s.proxy = m }},
	{"legacy", "proxy-defaults/global", func(s *scene, m api.MeshGatewayMode) { s.legacy = m }},
}

type scene struct {
	upstream, override, instance, defaults, service, proxy, legacy api.MeshGatewayMode
}

func (s scene) get() configentry.Get {
	pd := &api.ProxyConfigEntry{Kind: configentry.ProxyDefaults, Name: configentry.Global, MeshGateway: api.MeshGatewayConfig{Mode: s.proxy}}
	if s.legacy != "" {
		pd.Config = map[string]any{"mesh_gateway": map[string]any{"mode": string(s.legacy)}}
	}
	return configentry.GetFrom([]configentry.Entry{pd, &api.ServiceConfigEntry{
		Kind: configentry.ServiceDefaults, Name: "web", MeshGateway: api.MeshGatewayConfig{Mode: s.service},
		UpstreamConfig: &api.UpstreamConfiguration{
			// Present with an empty mode, it must not stop inheritance.
			Defaults: &api.UpstreamConfig{MeshGateway: api.MeshGatewayConfig{Mode: s.defaults}},
			Overrides: []*api.UpstreamConfig{
				{Name: "other", MeshGateway: api.MeshGatewayConfig{Mode: "wrong"}},
				{Name: "api", Peer: "east", MeshGateway: api.MeshGatewayConfig{Mode: "wrong"}},
				{Name: "api", MeshGateway: api.MeshGatewayConfig{Mode: s.override}},
			},
		},
	}})
}

func (s scene) registration() *catalog.Service {
	return &catalog.Service{
		Kind: catalog.KindConnectProxy, ID: "web-sidecar-proxy", Service: "web-sidecar-proxy", Port: 21000,
		Proxy: &api.AgentServiceConnectProxyConfig{
			DestinationServiceName: "web",
			MeshGateway:            api.MeshGatewayConfig{Mode: s.instance},
			Upstreams:              []api.Upstream{{DestinationName: "api", LocalBindPort: 9191, MeshGateway: api.MeshGatewayConfig{Mode: s.upstream}}},
		},
	}
}

func resolved(t *testing.T, s scene) (configentry.UpstreamMode, *catalog.Service) {
	t.Helper()
	reg := s.registration()
	r, err := configentry.ResolveService(s.get(), reg)
	if err != nil {
		t.Fatal(err)
	}
	modes := configentry.UpstreamModes(reg, r)
	merged := configentry.MergeService(reg, r)
	if len(modes) != len(merged.Proxy.Upstreams) {
		t.Fatalf("%d modes for %d upstreams", len(modes), len(merged.Proxy.Upstreams))
	}
	if m := merged.Proxy.Upstreams[0].MeshGateway.Mode; m != modes[0].Mode {
		t.Fatalf("merged mode %q is not the decided one, %q", m, modes[0].Mode)
	}
	return modes[0], merged
}

// TestModeLadder sets every combination of rungs, each rung of a combination to
// a mode of its own: the highest wins, by name.
func TestModeLadder(t *testing.T) {
	for bits := range 1 << len(rungs) {
		var s scene
		want := configentry.UpstreamMode{}
		for i, r := range rungs {
			if bits>>i&1 == 0 {
				continue
			}
			mode := api.MeshGatewayMode(fmt.Sprintf("mode of %s", r.name)) // modes are not validated here
			r.set(&s, mode)
			if want.From == "" {
				want = configentry.UpstreamMode{Mode: mode, From: r.from}
			}
		}
		if got, _ := resolved(t, s); got != want {
			t.Errorf("%+v: got %+v, want %+v", s, got, want)
		}
	}
}

// "none" is a mode like any other: it stops inheritance.
func TestModeNoneStopsInheritance(t *testing.T) {
	for i, r := range rungs {
		var s scene
		r.set(&s, api.MeshGatewayModeNone)
		for _, lower := range rungs[i+1:] {
			lower.set(&s, api.MeshGatewayModeLocal)
		}
		if got, _ := resolved(t, s); got != (configentry.UpstreamMode{Mode: api.MeshGatewayModeNone, From: r.from}) {
			t.Errorf("none at %s: got %+v", r.name, got)
		}
	}
}

// The proxy's own mode, which the API shows, knows the registration,
// service-defaults and proxy-defaults only.
func TestProxyMode(t *testing.T) {
	for name, tc := range map[string]struct {
		s    scene
		want api.MeshGatewayMode
	}{
		"registration":     {scene{upstream: "u", override: "o", instance: "i", defaults: "d", service: "s", proxy: "p", legacy: "l"}, "i"},
		"service-defaults": {scene{upstream: "u", override: "o", defaults: "d", service: "s", proxy: "p", legacy: "l"}, "s"},
		"proxy-defaults":   {scene{upstream: "u", override: "o", defaults: "d", proxy: "p", legacy: "l"}, "p"},
		"legacy":           {scene{defaults: "d", legacy: "l"}, "l"},
		"nothing":          {scene{upstream: "u", override: "o", defaults: "d"}, ""},
	} {
		if _, merged := resolved(t, tc.s); merged.Proxy.MeshGateway.Mode != tc.want {
			t.Errorf("%s: got %q, want %q", name, merged.Proxy.MeshGateway.Mode, tc.want)
		}
	}
}

func TestPreparedQueryHasNoMode(t *testing.T) {
	s := scene{instance: "local", proxy: "local", override: "local"}
	reg := s.registration()
	reg.Proxy.Upstreams[0].DestinationType = api.UpstreamDestTypePreparedQuery
	r, err := configentry.ResolveService(s.get(), reg)
	if err != nil {
		t.Fatal(err)
	}
	if got := configentry.UpstreamModes(reg, r)[0]; got != (configentry.UpstreamMode{}) {
		t.Errorf("got %+v", got)
	}
	if u := configentry.MergeService(reg, r).Proxy.Upstreams[0]; u.MeshGateway.Mode != "" || u.Config != nil {
		t.Errorf("a prepared query was merged into: %+v", u)
	}
}

func TestMergeService(t *testing.T) {
	get := configentry.GetFrom(entriesOf(t, []byte(`[
	  {"Kind": "proxy-defaults", "Config": {"protocol": "http", "max_inbound_connections": 1, "only_global": [1]},
	   "Expose": {"Paths": [{"Path": "/global", "ListenerPort": 1, "LocalPathPort": 2}]}, "AccessLogs": {"Enabled": true},
	   "EnvoyExtensions": [{"Name": "a"}], "MeshGateway": {"Mode": "remote"}},
	  {"Kind": "service-defaults", "Name": "web", "Protocol": "grpc", "MaxInboundConnections": 7, "LocalConnectTimeoutMs": 250,
	   "TransparentProxy": {"OutboundListenerPort": 15001}, "Expose": {"Checks": true}, "EnvoyExtensions": [{"Name": "b"}],
	   "UpstreamConfig": {"Defaults": {"ConnectTimeoutMs": 100, "Limits": {"MaxConnections": 5}},
	     "Overrides": [{"Name": "api", "ConnectTimeoutMs": 200, "PassiveHealthCheck": {"Interval": "5s", "MaxFailures": 3}},
	                   {"Name": "implied", "Protocol": "http2", "MeshGateway": {"Mode": "none"}}]}},
	  {"Kind": "service-defaults", "Name": "api", "Protocol": "http2"},
	  {"Kind": "service-defaults", "Name": "mgw", "MaxInboundConnections": 9}
	]`)))
	proxy := &catalog.Service{
		Kind: catalog.KindConnectProxy, ID: "p", Service: "web-sidecar-proxy",
		Proxy: &api.AgentServiceConnectProxyConfig{
			DestinationServiceName: "web",
			Config:                 map[string]any{"local_connect_timeout_ms": 1},
			Upstreams: []api.Upstream{
				{DestinationName: "api", LocalBindPort: 1, Config: map[string]any{"protocol": "tcp", "mesh_gateway": map[string]any{"mode": "local"}}},
				{DestinationName: "db", LocalBindPort: 2},
				{DestinationName: "far", DestinationPeer: "east", LocalBindPort: 3},
			},
		},
	}
	want := &api.AgentServiceConnectProxyConfig{
		DestinationServiceName: "web",
		Config: map[string]any{
			"protocol": "grpc", "max_inbound_connections": 7.0, "only_global": []any{1.0}, "local_connect_timeout_ms": 1.0,
		},
		MeshGateway:      api.MeshGatewayConfig{Mode: "remote"},
		TransparentProxy: &api.TransparentProxyConfig{OutboundListenerPort: 15001},
		Expose:           api.ExposeConfig{Checks: true, Paths: []api.ExposePath{{Path: "/global", ListenerPort: 1, LocalPathPort: 2, Protocol: "http"}}},
		AccessLogs:       &api.AccessLogsConfig{Enabled: true},
		EnvoyExtensions:  []api.EnvoyExtension{{Name: "a"}, {Name: "b"}},
		Upstreams: []api.Upstream{
			{DestinationName: "api", LocalBindPort: 1, MeshGateway: api.MeshGatewayConfig{Mode: "remote"}, Config: map[string]any{
				"protocol": "tcp", "connect_timeout_ms": 200.0, "limits": map[string]any{"max_connections": 5.0},
				"passive_health_check": map[string]any{"interval": "5s", "max_failures": 3.0},
			}},
			{DestinationName: "db", LocalBindPort: 2, MeshGateway: api.MeshGatewayConfig{Mode: "remote"}, Config: map[string]any{
				"protocol": "http", "connect_timeout_ms": 100.0, "limits": map[string]any{"max_connections": 5.0},
			}},
			{DestinationName: "far", DestinationPeer: "east", LocalBindPort: 3, MeshGateway: api.MeshGatewayConfig{Mode: "remote"}, Config: map[string]any{
				"connect_timeout_ms": 100.0, "limits": map[string]any{"max_connections": 5.0},
			}},
		},
	}
	before, _ := json.Marshal(proxy)
	r, err := configentry.ResolveService(get, proxy)
	if err != nil {
		t.Fatal(err)
	}
	got := configentry.MergeService(proxy, r)
	if diff := cmp.Diff(want, got.Proxy); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}

	t.Run("nothing is shared", func(t *testing.T) {
		got.Proxy.Config["protocol"] = "changed"
		got.Proxy.Upstreams[0].Config["limits"].(map[string]any)["max_connections"] = 99.0
		got.Proxy.Expose.Paths[0].Path = "/changed"
		if after, _ := json.Marshal(proxy); string(after) != string(before) {
			t.Errorf("merging changed the registration:\n%s\n%s", before, after)
		}
		if diff := cmp.Diff(want, configentry.MergeService(proxy, r).Proxy); diff != "" {
			t.Errorf("a merge is not repeatable, -want +got:\n%s", diff)
		}
	})

	t.Run("transparent", func(t *testing.T) {
		tp := catalog.CloneService(proxy)
		tp.Proxy.Mode = api.ProxyModeTransparent
		ups := configentry.MergeService(tp, r).Proxy.Upstreams
		var names []string
		for _, u := range ups {
			names = append(names, fmt.Sprintf("%s %s %v", u.DestinationName, u.MeshGateway.Mode, u.CentrallyConfigured))
		}
		want := []string{"api remote false", "db remote false", "far remote false", "implied none true", "* remote true"}
		if diff := cmp.Diff(want, names); diff != "" {
			t.Errorf("-want +got:\n%s", diff)
		}
	})

	t.Run("gateway", func(t *testing.T) {
		gw := &catalog.Service{Kind: catalog.KindMeshGateway, Service: "mgw", Port: 8443}
		r, err := configentry.ResolveService(get, gw)
		if err != nil {
			t.Fatal(err)
		}
		p := configentry.MergeService(gw, r).Proxy
		want := map[string]any{"protocol": "http", "max_inbound_connections": 9.0, "only_global": []any{1.0}}
		if diff := cmp.Diff(want, p.Config); diff != "" {
			t.Errorf("-want +got:\n%s", diff)
		}
		if p.MeshGateway.Mode != "remote" {
			t.Errorf("mode %q", p.MeshGateway.Mode)
		}
	})

	t.Run("typical", func(t *testing.T) {
		s := &catalog.Service{Service: "web", ID: "web"}
		r, err := configentry.ResolveService(get, s)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(s, configentry.MergeService(s, r)); diff != "" {
			t.Errorf("an ordinary service was merged into, -want +got:\n%s", diff)
		}
	})

	t.Run("error", func(t *testing.T) {
		boom := errors.New("boom")
		if _, err := configentry.ResolveService(func(string, string) (configentry.Entry, error) { return nil, boom }, proxy); !errors.Is(err, boom) {
			t.Errorf("got %v", err)
		}
	})
}

func TestIntentions(t *testing.T) {
	entries := entriesOf(t, []byte(`[
	  {"Kind": "service-intentions", "Name": "db", "Sources": [{"Name": "*", "Action": "deny"}, {"Name": "web", "Action": "allow"},
	     {"Name": "l7", "Permissions": [{"Action": "allow", "HTTP": {"PathPrefix": "/"}}]}, {"Name": "peered", "Peer": "east", "Action": "allow"}]},
	  {"Kind": "service-intentions", "Name": "*", "Sources": [{"Name": "*", "Action": "deny"}, {"Name": "admin", "Action": "allow"}]}
	]`))
	get := configentry.GetFrom(entries)
	for _, tc := range []struct {
		source, destination string
		allow               bool
		why                 string // source, destination and precedence of the deciding intention
	}{
		{"web", "db", true, "web db 9"},
		{"other", "db", false, "* db 8"},
		{"admin", "db", false, "* db 8"}, // an exact destination beats an exact source
		{"l7", "db", false, "l7 db 9"},
		{"peered", "db", false, "* db 8"}, // a peer's service is not ours of that name
		{"admin", "cache", true, "admin * 6"},
		{"web", "cache", false, "* * 5"},
	} {
		in, err := configentry.IntentionsFor(get, catalog.Name(tc.destination))
		if err != nil {
			t.Fatal(err)
		}
		if !slices.IsSortedFunc(in, func(a, b *configentry.Intention) int { return b.Precedence - a.Precedence }) {
			t.Errorf("%s: not sorted", tc.destination)
		}
		allow, why := configentry.Decide(in, catalog.Name(tc.source), true)
		got := fmt.Sprintf("%s %s %d", why.SourceName, why.DestinationName, why.Precedence)
		if allow != tc.allow || got != tc.why {
			t.Errorf("%s -> %s: got %v by %s, want %v by %s", tc.source, tc.destination, allow, got, tc.allow, tc.why)
		}
	}

	for _, def := range []bool{true, false} {
		if allow, why := configentry.Decide(nil, catalog.Name("web"), def); allow != def || why != nil {
			t.Errorf("without intentions: got %v by %v", allow, why)
		}
	}
	elsewhere := catalog.ServiceName{Name: "web", Namespace: "other"}
	in, _ := configentry.IntentionsFor(get, catalog.Name("db"))
	if allow, why := configentry.Decide(in, elsewhere, false); allow || why != nil {
		t.Errorf("a source in another namespace matched %v", why)
	}

	var got []string
	for _, in := range configentry.MatchSource(entries, catalog.Name("web")) {
		got = append(got, fmt.Sprintf("%s %s %d", in.SourceName, in.DestinationName, in.Precedence))
	}
	if diff := cmp.Diff([]string{"web db 9", "* db 8", "* * 5"}, got); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
}

func TestReferencedServices(t *testing.T) {
	got := map[string][]string{}
	for _, e := range entriesOf(t, []byte(`[
	  {"Kind": "service-resolver", "Name": "a", "Redirect": {"Service": "b"}},
	  {"Kind": "service-resolver", "Name": "c", "Failover": {"*": {"Targets": [{"Service": "z"}, {"Service": "y", "Peer": "p"}, {"Datacenter": "dc2"}]}}},
	  {"Kind": "service-router", "Name": "d", "Routes": [{"Destination": {"Service": "e"}}, {}, {"Destination": {"Service": "d"}}]},
	  {"Kind": "service-splitter", "Name": "f", "Splits": [{"Weight": 50, "Service": "h"}, {"Weight": 50, "Service": "g"}]}
	]`)) {
		got[e.GetName()] = configentry.ReferencedServices(e)
	}
	want := map[string][]string{"a": {"b"}, "c": {"z"}, "d": {"e"}, "f": {"g", "h"}}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
}
