package main

import (
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
)

// info is where and with what a report was made.
type info struct {
	Model, Kernel, Go, Date string
	CPUs                    int
	Memory                  int64 // bytes
	Quick                   bool
	Contenders              []contenderInfo
}

type contenderInfo struct{ Name, Version string }

// column of a table: a metric, times scale.
type column struct {
	metric, title string
	scale         float64
}

// table shows a test.
type table struct {
	test, title, about string
	columns            []column
}

func cpu(unit string, scale float64) column {
	return column{"cpu", "CPU " + unit, scale}
}

var (
	connColumns = []column{cpu("µs/conn", 1e6), {"path", "path µs/conn", 1e6}, {"rate", "conn/s", 1}, {"p50", "p50 µs", 1e6}, {"p99", "p99 µs", 1e6}, {"switches", "switches/conn", 1}}
	tripColumns = []column{cpu("µs/trip", 1e6), {"path", "path µs/trip", 1e6}, {"rate", "trips/s", 1}, {"p50", "p50 µs", 1e6}, {"p99", "p99 µs", 1e6}, {"p999", "p99.9 µs", 1e6}}
	bulkColumns = []column{cpu("s/GB", 1), {"path", "path s/GB", 1}, {"rate", "GB/s", 1}}
	pairColumns = []column{{"p99", "p99 µs", 1e6}, {"p99quiet", "p99 µs, quiet", 1e6}, {"p99ratio", "ratio", 1}, {"p50", "p50 µs", 1e6}}
	baseColumns = []column{{"took", "start ms", 1e3}, {"base", "memory MB", 1e-6}}
)

var tables = []table{
	{"conn", "Short connections", "32 at a time: connect, a ClientHello of 1.5 kB, one byte back, close.", connColumns},
	{"tls", "Mutual TLS handshakes", "TLS 1.3 with X25519MLKEM768 and client certificates, 4 at a time, no resumption; a byte is exchanged. Client and server are crypto/tls.",
		[]column{cpu("µs/conn", 1e6), {"path", "path µs/conn", 1e6}, {"rate", "handshakes/s", 1}, {"p50", "p50 µs", 1e6}, {"p99", "p99 µs", 1e6}}},
	{"rr64", "Ping-pong on 64 connections", "One byte there and back, on all at once.", tripColumns},
	{"rr1", "Ping-pong on one connection", "One byte there and back.", tripColumns},
	{"rr64k1", "Ping-pong of 1 KiB on 64 connections", "", tripColumns},
	{"down", "Bulk from server to client", "8 connections.", bulkColumns},
	{"up", "Bulk from client to server", "8 connections.", bulkColumns},
	{"echo", "Bulk both ways", "8 connections.", bulkColumns},
	{"idle", "Idle connections", "Memory is what each connection adds to that of the first 500; the kernel's is that of the whole machine, and rough.",
		[]column{{"user", "user B/conn", 1}, {"kernel", "kernel B/conn", 1}, {"files", "descriptors/conn", 1}, {"idle", "idle CPU %", 100}}},
	{"start64", "Start", "Until connections are accepted, and resident memory then.", baseColumns},
	{"start100000", "Start with 100,000 routes", "", baseColumns},
	{"connbig", "Short connections with 100,000 routes", "", connColumns},
	{"connpin", "Short connections, the forwarder on one core", "The load has another core.", connColumns},
	{"rr64pin", "Ping-pong on 64 connections, the forwarder on one core", "", tripColumns},
	{"downpin", "Bulk from server to client, the forwarder on one core", "", bulkColumns},
	{"checks", "Correctness", "Half-close, back-pressure, hellos in pieces, resets, HTTP over mutual TLS, curl, openssl, and what is left open afterwards.",
		[]column{{"checks", "checks", 1}, {"took", "s", 1}}},
	{"many", "9,000 idle connections", "With 20,000 descriptors.",
		[]column{{"open", "open", 1}, {"user", "user B/conn", 1}, {"files", "descriptors/conn", 1}, {"kernel", "kernel B/conn", 1}, {"idle", "idle CPU %", 100}}},
	{"churn", "10,000 names replaced every second", "500 connections per second, quiet and with the names (and the clusters they lead to, which have the defaults) replaced, in turns. Growth is what was needed at most, from a third of the tables on: in the second half of them against the first.",
		append(slices.Clone(pairColumns), column{"took", "ms until in use", 1e3}, column{"tables", "tables", 1}, column{"growth", "growth MB", 1e-6}, column{"files", "descriptors more", 1})},
	{"flood", "A flood of hellos that are not completed", "500 connections per second, quiet and with thousands beside them that send half a hello, or nothing, in turns. The deadline for a hello is 5 s.",
		append(slices.Clone(pairColumns), column{"held", "held", 1}, column{"shed", "shed", 1}, column{"early", "before their time", 1}, column{"shedp50", "shed after s", 1}, column{"shedlast", "the last s", 1})},
	{"drain", "A drain under load", "Of two forwarders, clients prefer the first, and go to the other when they cannot connect. The first gets SIGTERM, with 5 s for open flows: some end by themselves, the others are ended after that, 200 per second. Failed is a flow broken before, and a call that was connected and not answered. Whoever comes in the moment in which the listeners are closed is not answered by TCP, and asks again after a second.",
		[]column{{"flows", "flows", 1}, {"held", "ended by the drain", 1}, {"last", "the last after s", 1}, {"calls", "calls", 1}, {"moved", "by the other", 1}, {"p99quiet", "p99 µs before", 1e6}, {"p99", "p99 µs meanwhile", 1e6}, {"longest", "longest ms", 1e3}, {"took", "stopped after s", 1}}},
	{"faults", "Endpoints that fail", "One of two endpoints refuses, does not answer, resets, closes or stalls what it has accepted, or goes and comes back: no call may notice but by the time it takes, an endpoint having 0.25 s for its answer. Both fail: the refusal says why. The failures are those that the status tells of the endpoints, by their reason; each is to be told as what it was.",
		[]column{{"cases", "cases", 1}, {"calls", "calls", 1}, {"cut", "calls cut", 1}, {"stalled", "stalled", 1}, {"longest", "longest ms", 1e3},
			{"refused", "told refused", 1}, {"timeout", "timeout", 1}, {"reset", "reset", 1}, {"closed", "closed", 1}, {"no-answer", "no answer", 1}}},
	{"torture", "Broken hellos", "In segments of a byte, in many records, of 64 KiB, slow, garbage. Failed is what was answered that should not have been, the other way round, or left open.",
		[]column{{"hellos", "hellos", 1}, {"growth", "growth MB", 1e-6}, {"files", "descriptors more", 1}, {"idle", "CPU % afterwards", 100}}},
}

