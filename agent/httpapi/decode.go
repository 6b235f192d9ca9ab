package httpapi

import (
	"bytes"
	"encoding"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"reflect"
	"strings"
	"sync"
	"time"
	"unicode"
)

// decodeBody reads a request's JSON into target, a pointer to a struct. Keys are
// matched without regard to case and to the underscores of snake_case; a key
// that no field has is an error, answered 400.
func (c *call) decodeBody(target any) error {
	if err := decodeStrict(c.body, target); err != nil {
		return bad("Request decode failed: %v", err)
	}
	return nil
}

// decodeStrict is decodeBody without the answer.
//
// The values are those of the public API's types, whose own decoding neither
// knows the aliases nor refuses what it does not know at every depth. So the
// keys are put right in the generic form first, and the types decode that.
func decodeStrict(data []byte, target any) error {
	dec := json.NewDecoder(bytes.NewReader(data))
	dec.UseNumber()
	var generic any
	if err := dec.Decode(&generic); err != nil {
		return err
	}
	if _, err := dec.Token(); !errors.Is(err, io.EOF) {
		return errors.New("invalid data after the top-level value")
	}
	generic, err := canonicalKeys(generic, reflect.TypeOf(target).Elem())
	if err != nil {
		return err
	}
	data, err = json.Marshal(generic)
	if err != nil {
		return err
	}
	return json.Unmarshal(data, target)
}

// canonicalKeys returns v, the generic form of JSON for a t, with the keys that
// t's decoding has.
func canonicalKeys(v any, t reflect.Type) (any, error) {
	for t.Kind() == reflect.Pointer {
		t = t.Elem()
	}
	switch t.Kind() {
	case reflect.Struct:
		m, ok := v.(map[string]any)
		if !ok || opaque(t) {
			return v, nil // a wrong type is for the decoding to refuse
		}
		fields := fieldsOf(t)
		out := make(map[string]any, len(m))
		for key, val := range m {
			f, ok := fields[foldKey(key)]
			if !ok {
				if unsupportedKeys[foldKey(key)] {
					return nil, fmt.Errorf("%q is not supported", key)
				}
				return nil, fmt.Errorf("json: unknown field %q", key)
			}
			if _, twice := out[f.name]; twice {
				return nil, fmt.Errorf("json: field %q is given twice", f.name)
			}
			val, err := canonicalKeys(val, f.typ)
			if err != nil {
				return nil, err
			}
			if f.duration {
				val = durationText(val)
			}
			out[f.name] = val
		}
		return out, nil
	case reflect.Slice, reflect.Array:
		list, ok := v.([]any)
		if !ok {
			return v, nil
		}
		for i, e := range list {
			var err error
			if list[i], err = canonicalKeys(e, t.Elem()); err != nil {
				return nil, err
			}
		}
		return list, nil
	case reflect.Map:
		m, ok := v.(map[string]any)
		if !ok {
			return v, nil
		}
		for k, e := range m {
			var err error
			if m[k], err = canonicalKeys(e, t.Elem()); err != nil {
				return nil, err
			}
		}
	}
	return v, nil
}

// unsupportedKeys are fields of a check that Consul has and Sluice refuses, so
// that nobody relies on what does not happen.
//
// COMPAT: Consul runs such checks.
var unsupportedKeys = map[string]bool{"osservice": true, "disableredirects": true, "outputmaxsize": true}

// field is how a key is spelled and what is under it.
type field struct {
	name string
	typ  reflect.Type
	// duration is a text such as "10s", for which nanoseconds may be given.
	duration bool
}

var fieldCache sync.Map // reflect.Type -> map[string]field

// fieldsOf returns the fields of a struct by folded key, those of embedded
// structs among them.
func fieldsOf(t reflect.Type) map[string]field {
	if m, ok := fieldCache.Load(t); ok {
		return m.(map[string]field)
	}
	fields := map[string]field{}
	for i := range t.NumField() {
		sf := t.Field(i)
		name, _, _ := strings.Cut(sf.Tag.Get("json"), ",")
		switch {
		case sf.Anonymous && name == "" && sf.Type.Kind() == reflect.Struct:
			for k, f := range fieldsOf(sf.Type) {
				if _, own := fields[k]; !own {
					fields[k] = f
				}
			}
			continue
		case !sf.IsExported():
			continue
		case name == "-" || name == "":
			// A field that JSON does not have may be one that the type's own decoding
			// reads, such as IntervalDuration.
			if name == "-" && !decodesItself(t) {
				continue
			}
			name = sf.Name
		}
		f := field{name: name, typ: sf.Type, duration: sf.Type.Kind() == reflect.String && durationFields[sf.Name]}
		fields[foldKey(name)] = f
		if name != sf.Name {
			if _, taken := fields[foldKey(sf.Name)]; !taken {
				fields[foldKey(sf.Name)] = f
			}
		}
	}
	fieldCache.Store(t, fields)
	return fields
}

var durationFields = map[string]bool{"Interval": true, "Timeout": true, "TTL": true, "DeregisterCriticalServiceAfter": true}

var (
	jsonUnmarshaler = reflect.TypeFor[json.Unmarshaler]()
	textUnmarshaler = reflect.TypeFor[encoding.TextUnmarshaler]()
)

func decodesItself(t reflect.Type) bool { return reflect.PointerTo(t).Implements(jsonUnmarshaler) }

// opaque says whether t is a value and not an object of fields.
func opaque(t reflect.Type) bool {
	return t == reflect.TypeFor[time.Time]() || reflect.PointerTo(t).Implements(textUnmarshaler)
}

// durationText turns nanoseconds into the text that the API's types hold.
func durationText(v any) any {
	n, ok := v.(json.Number)
	if !ok {
		return v
	}
	ns, err := n.Int64()
	if err != nil {
		return v
	}
	return time.Duration(ns).String()
}

// foldKey is what two spellings of a key have in common.
func foldKey(key string) string {
	return strings.Map(func(r rune) rune {
		if r == '_' {
			return -1
		}
		return unicode.ToLower(r)
	}, key)
}
