package httpapi

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/hashicorp/consul/api"
)

func TestLegacyIntentions(t *testing.T) {
	s := newServer(t, newFakeServer(), nil)
	c := s.api.Connect()
	ixn := &api.Intention{
		SourceNS: "default", SourceName: "web", DestinationNS: "default", DestinationName: "db", Description: "reads",
		SourceType: api.IntentionSourceConsul, Action: api.IntentionActionAllow, Meta: map[string]string{"team": "a"},
	}
	id, _, err := c.IntentionCreate(ixn, nil) //nolint:staticcheck // what this is about
	if err != nil || id == "" {
		t.Fatalf("create = %q, %v", id, err)
	}
	other := *ixn
	other.SourceName, other.Meta = "batch", nil
	otherID, _, err := c.IntentionCreate(&other, nil) //nolint:staticcheck // what this is about
	if err != nil || otherID == id {
		t.Fatalf("create another = %q, %v", otherID, err)
	}
	get := func(id string) *api.Intention {
		t.Helper()
		got, _, err := c.IntentionGet(id, nil)
		if err != nil {
			t.Fatalf("get: %v", err)
		}
		return got
	}
	got := get(id)
	if got == nil {
		t.Fatal("what was created is not found")
	}
	want := *ixn
	want.ID, want.Precedence, want.CreateIndex, want.ModifyIndex = id, 9, got.CreateIndex, got.ModifyIndex
	if diff := cmp.Diff(&want, got); diff != "" {
		t.Errorf("get (-want +got):\n%s", diff)
	}
	if allowed, _, err := c.IntentionCheck(&api.IntentionCheck{Source: "web", Destination: "db"}, nil); err != nil || !allowed {
		t.Errorf("check = %v, %v", allowed, err)
	}

	got.Action, got.Meta = api.IntentionActionDeny, map[string]string{"team": "b"}
	if _, err := c.IntentionUpdate(got, nil); err != nil { //nolint:staticcheck // what this is about
		t.Fatalf("update: %v", err)
	}
	if now := get(id); now.Action != api.IntentionActionDeny || now.Meta["team"] != "b" || now.ModifyIndex <= got.ModifyIndex {
		t.Errorf("after the update: %+v", now)
	}
	if now := get(otherID); now.Action != api.IntentionActionAllow || len(now.Meta) != 0 {
		t.Errorf("the other after the update: %+v", now)
	}

	const path = "/v1/connect/intentions"
	body := `{"SourceName":"web","DestinationName":"db","Action":"allow"`
	for _, tc := range []struct {
		method, path, body string
		code               int
		want               string
	}{
		{"POST", path, body + `}`, 500, "duplicate intention found: web => db"},
		{"POST", path, body + `,"ID":"` + id + `"}`, 500, "ID must be empty when creating a new intention"},
		{"POST", path, `{"DestinationName":"db","Action":"allow"}`, 500, "SourceName must be set"},
		{"POST", path, `{"SourceName":"db","Action":"allow"}`, 500, "DestinationName must be set"},
		{"POST", path, `{"SourceName":"x","DestinationName":"y"}`, 500, "Sources[0].Action must be set to 'allow' or 'deny'"},
		{"POST", path, body + `,"SourceNS":"other"}`, 400, `Invalid namespace "other" - ` + textNamespaces},
		{"GET", path + "/hello", "", 400, `Invalid intention ID "hello": not a UUID`},
		{"GET", path + "/" + strings.Repeat("0", 8) + id[8:], "", 404, "Intention not found"},
		{"PUT", path + "/" + strings.Repeat("0", 8) + id[8:], body + `}`, 500, "Cannot modify non-existent intention: '00000000" + id[8:] + "'"},
		{"PUT", path + "/" + id, strings.Replace(body, "db", "cache", 1) + `}`, 500, "Cannot modify DestinationName or DestinationNS for an intention once it exists."},
		{"PUT", path + "/" + id, strings.Replace(body, "web", "batch", 1) + `}`, 500, "duplicate intention found: batch => db"},
		{"DELETE", path + "/" + strings.Repeat("0", 8) + id[8:], "", 500, "Cannot delete non-existent intention: '00000000" + id[8:] + "'"},
	} {
		s.do(t, tc.method, tc.path, tc.body).want(t, tc.code, tc.want)
	}

	// Written to in the present way, the entry keeps its IDs, and is no longer for
	// the old one.
	if _, err := c.IntentionUpsert(&api.Intention{SourceName: "new", DestinationName: "db", Action: api.IntentionActionAllow}, nil); err != nil {
		t.Fatalf("upsert beside legacy intentions: %v", err)
	}
	if now := get(id); now == nil || now.Meta["team"] != "b" {
		t.Errorf("after the upsert of another: %+v", now)
	}
	_, err = c.IntentionDelete(id, nil)
	if err == nil || !strings.Contains(err.Error(), "cannot use legacy intention API") {
		t.Errorf("delete from a mixed entry: %v", err)
	}
	if _, err := c.IntentionDeleteExact("new", "db", nil); err != nil {
		t.Fatal(err)
	}

	for _, id := range []string{id, otherID} {
		if _, err := c.IntentionDelete(id, nil); err != nil {
			t.Fatalf("delete: %v", err)
		}
		if got := get(id); got != nil {
			t.Errorf("still there: %+v", got)
		}
	}
	s.do(t, "GET", "/v1/config/service-intentions/db", "").want(t, 404, `Config entry not found for "service-intentions" / "db"`)
}
