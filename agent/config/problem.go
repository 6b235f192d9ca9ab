package config

import (
	"errors"
	"fmt"
	"slices"
	"strings"
)

// Problem is one thing that is wrong with a configuration.
type Problem struct {
	// Pos is where the offending value was written; zero when it was written
	// nowhere, as a required key that is missing.
	Pos Pos
	// Path is the key, from the top of the source: ports.http.
	Path string
	// Value is the offending value as it was written; never a secret.
	Value string
	// Text says what was expected or which rule is broken.
	Text string
	// Hint says what may have been meant.
	Hint string
}

// Error returns the problem in one line.
func (p Problem) Error() string {
	var b strings.Builder
	if p.Pos != (Pos{}) {
		b.WriteString(p.Pos.String() + ": ")
	}
	if p.Path != "" {
		b.WriteString(p.Path)
		if p.Value != "" {
			b.WriteString(" = " + p.Value)
		}
		b.WriteString(": ")
	}
	b.WriteString(p.Text)
	if p.Hint != "" {
		b.WriteString(" (" + p.Hint + ")")
	}
	return b.String()
}

// Problems is the error of [Load] and its kin: everything that is wrong, in the
// order of the sources.
type Problems []Problem

// Error lists the problems, one to a line.
func (p Problems) Error() string {
	if len(p) == 1 {
		return p[0].Error()
	}
	var b strings.Builder
	fmt.Fprintf(&b, "%d problems:", len(p))
	for _, x := range p {
		b.WriteString("\n  " + strings.ReplaceAll(x.Error(), "\n", "\n    "))
	}
	return b.String()
}

// Unwrap lets [errors.As] find each [Problem].
func (p Problems) Unwrap() []error {
	errs := make([]error, len(p))
	for i, x := range p {
		errs[i] = x
	}
	return errs
}

func (p Problems) err() error {
	if len(p) == 0 {
		return nil
	}
	return p
}

// add takes any error apart into problems.
func (p *Problems) add(at Pos, err error) {
	var se *syntaxError
	var multi interface{ WrappedErrors() []error }
	var joined interface{ Unwrap() []error }
	switch {
	case err == nil:
	case errors.As(err, &se):
		*p = append(*p, Problem{Pos: se.pos, Text: "syntax error: " + se.msg})
	case errors.As(err, &multi):
		p.addAll(at, err, fmt.Sprint(multi), multi.WrappedErrors())
	case errors.As(err, &joined):
		p.addAll(at, err, fmt.Sprint(joined), joined.Unwrap())
	default:
		*p = append(*p, Problem{Pos: at, Text: err.Error()})
	}
}

// addAll adds the parts of an error, each behind what the error has before them.
func (p *Problems) addAll(at Pos, err error, text string, parts []error) {
	prefix, ok := strings.CutSuffix(err.Error(), text)
	if !ok {
		*p = append(*p, Problem{Pos: at, Text: strings.TrimSpace(err.Error())})
		return
	}
	for _, e := range parts {
		var each Problems
		each.add(at, e)
		for _, x := range each {
			x.Text = prefix + x.Text
			*p = append(*p, x)
		}
	}
}

// sort brings problems into the order of the sources, whichever rule found them.
func (p Problems) sort(files []string) {
	rank := func(x Problem) int {
		i := slices.Index(files, x.Pos.File)
		if i < 0 {
			return len(files)
		}
		return i
	}
	slices.SortStableFunc(p, func(a, b Problem) int {
		if c := rank(a) - rank(b); c != 0 {
			return c
		}
		if c := a.Pos.Line - b.Pos.Line; c != 0 {
			return c
		}
		return a.Pos.Column - b.Pos.Column
	})
}

// Warning is something the operator should know that stops nothing.
type Warning struct {
	Pos  Pos
	Text string
}

// String returns the warning in one line.
func (w Warning) String() string {
	if w.Pos == (Pos{}) {
		return w.Text
	}
	return w.Pos.String() + ": " + w.Text
}

// nearest returns the name that s is most likely a slip of, or "".
func nearest(s string, names []string) string {
	best, dist := "", max(len(s)/3, 1)+1
	for _, n := range names {
		if d := distance(s, n); d < dist {
			best, dist = n, d
		}
	}
	return best
}

// distance is the number of edits between a and b, a swap of neighbours being
// one.
func distance(a, b string) int {
	var before []int
	prev := make([]int, len(b)+1)
	for j := range prev {
		prev[j] = j
	}
	for i := 1; i <= len(a); i++ {
		row := make([]int, len(b)+1)
		row[0] = i
		for j := 1; j <= len(b); j++ {
			cost := 1
			if a[i-1] == b[j-1] {
				cost = 0
			}
			row[j] = min(prev[j]+1, row[j-1]+1, prev[j-1]+cost)
			if i > 1 && j > 1 && a[i-1] == b[j-2] && a[i-2] == b[j-1] {
				row[j] = min(row[j], before[j-2]+1)
			}
		}
		before, prev = prev, row
	}
	return prev[len(b)]
}
