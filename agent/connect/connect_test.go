package connect

import (
	"crypto/x509"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/sluicemesh/sluice/agent/catalog"
)

const (
	testCluster = "11111111-2222-3333-4444-555555555555"
	testTD      = testCluster + ".consul"
)

func TestSNI(t *testing.T) {
	part := catalog.ServiceName{Name: "web", Namespace: "ns1", Partition: "ap1"}
	for _, c := range []struct {
		got, want string
		parsed    *SNI
	}{
		{ServiceSNI("", catalog.Name("web"), "dc1", testTD), "web.default.dc1.internal." + testTD,
			&SNI{Service: catalog.Name("web"), Datacenter: "dc1", TrustDomain: testTD}},
		{ServiceSNI("blue", catalog.ServiceName{Name: "db-v2"}, "dc2", testTD), "blue.db-v2.default.dc2.internal." + testTD,
			&SNI{Service: catalog.Name("db-v2"), Subset: "blue", Datacenter: "dc2", TrustDomain: testTD}},
		{ServiceSNI("", part, "dc1", testTD), "web.ns1.ap1.dc1.internal-v1." + testTD,
			&SNI{Service: part, Datacenter: "dc1", TrustDomain: testTD}},
		{ServiceSNI("v1", part, "dc1", testTD), "v1.web.ns1.ap1.dc1.internal-v1." + testTD,
			&SNI{Service: part, Subset: "v1", Datacenter: "dc1", TrustDomain: testTD}},
		{DatacenterSNI("dc2", testTD), "dc2.internal." + testTD,
			&SNI{Service: catalog.ServiceName{}.Canonical(), Datacenter: "dc2", TrustDomain: testTD}},
		{PeeredServiceSNI(catalog.Name("db"), "west", testTD), "db.default.default.west.external." + testTD, nil},
		{ServerSNI("s1", "dc2", "consul."), "s1.server.dc2.consul", nil},
		{ServerSNI("*", "dc2", "consul"), "server.dc2.consul", nil},
		{TrustDomain("ABC"), "abc.consul", nil},
	} {
		if c.got != c.want {
			t.Errorf("got %q, want %q", c.got, c.want)
		}
		sni, err := ParseSNI(c.got)
		if c.parsed == nil {
			if err == nil {
				t.Errorf("ParseSNI(%q) = %+v, want an error", c.got, sni)
			}
			continue
		}
		if err != nil {
			t.Errorf("ParseSNI(%q): %v", c.got, err)
		} else if d := cmp.Diff(*c.parsed, sni); d != "" {
			t.Errorf("ParseSNI(%q): %s", c.got, d)
		}
	}
	for _, bad := range []string{
		"", "consul", "internal.x.consul", "dc1.internal-v1.x.consul", "a.dc1.internal.x.consul",
		"a.b.c.d.dc1.internal.x.consul", "web..dc1.internal.x.consul", "web.default.dc1.internal.x.example",
	} {
		if got, err := ParseSNI(bad); err == nil {
			t.Errorf("ParseSNI(%q) = %+v, want an error", bad, got)
		}
	}
}

