package config

import (
	"fmt"
	"math"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"

	"github.com/hashicorp/consul/api"

	"github.com/sluicemesh/sluice/acl"
)

// decoder reads trees into structs. One decoder reads all sources of a
// configuration, one after another, into the same struct, and so merges them.
//
// The keys of a struct are those of its "config" tags, the first one being the
// name that is shown and the others aliases. A field without the tag, as in the
// API's types, has its name in snake case and its "alias" tag. A "deprecated"
// tag names what to write instead. Keys are matched without regard to case.
type decoder struct {
	problems Problems
	warnings []Warning
	ignored  []ignoredKey
	// pos is where the value of a key came from, by its path: the last source that
	// set it.
	pos map[string]Pos
	// camel accepts the CamelCase spelling of a key too, as the API does: it is
	// set within configuration entries.
	camel bool
	// broken are the elements of lists that have problems of their own, by path.
	broken map[string]bool
	// failed are the keys whose value is of the wrong type, by path: no rule is
	// asked about them again.
	failed map[string]bool
	fields map[reflect.Type][]field
	// outer are the structs around the one that is read, for hints.
	outer []reflect.Type
}

type ignoredKey struct {
	path string
	pos  Pos
}

// ignored is the type of the field whose tag lists the keys of a block that are
// accepted for the sake of Consul's files and have no effect here.
type ignored struct{}

// unsupported is the type of a field whose key is refused, whatever its value,
// because leaving it out of account would be unsafe. Its "reason" tag says what
// to tell the user.
type unsupported struct{}

var (
	ignoredType     = reflect.TypeFor[ignored]()
	unsupportedType = reflect.TypeFor[unsupported]()
	posType         = reflect.TypeFor[Pos]()
	secretType      = reflect.TypeFor[acl.Secret]()
	durationType    = reflect.TypeFor[time.Duration]()
	timeType        = reflect.TypeFor[time.Time]()
	entryType       = reflect.TypeFor[bootstrapEntry]()
)

// apiKeys are the keys of fields of the API's types whose name in a file does
// not follow from their name in Go. "-" hides a field that only answers have.
var apiKeys = map[reflect.Type]map[string]string{
	reflect.TypeFor[api.AgentServiceCheck](): {
		"CheckID":                        "id,check_id,checkid",
		"Args":                           "args,script_args,scriptargs",
		"H2PING":                         "h2ping",
		"H2PINGUseTLS":                   "h2ping_use_tls",
		"DockerContainerID":              "docker_container_id,dockercontainerid",
		"TLSSkipVerify":                  "tls_skip_verify,tlsskipverify",
		"DeregisterCriticalServiceAfter": "deregister_critical_service_after,deregistercriticalserviceafter",
	},
	reflect.TypeFor[api.Upstream]():   {"CentrallyConfigured": "-"},
	reflect.TypeFor[api.ExposePath](): {"ParsedFromCheck": "-"},
}

type field struct {
	index      []int
	keys       []string // lower case; the first is canonical
	camel      []string // lower-case spelling without underscores, for d.camel
	deprecated string
	reason     string
	typ        reflect.Type
}

func (f field) hasKey(key string, camel bool) bool {
	key = strings.ToLower(key)
	return slices.Contains(f.keys, key) || camel && slices.Contains(f.camel, key)
}

// fieldsOf returns the fields of a struct type, those of embedded structs among
// them.
func (d *decoder) fieldsOf(t reflect.Type) []field {
	if f, ok := d.fields[t]; ok {
		return f
	}
	var all []field
	for i := range t.NumField() {
		sf := t.Field(i)
		if sf.Anonymous {
			for _, f := range d.fieldsOf(sf.Type) {
				f.index = append([]int{i}, f.index...)
				all = append(all, f)
			}
			continue
		}
		tag := sf.Tag.Get("config")
		if o, ok := apiKeys[t][sf.Name]; ok {
			tag = o
		}
		if tag == "-" || sf.Tag.Get("json") == "-" || !sf.IsExported() {
			continue
		}
		f := field{
			index: []int{i}, typ: sf.Type,
			deprecated: sf.Tag.Get("deprecated"), reason: sf.Tag.Get("reason"),
		}
		if tag != "" {
			f.keys = strings.Split(tag, ",")
		} else {
			f.keys = []string{snake(sf.Name)}
			if a := sf.Tag.Get("alias"); a != "" && a != f.keys[0] {
				f.keys = append([]string{a}, f.keys...)
			}
			f.camel = []string{strings.ToLower(sf.Name)}
			if name, _, _ := strings.Cut(sf.Tag.Get("json"), ","); name != "" {
				f.camel = append(f.camel, strings.ToLower(name))
			}
		}
		all = append(all, f)
	}
	if d.fields == nil {
		d.fields = map[reflect.Type][]field{}
	}
	d.fields[t] = all
	return all
}

