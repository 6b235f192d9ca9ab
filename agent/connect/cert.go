package connect

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha1" //nolint:gosec // an identifier that clients compute too, not a protection
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"net/url"
	"strings"
	"time"

	"github.com/sluicemesh/sluice/acl"
)

// backdate is by how much certificates that a CA issues are valid before they
// were made, for clocks that run behind.
const backdate = time.Minute

// rootName is the display name of every root of the built-in provider.
const rootName = "Consul CA Primary Cert"

// ErrRateLimited is returned by signing when the limit of the CA is reached.
// Its text, which crosses the RPC, is Consul's.
var ErrRateLimited = errors.New("Rate limit reached, try again later") //nolint:staticcheck // clients match the text

// NewKey generates a private key of the kind that a CA configuration names.
func NewKey(kind string, bits int) (crypto.Signer, error) {
	if err := validateKeyKind(kind, bits); err != nil {
		return nil, fmt.Errorf("generate key: %w", err)
	}
	if kind == "rsa" {
		return rsa.GenerateKey(rand.Reader, bits)
	}
	curve := elliptic.P256()
	switch bits {
	case 224:
		curve = elliptic.P224()
	case 384:
		curve = elliptic.P384()
	case 521:
		curve = elliptic.P521()
	}
	return ecdsa.GenerateKey(curve, rand.Reader)
}

// EncodeKey returns a key in the PEM form in which agents hand keys out: SEC1
// for EC, PKCS#1 for RSA.
func EncodeKey(key crypto.Signer) (acl.Secret, error) {
	var b pem.Block
	switch k := key.(type) {
	case *ecdsa.PrivateKey:
		der, err := x509.MarshalECPrivateKey(k)
		if err != nil {
			return "", fmt.Errorf("encode key: %w", err)
		}
		b = pem.Block{Type: "EC PRIVATE KEY", Bytes: der}
	case *rsa.PrivateKey:
		b = pem.Block{Type: "RSA PRIVATE KEY", Bytes: x509.MarshalPKCS1PrivateKey(k)}
	default:
		return "", fmt.Errorf("encode key: a %T is neither EC nor RSA", key)
	}
	return acl.Secret(pem.EncodeToMemory(&b)), nil
}

// ParseKey reads a key in PEM: SEC1, PKCS#1 or PKCS#8.
func ParseKey(s acl.Secret) (crypto.Signer, error) {
	b, _ := pem.Decode([]byte(s.Reveal()))
	if b == nil {
		return nil, errors.New("parse key: no PEM block")
	}
	var key any
	var err error
	switch b.Type {
	case "EC PRIVATE KEY":
		key, err = x509.ParseECPrivateKey(b.Bytes)
	case "RSA PRIVATE KEY":
		key, err = x509.ParsePKCS1PrivateKey(b.Bytes)
	case "PRIVATE KEY":
		key, err = x509.ParsePKCS8PrivateKey(b.Bytes)
	default:
		return nil, fmt.Errorf("parse key: unknown PEM block %q", b.Type)
	}
	if err != nil {
		return nil, fmt.Errorf("parse key: %w", err)
	}
	signer, ok := key.(crypto.Signer)
	if !ok {
		return nil, fmt.Errorf("parse key: a %T cannot sign", key)
	}
	return signer, nil
}

// ParseCert reads the first certificate of a PEM text.
func ParseCert(s string) (*x509.Certificate, error) {
	certs, err := ParseCerts(s)
	if err != nil {
		return nil, err
	}
	return certs[0], nil
}

