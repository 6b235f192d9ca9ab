package connect

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/go-memdb"

	"github.com/sluicemesh/sluice/agent/catalog"
)

// LeafSigner has leaf certificates signed by the datacenter's CA.
type LeafSigner interface {
	// SignLeaf returns the certificate for a request (PEM), without a key.
	SignLeaf(ctx context.Context, csrPEM string) (*Leaf, error)
}

// LeafConfig configures a [LeafManager].
type LeafConfig struct {
	Signer LeafSigner
	// Roots returns the trusted roots and adds to ws a channel that closes when
	// they change; see proxycfg.Source.
	Roots      func(ws memdb.WatchSet) (*Roots, error)
	Datacenter string
	Logger     hclog.Logger // nil logs nothing

	// RootChangeSpread is the time over which certificates are renewed after the
	// signing CA changed, so that not every agent asks at once. 0 means 30 s,
	// less than 0 none.
	RootChangeSpread time.Duration
	// MaxBackoff limits the pause after failures. 0 means 1 minute.
	MaxBackoff time.Duration
	// IdleTimeout is how long an unused certificate is kept up. 0 means 72 h.
	IdleTimeout time.Duration
	// SignTimeout limits one request. 0 means 30 s.
	SignTimeout time.Duration
}

const (
	minBackoff = time.Second
	// pokeGrace is how long readers that wait on an idle certificate have to
	// come back for it before it is dropped.
	pokeGrace = time.Minute
	// maxSigning limits how many requests one agent has under way.
	maxSigning = 8
	// shortLife is the lifetime below which a certificate is renewed early in
	// it: clocks and retries need more than what 60 % would leave.
	shortLife = 10 * time.Minute
	// verifyGrace keeps a certificate that does not verify yet, because the new
	// root has reached its signer but not this agent, from being renewed in a
	// tight loop.
	verifyGrace = 10 * time.Second
)

// LeafManager keeps the certificates of this agent's services: it has one
// signed when it is first asked for, renews it in time, replaces it when the
// signing CA changes, and goes on serving the last good one whatever fails. A
// private key serves one certificate only and never leaves the agent.
//
// Reads may be made at any time; certificates are signed while Run runs.
type LeafManager struct {
	cfg LeafConfig
	log hclog.Logger

	wake chan struct{} // capacity 1: something is due earlier than Run knows

	mu      sync.Mutex // guards what follows, entries' fields included
	entries map[catalog.ServiceName]*leafEntry
	signing int
	index   uint64 // of the newest certificate
}

type leafEntry struct {
	leaf    *Leaf
	signer  string        // key ID of what signed leaf
	changed chan struct{} // closed when leaf or err changes
	err     error         // why the last attempt failed
	failing time.Time     // since when attempts fail; zero while they do not

	issued   time.Time
	renewAt  time.Time // by age
	rotateTo string    // signing key whose rotation is scheduled
	rotateAt time.Time
	retryAt  time.Time // not before, after a failure
	attempts int
	busy     bool

	used  time.Time
	poked time.Time // when idle readers were woken; zero if not
}

// NewLeafManager starts nothing.
func NewLeafManager(cfg LeafConfig) *LeafManager {
	if cfg.Logger == nil {
		cfg.Logger = hclog.NewNullLogger()
	}
	if cfg.RootChangeSpread == 0 {
		cfg.RootChangeSpread = 30 * time.Second
	}
	if cfg.MaxBackoff == 0 {
		cfg.MaxBackoff = time.Minute
	}
	if cfg.IdleTimeout == 0 {
		cfg.IdleTimeout = 72 * time.Hour
	}
	if cfg.SignTimeout == 0 {
		cfg.SignTimeout = 30 * time.Second
	}
	return &LeafManager{
		cfg:     cfg,
		log:     cfg.Logger.Named("leaf"),
		wake:    make(chan struct{}, 1),
		entries: map[catalog.ServiceName]*leafEntry{},
	}
}