// render makes the report, in Markdown.
func render(i info, r *results, goBench []goResult) string {
	var b strings.Builder
	b.WriteString("# Benchmarks\n\nMade by `make bench`; do not edit.\n\n")
	fmt.Fprintf(&b, "Date %s. %s, %d cores, %.0f GiB; Linux %s; %s.\n", i.Date, i.Model, i.CPUs, float64(i.Memory)/(1<<30), i.Kernel, i.Go)
	var who []string
	for _, c := range i.Contenders {
		if c.Version != "" {
			who = append(who, c.Name+" "+c.Version)
		}
	}
	if len(who) > 0 {
		fmt.Fprintf(&b, "Contenders: %s.\n", strings.Join(who, ", "))
	}
	if i.Quick {
		b.WriteString("A quick run, with fewer and shorter rounds: differences below 0.1 mean nothing.\n")
	}
	if v, ok := r.strangers(); ok {
		fmt.Fprintf(&b, "Processes that are no part of it had %.0f%% of the processors meanwhile.\n", 100*v)
		if v > .15 {
			b.WriteString("**That is much: throughput and latencies say little, and ratios are rough.**\n")
		}
	}
	b.WriteString(`
Client, forwarder and server share the machine, on loopback in a network namespace
of their own, with TCP's reno. CPU is what the forwarder's processes spend on a
unit of work, path is what client, forwarder and server spend together. Contenders
take turns; a figure is the median of the rounds, and a ratio is the median of the
ratios within rounds. Ratios within 0.08 are ties: a miss by no more is
marked as one. What stands between the figures and their bounds and aims is told
in [performance](performance.md).

` + featuresText)
	if len(r.samples) > 0 {
		b.WriteString("\n## What is to be reached\n\n" + verdicts(judge(r)))
	}
	have := r.tests()
	for _, t := range tables {
		if have[t.test] {
			b.WriteString("\n" + t.render(r))
		}
	}
	if len(goBench) > 0 {
		b.WriteString("\n## Go benchmarks\n\n" + goTable(goBench))
	}
	return b.String()
}

// strangers is the part of the machine that other processes had, over all.
func (r *results) strangers() (float64, bool) {
	var v []float64
	for _, s := range r.samples {
		if x, ok := s.Metrics["strangers"]; ok {
			v = append(v, x)
		}
	}
	return median(v)
}

