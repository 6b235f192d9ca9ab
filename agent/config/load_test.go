package config

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"sort"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/rogpeppe/go-internal/txtar"

	"github.com/sluicemesh/sluice/acl"
)

// fakeMachine answers alike everywhere.
type fakeMachine struct{ private string }

func (fakeMachine) Hostname() (string, error)      { return "host-1", nil }
func (m fakeMachine) PrivateIPv4() (string, error) { return m.private, nil }
func (fakeMachine) PublicIPv6() (string, error)    { return "2001:db8::1", nil }
func (fakeMachine) Expand(t string) (string, error) {
	switch {
	case strings.Contains(t, "eth0"):
		return "192.0.2.20", nil
	case strings.Contains(t, "GetAllInterfaces"):
		return "192.0.2.20 192.0.2.21", nil
	case strings.Contains(t, "bogus"):
		return "", errors.New(`function "bogus" not defined`)
	}
	return t, nil
}

var machine = fakeMachine{"192.0.2.10"}

// golden runs a test over every archive of a directory. The files of an archive
// whose name begins with "want" are what f must return; the others are written
// to a directory, which is the current one while f runs.
func golden(t *testing.T, dir string, f func(t *testing.T, a *txtar.Archive) map[string]string) {
	paths, err := filepath.Glob(filepath.Join("testdata", dir, "*.txtar"))
	if err != nil || len(paths) == 0 {
		t.Fatalf("no cases in %s: %v", dir, err)
	}
	for _, path := range paths {
		t.Run(strings.TrimSuffix(filepath.Base(path), ".txtar"), func(t *testing.T) {
			path, err := filepath.Abs(path)
			if err != nil {
				t.Fatal(err)
			}
			a, err := txtar.ParseFile(path)
			if err != nil {
				t.Fatal(err)
			}
			want := map[string]string{}
			var inputs []txtar.File
			work := t.TempDir()
			t.Chdir(work)
			for _, file := range a.Files {
				if strings.HasPrefix(file.Name, "want") {
					want[file.Name] = string(file.Data)
					continue
				}
				inputs = append(inputs, file)
				if err := os.MkdirAll(filepath.Dir(file.Name), 0o755); err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(file.Name, file.Data, 0o600); err != nil {
					t.Fatal(err)
				}
			}
			got := f(t, a)
			for name, text := range got {
				text = strings.ReplaceAll(text, work, "$WORK")
				if text != "" && !strings.HasSuffix(text, "\n") {
					text += "\n"
				}
				got[name] = text
				if text == "" {
					delete(got, name)
				}
			}
			if os.Getenv("UPDATE_GOLDEN") != "" {
				a.Files = inputs
				for _, name := range sortedKeys(got) {
					a.Files = append(a.Files, txtar.File{Name: name, Data: []byte(got[name])})
				}
				if err := os.WriteFile(path, txtar.Format(a), 0o644); err != nil {
					t.Fatal(err)
				}
				return
			}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("result (-want +got):\n%s", diff)
			}
		})
	}
}

// arguments are the lines of the archive's file "args"; without one, the
// directory conf.d is read.
func arguments(a *txtar.Archive) []string {
	for _, f := range a.Files {
		if f.Name == "args" {
			return strings.Split(strings.TrimSpace(string(f.Data)), "\n")
		}
	}
	return []string{"-config-dir=conf.d", "-data-dir=data"}
}

func load(t *testing.T, args ...string) (*Runtime, []Warning, error) {
	t.Helper()
	o, err := ParseFlags(args, t.Output())
	if err != nil {
		t.Fatal(err)
	}
	o.Machine = machine
	return Load(o)
}

