package cluster

import (
	"bytes"
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"net/http"
	"reflect"
	"time"

	"github.com/hashicorp/go-memdb"

	"github.com/sluicemesh/sluice/acl"
	"github.com/sluicemesh/sluice/agent/connect"
)

// keyPair is a CA certificate (PEM) with its key.
type keyPair struct {
	cert string
	key  acl.Secret
}

// secondaryCALoop follows the primary's roots and keeps an intermediate under
// the active one, which signs this datacenter's leaves. What is stored signs from
// the start of a term, whether the primary can be reached or not. A pass, news or
// none, also sees to the intermediate's age.
func (l *leader) secondaryCALoop(ctx context.Context) error {
	if err := l.resumeCA(ctx); err != nil {
		l.log.Error("cannot use the stored CA", "error", err) // the loop replaces it
	}
	remote := follower{path: "/v1/connect/ca/roots"}
	return l.do(ctx, duty{name: "certificate authority", wake: &l.wan, pass: func(ctx context.Context, _ memdb.WatchSet) error {
		var roots connect.Roots
		if err := remote.next(ctx, l, &roots); err != nil {
			return err
		}
		if err := l.followRoots(ctx, &roots); err != nil {
			remote.reset()
			return fmt.Errorf("follow the primary's CA: %w", err)
		}
		return nil
	}})
}

func (l *leader) resumeCA(ctx context.Context) error {
	if err := l.ca.lock(ctx); err != nil {
		return err
	}
	defer l.ca.unlock()
	r, err := l.readCA(nil)
	if err != nil {
		return err
	}
	_, err = l.loadCA(r)
	return err
}

func pastHalfLife(c *x509.Certificate, now time.Time) bool {
	return now.After(c.NotBefore.Add(c.NotAfter.Sub(c.NotBefore) / 2))
}

// followRoots makes the stored CA what the primary's roots ask for: the same
// roots, the active one with an intermediate of our own. If the primary does not
// sign that now, leaves go on being signed under the root they were, as long as
// that is trusted, and the error says so.
func (l *leader) followRoots(ctx context.Context, primary *connect.Roots) error {
	for _, root := range primary.Roots {
		if root == nil {
			return errors.New("an empty root")
		}
	}
	active := primary.Active()
	if active == nil {
		return connect.ErrNotFinished
	}
	if connect.TrustDomain(active.ExternalTrustDomain) != primary.TrustDomain {
		return fmt.Errorf("root %q is not of the trust domain %q", active.ID, primary.TrustDomain)
	}
	if err := l.ca.lock(ctx); err != nil {
		return err
	}
	defer l.ca.unlock()
	r, err := l.readCA(nil)
	if err != nil {
		return err
	}
	config, settings, err := l.secondaryConfig(r, active.ExternalTrustDomain)
	if err != nil {
		return err
	}

	own := keyPair{r.state.IntermediateCertPEM, r.state.IntermediateKeyPEM}
	fits := checkIntermediate(own, active, time.Now())
	var failed error
	if fits == nil {
		cert, err := connect.ParseCert(own.cert)
		if err != nil {
			return err
		}
		if pastHalfLife(cert, time.Now()) {
			if renewed, err := l.newIntermediate(ctx, active, settings); err != nil {
				failed = err
			} else {
				own = renewed
			}
		}
	} else {
		next, err := l.newIntermediate(ctx, active, settings)
		if err != nil {
			failed = err
			if active = stillTrusted(r.roots, primary); active == nil {
				return err
			}
			if why := checkIntermediate(own, active, time.Now()); why != nil {
				return errors.Join(err, why)
			}
		} else {
			own = next
		}
	}
	roots, err := secondaryRoots(primary, active, own.cert)
	if err != nil {
		return err
	}
	st := &connect.CAState{IntermediateCertPEM: own.cert, IntermediateKeyPEM: own.key}
	if sameCA(r, roots, config, st) {
		return errors.Join(l.reloadCA(), failed)
	}
	if err := l.writeCA(ctx, r, roots, config, st); err != nil {
		return errors.Join(err, failed)
	}
	if err := l.reloadCA(); err != nil {
		return errors.Join(err, failed)
	}
	return failed
}

