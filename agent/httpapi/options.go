package httpapi

import (
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"
)

// options are the parameters that reads have in common.
type options struct {
	dc    string
	index uint64
	// wait is how long to block, bounded and with the default filled in, without
	// the jitter; waitGiven as it was asked for.
	wait       time.Duration
	waitGiven  bool
	hash       string
	stale      bool
	consistent bool
	// cached says that an answer may come from a cache, of which there is none.
	cached bool
	// maxStale bounds the time since the leader's last contact of a stale read;
	// 0 is no bound.
	maxStale time.Duration
	filter   string
	near     string
	peer     string
	nodeMeta map[string]string
	tags     []string
}

// parseOptions reads the common parameters.
func parseOptions(r *http.Request, q url.Values, cfg Config) (options, error) {
	o := options{
		dc:     q.Get("dc"),
		hash:   q.Get("hash"),
		filter: q.Get("filter"),
		near:   q.Get("near"),
		peer:   q.Get("peer"),
		tags:   q["tag"],
		wait:   cfg.DefaultQueryTime,
	}
	if o.dc == "" {
		o.dc = q.Get("datacenter")
	}
	var err error
	if v := q.Get("index"); v != "" {
		if o.index, err = strconv.ParseUint(v, 10, 64); err != nil {
			return o, bad("Invalid index")
		}
	}
	if v := q.Get("wait"); v != "" {
		d, err := time.ParseDuration(v)
		if err != nil || d < 0 {
			return o, bad("Invalid wait time")
		}
		if d > 0 { // 0 is the default, as if it were absent
			o.wait, o.waitGiven = d, true
		}
	}
	o.wait = min(o.wait, cfg.MaxQueryTime)

	o.stale, o.consistent = q.Has("stale"), q.Has("consistent")
	leader := q.Has("leader")
	o.cached = q.Has("cached")
	if v := q.Get("max_stale"); v != "" {
		if o.maxStale, err = time.ParseDuration(v); err != nil || o.maxStale < 0 {
			return o, bad("Invalid max_stale value %q", v)
		}
		o.stale = true
	}
	if o.stale && o.consistent {
		return o, bad("Cannot specify ?stale with ?consistent, conflicting semantics.")
	}
	if o.cached && o.consistent {
		return o, bad("Cannot specify ?cached with ?consistent, conflicting semantics.")
	}
	if leader {
		o.stale = false
	}
	for directive := range strings.SplitSeq(r.Header.Get("Cache-Control"), ",") {
		name, value, ok := strings.Cut(strings.ToLower(strings.TrimSpace(directive)), "=")
		if !ok || name != "max-age" && name != "stale-if-error" {
			continue
		}
		if _, err := strconv.ParseUint(value, 10, 32); err != nil {
			return o, bad("Invalid Cache-Control header.")
		}
	}
	for _, pair := range q["node-meta"] {
		if o.nodeMeta == nil {
			o.nodeMeta = map[string]string{}
		}
		k, v, _ := strings.Cut(pair, ":")
		o.nodeMeta[k] = v
	}
	return o, nil
}
