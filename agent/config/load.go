package config

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"sort"
	"strings"
)

// devOverlay is what -dev starts from, before any other source.
const devOverlay = `
server       = true
bind_addr    = "127.0.0.1"
log_level    = "DEBUG"
enable_debug = true
ui_config    { enabled = true }
ports        { grpc = 8502 }
performance  { raft_multiplier = 1 }
`

// Load reads all sources, merges them in this order (later ones win: the
// settings of -dev, flags with lists, files, other flags, HCL fragments), fills
// in what is left and checks the whole. Either the runtime configuration or the
// error is nil; the error is [Problems]. Warnings are returned with both.
func Load(o Options) (*Runtime, []Warning, error) {
	if o.Machine == nil {
		o.Machine = realMachine{}
	}
	l := newLoader(o.Machine)
	if o.Dev {
		l.source("-dev", formatHCL, []byte(devOverlay))
	}
	l.tree(o.tree(true))
	for _, path := range o.Paths {
		for _, f := range l.expand(path, o.Format) {
			src, err := os.ReadFile(f.path)
			if err != nil {
				l.problems = append(l.problems, Problem{Text: fmt.Sprintf("config: ReadFile failed on %s. %v", f.path, cause(err))})
				continue
			}
			l.source(f.path, f.format, src)
		}
	}
	l.tree(o.tree(false))
	for i, h := range o.HCL {
		name := "-hcl"
		if len(o.HCL) > 1 {
			name = fmt.Sprintf("-hcl[%d]", i)
		}
		l.source(name, formatHCL, []byte(h))
	}
	return l.finish(o.Dev)
}

// loader collects the sources of one configuration.
type loader struct {
	decoder
	machine  Machine
	settings settings
	files    []string // in the order in which they were read
	unread   bool     // one of them has a syntax error
}

func newLoader(m Machine) *loader { return &loader{machine: m} }

// source reads one file or fragment into the settings.
func (l *loader) source(file, format string, src []byte) {
	l.files = append(l.files, file)
	docs, err := parse(file, format, src)
	l.problems.add(Pos{}, err)
	l.unread = l.unread || err != nil
	for _, doc := range docs {
		l.tree(doc)
	}
}

func (l *loader) tree(n *node) {
	l.decode(n, reflect.ValueOf(&l.settings).Elem(), "")
}

// finish makes the runtime configuration of what was read.
func (l *loader) finish(dev bool) (*Runtime, []Warning, error) {
	before := len(l.problems)
	b := builder{decoder: &l.decoder, s: &l.settings, machine: l.machine, dev: dev}
	rt := b.build()
	if l.unread {
		// What is missing may be in what could not be read.
		l.problems = append(l.problems[:before], slices.DeleteFunc(l.problems[before:], func(p Problem) bool {
			return p.Pos == Pos{}
		})...)
	}
	l.warnIgnored()
	l.problems.sort(l.files)
	if err := l.problems.err(); err != nil {
		return nil, l.warnings, err
	}
	return rt, l.warnings, nil
}

// Validate checks the configuration that the files and directories make up, as
// sluice validate does. The error is [Problems].
func Validate(paths []string) error {
	_, _, err := Load(Options{Paths: paths})
	return err
}

type sourceFile struct{ path, format string }

// expand returns the files that path stands for: itself, or those in the
// directory.
func (d *decoder) expand(path, format string) []sourceFile {
	fi, err := os.Stat(path)
	if err != nil {
		d.problems = append(d.problems, Problem{Text: fmt.Sprintf("config: Open failed on %s. %v", path, cause(err))})
		return nil
	}
	if !fi.IsDir() {
		f := format
		if f == "" {
			f = formatOf(path)
		}
		if f == "" {
			d.problems = append(d.problems, Problem{Text: fmt.Sprintf("file %s has unknown extension; must be .hcl, .json, .yaml or .yml, or config format must be set", path)})
			return nil
		}
		return []sourceFile{{path, f}}
	}
	entries, err := os.ReadDir(path)
	if err != nil {
		d.problems = append(d.problems, Problem{Text: fmt.Sprintf("config: Readdir failed on %s. %v", path, cause(err))})
		return nil
	}
	sort.Slice(entries, func(i, j int) bool { return entries[i].Name() < entries[j].Name() })
	var out []sourceFile
	for _, e := range entries {
		file := filepath.Join(path, e.Name())
		// A link is what it leads to: Kubernetes mounts files so.
		fi, err := os.Stat(file)
		if err != nil {
			d.problems = append(d.problems, Problem{Text: fmt.Sprintf("config: Stat failed on %s. %v", file, cause(err))})
			continue
		}
		if fi.IsDir() {
			continue
		}
		f := format
		if f == "" {
			f = formatOf(file)
		}
		if f == "" {
			d.warnings = append(d.warnings, Warning{Text: fmt.Sprintf("skipping file %s, extension must be .hcl, .json, .yaml or .yml, or config format must be set", file)})
			continue
		}
		out = append(out, sourceFile{file, f})
	}
	return out
}

// cause is the reason without the operation and the path, which the text has.
func cause(err error) error {
	var pe *os.PathError
	if errors.As(err, &pe) {
		return pe.Err
	}
	return err
}

// warnIgnored names all keys without effect in one warning, which comes first.
func (d *decoder) warnIgnored() {
	if len(d.ignored) == 0 {
		return
	}
	var b strings.Builder
	b.WriteString("these keys have no effect in this agent: ")
	for i, k := range d.ignored {
		if i > 0 {
			b.WriteString(", ")
		}
		fmt.Fprintf(&b, "%s (%s)", k.path, k.pos)
	}
	d.warnings = append([]Warning{{Text: b.String()}}, d.warnings...)
	d.ignored = nil
}
