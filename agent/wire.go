package agent

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"reflect"
	"strings"

	"github.com/hashicorp/go-hclog"

	"github.com/sluicemesh/sluice/agent/cluster"
	"github.com/sluicemesh/sluice/agent/config"
	"github.com/sluicemesh/sluice/agent/connect"
)

// newMember makes the agent's part in the cluster of its configuration.
func newMember(rt *config.Runtime, id string, opts Options, log hclog.Logger) (member, error) {
	c := cluster.Config{
		NodeName: rt.Node.Name, NodeID: id, Datacenter: rt.Node.Datacenter, PrimaryDatacenter: rt.Node.PrimaryDatacenter,
		Domain: strings.TrimSuffix(rt.Node.Domain, "."), NodeMeta: rt.Node.Meta, Build: opts.Version + ":" + opts.Revision,
		Bootstrap: rt.Cluster.Bootstrap, BootstrapExpect: rt.Cluster.BootstrapExpect, Dev: rt.Node.Dev, DataDir: rt.Node.DataDir,
		BindLAN: rt.Network.SerfLAN.Addr().String(), AdvertiseLAN: rt.Network.Advertise.String(),
		AdvertiseWAN: rt.Network.AdvertiseWAN.String(),
		ServerPort:   int(rt.Network.RPC.Port()), SerfLANPort: int(rt.Network.SerfLAN.Port()), SerfWANPort: int(rt.Network.SerfWAN.Port()),
		RetryJoin: rt.Cluster.RetryJoin, RetryJoinWAN: rt.Cluster.RetryJoinWAN,
		RetryInterval: rt.Cluster.RetryInterval, RetryIntervalWAN: rt.Cluster.RetryIntervalWAN,
		RetryMax: rt.Cluster.RetryMax, RetryMaxWAN: rt.Cluster.RetryMaxWAN,
		RejoinAfterLeave: rt.Cluster.RejoinAfterLeave, GossipKey: rt.Cluster.Encrypt,
		GossipAcceptsClear: !rt.Cluster.EncryptVerifyIn, GossipSendsClear: !rt.Cluster.EncryptVerifyOut,
		AllowedLAN: rt.Cluster.LANAllowed, AllowedWAN: rt.Cluster.WANAllowed,
		ReconnectTimeoutLAN: rt.Cluster.ReconnectLAN, ReconnectTimeoutWAN: rt.Cluster.ReconnectWAN,
		VerifyServerHostname: rt.TLS.InternalRPC.VerifyServerHostname,
		RaftMultiplier:       rt.Performance.RaftMultiplier, LeaveDrainTime: rt.Cluster.LeaveDrain, RPCHoldTimeout: rt.Performance.RPCHold,
		NoConnect: !rt.Connect.Enabled, CAProvider: rt.Connect.CAProvider, CAConfig: caConfig(rt),
		BootstrapEntries: rt.ConfigEntries, ReplicationToken: rt.ACL.Replication,
		Logger: log,
	}
	if rt.Network.SerfWAN.IsValid() {
		c.BindWAN = rt.Network.SerfWAN.Addr().String()
	}
	if rt.Cluster.LeaveDrain == 0 {
		c.LeaveDrainTime = -1
	}
	var err error
	if c.ServerTLS, c.ClientTLS, err = rpcTLS(rt.TLS.InternalRPC); err != nil {
		return nil, err
	}
	if rt.Cluster.Server {
		return cluster.NewServer(c)
	}
	return cluster.NewClient(c)
}

// nodeMeta is the node's metadata: what the configuration has, and what every
// agent says of itself.
func nodeMeta(rt *config.Runtime, opts Options) map[string]string {
	meta := map[string]string{"consul-network-segment": "", "consul-version": opts.Version}
	for k, v := range rt.Node.Meta {
		meta[k] = v
	}
	return meta
}

// caConfig is connect.ca_config as the cluster wants it, the cluster ID included.
func caConfig(rt *config.Runtime) map[string]any {
	c := map[string]any{}
	for k, v := range rt.Connect.CAConfig {
		c[k] = v
	}
	if rt.Connect.ClusterID != "" {
		c["ClusterID"] = rt.Connect.ClusterID
	}
	return c
}

