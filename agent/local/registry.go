// Package local holds what is registered on this node: services, proxies and
// checks, from configuration files and from the HTTP API. It persists the
// latter, merges central configuration in, and keeps the catalog equal to it
// (anti-entropy).
//
// The registry is the authority for its node: what the catalog has for the node
// and the registry has not is removed there. Values handed out are shared and
// never written to again; every change replaces.
package local

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/consul/api"
	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/go-memdb"

	"github.com/sluicemesh/sluice/acl"
	"github.com/sluicemesh/sluice/agent/catalog"
)

// ErrNoService is wrapped by errors about a service that is not registered here.
var ErrNoService = errors.New("service is not registered on this agent")

// Config of a [Registry].
type Config struct {
	// Node is this agent's own record.
	Node       *catalog.Node
	Datacenter string
	// DataDir keeps what the HTTP API registers; "" keeps nothing.
	DataDir string
	// SidecarMinPort and SidecarMaxPort bound the ports given to sidecars that
	// name none; 0 and 0 give none.
	SidecarMinPort, SidecarMaxPort int
	// DeregisterCritical is how long a check may be critical before its service is
	// deregistered, where the check does not say; 0 is for ever.
	DeregisterCritical time.Duration
	// CheckSupported says why a check cannot be run here; nil accepts all.
	CheckSupported func(catalog.CheckDefinition) error
	// Beat is told of each update of a TTL check; nil for nobody.
	Beat   func(checkID string)
	Logger hclog.Logger
}

// Service is a service registered on this node.
type Service struct {
	// Registered is the registration, sidecar expanded, as its author meant it;
	// Merged has central configuration merged in, once that is known.
	Registered, Merged *catalog.Service
	Token              acl.Secret
	FromFile           bool
	// Parent is the ID of the service whose sidecar_service block this came from.
	Parent string

	def     *catalog.Definition // what is persisted; nil for a sidecar from a block
	changed chan struct{}       // closed when this value is replaced or removed
}

// Check is a check registered on this node, with its last result.
type Check struct {
	// Check is the record as the catalog is to show it.
	Check *catalog.Check
	Def   catalog.CheckDefinition
	Token acl.Secret
	// Fresh is true once there has been a result since the agent started. Until
	// then the status is the initial one, and gives way to the catalog's.
	Fresh bool

	fromFile    bool
	withService bool // came with its service's registration, and is persisted there
	criticalAt  time.Time
}

// Registry is the set of what is registered on this node. It is safe for
// concurrent use. The zero value is not usable.
type Registry struct {
	cfg Config
	dir *dir // nil where nothing is persisted

	// mu guards what follows.
	mu              sync.Mutex
	services        map[string]*Service
	checks          map[string]*Check
	servicesChanged chan struct{}
	checksChanged   chan struct{}
	// early are persisted checks of services that files define, which come later.
	early []CheckRegistration
}

// Open returns a registry with what was persisted under cfg.DataDir. What cannot
// be read is logged and left where it is; it does not keep an agent from
// starting. Definitions from files come after, with [Registry.ReplaceFiles].
func Open(cfg Config) (*Registry, error) {
	if cfg.Logger == nil {
		cfg.Logger = hclog.NewNullLogger()
	}
	if cfg.CheckSupported == nil {
		cfg.CheckSupported = func(catalog.CheckDefinition) error { return nil }
	}
	if cfg.Beat == nil {
		cfg.Beat = func(string) {}
	}
	r := &Registry{
		cfg:             cfg,
		services:        map[string]*Service{},
		checks:          map[string]*Check{},
		servicesChanged: make(chan struct{}),
		checksChanged:   make(chan struct{}),
	}
	if cfg.DataDir == "" {
		return r, nil
	}
	d, err := openDir(cfg.DataDir)
	if err != nil {
		return nil, err
	}
	r.dir = d
	services, checks, problems := d.load()
	for _, p := range problems {
		cfg.Logger.Error("persisted registration not loaded", "error", p)
	}
	for _, s := range services {
		if err := r.register(s.def, options{sidecarPort: s.sidecarPort, loading: true}); err != nil {
			cfg.Logger.Error("persisted service not registered", "service", s.def.ID, "error", err)
		}
	}
	for _, c := range checks {
		if err := r.registerCheck(c, true); errors.Is(err, ErrNoService) {
			r.early = append(r.early, c)
		} else if err != nil {
			cfg.Logger.Error("persisted check not registered", "check", c.ID, "error", err)
		}
	}
	for id, st := range d.loadTTLStates(time.Now()) {
		if c := r.checks[id]; c != nil && c.Def.TTL != "" {
			r.setStatusLocked(id, st.Status, st.Output, true)
		}
	}
	return r, nil
}

