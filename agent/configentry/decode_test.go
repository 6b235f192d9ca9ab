package configentry_test

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/hashicorp/consul/api"
	"golang.org/x/tools/txtar"

	"github.com/sluicemesh/sluice/agent/configentry"
)

// golden compares got with the section "want" of the archive at path, or with
// UPDATE_GOLDEN=1 writes it there.
func golden(t *testing.T, path string, ar *txtar.Archive, got string) {
	t.Helper()
	if !strings.HasSuffix(got, "\n") {
		got += "\n"
	}
	for i := range ar.Files {
		if f := &ar.Files[i]; f.Name == "want" {
			if os.Getenv("UPDATE_GOLDEN") == "1" {
				f.Data = []byte(got)
				if err := os.WriteFile(path, txtar.Format(ar), 0o644); err != nil {
					t.Fatal(err)
				}
				return
			}
			if diff := cmp.Diff(string(f.Data), got); diff != "" {
				t.Errorf("-want +got:\n%s", diff)
			}
			return
		}
	}
	t.Fatalf("%s has no section want", path)
}

func section(t *testing.T, ar *txtar.Archive, name string) []byte {
	t.Helper()
	for _, f := range ar.Files {
		if f.Name == name {
			return f.Data
		}
	}
	t.Fatalf("no section %q", name)
	return nil
}

func archives(t *testing.T, dir string, run func(t *testing.T, path string, ar *txtar.Archive)) {
	t.Helper()
	paths, err := filepath.Glob(filepath.Join("testdata", dir, "*.txtar"))
	if err != nil || len(paths) == 0 {
		t.Fatalf("no cases in %s: %v", dir, err)
	}
	for _, path := range paths {
		t.Run(strings.TrimSuffix(filepath.Base(path), ".txtar"), func(t *testing.T) {
			ar, err := txtar.ParseFile(path)
			if err != nil {
				t.Fatal(err)
			}
			run(t, path, ar)
		})
	}
}

// accept takes an entry through all that a write does.
func accept(b []byte) (configentry.Entry, error) {
	e, err := configentry.DecodeJSON(b)
	if err != nil {
		return nil, fmt.Errorf("decode: %w", err)
	}
	configentry.Normalize(e)
	if err := configentry.Validate(e); err != nil {
		return nil, fmt.Errorf("validate: %w", err)
	}
	return e, nil
}

// TestDecode: the section in is a JSON array of entries; want has, for each, its
// normalised JSON or what is wrong with it.
func TestDecode(t *testing.T) {
	archives(t, "decode", func(t *testing.T, path string, ar *txtar.Archive) {
		var in []json.RawMessage
		if err := json.Unmarshal(section(t, ar, "in"), &in); err != nil {
			t.Fatal(err)
		}
		var out strings.Builder
		for _, raw := range in {
			e, err := accept(raw)
			if err != nil {
				fmt.Fprintf(&out, "%s\n", strings.TrimRight(err.Error(), "\n"))
				continue
			}
			b, err := json.MarshalIndent(e, "", "  ")
			if err != nil {
				t.Fatal(err)
			}
			fmt.Fprintf(&out, "%s\n", b)

			again, err := accept(b)
			if err != nil {
				t.Errorf("what was written is not accepted back: %v\n%s", err, b)
			} else if !configentry.Equal(e, again) {
				t.Errorf("what was written reads differently:\n%s", cmp.Diff(e, again))
			}
		}
		golden(t, path, ar, out.String())
	})
}

