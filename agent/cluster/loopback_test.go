package cluster

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"math/big"
	"net/http"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"go.uber.org/goleak"

	"github.com/sluicemesh/sluice/agent/state"
)

// loopback runs a server over real sockets until the test or stop ends it.
func loopback(t *testing.T, change func(*Config)) *agent {
	t.Helper()
	level := hclog.Off
	if testing.Verbose() {
		level = hclog.Debug
	}
	c := Config{
		NodeName: "a", BindLAN: "127.0.0.1", Bootstrap: true, NoConnect: true,
		ServerPort: AnyPort, SerfLANPort: AnyPort, SerfWANPort: AnyPort, RaftMultiplier: 1,
		Logger: hclog.New(&hclog.LoggerOptions{Output: t.Output(), Level: level}),
	}
	change(&c)
	s, err := NewServer(c)
	if err != nil {
		t.Fatalf("make server: %v", err)
	}
	a := &agent{member: s, server: s, name: c.NodeName, dc: "dc1"}
	a.SetHandler(a.handler())
	ctx, cancel := context.WithCancel(t.Context())
	a.stop, a.ended = cancel, make(chan error, 1)
	go func() { a.ended <- a.Run(ctx) }()
	t.Cleanup(func() { a.end() })
	return a
}

// leads waits until the server leads.
func (a *agent) leads(t *testing.T) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	for {
		address, changed := a.server.leads.get()
		if address != "" {
			if err := a.server.Barrier(ctx); err != nil {
				t.Fatal(err)
			}
			return
		}
		select {
		case <-changed:
		case err := <-a.ended:
			a.ended <- err
			t.Fatalf("run: %v", err)
		case <-ctx.Done():
			t.Fatal("no leader within a minute")
		}
	}
}

func TestRestartKeepsState(t *testing.T) {
	defer goleak.VerifyNone(t, goleak.IgnoreCurrent())
	dir := t.TempDir()
	a := loopback(t, func(c *Config) { c.DataDir = dir })
	a.leads(t)
	if err := a.server.put(t.Context(), "n"); err != nil {
		t.Fatal(err)
	}
	if got, err := a.request(state.Target{Leader: true}, http.MethodPut, "/node", "m"); err != nil || got != "a" {
		t.Errorf("forward: %q, %v", got, err)
	}
	id := a.server.NodeID()
	if err := a.end(); err != nil {
		t.Fatalf("run: %v", err)
	}
	for path, mode := range map[string]os.FileMode{
		"node-id": 0o600, "serf/local.snapshot": 0o644, "serf/remote.snapshot": 0o644, // serf's own choice
		"raft/wal": 0o700 | os.ModeDir, "raft/snapshots": 0o755 | os.ModeDir,
	} {
		if st, err := os.Stat(filepath.Join(dir, path)); err != nil || st.Mode() != mode {
			t.Errorf("%s: %v, %v; want mode %v", path, st, err, mode)
		}
	}

	// Without bootstrapping: it is its own quorum already. The port is another.
	b := loopback(t, func(c *Config) { c.DataDir = dir })
	b.leads(t)
	if got := b.server.NodeID(); got != id {
		t.Errorf("node id %s after the restart, was %s", got, id)
	}
	for _, n := range []string{"n", "m"} {
		if !b.has(n) {
			t.Errorf("node %q is gone", n)
		}
	}
	if err := b.server.put(t.Context(), "o"); err != nil {
		t.Error(err)
	}
	if err := b.end(); err != nil {
		t.Errorf("run: %v", err)
	}
}

// certificates returns an authority and a certificate of it for the name.
func certificates(t *testing.T, name string) (*x509.CertPool, tls.Certificate) {
	t.Helper()
	make := func(tmpl, parent *x509.Certificate, signer *ecdsa.PrivateKey) (*x509.Certificate, *ecdsa.PrivateKey) {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		tmpl.NotBefore, tmpl.NotAfter = time.Now().Add(-time.Hour), time.Now().Add(time.Hour)
		if signer == nil {
			parent, signer = tmpl, key
		}
		der, err := x509.CreateCertificate(rand.Reader, tmpl, parent, &key.PublicKey, signer)
		if err != nil {
			t.Fatal(err)
		}
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			t.Fatal(err)
		}
		return cert, key
	}
	ca, caKey := make(&x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "ca"}, IsCA: true,
		BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}, nil, nil)
	cert, key := make(&x509.Certificate{
		SerialNumber: big.NewInt(2), DNSNames: []string{name},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}, ca, caKey)
	pool := x509.NewCertPool()
	pool.AddCert(ca)
	return pool, tls.Certificate{Certificate: [][]byte{cert.Raw}, PrivateKey: key}
}

func TestTLS(t *testing.T) {
	for _, tc := range []struct {
		name, host string
		verify, ok bool
	}{
		{"verified name", "server.dc1.consul", true, true},
		{"other name", "web.example.com", true, false},
		{"name does not matter", "web.example.com", false, true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			pool, cert := certificates(t, tc.host)
			a := loopback(t, func(c *Config) {
				c.Dev = true
				c.VerifyServerHostname = tc.verify
				c.ServerTLS = &tls.Config{Certificates: []tls.Certificate{cert}, ClientCAs: pool, ClientAuth: tls.RequireAndVerifyClientCert}
				c.ClientTLS = &tls.Config{Certificates: []tls.Certificate{cert}, RootCAs: pool}
				c.RPCHoldTimeout = 500 * time.Millisecond
			})
			a.leads(t)
			got, err := a.request(state.Target{Leader: true}, http.MethodGet, "/whoami", "")
			if ok := err == nil; ok != tc.ok || ok && got != "a true  secret" {
				t.Errorf("request: %q, %v", got, err)
			}
			// Clear text is refused where certificates are demanded.
			plain := &transports{dialer: &dialer{network: tcpNetwork{}}}
			defer plain.close()
			r, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://server/whoami", nil)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := plain.roundTrip(r, server{dc: "dc1", address: a.server.Leader()}); err == nil {
				t.Error("a request in clear text was answered")
			}
		})
	}
	t.Run("unknown authority", func(t *testing.T) {
		pool, cert := certificates(t, "server.dc1.consul")
		other, _ := certificates(t, "server.dc1.consul")
		a := loopback(t, func(c *Config) {
			c.Dev = true
			c.ServerTLS = &tls.Config{Certificates: []tls.Certificate{cert}, ClientCAs: pool}
			c.ClientTLS = &tls.Config{RootCAs: other}
			c.RPCHoldTimeout = 500 * time.Millisecond
		})
		a.leads(t)
		if got, err := a.request(state.Target{Leader: true}, http.MethodGet, "/whoami", ""); err == nil {
			t.Errorf("a server of an unknown authority was trusted: %q", got)
		}
	})
}
