package local

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"net/http"
	"net/url"
	"reflect"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/consul/api"
	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/go-memdb"

	"github.com/sluicemesh/sluice/acl"
	"github.com/sluicemesh/sluice/agent/catalog"
)

// Syncer makes the catalog equal to the registry, and keeps it so: at once on
// each change, and wholly from time to time. It is level-triggered: it compares
// what should be with what the catalog is known to hold, and writes the
// difference.
type Syncer struct {
	Registry *Registry
	// Client reaches the datacenter's authority, by the API, at http://agent.
	Client *http.Client
	// Full is the time between comparisons with all that the catalog holds for
	// the node, in a cluster of up to 128 nodes; 0 is a minute.
	Full time.Duration
	// OutputInterval is how long a change of nothing but a check's output may
	// wait; 0 is five minutes.
	OutputInterval time.Duration
	// Nodes returns the size of the cluster, by which the time between full
	// comparisons grows; nil is one.
	Nodes  func() int
	Logger hclog.Logger
	// Wake, when it receives, makes the syncer compare fully: the agent has found
	// servers again. nil never does.
	Wake <-chan struct{}

	// mu guards what follows.
	mu      sync.Mutex
	waiting []chan struct{} // of Settle, for the next pass to close
	poke    chan struct{}   // closed by Settle, for the loop not to wait; nil while it does not
	failing bool            // the newest pass failed
}

// Settle waits until what the registry holds now has been written to the catalog,
// so that who has changed the registry finds the change in the catalog. It gives
// up when ctx ends or a write fails; the syncer goes on by itself either way, so
// there is nothing to be done about it.
func (s *Syncer) Settle(ctx context.Context) {
	s.mu.Lock()
	if s.failing {
		s.mu.Unlock()
		return
	}
	done := make(chan struct{})
	s.waiting = append(s.waiting, done)
	if s.poke != nil {
		close(s.poke)
		s.poke = nil
	}
	s.mu.Unlock()
	select {
	case <-done:
	case <-ctx.Done():
	}
}

// begin takes who waits for the pass that now begins.
func (s *Syncer) begin() []chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	w := s.waiting
	s.waiting = nil
	return w
}

// end tells those who waited for a pass.
func (s *Syncer) end(waited []chan struct{}, failed bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.failing = failed
	if failed { // the next pass is not soon
		waited = append(waited, s.waiting...)
		s.waiting = nil
	}
	for _, w := range waited {
		close(w)
	}
}

// poked returns a channel that closes when somebody waits for a pass.
func (s *Syncer) poked() <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	c := make(chan struct{})
	if len(s.waiting) > 0 {
		close(c)
		return c
	}
	s.poke = c
	return c
}

// remote is what the catalog is known to hold for this node.
type remote struct {
	node     bool // the node's own record is right
	services map[string]*catalog.Service
	checks   map[string]*catalog.Check
	// outputAt is when an output was last written, by check.
	outputAt map[string]time.Time
}

// Run blocks until ctx ends.
func (s *Syncer) Run(ctx context.Context) error {
	const retryMin, retryMax = 250 * time.Millisecond, 15 * time.Second
	var (
		known    *remote // nil asks for a full comparison
		nextFull time.Time
		backoff  = retryMin
		outputAt = map[string]time.Time{} // outlives full comparisons
	)
	for {
		waited := s.begin()
		ws := memdb.NewWatchSet()
		services, checks := s.Registry.Services(ws), s.Registry.Checks(ws)
		var err error
		if known == nil || !time.Now().Before(nextFull) {
			if known, err = s.read(ctx); err == nil {
				known.outputAt = outputAt
				nextFull = time.Now().Add(s.interval())
				// What the catalog knows of checks that have not run yet is taken over;
				// that changes the registry, so it is read again.
				for id, c := range known.checks {
					s.Registry.adopt(id, c.Status, c.Output)
				}
				ws = memdb.NewWatchSet()
				services, checks = s.Registry.Services(ws), s.Registry.Checks(ws)
			}
		}
		var due time.Time
		if err == nil {
			due, err = s.write(ctx, known, services, checks)
		}
		s.end(waited, err != nil)
		wait := time.Until(nextFull)
		if !due.IsZero() {
			wait = min(wait, time.Until(due))
		}
		if err != nil {
			if ctx.Err() != nil {
				return nil
			}
			s.Logger.Warn("catalog not in step with this agent, trying again", "error", err, "in", backoff)
			known, wait = nil, backoff+rand.N(backoff/4)
			backoff = min(2*backoff, retryMax)
		} else {
			backoff = retryMin
		}
		if err := s.wait(ctx, ws, wait, err != nil, &known); err != nil {
			return nil
		}
	}
}

