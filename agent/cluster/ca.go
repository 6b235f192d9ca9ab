package cluster

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"reflect"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/go-memdb"
	"github.com/hashicorp/go-uuid"
	"golang.org/x/time/rate"

	"github.com/sluicemesh/sluice/agent/connect"
	"github.com/sluicemesh/sluice/agent/state"
)

const (
	// signWait is how long a request waits for its turn when the CA is at its
	// limit.
	signWait = 500 * time.Millisecond
	// caCheck is how often roots are pruned and the intermediate's age is looked
	// at.
	caCheck = time.Hour
)

// ca is the certificate authority of a leader.
//
// Serial numbers: those of CA certificates are counted in the replicated state,
// they are few and shown to people. Those of leaves are random (62 bits), so that
// signing one writes nothing to the log, and a new leader cannot give out a number
// twice.
type ca struct {
	// change is held (by sending) while the stored CA is read, judged and
	// written, so that one such change sees the outcome of the one before.
	change chan struct{}
	active atomic.Pointer[activeCA] // nil: cannot sign

	mu    sync.Mutex // guards what follows
	limit *rate.Limiter
	slots chan struct{} // one per concurrent request; nil is no limit
}

// activeCA is what leaves are signed with, immutable.
type activeCA struct {
	issuer      *connect.Issuer
	clusterID   string
	trustDomain string
	rootID      string
	chain       []string // PEM, sent after a leaf
	settings    connect.Settings
	// What it was made from.
	rootsIndex, configIndex, stateIndex uint64
}

func newCA() *ca { return &ca{change: make(chan struct{}, 1)} }

