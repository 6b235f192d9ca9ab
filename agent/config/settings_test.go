package config

import (
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/hashicorp/consul/api"

	"github.com/sluicemesh/sluice/acl"
)

// probes are values of a type that are unlikely to be its default: a key that is
// mapped at all shows with one of them.
func probes(t reflect.Type) []any {
	for t.Kind() == reflect.Pointer {
		t = t.Elem()
	}
	switch {
	case t == durationType:
		return []any{"11h"}
	case t.Kind() == reflect.String:
		return []any{"10.1.1.1", "probe", "deny"}
	case t.Kind() == reflect.Bool:
		return []any{true, false}
	case t.Kind() == reflect.Int:
		return []any{int64(7), int64(21001)}
	case t.Kind() == reflect.Float32, t.Kind() == reflect.Float64:
		return []any{1.5}
	}
	return nil
}

// probeNodes are sources for a value of type t.
func probeNodes(t reflect.Type, pos Pos) []*node {
	var out []*node
	scalars := func(t reflect.Type) (out []*node) {
		for _, v := range probes(t) {
			out = append(out, &node{pos: pos, scalar: v})
		}
		return out
	}
	if t == entryType {
		kind := &node{pos: pos, scalar: "proxy-defaults"}
		return []*node{{pos: pos, kind: mapNode, entries: []entry{{"kind", pos, kind}}}}
	}
	switch t.Kind() {
	case reflect.Slice:
		elems := scalars(t.Elem())
		if len(elems) == 0 {
			elems = probeNodes(t.Elem(), pos)
		}
		for _, e := range elems {
			out = append(out, &node{pos: pos, kind: listNode, list: []*node{e}})
		}
	case reflect.Map:
		elems := scalars(t.Elem())
		if len(elems) == 0 {
			elems = probeNodes(t.Elem(), pos)
		}
		if t.Elem().Kind() == reflect.Interface {
			elems = []*node{{pos: pos, scalar: "probe"}}
		}
		for _, e := range elems {
			out = append(out, &node{pos: pos, kind: mapNode, entries: []entry{{"probe", pos, e}}})
		}
	case reflect.Pointer:
		return probeNodes(t.Elem(), pos)
	case reflect.Struct:
		var d decoder
		for _, f := range d.fieldsOf(t) {
			for _, v := range scalars(f.typ) {
				out = append(out, &node{pos: pos, kind: mapNode, entries: []entry{{f.keys[0], pos, v}}})
			}
		}
	default:
		out = scalars(t)
	}
	return out
}

// TestEveryKeyCounts sets each key of the settings in turn, in a few contexts,
// and fails where nothing comes of it: neither a change of the runtime
// configuration nor a word about the value. A key that is decoded and then
// forgotten shows here.
func TestEveryKeyCounts(t *testing.T) {
	t.Chdir(t.TempDir())
	contexts := []string{
		`data_dir = "data"`,
		`data_dir = "data" server = true`,
		`data_dir = "data" client_addr = "127.0.0.2" server = true ports { https = 8501 grpc = 8502 grpc_tls = 8503 } tls { https { cert_file = "x" } grpc { cert_file = "x" } }`,
	}
	run := func(context string, n *node) (string, []string) {
		l := newLoader(machine)
		l.source("context", formatHCL, []byte(context))
		if n != nil {
			l.tree(n)
		}
		rt, warnings, err := l.finish(false)
		// Problems and warnings that are about the key, but for those that hold of
		// any value: that it is deprecated.
		said := ""
		for _, w := range warnings {
			if w.Pos.File == "probe" && !strings.Contains(w.Text, "deprecated") {
				said += w.String()
			}
		}
		if err != nil {
			said += err.Error()
		}
		if rt == nil {
			return said, nil
		}
		return said, lines(*rt)
	}
	type base struct {
		said string
		rt   string
	}
	bases := make([]base, len(contexts))
	for i, c := range contexts {
		said, rt := run(c, nil)
		bases[i] = base{said, strings.Join(rt, "\n")}
	}
	var d decoder
	var walk func(typ reflect.Type, path string, wrap func(*node) *node)
	checked := 0
	walk = func(typ reflect.Type, path string, wrap func(*node) *node) {
		for _, f := range d.fieldsOf(typ) {
			if f.typ == ignoredType || f.typ == unsupportedType {
				continue
			}
			key := join(path, f.keys[0])
			pos := Pos{"probe", 1, 1}
			in := func(v *node) *node {
				return wrap(&node{pos: pos, kind: mapNode, entries: []entry{{f.keys[0], pos, v}}})
			}
			if elem := f.typ; elem.Kind() == reflect.Struct {
				walk(elem, key, in)
				continue
			}
			checked++
			counts := false
			for _, v := range probeNodes(f.typ, pos) {
				for i, c := range contexts {
					said, rt := run(c, in(v))
					if said != bases[i].said || strings.Join(rt, "\n") != bases[i].rt {
						counts = true
					}
				}
			}
			if !counts {
				t.Errorf("%s: no value of it makes a difference", key)
			}
		}
	}
	top := func(n *node) *node { return n }
	walk(reflect.TypeFor[settings](), "", top)
	if checked < 120 {
		t.Errorf("only %d keys were found", checked)
	}

	// The elements of lists, beside what makes them valid.
	for _, list := range []struct {
		key string
		typ reflect.Type
		min string
	}{
		{"services", reflect.TypeFor[serviceSettings](), `name = "web" port = 80`},
		{"checks", reflect.TypeFor[checkSettings](), `name = "c" tcp = "127.0.0.1:1" interval = "5s"`},
	} {
		elem := func(extra *node) *node {
			n, err := parseHCL("context", []byte(list.min))
			if err != nil {
				t.Fatal(err)
			}
			if extra != nil {
				n.entries = append(n.entries, extra.entries...)
			}
			return &node{kind: mapNode, entries: []entry{{list.key, Pos{}, n}}}
		}
		said, rt := run(contexts[0], elem(nil))
		baseline := said + strings.Join(rt, "\n")
		for _, f := range d.fieldsOf(list.typ) {
			if f.typ == ignoredType || f.typ == unsupportedType {
				continue
			}
			pos := Pos{"probe", 1, 1}
			counts := false
			for _, v := range probeNodes(f.typ, pos) {
				said, rt := run(contexts[0], elem(&node{kind: mapNode, entries: []entry{{f.keys[0], pos, v}}}))
				counts = counts || said+strings.Join(rt, "\n") != baseline
			}
			if !counts {
				t.Errorf("%s.%s: no value of it makes a difference", list.key, f.keys[0])
			}
		}
	}
}

