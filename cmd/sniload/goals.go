package main

import (
	"fmt"
	"math"
	"slices"
)

// The contenders that are compared with others.
const (
	ours      = "sluice"
	reference = "haproxy"
	direct    = "direct"
	// floor does nothing but forward, see floor/floor.c.
	floor = "floor"
	// oursFew is ours with 64 routes, beside those that have 100,000.
	oursFew = "sluice-64"
	// oursPortable is ours with the engine that runs everywhere.
	oursPortable = "sluice-netpoll"
	// oursPlain is ours with the defaults, where the others have every feature on.
	oursPlain = "sluice-plain"
)

// goal is what the forwarder has to reach: a value that is at most, or at least,
// a bound.
type goal struct {
	name          string
	required, aim float64 // aim is 0 where there is none
	atLeast       bool
	unit          string // what is printed after a value
	value         func(r *results) (v float64, note string, ok bool)
}

// verdict is a goal and what came of it.
type verdict struct {
	goal
	got  float64
	note string
	ok   bool // it was measured
}

// passed tells whether a bound is kept. Ratios are rounded as they are shown.
func (v verdict) passed(bound float64) bool { return v.beyond(bound) <= 0 }

// tied tells whether a ratio misses what is required by no more than ratios differ
// from run to run.
func (v verdict) tied() bool {
	d := v.beyond(v.required)
	return v.unit == ratioUnit && d > 0 && math.Round(d*100)/100 <= tie
}

// beyond is how much worse than a bound a value is; not above 0 when it is kept.
func (v verdict) beyond(bound float64) float64 {
	d := math.Round(v.got*100)/100 - bound
	if v.atLeast {
		return -d
	}
	return d
}

const (
	ratioUnit = "x"
	tie       = .08
)

// better says of the metrics that are compared with Envoy's, in every test that has
// them, whether it is more or less of them that is better. Those of the kernel are not
// among them, nor descriptors: they are those of two sockets, whoever has them. Rare
// events are not, since a few decide on them: p99.9, and what is spent on nothing.
var better = map[string]float64{"cpu": -1, "path": -1, "rate": 1, "p50": -1, "p99": -1, "user": -1, "took": -1, "base": -1}

// worstAgainst is the largest ratio to a contender of all rows that both have.
func worstAgainst(who string) func(*results) (float64, string, bool) {
	return func(r *results) (worst float64, name string, ok bool) {
		for _, t := range tables {
			for _, c := range t.columns {
				v, measured := 0.0, false
				switch better[c.metric] {
				case -1:
					v, measured = r.ratio(t.test, ours, who, c.metric)
				case 1:
					v, measured = r.ratio(t.test, who, ours, c.metric)
				}
				if measured && v > worst {
					worst, name, ok = v, t.title+": "+c.title, true
				}
			}
		}
		return worst, name, ok
	}
}

// against makes the value of a goal that is a ratio.
func against(test, to, metric string) func(*results) (float64, string, bool) {
	return func(r *results) (float64, string, bool) {
		v, ok := r.ratio(test, ours, to, metric)
		return v, "", ok
	}
}

// plain makes the value of a goal that is a metric, times scale.
func plain(who, test, metric string, scale float64) func(*results) (float64, string, bool) {
	return func(r *results) (float64, string, bool) {
		v, ok := r.middle(test, who, metric)
		return v * scale, "", ok
	}
}

// failures makes the value of a goal that nothing fails.
func failures(who, test string) func(*results) (float64, string, bool) {
	return func(r *results) (float64, string, bool) {
		return float64(r.failed(test, who)), "", slices.Contains(r.contenders(test), who)
	}
}

// ofBoth are the goals that both engines have to reach.
func ofBoth(make func(who string) []goal) []goal {
	all := make(ours)
	for _, g := range make(oursPortable) {
		g.name += " (portable engine)"
		all = append(all, g)
	}
	return all
}

// difference of a metric of 100,000 routes and of 64, times scale.
func difference(metric string, scale float64) func(*results) (float64, string, bool) {
	return func(r *results) (float64, string, bool) {
		test := fmt.Sprintf("start%d", bigRoutes)
		big, ok := r.middle(test, ours, metric)
		small, ok2 := r.middle(test, oursFew, metric)
		return (big - small) * scale, "", ok && ok2
	}
}