// ParseCerts reads all certificates of a PEM text, at least one.
func ParseCerts(s string) ([]*x509.Certificate, error) {
	var out []*x509.Certificate
	for rest := []byte(s); ; {
		var b *pem.Block
		if b, rest = pem.Decode(rest); b == nil {
			break
		}
		if b.Type != "CERTIFICATE" {
			return nil, fmt.Errorf("parse certificate: unexpected PEM block %q", b.Type)
		}
		c, err := x509.ParseCertificate(b.Bytes)
		if err != nil {
			return nil, fmt.Errorf("parse certificate: %w", err)
		}
		out = append(out, c)
	}
	if len(out) == 0 {
		return nil, errors.New("parse certificate: no PEM block")
	}
	return out, nil
}

// ParseCSR reads a certificate request in PEM and checks its signature.
func ParseCSR(s string) (*x509.CertificateRequest, error) {
	b, _ := pem.Decode([]byte(s))
	if b == nil {
		return nil, errors.New("parse certificate request: no PEM block")
	}
	if b.Type != "CERTIFICATE REQUEST" {
		return nil, fmt.Errorf("parse certificate request: unexpected PEM block %q", b.Type)
	}
	csr, err := x509.ParseCertificateRequest(b.Bytes)
	if err != nil {
		return nil, fmt.Errorf("parse certificate request: %w", err)
	}
	if err := csr.CheckSignature(); err != nil {
		return nil, fmt.Errorf("parse certificate request: %w", err)
	}
	return csr, nil
}

func encodeCert(der []byte) string {
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
}

// colonHex is the form of identifiers of certificates in the API.
func colonHex(b []byte) string {
	h := hex.EncodeToString(b)
	var out strings.Builder
	for i := 0; i < len(h); i += 2 {
		if i > 0 {
			out.WriteByte(':')
		}
		out.WriteString(h[i : i+2])
	}
	return out.String()
}

// KeyID returns the subject key ID of a public key: SHA-256 of its DER form.
func KeyID(pub crypto.PublicKey) ([]byte, error) {
	der, err := x509.MarshalPKIXPublicKey(pub)
	if err != nil {
		return nil, fmt.Errorf("identify key: %w", err)
	}
	sum := sha256.Sum256(der)
	return sum[:], nil
}

// SigningKeyID returns a certificate's subject key ID in the API's form.
func SigningKeyID(c *x509.Certificate) string { return colonHex(c.SubjectKeyId) }

// RandomSerial returns a serial number for a leaf: 62 random bits above 1<<62,
// so that it is positive in 64 bits and none of the small numbers that CA
// certificates are counted with.
func RandomSerial() (uint64, error) {
	n, err := rand.Int(rand.Reader, big.NewInt(1<<62))
	if err != nil {
		return 0, fmt.Errorf("draw serial number: %w", err)
	}
	return n.Uint64() + 1<<62, nil
}

// commonName returns the subject of a CA certificate. The random part keeps
// subjects of successive authorities apart.
func commonName(prefix, clusterID string) (string, error) {
	n, err := rand.Int(rand.Reader, big.NewInt(36*36*36*36*36*36*36*36))
	if err != nil {
		return "", fmt.Errorf("draw common name: %w", err)
	}
	if len(clusterID) > 8 {
		clusterID = clusterID[:8]
	}
	return fmt.Sprintf("%s-%s.consul.ca.%s.consul", prefix, n.Text(36), strings.ToLower(clusterID)), nil
}

// NewRoot makes the self-signed root of a cluster, or adopts the one that the
// settings bring, and returns it, active, with its key.
func NewRoot(now time.Time, clusterID string, s Settings, serial uint64) (*Root, acl.Secret, error) {
	root, key, err := newRoot(now, clusterID, s, serial)
	if err != nil {
		return nil, "", fmt.Errorf("create root certificate: %w", err)
	}
	root.ExternalTrustDomain = strings.ToLower(clusterID)
	root.Active = true
	return root, key, nil
}

