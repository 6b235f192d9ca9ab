package gateway_test

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/sluicemesh/sluice/gateway"
	"github.com/sluicemesh/sluice/proxycfg/proxycfgtest"
)

func table(t testing.TB, name string) *gateway.Table {
	t.Helper()
	_, c := parse(t, "testdata/compile/"+name+".txtar")
	out, err := gateway.Compile(build(t, c))
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func openKeep(t testing.TB, dir string) *gateway.Keep {
	t.Helper()
	k, err := gateway.OpenKeep(dir)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func TestKeepRoundTrip(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "tables")
	k := openKeep(t, dir)
	want := table(t, "sidecar")
	want.Proxy = "../odd/näme " + strings.Repeat("x", 300)
	if err := k.Save(want, "builtin"); err != nil {
		t.Fatal(err)
	}
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) != 1 {
		t.Fatalf("%d files, %v", len(entries), err)
	}
	info, err := entries[0].Info()
	if err != nil {
		t.Fatal(err)
	}
	if info.Mode().Perm() != 0o600 {
		t.Errorf("mode %s", info.Mode())
	}
	got, err := openKeep(t, dir).Load()
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got[want.Proxy].Table); diff != "" {
		t.Error(diff)
	}
	if key := got[want.Proxy].Table.Identity.PrivateKeyPEM.Reveal(); key != proxycfgtest.Key {
		t.Errorf("key %q", key)
	}
	if err := k.Delete(want.Proxy); err != nil {
		t.Fatal(err)
	}
	if err := k.Delete(want.Proxy); err != nil {
		t.Errorf("deleting what is not there: %v", err)
	}
	if got, err := openKeep(t, dir).Load(); err != nil || len(got) != 0 {
		t.Errorf("after deletion %v, %v", got, err)
	}
}

func TestKeepSkipsWhatIsBad(t *testing.T) {
	dir := t.TempDir()
	k := openKeep(t, dir)
	good := table(t, "gateway")
	if err := k.Save(good, ""); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, good.Proxy+".json")
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for name, bad := range map[string][]byte{
		"cut.json":     data[:len(data)/2],
		"empty.json":   nil,
		"flipped.json": bytes.Replace(data, []byte("10.0.1.1"), []byte("10.0.1.9"), 1),
		"future.json":  bytes.Replace(data, []byte(`"Version":1`), []byte(`"Version":9`), 1),
		"renamed.json": data,
		"left.1.tmp":   data,
	} {
		if bytes.Equal(bad, data) && name != "renamed.json" && name != "left.1.tmp" {
			t.Fatalf("%s is not bad", name)
		}
		if err := os.WriteFile(filepath.Join(dir, name), bad, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	got, err := openKeep(t, dir).Load()
	if len(got) != 1 || got[good.Proxy].Table == nil {
		t.Errorf("loaded %v", got)
	}
	for _, name := range []string{"cut.json", "empty.json", "flipped.json", "future.json", "renamed.json"} {
		if err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("the error does not tell of %s: %v", name, err)
		}
	}
	if _, err := os.Stat(filepath.Join(dir, "left.1.tmp")); !os.IsNotExist(err) {
		t.Errorf("what was left of a write is still there: %v", err)
	}
}

// TestKeepWritesWhatChanged: age alone is written once a minute.
func TestKeepWritesWhatChanged(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		k := openKeep(t, dir)
		base := table(t, "gateway")
		path := filepath.Join(dir, base.Proxy+".json")
		save := func(wait time.Duration, edit func(t *gateway.Table)) bool {
			t.Helper()
			time.Sleep(wait)
			before, _ := os.ReadFile(path)
			next := *base
			edit(&next)
			if err := k.Save(&next, "builtin"); err != nil {
				t.Fatal(err)
			}
			after, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			return !bytes.Equal(before, after)
		}
		if !save(0, func(t *gateway.Table) {}) {
			t.Error("the first was not written")
		}
		if save(time.Second, func(t *gateway.Table) { t.AsOf, t.Index = t.AsOf.Add(time.Second), 999 }) {
			t.Error("age and index were written at once")
		}
		if !save(time.Second, func(t *gateway.Table) { t.Warnings = []string{"new"} }) {
			t.Error("a change was not written")
		}
		if !save(time.Minute, func(t *gateway.Table) { t.Warnings, t.AsOf = []string{"new"}, t.AsOf.Add(time.Minute) }) {
			t.Error("the age was not written after a minute")
		}
	})
}
