package local

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/hashicorp/consul/api"
	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/go-memdb"

	"github.com/sluicemesh/sluice/agent/catalog"
	"github.com/sluicemesh/sluice/agent/check"
	"github.com/sluicemesh/sluice/agent/configentry"
)

func open(t *testing.T, dir string) *Registry {
	t.Helper()
	r, err := Open(Config{
		Node:           &catalog.Node{ID: "0b1c2d3e-0000-0000-0000-000000000001", Node: "n1", Address: "127.0.0.1"},
		Datacenter:     "dc1",
		DataDir:        dir,
		SidecarMinPort: 21000, SidecarMaxPort: 21002,
		CheckSupported: check.Supported,
	})
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func define(t *testing.T, reg api.AgentServiceRegistration) *catalog.Definition {
	t.Helper()
	d := &catalog.Definition{AgentServiceRegistration: reg}
	catalog.NormalizeDefinition(d)
	if err := catalog.ValidateDefinition(d); err != nil {
		t.Fatal(err)
	}
	return d
}

func withSidecar(name string, port int) api.AgentServiceRegistration {
	return api.AgentServiceRegistration{Name: name, Port: port, Connect: &api.AgentServiceConnect{SidecarService: &api.AgentServiceRegistration{}}}
}

func register(t *testing.T, r *Registry, reg api.AgentServiceRegistration) {
	t.Helper()
	if err := r.Register(define(t, reg), false); err != nil {
		t.Fatal(err)
	}
}

func ids[V any](m map[string]V) []string {
	var out []string
	for id := range m {
		out = append(out, id)
	}
	slices.Sort(out)
	return out
}

func TestSidecarExpansion(t *testing.T) {
	r := open(t, "")
	register(t, r, withSidecar("web", 8080))
	register(t, r, withSidecar("api", 9090))
	if d := cmp.Diff([]string{"api", "api-sidecar-proxy", "web", "web-sidecar-proxy"}, ids(r.Services(nil))); d != "" {
		t.Error(d)
	}
	port := func(id string) int { return r.Service(nil, id).Registered.Port }
	if port("web-sidecar-proxy") != 21000 || port("api-sidecar-proxy") != 21001 {
		t.Errorf("ports %d and %d", port("web-sidecar-proxy"), port("api-sidecar-proxy"))
	}
	// Registering again keeps the port; removing the parent removes the sidecar.
	register(t, r, withSidecar("api", 9091))
	if port("api-sidecar-proxy") != 21001 {
		t.Errorf("the port moved to %d", port("api-sidecar-proxy"))
	}
	r.Deregister("web")
	if d := cmp.Diff([]string{"api", "api-sidecar-proxy"}, ids(r.Services(nil))); d != "" {
		t.Error(d)
	}
	// Without the block the sidecar goes.
	register(t, r, api.AgentServiceRegistration{Name: "api", Port: 9090})
	if d := cmp.Diff([]string{"api"}, ids(r.Services(nil))); d != "" {
		t.Error(d)
	}
	for _, name := range []string{"a", "b", "c"} {
		register(t, r, withSidecar(name, 1))
	}
	err := r.Register(define(t, withSidecar("d", 1)), false)
	if err == nil || !strings.Contains(err.Error(), "none left in the configured range [21000, 21002]") {
		t.Errorf("a fourth sidecar in three ports: %v", err)
	}
}

// TestMaintenancePersists keeps maintenance of the node and of services over a
// restart, services of files included, which come later than what was persisted.
func TestMaintenancePersists(t *testing.T) {
	dir := t.TempDir()
	file := func() []*catalog.Definition {
		return []*catalog.Definition{define(t, api.AgentServiceRegistration{Name: "web", Port: 8080})}
	}
	r := open(t, dir)
	if err := r.ReplaceFiles(file(), nil); err != nil {
		t.Fatal(err)
	}
	register(t, r, api.AgentServiceRegistration{Name: "api", Port: 9090})
	for _, id := range []string{"web", "api"} {
		if found, err := r.ServiceMaintenance(id, true, "upgrade", ""); !found || err != nil {
			t.Fatal(found, err)
		}
	}
	if err := r.NodeMaintenance(true, "move", ""); err != nil {
		t.Fatal(err)
	}
	again := open(t, dir)
	if err := again.ReplaceFiles(file(), nil); err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff([]string{"_node_maintenance", "_service_maintenance:api", "_service_maintenance:web"}, ids(again.Checks(nil))); d != "" {
		t.Error(d)
	}
	if c := again.Checks(nil)["_service_maintenance:web"]; c != nil && (c.Check.Notes != "upgrade" || c.Check.ServiceName != "web" || c.Check.Status != api.HealthCritical) {
		t.Errorf("after the restart %+v", c.Check)
	}
	if err := again.ReplaceFiles(nil, nil); err != nil { // and it goes with its service
		t.Fatal(err)
	}
	if again.Checks(nil)["_service_maintenance:web"] != nil {
		t.Error("maintenance of a service that is gone")
	}
}

// TestPersist closes a registry and opens another on its directory.
func TestPersist(t *testing.T) {
	dir := t.TempDir()
	r := open(t, dir)
	register(t, r, withSidecar("first", 1))
	register(t, r, withSidecar("web", 8080))
	web := define(t, api.AgentServiceRegistration{Name: "web", ID: "web-2", Port: 8081, Check: &api.AgentServiceCheck{TTL: "1h"}})
	web.Token = "secret"
	if err := r.Register(web, false); err != nil {
		t.Fatal(err)
	}
	if found, err := r.UpdateTTL("service:web-2", api.HealthPassing, "fine"); !found || err != nil {
		t.Fatal(found, err)
	}
	if found, err := r.ServiceMaintenance("web", true, "broken", ""); !found || err != nil {
		t.Fatal(found, err)
	}
	r.Deregister("first") // frees the lower port, which the restart must not hand to web's sidecar

	again := open(t, dir)
	if d := cmp.Diff(ids(r.Services(nil)), ids(again.Services(nil))); d != "" {
		t.Error(d)
	}
	if d := cmp.Diff(ids(r.Checks(nil)), ids(again.Checks(nil))); d != "" {
		t.Error(d)
	}
	if got := again.Service(nil, "web-sidecar-proxy").Registered.Port; got != 21001 {
		t.Errorf("the sidecar's port moved to %d", got)
	}
	if got := again.Service(nil, "web-2").Token.Reveal(); got != "secret" {
		t.Errorf("token %q", got)
	}
	if c := again.Checks(nil)["service:web-2"].Check; c.Status != api.HealthPassing || c.Output != "fine" {
		t.Errorf("TTL check is %s (%s) after the restart", c.Status, c.Output)
	}

	// A file of which nothing can be made is left, and the rest is loaded; files
	// are for their owner only.
	if err := os.WriteFile(filepath.Join(dir, "services", "broken"), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(ids(again.Services(nil)), ids(open(t, dir).Services(nil))); d != "" {
		t.Error(d)
	}
	if err := filepath.WalkDir(dir, func(path string, e os.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return err
		}
		if fi, err := e.Info(); err != nil || fi.Mode().Perm() != 0o600 {
			t.Errorf("%s: mode %v, %v", path, fi.Mode(), err)
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
}

func TestReplaceFiles(t *testing.T) {
	dir := t.TempDir()
	r := open(t, dir)
	register(t, r, api.AgentServiceRegistration{Name: "api", Port: 1})
	register(t, r, api.AgentServiceRegistration{Name: "web", Port: 1})
	if err := r.ReplaceFiles([]*catalog.Definition{define(t, withSidecar("web", 2)), define(t, withSidecar("db", 3))}, nil); err != nil {
		t.Fatal(err)
	}
	if got := r.Service(nil, "web").Registered.Port; got != 2 {
		t.Errorf("the file's definition did not win: port %d", got)
	}
	if err := r.ReplaceFiles([]*catalog.Definition{define(t, api.AgentServiceRegistration{Name: "web", Port: 4})}, nil); err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff([]string{"api", "web"}, ids(r.Services(nil))); d != "" {
		t.Error(d)
	}
	// What came from files is not persisted.
	if d := cmp.Diff([]string{"api"}, ids(open(t, dir).Services(nil))); d != "" {
		t.Error(d)
	}
}

func TestChecks(t *testing.T) {
	r := open(t, "")
	register(t, r, api.AgentServiceRegistration{Name: "web", Port: 1, Checks: api.AgentServiceChecks{
		{TTL: "10s"}, {TTL: "10s"},
	}, Connect: &api.AgentServiceConnect{SidecarService: &api.AgentServiceRegistration{}}})
	alias := func() string { return r.Checks(nil)["service:web-sidecar-proxy:2"].Check.Status }
	if got := alias(); got != api.HealthCritical {
		t.Errorf("alias of critical checks is %s", got)
	}
	r.SetStatus("service:web:1", api.HealthPassing, "")
	r.SetStatus("service:web:2", api.HealthWarning, "hm")
	if got := alias(); got != api.HealthWarning {
		t.Errorf("alias of a passing and a warning check is %s", got)
	}
	ws := memdb.NewWatchSet()
	r.Checks(ws)
	services := memdb.NewWatchSet()
	r.Services(services)
	r.SetStatus("service:web:2", api.HealthPassing, "")
	if ws.Watch(time.After(time.Second)) {
		t.Error("a change of status wakes nobody who watches checks")
	}
	if !services.Watch(time.After(0)) {
		t.Error("a change of status wakes those who watch services")
	}
	// Registering again keeps the results.
	register(t, r, api.AgentServiceRegistration{Name: "web", Port: 2, Checks: api.AgentServiceChecks{{TTL: "10s"}, {TTL: "20s"}}})
	if got := r.Checks(nil)["service:web:1"].Check.Status; got != api.HealthPassing {
		t.Errorf("a new registration made the check %s", got)
	}
	if _, err := r.UpdateTTL("nope", api.HealthPassing, ""); err != nil {
		t.Errorf("unknown check: %v", err)
	}
	if err := r.RegisterCheck(CheckRegistration{ID: "x", Name: "x", ServiceID: "nope", Def: catalog.CheckDefinition{TTL: "10s"}}); !errors.Is(err, ErrNoService) {
		t.Errorf("check of an unknown service: %v", err)
	}
}

// TestReap removes a service that has been critical for too long.
func TestReap(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := open(t, "")
		register(t, r, api.AgentServiceRegistration{Name: "web", Port: 1, Check: &api.AgentServiceCheck{TTL: "10s", DeregisterCriticalServiceAfter: "2m"}})
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- r.Run(ctx) }()
		time.Sleep(90 * time.Second)
		r.SetStatus("service:web", api.HealthPassing, "") // starts afresh
		r.SetStatus("service:web", api.HealthCritical, "")
		time.Sleep(90 * time.Second)
		if r.Service(nil, "web") == nil {
			t.Error("removed before its time")
		}
		time.Sleep(61 * time.Second)
		if r.Service(nil, "web") != nil {
			t.Error("still there")
		}
		cancel()
		<-done
	})
}

// authority is a catalog of one node behind the API.
type authority struct {
	mu       sync.Mutex
	node     *catalog.Node
	services map[string]*catalog.Service
	checks   map[string]*catalog.Check
	writes   int
	down     bool
}

func (a *authority) RoundTrip(r *http.Request) (*http.Response, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.down {
		return nil, errors.New("no servers")
	}
	var out any = true
	switch r.Method + " " + r.URL.Path {
	case "GET /v1/catalog/node-services/n1":
		var list struct {
			Node     *catalog.Node
			Services []*catalog.Service
		}
		list.Node = a.node
		for _, s := range a.services {
			shown := *s // the API shows blocks that say nothing
			if shown.Proxy == nil {
				shown.Proxy = &api.AgentServiceConnectProxyConfig{}
			}
			if shown.Connect == nil {
				shown.Connect = &api.AgentServiceConnect{}
			}
			list.Services = append(list.Services, &shown)
		}
		out = list
	case "GET /v1/health/node/n1":
		checks := []*catalog.Check{}
		for _, c := range a.checks {
			checks = append(checks, c)
		}
		out = checks
	case "PUT /v1/catalog/register":
		a.writes++
		var reg api.CatalogRegistration
		if err := json.NewDecoder(r.Body).Decode(&reg); err != nil {
			return nil, err
		}
		if !reg.SkipNodeUpdate {
			a.node = &catalog.Node{ID: reg.ID, Node: reg.Node, Address: reg.Address}
		}
		if reg.Service != nil {
			a.services[reg.Service.ID] = reg.Service
		}
		for _, c := range reg.Checks {
			a.checks[c.CheckID] = c
		}
	case "PUT /v1/catalog/deregister":
		a.writes++
		var d api.CatalogDeregistration
		if err := json.NewDecoder(r.Body).Decode(&d); err != nil {
			return nil, err
		}
		delete(a.services, d.ServiceID)
		delete(a.checks, d.CheckID)
		for id, c := range a.checks { // a service takes its checks with it
			if d.ServiceID != "" && c.ServiceID == d.ServiceID {
				delete(a.checks, id)
			}
		}
	default:
		return &http.Response{StatusCode: http.StatusNotFound, Status: "404", Body: http.NoBody}, nil
	}
	b, err := json.Marshal(out)
	return &http.Response{StatusCode: http.StatusOK, Body: io.NopCloser(strings.NewReader(string(b)))}, err
}

func (a *authority) get(t *testing.T, f func()) {
	t.Helper()
	synctest.Wait()
	a.mu.Lock()
	defer a.mu.Unlock()
	f()
}

func TestSync(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := &authority{
			services: map[string]*catalog.Service{"gone": {ID: "gone", Service: "gone"}, "consul": {ID: "consul", Service: "consul"}},
			checks: map[string]*catalog.Check{
				"serfHealth":  {CheckID: "serfHealth", Status: api.HealthPassing},
				"service:web": {CheckID: "service:web", ServiceID: "web", Status: api.HealthPassing, Output: "of before"},
				"gone":        {CheckID: "gone", ServiceID: "gone"},
			},
		}
		r := open(t, "")
		register(t, r, api.AgentServiceRegistration{Name: "web", Port: 1, Check: &api.AgentServiceCheck{TCP: "127.0.0.1:1", Interval: "10s"}})
		s := &Syncer{Registry: r, Client: &http.Client{Transport: a}, Logger: hclog.NewNullLogger()}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- s.Run(ctx) }()

		a.get(t, func() {
			if d := cmp.Diff([]string{"consul", "web"}, ids(a.services)); d != "" {
				t.Error(d)
			}
			if d := cmp.Diff([]string{"serfHealth", "service:web"}, ids(a.checks)); d != "" {
				t.Error(d)
			}
			// A restarted agent does not call a service critical before it has looked.
			if got := a.checks["service:web"].Status; got != api.HealthPassing {
				t.Errorf("the restart turned the check %s", got)
			}
		})
		// A change is written at once, and nothing is written without one.
		r.SetStatus("service:web", api.HealthCritical, "refused")
		before := 0
		a.get(t, func() {
			before = a.writes
			if got := a.checks["service:web"]; got.Status != api.HealthCritical || got.Output != "refused" {
				t.Errorf("catalog has %s (%s)", got.Status, got.Output)
			}
		})
		time.Sleep(10 * time.Minute)
		a.get(t, func() {
			if a.writes != before {
				t.Errorf("%d writes without a change", a.writes-before)
			}
			delete(a.services, "web") // somebody meddles
		})
		time.Sleep(2 * time.Minute)
		a.get(t, func() {
			if a.services["web"] == nil {
				t.Error("drift was not mended")
			}
		})
		// Mere output is written now and then; the status at once.
		r.SetStatus("service:web", api.HealthCritical, "again")
		a.get(t, func() {
			if got := a.checks["service:web"].Output; got != "again" {
				t.Errorf("output %q after minutes without a write", got)
			}
		})
		r.SetStatus("service:web", api.HealthCritical, "and again")
		a.get(t, func() {
			if a.checks["service:web"].Output == "and again" {
				t.Error("a second change of nothing but output was written at once")
			}
		})
		time.Sleep(6 * time.Minute)
		a.get(t, func() {
			if a.checks["service:web"].Output != "and again" {
				t.Error("the output was never written")
			}
			a.down = true
		})
		// While the servers are away it keeps trying, and catches up.
		register(t, r, api.AgentServiceRegistration{Name: "api", Port: 1})
		r.Deregister("web")
		time.Sleep(5 * time.Minute)
		a.get(t, func() { a.down = false })
		time.Sleep(20 * time.Second)
		a.get(t, func() {
			if d := cmp.Diff([]string{"api", "consul"}, ids(a.services)); d != "" {
				t.Error(d)
			}
		})
		cancel()
		<-done
	})
}

