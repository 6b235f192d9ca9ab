package httpapi

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"net/http"
	"time"

	"github.com/hashicorp/consul/api"
	"github.com/hashicorp/go-memdb"

	"github.com/sluicemesh/sluice/acl"
	"github.com/sluicemesh/sluice/agent/catalog"
)

// hashWait is how long a query by content hash waits if it does not say.
const hashWait = 10 * time.Minute

// local returns a service of this agent as the API shows it.
func (c *call) local(s *catalog.Service) *catalog.Service {
	out := *s
	out.Datacenter = c.h.cfg.Datacenter
	if out.Tags == nil {
		out.Tags = []string{}
	}
	if out.Meta == nil {
		out.Meta = map[string]string{}
	}
	return &out
}

func (c *call) agentServices() (any, error) {
	out := map[string]*catalog.Service{}
	for id, s := range c.h.agent.Services(nil) {
		out[id] = c.local(s)
	}
	return filtered(c.opts.filter, out)
}

func (c *call) agentService() (any, error) {
	id := c.param("id")
	if !c.opts.waitGiven {
		c.opts.wait = min(hashWait, c.h.cfg.MaxQueryTime)
	}
	var minIndex uint64
	if c.opts.hash != "" {
		minIndex = 1
	}
	_, value, err := c.wait(minIndex, nil, func(ws memdb.WatchSet) (uint64, any, error) {
		s := c.h.agent.Service(ws, id)
		if s == nil {
			return 2, nil, status(http.StatusNotFound, "unknown service ID: %s", id)
		}
		s = c.local(s)
		hash, err := contentHash(s)
		if err != nil {
			return 0, nil, err
		}
		s.ContentHash = hash
		// The content has no index; one that was not asked for counts as later.
		if hash == c.opts.hash {
			return 1, s, nil
		}
		return 2, s, nil
	})
	if err != nil {
		return nil, err
	}
	s := value.(*catalog.Service)
	c.w.Header().Set("X-Consul-ContentHash", s.ContentHash)
	return s, nil
}

// contentHash is a short digest of what a service says.
func contentHash(s *catalog.Service) (string, error) {
	b, err := json.Marshal(s)
	if err != nil {
		return "", err
	}
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:8]), nil
}

// serviceRequest is the body of a registration. The tokens in it are accepted
// because the same block in a file has them; over HTTP the request's token
// counts, and only a sidecar may have its own.
type serviceRequest struct {
	api.AgentServiceRegistration
	Token   string
	Connect *connectRequest
}

type connectRequest struct {
	api.AgentServiceConnect
	SidecarService *serviceRequest
}

// decodeRegistration reads the body of a registration.
func decodeRegistration(body []byte) (*catalog.Definition, error) {
	var req serviceRequest
	if err := decodeStrict(body, &req); err != nil {
		return nil, bad("Request decode failed: %v", err)
	}
	def := &catalog.Definition{AgentServiceRegistration: req.registration()}
	if req.Connect != nil && req.Connect.SidecarService != nil {
		def.SidecarToken = acl.Secret(req.Connect.SidecarService.Token)
	}
	return def, nil
}

func (r *serviceRequest) registration() api.AgentServiceRegistration {
	out := r.AgentServiceRegistration
	out.Connect = nil
	if r.Connect != nil {
		connect := r.Connect.AgentServiceConnect
		connect.SidecarService = nil
		if sc := r.Connect.SidecarService; sc != nil {
			reg := sc.registration()
			connect.SidecarService = &reg
		}
		out.Connect = &connect
	}
	return out
}

func (c *call) agentServiceRegister() (any, error) {
	def, err := decodeRegistration(c.body)
	if err != nil {
		return nil, err
	}
	if err := catalog.ValidateRegistration(def); err != nil {
		return nil, bad("%s", err)
	}
	catalog.NormalizeDefinition(def)
	if _, err := catalog.ValidateSidecar(def); err != nil {
		return nil, bad("%s", err)
	}
	def.Token = c.token()
	replace := false
	if v, ok := c.query["replace-existing-checks"]; ok {
		replace = v[0] == "" || v[0] == "true"
	}
	return nil, c.h.agent.RegisterService(context.WithoutCancel(c.ctx()), def, replace)
}

func (c *call) agentServiceDeregister() (any, error) {
	found, err := c.h.agent.DeregisterService(context.WithoutCancel(c.ctx()), c.param("id"))
	if err == nil && !found {
		err = status(http.StatusNotFound, textUnknownID, c.param("id"))
	}
	return nil, err
}

func (c *call) agentServiceMaintenance() (any, error) {
	id := c.param("id")
	if id == "" {
		return nil, bad("Missing service ID")
	}
	enable, err := c.enable()
	if err != nil {
		return nil, err
	}
	found, err := c.h.agent.ServiceMaintenance(context.WithoutCancel(c.ctx()), id, enable, c.query.Get("reason"), c.token())
	if err == nil && !found {
		err = status(http.StatusNotFound, textUnknownID, id)
	}
	return nil, err
}