func newRoot(now time.Time, clusterID string, s Settings, serial uint64) (*Root, acl.Secret, error) {
	if s.RootCert != "" {
		return adoptRoot(now, s)
	}
	key, err := NewKey(s.PrivateKeyType, s.PrivateKeyBits)
	if err != nil {
		return nil, "", err
	}
	id, err := KeyID(key.Public())
	if err != nil {
		return nil, "", err
	}
	cn, err := commonName("pri", clusterID)
	if err != nil {
		return nil, "", err
	}
	t := authority(now, SigningIDOf(clusterID), cn, serial, id)
	t.AuthorityKeyId = id // x509 leaves it out of what signs itself
	t.NotAfter = now.Add(s.RootCertTTL)
	der, err := x509.CreateCertificate(rand.Reader, t, t, key.Public(), key)
	if err != nil {
		return nil, "", err
	}
	root, err := ParseRoot(encodeCert(der))
	if err != nil {
		return nil, "", err
	}
	secret, err := EncodeKey(key)
	return root, secret, err
}

func adoptRoot(now time.Time, s Settings) (*Root, acl.Secret, error) {
	root, err := ParseRoot(s.RootCert)
	if err != nil {
		return nil, "", err
	}
	if _, err := newIssuerAt(now, s.RootCert, s.PrivateKey); err != nil {
		return nil, "", err
	}
	return root, s.PrivateKey, nil
}

// authority is the template of a CA certificate.
func authority(now time.Time, id SigningID, cn string, serial uint64, keyID []byte) *x509.Certificate {
	return &x509.Certificate{
		SerialNumber:          new(big.Int).SetUint64(serial),
		Subject:               pkix.Name{CommonName: cn},
		URIs:                  []*url.URL{{Scheme: "spiffe", Host: id.Host()}},
		NotBefore:             now,
		KeyUsage:              x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		BasicConstraintsValid: true,
		IsCA:                  true,
		SubjectKeyId:          keyID,
	}
}

// ParseRoot reads a root certificate. The trust domain is that of its SPIFFE
// identity, where it has one. The root is not marked active.
func ParseRoot(certPEM string) (*Root, error) {
	c, err := ParseCert(certPEM)
	if err != nil {
		return nil, err
	}
	if !c.IsCA {
		return nil, errors.New("parse root: not a certificate authority")
	}
	keyID := c.SubjectKeyId
	if len(keyID) == 0 {
		if keyID, err = KeyID(c.PublicKey); err != nil {
			return nil, err
		}
	}
	sum := sha1.Sum(c.Raw) //nolint:gosec // see the import
	r := &Root{
		ID:           colonHex(sum[:]),
		Name:         rootName,
		SerialNumber: c.SerialNumber.Uint64(),
		SigningKeyID: colonHex(keyID),
		NotBefore:    c.NotBefore,
		NotAfter:     c.NotAfter,
		RootCert:     withNewline(certPEM),
	}
	switch k := c.PublicKey.(type) {
	case *ecdsa.PublicKey:
		r.PrivateKeyType, r.PrivateKeyBits = "ec", k.Curve.Params().BitSize
	case *rsa.PublicKey:
		r.PrivateKeyType, r.PrivateKeyBits = "rsa", k.N.BitLen()
	}
	for _, u := range c.URIs {
		if id, err := ParseURL(u); err == nil {
			if s, ok := id.(SigningID); ok {
				r.ExternalTrustDomain = s.ClusterID
			}
		}
	}
	return r, nil
}

func withNewline(s string) string { return strings.TrimSpace(s) + "\n" }

// Issuer is a certificate authority's certificate with its key, ready to sign.
// It is immutable and safe for concurrent use.
type Issuer struct {
	cert *x509.Certificate
	key  crypto.Signer
}

// NewIssuer returns the issuer of a CA certificate (PEM) and its key.
func NewIssuer(certPEM string, key acl.Secret) (*Issuer, error) {
	return newIssuerAt(time.Time{}, certPEM, key)
}

