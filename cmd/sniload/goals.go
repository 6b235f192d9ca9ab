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
	// oursFew is ours with 64 routes, beside those that have 100,000.
	oursFew = "sluice-64"
	// oursPortable is ours with the engine that runs everywhere.
	oursPortable = "sluice-netpoll"
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
func (v verdict) passed(bound float64) bool {
	got := math.Round(v.got*100) / 100
	if v.atLeast {
		return got >= bound
	}
	return got <= bound
}

// envoyRows are the tests and metrics in which Envoy is to be left behind. Memory
// of the kernel is not among them: it is that of two sockets, whoever has them.
var envoyRows = []struct{ name, test, metric string }{
	{"set-up", "conn", "cpu"},
	{"set-up, p99", "conn", "p99"},
	{"handshake", "tls", "cpu"},
	{"bulk", "down", "cpu"},
	{"ping-pong", "rr64", "cpu"},
	{"ping-pong, p99", "rr64", "p99"},
	{"memory of an idle connection", "idle", "user"},
	{"100,000 routes", "connbig", "cpu"},
	{"time to start", "start64", "took"},
	{"memory after the start", "start64", "base"},
}

// against makes the value of a goal that is a ratio.
func against(test, to, metric string) func(*results) (float64, string, bool) {
	return func(r *results) (float64, string, bool) {
		v, ok := r.ratio(test, ours, to, metric)
		return v, "", ok
	}
}

// plain makes the value of a goal that is a metric, times scale.
func plain(test, metric string, scale float64) func(*results) (float64, string, bool) {
	return func(r *results) (float64, string, bool) {
		v, ok := r.middle(test, ours, metric)
		return v * scale, "", ok
	}
}

// most makes the value of a goal that both engines have to reach: the larger one of
// a metric, times scale.
func most(test, metric string, scale float64) func(*results) (float64, string, bool) {
	return func(r *results) (v float64, note string, ok bool) {
		for _, who := range []string{ours, oursPortable} {
			if x, measured := r.middle(test, who, metric); measured && (!ok || x*scale > v) {
				v, note, ok = x*scale, who, true
			}
		}
		return v, note, ok
	}
}

// failures makes the value of a goal that nothing fails, with either engine.
func failures(test string) func(*results) (float64, string, bool) {
	return func(r *results) (v float64, _ string, ok bool) {
		for _, who := range []string{ours, oursPortable} {
			v += float64(r.failed(test, who))
			ok = ok || slices.Contains(r.contenders(test), who)
		}
		return v, "", ok
	}
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

var goals = []goal{
	{name: "set-up CPU against HAProxy", required: .95, aim: .80, unit: "x", value: against("conn", reference, "cpu")},
	{name: "CPU added to the whole path, against a direct connection", required: 1.35, aim: 1.15, unit: "x",
		value: func(r *results) (float64, string, bool) {
			v, ok := r.added("conn", ours, "path")
			return v, "", ok
		}},
	{name: "bulk CPU against HAProxy", required: .20, unit: "x", value: against("down", reference, "cpu")},
	{name: "bulk CPU against HAProxy with splice forced", required: .70, aim: .50, unit: "x", value: against("down", "haproxy-splice", "cpu")},
	{name: "bulk throughput against direct", required: .70, aim: .85, atLeast: true, unit: "x", value: against("down", direct, "rate")},
	{name: "64-connection ping-pong CPU against HAProxy", required: .98, aim: .78, unit: "x", value: against("rr64", reference, "cpu")},
	{name: "64-connection ping-pong p99 against HAProxy", required: 1, aim: .8, unit: "x", value: against("rr64", reference, "p99")},
	{name: "user memory of an idle connection", required: 512, aim: 128, unit: " B", value: plain("idle", "user", 1)},
	{name: "descriptors of an idle connection", required: 2, aim: 2, value: plain("idle", "files", 1)},
	{name: "set-up CPU with 100,000 routes, against 64", required: 1.08, unit: "x", value: against("connbig", oursFew, "cpu")},
	{name: "resident memory of 100,000 routes", required: 15, unit: " MB", value: difference("base", 1e-6)},
	{name: "time to load 100,000 routes", required: 100, unit: " ms", value: difference("took", 1e3)},
	{name: "the worst row against Envoy", required: 1, unit: "x", value: func(r *results) (float64, string, bool) {
		worst, name := 0.0, ""
		for _, row := range envoyRows {
			if v, ok := r.ratio(row.test, ours, "envoy", row.metric); ok && v > worst {
				worst, name = v, row.name
			}
		}
		return worst, name, name != ""
	}},
	{name: "set-up CPU against Envoy", required: 1, aim: .33, unit: "x", value: against("conn", "envoy", "cpu")},
	{name: "idle connections, with 20,000 descriptors", required: manyConns, atLeast: true, value: plain("many", "open", 1)},
	{name: "user memory of one of 9,000 idle connections", required: 512, aim: 128, unit: " B", value: plain("many", "user", 1)},
	{name: "descriptors of one of 9,000 idle connections", required: 2, aim: 2, value: plain("many", "files", 1)},
	{name: "failed connections while 10,000 names are replaced every second", value: failures("churn")},
	{name: "set-up p99 meanwhile, against without", required: 1.5, unit: "x", value: plain("churn", "p99ratio", 1)},
	{name: "growth of memory meanwhile", required: 8, unit: " MB", value: most("churn", "growth", 1e-6)},
	{name: "growth of descriptors meanwhile", value: most("churn", "files", 1)},
	{name: "failed connections in a flood of half hellos, and half hellos left open", value: failures("flood")},
	{name: "set-up p99 in the flood, against without", required: 1.2, unit: "x", value: plain("flood", "p99ratio", 1)},
	{name: "time until the last half hello is shed, the deadline being 5 s", required: 6, unit: " s", value: most("flood", "shedlast", 1)},
	{name: "failures with endpoints that fail", value: failures("faults")},
	{name: "failures with broken hellos", value: failures("torture")},
	{name: "growth of memory by broken hellos", required: 8, unit: " MB", value: most("torture", "growth", 1e-6)},
	{name: "growth of descriptors by broken hellos", value: most("torture", "files", 1)},
	{name: "user memory of an idle connection against Envoy", required: 1, aim: .33, unit: "x", value: against("idle", "envoy", "user")},
}

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
