package httpapi

import (
	"encoding/json"
	"net/http"
	"strconv"

	"github.com/hashicorp/consul/api"
	"github.com/hashicorp/go-memdb"

	"github.com/sluicemesh/sluice/agent/configentry"
	"github.com/sluicemesh/sluice/agent/state"
)

// cas reads the index of a compare-and-set; given is false where there is none.
func (c *call) cas() (index uint64, given bool, err error) {
	v := c.query.Get("cas")
	if v == "" {
		return 0, false, nil
	}
	index, err = strconv.ParseUint(v, 10, 64)
	if err != nil {
		return 0, false, status(http.StatusInternalServerError, "%s", err)
	}
	return index, true, nil
}

// checkExported refuses to write exported-services, which are not replicated,
// from a secondary datacenter by mistake.
func (c *call) checkExported() error {
	cfg := c.h.cfg
	if cfg.Datacenter == cfg.PrimaryDatacenter || c.opts.dc == cfg.PrimaryDatacenter {
		return nil
	}
	kind := c.param("kind")
	if kind == "" {
		var body struct{ Kind string }
		_ = json.Unmarshal(c.body, &body) // the primary says what is wrong with it
		kind = body.Kind
	}
	if kind == configentry.ExportedServices {
		return status(http.StatusInternalServerError, "exported-services writes must not target secondary datacenters.")
	}
	return nil
}

func (c *call) configApply() (any, error) {
	e, err := configentry.DecodeJSON(c.body)
	if err != nil {
		return nil, bad("Request decoding failed: %v", err)
	}
	index, cas, err := c.cas()
	if err != nil {
		return nil, err
	}
	op := state.ConfigEntryUpsert
	if cas {
		op = state.ConfigEntryUpsertCAS
	}
	return c.writeEntry(op, e, index)
}

// writeEntry normalises, validates and writes an entry.
func (c *call) writeEntry(op state.ConfigEntryOp, e configentry.Entry, index uint64) (any, error) {
	configentry.Normalize(e)
	if err := configentry.Validate(e); err != nil {
		return nil, err
	}
	return c.apply(state.ConfigEntryCommand(op, e, index))
}

func (c *call) configDelete() (any, error) {
	kind, name := c.param("kind"), c.param("name")
	if kind == "" || name == "" {
		return nil, status(http.StatusNotFound, "Must provide both a kind and name to delete")
	}
	index, cas, err := c.cas()
	if err != nil {
		return nil, err
	}
	e, err := configentry.New(kind, name)
	if err != nil {
		return nil, err
	}
	op := state.ConfigEntryDelete
	if cas {
		op = state.ConfigEntryDeleteCAS
	}
	result, err := c.apply(state.ConfigEntryCommand(op, e, index))
	if err != nil || cas {
		return result, err
	}
	return struct{}{}, nil
}

func (c *call) configGet() (any, error) {
	kind, name := c.param("kind"), c.param("name")
	if kind == "" {
		return nil, status(http.StatusNotFound, "Must provide either a kind or both kind and name")
	}
	if _, err := configentry.New(kind, name); err != nil {
		return nil, err
	}
	if name == "" {
		return c.configList(kind)
	}
	return c.blocking(func(ws memdb.WatchSet) (uint64, any, error) {
		idx, e, err := c.store().ConfigEntry(ws, kind, name)
		if err == nil && e == nil {
			err = status(http.StatusNotFound, "Config entry not found for %q / %q", kind, name)
		}
		return idx, e, err
	})
}

func (c *call) configList(kind string) (any, error) {
	if c.opts.filter != "" && kind != configentry.ServiceDefaults {
		return nil, status(http.StatusInternalServerError, "filtering is only supported for service-defaults config entries")
	}
	return c.blocking(func(ws memdb.WatchSet) (uint64, any, error) {
		idx, entries, err := c.store().ConfigEntries(ws, kind)
		if err != nil {
			return 0, nil, err
		}
		if c.opts.filter == "" {
			return idx, emptyIfNil(entries), nil
		}
		defaults := []*api.ServiceConfigEntry{}
		for _, e := range entries {
			if d, ok := e.(*api.ServiceConfigEntry); ok {
				defaults = append(defaults, d)
			}
		}
		defaults, err = filtered(c.opts.filter, defaults)
		return idx, defaults, err
	})
}