func newIssuerAt(now time.Time, certPEM string, key acl.Secret) (*Issuer, error) {
	cert, err := ParseCert(certPEM)
	if err != nil {
		return nil, err
	}
	signer, err := ParseKey(key)
	if err != nil {
		return nil, err
	}
	if !samePublicKey(cert.PublicKey, signer.Public()) {
		return nil, errors.New("private key does not belong to the CA certificate")
	}
	if !cert.IsCA {
		return nil, errors.New("certificate is not a certificate authority")
	}
	if !now.IsZero() && (now.After(cert.NotAfter) || now.Before(cert.NotBefore.Add(-backdate))) {
		return nil, fmt.Errorf("certificate is valid from %s to %s only", cert.NotBefore, cert.NotAfter)
	}
	if len(cert.SubjectKeyId) == 0 {
		// What it issues names it by this; a certificate of the operator's own may
		// have none.
		if cert.SubjectKeyId, err = KeyID(cert.PublicKey); err != nil {
			return nil, err
		}
	}
	return &Issuer{cert: cert, key: signer}, nil
}

func samePublicKey(a, b crypto.PublicKey) bool {
	k, ok := a.(interface{ Equal(crypto.PublicKey) bool })
	return ok && k.Equal(b)
}

// Cert returns the issuer's certificate, which is not to be written to.
func (i *Issuer) Cert() *x509.Certificate { return i.cert }

// Key returns the issuer's key in PEM.
func (i *Issuer) Key() (acl.Secret, error) { return EncodeKey(i.key) }

// sign issues t for a public key. What is issued never outlives the issuer.
func (i *Issuer) sign(t *x509.Certificate, pub crypto.PublicKey) (string, error) {
	if t.NotAfter.After(i.cert.NotAfter) {
		t.NotAfter = i.cert.NotAfter
	}
	if !t.NotAfter.After(t.NotBefore) {
		return "", fmt.Errorf("the CA certificate expired at %s", i.cert.NotAfter)
	}
	t.AuthorityKeyId = i.cert.SubjectKeyId
	der, err := x509.CreateCertificate(rand.Reader, t, i.cert, pub, i.key)
	if err != nil {
		return "", err
	}
	return encodeCert(der), nil
}

// NewIntermediateCSR returns the request (PEM) by which a secondary datacenter
// asks the primary to make it a CA.
func NewIntermediateCSR(clusterID string, key crypto.Signer) (string, error) {
	cn, err := commonName("sec", clusterID)
	if err != nil {
		return "", err
	}
	csr, err := encodeCSR(&x509.CertificateRequest{
		Subject: pkix.Name{CommonName: cn},
		URIs:    []*url.URL{{Scheme: "spiffe", Host: SigningIDOf(clusterID).Host()}},
	}, key)
	if err != nil {
		return "", fmt.Errorf("create intermediate request: %w", err)
	}
	return csr, nil
}

// SignIntermediate issues the certificate (PEM) of a secondary datacenter's CA,
// which may issue leaves only. The request must carry the identity of the
// issuer's own cluster.
func (i *Issuer) SignIntermediate(now time.Time, csrPEM string, clusterID string, ttl time.Duration, serial uint64) (string, error) {
	csr, err := ParseCSR(csrPEM)
	if err != nil {
		return "", err
	}
	if len(csr.URIs) != 1 {
		return "", fmt.Errorf("CSR SAN contains an invalid number of URIs: %d", len(csr.URIs))
	}
	id, err := ParseURL(csr.URIs[0])
	if err != nil {
		return "", err
	}
	own := SigningIDOf(clusterID)
	if s, ok := id.(SigningID); !ok || s != own {
		return "", fmt.Errorf("SPIFFE ID in CSR from a different trust domain: %s, we are %s", id.Host(), own.Host())
	}
	keyID, err := KeyID(csr.PublicKey)
	if err != nil {
		return "", err
	}
	t := authority(now.Add(-backdate), own, csr.Subject.CommonName, serial, keyID)
	t.NotAfter = t.NotBefore.Add(ttl)
	t.MaxPathLenZero = true
	cert, err := i.sign(t, csr.PublicKey)
	if err != nil {
		return "", fmt.Errorf("sign intermediate: %w", err)
	}
	return cert, nil
}