func TestParseURI(t *testing.T) {
	web := ServiceID{TrustDomain: testTD, Service: catalog.Name("web"), Datacenter: "dc1"}
	for uri, want := range map[string]ID{
		"spiffe://" + testTD + "/ns/default/dc/dc1/svc/web":                  web,
		"spiffe://" + strings.ToUpper(testTD) + "/ns/default/dc/dc1/svc/web": web,
		"spiffe://" + testTD + "/ap/AP1/ns/n/dc/dc1/svc/web": ServiceID{TrustDomain: testTD, Datacenter: "dc1",
			Service: catalog.ServiceName{Name: "web", Namespace: "n", Partition: "ap1"}},
		"spiffe://" + testTD + "/ns/default/dc/dc1/svc/a%2Fb": ServiceID{TrustDomain: testTD, Datacenter: "dc1",
			Service: catalog.ServiceName{Name: "a/b"}.Canonical()},
		"spiffe://" + testTD + "/agent/client/dc/dc1/id/n1": AgentID{TrustDomain: testTD, Partition: "default", Datacenter: "dc1", Node: "n1"},
		"spiffe://" + testTD + "/agent/server/dc/dc1":       ServerID{TrustDomain: testTD, Datacenter: "dc1"},
		"spiffe://" + testTD + "/gateway/mesh/dc/dc1":       GatewayID{TrustDomain: testTD, Partition: "default", Datacenter: "dc1"},
		"spiffe://" + testTD:                                SigningID{ClusterID: testCluster, Domain: "consul"},
	} {
		got, err := ParseURI(uri)
		if err != nil {
			t.Errorf("ParseURI(%q): %v", uri, err)
		} else if d := cmp.Diff(want, got); d != "" {
			t.Errorf("ParseURI(%q): %s", uri, d)
		}
	}
	if got, want := web.URI(), "spiffe://"+testTD+"/ns/default/dc/dc1/svc/web"; got != want {
		t.Errorf("URI() = %q, want %q", got, want)
	}
	for uri, want := range map[string]string{
		"https://x.consul/ns/default/dc/dc1/svc/web":   "SPIFFE ID must have 'spiffe' scheme",
		"spiffe://x.consul/ns/default/dc/dc1/svc/":     "SPIFFE ID is not in the expected format: spiffe://x.consul/ns/default/dc/dc1/svc/",
		"spiffe://x.consul/ns/default/dc/dc1/svc/a/b":  "SPIFFE ID is not in the expected format: spiffe://x.consul/ns/default/dc/dc1/svc/a/b",
		"spiffe://x.consul/":                           "SPIFFE ID is not in the expected format: spiffe://x.consul/",
		"spiffe://nodots":                              "SPIFFE ID is not in the expected format: spiffe://nodots",
		"spiffe://x.consul:1/agent/server/dc/dc1":      "SPIFFE ID is not in the expected format: spiffe://x.consul:1/agent/server/dc/dc1",
		"spiffe://x.consul/agent/server/dc/dc1?a=b":    "SPIFFE ID is not in the expected format: spiffe://x.consul/agent/server/dc/dc1?a=b",
		"spiffe://x.consul/ap/p/agent/server/dc/dc1":   "SPIFFE ID is not in the expected format: spiffe://x.consul/ap/p/agent/server/dc/dc1",
		"spiffe://x.consul/ns/default/dc/dc1/svc/%zz1": `SPIFFE ID is not in the expected format: "spiffe://x.consul/ns/default/dc/dc1/svc/%zz1"`,
	} {
		if got, err := ParseURI(uri); err == nil || err.Error() != want {
			t.Errorf("ParseURI(%q) = %v, %v, want error %q", uri, got, err, want)
		}
	}
}

func FuzzParseURI(f *testing.F) {
	for _, s := range []string{
		"spiffe://x.consul", "spiffe://x.consul/ns/default/dc/dc1/svc/web", "spiffe://x.consul/ap/p/ns/n/dc/d/svc/a%2Fb",
		"spiffe://x.consul/agent/client/dc/dc1/id/n%201", "spiffe://x.consul/agent/server/dc/dc1", "spiffe://x.consul/gateway/mesh/dc/dc1",
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		id, err := ParseURI(s)
		if err != nil {
			return
		}
		// What is written must mean what was read: intentions compare the text.
		again, err := ParseURI(id.URI())
		if err != nil {
			t.Fatalf("%q parses to %+v, whose URI %q does not parse: %v", s, id, id.URI(), err)
		}
		if d := cmp.Diff(id, again); d != "" {
			t.Fatalf("%q: %s", s, d)
		}
	})
}

