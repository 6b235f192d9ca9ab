package configentry_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/consul/api"
	"golang.org/x/tools/txtar"

	"github.com/sluicemesh/sluice/agent/catalog"
	"github.com/sluicemesh/sluice/agent/configentry"
)

const trustDomain = "11111111-2222-3333-4444-555555555555.consul"

// entriesOf reads a JSON array of entries, which must be valid.
func entriesOf(t testing.TB, b []byte) []configentry.Entry {
	t.Helper()
	var raw []json.RawMessage
	if err := json.Unmarshal(b, &raw); err != nil {
		t.Fatal(err)
	}
	var out []configentry.Entry
	for _, r := range raw {
		e, err := accept(r)
		if err != nil {
			t.Fatalf("%s: %v", r, err)
		}
		out = append(out, e)
	}
	return out
}

// TestCompile: entries is a JSON array, requests has one JSON object a line; want
// is the chain of each, or the error.
func TestCompile(t *testing.T) {
	archives(t, "compile", func(t *testing.T, path string, ar *txtar.Archive) {
		get := configentry.GetFrom(entriesOf(t, section(t, ar, "entries")))
		var out strings.Builder
		for line := range strings.Lines(string(section(t, ar, "requests"))) {
			var in struct {
				Service, Datacenter, Gateway, Protocol string
				TimeoutMs                              int
			}
			if err := json.Unmarshal([]byte(line), &in); err != nil {
				t.Fatal(err)
			}
			chain, err := configentry.CompileChain(get, configentry.CompileRequest{
				Service: catalog.Name(in.Service), EvaluateInDatacenter: in.Datacenter, TrustDomain: trustDomain,
				OverrideMeshGateway: api.MeshGatewayMode(in.Gateway), OverrideProtocol: in.Protocol,
				OverrideConnectTimeout: time.Duration(in.TimeoutMs) * time.Millisecond,
			})
			fmt.Fprintf(&out, "# %s\n", strings.TrimSpace(line))
			if err != nil {
				fmt.Fprintf(&out, "error: %v\n", err)
				continue
			}
			consistent(t, chain.CompiledDiscoveryChain)
			b, err := json.MarshalIndent(chain, "", "  ")
			if err != nil {
				t.Fatal(err)
			}
			fmt.Fprintf(&out, "%s\n", b)
			// The public client reads it.
			var client api.CompiledDiscoveryChain
			if err := json.Unmarshal(b, &client); err != nil {
				t.Errorf("the API client cannot read the chain: %v", err)
			} else {
				consistent(t, &client)
			}
		}
		golden(t, path, ar, out.String())
	})
}

// consistent: every name that is used is there, and everything there is used.
func consistent(t testing.TB, c *api.CompiledDiscoveryChain) {
	t.Helper()
	nodes, targets := map[string]bool{c.StartNode: true}, map[string]bool{}
	for key, n := range c.Nodes {
		if key != n.Type+":"+n.Name {
			t.Errorf("node %s is kept as %q", n.Name, key)
		}
		for _, r := range n.Routes {
			nodes[r.NextNode] = true
		}
		var total float32
		for _, s := range n.Splits {
			nodes[s.NextNode] = true
			total += s.Weight
			if next := c.Nodes[s.NextNode]; next != nil && next.Type != api.DiscoveryGraphNodeTypeResolver {
				t.Errorf("%s leads to %s, which should have been multiplied out", key, s.NextNode)
			}
		}
		if n.Type == api.DiscoveryGraphNodeTypeResolver {
			targets[n.Resolver.Target] = true
			if n.Resolver.Failover != nil {
				for _, id := range n.Resolver.Failover.Targets {
					if id == n.Resolver.Target {
						t.Errorf("%s fails over to itself", key)
					}
					targets[id] = true
				}
			}
		}
	}
	for key := range nodes {
		if c.Nodes[key] == nil {
			t.Errorf("node %q is used and does not exist", key)
		}
	}
	for id := range targets {
		if c.Targets[id] == nil {
			t.Errorf("target %q is used and does not exist", id)
		}
	}
	for key := range c.Nodes {
		if !nodes[key] {
			t.Errorf("node %q is not used", key)
		}
	}
	for id := range c.Targets {
		if !targets[id] {
			t.Errorf("target %q is not used", id)
		}
	}
}

func TestCompileReportsReadErrors(t *testing.T) {
	boom := errors.New("boom")
	for _, kind := range []string{configentry.ProxyDefaults, configentry.ServiceDefaults, configentry.ServiceResolver, configentry.ServiceRouter, configentry.ServiceSplitter} {
		_, err := configentry.Compile(func(k, _ string) (configentry.Entry, error) {
			if k == kind {
				return nil, boom
			}
			return nil, nil
		}, configentry.CompileRequest{Service: catalog.Name("web"), EvaluateInDatacenter: "dc1"})
		if !errors.Is(err, boom) {
			t.Errorf("%s: got %v", kind, err)
		}
	}
}

