package httpapi

import (
	"maps"
	"net/http"
	"slices"
	"strings"

	"github.com/hashicorp/consul/api"
	"github.com/hashicorp/go-memdb"

	"github.com/sluicemesh/sluice/agent/catalog"
	"github.com/sluicemesh/sluice/agent/configentry"
	"github.com/sluicemesh/sluice/agent/state"
)

// required reads a parameter that must be there.
func (c *call) required(name string) (string, error) {
	v := c.query.Get(name)
	if v == "" {
		return "", status(http.StatusInternalServerError, "required query parameter '%s' not set", name)
	}
	return v, nil
}

// intentionName reads the name of a service as intentions write it: alone or
// with the default namespace before it.
func intentionName(v string) (string, error) {
	ns, name, ok := strings.Cut(v, "/")
	switch {
	case !ok:
		return v, nil
	case ns == catalog.DefaultTenancy && !strings.Contains(name, "/"):
		return name, nil
	}
	return "", bad("Invalid value %q - %s", v, textNamespaces)
}

// pair reads the source and the destination of an intention.
func (c *call) pair() (source, destination string, err error) {
	for _, p := range []struct {
		name string
		to   *string
	}{{"source", &source}, {"destination", &destination}} {
		v, err := c.required(p.name)
		if err != nil {
			return "", "", err
		}
		if *p.to, err = intentionName(v); err != nil {
			return "", "", err
		}
	}
	return source, destination, nil
}

func (c *call) intentionList() (any, error) {
	return c.blocking(func(ws memdb.WatchSet) (uint64, any, error) {
		idx, entries, err := c.store().ConfigEntries(ws, configentry.ServiceIntentions)
		if err != nil {
			return 0, nil, err
		}
		out := []*api.Intention{}
		for _, e := range entries {
			if si, ok := e.(*api.ServiceIntentionsConfigEntry); ok {
				out = append(out, configentry.IntentionsOf(si)...)
			}
		}
		configentry.SortIntentions(out)
		out, err = filtered(c.opts.filter, out)
		return idx, wireIntentions(out), err
	})
}

// wireIntention is an intention without the times that nobody keeps.
type wireIntention struct {
	ID                  string `json:",omitempty"`
	Description         string `json:",omitempty"`
	SourceNS            string
	SourceName          string
	SourcePartition     string `json:",omitempty"`
	SourcePeer          string `json:",omitempty"`
	SourceSamenessGroup string `json:",omitempty"`
	DestinationNS       string
	DestinationName     string
	SourceType          api.IntentionSourceType
	Action              api.IntentionAction        `json:",omitempty"`
	Permissions         []*api.IntentionPermission `json:",omitempty"`
	Meta                map[string]string          `json:",omitempty"`
	Precedence          int
	CreateIndex         uint64
	ModifyIndex         uint64
}

func wireIntentionOf(i *api.Intention) *wireIntention {
	return &wireIntention{
		ID: i.ID, Description: i.Description, SourceNS: i.SourceNS, SourceName: i.SourceName, SourcePartition: i.SourcePartition,
		SourcePeer: i.SourcePeer, SourceSamenessGroup: i.SourceSamenessGroup, DestinationNS: i.DestinationNS,
		DestinationName: i.DestinationName, SourceType: i.SourceType, Action: i.Action, Permissions: i.Permissions,
		Meta: i.Meta, Precedence: i.Precedence, CreateIndex: i.CreateIndex, ModifyIndex: i.ModifyIndex,
	}
}

func wireIntentions(list []*api.Intention) []*wireIntention {
	out := make([]*wireIntention, 0, len(list))
	for _, i := range list {
		out = append(out, wireIntentionOf(i))
	}
	return out
}

func (c *call) intentionGet() (any, error) {
	source, destination, err := c.pair()
	if err != nil {
		return nil, err
	}
	return c.blocking(func(ws memdb.WatchSet) (uint64, any, error) {
		idx, e, err := c.intentionsEntry(ws, destination)
		if err != nil {
			return 0, nil, err
		}
		for _, i := range configentry.IntentionsOf(e) {
			if i.SourceName == source && i.SourcePeer == "" {
				return idx, wireIntentionOf(i), nil
			}
		}
		return idx, nil, status(http.StatusNotFound, "Intention not found")
	})
}

// intentionsEntry reads the entry of a destination, nil where there is none.
func (c *call) intentionsEntry(ws memdb.WatchSet, destination string) (uint64, *api.ServiceIntentionsConfigEntry, error) {
	idx, e, err := c.store().ConfigEntry(ws, configentry.ServiceIntentions, destination)
	if err != nil {
		return 0, nil, err
	}
	si, _ := e.(*api.ServiceIntentionsConfigEntry) // nil stays nil
	return idx, si, nil
}

