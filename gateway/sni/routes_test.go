package sni

import (
	"fmt"
	"runtime"
	"slices"
	"strings"
	"testing"
	"testing/iotest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/sluicemesh/sluice/gateway"
)

func mustRoutes(t testing.TB, text string) *Routes {
	t.Helper()
	r, err := ParseRoutes(strings.NewReader(text))
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// named makes clusters that are nothing but a name.
func named(routes []gateway.Route) map[string]*cluster {
	out := map[string]*cluster{}
	for _, r := range routes {
		if out[r.Cluster] == nil {
			out[r.Cluster] = &cluster{name: r.Cluster}
		}
	}
	return out
}

func TestIndexLookup(t *testing.T) {
	routes := []gateway.Route{
		{Match: "*.dc2.internal.td", Cluster: "dc2"},
		{Match: "*.internal.td", Cluster: "other"},
		{Match: "*.v2.web.default.dc2.internal.td", Cluster: "deep"},
		{Match: "dc2.internal.td", Cluster: "bare"},
		{Match: "web.default.dc2.internal.td", Cluster: "web"},
	}
	x, dangling := newIndex(nil, routes, named(routes))
	if len(dangling) != 0 {
		t.Fatalf("dangling: %q", dangling)
	}
	for name, want := range map[string]string{
		"web.default.dc2.internal.td":      "web",
		"api.default.dc2.internal.td":      "dc2",
		"v2.web.default.dc2.internal.td":   "dc2",
		"a.v2.web.default.dc2.internal.td": "deep",
		"x.dc2.internal.td":                "dc2",
		"dc2.internal.td":                  "bare",
		"dc3.internal.td":                  "other",
		"xdc2.internal.td":                 "other",
		"internal.td":                      "",
		"td":                               "",
		"":                                 "",
	} {
		got := ""
		if c := x.lookup([]byte(name)); c != nil {
			got = c.name
		}
		if got != want {
			t.Errorf("%q leads to %q, want %q", name, got, want)
		}
	}
	name := []byte("a.v2.web.default.dc2.internal.td")
	if n := testing.AllocsPerRun(100, func() { x.lookup(name) }); n != 0 {
		t.Errorf("a lookup makes %v allocations", n)
	}
	var none *index
	if none.lookup(name) != nil {
		t.Error("no index has a route")
	}
}

func TestIndexUpdate(t *testing.T) {
	var routes []gateway.Route
	for i := range 1000 {
		routes = append(routes, gateway.Route{Match: fmt.Sprintf("s%04d.td", i), Cluster: fmt.Sprintf("c%d", i%10)})
	}
	routes = append(routes, gateway.Route{Match: "*.dc2.td", Cluster: "c0"})
	slices.SortFunc(routes, func(a, b gateway.Route) int { return strings.Compare(a.Match, b.Match) })
	clusters := named(routes)
	x, _ := newIndex(nil, routes, clusters)
	check := func(x *index, routes []gateway.Route, gone ...string) {
		t.Helper()
		for _, r := range routes {
			name := strings.Replace(r.Match, "*", "any", 1)
			if c := x.lookup([]byte(name)); c == nil || c.name != r.Cluster {
				t.Fatalf("%q leads to %v, want %q", name, c, r.Cluster)
			}
		}
		for _, name := range gone {
			if c := x.lookup([]byte(name)); c != nil {
				t.Fatalf("%q leads to %q, want nowhere", name, c.name)
			}
		}
	}
	check(x, routes, "s1000.td")

	same, _ := newIndex(x, slices.Clone(routes), clusters)
	if same.exact != x.exact || same.suffix != x.suffix {
		t.Error("an equal table made another index")
	}

	// One added, one removed, one changed: the base stays.
	next := slices.DeleteFunc(slices.Clone(routes), func(r gateway.Route) bool { return r.Match == "s0500.td" })
	next = append(next, gateway.Route{Match: "s1000.td", Cluster: "c3"})
	next[slices.IndexFunc(next, func(r gateway.Route) bool { return r.Match == "s0001.td" })].Cluster = "c9"
	y, _ := newIndex(x, next, clusters)
	if y.exact.base != x.exact.base || y.suffix != x.suffix {
		t.Error("a change of three routes rebuilt the index")
	}
	check(y, next, "s0500.td")
	check(x, routes, "s1000.td")

	// Back again: what was gone is there, what was added is not.
	z, _ := newIndex(y, routes, clusters)
	check(z, routes, "s1000.td")

	// Half of it gone: rebuilt.
	half := slices.DeleteFunc(slices.Clone(next), func(r gateway.Route) bool { return r.Match > "s0499.td" })
	w, _ := newIndex(y, half, clusters)
	check(w, half, "s0600.td", "s0500.td", "s1000.td")
	if w.exact.base == x.exact.base {
		t.Error("the base of twice the size was kept")
	}

	_, dangling := newIndex(nil, []gateway.Route{{Match: "a.td", Cluster: "nobody"}}, clusters)
	if d := cmp.Diff([]string{"a.td"}, dangling); d != "" {
		t.Error(d)
	}
}

func bigFile(n int) string {
	var b strings.Builder
	for i := range n {
		fmt.Fprintf(&b, "h%06d.bench.test 127.1.0.%d:19443\n", i, i%16+1)
	}
	return b.String()
}

// The bounds are those the product promises: 100,000 routes in 15 MB. The time
// to load them is measured by BenchmarkLoad.
func TestIndexOfManyRoutesIsSmall(t *testing.T) {
	const n = 100_000
	text := bigFile(n)
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	table := StaticTable(nil, mustRoutes(t, text))
	f := New(Config{})
	c := &control{f: f, reg: registry{clusters: map[string]*cluster{}, dns: newResolver(t.Context(), nil, time.Second, f.log)}}
	c.apply(t.Context(), table)
	runtime.GC()
	runtime.ReadMemStats(&after)
	size := int64(after.HeapAlloc) - int64(before.HeapAlloc)
	t.Logf("%d routes: %.1f MB with their table", n, float64(size)/1e6)
	if size > 15e6 {
		t.Errorf("%d routes take %d bytes, more than 15 MB", n, size)
	}
	if c := f.routes.Load().lookup([]byte("h099999.bench.test")); c == nil || c.name != "127.1.0.16:19443" {
		t.Errorf("the last route leads to %v", c)
	}
	runtime.KeepAlive(table)
	runtime.KeepAlive(text)
}

func BenchmarkLoad(b *testing.B) {
	text := bigFile(100_000)
	for b.Loop() {
		table := StaticTable(nil, mustRoutes(b, text))
		f := New(Config{})
		c := &control{f: f, reg: registry{clusters: map[string]*cluster{}, dns: newResolver(b.Context(), nil, time.Second, f.log)}}
		c.apply(b.Context(), table)
	}
}

func BenchmarkChangeOneRoute(b *testing.B) {
	routes := mustRoutes(b, bigFile(100_000)).Routes
	clusters := named(routes)
	x, _ := newIndex(nil, routes, clusters)
	for i := 0; b.Loop(); i++ {
		routes[5].Cluster = routes[5+i%2].Cluster
		x, _ = newIndex(x, routes, clusters)
	}
}

func BenchmarkLookup(b *testing.B) {
	routes := mustRoutes(b, bigFile(100_000)).Routes
	x, _ := newIndex(nil, routes, named(routes))
	name := []byte("h000000.bench.test")
	b.ReportAllocs()
	for i := 0; b.Loop(); i++ {
		name[6] = '0' + byte(i%10)
		if x.lookup(name) == nil {
			b.Fatal("no route")
		}
	}
}

func TestParseRoutes(t *testing.T) {
	got := mustRoutes(t, `
# a comment
web.example      10.0.0.1:443   # another
WEB.example.	10.0.0.2:443
*.dc2.example  gw.dc2.example:8443
api.example [2001:db8::1]:443
alias.example 10.0.0.2:443
alias.example 10.0.0.1:443
alias.example 10.0.0.1:443
`)
	type ep struct {
		Address string
		Port    int
	}
	routes, clusters := map[string]string{}, map[string][]ep{}
	for _, r := range got.Routes {
		routes[r.Match] = r.Cluster
	}
	for _, c := range got.Clusters {
		for _, e := range c.Endpoints {
			clusters[c.Name] = append(clusters[c.Name], ep{e.Address, e.Port})
			if !e.Healthy || e.Weight != 1 {
				t.Errorf("endpoint %+v cannot be used", e)
			}
		}
	}
	both := "10.0.0.1:443,10.0.0.2:443"
	if d := cmp.Diff(map[string]string{
		"web.example": both, "alias.example": both,
		"*.dc2.example": "gw.dc2.example:8443", "api.example": "[2001:db8::1]:443",
	}, routes); d != "" {
		t.Error(d)
	}
	if d := cmp.Diff(map[string][]ep{
		both:                  {{"10.0.0.1", 443}, {"10.0.0.2", 443}},
		"gw.dc2.example:8443": {{"gw.dc2.example", 8443}},
		"[2001:db8::1]:443":   {{"2001:db8::1", 443}},
	}, clusters); d != "" {
		t.Error(d)
	}
	if !slices.IsSortedFunc(got.Routes, func(a, b gateway.Route) int { return strings.Compare(a.Match, b.Match) }) {
		t.Error("routes are not sorted")
	}
}

func TestParseRoutesErrors(t *testing.T) {
	_, err := ParseRoutes(strings.NewReader("web.example\nok.example 10.0.0.1:1\n*.*.a 10.0.0.1:1\nb 10.0.0.1\nb 10.0.0.1:0\nb 10.0.0.1:65536\nb b_d!:1\na b c\n"))
	if err == nil {
		t.Fatal("taken")
	}
	want := `parse routes: line 1: want "name host:port", have "web.example"
line 3: "*.*.a" is no host name
line 4: "10.0.0.1" is no host:port
line 5: "10.0.0.1:0" has no port from 1 to 65535
line 6: "10.0.0.1:65536" has no port from 1 to 65535
line 7: "b_d!:1" has neither an IP address nor a host name
line 8: want "name host:port", have "a b c"`
	if d := cmp.Diff(want, err.Error()); d != "" {
		t.Error(d)
	}
	if _, err := ParseRoutes(strings.NewReader(strings.Repeat("x\n", 100))); strings.Count(err.Error(), "\n") != maxFileErrors {
		t.Errorf("100 faulty lines are told as %v", err)
	}
	if _, err := ParseRoutes(iotest.ErrReader(errRecorded)); err == nil {
		t.Error("a read error is lost")
	}
}