// snake returns the name of a Go field in snake case: TLSSkipVerify becomes
// tls_skip_verify.
func snake(s string) string {
	var b strings.Builder
	r := []rune(s)
	for i, c := range r {
		if unicode.IsUpper(c) && i > 0 &&
			(!unicode.IsUpper(r[i-1]) || i+1 < len(r) && unicode.IsLower(r[i+1])) {
			b.WriteByte('_')
		}
		b.WriteRune(unicode.ToLower(c))
	}
	return b.String()
}

func (d *decoder) wrong(n *node, path string, secret bool, expected string) {
	p := Problem{Pos: n.pos, Path: path, Value: n.describe(), Text: "expected " + expected}
	if secret {
		p.Value = ""
	}
	d.problems = append(d.problems, p)
	if d.failed == nil {
		d.failed = map[string]bool{}
	}
	d.failed[path] = true
}

func join(path, key string) string {
	if path == "" {
		return key
	}
	return path + "." + key
}

// decode reads n into v, which is addressable. A null leaves v as it was.
func (d *decoder) decode(n *node, v reflect.Value, path string) {
	if n.isNull() {
		return
	}
	t := v.Type()
	if d.pos == nil {
		d.pos = map[string]Pos{}
	}
	d.pos[path] = n.pos
	switch {
	case t == entryType:
		d.decodeBootstrap(n, v.Addr().Interface().(*bootstrapEntry), path)
		return
	case t == durationType:
		d.decodeDuration(n, v, path)
		return
	case t == timeType:
		s, ok := n.scalar.(string)
		at, err := time.Parse(time.RFC3339, s)
		if !ok || err != nil {
			d.wrong(n, path, false, `a time such as "2006-01-02T15:04:05Z"`)
			return
		}
		v.Set(reflect.ValueOf(at))
		return
	}
	switch t.Kind() {
	case reflect.Pointer:
		if v.IsNil() {
			v.Set(reflect.New(t.Elem()))
		}
		d.decode(n, v.Elem(), path)
	case reflect.Struct:
		d.decodeStruct(n, v, path)
	case reflect.Map:
		d.decodeMap(n, v, path)
	case reflect.Slice:
		d.decodeSlice(n, v, path)
	case reflect.Interface:
		v.Set(reflect.ValueOf(n.value()))
	default:
		d.decodeScalar(n, v, path)
	}
}

func (d *decoder) decodeDuration(n *node, v reflect.Value, path string) {
	switch s := n.scalar.(type) {
	case string:
		x, err := time.ParseDuration(s)
		if err == nil {
			v.SetInt(int64(x))
			return
		}
	case int64:
		// Only the API counts in nanoseconds.
		if d.camel {
			v.SetInt(s)
			return
		}
	}
	d.wrong(n, path, false, `a duration such as "30s" or "1h30m"`)
}