// Leaf returns the current certificate of a service. The first use has it
// signed: until then the error is [catalog.ErrPending], or, after an attempt
// that failed, why. A channel in ws closes when there is another answer. The
// leaf is shared and immutable.
//
// AsOf is now, unless a renewal that is due fails: then it is since when.
func (m *LeafManager) Leaf(ws memdb.WatchSet, service catalog.ServiceName) (*Leaf, catalog.Freshness, error) {
	service = service.Canonical()
	now := time.Now()
	m.mu.Lock()
	defer m.mu.Unlock()
	e := m.entries[service]
	if e == nil {
		e = &leafEntry{changed: make(chan struct{})}
		m.entries[service] = e
		m.poke()
	}
	e.used, e.poked = now, time.Time{}
	ws.Add(e.changed)
	if e.leaf == nil {
		if e.err != nil {
			return nil, catalog.Freshness{}, fmt.Errorf("sign leaf of %q: %w", service, e.err)
		}
		return nil, catalog.Freshness{}, catalog.ErrPending
	}
	f := catalog.Freshness{Index: e.leaf.ModifyIndex, AsOf: now}
	if !e.failing.IsZero() {
		f.AsOf = e.failing
	}
	return e.leaf, f, nil
}

// LeafStatus says how the keeping of one certificate fares.
type LeafStatus struct {
	Service     catalog.ServiceName
	ValidBefore time.Time // zero while there is none
	RenewAt     time.Time // the next time it is replaced, unless the CA changes
	// FailingSince is zero while the last attempt succeeded.
	FailingSince time.Time
	LastError    string
}

// Status returns the state of every certificate kept, in no order.
func (m *LeafManager) Status() []LeafStatus {
	m.mu.Lock()
	defer m.mu.Unlock()
	out := make([]LeafStatus, 0, len(m.entries))
	for name, e := range m.entries {
		s := LeafStatus{Service: name, RenewAt: e.renewAt, FailingSince: e.failing}
		if e.leaf != nil {
			s.ValidBefore = e.leaf.ValidBefore
		}
		if e.err != nil {
			s.LastError = e.err.Error()
		}
		out = append(out, s)
	}
	return out
}

func (m *LeafManager) poke() {
	select {
	case m.wake <- struct{}{}:
	default:
	}
}

// Run keeps the certificates until ctx ends, and returns once every request has
// ended. It is to be called once.
func (m *LeafManager) Run(ctx context.Context) error {
	var wg sync.WaitGroup
	defer wg.Wait()
	var rootsAt rootsView
	for ctx.Err() == nil {
		m.pass(ctx, &wg, &rootsAt)
	}
	return nil
}

// rootsView is the roots as the last pass saw them, with what is derived.
type rootsView struct {
	roots    *Roots
	verifier *Verifier
}

// pass starts what is due and waits for the next reason to look again.
func (m *LeafManager) pass(ctx context.Context, wg *sync.WaitGroup, view *rootsView) {
	ws := memdb.NewWatchSet()
	roots, err := m.cfg.Roots(ws)
	switch {
	case err != nil:
		if !errors.Is(err, catalog.ErrPending) {
			m.log.Debug("roots not readable", "error", err)
		}
	case roots != view.roots:
		v, err := NewVerifier(roots)
		if err != nil {
			m.log.Error("cannot use roots", "error", err)
			break
		}
		*view = rootsView{roots: roots, verifier: v}
	}
	next := m.start(ctx, wg, *view)
	if err != nil {
		next = minTime(next, time.Now().Add(minBackoff)) // roots may come without a wake
	}

	rootsChanged, stop := watch(ctx, ws)
	defer stop()
	var timer <-chan time.Time
	if !next.IsZero() {
		t := time.NewTimer(time.Until(next))
		defer t.Stop()
		timer = t.C
	}
	select {
	case <-ctx.Done():
	case <-m.wake:
	case <-timer:
	case <-rootsChanged:
	}
}