// TestKeys fails when two fields of a block share a key, of which one would never
// be read.
func TestKeys(t *testing.T) {
	var d decoder
	seen := map[reflect.Type]bool{}
	var walk func(reflect.Type)
	walk = func(typ reflect.Type) {
		for typ.Kind() == reflect.Pointer || typ.Kind() == reflect.Slice || typ.Kind() == reflect.Map {
			typ = typ.Elem()
		}
		if typ.Kind() != reflect.Struct || seen[typ] || typ == entryType || typ == timeType {
			return
		}
		seen[typ] = true
		keys := map[string]int{}
		for i, f := range d.fieldsOf(typ) {
			for _, k := range append(append([]string{}, f.keys...), f.camel...) {
				if j, ok := keys[k]; ok && j != i {
					t.Errorf("%s: two fields have the key %q", typ, k)
				}
				keys[k] = i
				if k != strings.ToLower(k) || strings.TrimSpace(k) != k || k == "" {
					t.Errorf("%s: key %q is not in lower case", typ, k)
				}
			}
			walk(f.typ)
		}
	}
	walk(reflect.TypeFor[settings]())
	for _, kind := range []any{
		api.ProxyConfigEntry{}, api.ServiceConfigEntry{}, api.ServiceResolverConfigEntry{}, api.ServiceRouterConfigEntry{},
		api.ServiceSplitterConfigEntry{}, api.ServiceIntentionsConfigEntry{}, api.MeshConfigEntry{}, api.ExportedServicesConfigEntry{},
	} {
		walk(reflect.TypeOf(kind))
	}
}

func TestSnake(t *testing.T) {
	for name, want := range map[string]string{
		"ID": "id", "LocalBindPort": "local_bind_port", "TLSSkipVerify": "tls_skip_verify", "GRPCUseTLS": "grpc_use_tls",
		"DestinationServiceID": "destination_service_id", "HTTP": "http", "EnvoyListenerJSON": "envoy_listener_json",
	} {
		if got := snake(name); got != want {
			t.Errorf("snake(%q) = %q, want %q", name, got, want)
		}
	}
}

// TestSecrets fails when a secret of a configuration can be printed: in the
// runtime configuration and in the errors about it.
func TestSecrets(t *testing.T) {
	t.Chdir(t.TempDir())
	const secret = "pUqJrVyVRj5jsiYEkM/tFQYfWyJIv4s3XkvDwy7Cu5s="
	text := fmt.Sprintf(`data_dir = "data" encrypt = %[1]q acl { tokens { agent = %[1]q default = %[1]q } }
service { name = "a" port = 1 token = %[1]q connect { sidecar_service { token = %[1]q } } }`, secret)
	l := newLoader(machine)
	l.source("f", formatHCL, []byte(text))
	rt, _, err := l.finish(false)
	if err != nil {
		t.Fatal(err)
	}
	if out := fmt.Sprintf("%+v %#v", *rt, *rt); strings.Contains(out, secret) {
		t.Errorf("the runtime configuration prints a secret")
	}
	if rt.Services[0].Definition.SidecarToken != acl.Secret(secret) || rt.ACL.Agent.Reveal() != secret {
		t.Error("a token got lost")
	}
	l = newLoader(machine)
	l.source("f", formatHCL, []byte(`data_dir = "data" encrypt = "not base64 s3cr3t" acl { tokens { agent = 53 default = ["s3cr3t"] } }`))
	if _, _, err = l.finish(false); err == nil || strings.Contains(err.Error(), "s3cr3t") || strings.Contains(err.Error(), "53:") {
		t.Errorf("error %v prints a secret, or there is none", err)
	}
}

