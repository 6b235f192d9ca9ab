package config

import (
	"encoding/json"
	"errors"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// TestParse holds the value of a source, in JSON, or its error.
func TestParse(t *testing.T) {
	for _, c := range []struct{ name, format, src, want string }{
		{"hcl values", formatHCL, `a = 1 b = -1.5 c = true d = "x\n\"y\"" e = 0x10 f = [1, "b", [true], {k = 1},] // end`,
			`[{"a":1,"b":-1.5,"c":true,"d":"x\n\"y\"","e":16,"f":[1,"b",[true],{"k":1}]}]`},
		{"hcl blocks", formatHCL, "a \"x\" { b = 1 }\r\na \"y\" {}, c { d { e = 1 } d { e = 2 } }\n/* no */ # nothing",
			`[{"a":[{"x":{"b":1}},{"y":{}}],"c":{"d":[{"e":1},{"e":2}]}}]`},
		{"hcl heredoc", formatHCL, "a = <<EOF\n one\n  two\nEOF\nb = <<-EOF\n  one\n    two\n  EOF\n", `[{"a":" one\n  two\n","b":"one\n  two\n"}]`},
		{"hcl interpolation stays", formatHCL, `a = "${b("c")}"`, `[{"a":"${b(\"c\")}"}]`},
		{"hcl key without value", formatHCL, "ports {\n  http =\n}\n", `f:3:1: expected a value, got "}"; the "{" of line 1 is open`},
		{"hcl bare word", formatHCL, "a = b", `f:1:5: expected a value, got b; write strings in quotes`},
		{"hcl key alone", formatHCL, "a", `f:1:3: expected "=" or "{" after the key a, got the end of the file`},
		{"hcl label with =", formatHCL, "a b = 1", `f:1:5: expected "{" after the labels of a, got "="`},
		{"hcl one brace too many", formatHCL, "a {}\n}", `f:2:1: expected a key, got "}"`},
		{"hcl list without commas", formatHCL, "a = [1 2]", `f:1:8: expected "," or "]", got 2`},
		{"hcl deep", formatHCL, strings.Repeat("a {", 300), `f:1:601: nested too deeply`},
		{"json values", formatJSON, `{"a": [1, 2.5, null, true, "ä"], "b": {}}`, `[{"a":[1,2.5,null,true,"ä"],"b":{}}]`},
		{"json columns are characters", formatJSON, `{"ä": x}`, `f:1:7: invalid character 'x' looking for beginning of value`},
		{"json ends early", formatJSON, `{"a": [1`, `f:1:9: unexpected end of file`},
		{"json goes on", formatJSON, `{} {}`, `f:1:4: unexpected text after the object`},
		{"json list", formatJSON, "\n [1]", `f:2:2: expected an object at the top level, got a list`},
		{"json deep", formatJSON, `{"a":` + strings.Repeat("[", 300), `f:1:205: nested too deeply`},
		{"byte order mark", formatJSON, "\ufeff{}", `[{}]`},
		{"empty", formatHCL, " \n", `null`},
		{"only a comment", formatHCL, "# a", `[{}]`},
		{"yaml values", formatYAML, "a: 1\nb: [x, 1.5, yes, true, null, ~]\nc: |\n  t\n  u\nd: {e: f}\n1: one\n", `[{"1":"one","a":1,"b":["x",1.5,"yes",true,null,null],"c":"t\nu\n","d":{"e":"f"}}]`},
		{"yaml documents", formatYAML, "# c\n---\na: 1\n---\n# none\n---\n\n---\nb: 2\n...\n--- \nc: 3\n", `[{"a":1},{"b":2},{"c":3}]`},
		{"yaml directive", formatYAML, "%YAML 1.2\n---\na: 1\n", `[{"a":1}]`},
		{"yaml error in second", formatYAML, "a: 1\n---\nb: [\n", `f:3:4: sequence end token ']' not found`},
		{"yaml merge", formatYAML, "x: &x {a: 1, b: 2}\ny:\n  b: 3\n  <<: *x\n", `[{"x":{"a":1,"b":2},"y":{"a":1,"b":3}}]`},
		{"yaml aliases without end", formatYAML, "a: &a [" + strings.Repeat("0,", 99) + "0]\n" +
			"b: &b [" + strings.Repeat("*a,", 99) + "*a]\nc: &c [" + strings.Repeat("*b,", 99) + "*b]\nd: [" + strings.Repeat("*c,", 99) + "*c]\n", `f:4:5: more than 1048576 values`},
		{"yaml list", formatYAML, "- a\n", `f:1:1: expected keys at the top level, got a list`},
		{"yaml tab", formatYAML, "a:\n\tb: 1\n", "f:2:1: found character '\t' that cannot start any token"},
	} {
		t.Run(c.name, func(t *testing.T) {
			docs, err := parse("f", c.format, []byte(c.src))
			var got string
			if err != nil {
				got = err.Error()
			} else {
				var values []any
				for _, d := range docs {
					values = append(values, d.value())
				}
				b, err := json.Marshal(values)
				if err != nil {
					t.Fatal(err)
				}
				got = string(b)
			}
			if diff := cmp.Diff(c.want, got); diff != "" {
				t.Errorf("parse (-want +got):\n%s", diff)
			}
		})
	}
}

func FuzzHCL(f *testing.F) {
	f.Add("service { name = \"web\" port = 80 checks = [{ ttl = \"1s\" }] }")
	f.Add("a \"b\" \"c\" { d = <<-EOF\n x\n EOF\n }")
	f.Add("node_meta { a = 1 } retry_join = [\"x\", true]")
	fuzz(f, formatHCL)
}

func FuzzJSON(f *testing.F) {
	f.Add(`{"service": [{"name": "web", "port": 80.0}], "segments": null}`)
	f.Add(`{"config_entries": {"bootstrap": [{"kind": "service-resolver", "name": "a", "subsets": {"v1": {"filter": "x"}}}]}}`)
	fuzz(f, formatJSON)
}

func FuzzYAML(f *testing.F) {
	f.Add("service:\n- kind: connect-proxy\n  proxy:\n  - destination_service_name: web\n  - upstreams: [{destination_name: api}]\n")
	f.Add("a: &a {b: 1}\nc:\n  <<: *a\n---\nports: {http: !!int 1}\n")
	f.Add("? a\n: b\n")
	fuzz(f, formatYAML)
}

// fuzz loads sources as an agent's file and as configuration entries: neither
// may panic, and a syntax error must have a position.
func fuzz(f *testing.F, format string) {
	f.Fuzz(func(t *testing.T, src string) {
		_, err := parse("f", format, []byte(src))
		var se *syntaxError
		if err != nil && (!errors.As(err, &se) || se.pos.Line < 1 || se.pos.Column < 1) {
			t.Errorf("error without a position: %v", err)
		}
		l := newLoader(machine)
		l.source("f", format, []byte(src))
		_, _, errs := l.finish(true)
		var all Problems
		if errs != nil && (!errors.As(errs, &all) || len(all) == 0) {
			t.Errorf("error %v is no Problems", errs)
		}
		_, _ = ParseEntries("f."+format, []byte(src))
	})
}
