package configentry

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/hashicorp/consul/api"
	"github.com/hashicorp/go-multierror"

	"github.com/sluicemesh/sluice/agent/catalog"
)

// maxDepth bounds how deep an entry may nest; none has a reason to come near.
const maxDepth = 64

// Kinds returns all kinds, in the order of the documentation.
func Kinds() []string {
	return []string{
		ProxyDefaults, ServiceDefaults, ServiceResolver, ServiceRouter, ServiceSplitter, ServiceIntentions, Mesh, ExportedServices,
	}
}

// New returns an empty entry.
func New(kind, name string) (Entry, error) {
	if !slices.Contains(Kinds(), kind) {
		return nil, fmt.Errorf("invalid config entry kind: %s", kind)
	}
	return api.MakeConfigEntry(kind, name)
}

// DecodeJSON decodes an entry from a JSON object; see [Decode].
func DecodeJSON(b []byte) (Entry, error) {
	dec := json.NewDecoder(bytes.NewReader(b))
	// Indexes and nanoseconds do not fit a float.
	dec.UseNumber()
	var raw map[string]any
	if err := dec.Decode(&raw); err != nil {
		return nil, err
	}
	if dec.More() {
		return nil, errors.New("more than one JSON value")
	}
	return Decode(raw)
}

// Decode makes an entry of what JSON, HCL or YAML was read to. Keys may be
// CamelCase or snake_case in any letter case, scalars may be strings, durations
// text or nanoseconds, and a list of one may stand for an object. An unknown key
// at any depth is an error, and all errors are returned, as a
// [multierror.Error]. The entry is not normalised.
func Decode(raw map[string]any) (Entry, error) {
	var kind any
	for _, k := range slices.Sorted(maps.Keys(raw)) {
		if strings.EqualFold(k, "kind") {
			kind = raw[k]
		}
	}
	if kind == nil {
		return nil, errors.New("Payload does not contain a kind/Kind key at the top level")
	}
	name, ok := kind.(string)
	if !ok {
		return nil, errors.New("Kind value in payload is not a string")
	}
	e, err := New(name, "")
	if err != nil {
		return nil, err
	}
	d := &decoder{}
	target := reflect.ValueOf(e).Elem()
	rest := make(map[string]any, len(raw))
	for k, v := range raw {
		// What the server adds is tolerated, for an entry that was read is often
		// written back; and the mesh entry has no field for its one name.
		switch f := keyForm(k); {
		case f == "hash", f == "kind":
		case f == "name" && name == Mesh && (v == nil || v == "" || v == api.MeshConfigMesh):
		default:
			rest[k] = v
		}
	}
	d.object("", rest, target, 0)
	if err := d.errs.ErrorOrNil(); err != nil {
		return nil, err
	}
	return e, nil
}

type decoder struct{ errs *multierror.Error }

func (d *decoder) fail(format string, args ...any) {
	d.errs = multierror.Append(d.errs, fmt.Errorf(format, args...))
}

// keyForm is what two spellings of a key have in common.
func keyForm(k string) string { return strings.ToLower(strings.ReplaceAll(k, "_", "")) }

func join(path, field string) string {
	if path == "" {
		return field
	}
	return path + "." + field
}

func (d *decoder) object(path string, raw map[string]any, v reflect.Value, depth int) {
	fields := map[string]int{}
	for i := range v.NumField() {
		f := v.Type().Field(i)
		fields[keyForm(f.Name)] = i
		if alias := f.Tag.Get("alias"); alias != "" {
			fields[keyForm(alias)] = i
		}
	}
	for _, k := range slices.Sorted(maps.Keys(raw)) {
		i, ok := fields[keyForm(k)]
		if !ok {
			d.fail("invalid config key %q", join(path, k))
			continue
		}
		d.value(join(path, v.Type().Field(i).Name), raw[k], v.Field(i), depth+1)
	}
}

var (
	durationType = reflect.TypeFor[time.Duration]()
	timeType     = reflect.TypeFor[time.Time]()
)