// flatten writes v as lines "path = value", leaving out zero values.
func flatten(v reflect.Value, path string, out *[]string) {
	add := func(s string) { *out = append(*out, path+" = "+s) }
	if v.IsZero() {
		return
	}
	if _, ok := v.Interface().(fmt.Stringer); ok && v.Type() != reflect.TypeFor[acl.Secret]() && v.Kind() != reflect.Pointer {
		add(fmt.Sprint(v.Interface()))
		return
	}
	switch v.Kind() {
	case reflect.Pointer, reflect.Interface:
		flatten(v.Elem(), path, out)
	case reflect.Struct:
		for i := range v.NumField() {
			name := path + "." + v.Type().Field(i).Name
			if v.Type().Field(i).Anonymous {
				name = path
			}
			flatten(v.Field(i), strings.TrimPrefix(name, "."), out)
		}
	case reflect.Map:
		keys := v.MapKeys()
		sort.Slice(keys, func(i, j int) bool { return keys[i].String() < keys[j].String() })
		for _, k := range keys {
			flatten(v.MapIndex(k), path+"["+k.String()+"]", out)
		}
	case reflect.Slice:
		for i := range v.Len() {
			flatten(v.Index(i), fmt.Sprintf("%s[%d]", path, i), out)
		}
	default:
		add(fmt.Sprintf("%#v", v.Interface()))
	}
}

func lines(v any) []string {
	var out []string
	flatten(reflect.ValueOf(v), "", &out)
	return out
}

// TestLoad holds what configurations become, as the lines in which they differ
// from an agent with nothing configured, or what is wrong with them.
func TestLoad(t *testing.T) {
	golden(t, "load", func(t *testing.T, a *txtar.Archive) map[string]string {
		plain, _, err := load(t, "-data-dir=data")
		if err != nil {
			t.Fatal(err)
		}
		rt, warnings, err := load(t, arguments(a)...)
		got := map[string]string{}
		for _, w := range warnings {
			got["want.warnings"] += w.String() + "\n"
		}
		if err != nil {
			got["want.problems"] = err.Error()
			var p Problems
			if !errors.As(err, &p) {
				t.Errorf("error is a %T, not Problems", err)
			}
			return got
		}
		base := lines(*plain)
		var diff []string
		now := lines(*rt)
		for _, l := range now {
			if !slices.Contains(base, l) {
				diff = append(diff, l)
			}
		}
		for _, l := range base {
			key, _, _ := strings.Cut(l, " = ")
			if !slices.ContainsFunc(now, func(n string) bool { return strings.HasPrefix(n, key+" = ") }) {
				diff = append(diff, "- "+l)
			}
		}
		got["want.runtime"] = strings.Join(diff, "\n")
		return got
	})
}

// TestEntries holds what files of configuration entries become.
func TestEntries(t *testing.T) {
	golden(t, "entries", func(t *testing.T, a *txtar.Archive) map[string]string {
		got := map[string]string{}
		for _, f := range a.Files {
			if strings.HasPrefix(f.Name, "want") {
				continue
			}
			entries, err := LoadEntries(f.Name)
			if err != nil {
				got["want.problems"] += err.Error() + "\n"
				continue
			}
			for _, e := range entries {
				var b bytes.Buffer
				enc := json.NewEncoder(&b)
				enc.SetIndent("", "  ")
				if err := enc.Encode(e); err != nil {
					t.Fatal(err)
				}
				got["want.entries"] += b.String()
			}
		}
		return got
	})
}

// TestServiceFile holds what files of service definitions become.
func TestServiceFile(t *testing.T) {
	golden(t, "service", func(t *testing.T, a *txtar.Archive) map[string]string {
		got := map[string]string{}
		for _, f := range a.Files {
			if strings.HasPrefix(f.Name, "want") {
				continue
			}
			services, warnings, err := ParseServiceFile(f.Name)
			for _, w := range warnings {
				got["want.warnings"] += w.String() + "\n"
			}
			if err != nil {
				got["want.problems"] += err.Error() + "\n"
				continue
			}
			for _, s := range services {
				got["want.services"] += strings.Join(lines(s), "\n") + "\n"
			}
		}
		return got
	})
}

