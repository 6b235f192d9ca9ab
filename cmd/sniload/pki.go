package main

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"os"
	"path/filepath"
	"time"
)

// pki is a root and two leaves, as a mesh has them: both sides show one.
type pki struct {
	root           *x509.Certificate
	server, client tls.Certificate
}

func newPKI() (*pki, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("make root: %w", err)
	}
	root, err := newCert(&x509.Certificate{
		Subject: pkix.Name{CommonName: "sniload root"}, IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageCertSign,
	}, nil, key.Public(), key)
	if err != nil {
		return nil, fmt.Errorf("make root: %w", err)
	}
	p := &pki{root: root}
	for _, l := range []struct {
		into  *tls.Certificate
		name  string
		usage x509.ExtKeyUsage
	}{{&p.server, tlsName, x509.ExtKeyUsageServerAuth}, {&p.client, "client", x509.ExtKeyUsageClientAuth}} {
		leafKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			return nil, fmt.Errorf("make %s: %w", l.name, err)
		}
		leaf, err := newCert(&x509.Certificate{
			Subject: pkix.Name{CommonName: l.name}, DNSNames: []string{l.name},
			KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{l.usage},
		}, root, leafKey.Public(), key)
		if err != nil {
			return nil, fmt.Errorf("make %s: %w", l.name, err)
		}
		*l.into = tls.Certificate{Certificate: [][]byte{leaf.Raw}, PrivateKey: leafKey, Leaf: leaf}
	}
	return p, nil
}

// newCert signs a certificate for an hour or two; without a parent it is its own.
func newCert(c, parent *x509.Certificate, public crypto.PublicKey, signer crypto.Signer) (*x509.Certificate, error) {
	serial, err := rand.Int(rand.Reader, big.NewInt(1<<62))
	if err != nil {
		return nil, err
	}
	c.SerialNumber, c.NotBefore, c.NotAfter = serial, time.Now().Add(-time.Hour), time.Now().Add(2*time.Hour)
	if parent == nil {
		parent = c
	}
	der, err := x509.CreateCertificate(rand.Reader, c, parent, public, signer)
	if err != nil {
		return nil, err
	}
	return x509.ParseCertificate(der)
}

func (p *pki) pool() *x509.CertPool {
	pool := x509.NewCertPool()
	pool.AddCert(p.root)
	return pool
}

func (p *pki) serverConfig() *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{p.server},
		ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: p.pool(),
	}
}

func (p *pki) clientConfig() *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{p.client},
		RootCAs: p.pool(), ServerName: tlsName,
	}
}

// write puts what other programs need into files of a directory: root.pem, and
// client.pem with certificate and key.
func (p *pki) write(dir string) error {
	key, err := x509.MarshalPKCS8PrivateKey(p.client.PrivateKey)
	if err != nil {
		return fmt.Errorf("encode client key: %w", err)
	}
	root := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: p.root.Raw})
	client := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: p.client.Certificate[0]})
	client = append(client, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: key})...)
	if err := os.WriteFile(filepath.Join(dir, "root.pem"), root, 0o600); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, "client.pem"), client, 0o600)
}
