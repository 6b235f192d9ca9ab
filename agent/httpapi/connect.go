package httpapi

import (
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/hashicorp/consul/api"
	"github.com/hashicorp/go-memdb"

	"github.com/sluicemesh/sluice/agent/catalog"
	"github.com/sluicemesh/sluice/agent/configentry"
	"github.com/sluicemesh/sluice/agent/connect"
)

func (c *call) connectRoots() (any, error) {
	asPEM := false
	if v := c.query.Get("pem"); v != "" {
		var err error
		if asPEM, err = strconv.ParseBool(v); err != nil {
			return nil, bad("The 'pem' query parameter must be a boolean value")
		}
	}
	value, err := c.blocking(func(ws memdb.WatchSet) (uint64, any, error) {
		idx, roots, err := c.store().CARoots(ws)
		if err == nil && roots == nil {
			err = errNoCA
		}
		return idx, roots, err
	})
	if err != nil || !asPEM {
		return value, err
	}
	var b strings.Builder
	add := func(cert string) {
		b.WriteString(cert)
		if !strings.HasSuffix(cert, "\n") {
			b.WriteByte('\n')
		}
	}
	for _, root := range value.(*connect.Roots).Roots {
		add(root.RootCert)
		for _, cert := range root.IntermediateCerts {
			add(cert)
		}
	}
	return raw{contentType: "application/pem-certificate-chain", body: []byte(b.String())}, nil
}

func (c *call) connectCAConfig() (any, error) {
	_, cfg, err := c.store().CAConfig(nil)
	if err == nil && cfg == nil {
		err = errNoCA
	}
	return cfg, err
}

func (c *call) connectSetCAConfig() (any, error) {
	var cfg connect.CAConfig
	if err := c.decodeBody(&cfg); err != nil {
		return nil, err
	}
	return nil, c.h.cluster.SetCAConfig(c.ctx(), &cfg)
}

// chainRequest is the body of a POST for a discovery chain.
type chainRequest struct {
	OverrideMeshGateway    api.MeshGatewayConfig
	OverrideProtocol       string
	OverrideConnectTimeout any // a duration as text or in nanoseconds
}

func (c *call) discoveryChain() (any, error) {
	name := c.param("service")
	if name == "" {
		return nil, bad("Missing chain name")
	}
	req := configentry.CompileRequest{
		Service:              catalog.Name(name),
		EvaluateInDatacenter: c.query.Get("compile-dc"),
	}
	if req.EvaluateInDatacenter == "" {
		req.EvaluateInDatacenter = c.h.cfg.Datacenter
	}
	if c.r.Method == http.MethodPost {
		if err := c.chainOverrides(&req); err != nil {
			return nil, err
		}
	}
	return c.blocking(func(ws memdb.WatchSet) (uint64, any, error) {
		idx, roots, err := c.store().CARoots(ws)
		if err != nil {
			return 0, nil, err
		}
		if roots != nil {
			req.TrustDomain = roots.TrustDomain
		}
		chain, err := configentry.CompileChain(c.entries(ws, &idx), req)
		if err != nil {
			return 0, nil, err
		}
		return idx, map[string]any{"Chain": chain}, nil
	})
}

func (c *call) chainOverrides(req *configentry.CompileRequest) error {
	var body chainRequest
	if len(c.body) > 0 {
		if err := c.decodeBody(&body); err != nil {
			return err
		}
	}
	mode, err := catalog.ParseMode(string(body.OverrideMeshGateway.Mode))
	if err != nil {
		return bad("Invalid OverrideMeshGateway.Mode parameter")
	}
	req.OverrideMeshGateway, req.OverrideProtocol = mode, body.OverrideProtocol
	switch v := body.OverrideConnectTimeout.(type) {
	case nil:
	case float64:
		req.OverrideConnectTimeout = time.Duration(v)
	case string:
		if req.OverrideConnectTimeout, err = time.ParseDuration(v); err != nil {
			return bad("Request decode failed: OverrideConnectTimeout: %v", err)
		}
	default:
		return bad("Request decode failed: OverrideConnectTimeout is no duration")
	}
	return nil
}