func TestCentral(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var mu sync.Mutex
		changed := make(chan struct{})
		var defaults configentry.Entry
		r := open(t, "")
		c := &Central{Registry: r, Logger: hclog.NewNullLogger(), Entry: func(ws memdb.WatchSet, kind, _ string) (configentry.Entry, catalog.Freshness, error) {
			mu.Lock()
			defer mu.Unlock()
			ws.Add(changed)
			if kind != configentry.ProxyDefaults {
				return nil, catalog.Freshness{}, nil
			}
			return defaults, catalog.Freshness{}, nil
		}}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- c.Run(ctx) }()
		register(t, r, withSidecar("web", 1))
		synctest.Wait()
		mode := func() api.MeshGatewayMode { return r.Service(nil, "web-sidecar-proxy").Merged.Proxy.MeshGateway.Mode }
		if got := mode(); got != "" {
			t.Errorf("mode %q without central configuration", got)
		}
		ws := memdb.NewWatchSet()
		r.Service(ws, "web-sidecar-proxy")
		mu.Lock()
		defaults = &api.ProxyConfigEntry{Kind: configentry.ProxyDefaults, Name: configentry.Global, MeshGateway: api.MeshGatewayConfig{Mode: api.MeshGatewayModeLocal}}
		close(changed)
		changed = make(chan struct{})
		mu.Unlock()
		synctest.Wait()
		if got := mode(); got != api.MeshGatewayModeLocal {
			t.Errorf("mode %q, want local", got)
		}
		if ws.Watch(time.After(0)) {
			t.Error("the change woke nobody")
		}
		if got := r.Service(nil, "web-sidecar-proxy").Registered.Proxy.MeshGateway.Mode; got != "" {
			t.Errorf("the registration itself was changed to %q", got)
		}
		cancel()
		<-done
	})
}

