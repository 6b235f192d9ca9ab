package httpapi

import (
	"net"
	"slices"
	"strconv"

	"github.com/hashicorp/consul/api"
	"github.com/hashicorp/go-memdb"
	"github.com/hashicorp/serf/serf"

	"github.com/sluicemesh/sluice/agent/catalog"
	"github.com/sluicemesh/sluice/agent/state"
)

func (c *call) healthService() (any, error) { return c.healthInstances((*state.Store).Service) }
func (c *call) healthConnect() (any, error) { return c.healthInstances((*state.Store).Connect) }

func (c *call) healthInstances(read instanceReader) (any, error) {
	name := c.param("name")
	if name == "" {
		return nil, bad("Missing service name")
	}
	passing := false
	if v, ok := c.query["passing"]; ok {
		passing = true
		if v[0] != "" {
			var err error
			if passing, err = strconv.ParseBool(v[0]); err != nil {
				return nil, bad("Invalid value for ?passing")
			}
		}
	}
	return c.blocking(func(ws memdb.WatchSet) (uint64, any, error) {
		idx, instances, err := read(c.store(), ws, catalog.Name(name))
		if err != nil {
			return 0, nil, err
		}
		out := []*entry{}
		for _, inst := range instances {
			if c.matches(inst) && (!passing || allPassing(inst.Checks)) {
				out = append(out, entryOf(inst))
			}
		}
		out, err = filtered(c.opts.filter, out)
		return idx, nearest(c, out, func(e *entry) string { return e.Node.Node }), err
	})
}

func allPassing(checks []*catalog.Check) bool {
	return !slices.ContainsFunc(checks, func(k *catalog.Check) bool { return k.Status != api.HealthPassing })
}

// checkList answers with checks, selected by the request's parameters.
func (c *call) checkList(read func(memdb.WatchSet) (uint64, []*catalog.Check, error)) (any, error) {
	return c.blocking(func(ws memdb.WatchSet) (uint64, any, error) {
		idx, checks, err := read(ws)
		if err != nil {
			return 0, nil, err
		}
		out := []*catalog.Check{}
		for _, k := range checks {
			if len(c.opts.nodeMeta) > 0 || c.opts.peer != "" {
				_, n, err := c.store().Node(ws, k.Node)
				if err != nil {
					return 0, nil, err
				}
				if n == nil || !c.matchesNode(n) {
					continue
				}
			}
			out = append(out, k)
		}
		out, err = filtered(c.opts.filter, out)
		return idx, nearest(c, out, func(k *catalog.Check) string { return k.Node }), err
	})
}

func (c *call) healthNode() (any, error) {
	if c.param("node") == "" {
		return nil, bad("Missing node name")
	}
	return c.checkList(func(ws memdb.WatchSet) (uint64, []*catalog.Check, error) {
		return c.store().NodeChecks(ws, c.param("node"))
	})
}

func (c *call) healthChecks() (any, error) {
	if c.param("name") == "" {
		return nil, bad("Missing service name")
	}
	return c.checkList(func(ws memdb.WatchSet) (uint64, []*catalog.Check, error) {
		return c.store().ServiceChecks(ws, catalog.Name(c.param("name")))
	})
}

func (c *call) healthState() (any, error) {
	if c.param("state") == "" {
		return nil, bad("Missing check state")
	}
	return c.checkList(func(ws memdb.WatchSet) (uint64, []*catalog.Check, error) {
		return c.store().ChecksInState(ws, c.param("state"))
	})
}

// serverAddress returns the RPC address of a member that is a server, "" of any
// other.
func serverAddress(m serf.Member) string {
	if m.Tags["role"] != "consul" || m.Tags["port"] == "" {
		return ""
	}
	return net.JoinHostPort(m.Addr.String(), m.Tags["port"])
}