// A splitter that doubles at each of many levels must not fill the memory.
func TestCompileBoundsSplits(t *testing.T) {
	var all []string
	for i := range 20 {
		all = append(all, fmt.Sprintf(`{"Kind":"service-splitter","Name":"s%d","Splits":[{"Weight":50,"Service":"s%d"},{"Weight":50,"Service":"t%d"}]}`, i, i+1, i))
		all = append(all, fmt.Sprintf(`{"Kind":"service-splitter","Name":"t%d","Splits":[{"Weight":50,"Service":"s%d"},{"Weight":50,"Service":"u"}]}`, i, i+1))
	}
	all = append(all, `{"Kind":"proxy-defaults","Config":{"protocol":"http"}}`)
	get := configentry.GetFrom(entriesOf(t, []byte("["+strings.Join(all, ",")+"]")))
	_, err := configentry.Compile(get, configentry.CompileRequest{Service: catalog.Name("s0"), EvaluateInDatacenter: "dc1", TrustDomain: trustDomain})
	if err == nil || !strings.Contains(err.Error(), "splits traffic more than") {
		t.Errorf("got %v", err)
	}
}

// randomEntries makes a graph of up to six services out of bytes.
func randomEntries(b []byte) []configentry.Entry {
	next := func() int {
		if len(b) == 0 {
			return 0
		}
		x := b[0]
		b = b[1:]
		return int(x)
	}
	svc := func() string { return string(rune('a' + next()%6)) }
	maybe := func(s string) string {
		if next()%2 == 0 {
			return ""
		}
		return s
	}
	out := []configentry.Entry{}
	if next()%4 != 0 {
		out = append(out, &api.ProxyConfigEntry{Kind: configentry.ProxyDefaults, Name: configentry.Global, Config: map[string]any{"protocol": "http"}})
	}
	for len(b) > 0 && len(out) < 40 {
		switch next() % 5 {
		case 0:
			out = append(out, &api.ServiceConfigEntry{
				Kind: configentry.ServiceDefaults, Name: svc(), Protocol: []string{"", "tcp", "http"}[next()%3],
				MeshGateway: api.MeshGatewayConfig{Mode: api.MeshGatewayMode(maybe("local"))}, ExternalSNI: maybe("x.example.com"),
			})
		case 1:
			e := &api.ServiceSplitterConfigEntry{Kind: configentry.ServiceSplitter, Name: svc()}
			n := 1 + next()%4
			for range n {
				e.Splits = append(e.Splits, api.ServiceSplit{Weight: float32(100 / n), Service: svc(), ServiceSubset: maybe("v1")})
			}
			out = append(out, e)
		case 2:
			e := &api.ServiceRouterConfigEntry{Kind: configentry.ServiceRouter, Name: svc()}
			for range next() % 4 {
				e.Routes = append(e.Routes, api.ServiceRoute{Destination: &api.ServiceRouteDestination{Service: svc(), ServiceSubset: maybe("v1")}})
			}
			out = append(out, e)
		case 3:
			e := &api.ServiceResolverConfigEntry{Kind: configentry.ServiceResolver, Name: svc(), DefaultSubset: maybe("v1")}
			e.Redirect = &api.ServiceResolverRedirect{Service: svc(), ServiceSubset: maybe("v1"), Datacenter: maybe("dc2"), Peer: maybe(maybe("east"))}
			out = append(out, e)
		case 4:
			e := &api.ServiceResolverConfigEntry{
				Kind: configentry.ServiceResolver, Name: svc(), DefaultSubset: maybe("v1"),
				Subsets: map[string]api.ServiceResolverSubset{"v1": {}}, Failover: map[string]api.ServiceResolverFailover{},
			}
			f := api.ServiceResolverFailover{}
			switch next() % 3 {
			case 0:
				f.Service, f.ServiceSubset = svc(), maybe("v1")
			case 1:
				f.Datacenters = []string{"dc1", "dc2"}
			case 2:
				f.Targets = []api.ServiceResolverFailoverTarget{{Service: svc()}, {Peer: "east"}, {Datacenter: "dc2"}}
			}
			e.Failover[[]string{"*", "v1"}[next()%2]] = f
			out = append(out, e)
		}
	}
	return out
}

// FuzzCompile: whatever the entries, compiling ends, and a chain that compiles
// names nothing that it does not have.
func FuzzCompile(f *testing.F) {
	f.Add([]byte{1, 1, 0, 2, 1, 0, 2, 0, 1, 1, 1, 3, 0, 1})
	f.Add([]byte{1, 3, 0, 1, 1, 1, 0, 0, 3, 1, 1, 0, 1, 1, 0, 4, 2, 1, 0, 1, 1})
	f.Add([]byte("discovery chains are graphs, and graphs have cycles"))
	f.Fuzz(func(t *testing.T, b []byte) {
		get := configentry.GetFrom(randomEntries(b))
		for _, name := range []string{"a", "b", "c"} {
			for _, o := range []string{"", "tcp", "http"} {
				c, err := configentry.CompileChain(get, configentry.CompileRequest{
					Service: catalog.Name(name), EvaluateInDatacenter: "dc1", TrustDomain: trustDomain, OverrideProtocol: o,
				})
				if err != nil {
					continue
				}
				consistent(t, c.CompiledDiscoveryChain)
				if _, err := json.Marshal(c); err != nil {
					t.Fatal(err)
				}
			}
		}
	})
}