var goals = slices.Concat([]goal{
	{name: "set-up CPU against HAProxy", required: .95, aim: .80, unit: ratioUnit, value: against("conn", reference, "cpu")},
	{name: "CPU added to the whole path, against a direct connection", required: 1.35, aim: 1.15, unit: ratioUnit,
		value: func(r *results) (float64, string, bool) {
			v, ok := r.added("conn", ours, "path")
			return v, "", ok
		}},
	{name: "bulk CPU against HAProxy", required: .20, unit: ratioUnit, value: against("down", reference, "cpu")},
	{name: "bulk CPU against HAProxy with splice forced", required: .70, aim: .50, unit: ratioUnit, value: against("down", "haproxy-splice", "cpu")},
	{name: "bulk throughput against direct", required: .70, aim: .85, atLeast: true, unit: ratioUnit, value: against("down", direct, "rate")},
	{name: "64-connection ping-pong CPU against HAProxy", required: .98, aim: .78, unit: ratioUnit, value: against("rr64", reference, "cpu")},
	{name: "64-connection ping-pong p99 against HAProxy", required: 1, aim: .8, unit: ratioUnit, value: against("rr64", reference, "p99")},
	{name: "user memory of an idle connection", required: 512, aim: 128, unit: " B", value: plain(ours, "idle", "user", 1)},
	{name: "descriptors of an idle connection", required: 2, aim: 2, value: plain(ours, "idle", "files", 1)},
	{name: "set-up CPU with 100,000 routes, against 64", required: 1.08, unit: ratioUnit, value: against("connbig", oursFew, "cpu")},
	{name: "resident memory of 100,000 routes", required: 15, unit: " MB", value: difference("base", 1e-6)},
	{name: "time to load 100,000 routes", required: 100, unit: " ms", value: difference("took", 1e3)},
	{name: "the worst row against Envoy", required: 1, unit: ratioUnit, value: worstAgainst("envoy")},
	{name: "set-up CPU against Envoy", required: 1, aim: .33, unit: ratioUnit, value: against("conn", "envoy", "cpu")},
	{name: "user memory of an idle connection against Envoy", required: 1, aim: .33, unit: ratioUnit, value: against("idle", "envoy", "user")},
}, ofBoth(func(who string) []goal {
	return []goal{
		{name: "checks that fail", value: failures(who, "checks")},
		{name: "idle connections, with 20,000 descriptors", required: manyConns, atLeast: true, value: plain(who, "many", "open", 1)},
		{name: "descriptors of one of them", required: 2, aim: 2, value: plain(who, "many", "files", 1)},
		{name: "user memory of one of 9,000 idle connections", required: 512, aim: 128, unit: " B", value: plain(who, "many", "user", 1)},
		{name: "set-up p99 while 10,000 names are replaced every second, against without", required: 1.5, unit: ratioUnit, value: plain(who, "churn", "p99ratio", 1)},
		{name: "set-up p99 in a flood of half hellos, against without", required: 1.2, unit: ratioUnit, value: plain(who, "flood", "p99ratio", 1)},
		{name: "failed connections while 10,000 names are replaced every second", value: failures(who, "churn")},
		{name: "growth of memory meanwhile", required: 8, unit: " MB", value: plain(who, "churn", "growth", 1e-6)},
		{name: "growth of descriptors meanwhile", value: plain(who, "churn", "files", 1)},
		{name: "failed connections in a flood of half hellos, and half hellos left open", value: failures(who, "flood")},
		{name: "time until the last half hello is shed, the deadline being 5 s", required: 6, unit: " s", value: plain(who, "flood", "shedlast", 1)},
		{name: "flows broken by a drain before its time, and calls that failed", value: failures(who, "drain")},
		{name: "failures with endpoints that fail", value: failures(who, "faults")},
		{name: "failures with broken hellos", value: failures(who, "torture")},
		{name: "growth of memory by broken hellos", required: 8, unit: " MB", value: plain(who, "torture", "growth", 1e-6)},
		{name: "growth of descriptors by broken hellos", value: plain(who, "torture", "files", 1)},
	}
}))

// judge tells what came of each goal.
func judge(r *results) []verdict {
	var out []verdict
	for _, g := range goals {
		v := verdict{goal: g}
		v.got, v.note, v.ok = g.value(r)
		out = append(out, v)
	}
	return out
}