func verdicts(all []verdict) string {
	var b strings.Builder
	var missing []string
	b.WriteString("| | required | aim | measured | |\n|---|---|---|---|---|\n")
	for _, v := range all {
		sign := "≤ "
		if v.atLeast {
			sign = "≥ "
		}
		bound := func(x float64) string {
			return sign + strconv.FormatFloat(x, 'f', -1, 64) + v.unit
		}
		if !v.ok {
			missing = append(missing, v.name)
			continue
		}
		got, word, aim := number(v.got)+v.unit, "pass", ""
		if v.aim != 0 {
			aim = bound(v.aim)
		}
		if v.note != "" {
			got += " (" + v.note + ")"
		}
		if !v.passed(v.required) {
			if word = "**miss**"; v.tied() {
				word += ", a tie"
			}
		} else if v.aim != 0 && v.passed(v.aim) {
			word = "pass, aim reached"
		}
		fmt.Fprintf(&b, "| %s | %s | %s | %s | %s |\n", v.name, bound(v.required), aim, got, word)
	}
	if len(missing) > 0 {
		fmt.Fprintf(&b, "\nNot measured: %s.\n", strings.Join(missing, "; "))
	}
	return b.String()
}

func (t table) render(r *results) string {
	var b strings.Builder
	fmt.Fprintf(&b, "## %s\n\n", t.title)
	if t.about != "" {
		b.WriteString(t.about + "\n\n")
	}
	first := t.columns[0]
	b.WriteString("| |")
	for _, c := range t.columns {
		b.WriteString(" " + c.title + " |")
	}
	fmt.Fprintf(&b, " to %s |", reference)
	// Only what a direct connection has can be compared with it.
	toDirect := ""
	for _, m := range []string{"path", "rate"} {
		if _, ok := r.middle(t.test, direct, m); ok && toDirect == "" {
			toDirect = m
			fmt.Fprintf(&b, " %s to %s |", m, direct)
		}
	}
	b.WriteString(" failed |\n|---|" + strings.Repeat("---|", len(t.columns)+2))
	if toDirect != "" {
		b.WriteString("---|")
	}
	b.WriteString("\n")
	for _, who := range r.contenders(t.test) {
		fmt.Fprintf(&b, "| %s |", who)
		for i, c := range t.columns {
			v, ok := r.middle(t.test, who, c.metric)
			switch {
			case !ok:
				b.WriteString(" – |")
			case i == 0:
				all := slices.Sorted(maps.Values(r.rounds(t.test, who, c.metric)))
				fmt.Fprintf(&b, " **%s** (%s–%s) |", number(v*c.scale), number(all[0]*c.scale), number(all[len(all)-1]*c.scale))
			default:
				fmt.Fprintf(&b, " %s |", number(v*c.scale))
			}
		}
		b.WriteString(ratioCell(r.ratio(t.test, who, reference, first.metric)))
		if toDirect != "" {
			b.WriteString(ratioCell(r.ratio(t.test, who, direct, toDirect)))
		}
		fmt.Fprintf(&b, " %d |\n", r.failed(t.test, who))
	}
	return b.String()
}

func ratioCell(v float64, ok bool) string {
	if !ok {
		return " – |"
	}
	return " " + strconv.FormatFloat(v, 'f', 2, 64) + " |"
}

// number with three digits or so.
func number(v float64) string {
	a := max(v, -v)
	switch {
	case a == 0:
		return "0"
	case a >= 100:
		return strconv.FormatFloat(v, 'f', 0, 64)
	case a >= 10:
		return strconv.FormatFloat(v, 'f', 1, 64)
	case a >= .1:
		return strconv.FormatFloat(v, 'f', 2, 64)
	}
	return strconv.FormatFloat(v, 'f', 4, 64)
}

// goResult is a line of output of go test -bench.
type goResult struct {
	pkg, name string
	values    []string // "123 ns/op"
}

// parseGoBench reads the output of go test -bench, of several packages.
func parseGoBench(out []byte) []goResult {
	var all []goResult
	pkg := ""
	for line := range strings.Lines(string(out)) {
		f := strings.Fields(line)
		if len(f) == 2 && f[0] == "pkg:" {
			pkg = f[1]
		}
		// The name, the number of iterations, then pairs of value and unit.
		if len(f) < 4 || len(f)%2 != 0 || !strings.HasPrefix(f[0], "Benchmark") {
			continue
		}
		g := goResult{pkg: pkg, name: strings.TrimPrefix(f[0], "Benchmark")}
		for i := 2; i < len(f); i += 2 {
			g.values = append(g.values, f[i]+" "+f[i+1])
		}
		all = append(all, g)
	}
	return all
}

func goTable(all []goResult) string {
	var b strings.Builder
	b.WriteString("| package | benchmark | |\n|---|---|---|\n")
	for _, g := range all {
		pkg := g.pkg
		if _, in, ok := strings.Cut(pkg, "/sluice/"); ok {
			pkg = in
		}
		fmt.Fprintf(&b, "| %s | %s | %s |\n", pkg, g.name, strings.Join(g.values, ", "))
	}
	return b.String()
}
