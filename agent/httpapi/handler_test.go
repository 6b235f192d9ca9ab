package httpapi

import (
	"bytes"
	"compress/gzip"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"testing"

	"github.com/hashicorp/consul/api"
	"github.com/hashicorp/go-hclog"

	"github.com/sluicemesh/sluice/agent/catalog"
	"github.com/sluicemesh/sluice/agent/state"
)

func TestConventions(t *testing.T) {
	s := newServer(t, newFakeServer(), nil)
	t.Run("unknown paths", func(t *testing.T) {
		for path, want := range map[string]string{
			"/v1/nothing":         textUnknownPath + "\n",
			"/v1/kv/x":            textUnknownPath + "\n",
			"/v1/agent/services/": textUnknownPath + "\n",
			"/nothing":            textNotAPI + "\n",
		} {
			a := s.do(t, "GET", path, "")
			a.want(t, 404, want)
			for name := range a.header {
				if strings.HasPrefix(name, "X-Consul") {
					t.Errorf("%s: header %s on an unknown path", path, name)
				}
			}
		}
		s.do(t, "GET", "/", "").want(t, 200, textNoUI)
	})
	t.Run("methods", func(t *testing.T) {
		a := s.do(t, "POST", "/v1/agent/services", "")
		a.want(t, 405, "method POST not allowed")
		if got := a.header.Get("Allow"); got != "OPTIONS,GET" {
			t.Errorf("Allow = %q", got)
		}
		a = s.do(t, "OPTIONS", "/v1/connect/intentions/exact", "")
		a.want(t, 200, "")
		if got := a.header.Get("Allow"); got != "OPTIONS,GET,PUT,DELETE" {
			t.Errorf("Allow = %q", got)
		}
		a = s.do(t, "HEAD", "/v1/status/leader", "")
		a.want(t, 200, "")
		if got := a.header.Get("Content-Length"); got != "15" {
			t.Errorf("Content-Length of HEAD = %q", got)
		}
	})
	t.Run("success", func(t *testing.T) {
		a := s.do(t, "GET", "/v1/status/leader", "")
		a.want(t, 200, `"10.0.0.1:8300"`)
		for name, want := range map[string]string{
			"Content-Type": "application/json", "Vary": "Accept-Encoding", "X-Consul-Default-Acl-Policy": "allow", "X-Consul-Index": "",
		} {
			if got := a.header.Get(name); got != want {
				t.Errorf("%s = %q, want %q", name, got, want)
			}
		}
		a = s.do(t, "PUT", "/v1/agent/reload", "")
		a.want(t, 200, "")
		if got := a.header.Get("Content-Type"); got != "application/json" {
			t.Errorf("Content-Type of an empty answer = %q", got)
		}
	})
	t.Run("errors", func(t *testing.T) {
		a := s.do(t, "GET", "/v1/agent/service/x", "")
		a.want(t, 404, "unknown service ID: x")
		if got := a.header.Get("Content-Type"); got != "text/plain; charset=utf-8" {
			t.Errorf("Content-Type of an error = %q", got)
		}
	})
	t.Run("indent", func(t *testing.T) {
		s.do(t, "GET", "/v1/status/peers?pretty", "").want(t, 200, "[\n    \"10.0.0.1:8300\"\n]\n")
		dev := newServer(t, newFakeServer(), func(c *Config) { c.Dev = true })
		dev.do(t, "GET", "/v1/status/peers", "").want(t, 200, "[\n    \"10.0.0.1:8300\"\n]")
	})
	t.Run("tenancy", func(t *testing.T) {
		s.do(t, "GET", "/v1/agent/services?ns=default", "").want(t, 400, `Invalid query parameter: "ns" - Namespaces are a Consul Enterprise feature`)
		s.do(t, "GET", "/v1/agent/services?partition=x", "").want(t, 400, `Invalid query parameter: "partition" - Partitions are a Consul Enterprise feature`)
		s.do(t, "GET", "/v1/agent/services?ns=x", "", "X-Consul-Namespace", "x").want(t, 400, `Invalid header: "X-Consul-Namespace" - Namespaces are a Consul Enterprise feature`)
		s.do(t, "GET", "/v1/agent/services", "", "X-Consul-Partition", "x").want(t, 400, `Invalid header: "X-Consul-Partition" - Partitions are a Consul Enterprise feature`)
	})
	t.Run("acl", func(t *testing.T) {
		for _, m := range []string{"GET", "PUT", "POST", "DELETE"} {
			s.do(t, m, "/v1/acl/token/x", "").want(t, 401, textACLDisabled)
		}
		s.do(t, "PUT", "/v1/agent/token/default", `{}`).want(t, 401, textACLDisabled)
	})
	t.Run("unprintable", func(t *testing.T) {
		s.do(t, "GET", "/v1/agent/service/a%01b", "").want(t, 400, "")
	})
	t.Run("too large", func(t *testing.T) {
		a := s.do(t, "PUT", "/v1/agent/service/register", strings.Repeat(" ", MaxBodyBytes+1))
		a.want(t, 413, "Request body too large, max size: 8388608 bytes")
	})
}