// rpcTLS builds the TLS of the RPC port; nil where it is not configured.
func rpcTLS(e config.TLSEndpoint) (server, client *tls.Config, err error) {
	if e.CertFile == "" && e.CAFile == "" && e.CAPath == "" {
		return nil, nil, nil
	}
	base, err := baseTLS(e)
	if err != nil {
		return nil, nil, fmt.Errorf("tls.internal_rpc: %w", err)
	}
	if e.CertFile != "" {
		server = base.Clone()
		server.ClientCAs = base.RootCAs
		if e.VerifyIncoming {
			server.ClientAuth = tls.RequireAndVerifyClientCert
		}
	}
	if e.VerifyOutgoing {
		client = base.Clone()
	}
	return server, client, nil
}

// httpsTLS builds the TLS of the HTTPS listener.
func httpsTLS(e config.TLSEndpoint) (*tls.Config, error) {
	if e.CertFile == "" || e.KeyFile == "" {
		return nil, fmt.Errorf("tls.https: ports.https needs a cert_file and a key_file")
	}
	c, err := baseTLS(e)
	if err != nil {
		return nil, fmt.Errorf("tls.https: %w", err)
	}
	c.ClientCAs = c.RootCAs
	if e.VerifyIncoming {
		c.ClientAuth = tls.RequireAndVerifyClientCert
	}
	return c, nil
}

func baseTLS(e config.TLSEndpoint) (*tls.Config, error) {
	c := &tls.Config{MinVersion: max(e.MinVersion, tls.VersionTLS12), CipherSuites: e.CipherSuites} //nolint:gosec // never below 1.2
	if e.CertFile != "" {
		cert, err := tls.LoadX509KeyPair(e.CertFile, e.KeyFile)
		if err != nil {
			return nil, fmt.Errorf("load cert_file %q and key_file %q: %w", e.CertFile, e.KeyFile, err)
		}
		c.Certificates = []tls.Certificate{cert}
	}
	files := []string{}
	if e.CAFile != "" {
		files = append(files, e.CAFile)
	}
	if e.CAPath != "" {
		list, err := filepath.Glob(filepath.Join(e.CAPath, "*"))
		if err != nil {
			return nil, fmt.Errorf("read ca_path %q: %w", e.CAPath, err)
		}
		files = append(files, list...)
	}
	for _, f := range files {
		pem, err := os.ReadFile(f)
		if err != nil {
			return nil, fmt.Errorf("read CA certificates: %w", err)
		}
		if c.RootCAs == nil {
			c.RootCAs = x509.NewCertPool()
		}
		if !c.RootCAs.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("read CA certificates: %s has none", f)
		}
	}
	return c, nil
}

// signer has leaves signed through the API, which finds the leader.
type signer struct{ client *http.Client }

// SignLeaf implements [connect.LeafSigner].
func (s signer) SignLeaf(ctx context.Context, csrPEM string) (*connect.Leaf, error) {
	body, err := json.Marshal(map[string]string{"CSR": csrPEM})
	if err != nil {
		return nil, err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://agent/v1/internal/connect/sign", bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	resp, err := s.client.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close() //nolint:errcheck // it has been read
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		return nil, err
	}
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("sign certificate: %s: %s", resp.Status, strings.TrimSpace(string(b)))
	}
	leaf := new(connect.Leaf)
	if err := json.Unmarshal(b, leaf); err != nil {
		return nil, fmt.Errorf("sign certificate: %w", err)
	}
	return leaf, nil
}

// debugConfig flattens the configuration for /v1/agent/self. Secrets are of a
// type that encodes to a placeholder.
func debugConfig(rt *config.Runtime, opts Options) map[string]any {
	out := map[string]any{"Version": opts.Version, "Revision": opts.Revision, "ACLsEnabled": false, "GRPCPort": -1, "GRPCTLSPort": -1}
	v := reflect.ValueOf(*rt)
	for i := range v.NumField() {
		section := v.Type().Field(i)
		if section.Type.Kind() != reflect.Struct {
			continue
		}
		for j := range v.Field(i).NumField() {
			f := section.Type.Field(j)
			if f.IsExported() && f.Name != "CAConfig" { // it may hold the CA's private key
				out[section.Name+f.Name] = v.Field(i).Field(j).Interface()
			}
		}
	}
	return out
}
