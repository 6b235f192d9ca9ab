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
	var (
		d      decoder
		s      settings
		unread bool // a source has a syntax error
		files  = []string{"-dev"}
		root   = reflect.ValueOf(&s).Elem()
	)
	source := func(file, format string, src []byte) {
		files = append(files, file)
		docs, err := parse(file, format, src)
		d.problems.add(Pos{}, err)
		unread = unread || err != nil
		for _, doc := range docs {
			d.decode(doc, root, "")
		}
	}
	if o.Dev {
		source("-dev", formatHCL, []byte(devOverlay))
	}
	d.decode(o.tree(true), root, "")
	for _, path := range o.Paths {
		for _, f := range d.expand(path, o.Format) {
			src, err := os.ReadFile(f.path)
			if err != nil {
				d.problems = append(d.problems, Problem{Text: fmt.Sprintf("config: ReadFile failed on %s. %v", f.path, cause(err))})
				continue
			}
			source(f.path, f.format, src)
		}
	}
	d.decode(o.tree(false), root, "")
	for i, h := range o.HCL {
		name := "-hcl"
		if len(o.HCL) > 1 {
			name = fmt.Sprintf("-hcl[%d]", i)
		}
		source(name, formatHCL, []byte(h))
	}
	b := builder{decoder: &d, s: &s, machine: o.Machine, dev: o.Dev}
	before := len(d.problems)
	rt := b.build()
	if unread {
		// What is missing may be in what could not be read.
		d.problems = append(d.problems[:before], slices.DeleteFunc(d.problems[before:], func(p Problem) bool {
			return p.Pos == Pos{}
		})...)
	}
	d.warnIgnored()
	d.problems.sort(files)
	if err := d.problems.err(); err != nil {
		return nil, d.warnings, err
	}
	return rt, d.warnings, nil
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