func (d *decoder) decodeScalar(n *node, v reflect.Value, path string) {
	switch v.Kind() {
	case reflect.String:
		s, ok := n.scalar.(string)
		if n.kind != scalarNode || !ok {
			d.wrong(n, path, v.Type() == secretType, "a string")
			if n.kind == scalarNode && v.Type() != secretType {
				d.problems[len(d.problems)-1].Hint = "write it in quotes"
			}
			return
		}
		v.SetString(s)
	case reflect.Bool:
		b, ok := n.scalar.(bool)
		if n.kind != scalarNode || !ok {
			d.wrong(n, path, false, "true or false")
			return
		}
		v.SetBool(b)
	case reflect.Int, reflect.Int8, reflect.Int16, reflect.Int32, reflect.Int64:
		i, ok := integer(n)
		if !ok || v.OverflowInt(i) {
			d.wrong(n, path, false, "a whole number")
			return
		}
		v.SetInt(i)
	case reflect.Uint, reflect.Uint8, reflect.Uint16, reflect.Uint32, reflect.Uint64:
		i, ok := integer(n)
		if !ok || i < 0 || v.OverflowUint(uint64(i)) {
			d.wrong(n, path, false, "a whole number that is not negative")
			return
		}
		v.SetUint(uint64(i))
	case reflect.Float32, reflect.Float64:
		switch x := n.scalar.(type) {
		case int64:
			v.SetFloat(float64(x))
		case float64:
			v.SetFloat(x)
		default:
			d.wrong(n, path, false, "a number")
		}
	default:
		panic("config: no way to decode a " + v.Type().String())
	}
}

func integer(n *node) (int64, bool) {
	switch x := n.scalar.(type) {
	case int64:
		return x, n.kind == scalarNode
	case float64:
		return int64(x), n.kind == scalarNode && x == math.Trunc(x) && math.Abs(x) < 1<<53
	}
	return 0, false
}

func (d *decoder) decodeMap(n *node, v reflect.Value, path string) {
	maps, ok := n.maps()
	if !ok {
		d.wrong(n, path, false, "a block of keys and values")
		return
	}
	if v.IsNil() {
		v.Set(reflect.MakeMap(v.Type()))
	}
	opaque := v.Type().Elem().Kind() == reflect.Interface
	for _, m := range maps {
		if opaque {
			for k, x := range m.value().(map[string]any) {
				e := reflect.New(v.Type().Elem()).Elem()
				if x != nil {
					e.Set(reflect.ValueOf(x))
				}
				v.SetMapIndex(reflect.ValueOf(k), e)
			}
			for _, e := range m.entries {
				d.pos[join(path, e.key)] = e.value.pos
			}
			continue
		}
		for _, e := range m.entries {
			key := reflect.ValueOf(e.key).Convert(v.Type().Key())
			x := reflect.New(v.Type().Elem()).Elem()
			// A block that an earlier source gave is added to, not replaced.
			if old := v.MapIndex(key); old.IsValid() && x.Kind() == reflect.Struct {
				x.Set(old)
			}
			d.decode(e.value, x, join(path, e.key))
			v.SetMapIndex(key, x)
		}
	}
}

func (d *decoder) decodeSlice(n *node, v reflect.Value, path string) {
	elems := []*node{n}
	if n.kind == listNode {
		elems = n.list
	} else if k := indirect(v.Type().Elem()).Kind(); n.kind != mapNode || k != reflect.Struct && k != reflect.Map {
		d.wrong(n, path, v.Type().Elem() == secretType, "a list")
		if n.kind == scalarNode {
			d.problems[len(d.problems)-1].Hint = "write it in brackets"
		}
		return
	}
	for _, e := range elems {
		x := reflect.New(v.Type().Elem()).Elem()
		p, before := fmt.Sprintf("%s[%d]", path, v.Len()), len(d.problems)
		d.decode(e, x, p)
		if len(d.problems) > before {
			d.breaks(p)
		}
		if !e.isNull() {
			v.Set(reflect.Append(v, x))
		}
	}
}

// breaks marks the element of a list at path, or around it, as not decoded well.
func (d *decoder) breaks(path string) {
	if d.broken == nil {
		d.broken = map[string]bool{}
	}
	element, _, _ := strings.Cut(path, ".")
	d.broken[path], d.broken[element] = true, true
}

func indirect(t reflect.Type) reflect.Type {
	if t.Kind() == reflect.Pointer {
		return t.Elem()
	}
	return t
}

