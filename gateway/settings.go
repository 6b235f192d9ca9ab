package gateway

import (
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"
)

// settings reads the opaque configuration of a proxy, which is weakly typed: a
// number may come as a string, a flag as a number, anything as a list of one
// (HCL makes those). Keys are matched in any letter case, as Consul does.
//
// A value that cannot be read is left at its default and recorded, so that one
// bad key does not take the others with it.
type settings struct {
	values map[string]any
	bad    []string
	asked  []string // the keys looked for
}

// find returns the value of the first of the keys that is set.
func (s *settings) find(keys ...string) (string, any, bool) {
	s.asked = append(s.asked, keys...)
	for _, k := range keys {
		if v, ok := s.values[k]; ok && v != nil {
			return k, one(v), true
		}
	}
	// Sorted, so that two spellings of a key always yield the same one.
	var names []string
	for name := range s.values {
		names = append(names, name)
	}
	slices.Sort(names)
	for _, k := range keys {
		for _, name := range names {
			if strings.EqualFold(name, k) && s.values[name] != nil {
				return name, one(s.values[name]), true
			}
		}
	}
	return "", nil, false
}

func (s *settings) reject(key string, value any, want string) {
	s.bad = append(s.bad, fmt.Sprintf("config key %q: %v is not %s; the default is used", key, value, want))
}

// warnings returns what could not be read, in a stable order.
func (s *settings) warnings() []string {
	slices.Sort(s.bad)
	return slices.Compact(s.bad)
}

func (s *settings) bool(keys ...string) bool {
	k, v, ok := s.find(keys...)
	if !ok {
		return false
	}
	switch x := v.(type) {
	case bool:
		return x
	case string:
		if x == "" {
			return false
		}
		if b, err := strconv.ParseBool(x); err == nil {
			return b
		}
	default:
		if n, ok := number(v); ok {
			return n != 0
		}
	}
	s.reject(k, v, "true or false")
	return false
}

// int returns the value, or def where the key is absent.
func (s *settings) int(def int, keys ...string) int {
	k, v, ok := s.find(keys...)
	if !ok {
		return def
	}
	n, ok := number(v)
	if !ok {
		s.reject(k, v, "a number")
		return def
	}
	return n
}

func (s *settings) string(keys ...string) string {
	k, v, ok := s.find(keys...)
	if !ok {
		return ""
	}
	switch x := v.(type) {
	case string:
		return x
	case []any, map[string]any:
		s.reject(k, v, "a string")
		return ""
	}
	if n, ok := number(v); ok {
		return strconv.Itoa(n)
	}
	return fmt.Sprint(v)
}

// maps returns a map of maps, such as the bind addresses.
func (s *settings) maps(keys ...string) map[string]map[string]any {
	k, v, ok := s.find(keys...)
	if !ok {
		return nil
	}
	outer, ok := v.(map[string]any)
	if !ok {
		// HCL writes a block that occurs more than once as a list of maps.
		list, isList := v.([]map[string]any)
		if !isList {
			s.reject(k, v, "a map")
			return nil
		}
		outer = make(map[string]any)
		for _, m := range list {
			for name, x := range m {
				outer[name] = x
			}
		}
	}
	out := make(map[string]map[string]any, len(outer))
	for name, x := range outer {
		inner, ok := one(x).(map[string]any)
		if !ok {
			s.reject(k+"."+name, x, "a map")
			continue
		}
		out[name] = inner
	}
	return out
}

// block returns the settings in a block.
func (s *settings) block(key string) (*settings, bool) {
	k, v, ok := s.find(key)
	if !ok {
		return nil, false
	}
	m, ok := v.(map[string]any)
	if !ok {
		s.reject(k, v, "a block")
		return nil, false
	}
	return &settings{values: m}, true
}

// milliseconds returns the value as a duration, or def where it is absent or
// less than one.
func (s *settings) milliseconds(def time.Duration, keys ...string) time.Duration {
	if n := s.int(0, keys...); n > 0 {
		return time.Duration(n) * time.Millisecond
	}
	return def
}

