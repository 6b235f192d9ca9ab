package gateway

import (
	"cmp"
	"fmt"
	"slices"
	"time"

	"github.com/hashicorp/consul/api"

	"github.com/sluicemesh/sluice/agent/catalog"
	"github.com/sluicemesh/sluice/proxycfg"
)

// Phase says how a proxy is doing.
type Phase string

// The phases of a proxy.
const (
	// PhaseServing: the table in use is current.
	PhaseServing Phase = "serving"
	// PhaseStale: a table is in use, and newer knowledge cannot be had.
	PhaseStale Phase = "stale"
	// PhasePending: there is no table yet.
	PhasePending Phase = "pending"
	// PhaseFailed: there is a table and no data plane that uses it, or no table can
	// be made.
	PhaseFailed Phase = "failed"
)

// ProxyStatus tells of one proxy.
type ProxyStatus struct {
	ID      string
	Kind    catalog.Kind
	Service string
	// DataPlane is the name of the one that was chosen.
	DataPlane string
	State     Phase
	// Reason says in a sentence why the state is not serving.
	Reason string `json:",omitempty"`
	// TableIndex and TableAsOf are of the table in use; Age is how long ago AsOf
	// was. Zero without a table.
	TableIndex uint64
	TableAsOf  time.Time
	Age        Duration
	Stale      bool
	// FromDisk says that the table is the last known good of an earlier run.
	FromDisk bool `json:",omitempty"`
	// CertificateExpires is when the table's certificate does; zero without one.
	CertificateExpires time.Time `json:",omitzero"`
	// Warnings are the table's.
	Warnings []string `json:",omitempty"`
	// Drain is how far its drain is; nil while it is in use.
	Drain *Progress `json:",omitempty"`
	// Plane is what the data plane says; nil while none runs.
	Plane     *Status          `json:",omitempty"`
	Upstreams []UpstreamStatus `json:",omitempty"`
}

// Duration is a [time.Duration] that people read: it encodes as "1.25s".
type Duration time.Duration

// MarshalText implements [encoding.TextMarshaler].
func (d Duration) MarshalText() ([]byte, error) {
	return []byte(time.Duration(d).Round(time.Millisecond).String()), nil
}

// UnmarshalText implements [encoding.TextUnmarshaler].
func (d *Duration) UnmarshalText(b []byte) error {
	v, err := time.ParseDuration(string(b))
	*d = Duration(v)
	return err
}

// UpstreamStatus tells by what way an upstream is reached.
type UpstreamStatus struct {
	Name       string // as Consul names it: "api", "api?dc=dc2"
	Listener   string
	Service    string
	Datacenter string
	Mode       api.MeshGatewayMode
	ModeFrom   string `json:",omitempty"`
	// Via is "direct", or "gateway" with ViaDatacenter.
	Via           proxycfg.Via `json:",omitempty"`
	ViaDatacenter string       `json:",omitempty"`
	Endpoints     int
	Healthy       int
	// Failovers are the services to go to instead, "api in dc3", in order.
	Failovers []string `json:",omitempty"`
	Pending   bool     `json:",omitempty"`
	Err       string   `json:",omitempty"`
}

// Status tells of every proxy, by ID. It does not block.
func (r *Runner) Status() []ProxyStatus {
	workers := r.all()
	out := make([]ProxyStatus, 0, len(workers))
	for _, w := range workers {
		out = append(out, w.status(time.Now()))
	}
	slices.SortFunc(out, func(a, b ProxyStatus) int { return cmp.Compare(a.ID, b.ID) })
	return out
}

