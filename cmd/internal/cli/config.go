package cli

import (
	"encoding/json"
	"flag"
	"fmt"

	"github.com/sluicemesh/sluice/agent/config"
	"github.com/sluicemesh/sluice/agent/configentry"
)

func (e *env) configCommands() []*command {
	var kind, name, filename string
	var cas bool
	var index uint64
	selectors := func(fs *flag.FlagSet) {
		fs.StringVar(&kind, "kind", "", "`kind` of the entry, such as proxy-defaults")
		fs.StringVar(&name, "name", "", "`name` of the entry")
	}
	return []*command{
		{
			name: "config write", args: "FILE", http: true, synopsis: "Write configuration entries",
			help: "Writes the configuration entries of a file (.hcl, .json, .yaml or .yml), or of\nstandard input for -.",
			flags: func(fs *flag.FlagSet) {
				fs.BoolVar(&cas, "cas", false, "write only if the entry is as it was at -modify-index")
				fs.Uint64Var(&index, "modify-index", 0, "`index` that -cas compares with; 0 is no entry")
			},
			run: func(c *call) error {
				if len(c.args) != 1 {
					return usage("name one file, or - for standard input")
				}
				entries, err := c.entries(c.args[0])
				if err != nil {
					return err
				}
				for _, e := range entries {
					if cas {
						ok, _, err := c.api.ConfigEntries().CAS(e, index, nil)
						if err != nil {
							return fmt.Errorf("write %s/%s: %w", e.GetKind(), e.GetName(), err)
						}
						if !ok {
							return fmt.Errorf("write %s/%s: it is not as it was at index %d", e.GetKind(), e.GetName(), index)
						}
					} else if _, _, err := c.api.ConfigEntries().Set(e, nil); err != nil {
						return fmt.Errorf("write %s/%s: %w", e.GetKind(), e.GetName(), err)
					}
					fmt.Fprintf(c.out, "Config entry written: %s/%s\n", e.GetKind(), e.GetName())
				}
				return nil
			},
		},
		{
			name: "config read", http: true, synopsis: "Print a configuration entry", flags: selectors,
			run: func(c *call) error {
				if kind == "" || name == "" {
					return usage("-kind and -name say which entry")
				}
				e, _, err := c.api.ConfigEntries().Get(kind, name, c.query())
				if err != nil {
					return fmt.Errorf("read %s/%s: %w", kind, name, err)
				}
				b, err := json.MarshalIndent(e, "", "    ")
				if err != nil {
					return err
				}
				fmt.Fprintln(c.out, string(b))
				return nil
			},
		},
		{
			name: "config list", http: true, synopsis: "List the configuration entries of a kind",
			flags: func(fs *flag.FlagSet) { fs.StringVar(&kind, "kind", "", "`kind` of the entries") },
			run: func(c *call) error {
				if kind == "" {
					return usage("-kind says which entries")
				}
				list, _, err := c.api.ConfigEntries().List(kind, c.query())
				if err != nil {
					return fmt.Errorf("list %s: %w", kind, err)
				}
				for _, e := range list {
					fmt.Fprintln(c.out, e.GetName())
				}
				return nil
			},
		},
		{
			name: "config delete", http: true, synopsis: "Delete a configuration entry",
			flags: func(fs *flag.FlagSet) {
				selectors(fs)
				fs.StringVar(&filename, "filename", "", "delete the entries of this `file`")
				fs.BoolVar(&cas, "cas", false, "delete only if the entry is as it was at -modify-index")
				fs.Uint64Var(&index, "modify-index", 0, "`index` that -cas compares with")
			},
			run: func(c *call) error {
				type key struct{ kind, name string }
				keys := []key{{kind, name}}
				switch {
				case filename != "" && kind+name != "":
					return usage("give either -filename, or -kind and -name")
				case filename != "":
					entries, err := c.entries(filename)
					if err != nil {
						return err
					}
					keys = nil
					for _, e := range entries {
						keys = append(keys, key{e.GetKind(), e.GetName()})
					}
				case kind == "" || name == "":
					return usage("-kind and -name say which entry")
				}
				for _, k := range keys {
					if cas {
						ok, _, err := c.api.ConfigEntries().DeleteCAS(k.kind, k.name, index, nil)
						if err != nil {
							return fmt.Errorf("delete %s/%s: %w", k.kind, k.name, err)
						}
						if !ok {
							return fmt.Errorf("delete %s/%s: it is not as it was at index %d", k.kind, k.name, index)
						}
					} else if _, err := c.api.ConfigEntries().Delete(k.kind, k.name, nil); err != nil {
						return fmt.Errorf("delete %s/%s: %w", k.kind, k.name, err)
					}
					fmt.Fprintf(c.out, "Config entry deleted: %s/%s\n", k.kind, k.name)
				}
				return nil
			},
		},
	}
}

// entries reads the configuration entries of a file, or of standard input for -;
// what the name does not tell of the format the text does.
func (c *call) entries(name string) ([]configentry.Entry, error) {
	b, err := c.readFile(name)
	if err != nil {
		return nil, err
	}
	if name == "-" {
		name = "standard input"
	}
	return config.ParseEntries(name, b)
}