// sameCA says whether the stored CA says the same already, so that a pass
// without news writes nothing to the log.
func sameCA(r caRecords, roots *connect.Roots, config *connect.CAConfig, st *connect.CAState) bool {
	if r.roots == nil || r.config == nil || len(r.roots.Roots) != len(roots.Roots) {
		return false
	}
	have := *r.roots
	have.Roots = make([]*connect.Root, len(r.roots.Roots))
	for i, root := range r.roots.Roots {
		c := *root
		c.CreateIndex, c.ModifyIndex = 0, 0
		have.Roots[i] = &c
	}
	haveState := *r.state
	haveState.Serial, haveState.ModifyIndex = st.Serial, st.ModifyIndex
	return reflect.DeepEqual(&have, roots) && haveState == *st &&
		r.config.ClusterID == config.ClusterID && reflect.DeepEqual(r.config.Config, config.Config)
}

// secondaryConfig returns the configuration to store: this datacenter's own,
// under the primary's cluster ID.
func (l *leader) secondaryConfig(r caRecords, clusterID string) (*connect.CAConfig, connect.Settings, error) {
	config := &connect.CAConfig{Provider: connect.ProviderBuiltin, Config: connect.CanonicalCAConfig(l.cfg.CAConfig)}
	if r.config != nil {
		c := *r.config
		c.Config = connect.CanonicalCAConfig(c.Config) // a copy: what is stored is shared
		config = &c
	}
	delete(config.Config, "ClusterID") // it is the primary's to say
	config.ClusterID = clusterID
	settings, err := connect.ParseCAConfig(config.Provider, config.Config)
	return config, settings, err
}

// newIntermediate makes a key and has the primary sign it under a root.
func (l *leader) newIntermediate(ctx context.Context, root *connect.Root, settings connect.Settings) (keyPair, error) {
	fail := func(err error) (keyPair, error) { return keyPair{}, fmt.Errorf("get intermediate: %w", err) }
	key, err := connect.NewKey(settings.PrivateKeyType, settings.PrivateKeyBits)
	if err != nil {
		return fail(err)
	}
	csr, err := connect.NewIntermediateCSR(root.ExternalTrustDomain, key)
	if err != nil {
		return fail(err)
	}
	var answer struct{ Cert string }
	if _, err := l.primary(ctx, http.MethodPost, "/v1/internal/connect/sign-intermediate", map[string]string{"CSR": csr}, &answer); err != nil {
		return fail(err)
	}
	secret, err := connect.EncodeKey(key)
	if err != nil {
		return fail(err)
	}
	pair := keyPair{answer.Cert, secret}
	if err := checkIntermediate(pair, root, time.Now()); err != nil {
		return fail(err) // the root changed in between, or an answer gone wrong
	}
	l.log.Info("CA intermediate signed by the primary", "root", root.ID)
	return pair, nil
}

// checkIntermediate says why a CA certificate cannot be used under a root, nil
// if it can.
func checkIntermediate(p keyPair, root *connect.Root, now time.Time) error {
	if p.cert == "" || p.key == "" {
		return errors.New("there is no intermediate")
	}
	issuer, err := connect.NewIssuer(p.cert, p.key)
	if err != nil {
		return err
	}
	top, err := connect.ParseCert(root.RootCert)
	if err != nil {
		return err
	}
	c := issuer.Cert()
	if len(top.SubjectKeyId) > 0 && !bytes.Equal(c.AuthorityKeyId, top.SubjectKeyId) {
		return errors.New("the intermediate is signed by another root")
	}
	if err := c.CheckSignatureFrom(top); err != nil {
		return fmt.Errorf("the intermediate is not signed by the root: %w", err)
	}
	if !now.Before(c.NotAfter) {
		return fmt.Errorf("the intermediate expired at %s", c.NotAfter)
	}
	return nil
}

// stillTrusted returns the primary's record of the root that is active here, nil
// where the primary has dropped it.
func stillTrusted(here, primary *connect.Roots) *connect.Root {
	was := here.Active()
	if was == nil {
		return nil
	}
	for _, root := range primary.Roots {
		if root.ID == was.ID {
			return root
		}
	}
	return nil
}

// secondaryRoots returns the primary's roots with our intermediate under the one
// that signs here.
func secondaryRoots(primary *connect.Roots, active *connect.Root, intermediate string) (*connect.Roots, error) {
	cert, err := connect.ParseCert(intermediate)
	if err != nil {
		return nil, err
	}
	out := &connect.Roots{ActiveRootID: active.ID, TrustDomain: primary.TrustDomain}
	for _, root := range primary.Roots {
		c := *root
		c.CreateIndex, c.ModifyIndex = 0, 0 // the store sets its own
		c.Active = c.ID == active.ID
		if c.Active {
			c.RotatedOutAt = time.Time{}
			c.SigningKeyID = connect.SigningKeyID(cert)
			c.IntermediateCerts = append([]string{intermediate}, root.IntermediateCerts...)
		}
		out.Roots = append(out.Roots, &c)
	}
	return out, nil
}