func TestCAConfig(t *testing.T) {
	for _, raw := range []map[string]any{
		{"leaf_cert_ttl": "2h", "csr_max_per_second": 0, "private_key_type": "ec", "private_key_bits": 384, "cluster_id": strings.ToUpper(testCluster)},
		{"LeafCertTTL": 7.2e12, "CSRMaxPerSecond": 0.0, "PrivateKeyType": "ec", "PrivateKeyBits": 384.0, "ClusterID": testCluster},
	} {
		got, err := ParseCAConfig("consul", raw)
		if err != nil {
			t.Fatalf("ParseCAConfig(%v): %v", raw, err)
		}
		want := defaultSettings()
		want.LeafCertTTL, want.CSRMaxPerSecond, want.PrivateKeyBits, want.ClusterID = 2*time.Hour, 0, 384, testCluster
		if d := cmp.Diff(want, got); d != "" {
			t.Errorf("ParseCAConfig(%v): %s", raw, d)
		}
	}
	for want, raw := range map[string]map[string]any{
		"leaf cert TTL must be greater or equal than 1h0m0s":                                {"LeafCertTTL": "1m"},
		"leaf cert TTL must be less than 8760h0m0s":                                         {"leaf_cert_ttl": "9000h", "intermediate_cert_ttl": "30000h"},
		"Intermediate Cert TTL must be greater or equal than 3 * LeafCertTTL (>=216h0m0s)":  {"intermediate_cert_ttl": "100h"},
		"root cert TTL is set and is not greater than intermediate cert ttl. root cert ttl": {"root_cert_ttl": "100h"},
		"EC key length must be one of (224, 256, 384, 521) bits":                            {"private_key_bits": 100},
		"private key type must be either 'ec' or 'rsa'":                                     {"private_key_type": "dsa"},
		"must provide both private_key and root_cert, or neither":                           {"private_key": "x"},
		"cluster_id was supplied but was not a valid UUID":                                  {"cluster_id": "x"},
		"leaf_cert_tll: invalid config key":                                                 {"leaf_cert_tll": "1h"},
		"leaf_cert_ttl: a bool is not a duration":                                           {"leaf_cert_ttl": true},
	} {
		if _, err := ParseCAConfig("", raw); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("ParseCAConfig(%v): error %v, want %q", raw, err, want)
		}
	}
	if _, err := ParseCAConfig("vault", nil); err == nil {
		t.Error("ParseCAConfig accepts an unknown provider")
	}
	got := CanonicalCAConfig(map[string]any{"leaf_cert_ttl": "1h", "CSRMaxPerSecond": 3.0})
	want := map[string]any{"LeafCertTTL": "1h", "IntermediateCertTTL": "8760h", "RootCertTTL": "87600h", "CSRMaxPerSecond": 3.0}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
}

var testNow = time.Date(2030, 1, 2, 3, 4, 5, 0, time.UTC)

func mustRoot(t testing.TB, now time.Time, serial uint64) (*Root, *Issuer) {
	t.Helper()
	s, err := ParseCAConfig("", nil)
	if err != nil {
		t.Fatal(err)
	}
	root, key, err := NewRoot(now, testCluster, s, serial)
	if err != nil {
		t.Fatal(err)
	}
	iss, err := NewIssuer(root.RootCert, key)
	if err != nil {
		t.Fatal(err)
	}
	return root, iss
}