// TestDecodeForms: what HCL and YAML give reads as what JSON gives.
func TestDecodeForms(t *testing.T) {
	want := &api.ServiceConfigEntry{
		Kind: "service-defaults", Name: "web", Protocol: "http", LocalConnectTimeoutMs: 250,
		MeshGateway: api.MeshGatewayConfig{Mode: "local"},
		UpstreamConfig: &api.UpstreamConfiguration{
			Overrides: []*api.UpstreamConfig{{Name: "api", PassiveHealthCheck: &api.PassiveHealthCheck{Interval: 5 * time.Second, MaxFailures: 3}}},
		},
		Meta: map[string]string{"Some_Key": "7"},
	}
	override := map[string]any{"name": "api", "passive_health_check": []map[string]any{{"interval": "5s", "max_failures": "3"}}}
	for name, raw := range map[string]map[string]any{
		"camel": {
			"Kind": "service-defaults", "Name": "web", "Protocol": "http", "LocalConnectTimeoutMs": 250.0,
			"MeshGateway": map[string]any{"Mode": "local"},
			"UpstreamConfig": map[string]any{"Overrides": []any{
				map[string]any{"Name": "api", "PassiveHealthCheck": map[string]any{"Interval": 5e9, "MaxFailures": 3.0}}}},
			"Meta": map[string]any{"Some_Key": "7"}, "CreateIndex": 0.0, "Hash": 12345.0,
		},
		"snake, blocks as lists": {
			"kind": "service-defaults", "name": "web", "protocol": "http", "local_connect_timeout_ms": "250",
			"mesh_gateway":    []map[string]any{{"mode": "local"}},
			"upstream_config": []any{map[string]any{"overrides": []map[string]any{override}}},
			"meta":            []any{map[string]any{"Some_Key": 7}},
		},
		"odd case, single value for a list": {
			"KIND": "service-defaults", "NAME": "web", "protocol": []any{"http"}, "LOCALCONNECTTIMEOUTMS": int64(250),
			"meshGateway":    map[any]any{"MODE": "local"},
			"upstreamConfig": map[string]any{"overrides": override},
			"Meta":           map[string]any{"Some_Key": 7.0},
		},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := configentry.Decode(raw)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(configentry.Entry(want), got); diff != "" {
				t.Errorf("-want +got:\n%s", diff)
			}
		})
	}
}

func TestNormalizeIsIdempotent(t *testing.T) {
	archives(t, "decode", func(t *testing.T, _ string, ar *txtar.Archive) {
		var in []json.RawMessage
		if err := json.Unmarshal(section(t, ar, "in"), &in); err != nil {
			t.Fatal(err)
		}
		for _, raw := range in {
			e, err := configentry.DecodeJSON(raw)
			if err != nil {
				continue
			}
			configentry.Normalize(e)
			once, _ := json.Marshal(e)
			configentry.Normalize(e)
			twice, _ := json.Marshal(e)
			if diff := cmp.Diff(string(once), string(twice)); diff != "" {
				t.Errorf("-once +twice:\n%s", diff)
			}
		}
	})
}

func TestEqualIgnoresIndexes(t *testing.T) {
	a := &api.ServiceResolverConfigEntry{Kind: "service-resolver", Name: "web", CreateIndex: 1, ModifyIndex: 2}
	b := &api.ServiceResolverConfigEntry{Kind: "service-resolver", Name: "web", CreateIndex: 3, ModifyIndex: 4}
	if !configentry.Equal(a, b) {
		t.Error("entries that differ in their indexes only are not equal")
	}
	if a.CreateIndex != 1 || b.ModifyIndex != 4 {
		t.Error("comparing changed an entry")
	}
	b.DefaultSubset = "v1"
	if configentry.Equal(a, b) {
		t.Error("entries that differ are equal")
	}
	if configentry.Equal(a, &api.ServiceRouterConfigEntry{Kind: "service-resolver", Name: "web"}) || configentry.Equal(a, nil) || !configentry.Equal(nil, nil) {
		t.Error("entries of different types, or none, are told apart wrongly")
	}
}

// FuzzDecodeEntry: decoding never panics, and what was accepted reads back equal.
func FuzzDecodeEntry(f *testing.F) {
	paths, _ := filepath.Glob("testdata/decode/*.txtar")
	for _, path := range paths {
		ar, err := txtar.ParseFile(path)
		if err != nil {
			f.Fatal(err)
		}
		var in []json.RawMessage
		for _, s := range ar.Files {
			if s.Name == "in" && json.Unmarshal(s.Data, &in) == nil {
				for _, raw := range in {
					f.Add([]byte(raw))
				}
			}
		}
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		e, err := accept(b)
		if err != nil {
			return
		}
		out, err := json.Marshal(e)
		if err != nil {
			t.Fatalf("encode %#v: %v", e, err)
		}
		again, err := accept(out)
		if err != nil {
			t.Fatalf("%s is not accepted back: %v", out, err)
		}
		twice, err := json.Marshal(again)
		if err != nil {
			t.Fatal(err)
		}
		if string(out) != string(twice) {
			t.Fatalf("reads back differently:\n%s\n%s", out, twice)
		}
	})
}