func (w *worker) status(now time.Time) ProxyStatus {
	s, v, p := w.state.Load(), w.view.Load(), w.plane.Load()
	st := ProxyStatus{
		ID:        w.id,
		Kind:      s.Proxy.Service.Kind,
		Service:   s.Proxy.Service.Service,
		DataPlane: v.planeName,
	}
	if j := w.drain.Load(); j != nil {
		st.Drain = j.progress.Load()
	}
	if p.plane != nil {
		plane := p.plane.Status()
		st.Plane = &plane
	}
	if t := v.table; t != nil {
		st.TableIndex, st.TableAsOf, st.Warnings = t.Index, v.asOf, t.Warnings
		st.FromDisk = !v.kept.IsZero()
		if !v.asOf.IsZero() {
			st.Age = Duration(max(0, now.Sub(v.asOf)))
		}
	}
	if st.Plane != nil {
		for _, l := range st.Plane.Listeners {
			if l.Error != "" && !l.Bound {
				st.Warnings = append(slices.Clip(st.Warnings), fmt.Sprintf("listener %s is not bound: %s", l.Name, l.Error))
			}
		}
	}
	switch {
	case v.table == nil && v.err != nil:
		st.State, st.Reason = PhaseFailed, v.err.Error()
	case v.table == nil && s.Err != nil && s.Phase != proxycfg.PhasePending:
		st.State, st.Reason = PhaseFailed, s.Err.Error()
	case v.table == nil:
		st.State, st.Reason = PhasePending, "no snapshot yet"
		if s.Err != nil {
			st.Reason = s.Err.Error()
		}
	case p.err != nil:
		st.State, st.Reason = PhaseFailed, fmt.Sprintf("the data plane ended: %v", p.err)
		st.Stale = st.FromDisk || s.Err != nil
	case st.FromDisk:
		st.State, st.Stale, st.Reason = PhaseStale, true, "the table is the last one of an earlier run; nothing newer is known yet"
		if s.Err != nil {
			st.Reason += ": " + s.Err.Error()
		}
	case v.err != nil:
		st.State, st.Stale, st.Reason = PhaseStale, true, "the newest snapshot has no usable table: "+v.err.Error()
	case s.Err != nil:
		st.State, st.Stale, st.Reason = PhaseStale, true, s.Err.Error()
	default:
		st.State = PhaseServing
	}
	if v.table != nil {
		if id := v.table.Identity; id != nil {
			st.CertificateExpires = id.NotAfter
		}
		if at := st.CertificateExpires; !at.IsZero() && now.After(at) {
			st.Reason = joinReasons(st.Reason, fmt.Sprintf("the certificate expired at %s", at.UTC().Format(time.RFC3339)))
			st.State, st.Stale = PhaseStale, true
		}
		st.Upstreams = upstreams(v)
	}
	return st
}

func joinReasons(a, b string) string {
	if a == "" {
		return b
	}
	return a + "; " + b
}

// upstreams tells of the upstreams of a view. A table of an earlier run has no
// snapshot, and says of modes only what its origins do.
func upstreams(v *view) []UpstreamStatus {
	var out []UpstreamStatus
	cluster := func(st *UpstreamStatus, listener string) {
		for i := range v.table.Listeners {
			l := &v.table.Listeners[i]
			if l.Mode != ListenUpstream || l.Name != listener {
				continue
			}
			st.Listener = l.Address
			if c := v.table.Cluster(l.Cluster); c != nil {
				st.Pending = st.Pending || c.Pending
				st.Endpoints = len(c.Endpoints)
				for _, e := range c.Endpoints {
					if e.Healthy {
						st.Healthy++
					}
				}
			}
			return
		}
	}
	if v.snapshot == nil || v.snapshot.Sidecar == nil {
		for i := range v.table.Listeners {
			if l := &v.table.Listeners[i]; l.Mode == ListenUpstream {
				st := UpstreamStatus{Name: l.upstream()}
				cluster(&st, l.Name)
				out = append(out, st)
			}
		}
		return out
	}
	for i := range v.snapshot.Sidecar.Upstreams {
		u := &v.snapshot.Sidecar.Upstreams[i]
		st := UpstreamStatus{
			Name:       upstreamID(&u.Config),
			Service:    u.Config.DestinationName,
			Datacenter: cmp.Or(u.Config.Datacenter, v.snapshot.Proxy.Datacenter),
			Mode:       u.Mode,
			ModeFrom:   u.ModeFrom,
			Pending:    u.Pending,
			Err:        u.Err,
		}
		for j := range u.Targets {
			t := &u.Targets[j]
			if j == 0 {
				st.Service, st.Datacenter, st.Via, st.ViaDatacenter = t.Service.String(), t.Datacenter, t.Via, t.ViaDC
				st.Err = cmp.Or(st.Err, t.Err)
				continue
			}
			st.Failovers = append(st.Failovers, t.Service.String()+" in "+t.Datacenter)
		}
		cluster(&st, upstreamListener(&u.Config).Name)
		out = append(out, st)
	}
	return out
}
