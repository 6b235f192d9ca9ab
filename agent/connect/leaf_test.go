package connect

import (
	"context"
	"errors"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/go-memdb"

	"github.com/sluicemesh/sluice/agent/catalog"
)

// fakeCA signs in process and can be rotated, stopped and made to fail.
type fakeCA struct {
	t testing.TB

	mu      sync.Mutex
	roots   *Roots
	changed chan struct{}
	iss     *Issuer
	err     error
	ttl     time.Duration
	signed  int
	chain   []string
}

func newFakeCA(t testing.TB) *fakeCA {
	f := &fakeCA{t: t, ttl: 72 * time.Hour, changed: make(chan struct{})}
	f.rotate(false)
	return f
}

// rotate makes a new root, which the old one signs too if cross is set.
func (f *fakeCA) rotate(cross bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	root, iss := mustRoot(f.t, time.Now(), 1)
	next := &Roots{TrustDomain: testTD, ActiveRootID: root.ID, Roots: []*Root{root}}
	f.chain = nil
	if f.roots != nil {
		if cross {
			x, err := f.iss.CrossSign(time.Now(), root.RootCert, 2)
			if err != nil {
				f.t.Fatal(err)
			}
			f.chain = []string{x}
			old := *f.roots.Active()
			old.Active = false
			next.Roots = append(next.Roots, &old)
		}
		close(f.changed)
		f.changed = make(chan struct{})
	}
	f.roots, f.iss = next, iss
}

func (f *fakeCA) fail(err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.err = err
}

func (f *fakeCA) count() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.signed
}

func (f *fakeCA) Roots(ws memdb.WatchSet) (*Roots, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	ws.Add(f.changed)
	return f.roots, nil
}

func (f *fakeCA) SignLeaf(_ context.Context, csrPEM string) (*Leaf, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.signed++
	if f.err != nil {
		return nil, f.err
	}
	csr, id, err := VerifyLeafCSR(csrPEM, "dc1", testTD)
	if err != nil {
		return nil, err
	}
	serial, err := RandomSerial()
	if err != nil {
		return nil, err
	}
	return f.iss.SignLeaf(time.Now(), csr, id, f.ttl, serial, f.chain...)
}

// manage runs a manager inside the bubble until the test ends.
func manage(t *testing.T, f *fakeCA, cfg LeafConfig) *LeafManager {
	cfg.Signer, cfg.Roots, cfg.Datacenter = f, f.Roots, "dc1"
	m := NewLeafManager(cfg)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- m.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return m
}

// next waits for another answer about web than the one just read.
func next(t *testing.T, m *LeafManager, timeout time.Duration) (*Leaf, error) {
	t.Helper()
	ws := memdb.NewWatchSet()
	before, _, beforeErr := m.Leaf(ws, catalog.Name("web"))
	ctx, cancel := context.WithTimeout(t.Context(), timeout)
	defer cancel()
	if err := ws.WatchCtx(ctx); err != nil {
		t.Fatalf("nothing new within %s after leaf %v, error %v", timeout, before != nil, beforeErr)
	}
	leaf, _, err := m.Leaf(nil, catalog.Name("web"))
	return leaf, err
}

func TestLeafFirstUse(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFakeCA(t)
		m := manage(t, f, LeafConfig{})
		if _, _, err := m.Leaf(nil, catalog.Name("web")); !errors.Is(err, catalog.ErrPending) {
			t.Fatalf("first read: %v, want ErrPending", err)
		}
		start := time.Now()
		leaf, err := next(t, m, time.Second)
		if err != nil {
			t.Fatal(err)
		}
		if d := time.Since(start); d != 0 {
			t.Errorf("first certificate took %s", d)
		}
		cert := mustCert(t, leaf.CertPEM)
		key, err := ParseKey(leaf.PrivateKeyPEM)
		if err != nil {
			t.Fatal(err)
		}
		if !samePublicKey(key.Public(), cert.PublicKey) {
			t.Error("key is not the certificate's")
		}
		if leaf.RootID != f.roots.ActiveRootID {
			t.Errorf("RootID is %q", leaf.RootID)
		}
		if leaf.ServiceURI != webID.URI() || leaf.Service != "web" {
			t.Errorf("leaf is %s's", leaf.ServiceURI)
		}
	})
}

func TestLeafRenewal(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFakeCA(t)
		m := manage(t, f, LeafConfig{})
		leaf, err := next(t, m, time.Second)
		if err != nil {
			t.Fatal(err)
		}
		for range 20 {
			life := leaf.ValidBefore.Sub(leaf.ValidAfter)
			renewed, err := next(t, m, life)
			if err != nil {
				t.Fatal(err)
			}
			if age := time.Since(leaf.ValidAfter); age < life*6/10 || age > life*9/10+time.Second {
				t.Errorf("renewed at age %s of %s", age, life)
			}
			if renewed.PrivateKeyPEM == leaf.PrivateKeyPEM {
				t.Error("the key was used again")
			}
			if renewed.ModifyIndex <= leaf.ModifyIndex {
				t.Errorf("index went from %d to %d", leaf.ModifyIndex, renewed.ModifyIndex)
			}
			leaf = renewed
		}
		if n := f.count(); n != 21 {
			t.Errorf("%d requests, want 21", n)
		}
	})
}

