package gateway

import (
	"encoding/json"
	"testing"
	"time"
)

func TestSettings(t *testing.T) {
	s := func(js string) *settings {
		var m map[string]any
		if err := json.Unmarshal([]byte(js), &m); err != nil {
			t.Fatal(err)
		}
		return &settings{values: m}
	}
	for js, want := range map[string]bool{
		`{"k":true}`: true, `{"k":"true"}`: true, `{"k":"1"}`: true, `{"k":1}`: true, `{"k":[true]}`: true, `{"K":[["t"]]}`: true,
		`{"k":false}`: false, `{"k":"no"}`: false, `{"k":""}`: false, `{"k":0}`: false, `{"k":null}`: false, `{}`: false, `{"k":{}}`: false,
		`{"other":true}`: false, `{"alias":true}`: true, `{"alias":true,"k":false}`: false,
	} {
		if got := s(js).bool("k", "alias"); got != want {
			t.Errorf("%s is %t", js, got)
		}
	}
	for js, want := range map[string]int{
		`{"k":5}`: 5, `{"k":"5"}`: 5, `{"k":" 5 "}`: 5, `{"k":[5]}`: 5, `{"k":true}`: 1,
		`{"k":5.5}`: 7, `{"k":1e300}`: 7, `{"k":"five"}`: 7, `{"k":[5,6]}`: 7, `{"k":null}`: 7, `{}`: 7,
	} {
		if got := s(js).int(7, "k"); got != want {
			t.Errorf("%s is %d, want %d", js, got, want)
		}
	}
	for js, want := range map[string]time.Duration{
		`{"k":5}`: 5 * time.Millisecond, `{"k":0}`: time.Second, `{"k":-5}`: time.Second, `{"k":"x"}`: time.Second, `{}`: time.Second,
	} {
		if got := s(js).milliseconds(time.Second, "k"); got != want {
			t.Errorf("%s is %s, want %s", js, got, want)
		}
	}
	bad := s(`{"a":"x","b":{},"c":5}`)
	bad.int(0, "a")
	bad.int(0, "a")
	bad.bool("b")
	bad.int(0, "c")
	if got := bad.warnings(); len(got) != 2 {
		t.Errorf("warnings %q", got)
	}
}