// TestMergeOrder has every source set the same keys and takes the sources away
// one by one, from the strongest.
func TestMergeOrder(t *testing.T) {
	t.Chdir(t.TempDir())
	write := func(name, text string) {
		t.Helper()
		if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("d/b.hcl", `datacenter = "b" retry_join = ["b"] node_meta { who = "b" b = "1" } performance { raft_multiplier = 2 }`)
	write("d/a.json", `{"datacenter": "a", "retry_join": ["a"], "node_meta": {"who": "a", "a": "1"}, "performance": {"leave_drain_time": "1s"}}`)
	write("c.yaml", "datacenter: c\nretry_join: [c]\nnode_meta: {who: c, c: '1'}\n")
	write("d/sub/x.hcl", `datacenter = "not read"`)

	type result struct {
		DC         string
		Join       []string
		Meta       map[string]string
		Multiplier int
		Drain      string
	}
	for _, c := range []struct {
		name string
		args []string
		want result
	}{
		{"fragment beats flag", []string{"-dev", "-datacenter=f", "-retry-join=f", "-node-meta=who:f", "-config-dir=d", "-config-file=c.yaml", `-hcl=datacenter = "h" retry_join = ["h"] node_meta { who = "h" }`},
			result{"h", []string{"f", "a", "b", "c", "h"}, map[string]string{"who": "h", "a": "1", "b": "1", "c": "1"}, 2, "1s"}},
		{"scalar flag beats files, lists come first", []string{"-dev", "-datacenter=f", "-retry-join=f", "-node-meta=who:f", "-config-dir=d", "-config-file=c.yaml"},
			result{"f", []string{"f", "a", "b", "c"}, map[string]string{"who": "c", "a": "1", "b": "1", "c": "1"}, 2, "1s"}},
		{"files in the order of the flags", []string{"-dev", "-config-file=c.yaml", "-config-dir=d"},
			result{"b", []string{"c", "a", "b"}, map[string]string{"who": "b", "a": "1", "b": "1", "c": "1"}, 2, "1s"}},
		{"files beat the dev settings", []string{"-dev", "-config-file=d/a.json"},
			result{"a", []string{"a"}, map[string]string{"who": "a", "a": "1"}, 1, "1s"}},
		{"defaults", []string{"-data-dir=x", "-config-file=d/a.json"},
			result{"a", []string{"a"}, map[string]string{"who": "a", "a": "1"}, 5, "1s"}},
		{"join is appended", []string{"-data-dir=x", "-join=1.1.1.1", "-config-file=d/a.json"},
			result{"a", []string{"1.1.1.1", "a"}, map[string]string{"who": "a", "a": "1"}, 5, "1s"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			rt, _, err := load(t, c.args...)
			if err != nil {
				t.Fatal(err)
			}
			got := result{rt.Node.Datacenter, rt.Cluster.RetryJoin, rt.Node.Meta, rt.Performance.RaftMultiplier, rt.Cluster.LeaveDrain.String()}
			if diff := cmp.Diff(c.want, got); diff != "" {
				t.Errorf("merged (-want +got):\n%s", diff)
			}
		})
	}
}

func TestDirectory(t *testing.T) {
	t.Chdir(t.TempDir())
	for name, text := range map[string]string{
		"d/a.hcl": `datacenter = "one"`, "d/notes.txt": "not a configuration", "d/empty.json": "  \n",
		"real.yml": "node_name: linked\n", "x.conf": `{"datacenter": "three"}`,
	} {
		if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink("../real.yml", "d/link.yml"); err != nil {
		t.Fatal(err)
	}
	rt, warnings, err := load(t, "-dev", "-config-dir=d")
	if err != nil {
		t.Fatal(err)
	}
	if rt.Node.Name != "linked" || rt.Node.Datacenter != "one" {
		t.Errorf("node %q in %q, want what the link and a.hcl say", rt.Node.Name, rt.Node.Datacenter)
	}
	want := "skipping file d/notes.txt, extension must be .hcl, .json, .yaml or .yml, or config format must be set"
	if len(warnings) != 1 || warnings[0].String() != want {
		t.Errorf("warnings %q, want %q", warnings, want)
	}
	if _, _, err = load(t, "-dev", "-config-file=x.conf", "-config-file=none.hcl"); err == nil ||
		!strings.Contains(err.Error(), "file x.conf has unknown extension") ||
		!strings.Contains(err.Error(), "config: Open failed on none.hcl. no such file or directory") {
		t.Errorf("error %v, want both files named", err)
	}
	if rt, _, err = load(t, "-dev", "-config-format=json", "-config-file=x.conf"); err != nil || rt.Node.Datacenter != "three" {
		t.Errorf("with a format: %v, %v", rt, err)
	}
	// Validate asks the real machine, which need not have an address of its own.
	if err := os.WriteFile("d/bind.hcl", []byte(`bind_addr = "127.0.0.1"`), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := Validate([]string{"d"}); err == nil || err.Error() != "data_dir cannot be empty" {
		t.Errorf("validate: %v, want that data_dir is missing", err)
	}
	if err := os.WriteFile("d/data.yaml", []byte("data_dir: data\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := Validate([]string{"d"}); err != nil {
		t.Errorf("validate: %v", err)
	}
	if _, err := os.Stat("data"); !os.IsNotExist(err) {
		t.Errorf("data directory: %v, want that validating makes none", err)
	}
}

// TestGuess reads an entry from a source without a name that tells its format.
func TestGuess(t *testing.T) {
	for _, src := range []string{
		`{"Kind": "proxy-defaults", "Name": "global"}`,
		"Kind = \"proxy-defaults\"\nName = \"global\"\nMeshGateway {\n  Mode = \"local\"\n}\n",
		"# comment\nkind: proxy-defaults\nname: global\n",
		"---\nkind: proxy-defaults\n",
	} {
		entries, err := ParseEntries("-", []byte(src))
		if err != nil || len(entries) != 1 || entries[0].GetKind() != "proxy-defaults" {
			t.Errorf("%q: %v, %v", src, entries, err)
		}
	}
}

func TestFlags(t *testing.T) {
	for _, c := range []struct {
		args []string
		want string
	}{
		{[]string{"-no-such"}, "flag provided but not defined: -no-such"},
		{[]string{"-http-port=x"}, `invalid value "x" for flag -http-port: expected a whole number`},
		{[]string{"-dev", "extra"}, "Unexpected extra arguments: [extra]"},
		{[]string{"-config-format=toml"}, `invalid value "toml" for flag -config-format: expected "hcl", "json" or "yaml"`},
		{[]string{"-node-meta=novalue"}, `invalid value "novalue" for flag -node-meta: expected key:value`},
	} {
		if _, err := ParseFlags(c.args, io.Discard); err == nil || err.Error() != c.want {
			t.Errorf("%v: error %v, want %s", c.args, err, c.want)
		}
	}
	// A flag that sets a key must set one that exists: a slip in the table would
	// otherwise show only to who uses the flag.
	var d decoder
	for _, g := range flagGroups {
		for _, f := range g.flags {
			var v any
			switch f.kind {
			case stringFlag, listFlag:
				v = "1.1.1.1/8"
			case intFlag:
				v = int64(1)
			case boolFlag:
				v = true
			case durationFlag:
				v = "1s"
			case pairFlag:
				v = [2]string{"a", "b"}
			case optionFlag:
				continue
			}
			o := Options{flags: []flagValue{{f, v}}}
			for _, lists := range []bool{true, false} {
				d.decode(o.tree(lists), reflect.ValueOf(new(settings)).Elem(), "")
			}
			if !strings.Contains(Usage(), "  -"+f.name) {
				t.Errorf("usage lacks -%s", f.name)
			}
		}
	}
	if len(d.problems) > 0 {
		t.Error(d.problems)
	}
}

// TestLoneServer gives a server that founds a datacenter alone the fast timings,
// unless it asks for others.
func TestLoneServer(t *testing.T) {
	const base = `data_dir = "/tmp/x" node_name = "n" bind_addr = "127.0.0.1" server = true `
	for hcl, want := range map[string]int{
		base + `bootstrap_expect = 1`:                                     1,
		base + `bootstrap = true`:                                         1,
		base + `bootstrap_expect = 3`:                                     5,
		base + `bootstrap_expect = 1 performance { raft_multiplier = 7 }`: 7,
	} {
		rt, _, err := Load(Options{HCL: []string{hcl}})
		if err != nil {
			t.Fatal(err)
		}
		if got := rt.Performance.RaftMultiplier; got != want {
			t.Errorf("%s: multiplier %d, want %d", hcl, got, want)
		}
	}
}
