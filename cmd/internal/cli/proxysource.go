package cli

import (
	"context"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/consul/api"
	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/go-memdb"

	"github.com/sluicemesh/sluice/acl"
	"github.com/sluicemesh/sluice/agent/catalog"
	"github.com/sluicemesh/sluice/agent/connect"
	"github.com/sluicemesh/sluice/agent/view"
)

// transport sends requests for the host "agent" to an agent's HTTP API.
type transport struct {
	base http.RoundTripper
	conf *api.Config
}

// newTransport takes a configuration that the API client has filled in.
func newTransport(conf *api.Config) *transport {
	return &transport{base: conf.HttpClient.Transport, conf: conf}
}

// publicPaths are where an agent tells other programs what it tells agents at
// another path, in the same form.
//
// COMPAT: they are Consul's, so the sidecar runs beside a Consul agent too. The
// own datacenter's gateways are then those of its federation state, which
// follows the catalog.
var publicPaths = map[string]string{
	"/v1/internal/catalog/mesh-gateways": "/v1/internal/federation-states/mesh-gateways",
}

// RoundTrip implements [http.RoundTripper].
func (t *transport) RoundTrip(r *http.Request) (*http.Response, error) {
	out := r.Clone(r.Context())
	out.URL.Scheme, out.URL.Host = t.conf.Scheme, t.conf.Address
	if strings.Contains(t.conf.Address, "/") {
		out.URL.Host = "localhost" // a unix socket's path, which the dialer has
	}
	out.Host = out.URL.Host
	if p, ok := publicPaths[out.URL.Path]; ok {
		out.URL.Path = p
	}
	if t.conf.PathPrefix != "" {
		out.URL.Path = t.conf.PathPrefix + out.URL.Path
		if out.URL.RawPath != "" {
			out.URL.RawPath = t.conf.PathPrefix + out.URL.RawPath
		}
	}
	if t.conf.Token != "" {
		out.Header.Set("X-Consul-Token", t.conf.Token)
	}
	if a := t.conf.HttpAuth; a != nil {
		out.SetBasicAuth(a.Username, a.Password)
	}
	return t.base.RoundTrip(out)
}

type sourceConfig struct {
	client     *api.Client
	transport  *transport
	datacenter string
	// service is the one whose certificate is kept.
	service catalog.ServiceName
	logger  hclog.Logger
}

// source is what a proxy outside of an agent knows: an agent's answers, and a
// certificate whose key the agent has made. It implements [proxycfg.Source].
type source struct {
	*view.Remote
	leaf *leafFollower
}

func newSource(c sourceConfig) *source {
	leaf := &leafFollower{
		client: c.client, service: c.service.Canonical(), logger: c.logger.Named("leaf"),
		err: catalog.ErrPending, changed: make(chan struct{}),
	}
	return &source{leaf: leaf, Remote: view.NewRemote(view.RemoteConfig{
		Client: &http.Client{Transport: c.transport}, Datacenter: c.datacenter, Leaves: leaf, Logger: c.logger,
	})}
}

// Run fetches until ctx ends, and returns nil when nothing is under way.
func (s *source) Run(ctx context.Context) error {
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() { s.leaf.run(ctx) })
	return s.Remote.Run(ctx)
}

// leafFollower keeps the newest certificate of one service. It implements
// [view.Leaves].
type leafFollower struct {
	client  *api.Client
	service catalog.ServiceName
	logger  hclog.Logger

	mu      sync.Mutex // guards what follows
	leaf    *connect.Leaf
	asOf    time.Time
	err     error         // why there is no leaf; nil when there is
	changed chan struct{} // closes when leaf or err is another
}

// Leaf implements [view.Leaves].
func (l *leafFollower) Leaf(ws memdb.WatchSet, service catalog.ServiceName) (*connect.Leaf, catalog.Freshness, error) {
	if service.Canonical() != l.service {
		return nil, catalog.Freshness{}, fmt.Errorf("this proxy has the certificate of %s, not of %s", l.service, service)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	ws.Add(l.changed)
	if l.leaf == nil {
		return nil, catalog.Freshness{}, l.err
	}
	return l.leaf, catalog.Freshness{Index: l.leaf.ModifyIndex, AsOf: l.asOf}, nil
}

// run asks until ctx ends.
func (l *leafFollower) run(ctx context.Context) {
	var index uint64
	wait := minPause
	for ctx.Err() == nil {
		// The wait is the age that a certificate may seem to have while all is well.
		leaf, meta, err := l.client.Agent().ConnectCALeaf(l.service.Name, (&api.QueryOptions{WaitIndex: index, WaitTime: time.Minute}).WithContext(ctx))
		if ctx.Err() != nil {
			return
		}
		if err != nil {
			l.logger.Warn("certificate not read, trying again", "service", l.service, "error", err)
			l.failed(err)
			index = 0
			wait = pause(ctx, wait)
			continue
		}
		wait = minPause
		if meta.LastIndex < index || meta.LastIndex == 0 {
			index = 0 // another agent answers at this address; do not wait for its past
			wait = pause(ctx, wait)
		} else {
			index = meta.LastIndex
		}
		l.set(&connect.Leaf{
			SerialNumber: leaf.SerialNumber, CertPEM: leaf.CertPEM, PrivateKeyPEM: acl.Secret(leaf.PrivateKeyPEM),
			Service: leaf.Service, ServiceURI: leaf.ServiceURI, ValidAfter: leaf.ValidAfter, ValidBefore: leaf.ValidBefore,
			CreateIndex: leaf.CreateIndex, ModifyIndex: leaf.ModifyIndex,
		})
	}
}

func (l *leafFollower) set(leaf *connect.Leaf) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.asOf, l.err = time.Now(), nil
	if l.leaf != nil && l.leaf.CertPEM == leaf.CertPEM {
		return
	}
	l.leaf = leaf
	close(l.changed)
	l.changed = make(chan struct{})
}

// failed says why there is no certificate; one that was got before stays good.
func (l *leafFollower) failed(err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.leaf != nil {
		return
	}
	l.err = fmt.Errorf("%w: %w", catalog.ErrPending, err)
	close(l.changed)
	l.changed = make(chan struct{})
}