func (d *decoder) value(path string, raw any, v reflect.Value, depth int) {
	if raw == nil {
		return
	}
	if depth > maxDepth {
		d.fail("%s: nested too deeply", path)
		return
	}
	switch v.Type() {
	case durationType:
		if dur, ok := toDuration(raw); ok {
			v.SetInt(int64(dur))
		} else {
			d.fail("%s: %s is not a duration", path, show(raw))
		}
		return
	case timeType:
		if s, ok := raw.(string); ok {
			t, err := time.Parse(time.RFC3339, s)
			if err == nil {
				v.Set(reflect.ValueOf(t))
				return
			}
		}
		d.fail("%s: %s is not a time", path, show(raw))
		return
	}
	switch v.Kind() {
	case reflect.Pointer:
		p := reflect.New(v.Type().Elem())
		d.value(path, raw, p.Elem(), depth+1)
		v.Set(p)
	case reflect.Struct:
		if m, ok := d.toMap(path, raw); ok {
			d.object(path, m, v, depth)
		}
	case reflect.Map:
		m, ok := d.toMap(path, raw)
		if !ok {
			return
		}
		elem := v.Type().Elem()
		if elem.Kind() == reflect.Interface {
			v.Set(reflect.ValueOf(catalog.CanonicalConfig(m)))
			return
		}
		out := reflect.MakeMapWithSize(v.Type(), len(m))
		for _, k := range slices.Sorted(maps.Keys(m)) {
			x := reflect.New(elem).Elem()
			d.value(fmt.Sprintf("%s[%s]", path, k), m[k], x, depth+1)
			out.SetMapIndex(reflect.ValueOf(k).Convert(v.Type().Key()), x)
		}
		v.Set(out)
	case reflect.Slice:
		rv := reflect.ValueOf(raw)
		if rv.Kind() != reflect.Slice {
			rv = reflect.ValueOf([]any{raw}) // one value for a list of it
		}
		out := reflect.MakeSlice(v.Type(), 0, rv.Len())
		for i := range rv.Len() {
			x := reflect.New(v.Type().Elem()).Elem()
			d.value(fmt.Sprintf("%s[%d]", path, i), rv.Index(i).Interface(), x, depth+1)
			// A null element is nothing, not a nil pointer in the list.
			if x.Kind() != reflect.Pointer || !x.IsNil() {
				out = reflect.Append(out, x)
			}
		}
		v.Set(out)
	default:
		d.scalar(path, raw, v, depth)
	}
}

func (d *decoder) scalar(path string, raw any, v reflect.Value, depth int) {
	if rv := reflect.ValueOf(raw); rv.Kind() == reflect.Slice && rv.Len() == 1 {
		d.value(path, rv.Index(0).Interface(), v, depth+1)
		return
	}
	text, ok := toText(raw)
	if !ok {
		d.fail("%s: expected a %s, got %s", path, v.Kind(), show(raw))
		return
	}
	switch v.Kind() {
	case reflect.String:
		v.SetString(text)
		return
	case reflect.Bool:
		if text == "" {
			v.SetBool(false)
			return
		}
		if b, err := strconv.ParseBool(text); err == nil {
			v.SetBool(b)
			return
		}
		if f, err := strconv.ParseFloat(text, 64); err == nil {
			v.SetBool(f != 0)
			return
		}
	case reflect.Int, reflect.Int8, reflect.Int16, reflect.Int32, reflect.Int64:
		if i, ok := toInt(text); ok && !v.OverflowInt(i) {
			v.SetInt(i)
			return
		}
	case reflect.Uint, reflect.Uint8, reflect.Uint16, reflect.Uint32, reflect.Uint64:
		if u, err := strconv.ParseUint(text, 10, 64); err == nil && !v.OverflowUint(u) {
			v.SetUint(u)
			return
		}
		if i, ok := toInt(text); ok && i >= 0 && !v.OverflowUint(uint64(i)) {
			v.SetUint(uint64(i))
			return
		}
	case reflect.Float32, reflect.Float64:
		if text == "" {
			text = "0"
		}
		if f, err := strconv.ParseFloat(text, 64); err == nil && !math.IsNaN(f) && !math.IsInf(f, 0) && !v.OverflowFloat(f) {
			v.SetFloat(f)
			return
		}
	}
	d.fail("%s: %s is not a valid %s", path, show(raw), v.Kind())
}