// wait returns when the registry has changed, the time is over, or a full
// comparison was asked for. While writes fail, changes do not cut the wait short.
func (s *Syncer) wait(ctx context.Context, ws memdb.WatchSet, d time.Duration, failing bool, known **remote) error {
	timer := time.NewTimer(max(d, time.Millisecond))
	defer timer.Stop()
	changed := make(chan struct{})
	wctx, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() {
		defer close(changed)
		if failing {
			<-wctx.Done()
			return
		}
		_ = ws.WatchCtx(wctx) // ends by a change or by cancel, and both are right
	}()
	select {
	case <-ctx.Done():
	case <-timer.C:
	case <-changed:
	case <-s.poked():
	case <-s.Wake:
		*known = nil
	}
	cancel()
	<-changed
	return ctx.Err()
}

// interval grows with the logarithm of the cluster, so that full comparisons of
// many nodes do not swamp the servers, and is spread so that they do not come
// together.
func (s *Syncer) interval() time.Duration {
	d := s.Full
	if d <= 0 {
		d = time.Minute
	}
	if s.Nodes != nil {
		if n := s.Nodes(); n > 128 {
			d *= time.Duration(math.Ceil(math.Log2(float64(n))-7) + 1)
		}
	}
	return d + rand.N(d/8+1)
}

// read asks the catalog what it holds for the node. It has to be all of it: what is
// not seen here stays wrong until the next full comparison.
func (s *Syncer) read(ctx context.Context) (*remote, error) {
	node := s.Registry.Node()
	var list struct {
		Node     *catalog.Node
		Services []*catalog.Service
	}
	if err := s.call(ctx, http.MethodGet, "/v1/catalog/node-services/"+url.PathEscape(node.Node)+"?consistent", "", nil, &list); err != nil {
		return nil, err
	}
	var checks []*catalog.Check
	if err := s.call(ctx, http.MethodGet, "/v1/health/node/"+url.PathEscape(node.Node)+"?consistent", "", nil, &checks); err != nil {
		return nil, err
	}
	r := &remote{services: map[string]*catalog.Service{}, checks: map[string]*catalog.Check{}}
	if n := list.Node; n != nil {
		r.node = n.ID == node.ID && n.Address == node.Address &&
			sameMap(n.TaggedAddresses, node.TaggedAddresses) && sameMap(n.Meta, node.Meta)
	}
	for _, x := range list.Services {
		r.services[x.ID] = x
	}
	for _, c := range checks {
		r.checks[c.CheckID] = c
	}
	return r, nil
}

func sameMap(a, b map[string]string) bool {
	return len(a) == 0 && len(b) == 0 || reflect.DeepEqual(a, b)
}

// write makes the catalog equal to services and checks, and known with it. It
// returns when an output that was held back is due.
func (s *Syncer) write(ctx context.Context, known *remote, services map[string]*Service, checks map[string]*Check) (due time.Time, err error) {
	for id := range known.services {
		if services[id] == nil && id != consulService {
			if err := s.deregister(ctx, api.CatalogDeregistration{ServiceID: id}); err != nil {
				return due, err
			}
			delete(known.services, id)
			for cid, c := range known.checks {
				if c.ServiceID == id {
					delete(known.checks, cid)
				}
			}
			s.Logger.Info("service removed from the catalog", "service", id)
		}
	}
	for id, c := range known.checks {
		if checks[id] == nil && id != catalog.NodeCheckID && c.ServiceID != consulService {
			if err := s.deregister(ctx, api.CatalogDeregistration{CheckID: id}); err != nil {
				return due, err
			}
			delete(known.checks, id)
			delete(known.outputAt, id)
		}
	}
	stale := map[string][]*Check{} // by service ID, "" for the node's
	for id, c := range checks {
		same, onlyOutput := compare(known.checks[id], c.Check)
		if same {
			continue
		}
		if onlyOutput {
			every := s.OutputInterval
			if every <= 0 {
				every = 5 * time.Minute
			}
			at, ok := known.outputAt[id]
			if !ok {
				at = time.Now().Add(-rand.N(every)) // spread the first
				known.outputAt[id] = at
			}
			if next := at.Add(every); time.Now().Before(next) {
				if due.IsZero() || next.Before(due) {
					due = next
				}
				continue
			}
		}
		stale[c.Check.ServiceID] = append(stale[c.Check.ServiceID], c)
	}
	for id, svc := range services {
		list := stale[id]
		delete(stale, id)
		same := sameService(known.services[id], svc.Merged)
		if same {
			known.services[id] = svc.Merged // the next comparison is one of pointers
			if len(list) == 0 {
				continue
			}
		}
		if err := s.register(ctx, known, svc, list); err != nil {
			return due, err
		}
		if !same {
			s.Logger.Info("service written to the catalog", "service", id)
		}
	}
	if list := stale[""]; len(list) > 0 || !known.node {
		if err := s.register(ctx, known, nil, list); err != nil {
			return due, err
		}
	}
	return due, nil
}

