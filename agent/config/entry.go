package config

import (
	"bytes"
	"fmt"
	"os"
	"reflect"
	"regexp"
	"slices"
	"strings"

	"github.com/hashicorp/consul/api"

	"github.com/sluicemesh/sluice/agent/configentry"
)

// bootstrapEntry is a configuration entry and where it was written.
type bootstrapEntry struct {
	At    Pos
	Entry configentry.Entry
}

// decodeBootstrap reads one configuration entry, whose type its kind decides, and
// normalises and validates it.
func (d *decoder) decodeBootstrap(n *node, out *bootstrapEntry, path string) {
	maps, ok := n.maps()
	if !ok || len(maps) == 0 {
		d.wrong(n, path, false, "a configuration entry: a block with a kind")
		return
	}
	all := &node{pos: n.pos, kind: mapNode}
	var kind *node
	for _, m := range maps {
		for _, e := range m.entries {
			switch strings.ToLower(e.key) {
			case "kind":
				kind = e.value
			case "hash":
				// The server's, in an entry that was read and is written back.
			default:
				all.entries = append(all.entries, e)
			}
		}
	}
	before := len(d.problems)
	if kind == nil {
		d.problems = append(d.problems, Problem{Pos: n.pos, Path: path, Text: "Payload does not contain a kind/Kind key at the top level"})
		return
	}
	k, ok := kind.scalar.(string)
	if !ok {
		d.wrong(kind, join(path, "kind"), false, "a string")
		return
	}
	if !slices.Contains(configentry.Kinds(), k) {
		p := Problem{Pos: kind.pos, Path: join(path, "kind"), Text: "invalid config entry kind: " + k}
		if near := nearest(k, configentry.Kinds()); near != "" {
			p.Hint = fmt.Sprintf("did you mean %q?", near)
		} else {
			p.Hint = "kinds are " + strings.Join(configentry.Kinds(), ", ")
		}
		d.problems = append(d.problems, p)
		return
	}
	e, err := configentry.New(k, "")
	if err != nil {
		d.problems = append(d.problems, Problem{Pos: kind.pos, Path: path, Text: err.Error()})
		return
	}
	if k == configentry.Mesh {
		// There is one, and the type has no place for its name.
		all.entries = slices.DeleteFunc(all.entries, func(e entry) bool {
			return strings.EqualFold(e.key, "name") && e.value.scalar == api.MeshConfigMesh
		})
	}
	camel, outer := d.camel, d.outer
	d.camel, d.outer = true, nil
	d.decodeStruct(all, reflect.ValueOf(e).Elem(), path)
	d.camel, d.outer = camel, outer
	if len(d.problems) > before {
		return
	}
	*out = bootstrapEntry{n.pos, e}
}

// LoadEntries reads the configuration entries of a file: one in HCL and JSON,
// and in YAML one to a document. They are normalised and valid. The error is
// [Problems], or that of reading the file.
func LoadEntries(path string) ([]configentry.Entry, error) {
	src, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("read configuration entry: %w", err)
	}
	return ParseEntries(path, src)
}

// ParseEntries is [LoadEntries] on what was read already, as from standard
// input. A name without a known extension leaves the format to be guessed.
func ParseEntries(name string, src []byte) ([]configentry.Entry, error) {
	format := formatOf(name)
	if format == "" {
		format = guess(src)
	}
	var d decoder
	docs, err := parse(name, format, src)
	if err != nil {
		d.problems.add(Pos{}, err)
		return nil, d.problems
	}
	if len(docs) == 0 {
		return nil, Problems{{Pos: Pos{File: name}, Text: "no configuration entry in the file"}}
	}
	var entries []configentry.Entry
	for _, doc := range docs {
		var e bootstrapEntry
		d.decodeBootstrap(doc, &e, "")
		if e.Entry != nil {
			d.entry(e)
			entries = append(entries, e.Entry)
		}
	}
	if err := d.problems.err(); err != nil {
		return nil, err
	}
	return entries, nil
}

var yamlLine = regexp.MustCompile(`(?m)^(---|\s*[A-Za-z_][A-Za-z_0-9]*:(\s|$))`)

func guess(src []byte) string {
	switch src = bytes.TrimSpace(src); {
	case bytes.HasPrefix(src, []byte("{")):
		return formatJSON
	case yamlLine.Match(src):
		return formatYAML
	}
	return formatHCL
}

// entry normalises an entry and reports what is wrong with it.
func (d *decoder) entry(e bootstrapEntry) {
	configentry.Normalize(e.Entry)
	var found Problems
	found.add(e.At, configentry.Validate(e.Entry))
	for _, p := range found {
		p.Text = fmt.Sprintf("%s %q: %s", e.Entry.GetKind(), e.Entry.GetName(), p.Text)
		d.problems = append(d.problems, p)
	}
}
