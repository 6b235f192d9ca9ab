package connect

import (
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"
)

// Verifier checks certificate chains of the mesh against a set of roots. It is
// immutable and safe for concurrent use; make one per change of the roots, not
// per connection.
type Verifier struct {
	roots *x509.CertPool
}

// NewVerifier returns a verifier that trusts every root of the set, the active
// one and those rotated out alike.
func NewVerifier(roots *Roots) (*Verifier, error) {
	v := &Verifier{roots: x509.NewCertPool()}
	if roots == nil {
		return v, nil
	}
	for _, r := range roots.Roots {
		c, err := ParseCert(r.RootCert)
		if err != nil {
			return nil, fmt.Errorf("trust root %q: %w", r.ID, err)
		}
		v.roots.AddCert(c)
	}
	return v, nil
}

// Verify checks that chain, the peer's own certificate first, leads to a trusted
// root at the given time, and that the peer is one of those expected: exact
// SPIFFE URIs. No expectation (nil) leaves the identity to the caller, who takes
// it from [PeerIdentity]; an empty list that is not nil expects nobody. DNS
// names are not looked at: there are none.
func (v *Verifier) Verify(chain []*x509.Certificate, now time.Time, expect []string) error {
	if len(chain) == 0 {
		return errors.New("verify peer: no certificate")
	}
	leaf := chain[0]
	opts := x509.VerifyOptions{
		Roots:         v.roots,
		Intermediates: x509.NewCertPool(),
		CurrentTime:   now,
		// The mesh's leaves serve and dial with the same certificate.
		KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny},
	}
	for _, c := range chain[1:] {
		opts.Intermediates.AddCert(c)
	}
	if _, err := leaf.Verify(opts); err != nil {
		return fmt.Errorf("verify peer: %w", err)
	}
	if expect == nil {
		return nil
	}
	got := make([]string, 0, 1)
	for _, u := range leaf.URIs {
		uri := u.String()
		if slices.Contains(expect, uri) {
			return nil
		}
		got = append(got, uri)
	}
	return fmt.Errorf("verify peer: identity is %q, expected %q", strings.Join(got, " "), strings.Join(expect, " "))
}

// VerifyChain is [Verifier.Verify] for one use.
func VerifyChain(roots *Roots, chain []*x509.Certificate, now time.Time, expect []string) error {
	v, err := NewVerifier(roots)
	if err != nil {
		return err
	}
	return v.Verify(chain, now, expect)
}

// PeerIdentity returns the service that a verified certificate identifies.
func PeerIdentity(c *x509.Certificate) (ServiceID, error) {
	if len(c.URIs) != 1 {
		return ServiceID{}, fmt.Errorf("identify peer: certificate has %d URIs, not one", len(c.URIs))
	}
	id, err := ParseURL(c.URIs[0])
	if err != nil {
		return ServiceID{}, fmt.Errorf("identify peer: %w", err)
	}
	s, ok := id.(ServiceID)
	if !ok {
		return ServiceID{}, fmt.Errorf("identify peer: %s is not a service", id.URI())
	}
	return s, nil
}