func mustCert(t testing.TB, s string) *x509.Certificate {
	t.Helper()
	c, err := ParseCert(s)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func mustLeaf(t testing.TB, iss *Issuer, now time.Time, id ID, chain ...string) *Leaf {
	t.Helper()
	key, err := NewKey("ec", 256)
	if err != nil {
		t.Fatal(err)
	}
	csrPEM, err := NewLeafCSR(id, key)
	if err != nil {
		t.Fatal(err)
	}
	csr, id, err := VerifyLeafCSR(csrPEM, "dc1", testTD)
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := iss.SignLeaf(now, csr, id, 72*time.Hour, 9, chain...)
	if err != nil {
		t.Fatal(err)
	}
	return leaf
}

var webID = ServiceID{TrustDomain: testTD, Service: catalog.Name("web"), Datacenter: "dc1"}

func TestRootCertificate(t *testing.T) {
	root, _ := mustRoot(t, testNow, 7)
	c := mustCert(t, root.RootCert)
	keyID, err := KeyID(c.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	if !strings.HasPrefix(c.Subject.CommonName, "pri-") || !strings.HasSuffix(c.Subject.CommonName, ".consul.ca.11111111.consul") {
		t.Errorf("CN is %q", c.Subject.CommonName)
	}
	if c.URIs[0].String() != "spiffe://"+testTD {
		t.Errorf("URI is %s", c.URIs[0])
	}
	if string(c.SubjectKeyId) != string(keyID) || string(c.AuthorityKeyId) != string(keyID) {
		t.Errorf("SKI %x, AKI %x, want both %x", c.SubjectKeyId, c.AuthorityKeyId, keyID)
	}
	if c.MaxPathLen != -1 || !c.IsCA {
		t.Errorf("IsCA %v, path length %d", c.IsCA, c.MaxPathLen)
	}
	if c.KeyUsage != x509.KeyUsageDigitalSignature|x509.KeyUsageCertSign|x509.KeyUsageCRLSign {
		t.Errorf("key usage is %b", c.KeyUsage)
	}
	for _, e := range c.Extensions {
		switch e.Id.String() {
		case "2.5.29.15", "2.5.29.19":
			if !e.Critical {
				t.Errorf("extension %s is not critical", e.Id)
			}
		}
	}
	if got := c.NotAfter.Sub(c.NotBefore); got != 87600*time.Hour {
		t.Errorf("valid for %s", got)
	}
	want := &Root{
		ID: root.ID, Name: "Consul CA Primary Cert", SerialNumber: 7, SigningKeyID: colonHex(keyID), ExternalTrustDomain: testCluster,
		NotBefore: testNow, NotAfter: testNow.Add(87600 * time.Hour), RootCert: root.RootCert, Active: true,
		PrivateKeyType: "ec", PrivateKeyBits: 256,
	}
	if d := cmp.Diff(want, root); d != "" {
		t.Error(d)
	}
	if len(root.ID) != 20*3-1 {
		t.Errorf("ID is %q", root.ID)
	}
}

func TestAdoptRoot(t *testing.T) {
	root, iss := mustRoot(t, testNow, 7)
	_, other := mustRoot(t, testNow, 8)
	key, err := iss.Key()
	if err != nil {
		t.Fatal(err)
	}
	s, err := ParseCAConfig("", map[string]any{"root_cert": root.RootCert, "private_key": key.Reveal()})
	if err != nil {
		t.Fatal(err)
	}
	got, gotKey, err := NewRoot(testNow.Add(time.Hour), testCluster, s, 99)
	if err != nil {
		t.Fatal(err)
	}
	if got.ID != root.ID || gotKey != key {
		t.Error("the root brought is not the one used")
	}
	if s.PrivateKey, err = other.Key(); err != nil {
		t.Fatal(err)
	}
	if _, _, err := NewRoot(testNow, testCluster, s, 99); err == nil {
		t.Error("a key that is not the certificate's is accepted")
	}
	if _, _, err := NewRoot(testNow.Add(100000*time.Hour), testCluster, s, 99); err == nil {
		t.Error("an expired root is accepted")
	}
}

func TestLeafCertificate(t *testing.T) {
	root, iss := mustRoot(t, testNow, 7)
	leaf := mustLeaf(t, iss, testNow, webID)
	c := mustCert(t, leaf.CertPEM)
	if c.Subject.String() != "" {
		t.Errorf("subject is %q", c.Subject)
	}
	sanCritical := false
	for _, e := range c.Extensions {
		if e.Id.Equal(oidSubjectAltName) {
			sanCritical = e.Critical
		}
	}
	if !sanCritical {
		t.Error("SAN is not critical")
	}
	if len(c.URIs) != 1 || c.URIs[0].String() != webID.URI() || len(c.DNSNames)+len(c.IPAddresses) != 0 {
		t.Errorf("SAN has %v %v %v", c.URIs, c.DNSNames, c.IPAddresses)
	}
	if c.KeyUsage != x509.KeyUsageDigitalSignature|x509.KeyUsageKeyEncipherment|x509.KeyUsageDataEncipherment|x509.KeyUsageKeyAgreement {
		t.Errorf("key usage is %b", c.KeyUsage)
	}
	if d := cmp.Diff([]x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth}, c.ExtKeyUsage); d != "" {
		t.Error(d)
	}
	if c.IsCA || !c.BasicConstraintsValid {
		t.Error("basic constraints must say CA:FALSE")
	}
	if colonHex(c.AuthorityKeyId) != root.SigningKeyID {
		t.Errorf("AKI is %s", colonHex(c.AuthorityKeyId))
	}
	if keyID, _ := KeyID(c.PublicKey); string(keyID) != string(c.SubjectKeyId) {
		t.Errorf("SKI is %x, want %x", c.SubjectKeyId, keyID)
	}
	want := &Leaf{
		SerialNumber: "09", CertPEM: leaf.CertPEM, Service: "web", ServiceURI: webID.URI(),
		ValidAfter: testNow.Add(-time.Minute), ValidBefore: testNow.Add(72*time.Hour - time.Minute),
	}
	if d := cmp.Diff(want, leaf); d != "" {
		t.Error(d)
	}
	if !c.NotAfter.Equal(leaf.ValidBefore) || !c.NotBefore.Equal(leaf.ValidAfter) {
		t.Errorf("certificate is valid %s to %s", c.NotBefore, c.NotAfter)
	}
}

func TestVerifyLeafCSR(t *testing.T) {
	key, err := NewKey("ec", 256)
	if err != nil {
		t.Fatal(err)
	}
	other := webID
	other.Datacenter = "dc2"
	foreign := webID
	foreign.TrustDomain = "x.consul"
	for _, c := range []struct {
		id   ID
		want string
	}{
		{webID, ""},
		{GatewayID{TrustDomain: testTD, Datacenter: "dc1"}, ""},
		{other, "SPIFFE ID in CSR from a different datacenter: dc2, we are dc1"},
		{foreign, "SPIFFE ID in CSR from a different trust domain: x.consul, we are " + testTD},
		{SigningIDOf(testCluster), "SPIFFE ID in CSR must be a service, mesh-gateway, or agent ID"},
	} {
		csrPEM, err := NewLeafCSR(c.id, key)
		if err != nil {
			t.Fatal(err)
		}
		csr, id, err := VerifyLeafCSR(csrPEM, "dc1", testTD)
		if c.want != "" {
			if err == nil || err.Error() != c.want {
				t.Errorf("%s: error %v, want %q", c.id.URI(), err, c.want)
			}
			continue
		}
		if err != nil {
			t.Errorf("%s: %v", c.id.URI(), err)
			continue
		}
		if id.URI() != c.id.URI() {
			t.Errorf("identity is %s, want %s", id.URI(), c.id.URI())
		}
		for _, e := range csr.Extensions {
			if e.Id.Equal(oidSubjectAltName) && !e.Critical {
				t.Error("SAN of the request is not critical")
			}
		}
	}

	agent := AgentID{TrustDomain: "dummy.trustdomain", Datacenter: "dc1", Node: "n1"}
	csrPEM, err := NewLeafCSR(agent, key, "localhost", "localhost", "server.dc1.consul:8300", "127.0.0.1", "::1")
	if err != nil {
		t.Fatal(err)
	}
	csr, id, err := VerifyLeafCSR(csrPEM, "dc1", testTD)
	if err != nil {
		t.Fatal(err)
	}
	if id.Host() != testTD {
		t.Errorf("agent's identity stays in %s", id.Host())
	}
	if d := cmp.Diff([]string{"localhost", "server.dc1.consul"}, csr.DNSNames); d != "" {
		t.Error(d)
	}
	if len(csr.IPAddresses) != 2 {
		t.Errorf("addresses are %v", csr.IPAddresses)
	}

	// A workload gets no host names, even if it asks.
	_, iss := mustRoot(t, testNow, 1)
	csrPEM, err = NewLeafCSR(webID, key, "server.dc1.consul")
	if err != nil {
		t.Fatal(err)
	}
	csr, id, err = VerifyLeafCSR(csrPEM, "dc1", testTD)
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := iss.SignLeaf(testNow, csr, id, time.Hour, 3)
	if err != nil {
		t.Fatal(err)
	}
	if c := mustCert(t, leaf.CertPEM); len(c.DNSNames) != 0 {
		t.Errorf("service leaf has DNS names %v", c.DNSNames)
	}

	tampered := strings.Replace(csrPEM, "\n", "\nAAAA", 1)
	if _, _, err := VerifyLeafCSR(tampered, "dc1", testTD); err == nil {
		t.Error("a tampered request is accepted")
	}
}

func TestIntermediateAndCrossSign(t *testing.T) {
	oldRoot, oldIss := mustRoot(t, testNow, 1)
	newRoot, newIss := mustRoot(t, testNow.Add(time.Hour), 2)
	now := testNow.Add(2 * time.Hour)

	key, err := NewKey("ec", 256)
	if err != nil {
		t.Fatal(err)
	}
	csr, err := NewIntermediateCSR(testCluster, key)
	if err != nil {
		t.Fatal(err)
	}
	interPEM, err := newIss.SignIntermediate(now, csr, testCluster, 8760*time.Hour, 3)
	if err != nil {
		t.Fatal(err)
	}
	inter := mustCert(t, interPEM)
	if !strings.HasPrefix(inter.Subject.CommonName, "sec-") || inter.MaxPathLen != 0 || !inter.MaxPathLenZero {
		t.Errorf("CN %q, path length %d", inter.Subject.CommonName, inter.MaxPathLen)
	}
	if !inter.NotBefore.Equal(now.Add(-time.Minute)) || inter.NotAfter.Sub(inter.NotBefore) != 8760*time.Hour {
		t.Errorf("valid %s to %s", inter.NotBefore, inter.NotAfter)
	}
	if _, err := newIss.SignIntermediate(now, csr, "22222222-2222-3333-4444-555555555555", time.Hour, 3); err == nil ||
		!strings.Contains(err.Error(), "different trust domain") {
		t.Errorf("another cluster's intermediate: %v", err)
	}
	keyPEM, err := EncodeKey(key)
	if err != nil {
		t.Fatal(err)
	}
	interIss, err := NewIssuer(interPEM, keyPEM)
	if err != nil {
		t.Fatal(err)
	}
	cross, err := oldIss.CrossSign(now, newRoot.RootCert, 4)
	if err != nil {
		t.Fatal(err)
	}

	leaf := mustLeaf(t, interIss, now, webID, interPEM, cross)
	chain, err := ParseCerts(leaf.CertPEM)
	if err != nil {
		t.Fatal(err)
	}
	olds, news := &Roots{Roots: []*Root{oldRoot}}, &Roots{Roots: []*Root{newRoot}}
	want := []string{webID.URI()}
	if err := VerifyChain(news, chain, now, want); err != nil {
		t.Errorf("new root: %v", err)
	}
	if err := VerifyChain(olds, chain, now, want); err != nil {
		t.Errorf("old root, through the cross-signature: %v", err)
	}
	if err := VerifyChain(olds, chain[:2], now, want); err == nil {
		t.Error("old root trusts the new one without a cross-signature")
	}
	if err := VerifyChain(news, chain, now.Add(73*time.Hour), want); err == nil {
		t.Error("an expired leaf verifies")
	}
	if err := VerifyChain(news, chain, now, []string{"spiffe://" + testTD + "/ns/default/dc/dc1/svc/db"}); err == nil {
		t.Error("another identity verifies")
	}
	if err := VerifyChain(news, chain, now, []string{}); err == nil {
		t.Error("an empty list of expected identities lets anyone in")
	}
	id, err := PeerIdentity(chain[0])
	if err != nil || id != webID {
		t.Errorf("PeerIdentity = %+v, %v", id, err)
	}
	if _, err := PeerIdentity(chain[1]); err == nil {
		t.Error("a CA passes for a service")
	}
	// An intermediate may not make another.
	subKey, err := NewKey("ec", 256)
	if err != nil {
		t.Fatal(err)
	}
	if csr, err = NewIntermediateCSR(testCluster, subKey); err != nil {
		t.Fatal(err)
	}
	sub, err := interIss.SignIntermediate(now, csr, testCluster, time.Hour, 5)
	if err != nil {
		t.Fatal(err)
	}
	subKeyPEM, err := EncodeKey(subKey)
	if err != nil {
		t.Fatal(err)
	}
	subIss, err := NewIssuer(sub, subKeyPEM)
	if err != nil {
		t.Fatal(err)
	}
	chain, err = ParseCerts(mustLeaf(t, subIss, now, webID, sub, interPEM).CertPEM)
	if err != nil {
		t.Fatal(err)
	}
	if VerifyChain(news, chain, now, nil) == nil {
		t.Error("a CA below an intermediate verifies")
	}
}

func TestKeys(t *testing.T) {
	for _, c := range []struct {
		kind  string
		bits  int
		block string
	}{{"ec", 224, "EC PRIVATE KEY"}, {"ec", 521, "EC PRIVATE KEY"}, {"rsa", 2048, "RSA PRIVATE KEY"}} {
		key, err := NewKey(c.kind, c.bits)
		if err != nil {
			t.Fatal(err)
		}
		s, err := EncodeKey(key)
		if err != nil {
			t.Fatal(err)
		}
		if !strings.Contains(s.Reveal(), c.block) {
			t.Errorf("%s %d: encoded otherwise than as %s", c.kind, c.bits, c.block)
		}
		again, err := ParseKey(s)
		if err != nil {
			t.Fatal(err)
		}
		if !samePublicKey(key.Public(), again.Public()) {
			t.Errorf("%s %d: another key after parsing", c.kind, c.bits)
		}
	}
	if _, err := NewKey("rsa", 1024); err == nil {
		t.Error("a short RSA key is accepted")
	}
}

func TestSerial(t *testing.T) {
	seen := map[uint64]bool{}
	for range 100 {
		n, err := RandomSerial()
		if err != nil {
			t.Fatal(err)
		}
		if n == 0 || n>>63 != 0 || seen[n] {
			t.Fatalf("serial %d", n)
		}
		seen[n] = true
	}
	if got := colonHex(serialBytes(0x0a1b)); got != "0a:1b" {
		t.Errorf("serial renders as %q", got)
	}
}
