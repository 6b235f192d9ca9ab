package httpapi

import (
	"net/http"
	"reflect"

	"github.com/hashicorp/go-bexpr"
)

const textFilter = "Failed to create boolean expression evaluator: %v"

// filtered returns the elements of a slice or a map that an expression selects;
// all of them for the empty one.
//
// An expression that cannot be parsed, or names what an element does not have,
// is an error even if there is no element.
func filtered[T any](expression string, list T) (T, error) {
	if expression == "" {
		return list, nil
	}
	var none T
	f, err := bexpr.CreateEvaluator(expression, bexpr.WithHookFn(zeroForNil))
	if err != nil {
		return none, status(http.StatusInternalServerError, textFilter, err)
	}
	v := reflect.ValueOf(list)
	sample := reflect.New(v.Type().Elem()).Elem()
	if _, err := f.Evaluate(zeroForNil(sample).Interface()); err != nil {
		return none, status(http.StatusInternalServerError, textFilter, err)
	}
	keep := func(e reflect.Value) (bool, error) {
		ok, err := f.Evaluate(zeroForNil(e).Interface())
		if err != nil {
			return false, status(http.StatusInternalServerError, textFilter, err)
		}
		return ok, nil
	}
	if v.Kind() == reflect.Map {
		out := reflect.MakeMap(v.Type())
		for it := v.MapRange(); it.Next(); {
			ok, err := keep(it.Value())
			if err != nil {
				return none, err
			}
			if ok {
				out.SetMapIndex(it.Key(), it.Value())
			}
		}
		return out.Interface().(T), nil
	}
	out := reflect.MakeSlice(v.Type(), 0, v.Len())
	for i := range v.Len() {
		ok, err := keep(v.Index(i))
		if err != nil {
			return none, err
		}
		if ok {
			out = reflect.Append(out, v.Index(i))
		}
	}
	return out.Interface().(T), nil
}

// zeroForNil lets an expression look into what is not there: a nil pointer to a
// struct reads as its zero value.
func zeroForNil(v reflect.Value) reflect.Value {
	if v.Kind() == reflect.Pointer && v.IsNil() && v.Type().Elem().Kind() == reflect.Struct {
		return reflect.New(v.Type().Elem())
	}
	return v
}