// consulService is the service that servers register themselves as; it is the
// leader's, not this agent's.
const consulService = "consul"

func (s *Syncer) register(ctx context.Context, known *remote, svc *Service, checks []*Check) error {
	node := s.Registry.Node()
	reg := api.CatalogRegistration{
		ID: node.ID, Node: node.Node, Address: node.Address, TaggedAddresses: node.TaggedAddresses, NodeMeta: node.Meta,
		SkipNodeUpdate: known.node,
	}
	var token acl.Secret
	if svc != nil {
		reg.Service, token = svc.Merged, svc.Token
	}
	for _, c := range checks {
		reg.Checks = append(reg.Checks, c.Check)
		if svc == nil && token == "" {
			token = c.Token
		}
	}
	if err := s.call(ctx, http.MethodPut, "/v1/catalog/register", token, reg, nil); err != nil {
		return err
	}
	known.node = true
	if svc != nil {
		known.services[svc.Merged.ID] = svc.Merged
	}
	for _, c := range checks {
		known.checks[c.Check.CheckID] = c.Check
		known.outputAt[c.Check.CheckID] = time.Now()
	}
	return nil
}

func (s *Syncer) deregister(ctx context.Context, d api.CatalogDeregistration) error {
	d.Node = s.Registry.Node().Node
	return s.call(ctx, http.MethodPut, "/v1/catalog/deregister", "", d, nil)
}

// call makes one request of the API.
func (s *Syncer) call(ctx context.Context, method, path string, token acl.Secret, in, out any) error {
	const limit = 30 * time.Second
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	var body io.Reader
	if in != nil {
		b, err := json.Marshal(in)
		if err != nil {
			return err
		}
		body = bytes.NewReader(b)
	}
	req, err := http.NewRequestWithContext(ctx, method, "http://agent"+path, body)
	if err != nil {
		return err
	}
	if token != "" {
		req.Header.Set("X-Consul-Token", token.Reveal())
	}
	resp, err := s.Client.Do(req)
	if err != nil {
		return fmt.Errorf("%s %s: %w", method, path, err)
	}
	defer resp.Body.Close() //nolint:errcheck // it has been read
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		return fmt.Errorf("%s %s: %w", method, path, err)
	}
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("%s %s: %s: %s", method, path, resp.Status, strings.TrimSpace(string(b)))
	}
	if out == nil {
		return nil
	}
	return json.Unmarshal(b, out)
}

// sameService compares two records but for what the catalog adds to them.
func sameService(a, b *catalog.Service) bool {
	if a == nil || b == nil {
		return a == b
	}
	if a == b {
		return true
	}
	x, err1 := json.Marshal(bare(a))
	y, err2 := json.Marshal(bare(b))
	return err1 == nil && err2 == nil && bytes.Equal(x, y)
}

func bare(s *catalog.Service) *catalog.Service {
	n := *s
	n.CreateIndex, n.ModifyIndex, n.ContentHash, n.Datacenter = 0, 0, "", ""
	n.Namespace, n.Partition = catalog.ServiceNameOf(s).Namespace, catalog.ServiceNameOf(s).Partition
	n.TaggedAddresses = map[string]api.ServiceAddress{}
	for k, v := range s.TaggedAddresses {
		if !strings.HasPrefix(k, "consul-") {
			n.TaggedAddresses[k] = v
		}
	}
	// The API shows these blocks for every service, empty where they say nothing.
	if !catalog.IsProxy(s) {
		n.Proxy = nil
	}
	if !catalog.IsConnectNative(s) {
		n.Connect = nil
	}
	if len(n.Tags) == 0 {
		n.Tags = nil
	}
	if len(n.Meta) == 0 {
		n.Meta = nil
	}
	return &n
}

// compare tells whether the catalog's record is right, and if it is not whether
// nothing but the output differs.
func compare(have, want *catalog.Check) (same, onlyOutput bool) {
	if have == nil {
		return false, false
	}
	if have.Status != want.Status || have.Name != want.Name || have.Notes != want.Notes ||
		have.ServiceID != want.ServiceID || have.ServiceName != want.ServiceName {
		return false, false
	}
	return have.Output == want.Output, true
}
