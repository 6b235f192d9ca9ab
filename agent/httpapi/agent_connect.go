package httpapi

import (
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/hashicorp/go-memdb"

	"github.com/sluicemesh/sluice/agent/catalog"
	"github.com/sluicemesh/sluice/agent/configentry"
	"github.com/sluicemesh/sluice/agent/connect"
)

// errNoCA is the answer before the datacenter's CA exists.
var errNoCA = status(http.StatusInternalServerError, "CA has not finished initializing")

// fresh reads something this agent keeps and sets the headers of a cache.
func (c *call) fresh(read func(memdb.WatchSet) (index uint64, value any, asOf time.Time, err error)) (any, error) {
	var asOf time.Time
	hit, first := true, true
	index, value, err := c.wait(c.opts.index, nil, func(ws memdb.WatchSet) (uint64, any, error) {
		idx, v, at, err := read(ws)
		if first && errors.Is(err, catalog.ErrPending) {
			hit = false
		}
		first, asOf = false, at
		return idx, v, err
	})
	if err != nil {
		return nil, err
	}
	c.setIndex(index)
	if hit {
		c.w.Header().Set("X-Cache", "HIT")
		age := max(time.Since(asOf), 0)
		c.w.Header().Set("Age", strconv.FormatInt(int64(age/time.Second), 10))
	} else {
		c.w.Header().Set("X-Cache", "MISS")
	}
	return value, nil
}

func (c *call) agentRoots() (any, error) {
	value, err := c.fresh(func(ws memdb.WatchSet) (uint64, any, time.Time, error) {
		roots, f, err := c.h.agent.Roots(ws)
		if err == nil && roots == nil {
			err = errNoCA
		}
		return f.Index, roots, f.AsOf, err
	})
	if errors.Is(err, catalog.ErrPending) {
		err = errNoCA
	}
	if err == nil {
		c.setContact()
	}
	return value, err
}

// leaf is the one answer that shows a private key.
type leaf struct {
	SerialNumber  string
	CertPEM       string
	PrivateKeyPEM string
	Service       string
	ServiceURI    string
	ValidAfter    time.Time
	ValidBefore   time.Time
	CreateIndex   uint64
	ModifyIndex   uint64
}

func (c *call) agentLeaf() (any, error) {
	name := c.param("service")
	if name == "" {
		return nil, bad("Missing service name")
	}
	return c.fresh(func(ws memdb.WatchSet) (uint64, any, time.Time, error) {
		l, f, err := c.h.agent.Leaf(ws, catalog.Name(name))
		if err != nil {
			return 0, nil, f.AsOf, fmt.Errorf("sign a certificate for service %q: %w", name, err)
		}
		return l.ModifyIndex, &leaf{
			SerialNumber: l.SerialNumber, CertPEM: l.CertPEM, PrivateKeyPEM: l.PrivateKeyPEM.Reveal(), Service: l.Service,
			ServiceURI: l.ServiceURI, ValidAfter: l.ValidAfter, ValidBefore: l.ValidBefore,
			CreateIndex: l.CreateIndex, ModifyIndex: l.ModifyIndex,
		}, f.AsOf, nil
	})
}

func (c *call) agentAuthorize() (any, error) {
	var req struct{ Target, ClientCertURI, ClientCertSerial string }
	if err := c.decodeBody(&req); err != nil {
		return nil, err
	}
	if req.Target == "" {
		return nil, bad("Target service must be specified")
	}
	id, err := connect.ParseURI(req.ClientCertURI)
	if err != nil {
		return nil, bad("ClientCertURI not a valid Connect identifier")
	}
	source, ok := id.(connect.ServiceID)
	if !ok {
		return nil, bad("ClientCertURI not a valid Service identifier")
	}
	type decision struct {
		Authorized bool
		Reason     string
	}
	_, value, err := c.wait(0, nil, func(ws memdb.WatchSet) (uint64, any, error) {
		roots, f, err := c.h.agent.Roots(ws)
		if err != nil {
			return 0, nil, err
		}
		if roots == nil {
			return 0, nil, errNoCA
		}
		if !strings.EqualFold(source.TrustDomain, roots.TrustDomain) {
			return f.Index, decision{false, "Identity from an external trust domain: " + source.TrustDomain}, nil
		}
		intentions, f, err := c.h.agent.Intentions(ws, catalog.Name(req.Target))
		if err != nil {
			return 0, nil, err
		}
		allow, why := configentry.Decide(intentions, source.Service, true)
		if why == nil {
			return f.Index, decision{allow, "Default behavior configured by ACLs"}, nil
		}
		layer := "L4"
		if len(why.Permissions) > 0 {
			layer = "L7"
		}
		return f.Index, decision{allow, fmt.Sprintf("Matched %s intention: %s", layer, why)}, nil
	})
	return value, err
}
