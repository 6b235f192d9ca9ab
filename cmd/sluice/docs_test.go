package main

import (
	"bytes"
	"flag"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/sluicemesh/sluice/agent/config"
	"github.com/sluicemesh/sluice/cmd/internal/cli"
)

// root is the top of the repository, seen from here.
const root = "../.."

func page(t *testing.T, name string) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(root, name))
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// TestConfigurationPage wants every key and every flag of the agent on the page.
// The keys are read from the tags of the structs that configuration is decoded
// into.
func TestConfigurationPage(t *testing.T) {
	text := page(t, "website/configuration.md")
	file, err := parser.ParseFile(token.NewFileSet(), filepath.Join(root, "agent/config/settings.go"), nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	structs := map[string]*ast.StructType{}
	ast.Inspect(file, func(n ast.Node) bool {
		if spec, ok := n.(*ast.TypeSpec); ok {
			if s, ok := spec.Type.(*ast.StructType); ok {
				structs[spec.Name.Name] = s
			}
		}
		return true
	})
	keys := 0
	documented := func(path string) {
		keys++
		if strings.Contains(text, "`"+path+"`") {
			return
		}
		// Blocks that occur more than once are described once, without their path.
		for _, block := range []string{"tls.", "services.", "checks."} {
			if rest, ok := strings.CutPrefix(path, block); ok && strings.Contains(text, "`"+rest[strings.LastIndexByte(rest, '.')+1:]+"`") {
				return
			}
		}
		t.Errorf("website/configuration.md lacks %s", path)
	}
	var walk func(s *ast.StructType, path string)
	walk = func(s *ast.StructType, path string) {
		for _, f := range s.Fields.List {
			typ := f.Type
			for {
				if p, ok := typ.(*ast.StarExpr); ok {
					typ = p.X
				} else if a, ok := typ.(*ast.ArrayType); ok {
					typ = a.Elt
				} else {
					break
				}
			}
			var inner *ast.StructType
			switch x := typ.(type) {
			case *ast.StructType:
				inner = x
			case *ast.Ident:
				inner = structs[x.Name]
			}
			if len(f.Names) == 0 { // embedded
				if inner != nil {
					walk(inner, path)
				}
				continue
			}
			raw, err := strconv.Unquote(f.Tag.Value)
			if err != nil {
				t.Fatal(err)
			}
			tag := reflect.StructTag(raw).Get("config")
			names := strings.Split(tag, ",")
			switch id, _ := typ.(*ast.Ident); {
			case tag == "-":
			case id != nil && id.Name == "ignored":
				for _, n := range names {
					documented(path + n)
				}
			case id != nil && id.Name == "serviceSettings" && path != "": // a sidecar is a service
				documented(path + names[0])
			case inner != nil && path+names[0] != "config_entries.bootstrap":
				walk(inner, path+names[0]+".")
			default:
				documented(path + names[0])
			}
		}
	}
	walk(structs["settings"], "")
	if keys < 200 {
		t.Errorf("only %d keys were found", keys)
	}
	config.NewFlagSet(new(config.Options), io.Discard).VisitAll(func(f *flag.Flag) {
		if !strings.Contains(text, "`-"+f.Name+"`") {
			t.Errorf("website/configuration.md lacks the flag -%s", f.Name)
		}
	})
}

// TestCommandPage keeps the page of commands equal to what they say of
// themselves; UPDATE_GOLDEN=1 writes it anew.
func TestCommandPage(t *testing.T) {
	help := func(args ...string) string {
		var out bytes.Buffer
		if code := cli.Run(append(args, "-h"), strings.NewReader(""), &out, &out); code != 0 {
			t.Fatalf("sluice %s -h ends with %d:\n%s", strings.Join(args, " "), code, out.String())
		}
		return strings.TrimRight(out.String(), "\n ")
	}
	var b strings.Builder
	b.WriteString("# Commands\n\nWritten by a test from the commands' own help; change it there.\n\n")
	fmt.Fprintf(&b, "```\n%s\n```\n", help())
	common := ""
	item := regexp.MustCompile(`(?m)^    ([a-z][a-z-]*)  +\S`)
	var walk func(text string, parent ...string)
	walk = func(text string, parent ...string) {
		for _, m := range item.FindAllStringSubmatch(text, -1) {
			args := append(append([]string(nil), parent...), m[1])
			h := help(args...)
			shown, http, ok := strings.Cut(h, "\nHTTP API options:\n")
			if ok {
				common = http
				shown += "\nand the HTTP API options"
			}
			fmt.Fprintf(&b, "\n## sluice %s\n\n```\n%s\n```\n", strings.Join(args, " "), strings.TrimRight(shown, "\n "))
			if strings.Contains(h, "\nSubcommands:\n") {
				walk(h, args...)
			}
		}
	}
	walk(help())
	fmt.Fprintf(&b, "\n## HTTP API options\n\nOf every command that speaks to an agent.\n\n```\n%s\n```\n", strings.Trim(common, "\n"))
	const name = "website/cli.md"
	if os.Getenv("UPDATE_GOLDEN") != "" {
		if err := os.WriteFile(filepath.Join(root, name), []byte(b.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if diff := cmp.Diff(b.String(), page(t, name)); diff != "" {
		t.Errorf("%s is not current; run with UPDATE_GOLDEN=1 (-want +got):\n%s", name, diff)
	}
}

// machine stands for the one that the examples are to run on.
type machine struct{}

func (machine) Hostname() (string, error)    { return "node", nil }
func (machine) PrivateIPv4() (string, error) { return "10.0.0.1", nil }
func (machine) PublicIPv6() (string, error)  { return "", nil }
func (machine) Expand(s string) (string, error) {
	return strings.NewReplacer("{{ GetPrivateIP }}", "10.0.0.1").Replace(s), nil
}

// TestExamples reads the files in the documentation as what they are: an agent's
// configuration, a config entry or a service definition. A file is a code block
// whose first line is a comment with its name.
func TestExamples(t *testing.T) {
	block := regexp.MustCompile("(?s)```(?:hcl|yaml|json)\n# ([a-z0-9-]+\\.(?:hcl|yaml|json))[^\n]*\n(.*?)```")
	found := 0
	for _, name := range markdown(t) {
		for _, m := range block.FindAllStringSubmatch(page(t, name), -1) {
			found++
			file, text := m[1], m[2]
			t.Run(name+"/"+file, func(t *testing.T) {
				t.Chdir(t.TempDir())
				if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
					t.Fatal(err)
				}
				var err error
				var warnings []config.Warning
				switch {
				case regexp.MustCompile(`(?m)^(Kind|kind)\s*[=:]`).MatchString(text):
					_, err = config.LoadEntries(file)
				case strings.Contains(text, "data_dir"):
					_, warnings, err = config.Load(config.Options{Paths: []string{file}, Machine: machine{}})
				default:
					_, warnings, err = config.ParseServiceFile(file)
				}
				if err != nil {
					t.Error(err)
				}
				for _, w := range warnings {
					t.Errorf("warning: %s", w)
				}
			})
		}
	}
	if found < 8 {
		t.Errorf("only %d examples were found", found)
	}
}

// markdown returns the pages of the repository.
func markdown(t *testing.T) []string {
	t.Helper()
	names := []string{"README.md", "CONTRIBUTING.md"}
	err := filepath.WalkDir(filepath.Join(root, "website"), func(path string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() && filepath.Ext(path) == ".md" {
			rel, rerr := filepath.Rel(root, path)
			names, err = append(names, rel), rerr
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return names
}

// TestLinks follows the links between pages, and those to the source.
func TestLinks(t *testing.T) {
	link := regexp.MustCompile(`\]\(([^)#\s]+)?(?:#([^)]+))?\)`)
	heading := regexp.MustCompile(`(?m)^#+ (.*)$`)
	for _, name := range markdown(t) {
		for _, m := range link.FindAllStringSubmatch(page(t, name), -1) {
			target, anchor := m[1], m[2]
			if strings.Contains(target, "://") {
				continue
			}
			path := name
			if target != "" {
				path = filepath.Join(filepath.Dir(name), target)
			}
			if _, err := os.Stat(filepath.Join(root, path)); err != nil {
				t.Errorf("%s: link to %s: %v", name, target, err)
				continue
			}
			if anchor == "" {
				continue
			}
			ok := false
			for _, h := range heading.FindAllStringSubmatch(page(t, path), -1) {
				slug := regexp.MustCompile(`[^a-z0-9 _-]`).ReplaceAllString(strings.ToLower(h[1]), "")
				ok = ok || strings.ReplaceAll(slug, " ", "-") == anchor
			}
			if !ok {
				t.Errorf("%s: %s has no heading #%s", name, path, anchor)
			}
		}
	}
}

// TestCompatibilityPage wants every file on the page that says it differs from
// Consul, and the reasons of refusals on that of gateways.
func TestCompatibilityPage(t *testing.T) {
	text := page(t, "website/compat.md")
	marked := 0
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || filepath.Ext(path) != ".go" || strings.HasSuffix(path, "_test.go") {
			return err
		}
		b, err := os.ReadFile(path)
		if err != nil || !bytes.Contains(b, []byte("COMPAT:")) {
			return err
		}
		marked++
		rel, err := filepath.Rel(root, path)
		if !strings.Contains(text, "(../"+filepath.ToSlash(rel)+")") {
			t.Errorf("website/compat.md does not name %s", rel)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	if marked < 5 {
		t.Errorf("only %d files were found", marked)
	}
	gateways := page(t, "website/gateways.md")
	reasons := regexp.MustCompile(`(?m)^\tRefuse\w+ += "([a-z-]+)"`).FindAllStringSubmatch(page(t, "gateway/dataplane.go"), -1)
	if len(reasons) < 10 {
		t.Errorf("only %d reasons were found", len(reasons))
	}
	for _, m := range reasons {
		if !strings.Contains(gateways, "| `"+m[1]+"` |") {
			t.Errorf("website/gateways.md lacks the reason %s", m[1])
		}
	}
}