// watch returns a channel that closes when a channel in ws does. The caller
// must call stop, which waits for the watching to end.
func watch(ctx context.Context, ws memdb.WatchSet) (changed <-chan struct{}, stop func()) {
	ctx, cancel := context.WithCancel(ctx)
	fired, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		if ws.WatchCtx(ctx) == nil {
			close(fired)
		}
	}()
	return fired, func() {
		cancel()
		<-ended
	}
}

// start begins the requests that are due and returns when the next thing is, the
// zero time for never.
func (m *LeafManager) start(ctx context.Context, wg *sync.WaitGroup, view rootsView) time.Time {
	now := time.Now()
	var next time.Time
	m.mu.Lock()
	defer m.mu.Unlock()
	for name, e := range m.entries {
		if e.busy {
			continue
		}
		if idleAt := e.used.Add(m.cfg.IdleTimeout); !now.Before(idleAt) {
			switch {
			case e.poked.IsZero():
				e.poked = now
				e.notify()
			case !now.Before(e.poked.Add(pokeGrace)):
				delete(m.entries, name)
				e.notify()
				continue
			}
			next = minTime(next, e.poked.Add(pokeGrace))
		} else {
			next = minTime(next, idleAt)
		}
		if view.roots == nil {
			continue // without them there is no trust domain to ask for
		}
		m.schedule(now, e, view)
		due := e.due()
		if due.After(now) {
			next = minTime(next, due)
			continue
		}
		if m.signing >= maxSigning {
			continue // the end of a request wakes us
		}
		m.signing++
		e.busy = true
		id := ServiceID{TrustDomain: view.roots.TrustDomain, Service: name, Datacenter: m.cfg.Datacenter}
		wg.Go(func() { m.sign(ctx, id, view) })
	}
	return next
}

// schedule notices that another CA signs than the one that signed the leaf.
func (m *LeafManager) schedule(now time.Time, e *leafEntry, view rootsView) {
	active := view.roots.Active()
	if e.leaf == nil || active == nil || active.SigningKeyID == e.signer {
		e.rotateTo, e.rotateAt = "", time.Time{}
		return
	}
	if e.rotateTo != active.SigningKeyID {
		e.rotateTo = active.SigningKeyID
		e.rotateAt = now.Add(jitter(m.cfg.RootChangeSpread))
	}
	if now.Sub(e.issued) >= verifyGrace && !e.rotateAt.Before(now) {
		if chain, err := ParseCerts(e.leaf.CertPEM); err != nil || view.verifier.Verify(chain, now, nil) != nil {
			e.rotateAt = now // nobody trusts it any more: waiting gains nothing
		}
	}
}

// due returns when the next request for e is to be made.
func (e *leafEntry) due() time.Time {
	due := e.renewAt
	if e.leaf == nil {
		due = time.Time{}
	} else if !e.rotateAt.IsZero() {
		due = minTime(due, e.rotateAt)
	}
	if e.retryAt.After(due) {
		return e.retryAt
	}
	return due
}

func (e *leafEntry) notify() {
	close(e.changed)
	e.changed = make(chan struct{})
}

// sign makes one attempt to get the certificate of id and records the outcome.
func (m *LeafManager) sign(ctx context.Context, id ServiceID, view rootsView) {
	sctx, cancel := context.WithTimeout(ctx, m.cfg.SignTimeout)
	leaf, signer, err := m.request(sctx, id)
	cancel()
	roots := view.roots
	if r, err := m.cfg.Roots(nil); err == nil {
		roots = r // they may have changed while it was signed
	}

	now := time.Now()
	m.mu.Lock()
	defer m.mu.Unlock()
	defer m.poke()
	m.signing--
	e := m.entries[id.Service]
	e.busy = false // only start drops entries, and not busy ones
	if err != nil {
		if ctx.Err() != nil {
			return
		}
		m.failed(now, e, err)
		m.log.Warn("cannot sign certificate", "service", id.Service.String(), "retry_in", e.retryAt.Sub(now), "error", err)
		return
	}
	leaf.RootID = signedUnder(roots, signer)
	m.index = max(m.index+1, leaf.ModifyIndex)
	leaf.ModifyIndex = m.index
	if leaf.CreateIndex == 0 {
		leaf.CreateIndex = m.index
	}
	e.leaf, e.signer, e.issued = leaf, signer, now
	e.renewAt = renewalTime(leaf, now)
	e.rotateTo, e.rotateAt, e.retryAt = "", time.Time{}, time.Time{}
	e.err, e.attempts, e.failing = nil, 0, time.Time{}
	e.notify()
	m.log.Debug("certificate signed", "service", id.Service.String(), "valid_before", leaf.ValidBefore, "renew_at", e.renewAt)
}

