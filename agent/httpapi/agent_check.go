package httpapi

import (
	"cmp"
	"context"
	"net/http"
	"slices"
	"strings"

	"github.com/hashicorp/consul/api"

	"github.com/sluicemesh/sluice/agent/catalog"
)

// agentCheck is a check as /v1/agent/checks shows it.
type agentCheck struct {
	Node        string
	CheckID     string
	Name        string
	Status      string
	Notes       string
	Output      string
	ServiceID   string
	ServiceName string
	ServiceTags []string
	Type        string
	Interval    string
	Timeout     string
	ExposedPort int
	Definition  struct{}
	CreateIndex uint64
	ModifyIndex uint64
}

func agentCheckOf(k *catalog.Check) *agentCheck {
	out := &agentCheck{
		Node: k.Node, CheckID: k.CheckID, Name: k.Name, Status: k.Status, Notes: k.Notes, Output: k.Output,
		ServiceID: k.ServiceID, ServiceName: k.ServiceName, ServiceTags: k.ServiceTags, Type: k.Type, ExposedPort: k.ExposedPort,
	}
	if out.ServiceTags == nil {
		out.ServiceTags = []string{}
	}
	if d := k.Definition.IntervalDuration; d != 0 {
		out.Interval = d.String()
	}
	if d := k.Definition.TimeoutDuration; d != 0 {
		out.Timeout = d.String()
	}
	return out
}

func (c *call) agentChecks() (any, error) {
	out := map[string]*agentCheck{}
	for id, k := range c.h.agent.Checks(nil) {
		out[id] = agentCheckOf(k)
	}
	return filtered(c.opts.filter, out)
}

// checkRequest is the body of a check's registration; its token is ignored, as
// a service's is.
type checkRequest struct {
	api.AgentCheckRegistration
	Token string
}

func (c *call) agentCheckRegister() (any, error) {
	var req checkRequest
	if err := c.decodeBody(&req); err != nil {
		return nil, err
	}
	switch {
	case req.Name == "":
		return nil, bad("Missing check name")
	case req.Status != "" && !catalog.ValidCheckStatus(req.Status):
		return nil, bad("Bad check status")
	}
	if err := catalog.ValidateCheck(req.AgentServiceCheck); err != nil {
		return nil, bad("Invalid check: %v", err)
	}
	if req.ServiceID != "" && c.h.agent.Service(nil, req.ServiceID) == nil {
		return nil, status(http.StatusNotFound, "ServiceID %q does not exist", req.ServiceID)
	}
	def := req.AgentServiceCheck
	def.Status = cmp.Or(req.Status, api.HealthCritical)
	return nil, c.h.agent.RegisterCheck(context.WithoutCancel(c.ctx()), &CheckRegistration{
		ID:         cmp.Or(req.ID, req.CheckID, req.Name),
		Name:       req.Name,
		Notes:      cmp.Or(req.Notes, req.AgentServiceCheck.Notes),
		ServiceID:  req.ServiceID,
		Definition: def,
		Token:      c.token(),
	})
}

func (c *call) agentCheckDeregister() (any, error) {
	found, err := c.h.agent.DeregisterCheck(context.WithoutCancel(c.ctx()), c.param("id"))
	return nil, c.checkFound(found, err)
}

func (c *call) checkFound(found bool, err error) error {
	if err == nil && !found {
		return status(http.StatusNotFound, textUnknownCheck, c.param("id"))
	}
	return err
}

func (c *call) agentCheckPass() (any, error) { return c.setTTL(api.HealthPassing) }
func (c *call) agentCheckWarn() (any, error) { return c.setTTL(api.HealthWarning) }
func (c *call) agentCheckFail() (any, error) { return c.setTTL(api.HealthCritical) }

func (c *call) setTTL(state string) (any, error) {
	found, err := c.h.agent.UpdateTTL(context.WithoutCancel(c.ctx()), c.param("id"), state, c.query.Get("note"))
	return nil, c.checkFound(found, err)
}

