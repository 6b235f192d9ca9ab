package acl

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"
)

// TestSecretDoesNotPrint tries every way by which a secret could get into a log
// or an answer.
func TestSecretDoesNotPrint(t *testing.T) {
	const hidden = "b1gs33cret"
	s := Secret(hidden)
	if s.Reveal() != hidden {
		t.Fatal("it is lost")
	}
	b, err := json.Marshal(struct{ Token Secret }{s})
	if err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string]string{
		"%v": fmt.Sprintf("%v", s), "%s": fmt.Sprintf("token %s", s), "%q": fmt.Sprintf("%q", s), "%+v": fmt.Sprintf("%+v", struct{ T Secret }{s}),
		"%#v": fmt.Sprintf("%#v", struct{ T Secret }{s}), "String": s.String(), "JSON": string(b), "error": fmt.Errorf("token %v", s).Error(),
	} {
		if strings.Contains(text, hidden) {
			t.Errorf("%s shows it: %s", name, text)
		}
	}
	if got := Secret("").String(); got != "" {
		t.Errorf("no secret prints as %q", got)
	}
	var back Secret
	if err := json.Unmarshal([]byte(`"`+hidden+`"`), &back); err != nil || back.Reveal() != hidden {
		t.Errorf("decoded %v, %v", back.Reveal(), err)
	}
}