// failed records a failure and decides when to try again.
func (m *LeafManager) failed(now time.Time, e *leafEntry, err error) {
	e.attempts++
	wait := min(minBackoff<<min(e.attempts-1, 16), m.cfg.MaxBackoff)
	if e.leaf != nil && strings.Contains(err.Error(), ErrRateLimited.Error()) && m.cfg.RootChangeSpread > 0 {
		wait = max(minBackoff, jitter(m.cfg.RootChangeSpread)) // everyone renews now: take another place in the queue
	} else {
		wait = wait/2 + jitter(wait/2)
	}
	e.retryAt = now.Add(wait)
	if e.failing.IsZero() {
		e.failing = now
	}
	// Readers are woken by another answer, not by the same failure again.
	same := e.err != nil && e.err.Error() == err.Error()
	e.err = err
	if e.leaf == nil && !same {
		e.notify()
	}
}

// request makes a new key and has its certificate signed and checked.
func (m *LeafManager) request(ctx context.Context, id ServiceID) (*Leaf, string, error) {
	key, err := NewKey("ec", 256)
	if err != nil {
		return nil, "", err
	}
	csr, err := NewLeafCSR(id, key)
	if err != nil {
		return nil, "", err
	}
	signed, err := m.cfg.Signer.SignLeaf(ctx, csr)
	if err != nil {
		return nil, "", err
	}
	cert, err := ParseCert(signed.CertPEM)
	if err != nil {
		return nil, "", err
	}
	if !samePublicKey(key.Public(), cert.PublicKey) {
		return nil, "", errors.New("the certificate is for another key")
	}
	if got, err := PeerIdentity(cert); err != nil || got.URI() != id.URI() {
		return nil, "", errors.New("the certificate is for another identity")
	}
	leaf := *signed
	if leaf.PrivateKeyPEM, err = EncodeKey(key); err != nil {
		return nil, "", err
	}
	leaf.Service, leaf.ServiceURI = id.Service.Name, id.URI()
	leaf.ValidAfter, leaf.ValidBefore = cert.NotBefore, cert.NotAfter
	return &leaf, colonHex(cert.AuthorityKeyId), nil
}

// signedUnder returns the ID of the root that signs with a key, "" if none of
// those known does.
func signedUnder(roots *Roots, signer string) string {
	for _, r := range roots.Roots {
		if r.SigningKeyID == signer {
			return r.ID
		}
	}
	return ""
}

// renewalTime draws when to replace a certificate: between 60 and 90 % of its
// lifetime, so that certificates made together are not renewed together, or
// soon where it lives only briefly.
func renewalTime(l *Leaf, now time.Time) time.Time {
	life := l.ValidBefore.Sub(l.ValidAfter)
	if life < shortLife {
		return now.Add(max(time.Second, l.ValidBefore.Sub(now)*3/10))
	}
	at := l.ValidAfter.Add(life*6/10 + jitter(life*3/10))
	if at.Before(now) {
		return now.Add(time.Second) // a clock is far off: do not spin
	}
	return at
}

// jitter draws a duration from [0, d).
func jitter(d time.Duration) time.Duration {
	if d <= 0 {
		return 0
	}
	return rand.N(d)
}

// minTime returns the earlier of two times, where zero is none.
func minTime(a, b time.Time) time.Time {
	if a.IsZero() || !b.IsZero() && b.Before(a) {
		return b
	}
	return a
}