// changeIntentions reads the entry of a destination, has it changed, and writes
// it back; again if somebody else was faster. change gets a copy with sources of
// its own, and returns false where there is nothing to write. An entry without
// sources is deleted.
func (c *call) changeIntentions(destination string, change func(e *api.ServiceIntentionsConfigEntry, exists bool) (bool, error)) (any, error) {
	for {
		if err := c.ctx().Err(); err != nil {
			return nil, err
		}
		_, old, err := c.intentionsEntry(nil, destination)
		if err != nil {
			return nil, err
		}
		e := &api.ServiceIntentionsConfigEntry{Kind: configentry.ServiceIntentions, Name: destination}
		var index uint64
		if old != nil {
			*e, index = *old, old.ModifyIndex
			e.Sources = nil
			for _, s := range old.Sources {
				own := *s
				e.Sources = append(e.Sources, &own)
			}
		}
		write, err := change(e, old != nil)
		if err != nil {
			return nil, err
		}
		if !write {
			return true, nil
		}
		var done any
		if len(e.Sources) == 0 {
			done, err = c.apply(state.ConfigEntryCommand(state.ConfigEntryDeleteCAS, e, index))
		} else {
			done, err = c.writeIntentions(e, index)
		}
		if err != nil || done != false {
			return done, err
		}
	}
}

// writeIntentions is writeEntry for an entry that may have legacy IDs.
func (c *call) writeIntentions(e *api.ServiceIntentionsConfigEntry, index uint64) (any, error) {
	configentry.Normalize(e)
	if err := configentry.Validate(withoutLegacy(e)); err != nil {
		return nil, err
	}
	return c.apply(state.ConfigEntryCommand(state.ConfigEntryUpsertCAS, e, index))
}

func (c *call) intentionPut() (any, error) {
	source, destination, err := c.pair()
	if err != nil {
		return nil, err
	}
	var req api.Intention
	if err := c.decodeBody(&req); err != nil {
		return nil, err
	}
	return c.changeIntentions(destination, func(e *api.ServiceIntentionsConfigEntry, exists bool) (bool, error) {
		if len(req.Meta) > 0 && !maps.Equal(req.Meta, e.Meta) {
			// The metadata belongs to all sources of the destination.
			if exists {
				return false, status(http.StatusInternalServerError, "Meta must not be specified, or should be unchanged during an update.")
			}
			e.Meta = req.Meta
		}
		s := &api.SourceIntention{
			Name: source, Action: req.Action, Permissions: req.Permissions, Description: req.Description,
			Type: api.IntentionSourceConsul,
		}
		if i := slices.IndexFunc(e.Sources, isSource(source)); i >= 0 {
			e.Sources[i] = s
		} else {
			e.Sources = append(e.Sources, s)
		}
		return true, nil
	})
}

func isSource(name string) func(*api.SourceIntention) bool {
	return func(s *api.SourceIntention) bool { return s.Name == name && s.Peer == "" && s.SamenessGroup == "" }
}

func (c *call) intentionDelete() (any, error) {
	source, destination, err := c.pair()
	if err != nil {
		return nil, err
	}
	return c.changeIntentions(destination, func(e *api.ServiceIntentionsConfigEntry, _ bool) (bool, error) {
		n := len(e.Sources)
		e.Sources = slices.DeleteFunc(e.Sources, isSource(source))
		return len(e.Sources) < n, nil
	})
}

func (c *call) intentionMatch() (any, error) {
	by, err := c.required("by")
	if err != nil {
		return nil, err
	}
	if by != "source" && by != "destination" {
		return nil, status(http.StatusInternalServerError, "'by' parameter must be one of 'source' or 'destination'")
	}
	if _, err := c.required("name"); err != nil {
		return nil, err
	}
	return c.blocking(func(ws memdb.WatchSet) (uint64, any, error) {
		idx, entries, err := c.store().ConfigEntries(ws, configentry.ServiceIntentions)
		if err != nil {
			return 0, nil, err
		}
		out := map[string][]*wireIntention{}
		for _, given := range c.query["name"] {
			name, err := intentionName(given)
			if err != nil {
				return 0, nil, err
			}
			var list []*api.Intention
			if by == "source" {
				list = configentry.MatchSource(entries, catalog.Name(name))
			} else if list, err = configentry.IntentionsFor(c.entries(ws, &idx), catalog.Name(name)); err != nil {
				return 0, nil, err
			}
			out[given] = wireIntentions(list)
		}
		return idx, out, nil
	})
}

func (c *call) intentionCheck() (any, error) {
	source, destination, err := c.pair()
	if err != nil {
		return nil, err
	}
	return c.blocking(func(ws memdb.WatchSet) (uint64, any, error) {
		var idx uint64
		list, err := configentry.IntentionsFor(c.entries(ws, &idx), catalog.Name(destination))
		if err != nil {
			return 0, nil, err
		}
		allow, _ := configentry.Decide(list, catalog.Name(source), true)
		return idx, map[string]bool{"Allowed": allow}, nil
	})
}