func TestLeafShortLife(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFakeCA(t)
		f.ttl = 5 * time.Minute
		m := manage(t, f, LeafConfig{})
		if _, err := next(t, m, time.Second); err != nil {
			t.Fatal(err)
		}
		if _, err := next(t, m, 2*time.Minute); err != nil {
			t.Fatal(err)
		}
		if n := f.count(); n != 2 {
			t.Errorf("%d requests, want 2", n)
		}
	})
}

func TestLeafRotation(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFakeCA(t)
		m := manage(t, f, LeafConfig{})
		first, err := next(t, m, time.Second)
		if err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Hour)

		// The old root stays trusted: there is time to spread the renewals.
		var sum time.Duration
		for range 10 {
			f.rotate(true)
			start := time.Now()
			leaf, err := next(t, m, 31*time.Second)
			if err != nil {
				t.Fatal(err)
			}
			sum += time.Since(start)
			if leaf.RootID != f.roots.ActiveRootID || leaf.RootID == first.RootID {
				t.Errorf("signed under %q, want %q", leaf.RootID, f.roots.ActiveRootID)
			}
			time.Sleep(time.Hour)
		}
		if sum == 0 {
			t.Error("ten rotations were all followed at once, not spread")
		}

		// It is gone: the certificate is worth nothing any more.
		f.rotate(false)
		start := time.Now()
		if _, err := next(t, m, time.Second); err != nil {
			t.Fatal(err)
		}
		if d := time.Since(start); d != 0 {
			t.Errorf("a certificate no one trusts was replaced after %s", d)
		}
		if n := f.count(); n != 12 {
			t.Errorf("%d requests, want 12", n)
		}
	})
}

func TestLeafBackoff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFakeCA(t)
		f.fail(errors.New("no leader"))
		m := manage(t, f, LeafConfig{})
		if _, err := next(t, m, time.Second); err == nil || errors.Is(err, catalog.ErrPending) {
			t.Fatalf("after a failure: %v, want its reason", err)
		}
		time.Sleep(10 * time.Minute)
		synctest.Wait()
		if n := f.count(); n < 10 || n > 30 {
			t.Errorf("%d attempts in 10 minutes, want one or two a minute at the end", n)
		}
		f.fail(nil)
		leaf, err := next(t, m, time.Minute+time.Second)
		if err != nil {
			t.Fatal(err)
		}

		// A renewal that fails leaves the last good one.
		f.fail(errors.New("no leader"))
		time.Sleep(leaf.ValidBefore.Sub(leaf.ValidAfter) * 95 / 100)
		synctest.Wait()
		again, fresh, err := m.Leaf(nil, catalog.Name("web"))
		if err != nil || again != leaf {
			t.Fatalf("while renewal fails: %v, %v", again, err)
		}
		if age := time.Since(fresh.AsOf); age < time.Hour {
			t.Errorf("renewal fails for long, but AsOf is %s ago", age)
		}
		if s := m.Status(); len(s) != 1 || s[0].LastError != "no leader" || s[0].FailingSince.IsZero() {
			t.Errorf("status is %+v", s)
		}
		f.fail(nil)
		if _, err := next(t, m, time.Minute+time.Second); err != nil {
			t.Fatal(err)
		}
		if _, fresh, _ := m.Leaf(nil, catalog.Name("web")); !fresh.AsOf.Equal(time.Now()) {
			t.Errorf("AsOf is %s ago", time.Since(fresh.AsOf))
		}
	})
}

func TestLeafIdle(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFakeCA(t)
		f.ttl = 8000 * time.Hour
		m := manage(t, f, LeafConfig{})
		if _, err := next(t, m, time.Second); err != nil {
			t.Fatal(err)
		}
		// A reader that only waits is using it: it is woken, comes back, and the
		// certificate stays.
		leaf, err := next(t, m, 73*time.Hour)
		if err != nil || leaf == nil {
			t.Fatalf("waiting reader: %v", err)
		}
		if n := f.count(); n != 1 {
			t.Errorf("%d requests, want 1", n)
		}
		time.Sleep(72*time.Hour + 2*time.Minute)
		synctest.Wait()
		if n := len(m.Status()); n != 0 {
			t.Errorf("%d certificates kept after three idle days", n)
		}
	})
}

// wrongCA answers with somebody else's certificate.
type wrongCA struct {
	*fakeCA
	id ServiceID
}

func (w wrongCA) SignLeaf(ctx context.Context, _ string) (*Leaf, error) {
	key, err := NewKey("ec", 256)
	if err != nil {
		return nil, err
	}
	csr, err := NewLeafCSR(w.id, key)
	if err != nil {
		return nil, err
	}
	return w.fakeCA.SignLeaf(ctx, csr)
}

func TestLeafWrongAnswer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFakeCA(t)
		m := manage(t, f, LeafConfig{})
		m.cfg.Signer = wrongCA{f, webID} // nothing was asked for yet
		if leaf, err := next(t, m, time.Second); err == nil {
			t.Fatalf("accepted %v", leaf.ServiceURI)
		}
	})
}