func TestReadParameters(t *testing.T) {
	s := newServer(t, newFakeServer(), nil)
	for query, want := range map[string]string{
		"index=x":           "Invalid index",
		"index=-1":          "Invalid index",
		"wait=10":           "Invalid wait time",
		"wait=-1s":          "Invalid wait time",
		"stale&consistent":  "Cannot specify ?stale with ?consistent, conflicting semantics.",
		"cached&consistent": "Cannot specify ?cached with ?consistent, conflicting semantics.",
		"max_stale=x":       `Invalid max_stale value "x"`,
	} {
		s.do(t, "GET", "/v1/catalog/nodes?"+query, "").want(t, 400, want)
	}
	s.do(t, "GET", "/v1/catalog/nodes", "", "Cache-Control", "max-age=x").want(t, 400, "Invalid Cache-Control header.")
	s.do(t, "GET", "/v1/catalog/nodes", "", "Cache-Control", "must-revalidate, max-age=5").want(t, 200, "[]")
	s.do(t, "GET", "/v1/catalog/nodes?filter=%28%28", "")
	for _, filter := range []string{"((", "Bogus+==+1"} {
		a := s.do(t, "GET", "/v1/catalog/nodes?filter="+filter, "")
		if a.code != 500 || !strings.HasPrefix(a.body, "Failed to create boolean expression evaluator: ") {
			t.Errorf("filter %s: %d %q", filter, a.code, a.body)
		}
	}
}

func TestRestrictionsConcernTheHTTPPortOnly(t *testing.T) {
	cluster := newFakeServer()
	s := newServer(t, cluster, func(c *Config) {
		c.BlockEndpoints = []string{"/v1/agent/self", "/v1/catalog/"}
		c.AllowWriteFrom = []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}
		c.ResponseHeaders = map[string]string{"X-Mine": "yes"}
	})
	request := func(method, path, from string) int {
		r := httptest.NewRequestWithContext(t.Context(), method, path, strings.NewReader("{}"))
		r.RemoteAddr = from
		w := httptest.NewRecorder()
		s.ServeHTTP(w, r)
		if w.Header().Get("X-Mine") != "yes" {
			t.Errorf("%s %s: no X-Mine", method, path)
		}
		return w.Code
	}
	for _, c := range []struct {
		method, path, from string
		want               int
	}{
		{"GET", "/v1/agent/self", "10.1.1.1:1", 403},
		{"GET", "/v1/catalog/nodes", "10.1.1.1:1", 403},
		{"GET", "/v1/agent/services", "192.0.2.1:1", 200},
		{"PUT", "/v1/agent/reload", "192.0.2.1:1", 403},
		{"PUT", "/v1/agent/reload", "10.1.1.1:1", 200},
		{"PUT", "/v1/agent/reload", "[::ffff:10.1.1.1]:1", 200},
		{"PUT", "/v1/agent/reload", "@", 200},
		{"PUT", "/v1/agent/reload", "garbage", 403},
		{"GET", "/v1/internal/config-entries", "10.1.1.1:1", 403},
		{"PUT", "/v1/internal/federation-state", "10.1.1.1:1", 403},
		{"GET", "/v1/nothing", "10.1.1.1:1", 404},
	} {
		if got := request(c.method, c.path, c.from); got != c.want {
			t.Errorf("%s %s from %s: %d, want %d", c.method, c.path, c.from, got, c.want)
		}
	}
	roundTrip(t, s.Transport(), "GET", "/v1/catalog/nodes", "").want(t, 200, "[]")
	roundTrip(t, s.Transport(), "GET", "/v1/internal/config-entries", "").want(t, 200, "[]")
	roundTrip(t, rpcTo(t, s.Handler), "GET", "/v1/internal/config-entries", "").want(t, 200, "[]")
	roundTrip(t, rpcTo(t, s.Handler), "PUT", "/v1/agent/leave", "").want(t, 403, "/v1/agent/leave is not served to other agents")
	if s.agent.left {
		t.Error("another agent made this one leave")
	}
}