// lock waits until no other change is under way.
func (c *ca) lock(ctx context.Context) error {
	select {
	case c.change <- struct{}{}:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

func (c *ca) unlock() { <-c.change }

// retire ends signing with the term.
func (c *ca) retire() { c.active.Store(nil) }

// publish makes a the authority that signs.
func (c *ca) publish(a *activeCA) {
	c.mu.Lock()
	defer c.mu.Unlock()
	s := a.settings
	switch {
	case s.CSRMaxPerSecond <= 0:
		c.limit = nil
	case c.limit == nil:
		c.limit = rate.NewLimiter(rate.Limit(s.CSRMaxPerSecond), 1)
	default:
		c.limit.SetLimit(rate.Limit(s.CSRMaxPerSecond))
	}
	want := 0
	if c.limit == nil {
		want = s.CSRMaxConcurrent
	}
	if cap(c.slots) != want {
		c.slots = nil
		if want > 0 {
			c.slots = make(chan struct{}, want)
		}
	}
	c.active.Store(a)
}

// admit waits for this request's turn. The caller must call done.
func (c *ca) admit(ctx context.Context) (done func(), err error) {
	c.mu.Lock()
	limit, slots := c.limit, c.slots
	c.mu.Unlock()
	wctx, cancel := context.WithTimeout(ctx, signWait)
	defer cancel()
	done = func() {}
	if limit != nil {
		err = limit.Wait(wctx)
	} else if slots != nil {
		select {
		case slots <- struct{}{}:
			done = func() { <-slots }
		case <-wctx.Done():
			err = wctx.Err()
		}
	}
	if err == nil {
		return done, nil
	}
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	return nil, connect.ErrRateLimited
}

// SignLeaf signs a leaf certificate request (PEM). Its index is that of the
// state it was signed under.
func (l *leader) SignLeaf(ctx context.Context, csrPEM string) (*connect.Leaf, error) {
	a := l.ca.active.Load()
	if a == nil {
		return nil, connect.ErrUninitialized
	}
	csr, id, err := connect.VerifyLeafCSR(csrPEM, l.cfg.Datacenter, a.trustDomain)
	if err != nil {
		return nil, err
	}
	done, err := l.ca.admit(ctx)
	if err != nil {
		return nil, err
	}
	defer done()
	serial, err := connect.RandomSerial()
	if err != nil {
		return nil, err
	}
	leaf, err := a.issuer.SignLeaf(time.Now(), csr, id, a.settings.LeafCertTTL, serial, a.chain...)
	if err != nil {
		return nil, err
	}
	leaf.RootID = a.rootID
	leaf.CreateIndex = l.core.Store().LastIndex()
	leaf.ModifyIndex = leaf.CreateIndex
	return leaf, nil
}

// SignIntermediate signs the CA of another datacenter; in the primary only.
func (l *leader) SignIntermediate(ctx context.Context, csrPEM string) (string, error) {
	if !l.isPrimary() {
		return "", fmt.Errorf("sign intermediate: %q is not the primary datacenter", l.cfg.Datacenter)
	}
	a, err := l.currentCA(ctx)
	if err != nil {
		return "", err
	}
	serial, err := l.nextSerial(ctx)
	if err != nil {
		return "", fmt.Errorf("sign intermediate: %w", err)
	}
	return a.issuer.SignIntermediate(time.Now(), csrPEM, a.clusterID, a.settings.IntermediateCertTTL, serial)
}

// currentCA returns the authority for the roots as they are stored now: who has
// just read of a new root asks for an intermediate under that.
func (l *leader) currentCA(ctx context.Context) (*activeCA, error) {
	if l.ca.active.Load() == nil {
		return nil, connect.ErrUninitialized
	}
	if err := l.ca.lock(ctx); err != nil {
		return nil, err
	}
	defer l.ca.unlock()
	if err := l.reloadCA(); err != nil {
		return nil, err
	}
	return l.ca.active.Load(), nil
}

// nextSerial takes a serial number for a CA certificate.
func (l *leader) nextSerial(ctx context.Context) (uint64, error) {
	res, _, err := l.core.Apply(ctx, state.CASerialCommand())
	if err != nil {
		return 0, fmt.Errorf("take serial number: %w", err)
	}
	n, ok := res.(uint64)
	if !ok {
		return 0, fmt.Errorf("take serial number: unexpected answer %v", res)
	}
	return n, nil
}

// caRecords is the stored CA, read at one moment by the holder of ca.change.
type caRecords struct {
	roots  *connect.Roots
	config *connect.CAConfig
	state  *connect.CAState

	rootsIndex, configIndex, stateIndex uint64
}

func (l *leader) readCA(ws memdb.WatchSet) (r caRecords, err error) {
	store := l.core.Store()
	if r.rootsIndex, r.roots, err = store.CARoots(ws); err != nil {
		return r, err
	}
	if r.configIndex, r.config, err = store.CAConfig(ws); err != nil {
		return r, err
	}
	if r.stateIndex, r.state, err = store.CAState(ws); err != nil {
		return r, err
	}
	if r.state == nil {
		r.state = &connect.CAState{}
	}
	return r, nil
}

// writeCA replaces the three records as one.
func (l *leader) writeCA(ctx context.Context, was caRecords, roots *connect.Roots, config *connect.CAConfig, st *connect.CAState) error {
	c, s := *config, *st
	c.ModifyIndex, s.ModifyIndex = 0, 0 // the roots' comparison guards all three
	return l.apply(ctx, state.BatchCommand(
		state.CARootsCommand(was.rootsIndex, roots), state.CAConfigCommand(&c), state.CAStateCommand(&s)))
}

// loadCA makes the stored CA the one that signs. The caller holds ca.change. It
// returns false if the store has no key to sign under the active root with.
func (l *leader) loadCA(r caRecords) (bool, error) {
	active := r.roots.Active()
	if active == nil || r.config == nil {
		return false, nil
	}
	if a := l.ca.active.Load(); a != nil && a.rootsIndex == r.rootsIndex && a.configIndex == r.configIndex && a.stateIndex == r.stateIndex {
		return true, nil
	}
	certPEM, key := r.state.RootCertPEM, r.state.RootKeyPEM
	if !l.isPrimary() {
		certPEM, key = r.state.IntermediateCertPEM, r.state.IntermediateKeyPEM
	}
	if certPEM == "" || key == "" {
		return false, nil
	}
	issuer, err := connect.NewIssuer(certPEM, key)
	if err != nil {
		return false, fmt.Errorf("load CA: %w", err)
	}
	if connect.SigningKeyID(issuer.Cert()) != active.SigningKeyID {
		return false, nil
	}
	settings, err := connect.ParseCAConfig(r.config.Provider, r.config.Config)
	if err != nil {
		return false, fmt.Errorf("load CA: %w", err)
	}
	l.ca.publish(&activeCA{
		issuer: issuer, clusterID: r.config.ClusterID, trustDomain: r.roots.TrustDomain, rootID: active.ID,
		chain: active.IntermediateCerts, settings: settings,
		rootsIndex: r.rootsIndex, configIndex: r.configIndex, stateIndex: r.stateIndex,
	})
	return true, nil
}

// primaryCALoop initialises the CA where it is not, signs with what is stored,
// and prunes old roots.
func (l *leader) primaryCALoop(ctx context.Context) error {
	return l.do(ctx, duty{name: "certificate authority", every: caCheck, pass: l.primaryCA})
}

func (l *leader) primaryCA(ctx context.Context, ws memdb.WatchSet) error {
	if err := l.ca.lock(ctx); err != nil {
		return err
	}
	defer l.ca.unlock()
	r, err := l.readCA(ws)
	if err != nil {
		return err
	}
	ok, err := l.loadCA(r)
	if err != nil {
		return err
	}
	if !ok {
		if err := l.initPrimaryCA(ctx, r); err != nil {
			return fmt.Errorf("initialise CA: %w", err)
		}
		return l.reloadCA()
	}
	if err := l.pruneRoots(ctx, r); err != nil {
		return fmt.Errorf("prune roots: %w", err)
	}
	return nil
}

// reloadCA is loadCA of what was just written.
func (l *leader) reloadCA() error {
	r, err := l.readCA(nil)
	if err != nil {
		return err
	}
	ok, err := l.loadCA(r)
	if err == nil && !ok {
		err = errors.New("load CA: the stored key does not belong to the active root")
	}
	return err
}

// initPrimaryCA makes the first root, or a new one where there is a root that
// this datacenter has no key of: it was a secondary until now.
func (l *leader) initPrimaryCA(ctx context.Context, r caRecords) error {
	config := r.config
	if config == nil {
		provider := l.cfg.CAProvider
		if provider == "" {
			provider = connect.ProviderBuiltin
		}
		config = &connect.CAConfig{Provider: provider, Config: connect.CanonicalCAConfig(l.cfg.CAConfig)}
	} else {
		c := *config
		config = &c
	}
	settings, err := connect.ParseCAConfig(config.Provider, config.Config)
	if err != nil {
		return err
	}
	if config.ClusterID == "" {
		config.ClusterID = settings.ClusterID
	}
	if config.ClusterID == "" {
		if config.ClusterID, err = uuid.GenerateUUID(); err != nil {
			return fmt.Errorf("generate cluster id: %w", err)
		}
	}
	serial, err := l.nextSerial(ctx)
	if err != nil {
		return err
	}
	now := time.Now()
	root, key, err := connect.NewRoot(now, config.ClusterID, settings, serial)
	if err != nil {
		return err
	}
	roots := rotated(r.roots, root, now)
	if err := l.writeCA(ctx, r, roots, config, &connect.CAState{RootKeyPEM: key, RootCertPEM: root.RootCert}); err != nil {
		return err
	}
	l.log.Info("CA initialised", "cluster_id", config.ClusterID, "root", root.ID)
	return nil
}

// rotated returns the roots with next as the active one.
func rotated(old *connect.Roots, next *connect.Root, now time.Time) *connect.Roots {
	out := &connect.Roots{ActiveRootID: next.ID, TrustDomain: connect.TrustDomain(next.ExternalTrustDomain)}
	if old != nil {
		for _, o := range old.Roots {
			if o.ID == next.ID {
				continue
			}
			c := *o
			if c.Active {
				c.Active, c.RotatedOutAt = false, now.UTC()
			}
			out.Roots = append(out.Roots, &c)
		}
	}
	out.Roots = append(out.Roots, next)
	return out
}

// pruneRoots forgets roots under which no leaf is valid any more.
func (l *leader) pruneRoots(ctx context.Context, r caRecords) error {
	a := l.ca.active.Load()
	if a == nil {
		return nil
	}
	next := *r.roots
	next.Roots = nil
	var gone []string
	for _, root := range r.roots.Roots {
		if !root.Active && !root.RotatedOutAt.IsZero() && time.Since(root.RotatedOutAt) > 2*a.settings.LeafCertTTL {
			gone = append(gone, root.ID)
			continue
		}
		next.Roots = append(next.Roots, root)
	}
	if len(gone) == 0 {
		return nil
	}
	if err := l.apply(ctx, state.CARootsCommand(r.rootsIndex, &next)); err != nil {
		return err
	}
	l.log.Info("old CA roots pruned", "roots", strings.Join(gone, ", "))
	return nil
}

// SetCAConfig replaces the configuration of the CA; in the primary only. Where
// it asks for another key, the root is rotated, the old one signs the new.
func (l *leader) SetCAConfig(ctx context.Context, c *connect.CAConfig) error {
	if !l.isPrimary() {
		return fmt.Errorf("update CA configuration: %q is not the primary datacenter", l.cfg.Datacenter)
	}
	if l.ca.active.Load() == nil {
		return connect.ErrNotFinished
	}
	if err := l.ca.lock(ctx); err != nil {
		return err
	}
	defer l.ca.unlock()
	r, err := l.readCA(nil)
	if err != nil {
		return err
	}
	active := r.roots.Active()
	if r.config == nil || active == nil {
		return connect.ErrNotFinished
	}
	next := &connect.CAConfig{
		ClusterID: r.config.ClusterID, Provider: c.Provider, Config: connect.CanonicalCAConfig(c.Config), State: r.config.State,
		ForceWithoutCrossSigning: c.ForceWithoutCrossSigning,
	}
	if next.Provider == "" {
		next.Provider = r.config.Provider
	}
	if len(c.State) > 0 && !maps.Equal(c.State, r.config.State) {
		return connect.ErrStateReadOnly
	}
	if c.ModifyIndex != 0 && c.ModifyIndex != r.config.ModifyIndex {
		return fmt.Errorf("update CA configuration: %w", errMissed)
	}
	settings, err := connect.ParseCAConfig(next.Provider, next.Config)
	if err != nil {
		return fmt.Errorf("error configuring provider: %w", err)
	}
	if settings.ClusterID != "" && settings.ClusterID != strings.ToLower(next.ClusterID) {
		return fmt.Errorf("error configuring provider: cluster ID cannot change from %q", next.ClusterID)
	}
	was, err := connect.ParseCAConfig(r.config.Provider, r.config.Config)
	if err != nil {
		return fmt.Errorf("update CA configuration: read the current one: %w", err)
	}
	if next.Provider == r.config.Provider && reflect.DeepEqual(next.Config, r.config.Config) {
		return nil
	}
	if next.Provider == r.config.Provider && settings.SameKeyMaterial(was) {
		if err := l.apply(ctx, state.CAConfigCommand(next)); err != nil {
			return fmt.Errorf("update CA configuration: %w", err)
		}
		return l.reloadCA()
	}
	if err := l.rotateRoot(ctx, r, next, settings); err != nil {
		return err
	}
	return l.reloadCA()
}

// rotateRoot makes a new root the active one. The caller holds ca.change.
func (l *leader) rotateRoot(ctx context.Context, r caRecords, next *connect.CAConfig, settings connect.Settings) error {
	serial, err := l.nextSerial(ctx)
	if err != nil {
		return err
	}
	now := time.Now()
	root, key, err := connect.NewRoot(now, next.ClusterID, settings, serial)
	if err != nil {
		return fmt.Errorf("error configuring provider: %w", err)
	}
	old := r.roots.Active()
	roots := r.roots
	if root.ID != old.ID {
		cross, err := l.crossSign(ctx, root)
		switch {
		case err == nil:
			root.IntermediateCerts = []string{cross}
		case next.ForceWithoutCrossSigning:
			l.log.Warn("CA root rotates without a cross-signature", "error", err)
		default:
			return fmt.Errorf("the current CA cannot cross-sign the new root; with ForceWithoutCrossSigning it is replaced all the same, "+
				"and connections fail until everyone trusts the new one: %w", err)
		}
		roots = rotated(r.roots, root, now)
	}
	if err := l.writeCA(ctx, r, roots, next, &connect.CAState{RootKeyPEM: key, RootCertPEM: root.RootCert}); err != nil {
		return fmt.Errorf("rotate CA root: %w", err)
	}
	l.log.Info("CA root rotated", "old_root", old.ID, "root", root.ID)
	return nil
}

func (l *leader) crossSign(ctx context.Context, root *connect.Root) (string, error) {
	a := l.ca.active.Load()
	if a == nil {
		return "", connect.ErrUninitialized
	}
	serial, err := l.nextSerial(ctx)
	if err != nil {
		return "", err
	}
	return a.issuer.CrossSign(time.Now(), root.RootCert, serial)
}
