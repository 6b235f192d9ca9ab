package httpapi

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"slices"
	"strconv"
	"time"

	"github.com/sluicemesh/sluice/agent/state"
)

// scope says which agent answers a route.
type scope int

const (
	// scopeAgent is about this agent: it answers itself.
	scopeAgent scope = iota
	// scopeServer can be answered by any server of the datacenter asked for,
	// with a leader or without.
	scopeServer
	// scopeRead is answered by the leader of the datacenter asked for, or, with
	// ?stale, by any server of it.
	scopeRead
	// scopeWrite is done by the leader of the datacenter asked for.
	scopeWrite
	// scopePrimary is done by the leader of the primary datacenter, whichever
	// datacenter was asked for.
	scopePrimary
)

const (
	// hopHeader counts how often a request has been passed on. Believed from
	// agents only.
	hopHeader = "X-Sluice-Hops"
	// maxHops is what the longest way takes (client agent, server, leader, server
	// of the other datacenter, its leader) and two changes of leader.
	maxHops = 6
	// retryHeader marks an answer to an agent: nothing was done, try again.
	retryHeader = "X-Sluice-Retry"
	// leaderCheck is how often a query that blocks makes sure that its server
	// still leads.
	leaderCheck = 5 * time.Second
)

// retryableError marks a request that was not executed, or may be executed twice.
type retryableError struct{ error }

func (e retryableError) Unwrap() error { return e.error }

// serve answers the request, here or by passing it on, and tries again for a
// while when there is no leader.
func (c *call) serve() (any, error) {
	var hold time.Time
	for {
		began := time.Now()
		value, err := c.attempt()
		if err == nil {
			return value, nil
		}
		_, _, retry := answerTo(err)
		if _, ok := errors.AsType[retryableError](err); !ok && !retry {
			return nil, err
		}
		if hold.IsZero() {
			hold = began.Add(c.h.cfg.HoldTimeout)
			if c.opts.index > 0 {
				hold = time.Now().Add(c.h.cfg.HoldTimeout) // it may have blocked for long
			}
		}
		pause := c.h.cfg.HoldTimeout/16 + rand.N(c.h.cfg.HoldTimeout/16+1)
		if time.Now().Add(pause).After(hold) {
			return nil, err
		}
		if !sleep(c.ctx(), pause) {
			return nil, context.Cause(c.ctx())
		}
	}
}

// sleep waits for d; false if ctx ended first.
func sleep(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}

func (c *call) attempt() (any, error) {
	target, here, err := c.place()
	switch {
	case err != nil:
		return nil, err
	case here:
		// Only servers know whether the datacenter has a mesh.
		if c.h.cfg.NoConnect && c.h.isServer() && c.route.ofMesh() {
			return nil, status(http.StatusInternalServerError, textNoConnect)
		}
		return c.route.handler(c)
	default:
		return nil, c.passOn(target)
	}
}

// place says where the request belongs.
func (c *call) place() (t Target, here bool, err error) {
	h := c.h
	if c.route.scope == scopeAgent {
		return Target{}, true, nil
	}
	dc := c.opts.dc
	if c.route.scope == scopePrimary {
		dc = h.cfg.PrimaryDatacenter
	}
	if !h.isServer() {
		return Target{}, false, nil // a server finds the way from there
	}
	if dc != "" && dc != h.cfg.Datacenter {
		if !slices.Contains(h.cluster.Datacenters(), dc) {
			return Target{}, false, state.ErrNoPath
		}
		return Target{Datacenter: dc}, false, nil
	}
	switch {
	case c.route.scope == scopeServer, h.cluster.IsLeader():
		return Target{}, true, nil
	case c.route.scope == scopeRead && c.opts.stale:
		if c.opts.maxStale == 0 || h.cluster.LastContact() <= c.opts.maxStale {
			return Target{}, true, nil
		}
	}
	return Target{Leader: true}, false, nil
}

// hopByHop are the headers that belong to one connection.
var hopByHop = []string{
	"Connection", "Keep-Alive", "Proxy-Authenticate", "Proxy-Authorization", "Proxy-Connection", "Te", "Trailer",
	"Transfer-Encoding", "Upgrade",
}

// passOn sends the request to another agent and its answer to the client. It
// returns errPassedOn once an answer has begun.
func (c *call) passOn(t Target) error {
	hops := 0
	if c.peer || c.inProcess {
		hops, _ = strconv.Atoi(c.r.Header.Get(hopHeader))
	}
	if hops >= maxHops {
		return status(http.StatusInternalServerError, textTooManyHops)
	}
	rt, err := c.h.cluster.Forward(c.ctx(), t)
	if err != nil {
		return err
	}
	out := c.r.Clone(c.ctx())
	out.RequestURI = ""
	out.URL.Scheme, out.URL.Host = "https", "server"
	out.Body, out.ContentLength, out.TransferEncoding = http.NoBody, 0, nil
	if len(c.body) > 0 {
		out.ContentLength = int64(len(c.body))
		out.Body = io.NopCloser(bytes.NewReader(c.body))
		out.GetBody = func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(c.body)), nil }
	}
	for _, name := range hopByHop {
		out.Header.Del(name)
	}
	out.Header.Set(hopHeader, strconv.Itoa(hops+1))
	if c.opts.near == nearAgent {
		// Only this agent knows which node is meant.
		q := out.URL.Query()
		q.Set("near", c.h.cfg.NodeName)
		out.URL.RawQuery = q.Encode()
	}

	resp, err := rt.RoundTrip(out)
	if err != nil {
		return c.lost(t, err)
	}
	defer func() { _ = resp.Body.Close() }()
	if resp.StatusCode == http.StatusInternalServerError && resp.Header.Get(retryHeader) != "" {
		text, _ := io.ReadAll(io.LimitReader(resp.Body, 1<<10))
		return retryableError{status(resp.StatusCode, "%s", text)}
	}
	c.relay(resp)
	return errPassedOn
}

// lost returns the error for a request to t that got no answer.
func (c *call) lost(t Target, cause error) error {
	if c.ctx().Err() != nil {
		return context.Cause(c.ctx())
	}
	if _, _, retry := answerTo(cause); retry {
		return cause
	}
	c.h.logger.Debug("no answer from a server", "method", c.r.Method, "path", c.r.URL.Path, "dc", t.Datacenter, "error", cause)
	var err error
	switch {
	case t.Leader:
		err = status(http.StatusInternalServerError, "%s", state.ErrNoLeader)
	case t.Datacenter != "":
		err = status(http.StatusInternalServerError, "%s", state.ErrNoRemoteServer)
	default:
		err = fmt.Errorf("rpc error making call: %w", cause)
	}
	if c.route.scope == scopeRead || c.route.scope == scopeServer {
		return retryableError{err}
	}
	return err // a write that may have been done is not done again
}

// relay sends an answer on as it comes. When it breaks off, so does ours.
func (c *call) relay(resp *http.Response) {
	header := c.w.Header()
	for name, values := range resp.Header {
		if !slices.Contains(hopByHop, name) && name != retryHeader {
			header[name] = values
		}
	}
	c.w.WriteHeader(resp.StatusCode)
	var (
		flush = http.NewResponseController(c.w)
		buf   = make([]byte, 32<<10)
	)
	for {
		n, err := resp.Body.Read(buf)
		if n > 0 {
			if _, werr := c.w.Write(buf[:n]); werr != nil {
				return // the client has gone
			}
			_ = flush.Flush() // not every writer can
		}
		switch {
		case errors.Is(err, io.EOF):
			return
		case err != nil:
			panic(http.ErrAbortHandler)
		}
	}
}