// CrossSign issues a certificate (PEM) for another root's key, so that those
// who trust only this issuer trust what the other issues.
func (i *Issuer) CrossSign(now time.Time, rootPEM string, serial uint64) (string, error) {
	root, err := ParseCert(rootPEM)
	if err != nil {
		return "", err
	}
	t := &x509.Certificate{
		SerialNumber: new(big.Int).SetUint64(serial),
		// Chains are built by subject and key ID, so both stay.
		RawSubject:            root.RawSubject,
		Subject:               root.Subject,
		URIs:                  root.URIs,
		NotBefore:             now.Add(-backdate),
		NotAfter:              root.NotAfter,
		KeyUsage:              root.KeyUsage,
		BasicConstraintsValid: true,
		IsCA:                  true,
		SubjectKeyId:          root.SubjectKeyId,
	}
	cert, err := i.sign(t, root.PublicKey)
	if err != nil {
		return "", fmt.Errorf("cross-sign root: %w", err)
	}
	return cert, nil
}

// NewLeafCSR returns the request (PEM) for a certificate of id. Hosts, names or
// addresses, are for agents only.
func NewLeafCSR(id ID, key crypto.Signer, hosts ...string) (string, error) {
	u, err := url.Parse(id.URI())
	if err != nil {
		return "", fmt.Errorf("create leaf request: %w", err)
	}
	t := &x509.CertificateRequest{URIs: []*url.URL{u}}
	seen := map[string]bool{}
	for _, h := range hosts {
		if ip := net.ParseIP(h); ip != nil {
			t.IPAddresses = append(t.IPAddresses, ip)
			continue
		}
		h, _, _ = strings.Cut(h, ":")
		if h != "" && !seen[h] {
			seen[h] = true
			t.DNSNames = append(t.DNSNames, h)
		}
	}
	csr, err := encodeCSR(t, key)
	if err != nil {
		return "", fmt.Errorf("create leaf request: %w", err)
	}
	return csr, nil
}

var oidSubjectAltName = asn1.ObjectIdentifier{2, 5, 29, 17}

func encodeCSR(t *x509.CertificateRequest, key crypto.Signer) (string, error) {
	// x509 never marks a request's SAN as critical, which it must be where the
	// subject is empty.
	if t.Subject.CommonName == "" {
		san, err := marshalSAN(t)
		if err != nil {
			return "", err
		}
		t.ExtraExtensions = append(t.ExtraExtensions, san)
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, t, key)
	if err != nil {
		return "", err
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der})), nil
}

func marshalSAN(t *x509.CertificateRequest) (pkix.Extension, error) {
	const tagDNS, tagURI, tagIP = 2, 6, 7 // of GeneralName, RFC 5280 4.2.1.6
	var names []asn1.RawValue
	for _, n := range t.DNSNames {
		names = append(names, asn1.RawValue{Tag: tagDNS, Class: asn1.ClassContextSpecific, Bytes: []byte(n)})
	}
	for _, ip := range t.IPAddresses {
		if v4 := ip.To4(); v4 != nil {
			ip = v4
		}
		names = append(names, asn1.RawValue{Tag: tagIP, Class: asn1.ClassContextSpecific, Bytes: ip})
	}
	for _, u := range t.URIs {
		names = append(names, asn1.RawValue{Tag: tagURI, Class: asn1.ClassContextSpecific, Bytes: []byte(u.String())})
	}
	der, err := asn1.Marshal(names)
	return pkix.Extension{Id: oidSubjectAltName, Critical: true, Value: der}, err
}