// TestSettle wants a change to be in the catalog when Settle returns, and Settle
// not to hold anybody up while the servers are away.
func TestSettle(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := &authority{services: map[string]*catalog.Service{}, checks: map[string]*catalog.Check{}}
		r := open(t, "")
		s := &Syncer{Registry: r, Client: &http.Client{Transport: a}, Logger: hclog.NewNullLogger()}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- s.Run(ctx) }()

		settle := func() time.Duration {
			start := time.Now()
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			s.Settle(ctx)
			return time.Since(start)
		}
		has := func(id string) bool {
			a.mu.Lock()
			defer a.mu.Unlock()
			return a.services[id] != nil
		}
		for _, name := range []string{"a", "b"} {
			register(t, r, api.AgentServiceRegistration{Name: name, Port: 1})
			if settle(); !has(name) {
				t.Errorf("service %s is not in the catalog", name)
			}
		}
		if took := settle(); took > 0 { // there is nothing to write
			t.Errorf("settled after %v", took)
		}
		synctest.Wait()
		a.mu.Lock()
		a.down = true
		a.mu.Unlock()
		register(t, r, api.AgentServiceRegistration{Name: "c", Port: 1})
		for range 2 {
			if took := settle(); took > 0 {
				t.Errorf("without servers: settled after %v", took)
			}
		}
		a.mu.Lock()
		a.down = false
		a.mu.Unlock()
		time.Sleep(time.Minute)
		if !has("c") {
			t.Error("service c was never written")
		}
		register(t, r, api.AgentServiceRegistration{Name: "d", Port: 1})
		if settle(); !has("d") {
			t.Error("service d is not in the catalog")
		}
		cancel()
		<-done
	})
}