func (c *call) agentCheckUpdate() (any, error) {
	var req struct{ Status, Output string }
	if err := c.decodeBody(&req); err != nil {
		return nil, err
	}
	if !catalog.ValidCheckStatus(req.Status) {
		return nil, bad("Invalid check status: '%s'", req.Status)
	}
	found, err := c.h.agent.UpdateTTL(context.WithoutCancel(c.ctx()), c.param("id"), req.Status, req.Output)
	return nil, c.checkFound(found, err)
}

// serviceHealth is an instance on this agent with the checks that count for it.
type serviceHealth struct {
	AggregatedStatus string
	Checks           []*agentCheck
	Service          *catalog.Service
}

// health returns the health of a service: its own checks' and the node's.
func (c *call) health(s *catalog.Service) serviceHealth {
	out := serviceHealth{Service: c.local(s), Checks: []*agentCheck{}}
	var counted []*catalog.Check
	for _, k := range c.h.agent.Checks(nil) {
		if k.ServiceID == "" || k.ServiceID == s.ID {
			counted = append(counted, k)
		}
	}
	slices.SortFunc(counted, func(a, b *catalog.Check) int { return strings.Compare(a.CheckID, b.CheckID) })
	for _, k := range counted {
		out.Checks = append(out.Checks, agentCheckOf(k))
	}
	out.AggregatedStatus = catalog.AggregatedStatus(counted)
	return out
}

// healthCodes are the codes by which load balancers ask, worst last.
var healthCodes = []struct {
	status string
	code   int
}{
	{api.HealthPassing, http.StatusOK},
	{api.HealthWarning, http.StatusTooManyRequests},
	{api.HealthCritical, http.StatusServiceUnavailable},
	{api.HealthMaint, http.StatusServiceUnavailable},
}

func healthRank(status string) int {
	for i, h := range healthCodes {
		if h.status == status {
			return i
		}
	}
	return len(healthCodes) - 2 // what is unknown is critical
}

// healthAnswer answers with a status and, unless only the word is asked for,
// with value.
func (c *call) healthAnswer(code int, reason, word string, value any) any {
	c.w.Header().Set("X-Consul-Reason", reason)
	if c.query.Get("format") == "text" || c.query.Get("format") == "" && acceptsText(c.r.Header) {
		return raw{code: code, contentType: "text/plain; charset=utf-8", body: []byte(word)}
	}
	return withStatus{code, value}
}

func acceptsText(header http.Header) bool {
	kind, _, _ := strings.Cut(header.Get("Accept"), ";")
	return strings.TrimSpace(kind) == "text/plain"
}

func (c *call) agentHealthByName() (any, error) {
	name := c.param("name")
	if name == "" {
		return nil, bad("Missing service Name")
	}
	out := []serviceHealth{}
	worst := 0
	for _, s := range c.h.agent.Services(nil) {
		if s.Service == name {
			h := c.health(s)
			worst = max(worst, healthRank(h.AggregatedStatus))
			out = append(out, h)
		}
	}
	if len(out) == 0 {
		reason := "ServiceName " + name + " Not Found"
		return c.healthAnswer(http.StatusNotFound, reason, reason, out), nil
	}
	slices.SortFunc(out, func(a, b serviceHealth) int { return strings.Compare(a.Service.ID, b.Service.ID) })
	h := healthCodes[worst]
	return c.healthAnswer(h.code, h.status, h.status, out), nil
}

func (c *call) agentHealthByID() (any, error) {
	id := c.param("id")
	if id == "" {
		return nil, bad("Missing serviceID")
	}
	s := c.h.agent.Service(nil, id)
	if s == nil {
		reason := "ServiceId " + id + " not found"
		return c.healthAnswer(http.StatusNotFound, reason, reason, struct {
			AggregatedStatus *string
			Checks           []*agentCheck
			Service          *catalog.Service
		}{}), nil
	}
	out := c.health(s)
	h := healthCodes[healthRank(out.AggregatedStatus)]
	return c.healthAnswer(h.code, h.status, h.status, out), nil
}
