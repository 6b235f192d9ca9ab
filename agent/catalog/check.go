package catalog

import (
	"errors"
	"fmt"
	"time"

	"github.com/hashicorp/consul/api"
)

// CheckSpec is a check that a definition asks for, with everything that it may
// leave out filled in.
type CheckSpec struct {
	CheckID   string
	Name      string
	Notes     string
	ServiceID string
	// Status is the one before the first run.
	Status string
	Def    CheckDefinition
}

// The types of check, in the order in which they are told apart.
const (
	CheckGRPC   = "grpc"
	CheckHTTP   = "http"
	CheckTTL    = "ttl"
	CheckTCP    = "tcp"
	CheckUDP    = "udp"
	CheckAlias  = "alias"
	CheckDocker = "docker"
	CheckScript = "script"
	CheckH2Ping = "h2ping"
)

// CheckType returns the type of a check, "" where the definition names none.
func CheckType(d CheckDefinition) string {
	switch {
	case d.GRPC != "":
		return CheckGRPC
	case d.HTTP != "":
		return CheckHTTP
	case d.TTL != "":
		return CheckTTL
	case d.TCP != "":
		return CheckTCP
	case d.UDP != "":
		return CheckUDP
	case d.AliasNode != "" || d.AliasService != "":
		return CheckAlias
	case d.DockerContainerID != "":
		return CheckDocker
	case len(d.Args) > 0:
		return CheckScript
	case d.H2PING != "":
		return CheckH2Ping
	}
	return ""
}

// ValidateCheck returns the first thing that is wrong with a check, in Consul's
// words.
func ValidateCheck(d CheckDefinition) error {
	interval, err := checkDuration("interval", d.Interval)
	if err != nil {
		return err
	}
	ttl, err := checkDuration("ttl", d.TTL)
	if err != nil {
		return err
	}
	if _, err := checkDuration("timeout", d.Timeout); err != nil {
		return err
	}
	if _, err := checkDuration("deregister_critical_service_after", d.DeregisterCriticalServiceAfter); err != nil {
		return err
	}
	alias := d.AliasNode != "" || d.AliasService != ""
	timed := len(d.Args) > 0 || d.DockerContainerID != "" || d.HTTP != "" || d.TCP != "" || d.UDP != "" || d.GRPC != "" || d.H2PING != ""
	switch {
	case interval > 0 && ttl > 0:
		return errors.New("Interval and TTL cannot both be specified")
	case timed && !alias && interval <= 0:
		return errors.New("Interval must be > 0 for Script, HTTP, H2PING, TCP, UDP or OSService checks")
	case alias && interval > 0:
		return errors.New("Interval cannot be set for Alias checks")
	case alias && ttl > 0:
		return errors.New("TTL must be not be set for Alias checks")
	case !timed && !alias && ttl <= 0:
		return errors.New("TTL must be > 0 for TTL checks")
	// The counts are numbers of extra results needed, so an unset one is 0.
	case d.FailuresBeforeCritical > 0 && d.FailuresBeforeWarning > d.FailuresBeforeCritical:
		return errors.New("FailuresBeforeWarning can't be higher than FailuresBeforeCritical")
	}
	return nil
}

func checkDuration(field, s string) (time.Duration, error) {
	if s == "" {
		return 0, nil
	}
	d, err := time.ParseDuration(s)
	if err != nil {
		return 0, fmt.Errorf("invalid %s: %w", field, err)
	}
	return d, nil
}

// ValidCheckStatus reports whether s is a status that a registration may give.
func ValidCheckStatus(s string) bool {
	switch s {
	case api.HealthPassing, api.HealthWarning, api.HealthCritical:
		return true
	}
	return false
}

// definedChecks returns the checks of a registration in order; an all-empty
// Check, which is how some clients say "none", is left out.
func definedChecks(r *api.AgentServiceRegistration) []*CheckDefinition {
	var out []*CheckDefinition
	for _, c := range append([]*CheckDefinition{r.Check}, r.Checks...) {
		if c != nil && !emptyCheck(c) {
			out = append(out, c)
		}
	}
	return out
}

func emptyCheck(c *CheckDefinition) bool {
	return c.CheckID == "" && c.Name == "" && CheckType(*c) == "" && c.Interval == "" && c.Timeout == "" && c.Status == ""
}

// ChecksOf returns the checks that d asks for, named and validated. The default
// ID is service:ID, and service:ID:N, from 1, where there are several.
func ChecksOf(d *Definition) ([]CheckSpec, error) {
	defs := definedChecks(&d.AgentServiceRegistration)
	id := d.ID
	if id == "" {
		id = d.Name
	}
	out := make([]CheckSpec, 0, len(defs))
	seen := make(map[string]bool, len(defs))
	for i, def := range defs {
		if err := ValidateCheck(*def); err != nil {
			return nil, fmt.Errorf("service %q: check %q: %w", d.Name, def.Name, err)
		}
		spec := CheckSpec{CheckID: def.CheckID, Name: def.Name, Notes: def.Notes, ServiceID: id, Status: def.Status, Def: *cloneCheck(def)}
		if spec.CheckID == "" {
			spec.CheckID = "service:" + id
			if len(defs) > 1 {
				spec.CheckID = fmt.Sprintf("service:%s:%d", id, i+1)
			}
		}
		if seen[spec.CheckID] {
			return nil, fmt.Errorf("service %q: check ID %q is used twice", d.Name, spec.CheckID)
		}
		seen[spec.CheckID] = true
		if spec.Name == "" {
			spec.Name = fmt.Sprintf("Service '%s' check", d.Name)
		}
		if spec.Status == "" {
			spec.Status = api.HealthCritical
		}
		if !ValidCheckStatus(spec.Status) {
			return nil, fmt.Errorf("service %q: check %q: status %q is not passing, warning or critical", d.Name, def.Name, spec.Status)
		}
		out = append(out, spec)
	}
	return out, nil
}
