package sidecar

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/sluicemesh/sluice/acl"
	"github.com/sluicemesh/sluice/agent/catalog"
	"github.com/sluicemesh/sluice/agent/connect"
	"github.com/sluicemesh/sluice/gateway"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const clusterID = "11111111-2222-3333-4444-555555555555"

// authority is a certificate authority of a mesh of its own.
type authority struct {
	issuer *connect.Issuer
	root   *connect.Root
}

func newAuthority(t *testing.T) *authority {
	t.Helper()
	settings, err := connect.ParseCAConfig("consul", nil)
	if err != nil {
		t.Fatal(err)
	}
	root, key, err := connect.NewRoot(time.Now(), clusterID, settings, 1)
	if err != nil {
		t.Fatal(err)
	}
	issuer, err := connect.NewIssuer(root.RootCert, key)
	if err != nil {
		t.Fatal(err)
	}
	return &authority{issuer: issuer, root: root}
}

func (a *authority) identity(t *testing.T, service, dc string) *gateway.Identity {
	t.Helper()
	key, err := connect.NewKey("ec", 256)
	if err != nil {
		t.Fatal(err)
	}
	id := connect.ServiceID{TrustDomain: connect.TrustDomain(clusterID), Service: catalog.Name(service), Datacenter: dc}
	csrPEM, err := connect.NewLeafCSR(id, key)
	if err != nil {
		t.Fatal(err)
	}
	csr, got, err := connect.VerifyLeafCSR(csrPEM, dc, id.TrustDomain)
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := a.issuer.SignLeaf(time.Now(), csr, got, time.Hour, 2)
	if err != nil {
		t.Fatal(err)
	}
	var secret acl.Secret
	if secret, err = connect.EncodeKey(key); err != nil {
		t.Fatal(err)
	}
	return &gateway.Identity{SPIFFE: id.URI(), CertPEM: leaf.CertPEM, PrivateKeyPEM: secret, RootsPEM: []string{a.root.RootCert}, NotAfter: leaf.ValidBefore}
}

// run starts a sidecar, and stops it when the test ends.
func run(t *testing.T) *Sidecar { return runWith(t, Config{}) }

func runWith(t *testing.T, c Config) *Sidecar {
	t.Helper()
	s := New(c)
	// The test's own context ends before the functions of Cleanup are called, of which
	// those for what uses the sidecar come first.
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	return s
}

// free returns an address nobody listens on.
func free(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close() //nolint:errcheck // it was never used
	return l.Addr().String()
}

// dial connects as soon as the address is listened on, which Apply does not wait for.
func dial(t *testing.T, addr string) *net.TCPConn {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	for {
		c, err := (&net.Dialer{}).DialContext(ctx, "tcp", addr)
		if err == nil {
			t.Cleanup(func() { _ = c.Close() })
			return c.(*net.TCPConn)
		}
		if ctx.Err() != nil {
			t.Fatalf("nobody listens on %s: %v", addr, err)
		}
	}
}

// app is a service that answers each connection with f.
func app(t *testing.T, f func(*net.TCPConn)) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			f(c.(*net.TCPConn))
			_ = c.Close()
		}
	}()
	t.Cleanup(func() { _ = l.Close(); <-done })
	return l.Addr().String()
}

func echo(c *net.TCPConn) { _, _ = io.Copy(c, c) }

func endpointAt(addr string) gateway.Endpoint {
	a, err := net.ResolveTCPAddr("tcp", addr)
	if err != nil {
		panic(err)
	}
	return gateway.Endpoint{Address: a.IP.String(), Port: a.Port, Healthy: true, Weight: 1}
}

func inboundTable(id *gateway.Identity, addr, appAddr string, rules *gateway.Authorisation) *gateway.Table {
	return &gateway.Table{
		Identity:  id,
		Listeners: []gateway.Listener{{Name: "public", Network: "tcp", Address: addr, Mode: gateway.ListenInbound, Cluster: "local_app", Authorise: rules}},
		Clusters:  []gateway.Cluster{{Name: "local_app", ConnectTimeout: time.Second, Endpoints: []gateway.Endpoint{endpointAt(appAddr)}}},
	}
}

func upstreamTable(id *gateway.Identity, addr string, clusters ...gateway.Cluster) *gateway.Table {
	return &gateway.Table{
		Identity:  id,
		Listeners: []gateway.Listener{{Name: "api", Network: "tcp", Address: addr, Mode: gateway.ListenUpstream, Cluster: clusters[0].Name}},
		Clusters:  clusters,
	}
}

func apiCluster(name string, expect string, addrs ...string) gateway.Cluster {
	c := gateway.Cluster{Name: name, ConnectTimeout: 2 * time.Second, TLS: &gateway.ClientTLS{ServerName: "api.default.dc2.internal." + clusterID + ".consul", SPIFFE: []string{expect}}}
	for _, a := range addrs {
		c.Endpoints = append(c.Endpoints, endpointAt(a))
	}
	return c
}

