package proxycfg_test

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/rogpeppe/go-internal/txtar"

	"github.com/sluicemesh/sluice/agent/catalog"
	"github.com/sluicemesh/sluice/proxycfg"
	"github.com/sluicemesh/sluice/proxycfg/proxycfgtest"
)

// TestBuild builds the cases in testdata/build; package proxycfgtest says what
// their sections are. UPDATE_GOLDEN=1 rewrites the last one.
func TestBuild(t *testing.T) {
	files, err := filepath.Glob("testdata/build/*.txtar")
	if err != nil || len(files) == 0 {
		t.Fatal("no cases", err)
	}
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".txtar"), func(t *testing.T) {
			ar, err := txtar.ParseFile(file)
			if err != nil {
				t.Fatal(err)
			}
			c, err := proxycfgtest.Parse(ar)
			if err != nil {
				t.Fatal(err)
			}
			snap, ws, err := proxycfg.Build(t.Context(), c.Source, c.Proxy)
			if len(ws) == 0 {
				t.Error("nothing to wait for")
			}
			got := describe(snap, err)
			i := slices.IndexFunc(ar.Files, func(f txtar.File) bool { return f.Name == "want" })
			if os.Getenv("UPDATE_GOLDEN") != "" {
				if i < 0 {
					ar.Files = append(ar.Files, txtar.File{Name: "want"})
					i = len(ar.Files) - 1
				}
				ar.Files[i].Data = []byte(got)
				if err := os.WriteFile(file, txtar.Format(ar), 0o644); err != nil {
					t.Fatal(err)
				}
				return
			}
			if i < 0 {
				t.Fatal("the case has no want section")
			}
			if diff := cmp.Diff(string(ar.Files[i].Data), got); diff != "" {
				t.Errorf("snapshot (-want +got):\n%s", diff)
			}
			again, _, _ := proxycfg.Build(t.Context(), c.Source, c.Proxy)
			if diff := cmp.Diff(got, describe(again, err)); diff != "" {
				t.Errorf("a second build differs:\n%s", diff)
			}
		})
	}
}

// describe writes a snapshot in lines.
func describe(s *proxycfg.Snapshot, err error) string {
	var b bytes.Buffer
	p := func(format string, args ...any) { fmt.Fprintf(&b, format+"\n", args...) }
	if err != nil {
		p("error: %v", err)
		return b.String()
	}
	p("index %d as of %s, incomplete %t", s.Index, s.AsOf.Format("15:04:05"), s.Incomplete())
	if g := s.Gateway; g != nil {
		for _, svc := range g.Services {
			p("service %s at %d, resolver %t: %s", svc.Name, svc.Index, svc.Resolver != nil, names(svc.Instances))
		}
		for _, dc := range g.Datacenters {
			p("datacenter %s: %s", dc.Name, names(dc.Gateways))
		}
		p("defaults %t", g.Defaults != nil)
	}
	if sc := s.Sidecar; sc != nil {
		p("service %s, identity %s", sc.Service, sc.Leaf.ServiceURI)
		for _, in := range sc.Intentions {
			p("intention %s: %s, precedence %d", in.SourceName, in.Action, in.Precedence)
		}
		for _, u := range sc.Upstreams {
			p("upstream %s mode %q from %q", u.Config.DestinationName, u.Mode, u.ModeFrom)
			if u.Err != "" || u.Pending {
				p("  error %q pending %t", u.Err, u.Pending)
			}
			for _, w := range u.Warnings {
				p("  warning %s", w)
			}
			for _, t := range u.Targets {
				p("  target %s", t.SNI)
				p("    %s", t.SPIFFE)
				p("    mode %q from %q, via %s in %s, wan %t: %s", t.Mode, t.ModeFrom, t.Via, t.ViaDC, t.WAN, names(t.Instances))
				if t.Filter != "" || t.OnlyPassing {
					p("    filter %s, only passing %t", t.Filter, t.OnlyPassing)
				}
				if t.Pending {
					p("    pending, error %q", t.Err)
				}
			}
		}
	}
	return b.String()
}

func names(instances []*catalog.Instance) string {
	var out []string
	for _, i := range instances {
		out = append(out, i.Service.ID)
	}
	return "[" + strings.Join(out, " ") + "]"
}

// TestBuildSharesInstances shows that a snapshot costs no copies.
func TestBuildSharesInstances(t *testing.T) {
	ar, err := txtar.ParseFile("testdata/build/gateway.txtar")
	if err != nil {
		t.Fatal(err)
	}
	c, err := proxycfgtest.Parse(ar)
	if err != nil {
		t.Fatal(err)
	}
	all, _, _ := c.Source.ConnectAll(nil)
	s, _, err := proxycfg.Build(t.Context(), c.Source, c.Proxy)
	if err != nil {
		t.Fatal(err)
	}
	for _, svc := range s.Gateway.Services {
		if &svc.Instances[0] != &all[svc.Name][0] {
			t.Errorf("instances of %s were copied", svc.Name)
		}
	}
}
