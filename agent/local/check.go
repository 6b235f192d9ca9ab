package local

import (
	"cmp"
	"fmt"
	"maps"
	"strings"
	"time"

	"github.com/hashicorp/consul/api"
	"github.com/hashicorp/go-memdb"

	"github.com/sluicemesh/sluice/acl"
	"github.com/sluicemesh/sluice/agent/catalog"
)

// The checks that maintenance is expressed by.
const (
	nodeMaintenance   = "_node_maintenance"
	maintenancePrefix = "_service_maintenance:"
)

// CheckRegistration is a check registered on its own.
type CheckRegistration struct {
	ID, Name, Notes string
	ServiceID       string // "" for a check of the node
	Status          string // initial; "" is critical
	Def             catalog.CheckDefinition
	Token           acl.Secret
}

// RegisterCheck adds a check or replaces it, keeping its result, and persists it.
// The service it names must be registered ([ErrNoService]).
func (r *Registry) RegisterCheck(c CheckRegistration) error { return r.registerCheck(c, false) }

func (r *Registry) registerCheck(c CheckRegistration, loading bool) error {
	// Maintenance is a check that nothing runs.
	if maintenance := c.ID == nodeMaintenance || strings.HasPrefix(c.ID, maintenancePrefix); !loading || !maintenance {
		if err := r.cfg.CheckSupported(c.Def); err != nil {
			return fmt.Errorf("check %q: %w", c.ID, err)
		}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	s := r.services[c.ServiceID]
	if c.ServiceID != "" && s == nil {
		return fmt.Errorf("service %q: %w", c.ServiceID, ErrNoService)
	}
	if r.dir != nil && !loading {
		if err := r.dir.saveCheck(c); err != nil {
			return fmt.Errorf("persist check %q: %w", c.ID, err)
		}
	}
	r.installCheckLocked(c)
	r.aliasesLocked()
	r.signalLocked(false)
	return nil
}

func (r *Registry) installCheckLocked(c CheckRegistration) {
	token := c.Token
	if s := r.services[c.ServiceID]; token == "" && s != nil {
		token = s.Token
	}
	r.putCheckLocked(catalog.CheckSpec{
		CheckID: c.ID, Name: c.Name, Notes: c.Notes, ServiceID: c.ServiceID, Status: c.Status, Def: c.Def,
	}, token, false, false)
}

// DeregisterCheck removes a check; false where there is none.
func (r *Registry) DeregisterCheck(id string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.checks[id] == nil {
		return false
	}
	delete(r.checks, id)
	r.forgetCheck(id)
	r.aliasesLocked()
	r.signalLocked(false)
	return true
}

func (r *Registry) forgetCheck(id string) {
	if r.dir == nil {
		return
	}
	if err := r.dir.removeCheck(id); err != nil {
		r.cfg.Logger.Error("persisted check not removed", "check", id, "error", err)
	}
}

// Checks returns the checks by ID.
func (r *Registry) Checks(ws memdb.WatchSet) map[string]*Check {
	r.mu.Lock()
	defer r.mu.Unlock()
	ws.Add(r.checksChanged)
	return maps.Clone(r.checks)
}

// Definitions returns what there is to run, by check ID.
func (r *Registry) Definitions(ws memdb.WatchSet) map[string]catalog.CheckDefinition {
	defs := map[string]catalog.CheckDefinition{}
	for id, c := range r.Checks(ws) {
		defs[id] = c.Def
	}
	return defs
}

// SetStatus records the result of a check. A check that is gone is no error.
func (r *Registry) SetStatus(id, status, output string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.setStatusLocked(id, status, output, true) {
		r.aliasesLocked()
		r.signalLocked(false)
	}
}

// setStatusLocked returns whether anything changed.
func (r *Registry) setStatusLocked(id, status, output string, fresh bool) bool {
	c := r.checks[id]
	if c == nil || c.Check.Status == status && c.Check.Output == output && c.Fresh == fresh {
		return false
	}
	n := *c
	rec := *c.Check
	if status != rec.Status {
		r.cfg.Logger.Info("check changed its status", "check", id, "service", rec.ServiceID, "from", rec.Status, "to", status)
		n.criticalAt = time.Time{}
		if status == api.HealthCritical {
			n.criticalAt = time.Now()
		}
	}
	rec.Status, rec.Output = status, output
	n.Check, n.Fresh = &rec, fresh
	r.checks[id] = &n
	return true
}

// adopt takes the catalog's result for a check that has none of its own yet, so
// that a restarted agent does not call healthy services critical until it has
// looked.
func (r *Registry) adopt(id, status, output string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if c := r.checks[id]; c == nil || c.Fresh || c.Def.Status != "" {
		return
	}
	if r.setStatusLocked(id, status, output, false) {
		r.signalLocked(false)
	}
}

// UpdateTTL sets the result of a TTL check and starts its time afresh; found is
// false where there is no such check.
func (r *Registry) UpdateTTL(id, status, output string) (found bool, err error) {
	r.mu.Lock()
	c := r.checks[id]
	r.mu.Unlock()
	if c == nil {
		return false, nil
	}
	ttl, err := time.ParseDuration(c.Def.TTL)
	if err != nil || ttl <= 0 {
		return true, fmt.Errorf("CheckID %q does not have associated TTL", id) //nolint:staticcheck // Consul's text
	}
	r.SetStatus(id, status, output)
	r.cfg.Beat(id)
	if r.dir != nil {
		if err := r.dir.saveTTLState(id, ttlState{Status: status, Output: output, Expires: time.Now().Add(ttl)}); err != nil {
			r.cfg.Logger.Warn("state of TTL check not saved: after a restart it is critical until its next update", "check", id, "error", err)
		}
	}
	return true, nil
}

// ServiceMaintenance turns maintenance of a service on or off; false where there
// is no such service.
func (r *Registry) ServiceMaintenance(id string, enable bool, reason string, token acl.Secret) (found bool, err error) {
	r.mu.Lock()
	found = r.services[id] != nil
	r.mu.Unlock()
	if !found {
		return false, nil
	}
	return true, r.maintenance(maintenancePrefix+id, "Service Maintenance Mode", id, enable,
		cmp.Or(reason, "Maintenance mode is enabled for this service, but no reason was provided. This is a default message."), token)
}

// NodeMaintenance turns maintenance of the node on or off.
func (r *Registry) NodeMaintenance(enable bool, reason string, token acl.Secret) error {
	return r.maintenance(nodeMaintenance, "Node Maintenance Mode", "", enable,
		cmp.Or(reason, "Maintenance mode is enabled for this node, but no reason was provided. This is a default message."), token)
}

func (r *Registry) maintenance(id, name, service string, enable bool, reason string, token acl.Secret) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !enable {
		if r.checks[id] != nil {
			delete(r.checks, id)
			r.forgetCheck(id)
			r.signalLocked(false)
		}
		return nil
	}
	if r.checks[id] != nil {
		return nil
	}
	reg := CheckRegistration{ID: id, Name: name, Notes: reason, ServiceID: service, Status: api.HealthCritical, Token: token,
		Def: catalog.CheckDefinition{Status: api.HealthCritical}}
	if r.dir != nil {
		if err := r.dir.saveCheck(reg); err != nil {
			return fmt.Errorf("persist check %q: %w", id, err)
		}
	}
	r.putCheckLocked(catalog.CheckSpec{CheckID: id, Name: name, Notes: reason, ServiceID: service, Status: api.HealthCritical, Def: reg.Def}, token, false, false)
	r.signalLocked(false)
	return nil
}