var allow = &gateway.Authorisation{DefaultAllow: true}

const apiID = "spiffe://" + clusterID + ".consul/ns/default/dc/dc2/svc/api"

// TestEcho carries 4 MiB there and back, byte for byte, with a half-close.
func TestEcho(t *testing.T) {
	ca := newAuthority(t)
	public, local := free(t), free(t)
	run(t).Apply(inboundTable(ca.identity(t, "api", "dc2"), public, app(t, echo), allow))
	dial(t, public)
	web := run(t)
	web.Apply(upstreamTable(ca.identity(t, "web", "dc1"), local, apiCluster("api", apiID, public)))

	c := dial(t, local)
	want := make([]byte, 4<<20)
	_, _ = rand.Read(want)
	go func() {
		_, _ = c.Write(want)
		_ = c.CloseWrite()
	}()
	got, err := io.ReadAll(c)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Fatalf("got %d bytes back, not those that were sent", len(got))
	}
}

// TestRefusals closes connections that must not get through, and says why.
func TestRefusals(t *testing.T) {
	ca := newAuthority(t)
	for _, tc := range []struct {
		name   string
		rules  *gateway.Authorisation
		client *authority
		expect string
		// The reason on the client's side, and on the server's ("" for none).
		client1, server string
	}{
		{"denied by an intention", &gateway.Authorisation{DefaultAllow: true, Rules: []gateway.AuthoriseRule{{Source: catalog.Name("web")}}}, ca, apiID, "", gateway.RefuseDenied},
		{"denied by default", &gateway.Authorisation{Rules: []gateway.AuthoriseRule{{Source: catalog.Name("other"), Allow: true}}}, ca, apiID, "", gateway.RefuseDenied},
		{"the exact rule wins", &gateway.Authorisation{Rules: []gateway.AuthoriseRule{
			{Source: catalog.Name("web"), Allow: false, Precedence: 9}, {Source: catalog.Name("*"), Allow: true, Precedence: 8},
		}}, ca, apiID, "", gateway.RefuseDenied},
		{"somebody else answers", allow, ca, "spiffe://" + clusterID + ".consul/ns/default/dc/dc2/svc/db", gateway.RefuseIdentity, gateway.RefuseHandshake},
		{"a client of another mesh", allow, newAuthority(t), apiID, gateway.RefuseIdentity, gateway.RefuseHandshake},
	} {
		t.Run(tc.name, func(t *testing.T) {
			public, local := free(t), free(t)
			api := run(t)
			api.Apply(inboundTable(ca.identity(t, "api", "dc2"), public, app(t, echo), tc.rules))
			_ = dial(t, public).Close()
			web := run(t)
			web.Apply(upstreamTable(tc.client.identity(t, "web", "dc1"), local, apiCluster("api", tc.expect, public)))
			c := dial(t, local)
			_, _ = c.Write([]byte("hello"))
			if b, err := io.ReadAll(c); len(b) > 0 {
				t.Fatalf("got %q, %v through", b, err)
			}
			if tc.client1 != "" {
				if got := web.Status().Refused; len(got) == 0 || got[0].Reason != tc.client1 {
					t.Errorf("the client's side refused %+v, want %s", got, tc.client1)
				}
			}
			if tc.server != "" {
				if got := await(t, func() (gateway.Refusal, bool) {
					for _, r := range api.Status().Refused {
						if r.Reason == tc.server {
							return r, true
						}
					}
					return gateway.Refusal{}, false
				}); got.Detail == "" {
					t.Error("the refusal does not say why")
				}
				if l := api.Status().Listeners[0]; l.Refused[tc.server] != 1 {
					t.Errorf("refusals counted: %v, want 1 of %s", l.Refused, tc.server)
				}
			}
		})
	}
}

// await asks until there is an answer, which another goroutine is about to give.
func await[T any](t *testing.T, f func() (T, bool)) T {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); {
		if v, ok := f(); ok {
			return v
		}
	}
	t.Fatal("it did not happen")
	panic("unreachable")
}

