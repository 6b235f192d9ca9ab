package catalog

import (
	"encoding/json"
	"fmt"
	"reflect"
	"time"
)

// CanonicalConfig returns a copy of m in the form that decoding its JSON would
// give: numbers are float64, lists []any, objects map[string]any, durations
// their text. A one-element list of maps, which is how HCL reads a block, is the
// map. Nil stays nil.
func CanonicalConfig(m map[string]any) map[string]any {
	if m == nil {
		return nil
	}
	out := make(map[string]any, len(m))
	for k, v := range m {
		out[k] = canonical(v)
	}
	return out
}

func canonical(v any) any {
	switch x := v.(type) {
	case nil, bool, string, float64:
		return x
	case map[string]any:
		return CanonicalConfig(x)
	case []any:
		out := make([]any, len(x))
		for i := range x {
			out[i] = canonical(x[i])
		}
		return out
	case []map[string]any:
		if len(x) == 1 {
			return CanonicalConfig(x[0])
		}
		out := make([]any, len(x))
		for i := range x {
			out[i] = CanonicalConfig(x[i])
		}
		return out
	case json.Number:
		if f, err := x.Float64(); err == nil {
			return f
		}
		return x.String()
	case time.Duration:
		return x.String()
	case []byte:
		return string(x)
	}
	rv := reflect.ValueOf(v)
	switch rv.Kind() {
	case reflect.Int, reflect.Int8, reflect.Int16, reflect.Int32, reflect.Int64:
		return float64(rv.Int())
	case reflect.Uint, reflect.Uint8, reflect.Uint16, reflect.Uint32, reflect.Uint64, reflect.Uintptr:
		return float64(rv.Uint())
	case reflect.Float32:
		return rv.Float()
	case reflect.Bool:
		return rv.Bool()
	case reflect.String:
		return rv.String()
	case reflect.Slice, reflect.Array:
		out := make([]any, rv.Len())
		for i := range out {
			out[i] = canonical(rv.Index(i).Interface())
		}
		return out
	case reflect.Map:
		out := make(map[string]any, rv.Len())
		for it := rv.MapRange(); it.Next(); {
			out[fmt.Sprint(it.Key().Interface())] = canonical(it.Value().Interface())
		}
		return out
	case reflect.Pointer:
		if rv.IsNil() {
			return nil
		}
		return canonical(rv.Elem().Interface())
	}
	// A struct: what its JSON says.
	b, err := json.Marshal(v)
	if err != nil {
		return fmt.Sprint(v)
	}
	var out any
	if err := json.Unmarshal(b, &out); err != nil {
		return fmt.Sprint(v)
	}
	return out
}
