// Package sidecar is the built-in data plane of a connect-proxy. Its inbound
// listener terminates mutual TLS, asks the intentions, and forwards to the local
// service; its upstream listeners take plain connections from the local service
// and carry them over mutual TLS to the far side, whose SPIFFE identity must be
// the expected one.
//
// Every goroutine belongs to Run, which waits for them. A connection keeps the
// cluster it was routed by; everything else follows the newest table.
package sidecar

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"maps"
	"net"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/sluicemesh/sluice/agent/connect"
	"github.com/sluicemesh/sluice/gateway"
)

// Config of a [Sidecar]. The zero value is usable.
type Config struct {
	// HandshakeTimeout bounds a TLS handshake; 0 is 5 seconds.
	HandshakeTimeout time.Duration
	// Attempts bounds how many endpoints one connection tries; 0 is 4.
	Attempts int
	// Keepalive of all connections where the table names none; the zero value is
	// 15 seconds of idleness, 15 between probes, 4 probes: within the 350 seconds
	// after which common load balancers forget a flow, and soon enough to notice a
	// peer that vanished.
	Keepalive net.KeepAliveConfig
	// AccessLog may be nil.
	AccessLog *gateway.AccessLog
	Logger    hclog.Logger
}

// Sidecar implements [gateway.DataPlane], [gateway.Drainer] and
// [gateway.ConnectionLister].
type Sidecar struct {
	cfg Config

	current atomic.Pointer[routing] // what new connections are handled by
	wake    chan struct{}
	parked  chan struct{} // a listener has closed for a drain
	done    chan struct{} // closed when Run has ended
	// held is not nil while listeners are to be closed, and closed after that. It is
	// set by one goroutine, that of a drain.
	held atomic.Pointer[chan struct{}]

	// mu guards what follows. Those of listeners are taken inside it.
	mu        sync.Mutex
	next      *gateway.Table // handed over, not yet applied
	listeners map[string]*listener
	clusters  map[string]*cluster
	lastError string

	refused gateway.Refusals

	conns    connSet
	sessions sessions
	wg       sync.WaitGroup
}

// routing is a table made ready for use. It is immutable.
type routing struct {
	table     *gateway.Table
	appliedAt time.Time
	clusters  map[string]*cluster
	verifier  *connect.Verifier
	inbound   *tls.Config // nil while there is no identity
	cert      *tls.Certificate
	listeners map[string]*gateway.Listener
}

// New returns a sidecar that serves nothing until it is given a table.
func New(cfg Config) *Sidecar {
	if cfg.HandshakeTimeout <= 0 {
		cfg.HandshakeTimeout = 5 * time.Second
	}
	if cfg.Attempts <= 0 {
		cfg.Attempts = 4
	}
	if cfg.Keepalive == (net.KeepAliveConfig{}) {
		cfg.Keepalive = net.KeepAliveConfig{Enable: true, Idle: 15 * time.Second, Interval: 15 * time.Second, Count: 4}
	}
	if cfg.Logger == nil {
		cfg.Logger = hclog.NewNullLogger()
	}
	return &Sidecar{
		cfg:       cfg,
		refused:   gateway.Refusals{Logger: cfg.Logger},
		wake:      make(chan struct{}, 1),
		parked:    make(chan struct{}, 1),
		done:      make(chan struct{}),
		listeners: map[string]*listener{},
		clusters:  map[string]*cluster{},
	}
}

// Apply implements [gateway.DataPlane].
func (s *Sidecar) Apply(t *gateway.Table) {
	s.mu.Lock()
	s.next = t
	s.mu.Unlock()
	select {
	case s.wake <- struct{}{}:
	default: // it is awake already, and will take the newest
	}
}

// Run implements [gateway.DataPlane].
func (s *Sidecar) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer close(s.done)
	defer func() {
		cancel()
		s.mu.Lock()
		for name, l := range s.listeners {
			l.close()
			delete(s.listeners, name)
		}
		s.mu.Unlock()
		s.conns.closeAll()
		s.wg.Wait()
	}()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-s.wake:
		}
		s.mu.Lock()
		t := s.next
		s.next = nil
		s.mu.Unlock()
		if t == nil {
			continue
		}
		if err := s.apply(ctx, t); err != nil {
			s.cfg.Logger.Error("table not applied, the one before stays in use", "index", t.Index, "error", err)
			s.mu.Lock()
			s.lastError = err.Error()
			s.mu.Unlock()
		}
	}
}