// TestFailover reaches a living endpoint past a dead one, one that hangs up, and
// a cluster without any; an unhealthy one is never dialled.
func TestFailover(t *testing.T) {
	ca := newAuthority(t)
	public, local := free(t), free(t)
	run(t).Apply(inboundTable(ca.identity(t, "api", "dc2"), public, app(t, echo), allow))
	_ = dial(t, public).Close()
	hangup := app(t, func(c *net.TCPConn) { _ = c.SetLinger(0) })

	sick := endpointAt(app(t, func(*net.TCPConn) { t.Error("the unhealthy endpoint was dialled") }))
	sick.Healthy = false
	first := apiCluster("api", apiID)
	first.Endpoints = []gateway.Endpoint{sick}
	first.Failover = []string{"second", "third"}
	second := apiCluster("second", apiID, free(t), hangup)
	third := apiCluster("third", apiID, public)
	web := run(t)
	web.Apply(upstreamTable(ca.identity(t, "web", "dc1"), local, first, second, third))
	for range 8 { // enough for the dead ones to be ejected
		c := dial(t, local)
		if _, err := c.Write([]byte("x")); err != nil {
			t.Fatal(err)
		}
		var b [1]byte
		if _, err := io.ReadFull(c, b[:]); err != nil {
			t.Fatal(err)
		}
		_ = c.Close()
	}
	failed, retries := map[string]uint64{}, uint64(0)
	for _, cl := range web.Status().Clusters {
		retries += cl.Retries
		for _, e := range cl.Endpoints {
			failed[cl.Name] += e.Failed
		}
	}
	if failed["second"] == 0 || failed["third"] != 0 {
		t.Errorf("failures counted: %v", failed)
	}
	if retries != failed["second"] { // every failure was followed by another attempt
		t.Errorf("%d retries counted, want %d", retries, failed["second"])
	}
}

// TestTableChange routes new connections by the new table and leaves open ones.
func TestTableChange(t *testing.T) {
	ca := newAuthority(t)
	a, b, local := free(t), free(t), free(t)
	answer := func(s string) func(*net.TCPConn) {
		return func(c *net.TCPConn) {
			buf := make([]byte, 1)
			for {
				if _, err := c.Read(buf); err != nil {
					return
				}
				if _, err := io.WriteString(c, s); err != nil {
					return
				}
			}
		}
	}
	id := ca.identity(t, "api", "dc2")
	run(t).Apply(inboundTable(id, a, app(t, answer("a")), allow))
	run(t).Apply(inboundTable(id, b, app(t, answer("b")), allow))
	_, _ = dial(t, a), dial(t, b)
	web := run(t)
	webID := ca.identity(t, "web", "dc1")
	ask := func(c net.Conn) string {
		t.Helper()
		if _, err := c.Write([]byte("?")); err != nil {
			t.Fatal(err)
		}
		var buf [1]byte
		if _, err := io.ReadFull(c, buf[:]); err != nil {
			t.Fatal(err)
		}
		return string(buf[:])
	}
	t1 := upstreamTable(webID, local, apiCluster("api", apiID, a))
	t1.Index = 1
	web.Apply(t1)
	old := dial(t, local)
	if got := ask(old); got != "a" {
		t.Fatalf("the first table leads to %q", got)
	}
	t2 := upstreamTable(webID, local, apiCluster("api", apiID, b))
	t2.Index = 2
	web.Apply(t2)
	await(t, func() (int, bool) { return 0, web.Status().Applied == 2 })
	if got := ask(dial(t, local)); got != "b" {
		t.Errorf("the second table leads to %q", got)
	}
	if got := ask(old); got != "a" {
		t.Errorf("the open connection was moved to %q", got)
	}
}

// TestBindRetry serves an address as soon as somebody else lets go of it.
func TestBindRetry(t *testing.T) {
	ca := newAuthority(t)
	squatter, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := run(t)
	s.Apply(inboundTable(ca.identity(t, "api", "dc2"), squatter.Addr().String(), app(t, echo), allow))
	st := await(t, func() (gateway.ListenerStatus, bool) {
		ls := s.Status().Listeners
		if len(ls) == 1 && ls[0].Error != "" {
			return ls[0], true
		}
		return gateway.ListenerStatus{}, false
	})
	if st.Bound {
		t.Error("bound, and with an error")
	}
	if err := squatter.Close(); err != nil {
		t.Fatal(err)
	}
	await(t, func() (int, bool) { return 0, s.Status().Listeners[0].Bound })
}

func TestReasons(t *testing.T) {
	for err, want := range map[error]string{
		errNoEndpoint:                     gateway.RefuseNoEndpoint,
		errLimit:                          gateway.RefuseLimit,
		errors.Join(errHandshake, io.EOF): gateway.RefuseHandshake,
		errors.Join(errHandshake, fmt.Errorf("x: %w", errIdentity)): gateway.RefuseIdentity,
		errors.New("connection refused"):                            gateway.RefuseConnect,
		errors.Join(errLimit, io.EOF, nil):                          gateway.RefuseLimit,
	} {
		if got := reasonOf(err); got != want {
			t.Errorf("%v: %s, want %s", err, got, want)
		}
	}
}

// TestLeastConnections uses the idle one of two endpoints, whatever is drawn.
func TestLeastConnections(t *testing.T) {
	c := newCluster(&gateway.Cluster{Endpoints: []gateway.Endpoint{
		{Address: "10.0.0.1", Port: 1, Healthy: true, Weight: 1}, {Address: "10.0.0.2", Port: 1, Healthy: true, Weight: 1},
	}}, nil)
	c.endpoints[0].active.Add(1)
	for range 100 {
		if got := c.candidates()[0]; got != c.endpoints[1] {
			t.Fatalf("chose %s, which is busy", got.address)
		}
	}
}
