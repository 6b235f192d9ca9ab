package main

import (
	"maps"
	"slices"
)

// sample is what one load measured of one contender.
type sample struct {
	Test, Contender string
	Round           int
	Failed          int
	Metrics         map[string]float64 // nil when the load itself failed
}

// results of a benchmark.
type results struct{ samples []sample }

func (r *results) add(s sample) { r.samples = append(r.samples, s) }

// next is the number of the next round of a test that has no rounds of its own.
func (r *results) next(test, contender string) int {
	n := 0
	for _, s := range r.samples {
		if s.Test == test && s.Contender == contender {
			n++
		}
	}
	return n
}

// rounds are the values of a metric by round.
func (r *results) rounds(test, contender, metric string) map[int]float64 {
	out := map[int]float64{}
	for _, s := range r.samples {
		if v, ok := s.Metrics[metric]; ok && s.Test == test && s.Contender == contender {
			out[s.Round] = v
		}
	}
	return out
}

// failed is how much of a test did not succeed.
func (r *results) failed(test, contender string) int {
	n := 0
	for _, s := range r.samples {
		if s.Test == test && s.Contender == contender {
			n += s.Failed
		}
	}
	return n
}

// middle is the median of a metric over the rounds.
func (r *results) middle(test, contender, metric string) (float64, bool) {
	return median(slices.Collect(maps.Values(r.rounds(test, contender, metric))))
}

// ratio is the median over the rounds of what one contender has against another.
func (r *results) ratio(test, contender, to, metric string) (float64, bool) {
	a, b := r.rounds(test, contender, metric), r.rounds(test, to, metric)
	var v []float64
	for round, x := range a {
		if y := b[round]; y > 0 {
			v = append(v, x/y)
		}
	}
	return median(v)
}

// added is the median over the rounds of what a contender adds to the way without
// any, against that way.
func (r *results) added(test, contender, metric string) (float64, bool) {
	v, ok := r.ratio(test, contender, direct, metric)
	return v - 1, ok
}

func (r *results) tests() map[string]bool {
	out := map[string]bool{}
	for _, s := range r.samples {
		out[s.Test] = true
	}
	return out
}

// contenders in the order of their first sample.
func (r *results) contenders(test string) []string {
	var out []string
	for _, s := range r.samples {
		if s.Test == test && !slices.Contains(out, s.Contender) {
			out = append(out, s.Contender)
		}
	}
	return out
}

// median of values in any order, which it sorts; false if there are none.
func median(v []float64) (float64, bool) {
	if len(v) == 0 {
		return 0, false
	}
	slices.Sort(v)
	if n := len(v); n%2 == 0 {
		return (v[n/2-1] + v[n/2]) / 2, true
	}
	return v[len(v)/2], true
}