func TestEnsureID(t *testing.T) {
	dir := t.TempDir()
	n := Node{DataDir: dir}
	first, err := n.EnsureID()
	if err != nil || !uuid.MatchString(first) {
		t.Fatalf("new ID %q, %v", first, err)
	}
	if again, err := n.EnsureID(); again != first || err != nil {
		t.Errorf("second ID %q, %v, want %q", again, err, first)
	}
	fi, err := os.Stat(filepath.Join(dir, "node-id"))
	if err != nil || fi.Mode().Perm() != 0o600 || fi.Size() != 36 {
		t.Errorf("file %v, %v, want 36 bytes of mode 0600", fi, err)
	}
	n.ID = "5ac3e1a8-0f0c-5a3e-8ee2-23d2fdd1ed5c"
	if id, err := n.EnsureID(); id != n.ID || err != nil {
		t.Errorf("configured ID %q, %v", id, err)
	}
	if kept, err := (Node{DataDir: dir}).EnsureID(); kept != n.ID || err != nil {
		t.Errorf("kept ID %q, %v, want the configured one", kept, err)
	}
	if err := os.WriteFile(filepath.Join(dir, "node-id"), []byte("broken"), 0o600); err != nil {
		t.Fatal(err)
	}
	if id, err := (Node{DataDir: dir}).EnsureID(); err == nil {
		t.Errorf("broken file gives %q", id)
	}
	if id, err := (Node{}).EnsureID(); err != nil || !uuid.MatchString(id) {
		t.Errorf("without a directory: %q, %v", id, err)
	}
}

func TestAdvertise(t *testing.T) {
	t.Chdir(t.TempDir())
	for _, c := range []struct {
		name, private, hcl, want string
	}{
		{"one private address", "192.0.2.10", ``, "192.0.2.10 192.0.2.10"},
		{"none", "", ``, "No private IPv4 address found. Please configure one with 'bind' and/or 'advertise'."},
		{"several", "192.0.2.10 192.0.2.11", ``, "Multiple private IPv4 addresses found. Please configure one with 'bind' and/or 'advertise'."},
		{"several, but configured", "192.0.2.10 192.0.2.11", `advertise_addr = "192.0.2.11"`, "192.0.2.11 192.0.2.11"},
		{"bound", "", `bind_addr = "192.0.2.12" advertise_addr_wan = "203.0.113.1"`, "192.0.2.12 203.0.113.1"},
		{"all of IPv6", "", `bind_addr = "::"`, "2001:db8::1 2001:db8::1"},
		{"by family", "", `bind_addr = "192.0.2.12" advertise_addr_ipv6 = "2001:db8::2" advertise_addr_wan_ipv4 = "203.0.113.2"`, "2001:db8::2 203.0.113.2"},
		{"wrong family", "", `bind_addr = "192.0.2.12" advertise_addr_ipv6 = "192.0.2.13"`, "f:1:48: advertise_addr_ipv6: 192.0.2.13 is of the other family"},
		{"template", "", `bind_addr = "{{ GetInterfaceIP \"eth0\" }}"`, "192.0.2.20 192.0.2.20"},
		{"template of many", "", `bind_addr = "{{ GetAllInterfaces }}"`, "f:1:13: bind_addr cannot contain multiple addresses: 192.0.2.20 192.0.2.21"},
		{"bad template", "", `bind_addr = "{{ bogus }}"`, `f:1:13: bind_addr: error parsing "{{ bogus }}": function "bogus" not defined`},
		{"empty", "", `bind_addr = ""`, "f:1:13: bind_addr cannot be empty"},
	} {
		t.Run(c.name, func(t *testing.T) {
			l := newLoader(fakeMachine{c.private})
			l.source("f", formatHCL, []byte(c.hcl+"\ndata_dir = \"data\""))
			rt, _, err := l.finish(false)
			var got string
			if err != nil {
				got = err.Error()
			} else {
				got = rt.Network.Advertise.String() + " " + rt.Network.AdvertiseWAN.String()
			}
			if got != c.want {
				t.Errorf("got %q, want %q", got, c.want)
			}
		})
	}
}

func TestRealMachine(t *testing.T) {
	m := realMachine{}
	if got, err := m.Expand("127.0.0.1"); got != "127.0.0.1" || err != nil {
		t.Errorf("expand without a template: %q, %v", got, err)
	}
	if got, err := m.Expand(`{{ GetAllInterfaces | include "name" "^lo$" | include "type" "IPv4" | join "address" " " }}`); got != "127.0.0.1" || err != nil {
		t.Errorf("expand a template: %q, %v", got, err)
	}
	if _, err := m.Expand(`{{ nothing }}`); err == nil {
		t.Error("a bad template has no error")
	}
	if _, err := m.PublicIPv6(); err != nil {
		t.Errorf("public IPv6: %v", err)
	}
}
