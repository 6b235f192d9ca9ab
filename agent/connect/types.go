package connect

import (
	"time"

	"github.com/sluicemesh/sluice/acl"
)

// Root is a certificate authority that leaves of the mesh are trusted through.
// Its JSON form is that of /v1/connect/ca/roots.
type Root struct {
	// ID is the SHA-1 of the certificate's DER, colon-separated hex.
	ID           string
	Name         string
	SerialNumber uint64
	// SigningKeyID is the subject key ID of the certificate that signs leaves in
	// this datacenter: the root's own in the primary, the intermediate's elsewhere.
	SigningKeyID string
	// ExternalTrustDomain is the cluster ID, without the ".consul" suffix.
	ExternalTrustDomain string
	NotBefore, NotAfter time.Time
	RootCert            string // PEM
	// IntermediateCerts (PEM) are sent after a leaf, nearest the leaf first.
	IntermediateCerts []string
	Active            bool
	// RotatedOutAt is when the root stopped being the active one.
	RotatedOutAt   time.Time `json:",omitzero"`
	PrivateKeyType string
	PrivateKeyBits int
	CreateIndex    uint64
	ModifyIndex    uint64
}

// Roots is the set of roots that a datacenter trusts.
type Roots struct {
	ActiveRootID string
	// TrustDomain is ClusterID.consul, lower-case.
	TrustDomain string
	Roots       []*Root
}

// Active returns the root that signs, or nil.
func (r *Roots) Active() *Root {
	if r == nil {
		return nil
	}
	for _, x := range r.Roots {
		if x.Active {
			return x
		}
	}
	return nil
}

// Leaf is a workload's certificate and key. Its JSON form is that of
// /v1/agent/connect/ca/leaf but for the key, which never prints; the one
// handler that may show it copies it out with Reveal.
type Leaf struct {
	SerialNumber  string // colon-separated hex
	CertPEM       string // the leaf, then its intermediates
	PrivateKeyPEM acl.Secret
	Service       string
	ServiceURI    string
	// RootID is the active root at the time of signing.
	RootID      string `json:"-"`
	ValidAfter  time.Time
	ValidBefore time.Time
	CreateIndex uint64
	ModifyIndex uint64
}

// CAConfig is the stored configuration of the datacenter's CA. Its JSON form is
// that of /v1/connect/ca/configuration.
type CAConfig struct {
	// ClusterID is the trust domain's UUID, made by the primary's first leader.
	ClusterID   string `json:"-"`
	Provider    string
	Config      map[string]any
	State       map[string]string
	CreateIndex uint64
	ModifyIndex uint64
	// ForceWithoutCrossSigning lets a rotation go on with a provider that cannot
	// cross-sign.
	ForceWithoutCrossSigning bool
}

// CAState is what the built-in provider keeps in the replicated state of its
// own datacenter: the private keys. It never leaves the servers.
type CAState struct {
	// RootKey signs in the primary; empty elsewhere.
	RootKeyPEM  acl.Secret
	RootCertPEM string
	// The intermediate of a secondary.
	IntermediateKeyPEM  acl.Secret
	IntermediateCertPEM string
	// Serial is the last serial number given out.
	Serial      uint64
	ModifyIndex uint64
}