// duration returns a time like "10s", or def where it is absent; a number is of
// seconds.
func (s *settings) duration(def time.Duration, key string) time.Duration {
	k, v, ok := s.find(key)
	if !ok {
		return def
	}
	d, err := time.ParseDuration(fmt.Sprint(v))
	if n, isNumber := number(v); isNumber {
		d, err = time.Duration(n)*time.Second, nil
	}
	if err != nil || d <= 0 {
		s.reject(k, v, "a duration")
		return def
	}
	return d
}

// perSecond returns a rate, 0 where the key is absent.
func (s *settings) perSecond(key string) float64 {
	return s.float(0, key, 0, "a number of connections per second")
}

// factor returns a number that is at least 1, or def where the key is absent.
func (s *settings) factor(def float64, key string) float64 {
	return s.float(def, key, 1, "a number from 1")
}

// float returns a number that is at least least, or def where the key is absent.
func (s *settings) float(def float64, key string, least float64, want string) float64 {
	k, v, ok := s.find(key)
	if !ok {
		return def
	}
	var f float64
	var err error
	switch x := v.(type) {
	case float64:
		f = x
	case string:
		f, err = strconv.ParseFloat(strings.TrimSpace(x), 64)
	default:
		n, isNumber := number(v)
		if !isNumber {
			err = strconv.ErrSyntax
		}
		f = float64(n)
	}
	if err != nil || !(f >= least) || math.IsInf(f, 0) {
		s.reject(k, v, want)
		return def
	}
	return f
}

// count returns a number that is at least 0, or def where the key is absent.
func (s *settings) count(def int, key string) int {
	n := s.int(def, key)
	if n < 0 {
		k, v, _ := s.find(key)
		s.reject(k, v, "a number from 0")
		return def
	}
	return n
}

// strings returns a list of strings; one string is a list of one.
func (s *settings) strings(keys ...string) []string {
	k, v, ok := s.find(keys...)
	if !ok {
		return nil
	}
	var list []any
	switch x := v.(type) {
	case string:
		list = []any{x}
	case []any:
		list = x
	case []string:
		return slices.Clone(x)
	default:
		s.reject(k, v, "a list of strings")
		return nil
	}
	var out []string
	for _, x := range list {
		text, ok := x.(string)
		if !ok {
			s.reject(k, v, "a list of strings")
			return nil
		}
		out = append(out, text)
	}
	return out
}

// oneOf returns the value, which must be one of those given, or "".
func (s *settings) oneOf(key string, values ...string) string {
	v := s.string(key)
	if v != "" && !slices.Contains(values, v) {
		s.reject(key, v, "one of "+strings.Join(values, ", "))
		return ""
	}
	return v
}

// section returns the settings of a block, which reads as an empty one where it
// is absent. Once all was read close is to be called, which tells what is wrong
// in it, and which of its keys are none: unlike a whole configuration, which is
// read by others too, a block is ours alone.
func (s *settings) section(key string) (in *settings, close func()) {
	in, ok := s.block(key)
	if !ok {
		return &settings{}, func() {}
	}
	return in, func() {
		for name := range in.values {
			if !slices.ContainsFunc(in.asked, func(k string) bool { return strings.EqualFold(k, name) }) {
				in.bad = append(in.bad, fmt.Sprintf("config key %q is unknown", name))
			}
		}
		for _, w := range in.bad {
			s.bad = append(s.bad, key+": "+w)
		}
	}
}

// one unwraps a list of one.
func one(v any) any {
	switch x := v.(type) {
	case []any:
		if len(x) == 1 {
			return one(x[0])
		}
	case []map[string]any:
		if len(x) == 1 {
			return x[0]
		}
	}
	return v
}

func number(v any) (int, bool) {
	switch x := v.(type) {
	case int:
		return x, true
	case int64:
		return int(x), true
	case float64:
		if math.Trunc(x) != x || math.Abs(x) > math.MaxInt32 {
			return 0, false
		}
		return int(x), true
	case bool:
		if x {
			return 1, true
		}
		return 0, true
	case string:
		n, err := strconv.Atoi(strings.TrimSpace(x))
		return n, err == nil
	}
	return 0, false
}
