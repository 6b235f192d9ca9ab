package httpapi

import (
	"context"
	"errors"
	"math/rand/v2"
	"net/http"
	"strconv"
	"time"

	"github.com/hashicorp/go-memdb"

	"github.com/sluicemesh/sluice/agent/catalog"
	"github.com/sluicemesh/sluice/agent/state"
)

// reader reads a value and its index, and adds to ws what tells of changes. An
// error 404 says that there is no value, and the index then counts as well;
// [catalog.ErrPending] that none is known yet.
type reader func(ws memdb.WatchSet) (uint64, any, error)

// blocking answers a read of the replicated state: at once, or, with ?index,
// when the index has passed it. It sets the headers of a query.
func (c *call) blocking(read reader) (any, error) {
	if c.opts.consistent {
		if err := c.h.cluster.VerifyLeader(c.ctx()); err != nil {
			return nil, err
		}
	}
	stillLeads := func() error {
		if c.opts.stale || c.h.cluster.IsLeader() {
			return nil
		}
		return state.ErrNotLeader
	}
	if c.route.scope == scopeServer {
		stillLeads = nil
	}
	index, value, err := c.wait(c.opts.index, stillLeads, func(ws memdb.WatchSet) (uint64, any, error) {
		ws.Add(c.store().AbandonCh())
		return read(ws)
	})
	if err != nil && !isNotFound(err) {
		return nil, err
	}
	c.setIndex(index)
	c.setContact()
	return value, err
}

// setIndex sets the header that says which state an answer shows.
func (c *call) setIndex(index uint64) {
	c.w.Header().Set("X-Consul-Index", strconv.FormatUint(max(index, 1), 10))
}

// setContact sets the headers that say how current this server is.
func (c *call) setContact() {
	h, header := c.h, c.w.Header()
	var lastContact time.Duration
	if !h.cluster.IsLeader() {
		lastContact = h.cluster.LastContact()
	}
	header.Set("X-Consul-KnownLeader", strconv.FormatBool(h.cluster.Leader() != ""))
	header.Set("X-Consul-LastContact", strconv.FormatInt(lastContact.Milliseconds(), 10))
	header.Set("X-Consul-Query-Backend", "blocking-query")
	if c.opts.cached && c.route.scope == scopeRead {
		header.Set("X-Cache", "MISS") // it has been read just now
	}
	if c.route.consistency {
		level := "leader"
		switch {
		case c.opts.stale:
			level = "stale"
		case c.opts.consistent:
			level = "consistent"
		}
		header.Set("X-Consul-Effective-Consistency", level)
	}
}

func isNotFound(err error) bool {
	e, ok := errors.AsType[*statusError](err)
	return ok && e.code == http.StatusNotFound
}

// wait reads until the index is above minIndex or the time is over; at once if
// minIndex is 0. check, if not nil, is asked now and then whether to go on.
func (c *call) wait(minIndex uint64, check func() error, read reader) (index uint64, value any, err error) {
	if c.until.IsZero() {
		// The jitter spreads out the clients that a change has woken together.
		c.until = time.Now().Add(c.opts.wait + rand.N(c.opts.wait/16+1))
	}
	missing := false
	for {
		ws := memdb.NewWatchSet()
		index, value, err = read(ws)
		index = max(index, 1)
		until := c.until
		switch {
		case errors.Is(err, catalog.ErrPending):
			if minIndex == 0 {
				// Not a query that asked to block, but it cannot be answered before.
				c.until = minTime(until, time.Now().Add(c.h.cfg.HoldTimeout))
				until = c.until
			}
		case err != nil && !isNotFound(err):
			return 0, nil, err
		case minIndex == 0:
			return index, value, err
		default:
			// What was missing and is still missing has not changed, however often
			// its neighbours do. That it was missing before this server had got as far
			// as the client has seen says nothing: a server that has just started has
			// yet to read its log.
			if err != nil && missing {
				minIndex = max(minIndex, index)
			}
			missing = err != nil && index >= minIndex
			if index > minIndex {
				return index, value, err
			}
		}
		woken, checkErr := c.sleepUntilChange(ws, until, check)
		switch {
		case checkErr != nil:
			return 0, nil, checkErr
		case !woken:
			return index, value, err
		}
		if c.store() != nil && c.abandoned(ws) {
			minIndex = 0 // the state was replaced: answer with the new one
		}
	}
}

// abandoned says whether the store that ws was made with has been replaced: its
// channel is in ws, and the present store's is not.
func (c *call) abandoned(ws memdb.WatchSet) bool {
	if c.route.scope == scopeAgent {
		return false
	}
	for ch := range ws {
		if ch == c.store().AbandonCh() {
			return false
		}
	}
	return true
}

// sleepUntilChange waits for a change; woken is false when the time is over.
func (c *call) sleepUntilChange(ws memdb.WatchSet, until time.Time, check func() error) (woken bool, err error) {
	for {
		turn := until
		if check != nil {
			turn = minTime(until, time.Now().Add(leaderCheck))
		}
		ctx, cancel := context.WithDeadline(c.ctx(), turn)
		err := ws.WatchCtx(ctx)
		cancel()
		if c.ctx().Err() != nil {
			return false, context.Cause(c.ctx())
		}
		if check != nil {
			if err := check(); err != nil {
				return false, err
			}
		}
		switch {
		case err == nil:
			return true, nil
		case !time.Now().Before(until):
			return false, nil
		}
	}
}

func minTime(a, b time.Time) time.Time {
	if a.Before(b) {
		return a
	}
	return b
}
