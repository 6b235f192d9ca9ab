package agent

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/hashicorp/consul/api"
	"github.com/hashicorp/go-hclog"

	"github.com/sluicemesh/sluice/acl"
	"github.com/sluicemesh/sluice/gateway"
)

// drainReason is the reason of the maintenance that a drain puts a service into.
const drainReason = "draining"

// drainPlan is the plan of the configuration.
func (a *Agent) drainPlan() gateway.Plan {
	c := a.runtime().DataPlane
	return gateway.Plan{Wait: c.DrainWait, Timeout: c.DrainTimeout, Rate: c.DrainRate}
}

// announceDrain returns what says in the catalog that a proxy is being drained, by
// maintenance of its service, and what takes that back. Maintenance that somebody
// else has turned on stays as it is.
func (a *Agent) announceDrain(id string, token acl.Secret) func(on bool) error {
	return func(on bool) error {
		if c := a.registry.Checks(nil)[api.ServiceMaintPrefix+id]; c != nil && c.Check.Notes != drainReason {
			return nil
		}
		found, err := a.registry.ServiceMaintenance(id, on, drainReason, token)
		if err == nil && !found && on {
			err = fmt.Errorf("service %q is not registered on this agent", id)
		}
		return err
	}
}

// endDrains takes back what an earlier run of the agent has announced: its proxies
// are in use again.
func (a *Agent) endDrains() error {
	var errs []error
	for check, c := range a.registry.Checks(nil) {
		if id, ok := strings.CutPrefix(check, api.ServiceMaintPrefix); ok && c.Check.Notes == drainReason {
			_, err := a.registry.ServiceMaintenance(id, false, "", "")
			errs = append(errs, err)
			a.log.Info("the drain of an earlier run is over", "proxy_id", id)
		}
	}
	return errors.Join(errs...)
}

// Drain drains every gateway that this agent runs, by the plan of the
// configuration, and returns when no connection is left, or with ctx's error when
// that ends. They stay drained. A gateway that cannot be drained is passed over.
func (a *Agent) Drain(ctx context.Context) error {
	var ids []string
	for _, p := range a.runner.Status() {
		if p.Kind != api.ServiceKindMeshGateway {
			continue
		}
		err := a.runner.Drain(p.ID, a.drainPlan(), a.announceDrain(p.ID, ""))
		if err != nil && !errors.Is(err, gateway.ErrDraining) {
			a.log.Warn("gateway not drained", "proxy_id", p.ID, "error", err)
			continue
		}
		ids = append(ids, p.ID)
	}
	for _, id := range ids {
		if err := a.runner.AwaitDrained(ctx, id); err != nil && !errors.Is(err, gateway.ErrNoProxy) && !errors.Is(err, gateway.ErrNotDraining) {
			return err
		}
	}
	return nil
}

// accessLog is that of a proxy; nil where it is off.
func (a *Agent) accessLog(log hclog.Logger) *gateway.AccessLog {
	c := a.runtime().DataPlane
	if !c.AccessLog {
		return nil
	}
	return &gateway.AccessLog{Logger: log.Named("access"), Sample: c.AccessLogSample}
}