// apply prepares all of a table, then swaps it in.
func (s *Sidecar) apply(ctx context.Context, t *gateway.Table) error {
	r := &routing{table: t, appliedAt: time.Now(), clusters: map[string]*cluster{}, listeners: map[string]*gateway.Listener{}}
	if id := t.Identity; id != nil {
		cert, err := tls.X509KeyPair([]byte(id.CertPEM), []byte(id.PrivateKeyPEM.Reveal()))
		if err != nil {
			return fmt.Errorf("load certificate of %s: %w", id.SPIFFE, err)
		}
		roots := &connect.Roots{}
		for _, p := range id.RootsPEM {
			roots.Roots = append(roots.Roots, &connect.Root{RootCert: p})
		}
		if r.verifier, err = connect.NewVerifier(roots); err != nil {
			return err
		}
		r.cert = &cert
		r.inbound = serverConfig(r)
	}
	s.mu.Lock()
	for i := range t.Clusters {
		def := &t.Clusters[i]
		old := s.clusters[def.Name]
		c := newCluster(def, old)
		s.clusters[def.Name], r.clusters[def.Name] = c, c
	}
	maps.DeleteFunc(s.clusters, func(name string, _ *cluster) bool { return r.clusters[name] == nil })
	for i := range t.Listeners {
		l := &t.Listeners[i]
		r.listeners[l.Name] = l
	}
	s.lastError = ""
	s.mu.Unlock()
	s.current.Store(r)
	s.listen(ctx, r)
	s.cfg.Logger.Debug("table applied", "index", t.Index, "listeners", len(t.Listeners), "clusters", len(t.Clusters))
	return nil
}

// listen opens and closes listeners to match r. One whose address stays is kept.
func (s *Sidecar) listen(ctx context.Context, r *routing) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for name, l := range s.listeners {
		if def := r.listeners[name]; def == nil || def.Network != l.network || def.Address != l.address {
			l.close()
			delete(s.listeners, name)
		}
	}
	for name, def := range r.listeners {
		if s.listeners[name] != nil {
			continue
		}
		lctx, cancel := context.WithCancel(ctx)
		l := &listener{name: name, network: def.Network, address: def.Address, socketMode: def.SocketMode, cancel: cancel, done: make(chan struct{})}
		s.listeners[name] = l
		s.wg.Go(func() {
			defer close(l.done)
			s.serve(lctx, l)
		})
	}
}

// Status implements [gateway.DataPlane].
func (s *Sidecar) Status() gateway.Status {
	st := gateway.Status{Refused: s.refused.Newest()}
	if r := s.current.Load(); r != nil {
		st.Applied, st.AppliedAt = r.table.Index, r.appliedAt
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	st.LastError = s.lastError
	for _, l := range s.listeners {
		st.Listeners = append(st.Listeners, l.status())
	}
	slices.SortFunc(st.Listeners, func(a, b gateway.ListenerStatus) int { return strings.Compare(a.Name, b.Name) })
	for _, c := range s.clusters {
		cs := c.status()
		tried := cs.Connected+cs.Failed > 0
		for _, e := range cs.Endpoints {
			tried = tried || e.Failed > 0
		}
		if tried {
			st.Clusters = append(st.Clusters, cs)
		}
	}
	slices.SortFunc(st.Clusters, func(a, b gateway.ClusterStatus) int { return strings.Compare(a.Name, b.Name) })
	return st
}

// refuse records that a connection was closed without reaching an endpoint.
func (s *Sidecar) refuse(ses *session, reason string, err error, serverName string) {
	ses.refused = reason
	ses.l.refuse(reason)
	if serverName != "" {
		s.sessions.named(ses, serverName)
	}
	f := gateway.Refusal{At: time.Now(), Listener: ses.l.name, Peer: ses.peer, ServerName: serverName, Reason: reason}
	if err != nil {
		f.Detail = err.Error()
	}
	s.refused.Add(f)
}

func addrString(a net.Addr) string {
	if a == nil {
		return ""
	}
	return a.String()
}

// connSet is the set of open connections, so that the end of Run closes them.
type connSet struct {
	mu     sync.Mutex
	conns  map[net.Conn]struct{}
	closed bool
}

// add returns false, and closes c, when the set has been closed.
func (s *connSet) add(c net.Conn) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		_ = c.Close() // the process is on its way out
		return false
	}
	if s.conns == nil {
		s.conns = map[net.Conn]struct{}{}
	}
	s.conns[c] = struct{}{}
	return true
}

func (s *connSet) remove(c net.Conn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.conns, c)
}

func (s *connSet) isClosed() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.closed
}

func (s *connSet) closeAll() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = true
	for c := range s.conns {
		_ = c.Close() // the process is on its way out
	}
}

var errNoIdentity = errors.New("there is no certificate yet")