// options of one registration.
type options struct {
	fromFile      bool
	replaceChecks bool
	loading       bool // from disk: not persisted again
	sidecarPort   int  // the port the sidecar had, 0 for none
}

// Register adds a service, or replaces the one with the same ID, and its sidecar
// where def has a sidecar_service block; it persists them. Checks that def does
// not name stay, unless replaceChecks; those it does keep their status. def has
// been normalised and validated, and is the registry's from then on.
func (r *Registry) Register(def *catalog.Definition, replaceChecks bool) error {
	r.mu.Lock()
	if old := r.services[def.ID]; old != nil && old.FromFile {
		r.cfg.Logger.Warn("service of a configuration file replaced through the API until the next reload", "service", def.ID)
	}
	r.mu.Unlock()
	return r.register(def, options{replaceChecks: replaceChecks})
}

func (r *Registry) register(def *catalog.Definition, o options) error {
	side, err := catalog.ExpandSidecar(def)
	if err != nil {
		return fmt.Errorf("Invalid SidecarService: %w", err) //nolint:staticcheck // Consul's text
	}
	specs, err := r.specs(def)
	if err != nil {
		return err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	var sideSpecs []catalog.CheckSpec
	if side != nil {
		if side.Port == 0 && side.SocketPath == "" {
			port, err := r.portLocked(side.ID, o.sidecarPort)
			if err != nil {
				return err
			}
			catalog.AssignSidecarPort(side, port)
		}
		if sideSpecs, err = r.specs(side); err != nil {
			return err
		}
	}
	if r.dir != nil && o.fromFile {
		if err := r.dir.removeService(def.ID); err != nil { // a file's definition beats a persisted one
			return fmt.Errorf("remove persisted service %q: %w", def.ID, err)
		}
	}
	if r.dir != nil && !o.fromFile && !o.loading {
		port := 0
		if side != nil {
			port = side.Port
		}
		if err := r.dir.saveService(def, port); err != nil {
			return fmt.Errorf("persist service %q: %w", def.ID, err)
		}
	}
	r.installLocked(&Service{
		Registered: catalog.ServiceOf(def), Token: def.Token, FromFile: o.fromFile, def: def,
	}, specs, o)
	sideID := catalog.SidecarID(def.ID)
	if side != nil {
		r.installLocked(&Service{
			Registered: catalog.ServiceOf(side), Token: cmp.Or(side.Token, def.Token), FromFile: o.fromFile, Parent: def.ID,
		}, sideSpecs, o)
	} else if old := r.services[sideID]; old != nil && old.Parent == def.ID {
		r.removeLocked(sideID)
	}
	r.aliasesLocked()
	r.signalLocked(true)
	return nil
}

func (r *Registry) specs(def *catalog.Definition) ([]catalog.CheckSpec, error) {
	specs, err := catalog.ChecksOf(def)
	if err != nil {
		return nil, err
	}
	for _, s := range specs {
		if err := r.cfg.CheckSupported(s.Def); err != nil {
			return nil, fmt.Errorf("check %q: %w", s.CheckID, err)
		}
	}
	return specs, nil
}

// installLocked puts s and its checks in.
func (r *Registry) installLocked(s *Service, specs []catalog.CheckSpec, o options) {
	id := s.Registered.ID
	s.changed = make(chan struct{})
	s.Merged = s.Registered
	if old := r.services[id]; old != nil {
		close(old.changed)
	}
	r.services[id] = s
	for cid, c := range r.checks {
		if c.Check.ServiceID != id {
			continue
		}
		keep := !o.replaceChecks && !c.withService || strings.HasPrefix(cid, maintenancePrefix)
		if !keep && !slices.ContainsFunc(specs, func(x catalog.CheckSpec) bool { return x.CheckID == cid }) {
			delete(r.checks, cid)
			r.forgetCheck(cid)
		}
	}
	for _, spec := range specs {
		r.putCheckLocked(spec, s.Token, o.fromFile, true)
	}
	for _, c := range r.checks { // a service may have another name or other tags now
		if c.Check.ServiceID == id && (c.Check.ServiceName != s.Registered.Service || !slices.Equal(c.Check.ServiceTags, s.Registered.Tags)) {
			n := *c
			rec := *c.Check
			rec.ServiceName, rec.ServiceTags = s.Registered.Service, s.Registered.Tags
			n.Check = &rec
			r.checks[rec.CheckID] = &n
		}
	}
}

// putCheckLocked adds a check, or replaces it and keeps its result.
func (r *Registry) putCheckLocked(spec catalog.CheckSpec, token acl.Secret, fromFile, withService bool) {
	rec := &catalog.Check{
		Node: r.cfg.Node.Node, CheckID: spec.CheckID, Name: spec.Name, Notes: spec.Notes,
		Status: cmp.Or(spec.Status, api.HealthCritical), ServiceID: spec.ServiceID, ServiceTags: []string{},
		Type: catalog.CheckType(spec.Def), Definition: checkRecord(spec.Def),
	}
	if s := r.services[spec.ServiceID]; s != nil {
		rec.ServiceName, rec.ServiceTags = s.Registered.Service, s.Registered.Tags
	}
	c := &Check{Check: rec, Def: spec.Def, Token: token, fromFile: fromFile, withService: withService}
	if old := r.checks[spec.CheckID]; old != nil && old.Check.ServiceID == spec.ServiceID {
		rec.Status, rec.Output = old.Check.Status, old.Check.Output
		c.Fresh, c.criticalAt = old.Fresh, old.criticalAt
	}
	if rec.Status == api.HealthCritical && c.criticalAt.IsZero() {
		c.criticalAt = time.Now()
	}
	r.checks[spec.CheckID] = c
}

// portLocked chooses a port for a sidecar: the one it has, the one it had, or
// the first that no service of this agent uses.
func (r *Registry) portLocked(id string, had int) (int, error) {
	if old := r.services[id]; old != nil && old.Registered.Port != 0 {
		return old.Registered.Port, nil
	}
	used := map[int]bool{}
	for _, s := range r.services {
		used[s.Registered.Port] = true
	}
	lo, hi := r.cfg.SidecarMinPort, r.cfg.SidecarMaxPort
	if lo <= 0 || hi <= 0 {
		return 0, errors.New("no port provided for sidecar_service and auto-assignment disabled in config")
	}
	if had >= lo && had <= hi && !used[had] {
		return had, nil
	}
	for p := lo; p <= hi; p++ {
		if !used[p] {
			return p, nil
		}
	}
	return 0, fmt.Errorf("no port provided for sidecar_service and none left in the configured range [%d, %d]", lo, hi)
}

// Deregister removes a service, the sidecar that came with it, and their checks.
// It returns false where there is no such service.
func (r *Registry) Deregister(id string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.services[id] == nil {
		return false
	}
	for sid, s := range r.services {
		if s.Parent == id {
			r.removeLocked(sid)
		}
	}
	r.removeLocked(id)
	r.aliasesLocked()
	r.signalLocked(true)
	return true
}

func (r *Registry) removeLocked(id string) {
	s := r.services[id]
	close(s.changed)
	delete(r.services, id)
	for cid, c := range r.checks {
		if c.Check.ServiceID == id {
			delete(r.checks, cid)
			r.forgetCheck(cid)
		}
	}
	if r.dir != nil && s.Parent == "" {
		if err := r.dir.removeService(id); err != nil {
			r.cfg.Logger.Error("persisted service not removed", "service", id, "error", err)
		}
	}
}

// ReplaceFiles makes defs and checks the registrations that come from files:
// those of before that are missing now are removed. The definitions have been
// validated. What cannot be registered is returned joined; the rest is in place.
func (r *Registry) ReplaceFiles(defs []*catalog.Definition, checks []catalog.CheckSpec) error {
	var errs []error
	for _, d := range defs {
		if err := r.register(d, options{fromFile: true, replaceChecks: true}); err != nil {
			errs = append(errs, fmt.Errorf("register service %q: %w", d.ID, err))
		}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	want := map[string]bool{}
	for _, d := range defs {
		want[d.ID] = true
	}
	for id, s := range r.services {
		if s.FromFile && s.Parent == "" && !want[id] {
			for sid, side := range r.services {
				if side.Parent == id {
					r.removeLocked(sid)
				}
			}
			r.removeLocked(id)
		}
	}
	wantCheck := map[string]bool{}
	for _, spec := range checks {
		wantCheck[spec.CheckID] = true
		if err := r.cfg.CheckSupported(spec.Def); err != nil {
			errs = append(errs, fmt.Errorf("register check %q: %w", spec.CheckID, err))
			continue
		}
		if spec.ServiceID != "" && r.services[spec.ServiceID] == nil {
			errs = append(errs, fmt.Errorf("register check %q: ServiceID %q does not exist", spec.CheckID, spec.ServiceID))
			continue
		}
		r.putCheckLocked(spec, "", true, false)
	}
	for id, c := range r.checks {
		if c.fromFile && !c.withService && !wantCheck[id] {
			delete(r.checks, id)
		}
	}
	for _, c := range r.early {
		if r.services[c.ServiceID] == nil {
			r.cfg.Logger.Error("persisted check not registered", "check", c.ID, "error", fmt.Errorf("service %q: %w", c.ServiceID, ErrNoService))
		} else if r.checks[c.ID] == nil {
			r.installCheckLocked(c)
		}
	}
	r.early = nil
	r.aliasesLocked()
	r.signalLocked(true)
	return errors.Join(errs...)
}

// Services returns what is registered, by ID.
func (r *Registry) Services(ws memdb.WatchSet) map[string]*Service {
	r.mu.Lock()
	defer r.mu.Unlock()
	ws.Add(r.servicesChanged)
	return maps.Clone(r.services)
}

// Service returns one service, or nil. Its channel closes only when this one
// changes.
func (r *Registry) Service(ws memdb.WatchSet, id string) *Service {
	r.mu.Lock()
	defer r.mu.Unlock()
	s := r.services[id]
	if s == nil {
		ws.Add(r.servicesChanged)
		return nil
	}
	ws.Add(s.changed)
	return s
}

// setMerged records the merged form of a service, if it is still the registered
// one that was merged.
func (r *Registry) setMerged(id string, registered, merged *catalog.Service) {
	r.mu.Lock()
	defer r.mu.Unlock()
	s := r.services[id]
	if s == nil || s.Registered != registered || sameService(s.Merged, merged) {
		return
	}
	n := *s
	n.Merged, n.changed = merged, make(chan struct{})
	close(s.changed)
	r.services[id] = &n
	r.signalLocked(true)
}

// signalLocked wakes those who watch the checks, and the services too.
func (r *Registry) signalLocked(services bool) {
	if services {
		close(r.servicesChanged)
		r.servicesChanged = make(chan struct{})
	}
	close(r.checksChanged)
	r.checksChanged = make(chan struct{})
}

// Node returns the record of this node.
func (r *Registry) Node() *catalog.Node { return r.cfg.Node }

// Run deregisters services whose checks have been critical for longer than the
// checks allow. It blocks until ctx ends.
func (r *Registry) Run(ctx context.Context) error {
	const every = 30 * time.Second
	tick := time.NewTicker(every)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case now := <-tick.C:
			for _, id := range r.overdue(now) {
				r.cfg.Logger.Warn("service deregistered: critical for too long", "service", id)
				r.Deregister(id)
			}
		}
	}
}

// overdue returns the services to deregister.
func (r *Registry) overdue(now time.Time) []string {
	const least = time.Minute
	r.mu.Lock()
	defer r.mu.Unlock()
	var ids []string
	for _, c := range r.checks {
		after := r.cfg.DeregisterCritical
		if own := c.Def.DeregisterCriticalServiceAfter; own != "" {
			after, _ = time.ParseDuration(own) // 0, which is never, for what is none
		}
		if after <= 0 || c.Check.ServiceID == "" || c.Check.Status != api.HealthCritical {
			continue
		}
		if now.Sub(c.criticalAt) >= max(after, least) {
			ids = append(ids, c.Check.ServiceID)
		}
	}
	slices.Sort(ids)
	return slices.Compact(ids)
}
