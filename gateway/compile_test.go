package gateway_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/rogpeppe/go-internal/txtar"

	"github.com/sluicemesh/sluice/gateway"
	"github.com/sluicemesh/sluice/proxycfg"
	"github.com/sluicemesh/sluice/proxycfg/proxycfgtest"
)

// parse reads a case; package proxycfgtest says what its sections are.
func parse(t testing.TB, file string) (*txtar.Archive, *proxycfgtest.Case) {
	t.Helper()
	ar, err := txtar.ParseFile(file)
	if err != nil {
		t.Fatal(err)
	}
	c, err := proxycfgtest.Parse(ar)
	if err != nil {
		t.Fatal(err)
	}
	return ar, c
}

func build(t testing.TB, c *proxycfgtest.Case) *proxycfg.Snapshot {
	t.Helper()
	s, _, err := proxycfg.Build(t.Context(), c.Source, c.Proxy)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// TestCompile compiles the cases in testdata/compile. Their last sections are
// what comes out: "table" is the table's JSON, and "explain NAME" what
// [gateway.Explain] says about a name. UPDATE_GOLDEN=1 rewrites those there are.
func TestCompile(t *testing.T) {
	files, err := filepath.Glob("testdata/compile/*.txtar")
	if err != nil || len(files) == 0 {
		t.Fatal("no cases", err)
	}
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".txtar"), func(t *testing.T) {
			ar, c := parse(t, file)
			snap := build(t, c)
			table, err := gateway.Compile(snap)
			if err != nil {
				t.Fatal(err)
			}
			js, err := table.JSON()
			if err != nil {
				t.Fatal(err)
			}
			if bytes.Contains(js, []byte(proxycfgtest.Key)) {
				t.Error("the private key shows in the table")
			}
			again, err := gateway.Compile(snap)
			if err != nil {
				t.Fatal(err)
			}
			if js2, _ := again.JSON(); !bytes.Equal(js, js2) {
				t.Errorf("a second table differs:\n%s", cmp.Diff(string(js), string(js2)))
			}
			checked := 0
			for i := range ar.Files {
				f := &ar.Files[i]
				var got string
				if f.Name == "table" {
					got = string(js) + "\n"
				} else if name, ok := strings.CutPrefix(f.Name, "explain"); ok {
					got = story(gateway.Explain(table, strings.TrimSpace(name)))
				} else {
					continue
				}
				checked++
				if os.Getenv("UPDATE_GOLDEN") != "" {
					f.Data = []byte(got)
				} else if diff := cmp.Diff(string(f.Data), got); diff != "" {
					t.Errorf("%s (-want +got):\n%s", f.Name, diff)
				}
			}
			if checked == 0 {
				t.Fatal("the case expects nothing")
			}
			if os.Getenv("UPDATE_GOLDEN") != "" {
				if err := os.WriteFile(file, txtar.Format(ar), 0o644); err != nil {
					t.Fatal(err)
				}
			}
		})
	}
}

// story writes an explanation in lines.
func story(x gateway.Explanation) string {
	var b bytes.Buffer
	for _, s := range x.Steps {
		fmt.Fprintln(&b, s)
	}
	for _, c := range x.Candidates {
		fmt.Fprintf(&b, "candidate %s:%d of %s, chosen %t %s\n", c.Address, c.Port, c.ServiceID, c.Chosen, c.Reason)
	}
	for _, m := range x.Missing {
		fmt.Fprintf(&b, "missing: %s\n", m)
	}
	fmt.Fprintf(&b, "routed %t\n", x.Routed)
	return b.String()
}

// TestTableRoundTrip shows that a table read back from its JSON has equal JSON.
func TestTableRoundTrip(t *testing.T) {
	_, c := parse(t, "testdata/compile/sidecar.txtar")
	table, err := gateway.Compile(build(t, c))
	if err != nil {
		t.Fatal(err)
	}
	js, err := table.JSON()
	if err != nil {
		t.Fatal(err)
	}
	var back gateway.Table
	if err := json.Unmarshal(js, &back); err != nil {
		t.Fatal(err)
	}
	js2, err := back.JSON()
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(js), string(js2)); diff != "" {
		t.Error(diff)
	}
}