// VerifyLeafCSR reads a leaf request and says whose it is. The texts of its
// errors are Consul's. An agent's identity comes back moved to the trust
// domain, since an agent asks for its first certificate before it knows that.
func VerifyLeafCSR(csrPEM, datacenter, trustDomain string) (*x509.CertificateRequest, ID, error) {
	csr, err := ParseCSR(csrPEM)
	if err != nil {
		return nil, nil, err
	}
	if len(csr.URIs) != 1 {
		return nil, nil, fmt.Errorf("CSR SAN contains an invalid number of URIs: %d", len(csr.URIs))
	}
	if len(csr.EmailAddresses) > 0 {
		return nil, nil, errors.New("CSR SAN does not allow specifying email addresses")
	}
	id, err := ParseURL(csr.URIs[0])
	if err != nil {
		return nil, nil, err
	}
	var dc string
	switch x := id.(type) {
	case ServiceID:
		dc = x.Datacenter
	case GatewayID:
		dc = x.Datacenter
	case ServerID:
		dc = x.Datacenter
	case AgentID:
		dc = x.Datacenter
		x.TrustDomain = strings.ToLower(trustDomain)
		id = x
	default:
		return nil, nil, errors.New("SPIFFE ID in CSR must be a service, mesh-gateway, or agent ID")
	}
	if dc != datacenter {
		return nil, nil, fmt.Errorf("SPIFFE ID in CSR from a different datacenter: %s, we are %s", dc, datacenter)
	}
	if td := strings.ToLower(trustDomain); id.Host() != td {
		return nil, nil, fmt.Errorf("SPIFFE ID in CSR from a different trust domain: %s, we are %s", id.Host(), td)
	}
	return csr, id, nil
}

// SignLeaf issues the certificate that a request, verified by [VerifyLeafCSR],
// asks for. Chain are the certificates (PEM) to send after it.
//
// COMPAT: host names and addresses in the request of a service or gateway are
// left out, where Consul would sign any: a workload could otherwise get itself
// a certificate for a server's name.
func (i *Issuer) SignLeaf(now time.Time, csr *x509.CertificateRequest, id ID, ttl time.Duration, serial uint64, chain ...string) (*Leaf, error) {
	uri, err := url.Parse(id.URI())
	if err != nil {
		return nil, fmt.Errorf("sign leaf: %w", err)
	}
	keyID, err := KeyID(csr.PublicKey)
	if err != nil {
		return nil, fmt.Errorf("sign leaf: %w", err)
	}
	notBefore := now.Add(-backdate)
	t := &x509.Certificate{
		SerialNumber: new(big.Int).SetUint64(serial),
		URIs:         []*url.URL{uri},
		NotBefore:    notBefore,
		NotAfter:     notBefore.Add(ttl),
		KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageKeyEncipherment |
			x509.KeyUsageDataEncipherment | x509.KeyUsageKeyAgreement,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
		BasicConstraintsValid: true,
		SubjectKeyId:          keyID,
	}
	leaf := &Leaf{ServiceURI: id.URI()}
	switch x := id.(type) {
	case ServiceID:
		leaf.Service = x.Service.Canonical().Name
	case AgentID, ServerID:
		t.DNSNames, t.IPAddresses = csr.DNSNames, csr.IPAddresses
	}
	cert, err := i.sign(t, csr.PublicKey)
	if err != nil {
		return nil, fmt.Errorf("sign leaf: %w", err)
	}
	leaf.SerialNumber = colonHex(serialBytes(serial))
	leaf.ValidAfter, leaf.ValidBefore = t.NotBefore.UTC().Truncate(time.Second), t.NotAfter.UTC().Truncate(time.Second)
	var b strings.Builder
	b.WriteString(cert)
	for _, c := range chain {
		b.WriteString(withNewline(c))
	}
	leaf.CertPEM = b.String()
	return leaf, nil
}

func serialBytes(n uint64) []byte {
	b := new(big.Int).SetUint64(n).Bytes()
	if len(b) == 0 {
		return []byte{0}
	}
	return b
}