func TestNoConnect(t *testing.T) {
	s := newServer(t, newFakeServer(), func(c *Config) { c.NoConnect = true })
	for _, path := range []string{
		"/v1/connect/ca/roots", "/v1/connect/ca/configuration", "/v1/connect/intentions", "/v1/connect/intentions/check?source=a&destination=b",
		"/v1/agent/connect/ca/roots", "/v1/agent/connect/ca/leaf/web",
	} {
		s.do(t, "GET", path, "").want(t, 500, "Connect must be enabled in order to use this endpoint")
	}
	s.do(t, "GET", "/v1/catalog/connect/web", "").want(t, 200, "[]")

	// A client agent leaves it to the servers to know.
	client := newServer(t, &fakeCluster{forward: func(Target) (http.RoundTripper, error) {
		return rpcTo(t, newServer(t, newFakeServer(), nil)), nil
	}}, func(c *Config) { c.NoConnect = true })
	client.do(t, "GET", "/v1/connect/intentions", "").want(t, 200, "[]")
}

// TestFailuresAreLoggedOnce makes sure that what an agent asks, of itself or of
// another, and reports itself is not reported here as well.
func TestFailuresAreLoggedOnce(t *testing.T) {
	var log bytes.Buffer
	s := newServer(t, &fakeCluster{}, func(c *Config) {
		c.Logger = hclog.New(&hclog.LoggerOptions{Output: &log, Level: hclog.Info})
	})
	const path = "/v1/connect/ca/roots"
	roundTrip(t, s.Transport(), "GET", path, "").want(t, 500, "No known Consul servers")
	roundTrip(t, rpcTo(t, s.Handler), "GET", path, "").want(t, 500, "No known Consul servers")
	if log.Len() > 0 {
		t.Errorf("an agent's own requests are logged:\n%s", &log)
	}
	s.do(t, "GET", path, "").want(t, 500, "No known Consul servers")
	if !strings.Contains(log.String(), path) {
		t.Error("a client's request is not logged")
	}
}

func TestGzip(t *testing.T) {
	cluster := newFakeServer()
	s := newServer(t, cluster, nil)
	for i := range 20 {
		cluster.must(t, state.RegisterCommand(&api.CatalogRegistration{Node: fmt.Sprintf("node-%d", i), Address: "10.0.0.1"}))
	}
	plain := s.do(t, "GET", "/v1/catalog/nodes", "")
	a := s.do(t, "GET", "/v1/catalog/nodes", "", "Accept-Encoding", "br, gzip;q=0.8")
	if a.header.Get("Content-Encoding") != "gzip" {
		t.Fatalf("not compressed: %v", a.header)
	}
	z, err := gzip.NewReader(strings.NewReader(a.body))
	if err != nil {
		t.Fatal(err)
	}
	b, err := io.ReadAll(z)
	if err != nil || string(b) != plain.body {
		t.Errorf("decompressed: %q, %v", b, err)
	}
	if a := s.do(t, "GET", "/v1/status/leader", "", "Accept-Encoding", "gzip"); a.header.Get("Content-Encoding") != "" {
		t.Error("a short answer was compressed")
	}
	if a := s.do(t, "GET", "/v1/catalog/nodes", "", "Accept-Encoding", "gzip;q=0"); a.header.Get("Content-Encoding") != "" {
		t.Error("compressed against the client's will")
	}
}

