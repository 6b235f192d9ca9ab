package main

import (
	"encoding/json"
	"go/parser"
	"go/token"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

const module = "github.com/sluicemesh/sluice/"

// allowed says which packages of this module a package may import. Imports point
// against the flow of the data: consumers import the vocabulary of producers.
// "vocab" stands for the four packages that name things.
var allowed = map[string][]string{
	"acl":                   {},
	"agent/catalog":         {"acl"},
	"agent/configentry":     {"acl", "agent/catalog"},
	"agent/connect":         {"acl", "agent/catalog"},
	"agent/state":           {"vocab"},
	"agent/cluster":         {"vocab", "agent/state"},
	"agent/cluster/memnet":  {},
	"agent/view":            {"vocab", "agent/state"},
	"agent/local":           {"vocab"},
	"agent/check":           {"agent/catalog"},
	"agent/config":          {"vocab"},
	"agent/httpapi":         {"vocab", "agent/state"},
	"agent/telemetry":       {"agent/config"},
	"proxycfg":              {"vocab"},
	"proxycfg/proxycfgtest": {"vocab", "proxycfg"},
	"gateway":               {"vocab", "proxycfg"},
	"gateway/sni":           {"acl", "agent/catalog", "gateway"},
	"gateway/sidecar":       {"vocab", "gateway"},
	"agent":                 {"vocab", "agent/state", "agent/cluster", "agent/view", "agent/local", "agent/check", "agent/config", "agent/httpapi", "agent/telemetry", "proxycfg", "gateway", "gateway/sni", "gateway/sidecar"},
	"agent/agenttest":       {"agent", "agent/config", "gateway"},
	"cmd/internal/cli":      {"vocab", "agent", "agent/config", "agent/httpapi", "agent/telemetry", "agent/view", "proxycfg", "gateway", "gateway/sni", "gateway/sidecar", "cmd/internal/demo"},
	"cmd/internal/demo":     {"vocab", "gateway"},
	"cmd/sluice":            {"cmd/internal/cli"},
	"cmd/sniload":           {"gateway", "gateway/sni"},
}

var vocab = []string{"acl", "agent/catalog", "agent/configentry", "agent/connect"}

type pkg struct {
	ImportPath   string
	Dir          string
	Imports      []string
	TestImports  []string
	XTestImports []string
	GoFiles      []string
}

func packages(t *testing.T) []pkg {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "go", "list", "-json", "./...")
	cmd.Dir = "../.."
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list: %v", err)
	}
	var ps []pkg
	for dec := json.NewDecoder(strings.NewReader(string(out))); dec.More(); {
		var p pkg
		if err := dec.Decode(&p); err != nil {
			t.Fatal(err)
		}
		ps = append(ps, p)
	}
	return ps
}

// TestImports fails when an import goes against the direction, and when a new
// package has not been given its place in the map.
func TestImports(t *testing.T) {
	seen := map[string]bool{}
	for _, p := range packages(t) {
		name := strings.TrimPrefix(p.ImportPath, module)
		rule, ok := allowed[name]
		if !ok {
			t.Errorf("package %s has no line in the import map of cmd/sluice/deps_test.go", name)
			continue
		}
		seen[name] = true
		may := map[string]bool{}
		for _, r := range rule {
			if r == "vocab" {
				for _, v := range vocab {
					may[v] = true
				}
				continue
			}
			may[r] = true
		}
		for _, imp := range p.Imports {
			if in, ok := strings.CutPrefix(imp, module); ok && !may[in] {
				t.Errorf("%s imports %s: against the direction (it may import %v)", name, in, rule)
			}
			switch imp {
			case "testing", "net/http/httptest":
				if name != "agent/cluster/memnet" && name != "agent/agenttest" {
					t.Errorf("%s imports %s: tests' packages do not belong in the binary", name, imp)
				}
			}
		}
	}
	for name := range allowed {
		if !seen[name] {
			t.Errorf("the import map names %s, which does not exist: take the line out", name)
		}
	}
}

// TestPackageComments wants exactly one package comment in every package.
func TestPackageComments(t *testing.T) {
	for _, p := range packages(t) {
		n := 0
		for _, f := range p.GoFiles {
			file, err := parser.ParseFile(token.NewFileSet(), filepath.Join(p.Dir, f), nil, parser.PackageClauseOnly|parser.ParseComments)
			if err != nil {
				t.Fatal(err)
			}
			if file.Doc != nil {
				n++
			}
		}
		if n != 1 {
			t.Errorf("%s has %d package comments, want 1", p.ImportPath, n)
		}
	}
}

// TestModule keeps replace directives out: a module with them cannot be
// installed with go install.
func TestModule(t *testing.T) {
	b, err := os.ReadFile("../../go.mod")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		if strings.HasPrefix(strings.TrimSpace(line), "replace") {
			t.Errorf("go.mod: %q", strings.TrimSpace(line))
		}
	}
}