// aliasesLocked gives each alias check the worst status of the service it stands
// for.
func (r *Registry) aliasesLocked() {
	for id, c := range r.checks {
		target := c.Def.AliasService
		if target == "" {
			continue
		}
		status, output := api.HealthPassing, "No checks found."
		for oid, o := range r.checks {
			if oid == id || o.Check.ServiceID != target {
				continue
			}
			if output == "No checks found." {
				output = "All checks passing."
			}
			if worse(o.Check.Status, status) {
				status, output = o.Check.Status, fmt.Sprintf("Aliased check %q failing: %s", o.Check.Name, o.Check.Output)
			}
		}
		if r.services[target] == nil {
			status, output = api.HealthCritical, fmt.Sprintf("Service %s could not be found on node %s", target, r.cfg.Node.Node)
		}
		r.setStatusLocked(id, status, output, true)
	}
}

func worse(a, b string) bool {
	rank := map[string]int{api.HealthPassing: 0, api.HealthWarning: 1, api.HealthCritical: 2}
	return rank[a] > rank[b]
}

// checkRecord is the part of a definition that the catalog shows.
func checkRecord(d catalog.CheckDefinition) api.HealthCheckDefinition {
	rec := api.HealthCheckDefinition{
		HTTP: d.HTTP, Header: d.Header, Method: d.Method, Body: d.Body,
		TLSServerName: d.TLSServerName, TLSSkipVerify: d.TLSSkipVerify, TCP: d.TCP, TCPUseTLS: d.TCPUseTLS,
	}
	// A duration that does not parse has been refused before.
	rec.IntervalDuration, _ = time.ParseDuration(d.Interval)
	rec.TimeoutDuration, _ = time.ParseDuration(d.Timeout)
	rec.DeregisterCriticalServiceAfterDuration, _ = time.ParseDuration(d.DeregisterCriticalServiceAfter)
	return rec
}