func TestErrorTable(t *testing.T) {
	for _, c := range []struct {
		err   error
		code  int
		text  string
		retry bool
	}{
		{bad("no"), 400, "no", false},
		{fmt.Errorf("wrap: %w", status(404, "gone")), 404, "gone", false},
		{fmt.Errorf("apply: %w", state.ErrNotLeader), 500, "No cluster leader", true},
		{fmt.Errorf("forward: %w", state.ErrNoLeader), 500, "No cluster leader", true},
		{fmt.Errorf("forward: %w", state.ErrNoServers), 500, "No known Consul servers", false},
		{state.ErrNoPath, 500, "No path to datacenter", false},
		{fmt.Errorf("x: %w", state.ErrNoRemoteServer), 500, "Remote DC has no server currently reachable", false},
		{errors.New("rpc error: Permission denied: token lacks x"), 403, "rpc error: Permission denied: token lacks x", false},
		{errors.New("ACL not found"), 403, "ACL not found", false},
		{errors.New("rpc: RPC rate limit exceeded"), 429, "rpc: RPC rate limit exceeded", false},
		{errors.New("Rate limit reached, try again later"), 429, "Rate limit reached, try again later", false},
		{errors.New("x Rate limit reached, try again later"), 500, "x Rate limit reached, try again later", false},
		{fmt.Errorf("roots: %w", catalog.ErrPending), 500, "roots: not known yet", false},
		{errors.New("Must provide node"), 500, "Must provide node", false},
	} {
		code, text, retry := answerTo(c.err)
		if code != c.code || text != c.text || retry != c.retry {
			t.Errorf("answerTo(%q) = %d %q %t, want %d %q %t", c.err, code, text, retry, c.code, c.text, c.retry)
		}
	}
}

func TestToken(t *testing.T) {
	for _, c := range []struct {
		path    string
		headers []string
		want    string
	}{
		{"/x", nil, ""},
		{"/x?token=a", []string{"X-Consul-Token", "b"}, "a"},
		{"/x", []string{"X-Consul-Token", "b", "Authorization", "Bearer c"}, "b"},
		{"/x", []string{"Authorization", "bearer  c "}, "c"},
		{"/x", []string{"Authorization", "Basic c"}, ""},
	} {
		r := httptest.NewRequestWithContext(t.Context(), http.MethodGet, c.path, nil)
		for i := 0; i+1 < len(c.headers); i += 2 {
			r.Header.Set(c.headers[i], c.headers[i+1])
		}
		if got := (&call{r: r, query: r.URL.Query()}).token().Reveal(); got != c.want {
			t.Errorf("%s %q: token %q, want %q", c.path, c.headers, got, c.want)
		}
	}
}

func TestConfigValidate(t *testing.T) {
	err := (&Config{HoldTimeout: -1}).Validate()
	for _, want := range []string{"Cluster", "Agent", "Datacenter", "NodeName", "negative"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("Validate() = %v, want it to name %s", err, want)
		}
	}
}

// decode reads an answer's JSON.
func decode[T any](t testing.TB, a answer) T {
	t.Helper()
	var v T
	if a.code != 200 {
		t.Fatalf("answer %d %q", a.code, a.body)
	}
	if err := json.Unmarshal([]byte(a.body), &v); err != nil {
		t.Fatalf("decode %q: %v", a.body, err)
	}
	return v
}
