package catalog

import (
	"fmt"

	"github.com/hashicorp/consul/api"
)

const maxWeight = 128

// Health judges an instance by its own checks and its node's. A critical check
// makes it unhealthy; with onlyPassing, so does any other than a passing one.
// The weight is between 1 and 128, and why says, where the instance is not
// healthy, what made it so.
func Health(inst *Instance, onlyPassing bool) (healthy bool, weight int, why string) {
	if inst == nil {
		return false, 1, "no instance"
	}
	healthy, weight = true, 1
	warning := 1
	// A record without weights is an old one: a valid one has Passing >= 1.
	if s := inst.Service; s != nil && (s.Weights.Passing != 0 || s.Weights.Warning != 0) {
		weight, warning = s.Weights.Passing, s.Weights.Warning
	}
	warned := ""
	for _, c := range inst.Checks {
		if c == nil {
			continue
		}
		if c.Status == api.HealthWarning && warned == "" {
			warned = c.CheckID
		}
		if c.Status == api.HealthCritical || onlyPassing && c.Status != api.HealthPassing {
			if healthy {
				healthy, why = false, fmt.Sprintf("check %q is %s", c.CheckID, c.Status)
			}
		}
	}
	if warned != "" {
		weight = warning
	}
	if weight < 1 {
		weight = 1
		if healthy {
			healthy, why = false, "its weight is 0"
			if warned != "" {
				why = fmt.Sprintf("check %q is warning, and its weight is then 0", warned)
			}
		}
	}
	return healthy, min(weight, maxWeight), why
}

// AggregatedStatus returns the worst status of checks; passing where there are
// none, maintenance where a maintenance check is among them.
func AggregatedStatus(checks []*Check) string {
	present := make(api.HealthChecks, 0, len(checks))
	for _, c := range checks {
		if c != nil {
			present = append(present, c)
		}
	}
	return present.AggregatedStatus()
}
