package httpapi

import (
	"net/http"
	"slices"

	"github.com/hashicorp/consul/api"
	"github.com/hashicorp/go-memdb"
	"github.com/hashicorp/go-uuid"

	"github.com/sluicemesh/sluice/agent/catalog"
	"github.com/sluicemesh/sluice/agent/configentry"
)

// The endpoints here name an intention by an ID of its own, as clients did before
// intentions were config entries. They keep the ID with the source it was made
// for, in the destination's entry, and change nothing but what they made: an
// entry that was written in another way has sources without IDs.
//
// COMPAT: Consul also keeps when such an intention was made and changed.

// errMixed is the answer to a legacy write to an entry that is not legacy.
func errMixed(destination string) error {
	return status(http.StatusInternalServerError,
		"cannot use legacy intention API to edit intentions with a destination of %q after editing them via a service-intentions config entry", destination)
}

func allLegacy(e *api.ServiceIntentionsConfigEntry) bool {
	return !slices.ContainsFunc(e.Sources, func(s *api.SourceIntention) bool { return s.LegacyID == "" })
}

// withoutLegacy returns e as it would be without IDs, which only the endpoints
// here may write.
func withoutLegacy(e *api.ServiceIntentionsConfigEntry) *api.ServiceIntentionsConfigEntry {
	out := *e
	out.Sources = nil
	for _, s := range e.Sources {
		plain := *s
		plain.LegacyID, plain.LegacyMeta, plain.LegacyCreateTime, plain.LegacyUpdateTime = "", nil, nil, nil
		out.Sources = append(out.Sources, &plain)
	}
	return &out
}

// legacyBody reads an intention and checks what an entry cannot.
func (c *call) legacyBody() (*api.Intention, error) {
	var req api.Intention
	if err := c.decodeBody(&req); err != nil {
		return nil, err
	}
	for _, ns := range []string{req.SourceNS, req.DestinationNS} {
		if ns != "" && ns != catalog.DefaultTenancy {
			return nil, bad("Invalid namespace %q - %s", ns, textNamespaces)
		}
	}
	switch {
	case req.SourceName == "":
		return nil, status(http.StatusInternalServerError, "SourceName must be set")
	case req.DestinationName == "":
		return nil, status(http.StatusInternalServerError, "DestinationName must be set")
	case req.SourceType != "" && req.SourceType != api.IntentionSourceConsul:
		return nil, status(http.StatusInternalServerError, "SourceType must be set to 'consul'")
	}
	return &req, nil
}

// legacySource is the source of an entry that an intention stands for.
func legacySource(i *api.Intention, id string) *api.SourceIntention {
	return &api.SourceIntention{
		Name: i.SourceName, Action: i.Action, Permissions: i.Permissions, Description: i.Description,
		Type: api.IntentionSourceConsul, LegacyID: id, LegacyMeta: i.Meta,
	}
}

func hasID(id string) func(*api.SourceIntention) bool {
	return func(s *api.SourceIntention) bool { return s.LegacyID == id }
}

func (c *call) intentionCreate() (any, error) {
	req, err := c.legacyBody()
	if err != nil {
		return nil, err
	}
	if req.ID != "" {
		return nil, status(http.StatusInternalServerError, "ID must be empty when creating a new intention")
	}
	id, err := uuid.GenerateUUID()
	if err != nil {
		return nil, err
	}
	_, err = c.changeIntentions(req.DestinationName, func(e *api.ServiceIntentionsConfigEntry, _ bool) (bool, error) {
		if !allLegacy(e) {
			return false, errMixed(e.Name)
		}
		if slices.ContainsFunc(e.Sources, isSource(req.SourceName)) {
			return false, errDuplicate(req)
		}
		e.Sources = append(e.Sources, legacySource(req, id))
		return true, nil
	})
	if err != nil {
		return nil, err
	}
	return map[string]string{"ID": id}, nil
}

func errDuplicate(i *api.Intention) error {
	return status(http.StatusInternalServerError, "duplicate intention found: %s => %s", i.SourceName, i.DestinationName)
}

// intentionID reads the ID in the path.
func (c *call) intentionID() (string, error) {
	id := c.param("id")
	if _, err := uuid.ParseUUID(id); err != nil {
		return "", bad("Invalid intention ID %q: not a UUID", id)
	}
	return id, nil
}

// intentionByID returns the intention with that ID, nil where there is none.
func (c *call) intentionByID(ws memdb.WatchSet, id string) (uint64, *api.Intention, error) {
	idx, entries, err := c.store().ConfigEntries(ws, configentry.ServiceIntentions)
	if err != nil {
		return 0, nil, err
	}
	for _, e := range entries {
		si, _ := e.(*api.ServiceIntentionsConfigEntry)
		for _, i := range configentry.IntentionsOf(si) {
			if i.ID == id {
				return idx, i, nil
			}
		}
	}
	return idx, nil, nil
}

func (c *call) intentionGetByID() (any, error) {
	id, err := c.intentionID()
	if err != nil {
		return nil, err
	}
	return c.blocking(func(ws memdb.WatchSet) (uint64, any, error) {
		idx, i, err := c.intentionByID(ws, id)
		switch {
		case err != nil:
			return 0, nil, err
		case i == nil:
			return idx, nil, status(http.StatusNotFound, "Intention not found")
		}
		return idx, wireIntentionOf(i), nil
	})
}

func (c *call) intentionUpdate() (any, error) {
	id, err := c.intentionID()
	if err != nil {
		return nil, err
	}
	req, err := c.legacyBody()
	if err != nil {
		return nil, err
	}
	missing := status(http.StatusInternalServerError, "Cannot modify non-existent intention: '%s'", id)
	_, old, err := c.intentionByID(nil, id)
	switch {
	case err != nil:
		return nil, err
	case old == nil:
		return nil, missing
	case old.DestinationName != req.DestinationName:
		return nil, status(http.StatusInternalServerError, "Cannot modify DestinationName or DestinationNS for an intention once it exists.")
	}
	_, err = c.changeIntentions(old.DestinationName, func(e *api.ServiceIntentionsConfigEntry, _ bool) (bool, error) {
		at := slices.IndexFunc(e.Sources, hasID(id))
		switch {
		case at < 0:
			return false, missing
		case !allLegacy(e):
			return false, errMixed(e.Name)
		}
		if same := slices.IndexFunc(e.Sources, isSource(req.SourceName)); same >= 0 && same != at {
			return false, errDuplicate(req)
		}
		e.Sources[at] = legacySource(req, id)
		return true, nil
	})
	if err != nil {
		return nil, err
	}
	return map[string]string{"ID": id}, nil
}

func (c *call) intentionDeleteByID() (any, error) {
	id, err := c.intentionID()
	if err != nil {
		return nil, err
	}
	missing := status(http.StatusInternalServerError, "Cannot delete non-existent intention: '%s'", id)
	_, old, err := c.intentionByID(nil, id)
	switch {
	case err != nil:
		return nil, err
	case old == nil:
		return nil, missing
	}
	return c.changeIntentions(old.DestinationName, func(e *api.ServiceIntentionsConfigEntry, _ bool) (bool, error) {
		if !slices.ContainsFunc(e.Sources, hasID(id)) {
			return false, missing
		}
		if !allLegacy(e) {
			return false, errMixed(e.Name)
		}
		e.Sources = slices.DeleteFunc(e.Sources, hasID(id))
		return true, nil
	})
}