func (d *decoder) decodeStruct(n *node, v reflect.Value, path string) {
	maps, ok := n.maps()
	if !ok {
		d.wrong(n, path, false, "a block")
		return
	}
	t := v.Type()
	if at, ok := t.FieldByName("At"); ok && at.Type == posType {
		v.FieldByIndex(at.Index).Set(reflect.ValueOf(n.pos))
	}
	d.outer = append(d.outer, t)
	defer func() { d.outer = d.outer[:len(d.outer)-1] }()
	fields := d.fieldsOf(t)
	seen := map[string]Pos{}
	for _, m := range maps {
		for _, e := range m.entries {
			i := slices.IndexFunc(fields, func(f field) bool { return f.hasKey(e.key, d.camel) })
			if i < 0 {
				d.unknown(e, fields, path)
				continue
			}
			f := fields[i]
			p := join(path, f.keys[0])
			switch f.typ {
			case ignoredType:
				if !e.value.isNull() {
					d.ignored = append(d.ignored, ignoredKey{join(path, strings.ToLower(e.key)), e.pos})
				}
				continue
			case unsupportedType:
				if !e.value.isNull() {
					d.problems = append(d.problems, Problem{Pos: e.pos, Path: join(path, strings.ToLower(e.key)), Text: f.reason})
				}
				continue
			}
			if f.deprecated != "" && !e.value.isNull() {
				d.warnings = append(d.warnings, Warning{e.pos, fmt.Sprintf("%q is deprecated: use %q", join(path, strings.ToLower(e.key)), f.deprecated)})
			}
			if e.value.kind == scalarNode {
				if first, again := seen[p]; again {
					d.warnings = append(d.warnings, Warning{e.pos, fmt.Sprintf("%q is given a second time; the value at %s has no effect", p, first)})
				}
				seen[p] = e.pos
			}
			d.decode(e.value, v.FieldByIndex(f.index), p)
		}
	}
}

// unknown reports a key that the block does not have, and what may have been
// meant: another spelling, a slip of the pen, or a block further out.
func (d *decoder) unknown(e entry, fields []field, path string) {
	p := Problem{Pos: e.pos, Text: "invalid config key " + join(path, e.key)}
	defer func() { d.problems = append(d.problems, p) }()
	var names []string
	for _, f := range fields {
		names = append(names, f.keys[0])
		flat := strings.ReplaceAll(f.keys[0], "_", "")
		if strings.EqualFold(flat, strings.ReplaceAll(e.key, "_", "")) || f.hasKey(e.key, true) {
			p.Hint = fmt.Sprintf("write %q", f.keys[0])
			return
		}
	}
	var inner []string
	for _, f := range fields {
		t := indirect(f.typ)
		if t.Kind() == reflect.Slice {
			t = indirect(t.Elem())
		}
		if t.Kind() == reflect.Struct && t != entryType && slices.ContainsFunc(d.fieldsOf(t), func(f field) bool { return f.hasKey(e.key, d.camel) }) {
			inner = append(inner, f.keys[0])
		}
	}
	if len(inner) == 1 {
		p.Hint = fmt.Sprintf("it belongs to the block %q within", inner[0])
		return
	}
	for i := len(d.outer) - 2; i >= 0; i-- {
		for _, f := range d.fieldsOf(d.outer[i]) {
			if f.hasKey(e.key, d.camel) && (i > 0 || len(path) > 0) {
				p.Hint = "it belongs to the block around, " + enclosing(path, len(d.outer)-1-i)
				return
			}
		}
	}
	if n := nearest(strings.ToLower(e.key), names); n != "" {
		p.Hint = fmt.Sprintf("did you mean %q?", n)
	}
}

// enclosing names the block n levels around the one at path.
func enclosing(path string, n int) string {
	parts := strings.Split(path, ".")
	if n >= len(parts) {
		return "the top level"
	}
	return strconv.Quote(strings.Join(parts[:len(parts)-n], "."))
}

// at returns where the value of the key at path was written; of a path that was
// not, that of the nearest block around it.
func (d *decoder) at(path string) Pos {
	for {
		if p, ok := d.pos[path]; ok {
			return p
		}
		i := strings.LastIndexByte(path, '.')
		if i < 0 {
			return Pos{}
		}
		path = path[:i]
	}
}