// toMap takes an object, or a list of one object, which is how HCL reads a
// block; an empty list is an empty object.
func (d *decoder) toMap(path string, raw any) (map[string]any, bool) {
	switch m := raw.(type) {
	case map[string]any:
		return m, true
	case map[any]any:
		out := make(map[string]any, len(m))
		for k, v := range m {
			out[fmt.Sprint(k)] = v
		}
		return out, true
	}
	rv := reflect.ValueOf(raw)
	switch {
	case rv.Kind() == reflect.Slice && rv.Len() == 0:
		return map[string]any{}, true
	case rv.Kind() == reflect.Slice && rv.Len() == 1:
		if el := rv.Index(0).Interface(); reflect.ValueOf(el).Kind() == reflect.Map {
			return d.toMap(path, el)
		}
	case rv.Kind() == reflect.Map && rv.Type().Key().Kind() == reflect.String:
		out := make(map[string]any, rv.Len())
		for it := rv.MapRange(); it.Next(); {
			out[it.Key().String()] = it.Value().Interface()
		}
		return out, true
	}
	d.fail("%s: expected an object, got %s", path, show(raw))
	return nil, false
}

func toText(raw any) (string, bool) {
	switch x := raw.(type) {
	case string:
		return x, true
	case json.Number:
		return x.String(), true
	case time.Duration:
		return strconv.FormatInt(int64(x), 10), true
	}
	rv := reflect.ValueOf(raw)
	switch rv.Kind() {
	case reflect.String:
		return rv.String(), true
	case reflect.Bool:
		if rv.Bool() {
			return "1", true
		}
		return "0", true
	case reflect.Int, reflect.Int8, reflect.Int16, reflect.Int32, reflect.Int64:
		return strconv.FormatInt(rv.Int(), 10), true
	case reflect.Uint, reflect.Uint8, reflect.Uint16, reflect.Uint32, reflect.Uint64:
		return strconv.FormatUint(rv.Uint(), 10), true
	case reflect.Float32, reflect.Float64:
		return strconv.FormatFloat(rv.Float(), 'f', -1, 64), true
	}
	return "", false
}

// toInt takes whole numbers, of which a float may be one.
func toInt(s string) (int64, bool) {
	if s == "" {
		return 0, true
	}
	if i, err := strconv.ParseInt(s, 0, 64); err == nil {
		return i, true
	}
	f, err := strconv.ParseFloat(s, 64)
	if err != nil || f != math.Trunc(f) || math.Abs(f) >= 1<<62 {
		return 0, false
	}
	return int64(f), true
}

func toDuration(raw any) (time.Duration, bool) {
	if s, ok := raw.(string); ok {
		if s == "" {
			return 0, true
		}
		if d, err := time.ParseDuration(s); err == nil {
			return d, true
		}
	}
	text, ok := toText(raw)
	if _, isBool := raw.(bool); !ok || isBool {
		return 0, false
	}
	i, ok := toInt(text)
	return time.Duration(i), ok
}

func show(raw any) string {
	if s, ok := raw.(string); ok {
		return strconv.Quote(s)
	}
	if text, ok := toText(raw); ok {
		return text
	}
	switch reflect.ValueOf(raw).Kind() {
	case reflect.Map:
		return "an object"
	case reflect.Slice:
		return "a list"
	}
	return fmt.Sprintf("a %T", raw)
}

// Key names an entry among all: kind/name.
func Key(e Entry) string { return e.GetKind() + "/" + e.GetName() }

// Equal reports whether two entries say the same, whatever their indexes.
func Equal(a, b Entry) bool {
	if a == nil || b == nil {
		return a == nil && b == nil
	}
	if reflect.TypeOf(a) != reflect.TypeOf(b) {
		return false
	}
	return reflect.DeepEqual(WithIndexes(a, 0, 0), WithIndexes(b, 0, 0))
}

// WithIndexes returns a shallow copy of e with other indexes. What e points to
// is shared, so neither may be changed afterwards.
func WithIndexes(e Entry, create, modify uint64) Entry {
	v := reflect.New(reflect.TypeOf(e).Elem())
	v.Elem().Set(reflect.ValueOf(e).Elem())
	v.Elem().FieldByName("CreateIndex").SetUint(create)
	v.Elem().FieldByName("ModifyIndex").SetUint(modify)
	return v.Interface().(Entry)
}
