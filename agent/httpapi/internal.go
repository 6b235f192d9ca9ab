package httpapi

import (
	"cmp"
	"maps"
	"net/http"
	"slices"

	"github.com/hashicorp/consul/api"
	"github.com/hashicorp/go-memdb"

	"github.com/sluicemesh/sluice/agent/catalog"
	"github.com/sluicemesh/sluice/agent/state"
)

func (c *call) federationStates() (any, error) {
	return c.blocking(func(ws memdb.WatchSet) (uint64, any, error) {
		idx, states, err := c.store().FederationStates(ws)
		return idx, emptyIfNil(states), err
	})
}

func (c *call) federationState() (any, error) {
	dc := c.param("datacenter")
	if dc == "" {
		return nil, bad("Missing datacenter name")
	}
	// The reply is the whole of Consul's, which its clients look into.
	type reply struct {
		State                 *state.FederationState
		Index                 uint64
		LastContact           int64
		KnownLeader           bool
		ConsistencyLevel      string
		NotModified           bool
		Backend               int
		ResultsFilteredByACLs bool
	}
	return c.blocking(func(ws memdb.WatchSet) (uint64, any, error) {
		idx, fs, err := c.store().FederationState(ws, dc)
		if err == nil && fs == nil {
			err = status(http.StatusNotFound, "")
		}
		if err != nil {
			return idx, nil, err
		}
		level := "leader"
		switch {
		case c.opts.stale:
			level = "stale"
		case c.opts.consistent:
			level = "consistent"
		}
		out := &reply{State: fs, Index: max(idx, 1), KnownLeader: c.h.cluster.Leader() != "", ConsistencyLevel: level}
		if !c.h.cluster.IsLeader() {
			out.LastContact = int64(c.h.cluster.LastContact())
		}
		return idx, out, nil
	})
}

// federationGateways groups the gateways of the federation states. A datacenter
// that has none is left out.
func (c *call) federationGateways() (any, error) {
	return c.blocking(func(ws memdb.WatchSet) (uint64, any, error) {
		idx, states, err := c.store().FederationStates(ws)
		if err != nil {
			return 0, nil, err
		}
		out := map[string][]*entry{}
		for _, fs := range states {
			for _, inst := range fs.MeshGateways {
				out[fs.Datacenter] = append(out[fs.Datacenter], entryOf(inst))
			}
		}
		return idx, out, nil
	})
}

func (c *call) federationStateApply() (any, error) {
	var req state.FederationState
	if err := c.decodeBody(&req); err != nil {
		return nil, err
	}
	if req.Datacenter == "" {
		return nil, bad("Missing datacenter name")
	}
	req.PrimaryModifyIndex = 0 // the primary is where it is given
	return c.apply(state.FederationStateCommand(&req))
}

func (c *call) internalConfigEntries() (any, error) {
	return c.blocking(func(ws memdb.WatchSet) (uint64, any, error) {
		idx, entries, err := c.store().AllConfigEntries(ws)
		return idx, emptyIfNil(entries), err
	})
}

func (c *call) internalConnect() (any, error) {
	return c.blocking(func(ws memdb.WatchSet) (uint64, any, error) {
		idx, services, err := c.store().ConnectAll(ws)
		return idx, services, err
	})
}

func (c *call) internalGateways() (any, error) {
	return c.blocking(func(ws memdb.WatchSet) (uint64, any, error) {
		idx, gateways, err := c.store().MeshGateways(ws, c.h.cfg.Datacenter)
		return idx, gateways, err
	})
}

type signRequest struct{ CSR string }

func (c *call) csr() (string, error) {
	var req signRequest
	if err := c.decodeBody(&req); err != nil {
		return "", err
	}
	if req.CSR == "" {
		return "", bad("Missing CSR")
	}
	return req.CSR, nil
}

func (c *call) internalSign() (any, error) {
	csr, err := c.csr()
	if err != nil {
		return nil, err
	}
	return c.h.cluster.SignLeaf(c.ctx(), csr)
}

func (c *call) internalSignIntermediate() (any, error) {
	csr, err := c.csr()
	if err != nil {
		return nil, err
	}
	cert, err := c.h.cluster.SignIntermediate(c.ctx(), csr)
	return map[string]string{"Cert": cert}, err
}

// serviceSummary is a service as the overview of a user interface shows it.
type serviceSummary struct {
	Kind                 catalog.Kind `json:",omitempty"`
	Name                 string
	Datacenter           string
	Tags                 []string
	Nodes                []string
	ExternalSources      []string
	InstanceCount        int
	ChecksPassing        int
	ChecksWarning        int
	ChecksCritical       int
	GatewayConfig        struct{}
	TransparentProxy     bool
	ConnectNative        bool
	ConnectedWithProxy   bool
	ConnectedWithGateway bool
	PeerName             string `json:",omitempty"`
}

const externalSource = "external-source"

func (c *call) uiServices() (any, error) {
	return c.blocking(func(ws memdb.WatchSet) (uint64, any, error) {
		idx, instances, err := c.store().ServiceDump(ws)
		if err != nil {
			return 0, nil, err
		}
		out, err := filtered(c.opts.filter, c.summarise(instances))
		return idx, out, err
	})
}

func (c *call) summarise(instances []*catalog.Instance) []*serviceSummary {
	byName := map[string]*serviceSummary{}
	proxied := map[catalog.ServiceName]bool{}
	for _, inst := range instances {
		s := inst.Service
		if catalog.IsConnectProxy(s) {
			if dest, ok := catalog.DestinationOf(s); ok {
				proxied[dest] = true
			}
		}
		sum := byName[s.Service]
		if sum == nil {
			sum = &serviceSummary{Name: s.Service, Datacenter: c.h.cfg.Datacenter, Tags: []string{}, Nodes: []string{}, ExternalSources: []string{}}
			byName[s.Service] = sum
		}
		sum.Kind = s.Kind
		sum.InstanceCount++
		sum.ConnectNative = sum.ConnectNative || catalog.IsConnectNative(s)
		sum.TransparentProxy = sum.TransparentProxy || s.Proxy != nil && s.Proxy.Mode == api.ProxyModeTransparent
		sum.Tags = append(sum.Tags, s.Tags...)
		sum.Nodes = append(sum.Nodes, inst.Node.Node)
		if source := cmp.Or(s.Meta[externalSource], inst.Node.Meta[externalSource]); source != "" {
			sum.ExternalSources = append(sum.ExternalSources, source)
		}
		for _, k := range inst.Checks {
			switch k.Status {
			case api.HealthPassing:
				sum.ChecksPassing++
			case api.HealthWarning:
				sum.ChecksWarning++
			case api.HealthCritical:
				sum.ChecksCritical++
			}
		}
	}
	out := []*serviceSummary{}
	for _, name := range slices.Sorted(maps.Keys(byName)) {
		sum := byName[name]
		sum.ConnectedWithProxy = proxied[catalog.Name(name)]
		for _, list := range []*[]string{&sum.Tags, &sum.Nodes, &sum.ExternalSources} {
			slices.Sort(*list)
			*list = slices.Compact(*list)
		}
		out = append(out, sum)
	}
	return out
}
