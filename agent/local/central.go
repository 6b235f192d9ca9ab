package local

import (
	"context"
	"time"

	"github.com/hashicorp/consul/api"
	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/go-memdb"

	"github.com/sluicemesh/sluice/agent/catalog"
	"github.com/sluicemesh/sluice/agent/configentry"
)

// Central keeps the merged form of the registry's proxies and gateways up to
// date with central configuration: what the API and the catalog show. The data
// path merges for itself, by the same function.
type Central struct {
	Registry *Registry
	// Entry reads one configuration entry, as proxycfg.Source does.
	Entry  func(ws memdb.WatchSet, kind, name string) (configentry.Entry, catalog.Freshness, error)
	Logger hclog.Logger
}

// Run merges until ctx ends.
func (c *Central) Run(ctx context.Context) error {
	// A read that fails without saying when to come back is tried again.
	const again = 5 * time.Second
	for {
		ws := memdb.NewWatchSet()
		retry := c.merge(ws)
		wait, cancel := ctx, context.CancelFunc(func() {})
		if retry {
			wait, cancel = context.WithTimeout(ctx, again)
		}
		_ = ws.WatchCtx(wait) // either way it is time to look again
		cancel()
		if ctx.Err() != nil {
			return nil
		}
	}
}

// merge computes the merged form of every service that has one. It returns true
// when something could not be read.
func (c *Central) merge(ws memdb.WatchSet) (retry bool) {
	for id, s := range c.Registry.Services(ws) {
		if s.Registered.Kind == api.ServiceKindTypical {
			continue
		}
		resolved, err := configentry.ResolveService(func(kind, name string) (configentry.Entry, error) {
			e, _, err := c.Entry(ws, kind, name)
			return e, err
		}, s.Registered)
		if err != nil {
			c.Logger.Debug("central configuration not merged yet", "service", id, "error", err)
			retry = true
			continue
		}
		c.Registry.setMerged(id, s.Registered, configentry.MergeService(s.Registered, resolved))
	}
	return retry
}
