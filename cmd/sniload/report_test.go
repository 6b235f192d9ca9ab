package main

import (
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// measured makes results of rounds of one metric, by contender.
func measured(test, metric string, rounds map[string][]float64) *results {
	r := &results{}
	for who, values := range rounds {
		for i, v := range values {
			r.add(sample{Test: test, Contender: who, Round: i, Metrics: map[string]float64{metric: v}})
		}
	}
	return r
}

func TestRatioIsOfRounds(t *testing.T) {
	// The machine became half as fast in the second round: the ratio did not.
	r := measured("conn", "cpu", map[string][]float64{ours: {1, 2, 1}, reference: {2, 4, 2}})
	if v, ok := r.ratio("conn", ours, reference, "cpu"); !ok || v != .5 {
		t.Errorf("ratio %v, %v; want 0.5", v, ok)
	}
	r.add(sample{Test: "conn", Contender: ours, Round: 3, Failed: 1})
	r.add(sample{Test: "conn", Contender: reference, Round: 3, Metrics: map[string]float64{"cpu": 9}})
	if v, ok := r.ratio("conn", ours, reference, "cpu"); !ok || v != .5 {
		t.Errorf("with a round that failed: ratio %v, %v; want 0.5", v, ok)
	}
	if n := r.failed("conn", ours); n != 1 {
		t.Errorf("%d failed, want 1", n)
	}
	if _, ok := r.ratio("conn", ours, "envoy", "cpu"); ok {
		t.Error("a ratio to what was not measured")
	}
}

func TestJudge(t *testing.T) {
	r := measured("conn", "cpu", map[string][]float64{ours: {.9}, reference: {1}, "envoy": {4}})
	r.samples = append(r.samples, measured("conn", "path", map[string][]float64{ours: {2.4}, direct: {1}}).samples...)
	r.samples = append(r.samples, measured("rr64", "p99", map[string][]float64{ours: {1.09}, reference: {1}}).samples...)
	r.samples = append(r.samples, measured("idle", "user", map[string][]float64{ours: {513}}).samples...)
	r.samples = append(r.samples, measured("down", "rate", map[string][]float64{ours: {.86}, direct: {1}}).samples...)
	got := map[string]string{}
	text := verdicts(judge(r))
	if !strings.Contains(text, "Not measured: bulk CPU against HAProxy; ") {
		t.Errorf("what was not measured is not told:\n%s", text)
	}
	for line := range strings.Lines(text) {
		cells := strings.Split(line, "|")
		if len(cells) < 6 {
			continue
		}
		got[strings.TrimSpace(cells[1])] = strings.TrimSpace(cells[4]) + ": " + strings.TrimSpace(cells[5])
	}
	for name, want := range map[string]string{
		"set-up CPU against HAProxy":                               "0.90x: pass",
		"CPU added to the whole path, against a direct connection": "1.40x: **miss**, a tie",
		"64-connection ping-pong p99 against HAProxy":              "1.09x: **miss**",
		"user memory of an idle connection":                        "513 B: **miss**",
		"bulk throughput against direct":                           "0.86x: pass, aim reached",
		"the worst row against Envoy":                              "0.23x (Short connections: CPU µs/conn): pass",
		"set-up CPU against Envoy":                                 "0.23x: pass, aim reached",
	} {
		if got[name] != want {
			t.Errorf("%s: %q, want %q", name, got[name], want)
		}
	}
}

func TestGoalsAreMeasured(t *testing.T) {
	// Every test and metric that a goal or a row names is in a table, or the name is
	// wrong and the goal is never measured.
	known := map[string]bool{}
	for _, tab := range tables {
		for _, c := range tab.columns {
			known[tab.test+"/"+c.metric] = true
		}
	}
	r := &results{}
	for key := range known {
		test, metric, _ := strings.Cut(key, "/")
		for _, who := range []string{ours, oursPortable, reference, "haproxy-splice", "envoy", direct, oursFew} {
			r.add(sample{Test: test, Contender: who, Metrics: map[string]float64{metric: 1}})
		}
	}
	for _, v := range judge(r) {
		if !v.ok {
			t.Errorf("%s: not measured by any table", v.name)
		}
	}
	for metric := range better {
		if !slices.ContainsFunc(tables, func(t table) bool {
			return slices.ContainsFunc(t.columns, func(c column) bool { return c.metric == metric })
		}) {
			t.Errorf("no table has %s", metric)
		}
	}
}

// TestWorst wants every row to be looked at, whichever way it is better.
func TestWorst(t *testing.T) {
	r := measured("conn", "cpu", map[string][]float64{ours: {1}, "envoy": {2}})
	add := func(test, metric string, a, b float64) {
		r.samples = append(r.samples, measured(test, metric, map[string][]float64{ours: {a}, "envoy": {b}}).samples...)
	}
	want := func(v float64, name string) {
		t.Helper()
		if got, note, ok := worstAgainst("envoy")(r); !ok || got != v || note != name {
			t.Errorf("the worst row is %v (%s), want %v (%s)", got, note, v, name)
		}
	}
	want(.5, "Short connections: CPU µs/conn")
	add("down", "rate", 4, 3)
	want(.75, "Bulk from server to client: GB/s")
	add("connpin", "p99", 9, 10)
	want(.9, "Short connections, the forwarder on one core: p99 µs")
	add("idle", "files", 2, 2)
	want(.9, "Short connections, the forwarder on one core: p99 µs")
}

func TestRender(t *testing.T) {
	r := measured("down", "cpu", map[string][]float64{ours: {.05}})
	r.samples = append(r.samples, measured("down", "cpu", map[string][]float64{reference: {.5}}).samples...)
	text := render(info{Model: "Abacus", CPUs: 2}, r, nil)
	for _, want := range []string{"Abacus, 2 cores", "| sluice | **0.0500** (0.0500–0.0500) | – | – | 0.10 | 0 |", "| bulk CPU against HAProxy | ≤ 0.2x |  | 0.10x | pass |"} {
		if !strings.Contains(text, want) {
			t.Errorf("the report lacks %q:\n%s", want, text)
		}
	}
	// Every row of a table has as many cells as its head.
	cells := 0
	for line := range strings.Lines(text) {
		n := strings.Count(line, "|")
		if cells > 0 && n > 0 && n != cells {
			t.Errorf("%d cells of %d: %s", n, cells, line)
		}
		cells = n
	}
}

func TestParseGoBench(t *testing.T) {
	got := parseGoBench([]byte(`goos: linux
pkg: github.com/sluicemesh/sluice/gateway/sni
BenchmarkHello-2   	  100	      1234 ns/op	       0 B/op
--- BENCH: BenchmarkHello-2
ok  	github.com/sluicemesh/sluice/gateway/sni	1.2s
`))
	want := []goResult{{"github.com/sluicemesh/sluice/gateway/sni", "Hello-2", []string{"1234 ns/op", "0 B/op"}}}
	if diff := cmp.Diff(want, got, cmp.AllowUnexported(goResult{})); diff != "" {
		t.Error(diff)
	}
	if table := goTable(got); !strings.Contains(table, "| gateway/sni | Hello-2 | 1234 ns/op, 0 B/op |") {
		t.Error(table)
	}
}
